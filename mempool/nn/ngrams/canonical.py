"""Canonical ids: tokens that read alike are one to an n-gram."""

import unicodedata
from collections.abc import Iterable

import torch
from torch import Tensor

from mempool.errors import InvalidRequest

_NOT_TEXT = "\ufffd"
"""What decoders answer for bytes that are a part of a character: they say nothing of which."""


def canonical_ids(tokens: Iterable[str | None], *, accents: bool = True, spaces: bool = True) -> Tensor:
    """The map of a vocabulary to fewer ids, for ``NgramLookup``: equal ids for texts that are equal after NFKC and
    lower case.

    Args:
        tokens: The text of each token, by id, as the tokenizer decodes it: ``[tokenizer.decode([i]) for i in
            range(len(tokenizer))]``. None, "" and what is not whole characters (U+FFFD) stay apart from all others.
        accents: False: letters that differ in accents are equal, too (NFD without marks).
        spaces: False: white space around a token does not count (what is nothing but space is one blank).

    Returns:
        [vocabulary] int64, from 0 without gaps, in the order in which they first occur.

    Raises:
        InvalidRequest: There are no tokens, or one is no text.
    """
    found: dict[str | int, int] = {}
    ids = []
    for number, token in enumerate(tokens):
        if token is not None and not isinstance(token, str):
            raise InvalidRequest(f"tokens[{number}] = {token!r} is no text: give what the tokenizer decodes it to")
        key = number if token is None or _NOT_TEXT in token else _canonical(token, accents=accents, spaces=spaces)
        ids.append(found.setdefault(key or number, len(found)))
    if not ids:
        raise InvalidRequest("a vocabulary of no tokens: give the text of each token, by id")
    return torch.tensor(ids, dtype=torch.int64, device="cpu")


def _canonical(token: str, *, accents: bool, spaces: bool) -> str:
    text = unicodedata.normalize("NFKC", token)
    if not accents:
        text = "".join(each for each in unicodedata.normalize("NFD", text) if not unicodedata.combining(each))
    text = text.lower()
    return text if spaces or not text else text.strip() or " "
