"""A shard's part in a checkpoint of its pool: marks, parts that are written, pages that are read back."""
