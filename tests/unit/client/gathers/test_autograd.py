"""Gathers under autograd: equal to torch's own embedding_bag on a local tensor, and well behaved in its corners."""

import gc
import threading
from collections.abc import Callable
from dataclasses import dataclass

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.nn.functional import embedding_bag
from torch.utils.checkpoint import checkpoint

from mempool.client import Pool, Table
from mempool.errors import InvalidRequest
from tests.support.faulty import COLUMNS, LAYOUTS, Fault, FaultyPool

LR = 0.5


@dataclass
class Twin:
    """A table, and a tensor with the same values that torch trains."""

    fake: FaultyPool
    table: Table
    values: Tensor

    def gather(self, ids: Tensor, weights: Tensor | None, offsets: Tensor | None = None) -> Tensor:
        """torch's own."""
        if weights is None:
            weights = torch.ones(ids.shape)
        return embedding_bag(
            ids,
            self.values,
            offsets,
            mode="sum",
            per_sample_weights=weights.float(),
            include_last_offset=offsets is not None,
        )

    def assert_trained_alike(self) -> None:
        """Both step by SGD; the values are then equal, in norm."""
        self.table.commit(lr=LR)
        assert self.values.grad is not None
        expected = self.values.detach() - LR * self.values.grad
        assert (self.fake.values - expected).norm() <= 1e-6 * expected.norm()

    def held(self) -> int:
        return self.fake.shards[0].held


@pytest.fixture
def twin(open_pool: Callable[..., Pool]) -> Callable[..., Twin]:
    def make(layout: str = "columns") -> Twin:
        fake = FaultyPool(LAYOUTS[layout])
        return Twin(fake, open_pool(fake).table("facts"), fake.values.float().requires_grad_())

    return make


def make_inputs(seed: int = 0, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, 64, (5, 4), generator=generator)
    ids[0, :] = ids[0, 0]  # repeated
    ids[1, 0], ids[1, 1] = 0, 63
    return ids, torch.randn(5, 4, generator=generator).to(dtype).requires_grad_()


def make_loss(seed: int = 1) -> Callable[[Tensor], Tensor]:
    """A loss whose gradient differs everywhere."""
    target = torch.randn(5, 12, generator=torch.Generator().manual_seed(seed))
    return lambda pooled: (pooled.float() - target).square().sum()


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_values_and_all_gradients_are_those_of_embedding_bag(twin, layout: str, dtype: torch.dtype) -> None:  # type: ignore[no-untyped-def]
    both, loss = twin(layout), make_loss()
    ids, weights = make_inputs(dtype=dtype)
    local_weights = weights.detach().clone().requires_grad_()
    pooled, expected = both.table.gather(ids, weights), both.gather(ids, local_weights)
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    loss(pooled).backward()
    loss(expected).backward()
    assert weights.grad is not None
    assert weights.grad.dtype == dtype
    torch.testing.assert_close(weights.grad, local_weights.grad, rtol=1e-5 if dtype.itemsize > 2 else 1e-2, atol=1e-4)
    both.assert_trained_alike()


@given(
    lengths=st.lists(st.integers(0, 5), min_size=1, max_size=6),
    seed=st.integers(0, 1000),
    weighted=st.booleans(),
    layout=st.sampled_from(sorted(LAYOUTS)),
)
@settings(deadline=None, max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_bags_of_any_length_are_those_of_embedding_bag(  # type: ignore[no-untyped-def]
    twin, lengths: list[int], seed: int, weighted: bool, layout: str
) -> None:
    both = twin(layout)
    generator = torch.Generator().manual_seed(seed)
    offsets = torch.tensor([0, *lengths]).cumsum(0)
    ids = torch.randint(0, 64, (sum(lengths),), generator=generator)
    weights = torch.randn(sum(lengths), generator=generator, requires_grad=True) if weighted else None
    local_weights = weights.detach().clone().requires_grad_() if weights is not None else None
    pooled = both.table.gather(ids, weights, offsets=offsets)
    expected = both.gather(ids, local_weights, offsets)
    torch.testing.assert_close(pooled, expected, rtol=1e-5, atol=1e-5)
    pooled.square().sum().backward()
    expected.square().sum().backward()
    if weights is not None and local_weights is not None:
        torch.testing.assert_close(weights.grad, local_weights.grad, rtol=1e-5, atol=1e-4)
    both.assert_trained_alike()


def test_values_are_trained_where_weights_are_not(twin) -> None:  # type: ignore[no-untyped-def]
    both = twin()
    ids, weights = make_inputs()
    pooled = both.table.gather(ids, weights.detach())
    assert pooled.requires_grad
    pooled.square().sum().backward()
    both.gather(ids, weights.detach()).square().sum().backward()
    both.assert_trained_alike()
    update = both.fake.shards[0].requests("update")[0]
    assert not update.want_weight_grad


def test_all_ones_are_not_sent(twin) -> None:  # type: ignore[no-untyped-def]
    both = twin()
    ids, _ = make_inputs()
    both.table.gather(ids).square().sum().backward()
    both.gather(ids, None).square().sum().backward()
    both.assert_trained_alike()
    assert both.fake.shards[0].requests("gather")[0].weights is None


def test_frozen_table_still_gives_the_gradient_of_the_weights(twin) -> None:  # type: ignore[no-untyped-def]
    both, loss = twin(), make_loss()
    assert both.table.requires_grad
    assert both.table.requires_grad_(False) is both.table
    assert not both.table.requires_grad
    ids, weights = make_inputs()
    local_weights = weights.detach().clone().requires_grad_()
    loss(both.table.gather(ids, weights)).backward()
    loss(both.gather(ids, local_weights)).backward()
    torch.testing.assert_close(weights.grad, local_weights.grad, rtol=1e-5, atol=1e-4)
    assert both.held() == 0
    assert both.table.pending == 0
    assert not both.table.gather(ids, weights.detach()).requires_grad
    assert [request.remember for request in both.fake.shards[0].requests("gather")] == [True, False]
    both.table.requires_grad_()
    assert both.table.gather(ids, weights.detach()).requires_grad


def test_no_grad_leaves_nothing_behind(twin) -> None:  # type: ignore[no-untyped-def]
    both = twin()
    ids, weights = make_inputs()
    with torch.no_grad():
        pooled = both.table.gather(ids, weights)
    assert not pooled.requires_grad
    with torch.inference_mode():
        both.table.gather(ids, weights)
    assert not any(shard.context_bytes for shard in both.fake.shards)


def test_evaluation_with_gradients_sends_ids_along_backward(twin) -> None:  # type: ignore[no-untyped-def]
    both, loss = twin(), make_loss()
    ids, weights = make_inputs()
    pooled = both.table.gather(ids, weights, remember=False)
    assert not any(shard.context_bytes for shard in both.fake.shards)
    loss(pooled).backward()
    loss(both.gather(ids, weights.detach())).backward()
    both.assert_trained_alike()
    assert all(request.ids is not None for request in both.fake.shards[0].requests("update"))


@pytest.mark.parametrize("backward", [True, False])
def test_contexts_are_released_with_the_graph(twin, backward: bool) -> None:  # type: ignore[no-untyped-def]
    both = twin()
    ids, weights = make_inputs()
    pooled = both.table.gather(ids, weights)
    if backward:
        pooled.sum().backward()
    both.table.gather(ids, weights, remember=False)
    assert all(shard.context_bytes for shard in both.fake.shards)  # the graph lives
    del pooled
    gc.collect()
    both.table.gather(ids, weights, remember=False)
    assert not any(shard.context_bytes for shard in both.fake.shards)


def test_second_backward_is_a_second_update(twin) -> None:  # type: ignore[no-untyped-def]
    both, loss = twin(), make_loss()
    ids, weights = make_inputs()
    local_weights = weights.detach().clone().requires_grad_()
    for pooled in (both.table.gather(ids, weights), both.gather(ids, local_weights)):
        value = loss(pooled)
        value.backward(retain_graph=True)
        value.backward()
    assert both.table.pending == 2
    torch.testing.assert_close(weights.grad, local_weights.grad, rtol=1e-5, atol=1e-4)
    both.assert_trained_alike()


def test_gradients_accumulate_over_gathers(twin) -> None:  # type: ignore[no-untyped-def]
    both = twin()
    for seed in range(3):
        ids, weights = make_inputs(seed)
        loss = make_loss(seed)
        (loss(both.table.gather(ids, weights)) + loss(both.table.gather(ids.flip(0), weights))).backward()
        (loss(both.gather(ids, weights.detach())) + loss(both.gather(ids.flip(0), weights.detach()))).backward()
    assert both.table.pending == 6
    both.assert_trained_alike()


@pytest.mark.parametrize("reentrant", [True, False])
def test_activation_checkpointing_counts_each_gradient_once(twin, reentrant: bool) -> None:  # type: ignore[no-untyped-def]
    both, loss = twin(), make_loss()
    ids, weights = make_inputs()
    local_weights = weights.detach().clone().requires_grad_()

    def block(gather: Callable[[Tensor, Tensor], Tensor], weights: Tensor) -> Tensor:
        return gather(ids, weights.softmax(-1)).sin()

    loss(checkpoint(block, both.table.gather, weights, use_reentrant=reentrant)).backward()
    loss(block(both.gather, local_weights)).backward()
    assert both.table.pending == 1
    torch.testing.assert_close(weights.grad, local_weights.grad, rtol=1e-5, atol=1e-4)
    both.assert_trained_alike()
    gc.collect()
    both.table.gather(ids, weights.detach(), remember=False)
    assert not any(shard.context_bytes for shard in both.fake.shards)


def test_gradients_of_gradients_are_refused(twin) -> None:  # type: ignore[no-untyped-def]
    both = twin()
    ids, weights = make_inputs()
    (grad,) = torch.autograd.grad(both.table.gather(ids, weights).square().sum(), weights, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        grad.sum().backward()


@pytest.mark.parametrize("upstream", [True, False])
def test_gradients_of_gradients_are_never_silently_nothing(twin, upstream: bool) -> None:  # type: ignore[no-untyped-def]
    """d_weights of a sum depends on the values alone: asked for the weights' part of it, torch answers None."""
    both = twin()
    ids, leaf = make_inputs()
    weights = leaf.softmax(-1) if upstream else leaf
    (grad,) = torch.autograd.grad(both.table.gather(ids, weights).sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="first derivatives only"):
        torch.autograd.grad(grad.sum(), leaf, allow_unused=True)


def test_a_freed_graph_says_so_as_torchs_do(twin) -> None:  # type: ignore[no-untyped-def]
    both = twin()
    ids, weights = make_inputs()
    loss = both.table.gather(ids, weights).sum()
    loss.backward()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
    assert both.table.pending == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch.func.jvp's own
@pytest.mark.parametrize(
    "transform",
    [
        lambda gather, weights: torch.func.grad(lambda weights: gather(weights).sum())(weights),
        lambda gather, weights: torch.func.vmap(gather)(weights[None]),
        lambda gather, weights: torch.func.jvp(gather, (weights,), (weights,)),
        lambda gather, weights: torch.func.jacrev(gather)(weights),
    ],
    ids=["grad", "vmap", "jvp", "jacrev"],
)
def test_function_transforms_are_refused(twin, transform) -> None:  # type: ignore[no-untyped-def]
    both = twin()
    ids, weights = make_inputs()
    with pytest.raises(InvalidRequest, match=r"torch.func's transforms"):
        transform(lambda weights: both.table.gather(ids, weights), weights.detach())


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_forward_mode_derivatives_are_refused(twin) -> None:  # type: ignore[no-untyped-def]
    both = twin()
    ids, weights = make_inputs()
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(weights.detach(), torch.ones_like(weights))
        with pytest.raises(RuntimeError, match="do not reach a pool"):
            both.table.gather(ids, dual)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # torch's own
def test_export_and_tracing_are_refused(twin) -> None:  # type: ignore[no-untyped-def]
    both = twin()
    ids, weights = make_inputs()

    class Model(torch.nn.Module):
        def forward(self, weights: Tensor) -> Tensor:
            return both.table.gather(ids, weights)

    with pytest.raises(Exception, match="cannot be exported"):
        torch.export.export(Model(), (weights.detach(),))
    with pytest.raises(InvalidRequest, match="cannot be exported"):
        torch.jit.trace(Model(), (weights.detach(),))


def test_gradient_of_named_inputs_trains_no_values(twin) -> None:  # type: ignore[no-untyped-def]
    """As with a local leaf that is not among the inputs."""
    both, loss = twin(), make_loss()
    ids, weights = make_inputs()
    local_weights = weights.detach().clone().requires_grad_()
    (grad,) = torch.autograd.grad(loss(both.table.gather(ids, weights)), weights)
    (expected,) = torch.autograd.grad(loss(both.gather(ids, local_weights)), local_weights)
    torch.testing.assert_close(grad, expected, rtol=1e-5, atol=1e-4)
    loss(both.table.gather(ids, weights)).backward(inputs=[weights])
    torch.testing.assert_close(weights.grad, expected, rtol=1e-5, atol=1e-4)
    assert both.table.pending == 0
    assert both.held() == 0


@pytest.mark.parametrize("bad", [torch.inf, torch.nan])
def test_gradients_that_overflowed_are_sent_all_the_same(twin, bad: float) -> None:  # type: ignore[no-untyped-def]
    both = twin()
    ids, weights = make_inputs()
    (both.table.gather(ids, weights).sum() * bad).backward()
    assert weights.grad is not None
    assert not weights.grad.isfinite().any()
    prepared = both.table.prepare()
    assert prepared is not None
    assert not prepared.finite
    before = both.fake.values.clone()
    assert both.table.discard() == 1
    assert torch.equal(both.fake.values, before)


@pytest.mark.parametrize("shape", [(0, 4), (3, 0)])
def test_empty_batches_ask_nobody(twin, shape: tuple[int, int]) -> None:  # type: ignore[no-untyped-def]
    both = twin()
    weights = torch.zeros(shape, requires_grad=True)
    pooled = both.table.gather(torch.zeros(shape, dtype=torch.int64), weights)
    assert torch.equal(pooled, torch.zeros(shape[0], 12))
    pooled.sum().backward()
    assert weights.grad is not None
    assert weights.grad.shape == shape
    assert both.table.pending == 0
    assert not any(shard.calls for shard in both.fake.shards)


def test_inputs_may_be_written_over_at_once(twin) -> None:  # type: ignore[no-untyped-def]
    both, loss = twin(), make_loss()
    ids, weights = make_inputs()
    kept_ids, kept_weights = ids.clone(), weights.detach().clone()
    pooled = both.table.gather(ids, weights)
    with torch.no_grad():
        ids.zero_()
        weights.zero_()
    pooled.retain_grad()
    for shard in both.fake.shards:
        shard.forget()  # so that they are sent again
    loss(pooled).backward()
    assert pooled.grad is not None
    pooled.grad.zero_()
    for shard in both.fake.shards:
        shard.forget()  # and again, with the gradient
    loss(both.gather(kept_ids, kept_weights)).backward()
    with pytest.warns(UserWarning, match="updates of table 'facts' were dropped by shards"):
        both.assert_trained_alike()


def test_backward_on_another_thread(twin) -> None:  # type: ignore[no-untyped-def]
    both, loss = twin(), make_loss()
    ids, weights = make_inputs()
    threads = [
        threading.Thread(target=lambda: loss(both.table.gather(ids, weights.detach())).backward()) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20.0)
    for _ in range(8):
        loss(both.gather(ids, weights.detach())).backward()
    assert both.table.pending == 8
    both.assert_trained_alike()


def test_autocast_leaves_sums_float32(twin) -> None:  # type: ignore[no-untyped-def]
    both = twin()
    ids, weights = make_inputs()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        scaled = (weights @ torch.eye(4)).softmax(-1)
        pooled = both.table.gather(ids, scaled)
        loss = (pooled @ torch.ones(12, 1)).sum()
    assert pooled.dtype == torch.float32
    torch.testing.assert_close(pooled, both.gather(ids, scaled.detach()), rtol=1e-5, atol=1e-5)
    loss.backward()
    assert weights.grad is not None
    assert weights.grad.dtype == torch.float32
    assert weights.grad.abs().sum() > 0


def test_bfloat16_on_the_wire_rounds_what_is_sent_and_sums_float32(twin) -> None:  # type: ignore[no-untyped-def]
    both, loss = twin(), make_loss()
    both.table.wire_dtype = "bfloat16"
    ids, weights = make_inputs()
    pooled = both.table.gather(ids, weights)
    assert pooled.dtype == torch.float32
    exact = both.gather(ids, weights.detach().bfloat16())
    torch.testing.assert_close(pooled, exact.bfloat16().float(), rtol=0.0, atol=0.0)
    loss(pooled).backward()
    update, gather = both.fake.shards[0].requests("update")[0], both.fake.shards[0].requests("gather")[0]
    assert update.grads.dtype == gather.weights.dtype == torch.bfloat16
    assert weights.grad is not None
    assert weights.grad.dtype == torch.float32


@pytest.mark.parametrize("fault", [Fault.RESTART, Fault.FORGET, Fault.ERROR_AFTER])
def test_faults_between_forward_and_backward_change_no_gradient(twin, fault: Fault) -> None:  # type: ignore[no-untyped-def]
    both, loss = twin("grid"), make_loss()
    ids, weights = make_inputs()
    local_weights = weights.detach().clone().requires_grad_()
    pooled = both.table.gather(ids, weights)
    for shard in both.fake.shards:
        shard.faults["update"] = [fault]
    loss(pooled).backward()
    loss(both.gather(ids, local_weights)).backward()
    torch.testing.assert_close(weights.grad, local_weights.grad, rtol=1e-5, atol=1e-4)
    both.assert_trained_alike()


@pytest.mark.filterwarnings("ignore")  # the compiler's own
def test_compiled_code_is_one_graph_and_right(twin) -> None:  # type: ignore[no-untyped-def]
    both, loss = twin(), make_loss()
    ids, weights = make_inputs()
    local_weights = weights.detach().clone().requires_grad_()
    graphs = []

    def backend(graph: torch.fx.GraphModule, _: object) -> Callable[..., object]:
        graphs.append(graph)
        return graph.forward

    @torch.compile(backend=backend)
    def model(weights: Tensor) -> Tensor:
        return both.table.gather(ids, weights.softmax(-1)).sin() * 2

    for _ in range(3):
        loss(model(weights)).backward()
        loss(both.gather(ids, local_weights.softmax(-1)).sin() * 2).backward()
    torch.testing.assert_close(weights.grad, local_weights.grad, rtol=1e-5, atol=1e-4)
    both.assert_trained_alike()
    assert len(graphs) == 1  # whole, compiled once
    gc.collect()
    both.table.gather(ids, weights.detach(), remember=False)
    assert not any(shard.context_bytes for shard in both.fake.shards)


@pytest.mark.filterwarnings("ignore")
def test_compiled_gradient_of_named_inputs_trains_no_values(twin) -> None:  # type: ignore[no-untyped-def]
    both, loss = twin(), make_loss()
    ids, weights = make_inputs()
    model = torch.compile(lambda weights: both.table.gather(ids, weights).sin(), backend="aot_eager", fullgraph=True)
    torch.autograd.grad(loss(model(weights)), weights)
    assert both.table.pending == 0
    loss(model(weights)).backward()
    assert both.table.pending == 1


@pytest.mark.filterwarnings("ignore")
def test_compiled_lookups_bear_hooks_that_copy_what_is_saved(twin) -> None:  # type: ignore[no-untyped-def]
    """The ticket of a lookup is a copy then, and its memory is gone: ids and weights are sent again."""
    both, loss = twin(), make_loss()
    ids, weights = make_inputs()
    local_weights = weights.detach().clone().requires_grad_()
    model = torch.compile(lambda weights: both.table.gather(ids, weights).sin(), backend="eager", fullgraph=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor):
        pooled = model(weights)
    loss(pooled).backward()
    loss(both.gather(ids, local_weights).sin()).backward()
    torch.testing.assert_close(weights.grad, local_weights.grad, rtol=1e-5, atol=1e-4)
    both.assert_trained_alike()


def test_moves_between_forward_and_backward_change_no_gradient(open_pool) -> None:  # type: ignore[no-untyped-def]
    fake = FaultyPool(COLUMNS, num_shards=4)
    both = Twin(fake, open_pool(fake).table("facts"), fake.values.float().requires_grad_())
    loss = make_loss()
    for seed, layout in enumerate(("grid", "one", "rows", "columns")):
        ids, weights = make_inputs(seed)
        pooled = both.table.gather(ids, weights)
        fake.move(LAYOUTS[layout])
        loss(pooled).backward()
        loss(both.gather(ids, weights.detach())).backward()
    both.assert_trained_alike()
