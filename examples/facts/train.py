"""Trains both models on the same questions in the same order, and scores them by exact match.

The twins differ in one layer and in the optimizer that its values have in the pool; all else here is common to both.
"""

from __future__ import annotations

import itertools
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from facts.data import FactBook
from facts.model import FactModel, spelling_loss
from facts.text import AnswerSpelling, WordBook
from mempool import optim

_WARMUP_STEPS = 50
_MIN_STEPS = 400
_EVALUATION_BATCH = 1024


@dataclass(frozen=True, slots=True)
class TrainConfig:
    """How to train. Each model has the best of the learning rates that were tried for it.

    Exact match on 20,000 facts in unseen phrasings after 14 epochs, percent, all else as it stands here::

        dense twin     1e-3: 13.3   2e-3: 18.2   4e-3: 25.5   8e-3: 27.3   1.6e-2: 20.0   3.2e-2: 17.3
        memory         3e-4: 73.2   7e-4: 77.7   1.5e-3: 76.9   3e-3: 73.2   (values at 0.1)
        its values     0.1: 77.7   0.3: 81.0   1.0: 82.0   (memory at 7e-4); 0.3 with memory at 1e-3: 82.6

    Batch norm, which the memory's queries have, made the twin worse; so it has none.

    Attributes:
        epochs: times each fact is asked; None means 14, or more where facts are few.
        batch: questions per step at most; an epoch is cut into even steps.
        memory_lr: learning rate of the dense parts of the memory model, under Adam.
        dense_lr: the same of the dense twin.
        table_lr: learning rate of the values in the pool, under the table's own optimizer; None takes its own rate.
        drop_common: share of common words left out of the training questions.
        seed: of the models' start, and of the order and the wording of questions.
    """

    epochs: int | None = None
    batch: int = 512
    memory_lr: float = 1e-3
    dense_lr: float = 8e-3
    table_lr: float | None = 0.3
    drop_common: float = 0.1
    seed: int = 0

    def num_epochs(self, num_facts: int) -> int:
        """Epochs to train on so many facts."""
        return self.epochs or max(14, math.ceil(_MIN_STEPS / self.steps_per_epoch(num_facts)))

    def steps_per_epoch(self, num_facts: int) -> int:
        """Steps in which every fact is asked once."""
        return math.ceil(num_facts / self.batch)


@dataclass(frozen=True, slots=True)
class Batch:
    """One step's questions and answers.

    Attributes:
        words: [B, W] int64 word numbers.
        codes: [B, T] int64 characters of the answers.
    """

    words: Tensor
    codes: Tensor


@dataclass(frozen=True, slots=True)
class StepTime:
    """When a step began and ended, by `time.perf_counter`."""

    start_s: float
    end_s: float

    @property
    def seconds(self) -> float:
        """How long it took."""
        return self.end_s - self.start_s


@dataclass(slots=True)
class Contestant:
    """One of the two models in training, with its optimizers and its stopwatch.

    Attributes:
        name: for the report.
        model: what learns.
        optimizers: all stepped after each backward pass: Adam, and for the memory the `PoolOptimizer`.
        schedulers: one for each optimizer.
        steps: the times of its steps.
        loss: of the last step.
        questions: that it was trained on here.
    """

    name: str
    model: FactModel
    optimizers: list[torch.optim.Optimizer]
    schedulers: list[torch.optim.lr_scheduler.LRScheduler]
    steps: list[StepTime] = field(default_factory=list)
    loss: float = math.nan
    questions: int = 0

    @property
    def train_s(self) -> float:
        """Seconds spent in its steps."""
        return sum(step.seconds for step in self.steps)

    @property
    def learning_rate(self) -> float:
        """The rate its dense parts began with, after the warm-up."""
        return float(self.optimizers[0].defaults["lr"])

    def step(self, batch: Batch) -> None:
        """Forward, backward, and one step of every optimizer."""
        start_s = time.perf_counter()
        loss = spelling_loss(self.model(batch.words), batch.codes)
        for optimizer in self.optimizers:
            optimizer.zero_grad()
        loss.backward()  # type: ignore[no-untyped-call]
        for optimizer in self.optimizers:
            optimizer.step()
        for scheduler in self.schedulers:
            scheduler.step()
        self.loss = loss.item()
        self.questions += len(batch.codes)
        self.steps.append(StepTime(start_s, time.perf_counter()))


@dataclass(frozen=True, slots=True)
class Score:
    """Exact matches of one way to ask all facts.

    Attributes:
        right: answers equal to the fact's, character by character; by relation.
        asked: facts by relation.
    """

    right: Counter[str]
    asked: Counter[str]

    @property
    def exact_match(self) -> float:
        """Share of right answers, 0 to 1."""
        return self.right.total() / self.asked.total()

    def by_relation(self) -> dict[str, float]:
        """Share of right answers of each relation."""
        return {relation: self.right[relation] / asked for relation, asked in sorted(self.asked.items())}


def contestant(
    name: str, model: FactModel, *, lr: float, num_steps: int, tables: optim.PoolOptimizer | None = None
) -> Contestant:
    """A model with Adam, its rate warmed up and then lowered to 0; the rate of tables is lowered to a tenth."""
    adam = torch.optim.Adam(model.parameters(), lr=lr, betas=(0.9, 0.98), fused=True)
    schedulers: list[torch.optim.lr_scheduler.LRScheduler] = [
        torch.optim.lr_scheduler.LambdaLR(
            adam, lambda step: min(1.0, (step + 1) / _WARMUP_STEPS) * (1.0 - step / num_steps)
        )
    ]
    optimizers: list[torch.optim.Optimizer] = [adam]
    if tables is not None:
        optimizers.append(tables)
        schedulers.append(torch.optim.lr_scheduler.LambdaLR(tables, lambda step: 1.0 - 0.9 * step / num_steps))
    return Contestant(name, model, optimizers, schedulers)


def batches(book: FactBook, *, word_book: WordBook, spelling: AnswerSpelling, config: TrainConfig) -> Iterator[Batch]:
    """All training batches: every epoch asks every fact once, in a new order and a new trained phrasing."""
    generator = torch.Generator().manual_seed(config.seed)
    num_facts = len(book.facts)
    for _ in range(config.num_epochs(num_facts)):
        order = torch.randperm(num_facts, generator=generator).tolist()
        choices = torch.randint(1 << 30, (num_facts,), generator=generator).tolist()
        num_steps = config.steps_per_epoch(num_facts)
        for step in range(num_steps):
            asked = order[num_facts * step // num_steps : num_facts * (step + 1) // num_steps]
            questions = [book.trained_question(fact, choice=choices[fact]) for fact in asked]
            yield Batch(
                words=word_book.encode(questions, drop_common=config.drop_common, generator=generator),
                codes=spelling.encode([book.facts[fact].answer for fact in asked]),
            )


def train(
    contestants: list[Contestant],
    *,
    examples: Iterator[Batch],
    on_step: Callable[[int], None],
    done: int = 0,
) -> None:
    """Every batch goes through every contestant before the next one is drawn.

    Args:
        contestants: trained side by side.
        examples: the batches.
        on_step: called after each step with the number of steps done.
        done: steps that were done before: the first so many batches are drawn and left out.
    """
    for each in contestants:
        each.model.train()
    for step, batch in enumerate(itertools.islice(examples, done, None), start=done + 1):
        for each in contestants:
            each.step(batch)
        on_step(step)


@torch.no_grad()
def evaluate(
    model: FactModel, book: FactBook, *, word_book: WordBook, spelling: AnswerSpelling, unseen: bool, seed: int
) -> Score:
    """Asks every fact once and compares the spelled answers with the right ones.

    Args:
        model: put into eval mode.
        book: the facts.
        word_book: encodes the questions; no word is dropped.
        spelling: decodes the answers.
        unseen: ask in phrasings that training never showed, else in trained ones.
        seed: chooses each fact's phrasing.
    """
    model.eval()
    score = Score(right=Counter(), asked=Counter())
    ask = book.unseen_question if unseen else book.trained_question
    generator = torch.Generator().manual_seed(seed)
    choices = torch.randint(1 << 30, (len(book.facts),), generator=generator).tolist()
    for start in range(0, len(book.facts), _EVALUATION_BATCH):
        asked = range(start, min(start + _EVALUATION_BATCH, len(book.facts)))
        words_BW = word_book.encode([ask(fact, choice=choices[fact]) for fact in asked])
        answers = spelling.decode(model(words_BW).argmax(dim=-1))
        for fact, answer in zip(asked, answers, strict=True):
            relation = book.facts[fact].relation
            score.asked[relation] += 1
            score.right[relation] += answer == book.facts[fact].answer
    return score
