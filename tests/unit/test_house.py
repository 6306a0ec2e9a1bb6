"""Rules of the house that no linter knows: sizes of files and folders, light imports, public names."""

import ast
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest

import mempool

ROOT = Path(__file__).parents[2]
GENERATED = ("_pb2", "_pb2_grpc")
SOURCES = [
    path
    for folder in ("mempool", "examples", "tests", "protos")
    for path in sorted((ROOT / folder).rglob("*.py"))
    if not path.stem.endswith(GENERATED) and "node_modules" not in path.parts
]
HEAVY = ("ray", "triton", "numba", "fastapi", "starlette", "flask", "aiohttp", "uvicorn")


def test_there_is_something_to_check() -> None:
    assert len(SOURCES) > 100


def test_files_are_short_and_say_what_they_are() -> None:
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in SOURCES}
    assert [name for name, text in texts.items() if text.count("\n") >= 500] == [], "split them: one noun a file"
    documented = {name: text for name, text in texts.items() if name.startswith("mempool/") and text.strip()}
    assert [name for name, text in documented.items() if not ast.get_docstring(ast.parse(text))] == [], (
        "a module says in one to five lines what it does and what it leaves to others"
    )


def test_folders_hold_few_files() -> None:
    folders = Counter(
        path.parent for path in SOURCES if path.is_relative_to(ROOT / "mempool") and path.stem != "__init__"
    )
    assert {str(folder): count for folder, count in folders.items() if count > 12} == {}


def test_the_trainers_imports_are_light() -> None:
    statements = (
        "import mempool; mempool.connect, mempool.optim",
        "import mempool.client, mempool.wire",
        "import mempool.nn",
    )
    script = "import sys\n"
    for statement in statements:
        script += f"{statement}\nprint(*sorted({{name.partition('.')[0] for name in sys.modules}}))\n"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    for statement, line in zip(statements, done.stdout.splitlines(), strict=True):
        loaded = set(line.split())
        assert "mempool" in loaded
        assert loaded.isdisjoint(HEAVY), f"{statement!r} loads {sorted(loaded & set(HEAVY))}"


def test_a_shard_that_keeps_nothing_loads_no_codecs() -> None:
    script = "import sys, mempool.shard.engine; print('google.protobuf' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    assert done.stdout.strip() == "False"


def test_public_names_are_these_and_can_be_had() -> None:
    assert sorted(mempool.__all__) == [
        "FlatKeys",
        "HierarchicalKeys",
        "Lookup",
        "Pool",
        "ProductKeys",
        "Table",
        "TableConfig",
        "__version__",
        "connect",
        "errors",
        "local",
        "nn",
        "optim",
    ]
    for name in mempool.__all__:
        assert getattr(mempool, name) is not None
    shards = {"SGD", "Adagrad", "RowWiseAdagrad", "Adam", "AdamW", "RowWiseAdam"}
    assert shards | {"PoolOptimizer"} <= set(mempool.optim.__all__)
    assert "MemoryLayer" in mempool.nn.__all__
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        mempool.nothing  # noqa: B018
