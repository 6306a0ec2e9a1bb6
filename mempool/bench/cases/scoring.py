"""Cases that score keys: product keys, flat keys, and the gradient of product keys' scores."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from mempool import kernels
from mempool.bench import peers
from mempool.bench.cases.case import OWN, Prepared
from mempool.bench.cases.inputs import NUM_INPUTS, Tables, TableSpec, arena_ids, sampled, tensors_bytes
from mempool.bench.gate import FLOAT32_TOLERANCE, Check
from mempool.bench.measuring import Contender
from mempool.kernels import Paged, reference

TORCH_TOPK = "torch matmul + topk"
FAISS = "faiss IndexFlatIP"
OWN_ANY_ORDER = "mempool any order"
TORCH_DENSE = "torch dense autograd"
_SAMPLED_QUERIES = 4


def product_topk(tables: Tables, num_keys: int, half_dim: int, k: int, num_queries: int, heads: int) -> Prepared:
    """Product keys: both halves' scores, their top-k, the k x k sums, their top-k.

    Unavoidable: queries, keys, and a score and an id for each winner; products of every query with every half-key.
    """
    keys, queries = _product_inputs(tables, num_keys, half_dim, num_queries, heads)
    contenders = [
        Contender(OWN, lambda i: kernels.product_topk(queries[i], keys, k)),
        Contender(OWN_ANY_ORDER, lambda i: kernels.product_topk(queries[i], keys, k, deterministic=False)),
        Contender(TORCH_TOPK, lambda i: _torch_product_topk(queries[i], keys, k)),
    ]

    def check() -> list[Check]:
        chosen = torch.tensor(sampled(_SAMPLED_QUERIES, num_queries, tables.seed))
        some = queries[0].cpu()[chosen]
        expected, _, _ = reference.product_topk(some, keys.cpu(), k)
        halves = some.double().view(-1, heads, 2, half_dim)
        scores = torch.einsum("bhcd,hcnd->cbhn", halves, keys.cpu().double())

        def scored(ids: Tensor) -> Tensor:
            return scores[0].gather(2, ids // num_keys) + scores[1].gather(2, ids % num_keys)

        return _checked_winners(contenders, chosen, expected, scored)

    winners = num_queries * heads * k
    return Prepared(
        contenders,
        NUM_INPUTS,
        check,
        num_bytes=tensors_bytes([queries[0], keys]) + winners * (4 + 8),
        num_flops=2 * num_queries * heads * 2 * num_keys * half_dim,
    )


def product_gradient(tables: Tables, num_keys: int, half_dim: int, k: int, num_queries: int, heads: int) -> Prepared:
    """Gradient of the winners' scores with respect to queries and keys.

    Unavoidable: queries and keys read, their gradients written, two indices and a gradient for each winner; two
    products (for query and key) of each winner's two halves.
    """
    keys, queries = _product_inputs(tables, num_keys, half_dim, num_queries, heads)
    generator = torch.Generator().manual_seed(tables.seed)
    grads = torch.randn(num_queries, heads, k, generator=generator).to(tables.device)
    chosen = [kernels.product_indices(one, keys, k)[1:] for one in queries]
    peer = _DenseScores(keys, queries, chosen, grads)
    contenders = [
        Contender(OWN, lambda i: kernels.product_gradient(queries[i], keys, *chosen[i], grads)),
        Contender(TORCH_DENSE, peer.backward, peer.forward),
    ]

    def check() -> list[Check]:
        picked = torch.tensor(sampled(_SAMPLED_QUERIES, num_queries, tables.seed))
        half_keys = torch.tensor(sampled(_SAMPLED_QUERIES, num_keys, tables.seed))
        expected = _expected_gradient(queries[0].cpu(), keys.cpu(), chosen[0], grads.cpu(), picked, half_keys)
        checks = []
        for contender in contenders:
            contender.before(0)
            found: object = contender.run(0)
            assert isinstance(found, tuple)
            parts = [found[0].cpu()[picked], found[1].cpu()[:, :, half_keys]]
            checks.append(Check.of(contender.name, parts, expected))
        return checks

    winners = num_queries * heads * k
    return Prepared(
        contenders,
        NUM_INPUTS,
        check,
        num_bytes=2 * tensors_bytes([queries[0], keys]) + winners * (8 + 8 + 4),
        num_flops=2 * 2 * winners * 2 * half_dim,
    )


def flat_topk(tables: Tables, spec: TableSpec, k: int, num_queries: int) -> Prepared:
    """Flat keys behind a page table: the k best of all slots.

    Unavoidable: queries, keys, and a score and an id for each winner; the product of every query with every key.
    """
    paged = tables.arena(spec)
    generator = torch.Generator().manual_seed(tables.seed)
    # Keys of their own: rows of the arena repeat after some thousand, and equal scores would hide a wrong slot.
    paged = Paged(
        torch.randn(paged.rows.shape, generator=generator).to(tables.device), paged.page_table, paged.page_shift
    )
    queries = [
        torch.randn(num_queries, spec.value_dim, generator=generator).to(tables.device) for _ in range(NUM_INPUTS)
    ]
    unpaged = paged.rows[arena_ids(paged, torch.arange(spec.num_slots)).to(tables.device)]

    def torch_topk(i: int) -> tuple[Tensor, Tensor]:
        found = (queries[i] @ unpaged.T).topk(k)
        return found.values, found.indices

    contenders = [
        Contender(OWN, lambda i: kernels.flat_topk(queries[i], paged, k, spec.num_slots)),
        Contender(
            OWN_ANY_ORDER, lambda i: kernels.flat_topk(queries[i], paged, k, spec.num_slots, deterministic=False)
        ),
        Contender(TORCH_TOPK, torch_topk),
    ]
    if tables.device.type == "cpu" and peers.installed("faiss"):
        index = peers.faiss_index(unpaged)

        def faiss_topk(i: int) -> tuple[Tensor, Tensor]:
            scores, ids = index.search(queries[i].numpy(), k)
            return torch.from_numpy(scores), torch.from_numpy(ids)

        contenders.append(Contender(FAISS, faiss_topk))

    def check() -> list[Check]:
        chosen = torch.tensor(sampled(_SAMPLED_QUERIES, num_queries, tables.seed))
        scores = queries[0].cpu()[chosen].double() @ unpaged.cpu().double().T
        expected = scores.topk(k).values
        return _checked_winners(contenders, chosen, expected, lambda ids: scores.gather(1, ids))

    return Prepared(
        contenders,
        NUM_INPUTS,
        check,
        num_bytes=tensors_bytes([queries[0]]) + spec.num_bytes + num_queries * k * (4 + 8),
        num_flops=2 * num_queries * spec.num_slots * spec.value_dim,
    )


def _product_inputs(
    tables: Tables, num_keys: int, half_dim: int, num_queries: int, heads: int
) -> tuple[Tensor, list[Tensor]]:
    generator = torch.Generator().manual_seed(tables.seed)
    keys = torch.randn(heads, 2, num_keys, half_dim, generator=generator).to(tables.device)
    queries = [
        torch.randn(num_queries, heads, 2 * half_dim, generator=generator).to(tables.device) for _ in range(NUM_INPUTS)
    ]
    return keys, queries


def _torch_product_topk(queries: Tensor, keys: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """As the papers' code does it: a product and a top-k for each half, then the top-k of the k x k sums."""
    half_dim, num_keys = keys.shape[3], keys.shape[2]
    scores, index = [], []
    for half in range(2):
        part = queries[:, :, half * half_dim : (half + 1) * half_dim].transpose(0, 1)
        best = (part @ keys[:, half].transpose(1, 2)).topk(k)
        scores.append(best.values)
        index.append(best.indices)
    sums = (scores[0][..., :, None] + scores[1][..., None, :]).flatten(2)
    ids = (index[0][..., :, None] * num_keys + index[1][..., None, :]).flatten(2)
    best = sums.topk(k)
    return best.values.transpose(0, 1), ids.gather(2, best.indices).transpose(0, 1)


def _checked_winners(
    contenders: list[Contender], chosen: Tensor, expected: Tensor, scored: Callable[[Tensor], Tensor]
) -> list[Check]:
    """Check the winners' scores rank by rank, and that each winner's id has that score and comes once.

    Which ids win is not compared: of scores that differ by less than float32's rounding, any may.
    """
    checks = []
    for contender in contenders:
        contender.before(0)
        found: object = contender.run(0)
        assert isinstance(found, tuple)
        scores, ids = found[0].cpu()[chosen], found[1].cpu()[chosen]
        ordered = ids.sort(dim=-1).values
        repeated = bool((ordered[..., 1:] == ordered[..., :-1]).any())
        check = Check.of(contender.name, [scores, scored(ids)], [expected, expected], FLOAT32_TOLERANCE)
        checks.append(Check(contender.name, torch.inf, FLOAT32_TOLERANCE) if repeated else check)
    return checks


class _DenseScores:
    """torch's own way: all half scores, the chosen ones gathered, and autograd back through the product."""

    def __init__(
        self, keys: Tensor, queries: list[Tensor], chosen: Sequence[tuple[Tensor, ...]], grads: Tensor
    ) -> None:
        self._keys = keys.clone().requires_grad_()
        self._queries = [one.clone().requires_grad_() for one in queries]
        self._chosen, self._grads = chosen, grads
        self._scores: Tensor | None = None

    def forward(self, i: int) -> None:
        half_dim = self._keys.shape[3]
        parts = []
        for half, index in enumerate(self._chosen[i]):
            query = self._queries[i][:, :, half * half_dim : (half + 1) * half_dim].transpose(0, 1)
            dense = query @ self._keys[:, half].transpose(1, 2)
            parts.append(dense.gather(2, index.transpose(0, 1)))
        self._scores = parts[0] + parts[1]

    def backward(self, i: int) -> tuple[Tensor, ...]:
        assert self._scores is not None, "forward comes first"
        return torch.autograd.grad(
            self._scores, (self._queries[i], self._keys), self._grads.transpose(0, 1).contiguous()
        )


def _expected_gradient(
    queries: Tensor, keys: Tensor, chosen: tuple[Tensor, ...], grads: Tensor, picked: Tensor, half_keys: Tensor
) -> list[Tensor]:
    """Float64 gradients of some queries [P, H, D] and of some half-keys [H, 2, Q, D // 2]."""
    half_dim, heads = keys.shape[3], keys.shape[0]
    indices = [index.cpu() for index in chosen]
    of_queries = torch.zeros(picked.numel(), heads, 2 * half_dim, dtype=torch.float64)
    of_keys = torch.zeros(heads, 2, half_keys.numel(), half_dim, dtype=torch.float64)
    for half, index in enumerate(indices):
        columns = slice(half * half_dim, (half + 1) * half_dim)
        for head in range(heads):
            rows = keys[head, half].double()[index[picked, head]]
            of_queries[:, head, columns] = (grads[picked, head].double()[..., None] * rows).sum(1)
            for place, half_key in enumerate(half_keys.tolist()):
                query, rank = (index[:, head] == half_key).nonzero(as_tuple=True)
                factors = grads[query, head, rank].double()
                of_keys[head, half, place] = factors @ queries[query, head, columns].double()
    return [of_queries, of_keys]
