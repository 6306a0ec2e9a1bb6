"""How much of one table may be asked for at once by calls that nobody waits for yet."""

import threading

from mempool.errors import DeadlineExceeded

_WINDOW_BYTES = 256 * 2**20


class Window:
    """Bytes of calls that were begun and are not answered. Who begins one more waits until it fits.

    Args:
        window_bytes: So many at once; one call alone may be larger.
    """

    def __init__(self, *, window_bytes: int = _WINDOW_BYTES) -> None:
        self._window_bytes = window_bytes
        self._num_bytes = 0
        self._answered = threading.Condition()

    @property
    def num_bytes(self) -> int:
        """Asked for now, with room for their answers."""
        return self._num_bytes

    def enter(self, num_bytes: int, *, timeout_s: float) -> None:
        """Waits for room, and takes it.

        Raises:
            DeadlineExceeded: There was none for so long: earlier calls are not answered.
        """

        def fits() -> bool:
            return not self._num_bytes or self._num_bytes + num_bytes <= self._window_bytes

        with self._answered:
            if not self._answered.wait_for(fits, timeout_s):
                raise DeadlineExceeded(
                    f"{self._num_bytes / 2**20:.0f} MiB of look-ups that were started were not answered within"
                    f" {timeout_s:g} s, and one of {num_bytes / 2**20:.0f} MiB more waited for that; nothing was sent"
                )
            self._num_bytes += num_bytes

    def leave(self, num_bytes: int) -> None:
        """A call has its answer, or has failed."""
        with self._answered:
            self._num_bytes -= num_bytes
            self._answered.notify_all()
