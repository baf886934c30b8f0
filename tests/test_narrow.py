"""The last block at the scored positions alone: the same loss, gradient and targets, and no work on the other positions."""

import copy

import pytest
import torch
from torch import nn

from d2v_fast import Data2Vec, Encoder, build_encoder
from tests import models


def both(name, padded=False, **settings):
    """Outputs and models, plain and narrowed, of one batch."""
    plain = Data2Vec(models.make(name), top_k=2, impl="eager", **settings).train()
    narrow = copy.deepcopy(plain)
    assert narrow.student.narrow_last_block() and narrow.teacher.module.narrow_last_block()
    x = models.inputs(name)
    length = plain.student.embed(x).shape[1]
    mask = torch.rand(2, length) < 0.4
    batch = dict(source=x, mask=mask)
    if name in models.TEXTS:
        batch |= dict(source=x.masked_fill(mask, 3), target=x)
    if padded:
        padding = torch.zeros_like(mask)
        padding[1, -length // 4 :] = True
        batch |= dict(mask=mask & ~padding, padding_mask=padding)
    return (plain, plain(**batch)), (narrow, narrow(**batch))


def assert_equal(plain, narrow):
    (a, first), (b, second) = plain, narrow
    assert torch.allclose(first.loss, second.loss, rtol=1e-6)
    assert torch.allclose(first.stats.target.mean, second.stats.target.mean, atol=1e-6)
    first.loss.backward()
    second.loss.backward()
    for (name, p), q in zip(a.named_parameters(), b.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        # The bias of keys has no gradient but rounding: a constant added to all scores of a query changes nothing.
        if p.grad is not None and p.grad.norm() > 1e-5:
            assert (p.grad - q.grad).norm() < 1e-5 * p.grad.norm(), name


@pytest.mark.parametrize("name", models.CONFIGS)
@pytest.mark.parametrize("source", ["ffn", "block_output", "block_input"])
def test_loss_and_gradients_are_the_same(name, source):
    assert_equal(*both(name, source=source))


@pytest.mark.parametrize("name", ["roberta", "wav2vec2", "data2vec-audio"])
def test_with_padding_too(name):
    assert_equal(*both(name, padded=True))


@pytest.mark.parametrize("name", models.CONFIGS)
def test_the_ffn_sees_the_scored_rows_alone(name):
    _, (model, _) = both(name)
    rows = []
    for encoder in (model.student, model.teacher.module):
        encoder._ffn(encoder.blocks[-1]).register_forward_hook(lambda m, args, out: rows.append(out.shape[:-1].numel()))
    x = models.inputs(name)
    mask = torch.zeros(2, model.student.embed(x).shape[1], dtype=torch.bool)
    mask[0, 1] = mask[1, :2] = True
    model(x, mask, **({"target": x} if name in models.TEXTS else {}))
    assert rows == [3, 3]


def test_what_runs_in_between_sees_all_positions():
    """Narrowing is asked for by each call: a probe or an export in the middle of training is not touched by it."""
    _, (model, _) = both("beit")
    student, x = model.student.eval(), models.inputs("beit")
    assert torch.equal(student(x), models.make("beit").eval()(x)) and student(x).shape == (2, 16, 32)


def test_an_error_in_the_midst_leaves_it_whole(monkeypatch):
    """Else what runs next, an export or a probe, would get rows alone."""
    encoder = models.make("roberta").eval()
    expected = encoder(x := models.inputs("roberta"))
    assert encoder.narrow_last_block()

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(encoder.blocks[-1].attention, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            encoder.contextualize_at(encoder.embed(x), None, torch.tensor([1, 5]))
    assert torch.equal(encoder(x), expected)


def test_a_layer_that_is_dropped_leaves_the_others_rows():
    encoder = models.make("data2vec-audio")
    features, index = encoder.embed(models.inputs("data2vec-audio")), torch.tensor([1, 5, 20])
    assert encoder.narrow_last_block()
    encoder.model.config.layerdrop = 1.0
    encoder.train()
    expected = encoder.contextualize(features.clone()).flatten(0, 1)[index]
    assert torch.equal(encoder.contextualize_at(features.clone(), None, index), expected)


def test_a_block_that_is_checkpointed_runs_whole():
    encoder = models.make("roberta").train()
    features, index = encoder.embed(models.inputs("roberta")).detach().requires_grad_(), torch.tensor([1, 5, 20])
    assert encoder.narrow_last_block()
    encoder.model.gradient_checkpointing_enable()
    encoder.contextualize_at(features, None, index).sum().backward()
    assert encoder._rows is None and features.grad is not None


def test_stochastic_depth_is_left_to_whole_samples():
    encoder = build_encoder("beit", config=models.CONFIGS["beit"] | dict(drop_path_rate=0.5))
    assert encoder.narrow_last_block()
    features, index = encoder.embed(models.inputs("beit")), torch.tensor([1, 5, 20])
    for training in (True, False):
        encoder.train(training)
        torch.manual_seed(0)
        expected = encoder.contextualize(features).flatten(0, 1)[index]
        torch.manual_seed(0)
        torch.testing.assert_close(encoder.contextualize_at(features, None, index), expected)
        assert (encoder._rows is None) == training


class Mixing(models.Block):
    """A block whose FFN mixes positions, as that of a Conformer does."""

    def __init__(self, width):
        super().__init__(width)
        self.attention = self.mix
        self.mlp = nn.Sequential(nn.Linear(width, width), nn.Softmax(dim=1), nn.Linear(width, width))


def test_a_block_that_would_come_to_another_result_is_refused():
    model = models.Handwritten()
    model.blocks[-1] = Mixing(32)
    encoder = Encoder(model, layers="blocks", ffn="mlp.2")
    assert not encoder.narrow_last_block()
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in encoder.modules())
    assert not Encoder(models.Handwritten(), layers="blocks").narrow_last_block()  # has nothing called attention
