"""Rows that are experts: what a shard answers of them, and what it holds of their gradients."""
