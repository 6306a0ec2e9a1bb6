"""Sets the twins up on one table of a pool, trains them side by side, and gathers what `report.py` prints."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import nn

import mempool
from facts.data import FactBook
from facts.flops import Flops, dense_flops, memory_flops, shared_flops, twin_hidden
from facts.model import FLAT, DenseBlock, FactModel, ModelSize, memory_block, share_start
from facts.report import ModelReport, PoolReport
from facts.rescale import LiveRescale, RescaleReport
from facts.text import AnswerSpelling, WordBook
from facts.train import Contestant, Score, TrainConfig, batches, contestant, evaluate, train
from facts.usage import SlotsInUse
from mempool import optim

_COUNTED_QUESTIONS = 1000


@dataclass(frozen=True, slots=True)
class _PoolState:
    """What the pool and this client's table had counted at one moment."""

    shards: int
    committed: int
    applied: dict[int, int]


class Race:
    """Two models, one table, one book of facts.

    Args:
        book: what to learn.
        pool: where the table is.
        table: holds the memory's values; its number of slots is a square, where it has no keys.
        config: how to train.
        size: widths of both models.
        reinit_dead: half way, let slots that were never used begin anew from used ones; of a table that counts uses.

    Attributes:
        steps_done: where `run` begins: 0, or where a race that was saved is gone on from.
        spent_s: seconds that the parts of `run` took, once it has ended.
    """

    def __init__(
        self,
        book: FactBook,
        *,
        pool: mempool.Pool,
        table: mempool.Table,
        config: TrainConfig,
        size: ModelSize | None = None,
        reinit_dead: bool = False,
    ) -> None:
        self.book, self.pool, self.table, self.config = book, pool, table, config
        self.size = size or (FLAT if table.trains_keys else ModelSize())
        self.in_use = SlotsInUse(table, reinit_dead=reinit_dead, seed=config.seed) if table.schema.usage else None
        self.steps_done = 0
        self.spent_s: dict[str, float] = {}
        self.word_book = WordBook.from_facts(book)
        self.spelling = AnswerSpelling(fact.answer for fact in book.facts)
        self.num_steps = config.num_epochs(len(book.facts)) * config.steps_per_epoch(len(book.facts))
        torch.manual_seed(config.seed)
        layer = memory_block(table, size=self.size)
        self._memory_flops = memory_flops(
            self.size,
            codebook_size=layer.codebook_size,
            value_dim=table.value_dim,
            flat_keys=table.num_slots if table.trains_keys else 0,
        )
        hidden = twin_hidden(self.size, self._memory_flops)
        memory_model = self._model(layer)
        dense_model = self._model(DenseBlock(self.size.dim, hidden=hidden))
        share_start(memory_model, dense_model)
        tables = optim.PoolOptimizer(memory_model, lr=config.table_lr)
        for group in tables.param_groups[1:]:  # of keys in the pool, which have their own
            group["lr"] = table.keys.schema.optimizer.lr
        self.memory = contestant("memory", memory_model, lr=config.memory_lr, num_steps=self.num_steps, tables=tables)
        self.dense = contestant("dense", dense_model, lr=config.dense_lr, num_steps=self.num_steps)
        self._dense_flops = dense_flops(self.size, hidden=hidden)

    def run(
        self,
        *,
        rescale: LiveRescale | None,
        on_step: Callable[[int], None],
        on_evaluation: Callable[[], None],
    ) -> tuple[ModelReport, ModelReport, PoolReport]:
        """Trains both models, rescaling the pool half way, and scores them.

        Args:
            rescale: started after half of the steps; training does not wait for it.
            on_step: called after each step with the number of steps done.
            on_evaluation: called when training is over.

        Returns:
            Reports of the memory model, of the dense twin, and of the pool.

        Raises:
            RescaleFailed: if the rescale failed.
            MempoolError: what the pool raises.
        """
        before = self._pool_state()

        def after_step(step: int) -> None:
            if rescale is not None and not rescale.started and step >= self.num_steps // 2:
                rescale.start()
            if self.in_use is not None and step == self.num_steps // 2:
                self.in_use.half_way()
            on_step(step)

        start_s = time.perf_counter()
        examples = batches(self.book, word_book=self.word_book, spelling=self.spelling, config=self.config)
        train([self.memory, self.dense], examples=examples, on_step=after_step, done=self.steps_done)
        train_s = time.perf_counter() - start_s
        on_evaluation()
        start_s = time.perf_counter()
        if rescale is not None and not rescale.started:  # no step was left
            rescale.start()
        rescaled = None if rescale is None else rescale.finish(steps=self.memory.steps)
        wait_s = time.perf_counter() - start_s
        start_s = time.perf_counter()
        memory_scores = self._scores(self.memory)
        read_s = time.perf_counter() - start_s
        memory = self._model_report(self.memory, memory_scores, layer=self._memory_flops, tables=[self.table])
        dense = self._model_report(self.dense, self._scores(self.dense), layer=self._dense_flops, tables=[])
        self.spent_s = {
            "training the memory": self.memory.train_s,
            "training its dense twin": self.dense.train_s,
            "writing questions, drawing the bar": train_s - self.memory.train_s - self.dense.train_s,
            "waiting for the rescale's end": wait_s,
            "asking every fact": time.perf_counter() - start_s,
        }
        return memory, dense, self._pool_report(before, rescaled, read_s=read_s, scores=memory_scores)

    def _model(self, block: nn.Module) -> FactModel:
        return FactModel(self.word_book, self.spelling, block=block, size=self.size)

    def _scores(self, contestant: Contestant) -> tuple[Score, Score | None]:
        """In trained and, where there are any, in unseen phrasings."""
        trained, unseen = (
            evaluate(
                contestant.model,
                self.book,
                word_book=self.word_book,
                spelling=self.spelling,
                unseen=unseen,
                seed=self.config.seed,
            )
            if self.book.has_unseen or not unseen
            else None
            for unseen in (False, True)
        )
        assert trained is not None, "trained phrasings always exist"
        return trained, unseen

    def _model_report(
        self, contestant: Contestant, scores: tuple[Score, Score | None], *, layer: Flops, tables: list[mempool.Table]
    ) -> ModelReport:
        questions = [self.book.trained_question(i, choice=i) for i in range(len(self.book.facts))][:_COUNTED_QUESTIONS]
        words_BW = self.word_book.encode(questions)
        shared = shared_flops(
            self.size,
            num_words=round(float((words_BW != 0).sum(dim=1).float().mean())),
            num_outputs=self.spelling.num_positions * self.spelling.num_codes,
        )
        return ModelReport(
            trained=scores[0],
            unseen=scores[1],
            learning_rate=contestant.learning_rate,
            trainer_parameters=sum(parameter.numel() for parameter in contestant.model.parameters()),
            pool_parameters=sum(table.num_slots * table.value_dim for table in tables),
            layer_flops=layer,
            flops=shared + layer,
            train_s=contestant.train_s,
        )

    def _pool_report(
        self,
        before: _PoolState,
        rescaled: RescaleReport | None,
        *,
        read_s: float,
        scores: tuple[Score, Score | None],
    ) -> PoolReport:
        after = self._pool_state()
        # A shard that came by a rescale took the count of applied updates over with the pages it got.
        base = max(before.applied.values(), default=0)
        lookups = self.memory.questions
        read_lookups = sum(score.asked.total() for score in scores if score is not None)
        return PoolReport(
            name=self.pool.name,
            num_slots=self.table.num_slots,
            value_dim=self.table.value_dim,
            shards_before=before.shards,
            shards_after=after.shards,
            lookups=lookups,
            lookups_per_s=lookups / self.memory.train_s if lookups else 0.0,
            read_lookups=read_lookups,
            read_lookups_per_s=read_lookups / read_s,
            updates_committed=after.committed - before.committed,
            updates_applied={shard: applied - base for shard, applied in after.applied.items()},
            rescale=rescaled,
            in_use=None if self.in_use is None else self.in_use.report(),
        )

    def _pool_state(self) -> _PoolState:
        status = self.pool.status()
        applied = {
            shard.info.shard: table.updates_applied
            for shard in status.shards
            for table in shard.tables
            if table.name == self.table.name and table.pages
        }
        return _PoolState(len(status.shards), self.table.counters.updates_committed, applied)
