"""The decoder blocks of a model and the feed-forward layer of each, by what modules there are: a list of blocks that
have attention, and beside it one more part that has matrices."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase

from torch import nn

from mempool.client.counts import as_count
from mempool.errors import InvalidRequest

Layers = int | str | Iterable[int | str]

_USUAL = ("mlp", "ffn", "feed_forward")
_MOST_NAMED = 8


@dataclass(frozen=True, slots=True)
class Place:
    """A module of a model, by its whole name; ``parent`` has it as ``attribute``."""

    name: str
    module: nn.Module
    parent: nn.Module

    @property
    def attribute(self) -> str:
        return self.name.rpartition(".")[2]


@dataclass(frozen=True, slots=True)
class Block:
    """A block of a decoder. ffn: The whole name of its feed-forward layer; None where that is not one module."""

    name: str
    ffn: str | None


def places_of(model: nn.Module, layers: Layers) -> list[Place]:
    """Each of the layers once, in the order in which they are named.

    Args:
        model: Any model.
        layers: Indices of blocks (negative ones from the end), whole names of modules or of blocks, patterns of such
            names as ``fnmatch`` has them; one, or several.

    Raises:
        InvalidRequest: No such layer; the message names what there is.
    """
    lists = block_lists(model)
    wanted = [layers] if isinstance(layers, str) or as_count(layers) is not None else layers
    if not isinstance(wanted, Iterable):
        raise InvalidRequest(f"layers = {layers!r}: give indices of blocks, names of modules, or patterns of names")
    names: dict[str, None] = {}
    for layer in wanted:
        found = _named(model, lists, layer) if isinstance(layer, str) else [_at(model, lists, layer)]
        names.update(dict.fromkeys(found))
    if not names:
        raise InvalidRequest(f"layers = {layers!r} names no layer. {_what_there_is(model, lists)}")
    return [_place(model, name) for name in names]


def block_lists(model: nn.Module) -> dict[str, list[Block]]:
    """By name, the lists of blocks that have attention; not those within another's blocks."""
    found: dict[str, list[Block]] = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.ModuleList) and not any(name.startswith(f"{outer}.") for outer in found):
            blocks = [
                Block(_joined(name, index), _ffn_of(_joined(name, index), block))
                for index, block in module.named_children()
            ]
            if any(_has_attention(block) for block in module):
                found[name] = blocks
    return found


def _ffn_of(name: str, block: nn.Module) -> str | None:
    if not _has_attention(block):
        return None
    others = [child for child, module in block.named_children() if _has_matrix(module) and not _attends(child, module)]
    if len(others) > 1:
        others = [child for child in others if child in _USUAL]
    return _joined(name, others[0]) if len(others) == 1 else None


def _has_attention(block: nn.Module) -> bool:
    return any(_has_matrix(module) and _attends(name, module) for name, module in block.named_children())


def _attends(name: str, module: nn.Module) -> bool:
    return any(word in text.lower() for word in ("attn", "attention") for text in (name, type(module).__name__))


def _has_matrix(module: nn.Module) -> bool:
    return any(parameter.dim() >= 2 for parameter in module.parameters())


def _at(model: nn.Module, lists: dict[str, list[Block]], layer: object) -> str:
    """The feed-forward layer of a block by its index."""
    index = as_count(layer)
    if index is None:
        raise InvalidRequest(f"layer {layer!r} is neither an index of a block, nor a name or a pattern of names")
    if len(lists) != 1:
        which = "has several lists of decoder blocks" if lists else "has no list of decoder blocks"
        raise InvalidRequest(
            f"layer {index}: {type(model).__name__} {which}, so layers have names here. {_what_there_is(model, lists)}"
        )
    ((name, blocks),) = lists.items()
    if not -len(blocks) <= index < len(blocks):
        raise InvalidRequest(f"there is no layer {index}: {name} has {len(blocks)} blocks, 0 to {len(blocks) - 1}")
    ffn = blocks[index].ffn
    if ffn is None:
        raise InvalidRequest(
            f"layer {index}: block {blocks[index].name} has no feed-forward layer that is one module."
            f" It has {_children(model, blocks[index].name)}: name what is meant"
        )
    return ffn


def _named(model: nn.Module, lists: dict[str, list[Block]], layer: str) -> list[str]:
    """What a whole name or a pattern means."""
    ffns = {name: block.ffn for blocks in lists.values() for block in blocks if block.ffn for name in _names_of(block)}
    modules = {name for name, _ in model.named_modules() if name}
    if layer in ffns:
        return [ffns[layer]]
    if layer in modules:
        return [layer]
    found = [ffn for name, ffn in ffns.items() if fnmatchcase(name, layer)]
    found = found or [name for name, _ in model.named_modules() if name and fnmatchcase(name, layer)]
    if not found:
        raise InvalidRequest(f"there is no layer {layer!r}. {_what_there_is(model, lists)}")
    return found


def _names_of(block: Block) -> Iterator[str]:
    yield block.name
    if block.ffn is not None:
        yield block.ffn


def _place(model: nn.Module, name: str) -> Place:
    return Place(name, model.get_submodule(name), model.get_submodule(name.rpartition(".")[0]))


def _what_there_is(model: nn.Module, lists: dict[str, list[Block]]) -> str:
    ffns = [block.ffn for blocks in lists.values() for block in blocks if block.ffn]
    if ffns:
        return f"{type(model).__name__} has feed-forward layers {_in_short(ffns)}"
    blocks = [block.name for blocks in lists.values() for block in blocks]
    if blocks:
        return f"{type(model).__name__} has blocks {_in_short(blocks)}, each of {_children(model, blocks[0])}"
    names = [name for name, module in model.named_modules() if name and _has_matrix(module)]
    return f"{type(model).__name__} has modules {_in_short(names)}" if names else "The model has no modules"


def _in_short(names: list[str]) -> str:
    if len(names) <= _MOST_NAMED:
        return ", ".join(names)
    return f"{', '.join(names[: _MOST_NAMED - 1])}, ... {names[-1]} ({len(names)} in all)"


def _children(model: nn.Module, name: str) -> str:
    return ", ".join(child for child, _ in model.get_submodule(name).named_children()) or "no modules"


def _joined(name: str, child: str) -> str:
    return f"{name}.{child}" if name else child
