"""Parts of `d2v-train` that differ on a GPU: batches copied ahead, images normalised there, LAMB, checkpointing, graphs."""

import copy
import shutil
import subprocess
import sys
from contextlib import nullcontext

import pytest
import torch
from torch import nn

from d2v_fast import build_encoder
from d2v_fast.checkpoint import Checkpoint
from d2v_fast.config import OptimizerConfig, parse
from d2v_fast.data import EpochBatches, to_device
from d2v_fast.data.vision import ImageData
from d2v_fast.masking import RandomMask
from d2v_fast.train.build import build
from d2v_fast.train.feed import Feed
from d2v_fast.train.guards import BrokenSamples
from d2v_fast.train.optim import Lamb, make_optimizer
from d2v_fast.train.step import step as train_step
from tests import models
from tests.gpu import ABSENT, DEVICE, nothing_waits
from tests.test_training import arguments, records

if ABSENT:
    pytest.skip("needs a CUDA GPU", allow_module_level=True)


@pytest.fixture
def images():
    data = ImageData(mask=RandomMask(0.5), image_size=32)
    data.grid = (4, 4)
    return data


def feed(data, device):
    return Feed(data, EpochBatches(len(data), 8, seed=0), 0, torch.device(device), BrokenSamples(len(data), 0.01))


def tensors(batch):
    return {name: value for name, value in batch.items() if isinstance(value, torch.Tensor)}


def test_batches_that_are_copied_ahead_arrive_whole(images):
    """The stream that reads them is far behind the one that copies, so reusing memory too early would be detected."""
    expected, found = feed(images, "cpu"), feed(images, DEVICE)
    work = torch.randn(*[2048 if DEVICE == "cuda" else 32] * 2, device=DEVICE)
    read = []
    for _ in range(20):
        (batch,) = found.take(1)
        for _ in range(20):
            work = (work @ work).tanh()
        read.append({name: value.clone() for name, value in tensors(batch).items()})
        del batch
    for batch in read:
        (truth,) = expected.take(1)
        assert batch.keys() == tensors(truth).keys()
        for name, value in batch.items():
            assert torch.equal(value.cpu(), truth[name]), name


def test_images_are_normalised_on_the_device_to_the_same_bits(images):
    keys = [(0, 3), (0, 50), (0, 7)]
    levels = images.unfinished(keys)
    moved = to_device(levels, torch.device(DEVICE))
    assert moved["source"].dtype == torch.uint8
    images.finish(levels | moved)  # moves the tables to the device
    with nothing_waits():
        found = images.finish(levels | moved)["source"]
    assert found.device.type == DEVICE and torch.equal(found.cpu(), images.__getitems__(keys)["source"])


def test_lamb_moves_as_on_a_cpu():
    host = nn.Sequential(nn.Linear(64, 48), nn.LayerNorm(48), nn.Linear(48, 8)).double()
    device = copy.deepcopy(host).float().to(DEVICE)
    config = OptimizerConfig(kind="lamb", lr=0.02, weight_decay=0.1)
    exact, optimizer = (make_optimizer(model, config) for model in (host, device))
    for step in range(5):
        for p, q in zip(host.parameters(), device.parameters(), strict=True):
            p.grad = torch.randn_like(p).float().double()
            q.grad = p.grad.float().to(DEVICE)
        exact.step()
        with nothing_waits() if step and isinstance(optimizer, Lamb) else nullcontext():
            optimizer.step()
    for p, q in zip(host.parameters(), device.parameters(), strict=True):
        torch.testing.assert_close(q.cpu().double(), p, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["roberta", "vit", "wav2vec2"])
def test_recomputed_blocks_give_the_same_gradient(name):
    """With dropout, whose masks are drawn again."""
    rates = ("hidden_dropout", "attention_dropout") if name in models.WAVES else ("hidden_dropout_prob",)
    torch.manual_seed(0)
    plain = build_encoder(name, config=models.CONFIGS[name] | dict.fromkeys(rates, 0.3)).to(DEVICE).train()
    recomputed = copy.deepcopy(plain)
    recomputed.checkpoint_blocks()
    inputs = models.inputs(name, batch=4).to(DEVICE)
    for encoder in (plain, recomputed):
        torch.manual_seed(1)
        encoder(inputs).square().sum().backward()
    for (parameter, p), q in zip(plain.named_parameters(), recomputed.parameters(), strict=True):
        if p.grad is not None:
            torch.testing.assert_close(q.grad, p.grad, rtol=1e-4, atol=1e-4 * float(p.grad.abs().max()), msg=parameter)
    assert not torch.equal(plain(inputs), plain(inputs))  # dropout is at work


def d2v_train(*args):
    done = subprocess.run([sys.executable, "-m", "d2v_fast.cli", *args], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stderr


def test_the_gpu_skips_a_step_of_which_the_host_learns_later(tmp_path):
    """The third and fourth steps have a NaN. No other step synchronises; the result is as if the host read the flag at once."""
    found = []
    for late in (True, False):
        run = build(parse(arguments("vision", tmp_path / str(late), f"train.device={DEVICE}"))[0], fused=True)
        assert run.state.late == (DEVICE == "cuda")
        run.state.late = late
        for number in range(1, 7):
            batches = run.feed.take(1)
            if number in (3, 4):
                batches[0]["source"][0, 0, 0, 0] = float("nan")
            # The first step compiles kernels. After a skipped step the host reads its loss, and the fourth records a graph.
            with nothing_waits() if late and number in (2, 3, 6) else nullcontext():
                train_step(run.state, batches)
        run.state.settle()
        assert run.state.skipped.count == 2 and run.state.core.teacher.step == 4
        found.append(run.state.tensors())
    for kind, tensors in found[1].items():
        for name, x in tensors.items():
            scale = float(x.abs().max())
            torch.testing.assert_close(found[0][kind][name], x, rtol=1e-2, atol=1e-2 * scale, msg=name)


def test_a_run_with_graphs_resumes(tmp_path):
    """A graph is recorded in the fourth pass over a shape: in both halves of the run, at different steps."""
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    settings = [f"train.device={DEVICE}", "train.precision=bf16", "train.steps=16", "train.save_every=8", "train.log_every=4"]
    settings.append("encoder.config.hidden_dropout_prob=0.1")
    log = d2v_train(*arguments("vision", whole), *settings, "--fused")
    assert "fused: loss" in log and "no CUDA graphs" not in log
    shutil.copytree(whole, parts)
    shutil.rmtree(parts / "checkpoints" / "step-16")
    log = d2v_train("--resume", str(parts))
    assert "resumes after step 8" in log and "no CUDA graphs" not in log
    assert [line["loss"] for line in records(parts)] == pytest.approx([line["loss"] for line in records(whole)], rel=1e-2)
    expected, found = (Checkpoint(folder / "checkpoints" / "step-16").tensors("student") for folder in (whole, parts))
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=1e-2, atol=1e-2 * float(x.abs().max()), msg=name)
