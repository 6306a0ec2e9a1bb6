"""Scripts that need a process of their own, each forked from one that has loaded torch, which takes two seconds."""

import multiprocessing
import os
import sys
import tempfile
import textwrap
import warnings
from collections.abc import Mapping
from multiprocessing import forkserver
from pathlib import Path
from unittest import mock

_FORKED = multiprocessing.get_context("forkserver")


def run_script(code: str, environment: Mapping[str, str], *, timeout_s: float = 100.0) -> tuple[str, str]:
    """stdout and stderr of Python code that ends well, to which warnings are errors, in the folder of the project.

    One thread of OpenMP is what it starts with, and torch and pytest are all it finds loaded.

    Raises:
        AssertionError: It ended otherwise, or not at all.
    """
    _FORKED.set_forkserver_preload(["torch", "pytest"])
    with mock.patch.dict(os.environ, OMP_NUM_THREADS="1"):  # read once, as torch is loaded
        forkserver.ensure_running()
    with tempfile.TemporaryDirectory() as folder:
        said = [Path(folder, name) for name in ("stdout", "stderr")]
        process = _FORKED.Process(target=_run, args=(textwrap.dedent(code), dict(environment), said))
        process.start()
        try:
            process.join(timeout_s)
            stdout, stderr = (path.read_text() if path.exists() else "" for path in said)
            assert process.exitcode == 0, f"ended with {process.exitcode}:\n{stdout}\n{stderr}"
        finally:
            process.kill()
            process.join()
            process.close()
    return stdout, stderr


def _run(code: str, environment: Mapping[str, str], said: list[Path]) -> None:
    for descriptor, path in zip((1, 2), said, strict=True):
        opened = os.open(path, os.O_WRONLY | os.O_CREAT)
        os.dup2(opened, descriptor)
        os.close(opened)
    os.environ.update(environment)
    os.chdir(Path(__file__).parents[2])
    sys.path.insert(0, "")
    warnings.simplefilter("error")
    exec(compile(code, "<script>", "exec"), {"__name__": "__main__"})
