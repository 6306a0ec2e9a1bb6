"""Keys that are trained in the pool: the table that has them, and which of its rows are whose. Pure."""

from mempool.types.keys.grouping import Grouping, group_count, groups_problem, probe_count, topk_problem
from mempool.types.keys.key_table import grouping_of, is_key_table, key_table, key_table_name, least_root

__all__ = [
    "Grouping",
    "group_count",
    "grouping_of",
    "groups_problem",
    "is_key_table",
    "key_table",
    "key_table_name",
    "least_root",
    "probe_count",
    "topk_problem",
]
