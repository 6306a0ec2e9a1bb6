"""Forks of an embedded pool's tables: bit for bit as what they are forks of, at one version; each goes its own way."""

import threading
from collections.abc import Iterator, Sequence

import pytest
import torch
from durable_trainer import contents, differences, open_tables, train
from torch import Tensor

import mempool
from mempool import errors, optim
from mempool.client import Pool, Table

SLOTS = 512
ALL = torch.arange(SLOTS)


def config(name: str = "facts", **more: object) -> mempool.TableConfig:
    given = {"num_slots": SLOTS, "value_dim": 64, "page_slots": 32, "optimizer": optim.Adagrad(lr=0.1)} | more
    return mempool.TableConfig(name=name, **given)  # type: ignore[arg-type]


def step(table: Table, number: int, bags: int = 8) -> None:
    random = torch.Generator().manual_seed(number)
    ids, weights = torch.randint(0, SLOTS, (bags, 4), generator=random), torch.rand(bags, 4, generator=random)
    table.gather(ids, weights).square().sum().backward()
    table.commit()


def held(*tables: Table) -> list[dict[str, Tensor]]:
    """What each holds, whatever it is called."""
    return [{key.partition("/")[2]: rows for key, rows in contents([table]).items()} for table in tables]


def same(one: Sequence[dict[str, Tensor]], other: Sequence[dict[str, Tensor]]) -> bool:
    return all(differences(*pair) == [] for pair in zip(one, other, strict=True))


def shared(pool: Pool, name: str) -> tuple[int, int]:
    """Of a table's bytes, those that are another one's, and all."""
    found = [table for shard in pool.status().shards for table in shard.tables if table.name == name]
    return sum(table.shared_bytes for table in found), sum(table.num_bytes for table in found)


@pytest.fixture(params=[1, 3])
def pool(request: pytest.FixtureRequest) -> Iterator[Pool]:
    with mempool.local(shards=request.param) as made:
        yield made


def test_every_kind_of_table_is_forked_whole_and_becomes_what_it_was(pool: Pool) -> None:
    """Values of each dtype, keys, masters, optimizer state, slots that a dense optimizer left behind, step counts."""
    tables = open_tables(pool, () if len(pool.status().shards) > 1 else ("adam", "dense"))
    for number in range(1, 10):
        train(tables, number)
    then = held(*tables)
    forks = [table.fork(f"{table.name}-before") for table in tables]
    assert same(held(*forks), then)
    for number in range(10, 14):
        train(tables, number)
    assert same(held(*forks), then)
    late, ids = held(*tables), [table.schema.table_id for table in tables]
    for table, fork in zip(tables, forks, strict=True):
        table.reset(to=fork if table.name == "adam" else fork.name)
        assert table.schema.table_id > max(ids)
    assert same(held(*tables), then)
    for number in range(10, 14):
        train(tables, number)
    assert same(held(*tables), late)
    assert same(held(*forks), then)
    for fork in forks:  # and so does a fork, though its random rounding is its own
        fork.commit()
    train(forks, 14)
    assert same(held(*tables), late)


def test_a_fork_trains_as_a_table_of_its_own_would(pool: Pool) -> None:
    table, alone = pool.create_table(config()), pool.create_table(config("alone"))
    for number in range(5):
        step(table, number), step(alone, number)
    trial = table.fork("trial")
    then = held(table)
    for number in range(5, 25):
        step(trial, number), step(alone, number)
    assert same(held(trial), held(alone))
    assert same(held(table), then)
    assert trial.step_count() == 25
    pool.drop_table("facts")
    for number in range(25, 28):
        step(trial, number), step(alone, number)
    assert same(held(trial), held(alone))


@pytest.mark.parametrize(
    "keys",
    [
        mempool.FlatKeys(key_dim=8, optimizer=optim.Adagrad(lr=0.1)),
        mempool.ProductKeys(heads=2, key_dim=8, optimizer=optim.AdamW(lr=0.1, dense=True)),
    ],
)
def test_keys_that_train_are_forked_at_the_same_moment_and_go_back_with_their_table(keys: object) -> None:
    with mempool.local(shards=2) as pool:
        table = pool.create_table(config(num_slots=16**2, keys=keys, optimizer=optim.SGD(lr=0.1)))
        train_keys(table, 0)
        before, then = table.fork("before"), with_keys(table)
        for number in (1, 2):
            train_keys(table, number)
        late = with_keys(table)
        assert same([with_keys(before)], [then])
        table.reset(to=before)
        assert same([with_keys(table)], [then])
        for number in (1, 2):
            train_keys(table, number)
        assert same([with_keys(table), with_keys(before)], [late, then])
        assert {each.name for each in pool.tables()} == {"before", "facts"}
        for name in ("facts:keys", "before:keys"):
            with pytest.raises(errors.InvalidRequest, match="keys"):
                pool.table("before").fork(name)
        pool.drop_table("before")
        assert {view.schema.name for view in pool.status().tables} == {"facts", "facts:keys"}
        again = table.fork("before")
        assert same([with_keys(again)], [late])


def train_keys(table: Table, seed: int) -> None:
    """A step of values and keys, which are read after it: a dense optimizer's bits depend on when that is."""
    heads = table.schema.keys.heads  # type: ignore[union-attr]
    random = torch.Generator().manual_seed(seed)
    queries = torch.randn(6, *((heads,) if heads > 1 else ()), 8, generator=random)
    table.lookup(queries, 4).values.square().sum().backward()
    table.commit()
    with_keys(table)


def with_keys(table: Table) -> dict[str, Tensor]:
    """What it and the table of its keys hold."""
    ids = torch.arange(table.keys.num_slots)
    return {"rows": table.rows(torch.arange(table.num_slots)), "keys": table.read_keys(), **table.keys.state(ids)}


@pytest.mark.parametrize("optimizer", [optim.Adagrad(lr=0.1), optim.AdamW(lr=0.01, weight_decay=0.1, dense=True)])
def test_forked_while_another_thread_trains_it_is_exactly_one_version(pool: Pool, optimizer: object) -> None:
    table, twin = pool.create_table(config(optimizer=optimizer)), pool.create_table(config("twin", optimizer=optimizer))
    stop = threading.Event()

    def go_on() -> None:
        number = 0
        while not stop.is_set():
            step(table, number)
            number += 1

    trainer = threading.Thread(target=go_on)
    trainer.start()
    try:
        forks = [table.fork(f"trial-{number}") for number in range(4)]
    finally:
        stop.set()
        trainer.join()
    versions = [fork.step_count() for fork in forks]
    assert versions == sorted(versions)
    assert versions[-1] > 0, "it was trained meanwhile"
    done = 0
    for version, fork in zip(versions, forks, strict=True):
        for number in range(done, version):
            step(twin, number)
        done = version
        if not getattr(optimizer, "dense", False) or version == versions[-1]:  # whose bits depend on when it is read
            assert same(held(fork), held(twin))


def test_what_neither_has_written_to_is_in_memory_once(pool: Pool) -> None:
    table = pool.create_table(config(page_slots=256))
    trial = table.fork("trial")
    whole, size = shared(pool, "trial")
    assert size * 0.98 < whole <= size
    ids = torch.tensor([[3, 300]])
    trial.gather(ids).sum().backward()
    trial.commit()
    trial.rows(ids[0])  # every shard has applied it
    rows = 2 * 2 * 256  # values and state of two slots, in 256 bytes each: a page of the system's has sixteen
    one = whole - shared(pool, "trial")[0]
    assert rows < one <= 2 * 2 * 4096
    table.write([3, 400], torch.ones(2, 64))  # of slot 3 the fork has copies
    assert whole - shared(pool, "trial")[0] == one + 2 * 4096, "of slot 400, values and state"
    other = trial.fork("other")  # what the fork has of its own is copied, and no more
    assert shared(pool, "other")[0] == shared(pool, "trial")[0] == whole - one - 2 * 4096
    pool.drop_table("trial")
    assert torch.equal(other.rows([3]), trial_rows(table, ids))


def trial_rows(table: Table, ids: Tensor) -> Tensor:
    """What the first of these slots holds after the step above, on a table of the same seed."""
    with mempool.local() as pool:
        again = pool.create_table(config(page_slots=256, seed=table.schema.seed))
        again.gather(ids).sum().backward()
        again.commit()
        return again.rows(ids[0, :1])


def test_forks_go_with_a_rescale_and_stay_when_either_is_dropped(pool: Pool) -> None:
    table = pool.create_table(config(layout="columns"))
    step(table, 0)
    trial = table.fork("trial")
    step(trial, 1)
    last = table.fork("last")
    then = held(table, trial, last)
    for shards in (2, 4, 1):
        pool.rescale(shards)
        assert same(held(table, trial, last), then)
        again = trial.fork(f"again-{shards}")
        assert same(held(again), then[1:2])
    step(trial, 2), step(table, 2)
    assert same(held(last), then[:1])
    late = held(trial)
    pool.drop_table("facts")
    pool.drop_table("again-1")
    pool.rescale(2)
    assert same(held(trial, last), [*late, then[0]])


def test_a_reset_drops_what_is_pending_and_kept_by_clients(pool: Pool) -> None:
    table = pool.create_table(config())
    table.cache_bytes = 2**20
    before = table.fork("before")
    ids = torch.arange(40)[:, None]
    step(table, 1)
    with torch.no_grad():
        for _ in range(4):
            table.gather(ids)
    late = table.gather(ids)
    table.gather(ids).sum().backward()
    table.prefetch(ids)
    assert table.pending == 1
    table.reset(to=before)
    assert table.pending == 0
    with torch.no_grad():
        assert torch.equal(table.gather(ids), before.rows(ids[:, 0]))
    with pytest.raises(errors.MempoolError, match=r"another|dropped|gone"):
        late.sum().backward()
    step(table, 1)
    assert table.step_count() == 1
    assert before.step_count() == 0


def test_what_cannot_be_forked_or_become_so_says_why_and_changes_nothing(pool: Pool) -> None:
    table, other = pool.create_table(config()), pool.create_table(config("other", optimizer=optim.SGD(lr=0.1)))
    step(table, 0)
    then = held(table)
    elsewhere = mempool.local()
    stranger = elsewhere.create_table(config("strange"))
    names = {each.name for each in pool.tables()}
    wrong = [
        (lambda: table.fork("other"), errors.AlreadyExists, "exists already"),
        (lambda: table.fork("facts"), errors.InvalidRequest, "that table itself"),
        (lambda: table.fork(""), errors.InvalidRequest, "no table's name"),
        (lambda: table.fork(3), errors.InvalidRequest, "no table's name"),  # type: ignore[arg-type]
        (lambda: table.fork("a b/c"), errors.InvalidRequest, "must begin with a letter"),
        (lambda: table.reset(to="nothing"), errors.NotFound, "table.fork makes one"),
        (lambda: table.reset(to=3), errors.InvalidRequest, "no table's name"),  # type: ignore[arg-type]
        (lambda: table.reset(to=stranger), errors.InvalidRequest, "another pool"),
        (lambda: table.reset(to=table), errors.InvalidRequest, "that table itself"),
        (lambda: table.reset(to=other), errors.AlreadyExists, "optimizer.algorithm is 'adagrad', not 'sgd'"),
        (lambda: other.reset(to=table.at()), errors.InvalidRequest, "no optimizer state"),
        (lambda: table.at().fork("late"), errors.InvalidRequest, "cannot be forked"),
        (lambda: table.at().reset("other"), errors.InvalidRequest, "cannot be written to"),
    ]
    for call, kind, words in wrong:
        with pytest.raises(kind, match=words):
            call()
    elsewhere.close()
    assert {each.name for each in pool.tables()} == names
    assert same(held(table), then)
    pool.drop_table("facts")
    with pytest.raises(errors.NotFound):
        table.fork("late")
    pool.create_table(config())
    with pytest.raises(errors.NotFound, match="another one by now"):
        table.fork("late")


def test_a_fork_counts_as_all_of_its_own_where_memory_is_limited(monkeypatch: pytest.MonkeyPatch) -> None:
    from mempool.shard import Engine

    monkeypatch.setitem(Engine.__init__.__kwdefaults__, "memory_bytes", 700_000)
    with mempool.local() as pool:
        table = pool.create_table(config())
        trial = table.fork("trial")
        with pytest.raises(errors.InvalidRequest, match="memory"):
            table.fork("more")
        assert same(held(trial), held(table))
        pool.drop_table("trial")
        table.fork("more")
