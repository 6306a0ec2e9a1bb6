"""retrofit: a memory layer beside, or in place of, the feed-forward layers of a model that is there already."""

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor, nn

from mempool.client import Table
from mempool.errors import InvalidRequest
from mempool.nn.decoders.blocks import Layers, Place, places_of
from mempool.nn.layer import MemoryLayer
from mempool.nn.sizes import checked_int, checked_table

_ANY = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
Mode = Literal["add", "replace"]
Model = TypeVar("Model", bound=nn.Module)

ADDED = "memory"
"""What the memory of a feed-forward layer is called in it."""
_RECORD = "mempool_fitted"
_OWN = ("dim", "table", "out_dim", "device", "dtype", "overlap")
"""Arguments of a MemoryLayer that follow from where it goes."""


@dataclass(frozen=True, slots=True)
class Fitted:
    """A memory layer's place in a model, and what it was made of.

    Attributes:
        name: The whole name of the feed-forward layer.
        mode: "add": the memory is its ``memory``; "replace": it is the memory.
        table: The table's name.
        dim, out_dim: Widths of the memory layer.
        options: The other arguments of the memory layer.
    """

    name: str
    mode: Mode
    table: str
    dim: int
    out_dim: int
    options: Mapping[str, Any]

    @property
    def layer(self) -> str:
        """The whole name of the memory layer."""
        return f"{self.name}.{ADDED}" if self.mode == "add" else self.name


def retrofit(
    model: Model, layers: Layers, *, table: Table, mode: Mode = "add", dim: int | None = None, **options: Any
) -> Model:
    """Give feed-forward layers of a model a memory: beside them, or in their place.

    The decoder's blocks are found by what modules they have: Llama, Mistral, Qwen, GPT-2, GPT-NeoX and their like of
    ``transformers``, or a model of yours. All layers share the table; for several tables call this several times.

    mode="add": ``ffn(x) + memory(x)``. The memory's output projection is zero at first, so the model's output is
    bitwise what it was, and training begins there: with the output projection, and from its second step on all of it.
    The memory becomes the module ``memory`` of the feed-forward layer: names of parameters that were there stay.
    mode="replace": the memory layer takes the place of the feed-forward layer, whose parameters are gone.

    Do it before the model is wrapped, sharded or compiled, and before optimizers are made. It is on the device of the
    feed-forward layer, with parameters of its type. ``model.requires_grad_(False)`` and ``layer.requires_grad_()`` of
    each ``MemoryLayer`` of ``model.modules()`` train the memory alone.

    Args:
        model: Changed in place.
        layers: Indices of blocks, as [4, 12, 20] (-1 is the last), or names of blocks or of modules in them
            ("model.layers.4", "model.layers.4.mlp"), or patterns of such names ("model.layers.*.mlp"); one, or several.
        table: The values.
        mode: As above.
        dim: Width of what the layers are given. None: of the first linear layer in each, or ``config.hidden_size``.
        options: As of ``MemoryLayer``: heads, topk, key_dim, qk_norm, ...; but ``out``, for mode="add".

    Returns:
        The model.

    Raises:
        InvalidRequest: No such layer (the message names what there is), one that has a memory already, or an argument
            that makes no sense. The model is as it was.

    Example:
        >>> model = transformers.AutoModelForCausalLM.from_pretrained("Qwen/Qwen3-0.6B")
        >>> mempool.nn.retrofit(model, [4, 12, 20], table=table, heads=4, topk=32, qk_norm=True)
    """
    checked_table(table)
    _check_mode(mode)
    _check_options(mode, options)
    made = []
    for place in places_of(model, layers):
        width = _dim_of(model, place) if dim is None else checked_int("dim", dim)
        out = place.module.out_features if isinstance(place.module, nn.Linear) else width
        fitted = Fitted(place.name, mode, table.name, width, out, options)
        made.append((place, fitted, made_for(model, place, fitted, table)))
    for place, fitted, layer in made:
        fit(model, place, fitted, layer)
    return model


def made_for(model: nn.Module, place: Place, fitted: Fitted, table: Table) -> MemoryLayer:
    """A layer for a place, not there yet.

    Raises:
        InvalidRequest: The place has a memory, or cannot have one.
    """
    module = place.module
    if isinstance(module, MemoryLayer) or hasattr(module, ADDED):
        what = "is a memory layer" if isinstance(module, MemoryLayer) else f"has a part named {ADDED!r}"
        raise InvalidRequest(f"{place.name} {what} already: name each layer once. Nothing was changed")
    if fitted.mode == "replace":
        _check_call(place)
    like = _parameter_like(module, model)
    if like is not None and like.is_meta:
        raise InvalidRequest(f"{place.name} is on the meta device: load the model's weights first, then retrofit it")
    options = {"out": "linear", **fitted.options} if fitted.mode == "add" else fitted.options
    layer = MemoryLayer(
        fitted.dim,
        table=table,
        out_dim=fitted.out_dim,
        device=None if like is None else like.device,
        dtype=None if like is None else like.dtype,
        **options,
    )
    if fitted.mode == "add":
        assert isinstance(layer.out, nn.Linear)
        nn.init.zeros_(layer.out.weight)
        nn.init.zeros_(layer.out.bias)
    return layer.train(module.training)


def fit(model: nn.Module, place: Place, fitted: Fitted, layer: MemoryLayer) -> None:
    """Put the layer in its place."""
    if fitted.mode == "add":
        place.module.add_module(ADDED, layer)
        # A hook, not a module around it: names of what is there stay as they are, in states, adapters and patterns.
        place.module.register_forward_hook(_with_memory, with_kwargs=True)
    else:
        setattr(place.parent, place.attribute, layer)
    model.__dict__[_RECORD] = (*fitted_in(model), fitted)


def fitted_in(model: nn.Module) -> tuple[Fitted, ...]:
    """What was retrofitted, in order."""
    found: tuple[Fitted, ...] = model.__dict__.get(_RECORD, ())
    return found


def _with_memory(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """What the feed-forward layer answers, and its memory; of a tuple, as mixtures of experts answer, the first."""
    x = args[0] if args else next(iter(kwargs.values()))
    if isinstance(output, tuple):
        return (_sum(output[0], module.memory(x)), *output[1:])  # type: ignore[operator]
    return _sum(output, module.memory(x))  # type: ignore[operator]


def _sum(output: Tensor, remembered: Tensor) -> Tensor:
    # In the layer's own type: under autocast or with quantized weights the two may differ.
    return output + remembered.to(output.dtype)


def _check_mode(mode: object) -> None:
    if mode not in ("add", "replace"):
        raise InvalidRequest(f'mode must be "add" or "replace", got {mode!r}')


def _check_options(mode: Mode, options: Mapping[str, Any]) -> None:
    own = [*_OWN, "out"] if mode == "add" else list(_OWN)
    possible = [name for name in inspect.signature(MemoryLayer).parameters if name not in own]
    for name in options:
        if name not in possible:
            why = "follows from where the layer goes" if name in own else "is no argument of a MemoryLayer"
            raise InvalidRequest(f'{name} {why} with mode="{mode}"; there are {", ".join(possible)}')


def _check_call(place: Place) -> None:
    """Raises InvalidRequest for a module that is called with more than one tensor, as no memory layer could be."""
    parameters = list(inspect.signature(place.module.forward).parameters.values())
    needed = [each.name for each in parameters if each.default is each.empty and each.kind not in _ANY]
    if len(needed) > 1:
        raise InvalidRequest(
            f"{place.name} ({type(place.module).__name__}) is called with {', '.join(needed)}, a memory layer with one"
            ' tensor: it cannot be replaced. Add to it: mode="add"'
        )


def _dim_of(model: nn.Module, place: Place) -> int:
    for module in place.module.modules():
        if isinstance(module, nn.Linear):
            return module.in_features
    config = getattr(model, "config", None)
    text = getattr(config, "get_text_config", lambda: config)()
    width = getattr(text, "hidden_size", None)
    if isinstance(width, int):
        return width
    raise InvalidRequest(
        f"how wide the input of {place.name} is does not show: it has no linear layer, and the model no"
        " config.hidden_size. Give dim="
    )


def _parameter_like(*modules: nn.Module) -> Tensor | None:
    """The first parameter of a type that a layer can be made in: quantized weights are not."""
    floats = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
    return next((each for module in modules for each in module.parameters() if each.dtype in floats), None)
