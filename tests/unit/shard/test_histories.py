"""Any history of lookups, updates, steps and moves, with repeats, equals one process with torch's own optimizer.

A state machine of Hypothesis drives three engines; the oracle is float64 training of the same table.
"""

import itertools
from typing import Any

import numpy as np
import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule
from torch import Tensor

from mempool.errors import ContextMissing
from mempool.shard import Engine
from mempool.types import FlatKeySpec, OptimizerSpec, ShardInfo
from mempool.wire.channels.loop import run
from tests.contract.bags import Bags, make_bags, reference_sums, relative_error
from tests.contract.driver import Driver, Hosted, make_schema
from tests.contract.oracle import Oracle

NUM_SHARDS = 3
LEASE_S = 3600.0
"""What is held stays, however slow the machine is: a history has no time in it."""
ALGORITHMS = ("sgd", "adagrad", "rowwise_adagrad", "adam", "adamw", "dense adamw", "rowwise_adam")

_table_ids = itertools.count(1)

owners = st.one_of(
    st.lists(st.lists(st.integers(0, NUM_SHARDS - 1), min_size=3, max_size=3), min_size=7, max_size=7),
    # Whole tables, rows and columns are what placements are made of; anything goes must be right too.
    st.integers(0, NUM_SHARDS - 1).map(lambda shard: [[shard] * 3] * 7),
    st.lists(st.integers(0, NUM_SHARDS - 1), min_size=3, max_size=3).map(lambda row: [row] * 7),
    st.lists(st.integers(0, NUM_SHARDS - 1), min_size=7, max_size=7).map(lambda rows: [[shard] * 3 for shard in rows]),
)
seeds = st.integers(0, 10**6)


class Histories(RuleBasedStateMachine):
    """One trainer, one table."""

    def __init__(self) -> None:
        super().__init__()
        self.engines: list[Engine] = []
        for shard in range(NUM_SHARDS):
            info = ShardInfo(shard=shard, address="", incarnation=1)
            self.engines.append(Engine(info, peers=lambda source: self.engines[source.shard], held_lease_s=LEASE_S))
        hosted = [Hosted(host=engine, info=engine.info) for engine in self.engines]
        self.driver = Driver(hosted, table_id=next(_table_ids))
        self.lookups: list[tuple[int, Bags]] = []
        self.pending: dict[int, tuple[Bags, Tensor]] = {}
        self.prepared: tuple[int, ...] | None = None
        self.step = 1
        self.sequences = itertools.count()
        self.last_commit: tuple[int, tuple[int, ...]] | None = None
        self.applied = 0
        self.version = self.last_version = 0

    def teardown(self) -> None:
        for engine in self.engines:
            run(engine.close(), timeout_s=20)

    @initialize(placement=owners, algorithm=st.sampled_from(ALGORITHMS), flat=st.booleans())
    def create(self, placement: list[list[int]], algorithm: Any, flat: bool) -> None:
        dense = algorithm == "dense adamw"
        spec = OptimizerSpec(algorithm="adamw" if dense else algorithm, lr=0.1, eps=1e-6, weight_decay=0.1, dense=dense)
        schema = make_schema(optimizer=spec, keys=FlatKeySpec(key_dim=3) if flat else None)
        self.driver.create(schema, placement)
        self.keys = self.driver.read("keys") if flat else None
        self.oracle = Oracle(schema, self.driver.read())

    @rule(seed=seeds, lengths=st.lists(st.integers(0, 6), max_size=4), weighted=st.booleans())
    def lookup(self, seed: int, lengths: list[int], weighted: bool) -> None:
        bags = make_bags(seed, lengths=lengths, weighted=weighted)
        sums = self.driver.gather(bags)
        assert relative_error(sums, reference_sums(self.oracle.values.detach(), bags)) < 1e-4
        self.lookups.append((self.driver.lookup_id, bags))

    @precondition(lambda self: self.lookups and self.prepared is None)
    @rule(data=st.data(), seed=seeds)
    def update(self, data: st.DataObject, seed: int) -> None:
        lookup_id, bags = data.draw(st.sampled_from(self.lookups), label="lookup")
        grads = torch.randn(bags.num_bags, 10, generator=torch.Generator().manual_seed(seed))
        sequence = next(self.sequences)
        self.pending[sequence] = (bags, grads)
        self.driver.lookup_id = lookup_id
        weight_grad = self._push(sequence)
        expected = torch.zeros(bags.ids.shape[0], dtype=torch.float64)
        for bag in range(bags.num_bags):
            span = slice(int(bags.offsets[bag]), int(bags.offsets[bag + 1]))
            expected[span] = self.oracle.values.detach()[bags.ids[span]] @ grads[bag].double()
        assert relative_error(weight_grad, expected) < 1e-4

    @precondition(lambda self: self.pending)
    @rule(data=st.data())
    def repeat_update(self, data: st.DataObject) -> None:
        self._push(data.draw(st.sampled_from(sorted(self.pending)), label="sequence"), resend=True)

    @precondition(lambda self: self.pending)
    @rule(want_norm=st.booleans())
    def prepare(self, want_norm: bool) -> None:
        sequences = tuple(self.pending)
        for shard, reply in self.driver.prepare(self.step, sequences, want_norm=want_norm).items():
            assert set(reply.missing) <= set(sequences)
            for sequence in reply.missing:
                bags, grads = self.pending[sequence]
                request = self.driver.update_request(shard, self.step, sequence, grads, bags=bags)
                self.driver.call(self.driver.host(shard).update(request))
        replies = self.driver.prepare(self.step, sequences, want_norm=want_norm).values()
        assert all(reply.missing == () and not reply.applied for reply in replies)
        self.prepared = sequences
        if want_norm:
            gradient = torch.zeros(50, 10, dtype=torch.float64)
            for bags, grads in self.pending.values():
                weights = torch.ones(bags.ids.shape[0]) if bags.weights is None else bags.weights
                bag_of_pair = torch.repeat_interleave(torch.arange(bags.num_bags), bags.offsets.diff())
                gradient.index_add_(0, bags.ids, (weights[:, None] * grads[bag_of_pair]).double())
            norm = sum(reply.squared_norm for reply in replies)
            assert abs(norm - float(gradient.square().sum())) <= 1e-4 * max(1.0, norm)

    @precondition(lambda self: self.prepared is not None)
    @rule(lr=st.sampled_from([0.0, 0.05, 0.3]), grad_scale=st.sampled_from([1.0, 0.125]))
    def commit(self, lr: float, grad_scale: float) -> None:
        assert self.prepared is not None
        for reply in self.driver.commit(self.step, self.prepared, lr=lr, grad_scale=grad_scale).values():
            assert reply.version == self.version + 1
        self._applied(self.prepared, lr, grad_scale)

    @precondition(lambda self: self.pending and self.prepared is None and len(self.driver.owners) == 1)
    @rule(lr=st.sampled_from([0.05, 0.3]))
    def commit_in_one(self, lr: float) -> None:
        (shard,) = self.driver.owners
        sequences = tuple(self.pending)
        request = self.driver.commit_request(shard, self.step, sequences, lr=lr, one_phase=True)
        (reply,) = self.driver.call(self.driver.host(shard).commit(request)).parts
        if reply.version:
            self._applied(sequences, lr, 1.0)
        else:
            assert reply.missing
            for sequence in reply.missing:
                self._push(sequence, resend=True)

    @precondition(lambda self: self.last_commit is not None)
    @rule(lr=st.sampled_from([0.3, 0.7]), one_phase=st.booleans())
    def repeat_commit(self, lr: float, one_phase: bool) -> None:
        assert self.last_commit is not None
        step, sequences = self.last_commit
        for reply in self.driver.commit(step, sequences, lr=lr, one_phase=one_phase).values():
            assert (reply.version, reply.missing) == (self.last_version, ())

    @rule()
    def discard(self) -> None:
        self.driver.discard(self.step)
        self.pending.clear()
        self.prepared = None
        self.step += 1

    @precondition(lambda self: self.prepared is None)
    @rule(placement=owners)
    def move(self, placement: list[list[int]]) -> None:
        moved = (np.array(placement) != self.driver.placed.placement.owners).sum()
        assert self.driver.move(placement) == moved

    @precondition(lambda self: self.prepared is None)
    @rule(placement=owners)
    def move_in_vain(self, placement: list[list[int]]) -> None:
        token = f"in vain {next(_table_ids)}"
        for shard in self.driver.owners:
            self.driver.freeze(shard, token=token)
        target = self.driver.make_view(self.driver.schema, placement, epoch=self.driver.placed.placement.epoch + 1)
        for dest, request in self.driver.pulls(target):
            self.driver.call(self.driver.host(dest).pull_pages(request))
        for shard in range(NUM_SHARDS):
            self.driver.thaw(shard, token="")

    @invariant()
    def nothing_is_lost_or_doubled(self) -> None:
        if self.driver.view is None:
            return
        pages = 0
        for shard in range(NUM_SHARDS):
            status = self.driver.status(shard)
            pages += status.pages
            if shard in self.driver.owners:
                assert (status.version, status.updates_applied) == (self.version, self.applied)
                assert status.updates_held <= len(self.pending)
        assert pages == 21
        assert relative_error(self.driver.read(), self.oracle.values) < 1e-4
        if self.keys is not None:
            assert torch.equal(self.driver.read("keys"), self.keys)

    @invariant()
    def no_room_is_leaked(self) -> None:
        if self.driver.view is None:
            assert not any(engine._tenancy._tables for engine in self.engines)
            return
        # First the statuses: they come when what was acknowledged is applied, and what has moved is given back.
        updates_held = sum(self.driver.status(shard).updates_held for shard in range(NUM_SHARDS))
        for engine in self.engines:
            for table in engine._tenancy.tables.values():
                for arena in table.storage.arenas.values():
                    assert arena.num_taken == int((arena.page_of >= 0).sum()) > 0
        assert (sum(engine._budget.held_bytes for engine in self.engines) == 0) == (updates_held == 0)

    def _push(self, sequence: int, *, resend: bool = False) -> Tensor:
        bags, grads = self.pending[sequence]
        if not resend:
            try:
                return self.driver.update(self.step, sequence, grads)
            except ContextMissing:
                pass  # the pages moved since the lookup
        return self.driver.update(self.step, sequence, grads, bags=bags)

    def _applied(self, sequences: tuple[int, ...], lr: float, grad_scale: float) -> None:
        for sequence in sorted(sequences):
            self.oracle.backward(*self.pending[sequence])
        self.oracle.step(lr, grad_scale)
        self.last_commit = (self.step, sequences)
        self.last_version = self.version + 1
        self.applied += len(sequences)
        self.version += 1
        self.pending.clear()
        self.prepared = None
        self.step += 1


TestHistories = Histories.TestCase
TestHistories.settings = settings(
    max_examples=12, stateful_step_count=25, deadline=None, suppress_health_check=list(HealthCheck)
)
