"""`python -m mempool.bench.serve.counting`: system calls and copies of look-ups, each way, by what is looked up."""

from __future__ import annotations

import argparse
import json
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from typing import Any

import torch

from mempool.bench import machine
from mempool.bench.processes.child import Child
from mempool.bench.report import table as as_table
from mempool.bench.serve.client import Spell
from mempool.bench.serve.contenders import pools
from mempool.bench.serve.counting import calls, copies
from mempool.bench.serve.counting.calls import Calls, StraceError
from mempool.bench.serve.shapes import Shape, TableSize
from mempool.rayhost.actors import kernel_variables

SHAPES = (Shape(1024, 128), Shape(64, 32))
WAYS = (pools.EMBEDDED, *pools.REMOTE)
_CLIENT = "mempool.bench.serve.client:serve"
_COPIES = "mempool.bench.serve.counting.copies:serve"
#: Look-ups before all counting: by then a client has the connections that it goes on with.
_WARM_UP_CALLS = 20
#: What a count of fewer look-ups also has is no look-up's: it is subtracted.
_FEW_CALLS = 10
#: From an order to the begin of what is ordered.
_LEAD_S = 0.05
_TIMEOUT_S = 110.0


@dataclass(frozen=True)
class Side:
    """System calls of one process for one look-up.

    Attributes:
        way, shape, side: Of whom.
        calls: All.
        by_name: The same by name, most first.
        taken_bytes, given_bytes: That the system copied to the process and from it.
    """

    way: str
    shape: str
    side: str
    calls: float
    by_name: Mapping[str, float]
    taken_bytes: float
    given_bytes: float


def main(arguments: list[str] | None = None) -> None:
    """Count, and print."""
    parser = argparse.ArgumentParser(prog="python -m mempool.bench.serve.counting", description=__doc__)
    parser.add_argument("--calls", type=int, default=100, metavar="N", help="look-ups that are counted")
    parser.add_argument("--slots", type=int, default=2**18, metavar="N", help="slots of 256 float32")
    parser.add_argument("--json", action="store_true", help="print one JSON document, and nothing else")
    options = parser.parse_args(arguments)
    size, skipped = TableSize(options.slots, 256), []
    try:
        sides = system_calls(size, num_calls=max(1, options.calls))
    except StraceError as error:
        sides = []
        skipped.append(f"system calls: {error}")
    copied = copied_bytes(size)
    if options.json:
        found = document(size, sides, copied, skipped)
        print(json.dumps(found, indent=1))
        return
    print("\n".join(lines(size, sides, copied, skipped)))


def system_calls(
    size: TableSize, *, num_calls: int, ways: Sequence[str] = WAYS, shapes: Sequence[Shape] = SHAPES
) -> list[Side]:
    """Of one client and one shard, each way in a client process of its own.

    Raises:
        ChildError: A process does not start, or ends.
        StraceError: There is no strace, or it may not look at processes.
    """
    if not calls.available():
        raise StraceError("strace is not installed (apt-get install strace)")
    found = []
    with ExitStack() as stack:
        serving = stack.enter_context(pools.serving(size))
        (server,) = serving.process.pids
        for way in ways:
            address = "" if way == pools.EMBEDDED else serving.process.address
            asked = {
                "targets": {way: address},
                "size": asdict(size),
                "shapes": [[shape.bags, shape.pairs] for shape in shapes],
                "seed": 0,
            }
            with Child(_CLIENT, asked, variables=kernel_variables(1)) as client:
                client.hear()
                pids = {copies.CLIENT: client.pid}
                if way != pools.EMBEDDED:
                    pids[copies.SERVER] = server
                for shape in shapes:
                    spell = Spell(way, [shape.bags, shape.pairs], 0.0, _TIMEOUT_S / 2)
                    found += _sides(client, spell, pids, num_calls)
    return found


def _sides(client: Child, spell: Spell, pids: Mapping[str, int], num_calls: int) -> list[Side]:
    _asked(client, spell, _WARM_UP_CALLS)
    few = _traced(client, spell, pids, _FEW_CALLS)
    many = _traced(client, spell, pids, _FEW_CALLS + num_calls)
    return [_side(spell, side, few[side], many[side], num_calls) for side in pids]


def _traced(client: Child, spell: Spell, pids: Mapping[str, int], num_calls: int) -> dict[str, Calls]:
    with ExitStack() as stack:
        found = {side: stack.enter_context(calls.traced(pid)) for side, pid in pids.items()}
        _asked(client, spell, num_calls)
    return found


def _asked(client: Child, spell: Spell, num_calls: int) -> None:
    client.say(asdict(spell) | {"begin_s": time.monotonic() + _LEAD_S, "calls": num_calls})
    answer = client.hear(_TIMEOUT_S)
    if len(answer["latencies_ms"]) != num_calls:
        raise TimeoutError(f"{len(answer['latencies_ms'])} of {num_calls} look-ups in {spell.length_s:g} s")


def _side(spell: Spell, side: str, few: Calls, many: Calls, num_calls: int) -> Side:
    names = Counter(many.counts)
    names.subtract(few.counts)
    by_name = {name: count / num_calls for name, count in names.most_common() if count > 0}
    return Side(
        way=spell.target,
        shape=Shape(*spell.shape).name,
        side=side,
        calls=sum(by_name.values()),
        by_name=by_name,
        taken_bytes=(many.taken - few.taken) / num_calls,
        given_bytes=(many.given - few.given) / num_calls,
    )


def copied_bytes(size: TableSize, shapes: Sequence[Shape] = SHAPES) -> dict[str, dict[str, list[Any]]]:
    """By way and shape: what is copied, at which side, bytes of one look-up.

    Raises:
        ChildError: A site that is to be counted is not there, or the process does not start.
    """
    arguments = {"size": asdict(size), "shapes": [[shape.bags, shape.pairs] for shape in shapes]}
    with Child(_COPIES, arguments, variables=kernel_variables(1)) as child:
        found: dict[str, dict[str, list[Any]]] = child.hear(_TIMEOUT_S)
        return found


def document(
    size: TableSize, sides: Sequence[Side], copied: Mapping[str, Mapping[str, list[Any]]], skipped: Sequence[str]
) -> dict[str, Any]:
    """All that was counted."""
    return {
        "machine": machine.describe(torch.device("cpu")),
        "versions": machine.versions(("grpcio",)),
        "table": {"num_slots": size.num_slots, "value_dim": size.value_dim},
        "system_calls": [asdict(side) for side in sides],
        "copies": [
            {
                "way": way,
                "shape": shape,
                "tensor_bytes": _tensor_bytes(shape, size),
                "copied_bytes": sum(row[2] for row in rows),
                "sites": [{"what": what, "side": side, "bytes": num_bytes} for what, side, num_bytes in rows],
            }
            for way, by_shape in copied.items()
            for shape, rows in by_shape.items()
        ],
        "skipped": list(skipped),
    }


def lines(
    size: TableSize, sides: Sequence[Side], copied: Mapping[str, Mapping[str, list[Any]]], skipped: Sequence[str]
) -> list[str]:
    """The report for people."""
    out = [f"{size.num_slots} slots x {size.value_dim} float32, one shard of one thread, no gradients"]
    if sides:
        rows = [
            (
                side.shape,
                side.way,
                side.side,
                f"{side.calls:.1f}",
                f"{side.given_bytes / _tensor_bytes(side.shape, size):.2f}",
                f"{side.taken_bytes / _tensor_bytes(side.shape, size):.2f}",
                ", ".join(f"{name} {count:.1f}" for name, count in side.by_name.items() if count >= 0.05),
            )
            for side in sides
        ]
        header = ("look-up", "way", "process", "system calls", "bytes to the system", "from it", "by name")
        out += ["", *as_table(header, rows)]
        out.append("bytes to the system, from it: through sockets, pipes and counters, of each tensor byte")
    site_rows: list[tuple[str, ...]] = []
    for way, by_shape in copied.items():
        for shape, found in by_shape.items():
            tensor_bytes = _tensor_bytes(shape, size)
            total = sum(row[2] for row in found)
            site_rows.append((shape, way, "", "in all", f"{total / 2**20:.3f}", f"{total / tensor_bytes:.2f}"))
            site_rows += [
                ("", "", side or "both", what, f"{num_bytes / 2**20:.3f}", f"{num_bytes / tensor_bytes:.2f}")
                for what, side, num_bytes in found
            ]
    out += ["", *as_table(("look-up", "way", "process", "copied", "MiB", "of a tensor byte"), site_rows)]
    out.append("tensor bytes: ids of 32 bits and weights there, sums back; beside these, gRPC's library copies as well")
    out += ["", *(f"not as planned: {line}" for line in skipped)] if skipped else []
    return out


def _tensor_bytes(name: str, size: TableSize) -> int:
    shape = Shape(*(int(number) for number in name.split("x")))
    return shape.request_bytes + shape.reply_bytes(size)
