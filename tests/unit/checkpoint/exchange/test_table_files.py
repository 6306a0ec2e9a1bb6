"""Tables as single files: written by us and read by safetensors; written by others and read by us."""

from __future__ import annotations

import secrets
from dataclasses import replace
from pathlib import Path
from typing import Any

import fsspec
import pytest
import safetensors.torch
import torch
from safetensors import safe_open
from torch import nn

from mempool import kernels
from mempool.checkpoint.exchange.layouts import find_layout, key_form
from mempool.checkpoint.exchange.table_file import TableFile, export_table, table_entries, table_metadata
from mempool.checkpoint.exchange.table_source import TableSource
from mempool.checkpoint.format.tensor_file import TensorEntry
from mempool.checkpoint.reader import Checkpoint
from mempool.errors import DataLoss, InvalidRequest, NotFound
from mempool.kernels import reference
from mempool.shard.pages.named_arrays import HEAD_KEYS
from mempool.types import FlatKeySpec, ProductKeySpec, TableSchema
from tests.unit.checkpoint.contents import FLAT, PLAIN, PRODUCT, Content, same_bits, write
from tests.unit.checkpoint.memory import MemoryStore

FLOAT8 = replace(FLAT, name="fine", dtype="float8_e4m3fn", keys=None)
BFLOAT = replace(PLAIN, name="brief", dtype="bfloat16", rounding="stochastic", master=False)


@pytest.mark.parametrize("schema", [PLAIN, PRODUCT, FLAT, FLOAT8, BFLOAT], ids=lambda schema: schema.name)
def test_an_exported_table_is_read_by_safetensors(tmp_path: Path, schema: TableSchema) -> None:
    store = MemoryStore()
    content = Content.random(schema, 1, version=6)
    write(store, [content], shards=3, batch_bytes=3000)
    path = tmp_path / "a table.safetensors"
    export_table(Checkpoint(store).table(schema.name), path, state=True, batch_bytes=2000)

    loaded = safetensors.torch.load_file(path)
    dtype = getattr(torch, schema.dtype)
    assert loaded["values"].dtype == dtype
    assert tuple(loaded["values"].shape) == (100, 20)
    expected = dict(content.rows)
    if schema.packed:
        expected["values"] = expected["values"].view(dtype)
    if isinstance(schema.keys, ProductKeySpec):
        assert same_bits(loaded.pop(HEAD_KEYS), content.heads)
    assert set(loaded) == set(expected)
    for name, tensor in loaded.items():
        assert same_bits(tensor, expected[name][:100]), name
    with safe_open(path, "pt") as file:
        assert file.metadata()["mempool.version"] == "6"
        assert same_bits(file.get_slice("values")[3:9], expected["values"][3:9])

    source = TableSource(path)
    assert (source.schema, source.num_slots, source.value_dim) == (schema, 100, 20)
    source.check(schema)


@pytest.mark.parametrize("schema", [FLAT, FLOAT8], ids=lambda schema: schema.name)
def test_values_of_one_byte_come_as_the_numbers_they_stand_for(tmp_path: Path, schema: TableSchema) -> None:
    """As the kernels decode a row that holds the same codes and scales."""
    values = torch.randn(100, 20)
    layout = kernels.PackedLayout(schema.dtype, width=20, block_dim=6)  # type: ignore[arg-type]
    rows = torch.zeros(100, layout.row_bytes, dtype=torch.uint8)
    paged = kernels.Paged(rows, torch.zeros(1, dtype=torch.int32), 7, packed=layout)
    reference.write_values(paged, torch.arange(100), values)
    codes = rows[:, :20]
    scales = rows[:, layout.scales_start : layout.scales_start + 4 * 4].contiguous().view(torch.float32)
    path = tmp_path / "x.safetensors"
    with TableFile(path, table_entries(replace(schema, keys=None)), table_metadata(schema, 1)) as file:
        file.write("values", codes)
        file.write("values.scales", scales)
    found = TableSource(path).values(0, 100)
    assert torch.equal(found, reference.read_values(paged).float())
    assert (found - values).abs().max() < 0.2


def test_rows_stream_in_any_pieces_and_to_any_place(tmp_path: Path) -> None:
    content = Content.random(PRODUCT, 1)
    for place in (tmp_path / "x.safetensors", f"memory://{secrets.token_hex(4)}/x.safetensors"):
        with TableFile(place, table_entries(PRODUCT)) as file:
            for first in range(0, 100, 7):
                file.write("values", content.rows["values"][first : min(first + 7, 100)])
            file.write("head_keys", content.heads[:1])
            file.write("head_keys", content.heads[1:])
        source = TableSource(place)
        got = torch.cat([source.values(first, min(30, 100 - first)) for first in range(0, 100, 30)])
        assert same_bits(got, content.rows["values"][:100])
        assert same_bits(source.head_keys(PRODUCT, 2), content.heads[2])
    fsspec.filesystem("memory").store.clear()


def test_a_file_that_is_not_whole_is_not_kept(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    rows = Content.random(PLAIN, 1).rows["values"]

    def write_some(*pieces: tuple[str, torch.Tensor]) -> None:
        with TableFile(path, table_entries(replace(FLAT, dtype="float32"))) as file:
            for name, piece in pieces:
                file.write(name, piece)

    for pieces, told in [
        ([("values", rows[:60])], "not whole, and was not kept: 60 of 100 rows of 'values'"),
        ([("keys", rows[:60])], "'values' comes first"),
        ([("values", rows[:101])], "takes up to 100 rows of float32 .20."),
        ([("values", rows.double())], "given torch.float64"),
        ([("values", rows[:, 1:])], "given torch.float32 .104, 19."),
        ([("values", rows[:100]), ("keys", rows[:100, :5]), ("keys", rows[:1, :5])], "nothing is left"),
    ]:
        with pytest.raises(InvalidRequest, match=told):
            write_some(*pieces)
        assert list(tmp_path.iterdir()) == []


class MemoryLayer(nn.Module):
    """As public memory layers name their parameters."""

    def __init__(self, keys: torch.Tensor) -> None:
        super().__init__()
        self.keys = nn.Parameter(keys)
        self.values = nn.EmbeddingBag(100, 20)
        self.value_proj = nn.Linear(20, 20)


@pytest.mark.parametrize("form", ["stacked", "heads", "pairs"])
@pytest.mark.parametrize("kind", ["safetensors", "torch", "torch of before"])
def test_memory_layers_are_read(tmp_path: Path, form: str, kind: str) -> None:
    heads = torch.randn(3, 2, 10, 2)
    keys = {"stacked": heads.reshape(60, 2), "heads": heads, "pairs": heads.transpose(1, 2).contiguous()}[form]
    model = nn.ModuleDict({"layers": nn.ModuleList([nn.Linear(2, 2), MemoryLayer(keys)])})
    path = tmp_path / "model.bin"
    if kind == "safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        new = kind == "torch"
        torch.save({"model": model.state_dict(), "step": 3}, path, _use_new_zipfile_serialization=new)
    source = TableSource(path)
    assert source.schema is None
    source.check(PRODUCT)
    layer: Any = model["layers"][1]  # type: ignore[index]
    assert same_bits(source.values(0, 100), layer.values.weight.detach())
    assert same_bits(source.values(13, 5), layer.values.weight.detach()[13:18])
    for head in range(3):
        assert same_bits(source.head_keys(PRODUCT, head), heads[head])
    with pytest.raises(InvalidRequest, match="read them by head"):
        source.flat_keys(PRODUCT, 0, 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_embeddings_are_read(tmp_path: Path, dtype: torch.dtype) -> None:
    bag = nn.EmbeddingBag(100, 20, dtype=dtype)
    torch.save(bag.state_dict(), tmp_path / "bag.pt")
    torch.save(bag.weight.detach(), tmp_path / "tensor.pt")
    safetensors.torch.save_file(
        {"model.embed.weight": bag.weight.detach(), "norm.weight": torch.ones(3)}, tmp_path / "m"
    )
    for name in ("bag.pt", "tensor.pt", "m"):
        found = TableSource(tmp_path / name).values(0, 100)
        wanted = bag.weight.detach() if dtype == torch.bfloat16 else bag.weight.detach().float()
        assert same_bits(found, wanted)
        with pytest.raises(InvalidRequest, match="has no keys beside"):
            TableSource(tmp_path / name).head_keys(PRODUCT, 0)


def test_flat_keys_are_read(tmp_path: Path) -> None:
    keys = torch.randn(100, 5)
    safetensors.torch.save_file({"memory.values": torch.randn(100, 20), "memory.keys": keys}, tmp_path / "m")
    source = TableSource(tmp_path / "m")
    assert same_bits(source.flat_keys(FLAT, 10, 20), keys[10:30])
    with pytest.raises(InvalidRequest, match="read them by slot"):
        source.head_keys(FLAT, 0)


def entries(**shapes: tuple[int, ...]) -> dict[str, TensorEntry]:
    return {
        name.replace("_", "."): TensorEntry(name=name.replace("_", "."), dtype="float32", shape=shape)
        for name, shape in shapes.items()
    }


def test_what_cannot_be_told_is_said_with_what_was_found() -> None:
    two = entries(a_values_weight=(9, 4), a_keys=(9, 2), b_values_weight=(9, 4), b_keys=(9, 3), b_weight=(2, 2))
    with pytest.raises(
        InvalidRequest, match=r"several tensors .*: a\.values\.weight float32 \[9, 4\], b\.values.*values="
    ):
        find_layout(two)
    found = find_layout(two, values="b.values.weight")
    assert (found.values.name, found.keys and found.keys.name) == ("b.values.weight", "b.keys")
    assert find_layout(two, values="b.values.weight", keys="a.keys").keys == two["a.keys"]
    with pytest.raises(InvalidRequest, match=r"no tensor 'c'; there are: a\.values\.weight"):
        find_layout(two, values="c")
    with pytest.raises(InvalidRequest, match="two dimensions"):
        find_layout(entries(values=(2, 3, 4)), values="values")
    with pytest.raises(InvalidRequest, match=r"no tensor is named as values are .*; there are: x float32 \[2\]"):
        find_layout(entries(x=(2,)))
    with pytest.raises(InvalidRequest, match="there are: none"):
        find_layout({})
    with pytest.raises(InvalidRequest, match=r"x11 float32 \[1\], and 988 more\. Say which"):
        find_layout(entries(**{f"x{i}": (1,) for i in range(1000)}))
    odd = {**entries(values=(9, 4)), "values.scales": TensorEntry(name="values.scales", dtype="float32", shape=(8, 1))}
    odd["values"] = replace(odd["values"], dtype="int8")
    with pytest.raises(InvalidRequest, match="are no scales of"):
        find_layout(odd)


def test_what_does_not_fit_the_table_is_said(tmp_path: Path) -> None:
    path = tmp_path / "m"
    safetensors.torch.save_file({"values.weight": torch.ones(9, 4), "keys": torch.ones(6, 7)}, path)
    with pytest.raises(InvalidRequest, match=r"has \[100, 20\]. Make a table with num_slots=9, value_dim=4"):
        TableSource(path).check(PLAIN)
    nine = replace(PLAIN, num_slots=9, value_dim=4, block_dim=4, stride=3, keys=ProductKeySpec(heads=1, key_dim=8))
    with pytest.raises(
        InvalidRequest, match=r"takes \[1, 2, 3, 4\] or \[6, 4\] or \[1, 3, 2, 4\]. Make the table with"
    ):
        TableSource(path).check(nine)
    keys = TableSource(path).layout.keys
    assert keys is not None
    with pytest.raises(InvalidRequest, match="takes no keys"):
        key_form(keys, PLAIN)
    flat = replace(nine, num_slots=6, keys=FlatKeySpec(key_dim=7))
    assert key_form(keys, flat) == "flat"


class Code:
    """Something that a file of torch.save may hold, and nobody should run."""

    def __reduce__(self) -> tuple[Any, ...]:
        return print, ("run",)


def test_files_that_are_no_tables_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(NotFound, match="there is no such file"):
        TableSource(tmp_path / "none.safetensors")
    with pytest.raises(NotFound, match="there is no such file"):
        TableSource(tmp_path)
    path = tmp_path / "x"
    torch.save({"weight": torch.ones(2, 2), "other": Code()}, path)
    with pytest.raises(InvalidRequest, match="holds more than tensors, which nobody should unpickle"):
        TableSource(path)
    assert capsys.readouterr().out == ""
    torch.save({"weight": torch.ones(200, 20)}, path)
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DataLoss, match="cannot be read"):
        TableSource(path)
    safetensors.torch.save_file({"weight": torch.ones(20, 20)}, path)
    whole = path.read_bytes()
    for data in (b"", b"abc", b"PK", whole[:40], whole[:-1], b"\x00" * 20, b"\xff" * 20, whole[:8] + b"x" + whole[9:]):
        path.write_bytes(data)
        with pytest.raises((DataLoss, InvalidRequest)):
            TableSource(path)


def test_no_byte_of_a_header_makes_it_read_elsewhere(tmp_path: Path) -> None:
    path = tmp_path / "x"
    safetensors.torch.save_file({"weight": torch.ones(20, 20), "other.values": torch.ones(3)}, path)
    whole = path.read_bytes()
    for place in range(int.from_bytes(whole[:8], "little") + 8):
        for wrong in (b"0", b"9", b"-", b'"'):
            path.write_bytes(whole[:place] + wrong + whole[place + 1 :])
            try:
                source = TableSource(path)
                source.values(0, source.num_slots)
            except (DataLoss, InvalidRequest):
                continue
