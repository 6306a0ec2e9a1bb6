"""A pool on Ray under test: its cluster file, the `mempool` command as users run it, the processes behind a port."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor
from typer.testing import CliRunner

import mempool
from mempool.cli.app import app
from mempool.rayhost.ray_process import free_port
from mempool.types import ShardInfo

T = TypeVar("T")

COMMAND_S = 240.0  # on a machine that does much else


@dataclass(frozen=True)
class Ended:
    """A command that has ended."""

    code: int
    out: str
    err: str


class RayPool:
    """One pool: its own folder for the file, the records and the user's home.

    Args:
        folder: Where everything is written.
        name: Of the pool.
        shards: To begin with.
        ray_address: As in the file; "auto" finds ``ray_at``.
        ray_at: What RAY_ADDRESS says.
        token: None binds to loopback; a token binds to all interfaces.
        memory: Of a shard.
        trainer_lease_s: How long a trainer may be silent.
        rescale_by: As in the file.
    """

    def __init__(
        self,
        folder: Path,
        *,
        name: str,
        shards: int,
        ray_address: str = "auto",
        ray_at: str | None = None,
        token: str | None = None,
        port: int | None = None,
        resources: dict[str, float] | None = None,
        memory: str = "256MiB",
        trainer_lease_s: float = 10.0,
        rescale_by: str | None = None,
    ) -> None:
        self.name = name
        self.token = token
        self.trainer_lease_s = trainer_lease_s
        self.port = free_port() if port is None else port
        self.file = folder / f"{name}.yaml"
        self._env = {key: value for key, value in os.environ.items() if not key.startswith(("MEMPOOL_", "RAY_"))}
        self._env |= {"HOME": str(folder), "XDG_STATE_HOME": str(folder / "state")}
        if ray_at is not None:
            self._env["RAY_ADDRESS"] = ray_at
        pool: dict[str, Any] = {"name": name, "shards": shards, "port": self.port}
        pool |= {} if rescale_by is None else {"rescale_by": rescale_by}
        if token is not None:
            (folder / "token").write_text(token + "\n")
            pool |= {"bind": "0.0.0.0", "token_file": "token"}
        shard = {"num_cpus": 0, "threads": 1, "memory": memory, "resources": resources or {}}
        shard |= {"trainer_lease": trainer_lease_s}
        # JSON is YAML; one field to a line, as people write it.
        sections = {"pool": pool, "shard": shard, "ray": {"address": ray_address}}
        lines = [f"{section}:\n" + _fields(fields) for section, fields in sections.items()]
        self.file.write_text("\n".join([*lines, "tables: []", ""]))

    @property
    def address(self) -> str:
        return f"127.0.0.1:{self.port}"

    def edit(self, before: str, after: str) -> None:
        """Change the file, as an editor would."""
        text = self.file.read_text()
        assert before in text
        self.file.write_text(text.replace(before, after))

    def edit_shards(self, shards: int) -> None:
        """Change how many shards the file asks for."""
        text, count = re.subn(r"^  shards: \d+$", f"  shards: {shards}", self.file.read_text(), flags=re.MULTILINE)
        assert count == 1
        self.file.write_text(text)

    def start(self, *command: str, stdin: int = subprocess.DEVNULL) -> "subprocess.Popen[str]":
        """A process of Python's, which is told the pool's token; its output is to be read."""
        env = self._env | ({} if self.token is None else {"MEMPOOL_TOKEN": self.token})
        return subprocess.Popen([sys.executable, *command], env=env, stdin=stdin, stdout=subprocess.PIPE, text=True)

    def run(self, *arguments: str, expect: int = 0, folder: Path | None = None) -> Ended:
        """Run `mempool` with these arguments, as a process of its own, in a folder."""
        command = [
            sys.executable,
            "-P",
            "-m",
            "mempool",
            *arguments,
        ]  # -P: as the installed command, whatever lies here
        done = subprocess.run(
            command,
            env=self._env,
            capture_output=True,
            text=True,
            timeout=COMMAND_S,
            stdin=subprocess.DEVNULL,
            cwd=folder,
        )
        return _checked(arguments, Ended(code=done.returncode, out=done.stdout, err=done.stderr), expect)

    def run_here(self, *arguments: str, expect: int | None = 0) -> Ended:
        """The same within this process, which spares importing everything again: for commands that need no Ray.

        expect: How it ends; None: as it may.
        """
        changes = {key: self._env[key] for key in ("HOME", "XDG_STATE_HOME")}
        unset = {key: None for key in os.environ if key.startswith("MEMPOOL_")}
        done = CliRunner().invoke(app, list(arguments), env=changes | unset)
        if done.exception is not None and not isinstance(done.exception, SystemExit):
            raise done.exception
        return _checked(arguments, Ended(code=done.exit_code, out=done.stdout, err=done.stderr), expect)

    def up(self, *, expect: int = 0, folder: Path | None = None) -> Ended:
        return self.run("up", "-f", str(self.file), expect=expect, folder=folder)

    def up_with_key(self, controller_key: str) -> None:
        """`mempool up` by a process that draws this controller key, for tests that do what only controllers do."""
        self._up_after(
            "import types, mempool.rayhost.keys as keys\n"
            f"keys.secrets = types.SimpleNamespace(token_hex=lambda _: {controller_key!r})\n"
        )

    def up_where(self, resource: str) -> None:
        """`mempool up` with its controller on a node that has this resource."""
        self._up_after(
            "import mempool.rayhost.cluster as cluster\n"
            "make = cluster.make_actor\n"
            "cluster.make_actor = lambda *given, scheduling_strategy, **named: make(\n"
            f"    *given, resources={{{resource!r}: 1}}, **named\n"
            ")\n"
        )

    def _up_after(self, script: str) -> None:
        script += (
            f"import sys\nsys.argv = ['mempool', 'up', '-f', {str(self.file)!r}]\n"
            "from mempool.cli import main\n"
            "main()\n"
        )
        command = [sys.executable, "-c", script]
        subprocess.run(command, env=self._env, timeout=COMMAND_S, stdin=subprocess.DEVNULL, check=True)

    def down(self, *, expect: int = 0) -> Ended:
        return self.run("down", "--pool", self.name, expect=expect)

    def apply(self, *arguments: str, expect: int = 0) -> Ended:
        return self.run_here("apply", "-f", str(self.file), *arguments, expect=expect)

    def apply_shards(self, shards: int) -> Ended:
        """`mempool apply` of the file with another number of shards; the file is as before then."""
        text = self.file.read_text()
        self.file.write_text(re.sub(r"(?m)^  shards: \d+$", f"  shards: {shards}", text))
        try:
            return self.run_here("apply", "-f", str(self.file), expect=None)
        finally:
            self.file.write_text(text)

    def status(self) -> dict[str, Any]:
        """`mempool status --json`."""
        document: dict[str, Any] = json.loads(self.run_here("status", "-f", str(self.file), "--json").out)
        return document

    def connect(self, *, timeout_s: float = 180.0) -> mempool.Pool:
        """timeout_s: A shard that is killed is back when its process has imported torch, on a machine that does much
        else."""
        return mempool.connect(self.address, token=self.token, timeout_s=timeout_s)


class Training:
    """Training steps on a table in the pool and, the same, with torch's own Adagrad on a local tensor."""

    def __init__(self, pool: mempool.Pool, name: str, *, lr: float = 0.1, **changes: Any) -> None:
        shape = {"num_slots": 3000, "value_dim": 96, "block_dim": 32, "page_slots": 64} | changes
        config = mempool.TableConfig(name=name, optimizer=mempool.optim.Adagrad(lr=lr), **shape)
        self.table = pool.create_table(config)
        self.all_ids = torch.arange(self.table.num_slots)
        self.local = torch.nn.Parameter(self.table.rows(self.all_ids).clone())
        self._optimizer = torch.optim.Adagrad([self.local], lr=lr)
        self._random = torch.Generator().manual_seed(11)
        self.steps = 0

    def step(self) -> None:
        """Two lookups, a loss, a commit; the same beside it."""
        self._optimizer.zero_grad()
        for _ in range(2):
            ids = torch.randint(self.table.num_slots, (16, 6), generator=self._random)
            weights = torch.randn(16, 6, generator=self._random)
            target = torch.randn(16, self.table.value_dim, generator=self._random)
            (self.table.gather(ids, weights) - target).square().sum().backward()
            ((self.local[ids] * weights.unsqueeze(-1)).sum(1) - target).square().sum().backward()
        self.table.commit()
        self._optimizer.step()
        self.steps += 1

    def error(self) -> float:
        """Norm of the difference of all values over the norm of the local ones."""
        local: Tensor = self.local.detach().double()
        return float((self.table.rows(self.all_ids).double() - local).norm() / local.norm())

    def assert_exact(self, pool: mempool.Pool) -> None:
        """Committed updates are applied, once each, on every shard that owns pages; values are as torch has them."""
        assert self.table.counters.updates_committed == 2 * self.steps
        assert self.error() <= 1e-5  # read first: shards that have not heard of the last step wait for it
        owners = 0
        for shard in pool.status().shards:
            for status in shard.tables:
                if status.name == self.table.name and status.pages:
                    owners += 1
                    assert status.updates_applied == 2 * self.steps, shard.info
                    assert status.version == self.steps, shard.info
        assert owners


def wait_for(what: str, check: Callable[[], T | None], *, within_s: float = 180.0) -> T:
    """The first answer of ``check`` that is true."""
    deadline_s = time.monotonic() + within_s
    while not (answer := check()):
        assert time.monotonic() < deadline_s, f"waited {within_s:g} s in vain: {what}"
        time.sleep(0.1)
    return answer


def kill_listener(port: int) -> int:
    """SIGKILL to the process that listens on a port; its pid."""
    pid = listener(port)
    assert pid is not None, f"nobody listens on port {port}"
    os.kill(pid, signal.SIGKILL)
    return pid


def listener(port: int) -> int | None:
    """The process that listens on a TCP port of this machine."""
    inodes = set()
    for table in ("/proc/net/tcp", "/proc/net/tcp6"):
        for line in Path(table).read_text().splitlines()[1:]:
            fields = line.split()
            if fields[3] == "0A" and int(fields[1].rpartition(":")[2], 16) == port:
                inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").glob("[0-9]*"):
        try:
            if any(os.readlink(descriptor) in inodes for descriptor in (process / "fd").iterdir()):
                return int(process.name)
        except OSError:  # ended meanwhile
            continue
    return None


def parent(pid: int) -> int:
    """The parent of a process: for a shard, the raylet of its node."""
    return int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])


def descendants(pid: int) -> set[int]:
    """A process and all below it."""
    parents: dict[int, int] = {}
    for process in Path("/proc").glob("[0-9]*"):
        try:
            parents[int(process.name)] = parent(int(process.name))
        except OSError:
            continue
    found = {pid}
    while more := {child for child, above in parents.items() if above in found} - found:
        found |= more
    return found


def port_of(info: ShardInfo) -> int:
    return int(info.address.rpartition(":")[2])


def _checked(arguments: tuple[str, ...], ended: Ended, expect: int | None) -> Ended:
    assert expect is None or ended.code == expect, f"{arguments} ended with {ended.code}:\n{ended.out}\n{ended.err}"
    assert "Traceback" not in ended.err, ended.err
    return ended


def _fields(fields: dict[str, Any]) -> str:
    return "\n".join(f"  {name}: {json.dumps(value)}" for name, value in fields.items())
