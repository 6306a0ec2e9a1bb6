"""Predicted times of one split: on the machine whose constants they are, and of a step on other hosts, by its parts."""

from dataclasses import asdict, dataclass
from typing import Literal

from mempool.sizing.demands import Hosts, Model
from mempool.sizing.fit import total
from mempool.sizing.machine import Constants, Kernels, Machine
from mempool.sizing.split import Holding, Split
from mempool.sizing.traffic import (
    Amounts,
    client_amounts,
    gather_amounts,
    shard_amounts,
    traffic,
    traffic_of,
    update_amounts,
)

#: Waits for an answer in a step: gather, update, prepare, commit; prepare and commit are one where one shard owns all.
_ROUND_TRIPS = 4
_ROUND_TRIPS_OF_ONE = 3
_BITS = 8

Call = Literal["gather", "step"]


@dataclass(frozen=True, slots=True, kw_only=True)
class StepTime:
    """Seconds of a data-parallel step's memory layers, by parts that follow each other.

    Attributes:
        client: CPU of a trainer's process.
        waits: Hand-offs between threads and processes.
        wire: Latency, and bytes through the narrowest network interface.
        calls: CPU of the busiest shard's process beside its kernels, for all trainers.
        gather: Its kernels for all trainers' look-ups.
        update: Its kernels for gradients and commits.
    """

    client: float
    waits: float
    wire: float
    calls: float
    gather: float
    update: float

    @property
    def total(self) -> float:
        return self.client + self.waits + self.wire + self.calls + self.gather + self.update

    def tokens_per_s(self, model: Model) -> float:
        """Of all trainers together."""
        return model.trainers * model.tokens / self.total

    @property
    def limit(self) -> str:
        """The largest part."""
        parts: dict[str, float] = asdict(self)
        return max(parts, key=lambda part: parts[part])


def here_s(machine: Machine, path: str, call: Call, split: Split, *, bags: int, pairs: int, cores: int) -> float:
    """Seconds of one call of one client that runs on that machine together with all shards.

    Args:
        machine: The constants.
        path, call: Which of them.
        split: Of the table.
        bags: Of the call.
        pairs: Of all its bags together.
        cores: Of the machine, on which shards' kernels share.
    """
    costs = machine.paths[path].gather if call == "gather" else machine.paths[path].step
    kernels = machine.kernels["cpu"]
    amounts = wall_amounts(kernels, call, split, bags=bags, pairs=pairs, cores=cores)
    return total(costs.wall, amounts) + kernels_s(kernels, call, split, pairs=pairs, cores=cores)


def wall_amounts(kernels: Kernels, call: Call, split: Split, *, bags: int, pairs: int, cores: int) -> Amounts:
    """What a call's time on one machine consists of, beside the kernels of its busiest shard."""
    alone = kernels_s(kernels, call, split, pairs=pairs, cores=cores)
    sharing = all_kernels_s(kernels, call, split, pairs=pairs) - alone
    return {**client_amounts(split, bags=bags, pairs=pairs), "sharing": max(0.0, sharing)}


def kernels_s(kernels: Kernels, call: Call, split: Split, *, pairs: int, cores: int) -> float:
    """Seconds until the shard with the most to do is done, where all share some cores."""
    return _kernels_s(kernels, call, split.busiest, split, pairs=pairs) * max(1.0, split.asked / cores)


def all_kernels_s(kernels: Kernels, call: Call, split: Split, *, pairs: int) -> float:
    """Seconds of the kernels of all shards, one after the other."""
    return sum(held.shards * _kernels_s(kernels, call, held, split, pairs=pairs) for held in split.holdings)


def _kernels_s(kernels: Kernels, call: Call, held: Holding, split: Split, *, pairs: int) -> float:
    seconds = total(kernels.gather, gather_amounts(held, split, pairs=pairs))
    if call == "step":
        seconds += total(kernels.update, update_amounts(held, split, pairs=pairs))
    return seconds


def step_time(machine: Machine, path: str, split: Split, model: Model, hosts: Hosts) -> StepTime:
    """A step of all trainers, whose look-ups of a layer come to the shards at the same time.

    Each layer is counted as a look-up, an update and a commit of its own: those that share a table commit together, so
    this is a little more than it takes. Nothing overlaps: neither layers, nor what the model computes meanwhile.
    """
    costs = machine.paths[path].step
    bags, pairs, busiest = model.tokens, model.pairs, split.busiest
    client = total(costs.client, client_amounts(split, bags=bags, pairs=pairs))
    calls = total(costs.server, shard_amounts(busiest, bags=bags, pairs=pairs))
    waits = max(0.0, costs.wall.get("call", 0.0) - costs.client.get("call", 0.0) - costs.server.get("call", 0.0))
    kernels = kernels_of(machine, hosts)
    gather = total(kernels.gather, gather_amounts(busiest, split, pairs=pairs))
    update = total(kernels.update, update_amounts(busiest, split, pairs=pairs))
    crowding = hosts.crowding * _bandwidth_crowding(kernels, split, hosts)
    return StepTime(
        client=model.layers * client,
        waits=model.layers * waits,
        wire=model.layers * wire_s(split, model, hosts),
        calls=model.layers * model.trainers * calls * hosts.core_crowding,
        gather=model.layers * model.trainers * gather * crowding,
        update=model.layers * model.trainers * update * crowding,
    )


def wire_s(split: Split, model: Model, hosts: Hosts) -> float:
    """Latency and bytes of one layer: through a trainers' host's interface or a shards' host's, what takes longer."""
    mine = traffic(split, bags=model.tokens, pairs=model.pairs, wire_dtype=model.wire_dtype)
    trainers_bytes = min(hosts.trainers, model.trainers) * mine.moved
    one = traffic_of(split.busiest, split, bags=model.tokens, pairs=model.pairs, wire_dtype=model.wire_dtype)
    hosts_bytes = model.trainers * min(hosts.shards_each, split.asked) * one.moved
    trips = _ROUND_TRIPS if split.owners > 1 else _ROUND_TRIPS_OF_ONE
    bytes_per_s = hosts.nic_gbit_per_s * 1e9 / _BITS
    return trips * 2 * hosts.latency_us / 1e6 + max(trainers_bytes, hosts_bytes) / bytes_per_s


def kernels_of(machine: Machine, hosts: Hosts) -> Kernels:
    """Measured ones of the hosts' device; where there are none, the CPU's with as great a share of the bandwidth."""
    found = machine.kernels.get(hosts.device)
    if found is not None:
        return found
    ours = machine.kernels["cpu"]
    faster = (hosts.gpu_gb_per_s or 0.0) * 1e9 / machine.copy_bytes_per_s or 1.0
    return Kernels(gather=_scaled(ours.gather, faster), update=_scaled(ours.update, faster))


def _scaled(constants: Constants, faster: float) -> Constants:
    return {term: seconds / faster for term, seconds in constants.items()}


def _bandwidth_crowding(kernels: Kernels, split: Split, hosts: Hosts) -> float:
    """How many times longer shards of a host take as they share its memory's bandwidth, too."""
    if hosts.memory_gb_per_s is None or hosts.gpus:
        return 1.0
    read = gather_amounts(split.busiest, split, pairs=1)
    wanted = read["byte"] / max(total(kernels.gather, read), 1e-12) * min(hosts.shards_each, hosts.cores)
    return max(1.0, wanted / (hosts.memory_gb_per_s * 1e9))
