import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast.masking import BlockMask, Draws, ExactBlockMask, RandomMask, SpanMask, TokenMask, Vocabulary

BATCH = range(400)
VOCABULARY = Vocabulary(
    size=60,
    mask_id=4,
    special=np.arange(60) < 5,
    continues=np.arange(60) % 3 == 0,
    counts=np.where(np.arange(60) == 50, 1000, 1),
)


def runs(row):
    """Lengths of the runs of True."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], row.astype(int), [0]])))
    return edges[1::2] - edges[::2]


def every_mask(draws, size=60, lengths=None):
    """One mask of each kind, (B, size) or a grid of as many patches."""
    ids = np.stack([np.random.default_rng(s).integers(5, 60, size) for s in draws.samples]).repeat(draws.views, axis=0)
    yield SpanMask(0.65, 10)(draws, size, lengths)
    yield SpanMask(0.5, 6, length_kind="normal", length_other=2)(draws, size, lengths)
    yield SpanMask(0.5, 6, length_kind="uniform", length_other=2)(draws, size, lengths)
    yield SpanMask(0.5, 6, length_kind="poisson", dropout=0.2)(draws, size, lengths)
    yield SpanMask(0.4, 5, overlap=False, min_space=2)(draws, size, lengths)
    yield SpanMask(0.9, 2, length_kind="uniform", overlap=False)(draws, size, lengths)
    yield RandomMask(0.6)(draws, size, lengths)
    yield ExactBlockMask(0.5, 5, 0.05, inverse=False)(draws, size, lengths)
    yield ExactBlockMask(0.7, 3, dropout=0.1)(draws, size, lengths)
    yield TokenMask(0.35, 4)(draws, ids, VOCABULARY, lengths)[1]
    yield TokenMask(0.3, 2, whole_words=True, random_prob=0.1, keep_prob=0.1)(draws, ids, VOCABULARY, lengths)[1]
    if lengths is None:
        yield BlockMask(30, 4, 20)(draws, (6, 10))
        yield BlockMask(60, 1, 60)(draws, (6, 10))
        yield ExactBlockMask()(draws, (6, 10))
        yield ExactBlockMask(0.5, 2, inverse=False)(draws, (3, 4, 5))
        yield ExactBlockMask(overlap=False)(draws, (6, 10))


def test_uniform_is_uniform_and_independent():
    u = Draws(0, 0, range(2000)).uniform(0, 50)
    assert u.min() >= 0 and u.max() < 1
    counts = np.histogram(u, 20, (0, 1))[0] / u.size * 20
    assert np.abs(counts - 1).max() < 0.05
    for other in (u[:, 1:], u[1:], Draws(1, 0, range(2000)).uniform(0, 50), Draws(0, 1, range(2000)).uniform(0, 50)):
        shared = u[: other.shape[0], : other.shape[1]]
        assert abs(np.corrcoef(shared.ravel(), other.ravel())[0, 1]) < 0.02
    assert abs(np.corrcoef(u.ravel(), Draws(0, 0, range(2000)).uniform(1, 50).ravel())[0, 1]) < 0.02


def test_several_streams_are_drawn_at_once():
    draws = Draws(3, 5, [7, 9], views=2)
    together = draws.uniform(range(-1, 40), 2, 3)
    assert together.shape == (41, 4, 2, 3)
    assert (together == [draws.uniform(stream, 2, 3) for stream in range(-1, 40)]).all()


def test_masks_are_a_pure_function_of_seed_epoch_and_sample():
    together = list(every_mask(Draws(3, 5, [7, 1, 1_000_000])))
    alone = list(every_mask(Draws(3, 5, [1])))
    for a, b in zip(together, alone, strict=True):
        assert (a[1] == b[0]).all()
    for draws in (Draws(4, 5, [1]), Draws(3, 6, [1]), Draws(3, 5, [2])):
        assert all((a[0] != b[0]).any() for a, b in zip(every_mask(draws), alone, strict=True))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.integers(0, 10**6))
def test_padding_is_never_masked_and_something_stays_visible(lengths, seed):
    size = max(lengths)
    valid = np.arange(size) < np.array(lengths)[:, None]
    draws = Draws(seed, 0, range(len(lengths)))
    same_count = SpanMask(0.9, 6, same_count="max")(draws, size, lengths)
    for mask in (same_count, *every_mask(draws, size, lengths)):
        assert mask.dtype == bool and mask.shape == valid.shape
        assert not (mask & ~valid).any()
        assert (valid & ~mask).any(axis=1).all()


def test_span_coverage():
    # 1 - (1 - p/l)^l is the coverage of independent starts (method 2.1).
    mask = SpanMask(0.65, 10)(Draws(0, 0, range(300)), 1500)
    assert mask.mean() == pytest.approx(0.489, abs=0.01)
    assert SpanMask(0.35, 4)(Draws(0, 0, range(300)), 1500).mean() == pytest.approx(0.307, abs=0.01)


def test_spans_reach_the_last_frame_unless_the_reference_is_wanted():
    ours, theirs = (SpanMask(0.65, 10, last_start=flag)(Draws(0, 0, BATCH), 50) for flag in (True, False))
    assert ours[:, -1].mean() > 0.05 and ours[:, 0].mean() > 0.05
    assert not theirs[:, -1].any() and theirs[:, -2].any()


def test_static_spans_have_their_length_or_are_merged():
    mask = SpanMask(0.3, 7)(Draws(0, 0, BATCH), 200)
    assert min(runs(row).min() for row in mask) == 7


@pytest.mark.parametrize("kind", ["static", "uniform", "poisson"])
@pytest.mark.parametrize("overlap", [True, False])
def test_each_sample_has_its_span(kind, overlap):
    """No matter how short span or sample are."""
    mask = SpanMask(0.01, 3 if kind == "static" else 1, length_kind=kind, overlap=overlap)(Draws(0, 0, range(500)), 3)
    assert mask.any(1).all() and not mask.all(1).any()


def test_number_of_spans_is_rounded_at_random():
    # p·T/l = 3.25 spans: three or four, a quarter of the time four. Far apart spans cover 2 each.
    mask = SpanMask(0.13, 2, overlap=False, min_space=1)(Draws(0, 0, range(4000)), 50)
    spans = np.array([len(runs(row)) for row in mask])
    assert set(spans) == {3, 4} and (spans == 4).mean() == pytest.approx(0.25, abs=0.03)


@pytest.mark.parametrize("overlap", [True, False])
def test_the_number_of_spans_follows_the_unpadded_length(overlap):
    mask = SpanMask(0.2, 1, overlap=overlap)(Draws(0, 0, range(40)), 400, [100, 400] * 20)
    assert set(mask[::2].sum(1)) == {20} and set(mask[1::2].sum(1)) == {80}


def test_at_least_so_many_spans():
    for overlap in (True, False):
        mask = SpanMask(0.01, 1, min_spans=3, overlap=overlap)(Draws(0, 0, BATCH), 100)
        assert set(mask.sum(1)) == {3}


@pytest.mark.parametrize(
    "kind, other, low, high, mean", [("uniform", 2, 2, 12, 7), ("normal", 2, 1, 16, 6), ("poisson", 0, 1, 20, 6)]
)
def test_span_lengths(kind, other, low, high, mean):
    mask = SpanMask(0.06, 6, length_kind=kind, length_other=other, overlap=False, min_space=1)(Draws(0, 0, range(3000)), 100)
    lengths = np.concatenate([runs(row) for row in mask])
    assert lengths.min() >= low and lengths.max() <= high
    assert lengths.mean() == pytest.approx(mean, abs=0.25)


def test_spans_apart_keep_their_distance_and_are_spread_evenly():
    mask = SpanMask(0.3, 5, overlap=False, min_space=3)(Draws(0, 0, range(3000)), 60)
    for row in mask[:300]:
        assert set(runs(row)) == {5}
        edges = np.flatnonzero(np.diff(row.astype(int)))
        gaps = runs(~row)
        assert all(gap >= 3 for gap in gaps[1:-1]) or len(edges) <= 2
    assert mask[:, :5].any(1).mean() == pytest.approx(mask[:, -5:].any(1).mean(), abs=0.04)


@pytest.mark.parametrize("which", ["min", "max"])
def test_same_count(which):
    lengths = [80] * 5 + [60] * 5
    ragged = SpanMask(0.5, 8)(Draws(0, 0, range(10)), 80, lengths)
    equal = SpanMask(0.5, 8, same_count=which)(Draws(0, 0, range(10)), 80, lengths)
    assert set(equal.sum(1)) == {getattr(ragged.sum(1), which)()}
    assert not equal[5:, 60:].any()
    assert (equal <= ragged).all() if which == "min" else (equal >= ragged).all()


def test_dropout_uncovers_its_share():
    before, after = (SpanMask(0.65, 10, dropout=q)(Draws(0, 0, BATCH), 100) for q in (0.0, 0.25))
    assert (after <= before).all()
    assert (after.sum(1) == before.sum(1) - np.round(0.25 * before.sum(1))).all()


def test_blocks_as_published():
    # Method 2.2: at most 120 of 196, mean 119.5, exactly 120 in 69 % of draws, no block across a full side.
    mask = BlockMask()(Draws(0, 0, range(3000)), (14, 14))
    counts = mask.sum(1)
    assert counts.max() == 120 and counts.min() >= 100
    assert counts.mean() == pytest.approx(119.5, abs=0.1)
    assert (counts == 120).mean() == pytest.approx(0.69, abs=0.03)


def test_blocks_over_the_whole_grid_leave_a_patch():
    assert BlockMask(16, 1, 16)(Draws(0, 0, BATCH), (4, 4)).sum(1).max() == 15


def reference_blocks(rng, high, wide, count, min_area, max_area, aspect):
    """Method 2.2, transcribed line by line for one image."""
    mask = np.zeros((high, wide), bool)
    done = 0
    while done < count:
        cap, added = min(count - done, max_area), 0
        for _ in range(10):
            area, ratio = (
                rng.uniform(min_area, cap) if cap > min_area else rng.uniform(cap, min_area),
                np.exp(rng.uniform(np.log(aspect), -np.log(aspect))),
            )
            h, w = round(np.sqrt(area * ratio)), round(np.sqrt(area / ratio))
            if w < wide and h < high:
                top, left = rng.integers(0, high - h + 1), rng.integers(0, wide - w + 1)
                new = h * w - mask[top : top + h, left : left + w].sum()
                if 0 < new <= cap:
                    mask[top : top + h, left : left + w] = True
                    added = new
                    break
        if added == 0:
            break
        done += added
    return mask


@pytest.mark.parametrize("setting", [(40, 4, 30, 0.3), (40, 4, 6, 0.3), (40, 12, 30, 0.9)])
def test_blocks_are_distributed_as_the_sequential_algorithm(setting):
    ours = BlockMask(*setting)(Draws(0, 0, range(4000)), (8, 12)).reshape(-1, 8, 12)
    rng = np.random.default_rng(0)
    theirs = np.stack([reference_blocks(rng, 8, 12, *setting) for _ in range(4000)])
    assert np.abs(ours.mean(0) - theirs.mean(0)).max() < 0.05  # where
    assert ours.sum((1, 2)).mean() == pytest.approx(theirs.sum((1, 2)).mean(), abs=0.15)  # how many
    # How clustered: neighbours that are masked together.
    pairs = [(m[:, :, 1:] & m[:, :, :-1]).sum((1, 2)).mean() for m in (ours, theirs)]
    assert pairs[0] == pytest.approx(pairs[1], rel=0.02)


@pytest.mark.parametrize(
    "setting, grid",
    [((120, 16, 196, 0.3), (14, 14)), ((60, 1, 2, 0.5), (8, 12)), ((40, 12, 30, 0.9), (12, 8)), ((20, 4, 9, 0.05), (5, 5))],
)
def test_blocks_are_those_of_sets_with_the_same_numbers(setting, grid):
    """The reference is method 2.2 with sets; the second setting needs more attempts than are drawn at once."""
    (count, min_area, max_area, min_aspect), (high, wide), draws = setting, grid, Draws(2, 1, range(20), views=2)
    attempts = []
    for row, found in enumerate(BlockMask(*setting)(draws, grid).reshape(-1, *grid)):
        masked, failures, attempt = set(), 0, 0
        while len(masked) < count and failures < 10:
            u = draws.uniform(attempt, 4)[row]
            attempt, failures = attempt + 1, failures + 1
            cap = min(count - len(masked), max_area)
            area, aspect = min_area + u[0] * (cap - min_area), min_aspect ** (1 - 2 * u[1])
            h, w = round((area * aspect) ** 0.5), round((area / aspect) ** 0.5)
            top, left = int(u[2] * (high - h + 1)), int(u[3] * (wide - w + 1))
            new = {(top + y, left + x) for y in range(h) for x in range(w)} - masked
            if h < high and w < wide and 0 < len(new) <= cap:
                masked, failures = masked | new, 0
        assert {(y, x) for y in range(high) for x in range(wide) if found[y, x]} == masked
        attempts.append(attempt)
    assert setting != (60, 1, 2, 0.5) or min(attempts) > 32


def test_random_masks_have_exact_counts_and_no_favourites():
    mask = RandomMask(0.6)(Draws(0, 0, range(4000)), (8, 8))
    assert set(mask.sum(1)) == {39}  # 25 of 64 stay visible, not 25.6
    assert np.abs(mask.mean(0) - mask.mean()).max() < 0.03


def tokens(rows=300, length=64, seed=0):
    ids = np.random.default_rng(seed).integers(5, 60, (rows, length))
    ids[:, 0] = 0
    return ids


def test_text_source_differs_from_the_ids_at_masked_positions_only():
    ids = tokens()
    source, mask = TokenMask()(Draws(0, 0, BATCH[:300]), ids, VOCABULARY)
    assert (source[mask] == VOCABULARY.mask_id).all() and (source[~mask] == ids[~mask]).all()
    assert mask[:, 0].any(), "the reference masks <s> too"


def test_bert_masking_is_80_10_10():
    ids = tokens(2000)
    setting = TokenMask(0.15, 1, random_prob=0.1, keep_prob=0.1, keep_special=True, loss_on="selected")
    source, selected = setting(Draws(0, 0, range(2000)), ids, VOCABULARY)
    assert not selected[:, 0].any()
    share = selected.sum() / ids.size
    assert share == pytest.approx(0.15 * 63 / 64, abs=0.003)
    masked = (source[selected] == VOCABULARY.mask_id).mean()
    kept = (source[selected] == ids[selected]).mean()
    assert masked == pytest.approx(0.8, abs=0.01)
    assert kept == pytest.approx(0.1 + 0.1 / 55, abs=0.01)  # a random token may equal the original
    assert (source[~selected] == ids[~selected]).all()
    assert (source[selected & (source != 4)] >= 5).all(), "a random token is never a special one"
    scored = TokenMask(0.15, 1, random_prob=0.1, keep_prob=0.1, keep_special=True)(Draws(0, 0, range(2000)), ids, VOCABULARY)[1]
    assert (scored == (selected & (source == VOCABULARY.mask_id))).all()


def test_spans_of_tokens_vary_in_length():
    found = {}
    for std in (0.0, 2.0):
        _, mask = TokenMask(0.02, 8, length_std=std)(Draws(0, 0, range(2000)), tokens(2000, 200), VOCABULARY)
        # Exclude spans that touch another one or are cut off at the end.
        found[std] = np.array([length[0] for row in mask if len(length := runs(row)) == 1 and not row[-30:].any()])
    assert set(found[0.0]) == {8}
    assert found[2.0].mean() == pytest.approx(8, abs=0.3) and found[2.0].std() == pytest.approx(2, abs=0.3)


def test_random_tokens_by_frequency():
    ids = tokens(500)
    setting = TokenMask(0.9, 1, random_prob=1.0, frequency_weighted=True, loss_on="selected")
    source, selected = setting(Draws(0, 0, range(500)), ids, VOCABULARY)
    assert (source[selected] == 50).mean() == pytest.approx(1000 / 1054, abs=0.02)


def test_whole_words_are_masked_whole():
    ids = tokens()
    _, mask = TokenMask(0.3, 1, whole_words=True)(Draws(0, 0, BATCH[:300]), ids, VOCABULARY)
    continues = VOCABULARY.continues[ids]
    continues[:, 0] = False
    assert (mask[:, 1:] == mask[:, :-1])[continues[:, 1:]].all()
    assert (mask[:, 1:] != mask[:, :-1])[~continues[:, 1:]].any()
    assert 0.2 < mask.mean() < 0.4


PUBLISHED = {  # method 2.5: settings, grid, drawn before the count is met, masked
    "image base": (ExactBlockMask(0.8, 3, 0.07), (14, 14), 37.5 / 196, 157),
    "image large": (ExactBlockMask(0.75, 3, 0.1), (14, 14), 50.4 / 196, 147),
    "image huge 14": (ExactBlockMask(0.75, 3, 0.1), (16, 16), 65.3 / 256, 192),
    "audio base": (ExactBlockMask(0.5, 5, 0.05, inverse=False), 749, 0.42, 374),
    "audio large": (ExactBlockMask(0.55, 5, 0.1, inverse=False), 749, 0.48, 411),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_blocks_of_data2vec_2(name):
    mask, grid, share, masked = PUBLISHED[name]
    draws = Draws(0, 0, range(1000), views=2)
    assert (mask(draws, grid).sum(axis=1) == masked).all()
    grid = grid if isinstance(grid, tuple) else (grid,)
    drawn = mask._blocks(draws, grid, np.full(2000, np.prod(grid)))
    assert drawn.mean() == pytest.approx(share, rel=0.015)


def test_drawn_blocks_are_those_of_plain_loops():
    """The reference is method 2.5, one position at a time, with the same random numbers."""
    for length, grid in ((3, (6, 9)), (2, (5, 4)), (4, (30,)), (3, (4, 5, 6))):
        mask, draws = ExactBlockMask(0.6, length, 0.1, inverse=False, dropout=0.1), Draws(2, 1, range(5), views=3)
        total = int(np.prod(grid))
        found = mask._blocks(draws, grid, np.full(15, total))
        seeds = int(total * ((0.6 + 0.1) / length ** len(grid)) * 1.1)
        numbers = draws.uniform(0, seeds)
        assert seeds > 1
        for row in range(15):
            expected = np.zeros(grid, dtype=bool)
            for number in numbers[row]:
                rest, centre = int(number * total), []
                for side in reversed(grid):
                    rest, at = divmod(rest, side)
                    centre.insert(0, at)
                for offset in np.ndindex(*(length,) * len(grid)):
                    cell = [c - length // 2 + o for c, o in zip(centre, offset, strict=True)]
                    expected[tuple(min(max(c, 0), side - 1) for c, side in zip(cell, grid, strict=True))] = True
            assert (found[row] == expected).all()


def test_the_exact_count_keeps_blocks_where_it_can():
    few = ExactBlockMask(0.5, 3, -0.3, inverse=False)  # too few are drawn, so all of them stay masked
    many = ExactBlockMask(0.5, 3, 1.0, inverse=False, dropout=0.9)  # too many are drawn, so nothing else is masked
    draws = Draws(0, 0, range(50))
    for mask, inside in ((few, True), (many, False)):
        drawn, found = mask._blocks(draws, (8, 8), np.full(50, 64)).reshape(50, 64), mask(draws, (8, 8))
        assert (found.sum(axis=1) == 32).all()
        assert not ((drawn & ~found) if inside else (found & ~drawn)).any()
    assert (ExactBlockMask(0.5, 3, inverse=True).count(9), ExactBlockMask(0.99, 3).count(9)) == (5, 8)


def test_tiles_do_not_overlap():
    mask = ExactBlockMask(0.5, 2, 0.0, inverse=False, overlap=False)
    found = mask._tiles(Draws(0, 0, range(50)), (4, 6), np.full(50, 24)).reshape(50, 2, 2, 3, 2)
    assert ((found.sum(axis=(2, 4)) == 4).sum(axis=(1, 2)) == 3).all() and (found.sum(axis=(1, 2, 3, 4)) == 12).all()
    assert ExactBlockMask(0.5, 2, overlap=False)(Draws(0, 0, [1]), (5, 5)).shape == (1, 25)


def test_views_are_of_their_own_and_the_first_is_that_of_a_single_view():
    four, one = (list(every_mask(Draws(3, 5, [7, 9], views))) for views in (4, 1))
    for several, single in zip(four, one, strict=True):
        several = several.reshape(2, 4, -1)
        assert (several[:, 0] == single).all()
        assert all((several[:, i] != several[:, j]).any() for i in range(4) for j in range(i))
    again = list(every_mask(Draws(3, 5, [9], 3)))
    for several, fewer in zip(four, again, strict=True):
        assert (several.reshape(2, 4, -1)[1, :3] == fewer).all()


def test_defaults_are_the_published_settings():
    """The settings of data2vec for speech, text and images, and of data2vec 2.0 for images (method 2)."""
    spans, tokens, blocks, exact = SpanMask(), TokenMask(), BlockMask(), ExactBlockMask()
    assert (spans.prob, spans.length) == (0.65, 10) and (tokens.prob, tokens.length) == (0.35, 4)
    assert (blocks.count, blocks.min_area, blocks.min_aspect) == (120, 16, 0.3)
    assert (exact.prob, exact.length, exact.adjust, exact.inverse) == (0.8, 3, 0.07, True)
