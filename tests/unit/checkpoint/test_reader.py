"""What was written comes back, bit for bit, into any number of shards and any layout, whatever layout wrote it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mempool.checkpoint.commit import begin, commit
from mempool.checkpoint.format.ledger_json import ledger_json
from mempool.checkpoint.format.pages import Pages
from mempool.checkpoint.reader import Checkpoint
from mempool.checkpoint.stores.local import LocalStore
from mempool.errors import DataLoss, InvalidRequest, NotFound
from mempool.types import Ledger, LedgerEntry, TableSchema
from tests.unit.checkpoint.contents import (
    FLAT,
    PLAIN,
    PRODUCT,
    Content,
    page_arrays,
    read,
    same_bits,
    spread,
    write,
    write_part,
)
from tests.unit.checkpoint.memory import MemoryStore
from tests.unit.wire.right_schemas import schemas

LAYOUTS = st.sampled_from(["columns", "rows", "grid", "auto"])
SIZES = st.sampled_from([1, 700, 5000, 2**24])


def small(schema: TableSchema) -> bool:
    return schema.keys is None or schema.keys.key_dim <= 256


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    schema=schemas().filter(small),
    written=st.tuples(st.integers(1, 5), LAYOUTS, SIZES, SIZES),
    wanted=st.tuples(st.integers(1, 8), LAYOUTS, SIZES),
)
def test_any_table_comes_back_into_any_placement(schema: TableSchema, written: Any, wanted: Any) -> None:
    store = MemoryStore()
    content = Content.random(schema, seed=1, version=12)
    write(store, [content], shards=written[0], layout=written[1], batch_bytes=written[2], file_bytes=written[3])

    checkpoint = Checkpoint(store)
    state = checkpoint.manifest.tables[schema.name]
    assert (state.schema, state.version, state.step_count, state.ledger) == (schema, 12, 15, {"version": 12})
    found = read(checkpoint, schema.name, spread(schema, wanted[0], wanted[1]), batch_bytes=wanted[2])
    assert found.same(content)


@pytest.mark.parametrize("schema", [PLAIN, PRODUCT, FLAT], ids=lambda schema: schema.name)
@pytest.mark.parametrize(("shards", "layout"), [(1, "columns"), (3, "rows"), (8, "rows"), (8, "columns")])
def test_columns_of_four_shards_come_back_elsewhere(
    tmp_path: Path, schema: TableSchema, shards: int, layout: str
) -> None:
    store = LocalStore(tmp_path)
    content = Content.random(schema, seed=2)
    write(store, [content], shards=4, layout="columns", batch_bytes=2000, file_bytes=8000)
    assert read(Checkpoint(store), schema.name, spread(schema, shards, layout), batch_bytes=3000).same(content)


@settings(max_examples=15, deadline=None, suppress_health_check=list(HealthCheck))
@given(data=st.data(), schema=st.sampled_from([PLAIN, PRODUCT, FLAT]))
def test_chains_of_changes_come_back(data: st.DataObject, schema: TableSchema) -> None:
    store = MemoryStore()
    contents = [Content.random(schema, seed=3)]
    written = [write(store, contents, shards=2, batch_bytes=2000)]
    for number in range(1, data.draw(st.integers(2, 4))):
        every = Pages.all(schema)
        rng = np.random.default_rng(data.draw(st.integers(0, 2**32)))
        share = data.draw(st.sampled_from([0.0, 0.1, 0.5, 1.0]))
        changed = Pages(
            rng.random(every.row_pages.shape) < share,
            rng.random(every.key_pages.shape) < share,
        )
        contents.append(contents[-1].changed(changed, seed=10 + number, version=number))
        shards, layout = data.draw(st.integers(1, 4)), data.draw(LAYOUTS)
        sizes = {"batch_bytes": data.draw(SIZES), "file_bytes": data.draw(SIZES)}
        written.append(
            write(store, contents[-1:], shards=shards, layout=layout, changed={schema.name: changed}, **sizes)
        )
    for content, manifest in zip(contents, written, strict=True):
        checkpoint = Checkpoint(store, manifest.name)
        assert checkpoint.manifest == manifest
        assert checkpoint.manifest.tables[schema.name].version == content.version
        assert read(checkpoint, schema.name, spread(schema, 3, "rows")).same(content)


def test_an_unchanged_table_writes_nothing(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    content = Content.random(PLAIN, seed=1)
    first = write(store, [content], shards=2)
    second = write(store, [content], shards=2, changed={"facts": Pages.none(PLAIN)})
    assert [path.name for path in (tmp_path / second.name).iterdir()] == ["manifest.json"]
    assert second.bases == (first.name,)
    assert read(Checkpoint(store), "facts", spread(PLAIN, 1)).same(content)


def test_ranges_say_what_to_read_and_no_more(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    content = Content.random(PLAIN, seed=1)
    write(store, [content], shards=4, layout="columns")
    stored = Checkpoint(store).table("facts")
    values = PLAIN.page_slots * PLAIN.value_dim * 4
    of_all = list(stored.ranges(Pages.all(PLAIN)))
    assert (
        sum(found.length for found in of_all) == stored.num_bytes(Pages.all(PLAIN)) == 3 * PLAIN.num_row_pages * values
    )
    assert len(of_all) == 3 * PLAIN.num_blocks  # one per array and block: pages lie side by side
    one = Pages.none(PLAIN)
    one.row_pages[5] = True
    found = list(stored.ranges(one, arrays=["values"]))
    assert sum(range_.length for range_ in found) == values
    assert {(range_.array, range_.pages) for range_ in found} == {("values", (5,))}


def test_some_arrays_are_read_alone(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    content = Content.random(FLAT, seed=1)
    write(store, [content], shards=2)
    stored = Checkpoint(store).table("cities")
    for batch in stored.batches(Pages.all(FLAT), arrays=["values.scales"]):
        assert set(batch.arrays) == {"values.scales"}
        assert same_bits(batch.arrays["values.scales"], content.rows["values.scales"])


@pytest.mark.parametrize("schema", [PLAIN, PRODUCT, FLAT], ids=lambda schema: schema.name)
def test_a_batchs_memory_is_used_again_when_it_was_said_and_no_earlier(schema: TableSchema) -> None:
    store = MemoryStore()
    write(store, [Content.random(schema, 1)], shards=2, batch_bytes=3000)
    stored = Checkpoint(store).table(schema.name)
    every = list(stored.batches(Pages.all(schema), batch_bytes=2000))
    assert len(every) > 3
    seen: list[dict[str, torch.Tensor]] = []
    for number, batch in enumerate(stored.batches(Pages.all(schema), batch_bytes=2000, reused=2)):
        seen.append(batch.arrays)
        for late in (number, number - 1):
            for name, tensor in seen[max(0, late)].items():
                assert same_bits(tensor, every[max(0, late)].arrays[name])
    places = {tensor.data_ptr() for arrays in seen for name, tensor in arrays.items() if name == "values"}
    assert len(places) == 2


def test_data_files_are_plain_safetensors(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    content = Content.random(PLAIN, seed=1, version=4)
    write(store, [content])
    (path,) = tmp_path.glob("*/*.safetensors")
    with safe_open(path, "pt") as file:
        assert file.metadata()["batch0"] == "row pages 0-12 of blocks 0-3"
        assert file.metadata()["version"] == "4"
        blocks = [file.get_tensor(f"batch0.values.block{block}") for block in range(4)]
    assert same_bits(torch.cat(blocks, dim=1), content.rows["values"])


def test_another_schema_is_refused_with_the_difference(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write(store, [Content.random(PLAIN, seed=1)])
    stored = Checkpoint(store).table("facts")
    stored.check_schema(replace(PLAIN, table_id=99, name="others", layout="rows"))
    with pytest.raises(InvalidRequest, match="value_dim is 20 there and 24 here, dtype is 'float32' there"):
        stored.check_schema(replace(PLAIN, value_dim=24, dtype="bfloat16"))
    stored.check_schema(PLAIN, arrays=page_arrays(PLAIN))
    with pytest.raises(InvalidRequest, match=r"have the arrays .*exp_avg_sq.*, and \['values'\] are expected"):
        stored.check_schema(PLAIN, arrays=page_arrays(PLAIN)[:1])


def test_what_is_not_there_is_said(tmp_path: Path) -> None:
    store = LocalStore(tmp_path / "none")
    with pytest.raises(NotFound, match="has no checkpoint"):
        Checkpoint(store)
    manifest = write(store, [Content.random(PLAIN, seed=1)])
    with pytest.raises(NotFound, match=f"has no checkpoint '000009-00000000'; it has: {manifest.name}"):
        Checkpoint(store, "000009-00000000")
    with pytest.raises(NotFound, match="is no name of a checkpoint"):
        Checkpoint(store, "../../etc")
    with pytest.raises(NotFound, match="no table 'others'; it has: facts"):
        Checkpoint(store).table("others")


def test_half_a_checkpoint_is_refused(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write(store, [Content.random(PLAIN, seed=1)], shards=2)
    first, second = sorted(tmp_path.glob("*/*.safetensors"))
    data = first.read_bytes()
    first.write_bytes(data[:-1])
    with pytest.raises(DataLoss, match=f"1 of its 2 files: .*{first.name} has .* bytes, and should have"):
        Checkpoint(store)
    first.write_bytes(data)
    second.unlink()
    with pytest.raises(DataLoss, match=f"{second.name} is missing"):
        Checkpoint(store)


def test_a_file_cut_off_meanwhile_is_found_in_reading(tmp_path: Path) -> None:
    store = LocalStore(tmp_path)
    write(store, [Content.random(PLAIN, seed=1)])
    checkpoint = Checkpoint(store)
    (path,) = tmp_path.glob("*/*.safetensors")
    path.write_bytes(path.read_bytes()[:-1])
    with pytest.raises(DataLoss, match="ends before byte"):
        read(checkpoint, "facts", spread(PLAIN, 1))
    path.unlink()
    with pytest.raises(DataLoss, match="is missing, and a checkpoint needs it"):
        read(checkpoint, "facts", spread(PLAIN, 1))


def test_a_ledger_is_read_where_there_is_one() -> None:
    store = MemoryStore()
    content = Content.random(PLAIN, seed=1)
    write(store, [content])
    with pytest.raises(DataLoss, match=r"table 'facts' has no ledger: ledger\.entries is missing"):
        Checkpoint(store).table("facts").ledger()
    ledger = Ledger(version=3, entries={("a", 0): LedgerEntry(step=3, version=3)}, step_offset=-1)
    for given_, found in [(ledger_json(ledger), ledger), (None, None)]:
        begun = begin(store, pool="run-7")
        part = write_part(store, begun, content, 0, Pages.all(PLAIN))
        commit(store, begun, [part], ledgers={"facts": given_})
        assert Checkpoint(store).table("facts").ledger() == found
