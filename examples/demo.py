"""`make demo`: a pool of 2 shards on Ray, a trainer attached over gRPC, 2 -> 4 shards half way; then the pool is ended,
started again, and a fact is asked of what its shards have kept. Everything is ended after, and what they kept removed.

It does nothing that cannot be typed by hand, and prints each command before running it. What is learned, and how, is
`train_facts.py`'s, and asking `ask_fact.py`'s. Arguments given here go to it: `python examples/demo.py --epochs 3`.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType

SHARDS_BEFORE = 2
SHARDS_AFTER = 4
# As many steps of both models as a minute on two slow cores allows, for facts asked often enough to be learned.
TRAINING = ("--num-facts", "10000", "--epochs", "8")

_ROOT = Path(__file__).resolve().parent.parent
_OUT = Path("out") / "demo"
# What `up` writes down for `down`: its own, so that a bare `mempool down` elsewhere leaves the demo alone.
_STATE = _OUT / "state"
_END_TIMEOUT_S = 60.0


class DemoError(Exception):
    """A step of the demo failed; it has said why above."""


def main(arguments: Sequence[str]) -> int:
    """Runs the demo; answers the exit code, 130 after Ctrl-C."""
    signal.signal(signal.SIGTERM, _interrupt)
    os.chdir(_ROOT)
    pool = f"demo-{os.getpid()}"
    began_s = _began_s()
    spent = {"setting up": time.time() - began_s}
    try:
        (_OUT / "facts.json").unlink(missing_ok=True)  # an interrupted run leaves no figures of the one before
        shutil.rmtree(_OUT / "storage", ignore_errors=True)  # of a run that was killed
        config = write_config(pool, folder=_OUT, template=Path("cluster/local.yaml"))
        _say(f"a pool of {SHARDS_BEFORE} shards that keep what they have in {_OUT / 'storage'}, by {config}")
        with ExitStack() as ending:
            with _timed(spent, "Ray and the pool, up; the rest of its kernels compiled, or all found"):
                _run("-m", "mempool", "up", "-f", str(config))
                ending.callback(_end, config, spent=spent)
            _train(config, arguments, spent=spent)
            _say("the pool is ended, and started again from what its shards have kept; then one fact is asked")
            with _timed(spent, "Ray and the pool, down and up again"):
                _run("-m", "mempool", "down", "--pool", pool)
                _run("-m", "mempool", "up", "-f", str(config))
            with _timed(spent, "a fact, asked: start of Python, imports, look-up"):
                _run("examples/ask_fact.py", "--address", _address(config), "--model", str(_OUT / "model.pt"))
    except DemoError as error:
        print(f"demo: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("demo: interrupted", file=sys.stderr)
        return 130
    _say("where the time went, in seconds")
    for what, seconds in spent.items():
        print(f"{seconds:8.1f}  {what}")
    _say(f"done in {time.time() - began_s:.0f} s; the figures are in {_OUT / 'facts.json'}")
    return 0


def write_config(pool: str, *, folder: Path, template: Path) -> Path:
    """A copy of the template for this run: a pool of its own name and storage, on a free port and a Ray of its own.

    Raises:
        DemoError: if the template does not say name, port, shards and Ray's address in lines of their own.
    """
    text = template.read_text(encoding="utf-8")
    storage = json.dumps({"path": str((folder / "storage").absolute())})  # which is YAML too
    text, found = re.subn(
        r"^shard:(?: *#.*)?\n", lambda line: f"{line[0]}  storage: {storage}\n", text, count=1, flags=re.MULTILINE
    )
    if not found:
        raise DemoError(f"{template} has no line `shard:` of its own; put it back.")
    for field, value in (("name", pool), ("port", "0"), ("shards", str(SHARDS_BEFORE)), ("address", "local")):
        text, found = re.subn(rf"^(  {field}: )\S+", rf"\g<1>{value}", text, count=1, flags=re.MULTILINE)
        if not found:
            raise DemoError(f"{template} has no line `  {field}: ...` of its own; put it back.")
    folder.mkdir(parents=True, exist_ok=True)
    config = folder / "cluster.yaml"
    config.write_text(text, encoding="utf-8")
    return config


def _train(config: Path, arguments: Sequence[str], *, spent: dict[str, float]) -> None:
    address = _address(config)
    _say(f"two models learn the same facts; half way the pool goes {SHARDS_BEFORE} -> {SHARDS_AFTER} shards, live")
    whole: dict[str, float] = {}
    with _timed(whole, "trainer"):
        _run(
            *("examples/train_facts.py", "--address", address, "--json", str(_OUT / "facts.json")),
            *("--model", str(_OUT / "model.pt")),
            *("--rescale-config", str(config), "--rescale-to", str(SHARDS_AFTER), *TRAINING, *arguments),
        )
    if (_OUT / "facts.json").exists():
        parts: dict[str, float] = json.loads((_OUT / "facts.json").read_text(encoding="utf-8"))["spent_s"]
        spent["trainer: start of Python, imports, end"] = whole["trainer"] - sum(parts.values())
        spent.update({f"trainer: {what}": seconds for what, seconds in parts.items()})


def _address(config: Path) -> str:
    status = _run("-m", "mempool", "status", "-f", str(config), "--json", captured=True)
    return str(json.loads(status)["address"])


@contextmanager
def _timed(spent: dict[str, float], what: str) -> Iterator[None]:
    start_s = time.monotonic()
    try:
        yield
    finally:
        spent[what] = time.monotonic() - start_s


def _began_s() -> float:
    """When `make demo` was typed, where it says so."""
    try:
        return float(os.environ["DEMO_BEGAN"])
    except (KeyError, ValueError):
        return time.time()


def _end(config: Path, *, spent: dict[str, float]) -> None:
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, signal.SIG_IGN)
    _say(
        "ending the pool and what was started for it, and removing what it kept (a few seconds, not to be interrupted)"
    )
    with _timed(spent, "Ray and the pool, down"):
        _run("-m", "mempool", "down", "-f", str(config), "--drop", "--yes")


def _run(*arguments: str, captured: bool = False) -> str:
    """Runs a Python command and waits for it; if this process is to end first, so is the command, by one SIGINT.

    Args:
        arguments: after the interpreter's name.
        captured: answer what it prints, instead of letting it through.

    Raises:
        DemoError: if it fails.
    """
    command = shlex.join(["python", *arguments])
    print(f"$ {command}", flush=True)
    process = subprocess.Popen(
        [sys.executable, *arguments],
        env={**os.environ, "XDG_STATE_HOME": str(_ROOT / _STATE)},
        stdout=subprocess.PIPE if captured else None,
        text=True,
        start_new_session=True,  # Ctrl-C reaches this process alone, which passes it on once
    )
    try:
        printed, _ = process.communicate()
    except BaseException:
        process.send_signal(signal.SIGINT)
        try:
            process.wait(timeout=_END_TIMEOUT_S)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        raise
    if process.returncode:
        raise DemoError(f"`{command}` ended with {process.returncode}")
    return printed or ""


def _say(text: str) -> None:
    print(f"== {text}", flush=True)


def _interrupt(_number: int, _frame: FrameType | None) -> None:
    raise KeyboardInterrupt


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
