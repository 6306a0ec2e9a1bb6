"""The product of queries and keys, tile by tile: a register kernel in vector instructions, and the packing it reads.

A score is one chain of fused multiply-adds from zero, in the order of the key dimension. It depends on its query and
its key alone: not on the batch, nor on where in a tile either stands, nor on the machine's vectors. Tiles that are not
full are padded with zeros, so that the same code runs everywhere.

Queries are packed in groups of TILE_QUERIES, [group, dim, TILE_QUERIES], keys in panels of TILE_KEYS,
[panel, dim, TILE_KEYS].
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import numba.extending as typed_extending
import numpy as np
from llvmlite import binding, ir
from numba.core import cgutils as typed_cgutils
from numba.core import types as typed_types

from mempool.kernels.cpu.elements import load
from mempool.kernels.cpu.runtime import Array, serial

# Numba's type stubs leave out most of what is used here.
extending: Any = typed_extending
cgutils: Any = typed_cgutils
types: Any = typed_types

FLOAT = ir.FloatType()
_INDEX = ir.IntType(64)


def _tile_of_this_machine() -> tuple[int, int]:
    """Queries of a tile and lanes of a vector, for as many accumulators as the machine has registers for."""
    features = binding.get_host_cpu_features()
    if features.get("avx512f"):
        return 8, 16
    return (6, 8) if features.get("avx") else (8, 4)


TILE_QUERIES, _LANES = _tile_of_this_machine()
TILE_KEYS = 2 * _LANES
_VECTOR = ir.VectorType(FLOAT, _LANES)


class Code:
    """The arguments of a function in vector instructions, and the steps that such functions share.

    Attributes:
        builder: Emits one instruction a call.
        args: The arguments' values.
    """

    def __init__(self, context: Any, builder: Any, kinds: Any, args: Any) -> None:
        self.builder = builder
        self.args = args
        self.nothing = context.get_dummy_value()
        self._context = context
        self._kinds = kinds

    def pointer(self, array: int, start: int | None = None) -> Any:
        """To the element of the one-dimensional array, argument ``array``, that argument ``start`` numbers, or 0."""
        data = self._context.make_array(self._kinds[array])(self._context, self.builder, self.args[array]).data
        return data if start is None else self.builder.gep(data, [self.args[start]])

    def at(self, pointer: Any, place: int) -> Any:
        """The pointer, ``place`` elements on."""
        return self.builder.gep(pointer, [ir.Constant(_INDEX, place)]) if place else pointer

    def load(self, pointer: Any, element: Any, lanes: int) -> Any:
        """A vector from anywhere."""
        value = self.builder.load(self.builder.bitcast(pointer, ir.VectorType(element, lanes).as_pointer()))
        value.align = 4
        return value

    def store(self, value: Any, pointer: Any) -> None:
        """A vector to anywhere."""
        self.builder.store(value, self.builder.bitcast(pointer, value.type.as_pointer())).align = 4

    def splat(self, value: Any, lanes: int) -> Any:
        """A vector whose lanes all hold ``value``."""
        vector = ir.VectorType(value.type, lanes)
        one = self.builder.insert_element(ir.Constant(vector, ir.Undefined), value, ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), lanes), [0] * lanes)
        return self.builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


def vector_code(signature: Callable[..., Any]) -> Callable[[Callable[[Code], Any]], Any]:
    """Make a function for kernels from one that emits its code.

    Args:
        signature: From the types of the arguments to the signature.
    """

    def make(emit: Callable[[Code], Any]) -> Any:
        def typed(typingctx, *kinds):  # type: ignore[no-untyped-def]  # noqa: ARG001 - Numba's convention
            return signature(*kinds), lambda context, builder, sig, args: emit(Code(context, builder, sig.args, args))

        typed.__name__, typed.__doc__ = emit.__name__, emit.__doc__
        # Numba matches arguments with parameters by their names, and knows no *kinds.
        parameters = [inspect.Parameter("typingctx", inspect.Parameter.POSITIONAL_OR_KEYWORD)]
        parameters += inspect.signature(signature).parameters.values()
        typed.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        return extending.intrinsic(typed)

    return make


@vector_code(
    lambda queries, _start, keys, _keys_start, _dims, out, _out_start, _stride: types.void(
        queries, types.intp, keys, types.intp, types.intp, out, types.intp, types.intp
    )
)
def tile_scores(code: Code) -> Any:
    """Scores of one group of queries and one panel of keys.

    Args:
        queries: Flat float32, packed; the group begins at ``queries_start``.
        queries_start: Of the group.
        keys: Flat float32, packed; the panel begins at ``keys_start``.
        keys_start: Of the panel.
        num_dims: D.
        out: Flat float32; score (query, key) goes to ``out_start + query * out_stride + key``.
        out_start: As above.
        out_stride: As above.
    """
    builder, num_dims, out_stride = code.builder, code.args[4], code.args[7]
    queries, keys, out = code.pointer(0, 1), code.pointer(2, 3), code.pointer(5, 6)
    fused = cgutils.get_or_insert_function(
        builder.module, ir.FunctionType(_VECTOR, [_VECTOR] * 3), f"llvm.fma.v{_LANES}f32"
    )
    before = builder.basic_block
    body, after = builder.append_basic_block("dims"), builder.append_basic_block("summed")
    builder.cbranch(builder.icmp_signed(">", num_dims, ir.Constant(_INDEX, 0)), body, after)

    builder.position_at_end(body)
    dim = builder.phi(_INDEX)
    totals = [builder.phi(_VECTOR) for _ in range(2 * TILE_QUERIES)]
    panel = builder.gep(keys, [builder.mul(dim, ir.Constant(_INDEX, TILE_KEYS))])
    group = builder.gep(queries, [builder.mul(dim, ir.Constant(_INDEX, TILE_QUERIES))])
    halves = [code.load(code.at(panel, half * _LANES), FLOAT, _LANES) for half in range(2)]
    sums = []
    for query in range(TILE_QUERIES):
        element = code.splat(builder.load(code.at(group, query)), _LANES)
        sums += [builder.call(fused, [element, halves[half], totals[2 * query + half]]) for half in range(2)]
    following = builder.add(dim, ir.Constant(_INDEX, 1))
    for phi, first, value in zip([dim, *totals], [0, *[[0.0] * _LANES] * len(totals)], [following, *sums], strict=True):
        phi.add_incoming(ir.Constant(phi.type, first), before)
        phi.add_incoming(value, body)
    builder.cbranch(builder.icmp_signed("<", following, num_dims), body, after)

    builder.position_at_end(after)
    for place, value in enumerate(sums):
        score = builder.phi(_VECTOR)
        score.add_incoming(ir.Constant(_VECTOR, [0.0] * _LANES), before)
        score.add_incoming(value, body)
        sums[place] = score
    for query in range(TILE_QUERIES):
        row = builder.gep(out, [builder.mul(out_stride, ir.Constant(_INDEX, query))])
        for half in range(2):
            code.store(sums[2 * query + half], code.at(row, half * _LANES))
    return code.nothing


@vector_code(lambda scores, limits, _start: types.boolean(scores, limits, types.intp))
def tile_reaches(code: Code) -> Any:
    """Whether any score of a tile is at least its query's limit; where either is NaN it is not.

    Args:
        scores: The tile, flat float32, TILE_KEYS a query.
        limits: Flat float32; those of the tile's queries begin at ``start``.
        start: As above.
    """
    builder, scores, limits = code.builder, code.pointer(0), code.pointer(1, 2)
    found = ir.Constant(ir.VectorType(ir.IntType(1), _LANES), [0] * _LANES)
    for query in range(TILE_QUERIES):
        least = code.splat(builder.load(code.at(limits, query)), _LANES)
        for half in range(2):
            values = code.load(code.at(scores, query * TILE_KEYS + half * _LANES), FLOAT, _LANES)
            found = builder.or_(found, builder.fcmp_ordered(">=", values, least))
    word = builder.bitcast(found, ir.IntType(_LANES))
    return builder.icmp_unsigned("!=", word, ir.Constant(word.type, 0))


@vector_code(lambda scores, _start, _limit: types.uint64(scores, types.intp, types.float32))
def keys_reaching(code: Code) -> Any:
    """Which of one query's scores of a tile are at least a limit: a bit for each key, in uint64.

    Args:
        scores: The tile, flat float32; the query's scores begin at ``start``.
        start: As above.
        limit: float32.
    """
    values = code.load(code.pointer(0, 1), FLOAT, TILE_KEYS)
    reached = code.builder.fcmp_ordered(">=", values, code.splat(code.args[2], TILE_KEYS))
    return code.builder.zext(code.builder.bitcast(reached, ir.IntType(TILE_KEYS)), ir.IntType(64))


@vector_code(
    lambda source, _start, _scale, total, _total_start, _count: types.void(
        source, types.intp, types.float32, total, types.intp, types.intp
    )
)
def add_scaled(code: Code) -> Any:
    """``total[i] = total[i] + scale * source[i]``, product and sum rounded apart.

    Args:
        source: Flat float32, from ``start``.
        start: As above.
        scale: float32.
        total: Flat float32, from ``total_start``; not the same memory.
        total_start: As above.
        count: How many.
    """
    builder, count = code.builder, code.args[5]
    source, total, scale = code.pointer(0, 1), code.pointer(3, 4), code.args[2]
    whole = builder.and_(count, ir.Constant(_INDEX, -16))
    scales = code.splat(scale, 16)
    with cgutils.for_range_slice(builder, ir.Constant(_INDEX, 0), whole, ir.Constant(_INDEX, 16)) as (place, _):
        into = builder.gep(total, [place])
        value = code.load(builder.gep(source, [place]), FLOAT, 16)
        code.store(builder.fadd(code.load(into, FLOAT, 16), builder.fmul(scales, value)), into)
    with cgutils.for_range_slice(builder, whole, count, ir.Constant(_INDEX, 1)) as (place, _):
        into = builder.gep(total, [place])
        value = builder.load(builder.gep(source, [place]))
        builder.store(builder.fadd(builder.load(into), builder.fmul(scale, value)), into)
    return code.nothing


@serial
def pack(
    rows: Array, row: int, num_rows: int, first_dim: int, num_dims: int, width: int, out: Array, out_start: int
) -> None:
    """Pack rows, of ``num_dims`` columns from ``first_dim``, as [dim, width]: row ``i`` from ``out[out_start + i]``."""
    for place in range(num_rows):
        for dim in range(num_dims):
            out[out_start + dim * width + place] = load(rows[row + place, first_dim + dim])


@serial
def fill_up(num_rows: int, num_dims: int, width: int, out: Array, out_start: int) -> None:
    """Zeros in the places of rows that a group or panel at ``out_start`` lacks."""
    for dim in range(num_dims):
        for place in range(num_rows, width):
            out[out_start + dim * width + place] = np.float32(0)
