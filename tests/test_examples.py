"""Each example runs, learns, and matches a computation in plain torch."""

import importlib.util
import json
import re
import runpy
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from d2v_fast import Data2VecLoss, EMATeacher
from d2v_fast.encoders import Encoder

EXAMPLES = Path(__file__).parents[1] / "examples"


def load(path):
    spec = importlib.util.spec_from_file_location(f"example_{path.stem}", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


class Calls(list):
    """Records arguments and results of the loss, and the gradient that reached the predictions."""

    def __init__(self):
        self.update = None
        self.seen = []  # inputs of the teacher


@pytest.fixture
def calls(monkeypatch, tmp_path):
    calls, forward, teacher, update = Calls(), Data2VecLoss.forward, EMATeacher.forward, EMATeacher.update

    def spied_forward(self, predictions, teacher_layers, mask, padding_mask=None):
        result = forward(self, predictions, teacher_layers, mask, padding_mask)
        layers = [layer.detach().cpu().clone() for layer in teacher_layers]
        call = dict(predictions=predictions.detach().cpu().clone(), layers=layers, mask=mask.cpu(), loss=result[0].item())
        call["padding_mask"] = padding_mask if padding_mask is None else padding_mask.cpu()
        calls.append(call)
        if predictions.requires_grad:
            predictions.register_hook(lambda gradient: call.update(gradient=gradient.cpu()))
        return result

    def spied_teacher(self, *inputs):
        calls.seen.append(inputs)
        return teacher(self, *inputs)

    def spied_update(self, student, skip=None, pairs=None):
        before = [p.clone() for p in self.module.parameters()]
        update(self, student, skip, pairs)
        if calls.update is None:
            calls.update = [
                (old.lerp(theirs.detach(), 1 - self.start), new.clone(), old)
                for old, new, theirs in zip(before, self.module.parameters(), student.parameters(), strict=True)
            ]

    monkeypatch.setattr(Data2VecLoss, "forward", spied_forward)
    monkeypatch.setattr(EMATeacher, "forward", spied_teacher)
    monkeypatch.setattr(EMATeacher, "update", spied_update)
    monkeypatch.chdir(tmp_path)
    return calls


def check(call, expected_loss, weight):
    """Compare a call with `expected_loss`; `weight` is the factor of the loss in what was differentiated."""
    predictions = call["predictions"].requires_grad_()
    expected = expected_loss(predictions)
    (gradient,) = torch.autograd.grad(expected * weight, predictions)
    assert gradient.norm() > 0
    assert call["loss"] == pytest.approx(expected.item(), rel=1e-5)
    torch.testing.assert_close(call["gradient"], gradient, rtol=1e-5, atol=1e-5 * gradient.abs().max().item())


def check_teacher(calls):
    moved = 0
    for expected, new, old in calls.update:
        # The decay anneals from the first step on, so that it is not quite `start`.
        torch.testing.assert_close(new, expected, rtol=1e-3, atol=1e-4)
        moved += not torch.equal(new, old)
    assert moved > len(calls.update) / 2


def test_bare_loop(calls):
    history = load(EXAMPLES / "bare_loop.py").main(steps=60)
    call = calls[0]
    channels = call["predictions"].shape[1]
    rows = []
    for b, (mask, padding) in enumerate(zip(call["mask"], call["padding_mask"], strict=True)):
        used = int((~padding).sum())
        layers = [F.instance_norm(layer[:used, b].T.unsqueeze(0)).squeeze(0).T for layer in call["layers"]]
        rows.append((sum(layers) / len(layers))[mask[:used]])
    assert call["padding_mask"].any() and len(call["layers"]) == 3
    assert all(len(inputs) == 2 for inputs in calls.seen)  # no mask for the teacher
    check(call, lambda p: (p - torch.cat(rows)).pow(2).sum(1).mean() / channels**0.5, 1)
    check_teacher(calls)
    loss, std = history[-1]
    assert loss < 0.75 * channels**0.5 * std**2  # the loss of a constant prediction, and of rows in another order
    assert std > 0.5


def test_hf_trainer(calls):
    example = load(EXAMPLES / "hf_trainer.py")
    trainer = example.main(steps=60)
    scored = sum(int(call["mask"].sum()) for call in calls[:2])
    losses = []
    for call in calls[:2]:
        layers = [F.layer_norm(layer, layer.shape[-1:]) for layer in call["layers"]]
        target = (sum(layers) / len(layers))[call["mask"]]
        check(call, lambda p, y=target: (p - y).pow(2).sum() / p.shape[1] ** 0.5, 1 / scored)
        losses.append(call["loss"])
    check_teacher(calls)
    assert not any((ids == example.MASK).any() for ids, _ in calls.seen)
    first, *_, last, _ = trainer.state.log_history
    assert first["loss"] == pytest.approx(sum(losses) / scored, rel=1e-3)
    assert last["loss"] < 0.75 * example.C**0.5 * last["target_std"] ** 2
    assert trainer.model.teacher.step == 60
    assert not trainer.evaluate(example.make_samples(8))["eval_loss"] > first["loss"]


def test_accumulation_in_the_trainer_changes_nothing(calls):
    """Micro-batches with different numbers of masked positions give the gradient of their union."""
    example = load(EXAMPLES / "hf_trainer.py")
    whole, parts = (example.main(2, *sizes).state.log_history[0] for sizes in ((8, 1), (2, 4)))
    assert len({int(call["mask"].sum()) for call in calls[2:6]}) > 1
    for name in ("loss", "grad_norm"):
        assert parts[name] == pytest.approx(whole[name], rel=1e-4)


def test_three_loops_train_alike(calls, monkeypatch):
    """Plain PyTorch, Trainer and Lightning: with one seed, equal losses and one teacher update per step."""
    monkeypatch.syspath_prepend(EXAMPLES)
    losses = {}
    for name in ("plain_loop", "trainer_loop", "lightning_loop"):
        calls.update = None
        losses[name] = importlib.import_module(name).main(steps=30)
        check_teacher(calls)
    for name in ("trainer_loop", "lightning_loop"):
        assert losses[name] == pytest.approx(losses["plain_loop"], rel=1e-6)
    assert len(losses["plain_loop"]) == 30 and losses["plain_loop"][-1] < 0.5 * losses["plain_loop"][0]


def test_plain_loop_of_2(calls, monkeypatch):
    """It beats a constant prediction, its teacher moves, and masked words are not encoded."""
    monkeypatch.syspath_prepend(EXAMPLES)
    example, lengths = importlib.import_module("plain_loop_2"), []
    transform = Encoder.transform

    def spied(self, x, *args, **kwargs):
        lengths.append(tuple(x.shape[:2]))
        return transform(self, x, *args, **kwargs)

    monkeypatch.setattr(Encoder, "transform", spied)
    history = example.main(steps=80)
    check_teacher(calls)
    visible = example.LENGTH - example.MASKED
    assert set(lengths[1:]) == {(example.BATCH, example.LENGTH), (example.BATCH * example.VIEWS, visible)}  # wrap tries it once
    loss, std = history[-1]
    assert loss < 0.9 * 64**0.5 * std**2 and std > 0.2
    expected = [loss for loss, _ in example.main(steps=10)]
    for name in ("trainer_loop", "lightning_loop"):  # they draw other noise
        other = importlib.import_module(name)
        for part in ("make_model", "make_samples"):
            monkeypatch.setattr(other, part, getattr(example, part))
        assert other.main(steps=10) == pytest.approx(expected, rel=0.03)


FINE_TUNING = {"finetune_text": "text", "finetune_images": "vision", "finetune_speech": "audio", "finetune_ctc": "audio"}


@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_starts_from_the_run(name, runs, monkeypatch, tmp_path):
    """Training from scratch starts from other weights; in both cases weights change."""
    from transformers import Trainer

    from d2v_fast.export import export_run

    monkeypatch.chdir(tmp_path)
    export_run(runs[FINE_TUNING[name]].folder, "encoder")
    expected = dict(runs[FINE_TUNING[name]].trainer.state.core.student.model.named_parameters())
    same, train = [], Trainer.train

    def spied(self):
        begin = {k: p.detach().clone() for k, p in self.model.base_model.named_parameters()}
        found = [torch.equal(p, expected[k]) for k, p in begin.items() if k in expected and p.std() > 0]
        same.append(sum(found) / len(found))
        train(self)
        moved = [not torch.equal(p, begin[k]) for k, p in self.model.base_model.named_parameters() if k in expected]
        assert sum(moved) / len(moved) > 0.5  # with CTC the convolutions are frozen

    monkeypatch.setattr(Trainer, "train", spied)
    found = load(EXAMPLES / f"{name}.py").main("encoder", count=64, epochs=1)  # at the first step the learning rate is 0
    scratch, pretrained = same
    assert scratch < 0.5 and pretrained > 0.95
    assert all(0 <= value <= 1 for value in found.values()) and list(found) == ["scratch", "pretrained"]
    assert len((EXAMPLES / f"{name}.py").read_text().splitlines()) < 60


@pytest.mark.slow
@pytest.mark.parametrize("name", FINE_TUNING)
def test_fine_tuning_beats_scratch(name, tmp_path, monkeypatch):
    from d2v_fast.config import parse
    from d2v_fast.export import export_run
    from d2v_fast.train import train

    monkeypatch.chdir(tmp_path)
    config, _ = parse(["--config", f"{FINE_TUNING[name]}/tiny", "train.output=run"])
    train(config)
    export_run("run", "encoder")
    found = load(EXAMPLES / f"{name}.py").main("encoder")
    assert found["pretrained"] > found["scratch"] + 0.03


@pytest.mark.parametrize("name", FINE_TUNING)
def test_without_an_argument_it_says_how(name, monkeypatch):
    monkeypatch.setattr(sys, "argv", [f"{name}.py"])
    with pytest.raises(SystemExit, match=f"python examples/{name}.py"):
        runpy.run_path(EXAMPLES / f"{name}.py", run_name="__main__")


def test_ijepa(calls):
    example = load(EXAMPLES / "ijepa.py")
    history = example.main(steps=60)
    weight = 1 / example.BLOCKS
    for call in calls[: example.BLOCKS] + calls[-example.BLOCKS :]:  # at first h is normalised already: an untrained LayerNorm
        (h,) = call["layers"]
        target = F.layer_norm(h, (example.C,))[call["mask"]]
        check(call, lambda p, y=target: F.smooth_l1_loss(p, y), weight)
    check_teacher(calls)
    assert history[0][0] == pytest.approx(sum(call["loss"] for call in calls[: example.BLOCKS]) * weight, rel=1e-5)
    loss, std = history[-1]
    assert loss < 0.5 * history[0][0] and std > 0.5


def test_hf_kernel():
    folder = EXAMPLES / "hf_kernel"
    if importlib.util.find_spec("kernels") and importlib.util.find_spec("kernels.load"):  # not our own folder kernels/
        kernel = importlib.import_module("kernels.load").get_local_kernel(folder)
    else:
        kernel = load(folder / "torch-universal" / "__init__.py")
    predictions, layer, mask = torch.randn(2, 5, 8), torch.randn(2, 5, 8), torch.rand(2, 5) < 0.5
    expected = (predictions - F.layer_norm(layer, (8,)))[mask].pow(2).sum() / 8**0.5
    torch.testing.assert_close(kernel.data2vec_loss(predictions, [layer], mask, reduction="sum"), expected)


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_runs(path, tmp_path, monkeypatch):
    """Every cell, in a kernel of this Python."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.setenv("PYTHONPATH", str(EXAMPLES.parent))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": tmp_path}}).execute()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_is_committed_without_outputs(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        assert not cell.get("outputs") and cell.get("execution_count") is None
        if cell["cell_type"] == "markdown":
            for link in re.findall(r"\]\(([^)#]+)", "".join(cell["source"])):
                assert (EXAMPLES / link).exists(), link
