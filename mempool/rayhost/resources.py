"""What shards ask Ray for beside what it has to give: pure comparisons, in words."""

from collections.abc import Mapping

from mempool.config import ShardConfig


def asked(shard: ShardConfig) -> dict[str, float]:
    """What one shard asks Ray for, by Ray's names."""
    return {"CPU": shard.num_cpus, "GPU": shard.num_gpus, **shard.resources}


def shortage(asked: Mapping[str, float], free: Mapping[str, float], *, shards: int) -> str:
    """Where so many shards ask for more than is free: "CPU 3, free 1"; "" where they do not.

    Of all nodes together: what is free may still lie in parts on several, none of which takes a shard.
    """
    return ", ".join(
        f"{name} {amount * shards:g}, free {free.get(name, 0):g}"
        for name, amount in asked.items()
        if amount * shards > free.get(name, 0) + 1e-6  # Ray counts in ten-thousandths
    )
