"""Small data sets that need no download: synthetic, or shipped with Python.

Text is Python's language reference (`pydoc` topics). Images are coloured shapes on textured backgrounds, speech is invented
words in several voices. Both have ten classes, so that a probe can tell a trained encoder from an untrained one.
"""

from __future__ import annotations

import functools
import re

import numpy as np
from PIL import Image, ImageDraw

from d2v_fast.data import DataError, Source

SIZES = {"train": 4000, "test": 1000}


def _offset(split: str) -> int:
    if split not in SIZES:
        raise DataError(f"data.split={split}: builtin data have the splits {', '.join(SIZES)}; choose one of them")
    return list(SIZES).index(split) * 1_000_000


def builtin_text(split: str) -> list[str]:
    """Paragraphs of the Python reference; every tenth document belongs to the test split."""
    from pydoc_data.topics import topics

    testing = _offset(split) > 0
    documents = [re.split(r"\n\s*\n", topics[name]) for name in sorted(topics)]
    paragraphs = [[re.sub(r"\s+", " ", p).strip() for p in document] for document in documents]
    train = [p for i, document in enumerate(paragraphs) if i % 10 for p in document]
    if not testing:
        return train
    # Documents share paragraphs: remove those of the training split from the test split.
    seen = set(train)
    return [p for document in paragraphs[::10] for p in document if p not in seen]


SHAPES = ("disc", "ring", "square", "frame", "triangle", "star", "cross", "bar", "moon", "hourglass")


def _outline(shape: str) -> np.ndarray:
    """Corners of a shape around the origin, within the unit circle."""
    corners = {"disc": 24, "ring": 24, "moon": 24, "square": 4, "frame": 4, "triangle": 3}
    if shape in corners:
        angles = np.arange(corners[shape]) * 2 * np.pi / corners[shape]
        return np.stack([np.cos(angles), np.sin(angles)], axis=1)
    if shape == "star":
        angles, radius = np.arange(10) * np.pi / 5, np.tile([1.0, 0.42], 5)
        return np.stack([radius * np.cos(angles), radius * np.sin(angles)], axis=1)
    a = 0.3
    points = {
        "cross": [(-a, -1), (a, -1), (a, -a), (1, -a), (1, a), (a, a), (a, 1), (-a, 1), (-a, a), (-1, a), (-1, -a), (-a, -a)],
        "bar": [(-1, -a), (1, -a), (1, a), (-1, a)],
        "hourglass": [(-0.8, -0.8), (0.8, -0.8), (-0.8, 0.8), (0.8, 0.8)],
    }
    return np.array(points[shape])


def _draw_shape(shape: str, rng: np.random.Generator, size: int = 32) -> Image.Image:
    scale = 4  # draw at 4x and downscale, for smooth edges
    side = size * scale
    background, colour = rng.uniform(0, 255, (2, 3))
    while np.abs(background - colour).sum() < 150:
        colour = rng.uniform(0, 255, 3)
    angle, waves = rng.uniform(0, np.pi), rng.uniform(1, 6)
    y, x = np.mgrid[0:side, 0:side] / side
    texture = np.sin(2 * np.pi * waves * (x * np.cos(angle) + y * np.sin(angle)) + rng.uniform(0, 2 * np.pi))
    pixels = background + rng.uniform(5, 40) * texture[..., None]
    image = Image.fromarray(pixels.clip(0, 255).astype(np.uint8))
    radius = rng.uniform(0.22, 0.4) * side
    center = rng.uniform(radius * 0.9, side - radius * 0.9, 2)
    turn = rng.uniform(0, 2 * np.pi)
    rotation = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])

    def polygon(factor: float, shift: float = 0.0) -> list[tuple[float, float]]:
        corners = (_outline(shape) * factor + [shift, 0]) @ rotation.T * radius + center
        return [tuple(corner) for corner in corners]

    stencil = Image.new("L", image.size)
    draw = ImageDraw.Draw(stencil)
    draw.polygon(polygon(1.0), fill=255)
    if shape in ("ring", "frame"):
        draw.polygon(polygon(0.55), fill=0)
    if shape == "moon":
        draw.polygon(polygon(0.85, 0.45), fill=0)
    image.paste(tuple(int(c) for c in colour), mask=stencil)
    image = image.resize((size, size), Image.Resampling.BOX)
    noisy = np.asarray(image, dtype=np.float64) + rng.normal(0, 6, (size, size, 3))
    return Image.fromarray(noisy.clip(0, 255).astype(np.uint8))


def builtin_images(split: str) -> Source:
    """Ten shapes of random colour, position, size and rotation on striped backgrounds, 32×32 RGB."""
    offset = _offset(split)
    labels = [SHAPES[i % len(SHAPES)] for i in range(SIZES[split])]

    @functools.cache
    def read(i: int) -> Image.Image:
        return _draw_shape(labels[i], np.random.default_rng([offset, i]))

    return Source([f"builtin/{split}/{label}/{i}" for i, label in enumerate(labels)], read, labels)


# Per sound: three formants in Hz (vowels: Peterson and Barney 1952, men), then the levels of the voice, of a low hiss and of a
# high hiss.
SOUNDS = {
    "a": (730, 1090, 2440, 1.0, 0.0, 0.0),
    "e": (530, 1840, 2480, 1.0, 0.0, 0.0),
    "i": (270, 2290, 3010, 0.8, 0.0, 0.0),
    "o": (570, 840, 2410, 1.0, 0.0, 0.0),
    "u": (300, 870, 2240, 0.8, 0.0, 0.0),
    "m": (250, 1000, 2200, 0.3, 0.0, 0.0),
    "n": (250, 1600, 2600, 0.3, 0.0, 0.0),
    "l": (360, 1300, 2900, 0.5, 0.0, 0.0),
    "r": (420, 1250, 1600, 0.5, 0.0, 0.0),
    "f": (300, 1100, 2300, 0.0, 0.3, 0.0),
    "s": (300, 1700, 2600, 0.0, 0.0, 0.5),
    "z": (250, 1700, 2600, 0.3, 0.0, 0.3),
}
WORDS = ("masi", "luno", "fera", "sozi", "nelu", "zamo", "rifu", "fole", "suna", "mire")
SPEAKERS = 8
RATE = 16_000
HOP = RATE // 100  # samples between frames of the spectrum


def _glide(word: str, tract: float, rng: np.random.Generator) -> np.ndarray:
    """The spectrum of a word, gliding from sound to sound: (6, frames, 1), columns as in `SOUNDS`."""
    # A sound is constant between its two knots; between sounds all values are interpolated linearly.
    seconds = rng.uniform(0.7, 1.3) * rng.uniform(0.07, 0.15, len(word))
    begin = np.cumsum(seconds) - seconds + rng.uniform(0.03, 0.1)
    knots = np.stack([begin + 0.35 * seconds, begin + 0.65 * seconds], axis=1).ravel()
    held = np.repeat([SOUNDS[sound] for sound in word], 2, axis=0)
    held[:, :3] *= tract * rng.uniform(0.93, 1.07, (len(held), 3))
    held[:, 3:] *= rng.uniform(0.6, 1.2, (len(held), 3))
    held = np.pad(held, ((1, 1), (0, 0)), "edge")
    held[[0, -1], 3:] = 0
    knots = np.array([knots[0] - 0.05, *knots, knots[-1] + 0.05])
    frames = int((knots[-1] + rng.uniform(0.02, 0.1)) * RATE / HOP)
    return np.stack([np.interp(np.arange(frames) * HOP / RATE, knots, column) for column in held.T])[..., None]


def _speak(word: str, speaker: int, rng: np.random.Generator) -> np.ndarray:
    """Synthesise a word from voice pulses and noise."""
    voice = np.random.default_rng([77, speaker])
    tract, pitch = voice.uniform(0.85, 1.2), voice.uniform(95, 230)
    track = _glide(word, tract, rng)
    frames = track.shape[1]
    time = np.arange((frames + 1) * HOP) / RATE
    f0 = pitch * rng.uniform(0.9, 1.1) * (1 + rng.uniform(-0.3, 0.15) * time)
    pulses = np.diff(np.floor(np.cumsum(f0) / RATE), prepend=0) * np.sqrt(RATE / f0)
    sources = np.stack([pulses, rng.normal(size=len(time))])
    windows = np.lib.stride_tricks.sliding_window_view(sources, 2 * HOP, axis=1)[:, ::HOP]
    pulses, noise = np.fft.rfft(windows * np.hanning(2 * HOP + 1)[:-1])

    f = np.fft.rfftfreq(2 * HOP, 1 / RATE)
    peaks = [level / (1 + ((f - at) / (50 + 0.05 * at)) ** 2) for at, level in zip(track[:3], (1, 0.6, 0.4), strict=True)]
    hiss = [level * np.exp(-(((f - at * tract) / 1000) ** 2)) for level, at in zip(track[4:], (2800, 5500), strict=True)]
    microphone = 10 ** np.interp(f, np.linspace(0, RATE / 2, 5), rng.normal(0, 0.2, 5))
    spectrum = (pulses * track[3] * sum(peaks) / (1 + f / 1000) + noise * sum(hiss)) * microphone
    pieces = np.fft.irfft(spectrum).reshape(frames, 2, HOP)
    wave = (pieces[1:, 0] + pieces[:-1, 1]).ravel()
    wave += rng.normal(0, wave.std() * 10 ** rng.uniform(-1.75, -0.75), len(wave))
    return (wave * rng.uniform(0.5, 1) / np.abs(wave).max()).astype(np.float32)


def _speech(i: int) -> tuple[str, int]:
    """Word and speaker of a sample."""
    return WORDS[i % len(WORDS)], i // len(WORDS) % SPEAKERS


@functools.cache
def _recording(offset: int, i: int) -> np.ndarray:
    return _speak(*_speech(i), np.random.default_rng([offset, i]))


@functools.cache
def _samples(offset: int, i: int) -> int:
    """Length of `_recording`, without synthesising it."""
    return (_glide(_speech(i)[0], 1.0, np.random.default_rng([offset, i])).shape[1] - 1) * HOP


def builtin_speech(split: str) -> Source:
    """Ten invented words in eight voices, 16 kHz; a quarter as many samples as images."""
    offset = _offset(split)
    words, speakers = zip(*map(_speech, range(SIZES[split] // 4)), strict=True)
    return Source(
        names=[f"builtin/{split}/{word}/{i}" for i, word in enumerate(words)],
        read=functools.partial(_recording, offset),
        labels=words,
        groups=[f"voice{s}" for s in speakers],
        size=functools.partial(_samples, offset),
    )
