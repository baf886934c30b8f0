"""Settings: what is accepted, how it is resolved, and what is reported to the user."""

import dataclasses
import inspect
import json
import os
import re
from typing import get_type_hints

import numpy as np
import pytest
import torch
import yaml
from transformers import AutoConfig

import d2v_fast.nets  # noqa: F401  the presets of data2vec 2.0 name its models
from d2v_fast.choices import ranges
from d2v_fast.compat import is_arxyzan, translate_arxyzan
from d2v_fast.config import MASKS, MODALITIES, NO_SETTINGS, PRESETS, SECTIONS, ConfigError, data_class, parse, presets
from d2v_fast.train.build import make_encoder, set_length_multiple

VISION = ["modality=vision", "encoder.model=beit"]
TEXT = ["modality=text", "encoder.model=roberta"]
AUDIO = ["modality=audio", "encoder.model=data2vec-audio"]
SPECTROGRAM = ["modality=spectrogram", "encoder.model=vit"]


def values(config):
    """A config as plain settings, without those that depend on the clock."""
    settings = {name: vars(getattr(config, name)) for name in (*SECTIONS, "mask")} | {"data": config.data}
    return settings | {"train": settings["train"] | {"output": None}, "modality": config.modality}


def refused(*args):
    with pytest.raises(ConfigError) as error:
        parse(list(args))
    return str(error.value)


def with_its_base(name):
    """Arguments for a preset; a preset that needs another one names it in its first lines."""
    text = (PRESETS / f"{name}.yaml").read_text()
    if "modality:" in text:
        return ["--config", name]
    base = re.search(r"after ([\w/-]+)|--config ([\w/-]+) --config", text)
    return ["--config", base[1] or base[2], "--config", name]


class TestPresets:
    @pytest.mark.parametrize("name", presets())
    def test_its_encoder_exists_and_fits(self, name):
        args = with_its_base(name)
        if "encoder.pretrained=" in (PRESETS / f"{name}.yaml").read_text():
            assert parse([*args, "encoder.pretrained=run/export"])[0].encoder.pretrained == "run/export"
            return
        config, fused = parse(args)
        assert not fused and config.modality == name.split("/")[0]
        if config.parts:
            return
        fields = config.encoder.config
        model = AutoConfig.for_model(config.encoder.model, **fields)
        unknown = set(fields) - set(inspect.signature(type(model)).parameters)
        assert not unknown
        assert config.targets.top_k <= model.num_hidden_layers
        if config.modality == "vision":
            assert config.data["image_size"] == model.image_size
        if config.modality == "spectrogram":
            assert [config.data["target_length"], config.data["mel_bins"]] == model.image_size
        if config.modality == "text":
            assert config.data["block_size"] <= fields.get("max_position_embeddings", 514) - 2
        if config.modality == "audio":
            assert config.data["max_seconds"] * config.data["sample_rate"] > 10 * np.prod(model.conv_stride)

    @pytest.mark.parametrize("name", ["text/tiny", "vision/tiny", "audio/tiny"])
    def test_its_encoder_builds(self, name):
        config, _ = parse(["--config", name])
        encoder = make_encoder(config, dict(vocab_size=2000) if config.modality == "text" else None)
        encoder.check_layers(config.targets.top_k, config.targets.source)
        assert len(encoder.blocks) == config.encoder.config["num_hidden_layers"]

    def test_steps_that_are_given_replace_the_epochs_of_a_preset(self):
        assert parse(["--config", "vision/beit-base"])[0].train.epochs == 800
        config, _ = parse(["--config", "vision/beit-base", "train.steps=7"])
        assert (config.train.steps, config.train.epochs) == (7, None)
        config, _ = parse(["--config", "vision/beit-base", "train.steps=7", "train.epochs=3"])
        assert (config.train.steps, config.train.epochs) == (7, 3)

    def test_a_mistyped_name(self):
        message = refused("--config", "vision/tinny")
        assert "--config vision/tinny: no such file or preset; did you mean vision/tiny?" in message
        assert all(name in message for name in presets())

    def test_a_file_in_the_home(self, tmp_path, monkeypatch):
        monkeypatch.setenv("HOME", str(tmp_path))
        (tmp_path / "mine.yaml").write_text("{modality: vision, encoder: {model: beit}, train: {output: ~/run}}")
        config, _ = parse(["--config=~/mine.yaml"])
        assert config.train.output == str(tmp_path / "run")

    @pytest.mark.parametrize("modality", ["[vision]", "{vision: 1}", "!!set {vision}", "5"])
    def test_a_modality_of_another_type(self, modality, tmp_path):
        (tmp_path / "mine.yaml").write_text(f"modality: {modality}")
        message = refused("--config", str(tmp_path / "mine.yaml"))
        assert (
            message.startswith(f"--config {tmp_path}/mine.yaml: modality: found ") and "one of text, vision, audio" in message
        )


class TestSettings:
    def test_later_ones_win(self, tmp_path):
        (tmp_path / "a.yaml").write_text("train: {steps: 5, batch_size: 7}\noptimizer: {lr: 2e-3}")
        (tmp_path / "b.yaml").write_text("train: {steps: 6}\nschedule:\n")
        config, _ = parse(
            ["--config", "vision/tiny", f"--config={tmp_path}/a.yaml", "--config", f"{tmp_path}/b.yaml", "train.log_every=3"]
        )
        assert (config.train.steps, config.train.batch_size, config.train.log_every) == (6, 7, 3)
        assert config.optimizer.lr == 0.002 and config.data["image_size"] == 32

    @pytest.mark.parametrize("form", [["train.steps=9"], ["--train.steps=9"], ["--train.steps", "9"]])
    def test_forms_of_an_override(self, form):
        assert parse([*VISION, *form])[0].train.steps == 9

    def test_types(self):
        config, _ = parse(
            [
                *VISION,
                "optimizer.betas=[0.8,0.9]",
                "optimizer.lr=1e-3",
                'optimizer.lr_scale={"*bias": 0.5}',
                "encoder.config.image_size=96",
                "encoder.config.hidden_act=relu",
                "loss.scale=mean",
                "train.epochs=1.5",
                "data.crop_scale=[0.5, 1]",
                "head.zero_init=true",
                "ema.copied=[a*, b*]",
            ]
        )
        assert config.optimizer.betas == (0.8, 0.9) and config.optimizer.lr == 0.001
        assert config.optimizer.lr_scale == {"*bias": 0.5} and config.ema.copied == ["a*", "b*"]
        assert config.encoder.config == {"image_size": 96, "hidden_act": "relu"}
        assert config.loss.scale == "mean" and config.train.epochs == 1.5 and config.head.zero_init is True
        assert tuple(config.data["crop_scale"]) == (0.5, 1.0)

    @pytest.mark.parametrize("name", ["text/tiny", "vision/tiny", "audio/tiny"])
    def test_the_saved_yaml_gives_the_same_config(self, name, tmp_path):
        config, _ = parse(["--config", name, "train.seed=7", 'optimizer.lr_scale={"*a*": 2.0}', "optimizer.lr=1e-5"])
        (tmp_path / "config.yaml").write_text(config.yaml)
        assert values(parse(["--config", str(tmp_path / "config.yaml")])[0]) == values(config)
        assert yaml.safe_load(config.yaml)["train"]["seed"] == 7

    def test_another_mask_leaves_the_options_of_the_first(self):
        config, _ = parse(["--config", "vision/tiny", "mask.kind=block", "mask.count=30"])
        assert dataclasses.asdict(config.mask) == {"count": 30, "min_area": 16, "max_area": 196, "min_aspect": 0.3}
        config, _ = parse(["--config", "vision/tiny", "mask.kind=random"])
        assert config.mask.prob == 0.6

    def test_pretrained_weights_bring_their_own_config(self, tmp_path):
        config, _ = parse(["--config", "vision/tiny", "encoder.pretrained=some/beit", "encoder.config.image_size=32"])
        assert (config.encoder.model, config.encoder.config) == (None, {"image_size": 32})
        (tmp_path / "a.yaml").write_text("{modality: text, encoder: {pretrained: roberta-base}}")
        config, _ = parse(["--config", str(tmp_path / "a.yaml"), "encoder.model=bert"])
        assert (config.encoder.model, config.encoder.pretrained) == ("bert", None)
        (tmp_path / "b.yaml").write_text("{modality: text, encoder: {model: 'my.module:Class', config: {a: 1}}}")
        config, _ = parse(["--config", str(tmp_path / "b.yaml"), "encoder.pretrained=run/export"])
        assert (config.encoder.model, config.encoder.config) == ("my.module:Class", {"a": 1})

    def test_another_model_keeps_what_it_knows(self, capsys, tmp_path):
        config, _ = parse(["--config", "vision/beit-base", "encoder.model=vit", "encoder.config.patch_size=32"])
        assert config.encoder.config == {
            "image_size": 224, "patch_size": 32, "attention_probs_dropout_prob": 0.05, "layer_norm_eps": 1e-6,
        }  # fmt: skip
        told = "encoder.model=vit: dropped drop_path_rate, layer_scale_init_value, set for beit\n"
        assert capsys.readouterr().err == told
        config, _ = parse(["--config", "audio/tiny", "encoder.model=hubert"])
        assert "num_conv_pos_embeddings" not in config.encoder.config and config.encoder.config["hidden_size"] == 192
        config, _ = parse(["--config", "vision/tiny", "encoder.model=mine:Mine", "encoder.config.depth=3"])
        assert (config.encoder.config, config.encoder.init) == ({"depth": 3}, "hf")
        (tmp_path / "mine.yaml").write_text("encoder: {model: bert, config: {type_vocab_size: 1}}")
        config, _ = parse(["--config", "text/tiny", "--config", str(tmp_path / "mine.yaml")])
        assert (config.encoder.config["type_vocab_size"], config.encoder.config["hidden_size"]) == (1, 128)

    @pytest.mark.parametrize("args", [TEXT, VISION, AUDIO, SPECTROGRAM])
    def test_defaults(self, args):
        """Missing settings have the defaults with which older runs resume."""
        config, _ = parse(args)
        settings, defaults = (json.loads(json.dumps(each, default=str)) for each in (config.settings(), config.defaults()))
        differ = {key for key, value in settings.items() if defaults.get(key, ...) != value}
        assert differ == {"encoder.model", "data.length_multiple"} & settings.keys()

    def test_fused(self):
        assert parse([*VISION, "--fused"])[1] is True


class TestLengthMultiple:
    """Null is replaced by the value for the device, so that checkpoints contain it."""

    @pytest.mark.parametrize(
        "args, cpu, cuda",
        [
            ([*TEXT, "data.cross_documents=false"], 1, 8),
            ([*TEXT, "data.cross_documents=false", "data.length_multiple=5"], 5, 5),
            (TEXT, 1, 1),  # packed
            (AUDIO, 1, 32),
            ([*AUDIO, "data.crop=false", "data.length_multiple=1"], 1, 1),
            (VISION, None, None),
            (SPECTROGRAM, None, None),
        ],
    )
    def test_null(self, args, cpu, cuda):
        config = parse(args)[0]
        for device, expected in (("cpu", cpu), ("mps", cpu), ("cuda", cuda)):
            assert set_length_multiple(config, torch.device(device)).settings().get("data.length_multiple") == expected

    def test_of_several_parts(self):
        config = set_length_multiple(parse(["--config", "several/tiny-2"])[0], torch.device("cuda"))
        assert config.settings()["several.parts.audio.data.length_multiple"] == 32

    def test_own_data_keep_theirs(self):
        config = dataclasses.replace(parse(AUDIO)[0], own_data=True)
        assert set_length_multiple(config, torch.device("cuda")).data["length_multiple"] is None


class TestRefusals:
    @pytest.mark.parametrize(
        "args, message",
        [
            (["train.stepz=3"], "train.stepz: no such setting; did you mean train.steps?"),
            (["trian.steps=3"], "trian.steps: no such setting; did you mean train.steps?"),
            (["data.imagesize=32"], "data.imagesize: no such setting; did you mean data.image_size?"),
            (["--fusedd"], "fusedd: no such setting; did you mean fused?"),
            (["train=5"], "train: found 5, expected one of its settings"),
            (["foo"], "'foo': expected key=value, such as train.steps=1000"),
            (
                ["mask.kind=blok"],
                "mask.kind: found 'blok', expected for vision one of block, random, exact; did you mean block?",
            ),
            (["targets.norm=layr"], "targets.norm: found layr, expected one of none, layer, .*; did you mean layer?"),
            (["train.steps=abc"], "train.steps: found abc, expected a whole number"),
            (["train.steps=1.5"], "train.steps: found 1.5, expected a whole number"),
            (["train.epochs=x"], "train.epochs: found x, expected a number or null"),
            (["loss.scale=aut"], "loss.scale: found aut, expected a number or one of auto, mean; did you mean auto?"),
            (["head.zero_init=maybe"], "head.zero_init: found maybe, expected true or false"),
            (["data.crop_scale=[1]"], r"data.crop_scale: found \[1\], expected a list of 2 numbers"),
            (["encoder.config=5"], "encoder.config: found 5, expected a mapping"),
            (["optimizer.lr_scale.a=b"], "optimizer.lr_scale: found b, expected a mapping to numbers"),
            (["data.path="], "data.path: found nothing, expected builtin, a file"),
            (["data.crop_scale=[0.9,0.2]"], r"data.crop_scale: found \[0.9, 0.2\], expected the lower number first"),
            (["mask.min_area=300"], "mask.min_area: found 300, expected at most mask.max_area=196"),
            (["encoder.model=null"], "encoder: give either encoder.model .* or encoder.pretrained"),
            (["--config"], "--config: found nothing, expected a YAML file or one of audio"),
        ],
    )
    def test_one_clear_line(self, args, message):
        found = refused(*VISION, *args)
        assert re.fullmatch(message, found) or re.match(message, found)
        assert "\n" not in found and "<class" not in found and "typing." not in found

    def test_modality(self):
        known = "text, vision, audio, spectrogram, custom, several"
        assert refused("modality=visoin") == f"modality: found 'visoin', expected one of {known}; did you mean vision?"
        assert "found None" in refused("--config", "vision/fairseq")
        assert refused().startswith("no settings: d2v-train --config PRESET, one of ")

    def test_masks_that_replace_more_than_all(self):
        assert "mask.random_prob + mask.keep_prob: found 1.2" in refused(*TEXT, "mask.random_prob=.6", "mask.keep_prob=.6")

    def test_blocks_without_room(self):
        assert "expected at least 3" in refused(*TEXT, "data.block_size=2", "data.cross_documents=false")

    @pytest.mark.parametrize(
        "content, message",
        [
            ("train: 5", "train: found 5, expected a mapping of settings"),
            ("a: [1", "not valid YAML"),
            ("", "found NoneType, expected a mapping of settings"),
            ("just words", "found str, expected a mapping of settings"),
            ("{modality: vision, encoder: {modle: beit}}", "encoder.modle: no such setting; did you mean encoder.model"),
            ("{modality: vision, foo: {a: 1}}", "foo: no such setting"),
            ("{modality: vision, 1: 2}", "1: no such setting"),
            (
                "{modality: vision, encoder: {model: beit}, train: {steps: many}}",
                "train.steps: found many, expected a whole number",
            ),
        ],
    )
    def test_files(self, tmp_path, content, message):
        (tmp_path / "a.yaml").write_text(content)
        assert message in refused("--config", str(tmp_path / "a.yaml"))


def parameters():
    """Every setting, with the command-line arguments that select its parser."""
    for args in (TEXT, VISION, AUDIO, SPECTROGRAM):
        modality = args[0].partition("=")[2]
        for kind in MODALITIES[modality].masks:
            for name in inspect.signature(MASKS[kind]).parameters:
                yield f"mask.{name}", [*args, f"mask.kind={kind}"]
        for name in inspect.signature(data_class(modality)).parameters:
            yield f"data.{name}", args
    for section, cls in SECTIONS.items():
        for field in dataclasses.fields(cls):
            yield f"{section}.{field.name}", VISION


# Written independently of the annotations: the last valid value, and the first invalid one.
BOUNDS = [
    ("mask.prob", 0.99, 1),
    ("mask.prob", 0.01, 0),
    ("mask.length", 1, 0),
    ("mask.count", 1, 0),
    ("mask.dropout", 0, 1),
    ("mask.min_aspect", 1, 0),
    ("targets.top_k", 1, 0),
    ("ema.start", 1, 1.01),
    ("ema.end", 0, -0.1),
    ("optimizer.lr", 1e-9, 0),
    ("optimizer.lr", 1, ".inf"),
    ("optimizer.lr", 1, ".nan"),
    ("optimizer.betas", [0, 0.999], [0.9, 1]),
    ("loss.beta", 0, -1),
    ("loss.beta", 1e-30, 1e-31),
    ("loss.beta", 1e30, 2e30),
    ("head.layers", 0, -1),
    ("schedule.warmup", 0, -1),
    ("train.steps", 1, 0),
    ("train.epochs", 0.1, 0),
    ("train.batch_size", 1, 0),
    ("train.accumulate", 1, 0),
    ("train.workers", 0, -1),
    ("train.threads", 1024, 100_000_000),
    ("loss.scale", 1e-9, 0),
    ("train.max_broken", 1, 1.1),
    ("train.seed", 2**63 - 1, -1),
    ("data.flip", 1, 1.5),
    ("data.image_size", 1, 0),
    ("data.std", [1, 1, 0.1], [1, 1, 0]),
    ("data.crop_scale", [0.1, 1], [0.1, 1.1]),
    ("data.block_size", 2, 1),
    ("data.vocab_size", 261, 260),
    ("data.vocab_size", 2**24, 2**24 + 1),
    ("data.length_multiple", 1, 0),
    ("data.length_multiple", 1024, 1025),
    ("data.max_seconds", 86_400, 1e300),
    ("data.sample_rate", 1, 0),
    ("data.max_seconds", 0.1, 0),
    ("data.batch_seconds", 0.1, 0),
    ("data.channel_prob", 0, 1),
    ("data.mel_bins", 1, 0),
    ("data.target_length", 1, 0),
]


class TestRanges:
    @pytest.mark.parametrize("output", ["", "a\0b"])
    def test_of_folders(self, output):
        assert refused(*VISION, f"train.output={output}").startswith(f"train.output: found {output!r}, expected a folder")

    @pytest.mark.parametrize("key, good, bad", BOUNDS)
    def test_first_value_outside(self, key, good, bad):
        message = refused(*dict(reversed(list(parameters())))[key], f"{key}={bad}")
        assert message.startswith(f"{key}: found ") and "expected" in message

    def test_of_the_values_of_a_mapping(self):
        assert parse([*VISION, "optimizer.lr_scale.x=0"])[0].optimizer.lr_scale == {"x": 0}
        assert refused(*VISION, "optimizer.lr_scale.x=-1") == "optimizer.lr_scale: found -1.0, expected at least 0"

    def test_last_values_inside(self):
        together = {}
        for key, good, _ in BOUNDS:
            args = dict(reversed(list(parameters())))[key]
            together.setdefault(tuple(args), []).append(f"{key}={good}")
        for args, settings in together.items():
            parse([*args, *settings])

    @pytest.mark.parametrize("cls", [*SECTIONS.values(), *MASKS.values(), *map(data_class, list(MODALITIES)[:4])])
    def test_each_number_has_one(self, cls):
        hints = get_type_hints(cls.__init__)
        numbers = {name for name, hint in hints.items() if re.search(r"\b(int|float)\b", str(hint))}
        assert numbers <= ranges(cls).keys() | NO_SETTINGS


ARXYZAN = {
    "text": """
modality: text
device: cuda
train: {batch_size: 8, eval_batch_size: 8, num_epochs: 3, checkpoints_dir: out/text, log_dir: logs, save_ckpt_freq: 1}
criterion: {loss_beta: 4}
optimizer: {lr: 2e-4, weight_decay: 0.01}
dataset: {name: wikitext-2-v1, mlm_probability: 0.2, valid_seq_lenghts: [10, 256], clean_dataset: true}
model: {average_top_k_layers: 5, embed_dim: 64, num_classes: null, encoder_checkpoint: distilroberta-base,
        normalize_targets: true, ema_decay: 0.998, ema_end_decay: 0.9999, ema_anneal_end_step: 1000}
""",
    "audio": """
modality: audio
device: cpu
model: {encoder_checkpoint: facebook/wav2vec2-base, embed_dim: 768, average_top_k_layers: 4, head_layers: 2,
        normalize_targets: false, ema_decay: 0.9998, ema_end_decay: 0.9999, ema_anneal_end_step: 300}
dataset: {path: my/speech}
optimizer: {lr: 0.0005}
train: {batch_size: 2, num_epochs: 10, checkpoints_dir: out/audio}
""",
    "vision": """
modality: vision
device: cuda
model: {encoder_checkpoint: microsoft/beit-base-patch16-224, average_top_k_layers: 6, head_layers: 2,
        normalize_targets: true, ema_decay: 0.9998, ema_end_decay: 0.9999, ema_anneal_end_step: 300}
dataset: {path: {train: pictures/train, test: pictures/test}, input_size: 224, interpolation: bicubic, num_mask_patches: 100,
          max_mask_patches_per_block: 150, min_mask_patches_per_block: 12, imagenet_default_mean_and_std: false}
train: {num_epochs: 8, batch_size: 16, shuffle: true}
criterion: {loss_beta: 2}
optimizer: {lr: 2e-3}
""",
}


class TestArxyzan:
    @pytest.fixture
    def translated(self, request, tmp_path, capsys):
        (tmp_path / "theirs.yaml").write_text(ARXYZAN[request.param])
        config, _ = parse(["--config", str(tmp_path / "theirs.yaml")])
        return config, capsys.readouterr().err

    @pytest.mark.parametrize("translated", ["text"], indirect=True)
    def test_text(self, translated):
        config, said = translated
        assert config.modality == "text" and config.encoder.pretrained == "distilroberta-base"
        assert (config.targets.top_k, config.targets.source, config.targets.norm, config.targets.target_norm) == (
            5,
            "ffn",
            "layer",
            "layer",
        )
        assert (config.ema.start, config.ema.end, config.ema.anneal_steps) == (0.998, 0.9999, 1000)
        assert (config.loss.beta, config.loss.scale, config.head.layers) == (4, 1.0, 2)
        assert (config.optimizer.lr, config.optimizer.weight_decay) == (2e-4, 0.01)
        assert (config.train.batch_size, config.train.epochs, config.train.output) == (8, 3, "out/text")
        data = config.data
        assert (data["path"], data["name"], data["tokenizer"], data["block_size"]) == (
            "wikitext",
            "wikitext-2-v1",
            "distilroberta-base",
            256,
        )
        mask = config.mask
        assert (mask.prob, mask.length, mask.random_prob, mask.keep_prob, mask.keep_special, mask.loss_on) == (
            0.2,
            1,
            0.1,
            0.1,
            True,
            "selected",
        )
        for dropped in (
            "dataset.clean_dataset",
            "model.embed_dim",
            "model.num_classes",
            "train.log_dir",
            "train.save_ckpt_freq",
        ):
            assert f"{dropped}: dropped" in said
        assert "targets.top_k = 5: was model.average_top_k_layers" in said

    @pytest.mark.parametrize("translated", ["audio"], indirect=True)
    def test_audio(self, translated):
        config, said = translated
        assert (config.targets.norm, config.targets.target_norm, config.targets.top_k) == ("instance", "none", 4)
        assert (config.ema.scope, config.head.layers, config.mask.prob) == ("encoder", 1, 0.65)
        assert (config.data["path"], config.train.device, config.train.epochs) == ("my/speech", "cpu", 10)
        assert "model.head_layers (2) was not read" in said

    @pytest.mark.parametrize("translated", ["vision"], indirect=True)
    def test_vision(self, translated):
        config, said = translated
        assert (config.targets.source, config.targets.norm, config.targets.target_norm) == ("block_output", "layer", "layer")
        assert dataclasses.asdict(config.mask) == {"count": 100, "min_area": 12, "max_area": 150, "min_aspect": 0.3}
        assert (config.data["path"], config.data["image_size"]) == ("pictures/train", 224)
        assert tuple(config.data["mean"]) == tuple(config.data["std"]) == (0.5,) * 3
        assert config.optimizer.lr == 0.002 and "dataset.interpolation: dropped" in said

    def test_every_key_is_used_or_reported(self):
        for text in ARXYZAN.values():
            theirs = yaml.safe_load(text)
            _, changes = translate_arxyzan({**theirs, "extra": {"deep": {"key": 1}}})
            assert "extra.deep.key: dropped, it has no equivalent here" in changes

    def test_our_configs_are_not_taken_for_foreign_ones(self):
        assert not is_arxyzan({"modality": "text", "encoder": {"model": "roberta"}})
        assert not is_arxyzan({"modality": "text", "model": "roberta"})

    def test_overrides_apply_on_top(self, tmp_path):
        (tmp_path / "theirs.yaml").write_text(ARXYZAN["vision"])
        config, _ = parse(["--config", str(tmp_path / "theirs.yaml"), "targets.top_k=2", "data.path=elsewhere"])
        assert (config.targets.top_k, config.data["path"]) == (2, "elsewhere")


@pytest.mark.parametrize("key", ["data.path", "train.output", "encoder.pretrained"])
def test_a_name_that_config_yaml_cannot_hold(key):
    """Otherwise a run could neither be resumed nor exported."""
    with pytest.raises(ConfigError, match=rf"^{key}: found 'caf\\udce9', which is not UTF-8, .* rename or link it$"):
        parse(["--config", "vision/tiny", f"{key}={os.fsdecode(b'caf' + bytes([0xE9]))}"])
