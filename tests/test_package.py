import ast
import importlib
import re
import shutil
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from pathlib import Path

import pytest
import torch
import yaml
from transformers import ViTConfig, ViTModel

import d2v_fast
from d2v_fast import wrap

ROOT = Path(d2v_fast.__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))


def loaded_by(statement):
    code = f"import sys; {statement}; print(*sys.modules)"
    return set(subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True).stdout.split())


def test_public_names_are_frozen():
    assert d2v_fast.__all__ == [
        "__version__", "Callback", "ConvDecoder", "Data2Vec", "Data2Vec2AudioConfig", "Data2Vec2AudioForCTC",
        "Data2Vec2AudioForSequenceClassification", "Data2Vec2AudioModel", "Data2Vec2VisionConfig",
        "Data2Vec2VisionForImageClassification", "Data2Vec2VisionModel", "Data2VecLoss", "EMAConfig", "EMATeacher", "Encoder",
        "HeadConfig", "LossConfig", "TargetsConfig", "build_encoder", "data2vec_loss", "wrap",
    ]  # fmt: skip
    assert all(getattr(d2v_fast, name) is not None for name in d2v_fast.__all__)


def test_the_package_loads_nothing_before_it_is_used():
    assert not loaded_by("import d2v_fast") & {"torch", "transformers", "datasets"}


def test_loss_teacher_and_model_need_torch_alone():
    """The parts that run on a bare GPU machine do not import the libraries of the data and the loop."""
    heavy = {"transformers", "datasets", "accelerate", "jsonargparse", "soundfile", "sklearn", "PIL"}
    assert not loaded_by("from d2v_fast import Data2Vec, Data2VecLoss, EMATeacher, data2vec_loss") & heavy


def test_no_package_called_kernels():
    """transformers would import it instead of Hugging Face's."""
    assert not (ROOT / "kernels" / "__init__.py").exists()


def test_text_files_are_utf_8_in_every_locale():
    opens_text = re.compile(r"""\.(read|write)_text\(|(?<![\w.])open\((?!.*b["'])|\.open\((\)|["'][^b]["'])""")
    for file in [ROOT / "setup.py", *(ROOT / "d2v_fast").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        for number, line in enumerate(file.read_text(encoding="utf-8").splitlines(), start=1):
            assert "encoding=" in line or not opens_text.search(line), f"{file}:{number}: give an encoding"


def test_no_module_that_windows_lacks_is_imported():
    lacking = {"fcntl", "resource", "pwd", "grp", "termios", "pty", "tty", "posix", "readline", "syslog"}
    for file in (ROOT / "d2v_fast").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [node.module] if isinstance(node, ast.ImportFrom) else getattr(node, "names", [])
            assert not lacking & {str(getattr(name, "name", name)).partition(".")[0] for name in names}, file


def test_presets_and_guides_are_in_the_wheel():
    patterns = PROJECT["tool"]["setuptools"]["package-data"]["d2v_fast"]
    package = ROOT / "d2v_fast"
    packaged = {file for pattern in patterns for file in package.glob(pattern)}
    assert {*package.rglob("*.yaml"), *package.rglob("*.html"), *(package / "docs").glob("*.*")} <= packaged


def test_every_command_is_installed():
    """test_cli.py checks their --version."""
    commands = PROJECT["project"]["scripts"]
    assert list(commands) == ["d2v-train", "d2v-probe", "d2v-export", "d2v-report", "d2v-doctor"]
    for command, target in commands.items():
        module, _, function = target.partition(":")
        assert getattr(importlib.import_module(module), function).__doc__.startswith(command)


def strings(node):
    """All strings of a parsed YAML file."""
    if isinstance(node, dict | list):
        return [text for value in (node.values() if isinstance(node, dict) else node) for text in strings(value)]
    return [str(node)]


@pytest.mark.parametrize("file", sorted((ROOT / ".github").rglob("*.yml")), ids=lambda file: file.name)
def test_what_the_workflows_name_exists(file):
    """Make targets, extras, commands and other workflows."""
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE))
    parsed = yaml.safe_load(file.read_text(encoding="utf-8"))
    for text in strings(parsed):
        for words in re.findall(r"\bmake ((?:[a-z][\w-]* ?)+)", text):
            assert set(words.split()) <= targets, text
        for extras in re.findall(r"\.\[([\w,-]+)\]", text):
            assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"]), text
        for command in re.findall(r"\bd2v-[a-z]+", text):
            assert command in PROJECT["project"]["scripts"], text
    for line in file.read_text(encoding="utf-8").splitlines():  # commits, because a tag can be moved
        if used := re.search(r"\buses: (.+)", line):
            local = used[1].startswith(".") and (ROOT / used[1]).exists()
            assert local or re.fullmatch(r"[\w-]+/[\w-]+@[0-9a-f]{40}  # v[\d.]+", used[1]), line
        for tool in re.findall(r"\bpipx run (\S+)", line):
            assert re.fullmatch(r"[\w-]+==[\d.]+", tool), line


def test_workflows_test_the_oldest_versions_allowed():
    floors = dict(re.findall(r"^(\w+)>=([\d.]+)$", "\n".join(PROJECT["project"]["dependencies"]), re.MULTILINE))
    workflow = yaml.safe_load((ROOT / ".github/workflows/test.yml").read_text(encoding="utf-8"))
    oldest = workflow["jobs"]["suite"]["strategy"]["matrix"]["include"][0]
    assert PROJECT["project"]["requires-python"] == f">={oldest['python']}"
    for name in ("torch", "transformers"):
        assert oldest[name] == f"{name}=={floors[name]}.0"


def test_the_container_runs_the_commands_of_the_demo():
    """With the same settings as `make demo`."""
    make = ["make", "-n", "--no-print-directory", "demo"]
    demo = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    commands = re.findall(r"(?<=bin/)d2v-.+", demo)[-2:]
    command = re.search(r'^CMD \["sh", "-c", "(.+)"\]$', (ROOT / "Dockerfile").read_text(encoding="utf-8"), re.MULTILINE)[1]
    assert command.replace("/tmp/demo", "runs/demo").split(" && ") == commands


def test_pre_commit_runs_what_lint_runs():
    make = ["make", "-n", "--no-print-directory", "lint"]
    lint = subprocess.run(make, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    tools = re.findall(r"(?<=bin/)(ruff \w+|mypy)", lint)
    config = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text(encoding="utf-8"))
    entries = [hook["entry"] for repo in config["repos"] for hook in repo["hooks"]]
    assert len(tools) == len(entries) == 3
    assert all(re.match(rf"(\.venv/bin/)?{tool}\b", entry) for tool, entry in zip(tools, entries, strict=True))


def test_the_version_is_stated_once():
    assert PROJECT["project"]["dynamic"] == ["version"]
    assert PROJECT["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "d2v_fast.__version__"}
    assert f"\nversion: {d2v_fast.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")


def test_guides_that_the_package_names_can_be_opened():
    """They are part of the wheel."""
    package = ROOT / "d2v_fast"
    sources = [file for kind in ("py", "html", "yaml") for file in package.rglob(f"*.{kind}")]
    named = {name for file in sources for name in re.findall(r"docs/([\w-]+\.\w+)", file.read_text())}
    assert "encoders.md" in named
    for name in named:
        assert (package / "docs" / name).read_text().startswith("# "), name
    model = ViTModel(ViTConfig(image_size=8, patch_size=4, hidden_size=8, num_hidden_layers=1, num_attention_heads=1))
    model.layernorm = torch.nn.Identity()
    model.layernorm.forward = lambda x: x + torch.rand(())
    with pytest.raises(ValueError, match="see ") as error:
        wrap(model)
    assert Path(str(error.value).rpartition("see ")[2]).is_file()


@pytest.mark.slow
def test_a_wheel_from_the_sdist_has_all_parts(tmp_path):
    """Kernels compiled, presets, types, licence; no tests."""
    names = "d2v_fast docs kernels examples tests setup.py pyproject.toml MANIFEST.in CMakeLists.txt README.md LICENSE".split()
    for name in names + "CHANGELOG.md CITATION.cff CONTRIBUTING.md Makefile".split():
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    (tmp_path / "d2v_fast/ops/libd2v_fast.so").unlink(missing_ok=True)
    (tmp_path / "d2v_fast/ops/libother.so").write_bytes(b"of another machine")

    def build(what, folder):
        code = f"from setuptools import build_meta; build_meta.build_{what}({str(tmp_path)!r})"
        subprocess.run([sys.executable, "-c", code], cwd=folder, check=True, capture_output=True)

    build("sdist", tmp_path)
    (archive,) = tmp_path.glob("*.tar.gz")
    tarfile.open(archive).extractall(tmp_path, filter="data")
    build("wheel", tmp_path / archive.name.removesuffix(".tar.gz"))
    (wheel,) = tmp_path.glob("*.whl")
    assert re.fullmatch(r"d2v_fast-[\d.]+-py3-none-(?!any)\w+\.whl", wheel.name)
    found = zipfile.ZipFile(wheel).namelist()
    for name in (
        "ops/libd2v_fast.so",
        "py.typed",
        "docs/encoders.md",
        *(f"presets/{p}.yaml" for p in ("text/tiny", "vision/tiny", "audio/tiny")),
    ):
        assert f"d2v_fast/{name}" in found
    assert any(name.endswith("licenses/LICENSE") for name in found)
    assert [name for name in found if name.endswith(".so")] == ["d2v_fast/ops/libd2v_fast.so"]
    assert not [name for name in found if name.startswith(("tests", "examples", "kernels", "benchmarks"))]
    assert not [name for name in found if "__pycache__" in name]
