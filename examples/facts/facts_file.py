"""Facts of your own: JSON lines with `question` and `answer`. What is wrong with a file is said line by line."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from facts.data import Fact, FactBook, words
from facts.phrasings import SUBJECT, Phrasings

MAX_ANSWER_CHARS = 64
RELATION = "facts"
_MAX_MESSAGES = 10


class FactsFileError(Exception):
    """A file of facts that cannot be used; the message has a line `FILE:LINE: what is wrong` for each bad line."""


def read_facts(path: Path) -> FactBook:
    """Reads a file of facts: one JSON object a line, `{"question": "...", "answer": "..."}`; blank lines are skipped.

    A question repeated with the same answer counts once. Questions are the same if their words are (see `words`).
    There are no phrasings but the file's own, so nothing can be asked in words never seen.

    Args:
        path: a UTF-8 file.

    Raises:
        FactsFileError: if the file cannot be read, has fewer than 2 facts, or any line is wrong or contradicts another.
    """
    try:
        text = path.read_bytes().decode("utf-8")
    except OSError as error:
        raise FactsFileError(f"{path}: cannot be read: {error.strerror or error}.") from error
    except UnicodeDecodeError as error:
        bad_line = error.object[: error.start].count(b"\n") + 1
        raise FactsFileError(f"{path}:{bad_line}: is not UTF-8 ({error.reason}); save the file as UTF-8.") from error

    facts: dict[tuple[str, ...], tuple[int, Fact]] = {}
    problems: list[str] = []
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        fact = _parsed(line)
        if isinstance(fact, str):
            problems.append(f"{path}:{number}: {fact}")
            continue
        first, earlier = facts.setdefault(tuple(words(fact.subject)), (number, fact))
        if earlier.answer != fact.answer:
            problems.append(
                f"{path}:{number}: {fact.subject!r} is answered {fact.answer!r} here and {earlier.answer!r} in line"
                f" {first}; a question needs one answer: keep one of the two lines, or ask more precisely."
            )
    if problems:
        raise FactsFileError("\n".join(_shortened(problems)))
    if len(facts) < 2:
        raise FactsFileError(
            f"{path}: has {len(facts)} facts, at least 2 are needed;"
            ' a fact is a line {"question": "...", "answer": "..."}.'
        )
    return FactBook(
        facts=tuple(fact for _, fact in facts.values()),
        phrasings={RELATION: Phrasings(trained=(SUBJECT,), unseen=())},
    )


def _parsed(line: str) -> Fact | str:
    """The fact of a line, or what is wrong with the line."""
    try:
        entry: Any = json.loads(line)
    except json.JSONDecodeError as error:
        return f"is not JSON ({error.msg} at column {error.colno}); one object a line is expected."
    if not isinstance(entry, dict):
        return f"is a JSON {type(entry).__name__}, not an object with `question` and `answer`."
    if unknown := sorted(entry.keys() - {"question", "answer"}):
        return f"has the unknown field {unknown[0]!r}; a fact has `question` and `answer` only."
    for field in ("question", "answer"):
        if field not in entry:
            return f"has no `{field}`."
        if not isinstance(entry[field], str):
            return f"`{field}` is {json.dumps(entry[field])[:60]}; write it as a string in quotes."
    question, answer = entry["question"].strip(), entry["answer"].strip()
    if not words(question):
        return f"`question` is {question!r}, which has no words."
    if not answer:
        return "`answer` is empty."
    if len(answer) > MAX_ANSWER_CHARS:
        return f"`answer` has {len(answer)} characters, at most {MAX_ANSWER_CHARS} are possible: {answer[:40]!r}..."
    return Fact(RELATION, question, answer)


def _shortened(problems: list[str]) -> list[str]:
    if len(problems) <= _MAX_MESSAGES:
        return problems
    return [*problems[:_MAX_MESSAGES], f"... and {len(problems) - _MAX_MESSAGES} more lines with errors."]
