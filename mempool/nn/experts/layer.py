"""PEERLayer: a feed-forward layer of a million experts, each one row of a table of the pool.

Shape legend: B tokens, H heads, K top-k, I width of the input.
"""

from typing import Literal, NoReturn

import torch
from torch import Tensor
from torch.nn import functional as F

from mempool.client import Table
from mempool.client.experts.autograd import expert_sums
from mempool.errors import InvalidRequest
from mempool.nn.choice import MemoryLookup, Scores
from mempool.nn.layer import MemoryLayer
from mempool.nn.sizes import checked_int, checked_table
from mempool.types.bags import ACTS


class PEERLayer(MemoryLayer):
    """Parameter efficient expert retrieval of "Mixture of A Million Experts" (arXiv 2407.04153): product keys here,
    experts in the pool.

    For every token x and head h, scores s_h and slots I_h as ``MemoryLayer`` has them, from a query that is
    normalised::

        y = sum over h, i in I_h of g_h,i * act(<u_i, x>) * v_i      g_h = softmax(s_h[I_h]), or relu(s_h[I_h])

    Expert i is row [u_i, v_i] of the table: the first ``dim`` columns are u_i, the others v_i. It is computed where it
    lies: x goes to the shards, no row comes back. The backward sends x and d y, is answered the gradients of x and g,
    and shards hold what trains u and v until ``PoolOptimizer.step``, by the table's own optimizer. All gradients are of
    the rows as they are when the backward pass comes.

    It is a ``MemoryLayer`` in all else: how it freezes, zeroes, copies and saves, what its ``half_keys``, ``values``,
    ``keep_lookup`` and ``last_lookup`` are. A graph break under ``torch.compile``; no ``start``.

    Attributes:
        query: ``NormedQuery(dim, heads * key_dim)``; a Linear with query_norm="none".
        act: What an expert does to its product.

    Args:
        dim: Width of the input.
        table: A table of dim + out_dim columns (``value_dim``) with ``layout="rows"``, so that each expert is whole on
            one shard, and a square of slots.
        heads: Queries per token, each with keys of its own.
        topk: Experts per head, at most all of them.
        key_dim: Width of a query; even.
        act: "gelu" (the exact one), "relu" or "silu".
        scores: What makes gates of the scores of the chosen experts: "softmax", "relu", by which experts do not
            compete, or a function as of ``MemoryLayer``.
        query_norm: "batch": each component over all tokens, as in the paper; "layer": each head's query by itself; or
            "none".
        query_bias: Give the queries' linear layer a bias.
        qk_norm, input_dropout, query_dropout, value_dropout, key_init_std, deterministic, device, dtype: As of
            ``MemoryLayer``; value_dropout is of the output.

    Raises:
        InvalidRequest: The table has no columns for v, another layout, or slots that are no square, or an argument
            makes no sense; the message says which.

    Example:
        >>> config = mempool.TableConfig(name="experts", num_slots=512**2, value_dim=1024, layout="rows")
        >>> layer = mempool.nn.PEERLayer(512, table=pool.create_table(config))
        >>> y = layer(torch.randn(8, 128, 512))   # [8, 128, 512]
    """

    def __init__(
        self,
        dim: int,
        *,
        table: Table,
        heads: int = 8,
        topk: int = 16,
        key_dim: int = 128,
        act: Literal["gelu", "relu", "silu"] = "gelu",
        scores: Scores = "softmax",
        query_norm: Literal["batch", "layer", "none"] = "batch",
        query_bias: bool = True,
        sink: bool = False,
        qk_norm: bool = False,
        key_dropout: float = 0.0,
        sample_from: int | None = None,
        random_slots: int = 0,
        input_dropout: float = 0.0,
        query_dropout: float = 0.0,
        value_dropout: float = 0.0,
        key_init_std: float | None = None,
        deterministic: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        out_dim = _checked_out_dim(table, checked_int("dim", dim))
        if act not in ACTS:
            raise InvalidRequest(f"act must be one of {', '.join(ACTS)}, got {act!r}")
        if query_norm not in ("batch", "layer", "none"):
            raise InvalidRequest(f'query_norm must be "batch", "layer" or "none", got {query_norm!r}')
        super().__init__(
            dim,
            table=table,
            heads=heads,
            topk=topk,
            key_dim=key_dim,
            query_norm=query_norm != "none" and query_norm,
            query_bias=query_bias,
            gate="none",
            out="none",
            out_dim=table.value_dim,
            scores=scores,
            sink=sink,
            qk_norm=qk_norm,
            key_dropout=key_dropout,
            sample_from=sample_from,
            random_slots=random_slots,
            input_dropout=input_dropout,
            query_dropout=query_dropout,
            value_dropout=value_dropout,
            key_init_std=key_init_std,
            deterministic=deterministic,
            device=device,
            dtype=dtype,
        )
        self.act = act
        self.out_dim = out_dim

    def forward(self, x: Tensor, *, return_lookup: bool = False) -> Tensor | tuple[Tensor, MemoryLookup]:
        """What the chosen experts of every token of ``x`` answer.

        Args:
            x: [..., dim], any leading shape, floating point.
            return_lookup: Answer what was chosen, too.

        Returns:
            [..., out_dim] in the dtype of x; and, with return_lookup, the ids, scores and gates [..., heads, topk], of
            which scores and gates are differentiable.

        Raises:
            InvalidRequest: The last dimension of ``x`` is not ``dim``.
            MempoolError: What a gather of the table raises.
        """
        x = self._checked(x)
        queries = self.scoring_queries(x)
        with torch.autocast(queries.device.type, enabled=False):
            ids_BHK, scores_BHK, gates_BHK = self._chosen(queries)
            sums = expert_sums(
                self._link,
                x.reshape(-1, self.dim),
                ids_BHK.flatten(1),
                gates_BHK.flatten(1),
                act=self.act,
                anchor=self.values,
                trained=self.values.requires_grad and self.table.requires_grad,
                remember=self.training,
            )
        y = sums.view(*x.shape[:-1], self.out_dim).to(x.dtype)
        if self.value_dropout:
            y = F.dropout(y, self.value_dropout, self.training)
        lookup = self._shaped(queries, ids_BHK, scores_BHK, gates_BHK)
        self._keep(lookup)
        return (y, lookup) if return_lookup else y

    def start(self, x: Tensor) -> NoReturn:  # noqa: ARG002
        """Raises InvalidRequest: experts are asked and awaited in one call."""
        raise InvalidRequest(f"experts of table {self.table.name!r} are asked and awaited in one call: call the layer")

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, act={self.act!r}, out_dim={self.out_dim}"


def _checked_out_dim(table: Table, dim: int) -> int:
    """Columns of v; raises InvalidRequest for a table whose rows are no experts of ``dim`` inputs."""
    schema = checked_table(table).schema
    if schema.value_dim <= dim:
        raise InvalidRequest(
            f"table {schema.name!r} has value_dim = {schema.value_dim}, and experts of {dim} inputs need dim + out_dim "
            "columns, u and v side by side: make it with value_dim = dim + out_dim"
        )
    if schema.layout != "rows":
        raise InvalidRequest(
            f"table {schema.name!r} is laid out by {schema.layout!r}, which may cut an expert in two: make it with "
            'layout="rows"'
        )
    return schema.value_dim - dim
