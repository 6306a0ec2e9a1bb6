"""Gathers and updates as lines carry them: numbers of fixed size, then tensors one behind the other, aligned.

Both sides of a line run the same version, so nothing here has to be read by another one; what all languages speak is
gRPC's. Bodies are as hostile as any: every count is checked against their length.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from mempool.errors import InvalidRequest
from mempool.types import Envelope, GatherReply, GatherRequest, Stamp, StepId, UpdateReply, UpdateRequest
from mempool.types.messages import ReplyDtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Body: TypeAlias = bytes | memoryview
Parts: TypeAlias = list[bytes | memoryview]

_NAMES = ("bfloat16", "int64", "uint32", "float32", "float16", "float64", "int32", "uint8")
_SUMS: tuple[ReplyDtype, ...] = ("float32", "bfloat16", "float8_e4m3fn")
_ABSENT = 255
_ALIGNMENT = 8
_PADDING = tuple(bytes(-off % _ALIGNMENT) for off in range(_ALIGNMENT))
_NAME = "near"
_COUNTS = struct.Struct("<II")
_SHAPE = struct.Struct("<BBHII")  # dtype, dims, nothing, sizes
_SHAPE_NUMBERS = 5


class _Tensors:
    """Tensors as they are sent, wherever they begin aligned: what their header says of them, and their parts.

    Attributes:
        off: Bytes that the last one ends beyond a multiple of the alignment.
    """

    __slots__ = ("off", "parts", "shapes")

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        self.shapes = b"".join([_shape(tensor) for tensor in tensors])
        self.parts: Parts = []
        self.off = 0
        for tensor in tensors:
            if tensor is None or not tensor.numel():
                continue
            if self.off:
                self.parts.append(_PADDING[self.off])
            view = _bytes_of(tensor)
            self.parts.append(view)
            self.off = len(view) % _ALIGNMENT


_NONE = _Tensors(())


class _Writer:
    """Parts of one body."""

    def __init__(
        self, fixed: bytes, numbers: Sequence[int], text: str, tensors: _Tensors, then: _Tensors = _NONE
    ) -> None:
        said = text.encode()
        listed = struct.pack(f"<{len(numbers)}q", *numbers) if numbers else b""
        head = b"".join((_COUNTS.pack(len(said), len(numbers)), fixed, tensors.shapes, then.shapes, listed, said))
        self.parts: Parts = [head]
        off = len(head) % _ALIGNMENT
        for some in (tensors, then):
            if some.parts:
                if off:
                    self.parts.append(_PADDING[off])
                self.parts += some.parts
                off = some.off


def _bags_of(value: GatherRequest | UpdateRequest, narrow_ids: bool) -> _Tensors:
    """Ids, weights and offsets: the same for all shards that are asked for the same bags."""
    if value.ids is None and value.weights is None and value.offsets is None:
        return _NO_BAGS
    known: _Tensors | None = None if value.bags is None else value.bags.made.get((_NAME, narrow_ids))
    if known is None:
        ids = _narrowed(value.ids, narrow_ids)
        known = _Tensors((ids, value.weights, value.offsets))
        if value.bags is not None and ids is value.ids:  # views alone are kept, no copy
            value.bags.made[_NAME, narrow_ids] = known
    return known


class _Layout:
    """What all bodies of one message begin with.

    Args:
        fixed: Its numbers of fixed size, as ``struct`` has them.
        num_tensors: Those that follow.
    """

    def __init__(self, fixed: str, num_tensors: int) -> None:
        whole = struct.Struct(_COUNTS.format + fixed + _SHAPE.format[1:] * num_tensors)
        self.pack = struct.Struct("<" + fixed).pack
        self.unpack_from, self.size = whole.unpack_from, whole.size
        self.num_tensors = num_tensors


class _Reader:
    """What is in one body: ``fixed``, ``numbers``, ``text``, ``tensors``. Raises InvalidRequest where it is no such."""

    def __init__(self, body: Body, layout: _Layout, name: str) -> None:
        try:
            text_bytes, count, *values = layout.unpack_from(body)
            at, first = layout.size, len(values) - _SHAPE_NUMBERS * layout.num_tensors
            self.fixed: Sequence[Any] = values[:first]
            self.numbers: tuple[int, ...] = struct.unpack_from(f"<{count}q", body, at) if count else ()
            at += 8 * count
            self.text = bytes(body[at : at + text_bytes]).decode() if text_bytes else ""
        except (struct.error, UnicodeDecodeError) as error:
            raise InvalidRequest(f"{name} is malformed: {error}") from None
        at += text_bytes
        self.tensors: list[Tensor | None] = []
        torch, dtypes = _torch()
        for place in range(first, len(values), _SHAPE_NUMBERS):
            dtype, dims, _, size, columns = values[place : place + _SHAPE_NUMBERS]
            if dtype == _ABSENT:
                self.tensors.append(None)
                continue
            if dtype >= len(dtypes) or not 1 <= dims <= 2:
                raise InvalidRequest(f"{name} is malformed: a tensor of dtype {dtype} in {dims} dimensions")
            shape, elements = ((size,), size) if dims == 1 else ((size, columns), size * columns)
            if not elements:
                self.tensors.append(torch.empty(shape, dtype=dtypes[dtype]))
                continue
            at += -at % _ALIGNMENT
            num_bytes = elements * dtypes[dtype].itemsize
            if at + num_bytes > len(body):
                raise InvalidRequest(
                    f"{name} is malformed: {list(shape)} of {dtypes[dtype]} ends beyond its {len(body):,}"
                )
            flat = torch.frombuffer(body, dtype=dtypes[dtype], count=elements, offset=at)
            self.tensors.append(flat if dims == 1 else flat.view(shape))
            at += num_bytes
        if at != len(body):
            raise InvalidRequest(f"{name} is malformed: it has {len(body):,} bytes, of which {at:,} are known")


def _shape(tensor: Tensor | None) -> bytes:
    if tensor is None:
        return _SHAPE.pack(_ABSENT, 0, 0, 0, 0)
    number, sizes = _numbers().get(tensor.dtype), tensor.shape
    if number is None or not 1 <= len(sizes) <= 2:
        raise InvalidRequest(f"{list(sizes)} {tensor.dtype} has no place in a message of a line")
    return _SHAPE.pack(number, len(sizes), 0, sizes[0], sizes[1] if len(sizes) == 2 else 0)


_NO_BAGS = _Tensors((None, None, None))


def _bytes_of(tensor: Tensor) -> memoryview:
    torch, dtypes = _torch()
    if tensor.dtype == dtypes[0]:
        tensor = tensor.contiguous().view(torch.int16)
    array = np.ascontiguousarray(tensor.detach().numpy())
    return array.reshape(-1).view(np.uint8).data


def _narrowed(ids: Tensor | None, narrow: bool) -> Tensor | None:
    torch, dtypes = _torch()
    if ids is None or not narrow or ids.dtype != dtypes[1]:
        return ids
    narrowed: Tensor = torch.from_numpy(ids.numpy().astype(np.uint32))
    return narrowed


@cache
def _torch() -> tuple[Any, tuple[torch.dtype, ...]]:
    """Torch, loaded by the first tensor, and what travels by its number."""
    import torch

    # All that travel: what is wrong for a table is the shard's to say.
    return torch, tuple(getattr(torch, name) for name in _NAMES)


@cache
def _numbers() -> dict[torch.dtype, int]:
    return {dtype: number for number, dtype in enumerate(_torch()[1])}


_ENVELOPE = "4q"
_STAMP = "5q"
_GATHER = _Layout(_ENVELOPE + "q?B", 3)
_GATHERED = _Layout(_STAMP, 1)
_UPDATE = _Layout(_ENVELOPE + "3q3q??", 4)
_UPDATED = _Layout(_STAMP, 1)


def _envelope(envelope: Envelope) -> tuple[int, int, int, int]:
    return envelope.table_id, envelope.epoch, envelope.incarnation, envelope.table_version


def _envelope_of(numbers: Sequence[int]) -> Envelope:
    return Envelope(table_id=numbers[0], epoch=numbers[1], incarnation=numbers[2], table_version=numbers[3])


def _stamp(stamp: Stamp) -> tuple[int, int, int, int, int]:
    return stamp.shard, stamp.incarnation, stamp.epoch, stamp.table_version, stamp.writes


def _stamp_of(numbers: Sequence[int]) -> Stamp:
    shard, incarnation, epoch, version, writes = numbers
    return Stamp(shard=shard, incarnation=incarnation, epoch=epoch, table_version=version, writes=writes)


class _Plain:
    """A codec of one message."""

    name = ""

    def encode(self, value: Any, *, narrow_ids: bool = False) -> bytes:
        return b"".join(self.parts(value, narrow_ids=narrow_ids))

    def parts(self, value: Any, *, narrow_ids: bool = False) -> Parts:
        try:
            return self._written(value, narrow_ids).parts
        except struct.error as error:
            raise InvalidRequest(f"{self.name} cannot be sent: {error}") from None

    def tensor_bytes(self, value: Any) -> int:
        raise NotImplementedError  # lines do not ask

    def _written(self, value: Any, narrow_ids: bool) -> _Writer:
        raise NotImplementedError


class GatherRequests(_Plain):
    name = "GatherRequest"

    def _written(self, value: GatherRequest, narrow_ids: bool) -> _Writer:
        return _Writer(
            _GATHER.pack(
                *_envelope(value.envelope), value.lookup_id, value.remember, _number_of(value.reply_dtype, self.name)
            ),
            value.release,
            "",
            _bags_of(value, narrow_ids),
        )

    def decode(self, body: Body) -> GatherRequest:
        read = _Reader(body, _GATHER, self.name)
        ids, weights, offsets = read.tensors
        *envelope, lookup_id, remember, sums = read.fixed
        if sums >= len(_SUMS):
            raise InvalidRequest(f"{self.name} is malformed: it asks for sums of dtype {sums}")
        return GatherRequest(
            envelope=_envelope_of(envelope),
            lookup_id=lookup_id,
            ids=_there(ids, self.name),
            weights=weights,
            offsets=_there(offsets, self.name),
            remember=remember,
            release=read.numbers,
            reply_dtype=_SUMS[sums],
        )


class GatherReplies(_Plain):
    name = "GatherReply"

    def _written(self, value: GatherReply, narrow_ids: bool) -> _Writer:  # noqa: ARG002
        return _Writer(_GATHERED.pack(*_stamp(value.stamp)), value.blocks, "", _Tensors((value.values,)))

    def decode(self, body: Body) -> GatherReply:
        read = _Reader(body, _GATHERED, self.name)
        return GatherReply(stamp=_stamp_of(read.fixed), blocks=read.numbers, values=_there(read.tensors[0], self.name))


class UpdateRequests(_Plain):
    name = "UpdateRequest"

    def _written(self, value: UpdateRequest, narrow_ids: bool) -> _Writer:
        step = value.step_id
        return _Writer(
            _UPDATE.pack(
                *_envelope(value.envelope),
                step.rank,
                step.step,
                step.generation,
                value.sequence,
                value.lookup_id,
                value.lookups,
                value.hold,
                value.want_weight_grad,
            ),
            value.blocks,
            step.group,
            _Tensors((value.grads,)),
            _bags_of(value, narrow_ids),
        )

    def decode(self, body: Body) -> UpdateRequest:
        read = _Reader(body, _UPDATE, self.name)
        grads, ids, weights, offsets = read.tensors
        rank, step, generation, sequence, lookup_id, lookups, hold, want_weight_grad = read.fixed[4:]
        return UpdateRequest(
            envelope=_envelope_of(read.fixed),
            step_id=StepId(group=read.text, rank=rank, step=step, generation=generation),
            sequence=sequence,
            lookup_id=lookup_id,
            blocks=read.numbers,
            grads=_there(grads, self.name),
            hold=hold,
            want_weight_grad=want_weight_grad,
            lookups=lookups,
            ids=ids,
            weights=weights,
            offsets=offsets,
        )


class UpdateReplies(_Plain):
    name = "UpdateReply"

    def _written(self, value: UpdateReply, narrow_ids: bool) -> _Writer:  # noqa: ARG002
        return _Writer(_UPDATED.pack(*_stamp(value.stamp)), (), "", _Tensors((value.weight_grad,)))

    def decode(self, body: Body) -> UpdateReply:
        read = _Reader(body, _UPDATED, self.name)
        return UpdateReply(stamp=_stamp_of(read.fixed), weight_grad=read.tensors[0])


def _number_of(reply_dtype: ReplyDtype, name: str) -> int:
    if reply_dtype not in _SUMS:
        raise InvalidRequest(f"{name} cannot be sent: reply_dtype = {reply_dtype!r} is none of {', '.join(_SUMS)}")
    return _SUMS.index(reply_dtype)


def _there(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise InvalidRequest(f"{name} is malformed: a tensor is missing")
    return tensor
