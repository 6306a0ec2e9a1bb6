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
    return _opened(place, own_names=False)


def open_file(place: str | os.PathLike[str]) -> tuple[Store, str]:
    """The store of the folder that a file of the user's is in, or shall be in, and its name there. Raises as above."""
    text = os.fspath(place)
    scheme, separator, rest = text.partition("://")
    folder, _, name = (rest if separator else os.path.abspath(os.path.expanduser(text))).rpartition("/")
    if not name:
        raise InvalidRequest(f"{text!r} is no file's name; give a file or its URL")
    return _opened(f"{scheme}://{folder or '/'}" if separator else folder or "/", own_names=True), name


def _opened(place: str | os.PathLike[str], *, own_names: bool) -> Store:
    if isinstance(place, os.PathLike):
        return LocalStore(Path(place), own_names=own_names)
    scheme, separator, rest = place.partition("://")
    if not separator:
        if not place:
            raise InvalidRequest("the place of a checkpoint is empty; give a folder or a URL, as 's3://bucket/run-7'")
        return LocalStore(place, own_names=own_names)
    if scheme in ("file", "local"):
        if not rest.startswith("/"):
            raise InvalidRequest(f"{place!r} is not absolute; write file:///path, or the path alone")
        return LocalStore(rest, own_names=own_names)
    import fsspec  # here: most never need it, and it takes a while

    try:
        file_system, root = fsspec.core.url_to_fs(place)
    except (ValueError, ImportError) as error:
        raise InvalidRequest(f"cannot use {place!r} as a place of checkpoints: {error}") from error
    return FsspecStore(place, file_system, str(root), own_names=own_names)
