"""NgramLookup: the rows of every token's n-grams, fetched once for as many layers as read them.

Which slots: ``hashing``. What is made of the rows: ``memory``. Legend: B batch, T tokens, S rows of a token, R real
tokens, U rows asked for, V value dim.
"""

import copy
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NoReturn, Self, Unpack, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mempool.client import Table
from mempool.client.bags import checked_bags
from mempool.client.gathers.autograd import pooled_gather, refuse_export, refuse_transforms
from mempool.client.gathers.untraced import untraced
from mempool.errors import InvalidRequest
from mempool.nn.copies import CopyCaution, VersionWhenCopied, copied_version
from mempool.nn.ngrams.ahead import Ahead
from mempool.nn.ngrams.early import Asked, Batch, Early
from mempool.nn.ngrams.hashing import Multipliers, NgramHash, checked_multipliers
from mempool.nn.ngrams.packing import Packing, Places, places_of
from mempool.nn.ngrams.sizes import LR_FACTOR, Ngrams
from mempool.nn.sizes import checked_int, checked_table
from mempool.nn.values import LayerLink, follows, values_parameter
from mempool.types.bags import Bags

_VERSION = "table_version"
_OF_THIS_ONE = ("_link", "_copied", "_early")
"""What a copy has of its own."""
_WORTH = 0.75
"""Each slot travels once where those are at most so many of all: to lay the rows out again costs a copy of them. A
judgement: of 65,536 pairs a tenth saved cost more than it spared (19 ms to lay out, 9 ms of the gather)."""
_INTEGERS = (torch.int64, torch.int32, torch.int16, torch.uint8, torch.int8)


@dataclass(frozen=True, slots=True, eq=False)
class NgramRows:
    """What ``NgramLookup`` answers, for layers.

    Attributes:
        values: [..., T, orders * heads * value_dim] float32, heads of the first order first; zeros of padding.
        positions: [..., T] int64: of each token within its sequence; 0 of padding.
        real: [..., T] bool, False for padding; None: there is none.
    """

    values: Tensor
    positions: Tensor
    real: Tensor | None


class NgramLookup(nn.Module):
    """Tokens in, rows of their hashed n-grams out: what one or several ``NgramMemory`` read of a table.

    The life of a call: [TRAINER] canonical ids, hashes, each slot once where many repeat -> [SHARD] rows -> [TRAINER]
    side by side. The backward sends one gradient for each row that was fetched, and shards hold it until
    ``PoolOptimizer.step``. An n-gram never reaches over its sequence's begin: before it there is a pad. Padding gets no
    rows, and no gradient.

    Slots depend on tokens alone, so they can be fetched early (``prefetch``): hashed and asked for by another thread.

    ``state_dict`` holds what slots depend on: "multipliers", "primes", "pad" and, where there is one, "canonical"; a
    state of other primes is refused, as its slots are others. They stay on the CPU wherever the model goes, where
    tokens are hashed. ``values`` stands for the table's values, to freeze and to zero them by; copies share the table,
    and a state knows the table's version: all as of ``MemoryLayer``. A graph break under ``torch.compile``;
    ``torch.export`` is refused.

    Attributes:
        table: The table, shared by reference.
        ngrams: Orders, heads, primes.
        vocab_size: Tokens are from 0 to this less 1.
        width: Of a token's rows side by side: orders * heads * value_dim.
        multipliers, primes: Of the hashes: [1, 1, N] or [orders, heads, N], and [orders, heads], int64 on the CPU.
        canonical: [vocab_size] int64 on the CPU, or None.
        lr_factor: What ``PoolOptimizer(model, lr=...)`` multiplies the learning rate with for the table.
        values: Parameter [1].

    Args:
        table: A table of exactly ``ngrams.num_slots`` slots (``ngrams.table_config``).
        ngrams: Orders, heads, primes.
        vocab_size: Number of tokens; None: that of ``canonical``.
        canonical: [vocab_size] integers of at least 0: tokens of one id are one to an n-gram (``canonical_ids``). None:
            each token is itself.
        pad_id: The token that is before a sequence's begin, as in the released code. None: one that is no token.
        seed: Of the hashes; None: the table's, so that all who read it hash alike.
        multipliers: "shared", as in the released code: heads of a token's n-gram have one product-XOR of it, and differ
            by their primes; "per_head": each has multipliers of its own.
        device, dtype: Of ``values``.

    Raises:
        InvalidRequest: The table has another number of slots, or an argument makes no sense.
    """

    values: nn.Parameter

    def __init__(
        self,
        table: Table,
        ngrams: Ngrams,
        *,
        vocab_size: int | None = None,
        canonical: Tensor | None = None,
        pad_id: int | None = None,
        seed: int | None = None,
        multipliers: Multipliers = "shared",
        lr_factor: float = LR_FACTOR,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        schema = checked_table(table).schema
        _require_fitting(table, ngrams)
        self.canonical = _checked_canonical(canonical)
        if vocab_size is None and self.canonical is None:
            raise InvalidRequest("vocab_size is needed where there is no canonical map that tells it")
        count = len(self.canonical) if self.canonical is not None else 0
        self.vocab_size = count if vocab_size is None else checked_int("vocab_size", vocab_size)
        if self.canonical is not None and count != self.vocab_size:
            raise InvalidRequest(f"canonical has {count} ids for a vocabulary of {self.vocab_size}; give one for each")
        if not 0.0 < lr_factor < float("inf"):
            raise InvalidRequest(f"lr_factor = {lr_factor!r} must be a number above 0")
        num_ids = self.vocab_size if self.canonical is None else int(self.canonical.max()) + 1
        self.table = table
        self.ngrams = ngrams
        self.lr_factor = lr_factor
        self.width = ngrams.columns * schema.value_dim
        self._hash = NgramHash(
            ngrams,
            num_ids=num_ids,
            pad=num_ids if pad_id is None else self._canonical_of(pad_id),
            seed=schema.seed if seed is None else checked_int("seed", seed, at_least=0),
            multipliers=checked_multipliers(multipliers),
        )
        self.values = values_parameter(device=device, dtype=dtype)
        self._link = LayerLink(table, self.values)
        self._copied: CopyCaution | None = None
        self._early = Early()
        self._late_told = False

    @property
    def multipliers(self) -> Tensor:
        return self._hash.multipliers

    @property
    def primes(self) -> Tensor:
        return self._hash.primes

    @untraced
    def slots(self, tokens: Tensor, **packing: Unpack[Packing]) -> Tensor:
        """The slots of every token's n-grams: [..., T] -> [..., T, orders * heads] int64 on the CPU.

        Of padding they mean nothing. Arguments and errors as of a call.
        """
        places = places_of(_checked_tokens(tokens), **packing)
        return self._hashed(self._checked(tokens, places), places).view(*tokens.shape, self.ngrams.columns)

    @untraced
    def forward(self, tokens: Tensor, **packing: Unpack[Packing]) -> NgramRows:
        """The rows of every token's n-grams, differentiable in the table's values.

        Args:
            tokens: [..., T] integers, on any device; on the CPU nothing waits for a GPU.
            packing: ``segment_ids``, ``positions``, ``cu_seqlens``, ``mask``: as of ``Packing``. None: each row of
                tokens is one sequence.

        Returns:
            Rows on the device of the tokens.

        Raises:
            InvalidRequest: A token out of the vocabulary, or packing that makes no sense; nothing was sent.
            MempoolError: What the table's gather raises.
        """
        refuse_export(self.table.name)
        if self._copied is not None:
            self._copied.before_call(self)
        refuse_transforms(self._link)
        asked, places = self._prefetched(tokens, packing)
        rows = pooled_gather(
            self._link,
            anchor=self.values,
            ids=asked.bags.ids,
            weights=None,
            offsets=asked.bags.offsets,
            trained=self.values.requires_grad and self.table.requires_grad,
            remember=self.training,
            device=tokens.device,
        )
        if asked.order is not None:
            rows = F.embedding(asked.order.to(tokens.device), rows)
        real = places.real
        if real is not None:
            where = torch.nonzero(real.reshape(-1)).reshape(-1).to(tokens.device)
            rows = rows.new_zeros(tokens.numel(), self.width).index_copy(0, where, rows.view(-1, self.width))
        positions = places.positions.view(tokens.shape).to(tokens.device)
        return NgramRows(
            rows.view(*tokens.shape, self.width),
            positions,
            None if real is None else real.view(tokens.shape).to(tokens.device),
        )

    @untraced
    def prefetch(self, tokens: Tensor, **packing: Unpack[Packing]) -> bool:
        """Start reading the rows of ``tokens``: a later call with the same tokens and packing takes them.

        Bitwise the same rows as without, so it counts between two commits alone: start all micro-batches of a step
        after the step before. What a commit made old is asked for anew by the call, which warns once.

        Returns:
            Whether it was started, or will be: as of ``Table.prefetch``, False where there is no room for its answer.

        Raises:
            InvalidRequest: As a call.
        """
        return self._start([self._batch(tokens, packing)])

    @untraced
    def prefetch_all(self, batches: Sequence[Tensor | Mapping[str, Tensor | None]]) -> bool:
        """As ``prefetch``, of all micro-batches of a step: one fetch for all, each slot of them read once.

        Args:
            batches: Of each its tokens, or a dict of its "tokens" and packing.

        Raises:
            InvalidRequest: As a call with any of them; nothing was started.
            MempoolError: Where room is scarce they are read by this call, which is told as any look-up is.
        """
        if isinstance(batches, (Tensor, Mapping)):
            raise InvalidRequest("batches must be a list of micro-batches; prefetch(tokens) is of one")
        given = [dict(each) if isinstance(each, Mapping) else {"tokens": each} for each in batches]
        for number, each in enumerate(given):
            unknown = sorted(each.keys() - {"tokens", *Packing.__annotations__})
            if each.get("tokens") is None or unknown:
                wrong = f"unknown {', '.join(unknown)}" if unknown else 'no "tokens"'
                raise InvalidRequest(
                    f"batches[{number}] has {wrong}: give a tensor, or a dict of tokens and of packing"
                    f" ({', '.join(Packing.__annotations__)})"
                )
        made: list[Batch] = []
        for number, each in enumerate(given):
            try:
                made.append(self._batch(cast("Tensor", each.pop("tokens")), cast("Packing", each)))
            except InvalidRequest as error:
                raise InvalidRequest(f"batches[{number}]: {error}") from None
        return self._start(made) if made else True

    def _start(self, batches: list[Batch]) -> bool:
        link = self.table.link
        commits = link.session.commits
        self._early.keep(commits)
        remember = self.training and torch.is_grad_enabled() and self.table.requires_grad

        def start(asked: list[Asked], may_wait: bool) -> bool:
            bags = [each.bags for each in asked if each.bags.num_pairs]
            if len(bags) > 1:
                return link.prefetch_each(bags)
            return not bags or link.prefetch(bags[0], remember=remember, may_wait=may_wait)

        reserved = link.reserve_ahead(sum(each.num_real for each in batches) * self.ngrams.columns)
        if reserved is None:  # but each slot may be there many times: what it takes is known once they are
            now = [self._asked(each) for each in batches]
            started = start(now, may_wait=False)
            if started:
                self._early.add(batches, commits, Ahead.of(now))
            return started

        def ask() -> list[Asked]:
            try:
                asked = [self._asked(each) for each in batches]
            finally:
                link.prefetched.release(reserved)
            start(asked, may_wait=True)
            return asked

        self._early.add(batches, commits, Ahead(ask, never=partial(link.prefetched.release, reserved)))
        return True

    def _batch(self, tokens: Tensor, packing: Packing) -> Batch:
        places = places_of(_checked_tokens(tokens), **packing)
        return Batch(self._checked(tokens, places), places, _is_plain(packing))

    def _prefetched(self, tokens: Tensor, packing: Packing) -> tuple[Asked, Places]:
        """What was prefetched for the same, once; or is to be asked for now."""
        _checked_tokens(tokens)
        started = self._early.take(lambda batch: batch.is_plainly(tokens)) if _is_plain(packing) else None
        if started is None:
            batch = self._batch(tokens, packing)
            started = self._early.take(batch.is_as)
            if started is None:
                return self._asked(batch), batch.places
        if started.commits != self.table.link.session.commits:
            self._tell_late()
        return started.taken() or self._asked(started.batch), started.batch.places

    def _asked(self, batch: Batch) -> Asked:
        slots = self._hashed(batch.tokens, batch.places)
        if batch.places.real is not None:
            slots = slots[batch.places.real]
        flat = slots.reshape(-1)
        distinct, order = torch.unique(flat, return_inverse=True)
        ids, where = (flat, None) if distinct.numel() > _WORTH * flat.numel() else (distinct, order)
        own_ids, _, offsets = checked_bags(
            ids.view(-1, 1), None, None, num_slots=self.table.num_slots, table=self.table.name
        )
        return Asked(Bags(ids=own_ids, weights=None, offsets=offsets), where)

    def _tell_late(self) -> None:
        if not self._late_told:
            self._late_told = True
            warnings.warn(
                f"rows of table {self.table.name!r} were prefetched before a step and are read after it: they are asked"
                " for again, and the prefetch was in vain. Prefetch after step()",
                stacklevel=5,
            )

    def _checked(self, tokens: Tensor, places: Places) -> Tensor:
        """[B, T] int64 on the CPU, 0 for padding; not the caller's."""
        here = tokens.to("cpu", torch.int64, copy=True)
        if here.shape != places.positions.shape:
            here = here.reshape(places.positions.shape)
        if places.real is not None:
            here.masked_fill_(~places.real, 0)
        low, high = torch.aminmax(here) if here.numel() else (0, 0)
        if int(low) < 0 or int(high) >= self.vocab_size:
            outside = (here < 0) | (here >= self.vocab_size)
            at = torch.nonzero(outside.reshape(tokens.shape))[0].tolist()
            raise InvalidRequest(
                f"tokens{at} = {int(here.reshape(tokens.shape)[tuple(at)])} is outside the vocabulary of"
                f" {self.vocab_size} (0 to {self.vocab_size - 1}) of table {self.table.name!r}'s n-grams; padding is"
                " said by mask"
            )
        return here

    def _hashed(self, tokens: Tensor, places: Places) -> Tensor:
        """[B, T] checked -> slots [B, T, S]."""
        return self._hash.slots(tokens if self.canonical is None else self.canonical[tokens], places)

    def _canonical_of(self, pad_id: object) -> int:
        pad = checked_int("pad_id", pad_id, at_least=0)
        if pad >= self.vocab_size:
            raise InvalidRequest(f"pad_id = {pad} is outside the vocabulary of {self.vocab_size}")
        return pad if self.canonical is None else int(self.canonical[pad])

    def extra_repr(self) -> str:
        return (
            f"table={self.table.name!r}, orders={tuple(self.ngrams.orders)}, heads={self.ngrams.heads},"
            f" vocab_size={self.vocab_size}"
        )

    def register_parameter(self, name: str, param: nn.Parameter | None) -> None:
        super().register_parameter(name, param)
        if name == "values" and "_link" in self.__dict__:
            self.follow_values()

    def use_table(self, table: Table) -> None:
        """Look up in this one from now on: the own one at a version, or the own one again."""
        before = self._link
        self.table, self._link = table, LayerLink(table, self.values)
        before.end()

    def follow_values(self) -> None:
        """Another parameter may have come in the place of ``values``, as by ``fully_shard``, or into it."""
        if follows(self._link, self.values):
            self._link.end()
            self._link = LayerLink(self.table, self.values)

    def _apply(self, fn: Any, recurse: bool = True) -> Self:
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        self.follow_values()
        return self

    def _hashing(self) -> dict[str, Tensor]:
        parts = {"multipliers": self.multipliers, "primes": self.primes, "pad": self._hash.pad}
        return parts if self.canonical is None else {**parts, "canonical": self.canonical}

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        destination.pop(prefix + "values", None)
        destination.update({prefix + name: part for name, part in self._hashing().items()})
        metadata = getattr(destination, "_metadata", {}).get(prefix[:-1])
        if metadata is not None:
            metadata[_VERSION] = VersionWhenCopied(self.table)

    def _load_from_state_dict(
        self,
        state_dict: Any,
        prefix: str,
        local_metadata: Any,
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        found = {name: state_dict.pop(prefix + name, None) for name in self._hashing()}
        missing: list[str] = []
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing, unexpected_keys, error_msgs)
        missing_keys += [name for name in missing if name != prefix + "values"]
        missing_keys += [prefix + name for name, part in found.items() if part is None]
        parts = [(name, part, own) for (name, own) in self._hashing().items() if (part := found[name]) is not None]
        for name, part, own in parts:
            if part.shape != own.shape or (name == "primes" and not torch.equal(part.cpu(), own)):
                error_msgs.append(
                    f"{prefix}{name} is of other n-grams (orders, heads, slots, vocabulary) than this lookup in table"
                    f" {self.table.name!r}: its rows would be others. Make NgramLookup as it was when it was saved"
                )
                return
        if len(parts) == len(found):  # a part of a hash is none
            for _, part, own in parts:
                own.copy_(part)
            self._early.drop()
        self.table.link.expect(copied_version(local_metadata.get(_VERSION)), whose="a model")

    def __copy__(self) -> Self:
        clone = type(self).__new__(type(self))
        clone.__dict__.update(self.__dict__, _early=Early())
        return clone

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        clone = type(self).__new__(type(self))
        memo[id(self)] = clone
        state = {name: part for name, part in self.__dict__.items() if name not in _OF_THIS_ONE}
        clone.__dict__.update(copy.deepcopy(state, memo), _early=Early())
        clone._link, clone._copied = LayerLink(self.table, clone.values), CopyCaution(clone, self.table.name)
        return clone

    def __getstate__(self) -> NoReturn:
        raise TypeError(
            f"an NgramLookup cannot be pickled: its table {self.table.name!r} is a connection to a pool. Save its"
            " state_dict(), and build it again with a table of the process that loads it"
        )


def _require_fitting(table: Table, ngrams: object) -> None:
    if not isinstance(ngrams, Ngrams):
        raise InvalidRequest(f"ngrams = {ngrams!r}: give mempool.nn.Ngrams(orders=..., heads=..., slots=...)")
    if table.num_slots != ngrams.num_slots:
        raise InvalidRequest(
            f"table {table.name!r} has {table.num_slots:_} slots, and these n-grams need exactly"
            f" {ngrams.num_slots:_} (the sum of their primes): make it with ngrams.table_config({table.name!r}, ...)"
        )


def _is_plain(packing: Packing) -> bool:
    """Whether nothing is said of where sequences are."""
    return all(each is None for each in packing.values())


def _checked_tokens(tokens: object) -> Tensor:
    if not isinstance(tokens, Tensor) or tokens.dtype not in _INTEGERS:
        raise InvalidRequest(f"tokens must be a tensor of integers, got {getattr(tokens, 'dtype', type(tokens))}")
    if tokens.dim() == 0 or tokens.is_meta:
        raise InvalidRequest(f"tokens must be [..., T] and have data, got {list(tokens.shape)} on {tokens.device}")
    return tokens


def _checked_canonical(canonical: object) -> Tensor | None:
    if canonical is None:
        return None
    if not isinstance(canonical, Tensor) or canonical.dtype not in _INTEGERS or canonical.dim() != 1:
        raise InvalidRequest("canonical must be a tensor [vocab_size] of integers (mempool.nn.canonical_ids)")
    if not canonical.numel() or int(canonical.min()) < 0:
        raise InvalidRequest("canonical is empty or has a negative id: give one of at least 0 for each token")
    return canonical.detach().to("cpu", torch.int64, copy=True)
