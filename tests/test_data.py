"""Data sets compared with files of known content: what is read, cut, packed and masked, and on which rank."""

import collections
import csv
import inspect
import itertools
import json
import math
import os
import subprocess
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import soundfile
import torch
from PIL import Image, ImageEnhance

from d2v_fast.config import MODALITIES
from d2v_fast.data import (
    DataError,
    EpochBatches,
    PretrainingData,
    Source,
    _share_memory,
    expand_braces,
    find_files,
    first_line,
    is_local,
    load_hub,
    make_loader,
    read_preprocessing,
)
from d2v_fast.data.audio import AudioData, count_samples, open_audio, read_audio, standardize
from d2v_fast.data.builtin import SHAPES, WORDS, builtin_images, builtin_speech, builtin_text
from d2v_fast.data.documents import load_documents
from d2v_fast.data.spectrograms import SpectrogramData
from d2v_fast.data.text import TextData
from d2v_fast.data.vision import (
    ImageData,
    center_crop,
    color_jitter,
    crop_to,
    open_images,
    random_box,
    to_pixels,
)
from d2v_fast.masking import BlockMask, Draws, ExactBlockMask, RandomMask, SpanMask, TokenMask

RATE = 16_000
WORDLIST = "alpha beta gamma delta dog runs over under épsilon 日本 ñandú naïve".split()


class Encoder:
    """Stands in for an encoder: 4×4 patches, or a frame of 400 samples every 320."""

    hidden_size = 12

    def __init__(self, kind="", **config):
        self.kind, self.model = kind, torch.nn.Module()
        self.model.config = type("Config", (), {"model_type": "bert", "pad_token_id": 0, **config})()

    def positions(self, size):
        return (size // 4, size // 4) if self.kind == "image" else max(0, (size - 400) // 320 + 1)


def paragraphs(count, words=20, seed=0):
    rng = np.random.default_rng(seed)
    return [" ".join(rng.choice(WORDLIST, words)) for _ in range(count)]


def write_wave(path, wave, rate=RATE, **kwargs):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    soundfile.write(path, wave, rate, **kwargs)
    return str(path)


@pytest.fixture
def texts(tmp_path):
    documents = paragraphs(60)
    (tmp_path / "corpus.txt").write_text("\n".join(documents))
    return str(tmp_path / "corpus.txt"), documents


@pytest.fixture
def images(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(12):
        folder = tmp_path / "images" / "ab"[i % 2]
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (20 + i, 30, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return str(tmp_path / "images")


@pytest.fixture
def waves(tmp_path):
    rng = np.random.default_rng(0)
    for i in range(10):
        write_wave(tmp_path / "waves" / f"s{i % 2}" / f"{i}.wav", 0.1 * rng.normal(size=RATE // 4 + 500 * i))
    return str(tmp_path / "waves")


def text_data(path, mask=None, **kwargs):
    kwargs = {"block_size": 16, "vocab_size": 300} | kwargs
    return TextData(path=path, mask=mask or TokenMask(0.3, 2), **kwargs)


def random_crop(image, size, scale, ratio, rng):
    return crop_to(image, size, random_box(*image.size, scale, ratio, rng))


def image_data(path, mask=None, **kwargs):
    data = ImageData(path=path, mask=mask or RandomMask(0.5), **{"image_size": 16} | kwargs)
    data.fit_to(Encoder("image", image_size=data.image_size))
    return data


def audio_data(path, mask=None, **kwargs):
    data = AudioData(path=path, mask=mask or SpanMask(0.5, 3), **{"min_seconds": 0.05, "max_seconds": 1.0} | kwargs)
    data.fit_to(Encoder())
    return data


class TestEpochBatches:
    def test_order_is_a_function_of_seed_and_epoch(self):
        def order(seed, epoch):
            return np.concatenate(EpochBatches(50, 5, seed).epoch(epoch)).tolist()

        assert order(3, 7) == order(3, 7)
        assert order(3, 7) != order(3, 8)
        assert order(3, 7) != order(4, 7)

    def test_the_order_is_drawn_by_numpy(self):
        """The reference is written out, because a resumed run depends on the order never changing between versions."""
        drawn = np.random.default_rng([3, 7]).permutation(11).tolist()
        assert [batch.tolist() for batch in EpochBatches(11, 4, 3).epoch(7)] == [drawn[:4], drawn[4:8]]
        assert EpochBatches(11, 11, -1).epoch(7)[0].tolist() == np.random.default_rng([2**64 - 1, 7]).permutation(11).tolist()
        lengths = np.random.default_rng(0).integers(1, 10_000, 450)
        drawn = np.random.default_rng([0, 2]).permutation(450).tolist()
        windows = [sorted(drawn[i : i + 200], key=lambda sample: lengths[sample]) for i in (0, 200, 400)]  # of 100 batches
        pairs = {tuple(window[i : i + 2]) for window in windows for i in range(0, len(window), 2)}
        found = [tuple(batch.tolist()) for batch in EpochBatches(450, 2, lengths=lengths).epoch(2)]
        assert set(found) == pairs and len(found) == 225

    @pytest.mark.parametrize("lengths", [None, np.arange(60) % 17 + 1])
    @pytest.mark.parametrize("world", [1, 3])
    def test_ranks_share_every_sample_once_an_epoch(self, lengths, world):
        ranks = [EpochBatches(60, 4, rank=rank, world=world, lengths=lengths) for rank in range(world)]
        keys = [key for batches in ranks for batch in itertools.islice(batches, 45 // world) for key in batch]
        assert sorted(keys) == [(epoch, index) for epoch in range(3) for index in range(60)]

    @pytest.mark.parametrize("start", [0, 3, 12])
    @pytest.mark.parametrize("world", [2, 3, 4])
    def test_a_step_of_several_ranks_is_one_of_a_single_rank(self, world, start):
        """A step has 12 batches and an epoch 5, so steps end within epochs and ranks are in different ones."""
        each = 12 // world
        ranks = [iter(EpochBatches(22, 4, rank=rank, world=world, start=start * each)) for rank in range(world)]
        alone = iter(EpochBatches(22, 4, start=start * 12))
        for _ in range(9):
            found = [next(rank) for rank in ranks for _ in range(each)]
            assert sorted(found) == sorted(next(alone) for _ in range(12))

    @pytest.mark.parametrize("start", [1, 4, 5, 13])
    def test_start_skips_exactly(self, start):
        whole = list(itertools.islice(EpochBatches(22, 4), 20))
        rest = list(itertools.islice(EpochBatches(22, 4, start=start), 20 - start))
        assert rest == whole[start:]
        assert [batch[0][0] for batch in whole[:11]] == [0] * 5 + [1] * 5 + [2]

    def test_little_is_padding(self):
        lengths = np.random.default_rng(0).lognormal(4.5, 0.9, 20_000).clip(4, 512).astype(int)

        def padding(batches, multiple=1):
            return 1 - lengths.sum() / sum(-(-lengths[batch].max() // multiple) * multiple * len(batch) for batch in batches)

        assert padding(EpochBatches(20_000, 8).epoch(0)) > 0.4
        assert padding(EpochBatches(20_000, 8, lengths=lengths).epoch(0)) < 0.02
        assert padding(EpochBatches(20_000, 8, lengths=lengths).epoch(0), MODALITIES["text"].length_multiple) < 0.05

    def test_similar_lengths_share_a_batch(self):
        lengths = np.random.default_rng(0).integers(1, 1000, 200)
        batches = EpochBatches(200, 10, lengths=lengths).epoch(0)
        assert max(np.ptp(lengths[batch]) for batch in batches) < 150
        firsts = [lengths[batch].min() for batch in batches]
        assert firsts != sorted(firsts)

    def test_batches_fill_up_to_a_length(self):
        lengths = np.random.default_rng(0).integers(1, 100, 90)
        lengths[5] = 700
        batches = EpochBatches(90, 8, lengths=lengths, max_batch_length=300).epoch(1)
        assert sorted(np.concatenate(batches)) == list(range(90))
        padded = [len(batch) * lengths[batch].max() for batch in batches]
        assert [len(batch) for batch, size in zip(batches, padded, strict=True) if size > 300] == [1]
        assert np.median(padded) > 200

    @pytest.mark.parametrize(
        "lengths, limit, sizes",
        [
            ([10] * 7, 30, [3, 3, 1]),
            ([10] * 5 + [20] * 2, 40, [4, 2, 1]),  # the fifth short one fills up the first pair of long ones
            ([1] * 6, 6, [6]),
            ([0] * 6, 6, [6]),  # of unreadable headers
            ([50, 50], 30, [1, 1]),
        ],
    )
    def test_filled_batches_by_hand(self, lengths, limit, sizes):
        batches = EpochBatches(len(lengths), 8, lengths=np.array(lengths), max_batch_length=limit).epoch(0)
        assert sorted(map(len, batches), reverse=True) == sizes
        assert sorted(np.concatenate(batches)) == list(range(len(lengths)))

    @pytest.mark.parametrize("limit", [20, 64, 100, 300, 9000])
    def test_filled_batches_are_as_many_in_every_epoch(self, limit):
        """They hold all samples, stay within the limit, and group similar lengths."""
        lengths = np.random.default_rng(0).gamma(4, 5, 3000).clip(1, 60).astype(int)
        lengths[:7] = 0  # their headers cannot be read
        order = EpochBatches(3000, 8, lengths=lengths, max_batch_length=limit)
        epochs = [order.epoch(epoch) for epoch in range(4)]
        assert len({len(batches) for batches in epochs}) == 1 and len({batches[0].tobytes() for batches in epochs}) == 4
        for batches in epochs:
            assert sorted(np.concatenate(batches)) == list(range(3000))
            assert all(len(batch) == 1 or len(batch) * lengths[batch].max() <= limit for batch in batches)
        assert {frozenset(batch) for batch in epochs[0]} != {frozenset(batch) for batch in epochs[1]} or limit == 20
        kept = sum(len(batch) * lengths[batch].min() for batch in epochs[0]) / lengths.sum()
        assert kept > 0.9 or limit == 9000

    @pytest.mark.parametrize("lengths, limit", [(None, None), (np.arange(60) % 17 + 1, None), (np.arange(60) % 17 + 1, 40)])
    @pytest.mark.parametrize("world", [1, 2])
    def test_a_late_start_computes_two_epochs(self, lengths, limit, world, monkeypatch):
        settings = dict(lengths=lengths, max_batch_length=limit, world=world, rank=world - 1)
        begin = list(itertools.islice(EpochBatches(60, 4, **settings), 200))
        computed = []
        epoch = EpochBatches.epoch
        monkeypatch.setattr(EpochBatches, "epoch", lambda self, number: computed.append(number) or epoch(self, number))
        late = list(itertools.islice(EpochBatches(60, 4, **settings, start=150), 3))
        assert late == begin[150:153] and len(computed) <= 3

    def test_fewer_samples_than_a_batch(self):
        assert [len(batch) for batch in EpochBatches(3, 16).epoch(0)] == [3]
        assert len(EpochBatches(12, 4, world=3).epoch(0)) == 3
        with pytest.raises(DataError, match="fewer than the 4 processes"):
            EpochBatches(3, 16, world=4).epoch(0)


@pytest.mark.parametrize(
    "mask, grid, refused",
    [
        (SpanMask(length=8), 8, None),
        (SpanMask(length=9), 8, r"^mask.length=9: one span would cover the whole grid 8; expected at most 8$"),
        (SpanMask(length=2), (4, 8), r"^mask: SpanMask needs one axis, but the grid of the data is \(4, 8\)"),
        (ExactBlockMask(length=8), (4, 8), None),
        (
            ExactBlockMask(length=9),
            (4, 8),
            r"^mask.length=9: one block would cover the whole grid \(4, 8\); expected at most 8$",
        ),
        (BlockMask(31), (4, 8), None),
        (BlockMask(32), (4, 8), r"^mask.count=32: a sample has 32 positions"),
        (BlockMask(1), 8, r"^mask: BlockMask needs two axes, but the grid of the data is 8"),
        (RandomMask(), (2, 3, 4), None),
        (TokenMask(), 8, r"^mask: TokenMask needs ids of a tokenizer"),
        (SpanMask(length=9), None, None),  # samples that differ in size
    ],
)
def test_masks_that_fit_a_grid(mask, grid, refused):
    data = PretrainingData(mask=mask)
    data.grid = grid
    with pytest.raises(DataError, match=refused) if refused else nullcontext():
        data.check_mask()


@pytest.fixture
def rows():
    """Three samples of eight numbers each."""
    data = PretrainingData(mask=RandomMask(0.5))
    data.source, data.grid = Source(list("abc"), lambda i: np.full(8, i)), (8,)
    return data


def test_a_batch_by_hand(rows):
    """Samples are stacked, and masked by their keys with seed 0."""
    batch = rows.__getitems__([(3, 2), (3, 0)])
    assert batch["source"].tolist() == [[2] * 8, [0] * 8]
    assert (batch["epoch"], batch["samples"], batch["broken"]) == (3, [2, 0], [])
    mask = RandomMask(0.5)(Draws(0, 3, [2, 0]), 8)
    assert np.array_equal(batch["mask"], mask) and batch["index"].tolist() == np.flatnonzero(mask).tolist()
    rows.collate = lambda samples, draws: {"source": np.stack(samples), "target": np.stack(samples)}
    with pytest.raises(DataError, match=r"^PretrainingData\.collate: returns no mask; found source, target$"):
        rows.__getitems__([(3, 2)])


class Endless(torch.utils.data.IterableDataset):
    def __iter__(self):
        return itertools.repeat({})


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_has_the_workers_asked_for(rows, workers, monkeypatch, caplog):
    """One for a stream, and none where a process cannot be forked. It draws nothing from the generator of dropout."""
    order, before = EpochBatches(3, 2), torch.get_rng_state()
    loader = make_loader(rows, order, workers)
    assert [batch["samples"] for batch in itertools.islice(loader, 2)] == [
        [index for _, index in keys] for keys in itertools.islice(order, 2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert loader.num_workers == workers and not loader.pin_memory
    assert loader.prefetch_factor == (4 if workers else None)
    stream = Endless()
    loader = make_loader(rows, stream, workers)
    assert (loader.dataset, loader.batch_size, loader.num_workers) == (stream, None, min(workers, 1))
    assert not caplog.messages
    monkeypatch.setattr("multiprocessing.get_all_start_methods", lambda: ["spawn"])
    assert make_loader(rows, order, workers).num_workers == 0
    assert len(caplog.messages) == (workers > 0)


def test_only_a_worker_shares_memory(monkeypatch):
    batch = {"samples": [1], "source": torch.zeros(3)}
    assert not _share_memory(batch)["source"].is_shared()
    monkeypatch.setattr("d2v_fast.data.get_worker_info", lambda: "a worker")
    assert _share_memory(batch)["source"].is_shared() and batch["samples"] == [1]


def test_an_encoder_without_preprocessing_has_none():
    def missing(name):
        raise OSError(f"{name} has no preprocessor_config.json")

    assert read_preprocessing(lambda name: ({"of": name}, {}), "x") == {"of": "x"} and read_preprocessing(missing, "x") == {}


@pytest.mark.parametrize(
    "cls, published",
    [
        (ImageData, dict(image_size=224, crop_scale=(0.08, 1.0), crop_ratio=(3 / 4, 4 / 3), flip=0.5, jitter=0.4)),
        (ImageData, dict(mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225))),
        (AudioData, dict(sample_rate=16_000, max_seconds=20.0, crop=True, normalize=True, channel_prob=0.0)),
        (TextData, dict(block_size=512, cross_documents=True, teacher_input="full")),
        (SpectrogramData, dict(sample_rate=16_000, target_length=1024, mel_bins=128, mean=-4.268, std=4.569)),
    ],
)
def test_defaults_are_the_published_settings(cls, published):
    """Method 3.1 to 3.3; crops and colours of ImageNet as in Szegedy et al. 2015; EAT for spectrograms."""
    parameters = inspect.signature(cls).parameters
    assert {name: parameters[name].default for name in published} == published


@pytest.mark.parametrize("kind", ["text", "images", "waves"])
class TestPureFunctionOfKey:
    @pytest.fixture
    def data(self, kind, request):
        if kind == "text":
            return text_data(request.getfixturevalue("texts")[0], cross_documents=False)
        path = request.getfixturevalue(kind)
        return image_data(path) if kind == "images" else audio_data(path, crop=False, channel_prob=0.2)

    def test_whatever_loads_it(self, data):
        def batches(workers):
            loader = make_loader(data, EpochBatches(len(data), 3, lengths=data.lengths), workers)
            return list(itertools.islice(loader, 6))

        alone, shared = batches(0), batches(2)
        for one, other in zip(alone, shared, strict=True):
            assert one.keys() == other.keys() and one["samples"] == other["samples"]
            for name in one.keys() - {"samples", "broken", "epoch"}:
                assert torch.equal(one[name], other[name]), name

    def test_whatever_it_is_loaded_with(self, data):
        def row(batch, i):
            real = ~batch["padding_mask"][i] if "padding_mask" in batch else slice(None)
            return batch["source"][i], batch["mask"][i][real]

        one, other = data.__getitems__([(4, 2), (4, 5)]), data.__getitems__([(4, 1), (4, 3), (4, 2)])
        (source, mask), (source_too, mask_too) = row(one, 0), row(other, 2)
        size = min(source.shape[-1], source_too.shape[-1])  # padding is the one thing a batch may change
        assert torch.equal(source[..., :size], source_too[..., :size])
        assert torch.equal(mask, mask_too)

    def test_epoch_and_seed_change_it(self, data, kind):
        def batch(seed, epoch):
            data.seed = seed
            return data.__getitems__([(epoch, 2)])

        first = batch(0, 0)
        for others in ([batch(0, epoch) for epoch in (1, 2, 3)], [batch(seed, 0) for seed in (1, 2, 3)]):
            for name in ("mask", "source") if kind == "images" else ("mask",):
                assert any(not torch.equal(first[name], other[name]) for other in others)


class TestFiles:
    def test_links_loops_and_hidden_files(self, tmp_path):
        inner = tmp_path / "data" / "inner"
        inner.mkdir(parents=True)
        for name in ("a.png", "B.PNG", "._c.png", ".d.png", "e.txt"):
            (inner / name).write_text("x")
        (inner / ".cache").mkdir()
        (inner / ".cache" / "f.png").write_text("x")
        (inner / "up").symlink_to("..")
        (inner / "self.png").symlink_to("self.png")  # fails when it is read
        (tmp_path / "link").symlink_to("data")
        found = find_files(str(tmp_path / "link"), (".png",))
        assert [os.path.basename(file) for file in found] == ["B.PNG", "a.png", "self.png"]

    def test_patterns_and_odd_names(self, tmp_path):
        for name in ("a[1].wav", "b.wav", "c.flac"):
            (tmp_path / name).write_text("x")
        assert find_files(str(tmp_path / "a[1].wav"), (".wav",)) == [str(tmp_path / "a[1].wav")]
        assert find_files(str(tmp_path / "*"), (".wav",)) == [str(tmp_path / "a[1].wav"), str(tmp_path / "b.wav")]

    @pytest.mark.parametrize(
        "pattern",
        [
            *(
                "x-{0000..0012}.tar",
                "{a,b}{1..3}",
                "{3..1}",
                "{-2..2}",
                "{08..11}",
                "{0..90..20}",
                "a{b,c{1..2},}d",
                "{a,{b,c}}",
                "{a}{b,c}",
            ),
            *("x{}", "{a}", "{a..b", "a}b", "{{1..2}}", "{a{1..2}", "1..2", "{a{b,c}}", "{1..2..0}", "{,x}/{y}"),
        ],
    )
    def test_braces_are_those_of_bash(self, pattern):
        bash = subprocess.run(["bash", "-c", f"printf '%s\\n' {pattern}"], capture_output=True, text=True, check=True)
        assert [name for name in expand_braces(pattern) if name] == [name for name in bash.stdout.split("\n") if name]

    def test_files_by_braces(self, tmp_path):
        for name in ("t-08.txt", "t-09.txt", "t-10.txt", "t-11.txt", "u-1.txt", "{x,y}.txt"):
            (tmp_path / name).write_text(name)
        assert set(load_documents(f"{tmp_path}/t-{{08..10}}.txt")) == {"t-08.txt", "t-09.txt", "t-10.txt"}
        assert len(find_files(f"{tmp_path}/{{t-0*,t-?8,u-1}}.txt", (".txt",))) == 3  # one file matches twice
        assert list(load_documents(f"{tmp_path}/{{x,y}}.txt")) == ["{x,y}.txt"]
        with pytest.raises(DataError, match=r"2 of the 6 files it names do not exist: .*/t-07\.txt, .*/t-12\.txt$"):
            load_documents(f"{tmp_path}/t-{{07..12}}.txt")
        (tmp_path / "far" / "away").mkdir(parents=True)
        (tmp_path / "far" / "away" / "v.txt").write_text("v")
        for pattern, names in (("t-{08,11}", "t-08 t-11"), ("**/v", "far/away/v"), ("{**/v,u-1}", "far/away/v u-1")):
            assert find_files(f"{tmp_path}/{pattern}.txt", (".txt",)) == [f"{tmp_path}/{name}.txt" for name in names.split()]
        (tmp_path / "w-1.txt").mkdir()  # a pattern means files
        assert find_files(f"{tmp_path}/{{u,w}}-*.txt", (".txt",)) == [f"{tmp_path}/u-1.txt"]

    @pytest.mark.parametrize("name", ["a[1]", "b [x]", "c*", "d?", "e{1,2}", "f'\"", "[!g]"])
    def test_a_name_is_no_pattern(self, tmp_path, name):
        import datasets

        (tmp_path / name).mkdir()
        for file in ("1.txt", f"{name}.txt"):
            (tmp_path / name / file).write_text(file)
        assert set(load_documents(str(tmp_path / name))) == {"1.txt", f"{name}.txt"}
        datasets.Dataset.from_dict({"text": ["x"]}).to_parquet(str(tmp_path / name / f"{name}.parquet"))
        assert len(load_hub(str(tmp_path / name / f"{name}.parquet"), None, "train")) == 1

    def test_a_folder_that_cannot_be_listed_is_named(self, tmp_path, monkeypatch, caplog):
        for name in "ab":
            (tmp_path / name).mkdir()
            (tmp_path / name / "x.png").write_text("x")
        scandir = os.scandir

        def denied(folder):
            if os.path.basename(folder) == "a":
                raise PermissionError(13, "Permission denied", folder)
            return scandir(folder)

        monkeypatch.setattr(os, "scandir", denied)
        assert find_files(str(tmp_path), (".png",)) == [str(tmp_path / "b" / "x.png")]
        assert f"left out: [Errno 13] Permission denied: '{tmp_path}/a'" in caplog.text

    @pytest.mark.parametrize("count", [5, 7])
    def test_up_to_five_missing_files_are_named(self, tmp_path, count):
        with pytest.raises(DataError) as caught:
            find_files(f"{tmp_path}/{{1..{count}}}.png", (".png",))
        names = ", ".join(f"{tmp_path}/{i}.png" for i in range(1, 6))
        assert str(caught.value).endswith(f"{count} of the {count} files it names do not exist: {names}" + ", …" * (count == 7))

    def test_the_first_line_of_an_error(self):
        assert first_line(ValueError("\n  \n two \nthree")) == "two" and first_line(KeyError()) == "KeyError"

    @pytest.mark.parametrize(
        "path, message", [("no", "no such file or folder"), (".", "no file with one of the extensions .wav")]
    )
    def test_nothing_there(self, tmp_path, path, message):
        with pytest.raises(DataError, match=message):
            find_files(str(tmp_path / path), (".wav",))

    def test_local_or_hub(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        (tmp_path / "here").mkdir()
        names = ["here", "./there", "~/there", "/there", "there/", "there.txt", "there/*.wav", "there/*", "there/{a,b}"]
        assert all(map(is_local, names))
        assert not any(map(is_local, ["wikitext", "user/set", "teknium/OpenHermes-2.5", "org/set-1.5T"]))
        for name, parts in (("saved", ["state", "dataset_info"]), ("splits", ["dataset_dict"]), ("part", ["state"])):
            (tmp_path / name).mkdir()
            for part in parts:
                (tmp_path / name / f"{part}.json").write_text("{}")
            assert is_local(name) == (name == "part"), name

        def said(path):
            with pytest.raises(DataError, match=rf"^data\.path={path}: ") as error:
                load_hub(path, None, "train")
            return str(error.value).removeprefix(f"data.path={path}: ")

        assert said("here").startswith("cannot be loaded as") and said("saved").startswith("cannot be loaded as")
        assert said("no/such").startswith("no such file or folder here, and it cannot be loaded as")


class TestImages:
    def test_crops_keep_to_area_and_aspect(self):
        y, x = np.mgrid[0:200, 0:200].astype(np.uint8)
        image = Image.fromarray(np.stack([x, y, x], axis=2))  # each pixel encodes its position
        rng = np.random.default_rng(0)
        areas, aspects, places = [], [], []
        for _ in range(400):
            crop = np.asarray(random_crop(image, 8, (0.2, 0.6), (3 / 4, 4 / 3), rng), dtype=float)
            assert crop.shape == (8, 8, 3)
            # Away from the edges, a pixel of the crop is w/8 wide and h/8 high.
            wide, high = (crop[4, 5, 0] - crop[4, 2, 0]) * 8 / 3, (crop[5, 4, 1] - crop[2, 4, 1]) * 8 / 3
            areas.append(wide * high / 200**2)
            aspects.append(wide / high)
            # The left and upper edge, as a share of the room that the crop leaves.
            left, top = crop[4, 2, 0] + 0.5 - wide * 2.5 / 8, crop[2, 4, 1] + 0.5 - high * 2.5 / 8
            places.append((left / (200 - wide), top / (200 - high)))
        assert 0.17 < min(areas) < 0.24 and 0.55 < max(areas) < 0.63
        assert np.mean(areas) == pytest.approx(0.4, abs=0.03)
        assert 0.71 < min(aspects) < 0.8 and 1.25 < max(aspects) < 1.41
        assert np.mean(np.log(aspects)) == pytest.approx(0, abs=0.03)
        assert np.mean(places, axis=0) == pytest.approx(0.5, abs=0.05)
        assert np.std(places, axis=0) == pytest.approx(12**-0.5, abs=0.03)  # uniform

    @pytest.mark.parametrize("size", [4, 8, 12])
    def test_crops_are_resized_bicubically(self, size):
        """Keys 1981 with a = -½, the kernel stretched where the image shrinks, as Pillow documents it."""
        pixels = np.random.default_rng(0).integers(0, 256, (8, 8, 3), dtype=np.uint8)
        stretch = max(8 / size, 1)
        t = abs((np.arange(8) + 0.5) - (np.arange(size)[:, None] + 0.5) * 8 / size) / stretch
        weights = np.where(t < 1, 1.5 * t**3 - 2.5 * t**2 + 1, np.where(t < 2, -0.5 * t**3 + 2.5 * t**2 - 4 * t + 2, 0))
        weights /= weights.sum(1, keepdims=True)
        expected = np.einsum("yj,xi,jic->yxc", weights, weights, pixels).clip(0, 255)
        for resized in (
            crop_to(Image.fromarray(pixels), size, (0, 0, 8, 8)),
            center_crop(Image.fromarray(pixels), size),
        ):
            difference = np.abs(np.asarray(resized) - expected)
            assert np.median(difference) <= 0.5 and (difference < 3).mean() > 0.95  # Pillow rounds between the two passes

    @pytest.mark.parametrize("size", [(300, 1), (1, 300), (1, 1)])
    def test_extreme_shapes(self, size):
        image = Image.new("RGB", size, (9, 8, 7))
        crop = random_crop(image, 8, (0.08, 1.0), (3 / 4, 4 / 3), np.random.default_rng(0))
        assert np.array_equal(np.asarray(crop), np.tile(np.uint8([9, 8, 7]), (8, 8, 1)))

    def test_a_crop_that_never_fits_is_the_largest_in_the_middle(self):
        y, x = np.mgrid[0:9, 0:101].astype(np.uint8)
        image = Image.fromarray(np.stack([x, y, x], axis=2))
        for wide in (image, image.transpose(Image.Transpose.TRANSPOSE)):
            crop = np.asarray(random_crop(wide, 9, (0.9, 1), (3 / 4, 4 / 3), np.random.default_rng(0)), dtype=float)
            assert crop[4, 4, :2] == pytest.approx([50, 4], abs=1) and np.ptp(crop[..., 0]) == pytest.approx(11, abs=1)
            assert np.ptp(crop[..., 1]) == 8

    def test_boxes_by_hand(self):
        """The draws are the share of the area, the log aspect, and the corner: here the last possible one."""

        class Drawn:
            def __init__(self, *values):
                self.values, self.asked = itertools.cycle(values), []

            def uniform(self, low, high):
                self.asked.append((low, high))
                return next(self.values)

            def integers(self, low, high):
                self.asked.append((low, high))
                return high - 1

        rng = Drawn(0.25, math.log(1.25))  # 5 × 4 of 10 × 8
        assert random_box(10, 8, (0.1, 0.3), (1, 2), rng) == (5, 4, 10, 8)
        assert rng.asked[1] == pytest.approx((0, math.log(2)))
        assert [rng.asked[0], *rng.asked[2:]] == [(0.1, 0.3), (0, 6), (0, 5)]
        for side in (1, 9):
            rng = Drawn(1, 0)  # fits at once
            assert random_box(side, side, (1, 1), (1, 1), rng) == (0, 0, side, side) and len(rng.asked) == 4
        for wide, high, expected in ((101, 9, (44, 0, 56, 9)), (9, 101, (0, 44, 9, 56))):
            rng = Drawn(0.95, 0)  # 29 × 29 does not fit, and 12 × 9 is the longest that may
            assert random_box(wide, high, (0.9, 1), (3 / 4, 4 / 3), rng) == expected and len(rng.asked) == 20
        rngs = map(np.random.default_rng, range(50))  # a box is at least a pixel wide and high
        assert {random_box(1, 1, (0.08, 1.0), (3 / 4, 4 / 3), rng) for rng in rngs} == {(0, 0, 1, 1)}

    def test_crops_have_the_area_and_the_aspect_of_the_settings(self, tmp_path):
        y, x = np.mgrid[0:128, 0:128].astype(np.uint8)
        Image.fromarray(np.stack([x, y, x], axis=2)).save(tmp_path / "a.png")
        data = image_data(str(tmp_path), image_size=8, crop_scale=(0.125, 0.125), crop_ratio=(2, 2), jitter=0, flip=0)
        crop = np.asarray(data.load(0, np.random.default_rng(0)), dtype=float)
        sides = (crop[4, 5, 0] - crop[4, 2, 0]) * 8 / 3, (crop[5, 4, 1] - crop[2, 4, 1]) * 8 / 3
        assert sides == pytest.approx((64, 32), abs=3)

    def test_a_probe_sees_the_square_in_the_middle(self):
        y, x = np.mgrid[0:9, 0:101].astype(np.uint8)
        image = Image.fromarray(np.stack([x, y, x], axis=2))
        for wide in (image, image.transpose(Image.Transpose.TRANSPOSE)):
            crop = np.asarray(center_crop(wide, 9))
            assert (np.unique(crop[..., 0]) == np.arange(46, 55)).all() and (np.unique(crop[..., 1]) == np.arange(9)).all()

    def test_to_pixels(self):
        image = Image.new("RGB", (2, 3), (255, 0, 51))
        image.putpixel((1, 2), (0, 255, 102))
        pixels = to_pixels([image, image], (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
        assert pixels.shape == (2, 3, 3, 2) and pixels.dtype == np.float32
        assert pixels[1, :, 0, 0] == pytest.approx([(1 - 0.485) / 0.229, -0.456 / 0.224, (0.2 - 0.406) / 0.225], rel=1e-5)
        assert pixels[1, :, 2, 1] == pytest.approx([-0.485 / 0.229, (1 - 0.456) / 0.224, (0.4 - 0.406) / 0.225], rel=1e-4)

    def test_every_level_is_normalised_in_single_precision(self):
        levels = np.arange(256, dtype=np.uint8).reshape(16, 16)
        rgb = np.dstack([levels, levels.T, levels[::-1]])
        mean, std = (np.array(x, dtype=np.float32) for x in ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
        expected = (rgb.astype(np.float32) / np.float32(255) - mean) / std
        for image in (Image.fromarray(rgb), Image.fromarray(rgb[:, ::-1]).transpose(Image.Transpose.FLIP_LEFT_RIGHT)):
            found = to_pixels([image], tuple(mean.tolist()), tuple(std.tolist()))
            assert found.flags.c_contiguous and np.array_equal(found[0], expected.transpose(2, 0, 1))

    def test_jitter_scales_brightness(self):
        grey = Image.new("RGB", (4, 4), (100, 100, 100))  # contrast and saturation do not change a grey plane
        rng = np.random.default_rng(0)
        values = [np.asarray(color_jitter(grey, 0.4, rng)).mean() for _ in range(300)]
        assert 59 <= min(values) < 65 and 135 < max(values) <= 140
        assert np.mean(values) == pytest.approx(100, abs=5)

    @pytest.mark.parametrize("strength", [0.4, 1.5])
    def test_jitter_is_that_of_pillow_in_any_order(self, strength):
        image = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 30, 3), dtype=np.uint8))
        enhancers, orders = [ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color], set()
        for seed in range(100):
            rng, expected = np.random.default_rng(seed), image
            order = rng.permutation(3).tolist()
            for i in order:
                expected = enhancers[i](expected).enhance(rng.uniform(max(0, 1 - strength), 1 + strength))
            assert color_jitter(image, strength, np.random.default_rng(seed)).tobytes() == expected.tobytes()
            orders.add(tuple(order))
        assert len(orders) == 6

    @pytest.mark.parametrize("order", list(itertools.permutations(range(3))))
    def test_jitter_by_its_formulas(self, order):
        """Brightness scales, contrast is about the mean grey level, saturation about each pixel's (ITU-R BT.601)."""
        pixels = np.random.default_rng(0).integers(60, 180, (8, 8, 3), dtype=np.uint8)
        factors, asked, expected = (1.2, 0.7, 1.3), [], pixels.astype(float)
        for which, factor in zip(order, factors, strict=True):
            grey = expected @ [0.299, 0.587, 0.114]
            centre = (0.0, grey.mean(), grey[..., None])[which]
            expected = (centre + factor * (expected - centre)).clip(0, 255)

        def uniform(low, high):
            asked.append((low, high))
            return factors[len(asked) % 3 - 1]

        rng = SimpleNamespace(permutation=lambda count: order, uniform=uniform)
        found = np.asarray(color_jitter(Image.fromarray(pixels), 0.4, rng), dtype=float)
        assert np.abs(found - expected).max() <= 4  # each of the three operations rounds
        color_jitter(Image.fromarray(pixels), 1.5, rng)
        assert asked == [(0.6, 1.4)] * 3 + [(0.0, 2.5)] * 3

    def test_the_exported_processor_does_what_a_probe_does(self):
        settings = dict(image_size=16, mean=(0.1, 0.2, 0.3), std=(0.4, 0.5, 0.6))
        process, (_, stack) = ImageData(mask=RandomMask(), **settings).processor(None), ImageData.for_probe(None, settings)
        pixels = np.random.default_rng(0).integers(0, 256, (64, 80, 3), dtype=np.uint8)
        for image in (Image.fromarray(pixels), Image.fromarray(pixels.transpose(1, 0, 2).copy())):
            expected, padding = stack([image, image])
            found = process([image, image], return_tensors="np")["pixel_values"]
            assert found.shape == expected.shape == (2, 3, 16, 16) and padding is None
            assert np.abs(found - expected).max() < 0.01 / 0.4

    @pytest.mark.parametrize("flip", [0.0, 1.0])
    def test_whole_image_without_augmentation(self, tmp_path, flip):
        pixels = np.random.default_rng(0).integers(0, 255, (16, 16, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / "a.png")
        data = image_data(str(tmp_path), crop_scale=(1, 1), crop_ratio=(1, 1), jitter=0, flip=flip, mean=(0,) * 3, std=(1,) * 3)
        expected = pixels[:, ::-1] if flip else pixels
        assert np.allclose(data.__getitems__([(0, 0)])["source"][0].numpy(), expected.transpose(2, 0, 1) / 255)

    def test_flips_and_jitter_are_used(self, tmp_path):
        pixels = np.full((16, 16, 3), 100, dtype=np.uint8)
        pixels[:, :8] = 50
        Image.fromarray(pixels).save(tmp_path / "a.png")
        whole = dict(crop_scale=(1, 1), crop_ratio=(1, 1), mean=(0,) * 3, std=(1 / 255,) * 3)

        def halves(**how):
            data = image_data(str(tmp_path), **whole, **how)
            rows = torch.cat([data.__getitems__([(epoch, 0)])["source"] for epoch in range(200)])
            return rows[..., 0, 0, 0], rows[..., 0, 0, 15]

        left, right = halves(flip=0.25, jitter=0)
        assert (left + right).round().eq(150).all() and left.gt(75).float().mean().item() == pytest.approx(0.25, abs=0.08)
        left, right = halves(flip=0, jitter=0.3)
        assert left.lt(right).all() and (left + right).std().item() == pytest.approx(
            150 * 0.3 / 3**0.5, rel=0.15
        )  # of brightness

    def test_masks_have_the_grid_of_the_encoder(self, images):
        batch = image_data(images, RandomMask(0.25)).__getitems__([(0, 0), (0, 3)])
        assert batch["mask"].shape == (2, 16) and batch["mask"].sum(1).tolist() == [4, 4]
        assert torch.equal(batch["mask"].flatten()[batch["index"]], torch.ones(8, dtype=torch.bool))
        blocks = image_data(images, BlockMask(6, 2, 6), image_size=32).__getitems__([(0, 0)])["mask"]
        assert blocks.shape == (1, 64) and 0 < blocks.sum() <= 6

    def test_broken_files_are_named_and_the_rest_kept(self, images):
        with open(f"{images}/a/0.png", "rb") as file:
            whole = file.read()
        for name, content in (("trunc.png", whole[: len(whole) // 2]), ("zero.png", b""), ("text.jpg", b"hello")):
            with open(f"{images}/{name}", "wb") as file:
                file.write(content)
        data = image_data(images)
        batch = data.__getitems__([(0, i) for i in reversed(range(len(data)))])  # broken samples first
        assert len(data) == 15 and len(batch["samples"]) == len(batch["source"]) == len(batch["mask"]) == 12
        assert sorted(os.path.basename(message.split(":")[0]) for _, message in batch["broken"]) == [
            "text.jpg",
            "trunc.png",
            "zero.png",
        ]
        clean = data.__getitems__([(0, i) for i in batch["samples"]])
        assert torch.equal(clean["source"], batch["source"]) and torch.equal(clean["mask"], batch["mask"])

    def test_a_batch_of_nothing_but_broken(self, tmp_path):
        (tmp_path / "a.png").write_bytes(b"")
        batch = image_data(str(tmp_path)).__getitems__([(0, 0)])
        assert batch["samples"] == [] and len(batch["broken"]) == 1 and "source" not in batch

    def test_parquet_set(self, tmp_path, images):
        import datasets

        files = find_files(images, (".png",))
        table = datasets.Dataset.from_dict({"image": files, "label": [-1, *range(1, 12)]})
        features = datasets.Features(image=datasets.Image(), label=datasets.ClassLabel(12))
        table.cast(features).to_parquet(str(tmp_path / "set" / "train-0.parquet"))
        source = open_images(str(tmp_path / "set"))
        assert np.array_equal(np.asarray(source.read(7)), np.asarray(Image.open(files[7])))
        assert source.labels[7] == "7"

    def test_patches_must_be_more_than_are_masked(self, images):
        image_data(images, BlockMask(15))
        with pytest.raises(DataError, match=r"mask.count=16: a sample has 16 positions.*60 % of them, mask.count=10"):
            image_data(images, BlockMask(16))

    def test_size_must_be_the_encoders(self, images):
        data = ImageData(path=images, mask=RandomMask(), image_size=16)
        for size in (16, (16, 16), [16, 16]):
            data.fit_to(Encoder("image", image_size=size))
        for size, found in ((32, "32"), ([16, 32], r"\[16, 32\]"), ((32, 16), r"\(32, 16\)")):
            with pytest.raises(DataError, match=rf"data.image_size=16: the encoder takes {found}"):
                data.fit_to(Encoder("image", image_size=size))
        with pytest.raises(DataError, match=r"needs a method positions\(image_size\) that returns"):
            data.fit_to(Encoder())  # its positions are frames


class TestAudio:
    @pytest.mark.parametrize(
        "rate, channels, suffix", [(8000, 1, "wav"), (44100, 2, "flac"), (48000, 2, "wav"), (16000, 1, "flac")]
    )
    def test_resampling_keeps_duration_pitch_and_level(self, tmp_path, rate, channels, suffix):
        t = np.arange(rate) / rate
        tone = 0.5 * np.sin(2 * np.pi * 440 * t)
        stereo = np.stack([tone, 0.5 * tone], axis=1)
        path = write_wave(tmp_path / f"a.{suffix}", stereo if channels == 2 else tone, rate)
        wave = read_audio(path, RATE)
        assert wave.dtype == np.float32 and len(wave) == pytest.approx(RATE, abs=2)
        assert count_samples(path, RATE) == pytest.approx(len(wave), abs=1)
        spectrum = np.abs(np.fft.rfft(wave[:RATE] * np.hanning(len(wave[:RATE]))))
        assert np.argmax(spectrum) * RATE / len(wave[:RATE]) == pytest.approx(440, abs=2)
        assert wave[1000:-1000].std() == pytest.approx((0.375 if channels == 2 else 0.5) / np.sqrt(2), rel=0.01)

    @pytest.mark.parametrize(
        "subtype, error", [("PCM_U8", 1 / 127), ("PCM_16", 1e-4), ("PCM_24", 1e-6), ("FLOAT", 0), ("DOUBLE", 0)]
    )
    def test_sample_formats(self, tmp_path, subtype, error):
        wave = np.float32(0.9) * np.random.default_rng(0).uniform(-1, 1, 1000).astype(np.float32)
        assert np.abs(read_audio(write_wave(tmp_path / "a.wav", wave, subtype=subtype), RATE) - wave).max() <= error

    def test_unreadable(self, tmp_path):
        holed, large = np.ones(100), np.tile([1e20, 0], 9)
        holed[3] = np.nan
        for wave, message in ((holed, "not finite"), (large, "whose squares are not"), (np.zeros(0), "no sample")):
            with pytest.raises(ValueError, match=message):
                read_audio(write_wave(tmp_path / "a.wav", wave, subtype="FLOAT"), RATE)
        with pytest.raises(FileNotFoundError, match="no such file"):
            read_audio(str(tmp_path / "none.wav"), RATE)

    def test_standardize(self):
        wave = np.random.default_rng(0).normal(3, 5, 4000)
        assert standardize(wave) == pytest.approx((wave - wave.mean()) / wave.std(), rel=1e-5)
        assert np.array_equal(standardize(np.full(100, 0.25, dtype=np.float32)), np.zeros(100))

    @pytest.mark.parametrize("rate, channels, most", [(16_000, 1, 4000), (16_000, 2, 2000), (8000, 1, 2000), (32_000, 1, 4000)])
    def test_the_longest_that_is_read_whole(self, tmp_path, rate, channels, most, monkeypatch):
        """The limit counts values both as read and as resampled."""
        monkeypatch.setattr("d2v_fast.data.audio.MAX_VALUES", 4000)
        wave = 0.1 * np.random.default_rng(0).normal(size=(most + 1, channels))
        assert len(read_audio(write_wave(tmp_path / "a.wav", wave[:-1], rate), RATE)) == most * RATE // rate
        with pytest.raises(ValueError, match=f"holds more than {most} samples at {rate} Hz on {channels} channels"):
            read_audio(write_wave(tmp_path / "a.wav", wave, rate), RATE)

    def test_lengths_at_the_limits(self, tmp_path):
        """Exactly min_seconds or whole_seconds, and one sample more or less; two frames are enough."""
        for i, size in enumerate((1599, 1600, 48_000, 48_001)):
            write_wave(tmp_path / "set" / f"{i}.wav", 0.1 * np.random.default_rng(i).normal(size=size))
        data = audio_data(str(tmp_path / "set"), min_seconds=0.1, whole_seconds=3)
        assert data.recording.tolist() == [1, 2, 3, 3, 3, 3] and data.lengths.tolist() == [1600, 16_000, *[12_000] * 3, 12_001]
        short = write_wave(tmp_path / "a.wav", 0.1 * np.random.default_rng(0).normal(size=720))
        batch = audio_data(short, min_seconds=0).__getitems__([(0, 0)])
        assert batch["mask"].shape == (1, 2) and not batch["broken"]
        write_wave(short, 0.1 * np.random.default_rng(0).normal(size=719))
        with pytest.raises(DataError, match="gives 1 frames of the encoder"):
            audio_data(short, min_seconds=0)

    def test_the_first_and_the_last_possible_crop_are_drawn(self, tmp_path):
        for i in range(3):
            write_wave(tmp_path / f"{i}.wav", np.arange(8000 + i) / 2**15, subtype="FLOAT")
        data, longer = (audio_data(str(tmp_path), normalize=False, max_seconds=seconds) for seconds in (0.5, 1))
        drawn = [data.load(2, np.random.default_rng(seed)) for seed in range(60)]
        assert {len(wave) for wave in drawn} == {8000} and {round(wave[0] * 2**15) for wave in drawn} == {0, 1, 2}
        cut = [longer.__getitems__([(epoch, 0), (epoch, 1)])["source"][1].numpy() for epoch in range(60)]
        assert {len(wave) for wave in cut} == {8000} and {round(wave[0] * 2**15) for wave in cut} == {0, 1}

    def test_crops_do_not_depend_on_masks(self, tmp_path):
        for i, size in enumerate((4000, 16_000)):
            write_wave(tmp_path / f"{i}.wav", np.arange(size) / 2**15, subtype="FLOAT")
        data = audio_data(str(tmp_path), ExactBlockMask(0.5, 1, -0.5, inverse=False), normalize=False)  # of single frames
        batches = [data.__getitems__([(epoch, 0), (epoch, 1)]) for epoch in range(300)]
        starts, first = ([float(batch[name][1, 0]) for batch in batches] for name in ("source", "mask"))
        assert np.ptp(starts) > 0.3 and abs(np.corrcoef(starts, first)[0, 1]) < 0.2

    def test_crops_lie_within_their_recording(self, tmp_path):
        sizes = [4000, 7000, 9000, 16000]
        for i, size in enumerate(sizes):
            write_wave(tmp_path / f"{i}.wav", np.arange(size) / 2**15, subtype="FLOAT")
        data = audio_data(str(tmp_path), normalize=False, max_seconds=0.5, min_seconds=0)
        starts = collections.defaultdict(set)
        for epoch in range(40):
            batch = data.__getitems__([(epoch, i) for i in (1, 2, 3)])
            assert batch["source"].shape == (3, 7000)
            for i, row in zip((1, 2, 3), batch["source"].numpy() * 2**15, strict=True):
                assert np.array_equal(np.diff(row), np.ones(6999)) and 0 <= row[0] and row[-1] < sizes[i]
                starts[i].add(row[0])
        longer = audio_data(str(tmp_path), normalize=False, max_seconds=2, min_seconds=0)
        places = [float(longer.__getitems__([(epoch, 1), (epoch, 3)])["source"][1, 0]) * 2**15 for epoch in range(40)]
        assert len(set(places)) > 30 and min(places) < 1000 and max(places) > 8000
        assert starts[1] == {0} and len(starts[2]) > 20 and len(starts[3]) > 20
        assert max(starts[3]) > 7000 and min(starts[3]) < 2000
        longest = [data.__getitems__([(epoch, 3)])["source"] for epoch in range(40)]
        assert {row.shape for row in longest} == {(1, 8000)}  # max_seconds
        starts = [float(row[0, 0]) * 2**15 for row in longest]
        assert len(set(starts)) > 30 and min(starts) < 1000 and max(starts) > 7000

    def test_recordings_are_normalised_before_the_crop(self, tmp_path):
        wave = np.random.default_rng(0).normal(size=16000) * np.linspace(0.01, 0.2, 16000)
        path = write_wave(tmp_path / "a.wav", wave, subtype="FLOAT")
        crop = audio_data(path, max_seconds=0.1).__getitems__([(0, 0)])["source"][0].numpy()
        whole = (wave - wave.mean()) / wave.std()
        start = np.argmin(np.abs(whole[: 16000 - 1600] - crop[0]))
        assert crop == pytest.approx(whole[start : start + 1600], rel=1e-3)

    @pytest.mark.parametrize("normalize", [True, False])
    def test_the_exported_processor_does_what_training_does(self, waves, normalize):
        data = audio_data(waves, normalize=normalize)
        extract = data.processor(Encoder())
        found = extract(data.source.read(3), sampling_rate=RATE, return_tensors="np")["input_values"][0]
        np.testing.assert_allclose(found, data.load(3, np.random.default_rng(0)), rtol=1e-3, atol=1e-5)
        masks = [data.processor(Encoder(feat_extract_norm=norm)).return_attention_mask for norm in ("layer", "group")]
        assert extract.return_attention_mask and masks == [True, False]

    def test_joined_clips_are_of_one_speaker(self, tmp_path):
        with open(tmp_path / "metadata.csv", "w") as file:
            rows = csv.writer(file)
            rows.writerow(["file_name", "label", "speaker"])
            for i in range(9):
                write_wave(tmp_path / f"{i}.wav", (i % 3 + 1) / 8 * (-1.0) ** np.arange(1000 + i), subtype="FLOAT")
                rows.writerow([f"{i}.wav", str(i), f"voice{i % 3}"])
        data = audio_data(str(tmp_path), join_seconds=0.5, normalize=False)
        for i in range(9):
            wave = data.__getitems__([(0, i)])["source"][0].numpy()
            assert 8000 <= len(wave) < 8000 + 1010
            assert np.array_equal(np.unique(np.abs(wave)), [(i % 3 + 1) / 8])

    def test_a_clip_is_joined_to_any_other(self, tmp_path):
        for i in range(8):
            write_wave(tmp_path / f"{i}.wav", np.tile([1, -1], 500) * (i + 1) / 16, subtype="FLOAT")
        data = audio_data(str(tmp_path), join_seconds=0.125, normalize=False)
        joined = [data.__getitems__([(epoch, 3)])["source"][0].abs().numpy() for epoch in range(60)]
        assert all((wave[:1000] == 4 / 16).all() for wave in joined)
        assert {int(16 * wave[1500]) for wave in joined} == set(range(1, 9))

    def test_a_broken_clip_is_not_blamed_on_those_it_is_joined_to(self, waves):
        bad = np.ones(RATE // 4)
        bad[7] = np.nan
        write_wave(f"{waves}/s0/bad.wav", bad, subtype="FLOAT")
        data = audio_data(waves, join_seconds=1.0)
        broken = [data.__getitems__([(epoch, i) for i in range(len(data))])["broken"] for epoch in range(3)]
        assert [[os.path.basename(message.split(":")[0]) for _, message in each] for each in broken] == [["bad.wav"]] * 3

    def test_a_clip_that_nothing_can_be_joined_to_is_broken(self, waves, monkeypatch):
        data = audio_data(waves, join_seconds=1.0)
        read, tries = data.source.read, itertools.count()

        def gone_after_the_first(i):
            if next(tries) == 0:
                return read(i)
            raise OSError("gone") if next(tries) < 1000 else KeyboardInterrupt

        monkeypatch.setattr(data.source, "read", gone_after_the_first)
        assert "no recording to join to it can be read" in data.__getitems__([(0, 0)])["broken"][0][1]

    def test_padding(self, waves):
        data = audio_data(waves, crop=False, min_seconds=0)
        batch = data.__getitems__([(0, i) for i in range(10)])
        lengths = [soundfile.info(file).frames for file in find_files(waves, (".wav",))]
        frames = [(n - 400) // 320 + 1 for n in lengths]
        assert batch["source"].shape == (10, max(lengths))
        assert (~batch["padding_mask"]).sum(1).tolist() == frames
        for row, mask, padding, n in zip(batch["source"], batch["mask"], batch["padding_mask"], lengths, strict=True):
            assert row[n:].eq(0).all() and row[n - 1] != 0 and not (mask & padding).any() and mask.any()
            assert not padding[: (n - 400) // 320 + 1].any()
            assert row[:n].mean() == pytest.approx(0, abs=1e-4) and row[:n].var() == pytest.approx(1, abs=1e-2)

    @pytest.mark.parametrize("crop, frames", [(True, [8, 12, 16, 3, 4]), (False, [12, 16, 16, 4, 4])])
    def test_frames_of_a_batch_are_a_multiple(self, tmp_path, crop, frames):
        """The multiple is 4. 11, 15 and 16 frames are cut if cropped, else padded; 3 cannot be cut, 4 need not be."""
        lengths = [400 + 320 * (n - 1) + 17 for n in (11, 15, 16, 3, 4)]
        for i, n in enumerate(lengths):
            write_wave(tmp_path / f"{i}.wav", 0.1 * np.random.default_rng(i).normal(size=n))
        data = audio_data(str(tmp_path), crop=crop, length_multiple=4)
        assert audio_data(str(tmp_path), crop=crop).__getitems__([(0, 0)])["source"].shape[1] == lengths[0]
        for i, wanted in enumerate(frames):
            other = lengths.index(max(lengths) if crop else min(lengths))  # does not affect the length
            batch = data.__getitems__([(0, i), (0, other)])
            wave, row, seen = data.load(i, np.random.default_rng(0)), batch["source"][0].numpy(), (lengths[i] - 400) // 320 + 1
            assert batch["mask"].shape == (2, wanted)
            shortest = 400 + 320 * (wanted - 1)
            assert len(row) == (lengths[i] if wanted == 3 else shortest if crop else shortest + 319)
            if crop:
                assert "padding_mask" not in batch and any(np.array_equal(row, wave[a:][: len(row)]) for a in range(len(wave)))
            else:
                assert np.array_equal(row[: len(wave)], wave) and not row[len(wave) :].any()
                assert batch["padding_mask"][0].tolist() == [False] * seen + [True] * (wanted - seen)

    def test_short_recordings(self, tmp_path, caplog):
        for i, seconds in enumerate((0.01, 0.3, 0.5)):
            write_wave(tmp_path / f"{i}.wav", np.ones(int(seconds * RATE)))
        with caplog.at_level("INFO"):
            assert len(audio_data(str(tmp_path), min_seconds=0.1)) == 2
        assert "left out 1 recordings shorter" in caplog.text
        with pytest.raises(DataError, match=r"none of its 3 recordings is as long as data.min_seconds=9.*longest has 0.50 s"):
            audio_data(str(tmp_path), min_seconds=9)
        with pytest.raises(DataError, match=r"the shortest recording, 0.0100 s, gives 0 frames"):
            audio_data(str(tmp_path), min_seconds=0)

    def test_spans_longer_than_a_recording(self, waves):
        with pytest.raises(DataError, match=r"mask.length=60: one span would cover the 49 frames of data.max_seconds"):
            audio_data(str(waves), max_seconds=1, mask=SpanMask(length=60))
        audio_data(str(waves), max_seconds=1, mask=SpanMask(length=49))

    def test_a_recording_shorter_than_its_header_says_spoils_no_batch(self, waves, monkeypatch):
        data = audio_data(waves)
        read = data.source.read
        data.source.read = lambda i: read(i)[:50] if i == 1 else read(i)
        batch = data.__getitems__([(0, 0), (0, 1), (0, 2)])
        assert batch["samples"] == [0, 2] and "too short" in batch["broken"][0][1] and batch["source"].shape[1] >= 4000

    def test_manifests(self, waves, tmp_path):
        files = [os.path.relpath(file, tmp_path) for file in find_files(waves, (".wav",))][:3]
        (tmp_path / "fairseq.tsv").write_text(f"{tmp_path}\n" + "".join(f"{file}\t4000\n" for file in files))
        (tmp_path / "table.tsv").write_text("path\tlabel\n" + "".join(f"{file}\tx{i}\n" for i, file in enumerate(files)))
        (tmp_path / "lines.jsonl").write_text("\n".join(json.dumps({"file_name": f, "label": i}) for i, f in enumerate(files)))
        (tmp_path / "excel.csv").write_bytes(
            b"\xef\xbb\xbffile_name,label\r\n" + b"".join(f"{f},x\r\n".encode() for f in files)
        )
        for name in ("fairseq.tsv", "table.tsv", "lines.jsonl", "excel.csv"):
            source = open_audio(str(tmp_path / name))
            assert list(source.names) == [str(tmp_path / file) for file in files], name
            assert np.array_equal(source.read(2), read_audio(source.names[2], RATE))
        assert open_audio(str(tmp_path / "lines.jsonl")).labels == ["0", "1", "2"]
        assert open_audio(str(tmp_path / "fairseq.tsv")).groups == [os.path.dirname(file).split("/")[-1] for file in files]

    @pytest.mark.parametrize(
        "name, content, message",
        [
            ("m.jsonl", '{"file_name": "a.wav"}\nnot json', "m.jsonl: not a manifest: Expecting value"),
            ("m.jsonl", "[1, 2]", "row 1 has no file_name"),
            ("m.csv", "a,b\n1,2", r"row 1 has no file_name, found \['a', 'b'\]"),
            ("m.csv", "", "lists no file"),
            ("m.tsv", "/root\n", "lists no file"),
        ],
    )
    def test_bad_manifests(self, tmp_path, name, content, message):
        (tmp_path / name).write_text(content)
        with pytest.raises(DataError, match=message):
            open_audio(str(tmp_path / name))

    def test_parquet_set(self, tmp_path, waves):
        import datasets

        files = find_files(waves, (".wav",))
        rows = [{"bytes": Path(file).read_bytes(), "path": None} for file in files]
        table = datasets.Dataset.from_dict({"audio": rows, "speaker_id": list(range(10))})
        table.cast_column("audio", datasets.Audio(decode=False)).to_parquet(str(tmp_path / "set.parquet"))
        source = open_audio(str(tmp_path / "set.parquet"))
        assert source.groups == [str(i) for i in range(10)]
        assert np.array_equal(source.read(4), read_audio(files[4], RATE))
        assert source.size(4) == soundfile.info(files[4]).frames

    def test_channel_mask(self, waves):
        data = audio_data(waves, channel_prob=0.5, channel_length=2)
        masks = torch.cat([data.__getitems__([(epoch, i) for i in range(10)])["channel_mask"] for epoch in range(20)])
        assert masks.shape == (200, Encoder.hidden_size) and masks.dtype == torch.bool
        assert 0.3 < masks.float().mean() < 0.5  # spans of half the channels, some overlap
        inner = masks[:, 1:-1] & ~masks[:, :-2] & ~masks[:, 2:]
        assert not inner.any()  # each has two channels

    def test_channel_masks_do_not_depend_on_masks_of_frames(self, tmp_path):
        path = write_wave(
            tmp_path / "a.wav", np.random.default_rng(0).normal(size=400 + 320 * 11)
        )  # there are as many frames as channels
        data = audio_data(path, SpanMask(0.5, 2), channel_prob=0.5, channel_length=2)
        batches = [data.__getitems__([(epoch, 0)]) for epoch in range(300)]
        frames, channels = (torch.cat([b[name] for b in batches]).float() for name in ("mask", "channel_mask"))
        correlation = torch.corrcoef(torch.stack([frames.flatten(), channels.flatten()]))[0, 1]
        assert frames.shape == channels.shape and abs(correlation) < 0.1


class TestText:
    def test_packed_blocks_are_the_corpus(self, texts):
        path, documents = texts
        data = text_data(path)
        ids = data.tokenizer(documents, add_special_tokens=False)["input_ids"]
        stream = [token for document in ids for token in [*document, data.tokenizer.sep_token_id]]
        blocks = data.__getitems__([(0, i) for i in range(len(data))])["target"].tolist()
        assert {len(block) for block in blocks} == {16} and {block[0] for block in blocks} == {data.tokenizer.cls_token_id}
        packed = [token for block in blocks for token in block[1:]]
        assert packed == stream[: len(packed)] and len(stream) - len(packed) < 15

    def test_blocks_without_crossing_documents(self, texts):
        path, documents = texts
        data = text_data(path, cross_documents=False)
        batch = data.__getitems__([(0, i) for i in range(len(data))])
        padding = batch.get("padding_mask", torch.zeros_like(batch["mask"]))
        blocks = [row[~pad].tolist() for row, pad in zip(batch["target"], padding, strict=True)]
        assert [len(block) for block in blocks] == data.lengths.tolist() and max(map(len, blocks)) == 16
        assert batch["target"][padding].eq(data.tokenizer.pad_token_id).all()
        cls, sep = data.tokenizer.cls_token_id, data.tokenizer.sep_token_id
        rest = [data.tokenizer(text, add_special_tokens=False)["input_ids"] for text in documents]
        for block in blocks:
            assert block[0] == cls and block[-1] == sep and sep not in block[:-1]
            assert rest[0][: len(block) - 2] == block[1:-1]
            del rest[0][: len(block) - 2]
            if not rest[0]:
                rest.pop(0)
        assert rest == []

    @pytest.mark.parametrize("multiple, longest", [(4, 16), (5, 16), (16, 16), (64, 16)])
    def test_blocks_are_padded_to_a_multiple(self, texts, multiple, longest):
        plain, data = (text_data(texts[0], cross_documents=False, length_multiple=n) for n in (None, multiple))
        found = set()
        for i in range(len(data)):
            before, batch = (each.__getitems__([(3, i)]) for each in (plain, data))
            length = int(data.lengths[i])
            found.add(batch["source"].shape[1])
            assert batch["source"].shape[1] == min(longest, -(-length // multiple) * multiple)
            for name in ("source", "target", "mask"):
                assert torch.equal(batch[name][:, :length], before[name]), name
            assert batch["target"][:, length:].eq(data.tokenizer.pad_token_id).all() and not batch["mask"][:, length:].any()
            padding = batch.get("padding_mask", torch.zeros_like(batch["mask"]))
            assert padding[0].tolist() == [False] * length + [True] * (batch["source"].shape[1] - length)
        assert len(found) == len({min(longest, -(-n // multiple) * multiple) for n in data.lengths})

    def test_unicode_survives(self, tmp_path):
        long = " ".join([*paragraphs(1, 500), "😀 ümlaut\u200bzero-width ﷽"])
        (tmp_path / "a.txt").write_text(f"\n\n  \n{long}\n")
        data = text_data(str(tmp_path / "a.txt"), cross_documents=False, block_size=10_000)
        ids = data.__getitems__([(0, 0)])["target"][0]
        assert len(data) == 1 and data.tokenizer.decode(ids, skip_special_tokens=True).strip() == long

    def test_only_masked_positions_change(self, texts):
        mask = TokenMask(0.5, 1, random_prob=0.3, keep_prob=0.2, loss_on="selected")
        data = text_data(texts[0], mask)
        batch = data.__getitems__([(0, i) for i in range(len(data))])
        changed = batch["source"] != batch["target"]
        assert not (changed & ~batch["mask"]).any()
        is_mask = batch["source"] == data.tokenizer.mask_token_id
        assert 0.4 < is_mask.sum() / batch["mask"].sum() < 0.6
        assert (changed & ~is_mask).sum() / batch["mask"].sum() > 0.2

    def test_random_positions_become_the_mask_token(self, texts):
        data = text_data(texts[0], RandomMask(0.3))
        batch = data.__getitems__([(0, i) for i in range(8)])
        source, target, mask = batch["source"], batch["target"], batch["mask"]
        assert mask.sum(1).tolist() == [5] * 8 and source[mask].eq(data.tokenizer.mask_token_id).all()
        assert torch.equal(source[~mask], target[~mask]) and not target.eq(data.tokenizer.mask_token_id).any()

    def test_teacher_input_masked_only(self, texts):
        full, only = text_data(texts[0]), text_data(texts[0], teacher_input="masked_only")
        keys = [(0, i) for i in range(10)]
        a, b = full.__getitems__(keys), only.__getitems__(keys)
        assert torch.equal(a["source"], b["source"]) and torch.equal(a["mask"], b["mask"])
        assert torch.equal(b["target"][b["mask"]], a["target"][a["mask"]])
        assert b["target"][~b["mask"]].eq(only.tokenizer.pad_token_id).all()
        assert torch.equal(b["target_padding_mask"], ~b["mask"]) and "target_padding_mask" not in a

    def test_vocabulary(self, texts):
        data = text_data(texts[0])
        tokens = data.tokenizer.convert_ids_to_tokens(list(range(data.vocabulary.size)))
        special = {"<s>", "</s>", "<pad>", "<unk>", "<mask>"}
        assert {tokens[i] for i in np.flatnonzero(data.vocabulary.special)} == special
        assert data.vocabulary.continues.tolist() == [not t.startswith("Ġ") and t not in special for t in tokens]
        counted = collections.Counter(data.ids.tolist())
        assert data.vocabulary.counts.tolist() == [counted[i] for i in range(data.vocabulary.size)]
        assert data.vocabulary.size <= 300

    def test_every_format_reads_the_same(self, tmp_path):
        import datasets

        documents = paragraphs(30)
        (tmp_path / "a.txt").write_text("\n".join(documents))
        table = datasets.Dataset.from_dict({"n": list(range(30)), "text": documents})
        table.to_parquet(str(tmp_path / "a.parquet"))
        table.to_csv(str(tmp_path / "a.csv"))
        table.to_json(str(tmp_path / "a.jsonl"))
        ids = [text_data(str(tmp_path / f"a.{suffix}")).ids.tolist() for suffix in ("txt", "parquet", "csv", "jsonl")]
        assert ids[0] == ids[1] == ids[2] == ids[3]

    def test_a_byte_order_mark_is_no_text(self, tmp_path):
        for name in "ab":
            (tmp_path / f"{name}.txt").write_text("fine\n", encoding="utf-8-sig")
        assert list(load_documents(str(tmp_path))) == ["fine", "fine"]

    def test_the_column_taken_is_named(self, tmp_path, caplog):
        (tmp_path / "a.csv").write_text("\n".join(paragraphs(30)))
        (tmp_path / "a.txt").write_text("\n".join(paragraphs(30)))
        with caplog.at_level("INFO"):
            text_data(str(tmp_path / "a.txt"))
            assert "column" not in caplog.text
            text_data(str(tmp_path / "a.csv"))
        assert f"a.csv: the text is in column {paragraphs(1)[0]!r} of ['" in caplog.text

    def test_tokenizer_of_a_run(self, texts, tmp_path):
        data = text_data(texts[0])
        data.tokenizer.save_pretrained(tmp_path / "tokenizer")
        again = text_data(texts[0], tokenizer=str(tmp_path / "tokenizer"))
        assert np.array_equal(again.ids, data.ids) and again.vocabulary.mask_id == data.vocabulary.mask_id

    @pytest.mark.parametrize(
        "files, kwargs, message",
        [
            ({"a.txt": "two words"}, {"block_size": 64}, "tokens are fewer than one block of data.block_size=64"),
            ({"a.txt": ""}, {}, "holds no text"),
            ({"a.txt": "\n \n"}, {}, "holds no text"),
            ({"a.txt": "x", "b.csv": "text\nx"}, {}, "found files ending in .csv, .txt, expected one type"),
            ({"a.txt": "fine", "b.txt": "caf\xe9"}, {}, r"b.txt: cannot be read: 'utf-8' codec"),
            ({"a.jsonl": '{"text": "a"}\n}{'}, {}, "a.jsonl: cannot be read"),
            ({"a.parquet": "PAR1"}, {}, "a.parquet: cannot be read"),
            ({"a.csv": "body,title\nx,y"}, {}, "data.column: found None, expected .* body, title"),
            ({"a.csv": "body,title\nx,y"}, {"column": "bdy"}, "data.column: found bdy"),
            ({"a.txt": "x y z"}, {"tokenizer": "./nowhere"}, "data.tokenizer=./nowhere: cannot be loaded"),
        ],
    )
    def test_bad_input(self, tmp_path, files, kwargs, message):
        for name, content in files.items():
            (tmp_path / name).write_text(content, encoding="latin-1")
        with pytest.raises(DataError, match=message):
            text_data(str(tmp_path), **kwargs)

    def test_encoder_must_fit(self, texts):
        data = text_data(texts[0])
        with pytest.raises(DataError, match=r"tokens exceed the encoder's vocab_size of 50"):
            data.fit_to(Encoder(vocab_size=50))
        with pytest.raises(DataError, match=r"data.block_size=16: the encoder has 12 positions"):
            data.fit_to(Encoder(max_position_embeddings=12))
        counted = Encoder(max_position_embeddings=16, model_type="camembert")
        counted.model.embeddings = torch.nn.Identity()
        counted.model.embeddings.padding_idx = 1
        with pytest.raises(DataError, match=r"the encoder has 14 positions"):
            data.fit_to(counted)
        own = Encoder()
        own.model = torch.nn.Sequential(torch.nn.Embedding(20, 4))
        with pytest.raises(DataError, match="vocab_size of 20"):
            data.fit_to(own)

    def test_the_mask_vector_of_a_custom_text_encoder_is_frozen(self, texts):
        own = Encoder()
        own.mask_embedding = torch.nn.Parameter(torch.zeros(4))
        text_data(texts[0]).fit_to(own)
        assert not own.mask_embedding.requires_grad

    def test_unreachable_set(self):
        for opened in (load_documents, open_images):
            with pytest.raises(DataError, match=r"data.path=no/such: no such file or folder here, and it cannot be loaded"):
                opened("no/such")


class TestBuiltin:
    def test_splits_differ_and_repeat(self):
        train, test = builtin_text("train"), builtin_text("test")
        assert not set(train) & set(test) and sum(map(len, test)) > 0.05 * sum(map(len, train)) > 10_000
        first = [np.asarray(builtin_images(split).read(0)) for split in ("train", "test", "train")]
        assert np.array_equal(first[0], first[2]) and not np.array_equal(first[0], first[1])
        with pytest.raises(DataError, match=r"data.split=dev"):
            builtin_text("dev")

    def test_images_are_balanced_classes(self):
        source = builtin_images("train")
        assert collections.Counter(source.labels) == dict.fromkeys(SHAPES, len(source) // 10)
        assert all(np.asarray(source.read(i)).shape == (32, 32, 3) and np.asarray(source.read(i)).std() > 5 for i in range(20))

    def test_speech_is_audible(self):
        source = builtin_speech("test")
        assert set(source.labels) == set(WORDS) and len(set(source.groups)) == 8
        for i in range(10):
            wave = source.read(i)
            assert 0.2 * RATE < len(wave) < 1.2 * RATE and 0.03 < wave.std() < 0.5 and np.isfinite(wave).all()

    def test_lengths_are_those_of_the_recordings(self):
        source = builtin_speech("train")
        assert all(source.size(i) == len(source.read(i)) for i in range(0, len(source), 37))
