"""What a shard keeps on its disk: a folder of its own, and in it the journal: records, durable when that is said.

Stores bytes, and knows nothing of what they mean: no gRPC, no Ray, no torch. docs/storage.md has the formats.
"""

from mempool.journal.disk import DiskFiles
from mempool.journal.files import Bytes, File, Files, Lock
from mempool.journal.folder import ShardFolder
from mempool.journal.journal import Journal, Sync
from mempool.journal.reading import Record, Torn
from mempool.journal.records import Owner
from mempool.journal.snapshots import Snapshot, Snapshots

__all__ = [
    "Bytes",
    "DiskFiles",
    "File",
    "Files",
    "Journal",
    "Lock",
    "Owner",
    "Record",
    "ShardFolder",
    "Snapshot",
    "Snapshots",
    "Sync",
    "Torn",
]
