"""Masks of data2vec: spans, BEiT blocks, blocks with exact counts, text tokens, random positions (method 2).

Every mask is a pure function of (seed, epoch, sample, view), independent of the batch, the workers and the process, because all
randomness comes from `Draws.uniform`, a counter-based generator. All samplers take a batch and return numpy bool arrays,
True = masked = scored. Padding is on the right and is never masked.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, Literal

import numpy as np

from d2v_fast.choices import Checked, ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, OpenUnitInterval, PositiveInt, Range

Lengths = Sequence[int] | np.ndarray  # of the samples of a batch, (B,)

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_FIRST_MULTIPLIER = np.uint64(0xBF58476D1CE4E5B9)
_SECOND_MULTIPLIER = np.uint64(0x94D049BB133111EB)


def _splitmix(x: np.ndarray) -> np.ndarray:
    """The output function of SplitMix64 (Steele, Lea, Flood 2014): a bijective mix of 64 bits."""
    x = (x ^ (x >> np.uint64(30))) * _FIRST_MULTIPLIER
    x = (x ^ (x >> np.uint64(27))) * _SECOND_MULTIPLIER
    return x ^ (x >> np.uint64(31))


@dataclass(frozen=True)
class Draws:
    """Random numbers for a batch of samples, each with one or more views.

    Row b·views + m depends only on (seed, epoch, samples[b], m) and the stream. View 0 does not depend on the number of views.
    """

    seed: int
    epoch: int
    samples: Sequence[int]
    views: int = 1

    def __len__(self) -> int:
        return len(self.samples) * self.views

    @cached_property
    def _keys(self) -> np.ndarray:
        """The key of each sample, (B,) uint64."""
        key = np.asarray(self.samples, dtype=np.uint64)
        with np.errstate(over="ignore"):
            for part in (self.seed, self.epoch):
                key = _splitmix(key + np.uint64(part % 2**64) * _GOLDEN + _GOLDEN)
        return key

    def uniform(self, stream: int | Sequence[int], *shape: int) -> np.ndarray:
        """Float64 in [0, 1), shape (B·views, *shape), or (streams, B·views, *shape); streams are independent."""
        streams = np.asarray(stream).astype(np.uint64)
        with np.errstate(over="ignore"):
            key = _splitmix(np.add.outer(streams * _GOLDEN, self._keys) + _GOLDEN).ravel()
            later = np.arange(1, self.views, dtype=np.uint64) * _GOLDEN
            key = np.concatenate([key[:, None], _splitmix(~key[:, None] + later)], axis=1).ravel()
            counter = np.arange(1, math.prod(shape) + 1, dtype=np.uint64) * _GOLDEN
            bits = _splitmix(key[:, None] + counter) >> np.uint64(11)
        return (bits * 2.0**-53).reshape(*streams.shape, len(self), *shape)

    def generator(self, row: int) -> np.random.Generator:
        """A numpy generator for one sample, for augmentations that draw from several distributions."""
        return np.random.default_rng([self.seed % 2**64, self.epoch, int(self.samples[row])])


def _choose(scores: np.ndarray, allowed: np.ndarray, count: np.ndarray) -> np.ndarray:
    """Per row, `count` distinct allowed positions chosen uniformly: those with the smallest random scores. (B, T) bool."""
    ranks = np.where(allowed, scores, np.inf).argsort(axis=1, kind="stable").argsort(axis=1, kind="stable")
    return (ranks < count[:, None]) & allowed


def _paint(starts: np.ndarray, lengths: np.ndarray) -> np.ndarray:
    """Union of spans [t, t + lengths[b, t]) over all t with starts[b, t], clipped at the right edge. (B, T) bool."""
    rows, cols = np.nonzero(starts)
    edges = np.zeros((starts.shape[0], starts.shape[1] + 1), dtype=np.int32)
    np.add.at(edges, (rows, cols), 1)
    np.add.at(edges, (rows, np.minimum(cols + lengths[rows, cols], starts.shape[1])), -1)
    return edges[:, :-1].cumsum(axis=1) > 0


def _keep_one_visible(mask: np.ndarray, valid: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """Unmask one random position of each fully masked sample, because a prediction needs something visible."""
    full = (mask | ~valid).all(axis=1)
    return mask & ~(full[:, None] & _choose(scores, valid, np.ones(len(mask), dtype=np.int64)))


def _normal(u: np.ndarray) -> np.ndarray:
    """Standard normal deviates from pairs of uniforms (Box-Muller); u has a trailing axis of 2."""
    return np.sqrt(-2 * np.log1p(-u[..., 0])) * np.cos(2 * np.pi * u[..., 1])


def _poisson(u: np.ndarray, rate: float) -> np.ndarray:
    """Poisson deviates by inversion."""
    k = np.arange(int(rate + 12 * math.sqrt(rate) + 12))
    log_pmf = k * math.log(rate) - rate - np.array([math.lgamma(i + 1) for i in k])
    return np.searchsorted(np.exp(log_pmf).cumsum(), u)


def visible_positions(mask: np.ndarray, padding_mask: np.ndarray | None = None) -> np.ndarray:
    """Visible positions of each view in ascending order, (B·M, V) int64.

    With padding V is the largest number of visible positions, and shorter rows are filled with padding.

    Args:
        mask: (B, M, T) bool, True = masked.
        padding_mask: (B, T) bool, True = padding.

    Raises:
        ValueError: A view has no visible positions, or views differ in their number by more than padding can fill.
    """
    padding = np.zeros_like(mask) if padding_mask is None else np.broadcast_to(padding_mask[:, None], mask.shape)
    kind = np.where(padding, 1, 2 * mask.astype(np.int8)).reshape(-1, mask.shape[-1])
    counts = (kind == 0).sum(axis=1)
    if counts.min() == 0:
        raise ValueError("mask: found a view without visible positions, expected at least one in each")
    order = kind.argsort(axis=1, kind="stable")[:, : counts.max()]
    if np.take_along_axis(kind, order, 1).max() > 1:
        raise ValueError(
            f"mask: found views with {counts.min()} to {counts.max()} visible positions, expected the same number in all; "
            "use RandomMask or ExactBlockMask"
        )
    return order


@dataclass(frozen=True)
class SpanMask(Checked):
    """Spans over time, as in wav2vec 2.0 and data2vec audio (method 2.1).

    Args:
        prob: Share of positions that spans would cover if they never overlapped; coverage is about 1 - (1 - p/l)^l.
        length: Span length in positions.
        length_kind: "static"; "uniform" in [length_other, 2 length]; "normal" (length, length_other); "poisson" (length);
            always at least 1. All but "static" are for wav2vec 2.0 configs with another `mask_selection`.
        length_other: Lower bound (uniform) or standard deviation (normal).
        min_spans: Minimum number of spans per sample.
        overlap: Whether spans may overlap; if not, gaps are uniform over all arrangements that fit, for wav2vec 2.0
            configs with `no_mask_overlap`.
        min_space: Minimum distance between spans that do not overlap, for wav2vec 2.0 configs with `mask_min_space`.
        same_count: Give every sample of a batch the "min" or the "max" count by unmasking or masking random positions;
            "none" leaves counts ragged. Only with this setting does a mask depend on its batch.
        dropout: Share of masked positions to unmask again.
        last_start: Whether the last possible start may be drawn; the reference code never draws it, so it never masks the
            last frame.
    """

    prob: OpenUnitInterval = 0.65
    length: PositiveInt = 10
    length_kind: Literal["static", "uniform", "normal", "poisson"] = "static"
    length_other: NonNegativeFloat = 0.0
    min_spans: NonNegativeInt = 1
    overlap: bool = True
    min_space: NonNegativeInt = 0
    same_count: Literal["none", "min", "max"] = "none"
    dropout: Annotated[float, Range("[0, 1)")] = 0.0
    last_start: bool = True

    def __call__(self, draws: Draws, size: int, lengths: Lengths | None = None) -> np.ndarray:
        """Mask of shape (B, size); `lengths` (B,) are the unpadded lengths."""
        batch = len(draws)
        sizes = np.full(batch, size) if lengths is None else np.asarray(lengths)
        positions = np.arange(size)
        valid = positions < sizes[:, None]
        expected = self.prob * sizes / self.length
        spans = np.maximum(self.min_spans, np.floor(expected + draws.uniform(0, 1)[:, 0])).astype(np.int64)
        # Leave at least one position of a short sample outside every span.
        span_lengths = np.minimum(self._lengths(draws, size), np.maximum(sizes[:, None] - 1, 1))
        if self.overlap:
            first_forbidden = sizes[:, None] - span_lengths + self.last_start
            allowed = (positions < np.maximum(first_forbidden, 1)) & valid
            mask = _paint(_choose(draws.uniform(2, size), allowed, spans), span_lengths) & valid
        else:
            mask = self._disjoint(draws, sizes, spans, span_lengths, size) & valid
        mask = _keep_one_visible(mask, valid, draws.uniform(3, size))
        if self.same_count != "none":
            count = np.minimum(getattr(mask.sum(axis=1), self.same_count)(), sizes - 1)  # leaves one position visible
            # Masked positions have the smallest scores: a random subset of them is kept, or random others are added.
            mask = _choose(draws.uniform(4, size) - mask, valid, count)
        if self.dropout > 0:
            kept = mask.sum(axis=1) - np.round(self.dropout * mask.sum(axis=1)).astype(np.int64)
            mask = _choose(draws.uniform(5, size), mask, kept)
        return mask

    def _lengths(self, draws: Draws, size: int) -> np.ndarray:
        """Length of the span that would start at each position, (B, size)."""
        u = draws.uniform(1, size, 2)
        if self.length_kind == "uniform":
            low = max(1, int(self.length_other))
            lengths = low + np.floor(u[..., 0] * (2 * self.length - low + 1))
        elif self.length_kind == "normal":
            lengths = np.maximum(1, np.round(self.length + self.length_other * _normal(u)))
        elif self.length_kind == "poisson":
            lengths = np.maximum(1, _poisson(u[..., 0], self.length))
        else:
            lengths = np.full(u.shape[:2], self.length)
        return lengths.astype(np.int64)

    def _disjoint(self, draws: Draws, sizes: np.ndarray, spans: np.ndarray, lengths: np.ndarray, size: int) -> np.ndarray:
        """Spans that do not overlap: drop those that do not fit, then distribute the remaining space as random gaps."""
        room = lengths.cumsum(axis=1) + self.min_space * np.arange(size)
        spans = np.minimum(spans, (room < sizes[:, None]).sum(axis=1))
        slack = sizes - np.where(spans > 0, np.take_along_axis(room, np.maximum(spans - 1, 0)[:, None], 1)[:, 0], 0)
        gaps = _choose(draws.uniform(2, 2 * size), np.arange(2 * size) < (slack + spans)[:, None], spans)
        starts = np.zeros((len(sizes), size), dtype=bool)
        placed = np.zeros_like(lengths)
        rows, slots = np.nonzero(gaps)
        order = gaps.cumsum(axis=1)[rows, slots] - 1
        begin = slots - order + np.where(order > 0, room[rows, np.maximum(order - 1, 0)] + self.min_space, 0)
        starts[rows, begin] = True
        placed[rows, begin] = lengths[rows, order]
        return _paint(starts, placed)


@dataclass(frozen=True)
class BlockMask(Checked):
    """BEiT's blocks of patches, as in data2vec vision (method 2.2).

    Args:
        count: Maximum number of masked patches; blocks are added until it is reached or ten draws in a row do not fit.
        min_area: Minimum number of patches in a block.
        max_area: Maximum number of patches in a block.
        min_aspect: Aspect ratios are log-uniform between this and its inverse.
    """

    count: PositiveInt = 120
    min_area: PositiveInt = 16
    max_area: PositiveInt = 196
    min_aspect: Annotated[float, Range("(0, 1]")] = 0.3

    def __call__(self, draws: Draws, grid: tuple[int, int]) -> np.ndarray:
        """Mask of shape (B, H·W) over a grid of (H, W) patches, row-major."""
        high, wide = grid
        total = high * wide
        size = -(-total // 8)
        packed = bytearray()
        numbers: list[list[list[float]]] = []  # four for each attempt and sample
        # Sets of patches are integers with a bit for each patch, because calls of numpy would take longer than the work.
        column = ((1 << total) - 1) // ((1 << wide) - 1)  # the first one
        for row in range(len(draws)):
            mask = masked = failures = attempt = 0
            while masked < self.count and failures < 10:
                if attempt == len(numbers):
                    u = draws.uniform(range(attempt, attempt + 32), 4)
                    u[..., 1] = np.exp((2 * u[..., 1] - 1) * -math.log(self.min_aspect))
                    numbers += u.tolist()
                share, aspect, top, left = numbers[attempt][row]
                attempt, failures = attempt + 1, failures + 1
                cap = min(self.count - masked, self.max_area)
                # With a cap below min_area the interval is reversed; the remainder is then filled with small blocks.
                area = self.min_area + share * (cap - self.min_area)
                h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
                if h >= high or w >= wide:
                    continue
                first = int(top * (high - h + 1)) * wide + int(left * (wide - w + 1))
                block = ((1 << w) - 1) * (column >> (high - h) * wide) << first
                new = (block & ~mask).bit_count()
                if 0 < new <= cap:
                    mask, masked, failures = mask | block, masked + new, 0
            packed += mask.to_bytes(size, "little")
        bits = np.frombuffer(packed, dtype=np.uint8).reshape(len(draws), size)
        flat = np.unpackbits(bits, axis=1, count=total, bitorder="little").view(bool)
        if self.count < total:
            return flat
        return _keep_one_visible(flat, np.ones_like(flat), draws.uniform(-1, total))


@dataclass(frozen=True)
class ExactBlockMask(Checked):
    """Blocks with equal sides on a grid, and an exact number of masked positions, as in data2vec 2.0 (method 2.5).

    Blocks are drawn, then single positions are added or removed at random until the count is met.

    Args:
        prob: Share of masked positions.
        length: Side of a block.
        adjust: Added to the share for which blocks are drawn, so that few positions have to be added afterwards.
        inverse: Draw visible blocks instead of masked ones.
        dropout: Share of extra blocks to draw; more positions are then removed at random.
        overlap: Whether blocks may overlap; if not, they are tiles of the grid, for fairseq configs with `non_overlapping`.
    """

    prob: OpenUnitInterval = 0.8
    length: PositiveInt = 3
    adjust: Annotated[float, Range("[-1, 1]")] = 0.07
    inverse: bool = True
    dropout: Annotated[float, Range("[0, 1)")] = 0.0
    overlap: bool = True

    def count(self, size: int) -> int:
        """Number of masked positions out of `size`; at least one stays visible."""
        # The order of operations matters: in floating point 1 - .8 is a little less than .2.
        masked = size - int(size * (1 - self.prob)) if self.inverse else int(size * self.prob)
        return min(masked, size - 1)

    def __call__(self, draws: Draws, grid: int | tuple[int, ...], lengths: Lengths | None = None) -> np.ndarray:
        """Mask of shape (B·views, T) over a grid of any number of axes, row-major.

        Args:
            draws: Random numbers of the samples.
            grid: T, or positions along each axis.
            lengths: (B·views,) unpadded lengths; only for one axis and blocks that may overlap.
        """
        grid = grid if isinstance(grid, tuple) else (grid,)
        total = math.prod(grid)
        sizes = np.full(len(draws), total) if lengths is None else np.asarray(lengths)
        drawn = (self._blocks if self.overlap else self._tiles)(draws, grid, sizes).reshape(len(draws), total)
        valid = np.arange(total) < sizes[:, None]
        masked = np.array([self.count(int(size)) for size in sizes])
        # Drawn positions have the smallest scores: a random subset of them is kept, or random others are added.
        chosen = _choose(draws.uniform(1, total) - drawn, valid, sizes - masked if self.inverse else masked)
        return valid & ~chosen if self.inverse else chosen

    @property
    def _share(self) -> float:
        return (1 - self.prob if self.inverse else self.prob) + self.adjust

    def _blocks(self, draws: Draws, grid: tuple[int, ...], sizes: np.ndarray) -> np.ndarray:
        """Union of blocks around positions drawn with replacement, cut at the border. (B·views, *grid) bool."""
        axes = len(grid)
        volume = math.prod(min(self.length, side) for side in grid)  # a side shorter than the block limits it
        counts = (sizes * (self._share / volume) * (1 + self.dropout)).astype(np.int64)
        centres = np.floor(draws.uniform(0, counts.max(initial=0)) * sizes[:, None]).astype(np.int64)
        rows, blocks = np.nonzero(np.arange(centres.shape[1]) < counts[:, None])
        offsets = np.arange(self.length) - self.length // 2
        sides: Sequence[Any] = [sizes[rows, None]] if axes == 1 else grid
        covered = [
            np.clip(centre[:, None] + offsets, 0, side - 1)
            for centre, side in zip(np.unravel_index(centres[rows, blocks], grid), sides, strict=True)
        ]
        mask = np.zeros((len(draws), *grid), dtype=bool)
        # Broadcast each block's positions along one axis against those along the others.
        shapes = [[-1, *np.where(np.arange(axes) == axis, self.length, 1)] for axis in range(axes)]
        index = [positions.reshape(shape) for positions, shape in zip(covered, shapes, strict=True)]
        mask[(rows.reshape(-1, *[1] * axes), *index)] = True
        return mask

    def _tiles(self, draws: Draws, grid: tuple[int, ...], sizes: np.ndarray) -> np.ndarray:
        """Tiles of the grid, drawn without replacement. (B·views, *grid) bool."""
        tiles = tuple(-(-side // self.length) for side in grid)
        scores = draws.uniform(0, math.prod(tiles))
        count = int(scores.shape[1] * self._share * (1 + self.dropout))
        mask = _choose(scores, np.ones_like(scores, dtype=bool), np.full(len(draws), count)).reshape(-1, *tiles)
        for axis, side in enumerate(grid, start=1):
            mask = mask.repeat(self.length, axis=axis).take(range(side), axis=axis)
        return mask


@dataclass(frozen=True)
class RandomMask(Checked):
    """Single positions drawn without replacement, equally many in samples of equal length (method 2.4).

    Args:
        prob: Share of masked positions; floor(T·(1 - prob)), and at least one, stay visible.
    """

    prob: OpenUnitInterval = 0.6

    def __call__(self, draws: Draws, size: int | tuple[int, ...], lengths: Lengths | None = None) -> np.ndarray:
        """Mask of shape (B, T); `size` is T or a grid with any number of axes, `lengths` (B,) are the unpadded lengths."""
        total = math.prod(size) if isinstance(size, tuple) else size
        sizes = np.full(len(draws), total) if lengths is None else np.asarray(lengths)
        visible = np.maximum(np.floor(sizes * (1 - self.prob)).astype(np.int64), 1)
        return _choose(draws.uniform(0, total), np.arange(total) < sizes[:, None], sizes - visible)


@dataclass(frozen=True)
class Vocabulary:
    """Properties of a tokenizer that text masking needs.

    Args:
        size: Number of token ids.
        mask_id: Id of the mask token.
        special: (size,) bool, True for ids that represent no text.
        continues: (size,) bool, True for ids that continue the word of the previous token.
        counts: (size,) occurrences in the corpus, for frequency-weighted replacement.
    """

    size: int
    mask_id: int
    special: np.ndarray
    continues: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class TokenMask(Checked):
    """Text masking (method 2.3): spans of `length` tokens, some of which are replaced at random or left unchanged.

    BERT's 80/10/10 is prob .15, length 1, random_prob .1, keep_prob .1; data2vec's is prob .35, length 4.

    Args:
        prob: Share of tokens that spans would cover if they never overlapped.
        length: Tokens (or words) per span.
        length_std: Standard deviation of the span length, 0 = always `length`.
        random_prob: Share of selected tokens that become a random token.
        keep_prob: Share of selected tokens that stay unchanged.
        whole_words: Choose words and mask all their tokens, as in the training of whole-word BERT models.
        keep_special: Never select special tokens; the reference code may mask <s> and </s>.
        frequency_weighted: Draw random tokens by their frequency in the corpus instead of uniformly, for fairseq
            configs with `freq_weighted_replacement`; needs random_prob.
        loss_on: Score all "selected" tokens, or only those that became the "mask_token", as the reference does.
    """

    prob: OpenUnitInterval = 0.35
    length: PositiveInt = 4
    length_std: NonNegativeFloat = 0.0
    random_prob: ClosedUnitInterval = 0.0
    keep_prob: ClosedUnitInterval = 0.0
    whole_words: bool = False
    keep_special: bool = False
    frequency_weighted: bool = False
    loss_on: Literal["selected", "mask_token"] = "mask_token"

    def __call__(
        self, draws: Draws, ids: np.ndarray, vocabulary: Vocabulary, lengths: Lengths | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Masked ids and mask, both (B, T), from ids (B, T) and their unpadded lengths (B,)."""
        size = ids.shape[1]
        sizes = np.full(len(ids), size) if lengths is None else np.asarray(lengths)
        valid = np.arange(size) < sizes[:, None]
        allowed = valid & ~vocabulary.special[ids] if self.keep_special else valid
        if self.whole_words:
            begins = valid & (~vocabulary.continues[ids] | (np.arange(size) == 0))
            word = begins.cumsum(axis=1) - 1  # index of each token's word
            units = np.arange(size) < begins.sum(axis=1)[:, None]
        else:
            units = valid
        spans = np.floor(self.prob * units.sum(axis=1) / self.length + draws.uniform(0, 1)[:, 0]).astype(np.int64)
        span_lengths = np.full(ids.shape, self.length)
        if self.length_std > 0:
            deviates = _normal(draws.uniform(1, size, 2))
            span_lengths = np.maximum(0, np.round(self.length + self.length_std * deviates)).astype(np.int64)
        selected = _paint(_choose(draws.uniform(2, size), units, spans), span_lengths)
        if self.whole_words:
            selected = np.take_along_axis(selected, np.maximum(word, 0), axis=1)
        selected &= allowed
        selected = _keep_one_visible(selected, allowed, draws.uniform(3, size))

        u = draws.uniform(4, size)
        replaced = selected & (u < self.random_prob)
        kept = selected & (u >= self.random_prob) & (u < self.random_prob + self.keep_prob)
        masked = selected & ~replaced & ~kept
        source = np.where(masked, vocabulary.mask_id, ids)
        if self.random_prob > 0:
            weights = ~vocabulary.special * (vocabulary.counts if self.frequency_weighted else 1.0)
            cumulative = weights.cumsum()
            random_ids = np.searchsorted(cumulative, draws.uniform(5, size) * cumulative[-1], side="right")
            source = np.where(replaced, random_ids, source)
        return source, selected if self.loss_on == "selected" else masked
