"""One output of those of several modalities: their sum, a projection of all side by side, or a trained mixture.

Shape legend: M modalities.
"""

from collections.abc import Mapping
from typing import Any, Literal

import torch
from torch import Tensor, nn

from mempool.errors import InvalidRequest

Fuse = Literal["sum", "concat", "gate"]


class Fusion(nn.Module):
    """With y_m [..., out_dim] of modality m, and its input x_m::

        "sum"      y = sum over m of y_m
        "concat"   y = join([y_1, ..., y_M])                   join: Linear(M * out_dim, out_dim)
        "gate"     y = sum over m of softmax_m(mix_m(x_m)) * y_m     mix_m: Linear(width of m, 1)

    Attributes:
        join: As above; None but with "concat".
        mix: ``ModuleDict`` of linear layers by modality; None but with "gate".

    Raises:
        InvalidRequest: An unknown way to fuse.
    """

    join: nn.Module | None
    mix: nn.ModuleDict | None

    def __init__(self, fuse: Fuse, modalities: Mapping[str, int], out_dim: int, made: dict[str, Any]) -> None:
        super().__init__()
        if fuse not in ("sum", "concat", "gate"):
            raise InvalidRequest(f'fuse must be "sum", "concat" or "gate", got {fuse!r}')
        self.fuse = fuse
        self.join = nn.Linear(len(modalities) * out_dim, out_dim, **made) if fuse == "concat" else None
        mix = {name: nn.Linear(width, 1, **made) for name, width in modalities.items()}
        self.mix = nn.ModuleDict(mix) if fuse == "gate" else None

    def forward(self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> Tensor:
        """Inputs [..., width] and outputs [..., out_dim], of the same modalities in one order -> [..., out_dim]."""
        if self.join is not None:
            joined: Tensor = self.join(torch.cat(list(outputs.values()), dim=-1))
            return joined
        every = torch.stack(list(outputs.values()), dim=-1)
        if self.mix is None:
            return every.sum(-1)
        logits = torch.cat([self.mix[name](x) for name, x in inputs.items()], dim=-1)
        shares = torch.softmax(logits.float(), dim=-1).to(every.dtype)
        return (every * shares[..., None, :]).sum(-1)

    def extra_repr(self) -> str:
        return f"fuse={self.fuse!r}"
