"""`python -m mempool.bench.serve.soak`: what is asked for, what is printed, how it ends."""

from __future__ import annotations

import argparse
import json

import torch

from mempool.bench import machine
from mempool.bench.command import say
from mempool.bench.serve.contenders import pools
from mempool.bench.serve.soak.run import SLOPE_MIB, Outcome, Plan, run

_WAYS = {"all": pools.REMOTE, "gRPC": (pools.GRPC,), "tcp": (pools.TCP,), "near": (pools.NEAR,)}


def main(arguments: list[str] | None = None) -> int:
    """Soak and print; 1 where clients have left something, or failed."""
    parser = argparse.ArgumentParser(prog="python -m mempool.bench.serve.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=10.0, metavar="M", help="how long")
    parser.add_argument("--clients", type=int, default=4, metavar="N", help="processes at once")
    parser.add_argument("--threads", type=int, default=2, metavar="N", help="of each client")
    parser.add_argument("--kill-every", type=float, default=2.0, metavar="S", help="seconds in the mean")
    parser.add_argument("--ways", choices=sorted(_WAYS), default="all", help="how clients ask; near: shared memory")
    parser.add_argument("--json", action="store_true", help="print one JSON document, and nothing else on stdout")
    options = parser.parse_args(arguments)
    soak_s = 60.0 * options.minutes
    plan = Plan(
        soak_s=soak_s,
        warm_up_s=min(60.0, soak_s / 5.0),
        kill_every_s=options.kill_every,
        clients=options.clients,
        threads=options.threads,
        ways=_WAYS[options.ways],
    )
    outcome = run(plan, say=say)
    if options.json:
        found = {"machine": machine.describe(torch.device("cpu")), "minutes": options.minutes, **outcome.document()}
        print(json.dumps(found, indent=1))
    else:
        print("\n".join(lines(outcome)))
    return 1 if outcome.failed or outcome.leaks else 0


def lines(outcome: Outcome) -> list[str]:
    """The report for people."""
    flat = "ok" if outcome.slope_mib < SLOPE_MIB else "above"
    out = [
        f"{outcome.kills} clients killed, {outcome.calls_per_s:.0f} look-ups/s",
        f"before:  {outcome.base}",
        f"at most: {outcome.peak}",
        f"after:   {outcome.after}",
        f"resident memory grows by {outcome.slope_mib:+.2f} MiB a minute ({outcome.own_slope_mib:+.2f} of its own; "
        f"wanted: under {SLOPE_MIB:g}): {flat}",
        f"left behind: {', '.join(outcome.leaks) or 'nothing'}",
    ]
    return out + [f"failed: {line}" for line in outcome.failed]
