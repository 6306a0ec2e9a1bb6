"""Old checkpoints away, and what interrupted ones left: only files that no kept manifest names, and only ours."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from mempool.checkpoint.commit import names, number_of, read_manifest
from mempool.checkpoint.format.manifest import MANIFEST, manifest_path
from mempool.checkpoint.stores import Store
from mempool.checkpoint.stores.local import ASIDE
from mempool.errors import DataLoss, InvalidRequest, NotFound

_OURS = (".safetensors", ASIDE, MANIFEST)


@dataclass(frozen=True, slots=True, kw_only=True)
class Removed:
    """What was removed. files: Their number, manifests among them."""

    checkpoints: tuple[str, ...]
    files: int
    num_bytes: int


def keep_newest(store: Store, keep: int) -> Removed:
    """Remove all checkpoints but the newest ``keep``, and files that no checkpoint names.

    Manifests go first, oldest first: one that is there names files that are there, wherever this ends. Files of a
    checkpoint in the making, which is newer than any that is whole, are left alone.

    Raises:
        InvalidRequest: ``keep`` is below 1, or a manifest is of a newer format.
        DataLoss: A manifest is damaged: what it names is not known. Remove it by name first.
    """
    if keep < 1:
        raise InvalidRequest(f"keep={keep}: at least the newest checkpoint is kept; give 1 or more")
    there = names(store.list())
    return _remove(store, there[:-keep])


def remove(store: Store, name: str) -> Removed:
    """Remove one checkpoint, damaged or not, and files that no other one names. Raises NotFound; else as above."""
    if name not in names(store.list()):
        raise NotFound(f"{store.url} has no checkpoint {name!r}")
    return _remove(store, [name])


def _remove(store: Store, gone: Iterable[str]) -> Removed:
    gone = tuple(gone)
    listed = store.list()
    kept = [name for name in names(listed) if name not in gone]
    needed = {path for name in kept for path in _needed(store, name)}
    newest = max((number for name in kept if (number := number_of(name)) is not None), default=0)
    unneeded = [path for path in listed if path not in needed and _is_old(path, newest, gone)]
    manifests = [manifest_path(name) for name in gone]
    for path in manifests:
        store.remove(path)
    for path in unneeded:
        if path not in manifests:
            store.remove(path)
    return Removed(checkpoints=gone, files=len(unneeded), num_bytes=sum(listed[path] for path in unneeded))


def _needed(store: Store, name: str) -> Iterator[str]:
    try:
        files = read_manifest(store, name).files
    except DataLoss as error:
        raise DataLoss(
            f"{error}. Nothing was removed, as what it reads is not known; remove {name!r} by name"
        ) from None
    yield from (*files, manifest_path(name))


def _is_old(path: str, newest: int, gone: tuple[str, ...]) -> bool:
    """Whether a file is of a checkpoint that is not newer than the newest whole one; others' files are not ours."""
    folder, _, name = path.partition("/")
    number = number_of(folder)
    return number is not None and name.endswith(_OURS) and "/" not in name and (number <= newest or folder in gone)
