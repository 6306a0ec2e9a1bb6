"""Keys that are trained in the pool: the table that has them, and which of its rows are whose. Pure."""

from mempool.types.keys.key_table import is_key_table, key_table, key_table_name, least_root

__all__ = ["is_key_table", "key_table", "key_table_name", "least_root"]
