"""The linear layers of a memory layer, or the modules that its maker wants in their place."""

from typing import Any, Literal

from torch import Tensor, nn

from mempool.errors import InvalidRequest

Gate = Literal["silu", "none"]
Out = Literal["auto", "linear", "none"]


def gate_part(gate: Gate | nn.Module, dim: int, value_dim: int, made: dict[str, Any]) -> nn.Module | None:
    """From [..., dim] to [..., value_dim]; None without a gate.

    Args:
        made: device and dtype of a linear layer.

    Raises:
        InvalidRequest: ``gate`` is none of the names, nor a module.
    """
    if isinstance(gate, nn.Module):
        return gate
    if gate not in ("silu", "none"):
        raise InvalidRequest(f'gate must be "silu", "none" or a module, got {gate!r}')
    return nn.Linear(dim, value_dim, **made) if gate == "silu" else None


def out_part(
    out: Out | nn.Module, value_dim: int, out_dim: int, made: dict[str, Any], *, gated: bool
) -> nn.Module | None:
    """From [..., value_dim] to [..., out_dim]; None where nothing is projected.

    Args:
        made: device and dtype of a linear layer.
        gated: "auto" projects also where the widths agree.

    Raises:
        InvalidRequest: ``out`` is none of the names, nor a module; or "none", and the widths differ.
    """
    if isinstance(out, nn.Module):
        return out
    if out not in ("auto", "linear", "none"):
        raise InvalidRequest(f'out must be "auto", "linear", "none" or a module, got {out!r}')
    if out == "none" and value_dim != out_dim:
        raise InvalidRequest(f'out="none" needs value_dim = out_dim, got {value_dim} and {out_dim}')
    needed = out == "linear" or (out == "auto" and (gated or value_dim != out_dim))
    return nn.Linear(value_dim, out_dim, **made) if needed else None


def projected(x: Tensor, bag: Tensor, gate: Tensor | None, out: nn.Module | None) -> Tensor:
    """The gated, projected sum of values [..., out_dim].

    In the type in which the layer's own modules speak: that of the gate's answer, or of x. Their weights say nothing of
    it: those may be integers, or in another module.

    Raises:
        InvalidRequest: The gate is of another width than the values.
    """
    dtype = x.dtype
    if gate is not None:
        if gate.shape != bag.shape:
            raise InvalidRequest(
                f"gate answered {list(gate.shape)} for {list(x.shape)}; its last dimension must be the table's"
                f" value_dim = {bag.shape[-1]}"
            )
        dtype, bag = gate.dtype, gate * bag
    bag = bag.to(dtype)
    return bag if out is None else out(bag)
