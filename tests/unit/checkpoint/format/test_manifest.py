"""A manifest says again what it was given; what is damaged, hostile or newer is refused with its file named."""

from __future__ import annotations

import contextlib
import copy
import json
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mempool.checkpoint.commit import begin
from mempool.checkpoint.format.json_values import Fields, Unfit, span_text, spans
from mempool.checkpoint.format.manifest import manifest_bytes, parse_manifest, parse_part, part_bytes
from mempool.checkpoint.format.pages import Pages
from mempool.checkpoint.format.schema_json import parse_schema, schema_json
from mempool.checkpoint.format.sealed import sealed, unsealed
from mempool.errors import DataLoss, InvalidRequest
from mempool.types import TableSchema
from mempool.types.schema_checks import check_schema
from mempool.types.sizes import bytes_by_owner
from tests.unit.checkpoint.contents import FLAT, PLAIN, PRODUCT, Content, page_arrays, write, write_part
from tests.unit.checkpoint.memory import MemoryStore
from tests.unit.types.schemas import schemas as strange_schemas
from tests.unit.wire.right_schemas import schemas

MANIFEST = write(MemoryStore(), [Content.random(schema, 1, 5) for schema in (PLAIN, PRODUCT, FLAT)], shards=2)
DATA = manifest_bytes(MANIFEST)
FIELDS = unsealed(DATA, "mempool.checkpoint", "here")


@settings(max_examples=150, deadline=None)
@given(schemas())
def test_every_schema_comes_back_exactly(schema: TableSchema) -> None:
    there = json.loads(json.dumps(schema_json(schema), allow_nan=False))
    assert parse_schema(there, "schema") == schema


@settings(max_examples=150, deadline=None)
@given(strange_schemas())
def test_no_schema_comes_in_that_no_table_may_have(schema: TableSchema) -> None:
    there = json.loads(json.dumps(schema_json(schema)))
    with contextlib.suppress(Unfit):
        found = parse_schema(there, "schema")
        check_schema(found)
        assert found == schema


def test_a_field_that_an_older_mempool_did_not_know_has_its_default() -> None:
    there = schema_json(PRODUCT)
    del there["master"], there["optimizer"]["max_norm"], there["keys"]["deterministic"]
    assert parse_schema(there, "schema") == PRODUCT
    with pytest.raises(Unfit, match=r"schema\.optimizer\.warmup is not known here: a newer mempool wrote it"):
        parse_schema({**there, "optimizer": {**there["optimizer"], "warmup": 3}}, "schema")
    del there["num_slots"]
    with pytest.raises(Unfit, match=r"schema\.num_slots is missing"):
        parse_schema(there, "schema")


def test_manifests_and_parts_come_back() -> None:
    assert parse_manifest(DATA, "here") == MANIFEST
    assert json.loads(DATA)["tables"]["facts"]["schema"]["num_slots"] == 100  # plain JSON for anybody
    store = MemoryStore()
    part = write_part(store, begin(store, pool="a"), Content.random(PRODUCT, 1), 3, Pages.all(PRODUCT))
    again = parse_part(part_bytes(part))
    assert (again.checkpoint, again.writer, again.since, again.table) == (part.checkpoint, "shard-3", None, part.table)
    assert (again.owned.row_pages == part.owned.row_pages).all()
    assert (again.owned.key_pages == part.owned.key_pages).all()


def test_every_flipped_bit_is_found() -> None:
    for place in range(0, len(DATA), 7):
        for bit in (0, 1, 5):
            wrong = bytearray(DATA)
            wrong[place] ^= 1 << bit
            with pytest.raises(DataLoss, match="here is damaged"):
                parse_manifest(bytes(wrong), "here")


def test_every_cut_is_found() -> None:
    for end in range(0, len(DATA), 11):
        with pytest.raises(DataLoss, match="here is damaged"):
            parse_manifest(DATA[:end], "here")
    with pytest.raises(DataLoss, match="here is damaged"):
        parse_manifest(DATA + b"\n", "here")


def test_a_newer_format_is_told_from_damage() -> None:
    newer = sealed("mempool.checkpoint", {"format_version": 2, "anything": []})
    with pytest.raises(InvalidRequest, match=r"here has format version 2; this mempool reads up to 1. Use a newer"):
        parse_manifest(newer, "here")
    with pytest.raises(InvalidRequest, match="has format version 9"):
        parse_manifest(b'{"format": "mempool.checkpoint", "format_version": 9}', "here")
    with pytest.raises(
        InvalidRequest, match=r"here is 'mempool.checkpoint-part', and 'mempool.checkpoint' is expected"
    ):
        parse_manifest(sealed("mempool.checkpoint-part", {}), "here")


def paths_of(value: object, path: tuple[Any, ...] = ()) -> list[tuple[Any, ...]]:
    found = [path] if path else []
    if isinstance(value, dict | list):
        items = value.items() if isinstance(value, dict) else enumerate(value)
        found += [inner for key, element in items for inner in paths_of(element, (*path, key))]
    return found


PATHS = [path for path in paths_of(FIELDS) if path[0] not in ("format", "extra") and "ledger" not in path]
VALUES = st.one_of(
    st.sampled_from([None, True, -1, 0, 1, 2**31, 2**63, 2**70, 1e400, 0.5, "", "0-9", "9-0", "00", "../x", "a" * 500]),
    st.sampled_from([[], {}, [[]], [0], [[0, ""]], {"": []}, "0-99999999999999999999", "1,1", "١"]),
    st.text(max_size=5),
)


@settings(max_examples=400, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.data())
def test_no_sealed_nonsense_is_taken_for_a_manifest_that_reads_elsewhere(data: st.DataObject) -> None:
    fields = copy.deepcopy(FIELDS)
    path = data.draw(st.sampled_from(PATHS))
    holder: Any = fields
    for key in path[:-1]:
        holder = holder[key]
    if data.draw(st.booleans()):
        holder[path[-1]] = data.draw(VALUES)
    else:
        del holder[path[-1]]
    try:
        text = sealed("mempool.checkpoint", fields)
    except ValueError:  # no JSON
        return
    try:
        manifest = parse_manifest(text, "here")
    except (DataLoss, InvalidRequest):
        return
    for table in manifest.tables.values():
        for batch in table.batches:
            file = manifest.files[batch.file]
            for array in table.arrays:
                for block, piece in zip(batch.blocks or (0,), batch.tensors.get(array.name, ()), strict=False):
                    count = len(piece.checksums) // 4
                    assert piece.offset + count * array.page_bytes(table.schema, block) <= file.size


@given(st.sets(st.integers(0, 300)).map(sorted))
def test_spans_come_back(numbers: list[int]) -> None:
    assert spans(span_text(numbers), "x", below=301) == tuple(numbers)


@pytest.mark.parametrize("text", ["1,0", "3-1", "5", "0-5", "x", "-1", "1-", "1,,2", "1,1", None, 3, " 1", "0-1-2"])
def test_spans_out_of_order_or_beyond_are_refused(text: object) -> None:
    with pytest.raises(Unfit, match=r"^x "):
        spans(text, "x", below=5)


def test_values_of_other_types_are_refused_by_their_paths() -> None:
    given = Fields({"a": "1", "b": 1, "c": [], "d": True}, "top")
    for read, told in [
        (lambda: given.integer("a"), r"top\.a is '1', no number"),
        (lambda: given.text("b"), r"top\.b is 1"),
        (lambda: given.members("c"), r"top\.c is no object"),
        (lambda: given.number("d"), r"top\.d is True, no number"),
        (lambda: given.flag("e"), r"top\.e is missing"),
    ]:
        with pytest.raises(Unfit, match=told):
            read()


def test_arrays_are_those_of_the_shards() -> None:
    """That a shard's arrays can be told by name, kind, dtype and width, and weigh what the shard says they do."""
    for schema in (PLAIN, PRODUCT, FLAT):
        where = Pages.all(schema)
        total = sum(
            array.page_bytes(schema, block)
            for array in page_arrays(schema)
            for block in range(schema.num_blocks if array.per != "head" else schema.num_key_pages)
            for _ in range(schema.num_row_pages if array.per != "head" else 1)
        )
        owners = where.row_pages.astype("int32") * 0
        assert total == sum(bytes_by_owner(schema, owners, where.key_pages.astype("int32") * 0).values())
