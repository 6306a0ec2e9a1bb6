"""The wire: messages and frames, the methods of the services, status <-> errors, the IO loop, channels.

Leaves to others what is said over it: ``client`` plans and retries, ``server`` validates and answers.
"""

import os
import sys

_FORKS = "GRPC_ENABLE_FORK_SUPPORT"

# gRPC reads this once, when it is loaded. Its fork handlers cannot work beside a thread that waits in gRPC, as that of
# grpc.aio always does: they only print a line for each process that is forked (DataLoader workers). Whoever set it, or
# loaded gRPC before, keeps what they have.
if "grpc" not in sys.modules and _FORKS not in os.environ:
    os.environ[_FORKS] = "0"
    import grpc  # noqa: F401

    del os.environ[_FORKS]
