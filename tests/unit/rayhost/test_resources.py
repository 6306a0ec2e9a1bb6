"""What shards ask for beside what is free, in words."""

from mempool.config import ShardConfig
from mempool.rayhost.resources import PROCESS_BYTES, asked, remedies, shortage


def test_a_shard_asks_for_cpus_gpus_and_what_it_names() -> None:
    assert asked(ShardConfig()) == {"CPU": 0, "GPU": 0, "memory": PROCESS_BYTES}
    several = asked(ShardConfig(num_cpus=2, num_gpus=0.5, resources={"disk": 1}))
    assert several == {"CPU": 2, "GPU": 0.5, "memory": PROCESS_BYTES, "disk": 1}


def test_four_hundred_shards_find_no_room_on_a_small_machine_even_without_cpus() -> None:
    wanted = asked(ShardConfig(num_cpus=0))
    free = {"CPU": 2.0, "memory": 16.0 * 2**30}
    assert shortage(wanted, free, shards=4) == ""
    assert shortage(wanted, free, shards=400) == "memory 156.2 GiB, free 16.0 GiB"


def test_remedies_are_of_what_is_short_alone() -> None:
    wanted, free = asked(ShardConfig(num_cpus=1, resources={"disk": 1, "tape": 1})), {"CPU": 2.0, "memory": 2.0**40}
    assert remedies(wanted, free | {"disk": 9.0, "tape": 9.0}, shards=3) == "lower shard.num_cpus in the config"
    assert remedies(wanted, free, shards=2) == "lower shard.resources in the config"
    assert "ray start --memory" in remedies({"memory": 1.0}, {}, shards=1)


def test_a_shortage_names_what_is_needed_and_what_is_free() -> None:
    wanted = {"CPU": 1.0, "GPU": 0.5, "disk": 0.0}
    assert shortage(wanted, {"CPU": 4.0, "GPU": 2.0}, shards=4) == ""
    assert shortage(wanted, {"CPU": 1.0}, shards=3) == "CPU 3, free 1, GPU 1.5, free 0"
    assert shortage(wanted, {}, shards=0) == ""
    assert shortage({"CPU": 0.1}, {"CPU": 0.3}, shards=3) == "", "0.1 * 3 is a little more than 0.3"
