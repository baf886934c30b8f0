"""AdamW and teacher in one pass on a real GPU: equal to torch up to rounding, reproducible, also in a graph, asynchronous."""

import pytest
import torch

from d2v_fast.train.optim import make_optimizer
from tests.gpu import ABSENT, DEVICE, needs_gpu, nothing_waits
from tests.test_triton_adam import SETTINGS, against_float64, close, gradients, in_turn, make, train

if ABSENT:
    pytest.skip("needs a CUDA GPU", allow_module_level=True)


@pytest.mark.parametrize("scope", ["all", "encoder", "layers"])
def test_against_float64(scope):
    assert against_float64(scope, DEVICE) == []


@pytest.mark.parametrize("first, then", [(True, True), (True, False), (False, True)])
def test_the_state_is_that_of_torch(first, then):
    expected, kept, found, state = in_turn(first, then, DEVICE)
    for number, tensors in kept.items():
        assert all(close(state[number][key].to(DEVICE), x) for key, x in tensors.items()), number
    assert [name for name, x in expected.items() if x.is_floating_point() and not close(found[name], x)] == []


def step_of(model, optimizer):
    for name, p in model.named_parameters():
        p.grad = gradients(model, 3)[name]
    optimizer.step()
    model.update_teacher()


def test_two_runs_agree_bit_by_bit():
    both = [make(device=DEVICE) for _ in range(2)]
    for model in both:
        train(model, make_optimizer(model, SETTINGS, fused=True, one_pass=True), range(4))
    for one, other in zip(*(model.parameters() for model in both), strict=True):
        assert torch.equal(one, other)


def test_a_step_does_not_synchronise():
    model = make(device=DEVICE)
    optimizer = make_optimizer(model, SETTINGS, fused=True, one_pass=True)
    step_of(model, optimizer)
    optimizer.found_inf = torch.zeros((), device=DEVICE)
    with nothing_waits():
        optimizer.step()
        model.update_teacher()


@needs_gpu
def test_inside_a_graph():
    """Three replayed launches, each with its own learning rate, equal three steps."""
    plain, replayed = make(device=DEVICE), make(device=DEVICE)
    optimizers = [make_optimizer(model, SETTINGS, fused=True, one_pass=True) for model in (plain, replayed)]
    for model, optimizer in zip((plain, replayed), optimizers, strict=True):
        step_of(model, optimizer)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        optimizers[1].one_pass.launch()
    for rate in (1e-2, 1e-3, 1e-1):
        for optimizer in optimizers:
            for group in optimizer.param_groups:
                group["lr"] = rate
        optimizers[0].step()
        teacher = replayed.teacher
        grads = [p.grad for group in optimizers[1].param_groups for p in group["params"]]
        optimizers[1].one_pass.fill(grads, optimizers[1].param_groups, 1 - teacher.decay(teacher.step + 1))
        graph.replay()
        for model in (plain, replayed):
            model.update_teacher()
    for one, other in zip(plain.parameters(), replayed.parameters(), strict=True):
        assert torch.equal(one, other)
