"""The README is always true: its Python runs, its files and commands exist."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PYTHON = re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.mark.parametrize("code", PYTHON, ids=range(len(PYTHON)))
def test_its_python_runs_as_it_stands(code: str) -> None:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 0, done.stderr


def test_the_recipes_for_saving_run_as_they_stand(tmp_path: Path) -> None:
    code = "\n".join(re.findall(r"```python\n(.*?)```", (ROOT / "docs/using.md").read_text(), re.DOTALL))
    assert "torch.save" in code
    assert "dcp.load" in code
    command = [sys.executable, "-W", "ignore", "-c", code]
    path = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False, cwd=tmp_path, env=path)
    assert done.returncode == 0, done.stderr


def test_its_paths_exist() -> None:
    names = set(re.findall(r"[\w./-]*/[\w.-]+\.(?:md|yaml|json|js|py|png)\b", README))
    assert {"cluster/local.yaml", "tests/node/lookup.js", "docs/decisions.md"} <= names
    for name in names:
        assert (ROOT / name).exists(), name


@pytest.mark.parametrize(
    "page", ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in ROOT.glob("docs/*.md"))]
)
def test_links_lead_somewhere(page: str) -> None:
    for link in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", (ROOT / page).read_text()):
        assert (ROOT / page).parent.joinpath(link).exists(), link


def test_its_make_targets_exist() -> None:
    makefile = (ROOT / "Makefile").read_text()
    told = README + (ROOT / "CONTRIBUTING.md").read_text()
    targets = set(re.findall(r"(?:`|^)make (\w+)", told, re.MULTILINE))
    assert {"demo", "test"} <= targets
    for target in targets:
        assert re.search(rf"^{target}:", makefile, re.MULTILINE), target
