"""data2vec 2.0's own models compared with formulas in float64, and checked for the behaviour of transformers models."""

import math
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers import (
    AutoConfig,
    AutoModel,
    AutoModelForAudioClassification,
    AutoModelForCTC,
    AutoModelForImageClassification,
)

from d2v_fast import wrap
from d2v_fast.nets import (
    Data2Vec2AudioConfig,
    Data2Vec2AudioForCTC,
    Data2Vec2AudioForSequenceClassification,
    Data2Vec2AudioModel,
    Data2Vec2VisionConfig,
    Data2Vec2VisionForImageClassification,
    Data2Vec2VisionModel,
    register,
    save,
)
from d2v_fast.nets.audio import alibi_slopes
from tests.models import COMMON, IMAGE, WAVE

HEADS = {
    Data2Vec2VisionForImageClassification: AutoModelForImageClassification,
    Data2Vec2AudioForSequenceClassification: AutoModelForAudioClassification,
    Data2Vec2AudioForCTC: AutoModelForCTC,
}
MODELS = {Data2Vec2VisionModel: AutoModel, Data2Vec2AudioModel: AutoModel} | HEADS


def make(cls, **fields):
    """A tiny model with random weights throughout: initial zeros and ones would hide mistakes."""
    torch.manual_seed(1)
    if cls.config_class is Data2Vec2VisionConfig:
        config = Data2Vec2VisionConfig(**COMMON | IMAGE | fields)
    else:
        few = dict(conv_pos_kernel_size=5, num_conv_pos_embeddings=3, classifier_proj_size=8, vocab_size=7)
        config = Data2Vec2AudioConfig(**COMMON | WAVE | few | fields)
    model = cls(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def inputs(cls, batch=2):
    torch.manual_seed(2)
    return torch.randn(batch, 3, 16, 16) if cls.config_class is Data2Vec2VisionConfig else torch.randn(batch, 400)


# The formulas


def linear(module, x):
    return x @ module.weight.T + module.bias


def norm(x, eps, module=None):
    x = (x - x.mean(-1, keepdim=True)) / (x.var(-1, keepdim=True, unbiased=False) + eps).sqrt()
    return x if module is None else x * module.weight + module.bias


def gelu(x):
    return x * (1 + torch.erf(x / math.sqrt(2))) / 2


def post_norm_block(x, query, key, value, out, norm1, fc1, fc2, norm2, *, heads, eps, bias=0.0):
    """Method 4.2: a = x + Attn(x); h = LN1(a); out = LN2(h + MLP(h))."""
    q, k, v = (linear(m, x).unflatten(-1, (heads, -1)) for m in (query, key, value))
    logits = torch.einsum("bihd,bjhd->bhij", q, k) / math.sqrt(q.shape[-1]) + bias
    mixed = torch.einsum("bhij,bjhd->bihd", logits.exp() / logits.exp().sum(-1, keepdim=True), v).flatten(2)
    h = norm(x + linear(out, mixed), eps, norm1)
    return norm(h + linear(fc2, gelu(linear(fc1, h))), eps, norm2)


def sincos_by_hand(high, wide, channels):
    quarter = channels // 4
    rows = []
    for row in range(high):
        for column in range(wide):
            angles = [[place * 10_000 ** (-i / quarter) for i in range(quarter)] for place in (column, row)]
            rows.append([f(a) for axis in angles for f in (math.sin, math.cos) for a in axis])
    return torch.tensor(rows, dtype=torch.float64)


def image_states(model, pixels):
    embeddings, patch = model.embeddings, model.config.patch_size
    high, wide = (side // patch for side in pixels.shape[-2:])
    cut = pixels.unfold(2, patch, patch).unfold(3, patch, patch)  # (B, 3, high, wide, p, p)
    cut = cut.permute(0, 2, 3, 1, 4, 5).flatten(3).flatten(1, 2)
    projection = embeddings.patch_embeddings.projection
    x = cut @ projection.weight.flatten(1).T + projection.bias + sincos_by_hand(high, wide, model.config.hidden_size)
    x = torch.cat([embeddings.cls_token.expand(len(x), 1, -1), x], 1)
    x = norm(x, model.config.layer_norm_eps, embeddings.layernorm)
    for layer in model.encoder.layer:
        attention = layer.attention
        parts = (attention.self.query, attention.self.key, attention.self.value, attention.output.dense)
        parts += (attention.output.LayerNorm, layer.intermediate.dense, layer.output.dense, layer.output.LayerNorm)
        x = post_norm_block(x, *parts, heads=model.config.num_attention_heads, eps=model.config.layer_norm_eps)
    return x


def alibi_by_hand(slopes, scale, length):
    bias = torch.empty(1, len(slopes), length, length, dtype=torch.float64)
    for head, slope in enumerate(slopes):
        for i in range(length):
            for j in range(length):
                bias[0, head, i, j] = -max(float(scale[head]), 0) * slope * abs(i - j)
    return bias


def speech_states(model, wave, slopes):
    """States of one recording without padding."""
    config, encoder = model.config, model.encoder
    x = wave[None, None]
    for layer, stride in zip(model.feature_extractor.conv_layers, config.conv_stride, strict=True):
        x = F.conv1d(x, layer.conv.weight, stride=stride).transpose(1, 2)
        x = gelu(norm(x, 1e-5, layer.layer_norm)).transpose(1, 2)
    projection = model.feature_projection
    x = linear(projection.projection, norm(x.transpose(1, 2), config.layer_norm_eps, projection.layer_norm))
    placed = x.transpose(1, 2)
    for layer in encoder.pos_conv_embed.layers:
        conv, kernel = layer.conv, config.conv_pos_kernel_size
        placed = F.conv1d(placed, conv.weight, conv.bias, padding=kernel // 2, groups=config.num_conv_pos_embedding_groups)
        placed = placed if kernel % 2 else placed[..., :-1]
        placed = gelu(norm(placed.transpose(1, 2), 1e-5)).transpose(1, 2)
    x = norm(x + placed.transpose(1, 2), config.layer_norm_eps, encoder.layer_norm)
    for depth, layer in enumerate(encoder.layers):
        bias = 0.0
        if config.use_alibi:
            scale = encoder.alibi_scale[depth if config.alibi_per_layer else 0, 0, :, 0, 0]
            bias = alibi_by_hand(slopes, scale, x.shape[1])
        attention, ffn = layer.attention, layer.feed_forward
        parts = (attention.q_proj, attention.k_proj, attention.v_proj, attention.out_proj, layer.layer_norm)
        parts += (ffn.intermediate_dense, ffn.output_dense, layer.final_layer_norm)
        x = post_norm_block(x, *parts, heads=config.num_attention_heads, eps=config.layer_norm_eps, bias=bias)
    return x[0]


# Images


@torch.no_grad()
def test_image_states_are_those_of_the_formula():
    model = make(Data2Vec2VisionModel, image_size=(8, 16)).double()
    pixels = torch.randn(2, 3, 8, 16, dtype=torch.float64)
    torch.testing.assert_close(model(pixels).last_hidden_state, image_states(model, pixels), rtol=0, atol=2e-7)


def test_positions_are_sines_and_cosines_of_the_column_first():
    positions = make(Data2Vec2VisionModel, image_size=[8, 12]).embeddings.position_embeddings
    assert positions.shape == (1, 7, 32)
    assert not positions[0, 0].any()  # CLS
    torch.testing.assert_close(positions[0, 1:].double(), sincos_by_hand(2, 3, 32), rtol=0, atol=1e-7)
    # The second patch stands in column 1 of row 0: its first channel is sin 1, the first of its second half sin 0.
    assert positions[0, 2, 0].item() == pytest.approx(math.sin(1)) and positions[0, 2, 16] == 0


def test_positions_are_neither_trained_nor_saved_and_fit_the_size_that_is_asked_for(tmp_path):
    model = make(Data2Vec2VisionModel)
    names = {name for name, _ in model.named_parameters()}
    assert names == set(model.state_dict()) and not any("position" in name for name in names)
    model.save_pretrained(tmp_path)
    larger = AutoModel.from_pretrained(tmp_path, image_size=24, dtype=torch.bfloat16)
    expected = sincos_by_hand(6, 6, 32).to(torch.bfloat16)
    assert torch.equal(larger.embeddings.position_embeddings[0, 1:], expected)
    assert larger(torch.randn(1, 3, 24, 24)).last_hidden_state.shape == (1, 37, 32)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        (dict(image_size=18), "image_size=18: not a multiple of patch_size=4"),
        (dict(hidden_size=30), "hidden_size=30: sin-cos positions need a multiple of 4"),
        (dict(pooling="max"), "'pooling' expected one of .'mean', 'cls'"),
    ],
)
def test_image_settings_that_cannot_be(fields, message):
    with pytest.raises(Exception, match=message):
        make(Data2Vec2VisionModel, **fields)


def test_images_of_another_size_are_refused():
    with pytest.raises(ValueError, match="found images of 16×20, image_size is 16×16; resize them"):
        make(Data2Vec2VisionModel)(torch.randn(1, 3, 16, 20))


@torch.no_grad()
@pytest.mark.parametrize("pooling", ["mean", "cls"])
def test_image_classes_come_from_pooled_patches_or_cls(pooling):
    model = make(Data2Vec2VisionForImageClassification, pooling=pooling, num_labels=5).double()
    pixels, labels = inputs(type(model)).double(), torch.tensor([4, 0])
    states = image_states(model.data2vec2_vision, pixels)
    pooled = states[:, 0] if pooling == "cls" else states[:, 1:].mean(1)
    logits = linear(model.classifier, norm(pooled, 1e-6, model.norm))
    output = model(pixels, labels=labels)
    torch.testing.assert_close(output.logits, logits, rtol=0, atol=1e-6)
    loss = -(logits.log_softmax(-1)[[0, 1], labels]).mean()
    torch.testing.assert_close(output.loss, loss, rtol=0, atol=1e-6)


# Speech

R = 2**0.5


@pytest.mark.parametrize(
    ("heads", "slopes"),
    [
        (1, [2**-8]),
        (2, [2**-4, 2**-8]),
        (3, [2**-4, 2**-8, 2**-2]),
        (8, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256]),
        (12, [1 / 2, 1 / 4, 1 / 8, 1 / 16, 1 / 32, 1 / 64, 1 / 128, 1 / 256, 1 / R, 1 / R / 2, 1 / R / 4, 1 / R / 8]),
        (16, [1 / R, 1 / 2, 1 / R / 2, 1 / 4, 1 / R / 4, 1 / 8, 1 / R / 8, 1 / 16,
              1 / R / 16, 1 / 32, 1 / R / 32, 1 / 64, 1 / R / 64, 1 / 128, 1 / R / 128, 1 / 256]),
    ],
)  # fmt: skip
def test_slopes(heads, slopes):
    torch.testing.assert_close(alibi_slopes(heads), torch.tensor(slopes), rtol=1e-6, atol=0)


@torch.no_grad()
@pytest.mark.parametrize("per_layer", [False, True])
@pytest.mark.parametrize("kernel", [5, 4])
def test_speech_states_are_those_of_the_formula(per_layer, kernel):
    model = make(Data2Vec2AudioModel, num_attention_heads=4, alibi_per_layer=per_layer, conv_pos_kernel_size=kernel).double()
    scale = model.encoder.alibi_scale
    scale.copy_(torch.linspace(2, -0.5, scale.numel()).view_as(scale))  # a negative one counts as 0
    wave = inputs(Data2Vec2AudioModel, 1)[0].double()
    expected = speech_states(model, wave, [2**-2, 2**-4, 2**-6, 2**-8])
    torch.testing.assert_close(model(wave[None]).last_hidden_state[0], expected, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, dict(alibi_per_layer=True), dict(use_alibi=False)])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_padding_changes_nothing(fields, attention):
    model = make(Data2Vec2AudioModel, **fields).double()
    model.set_attn_implementation(attention)
    wave = inputs(Data2Vec2AudioModel, 3).double()
    lengths = [400, 251, 90]
    real = torch.arange(400) < torch.tensor(lengths)[:, None]
    padded = model(wave, attention_mask=real.long()).last_hidden_state
    for row, length in enumerate(lengths):
        alone = speech_states(model, wave[row, :length], [2**-4, 2**-8])
        assert len(alone) == model._get_feat_extract_output_lengths(length)
        torch.testing.assert_close(padded[row, : len(alone)], alone, rtol=0, atol=1e-10)


@torch.no_grad()
@pytest.mark.parametrize("per_layer", [False, True])
def test_alibi_of_some_frames_is_that_of_all_at_these(per_layer):
    encoder = make(Data2Vec2AudioModel, alibi_per_layer=per_layer).encoder
    x, padding = torch.randn(2, 9, 32), torch.arange(9) >= torch.tensor([[9], [6]])
    visible = torch.tensor([[7, 1, 2], [0, 8, 5]])
    whole = encoder.alibi(x, padding_mask=padding)
    some = encoder.alibi(x[:, :3], visible, padding.gather(1, visible))
    if not per_layer:
        whole, some = [whole], [some]
    assert len(whole) == len(some) == (3 if per_layer else 1)
    for bias, part in zip(whole, some, strict=True):
        assert part.shape == (2, 2, 3, 3)
        for row in range(2):
            assert torch.equal(part[row], bias[row][:, visible[row]][:, :, visible[row]])
    lowest = torch.finfo(torch.float32).min
    assert (some[0][1, :, :, 1] == lowest).all() and (some[0][:, :, :, [0, 2]] > -100).all()


def test_no_alibi_no_parameter():
    model = make(Data2Vec2AudioModel, use_alibi=False)
    assert not hasattr(model.encoder, "alibi_scale")
    assert model.encoder.alibi(torch.randn(2, 5, 32)) is None


def test_a_scale_that_is_not_learned_stays_so_when_loaded(tmp_path):
    make(Data2Vec2AudioModel, learned_alibi_scale=False).save_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path)
    assert not any("alibi" in name for name, _ in model.named_parameters())
    assert torch.equal(model.encoder.alibi_scale, torch.ones(1, 1, 2, 1, 1))
    model(inputs(Data2Vec2AudioModel)).last_hidden_state.sum().backward()


@pytest.mark.filterwarnings("ignore:.gradient_checkpointing_enable")
@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")  # transformers 5.17, without gradients
@pytest.mark.parametrize("checkpointing", [None, dict(use_reentrant=False), dict(use_reentrant=True)])
def test_the_gradient_of_each_heads_scale_is_that_of_differences(checkpointing):
    model = make(Data2Vec2AudioModel).double()
    if checkpointing:
        model.gradient_checkpointing_enable(checkpointing)
    model.train()
    wave = inputs(Data2Vec2AudioModel).double()
    scale = model.encoder.alibi_scale
    with torch.no_grad():
        scale[0, 0, :, 0, 0] = torch.tensor([0.7, 1.3])
    direction = torch.randn(2, 19, 32, dtype=torch.float64)

    def loss():
        return (model(wave).last_hidden_state * direction).sum()

    loss().backward()
    for head in range(2):
        values = []
        for step in (1e-5, -1e-5):
            with torch.no_grad():
                scale[0, 0, head] += step
                values.append(loss().item())
                scale[0, 0, head] -= step
        slope = (values[0] - values[1]) / 2e-5
        assert abs(slope) > 1e-3
        assert scale.grad[0, 0, head].item() == pytest.approx(slope, rel=1e-5)


def test_layers_are_dropped_in_training_alone():
    model = make(Data2Vec2AudioModel, layerdrop=1.0)
    ran = []
    for layer in model.encoder.layers:
        layer.register_forward_hook(lambda *_: ran.append(1))
    wave = inputs(Data2Vec2AudioModel)
    model.train()(wave)
    assert not ran
    model.eval()(wave)
    assert len(ran) == 3
    model.config.layerdrop = 0.5
    torch.manual_seed(0)
    kept = sum(int(torch.rand([]) >= 0.5) for _ in range(60))
    ran.clear()
    torch.manual_seed(0)
    for _ in range(20):
        model.train()(wave)
    assert len(ran) == kept and 15 < kept < 45


def test_adapters_are_refused():
    with pytest.raises(ValueError, match="add_adapter=True"):
        make(Data2Vec2AudioModel, add_adapter=True)


@torch.no_grad()
def test_letters_and_labels_come_from_the_states():
    wave, slopes = inputs(Data2Vec2AudioModel, 2).double(), [2**-4, 2**-8]
    lengths = torch.tensor([400, 251])
    real = (torch.arange(400) < lengths[:, None]).long()

    model = make(Data2Vec2AudioForCTC).double()
    labels = torch.tensor([[1, 2, 3], [4, 5, -100]])
    output = model(wave, attention_mask=real, labels=labels)
    loss = 0.0
    for row, target in enumerate([[1, 2, 3], [4, 5]]):
        logits = linear(model.lm_head, speech_states(model.data2vec_audio, wave[row, : lengths[row]], slopes))
        torch.testing.assert_close(output.logits[row, : len(logits)], logits, rtol=0, atol=1e-10)
        target = torch.tensor([target])
        loss += F.ctc_loss(logits.log_softmax(-1)[:, None], target, (len(logits),), (target.shape[1],), reduction="sum")
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-5)

    model = make(Data2Vec2AudioForSequenceClassification, num_labels=4).double()
    labels = torch.tensor([3, 1])
    output = model(wave, attention_mask=real, labels=labels)
    loss = 0.0
    for row in range(2):
        states = speech_states(model.data2vec_audio, wave[row, : lengths[row]], slopes)
        logits = linear(model.classifier, linear(model.projector, states).mean(0))
        torch.testing.assert_close(output.logits[row], logits, rtol=0, atol=1e-10)
        loss -= logits.log_softmax(-1)[labels[row]] / 2
    assert output.loss.item() == pytest.approx(loss.item(), rel=1e-6)


# All of them


@torch.no_grad()
@pytest.mark.parametrize("cls", [Data2Vec2VisionModel, Data2Vec2AudioModel])
def test_attention_implementations_agree(cls):
    model, x = make(cls), inputs(cls)
    states = {}
    for attention in ("sdpa", "eager"):
        model.set_attn_implementation(attention)
        states[attention] = model(x).last_hidden_state
    torch.testing.assert_close(states["sdpa"], states["eager"], rtol=0, atol=1e-5)
    output = model(x, output_hidden_states=True, output_attentions=True)
    assert len(output.hidden_states) == 4 and len(output.attentions) == 3
    assert torch.equal(output.hidden_states[-1], output.last_hidden_state)


@torch.no_grad()
@pytest.mark.parametrize("cls", [Data2Vec2VisionModel, Data2Vec2AudioModel])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_half_precision_runs(cls, attention):
    model, x = make(cls), inputs(cls)
    model.set_attn_implementation(attention)
    expected = model(x).last_hidden_state
    with torch.autocast("cpu", torch.bfloat16):
        mixed = model(x).last_hidden_state
    half = model.bfloat16()(x.bfloat16()).last_hidden_state
    assert half.dtype == torch.bfloat16
    for states in (mixed, half):
        assert (states.float() - expected).norm() / expected.norm() < 0.05


@pytest.mark.parametrize("cls", HEADS)
def test_heads_give_a_loss_and_every_weight_a_gradient(cls):
    model = make(cls, num_labels=3).train()
    labels = torch.tensor([[1, 2, 3], [4, 5, -100]]) if cls is Data2Vec2AudioForCTC else torch.tensor([2, 0])
    model(inputs(cls), labels=labels).loss.backward()
    assert not [name for name, parameter in model.named_parameters() if parameter.grad is None]
    if cls.config_class is Data2Vec2AudioConfig:
        assert model.base_model.encoder.alibi_scale.grad.abs().min() > 0
        model.zero_grad()
        model.freeze_feature_encoder()
        model(inputs(cls), labels=labels).loss.backward()
        frozen = {name for name, parameter in model.named_parameters() if parameter.grad is None}
        assert frozen and all(name.startswith("data2vec_audio.feature_extractor.") for name in frozen)


@torch.no_grad()
@pytest.mark.parametrize("cls", MODELS)
def test_auto_classes_load_what_was_saved(cls, tmp_path):
    model, x = make(cls), inputs(cls)
    model.save_pretrained(tmp_path)
    config = AutoConfig.from_pretrained(tmp_path)
    assert type(config) is type(model.config)
    assert config.to_dict() | {"_name_or_path": ""} == model.config.to_dict()
    loaded, report = MODELS[cls].from_pretrained(tmp_path, output_loading_info=True)
    assert type(loaded) is cls and not any(report.values())
    assert torch.equal(loaded(x)[0], model(x)[0])


@torch.no_grad()
@pytest.mark.parametrize("cls", HEADS)
def test_heads_are_put_on_a_pre_trained_encoder_and_taken_off(cls, tmp_path):
    head, x = make(cls), inputs(cls)
    base = head.base_model
    base.save_pretrained(tmp_path / "base")
    head.save_pretrained(tmp_path / "head")
    loaded, report = HEADS[cls].from_pretrained(tmp_path / "base", output_loading_info=True)
    assert report["missing_keys"] == {name for name in head.state_dict() if not name.startswith(cls.base_model_prefix)}
    assert torch.equal(loaded.base_model(x)[0], base(x)[0])
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "head")(x)[0], base(x)[0])


def test_spec_augment_of_a_fine_tuning_has_its_vector(tmp_path):
    make(Data2Vec2AudioModel).save_pretrained(tmp_path)
    model = AutoModelForCTC.from_pretrained(tmp_path, mask_time_prob=0.5, mask_time_length=2, vocab_size=7)
    model.train()(inputs(Data2Vec2AudioModel), labels=torch.tensor([[1], [2]])).loss.backward()
    assert model.data2vec_audio.masked_spec_embed.grad.abs().sum() > 0


def test_initial_weights():
    """Method 4.2."""

    def uniform(tensor, bound):
        assert tensor.abs().max() <= bound and tensor.std().item() == pytest.approx(bound / math.sqrt(3), rel=0.15)

    torch.manual_seed(0)
    model = Data2Vec2VisionForImageClassification(Data2Vec2VisionConfig(**COMMON | IMAGE | dict(hidden_size=128)))
    embeddings = model.data2vec2_vision.embeddings
    uniform(embeddings.patch_embeddings.projection.weight, math.sqrt(6 / (128 + 48)))
    uniform(embeddings.patch_embeddings.projection.bias, 1 / math.sqrt(48))
    assert embeddings.cls_token.std().item() == pytest.approx(1, rel=0.2)
    assert embeddings.position_embeddings.abs().max() <= 1
    for linear_ in [m for m in model.modules() if isinstance(m, torch.nn.Linear)]:
        assert linear_.weight.std().item() == pytest.approx(0.02, rel=0.2) and not linear_.bias.any()

    config = Data2Vec2AudioConfig(**COMMON | WAVE | dict(hidden_size=128, conv_dim=(64, 64, 64), vocab_size=40))
    model = Data2Vec2AudioForCTC(config)
    own = model.data2vec_audio.feature_projection.projection
    uniform(own.weight, 1 / math.sqrt(64))
    uniform(own.bias, 1 / math.sqrt(64))
    for layer in model.data2vec_audio.encoder.pos_conv_embed.layers:
        uniform(layer.conv.weight, 1 / math.sqrt(32 * 19))
        uniform(layer.conv.bias, 1 / math.sqrt(32 * 19))
    for layer in model.data2vec_audio.feature_extractor.conv_layers:
        fan_in = layer.conv.weight[0].numel()
        assert layer.conv.weight.std().item() == pytest.approx(math.sqrt(2 / fan_in), rel=0.15)
    for linear_ in [m for m in model.modules() if isinstance(m, torch.nn.Linear) and m is not own]:
        assert linear_.weight.std().item() == pytest.approx(0.02, rel=0.2) and not linear_.bias.any()
    assert torch.equal(model.data2vec_audio.encoder.alibi_scale, torch.ones(1, 1, 2, 1, 1))


def test_defaults_are_those_of_the_published_models():
    vision, audio = Data2Vec2VisionConfig(), Data2Vec2AudioConfig()
    assert (vision.layer_norm_eps, vision.hidden_dropout_prob, vision.attention_probs_dropout_prob) == (1e-6, 0, 0)
    assert (audio.layer_norm_eps, audio.conv_pos_kernel_size, audio.num_conv_pos_embeddings) == (1e-5, 19, 5)
    assert (audio.hidden_dropout, audio.attention_dropout, audio.activation_dropout) == (0.1, 0.1, 0)
    assert (audio.feat_proj_dropout, audio.layerdrop, audio.mask_time_prob) == (0, 0.05, 0)
    with torch.device("meta"):
        model = Data2Vec2AudioModel(audio)
    assert model.encoder.alibi_scale.shape == (1, 1, 12, 1, 1) and not hasattr(model, "masked_spec_embed")


# Registered, and saved with their code


@pytest.mark.parametrize("name", ["Encoder", "Data2Vec2VisionModel"])
def test_what_needs_transformers_registers_them(name):
    code = f"from d2v_fast import {name}; from transformers import AutoConfig; "
    code += "print(type(AutoConfig.for_model('data2vec2-audio')))"
    found = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout
    assert "d2v_fast.nets.audio.Data2Vec2AudioConfig" in found


def test_registering_again_does_no_harm():
    register()
    assert type(AutoConfig.for_model("data2vec2-vision")) is Data2Vec2VisionConfig


ELSEWHERE = """
import sys
sys.modules["d2v_fast"] = None  # not installed
import torch, transformers
from transformers import AutoModel
folder, auto = sys.argv[1:]
kept = torch.load(folder + "/kept.pt")
model = getattr(transformers, auto).from_pretrained(folder + "/model", trust_remote_code=True)
assert type(model).__module__.startswith("transformers_modules"), type(model)
torch.testing.assert_close(model(kept["inputs"])[0], kept["output"], rtol=0, atol=1e-5)
# A head is added to the weights in the same folder.
other = dict(AutoModelForCTC="AutoModelForAudioClassification").get(auto, "AutoModel")
getattr(transformers, other).from_pretrained(folder + "/model", trust_remote_code=True)(kept["inputs"])
try:
    AutoModel.from_pretrained(folder + "/model", trust_remote_code=False)
except ValueError as error:
    assert "trust_remote_code=True" in str(error), error
else:
    raise AssertionError("code ran that nobody trusts")
"""


@torch.no_grad()
@pytest.mark.parametrize("cls", [Data2Vec2VisionModel, Data2Vec2AudioForCTC])
def test_a_saved_model_carries_its_code(cls, tmp_path):
    model, x = make(cls), inputs(cls)
    save(model, tmp_path / "model")
    torch.save(dict(inputs=x, output=model(x)[0]), tmp_path / "kept.pt")
    environment = os.environ | {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1"}
    environment.pop("HF_MODULES_CACHE", None)
    command = [sys.executable, "-c", ELSEWHERE, str(tmp_path), MODELS[cls].__name__]
    ran = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stderr

    # Here the registered class is used, with either setting.
    for trust in (None, False, True):
        loaded = MODELS[cls].from_pretrained(tmp_path / "model", trust_remote_code=trust)
        assert type(loaded) is cls and torch.equal(loaded(x)[0], model(x)[0])
    assert not [name for name in sys.modules if name.startswith("transformers_modules.")]


def test_saving_with_code_leaves_no_trace_on_the_model(tmp_path):
    model = make(Data2Vec2VisionModel)
    save(model, tmp_path / "with")
    model.save_pretrained(tmp_path / "without")
    assert sorted(os.listdir(tmp_path / "with")) == ["config.json", "model.safetensors", "vision.py"]
    assert sorted(os.listdir(tmp_path / "without")) == ["config.json", "model.safetensors"]
    assert "auto_map" not in (tmp_path / "without" / "config.json").read_text()


def test_other_models_have_no_code_to_carry(tmp_path):
    from transformers import ViTConfig, ViTModel

    save(ViTModel(ViTConfig(**COMMON | IMAGE)), tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["config.json", "model.safetensors"]


# In pieces, as pre-training runs them


@torch.no_grad()
@pytest.mark.parametrize("fields", [{}, dict(alibi_per_layer=True), dict(use_alibi=False)])
def test_speech_in_pieces_is_the_whole_with_padding_too(fields):
    model, wave = make(Data2Vec2AudioModel, **fields), inputs(Data2Vec2AudioModel)
    encoder = wrap(model).eval()
    real = (torch.arange(400) < torch.tensor([[400], [251]])).long()
    frames = model._get_feature_vector_attention_mask(19, real)
    expected = model(wave, attention_mask=real).last_hidden_state
    torch.testing.assert_close(encoder(wave, ~frames)[frames], expected[frames], rtol=0, atol=1e-5)


@torch.no_grad()
def test_images_in_pieces_are_the_whole():
    model, pixels = make(Data2Vec2VisionModel), inputs(Data2Vec2VisionModel)
    encoded = wrap(model).eval()
    x = encoded.transform(encoded.place(encoded.embed(pixels)))
    torch.testing.assert_close(torch.cat([x.extra, x.states], 1), model(pixels).last_hidden_state, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("cls", [Data2Vec2VisionModel, Data2Vec2AudioModel])
def test_visible_positions_keep_their_places(cls):
    """With all positions visible, in any order, the states are those of the whole sequence in that order."""
    model, x = make(cls), inputs(cls)
    encoder = wrap(model).eval()
    features = encoder.embed(x)
    length = features.shape[1]
    visible = torch.stack([torch.randperm(length) for _ in x])
    placed = encoder.place_visible(features, torch.zeros(len(x), 1, length, dtype=torch.bool), visible)
    states = encoder.transform(placed, visible=visible).states
    expected = model(x).last_hidden_state[:, -length:].gather(1, visible[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)
