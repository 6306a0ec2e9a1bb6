"""Where files are kept: one seam, `Store`, over a folder of this host and over any fsspec URL."""

from mempool.checkpoint.stores.opening import open_file, open_store
from mempool.checkpoint.stores.store import FileWriter, Store, check_path

__all__ = ["FileWriter", "Store", "check_path", "open_file", "open_store"]
