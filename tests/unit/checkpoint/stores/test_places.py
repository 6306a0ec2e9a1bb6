"""What is taken for a place of checkpoints, and what is refused before anything looks there."""

import os
from pathlib import Path

import pytest

from mempool.checkpoint.stores.places import MAX_PLACE_BYTES, absolute, check_place
from mempool.errors import InvalidRequest


@pytest.mark.parametrize("place", ["/a", "/a b/ü", "s3://bucket/run-7", "file:///a/b", "memory://x", "gs://b", "/"])
def test_absolute_paths_and_plain_urls_are_places(place: str) -> None:
    assert check_place(place) == place
    assert absolute(place) == place


@pytest.mark.parametrize(
    "place",
    [
        "", "a", "./a", "~/a", "file://a", "local://a", "S3://a", "s 3://a", "://a", "simplecache::s3://a", "/a\n",
        "/a\0", "/a\x7f", "/a/../b", "s3://a/..", "/a\udc80", "/" + "x" * MAX_PLACE_BYTES, "x" * 40 + "://a",
    ],
)  # fmt: skip
def test_others_are_none_and_it_is_said_what_to_give(place: str) -> None:
    with pytest.raises(InvalidRequest, match=r"Nothing was changed\.$"):
        check_place(place)


def test_a_users_path_is_of_his_own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/somebody")
    assert absolute("run-7") == str(tmp_path / "run-7")
    assert absolute(tmp_path / "a") == str(tmp_path / "a")
    assert absolute("~/run-7") == "/home/somebody/run-7"
    for wrong in (None, 3, b"/a", os.fsencode("/a")):
        with pytest.raises(InvalidRequest, match="a checkpoint's place is"):
            absolute(wrong)  # type: ignore[arg-type]
