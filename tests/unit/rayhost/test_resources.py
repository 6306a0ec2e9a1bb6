"""What shards ask for beside what is free, in words."""

from mempool.config import ShardConfig
from mempool.rayhost.resources import asked, shortage


def test_a_shard_asks_for_cpus_gpus_and_what_it_names() -> None:
    assert asked(ShardConfig()) == {"CPU": 0, "GPU": 0}
    assert asked(ShardConfig(num_cpus=2, num_gpus=0.5, resources={"disk": 1})) == {"CPU": 2, "GPU": 0.5, "disk": 1}


def test_a_shortage_names_what_is_needed_and_what_is_free() -> None:
    wanted = {"CPU": 1.0, "GPU": 0.5, "disk": 0.0}
    assert shortage(wanted, {"CPU": 4.0, "GPU": 2.0}, shards=4) == ""
    assert shortage(wanted, {"CPU": 1.0}, shards=3) == "CPU 3, free 1, GPU 1.5, free 0"
    assert shortage(wanted, {}, shards=0) == ""
    assert shortage({"CPU": 0.1}, {"CPU": 0.3}, shards=3) == "", "0.1 * 3 is a little more than 0.3"
