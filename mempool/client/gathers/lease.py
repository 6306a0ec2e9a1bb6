"""What lets shards forget a lookup once nobody can want its gradient any more: for gathers that were begun, of which it
is not known yet who remembers them when they are given up."""

import weakref
from collections import deque
from collections.abc import Callable


class Lease:
    """Lives as long as the handle and the graphs that hold it."""

    __slots__ = ("__weakref__",)


class Remembering:
    """One gather, and whether shards are still to remember it. For any thread, at any moment."""

    def __init__(self) -> None:
        # Taken by whoever comes first, so that shards are told once. Needs no lock: finalizers may run anywhere.
        self._release: deque[Callable[[], None]] = deque()
        self._over = False

    def lease(self) -> Lease:
        """Its end is this one's."""
        lease = Lease()
        weakref.finalize(lease, self.end).atexit = False
        return lease

    def remembered(self, release: Callable[[], None]) -> None:
        """Shards remember it by now; ``release`` lets them forget."""
        self._release.append(release)
        if self._over:
            self._tell()

    def end(self) -> None:
        """They may forget it, now or as soon as they have answered."""
        self._over = True
        self._tell()

    def forget(self) -> None:
        """Somebody else lets shards forget it. Once it was remembered."""
        self._release.clear()

    def _tell(self) -> None:
        try:
            release = self._release.pop()
        except IndexError:
            return
        release()
