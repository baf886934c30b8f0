"""Sounds as log-mel spectrograms: recordings as `data.audio` reads them → filter banks of one size → patch mask.

The filter banks are those of Kaldi, as AST (Gong, Chung, Glass 2021) and EAT (Chen et al. 2024) take them.
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from torch import Tensor

from d2v_fast.data import DataError
from d2v_fast.data.audio import AudioData
from d2v_fast.masking import BlockMask, Draws, ExactBlockMask, RandomMask

log = logging.getLogger(__name__)

RATE = 16_000
WINDOW, HOP, FFT = 400, 160, 512  # 25 and 10 ms, and the next power of two
PREEMPHASIS = 0.97
FLOOR = float(np.finfo(np.float32).eps)
MEAN, STD = -4.268, 4.569  # of AudioSet, as EAT has them


def frames(samples: int) -> int:
    """Whole windows in a recording."""
    return max(0, 1 + (samples - WINDOW) // HOP)


@functools.cache
def _filters(bins: int) -> Tensor:
    """(FFT / 2 + 1, bins) float64, triangles on Kaldi's mel scale from 20 Hz on."""
    from transformers.audio_utils import mel_filter_bank

    scale = dict(norm=None, mel_scale="kaldi", triangularize_in_mel_space=True)
    with _quiet():
        return torch.from_numpy(mel_filter_bank(FFT // 2 + 1, bins, 20.0, RATE / 2, RATE, **scale))


@contextmanager
def _quiet() -> Iterator[None]:
    """Without the warning that the lowest of many filters fall between two frequencies, as they do in Kaldi."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "At least one mel filter")
        yield


def log_mel(wave: np.ndarray, bins: int = 128) -> np.ndarray:
    """Log-mel filter banks, as `ASTFeatureExtractor` of transformers has them before it pads and normalises.

    Kaldi's: windows (Hann, whole ones only) without their mean, pre-emphasis .97, power spectrum, mel energies, logarithm; no
    dither, no energy. In float64 up to the logarithm.

    Args:
        wave: (samples,) float, in [-1, 1], at 16 kHz.
        bins: Filters.

    Returns:
        (frames, bins) float32.
    """
    x = torch.from_numpy(wave).double().unfold(0, WINDOW, HOP)
    x = x - x.mean(dim=1, keepdim=True)
    x = x - PREEMPHASIS * torch.cat([x[:, :1], x[:, :-1]], dim=1)
    spectrum = torch.fft.rfft(x * torch.hann_window(WINDOW, periodic=False, dtype=torch.float64), FFT)
    energy = torch.view_as_real(spectrum).square().sum(-1) @ _filters(bins)
    return energy.clamp(min=FLOOR).log().float().numpy()


def spectrogram(wave: np.ndarray, length: int, bins: int, mean: float, std: float) -> np.ndarray:
    """`log_mel` cut or padded with zeros to `length` frames, then (x - mean) / (2 std): (length, bins) float32."""
    x = log_mel(wave[: (length - 1) * HOP + WINDOW], bins)
    x = np.pad(x, ((0, length - len(x)), (0, 0)))
    return (x - np.float32(mean)) / np.float32(2 * std)


def spectrogram_extractor(length: int, bins: int, mean: float, std: float) -> Any:
    """The same as a feature extractor of transformers."""
    from transformers import ASTFeatureExtractor

    with _quiet():
        return ASTFeatureExtractor(sampling_rate=RATE, num_mel_bins=bins, max_length=length, mean=mean, std=std)


class SpectrogramData(AudioData):
    """Sounds as spectrograms of one size: AST takes them as (frames, bins), image models as images of one channel.

    Args:
        path: "builtin", a folder of recordings (with or without metadata.csv), a manifest (.tsv, .csv, .jsonl,
            .json), or the name of a Hugging Face set.
        name: Configuration of the Hugging Face set, such as clean.
        split: Its split.
        sample_rate: Rate in Hz that everything is resampled to; 16000 is the one that there are filter banks for.
        min_seconds: Shorter recordings are left out.
        whole_seconds: Longer recordings are never read whole, but in equal parts of at most target_length, each a sample of
            its own.
        join_seconds: Join recordings of one speaker until they are this long, for sets of short clips; 0 for never.
        target_length: Frames of 10 ms of a spectrogram; longer recordings are cropped at random, shorter ones padded.
        mel_bins: Mel filters.
        mean: Subtracted from the logarithms, AudioSet's by default.
        std: They are divided by twice of it, AudioSet's by default.
        cache: Folder where the lengths of the recordings are kept; by default beside the cache of Hugging Face.
        mask: How patches are masked.
        views: Masked views of each sample, for data2vec 2.0; null for one mask, as 1.0 takes it.
        seed: Seed of masks, crops and order.
    """

    def __init__(
        self,
        *,
        mask: ExactBlockMask | RandomMask | BlockMask,
        views: int | None = None,
        seed: int = 0,
        path: str = "builtin",
        name: str | None = None,
        split: str = "train",
        sample_rate: int = RATE,
        min_seconds: float = 1.0,
        whole_seconds: float = 60.0,
        join_seconds: float = 0.0,
        target_length: int = 1024,
        mel_bins: int = 128,
        mean: float = MEAN,
        std: float = STD,
        cache: str | None = None,
    ):
        if sample_rate != RATE:
            raise DataError(
                f"data.sample_rate={sample_rate}: spectrograms are made at {RATE} Hz, as the exported feature extractor does; "
                f"leave it at {RATE}, and recordings of other rates are resampled"
            )
        seconds = ((target_length - 1) * HOP + WINDOW) / RATE
        super().__init__(
            **dict(mask=mask, views=views, seed=seed, path=path, name=name, split=split),
            **dict(min_seconds=min_seconds, max_seconds=seconds, join_seconds=join_seconds, normalize=False),
            **dict(whole_seconds=whole_seconds, cache=cache),
        )
        usual = float(np.median(self.lengths[self.lengths > 0])) / RATE if self.lengths.any() else seconds
        if usual < seconds / 2:
            log.warning(
                "data.target_length=%d: is %.2f s, and half of the recordings have at most %.2f s; the rest is padding. Lower "
                "it, or join short clips: data.join_seconds=%.1f",
                *(target_length, seconds, usual, seconds),
            )
        self.lengths = None  # all are as long
        self.frames, self.size, self.mean, self.std = frames, (target_length, mel_bins), mean, std

    def fit_to(self, encoder: Any) -> None:
        config, (length, bins) = getattr(encoder.model, "config", None), self.size
        self.as_image = encoder.reads != "spectrogram"
        wanted = {"max_length": length, "num_mel_bins": bins}
        if self.as_image:
            wanted = {"num_channels": 1, "image_size": [length, bins]}
        for field, expected in wanted.items():
            found = getattr(config, field, expected)
            if (_pair(found) if field == "image_size" else found) != expected:
                raise DataError(
                    f"encoder.config.{field}={found}: data.target_length={length} with data.mel_bins={bins} needs {expected}; "
                    f"set encoder.config.{field}={expected}{' or change the data' if expected != 1 else ''}"
                )
        patch = _pair(getattr(config, "patch_size", 1))
        strides = [getattr(config, f"{axis}_stride", side) for axis, side in zip(("time", "frequency"), patch, strict=True)]
        for setting, size, side, stride in zip(("target_length", "mel_bins"), self.size, patch, strides, strict=True):
            if size % side and stride >= side:
                low = size // side * side
                raise DataError(
                    f"data.{setting}={size}: no multiple of encoder.config.patch_size={side}, so that the last {size % side} "
                    f"would be in no patch; take {f'{low} or ' if low else ''}{low + side}, and the same in encoder.config"
                )
        self.grid = encoder.positions(length)
        if not isinstance(self.grid, tuple) or len(self.grid) != 2:
            raise DataError(
                f"encoder.model: {type(encoder.model).__name__} gives positions {self.grid}, expected a grid of patches: take "
                "audio-spectrogram-transformer, vit or data2vec2-vision, or give your own a method positions(frames) that "
                "returns the rows and columns of patches"
            )
        self.check_mask()

    def processor(self, encoder: Any) -> Any:
        return spectrogram_extractor(*self.size, self.mean, self.std)

    def load(self, index: int, rng: np.random.Generator) -> np.ndarray:
        return spectrogram(super().load(index, rng), *self.size, self.mean, self.std)

    def collate(self, samples: list[np.ndarray], draws: Draws) -> dict[str, np.ndarray]:
        source = np.stack(samples)
        return {"source": source[:, None] if self.as_image else source, "mask": self.make_mask(draws, self.grid)}


def _pair(size: int | list[int] | tuple[int, int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
