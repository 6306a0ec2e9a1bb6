"""YAML as data with lines, compared with PyYAML's own reading where the two agree on the rules."""

import math
from typing import Any

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.config.yaml_nodes import parse
from mempool.errors import ConfigError

SCALARS = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(allow_nan=False),
    st.text(st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), max_size=12),
)
TREES = st.recursive(
    SCALARS,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4), st.dictionaries(st.text("abc_", min_size=1), inner, max_size=4)
    ),
    max_leaves=12,
)


@settings(deadline=None)
@given(data=TREES, flow=st.booleans())
def test_what_pyyaml_writes_is_read_back(data: Any, flow: bool) -> None:
    text = yaml.safe_dump(data, default_flow_style=flow, allow_unicode=True)
    assert parse(text, file="f").data == data


@settings(deadline=None, max_examples=300)
@given(text=st.text("ab:-[]{}&*!|>'\"\n #,?%@\t\x00\ufeff1.", max_size=40))
def test_no_text_crashes_it(text: str) -> None:
    told = None
    try:
        parse(text, file="f")
    except ConfigError as error:
        told = str(error)
    assert told is None or told.startswith("f:")


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1_500_000", 1_500_000),
        ("-7", -7),
        ("0x1F", 31),
        ("0o17", 15),
        ("1e-3", 1e-3),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("~", None),
        ("", None),
        ("TRUE", True),
        ("no", "no"),
        ("on", "on"),
        ("010", "010"),
        ("7:30", "7:30"),
        ("2026-01-01", "2026-01-01"),
        ("7100-7199", "7100-7199"),
        ("'1'", "1"),
        ('"true"', "true"),
        ("2GiB", "2GiB"),
        ("0.0.0.0", "0.0.0.0"),
    ],
)
def test_scalars_follow_yaml_1_2(text: str, value: object) -> None:
    found = parse(f"a: {text}", file="f").data
    assert found == {"a": value}
    assert isinstance(found, dict)
    assert type(found["a"]) is type(value)


def test_nan_is_a_number() -> None:
    found = parse("a: .nan", file="f").data
    assert isinstance(found, dict)
    assert math.isnan(found["a"])


TEXT = """\
# a comment
pool:
  name: x   # and another
  shards: 2
tables:
  - {name: a,
     size: 3}
  -
    name: b
"""


@pytest.mark.parametrize(
    ("loc", "line"),
    [
        (("pool",), 2),
        (("pool", "shards"), 4),
        (("pool", "missing"), 2),
        (("tables", 0), 6),
        (("tables", 0, "size"), 7),
        (("tables", 0, "size", "deeper"), 7),
        (("tables", 1, "name"), 9),
        (("tables", 1, "missing"), 9),
        (("tables", 7), 5),
        (("missing",), 2),
    ],
)
def test_lines_of_fields_and_of_what_should_have_them(loc: tuple[str | int, ...], line: int) -> None:
    assert parse(TEXT, file="f").line(loc) == line


def test_the_line_of_an_empty_file_is_its_first() -> None:
    assert parse("", file="f").line(("a",)) == 1
    assert parse("# nothing\n", file="f").data is None


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb:\n  c: 1\n  d: 2\n  c: 3\n", "f:5: b.c is given twice (first in line 3); keep one."),
        ("a: [1,\n", "f:2: is not valid YAML: "),
        ("a: 1\n b: 2\n", "f:2: is not valid YAML: "),
        ("a: \x07", "f:1: is not valid YAML: the character "),
        ("a: 1\n---\nb: 2\n", "f:2: is not valid YAML: "),
        ("a:\n  - !!python/object:os.system x\n", "f:2: a[0] has the tag 'tag:yaml.org,2002:python/object:os.system'"),
        ("a: &x [1, *x]\n", "f:1: a[1] contains itself"),
        ("? [1, 2]\n: 3\n", "f:1: the file has a key that is no plain name"),
        ("[" * 3_000, "f: is nested too deeply"),
    ],
)
def test_what_cannot_be_read_is_told_by_line(text: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse(text, file="f")
    assert str(caught.value).startswith(message)


def test_a_file_that_multiplies_itself_is_read_in_no_time() -> None:
    text = "a0: &a0 [1]\n" + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 30))
    found = parse(text, file="f").data
    assert isinstance(found, dict)
    assert len(found["a29"]) == 10
