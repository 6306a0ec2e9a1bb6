"""MemoryLayer: a feed-forward layer's replacement that looks its answer up in a table of the pool.

Queries, keys, gate and output projection are ordinary parameters of the model; the values belong to the table, which
fetches their weighted sums and takes their gradients (``mempool.client``). Scores to weights: ``choice``.

Shape legend: B bags (tokens), H heads, K top-k, D key dim, V value dim.
"""

import copy
import math
from typing import Any, NoReturn, Self

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mempool.client import Table
from mempool.client.gathers.autograd import gather, refuse_export
from mempool.client.gathers.pending import begin
from mempool.errors import InvalidRequest
from mempool.nn.choice import MemoryLookup, Scores, checked_scores
from mempool.nn.copies import CopyCaution, VersionWhenCopied, copied_version
from mempool.nn.keys.finding import FindsSlots
from mempool.nn.keys.options import Keys, Score, key_options
from mempool.nn.keys.queries import QueryNorm, query_part
from mempool.nn.parts import Gate, Out, gate_part, out_part, projected
from mempool.nn.pending import PendingMemory
from mempool.nn.sizes import checked_dropout, checked_int, checked_std, checked_table, checked_topk
from mempool.nn.stable.exploring import checked_exploring
from mempool.nn.values import LayerLink, follows, key_link, values_parameter

_VERSION = "table_version"
_STAND_INS = ("values", "pool_keys")
"""Parameters that stand for what is in the pool: no part of a state."""
_OF_THIS_ONE = ("_link", "_key_link", "_copied", "last_lookup")
"""What a copy has of its own."""

Output = Tensor | PendingMemory


class MemoryLayer(FindsSlots):
    """Memory+ of "Memory Layers at Scale" (arXiv 2412.09764, section 2): product keys here, values in the pool.

    For every token x and head h, with q_h the h-th part of ``query(x)`` and q_h1, q_h2 its halves::

        s_h(i1, i2) = <q_h1, half_keys[h, 0, i1]> + <q_h2, half_keys[h, 1, i2]>
        I_h         = top-k slots i1 * n + i2 by s_h         (score descending, id ascending)
        bag         = sum over h, i in I_h of softmax(s_h[I_h])_i * V[i]
        y           = out(silu(gate(x)) * bag)               gate="silu": Memory+
        y           = bag, or out(bag) where V != out_dim    gate="none": the plain memory layer
        y           = sigmoid(gating(x)) * y                 mem_gated=True

    In training ``key_dropout``, ``sample_from`` and ``random_slots`` choose other slots than the best; weights are
    always the softmax of the true scores of those that were chosen.

    One table of values V is shared by all heads, and by every other layer made with it.

    The life of a call: [TRAINER] queries, scores, top-k, softmax -> [SHARD] weighted sums of values -> [TRAINER] gate,
    output projection. The backward sends d bag to the shards, which answer the gradient of the weights and hold that of
    the values until ``PoolOptimizer.step``. In eval mode and under no_grad shards are not asked to remember the lookup.

    Scores and weights are float32, also under autocast and in a bfloat16 model; ``query``, ``gate`` and ``out`` follow
    autocast. They are modules of any kind: nothing is asked of them but to be called, so they may be replaced (LoRA,
    quantized linears, a Sequential). Under ``torch.compile`` the lookup is an operator of the graph, which does not
    break; ``torch.export`` is refused.

    ``values`` is a parameter of one element that stands for the table's values, so that they are frozen and zeroed as
    torch's are. They are trained through this layer where ``values.requires_grad`` and ``table.requires_grad`` hold:
    ``layer.requires_grad_(False)``, or of a model around it, freezes them for this layer (other layers of the table go
    on), ``model.requires_grad_(False); layer.values.requires_grad_()`` trains nothing else. ``zero_grad()`` of any
    module around it drops what is pending on the table, and so does that of an ordinary optimizer that holds
    ``values`` and did not step since; in one that steps, and in a norm over all parameters, it costs nothing and means
    nothing: clip by ``PoolOptimizer``'s ``max_norm``, or over its parameters. (Under FSDP2, ``zero_grad()``
    drops where ``PoolOptimizer(model)`` was made after ``fully_shard``, and not with ``set_to_none=False``.)

    ``state_dict`` holds the other parameters and nothing of the table: its values live in the pool. What ``torch.save``
    or a deep copy makes of it says at which version this client knew the table then: where the next look-up after
    ``load_state_dict`` meets another one, it warns. States of before ``half_keys`` had that name (``keys``) load. A
    copy, shallow or deep, shares the table: what a teacher or an average of models reads are the live values. Pickling
    is refused: a table is a connection, not data.

    Attributes:
        query: Linear(dim, heads * key_dim).
        half_keys: Parameter [heads, ways, n, key_dim / ways], n the fewest with n ** ways >= slots of the table. Also
            readable as ``keys``. None with keys="pool", and where ``search`` has the keys.
        search: With keys="hierarchical" a ``HierarchicalKeys``, with score="tucker" a ``TuckerKeys``
            (``mempool.nn.keys``), whose parameters the keys are; else None.
        gate: Linear(dim, value_dim); None with gate="none".
        out: Linear(value_dim, out_dim); None where nothing needs projecting.
        gating: Linear(dim, 1) with mem_gated; else None.
        sink: With ``sink`` a Parameter [heads]; else None.
        values: Parameter [1], see above.
        pool_keys: With keys="pool" a Parameter [1] that stands for the keys of the pool as ``values`` does for its
            values; else None.
        table: The table, shared by reference.
        keep_lookup: Set it to have each call's lookup kept, detached, in ``last_lookup``.
        last_lookup: ``MemoryLookup`` or None.
        count_usage: Set it to have this process count which slots each head chose, for ``usage()``, from then on: 8
            bytes a slot and head. A pair counts when its gradient is pushed, also where the step is dropped later. A
            copy of the layer counts for itself, and nothing at first.

    Args:
        dim: Width of the input.
        table: A table. Where its slots are no n ** ways, the last of the products are no slots, and never chosen; that
            takes up to half as long again as products of all.
        keys: "model" or "product": half-keys are parameters of the layer. "pool": the table trains them (made with
            ``ProductKeys(..., optimizer=...)``, ``FlatKeys`` or ``HierarchicalKeys``): the layer sends queries and has
            no keys; the same training by ``PoolOptimizer``. Each call and each backward pass take a round trip more, a
            call with hierarchical keys two. A graph break under ``torch.compile``. "hierarchical": a key a slot, in
            groups with keys too, which all heads share (``mempool.nn.keys.hierarchical``): parameters, and as many as
            flat keys; the search is greedy.
        ways: Parts into which a query is cut, each with a codebook. 3 have far fewer half-keys than 2, and share each
            among far more slots. None: 2, or as the keys in the pool have.
        score: Of product keys of two ways. "tucker": the halves' scores are multiplied through a trained core in place
            of added (UltraMem's TDQKR, ``mempool.nn.keys.tucker``); the search is greedy.
        rank: Of Tucker scores, the core is rank by rank. None: 2.
        groups: Of hierarchical keys. None: so many that scoring them takes about as long as scoring slots.
        probes: How far a greedy search looks: groups that a query picks (None: 8); with Tucker scores half-keys of each
            codebook at either end (None: half of topk). ``recall(x)`` says what it misses.
        heads: Queries per token, each with keys of its own but for hierarchical ones; None: 4, or as the keys in the
            pool have.
        topk: Slots per head, at most all of them.
        key_dim: Width of a query; a multiple of ways (and rank). None: 128 or the next; or as the pool's keys have.
        query: A module from [..., dim] to [..., heads * key_dim], in place of the linear layer.
        query_bias: Give the linear layer ``query`` a bias.
        gate: "silu" for Memory+, "none" for the plain memory layer; or a module from [..., dim] to [..., value_dim] in
            place of the linear layer before the silu.
        out: "auto": a linear layer with a gate, or where value_dim is not out_dim. "linear": always; "none": never; or
            a module from [..., value_dim] to [..., out_dim].
        out_dim: Width of the output; dim if None.
        scores: What makes weights of the scores of the chosen slots: "softmax", "relu", or a function of [B, H, K]
            float32 that answers weights of that shape.
        sink: A trained score of each head in the softmax beside those of its slots, 0 at first, of a slot without a
            value: weights may sum up to less than 1, so that a token need not take what it does not want.
        qk_norm: Normalise each part of a query and every half-key to a root mean square of 1, and divide the scores by
            sqrt(key_dim), as attention with qk-norm does: bounds the scores by sqrt(key_dim), for stable training.
        query_norm: "rms" or True: normalise each whole query to a root mean square of 1 (no learned gain: keys can
            learn it). "batch": each component over all tokens of a call, which spreads queries over slots (arXiv
            1907.05242); "layer": each head's query. Both with a learned gain and bias, in ``query``.
        key_dropout: In training leave each half-key out of a call with this probability, for all of its tokens: others
            get their turn. So many stay in any case that there are enough slots. Of product keys with score="sum".
        sample_from: In training sample ``topk`` of the best so many slots, without replacement, with probabilities in
            the ratio of ``exp(score)`` (Gumbel-top-k). None: take the best.
        random_slots: In training take so many slots besides, at random of all the others, so that each is trained at
            times. Not with keys="pool", as the two above.
        input_dropout: Of x, before everything else.
        query_dropout: Of ``query(x)``.
        value_dropout: Of the output, before ``gating``.
        mem_gated: Multiply the output with the sigmoid of a learned number per token.
        key_init_std: Keys in the model start as N(0, key_init_std^2); 1 / sqrt(key_dim) if None.
        deterministic: Sum scores in a fixed order, so that a query finds the same slots alone and in any batch. Costs
            nothing on a CPU; False lets a GPU use its tensor cores.
        overlap: A call answers ``start(x)``, of which ``result()`` is the output: for a block of yours that computes
            something else in between.
        device: Where the parameters are made.
        dtype: Type of the parameters.

    Raises:
        InvalidRequest: An argument makes no sense, or does not fit the table; the message says which.

    Example:
        >>> layer = mempool.nn.MemoryLayer(512, table=table, heads=4, topk=32)
        >>> y = layer(torch.randn(8, 128, 512))   # [8, 128, 512]
    """

    gate: nn.Module | None
    out: nn.Module | None
    gating: nn.Module | None
    values: nn.Parameter
    half_keys: nn.Parameter | None
    pool_keys: nn.Parameter | None

    def __init__(
        self,
        dim: int,
        *,
        table: Table,
        keys: Keys = "model",
        ways: int | None = None,
        score: Score = "sum",
        rank: int | None = None,
        groups: int | None = None,
        probes: int | None = None,
        heads: int | None = None,
        topk: int = 32,
        key_dim: int | None = None,
        query: nn.Module | None = None,
        query_bias: bool = True,
        gate: Gate | nn.Module = "silu",
        out: Out | nn.Module = "auto",
        out_dim: int | None = None,
        scores: Scores = "softmax",
        sink: bool = False,
        qk_norm: bool = False,
        query_norm: bool | QueryNorm = False,
        key_dropout: float = 0.0,
        sample_from: int | None = None,
        random_slots: int = 0,
        input_dropout: float = 0.0,
        query_dropout: float = 0.0,
        value_dropout: float = 0.0,
        mem_gated: bool = False,
        key_init_std: float | None = None,
        deterministic: bool = True,
        overlap: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        schema = checked_table(table).schema
        self.dim = checked_int("dim", dim)
        self.out_dim = self.dim if out_dim is None else checked_int("out_dim", out_dim)
        self.topk = checked_topk(topk, num_slots=schema.num_slots)
        options = key_options(
            table,
            keys,
            heads=heads,
            key_dim=key_dim,
            ways=ways,
            score=score,
            rank=rank,
            groups=groups,
            probes=probes,
            qk_norm=qk_norm,
            key_init_std=key_init_std,
            deterministic=not deterministic,
            key_dropout=key_dropout or None,
            sample_from=sample_from,
            random_slots=random_slots or None,
        )
        self.heads, self.key_dim, self.ways = options.heads, options.key_dim, options.ways
        self.codebook_size = options.codebook_size
        self.scores = checked_scores(scores)
        self.exploring = checked_exploring(
            key_dropout, sample_from, random_slots, topk=self.topk, num_slots=schema.num_slots
        )
        if self.exploring.key_dropout and options.kind != "product":
            raise InvalidRequest(
                f'key_dropout = {key_dropout!r} is of product keys with score="sum"; these are {options.kind} keys'
            )
        if sink and scores != "softmax":
            raise InvalidRequest(f'sink is of scores="softmax", and takes part in that sum; got scores = {scores!r}')
        self.input_dropout = checked_dropout("input_dropout", input_dropout)
        self.query_dropout = checked_dropout("query_dropout", query_dropout)
        self.value_dropout = checked_dropout("value_dropout", value_dropout)
        self.qk_norm = qk_norm
        self.query_norm = query_norm
        self.key_init_std = (
            1.0 / math.sqrt(self.key_dim) if key_init_std is None else checked_std("key_init_std", key_init_std)
        )
        self.deterministic = deterministic
        self.overlap = overlap
        self.table = table
        self.keep_lookup = False
        self.last_lookup: MemoryLookup | None = None
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        self.query = query_part(
            query, query_norm, self.dim, heads=self.heads, key_dim=self.key_dim, bias=query_bias, made=made
        )
        self._make_keys(options, made)
        self.gate = gate_part(gate, self.dim, schema.value_dim, made)
        self.out = out_part(out, schema.value_dim, self.out_dim, made, gated=self.gate is not None)
        self.gating = nn.Linear(self.dim, 1, **made) if mem_gated else None
        self.sink = nn.Parameter(torch.empty(self.heads, **made)) if sink else None
        self.values = values_parameter(**made)
        self.pool_keys = values_parameter(**made) if options.kind == "pool" else None
        self._link = LayerLink(table, self.values)
        self._key_link = key_link(self.table, self.pool_keys)
        self._copied: CopyCaution | None = None
        self.reset_parameters()

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter("half_keys" if name == "keys" else name, param)
        if name in ("values", "pool_keys") and "_key_link" in self.__dict__:
            self.follow_values()

    def forward(self, x: Tensor, *, return_lookup: bool = False) -> Output | tuple[Output, MemoryLookup]:
        """Look up every token of ``x``.

        Args:
            x: [..., dim], any leading shape, floating point.
            return_lookup: Answer what was looked up, too.

        Returns:
            [..., out_dim], with ``overlap`` a ``PendingMemory`` of it; and, with return_lookup, the ids, scores and
            weights [..., heads, topk], of which scores and weights are differentiable.

        Raises:
            InvalidRequest: The last dimension of ``x`` is not ``dim``, or a module answered another width.
            MempoolError: What the table's gather raises.
        """
        if self.overlap:
            pending = self.start(x)
            return (pending, pending.lookup) if return_lookup else pending
        x = self._checked(x)
        bag, lookup = self._lookup(self.scoring_queries(x))
        y = self._made(x, bag, self._gate(x))
        self._keep(lookup)
        return (y, lookup) if return_lookup else y

    def start(self, x: Tensor) -> PendingMemory:
        """Score ``x``, ask the shards, and go on: ``finish`` of what this answers is ``layer(x)``, bitwise.

        What is computed in between is computed while shards work, and in the backward pass its gradients are, while
        those of the scores are on their way. The memory's output may so be added after the block's attention or FFN, or
        a layer later (the skip-layer reads of UltraMem, arXiv 2411.12364).

        Start and finish under the same autocast and with the same gradients enabled; a block under activation
        checkpointing (use_reentrant=False) may hold both or either. Both are graph breaks under ``torch.compile``. What
        shards parameters by forward hooks (FSDP) has to wrap a module that calls both; so has DDP.

        Args:
            x: [..., dim], any leading shape, floating point; not to be written to before ``finish``.

        Raises:
            InvalidRequest: As a call of the layer, before anything is sent.
        """
        x = self._checked(x)
        queries = self.scoring_queries(x)
        with torch.autocast(queries.device.type, enabled=False):
            ids_BHK, scores_BHK, weights_BHK = self._chosen(queries)
            gathering = begin(
                self._link,
                ids_BHK.flatten(1),
                weights_BHK.flatten(1),
                anchor=self.values,
                trained=self.values.requires_grad and self.table.requires_grad,
                remember=self.training,
            )
        return PendingMemory(self, x, gathering, self._shaped(queries, ids_BHK, scores_BHK, weights_BHK))

    def finish(self, pending: PendingMemory) -> Tensor:
        """The output [..., out_dim] of what was started; also ``pending.result()``.

        Raises:
            InvalidRequest: It is another layer's; or it was started under no_grad, in training, and gradients are
                wanted now, which would not reach queries and keys.
            MempoolError: What the table's gather raises.
        """
        if pending.layer is not self:
            raise InvalidRequest(
                f"this look-up was started by another layer (of table {pending.layer.table.name!r}): finish it there,"
                " or by its result()"
            )
        if self.training and torch.is_grad_enabled() and not pending.with_gradients:
            raise InvalidRequest(
                f"this look-up in table {self.table.name!r} was started without gradients (under no_grad, or by a block"
                " under checkpoint(use_reentrant=True)), and they are wanted where it is finished: they would not reach"
                " queries and keys. Start it with gradients enabled, or use checkpoint(use_reentrant=False)"
            )
        gate = self._gate(pending.x)  # before the wait, so that in the backward pass the update goes out first
        y = self._made(pending.x, pending.gathering.result(), gate)
        self._keep(pending.lookup)
        return y

    def _checked(self, x: Tensor) -> Tensor:
        """``x``, after its dropout."""
        refuse_export(self.table.name)
        if x.dim() == 0 or x.shape[-1] != self.dim:
            raise InvalidRequest(f"this layer takes [..., {self.dim}], got {list(x.shape)}")
        if x.is_meta or (self.values if self.half_keys is None else self.half_keys).is_meta:
            raise InvalidRequest(
                f"this layer of table {self.table.name!r} or its input is on the meta device, without data to look up:"
                " give it data first (to_empty and load_state_dict)"
            )
        if self._copied is not None and not torch.compiler.is_compiling():
            self._copied.before_call(self)
        return F.dropout(x, self.input_dropout, self.training) if self.input_dropout else x

    def _made(self, x: Tensor, bag: Tensor, gate: Tensor | None) -> Tensor:
        y = projected(x, bag.view(*x.shape[:-1], self.table.schema.value_dim), gate, self.out)
        if self.value_dropout:
            y = F.dropout(y, self.value_dropout, self.training)
        return y if self.gating is None else torch.sigmoid(self.gating(x)) * y

    def _keep(self, lookup: MemoryLookup) -> None:
        if self.keep_lookup:
            self.last_lookup = lookup.detached()

    def _shaped(self, queries: Tensor, *parts_BHK: Tensor) -> MemoryLookup:
        return MemoryLookup(*(part.view(*queries.shape[:-1], part.shape[-1]) for part in parts_BHK))

    def _lookup(self, queries: Tensor) -> tuple[Tensor, MemoryLookup]:
        """[..., heads, key_dim] float32 -> bags [B, value_dim] float32, and what was chosen."""
        with torch.autocast(queries.device.type, enabled=False):
            ids_BHK, scores_BHK, weights_BHK = self._chosen(queries)
            bags = gather(
                self._link,
                ids_BHK.flatten(1),
                weights_BHK.flatten(1),
                anchor=self.values,
                trained=self.values.requires_grad and self.table.requires_grad,
                remember=self.training,
            )
        return bags, self._shaped(queries, ids_BHK, scores_BHK, weights_BHK)

    def _gate(self, x: Tensor) -> Tensor | None:
        return None if self.gate is None else F.silu(self.gate(x))

    def extra_repr(self) -> str:
        norms = "".join(f", {name}={getattr(self, name)}" for name in ("qk_norm", "query_norm") if getattr(self, name))
        schema = self.table.schema
        return (
            f"dim={self.dim}, table={schema.name!r} ({schema.num_slots} slots x {schema.value_dim}),"
            f" heads={self.heads}, topk={self.topk}, key_dim={self.key_dim}{norms}"
        )

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.follow_values()
        return self

    def use_table(self, table: Table) -> None:
        """Look up in this one from now on: the layer's own at a version, or its own again."""
        before, keys = (self._link, self._key_link), key_link(table, self.pool_keys)
        self.table, self._key_link = table, keys
        self._link = LayerLink(table, self.values, counts=self._link.counts)
        for link in before:
            if link is not None:
                link.end()

    def follow_values(self) -> None:
        """Another parameter may have come in the place of ``values`` (or ``pool_keys``), as by ``fully_shard``, or into
        it."""
        if follows(self._link, self.values):
            self._link.end()
            self._link = LayerLink(self.table, self.values, counts=self._link.counts)
        if self._key_link is not None and follows(self._key_link, self.pool_keys):
            self._key_link.end()
            self._key_link = key_link(self.table, self.pool_keys)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        for name in _STAND_INS:
            destination.pop(prefix + name, None)
        # Among what torch keeps of modules beside their tensors, so that nobody meets a key that is no tensor.
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata[_VERSION] = VersionWhenCopied(self.table)

    def _load_from_state_dict(
        self, state_dict: Any, prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str], *lists: Any
    ) -> None:
        if prefix + "keys" in state_dict:
            state_dict.setdefault(prefix + "half_keys", state_dict.pop(prefix + "keys"))
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, *lists)
        missing_keys += [name for name in missing if name.removeprefix(prefix) not in _STAND_INS]
        self.table.link.expect(copied_version(local_metadata.get(_VERSION)), whose="a model")

    def __copy__(self) -> Self:
        clone = type(self).__new__(type(self))
        clone.__dict__.update(self.__dict__)
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        state = {name: part for name, part in self.__dict__.items() if name not in _OF_THIS_ONE}
        clone.__dict__.update(copy.deepcopy(state, memo), last_lookup=None)
        clone._link, clone._key_link = LayerLink(self.table, clone.values), key_link(self.table, clone.pool_keys)
        clone._copied = CopyCaution(clone, self.table.name)
        return clone

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"a MemoryLayer cannot be pickled: its table {self.table.schema.name!r} is a connection to a pool."
            " Save layer.state_dict(), and build the layer again with a table of the process that loads it"
        )
