"""A whole step at base size: (a) common practice today, (b) what a good engineer writes in an hour, (c) ours with --fused.

For data2vec 2.0: as released, in fp32 and in bf16 autocast, and ours with --fused, compared with the steps of 1.0.

Each variant runs in its own process, because --fused changes how the process manages memory. The variants take turns.
"""

import copy
import gc
import math
import statistics
import time
from collections import defaultdict
from contextlib import contextmanager
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from benchmarks.cases import SPLICED_CASES, STEP_CASES, STEP_CASES_2, SWEEPS
from benchmarks.measure import Worker, matmul_rate, peak_extra_bytes, timed
from d2v_fast import Data2Vec, build_encoder
from d2v_fast import model as model_module
from d2v_fast.config import has_bf16
from d2v_fast.decoders import ConvDecoder
from d2v_fast.fused import PARTS, fuse
from d2v_fast.graphs import Graphs
from d2v_fast.ops.triton_adam import AdamWOnePass
from tests import released

DECAY = 0.9998


@pytest.fixture(autouse=True, scope="session")
def bf16(request):
    """All variants compute in bf16, so these benchmarks need instructions for it."""
    if not has_bf16(request.config.getoption("--device")):
        pytest.exit("the steps compute in bf16, for which this processor has no instructions: each would take minutes", 2)


def conv_flops(x, weight, *_, out_shape=None):
    return 2 * math.prod(x[:-1]) * math.prod(weight)


def conv_weight_flops(x, grad, kernel, groups, *, out_shape=None):
    return 2 * math.prod(x) // groups * grad[-1] * math.prod(kernel)


FLOPS = {torch.ops.d2v_fast.conv: conv_flops, torch.ops.d2v_fast.conv_weight_grad: conv_weight_flops}


class Variant:
    """One implementation of a step; the benchmark calls its methods from another process."""

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
        # Counted in eager mode, since compiled code hides its operations.
        counter = FlopCounterMode(display=False, custom_mapping=FLOPS)
        with torch.compiler.set_stance("force_eager"), counter:
            self.step()
        return counter.get_total_flops()


class Today(Variant):
    """Whole Hugging Face models in fp32 that return all hidden states and attentions, Adam, EMA over state dicts."""

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
            layers = layers[-self.case.targets.top_k :]
            if self.case.modality == "audio":
                layers = [F.instance_norm(x.transpose(1, 2)).transpose(1, 2) for x in layers]
            else:
                layers = [F.layer_norm(x, x.shape[-1:]) for x in layers]
            target = (sum(layers) / len(layers))[mask]
        predictions = self.head(self.states(self.student, self.batch["source"], mask)[-1])[mask]
        beta = self.case.loss.beta
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
    """Our model in bf16 autocast with SDPA, fused AdamW and foreach EMA.

    `parts` adds parts of --fused, and "one pass" adds `optimizer.one_pass`. `features` is the path of the local feature module;
    with it the model runs whole.
    """

    def __init__(self, case, device, parts, features=None):
        super().__init__(case, device)
        config = dict(layerdrop=0.0) if case.modality == "audio" else {}
        encoder = build_encoder(case.model, config=config | case.config, features=features)
        loss = case.loss if "loss" in parts else replace(case.loss, impl="eager")
        predictor = ConvDecoder(encoder.hidden_size, **case.decoder) if case.views else case.head
        model = Data2Vec(encoder, predictor, targets=case.targets, loss=loss, ema=case.ema)
        self.model = model.to(device).train()
        self.used = [part for part in parts if part in PARTS and fuse(self.model, torch.device(device), [part])]
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        if device == "cuda" and "one pass" in parts:
            self.optimizer = AdamWOnePass(parameters, self.model, lr=1e-4)
        else:
            self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        self.batch = case.batch_of(encoder, device)
        self.graphs = Graphs(self.forward_backward, parameters) if device == "cuda" and "graphs" in parts else None
        self.clock = defaultdict(float)

    def used_parts(self):
        return self.used

    def forward_backward(self, inputs):
        with torch.autocast(self.device, torch.bfloat16):
            output = self.model(**inputs, num_targets=float(len(inputs["index"])))
        with self.part("backward"):
            output.loss.backward()
        return (output.loss.detach(),)

    def extra_bytes(self):
        with self.without_graphs():  # graphs keep their memory between steps
            return super().extra_bytes()

    def flops(self):
        with self.without_graphs():  # operations inside graphs are not counted
            return super().flops()

    @contextmanager
    def without_graphs(self):
        graphs, self.graphs = self.graphs, None
        yield
        self.graphs = graphs

    def step(self):
        (self.graphs or self.forward_backward)(self.batch)
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
        """Seconds of each part of a step; only valid on the CPU, where calls are synchronous."""

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


CONVOLUTIONS = "[(512, 10, 5)] + [(512, 3, 2)] * 4 + [(512, 2, 2)] * 2"
RELEASED = {
    "vision": dict(input_size=224, patch_size=16, embed_dim=768, prenet_depth=2),
    "audio": dict(feature_encoder_spec=CONVOLUTIONS, conv_pos_width=95, conv_pos_groups=16, num_alibi_heads=12),
    "text": dict(max_source_positions=512),
}


class Released(Variant):
    """The step of the released data2vec 2.0 code, as transcribed in the tests, without dropout."""

    def __init__(self, case, device, precision):
        super().__init__(case, device)
        torch.backends.cuda.matmul.allow_tf32 = True
        self.name = "image" if case.modality == "vision" else case.modality
        d = case.decoder
        decoder = dict(decoder_dim=d["width"], decoder_groups=d["groups"], decoder_kernel=d["kernel"])
        decoder["decoder_layers"] = d["layers"]
        changed = RELEASED[case.modality] | dict(decoder=decoder)
        depth = 12 - changed.get("prenet_depth", 0)
        shape = dict(embed_dim=768, num_heads=12, mlp_ratio=4, depth=depth, average_top_k_layers=case.targets.top_k)
        released.VOCABULARY = 50_265
        self.student = released.make(self.name, changed, **shape).to(device).train()
        self.teacher = copy.deepcopy(self.student).requires_grad_(False)
        self.optimizer = torch.optim.Adam([p for p in self.student.parameters() if p.requires_grad], lr=1e-4)
        self.dtype = torch.bfloat16 if precision == "bf16" else None
        self.batch = case.batch_of(build_encoder(case.model), device)

    def step(self):
        source, mask = self.batch["source"], self.batch["mask"]
        with torch.autocast(self.device, self.dtype or torch.bfloat16, enabled=self.dtype is not None):
            features = self.student.encoder.local_features(source)
            with torch.no_grad():
                local = features.detach() if self.name != "image" else self.teacher.encoder.local_features(source)
                _, results = self.teacher.run_blocks(self.teacher.encoder.contextualize(local))
                targets = self.student.targets([result.float() for result in results])
            context = self.student.encoder.contextualize(features, mask)
            states, _ = self.student.run_blocks(context)
            hidden = mask.shape[-1] - self.batch["visible"].shape[1]
            noise = 0.01 * torch.randn(len(states), hidden, states.shape[-1], device=self.device)
            predictions = self.student.encoder.decode(states, context.restore, noise)
            losses = self.student.losses(states.float(), predictions.float(), targets, mask)
        loss = losses["regression"] + losses.get("cls", 0.0)
        loss.backward()
        parameters = [p for p in self.student.parameters() if p.grad is not None]
        torch._foreach_mul_([p.grad for p in parameters], 1 / losses["sample_size"])
        nn.utils.clip_grad_norm_(parameters, 4.0)
        self.optimizer.step()
        self.optimizer.zero_grad()
        with torch.no_grad():
            teacher = dict(self.teacher.named_parameters())
            for name, value in self.student.named_parameters():
                if not released.shared(name, self.name):
                    teacher[name].mul_(DECAY).add_(value, alpha=1 - DECAY)


ALL = (*PARTS, "graphs")  # what --fused does on a single GPU


def variants_of(case):
    return {"today": (Today, case), "an hour's work": (Ours, case, ()), "fused": (Ours, case, ALL)}


def variants_2_of(case, baseline, device):
    """Steps of data2vec 2.0, and of 1.0 on the longest case of the modality or of the released formulation."""
    first = next(each.on(device) for each in reversed(STEP_CASES) if each.modality == case.modality)
    others = {
        "1.0": {"1.0 today": (Today, first), "1.0 fused": (Ours, first, ALL)},
        "released": {f"2.0 as released, {precision}": (Released, case, precision) for precision in ("fp32", "bf16")},
    }
    return others[baseline] | {"fused": (Ours, case, ALL)}


@contextmanager
def turns(variants, device, seconds):
    """Yield the variants, each in its own process, and the median seconds of their steps, measured in turns.

    Args:
        variants: By name: class, case and further arguments of the class.
        device: Where they run.
        seconds: A tenth of the time to measure for.
    """
    gc.collect()
    running = {name: Worker(made, case, device, *rest) for name, (made, case, *rest) in variants.items()}
    try:
        for _ in range(2):  # the first steps create the optimizer state and fill the allocator
            for variant in running.values():
                variant("seconds")
        times = {name: [] for name in running}
        end = time.monotonic() + 10 * seconds
        while min(map(len, times.values())) < 3 or time.monotonic() < end:
            for name, variant in running.items():
                times[name].append(variant("seconds"))
        yield running, {name: statistics.median(values) for name, values in times.items()}
    finally:  # else they would keep the memory that the next case needs
        for variant in running.values():
            variant.close()


@pytest.mark.parametrize("case", STEP_CASES, ids=lambda case: case.name)
def test_step(case, device, seconds, benchmark):
    case = case.on(device)
    with turns(variants_of(case), device, seconds) as (variants, times):
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


@pytest.mark.parametrize("baseline", ["1.0", "released"])
@pytest.mark.parametrize("case", STEP_CASES_2, ids=lambda case: case.name)
def test_step_2(case, baseline, device, seconds, benchmark):
    with turns(variants_2_of(case.on(device), baseline, device), device, seconds) as (variants, times):
        benchmark.extra_info.update(
            case=case.on(device).name,
            targets={name: variant("targets") for name, variant in variants.items()},
            seconds=times,
            extra_bytes={name: variant("extra_bytes") for name, variant in variants.items()},
            flops={name: variant("flops") for name, variant in variants.items()},
            matmul_rate=matmul_rate(device, torch.bfloat16),
            parts={"fused": variants["fused"]("parts")} if device == "cpu" else {},
        )
        benchmark.pedantic(variants["fused"], args=("seconds",), rounds=2)


@pytest.mark.parametrize("case", [*STEP_CASES, *STEP_CASES_2], ids=lambda case: case.name)
def test_parts(case, device, seconds, benchmark):
    """Effect of each part of --fused that applies here: the full step compared with a step without that part."""
    case = case.on(device)
    whole = Worker(Ours, case, device, ALL)
    used, parts = whole("used_parts"), ALL
    whole.close()
    if device == "cuda":
        used, parts = [*used, "one pass"], (*ALL, "one pass")  # a setting, not a part of --fused
    pairs = {}  # two processes at a time: more of them need more memory than most machines have
    for part in used:
        pair = {"all": (Ours, case, parts), "without": (Ours, case, tuple(p for p in parts if p != part))}
        with turns(pair, device, seconds / 3) as (variants, times):
            pairs[part] = times
            if part == used[-1]:
                benchmark.pedantic(variants["all"], args=("seconds",), rounds=2)
    benchmark.extra_info.update(case=case.name, parts=pairs)


@pytest.mark.parametrize("case, features", SPLICED_CASES, ids=lambda each: getattr(each, "name", ""))
def test_splicing(case, features, device, seconds, benchmark):
    """The same model split by its family's encoder, and run whole with its features replaced."""
    case = case.on(device)
    ways = {"in pieces": (Ours, case, ()), "whole": (Ours, case, (), features)}
    with turns(ways, device, 5 * seconds) as (variants, times):  # a few percent need more than three turns
        benchmark.extra_info.update(case=case.name, seconds=times, overhead=times["whole"] / times["in pieces"] - 1)
        benchmark.pedantic(variants["whole"], args=("seconds",), rounds=2)


@pytest.mark.parametrize("axis", SWEEPS)
def test_sweep(axis, device, seconds, benchmark):
    """The fused step as one of its sizes grows."""
    times = {}
    for size, case in SWEEPS[axis].items():
        with turns({"fused": (Ours, case, ALL)}, device, seconds / 5) as (variants, found):
            times[size] = found["fused"]
            if size == max(SWEEPS[axis]):
                benchmark.pedantic(variants["fused"], args=("seconds",), rounds=2)
    benchmark.extra_info.update(axis=axis, seconds=times)
