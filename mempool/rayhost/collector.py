"""Python's cyclic collector in a process that serves: what is there for good is not walked through again and again.

A full collection takes a sixth of a second where torch and its kernels are loaded, and all threads stand still.
"""

import gc


def settle(*, young: bool = False) -> None:
    """What lives now stays: collections pass over it. What nobody refers to any more is freed as ever.

    Args:
        young: Look at what came lately only, before: a hundredth of the time.
    """
    gc.collect(1 if young else 2)
    gc.freeze()
