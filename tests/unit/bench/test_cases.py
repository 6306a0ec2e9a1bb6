"""Cases: unavoidable bytes by hand, tables that fit, ids and samples."""

import pytest
import torch

from mempool.bench.cases import Tables, TableSpec, Workload, all_cases, bags, commits, experts, scoring
from mempool.bench.cases.inputs import Sample, arena_ids, bags_for
from mempool.kernels import reference

ROWS = {"float32": 4 * 16, "bfloat16": 2 * 16, "int8": 16 + 16, "float8_e4m3fn": 16 + 16}


@pytest.fixture
def tables() -> Tables:
    return Tables("cpu", seed=1)


@pytest.mark.usefixtures("no_peers")
@pytest.mark.parametrize("element", ROWS)
def test_unavoidable_bytes_of_a_forward(tables: Tables, element: str) -> None:
    prepared = bags.forward(tables, TableSpec(64, 16, element), 8, 4, "uniform", None)
    assert prepared.num_bytes == 32 * (ROWS[element] + 8 + 4) + 9 * 8 + 8 * 16 * 4
    assert prepared.contenders[0].name == "mempool"


def test_unavoidable_bytes_of_rows_and_of_weights(tables: Tables) -> None:
    spec = TableSpec(64, 16)
    assert bags.rows(tables, spec, 32, "uniform").num_bytes == 32 * (8 + 64 + 64)
    weights = bags.weight_gradient(tables, spec, 8, 4, "uniform")
    assert weights.num_bytes == 32 * (64 + 8 + 4) + 9 * 8 + 8 * 64


@pytest.mark.usefixtures("no_peers")
def test_unavoidable_bytes_of_a_commit(tables: Tables) -> None:
    spec = TableSpec(1, 16)  # one row: all pairs are its
    commit = commits.commit(tables, spec, "adagrad", 8, 4, "uniform")
    assert commit.num_bytes == 2 * (64 + 64) + 8 * 64 + 32 * (8 + 4 + 8)
    rowwise = commits.update(tables, spec, "rowwise_adagrad", 8, 4, "uniform")
    assert rowwise.num_bytes == 2 * (64 + 4) + 8 * 64 + 32 * (8 + 4 + 8 + 4)


@pytest.mark.usefixtures("no_peers")
def test_operations_and_bytes_of_keys(tables: Tables) -> None:
    product = scoring.product_topk(tables, 8, 4, 4, 3, 2)
    assert product.num_flops == 2 * (3 * 2) * 2 * 8 * 4
    assert product.num_bytes == 4 * (3 * 2 * 8 + 2 * 2 * 8 * 4) + 3 * 2 * 4 * 12
    flat = scoring.flat_topk(tables, TableSpec(64, 8), 4, 3)
    assert flat.num_flops == 2 * 3 * 64 * 8
    assert flat.num_bytes == 4 * (3 * 8 + 64 * 8) + 3 * 4 * 12


def test_what_does_not_fit_is_said(tables: Tables, tiny: Workload) -> None:
    skipped: list[str] = []
    cases = all_cases(tiny, tables, skipped.append)
    assert len({case.name for case in cases}) == len(cases)
    for case in cases:
        if not case.of_keys:
            assert case.num_slots * case.value_dim * (4 if "float32" in case.what else 1) <= tiny.most_bytes
    assert any("forward float32 of 256 x 128" in line and line.endswith("64 slots instead") for line in skipped)
    headlines = [(case.family, case.what) for case in cases if case.headline]
    for wanted in [("forward", "float32"), ("forward", "bfloat16"), ("update", "adagrad"), ("commit", "adamw")]:
        assert wanted in headlines


def test_every_dimension_of_the_cpu_is_covered(tables: Tables) -> None:
    cases = all_cases(Workload.of("cpu", 24 << 30), tables, lambda _: None)
    forward = [case for case in cases if case.family == "forward" and case.what == "float32"]
    assert {case.num_slots for case in forward} == {1 << 18, 1 << 20}
    assert {case.value_dim for case in forward} == {64, 256, 1024, 4096}
    assert {case.bag_size for case in forward} == {32, 128}
    assert {case.ids for case in forward} == {"uniform", "zipf"}
    (headline,) = [case for case in forward if case.headline]
    assert headline.name == "forward float32 2^20x256 bags of 128"
    assert bags_for(256, 128, Workload.of("cpu", 24 << 30).forward_bytes) == 1024


@pytest.mark.parametrize("element", ROWS)
def test_a_sample_is_the_rows_of_its_slots(tables: Tables, element: str) -> None:
    paged = tables.arena(TableSpec(64, 16, element, 4))
    assert paged.page_table.numel() > 1
    ids = torch.tensor([63, 5, 5, 0])
    sample = Sample.of(paged, ids)
    assert sample.slots.tolist() == [0, 5, 63]
    assert sample.local(ids).tolist() == [2, 1, 1, 0]
    everything = reference.read_values(paged)
    for slot in (0, 5, 63):
        row = reference.arena_row(paged, slot)
        assert int(arena_ids(paged, torch.tensor([slot]))) == row
        assert torch.equal(reference.read_values(sample.paged)[sample.slots.tolist().index(slot)], everything[row])
    assert everything.isfinite().all()


def test_zipf_ids_repeat_and_uniform_ids_do_not(tables: Tables) -> None:
    paged = tables.arena(TableSpec(1 << 16, 1))
    distinct = {ids: tables.pairs(paged, 1 << 16, 64, 16, ids)[0].ids.unique().numel() for ids in ("uniform", "zipf")}
    assert distinct["uniform"] > 1000 > 800 > distinct["zipf"] > 100


@pytest.mark.usefixtures("no_peers")
def test_unavoidable_bytes_of_experts(tables: Tables) -> None:
    sums = experts.sums(tables, TableSpec(64, 16), 8, 4, "uniform")
    assert sums.num_bytes == 32 * (64 + 8 + 4) + 9 * 8 + 8 * 8 * 4 + 8 * 8 * 4
    update = experts.update(tables, TableSpec(1, 16), 8, 4, "uniform")  # one row: all pairs are its
    assert update.num_bytes == 4 * 64 + 32 * (64 + 8 + 4 + 4) + 9 * 8 + 8 * 64 + 8 * 8 * 4
