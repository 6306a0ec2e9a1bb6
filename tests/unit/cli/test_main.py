"""The entry points: `mempool` and `python -m mempool`."""

import subprocess
import sys

import pytest

import mempool


def test_module_runs_the_command() -> None:
    done = subprocess.run(
        [sys.executable, "-m", "mempool", "--version"], capture_output=True, text=True, timeout=60, check=True
    )
    assert done.stdout.strip() == mempool.__version__


@pytest.mark.parametrize(("package", "command"), [("typer", "status"), ("rich", "up"), ("yaml", "status")])
def test_missing_packages_are_named(package: str, command: str) -> None:
    code = f"import sys; sys.modules[{package!r}] = None; from mempool.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code, command, "-f", __file__], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert f"needs the package {package!r}" in done.stderr or "needs PyYAML" in done.stderr
    assert "pip install 'mempool[server]'" in done.stderr


def test_status_needs_no_ray() -> None:
    code = "import sys, mempool.cli.app, mempool.rayhost; sys.exit('ray' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], timeout=60).returncode == 0
