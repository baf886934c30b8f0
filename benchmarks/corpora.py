"""Measure the cost of reading a corpus, in CPU seconds and memory, on synthetic corpora in a temporary folder.

python -m benchmarks.corpora          print a table; takes a quarter of an hour of CPU time and 3 GB of disk
python -m benchmarks.corpora --full   add 1 GB of text, and write benchmarks/results/cpu-corpora.json

Each measurement runs in a separate process. CPU seconds (user and system, of all threads and children) exclude waiting and
depend little on other load. They exclude imports: a tiny corpus of the same kind is read first. Memory is the peak resident
size minus that of a process that has only imported torch, so other imports count.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch

from benchmarks.measure import rates, resident
from benchmarks.report import RESULTS, corpora_table

MB = 10**6
RATE = 16_000  # Hz of the recordings
TURNS = 3  # measurements of images take turns; the median is reported
PHOTO, LARGE = (500, 375), (4000, 3000)  # the median photo of ImageNet, and 12 megapixels


class Cost(NamedTuple):
    """CPU seconds of a call, its peak memory above torch in bytes, and its result."""

    seconds: float
    peak: int
    result: Any


def alone(call: Callable[..., Any], *args: Any, warm: tuple = (), ranks: int = 1) -> list[Cost]:
    """Run a call in `ranks` new processes at once. In each, `call(*warm)` runs first and is not counted."""
    context = multiprocessing.get_context("spawn")
    ends = []
    for _ in range(ranks):
        end, other = context.Pipe()
        process = context.Process(target=_serve, args=(other, call, args, warm))
        process.start()
        other.close()
        ends.append((end, process))
    costs = [end.recv() for end, _ in ends]
    for _, process in ends:
        process.join()
    return costs


def _serve(end: Any, call: Callable[..., Any], args: tuple, warm: tuple) -> None:
    torch.set_num_threads(1)
    base = resident("VmRSS")
    if warm:
        call(*warm)
    before = _cpu_seconds()
    result = call(*args)
    end.send(Cost(_cpu_seconds() - before, resident("VmHWM") - base, result))


def _cpu_seconds() -> float:
    usages = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in usages)


def row(case: str, figure: float, unit: str, aim: str = "", **more: Any) -> dict[str, Any]:
    return {"case": case, "figure": figure, "unit": unit, "aim": aim, **more}


# Text


def words(size: int, rng: np.random.Generator) -> Iterator[str]:
    """Text of `size` characters in pieces of about 1 MB: 50,000 invented words with Zipf frequencies."""
    syllables = [a + b for a in "bcdfghjklmnprstvwz" for b in ("a", "e", "i", "o", "u", "an", "er", "ou")]
    known = ["".join(rng.choice(syllables, n)) for n in rng.integers(1, 5, 50_000)]
    share = 1 / np.arange(1, len(known) + 1)
    share = np.cumsum(share / share.sum())
    while size > 0:
        piece = " ".join(known[i] for i in np.minimum(np.searchsorted(share, rng.random(150_000)), len(known) - 1))
        yield piece[:size]
        size -= len(piece)


def write_text(folder: Path, size: int, document: int) -> Path:
    """Write `size` characters as JSON lines, in documents of `document` characters, in files of at most 100 MB of text."""
    folder.mkdir()
    rng, left = np.random.default_rng(0), ""
    for number, begin in enumerate(range(0, size, 100 * MB)):
        with (folder / f"{number:03}.jsonl").open("w", encoding="utf-8") as file:
            for piece in words(min(100 * MB, size - begin), rng):
                left += piece
                while len(left) >= document:
                    file.write(json.dumps({"text": left[:document]}) + "\n")
                    left = left[document:]
    return folder


def open_text(path: Path, tokenizer: Path, cache: Path) -> int:
    """Open a corpus as a run does and read a hundred blocks; return the number of blocks."""
    from d2v_fast.data.text import TextData
    from d2v_fast.masking import TokenMask

    data = TextData(mask=TokenMask(), path=str(path), tokenizer=str(tokenizer), cache=str(cache))
    for begin in range(0, 100, 10):
        data.__getitems__([(0, i % len(data)) for i in range(begin, begin + 10)])
    return len(data)


def text(root: Path, full: bool) -> Iterator[dict[str, Any]]:
    from d2v_fast.data.text import train_tokenizer

    tokenizer, tiny, cache = root / "tokenizer", write_text(root / "tiny", MB, 1000), root / "cache"
    train_tokenizer(words(5 * MB, np.random.default_rng(1)), 32_000, 512).save_pretrained(tokenizer)
    warm = (tiny, tokenizer, root / "tiny-cache")
    paragraphs = write_text(root / "paragraphs", 100 * MB, 600)
    (first,) = alone(open_text, paragraphs, tokenizer, cache, warm=warm)
    (second,) = alone(open_text, paragraphs, tokenizer, cache, warm=warm)
    four = alone(open_text, paragraphs, tokenizer, root / "cache-4", warm=warm, ranks=4)
    yield row("100 MB of text, first start", first.seconds, "cpu-s", blocks=first.result)
    yield row("its peak memory above torch", first.peak / MB, "MB", "< 150")
    yield row("second start", second.seconds, "cpu-s", "< 0.5")
    yield row("its peak memory above torch", second.peak / MB, "MB", "< 150")
    yield row("first start of 4 ranks, relative to one", sum(x.seconds for x in four) / first.seconds, "×", "≤ 1.3")
    documents = write_text(root / "documents", 100 * MB, 400_000)
    (long,) = alone(open_text, documents, tokenizer, cache, warm=warm)
    yield row("first start on 250 documents of 400 KB, relative to paragraphs", long.seconds / first.seconds, "×", "≤ 1.3")
    yield row("their peak memory above torch", long.peak / MB, "MB", "< 150")
    if full:
        large = write_text(root / "large", 1000 * MB, 600)
        (first,) = alone(open_text, large, tokenizer, cache, warm=warm)
        (second,) = alone(open_text, large, tokenizer, cache, warm=warm)
        yield row("1 GB of text, first start", first.seconds, "cpu-s", blocks=first.result)
        yield row("its peak memory above torch", first.peak / MB, "MB", "< 150")
        yield row("second start", second.seconds, "cpu-s")
        yield row("its peak memory above torch", second.peak / MB, "MB", "< 150")


# Images


def write_images(folder: Path, size: tuple[int, int], count: int) -> Path:
    """Write JPEGs of quality 90: smooth shapes with camera noise."""
    from PIL import Image

    folder.mkdir()
    rng = np.random.default_rng(0)
    noise = rng.normal(0, 6, (size[1], size[0], 3)).astype(np.float32)
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(size, Image.Resampling.BICUBIC)
        pixels = np.asarray(coarse) + np.roll(noise, number, axis=0)
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(folder / f"{number:04}.jpg", quality=90)
    return folder


def decode_images(path: Path, shrink: int) -> None:
    """Decode JPEGs at 1/`shrink`. At 1/8 this is little more than the entropy-coded data, which every crop needs in full."""
    from PIL import Image

    for file in sorted(path.iterdir()):
        with Image.open(file) as image:
            image.draft(None, (image.width // shrink, image.height // shrink))
            image.load()


def by_pillow(file: Path, index: int, augment: bool) -> Any:
    """An image as `train_images` makes it, using only Pillow."""
    from PIL import Image, ImageEnhance

    from d2v_fast.data.vision import random_box
    from d2v_fast.masking import Draws

    rng = Draws(0, 0, [index]).generator(0)
    with Image.open(file) as jpeg:
        left, top, right, bottom = random_box(*jpeg.size, (0.08, 1.0), (3 / 4, 4 / 3), rng)
        shrink = next((s for s in (8, 4, 2) if min(right - left, bottom - top) >= s * 224), 1)
        jpeg.draft(None, (jpeg.width // shrink, jpeg.height // shrink))
        box = (left / shrink, top / shrink, right / shrink, bottom / shrink)
        image = jpeg.resize((224, 224), Image.Resampling.BICUBIC, box=box)
    if augment:
        if rng.random() < 0.5:
            image = image.transpose(Image.Transpose.FLIP_LEFT_RIGHT)
        enhancers = (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color)
        for i in rng.permutation(3):
            image = enhancers[i](image).enhance(rng.uniform(0.6, 1.4))
    return image


def crop_images(path: Path, augment: bool) -> None:
    for index, file in enumerate(sorted(path.iterdir())):
        by_pillow(file, index, augment)


def train_images(path: Path) -> None:
    """Make the batches of a loader worker of vision/beit-base for a CPU: eight images, with masks."""
    from d2v_fast.data.vision import ImageData
    from d2v_fast.masking import BlockMask

    data = ImageData(mask=BlockMask(), path=str(path))
    data.grid = (14, 14)
    for begin in range(0, len(data), 8):
        data.__getitems__([(0, i) for i in range(begin, min(begin + 8, len(data)))])


def images(root: Path, full: bool) -> Iterator[dict[str, Any]]:
    for size, count, aim in ((PHOTO, 400, "≥ 400"), (LARGE, 24, "≥ 50")):
        name = "images of " + " × ".join(map(str, size))
        path = write_images(root / f"{size[0]}", size, count)
        few = write_images(root / f"{size[0]}-few", PHOTO, 8)
        weight = sum(file.stat().st_size for file in path.iterdir()) / count
        calls: list[tuple[Any, ...]] = [(train_images,), (crop_images, True), (crop_images, False)]
        calls += [(decode_images, 1), (decode_images, 8)]
        turns = [[count / alone(call, path, *how, warm=(few, *how))[0].seconds for call, *how in calls] for _ in range(TURNS)]
        trained, augmented, cropped, decoded, shrunk = np.median(turns, axis=0).tolist()
        yield row(f"{name}, decoded, cropped, jittered, masked", trained, "per cpu-s", aim, file_bytes=weight)
        yield row("the same with Pillow alone, without masks", augmented, "per cpu-s")
        yield row("our rate relative to Pillow alone", 100 * float(np.median([turn[0] / turn[1] for turn in turns])), "%")
        yield row("the same crops with Pillow alone, only decoded and resized", cropped, "per cpu-s")
        yield row("the same JPEGs, only decoded", decoded, "per cpu-s")
        yield row("the same JPEGs, only decoded at 1/8", shrunk, "per cpu-s")


# Speech


def open_manifest(path: Path) -> tuple[int, int]:
    """Number of samples, and of files opened in the folder of the recordings."""
    from d2v_fast.data.audio import AudioData
    from d2v_fast.masking import SpanMask

    opened = []
    recordings = f"{path.parent}/recordings/"
    sys.addaudithook(lambda event, args: event == "open" and str(args[0]).startswith(recordings) and opened.append(args[0]))
    data = AudioData(mask=SpanMask(), path=str(path), cache=str(path.parent / "cache"))
    data.contents()
    # The hook does not see files that libsndfile opens. The recordings do not exist, so a length read by libsndfile would be 0.
    return len(data), len(opened) + int((data.durations == 0).sum())


def write_manifest(file: Path, lines: int) -> Path:
    names = [f"{i:06}.flac\t{RATE * (2 + i % 14)}" for i in range(lines)]
    file.write_text("\n".join([str(file.parent / "recordings"), *names]), encoding="utf-8")
    return file


def resume_at(epoch: int, utterances: int) -> Any:
    """The first batch of an epoch."""
    from d2v_fast.data import EpochBatches

    lengths = np.random.default_rng(0).integers(2 * RATE, 16 * RATE, utterances)
    order = EpochBatches(utterances, 8, lengths=lengths, start=epoch * -(-utterances // 8))
    return next(iter(order))[0]


def write_recordings(folder: Path, hours: int) -> Path:
    """Write FLACs of an hour each: voiced tones, four syllables per second, with noise."""
    import soundfile

    folder.mkdir()
    rng, time = np.random.default_rng(0), np.arange(60 * RATE) / RATE
    minute = sum(np.sin(2 * np.pi * 120 * k * time) / k for k in range(1, 12)) * np.sin(np.pi * 4 * time) ** 2
    for number in range(hours):
        with soundfile.SoundFile(folder / f"{number:02}.flac", "w", RATE, 1) as file:
            for _ in range(60):
                file.write(0.1 * minute + 0.003 * rng.normal(size=len(minute)))
    return folder


def read_epoch(path: Path) -> float:
    """Make all batches of an epoch as one loader worker of audio/data2vec-base does; return their seconds of audio."""
    from d2v_fast.data import EpochBatches
    from d2v_fast.data.audio import AudioData
    from d2v_fast.masking import SpanMask

    data = AudioData(mask=SpanMask(), path=str(path), cache=str(path.parent / "cache"))
    data.frames = lambda samples: (samples - 80) // 320  # of the convolutions of wav2vec 2.0
    samples = 0
    for batch in EpochBatches(len(data), 8, lengths=data.lengths).epoch(0):
        samples += data.__getitems__([(0, int(i)) for i in batch])["source"].numel()
    return samples / RATE


def speech(root: Path, full: bool) -> Iterator[dict[str, Any]]:
    few = root / "few"
    few.mkdir()
    lines = 50_000
    (found,) = alone(open_manifest, write_manifest(root / "train.tsv", lines), warm=(write_manifest(few / "train.tsv", 10),))
    yield row("start from a manifest of 50,000 lines with lengths", found.seconds, "cpu-s", "< 1", samples=found.result[0])
    yield row("recordings opened meanwhile", found.result[1], "", "0")
    (found,) = alone(resume_at, 400, 281_000, warm=(0, 100))
    yield row("first batch of epoch 400 of 281,000 utterances", found.seconds, "cpu-s", "< 2")
    hours = 12
    path, warm = write_recordings(root / "hours", hours), (write_recordings(root / "hour", 1),)
    (found,) = alone(read_epoch, path, warm=warm)
    yield row("an epoch of 12 FLACs of an hour each", found.result / found.seconds, "s of audio per cpu-s", "≥ 2,000")
    yield row("its worker's peak memory above torch", found.peak / MB, "MB", "< 500")
    yield row("share of the audio in an epoch", 100 * found.result / (3600 * hours), "%", "≥ 95")


def machine_info(found: list[dict[str, float]]) -> dict[str, Any]:
    """Hardware and versions, as pytest-benchmark and conftest.py record them."""
    from cpuinfo import get_cpu_info

    from benchmarks.conftest import CPU

    about = get_cpu_info()
    cpu = {key: about.get(key) for key in CPU}
    return dict(cpu=cpu, threads=1, python=platform.python_version(), torch=torch.__version__, rates=found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--full", action="store_true", help="add 1 GB of text, and write the result")
    parser.add_argument("--only", choices=[each.__name__ for each in KINDS], help="one kind of data; writes nothing")
    parser.add_argument("--folder", type=Path, help="parent of the temporary folder for the corpora")
    arguments = parser.parse_args()
    from pytest_benchmark.utils import get_commit_info

    os.environ["OMP_NUM_THREADS"] = "1"
    torch.set_num_threads(1)
    before, entries = rates("cpu"), []
    for kind in KINDS:
        if arguments.only in (None, kind.__name__):
            with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
                for found in kind(Path(folder), arguments.full):
                    print(f"{found['case']}: {found['figure']:.4g} {found['unit']}", file=sys.stderr, flush=True)
                    entries.append({"name": f"corpora[{kind.__name__}]", "extra_info": found})
    commit = {key: value for key, value in get_commit_info().items() if key in ("id", "time", "dirty")}
    result = {"benchmarks": entries, "machine_info": machine_info([before, rates("cpu")]), "commit_info": commit}
    file = RESULTS / "cpu-corpora.json"
    if arguments.full and not arguments.only:
        file.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(corpora_table(file))
    else:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / "corpora.json"
            file.write_text(json.dumps(result), encoding="utf-8")
            print(corpora_table(file))


KINDS = (speech, images, text)

if __name__ == "__main__":
    main()
