"""[CHILD] A process of a benchmark: ``python -m mempool.bench.processes MODULE:FUNCTION ARGUMENTS``, see ``child``."""

from __future__ import annotations

import importlib
import json
import sys

from mempool.bench.processes import standing
from mempool.bench.processes.child import Parent


def main() -> None:
    """Call the function with the link to the parent, and what the parent gave."""
    standing.go_on_alone()
    module, _, function = sys.argv[1].partition(":")
    getattr(importlib.import_module(module), function)(Parent(), **json.loads(sys.argv[2]))


if __name__ == "__main__":
    main()
