"""Teaches new facts to a trained model by several processes at once, one of them at half speed: sync, bounded, async.

    mempool up -f cluster/local.yaml
    python examples/teach_by_ranks.py --address localhost:7077              # two ranks
    python examples/teach_by_ranks.py --address localhost:7077 --slow 1     # none is slowed: how much two do beside one

One process first trains the model and its memory on half of the facts. The other half is taught to a copy of the memory
for each way to step together: all else of the model stays as it is, so that the memory alone is what ranks share.
Whoever is ready takes the next share of the questions; a sync step is one of all ranks. Printed: questions and steps a
second, and exact match on the new facts, in trained and in unseen phrasings.
"""

from __future__ import annotations

import argparse
import sys
import tempfile
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.table import Table as Lines

import mempool
from facts.data import FactBook, build_facts
from facts.model import FactModel, ModelSize, memory_block, spelling_loss
from facts.text import AnswerSpelling, WordBook
from facts.train import TrainConfig, batches, contestant, evaluate, train
from mempool import optim
from mempool.errors import MempoolError, NotFound
from mempool.types.groups.meeting import Consistency

NUM_SLOTS = 256**2
VALUE_DIM = 128
TABLE_LR = 0.3
STALENESS = 2


@dataclass(frozen=True, slots=True, kw_only=True)
class Lesson:
    """What the ranks of one way to step are told.

    Attributes:
        table: The copy of the memory that is taught.
        consistency: How its ranks step.
        slow: The speed of the last rank beside the others', above 0 and at most 1.
        shares: Of questions, in all; questions: in each.
    """

    address: str
    table: str
    consistency: Consistency
    ranks: int
    slow: float
    shares: int
    questions: int
    seed: int
    num_facts: int
    weights: Path


@dataclass(frozen=True, slots=True)
class Taught:
    """What came of it. taught_s: from the first step of the first rank to the last of the last."""

    lesson: Lesson
    shares: tuple[int, ...]
    taught_s: float
    trained: float
    unseen: float


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs the command line; answers the exit code: 0 ok, 1 failed (argparse ends with 2)."""
    options = _parser().parse_args(arguments)
    console = Console()
    try:
        with mempool.connect(options.address) as pool, tempfile.TemporaryDirectory() as folder:
            taught = teach_all(pool, options, weights=Path(folder, "model.pt"), console=console)
    except MempoolError as error:
        print(f"teach_by_ranks: {error}", file=sys.stderr)
        return 1
    lines = Lines("", "ranks", "questions/s", "shares by rank", "exact match", "unseen phrasings")
    for each in taught:
        lesson = each.lesson
        lines.add_row(
            f"bounded, {STALENESS}" if lesson.consistency == "bounded" else lesson.consistency,
            str(lesson.ranks),
            f"{lesson.shares * lesson.questions / each.taught_s:,.0f}",
            ", ".join(map(str, each.shares)),
            f"{each.trained:.1%}",
            f"{each.unseen:.1%}",
        )
    console.print(lines)
    return 0


def teach_all(pool: mempool.Pool, options: argparse.Namespace, *, weights: Path, console: Console) -> list[Taught]:
    """One process, then ranks in each way; every one from the same memory."""
    known, new = halves(options.num_facts, seed=options.seed)
    with mempool.local(shards=1) as here:
        model, table = _new_model(here, known, new)
        config = TrainConfig(epochs=options.epochs, batch=options.batch, seed=options.seed, table_lr=TABLE_LR)
        steps = config.num_epochs(len(known.facts)) * config.steps_per_epoch(len(known.facts))
        console.print(f"one process trains the model on {len(known.facts):,} facts, in {steps:,} steps")
        words, spelling = _books(known, new)
        tables = optim.PoolOptimizer(model, lr=config.table_lr)
        learner = contestant("memory", model, lr=config.memory_lr, num_steps=steps, tables=tables)
        train(
            [learner],
            examples=batches(known, word_book=words, spelling=spelling, config=config),
            on_step=lambda _: None,
        )
        own = {name: tensor for name, tensor in model.state_dict().items() if isinstance(tensor, torch.Tensor)}
        torch.save(own, weights)  # without what says of which version of that table it is
        values = table.rows(torch.arange(NUM_SLOTS))
    taught = []
    ways: list[tuple[Consistency, int]] = [
        ("sync", 1),
        ("sync", options.ranks),
        ("bounded", options.ranks),
        ("async", options.ranks),
    ]
    for consistency, ranks in ways:
        name = f"facts-{consistency}-{ranks}"
        memory = _empty_table(pool, name)
        memory.write(torch.arange(NUM_SLOTS), values)
        shares = ranks * round(options.teach_epochs * len(new.facts) / options.batch)
        lesson = Lesson(
            address=options.address,
            table=name,
            consistency=consistency,
            ranks=ranks,
            slow=options.slow if ranks > 1 else 1.0,
            shares=shares,
            questions=options.batch // ranks,
            seed=options.seed,
            num_facts=options.num_facts,
            weights=weights,
        )
        console.print(f"{consistency}: {ranks} rank{'s' * (ranks > 1)} teach {len(new.facts):,} new facts")
        taught.append(_taught(lesson, memory, new=new, known=known))
        pool.drop_table(name)
    return taught


def halves(num_facts: int, *, seed: int) -> tuple[FactBook, FactBook]:
    """The facts that the model is trained on, and those that ranks teach it."""
    book = build_facts(num_facts, seed=seed)
    return replace(book, facts=book.facts[::2]), replace(book, facts=book.facts[1::2])


def _taught(lesson: Lesson, memory: mempool.Table, *, new: FactBook, known: FactBook) -> Taught:
    context = get_context("spawn")
    taken, found = context.Value("q", 0), context.SimpleQueue()
    ready = context.Barrier(lesson.ranks)
    processes = [
        context.Process(target=teach, args=(lesson, rank, taken, ready, found), daemon=True)
        for rank in range(lesson.ranks)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
    if any(process.exitcode for process in processes):
        raise MempoolError(f"a rank of {lesson.table} has failed; it says why above")
    ended = sorted(found.get() for _ in processes)
    model = _loaded(memory, lesson.weights, known, new)
    words, spelling = _books(known, new)
    scores = [
        evaluate(model, new, word_book=words, spelling=spelling, unseen=unseen, seed=lesson.seed).exact_match
        for unseen in (False, True)
    ]
    taught_s = max(end for _, _, _, end in ended) - min(begin for _, _, begin, _ in ended)
    return Taught(lesson, tuple(shares for _, shares, _, _ in ended), taught_s, *scores)


def teach(lesson: Lesson, rank: int, taken: Any, ready: Any, found: Any) -> None:
    """A rank: shares of questions, one a step, until all are taken. Times are ``time.monotonic``, which all share."""
    torch.set_num_threads(1)
    known, new = halves(lesson.num_facts, seed=lesson.seed)
    words, spelling = _books(known, new)
    with mempool.connect(lesson.address) as pool:
        staleness = STALENESS if lesson.consistency == "bounded" else 0
        pool.join(lesson.table, rank, lesson.ranks, consistency=lesson.consistency, staleness=staleness)
        model = _loaded(pool.table(lesson.table), lesson.weights, known, new)
        optimizer = optim.PoolOptimizer(model, lr=TABLE_LR)
        slowed = lesson.slow if rank == lesson.ranks - 1 else 1.0
        shares = 0
        ready.wait()
        began_s = time.monotonic()
        while True:
            with taken.get_lock():
                share, taken.value = taken.value, taken.value + 1
            if share >= lesson.shares:
                break
            generator = torch.Generator().manual_seed(lesson.seed + share)
            asked = torch.randint(len(new.facts), (lesson.questions,), generator=generator).tolist()
            start_s = time.monotonic()
            questions = [new.trained_question(fact, choice=share + place) for place, fact in enumerate(asked)]
            loss = spelling_loss(
                model(words.encode(questions)), spelling.encode([new.facts[fact].answer for fact in asked])
            )
            loss.backward()  # type: ignore[no-untyped-call]
            time.sleep((time.monotonic() - start_s) * (1.0 / slowed - 1.0))
            optimizer.step()
            shares += 1
        found.put((rank, shares, began_s, time.monotonic()))


def _books(known: FactBook, new: FactBook) -> tuple[WordBook, AnswerSpelling]:
    every = replace(known, facts=(*known.facts, *new.facts))
    return WordBook.from_facts(every), AnswerSpelling(fact.answer for fact in every.facts)


def _new_model(pool: mempool.Pool, known: FactBook, new: FactBook) -> tuple[FactModel, mempool.Table]:
    table, (words, spelling) = _empty_table(pool, "facts"), _books(known, new)
    torch.manual_seed(0)
    return FactModel(words, spelling, block=memory_block(table, size=ModelSize()), size=ModelSize()), table


def _empty_table(pool: mempool.Pool, name: str) -> mempool.Table:
    with suppress(NotFound):
        pool.drop_table(name)  # of a run that was broken off
    config = mempool.TableConfig(name=name, num_slots=NUM_SLOTS, value_dim=VALUE_DIM, optimizer=optim.Adagrad(lr=0.1))
    return pool.create_table(config)


def _loaded(table: mempool.Table, weights: Path, known: FactBook, new: FactBook) -> FactModel:
    """The trained model on a table, of which nothing else is trained any more."""
    words, spelling = _books(known, new)
    model = FactModel(words, spelling, block=memory_block(table, size=ModelSize()), size=ModelSize())
    model.load_state_dict(torch.load(weights), strict=False)
    model.eval().requires_grad_(False)
    model.block.values.requires_grad_()
    return model


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="teach_by_ranks", description="New facts, taught by several processes.")
    parser.add_argument("--address", metavar="HOST:PORT", required=True, help="a running pool")
    parser.add_argument("--ranks", type=int, default=2, help="processes that teach")
    parser.add_argument("--slow", type=float, default=0.5, help="speed of the last of them beside the others'")
    parser.add_argument("--num-facts", type=int, default=8_000, help="how many at most; half of them are taught")
    parser.add_argument("--epochs", type=int, default=14, help="times the model is asked each fact it is trained on")
    parser.add_argument("--teach-epochs", type=int, default=14, help="times each new fact is asked, about")
    parser.add_argument("--batch", type=int, default=512, help="questions of a step of all ranks")
    parser.add_argument("--seed", type=int, default=0, help="of facts, model and questions")
    return parser


if __name__ == "__main__":
    sys.exit(main())
