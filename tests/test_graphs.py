"""Passes that are replayed: the same training as without, with a recording that runs the pass again in place of a GPU."""

import weakref
from contextlib import contextmanager
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from d2v_fast.graphs import Graphs


class Again(Graphs):
    """Writes only into the tensors of the first run, as a graph does."""

    def capture(self, run):
        with torch.random.fork_rng(devices=[]):  # nothing is drawn while a graph is recorded
            outputs = run()
        grads = [(p, p.grad) for p in self.parameters if p.grad is not None]

        def replay():
            for p, _ in grads:
                p.grad = None
            for kept, new in zip(outputs, run(), strict=True):
                kept.copy_(new)
            for p, kept in grads:
                kept.copy_(p.grad)
                p.grad = None  # a graph does not set parameters' gradients

        return replay, outputs


def training(wrap):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), nn.GELU(), nn.Linear(8, 3))
    unused = nn.Parameter(torch.ones(2))
    parameters = [*model.parameters(), unused]
    optimizer = torch.optim.AdamW(parameters, lr=0.1)
    calls = []

    def run(inputs, scale):
        calls.append(len(inputs["x"]))
        loss = ((model(inputs["x"]) - inputs["y"]) ** 2).sum() / scale
        loss.backward()
        return (loss.detach(),)

    graphs = wrap(run, parameters)

    def step(size, scale=2.0):
        (loss,) = graphs(dict(x=torch.randn(size, 6), y=torch.randn(size, 3)), scale)
        loss = float(loss)  # read it before the next call overwrites it
        nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss

    return step, graphs, calls, unused


def plain(run, parameters):
    return run


def test_replays_do_not_change_training():
    sizes = [4, 4, 5, 4, 4, 5, 4, 5, 5, 4, 7, 5]
    curves = []
    for wrap in (plain, lambda *args: Again(*args, after=2)):
        step, graphs, _, unused = training(wrap)
        curves.append([step(size) for size in sizes])
        assert unused.grad is None
    assert curves[0] == curves[1]
    assert [key[1][1] for key in graphs.recorded] == [(4, 6), (5, 6)]


def test_other_settings_or_dtypes_are_another_graph():
    step, graphs, _, _ = training(lambda *args: Again(*args, after=0))
    first, second = step(4, 2.0), step(4, 200.0)
    assert first > 20 * second and len(graphs.recorded) == 2
    (key, _) = graphs.recorded
    assert key[1:] == (("x", (4, 6), torch.float32), ("y", (4, 3), torch.float32))


def test_there_are_as_many_graphs_as_asked_for():
    step, graphs, _, _ = training(lambda *args: Again(*args, after=1, most=2))
    for size in (1, 2, 3, 1, 2, 3, 1, 2, 3):
        step(size)
    assert [key[1][1][0] for key in graphs.recorded] == [1, 2]


def test_the_record_of_seen_shapes_is_bounded():
    graphs = Again(lambda inputs: (), [], after=0, most=0)
    for size in range(1500):
        graphs(dict(x=torch.empty(size)))
    assert len(graphs.seen) == 1000


@pytest.mark.parametrize("size", [1, 3])
def test_a_replay_overwrites_earlier_outputs(size):
    _, graphs, _, _ = training(lambda *args: Again(*args, after=0))
    inputs = dict(x=torch.randn(size, 6), y=torch.zeros(size, 3))
    (first,) = graphs(inputs, 1.0)
    (second,) = graphs(dict(inputs, y=torch.full((size, 3), 100.0)), 1.0)
    assert first is second and float(first) > 1e3


def test_failed_recording_falls_back_to_eager(caplog):
    class Broken(Again):
        def capture(self, run):
            run()
            raise RuntimeError("operation not permitted when stream is capturing\nand more")

    curves = []
    for wrap in (plain, lambda *args: Broken(*args, after=1)):
        step, _, calls, _ = training(wrap)
        curves.append([step(4) for _ in range(5)])
    assert curves[0] == curves[1] and len(calls) == 6
    assert caplog.messages == ["no CUDA graphs: a pass could not be recorded: operation not permitted when stream is capturing"]


def test_nothing_of_a_failed_recording_is_left_when_the_pass_runs_again():
    """Otherwise its gradients would be added up on the stream of the capture."""
    passes = []

    class Broken(Graphs):
        def capture(self, run):
            run()
            raise AssertionError("the pass did not fail")

    def run(inputs):
        assert all(earlier() is None for earlier in passes)
        loss = inputs["x"].sum()
        passes.append(weakref.ref(loss))
        if len(passes) == 2:
            raise RuntimeError("operation not permitted when stream is capturing")
        return (loss,)

    graphs = Broken(run, [], after=1)
    for _ in range(3):
        graphs(dict(x=torch.ones(2)))
    assert len(passes) == 4 and graphs.most == 0


@pytest.mark.parametrize("ended", [False, True])
def test_torch_is_left_as_it_was_after_a_failed_capture(ended, monkeypatch):
    """A stand-in for torch's capture, of which either the end fails too, or only the pass inside."""
    stream, pools, done = SimpleNamespace(device_index=1), [], []
    generator = SimpleNamespace(device="cpu", get_state=torch.Generator().manual_seed(3).get_state)
    generator.graphsafe_set_state = lambda state: done.append(state.initial_seed())

    @contextmanager
    def capture(graph, pool, capture_error_mode):
        pools.append(pool)
        yield

    def clean(name):
        def call(*args):
            if ended:
                raise RuntimeError("endAllocatePool: not currently recording to mempool_id")
            done.append((name, *args))

        return call

    def fail():
        raise RuntimeError("operation not permitted when stream is capturing")

    handles = iter([(0, 7), (0, 8)])
    monkeypatch.setattr(torch.cuda, "CUDAGraph", lambda: SimpleNamespace(replay=len))
    monkeypatch.setattr(torch.cuda, "current_stream", lambda: stream)
    monkeypatch.setattr(torch.cuda, "default_generators", (None, generator))
    monkeypatch.setattr(torch.cuda, "graph_pool_handle", lambda: next(handles))
    monkeypatch.setattr(torch.cuda, "graph", capture)
    monkeypatch.setattr(torch.cuda, "set_stream", lambda current: done.append(current))
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool"):
        monkeypatch.setattr(torch._C, name, clean(name), raising=False)
    graphs = Graphs(lambda inputs: (), [])
    assert graphs.capture(tuple) == (len, ()) and done == []
    graphs.recorded["of another shape"] = None
    with pytest.raises(RuntimeError, match="not permitted"):
        graphs.capture(fail)
    cleaned = [("_cuda_endAllocateToPool", 1, (0, 7)), ("_cuda_releasePool", 1, (0, 7))]
    assert pools == [(0, 7), (0, 7)] and done == [stream, 3, *([] if ended else cleaned)]
    assert graphs.recorded == {}
