"""data2vec 2.0's model in float64 against the released modules (`released`), and what must hold whatever the weights."""

import copy
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from d2v_fast import Data2Vec, Encoder, build_encoder
from d2v_fast.decoders import ConvDecoder
from d2v_fast.masking import visible_positions
from d2v_fast.ops.reference import make_targets
from tests import released
from tests.models import COMMON, CONFIGS, IMAGES, TEXT, TEXTS, WAVE, Block, Handwritten, inputs

SMALL = dict(hidden_size=32, num_attention_heads=4, intermediate_size=48)
NO_DROPOUT = dict(hidden_dropout=0.0, attention_dropout=0.0, activation_dropout=0.0, layerdrop=0.0)
ENCODERS = {  # of the same shapes as those of `released`
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
TREES = {  # where a block and its parts are: spec 8.5 and 11.13 → ours
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
PLACES = {
    "image": {
        "extra_tokens": "student.model.embeddings.cls_token",
        "local_encoder.proj": "student.model.embeddings.patch_embeddings.projection",
        "context_encoder.norm": "student.model.embeddings.layernorm",
    },
    "audio": {
        **{f"local_encoder.conv_layers.{i}.0": f"student.model.feature_extractor.conv_layers.{i}.conv" for i in range(4)},
        **{f"local_encoder.conv_layers.{i}.2.1": f"student.model.feature_extractor.conv_layers.{i}.layer_norm" for i in range(4)},
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
    """Weights or gradients of `released` by the names that `Data2Vec` has for them."""
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
    """Our model with the weights of a released student and its teacher, in float64."""
    encoder, own = encoder_like(modality, theirs), theirs.encoder.own
    cfg, decoder = theirs.cfg["model"], own["decoder"]
    norm = "instance" if cfg["instance_norm_target_layer"] else "layer"
    model = Data2Vec(
        encoder,
        decoder=ConvDecoder(
            32,
            2 if modality == "image" else 1,
            width=decoder["decoder_dim"],
            kernel=decoder["decoder_kernel"],
            layers=decoder["decoder_layers"],
            groups=decoder["decoder_groups"],
            residual=decoder["decoder_residual"],
            projection_layers=decoder["projection_layers"],
            noise=own["mask_noise_std"],
        ),
        top_k=cfg["average_top_k_layers"],
        norm=norm,
        target_norm="layer" if cfg["layer_norm_targets"] else "instance" if cfg["instance_norm_targets"] else "none",
        beta=cfg["loss_beta"],
        scale=cfg["loss_scale"] or "auto",
        ema_scope=SCOPES[modality],
        **settings,
    ).double()
    prenet, state = own["prenet_depth"], model.state_dict()
    ours = renamed(modality, theirs.state_dict(), prenet)
    of_teacher = renamed(modality, teacher.state_dict(), prenet)
    ours |= {n.replace("student.", "teacher.module.", 1): t for n, t in of_teacher.items() if n.startswith("student.")}
    loaded = model.load_state_dict(ours, strict=False)
    assert not loaded.unexpected_keys
    # Neither is a part of the released models: the mask vector of 1.0, and the kind of a token.
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
    """What `restore` draws after this seed, as `released` takes it: (B·M, masked, C)."""
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
    "image, even kernel": ("image", dict(decoder=dict(decoder_kernel=4)), dict(instance_norm_targets=True, layer_norm_targets=False)),
    "audio": ("audio", {}, {}),
    "audio, a scale for each layer": ("audio", dict(prenet_depth=2, learned_alibi_scale_per_layer=True), dict(loss_beta=0.3)),
    "audio, fixed scale": ("audio", dict(learned_alibi_scale=False, decoder=dict(decoder_kernel=6)), {}),
    "text": ("text", {}, {}),
    "text, even kernel, residual": (
        "text",
        dict(mask_noise_std=0.0, decoder=dict(decoder_kernel=4, decoder_residual=True)),
        dict(average_top_k_layers=2),
    ),
}  # fmt: skip


@pytest.mark.parametrize("case, reduction", [*((case, "mean") for case in CASES), ("image", "sum")])
def test_against_the_released_model(case, reduction):
    modality, changed, settings = CASES[case]
    theirs = released.make(modality, changed, **settings).double()
    teacher = released.make_teacher(theirs)
    batch, views, prenet = 2, 3, theirs.encoder.own["prenet_depth"]
    weight = theirs.cfg["model"]["cls_loss"]
    # The sum over all views weighted by cls_loss is a mean weighted by cls_loss · B · M (spec 4.7).
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

    # Micro-batches: the sum is divided by what the whole step scores.
    torch.manual_seed(3)
    divided = model(source, mask, num_targets=100.0)
    torch.testing.assert_close(divided.loss, total.detach() * losses["sample_size"] / 100, **close)
    if weight:
        torch.testing.assert_close(divided.cls_loss, losses["cls"].detach() / 100, **close)
