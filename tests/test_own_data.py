"""User-defined data (`data.class`): trained, killed, resumed, exported and probed with the commands; bad ones are refused."""

import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from safetensors.torch import load_file

from d2v_fast import cli, probe, trained
from d2v_fast.checkpoint import Checkpoint, CheckpointError
from d2v_fast.config import Config, ConfigError, parse
from d2v_fast.data import DataError
from d2v_fast.export import export_run
from d2v_fast.masking import Draws, ExactBlockMask, RandomMask, SpanMask
from d2v_fast.probe import score
from d2v_fast.train.build import build, make_data, make_encoder
from d2v_fast.train.loop import loop
from tests.test_resume import killed_and_resumed, last

MINE = '''
import math

import numpy as np
import torch
from torch import nn

from d2v_fast.data import PretrainingData, Source
from d2v_fast.data.vision import ImageData
from tests.models import Block


class Fields(PretrainingData):
    """Waves along one to three axes, two classes.

    Args:
        sides: Positions along each axis, each of two samples.
        speed: Speed of the waves.
        split: train or test.
        labelled: Whether labels are given.
    """

    def __init__(self, *, sides: list[int], speed: float = 1.0, split: str = "train", labelled: bool = True, **common):
        super().__init__(**common)
        self.grid, self.speed = tuple(sides), speed
        classes = ["slow", "fast"] * 20
        self.source = Source([f"{split}[{i}]" for i in range(40)], self.read, classes if labelled else None)

    def read(self, i):
        rng = np.random.default_rng(i)
        axes = np.meshgrid(*[np.arange(2 * side) for side in self.grid], indexing="ij")
        wave = np.sin(self.speed * (1 + i % 2) * sum(axes) + rng.uniform(0, 6))
        return np.stack([wave, rng.normal(size=wave.shape)]).astype(np.float32)


class Padded(PretrainingData):
    """Series of 6 to 9 steps, padded."""

    def __init__(self, **common):
        super().__init__(**common)
        self.source = Source([str(i) for i in range(8)], lambda i: np.full((6 + i % 4, 3), i, dtype=np.float32))
        self.lengths = np.array([6 + i % 4 for i in range(8)])

    def collate(self, samples, draws):
        lengths = np.array([len(sample) for sample in samples])
        source = np.zeros((len(samples), lengths.max(), 3), dtype=np.float32)
        for row, sample in zip(source, samples):
            row[: len(sample)] = sample
        mask = self.make_mask(draws, int(lengths.max()), lengths)
        return {"source": source, "mask": mask, "padding_mask": np.arange(lengths.max()) >= lengths[:, None]}


class Linears(nn.Module):
    hidden_size = 16

    def __init__(self):
        super().__init__()
        self.stem, self.blocks = nn.Linear(3, 16), nn.ModuleList(Block(16) for _ in range(3))

    def embed(self, x):
        return self.stem(x)

    def place(self, features):
        return features + torch.linspace(0, 1, features.shape[1])[:, None]

    def contextualize(self, x, padding_mask=None):
        for block in self.blocks:
            x = block(x, padding_mask)
        return x


class Net(Linears):
    """Patches of two samples along each axis."""

    def __init__(self, sides):
        super().__init__()
        self.sides = tuple(sides)
        self.stem = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[len(sides)](2, 16, 2, 2)
        self.position = nn.Parameter(0.02 * torch.randn(math.prod(sides), 16))

    def embed(self, x):
        return self.stem(x).flatten(2).transpose(1, 2)

    def place(self, features):
        return features + self.position

    def positions(self, size):
        return self.sides


class Flat(Net):
    def positions(self, size):
        return math.prod(self.sides)


class Gray(ImageData):
    """Images without colour."""

    def load(self, index, rng):
        return super().load(index, rng).convert("L").convert("RGB")
'''
GRIDS = {"line": [12], "plane": [4, 6], "space": [3, 4, 2]}
ONE = ["mask.kind=random", "mask.prob=0.5"]
TWO = ["mask.kind=exact", "mask.length=2", "mask.prob=0.6", "head.kind=conv", "data.views=3", "head.width=16", "head.kernel=3"]
SMALL = ["targets.top_k=2", "train.batch_size=4", "train.workers=0", "train.log_every=4", "train.threads=1"]


def arguments(grid="plane", *more, folder="run", encoder="Net"):
    sides = str(GRIDS[grid]).replace(" ", "")
    own = ["data.class=mine:Fields", f"data.sides={sides}", f"encoder.model=mine:{encoder}", f"encoder.config.sides={sides}"]
    return [*own, "encoder.layers=blocks", "encoder.ffn=mlp.2", *SMALL, "train.steps=2", f"train.output={folder}", *more]


@pytest.fixture(autouse=True)
def mine(here, monkeypatch):
    """A working folder with an importable mine.py."""
    Path("mine.py").write_text(MINE)
    monkeypatch.syspath_prepend(".")
    yield
    sys.modules.pop("mine", None)


def train(*args):
    trainer = build(parse(list(args))[0])
    loop(trainer)
    return trainer


def refused(*args, code=""):
    """The error message, with `code` appended to mine.py."""
    Path("mine.py").write_text(MINE + code)
    sys.modules.pop("mine", None)
    with pytest.raises((ConfigError, DataError)) as error:
        build(parse(list(args))[0])
    assert not Path("run").exists()
    return str(error.value)


def command(monkeypatch, name, *args):
    monkeypatch.setattr(sys, "argv", [f"d2v-{name}", *args])
    with pytest.raises(SystemExit) as exit:
        getattr(cli, name)()
    return exit.value.code


@pytest.mark.parametrize(
    "grid, more",
    [
        ("line", [*ONE, "mask.kind=span", "mask.length=3", "train.workers=2"]),
        ("line", TWO),
        ("plane", [*TWO, "train.workers=2", "train.accumulate=2"]),
        ("space", ONE),
        ("space", [*TWO, "train.workers=2"]),
    ],
)
def test_a_killed_and_resumed_run_equals_an_uninterrupted_one_and_its_export_loads(grid, more):
    settings = [*more, "train.steps=12", "train.save_every=5"]
    killed_and_resumed(lambda folder: arguments(grid, *settings, folder=folder), k=5, threads=1)
    from mine import Net
    from safetensors.torch import load_model

    encoder = Net(GRIDS[grid])
    load_model(encoder, "killed/export/model.safetensors")
    kept = Checkpoint(last("whole")).tensors("student")
    assert all(torch.equal(value, kept[f"student.model.{name}"]) for name, value in encoder.state_dict().items())
    saved = load_file("killed/export/model.safetensors")
    start = make_encoder(parse(arguments(grid, *settings))[0]).model.state_dict()
    assert any(not torch.equal(value, start[name]) for name, value in saved.items())


@pytest.mark.parametrize("grid", GRIDS)
def test_batches_hold_the_samples_and_the_drawn_masks(grid):
    sides, samples = tuple(GRIDS[grid]), [7, 2, 30]
    for version, views, mask in ((ONE, 1, RandomMask(0.5)), (TWO, 3, ExactBlockMask(0.6, 2))):
        data = make_data(parse(arguments(grid, *version, "train.seed=5"))[0])
        batch = data.__getitems__([(4, i) for i in samples])
        assert np.array_equal(batch["source"], [data.read(i) for i in samples])
        expected = mask(Draws(5, 4, samples, views), sides)
        assert np.array_equal(batch["mask"].reshape(len(samples) * views, -1), expected)
        assert data.axes == len(sides) and 0.4 < expected.mean() < 0.7


def test_span_masks_on_a_one_axis_grid():
    data = make_data(parse(arguments("line", "mask.kind=span", "mask.length=3"))[0])
    expected = SpanMask(length=3)(Draws(0, 0, [1, 2]), 12)
    assert np.array_equal(data.__getitems__([(0, 1), (0, 2)])["mask"], expected)


def test_decoder_convolutions_have_as_many_axes_as_the_grid():
    for grid, convolution in (("line", torch.nn.Conv1d), ("plane", torch.nn.Conv2d), ("space", torch.nn.Conv3d)):
        trainer = build(parse(arguments(grid, *TWO, folder=grid))[0])
        assert {type(each) for each in trainer.state.core.head.convolutions} == {convolution}


def test_padded_samples_in_data2vec_1_and_2():
    model = ["data.class=mine:Padded", "encoder.model=mine:Linears", "encoder.layers=blocks", "encoder.ffn=mlp.2", *SMALL]
    for name, version in (("one", ONE), ("two", [*ONE, "head.kind=conv", "data.views=3", "head.width=16", "head.kernel=3"])):
        trainer = train(*model, *version, "train.steps=2", f"train.output={name}")
        batch = trainer.data.__getitems__([(0, 0), (0, 3)])
        assert (~batch["padding_mask"]).sum(1).tolist() == [6, 9]
        padding = batch["padding_mask"] if name == "one" else batch["padding_mask"][:, None]
        assert not (batch["mask"] & padding).any()


def test_help_lists_the_settings_of_the_class(monkeypatch, capsys):
    assert command(monkeypatch, "train", "data.class=mine:Fields", "--help") in (0, None)
    said = " ".join(capsys.readouterr().out.split())
    assert "--data.speed SPEED Speed of the waves. (type: float, default: 1.0)" in said
    assert "Positions along each axis, each of two samples. (required" in said
    assert "--data.views VIEWS Masked views of each sample" in said and "image_size" not in said
    assert "null for a single mask, as in 1.0. At least 1. (type: int | null, default: null)" in said
    assert "--mask.kind {random,exact,span,block}" in said


BOUNDED = """
from typing import Annotated

from d2v_fast.choices import PositiveInt, Range


class Bounded(Fields):
    def __init__(self, *, flip: PositiveInt = 1, share: Annotated[float, Range("[0, 0.5]")] = 0.5, **common):
        super().__init__(**common)
"""


@pytest.mark.parametrize(
    "setting, message",
    [
        ("flip=0", "data.flip: found 0, expected at least 1"),  # images have a data.flip too, of at most 1
        ("share=0.6", "data.share: found 0.6, expected a number in [0, 0.5]"),
        ("share=x", "data.share: found x, expected a number"),
        ("views=0", "data.views: found 0, expected at least 1"),
    ],
)
def test_settings_of_the_class_have_its_bounds(setting, message):
    bounded = arguments("plane", *ONE, "data.class=mine:Bounded", "data.flip=7")
    assert refused(*bounded, f"data.{setting}", code=BOUNDED) == message


def test_a_preset_keeps_only_settings_of_the_class(capsys):
    config, _ = parse(["--config", "vision/tiny-2", *arguments("plane"), "modality=custom"])
    assert set(config.data) == {"class", "sides", "speed", "split", "labelled", "views"}
    assert (config.data["views"], config.data["class"], config.own_data) == (4, "mine:Fields", True)
    assert "data.class=mine:Fields: dropped crop_scale, image_size, jitter, set for vision\n" in capsys.readouterr().err
    Path("a.yaml").write_text(config.yaml)
    again, _ = parse(["--config", "a.yaml", "data.speed=2"])
    assert again.data == config.data | {"speed": 2.0}


def test_a_subclass_of_image_data_keeps_the_modality(capsys):
    """It is trained, probed and exported like the modality's own class."""
    small = ["encoder.config.hidden_size=16", "encoder.config.num_hidden_layers=3", "encoder.config.num_attention_heads=2"]
    config, _ = parse(["--config", "vision/tiny", "data.class=mine:Gray", *small, *SMALL, "train.steps=2", "train.output=run"])
    assert (config.modality, config.data["image_size"], config.own_data) == ("vision", 32, False)
    assert "dropped" not in capsys.readouterr().err
    trainer = build(config)
    pixels = trainer.data.__getitems__([(0, 3)])["source"] * torch.tensor(trainer.data.std)[:, None, None]
    assert torch.allclose(pixels[:, 0] + trainer.data.mean[0], pixels[:, 1] + trainer.data.mean[1], atol=1e-5)
    loop(trainer)
    probe.main(["run", "--limit", "60"])
    assert json.loads(Path("run/probe.json").read_text())[0]["data"] == "builtin"
    export_run("run", "encoder")
    assert Path("encoder/preprocessor_config.json").exists()
    with pytest.raises(ConfigError, match=r"data.flip: found 2.0, expected a number in"):
        parse(["--config", "vision/tiny", "data.class=mine:Gray", "data.flip=2"])


HF = ["encoder.model=vit", "encoder.config.image_size=[8,12]", "encoder.config.patch_size=2", "encoder.config.num_channels=2",
      "encoder.config.hidden_size=16", "encoder.config.num_hidden_layers=3", "encoder.config.num_attention_heads=2",
      "encoder.config.intermediate_size=32", "data.class=mine:Fields", "data.sides=[4,6]", "train.output=run",
      *SMALL]  # fmt: skip


def test_a_transformers_model_is_exported_with_a_card(tmp_path):
    from transformers import AutoModel

    trainer = train(*HF, *TWO, "train.steps=2")
    assert export_run("run", "encoder") < 1e-6
    model = AutoModel.from_pretrained("encoder", add_pooling_layer=False, use_mask_token=True)
    expected = trainer.state.core.student.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    card = Path("encoder/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["pipeline_tag"] == "feature-extraction"
    assert "| data | mine:Fields train |" in card and not Path("encoder/preprocessor_config.json").exists()


def test_export_of_a_custom_module_points_to_the_run(monkeypatch):
    train(*arguments("plane", *ONE))
    said = command(monkeypatch, "export", "run", "--to", "encoder")
    assert "transformers has no class for the encoder mine:Net" in said and "run/export/model.safetensors" in said


class TestProbe:
    def test_labels_of_the_class(self, capsys):
        trainer = train(*HF, *ONE, "train.steps=2")
        probe.main(["run", "--limit", "40"])
        (found,) = json.loads(Path("run/probe.json").read_text())
        assert found["data"] == "mine:Fields" and found["results"]["chance"]["knn"] == 0.5
        student, order = trainer.state.core.student.eval(), np.random.default_rng(0).permutation(40)
        with torch.inference_mode():
            states = student(torch.from_numpy(np.stack([trainer.data.read(int(i)) for i in order]))).mean(1).numpy()
        labels = [trainer.data.source.labels[i] for i in order]
        assert found["results"]["trained"] == pytest.approx(score(states, labels, states, labels), abs=0.03)
        with pytest.raises(ConfigError, match=r"--data elsewhere: mine:Fields takes no data.path; leave it out"):
            probe.main(["run", "--data", "elsewhere"])
        with pytest.raises(ConfigError, match=r"--name x: mine:Fields takes no data.name; leave it out"):
            probe.main(["run", "--name", "x"])

    def test_splits_and_path_of_the_class(self, monkeypatch):
        """The probe is fitted on train and tested on test, at the given path."""
        code = """
class Files(Fields):
    def __init__(self, *, path: str = "a", **more):
        super().__init__(**more)
        read = self.source.read
        self.source.names = [f"{path}/{name}" for name in self.source.names]

        def noted(i):
            with open("read.txt", "a") as out:
                out.write(f"{self.source.names[i]}\\n")
            return read(i)

        self.source.read = noted
"""
        Path("mine.py").write_text(MINE + code)
        train(*arguments("plane", *ONE, "data.class=mine:Files"))
        Path("read.txt").unlink()
        probe.main(["run", "--data", "b"])
        names = {re.sub(r"\[.*", "", line) for line in Path("read.txt").read_text().splitlines()}
        assert names == {"b/train", "b/test"}

    def test_a_fifth_is_held_out_without_splits(self):
        config, _ = parse(arguments("plane", *ONE))
        del config.data["split"]
        encoder = make_encoder(config)
        fit, test, collate = probe.own_sources(config, encoder, "x", None, None)
        assert (len(fit), len(test)) == (32, 8) and not set(fit.names) & set(test.names)
        source, padding = collate([fit.read(0), fit.read(1)])
        assert source.shape == (2, 2, 8, 12) and padding is None

    def test_missing_labels_are_explained(self, monkeypatch):
        train(*arguments("plane", *ONE, "data.labelled=false"))
        said = command(monkeypatch, "probe", "run")
        assert said == (
            "d2v-probe: data.class=mine:Fields: found no labels of 40 samples; for a probe give a label for each, "
            "self.source = Source(names, read, labels)"
        )


def test_a_run_resumes_only_with_its_class_and_settings():
    train(*arguments("plane", *ONE))
    Path("mine.py").write_text(MINE + "\n\nclass Others(Fields):\n    pass\n")
    sys.modules.pop("mine")
    with pytest.raises(CheckpointError, match=r"data\.class.*mine:Fields.*mine:Others"):
        build(parse(["--resume", "run", "data.class=mine:Others", "data.sides=[4,6]"])[0])
    with pytest.raises(CheckpointError, match=r"data\.speed"):
        build(parse(["--resume", "run", "data.speed=2"])[0])
    assert build(parse(["--resume", "run"])[0]).state.done == 2


def test_runs_from_before_a_setting_resume_if_it_has_its_default(monkeypatch):
    """For example, their checkpoints and config.yaml have no data.class."""
    small = [f"encoder.config.{name}" for name in ("hidden_size=16", "num_hidden_layers=3", "num_attention_heads=2")]
    settings = Config.settings
    with monkeypatch.context() as before:
        gone = ("data.class", "data.crop_ratio", "optimizer.one_pass")
        known = lambda config: {key: value for key, value in settings(config).items() if key not in gone}  # noqa: E731
        before.setattr(Config, "settings", known)
        train("--config", "vision/tiny", *small, *SMALL, "train.steps=2", "train.output=run")
    resolved = yaml.safe_load(Path("run/config.yaml").read_text())
    del resolved["data"]["class"]
    Path("run/config.yaml").write_text(yaml.safe_dump(resolved))
    with pytest.raises(CheckpointError, match=r"data\.crop_ratio: was nothing, is \[0\.5, 1\.0\]"):
        build(parse(["--resume", "run", "data.crop_ratio=[0.5,1]"])[0])
    assert build(parse(["--resume", "run"])[0]).state.done == 2


class TestRefusals:
    @pytest.mark.parametrize(
        "name, message",
        [
            (
                "mine:Feilds",
                r"cannot be imported: module 'mine' has no attribute 'Feilds'; expected package.module:Class, where",
            ),
            ("nowhere:Fields", r"cannot be imported: No module named 'nowhere'; expected package.module:Class"),
            ("Fields", r"cannot be imported: No module named 'Fields'; expected package.module:Class"),
            ("mine:Net", r"found <class 'mine.Net'>, expected a class that derives from d2v_fast.data.PretrainingData"),
            ("os:system", r"found <built-in function system>, expected a class that derives from"),
        ],
    )
    def test_an_unusable_class(self, name, message):
        assert re.match(f"data.class={name}: {message}", refused(*arguments("plane", *ONE, f"data.class={name}")))

    @pytest.mark.parametrize(
        "code, message",
        [
            (
                "def __init__(self, *, mask): pass",
                r"__init__ takes no seed, views; let it take \*\*common and start with super",
            ),
            (
                "def __init__(self, path, **common): super().__init__(**common)",
                r"its arguments become settings, so they need type",
            ),
            (
                "def __init__(self, **common): pass",
                r"has no mask; let its __init__ start with super\(\).__init__\(\*\*common\)",
            ),
            ("pass", r"has no source; set self.source = Source\(names, read\) .* __len__, contents, load, sample_name$"),
            (
                "source = Source(['a'], None)",
                r"has no grid; set self.grid, the positions of a sample along each axis, in __init__",
            ),
            ("source, grid = Source([], None), 3", r"has no samples$"),
            (
                "def __init__(self, **common):\n        open('nowhere')",
                r"cannot be created: FileNotFoundError: .* 'nowhere' \(mine.py, line \d+\)$",
            ),
            (
                "source, grid, __len__ = Source(['a'], None), 3, lambda self: 5\n    def fit_to(self, encoder):\n        1 / 0",
                r"fit_to or contents fails: ZeroDivisionError: division by zero \(mine.py, line \d+\)$",
            ),
            (
                "source = Source(['a'], lambda i: 0)\n    def collate(self, samples, draws):\n        return [][5]",
                r"collate fails on its first samples: IndexError: list index out of range \(mine.py, line \d+\)$",
            ),
            (
                "source, grid = Source(['a', 'b'], lambda i: np.zeros((2, 5 + i))), 3",
                r"collate fails on its first samples: ValueError: all input arrays must have the same shape$",
            ),
            (
                "source = Source(['a'], lambda i: 0)\n    def collate(self, samples, draws):\n        return {'mask': []}",
                r"",
            ),
            (
                "source = Source(['a'], lambda i: 0)\n    def collate(self, samples, draws):\n"
                "        return {'source': np.zeros((1, 2, 8, 12)), 'mask': np.ones((1, 24))}",
                r"collate returns a mask of torch.float64, expected bool, True = masked$",
            ),
            (
                "source, grid = Source(['a'], lambda i: np.zeros((2, 8, 12))), (4, 6)",
                r".* not accept its batch, source torch.float64 \(1, 2, 8, 12\), mask torch.bool \(1, 24\), .*: Run",
            ),
            (
                "source, grid = Source(['a'], lambda i: np.zeros((2, 8, 12), dtype=np.float32)), (4, 5)",
                r".* not accept its batch, .*: ValueError: mask: found \(1, 20\) samples and positions, expected \(1",
            ),
        ],
    )
    def test_missing_or_failing_parts_of_the_class(self, code, message):
        args = [arg for arg in arguments("plane", *ONE, "data.class=mine:Other") if not arg.startswith("data.sides")]
        said = refused(*args, code=f"\n\nclass Other(PretrainingData):\n    {code}\n")
        if message:
            assert re.match(f"data.class=mine:Other: {message}", said), said
            if number := re.search(r"line (\d+)\)$", said):
                line = dict(enumerate(Path("mine.py").read_text().splitlines(), start=1))[int(number[1])]
                assert line and line in MINE + "    " + code  # of the class, or of the encoder in the same file
        else:
            assert said == "Other.collate: returns no source; found mask"

    @pytest.mark.parametrize(
        "grid, settings, message",
        [
            (
                "space",
                ["mask.kind=block"],
                r"mask: BlockMask needs two axes, but the grid of the data is \(3, 4, 2\); use mask.kind=ra",
            ),
            (
                "plane",
                ["mask.kind=span"],
                r"mask: SpanMask needs one axis, but the grid of the data is \(4, 6\); use mask.kind=random",
            ),
            ("line", ["mask.kind=span", "mask.length=13"], r"mask.length=13: one span would cover the whole grid \(12,\); exp"),
            ("plane", ["mask.kind=block"], r"mask.count=120: a sample has 24 positions, .* about 60 % of them, mask.count=14"),
            (
                "plane",
                [*TWO, "encoder.model=mine:Flat"],
                r"data.class=mine:Fields: its grid is \(4, 6\), but encoder.positions\(12\) returns \(24,\); the decoder .* "
                r"let positions\(size\) of the encoder return the grid",
            ),
            (
                "plane",
                ["data.sped=2"],
                r"data.sped: no such setting; mine:Fields takes labelled, sides, speed, split, views; did you",
            ),
            ("plane", ["data.speed=fast"], "data.speed: found fast, expected a number"),
            ("plane", ["data.sides=5"], "data.sides: found 5, expected a list"),
            ("plane", ["mask.kind=token"], "mask.kind: found 'token', expected for custom one of random, exact, span, block"),
            ("plane", ["data.views=2"], "head.kind=linear with data.views=2"),
            ("plane", ["modality=text"], r"mask: TokenMask needs ids of a tokenizer, but the grid of the data is \(4, 6\)"),
            (
                "plane",
                ["data.class=null", "modality=custom"],
                "modality=custom: found no data.class, expected package.module:Cl",
            ),
        ],
    )
    def test_settings_that_do_not_fit_the_grid_or_class(self, grid, settings, message):
        assert re.match(message, refused(*arguments(grid, *settings)))

    def test_a_grid_with_more_axes_than_the_decoder(self):
        args = [arg for arg in arguments("plane", *TWO, "data.sides=[2,2,2,2]", "encoder.config.sides=[16]")]
        said = refused(*args)
        assert re.match(
            r"data.class=mine:Fields: its grid \(2, 2, 2, 2\) has 4 axes, .* at most 3; merge some, or use 1.0", said
        )

    def test_a_setting_without_a_default(self):
        args = [arg for arg in arguments("plane", *ONE) if not arg.startswith("data.sides")]
        assert refused(*args) == "data.sides: missing; mine:Fields has no default"

    def test_a_token_encoder_needs_a_target(self):
        """TokenEncoder has no mask vector: the class must return `target` in addition to masked ids."""
        fields = "vocab_size=60 hidden_size=16 num_hidden_layers=3 num_attention_heads=2 intermediate_size=32".split()
        code = """
class Ids(PretrainingData):
    source, grid = Source(["a"], lambda i: np.arange(5, 12)), 7
"""
        model = ["data.class=mine:Ids", "encoder.model=roberta", *(f"encoder.config.{field}" for field in fields)]
        said = refused(*model, *ONE, *SMALL, "train.output=run", code=code)
        assert said == (
            "data.class=mine:Ids: collate returns no target, but RobertaModel has no mask vector; return the masked ids as "
            "source and the unmasked ones as target"
        )


def test_unreadable_samples_are_named(caplog):
    code = """
class Holes(Fields):
    def load(self, index, rng):
        if index < 3:
            raise ValueError("is empty")
        return super().load(index, rng)
"""
    Path("mine.py").write_text(MINE + code)
    train(*arguments("plane", *ONE, "data.class=mine:Holes", "train.max_broken=0.2", "train.steps=10"))
    assert "skipped an unreadable sample: train[1]: is empty" in caplog.text


def test_block_masks_on_an_axis_of_length_1():
    """A grid (1, T) is masked like a line of T positions."""
    for mask in (ExactBlockMask(), ExactBlockMask(0.5, 5, inverse=False), ExactBlockMask(overlap=False)):
        draws = Draws(3, 1, list(range(20)), 4)
        assert np.array_equal(mask(draws, (1, 32)), mask(draws, 32))


def test_load_returns_the_student_of_a_run():
    trainer = train(*arguments("space", *TWO, "train.steps=3"))
    found = trained.load(trained.read_config(Path("run")), Path("run"))
    expected = trainer.state.core.student.state_dict()
    loaded = found.encoder.state_dict()
    names = [name for name in expected if name.startswith("model.")]
    assert names and all(torch.equal(loaded[name], expected[name]) for name in names)


GUIDE = Path(__file__).parents[1] / "docs/own-data.md"


def blocks_of_the_guide():
    return re.findall(r"^```(\w+)\n(.*?)^```$", GUIDE.read_text(), re.MULTILINE | re.DOTALL)


def test_the_guide_takes_fewer_than_80_lines():
    """`test_docs.py` runs the code blocks."""
    assert sum(len(text.splitlines()) for _, text in blocks_of_the_guide()) < 80


@pytest.mark.slow
def test_the_guide_teaches_the_encoder_rhythms():
    for _, text in blocks_of_the_guide():
        if file := re.match(r"# (ecg\.\w+)\n", text):
            Path(file[1]).write_text(text)
    train("--config", "ecg.yaml", "train.output=run", "train.workers=0")
    probe.main(["run", "--limit", "1000"])
    results = json.loads(Path("run/probe.json").read_text())[0]["results"]
    assert results["trained"]["knn"] > results["untrained"]["knn"] + 0.1
    assert results["trained"]["linear"] > results["untrained"]["linear"] + 0.1
