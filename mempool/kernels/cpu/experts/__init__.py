"""Rows that are experts, read where they lie: one pass over u and v of each pair."""
