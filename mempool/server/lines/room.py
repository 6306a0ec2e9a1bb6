"""How many bytes of what clients send by lines may be in this process at a time; of the lines' thread alone.

As ``admission`` has it for gRPC, but that a message's size is known before it is here: who finds no room waits, and
sends meanwhile what the system holds for it. Nobody is refused.
"""


class Room:
    """Bytes of bodies that are coming, or are being answered.

    Args:
        budget_bytes: Of all together. One body is let in always, whatever its size.
        largest_bytes: Of one body. Whatever one host does, there is room for one of another.
    """

    def __init__(self, budget_bytes: int, largest_bytes: int) -> None:
        self._budget_bytes = budget_bytes
        self._most_of_host = max(largest_bytes, budget_bytes - largest_bytes)
        self._used_by: dict[str, int] = {}
        self.used_bytes = 0

    def take(self, host: str, num_bytes: int) -> bool:
        """Whether so much was taken; it is to be given back then."""
        of_host = self._used_by.get(host, 0)
        if self.used_bytes and self.used_bytes + num_bytes > self._budget_bytes:
            return False
        if of_host and of_host + num_bytes > self._most_of_host:
            return False
        self.used_bytes += num_bytes
        self._used_by[host] = of_host + num_bytes
        return True

    def give_back(self, host: str, num_bytes: int) -> None:
        """Its body is not needed any more."""
        self.used_bytes -= num_bytes
        left = self._used_by[host] - num_bytes
        if left:
            self._used_by[host] = left
        else:  # names come from outside
            del self._used_by[host]
