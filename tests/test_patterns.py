"""Notation of patterns, pooling into units, and masks from units."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from secateur.errors import SpecError
from secateur.graph.types import Weight
from secateur.patterns import NM, Block, Channel, Unstructured, nm_mask, parse, pool, spread, why_not
from secateur.testing import check_groups


def weight(*shape, out_dim=0, in_dim=1):
    return Weight("w", shape, "linear", out_dim, in_dim, 1)


positive = st.integers(1, 64)
PATTERNS = st.one_of(
    st.just(Unstructured()),
    st.builds(Block, positive, positive),
    st.builds(Channel, positive),
    st.tuples(positive, positive).map(lambda p: NM(min(p), sum(p))),
)


@given(PATTERNS)
def test_parse_reads_what_str_writes(pattern):
    assert parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    "text", ["", "4:2", "2:2", "0:4", "block:4", "block:0x1", "channels", "channel/0", "2:4:8", "Channel", "block:4x-1"]
)
def test_anything_else_is_refused_with_the_known_forms(text):
    with pytest.raises(SpecError, match=r"is unknown; expected unstructured, N:M .* block:RxC .* channel/K"):
        parse(text)


def test_a_pattern_is_a_text():
    with pytest.raises(SpecError, match="found int"):
        parse(4)


@pytest.mark.parametrize(("rows", "cols"), [(4, 1), (1, 4), (3, 2), (16, 16)])
@pytest.mark.parametrize("shape", [(8, 8), (10, 7, 3, 3), (5, 1)])
def test_blocks_average_their_elements_and_spread_back(rows, cols, shape):
    w, block = weight(*shape), Block(rows, cols)
    scores = torch.rand(shape)
    units = pool(block, scores, w)
    flat = scores.flatten(1)
    expected = [
        flat[r : r + rows, c : c + cols].mean()
        for r in range(0, flat.shape[0], rows)
        for c in range(0, flat.shape[1], cols)
    ]
    assert torch.allclose(units, torch.stack(expected))
    keep = torch.rand(len(units)) > 0.5
    mask = spread(block, keep, w)
    assert mask.shape == scores.shape
    again = pool(block, mask.float(), w)
    assert torch.equal(again > 0.5, keep)
    assert bool(((again == 0) | (again == 1)).all())


def test_blocks_follow_the_output_dimension():
    w = weight(6, 8, out_dim=1, in_dim=0)
    keep = torch.zeros(12, dtype=torch.bool)
    keep[0] = True
    mask = spread(Block(4, 1), keep, w)
    assert mask.nonzero().tolist() == [[0, 0], [0, 1], [0, 2], [0, 3]]


@pytest.mark.parametrize(("n", "m"), [(2, 4), (1, 4), (4, 8), (3, 5)])
@pytest.mark.parametrize("shape", [(6, 16), (6, 10), (4, 9, 3, 3), (5, 8, 1)])
def test_every_group_keeps_exactly_n(n, m, shape):
    mask = nm_mask(NM(n, m), torch.randn(shape), weight(*shape))
    check_groups(mask, f"{n}:{m}", in_dim=1)


def test_the_best_of_a_group_stay_and_the_first_among_equals():
    scores = torch.tensor([[1.0, 4, 3, 2, 7, 7, 7, 7, 9]])
    assert nm_mask(NM(2, 4), scores, weight(1, 9)).int().tolist() == [[0, 1, 1, 0, 1, 1, 0, 0, 1]]


def test_groups_follow_the_input_dimension():
    mask = nm_mask(NM(2, 4), torch.randn(8, 6), weight(8, 6, out_dim=1, in_dim=0))
    check_groups(mask, "2:4", in_dim=0)


def test_a_weight_with_too_few_inputs_says_why_not():
    assert why_not(NM(2, 4), weight(16, 3, 3, 3)) == "has 3 inputs, fewer than the 4 of a 2:4 group"
    assert why_not(NM(2, 4), weight(16, 4)) == ""
    assert why_not(Unstructured(), weight(1, 1)) == ""


def test_a_weight_smaller_than_a_block_says_why_not():
    assert why_not(Block(4, 8), weight(16, 2, 2, 1)) == "is 16x4, smaller than a block of 4x8"
    assert why_not(Block(1, 10**12), weight(16, 4)).startswith("is 16x4, smaller")
    assert why_not(Block(4, 8), weight(5, 9)) == ""
