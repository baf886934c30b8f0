"""The last block at the scored positions only: the same loss, gradient and targets, and no work on the other positions."""

import copy

import pytest
import torch
import transformers
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_fast import Data2Vec, build_encoder, wrap
from d2v_fast.encoders import blocks
from d2v_fast.ops.triton_loss import _uniform
from tests import models


def narrowed(encoder):
    assert encoder.halves is not None
    encoder.narrow = True
    return encoder


def at(encoder, features, rows, padding_mask=None):
    """States at rows of the flattened positions."""
    return encoder.transform(encoder.place(features, padding_mask), padding_mask, rows=rows).states


def both(name, padded=False, **settings):
    """Outputs and models, plain and narrowed, of one batch."""
    plain = Data2Vec(models.make(name), **models.arguments(top_k=2, impl="eager", **settings)).train()
    narrow = copy.deepcopy(plain)
    narrowed(narrow.student), narrowed(narrow.teacher.module)
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
        # The key bias has a gradient of only rounding: a constant added to all scores of a query changes nothing.
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


@pytest.mark.parametrize("name", models.CONFIGS)
@pytest.mark.parametrize("source", ["ffn", "block_output", "block_input"])
def test_the_triton_loss_copies_no_layer(name, source):
    """It needs layers with equal strides; with a CLS token, layers are views of results that include the token."""
    (_, _), (model, _) = both(name, source=source)
    x = models.inputs(name)
    rows = torch.arange(0, 2 * model.student.embed(x).shape[1], 3)
    layers = model.teacher_layers(x, None, None, rows)
    assert all(a is b for a, b in zip(_uniform(layers), layers, strict=True))


@pytest.mark.parametrize("name", ["roberta", "vit", "wav2vec2"])
def test_the_backward_of_the_rows_needs_no_sort(name):
    """The backward of indexing sorts on a GPU."""
    seen = set()

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            seen.add(str(function.overloadpacket))
            return function(*args, **(kwargs or {}))

    for _, output in both(name):
        with Seen():
            output.loss.backward()
    assert "aten.index_add" in seen and not any("index_put" in name for name in seen), seen


def test_what_runs_in_between_sees_all_positions():
    """Each call requests narrowing, so it does not affect a probe or an export in the middle of training."""
    _, (model, _) = both("beit")
    student, x = model.student.eval(), models.inputs("beit")
    assert torch.equal(student(x), models.make("beit").eval()(x)) and student(x).shape == (2, 16, 32)


def test_an_error_in_forward_restores_the_model(monkeypatch):
    """Otherwise the next call, by an export or a probe, would return only rows."""
    encoder = narrowed(models.make("roberta").eval())
    expected = encoder(x := models.inputs("roberta"))

    def fail(*args, **kwargs):
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(encoder.blocks[-1].attention, "forward", fail)
        with pytest.raises(RuntimeError, match="out of memory"):
            at(encoder, encoder.embed(x), torch.tensor([1, 5]))
    assert torch.equal(encoder(x), expected)


def test_a_layer_that_is_dropped_leaves_the_others_rows():
    encoder = narrowed(models.make("data2vec-audio"))
    features, rows = encoder.embed(models.inputs("data2vec-audio")), torch.tensor([1, 5, 20])
    encoder.model.config.layerdrop = 1.0
    encoder.train()
    expected = encoder.contextualize(features).flatten(0, 1)[rows]
    assert torch.equal(at(encoder, features, rows), expected)


@pytest.mark.parametrize("name", models.CONFIGS)
@pytest.mark.parametrize("way", ["checkpoint_wrapper", "gradient_checkpointing"])
def test_activation_checkpointing_changes_no_bit(name, way):
    """Blocks run again in the backward, where only their arguments are known."""
    _, (narrow, _) = both(name)
    again = copy.deepcopy(narrow)
    if way == "checkpoint_wrapper":
        for i, block in enumerate(again.student.blocks):
            again.student.blocks[i] = checkpoint_wrapper(block)
    else:
        again.student.model.gradient_checkpointing_enable({"use_reentrant": False})
    x = models.inputs(name)
    mask = torch.rand(2, narrow.student.embed(x).shape[1]) < 0.4
    outputs = []
    for model in (narrow, again):
        outputs.append(model(x, mask, x if name in models.TEXTS else None))
        outputs[-1].loss.backward()
    assert torch.equal(outputs[0].loss, outputs[1].loss)
    for (key, p), q in zip(narrow.named_parameters(), again.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), key
        assert p.grad is None or torch.equal(p.grad, q.grad), key


@pytest.mark.parametrize("name", ["roberta", "wavlm"])
def test_an_encoder_whose_layers_were_read_with_gradients_can_be_copied(name):
    """A forward leaves nothing on the modules; blocks of `wavlm` are read by hooks."""
    encoder = build_encoder(name, config=models.CONFIGS["wav2vec2" if name == "wavlm" else name])
    assert (encoder.halves is None) == (name == "wavlm")
    x = models.inputs("wav2vec2" if name == "wavlm" else name)
    before = {key: set(vars(module)) for key, module in encoder.named_modules()}
    placed = encoder.place(encoder.embed(x))
    _, layers, _ = encoder.transform(placed, layers=2, rows=torch.tensor([1, 5]))
    assert all(layer.requires_grad for layer in layers)
    copied = copy.deepcopy(encoder)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in copied.blocks.modules())
    if name == "roberta":
        assert {key: set(vars(module)) for key, module in encoder.named_modules()} == before


def test_stochastic_depth_is_left_to_whole_samples():
    encoder = narrowed(build_encoder("beit", config=models.CONFIGS["beit"] | dict(drop_path_rate=0.5)))
    features, rows = encoder.embed(models.inputs("beit")), torch.tensor([1, 5, 20])
    seen = []
    encoder._ffn(encoder.blocks[-1]).register_forward_hook(lambda m, args, out: seen.append(out.shape[:-1].numel()))
    for training in (True, False):
        encoder.train(training)
        torch.manual_seed(0)
        expected = encoder.contextualize(features).flatten(0, 1)[rows]
        torch.manual_seed(0)
        torch.testing.assert_close(at(encoder, features, rows), expected)
        assert seen[-1] == (34 if training else 3)


FAMILIES = {
    **{name: (name, models.CONFIGS[name]) for name in models.CONFIGS},
    **{
        name: (name, models.CONFIGS["roberta"] | dict(pad_token_id=1))
        for name in ("xlm-roberta", "camembert", "ernie", "roberta-prelayernorm")
    },
    "electra": ("electra", models.CONFIGS["roberta"] | dict(embedding_size=32)),
    **{name: (name, models.CONFIGS["wav2vec2"]) for name in ("unispeech", "unispeech-sat")},
    **{
        f"{name}, stable": (name, models.CONFIGS["wav2vec2"] | dict(do_stable_layer_norm=True))
        for name in ("wav2vec2", "hubert", "unispeech", "unispeech-sat")
    },
    "vit_msn": ("vit_msn", models.CONFIGS["vit"]),
    "beit, no layer scale": ("beit", models.CONFIGS["beit"] | dict(layer_scale_init_value=0.0)),
    "beit, stochastic depth": ("beit", models.CONFIGS["beit"] | dict(drop_path_rate=0.3)),
    "data2vec-vision, own positions": (
        "data2vec-vision",
        models.CONFIGS["data2vec-vision"] | dict(use_shared_relative_position_bias=False, use_relative_position_bias=True),
    ),
}


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("training", [False, True])
def test_halves_are_what_a_block_computes(family, training):
    """Bit-identical, including dropout, with random weights throughout; a hook set by hand captures the FFN."""
    name, config = FAMILIES[family]
    config = {
        key: 0.1 if "drop" in key and key not in ("layerdrop", "drop_path_rate") else value for key, value in config.items()
    }
    encoder = build_encoder(name, config=config).train(training)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.3)
    assert encoder.halves is not None
    image = name in (*models.IMAGES, "vit_msn")
    x = torch.randn(2, 17 if image else 12, 32)
    _, _, each = encoder._enter(x[:, 1:] if image else x, None)
    seen = []
    for block, arguments in zip(encoder.blocks, each, strict=True):
        encoder._ffn(block).register_forward_hook(lambda m, args, out: seen.append(out))
        torch.manual_seed(0)
        expected = blocks.first(block(x, **arguments))
        torch.manual_seed(0)
        output, ffn = encoder.halves(block, x, **arguments)
        assert torch.equal(output, expected) and torch.equal(ffn, seen[-1]) and not torch.equal(output, x)


@pytest.mark.parametrize(
    "model",
    [
        lambda: transformers.BeitModel(
            transformers.BeitConfig(**models.CONFIGS["beit"], use_relative_position_bias=True), add_pooling_layer=False
        ),
        lambda: transformers.Wav2Vec2Model(
            transformers.Wav2Vec2Config(**models.CONFIGS["wav2vec2"], do_stable_layer_norm=True, adapter_attn_dim=8)
        ),
        lambda: transformers.WavLMModel(transformers.WavLMConfig(**models.CONFIGS["wav2vec2"])),
        lambda: transformers.RoFormerModel(transformers.RoFormerConfig(**models.CONFIGS["roberta"], pad_token_id=1)),
    ],
    ids=["positions of their own", "adapters", "positions handed on", "rotary positions"],
)
def test_blocks_with_other_parts_run_as_the_model_runs_them(model):
    model = model().eval()
    encoder = wrap(model)
    assert encoder.halves is None
    x = models.inputs({"pixel_values": "beit", "input_values": "wav2vec2", "input_ids": "roberta"}[model.main_input_name])
    with torch.no_grad():
        states, layers, _ = encoder.transform(encoder.place(encoder.embed(x)), layers=2, source="block_output")
        whole = model(x).last_hidden_state
        torch.testing.assert_close(states, whole[:, -states.shape[1] :])
    assert len(layers) == 2 and layers[0].shape == states.shape
