"""The package's face: which implementation runs, what is refused, what stays unimported, bad surroundings."""

import dataclasses
import os
import sys

import pytest
import torch
from scripts import run_script

from mempool import kernels
from mempool.kernels import OptimizerStep, PackedLayout, Paged, RandomRounding
from mempool.kernels.implementation import implementation_for


def run(code: str, **environment: str) -> str:
    return run_script(code, environment)[0]


def make() -> dict:
    return {
        "paged": Paged(torch.ones(4, 3), torch.tensor([0, 1], dtype=torch.int32), 1),
        "ids": torch.tensor([0, 3, 3]),
        "weights": torch.tensor([1.0, 2.0, 3.0]),
        "offsets": torch.tensor([0, 2, 3]),
    }


def test_importing_loads_neither_numba_nor_triton():
    run("import sys, mempool.kernels; assert not {'numba', 'triton'} & set(sys.modules)")


def test_the_face_runs_every_function_on_the_cpu():
    arguments = make()
    paged, ids, weights = arguments["paged"], arguments["ids"], arguments["weights"]
    grads, bags = torch.ones(2, 3), torch.tensor([0, 0, 1])
    assert kernels.weighted_sum(**arguments).tolist() == [[3.0] * 3] * 2
    assert kernels.weight_gradient(paged, ids, arguments["offsets"], grads).tolist() == [3.0] * 3
    pairs = kernels.sort_pairs(paged, ids)
    assert pairs.starts.tolist() == [0, 1, 3]
    sums = kernels.segment_sum(pairs, weights, bags, grads)
    assert sums[:, 0].tolist() == [1.0, 5.0]
    assert kernels.squared_norm(sums) == (78.0, True)
    step = OptimizerStep("sgd", lr=0.1)
    assert pairs.slots.tolist() == [0, 3]
    kernels.optimizer_step(paged, {}, pairs, sums, step)
    kernels.fused_step(paged, {}, pairs, weights, bags, grads, step)
    assert torch.allclose(kernels.gather_rows(paged, ids)[:, 0], torch.tensor([0.8, 0.0, 0.0]), atol=1e-6)
    kernels.scatter_rows(paged, ids, torch.arange(9.0).view(3, 3))
    assert kernels.gather_rows(paged, ids).tolist() == [[0.0, 1.0, 2.0], [6.0, 7.0, 8.0], [6.0, 7.0, 8.0]]
    assert kernels.flat_topk(torch.ones(1, 3), paged, 2, 4)[1].tolist() == [[3, 0]]
    scores = torch.tensor([[1.0, 3.0, 3.0]])
    assert kernels.select_topk(scores, 2)[1].tolist() == [[1, 2]]
    assert [index.tolist() for index in kernels.product_select(scores, scores, 2, 3)] == [[[1, 1]], [[1, 2]]]
    keys = torch.tensor([[[[1.0], [2.0]], [[1.0], [2.0]]]])
    assert kernels.product_topk(torch.ones(1, 1, 2), keys, 2)[1].tolist() == [[[3, 1]]]
    scores, index1, index2 = kernels.product_indices(torch.ones(1, 1, 2), keys, 2)
    assert (scores.tolist(), index1.tolist(), index2.tolist()) == ([[[4.0, 3.0]]], [[[1, 0]]], [[[1, 1]]])
    query_grads, key_grads = kernels.product_gradient(torch.ones(1, 1, 2), keys, index1, index2, scores)
    assert query_grads.tolist() == [[[11.0, 14.0]]]
    assert key_grads.tolist() == [[[[3.0], [4.0]], [[0.0], [7.0]]]]
    kernels.add_segments(sums, torch.tensor([1, 0]), pairs, weights, bags, grads)
    assert sums[:, 0].tolist() == [6.0, 6.0]
    assert kernels.initial_values(0, 0, 2, 0, 3, 1.0).shape == (2, 3)


def test_scores_that_need_gradients_are_selected():
    scores = torch.tensor([[1.0, 3.0, 2.0]], requires_grad=True)
    values, index = kernels.select_topk(scores, 1)
    assert not values.requires_grad
    assert index.tolist() == [[1]]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ids": torch.tensor([0, 3, 3], dtype=torch.int16)}, "ids must be .* int64, int32 or uint32"),
        ({"ids": torch.zeros(1, 3, dtype=torch.int64)}, "ids must be"),
        ({"weights": torch.ones(2)}, r"weights must be torch.float32 \[3\], got torch.float32 \[2\]"),
        ({"weights": torch.ones(3, dtype=torch.float64)}, "weights must be torch.float32"),
        ({"offsets": torch.tensor([0, 2])}, "offsets must run from 0 to the number of ids, 3"),
        ({"offsets": torch.tensor([1, 3])}, "offsets must run from 0"),
        ({"offsets": torch.tensor([0, 5, 3])}, "offsets must not fall"),
        # Differences that leave int64 are positive again.
        ({"offsets": torch.tensor([0, 2**63 - 1, -(2**63), -1, 3])}, "offsets must not fall; they do after bag 1"),
        ({"offsets": torch.empty(0, dtype=torch.int64)}, "offsets must be"),
        ({"ids": torch.zeros(3, dtype=torch.int64, device="meta")}, "ids is on meta"),
    ],
)
def test_wrong_bags_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        kernels.weighted_sum(**(make() | change))


def test_wrong_arenas_and_steps_are_refused():
    table = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match="rows must be"):
        Paged(torch.zeros(2, 2, dtype=torch.float16), table, 1)
    with pytest.raises(ValueError, match="rows must be"):
        Paged(torch.zeros(2, 4)[:, :2], table, 1)
    with pytest.raises(ValueError, match="page_table must be"):
        Paged(torch.zeros(2, 2), table.long(), 1)
    with pytest.raises(ValueError, match="page_shift must lie in"):
        Paged(torch.zeros(2, 2), table, -1)
    with pytest.raises(ValueError, match="unknown optimizer algorithm 'momentum'"):
        OptimizerStep("momentum", lr=0.1)
    with pytest.raises(ValueError, match="commits from 1"):
        OptimizerStep("sgd", lr=0.1, step=0)
    with pytest.raises(ValueError, match="block_dim must be"):
        OptimizerStep("sgd", lr=0.1, block_dim=0)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_defaults_of_torch_change_nothing(dtype):
    """Training code sets them; kernels say which dtype and device they mean."""
    generator = torch.Generator().manual_seed(0)
    paged = Paged(torch.randn(4, 6, generator=generator), torch.tensor([0, 1], dtype=torch.int32), 1)
    ids, offsets = torch.tensor([0, 3, 3]), torch.tensor([0, 2, 3])
    queries, keys = torch.randn(3, 2, 6, generator=generator), torch.randn(2, 2, 5, 3, generator=generator)

    def results():
        scores, index1, index2 = kernels.product_indices(queries, keys, 4)
        schedule = kernels.DenseSchedule(first_step=1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
        schedule.append(1e-3)
        return [
            kernels.weighted_sum(paged, ids, None, offsets),
            kernels.gather_rows(paged, ids, dtype=torch.bfloat16),
            *kernels.select_topk(queries[:, 0], 2),
            *(scores, index1, index2),
            *kernels.product_gradient(queries, keys, index1, index2, scores),
            *kernels.flat_topk(queries[:, 0], paged, 2, 4),
            schedule.steps,
        ]

    expected = results()
    torch.set_default_dtype(dtype)
    try:
        with torch.device("meta"):
            found = results()
    finally:
        torch.set_default_dtype(torch.float32)
    assert all(map(torch.equal, found, expected))


def test_wrong_updates_change_nothing():
    paged = Paged(torch.ones(2, 3), torch.zeros(1, dtype=torch.int32), 1)
    sums = torch.ones(1, 3)
    first = kernels.sort_pairs(paged, torch.tensor([0]))
    adagrad = OptimizerStep("adagrad", lr=0.1)
    with pytest.raises(ValueError, match="adagrad needs the state 'sum'"):
        kernels.optimizer_step(paged, {}, first, sums, adagrad)
    with pytest.raises(ValueError, match=r"state\['sum'\] must be torch.float32 \[2, 3\]"):
        kernels.optimizer_step(paged, {"sum": torch.zeros(2, 2)}, first, sums, adagrad)
    with pytest.raises(ValueError, match="sums must be"):
        kernels.optimizer_step(paged, {}, first, torch.ones(1, 2), OptimizerStep("sgd", lr=0.1))
    pairs = kernels.sort_pairs(paged, torch.tensor([0, 1]))
    with pytest.raises(ValueError, match="bags must name the bag of every sorted pair"):
        kernels.segment_sum(pairs, None, torch.tensor([0]), sums)
    with pytest.raises(ValueError, match="values must be"):
        kernels.scatter_rows(paged, torch.tensor([0]), torch.ones(1, 3, dtype=torch.bfloat16))
    with pytest.raises(ValueError, match="places must be"):
        kernels.add_segments(sums, torch.tensor([0, 0]), first, None, torch.tensor([0]), sums)
    with pytest.raises(ValueError, match="dtype must be one of"):
        kernels.gather_rows(paged, torch.tensor([0]), dtype=torch.float64)
    columns = RandomRounding(0, torch.zeros(2, dtype=torch.int64))
    with pytest.raises(ValueError, match=r"rounding.columns must be torch.int64 \[1\]"):
        kernels.optimizer_step(paged, {}, first, sums, OptimizerStep("sgd", lr=0.1, rounding=columns))
    assert torch.equal(paged.rows, torch.ones(2, 3))
    assert torch.equal(sums, torch.ones(1, 3))


def test_packed_arenas_are_checked():
    table = torch.zeros(1, dtype=torch.int32)
    layout = PackedLayout("int8", width=70, block_dim=64)
    assert (layout.num_blocks, layout.scales_start, layout.row_bytes) == (2, 72, 80)
    with pytest.raises(ValueError, match=r"rows must be a contiguous \[R, 80\] uint8 tensor"):
        Paged(torch.zeros(2, 70, dtype=torch.uint8), table, 1, layout)
    paged = Paged(torch.zeros(2, 80, dtype=torch.uint8), table, 1, layout)
    assert (paged.width, paged.element, paged.value_dtype) == (70, "int8", torch.float32)
    pairs = kernels.sort_pairs(paged, torch.tensor([0]))
    with pytest.raises(ValueError, match="one scale per 64 columns, the step has blocks of 32"):
        kernels.optimizer_step(paged, {}, pairs, torch.ones(1, 70), OptimizerStep("sgd", lr=0.1, block_dim=32))
    with pytest.raises(ValueError, match="keys must be float32 or bfloat16, got int8"):
        kernels.flat_topk(torch.ones(1, 70), paged, 1, 2)
    with pytest.raises(ValueError, match="unknown packed element 'int4'"):
        PackedLayout("int4", width=70, block_dim=64)
    with pytest.raises(ValueError, match="must be at least 1"):
        PackedLayout("int8", width=0, block_dim=64)


def test_numbers_that_would_be_read_as_places_are_checked():
    """Places in a tensor, on the CPU: a GPU's would have to be waited for."""
    rows = torch.ones(2, 3)
    paged = Paged(rows, torch.tensor([0], dtype=torch.int32), 1)
    pairs, grads = kernels.sort_pairs(paged, torch.tensor([0, 1])), torch.ones(2, 3)
    with pytest.raises(ValueError, match=r"bags must lie in 0\.\.1, got 2"):
        kernels.fused_step(paged, {}, pairs, None, torch.tensor([0, 2]), grads, OptimizerStep("sgd", lr=0.1))
    with pytest.raises(ValueError, match=r"bags must lie in 0\.\.1, got -1"):
        kernels.segment_sum(pairs, None, torch.tensor([-1, 0]), grads)
    with pytest.raises(ValueError, match=r"places must lie in 0\.\.1, got 5"):
        kernels.add_segments(torch.zeros(2, 3), torch.tensor([0, 5]), pairs, None, torch.tensor([0, 1]), grads)
    index, wrong = torch.zeros(1, 1, 1, dtype=torch.int64), torch.full((1, 1, 1), 2)
    for indices in ((index, wrong), (wrong, index)):
        with pytest.raises(ValueError, match=r"index[12] must lie in 0\.\.1, got 2"):
            kernels.product_gradient(torch.ones(1, 1, 2), torch.ones(1, 2, 2, 1), *indices, torch.ones(1, 1, 1))
    with pytest.raises(ValueError, match="k must be at least 1, got 0"):
        kernels.flat_topk(torch.ones(1, 3), paged, 0, 2)
    with pytest.raises(ValueError, match=r"sums must be float32 \[U, W\], got torch.float32 \[\]"):
        kernels.squared_norm(torch.tensor(1.0))
    with pytest.raises(ValueError, match="at least one column"):
        Paged(torch.ones(2, 0), paged.page_table, 1)
    assert torch.equal(rows, torch.ones(2, 3))


@pytest.mark.parametrize("k", [0, 4])
def test_k_outside_the_scores_is_refused(k):
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.3"):
        kernels.select_topk(torch.zeros(1, 3), k)


def test_colliding_ids_are_refused():
    with pytest.raises(ValueError, match="stride must be at least the 3"):
        kernels.product_select(torch.zeros(1, 3), torch.zeros(1, 3), 1, 2)
    with pytest.raises(ValueError, match=r"k must lie in 1\.\.9"):
        kernels.product_select(torch.zeros(1, 3), torch.zeros(1, 3), 10, 3)
    with pytest.raises(ValueError, match="must be even"):
        kernels.product_topk(torch.zeros(1, 1, 3), torch.zeros(1, 2, 3, 1), 1)


def test_results_are_frozen():
    pairs = kernels.sort_pairs(make()["paged"], make()["ids"])
    with pytest.raises(dataclasses.FrozenInstanceError):
        pairs.rows = pairs.order


def test_each_device_has_its_implementation():
    assert implementation_for(torch.device("cpu")) is kernels.implementation("numba")
    assert implementation_for(torch.device("meta")) is kernels.implementation("torch")
    with pytest.raises(ValueError, match="unknown implementation 'cuda'"):
        kernels.implementation("cuda")


def test_without_numba_and_triton_torch_does_it():
    run(
        """
        import sys
        sys.modules["numba"] = sys.modules["triton"] = None  # what "not installed" looks like to an import
        import torch
        from mempool import kernels
        from mempool.kernels.implementation import implementation_for
        for device in ("cpu", "cuda"):
            assert implementation_for(torch.device(device)) is kernels.implementation("torch")
        kernels.warm_up()
        """
    )


def test_where_numba_must_not_compile_torch_does_it_and_says_so():
    said = run(
        """
        import logging, sys
        logging.basicConfig(stream=sys.stdout)
        import torch
        from mempool import kernels
        from mempool.kernels.implementation import implementation_for
        assert implementation_for(torch.device("cpu")) is kernels.implementation("torch")
        assert kernels.initial_values(0, 0, 4, 0, 2, 1.0).shape == (4, 2)
        """,
        NUMBA_DISABLE_JIT="1",
    )
    assert "run in torch's own operations, slower: NUMBA_DISABLE_JIT is set" in said
    assert said.count("\n") == 1


def test_kernels_leave_torch_as_many_threads_as_it_had():
    """Numba's start sets the number of threads of the OpenMP that it shares with torch."""
    run(
        """
        import torch
        torch.set_num_threads(1)
        from mempool import kernels
        kernels.initial_values(7, 0, 8192, 0, 64, 1.0)
        assert torch.get_num_threads() == 1, torch.get_num_threads()
        torch.set_num_threads(2)
        kernels.initial_values(7, 0, 8192, 0, 64, 1.0)
        assert torch.get_num_threads() == 2, torch.get_num_threads()
        """
    )


def test_a_kernel_takes_no_lock_that_an_interrupt_could_leave_taken():
    """It runs on callers' own threads: numba's and Python's locks between processes are cut off anywhere."""
    kernels.initial_values(7, 0, 8, 0, 64, 1.0)
    seen = set()
    sys.setprofile(lambda frame, *_: seen.add(frame.f_code.co_filename))
    try:
        kernels.initial_values(7, 0, 8, 0, 64, 1.0)
    finally:
        sys.setprofile(None)
    assert [name for name in seen if "/numba/" in name or "/multiprocessing/" in name or "threading" in name] == []


def test_the_first_kernel_of_another_thread_leaves_torchs_threads_as_well():
    run(
        """
        import threading
        import torch
        from mempool import kernels
        torch.set_num_threads(2)
        looked, changed = threading.Event(), threading.Event()
        def work():
            torch.get_num_threads()  # from here on this thread has a number of its own
            looked.set()
            changed.wait(60)
            kernels.initial_values(7, 0, 8192, 0, 64, 1.0)
        worker = threading.Thread(target=work)
        worker.start()
        looked.wait(60)
        torch.set_num_threads(1)
        changed.set()
        worker.join(60)
        assert torch.get_num_threads() == 1
        """
    )


@pytest.mark.skipif(not hasattr(os, "fork"), reason="the system has no fork")
def test_a_fork_of_a_process_that_ran_kernels_says_so():
    """OpenMP would end it without a word of Python."""
    run(
        """
        import os
        from mempool import kernels
        kernels.initial_values(7, 0, 8192, 0, 64, 1.0)
        child = os.fork()
        if child == 0:
            try:
                kernels.initial_values(7, 0, 8192, 0, 64, 1.0)
            except RuntimeError as error:
                os._exit(0 if "spawn" in str(error) else 1)
            os._exit(2)
        assert os.waitpid(child, 0)[1] == 0
        """
    )


def test_without_a_safe_threading_layer_torch_does_it():
    """Numba's workqueue layer aborts the process when two threads run kernels, so it must never be taken."""
    run(
        """
        import sys
        sys.modules["numba.np.ufunc.omppool"] = sys.modules["numba.np.ufunc.tbbpool"] = None
        import torch
        from mempool import kernels
        from mempool.kernels.implementation import implementation_for
        assert implementation_for(torch.device("cpu")) is kernels.implementation("torch")
        try:
            kernels.implementation("numba")
        except ImportError as error:
            assert "libgomp" in str(error)
        else:
            raise AssertionError("an unsafe threading layer was taken")
        """
    )


def test_a_running_unsafe_threading_layer_is_refused():
    run(
        """
        import numba
        numba.config.THREADING_LAYER = "workqueue"
        numba.get_num_threads()  # starts it
        assert numba.threading_layer() == "workqueue"
        from mempool import kernels
        try:
            kernels.implementation("numba")
        except ImportError as error:
            assert "workqueue" in str(error)
        else:
            raise AssertionError("an unsafe threading layer was taken")
        """
    )


def test_kernels_compile_where_no_cache_can_be_written():
    """Numba refuses to cache where no directory is writable; then kernels are compiled for the process alone."""
    run(
        """
        from numba.core import caching
        caching.CacheImpl._locator_classes = []
        from mempool import kernels
        assert kernels.implementation("numba") and kernels.initial_values(0, 0, 4, 0, 2, 1.0).shape == (4, 2)
        from mempool.kernels.cpu import initial
        found = [one for one in vars(initial).values() if getattr(one, "signatures", None)]
        assert found and all(one.stats.cache_path is None for one in found)
        """
    )


def test_warm_up_leaves_nothing_to_compile():
    """After warm_up, calls with other shapes, every element, plain optimizer and rounding compile nothing more."""
    run(
        """
        import torch
        from mempool import kernels
        from mempool.kernels import DenseSchedule, OptimizerStep, PackedLayout, Paged, RandomRounding
        from mempool.kernels.cpu import admission, bags, initial, rows, sorting, updates
        from mempool.kernels.cpu.experts import passes
        from mempool.kernels.cpu.scoring import flat, topk
        kernels.warm_up()
        def compiled():
            return {
                (module.__name__, name): len(kernel.signatures)
                for module in (admission, bags, flat, initial, passes, rows, sorting, topk, updates)
                for name, kernel in vars(module).items()
                if hasattr(kernel, "signatures")
            }
        before = compiled()
        assert sum(before.values()) > 20, before
        slots, offsets, bag = torch.tensor([3, 0, 9, 3]), torch.tensor([0, 4]), torch.zeros(4, dtype=torch.int64)
        ids, came = slots.to(torch.int32), slots.to(torch.uint32)
        def arena(element):
            table = torch.tensor([2, -1, 1], dtype=torch.int32)
            if element in ("float32", "bfloat16"):
                return Paged(torch.ones(12, 5, dtype=getattr(torch, element)), table, 2)
            packed = PackedLayout(element, width=5, block_dim=2)
            return Paged(torch.zeros(12, packed.row_bytes, dtype=torch.uint8), table, 2, packed)
        rounding = RandomRounding(7, torch.tensor([0, 2, 4]))
        schedule = DenseSchedule(first_step=1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
        schedule.append(0.1)
        for element in kernels.ELEMENTS:
            paged = arena(element)
            for weights in (None, torch.ones(4)):
                kernels.weighted_sum(paged, ids, weights, offsets, dtype=torch.bfloat16)
                for act in kernels.EXPERT_ACTS:
                    kernels.expert_sums(paged, ids, weights, offsets, torch.ones(1, 2), act=act)
                    kernels.expert_gradients(paged, ids, weights, offsets, torch.ones(1, 5), 2, act=act)
                pairs = kernels.sort_pairs(paged, ids)
                kernels.segment_sum(pairs, weights, bag, torch.ones(1, 5))
                for algorithm in kernels.ALGORITHMS:
                    step = OptimizerStep(algorithm, lr=0.1, block_dim=2, rounding=rounding)
                    if not step.plain:
                        continue  # a variant of its own
                    state = {
                        name: torch.zeros(12, 3 if name in kernels.BLOCK_STATE else 5)
                        for name in (*kernels.STATE_NAMES[algorithm], kernels.MASTER)
                    }
                    kernels.fused_step(paged, state, pairs, weights, bag, torch.ones(1, 5), step)
                    kernels.fused_step(paged, state, pairs, weights, bag, torch.ones(1, 5), step)
            dense = {name: torch.zeros(12, 5) for name in ("exp_avg", "exp_avg_sq", "master")}
            dense["last_step"] = torch.zeros(12, 3, dtype=torch.int32)
            kernels.catch_up(paged, dense, pairs.rows, schedule, to=1, block_dim=2)
            if paged.packed is None:
                del dense["master"]
                if element == "float32":
                    dense["last_step"].zero_()
                    kernels.catch_up(paged, dense, pairs.rows, schedule, to=1, block_dim=2)
                kernels.flat_topk(torch.ones(2, 5), paged, 3, 12)
            kernels.weight_gradient(paged, ids, offsets, torch.ones(1, 5))
            kernels.scatter_rows(paged, slots, kernels.gather_rows(paged, slots))
            kernels.gather_rows(paged, slots, dtype=torch.bfloat16)
        for given in (slots, came):
            for own in (False, True):
                kernels.admit_bags(given, offsets, num_slots=12, dtype=torch.int32, own=own)
        kernels.select_topk(torch.ones(3, 200), 150)
        kernels.product_select(torch.ones(3, 20), torch.ones(3, 20), 150, 20)
        kernels.product_topk(torch.ones(3, 2, 6), torch.ones(2, 2, 4, 3), 3)
        kernels.squared_norm(torch.ones(2, 3))
        kernels.initial_values(2**63, 5, 3, 1, 2, 0.5)
        assert compiled() == before, (before, compiled())
        """
    )
