"""Values that start as what a trained feed-forward layer knows.

Shape legend: R rows, N slots, V value dim.
"""

import torch
from torch import Tensor, nn

from mempool.client import Table
from mempool.client.usage.reinit import checked_seed
from mempool.errors import InvalidRequest
from mempool.nn.sizes import checked_std, checked_table

_PIECE_ELEMENTS = 1 << 22


@torch.no_grad()
def init_values(table: Table, rows: Tensor | nn.Linear, *, noise_std: float = 0.0, seed: int = 0) -> None:
    """Write rows into all slots of a table, row ``s % R`` into slot s, and noise.

    Those of a pretrained feed-forward layer's second matrix are the values of its key-value memory (arXiv 2012.14913).

    Optimizer state and version stay: for a table that was just made. Repeating it is safe, and gives the same values on
    any number of shards.

    Args:
        table: Of any layout.
        rows: [R, V] floating point, finite; or a Linear(R, V), whose columns are the rows.
        noise_std: Standard deviation of what is added, as a multiple of the rows' own. 0 leaves slots with the same row
            the same values until they are trained; their gradients differ where keys do.
        seed: Of the noise.

    Raises:
        InvalidRequest: No table, rows that do not fit it or are not finite, a standard deviation or a seed that is
            none; nothing was written.
        MempoolError: What ``Table.write`` raises.

    Example:
        >>> mempool.nn.init_values(table, model.layers[4].mlp.down_proj, noise_std=0.1)
    """
    table = checked_table(table)
    if isinstance(rows, nn.Linear):
        rows = rows.weight.t()
    if not isinstance(rows, Tensor) or rows.dim() != 2 or not rows.is_floating_point():
        raise InvalidRequest("rows must be a floating point tensor [R, value_dim], or a Linear(R, value_dim)")
    if rows.shape[0] == 0 or rows.shape[1] != table.value_dim:
        raise InvalidRequest(
            f"rows {list(rows.shape)} of table {table.name!r}: must be [R, {table.value_dim}] with R at least 1"
        )
    rows = rows.detach().float().cpu()
    if not rows.isfinite().all():
        raise InvalidRequest(f"rows for table {table.name!r} have an inf or NaN; nothing was written")
    scale = checked_std("noise_std", noise_std) * float(rows.std(correction=0))
    generator = torch.Generator(device="cpu").manual_seed(checked_seed(seed, table=table.name))
    piece = max(1, _PIECE_ELEMENTS // table.value_dim)
    for first in range(0, table.num_slots, piece):
        ids = torch.arange(first, min(first + piece, table.num_slots), dtype=torch.int64, device="cpu")
        values = rows[ids % rows.shape[0]]
        if scale:
            values = values + scale * torch.randn(values.shape, generator=generator, dtype=torch.float32, device="cpu")
        table.write(ids, values)
