"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from vdev.errors import UserError
from vdev.units import format_size, parse_size


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("512", 512),
        ("512B", 512),
        (" 64 MiB ", 64 << 20),
        ("64M", 64 << 20),
        ("64mib", 64 << 20),
        ("10G", 10 << 30),
        ("1TiB", 1 << 40),
        ("2PiB", 2 << 50),
    ],
)
def test_sizes_are_powers_of_1024(text: str, size: int) -> None:
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "M", "-1", "1.5G", "0x10", "10 apples", "1e3", "KiB", "1iB"])
def test_what_is_no_size_is_refused_with_an_example(text: str) -> None:
    with pytest.raises(UserError, match="64MiB"):
        parse_size(text)


def test_decimal_units_are_refused_because_they_are_ambiguous() -> None:
    with pytest.raises(UserError, match=r"'64MB' is ambiguous: write 64M or 64MiB"):
        parse_size("64MB")


@pytest.mark.parametrize(
    ("size", "text"),
    [(0, "0B"), (511, "511B"), (1 << 10, "1KiB"), (3 << 29, "1.5GiB"), (2 << 50, "2PiB")],
)
def test_sizes_are_shown_in_the_largest_unit(size: int, text: str) -> None:
    assert format_size(size) == text


@given(st.integers(0, 1 << 60))
def test_any_number_of_bytes_is_its_own_size(size: int) -> None:
    assert parse_size(str(size)) == size
