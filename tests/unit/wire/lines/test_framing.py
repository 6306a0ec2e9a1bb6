"""Headers of messages come out as they went in; what is none is refused."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mempool.errors import InvalidRequest
from mempool.wire.lines.framing import (
    COPIED,
    HEADER_BYTES,
    MOST_INLINE_BYTES,
    REPLY,
    REQUEST,
    Message,
    header_of,
    parsed,
)

MESSAGES = st.builds(
    Message,
    st.integers(REQUEST, COPIED),
    st.integers(0, 2**32 - 1),
    st.integers(0, 2**16 - 1),
    st.integers(-1, 2**40),
    st.integers(0, MOST_INLINE_BYTES),
    st.none() | st.integers(0, 2**30),
)


@given(message=MESSAGES, before=st.binary(max_size=9))
def test_headers_come_out_as_they_went_in(message: Message, before: bytes) -> None:
    data = before + header_of(message, message.num_bytes, message.place)
    assert len(data) == len(before) + HEADER_BYTES
    assert parsed(data, len(before)) == message


@pytest.mark.parametrize(
    "header",
    [
        header_of(Message(0, 1)),
        header_of(Message(9, 1)),
        header_of(Message(REPLY, 1), MOST_INLINE_BYTES + 1),
        header_of(Message(REQUEST, 1))[:5] + b"\x07" + header_of(Message(REQUEST, 1))[6:],
    ],
)
def test_what_is_no_message_is_refused(header: bytes) -> None:
    with pytest.raises(InvalidRequest, match="no message"):
        parsed(header)
