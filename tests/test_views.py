"""Several masked views of a sample: their counts, their dependences, and the batches that data sets pass to the model."""

import dataclasses

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from d2v_fast import Data2Vec, LossConfig, TargetsConfig, build_encoder
from d2v_fast.data.audio import AudioData
from d2v_fast.data.text import TextData
from d2v_fast.data.vision import ImageData
from d2v_fast.decoders import ConvDecoder
from d2v_fast.masking import Draws, ExactBlockMask, RandomMask, visible_positions
from tests.models import CONFIGS
from tests.test_data import RATE, paragraphs, write_wave

PUBLISHED = {  # method 2.5: mask, grid, seeds, visible, masked
    "image base": (ExactBlockMask(0.8, 3, 0.07), (14, 14), 5, 39, 157),
    "image large, huge": (ExactBlockMask(0.75, 3, 0.1), (14, 14), 7, 49, 147),
    "image huge14": (ExactBlockMask(0.75, 3, 0.1), (16, 16), 9, 64, 192),
    "audio base": (ExactBlockMask(0.5, 5, 0.05, inverse=False), 749, 82, 375, 374),
    "audio large": (ExactBlockMask(0.55, 5, 0.1, inverse=False), 749, 97, 338, 411),
}
MASKS = {
    "blocks": ExactBlockMask(0.5, 5, 0.05, inverse=False),
    "inverse blocks": ExactBlockMask(0.7, 3, 0.1),
    "random": RandomMask(0.48),
}


@dataclasses.dataclass(frozen=True)
class Counting(Draws):
    """Draws that record how many random numbers were requested, by stream."""

    asked: dict = dataclasses.field(default_factory=dict)

    def uniform(self, stream, *shape):
        self.asked[stream] = shape
        return super().uniform(stream, *shape)


class TestCounts:
    @pytest.mark.parametrize("name", PUBLISHED)
    def test_the_published_numbers_hold_in_every_view(self, name):
        mask, grid, seeds, visible, masked = PUBLISHED[name]
        draws = Counting(0, 3, range(40), views=16)
        found = mask(draws, grid)
        assert found.shape == (640, visible + masked)
        assert (found.sum(1) == masked).all() and ((~found).sum(1) == visible).all()
        assert draws.asked[0] == (seeds,)

    def test_seeds_are_rounded_in_the_order_of_the_specification(self):
        """Method 2.5: 180 · (.35 / 9) is a little more than 7 in floating point, or a little less, by its order."""
        for inverse, prob in ((False, 0.25), (True, 0.75)):
            draws = Counting(0, 0, range(2), views=2)
            ExactBlockMask(prob, 3, 0.1, inverse=inverse)(draws, (12, 15))
            assert draws.asked[0] == (int(180 * ((0.25 + 0.1) / 3**2) * (1 + 0.0)),)

    @given(st.integers(1, 300), st.floats(0.05, 0.95), st.booleans())
    def test_any_length(self, size, prob, inverse):
        """Method 2.5 and 2.4, with at least one visible position."""
        blocks = ExactBlockMask(prob, 3, 0.1, inverse=inverse)(Draws(1, 2, [3, 4], 3), size)
        kept = int(size * (1 - prob))
        masked = min(size - kept if inverse else int(size * prob), size - 1)
        assert (blocks.sum(1) == masked).all()
        assert (RandomMask(prob)(Draws(1, 2, [3, 4], 3), size).sum(1) == size - max(int(np.floor(size * (1 - prob))), 1)).all()

    def test_blocks_are_what_is_visible_only_if_inverse(self):
        """With inverse, visible positions cluster in blocks; otherwise masked positions do."""
        for inverse in (True, False):
            mask = ExactBlockMask(0.75 if inverse else 0.25, 3, 0.1, inverse=inverse)
            found = mask(Draws(0, 0, range(300), 2), (14, 14)).reshape(-1, 14, 14)
            drawn = ~found if inverse else found
            assert drawn.mean() == pytest.approx(0.25, abs=0.003)
            together = (drawn[:, 1:] & drawn[:, :-1]).mean() / drawn.mean()
            assert together > 0.6


class TestDependence:
    @pytest.mark.parametrize("name", MASKS)
    def test_on_seed_epoch_sample_and_view_alone(self, name):
        """Masks do not depend on the rest of the batch, its order, lengths or size, nor on the number of views."""
        mask, lengths = MASKS[name], {7: 40, 1: 33, 90_001: 21, 4: 40}

        def masks(samples, views=5, seed=3, epoch=6):
            sizes = np.repeat([lengths[s] for s in samples], views)
            found = mask(Draws(seed, epoch, samples, views), int(sizes.max()), sizes).reshape(len(samples), views, -1)
            return {s: row[:, : lengths[s]] for s, row in zip(samples, found, strict=True)}

        whole = masks([7, 1, 90_001, 4])
        for samples in ([4, 90_001, 1, 7], [1], [90_001, 7], [1, 4]):
            for sample, row in masks(samples).items():
                assert (row == whole[sample]).all()
        for sample in lengths:
            single = mask(Draws(3, 6, [sample]), lengths[sample])
            assert (whole[sample][0] == single[0]).all()
            assert (masks([sample], views=2)[sample] == whole[sample][:2]).all()
            rows = [
                row.tobytes() for other in (dict(), dict(seed=4), dict(epoch=7)) for row in masks([sample], **other)[sample]
            ]
            assert len(set(rows)) == 15
        assert not (whole[7][0] == whole[4][0]).all()

    @pytest.mark.parametrize("name", MASKS)
    def test_views_are_independent(self, name):
        found = MASKS[name](Draws(0, 0, range(400), 4), 60).reshape(400, 4, 60).astype(float)
        share = found.mean()
        for i in range(4):
            # The shares, and how often two views, or views of two samples, mask the same position.
            assert found[:, i].mean() == pytest.approx(share, abs=1e-12)
            for j in range(i):
                together = (found[:, i] * found[:, j]).mean()
                assert together == pytest.approx((found[:, i].mean(0) * found[:, j].mean(0)).mean(), abs=0.01)
            assert (found[1:, i] * found[:-1, (i + 1) % 4]).mean() == pytest.approx(share**2, abs=0.02)


class TestVisiblePositions:
    @settings(deadline=None, max_examples=80)
    @given(
        st.sampled_from(sorted(MASKS)),
        st.lists(st.integers(2, 40), min_size=1, max_size=5),
        st.integers(1, 4),
        st.integers(0, 99),
    )
    def test_against_a_plain_loop(self, name, lengths, views, seed):
        """Each row has its visible positions in ascending order, then its first padding; none is masked or repeated."""
        size, sizes = max(lengths), np.repeat(lengths, views)
        mask = MASKS[name](Draws(seed, 0, range(len(lengths)), views), size, sizes).reshape(len(lengths), views, size)
        padding = np.arange(size) >= np.array(lengths)[:, None]
        rows = []
        for b, length in enumerate(lengths):
            for m in range(views):
                rows.append(([t for t in range(length) if not mask[b, m, t]], list(range(length, size))))
        wanted = max(len(seen) for seen, _ in rows)
        found = visible_positions(mask, padding)
        assert found.dtype == np.int64
        assert found.tolist() == [seen + pad[: wanted - len(seen)] for seen, pad in rows]
        if not padding.any():
            assert (visible_positions(mask) == found).all()

    def test_what_cannot_be_is_named(self):
        mask = np.zeros((2, 2, 4), dtype=bool)
        mask[0, 1, 2] = True
        with pytest.raises(ValueError, match="found views with 3 to 4 visible positions, expected the same number in all"):
            visible_positions(mask)
        mask[:] = True
        with pytest.raises(ValueError, match="found a view without visible positions"):
            visible_positions(mask)


# Data sets


def images(mask, views):
    data = ImageData(mask=mask, views=views, seed=5, image_size=16, crop_scale=(0.5, 1.0))
    encoder = build_encoder("data2vec2-vision", config=CONFIGS["vit"])
    data.fit_to(encoder)
    return data, encoder, 2


@pytest.fixture
def waves(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(6):
        write_wave(tmp_path / f"{i}.wav", 0.1 * rng.normal(size=2000 + 333 * i))
    return str(tmp_path)


def speech(mask, views, waves, **given):
    data = AudioData(mask=mask, views=views, seed=5, path=waves, min_seconds=0.05, max_seconds=3000 / RATE, **given)
    encoder = build_encoder("data2vec2-audio", config=CONFIGS["data2vec-audio"])
    data.fit_to(encoder)
    return data, encoder, 1


def text(mask, views, tmp_path, **given):
    (tmp_path / "corpus.txt").write_text("\n".join(paragraphs(40, 12) + paragraphs(20, 5, seed=1)))
    given = dict(block_size=16, vocab_size=300) | given
    data = TextData(mask=mask, views=views, seed=5, path=str(tmp_path / "corpus.txt"), **given)
    own = dict(vocab_size=data.tokens["vocab_size"], pad_token_id=data.tokens["pad_token_id"])
    encoder = build_encoder("roberta", config=CONFIGS["roberta"] | own)
    data.fit_to(encoder)
    return data, encoder, 1


DATA = {
    "images": lambda mask, views, waves, tmp_path: images(mask, views),
    "speech, cropped": lambda mask, views, waves, tmp_path: speech(mask, views, waves, crop=True, channel_prob=0.1),
    "speech, padded": lambda mask, views, waves, tmp_path: speech(mask, views, waves, crop=False),
    "text, packed": lambda mask, views, waves, tmp_path: text(mask, views, tmp_path, cross_documents=True),
    "text, documents": lambda mask, views, waves, tmp_path: text(mask, views, tmp_path, cross_documents=False),
}
KINDS = {"blocks": ExactBlockMask(0.6, 2, 0.05, inverse=False), "inverse": ExactBlockMask(0.6, 2), "random": RandomMask(0.5)}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", DATA)
def test_a_batch_is_of_one_piece(name, kind, waves, tmp_path):
    """Sources, masks, visible positions, index and padding of data sets, and the model that takes them."""
    mask = KINDS[kind]
    data, encoder, axes = DATA[name](mask, 3, waves, tmp_path)
    batch = data.__getitems__([(2, i) for i in range(5)])
    assert batch["samples"] == list(range(5)) and not batch["broken"]
    found, visible = batch["mask"], batch["visible"]
    with torch.no_grad():
        length = encoder.eval().embed(batch["source"]).shape[1]
    assert found.shape == (5, 3, length) and found.dtype == torch.bool
    assert "target" not in batch and "target_padding_mask" not in batch
    padding = batch.get("padding_mask", torch.zeros(5, length, dtype=torch.bool))
    assert ("padding_mask" in batch) == (name in ("speech, padded", "text, documents")) == bool(padding.any())
    sizes = (~padding).sum(1)
    if name == "images":
        wanted = KINDS[kind](Draws(5, 2, range(5), 3), (4, 4)).reshape(5, 3, 16)
    else:
        wanted = KINDS[kind](Draws(5, 2, range(5), 3), length, sizes.repeat_interleave(3).numpy()).reshape(5, 3, length)
    assert np.array_equal(found.numpy(), wanted)
    assert not (found & padding[:, None]).any()
    assert torch.equal(batch["index"], torch.tensor([i for i, each in enumerate(found.flatten().tolist()) if each]))
    assert np.array_equal(visible.numpy(), visible_positions(found.numpy(), padding.numpy()))
    counts = (~found & ~padding[:, None]).sum(-1)
    assert (counts == counts[:, :1]).all() and visible.shape == (15, int(counts.max()))
    if name == "speech, cropped":
        lengths = [min(2000 + 333 * i, 3000) for i in range(5)]
        assert batch["source"].shape == (5, min(lengths)) and batch["channel_mask"].shape == (5, encoder.hidden_size)
        assert length == encoder.positions(min(lengths)) < encoder.positions(max(lengths))
    if name.startswith("text"):
        assert not (batch["source"] == data.vocabulary.mask_id).any(), "the teacher has to see all of it"
        assert torch.equal(batch["source"] == data.tokenizer.pad_token_id, padding)

    decoder = ConvDecoder(32, axes, width=16, kernel=3, layers=2, groups=4)
    targets, loss = TargetsConfig(top_k=2, norm="instance"), LossConfig(cls_weight=axes - 1)
    model = Data2Vec(encoder, decoder, targets=targets, loss=loss).eval()
    given = {k: v for k, v in batch.items() if k not in ("epoch", "samples", "broken")}
    losses = []
    for left_out in ((), ("visible",), ("index",), ("visible", "index")):
        torch.manual_seed(0)
        losses.append(model(**{k: v for k, v in given.items() if k not in left_out}).loss)
    assert losses[0].isfinite() and all(torch.equal(loss, losses[0]) for loss in losses)


@pytest.mark.parametrize("name", DATA)
def test_a_sample_is_the_same_in_any_batch(name, waves, tmp_path):
    """Masks are too, and the first view equals the mask without views (for speech only if cut to the same length)."""
    data, *_ = DATA[name](KINDS["blocks"], 3, waves, tmp_path)
    one, *_ = DATA[name](KINDS["blocks"], None, waves, tmp_path)
    whole, other = data.__getitems__([(1, i) for i in (0, 3, 1, 2)]), data.__getitems__([(1, i) for i in (2, 0)])
    single = one.__getitems__([(1, i) for i in (0, 3, 1, 2)])
    assert torch.equal(whole["mask"][:, 0], single["mask"])
    short = min(whole["mask"].shape[-1], other["mask"].shape[-1])
    for a, b in ((3, 0), (0, 1)):
        assert torch.equal(whole["mask"][a, :, :short], other["mask"][b, :, :short])
        assert not whole["mask"][a, :, short:].any() and not other["mask"][b, :, short:].any()
    later = data.__getitems__([(2, i) for i in (0, 3, 1, 2)])
    assert not torch.equal(later["mask"], whole["mask"])
    for view in range(1, 3):
        assert not torch.equal(whole["mask"][:, view], whole["mask"][:, 0])


@pytest.mark.parametrize("name", ["images", "speech, padded"])
def test_a_broken_sample_takes_its_views_along(name, waves, tmp_path):
    data, _, _ = DATA[name](KINDS["random"], 3, waves, tmp_path)
    whole = data.__getitems__([(1, i) for i in (0, 1, 2)])
    read = data.source.read

    def broken(index):
        if index == 1:
            raise OSError("damaged")
        return read(index)

    data.source.read = broken
    batch = data.__getitems__([(1, i) for i in (0, 1, 2)])
    assert batch["samples"] == [0, 2] and [index for index, _ in batch["broken"]] == [1]
    assert torch.equal(batch["mask"], whole["mask"][[0, 2]])
    assert len(batch["visible"]) == 6 and batch["visible"].max() < batch["mask"].shape[-1]
