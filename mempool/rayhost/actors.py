"""The actors of a pool on Ray: their names, how they are made, and the environment of their processes."""

import logging
import os
import site
import sysconfig
from pathlib import Path
from typing import Any

import ray

NAMESPACE = "mempool"
NICENESS_VARIABLE = "RAY_worker_niceness"
"""Of a node of Ray's: how far behind all else on their host its workers run; 15 where nothing is said."""
_LOG = logging.getLogger("mempool.rayhost")

# A thread of OpenMP (torch's and Numba's kernels) that waits for work spins on its core by default, for 200 ms and
# more: beside a trainer on the same host both lose ten times what the kernel takes. Read when the library is loaded.
_QUIET_THREADS = {"OMP_WAIT_POLICY": "passive", "GOMP_SPINCOUNT": "0", "KMP_BLOCKTIME": "0"}
# glibc gives each thread a heap of its own, of which each keeps what its largest moment took: of gRPC's dozen threads
# some 30 MiB, which grew for as long as clients came and went.
_FEW_HEAPS = {"MALLOC_ARENA_MAX": "2"}


def make_actor(
    process: type, *arguments: object, name: str, variables: dict[str, str] | None = None, **options: Any
) -> Any:
    """Start a process as an actor that outlives its creator, with calls of group "health" answered at any time.

    variables: Of the process's environment, beside those that every process of a pool has.
    """
    environment = process_environment(variables)
    remote: Any = ray.remote  # whose types know no concurrency groups
    actor_class = remote(concurrency_groups={"health": 1})(process)
    if environment:
        options["runtime_env"] = {"env_vars": environment}
    return actor_class.options(name=name, namespace=NAMESPACE, lifetime="detached", **options).remote(*arguments)


def kernel_variables(threads: int) -> dict[str, str]:
    """The environment of a process that runs kernels: its threads, which sleep when they have nothing to do.

    Ray by itself sets OMP_NUM_THREADS=1 for actors without CPUs.
    """
    return {"OMP_NUM_THREADS": str(threads), "NUMBA_NUM_THREADS": str(threads), **_QUIET_THREADS}


def shard_variables(threads: int) -> dict[str, str]:
    """The environment of a shard's process: also the heaps that its threads share, where nobody has said otherwise."""
    return {**kernel_variables(threads), **{name: os.environ.get(name, few) for name, few in _FEW_HEAPS.items()}}


def run_beside_others() -> None:
    """Have the threads of this actor's process run as the node's own process does.

    Beside whoever computes on the same host, a trainer say, a process that Ray has put behind all others gets a
    thirtieth of a processor. Where the system does not allow it that is said in the log.
    """
    threads = Path("/proc/self/task")
    try:
        wanted = os.getpriority(os.PRIO_PROCESS, os.getppid())
        for thread in map(int, os.listdir(threads)) if threads.exists() else [0]:
            if os.getpriority(os.PRIO_PROCESS, thread) > wanted:
                os.setpriority(os.PRIO_PROCESS, thread, wanted)
    except PermissionError:
        _LOG.warning(
            "this process runs at nice %d, behind all others of its host: beside a trainer there its answers take many "
            "times as long. Start Ray on this node with %s=0 in its environment",
            os.getpriority(os.PRIO_PROCESS, 0),
            NICENESS_VARIABLE,
        )
    except ProcessLookupError:  # a thread has ended; those that matter are still to come
        pass


def process_environment(variables: dict[str, str] | None = None) -> dict[str, str]:
    """What the environment of a process of a pool has beside Ray's own."""
    return {**_path(), **(variables or {})}


def _path() -> dict[str, str]:
    """Lets workers of this host import the mempool that this command is, where it is not an installed one."""
    here = Path(__file__).resolve().parents[2]
    installed = {sysconfig.get_path("purelib"), sysconfig.get_path("platlib"), site.getusersitepackages()}
    return {} if str(here) in installed else {"PYTHONPATH": f"{here}:${{PYTHONPATH}}"}


def node_ip() -> str:
    """This node's address, as other nodes see it."""
    address: Any = ray.util.get_node_ip_address
    return str(address())


def node_id() -> str:
    """Ray's id of this process's node."""
    return str(ray.get_runtime_context().get_node_id())


def free_resources() -> dict[str, float]:
    """What Ray could give to new actors."""
    available: Any = ray.available_resources
    return dict(available())


def cluster_resources() -> dict[str, float]:
    """What all nodes of Ray have, in use or not."""
    everything: Any = ray.cluster_resources
    return dict(everything())


def controller_name(pool: str) -> str:
    """Name of the pool's controller actor."""
    return f"{pool}/controller"


def shard_name(pool: str, shard: int, generation: int = 0) -> str:
    """Name of one shard's actor; each that stands in for another one is of the next generation."""
    return f"{pool}/shard-{shard}" + (f".{generation}" if generation else "")


def shard_of(pool: str, actor: str) -> tuple[int, int] | None:
    """The shard number and the generation of an actor's name; None where it is no shard of this pool."""
    prefix = f"{pool}/shard-"
    number, dot, generation = actor.removeprefix(prefix).partition(".")
    if not actor.startswith(prefix) or not number.isdecimal() or (dot and not generation.isdecimal()):
        return None
    return int(number), int(generation or 0)


def pool_of(actor: str) -> str | None:
    """The pool of an actor's name; None where it is no actor of a pool."""
    pool, separator, _ = actor.partition("/")
    return pool if separator else None
