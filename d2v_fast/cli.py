"""The commands: d2v-train, d2v-probe, d2v-export, d2v-report and d2v-doctor."""

from __future__ import annotations

import gc
import importlib
import logging
import os
import sys
from collections.abc import Callable

from d2v_fast.config import parse


def _run(name: str, command: Callable[[list[str]], int | str | None]) -> None:
    """Run a command: what the user can mend ends in one message and not in a traceback."""
    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # What a library logs is either not news to the user of this one, or said again in the error it raises.
    for library in ("httpx", "transformers", "accelerate"):
        logging.getLogger(library).setLevel(logging.WARNING)
    for library in ("DATASETS", "HF_HUB"):  # they set their level themselves, when they are imported
        os.environ.setdefault(f"{library}_VERBOSITY", "critical")
    os.environ.setdefault("TQDM_DELAY", "2")  # no bars for what takes a moment
    sys.path.append(os.getcwd())  # where an encoder of your own lies
    try:
        sys.exit(command(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit(130)
    except (ValueError, OSError) as error:
        message = str(error)
        if "in DataLoader worker" in message:  # the traceback of the worker, its last line is the error
            message = message.strip().splitlines()[-1].partition(": ")[2]
        sys.exit(f"{name}: {message}")


def train() -> None:
    """d2v-train: pre-train."""
    _run("d2v-train", _train)


def probe() -> None:
    """d2v-probe: what a frozen encoder has learned."""
    _run("d2v-probe", _main_of("probe"))


def export() -> None:
    """d2v-export: to Hugging Face, from a run or from another project's checkpoint."""
    _run("d2v-export", _main_of("export"))


def report() -> None:
    """d2v-report: runs as an HTML page."""
    _run("d2v-report", _main_of("report"))


def doctor() -> None:
    """d2v-doctor: what a bug report needs, and what is slow or wrong on this machine."""
    _run("d2v-doctor", _main_of("diagnostics", "doctor"))


def _train(args: list[str]) -> int | str:
    config, fused = parse(args)
    import torch.distributed

    from d2v_fast import diagnostics, training

    try:
        code = training.train(config, fused)
    except (diagnostics.CollapseError, training.NotFiniteError) as error:
        code = f"d2v-train: {error}"
    # A thread of gloo that lets go of a tensor while the interpreter ends aborts the process. The threads are waited for once
    # nobody holds the group any more. Not after other errors: a collective may be under way then, and would be waited for too.
    if torch.distributed.is_initialized():
        gc.collect()
        torch.distributed.destroy_process_group()
    return code


def _main_of(module: str, function: str = "main") -> Callable[[list[str]], None]:
    """A command that imports what it needs only when it runs, inside of what turns errors into messages."""
    return lambda args: getattr(importlib.import_module(f"d2v_fast.{module}"), function)(args)


if __name__ == "__main__":
    train()
