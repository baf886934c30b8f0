"""AdamW and teacher in one pass without a GPU: interpreted and compared with float64 and torch, and compiled for three GPUs.

As in tests/test_triton_loss.py, each of the two runs in a separate process; tests/gpu/test_adam.py uses a real GPU.
"""

import copy
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from benchmarks import kernels
from d2v_fast import Data2Vec, EMAConfig, TargetsConfig, build_encoder
from d2v_fast.config import Config, OptimizerConfig, TrainConfig, parse
from d2v_fast.train.build import build
from d2v_fast.train.loop import loop
from d2v_fast.train.optim import make_optimizer, one_pass_obstacle
from tests import models, test_triton_loss
from tests.test_training import arguments, records

pytest.importorskip("triton")

interpreted, compiler = test_triton_loss.interpreted, test_triton_loss.compiler
KERNELS = ("_begin_kernel", "_adamw_kernel")
SETTINGS = OptimizerConfig(lr=2e-2, betas=(0.8, 0.99), eps=1e-6, weight_decay=0.3, lr_scale={"*bias": 0.5, "head.*": 2.0})


def make(scope="all", device="cpu", start=0.9):
    """A model with a head that has no teacher, a tensor larger than one program's share, and tensors of odd sizes."""
    torch.manual_seed(0)
    encoder = build_encoder("vit", config=models.CONFIGS["vit"] | dict(num_hidden_layers=2))
    ema = EMAConfig(scope=scope, start=start, end=0.95, anneal_steps=3)
    model = Data2Vec(encoder, targets=TargetsConfig(top_k=2), ema=ema)
    model.student.model.register_parameter("odd", nn.Parameter(torch.randn(3)))
    model.student.model.register_parameter("long", nn.Parameter(torch.randn(97, 101)))
    model.teacher.module.model.register_parameter("odd", nn.Parameter(torch.randn(3), requires_grad=False))
    model.teacher.module.model.register_parameter("long", nn.Parameter(torch.randn(97, 101), requires_grad=False))
    model.head.register_parameter("one", nn.Parameter(torch.randn(1)))
    return model.to(device)


def gradients(model: nn.Module, step: int) -> dict[str, Tensor | None]:
    """Gradients of a step. The tensors of a block have none in steps 0 and 2, as with layer-drop."""
    generator = torch.Generator().manual_seed(step)
    found = {}
    for name, p in model.named_parameters():
        grad = torch.randn(p.shape, generator=generator).to(p.device) * 10.0 ** (step - 3)
        found[name] = None if not p.requires_grad or (step == 0 and ".1." in name) or (step == 2 and ".0." in name) else grad
    return found


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: range) -> None:
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1 / (step + 1), last_epoch=steps.start - 1)
    for step in steps:
        grads = gradients(model, step)
        for name, p in model.named_parameters():
            p.grad = grads[name]
        optimizer.step()
        model.update_teacher()
        schedule.step()


def expected(model: Data2Vec, steps: int) -> dict[str, Tensor]:
    """All tensors after `steps`, from AdamW and the average written out in float64."""
    (beta1, beta2), eps = SETTINGS.betas, SETTINGS.eps
    weights = {name: p.detach().double() for name, p in model.named_parameters()}
    zeros = {name: torch.zeros_like(w) for name, w in weights.items()}
    means, squares, counts = dict(zeros), dict(zeros), dict.fromkeys(zeros, 0)
    for step in range(steps):
        for name, grad in gradients(model, step).items():
            if grad is None:
                continue
            lr = SETTINGS.lr / (step + 1) * (0.5 if name.endswith("bias") else 1) * (2 if name.startswith("head.") else 1)
            w, g = weights[name], grad.double()
            if sum(size > 1 for size in w.shape) > 1:
                w = w - lr * SETTINGS.weight_decay * w
            counts[name] += 1
            means[name] = beta1 * means[name] + (1 - beta1) * g
            squares[name] = beta2 * squares[name] + (1 - beta2) * g**2
            mean, square = means[name] / (1 - beta1 ** counts[name]), squares[name] / (1 - beta2 ** counts[name])
            weights[name] = w - lr * mean / (square.sqrt() + eps)
        tau = 0.9 + 0.05 * min(step + 1, 3) / 3
        for name in weights:
            if name.startswith("teacher.module."):
                followed = name.removeprefix("teacher.module.")
                student = weights[f"student.{followed}"]
                copied = followed in model.teacher.copied or not dict(model.student.named_parameters())[followed].requires_grad
                weights[name] = student if copied else tau * weights[name] + (1 - tau) * student
    return weights


def against_float64(scope: str, device: str = "cpu") -> list[str]:
    """Tensors whose error against float64 is larger than rounding."""
    model = make(scope, device)
    truth = expected(model, 4)
    optimizer = make_optimizer(model, SETTINGS, fused=True, one_pass=True)
    assert len(optimizer.param_groups) > 3
    train(model, optimizer, range(4))
    wrong = []
    for name, p in model.named_parameters():
        error = (p.detach().double() - truth[name]).abs().max() / truth[name].abs().max()
        if not error < 2e-6:
            wrong.append(f"{name}: off by {error:.1e}")
    assert model.teacher.step == 4
    return wrong


@pytest.mark.parametrize("scope", ["all", "encoder", "layers"])
def test_against_float64(interpreted, scope):
    assert interpreted(against_float64, scope) == []


def in_turn(first: bool, then: bool, device: str = "cpu") -> tuple[dict, dict, dict, dict]:
    """Weights and optimizer state after four steps: by torch alone, and by both in turn through a state dict."""
    whole, parts = make(device=device), make(device=device)
    optimizer = make_optimizer(whole, SETTINGS, fused=True)
    train(whole, optimizer, range(4))
    state = None
    for one_pass, steps in ((first, range(2)), (then, range(2, 4))):
        parts.teacher.moved_by_optimizer = False
        other = make_optimizer(parts, SETTINGS, fused=one_pass, one_pass=one_pass)  # torch's counts steps on the host
        if state:
            other.load_state_dict(copy.deepcopy(state))
            assert not one_pass or all(group["fused"] for group in other.param_groups)
        train(parts, other, steps)
        state = other.state_dict()
    return whole.state_dict(), optimizer.state_dict()["state"], parts.state_dict(), state["state"]


def close(a: Tensor, b: Tensor) -> bool:
    """Whether tensors agree to the rounding of the largest value."""
    return a.dtype == b.dtype and a.shape == b.shape and bool((a - b).abs().max() <= 3e-6 * b.abs().max())


@pytest.mark.parametrize("first, then", [(True, True), (True, False), (False, True)])
def test_the_state_is_that_of_torch(interpreted, first, then):
    expected, kept, found, state = interpreted(in_turn, first, then)
    assert state.keys() == kept.keys()
    for number, tensors in kept.items():
        assert state[number].keys() == tensors.keys()
        assert all(close(state[number][key].float(), x.float()) for key, x in tensors.items()), number
        assert state[number]["step"] == tensors["step"]
    assert [name for name, x in expected.items() if x.is_floating_point() and not close(found[name], x)] == []


def skipped(value: float | None) -> tuple[dict, dict, dict, dict]:
    """Weights and state before and after a step with `found_inf`."""
    model = make()
    optimizer = make_optimizer(model, SETTINGS, fused=True, one_pass=True)
    train(model, optimizer, range(2))
    before = copy.deepcopy((dict(model.named_parameters()), optimizer.state_dict()["state"]))
    if value is not None:
        optimizer.found_inf = torch.tensor(value)
    for name, p in model.named_parameters():
        p.grad = gradients(model, 3)[name]
    optimizer.step()
    return *before, dict(model.named_parameters()), optimizer.state_dict()["state"]


def test_a_skipped_step_changes_nothing(interpreted):
    weights, state, after, state_after = interpreted(skipped, 1.0)
    assert all(torch.equal(p, after[name]) for name, p in weights.items())
    assert all(torch.equal(x, state_after[i][key]) for i, kept in state.items() for key, x in kept.items())
    *_, taken, state_taken = interpreted(skipped, 0.0)
    *_, plain, state_plain = interpreted(skipped, None)
    assert all(torch.equal(p, taken[name]) for name, p in plain.items())
    assert all(torch.equal(x, state_taken[i][key]) for i, kept in state_plain.items() for key, x in kept.items())
    assert not torch.equal(plain["student.model.long"], weights["student.model.long"])
    assert not torch.equal(plain["teacher.module.model.long"], weights["teacher.module.model.long"])


def reloaded() -> list[list[Tensor]]:
    """Weights after step 2, and after going back to step 1 with new moments in other memory."""
    model = make()
    optimizer = make_optimizer(model, SETTINGS, fused=True, one_pass=True)
    train(model, optimizer, range(1))
    before = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    found = []
    for _ in range(2):
        train(model, optimizer, range(1, 2))
        found.append([p.detach().clone() for p in model.parameters()])
        model.load_state_dict(before[0])
        optimizer.load_state_dict(before[1])
    return found


def test_a_state_loaded_between_steps(interpreted):
    assert all(map(torch.equal, *interpreted(reloaded)))


def frozen() -> tuple[Tensor, Tensor]:
    model = make(start=1.0)
    model.teacher.end = 1.0
    before = model.teacher.module.model.long.clone()
    optimizer = make_optimizer(model, SETTINGS, fused=True, one_pass=True)
    train(model, optimizer, range(2))
    return before, model.teacher.module.model.long


def test_a_teacher_that_does_not_move(interpreted):
    assert torch.equal(*interpreted(frozen))


def one_step(offset: int, size: int) -> list[Tensor]:
    """Weight, moments and teacher after a step in memory at an offset of `offset` elements, and the memory after them."""
    from d2v_fast.ops.triton_adam import OnePass, Slot

    torch.manual_seed(0)
    memory = [torch.full((size + 8,), 7.0) for _ in range(5)]
    w, grad, m, v, teacher = (x[offset : offset + size] for x in memory)
    for x in (w, grad, m, v, teacher):
        x.copy_(torch.rand(size))
    slot = Slot(0, w, m, v, torch.tensor(4.0), teacher)
    one_pass = OnePass([slot])
    one_pass.fill([grad], [dict(lr=0.1, weight_decay=0.2, betas=(0.9, 0.98), eps=1e-6)], 0.25)
    one_pass.launch()
    untouched = torch.cat([torch.cat([x[:offset], x[offset + size :]]).float() for x in memory])
    return [w, m, v, slot.step, teacher, untouched]


@pytest.mark.parametrize("size", [1, 4, 1023, 1024, 8192, 8196, 20001])
def test_sizes_and_alignments(interpreted, size):
    aligned = interpreted(one_step, 0, size)
    for offset in (1, 2, 4):
        for one, other in zip(aligned, interpreted(one_step, offset, size), strict=True):
            assert torch.equal(one, other)
    *_, step, _, untouched = aligned
    assert step == 5 and (untouched == 7).all()
    first, *_ = interpreted(one_step, 0, 1)
    torch.manual_seed(0)
    w, g, m, v, _ = (torch.rand(1).double() for _ in range(5))
    m, v = 0.9 * m + 0.1 * g, 0.98 * v + 0.02 * g**2
    w = w - 0.02 * w - 0.1 * m / (1 - 0.9**5) / ((v / (1 - 0.98**5)).sqrt() + 1e-6)
    assert close(first.double(), w)


def strided_gradients() -> tuple[Tensor, Tensor]:
    found = []
    for strided in (False, True):
        model = make()
        optimizer = make_optimizer(model, SETTINGS, fused=True, one_pass=True)
        for p in model.parameters():
            if p.requires_grad:
                grad = torch.arange(p.numel(), dtype=torch.float32).view(p.shape)
                p.grad = grad.mT.contiguous().mT if strided and p.ndim > 1 else grad
        optimizer.step()
        found.append(torch.cat([p.detach().flatten() for p in model.parameters()]))
    return tuple(found)


def test_gradients_that_are_not_contiguous(interpreted):
    assert torch.equal(*interpreted(strided_gradients))


def refusals() -> list[str]:
    from d2v_fast.ops.triton_adam import OnePass, Slot

    w = torch.zeros(4, 6)
    others = [Slot(0, w.mT), Slot(0, w.bfloat16()), Slot(0, w, teacher=w.half()), Slot(0, w, exp_avg=w.mT)]
    found = []
    for slot in others:
        with pytest.raises(ValueError) as error:
            OnePass([slot])
        found.append(str(error.value))
    return found


def test_refusals(interpreted):
    strides, dtype, teacher, shape = interpreted(refusals)
    assert "found torch.float32, (6, 4), strides (1, 6), on cpu, expected torch.float32, (6, 4), contiguous" in strides
    assert "found torch.bfloat16" in dtype and "found torch.float16" in teacher
    assert "found torch.float32, (6, 4)" in shape
    assert all("optimizer.one_pass=false takes any tensor" in message for message in (strides, dtype, teacher, shape))


@pytest.mark.parametrize(
    "config, train_config, fused, why",
    [
        ({}, {}, False, "needs --fused"),
        (dict(kind="lamb"), {}, True, "optimizer.kind=adamw, found lamb"),
        ({}, dict(shard=True), True, "train.shard"),
        ({}, dict(precision="fp16"), True, "train.precision=fp16"),
        ({}, {}, True, "found cpu"),
    ],
)
def test_where_it_cannot_run(config, train_config, fused, why):
    assert why in one_pass_obstacle(make(), OptimizerConfig(**config), TrainConfig(**train_config), fused)


def test_several_modalities_cannot():
    parts = nn.ModuleDict({"vision": make(), "text": make()})
    assert "several modalities" in one_pass_obstacle(parts, OptimizerConfig(), TrainConfig(), True)


def test_a_run_says_that_it_is_left_out(tmp_path, caplog):
    config: Config = parse(arguments("vision", tmp_path / "run", "optimizer.one_pass=true", "train.steps=1"))[0]
    run = build(config, fused=True)
    assert "optimizer.one_pass: the teacher is moved separately: " in caplog.text and "found cpu" in caplog.text
    assert type(run.state.optimizer.optimizer) is torch.optim.AdamW and not run.state.core.teacher.moved_by_optimizer
    assert loop(run) == 0


def run(folder: Path, one_pass: bool, resume: bool = False, stop: int = 3) -> list[float]:
    more = ["train.steps=4", "train.log_every=1", f"optimizer.one_pass={str(one_pass).lower()}", "train.precision=fp32"]
    args = arguments("vision", folder, *more)
    if resume:
        args = ["--resume", str(folder), more[2], "--resume-allow", "optimizer.one_pass"]
    trainer = build(parse(args)[0], fused=True)
    trainer.steps = stop
    assert one_pass == any("in one pass" in words for words in trainer.fused)
    assert loop(trainer) == 0
    trainer.checkpoints.wait()
    return [record["loss"] for record in records(folder)]


def runs(folder: Path) -> list[list[float]]:
    """Losses of a run with torch, with one pass, and with one after the other."""
    found = [run(folder / "whole", False, stop=3), run(folder / "one", True, stop=3)]
    for first, then in ((True, True), (True, False), (False, True)):
        part = folder / f"{first}-{then}"
        run(part, first, stop=2)
        found.append(run(part, then, resume=True, stop=3))
    return found


def test_a_run_resumes_either_way(interpreted, tmp_path):
    whole, one_pass, again, *turns = interpreted(runs, tmp_path)
    assert len(whole) == 3 and again == one_pass  # to the bit
    for losses in (one_pass, *turns):
        assert losses == pytest.approx(whole, rel=1e-4)


def teacher_alone() -> dict[str, Tensor]:
    """Results of `LerpUnless` for tensors of several sizes, with a flag of 0 and of 1, and in other memory."""
    from d2v_fast.ops.triton_adam import LerpUnless

    torch.manual_seed(0)
    sizes = (1, 3, 1024, 20001)
    ours, theirs = ([torch.randn(size) for size in sizes] for _ in range(2))
    start, student = torch.cat(ours), torch.cat(theirs)
    move, found = LerpUnless(ours, theirs), {"start": start, "student": student}
    move(torch.tensor(1.0), ours, theirs, 0.25)
    found["skipped"] = torch.cat(ours)
    move(torch.tensor(0.0), ours, theirs, 0.25)
    found["moved"] = torch.cat(ours)
    others = [x.clone() for x in ours]
    copy.deepcopy(move)(torch.tensor(0.0), others, theirs, 0.5)
    found["again"], found["left alone"], found["followed"] = torch.cat(others), torch.cat(ours), torch.cat(theirs)
    with pytest.raises(ValueError, match="expected torch"):
        LerpUnless([x.half() for x in ours], theirs)
    return found


def test_the_teacher_alone(interpreted):
    found = interpreted(teacher_alone)
    start, student = found["start"].double(), found["student"].double()
    moved = start + 0.25 * (student - start)
    assert torch.equal(found["skipped"], found["start"]) and torch.equal(found["followed"], found["student"])
    assert close(found["moved"].double(), moved) and close(found["again"].double(), (moved + student) / 2)
    assert torch.equal(found["left alone"], found["moved"])


def skipped_teacher(skip: float | None) -> list[Tensor]:
    """The teacher after an update by `LerpUnless`, or by torch."""
    from d2v_fast.ops.triton_adam import LerpUnless

    model = make()
    model.teacher.lerp_unless = LerpUnless(*model.teacher.pairs(model.student)[0])
    model.update_teacher(None if skip is None else torch.tensor(skip))
    return [x.clone() for x in model.teacher.module.state_dict().values() if x.is_floating_point()]


def test_a_teacher_moves_as_by_torch(interpreted):
    plain, taken, unchanged = (interpreted(skipped_teacher, skip) for skip in (None, 0.0, 1.0))
    assert all(map(close, taken, plain)) and not all(map(torch.equal, unchanged, plain))
    assert all(map(torch.equal, unchanged, (x for x in make().teacher.module.state_dict().values() if x.is_floating_point())))


def launches() -> list[kernels.Launch]:
    """The launches of a step without and with a gate."""
    from d2v_fast.ops import triton_adam

    model = make()
    optimizer = make_optimizer(model, SETTINGS, fused=True, one_pass=True)
    with kernels.recorded(triton_adam, KERNELS) as launched:
        for gate in (False, True):
            if gate:
                optimizer.found_inf = torch.tensor(0.0)
            for p in model.parameters():
                p.grad = torch.ones_like(p) if p.requires_grad else None
            optimizer.step()
    return launched


def names_of_launches() -> list[str]:
    return [kernel.__name__ for kernel, _ in launches()]


def test_two_launches_a_step(interpreted):
    assert interpreted(names_of_launches) == 2 * list(KERNELS)


def compile_offline(arch: int) -> list[dict]:
    """Resources of both kernels, without and with a gate."""
    return [dict(kernel=each.kernel.__name__) | kernels.resources(kernels.compiled(each, arch)) for each in launches()]


@pytest.mark.parametrize("arch", kernels.ARCHITECTURES)
def test_compiles_without_spills(compiler, arch):
    for row in compiler(compile_offline, arch):
        print(*row.values(), sep=" | ")
        assert row["spills"] == 0 and row["registers"] <= 128 and row["shared"] <= 4096
        assert row["kernel"] == "_begin_kernel" or row["loads"][128] >= 5  # weight, gradient, moments and teacher
