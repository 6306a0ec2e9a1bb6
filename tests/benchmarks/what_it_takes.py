"""The tables of docs/plan.md: what memories up to the paper's take, by the constants of a machine.

    python -m tests.benchmarks.what_it_takes tests/benchmarks/results/<machine>-plan.json

The constants are of `mempool bench plan --out tests/benchmarks/results`; everything else is `mempool plan`'s. The page
has both tables between marks, and gets them anew.
"""

import sys
from collections.abc import Iterator
from pathlib import Path

from mempool.cli.plan import read_machine
from mempool.config import Adam, RowWiseAdagrad, TableConfig
from mempool.sizing import Hosts, Machine, Model, Plan, make_plan

PAGE = Path(__file__).parents[2] / "docs/plan.md"
MODEL = Model(heads=4, topk=32, layers=3, tokens=4096, trainers=64)
HOSTS = Hosts(memory="512GiB", cores=64, shards=32, nic_gbit_per_s=100.0, latency_us=20.0, trainers=8)
MEMORIES = ((1024, 1024), (4096, 1024), (4096, 4096), (8192, 2048))
THOUSAND = (32, 64, 128, 256, 512, 1024)


def main() -> None:
    """Put both tables into the page, and print them."""
    machine = read_machine(Path(sys.argv[1]))
    text = PAGE.read_text()
    for name, lines in (("sizes", sizes()), ("shards", by_shards(machine))):
        table = "\n".join(lines)
        print(table, end="\n\n")
        before, begin, rest = text.partition(f"<!-- {name} -->")
        _, end, after = rest.partition(f"<!-- end of {name} -->")
        if not (begin and end):
            sys.exit(f"{PAGE} has no marks of {name}")
        text = f"{before}{begin}\n{table}\n{end}{after}"
    PAGE.write_text(text)


def sizes() -> Iterator[str]:
    """How much memories of several sizes are, in few bytes and in many."""
    yield from header(
        "slots x columns", "parameters", "bfloat16, row-wise Adagrad", "float32, Adam", "hosts of 512 GiB"
    )
    for root, columns in MEMORIES:
        plans = [planned(root, columns, many=many) for many in (False, True)]
        sizes = [f"{plan.best.split.total_bytes / 2**30:,.0f} GiB" for plan in plans]
        parameters = f"{root**2 * columns / 1e9:,.1f} billion"
        hosts = " or ".join(str(plan.hosts_of(plan.shards_needed)) for plan in plans)
        yield row(f"{root**2 // 2**20}M x {columns:,}", parameters, *sizes, hosts)


def by_shards(machine: Machine) -> Iterator[str]:
    """The paper's largest memory on more and more shards."""
    yield from header(
        "shards (hosts)", "split, width of a block", "pages of a shard", "bytes of a token: out, back", "step",
        "of it client, wire, calls, kernels, s", "tokens/s", "a trainer a step", "a host of shards a step",
    )  # fmt: skip
    for shards in THOUSAND:
        plan = planned(8192, 2048, many=False, shards=shards, machine=machine)
        best, time = plan.best, plan.best.time
        assert time is not None
        assert plan.host_cpu_s is not None
        moved = [
            f"{MODEL.layers * way / MODEL.tokens / 2**10:,.0f} KiB" for way in (best.traffic.out, best.traffic.back)
        ]
        parts = (time.client + time.waits, time.wire, time.calls, time.gather + time.update)
        yield row(
            f"{shards:,} ({plan.num_hosts})",
            f"{best.split.kind}, {best.split.schema.block_dim}",
            f"{best.split.largest_bytes / 2**30:,.1f} GiB",
            ", ".join(moved),
            f"{time.total:,.1f} s",
            ", ".join(f"{part:,.1f}" for part in parts),
            f"{time.tokens_per_s(MODEL):,.0f}",
            f"{time.client:,.1f} s of CPU, {plan.client_bytes / 2**30:,.1f} GiB, {plan.client_calls:,} calls",
            f"{plan.host_cpu_s:,.0f} s of CPU, {plan.host_bytes / 2**30:,.0f} GiB, {plan.host_calls:,} calls",
        )


def planned(root: int, columns: int, *, many: bool, shards: int | None = None, machine: Machine | None = None) -> Plan:
    """A memory of a square of slots: of few bytes, or of many."""
    optimizer = Adam(1e-3) if many else RowWiseAdagrad(1e-3)
    table = TableConfig(
        name="memory",
        num_slots=root**2,
        value_dim=columns,
        dtype="float32" if many else "bfloat16",
        optimizer=optimizer,
    )
    return make_plan(table, MODEL, HOSTS, shards=shards, machine=machine)


def header(*names: str) -> list[str]:
    """The first two lines of a table."""
    return [row(*names), row(*("---" for _ in names))]


def row(*cells: str) -> str:
    """One line of a table."""
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
