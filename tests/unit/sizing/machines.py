"""A machine whose constants are round numbers, so that what is predicted by them can be counted."""

from mempool.sizing import Costs, Kernels, Machine, Path

COSTS = Costs(
    wall={"call": 5e-3, "shard": 2e-3, "pair": 4e-8},
    client={"call": 1e-3, "shard": 1e-3, "pair": 2e-8},
    server={"call": 2e-3, "pair": 1e-8},
)
MACHINE = Machine(
    name="a-machine",
    copy_bytes_per_s=1e10,
    kernels={"cpu": Kernels(gather={"row": 1e-8, "byte": 1e-10}, update={"row": 2e-8, "byte": 2e-10})},
    paths={"embedded": Path(gather=COSTS, step=COSTS), "gRPC": Path(gather=COSTS, step=COSTS)},
)
