"""Gathers as arrays are what the codecs of all messages read and write, to the byte; of the rest there are none."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from mempool.errors import InvalidRequest
from mempool.types import Envelope, GatherReply, GatherRequest, Stamp
from mempool.types.messages import ArrayGather, ArrayGathered
from mempool.wire.codecs import arrays
from mempool.wire.codecs.messages import GATHER_REPLY, GATHER_REQUEST

NUMBERS = st.integers(0, 2**63 - 1)
FEW = st.lists(st.integers(0, 2**40), max_size=5).map(tuple)
FLOATS = st.sampled_from([torch.float32, torch.bfloat16])
USUAL = GatherRequest(
    envelope=Envelope(table_id=2**52, epoch=3, incarnation=2**40, table_version=9),
    lookup_id=2**60 + 7,
    ids=torch.tensor([5, 1, 4, 1], dtype=torch.int32).view(torch.uint32),
    weights=torch.tensor([1.0, -2.5, 0.0, 3.0]),
    offsets=torch.tensor([0, 3, 3, 4]),
    remember=True,
    release=(1, 2**50),
)


def vectors(dtype: torch.dtype) -> st.SearchStrategy[Tensor]:
    return st.integers(0, 9).map(lambda size: torch.arange(size).to(dtype))


@st.composite
def gathers(draw: st.DrawFn) -> GatherRequest:
    act, inputs = draw(st.just(("", None)) | st.just(("gelu", torch.rand(2, 3))))
    return GatherRequest(
        envelope=Envelope(**_numbers(draw, Envelope)),
        lookup_id=draw(NUMBERS),
        ids=draw(st.sampled_from([torch.int64, torch.uint32]).flatmap(vectors)),
        weights=draw(st.none() | FLOATS.flatmap(vectors)),
        offsets=draw(vectors(torch.int64)),
        remember=draw(st.booleans()),
        release=draw(FEW),
        reply_dtype=draw(st.sampled_from(["float32", "bfloat16", "float8_e4m3fn"])),
        pin=draw(st.sampled_from(["", "8c1e"])),
        act=act,
        inputs=inputs,
    )


def _numbers(draw: st.DrawFn, of: type) -> dict[str, int]:
    return {name: draw(NUMBERS) for name in of.__slots__}  # type: ignore[attr-defined]


def is_same(found: ArrayGather, expected: GatherRequest) -> bool:
    weights = (found.weights is None and expected.weights is None) or np.array_equal(found.weights, expected.weights)
    return (
        found[:2] == (expected.envelope, expected.lookup_id)
        and np.array_equal(found.ids, expected.ids)
        and bool(weights)
        and np.array_equal(found.offsets, expected.offsets)
        and (found.remember, found.release, found.private) == (expected.remember, expected.release, True)
        and (expected.pin, expected.act, expected.reply_dtype) == ("", "", "float32")
    )


@given(request=gathers(), narrow=st.booleans())
@settings(max_examples=150, deadline=None)
def test_what_is_usual_is_read_as_the_codec_reads_it_and_nothing_else(request: GatherRequest, narrow: bool) -> None:
    frame = GATHER_REQUEST.encode(request, narrow_ids=narrow)
    found = arrays.read_gather(frame)
    read = GATHER_REQUEST.decode(frame)
    usual = (
        read.ids.dtype == torch.uint32 and read.ids.numel() > 0 and read.offsets.numel() > 0
        and (read.weights is None or (read.weights.dtype == torch.float32 and read.weights.shape == read.ids.shape))
        and (read.pin, read.act, read.reply_dtype) == ("", "", "float32")
    )  # fmt: skip
    assert (found is not None) == usual
    assert found is None or is_same(found, read)


def test_its_arrays_are_its_own_and_kernels_may_have_them() -> None:
    frame = GATHER_REQUEST.encode(USUAL)
    found = arrays.read_gather(frame)
    assert found is not None
    for array in (found.ids, found.weights, found.offsets):
        assert array.flags.writeable
        assert array.flags.aligned
        array[:] = 0
    again = arrays.read_gather(frame)
    assert again is not None
    assert is_same(again, USUAL)


@given(data=st.data())
@settings(max_examples=300, deadline=None)
def test_of_other_bytes_nothing_is_read_that_the_codec_does_not_read(data: st.DataObject) -> None:
    frame = bytearray(GATHER_REQUEST.encode(USUAL))
    at = data.draw(st.integers(0, len(frame) - 1))
    if data.draw(st.booleans()):
        del frame[at:]
    else:
        frame[at] ^= data.draw(st.integers(1, 255))
    found = arrays.read_gather(bytes(frame))
    if found is None:
        return
    try:
        read = GATHER_REQUEST.decode(bytes(frame))
    except InvalidRequest:
        pytest.fail("the codec refuses it")
    assert is_same(found, read)


def test_what_is_not_small_is_left_to_the_codec() -> None:
    ids = torch.zeros(2**15, dtype=torch.int32).view(torch.uint32)
    request = replace(USUAL, ids=ids, weights=None, offsets=torch.tensor([0, 2**15]))
    assert arrays.read_gather(GATHER_REQUEST.encode(request)) is None


@given(
    stamp=st.builds(Stamp, **{**dict.fromkeys(Stamp.__slots__, NUMBERS), "shard": st.integers(0, 2**32 - 1)}),
    blocks=FEW.map(lambda some: tuple(each % 2**32 for each in some)),
    bags=st.integers(1, 5),
    width=st.integers(1, 40),
)
@settings(max_examples=60, deadline=None)
def test_answers_are_the_codecs_to_the_byte(stamp: Any, blocks: tuple[int, ...], bags: int, width: int) -> None:
    values = np.random.default_rng(bags).standard_normal((bags, width)).astype(np.float32)
    expected = GATHER_REPLY.encode(GatherReply(stamp=stamp, blocks=blocks, values=torch.from_numpy(values)))
    assert arrays.gathered(ArrayGathered(stamp, blocks, values)) == expected
