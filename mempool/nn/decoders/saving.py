"""What retrofit added to a model, as a directory beside the model's own: the layers' parameters, what they are made of,
and which table, at which step, they go with. The values stay in the pool."""

import atexit
import json
import os
import warnings
from collections.abc import Mapping
from typing import Any, TypeVar

import torch.distributed as dist
from torch import Tensor, nn

from mempool.checkpoint.exchange.table_file import TableFile
from mempool.checkpoint.exchange.tensor_sources import TensorSource, open_tensors
from mempool.checkpoint.format.tensor_file import TensorEntry
from mempool.client import Pool, Table, connect
from mempool.errors import DataLoss, InvalidRequest
from mempool.nn.decoders.blocks import places_of
from mempool.nn.decoders.fitting import Fitted, fit, fitted_in, made_for
from mempool.nn.layer import MemoryLayer

Model = TypeVar("Model", bound=nn.Module)

_FILE = "memory.safetensors"
_WHAT = "mempool.retrofit"
"""The file's own text: JSON of format, layers and tables."""
_FORMAT = 1


def save_pretrained(model: nn.Module, directory: str | os.PathLike[str]) -> None:
    """Write what ``retrofit`` added to a model: ``memory.safetensors`` in a directory, whole or as it was.

    The parameters of the memory layers (megabytes), what the layers are made of, and of each table its pool's address,
    its name and its step. Neither the model around them, which has a ``save_pretrained`` of its own, nor the values:
    ``Pool.checkpoint`` keeps those. With a process group every rank calls it, and the first one writes.

    Args:
        model: Retrofitted; may be wrapped (DDP, ``torch.compile``) or sharded (FSDP2).
        directory: Made if it is not there; a path, or a URL that fsspec knows.

    Raises:
        InvalidRequest: Nothing was retrofitted, or a layer was given modules or functions, which no file can have.
        StorageFailed: The directory does not take it.
        MempoolError: The pool does not say at which step a table is.
    """
    bare, fitted = _fitted(model)
    described = [_checked(each) for each in fitted]
    layers = {each.layer: bare.get_submodule(each.layer) for each in fitted}
    tensors = {
        f"{prefix}.{name}": _whole(tensor)
        for prefix, layer in layers.items()
        for name, tensor in layer.state_dict().items()
    }
    if dist.is_available() and dist.is_initialized() and dist.get_rank() != 0:
        return
    tables = {layer.table.name: layer.table for layer in layers.values() if isinstance(layer, MemoryLayer)}
    steps = {name: _described(table) for name, table in tables.items()}
    what = json.dumps({"format": _FORMAT, "layers": described, "tables": steps})
    entries = [
        TensorEntry(name=name, dtype=str(tensor.dtype).removeprefix("torch."), shape=tuple(tensor.shape))
        for name, tensor in tensors.items()
    ]
    with TableFile(_file_in(directory), entries, {"format": "pt", _WHAT: what}) as file:
        for name, tensor in tensors.items():
            file.write(name, tensor)


def from_pretrained(model: Model, directory: str | os.PathLike[str], *, pool: Pool | None = None) -> Model:
    """Retrofit a model with what ``save_pretrained`` wrote: the same layers, with the parameters that they had.

    Warns where a table is at another step than it was then: what is generated would be another text. Restore it first
    (``pool.restore``), or train on from there.

    Args:
        model: As it was before ``retrofit``, its weights loaded; changed in place.
        directory: What ``save_pretrained`` was given.
        pool: Where the tables are. None: connect to the address that was saved, until the process ends.

    Returns:
        The model.

    Raises:
        NotFound: There is no such file, or the pool has no such table.
        InvalidRequest: It is no such file, or of a newer mempool; the pool's table has other slots or columns, or the
            model other layers or widths. The model is as it was.
        DataLoss: The file is damaged.
        PoolUnreachable: Nobody answers at the saved address.
    """
    source = open_tensors(_file_in(directory))
    layers, described = _read(source)
    if pool is None:
        pool = _pool_at({each["address"] for each in described.values()}, source.where)
    tables = {name: _table(pool, name, each, source.where) for name, each in described.items()}
    made = []
    for fitted in layers:
        (place,) = places_of(model, fitted.name)
        layer = made_for(model, place, fitted, tables[fitted.table])
        layer.load_state_dict(_tensors(source, fitted, layer))
        made.append((place, fitted, layer))
    for place, fitted, layer in made:
        fit(model, place, fitted, layer)
    for name, table in tables.items():
        version, saved = table.link.version(), described[name]["step"]
        if version != saved:
            warnings.warn(
                f"table {name!r} is at step {version}, and the memory in {os.fspath(directory)} was saved at step"
                f" {saved}: they are not of one step, and the model answers otherwise than it did. Restore the table as"
                " it was then (pool.restore(place, checkpoint=NAME, replace=True); `mempool checkpoints PLACE` lists"
                " names and versions), or train on",
                stacklevel=2,
            )
    return model


def _fitted(model: nn.Module) -> tuple[nn.Module, tuple[Fitted, ...]]:
    """The model under what wraps it, and what was retrofitted there."""
    bare: Any = model
    while not fitted_in(bare):
        inner = next((bare._modules[name] for name in ("_orig_mod", "module") if name in bare._modules), None)
        if inner is None:
            raise InvalidRequest(
                f"nothing was retrofitted to {type(model).__name__}: give the model that mempool.nn.retrofit was given"
            )
        bare = inner
    return bare, fitted_in(bare)


def _checked(fitted: Fitted) -> dict[str, Any]:
    """A layer as JSON."""
    for name, option in fitted.options.items():
        if not (option is None or isinstance(option, (str, int, float, bool))):
            raise InvalidRequest(
                f"{fitted.layer} was made with {name}={type(option).__name__}, which no file can have: save"
                " layer.state_dict(), and retrofit with that again"
            )
    return {**{name: getattr(fitted, name) for name in Fitted.__slots__}, "options": dict(fitted.options)}


def _whole(tensor: Tensor) -> Tensor:
    """On this rank's CPU; of one that is sharded all ranks ask."""
    full = getattr(tensor, "full_tensor", None)
    return (tensor if full is None else full()).detach().cpu()


def _described(table: Table) -> dict[str, Any]:
    return {
        "address": table.address,
        "num_slots": table.num_slots,
        "value_dim": table.value_dim,
        "step": table.link.version(),
    }


def _file_in(directory: str | os.PathLike[str]) -> str:
    return f"{os.fspath(directory).rstrip('/')}/{_FILE}"


def _read(source: TensorSource) -> tuple[list[Fitted], dict[str, dict[str, Any]]]:
    try:
        what = json.loads(source.metadata[_WHAT])
        if what["format"] > _FORMAT:
            raise InvalidRequest(f"{source.where} is of a newer mempool (format {what['format']}): update this one")
        return [Fitted(**layer) for layer in what["layers"]], dict(what["tables"])
    except (KeyError, TypeError, ValueError) as error:
        if isinstance(error, InvalidRequest):
            raise
        raise InvalidRequest(f"{source.where} was not written by mempool.nn.save_pretrained ({error!r})") from None


def _pool_at(addresses: set[str], where: str) -> Pool:
    """The pool that all tables were in, connected to until the process ends."""
    if len(addresses) > 1 or "" in addresses:
        has = (
            f"tables of pools at {', '.join(sorted(addresses))}"
            if "" not in addresses
            else "a table of an embedded pool"
        )
        raise InvalidRequest(f"{where} was saved with {has}: give pool=")
    pool = connect(*addresses)
    atexit.register(pool.close)
    return pool


def _table(pool: Pool, name: str, described: Mapping[str, Any], where: str) -> Table:
    table = pool.table(name)
    for each in ("num_slots", "value_dim"):
        if getattr(table, each) != described[each]:
            raise InvalidRequest(
                f"table {name!r} of {pool!r} has {each} = {getattr(table, each)}, and {where} goes with one of"
                f" {described[each]}: give the pool that has it, or restore it there"
            )
    return table


def _tensors(source: TensorSource, fitted: Fitted, layer: MemoryLayer) -> dict[str, Tensor]:
    """The layer's parameters. Raises DataLoss where one is missing, InvalidRequest where one is of another shape."""
    found = {}
    for name, tensor in layer.state_dict().items():
        entry = source.tensors.get(f"{fitted.layer}.{name}")
        if entry is None:
            raise DataLoss(f"{source.where} has no {fitted.layer}.{name}: it is not whole")
        if entry.shape != tuple(tensor.shape):
            raise InvalidRequest(
                f"{source.where}: {entry.name} is {list(entry.shape)}, and this model's would be {list(tensor.shape)}"
            )
        found[name] = source.rows(entry.name, 0, entry.shape[0])
    return found
