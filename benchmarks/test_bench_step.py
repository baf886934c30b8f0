"""A whole step at base size: (a) as it is taken today, (b) as a good engineer writes it in an hour, (c) ours with --fused.

Each variant runs in a process of its own, as --fused changes how the process keeps its memory; they take turns.
"""

import copy
import gc
import statistics
import time
from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import STEP_CASES, SWEEPS
from benchmarks.measure import Apart, matmul_rate, peak_extra_bytes, timed
from d2v_fast import Data2Vec, build_encoder
from d2v_fast import model as model_module
from d2v_fast.fused import PARTS, fuse

DECAY = 0.9998


class Variant:
    """One way to take a step of a case; the methods are what the benchmark asks for from outside."""

    def __init__(self, case, device):
        torch.manual_seed(0)
        self.case, self.device = case, device

    def step(self):
        raise NotImplementedError

    def seconds(self):
        return timed(self.step, self.device)

    def extra_bytes(self):
        return peak_extra_bytes(self.step, self.device)

    def targets(self):
        return len(self.batch["index"])

    def flops(self):
        # Operation by operation, whether compiled or not.
        with torch.compiler.set_stance("force_eager"), FlopCounterMode(display=False) as counter:
            self.step()
        return counter.get_total_flops()


class Today(Variant):
    """Whole Hugging Face models in fp32, all hidden states and attentions asked for, Adam, EMA over state dicts."""

    def __init__(self, case, device):
        super().__init__(case, device)
        torch.backends.cuda.matmul.allow_tf32 = True
        encoder = build_encoder(case.model, attention="eager").to(device)
        self.student = encoder.model.train()
        if case.modality == "audio":
            self.student.config.layerdrop = 0.0
        self.teacher = copy.deepcopy(self.student).eval()
        self.head = nn.Linear(encoder.hidden_size, encoder.hidden_size).to(device)
        self.optimizer = torch.optim.Adam([*self.student.parameters(), *self.head.parameters()], lr=1e-4)
        self.batch = case.batch_of(encoder, device)

    def states(self, model, inputs, mask):
        masked = {"text": {}, "vision": {"bool_masked_pos": mask}, "audio": {"mask_time_indices": mask}}[self.case.modality]
        masked = masked if mask is not None else {}
        output = model(inputs, **masked, output_hidden_states=True, output_attentions=True)
        length = self.batch["mask"].shape[1]
        return [state[:, -length:] for state in output.hidden_states]

    def step(self):
        mask = self.batch["mask"]
        with torch.no_grad():
            layers = self.states(self.teacher, self.batch.get("target", self.batch["source"]), None)
            layers = layers[-self.case.settings["top_k"] :]
            if self.case.modality == "audio":
                layers = [F.instance_norm(x.transpose(1, 2)).transpose(1, 2) for x in layers]
            else:
                layers = [F.layer_norm(x, x.shape[-1:]) for x in layers]
            target = (sum(layers) / len(layers))[mask]
        predictions = self.head(self.states(self.student, self.batch["source"], mask)[-1])[mask]
        beta = self.case.settings.get("beta")
        loss = F.smooth_l1_loss(predictions, target, beta=beta) if beta else F.mse_loss(predictions, target)
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        teacher = self.teacher.state_dict()
        with torch.no_grad():
            for name, value in self.student.state_dict().items():
                teacher[name] = DECAY * teacher[name] + (1 - DECAY) * value
        self.teacher.load_state_dict(teacher)


class Ours(Variant):
    """Our model in bf16 autocast with sdpa, fused AdamW and foreach EMA; `parts` adds what --fused puts into a model."""

    def __init__(self, case, device, parts):
        super().__init__(case, device)
        config = dict(layerdrop=0.0) if case.modality == "audio" else {}
        encoder = build_encoder(case.model, config=config | case.config)
        settings = case.settings if "loss" in parts else dict(impl="eager", **case.settings)
        self.model = Data2Vec(encoder, **settings).to(device).train()
        self.used = [part for part in parts if fuse(self.model, torch.device(device), [part])]
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        self.batch = case.batch_of(encoder, device)
        self.clock = defaultdict(float)

    def used_parts(self):
        return self.used

    def step(self):
        with torch.autocast(self.device, torch.bfloat16):
            output = self.model(**self.batch, num_targets=float(len(self.batch["index"])))
        with self.part("backward"):
            output.loss.backward()
        with self.part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        with self.part("EMA"):
            self.model.update_teacher()

    @contextmanager
    def part(self, name):
        start = time.perf_counter()
        yield
        self.clock[name] += time.perf_counter() - start

    def parts(self, rounds=3):
        """Seconds of each part of a step on the CPU, where nothing runs behind the caller's back."""

        def watch(owner, method, name):
            inner = getattr(owner, method)

            def call(*args, **kwargs):
                with self.part(name):
                    return inner(*args, **kwargs)

            patch.setattr(owner, method, call)

        with pytest.MonkeyPatch.context() as patch:
            watch(self.model.student, "embed", "embed")
            watch(self.model, "teacher_layers", "teacher")
            watch(self.model.student, "place", "student")
            watch(self.model.student, "transform", "student")
            watch(self.model.head, "forward", "head")
            watch(model_module, "data2vec_loss", "loss")
            self.clock.clear()
            with self.part("step"):
                for _ in range(rounds):
                    self.step()
        return {name: seconds / rounds for name, seconds in self.clock.items()}


VARIANTS = {"today": (Today,), "an hour's work": (Ours, ()), "fused": (Ours, tuple(PARTS))}


@contextmanager
def turns(variants, case, device, seconds):
    """The variants, each in a process of its own, and the median seconds of a step of each, taken in turns."""
    gc.collect()
    running = {name: Apart(make, case, device, *rest) for name, (make, *rest) in variants.items()}
    for _ in range(2):  # the first steps make the optimizer's state and fill the allocator
        for variant in running.values():
            variant("seconds")
    times = {name: [] for name in running}
    end = time.monotonic() + 10 * seconds
    while min(map(len, times.values())) < 3 or time.monotonic() < end:
        for name, variant in running.items():
            times[name].append(variant("seconds"))
    yield running, {name: statistics.median(values) for name, values in times.items()}
    for variant in running.values():
        variant.close()


@pytest.mark.parametrize("case", STEP_CASES, ids=lambda case: case.name)
def test_step(case, device, seconds, benchmark):
    case = case.on(device)
    with turns(VARIANTS, case, device, seconds) as (variants, times):
        benchmark.extra_info.update(
            case=case.name,
            samples=case.batch,
            targets=variants["fused"]("targets"),
            seconds=times,
            extra_bytes={name: variant("extra_bytes") for name, variant in variants.items()},
            flops={name: variant("flops") for name, variant in variants.items()},
            matmul_rate=matmul_rate(device, torch.bfloat16),
            parts={name: variants[name]("parts") for name in ("an hour's work", "fused")} if device == "cpu" else {},
        )
        benchmark.pedantic(variants["fused"], args=("seconds",), rounds=2)


@pytest.mark.parametrize("case", STEP_CASES, ids=lambda case: case.name)
def test_parts(case, device, seconds, benchmark):
    """What each part of --fused that does something here is worth: the whole beside a step without it, two at a time."""
    case = case.on(device)
    pairs = {}
    whole = Apart(Ours, case, device, tuple(PARTS))
    used = whole("used_parts")
    whole.close()
    for part in used:
        without = {"all": VARIANTS["fused"], "without": (Ours, tuple(other for other in PARTS if other != part))}
        with turns(without, case, device, seconds / 3) as (variants, times):
            pairs[part] = times
            if part == used[-1]:
                benchmark.pedantic(variants["all"], args=("seconds",), rounds=2)
    benchmark.extra_info.update(case=case.name, parts=pairs)


@pytest.mark.parametrize("axis", SWEEPS)
def test_sweep(axis, device, seconds, benchmark):
    """The fused step as one size of it grows."""
    times = {}
    for size, case in SWEEPS[axis].items():
        with turns({"fused": VARIANTS["fused"]}, case, device, seconds / 5) as (variants, found):
            times[size] = found["fused"]
            if size == max(SWEEPS[axis]):
                benchmark.pedantic(variants["fused"], args=("seconds",), rounds=2)
    benchmark.extra_info.update(axis=axis, seconds=times)
