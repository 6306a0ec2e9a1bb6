"""Tables out as one file and in again: bit for bit, into any pool; what others wrote; what goes wrong half way."""

import threading
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

import mempool
from mempool.checkpoint import looking
from mempool.checkpoint.exchange.table_file import TableFile
from mempool.checkpoint.exchange.table_source import TableSource
from mempool.checkpoint.exchange.tensor_sources import _Safetensors
from mempool.checkpoint.reader import StoredTable
from mempool.checkpoint.stores import open_store
from mempool.client import Table
from mempool.errors import AlreadyExists, DataLoss, InvalidRequest, NotFound, StorageFailed
from mempool.optim import SGD, Adagrad, Adam, AdamW
from mempool.shard.pages.staging import Staging
from mempool.types import PageBatch

from .conftest import Pools
from .test_checkpoints import _equal, _train

SLOTS, DIM = 250, 24
MIB = 2**20

CASES: dict[str, dict[str, Any]] = {
    "float32": {"optimizer": Adagrad(0.1, initial_accumulator_value=0.25)},
    "bfloat16 with a master": {"optimizer": Adam(0.01), "dtype": "bfloat16", "master": True, "layout": "grid"},
    "int8": {"optimizer": SGD(0.1), "dtype": "int8"},
    "float8, flat keys": {
        "optimizer": SGD(0.1, momentum=0.9),
        "dtype": "float8_e4m3fn",
        "keys": mempool.FlatKeys(key_dim=8),
    },
    "product keys": {
        "optimizer": AdamW(0.01, dense=True),
        "num_slots": 225,
        "keys": mempool.ProductKeys(heads=3, key_dim=8),
    },
}


def _config(name: str, case: str = "float32", **more: Any) -> mempool.TableConfig:
    fixed = {"name": name, "num_slots": SLOTS, "value_dim": DIM, "block_dim": 8, "page_slots": 16, "seed": 3}
    return mempool.TableConfig(**fixed | CASES[case] | more)


def _content(table: Table) -> dict[str, Tensor]:
    content = {"values": table.rows(torch.arange(table.num_slots))}
    return content | ({} if table.schema.keys is None else {"keys": table.read_keys()})


def _names(pool: mempool.Pool) -> list[str]:
    return [table.name for table in pool.tables()]


@pytest.mark.parametrize("case", CASES)
def test_a_table_that_is_exported_is_the_same_when_it_is_imported(pools: Pools, case: str, tmp_path: Path) -> None:
    pool, other = pools.pool(3), pools.pool(2)
    table = pool.create_table(_config("facts", case))
    pools.tables.append((pool, table))
    _train(table, 3, seed=1)
    file, heard = tmp_path / "facts.safetensors", []
    done = pool.export_table("facts", file, progress=heard.append)
    assert (done.version, done.doing, heard[-1]) == (3, "", done)
    assert max(report.bytes_done for report in heard) > 0
    assert [path.name for path in tmp_path.iterdir()] == [file.name]
    tensors = safetensors.torch.load_file(file)
    assert tuple(tensors["values"].shape) == (table.num_slots, DIM)
    if not table.schema.packed:
        assert torch.equal(tensors["values"], table.rows(torch.arange(table.num_slots)))

    made = other.import_table(file, name="again")
    pools.tables.append((other, made))
    _equal(_content(table), _content(made))
    assert (made.schema.optimizer, made.step_count()) == (table.schema.optimizer, 0)
    fresh = other.create_table(_config("fresh", case))  # all else is as in any new table
    pools.tables.append((other, fresh))
    everything = torch.arange(fresh.num_slots)
    begun = {name: rows for name, rows in fresh.state(everything).items() if not name.endswith("master")}
    _equal(begun, {name: made.state(everything)[name] for name in begun})
    _train(made, 2, seed=2)


def test_a_memory_layers_file_and_an_embeddings(pools: Pools, tmp_path: Path) -> None:
    pool = pools.pool(3)
    values, keys = torch.randn(225, DIM), torch.randn(3 * 2 * 15, 4)
    safetensors.torch.save_file(
        {"layers.7.values.weight": values, "layers.7.keys": keys, "head.weight": torch.ones(9, 9)},
        tmp_path / "model.safetensors",
    )
    torch.save(nn.EmbeddingBag(SLOTS, DIM).state_dict(), tmp_path / "bag.pt")
    with pytest.raises(InvalidRequest, match="num_slots=225, value_dim=24"):
        pool.import_table(tmp_path / "model.safetensors")
    layer = pool.import_table(tmp_path / "model.safetensors", _config("layer", "product keys"))
    bag = pool.import_table(str(tmp_path / "bag.pt"), _config("bag", dtype="bfloat16", master=True))
    pools.tables += [(pool, layer), (pool, bag)]
    assert torch.equal(layer.rows(torch.arange(225)), values)
    assert torch.equal(layer.read_keys().reshape(3 * 2 * 15, 4), keys)
    weight = torch.load(tmp_path / "bag.pt")["weight"]
    assert torch.equal(bag.rows(torch.arange(SLOTS)), weight.bfloat16())
    assert torch.equal(bag.state(torch.arange(SLOTS))["values.master"], weight)
    plain = pool.import_table(tmp_path / "model.safetensors", _config("plain", num_slots=9, value_dim=9),
                              values="head.weight")  # fmt: skip
    pools.tables.append((pool, plain))
    assert torch.equal(plain.rows(torch.arange(9)), torch.ones(9, 9))


def test_it_is_there_whole_or_not_at_all(pools: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pools.fresh(2) as pool:
        table = pool.create_table(_config("facts"))
        _train(table, 1, seed=1)
        file = tmp_path / "facts.safetensors"
        pool.export_table("facts", file)
        _train(table, 1, seed=2)
        now = _content(table)
        with pytest.raises(AlreadyExists):
            pool.import_table(file)
        read = TableSource.values

        def damaged(source: TableSource, first: int, count: int) -> Tensor:
            if first + count == SLOTS:
                raise DataLoss("a flipped bit")
            return read(source, first, count)

        with monkeypatch.context() as patched:
            patched.setattr(TableSource, "values", damaged)
            for options in ({"replace": True}, {"name": "other"}):
                with pytest.raises(DataLoss, match="a flipped bit"):
                    pool.import_table(file, **options)
        assert _names(pool) == ["facts"]
        assert pool.status().creating == ()
        _equal(now, _content(pool.table("facts")))
        made = pool.import_table(file, replace=True)
        assert [view.saved for view in pool.status().tables] == [None]  # a file is no checkpoint to be restored
        assert _names(pool) == ["facts"]
        assert not torch.equal(_content(made)["values"], now["values"])
        assert made is table, "what uses it goes on with what was imported"


def test_what_is_exported_is_of_one_version(pools: Pools, tmp_path: Path) -> None:
    """Each step adds the same to every row, so a file of two versions would have rows that differ."""
    with pools.fresh(3) as pool:
        table = pool.create_table(_config("facts", optimizer=SGD(1.0)))
        table.write(torch.arange(SLOTS), torch.zeros(SLOTS, DIM))
        stop = threading.Event()

        def train() -> None:
            while not stop.is_set():
                table.gather(torch.arange(SLOTS)[:, None], torch.ones(SLOTS, 1)).sum().backward()
                table.commit()

        trainer = threading.Thread(target=train)
        trainer.start()
        try:
            done = [pool.export_table("facts", tmp_path / f"{number}.safetensors") for number in range(3)]
        finally:
            stop.set()
            trainer.join(30)
        for number, report in enumerate(done):
            values = safetensors.torch.load_file(tmp_path / f"{number}.safetensors")["values"]
            assert torch.equal(values, torch.full((SLOTS, DIM), -float(report.version)))


def test_an_export_changes_nothing_for_checkpoints_and_leaves_nothing(pools: Pools, tmp_path: Path) -> None:
    with pools.fresh(2) as pool:
        pool.create_table(_config("facts"))
        place = tmp_path / "place"
        pool.checkpoint(place)
        pool.export_table("facts", tmp_path / "out" / "facts.safetensors", state=True, via=tmp_path / "via")
        pool.checkpoint(place)
        newest = looking.checkpoints(open_store(place))[-1]
        assert newest["own_bytes"] == 0  # what changed since the one before is known still
        assert "values.sum" in safetensors.torch.load_file(tmp_path / "out" / "facts.safetensors")
        assert not list((tmp_path / "via").iterdir())
        (tmp_path / "a folder" / "x").mkdir(parents=True)
        for bad in (tmp_path / "a folder", tmp_path / "out" / "facts.safetensors" / "x"):
            with pytest.raises(StorageFailed, match="cannot write"):
                pool.export_table("facts", bad, via=tmp_path / "via")
        with pytest.raises(NotFound):
            pool.export_table("nothing", tmp_path / "nothing")
        for name, file in (("", tmp_path / "x"), (7, tmp_path / "x"), ("facts", 7), ("facts", "s3://a::b")):
            with pytest.raises(InvalidRequest):
                pool.export_table(name, file)  # type: ignore[arg-type]
        assert not list((tmp_path / "via").iterdir())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["a folder", "out", "place", "via"]


def test_a_file_that_is_no_tables_says_what_is_wrong(pools: Pools, tmp_path: Path) -> None:
    pool = pools.pool(2)
    names = _names(pool)
    (tmp_path / "text").write_text("no tensors at all, and some more")
    (tmp_path / "short").write_bytes(b"\0")
    good = tmp_path / "good.safetensors"
    safetensors.torch.save_file({"weight": torch.zeros(SLOTS, DIM), "a.weight": torch.zeros(9, 9)}, good)
    (tmp_path / "cut.safetensors").write_bytes(good.read_bytes()[:-1])
    config = _config("facts")
    for file, error, told in [
        (tmp_path / "none", NotFound, "no such file"),
        (tmp_path / "text", DataLoss, "no safetensors file"),
        (tmp_path / "short", DataLoss, "short"),
        (tmp_path / "cut.safetensors", DataLoss, "cut"),
        (good, InvalidRequest, "several tensors can be the values"),
        ("", InvalidRequest, "0 bytes"),
        (7, InvalidRequest, "int"),
    ]:
        with pytest.raises(error, match=told):
            pool.import_table(file, config)  # type: ignore[arg-type]
    for options, told in [
        ({"values": "a.weight"}, "num_slots=9"),
        ({"values": "x"}, "no tensor 'x'"),
        ({"values": "weight", "keys": "x"}, "no tensor 'x'"),
        ({"values": 7}, "give a name"),
        ({"values": "weight", "name": "bad name"}, "name"),
    ]:
        with pytest.raises(InvalidRequest, match=told):
            pool.import_table(good, config, **options)  # type: ignore[arg-type]
    with pytest.raises(InvalidRequest, match="TableConfig"):
        pool.import_table(good, "facts", values="weight")  # type: ignore[arg-type]
    assert _names(pool) == names


def test_no_process_holds_a_whole_table(pools: Pools, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted where bytes are read, handed on and written: 48 MiB with its state pass in pieces."""
    if pools.kind != "local":
        pytest.skip("shards are counted in this process")
    counts: dict[str, list[int]] = {"read": [], "staged": [], "batch": [], "written": []}
    rows, put, batches, write = _Safetensors.rows, Staging.put, StoredTable.batches, TableFile.write

    def counted_rows(self: _Safetensors, name: str, first: int, count: int) -> Tensor:
        found = rows(self, name, first, count)
        counts["read"].append(found.nbytes)
        return found

    def counted_put(self: Staging, batch: PageBatch) -> int:
        counts["staged"].append(batch.num_bytes)
        return put(self, batch)

    def counted_batches(self: StoredTable, *given: Any, **options: Any) -> Any:
        for batch in batches(self, *given, **options):
            counts["batch"].append(batch.num_bytes)
            yield batch

    def counted_write(self: TableFile, name: str, some: Tensor) -> None:
        counts["written"].append(some.nbytes)
        write(self, name, some)

    monkeypatch.setattr(_Safetensors, "rows", counted_rows)
    monkeypatch.setattr(Staging, "put", counted_put)
    monkeypatch.setattr(StoredTable, "batches", counted_batches)
    monkeypatch.setattr(TableFile, "write", counted_write)
    with mempool.local(shards=2, device="cpu") as pool:
        pool.create_table(mempool.TableConfig(name="facts", num_slots=24 * 1024, value_dim=256, optimizer=Adagrad(0.1)))
        pool.export_table("facts", tmp_path / "facts.safetensors")
        pool.import_table(tmp_path / "facts.safetensors", name="again")
    total = 24 * MIB
    assert sum(counts["written"]) == sum(counts["batch"]) == total
    assert sum(counts["staged"]) == 2 * total
    assert max(counts["written"]) <= max(counts["batch"]) <= 16 * MIB
    assert max(counts["read"]) <= 4 * MIB
    assert max(counts["staged"]) <= 8 * MIB
