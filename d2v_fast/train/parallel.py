"""Devices and ranks, through accelerate: a single process, or those started by torchrun."""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any

import torch

from d2v_fast.config import ConfigError, TrainConfig, has_bf16

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)


def start(train: TrainConfig) -> Accelerator:
    """Select the device and join the other ranks, if any.

    Raises:
        ConfigError: The device does not exist, or parallelism other than data parallelism through torchrun is requested.
    """
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState
    from accelerate.utils import AutocastKwargs, DistributedDataParallelKwargs, InitProcessGroupKwargs

    check_device(train.device)
    check_slurm()
    AcceleratorState._reset_state()  # otherwise a second run in this process could not change precision
    with without_accelerate_variables() as hidden:
        accelerator = Accelerator(
            mixed_precision={"fp32": "no"}.get(train.precision, train.precision),
            # Also set without an accelerator: accelerate joins torchrun's ranks on the CPU only then.
            cpu=train.device == "cpu" or not torch.accelerator.is_available(),
            kwargs_handlers=[
                DistributedDataParallelKwargs(gradient_as_bucket_view=True),  # otherwise gradients are stored twice
                InitProcessGroupKwargs(timeout=timedelta(minutes=train.timeout_minutes)),
                # Otherwise autocast keeps a cast copy of all weights until the forward pass ends.
                AutocastKwargs(cache_enabled=False if train.checkpointing else None),
            ],
        )
    if train.threads:  # after accelerate, which may set them too
        torch.set_num_threads(train.threads)
    if accelerator.is_main_process:
        check_restarts()
        if train.precision == "bf16" and not has_bf16(kind := accelerator.device.type):
            faster = "fp16" if kind == "cuda" else "fp32"
            log.warning("train.precision=bf16 is slow: this %s has no bf16 instructions; use train.precision=%s", kind, faster)
    if hidden and accelerator.is_main_process:
        names = ", ".join(f"{name}={value}" for name, value in hidden.items())
        log.warning("%s: ignored, a run takes its settings only from its config", names)
    return accelerator


def check_device(wanted: str) -> None:
    """Raise ConfigError if torch does not find the device of train.device."""
    found = torch.accelerator.current_accelerator(check_available=True)
    if wanted not in ("auto", "cpu", found and found.type):
        raise ConfigError(
            f"train.device={wanted}: torch {torch.__version__} finds {found.type if found else 'no GPU'}; d2v-doctor may show "
            "why; train.device=auto uses what is available"
        )


def check_slurm() -> None:
    """Raise ConfigError if srun has started several independent processes."""
    tasks = os.environ.get("SLURM_STEP_NUM_TASKS", "1")
    if tasks != "1" and "WORLD_SIZE" not in os.environ:
        raise ConfigError(
            f"SLURM_STEP_NUM_TASKS={tasks}: srun has started {tasks} processes, which would be {tasks} runs; for one run, "
            "start torchrun once per node: srun --ntasks-per-node=1 torchrun --nnodes=$SLURM_JOB_NUM_NODES "
            "--nproc-per-node=GPUS --rdzv-backend=c10d --rdzv-endpoint=FIRST_NODE:29500 -m d2v_fast.cli …; for separate runs, "
            "unset the variable"
        )


def check_restarts() -> None:
    """Warn if torchrun may restart the processes with a store that still has the addresses of the previous ones."""
    restarts = os.environ.get("TORCHELASTIC_MAX_RESTARTS", "0")
    if restarts != "0" and os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        log.warning(
            "torchrun --max-restarts=%s: restarted processes may fail to connect (pytorch issue 167288); start torchrun with "
            "TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 and --standalone or --rdzv-backend=c10d",
            restarts,
        )


@contextmanager
def without_accelerate_variables() -> Iterator[dict[str, str]]:
    """Hide the environment variables that configure accelerate, so that a run depends only on its config; yield them.

    Raises:
        ConfigError: A variable requests FSDP, DeepSpeed or similar.
    """
    hidden = {name: value for name, value in os.environ.items() if name.startswith("ACCELERATE_")}
    for name, value in hidden.items():
        off = value.lower() in ("", "0", "n", "no", "f", "false", "off")
        if name.startswith("ACCELERATE_USE_") and name != "ACCELERATE_USE_CPU" and not off:
            raise ConfigError(
                f"{name}={value}: d2v-train has data parallelism only; unset it and start the ranks with torchrun"
            )
    for name in hidden:
        del os.environ[name]
    try:
        yield hidden
    finally:
        os.environ.update(hidden)


def from_main(value: Any) -> Any:
    """The main process's value, on all ranks."""
    from accelerate.utils import broadcast_object_list

    return broadcast_object_list([value])[0]


def on_any(accelerator: Accelerator, *flags: bool) -> list[bool]:
    """For each flag, whether it is set on any rank."""
    if accelerator.num_processes == 1:
        return list(flags)
    counts = accelerator.reduce(torch.tensor(flags, dtype=torch.float, device=accelerator.device), "sum")
    return (counts > 0).tolist()
