"""Batches on their way to the device: images as uint8 until there, the next batch copied while a step runs."""

import multiprocessing
import os
import signal
import threading
from contextlib import contextmanager

import numpy as np
import pytest
import torch

from d2v_fast.config import parse
from d2v_fast.data import DataError, EpochBatches, Unfinished
from d2v_fast.data.streaming import StreamBatches
from d2v_fast.data.vision import MEAN, STD, ImageData, tables
from d2v_fast.masking import RandomMask
from d2v_fast.train.build import build
from d2v_fast.train.feed import Feed
from d2v_fast.train.guards import BrokenSamples, WorkerDied
from d2v_fast.train.step import step
from tests.test_data import image_data
from tests.test_streaming import parquet
from tests.test_training import arguments

KEYS = [(0, 3), (0, 50), (0, 7)]


@pytest.fixture
def images():
    data = ImageData(mask=RandomMask(0.5), image_size=16)
    data.grid = (4, 4)
    return data


class Elsewhere(torch.Tensor):
    """A tensor that claims not to be on the CPU."""

    device = torch.device("cuda", 0)

    def to(self, *args, **kwargs):
        return self


def test_images_are_normalised_on_the_device_to_the_same_bits(images, monkeypatch):
    levels, plain = images.unfinished(KEYS), images.__getitems__(KEYS)
    assert levels["source"].dtype == torch.uint8 and plain["source"].dtype == torch.float32
    expected = (levels["source"].float() / 255 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    assert torch.equal(plain["source"], expected)
    monkeypatch.setattr(torch.Tensor, "to", lambda tensor, *args, **kwargs: tensor)
    for _ in range(2):
        found = images.finish(levels | {"source": levels["source"].as_subclass(Elsewhere)})["source"]
        assert torch.equal(found.as_subclass(torch.Tensor), expected)
        monkeypatch.setattr("d2v_fast.data.vision.tables", None)  # workers create them once
    assert torch.equal(levels["mask"], plain["mask"])


def test_every_level_and_channel_has_its_place_in_the_table():
    found = tables(MEAN, STD)
    assert found.dtype == np.float32 and found.shape == (3, 256)
    exact = (np.arange(256) / 255 - np.array(MEAN)[:, None]) / np.array(STD)[:, None]
    assert np.abs(found - exact).max() < 1e-6


def test_a_class_of_ones_own_may_give_floats(images):
    batch = {"source": torch.rand(2, 3, 4, 4)}
    assert images.finish(batch) is batch
    assert images.finish({"broken": [(0, "x")]}) == {"broken": [(0, "x")]}


class Stream:
    """Records what happens on which stream, in order."""

    def __init__(self, events, name):
        self.events, self.name = events, name
        self.device = "its GPU"

    def record_event(self):
        self.events.append(f"{self.name} recorded")
        return f"{self.name} event"

    def wait_event(self, event):
        self.events.append(f"{self.name} waits for {event}")


@pytest.fixture
def gpu(monkeypatch):
    """A fake GPU that only has streams; tensors stay on the CPU."""
    events = []
    main, side = Stream(events, "main"), Stream(events, "side")
    thread = threading.local()  # the current stream is a property of a thread

    def current(device=None):
        return getattr(thread, "stream", main)

    @contextmanager
    def stream(entered):
        thread.stream = entered
        yield
        del thread.stream

    def move(batch, device):
        assert device.type == "cuda"
        events.append(f"{current().name} copies {batch['samples'][0]}")
        return {k: v for k, v in batch.items() if isinstance(v, torch.Tensor)}

    monkeypatch.setattr(torch.cuda, "Stream", lambda device: side)
    monkeypatch.setattr(torch.cuda, "stream", stream)
    monkeypatch.setattr(torch.cuda, "current_stream", current)
    monkeypatch.setattr(torch.cuda, "set_device", lambda device: events.append(f"thread on {device}"))
    monkeypatch.setattr(torch.Tensor, "record_stream", lambda tensor, used: events.append(f"recorded for {used.name}"))
    monkeypatch.setattr("d2v_fast.train.feed.to_device", move)
    return events


def feed(data, device, start=0, workers=0):
    order = EpochBatches(len(data), 2, seed=0, start=start)
    return Feed(data, order, workers, torch.device(device), BrokenSamples(len(data), 0.01))


@pytest.fixture
def no_pinning(monkeypatch):
    """Pinning memory takes a GPU. Lists for which loaders it was asked."""
    import d2v_fast.train.feed as module

    make, asked = module.make_loader, []

    def unpinned(data, order, workers, pin_memory):
        asked.append(pin_memory)
        return make(data, order, workers)

    monkeypatch.setattr(module, "make_loader", unpinned)
    return asked


def test_batches_are_copied_on_a_second_stream(images, gpu, no_pinning):
    batches = feed(images, "cuda")
    expected = [[index for _, index in keys] for _, keys in zip(range(3), batches.loader.batch_sampler, strict=False)]
    first, second = batches.take(2)
    batches.close()
    assert [first["samples"], second["samples"]] == expected[:2]
    tensors = sum(isinstance(value, torch.Tensor) for value in first.values())
    copies = [event for each in expected for event in (f"side copies {each[0]}", "side recorded")]
    handed = ["main waits for side event", *["recorded for main"] * tensors]
    assert [event for event in gpu if event.startswith("side")] == copies
    assert [event for event in gpu if event in handed] == 2 * handed
    assert gpu.index(handed[0]) > gpu.index("side recorded") and "thread on its GPU" in gpu


def test_a_batch_is_handed_over_before_the_next_has_arrived(images, gpu, no_pinning, monkeypatch):
    arrived, asked, load = [], threading.Event(), images.unfinished

    def slow(keys):
        if arrived:
            asked.wait(5)
        arrived.append([index for _, index in keys])
        return load(keys)

    monkeypatch.setattr(images, "unfinished", slow)
    batches = feed(images, "cuda")
    (batch,) = batches.take(1)
    assert arrived == [batch["samples"]]
    asked.set()
    (batch,) = batches.take(1)
    assert arrived[1] == batch["samples"]
    batches.close()


def test_a_batch_that_is_copied_ahead_is_not_counted(images, gpu, no_pinning):
    plain, ahead = feed(images, "cpu"), feed(images, "cuda")
    for number in (1, 2, 1):
        expected, found = plain.take(number), ahead.take(number)
        assert [batch["samples"] for batch in found] == [batch["samples"] for batch in expected]
        plain.trained_on(), ahead.trained_on()
        assert ahead.state_dict() == plain.state_dict()
    assert ahead.state_dict() == {"batches": 4}
    resumed = feed(images, "cuda", start=4)
    assert resumed.take(1)[0]["samples"] == ahead.take(1)[0]["samples"]
    resumed.trained_on()
    assert resumed.state_dict() == {"batches": 5}


def test_only_with_a_gpu_are_batches_left_unfinished(images, gpu, no_pinning):
    assert feed(images, "cpu").loader.dataset is images
    unfinished = feed(images, "cuda").loader.dataset
    assert isinstance(unfinished, Unfinished) and len(unfinished) == len(images)
    assert no_pinning == [False, True]


def test_every_batch_counts_but_only_those_with_masked_positions_are_handed_over(images, monkeypatch):
    """Unreadable ones neither count as unmasked nor end a row of those."""
    monkeypatch.setattr("d2v_fast.train.feed.EMPTY", 3)
    full = images.__getitems__(KEYS)
    bare, unread = full | {"index": full["index"][:0]}, {"samples": [], "broken": [(9, "9.png: empty")]}
    found = map(dict, [bare, bare, unread, full, bare, full, bare, unread, bare, bare])
    monkeypatch.setattr(images, "__getitems__", lambda keys: next(found))
    batches = feed(images, "cpu")
    for number in (4, 6):
        assert len(batches.take(1)[0]["index"])
        batches.trained_on()
        assert batches.state_dict() == {"batches": number} and batches.broken.seen == {9: "9.png: empty"}
    with pytest.raises(DataError, match=r"no position in 3 batches in a row, the last one of samples \[3, 50, 7\]: raise mask"):
        batches.take(1)


@pytest.mark.parametrize("killed", [False, True])
def test_workers_end_with_the_feed_and_interrupt_no_step(images, killed):
    """torch's handler would raise in the middle of a step; without it, the next batch that does not arrive tells."""
    before = set(multiprocessing.active_children())
    batches = feed(images, "cpu", workers=1)
    batches.take(1)
    (worker,) = set(multiprocessing.active_children()) - before
    if killed:
        os.kill(worker.pid, signal.SIGKILL)
        worker.join()
    batches.close()
    assert set(multiprocessing.active_children()) == before


def test_a_stream_that_is_copied_ahead_keeps_its_position(gpu, no_pinning, tmp_path):
    (tmp_path / "set.parquet").write_bytes(parquet(*range(8)))
    found = {}
    for device in ("cpu", "cuda"):
        data = image_data(str(tmp_path / "set.parquet"), streaming=True, shuffle_buffer=3)
        batches = Feed(data, StreamBatches(data, 2), 0, torch.device(device), BrokenSamples(8, 0.01))
        taken = batches.take(2)
        batches.trained_on()
        found[device] = batches.state_dict(), [batch["source"] for batch in taken]
        assert batches.loader.dataset.finishes == (device == "cpu")
    assert found["cpu"][0] == found["cuda"][0] and found["cpu"][0]["batches"] == 2
    for one, other in zip(found["cpu"][1], found["cuda"][1], strict=True):
        assert one.dtype == torch.float32 and torch.equal(one, other)


def test_the_share_of_broken_samples_of_a_stream_is_of_those_read(monkeypatch, tmp_path):
    """At least LEAST samples count, because the first few say little."""
    monkeypatch.setattr("d2v_fast.train.feed.LEAST", 3)
    (tmp_path / "set.parquet").write_bytes(parquet(*range(8)))
    data = image_data(str(tmp_path / "set.parquet"), streaming=True, shuffle_buffer=3)
    batches = Feed(data, StreamBatches(data, 2), 0, torch.device("cpu"), BrokenSamples(8, 0.01))
    totals = []
    for _ in range(3):
        batches.take(1)
        totals.append(batches.broken.total)
    assert totals == [3, 4, 6]


@pytest.mark.parametrize(
    "workers, error, died",
    [
        (2, ConnectionResetError("reset"), True),
        (2, EOFError(), True),
        (0, RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed."), True),
        (0, ConnectionResetError("reset"), False),  # of a data set on a network
        (2, FileNotFoundError("Caught FileNotFoundError in DataLoader worker process 0."), False),
        (2, KeyError("x"), False),
    ],
)
def test_which_errors_are_those_of_a_dead_worker(images, workers, error, died):
    def failing():
        raise error
        yield

    batches = feed(images, "cpu")
    batches.workers, batches.batches = workers, failing()
    with pytest.raises(WorkerDied if died else type(error)) as caught:
        batches.take(1)
    assert caught.value is error or died


def test_a_run_has_the_same_losses_with_images_finished_after_loading(tmp_path, monkeypatch):
    found = []
    for name in ("one", "other"):
        trainer = build(parse(arguments("vision", tmp_path / name))[0])
        if name == "other":  # as for a device that is neither CPU nor CUDA
            monkeypatch.setattr("d2v_fast.train.feed.to_device", lambda batch, device: {})
            trainer.feed = feed_like(trainer)
        found.append([float(step(trainer.state, trainer.feed.take(1)).loss) for _ in range(3)])
    assert found[0] == found[1]


def feed_like(trainer):
    order = trainer.feed.loader.batch_sampler
    return Feed(trainer.data, order, 0, torch.device("meta"), trainer.broken)
