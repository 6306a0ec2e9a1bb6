"""Copies of tensors on the way of a look-up: what the product's functions that copy have copied, counted as they run.

Each site below is one place in the code that copies; its function is wrapped, and says how many bytes it was. Copies in
the system (``calls`` counts them: what is sent and received) and inside of gRPC's own library are not among these, and
neither is the result that a kernel writes.
"""

from __future__ import annotations

import functools
import importlib
import queue
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from mempool.bench.processes import pool
from mempool.bench.processes.child import START_TIMEOUT_S, Parent
from mempool.bench.serve.contenders import pools
from mempool.bench.serve.shapes import Shape, TableSize, drawn_pairs

CLIENT, SERVER = "client", "server"
_LOOK_UPS = 3

#: Bytes that one call has copied, by side; from its result and its arguments.
CopiedBytes = Callable[[Any, tuple[Any, ...]], "tuple[str, int]"]


@dataclass(frozen=True)
class Site:
    """A place that copies.

    Attributes:
        what: For people.
        where: "package.module:function" or "package.module:Class.method".
        copied: See ``CopiedBytes``.
    """

    what: str
    where: str
    copied: CopiedBytes


def _whole(side: str) -> CopiedBytes:
    return lambda result, _: (side, result.nbytes)


def _unless_same(side: str) -> CopiedBytes:
    """Of one that gives its first argument back where nothing is to be done."""
    return lambda result, given: (side, 0 if _at(result) == _at(given[0]) else result.nbytes)


def _admitted(result: Any, given: tuple[Any, ...]) -> tuple[str, int]:
    pairs = zip(result or (), given, strict=False)
    return SERVER, sum(made.nbytes for made, was in pairs if _at(made) != _at(was))


def _own_numbers(result: Any, given: tuple[Any, ...]) -> tuple[str, int]:
    before = given[0]
    pairs = ((result.ids, before.ids), (result.offsets, before.offsets))
    return SERVER, sum(made.nbytes for made, was in pairs if made is not was)


def _merged(result: Any, given: tuple[Any, ...]) -> tuple[str, int]:
    replies = given[1]
    return CLIENT, 0 if any(_at(result) == _at(values) for _, values in replies) else result.nbytes


def _end(line: Any) -> str:
    return CLIENT if type(line).__name__ == "ClientLine" else SERVER


def _into_memory(result: Any, given: tuple[Any, ...]) -> tuple[str, int]:
    num_bytes = sum(len(part) for part in given[2])
    return _end(given[0]), num_bytes if sum(len(piece) for piece in result) < num_bytes else 0


def _into_message(result: Any, given: tuple[Any, ...]) -> tuple[str, int]:
    num_bytes = sum(len(part) for part in given[2])
    is_joined = len(result) == 1 and len(result[0]) >= num_bytes
    return _end(given[0]), num_bytes if is_joined else 0


def _from_buffer(result: Any, given: tuple[Any, ...]) -> tuple[str, int]:
    return _end(given[0]), result[1]


def _encoded(result: Any, given: tuple[Any, ...]) -> tuple[str, int]:
    return {"GatherRequest": CLIENT, "GatherReply": SERVER}.get(given[0].name, ""), len(result)


def _read_small(result: Any, given: tuple[Any, ...]) -> tuple[str, int]:
    """Into protobuf's message, out of it as bytes, and into memory that may be written to."""
    codec, frame = given
    return {"GatherRequest": SERVER, "GatherReply": CLIENT}.get(codec.name, ""), 0 if result is None else 3 * len(frame)


def _misaligned(result: Any, given: tuple[Any, ...]) -> tuple[str, int]:
    memory, part = given
    is_copy = result.numel() and (memory._address + part.at) % part.dtype.itemsize
    return "", result.nbytes if is_copy else 0


SITES = (
    Site("ids and weights into memory of the call's own", "mempool.client.bags:own_copy", _whole(CLIENT)),
    Site("ids as uint32, for gRPC", "mempool.wire.codecs.codec:narrowed", _whole(CLIENT)),
    Site("ids as uint32, for a line", "mempool.wire.lines.plain:_narrowed", _unless_same(CLIENT)),
    Site("body into shared memory", "mempool.wire.lines.line:Line._packed", _into_memory),
    Site("small body into its message", "mempool.wire.lines.line:Line._packed", _into_message),
    Site("small body out of the line's buffer", "mempool.wire.lines.line:Line._begun", _from_buffer),
    Site("tensors into a frame", "mempool.wire.codecs.codec:FrameCodec.encode", _encoded),
    Site("small frame through protobuf", "mempool.wire.codecs.codec:FrameCodec._small", _read_small),
    Site("misaligned tensor of a frame", "mempool.wire.bodies.tensors:FrameMemory.tensor", _misaligned),
    Site("ids and offsets out of shared memory", "mempool.server.lines.answering:_with_own_numbers", _own_numbers),
    Site("ids and offsets checked and narrowed", "mempool.kernels.dispatch.admission:admit_bags", _admitted),
    Site("weights to be kept", "mempool.shard.validate:admit", _unless_same(SERVER)),
    Site("shards' sums put together", "mempool.client.routing.plan:merge_values", _merged),
)


class Copies:
    """Bytes by site and side, and number of copies, of whatever thread of this process."""

    def __init__(self) -> None:
        self.num_bytes: Counter[tuple[str, str]] = Counter()
        self._lock = threading.Lock()

    def add(self, site: Site, side: str, num_bytes: int) -> None:
        with self._lock:
            self.num_bytes[site.what, side] += num_bytes

    def clear(self) -> None:
        with self._lock:
            self.num_bytes.clear()


@contextmanager
def counted() -> Iterator[Copies]:
    """Wrap the functions of all sites, wherever they are named in the product, until the block ends.

    Raises:
        AttributeError: A site's function is there no more: the table above is of another version.
    """
    copies = Copies()
    with ExitStack() as stack:
        for site in SITES:
            _wrap(site, copies, stack)
        yield copies


def _wrap(site: Site, copies: Copies, stack: ExitStack) -> None:
    module, _, name = site.where.partition(":")
    owner: Any = importlib.import_module(module)
    *path, name = name.split(".")
    for part in path:
        owner = getattr(owner, part)
    plain = getattr(owner, name)

    @functools.wraps(plain)
    def wrapped(*given: Any, **named: Any) -> Any:
        result = plain(*given, **named)
        side, num_bytes = site.copied(result, given)
        if num_bytes:
            copies.add(site, side, num_bytes)
        return result

    owners = [owner] if path else [one for one in _modules() if one.__dict__.get(name) is plain]
    for one in owners:
        setattr(one, name, wrapped)
        stack.callback(setattr, one, name, plain)


def _modules() -> list[Any]:
    return [module for name, module in list(sys.modules.items()) if name.startswith("mempool.") and module is not None]


def _at(tensor: Any) -> int:
    return int(tensor.data_ptr()) if isinstance(tensor, torch.Tensor) else id(tensor)


def serve(parent: Parent, *, size: dict[str, int], shapes: Sequence[Sequence[int]]) -> None:
    """[PROCESS] a pool that serves, its clients, and an embedded pool, all in this one, so that all copies are counted.

    Says, by contender and shape, the bytes that one look-up copies: [what, side, bytes] each.
    """
    torch.set_num_threads(1)
    table = TableSize(**size)
    found: dict[str, dict[str, list[Any]]] = {}
    with ExitStack() as stack:
        contenders = [stack.enter_context(pools.embedded(table))]
        address = _served_here()
        first = stack.enter_context(pools.client(address, pools.GRPC))
        contenders.append(pools.look_up(pools.GRPC, pools.made(first, table), table))
        for way in pools.REMOTE[1:]:
            other = stack.enter_context(pools.client(address, way))
            facts = other.table("facts")
            if pools.goes(way, other, facts):
                contenders.append(pools.look_up(way, facts, table))
        copies = stack.enter_context(counted())
        for contender in contenders:
            for bags, pairs in shapes:
                shape = Shape(bags, pairs)
                (drawn,) = drawn_pairs(shape, table, seed=0, num_sets=1)
                contender.check(drawn)
                copies.clear()
                for _ in range(_LOOK_UPS):
                    contender.run(drawn)
                found.setdefault(contender.name, {})[shape.name] = [
                    [what, side, num_bytes / _LOOK_UPS] for (what, side), num_bytes in copies.num_bytes.items()
                ]
    parent.say(found)
    parent.wait()


def _served_here() -> str:
    """A pool of one shard in this process, as long as that is there; its address."""
    said: queue.SimpleQueue[Any] = queue.SimpleQueue()

    class Here(Parent):
        def __init__(self) -> None:
            pass

        def say(self, message: object) -> None:
            said.put(message)

        def wait(self) -> None:
            threading.Event().wait()

    arguments = {"shards": 1, "threads": 1, "memory_bytes": 2**31}
    threading.Thread(target=pool.serve, args=(Here(),), kwargs=arguments, daemon=True).start()
    ready = said.get(timeout=START_TIMEOUT_S)
    return str(ready["address"])
