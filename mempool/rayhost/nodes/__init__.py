"""On which of Ray's nodes a shard that has storage starts: what lies on their disks, and the choice."""
