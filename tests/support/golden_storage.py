"""A shard's folder of known contents, as it is kept in tests/golden for each version of the format.

python tests/support/golden_storage.py tests/golden/storage-1        # once, when a version is new
"""

import asyncio
import sys
from pathlib import Path

from byhand import ByHand

from mempool.journal import DiskFiles, Files, Journal, ShardFolder, Snapshots

GOLDEN = Path(__file__).parents[1] / "golden"
POOL, POOL_ID, SHARD = "facts", "0123abcd", 2
RECORDS = [(kind, bytes((kind * 7 + place) % 256 for place in range(kind * 13))) for kind in range(1, 12)]
PAGES = {
    b"rows/0": {"values": bytes(range(100)), "values.sum": bytes(range(100, 120))},
    b"rows/1": {"values": bytes(range(200, 230)), "values.sum": b""},
    "keys/ä".encode(): {"keys": b"k" * 64},
}


def open_folder(files: Files, path: str) -> ShardFolder:
    """The folder of this shard."""
    return ShardFolder(files, path, pool=POOL, pool_id=POOL_ID, shard=SHARD, wall=lambda: 1_767_225_600.0)


def write(path: str) -> None:
    """A journal of two lives, two segments each, the first of which is gone; and two snapshots."""
    files = DiskFiles()
    with open_folder(files, path) as folder:
        for number, life in enumerate((RECORDS[:6], RECORDS[6:])):
            hand = ByHand()
            journal = Journal(files, folder.journal, owner=folder.owner, runner=hand, segment_bytes=300)
            for kind, payload in life:
                journal.append(kind, [payload[:5], payload[5:]])
                if kind % 3:
                    hand.work()
            if number == 1:
                journal.remove_before(5)
            asyncio.run(journal.close())
        snapshots = Snapshots(files, folder.snapshots, owner=folder.owner)
        for after, changed in ((3, list(PAGES)), (4, [b"rows/1"])):
            with snapshots.begin(after=after) as snapshot:
                for key, arrays in PAGES.items():
                    if key in changed:
                        snapshot.write(key, [(name, [data]) for name, data in arrays.items()])
                    else:
                        snapshot.keep(key)
                snapshot.finish(b'{"tables": 1}')


if __name__ == "__main__":
    write(sys.argv[1])
