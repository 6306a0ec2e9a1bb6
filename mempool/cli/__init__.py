"""The `mempool` command. Needs the server packages, and says so where they are missing."""

import sys

_PACKAGES = ("typer", "rich")


def main() -> None:
    """Run the command line; ends the process with its exit code."""
    try:
        from mempool.cli.app import app
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in _PACKAGES:
            raise
        sys.exit(
            f"mempool: the command line needs the package {package!r}, which is not installed: "
            "pip install 'mempool[server]'"
        )
    app(prog_name="mempool")
