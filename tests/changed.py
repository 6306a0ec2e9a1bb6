"""Runs the tests of what changed since a commit (HEAD, or what is given): changed files of tests, those that a changed
module's place mirrors to, and the house's own.

    python tests/changed.py [COMMIT] [PYTEST OPTIONS]
"""

import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1]
ALWAYS = ("tests/unit/test_house.py", "tests/unit/test_readme.py")


def changed(since: str) -> list[Path]:
    """Files that differ from a commit, new ones too, by their place in the repository."""
    tracked = ["git", "diff", "--name-only", "--diff-filter=d", since]
    new = ["git", "ls-files", "--others", "--exclude-standard"]
    lines = [
        subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
        for command in (tracked, new)
    ]
    return sorted(Path(line) for line in "".join(lines).splitlines())


def tests_of(path: Path) -> Iterator[Path]:
    """The files of tests that a changed file asks for."""
    if path.suffix != ".py":
        return
    if path.parts[0] == "tests":
        if path.name.startswith("test_"):
            yield path
        return
    if path.parts[0] == "mempool":
        mirrored = ROOT / "tests" / "unit" / Path(*path.parts[1:-1])
        name = path.parent.name if path.name == "__init__.py" else path.stem
        for found in sorted(mirrored.glob(f"test_{name}.py")) + sorted(mirrored.glob(f"test_{name}_*.py")):
            yield found.relative_to(ROOT)


def main() -> int:
    arguments = sys.argv[1:]
    since = arguments.pop(0) if arguments and not arguments[0].startswith("-") else "HEAD"
    wanted = {Path(name) for name in ALWAYS} | {test for path in changed(since) for test in tests_of(path)}
    return subprocess.run(
        [sys.executable, "-m", "pytest", "-q", *arguments, *map(str, sorted(wanted))], cwd=ROOT, check=False
    ).returncode


if __name__ == "__main__":
    sys.exit(main())
