import copy

import numpy as np
import pytest
import torch
from torch import nn

from d2v_fast import EMATeacher
from d2v_fast.ema import linear_decay


class Student(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(4, 6), nn.Linear(6, 3)
        self.frozen = nn.Parameter(torch.randn(5), requires_grad=False)
        self.norm = nn.BatchNorm1d(3)
        self.register_buffer("ids", torch.arange(10))


def drift(student, seed, size=0.1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in student.parameters():
            parameter.add_(torch.randn(parameter.shape, generator=generator).to(parameter.dtype) * size)
        student.ids.add_(1)
        student.norm.running_mean.add_(0.5)


def test_decay_is_linear_then_constant():
    assert linear_decay(0, 0.9, 0.99, 10) == 0.9
    assert linear_decay(1, 0.9, 0.99, 10) == pytest.approx(0.9 + 0.09 / 10)
    assert linear_decay(10, 0.9, 0.99, 10) == linear_decay(10**9, 0.9, 0.99, 10) == 0.99
    assert linear_decay(1, 0.9, 0.99, 0) == 0.99
    assert all(linear_decay(steps, 0.0, 0.99, steps) == 0.99 for steps in range(1, 200))  # without rounding


def test_follows_the_float64_recurrence_for_a_thousand_steps():
    student = Student()
    teacher = EMATeacher(student, 0.99, 0.9999, 500)
    expected = {name: p.detach().double().numpy().copy() for name, p in student.named_parameters() if p.requires_grad}
    for step in range(1, 1001):
        drift(student, step, 0.002)
        teacher.update(student)
        tau = 0.99 + (0.9999 - 0.99) * min(step, 500) / 500
        for name, p in student.named_parameters():
            if p.requires_grad:
                expected[name] = tau * expected[name] + (1 - tau) * p.detach().double().numpy()
    for name, p in teacher.module.named_parameters():
        if name in expected:
            assert np.linalg.norm(p.double().numpy() - expected[name]) / np.linalg.norm(expected[name]) < 1e-6
    assert teacher.step == 1000


def test_the_first_update_uses_the_decay_of_step_one():
    student = Student()
    before = student.first.weight.detach().clone()
    teacher = EMATeacher(student, 0.5, 0.7, 2)
    drift(student, 0)
    teacher.update(student)
    expected = 0.6 * before + 0.4 * student.first.weight
    assert torch.allclose(teacher.module.first.weight, expected, atol=1e-7)


def test_buffers_frozen_and_named_parameters_are_copied():
    student = Student()
    teacher = EMATeacher(student, 0.9, 0.9, 1, copied=["second.*"])
    drift(student, 0)
    teacher.update(student)
    for name in ("ids", "frozen"):
        assert (getattr(teacher.module, name) == getattr(student, name)).all()
    assert teacher.module.ids.dtype == torch.int64
    assert (teacher.module.norm.running_mean == student.norm.running_mean).all()
    assert (teacher.module.second.weight == student.second.weight).all()
    assert (teacher.module.first.weight != student.first.weight).any()


def test_several_patterns_name_what_is_copied():
    teacher = EMATeacher(Student(), copied=(pattern for pattern in ("second.*", "first.bias")))
    assert teacher.copied == {"second.weight", "second.bias", "first.bias"}


@pytest.mark.parametrize("flag", [None, 0.0])
def test_a_teacher_moved_by_the_optimizer_only_copies(flag):
    student = Student()
    teacher = EMATeacher(student, 0.9, 0.9, 1, copied=["second.*"])
    before = teacher.module.first.weight.clone()
    teacher.moved_by_optimizer = True
    drift(student, 0)
    teacher.update(student, None if flag is None else torch.tensor(flag))
    assert torch.equal(teacher.module.first.weight, before) and teacher.step == 1
    assert torch.equal(teacher.module.second.weight, student.second.weight) and torch.equal(teacher.module.ids, student.ids)


@pytest.mark.parametrize("trainable", [True, False])
@pytest.mark.parametrize("flag", [None, 0.0])
def test_all_parameters_may_be_averaged_or_copied(trainable, flag):
    student = nn.Linear(3, 2).requires_grad_(trainable)
    teacher = EMATeacher(student, 0.5, 0.5)
    before = teacher.module.weight.clone()
    with torch.no_grad():
        student.weight.add_(1.0)
    teacher.update(student, None if flag is None else torch.tensor(flag))
    torch.testing.assert_close(teacher.module.weight, before + (0.5 if trainable else 1.0))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_flag_on_the_device_skips_an_update(dtype):
    student = Student()
    teacher = EMATeacher(student, 0.9, 0.9, 1, copied=["second.*"])
    student = student.to(dtype)
    drift(student, 0)
    plain, taken, skipped = copy.deepcopy(teacher), copy.deepcopy(teacher), copy.deepcopy(teacher)
    plain.update(student)
    taken.update(student, torch.tensor(0.0))
    skipped.update(student, torch.tensor(1.0))
    assert plain.step == taken.step == skipped.step == 1
    for name, x in plain.module.state_dict().items():
        assert torch.equal(x, taken.module.state_dict()[name]), name
        if name not in ("norm.running_var", "norm.num_batches_tracked"):  # as at the start
            assert not torch.equal(x, teacher.module.state_dict()[name]), name
    for name, x in teacher.module.state_dict().items():
        assert torch.equal(x, skipped.module.state_dict()[name]), name
    student.norm.running_mean.fill_(float("nan"))  # as after a step that is not finite
    skipped.update(student, torch.tensor(1.0))
    assert torch.equal(skipped.module.norm.running_mean, teacher.module.norm.running_mean)


@pytest.mark.parametrize("flag", [None, 0.0])
def test_pairs_serve_many_updates_while_buffers_are_replaced(flag):
    student = Student()
    kept = EMATeacher(student, 0.5, 0.9, 3, copied=["second.*"])
    anew, pairs = copy.deepcopy(kept), kept.pairs(student)
    for step in range(3):
        drift(student, step)
        student.ids = torch.arange(10) + step
        student.norm.running_mean = torch.full((3,), float(step))
        kept.module.norm.running_mean = kept.module.norm.running_mean.clone()
        for teacher, given in ((kept, pairs), (anew, None)):
            teacher.update(student, None if flag is None else torch.tensor(flag), given)
        for name, x in anew.state_dict().items():
            assert torch.equal(x, kept.state_dict()[name]), name
        assert torch.equal(kept.module.norm.running_mean, student.norm.running_mean)


def test_a_frozen_teacher_does_not_change():
    student = Student()
    teacher = EMATeacher(student, 0.5, 1.0, 1)
    state = copy.deepcopy(teacher.module.state_dict())
    drift(student, 0)
    teacher.update(student)
    assert all((state[name] == value).all() for name, value in teacher.module.state_dict().items())


def test_a_bf16_student_moves_an_fp32_teacher():
    student = Student().bfloat16()
    teacher = EMATeacher(student, 0.9999, 0.9999, 1)
    start = teacher.module.first.weight.clone()
    assert start.dtype == torch.float32
    drift(student, 0)
    for _ in range(200):
        teacher.update(student)
    moved = (teacher.module.first.weight != start).float()[student.first.weight != start.bfloat16()]
    assert moved.mean() == 1


def test_buffers_are_paired_by_name():
    student = Student()
    student.register_buffer("other", torch.arange(10))
    teacher = EMATeacher(student, 0.9, 0.9, 1)
    del student.ids
    student.register_buffer("ids", torch.arange(10) + 1)  # registered after the other buffer
    teacher.update(student)
    assert (teacher.module.ids == student.ids).all() and (teacher.module.other == student.other).all()


def test_tied_weights_are_updated_once_and_may_be_untied():
    student = Student()
    student.tied = nn.Linear(4, 6, bias=False)
    student.tied.weight = student.first.weight
    teacher = EMATeacher(student, 0.5, 0.5)
    before = teacher.module.first.weight.clone()
    drift(student, 0)
    teacher.update(student)
    torch.testing.assert_close(teacher.module.tied.weight, (before + student.first.weight) / 2)
    teacher.load_state_dict({name: value.clone() for name, value in teacher.state_dict().items()}, assign=True)
    drift(student, 1)
    teacher.update(student)
    assert (teacher.module.first.weight == teacher.module.tied.weight).all() and teacher.step == 2


def test_tied_buffers_may_be_untied():
    student = Student()
    student.register_buffer("same", student.ids)
    teacher = EMATeacher(student, 0.5, 0.5)
    teacher.module.same = teacher.module.ids.clone()
    drift(student, 0)
    teacher.update(student)
    assert torch.equal(teacher.module.ids, student.ids) and torch.equal(teacher.module.same, student.ids)


def test_tied_parameters_match_patterns_by_their_first_name():
    student = Student()
    student.tied = nn.Linear(4, 6, bias=False)
    student.tied.weight = student.first.weight
    teacher = EMATeacher(student, 0.5, 0.5, copied=["first.weight"])
    drift(student, 0)
    teacher.update(student)
    assert torch.equal(teacher.module.tied.weight, student.first.weight)


class Wrapper(nn.Module):
    """Names its parameters as DistributedDataParallel does."""

    def __init__(self, module):
        super().__init__()
        self.module = module


def change(**attributes):
    def changed(student):
        for name, value in attributes.items():
            setattr(student, name, value)
        return student

    return changed


@pytest.mark.parametrize(
    "handed, named",
    [
        (Wrapper, "first.bias: found in the teacher only; pass the unwrapped student"),
        (torch.compile, "_orig_mod.first.bias: found in the student only; pass the unwrapped student"),
        (change(frozen=None), "frozen: found in the teacher only"),
        (change(added=nn.Parameter(torch.ones(2))), "added: found in the student only"),
        (change(ids=None), "ids: found in the teacher only"),
        (change(ids=torch.ones(1)), "ids: found (1,) in the student, expected (10,)"),
    ],
)
def test_a_student_of_another_structure_is_named_and_moves_nothing(handed, named):
    student = Student()
    teacher = EMATeacher(student, 0.5, 0.5)
    before = copy.deepcopy(teacher.module.state_dict())
    drift(student, 0)
    with pytest.raises(ValueError) as error:
        teacher.update(handed(student))
    assert named in str(error.value) and teacher.step == 0
    assert all((before[name] == value).all() for name, value in teacher.module.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_a_teacher_below_fp32_is_refused(dtype):
    """Its small updates would be rounded away."""
    student = Student()
    teacher = EMATeacher(student, 0.9999, 0.9999)
    around = nn.ModuleList([student, teacher]).to(dtype)
    with pytest.raises(ValueError, match=f"found {dtype} in the teacher.*cast only the student, or call teacher.float"):
        teacher.update(student)
    teacher.float().update(student)
    around.double()
    teacher.update(student)


def test_the_defaults_are_the_published_schedule_of_speech():
    teacher = EMATeacher(Student())
    assert (teacher.start, teacher.end, teacher.anneal_steps) == (0.999, 0.9999, 30_000)


@pytest.mark.parametrize("start, end", [(0, 1), (1, 0), (1.0, 1.0)])
def test_bounds_are_accepted(start, end):
    assert EMATeacher(Student(), start, end, 0).decay(1) == end


def test_a_decay_of_0_copies():
    student = Student()
    teacher = EMATeacher(student, 0, 0)
    drift(student, 0)
    teacher.update(student)
    torch.testing.assert_close(teacher.module.first.weight, student.first.weight)


def test_stays_in_eval_mode_without_gradients():
    student = Student()
    teacher = EMATeacher(student)
    assert not any(module.training for module in teacher.module.modules())
    nn.ModuleList([teacher]).train()
    assert teacher.train() is teacher
    assert not teacher.module.training and student.training
    assert not any(p.requires_grad for p in teacher.parameters()) and student.first.weight.requires_grad


class Scaled(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(3))

    def forward(self, x, *, factor):
        return self.weight * x * factor


def test_a_call_is_one_of_the_copy():
    student = Scaled()
    teacher, weight, x = EMATeacher(student, 0.5, 0.9, 10), student.weight.detach().clone(), torch.randn(3)
    with torch.no_grad():
        student.weight.add_(1.0)
    assert torch.equal(teacher(x, factor=2.0), weight * x * 2.0)
    teacher.update(student)
    assert repr(teacher).startswith("EMATeacher(\n  start=0.5, end=0.9, anneal_steps=10, step=1\n")


def test_the_state_holds_weights_and_step():
    student = Student()
    teacher, other = EMATeacher(student, 0.5, 0.9, 10), EMATeacher(Student(), 0.5, 0.9, 10)
    for i in range(3):
        drift(student, i)
        teacher.update(student)
    other.load_state_dict(teacher.state_dict())
    drift(student, 9)
    for each in (teacher, other):
        each.update(student)
    assert other.step == 4
    assert all((a == b).all() for a, b in zip(teacher.parameters(), other.parameters(), strict=True))


@pytest.mark.parametrize(
    "settings, named",
    [
        (dict(start=1.5), "start: found 1.5"),
        (dict(end="0.9"), "end: found '0.9', expected a number in"),
        (dict(end=float("nan")), "end: found nan"),
        (dict(anneal_steps=-1), "anneal_steps: found -1"),
        (dict(anneal_steps=float("nan")), "anneal_steps: found nan"),
        (dict(anneal_steps=None), "anneal_steps: found None"),
        (dict(copied="first.*"), "copied: found 'first.*', expected a list of patterns"),
        (dict(copied=["frist.*"]), "'frist.*'"),
        (dict(copied=["*"]), "which match every parameter"),
    ],
)
def test_impossible_settings_are_named(settings, named):
    with pytest.raises(ValueError, match=named.replace("*", r"\*")):
        EMATeacher(Student(), **settings)
