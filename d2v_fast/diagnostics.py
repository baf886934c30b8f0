"""Is the run healthy, and is the machine: the collapse monitor (spec 1.7) and the environment report."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import json
import logging
import math
import os
import platform
import shutil
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor
from torch.nn.utils import get_total_norm

from d2v_fast import __version__, ops
from d2v_fast.config import CollapseConfig
from d2v_fast.model import Data2Vec, Data2VecOutput
from d2v_fast.ops import native
from d2v_fast.ops.reference import LossStats, Moments

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

RANK_ROWS = 512  # states whose effective rank is computed; it cannot exceed their number
CLEAR = 1.5  # a rule that has warned is silent until its figure is this many times its bound away from it


class CollapseError(RuntimeError):
    """A rule of `collapse` was broken and its action is to stop."""


def effective_rank(rows: Tensor) -> Tensor:
    """exp of the entropy of the normalised singular values of rows (N, C): 1 for a constant, at most min(N, C); NaN if any is.

    RankMe (Garrido et al. 2023, equation 2). Computed on the CPU from `RANK_ROWS` rows, evenly taken.
    """
    rows = rows[:: max(1, len(rows) // RANK_ROWS)][:RANK_ROWS].float().cpu()
    if not rows.isfinite().all():
        return torch.tensor(math.nan)
    share = torch.linalg.svdvals(rows)
    share = share / share.sum().clamp(min=1e-12) + 1e-7
    return torch.exp(-(share * share.log()).sum())


def constant_loss(target: Moments, beta: float, scale: float) -> Tensor:
    """Loss of predicting each channel's mean, exact for beta = 0, for normally distributed targets otherwise."""
    variance = target.m2 / target.count.clamp(min=1)
    if beta == 0:
        return scale * variance.sum()
    std = variance.sqrt().clamp(min=1e-12)
    bound = beta / std  # E of e²/2β below beta and of |e| - β/2 above, e ~ N(0, std²)
    density = torch.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi)
    below = variance / (2 * beta) * (torch.erf(bound / math.sqrt(2)) - 2 * bound * density)
    above = 2 * std * density - beta / 2 * torch.erfc(bound / math.sqrt(2))
    return scale * (below + above).sum()


class Rule(NamedTuple):
    """A figure of the log and a bound of CollapseConfig that it is held against."""

    figure: str
    bound: str
    least: bool  # whether the bound is the least that is healthy, else it is the largest
    meaning: str
    remedy: str


SLOWER = "a lower optimizer.lr, a longer schedule.warmup or clipping by train.clip_norm"
FEW = "states shrink to a few directions"
RULES = (
    Rule("target_std", "target_std", True, "targets are becoming constant", f"try a higher ema.start, {SLOWER}"),
    Rule("prediction_std", "prediction_std", True, "predictions are becoming constant", f"try {SLOWER}"),
    Rule("teacher_rank", "rank", True, f"the teacher's {FEW}", f"try a higher ema.start, {SLOWER}"),
    Rule("student_rank", "rank", True, f"the student's {FEW}", f"try {SLOWER}"),
    Rule(
        "feature_variation",
        "variation",
        True,
        "the local features hardly differ, the stem is dead or dying",
        "check the data (silence? one colour?), try head.zero_init=true or a lower rate for the stem by optimizer.lr_scale",
    ),
    Rule("relative_loss", "divergence", False, "predictions are worse than a constant, the run diverges", f"try {SLOWER}"),
    Rule(
        "relative_loss",
        "leak",
        True,
        "the loss is suspiciously low, as if the student saw what it predicts",
        "check that the mask reaches the student and that samples are not all alike, try a higher mask.prob",
    ),
    Rule("teacher_distance", "distance", True, "the teacher is a copy of the student", "try a higher ema.start and ema.end"),
    Rule("ema_decay", "decay", False, "the teacher stands still", "try a lower ema.start and ema.end"),
)


class Monitor:
    """Figures of a run's health at the steps that are logged, and the rules that read them.

    Set `due` before a step that is logged: then it keeps the last output of the model, and the weights from before the update.
    On other steps it does nothing.

    Args:
        model: What is trained.
        optimizer: Of its parameters, as torch made it.
        config: The bounds.
        steps: Of the whole run.
        warmup: Steps of the learning rate's warm-up; until then the figures are near those of random weights.
        accelerator: Pools figures over ranks.
        folder: Where alarms.jsonl is written; None on other ranks than the first.
    """

    def __init__(
        self,
        model: Data2Vec,
        optimizer: torch.optim.Optimizer,
        config: CollapseConfig,
        steps: int,
        warmup: float,
        accelerator: Accelerator,
        folder: Path | None,
    ):
        self.model, self.config, self.accelerator, self.folder = model, config, accelerator, folder
        self.after = max(warmup, min(5000, max(100, steps // 10))) if config.after is None else config.after
        self.parameters = [p for group in optimizer.param_groups for p in group["params"]]
        averaged = [
            (ours, theirs)
            for (name, ours), theirs in zip(model.student.named_parameters(), model.teacher.module.parameters(), strict=True)
            if ours.requires_grad and name not in model.teacher.copied
        ]
        self.student, self.teacher = (list(side) for side in zip(*averaged, strict=True))
        self.active: set[Rule] = set()
        self._forget()
        model.register_forward_hook(self._after_forward, with_kwargs=True)
        optimizer.register_step_pre_hook(self._before_update)

    def state(self) -> list[list[str]]:
        """The rules that have warned and are still broken, for `load_state` in a run that goes on."""
        return [[rule.figure, rule.bound] for rule in RULES if rule in self.active]

    def load_state(self, state: list[list[str]]) -> None:
        self.active = {rule for rule in RULES if [rule.figure, rule.bound] in state}

    def _forget(self) -> None:
        self.due, self.weights = False, None
        self.stats: list[LossStats] = []
        self.last: tuple[dict[str, Any], Data2VecOutput] | None = None

    @torch.no_grad()
    def _after_forward(self, model: Data2Vec, args: tuple, inputs: dict[str, Any], output: Data2VecOutput) -> None:
        if self.due:
            self.stats.append(output.stats)
            self.last = inputs, output

    @torch.no_grad()
    def _before_update(self, *_: Any) -> None:
        # A step that is skipped never comes here, and its update is 0.
        if self.due:
            self.weights = [p.detach().clone() for p in self.parameters]

    @torch.no_grad()
    def figures(self, loss: float) -> dict[str, float]:
        """Figures of the step that was due; here the device is waited for.

        Args:
            loss: What `relative_loss` is to judge, over all ranks.
        """
        inputs, output = self.last
        target, prediction = (self._pooled([getattr(stats, name) for stats in self.stats]) for name in LossStats._fields)
        padding = inputs.get("padding_mask")
        features = output.features.flatten(0, 1) if padding is None else output.features[~padding]
        variance, mean = torch.var_mean(features.float(), dim=0)
        std = variance.sqrt()
        local = {
            "feature_std": std.mean(),
            "feature_variation": (std / (variance + mean**2).sqrt().clamp(min=1e-12)).mean(),
            "student_rank": effective_rank(output.states),
            "teacher_rank": effective_rank(output.teacher_states[inputs["mask"]]),
        }
        device = self.accelerator.device
        means = self.accelerator.reduce(torch.stack([value.to(device) for value in local.values()]), "mean")
        settings = self.model.loss_settings
        worst = float(constant_loss(target, settings["beta"], settings["scale"]))
        update = 0.0
        if self.weights is not None:
            update = float(get_total_norm(torch._foreach_sub([p.detach() for p in self.parameters], self.weights)))
        apart = get_total_norm(torch._foreach_sub(self.student, self.teacher)) / get_total_norm(self.student)
        figures = {
            "target_std": float(target.std),
            "prediction_std": float(prediction.std),
            "relative_loss": loss / max(worst, 1e-12),
            **dict(zip(local, means.tolist(), strict=True)),
            "teacher_distance": float(apart),
            "update_norm": update,
        }
        self._forget()
        return figures

    def _pooled(self, parts: list[Moments]) -> Moments:
        """Over micro-batches and ranks."""
        moments = Moments.pooled(parts)
        if self.accelerator.num_processes > 1:
            gathered = self.accelerator.gather(torch.cat([moments.count[None], moments.mean, moments.m2])[None])
            half = moments.mean.numel() + 1
            moments = Moments.pooled([Moments(row[0], row[1:half], row[half:]) for row in gathered])
        return moments

    def judge(self, record: dict[str, Any]) -> list[str]:
        """Warn of the rules that a line of the log breaks, each once until it is clear of its bound; returns the new ones.

        Raises:
            CollapseError: There are some, and the action is to stop.
        """
        if self.config.action == "off" or record["step"] <= self.after:
            return []
        alarms = []
        for rule in RULES:
            value, bound = record[rule.figure], getattr(self.config, rule.bound)
            if bound == 0 or (rule.figure == "relative_loss" and record["target_std"] < self.config.target_std):
                continue  # switched off, or relative to nothing
            broken = value < bound if rule.least else not value <= bound  # a loss that is NaN has diverged
            if broken and rule not in self.active:
                self.active.add(rule)
                side = "below" if rule.least else "above"
                limit = f"{rule.figure} {value:.4g} is {side} collapse.{rule.bound}={bound:g}"
                alarms.append(f"{rule.meaning}: {limit}; {rule.remedy}")
            elif value > CLEAR * bound if rule.least else value < bound / CLEAR:
                self.active.discard(rule)
        if alarms:
            self._raise(record["step"], alarms)
        return alarms

    def _raise(self, step: int, alarms: list[str]) -> None:
        if self.folder is not None:
            with contextlib.suppress(OSError), (self.folder / "alarms.jsonl").open("a") as file:  # they are on the screen too
                file.write(json.dumps({"step": step, "alarms": alarms}) + "\n")
        if self.config.action == "stop":
            raise CollapseError("\n  ".join([f"step {step}: {alarms[0]}", *alarms[1:]]))
        for alarm in alarms:
            log.warning("step %d: %s", step, alarm)


PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy", "triton", "flash-attn", "apex")
VARIABLES = ("OMP_", "KMP_", "GOMP_", "MKL_", "D2V_", "TRITON_", "CUDA_", "NCCL_", "PYTORCH_", "MALLOC_", "LD_PRELOAD")
EXTENSIONS = {"avx2": "AVX2", "avx512_f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}


def environment(folder: str | Path = ".") -> dict[str, Any]:
    """What a bug report needs, as name → text, and under "warnings" what is slow or wrong here and what to do about it.

    Args:
        folder: Where a run would write, there or not; its free space is what counts.
    """
    import joblib
    from huggingface_hub.constants import HF_HOME
    from torch.utils import collect_env

    warnings = []
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    if driver and not gpus:
        warnings.append(
            f"driver {driver} is there, but torch {torch.__version__} sees no GPU: install a build of torch for CUDA, "
            f"or look at CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')!r}"
        )
    warnings += [f"{gpu.name} has no bf16: train.precision=fp16" for gpu in gpus if gpu.major < 8]

    processor, cores = torch.cpu.get_capabilities(), joblib.cpu_count()  # the cores that affinity and container leave us
    threads, local = torch.get_num_threads(), os.environ.get("LOCAL_WORLD_SIZE", "1")
    ranks = int(local) if local.isdecimal() and int(local) else 1
    if local != str(ranks):
        warnings.append(f"LOCAL_WORLD_SIZE={local!r}: no number of processes: unset it")
    if threads * ranks > cores:
        warnings.append(f"{threads * ranks} threads share {cores} usable cores: OMP_NUM_THREADS={max(1, cores // ranks)}")
    if not gpus and 2 * threads * ranks <= cores:
        warnings.append(f"torch computes on {threads * ranks} of {cores} usable cores: OMP_NUM_THREADS={cores // ranks}")
    if not gpus and not (processor.get("avx512_bf16") or processor.get("amx_bf16")):
        warnings.append("the processor has no instructions for bf16: train.precision=fp32 may be faster, also with --fused")

    losses = {}
    for kernel, device in (("native", "cpu"), ("triton", "cuda")):
        why = ops.obstacle(kernel, device, torch.float32, (torch.float32,))
        losses[device] = f"eager, because of {kernel}: {why}" if why else kernel
        if why and (device == "cuda") == bool(gpus):
            warnings.append(f"the loss runs as plain PyTorch on {device}: {why}")
    if losses["cpu"] == "native":
        isa = native.library().d2v_isa().decode()
        losses["cpu"] += f", {isa}"
        if "D2V_ISA" in os.environ:
            warnings.append(f"D2V_ISA holds the CPU kernels to {isa}: unset it")
    if os.environ.get("TRITON_INTERPRET") == "1":
        warnings.append("TRITON_INTERPRET=1 interprets the GPU kernels, which is slow: unset it")

    shadow = importlib.util.find_spec("kernels")
    if shadow and shadow.origin and not _version("kernels"):
        warnings.append(f"{shadow.origin} is taken for Hugging Face's package kernels and breaks transformers: rename it")
    apex = importlib.util.find_spec("apex")
    if apex and apex.origin and not Path(apex.origin).with_name("optimizers").exists():
        warnings.append(f"apex {_version('apex')} is not NVIDIA's: pip uninstall apex")

    places = {place: _existing(Path(place)) for place in (str(folder), HF_HOME)}
    for place, remedy in ((str(folder), "train.output=elsewhere"), (HF_HOME, "set HF_HOME; data sets are cached there")):
        if not os.access(places[place], os.W_OK):
            warnings.append(f"{place} cannot be written: {remedy}")
    free = {str(folder): shutil.disk_usage(places[str(folder)]).free / 2**30}
    if free[str(folder)] < 5:
        warnings.append(f"{free[str(folder)]:.1f} GiB are free in {folder}: make room, or train.output=elsewhere")
    if os.path.exists("/dev/shm"):
        free["/dev/shm"] = shutil.disk_usage("/dev/shm").free / 2**30
        if free["/dev/shm"] < 1:
            warnings.append(
                f"/dev/shm has {free['/dev/shm']:.2f} GiB, through which workers hand over batches: "
                "docker run --shm-size=8g, or train.workers=0"
            )
    elif sys.platform == "linux":
        warnings.append("there is no /dev/shm, through which workers hand over batches: mount a tmpfs, or train.workers=0")

    preloaded = os.environ.get("LD_PRELOAD", "")
    allocator = next((name for name in ("tcmalloc", "jemalloc", "mimalloc") if name in preloaded), None)
    return {
        "d2v-fast": __version__,
        "python": f"{platform.python_version()} on {platform.platform()}",
        "packages": ", ".join(f"{name} {version}" for name in PACKAGES if (version := _version(name))),
        "processor": ", ".join(
            [
                f"{processor.get('cpu_name', platform.processor())} {platform.machine()}",
                f"{cores} of {os.cpu_count()} cores usable",
                *(label for flag, label in EXTENSIONS.items() if processor.get(flag)),
            ]
        ),
        "threads": f"{threads}" + (f" on each of {ranks} ranks" if ranks > 1 else ""),
        "gpu": "; ".join(f"{g.name}, {g.total_memory / 2**30:.0f} GiB, sm_{g.major}{g.minor}" for g in gpus) or "none",
        "driver": f"{driver or 'none'}, torch built for {f'CUDA {torch.version.cuda}' if torch.version.cuda else 'the CPU'}",
        **{f"loss on {device}": text for device, text in losses.items()},
        "free": ", ".join(f"{size:.1f} GiB in {place}" for place, size in free.items()),
        "allocator": allocator or "of the C library; tcmalloc, by LD_PRELOAD, can be faster on a CPU",
        "variables": " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)) or "none",
        "warnings": warnings,
    }


def _existing(path: Path) -> Path:
    """The folder of `path` that is there."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def doctor(args: list[str]) -> None:
    """d2v-doctor: print `environment()`."""
    parser = argparse.ArgumentParser(
        prog="d2v-doctor", description="What a bug report needs, and what would make a run slow or wrong on this machine."
    )
    parser.add_argument("folder", nargs="?", default=".", type=Path, help="Where runs are written; default: here.")
    found = environment(parser.parse_args(args).folder)
    warnings = found.pop("warnings")
    for name, text in found.items():
        print(f"{name:12} {text}")
    print("", *([f"! {warning}" for warning in warnings] or ["nothing here that would make a run slow or wrong"]), sep="\n")
