"""Steps on a shard: lookup contexts, held updates, preparing and applying them."""
