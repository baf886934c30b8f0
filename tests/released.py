"""data2vec 2.0 as it was released: its modules under their original names, written from method 4 only.

The independent reference of several tests. It uses nothing from d2v_fast, does not try to be fast, has no dropout and no
training; masks and noise are arguments. With `changed=EAT` the image model is EAT, on spectrograms (frames, 128 mel bins).
Everything runs in the dtype of the weights; `model.double()` gives float64, where the fixed positions keep the fp32 values of
checkpoints. Post-LN only, as in all published configurations.

    student = make("image", seed=0).double()                  # cfg in student.cfg; make("audio", dict(prenet_depth=2), depth=3)
    teacher = make_teacher(student)                           # other weights where the original's teacher has its own
    states, predictions = student.student(pixels, mask, noise=noise)
    features = teacher.encoder.local_features(pixels)         # the student's weights where the original shares them
    _, results = teacher.run_blocks(teacher.encoder.contextualize(features))
    losses = student.losses(states, predictions, student.targets(results), mask)
    torch.save(checkpoint(student, teacher), "checkpoint.pt")

Shapes: B samples, M views (clones) of each, T positions, V visible ones, D channels, H heads, E extra tokens (CLS). Row b·M + m
is view m of sample b. Masks and padding are bool, True = masked, True = padding.
"""

import copy
import functools
import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Small settings under the original names (`cfg` of a checkpoint). Unused modalities have an entry too.
DECODERS = {
    "image": dict(decoder_dim=32, decoder_groups=8, decoder_kernel=3, decoder_layers=3, decoder_residual=True),
    "audio": dict(decoder_dim=16, decoder_groups=8, decoder_kernel=7, decoder_layers=4, decoder_residual=True),
    "text": dict(decoder_dim=32, decoder_groups=1, decoder_kernel=9, decoder_layers=3, decoder_residual=False),
}
DECODERS["image"] |= dict(input_dropout=0.0, projection_layers=1, projection_ratio=2.0)
DECODERS["audio"] |= dict(input_dropout=0.1, projection_layers=1, projection_ratio=2.0)
DECODERS["text"] |= dict(input_dropout=0.1, projection_layers=2, projection_ratio=2.0)
MASKS = {
    "image": dict(mask_prob=0.8, mask_prob_adjust=0.07, mask_length=3, inverse_mask=True, mask_noise_std=0.01),
    "audio": dict(mask_prob=0.5, mask_prob_adjust=0.05, mask_length=5, inverse_mask=False, mask_noise_std=0.01),
    "text": dict(mask_prob=0.48, mask_prob_adjust=0.0, mask_length=1, inverse_mask=False, mask_noise_std=0.01),
}
MODALITIES = {
    "image": dict(
        input_size=16, in_chans=3, patch_size=4, embed_dim=32, prenet_depth=2, num_extra_tokens=1, fixed_positions=True,
        use_alibi_encoder=False, init_extra_token_zero=False, ema_local_encoder=True, prenet_dropout=0.0,
    ),
    "audio": dict(
        extractor_mode="layer_norm", feature_encoder_spec="[(16, 10, 5)] + [(16, 3, 2)] * 2 + [(16,2,2)]", conv_pos_width=25,
        conv_pos_groups=8, conv_pos_depth=5, conv_pos_pre_ln=False, prenet_depth=0, num_extra_tokens=0, use_alibi_encoder=True,
        alibi_scale=1.0, learned_alibi=False, learned_alibi_scale=True, learned_alibi_scale_per_head=True,
        learned_alibi_scale_per_layer=False, num_alibi_heads=4, ema_local_encoder=False, prenet_dropout=0.1,
    ),
    "text": dict(
        max_source_positions=32, learned_pos=True, dropout=0.1, no_scale_embedding=True, layernorm_embedding=True,
        prenet_depth=0, num_extra_tokens=0, use_alibi_encoder=False, ema_local_encoder=False, prenet_dropout=0.0,
    ),
}  # fmt: skip
# EAT (Chen et al. 2024): positions for up to max_length patches in time; shorter inputs use the first ones.
EAT = dict(in_chans=1, patch_size=16, target_length=64, max_length=6, prenet_depth=0)
COMMON = dict(
    _name="data2vec_multi", embed_dim=32, num_heads=4, mlp_ratio=1.5, depth=2, layer_norm_first=False, norm_affine=True,
    end_of_block_targets=False, batch_norm_target_layer=False, layer_norm_target_layer=False, instance_norm_target_layer=True,
    instance_norm_targets=False, layer_norm_targets=False, loss_beta=0.0, loss_scale=None, cls_loss=0.0, recon_loss=0.0,
    d2v_loss=1.0, average_top_k_layers=2, clone_batch=3, dropout_input=0.0, start_drop_path_rate=0.0, end_drop_path_rate=0.0,
    ema_decay=0.999, ema_end_decay=0.99999, ema_anneal_end_step=75_000, shared_decoder=None,
)  # fmt: skip
DROPOUT = dict(encoder_dropout=0.1, post_mlp_drop=0.1, attention_dropout=0.1, activation_dropout=0.0)
MODELS = {
    "image": dict(norm_eps=1e-6, layer_norm_targets=True, cls_loss=0.01, ema_encoder_only=False, **dict.fromkeys(DROPOUT, 0.0)),
    "audio": dict(norm_eps=1e-5, ema_encoder_only=False, layerdrop=0.05, **DROPOUT),
    "text": dict(norm_eps=1e-5, ema_encoder_only=True, loss_scale=1.0, depth=4, average_top_k_layers=4, **DROPOUT),
}
TASKS = {"image": {"_name": "mae_image_pretraining"}, "audio": {"normalize": True}, "text": {}}
VOCABULARY, PAD = 70, 1


def settings(modality: str, changed: dict | None = None, **model) -> dict:
    """`cfg` of a run on "image", "audio" or "text"; `changed` overrides fields of the modality (`decoder=`: of its decoder)."""
    modalities = {name: MODALITIES[name] | MASKS[name] | {"decoder": DECODERS[name]} for name in MODALITIES}
    changed = dict(changed or {})
    decoder = DECODERS[modality] | changed.pop("decoder", {})
    modalities[modality] |= changed | {"decoder": decoder}
    chosen = COMMON | MODELS[modality] | {"supported_modality": modality.upper(), "modalities": modalities} | model
    return {"model": chosen, "task": TASKS[modality], "optimizer": {"_name": "adam"}}


class Attention(nn.Module):
    def __init__(self, D: int, heads: int):
        super().__init__()
        self.heads, self.qkv, self.proj = heads, nn.Linear(D, 3 * D), nn.Linear(D, D)

    def forward(self, x: Tensor, padding: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
        q, k, v = self.qkv(x).unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        logits = q @ k.transpose(2, 3) * q.shape[-1] ** -0.5
        if bias is not None:
            logits = logits + bias
        if padding is not None:
            logits = logits.masked_fill(padding[:, None, None], -math.inf)
        return self.proj((logits.softmax(-1) @ v).transpose(1, 2).flatten(2))


class MLP(nn.Module):
    def __init__(self, D: int, inner: int):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, inner), nn.Linear(inner, D)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x)))


class AltBlock(nn.Module):
    """method 4.2. Returns the block's output and its FFN result, both (N, T, D)."""

    def __init__(self, cfg: dict):
        super().__init__()
        D, eps = cfg["embed_dim"], cfg["norm_eps"]
        self.norm1, self.attn, self.norm2 = nn.LayerNorm(D, eps), Attention(D, cfg["num_heads"]), nn.LayerNorm(D, eps)
        self.mlp = MLP(D, int(D * cfg["mlp_ratio"]))

    def forward(self, x: Tensor, padding: Tensor | None, bias: Tensor | None) -> tuple[Tensor, Tensor]:
        h = self.norm1(x + self.attn(x, padding, bias))
        f = self.mlp(h)
        return self.norm2(h + f), f


def convolve(convolution: nn.Module, x: Tensor) -> Tensor:
    """A convolution of a positional encoder or decoder, followed by norm and GELU; x (N, D, T) or (N, D, √T, √T)."""
    y = convolution(x)
    if convolution.kernel_size[0] % 2 == 0:
        y = y[..., :-1] if y.dim() == 3 else y[..., :-1, :-1]
    return F.gelu(F.layer_norm(y.movedim(1, -1), y.shape[1:2], eps=1e-5).movedim(-1, 1))


class ContextEncoder(nn.Module):
    """The norm, and the prenet blocks after it."""

    def __init__(self, cfg: dict, own: dict, modality: str):
        super().__init__()
        if modality != "text" or own["prenet_depth"]:
            self.norm = nn.LayerNorm(cfg["embed_dim"], cfg["norm_eps"])
        if own["prenet_depth"]:
            self.blocks = nn.ModuleList(AltBlock(cfg) for _ in range(own["prenet_depth"]))


class Decoder(nn.Module):
    """method 4.5, Decoder1d or Decoder2d: x (N, T, D) of all positions → predictions (N, T, D)."""

    def __init__(self, cfg: dict, settings: dict, axes: int, high: int | None = None):
        super().__init__()
        self.high = high
        D, width, kernel = cfg["embed_dim"], settings["decoder_dim"], settings["decoder_kernel"]
        conv = nn.Conv1d if axes == 1 else nn.Conv2d
        self.axes, self.residual = axes, settings["decoder_residual"]
        self.blocks = nn.ModuleList(
            nn.Sequential(conv(width if i else D, width, kernel, padding=kernel // 2, groups=settings["decoder_groups"]))
            for i in range(settings["decoder_layers"])
        )
        inner = int(width * settings["projection_ratio"])
        two = settings["projection_layers"] == 2
        self.proj = nn.Sequential(nn.Linear(width, inner), nn.GELU(), nn.Linear(inner, D)) if two else nn.Linear(width, D)

    def forward(self, x: Tensor) -> Tensor:
        x = x.transpose(1, 2)
        if self.axes == 2:
            x = x.unflatten(2, (self.high, -1))
        for block in self.blocks:
            y = convolve(block[0], x)
            x = x + y if self.residual and x.shape[1] == y.shape[1] else y
        return self.proj(x.flatten(2).transpose(1, 2))


class ConvStack(nn.Module):
    """The convolutions over a waveform (B, samples) → (B, T, channels)."""

    def __init__(self, layers: list[tuple[int, int, int]]):
        super().__init__()
        widths = [1] + [width for width, _, _ in layers]
        self.conv_layers = nn.ModuleList(
            nn.ModuleDict({"0": nn.Conv1d(before, width, kernel, stride, bias=False),
                           "2": nn.ModuleDict({"1": nn.LayerNorm(width)})})
            for before, (width, kernel, stride) in zip(widths, layers, strict=False)
        )  # fmt: skip

    def forward(self, wave: Tensor) -> Tensor:
        x = wave.unsqueeze(1)
        for layer in self.conv_layers:
            x = F.gelu(layer["2"]["1"](layer["0"](x).transpose(1, 2)).transpose(1, 2))
        return x.transpose(1, 2)


def sincos(D: int, wide: int, high: int | None = None) -> Tensor:
    """(1, high · wide, D), square without `high`: the first half of the channels encodes the column, the second the row."""
    high = wide if high is None else high
    omega = 10_000.0 ** (-torch.arange(D // 4, dtype=torch.float64) / (D / 4))
    angles = torch.arange(max(wide, high), dtype=torch.float64)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    rows = [torch.cat([axis[column], axis[row]]) for row in range(high) for column in range(wide)]
    return torch.stack(rows).unsqueeze(0).to(torch.get_default_dtype())


@functools.cache
def slopes(heads: int, device: torch.device) -> Tensor:
    """ALiBi slopes (H,), method 4.4."""
    power = 2 ** math.floor(math.log2(heads))
    made = [2.0 ** (-8 / power * (i + 1)) for i in range(power)]
    finer = [2.0 ** (-8 / (2 * power) * (i + 1)) for i in range(2 * power)]
    return torch.tensor(made + finer[::2][: heads - power], dtype=torch.float64, device=device)


class Context(NamedTuple):
    """Input of the main blocks, and how to restore the original order."""

    x: Tensor  # (N, E + V, D), N = B·M
    padding: Tensor | None  # (N, E + V)
    bias: Tensor | None  # (N, H, E + V, E + V), ALiBi before its scale
    restore: Tensor | None  # (N, T): index of each position in the order visible, then masked; None without a mask


class ModalityEncoder(nn.Module):
    def __init__(self, cfg: dict, modality: str):
        super().__init__()
        own, D = cfg["modalities"][modality], cfg["embed_dim"]
        self.modality, self.extra = modality, own["num_extra_tokens"]
        self.own, self.heads = own, cfg["num_heads"]
        if modality == "image":
            patch = own["patch_size"]
            high, wide = (own["target_length"], 128) if "target_length" in own else (own["input_size"],) * 2
            high, wide = high // patch, wide // patch
            self.local_encoder = nn.ModuleDict({"proj": nn.Conv2d(own["in_chans"], D, patch, patch)})
            self.fixed_positional_encoder = nn.ParameterDict(
                {"positions": nn.Parameter(sincos(D, wide, own.get("max_length", high)), requires_grad=False)}
            )
        elif modality == "audio":
            layers = eval(own["feature_encoder_spec"])
            self.local_encoder = ConvStack(layers)
            self.project_features = nn.ModuleDict({"1": nn.LayerNorm(layers[-1][0]), "2": nn.Linear(layers[-1][0], D)})
            kernel = max(3, own["conv_pos_width"] // own["conv_pos_depth"])
            made = (
                nn.Sequential(nn.Conv1d(D, D, kernel, padding=kernel // 2, groups=own["conv_pos_groups"]))
                for _ in range(own["conv_pos_depth"])
            )
            self.relative_positional_encoder = nn.ModuleDict({str(i + 1): layer for i, layer in enumerate(made)})
        else:
            tables = {"embed_tokens": nn.Embedding(VOCABULARY, D, PAD), "layernorm_embedding": nn.LayerNorm(D)}
            tables["embed_positions"] = nn.Embedding(own["max_source_positions"] + PAD + 1, D, PAD)
            self.local_encoder = nn.ModuleDict(tables)
        if self.extra:
            self.extra_tokens = nn.Parameter(torch.zeros(1, self.extra, D))
        if own["use_alibi_encoder"]:
            layers = own["prenet_depth"] + cfg["depth"] if own["learned_alibi_scale_per_layer"] else 1
            heads = own["num_alibi_heads"] if own["learned_alibi_scale_per_head"] else 1
            initial = torch.full((layers, 1, heads, 1, 1), own["alibi_scale"])
            self.alibi_scale = nn.Parameter(initial, requires_grad=own["learned_alibi_scale"])
        self.context_encoder = ContextEncoder(cfg, own, modality)
        self.decoder = Decoder(cfg, own["decoder"], *((2, high) if modality == "image" else (1,)))

    def local_features(self, source: Tensor) -> Tensor:
        """(B, T, D) before fixed or convolutional positions; input: pixels (B, 3, side, side), a waveform or tokens."""
        if self.modality == "image":
            return self.local_encoder["proj"](source).flatten(2).transpose(1, 2)
        if self.modality == "audio":
            return self.project_features["2"](self.project_features["1"](self.local_encoder(source)))
        real = (source != PAD).long()
        positions = real.cumsum(1) * real + PAD
        embedded = self.local_encoder["embed_tokens"](source) + self.local_encoder["embed_positions"](positions)
        return self.local_encoder["layernorm_embedding"](embedded)

    def scale(self, layer: int) -> Tensor:
        """(1, H or 1, 1, 1) for a layer; prenet layers count."""
        scale = self.alibi_scale.clamp(min=0)
        return scale[layer if len(scale) > 1 else 0]

    def contextualize(self, features: Tensor, mask: Tensor | None = None, padding: Tensor | None = None) -> Context:
        """Local features (B, T, D), masks (B, M, T) with equal counts, padding (B, T); method 4.3 and 4.1, prenet included."""
        x, T = features, features.shape[1]
        if self.modality == "image":
            x = x + self.fixed_positional_encoder["positions"][:, : x.shape[1]]
        restore = keep = None
        if mask is not None:
            views, rows = mask.shape[1], mask.flatten(0, 1)
            visible = int((~rows[0]).sum())
            assert ((~rows).sum(1) == visible).all()
            shuffle = rows.to(torch.uint8).argsort(dim=1, stable=True)
            restore, keep = shuffle.argsort(dim=1), shuffle[:, :visible]
            x = x.repeat_interleave(views, dim=0)
            padding = padding if padding is None else padding.repeat_interleave(views, dim=0)
        positions = None
        if self.modality == "audio":
            positions = (x if mask is None else x * (~rows).to(x.dtype)[..., None]).transpose(1, 2)
            for layer in self.relative_positional_encoder.values():
                positions = convolve(layer[0], positions)
            positions = positions.transpose(1, 2)
        bias = None
        if self.own["use_alibi_encoder"]:
            place = torch.arange(T, dtype=torch.float64, device=x.device)
            bias = -slopes(self.heads, x.device)[:, None, None] * (place[:, None] - place).abs()
            bias = bias.to(x.dtype).expand(len(x), -1, -1, -1)
        if keep is not None:
            channels = keep[..., None].expand(-1, -1, x.shape[2])
            x = x.gather(1, channels)
            positions = positions if positions is None else positions.gather(1, channels)
            padding = padding if padding is None else padding.gather(1, keep)
            if bias is not None:
                bias = bias.gather(2, keep[:, None, :, None].expand(-1, self.heads, -1, T))
                bias = bias.gather(3, keep[:, None, None, :].expand(-1, self.heads, keep.shape[1], -1))
        if positions is not None:
            x = x + positions
        if self.extra:
            x = torch.cat([self.extra_tokens.expand(len(x), -1, -1), x], dim=1)
            padding = padding if padding is None else F.pad(padding, (self.extra, 0))
            bias = bias if bias is None else F.pad(bias, (self.extra, 0, self.extra, 0))
        if hasattr(self.context_encoder, "norm"):
            x = self.context_encoder.norm(x)
        for i, block in enumerate(getattr(self.context_encoder, "blocks", ())):
            x, _ = block(x, padding, None if bias is None else bias * self.scale(i))
        return Context(x, padding, bias, restore)

    def decode(self, states: Tensor, restore: Tensor, noise: Tensor | None = None) -> Tensor:
        """Predictions (N, T, D) of all positions from the states (N, E + V, D) of the main blocks.

        `noise` (N, T - V, D) fills the masked positions in order; zeros if None.
        """
        states = states[:, self.extra :]
        if noise is None:
            noise = states.new_zeros(len(states), restore.shape[1] - states.shape[1], states.shape[2])
        x = torch.cat([states, noise], dim=1)
        return self.decoder(x.gather(1, restore[..., None].expand(-1, -1, x.shape[2])))


class Released(nn.Module):
    """`data2vec_multi` for one modality, with random weights; use `make`."""

    def __init__(self, cfg: dict, modality: str):
        super().__init__()
        self.cfg, self.modality = cfg, modality
        model = cfg["model"]
        self.modality_encoders = nn.ModuleDict({modality.upper(): ModalityEncoder(model, modality)})
        self.blocks = nn.ModuleList(AltBlock(model) for _ in range(model["depth"]))

    @property
    def encoder(self) -> ModalityEncoder:
        return self.modality_encoders[self.modality.upper()]

    def run_blocks(self, context: Context) -> tuple[Tensor, list[Tensor]]:
        """States (N, E + V, D) after the main blocks, and the FFN result of each block without the extra tokens."""
        x, results, prenet = context.x, [], self.encoder.own["prenet_depth"]
        for j, block in enumerate(self.blocks):
            bias = None if context.bias is None else context.bias * self.encoder.scale(prenet + j)
            x, f = block(x, context.padding, bias)
            results.append(f[:, self.encoder.extra :])
        return x, results

    def extract(self, source: Tensor, padding: Tensor | None = None) -> Tensor:
        """States (B, E + T, D) of the whole input, without a mask."""
        return self.run_blocks(self.encoder.contextualize(self.encoder.local_features(source), padding=padding))[0]

    def student(self, source, mask, padding=None, noise=None) -> tuple[Tensor, Tensor]:
        """States (B·M, E + V, D) of the positions visible under `mask` (B, M, T), and predictions (B·M, T, D)."""
        context = self.encoder.contextualize(self.encoder.local_features(source), mask, padding)
        states, _ = self.run_blocks(context)
        return states, self.encoder.decode(states, context.restore, noise)

    def targets(self, results: list[Tensor]) -> Tensor:
        """(B, T, D) from the results of all main blocks; method 1.2, no padding."""
        model = self.cfg["model"]
        chosen = results[-model["average_top_k_layers"] :]
        if model["instance_norm_target_layer"]:
            chosen = [F.instance_norm(r.transpose(1, 2)).transpose(1, 2) for r in chosen]
        if model["layer_norm_target_layer"]:
            chosen = [F.layer_norm(r, r.shape[-1:]) for r in chosen]
        y = sum(chosen) / len(chosen)
        if model["layer_norm_targets"]:
            y = F.layer_norm(y, y.shape[-1:])
        if model["instance_norm_targets"]:
            y = F.instance_norm(y.transpose(1, 2)).transpose(1, 2)
        return y

    def error(self, prediction: Tensor, target: Tensor) -> Tensor:
        """Sum of the loss over all rows, scaled; method 1.4."""
        beta, scale = self.cfg["model"]["loss_beta"], self.cfg["model"]["loss_scale"]
        e = (prediction - target).abs()
        loss = e**2 if beta == 0 else torch.where(e < beta, e**2 / (2 * beta), e - beta / 2)
        return loss.sum() * (1 / math.sqrt(e.shape[-1]) if scale is None else scale)

    def losses(self, states, predictions, targets, mask) -> dict[str, Tensor | int]:
        """Losses of one micro-batch: `regression` and `cls`, sums to be divided by `sample_size`; method 4.7.

        `cls` includes the original's factor cls_loss · sample_size; it is missing without a CLS loss.
        """
        views, rows = mask.shape[1], mask.flatten(0, 1)
        y = targets.repeat_interleave(views, dim=0)
        found = {"regression": self.error(predictions[rows], y[rows]), "sample_size": int(rows.sum())}
        if weight := self.cfg["model"]["cls_loss"]:
            cls = self.error(states[:, self.encoder.extra - 1], y.mean(1))
            found["cls"] = cls * weight * found["sample_size"]
        return found


def randomize(module: nn.Module, seed: int) -> None:
    """Set weights far from their initial values, except fixed positions; one ALiBi scale is negative, to test the clamp."""
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in module.named_parameters():
        if name.endswith("fixed_positional_encoder.positions"):
            continue
        drawn = torch.randn(parameter.shape, generator=generator).to(parameter)
        if parameter.dim() == 1:
            drawn = 0.2 * drawn + name.endswith("weight")
        elif "embed_" not in name and "extra_tokens" not in name:
            drawn = drawn / math.sqrt(parameter[0].numel())
        if name.endswith("alibi_scale"):
            drawn = torch.linspace(1.6, -0.3, parameter.numel()).view_as(parameter).to(parameter)
        parameter.data.copy_(drawn)
        for table in ("embed_tokens.weight", "embed_positions.weight"):
            if name.endswith(table):
                parameter.data[PAD] = 0


def make(modality: str, changed: dict | None = None, seed: int = 0, **model) -> Released:
    """A model with random weights; arguments as in `settings`."""
    made = Released(settings(modality, changed, **model), modality)
    randomize(made, seed)
    return made.eval()


def shared(name: str, modality: str) -> bool:
    """Whether the teacher shares this weight with the student (method 1.6, last three rows); teachers have no decoder."""
    if modality == "text":
        return not name.startswith("blocks.")
    if "fixed_positional_encoder" in name or ".decoder." in name:
        return True
    return modality == "audio" and (".local_encoder." in name or ".project_features." in name)


def make_teacher(student: Released, seed: int = 1) -> Released:
    """A teacher as a complete model: weights that the original teacher does not own are the student's."""
    teacher = copy.deepcopy(student)
    randomize(teacher, seed)
    own = {name: value for name, value in teacher.state_dict().items() if not shared(name, student.modality)}
    teacher.load_state_dict(student.state_dict() | own)
    return teacher.requires_grad_(False)


def ema_state(teacher: Released) -> dict[str, Tensor]:
    """Contents of `_ema` in a checkpoint; method 6.2."""
    frozen = "fixed_positional_encoder"  # copied into the teacher, so part of its state
    state = {k: v for k, v in teacher.state_dict().items() if frozen in k or not shared(k, teacher.modality)}
    return {k.removeprefix("blocks.") if teacher.modality == "text" else k: v for k, v in state.items()}


class ImageClassifier(nn.Module):
    """Fine-tuned on images, method 5.3: mean of the patches → LN(1e-6) → Linear. Keys `model.*`, `fc_norm.*`, `head.*`."""

    def __init__(self, model: Released, classes: int, seed: int = 2):
        super().__init__()
        self.model, D = copy.deepcopy(model), model.cfg["model"]["embed_dim"]
        self.fc_norm, self.head = nn.LayerNorm(D, 1e-6), nn.Linear(D, classes)
        randomize(self.fc_norm, seed)
        randomize(self.head, seed + 1)
        del self.model.encoder.decoder
        self.cfg = {"model": {"_name": "mae_image_classification", "d2v_multi": True, "num_classes": classes,
                              "prediction_mode": "mean_pooling", "use_fc_norm": True,
                              "pretrained_model_args": model.cfg}}  # fmt: skip

    def forward(self, pixels: Tensor) -> Tensor:
        """Logits (B, classes)."""
        return self.head(self.fc_norm(self.model.extract(pixels)[:, self.model.encoder.extra :].mean(1)))


class CTC(nn.Module):
    """Fine-tuned on speech. Keys `w2v_encoder.w2v_model.*` and `w2v_encoder.proj.*`."""

    def __init__(self, model: Released, letters: int, seed: int = 2):
        super().__init__()
        D = model.cfg["model"]["embed_dim"]
        self.w2v_encoder = nn.ModuleDict({"w2v_model": copy.deepcopy(model), "proj": nn.Linear(D, letters)})
        randomize(self.w2v_encoder["proj"], seed)
        del self.w2v_encoder["w2v_model"].encoder.decoder
        self.cfg = {"model": {"_name": "wav2vec_ctc", "w2v_args": model.cfg, "normalize": True}, "task": {"normalize": True}}

    def forward(self, wave: Tensor) -> Tensor:
        """Logits (B, T, letters)."""
        return self.w2v_encoder["proj"](self.w2v_encoder["w2v_model"].extract(wave))


class TextClassifier(nn.Module):
    """Fine-tuned on texts, method 5.3: Linear, tanh, Linear on `<s>`. Keys `model.*` and `classification_heads.NAME.*`."""

    def __init__(self, model: Released, classes: int, seed: int = 2):
        super().__init__()
        self.model, D = copy.deepcopy(model), model.cfg["model"]["embed_dim"]
        head = nn.ModuleDict({"dense": nn.Linear(D, D), "out_proj": nn.Linear(D, classes)})
        self.classification_heads = nn.ModuleDict({"sentence_classification_head": head})
        randomize(head, seed)
        del self.model.encoder.decoder
        self.cfg = model.cfg

    def forward(self, tokens: Tensor, padding: Tensor | None = None) -> Tensor:
        """Logits (B, classes)."""
        head = self.classification_heads["sentence_classification_head"]
        return head["out_proj"](head["dense"](self.model.extract(tokens, padding)[:, 0]).tanh())


def checkpoint(model: nn.Module, teacher: Released | None = None, old_alibi: bool = False) -> dict:
    """The object to save; with `old_alibi` the ALiBi scale has four axes, as in older versions."""
    state = dict(model.state_dict())
    ema = {} if teacher is None else ema_state(teacher)
    if old_alibi:
        for each in (state, ema):
            for key in [key for key in each if key.endswith("alibi_scale")]:
                each[key] = each[key].squeeze(0)
    if teacher is not None:
        state["_ema"] = ema
    return {"args": None, "cfg": model.cfg, "model": state, "extra_state": {"epoch": 3}, "task_state": {}}
