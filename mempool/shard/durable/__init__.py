"""A shard's durable half: what it writes to its journal and snapshots, and how it is made again of them."""
