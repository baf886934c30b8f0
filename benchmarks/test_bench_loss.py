"""Loss and gradient: ours beside eager, `torch.compile`, both on rows gathered first, and the machine's copy bandwidth."""

import gc
import itertools

import pytest
import torch
import torch.nn.functional as F

from benchmarks.cases import CHANNELS, LOSS_CASES
from benchmarks.measure import copy, interleaved, peak_extra_bytes
from d2v_fast import data2vec_loss

COLD = 128 << 20  # bytes that pass between two uses of the same input


def gather_first(predictions, layers, index, norm):
    """What a careful engineer writes: nothing but masked rows is normalised."""
    total = 0
    for x in layers:
        if norm == "layer":
            total = total + F.layer_norm(x.flatten(0, 1)[index].float(), (CHANNELS,))
        else:
            x = x.float()
            variance, mean = torch.var_mean(x, 1, correction=0)
            sample = index // x.shape[1]
            total = total + (x.flatten(0, 1)[index] - mean[sample]) * (variance + 1e-5).rsqrt()[sample]
    return ((predictions.float() - total / len(layers)) ** 2).sum() * CHANNELS**-0.5 / len(index)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("case", LOSS_CASES, ids=lambda case: case.name)
def test_loss(case, dtype, device, seconds, benchmark):
    torch._dynamo.reset()
    gc.collect()
    scored = round(case.batch * case.length * case.masked)
    needed = case.needed_bytes(dtype, scored)
    inputs = [case.tensors(dtype, device, seed) for seed in range(2 + COLD // needed)]
    inputs = [(*tensors, tensors[2].flatten().nonzero().squeeze(1)) for tensors in inputs]
    compiled = torch.compile(gather_first, dynamic=False)

    def step(loss):
        turn = itertools.cycle(inputs)

        def run():
            predictions, layers, mask, index = next(turn)
            predictions.grad = None
            loss(predictions, layers, mask, index).backward()

        return run

    def ours(impl):
        return step(lambda predictions, layers, mask, _: data2vec_loss(predictions, layers, mask, norm=case.norm, impl=impl))

    variants = {
        "fused": ours("native" if device == "cpu" else "triton"),
        "compile": ours("compile"),
        "gather first": step(lambda predictions, layers, _, index: gather_first(predictions, layers, index, case.norm)),
        "gather first, compile": step(lambda predictions, layers, _, index: compiled(predictions, layers, index, case.norm)),
        "eager": ours("eager"),
        "copy": copy(device),
        "copy rows": copy_rows(inputs),
    }
    if device == "cuda":
        variants["fused, graph"] = replayed(variants["fused"], len(inputs))
    expected, *others = (loss_of(impl, inputs[0], case, compiled) for impl in ("eager", "fused", "gather first, compile"))
    for loss in others:
        torch.testing.assert_close(loss, expected, rtol=1e-4, atol=0)

    times = interleaved(variants, device, seconds)
    bandwidth = 2 * (256 << 20) / times.pop("copy")
    row_bandwidth = 2 * case.top_k * scored * CHANNELS * dtype.itemsize / times.pop("copy rows")
    memory = {}
    for name in times:
        for predictions, *_ in inputs:
            predictions.grad = None  # else the call frees what it then allocates
        memory[name] = peak_extra_bytes(variants[name], device)
    benchmark.extra_info.update(
        case=case.name,
        dtype=str(dtype).removeprefix("torch."),
        bytes=needed,
        gradient_bytes=scored * CHANNELS * dtype.itemsize,
        copy_bandwidth=bandwidth,
        row_bandwidth=row_bandwidth,
        seconds=times,
        extra_bytes=memory,
    )
    benchmark.pedantic(variants["fused"], rounds=10, warmup_rounds=2)


def loss_of(name, inputs, case, compiled):
    predictions, layers, mask, index = inputs
    with torch.no_grad():
        if name == "gather first, compile":
            return compiled(predictions, layers, index, case.norm)
        impl = {"eager": "eager", "fused": "native" if predictions.device.type == "cpu" else "triton"}[name]
        return data2vec_loss(predictions, layers, mask, norm=case.norm, impl=impl)


def copy_rows(inputs):
    """Copies the masked rows of all layers and nothing else: what the machine can do for memory read in pieces."""
    turn = itertools.cycle(inputs)
    first, layers, *_ = inputs[0]
    targets = [torch.empty_like(first, requires_grad=False) for _ in layers]

    def run():
        _, layers, _, index = next(turn)
        for x, target in zip(layers, targets, strict=True):
            torch.index_select(x.flatten(0, 1), 0, index, out=target)

    return run


def replayed(run, turns):
    """The same work as CUDA graphs, one for each input: what remains without the launches."""
    graphs = []
    for _ in range(turns):
        run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
        graphs.append(graph)
    turn = itertools.cycle(graphs)
    return lambda: next(turn).replay()
