"""Tables of a shard that begin as another one is at a moment."""
