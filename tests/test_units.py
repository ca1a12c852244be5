"""Sizes as people write them."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamgmm.errors import RequestError
from streamgmm.units import format_bytes, parse_bytes


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("1", 1),
        (4096, 4096),
        ("512B", 512),
        ("4GiB", 4 << 30),
        ("4gib", 4 << 30),
        ("4 GB", 4 * 10**9),
        ("4G", 4 * 10**9),
        ("1.5MiB", 3 << 19),
        (" 2k ", 2000),
        ("2Ki", 2048),
        ("99999TiB", 99999 << 40),
        ("0.5KiB", 512),
    ],
)
def test_sizes(text, size):
    assert parse_bytes(text) == size


@pytest.mark.parametrize(
    "text", ["", " ", "0", "0.4", "-1", "-1GiB", "nan", "inf", "1e9", "4 4", "4PiB", "GiB", "1" * 40]
)
def test_what_is_no_size_is_refused_with_name_and_value(text):
    with pytest.raises(RequestError) as caught:
        parse_bytes(text, "--memory")
    assert "--memory" in str(caught.value)
    assert repr(text) in str(caught.value)


@pytest.mark.parametrize(
    ("size", "text"),
    [
        (0, "0 B"),
        (1023, "1023 B"),
        (1024, "1.0 KiB"),
        (3 << 19, "1.5 MiB"),
        (5 << 30, "5.0 GiB"),
        (7 << 50, "7168.0 TiB"),
    ],
)
def test_formatted(size, text):
    assert format_bytes(size) == text


@given(st.integers(1, 10**15))
def test_what_is_printed_can_be_given_back(size):
    assert parse_bytes(format_bytes(size)) == pytest.approx(size, rel=0.05)
