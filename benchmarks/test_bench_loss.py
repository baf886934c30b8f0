"""Loss and gradient: the fused loss compared with eager, published and gather-first versions, compiled ones, and a copy."""

import gc
import itertools

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cases import LOSS_CASES, LOSS_CASES_2
from benchmarks.measure import copy, interleaved, peak_extra_bytes
from d2v_fast import data2vec_loss

COLD = 128 << 20  # bytes read between two uses of the same input, to evict it from the caches


def gather_first(predictions, layers, index, case):
    """What a careful engineer writes: layer norms of masked rows only, and one average for all views."""
    position = index
    if case.views:
        position = index // (case.views * case.length) * case.length + index % case.length
    total = 0
    for x in layers:
        if case.norm == "layer" and not case.views:
            total = total + F.layer_norm(x.flatten(0, 1)[position].float(), x.shape[-1:])
            continue
        x = x.float()
        if case.norm == "layer":
            total = total + F.layer_norm(x, x.shape[-1:])
            continue
        variance, mean = torch.var_mean(x, 1, correction=0, keepdim=True)
        if case.views:
            total = total + (x - mean) * (variance + 1e-5).rsqrt()
        else:
            sample = position // x.shape[1]
            rows = x.flatten(0, 1)[position]
            total = total + (rows - mean[sample, 0]) * (variance[sample, 0] + 1e-5).rsqrt()
    average = total / len(layers)
    if case.target_norm == "layer":
        average = F.layer_norm(average, average.shape[-1:])
    targets = average.flatten(0, 1)[position] if case.views else average
    return F.mse_loss(predictions.float(), targets, reduction="sum") * case.channels**-0.5 / len(index)


def published(predictions, layers, index, case):
    """A direct transcription of the papers' formulas: whole layers in fp32, repeated for the views, rows gathered last."""
    average = 0
    for x in layers:
        x = x.float()
        if case.norm == "layer":
            x = F.layer_norm(x, x.shape[-1:])
        else:
            x = F.instance_norm(x.transpose(1, 2)).transpose(1, 2)
        average = average + x
    average = average / len(layers)
    if case.target_norm == "layer":
        average = F.layer_norm(average, average.shape[-1:])
    if case.views:
        average = average.repeat_interleave(case.views, 0)
    targets = average.flatten(0, 1)[index]
    return F.mse_loss(predictions.float(), targets, reduction="sum") * case.channels**-0.5 / len(index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", [*LOSS_CASES, *LOSS_CASES_2], ids=lambda case: case.name)
def test_loss(case, dtype, device, seconds, benchmark):
    torch._dynamo.reset()
    gc.collect()
    needed = case.needed_bytes(dtype)
    inputs = [case.tensors(dtype, device, seed) for seed in range(2 + COLD // needed)]
    inputs = [(*tensors, torch.nonzero_static(tensors[2].flatten(), size=case.scored).squeeze(1)) for tensors in inputs]
    compiled = {plain: torch.compile(plain, dynamic=False) for plain in (gather_first, published)}

    def step(loss, inputs):
        turn = itertools.cycle(inputs)

        def run():
            predictions, layers, mask, index = next(turn)
            predictions.grad = None
            loss(predictions, layers, mask, index).backward()

        return run

    def ours(impl):
        return lambda predictions, layers, mask, _: fused(predictions, layers, mask, case, impl)

    def theirs(loss):
        return lambda predictions, layers, _, index: loss(predictions, layers, index, case)

    kernel = "native" if device == "cpu" else "triton"
    losses = {
        "fused": ours(kernel),
        "compile": ours("compile"),
        "gather first": theirs(gather_first),
        "gather first, compile": theirs(compiled[gather_first]),
        "published": theirs(published),
        "published, compile": theirs(compiled[published]),
        "eager": ours("eager"),
    }
    variants = {name: step(loss, inputs) for name, loss in losses.items()}
    predictions, layers, mask, index = inputs[0]
    with torch.no_grad():
        expected = fused(predictions, layers, mask, case, "eager")
        found = [fused(predictions, layers, mask, case, kernel)]
        found += [loss(predictions, layers, index, case) for loss in (gather_first, published, *compiled.values())]
    for loss in found:
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)

    copies = {"copy": copy(device), "copy rows": copy_rows(inputs, case)}
    if device == "cuda":  # launches take longer than the kernels, and a run replays them as a graph
        graphs = {name: replayed(call, len(inputs)) for name, call in (variants | copies).items()}
        times = interleaved(graphs, device, seconds)
        others = {"seconds_called": interleaved(variants, device, seconds)}
    else:
        times = interleaved(variants | copies, device, seconds)
        reused = {name: step(loss, inputs[:1]) for name, loss in losses.items()}
        others = {"seconds_reused": interleaved(reused, device, seconds)}
    bandwidth = 2 * (256 << 20) / times.pop("copy")
    row_bandwidth = 2 * case.top_k * case.rows * case.channels * dtype.itemsize / times.pop("copy rows")
    memory = {}
    for name in times:
        for predictions, *_ in inputs:
            predictions.grad = None  # else the call frees as much as it allocates
        memory[name] = peak_extra_bytes(variants[name], device)
    benchmark.extra_info.update(
        case=case.name,
        norm=case.norm,
        dtype=str(dtype).removeprefix("torch."),
        bytes=needed,
        gradient_bytes=case.scored * case.channels * dtype.itemsize,
        copy_bandwidth=bandwidth,
        row_bandwidth=row_bandwidth,
        seconds=times,
        extra_bytes=memory,
        **others,
    )
    benchmark.pedantic(variants["fused"], rounds=10, warmup_rounds=2)


def fused(predictions, layers, mask, case, impl):
    return data2vec_loss(predictions, layers, mask, norm=case.norm, target_norm=case.target_norm, impl=impl)


def copy_rows(inputs, case):
    """A call that only copies the masked rows of all layers: the machine's limit for scattered reads."""
    turn = itertools.cycle(inputs)
    _, layers, *_, index = inputs[0]
    everything = torch.arange(case.batch * case.length, device=index.device)
    targets = [x.new_empty(case.rows, case.channels) for x in layers]

    def run():
        _, layers, _, index = next(turn)
        for x, target in zip(layers, targets, strict=True):
            torch.index_select(x.flatten(0, 1), 0, everything if case.views else index, out=target)

    return run


def replayed(run, turns):
    """The same work as CUDA graphs, one per input, without launch overhead. Each call of `run` uses the next of its inputs."""
    graphs = []
    for _ in range(turns):  # all before the first is captured: a call in between would skip every second input
        run()
    torch.cuda.synchronize()
    for _ in range(turns):
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graphs.append(graph)
    turn = itertools.cycle(graphs)
    return lambda: next(turn).replay()
