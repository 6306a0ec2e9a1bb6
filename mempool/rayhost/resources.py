"""What shards ask Ray for beside what it has to give: pure comparisons, in words."""

from collections.abc import Mapping

from mempool.config import ShardConfig

PROCESS_BYTES = 400 * 2**20
"""What a shard's process takes before it holds anything. Ray reserves it, also where a shard asks for no CPU: a slip of
the finger in the number of shards would start processes until the machine has no memory left."""


def asked(shard: ShardConfig) -> dict[str, float]:
    """What one shard asks Ray for, by Ray's names."""
    return {"CPU": shard.num_cpus, "GPU": shard.num_gpus, "memory": PROCESS_BYTES, **shard.resources}


def shortage(asked: Mapping[str, float], free: Mapping[str, float], *, shards: int) -> str:
    """Where so many shards ask for more than is free: "CPU 3, free 1"; "" where they do not.

    Of all nodes together: what is free may still lie in parts on several, none of which takes a shard.
    """
    return ", ".join(
        f"{name} {amount_text(name, asked[name] * shards)}, free {amount_text(name, free.get(name, 0))}"
        for name in _short(asked, free, shards)
    )


def remedies(asked: Mapping[str, float], free: Mapping[str, float], *, shards: int) -> str:
    """What to change where ``shortage`` names something, of that alone."""
    names = {
        "CPU": "lower shard.num_cpus in the config",
        "GPU": "lower shard.num_gpus in the config",
        "memory": "give Ray more memory (ray start --memory; of it each shard's process takes "
        f"{PROCESS_BYTES / 2**30:.1f} GiB, beside shard.memory)",
    }
    short = _short(asked, free, shards)
    return ", ".join(dict.fromkeys(names.get(name, "lower shard.resources in the config") for name in short))


def _short(asked: Mapping[str, float], free: Mapping[str, float], shards: int) -> list[str]:
    # Ray counts in ten-thousandths
    return [name for name, amount in asked.items() if amount * shards > free.get(name, 0) + 1e-6]


def amount_text(name: str, amount: float) -> str:
    """An amount as people read it: Ray counts memory in bytes."""
    return f"{amount / 2**30:.1f} GiB" if name == "memory" else f"{amount:g}"
