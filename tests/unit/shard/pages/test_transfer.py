"""Reading pages out and fetching them: bounded batches, a ledger in parts, and sources that say something else."""

import asyncio
from typing import Any

import numpy as np
import pytest

from mempool.errors import DataLoss, Internal, InvalidRequest
from mempool.shard.pages import transfer
from mempool.shard.pages.transfer import export, ledger_part, pull, read_ledger
from mempool.types import ExportLedger, ExportPages, Ledger, LedgerPart, PageBatch, PullPages, ShardInfo
from tests.contract.driver import make_schema

from .whole_tables import a_ledger, make_table

SOURCE = ShardInfo(shard=0, address="", incarnation=1)


class Source:
    """A shard that gives out a ledger, perhaps changed on the way."""

    def __init__(self, ledger: Ledger, change: Any = None) -> None:
        self.ledger, self.change, self.asked = ledger, change, 0
        self.table = make_table(make_schema())
        self.batches: list[PageBatch] = []

    async def export_ledger(self, request: ExportLedger) -> LedgerPart:
        self.asked += 1
        part = ledger_part(self.ledger, request)
        return part if self.change is None else self.change(self.asked, part)

    async def export_pages(self, request: ExportPages) -> PageBatch:
        self.batches.append(export(self.table, request, version=self.ledger.version))
        return self.batches[-1]


def _read(source: Source) -> Ledger:
    return asyncio.run(asyncio.wait_for(read_ledger(1, source), 30))  # type: ignore[arg-type]


@pytest.mark.parametrize(("entries", "name_bytes"), [(0, 1), (1, 10), (5_000, 10), (16_384, 256), (3, 300_000)])
def test_a_ledger_travels_in_parts(entries: int, name_bytes: int) -> None:
    ledger = a_ledger(entries, name_bytes)
    source = Source(ledger)
    read = _read(source)
    assert read == ledger
    assert list(read.entries) == list(ledger.entries)  # the order tells who committed last
    assert source.asked <= 1 + entries * (name_bytes + 24) // (128 * 2**10)
    for first in range(0, entries, max(1, entries // 5)):
        part = ledger_part(ledger, ExportLedger(table_id=1, first=first))
        assert len(part.entries) == 1 or sum(len(group) + 24 for group, _ in part.entries) <= 256 * 2**10
    for beyond in (entries, entries + 5, 2**64 - 1):
        assert ledger_part(ledger, ExportLedger(table_id=1, first=beyond)).entries == {}


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda asked, part: _changed(part, version=part.version + asked), "went from version 8 .* to 9"),
        (lambda asked, part: _changed(part, num_entries=part.num_entries + asked), "went from version 7 .* to 7"),
        (lambda asked, part: _changed(part, entries={} if asked > 1 else part.entries), "entries; [0-9,]+ came"),
        (lambda _, part: _changed(part, num_entries=1), "says that it has 1 entries"),
        (lambda _, part: _changed(part, num_entries=2**40), "says that it has 1,099,511,627,776 entries"),
    ],
)
def test_a_ledger_whose_parts_do_not_fit_is_refused(change: Any, match: str) -> None:
    with pytest.raises(Internal, match=match):
        _read(Source(a_ledger(5_000, 100), change))


def _changed(part: LedgerPart, **changes: Any) -> LedgerPart:
    fields = {
        name: getattr(part, name) for name in ("version", "updates_applied", "num_entries", "entries", "step_offset")
    }
    return LedgerPart(**(fields | changes))


@pytest.mark.parametrize("lacking", [True, False])
def test_a_pull_asks_for_the_ledger_once_and_only_where_it_is_lacking(
    lacking: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mempool.shard.pages.arena._COPY_BYTES", 1)
    source, staged = Source(a_ledger(10, 5)), []
    ledgers: list[Ledger] = []

    async def stage(batch: PageBatch) -> int:
        staged.append(batch)
        return 10

    async def lacks_ledger() -> bool:
        return lacking

    async def stage_ledger(ledger: Ledger) -> None:
        ledgers.append(ledger)

    request = PullPages(table_id=1, source=SOURCE, row_pages=np.array([1, 4, 6]), blocks=(0, 2))
    report = asyncio.run(
        pull(
            request,
            source=source,  # type: ignore[arg-type]
            page_bytes=1,
            stage=stage,
            lacks_ledger=lacks_ledger,
            stage_ledger=stage_ledger,
        )
    )
    assert (report.pages, report.num_bytes) == (6, 30)
    assert [batch.row_pages.tolist() for batch in staged] == [[1], [4], [6]]
    assert {batch.version for batch in staged} == {7}
    assert (source.asked, ledgers) == ((1, [source.ledger]) if lacking else (0, []))


def test_pages_of_others_and_lost_ones_are_not_given_out() -> None:
    table = make_table(make_schema(), "rows")
    request = ExportPages(table_id=1, row_pages=np.array([3, 4]), blocks=(0, 1))
    with pytest.raises(InvalidRequest, match="does not own all of the 4 row pages and 0 key pages"):
        export(table, request, version=0)
    table.lose_all()
    with pytest.raises(DataLoss, match="lost pages of table 'facts'"):
        export(table, ExportPages(table_id=1, row_pages=np.array([3]), blocks=(0,)), version=0)


def test_a_part_is_small_beside_what_a_message_may_hold() -> None:
    assert transfer._PART_BYTES <= 2**20
