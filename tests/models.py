"""Tiny encoders of every family, with random weights."""

import zlib
from dataclasses import fields

import torch
from torch import nn

from d2v_fast import EMAConfig, HeadConfig, LossConfig, TargetsConfig, build_encoder

COMMON = dict(hidden_size=32, num_hidden_layers=3, num_attention_heads=2, intermediate_size=48)
TEXT = dict(vocab_size=60, max_position_embeddings=40, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
IMAGE = dict(image_size=16, patch_size=4, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0)
WAVE = dict(
    conv_dim=(16, 16, 16),
    conv_kernel=(10, 3, 2),
    conv_stride=(5, 2, 2),
    num_conv_pos_embedding_groups=4,
    hidden_dropout=0.0,
    attention_dropout=0.0,
    activation_dropout=0.0,
    feat_proj_dropout=0.0,
    layerdrop=0.0,
)
CONFIGS = {
    "roberta": COMMON | TEXT,
    "bert": COMMON | TEXT,
    "data2vec-text": COMMON | TEXT,
    "beit": COMMON | IMAGE | dict(layer_scale_init_value=0.1),
    "data2vec-vision": COMMON | IMAGE,
    "vit": COMMON | IMAGE,
    "deit": COMMON | IMAGE,
    "wav2vec2": COMMON | WAVE | dict(num_feat_extract_layers=3, num_conv_pos_embeddings=8),
    "hubert": COMMON | WAVE | dict(num_feat_extract_layers=3, num_conv_pos_embeddings=8),
    "data2vec-audio": COMMON | WAVE | dict(num_feat_extract_layers=3, conv_pos_kernel_size=5, num_conv_pos_embeddings=5),
}
TEXTS = ("roberta", "bert", "data2vec-text")
IMAGES = ("beit", "data2vec-vision", "vit", "deit")
WAVES = ("wav2vec2", "hubert", "data2vec-audio")


def make(name, **settings):
    torch.manual_seed(1)
    encoder = build_encoder(name, config=CONFIGS[name], **settings)
    # Zero-initialised tokens, biases and positions would hide mistakes.
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return encoder


def initialise(module):
    """Set every weight from its name and shape: a recorded loss must not depend on how a library initialises."""
    for name, weight in module.named_parameters():
        if "position" in name and not weight.requires_grad:
            continue  # sines and cosines
        drawn = torch.randn(weight.shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))
        if name.endswith("scale") or (weight.ndim == 1 and "bias" not in name and "mask" not in name):
            drawn = 1 + 0.05 * drawn
        else:
            drawn *= weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.05
        with torch.no_grad():
            weight.copy_(drawn)


SECTIONS = {
    **{"targets": ("", TargetsConfig), "loss": ("", LossConfig)},
    **{"predictor": ("head_", HeadConfig), "ema": ("ema_", EMAConfig)},
}


def arguments(**settings):
    """Arguments of Data2Vec from single settings, such as top_k, beta, head_layers and ema_scope."""
    found = {}
    for section, (prefix, cls) in SECTIONS.items():
        names = [field.name for field in fields(cls) if prefix + field.name in settings]
        if names:
            found[section] = cls(**{name: settings.pop(prefix + name) for name in names})
    assert not settings, settings
    return found


def inputs(name, batch=2):
    if name in TEXTS:
        return torch.randint(5, 60, (batch, 12))
    if name in IMAGES:
        return torch.randn(batch, 3, 16, 16)
    return torch.randn(batch, 400)


class Block(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.mix = nn.MultiheadAttention(width, 2, batch_first=True)
        self.mlp = nn.Sequential(nn.Linear(width, 48), nn.GELU(), nn.Linear(48, width))
        self.gate = nn.Linear(width, width)  # the last Linear of the block, but not part of the FFN

    def forward(self, x, padding_mask=None):
        h = self.norm(x)
        x = x + self.mix(h, h, h, key_padding_mask=padding_mask, need_weights=False)[0]
        return x + torch.sigmoid(self.gate(x)) * self.mlp(x)


class Handwritten(nn.Module):
    """A user-defined encoder, as in the documentation."""

    hidden_size = 32

    def __init__(self, depth=3):
        super().__init__()
        self.stem = nn.Linear(6, 32)
        self.blocks = nn.ModuleList(Block(32) for _ in range(depth))

    def embed(self, inputs):
        return self.stem(inputs)

    def contextualize(self, features, padding_mask=None):
        for block in self.blocks:
            features = block(features, padding_mask)
        return features
