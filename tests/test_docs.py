"""Each command and snippet of README and docs/ runs as written, with smaller models and fewer steps."""

import ast
import graphlib
import importlib.util
import inspect
import itertools
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
import yaml
from PIL import Image
from torch import nn
from transformers import BertConfig, BertModel, RobertaConfig, RobertaModel

import d2v_fast
from d2v_fast import cli, files
from d2v_fast.config import MODALITIES, CollapseConfig, parse
from d2v_fast.data.audio import AudioData
from d2v_fast.data.text import TextData, train_tokenizer
from d2v_fast.figures import FIGURES, RULES
from tests import released, test_convert
from tools import lines, site, structure

ROOT = Path(__file__).parents[1]
PAGES = ["README.md", "CONTRIBUTING.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").glob("*.md"))]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)

# What needs a network, another machine or this very test, and what runs it instead.
ELSEWHERE = {
    "make test": ".ci/run",
    "make lint": ".ci/run",
    "make gpu": "test_make_gpu.py starts its commands without a GPU",
    "make bench": "by hand: it takes the machine for itself",
    "pip install .": "test_package.py builds the wheel",
    "torchrun": "test_sharding.py and test_resume.py train on two ranks",
    "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 torchrun": "test_resume.py kills a rank",
    "sbatch": "test_resume.py runs job.sh with stand-ins for srun and scontrol",
    "accelerate launch": "test_resume.py starts two processes on a CPU",
}
NO_TIMM = "timm" if importlib.util.find_spec("timm") is None else "\0"  # tests/test_timm.py runs it where it is installed
STEPS = ["train.steps=2", "train.epochs=null", "train.batch_size=2", "train.workers=0", "train.log_every=1"]
SMALL = [f"encoder.config.{name}" for name in ("hidden_size=16", "num_attention_heads=2", "intermediate_size=32")]
SMALL = {
    "text": [*SMALL, "encoder.config.num_hidden_layers=3", "data.vocab_size=300", "data.block_size=32"],
    "vision": [*SMALL, "encoder.config.num_hidden_layers=3"],
    "custom": [*SMALL, "encoder.config.num_hidden_layers=3"],
    "spectrogram": [*SMALL, "encoder.config.num_hidden_layers=3"],
    "audio": [*SMALL, "encoder.config.num_hidden_layers=3", f"encoder.config.conv_dim={[16] * 7}", "data.max_seconds=2.5"],
}
WORDS = "the cat sat on a mat while one dog ran over two hills and some birds flew by".split()


@pytest.fixture
def workspace(here):
    """A folder with small versions of all files that the pages mention."""
    rng = np.random.default_rng(0)
    for folder in ("photos", "imagenet/train", "labelled/train", "labelled/test", "cifar/train", "cifar/test"):
        for i in range(12):
            file = Path(folder, "ab"[i % 2], f"{i}.png")
            file.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(rng.integers(0, 255, (40, 50, 3), dtype=np.uint8)).save(file)
    for folder in ("recordings", "fsdd/train", "fsdd/test"):
        for i in range(10):
            file = Path(folder, "ab"[i % 2], f"{i}.wav")
            file.parent.mkdir(parents=True, exist_ok=True)
            soundfile.write(file, 0.1 * rng.normal(size=40_000), 16_000)
    Path("manifest").mkdir()
    lines = [f"{file.relative_to('recordings')}\t40000" for file in sorted(Path("recordings").rglob("*.wav"))]
    Path("manifest/train.tsv").write_text("\n".join([str(Path("recordings").absolute()), *lines]))
    texts = ["\n".join(" ".join(rng.choice(WORDS, 90)) for _ in range(30)) for _ in range(2)]
    for folder in ("corpus", "wikitext", "wikitext2"):
        Path(folder).mkdir()
        for name, text in zip(("train", "test"), texts, strict=True):
            Path(folder, f"{name}.txt").write_text(text)
    tokenizer = train_tokenizer(iter(texts), 300, 512)
    sizes = dict(vocab_size=len(tokenizer), hidden_size=16, num_hidden_layers=8, num_attention_heads=2, intermediate_size=32)
    sizes |= dict(max_position_embeddings=514, type_vocab_size=1)
    BertModel(BertConfig(**sizes)).save_pretrained("bert-base-uncased")
    roberta = RobertaModel(RobertaConfig(**sizes, layer_norm_eps=1e-5))  # with a pooler, as that project's has
    roberta.save_pretrained("roberta-base")
    tokenizer.save_pretrained("roberta-base")
    head = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    whole = {f"encoder.encoder.{k}": v for k, v in roberta.state_dict().items()}
    whole |= {f"regression_head.{k}": v for k, v in head.state_dict().items()}
    torch.save({"data2vec": whole, "encoder": roberta.state_dict(), "optimizer": {}}, "20.pt")
    state = test_convert.text_state()
    state["encoder.sentence_encoder.embed_tokens.weight"] = torch.randn(300, test_convert.C)
    Path(test_convert.save(state, test_convert.TEXT)).rename("checkpoint_best.pt")
    student = released.make("image")
    torch.save(released.checkpoint(student, released.make_teacher(student)), "base_imagenet.pt")
    student = released.make("image", released.EAT)
    torch.save(released.checkpoint(student, released.make_teacher(student)), "EAT-base.pt")


def given():
    """Names that the code in README assumes."""
    from transformers import AutoModel

    ids, mask = torch.randint(5, 200, (2, 20)), torch.rand(2, 20) < 0.5
    parameters = [nn.Parameter(torch.zeros(1))]
    return dict(
        AutoModel=AutoModel, ids=ids, mask=mask, masked_ids=ids.masked_fill(mask, 3), optimizer=torch.optim.SGD(parameters),
        encoder=nn.Linear(8, 8), head=nn.Linear(8, 8), states=torch.randn(2, 20, 8),
        last_k_layers=[torch.randn(2, 20, 8)] * 3, padding_mask=torch.zeros(2, 20, dtype=torch.bool),
    )  # fmt: skip


def smaller(args):
    """The same command line for a small model and few steps."""
    args = [re.sub(r"^train\.steps=.+", "train.steps=4", arg) for arg in args]
    if "--config" not in args or "--help" in args:
        return args  # --resume RUN has the settings of the run
    config, _ = parse([arg for arg in args if arg not in ("--resume", "--print_config")])
    steps = STEPS[1:] if "train.steps=4" in args else STEPS
    if config.parts:
        small = [f"several.parts.{name}.{setting}" for name, part in config.parts.items() for setting in smaller_model(part)]
        return [*args, *steps, *small]
    return [*args, *steps, *smaller_model(config)]


def smaller_model(config):
    free = config.encoder.pretrained is None and ":" not in config.encoder.model
    small = [s for s in SMALL[config.modality] if free or not s.startswith("encoder.config.")]
    if config.head.kind == "conv":
        small += ["head.width=16", "data.views=2"]
    if config.encoder.model == "hubert":
        small = [s for s in small if "conv_dim" not in s]
    if "num_key_value_heads" in config.encoder.config:
        small += ["encoder.config.num_key_value_heads=2"]
    return ["targets.top_k=2", *small]


def run(monkeypatch, command):
    """Run one command line; for `make`, the commands that it would run."""
    words = shlex.split(command, comments=True)
    if NO_TIMM in command or any(command.startswith(known) for known in ELSEWHERE):
        return
    if words[0] == "make":
        command = ["make", "-n", "--no-print-directory", "-C", ROOT, *words[1:]]
        recipe = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        mine = [line for line in recipe.splitlines() if re.search(r"bin/(d2v-|mkdocs)", line)]
        assert mine
        for line in mine:
            run(monkeypatch, line.rpartition(".venv/bin/")[2])
        return
    if words[:2] == ["mkdocs", "build"]:
        return  # the lint workflow
    assert words[0].startswith("d2v-"), command
    name, args = words[0].removeprefix("d2v-"), words[1:]
    for arg, following in itertools.pairwise([*args, ""]):  # alternatives of a page share a folder
        place = following if arg == "--to" else arg.removeprefix("train.output=") if arg.startswith("train.output=") else None
        if place and "--resume" not in args:
            shutil.rmtree(place, ignore_errors=True)
    monkeypatch.setattr(sys, "argv", [words[0], *(smaller(args) if name == "train" else args)])
    with pytest.raises(SystemExit) as exit:
        getattr(cli, name)()
    assert exit.value.code in (0, None), f"{command}: {exit.value.code}"


@pytest.mark.parametrize("page", PAGES)
def test_page_runs(page, workspace, monkeypatch, caplog):
    names = {"__name__": "page"}
    if page in ("README.md", "docs/training.md", "docs/after-training.md"):
        names |= given()
        run(monkeypatch, "d2v-train --config vision/beit-base data.path=photos/ train.output=run")
        for copy in ("run-a", "run-b"):
            shutil.copytree("run", copy)
    blocks = BLOCK.findall((ROOT / page).read_text())
    assert blocks or page in ("docs/method.md", "docs/speed.md")
    sys.path.insert(0, str(Path.cwd()))
    for kind, text in blocks:
        if file := re.match(r"(?:#!.+\n)?# (\w+\.\w+)\n", text):
            Path(file[1]).write_text(text)
            sys.modules.pop(Path(file[1]).stem, None)  # of another page
            importlib.invalidate_caches()
        if kind == "sh" and not file:
            for line in text.splitlines():
                for command in filter(None, line.split("&&")):
                    run(monkeypatch, command.strip())
        elif kind == "python":
            if NO_TIMM not in text:
                exec(compile(text, page, "exec"), names)
        else:
            assert kind in ("sh", "yaml") and file


@pytest.mark.parametrize("page", PAGES)
def test_links_and_files_of_a_page_exist(page):
    text = (ROOT / page).read_text()
    for link in re.findall(r"\]\(([^)#]+)(?:#[\w-]*)?\)", text):
        assert link.startswith("https://") or ((ROOT / page).parent / link).exists(), link
    for file in re.findall(r"`((?:examples|tests|benchmarks|docs)/[\w./]+\w)`", text):
        assert (ROOT / file).exists(), file


@pytest.mark.parametrize("page", PAGES)
def test_settings_of_a_page_exist(page):
    """Also those in tables and sentences."""
    from d2v_fast.config import _parser

    kinds = {"text": ["token"], "vision": ["block", "random", "exact"], "audio": ["span"], "spectrogram": ["exact"]}
    known = {action.dest for modality in kinds for kind in kinds[modality] for action in _parser(modality, kind)._actions}
    sections = {name.partition(".")[0] for name in known if "." in name}
    words = re.findall(r"`([^`\n]+)`", BLOCK.sub("", (ROOT / page).read_text()))
    if page.endswith("coming-from.md"):
        words = [word for line in (ROOT / page).read_text().splitlines() if line.startswith("|") for word in
                 re.findall(r"`([^`]+)`", line.rsplit("|", 2)[1])]  # fmt: skip
    for word in words:
        for setting in re.findall(r"(?:^|\s)([a-z]+\.[a-z_0-9.]+)", word):
            is_file = setting.endswith(".safetensors")
            if setting.partition(".")[0] in sections and not setting.startswith("encoder.config.") and not is_file:
                assert setting in known, setting


def test_the_guide_to_health_has_the_figures_of_the_report_and_the_alarms_of_the_monitor():
    text = (ROOT / "docs" / "health.md").read_text()
    tables = re.findall(r"^\| (figure|alarm) \|.*\n.*\n((?:\|.*\n)+)", text, flags=re.MULTILINE)
    names = {
        head: [name for row in rows.splitlines() for name in row.split("|")[1].strip().split("; ")] for head, rows in tables[:2]
    }
    titles = {figure.title: figure for figure in FIGURES.values()}
    assert set(names["figure"]) <= titles.keys() and len(names["figure"]) == 13
    for _, title, *_, bound, _ in (re.split(r" *\| *", row) for row in tables[2][1].splitlines()):
        rule, (setting, value) = titles[title].rule, bound.strip("`").split("=")
        assert (setting, float(value)) == (f"collapse.{rule.bound}", getattr(CollapseConfig, rule.bound))
    meanings = [rule.meaning for rule in RULES.values()]
    assert all(any(name in meaning for meaning in meanings) for name in names["alarm"])
    assert all(any(name in meaning for name in names["alarm"]) for meaning in meanings)


def test_the_guide_to_training_lists_the_files_of_a_run():
    rows = re.search(r"^\| file \| what \|\n((?:\|.*\n)+)", (ROOT / "docs" / "training.md").read_text(), re.MULTILINE)[1]
    in_others = {"STEP", "HEAD", "TEACHER"}
    expected = {value for name, value in vars(files).items() if name.isupper() and name not in in_others}
    assert set(re.findall(r"`([\w.]+)[`/]", rows.replace("run/", ""))) == expected | {"tensorboard"}


@pytest.mark.parametrize("cls", [TextData, AudioData])
def test_the_help_of_a_data_set_has_the_default_of_its_modality(cls):
    (modality,) = (m for m in MODALITIES.values() if m.data and m.data.endswith(f":{cls.__name__}"))
    assert f"null = {modality.length_multiple} on a GPU" in inspect.getdoc(cls)


def test_the_site_has_every_guide():
    """A page that is missing from `nav` or from docs/ would also fail `make docs`, which takes longer."""
    nav = yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]
    pages = [page for entry in nav for page in ([entry] if isinstance(entry, str) else next(iter(entry.values())))]
    assert sorted(pages) == sorted(["index.md", "api.md", *(page.name for page in (ROOT / "docs").glob("*.md"))])
    for link in re.findall(r"\]\((?!https:)([^)#]+)", site.home()):
        assert (ROOT / "docs" / link).exists(), link


def documented(docstring):
    """The names in the Args section of a docstring."""
    section = re.search(r"^( *)Args:\n((?:\1 .*\n|\n)+)", f"{docstring}\n", re.MULTILINE)
    return set(re.findall(rf"^{section[1]}    (\w+): ", section[2], re.MULTILINE)) if section else set()


def taken(node):
    """Names of the arguments of a function or class, as far as its own code says."""
    if isinstance(node, ast.ClassDef):
        fields = {each.target.id for each in node.body if isinstance(each, ast.AnnAssign)}
        inits = [each for each in node.body if isinstance(each, ast.FunctionDef) and each.name == "__init__"]
        return fields.union(*map(taken, inits))
    arguments = node.args
    named = [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]
    return {each.arg for each in named if each}


SOURCES = sorted((ROOT / "d2v_fast").rglob("*.py"))


@pytest.mark.parametrize("file", SOURCES, ids=lambda file: str(file.relative_to(ROOT)))
def test_docstrings_describe_arguments_that_exist(file):
    """And modules have one."""
    tree = ast.parse(file.read_text(encoding="utf-8"))
    assert ast.get_docstring(tree) or file.name == "__init__.py"
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            assert documented(ast.get_docstring(node)) <= taken(node), node.name


def test_public_names_describe_all_their_arguments():
    for name in d2v_fast._HOME:
        member = getattr(d2v_fast, name)
        assert member.__doc__, name
        if documented(inspect.getdoc(member)):
            assert inspect.signature(member).parameters.keys() == documented(inspect.getdoc(member)), name


def test_the_picture_of_the_structure_is_current():
    """Regenerate it with `python -m tools.structure`. A circle of imports raises here."""
    assert structure.picture(structure.imports()) == structure.PICTURE.read_text(encoding="utf-8")


def test_structure_of_a_small_package(tmp_path):
    package = tmp_path / "small"
    (package / "low").mkdir(parents=True)
    (package / "__init__.py").write_text("from small import high\n")
    (package / "high.py").write_text("import small.middle\nfrom small.low import x\nfrom small.low.y import z\n")
    (package / "middle.py").write_text("from small import low\n\ndef later():\n    from small import high\n")
    (package / "low" / "x.py").write_text("if TYPE_CHECKING:\n    from small import high\n")
    (package / "low" / "run.py").write_text('from small import high\nif __name__ == "__main__":\n    high\n')
    graph = structure.imports(package)
    assert graph == {"high": {"middle", "low"}, "middle": {"low"}, "low": set(), "low.run": {"high"}}
    assert structure.layers(graph) == {"low": 0, "middle": 1, "high": 2, "low.run": 3}
    assert structure.reduced(graph) == {"high": {"middle"}, "middle": {"low"}, "low": set(), "low.run": {"high"}}
    (package / "middle.py").write_text("from small import low, high\n")
    with pytest.raises(graphlib.CycleError):
        structure.layers(structure.imports(package))


def test_lines_of_modules_and_classes_before_and_after(tmp_path):
    before = {"ema.py": "import x\n\n@x\nclass Teacher:\n    a = 1\n", "old.py": "class Gone: ...\n"}
    after = {"ema.py": "class Teacher:\n    def f():\n        class Inner: ...\n\n\nclass New:\n    a = 1\n"}
    (tmp_path / lines.PACKAGE / "data").mkdir(parents=True)
    for name, source in before.items():
        (tmp_path / lines.PACKAGE / name).write_text(source)
    (tmp_path / lines.PACKAGE / "data" / "__init__.py").write_text("é = 1\n", encoding="utf-8")
    (tmp_path / lines.PACKAGE / "notes.txt").touch()
    author = ["-c", "user.name=a", "-c", "user.email=a@b"]
    for command in (["init", "-q"], ["add", "."], [*author, "commit", "-q", "-m", "all"]):
        subprocess.run(["git", *command], cwd=tmp_path, check=True)
    assert lines.at("HEAD", tmp_path) == lines.in_tree(tmp_path) == before | {"data/__init__.py": "é = 1\n"}
    assert [row.split() for row in lines.table(before, after).splitlines()] == [
        ["before", "after"],
        ["ema.py", "5", "7"],
        ["Teacher", "3", "3"],
        ["New", "-", "2"],
        ["old.py", "1", "-"],
        ["Gone", "1", "-"],
        ["total", "6", "7"],
    ]


def test_citations_of_the_method_open():
    """A "method 1.4" in a comment, a docstring or a preset is a section of docs/method.md."""
    sections = set(re.findall(r"^#{2,3} (\d(?:\.\d)?) ", (ROOT / "docs/method.md").read_text(), re.MULTILINE))
    cited = set()
    folders = ("d2v_fast", "kernels", "benchmarks", "tests", "docs", "examples", "tools", ".github")
    files = [*ROOT.glob("*.md"), *(file for folder in folders for file in (ROOT / folder).rglob("*"))]
    for file in files:
        if file.suffix in (".py", ".yaml", ".yml", ".cpp", ".h", ".md", ".ipynb"):
            for numbers in re.findall(r"\bmethod ((?:\d(?:\.\d+)?(?:, | and )?)+)", file.read_text(encoding="utf-8")):
                found = re.findall(r"\d(?:\.\d+)?", numbers)
                assert sections.issuperset(found), f"{file.relative_to(ROOT)}: method {numbers}"
                cited |= set(found)
    assert len(cited) > 25


def test_deviations_from_the_reference_name_a_file_and_a_reason():
    section = (ROOT / "docs/method.md").read_text().partition("### 7.1 ")[2].partition("### 7.2 ")[0]
    rows = re.findall(r"^\|(.+)\|(.+)\|(.+)\|(.+)\|$", section, re.MULTILINE)[2:]
    assert len(rows) == 10
    for reference, file, here, reason in rows:
        assert "](https://github.com/" in file and reference.strip() and here.strip() and reason.strip(), reference
