"""The contract itself: lint, and generated code that is what the protos say."""

import importlib.util
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[3]


def test_lint() -> None:
    buf = shutil.which("buf", path=sysconfig.get_path("scripts")) or shutil.which("buf")
    if buf is None:
        pytest.skip("buf is not installed (dev extra: buf-bin)")
    done = subprocess.run([buf, "lint", "protos"], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_generated_code_has_not_drifted() -> None:
    command = [sys.executable, "protos/generate.py", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stdout) == (0, "")


def test_drift_is_seen() -> None:
    spec = importlib.util.spec_from_file_location("generate", ROOT / "protos" / "generate.py")
    assert spec is not None
    assert spec.loader is not None
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    a, b, c = Path("a.py"), Path("b.py"), Path("c.py")
    assert generate.differences({a: "x\n", b: ""}, {a: "x\n", b: ""}) == []
    changed, gone, new = generate.differences({a: "x\n", b: ""}, {a: "y\n", c: "z\n"})
    assert "-x" in changed
    assert "+y" in changed
    assert "only one side has b.py" in gone
    assert "+z" in new
