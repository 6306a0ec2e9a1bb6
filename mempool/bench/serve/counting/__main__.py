"""``python -m mempool.bench.serve.counting``."""

from mempool.bench.serve.counting.command import main

if __name__ == "__main__":
    main()
