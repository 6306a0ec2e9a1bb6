"""Lives of shards that end with their test."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from shard_lives import Lives


@pytest.fixture
def make_lives() -> Iterator[Callable[..., Lives]]:
    made: list[Lives] = []

    def make(lives: Lives | None = None, **how: Any) -> Lives:
        made.append(lives or Lives(**how))
        return made[-1]

    yield make
    for lives in made:
        lives.close()
