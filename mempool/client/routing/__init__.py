"""The way of a call to the shards of its table and back: plans, tries, retries. No threads, no autograd, no gRPC."""
