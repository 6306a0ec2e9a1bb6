"""A small language model on real text: words in, the perplexity of the next one on text that it never saw.

The text is WordNet's glosses (Debian's `wordnet-base`), or a file of one's own. Shape legend: B windows, T tokens,
D model dim, N vocabulary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from random import Random
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

import mempool
from comparison.blocks import Blocks, Sizes, Tables, plan
from comparison.facts_task import Setup
from comparison.training import Learner, parameters_of

WORDNET = Path("/usr/share/wordnet")
_WORD = re.compile(r"[^\W\d_]+|\d|[^\w\s]")
_END, _UNKNOWN = 0, 1
_ATTENTION_HEADS = 4


class TextError(Exception):
    """There is no text to learn."""


def read_text(path: Path | None) -> list[str]:
    """Passages of a file, one a line; None: WordNet's glosses, each with its words before it.

    Raises:
        TextError: there is no such file, or WordNet is not installed.
    """
    if path is not None:
        try:
            passages = [line for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
        except (OSError, UnicodeDecodeError) as error:
            raise TextError(f"the text {path} cannot be read: {error}") from error
        if len(passages) < 20:
            raise TextError(f"the text {path} has {len(passages)} lines; give one passage a line, 20 at least")
        return passages
    files = [WORDNET / f"data.{name}" for name in ("noun", "verb", "adj", "adv")]
    if not all(file.exists() for file in files):
        raise TextError(f"there is no WordNet in {WORDNET}: apt install wordnet-base, or give a text by --text FILE")
    return [_gloss(line) for file in files for line in file.read_text("utf-8").splitlines() if line[:1].isdigit()]


def _gloss(line: str) -> str:
    fields, gloss = line.split(" | ", 1)
    parts = fields.split()
    words = [parts[4 + 2 * number].replace("_", " ") for number in range(int(parts[3], 16))]
    return f"{', '.join(words)}: {gloss.strip()}"


class LanguageModel(nn.Module):
    """Words and places -> for each block attention and the block, both added -> the words' own vectors as output."""

    def __init__(self, vocabulary: int, context: int, blocks: Blocks, *, dim: int) -> None:
        super().__init__()
        self.words = nn.Embedding(vocabulary, dim)
        self.places = nn.Embedding(context, dim)
        self.blocks = blocks
        self.attention = nn.ModuleList(
            nn.ModuleDict({"norm": nn.LayerNorm(dim), "qkv": nn.Linear(dim, 3 * dim), "out": nn.Linear(dim, dim)})
            for _ in blocks.blocks
        )
        self.norm = nn.LayerNorm(dim)
        nn.init.normal_(self.words.weight, std=0.02)
        nn.init.normal_(self.places.weight, std=0.02)

    def forward(self, tokens_BT: Tensor) -> Tensor:
        """[B, T] to logits [B, T, N]."""
        x_BTD = self.words(tokens_BT) + self.places.weight[: tokens_BT.shape[1]]
        for number, attention in enumerate(self.attention):
            assert isinstance(attention, nn.ModuleDict)
            qkv = attention["qkv"](attention["norm"](x_BTD)).unflatten(-1, (3, _ATTENTION_HEADS, -1))
            query, key, value = qkv.permute(2, 0, 3, 1, 4)
            seen = F.scaled_dot_product_attention(query, key, value, is_causal=True)
            x_BTD = x_BTD + attention["out"](seen.transpose(1, 2).flatten(-2))
            ngram = self.blocks.before(number)
            if ngram is not None:
                x_BTD = x_BTD + ngram(x_BTD, tokens_BT)
            x_BTD = x_BTD + self.blocks(x_BTD, number)
        return F.linear(self.norm(x_BTD), self.words.weight)


class LanguageTask:
    """A text, and how models are trained on it and measured.

    Args:
        passages: of the text; they are shuffled once, and a twentieth is never trained on: one half of it is for
            choosing learning rates, the other for the figures.
        sizes: of all models.
        vocabulary: the most frequent words, and one for all others.
        context: tokens of a window.
        batch: windows of a step.
    """

    def __init__(
        self, passages: list[str], sizes: Sizes, *, vocabulary: int = 4096, context: int = 64, batch: int = 16
    ) -> None:
        self.sizes, self.context, self.batch = sizes, context, batch
        passages = list(passages)
        Random(0).shuffle(passages)
        held = max(2, len(passages) // 20)
        words = [[each.lower() for each in _WORD.findall(passage)] for passage in passages]
        counts = Counter(word for passage in words[2 * held :] for word in passage)
        self._numbers = {
            word: number for number, (word, _) in enumerate(counts.most_common(vocabulary - 2), start=_UNKNOWN + 1)
        }
        self.vocabulary = len(self._numbers) + 2
        self.tokens = {
            "tuning": self._stream(words[:held]),
            "test": self._stream(words[held : 2 * held]),
            "train": self._stream(words[2 * held :]),
        }
        if any(len(stream) <= context for stream in self.tokens.values()):
            raise TextError(f"the text is too short for windows of {context} words: a twentieth of it must have more")

    def _stream(self, passages: list[list[str]]) -> Tensor:
        return torch.tensor(
            [number for words in passages for number in (*(self._numbers.get(w, _UNKNOWN) for w in words), _END)]
        )

    def run(self, setup: Setup, pool: mempool.Pool, *, steps: int, split: str = "test") -> dict[str, Any]:
        """Train a model and measure its perplexity; plain values."""
        torch.manual_seed(setup.seed)
        tables = Tables(pool, f"text-{setup.kind.replace('+', '-plus-')}", lr=setup.table_lr, seed=setup.seed)
        try:
            blocks = Blocks(plan(setup.kind, self.sizes), self.sizes, tables, vocabulary=self.vocabulary)
            model = LanguageModel(self.vocabulary, self.context, blocks, dim=self.sizes.dim)
            learner = Learner(model, blocks, lr=setup.lr, table_lr=setup.table_lr, num_steps=steps)
            learner.train(self._losses(model, seed=setup.seed, steps=steps))
            return {
                "perplexity": self.perplexity(model, split),
                "flops": blocks.plan.flops,
                "hidden": blocks.plan.hidden,
                "parameters": parameters_of(model),
                "pool_parameters": sum(table.num_slots * table.value_dim for table in tables.made),
                "train_s": learner.seconds,
                "steps": learner.steps,
                "tokens": steps * self.batch * self.context,
            }
        finally:
            tables.drop()

    def _losses(self, model: LanguageModel, *, seed: int, steps: int) -> Iterator[Any]:
        generator = torch.Generator().manual_seed(seed)
        stream = self.tokens["train"]
        for _ in range(steps):
            first = torch.randint(len(stream) - self.context, (self.batch, 1), generator=generator)
            yield partial(_loss, model, stream[first + torch.arange(self.context + 1)])

    @torch.no_grad()
    def perplexity(self, model: LanguageModel, split: str) -> float:
        """Of the windows of a part of the text, one after the other."""
        model.eval()
        stream, total, count = self.tokens[split], 0.0, 0
        windows = (len(stream) - 1) // self.context
        for start in range(0, windows, self.batch):
            first = torch.arange(start, min(windows, start + self.batch))[:, None] * self.context
            window = stream[first + torch.arange(self.context + 1)]
            total += float(_loss(model, window)) * window[:, 1:].numel()
            count += window[:, 1:].numel()
        return float(torch.tensor(total / count, dtype=torch.float64).exp())  # infinite where a rate was far too high


def _loss(model: LanguageModel, windows: Tensor) -> Tensor:
    return F.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())
