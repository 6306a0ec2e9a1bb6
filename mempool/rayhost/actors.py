"""The actors of a pool on Ray: their names, and how they are made."""

from typing import Any

import ray

NAMESPACE = "mempool"


def make_actor(process: type, *arguments: object, name: str, **options: Any) -> Any:
    """Start a process as an actor that outlives its creator, with calls of group "health" answered at any time."""
    remote: Any = ray.remote  # whose types know no concurrency groups
    actor_class = remote(concurrency_groups={"health": 1})(process)
    return actor_class.options(name=name, namespace=NAMESPACE, lifetime="detached", **options).remote(*arguments)


def node_ip() -> str:
    """This node's address, as other nodes see it."""
    address: Any = ray.util.get_node_ip_address
    return str(address())


def free_resources() -> dict[str, float]:
    """What Ray could give to new actors."""
    available: Any = ray.available_resources
    return dict(available())


def cluster_resources() -> dict[str, float]:
    """What all nodes of Ray have, in use or not."""
    everything: Any = ray.cluster_resources
    return dict(everything())


def controller_name(pool: str) -> str:
    """Name of the pool's controller actor."""
    return f"{pool}/controller"


def shard_name(pool: str, shard: int) -> str:
    """Name of one shard's actor."""
    return f"{pool}/shard-{shard}"


def shard_of(pool: str, actor: str) -> int | None:
    """The shard number of an actor's name; None where it is no shard of this pool."""
    prefix = f"{pool}/shard-"
    number = actor.removeprefix(prefix)
    return int(number) if actor.startswith(prefix) and number.isdigit() else None


def pool_of(actor: str) -> str | None:
    """The pool of an actor's name; None where it is no actor of a pool."""
    pool, separator, _ = actor.partition("/")
    return pool if separator else None
