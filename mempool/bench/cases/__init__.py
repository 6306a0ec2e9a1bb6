"""Which cases there are: every size of every dimension is covered, one dimension at a time around the headline."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial

from mempool.bench.cases import bags, commits, experts, scoring
from mempool.bench.cases.case import FAMILIES, OWN, Case, Prepared
from mempool.bench.cases.inputs import Tables, TableSpec, bags_for
from mempool.kernels import ALGORITHMS, BLOCK_STATE, ELEMENTS, STATE_NAMES, Algorithm, Element

__all__ = ["FAMILIES", "OWN", "Case", "Prepared", "Tables", "Workload", "all_cases"]

_GIB = 1 << 30
_BLOCKS = 4


@dataclass(frozen=True)
class Workload:
    """Sizes that a device is measured at.

    Attributes:
        num_slots: Tables' slots, the headline's first.
        value_dims: Columns, the headline's first.
        bag_sizes: Pairs of a bag, the headline's first.
        forward_bytes: What a case's bags read of float32 rows: several times the last cache.
        most_bytes: What a table and its state may take; a larger table gets fewer slots, or is left out.
        product_queries: Queries that score product keys.
        product_keys: Half-keys of a codebook, the headline's first.
        half_dim: Dim of a half-key.
        flat: Slots, dim and queries of flat keys, the headline's first.
        copy_bytes: Of the tensor that is copied for the machine's bandwidth.
        product_size: Of the square product.
        topk: Winners.
        heads: Of the queries of product keys.
        expert_dim: Columns of a row that is an expert, u and v together.
    """

    num_slots: tuple[int, ...]
    value_dims: tuple[int, ...]
    bag_sizes: tuple[int, ...]
    forward_bytes: int
    most_bytes: int
    product_queries: int
    product_keys: tuple[int, ...]
    half_dim: int
    flat: tuple[tuple[int, int, int], ...]
    copy_bytes: int
    product_size: int
    topk: int = 32
    heads: int = 4
    expert_dim: int = 1024

    @classmethod
    def of(cls, device_type: str, memory_bytes: int) -> Workload:
        """The sizes of a device.

        Args:
            device_type: "cpu" or "cuda".
            memory_bytes: What it has; no table with its state takes more than a fifth of it (two fifths on a GPU).
        """
        if device_type == "cuda":
            return cls(
                num_slots=(1 << 24, 1 << 20, 1 << 18),
                value_dims=(1024, 64, 256, 4096),
                bag_sizes=(128, 32),
                forward_bytes=2 * _GIB,
                most_bytes=memory_bytes * 2 // 5,
                product_queries=1 << 14,
                product_keys=(1024, 512),
                half_dim=128,
                flat=((1 << 20, 64, 256), (1 << 18, 64, 256), (1 << 18, 256, 256)),
                copy_bytes=2 * _GIB,
                product_size=8192,
            )
        return cls(
            num_slots=(1 << 20, 1 << 18),
            value_dims=(256, 64, 1024, 4096),
            bag_sizes=(128, 32),
            forward_bytes=1 << 27,
            most_bytes=min(5 * _GIB, memory_bytes // 5),
            product_queries=1 << 12,
            product_keys=(1024, 512),
            half_dim=128,
            flat=((1 << 18, 64, 256), (1 << 20, 64, 256), (1 << 18, 256, 256)),
            copy_bytes=1 << 27,
            product_size=1024,
        )


@dataclass(frozen=True)
class _Size:
    num_slots: int
    value_dim: int
    bag_size: int
    ids: str


def all_cases(workload: Workload, tables: Tables, skipped: Callable[[str], None]) -> list[Case]:
    """Every case of a workload, those on one table together.

    Args:
        workload: Sizes.
        tables: Where the cases' tensors come from.
        skipped: Told of what is left out or made smaller, and why.
    """
    plan = _Plan(workload, tables, skipped)
    found = {case.name: case for case in (*plan.reading(), *plan.changing(), *plan.experts(), *plan.scoring())}
    order = {family: place for place, family in enumerate(FAMILIES)}
    return sorted(found.values(), key=lambda case: (*case.table_order, order[case.family]))


class _Plan:
    """Makes the cases of a workload."""

    def __init__(self, workload: Workload, tables: Tables, skipped: Callable[[str], None]) -> None:
        self._workload, self._tables, self._skipped = workload, tables, skipped
        slots, dims, bag_sizes = workload.num_slots, workload.value_dims, workload.bag_sizes
        self._headline = _Size(slots[0], dims[0], bag_sizes[0], "uniform")
        self._zipf = replace(self._headline, ids="zipf")
        self._sizes = [
            self._headline,
            self._zipf,
            *(replace(self._headline, num_slots=num_slots) for num_slots in slots[1:]),
            *(replace(self._headline, value_dim=value_dim) for value_dim in dims[1:]),
            *(replace(self._headline, bag_size=bag_size) for bag_size in bag_sizes[1:]),
        ]

    def reading(self) -> Iterator[Case]:
        """Cases that change nothing."""
        for element in ELEMENTS:
            for size in self._sizes:
                yield from self._forward(size, element)
        for element in ("float32", "bfloat16", "int8"):
            for size in (self._headline, self._zipf):
                yield from self._on_table("rows", element, size, element, self._rows)
                yield from self._on_table("weight-gradient", element, size, element, self._weight_gradient)
        for element in ("float8_e4m3fn", "int8"):
            yield from self._forward(self._headline, element, _BLOCKS)
        what = f"float32 in {_BLOCKS} blocks of a shard"
        yield from self._on_table("forward", what, self._headline, "float32", self._forward_of_shard)

    def changing(self) -> Iterator[Case]:
        """Cases with an optimizer."""
        for algorithm in ALGORITHMS:
            for size in (self._headline, self._zipf):
                yield from self._commit(size, algorithm, "float32")
        for algorithm in ("sgd", "rowwise_adagrad"):
            yield from self._commit(self._headline, algorithm, "bfloat16")
        for size in self._sizes:
            for algorithm in ("adagrad", "rowwise_adagrad"):
                yield from self._update(size, algorithm)

    def experts(self) -> Iterator[Case]:
        """Cases of rows that are experts: of the smallest table, and four times the tokens of the others' bags."""
        size = _Size(self._workload.num_slots[-1], self._workload.expert_dim, self._workload.bag_sizes[0], "uniform")

        def of_sums(spec: TableSpec, size: _Size) -> Prepared:
            return experts.sums(self._tables, spec, 4 * self._num_bags(size), size.bag_size, size.ids)

        def of_update(spec: TableSpec, size: _Size) -> Prepared:
            return experts.update(self._tables, spec, 4 * self._num_bags(size), size.bag_size, size.ids)

        for case in (
            *self._on_table("experts", "gelu", size, "float32", of_sums),
            *self._on_table("experts-update", "adagrad", size, "float32", of_update, size.value_dim),
        ):
            yield replace(case, headline=True)

    def scoring(self) -> Iterator[Case]:
        """Cases with keys."""
        work, tables = self._workload, self._tables
        for place, num_keys in enumerate(work.product_keys):
            numbers = (num_keys, work.half_dim, work.topk, work.product_queries, work.heads)
            for family, prepare in (
                ("product-topk", scoring.product_topk),
                ("product-gradient", scoring.product_gradient),
            ):
                yield Case(
                    family=family,
                    what=f"{work.product_queries * work.heads} head-queries",
                    num_slots=num_keys,
                    value_dim=work.half_dim,
                    bag_size=work.topk,
                    ids="uniform",
                    headline=place == 0,
                    prepare=partial(prepare, tables, *numbers),
                )
        for place, (num_slots, dim, num_queries) in enumerate(work.flat):
            yield Case(
                family="flat-topk",
                what=f"{num_queries} queries",
                num_slots=num_slots,
                value_dim=dim,
                bag_size=work.topk,
                ids="uniform",
                headline=place == 0,
                prepare=partial(scoring.flat_topk, tables, TableSpec(num_slots, dim), work.topk, num_queries),
            )

    def _forward(self, size: _Size, element: Element, num_blocks: int = 1) -> Iterator[Case]:
        what = element if num_blocks == 1 else f"{element} in {num_blocks} blocks"

        def prepare(spec: TableSpec, size: _Size) -> Prepared:
            cut = spec if spec.layout is None else replace(spec, block_dim=size.value_dim // num_blocks)
            wide = replace(spec, element="float32")
            beside = wide if wide.num_bytes <= self._workload.most_bytes else None
            return bags.forward(self._tables, cut, self._num_bags(size), size.bag_size, size.ids, beside)

        yield from self._on_table("forward", what, size, element, prepare)

    def _forward_of_shard(self, spec: TableSpec, size: _Size) -> Prepared:
        return bags.forward_of_shard(self._tables, spec, _BLOCKS, self._num_bags(size), size.bag_size, size.ids)

    def _rows(self, spec: TableSpec, size: _Size) -> Prepared:
        return bags.rows(self._tables, spec, self._num_bags(size) * size.bag_size, size.ids)

    def _weight_gradient(self, spec: TableSpec, size: _Size) -> Prepared:
        return bags.weight_gradient(self._tables, spec, self._num_bags(size), size.bag_size, size.ids)

    def _commit(self, size: _Size, algorithm: Algorithm, element: Element) -> Iterator[Case]:
        def prepare(spec: TableSpec, size: _Size) -> Prepared:
            return commits.commit(self._tables, spec, algorithm, self._num_bags(size), size.bag_size, size.ids)

        what = algorithm if element == "float32" else f"{algorithm} stochastic {element}"
        yield from self._on_table("commit", what, size, element, prepare, _state_dims(algorithm, size.value_dim))

    def _update(self, size: _Size, algorithm: Algorithm) -> Iterator[Case]:
        def prepare(spec: TableSpec, size: _Size) -> Prepared:
            return commits.update(self._tables, spec, algorithm, self._num_bags(size), size.bag_size, size.ids)

        yield from self._on_table("update", algorithm, size, "float32", prepare, _state_dims(algorithm, size.value_dim))

    def _num_bags(self, size: _Size) -> int:
        return bags_for(size.value_dim, size.bag_size, self._workload.forward_bytes)

    def _on_table(
        self,
        family: str,
        what: str,
        size: _Size,
        element: Element,
        prepare: Callable[[TableSpec, _Size], Prepared],
        state_dims: int = 0,
    ) -> Iterator[Case]:
        """A case on the table of a size, with fewer slots where it would take too much; none where none fits."""
        spec = self._fitting(f"{family} {what}", size, element, state_dims)
        if spec is not None:
            yield Case(
                family=family,
                what=what,
                num_slots=spec.num_slots,
                value_dim=size.value_dim,
                bag_size=0 if family == "rows" else size.bag_size,
                ids=size.ids,
                headline=size == self._headline,
                prepare=partial(prepare, spec, size),
            )

    def _fitting(self, what: str, size: _Size, element: Element, state_dims: int) -> TableSpec | None:
        most = self._workload.most_bytes
        problem = f"{what} of {size.num_slots} x {size.value_dim} takes more than the {most / _GIB:.1f} GiB of a case"
        for num_slots in sorted(self._workload.num_slots, reverse=True):
            spec = TableSpec(num_slots, size.value_dim, element)
            if num_slots <= size.num_slots and spec.num_bytes + num_slots * state_dims * 4 <= most:
                if num_slots < size.num_slots:
                    self._skipped(f"{problem}: {num_slots} slots instead")
                return spec
        self._skipped(f"{problem} with any number of slots: left out")
        return None


def _state_dims(algorithm: Algorithm, value_dim: int) -> int:
    return sum(1 if name in BLOCK_STATE else value_dim for name in STATE_NAMES[algorithm])
