"""A client in another language, with the .proto files and nothing of ours, reads a correct lookup from a pool."""

import json
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import AsyncExitStack
from pathlib import Path
from typing import Any

import pytest
import torch
from serving import ServedPool, served_pool

import mempool
from mempool.client import connect
from mempool.wire.channels.loop import run

NODE = shutil.which("node")
FOLDER = Path(__file__).parents[1] / "node"
PROTOS = Path(__file__).parents[2] / "protos"
pytestmark = pytest.mark.skipif(NODE is None, reason="node is not installed")


@pytest.fixture(scope="module")
def client_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The client with its packages installed, in a folder of its own."""
    folder = tmp_path_factory.mktemp("node")
    for name in ("package.json", "lookup.js"):
        shutil.copy(FOLDER / name, folder)
    npm = shutil.which("npm")
    assert npm is not None, "node is here, so npm should be"
    subprocess.run([npm, "install", "--no-audit", "--no-fund", "--loglevel=error"], cwd=folder, check=True, timeout=90)
    return folder


@pytest.fixture(scope="module")
def served() -> Iterator[ServedPool]:
    stack = AsyncExitStack()
    pool = run(stack.enter_async_context(served_pool(2)), timeout_s=30)
    yield pool
    run(stack.aclose(), timeout_s=30)


def ask(folder: Path, address: str, table: str, topk: int, queries: torch.Tensor) -> "subprocess.CompletedProcess[str]":
    """Run the client."""
    return subprocess.run(
        [str(NODE), "lookup.js", str(PROTOS), address, table, str(topk)],
        cwd=folder,
        input=json.dumps(queries.tolist()),
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )


def tensor(answer: dict[str, Any], dtype: torch.dtype) -> torch.Tensor:
    return torch.tensor(answer["data"], dtype=dtype).reshape(answer["shape"])


def test_a_node_client_reads_a_correct_lookup(client_folder: Path, served: ServedPool) -> None:
    with connect(served.address, timeout_s=30) as pool:
        table = pool.create_table(
            mempool.TableConfig(
                name="facts", num_slots=32**2, value_dim=100, keys=mempool.ProductKeys(heads=2, key_dim=16)
            )
        )
        queries = torch.randn(3, 2, 16)
        # The reference: all scores of a head by brute force, in float64.
        halves = table.read_keys().double()
        scores = torch.stack(
            [
                (queries[:, head, :8].double() @ halves[head, 0].T)[:, :, None]
                + (queries[:, head, 8:].double() @ halves[head, 1].T)[:, None, :]
                for head in range(2)
            ],
            dim=1,
        ).flatten(2)
        best, ids = scores.topk(4, dim=-1)
        weights = torch.softmax(best, dim=-1)
        rows = table.rows(ids.reshape(-1)).double().reshape(3, 2, 4, 100)
        for address in (served.address, served.shards[1].info.address):
            done = ask(client_folder, address, "facts", 4, queries)
            assert done.returncode == 0, done.stderr
            answer = json.loads(done.stdout)
            assert answer["view"] == {"num_slots": 1024, "value_dim": 100, "epoch": 1}
            assert torch.equal(tensor(answer["ids"], torch.int64), ids)
            torch.testing.assert_close(tensor(answer["scores"], torch.float64), best, rtol=1e-5, atol=1e-6)
            torch.testing.assert_close(tensor(answer["weights"], torch.float64), weights, rtol=1e-5, atol=1e-6)
            values = torch.einsum("bhk,bhkv->bv", weights, rows)
            torch.testing.assert_close(tensor(answer["values"], torch.float64), values, rtol=1e-4, atol=1e-6)


def test_a_node_client_is_told_what_is_wrong(client_folder: Path, served: ServedPool) -> None:
    done = ask(client_folder, served.address, "nowhere", 4, torch.zeros(1, 2, 16))
    assert done.returncode == 1
    assert "NOT_FOUND: no table 'nowhere'" in done.stderr
