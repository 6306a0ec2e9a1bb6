"""Who owns what in contract tests."""

# [7 row pages, 3 blocks] on up to three shards; "mixed" has shards whose pages have different blocks.
LAYOUTS: dict[str, list[list[int]]] = {
    "one": [[0, 0, 0]] * 7,
    "columns": [[0, 1, 1]] * 7,
    "rows": [[0, 0, 0]] * 4 + [[1, 1, 1]] * 3,
    "grid": [[0, 1, 1]] * 3 + [[2, 0, 0]] * 4,
    "mixed": [[0, 0, 1], [2, 1, 0], [0, 2, 2], [1, 1, 1], [2, 2, 2], [0, 1, 2], [1, 0, 0]],
}
EXACT_LAYOUTS = ("one", "columns")
BLOCK_ARRAYS = ("values.row_sum", "values.row_exp_avg_sq", "values.last_step", "values.scales")
