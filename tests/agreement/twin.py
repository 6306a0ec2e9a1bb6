"""Tables of a pool and the same values in torch's own EmbeddingBag, fed with the same gradients."""

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from mempool.client import Table

from .reference import all_rows, relative_error


class Twin:
    """``backward`` pushes one gradient of random bags into every table and into its EmbeddingBag.

    Attributes:
        bags: One ``nn.EmbeddingBag(mode="sum")`` per table, which starts with the table's values.

    Args:
        sparse: torch's gradients are sparse tensors. (Its clipping and its GradScaler want dense ones.)
    """

    def __init__(self, tables: Sequence[Table], *, sparse: bool) -> None:
        self.tables = tuple(tables)
        self.bags = nn.ModuleList(
            nn.EmbeddingBag(table.num_slots, table.value_dim, mode="sum", sparse=sparse, _weight=all_rows(table))
            for table in tables
        )
        self.generator = torch.Generator().manual_seed(29)

    def backward(self, *, scale: float = 1.0, num_bags: int = 16, pairs: int = 12) -> None:
        """d (scale * |pooled - target|^2 / 2), of which every table sees other bags."""
        for table, bag in zip(self.tables, self.bags, strict=True):
            assert isinstance(bag, nn.EmbeddingBag)
            ids = torch.randint(table.num_slots, (num_bags, pairs), generator=self.generator)
            ids[0] = ids[0, 0]  # a slot repeated in one bag, as heads repeat them
            weights = torch.rand(num_bags, pairs, generator=self.generator) / pairs**0.5
            target = torch.randn(num_bags, table.value_dim, generator=self.generator)
            ours, torchs = weights.clone().requires_grad_(True), weights.clone().requires_grad_(True)
            (scale * (table.gather(ids, ours) - target).square().sum() / 2).backward()
            (scale * (bag(ids, per_sample_weights=torchs) - target).square().sum() / 2).backward()
            if torch.isfinite(torchs.grad).all():
                assert relative_error(ours.grad, torchs.grad) < 1e-5

    def parameters(self) -> list[Tensor]:
        return list(self.bags.parameters())

    def errors(self) -> Iterable[float]:
        """Relative error of each table's values, in norm."""
        for table, bag in zip(self.tables, self.bags, strict=True):
            assert isinstance(bag, nn.EmbeddingBag)
            yield relative_error(all_rows(table), bag.weight)
