"""The fused step on a real GPU: it matches the plain step and does not synchronise."""

import pytest
import torch

from d2v_fast import Data2Vec, LossConfig, TargetsConfig
from d2v_fast.fused import PARTS, fuse
from d2v_fast.graphs import Graphs
from tests import models, waits
from tests.gpu import ABSENT, DEVICE, needs_gpu, nothing_waits

if ABSENT:
    pytest.skip("needs a CUDA GPU", allow_module_level=True)

GPU = torch.device(DEVICE)
NAMES = ["roberta", "beit", "wav2vec2"]


def make_step(name, parts=(), replay=False):
    """A step to call, with tiny weights and noise that are the same for the same name; returns its loss."""
    torch.manual_seed(0)
    targets = TargetsConfig(top_k=2, norm="instance" if name in models.WAVES else "layer")
    loss = LossConfig(impl="auto" if parts else "eager")
    encoder = models.make(name)
    model = Data2Vec(encoder, targets=targets, loss=loss).to(GPU).train()
    fuse(model, GPU, parts)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3, fused=True)
    source = models.inputs(name, batch=4).to(GPU)
    shape = encoder.embed(source).shape[:2]
    mask = torch.rand(shape, device=GPU) < 0.5
    batch = dict(source=source, mask=mask, index=mask.flatten().nonzero().squeeze(1), num_targets=float(mask.sum()))
    if name in models.TEXTS:
        batch["target"] = source
    if name not in models.IMAGES:
        batch["padding_mask"] = torch.zeros_like(mask)
        batch["padding_mask"][1, -3:] = True

    num_targets = batch.pop("num_targets")

    def run(inputs, precision):
        with torch.autocast(DEVICE, torch.bfloat16, enabled=precision == "bf16"):
            output = model(**inputs, num_targets=num_targets)
        output.loss.backward()
        return (output.loss.detach(),)

    call = Graphs(run, [p for p in model.parameters() if p.requires_grad]) if replay else run

    def step(precision):
        for value in batch.values():  # other samples, the same shapes
            if value.is_floating_point():
                value.mul_(-1)
        (loss,) = call(batch, precision)
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        model.update_teacher()
        return loss.clone()

    return step


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("precision, tolerance", [("fp32", 1e-4), ("bf16", 2e-2)])
def test_fused_and_plain_agree(name, precision, tolerance):
    plain, fused = make_step(name), make_step(name, PARTS)
    for _ in range(10):
        torch.testing.assert_close(fused(precision), plain(precision), rtol=tolerance, atol=0)


@pytest.mark.parametrize("name", NAMES)
def test_a_fused_step_does_not_synchronise(name):
    step = make_step(name, PARTS)
    for _ in range(2):
        step("bf16")
    with nothing_waits():
        step("bf16")


@needs_gpu
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("parts", [(), PARTS], ids=["plain", "fused"])
def test_replayed_passes_train_the_same(name, parts):
    losses = []
    for replay in (False, True):
        step = make_step(name, parts, replay)
        torch.manual_seed(1)
        losses.append([step("bf16") for _ in range(12)])
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-3, atol=0)


@needs_gpu
def test_a_run_continues_after_a_pass_that_cannot_be_recorded():
    """Its random numbers, its stream, and the reuse of memory that two streams used."""
    weight = torch.nn.Parameter(torch.ones(1 << 20, device=GPU))

    def run(inputs):
        loss = torch.nn.functional.dropout(weight * inputs["x"]).sum()
        if torch.cuda.is_current_stream_capturing():
            loss.item()
        loss.backward()
        return (loss.detach(),)

    graphs, stream, other = Graphs(run, [weight], after=1), torch.cuda.current_stream(), torch.cuda.Stream()
    losses = []
    for _ in range(4):
        weight.grad = None
        losses.append(float(graphs({"x": torch.ones(1 << 20, device=GPU)})[0]))
    assert graphs.most == 0 and not graphs.recorded and len(set(losses)) == 4
    assert torch.cuda.current_stream() == stream
    torch.cuda.synchronize()
    before = torch.cuda.memory_reserved()
    for _ in range(20):
        x = torch.empty(256 << 20, dtype=torch.uint8, device=GPU)
        x.record_stream(other)
        del x
        torch.cuda.synchronize()
    assert torch.cuda.memory_reserved() - before <= 2 * (256 << 20)


@needs_gpu
@pytest.mark.parametrize("name", waits.WAITS)
def test_what_waits(name):
    """The rule by which the fake GPUs of the other tests recognise it."""
    x, y = torch.rand(4, 3, device=GPU), torch.rand(4, 3)
    waits.WAITS[name](x, y)
    with pytest.raises(RuntimeError, match="synchronizing"), nothing_waits():
        waits.WAITS[name](x, y)


@needs_gpu
@pytest.mark.parametrize("name", waits.RUNS_ON)
def test_what_does_not_wait(name):
    x, y = torch.rand(4, 3, device=GPU), torch.rand(4, 3).pin_memory()
    waits.RUNS_ON[name](x, y)
    with nothing_waits():
        waits.RUNS_ON[name](x, y)
