"""Which tests run on which kinds of pools and hosts: each on every kind, but all its cases on some kinds alone.

What a case computes is the same on all kinds; `make test-long` runs them all (MEMPOOL_TEST_LONG).
"""

import os
from collections.abc import Callable

import pytest

LONG = bool(os.environ.get("MEMPOOL_TEST_LONG"))


def leave_out_repeats(config: pytest.Config, items: list[pytest.Item], kind_of: Callable[[pytest.Item], str]) -> None:
    """Of the tests of one of these kinds, leave the first case of each function.

    Args:
        kind_of: The kind of a test, "" where all cases of it are to run.
    """
    seen: set[tuple[str, str]] = set()
    kept, left_out = [], []
    for item in items:
        kind, function = kind_of(item), item.nodeid.partition("[")[0]
        first = (function, kind) not in seen
        seen.add((function, kind))
        (kept if LONG or not kind or first else left_out).append(item)
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = kept


def parameter(item: pytest.Item, fixture: str) -> str:
    """What a fixture of a test is made with, "" where the test has none."""
    return str(getattr(getattr(item, "callspec", None), "params", {}).get(fixture, ""))
