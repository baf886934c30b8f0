import math

import pytest
import torch
from torch import nn
from transformers import AutoModel

from d2v_fast import Data2Vec, Encoder, TargetsConfig, build_encoder, wrap
from tests.models import CONFIGS, IMAGES, TEXTS, WAVES, Handwritten, inputs, make


def half_padded(length, batch=2):
    padding = torch.zeros(batch, length, dtype=torch.bool)
    padding[0, length // 2 :] = True
    return padding


@pytest.mark.parametrize("name", CONFIGS)
def test_split_equals_the_whole_model(name):
    """embed → contextualize is bit-identical to the forward of transformers."""
    encoder, x = make(name).eval(), inputs(name)
    with torch.no_grad():
        ours, theirs = encoder(x), encoder.model(x).last_hidden_state
    assert torch.equal(ours, theirs[:, theirs.shape[1] - ours.shape[1] :])


@pytest.mark.parametrize("name", [*TEXTS, *IMAGES])
def test_split_drops_what_the_whole_model_drops(name):
    config = CONFIGS[name] | dict(hidden_dropout_prob=0.3, attention_probs_dropout_prob=0.2)
    encoder, x = build_encoder(name, config=config).train(), inputs(name)
    torch.manual_seed(2)
    ours = encoder(x)
    torch.manual_seed(2)
    theirs = encoder.model(x).last_hidden_state
    assert torch.equal(ours, theirs[:, theirs.shape[1] - ours.shape[1] :])


@pytest.mark.parametrize("name", TEXTS)
def test_split_equals_the_whole_model_with_padding(name):
    encoder, x = make(name).eval(), inputs(name)
    padding = half_padded(12)
    x[padding] = encoder.model.config.pad_token_id
    with torch.no_grad():
        ours = encoder(x, padding)
        theirs = encoder.model(x, attention_mask=(~padding).long()).last_hidden_state
        alone = encoder(x[:1, :6])
    assert torch.equal(ours[~padding], theirs[~padding])
    assert torch.allclose(ours[0, :6], alone[0], atol=1e-5), "padding leaks into the context"


@pytest.mark.parametrize("name", WAVES)
def test_split_equals_the_whole_model_with_padded_speech(name):
    encoder, x = make(name).eval(), inputs(name)
    samples = torch.ones_like(x, dtype=torch.long)
    samples[0, 240:] = 0
    frames = encoder.positions(400)
    padding = torch.arange(frames) >= torch.tensor([encoder.positions(240), frames])[:, None]
    with torch.no_grad():
        features = encoder.embed(x)
        kept = features.clone()
        ours = encoder.contextualize(features, padding)
        theirs = encoder.model(x, attention_mask=samples).last_hidden_state
    assert torch.equal(ours[~padding], theirs[~padding])
    assert torch.equal(features, kept), "the caller's features were changed in place"


@pytest.mark.parametrize("name", IMAGES)
def test_masked_patches_equal_the_models_own_masking(name):
    encoder, x = make(name).eval(), inputs(name)
    mask = torch.rand(2, 16) < 0.5
    with torch.no_grad():
        ours = encoder.contextualize(encoder.mask_features(encoder.embed(x), mask))
        theirs = encoder.model(x, bool_masked_pos=mask).last_hidden_state
    assert torch.allclose(ours, theirs[:, theirs.shape[1] - 16 :], atol=1e-6)


@pytest.mark.parametrize("name", WAVES)
def test_masked_frames_equal_the_models_own_masking(name):
    encoder, x = make(name).eval(), inputs(name)
    mask = torch.rand(2, encoder.positions(400)) < 0.5
    with torch.no_grad():
        ours = encoder.contextualize(encoder.mask_features(encoder.embed(x), mask))
        theirs = encoder.model(x, mask_time_indices=mask).last_hidden_state
    assert torch.allclose(ours, theirs, atol=1e-6)


@pytest.mark.parametrize("name", WAVES)
def test_dropout_of_the_projection_is_the_students(name):
    """The teacher also uses the result of `embed` unless its scope is "all" (method 1.6)."""
    encoder, x = make(name), inputs(name)
    encoder.model.feature_projection.dropout.p = 0.5
    features, mask = encoder.embed(x), torch.zeros(2, encoder.positions(400), dtype=torch.bool)
    mask[:, 3] = True
    assert torch.equal(features, encoder.embed(x)) and not (features == 0).any()
    masked = encoder.mask_features(features, mask)
    assert 0.3 < (masked[~mask] == 0).float().mean() < 0.7
    assert torch.equal(masked[mask], encoder.mask_token.expand(2, -1))


@pytest.mark.parametrize("name", WAVES)
@pytest.mark.parametrize("samples", [30, 31, 399, 400, 1234])
def test_positions_of_a_waveform(name, samples):
    encoder = make(name).eval()
    with torch.no_grad():
        assert encoder.embed(torch.randn(1, samples)).shape[1] == encoder.positions(samples)
    assert encoder.positions(5) == 0


FFN_OUTPUT = {
    "roberta": "encoder.layer.{}.output.dense",
    "bert": "encoder.layer.{}.output.dense",
    "data2vec-text": "encoder.layer.{}.output.dense",
    "beit": "layers.{}.mlp.fc2",
    "vit": "layers.{}.mlp.fc2",
    "deit": "layers.{}.mlp.fc2",
    "data2vec-vision": "encoder.layer.{}.output.dense",
    "wav2vec2": "encoder.layers.{}.feed_forward.output_dense",
    "hubert": "encoder.layers.{}.feed_forward.output_dense",
    "data2vec-audio": "encoder.layers.{}.feed_forward.output_dense",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_ffn_taps_are_what_the_specification_names(name):
    """The reference is hooks set by hand on modules named by hand."""
    encoder, x = make(name).eval(), inputs(name)
    seen = []
    for i in (1, 2):
        module = encoder.model.get_submodule(FFN_OUTPUT[name].format(i))
        module.register_forward_hook(lambda m, a, out: seen.append(out))
    with torch.no_grad():
        states, taps, _ = encoder.transform(encoder.place(encoder.embed(x)), layers=2)
    for i, (tap, out) in enumerate(zip(taps, seen, strict=True), start=1):
        scale = getattr(encoder.blocks[i], "lambda_2", 1.0)  # BEiT's layer scale belongs to the result (method 1.3)
        assert torch.equal(tap, (out * scale)[:, out.shape[1] - states.shape[1] :])


@pytest.mark.parametrize("name", CONFIGS)
def test_block_taps_equal_hidden_states(name):
    encoder, x = make(name, attention="eager").eval(), inputs(name)
    seen = []
    with torch.no_grad():
        placed = encoder.place(encoder.embed(x))
        length = placed.shape[1]
        inputs_, outputs = (encoder.transform(placed, layers=3, source=f"block_{end}").layers for end in ("input", "output"))
        for block in encoder.blocks:
            block.register_forward_hook(lambda m, a, out: seen.append(out[0] if isinstance(out, tuple) else out))
        encoder(x)
    for tap, out in zip(outputs, seen, strict=True):
        assert torch.equal(tap, out[:, out.shape[1] - length :])
    assert torch.equal(inputs_[1], outputs[0]) and torch.equal(inputs_[2], outputs[1])


@pytest.mark.parametrize(
    "name, more",
    [
        *((name, {}) for name in ("roberta-prelayernorm", "xlm-roberta", "xlm-roberta-xl", "camembert", "ernie", "roformer")),
        *((name, {}) for name in ("nystromformer", "megatron-bert", "splinter", "rembert")),
        ("electra", dict(embedding_size=32)),
        ("big_bird", dict(attention_type="original_full")),
    ],
)
def test_more_families_by_token_ids(name, more):
    """The encoder is compared with the whole model when created; RobertaPreLayerNorm has a norm after its blocks."""
    encoder = build_encoder(name, config=CONFIGS["roberta"] | dict(pad_token_id=1) | more).eval()
    x = torch.randint(5, 60, (2, 12))
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), encoder.model(x).last_hidden_state)


def test_what_computes_other_states_than_its_pieces_is_refused_and_left_as_it_was():
    model = make("roberta").model
    model.encoder.layer[1].eval()
    training, state = [m.training for m in model.modules()], torch.get_rng_state()
    wrap(model)
    assert [m.training for m in model.modules()] == training and torch.equal(torch.get_rng_state(), state)
    forward = model.forward
    model.forward = lambda input_ids: type("Output", (), {"last_hidden_state": 2 * forward(input_ids).last_hidden_state})
    with pytest.raises(ValueError, match=r"RobertaModel cannot be spliced: its blocks encoder.layer are not called as modules"):
        wrap(model)
    assert [m.training for m in model.modules()] == training


def test_block_list_of_every_family_is_found():
    for name in CONFIGS:
        assert len(make(name).blocks) == 3


def test_a_custom_encoder():
    encoder = Encoder(Handwritten(), layers="blocks", ffn="mlp.2")
    x = torch.randn(2, 9, 6)
    seen = []
    encoder.model.blocks[2].mlp.register_forward_hook(lambda m, a, out: seen.append(out))
    states, layers, _ = encoder.transform(encoder.embed(x), layers=1)
    assert torch.equal(layers[0], seen[0])
    assert states.shape == (2, 9, 32) and torch.equal(states, encoder.model.contextualize(encoder.model.embed(x)))
    masked = encoder.mask_features(encoder.embed(x), torch.ones(2, 9, dtype=torch.bool))
    assert torch.equal(masked, encoder.mask_token.expand(2, 9, 32)) and encoder.mask_token.requires_grad
    assert 0.01 < encoder.mask_token.std() < 0.03


def test_a_custom_class_by_name():
    encoder = build_encoder("tests.models:Handwritten", config=dict(depth=2), layers="blocks", ffn="mlp.2")
    assert len(encoder.blocks) == 2


@pytest.mark.parametrize("name", CONFIGS)
def test_saved_and_loaded_by_transformers_and_by_us(name, tmp_path):
    encoder, x = make(name).eval(), inputs(name)
    encoder.save(tmp_path)
    kwargs = {} if name in WAVES else dict(add_pooling_layer=False)
    theirs = AutoModel.from_pretrained(tmp_path, **kwargs).eval()
    again = build_encoder(pretrained=str(tmp_path)).eval()
    with torch.no_grad():
        states = encoder(x)
        assert torch.equal(again(x), states)
        out = theirs(x).last_hidden_state
        assert torch.equal(out[:, out.shape[1] - states.shape[1] :], states)


def test_a_custom_encoder_is_saved_and_loaded(tmp_path):
    settings = dict(layers="blocks", ffn="mlp.2")
    encoder = build_encoder("tests.models:Handwritten", **settings)
    encoder.save(tmp_path)
    again = build_encoder("tests.models:Handwritten", pretrained=str(tmp_path), **settings)
    assert torch.equal(again.model.stem.weight, encoder.model.stem.weight)


def test_scopes_of_the_teacher():
    """The parameters that are copied rather than averaged (method 1.6)."""

    def copied(name, scope):
        encoder = make(name)
        patterns = encoder.not_averaged(scope)
        return {n for n, _ in encoder.named_parameters() if any(n.startswith(p[:-1]) for p in patterns)}

    for name in ("roberta", "beit", "data2vec-audio"):
        assert not copied(name, "all")
    text = copied("roberta", "layers")
    assert text and all("embeddings" in n for n in text)
    audio, audio_layers = copied("data2vec-audio", "encoder"), copied("data2vec-audio", "layers")
    assert any("feature_extractor" in n for n in audio) and any("feature_projection" in n for n in audio)
    assert not any("encoder." in n.removeprefix("model.") and "masked" not in n for n in audio)
    assert {n for n in audio_layers - audio} == {n for n in audio_layers if "pos_conv_embed" in n} != set()
    assert not any(n.startswith(("model.encoder.layers.", "model.encoder.layer_norm")) for n in audio_layers)
    image = copied("beit", "encoder")
    assert any("patch_embeddings" in n for n in image) and not any("shared_position_bias" in n for n in image)


def test_feature_grad_mult_scales_the_convolutions_only():
    grads = []
    for factor in (1.0, 0.1, 0.0):
        encoder = make("data2vec-audio", feature_grad_mult=factor)
        x = inputs("data2vec-audio")
        torch.manual_seed(0)
        encoder(torch.randn_like(x)).square().sum().backward()
        conv = encoder.model.feature_extractor.conv_layers[0].conv.weight.grad
        grads.append((conv, encoder.model.feature_projection.projection.weight.grad))
    assert torch.allclose(grads[1][0], 0.1 * grads[0][0], rtol=1e-3, atol=1e-6)
    assert grads[2][0] is None
    assert not any(p.requires_grad for p in encoder.model.feature_extractor.parameters())
    for other in grads[1:]:
        assert torch.allclose(other[1], grads[0][1], rtol=1e-3, atol=1e-4)


def test_the_authors_initialisation():
    encoder = build_encoder("beit", config=CONFIGS["beit"] | dict(hidden_size=64, intermediate_size=256), init="data2vec")
    for depth, block in enumerate(encoder.blocks, start=1):
        inner, out = block.mlp.fc1.weight.std(), block.mlp.fc2.weight.std()
        # A normal cut at one std keeps .54 of it.
        assert float(inner) == pytest.approx(0.02 * 0.54, rel=0.05)
        assert float(out) == pytest.approx(float(inner) / (2 * depth) ** 0.5, rel=0.05)
        assert float(block.attention.o_proj.weight.std()) == pytest.approx(float(inner) / (2 * depth) ** 0.5, rel=0.08)
    assert float(encoder.mask_token.std()) == pytest.approx(0.02 * 0.54, rel=0.3)
    assert (encoder.model.shared_position_bias.relative_position_bias_table == 0).all()


def test_sincos_positions():
    encoder = build_encoder("vit", config=CONFIGS["vit"], init="sincos")
    positions = encoder.model.embeddings.position_embeddings
    assert not positions.requires_grad and (positions[0, 0] == 0).all()
    row, column, i = 2, 3, 5  # of a grid of 4 × 4, 32 channels: 8 frequencies
    omega = 1 / 10_000 ** (i / 8)
    found = positions[0, 1 + 4 * row + column, [i, 8 + i, 16 + i, 24 + i]].tolist()
    expected = [math.sin(column * omega), math.cos(column * omega), math.sin(row * omega), math.cos(row * omega)]
    assert found == pytest.approx(expected, abs=1e-6)
    with pytest.raises(ValueError, match="has no absolute positions"):
        build_encoder("beit", config=CONFIGS["beit"], init="sincos")
    with pytest.raises(ValueError, match="only for ViT, BEiT and similar models, found RobertaModel"):
        build_encoder("roberta", config=CONFIGS["roberta"], init="sincos")


class NoBlocks(nn.Module):
    hidden_size = 8

    def __init__(self):
        super().__init__()
        self.only = nn.Linear(8, 8)

    def embed(self, inputs):
        return inputs

    def contextualize(self, features, padding_mask=None):
        return self.only(features)


@pytest.mark.parametrize(
    "layout, found",
    [
        (lambda x: x.transpose(1, 2), r"\(2, 32, 5\)"),
        (lambda x: x.transpose(1, 2).unsqueeze(2), r"\(2, 32, 1, 5\)"),
        (lambda x: (x,), "tuple"),
    ],
)
def test_features_of_an_own_module_in_another_layout_are_refused(layout, found):
    class Other(Handwritten):
        def embed(self, inputs):
            return layout(super().embed(inputs))

    message = rf"Other.embed: found {found}, expected \(batch, positions, hidden_size = 32\); x.flatten\(2\).transpose\(1, 2\)"
    with pytest.raises(ValueError, match=message):
        model = Data2Vec(wrap(Other(), layers="blocks"), targets=TargetsConfig(top_k=1))
        model(torch.randn(2, 5, 6), torch.ones(2, 5, dtype=torch.bool))


@pytest.mark.parametrize(
    "attempt, named",
    [
        (lambda: wrap(NoBlocks()), "cannot find the transformer layers of NoBlocks"),
        (lambda: wrap(nn.Linear(2, 2)), "Linear is neither"),
        (
            lambda: Encoder(NoBlocks(), layers="blocks"),
            "encoder.layers=blocks: 'blocks': NoBlocks has no attribute 'blocks'; its",
        ),
        (
            lambda: build_encoder("swin", config=dict(num_attention_heads=3)),
            "object is not subscriptable; set other fields of SwinConfig",
        ),
        (lambda: Encoder(NoBlocks(), layers="only"), "found a Linear, expected an nn.ModuleList"),
        (lambda: Data2Vec(make("roberta"), targets=TargetsConfig(top_k=4)), "top_k: found 4, but RobertaModel has 3 layers"),
        (lambda: Data2Vec(make("roberta"), targets=TargetsConfig(top_k=0)), "top_k: found 0"),
        (
            lambda: Data2Vec(Encoder(Handwritten(), layers="blocks", ffn="mpl.2"), targets=TargetsConfig(top_k=1)),
            "encoder.ffn=mpl.2: not in Block",
        ),
        (lambda: build_encoder("robreta"), "did you mean 'roberta'"),
        (lambda: build_encoder("roberta", config=dict(hiden_size=3)), "did you mean 'hidden_size'"),
        (lambda: build_encoder("roberta", config=dict(hidden_act="foo")), "encoder.config={'hidden_act': 'foo'}: RobertaModel"),
        (
            lambda: build_encoder("roberta", config=dict(hidden_size=100, num_attention_heads=3)),
            "encoder.config={'hidden_size'",
        ),
        (lambda: build_encoder("roberta", attention="flash_attention_9"), "encoder.attention=flash_attention_9: RobertaModel"),
        (lambda: build_encoder("tests.models:Missing"), "Missing"),
        (lambda: build_encoder("no_such_module:Missing"), "no_such_module"),
    ],
)
def test_what_cannot_be_built_is_explained(attempt, named):
    with pytest.raises(ValueError) as error:
        attempt()
    assert named in str(error.value)


def test_blocks_that_are_not_called_are_named():
    class Direct(Handwritten):
        def contextualize(self, features, padding_mask=None):
            for block in self.blocks:
                features = block.forward(features, padding_mask)
            return features

    encoder = Encoder(Direct(), layers="blocks", ffn="mlp.2")
    with pytest.raises(ValueError, match="Direct: 2 of the last 2 blocks gave no result"):
        encoder.transform(encoder.embed(torch.randn(2, 9, 6)), layers=2, source="block_output")
