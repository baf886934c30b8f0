"""LAMB compared with the paper, and apex's FusedLAMB with the same state and checkpoints."""

import importlib
import sys
from types import SimpleNamespace

import pytest
import torch

from d2v_fast.checkpoint import Checkpoint
from d2v_fast.config import ConfigError, OptimizerConfig, parse
from d2v_fast.diagnostics import environment
from d2v_fast.train import optim
from d2v_fast.train.build import build
from d2v_fast.train.loop import loop
from d2v_fast.train.optim import Lamb, apex_obstacle, make_optimizer
from tests.test_training import arguments

LAMB = OptimizerConfig(kind="lamb", lr=0.02, betas=(0.6, 0.7), eps=1e-2, weight_decay=0.3)


def reference(w, grads, lr, decay, betas=(0.6, 0.7), eps=1e-2):
    """Algorithm 2 of You et al. 2019 for one tensor, with φ the identity; without decay there is no trust ratio."""
    m = v = torch.zeros_like(w)
    for t, g in enumerate(grads, 1):
        m, v = betas[0] * m + (1 - betas[0]) * g, betas[1] * v + (1 - betas[1]) * g**2
        r = m / (1 - betas[0] ** t) / ((v / (1 - betas[1] ** t)).sqrt() + eps) + decay * w
        ratio = w.norm() / r.norm() if decay and w.norm() > 0 else 1.0
        w = w - lr * ratio * r
    return w


def layers():
    """A matrix, a matrix of zeros, a bias."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict({"a": torch.nn.Linear(5, 4), "b": torch.nn.Linear(3, 2, bias=False)}).double()
    torch.nn.init.zeros_(model["b"].weight)
    return model


@pytest.mark.parametrize("scale", [1, 1e-3])
@pytest.mark.parametrize("decay_1d", [False, True])
def test_lamb_is_that_of_the_paper(decay_1d, scale):
    """Also if the norms of weights and updates are far below 1."""
    model = layers()
    for p in model.parameters():
        p.data.mul_(scale)
    settings = OptimizerConfig(**vars(LAMB) | {"decay_1d": decay_1d, "lr_scale": {"a.*": 0.5}})
    optimizer = make_optimizer(model, settings)
    assert type(optimizer) is Lamb
    parameters = dict(model.named_parameters())
    before = {name: p.detach().clone() for name, p in parameters.items()}
    grads = {name: [scale * torch.randn_like(p) for _ in range(4)] for name, p in parameters.items()}
    for step in range(4):
        for name, p in parameters.items():
            p.grad = grads[name][step]
        optimizer.step()
    for name, p in parameters.items():
        decay = 0.3 if p.ndim == 2 or decay_1d else 0.0
        expected = reference(before[name], grads[name], 0.01 if name.startswith("a") else 0.02, decay)
        assert torch.allclose(p, expected, rtol=1e-12, atol=0), name


def test_lamb_leaves_parameters_without_gradient_alone():
    model = layers()
    optimizer = make_optimizer(model, LAMB)
    model["a"].weight.grad = torch.ones(4, 5, dtype=torch.float64)
    before = model["a"].bias.clone()
    optimizer.step()
    assert torch.equal(model["a"].bias, before) and set(optimizer.state) == {model["a"].weight}


def test_lamb_evaluates_a_closure():
    """With gradients, as torch's optimizers do."""
    model = layers()
    optimizer = make_optimizer(model, LAMB)

    def closure():
        loss = model["a"](torch.ones(5, dtype=torch.float64)).square().sum()
        loss.backward()
        return loss

    before = model["a"].weight.detach().clone()
    expected = model["a"](torch.ones(5, dtype=torch.float64)).square().sum()
    assert torch.equal(optimizer.step(closure), expected) and not torch.equal(model["a"].weight, before)


APEX = '''
import torch

class FusedLAMB(torch.optim.Optimizer):
    """Arguments, state and methods as in apex; steps are counted in the group, and gradients are overwritten."""

    def __init__(self, params, lr=1e-3, bias_correction=True, betas=(0.9, 0.999), eps=1e-6, weight_decay=0.01, amsgrad=False,
                 adam_w_mode=True, grad_averaging=True, set_grad_none=True, max_grad_norm=1.0, use_nvlamb=False):
        defaults = dict(lr=lr, bias_correction=bias_correction, betas=betas, eps=eps, weight_decay=weight_decay,
                        grad_averaging=grad_averaging, max_grad_norm=max_grad_norm)
        super().__init__(params, defaults)
        assert bias_correction and adam_w_mode and grad_averaging and not use_nvlamb

    def zero_grad(self):
        for group in self.param_groups:
            for p in group["params"]:
                p.grad = None

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        grads = [p.grad for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([g.norm() for g in grads]).norm()
        clip = max(1.0, float(norm / self.defaults["max_grad_norm"]))
        for group in self.param_groups:
            group["step"] = group.get("step", 0) + 1
            (one, two), number = group["betas"], group["step"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state = self.state[p]
                if len(state) == 0:
                    state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(p), torch.zeros_like(p)
                g, m, v = p.grad, state["exp_avg"], state["exp_avg_sq"]
                g /= clip
                m.mul_(one).add_(g * (1 - one))
                v.mul_(two).add_(g * g * (1 - two))
                g.copy_(m / (1 - one**number) / ((v / (1 - two**number)).sqrt() + group["eps"]) + group["weight_decay"] * p)
                scaled = group["weight_decay"] and p.norm() and g.norm()
                p -= group["lr"] * (p.norm() / g.norm() if scaled else 1.0) * g
'''


@pytest.fixture
def apex(tmp_path, monkeypatch):
    """A stand-in for NVIDIA apex, used as on a GPU."""
    folder = tmp_path / "site" / "apex"
    (folder / "optimizers").mkdir(parents=True)
    (folder / "__init__.py").touch()
    (folder / "optimizers" / "__init__.py").write_text(APEX)
    (tmp_path / "site" / "amp_C.py").touch()
    monkeypatch.syspath_prepend(tmp_path / "site")
    monkeypatch.setattr(optim, "_on_gpu", lambda model: True)
    importlib.invalidate_caches()
    yield SimpleNamespace(folder=folder)
    for name in ("apex", "apex.optimizers", "amp_C"):
        sys.modules.pop(name, None)


def test_apex_is_taken_on_a_gpu_and_computes_the_same(apex, monkeypatch):
    ours, theirs = layers(), layers()
    monkeypatch.setattr(optim, "_on_gpu", lambda model: model is theirs)
    optimizers = [make_optimizer(ours, LAMB), make_optimizer(theirs, LAMB)]
    assert type(optimizers[0]) is Lamb and isinstance(optimizers[1], sys.modules["apex.optimizers"].FusedLAMB)
    for _ in range(3):
        for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
            p.grad = 100 * torch.randn_like(p)  # far above apex's default clipping
            q.grad = p.grad.clone()
        for optimizer in optimizers:
            optimizer.step()
    for p, q in zip(ours.parameters(), theirs.parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-12)
        a, b = optimizers[0].state[p], optimizers[1].state[q]
        assert a.keys() == b.keys() and all(a[key].dtype == b[key].dtype and torch.allclose(a[key], b[key]) for key in a)
    optimizers[1].zero_grad(set_to_none=True)
    assert all(q.grad is None for q in theirs.parameters())


def run(folder, *more, stop=None):
    """A run of four steps, or up to step `stop`, or the rest of it."""
    args = ["--resume", str(folder)] if folder.exists() else arguments("vision", folder, "optimizer.kind=lamb", *more)
    trainer = build(parse(args)[0])
    if stop:
        trainer.steps = stop
    loop(trainer)
    trainer.checkpoints.wait()
    return Checkpoint(folder / "checkpoints" / f"step-{stop or 4}")


def test_a_lamb_run_resumes_bit_exactly(tmp_path):
    whole = run(tmp_path / "whole", "train.clip_norm=0.1")
    run(tmp_path / "parts", "train.clip_norm=0.1", stop=2)
    rest = run(tmp_path / "parts")
    for name in ("student", "teacher", "optimizer"):
        assert whole.files[f"{name}.safetensors"] == rest.files[f"{name}.safetensors"], name
    assert all(float(x) == 4 for name, x in rest.tensors("optimizer").items() if name.endswith(".step"))


@pytest.mark.parametrize("first, then", [(True, False), (False, True), (True, True)])
def test_a_run_resumes_with_or_without_apex(first, then, apex, tmp_path, monkeypatch):
    whole = run(tmp_path / "whole")
    for number, used in enumerate((first, then)):
        monkeypatch.setattr(optim, "_on_gpu", lambda model, used=used: used)
        found = run(tmp_path / "parts", stop=None if number else 2)
    expected, tensors = whole.tensors("student"), found.tensors("student")
    for name, x in expected.items():
        assert torch.allclose(x, tensors[name], rtol=1e-4, atol=1e-6), name
    a, b = whole.tensors("optimizer"), found.tensors("optimizer")
    assert {name: x.shape for name, x in a.items()} == {name: x.shape for name, x in b.items()}
    assert all(float(x) == 4 for name, x in b.items() if name.endswith(".step"))


def test_the_apex_of_pypi_is_never_imported(apex, caplog):
    (apex.folder / "optimizers" / "__init__.py").unlink()
    (apex.folder / "optimizers").rmdir()
    (apex.folder / "__init__.py").write_text("raise AssertionError('imported')")
    importlib.invalidate_caches()
    caplog.set_level("INFO")
    assert type(make_optimizer(layers(), LAMB)) is Lamb
    assert "apex is not NVIDIA's: pip uninstall apex" in caplog.text
    found = environment()
    assert found["lamb on cuda"] == "torch's operations: apex is not NVIDIA's: pip uninstall apex"
    assert any("is not NVIDIA's" in warning for warning in found["warnings"])


def test_a_build_without_kernels_is_not_taken(apex):
    assert apex_obstacle() == ""
    for name in ("apex", "apex.optimizers", "amp_C"):
        sys.modules.pop(name, None)
    (apex.folder.parent / "amp_C.py").write_text("raise ImportError('undefined symbol')")
    assert apex_obstacle() == "apex cannot be imported: undefined symbol"
    (apex.folder / "optimizers" / "__init__.py").write_text("raise ImportError('too old')")
    importlib.invalidate_caches()
    for name in ("apex", "apex.optimizers", "amp_C"):
        sys.modules.pop(name, None)
    assert apex_obstacle() == "apex cannot be imported: too old"


@pytest.mark.parametrize(
    "more, message", [("optimizer.weight_decay=0", "not scaled"), ("train.shard=true", "all of its shards")]
)
def test_settings_that_lamb_cannot_have(more, message, tmp_path):
    with pytest.raises(ConfigError, match=message):
        parse(arguments("vision", tmp_path / "run", "optimizer.kind=lamb", more))


def test_adamw_is_the_default():
    assert type(make_optimizer(layers(), OptimizerConfig())) is torch.optim.AdamW
