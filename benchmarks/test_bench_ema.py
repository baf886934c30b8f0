"""The teacher update at base size: ours compared with common implementations."""

import copy

import torch

from benchmarks.measure import copy as copy_bytes
from benchmarks.measure import interleaved
from d2v_fast import EMATeacher, build_encoder

DECAY = 0.9998


def test_ema(device, seconds, benchmark):
    student = build_encoder("beit").to(device)
    teacher = EMATeacher(student, DECAY, DECAY)
    other = copy.deepcopy(student).requires_grad_(False)
    pairs = teacher.pairs(student)
    parameters = list(zip(other.parameters(), (p.detach() for p in student.parameters()), strict=True))

    def state_dict_loop():
        state = other.state_dict()
        for name, value in student.state_dict().items():
            state[name] = DECAY * state[name] + (1 - DECAY) * value
        other.load_state_dict(state)

    def in_place_loop():
        for ours, theirs in parameters:
            ours.mul_(DECAY).add_(theirs, alpha=1 - DECAY)

    def foreach_mul_add():
        ours, theirs = zip(*parameters, strict=True)
        torch._foreach_mul_(ours, DECAY)
        torch._foreach_add_(ours, theirs, alpha=1 - DECAY)

    variants = {
        "fused": lambda: teacher.update(student, pairs=pairs),  # as in a run
        "fused, unlisted": lambda: teacher.update(student),
        "state dict loop": state_dict_loop,
        "in-place loop": in_place_loop,
        "foreach mul + add": foreach_mul_add,
    }
    with torch.no_grad():
        times = interleaved({**variants, "copy": copy_bytes(device)}, device, seconds)
    size = sum(p.numel() for p, _ in parameters)
    benchmark.extra_info.update(
        case="beit-base",
        seconds=times,
        bytes=12 * size,  # reads student and teacher, writes the teacher
        copy_bandwidth=2 * (256 << 20) / times.pop("copy"),
    )
    benchmark(variants["fused"])
