"""The commands: d2v-train, d2v-probe, d2v-export, d2v-report and d2v-doctor."""

from __future__ import annotations

import gc
import importlib
import io
import logging
import os
import sys
from collections.abc import Callable

from d2v_fast import __version__
from d2v_fast.config import parse


def _printable(text: str) -> str:
    """`text` with control characters escaped: a file name may hold some, and a terminal would obey them."""
    return "".join(c if c.isprintable() or c in "\n\t" else repr(c)[1:-1] for c in text)


class _Formatter(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return _printable(super().format(record))


def _expand_home(argument: str) -> str:
    """Expand a leading ~ in a path or in the value of key=path, which a shell does not expand."""
    key, equals, value = argument.partition("=")
    return os.path.expanduser(key) + equals + os.path.expanduser(value)


def _run(name: str, command: Callable[[list[str]], int | str | None]) -> None:
    """Run a command. Errors that the user can fix are shown as one message instead of a traceback."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")  # as stderr: Windows writes to pipes and files in its old code pages
    if "--version" in sys.argv[1:]:
        print(f"{name} {__version__}")
        sys.exit()
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Formatter("%(message)s"))
    logging.basicConfig(level=logging.INFO, handlers=[handler])
    # Logs of these libraries are not relevant to the user, or repeated in the error they raise.
    for library in ("httpx", "transformers", "accelerate"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for library in ("DATASETS", "HF_HUB"):  # they set their own level on import
        os.environ.setdefault(f"{library}_VERBOSITY", "critical")
    os.environ.setdefault("TQDM_DELAY", "2")  # no bars for short work
    sys.path.append(os.getcwd())  # to find your own encoder modules
    try:
        result = command([_expand_home(argument) for argument in sys.argv[1:]])
    except KeyboardInterrupt:
        result = 130
    except ImportError as error:
        cause: BaseException = error
        while cause.__cause__:  # transformers names only the class that could not be imported
            cause = cause.__cause__
        result = f"{name}: a package is missing or broken, d2v-doctor may name it: {type(cause).__name__}: {cause}"
    except (ValueError, OSError) as error:
        message = str(error)
        if "in DataLoader worker" in message:  # the worker's traceback; its last line is the error
            message = message.strip().splitlines()[-1].partition(": ")[2]
        result = f"{name}: {message}"
    sys.exit(_printable(result) if isinstance(result, str) else result)


def train() -> None:
    """d2v-train: pre-train."""
    _run("d2v-train", _train)


def probe() -> None:
    """d2v-probe: evaluate a frozen encoder."""
    _run("d2v-probe", _main_of("probe"))


def export() -> None:
    """d2v-export: to Hugging Face, from a run or from another project's checkpoint."""
    _run("d2v-export", _main_of("export"))


def report() -> None:
    """d2v-report: runs as an HTML page."""
    _run("d2v-report", _main_of("report"))


def doctor() -> None:
    """d2v-doctor: facts for a bug report, and problems of this machine."""
    _run("d2v-doctor", _main_of("diagnostics", "doctor"))


def _train(args: list[str]) -> int | str:
    config, fused = parse(args)
    import torch.distributed

    from d2v_fast.diagnostics import CollapseError
    from d2v_fast.train import train
    from d2v_fast.train.guards import NotFiniteError

    try:
        code: int | str = train(config, fused)
    except (CollapseError, NotFiniteError) as error:
        code = f"d2v-train: {error}"
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError | torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        code = f"d2v-train: out of memory; a smaller train.batch_size with a larger train.accumulate needs less: {error}"
    # A gloo thread that frees a tensor during interpreter shutdown aborts the process. Destroying the group joins its threads
    # once nothing refers to it. Not after other errors: a collective may be in progress, and this would wait for it.
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()
    return code


def _main_of(module: str, function: str = "main") -> Callable[[list[str]], None]:
    """A command whose module is imported only when it runs, so that import errors become messages too."""
    return lambda args: getattr(importlib.import_module(f"d2v_fast.{module}"), function)(args)


if __name__ == "__main__":
    train()
