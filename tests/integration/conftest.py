"""One Ray for the session, with a pool on it that listens on all interfaces and asks for a token."""

from collections.abc import Iterator

import pytest

from tests.integration.pools import RayPool
from tests.integration.ray_nodes import RayNodes

TOKEN = "integration-token-0123456789"


@pytest.fixture(scope="session")
def ray_nodes() -> Iterator[RayNodes]:
    """A Ray that no `mempool up` started. Tests may add nodes, and remove them again."""
    pytest.importorskip("ray")
    with RayNodes() as nodes:
        yield nodes


@pytest.fixture(scope="session")
def pool_of_all(ray_nodes: RayNodes, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayPool]:
    """A pool of 2 shards on the session's Ray."""
    pool = RayPool(
        tmp_path_factory.mktemp("shared"),
        name="shared",
        shards=2,
        ray_at=ray_nodes.address,
        token=TOKEN,
        resources={"head": 1},
        trainer_lease_s=2.0,
    )
    pool.up()
    yield pool
    pool.down()


@pytest.fixture
def shared_pool(pool_of_all: RayPool) -> Iterator[RayPool]:
    """The session's pool. Every test leaves any number of shards, and no table: one with lost pages, of a test that
    failed, would stand in the way of all later ones."""
    yield pool_of_all
    with pool_of_all.connect() as pool:
        for table in pool.tables():
            pool.drop_table(table.name)
