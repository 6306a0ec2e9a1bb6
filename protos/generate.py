"""Generates mempool/wire/v1/ from the protos beside this file. ``--check`` writes nothing, exits 1 on any difference.

    python protos/generate.py [--check]

Needs the `dev` extra. Generated code is committed, so users need neither this nor a protobuf compiler.
"""

import argparse
import difflib
import subprocess
import sys
import sysconfig
import tempfile
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PROTOS = ROOT / "protos"
PACKAGE = Path("mempool/wire/v1")
# The oldest that is supported: generated code refuses runtimes older than its compiler and accepts newer ones.
GRPCIO_TOOLS = "1.76.0"
PLUGINS = ("protoc-gen-mypy", "protoc-gen-mypy_grpc")
KEPT_BY_HAND = "__init__.py"


def compile_protos(target: Path) -> dict[Path, str]:
    """Compiles every proto into ``target`` and returns the files made: path below ``target`` -> text."""
    if (found := version("grpcio-tools")) != GRPCIO_TOOLS:
        sys.exit(f"protos/generate.py: grpcio-tools {found} is installed; {GRPCIO_TOOLS} is needed")
    protos = [str(proto.relative_to(PROTOS)) for proto in sorted((PROTOS / PACKAGE).glob("*.proto"))]
    services = [proto for proto in protos if "\nservice " in (PROTOS / proto).read_text()]
    run_protoc(f"--python_out={target}", f"--mypy_out=quiet:{target}", *protos)
    run_protoc(f"--grpc_python_out={target}", f"--mypy_grpc_out=quiet:{target}", *services)
    return {path.relative_to(target): path.read_text() for path in sorted(target.rglob("*.py*"))}


def run_protoc(*arguments: str) -> None:
    """Runs the protobuf compiler, with the plugins that are installed beside this Python; exits where it fails."""
    scripts = Path(sysconfig.get_path("scripts"))
    plugins = [f"--plugin={plugin}={scripts / plugin}" for plugin in PLUGINS]
    command = [sys.executable, "-m", "grpc_tools.protoc", f"-I{PROTOS}", *plugins, *arguments]
    if subprocess.run(command, check=False).returncode != 0:
        sys.exit("protos/generate.py: the protobuf compiler failed, see above")


def committed() -> dict[Path, str]:
    """The generated files that the working tree has: path below the root -> text."""
    files = sorted((ROOT / PACKAGE).glob("*.py*"))
    return {path.relative_to(ROOT): path.read_text() for path in files if path.name != KEPT_BY_HAND}


def differences(old: dict[Path, str], new: dict[Path, str]) -> list[str]:
    """One unified diff for each file that differs, is missing, or should not be there."""
    diffs = []
    for path in sorted(old.keys() | new.keys()):
        before, after = old.get(path, "").splitlines(), new.get(path, "").splitlines()
        lines = list(difflib.unified_diff(before, after, f"committed {path}", f"generated {path}", lineterm="", n=1))
        if lines or (path in old) != (path in new):
            diffs.append("\n".join(lines[:40] or [f"only one side has {path}"]))
    return diffs


def main() -> int:
    parser = argparse.ArgumentParser(description="Generate mempool/wire/v1/ from protos/.")
    parser.add_argument("--check", action="store_true", help="write nothing; exit 1 where the committed code differs")
    check = parser.parse_args().check
    with tempfile.TemporaryDirectory() as target:
        new = compile_protos(Path(target))
    old = committed()
    diffs = differences(old, new)
    if check:
        for diff in diffs:
            print(diff)
        if diffs:
            print(f"{len(diffs)} generated files differ from the protos. Run: python protos/generate.py")
        return 1 if diffs else 0
    for path in old.keys() - new.keys():
        (ROOT / path).unlink()
    for path, text in new.items():
        if old.get(path) != text:
            (ROOT / path).write_text(text)
    print(f"protos/generate.py: {len(new)} files in {PACKAGE}, {len(diffs)} of them changed")
    return 0


if __name__ == "__main__":
    sys.exit(main())
