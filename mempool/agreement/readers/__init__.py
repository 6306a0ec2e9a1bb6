"""How readers and shards agree on the version that is read: pure state machines."""
