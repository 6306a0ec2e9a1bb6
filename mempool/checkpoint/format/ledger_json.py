"""A table's ledger as JSON and back, exactly: for the manifest, which keeps it as it is."""

from typing import Any

from mempool.checkpoint.format.json_values import Fields, Unfit, whole_number
from mempool.types import DecidedStep, Ledger, LedgerEntry, StepId

_INTEGER = 2**63 - 1


def ledger_json(ledger: Ledger) -> dict[str, Any]:
    """All of a ledger, its entries in their order."""
    return {
        "version": ledger.version,
        "updates_applied": ledger.updates_applied,
        "step_offset": ledger.step_offset,
        "entries": [
            {
                "group": group,
                "rank": rank,
                "generation": entry.generation,
                "step": entry.step,
                "version": entry.version,
                "dropped": entry.dropped,
                "others": [_decided_json(decided) for decided in entry.others],
            }
            for (group, rank), entry in ledger.entries.items()
        ],
    }


def parse_ledger(value: object, path: str = "ledger") -> Ledger:
    """The ledger. Raises Unfit for anything that is none."""
    given = Fields(value, path)
    entries: dict[tuple[str, int], LedgerEntry] = {}
    for where, element in given.items("entries"):
        entry = Fields(element, where)
        who = entry.text("group"), entry.integer("rank")
        if who in entries:
            raise Unfit(f"{where}: group {who[0]!r:.80}, rank {who[1]} is there twice")
        entries[who] = LedgerEntry(
            generation=entry.integer("generation"),
            step=entry.integer("step"),
            version=entry.integer("version"),
            dropped=entry.integer("dropped"),
            others=tuple(_decided(other, inner) for inner, other in entry.items("others")),
        )
        entry.done()
    ledger = Ledger(
        version=given.integer("version"),
        updates_applied=given.integer("updates_applied"),
        step_offset=given.integer("step_offset", low=-_INTEGER, high=_INTEGER),
        entries=entries,
    )
    given.done()
    return ledger


def _decided_json(decided: DecidedStep) -> dict[str, Any]:
    step = decided.step_id
    return {
        "table_id": decided.table_id,
        "version": decided.version,
        "group": step.group,
        "rank": step.rank,
        "step": step.step,
        "generation": step.generation,
        "lr": decided.lr,
        "grad_scale": decided.grad_scale,
        "sequences": list(decided.sequences),
    }


def _decided(value: object, path: str) -> DecidedStep:
    given = Fields(value, path)
    decided = DecidedStep(
        table_id=given.integer("table_id"),
        version=given.integer("version"),
        step_id=StepId(
            group=given.text("group"),
            rank=given.integer("rank"),
            step=given.integer("step"),
            generation=given.integer("generation"),
        ),
        lr=given.number("lr"),
        grad_scale=given.number("grad_scale"),
        sequences=tuple(whole_number(element, where) for where, element in given.items("sequences")),
    )
    given.done()
    return decided
