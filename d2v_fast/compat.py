"""Translate YAML files of arxyzan/data2vec-pytorch (method 7.2)."""

from __future__ import annotations

from typing import Any


def is_arxyzan(settings: dict[str, Any]) -> bool:
    """Whether these are settings of arxyzan/data2vec-pytorch."""
    model = settings.get("model")
    return "modality" in settings and isinstance(model, dict) and "encoder_checkpoint" in model


def translate_arxyzan(settings: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """Our settings, and one line for each setting that moved or changed its meaning or effect."""
    changes: list[str] = []
    used: set[str] = set()

    def take(key: str, default: Any = None) -> Any:
        value: Any = settings
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        used.add(key)
        return default if value is None else value

    modality = take("modality")
    out: dict[str, Any] = {"modality": modality}

    def put(key: str, value: Any, why: str) -> None:
        place = out
        *sections, name = key.split(".")
        for section in sections:
            place = place.setdefault(section, {})
        place[name] = value
        if why != f"was {key}":
            changes.append(f"{key} = {value}: {why}")

    def move(old: str, new: str) -> None:
        if (value := take(old)) is not None:
            put(new, value, f"was {old}")

    move("model.encoder_checkpoint", "encoder.pretrained")
    move("model.average_top_k_layers", "targets.top_k")
    move("model.ema_decay", "ema.start")
    move("model.ema_end_decay", "ema.end")
    move("model.ema_anneal_end_step", "ema.anneal_steps")
    move("criterion.loss_beta", "loss.beta")
    move("optimizer.lr", "optimizer.lr")
    move("optimizer.weight_decay", "optimizer.weight_decay")
    move("train.batch_size", "train.batch_size")
    move("train.num_epochs", "train.epochs")
    move("train.checkpoints_dir", "train.output")
    if take("device") == "cpu":
        put("train.device", "cpu", "was device")
    normalized = bool(take("model.normalize_targets", False))
    # Behaviour that is hard-coded there, with its known errors corrected.
    put("targets.source", "block_output" if modality == "vision" else "ffn", "it took the input of each block, one layer off")
    if modality == "audio":
        put("targets.norm", "instance", "it meant instance norm over time but normalised over channels")
        put("targets.target_norm", "instance" if normalized else "none", "was model.normalize_targets")
        put("ema.scope", "encoder", "the teacher shares the convolutional features, as in the paper")
        put("mask.prob", 0.65, "it took the encoder's fine-tuning mask, 0.05")
        put("data.path", take("dataset.path", "builtin"), "was dataset.path")
    elif modality == "vision":
        put("targets.norm", "layer", "as it did")
        put("targets.target_norm", "layer" if normalized else "none", "was model.normalize_targets")
        path = take("dataset.path", "builtin")
        used |= {"dataset.path.train", "dataset.path.test"}
        put("data.path", path.get("train") if isinstance(path, dict) else path, "was dataset.path.train; test is for d2v-probe")
        move("dataset.input_size", "data.image_size")
        put("mask.kind", "block", "learned mask token on the masked patches; it zeroed the visible ones")
        move("dataset.num_mask_patches", "mask.count")
        move("dataset.max_mask_patches_per_block", "mask.max_area")
        move("dataset.min_mask_patches_per_block", "mask.min_area")
        if not take("dataset.imagenet_default_mean_and_std", True):
            put("data.mean", [0.5, 0.5, 0.5], "was dataset.imagenet_default_mean_and_std: false")
            put("data.std", [0.5, 0.5, 0.5], "was dataset.imagenet_default_mean_and_std: false")
    else:
        put("targets.norm", "layer", "as it did")
        put("targets.target_norm", "layer" if normalized else "none", "was model.normalize_targets")
        name = take("dataset.name", take("dataset.path", "builtin"))
        if str(name).startswith("wikitext"):
            put("data.path", "wikitext", "was dataset.name")
            put("data.name", name, "was dataset.name")
        else:
            put("data.path", name, "was dataset.name")
        put("data.tokenizer", take("model.encoder_checkpoint"), "the encoder's own")
        move("dataset.mlm_probability", "mask.prob")
        put("mask.length", 1, "BERT masking, as it did")
        put("mask.random_prob", 0.1, "80/10/10, as it did")
        put("mask.keep_prob", 0.1, "80/10/10, as it did")
        put("mask.keep_special", True, "as it did")
        put("mask.loss_on", "selected", "as it did")
        lengths = take("dataset.valid_seq_lenghts")
        if isinstance(lengths, list) and len(lengths) == 2:
            put("data.block_size", lengths[1], "was dataset.valid_seq_lenghts; text is packed, not cut to lines")
    head_layers = take("model.head_layers")
    put("head.layers", 2 if modality == "text" else 1, f"model.head_layers ({head_layers}) was not read for this modality")
    put("loss.scale", 1.0, "as it did: no scaling")
    changes.append(
        "optimizer: AdamW, warm-up and cosine decay (schedule.*); it was Adam at a constant rate, weight_decay unread"
    )
    changes.append("teacher sees the whole input, padding is masked (method 7.2)")
    for key in sorted(_leaves(settings) - used):
        changes.append(f"{key}: dropped, it has no equivalent here")
    return out, changes


def _leaves(settings: dict[str, Any], prefix: str = "") -> set[str]:
    leaves: set[str] = set()
    for key, value in settings.items():
        leaves |= _leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key}
    return leaves
