"""A whole step at base size: (a) as it is taken today, (b) as a good engineer writes it in an hour, (c) ours with --fused."""

import copy
import gc
import time
from collections import defaultdict
from contextlib import contextmanager

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.cases import STEP_CASES
from benchmarks.measure import interleaved, peak_extra_bytes
from d2v_fast import Data2Vec, build_encoder
from d2v_fast import model as model_module
from d2v_fast.fused import fuse

DECAY = 0.9998


class Today:
    """Whole Hugging Face models in fp32, all hidden states and attentions asked for, Adam, EMA over state dicts."""

    def __init__(self, case, device):
        torch.manual_seed(0)
        encoder = build_encoder(case.model, attention="eager").to(device)
        self.case, self.student = case, encoder.model.train()
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

    def __call__(self):
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


class Step:
    """Our model in bf16 autocast with sdpa, fused AdamW and foreach EMA; `fused` adds what --fused puts into a model."""

    def __init__(self, case, device, fused):
        torch.manual_seed(0)
        config = dict(layerdrop=0.0) if case.modality == "audio" else {}
        encoder = build_encoder(case.model, config=config)
        self.case, self.device = case, device
        settings = dict(impl="eager", **case.settings) if not fused else case.settings
        self.model = Data2Vec(encoder, **settings).to(device).train()
        if fused:
            fuse(self.model, torch.device(device))
        parameters = [p for p in self.model.parameters() if p.requires_grad]
        self.optimizer = torch.optim.AdamW(parameters, lr=1e-4, fused=True)
        self.batch = case.batch_of(encoder, device)

    def __call__(self):
        with torch.autocast(self.device, torch.bfloat16):
            output = self.model(**self.batch, num_targets=float(len(self.batch["index"])))
        with timed_part("backward"):
            output.loss.backward()
        with timed_part("optimizer"):
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        with timed_part("EMA"):
            self.model.update_teacher()


@pytest.mark.parametrize("case", STEP_CASES, ids=lambda case: case.name)
def test_step(case, device, seconds, benchmark, monkeypatch):
    gc.collect()
    variants = {
        "today": Today(case, device),
        "an hour's work": Step(case, device, fused=False),
        "fused": Step(case, device, fused=True),
    }
    times = interleaved(variants, device, seconds, calls=1)
    memory = {name: peak_extra_bytes(call, device) for name, call in variants.items()}
    parts = {name: breakdown(variants[name], monkeypatch) for name in ("an hour's work", "fused")} if device == "cpu" else {}
    benchmark.extra_info.update(
        case=case.name,
        targets=len(variants["fused"].batch["index"]),
        samples=case.batch,
        seconds=times,
        extra_bytes=memory,
        parts=parts,
    )
    benchmark.pedantic(variants["fused"], rounds=2)


_clock: dict[str, float] = defaultdict(float)


@contextmanager
def timed_part(name):
    start = time.perf_counter()
    yield
    _clock[name] += time.perf_counter() - start


def breakdown(step, monkeypatch, rounds=3):
    """Seconds of each part of a step on the CPU, where nothing runs behind the caller's back."""

    def watch(owner, method, name):
        inner = getattr(owner, method)

        def call(*args, **kwargs):
            with timed_part(name):
                return inner(*args, **kwargs)

        monkeypatch.setattr(owner, method, call, raising=True)

    model = step.model
    watch(model.student, "embed", "embed")
    watch(model, "teacher_layers", "teacher")
    watch(model.student, "contextualize", "student")
    watch(model.head, "forward", "head")
    watch(model_module, "data2vec_loss", "loss")
    _clock.clear()
    with timed_part("step"):
        for _ in range(rounds):
            step()
    monkeypatch.undo()
    return {name: seconds / rounds for name, seconds in _clock.items()}
