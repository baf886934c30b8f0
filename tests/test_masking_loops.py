"""Masks compared with plain Python, one sample and position at a time, with the same random numbers (method 2)."""

import collections
import itertools
import math

import numpy as np
import pytest
from scipy import stats

from d2v_fast.masking import (
    BlockMask,
    Draws,
    ExactBlockMask,
    RandomMask,
    SpanMask,
    TokenMask,
    _normal,
    _poisson,
    _splitmix,
    visible_positions,
)
from tests.test_masking import VOCABULARY, every_mask, runs

GOLDEN = 0x9E3779B97F4A7C15


def smallest(scores, places, count):
    """The `count` positions with the smallest scores."""
    return sorted(places, key=lambda place: scores[place])[: max(count, 0)]


# Random numbers


def test_the_generator_is_the_published_one():
    """The first outputs of SplitMix64 for the seed 1234567."""
    states = np.uint64(1234567) + np.arange(1, 6, dtype=np.uint64) * np.uint64(GOLDEN)
    expected = [6457827717110365317, 3203168211198807973, 9817491932198370423, 4593380528125082431, 16408922859458223821]
    assert _splitmix(states).tolist() == expected


def mixed(x):
    x = x % 2**64
    x = (x ^ (x >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    x = (x ^ (x >> 27)) * 0x94D049BB133111EB % 2**64
    return x ^ (x >> 31)


@pytest.mark.parametrize("seed, epoch, stream", [(0, 0, 0), (3, 5, 2), (-3, 1, -1), (2**63, 10**6, 7)])
def test_a_number_depends_on_seed_epoch_sample_view_and_stream_alone(seed, epoch, stream):
    samples = [0, 7, 10**12]
    found = Draws(seed, epoch, samples, views=3).uniform(stream, 4, 2)
    assert found.shape == (9, 4, 2)
    for row, numbers in enumerate(found):
        key = samples[row // 3]
        for part in (seed, epoch, stream):
            key = mixed(key + part * GOLDEN + GOLDEN)
        if view := row % 3:
            key = mixed(~key + view * GOLDEN)
        assert numbers.ravel().tolist() == [(mixed(key + place * GOLDEN) >> 11) / 2**53 for place in range(1, 9)]


def test_augmentations_draw_from_a_generator_of_seed_epoch_and_sample():
    found = Draws(-3, 5, [4, 9]).generator(1)
    assert found.random(3).tolist() == np.random.default_rng([2**64 - 3, 5, 9]).random(3).tolist()


def test_no_stream_is_read_twice():
    """Two uses of the same numbers would depend on each other."""
    streams = []

    class Counted(Draws):
        def uniform(self, stream, *shape):
            streams.append(stream)
            return super().uniform(stream, *shape)

    draws = Counted(0, 0, range(20))
    masks = every_mask(draws)
    for _ in range(16):
        next(masks)
        assert len(streams) == len(set(streams)) > 0
        streams.clear()
    SpanMask(0.5, 6, same_count="min", dropout=0.2)(draws, 60)
    TokenMask(0.3, 2, 1.0, 0.1)(draws, np.full((20, 60), 9), VOCABULARY)
    assert sorted(streams) == sorted([0, 1, 2, 3, 4, 5] * 2)


def test_normal_deviates_by_hand():
    """Radius √(-2 ln(1 - u)) and angle 2πv."""
    u = np.array([[1 - math.exp(-0.5), 0], [1 - math.exp(-2), 0.5], [1 - math.exp(-2), 1 / 3], [1 - math.exp(-2), 0.75]])
    np.testing.assert_allclose(_normal(u), [1, -2, -1, 0], rtol=0, atol=1e-12)


@pytest.mark.parametrize("rate", [1, 6, 40])
def test_poisson_deviates_are_quantiles(rate):
    u = np.append(np.linspace(0.0005, 0.9995, 1999), 1 - 1e-9)
    assert (_poisson(u, rate) == stats.poisson.ppf(u, rate)).all()


def test_defaults_are_the_published_settings():
    """The settings of speech, images and text of 1.0 and images of 2.0; features that they lack are off (method 2)."""
    assert SpanMask() == SpanMask(0.65, 10, "static", 0.0, 1, True, 0, "none", 0.0, True)
    assert BlockMask() == BlockMask(120, 16, 196, 0.3)
    assert TokenMask() == TokenMask(0.35, 4, 0.0, 0.0, 0.0, False, False, False, "mask_token")
    assert ExactBlockMask() == ExactBlockMask(0.8, 3, 0.07, True, 0.0, True)
    assert RandomMask() == RandomMask(0.6)


# Spans


@pytest.mark.parametrize(
    "settings, shares",
    [
        (dict(length=4), {4: 1}),
        (dict(length=3, length_kind="uniform"), {n: 1 / 6 for n in range(1, 7)}),
        (dict(length=5, length_kind="uniform", length_other=3), {n: 1 / 8 for n in range(3, 11)}),
        (dict(length=2, length_kind="poisson"), {1: 3 * math.exp(-2), 2: 2 * math.exp(-2), 3: 4 / 3 * math.exp(-2)}),
        (dict(length=1, length_kind="normal", length_other=2), {1: stats.norm.cdf(0.25), 2: 0.1747, 3: 0.1210}),
        (dict(length=9, length_kind="normal", length_other=1), {8: 0.2417, 9: 0.3829, 10: 0.2417}),
    ],
)
def test_lengths_have_their_distribution(settings, shares):
    lengths = SpanMask(**settings)._lengths(Draws(0, 0, range(400)), 100)
    assert lengths.min() >= 1
    if sum(shares.values()) > 0.999:
        assert set(np.unique(lengths)) == set(shares)
    for length, share in shares.items():
        assert (lengths == length).mean() == pytest.approx(share, abs=0.012)


SPANS = [
    SpanMask(),
    SpanMask(0.5, 4, last_start=False),
    SpanMask(0.4, 5, length_kind="uniform", length_other=2, min_spans=2),
    SpanMask(0.95, 2, length_kind="poisson"),
    SpanMask(0.3, 3, length_kind="normal", length_other=2, min_spans=0),
]


@pytest.mark.parametrize("mask", SPANS)
def test_spans(mask):
    lengths = [60, 41, 12, 5, 3, 2, 1] * 4
    draws = Draws(1, 2, range(len(lengths)))
    count, start, last, drawn = draws.uniform(0, 1), draws.uniform(2, 60), draws.uniform(3, 60), mask._lengths(draws, 60)
    found = mask(draws, 60, lengths)
    for row, size in enumerate(lengths):
        reach = [min(int(n), max(size - 1, 1)) for n in drawn[row]]
        end = size if mask.last_start else size - 1
        starts = [t for t in range(size) if t == 0 or t + reach[t] <= end]
        spans = max(mask.min_spans, math.floor(mask.prob * size / mask.length + count[row, 0]))
        covered = {t + i for t in smallest(start[row], starts, spans) for i in range(reach[t])} & set(range(size))
        if len(covered) == size:
            covered -= set(smallest(last[row], covered, 1))
        assert set(np.flatnonzero(found[row])) == covered


def test_the_last_frame_of_short_samples_needs_the_last_start():
    for size in (2, 3, 4):
        mask = SpanMask(0.65, 10, last_start=False)(Draws(0, 0, range(50)), size)
        assert mask.any(axis=1).all() and not mask[:, -1].any()


def test_spans_apart_are_uniform_over_all_arrangements():
    mask = SpanMask(0.01, 2, min_spans=2, overlap=False, min_space=1)(Draws(0, 0, range(6000)), 7)
    expected = [{a, a + 1, b, b + 1} for a in range(7) for b in range(a + 3, 6)]
    found = collections.Counter(frozenset(np.flatnonzero(row).tolist()) for row in mask)
    assert found.keys() == set(map(frozenset, expected)) and len(expected) == 6
    assert all(count / 6000 == pytest.approx(1 / 6, abs=0.02) for count in found.values())


def test_spans_apart_that_do_not_fit_are_dropped():
    """One position stays visible, so two spans of 3 need 7 positions."""
    mask = SpanMask(0.99, 3, overlap=False)(Draws(0, 0, range(60)), 8, [6, 7, 8] * 20)
    assert set(mask[::3].sum(axis=1)) == {3} and set(mask[1::3].sum(axis=1)) == {6}
    spaced = SpanMask(0.99, 3, overlap=False, min_space=1)(Draws(0, 0, range(60)), 8, [7, 8, 8] * 20)
    assert set(spaced[::3].sum(axis=1)) == {3} and set(spaced[1::3].sum(axis=1)) == {6}


def test_spans_apart_have_their_lengths_in_order():
    mask = SpanMask(0.5, 3, length_kind="uniform", overlap=False, min_space=1)
    draws = Draws(0, 0, range(200))
    lengths, count = np.minimum(mask._lengths(draws, 30), 29), draws.uniform(0, 1)[:, 0]
    for row, masked in enumerate(mask(draws, 30)):
        spans, size = math.floor(0.5 * 30 / 3 + count[row]), 30
        while sum(lengths[row, :spans]) + spans - 1 >= size:
            spans -= 1
        assert list(runs(masked)) == list(lengths[row, :spans])


# Blocks


@pytest.mark.parametrize(
    "mask, grid",
    [
        (BlockMask(), (14, 14)),
        (BlockMask(30, 4, 20), (6, 10)),
        (BlockMask(40, 12, 8, 0.6), (8, 12)),  # later blocks must be smaller than min_area
        (BlockMask(60, 1, 60), (6, 10)),
        (BlockMask(16, 1, 16), (4, 4)),  # masks everything, then leaves a patch
        (BlockMask(8, 5, 8), (3, 3)),  # many tries fail
    ],
)
def test_blocks_of_beit(mask, grid):
    draws, (high, wide) = Draws(4, 1, range(30)), grid
    found, last = mask(draws, grid).reshape(-1, high, wide), draws.uniform(-1, high * wide)
    for row in range(30):
        expected, attempt, failures = np.zeros(grid, dtype=bool), 0, 0
        while expected.sum() < mask.count and failures < 10:
            size, ratio, down, right = draws.uniform(attempt, 4)[row]
            attempt, failures = attempt + 1, failures + 1
            room = min(mask.count - expected.sum(), mask.max_area)
            area = mask.min_area + size * (room - mask.min_area)
            aspect = np.exp((2 * ratio - 1) * -math.log(mask.min_aspect))
            h, w = round(np.sqrt(area * aspect)), round(np.sqrt(area / aspect))
            if h >= high or w >= wide:
                continue
            top, left = math.floor(down * (high - h + 1)), math.floor(right * (wide - w + 1))
            block = np.zeros(grid, dtype=bool)
            block[top : top + h, left : left + w] = True
            if 0 < (block & ~expected).sum() <= room:
                expected, failures = expected | block, 0
        if expected.all():
            expected.flat[last[row].argmin()] = False
        assert (found[row] == expected).all()


@pytest.mark.parametrize("length, grid, lengths", [(3, (2, 9), None), (5, (4,), None), (3, (40,), [40, 17, 4])])
def test_exact_blocks_in_short_grids_and_padded_samples(length, grid, lengths):
    """A side shorter than the block limits the block; blocks are clipped at the end of the sample."""
    mask, total = ExactBlockMask(0.9, length, 0.2, inverse=False, dropout=0.5), math.prod(grid)
    draws, sizes = Draws(2, 1, range(3)), np.array(lengths or [total] * 3)
    found = mask._blocks(draws, grid, sizes)
    for row, size in enumerate(sizes):
        seeds, expected = int(size * (1.1 / math.prod(min(length, side) for side in grid)) * 1.5), np.zeros(grid, dtype=bool)
        sides = grid if lengths is None else (size,)
        for number in draws.uniform(0, total)[row, :seeds]:
            centre = np.unravel_index(int(number * size), grid)
            for offset in np.ndindex(*(length,) * len(grid)):
                cell = [c - length // 2 + o for c, o in zip(centre, offset, strict=True)]
                expected[tuple(min(max(c, 0), side - 1) for c, side in zip(cell, sides, strict=True))] = True
        assert (found[row] == expected).all()
        assert seeds > 0


@pytest.mark.parametrize("inverse, counts", [(False, [7, 4, 1, 0]), (True, [8, 5, 1, 0])])
@pytest.mark.parametrize("dropout", [0.0, 0.5])
def test_exact_counts_of_padded_samples(inverse, counts, dropout):
    """.6 of 12, 7, 2 and 1 positions, or all but .4 of them; one stays visible."""
    mask = ExactBlockMask(0.6, 2, 0.05, inverse, dropout)(Draws(0, 0, range(4)), 12, [12, 7, 2, 1])
    assert mask.sum(axis=1).tolist() == counts
    assert not mask[1, 7:].any() and not mask[2, 2:].any()


@pytest.mark.parametrize("settings, count", [(dict(inverse=False, dropout=0.2), 4), (dict(prob=0.75, adjust=0.2), 2)])
def test_tiles(settings, count):
    """int(6 · .6 · 1.2) or int(6 · .45) of 3 × 2 tiles; those at the border are cut."""
    mask = ExactBlockMask(**dict(prob=0.5, length=2, adjust=0.1, overlap=False) | settings)
    found = mask._tiles(Draws(0, 0, range(300)), (5, 3), np.full(300, 15)).reshape(300, 5, 3)
    for row in found:
        assert row[::2, ::2].sum() == count
        assert all(row[i, j] == row[i - i % 2, j - j % 2] for i, j in np.ndindex(5, 3))
    assert np.abs(found[:, ::2, ::2].mean(0) - count / 6).max() < 0.1


def test_random_positions_of_padded_samples():
    """floor(.4 · T) positions, and at least one, stay visible."""
    draws, lengths = Draws(0, 0, range(6)), [20, 11, 5, 3, 2, 1]
    scores, found = draws.uniform(0, 20), RandomMask(0.6)(draws, 20, lengths)
    assert found.sum(axis=1).tolist() == [12, 7, 3, 2, 1, 0]
    for row, (size, count) in enumerate(zip(lengths, found.sum(axis=1), strict=True)):
        assert set(np.flatnonzero(found[row])) == set(smallest(scores[row], range(size), count))


# Tokens


@pytest.mark.parametrize(
    "mask",
    [
        TokenMask(),
        TokenMask(0.15, 1, random_prob=0.1, keep_prob=0.1, keep_special=True),
        TokenMask(0.5, 2, 1.5, random_prob=0.3, keep_prob=0.3, frequency_weighted=True, loss_on="selected"),
        TokenMask(0.4, 2, whole_words=True, random_prob=0.2, keep_special=True, loss_on="selected"),
        TokenMask(0.99, 1, whole_words=True, keep_prob=0.2),
        TokenMask(0.9, 1, keep_special=True),
        TokenMask(0.1, 1, 2.0),
    ],
)
def test_tokens(mask):
    lengths = [50, 33, 9, 4, 2, 1] * 5
    ids = np.random.default_rng(0).integers(0, 60, (len(lengths), 50))
    draws = Draws(1, 2, range(len(lengths)))
    shapes = [(1,), (50, 2), (50,), (50,), (50,), (50,)]
    count, deviates, start, last, choice, other = (draws.uniform(stream, *shape) for stream, shape in enumerate(shapes))
    weights = [0.0 if VOCABULARY.special[i] else VOCABULARY.counts[i] if mask.frequency_weighted else 1 for i in range(60)]
    sources, masks = mask(draws, ids, VOCABULARY, lengths)
    for row, size in enumerate(lengths):
        begins = [t for t in range(size) if t == 0 or not mask.whole_words or not VOCABULARY.continues[ids[row, t]]]
        units = [range(a, b) for a, b in zip(begins, [*begins[1:], size], strict=True)]
        spans = math.floor(mask.prob * len(units) / mask.length + count[row, 0])
        selected = set()
        for unit in smallest(start[row], range(len(units)), spans):
            length = mask.length
            if mask.length_std:
                length = max(0, round(mask.length + mask.length_std * float(_normal(deviates[row, unit]))))
            selected |= {t for each in units[unit : unit + length] for t in each}
        allowed = {t for t in range(size) if not (mask.keep_special and VOCABULARY.special[ids[row, t]])}
        selected &= allowed
        if selected == allowed:
            selected -= set(smallest(last[row], allowed, 1))
        source, scored = ids[row].copy(), np.zeros(50, dtype=bool)
        for t in selected:
            scored[t] = True
            if choice[row, t] < mask.random_prob:
                bound = other[row, t] * sum(weights)
                source[t] = next(i for i, total in enumerate(itertools.accumulate(weights)) if total > bound)
            elif choice[row, t] >= mask.random_prob + mask.keep_prob:
                source[t] = VOCABULARY.mask_id
                continue
            scored[t] = mask.loss_on == "selected"
        assert (sources[row] == source).all() and (masks[row] == scored).all()


def test_spans_of_tokens_may_be_empty():
    """With two spans of length round(N(1, 2²)), both are empty in Φ(-¼)² of the rows."""
    mask = TokenMask(0.02, 1, 2.0)(Draws(0, 0, range(3000)), np.full((3000, 100), 9), VOCABULARY)[1]
    assert (~mask.any(axis=1)).mean() == pytest.approx(stats.norm.cdf(-0.25) ** 2, abs=0.02)


def test_random_tokens_are_uniform():
    ids = np.full((500, 64), 9)
    source, selected = TokenMask(0.9, 1, random_prob=1.0, loss_on="selected")(Draws(0, 0, range(500)), ids, VOCABULARY)
    shares = np.bincount(source[selected], minlength=60) / selected.sum()
    assert (shares[:5] == 0).all() and np.abs(shares[5:] - 1 / 55).max() < 0.004


# Views


@pytest.mark.parametrize("padded", [False, True])
def test_visible_positions(padded):
    rng = np.random.default_rng(0)
    mask = rng.random((3, 4, 12)).argsort(axis=2) < 5
    padding = np.arange(12) >= np.array([12, 9, 8])[:, None] if padded else None
    if padded:
        mask &= ~padding[:, None]
    found = visible_positions(mask, padding)
    rows = [[t for t in range(12) if not mask[b, m, t] and not (padded and padding[b, t])] for b in range(3) for m in range(4)]
    width = max(map(len, rows))
    assert found.shape == (12, width)
    for row, expected in enumerate(rows):
        assert found[row, : len(expected)].tolist() == expected
        assert all(padding[row // 4, t] for t in found[row, len(expected) :])
