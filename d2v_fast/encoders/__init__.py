"""Transformer encoders behind one interface: embed → mask_features → place → transform.

Hugging Face models are recognised by their main input (token ids, pixels, waveforms), not by name. Known families run in
pieces; others run whole with their local features replaced (`spliced`). A custom encoder is an `nn.Module` with two methods
(three for images and speech) and the path of the module whose output is the teacher's target:

    class Mine(nn.Module):
        hidden_size = 256
        def __init__(self): self.blocks = nn.ModuleList(...)
        def embed(self, inputs): ...                             # → local features (B, T, C), before any mask
        def contextualize(self, features, padding_mask=None): ...  # (B, T, C), padding_mask (B, T) True = padding
        def place(self, features): ...   # for data2vec 2.0: adds positions, which contextualize then does not
        def positions(self, size): ...   # image side → (rows, columns); samples of a waveform → frames; not for tokens

    encoder = Encoder(Mine(), layers="blocks", ffn="mlp.2")  # ffn: the last Linear of the FFN, relative to a block
    model = Data2Vec(encoder, targets=TargetsConfig(top_k=4))
"""

from d2v_fast.choices import LayerSource
from d2v_fast.encoders.base import Encoded, Encoder
from d2v_fast.encoders.hub import build_encoder, class_arguments, describe, example, model_class, off_by, wrap
from d2v_fast.encoders.patches import PatchEncoder
from d2v_fast.encoders.spliced import SplicedEncoder
from d2v_fast.encoders.tokens import TokenEncoder
from d2v_fast.encoders.waves import WaveEncoder

__all__ = [
    "Encoded",
    "Encoder",
    "LayerSource",
    "PatchEncoder",
    "SplicedEncoder",
    "TokenEncoder",
    "WaveEncoder",
    "build_encoder",
    "class_arguments",
    "describe",
    "example",
    "model_class",
    "off_by",
    "wrap",
]
