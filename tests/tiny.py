"""The presets with encoders and decoders of a few thousand weights, and inputs for them."""

import functools

import numpy as np
import torch

from d2v_fast.config import parse
from d2v_fast.masking import Draws
from d2v_fast.train.build import make_encoder, make_model

SIZES = "encoder.config.hidden_size=32 encoder.config.num_hidden_layers=3 encoder.config.num_attention_heads=4 "
SIZES += "encoder.config.intermediate_size=48 targets.top_k=2 head.width=32 head.groups=4 head.zero_init=false"
NO_DROPOUT = "encoder.config.hidden_dropout=0 encoder.config.attention_dropout=0 encoder.config.layerdrop=0 head.dropout=0"
OF = {
    "text": "encoder.config.vocab_size=60 encoder.config.max_position_embeddings=40 encoder.config.hidden_dropout_prob=0 "
    "encoder.config.attention_probs_dropout_prob=0 head.dropout=0",
    "vision": "encoder.config.image_size=16 encoder.config.patch_size=4",
    "audio": "encoder.config.conv_dim=[16,16,16] encoder.config.conv_kernel=[10,3,2] encoder.config.conv_stride=[5,2,2] "
    "encoder.config.num_feat_extract_layers=3 encoder.config.conv_pos_kernel_size=5 "
    f"encoder.config.num_conv_pos_embedding_groups=4 {NO_DROPOUT}",
    "spectrogram": "encoder.config.image_size=[32,16] encoder.config.patch_size=4",
}


@functools.cache
def make_config(preset, *settings):
    return parse(["--config", preset, *SIZES.split(), *OF[preset.split("/")[0]].split(), *settings])[0]


def make(preset, *settings):
    """A config and its model; no weight is zero, so that mistakes show."""
    config = make_config(preset, *settings)
    encoder = make_encoder(config)
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return config, make_model(config, encoder)


def inputs(config, size=2):
    if config.modality == "text":
        return torch.randint(5, 60, (size, 12))
    if config.modality == "audio":
        return torch.randn(size, 400)
    return torch.randn(size, 3, 16, 16) if config.modality == "vision" else torch.randn(size, 1, 32, 16)


def views(config, model, source, epoch=0, lengths=None, count=3):
    """Masks (B, M, T) as the config describes them."""
    size = model.student.positions(source.shape[-1])
    more = () if lengths is None else (np.repeat(lengths, count),)
    mask = config.mask(Draws(0, epoch, range(len(source)), count), size, *more)
    return torch.from_numpy(mask).view(len(source), count, -1)
