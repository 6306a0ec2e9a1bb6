"""What is no checkpoint does not become one: parts of several moments, pages that nobody wrote, another base."""

from __future__ import annotations

from dataclasses import replace

import pytest

from mempool.checkpoint.commit import begin, commit, read_manifest
from mempool.checkpoint.format.pages import Pages
from mempool.checkpoint.writer import PartWriter
from mempool.errors import DataLoss, InvalidRequest
from tests.unit.checkpoint.contents import PLAIN, Content, page_arrays, spread, write, write_part
from tests.unit.checkpoint.memory import MemoryStore

CONTENT = Content.random(PLAIN, seed=1, version=3)
HALVES = [Pages.of_shard(spread(PLAIN, 2), shard) for shard in range(2)]


def test_parts_of_two_moments_are_refused() -> None:
    store = MemoryStore()
    begun = begin(store, pool="a")
    parts = [write_part(store, begun, replace(CONTENT, version=3 + shard), shard, HALVES[shard]) for shard in range(2)]
    with pytest.raises(
        InvalidRequest, match=r"of different moments: 'shard-0' wrote version 3 \(step 6\), 'shard-1' 4"
    ):
        commit(store, begun, parts)


def test_pages_that_nobody_or_two_wrote_are_refused() -> None:
    store = MemoryStore()
    begun = begin(store, pool="a")
    part = write_part(store, begun, CONTENT, 0, HALVES[0])
    with pytest.raises(InvalidRequest, match="26 pages of table 'facts' are in no part, among those of shard-0"):
        commit(store, begun, [part])
    both = write_part(store, begun, CONTENT, 1, Pages.all(PLAIN))
    with pytest.raises(InvalidRequest, match="26 pages of table 'facts' are in two parts of shard-0, shard-1"):
        commit(store, begun, [part, both])
    with pytest.raises(InvalidRequest, match="two parts of one writer"):
        commit(store, begun, [part, part])


def test_a_page_that_its_owner_did_not_write_is_not_taken_from_the_base() -> None:
    store = MemoryStore()
    write(store, [CONTENT], pool="a")
    begun = begin(store, pool="a")
    part = write_part(store, begun, CONTENT, 0, HALVES[0])
    whole = write_part(store, begun, CONTENT, 1, HALVES[1])
    with pytest.raises(InvalidRequest, match="26 are its own, and 0 were written"):
        commit(store, begun, [part, replace(whole, table=replace(whole.table, batches=()))])


def test_changes_since_another_checkpoint_are_refused() -> None:
    store = MemoryStore()
    first = write(store, [CONTENT], pool="a")
    begun = begin(store, pool="a")
    part = write_part(store, begun, CONTENT, 0, Pages.all(PLAIN), Pages.none(PLAIN))
    assert part.since == first.name
    commit(store, begun, [part])
    later = replace(part, checkpoint="", files={})
    begun = begin(store, pool="a")
    with pytest.raises(
        InvalidRequest, match=f"what changed since '{first.name}' .version 3., and this checkpoint stands"
    ):
        commit(store, begun, [replace(later, checkpoint=begun.name)])
    begun = begin(store, pool="a", incremental=False)
    with pytest.raises(InvalidRequest, match=r"stands on no checkpoint. Write all of its pages"):
        commit(store, begun, [replace(later, checkpoint=begun.name)])
    wrong = replace(part, since_version=2)
    begun = begin(store, pool="a")
    with pytest.raises(InvalidRequest, match=r"\(version 2\), and this checkpoint stands on '.*' \(version 3\)"):
        commit(store, begun, [replace(wrong, checkpoint=begun.name, files={})])


def test_changes_of_a_table_made_anew_are_refused() -> None:
    store = MemoryStore()
    write(store, [CONTENT], pool="a")
    anew = replace(CONTENT, schema=replace(PLAIN, table_id=8))
    begun = begin(store, pool="a")
    part = write_part(store, begun, anew, 0, Pages.all(PLAIN), Pages.none(PLAIN))
    with pytest.raises(InvalidRequest, match=r"table_id is 7 and 8. Write all"):
        commit(store, begun, [part])


def test_a_place_has_one_pool() -> None:
    store = MemoryStore()
    write(store, [CONTENT], pool="a")
    with pytest.raises(InvalidRequest, match="has checkpoints of pool 'a', and this is pool 'b'"):
        begin(store, pool="b")


def test_a_file_that_went_meanwhile_is_noticed() -> None:
    store = MemoryStore()
    begun = begin(store, pool="a")
    part = write_part(store, begun, CONTENT, 0, Pages.all(PLAIN))
    (path,) = part.files
    del store.files[path]
    with pytest.raises(DataLoss, match=r"is not whole: .* is missing. Take it again"):
        commit(store, begun, [part])
    assert store.files == {}


def test_extra_must_be_json() -> None:
    store = MemoryStore()
    for extra in ({"x": object()}, {"x": float("nan")}):
        begun = begin(store, pool="a")
        part = write_part(store, begun, CONTENT, 0, Pages.all(PLAIN))
        with pytest.raises(InvalidRequest, match="cannot be kept: it must be JSON"):
            commit(store, begun, [part], extra=extra)
    with pytest.raises(InvalidRequest, match="ledgers of tables"):
        commit(store, begun, [part], ledgers={"others": {}})
    commit(store, begun, [part])
    manifest = commit(store, begun, [part], extra={"epoch": 3, "model": "m-3.pt"})
    assert read_manifest(store).extra == manifest.extra == {"epoch": 3, "model": "m-3.pt"}


def test_a_part_is_of_its_checkpoint_and_names_its_own_files() -> None:
    store = MemoryStore()
    begun = begin(store, pool="a")
    part = write_part(store, begun, CONTENT, 0, Pages.all(PLAIN))
    with pytest.raises(InvalidRequest, match="is of checkpoint 'x'"):
        commit(store, begun, [replace(part, checkpoint="x")])
    (file,) = part.files.values()
    with pytest.raises(InvalidRequest, match="outside of checkpoint"):
        commit(store, begun, [replace(part, files={"other/x.safetensors": file})])


def test_a_writer_is_used_as_it_is_meant() -> None:
    store = MemoryStore()

    def writer(changed: Pages | None = None) -> PartWriter:
        return PartWriter(
            store,
            "000001-00000000",
            "shard-0",
            schema=PLAIN,
            arrays=page_arrays(PLAIN),
            version=0,
            step_count=0,
            owned=Pages.all(PLAIN),
            changed=changed,
        )

    with pytest.raises(InvalidRequest, match="`changed` and `since` together"):
        writer(Pages.all(PLAIN))
    with writer() as writing:
        with pytest.raises(InvalidRequest, match="not written whole"):
            writing.part()
        group = next(writing.groups())
        for arrays, told in [
            ({}, "came with"),
            ({**CONTENT.of(group), "other": CONTENT.rows["values"]}, "came with"),
            (
                {**CONTENT.of(group), "values": CONTENT.rows["values"][1:]},
                "'values' .* came as torch.float32 .103, 20.",
            ),
        ]:
            with pytest.raises(InvalidRequest, match=told):
                writing.write(arrays)
        assert (writing.written_bytes, writing.num_bytes) == (0, 3 * 104 * 20 * 4)
        writing.write(CONTENT.of(group))
        assert writing.written_bytes == writing.num_bytes
        with pytest.raises(InvalidRequest, match="once for each"):
            writing.write(CONTENT.of(group))
        assert list(writing.part().files) == list(store.files)


def test_two_pools_that_begin_in_one_place_do_not_both_end() -> None:
    store = MemoryStore()
    first, second = begin(store, pool="a"), begin(store, pool="b")
    parts = [write_part(store, begun, CONTENT, 0, Pages.all(PLAIN)) for begun in (first, second)]
    commit(store, first, parts[:1])
    with pytest.raises(InvalidRequest, match=f"checkpoint '{first.name}' was taken in memory meanwhile"):
        commit(store, second, parts[1:])
    assert read_manifest(store).pool == "a"


def test_a_damaged_manifest_keeps_nobody_from_a_whole_checkpoint() -> None:
    store = MemoryStore()
    write(store, [CONTENT], pool="a")
    damaged = write(store, [CONTENT], pool="a")
    store.files[f"{damaged.name}/manifest.json"] = b""
    begun = begin(store, pool="a")
    assert (begun.base, begun.number) == (None, 3)
    with pytest.raises(InvalidRequest, match="checkpoints of pool 'a'"):
        begin(store, pool="b")


def test_a_base_of_which_most_is_dead_is_stood_on_no_more() -> None:
    store = MemoryStore()
    write(store, [CONTENT], pool="a")
    seen = []
    for version in range(4, 9):
        changed = Pages.all(PLAIN)
        changed.row_pages[16 - version :] = False  # a page of each stays live, and the file that it is in with it
        begun = begin(store, pool="a")
        seen.append(begun.base is not None)
        content = replace(CONTENT, version=version)
        commit(store, begun, [write_part(store, begun, content, 0, Pages.all(PLAIN), changed)])
    assert seen == [True, True, False, True, True]
