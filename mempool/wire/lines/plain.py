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
from mempool.types.bags import ACTS, Act
from mempool.types.messages import ArrayGather, ArrayGathered, ReplyDtype

if TYPE_CHECKING:
    import torch
    from torch import Tensor

Body: TypeAlias = bytes | memoryview
Parts: TypeAlias = list[bytes | memoryview]

_NAMES = ("bfloat16", "int64", "uint32", "float32", "float16", "float64", "int32", "uint8")
_SUMS: tuple[ReplyDtype, ...] = ("float32", "bfloat16", "float8_e4m3fn")
_NUMBER_OF = {name: number for number, name in enumerate(_SUMS)}
_ACTS: tuple[Act, ...] = ("", *ACTS)
_ABSENT = 255
_ALIGNMENT = 8
_PADDING = tuple(bytes(-off % _ALIGNMENT) for off in range(_ALIGNMENT))
_NAME = "lines"
_COUNTS = struct.Struct("<II")
_SHAPE = "BBHII"  # dtype, dims, nothing, sizes
_NO_TENSOR = (_ABSENT, 0, 0, 0, 0)


class _Tensors:
    """Tensors as they are sent, wherever they begin aligned: what their header says of them, and their parts. Of a
    small body each call here takes as long as the copy of its tensors.

    Attributes:
        off: Bytes that the last one ends beyond a multiple of the alignment.
    """

    __slots__ = ("off", "parts", "shapes")

    def __init__(self, tensors: Sequence[Tensor | None]) -> None:
        dtypes = _numbers()
        shapes: list[int] = []
        self.parts: Parts = []
        self.off = 0
        for tensor in tensors:
            if tensor is None:
                shapes += _NO_TENSOR
                continue
            number, sizes = dtypes.get(tensor.dtype), tensor.shape
            dims = len(sizes)
            if number is None or not 1 <= dims <= 2:
                raise InvalidRequest(f"{list(sizes)} {tensor.dtype} has no place in a message of a line")
            shapes += (number, dims, 0, sizes[0], sizes[1] if dims == 2 else 0)
            if not sizes[0] or (dims == 2 and not sizes[1]):
                continue
            if self.off:
                self.parts.append(_PADDING[self.off])
            view = _bytes_of(tensor)
            self.parts.append(view)
            self.off = len(view) % _ALIGNMENT
        self.shapes = _shapes(len(tensors)).pack(*shapes)


def _packed(fixed: bytes, numbers: Sequence[int], text: str, tensors: _Tensors, then: _Tensors | None = None) -> Parts:
    """The parts of one body."""
    said = text.encode() if text else b""
    listed = _longs(len(numbers)).pack(*numbers) if numbers else b""
    then_shapes = b"" if then is None else then.shapes
    head = b"".join((_COUNTS.pack(len(said), len(numbers)), fixed, tensors.shapes, then_shapes, listed, said))
    parts: Parts = [head]
    off = len(head) % _ALIGNMENT
    for some in (tensors,) if then is None else (tensors, then):
        if some.parts:
            if off:
                parts.append(_PADDING[off])
            parts += some.parts
            off = some.off
    return parts


def _bags_of(value: GatherRequest | UpdateRequest, narrow_ids: bool) -> _Tensors:
    """Ids, weights and offsets: the same for all shards that are asked for the same bags."""
    if value.ids is None and value.weights is None and value.offsets is None:
        return _no_bags()
    known: _Tensors | None = None if value.bags is None else value.bags.made.get((_NAME, narrow_ids))
    if known is None:
        ids = _narrowed(value.ids, narrow_ids)
        known = _Tensors((ids, value.weights, value.offsets))
        if value.bags is not None and ids is value.ids:  # views alone are kept, no copy
            value.bags.made[_NAME, narrow_ids] = known
    return known


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


@cache
def _no_bags() -> _Tensors:
    return _Tensors((None, None, None))


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
_GATHER_HEAD = struct.Struct("<II" + _ENVELOPE + "q?B" + 3 * _SHAPE)
_GATHERED_HEAD = struct.Struct("<II" + _STAMP + _SHAPE)
_INT64, _UINT32, _FLOAT32 = (_NAMES.index(name) for name in ("int64", "uint32", "float32"))
# Of a gather: the last byte of what is fixed says of what dtype sums are asked for, and above that what experts do.
_ACT_SHIFT = 4
_ACT_AT = _COUNTS.size + _GATHER.size - 1
_UPDATE = struct.Struct("<" + _ENVELOPE + "3q3q??BI")
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
        if value.bags is None and (parts := _usual_gather(value)) is not None:
            return parts
        number = _number_of(value.reply_dtype, self.name) | _act_number(value.act, self.name) << _ACT_SHIFT
        return _packed(
            _GATHER.pack(*_envelope(value.envelope), value.lookup_id, value.remember, number),
            value.release,
            value.pin,
            _bags_of(value, narrow_ids),
            _Tensors((value.inputs,)) if value.act else None,
        )

    def decode(self, body: Body) -> GatherRequest:
        of_experts = len(body) > _ACT_AT and body[_ACT_AT] >> _ACT_SHIFT > 0
        read = _Reader(body, _GATHER, 4 if of_experts else 3, self.name)
        ids, weights, offsets, *inputs = read.tensors
        *envelope, lookup_id, remember, number = read.fixed
        sums = number & ((1 << _ACT_SHIFT) - 1)
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
            pin=read.text,
            act=_act_of(number >> _ACT_SHIFT, self.name),
            inputs=inputs[0] if inputs else None,
        )


def _usual_gather(value: GatherRequest) -> Parts | None:
    """The parts of a request that ``read_gather`` reads, in one go; None of others."""
    _, (_, int64, uint32, float32, *_) = _torch()
    ids, weights, offsets = value.ids, value.weights, value.offsets
    if value.act or ids.dtype != uint32 or offsets.dtype != int64 or len(ids.shape) != 1 or len(offsets.shape) != 1:
        return None
    if weights is not None and (weights.dtype != float32 or weights.shape != ids.shape):
        return None
    asked, number, release = value.envelope, _NUMBER_OF.get(value.reply_dtype), value.release
    num_ids, num_offsets = ids.shape[0], offsets.shape[0]
    if number is None or not num_ids or not num_offsets:
        return None
    of_weights = _NO_TENSOR if weights is None else (_FLOAT32, 1, 0, num_ids, 0)
    pin = value.pin.encode() if value.pin else b""
    head = _GATHER_HEAD.pack(
        len(pin), len(release), asked.table_id, asked.epoch, asked.incarnation, asked.table_version, value.lookup_id,
        value.remember, number, _UINT32, 1, 0, num_ids, 0, *of_weights, _INT64, 1, 0, num_offsets, 0,
    )  # fmt: skip
    if release:
        head += _longs(len(release)).pack(*release)
    head += pin
    parts: Parts = [head + _PADDING[len(head) % _ALIGNMENT], _bytes_of(ids)]
    odd = num_ids % 2 == 1
    if odd:
        parts.append(_PADDING[4])
    if weights is not None:
        parts.append(_bytes_of(weights))
        if odd:
            parts.append(_PADDING[4])
    parts.append(_bytes_of(offsets))
    return parts


def read_gather(body: Body, *, own: bool = False) -> ArrayGather | None:
    """A ``GatherRequest`` of what is usual as arrays that lie in the body; None of any other, and of what is none: the
    codec says what is wrong. own: Nobody else can write to the body; what is remembered is copied all the same, as the
    body is larger."""
    if len(body) < _GATHER_HEAD.size:
        return None
    (
        text_bytes, count, table_id, epoch, incarnation, version, lookup_id, remember, sums,
        ids_dtype, ids_dims, _, num_ids, _, weights_dtype, weights_dims, _, num_weights, _,
        offsets_dtype, offsets_dims, _, num_offsets, _,
    ) = _GATHER_HEAD.unpack_from(body)  # fmt: skip
    plain = ids_dtype == _UINT32 and offsets_dtype == _INT64 and (ids_dims, offsets_dims) == (1, 1)
    if not plain or sums or not num_ids or not num_offsets:
        return None
    at, weights, pin = _GATHER_HEAD.size + 8 * count, None, ""
    if text_bytes:
        if (text := bytes(body[at : at + text_bytes])).isascii():
            pin = text.decode()
        else:
            return None
        at += text_bytes
    at = -(-at // _ALIGNMENT) * _ALIGNMENT
    after_ids = at + 4 * num_ids
    after_ids += -after_ids % _ALIGNMENT
    place = after_ids
    if weights_dtype != _ABSENT:
        if (weights_dtype, weights_dims, num_weights) != (_FLOAT32, 1, num_ids):
            return None
        place += 4 * num_weights
        place += -place % _ALIGNMENT
    if place + 8 * num_offsets != len(body):
        return None
    release: tuple[int, ...] = _longs(count).unpack_from(body, _GATHER_HEAD.size) if count else ()
    offsets = np.frombuffer(body, np.int64, num_offsets, place)
    flags = offsets.flags
    if not flags.aligned or not flags.writeable:  # kernels are made for such alone
        return None
    if weights_dtype != _ABSENT:
        weights = np.frombuffer(body, np.float32, num_weights, after_ids)
    ids = np.frombuffer(body, np.uint32, num_ids, at)
    envelope = Envelope(table_id=table_id, epoch=epoch, incarnation=incarnation, table_version=version)
    return ArrayGather(envelope, lookup_id, ids, weights, offsets, remember, release, own and not remember, pin)


def gathered(reply: ArrayGathered) -> Parts:
    """A ``GatherReply`` of arrays, as its codec writes it."""
    stamp, blocks, values = reply
    num_bags, width = values.shape
    head = _GATHERED_HEAD.pack(
        0, len(blocks), stamp.shard, stamp.incarnation, stamp.epoch, stamp.table_version, stamp.writes,
        _FLOAT32, 2, 0, num_bags, width,
    )  # fmt: skip
    head += _longs(len(blocks)).pack(*blocks)
    off = len(head) % _ALIGNMENT
    return [head + _PADDING[off] if off else head, values.data.cast("B")]


class GatherReplies(_Plain):
    name = "GatherReply"

    def _written(self, value: GatherReply, narrow_ids: bool) -> Parts:  # noqa: ARG002
        return _packed(_GATHERED.pack(*_stamp(value.stamp)), value.blocks, "", _Tensors((value.values,)))

    def decode(self, body: Body) -> GatherReply:
        return _usual_reply(body) or self._decoded(body)

    def _decoded(self, body: Body) -> GatherReply:
        read = _Reader(body, _GATHERED, 1, self.name)
        return GatherReply(stamp=_stamp_of(read.fixed), blocks=read.numbers, values=_there(read.tensors[0], self.name))


def _usual_reply(body: Body) -> GatherReply | None:
    """A reply of float32, in one go; None of others, and of what is none."""
    if len(body) < _GATHERED_HEAD.size:
        return None
    text_bytes, count, *stamp, dtype, dims, _, num_bags, width = _GATHERED_HEAD.unpack_from(body)
    at, values = -(-(_GATHERED_HEAD.size + 8 * count) // _ALIGNMENT) * _ALIGNMENT, num_bags * width
    if text_bytes or (dtype, dims) != (_FLOAT32, 2) or not values or at + 4 * values != len(body):
        return None
    torch, dtypes = _torch()
    flat = torch.frombuffer(body, dtype=dtypes[_FLOAT32], count=values, offset=at)
    blocks: tuple[int, ...] = _longs(count).unpack_from(body, _GATHERED_HEAD.size)
    return GatherReply(stamp=_stamp_of(stamp), blocks=blocks, values=flat.view(num_bags, width))


class UpdateRequests(_Plain):
    name = "UpdateRequest"

    def _written(self, value: UpdateRequest, narrow_ids: bool) -> Parts:
        step = value.step_id
        return _packed(
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
                _act_number(value.act, self.name),
                value.input_dim,
            ),
            value.blocks,
            step.group,
            _Tensors((value.grads,)),
            _bags_of(value, narrow_ids),
        )

    def decode(self, body: Body) -> UpdateRequest:
        read = _Reader(body, _UPDATE, 4, self.name)
        grads, ids, weights, offsets = read.tensors
        rank, step, generation, sequence, lookup_id, lookups, hold, want_weight_grad, act, input_dim = read.fixed[4:]
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
            act=_act_of(act, self.name),
            input_dim=input_dim,
        )


class UpdateReplies(_Plain):
    name = "UpdateReply"

    def _written(self, value: UpdateReply, narrow_ids: bool) -> Parts:  # noqa: ARG002
        return _packed(_UPDATED.pack(*_stamp(value.stamp)), (), "", _Tensors((value.weight_grad,)))

    def decode(self, body: Body) -> UpdateReply:
        read = _Reader(body, _UPDATED, 1, self.name)
        return UpdateReply(stamp=_stamp_of(read.fixed), weight_grad=read.tensors[0])


def _number_of(reply_dtype: ReplyDtype, name: str) -> int:
    number = _NUMBER_OF.get(reply_dtype)
    if number is None:
        raise InvalidRequest(f"{name} cannot be sent: reply_dtype = {reply_dtype!r} is none of {', '.join(_SUMS)}")
    return number


def _act_number(act: Act, name: str) -> int:
    if act not in _ACTS:
        raise InvalidRequest(f"{name} cannot be sent: act = {act!r} is none of {', '.join(ACTS)}")
    return _ACTS.index(act)


def _act_of(number: int, name: str) -> Act:
    if number >= len(_ACTS):
        raise InvalidRequest(f"{name} is malformed: it asks for experts of act {number}")
    return _ACTS[number]


def _wide_own(ids: Tensor) -> Tensor:
    """Ids that nobody else can write to: they are checked, and then relied on. Those that come as uint32 are copied
    when they are checked; offsets always are, here."""
    return ids.clone() if ids.dtype.itemsize == 8 else ids


def _there(tensor: Tensor | None, name: str) -> Tensor:
    if tensor is None:
        raise InvalidRequest(f"{name} is malformed: a tensor is missing")
    return tensor
