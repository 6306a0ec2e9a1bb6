"""How a shard's work is done: jobs in a fair order on one thread, and reads at once on the thread that asks."""
