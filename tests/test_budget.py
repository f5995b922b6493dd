"""Notation of budgets and exact counts."""

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from secateur.budget import KINDS, Budget, kept_count, parse
from secateur.errors import SpecError

PERCENT = st.decimals("0.0001", "99.9", allow_nan=False, places=4)


@given(st.sampled_from(KINDS), PERCENT)
def test_parse_reads_what_str_writes(kind, percent):
    text = f"{kind}={percent}" + ("" if kind == "threshold" else "%")
    assert parse(str(parse(text))) == parse(text)


@pytest.mark.parametrize(
    ("text", "budget"),
    [
        ("sparsity=90%", Budget("sparsity", Fraction(9, 10), True)),
        ("macs = 0.5", Budget("macs", Fraction(1, 2), True)),
        ("params=1.2M", Budget("params", Fraction(1_200_000), False)),
        ("macs=40M", Budget("macs", Fraction(40_000_000), False)),
        ("size=10MB", Budget("size", Fraction(10_000_000), False)),
        ("size=1.5KiB", Budget("size", Fraction(1536), False)),
        ("latency=5ms", Budget("latency", Fraction(5), False)),
        ("latency=250us", Budget("latency", Fraction(1, 4), False)),
        ("latency=50%", Budget("latency", Fraction(1, 2), True)),
        ("threshold=1e-3", Budget("threshold", Fraction(1, 1000), False)),
        ("max_drop=1%", Budget("max_drop", Fraction(1, 100), True)),
        ("sparsity=0", Budget("sparsity", Fraction(0), True)),
        ("macs=5e-1", Budget("macs", Fraction(1, 2), True)),
        (
            "params=0.1234567890123456789012345678901",
            Budget("params", Fraction("0.1234567890123456789012345678901"), True),
        ),
    ],
)
def test_notation(text, budget):
    assert parse(text) == budget
    assert parse(str(budget)) == budget


@pytest.mark.parametrize(
    "text",
    ["", "macs", "macs=", "macs=half", "speed=50%", "macs=-5%", "size=10", "size=10m", "latency=5", "threshold=5%",
     "sparsity=3", "macs=50%%", "params=1e99999999", "macs=1e-99999999", "params=0.0001k", "size=0.5B"],
)  # fmt: skip
def test_anything_else_is_refused_with_the_known_forms(text):
    with pytest.raises(SpecError, match=r"cannot be read; expected one of sparsity=90%"):
        parse(text)


@pytest.mark.parametrize("text", ["sparsity=100%", "macs=0%", "macs=150%", "size=101%", "params=0"])
def test_parts_out_of_range_are_refused(text):
    with pytest.raises(SpecError, match="out of range"):
        parse(text)


def test_a_budget_is_a_text():
    with pytest.raises(SpecError, match="found float"):
        parse(0.5)


def test_counts_are_exact_where_floats_are_not():
    assert kept_count(Fraction("0.9"), 10) == 1  # 10 * (1 - 0.9) is 0.9999999999999998
    assert kept_count(Fraction("0.7"), 1000) == 300
    assert kept_count(Fraction(1, 3), 10) == 6


def test_limits():
    assert parse("macs=50%").limit(7) == 3.5
    assert parse("size=1kB").limit(10**9) == 1000
