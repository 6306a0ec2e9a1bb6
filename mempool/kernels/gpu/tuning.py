"""How kernels cut their work: tiles, programs, warps, loads in flight, by width and stored element. All of it is here.

The numbers follow from the memory's width, not from measurements: 16 bytes for each thread and load, and enough loads
under way that each of a Hopper's 132 multiprocessors has some 32 KiB of rows on their way (4.3 TB/s times a latency of
about a microsecond). No result depends on them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mempool.kernels.arguments import Paged

#: Bytes that one thread loads or stores at a time.
_VECTOR_BYTES = 16
_WARP = 32
#: Bytes of a row that one program of a sum reads: four warps of full vectors.
_SUM_TILE_BYTES = 4 * _WARP * _VECTOR_BYTES
#: Pairs whose rows a program has under way at once, by the warps that it has.
_SUM_UNROLL = {1: 10, 2: 8, 4: 8, 8: 4}
#: Elements of a tile of a commit, and how many of them one thread holds, by the bytes of a stored element.
_STEP_TILE, _STEP_PER_THREAD = {4: 1024, 2: 1024, 1: 2048}, {4: 8, 2: 8, 1: 16}
#: Pairs of a row that a program of a commit reads at once.
STEP_UNROLL = 2
#: Pairs of a piece that its program reads at once.
PIECE_UNROLL = 8
#: Elements of a row that one warp of the weight gradient holds, and of all its rows; and loads that it has under way.
_GRADIENT_TILE, _GRADIENT_ELEMENTS, _GRADIENT_LOADS = 1024, 4096, 16
#: Programs of one warp that fill a GPU.
_ENOUGH_PROGRAMS = 132 * 32
#: A program of the weight gradient takes at least this many pairs, over which it reads its bag's gradient.
_GRADIENT_PAIRS = 16
#: Elements of a chunk of the norm and of its steps.
NORM_CHUNK, NORM_TILE = 1 << 15, 1024
#: Pairs that one program of a sort looks at.
SORT_TILE = 1024
#: Scores made before they are selected from: 32 MiB, half of a Hopper's second-level cache.
SCRATCH_SCORES = 1 << 23


@dataclass(frozen=True, slots=True)
class Tile:
    """A program's share of an arena: some rows, and some of their columns as blocks.

    Attributes:
        rows: Rows, bags or pairs.
        blocks: Column blocks.
        block: Columns of a block, a power of two.
        block_dim: Columns of a block that there are.
        width: W.
        stride: Stored elements from one arena row to the next.
        scales: Bytes before the scales of a row; 0 without.
        warps: Warps of a program.
    """

    rows: int
    blocks: int
    block: int
    block_dim: int
    width: int
    stride: int
    scales: int
    warps: int

    @property
    def num_tiles(self) -> int:
        """Tiles that a row is cut in."""
        return -(-self.width // (self.blocks * self.block_dim))

    @property
    def columns(self) -> dict[str, int]:
        """The constants that every kernel's columns follow from."""
        return {"WIDTH": self.width, "BLOCK_DIM": self.block_dim, "BLOCKS": self.blocks, "BLOCK": self.block}

    @property
    def options(self) -> dict[str, Any]:
        """All constants and launch options but a kernel's own."""
        layout = {"ROWS": self.rows, "STRIDE": self.stride, "SCALES": self.scales}
        return {**self.columns, **layout, "num_warps": self.warps, "num_stages": 1}

    def grid(self, count: int) -> tuple[int, int]:
        """Programs for so many rows, bags or pairs."""
        return -(-count // self.rows), self.num_tiles


def power_of_2(number: int) -> int:
    """The least power of two that is not smaller."""
    return 1 << (max(1, number) - 1).bit_length()


def _blocks(width: int, block_dim: int | None, most: int) -> tuple[int, int, int]:
    """Blocks of a tile of about ``most`` columns, columns of each, and how many of those there are.

    None: nothing belongs to blocks, and the tile is one.
    """
    if block_dim is None:
        block = min(most, power_of_2(width))
        return 1, block, block
    block_dim = min(block_dim, width)
    block = power_of_2(block_dim)
    return min(power_of_2(-(-width // block_dim)), max(1, most // block)), block, block_dim


def _tile(paged: Paged, block_dim: int | None, most: int, per_thread: int, rows: int | None = None) -> Tile:
    blocks, block, block_dim = _blocks(paged.width, block_dim, most)
    columns = blocks * block
    if rows is None:
        rows = max(1, _WARP * per_thread // columns)
    warps = min(16, max(1, power_of_2(rows * columns // (_WARP * per_thread))))
    scales = 0 if paged.packed is None else paged.packed.scales_start
    return Tile(rows, blocks, block, block_dim, paged.width, int(paged.rows.shape[1]), scales, warps)


def sum_tile(paged: Paged) -> tuple[Tile, int]:
    """For sums over bags: a warp takes several bags of narrow rows; and how many pairs a program reads at once."""
    size = paged.rows.element_size()
    block_dim = None if paged.packed is None else paged.packed.block_dim
    tile = _tile(paged, block_dim, _SUM_TILE_BYTES // size, _VECTOR_BYTES // size)
    return tile, _SUM_UNROLL.get(tile.warps, 4)


def gather_tile(paged: Paged) -> Tile:
    """For rows read one by one."""
    return step_tile(paged, None if paged.packed is None else paged.packed.block_dim)


def piece_tile(width: int) -> Tile:
    """For sums of pieces of runs: one piece a program, rows of float32."""
    blocks, block, block_dim = _blocks(width, None, _SUM_TILE_BYTES // 4)
    return Tile(1, blocks, block, block_dim, width, width, 0, max(1, block // 128))


def gradient_tile(paged: Paged) -> Tile:
    """For weight gradients: one warp, which sums a row's products without waiting for others; rows are its pairs."""
    size = paged.rows.element_size()
    block_dim = None if paged.packed is None else paged.packed.block_dim
    blocks, block, _ = _blocks(paged.width, block_dim, _GRADIENT_TILE)
    loads = max(1, blocks * block * size // (_WARP * _VECTOR_BYTES))
    # Of a row in several tiles, the products of each wait for the next.
    elements = _GRADIENT_ELEMENTS if paged.width <= _GRADIENT_TILE else _GRADIENT_ELEMENTS // 2
    rows = max(1, min(_GRADIENT_LOADS // loads, elements // (blocks * block)))
    tile = _tile(paged, block_dim, _GRADIENT_TILE, _VECTOR_BYTES // size, rows)
    return Tile(tile.rows, tile.blocks, tile.block, tile.block_dim, tile.width, tile.stride, tile.scales, 1)


def gradient_split(num_pairs: int, num_bags: int) -> int:
    """Programs that share the pairs of one bag, as numbers of pairs and bags tell it, not what bags there are."""
    wanted = -(-_ENOUGH_PROGRAMS // max(1, num_bags))
    return max(1, min(wanted, num_pairs // max(1, num_bags * _GRADIENT_PAIRS)))


def step_tile(paged: Paged, block_dim: int | None) -> Tile:
    """For steps and for rows written: ``block_dim`` where scales or state belong to blocks."""
    size = paged.rows.element_size()
    most, per_thread = _STEP_TILE[size], _STEP_PER_THREAD[size]
    blocks, block, _ = _blocks(paged.width, block_dim, most)
    return _tile(paged, block_dim, most, per_thread, max(1, most // (blocks * block)))


def segment_tile(width: int) -> Tile:
    """For sums of rows: rows of float32, as in steps."""
    most, per_thread = _STEP_TILE[4], _STEP_PER_THREAD[4]
    blocks, block, block_dim = _blocks(width, None, most)
    rows = max(1, most // (blocks * block))
    return Tile(rows, blocks, block, block_dim, width, width, 0, max(1, rows * block // (_WARP * per_thread)))


def score_tile(deterministic: bool) -> dict[str, int]:
    """Queries, keys and dimensions of a tile of scores; tensor cores (not deterministic) take larger ones."""
    if deterministic:
        return {"QUERY_TILE": 64, "KEY_TILE": 64, "DIM_TILE": 32, "num_warps": 8, "num_stages": 2}
    return {"QUERY_TILE": 64, "KEY_TILE": 128, "DIM_TILE": 32, "num_warps": 8, "num_stages": 3}
