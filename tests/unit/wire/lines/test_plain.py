"""Gathers and updates of a line come out as they went in; no bytes that are none do harm."""

import hashlib
from dataclasses import replace
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempool.errors import InvalidRequest
from mempool.types import Envelope, GatherReply, GatherRequest, Stamp, StepId, UpdateReply, UpdateRequest
from mempool.types.bags import Bags
from mempool.types.messages import ArrayGather, ArrayGathered
from mempool.wire.lines import plain
from mempool.wire.lines.framing import REQUEST, VERSION, Message, header_of
from mempool.wire.lines.methods import GATHER, UPDATE

NUMBERS = st.integers(0, 2**63 - 1)
ENVELOPES = st.builds(Envelope, table_id=NUMBERS, epoch=NUMBERS, incarnation=NUMBERS, table_version=NUMBERS)
STAMPS = st.builds(Stamp, shard=NUMBERS, incarnation=NUMBERS, epoch=NUMBERS, table_version=NUMBERS)
FEW = st.lists(st.integers(0, 2**40), max_size=5).map(tuple)
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])


def vectors(dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    return st.integers(0, 9).map(lambda size: torch.arange(size).to(dtype))


@st.composite
def matrices(draw: st.DrawFn) -> Tensor:
    return torch.rand(draw(st.integers(0, 4)), draw(st.integers(0, 5))).to(draw(FLOATS))


WEIGHTS = st.none() | FLOATS.flatmap(vectors)
EXPERTS = st.just(("", None)) | st.tuples(st.sampled_from(["gelu", "relu", "silu"]), matrices())
GATHERS = st.builds(
    lambda experts, **rest: GatherRequest(act=experts[0], inputs=experts[1], **rest),
    experts=EXPERTS,
    envelope=ENVELOPES,
    lookup_id=NUMBERS,
    ids=vectors(torch.int64),
    weights=WEIGHTS,
    offsets=vectors(torch.int64),
    remember=st.booleans(),
    release=FEW,
    reply_dtype=st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"]),
    pin=st.sampled_from(["", "8c1e"]),
)
STEPS = st.builds(StepId, group=st.text(max_size=9), rank=NUMBERS, step=NUMBERS, generation=NUMBERS)
UPDATES = st.builds(
    UpdateRequest,
    envelope=ENVELOPES,
    step_id=STEPS,
    sequence=NUMBERS,
    lookup_id=NUMBERS,
    blocks=FEW,
    grads=matrices(),
    hold=st.booleans(),
    want_weight_grad=st.booleans(),
    lookups=NUMBERS,
    ids=st.none() | vectors(torch.int64),
    weights=WEIGHTS,
    offsets=st.none() | vectors(torch.int64),
    act=st.sampled_from(["", "gelu", "relu", "silu"]),
    input_dim=st.integers(0, 2**16),
)
REPLIES = [
    (GATHER.reply, st.builds(GatherReply, stamp=STAMPS, blocks=FEW, values=matrices())),
    (UPDATE.reply, st.builds(UpdateReply, stamp=STAMPS, weight_grad=st.none() | vectors(torch.float32))),
]


def assert_same(found: Any, expected: Any) -> None:
    for name in type(expected).__slots__:
        one, other = getattr(found, name), getattr(expected, name)
        if isinstance(other, Tensor):
            assert one.shape == other.shape
            assert one.to(torch.float64).equal(other.to(torch.float64)), name
        else:
            assert one == other, name


def test_bags_are_laid_out_once_for_all_shards_that_are_asked_for_them() -> None:
    """As views: nothing of them is copied, and what else a request has is its own."""
    bags = Bags(torch.arange(5), torch.rand(5), torch.tensor([0, 2, 5]))
    tensors = {"ids": bags.ids, "weights": bags.weights, "offsets": bags.offsets, "bags": bags}
    found = []
    for shard in range(3):
        envelope = Envelope(table_id=1, epoch=2, incarnation=3 + shard)
        released = tuple(range(shard))
        gather = GatherRequest(envelope=envelope, lookup_id=7, remember=True, release=released, **tensors)
        step = StepId(group="g" * shard, rank=0, step=1)
        grads = torch.rand(2, 1 + shard)
        update = UpdateRequest(
            envelope=envelope, step_id=step, sequence=1, lookup_id=7, blocks=(shard,), grads=grads, hold=True,
            want_weight_grad=True, **tensors,
        )  # fmt: skip
        for codec, request in ((GATHER.request, gather), (UPDATE.request, update)):
            parts = codec.parts(request)
            assert_same(codec.decode(bytearray(b"".join(parts))), replace(request, bags=None))
            found.append({id(part) for part in parts if isinstance(part, memoryview)})
    assert len(set.intersection(*found)) == 3
    bags.ids[0] = 99
    assert GATHER.request.decode(bytearray(GATHER.request.encode(gather))).ids.tolist() == [99, 1, 2, 3, 4]


def test_ids_that_are_narrowed_are_not_kept() -> None:
    bags = Bags(torch.arange(5), None, torch.tensor([0, 5]))
    request = GatherRequest(
        envelope=Envelope(table_id=1, epoch=2, incarnation=3), lookup_id=7, remember=True, ids=bags.ids, weights=None,
        offsets=bags.offsets, bags=bags,
    )  # fmt: skip
    for narrow, dtype in ((True, torch.uint32), (False, torch.int64), (True, torch.uint32)):
        decoded = GATHER.request.decode(bytearray(GATHER.request.encode(request, narrow_ids=narrow)))
        assert decoded.ids.dtype == dtype
        assert decoded.ids.tolist() == [0, 1, 2, 3, 4]


@given(request=GATHERS, narrow=st.booleans())
@settings(max_examples=80, deadline=None)
def test_gathers_come_out_as_they_went_in(request: GatherRequest, narrow: bool) -> None:
    found = GATHER.request.decode(bytearray(GATHER.request.encode(request, narrow_ids=narrow)))
    assert_same(found, request)
    assert found.ids.dtype == (torch.uint32 if narrow and len(request.ids) else found.ids.dtype)


@given(request=UPDATES, narrow=st.booleans())
@settings(max_examples=80, deadline=None)
def test_updates_come_out_as_they_went_in(request: UpdateRequest, narrow: bool) -> None:
    assert_same(UPDATE.request.decode(bytearray(UPDATE.request.encode(request, narrow_ids=narrow))), request)


@pytest.mark.parametrize(("codec", "replies"), REPLIES)
@given(data=st.data())
@settings(max_examples=40, deadline=None)
def test_replies_come_out_as_they_went_in(codec: Any, replies: st.SearchStrategy[Any], data: st.DataObject) -> None:
    reply = data.draw(replies)
    assert_same(codec.decode(bytearray(codec.encode(reply))), reply)


@given(request=GATHERS, data=st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_no_request_is_refused_or_read_within_its_bytes(request: GatherRequest, data: st.DataObject) -> None:
    body = bytearray(GATHER.request.encode(request))
    at = data.draw(st.integers(0, len(body) - 1))
    if data.draw(st.booleans()):
        del body[at:]
    else:
        body[at] ^= data.draw(st.integers(1, 255))
    try:
        found = GATHER.request.decode(body)
    except InvalidRequest:
        return
    tensors = [tensor for tensor in (found.ids, found.weights, found.offsets) if tensor is not None]
    assert sum(tensor.nbytes for tensor in tensors) <= len(body)


def as_request(asked: ArrayGather) -> GatherRequest:
    return GatherRequest(
        envelope=asked.envelope,
        lookup_id=asked.lookup_id,
        ids=torch.from_numpy(asked.ids),
        weights=None if asked.weights is None else torch.from_numpy(asked.weights),
        offsets=torch.from_numpy(asked.offsets),
        remember=asked.remember,
        release=asked.release,
        pin=asked.pin,
    )


@given(request=GATHERS, shared=st.booleans())
@settings(max_examples=150, deadline=None)
def test_the_usual_gather_is_read_as_arrays_however_it_was_written(request: GatherRequest, shared: bool) -> None:
    bags = Bags(ids=request.ids, weights=request.weights, offsets=request.offsets) if shared else None
    request = replace(request, ids=request.ids.to(torch.uint32), bags=bags)  # of bags for several shards, or not
    body = bytearray(b"".join(GATHER.request.parts(request)))
    asked = plain.read_gather(body)
    weights = request.weights
    sized = len(request.ids) and len(request.offsets) and (weights is None or len(weights) == len(request.ids))
    usual = (
        sized
        and not request.act
        and request.reply_dtype == "float32"
        and (weights is None or weights.dtype == torch.float32)
    )
    assert (asked is not None) == bool(usual and request.pin.isascii())
    assert_same(GATHER.request.decode(body), replace(request, bags=None))
    if asked is not None:
        assert not asked.private
        assert_same(as_request(asked), replace(request, bags=None))


@given(request=GATHERS, data=st.data())
@settings(max_examples=150, deadline=None)
def test_what_is_no_usual_gather_is_none_or_read_within_its_bytes(request: GatherRequest, data: st.DataObject) -> None:
    body = bytearray(GATHER.request.encode(replace(request, ids=request.ids.to(torch.uint32))))
    at = data.draw(st.integers(0, len(body) - 1))
    if data.draw(st.booleans()):
        del body[at:]
    else:
        body[at] ^= data.draw(st.integers(1, 255))
    asked = plain.read_gather(body)
    if asked is not None:
        arrays = [array for array in (asked.ids, asked.weights, asked.offsets) if array is not None]
        assert sum(array.nbytes for array in arrays) <= len(body)
        assert_same(as_request(asked), GATHER.request.decode(body))


def test_arrays_that_kernels_are_not_made_for_are_none() -> None:
    request = GatherRequest(
        envelope=Envelope(table_id=1, epoch=1, incarnation=1),
        lookup_id=0,
        ids=torch.tensor([1, 2], dtype=torch.uint32),
        weights=None,
        offsets=torch.tensor([0, 2]),
        remember=False,
    )
    body = GATHER.request.encode(request)
    assert plain.read_gather(bytearray(body)) is not None
    assert plain.read_gather(body) is None  # not to be written to
    odd = bytearray(1) + body
    assert plain.read_gather(memoryview(odd)[1:]) is None  # not aligned


@given(stamp=STAMPS, blocks=FEW, shape=st.tuples(st.integers(1, 4), st.integers(1, 5)))
@settings(max_examples=40, deadline=None)
def test_answers_that_are_arrays_are_read_as_any(stamp: Stamp, blocks: tuple[int, ...], shape: tuple[int, int]) -> None:
    values = torch.rand(shape)
    body = b"".join(plain.gathered(ArrayGathered(stamp, blocks, values.numpy())))
    assert body == GATHER.reply.encode(GatherReply(stamp=stamp, blocks=blocks, values=values))
    assert_same(GATHER.reply.decode(bytearray(body)), GatherReply(stamp=stamp, blocks=blocks, values=values))


@pytest.mark.parametrize("value", [torch.zeros(2, dtype=torch.complex64), torch.zeros(1, 1, 1)])
def test_a_tensor_that_has_no_place_is_said_to_have_none(value: Tensor) -> None:
    with pytest.raises(InvalidRequest, match="has no place in a message"):
        UPDATE.reply.encode(
            UpdateReply(stamp=Stamp(shard=0, incarnation=0, epoch=0, table_version=0), weight_grad=value)
        )


def test_another_layout_is_another_version() -> None:
    """The ends of a line over TCP may be of different builds: VERSION tells them apart. Where
    this fails, raise it, in framing.py and data.proto."""
    envelope = Envelope(table_id=1, epoch=2, incarnation=3, table_version=4)
    stamp = Stamp(shard=1, incarnation=2, epoch=3, table_version=4, writes=5)
    ids, weights, offsets = torch.arange(3), torch.ones(3), torch.tensor([0, 1, 3])
    values = torch.ones(2, 3)
    step = StepId(group="g", rank=1, step=2, generation=3)
    bodies = [
        GATHER.request.encode(
            GatherRequest(
                envelope=envelope, lookup_id=5, ids=ids, weights=weights, offsets=offsets, remember=True, release=(7, 8)
            ),
            narrow_ids=True,
        ),
        GATHER.reply.encode(GatherReply(stamp=stamp, blocks=(0, 2), values=values)),
        UPDATE.request.encode(
            UpdateRequest(
                envelope=envelope,
                step_id=step,
                sequence=4,
                lookup_id=5,
                blocks=(0,),
                grads=values,
                hold=True,
                want_weight_grad=True,
                ids=ids,
                weights=weights,
                offsets=offsets,
            )
        ),
        UPDATE.reply.encode(UpdateReply(stamp=stamp, weight_grad=weights)),
        header_of(Message(REQUEST, 1, 2, 3), 4),
    ]
    assert VERSION == 5
    assert hashlib.sha256(b"".join(bodies)).hexdigest()[:16] == "63f293344ad54a3c"
