"""Reading a table at a version: what shards are asked and answer. Pure."""
