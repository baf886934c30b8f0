import atexit
import logging
import os
import shutil
import signal
import sys
import tempfile

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # tests must not depend on a hub
os.environ["HF_HOME"] = tempfile.mkdtemp(prefix="d2v-cache-")  # tests must not leave cached data behind

import pytest
import torch

torch.set_num_threads(1)
atexit.register(shutil.rmtree, os.environ["HF_HOME"], ignore_errors=True)


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item, call):
    """Escape logged file names that are not UTF-8, so that pytest-xdist can send the report."""
    report = yield
    report.sections = [(title, text.encode(errors="backslashreplace").decode()) for title, text in report.sections]
    return report


@pytest.fixture(autouse=True)
def poisoned_empty(monkeypatch):
    """Fill uninitialised memory with NaN, so that unwritten outputs are detected."""

    def poison(make):
        def made(*args, **kwargs):
            tensor = make(*args, **kwargs)
            if tensor.is_floating_point() and not tensor.is_meta:
                tensor.detach().fill_(float("nan"))  # torch 2.11 creates some that require a gradient
            return tensor

        return made

    for name in ("empty", "empty_like"):
        monkeypatch.setattr(torch, name, poison(getattr(torch, name)))


@pytest.fixture(params=[torch.float64, torch.bfloat16, torch.float16], ids=str)
def default_dtype(request):
    torch.set_default_dtype(request.param)
    yield
    torch.set_default_dtype(torch.float32)


@pytest.fixture
def here(tmp_path, monkeypatch):
    """An empty working folder for commands; restores process state afterwards."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.setenv("TQDM_DELAY", "2")
    levels = {name: logging.getLogger(name).level for name in ("", "httpx", "transformers", "accelerate", "datasets")}
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield
    for number, handler in handlers.items():
        signal.signal(number, handler)
    for name, level in levels.items():
        logging.getLogger(name).setLevel(level)


@pytest.fixture(scope="session")
def runs(tmp_path_factory):
    """A finished run of each modality."""
    from tests.finished import RUNS, Run

    folder = tmp_path_factory.mktemp("runs")
    return {modality: Run(folder, modality) for modality in RUNS}


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)
