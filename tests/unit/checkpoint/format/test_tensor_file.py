"""Headers that we write are read by safetensors, and the other way round; what does not fit its file is refused."""

from __future__ import annotations

import json
from typing import Any

import pytest
import safetensors.torch
import torch

from mempool.checkpoint.format.tensor_file import ITEM_BYTES, TensorEntry, header_of, read_header
from mempool.errors import DataLoss, InvalidRequest
from tests.unit.checkpoint.memory import MemoryStore

TENSORS = {
    dtype: torch.arange(6).reshape(2, 3).to(getattr(torch, dtype)) for dtype in ITEM_BYTES if hasattr(torch, dtype)
}
ENTRIES = [TensorEntry(name=name, dtype=name, shape=(2, 3)) for name in TENSORS]


def body() -> bytes:
    return b"".join(tensor.view(torch.uint8).numpy().tobytes() for tensor in TENSORS.values())


def test_safetensors_reads_ours() -> None:
    found = safetensors.torch.load(header_of(ENTRIES, {"of": "mempool"}) + body())
    for dtype, tensor in TENSORS.items():
        assert found[dtype].dtype == tensor.dtype
        assert torch.equal(found[dtype].float(), tensor.float())


def test_we_read_theirs() -> None:
    data = safetensors.torch.save(TENSORS, metadata={"of": "others"})
    header = read_header(MemoryStore({"x": data}), "x", len(data))
    assert header.metadata == {"of": "others"}
    assert {name: entry for name, (entry, _) in header.tensors.items()} == {entry.name: entry for entry in ENTRIES}
    for name, (entry, offset) in header.tensors.items():
        assert data[offset : offset + entry.num_bytes] == TENSORS[name].view(torch.uint8).numpy().tobytes()


def test_data_begin_at_a_multiple_of_eight() -> None:
    for length in range(1, 20):
        assert len(header_of([TensorEntry(name="x" * length, dtype="uint8", shape=(3,))], {})) % 8 == 0


def test_more_tensors_than_a_header_has_room_for_are_refused() -> None:
    with pytest.raises(InvalidRequest, match="2 tensors are too many"):
        header_of([TensorEntry(name=letter * 50_000_000, dtype="uint8", shape=(0,)) for letter in "ab"], {})


@pytest.mark.parametrize(
    "field",
    [
        {"dtype": "F32", "shape": [4], "data_offsets": [0, 8]},
        {"dtype": "F32", "shape": [4], "data_offsets": [8, 24]},
        {"dtype": "F32", "shape": [-4], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4.0], "data_offsets": [0, 16]},
        {"dtype": "F32", "shape": [4], "data_offsets": [0]},
        {"dtype": "F32", "shape": 4, "data_offsets": [0, 16]},
        {"dtype": ["F32"], "shape": [4], "data_offsets": [0, 16]},
        {"shape": [4], "data_offsets": [0, 16]},
        [],
        None,
    ],
)
def test_what_does_not_fit_its_file_is_refused(field: Any) -> None:
    text = json.dumps({"x": field}).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(16)
    with pytest.raises(DataLoss, match="x is no safetensors file, or damaged"):
        read_header(MemoryStore({"x": data}), "x", len(data))


def test_tensors_of_other_kinds_stand_beside() -> None:
    text = json.dumps({"x": {"dtype": "C64", "shape": [2], "data_offsets": [0, 16]}}).encode()
    data = len(text).to_bytes(8, "little") + text + bytes(16)
    assert read_header(MemoryStore({"x": data}), "x", len(data)).tensors == {}
