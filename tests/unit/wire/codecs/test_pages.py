"""Page batches and ledgers that contradict themselves are refused. Round trips: test_methods.py."""

import numpy as np
import pytest
import torch

from mempool.errors import InvalidRequest
from mempool.types import Ledger, LedgerEntry, PageBatch
from mempool.wire.codecs.pages import EXPORT_PAGES_REPLY, FREEZE_REPLY
from mempool.wire.v1 import shard_pb2

BATCH = PageBatch(
    table_id=1,
    row_pages=np.array([3, 5]),
    blocks=(0, 1),
    key_pages=(),
    arrays={"values": torch.arange(24.0).view(8, 3), "adagrad.sum": torch.ones(8, 2, dtype=torch.bfloat16)},
    ledger=Ledger(version=4, updates_applied=9, entries={("g", 0): LedgerEntry(step=4, sequences=(8, 9))}),
)


def test_arrays_are_views_of_the_frame() -> None:
    frame = EXPORT_PAGES_REPLY.encode(BATCH)
    found = EXPORT_PAGES_REPLY.decode(frame)
    start = np.frombuffer(frame, np.uint8).ctypes.data
    assert found.arrays.keys() == BATCH.arrays.keys()
    for name, array in found.arrays.items():
        assert torch.equal(array, BATCH.arrays[name])
        assert start < array.data_ptr() < start + len(frame)


@pytest.mark.parametrize("names", [["values"], ["values", "values"], ["a", "b", "c"]])
def test_names_and_arrays_must_agree(names: list[str]) -> None:
    message = shard_pb2.ExportPagesReply.FromString(EXPORT_PAGES_REPLY.encode(BATCH))
    message.array_names[:] = names
    with pytest.raises(InvalidRequest, match="ExportPagesReply has 2 arrays and the names"):
        EXPORT_PAGES_REPLY.decode(message.SerializeToString())


@pytest.mark.parametrize("name", ["ledger", "row_pages"])
def test_a_missing_part_is_named(name: str) -> None:
    message = shard_pb2.ExportPagesReply.FromString(EXPORT_PAGES_REPLY.encode(BATCH))
    message.ClearField(name)
    with pytest.raises(InvalidRequest, match=rf"ExportPagesReply\.{name} is missing"):
        EXPORT_PAGES_REPLY.decode(message.SerializeToString())


def test_a_ledger_names_each_rank_once() -> None:
    entry = shard_pb2.LedgerEntry(group="g", rank=2, step=1)
    message = shard_pb2.FreezeReply(ledger=shard_pb2.Ledger(entries=[entry, entry]))
    with pytest.raises(InvalidRequest, match="rank 2 of group 'g' twice"):
        FREEZE_REPLY.decode(message.SerializeToString())
