"""`mempool bench train`: training steps of a table and of a layer, with values here, in a pool, in other libraries."""
