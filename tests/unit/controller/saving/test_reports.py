"""Reports of a checkpoint that nobody takes."""

from types import SimpleNamespace

from mempool.controller.saving.checkpointing import Checkpoints, Reports
from mempool.types import CheckpointProgress


def test_reports_that_nobody_takes_do_not_gather() -> None:
    first = CheckpointProgress(
        url="/place", name="", bytes_done=0, bytes_total=0, tables=(), held_s=0.0, doing="", done=False
    )
    checkpoints, reports = SimpleNamespace(_now=first), Reports()
    for done in range(10_000):
        Checkpoints._say(checkpoints, reports, bytes_done=done)  # type: ignore[arg-type]
    assert reports.qsize() < 1000
    newest = [reports.get_nowait() for _ in range(reports.qsize())][-1]
    assert isinstance(newest, CheckpointProgress)
    assert newest.bytes_done == 9_999
