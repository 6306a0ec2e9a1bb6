"""A whole life of a pool that starts its own Ray: `up`, training, `status`, `scale`, `down`, and nothing is left.

`up` is called in a folder that holds another `mempool`, which nothing may import.
"""

import os
from pathlib import Path

from tests.integration.pools import RayPool, Training, descendants, listener, parent, wait_for


def test_up_to_down(tmp_path: Path) -> None:
    pool = RayPool(tmp_path, name="life", shards=2, ray_address="local")
    decoy = tmp_path / "checkout" / "mempool"
    decoy.mkdir(parents=True)
    (decoy / "__init__.py").write_text("raise SystemExit('this is another mempool')\n")
    pool.edit("tables: []", 'tables:\n  - {name: "facts", num_slots: 1024, value_dim: 64}')
    started = pool.up(folder=decoy.parent)
    try:
        assert "starting Ray" in started.out
        assert f"mempool.connect('127.0.0.1:{pool.port}')" in started.out
        said = [line for line in started.err.splitlines() if not line.startswith(("making table", "compiling"))]
        assert said == [], "Ray's noise reached the terminal"
        shard = pool.status()["shards"][0]
        worker = listener(int(shard["address"].rpartition(":")[2]))
        assert worker is not None
        ray_pid = parent(parent(worker))
        processes = descendants(ray_pid)
        assert len(processes) >= 5
        variables = Path(f"/proc/{worker}/environ").read_bytes().split(b"\0")
        assert {b"OMP_WAIT_POLICY=passive", b"GOMP_SPINCOUNT=0"} <= set(variables), "its idle threads would spin"
        controller = listener(pool.port)
        niceness = {os.getpriority(os.PRIO_PROCESS, pid) for pid in (ray_pid, worker, controller or 0)}
        assert len(niceness) == 1, "a trainer on this host would leave them no processor"
        assert "libtorch" in Path(f"/proc/{worker}/maps").read_text()
        assert not {"libtorch", "libllvmlite"} & _libraries(controller), "the controller loaded what only shards need"
        token = tmp_path / ".ray" / "auth_token"
        assert token.stat().st_mode & 0o077 == 0

        with pool.connect() as client:
            training = Training(client, "trained")
            for _ in range(5):
                training.step()
            training.assert_exact(client)
        document = pool.status()
        assert {table["name"]: table["version"] for table in document["tables"]} == {"facts": 0, "trained": 5}
        scaled = pool.run_here("scale", "--shards", "1", "-f", str(pool.file))
        assert "shards: 1" in pool.file.read_text()
        assert "1 shard;" in scaled.out
        assert len(pool.status()["shards"]) == 1
    finally:
        ended = pool.run("down")  # the only pool that was started here
    assert "ending Ray" in ended.out
    wait_for("every process to end", lambda: not any(_alive(pid) for pid in processes), within_s=90)


def _libraries(pid: int | None) -> set[str]:
    """Names, up to the first dot, of the libraries a process has loaded."""
    lines = Path(f"/proc/{pid}/maps").read_text().splitlines()
    return {Path(line.split()[-1]).name.partition(".")[0] for line in lines}


def _alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True
