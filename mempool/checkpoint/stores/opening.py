"""From what a user gives as a place to its store."""

import os
from pathlib import Path

from mempool.checkpoint.stores.local import LocalStore
from mempool.checkpoint.stores.remote import FsspecStore
from mempool.checkpoint.stores.store import Store
from mempool.errors import InvalidRequest


def open_store(place: str | os.PathLike[str]) -> Store:
    """The store of a place. Nothing is read or written yet.

    Args:
        place: A path, file:///path, or a URL of any scheme that fsspec knows: "s3://bucket/run-7", by the user's own
            package for it and its own configuration.

    Raises:
        InvalidRequest: No such scheme, or its package is not installed.
    """
    if isinstance(place, os.PathLike):
        return LocalStore(Path(place))
    scheme, separator, rest = place.partition("://")
    if not separator:
        if not place:
            raise InvalidRequest("the place of a checkpoint is empty; give a folder or a URL, as 's3://bucket/run-7'")
        return LocalStore(place)
    if scheme in ("file", "local"):
        if not rest.startswith("/"):
            raise InvalidRequest(f"{place!r} is not absolute; write file:///path, or the path alone")
        return LocalStore(rest)
    import fsspec  # here: most never need it, and it takes a while

    try:
        file_system, root = fsspec.core.url_to_fs(place)
    except (ValueError, ImportError) as error:
        raise InvalidRequest(f"cannot use {place!r} as a place of checkpoints: {error}") from error
    return FsspecStore(place, file_system, str(root))
