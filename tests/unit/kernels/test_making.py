"""A table's kernels are there before it answers: compiled by child processes, loaded here."""

import re
import shutil
import threading
from pathlib import Path

import pytest
from numba.core.caching import UserProvidedCacheLocator
from scripts import run_script

from mempool import kernels
from mempool.kernels import making, warming
from mempool.kernels.compiling import NotCompiledError, only_compiled, watched


def run(code: str, **environment: str) -> str:
    return "".join(run_script(code, environment, timeout_s=240.0))


def cache_without(folder: Path, *names: str) -> None:
    """Where NUMBA_CACHE_DIR is this folder, all is kept that is beside the sources, but these kernels."""
    for kept in (Path(kernels.__file__).parent / "cpu").rglob("*.nb[ic]"):
        if not kept.name.startswith(names):
            place = folder / UserProvidedCacheLocator.get_suitable_cache_subpath(str(kept.parents[1] / "a_module.py"))
            place.mkdir(exist_ok=True)
            shutil.copy(kept, place)


def test_no_call_on_a_served_table_waits_for_a_compiler(tmp_path):
    """Compiling takes longer than the pool's timeout_s, and happens before the table answers; then nothing compiles."""
    cache_without(tmp_path, "updates._step_rows", "rows._read_rows")
    said = run(
        """
        import logging, sys
        logging.basicConfig(stream=sys.stdout, level=logging.WARNING)
        sys.path.insert(0, "tests/unit/client")
        import torch, mempool
        from grpc_pool import GrpcPoolHere
        from numba.core import event
        from mempool import kernels
        from mempool.kernels import making, warming
        needs = kernels.Needs()
        lacking = making._load(needs, warming.calls_of(needs))  # which takes long, too, on a busy machine
        here = GrpcPoolHere(shards=1)
        pool = mempool.connect(here.address, timeout_s=3)
        table = pool.create_table(
            mempool.TableConfig(name="t", num_slots=16, value_dim=8, optimizer=mempool.optim.SGD(lr=0.1))
        )
        recorder = event.RecordingListener()
        event.register("numba:compile", recorder)
        values = table.gather(torch.tensor([[1, 2]]), torch.ones(1, 2, requires_grad=True))
        values.sum().backward()
        mempool.optim.PoolOptimizer([table]).step()
        table.write(torch.tensor([3]), torch.ones(1, 8))
        assert table.rows(torch.tensor([3])).tolist() == [[1.0] * 8]
        assert not recorder.buffer, recorder.buffer
        assert {"step", "rows"} <= set(lacking), lacking
        pool.close()
        here.close()
        """,
        NUMBA_CACHE_DIR=str(tmp_path),
    )
    assert re.search(r"compiling CPU kernels, once per machine: 0 of (2|10)\n", said), said  # 10: none was kept


def test_a_table_of_any_kind_loads_no_kernel_after_it_was_made():
    run(
        """
        import torch, mempool
        from mempool import kernels, optim
        from mempool.kernels.cpu import admission, bags, initial, rows, sorting, updates
        from mempool.kernels.cpu.experts import passes
        from mempool.kernels.cpu.scoring import flat, topk
        def loaded():
            return {
                name: len(kernel.signatures)
                for module in (admission, bags, flat, initial, passes, rows, sorting, topk, updates)
                for name, kernel in vars(module).items()
                if hasattr(kernel, "signatures")
            }
        kinds = {
            "norm": dict(optimizer=optim.Adagrad(lr=0.1, max_norm=1.0), layout="rows"),
            "dense": dict(optimizer=optim.AdamW(lr=0.1, dense=True), dtype="bfloat16", master=True),
            "int8": dict(optimizer=optim.RowWiseAdam(lr=0.1), dtype="int8"),
            "flat": dict(optimizer=optim.SGD(lr=0.1, momentum=0.9), dtype="bfloat16", keys=mempool.FlatKeys(key_dim=8)),
            "product": dict(optimizer=optim.SGD(lr=0.1), keys=mempool.ProductKeys(heads=2, key_dim=8)),
        }
        queries = {"flat": torch.ones(2, 8), "product": torch.ones(2, 2, 8)}
        kernels.make_ready(kernels.SCORING)  # of the trainer's keys, as a layer of experts has
        with mempool.local() as pool:
            for name, fields in kinds.items():
                table = pool.create_table(mempool.TableConfig(name=name, num_slots=16, value_dim=8, **fields))
                before = loaded()
                if name in queries:
                    table.lookup(queries[name], topk=2)
                if table.schema.layout == "rows":
                    mempool.nn.PEERLayer(4, table=table, heads=1, topk=2, key_dim=4)(torch.ones(2, 4)).sum().backward()
                optimizer = optim.PoolOptimizer([table])
                for max_norm in (None, 1.0):
                    optimizer.zero_grad()
                    weights = torch.ones(1, 2, requires_grad=True)
                    table.gather(torch.tensor([[1, 2]]), weights).sum().backward()
                    optimizer.step()
                table.write(torch.tensor([3]), torch.ones(1, 8))
                table.rows(torch.tensor([1, 3]))
                assert loaded() == before, (name, before, loaded())
        """
    )


def test_only_compiled_refuses_to_compile():
    compiled = []
    compile_kernel = watched(compiled.append, "kernel")
    with only_compiled(), pytest.raises(NotCompiledError):
        compile_kernel("float32")
    compile_kernel("float64")
    assert compiled == ["float64"]


@pytest.fixture
def lacking(monkeypatch):
    """All calls of a table lack their kernels; which of them are made in this process."""
    here = []
    monkeypatch.setattr(making, "_ready", set())
    monkeypatch.setattr(making, "_load", lambda _needs, names: list(names))
    monkeypatch.setattr(making, "call", lambda name, _needs: here.append(name))
    return here


@pytest.mark.parametrize("dead_before_it_is_told", [False, True])
def test_what_children_cannot_compile_is_compiled_here(lacking, monkeypatch, dead_before_it_is_told):
    monkeypatch.setattr(making, "_CHILD", "raise SystemExit(1)")
    start = making._start_child

    def start_dead():
        child = start()
        child.wait(60)
        return child

    if dead_before_it_is_told:
        monkeypatch.setattr(making, "_start_child", start_dead)
    needs = kernels.Needs()
    kernels.make_ready(needs)
    assert lacking == list(warming.calls_of(needs))


def test_whoever_is_stopped_waits_for_no_child(lacking, monkeypatch):
    monkeypatch.setattr(making, "_CHILD", "import time; time.sleep(600)")
    stop = threading.Event()
    told = []

    def report(done, of):
        told.append((done, of))
        stop.set()

    kernels.make_ready(kernels.Needs(), report=report, stop=stop)
    assert told == [(0, len(warming.calls_of(kernels.Needs())))]
    assert lacking == []
    assert kernels.Needs() not in making._ready


def test_of_two_that_compile_at_once_one_waits(monkeypatch, tmp_path):
    monkeypatch.setattr(making, "_cache_folder", lambda: tmp_path)
    order = []

    def second():
        with making._turn(threading.Event()):
            order.append("second")

    with making._turn(threading.Event()):
        waiting = threading.Thread(target=second)
        waiting.start()
        waiting.join(0.3)
        order.append("first")
    waiting.join(10)
    assert order == ["first", "second"]
