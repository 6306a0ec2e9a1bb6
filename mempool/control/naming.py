"""Names of the actors of a pool on Ray: the only thing `up`, `down` and a restarted controller share."""

NAMESPACE = "mempool"


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
