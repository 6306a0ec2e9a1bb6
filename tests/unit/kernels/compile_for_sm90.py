"""Compiles every Triton kernel for a Hopper GPU on a machine without one; run as a script, prints a line for each."""

import subprocess
import sys

import triton
from triton.backends.compiler import GPUTarget
from triton.backends.nvidia.compiler import get_ptxas
from triton.compiler import ASTSource

from mempool.kernels.gpu import bags, topk, updates
from mempool.kernels.gpu.elements import STRICT

POINTERS = {"page_table": "*i32", "not_finite": "*i32", "partial": "*fp64"}
POINTERS |= dict.fromkeys(("ids", "offsets", "order", "starts", "bags", "sorted_rows", "best"), "*i64")
FLOATS = ("grad_scale", "step_size", "eps", "rest1", "rest2")
INTEGERS = ("num_pages", "page_shift", "width", "tile_columns", "num_elements", "num_rows", "num_scores", "half_k", "k")
INTEGERS += ("num_queries", "num_heads", "num_keys", "half_dim", "first_slot", "num_slots", "out_start", "out_width")

STEP = {"WEIGHTED": True, "TILE": 64}
VARIANTS = [
    *((bags.weighted_sum_kernel, {"WEIGHTED": weighted, "TILE": 256}) for weighted in (True, False)),
    (bags.gather_rows_kernel, {"TILE": 256}),
    (bags.scatter_rows_kernel, {"TILE": 1}),
    (bags.weight_gradient_kernel, {"TILE": 256}),
    *((updates.segment_sum_kernel, {"WEIGHTED": weighted, "TILE": 128}) for weighted in (True, False)),
    *((updates.step_kernel, STEP | {"ALGORITHM": name, "FUSED": fused})
      for name in ("sgd", "adagrad", "rowwise_adagrad", "adam") for fused in (True, False)),
    (updates.squared_norm_kernel, {"TILE": 1024, "CHUNK": 1 << 16}),
    *((topk.select_kernel, {"SOURCE": source, "ROWS": 4, "CHUNK": 1024}) for source in ("scores", "grid", "ranks")),
    (topk.product_scores_kernel, {"QUERY_TILE": 16, "KEY_TILE": 64}),
    (topk.flat_scores_kernel, {"QUERY_TILE": 16, "KEY_TILE": 64}),
]  # fmt: skip


def signature(kernel, constants, stored):
    """Types of a kernel's arguments, which bear the same names in all kernels."""
    types = {}
    for name in kernel.arg_names:
        if name in constants:
            types[name] = "constexpr"
        elif name in FLOATS:
            types[name] = "fp32"
        elif name in INTEGERS:
            types[name] = "i32"
        elif name == "rows" or (
            kernel in (bags.gather_rows_kernel, bags.scatter_rows_kernel) and name in ("out", "values")
        ):
            types[name] = stored
        elif name == "source" and constants["SOURCE"] == "ranks":
            types[name] = "*i64"
        else:
            types[name] = POINTERS.get(name, "*fp32")
    return types


def main():
    try:
        subprocess.run([get_ptxas(90).path, "--version"], check=True, capture_output=True)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"no ptxas: {error}")
        return 3
    for kernel, constants in VARIANTS:
        for stored in ("*fp32", "*i16") if "rows" in kernel.arg_names else ("*fp32",):
            source = ASTSource(kernel, signature(kernel, constants, stored), constants)
            compiled = triton.compile(source, target=GPUTarget("cuda", 90, 32), options=STRICT)
            # Strict kernels must hold no fused multiply-add but those inside divisions and square roots.
            fused = sum(".f32" in line and "fma.rn" in line for line in compiled.asm["ptx"].splitlines())
            print(f"{kernel.__name__} {stored} {len(compiled.asm['cubin'])} {fused}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
