"""How a table is cut into row pages and column blocks: numbers only, no owners."""

from mempool.errors import InvalidRequest

__all__ = ["block_columns", "default_block_dim", "default_page_slots", "num_blocks", "num_row_pages"]

_MIN_BLOCK_DIM = 64
_MIN_PAGE_SLOTS = 16
_MAX_PAGE_SLOTS = 4096
_ROW_PAGES_WANTED = 64


def num_row_pages(num_slots: int, page_slots: int) -> int:
    """Number of row pages of ``num_slots`` slots; the last one may be filled in part.

    Raises:
        InvalidRequest: an argument is below 1.
    """
    _at_least_one(num_slots=num_slots, page_slots=page_slots)
    return -(-num_slots // page_slots)


def num_blocks(value_dim: int, block_dim: int) -> int:
    """Number of column blocks of a value ``value_dim`` wide; the last one may be narrower.

    Raises:
        InvalidRequest: an argument is below 1.
    """
    _at_least_one(value_dim=value_dim, block_dim=block_dim)
    return -(-value_dim // block_dim)


def block_columns(block: int, value_dim: int, block_dim: int) -> tuple[int, int]:
    """Columns of a value that ``block`` holds, as (start, stop); the last block may be narrower.

    Example:
        >>> block_columns(1, value_dim=100, block_dim=64)
        (64, 100)

    Raises:
        InvalidRequest: the table has no such block.
    """
    count = num_blocks(value_dim, block_dim)
    if not 0 <= block < count:
        raise InvalidRequest(
            f"block {block} does not exist: {value_dim} columns in blocks of {block_dim} make {count} blocks."
        )
    return block * block_dim, min((block + 1) * block_dim, value_dim)


def default_block_dim(value_dim: int) -> int:
    """Width of a column block where the schema names none: an eighth of the value in steps of 64, at least 64.

    Never wider than the value itself.

    Raises:
        InvalidRequest: ``value_dim`` is below 1.
    """
    _at_least_one(value_dim=value_dim)
    eighth = -(-value_dim // (8 * _MIN_BLOCK_DIM)) * _MIN_BLOCK_DIM
    return min(eighth, value_dim)


def default_page_slots(num_slots: int) -> int:
    """Slots of a row page where the schema names none: a power of two, 16 to 4096, for at most 64 pages if it can.

    Raises:
        InvalidRequest: ``num_slots`` is below 1.
    """
    _at_least_one(num_slots=num_slots)
    wanted = -(-num_slots // _ROW_PAGES_WANTED)
    next_power = 1 << (wanted - 1).bit_length()
    return min(_MAX_PAGE_SLOTS, max(_MIN_PAGE_SLOTS, next_power))


def _at_least_one(**numbers: int) -> None:
    for name, number in numbers.items():
        if number < 1:
            raise InvalidRequest(f"{name} = {number}: must be at least 1.")
