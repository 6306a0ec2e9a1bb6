"""Sizes and port ranges as people write them."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mempool.config.amounts import format_bytes, parse_bytes, parse_ports


@pytest.mark.parametrize(
    ("text", "num_bytes"),
    [
        (12, 12),
        ("12", 12),
        ("12B", 12),
        ("2GiB", 2**31),
        ("2 gib", 2**31),
        ("1.5GiB", 3 * 2**29),
        ("0.1KiB", 102),
        ("500MB", 500_000_000),
        ("1_024kb", 1_024_000),
        ("3TiB", 3 * 2**40),
    ],
)
def test_sizes(text: object, num_bytes: int) -> None:
    assert parse_bytes(text) == num_bytes


@pytest.mark.parametrize("text", ["2G", "2Gi", "-1GiB", "GiB", "", "1e9", "2 GiB free", "٣GiB!", True, None, 1.5, [1]])
def test_what_is_no_size_is_refused_with_an_example(text: object) -> None:
    with pytest.raises(ValueError, match='"2GiB"'):
        parse_bytes(text)


@settings(deadline=None)
@given(
    num_bytes=st.one_of(
        st.integers(0, 2**50), st.builds(lambda n, p: n * 1024**p, st.integers(0, 2000), st.integers(0, 4))
    )
)
def test_format_bytes_is_read_back_exactly(num_bytes: int) -> None:
    assert parse_bytes(format_bytes(num_bytes)) == num_bytes


def test_format_bytes_takes_the_largest_exact_unit() -> None:
    assert [format_bytes(n) for n in (0, 1023, 1024, 3 * 2**29, 2**31, 2**40)] == [
        "0B",
        "1023B",
        "1KiB",
        "1536MiB",
        "2GiB",
        "1TiB",
    ]


@settings(deadline=None)
@given(first=st.integers(0, 70_000), last=st.integers(0, 70_000))
def test_port_ranges(first: int, last: int) -> None:
    if 1 <= first <= last <= 65535:
        assert parse_ports(f"{first}-{last}") == parse_ports(f" {first} - {last} ") == (first, last)
        assert parse_ports([first, last]) == (first, last)
    else:
        with pytest.raises(ValueError, match="is not a range of ports"):
            parse_ports(f"{first}-{last}")


def test_no_range_means_free_ports() -> None:
    assert parse_ports(None) is None
    assert parse_ports(0) is None


@pytest.mark.parametrize("value", ["7100", "a-b", "1-2-3", 7100, True, False, [1], ""])
def test_what_is_no_range_is_refused_with_an_example(value: object) -> None:
    with pytest.raises(ValueError, match='"7100-7199"'):
        parse_ports(value)
