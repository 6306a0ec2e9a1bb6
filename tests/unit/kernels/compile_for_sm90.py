"""Compiles every Triton kernel for a Hopper GPU on a machine without one; run as a script, prints a line of JSON each.

    python compile_for_sm90.py ELEMENT:WIDTH ...    # what reads and steps such rows; the rest in any case

The package's own functions are called with tensors on the CPU, and what they would launch is compiled in place of
being run: with the constants, the options and the alignment of arguments that a launch on a GPU has.
"""

import functools
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

import torch
import triton
from triton import knobs
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, make_backend
from triton.runtime.jit import JITFunction, create_function_from_signature

from mempool import kernels
from mempool.kernels import DenseSchedule, OptimizerStep, PackedLayout, Paged, RandomRounding, SortedPairs

TARGET = GPUTarget("cuda", 90, 32)
NUM_BAGS, PAIRS_OF_A_BAG, NUM_ROWS = 64, 32, 4096
OPTIONS = [("sgd_momentum", {"momentum": 0.9, "nesterov": True}), ("rowwise_adam", {"l2": True, "corrected_eps": True})]


class Compiler:
    """Takes the place of launches: compiles each distinct one and prints what came out."""

    def __init__(self, cuobjdump):
        self.cuobjdump = cuobjdump
        self.case = ""
        self.backend = make_backend(TARGET)
        self.seen = set()

    def launch(self, kernel, *args, grid, warmup, **options):  # noqa: ARG002 - as JITFunction.run has it
        binder = create_function_from_signature(kernel.signature, kernel.params, self.backend)
        bound, specialization, _ = binder(*args, **options)
        parsed, signature, constants, attributes = kernel._pack_args(self.backend, options, bound, specialization, None)
        source = ASTSource(kernel, signature, constants, attributes)
        key = (source.hash(), str(parsed))
        if key not in self.seen:
            self.seen.add(key)
            compiled = triton.compile(source, target=TARGET, options=parsed.__dict__)
            self.report(kernel, compiled, parsed)

    def report(self, kernel, compiled, options):
        ptx = compiled.asm["ptx"]
        # Bytes of each access to global memory, by how many there are.
        widths = {"load": {}, "store": {}}
        for name, vector, bits in re.findall(r"\b(ld|st)\.global\S*?(?:\.v(\d))?\.[bfsu](\d+)", ptx):
            size, by_size = int(vector or 1) * int(bits) // 8, widths["load" if name == "ld" else "store"]
            by_size[size] = by_size.get(size, 0) + 1
        line = {"case": self.case, "kernel": kernel.__name__, "warps": options.num_warps, **widths}
        line["strict"] = not options.enable_fp_fusion
        # Strict kernels must hold no fused multiply-add but those inside divisions and square roots.
        line["fused"] = sum(".f32" in text and "fma.rn" in text for text in ptx.splitlines())
        line |= self.registers(compiled.asm["cubin"])
        print(json.dumps(line), flush=True)

    def registers(self, cubin):
        """Registers of a thread, and bytes of its stack: what did not fit into registers, as no kernel has arrays."""
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "kernel.cubin"
            path.write_bytes(cubin)
            command = [self.cuobjdump, "-res-usage", str(path)]
            said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        found = re.search(r"REG:(\d+) STACK:(\d+)", said)
        return {"registers": int(found.group(1)), "spilled": int(found.group(2))}


def make_case(width, element, block_dim):
    packed = PackedLayout(element, width, block_dim) if element in ("int8", "float8_e4m3fn") else None
    if packed is None:
        rows = torch.zeros(NUM_ROWS, width, dtype=getattr(torch, element))
    else:
        rows = torch.zeros(NUM_ROWS, packed.row_bytes, dtype=torch.uint8)
    paged = Paged(rows, torch.arange(NUM_ROWS >> 6, dtype=torch.int32), 6, packed)
    num_pairs = NUM_BAGS * PAIRS_OF_A_BAG
    ids = torch.arange(num_pairs)
    offsets = torch.arange(0, num_pairs + 1, PAIRS_OF_A_BAG)
    bags = torch.repeat_interleave(torch.arange(NUM_BAGS), PAIRS_OF_A_BAG)
    pairs = SortedPairs(order=ids, rows=ids, slots=ids, starts=torch.arange(num_pairs + 1))
    return paged, ids, torch.ones(num_pairs), offsets, bags, torch.ones(NUM_BAGS, width), pairs


def make_state(algorithm, width, block_dim):
    shapes = {name: -(-width // block_dim) if name in kernels.BLOCK_STATE else width
              for name in kernels.STATE_NAMES[algorithm]}  # fmt: skip
    return {name: torch.zeros(NUM_ROWS, columns) for name, columns in shapes.items()}


def read(triton_kernels, width, element, block_dim, weighted=True, dtype=torch.float32):
    paged, ids, weights, offsets, _, grads, _ = make_case(width, element, block_dim)
    triton_kernels.weighted_sum(paged, ids.int(), weights if weighted else None, offsets, dtype)
    triton_kernels.weight_gradient(paged, ids.int(), offsets, grads)
    triton_kernels.gather_rows(paged, ids, paged.value_dtype)


def step(triton_kernels, width, element, block_dim, algorithm, randomly=False, mastered=False, fused=True, **options):
    paged, _, weights, _, bags, grads, pairs = make_case(width, element, block_dim)
    columns = torch.zeros(kernels.num_blocks(width, block_dim), dtype=torch.int64)
    rounding = RandomRounding(RandomRounding.key_of(seed=1, table=2, step=3), columns) if randomly else None
    one = OptimizerStep(algorithm, lr=0.1, block_dim=block_dim, rounding=rounding, **options)
    state = make_state(algorithm, width, block_dim)
    if mastered:
        state[kernels.MASTER] = torch.zeros(NUM_ROWS, width)
    if fused:
        triton_kernels.fused_step(paged, state, pairs, weights, bags, grads, one)
    else:
        triton_kernels.optimizer_step(paged, state, pairs, torch.zeros(pairs.rows.numel(), width), one)


def others(triton_kernels):
    """What is not about stored elements, or is so with one of them."""
    paged, ids, weights, _, bags, grads, pairs = make_case(256, "float32", 64)
    triton_kernels.sort_pairs(paged, ids.int())
    sys.modules["mempool.kernels.gpu.bags"].sort_pairs = lambda *_: pairs  # without a launch nothing was sorted
    triton_kernels.scatter_rows(paged, ids, torch.zeros(ids.numel(), 256))
    sums = triton_kernels.segment_sum(pairs, weights, bags, grads)
    triton_kernels.add_segments(sums, ids, pairs, weights, bags, grads)
    triton_kernels.squared_norm(sums)
    state = make_state("adamw", 256, 64) | {kernels.LAST_STEP: torch.zeros(NUM_ROWS, 4, dtype=torch.int32)}
    schedule = DenseSchedule(first_step=1, beta1=0.9, beta2=0.99, eps=1e-8, weight_decay=0.1)
    schedule.append(0.1)
    triton_kernels.catch_up(paged, state, ids, schedule, 1, 64)
    for packed in ("int8", "float8_e4m3fn"):
        paged, ids, *_ = make_case(256, packed, 64)
        triton_kernels.catch_up(paged, state | {kernels.MASTER: torch.zeros(NUM_ROWS, 256)}, ids, schedule, 1, 64)
        triton_kernels.scatter_rows(paged, ids, torch.zeros(ids.numel(), 256))


def scores(triton_kernels):
    queries, keys = torch.zeros(64, 4, 256), torch.zeros(4, 2, 1024, 128)
    for deterministic in (True, False):
        triton_kernels.product_topk(queries, keys, 32, deterministic)
        for element in ("float32", "bfloat16"):
            paged = make_case(64, element, 64)[0]
            triton_kernels.flat_topk(torch.zeros(64, 64), paged, 32, NUM_ROWS, deterministic)


def not_written(*shape, dtype=torch.float32, device=None):  # noqa: ARG001
    """What no kernel has written, but the functions that launched them read: ranks of the first place, or zeros."""
    return torch.full(
        shape[0] if isinstance(shape[0], tuple) else shape, -1 if dtype == torch.int64 else 0, dtype=dtype
    )


def cases(rows):
    """Name, function and arguments of every case."""
    for element, width in rows:
        block_dim = 64 if width <= 1024 else width // 4
        name = f"{element} {width}"
        yield name, read, (width, element, block_dim)
        yield name, step, (width, element, block_dim, "rowwise_adagrad", True)
    for element in ("float32", "bfloat16", "int8"):
        yield f"{element} 1024", step, (1024, element, 64, "adam")
    for element in ("bfloat16", "int8"):
        yield "odd", read, (100, element, 36, False, torch.bfloat16)
        yield "odd", step, (100, element, 36, "sgd", True)
    for algorithm in kernels.ALGORITHMS:
        yield algorithm, step, (256, "bfloat16", 64, algorithm, False, True, False)
    for algorithm, options in OPTIONS:
        one_step = functools.partial(step, weight_decay=0.1, max_norm=1.0, **options)
        yield f"{algorithm} {options}", one_step, (256, "bfloat16", 256, algorithm, True)
    yield "others", others, ()
    yield "scores", scores, ()


def main():
    try:
        tools = [knobs.nvidia.ptxas.path, knobs.nvidia.cuobjdump.path]
        for tool in tools:
            subprocess.run([tool, "--version"], check=True, capture_output=True)
    except (OSError, RuntimeError, subprocess.CalledProcessError) as error:
        print(f"no ptxas or cuobjdump: {error}")
        return 3
    compiler = Compiler(tools[1])
    JITFunction.run = lambda kernel, *args, **options: compiler.launch(kernel, *args, **options)
    torch.empty = not_written
    triton_kernels = kernels.implementation("triton")
    rows = [(element, int(width)) for element, _, width in (argument.partition(":") for argument in sys.argv[1:])]
    for case, function, arguments in cases(rows):
        compiler.case = case
        function(triton_kernels, *arguments)
    return 0


if __name__ == "__main__":
    sys.exit(main())
