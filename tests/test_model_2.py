"""The data2vec 2.0 model in float64 against the released modules (`released`), and invariants for any weights."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from d2v_fast import Data2Vec, EMAConfig, Encoder, HeadConfig, LossConfig, TargetsConfig, build_encoder, ops
from d2v_fast.decoders import ConvDecoder
from d2v_fast.fused import fuse
from d2v_fast.masking import visible_positions
from d2v_fast.ops.reference import make_targets, mean_over_time
from tests import released
from tests.models import COMMON, CONFIGS, IMAGES, TEXT, TEXTS, WAVE, Handwritten, arguments, inputs

SMALL = dict(hidden_size=32, num_attention_heads=4, intermediate_size=48)
NO_DROPOUT = dict(hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0)
ENCODERS = {  # same shapes as in `released`
    "image": ("data2vec2-vision", dict(image_size=16, patch_size=4, layer_norm_eps=1e-6)),
    "audio": (
        "data2vec2-audio",
        dict(
            conv_dim=(16,) * 4,
            conv_kernel=(10, 3, 3, 2),
            conv_stride=(5, 2, 2, 2),
            num_feat_extract_layers=4,
            conv_pos_kernel_size=5,
            num_conv_pos_embeddings=5,
            num_conv_pos_embedding_groups=8,
            **NO_DROPOUT,
        ),
    ),
    "text": ("roberta", TEXT | dict(vocab_size=70, max_position_embeddings=34, pad_token_id=1)),
}
SCOPES = {"image": "all", "audio": "encoder", "text": "layers"}
TREES = {  # module names of a block: method 6.2 → ours
    "bert": {
        **{"attn.q": "attention.self.query", "attn.k": "attention.self.key", "attn.v": "attention.self.value"},
        **{"attn.proj": "attention.output.dense", "norm1": "attention.output.LayerNorm"},
        **{"mlp.fc1": "intermediate.dense", "mlp.fc2": "output.dense", "norm2": "output.LayerNorm"},
    },
    "wave": {
        **{"attn.q": "attention.q_proj", "attn.k": "attention.k_proj", "attn.v": "attention.v_proj"},
        **{"attn.proj": "attention.out_proj", "norm1": "layer_norm", "norm2": "final_layer_norm"},
        **{"mlp.fc1": "feed_forward.intermediate_dense", "mlp.fc2": "feed_forward.output_dense"},
    },
}
STACK = "student.model.feature_extractor.conv_layers"
PLACES = {
    "image": {
        "extra_tokens": "student.model.embeddings.cls_token",
        "local_encoder.proj": "student.model.embeddings.patch_embeddings.projection",
        "context_encoder.norm": "student.model.embeddings.layernorm",
    },
    "audio": {
        **{f"local_encoder.conv_layers.{i}.0": f"{STACK}.{i}.conv" for i in range(4)},
        **{f"local_encoder.conv_layers.{i}.2.1": f"{STACK}.{i}.layer_norm" for i in range(4)},
        **{f"relative_positional_encoder.{i + 1}.0": f"student.model.encoder.pos_conv_embed.layers.{i}.conv" for i in range(5)},
        "project_features.1": "student.model.feature_projection.layer_norm",
        "project_features.2": "student.model.feature_projection.projection",
        "context_encoder.norm": "student.model.encoder.layer_norm",
        "alibi_scale": "student.model.encoder.alibi_scale",
    },
    "text": {
        "local_encoder.embed_tokens": "student.model.embeddings.word_embeddings",
        "local_encoder.embed_positions": "student.model.embeddings.position_embeddings",
        "local_encoder.layernorm_embedding": "student.model.embeddings.LayerNorm",
    },
}  # fmt: skip


def renamed(modality, tensors, prenet):
    """Weights or gradients of `released` under the names of `Data2Vec`."""
    stack = "encoder.layers" if modality == "audio" else "encoder.layer"
    parts = TREES["wave" if modality == "audio" else "bert"]
    found = {}
    for name, tensor in tensors.items():
        name = name.removeprefix(f"modality_encoders.{modality.upper()}.")
        if name == "fixed_positional_encoder.positions":
            continue
        if match := re.fullmatch(r"(context_encoder\.)?blocks\.(\d+)\.(.+)\.(weight|bias)", name):
            layer = int(match[2]) + (0 if match[1] else prenet)
            if match[3] == "attn.qkv":
                for part, each in zip("qkv", tensor.chunk(3), strict=True):
                    found[f"student.model.{stack}.{layer}.{parts[f'attn.{part}']}.{match[4]}"] = each
            else:
                found[f"student.model.{stack}.{layer}.{parts[match[3]]}.{match[4]}"] = tensor
        elif match := re.fullmatch(r"decoder\.blocks\.(\d+)\.0\.(.+)", name):
            found[f"head.convolutions.{match[1]}.{match[2]}"] = tensor
        elif match := re.fullmatch(r"decoder\.proj\.(?:(\d)\.)?(.+)", name):
            found[f"head.projection.{match[1] or 0}.{match[2]}"] = tensor
        elif name in PLACES[modality]:
            found[PLACES[modality][name]] = tensor
        else:
            path, _, kind = name.rpartition(".")
            found[f"{PLACES[modality][path]}.{kind}"] = tensor
    return found


def encoder_like(modality, theirs):
    """An encoder with the shapes of a released model."""
    name, config = ENCODERS[modality]
    own = theirs.encoder.own
    config = config | SMALL | dict(num_hidden_layers=own["prenet_depth"] + len(theirs.blocks))
    if modality == "audio":
        config |= dict(learned_alibi_scale=own["learned_alibi_scale"], alibi_per_layer=own["learned_alibi_scale_per_layer"])
    return build_encoder(name, config=config)


def same(modality, theirs, teacher, **settings):
    """Our model in float64 with the weights of a released student and its teacher; `settings` are those of the loss."""
    encoder, own = encoder_like(modality, theirs), theirs.encoder.own
    cfg, decoder = theirs.cfg["model"], own["decoder"]
    predictor = ConvDecoder(
        32,
        2 if modality == "image" else 1,
        width=decoder["decoder_dim"],
        kernel=decoder["decoder_kernel"],
        layers=decoder["decoder_layers"],
        groups=decoder["decoder_groups"],
        residual=decoder["decoder_residual"],
        projection_layers=decoder["projection_layers"],
        noise=own["mask_noise_std"],
    )
    targets = TargetsConfig(
        top_k=cfg["average_top_k_layers"],
        norm="instance" if cfg["instance_norm_target_layer"] else "layer",
        target_norm="layer" if cfg["layer_norm_targets"] else "instance" if cfg["instance_norm_targets"] else "none",
    )
    loss = LossConfig(beta=cfg["loss_beta"], scale=cfg["loss_scale"] or "auto", **settings)
    model = Data2Vec(encoder, predictor, targets=targets, loss=loss, ema=EMAConfig(scope=SCOPES[modality])).double()
    prenet, state = own["prenet_depth"], model.state_dict()
    ours = renamed(modality, theirs.state_dict(), prenet)
    of_teacher = renamed(modality, teacher.state_dict(), prenet)
    ours |= {n.replace("student.", "teacher.module.", 1): t for n, t in of_teacher.items() if n.startswith("student.")}
    loaded = model.load_state_dict(ours, strict=False)
    assert not loaded.unexpected_keys
    # The released models have neither the mask vector of data2vec 1.0 nor token types.
    unknown = ("mask_embedding", "masked_spec_embed", "token_type_embeddings.weight", "_extra_state", "alibi_scale")
    assert all(name.endswith(unknown) for name in loaded.missing_keys), loaded.missing_keys
    with torch.no_grad():
        for name in loaded.missing_keys:
            if name.endswith("token_type_embeddings.weight"):
                state[name].zero_()
    return model.train()


def random_masks(batch, views, length, masked, seed=0):
    scores = torch.rand(batch, views, length, generator=torch.Generator().manual_seed(seed))
    return scores.argsort(-1).argsort(-1) < masked


def example(modality, theirs, batch=2):
    generator = torch.Generator().manual_seed(5)
    if modality == "image":
        return torch.randn(batch, 3, 16, 16, generator=generator, dtype=torch.float64)
    if modality == "audio":
        return torch.randn(batch, 600, generator=generator, dtype=torch.float64)
    return torch.randint(4, 70, (batch, 12), generator=generator)


def noise_of(model, mask, seed):
    """The noise that `restore` draws after this seed, in the layout of `released`: (B·M, masked, C)."""
    torch.manual_seed(seed)
    rows = mask.flatten(0, 1)
    drawn = torch.randn(rows.numel(), 32, dtype=torch.float64) * model.head.noise
    return drawn.view(*rows.shape, 32)[rows].view(len(rows), -1, 32)


CASES = {
    "image": ("image", {}, {}),
    "image, smooth-L1, norm of layers, other scale": (
        "image",
        dict(prenet_depth=0, decoder=dict(decoder_dim=64, decoder_kernel=5, decoder_layers=2)),
        dict(loss_beta=0.5, loss_scale=3.0, instance_norm_target_layer=False, layer_norm_target_layer=True, cls_loss=1.0),
    ),
    "image, even kernel": (
        "image",
        dict(decoder=dict(decoder_kernel=4)),
        dict(instance_norm_targets=True, layer_norm_targets=False),
    ),
    "audio": ("audio", {}, {}),
    "audio, a scale for each layer": ("audio", dict(prenet_depth=2, learned_alibi_scale_per_layer=True), dict(loss_beta=0.3)),
    "audio, fixed scale": ("audio", dict(learned_alibi_scale=False, decoder=dict(decoder_kernel=6)), {}),
    "text": ("text", {}, {}),
    "text, norms of the large model, even kernel, residual": (
        "text",
        dict(mask_noise_std=0.0, decoder=dict(decoder_kernel=4, decoder_residual=True)),
        dict(
            average_top_k_layers=2,
            instance_norm_target_layer=False,
            layer_norm_target_layer=True,
            instance_norm_targets=True,
            loss_beta=4.0,
        ),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case, reduction", [*((case, "mean") for case in CASES), ("image", "sum")])
def test_states_targets_loss_and_gradients_match_the_released_model(case, reduction):
    modality, changed, settings = CASES[case]
    theirs = released.make(modality, changed, **settings).double()
    teacher = released.make_teacher(theirs)
    batch, views, prenet = 2, 3, theirs.encoder.own["prenet_depth"]
    weight = theirs.cfg["model"]["cls_loss"]
    # The sum over all views weighted by cls_loss is a mean weighted by cls_loss · B · M (method 4.7).
    model = same(
        modality,
        theirs,
        teacher,
        cls_weight=weight if reduction == "sum" else weight * batch * views,
        cls_reduction=reduction,
    )
    source = example(modality, theirs)
    length = theirs.encoder.local_features(source).shape[1]
    mask = random_masks(batch, views, length, int(length * 0.6))
    rows, visible = mask.flatten(0, 1), torch.from_numpy(visible_positions(mask.numpy()))

    noise = noise_of(model, mask, 3)
    states, predictions = theirs.student(source, mask, noise=noise)
    extra = theirs.encoder.extra
    _, results = teacher.run_blocks(teacher.encoder.contextualize(teacher.encoder.local_features(source)))
    targets = theirs.targets(results)
    losses = theirs.losses(states, predictions, targets, mask)
    total = (losses["regression"] + losses.get("cls", 0)) / losses["sample_size"]
    total.backward()

    index = mask.flatten().nonzero().squeeze(1)
    torch.manual_seed(3)
    found = model.predict(source, model.student.embed(source), mask, index)
    close = dict(rtol=1e-10, atol=1e-10)
    keep = theirs.encoder.contextualize(theirs.encoder.local_features(source), mask).restore.argsort(1)[:, : visible.shape[1]]
    by_position = [
        torch.zeros(len(rows), length, 32, dtype=torch.float64).scatter(1, at[..., None].expand(-1, -1, 32), each)
        for at, each in ((keep, states[:, extra:]), (visible, found.states.view(len(rows), -1, 32)))
    ]
    torch.testing.assert_close(by_position[1], by_position[0], **close)
    torch.testing.assert_close(found.extra, states[:, :extra], **close)
    torch.testing.assert_close(found.predictions, predictions[rows], **close)
    layers = model.teacher_layers(source, None, None)
    count = theirs.cfg["model"]["average_top_k_layers"]
    for ours, result in zip(layers, results[-count:], strict=True):
        torch.testing.assert_close(ours, result, **close)
    norms = model.loss_settings["norm"], model.loss_settings["target_norm"]
    torch.testing.assert_close(make_targets(layers, *norms, upcast=torch.float64), targets, **close)

    torch.manual_seed(3)
    output = model(source, mask)
    output.loss.backward()
    torch.testing.assert_close(output.loss, total.detach(), **close)
    if weight:
        torch.testing.assert_close(output.cls_loss, losses["cls"].detach() / losses["sample_size"], **close)
    else:
        assert output.cls_loss is None
    torch.testing.assert_close(output.teacher_states, results[-1], **close)
    wanted = renamed(modality, {n: p.grad for n, p in theirs.named_parameters() if p.requires_grad}, prenet)
    gradients = {n: p.grad for n, p in model.named_parameters() if p.requires_grad}
    gradients.pop("student.model.embeddings.token_type_embeddings.weight", None)
    assert gradients.keys() == wanted.keys()
    for name, gradient in gradients.items():
        torch.testing.assert_close(gradient, wanted[name], **close, msg=lambda text, name=name: f"{name}: {text}")

    # Micro-batches: the sum is divided by the number of scored positions in the whole step.
    torch.manual_seed(3)
    divided = model(source, mask, num_targets=100.0)
    torch.testing.assert_close(divided.loss, total.detach() * losses["sample_size"] / 100, **close)
    if weight:
        torch.testing.assert_close(divided.cls_loss, losses["cls"].detach() / 100, **close)


def test_padded_text_states_match_the_released_model():
    """States only: both attentions ignore padding, but the released decoder and loss do not (method 4.9)."""
    theirs = released.make("text").double()
    model = same("text", theirs, released.make_teacher(theirs))
    source, lengths = example("text", theirs), torch.tensor([12, 8])
    padding = torch.arange(12) >= lengths[:, None]
    source[padding] = released.PAD
    mask = torch.zeros(2, 3, 12, dtype=torch.bool)
    mask[:, :, :8] = random_masks(2, 3, 8, 5)
    states, _ = theirs.student(source, mask, padding)
    keep = theirs.encoder.contextualize(theirs.encoder.local_features(source), mask).restore.argsort(1)[:, :7]
    visible = torch.from_numpy(visible_positions(mask.numpy(), padding.numpy()))
    assert visible.shape == (6, 7)
    index = mask.flatten().nonzero().squeeze(1)
    found = model.predict(source, model.student.embed(source), mask, index, padding_mask=padding).states.view(6, 7, 32)
    seen = ~padding.repeat_interleave(3, 0).gather(1, visible)
    assert torch.equal(visible[seen], keep[seen]) and seen.sum() == 3 * (7 + 3)
    torch.testing.assert_close(found[seen], states[seen], rtol=1e-10, atol=1e-10)


# Invariants for any weights, also for models of transformers

FAMILIES = {
    **{name: (name, CONFIGS[name]) for name in CONFIGS},
    "roberta-prelayernorm": ("roberta-prelayernorm", CONFIGS["roberta"] | dict(pad_token_id=1)),
    "dinov2": ("dinov2", {k: v for k, v in CONFIGS["vit"].items() if k != "intermediate_size"} | dict(layerscale_value=0.5)),
    "wav2vec2-stable": ("wav2vec2", CONFIGS["wav2vec2"] | dict(do_stable_layer_norm=True, feat_extract_norm="layer")),
    **{name: (name, config | SMALL | dict(num_hidden_layers=3)) for name, config in (ENCODERS["image"], ENCODERS["audio"])},
}
TOKENS = (*TEXTS, "roberta-prelayernorm")
CLS = (*IMAGES, "dinov2", "data2vec2-vision")
SPEECH = ("wav2vec2", "hubert", "data2vec-audio", "wav2vec2-stable", "data2vec2-audio")


def family(name, changed=None, **settings):
    """A float64 data2vec 2.0 model with a small encoder; no weight is zero, so that mistakes show."""
    torch.manual_seed(1)
    kind, config = FAMILIES[name]
    encoder = build_encoder(kind, config=config | (changed or {}))
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    noise = settings.pop("noise", 0.0)
    axes = 2 if name in CLS else 1
    decoder = ConvDecoder(32, axes, width=16, kernel=3, layers=2, groups=4, noise=noise)
    settings = dict(top_k=2, norm="instance", cls_weight=0.7 * (name in CLS)) | settings
    return Data2Vec(encoder, decoder, **arguments(**settings)).double()


def batch(name, model, views=3, size=2, share=0.6):
    torch.manual_seed(3)
    source = torch.randn(size, 800) if name in SPEECH else inputs("roberta" if name in TOKENS else "vit", size)
    source = source.double() if source.is_floating_point() else source
    with torch.no_grad():
        length = model.student.embed(source).shape[1]
    return source, random_masks(size, views, length, int(length * share))


def attention_without(monkeypatch, keys):
    """Replace attention by plain float64 code that excludes the keys (N, T) that are True."""

    def plain(query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, enable_gqa=False):
        assert not dropout_p and not is_causal
        logits = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
        if attn_mask is not None:
            logits = logits.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else logits + attn_mask
        return logits.masked_fill(keys[:, None, None], -torch.inf).softmax(-1) @ value

    monkeypatch.setattr(F, "scaled_dot_product_attention", plain)


@pytest.mark.parametrize("name", FAMILIES)
def test_encoding_visible_positions_equals_excluding_masked_keys(name, monkeypatch):
    """Covers ALiBi, BEiT's relative positions on both axes, absolute positions; the reference encodes all positions."""
    model = family(name).eval()
    student, (source, mask) = model.student, batch(name, model)
    rows, visible = mask.flatten(0, 1), torch.from_numpy(visible_positions(mask.numpy()))
    with torch.no_grad():
        features = student.embed(source)
        found = student.transform(student.place_visible(features, mask, visible), visible=visible)
        each = features.repeat_interleave(3, 0)
        if name in SPEECH:  # the convolution of positions sees zeros (method 4.3)
            each = each * ~rows[..., None]
        extra = 0 if found.extra is None else found.extra.shape[1]
        attention_without(monkeypatch, F.pad(rows, (extra, 0)))
        whole = student.transform(student.place(each))
    wanted = whole.states[~rows].view(len(rows), -1, 32)
    torch.testing.assert_close(found.states, wanted, rtol=1e-10, atol=1e-10)
    if extra:
        torch.testing.assert_close(found.extra, whole.extra, rtol=1e-10, atol=1e-10)
    assert (extra > 0) == (name in CLS) == student.extra_tokens


@pytest.mark.parametrize("name", FAMILIES)
def test_predictions_do_not_depend_on_masked_content(name):
    """NaN in masked features, or in input that only masked positions read, changes no prediction."""
    model = family(name).eval()
    source, mask = batch(name, model, views=1)
    index = mask.flatten().nonzero().squeeze(1)
    with torch.no_grad():
        features = model.student.embed(source)
        before = model.predict(source, features, mask, index)
        poisoned = model.predict(source, features.masked_fill(mask[:, 0, :, None], torch.nan), mask, index)
        other = source.clone()
        if name in TOKENS:
            other[mask[:, 0]] = 3
        elif name in CLS:
            hidden = mask.view(2, 1, 4, 4).repeat_interleave(4, 2).repeat_interleave(4, 3)
            other = other.masked_fill(hidden, torch.nan)
        elsewhere = model.predict(other, model.student.embed(other), mask, index)
    assert before.predictions.isfinite().all()
    for found in (poisoned, *([] if name in SPEECH else [elsewhere])):
        assert torch.equal(found.predictions, before.predictions) and torch.equal(found.states, before.states)
    if name in CLS:
        assert torch.equal(poisoned.extra, before.extra)


@pytest.mark.parametrize("name", ["data2vec2-vision", "data2vec2-audio", "roberta"])
@pytest.mark.parametrize("views", [1, 2, 5, 16])
def test_loss_and_gradients_are_means_over_views(name, views):
    """Loss and gradients of M views are the means over M single views; equal views give the loss of one."""
    model = family(name)
    source, mask = batch(name, model, views)

    def loss_and_gradients(mask):
        model.zero_grad()
        output = model(source, mask)
        output.loss.backward()
        return output.loss.detach(), [p.grad.clone() for p in model.parameters() if p.requires_grad]

    loss, gradients = loss_and_gradients(mask)
    singles = [loss_and_gradients(mask[:, view : view + 1]) for view in range(views)]
    torch.testing.assert_close(loss, sum(each for each, _ in singles) / views, rtol=1e-10, atol=0)
    for found, *each in zip(gradients, *(gradient for _, gradient in singles), strict=True):
        torch.testing.assert_close(found, sum(each) / views, rtol=1e-9, atol=1e-12)
    equal, _ = loss_and_gradients(mask[:, :1].repeat(1, 3, 1))
    torch.testing.assert_close(equal, singles[0][0], rtol=1e-10, atol=0)


LOCAL = {
    "data2vec2-vision": "embeddings.patch_embeddings.projection",
    "beit": "embeddings.patch_embeddings",
    "data2vec2-audio": "feature_extractor",
    "wav2vec2": "feature_extractor",
    "roberta": "embeddings.word_embeddings",
}


@pytest.mark.parametrize("name", LOCAL)
@pytest.mark.parametrize("scope", ["all", "encoder"])
def test_features_are_computed_once_per_sample(name, scope):
    """Not once per view. A teacher without local weights shares the student's features, except for text, whose have dropout."""
    model = family(name, ema_scope=scope)
    source, mask = batch(name, model, views=5)
    calls = []
    for who, encoder in (("student", model.student), ("teacher", model.teacher.module)):
        encoder.model.get_submodule(LOCAL[name]).register_forward_hook(
            lambda module, args, out, who=who: calls.append((who, len(out)))
        )
    layers = model.teacher_layers(source, None, None)
    calls.clear()
    output = model(source, mask)
    shared = scope == "encoder" and name not in TOKENS
    assert sorted(calls) == [("student", 2)] + ([] if shared else [("teacher", 2)])
    assert len(layers) == 2 and all(len(layer) == 2 for layer in layers) and len(output.teacher_states) == 2


@pytest.mark.parametrize("name", FAMILIES)
def test_every_trainable_parameter_gets_a_gradient(name):
    model = family(name)
    model(*batch(name, model)).loss.backward()
    frozen = {n for n, p in model.student.named_parameters() if not p.requires_grad}
    assert {n.split(".")[-1] for n in frozen} <= {"mask_token", "mask_embedding", "masked_spec_embed"}
    assert bool(frozen) == (name not in TOKENS)
    for n, p in model.named_parameters():
        assert (p.grad is not None) == p.requires_grad == (not n.startswith("teacher.") and n.split(".", 1)[1] not in frozen), n
        if p.requires_grad and not n.endswith(("k_proj.bias", "key.bias", "lambda_2")):  # softmax is invariant to the key bias
            assert p.grad.abs().max() > 0, n


def test_no_dropout_in_the_text_teachers_embeddings():
    model = family("roberta", dict(hidden_dropout_prob=0.5), ema_scope="layers").train()
    source, mask = batch("roberta", model)
    seen = {}
    for who, encoder in (("student", model.student), ("teacher", model.teacher.module)):
        encoder.model.embeddings.register_forward_hook(lambda module, args, out, who=who: seen.update({who: out}))
    model(source, mask)
    assert 0.4 < (seen["student"] == 0).double().mean() < 0.6
    with torch.no_grad():
        assert torch.equal(seen["teacher"], copy.deepcopy(model.student.model.embeddings).eval()(source))


@pytest.mark.parametrize("name", ["data2vec2-vision", "data2vec2-audio"])
def test_context_dropout_comes_after_the_norm(name):
    """Method 4.3; the CLS token passes through both too."""
    changed = {"hidden_dropout_prob" if name in CLS else "hidden_dropout": 0.5}
    model = family(name, changed)
    source, mask = batch(name, model)
    visible = torch.from_numpy(visible_positions(mask.numpy()))
    with torch.no_grad():
        x = model.student.place_visible(model.student.embed(source), mask, visible)
        plain = model.eval().student._enter(x, None, visible)[0]
        dropped = model.train().student._enter(x, None, visible)[0]
    torch.testing.assert_close(dropped, torch.where(dropped == 0, 0, 2 * plain), rtol=1e-12, atol=0)
    assert ((dropped == 0).double().mean(-1) > 0.1).all() and (dropped == 0).double().mean() < 0.6
    norm = model.student.model.embeddings.layernorm if name in CLS else model.student.model.encoder.layer_norm
    standard = (plain - norm.bias) / norm.weight
    assert standard.mean(-1).abs().max() < 1e-10 and (standard.var(-1, correction=0) - 1).abs().max() < 1e-2


def test_projection_dropout_applies_to_placed_features_not_to_embed():
    model = family("wav2vec2", dict(feat_proj_dropout=0.5), ema_scope="encoder").train()
    source, mask = batch("wav2vec2", model)
    visible = torch.from_numpy(visible_positions(mask.numpy()))
    features = model.student.embed(source)
    convolve = model.student.model.encoder.pos_conv_embed
    seen = []
    convolve.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    model.student.place_visible(features, mask, visible)
    assert 0.4 < (seen[0][~mask.flatten(0, 1)] == 0).double().mean() < 0.6
    assert not (model.student.embed(source) == 0).any()


def test_a_separate_target_image_reaches_the_teacher_only():
    """For every EMA scope."""
    for scope in ("all", "encoder", "layers"):
        model = family("data2vec2-vision", ema_scope=scope)
        source, mask = batch("data2vec2-vision", model)
        other = source.flip(3)
        output, of_source, of_other = model(source, mask, other), model(source, mask), model(other, mask)
        assert torch.equal(output.stats.target.mean, of_other.stats.target.mean)
        assert torch.equal(output.teacher_states, of_other.teacher_states)
        assert torch.equal(output.states, of_source.states) and not torch.equal(output.states, of_other.states)


def test_channel_masks_reach_the_student_only():
    model = family("data2vec2-audio", ema_scope="encoder")
    source, mask = batch("data2vec2-audio", model)
    channels = torch.zeros(2, 32, dtype=torch.bool)
    plain = model(source, mask, channel_mask=channels)
    channels[1, :16] = True
    masked, count = model(source, mask, channel_mask=channels), len(plain.states) // 2
    assert torch.equal(plain.states, model(source, mask).states)
    torch.testing.assert_close(masked.states[:count], plain.states[:count], rtol=0, atol=1e-12)
    assert not torch.allclose(masked.states[count:], plain.states[count:])
    assert torch.equal(masked.stats.target.mean, plain.stats.target.mean)


AVERAGED = {  # method 1.6, by name; all others are copied at each step
    ("data2vec2-vision", "all"): r"mask_embedding|model\..*",
    ("data2vec2-vision", "encoder"): r"mask_embedding|model\.(encoder|embeddings\.(cls_token|layernorm)).*",
    ("data2vec2-vision", "layers"): r"mask_embedding|model\.encoder\..*",
    ("data2vec2-audio", "all"): r"mask_embedding|model\..*",
    ("data2vec2-audio", "encoder"): r"mask_embedding|model\.encoder\.(pos_conv_embed|layer_norm|layers|alibi_scale).*",
    ("data2vec2-audio", "layers"): r"mask_embedding|model\.encoder\.(layer_norm|layers|alibi_scale).*",
    ("roberta", "all"): r"model\..*",
    ("roberta", "encoder"): r"model\.encoder\.layer\..*",
    ("roberta", "layers"): r"model\.encoder\.layer\..*",
}


@pytest.mark.parametrize("name, scope", AVERAGED)
def test_ema_scope_selects_averaged_parameters(name, scope):
    model = family(name, ema_scope=scope, ema_start=0.5, ema_end=0.5)
    student, teacher = (dict(m.named_parameters()) for m in (model.student, model.teacher.module))
    with torch.no_grad():
        for p in student.values():
            p.add_(1.0)
    model.update_teacher()
    for n, p in teacher.items():
        averaged = re.fullmatch(AVERAGED[name, scope], n) and student[n].requires_grad
        torch.testing.assert_close(student[n] - p, torch.full_like(p, 0.5 if averaged else 0.0), rtol=0, atol=1e-12)


PADDED = {
    "roberta": {},
    "data2vec2-audio": {},
    "wav2vec2": dict(feat_extract_norm="layer"),  # group norm would include padding in its statistics
    "wav2vec2-stable": {},
}


@pytest.mark.parametrize("name", PADDED)
@pytest.mark.parametrize("target_norm", ["none", "instance"])
def test_a_padded_batch_equals_its_samples_one_by_one(name, target_norm):
    """Loss and gradients; each sample is weighted by its number of scored positions."""
    model = family(name, PADDED[name], target_norm=target_norm, norm="instance")
    sizes = [12, 7, 9] if name in TOKENS else [800, 500, 640]
    lengths = [model.student.positions(size) for size in sizes]
    torch.manual_seed(3)
    whole = torch.randint(4, 60, (3, 12)) if name in TOKENS else torch.randn(3, 800, dtype=torch.float64)
    padding = torch.arange(max(lengths)) >= torch.tensor(lengths)[:, None]
    mask = torch.zeros(3, 2, max(lengths), dtype=torch.bool)
    for row, (size, length) in enumerate(zip(sizes, lengths, strict=True)):
        whole[row, size:] = 1 if name in TOKENS else 0
        mask[row, :, :length] = random_masks(1, 2, length, length // 2, row)[0]

    def run(source, mask, padding):
        model.zero_grad()
        output = model(source, mask, padding_mask=padding)
        output.loss.backward()
        return output.loss.item(), [p.grad.clone() for p in model.parameters() if p.requires_grad]

    loss, gradients = run(whole, mask, padding)
    alone = [
        run(whole[i : i + 1, :n], mask[i : i + 1, :, :t], None) for i, (n, t) in enumerate(zip(sizes, lengths, strict=True))
    ]
    weights = [2 * (length // 2) for length in lengths]
    mean = sum(w * each for w, (each, _) in zip(weights, alone, strict=True)) / sum(weights)
    assert loss == pytest.approx(mean, rel=1e-9)
    for found, *each in zip(gradients, *(gradient for _, gradient in alone), strict=True):
        wanted = sum(w * gradient for w, gradient in zip(weights, each, strict=True)) / sum(weights)
        assert (found - wanted).norm() <= 1e-8 * wanted.norm() + 1e-11


def test_loss_does_not_depend_on_padding_content():
    """Includes the decoder, and padding that fills up rows of visible positions."""
    model = family("roberta", ema_scope="layers", noise=0.1)
    source, padding = inputs("roberta", 2), torch.arange(12) >= torch.tensor([12, 6])[:, None]
    mask = torch.zeros(2, 3, 12, dtype=torch.bool)
    mask[0], mask[1, :, :6] = random_masks(1, 3, 12, 7)[0], random_masks(1, 3, 6, 3)[0]
    losses = []
    for token in (1, 7, 30):
        torch.manual_seed(0)
        losses.append(model(torch.where(padding, token, source), mask, padding_mask=padding).loss)
    mask[1, :, 8] = True  # masked padding is not scored, and its noise is not visible
    torch.manual_seed(0)
    losses.append(model(source, mask, padding_mask=padding).loss)
    for loss in losses[1:]:
        torch.testing.assert_close(loss, losses[0], rtol=1e-10, atol=0)


def test_the_cls_target_excludes_padding():
    """Images with padded patches; no data set here produces them, but the arguments allow them."""
    model = family("data2vec2-vision")
    targets, extra = torch.randn(2, 16, 32, dtype=torch.float64), torch.randn(6, 1, 32, dtype=torch.float64)
    padding = torch.arange(16) >= torch.tensor([16, 5])[:, None]
    expected = 0.0
    for row in range(6):
        mean = targets[row // 3, : 5 if row // 3 else 16].mean(0)
        expected += 0.7 * ((extra[row, 0] - mean) ** 2).sum() / 32**0.5 / 6
    torch.testing.assert_close(model._cls_loss(extra, mean_over_time(targets, padding)), expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("name", ["data2vec2-vision", "data2vec2-audio", "roberta"])
def test_an_empty_mask_gives_zero_regression_loss(name, dtype):
    """Images keep the CLS loss; no gradient is NaN."""
    model = family(name)
    source, mask = batch(name, model)
    output = model.to(dtype)(source.to(dtype) if source.is_floating_point() else source, torch.zeros_like(mask))
    output.loss.backward()
    assert output.loss == (output.cls_loss if name in CLS else 0)
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("name", ["data2vec2-vision", "data2vec2-audio", "roberta", "beit"])
def test_fp32_and_bf16_losses_are_close_to_float64(name):
    model = family(name)
    source, mask = batch(name, model)
    exact = model(source, mask).loss.item()
    model = model.float()
    source = source.float() if source.is_floating_point() else source
    assert model(source, mask).loss.item() == pytest.approx(exact, rel=1e-5)
    with torch.autocast("cpu", torch.bfloat16):
        assert model(source, mask).loss.item() == pytest.approx(exact, rel=0.05)


@pytest.mark.parametrize("name", ["data2vec2-vision", "data2vec2-audio", "roberta", "beit", "data2vec-vision", "wav2vec2"])
def test_fused_parts_match_the_plain_model(name):
    parts = ["last block", "convolutions", "dropout", "attention"]
    parts += [] if ops.obstacle("native", "cpu", torch.float32, (torch.float32,)) else ["loss"]
    plain = family(name)
    source, mask = batch(name, plain)
    source = source.float() if source.is_floating_point() else source
    fused, found = copy.deepcopy(plain.float()), []
    fuse(fused, torch.device("cpu"), parts)
    for model in (plain, fused):
        output = model(source, mask)
        output.loss.backward()
        found.append((output, [p.grad for p in model.parameters() if p.requires_grad]))
    (wanted, gradients), (output, others) = found
    torch.testing.assert_close(output.loss, wanted.loss, rtol=1e-4, atol=0)
    torch.testing.assert_close(output.states, wanted.states, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(output.teacher_states, wanted.teacher_states, rtol=1e-3, atol=1e-4)
    norm = torch.cat([g.flatten() for g in gradients]).norm()
    for g, other in zip(gradients, others, strict=True):
        assert (g - other).norm() < 1e-3 * g.norm() + 1e-5 * norm


def test_fresh_noise_fills_masked_positions_only():
    decoder = ConvDecoder(8, width=8, groups=2, noise=0.03, dropout=0.5)
    visible = torch.from_numpy(visible_positions(random_masks(3, 200, 20, 12).numpy()))
    states = torch.full((600, 8, 8), 4.0)
    x, again = (decoder.restore(states, visible, 20) for _ in range(2))
    at = torch.zeros(600, 20, dtype=torch.bool).scatter(1, visible, True)
    assert set(x[at].unique().tolist()) == {0.0, 8.0} and 0.45 < (x[at] == 0).float().mean() < 0.55
    assert not torch.equal(x[~at], again[~at])
    assert x[~at].std().item() == pytest.approx(0.03, rel=0.02) and abs(x[~at].mean().item()) < 1e-3
    assert torch.equal(decoder.eval().restore(states, visible, 20)[at], states.flatten(0, 1))
    assert (ConvDecoder(8, width=8, groups=2, zero_init=True)(x, (20,)) == 0).all()


# User-defined modules


class Placed(Handwritten):
    """Absolute positions, added by the documented method `place`."""

    def __init__(self):
        super().__init__()
        self.where = nn.Parameter(torch.randn(16, 32))

    def place(self, features):
        return features + self.where


def test_a_custom_module_with_place_supports_views():
    torch.manual_seed(1)
    encoder = Encoder(Placed(), layers="blocks", ffn="mlp.2")
    predictor = ConvDecoder(32, width=16, kernel=3, layers=2, groups=4, noise=0.0)
    model = Data2Vec(encoder, predictor, targets=TargetsConfig(top_k=2, norm="layer")).double()
    source, mask = torch.randn(2, 16, 6, dtype=torch.float64), random_masks(2, 3, 16, 9)
    own, results = model.student.model, []
    predictions = []
    for row in range(2):
        for view in range(3):
            seen = ~mask[row, view]
            states = own.contextualize((own.embed(source[row]) + own.where)[seen][None])
            x = torch.zeros(1, 16, 32, dtype=torch.float64)
            x[0, seen] = states[0]
            predictions.append(model.head(x, (16,))[0, mask[row, view]])
    teacher = model.teacher.module.model
    for block in teacher.blocks[-2:]:
        block.mlp.register_forward_hook(lambda module, args, out: results.append(out))
    with torch.no_grad():
        teacher.contextualize(teacher.embed(source) + teacher.where)
    target = sum(F.layer_norm(result, (32,)) for result in results) / 2
    wanted = target.repeat_interleave(3, 0)[mask.flatten(0, 1)]
    loss = ((torch.cat(predictions) - wanted) ** 2).sum(1).mean() / 32**0.5
    output = model(source, mask)
    torch.testing.assert_close(output.loss, loss, rtol=1e-10, atol=0)
    output.loss.backward()
    assert own.where.grad.abs().max() > 0 and model.student.mask_embedding.grad is None


class Grid(Placed):
    def positions(self, size):
        return 4, 4


class Oblong(Placed):
    def positions(self, size):
        return 2, 8


def decoder(axes=1, **settings):
    return ConvDecoder(32, axes, width=16, kernel=3, layers=1, groups=4, **settings)


TARGETS = TargetsConfig(top_k=2)


def roberta():
    return build_encoder("roberta", config=CONFIGS["roberta"])


def run(mask, **given):
    model = Data2Vec(roberta(), decoder() if given.pop("views", True) else HeadConfig(), targets=TARGETS)
    return model(torch.randint(5, 60, (2, 12)), mask, **given)


def of(*masked):
    """A mask (2, len(masked), 12) with this many masked positions in each view."""
    return torch.stack([torch.arange(12) < count for count in masked]).expand(2, -1, -1)


REFUSED = {
    "one mask with a decoder": (lambda: run(of(5)[:, 0]), r"mask: found shape \(2, 12\), expected \(B, M, T\), M views"),
    "views without": (lambda: run(of(5, 5), views=False), r"found shape \(2, 2, 12\), expected \(B, T\); several views need a"),
    "unequal views": (
        lambda: run(of(5, 6)),
        "mask: found views with 6 to 7 visible positions, expected the same number in all; use RandomMask or ExactBlockMask",
    ),
    "nothing visible": (lambda: run(of(12)), "mask: found a view without visible positions, expected at least one in each"),
    "only padding visible": (
        lambda: run(of(5), padding_mask=torch.arange(12).expand(2, 12) >= 5),
        "mask: found a view without visible positions",
    ),
    "another length": (
        lambda: run(of(5)[..., :11]),
        r"mask: found \(2, 11\) samples and positions, expected \(2, 12\), those of the encoder's features",
    ),
    "another batch": (lambda: run(of(5)[:1]), r"mask: found \(1, 12\) samples and positions, expected \(2, 12\)"),
    "axes": (
        lambda: Data2Vec(roberta(), decoder(2), targets=TARGETS)(torch.randint(5, 60, (2, 12)), of(5)),
        r"grid: found \(12,\) for 12 positions and a decoder of 2 axes",
    ),
    "axes of an image": (
        lambda: Data2Vec(build_encoder("vit", config=CONFIGS["vit"]), decoder(), targets=TARGETS)(
            torch.randn(2, 3, 16, 16), random_masks(2, 2, 16, 9)
        ),
        r"grid: found \(4, 4\) for 16 positions and a decoder of 1 axes",
    ),
    "a grid of another size": (
        lambda: Data2Vec(Encoder(type("Wide", (Grid,), {"positions": lambda self, size: (4, 5)})(), "blocks"), decoder(2),
                         targets=TARGETS)(torch.randn(2, 16, 6), random_masks(2, 2, 16, 9)),
        r"grid: found \(4, 5\) for 16 positions and a decoder of 2 axes",
    ),
    "CLS of text": (
        lambda: Data2Vec(roberta(), decoder(), targets=TARGETS, loss=LossConfig(cls_weight=0.1)),
        "cls_weight: found 0.1, but RobertaModel has no CLS token to train; expected 0",
    ),
    "CLS of a module": (
        lambda: Data2Vec(Encoder(Placed(), "blocks"), decoder(), targets=TARGETS, loss=LossConfig(cls_weight=1)),
        "cls_weight: found 1, but Placed has no CLS token",
    ),
    "CLS without a decoder": (
        lambda: Data2Vec(roberta(), targets=TARGETS, loss=LossConfig(cls_weight=0.1)),
        "cls_weight: found 0.1 without a decoder",
    ),
    "reduction": (lambda: LossConfig(cls_reduction="max"), "cls_reduction: found 'max', expected one of 'mean', 's"),
    "RoFormer": (
        lambda: Data2Vec(build_encoder("roformer", config=COMMON | TEXT), decoder()),
        "encoder: RoFormerModel cannot encode the visible positions alone: .* use roberta, .* or leave the decoder out",
    ),
    "WavLM": (
        lambda: Data2Vec(build_encoder("wavlm", config=COMMON | WAVE | dict(num_feat_extract_layers=3)), decoder()),
        "encoder: WavLMModel cannot encode the visible positions alone",
    ),
    "BEiT with positions of each layer": (
        lambda: Data2Vec(
            build_encoder(
                "beit",
                config=CONFIGS["beit"] | dict(use_relative_position_bias=True, use_shared_relative_position_bias=False),
            ),
            decoder(2),
        ),
        "encoder: BeitModel cannot encode the visible positions alone",
    ),
    "a module that adds positions nobody knows where": (
        lambda: Data2Vec(Encoder(Handwritten(), "blocks"), decoder()),
        r"encoder: Handwritten cannot encode .* give a module of your own the method place\(features\)",
    ),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_invalid_inputs_and_settings_are_named(case):
    attempt, message = REFUSED[case]
    with pytest.raises(ValueError, match=message):
        attempt()


def test_a_custom_module_may_define_a_2d_grid():
    model = Data2Vec(Encoder(Oblong(), "blocks", "mlp.2"), decoder(2), targets=TARGETS)
    grids = []
    model.head.register_forward_pre_hook(lambda module, args: grids.append(args[1]))
    assert model(torch.randn(2, 16, 6), random_masks(2, 2, 16, 9)).loss.isfinite()
    assert grids == [(2, 8)]  # test_decoders.py has what the decoder computes on a grid
