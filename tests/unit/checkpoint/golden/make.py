"""Makes the golden checkpoint of the present format version, once, when there is a new one. Older ones stay.

python -m tests.unit.checkpoint.golden.make tests/unit/checkpoint/golden/v1
"""

from __future__ import annotations

import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch

from mempool.checkpoint.exchange.table_file import export_table
from mempool.checkpoint.format.pages import Pages
from mempool.checkpoint.format.schema_json import schema_json
from mempool.checkpoint.reader import Checkpoint
from mempool.checkpoint.stores.local import LocalStore
from mempool.types import OptimizerSpec, TableSchema
from tests.unit.checkpoint.contents import FLAT, PLAIN, PRODUCT, Content, write


def tables() -> tuple[TableSchema, ...]:
    """Tables of every kind of array."""
    small = [replace(schema, num_slots=36, value_dim=9, stride=6) for schema in (PLAIN, PRODUCT, FLAT)]
    dense = OptimizerSpec(algorithm="adamw", lr=1e-3, weight_decay=0.01, dense=True)
    rows = OptimizerSpec(algorithm="rowwise_adagrad", lr=0.1)
    return (
        small[0],
        replace(small[1], optimizer=rows),
        small[2],
        replace(small[0], table_id=10, name="dense", dtype="bfloat16", master=True, optimizer=dense),
    )


def digest(content: Content) -> str:
    """Of all its bytes, slots beyond the table's too."""
    found = hashlib.sha256()
    for name, rows in sorted(content.rows.items()):
        found.update(name.encode() + rows.contiguous().flatten().view(torch.uint8).numpy().tobytes())
    found.update(content.heads.numpy().tobytes())
    return found.hexdigest()


def make(folder: Path) -> None:
    store = LocalStore(folder / "place")
    first = [Content.random(schema, seed=1, version=40) for schema in tables()]
    changed = {schema.name: Pages.none(schema) for schema in tables()}
    for pages in changed.values():
        pages.row_pages[1:3, 0] = True
        pages.key_pages[1:2] = True
    second = [content.changed(changed[content.schema.name], 2, 41) for content in first]
    manifests = [
        write(store, first, shards=2, layout="columns", batch_bytes=2000),
        write(store, second, shards=3, layout="rows", changed=changed),
    ]
    export_table(Checkpoint(store).table("cities"), folder / "cities.safetensors", state=True)
    described = [
        {
            "name": manifest.name,
            "tables": [
                {"schema": schema_json(content.schema), "version": content.version, "sha256": digest(content)}
                for content in contents
            ],
        }
        for manifest, contents in zip(manifests, (first, second), strict=True)
    ]
    (folder / "contents.json").write_text(json.dumps(described, indent=1) + "\n")


if __name__ == "__main__":
    make(Path(sys.argv[1]))
