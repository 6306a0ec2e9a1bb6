"""What a place of checkpoints may be, where it comes from outside: checked before anything looks there."""

import os
import re

from mempool.errors import InvalidRequest

MAX_PLACE_BYTES = 1024

_SCHEME = re.compile(r"[a-z][a-z0-9+.-]{0,31}", re.ASCII)


def check_place(place: str) -> str:
    """The place, found to be an absolute path or a plain URL that means the same to every process of a pool.

    Raises:
        InvalidRequest: It is neither; the message says what to give.
    """
    shown = repr(place if len(place) <= 80 else place[:80] + "...")
    size = len(place.encode("utf-8", "surrogatepass"))
    if not 1 <= size <= MAX_PLACE_BYTES:
        raise InvalidRequest(
            f"the place of a checkpoint, {shown}, has {size:,} bytes; give 1 to {MAX_PLACE_BYTES:,}: a folder's path, "
            "or a URL as 's3://bucket/run-7'. Nothing was changed."
        )
    if any(ord(each) < 32 or 0xD800 <= ord(each) <= 0xDFFF or ord(each) == 127 for each in place):
        raise InvalidRequest(f"the place {shown} has characters that no path has. Nothing was changed.")
    scheme, separator, rest = place.partition("://")
    if "::" in place:
        raise InvalidRequest(f"{shown} is a chain of URLs; give one place, by one URL. Nothing was changed.")
    if separator and not _SCHEME.fullmatch(scheme):
        raise InvalidRequest(f"{shown} has no scheme that there is; write s3://..., file:///... Nothing was changed.")
    path = rest if separator else place
    if ".." in path.split("/"):
        raise InvalidRequest(f"{shown} leads upwards ('..'); write the path that is meant. Nothing was changed.")
    if (not separator or scheme in ("file", "local")) and not path.startswith("/"):
        raise InvalidRequest(
            f"{shown} is no absolute path: every process of the pool looks there, each from a folder of its own. "
            "Nothing was changed."
        )
    return place


def absolute(place: str | os.PathLike[str]) -> str:
    """A place as a user gives it, as ``check_place`` takes it: a relative path is of this process's folder.

    Raises InvalidRequest as that does, and for what is no text.
    """
    try:
        text = os.fspath(place)
    except TypeError:
        raise InvalidRequest(
            f"a checkpoint's place is a path or a URL, and {place!r:.80} is a {type(place).__name__}"
        ) from None
    if not isinstance(text, str):
        raise InvalidRequest(f"a checkpoint's place is text, and {text!r:.80} is bytes")
    if text and "://" not in text:
        text = os.path.abspath(os.path.expanduser(text))
    return check_place(text)
