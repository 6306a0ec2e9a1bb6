"""``python -m mempool``: the `mempool` command."""

from mempool.cli import main

if __name__ == "__main__":
    main()
