"""The order of the suite: two workers take its files one after the other, and a long one at the end leaves one idle."""

import pytest

_LONG = ("test_triton.py", "test_parts.py", "test_training.py", "test_distributed.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: _LONG.index(item.path.name) if item.path.name in _LONG else len(_LONG))
