"""What a rescale waits for, said while nothing is heard of it: the pool's status is asked now and then."""

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from mempool.errors import MempoolError
from mempool.types import PoolStatus, RescaleProgress

# So long nothing was heard before the pool is asked, and then asked again.
_QUIET_S = 2.0


@contextmanager
def told_waits(
    ask: Callable[[], PoolStatus], *, say: Callable[[str], None], progress: Callable[[RescaleProgress], None]
) -> Iterator[Callable[[RescaleProgress], None]]:
    """Gives what to call with each report of the rescale; it calls ``progress``.

    Args:
        ask: Gives the pool's status, from a thread of its own; where it raises MempoolError nothing is said.
        say: Told what is waited for, once for each other thing.
        progress: Where the reports go.
    """
    heard, ended = threading.Event(), threading.Event()

    def report(now: RescaleProgress) -> None:
        heard.set()
        progress(now)

    def watch() -> None:
        said = ""
        while not ended.wait(_QUIET_S):
            if heard.is_set():
                heard.clear()
                continue
            try:
                waiting_for = ask().waiting_for
            except MempoolError:
                continue
            if waiting_for and waiting_for != said and not ended.is_set():
                said = waiting_for
                say(f"waiting for {waiting_for}")

    watcher = threading.Thread(target=watch, name="mempool-waits", daemon=True)
    watcher.start()
    try:
        yield report
    finally:
        ended.set()
