"""Where a pool is, as its messages need to know: what is said of it, and what its user can do."""

from collections.abc import Callable
from dataclasses import dataclass

_REMOTE_ADVICE = "See which shards are up: mempool status"


@dataclass(frozen=True, slots=True, kw_only=True)
class Whereabouts:
    """A pool in the words of its messages.

    Attributes:
        name: Its name; "" while it is not known yet.
        embedded: It runs in this process (``mempool.local``): there is no address, no command, nothing to connect to.
        doing: What a shard is at, "" if there is nothing to say; None where nobody knows.
        address: As it was connected to; "" for an embedded pool.
    """

    name: str = ""
    embedded: bool = False
    doing: Callable[[int], str] | None = None
    address: str = ""

    @property
    def pool(self) -> str:
        """The pool, in a sentence."""
        kind = "embedded pool" if self.embedded else "pool"
        return f"{kind} {self.name!r}" if self.name else f"the {kind}"

    @property
    def silent(self) -> str:
        """The pool did not answer, in the past tense."""
        return f"{self.pool} did not answer" if self.name else "no pool answered"

    def shard_advice(self, shard: int | None) -> str:
        """What to do about a shard that does not answer."""
        if not self.embedded:
            return _REMOTE_ADVICE
        doing = "" if shard is None or self.doing is None else self.doing(shard)
        at = doing or "it is at work on earlier calls, or its kernels are being compiled, which happens once"
        return (
            f"It runs in this process, so nothing is lost: {at}. Repeat the call, or give mempool.local(timeout_s=...)"
        )

    @property
    def unreachable_advice(self) -> str:
        """What to do about a controller that does not answer."""
        if self.embedded:
            return (
                "Its controller runs in this process and is still at work on an earlier call (it makes or moves a "
                "table). Repeat the call, or give mempool.local(timeout_s=...)"
            )
        return "Is it up, and the address right? Start one: mempool up -f cluster/local.yaml"

    @property
    def moving_advice(self) -> str:
        """What to do about pages that are on their way all the time."""
        if self.embedded:
            return "Its pages are moving (pool.rescale), which ends by itself: repeat the call then."
        return (
            "Its pages may be moving, which ends by itself (see mempool status): repeat the call then, or connect with "
            "a longer timeout_s."
        )

    @property
    def elsewhere_advice(self) -> str:
        """How another process gets to the pool, which no pickle can carry."""
        if self.embedded:
            return "It lives in this process only: for several processes start a pool (mempool up) and connect to it."
        return "In the other process, connect to the pool (mempool.connect) and take pool.table(name)."

    @property
    def closed(self) -> str:
        """The pool was closed before the call."""
        if self.embedded:
            return f"{self.pool} is closed, and its tables ended with it; make another with mempool.local()."
        return f"{self.pool} is closed; connect to it again."

    def without_advice(self, message: str) -> str:
        """A message, less what is said once, at the end."""
        return message.removesuffix(_REMOTE_ADVICE).rstrip(". ")
