"""MultiModalMemory: one memory that images, sounds, texts and others look up in, each other's slots too.

Shape legend: H heads, K top-k, D key dim, P parts of a query ("ways"), V value dim.
"""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mempool.client import Table
from mempool.errors import InvalidRequest
from mempool.nn.choice import MemoryLookup, Scores
from mempool.nn.keys.options import key_options
from mempool.nn.keys.queries import QueryNorm, query_part
from mempool.nn.layer import MemoryLayer
from mempool.nn.modalities.fusion import Fuse, Fusion
from mempool.nn.modalities.ranges import count, visible_ranges
from mempool.nn.modalities.views import Codebooks, MemoryView
from mempool.nn.parts import Gate, Out, gate_part, out_part, projected
from mempool.nn.sizes import checked_int, checked_std, checked_table, checked_topk


class MultiModalMemory(nn.Module):
    """Memory layers of several modalities, whose queries are of one space, so that each can look into the others'.

    ``lookup(x, modality="image", from_="text")``: with m the modality of x, t the one whose slots are looked up (m's
    own unless it is said), and q_hp part p of head h of ``queries[m](x)``::

        s_h(i)  = sum over p of <q_hp, K_t[h, p, i_p]> + o_t[h, p, i_p]      slot i of the half-keys i_1, i_2, ...
        I_h     = top-k of the slots that t sees, by s_h                     (score descending, id ascending)
        bag     = sum over h, i in I_h of softmax(s_h[I_h])_i * V_t[i]
        y       = out(silu(gates[m](x)) * bag)               gate="silu"; gate="none": out(bag), or bag

    ``table={"image": table, ...}``: each modality has half-keys K_t and values V_t of its own, and no offsets o_t.

    ``table=table``: all share K and V, but for the offsets o_t, a trained number per half-key, and the slots of
    ``reserved``: modality t sees its own and those that nobody reserved, exactly: others are not scored, not chosen and
    not trained by it. An offset, as one more column of the keys that every query meets with 1, makes a modality prefer
    some slots whatever it asks. (A vector added to all half-keys alike would add one number to every slot's score,
    which changes neither the choice nor the softmax.)

    ``forward`` looks up each modality's input in its own slots and fuses what comes (``Fusion``).

    The views are ``MemoryLayer``s, and behave as these do: frozen by their ``values``, zeroed, copied and saved without
    what is in the pool, found by ``PoolOptimizer(model)``, read at a version within ``mempool.nn.reading``. Shared
    half-keys are the memory's own (``keys``): freezing one view leaves them. Modules in ``queries`` and ``gates`` may
    be replaced by others of the same widths.

    Attributes:
        modalities: Name to width of the input.
        queries: ``ModuleDict`` by modality of Linear(width, heads * key_dim), or ``NormedQuery`` (query_norm="batch" or
            "layer").
        views: ``ModuleDict`` by modality of the layers that look up: queries [..., heads * key_dim] -> bags [..., V].
        keys: ``Codebooks`` with ``half_keys`` [heads, ways, n, key_dim / ways] that all share; None with a table each.
        gates: ``ModuleDict`` by modality of Linear(width, V); None with gate="none".
        out: Linear(V, out_dim), one for all; None where nothing needs projecting.
        fusion: ``Fusion``.

    Args:
        modalities: Name to width, at least one. Names are Python identifiers.
        table: One for all, or one per modality, which then are of one width.
        reserved: Of one table: by modality the slots that are its own, as ``range(first, end)``. Ranges that begin and
            end at multiples of n (the codebook's size) are cheapest: each stretch of slots costs a search of its own.
        offsets: Of one table: give each modality trained offsets.
        fuse: "sum", "concat" or "gate".
        partial: ``forward`` takes some of the modalities, too: sums of those, or a softmax over those. Not with
            "concat", which has a place for each.
        heads: Queries per input, each with keys of its own.
        topk: Slots per head, at most as many as the modality sees that sees the fewest.
        key_dim: Width of a query; a multiple of ways. None: 128, or the next.
        ways: Parts of a query, each with a codebook.
        query_bias: Give queries' linear layers a bias.
        gate: "silu" or "none".
        out: "auto", "linear" or "none", as of ``MemoryLayer``.
        out_dim: Width of the output; V if None.
        scores, qk_norm, query_norm, query_dropout, key_init_std, deterministic, device, dtype: As of ``MemoryLayer``;
            qk_norm leaves offsets as they are.

    Raises:
        InvalidRequest: An argument makes no sense, does not fit the table or another one; the message says which.

    Example:
        >>> memory = mempool.nn.MultiModalMemory({"image": 64, "text": 300}, table=table, out_dim=128)
        >>> y = memory({"image": torch.randn(8, 64), "text": torch.randn(8, 300)})   # [8, 128]
        >>> memory.lookup(torch.randn(8, 64), modality="image", from_="text")         # [8, 128]
    """

    keys: Codebooks | None
    gates: nn.ModuleDict | None
    out: nn.Module | None

    def __init__(
        self,
        modalities: Mapping[str, int],
        *,
        table: Table | Mapping[str, Table],
        reserved: Mapping[str, range] | None = None,
        offsets: bool = True,
        fuse: Fuse = "sum",
        partial: bool = False,
        heads: int = 4,
        topk: int = 32,
        key_dim: int | None = None,
        ways: int = 2,
        query_bias: bool = True,
        gate: Gate = "silu",
        out: Out = "auto",
        out_dim: int | None = None,
        scores: Scores = "softmax",
        qk_norm: bool = False,
        query_norm: bool | QueryNorm = False,
        query_dropout: float = 0.0,
        key_init_std: float | None = None,
        deterministic: bool = True,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.modalities = _checked_modalities(modalities)
        tables = _checked_tables(table, self.modalities)
        first = next(iter(tables.values()))
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        keys = key_options(
            first, "product", heads=heads, key_dim=key_dim, ways=ways, score="sum", rank=None, groups=None, probes=None
        )
        self.heads, self.key_dim, self.ways = keys.heads, keys.key_dim, keys.ways
        self.out_dim = first.value_dim if out_dim is None else checked_int("out_dim", out_dim)
        self.partial = partial
        if partial and fuse == "concat":
            raise InvalidRequest('fuse="concat" has a place for each modality: with partial=True use "sum" or "gate"')
        std = 1.0 / math.sqrt(self.key_dim) if key_init_std is None else checked_std("key_init_std", key_init_std)
        self.key_init_std = std
        of_views: dict[str, Any] = {
            "scores": scores,
            "qk_norm": qk_norm,
            "query_norm": query_norm not in ("batch", "layer") and query_norm,
            "query_dropout": query_dropout,
            "deterministic": deterministic,
        }
        width = self.heads * self.key_dim
        views: dict[str, MemoryLayer]
        if isinstance(table, Table):
            self.keys = Codebooks(keys.shape, qk_norm=qk_norm, made=made)
            views = {}
            for name, ranges in visible_ranges(list(self.modalities), table.num_slots, reserved).items():
                _check_seen(name, checked_topk(topk, num_slots=table.num_slots), count(ranges))
                views[name] = MemoryView(
                    table, self.keys, ranges, topk=topk, with_offsets=offsets, made=made, **of_views
                )
        else:
            if reserved is not None:
                raise InvalidRequest("reserved is of one table that all share: with a table per modality leave it out")
            self.keys = None
            of_layers = dict(of_views, heads=self.heads, key_dim=self.key_dim, ways=self.ways, gate="none", out="none")
            of_layers.update(out_dim=first.value_dim, topk=topk, key_init_std=std, **made)
            views = {
                name: MemoryLayer(width, table=each, query=nn.Identity(), **of_layers) for name, each in tables.items()
            }
        self.views = nn.ModuleDict(views)
        self.queries = nn.ModuleDict(
            {
                name: query_part(
                    None, query_norm, dim, heads=self.heads, key_dim=self.key_dim, bias=query_bias, made=made
                )
                for name, dim in self.modalities.items()
            }
        )
        if gate not in ("silu", "none"):
            raise InvalidRequest(f'gate must be "silu" or "none", got {gate!r}; modules in gates may be replaced')
        parts = {name: gate_part(gate, dim, first.value_dim, made) for name, dim in self.modalities.items()}
        gates = {name: part for name, part in parts.items() if part is not None}
        self.gates = nn.ModuleDict(gates) if gates else None
        self.out = out_part(out, first.value_dim, self.out_dim, made, gated=self.gates is not None)
        self.fusion = Fusion(fuse, self.modalities, self.out_dim, made)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw new keys, and offsets of zero; linear layers have their own ``reset_parameters``, tables stay."""
        if self.keys is not None:
            self.keys.draw(self.key_init_std)
        for view in self.views.values():
            assert isinstance(view, MemoryLayer)
            view.reset_parameters()

    def lookup(
        self, x: Tensor, *, modality: str, from_: str | None = None, return_lookup: bool = False
    ) -> Tensor | tuple[Tensor, MemoryLookup]:
        """What inputs of one modality find, in its own slots or in those that another one sees.

        Args:
            x: [..., width of the modality], any leading shape, floating point.
            modality: Whose input it is.
            from_: In whose slots, by whose keys it is looked up. None: its own.
            return_lookup: Answer what was looked up, too.

        Returns:
            [..., out_dim]; and, with return_lookup, the ids, scores and weights [..., heads, topk], of which scores and
            weights are differentiable.

        Raises:
            InvalidRequest: An unknown modality, or another width than the modality's.
            MempoolError: What the table's gather raises.
        """
        self._check(x, modality)
        view = self.views[modality if from_ is None else self._known(from_, "from_")]
        bag, found = view(self.queries[modality](x), return_lookup=True)
        gate = None if self.gates is None else F.silu(self.gates[modality](x))
        y = projected(x, bag, gate, self.out)
        return (y, found) if return_lookup else y

    def forward(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """Look up the inputs of all modalities, each in its own slots, and fuse what they find.

        Args:
            inputs: By modality [..., width], of one leading shape.

        Returns:
            [..., out_dim].

        Raises:
            InvalidRequest: A modality is missing (without ``partial``) or unknown, an input of another width than its
                modality's, or of another leading shape than the others.
            MempoolError: What a table's gather raises.
        """
        for name, x in inputs.items():
            self._check(x, name)
        given = {name: inputs[name] for name in self.modalities if name in inputs}
        missing = [name for name in self.modalities if name not in given]
        if missing and not (given and self.partial):
            raise InvalidRequest(
                f"there is no input of modality {missing[0]!r}: give all of {', '.join(self.modalities)}; a memory made"
                " with partial=True takes some, at least one"
            )
        shapes = {name: list(x.shape[:-1]) for name, x in given.items()}
        if len({tuple(shape) for shape in shapes.values()}) > 1:
            raise InvalidRequest(f"inputs are fused one by one, and their leading shapes differ: {shapes}")
        outputs = {name: self.lookup(x, modality=name) for name, x in given.items()}
        fused: Tensor = self.fusion(given, outputs)
        return fused

    def _known(self, name: object, what: str) -> Any:
        if name not in self.modalities:
            raise InvalidRequest(f"{what} = {name!r}: this memory has {', '.join(self.modalities)}")
        return name

    def _check(self, x: Tensor, modality: object) -> None:
        width = self.modalities[self._known(modality, "modality")]
        if x.dim() == 0 or x.shape[-1] != width:
            raise InvalidRequest(f"modality {modality!r} takes [..., {width}], got {list(x.shape)}")

    def extra_repr(self) -> str:
        return f"heads={self.heads}, key_dim={self.key_dim}, out_dim={self.out_dim}" + (
            ", partial=True" if self.partial else ""
        )


def _checked_modalities(modalities: object) -> dict[str, int]:
    if not isinstance(modalities, Mapping) or not modalities:
        raise InvalidRequest(
            f'modalities are a dict of name to width, as {{"image": 64, "text": 300}}, got {modalities!r}'
        )
    taken = nn.ModuleDict()
    for name in modalities:
        if not isinstance(name, str) or not name.isidentifier() or hasattr(taken, name):
            raise InvalidRequest(
                f"modality {name!r} cannot be the name of a part of a module of torch's: give an identifier of Python's"
                " that is no attribute of a ModuleDict"
            )
    return {name: checked_int(f"the width of modality {name!r}", width) for name, width in modalities.items()}


def _checked_tables(table: object, modalities: Mapping[str, int]) -> dict[str, Table]:
    """By modality, in the order of these."""
    if not isinstance(table, Mapping):
        return dict.fromkeys(modalities, checked_table(table))
    if wrong := [name for name in [*modalities, *table] if name not in modalities or name not in table]:
        raise InvalidRequest(
            f"tables are of {', '.join(map(str, table)) or 'none'}, and modalities are {', '.join(modalities)}: give"
            f" both of {wrong[0]!r}, or neither"
        )
    tables = {name: checked_table(table[name]) for name in modalities}
    widths = {name: each.value_dim for name, each in tables.items()}
    if len(set(widths.values())) > 1:
        raise InvalidRequest(
            f"the tables' value_dim are {widths}: what modalities find in each other's has to be of one width"
        )
    return tables


def _check_seen(name: str, topk: int, num_seen: int) -> None:
    if topk > num_seen:
        raise InvalidRequest(
            f"topk = {topk}, and modality {name!r} sees {num_seen:_} slots, its own and those that nobody reserved:"
            " give a smaller topk, or more slots"
        )
