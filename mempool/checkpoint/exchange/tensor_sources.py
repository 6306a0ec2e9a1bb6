"""Tensors of a file by name, some rows at a time: safetensors anywhere, what torch.save wrote on this host.

What they mean is for ``layouts``. Nothing is unpickled but tensors (weights_only).
"""

import errno
import os
import pickle
from collections.abc import Iterator, Mapping
from typing import Protocol

import torch
from torch import Tensor

from mempool.checkpoint.format.tensor_file import ITEM_BYTES, Header, TensorEntry, read_header
from mempool.checkpoint.stores import Store, open_file
from mempool.checkpoint.stores.local import LocalStore
from mempool.checkpoint.stores.store import place_of, told
from mempool.errors import DataLoss, InvalidRequest, NotFound

_ZIP, _PICKLE = b"PK", b"\x80"
"""How files of torch.save begin: of today, and of before 1.6."""


class TensorSource(Protocol):
    """The tensors of one file.

    Attributes:
        where: The file, for messages.
        tensors: What there is.
        metadata: The file's own texts; torch.save has none.
    """

    @property
    def where(self) -> str: ...

    @property
    def tensors(self) -> Mapping[str, TensorEntry]: ...

    @property
    def metadata(self) -> Mapping[str, str]: ...

    def rows(self, name: str, first: int, count: int) -> Tensor:
        """``count`` rows (of the first dimension) of a tensor."""


def open_tensors(place: str | os.PathLike[str]) -> TensorSource:
    """Open a file of tensors: by what it holds, not by its name.

    Raises:
        NotFound: There is no such file.
        InvalidRequest: It is nothing that can be read.
        DataLoss: It is damaged.
    """
    store, name = open_file(place)
    size = store.list().get(name) if not isinstance(store, LocalStore) else _size(store, name)
    if size is None:
        raise NotFound(f"{place_of(store.url, name)}: there is no such file")
    beginning = bytearray(min(8, size))
    store.read_into(name, 0, memoryview(beginning))
    # A safetensors file begins with a small number of eight bytes, which neither of these is.
    if beginning.startswith((_ZIP, _PICKLE)) and any(beginning[4:]):
        return _SavedByTorch(store, name)
    return _Safetensors(store, name, size)


class _Safetensors:
    def __init__(self, store: Store, name: str, size: int) -> None:
        self._store, self._name = store, name
        self.where = place_of(store.url, name)
        self._header: Header = read_header(store, name, size)
        self.tensors = {name: entry for name, (entry, _) in self._header.tensors.items()}
        self.metadata = self._header.metadata

    def rows(self, name: str, first: int, count: int) -> Tensor:
        entry, offset = self._header.tensors[name]
        row = entry.num_bytes // entry.shape[0] if entry.shape[0] else 0
        buffer = bytearray(count * row)
        self._store.read_into(self._name, offset + first * row, memoryview(buffer))
        shape = (count, *entry.shape[1:])
        dtype: torch.dtype = getattr(torch, entry.dtype)
        return torch.frombuffer(buffer, dtype=dtype).view(shape) if buffer else torch.empty(shape, dtype=dtype)


class _SavedByTorch:
    def __init__(self, store: Store, name: str) -> None:
        self.where = place_of(store.url, name)
        self.metadata: Mapping[str, str] = {}
        if not isinstance(store, LocalStore):
            raise InvalidRequest(
                f"{self.where} was written by torch.save, which is read from this host's disks: copy it"
            )
        path = store.root / name
        with told("read", store.url, name):
            try:
                try:
                    saved = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
                except RuntimeError:  # of a format that cannot be mapped
                    saved = torch.load(path, map_location="cpu", weights_only=True)
            except pickle.UnpicklingError as error:
                reason = str(error).partition("\n")[0]
                raise InvalidRequest(
                    f"{self.where} holds more than tensors, which nobody should unpickle ({reason}). Save the "
                    f"state_dict alone, or as safetensors"
                ) from None
            except (RuntimeError, EOFError, ValueError, KeyError, OSError) as error:
                if isinstance(error, OSError) and error.errno != errno.EINVAL:  # torch seeks before the beginning
                    raise
                raise DataLoss(
                    f"{self.where} cannot be read: {str(error).partition(chr(10))[0]}. Is it whole?"
                ) from None
        self._saved = dict(_flat(saved, ""))
        self.tensors = {
            name: TensorEntry(name=name, dtype=_name(tensor), shape=tuple(tensor.shape))
            for name, tensor in self._saved.items()
            if _name(tensor) in ITEM_BYTES
        }

    def rows(self, name: str, first: int, count: int) -> Tensor:
        return self._saved[name][first : first + count].detach().contiguous()


def _flat(saved: object, path: str) -> Iterator[tuple[str, Tensor]]:
    """Tensors of dictionaries in dictionaries, by their path."""
    if isinstance(saved, Tensor):
        yield path or "weight", saved
    elif isinstance(saved, Mapping):
        for name, value in saved.items():
            yield from _flat(value, f"{path}.{name}" if path else str(name))


def _name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.") if tensor.layout == torch.strided else ""


def _size(store: LocalStore, name: str) -> int | None:
    with told("read", store.url, name):
        path = store.root / name
        return path.stat().st_size if path.is_file() else None
