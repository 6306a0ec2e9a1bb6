"""InfoNCE: the symmetric contrastive loss by which pairs of two modalities find each other.

Shape legend: B pairs, D width of an embedding.
"""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mempool.client.counts import as_number
from mempool.errors import InvalidRequest


class InfoNCE(nn.Module):
    """The loss of CLIP (arXiv 2103.00020). With a_i, b_i the embeddings of pair i, scaled to length 1::

        l_ij = exp(log_scale) * <a_i, b_j>
        loss = -1 / 2B * sum over i of (log softmax_j(l_i:)_i + log softmax_j(l_:i)_i)

    With labels, all pairs of one label are right answers to each other: in the place of the logarithm at i stands the
    mean of those at all j with label_j = label_i.

    Logits and loss are float32, also under autocast. What is wrong for a pair are the others of its batch, on each
    rank those of its own.

    Attributes:
        log_scale: Parameter []: the logarithm of 1 / temperature. In training each call first clamps it to
            [0, log(max_scale)], as CLIP's training does after each step: the clamp is of the parameter itself, so that
            it comes back as soon as its gradient says so. In eval mode it is left as it is.

    Args:
        temperature: At the start; 1 / max_scale to 1.
        max_scale: What logits are multiplied with at most.
        device, dtype: Of the parameter.

    Raises:
        InvalidRequest: A scale below 1, or a temperature out of bounds.

    Example:
        >>> loss_of = mempool.nn.InfoNCE()
        >>> loss = loss_of(model.image(images), model.text(texts))   # [B, D] each -> []
    """

    def __init__(
        self,
        temperature: float = 0.07,
        *,
        max_scale: float = 100.0,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.max_scale = as_number(max_scale)
        if not 1.0 <= self.max_scale < math.inf:
            raise InvalidRequest(f"max_scale = {max_scale!r} must be a finite number of at least 1")
        self.temperature = as_number(temperature)
        if not 1.0 / self.max_scale <= self.temperature <= 1.0:
            raise InvalidRequest(
                f"temperature = {temperature!r} must be from 1 / max_scale = {1.0 / self.max_scale:g} to 1"
            )
        self.log_scale = nn.Parameter(torch.empty((), device=device, dtype=dtype))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """The temperature of the start."""
        nn.init.constant_(self.log_scale, -math.log(self.temperature))

    def forward(self, a: Tensor, b: Tensor, labels: Tensor | None = None) -> Tensor:
        """The mean loss of both directions.

        Args:
            a, b: [B, D] floating point: row i of one belongs to row i of the other. Of any length but 0.
            labels: [B] integers. None: each pair is alone right.

        Returns:
            [] float32.

        Raises:
            InvalidRequest: Shapes that do not fit each other, or no pairs.
        """
        if a.dim() != 2 or a.shape != b.shape or a.shape[0] == 0:
            raise InvalidRequest(
                f"InfoNCE takes two [B, D] of as many pairs, at least 1, got {list(a.shape)} and {list(b.shape)}"
            )
        if labels is not None and (labels.shape != a.shape[:1] or labels.is_floating_point()):
            raise InvalidRequest(f"labels must be integers [{a.shape[0]}], got {labels.dtype} {list(labels.shape)}")
        if self.training:
            with torch.no_grad():
                self.log_scale.clamp_(0.0, math.log(self.max_scale))
        with torch.autocast(a.device.type, enabled=False):
            ours, theirs = F.normalize(a.float(), dim=-1), F.normalize(b.float(), dim=-1)
            logits = self.log_scale.float().exp() * (ours @ theirs.T)
            if labels is None:
                right = torch.arange(a.shape[0], dtype=torch.int64, device=a.device)
            else:
                same = (labels[:, None] == labels).to(logits)
                right = same / same.sum(1, keepdim=True)
            return (F.cross_entropy(logits, right) + F.cross_entropy(logits.T, right)) / 2

    def extra_repr(self) -> str:
        return f"temperature={self.temperature:g}, max_scale={self.max_scale:g}"
