"""MemoryLayer: a feed-forward layer's replacement that looks its answer up in a table of the pool.

Queries, keys, gate and output projection are ordinary parameters of the model; the values belong to the table, which
fetches their weighted sums and takes their gradients (``Table.gather``).

Shape legend: B bags (tokens), H heads, K top-k, D key dim, N half-keys of a codebook (slots = N * N), V value dim.
"""

import copy
import math
from typing import Any, Literal, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mempool.client import Table
from mempool.client.untraced import untraced
from mempool.errors import InvalidRequest
from mempool.nn.scoring import product_topk, unit_rms

Gate = Literal["silu", "none"]


class MemoryLayer(nn.Module):
    """Memory+ of "Memory Layers at Scale" (arXiv 2412.09764, section 2): product keys here, values in the pool.

    For every token x and head h, with q_h the h-th part of ``query(x)`` and q_h1, q_h2 its halves::

        s_h(i1, i2) = <q_h1, keys[h, 0, i1]> + <q_h2, keys[h, 1, i2]>
        I_h         = top-k slots i1 * n + i2 by s_h         (score descending, id ascending)
        bag         = sum over h, i in I_h of softmax(s_h[I_h])_i * V[i]
        y           = out(silu(gate(x)) * bag)               gate="silu": Memory+
        y           = bag, or out(bag) where V != dim        gate="none": the plain memory layer

    One table of values V is shared by all heads, and by every other layer made with it.

    The life of a call: [TRAINER] queries, scores, top-k, softmax -> [SHARD] weighted sums of values -> [TRAINER] gate,
    output projection. The backward sends d bag to the shards, which answer the gradient of the weights and hold that of
    the values until ``PoolOptimizer.step``. In eval mode and under no_grad shards are not asked to remember the lookup.

    Scores and softmax are float32, also under autocast and in a bfloat16 model; the linear layers follow autocast.
    Under ``torch.compile`` scoring and the lookup run outside the graph, the linear layers inside.

    ``state_dict`` holds the parameters below and nothing of the table: its values live in the pool.
    A deep copy shares the table. Pickling a layer is refused: a table is a connection, not data.

    Attributes:
        query: Linear(dim, heads * key_dim).
        keys: Parameter [heads, 2, n, key_dim / 2], n * n = slots of the table.
        gate: Linear(dim, value_dim); None with gate="none".
        out: Linear(value_dim, dim); None with gate="none" and value_dim == dim, where nothing needs projecting.
        table: The table, shared by reference.

    Args:
        dim: Width of the input and of the output.
        table: A table whose number of slots is a square.
        heads: Queries per token, each with keys of its own.
        topk: Slots per head, at most all of them.
        key_dim: Width of a query; even.
        gate: "silu" for Memory+, "none" for the plain memory layer.
        qk_norm: Normalise each half of a query and every half-key to a root mean square of 1, and divide the scores by
            sqrt(key_dim), as attention with qk-norm does: bounds the scores by sqrt(key_dim), for stable training.
        query_norm: Normalise each whole query to a root mean square of 1 (no learned gain: keys can learn it).
        key_init_std: Keys start as N(0, key_init_std^2); 1 / sqrt(key_dim) if None.
        deterministic: Sum scores in a fixed order, so that a query finds the same slots alone and in any batch. Costs
            nothing on a CPU; False lets a GPU use its tensor cores.
        device: Where the parameters are made.
        dtype: Type of the parameters.

    Raises:
        InvalidRequest: The table's slots are no square, or a size makes no sense; the message says which.

    Example:
        >>> layer = mempool.nn.MemoryLayer(512, table=table, heads=4, topk=32)
        >>> y = layer(torch.randn(8, 128, 512))   # [8, 128, 512]
    """

    gate: nn.Linear | None
    out: nn.Linear | None

    def __init__(
        self,
        dim: int,
        *,
        table: Table,
        heads: int = 4,
        topk: int = 32,
        key_dim: int = 128,
        gate: Gate = "silu",
        qk_norm: bool = False,
        query_norm: bool = False,
        key_init_std: float | None = None,
        deterministic: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        schema = table.schema
        _check_sizes(dim=dim, heads=heads, topk=topk, key_dim=key_dim, gate=gate, num_slots=schema.num_slots)
        self.dim = dim
        self.heads = heads
        self.topk = topk
        self.key_dim = key_dim
        self.qk_norm = qk_norm
        self.query_norm = query_norm
        self.key_init_std = 1.0 / math.sqrt(key_dim) if key_init_std is None else key_init_std
        self.deterministic = deterministic
        self.table = table
        self.codebook_size = _codebook_size(schema.name, schema.num_slots)
        self.query = nn.Linear(dim, heads * key_dim, device=device, dtype=dtype)
        self.keys = nn.Parameter(torch.empty(heads, 2, self.codebook_size, key_dim // 2, device=device, dtype=dtype))
        self.gate = nn.Linear(dim, schema.value_dim, device=device, dtype=dtype) if gate == "silu" else None
        needs_out = gate == "silu" or schema.value_dim != dim
        self.out = nn.Linear(schema.value_dim, dim, device=device, dtype=dtype) if needs_out else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new keys. The linear layers have a ``reset_parameters`` of their own; the table is not touched."""
        nn.init.normal_(self.keys, std=self.key_init_std)

    def forward(self, x: Tensor) -> Tensor:
        """Look up every token of ``x``.

        Args:
            x: [..., dim], any leading shape, floating point.

        Returns:
            [..., dim].

        Raises:
            InvalidRequest: The last dimension of ``x`` is not ``dim``.
            MempoolError: What the table's gather raises.
        """
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise InvalidRequest(f"this layer takes [..., {self.dim}], got {list(x.shape)}")
        bag = self._lookup(self.scoring_queries(x)).view(*x.shape[:-1], self.table.schema.value_dim)
        if self.gate is not None:
            bag = F.silu(self.gate(x)) * bag
        if self.out is None:
            return bag.to(x.dtype)
        return self.out(bag.to(self.out.weight.dtype))  # type: ignore[no-any-return]

    def scoring_queries(self, x: Tensor) -> Tensor:
        """The queries as they are scored, norms and scale included.

        ``table.lookup(layer.scoring_queries(x), topk=layer.topk)`` on a table that was given ``layer.scoring_keys()``
        (``Table.write_keys``) finds what this layer finds.

        Args:
            x: [..., dim].

        Returns:
            [..., heads, key_dim] float32.
        """
        queries: Tensor = self.query(x).float().reshape(*x.shape[:-1], self.heads, self.key_dim)
        if self.qk_norm:
            halves = [unit_rms(half) for half in queries.chunk(2, dim=-1)]
            return torch.cat(halves, dim=-1) / math.sqrt(self.key_dim)
        return unit_rms(queries) if self.query_norm else queries

    def scoring_keys(self) -> Tensor:
        """The keys as they are scored: [heads, 2, n, key_dim / 2] float32, normalised with qk_norm."""
        keys = self.keys.float()
        return unit_rms(keys) if self.qk_norm else keys

    @untraced
    def _lookup(self, queries: Tensor) -> Tensor:
        """[..., heads, key_dim] float32 -> bags [B, value_dim] float32."""
        queries_BHD = queries.reshape(-1, self.heads, self.key_dim)
        with torch.autocast(queries.device.type, enabled=False):
            scores_BHK, ids_BHK = product_topk(
                queries_BHD,
                self.scoring_keys(),
                topk=self.topk,
                stride=self.table.schema.stride,
                deterministic=self.deterministic,
            )
            weights_BHK = torch.softmax(scores_BHK, dim=-1)
            return self.table.gather(ids_BHK.flatten(1), weights_BHK.flatten(1), remember=self.training)

    def extra_repr(self) -> str:
        norms = "".join(f", {name}=True" for name in ("qk_norm", "query_norm") if getattr(self, name))
        schema = self.table.schema
        return (
            f"dim={self.dim}, table={schema.name!r} ({schema.num_slots} slots x {schema.value_dim}),"
            f" heads={self.heads}, topk={self.topk}, key_dim={self.key_dim}{norms}"
        )

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        memo[id(self.table)] = self.table
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        clone.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return clone

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"a MemoryLayer cannot be pickled: its table {self.table.schema.name!r} is a connection to a pool."
            " Save layer.state_dict(), and build the layer again with a table of the process that loads it"
        )


def _check_sizes(*, dim: int, heads: int, topk: int, key_dim: int, gate: str, num_slots: int) -> None:
    if dim < 1 or heads < 1:
        raise InvalidRequest(f"dim and heads must be at least 1, got dim={dim}, heads={heads}")
    if key_dim < 2 or key_dim % 2:
        raise InvalidRequest(f"key_dim must be even and at least 2 (two halves), got {key_dim}")
    if not 1 <= topk <= num_slots:
        raise InvalidRequest(f"topk must be from 1 to the table's {num_slots} slots, got {topk}")
    if gate not in ("silu", "none"):
        raise InvalidRequest(f'gate must be "silu" or "none", got {gate!r}')


def _codebook_size(name: str, num_slots: int) -> int:
    size = math.isqrt(num_slots)
    if size * size != num_slots:
        raise InvalidRequest(
            f"table {name!r} has {num_slots:_} slots, which is not a square; product keys need n * n."
            f" Nearest: {size**2:_} ({size}^2) or {(size + 1) ** 2:_} ({size + 1}^2)"
        )
    return size
