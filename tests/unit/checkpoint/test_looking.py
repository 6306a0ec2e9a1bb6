"""What there is, and whether each byte is as it was written."""

from __future__ import annotations

import subprocess
import sys

import pytest

from mempool.checkpoint.format.pages import Pages
from mempool.checkpoint.looking import checkpoints, inspect, verify
from mempool.checkpoint.reader import Checkpoint
from mempool.errors import DataLoss
from tests.unit.checkpoint.contents import FLAT, PLAIN, PRODUCT, Content, read, spread, write
from tests.unit.checkpoint.memory import MemoryStore

SCHEMAS = (PLAIN, PRODUCT, FLAT)


def test_every_flipped_bit_of_every_file_is_found() -> None:
    store = MemoryStore()
    manifest = write(store, [Content.random(schema, 1) for schema in SCHEMAS], shards=2, batch_bytes=4000)
    whole = dict(store.files)
    assert verify(store).damages == ()
    for path in manifest.files:
        size = len(whole[path])
        header = manifest.files[path].header_bytes
        for place in (0, 9, header - 1, header, header + 1, (header + size) // 2, size - 1):
            wrong = bytearray(whole[path])
            wrong[place] ^= 1 << (place % 8)
            store.files = {**whole, path: bytes(wrong)}
            (damage,) = verify(store).damages
            assert damage.file == path
            assert damage.offset is not None
            assert damage.length is not None
            assert damage.offset <= place < damage.offset + damage.length
            if place >= header:  # and nobody reads such a page as data
                table = path.split("/")[1].partition(".")[0]
                schema = next(schema for schema in SCHEMAS if schema.name == table)
                with pytest.raises(DataLoss, match=rf"{path} is damaged at bytes .*has another checksum"):
                    read(Checkpoint(store), table, spread(schema, 3))


def test_files_that_are_gone_or_short_are_damages() -> None:
    store = MemoryStore()
    manifest = write(store, [Content.random(PLAIN, 1)], shards=3)
    first, second, _ = manifest.files
    del store.files[first]
    store.files[second] = store.files[second][:-5]
    found = verify(store).damages
    assert {damage.file for damage in found} == {first, second}
    assert any("is missing" in damage.what for damage in found)
    assert any("ends before" in damage.what for damage in found)
    assert len(inspect(store)["problems"]) == 2


def test_verify_says_how_far_it_is() -> None:
    store = MemoryStore()
    manifest = write(store, [Content.random(schema, 1) for schema in SCHEMAS], shards=2, batch_bytes=3000)
    told: list[tuple[int, int]] = []
    found = verify(store, progress=lambda done, total: told.append((done, total)))
    total = sum(file.size for file in manifest.files.values())
    assert found.num_bytes == total
    assert told[-1] == (total, total)
    assert told == sorted(told)


def test_what_there_is_is_plain_data() -> None:
    store = MemoryStore()
    content = Content.random(PLAIN, 1, version=3)
    first = write(store, [content])
    one = Pages.none(PLAIN)
    one.row_pages[2] = True
    second = write(store, [content.changed(one, 2, 4)], changed={"facts": one})
    broken = write(store, [content])
    store.files[f"{broken.name}/manifest.json"] = b"{}"

    listed = checkpoints(store)
    assert [found["name"] for found in listed] == [first.name, second.name, broken.name]
    assert [found.get("versions") for found in listed] == [{"facts": 3}, {"facts": 4}, None]
    assert "is damaged" in listed[2]["problem"]
    assert listed[0]["bases"] == []
    assert listed[1]["bases"] == [first.name]
    assert listed[1]["own_bytes"] < listed[0]["own_bytes"] == listed[0]["bytes"] < listed[1]["bytes"]
    found = inspect(store, second.name)
    assert found["extra"] == {"epoch": 3}
    assert found["problems"] == []
    (table,) = found["tables"]
    assert (table["name"], table["version"], table["step_count"], table["pages"]) == ("facts", 4, 7, 52)
    assert table["bytes"] == found["live_bytes"] == 3 * 13 * 8 * 20 * 4
    assert table["schema"]["optimizer"]["algorithm"] == "adam"


def test_looking_and_committing_load_no_torch() -> None:
    script = (
        "import mempool.checkpoint.looking, mempool.checkpoint.commit, mempool.checkpoint.removal, sys\n"
        "print(*{'torch', 'grpc', 'ray', 'fsspec'} & set(sys.modules))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == ""
