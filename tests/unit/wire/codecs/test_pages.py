"""Page batches and ledgers that contradict themselves are refused. Round trips: test_methods.py."""

import numpy as np
import pytest
import torch

from mempool.errors import InvalidRequest
from mempool.types import PageBatch
from mempool.wire.codecs.pages import EXPORT_LEDGER_REPLY, EXPORT_PAGES_REPLY
from mempool.wire.v1 import shard_pb2

BATCH = PageBatch(
    table_id=1,
    row_pages=np.array([3, 5]),
    blocks=(0, 1),
    key_pages=(),
    arrays={"values": torch.arange(24.0).view(8, 3), "adagrad.sum": torch.ones(8, 2, dtype=torch.bfloat16)},
    version=4,
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


def test_a_missing_part_is_named() -> None:
    message = shard_pb2.ExportPagesReply.FromString(EXPORT_PAGES_REPLY.encode(BATCH))
    message.ClearField("row_pages")
    with pytest.raises(InvalidRequest, match=r"ExportPagesReply\.row_pages is missing"):
        EXPORT_PAGES_REPLY.decode(message.SerializeToString())


def test_a_ledger_names_each_rank_once() -> None:
    entry = shard_pb2.LedgerEntry(group="g", rank=2, step=1)
    with pytest.raises(InvalidRequest, match=r"ExportLedgerReply\.entries has rank 2 of group 'g' twice"):
        EXPORT_LEDGER_REPLY.decode(shard_pb2.ExportLedgerReply(entries=[entry, entry]).SerializeToString())
