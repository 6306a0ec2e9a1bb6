"""Gathers and updates as lines carry them: numbers of fixed size, then tensors one behind the other, aligned.

Both sides of a line run the same version, so nothing here has to be read by another one; what all languages speak is
gRPC's. Bodies are as hostile as any: every count is checked against their length.
"""

from __future__ import annotations

import struct
from collections.abc import Sequence
from functools import cache, lru_cache
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
_NUMBER_OF = {name: number for number, name in enumerate(_SUMS)}
_ABSENT = 255
_ALIGNMENT = 8
_COUNTS = struct.Struct("<II")
_SHAPE = "BBHII"  # dtype, dims, nothing, sizes
_NO_TENSOR = (_ABSENT, 0, 0, 0, 0)


def _written(fixed: bytes, numbers: Sequence[int], text: str, tensors: Sequence[Tensor | None]) -> Parts:
    """The parts of one body. Of a small one each call here takes as long as the copy of its tensors."""
    dtypes = _numbers()
    shapes: list[int] = []
    bodies: list[memoryview] = []
    for tensor in tensors:
        if tensor is None:
            shapes += _NO_TENSOR
            continue
        number, sizes = dtypes.get(tensor.dtype), tensor.shape
        dims = len(sizes)
        if number is None or not 1 <= dims <= 2:
            raise InvalidRequest(f"{list(sizes)} {tensor.dtype} has no place in a message of a line")
        shapes += (number, dims, 0, sizes[0], sizes[1] if dims == 2 else 0)
        if sizes[0] and (dims == 1 or sizes[1]):
            bodies.append(_bytes_of(tensor))
    said = text.encode() if text else b""
    listed = _longs(len(numbers)).pack(*numbers) if numbers else b""
    head = b"".join((_COUNTS.pack(len(said), len(numbers)), fixed, _shapes(len(tensors)).pack(*shapes), listed, said))
    parts: Parts = [head]
    at = len(head)
    for body in bodies:
        if off := -at % _ALIGNMENT:
            parts.append(bytes(off))
        parts.append(body)
        at += off + len(body)
    return parts


class _Reader:
    """What is in one body: ``fixed``, ``numbers``, ``text``, ``tensors``. Raises InvalidRequest where it is no such."""

    def __init__(self, body: Body, fixed: struct.Struct, num_tensors: int, name: str) -> None:
        sizes_of = _shapes(num_tensors)
        try:
            text_bytes, count = _COUNTS.unpack_from(body)
            at = _COUNTS.size
            self.fixed: tuple[Any, ...] = fixed.unpack_from(body, at)
            at += fixed.size
            shapes = sizes_of.unpack_from(body, at)
            at += sizes_of.size
            self.numbers: tuple[int, ...] = struct.unpack_from(f"<{count}q", body, at) if count else ()
            at += 8 * count
            self.text = bytes(body[at : at + text_bytes]).decode() if text_bytes else ""
        except (struct.error, UnicodeDecodeError) as error:
            raise InvalidRequest(f"{name} is malformed: {error}") from None
        at += text_bytes
        self.tensors: list[Tensor | None] = []
        torch, dtypes = _torch()
        whole = len(body)
        for place in range(0, 5 * num_tensors, 5):
            number, dims, _, rows, columns = shapes[place : place + 5]
            if number == _ABSENT:
                self.tensors.append(None)
                continue
            if number >= len(dtypes) or not 1 <= dims <= 2:
                raise InvalidRequest(f"{name} is malformed: a tensor of dtype {number} in {dims} dimensions")
            dtype = dtypes[number]
            elements = rows if dims == 1 else rows * columns
            if not elements:
                self.tensors.append(torch.empty((rows, columns)[:dims], dtype=dtype))
                continue
            at += -at % _ALIGNMENT
            end = at + elements * dtype.itemsize
            if end > whole:
                shape = [rows, columns][:dims]
                raise InvalidRequest(f"{name} is malformed: {shape} of {dtype} ends beyond its {whole:,}")
            flat = torch.frombuffer(body, dtype=dtype, count=elements, offset=at)
            self.tensors.append(flat if dims == 1 else flat.view(rows, columns))
            at = end
        if at != whole:
            raise InvalidRequest(f"{name} is malformed: it has {whole:,} bytes, of which {at:,} are known")


def _bytes_of(tensor: Tensor) -> memoryview:
    torch, dtypes = _torch()
    if tensor.requires_grad or not tensor.is_contiguous():
        tensor = tensor.detach().contiguous()
    if tensor.dtype == dtypes[0]:
        tensor = tensor.view(torch.int16)
    data: memoryview = tensor.numpy().data
    return data.cast("B")


@cache
def _shapes(num_tensors: int) -> struct.Struct:
    return struct.Struct("<" + _SHAPE * num_tensors)


@lru_cache(maxsize=64)
def _longs(count: int) -> struct.Struct:
    return struct.Struct(f"<{count}q")


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
_GATHER = struct.Struct("<" + _ENVELOPE + "q?B")
_GATHERED = struct.Struct("<" + _STAMP)
_UPDATE = struct.Struct("<" + _ENVELOPE + "3q3q??")
_UPDATED = struct.Struct("<" + _STAMP)


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
            return self._written(value, narrow_ids)
        except struct.error as error:
            raise InvalidRequest(f"{self.name} cannot be sent: {error}") from None

    def tensor_bytes(self, value: Any) -> int:
        raise NotImplementedError  # lines do not ask

    def _written(self, value: Any, narrow_ids: bool) -> Parts:
        raise NotImplementedError


class GatherRequests(_Plain):
    name = "GatherRequest"

    def _written(self, value: GatherRequest, narrow_ids: bool) -> Parts:
        return _written(
            _GATHER.pack(
                *_envelope(value.envelope), value.lookup_id, value.remember, _number_of(value.reply_dtype, self.name)
            ),
            value.release,
            "",
            (_narrowed(value.ids, narrow_ids), value.weights, value.offsets),
        )

    def decode(self, body: Body) -> GatherRequest:
        read = _Reader(body, _GATHER, 3, self.name)
        ids, weights, offsets = read.tensors
        *envelope, lookup_id, remember, sums = read.fixed
        if sums >= len(_SUMS):
            raise InvalidRequest(f"{self.name} is malformed: it asks for sums of dtype {sums}")
        return GatherRequest(
            envelope=_envelope_of(envelope),
            lookup_id=lookup_id,
            ids=_wide_own(_there(ids, self.name)),
            weights=weights,
            offsets=_there(offsets, self.name).clone(),
            remember=remember,
            release=read.numbers,
            reply_dtype=_SUMS[sums],
        )


class GatherReplies(_Plain):
    name = "GatherReply"

    def _written(self, value: GatherReply, narrow_ids: bool) -> Parts:  # noqa: ARG002
        return _written(_GATHERED.pack(*_stamp(value.stamp)), value.blocks, "", (value.values,))

    def decode(self, body: Body) -> GatherReply:
        read = _Reader(body, _GATHERED, 1, self.name)
        return GatherReply(stamp=_stamp_of(read.fixed), blocks=read.numbers, values=_there(read.tensors[0], self.name))


class UpdateRequests(_Plain):
    name = "UpdateRequest"

    def _written(self, value: UpdateRequest, narrow_ids: bool) -> Parts:
        step = value.step_id
        return _written(
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
            (value.grads, _narrowed(value.ids, narrow_ids), value.weights, value.offsets),
        )

    def decode(self, body: Body) -> UpdateRequest:
        read = _Reader(body, _UPDATE, 4, self.name)
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
            ids=None if ids is None else _wide_own(ids),
            weights=weights,
            offsets=None if offsets is None else offsets.clone(),
        )


class UpdateReplies(_Plain):
    name = "UpdateReply"

    def _written(self, value: UpdateReply, narrow_ids: bool) -> Parts:  # noqa: ARG002
        return _written(_UPDATED.pack(*_stamp(value.stamp)), (), "", (value.weight_grad,))

    def decode(self, body: Body) -> UpdateReply:
        read = _Reader(body, _UPDATED, 1, self.name)
        return UpdateReply(stamp=_stamp_of(read.fixed), weight_grad=read.tensors[0])


def _number_of(reply_dtype: ReplyDtype, name: str) -> int:
    number = _NUMBER_OF.get(reply_dtype)
    if number is None:
        raise InvalidRequest(f"{name} cannot be sent: reply_dtype = {reply_dtype!r} is none of {', '.join(_SUMS)}")
    return number


def _wide_own(ids: Tensor) -> Tensor:
    """Ids that nobody else can write to: they are checked, and then relied on. Those that come as uint32 are copied
    when they are checked; offsets always are, here."""
    return ids.clone() if ids.dtype.itemsize == 8 else ids


def _there(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise InvalidRequest(f"{name} is malformed: a tensor is missing")
    return tensor
