"""What ranks may say to their group's home, and what keeping it costs there, in bytes."""

from mempool.errors import InvalidRequest
from mempool.types.groups.meeting import MeetRequest, Word

MAX_RANKS = 4096
PART_BYTES = 128
"""Of an arrival, and of each table in one, besides its sequences."""
_MEMBER_BYTES = 1024
_MAX_HOST = 1_000
_NUMBER_BYTES = 8


def check_request(request: MeetRequest) -> None:
    """Raises InvalidRequest where a rank says what none can."""
    terms = request.terms
    if max(len(request.host), len(request.launcher)) > _MAX_HOST:
        raise InvalidRequest(f"a rank's host and launcher are named in at most {_MAX_HOST} characters each.")
    if not 1 <= terms.world_size <= MAX_RANKS:
        raise InvalidRequest(f"world_size = {terms.world_size}: a group has 1 to {MAX_RANKS} ranks.")
    if not 0 <= request.rank < terms.world_size:
        raise InvalidRequest(f"rank = {request.rank} of world_size = {terms.world_size}: ranks are counted from 0.")
    if request.kind in ("beat", "arrive") and not request.generation:
        raise InvalidRequest(f"rank {request.rank} of group {request.group!r} has not joined.")
    if request.kind == "arrive" and not request.meeting:
        raise InvalidRequest("meetings are counted from 1.")


def bytes_of(arrival: MeetRequest | None) -> int:
    """What keeping it costs; None: nothing."""
    if arrival is None:
        return 0
    return PART_BYTES + sum(PART_BYTES + _NUMBER_BYTES * len(part.sequences) for part in arrival.parts)


def bytes_of_member(said: MeetRequest) -> int:
    """What it costs to know a rank, by what it has said first."""
    return _MEMBER_BYTES + 4 * (len(said.host) + len(said.launcher))


def bytes_of_word(word: Word | None) -> int:
    """As ``bytes_of``."""
    if word is None:
        return 0
    parts = sum(PART_BYTES + _NUMBER_BYTES * len(part.sequences) for part in word.parts)
    return PART_BYTES + 4 * len(word.message) + parts
