"""Messages of a line come out as they went in, however the stream is cut; what is none is refused."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.errors import InvalidRequest
from mempool.wire.near.framing import COPIED, HEADER_BYTES, REPLY, REQUEST, Message, Reader

MESSAGES = st.builds(
    lambda kind, call, method, timeout_us, body, place: Message(
        kind, call, method, timeout_us, len(body), place, b"" if place is not None else body
    ),
    st.integers(REQUEST, COPIED),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**16 - 1),
    st.integers(-1, 2**40),
    st.binary(max_size=80),
    st.none() | st.integers(0, 2**30),
)


@given(messages=st.lists(MESSAGES, max_size=12), cuts=st.lists(st.integers(1, 50), min_size=1, max_size=40))
@settings(max_examples=150, deadline=None)
def test_messages_come_out_as_they_went_in(messages: list[Message], cuts: list[int]) -> None:
    stream = b"".join(message.header() + message.body for message in messages)
    reader, found, at, number = Reader(), [], 0, 0
    while at < len(stream):
        piece = cuts[number % len(cuts)]
        found += reader.feed(stream[at : at + piece])
        at, number = at + piece, number + 1
    assert found == messages


@pytest.mark.parametrize(
    "header", [Message(0, 1).header(), Message(9, 1).header(), Message(REPLY, 1, num_bytes=2**40).header()]
)
def test_what_is_no_message_is_refused(header: bytes) -> None:
    for cut in (HEADER_BYTES, 7):
        reader, last = Reader(), (HEADER_BYTES - 1) // cut * cut
        for first in range(0, last, cut):
            assert not list(reader.feed(header[first : first + cut]))
        with pytest.raises(InvalidRequest, match="no message"):
            list(reader.feed(header[last:]))
