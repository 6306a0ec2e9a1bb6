"""Requests that cannot be answered get their own error, and change nothing."""

from dataclasses import replace
from typing import Any

import pytest
import torch

from mempool.errors import DataLoss, InvalidRequest, MempoolError, NotFound, StalePlacement, StepConflict
from mempool.types import (
    AttachTable,
    DiscardPart,
    DiscardRequest,
    FlatKeySpec,
    GatherRequest,
    ProductKeySpec,
    ReadRowsRequest,
    ScoreRequest,
    UpdateRequest,
    WriteRowsRequest,
)

from .bags import Bags, make_bags
from .driver import Driver, make_schema, same

GRADS = torch.linspace(-1, 1, 40).view(4, 10)
NAN, INF = float("nan"), float("inf")
OFFSETS = torch.tensor([0, 3, 3, 8, 9])


def _gather(driver: Driver, **changes: Any) -> GatherRequest:
    bags = make_bags(1)
    request = GatherRequest(
        envelope=driver.envelope(0),
        lookup_id=9000,
        ids=bags.ids,
        weights=bags.weights,
        offsets=bags.offsets,
        remember=True,
    )
    return replace(request, **changes)


def _update(driver: Driver, **changes: Any) -> UpdateRequest:
    return replace(driver.update_request(0, 2, 7, GRADS, bags=make_bags(1)), **changes)


def _of_part(request: Any, **changes: Any) -> Any:
    """The request with other fields; of the table's part in it, where it has parts."""
    parts = getattr(request, "parts", None)
    if parts is None:
        return replace(request, **changes)
    return replace(request, parts=tuple(replace(part, **changes) for part in parts))


def _rows(driver: Driver, **changes: Any) -> WriteRowsRequest:
    request = WriteRowsRequest(
        envelope=driver.envelope(0), array="values", ids=torch.tensor([1, 2]), blocks=(0, 1, 2), rows=torch.ones(2, 10)
    )
    return replace(request, **changes)


def _ids(*last: int) -> torch.Tensor:
    return torch.tensor([1, 2, 3, 4, 5, 6, 7, 8, *last])


BAD_BAGS = {
    "an id above": ({"ids": _ids(50)}, r"ids\[8\] = 50 is not a slot .* 50 \(0 to 49\)"),
    "an id below": ({"ids": -_ids(0)}, r"ids\[0\] = -1"),
    "a huge id": ({"ids": _ids(2**62)}, r"ids\[8\] = 4611686018427387904"),
    "ids as floats": ({"ids": _ids(9).float()}, r"ids (must|has)"),
    "ids as a matrix": ({"ids": _ids(9)[None]}, r"ids (must|has)"),
    "too few ids": ({"ids": _ids()}, "weights must be|offsets go"),
    "weights of another length": ({"weights": torch.ones(8)}, r"weights must be \[9\]"),
    "weights as doubles": ({"weights": torch.ones(9).double()}, r"weights (must|has)"),
    "weights as a matrix": ({"weights": torch.ones(9, 1)}, r"weights (must|has)"),
    "no offsets": ({"offsets": torch.empty(0, dtype=torch.int64)}, r"offsets (must|has)"),
    "offsets as int32": ({"offsets": OFFSETS.int()}, r"offsets (must|has)"),
    "offsets that do not start at 0": ({"offsets": torch.tensor([1, 3, 3, 8, 9])}, "from 1 to 9"),
    "offsets that end early": ({"offsets": torch.tensor([0, 3, 3, 8, 8])}, "from 0 to 8"),
    "offsets that wrap round": (
        {"offsets": torch.tensor([0, 2**63 - 1, -2, -1, 9])},
        r"offsets\[1\] = 9223372036854775807",
    ),
    "offsets that wrap twice": ({"offsets": torch.tensor([0, 2**63 - 1, -(2**63), 0, 9])}, r"is followed by -9223"),
    "offsets beyond the end": ({"offsets": torch.tensor([0, 3, 3, 2**63 - 1, 9])}, "is followed by 9"),
    "offsets that descend": ({"offsets": torch.tensor([0, 3, 2, 8, 9])}, r"offsets\[1\] = 3 is followed by 2"),
}
BAD_UPDATES = {
    "grads too narrow": ({"grads": GRADS[:, :9]}, r"grads must be \[4, 10\]"),
    "grads of fewer bags": ({"grads": GRADS[:3]}, r"grads must be \[4, 10\]"),
    "grads as doubles": ({"grads": GRADS.double()}, r"grads (must|has)"),
    "packed rows too short": ({"grads": torch.zeros(4, 16, dtype=torch.uint8)}, r"or \[4, 32\] uint8.*, not \[4, 16\]"),
    "packed rows of fewer bags": ({"grads": torch.zeros(3, 32, dtype=torch.uint8)}, r"or \[4, 32\] uint8"),
    "other blocks": ({"blocks": (0, 1)}, r"blocks \(0, 1\) are not those"),
    "blocks in another order": ({"blocks": (1, 0, 2)}, "are not those"),
    "ids alone": ({"offsets": None}, "both ids and offsets"),
    "a negative sequence": ({"sequence": -1}, r"negative|out of range"),
}
BAD_ROWS = {
    "an unknown array": ({"array": "values.exp_avg"}, "no array 'values.exp_avg'; it has values, values.sum"),
    "a table without keys": ({"array": "keys"}, "no array 'keys'"),
    "an id above": ({"ids": torch.tensor([1, 50])}, r"ids\[1\] = 50"),
    "rows too narrow": ({"rows": torch.ones(2, 9)}, r"\[2, 10\]"),
    "too few rows": ({"rows": torch.ones(1, 10)}, r"\[2, 10\]"),
    "rows of integers": ({"rows": torch.ones(2, 10, dtype=torch.int64)}, "float32 or bfloat16"),
    "other blocks": ({"blocks": (0,)}, "are not those"),
}


def _refused(driver: Driver, method: str, request: Any, error: type[MempoolError], match: str) -> None:
    before = driver.contents()
    contexts = driver.call(driver.host(0).status()).context_bytes
    with pytest.raises(error, match=match) as raised:
        driver.call(getattr(driver.host(0), method)(request))
    assert type(raised.value) is error
    assert same(driver.contents(), before)
    assert driver.call(driver.host(0).status()).context_bytes == contexts


@pytest.fixture
def trained(driver: Driver) -> Driver:
    """A table with history, a held update and a prepared step."""
    driver.create(make_schema(), "one")
    driver.train(1, {0: (make_bags(3), GRADS)})
    driver.gather(make_bags(3))
    driver.update(2, 1, GRADS)
    driver.prepare(2, [1])
    return driver


@pytest.mark.parametrize("case", BAD_BAGS)
def test_bad_bags(trained: Driver, case: str) -> None:
    changes, match = BAD_BAGS[case]
    _refused(trained, "gather", _gather(trained, **changes), InvalidRequest, match)
    _refused(trained, "update", _update(trained, **changes), InvalidRequest, match)


@pytest.mark.parametrize("case", BAD_UPDATES)
def test_bad_updates(trained: Driver, case: str) -> None:
    changes, match = BAD_UPDATES[case]
    _refused(trained, "update", _update(trained, **changes), InvalidRequest, match)


@pytest.mark.parametrize("case", BAD_ROWS)
def test_bad_rows(trained: Driver, case: str) -> None:
    changes, match = BAD_ROWS[case]
    _refused(trained, "write_rows", _rows(trained, **changes), InvalidRequest, match)


@pytest.mark.parametrize(
    ("array", "ids", "match"),
    [
        ("moments", torch.tensor([0]), "no array 'moments'"),
        ("values", torch.tensor([0, -1]), r"ids\[1\] = -1"),
        ("values", torch.tensor(0), r"ids (must|has)"),
    ],
)
def test_bad_reads(trained: Driver, array: str, ids: torch.Tensor, match: str) -> None:
    request = ReadRowsRequest(envelope=trained.envelope(0), array=array, ids=ids)
    _refused(trained, "read_rows", request, InvalidRequest, match)


@pytest.mark.parametrize(
    ("changes", "match"),
    [
        ({"lr": NAN}, "lr = nan"),
        ({"lr": INF}, "lr = inf"),
        ({"lr": -0.1}, "lr = -0.1"),
        ({"grad_scale": NAN}, "grad_scale = nan"),
        ({"grad_scale": INF}, "grad_scale = inf"),
        ({"sequences": (1, 1)}, "sequence 1 is named twice"),
    ],
)
@pytest.mark.parametrize("one_phase", [False, True])
def test_bad_commits(trained: Driver, changes: dict[str, Any], match: str, one_phase: bool) -> None:
    request = _of_part(trained.commit_request(0, 2, [1], one_phase=one_phase), **changes)
    _refused(trained, "commit", request, InvalidRequest, match)
    assert trained.commit(2, [1])[0].version == 2  # and the step it was about is as it was


def test_bad_steps(trained: Driver) -> None:
    _refused(trained, "prepare", trained.prepare_request(0, 3, [4, 4]), InvalidRequest, "sequence 4 is named twice")
    _refused(trained, "prepare", trained.prepare_request(0, -3, [4]), InvalidRequest, r"negative|out of range")
    part = DiscardPart(envelope=trained.envelope(0), step_id=trained.step_id(-1))
    request = DiscardRequest(parts=(part,))
    _refused(trained, "discard", request, InvalidRequest, r"negative|out of range")
    for group, match in (
        ("", "has 0 bytes"),
        ("x" * 257, "has 257 bytes; (it must have 1 to|at most) 256"),
        ("ü" * 2000, "4,000"),
    ):
        step_id = trained.step_id(3, group)
        for method, asked in (
            ("prepare", trained.prepare_request(0, 3, [])),
            ("commit", trained.commit_request(0, 3, [], one_phase=True)),
            ("discard", request),
            ("update", _update(trained)),
        ):
            _refused(trained, method, _of_part(asked, step_id=step_id), InvalidRequest, match)
    sequences = tuple(range(65_537))
    _refused(trained, "prepare", trained.prepare_request(0, 3, sequences), InvalidRequest, "names 65,537 sequences")


def test_a_gather_that_releases_too_much(trained: Driver) -> None:
    _refused(trained, "gather", _gather(trained, release=tuple(range(65_537))), InvalidRequest, "release names 65,537")


@pytest.mark.parametrize("timeout_s", [NAN, INF, -INF, -0.0, 0.0, -1.0, 1e6])
def test_freezes_of_no_length(trained: Driver, timeout_s: float) -> None:
    with pytest.raises(InvalidRequest, match=r"timeout_s"):
        trained.freeze(0, timeout_s)
    with pytest.raises(InvalidRequest, match="the token"):
        trained.freeze(0, token="x" * 65)
    if timeout_s != 0.0:
        with pytest.raises(InvalidRequest, match="lease_s"):
            trained.freeze(0, lease_s=timeout_s)
    assert not trained.status(0).frozen


def test_reading_nothing(driver: Driver) -> None:
    driver.create(make_schema(num_slots=49, stride=7, keys=ProductKeySpec(heads=2, key_dim=4)), "one", [0, 0])
    none = torch.empty(0, dtype=torch.int64)
    for array, width in (("values", 10), ("values.sum", 10), ("keys", 28)):
        request = ReadRowsRequest(envelope=driver.envelope(0), array=array, ids=none)
        assert driver.call(driver.host(0).read_rows(request)).rows.shape == (0, width)
    bags = {"ids": none, "weights": None, "offsets": torch.tensor([0])}
    assert driver.call(driver.host(0).gather(_gather(driver, **bags))).values.shape == (0, 10)
    queries = torch.empty(0, 2, 4)
    reply = driver.call(driver.host(0).score(ScoreRequest(envelope=driver.envelope(0), queries=queries, topk=3)))
    assert reply.scores.shape == (0, 2, 3)


QUERIES = torch.ones(2, 1, 6)


@pytest.mark.parametrize(
    ("queries", "topk", "match"),
    [
        (QUERIES * NAN, 3, r"queries\[0, 0, 0\] = nan"),
        (torch.tensor([1.0, 2.0, 3.0, -INF, 5.0, 6.0]).view(1, 1, 6), 3, r"queries\[0, 0, 3\] = -inf"),
        (QUERIES[:, :, :5], 3, r"queries must be \[B, 1, 6\]"),
        (QUERIES.expand(2, 2, 6), 3, r"queries must be \[B, 1, 6\]"),
        (QUERIES[0], 3, r"queries (must|has)"),
        (QUERIES.double(), 3, r"queries (must|has)"),
        (QUERIES, 0, "topk = 0"),
        (QUERIES, 51, "topk = 51 must be 1 to 50"),
    ],
)
def test_bad_queries(driver: Driver, queries: torch.Tensor, topk: int, match: str) -> None:
    driver.create(make_schema(keys=FlatKeySpec(key_dim=6)), "one")
    request = ScoreRequest(envelope=driver.envelope(0), queries=queries, topk=topk)
    _refused(driver, "score", request, InvalidRequest, match)


def test_a_table_without_keys_is_not_scored(trained: Driver) -> None:
    request = ScoreRequest(envelope=trained.envelope(0), queries=QUERIES, topk=3)
    _refused(trained, "score", request, InvalidRequest, "no keys in the pool")


def test_heads_that_do_not_exist(driver: Driver) -> None:
    driver.create(make_schema(num_slots=49, stride=7, keys=ProductKeySpec(heads=2, key_dim=4)), "one", [0, 0])
    request = ReadRowsRequest(envelope=driver.envelope(0), array="keys", ids=torch.tensor([0, 2]))
    _refused(driver, "read_rows", request, InvalidRequest, r"ids\[1\] = 2 is not a head")


def _all_requests(driver: Driver, **fence: int) -> list[tuple[str, Any]]:
    envelope = driver.envelope(0, **fence)
    requests = [
        ("gather", _gather(driver)),
        ("update", _update(driver)),
        ("prepare", driver.prepare_request(0, 2, [1])),
        ("commit", driver.commit_request(0, 2, [1])),
        ("discard", DiscardRequest(parts=(DiscardPart(envelope=envelope, step_id=driver.step_id(2)),))),
        ("score", ScoreRequest(envelope=envelope, queries=QUERIES, topk=1)),
        ("read_rows", ReadRowsRequest(envelope=envelope, array="values", ids=torch.tensor([1]))),
        ("write_rows", _rows(driver)),
    ]
    return [(method, _of_part(request, envelope=envelope)) for method, request in requests]


@pytest.mark.parametrize("fence", [{"epoch": 0}, {"epoch": 2}, {"incarnation": 0}, {"incarnation": 99}])
def test_requests_planned_for_another_view(trained: Driver, fence: dict[str, int]) -> None:
    for method, request in _all_requests(trained, **fence):
        _refused(trained, method, request, StalePlacement, f"{next(iter(fence))} {next(iter(fence.values()))}")


def test_a_shard_behind_what_was_acknowledged_has_lost_commits(trained: Driver) -> None:
    version = trained.call(trained.host(0).gather(_gather(trained))).stamp.table_version
    for method, request in _all_requests(trained, table_version=version + 1):
        if method not in ("prepare", "commit", "discard"):  # which build on no version
            match = f"version {version}, and .* version {version + 1} acknowledged"
            _refused(trained, method, request, DataLoss, match)
    request = _gather(trained, envelope=trained.envelope(0, table_version=version))
    assert trained.call(trained.host(0).gather(request)).values.shape == (4, 10)


def test_unknown_tables(trained: Driver) -> None:
    for method, request in _all_requests(trained, table_id=10**6):
        _refused(trained, method, request, NotFound, "no table 1000000")
    view = replace(
        trained.placed,
        schema=replace(trained.schema, table_id=10**6),
        placement=replace(trained.placed.placement, table_id=10**6),
    )
    _refused(trained, "set_view", view, NotFound, "no table 1000000")
    before = trained.contents()
    with pytest.raises(NotFound):
        trained.call(trained.host(0).freeze(10**6, 1.0, token="round", lease_s=1.0))
    trained.call(trained.host(0).thaw(10**6, token="round"))
    trained.call(trained.host(0).drop_table(10**6))
    assert same(trained.contents(), before)


def test_a_dropped_table_is_gone(trained: Driver) -> None:
    for _ in range(2):
        trained.call(trained.host(0).drop_table(trained.table_id))
    for method, request in _all_requests(trained):
        with pytest.raises(NotFound):
            trained.call(getattr(trained.host(0), method)(request))


def test_attaching_over_pages_is_refused(trained: Driver) -> None:
    view = trained.make_view(trained.schema, trained.placed.placement.owners, epoch=2)
    for mode in ("initialise", "empty", "lost"):
        request = AttachTable(view=view, mode=mode)  # type: ignore[arg-type]
        _refused(trained, "attach_table", request, InvalidRequest, "at epoch 1 already, with pages")


def test_lost_pages_say_so_and_other_tables_go_on(driver: Driver) -> None:
    schema = make_schema()
    driver.view = driver.make_view(schema, [[0, 0, 0]] * 7, epoch=1)
    driver.call(driver.host(0).attach_table(AttachTable(view=driver.placed, mode="lost")))
    for method, request in _all_requests(driver):
        if method == "discard":  # needs no pages, and lets its trainer go on with other tables
            assert driver.call(driver.host(0).discard(request)).discarded == 0
            continue
        with pytest.raises(DataLoss, match=r"lost 21 pages of table 'facts'.*drop the table"):
            driver.call(getattr(driver.host(0), method)(request))
    with pytest.raises(DataLoss):
        driver.freeze(0, 1.0)
    status = driver.status(0)
    assert (status.pages, status.lost_pages) == (0, 21)
    other = Driver(driver.hosted, table_id=driver.table_id + 10**5)
    other.create(schema, "one")
    other.train(1, {0: (make_bags(1), GRADS)})
    assert other.status(0).updates_applied == 1
    other.drop()


def test_tensors_that_are_not_contiguous_are_taken(trained: Driver) -> None:
    bags = make_bags(4)
    assert bags.weights is not None
    expected = trained.gather(bags)
    spread = Bags(
        torch.stack([bags.ids, bags.ids], 1)[:, 0],
        torch.stack([bags.weights, bags.weights], 1)[:, 0],
        torch.stack([bags.offsets, bags.offsets], 1)[:, 0],
    )
    assert torch.equal(trained.gather(spread), expected)


def test_parts_that_no_step_has(trained: Driver) -> None:
    prepare, commit = trained.prepare_request(0, 3, []), trained.commit_request(0, 3, [])
    for method, request in (("prepare", prepare), ("commit", commit)):
        _refused(trained, method, replace(request, parts=()), InvalidRequest, "1 to 1,000 tables; 0 were named")
        _refused(trained, method, replace(request, parts=request.parts * 2), InvalidRequest, "named twice in one step")  # type: ignore[type-var]
    part = DiscardPart(envelope=trained.envelope(0), step_id=trained.step_id(3))
    _refused(trained, "discard", DiscardRequest(parts=(part,) * 1001), InvalidRequest, "1,001 parts; at most 1,000")


def test_steps_at_the_wrong_shard_or_of_a_version_never_given(trained: Driver) -> None:
    other = Driver(trained.hosted, table_id=trained.table_id + 2 * 10**5).create(make_schema(), "columns")
    try:
        other.update(1, 0, GRADS, bags=make_bags(1))
        other.prepare(1, [0])
        for request, error, match in (
            (
                other.commit_request(1, 1, [0]),
                StalePlacement,
                "shard 1 decides no steps of table 'facts': shard 0 does",
            ),
            (other.commit_request(1, 1, [0], decided=True), StalePlacement, "shard 1 gives no versions to steps"),
            (
                other.commit_request(1, 1, [0], decided=True, version=5000),
                StepConflict,
                "said to make version 5000 .* its gate, shard 0, has given 0 versions so far",
            ),
            (other.commit_request(0, 1, [0], one_phase=True), InvalidRequest, "does not own all pages"),
        ):
            with pytest.raises(error, match=match):
                other.call(other.host(0 if request.one_phase else 1).commit(request))
        assert {reply.version for reply in other.commit(1, [0]).values()} == {1}
    finally:
        other.drop()
