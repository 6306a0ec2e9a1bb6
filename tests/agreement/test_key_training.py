"""Keys that train in the pool train as keys in the model do with torch's own optimizers, and choose the same slots."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn

import mempool
from mempool import errors
from mempool.client.keys import scoring
from mempool.client.lookup import has_flat_keys
from mempool.client.routing.attempt import Attempt
from mempool.nn import MemoryLayer, PoolOptimizer
from mempool.nn.keys.hierarchical import HierarchicalKeys
from mempool.nn.scoring import product_topk
from mempool.optim import SGD, Adagrad, AdamW
from mempool.shard.reading import pieces

from .conftest import Pools
from .reference import all_rows, leaf, product_scores, relative_error
from .test_lookup import brute_force, integers

STEPS, BAGS, TOPK = 12, 24, 5
HYPER = {"betas": (0.8, 0.95), "eps": 1e-6, "weight_decay": 0.05}
OPTIMIZERS: dict[str, tuple[Any, Any]] = {
    "sgd": (SGD(lr=0.5), lambda keys: torch.optim.SGD(keys, lr=0.5)),
    "adagrad": (Adagrad(lr=0.05), lambda keys: torch.optim.Adagrad(keys, lr=0.05)),
    "adamw": (AdamW(lr=0.01, dense=True, **HYPER), lambda keys: torch.optim.AdamW(keys, lr=0.01, **HYPER)),
}


KEYS: dict[str, Any] = {
    "flat": mempool.FlatKeys(key_dim=8, optimizer=Adagrad(lr=0.1)),
    "product": mempool.ProductKeys(heads=2, key_dim=8, optimizer=AdamW(lr=0.1, dense=True)),
    "hierarchical": mempool.HierarchicalKeys(key_dim=8, probes=3, optimizer=AdamW(lr=0.1, dense=True)),
}


def queries_for(table: mempool.Table, count: int = 6) -> Tensor:
    """Random ones, of two heads where there are any."""
    return torch.randn(count, *((8,) if has_flat_keys(table.schema) else (2, 8)))


def train(table: mempool.Table) -> None:
    """A step of random queries."""
    table.lookup(queries_for(table), 4).values.square().sum().backward()
    assert table.commit() == 2


def everything_of(table: mempool.Table) -> dict[str, Tensor]:
    """Values, keys, and the state of the keys' optimizer."""
    state = table.keys.state(torch.arange(table.keys.num_slots))
    return {"rows": all_rows(table), "keys": table.read_keys(), **state}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, part in found.items():
        assert torch.equal(part, expected[name]), name


def flat_lookup(queries: Tensor, keys: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Ids [B, K], sums [B, V], as torch makes them."""
    best = torch.topk(queries @ keys.T, TOPK)
    return best.indices, torch.einsum("bk,bkv->bv", best.values.softmax(-1), values[best.indices])


@pytest.mark.parametrize(("name", "shards"), [("sgd", 1), ("adagrad", 2), ("adamw", 3)])
def test_flat_keys_train_as_in_torch(pools: Pools, name: str, shards: int) -> None:
    torch.manual_seed(3)
    optimizer, torchs = OPTIMIZERS[name]
    keys = mempool.FlatKeys(key_dim=12, optimizer=optimizer)
    table = pools.table(shards=shards, num_slots=90, value_dim=20, page_slots=16, keys=keys, optimizer=SGD(lr=0.2))
    own_keys, values = nn.Parameter(table.read_keys()), nn.Parameter(all_rows(table))
    queries, own_queries = nn.Linear(7, 12), nn.Linear(7, 12)
    own_queries.load_state_dict(queries.state_dict())
    memory, own_step = PoolOptimizer(table, max_norm=0.5), torchs([own_keys])
    assert [group["table"] for group in memory.param_groups] == [table.name, f"{table.name}:keys"]
    assert [group["lr"] for group in memory.param_groups] == [0.2, optimizer.lr]
    steps = [torch.optim.SGD(queries.parameters(), lr=0.3), torch.optim.SGD(own_queries.parameters(), lr=0.3)]
    value_step = torch.optim.SGD([values], lr=0.2)
    for _ in range(STEPS):
        x, target = torch.randn(BAGS, 7), torch.randn(BAGS, 20)
        found = table.lookup(queries(x), TOPK)
        ids, expected = flat_lookup(own_queries(x), own_keys, values)
        assert torch.equal(found.ids, ids)
        assert relative_error(found.values, expected) < 1e-5
        (found.values - target).square().mean().backward()
        (expected - target).square().mean().backward()
        assert relative_error(queries.weight.grad, own_queries.weight.grad) < 1e-4
        norm = nn.utils.clip_grad_norm_([own_keys, values], 0.5)
        for step in (memory, own_step, value_step, *steps):
            step.step()
            step.zero_grad()
        assert memory.last_norm == pytest.approx(float(norm), rel=1e-4)
    assert relative_error(table.read_keys(), own_keys) < 1e-5
    assert relative_error(all_rows(table), values) < 1e-5


@pytest.mark.parametrize(
    ("name", "shards", "num_slots", "ways"),
    [
        ("sgd", 3, 13**2, 2),
        ("adagrad", 1, 13**2 - 15, 2),
        ("adamw", 2, 13**2, 2),
        ("sgd", 2, 6**3 - 47, 3),
        ("adagrad", 3, 6**3, 3),
        ("adamw", 1, 4**4, 4),
    ],
)
def test_a_layer_without_keys_trains_what_one_with_keys_does(
    pools: Pools, name: str, shards: int, num_slots: int, ways: int
) -> None:
    torch.manual_seed(4)
    optimizer, torchs = OPTIMIZERS[name]
    config: dict[str, Any] = {
        "shards": shards, "num_slots": num_slots, "value_dim": 16, "optimizer": Adagrad(lr=0.1)
    }  # fmt: skip
    there = pools.table(keys=mempool.ProductKeys(heads=2, key_dim=4 * ways, ways=ways, optimizer=optimizer), **config)
    here = pools.table(**config)
    thin = MemoryLayer(10, table=there, keys="pool", topk=TOPK)
    whole = MemoryLayer(10, table=here, heads=2, key_dim=4 * ways, ways=ways, topk=TOPK)
    assert thin.half_keys is None
    assert (thin.heads, thin.key_dim, thin.ways) == (2, 4 * ways, ways)
    assert there.read_keys().shape == (2, ways, thin.codebook_size, 4)
    assert not any("keys" in name for name in thin.state_dict())
    whole.load_state_dict({**thin.state_dict(), "half_keys": there.read_keys()})
    train_alike(thin, whole, torchs([whole.half_keys]), keys=[whole.half_keys])
    assert relative_error(there.read_keys(), whole.half_keys) < 1e-5
    assert relative_error(all_rows(there), all_rows(here)) < 1e-5
    assert torch.equal(thin.scoring_keys(), there.read_keys())


def train_alike(thin: MemoryLayer, whole: MemoryLayer, key_step: Any, *, keys: list[Tensor]) -> None:
    """Steps of a layer that has keys and of one whose table has them, on the same inputs."""
    steps = [key_step]
    for layer in (thin, whole):
        dense = [part for kind, part in layer.named_parameters() if kind not in ("pool_keys", "values")]
        dense = [part for part in dense if not any(part is each for each in keys)]
        steps += [PoolOptimizer(layer), torch.optim.SGD(dense, lr=0.1)]
    for _ in range(STEPS):
        x = torch.randn(BAGS, 10)
        inputs = [x.clone().requires_grad_(), x.clone().requires_grad_()]
        ours, theirs = thin(inputs[0]), whole(inputs[1])
        assert relative_error(ours, theirs) < 1e-5
        ours.square().mean().backward()
        theirs.square().mean().backward()
        assert relative_error(inputs[0].grad, inputs[1].grad) < 1e-5
        for step in steps:
            step.step()
            step.zero_grad()


@pytest.mark.parametrize(("name", "shards"), [("sgd", 3), ("adagrad", 1), ("adamw", 2)])
def test_a_layer_without_keys_in_groups_trains_what_one_with_them_does(pools: Pools, name: str, shards: int) -> None:
    torch.manual_seed(4)
    optimizer, torchs = OPTIMIZERS[name]
    config: dict[str, Any] = {"shards": shards, "num_slots": 157, "value_dim": 16, "optimizer": Adagrad(lr=0.1)}
    there = pools.table(keys=mempool.HierarchicalKeys(key_dim=8, groups=20, probes=4, optimizer=optimizer), **config)
    here = pools.table(**config)
    thin = MemoryLayer(10, table=there, keys="pool", heads=3, topk=TOPK)
    of_model: dict[str, Any] = {"keys": "hierarchical", "groups": 20, "probes": 4, "key_dim": 8}
    whole = MemoryLayer(10, table=here, heads=3, topk=TOPK, **of_model)
    assert there.read_keys().shape == (20 + 157, 8)
    for layer_keys, own in zip(whole.search.parameters(), there.read_keys().split([20, 157]), strict=True):
        layer_keys.data.copy_(own)
    whole.load_state_dict(thin.state_dict(), strict=False)
    x = torch.randn(BAGS, 10)
    found, expected = thin(x, return_lookup=True)[1], whole(x, return_lookup=True)[1]
    assert torch.equal(found.ids, expected.ids)
    assert torch.equal(found.scores, expected.scores)
    assert thin.recall(x) == whole.recall(x) < 1.0
    assert thin.balance_loss(found) == whole.balance_loss(expected)
    keys = list(whole.search.parameters())
    train_alike(thin, whole, torchs(keys), keys=keys)
    assert relative_error(there.read_keys(), torch.cat(keys)) < 1e-5
    assert relative_error(all_rows(there), all_rows(here)) < 1e-5
    assert relative_error(thin.scoring_keys(), whole.scoring_keys()) < 1e-5


@pytest.mark.parametrize("shards", [1, 3])
def test_slots_in_groups_are_those_of_keys_in_the_model_to_the_bit(pools: Pools, shards: int) -> None:
    """Also where rounding makes sums equal that are not, and where a group lies on two shards."""
    for num_slots, groups, probes, topk in ((200, 9, 2, 1), (200, 9, 3, 40), (65, 5, 5, 65), (37, 37, 6, 6)):
        keys = mempool.HierarchicalKeys(key_dim=6, groups=groups, probes=probes, optimizer=SGD(1.0))
        table = pools.table(shards=shards, num_slots=num_slots, value_dim=4, keys=keys)
        model = HierarchicalKeys(num_slots, 6, groups=groups, probes=probes, topk=topk, qk_norm=False, made={})
        for seed, make in enumerate((integers, randn, rounded)):
            of_groups, of_slots = make(groups, 6, seed=seed), integers(num_slots, 6, seed=seed + 9)
            if make is not integers:
                of_slots = of_slots + 0.01 * randn(num_slots, 6, seed=seed)
            table.write_keys(torch.cat((of_groups, of_slots)))
            assert torch.equal(table.read_keys(), torch.cat((of_groups, of_slots)))
            model.group_keys.data, model.slot_keys.data = of_groups, of_slots
            queries = integers(25, 3, 6, seed=2)
            scores, ids = model(queries, topk)
            assert_finds(table, queries, scores, ids)


def assert_finds(table: mempool.Table, queries: Tensor, scores: Tensor, ids: Tensor) -> None:
    """Whichever way it is asked."""
    topk = ids.shape[-1]
    found = table.score(queries, topk)
    assert torch.equal(found.ids, ids)
    assert torch.equal(found.scores, scores)
    with torch.no_grad():
        assert torch.equal(table.lookup(queries, topk).ids, ids)
    assert torch.equal(table.lookup_async(queries, topk).result().ids, ids)


def randn(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def rounded(*shape: int, seed: int) -> Tensor:
    """Of numbers beside which others are lost."""
    return randn(*shape, seed=seed) * 2.0**24


@pytest.mark.parametrize("topk", [1, 32, 17**2])
@pytest.mark.parametrize("shards", [1, 3])
def test_ties_are_decided_as_by_brute_force(pools: Pools, shards: int, topk: int) -> None:
    keys: dict[str, Any] = {
        "product": mempool.ProductKeys(heads=3, key_dim=6, optimizer=SGD(1.0)),
        "flat": mempool.FlatKeys(key_dim=6, optimizer=SGD(1.0)),
    }
    for kind, config in keys.items():
        table = pools.table(shards=shards, num_slots=17**2, value_dim=4, keys=config)
        own = integers(3, 2, 17, 3, seed=1) if kind == "product" else integers(17**2, 6, seed=1)
        table.write_keys(own)
        assert torch.equal(table.read_keys(), own)
        queries = integers(25, 3, 6, seed=2) if kind == "product" else integers(25, 6, seed=2)
        scores, ids = brute_force(product_scores(queries, own) if kind == "product" else queries @ own.T, topk)
        assert_finds(table, queries, scores, ids)


@pytest.mark.parametrize("ways", [3, 4, 5])
@pytest.mark.parametrize("shards", [1, 3])
def test_keys_of_more_parts_choose_what_brute_force_does(pools: Pools, shards: int, ways: int) -> None:
    size = {3: 7, 4: 4, 5: 3}[ways]
    keys = mempool.ProductKeys(heads=2, key_dim=2 * ways, ways=ways, optimizer=SGD(1.0))
    table = pools.table(shards=shards, num_slots=size**ways, value_dim=4, keys=keys)
    own, queries = integers(2, ways, size, 2, seed=1), integers(25, 2, 2 * ways, seed=2)
    table.write_keys(own)
    assert torch.equal(table.read_keys(), own)
    assert torch.equal(table.read_keys(torch.tensor([1])), own[1:])
    for topk in (1, 5, 40, size**ways):
        scores, ids = brute_force(product_scores(queries, own), topk)
        found = table.score(queries, topk)
        assert torch.equal(found.ids, ids)
        assert torch.equal(found.scores, scores)
        assert torch.equal(table.lookup_async(queries, topk).result().ids, ids)


@pytest.mark.parametrize(
    ("size", "ways", "num_slots"),
    [
        (17, 2, 17**2 - 1),
        (17, 2, 17**2 - 20),
        (17, 2, 16**2 + 1),
        (7, 3, 7**3 - 60),
        (7, 3, 6**3 + 1),
        (4, 4, 4**4 - 33),
    ],
)
@pytest.mark.parametrize("shards", [1, 3])
def test_slots_that_are_no_power_are_chosen_as_by_brute_force(
    pools: Pools, shards: int, size: int, ways: int, num_slots: int
) -> None:
    keys = mempool.ProductKeys(heads=2, key_dim=3 * ways, ways=ways, optimizer=SGD(1.0))
    table = pools.table(shards=shards, num_slots=num_slots, value_dim=4, keys=keys)
    own, queries = integers(2, ways, size, 3, seed=1), integers(25, 2, 3 * ways, seed=2)
    for way in range(ways):  # what is cut, and beside it, is often the best
        own[:, way, num_slots // size ** (ways - 1 - way) % size :] = 4.0
    queries[::2] = queries[::2].abs()
    table.write_keys(own)
    for topk in (1, 5, num_slots):
        scores, ids = brute_force(product_scores(queries, own)[..., :num_slots], topk)
        found = table.score(queries, topk)
        assert torch.equal(found.ids, ids)
        assert torch.equal(found.scores, scores)
        assert torch.equal(table.lookup_async(queries, topk).result().ids, ids)


def test_all_keys_of_a_section_are_here_for_some_queries_at_a_time(
    pools: Pools, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whoever knows the keys can have all of his queries need them."""
    keys = mempool.ProductKeys(heads=2, key_dim=4, optimizer=SGD(1.0))
    table = pools.table(shards=2, num_slots=20**2 - 5, value_dim=4, keys=keys)
    own = torch.rand(2, 2, 20, 2)
    own[:, 0, 19] = own[:, 1, 15:] = 5.0  # the row that is cut, and what it lacks
    table.write_keys(own)
    asked, score = [], Attempt.score

    def watched(attempt: Attempt, queries: Tensor, *, topk: int) -> Any:
        asked.append((len(queries), topk))
        return score(attempt, queries, topk=topk)

    monkeypatch.setattr(Attempt, "score", watched)
    monkeypatch.setattr(scoring, "_WHOLE_BYTES", 3 * 4 * 20 * 12)
    queries = torch.rand(7, 2, 4)
    found = table.score(queries, 3)
    assert asked == [(7, 4), (3, 20), (3, 20), (1, 20)]
    every = product_scores(queries, own)[..., : 20**2 - 5].sort(dim=-1, descending=True, stable=True)
    assert torch.equal(found.ids, every.indices[..., :3])
    torch.testing.assert_close(found.scores, every.values[..., :3])


@pytest.mark.parametrize(("ways", "num_slots"), [(2, 29**2 - 40), (3, 9**3 - 100), (3, 9**3), (4, 5**4 - 77)])
def test_scores_have_the_bits_of_keys_in_the_model(pools: Pools, ways: int, num_slots: int) -> None:
    keys = mempool.ProductKeys(heads=2, key_dim=8 * ways, ways=ways, optimizer=SGD(1.0))
    table = pools.table(shards=2, num_slots=num_slots, value_dim=4, keys=keys)
    own, queries = table.read_keys(), torch.randn(50, 2, 8 * ways)
    for topk in (1, 4, 32, num_slots):
        scores, ids = product_topk(queries, own, topk=topk, stride=own.shape[2], num_slots=num_slots)
        found = table.score(queries, topk)
        assert torch.equal(found.ids, ids)
        assert torch.equal(found.scores, scores)


def test_a_layer_has_the_parts_of_the_keys_in_the_pool(pools: Pools) -> None:
    keys = mempool.ProductKeys(heads=2, key_dim=6, ways=3, optimizer=SGD(1.0))
    table = pools.table(num_slots=27, value_dim=4, keys=keys)
    assert MemoryLayer(5, table=table, keys="pool", topk=2, ways=3).ways == 3
    with pytest.raises(errors.InvalidRequest, match=r"ways = 2, and the keys of table '.*' have ways = 3: they are"):
        MemoryLayer(5, table=table, keys="pool", topk=2, ways=2)


def test_the_gradient_of_keys_in_groups_is_that_of_float64(pools: Pools) -> None:
    keys = mempool.HierarchicalKeys(key_dim=6, groups=6, probes=2, optimizer=SGD(1.0))
    table = pools.table(num_slots=33, value_dim=4, keys=keys, shards=3)
    queries = torch.randn(9, 2, 6, requires_grad=True)
    ids, scores = table.score(queries, 5)
    direction = torch.randn(9, 2, 5)
    scores.backward(direction)
    q64, k64 = leaf(queries), leaf(table.read_keys())
    of_groups, of_slots = k64.split([6, 33])
    every = q64 @ of_slots.T + (q64 @ of_groups.T)[..., torch.arange(33) // 6]
    every.gather(-1, ids).backward(direction.double())
    assert relative_error(queries.grad, q64.grad) < 1e-6
    before = table.read_keys()
    assert table.commit() == 1
    assert relative_error(before - table.read_keys(), k64.grad) < 1e-5
    untouched = k64.grad.abs().sum(dim=1) == 0
    assert torch.equal(before[untouched], table.read_keys()[untouched])


def test_slots_in_groups_are_scored_in_pieces_too(pools: Pools, monkeypatch: pytest.MonkeyPatch) -> None:
    keys = mempool.HierarchicalKeys(key_dim=6, groups=9, probes=3, optimizer=SGD(1.0))
    table = pools.table(shards=2, num_slots=200, value_dim=4, keys=keys)
    queries = torch.randn(50, 1, 6)
    whole = table.score(queries, 7)
    monkeypatch.setattr(pieces, "SCORE_PIECE_PRODUCTS", 1)  # sixteen queries each
    found = table.score(queries, 7)
    assert torch.equal(found.ids, whole.ids)
    assert torch.equal(found.scores, whole.scores)


def test_what_keys_in_groups_cannot_do_is_refused(pools: Pools) -> None:
    keys = mempool.HierarchicalKeys(key_dim=6, groups=6, probes=2, optimizer=SGD(1.0))
    table = pools.table(num_slots=33, value_dim=4, keys=keys)
    assert MemoryLayer(5, table=table, keys="pool", topk=9).heads == 4
    for options, message in (
        ({"topk": 10}, r"topk = 10, and the 2 groups that a query picks \(probes\) may have no more than 9 slots"),
        ({"key_dim": 7}, "key_dim = 7, and the keys of table .* have key_dim = 6"),
        ({"groups": 6}, "groups is of keys in the model"),
        ({"probes": 2}, "probes is of keys in the model"),
        ({"ways": 2}, "ways = 2, and the keys of table .* have ways = 1"),
        ({"heads": 0}, "heads must be at least 1"),
    ):
        with pytest.raises(errors.InvalidRequest, match=message):
            MemoryLayer(5, table=table, keys="pool", **{"topk": 4} | options)
    for ask in (table.score, table.lookup, table.lookup_async):
        with pytest.raises(errors.InvalidRequest, match=r"may have no more than 9 slots"):
            ask(torch.randn(2, 3, 6), 10)
        for shape in ((2, 6), (2, 0, 6), (2, 3, 5), (1, 2, 3, 6)):
            with pytest.raises(errors.InvalidRequest, match=r"its keys ask for \[B, heads, 6\]"):
                ask(torch.randn(shape), 3)
    with pytest.raises(errors.InvalidRequest, match=r"keys has shape \[33, 6\], must be \[39, 6\]"):
        table.write_keys(torch.zeros(33, 6))
    some = table.read_keys(torch.tensor([5, 6, 38]))  # the last group, the first slot, the last one
    table.write_keys(some + 1.0, torch.tensor([5, 6, 38]))
    assert torch.equal(table.read_keys()[[5, 6, 38]], some + 1.0)
    before = table.read_keys()
    table.keys.write([0], torch.full((1, 6), torch.nan))
    with torch.no_grad():
        assert not bool((table.score(torch.randn(20, 1, 6), 5).ids < 6).any())  # group 0 has none that can be found
    table.keys.write([7, 14, 21, 28, 35], torch.full((5, 6), torch.nan))
    with pytest.raises(errors.InvalidRequest, match="fewer than 2 keys that give a score"):
        table.score(torch.randn(2, 1, 6), 3)
    table.write_keys(before)
    assert table.score(torch.randn(2, 1, 6), 3).ids.shape == (2, 1, 3)
    assert table.score(torch.randn(0, 2, 6), 3).ids.shape == (0, 2, 3)


@pytest.mark.parametrize("ways", [2, 3])
def test_the_gradient_of_queries_is_that_of_float64(pools: Pools, ways: int) -> None:
    keys = mempool.ProductKeys(heads=2, key_dim=6 * ways, ways=ways, optimizer=SGD(1.0))
    table = pools.table(num_slots=64, value_dim=4, keys=keys, shards=2)
    queries = torch.randn(9, 2, 6 * ways, requires_grad=True)
    ids, scores = table.score(queries, 6)
    direction = torch.randn(9, 2, 6)
    scores.backward(direction)
    q64, k64 = leaf(queries), leaf(table.read_keys())
    product_scores(q64, k64).gather(-1, ids).backward(direction.double())
    assert relative_error(queries.grad, q64.grad) < 1e-6
    before = table.read_keys()
    assert table.commit() == 1
    assert relative_error(before - table.read_keys(), k64.grad) < 1e-5


def test_moves_keep_keys_and_their_state_bit_for_bit(pools: Pools) -> None:
    found = {}
    for rescaled in (False, True):
        torch.manual_seed(8)
        with pools.fresh(1) as pool:
            for kind, keys in KEYS.items():
                table = pools.table(pool=pool, name=kind, num_slots=11**2, value_dim=8, keys=keys, seed=5)
                for step in range(4):
                    train(table)
                    before = everything_of(table)
                    if rescaled and step in (1, 2):
                        pool.rescale(3 if step == 1 else 2)
                        assert_same(everything_of(table), before)
                assert table.keys.step_count() == 4
                found[rescaled, kind] = before
                if rescaled:  # row parts are added up in another order
                    assert all(relative_error(before[part], found[False, kind][part]) < 1e-5 for part in before)
                    pool.rescale(1)
