"""Spliced encoders (whole models with replaced local features) compared with plain models and hand-written hooks.

Module paths of each model are written down by hand, so that the search that finds them does not check itself.
"""

import copy
import difflib
import json
import sys
import types
from typing import NamedTuple

import pytest
import torch
import transformers
from torch import nn
from transformers import AutoModel

from d2v_fast import Data2Vec, EMAConfig, HeadConfig, LossConfig, TargetsConfig, build_encoder, wrap
from d2v_fast.config import ConfigError, parse
from d2v_fast.decoders import ConvDecoder
from d2v_fast.encoders import SplicedEncoder, table
from d2v_fast.export import export_run
from d2v_fast.train import train

COMMON = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
TEXT = COMMON | dict(vocab_size=60, max_position_embeddings=64, pad_token_id=1)
IMAGE = COMMON | dict(image_size=16, patch_size=4)
LAYOUTS = {"BTC": (0, 1, 2), "BCT": (0, 2, 1), "BCHW": (0, 2, 3, 1)}


class Family(NamedTuple):
    cls: str
    config: dict
    features: str  # module with the local features, and its layout
    layout: str
    blocks: str
    ffn: str  # relative to a block
    extra: int = 0
    gathers: bool = True
    shape: tuple = (12,)


DEBERTA = TEXT | dict(relative_attention=True, pos_att_type=["c2p", "p2c"], position_buckets=4)
SEW = COMMON | dict(conv_dim=(16, 16, 16), conv_kernel=(10, 3, 2), conv_stride=(5, 2, 2), num_conv_pos_embeddings=8)
MEL = dict(num_mel_bins=16, d_model=32, encoder_layers=3, encoder_attention_heads=2, encoder_ffn_dim=48)
MEL |= dict(max_source_positions=20)
FAMILIES = {
    "modernbert": Family("ModernBert", TEXT | dict(local_attention=6), "embeddings", "BTC", "layers", "mlp.Wo"),
    "distilbert": Family(
        "DistilBert", dict(dim=32, n_layers=3, n_heads=2, hidden_dim=48, vocab_size=60),
        "embeddings", "BTC", "transformer.layer", "ffn.lin2",
    ),
    "deberta": Family("Deberta", DEBERTA, "embeddings", "BTC", "encoder.layer", "output.dense", gathers=False),
    "deberta-v2": Family("DebertaV2", DEBERTA, "embeddings", "BTC", "encoder.layer", "output.dense", gathers=False),
    "mpnet": Family("MPNet", TEXT, "embeddings", "BTC", "encoder.layer", "output.dense"),
    "nomic_bert": Family("NomicBert", TEXT, "embeddings", "BTC", "layers", "mlp.down_proj"),
    "dinov2_with_registers": Family(
        "Dinov2WithRegisters", IMAGE | dict(num_register_tokens=3, layerscale_value=0.5),
        "embeddings.patch_embeddings", "BTC", "encoder.layer", "layer_scale2", 4, shape=(3, 16, 16),
    ),
    "dinov3_vit": Family(
        "DINOv3ViT", IMAGE | dict(num_register_tokens=2, layerscale_value=0.5),
        "embeddings.patch_embeddings", "BCHW", "model.layer", "layer_scale2", 3, shape=(3, 16, 16),
    ),
    "ijepa": Family(
        "IJepa", IMAGE, "embeddings.patch_embeddings", "BTC", "layers", "mlp.fc2", shape=(3, 16, 16)
    ),
    "clip_vision_model": Family(
        "CLIPVision", IMAGE, "embeddings.patch_embedding", "BCHW", "encoder.layers", "mlp.fc2", 1, shape=(3, 16, 16)
    ),
    "siglip_vision_model": Family(
        "SiglipVision", IMAGE, "embeddings.patch_embedding", "BCHW", "encoder.layers", "mlp.fc2", shape=(3, 16, 16)
    ),
    "audio-spectrogram-transformer": Family(
        "AST", COMMON | dict(patch_size=4, frequency_stride=4, time_stride=4, max_length=24, num_mel_bins=12),
        "embeddings.patch_embeddings.projection", "BCHW", "layers", "mlp.fc2", 2, shape=(24, 12),
    ),
    "whisper": Family("WhisperEncoder", MEL, "conv2", "BCT", "layers", "fc2", shape=(16, 40)),
    "wav2vec2-bert": Family(
        "Wav2Vec2Bert", COMMON | dict(feature_projection_input_dim=24, conv_depthwise_kernel_size=3),
        "feature_projection.projection", "BTC", "encoder.layers", "ffn2.output_dense", gathers=False, shape=(30, 24),
    ),
    "sew": Family(
        "SEW", SEW | dict(num_feat_extract_layers=3, num_conv_pos_embedding_groups=4, squeeze_factor=2),
        "feature_projection", "BTC", "encoder.layers", "feed_forward.output_dense", gathers=False, shape=(430,),
    ),
}  # fmt: skip
KINDS = ("modernbert", "deberta-v2", "dinov3_vit", "audio-spectrogram-transformer", "whisper", "sew")  # the others are similar
EACH = [name if name in KINDS else pytest.param(name, marks=pytest.mark.slow) for name in FAMILIES]


def name_of(each):
    return each if isinstance(each, str) else each.values[0]


def plain(name):
    """A float64 transformers model without dropout or zero weights."""
    family = FAMILIES[name]
    config = transformers.CONFIG_MAPPING[name](**family.config)
    for field in ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout", "attention_dropout", "layerdrop"):
        if hasattr(config, field):
            setattr(config, field, 0.0)
    for field in ("hidden_dropout", "activation_dropout", "feat_proj_dropout", "conformer_conv_dropout", "encoder_layerdrop"):
        if hasattr(config, field):
            setattr(config, field, 0.0)
    cls = getattr(transformers, f"{family.cls}Model", None) or transformers.models.whisper.modeling_whisper.WhisperEncoder
    torch.manual_seed(0)
    model = cls(config, **({"add_pooling_layer": False} if name in ("ijepa", "mpnet") else {})).double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def inputs(name, batch=3):
    torch.manual_seed(1)
    shape = FAMILIES[name].shape
    if shape == (12,):
        return torch.randint(5, 55, (batch, 12))
    return torch.randn(batch, *shape, dtype=torch.float64)


def states_of(model, *args, **kwargs):
    return model(*args, **kwargs).last_hidden_state


@pytest.mark.parametrize("name", EACH)
def test_unmasked_states_equal_the_plain_models(name):
    family, model, x = FAMILIES[name], plain(name), inputs(name)
    expected = states_of(model, x)
    encoder = wrap(model)
    assert isinstance(encoder, SplicedEncoder) and encoder.extra == family.extra
    assert encoder.features_name == family.features and encoder.layers_name == family.blocks
    encoded = encoder.encode(x)
    torch.testing.assert_close(encoded.states, expected[:, family.extra :], rtol=0, atol=1e-12)
    if family.extra:
        torch.testing.assert_close(encoded.extra, expected[:, : family.extra], rtol=0, atol=1e-12)
    else:
        assert encoded.extra is None
    assert torch.equal(states_of(model, x), expected), "the model was changed"


@pytest.mark.parametrize("name", EACH)
def test_masked_states_match_a_hand_written_hook(name):
    """The hook writes the mask vector into the module output, in the layout listed above."""
    family, model, x = FAMILIES[name], plain(name), inputs(name)
    encoder, order = wrap(model), LAYOUTS[family.layout]
    features = encoder.embed(x)
    mask = torch.rand(features.shape[:2]) < 0.5
    vector = torch.randn(32, dtype=torch.float64)

    def hook(module, args, output):
        moved = output.permute(order).clone()
        assert torch.equal(features, moved.flatten(1, -2))
        grid = mask.view(moved.shape[:-1])
        moved[grid] = vector
        return moved.permute([order.index(axis) for axis in range(len(order))])

    handle = model.get_submodule(family.features).register_forward_hook(hook)
    expected = states_of(model, x)[:, family.extra :]
    handle.remove()
    found = encoder.transform(encoder.place(torch.where(mask.unsqueeze(-1), vector, features))).states
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    if encoder.masks_features:
        with torch.no_grad():
            encoder.double().mask_token.copy_(vector)
        masked = encoder.contextualize(encoder.mask_features(features, mask))
        torch.testing.assert_close(masked, expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", EACH)
@pytest.mark.parametrize("source", ["ffn", "block_output", "block_input"])
def test_layer_results_match_hand_written_hooks(name, source):
    family, model, x = FAMILIES[name], plain(name), inputs(name)
    encoder, seen = wrap(model), []

    def first(value):
        return value[0] if isinstance(value, tuple) else value

    def before(module, args, kwargs):
        seen.append(args[0] if args else kwargs["hidden_states"])

    for block in model.get_submodule(family.blocks)[1:]:
        if source == "block_input":
            block.register_forward_pre_hook(before, with_kwargs=True)
        else:
            module = block.get_submodule(family.ffn) if source == "ffn" else block
            module.register_forward_hook(lambda m, a, output: seen.append(first(output)))
    states_of(model, x)
    expected = [result[:, family.extra :] for result in seen]
    if name == "sew":  # two positions share a result
        length = encoder.embed(x).shape[1]
        expected = [torch.cat([each.repeat_interleave(2, 1), each[:, -1:]], 1)[:, :length] for each in expected]
    found = encoder.transform(encoder.place(encoder.embed(x)), layers=2, source=source).layers
    assert len(found) == len(expected[:2]) == 2
    for one, other in zip(found, expected[:2], strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [each for each in EACH if FAMILIES[name_of(each)].gathers])
def test_encoding_visible_positions_equals_masking_attention_to_all_others(name, monkeypatch):
    family, model, x = FAMILIES[name], plain(name), inputs(name, batch=2)
    encoder = wrap(model)
    assert encoder.gathers
    features = encoder.embed(x)
    length, views = features.shape[1], 2
    visible = torch.stack([torch.randperm(length)[: length // 2].sort().values for _ in range(4)])
    mask = torch.ones(2, views, length, dtype=torch.bool).view(4, length).scatter(1, visible, False).view(2, views, length)
    found = encoder.transform(encoder.place_visible(features, mask, visible), visible=visible, layers=2, source="block_output")
    outputs = []
    hooks = [each.register_forward_hook(lambda *args: outputs.append(args[2])) for each in model.get_submodule(family.blocks)]
    seen = torch.cat([torch.ones(4, family.extra, dtype=torch.bool), ~mask.view(4, length)], dim=1)
    x = x.repeat_interleave(views, 0)
    if family.shape == (12,):
        expected = states_of(model, x, attention_mask=seen.long())
    else:
        attend = nn.functional.scaled_dot_product_attention

        def among_visible(query, key, value, attn_mask=None, **kwargs):
            assert attn_mask is None
            return attend(query, key, value, attn_mask=seen[:, None, None], **kwargs)

        monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", among_visible)
        expected = states_of(model, x)
        monkeypatch.undo()
    for hook in hooks:
        hook.remove()
    extra, expected = expected[:, : family.extra], expected[:, family.extra :]
    expected = expected.gather(1, visible[..., None].expand(-1, -1, 32))
    torch.testing.assert_close(found.states, expected, rtol=0, atol=1e-12)
    assert [layer.shape for layer in found.layers] == [expected.shape] * 2
    for layer, output in zip(found.layers, outputs[-2:], strict=True):
        output = (output[0] if isinstance(output, tuple) else output)[:, family.extra :]
        torch.testing.assert_close(layer, output.gather(1, visible[..., None].expand(-1, -1, 32)), rtol=0, atol=1e-12)
    if family.extra:
        torch.testing.assert_close(found.extra, extra, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", [each for each in EACH if not FAMILIES[name_of(each)].gathers])
def test_encoders_that_cannot_gather_say_why(name):
    encoder = wrap(plain(name))
    why = "its blocks see fewer positions" if name == "sew" else "its blocks depend on positions or on their number"
    with pytest.raises(ValueError, match=f"cannot encode the visible positions alone: {why}"):
        Data2Vec(encoder, ConvDecoder(32, 1, width=16, kernel=3, groups=4), targets=TargetsConfig(top_k=2))
    with pytest.raises(ValueError, match="cannot encode the visible positions alone"):
        encoder.place_visible(torch.zeros(1, 4, 32), torch.zeros(1, 1, 4).bool(), torch.zeros(1, 2).long())


@pytest.mark.parametrize("name", ["modernbert", "distilbert", "deberta-v2", "mpnet", "nomic_bert"])
def test_padded_text_matches_the_plain_model(name):
    model, x = plain(name), inputs(name)
    encoder = wrap(model)
    padding = torch.zeros(3, 12, dtype=torch.bool)
    padding[0, 7:], padding[2, 10:] = True, True
    x = x.masked_fill(padding, model.config.pad_token_id)
    expected = states_of(model, x, attention_mask=(~padding).long())
    torch.testing.assert_close(encoder(x, padding)[~padding], expected[~padding], rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["sew", "wav2vec2-bert"])
def test_padded_speech_matches_the_plain_model(name):
    model, x = plain(name), inputs(name)
    encoder = wrap(model)
    sizes = torch.tensor([430, 430, 250]) if name == "sew" else torch.tensor([30, 30, 17])
    seen = torch.arange(x.shape[1]) < sizes[:, None]
    frames = torch.tensor([encoder.positions(int(size)) for size in sizes])
    features = encoder.embed(x)
    kept, padding = features.clone(), torch.arange(features.shape[1]) >= frames[:, None]
    found = encoder.contextualize(features, padding)
    expected = states_of(model, x, attention_mask=seen.long())
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=0, atol=1e-12)
    assert torch.equal(features, kept), "the caller's features were changed in place"


@pytest.mark.parametrize("samples", [30, 31, 49, 50, 430, 1234])
def test_positions_predicts_the_number_of_frames(samples):
    encoder = wrap(plain("sew"))
    assert encoder.embed(torch.randn(1, samples, dtype=torch.float64)).shape[1] == encoder.positions(samples)
    assert encoder.positions(29) == 0


def test_positions_of_images_and_spectrograms_are_grids():
    assert wrap(plain("dinov3_vit")).positions(16) == (4, 4)
    ast = wrap(plain("audio-spectrogram-transformer"))
    assert ast.reads == "spectrogram" and ast.positions(0) == (3, 6)  # bins and frames in patches of 4


@pytest.mark.parametrize("name", EACH)
def test_gradients_reach_all_used_parameters_and_the_teacher_is_averaged(name):
    """Used parameters are those that the states of the plain model depend on, plus the mask vector."""
    family, model, x = FAMILIES[name], plain(name).float().train(), inputs(name)
    x = x if family.shape == (12,) else x.float()
    parameters = {n: parameter for n, parameter in model.named_parameters() if parameter.requires_grad}
    gradients = torch.autograd.grad(states_of(model, x).square().sum(), list(parameters.values()), allow_unused=True)
    used = {n for n, gradient in zip(parameters, gradients, strict=True) if gradient is not None}
    targets = TargetsConfig(top_k=2, source="block_output")
    data2vec = Data2Vec(wrap(model), targets=targets, ema=EMAConfig(start=0.5, end=0.5))
    mask = torch.zeros(3, data2vec.student.embed(x).shape[1], dtype=torch.bool)
    mask[:, 1::2] = True
    if data2vec.student.masks_features:
        output = data2vec(x, mask)
        masks = data2vec.student.mask_token
    else:
        output = data2vec(x.masked_fill(mask, 3), mask, x)
        masks = None
    output.loss.backward()
    reached = {n for n, parameter in parameters.items() if parameter.grad is not None}
    assert reached - used <= {n for n, parameter in parameters.items() if parameter is masks} and used <= reached
    assert masks is None or masks.grad.abs().sum() > 0
    before = copy.deepcopy(dict(data2vec.teacher.module.named_parameters()))
    torch.optim.SGD([p for p in data2vec.student.parameters() if p.grad is not None], lr=0.1).step()
    data2vec.update_teacher()
    students = dict(data2vec.student.named_parameters())
    for n, teacher in data2vec.teacher.module.named_parameters():
        if students[n].requires_grad:
            torch.testing.assert_close(teacher, 0.5 * before[n] + 0.5 * students[n], rtol=1e-6, atol=1e-7)
    assert any(not torch.equal(before[n], teacher) for n, teacher in data2vec.teacher.module.named_parameters())


@pytest.mark.parametrize("name", ["modernbert", "dinov3_vit", "siglip_vision_model", "audio-spectrogram-transformer"])
def test_a_data2vec_2_step_reaches_all_used_parameters(name):
    family, model, x = FAMILIES[name], plain(name).float().train(), inputs(name)
    x = x if family.shape == (12,) else x.float()
    parameters = dict(model.named_parameters())
    gradients = torch.autograd.grad(states_of(model, x).square().sum(), list(parameters.values()), allow_unused=True)
    used = {n for n, gradient in zip(parameters, gradients, strict=True) if gradient is not None and gradient.any()}
    encoder = wrap(model)
    grid = encoder.positions(12)
    axes = len(grid) if isinstance(grid, tuple) else 1
    decoder = ConvDecoder(32, axes, width=16, kernel=3, groups=4)
    loss = LossConfig(cls_weight=0.1 if family.extra else 0.0)
    data2vec = Data2Vec(encoder, decoder, targets=TargetsConfig(top_k=2), loss=loss)
    mask = (torch.arange(encoder.embed(x).shape[1]) % 3 > 0).expand(3, 2, -1)
    output = data2vec(x, mask)
    output.loss.backward()
    reached = {n for n, parameter in parameters.items() if parameter.grad is not None and parameter.grad.any()}
    assert reached == used


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("name", ["modernbert", "dinov3_vit", "audio-spectrogram-transformer"])
def test_gradients_of_checkpointed_blocks_are_the_same_bits(name, version):
    """As with train.checkpointing; in 2.0 a block is recomputed on the visible positions alone."""
    model, x = plain(name).train(), inputs(name)
    encoder, calls, runs = wrap(model), [], []
    grid = encoder.positions(12)
    decoder = ConvDecoder(32, len(grid) if isinstance(grid, tuple) else 1, width=16, kernel=3, groups=4)
    data2vec = Data2Vec(encoder, decoder if version == 2 else HeadConfig(), targets=TargetsConfig(top_k=2)).double()
    mask = (torch.arange(encoder.embed(x).shape[1]) % 3 > 0).expand(3, -1)
    for block in data2vec.student.blocks:
        linear = next(m for m in block.modules() if isinstance(m, nn.Linear))
        linear.register_forward_pre_hook(lambda m, args: calls.append(args[0].shape[:2]))
    for _ in range(2):
        calls.clear()
        torch.manual_seed(2)
        if version == 2:
            loss = data2vec(x, mask[:, None].expand(-1, 2, -1)).loss
        elif encoder.masks_features:
            loss = data2vec(x, mask).loss
        else:
            loss = data2vec(x.masked_fill(mask, 3), mask, x).loss
        loss.backward()
        runs.append((loss, {n: p.grad for n, p in data2vec.student.named_parameters() if p.grad is not None}, [*calls]))
        data2vec.zero_grad(set_to_none=True)
        data2vec.student.checkpoint_blocks()
    (one, expected, once), (other, found, twice) = runs
    assert torch.equal(one, other) and expected.keys() == found.keys()
    assert [n for n in found if not torch.equal(found[n], expected[n])] == []
    assert len(once) == 3 and twice == [*once, *once]
    assert (once[0][1] < mask.shape[1]) == (version == 2)


def test_local_and_positional_parameters():
    """Teachers copy the parameters of features, and with scope "layers" also positions and extra tokens (method 1.6)."""
    encoder = wrap(plain("dinov2_with_registers"))
    projection = {f"embeddings.patch_embeddings.projection.{n}" for n in ("weight", "bias")}
    assert set(encoder.local) == projection | {"embeddings.mask_token"}
    assert set(encoder.positional) == {f"embeddings.{n}" for n in ("cls_token", "register_tokens", "position_embeddings")}
    text = wrap(plain("modernbert"))
    assert text.local and all(n.startswith("embeddings.") for n in text.local) and not text.positional
    assert "encoder.rel_embeddings.weight" in wrap(plain("deberta-v2")).positional
    assert any("feature_extractor" in n for n in wrap(plain("sew")).local)


def test_features_have_no_dropout_and_no_spec_augment():
    model = plain("wav2vec2-bert").train()
    model.config.mask_time_prob, model.config.mask_time_length = 0.9, 2
    model.feature_projection.dropout.p = 0.5
    encoder, x = wrap(model), inputs("wav2vec2-bert")
    assert torch.equal(encoder.embed(x), encoder.embed(x))
    model.feature_projection.dropout.p = 0.0
    assert torch.equal(encoder(x), encoder(x)), "SpecAugment was on"
    assert model.config.apply_spec_augment


@pytest.mark.parametrize("name", EACH)
def test_transformers_loads_what_was_saved(name, tmp_path):
    family, x = FAMILIES[name], inputs(name)
    encoder = wrap(plain(name).float())
    x = x if family.shape == (12,) else x.float()
    encoder.save(tmp_path)
    again = (type(encoder.model) if name == "whisper" else AutoModel).from_pretrained(tmp_path).eval()
    for n, parameter in encoder.model.named_parameters():
        assert torch.equal(parameter, again.get_parameter(n)), n
    torch.testing.assert_close(states_of(again, x)[:, encoder.extra :], encoder(x), rtol=0, atol=1e-6)


def test_vit_mae_without_shuffling_matches_the_plain_model():
    """ViT-MAE shuffles and drops patches; the reference gets mask_ratio 0 and sorted noise."""
    config = transformers.ViTMAEConfig(**IMAGE, mask_ratio=0.0)
    model = transformers.ViTMAEModel(config).double().eval()
    encoder, x = wrap(model), torch.randn(2, 3, 16, 16, dtype=torch.float64)
    expected = model(x, noise=torch.arange(16).expand(2, -1)).last_hidden_state
    torch.testing.assert_close(encoder(x), expected[:, 1:], rtol=0, atol=1e-12)
    assert build_encoder("vit_mae", config=IMAGE).model.config.mask_ratio == 0
    with pytest.raises(ValueError, match="ViTMAEModel cannot be spliced"):
        build_encoder("vit_mae", config=IMAGE | dict(mask_ratio=0.5))


def test_a_features_setting_splices_a_known_family():
    """RoFormer can gather when spliced, unlike its hand-written split."""
    config = TEXT | dict(hidden_dropout_prob=0.0)
    assert not isinstance(build_encoder("roberta", config=TEXT), SplicedEncoder)
    encoder = build_encoder("roformer", config=config, features="embeddings").eval()
    x = torch.randint(5, 55, (2, 12))
    assert isinstance(encoder, SplicedEncoder) and encoder.gathers
    torch.testing.assert_close(encoder(x), encoder.model(x).last_hidden_state)


MODERNBERT = transformers.ModernBertConfig(**TEXT)


class Averaging(nn.Module):
    """Features that are not local: each contains the mean of all features."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner
        self.weight = inner.weight

    def forward(self, *args, **kwargs):
        x = self.inner(*args, **kwargs)
        return x + x.mean((2, 3), keepdim=True)


class Peeking(transformers.ModernBertModel):
    """Part of the input bypasses the embeddings."""

    def forward(self, input_ids, attention_mask=None):
        output = super().forward(input_ids, attention_mask=attention_mask)
        output.last_hidden_state = output.last_hidden_state + 0.1 * input_ids.unsqueeze(-1)
        return output


class Nowhere(transformers.SiglipVisionModel):
    """No positions at all."""

    def __init__(self, config):
        super().__init__(config)
        self.embeddings.position_embedding = nn.Embedding.from_pretrained(torch.zeros(16, 32))


def averaging():
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**IMAGE))
    model.embeddings.patch_embedding = Averaging(model.embeddings.patch_embedding)
    return model


class Averaged(nn.Linear):
    """Frames that contain the mean of all frames."""

    def forward(self, x):
        x = super().forward(x)
        return x + x.mean(1, keepdim=True)


def averaging_speech():
    model = plain("wav2vec2-bert")
    model.feature_projection.projection.__class__ = Averaged
    return model


class Rearranged(nn.Module):
    """Patches of SigLIP in another layout."""

    def __init__(self, inner, layout):
        super().__init__()
        self.inner, self.layout, self.weight = inner, layout, inner.weight

    def forward(self, x):
        return self.layout(self.inner(x))


class AnyLayout(nn.Module):
    """SigLIP's embeddings for patches in any layout."""

    def __init__(self, inner, layout):
        super().__init__()
        self.patch_embedding, self.position_embedding = Rearranged(inner.patch_embedding, layout), inner.position_embedding

    def forward(self, pixels, **kwargs):
        x = self.patch_embedding(pixels)
        x = x[0] if isinstance(x, tuple) else x
        if x.shape[-1] == 32 and x.ndim == 4:
            x = x.flatten(1, 2)
        elif x.shape[1] == 32:
            x = x.flatten(2).transpose(1, 2)
        elif x.shape[1] == 2:
            x = x.transpose(0, 1)
        return x.float() + self.position_embedding.weight


def of_layout(layout):
    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**IMAGE)).eval()
    model.embeddings = AnyLayout(model.embeddings, layout)
    return model


class Causal(transformers.models.modernbert.modeling_modernbert.ModernBertEncoderLayer):
    """A block that adds cumulative sums."""

    def forward(self, hidden_states, *args, **kwargs):
        return hidden_states + hidden_states.cumsum(1)


def half_causal():
    model = transformers.ModernBertModel(MODERNBERT)
    model.layers[1].__class__ = Causal
    return model


def nowhere():
    model = Nowhere(transformers.SiglipVisionConfig(**IMAGE))
    model.embeddings.position_embedding.weight = None
    model.embeddings.position_embedding.forward = lambda ids: torch.zeros(1, 16, 32)
    return model


def swin():
    config = transformers.SwinConfig(image_size=32, patch_size=4, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)
    return transformers.SwinModel(config)


@pytest.mark.parametrize(
    "attempt, named",
    [
        (lambda: wrap(swin()), "SwinModel cannot be spliced: is hierarchical: 64 local features become 16 states"),
        (lambda: wrap(averaging()), "without its blocks, feature 0 ends up in states [0, 1, 2, 3, 4], expected only 0"),
        (
            lambda: wrap(averaging(), features="embeddings.patch_embedding"),
            "is not local: the end of the input changes 16 of its 16",
        ),
        (lambda: wrap(Peeking(MODERNBERT)), "at embeddings: the rest of the model also depends on its input in other ways"),
        (lambda: wrap(nowhere()), "masked positions get equal states: masking removes the positions, or the model has none"),
        (
            lambda: build_encoder("modernbert", config=TEXT, features="layers.1"),
            "encoder.features=layers.1: ModernBertModel cannot be spliced: is not local: the end of the input changes",
        ),
        (
            lambda: build_encoder("modernbert", config=TEXT, features="embedings"),
            "encoder.features=embedings: ModernBertModel cannot be spliced: is not in the model or does not run before",
        ),
        (
            lambda: build_encoder("dinov3_vit", config=IMAGE, features="embeddings"),
            "encoder.features=embeddings: DINOv3ViTModel cannot be spliced: its 17 positions do not form a square grid",
        ),
        (
            lambda: build_encoder("siglip_vision_model", config=IMAGE, features="embeddings.position_embedding"),
            "found the output shape (1, 16, 32), expected B = 2 and C = 32",
        ),
        (
            lambda: build_encoder("llama", config=TEXT | dict(num_key_value_heads=2)),
            "LlamaModel cannot be spliced at embed_tokens: is causal: positions do not see later ones; "
            "set encoder.bidirectional=true to make its attention bidirectional",
        ),
        (
            lambda: build_encoder("stablelm", config=TEXT | dict(num_key_value_heads=2), bidirectional=True),
            "is causal: positions do not see later ones; config.is_causal = false, which encoder.bidirectional sets",
        ),
        (lambda: build_encoder("roberta", config=TEXT, bidirectional=True), "RobertaModel has no causal attention; remove the"),
        (lambda: build_encoder("modernbert", config=TEXT, bidirectional=True), "ModernBertModel has no causal attention"),
        (lambda: wrap(half_causal()), "has causal blocks, such as 1: positions do not see later ones"),
        (
            lambda: wrap(averaging_speech(), features="feature_projection.projection"),
            "is not local: the end of the input changes",
        ),
        (
            lambda: wrap(of_layout(lambda x: x.unsqueeze(-1)), features="embeddings.patch_embedding"),
            "found the output torch.float32 (2, 32, 4, 4, 1), expected a tensor (B, T, C), (B, C, T) or (B, C, H, W)",
        ),
        (
            lambda: wrap(of_layout(lambda x: x.int()), features="embeddings.patch_embedding"),
            "found the output torch.int32 (2, 32, 4, 4), expected a tensor",
        ),
        (
            lambda: wrap(of_layout(lambda x: x.flatten(2).permute(2, 0, 1)), features="embeddings.patch_embedding"),
            "found the output shape (16, 2, 32), expected B = 2 and C = 32",
        ),
        (
            lambda: wrap(of_layout(lambda x: (x, x)), features="embeddings.patch_embedding"),
            "its output has 2 parts",
        ),
        (lambda: build_encoder("t5"), "encoder.model='t5': T5Model also has a decoder; train its encoder"),
        (lambda: build_encoder("yolos", config=IMAGE | dict(image_size=[16, 16])), "extra tokens come after"),
        (lambda: wrap(transformers.ViTModel(transformers.ViTConfig(**IMAGE)), features="nowhere"), "is not in the model"),
    ],
)
def test_what_cannot_be_spliced_is_explained(attempt, named):
    with pytest.raises(ValueError) as error:
        attempt()
    assert named in str(error.value)


def mean_of_windows(x):
    """(B, C, 8, 8), in windows of 4 × 4."""
    return nn.functional.avg_pool2d(x, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)


def recurrent(x):
    """A causal LSTM."""
    torch.manual_seed(0)
    return nn.LSTM(32, 32, batch_first=True).to(x)(x)[0]


NOT_LOCAL = {
    "causal sum of tokens": ("modernbert", lambda x: x.cumsum(1), "start of the input changes 13 of its 13"),
    "causal LSTM on tokens": ("modernbert", recurrent, "start of the input changes 13 of its 13"),
    "previous token": ("modernbert", lambda x: nn.functional.pad(x[:, :-1], (0, 0, 1, 0)), "start of the input changes 2 of"),
    "next token": ("modernbert", lambda x: nn.functional.pad(x[:, 1:], (0, 0, 0, 1)), "end of the input changes 2 of its 13"),
    "tokens in the middle": (
        "modernbert",
        lambda x: nn.functional.pad(x[:, 5:8].mean(1, True).expand(-1, 3, -1), (0, 0, 5, x.shape[1] - 8)),
        "middle of the input changes 3 of its 13",
    ),
    "causal sum of frames": ("wav2vec2-bert", lambda x: x.cumsum(1), "start of the input changes 97 of its 97"),
    "causal sum of patches": ("siglip_vision_model", lambda x: x.cumsum(3), "start of the input changes 8 of its 64"),
    "windows of patches": ("siglip_vision_model", mean_of_windows, "end of the input changes 16 of its 64"),
}


@pytest.mark.parametrize("what", NOT_LOCAL)
def test_modules_that_mix_positions_are_not_local(what, monkeypatch):
    name, mix, why = NOT_LOCAL[what]
    if name == "siglip_vision_model":
        monkeypatch.setitem(FAMILIES, name, FAMILIES[name]._replace(config=IMAGE | dict(image_size=32)))
    model = plain(name)
    assert wrap(model).features_name == FAMILIES[name].features
    module = model.get_submodule(FAMILIES[name].features)

    class Mixing(type(module)):
        def forward(self, *args, **kwargs):
            x = super().forward(*args, **kwargs)
            return x + 0.1 * mix(x)

    module.__class__ = Mixing
    with pytest.raises(ValueError, match=f"is not local: the {why}"):
        wrap(model, features=FAMILIES[name].features)


class Stem(nn.Sequential):
    """Convolutions that do not read the last row and column of pixels."""

    def __init__(self):
        super().__init__(nn.Conv2d(3, 16, 1, 2), nn.GELU(), nn.Conv2d(16, 32, 3, 2, 1), nn.GELU(), nn.Conv2d(32, 32, 3, 1, 1))
        self.weight = self[0].weight


def test_a_convolutional_stem_is_local():
    torch.manual_seed(0)
    model = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**IMAGE | dict(image_size=32))).eval()
    model.embeddings.patch_embedding = Stem()
    encoder, x = wrap(model), torch.randn(2, 3, 32, 32)
    assert encoder.features_name == "embeddings.patch_embedding"
    torch.testing.assert_close(encoder(x), model(x).last_hidden_state)


@pytest.mark.parametrize(
    "layout, order",
    [
        (lambda x: x, (0, 2, 3, 1)),
        (lambda x: x.permute(0, 2, 3, 1), (0, 1, 2, 3)),
        (lambda x: x.flatten(2), (0, 2, 1)),
        (lambda x: x.flatten(2).transpose(1, 2), (0, 1, 2)),
    ],
    ids=["BCHW", "BHWC", "BCT", "BTC"],
)
def test_feature_layouts_are_recognised(layout, order):
    model = of_layout(layout)
    encoder, x = wrap(model), torch.randn(3, 3, 16, 16)
    assert encoder.features_name == "embeddings.patch_embedding" and encoder.splice.order == order
    expected = model.embeddings.patch_embedding.inner(x).flatten(2).transpose(1, 2)
    torch.testing.assert_close(encoder.embed(x), expected)
    torch.testing.assert_close(encoder(x), model(x).last_hidden_state)


DECODERS = {
    "gpt2": dict(n_embd=32, n_layer=3, n_head=2, n_positions=40, vocab_size=60),
    "llama": TEXT | dict(num_key_value_heads=1),
    "qwen3": TEXT | dict(num_key_value_heads=2, head_dim=16),
    "mistral": TEXT | dict(num_key_value_heads=2, sliding_window=None),
}


@pytest.mark.parametrize("name", DECODERS)
def test_decoder_only_models_become_bidirectional(name, caplog):
    """The reference is the causal transformers model with the same weights and a full attention mask."""
    with caplog.at_level("INFO"):
        encoder = build_encoder(name, config=DECODERS[name], bidirectional=True).eval()
    assert "attention is bidirectional (encoder.bidirectional=true)" in caplog.text
    causal = AutoModel.from_config(transformers.CONFIG_MAPPING[name](**DECODERS[name])).eval()
    causal.load_state_dict(encoder.model.state_dict())
    x = torch.randint(5, 55, (2, 12))
    everything = torch.ones(2, 1, 12, 12, dtype=torch.bool)
    torch.testing.assert_close(encoder(x), states_of(causal, x, attention_mask=everything))
    other = torch.cat([x[:, :-1], 55 - x[:, -1:]], dim=1)
    torch.testing.assert_close(states_of(causal, x)[:, :-1], states_of(causal, other)[:, :-1])
    assert ((encoder(x) - encoder(other)).abs().amax((0, 2)) > 1e-5).all(), "a position does not depend on the last token"
    padding = torch.zeros(2, 12, dtype=torch.bool)
    padding[0, 7:] = True
    torch.testing.assert_close(encoder(x, padding)[0, :7], encoder(x[:1, :7])[0])


def test_a_run_of_a_decoder_only_model(tmp_path):
    run, to = tmp_path / "run", tmp_path / "exported"
    small = [f"encoder.config.{n}" for n in ("hidden_size=32", "num_hidden_layers=3", "num_attention_heads=2")]
    more = ["encoder.model=llama", "encoder.bidirectional=true", "encoder.config.num_key_value_heads=2"]
    more += ["encoder.config.intermediate_size=48", "data.vocab_size=400", "train.steps=2", "train.workers=0"]
    assert train(parse(["--config", "text/tiny", *small, *more, "train.batch_size=4", f"train.output={run}"])[0]) == 0
    assert export_run(run, to) < 1e-6
    assert "| attention | bidirectional: is_causal is false in its config" in (to / "README.md").read_text()
    theirs, x = AutoModel.from_pretrained(to).eval(), torch.randint(5, 55, (2, 12))
    again = build_encoder(pretrained=str(to)).eval()  # bidirectional is read from its config
    torch.testing.assert_close(again(x), states_of(theirs, x))
    assert not torch.equal(states_of(theirs, x)[:, 0], states_of(theirs, torch.cat([x[:, :-1], 55 - x[:, -1:]], 1))[:, 0])


@pytest.mark.parametrize("name, more", [("dinov3_vit", dict(image_size=64)), ("modernbert", {}), ("siglip_vision_model", {})])
def test_probing_costs_less_than_six_samples(name, more):
    """The cost is counted in multiplications of Linear layers, for a model of 24 layers."""
    config = FAMILIES[name].config | dict(num_hidden_layers=24) | more
    model = getattr(transformers, f"{FAMILIES[name].cls}Model")(transformers.CONFIG_MAPPING[name](**config)).eval()
    work = []

    def note(module, args):
        if isinstance(module, nn.Linear):
            work.append(args[0].shape[:-1].numel() * module.weight.numel())

    hook = nn.modules.module.register_module_forward_pre_hook(note)
    try:
        encoder = wrap(model)
        tried, work[:] = sum(work), []
        encoder(torch.randint(5, 55, (1, 60)) if name == "modernbert" else torch.randn(1, 3, *[config["image_size"]] * 2))
    finally:
        hook.remove()
    assert encoder.gathers and 0 < tried < 6 * sum(work)


class Convolved(transformers.models.nomic_bert.modeling_nomic_bert.NomicBertLayer):
    """A block that reads its neighbour."""

    def forward(self, hidden_states, *args, **kwargs):
        return super().forward(hidden_states + 0.5 * hidden_states.roll(1, 1), *args, **kwargs)


def test_probing_runs_each_class_of_block():
    model = plain("nomic_bert")
    assert wrap(model).gathers
    model.layers[1].__class__ = Convolved
    assert wrap(model).no_gather.startswith("its blocks depend on positions or on their number")


def four_layers():
    config = transformers.CONFIG_MAPPING["nomic_bert"](**FAMILIES["nomic_bert"].config | dict(num_hidden_layers=4))
    torch.manual_seed(0)
    return transformers.NomicBertModel(config, add_pooling_layer=False).eval()


@pytest.mark.parametrize("attribute", [dict(layer_idx=2), dict(strength=0.5), dict(kinds={"neighbours": True})])
def test_blocks_that_differ_by_an_attribute_alone_are_probed(attribute):
    """The blocks have the same class and shapes, but differ in an index, a float or a dict."""
    model = four_layers()
    name, value = next(iter(attribute.items()))

    class Differs(type(model.layers[0])):
        def forward(self, hidden_states, *args, **kwargs):
            if getattr(self, name) == value:
                hidden_states = hidden_states + 0.5 * hidden_states.roll(1, 1)
            return super().forward(hidden_states, *args, **kwargs)

    assert wrap(model).gathers
    for number, block in enumerate(model.layers):
        block.__class__ = Differs
        setattr(block, name, value if number == 2 else type(value)())
    assert wrap(model).no_gather.startswith("its blocks depend on positions or on their number")


def test_blocks_whose_arguments_differ_are_probed():
    """One of four equal blocks gets a causal mask from the model."""
    model = four_layers()

    def make_causal(block, args, kwargs):
        length = args[0].shape[1]
        return args, kwargs | {"attention_mask": torch.ones(1, 1, length, length).tril().bool()}

    model.layers[2].register_forward_pre_hook(make_causal, with_kwargs=True)
    with pytest.raises(ValueError, match="has causal blocks, such as 2: positions do not see later ones"):
        wrap(model)


def blocks_that(change, which=slice(None)):
    """DINOv2 with 3 registers and a CLS token, with blocks that run on `change(x)`; x is (B, 4 + T, 32)."""
    model = plain("dinov2_with_registers")
    layer = type(model.encoder.layer[0])

    class Changed(layer):
        def forward(self, x, *args, **kwargs):
            return super().forward(change(x), *args, **kwargs)

    for block in model.encoder.layer[which]:
        block.__class__ = Changed
    return model


def count(x):
    """(N, 32), values that depend on the index of a token."""
    return torch.sin(torch.arange(x.shape[1], dtype=x.dtype)[:, None] + torch.arange(x.shape[2], dtype=x.dtype))


ATTACKS = {
    "number of tokens": (lambda x: x * (1 + 0.01 * x.shape[1]), slice(None)),
    "index of a token": (lambda x: x + count(x), slice(None)),
    "index in the last layer": (lambda x: x + count(x), slice(2, 3)),
    "index in a middle layer": (lambda x: x + count(x), slice(1, 2)),
    "mean over all tokens": (lambda x: x + x.mean(1, keepdim=True), slice(None)),
    "norm over all tokens": (lambda x: x / x.std(1, keepdim=True), slice(None)),
    "positions in the first block": (lambda x: x + count(x), slice(0, 1)),
    "a fixed number of positions": (lambda x: x + count(x.new_zeros(1, 20, 32)), slice(0, 1)),
    "neighbour": (lambda x: x + x.roll(1, 1), slice(None)),
    "last token": (lambda x: x + x[:, -1:], slice(2, 3)),
}
HARMLESS = {
    "nothing": lambda x: x,
    "scale of registers": lambda x: torch.cat([2 * x[:, :4], x[:, 4:]], 1),
    "sum of registers": lambda x: x + x[:, :4].sum(1, keepdim=True),
}


@pytest.mark.parametrize("attack", ATTACKS)
def test_blocks_that_see_more_than_the_visible_positions_do_not_gather(attack):
    encoder = wrap(blocks_that(*ATTACKS[attack]))
    assert encoder.extra == 4
    assert encoder.no_gather == "its blocks depend on positions or on their number, or its attention is not a softmax"


@pytest.mark.parametrize("change", HARMLESS)
def test_blocks_that_count_their_extra_tokens_gather(change, monkeypatch):
    model, x = blocks_that(HARMLESS[change]), inputs("dinov2_with_registers", batch=1)
    encoder, visible = wrap(model), torch.tensor([[1, 4, 6, 7, 11]])
    assert encoder.gathers
    mask = torch.ones(1, 1, 16, dtype=torch.bool).scatter(2, visible[None], False)
    found = encoder.transform(encoder.place_visible(encoder.embed(x), mask, visible), visible=visible)
    attend, seen = nn.functional.scaled_dot_product_attention, torch.cat([torch.ones(1, 4, dtype=torch.bool), ~mask[0]], 1)
    monkeypatch.setattr(
        nn.functional, "scaled_dot_product_attention", lambda q, k, v, attn_mask=None, **more: attend(q, k, v, seen, **more)
    )
    expected = states_of(model, x)
    torch.testing.assert_close(found.states, expected[:, 4 + visible[0]], rtol=0, atol=1e-12)
    torch.testing.assert_close(found.extra, expected[:, :4], rtol=0, atol=1e-12)


@pytest.mark.parametrize("at", [16, 8], ids=["end", "middle"])
def test_extra_tokens_behind_or_among_the_positions_are_refused(at):
    model = plain("siglip_vision_model")

    class WithToken(type(model.embeddings)):
        def forward(self, *args, **kwargs):
            x = super().forward(*args, **kwargs)
            return torch.cat([x[:, :at], torch.ones_like(x[:, :1]), x[:, at:]], 1)

    model.embeddings.__class__ = WithToken
    with pytest.raises(ValueError, match="extra tokens come after or among the positions"):
        wrap(model, features="embeddings.patch_embedding")


def test_padding_is_refused_if_attention_ignores_it():
    encoder = wrap(plain("whisper"))
    padding = torch.zeros(3, 20, dtype=torch.bool)
    padding[:, 15:] = True
    with pytest.raises(ValueError, match="padding_mask: WhisperEncoder attends to padding despite its attention_mask; crop"):
        encoder(inputs("whisper"), padding)


RUNS = {
    "text": "encoder.model=modernbert encoder.config.local_attention=8 data.vocab_size=400 data.block_size=32",
    "vision": "encoder.model=dinov3_vit encoder.init=hf encoder.config.num_register_tokens=2",
    "audio": "encoder.model=sew encoder.config.conv_dim=[8,8,8,8,8,8,8] data.max_seconds=0.5 data.join_seconds=0.5 "
    "encoder.config.squeeze_factor=2 encoder.config.num_conv_pos_embeddings=8 encoder.config.num_conv_pos_embedding_groups=4",
}


@pytest.mark.parametrize("modality", RUNS)
def test_a_run_with_a_spliced_encoder(modality, tmp_path):
    small = [f"encoder.config.{n}" for n in ("hidden_size=32", "num_hidden_layers=3", "num_attention_heads=2")]
    more = ["encoder.config.intermediate_size=48", "targets.top_k=2", "train.steps=3", "train.workers=0", "train.batch_size=4"]
    run = tmp_path / "run"
    args = ["--config", f"{modality}/tiny", *RUNS[modality].split(), *small, *more, f"train.output={run}"]
    assert train(parse([*args, "train.precision=fp32"])[0]) == 0
    assert json.loads((run / "log.jsonl").read_text().splitlines()[-1])["step"] == 3
    again = build_encoder(pretrained=str(run / "export"))
    assert isinstance(again, SplicedEncoder)
    assert AutoModel.from_pretrained(run / "export").config.model_type == again.model.config.model_type


def test_a_spectrogram_encoder_is_refused_for_waveforms(tmp_path):
    args = ["--config", "audio/tiny", "encoder.model=audio-spectrogram-transformer", f"train.output={tmp_path / 'run'}"]
    more = [f"encoder.config.{k}={v}" for k, v in FAMILIES["audio-spectrogram-transformer"].config.items()]
    with pytest.raises(ConfigError, match="ASTModel does not read inputs of modality=audio"):
        train(parse([*args, *more])[0])


def test_the_table_of_supported_encoders(tmp_path, capsys):
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- encoders -->\nold\n<!-- /encoders -->\nafter\n")
    table.main([str(page), "modernbert", "swin", "roberta", "bart"])
    text = page.read_text()
    assert text.startswith("before\n<!-- encoders -->\nTried with transformers")
    assert text.endswith("<!-- /encoders -->\nafter\n")
    assert "4 model types, of which 3 work with data2vec 1.0 and 3 of them with 2.0" in text and "old" not in text
    assert "| `modernbert` | ModernBertModel | whole | yes | yes |" in text
    assert "| `roberta` | RobertaModel | in pieces | yes | yes |" in text
    assert "| `swin` | SwinModel | | no: is hierarchical: 64 local features become 16 states, so no mask" in text
    table.main(["swin"])
    assert "SwinModel" in capsys.readouterr().out
    assert len(table.names()) > 100


TIMM = {
    "vit_base_patch16_224": ("vit_mae", IMAGE | dict(mask_ratio=0.0)),
    "vit_tiny_patch16_224": ("siglip_vision_model", IMAGE),
    "vit_base_patch16_clip_224": ("siglip_vision_model", IMAGE),
    "beit_large_patch16_512": ("mlcd_vision_model", IMAGE),
    "swin_tiny_window7_224": ("swin", dict(image_size=32, embed_dim=16, depths=[1, 1], num_heads=[2, 2], window_size=4)),
    "resnet_18": None,
    "broken_vit": None,
}


def test_the_table_of_timm(monkeypatch, tmp_path, capsys):
    """With a stand-in for timm that returns transformers models and takes no `depth`."""
    timm, made = types.ModuleType("timm"), []

    def create_model(name, num_classes, **fields):
        if name == "broken_vit":
            raise RuntimeError("a | b")
        if "depth" in fields:
            raise TypeError("__init__() got an unexpected keyword argument 'depth'")
        made.append((name, fields))
        if TIMM[name] is None:
            return nn.Conv2d(3, 4, 3)
        kind, config = TIMM[name]
        model = AutoModel.from_config(transformers.CONFIG_MAPPING[kind](**config))
        model.num_heads = 2
        return model

    timm.__version__, timm.create_model, timm.list_models = "9.8", create_model, lambda exclude_filters: list(TIMM)
    timm.model_entrypoint = lambda name: create_model
    monkeypatch.setitem(sys.modules, "timm", timm)
    monkeypatch.setattr(
        table, "build_encoder", lambda name, config: build_encoder(*TIMM[name[5:]][:1], config=TIMM[name[5:]][1])
    )
    page = tmp_path / "page.md"
    page.write_text("before\n<!-- timm -->\nold\n<!-- /timm -->\nafter\n")
    table.main(["--timm", str(page)])
    text = page.read_text()
    assert text.startswith("before\n<!-- timm -->\nTried with timm 9.8") and text.endswith("|\n<!-- /timm -->\nafter\n")
    assert "5 families, of which 3 work with data2vec 1.0 and 2 of them with 2.0" in text
    assert "| `vit_*`, `vit_*_clip_*` | SiglipVisionModel | yes | yes |" in text
    assert "| `beit_*` | MLCDVisionModel | yes | no: its blocks depend on positions or on their number" in text
    assert "| `swin_*` | SwinModel | no: is hierarchical: 64 local features become 16 states, so no mask fits" in text
    assert "| `broken_vit` |  | no: a \\| b | no |" in text and "resnet" not in text
    sizes = dict(img_size=32, patch_size=8, embed_dim=48, num_heads=4)
    assert made[0][1] == sizes and [name for name, _ in made].count("vit_base_patch16_224") == 0
    table.main(["--timm", "vit_tiny_patch16_224"])
    assert "| `vit_tiny_patch16_224` | SiglipVisionModel | yes | yes |" in capsys.readouterr().out


def test_families_of_timm(monkeypatch):
    timm = types.ModuleType("timm")
    names = "eva02_tiny_patch14_224 eva02_small_patch14_336 vit_so400m_patch14_siglip_gap_384 vit_base_patch16_siglip_gap_224 "
    names += "vit_base_patch14_reg4_dinov2 vit_small_r26_s32_224 volo_d1_224 convit_base convit_tiny tiny_vit_5m_224"
    timm.list_models = lambda exclude_filters: sorted([*names.split(), "resnet_18"])
    timm.model_entrypoint = lambda name: difflib.get_close_matches if name == "resnet_18" else test_families_of_timm
    monkeypatch.setitem(sys.modules, "timm", timm)
    assert table.families() == {
        "convit_*": "convit_tiny",
        "eva02_*": "eva02_tiny_patch14_224",
        "vit_*_siglip_gap_*": "vit_base_patch16_siglip_gap_224",
        "vit_*_reg*_dinov2": "vit_base_patch14_reg4_dinov2",
        "vit_*_r26_*": "vit_small_r26_s32_224",
        "volo_*": "volo_d1_224",
        "tiny_vit_*": "tiny_vit_5m_224",
    }
