import json
from pathlib import Path

import pytest

from facts.facts_file import FactsFileError, read_facts

GOOD = '{"question": "Who wrote Faust?", "answer": "Goethe"}'
OTHER = '{"question": "Who wrote Emma?", "answer": "Austen"}'


def written(folder: Path, *lines: str) -> Path:
    path = folder / "mine.jsonl"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return path


def test_good_lines_become_facts_in_their_order(tmp_path: Path) -> None:
    book = read_facts(written(tmp_path, GOOD, "", '  {"answer": " Ä€ ", "question": " Ünicode? "}  '))
    assert [(fact.subject, fact.answer) for fact in book.facts] == [("Who wrote Faust?", "Goethe"), ("Ünicode?", "Ä€")]
    assert book.trained_question(0, choice=5) == "Who wrote Faust?"
    assert not book.has_unseen


def test_a_question_with_braces_is_asked_as_it_is(tmp_path: Path) -> None:
    book = read_facts(written(tmp_path, GOOD, json.dumps({"question": "What is {} in {x}?", "answer": "a dict"})))
    assert book.trained_question(1, choice=0) == "What is {} in {x}?"


def test_a_repeated_question_counts_once(tmp_path: Path) -> None:
    repeated = '{"question": "who wrote FAUST", "answer": "Goethe"}'
    assert len(read_facts(written(tmp_path, GOOD, OTHER, repeated)).facts) == 2


def test_two_answers_to_one_question_are_reported_with_both_lines(tmp_path: Path) -> None:
    path = written(tmp_path, GOOD, OTHER, '{"question": "Who wrote “Faust”", "answer": "Marlowe"}')
    with pytest.raises(FactsFileError) as caught:
        read_facts(path)
    assert f"{path}:3: " in str(caught.value)
    assert "'Marlowe' here and 'Goethe' in line 1" in str(caught.value)


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("{question: 1}", "is not JSON"),
        ("[1, 2]", "is a JSON list, not an object"),
        ('{"question": "Who?"}', "has no `answer`"),
        ('{"answer": "I"}', "has no `question`"),
        ('{"question": "Who?", "answer": "I", "source": "x"}', "unknown field 'source'"),
        ('{"question": "How many?", "answer": 3}', "`answer` is 3; write it as a string"),
        ('{"question": null, "answer": "x"}', "`question` is null"),
        ('{"question": "?!", "answer": "x"}', "which has no words"),
        ('{"question": "Who?", "answer": "  "}', "`answer` is empty"),
        (json.dumps({"question": "Who?", "answer": "x" * 65}), "has 65 characters, at most 64"),
    ],
)
def test_a_bad_line_is_named_with_what_is_wrong(tmp_path: Path, line: str, said: str) -> None:
    path = written(tmp_path, GOOD, "", line, OTHER)
    with pytest.raises(FactsFileError) as caught:
        read_facts(path)
    assert str(caught.value).startswith(f"{path}:3: ")
    assert said in str(caught.value)


def test_all_bad_lines_are_named_up_to_ten(tmp_path: Path) -> None:
    with pytest.raises(FactsFileError) as caught:
        read_facts(written(tmp_path, *["nonsense"] * 13))
    messages = str(caught.value).splitlines()
    assert len(messages) == 11
    assert messages[9].startswith(f"{tmp_path / 'mine.jsonl'}:10: ")
    assert messages[10] == "... and 3 more lines with errors."


def test_a_file_that_is_not_utf8_is_named_with_its_line(tmp_path: Path) -> None:
    path = tmp_path / "mine.jsonl"
    path.write_bytes(GOOD.encode() + b"\n" + '{"question": "Wo?", "answer": "Köln"}'.encode("latin-1"))
    with pytest.raises(FactsFileError, match=r"mine\.jsonl:2: is not UTF-8"):
        read_facts(path)


def test_a_missing_file_and_one_with_too_few_facts_say_so(tmp_path: Path) -> None:
    with pytest.raises(FactsFileError, match="cannot be read: No such file"):
        read_facts(tmp_path / "none.jsonl")
    with pytest.raises(FactsFileError, match="has 0 facts, at least 2"):
        read_facts(written(tmp_path, "", ""))
    with pytest.raises(FactsFileError, match="has 1 facts, at least 2"):
        read_facts(written(tmp_path, GOOD))
