"""One Ray for the session, with a pool on it that listens on all interfaces and asks for a token."""

from collections.abc import Iterator

import pytest

from tests.integration.pools import RayPool

TOKEN = "integration-token-0123456789"


@pytest.fixture(scope="session")
def cluster() -> Iterator["ray.cluster_utils.Cluster"]:  # noqa: F821  # Ray is loaded where it is used
    """A Ray that no `mempool up` started. Tests may add nodes, and remove them again."""
    cluster_utils = pytest.importorskip("ray.cluster_utils")
    cluster = cluster_utils.Cluster(
        initialize_head=True, head_node_args={"num_cpus": 2, "include_dashboard": False, "resources": {"head": 100}}
    )
    yield cluster
    cluster.shutdown()


@pytest.fixture(scope="session")
def shared_pool(cluster: "ray.cluster_utils.Cluster", tmp_path_factory: pytest.TempPathFactory) -> Iterator[RayPool]:  # noqa: F821
    """A pool of 2 shards on the session's Ray. Every test drops its tables and leaves any number of shards."""
    pool = RayPool(
        tmp_path_factory.mktemp("shared"),
        name="shared",
        shards=2,
        ray_at=cluster.address,
        token=TOKEN,
        resources={"head": 1},
    )
    pool.up()
    yield pool
    pool.down()
