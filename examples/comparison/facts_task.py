"""The facts: questions in, answers spelled character by character, exact match and token F1 in unseen phrasings.

Shape legend: B questions, W words, D model dim, T answer positions, C characters.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

import mempool
from comparison.blocks import Blocks, Plan, Sizes, Tables, flops_of_all, plan
from comparison.training import Learner, parameters_of
from facts.data import FactBook
from facts.model import ModelSize, QuestionEncoder, spelling_loss
from facts.text import AnswerSpelling, WordBook
from facts.train import TrainConfig, batches

_EVALUATION_BATCH = 1024


class FactsModel(nn.Module):
    """question -> encoder -> blocks, each added -> one softmax over the characters for each position of the answer."""

    def __init__(self, word_book: WordBook, spelling: AnswerSpelling, blocks: Blocks, *, dim: int) -> None:
        super().__init__()
        self.encoder = QuestionEncoder(word_book, size=ModelSize(dim=dim))
        self.blocks = blocks
        self.spell_norm = nn.LayerNorm(dim)
        self.spell = nn.Linear(dim, spelling.num_positions * spelling.num_codes)
        self.num_codes = spelling.num_codes

    def forward(self, words_BW: Tensor) -> Tensor:
        """[B, W] word numbers to logits [B, T, C]."""
        x_BD = self.encoder(words_BW)
        for number in range(len(self.blocks.blocks)):
            ngram = self.blocks.before(number)
            if ngram is not None:  # of each word that there is, and their mean
                real = words_BW != 0
                hidden = x_BD[:, None].expand(*words_BW.shape, -1)
                x_BD = x_BD + ngram(hidden, words_BW, mask=real).sum(1) / real.sum(1, keepdim=True).clamp_min(1)
            x_BD = x_BD + self.blocks(x_BD, number)
        logits: Tensor = self.spell(self.spell_norm(x_BD))
        return logits.view(len(logits), -1, self.num_codes)


@dataclass(frozen=True, slots=True)
class Setup:
    """One run of one model.

    Attributes:
        kind: of model.
        seed: of its start, of order and wording.
        lr, table_lr: learning rates.
        epochs: times each fact is asked; None: 14, or more where facts are few.
        options: of its memory layers, beside `Sizes`.
        balance: factor of the balance loss of memory layers.
        lower_values: the values' rate comes down to a tenth; else it stays.
    """

    kind: str
    seed: int
    lr: float
    table_lr: float
    epochs: int | None = None
    options: tuple[tuple[str, Any], ...] = ()
    balance: float = 0.0
    lower_values: bool = True


class FactsTask:
    """Facts, and how models are trained and asked.

    Args:
        book: the facts.
        sizes: of all models.
    """

    def __init__(self, book: FactBook, sizes: Sizes) -> None:
        self.book, self.sizes = book, sizes
        self.word_book = WordBook.from_facts(book)
        self.spelling = AnswerSpelling(fact.answer for fact in book.facts)
        asked = range(0, len(book.facts), max(1, len(book.facts) // 1000))
        words = self.word_book.encode([book.trained_question(i, choice=i) for i in asked])
        self.words_each = float((words != 0).sum(1).float().mean())

    def plan(self, kind: str, sizes: Sizes | None = None) -> Plan:
        """Of a model; an n-gram memory reads each word of a question."""
        return plan(kind, sizes or self.sizes, ngram_tokens=self.words_each)

    def run(self, setup: Setup, pool: mempool.Pool, *, sizes: Sizes | None = None) -> dict[str, Any]:
        """Train a model and ask it everything; plain values.

        Args:
            setup: of the run.
            pool: for its tables.
            sizes: others than all models', whose feed-forward layers stay as wide; FLOPs are those of these sizes.
        """
        sizes = sizes or self.sizes
        config = TrainConfig(epochs=setup.epochs, seed=setup.seed)
        num_steps = config.num_epochs(len(self.book.facts)) * config.steps_per_epoch(len(self.book.facts))
        torch.manual_seed(setup.seed)
        tables = Tables(pool, f"facts-{setup.kind.replace('+', '-plus-')}", lr=setup.table_lr, seed=setup.seed)
        try:
            blocks = Blocks(
                self.plan(setup.kind),
                sizes,
                tables,
                vocabulary=len(self.word_book.vectors),
                options=dict(setup.options),
                balance=setup.balance,
            )
            model = FactsModel(self.word_book, self.spelling, blocks, dim=sizes.dim)
            learner = Learner(
                model,
                blocks,
                lr=setup.lr,
                table_lr=setup.table_lr,
                num_steps=num_steps,
                lower_values=setup.lower_values,
            )
            learner.train(self._losses(model, config))
            return {
                **self.ask(model, seed=setup.seed),
                "flops": flops_of_all(
                    blocks.plan.parts, sizes, hidden=blocks.plan.hidden, ngram_tokens=blocks.plan.ngram_tokens
                ),
                "hidden": blocks.plan.hidden,
                "parameters": parameters_of(model),
                "pool_parameters": sum(table.num_slots * table.value_dim for table in tables.made),
                "train_s": learner.seconds,
                "steps": learner.steps,
            }
        finally:
            tables.drop()

    def _losses(self, model: FactsModel, config: TrainConfig) -> Iterator[Any]:
        def loss(words: Tensor, codes: Tensor) -> Tensor:
            return spelling_loss(model(words), codes)

        for batch in batches(self.book, word_book=self.word_book, spelling=self.spelling, config=config):
            yield partial(loss, batch.words, batch.codes)

    @torch.no_grad()
    def ask(self, model: FactsModel, *, seed: int) -> dict[str, Any]:
        """Every fact, in unseen phrasings where there are any and in trained ones; and which slots that takes."""
        model.eval()
        found: dict[str, Any] = {}
        layers = model.blocks.layers()
        used = [torch.zeros(layer.table.num_slots, dtype=torch.int64) for layer in layers]
        for layer in layers:
            layer.keep_lookup = True
        for name in ("unseen", "trained") if self.book.has_unseen else ("trained",):
            ask = self.book.unseen_question if name == "unseen" else self.book.trained_question
            generator = torch.Generator().manual_seed(seed)
            choices = torch.randint(1 << 30, (len(self.book.facts),), generator=generator).tolist()
            right, f1 = 0, 0.0
            for start in range(0, len(self.book.facts), _EVALUATION_BATCH):
                asked = range(start, min(start + _EVALUATION_BATCH, len(self.book.facts)))
                words = self.word_book.encode([ask(fact, choice=choices[fact]) for fact in asked])
                answers = self.spelling.decode(model(words).argmax(dim=-1))
                for count, layer in zip(used, layers, strict=True):
                    assert layer.last_lookup is not None
                    count += torch.bincount(layer.last_lookup.ids.flatten(), minlength=len(count))
                for fact, answer in zip(asked, answers, strict=True):
                    right += answer == self.book.facts[fact].answer
                    f1 += token_f1(answer, self.book.facts[fact].answer)
            found[f"exact_match_{name}"] = right / len(self.book.facts)
            found[f"f1_{name}"] = f1 / len(self.book.facts)
        if used:
            together = torch.stack(used).sum(0).double()
            shares = together[together > 0] / together.sum()
            found["coverage"] = len(shares) / len(together)
            found["kl_to_uniform"] = float((shares * (shares * len(together)).log()).sum())
        return found


def token_f1(answer: str, right: str) -> float:
    """Words that both have, as precision and recall (SQuAD's F1, arXiv 1606.05250)."""
    both = Counter(answer.split()) & Counter(right.split())
    common = sum(both.values())
    return 2.0 * common / (len(answer.split()) + len(right.split())) if common else 0.0
