"""NgramMemory: what a layer of a model makes of the rows of its tokens' n-grams.

Rows come from ``lookup``. Legend: B batch, T tokens, D dim, W width of a token's rows side by side.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, Unpack

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mempool.errors import InvalidRequest
from mempool.nn.ngrams.lookup import NgramLookup, NgramRows
from mempool.nn.ngrams.packing import Packing
from mempool.nn.sizes import checked_int, checked_std

NgramGate = Literal["sigmoid", "signed_sqrt"]

_LEAST = 1e-6
"""Of a score's size, before its root, whose slope has no end at 0."""


class NgramMemory(nn.Module):
    """The n-gram memory of "Engram" (arXiv 2601.07372): rows of hashed n-grams, gated by the hidden state.

    For every token, with its hidden state h and e the rows of all heads of all orders side by side::

        k, v = key(e), value(e)
        s    = <RMS(h), RMS(k)> / sqrt(D)
        a    = sigmoid(s)                            gate="sigmoid": the paper's
        a    = sigmoid(sign(s) * sqrt(|s|))          gate="signed_sqrt": the released code's
        u    = a * v
        y    = u + silu(conv(RMS(u)))                conv: depthwise, causal, within a sequence

    to be added to the hidden state: ``h = h + memory(h, tokens)``. Each RMS norm has a gain of its own. ``conv`` begins
    at zeros, so that y is u at first.

    Several layers, each with its own projections, may read one lookup; then let them have one fetch:
    ``rows = lookup(tokens)``, and ``memory(h, rows)`` in each. Scores are float32 also in a bfloat16 model; the rest is
    in the type of the hidden state, and follows autocast.

    Attributes:
        lookup: The ``NgramLookup``.
        key, value: Linear(W, D).
        hidden_norm, key_norm, conv_norm: RMSNorm(D).
        conv: Parameter [D, kernel_size], the token's own factor last; None with kernel_size=0.

    Args:
        dim: Width of the hidden state.
        lookup: Where rows come from; may be that of other layers.
        gate: As above.
        kernel_size: Tokens that the convolution sees; 0: no convolution.
        dilation: Tokens from one that it sees to the next; None: the longest order, as in the paper.
        bias: Of ``key`` and ``value``: the paper writes none, the released code has one.
        zero_init: Let ``value`` begin at zeros, too: the layer adds nothing at first, so that a model that is there
            already goes on as it was. The rows get their first gradient one step later.
        norm_eps: Of the RMS norms.
        device, dtype: Of the parameters.

    Raises:
        InvalidRequest: An argument makes no sense.

    Example:
        >>> lookup = mempool.nn.NgramLookup(table, ngrams, vocab_size=50_257)
        >>> memory = mempool.nn.NgramMemory(512, lookup)
        >>> y = memory(hidden, tokens)   # [8, 128, 512], [8, 128] -> [8, 128, 512]
    """

    conv: nn.Parameter | None
    conv_norm: nn.Module | None

    def __init__(
        self,
        dim: int,
        lookup: NgramLookup,
        *,
        gate: NgramGate = "sigmoid",
        kernel_size: int = 4,
        dilation: int | None = None,
        bias: bool = False,
        zero_init: bool = False,
        norm_eps: float = 1e-5,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if not isinstance(lookup, NgramLookup):
            raise InvalidRequest(f"lookup is of type {type(lookup).__name__}: give mempool.nn.NgramLookup(table, ...)")
        if gate not in ("sigmoid", "signed_sqrt"):
            raise InvalidRequest(f'gate = {gate!r}: must be "sigmoid" or "signed_sqrt"')
        self.dim = checked_int("dim", dim)
        self.gate = gate
        self.kernel_size = checked_int("kernel_size", kernel_size, at_least=0)
        longest = lookup.ngrams.orders[-1]
        self.dilation = longest if dilation is None else checked_int("dilation", dilation)
        self.zero_init = zero_init
        self.lookup = lookup
        made: dict[str, Any] = {"device": device, "dtype": dtype}
        eps = checked_std("norm_eps", norm_eps)
        self.key = nn.Linear(lookup.width, self.dim, bias=bias, **made)
        self.value = nn.Linear(lookup.width, self.dim, bias=bias, **made)
        self.hidden_norm = nn.RMSNorm(self.dim, eps=eps, **made)
        self.key_norm = nn.RMSNorm(self.dim, eps=eps, **made)
        self.conv_norm = nn.RMSNorm(self.dim, eps=eps, **made) if self.kernel_size else None
        self.conv = nn.Parameter(torch.empty(self.dim, self.kernel_size, **made)) if self.kernel_size else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """What begins at zeros; the linear layers and norms have their own ``reset_parameters``; the table stays."""
        if self.conv is not None:
            nn.init.zeros_(self.conv)
        if self.zero_init:
            nn.init.zeros_(self.value.weight)
            if self.value.bias is not None:
                nn.init.zeros_(self.value.bias)

    def prefetch(self, tokens: Tensor, **packing: Unpack[Packing]) -> bool:
        """``lookup.prefetch``: start reading before the forward pass, after the step before."""
        return self.lookup.prefetch(tokens, **packing)

    def prefetch_all(self, batches: Sequence[Tensor | Mapping[str, Tensor | None]]) -> bool:
        """``lookup.prefetch_all``: all micro-batches of a step, in one fetch."""
        return self.lookup.prefetch_all(batches)

    def forward(self, hidden: Tensor, tokens: Tensor | NgramRows, **packing: Unpack[Packing]) -> Tensor:
        """What the memory adds to ``hidden``.

        Args:
            hidden: [..., T, dim], floating point.
            tokens: [..., T] integers; or the rows of them, which ``lookup(tokens)`` answered.
            packing: ``segment_ids``, ``positions``, ``cu_seqlens``, ``mask``, as of ``NgramLookup``; of tokens, not of
                rows, which know theirs.

        Returns:
            [..., T, dim]; zeros of padding.

        Raises:
            InvalidRequest: Shapes that do not agree, or what the lookup refuses; nothing was sent.
            MempoolError: What the table's gather raises.
        """
        shape = tokens.values.shape[:-1] if isinstance(tokens, NgramRows) else getattr(tokens, "shape", None)
        if shape is None or hidden.shape != (*shape, self.dim):
            raise InvalidRequest(
                f"this layer takes hidden states [..., T, {self.dim}] and tokens [..., T], got {list(hidden.shape)} and"
                f" {type(tokens).__name__ if shape is None else list(shape)}"
            )
        if not isinstance(tokens, NgramRows):
            rows: NgramRows = self.lookup(tokens, **packing)
        else:
            rows = tokens
            if packing:
                raise InvalidRequest(f"{', '.join(packing)} was given with rows, which know theirs: give it to lookup")
            if rows.values.shape[-1] != self.lookup.width:
                raise InvalidRequest(
                    f"these rows are {rows.values.shape[-1]} wide, and those of this layer's lookup"
                    f" {self.lookup.width}: they are another lookup's"
                )
        return self._made(hidden, rows)

    def _made(self, hidden: Tensor, rows: NgramRows) -> Tensor:
        read = rows.values.to(hidden)
        value: Tensor = self.value(read)
        gated = self._gate(hidden, self.key(read)).to(value.dtype) * value
        y = gated if self.conv is None else gated + F.silu(self._convolved(gated, rows.positions.to(hidden.device)))
        if rows.real is None:
            return y
        return y.masked_fill(~rows.real.to(hidden.device).unsqueeze(-1), 0.0)

    def _gate(self, hidden: Tensor, key: Tensor) -> Tensor:
        """[..., T, 1]."""
        kind = torch.promote_types(hidden.dtype, torch.float32)
        product = self.hidden_norm(hidden).to(kind) * self.key_norm(key).to(kind)
        score = product.sum(-1, keepdim=True) / math.sqrt(self.dim)
        if self.gate == "signed_sqrt":
            score = score.sign() * score.abs().clamp_min(_LEAST).sqrt()
        return torch.sigmoid(score)

    def _convolved(self, gated: Tensor, positions: Tensor) -> Tensor:
        """Each token with those before it in its sequence, by hand, as a convolution knows of no sequences."""
        assert self.conv is not None
        assert self.conv_norm is not None
        seen = self.conv_norm(gated).to(gated.dtype)
        factors = self.conv.to(gated.dtype)
        total: Tensor = seen * factors[:, -1]
        for taps in range(1, self.kernel_size):
            back = taps * self.dilation
            if back >= gated.shape[-2]:
                break
            reaches = (positions[..., back:] >= back).unsqueeze(-1)
            before = torch.where(reaches, seen[..., :-back, :], 0.0) * factors[:, -1 - taps]
            total = total + F.pad(before, (0, 0, back, 0))
        return total

    def extra_repr(self) -> str:
        return f"dim={self.dim}, gate={self.gate!r}, kernel_size={self.kernel_size}, dilation={self.dilation}"
