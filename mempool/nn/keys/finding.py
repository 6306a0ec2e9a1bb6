"""What a memory layer asks and finds: queries as they are scored, keys, the slots of each token.

Shape legend: B bags (tokens), H heads, K top-k, D key dim.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mempool.client import Table
from mempool.client.lookup import checked_topk
from mempool.errors import InvalidRequest
from mempool.nn.choice import MemoryLookup, Scores, weights_of
from mempool.nn.keys.dots import parts_of, product_scores
from mempool.nn.keys.hierarchical import HierarchicalKeys
from mempool.nn.keys.options import KeyOptions
from mempool.nn.keys.tucker import TuckerKeys
from mempool.nn.scoring import product_topk, unit_rms
from mempool.nn.stable.balance import balance_loss
from mempool.nn.stable.exploring import Exploring, kept_keys, other_slots, sampled, with_dropped_keys
from mempool.nn.usage import HeadCounts, LayerUsage
from mempool.nn.values import KeyLink, LayerLink
from mempool.types import TrainedKeySpec
from mempool.types.keys import Grouping, grouping_of


class FindsSlots(nn.Module):
    """A memory layer up to its look-up. Its attributes are ``MemoryLayer``'s."""

    _link: LayerLink
    table: Table
    query: nn.Module
    half_keys: nn.Parameter | None
    search: nn.Module | None
    pool_keys: nn.Parameter | None
    heads: int
    topk: int
    key_dim: int
    ways: int
    codebook_size: int
    scores: Scores
    query_dropout: float
    qk_norm: bool
    query_norm: bool | str
    exploring: Exploring
    sink: nn.Parameter | None
    key_init_std: float
    deterministic: bool
    _key_link: KeyLink | None

    def _make_keys(self, options: KeyOptions, made: dict[str, Any]) -> None:
        """Parameters of keys, not drawn yet.

        Args:
            made: Their device and dtype.

        Raises:
            InvalidRequest: Groups or probes that do not fit the table or top-k.
        """
        most = self.exploring.sample_from or self.topk
        if options.kind == "pool":
            checked_topk(most, schema=self.table.schema)
        self.search = options.module(self.table.num_slots, topk=most, qk_norm=self.qk_norm, made=made)
        self.half_keys = nn.Parameter(torch.empty(options.shape, **made)) if options.kind == "product" else None

    @property
    def keys(self) -> Tensor:
        """``half_keys``; where the layer has none, ``scoring_keys()``."""
        return self.scoring_keys() if self.half_keys is None else self.half_keys

    def reset_parameters(self) -> None:
        """Draw new keys; the sink is 0. ``query``, ``gate``, ``out`` have ``reset_parameters`` too; the table stays."""
        if isinstance(self.search, (HierarchicalKeys, TuckerKeys)):
            self.search.draw(self.key_init_std)
        elif self.half_keys is not None:
            nn.init.normal_(self.half_keys, std=self.key_init_std)
        if self.sink is not None:
            nn.init.zeros_(self.sink)

    def scoring_queries(self, x: Tensor) -> Tensor:
        """The queries as they are scored, norms and scale included.

        ``table.lookup(layer.scoring_queries(x), topk=layer.topk)`` on a table that was given ``layer.scoring_keys()``
        (``Table.write_keys``) finds what this layer finds, with product keys of as many ways and ``score="sum"``.

        Args:
            x: [..., dim].

        Returns:
            [..., heads, key_dim] float32.
        """
        queries: Tensor = self.query(x)
        if queries.shape != (*x.shape[:-1], self.heads * self.key_dim):
            raise InvalidRequest(
                f"query answered {list(queries.shape)} for {list(x.shape)}; its last dimension must be"
                f" heads * key_dim = {self.heads * self.key_dim}"
            )
        if self.query_dropout:
            queries = F.dropout(queries, self.query_dropout, self.training)
        queries = queries.float().reshape(*x.shape[:-1], self.heads, self.key_dim)
        if self.qk_norm:
            parts = [unit_rms(part) for part in queries.chunk(self.ways, dim=-1)]
            return torch.cat(parts, dim=-1) / math.sqrt(self.key_dim)
        return unit_rms(queries) if self.query_norm in (True, "rms") else queries

    def scoring_keys(self) -> Tensor:
        """The keys as they are scored, float32, normalised with qk_norm.

        Half-keys [heads, ways, n, key_dim / ways]; of hierarchical keys, each with its group's added, and of flat keys
        in the pool [slots, key_dim].
        """
        search = self._hierarchical()
        if search is not None:
            return search.flat()
        if isinstance(self.search, TuckerKeys):
            return self.search.scored_keys()
        if self.half_keys is None:
            return self.table.read_keys()
        keys = self.half_keys.float()
        return unit_rms(keys) if self.qk_norm else keys

    @property
    def count_usage(self) -> bool:
        """Whether it is counted which slots each head chooses."""
        return self._link.counts is not None

    @count_usage.setter
    def count_usage(self, count_usage: bool) -> None:
        if count_usage != self.count_usage:
            self._link.counts = HeadCounts(self.heads, self.table.num_slots) if count_usage else None

    def usage(self) -> LayerUsage:
        """How the layer has used its table since ``count_usage`` was set, in this process: by head, and together.

        The table's own counts (``Table.usage``), of a table that has them, are of all layers and processes.

        Raises:
            InvalidRequest: Nothing is counted.
        """
        if self._link.counts is None:
            raise InvalidRequest(
                f"this layer of table {self.table.name!r} does not count which slots its heads choose: set "
                "layer.count_usage = True, and train"
            )
        return self._link.counts.usage()

    def recall(self, x: Tensor) -> float:
        """The part of the true top-k that is found for some tokens in eval mode, with the keys as they are: 0 to 1.

        Of a search that is greedy (hierarchical keys, Tucker scores) it scores every slot for each token: give it some
        tens of tokens. Any other finds all.

        Args:
            x: [..., dim].
        """
        search = self.search if isinstance(self.search, TuckerKeys) else self._hierarchical()
        if search is None:
            return 1.0
        modes = {module: module.training for module in self.modules()}
        try:
            with torch.no_grad():
                self.eval()  # else a look would count in the statistics of a batch norm of queries
                queries = self.scoring_queries(x).reshape(-1, self.heads, self.key_dim)
                with torch.autocast(queries.device.type, enabled=False):
                    _, found = search(queries, self.topk)
                    true = search.exact(queries, self.topk)
        finally:
            for module, training in modes.items():
                module.training = training
        return float((found[..., :, None] == true[..., None, :]).any(-1).double().mean())

    def balance_loss(self, lookup: MemoryLookup) -> Tensor:
        """How unequally keys were used, to be added to the loss, times 0.01 or so: 1 where all were picked alike.

        Of product keys it is of half-keys, of hierarchical keys of groups, of flat keys in the pool of slots
        (``mempool.nn.stable.balance``). Differentiable by the weights.

        Args:
            lookup: Of this layer and all tokens of a step: ``layer(x, return_lookup=True)[1]``.
        """
        grouping = self._grouping
        if grouping is not None:
            return balance_loss(lookup, [lookup.ids // grouping.size], grouping.groups)
        if not self.codebook_size:
            return balance_loss(lookup, [lookup.ids], self.table.num_slots)
        return balance_loss(lookup, parts_of(lookup.ids, self.ways, self.codebook_size), self.codebook_size)

    @property
    def _grouping(self) -> Grouping | None:
        """Of hierarchical keys, of the layer or of the pool."""
        if isinstance(self.search, HierarchicalKeys):
            return Grouping(self.search.slot_keys.shape[0], self.search.group_keys.shape[0])
        return None if self.pool_keys is None else grouping_of(self.table.schema.keys, self.table.num_slots)

    def _hierarchical(self) -> HierarchicalKeys | None:
        """The layer's own hierarchical keys, or a copy of those in the pool as they are; None where it has others."""
        grouping, keys = self._grouping, self.table.schema.keys
        if grouping is None or self.pool_keys is None:
            return self.search if isinstance(self.search, HierarchicalKeys) else None
        assert isinstance(keys, TrainedKeySpec), "they are grouped"
        found = HierarchicalKeys(
            grouping.num_slots,
            keys.key_dim,
            groups=grouping.groups,
            probes=keys.probes,
            topk=self.topk,
            qk_norm=False,
            made={"device": "meta"},
        )
        there = self.table.read_keys().to(self.pool_keys.device)
        parts = torch.split(there, [grouping.groups, grouping.num_slots])
        found.group_keys, found.slot_keys = (nn.Parameter(part, requires_grad=False) for part in parts)
        return found

    def _chosen(self, queries: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """[..., heads, key_dim] float32 -> ids, scores and weights [B, heads, topk]. Outside of autocast.

        In training there are random slots behind them.
        """
        queries = queries.reshape(-1, self.heads, self.key_dim)
        candidates = self.exploring.sample_from if self.training else None
        ids_BHK, scores_BHK = self._best(queries, candidates or self.topk)
        if candidates is not None:
            scores_BHK, ids_BHK = sampled(scores_BHK, ids_BHK, self.topk)
        if self.training and self.exploring.random_slots:
            others = other_slots(ids_BHK, self.exploring.random_slots, self.table.num_slots)
            ids_BHK = torch.cat([ids_BHK, others], dim=-1)
            scores_BHK = torch.cat([scores_BHK, self._scores_of(queries, others)], dim=-1)
        return ids_BHK, scores_BHK, weights_of(scores_BHK, self.scores, self.sink)

    def _best(self, queries: Tensor, topk: int) -> tuple[Tensor, Tensor]:
        """Ids and scores [B, heads, topk] of [B, heads, key_dim]."""
        if self._key_link is not None:
            return self._key_link.chosen(queries, topk, anchor=self.pool_keys)
        if self.search is not None:
            scores_BHK, ids_BHK = self.search(queries, topk, deterministic=self.deterministic)
            return ids_BHK, scores_BHK
        keys = self.scoring_keys()
        if self.training and self.exploring.key_dropout:
            kept = kept_keys(topk, self.table.num_slots, self.codebook_size, self.ways)
            queries, keys = with_dropped_keys(queries, keys, self.exploring.key_dropout, kept=kept)
        scores_BHK, ids_BHK = product_topk(
            queries,
            keys,
            topk=topk,
            stride=self.codebook_size,
            deterministic=self.deterministic,
            num_slots=self.table.num_slots,
        )
        return ids_BHK, scores_BHK

    def _scores_of(self, queries: Tensor, ids_BHK: Tensor) -> Tensor:
        if isinstance(self.search, (HierarchicalKeys, TuckerKeys)):
            return self.search.scores_of(queries, ids_BHK)
        return product_scores(queries, self.scoring_keys(), ids_BHK)
