"""Users without a home, without rights, without room on the disk; a folder for Ray that is this user's alone."""

import os
from pathlib import Path

import pytest

from mempool.errors import ConfigError
from mempool.rayhost import folders
from mempool.rayhost.folders import ray_folder, ray_place, require_room, room_problem, state_folder, state_place


@pytest.fixture(autouse=True)
def _no_settings(monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("MEMPOOL_STATE", "XDG_STATE_HOME", "RAY_TMPDIR"):
        monkeypatch.delenv(variable, raising=False)


def test_state_is_where_the_user_says(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    assert state_folder() == tmp_path / "home" / ".local" / "state" / "mempool"
    assert state_folder().is_dir()
    monkeypatch.setenv("XDG_STATE_HOME", str(tmp_path / "xdg"))
    assert state_folder() == tmp_path / "xdg" / "mempool"
    monkeypatch.setenv("MEMPOOL_STATE", str(tmp_path / "own"))
    assert state_folder() == tmp_path / "own"


def test_a_user_without_a_home(monkeypatch: pytest.MonkeyPatch) -> None:
    def homeless() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", homeless)
    assert state_place() is None
    with pytest.raises(ConfigError, match=r"no home .*set MEMPOOL_STATE or XDG_STATE_HOME"):
        state_folder()
    monkeypatch.undo()
    monkeypatch.setenv("HOME", "relative")
    assert state_place() is None


def test_a_home_that_cannot_be_written(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("MEMPOOL_STATE", str(tmp_path / "file" / "state"))
    with pytest.raises(ConfigError, match=r"Not a directory.*set MEMPOOL_STATE"):
        state_folder()
    (tmp_path / "there").mkdir()
    monkeypatch.setenv("MEMPOOL_STATE", str(tmp_path / "there"))
    monkeypatch.setattr(os, "access", lambda *_: False)
    with pytest.raises(ConfigError, match=r"no right to write there.*set MEMPOOL_STATE"):
        state_folder()


def test_rays_folder_is_this_users_alone(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: "/tmp")
    assert ray_place() == Path(f"/tmp/mempool-{os.getuid()}/ray")
    monkeypatch.setattr(folders.tempfile, "gettempdir", lambda: "/tmp/" + 40 * "x")
    assert ray_place() == Path(f"/tmp/mempool-{os.getuid()}/ray"), "too long for Ray's sockets"

    place = tmp_path / f"mempool-{os.getuid()}" / "ray"
    monkeypatch.setattr(folders, "ray_place", lambda: place)
    assert ray_folder() == place
    assert place.is_dir()
    assert place.parent.stat().st_mode & 0o077 == 0
    place.parent.chmod(0o777)
    with pytest.raises(ConfigError, match=r"not this user's own folder.*set RAY_TMPDIR"):
        ray_folder()
    place.rmdir()
    place.parent.rmdir()
    place.parent.symlink_to(tmp_path)
    with pytest.raises(ConfigError, match="not this user's own folder"):
        ray_folder()
    monkeypatch.undo()
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / "own"))
    assert ray_folder() == tmp_path / "own"


def test_a_full_disk_is_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert room_problem(tmp_path, 1) is None
    problem = room_problem(tmp_path, 1 << 62)
    assert problem is not None
    assert "no space left on device" in problem
    assert str(tmp_path) in problem
    with pytest.raises(ConfigError, match=r"no space left on device.*Make room"):
        require_room(tmp_path, 1 << 62)
    assert room_problem(tmp_path / "none", 1 << 62) is None

    class Full:
        f_bavail, f_frsize, f_files, f_favail = 1 << 40, 4096, 10, 0

    monkeypatch.setattr(os, "statvfs", lambda _: Full)
    assert "no more files" in (room_problem(tmp_path, 1) or "")
