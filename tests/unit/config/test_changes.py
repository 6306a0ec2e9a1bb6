"""What an edit asks of a living pool."""

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.config import Adagrad, Adam, ClusterConfig, FlatKeys, TableConfig, diff, resolve
from mempool.config.changes import Changes, FieldChange
from mempool.errors import ConfigError

FACTS = TableConfig(name="facts", num_slots=1024, value_dim=256)
OTHER = TableConfig(name="other", num_slots=64, value_dim=8)


def config(
    *tables: TableConfig, shards: int = 2, shard: dict[str, object] | None = None, **pool: object
) -> ClusterConfig:
    return ClusterConfig.model_validate(
        {"pool": {"name": "p", "shards": shards, **pool}, "shard": shard or {}, "tables": tables}
    )


def changed(table: TableConfig, **fields: object) -> TableConfig:
    return TableConfig.model_validate({**vars(table), **fields})


@settings(deadline=None)
@given(
    old=st.sets(st.sampled_from("abcdef")),
    new=st.sets(st.sampled_from("abcdef")),
    shards=st.tuples(st.integers(1, 9), st.integers(1, 9)),
)
def test_tables_are_created_or_kept_and_never_dropped(old: set[str], new: set[str], shards: tuple[int, int]) -> None:
    tables = {name: changed(OTHER, name=name) for name in "abcdef"}
    before = config(*(tables[n] for n in sorted(old)), shards=shards[0])
    after = config(*(tables[n] for n in sorted(new)), shards=shards[1])
    found = diff(before, after)
    assert found == Changes(
        shards_before=shards[0],
        shards_after=shards[1],
        create=tuple(tables[n] for n in sorted(new - old)),
        kept=tuple(sorted(old - new)),
    )
    assert found.nothing == (shards[0] == shards[1] and new <= old)
    assert len(found.lines()) == len(new ^ old) + (shards[0] != shards[1])
    found.check()


def test_the_same_file_asks_nothing() -> None:
    found = diff(config(FACTS, OTHER), config(OTHER, FACTS))
    assert found.nothing
    assert found.lines() == []


def test_saying_a_default_aloud_is_no_change() -> None:
    aloud = changed(FACTS, block_dim=64, page_slots=16, init_std=1 / 16, optimizer={"type": "ADAGRAD", "lr": 0.1})
    assert aloud != FACTS
    assert diff(config(FACTS), config(aloud)).nothing


def test_a_field_that_is_taken_out_of_the_file_is_told_though_it_only_follows() -> None:
    found = diff(config(changed(FACTS, init_std=0.5)), config(FACTS))
    assert [each.field for each in found.refused] == ["tables[facts].init_std"]


@pytest.mark.parametrize(
    ("edited", "changes"),
    [
        (changed(FACTS, value_dim=512, init_std=1 / 16), [("tables[facts].value_dim", 256, 512)]),
        (changed(FACTS, dtype="bfloat16", rounding="nearest"), [("tables[facts].dtype", "float32", "bfloat16")]),
        # What only follows (init_std, page_slots, rounding) is not told beside what was edited; alone it is.
        (changed(FACTS, dtype="int8"), [("tables[facts].dtype", "float32", "int8")]),
        (changed(FACTS, value_dim=512), [("tables[facts].value_dim", 256, 512)]),
        (changed(FACTS, optimizer=Adagrad(0.5)), [("tables[facts].optimizer.lr", 0.1, 0.5)]),
        (
            changed(FACTS, optimizer=Adam(0.1, eps=1e-10)),
            [("tables[facts].optimizer.algorithm", "adagrad", "adam")],
        ),
        (
            changed(FACTS, keys=FlatKeys(key_dim=4), layout="auto"),
            [
                ("tables[facts].layout", "auto", "rows"),
                ("tables[facts].keys", None, resolve(changed(FACTS, keys=FlatKeys(key_dim=4))).keys),
            ],
        ),
    ],
)
def test_a_table_that_changes_is_refused_by_field(
    edited: TableConfig, changes: list[tuple[str, object, object]]
) -> None:
    found = diff(config(FACTS), config(edited))
    assert found.refused == tuple(FieldChange(field=f, before=b, after=a) for f, b, a in changes)
    assert not found.nothing
    assert found.create == ()
    with pytest.raises(ConfigError) as caught:
        found.check()
    for field, _, _ in changes:
        assert f"\n  {field}: " in str(caught.value)
    assert "nothing was applied" in str(caught.value)


def test_another_pools_name_is_refused() -> None:
    found = diff(config(), config(name="q"))
    assert found.refused == (FieldChange(field="pool.name", before="p", after="q"),)
    with pytest.raises(ConfigError, match=r"pool\.name: 'p' -> 'q'"):
        found.check()


def test_settings_of_processes_wait_for_a_restart() -> None:
    found = diff(config(), config(port=7078, shard={"memory": "3GiB", "threads": 2}))
    assert [str(change) for change in found.restart] == [
        "pool.port: 7_077 -> 7_078",
        "shard.threads: 1 -> 2",
        "shard.memory: 2_147_483_648 -> 3_221_225_472",
    ]
    assert found.nothing
    found.check()
    assert all(line.startswith("leave aside ") for line in found.lines())


def test_what_the_pool_has_counts_more_than_the_old_file() -> None:
    # A client made "other", somebody scaled to 3, and the pool gave its own table ids.
    live = [replace(resolve(FACTS), table_id=7), replace(resolve(OTHER), table_id=9)]
    found = diff(config(), config(FACTS, changed(OTHER, seed=1), shards=3), live_tables=live, live_shards=3)
    assert (found.shards_before, found.shards_after, found.create) == (3, 3, ())
    assert found.refused == (FieldChange(field="tables[other].seed", before=0, after=1),)


def test_lines_are_for_people() -> None:
    found = diff(config(OTHER), config(FACTS, shards=4, port=1))
    assert found.lines() == [
        "shards: 2 -> 4, moving pages while the pool works",
        "create table facts: 1,024 x 256 float32",
        "keep table other: it is not in the file, and apply never drops data",
        "leave aside pool.port: 7_077 -> 1: it takes effect when the pool is started again",
    ]
