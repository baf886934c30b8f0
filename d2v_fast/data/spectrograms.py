"""Sounds as log-mel spectrograms: recordings (see `data.audio`) → filter banks of one size → patch mask.

The filter banks are Kaldi's, as used by AST (Gong, Chung, Glass 2021) and EAT (Chen et al. 2024).
"""

from __future__ import annotations

import functools
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Annotated, Any, cast

import numpy as np
import torch
from torch import Tensor

from d2v_fast.choices import Finite, NonNegativeFloat, PositiveFloat, PositiveInt, Range
from d2v_fast.data import DataError, Plain, Source, read_preprocessing
from d2v_fast.data.audio import AudioData, open_audio
from d2v_fast.masking import BlockMask, Draws, ExactBlockMask, RandomMask

log = logging.getLogger(__name__)

RATE = 16_000
WINDOW, HOP, FFT = 400, 160, 512  # 25 and 10 ms, and the next power of two
PREEMPHASIS = 0.97
FLOOR = float(np.finfo(np.float32).eps)
MEAN, STD = -4.268, 4.569  # of AudioSet, as in EAT


def frames(samples: int) -> int:
    """Number of complete windows in a recording."""
    return max(0, 1 + (samples - WINDOW) // HOP)


@functools.cache
def _filters(bins: int) -> Tensor:
    """(FFT / 2 + 1, bins) float64, triangular filters on Kaldi's mel scale from 20 Hz."""
    from transformers.audio_utils import mel_filter_bank

    scale: dict[str, Any] = dict(norm=None, mel_scale="kaldi", triangularize_in_mel_space=True)
    with _no_filter_warning():
        return torch.from_numpy(mel_filter_bank(FFT // 2 + 1, bins, 20.0, RATE / 2, RATE, **scale))


@contextmanager
def _no_filter_warning() -> Iterator[None]:
    """Suppress the warning that the lowest filters fall between two frequencies; they do in Kaldi as well."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "At least one mel filter")
        yield


def log_mel(wave: np.ndarray, bins: int = 128) -> np.ndarray:
    """Log-mel filter banks, as `ASTFeatureExtractor` of transformers computes them before it pads and normalises.

    The steps are Kaldi's: complete windows, mean removed, pre-emphasis .97, Hann window, power spectrum, mel energies,
    logarithm; no dither, no energy. float64 up to and including the logarithm.

    Args:
        wave: (samples,) float, in [-1, 1], at 16 kHz.
        bins: Number of filters.

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
    """A transformers feature extractor equivalent to `spectrogram`."""
    from transformers import ASTFeatureExtractor

    with _no_filter_warning():
        return ASTFeatureExtractor(sampling_rate=RATE, num_mel_bins=bins, max_length=length, mean=mean, std=std)


class SpectrogramData(AudioData):
    """Sounds as spectrograms of one size: (frames, bins) for AST, single-channel images for image models.

    Args:
        path: "builtin", a folder of recordings (with or without metadata.csv), a manifest (.tsv, .csv, .jsonl,
            .json), or the name of a Hugging Face data set.
        name: Configuration of the Hugging Face data set, such as clean.
        split: Split of the Hugging Face data set.
        sample_rate: Rate in Hz that recordings are resampled to; the filter banks require 16000.
        min_seconds: Minimum length; shorter recordings are left out.
        whole_seconds: Longer recordings are split into equal parts of at most target_length; each part is a sample and is
            read without the rest.
        join_seconds: Join recordings of one speaker until they are this long, for data sets of short clips; 0 disables it.
        target_length: Frames (10 ms each) per spectrogram; longer recordings are cropped at random, shorter ones padded.
        mel_bins: Number of mel filters.
        mean: Mean to subtract from the log energies; defaults to AudioSet's.
        std: The log energies are divided by twice this standard deviation; defaults to AudioSet's.
        cache: Folder for the lengths of the recordings; defaults to a folder in the Hugging Face cache.
        mask: How patches are masked.
        views: Masked views of each sample, for data2vec 2.0; null for a single mask, as in 1.0.
        seed: Seed of masks, crops and order.
    """

    def __init__(
        self,
        *,
        mask: ExactBlockMask | RandomMask | BlockMask,
        views: Annotated[int | None, Range("[1, inf)")] = None,
        seed: int = 0,
        path: str = "builtin",
        name: str | None = None,
        split: str = "train",
        sample_rate: PositiveInt = RATE,
        min_seconds: NonNegativeFloat = 1.0,
        whole_seconds: PositiveFloat = 60.0,
        join_seconds: NonNegativeFloat = 0.0,
        target_length: PositiveInt = 1024,
        mel_bins: PositiveInt = 128,
        mean: Finite = MEAN,
        std: PositiveFloat = STD,
        cache: str | None = None,
    ):
        if sample_rate != RATE:
            raise DataError(
                f"data.sample_rate={sample_rate}: spectrograms are made at {RATE} Hz, as in the exported feature extractor; "
                f"leave it at {RATE}: recordings with other rates are resampled"
            )
        seconds = ((target_length - 1) * HOP + WINDOW) / RATE
        common: dict[str, Any] = dict(mask=mask, views=views, seed=seed, path=path, name=name, split=split, cache=cache)
        common |= dict(min_seconds=min_seconds, max_seconds=seconds, join_seconds=join_seconds, whole_seconds=whole_seconds)
        super().__init__(**common, normalize=False)
        lengths = cast(np.ndarray, self.lengths)
        median = float(np.median(lengths[lengths > 0])) / RATE if lengths.any() else seconds
        if median < seconds / 2:
            log.warning(
                "data.target_length=%d: is %.2f s, but half of the recordings have at most %.2f s; the rest is padding. Lower "
                "it, or join short clips: data.join_seconds=%.1f",
                *(target_length, seconds, median, seconds),
            )
        self.lengths = None  # spectrograms have one length
        self.frames, self.size, self.mean, self.std = frames, (target_length, mel_bins), mean, std
        self.target_length, self.mel_bins = self.size

    def fit_to(self, encoder: Any) -> None:
        config, (length, bins) = getattr(encoder.model, "config", None), self.size
        self.as_image = encoder.reads != "spectrogram"
        wanted: dict[str, Any] = {"max_length": length, "num_mel_bins": bins}
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
                    f"data.{setting}={size}: not a multiple of encoder.config.patch_size={side}, so the last {size % side} "
                    f"would be in no patch; use {f'{low} or ' if low else ''}{low + side}, and the same in encoder.config"
                )
        self.grid = encoder.positions(length)
        if not isinstance(self.grid, tuple) or len(self.grid) != 2:
            raise DataError(
                f"encoder.model: {type(encoder.model).__name__} has positions {self.grid}, expected a grid of patches: use "
                "audio-spectrogram-transformer, vit or data2vec2-vision, or give your own model a method positions(frames) "
                "that returns the rows and columns of patches"
            )
        self.check_mask()

    files = ("sample_rate", "target_length", "mel_bins", "mean", "std")

    @staticmethod
    def largest_batch(settings: dict[str, Any], encoder: Any, size: int) -> tuple[tuple[int, ...], Any]:
        channel = () if encoder.reads == "spectrogram" else (1,)
        return (size, *channel, settings["target_length"], settings["mel_bins"]), encoder.positions(settings["target_length"])

    @staticmethod
    def read_files(name: str) -> dict[str, Any]:
        from transformers import FeatureExtractionMixin

        found = read_preprocessing(FeatureExtractionMixin.get_feature_extractor_dict, name)
        mean, std = found.get("mean"), found.get("std")
        if not found.get("do_normalize", True):
            mean, std = 0.0, 0.5  # spectrograms are divided by 2 std
        sizes = {"target_length": found.get("max_length"), "mel_bins": found.get("num_mel_bins")}
        return {"sample_rate": found.get("sampling_rate"), **sizes, "mean": mean, "std": std}

    @staticmethod
    def make_processor(encoder: Any, settings: dict[str, Any]) -> Any:
        return spectrogram_extractor(*(settings[key] for key in ("target_length", "mel_bins", "mean", "std")))

    @staticmethod
    def for_probe(encoder: Any, settings: dict[str, Any]) -> tuple[Callable[..., Source], Callable[[list[Any]], Plain]]:
        as_image = encoder.reads != "spectrogram"
        sizes = [settings[key] for key in ("target_length", "mel_bins", "mean", "std")]

        def open_split(path: str, name: str | None = None, split: str = "train") -> Source:
            source = open_audio(path, name, split, settings["sample_rate"])

            def read(i: int) -> np.ndarray:
                if len(wave := source.read(i)) < WINDOW:
                    raise ValueError(f"is too short: {len(wave)} samples")
                return spectrogram(wave, *sizes)

            return replace(source, read=read)

        def collate(samples: list[Any]) -> Plain:
            source = np.stack(samples)
            return source[:, None] if as_image else source, None

        return open_split, collate

    def load(self, index: int, rng: np.random.Generator) -> np.ndarray:
        return spectrogram(super().load(index, rng), *self.size, self.mean, self.std)

    def collate(self, samples: list[np.ndarray], draws: Draws) -> dict[str, np.ndarray]:
        source = np.stack(samples)
        return {"source": source[:, None] if self.as_image else source, "mask": self.make_mask(draws, self.grid)}


def _pair(size: int | list[int] | tuple[int, int]) -> list[int]:
    return [size, size] if isinstance(size, int) else list(size)
