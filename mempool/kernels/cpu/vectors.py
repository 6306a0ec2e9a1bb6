"""Loops over the rows of an arena as explicit vector code, where the compiler's own choice is slower.

A tile is a range of columns whose sums stay in registers while a list of rows goes by. Every column has its own chain
of additions, so tiles of any width give the same bits. Functions here are made for a number of vectors of 16 columns,
or for one of fewer; the compiler splits a vector where registers are narrower.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numba as typed_numba
from llvmlite import ir
from numba.core import cgutils as typed_cgutils
from numba.core import types as typed_types
from numba.extending import intrinsic

from mempool.kernels.cpu.runtime import converts_halves

numba: Any = typed_numba
types: Any = typed_types
cgutils: Any = typed_cgutils

LANES = 16
#: Bytes that one prefetch brings.
_LINE = 64
_FLOAT, _HALF = ir.FloatType(), ir.HalfType()
_I8, _I16, _I32, _I64 = (ir.IntType(bits) for bits in (8, 16, 32, 64))
# Vectors that share a scale.
_GROUP = 4


def _int(number: int) -> Any:
    return ir.Constant(_I64, number)


def _vector(element: Any, lanes: int = LANES) -> Any:
    return ir.VectorType(element, lanes)


def _all(element: Any, value: Any, lanes: int = LANES) -> Any:
    return ir.Constant(_vector(element, lanes), [value] * lanes)


def _splat(builder: Any, value: Any, lanes: int) -> Any:
    nothing = ir.Constant(_vector(_FLOAT, lanes), ir.Undefined)
    vector = builder.insert_element(nothing, value, ir.Constant(_I32, 0))
    return builder.shuffle_vector(vector, nothing, _all(_I32, 0, lanes))


def _pick(builder: Any, left: Any, right: Any, places: list[int]) -> Any:
    return builder.shuffle_vector(left, right, ir.Constant(_vector(_I32, len(places)), places))


def _load(builder: Any, address: Any, kind: Any, align: int = 1) -> Any:
    return builder.load(builder.inttoptr(address, ir.PointerType(kind)), align=align)


def _store(builder: Any, address: Any, value: Any) -> None:
    builder.store(value, builder.inttoptr(address, ir.PointerType(value.type)), align=4)


def _prefetch(builder: Any, address: Any) -> None:
    # Into the second level, as runtime.prefetch_line: it waits for many more lines at a time than the first one's few
    # buffers do, and one core reads rows of 1 KiB at twice the speed.
    pointer = ir.PointerType(_I8)
    function = builder.module.declare_intrinsic(
        "llvm.prefetch", (pointer,), ir.FunctionType(ir.VoidType(), [pointer, _I32, _I32, _I32])
    )
    read, second_level, data = (ir.Constant(_I32, number) for number in (0, 2, 1))
    builder.call(function, [builder.inttoptr(address, pointer), read, second_level, data])


def _bytes(builder: Any, address: Any, count: int) -> Any:
    return builder.add(address, _int(count)) if count else address


def _load_tile(builder: Any, element: Any, address: Any, vectors: int, lanes: int) -> list[Any]:
    """The tile's stored elements as float32 vectors; of bfloat16, a pair of vectors holds even and odd columns."""
    floats, numbers = _vector(_FLOAT, lanes), _vector(_I32, lanes)
    if element == types.float32:
        return [_load(builder, _bytes(builder, address, 64 * place), floats, 4) for place in range(vectors)]
    if element == types.uint16 and vectors % 2 == 0:
        tile = []
        for place in range(0, vectors, 2):
            both = _load(builder, _bytes(builder, address, 32 * place), numbers, 2)
            even = builder.shl(both, _all(_I32, 16))
            odd = builder.and_(both, _all(_I32, 0xFFFF0000))
            tile += [builder.bitcast(even, floats), builder.bitcast(odd, floats)]
        return tile
    if element == types.uint16:
        loads = [
            _load(builder, _bytes(builder, address, 32 * place), _vector(_I16, lanes), 2) for place in range(vectors)
        ]
        wide = [builder.shl(builder.zext(part, numbers), _all(_I32, 16, lanes)) for part in loads]
        return [builder.bitcast(part, floats) for part in wide]
    loads = [_load(builder, _bytes(builder, address, LANES * place), _vector(_I8, lanes)) for place in range(vectors)]
    if element == types.int8:
        return [builder.sitofp(builder.sext(part, numbers), floats) for part in loads]
    return [_from_float8(builder, part, lanes) for part in loads]


def _from_float8(builder: Any, codes: Any, lanes: int) -> Any:
    floats, numbers = _vector(_FLOAT, lanes), _vector(_I32, lanes)
    if converts_halves():
        # float16 has one exponent bit more, of bias 15 in place of 7: the number comes out divided by 2**8.
        bits = builder.shl(builder.sext(codes, _vector(_I16, lanes)), _all(_I16, 7, lanes))
        half = builder.bitcast(builder.and_(bits, _all(_I16, 0xBF80, lanes)), _vector(_HALF, lanes))
        return builder.fmul(builder.fpext(half, floats), _all(_FLOAT, 256.0, lanes))
    # As elements.load does: below 2**-6 numbers lie evenly; above, exponent and mantissa follow.
    bits = builder.zext(codes, numbers)
    magnitude = builder.and_(bits, _all(_I32, 0x7F, lanes))
    normal = builder.add(builder.shl(magnitude, _all(_I32, 20, lanes)), _all(_I32, (127 - 7) << 23, lanes))
    even = builder.bitcast(builder.fmul(builder.sitofp(magnitude, floats), _all(_FLOAT, 2.0**-9, lanes)), numbers)
    number = builder.select(builder.icmp_unsigned("<", magnitude, _all(_I32, 8, lanes)), even, normal)
    sign = builder.shl(builder.and_(bits, _all(_I32, 0x80, lanes)), _all(_I32, 24, lanes))
    return builder.bitcast(builder.or_(number, sign), floats)


def _load_columns(builder: Any, address: Any, source: _Rows) -> list[Any]:
    """Float32 columns in the order in which _load_tile brings the stored ones."""
    floats, vectors = _vector(_FLOAT, source.lanes), source.vectors
    plain = [_load(builder, _bytes(builder, address, 64 * place), floats, 4) for place in range(vectors)]
    if not source.interleaved:
        return plain
    even, odd = list(range(0, 32, 2)), list(range(1, 32, 2))
    return [
        _pick(builder, plain[place - place % 2], plain[place - place % 2 + 1], odd if place % 2 else even)
        for place in range(vectors)
    ]


def _store_columns(builder: Any, address: Any, tile: list[Any], interleaved: bool) -> None:
    if interleaved:
        low = [place // 2 + (LANES if place % 2 else 0) for place in range(LANES)]
        high = [place + LANES // 2 for place in low]
        tile = [
            _pick(builder, tile[place - place % 2], tile[place - place % 2 + 1], high if place % 2 else low)
            for place in range(len(tile))
        ]
    for place, vector in enumerate(tile):
        _store(builder, _bytes(builder, address, 64 * place), vector)


class _Loop:
    """for index in range(count), with vectors carried from turn to turn."""

    def __init__(self, builder: Any, count: Any, carried: list[Any]) -> None:
        self._builder = builder
        before = builder.block
        self._body, self._end = builder.append_basic_block("rows"), builder.append_basic_block("rows.end")
        builder.cbranch(builder.icmp_signed(">", count, _int(0)), self._body, self._end)
        builder.position_at_end(self._body)
        self._count, self._first = count, carried
        self.index = builder.phi(_I64)
        self.index.add_incoming(_int(0), before)
        self.carried = [builder.phi(value.type) for value in carried]
        for phi, value in zip(self.carried, carried, strict=True):
            phi.add_incoming(value, before)
        self._before = before

    def close(self, carried: list[Any]) -> list[Any]:
        builder = self._builder
        following = builder.add(self.index, _int(1))
        self.index.add_incoming(following, builder.block)
        for phi, value in zip(self.carried, carried, strict=True):
            phi.add_incoming(value, builder.block)
        last = builder.block
        builder.cbranch(builder.icmp_signed("<", following, self._count), self._body, self._end)
        builder.position_at_end(self._end)
        results = []
        for before, after in zip(self._first, carried, strict=True):
            phi = builder.phi(before.type)
            phi.add_incoming(before, self._before)
            phi.add_incoming(after, last)
            results.append(phi)
        return results


@dataclass(frozen=True, slots=True)
class _Rows:
    """Where listed rows lie, and the tile of columns that is read of them, as values of the code being built."""

    builder: Any
    element: Any
    vectors: int
    lanes: int
    start: Any
    row_bytes: Any
    listed: Any
    column: Any
    scales_start: Any
    block_dim: Any

    @classmethod
    def of(cls, context: Any, builder: Any, columns: int, kinds: Any, args: Any) -> _Rows:
        """From the arguments rows, scales_start, block_dim, listed, first, ..., column at their places."""
        rows = context.make_array(kinds[0])(context, builder, args[0])
        listed = builder.add(_data(context, builder, kinds[3], args[3]), builder.shl(args[4], _int(3)))
        return cls(
            builder=builder,
            element=kinds[0].dtype,
            vectors=max(1, columns // LANES),
            lanes=min(columns, LANES),
            start=builder.ptrtoint(rows.data, _I64),
            row_bytes=builder.extract_value(rows.strides, 0),
            listed=listed,
            column=args[7],
            scales_start=args[1],
            block_dim=args[2],
        )

    @property
    def packed(self) -> bool:
        return bool(self.element.bitwidth == 8)

    @property
    def interleaved(self) -> bool:
        return bool(self.element == types.uint16 and self.vectors % 2 == 0)

    def row(self, place: Any) -> Any:
        """Address of the row at a place of the list."""
        builder = self.builder
        number = _load(builder, builder.add(self.listed, builder.shl(place, _int(3))), _I64, 8)
        return builder.add(self.start, builder.mul(number, self.row_bytes))

    def tile(self, row: Any, column: Any) -> Any:
        """Address of the tile that begins at a column."""
        return self.builder.add(row, self.builder.mul(column, _int(self.element.bitwidth // 8)))

    def scale_places(self, column: Any) -> list[Any]:
        """Byte of a row at which the scale of each four vectors lies."""
        builder, places = self.builder, []
        for group in range(0, self.vectors, _GROUP):
            block = builder.sdiv(builder.add(column, _int(group * LANES)), self.block_dim)
            places.append(builder.add(self.scales_start, builder.shl(block, _int(2))))
        return places

    def prefetch(self, place: Any, count: Any, next_column: Any, back: Any) -> None:
        """Prefetch the tile of the row at a place; from ``count`` on, ``next_column``'s of the row ``back`` before."""
        builder = self.builder
        beyond = builder.icmp_signed(">=", place, count)
        row = self.row(builder.select(beyond, builder.sub(place, back), place))
        column = builder.select(beyond, next_column, self.column)
        start = self.tile(row, column)
        for line in range(0, self.vectors * self.lanes * self.element.bitwidth // 8, _LINE):
            _prefetch(builder, _bytes(builder, start, line))
        if self.packed:
            _prefetch(builder, builder.add(row, self.scales_start))

    def load(self, row: Any) -> list[Any]:
        """The tile of a row, as float32 vectors."""
        return _load_tile(self.builder, self.element, self.tile(row, self.column), self.vectors, self.lanes)


def _data(context: Any, builder: Any, kind: Any, value: Any) -> Any:
    return builder.ptrtoint(context.make_array(kind)(context, builder, value).data, _I64)


def sum_tile(columns: int) -> Callable[..., None]:
    """Make a function that adds weighted rows to a tile of so many columns: 8, or vectors of 16.

    ``acc[column:] += weights[i] * row listed[i]``, pair after pair, product and sum rounded as one, i from ``first`` to
    ``first + count``. Its arguments:

        rows: [R, ...] stored elements.
        scales_start: Byte of a packed row at which its scales lie.
        block_dim: Columns of a block of packed rows; each four vectors lie in one block.
        listed: [n] int64 rows, readable up to ``first + count + ahead``.
        first, count: Which of the list.
        ahead: How many rows ahead to prefetch.
        column: First column of the tile.
        next_column: The column that will be read of the rows listed next.
        back: How far before ``first + count`` those are in the list.
        weights: [n] float32.
        fresh: Start from zeros, not from ``acc``.
        acc: [W] float32.
    """

    @intrinsic
    def add(  # type: ignore[no-untyped-def]
        typingctx,  # noqa: ARG001
        rows,
        scales_start,  # noqa: ARG001
        block_dim,  # noqa: ARG001
        listed,
        first,  # noqa: ARG001
        count,  # noqa: ARG001
        ahead,  # noqa: ARG001
        column,  # noqa: ARG001
        next_column,  # noqa: ARG001
        back,  # noqa: ARG001
        weights,
        fresh,  # noqa: ARG001
        acc,
    ):
        whole = types.int64
        signature = types.void(rows, whole, whole, listed, *[whole] * 6, weights, types.boolean, acc)

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            kinds = signature.args
            source = _Rows.of(context, builder, columns, kinds, args)
            first, count, ahead, column, next_column, back = args[4:10]
            weights = builder.add(_data(context, builder, kinds[10], args[10]), builder.shl(first, _int(2)))
            acc = builder.add(_data(context, builder, kinds[12], args[12]), builder.shl(column, _int(2)))
            scale_places = source.scale_places(column) if source.packed else []
            sums = _fresh_or_loaded(builder, args[11], acc, source)
            loop = _Loop(builder, count, sums)
            source.prefetch(builder.add(loop.index, ahead), count, next_column, back)
            row = source.row(loop.index)
            weight = _load(builder, builder.add(weights, builder.shl(loop.index, _int(2))), _FLOAT, 4)
            factors = [_splat(builder, weight, source.lanes)]
            if source.packed:
                numbers = [_load(builder, builder.add(row, place), _FLOAT, 4) for place in scale_places]
                factors = [_splat(builder, builder.fmul(weight, number), source.lanes) for number in numbers]
            sums = [
                _add_products(builder, factors[place // _GROUP % len(factors)], value, total)
                for place, (total, value) in enumerate(zip(loop.carried, source.load(row), strict=True))
            ]
            _store_columns(builder, acc, loop.close(sums), source.interleaved)
            return context.get_dummy_value()

        return signature, codegen

    return add


def _fresh_or_loaded(builder: Any, fresh: Any, acc: Any, source: _Rows) -> list[Any]:
    zeros, loads, start = (builder.append_basic_block(name) for name in ("zeros", "loads", "start"))
    builder.cbranch(builder.icmp_unsigned("!=", fresh, ir.Constant(fresh.type, 0)), zeros, loads)
    builder.position_at_end(loads)
    loaded = _load_columns(builder, acc, source)
    builder.branch(start)
    builder.position_at_end(zeros)
    builder.branch(start)
    builder.position_at_end(start)
    sums = []
    for value in loaded:
        phi = builder.phi(value.type)
        phi.add_incoming(value, loads)
        phi.add_incoming(_all(_FLOAT, 0.0, source.lanes), zeros)
        sums.append(phi)
    return sums


def _add_products(builder: Any, left: Any, right: Any, total: Any) -> Any:
    # Rounded once, in hardware or in software: the same bits on every processor.
    kind = ir.FunctionType(total.type, [total.type] * 3)
    function = cgutils.get_or_insert_function(builder.module, kind, f"llvm.fma.v{total.type.count}f32")
    return builder.call(function, [left, right, total])


def _add_product(typingctx: Any, left: Any, right: Any, total: Any) -> Any:  # noqa: ARG001
    """``left * right + total`` of float32 numbers, rounded once."""

    def codegen(context: Any, builder: Any, signature: Any, args: Any) -> Any:  # noqa: ARG001
        kind = ir.FunctionType(_FLOAT, [_FLOAT, _FLOAT, _FLOAT])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.fma.f32"), args)

    one = types.float32
    return one(one, one, one), codegen


add_product: Any = intrinsic(_add_product)


def _sum_of_lanes(builder: Any, vector: Any) -> Any:
    lanes = vector.type.count
    while lanes > 1:
        lanes //= 2
        halves = (_pick(builder, vector, vector, [first + lane for lane in range(lanes)]) for first in (0, lanes))
        vector = builder.fadd(*halves)
    return builder.extract_element(vector, ir.Constant(_I32, 0))


def dot_tile(columns: int) -> Callable[..., None]:
    """Make a function that multiplies a tile of rows with a gradient: ``results[i] += <grad[column:], row listed[i]>``.

    The order of the sum is fixed by the tiles. Arguments as in sum_tile up to ``back``, then:

        fresh: Write ``results`` rather than add to them.
        grad: [W] float32.
        results: [n] float32, by place in the list.
    """

    @intrinsic
    def multiply(  # type: ignore[no-untyped-def]
        typingctx,  # noqa: ARG001
        rows,
        scales_start,  # noqa: ARG001
        block_dim,  # noqa: ARG001
        listed,
        first,  # noqa: ARG001
        count,  # noqa: ARG001
        ahead,  # noqa: ARG001
        column,  # noqa: ARG001
        next_column,  # noqa: ARG001
        back,  # noqa: ARG001
        fresh,  # noqa: ARG001
        grad,
        results,
    ):
        whole = types.int64
        signature = types.void(rows, whole, whole, listed, *[whole] * 6, types.boolean, grad, results)

        def codegen(context, builder, signature, args):  # type: ignore[no-untyped-def]
            kinds = signature.args
            source = _Rows.of(context, builder, columns, kinds, args)
            first, count, ahead, column, next_column, back = args[4:10]
            fresh = builder.icmp_unsigned("!=", args[10], ir.Constant(args[10].type, 0))
            grad = builder.add(_data(context, builder, kinds[11], args[11]), builder.shl(column, _int(2)))
            results = builder.add(_data(context, builder, kinds[12], args[12]), builder.shl(first, _int(2)))
            scale_places = source.scale_places(column) if source.packed else []
            gradient = _load_columns(builder, grad, source)
            loop = _Loop(builder, count, [])
            source.prefetch(builder.add(loop.index, ahead), count, next_column, back)
            row = source.row(loop.index)
            chains = [_all(_FLOAT, 0.0, source.lanes)] * min(_GROUP, source.vectors)
            tile = source.load(row)
            for start in range(0, source.vectors, _GROUP):
                group = range(start, min(start + _GROUP, source.vectors))
                if source.packed:
                    number = _load(builder, builder.add(row, scale_places[start // _GROUP]), _FLOAT, 4)
                    scale = _splat(builder, number, source.lanes)
                    for place in group:
                        tile[place] = builder.fmul(tile[place], scale)
                for place in group:
                    chains[place - start] = _add_products(builder, tile[place], gradient[place], chains[place - start])
            while len(chains) > 1:
                half = len(chains) // 2
                chains = [builder.fadd(chains[place], chains[place + half]) for place in range(half)]
            total = _sum_of_lanes(builder, chains[0])
            target = builder.add(results, builder.shl(loop.index, _int(2)))
            before = builder.select(fresh, ir.Constant(_FLOAT, 0.0), _load(builder, target, _FLOAT, 4))
            _store(builder, target, builder.fadd(before, total))
            loop.close([])
            return context.get_dummy_value()

        return signature, codegen

    return multiply
