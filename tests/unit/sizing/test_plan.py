"""How many shards, which split, and what is refused or warned of."""

import re
from typing import Any

import pytest

from mempool.config import SGD, Adagrad, ProductKeys, RowWiseAdagrad, TableConfig
from mempool.errors import ConfigError
from mempool.sizing import Hosts, Model, make_plan
from mempool.sizing.plan import Plan
from mempool.types import MAX_SHARDS

from .machines import MACHINE

TABLE = TableConfig(name="memory", num_slots=2**20, value_dim=256, optimizer=Adagrad(0.1))
MIB = 2**20
KEYS = ProductKeys(heads=4, key_dim=512, optimizer=SGD(0.1))


def planned(
    table: dict[str, Any] | None = None,
    *,
    shards: int | None = None,
    machine: Any = None,
    path: str | None = None,
    **rest: Any,
) -> Plan:
    """A plan of the table, changed; fields of Model by their names, of Hosts with "host_" before."""
    model = {name: value for name, value in rest.items() if name in Model.model_fields}
    hosts = {name.removeprefix("host_"): value for name, value in rest.items() if name.startswith("host_")}
    config = TableConfig(**{**TABLE.model_dump(exclude={"optimizer"}), "optimizer": TABLE.optimizer, **(table or {})})
    return make_plan(config, Model(**model), Hosts(**hosts), shards=shards, machine=machine, path=path)


def test_the_fewest_shards_whose_memory_suffices() -> None:
    # 2 GiB of values and sums; a shard of 1,024 MiB has 640 for pages, as clients and commits get the rest.
    found = planned(host_shards=1, host_memory=1024 * MIB)
    assert (found.shard.page_bytes, found.shards_needed, found.shards, found.num_hosts) == (640 * MIB, 4, 4, 4)
    assert found.best.split.largest_bytes <= 640 * MIB
    assert planned(host_shards=1, host_memory=1024 * MIB, table={"dtype": "bfloat16"}).shards_needed == 3
    assert planned(host_shards=1, host_memory=1024 * MIB, table={"optimizer": SGD(0.1)}).shards_needed == 2
    assert planned(host_shards=1, host_memory=1024 * MIB, shared=False, layers=3).shards_needed == 10
    assert planned(host_shards=4, host_memory=4 * 1024 * MIB, shared=False, layers=3).shards_needed == 12, "whole hosts"
    assert planned().shards_needed == 1
    assert planned(host_gpus=8, host_gpu_memory=1024 * MIB, shared=False, layers=9).shards_needed == 32


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"shards": 3}, "3 shards are too few: each may have 640MiB of pages .* so 4 at least must share 2.0 GiB"),
        ({"shards": 0}, f"0 shards: a pool has 1 to {MAX_SHARDS}"),
        ({"shards": MAX_SHARDS + 1}, f"{MAX_SHARDS + 1} shards: a pool has 1 to {MAX_SHARDS}"),
        ({"table": {"layout": "columns"}, "shards": 40}, "layout = 'columns' spreads 32 blocks .* 40 are wanted"),
        ({"topk": 2**15, "table": {"num_slots": 2**14}}, "topk = 32768 slots of a table of num_slots = 16384"),
        ({"host_memory": MIB, "table": {"layout": "rows"}}, "one page of .* and a shard has 384KiB for it"),
        ({"host_memory": MIB, "host_shards": 2}, "give each of 2 shards less than 1MiB"),
        ({"table": {"num_slots": 2**33}}, "16,384.0 GiB do not fit on 4096 shards of 640.0 MiB of pages each"),
        ({"table": {"layout": "columns", "block_dim": 128}, "host_memory": 512 * MIB}, "lie on 2 shards at most"),
        ({"path": "gRPC"}, "no machine's constants are given"),
        ({"machine": MACHINE, "path": "RDMA"}, "path 'RDMA' was not measured on a-machine; known: embedded, gRPC"),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        planned(**{"host_shards": 1, "host_memory": 1024 * MIB, **given})


@pytest.mark.parametrize(
    ("model", "fields", "message"),
    [
        (Model, {"heads": 0}, "Model.heads = 0 must be greater than 0"),
        (
            Model,
            {"wire_dtype": "float16"},
            "Model.wire_dtype = 'float16' must be 'float32', 'bfloat16' or 'float8_e4m3fn'",
        ),
        (Model, {"tokens_per_s": 0}, "must be greater than 0"),
        (Hosts, {"memory": "much"}, "is not an amount of memory"),
        (Hosts, {"nic_gbit_per_s": 0}, "must be greater than 0"),
        (Hosts, {"gpu_gb_per_s": 3000.0}, "is of GPUs, and a host has none"),
        (Hosts, {"gpus": 3, "shards": 4}, "do not spread evenly over 3 GPUs"),
    ],
)
def test_what_is_no_model_or_host_is_refused(model: Any, fields: dict[str, Any], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        model(**fields)


def test_the_best_split_moves_least_where_no_times_are_known() -> None:
    found = planned(shards=64)
    moved = [option.traffic.moved for option in found.options]
    assert moved == sorted(moved)
    assert {option.split.kind for option in found.options} == {"columns", "rows", "grid"} - {"columns"}
    assert found.best.time is None
    eight = planned(shards=8)
    assert {option.split.kind for option in eight.options} == {"columns", "rows", "grid"}
    assert eight.best.split.schema.layout == eight.best.split.kind


def test_with_times_it_is_the_fastest() -> None:
    found = planned(shards=64, machine=MACHINE)
    times = [option.time.total for option in found.options if option.time is not None]
    assert times == sorted(times)
    assert (found.machine, found.path) == ("a-machine", "gRPC")


def test_more_shards_are_looked_at_where_nobody_says_how_many() -> None:
    found = planned(machine=MACHINE, host_shards=4, trainers=8)
    assert [option.split.shards for option in found.growth] == [1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024]
    assert (found.shards, found.options[0]) == (1, found.growth[0])
    assert planned(shards=8, machine=MACHINE).growth == ()
    rates = [option.time.tokens_per_s(found.model) for option in found.growth if option.time is not None]
    best = max(rates)
    assert rates[0] < best
    enough = planned(machine=MACHINE, host_shards=4, trainers=8, tokens_per_s=rates[1])
    assert (enough.shards, enough.warnings) == (2, ())
    never = planned(machine=MACHINE, host_shards=4, trainers=8, tokens_per_s=2 * best)
    assert never.shards == found.growth[rates.index(best)].split.shards
    assert any("tokens/s at most" in warning for warning in never.warnings)


def test_what_was_asked_for_is_kept() -> None:
    found = planned(shards=4, table={"layout": "rows", "block_dim": 256})
    assert [(option.split.kind, option.split.schema.block_dim) for option in found.options] == [("rows", 256)]
    whole = planned(shards=4, table={"optimizer": RowWiseAdagrad(0.1, rowwise="row")})
    assert {option.split.schema.num_blocks for option in whole.options} == {1}


def test_the_papers_memory_on_a_thousand_shards() -> None:
    paper = {"num_slots": 8192**2, "value_dim": 2048, "dtype": "bfloat16", "optimizer": RowWiseAdagrad(0.1)}
    model = {"layers": 3, "tokens": 4096, "trainers": 64}
    found = planned(paper, shards=1024, machine=MACHINE, **model)
    split = found.best.split
    assert (split.kind, split.asked, found.num_hosts) == ("grid", 1024, 128)
    assert 256 * 2**30 < split.total_bytes < 320 * 2**30
    assert found.client_calls == 2 * 3 * 1024 + 2 * 1024
    assert found.host_calls == 8 * 64 * (2 * 3 + 2)
    assert found.client_bytes == 3 * found.best.traffic.moved
    assert found.host_cpu_s is not None
    assert found.best.time is not None
    assert found.host_cpu_s == pytest.approx(8 * found.best.time.calls)


@pytest.mark.parametrize(
    ("given", "warned"),
    [
        ({}, "no times: they need a machine's constants"),
        ({"machine": MACHINE, "shards": 2, "host_gpus": 1}, "on cuda were not measured .* no bandwidth of a GPU is"),
        ({"machine": MACHINE, "shards": 2, "tokens_per_s": 1e9}, r"at most, not 1,000,000,000: \w+ takes most"),
        ({"shards": 64, "table": {"layout": "rows"}}, "each bag is answered by 64 whole rows"),
        ({"tokens": 2**20, "host_shards": 1, "host_memory": 8192 * MIB}, "a step makes a shard hold"),
        ({"machine": MACHINE, "shards": 2, "table": {"keys": KEYS}}, "times are of the values alone: what keys in the"),
        ({"tokens": 2**18, "host_shards": 1, "host_memory": 8192 * MIB, "table": {"keys": KEYS}}, "a step makes a"),
        ({"host_shards": 1, "host_memory": 3200 * MIB}, "the fullest shard has 96% of its room"),
        ({"layers": 300, "shared": False, "table": {"page_slots": 64}}, "pages of 300 tables are more than the 4,194"),
    ],
)  # fmt: skip
def test_warnings(given: dict[str, Any], warned: str) -> None:
    found = planned(**given)
    assert any(re.search(warned, warning) for warning in found.warnings), found.warnings
