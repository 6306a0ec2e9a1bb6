"""``python -m mempool.bench.serve.soak``."""

import sys

from mempool.bench.serve.soak.command import main

if __name__ == "__main__":
    sys.exit(main())
