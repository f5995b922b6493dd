"""The algebra of channels: sums, products and index maps, without any network."""

import itertools

import numpy as np
import pytest

from secateur.graph.labels import Labels, concatenate

WHY = "the test"


def groups(labels, *dims):
    """Which indices share all their atoms, as lists of (dimension, index) pairs."""
    found = {}
    for d, dim in enumerate(dims):
        for i, column in enumerate(labels.resolve(dim).T.tolist()):
            found.setdefault(tuple(sorted(set(column) - {0})), []).append((d, i))
    return sorted(found.values())


def frozen(labels):
    atoms = [labels.resolve(dim).ravel() for dim, _ in labels.freezes]
    return set(np.concatenate(atoms).tolist()) - {0} if atoms else set()


def test_united_dimensions_live_and_die_index_by_index():
    labels = Labels()
    a, b, c = labels.fresh(3), labels.fresh(3), labels.fresh(3)
    labels.unite(a, b, WHY)
    labels.unite(c, b[:, ::-1], WHY)
    assert groups(labels, a, b, c) == [
        [(0, 0), (1, 0), (2, 2)],
        [(0, 1), (1, 1), (2, 1)],
        [(0, 2), (1, 2), (2, 0)],
    ]


def test_a_chain_of_unions_ends_in_one_atom_whatever_the_order():
    labels = Labels()
    ring = labels.fresh(1000)
    labels.unite(ring, np.roll(ring, 1, axis=1), WHY)
    assert len(np.unique(labels.resolve(ring))) == 1


def test_size_one_has_no_labels():
    assert Labels().fresh(1) is None
    assert Labels().fresh(0) is None


def test_cat_is_a_sum():
    labels = Labels()
    a, b, joined = labels.fresh(2), labels.fresh(3), labels.fresh(5)
    labels.unite(concatenate([a, b], [2, 3]), joined, WHY)
    assert groups(labels, joined, a, b)[0] == [(0, 0), (1, 0)]
    assert not frozen(labels)


def test_cat_with_something_fixed_freezes_only_what_meets_it():
    labels = Labels()
    a, weight = labels.fresh(2), labels.fresh(5)
    labels.unite(concatenate([None, a], [3, 2]), weight, WHY)
    assert frozen(labels) == set(labels.resolve(weight)[0, :3].tolist())


def test_splitting_makes_a_product_everywhere_the_axis_is_used():
    labels = Labels()
    rows = labels.fresh(6)
    heads, width = labels.split(rows, [2, 3], WHY)
    again = labels.resolve(rows)
    assert again.shape == (2, 6)
    merged = labels.resolve(labels.merge([heads, width], [2, 3]))
    assert (merged == again).all()


def test_splitting_twice_the_same_way_gives_the_same_parts():
    labels = Labels()
    rows = labels.fresh(12)
    first = labels.split(rows, [3, 4], WHY)
    second = labels.split(rows, [3, 4], WHY)
    assert groups(labels, first[0]) == groups(labels, second[0])
    assert (labels.resolve(first[1]) == labels.resolve(second[1])).all()


def test_two_groupings_find_their_common_refinement():
    """12 = 3 x 4 = 6 x 2 refine to 3 x 2 x 2."""
    labels = Labels()
    a, b = labels.fresh(12), labels.fresh(12)
    labels.split(a, [3, 4], WHY)
    labels.split(b, [6, 2], WHY)
    labels.unite(a, b, WHY)
    assert not frozen(labels)
    resolved = labels.resolve(a)
    assert (resolved == labels.resolve(b)).all()
    assert len(np.unique(resolved)) == 3 + 2 + 2


def test_groupings_without_a_common_refinement_freeze():
    """6 = 2 x 3 = 3 x 2: no product of both shapes exists."""
    labels = Labels()
    a = labels.fresh(6)
    labels.split(a, [2, 3], WHY)
    labels.split(a, [3, 2], WHY)
    left = set(labels.resolve(a).ravel().tolist()) - {0} - frozen(labels)
    assert len(left) == 0 or len({tuple(c) for c in labels.resolve(a).T.tolist()}) == 1


def test_an_outer_product_with_itself_needs_both_indices():
    labels = Labels()
    a = labels.fresh(3)
    square = labels.resolve(labels.merge([a, a], [3, 3]))
    assert set(square[:, 1]) == {*a[0, :2].tolist()}
    assert (square[:, 0] == [0, a[0, 0]]).all()


def test_reshape_merges_and_splits_the_smallest_runs():
    labels = Labels()
    channels = labels.fresh(8)
    flat = labels.reshape([None, channels, None, None], (5, 8, 3, 3), (5, 72), WHY)
    assert flat[0] is None
    assert flat[1].shape[1] == 72
    back = labels.reshape(flat, (5, 72), (5, 8, 9), WHY)
    assert (labels.resolve(back[1]) == labels.resolve(channels)).all()
    assert back[2] is None


@pytest.mark.parametrize(("old", "new"), [((2, 3), (6, 1)), ((6, 1), (1, 6)), ((1, 1), (1,)), ((4,), (2, 1, 2))])
def test_reshape_with_ones(old, new):
    labels = Labels()
    out = labels.reshape([labels.fresh(n) for n in old], old, new, WHY)
    assert [1 if d is None else d.shape[1] for d in out] == list(new)


def test_the_first_reason_is_kept():
    labels = Labels()
    a = labels.fresh(2)
    labels.freeze(a, "first")
    labels.freeze(a, "second")
    assert [why for _, why in labels.freezes] == ["first", "second"]


def test_a_product_that_would_contain_itself_freezes_instead_of_looping():
    labels = Labels()
    a, b = labels.fresh(2), labels.fresh(2)
    both = np.concatenate([a, b])
    labels.unite(both, a, WHY)
    assert set(b.ravel().tolist()) <= frozen(labels)


def test_many_small_unions_stay_fast_enough_to_finish():
    labels = Labels()
    dims = [labels.fresh(512) for _ in range(200)]
    for a, b in itertools.pairwise(dims):
        labels.unite(a, b, WHY)
    assert (labels.resolve(dims[-1]) == labels.resolve(dims[0])).all()
