"""Health checks: the collapse monitor of a run (method 1.7) and the environment report of d2v-doctor."""

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
import statistics
import sys
from collections import deque
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils import get_total_norm
from torch.nn.utils.rnn import pad_sequence

from d2v_fast import __version__, ops
from d2v_fast.config import CollapseConfig
from d2v_fast.data import PretrainingData
from d2v_fast.figures import RULES
from d2v_fast.files import ALARMS
from d2v_fast.model import Data2Vec, Data2VecOutput
from d2v_fast.ops import native
from d2v_fast.ops.reference import Moments, make_targets, moments_of
from d2v_fast.sharding import whole

if TYPE_CHECKING:
    from accelerate import Accelerator

log = logging.getLogger(__name__)

RANK_ROWS = 512  # states used for the effective rank, and therefore its upper bound
MIN_ROWS = 64  # scored positions needed for the rank; for the position share, in addition to one per position
COMPARED = 16  # samples compared before the first step
LINES = 100  # log lines that determine the usual gradient norm
CLEAR = 1.5  # hysteresis: a rule that has warned re-arms at this many times its bound


class CollapseError(RuntimeError):
    """A collapse rule was broken and `collapse.action` is stop."""


def _subsample(rows: Tensor) -> Tensor:
    """A copy of at most `RANK_ROWS` evenly spaced rows."""
    return rows[:: max(1, len(rows) // RANK_ROWS)][:RANK_ROWS].clone()


def effective_rank(rows: Tensor) -> Tensor:
    """Effective rank of rows (N, C): the exponential of the entropy of their normalised singular values.

    1 for constant rows, at most min(N, C); NaN if any value is not finite. RankMe (Garrido et al. 2023, equation 2), computed
    on the CPU from at most `RANK_ROWS` evenly spaced rows.
    """
    rows = _subsample(rows).cpu().double()
    if not rows.isfinite().all():
        return torch.tensor(math.nan)
    gram = rows @ rows.T if len(rows) < rows.shape[1] else rows.T @ rows  # several times faster than an SVD
    share = torch.linalg.eigvalsh(gram).clamp(min=0).sqrt()
    share = share / share.sum().clamp(min=1e-12) + 1e-7
    return torch.exp(-(share * share.log()).sum())


def position_table(rows: Tensor, positions: Tensor, length: int) -> Tensor:
    """Count, sum of squares and sums of the rows (N, C) at each position (N,) below `length`: (length, 2 + C) in float64.

    The tables of several batches can be added.
    """
    rows = rows.to(torch.float32 if rows.device.type == "mps" else torch.float64)  # MPS has no float64
    columns = torch.cat([torch.ones_like(rows[:, :1]), (rows**2).sum(1, keepdim=True), rows], dim=1)
    return columns.new_zeros(length, columns.shape[1]).index_add_(0, positions, columns)


def position_share(table: Tensor) -> float:
    """Share of the rows' variance that the mean of each position explains, as adjusted R²: about 0 by chance alone.

    NaN if rows outnumber positions by fewer than `MIN_ROWS`.
    """
    table = table[table[:, 0] > 0].cpu().double()
    count, squares, sums = table[:, 0], table[:, 1].sum(), table[:, 2:]
    rows, free = float(count.sum()), float(count.sum()) - len(count)
    if free < MIN_ROWS:
        return math.nan
    around_mean = float(squares - (sums.sum(0) ** 2).sum() / rows) / (rows - 1)
    around_means = float(squares - ((sums**2).sum(1) / count).sum()) / free
    return 1 - around_means / around_mean if around_mean > 0 else math.nan


def distinct_share(data: PretrainingData) -> float:
    """Share of distinct samples among `COMPARED` evenly spaced ones, all augmented with the same random draws."""
    found = []
    for index in np.unique(np.linspace(0, len(data) - 1, COMPARED).astype(int)):
        with contextlib.suppress(Exception):  # training reports unreadable samples when it reaches them
            found.append(np.asarray(data.load(int(index), np.random.default_rng(0))).tobytes())
    return len(set(found)) / len(found) if len(found) > 1 else math.nan


def constant_loss(target: Moments, beta: float, scale: float) -> Tensor:
    """Loss of predicting each channel's mean: exact for beta = 0, otherwise for normally distributed targets."""
    variance = target.m2 / target.count.clamp(min=1)
    if beta == 0:
        return scale * variance.sum()
    std = variance.sqrt().clamp(min=1e-12)
    bound = beta / std  # E of e²/2β below beta and of |e| - β/2 above, e ~ N(0, std²)
    density = torch.exp(-(bound**2) / 2) / math.sqrt(2 * math.pi)
    below = variance / (2 * beta) * (torch.erf(bound / math.sqrt(2)) - 2 * bound * density)
    above = 2 * std * density - beta / 2 * torch.erfc(bound / math.sqrt(2))
    return scale * (below + above).sum()


class Seen(NamedTuple):
    """The data of a micro-batch from which figures are computed."""

    target: Moments
    prediction: Moments
    features: Moments  # at all positions except padding
    student: Tensor  # sample of its states at scored positions (N, C)
    teacher: Tensor  # the same for the teacher
    positions: Tensor  # `position_table` of the teacher's last layer, normalised like the targets


def _norm(tensors: Sequence[Tensor]) -> float:
    return float(whole(get_total_norm(tensors)))


def _distance(ours: list[Tensor], theirs: list[Tensor]) -> float:
    return _norm(torch._foreach_sub([x.detach() for x in ours], theirs))


class Monitor:
    """Computes health figures of a run at logged steps and checks them against the rules.

    Set `due` before a logged step: the monitor then collects what it needs from each model output and keeps a copy of the
    weights from before the update. From other steps it only records the gradient norm.

    Args:
        model: The model in training.
        optimizer: The torch optimizer of its parameters, not wrapped.
        config: The bounds.
        steps: Total number of steps.
        warmup: Warm-up steps of the learning rate, during which the figures are close to those of random weights.
        accelerator: Pools figures over ranks.
        folder: Where alarms.jsonl is written; None on all ranks but the first.
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
        self.active: set[str] = set()  # figures whose rule has warned and is still broken
        self.usual: deque[float] = deque(maxlen=LINES)  # median gradient norms, one per log line
        self.norms: list[Tensor] = []  # since the last log line
        self._reset()
        model.register_forward_hook(self._after_forward, with_kwargs=True)
        optimizer.register_step_pre_hook(self._before_update)

    def state_dict(self) -> dict[str, Any]:
        """State for a resumed run: rules that have warned and are still broken, and gradient norms."""
        return {
            "broken": [[name, rule.bound] for name, rule in RULES.items() if name in self.active],
            "norms": self._finite_norms(),
            "usual": list(self.usual),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.active = {name for name, rule in RULES.items() if [name, rule.bound] in state.get("broken", ())}
        self.norms = [torch.tensor(norm, device=self.accelerator.device) for norm in state.get("norms", ())]
        self.usual.extend(state.get("usual", ()))

    def watch(self, grad_norm: Tensor) -> None:
        """Record a step's gradient norm, on the device, before clipping."""
        self.norms.append(grad_norm)

    def _finite_norms(self) -> list[float]:
        norms = torch.stack(self.norms).tolist() if self.norms else []
        return [norm for norm in norms if math.isfinite(norm)]

    def _reset(self) -> None:
        self.due = False
        self.before: list[list[Tensor]] | None = None
        self.norms = []
        self.batches: list[Seen] = []

    @torch.no_grad()
    def _after_forward(self, model: Data2Vec, args: tuple, inputs: dict[str, Any], output: Data2VecOutput) -> None:
        if not self.due:
            return
        assert output.stats is not None, "a logged step computes them"
        mask, padding, index = inputs["mask"], inputs.get("padding_mask"), inputs.get("index")
        batch, length = output.features.shape[:2]
        padding = mask.new_zeros(batch, length) if padding is None else padding
        index = mask.flatten().nonzero().squeeze(1) if index is None else index
        index = index // (mask.numel() // batch) * length + index % length  # position in the batch, for any view
        # The other target layers are already freed; the last one represents them.
        norms = model.loss_settings["norm"], model.loss_settings["target_norm"]
        last = make_targets([output.teacher_states], *norms, padding)
        # Each position counts once even if several views score it: duplicates would inflate the share that position explains.
        scored = mask.view(batch, -1, length).any(1)
        position = torch.arange(length, device=mask.device).where(scored, length)
        features = output.features.float().masked_fill(padding.unsqueeze(-1), 0)
        self.batches.append(
            Seen(
                *output.stats,
                moments_of(features.flatten(0, 1), ~padding.flatten()),
                _subsample(output.states),
                _subsample(output.teacher_states.flatten(0, 1)[index]),
                position_table(last.flatten(0, 1), position.flatten(), length + 1)[:length],
            )
        )

    @torch.no_grad()
    def _before_update(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        # Skipped steps never get here; their update is 0.
        if self.due:
            now, peak = (max(g.get(key, g["lr"]) for g in optimizer.param_groups) for key in ("lr", "initial_lr"))
            self.rate = now / peak if peak else 1.0
            self.before = [[x.detach().clone() for x in side] for side in (self.parameters, self.teacher)]

    @torch.no_grad()
    def figures(self, loss: float) -> dict[str, float]:
        """Figures of the step that was due; waits for the device. NaN marks figures that the step cannot provide.

        Args:
            loss: Loss of the positions over all ranks, without that of CLS, for `relative_loss`.
        """
        seen: Any = Seen._make(zip(*self.batches, strict=True))  # each field of all micro-batches
        target, prediction, local = (self._pooled(parts) for parts in (seen.target, seen.prediction, seen.features))
        variance = local.m2 / local.count
        share = position_share(self._summed(seen.positions))
        settings = self.model.loss_settings
        worst = float(constant_loss(target, settings["beta"], settings["scale"]))
        relative = loss / worst if worst else 1.0  # constant targets: no better than a constant prediction
        if math.isnan(relative):
            relative = math.inf  # diverged
        ranks = [math.nan, math.nan]
        if float(target.count) >= MIN_ROWS:
            ranks = [float(effective_rank(self._gathered(torch.cat(rows)))) for rows in (seen.student, seen.teacher)]
        figures = {
            "target_std": float(target.std),
            "prediction_std": float(prediction.std),
            "relative_loss": relative,
            "position_share": share,
            "content_loss": relative / (1 - share) if share < 1 else math.nan,
            "feature_std": float((local.m2 / (local.count - 1)).sqrt().mean()),
            "feature_variation": float((variance / (variance + local.mean**2).clamp(min=1e-24)).sqrt().mean()),
            "student_rank": ranks[0],
            "teacher_rank": ranks[1],
            "teacher_distance": _distance(self.student, self.teacher) / _norm(self.student),
            **self._moved(),
            **self._gradient(),
        }
        self._reset()
        return figures

    def _moved(self) -> dict[str, float]:
        """How far student and teacher moved in the step."""
        if self.before is None:
            return {"update_norm": 0.0, "update_share": math.nan, "teacher_decay": math.nan}
        ours, theirs = self.before
        update, distance = _distance(self.parameters, ours), _distance(self.student, theirs)
        return {
            "update_norm": update,
            "update_share": update / _norm(ours) / self.rate if self.rate else math.nan,
            "teacher_decay": 1 - _distance(self.teacher, theirs) / distance if distance else math.nan,
        }

    def _gradient(self) -> dict[str, float]:
        """The largest norm since the last log line, as a multiple of the usual norm on earlier lines."""
        norms = self._finite_norms()
        if not norms:
            return {"gradient_peak": math.nan}
        usual = statistics.median(self.usual or norms)
        self.usual.append(statistics.median(norms))
        return {"gradient_peak": max(norms) / usual if usual else math.nan}

    def _pooled(self, parts: Sequence[Moments]) -> Moments:
        """Moments over micro-batches and ranks."""
        moments = Moments.pooled(parts)
        if self.accelerator.num_processes > 1:
            gathered = self.accelerator.gather(torch.cat([moments.count[None], moments.mean, moments.m2])[None])
            half = moments.mean.numel() + 1
            moments = Moments.pooled([Moments(row[0], row[1:half], row[half:]) for row in gathered])
        return moments

    def _summed(self, tables: Sequence[Tensor]) -> Tensor:
        """Sum of tables, which may differ in length, over micro-batches and ranks."""
        table = pad_sequence(list(tables), batch_first=True).sum(0)
        return self.accelerator.reduce(self.accelerator.pad_across_processes(table), "sum")

    def _gathered(self, rows: Tensor) -> Tensor:
        """Rows of all ranks, padded to equal length with zeros, which do not change the singular values."""
        return self.accelerator.gather(self.accelerator.pad_across_processes(rows))

    def judge(self, record: dict[str, Any]) -> list[str]:
        """Warn about the rules that a log line breaks, each once until it re-arms; return the new alarms.

        Raises:
            CollapseError: There are new alarms and `collapse.action` is stop.
        """
        if self.config.action == "off":
            return []
        alarms, values = [], {name: record.get(name, math.nan) for name in RULES}
        broken = {rule.bound for name, rule in RULES.items() if rule.broken(values[name], self.config)}
        for name, rule in RULES.items():
            if (record["step"] <= self.after and not rule.at_once) or not broken.isdisjoint(rule.unless):
                continue
            value, bound = values[name], getattr(self.config, rule.bound)
            if rule.broken(value, self.config) and name not in self.active:
                self.active.add(name)
                side = "below" if rule.least else "above"
                limit = f"{name} {value:.4g} is {side} collapse.{rule.bound}={bound:g}"
                alarms.append(f"{rule.meaning}: {limit}; {rule.remedy}")
            elif value > CLEAR * bound if rule.least else value < bound / CLEAR:
                self.active.discard(name)
        if alarms:
            self._raise(record["step"], alarms)
        return alarms

    def _raise(self, step: int, alarms: list[str]) -> None:
        if self.folder is not None:
            with contextlib.suppress(OSError):  # the alarms are printed anyway
                with (self.folder / ALARMS).open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"step": step, "alarms": alarms}) + "\n")
        if self.config.action == "stop":
            raise CollapseError("\n  ".join([f"step {step}: {alarms[0]}", *alarms[1:]]))
        for alarm in alarms:
            log.warning("step %d: %s", step, alarm)


PACKAGES = ("torch", "transformers", "accelerate", "datasets", "numpy", "triton", "flash-attn", "apex")
OPTIONAL = ("torchvision", "torchaudio", "flash_attn")  # built for one torch version; imported by transformers if installed
VARIABLES = ("OMP_", "KMP_", "GOMP_", "MKL_", "D2V_", "TRITON_", "CUDA_", "NCCL_", "PYTORCH_", "MALLOC_", "LD_PRELOAD")
EXTENSIONS = {"avx2": "AVX2", "avx512_f": "AVX-512", "avx512_bf16": "AVX512-BF16", "amx_bf16": "AMX-BF16"}


def environment(folder: str | Path = ".") -> dict[str, Any]:
    """Facts for a bug report, as name → text; "warnings" lists problems of this machine, with remedies.

    Args:
        folder: Output folder of a run, which need not exist yet; its disk's free space is checked.
    """
    import joblib
    from huggingface_hub.constants import HF_HOME
    from torch.utils import collect_env

    from d2v_fast.train.optim import apex_obstacle  # d2v_fast.train imports this module

    warnings = []
    gpus = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    driver = collect_env.get_nvidia_driver_version(collect_env.run)
    if driver and not gpus:
        warnings.append(
            f"driver {driver} is installed, but torch {torch.__version__} sees no GPU: install a CUDA build of torch, "
            f"or check CUDA_VISIBLE_DEVICES={os.environ.get('CUDA_VISIBLE_DEVICES', '')!r}"
        )
    warnings += [f"{gpu.name} has no bf16: train.precision=fp16" for gpu in gpus if gpu.major < 8]

    processor, cores = torch.cpu.get_capabilities(), joblib.cpu_count()  # within the limits of affinity and container
    threads, local = torch.get_num_threads(), os.environ.get("LOCAL_WORLD_SIZE", "1")
    ranks = int(local) if local.isdecimal() and int(local) else 1
    if local != str(ranks):
        warnings.append(f"LOCAL_WORLD_SIZE={local!r}: not a number of processes: unset it")
    if threads * ranks > cores:
        warnings.append(f"{threads * ranks} threads share {cores} usable cores: OMP_NUM_THREADS={max(1, cores // ranks)}")
    if not gpus and 2 * threads * ranks <= cores:
        warnings.append(f"torch uses {threads * ranks} of {cores} usable cores: OMP_NUM_THREADS={cores // ranks}")

    losses = {}
    for kernel, device in (("native", "cpu"), ("triton", "cuda")):
        why = ops.obstacle(kernel, device, torch.float32, (torch.float32,))
        losses[device] = f"eager, {kernel} not usable: {why}" if why else kernel
        if why and (device == "cuda") == bool(gpus):
            warnings.append(f"the loss runs as plain PyTorch on {device}: {why}")
    if losses["cpu"] == "native":
        isa = native.library().d2v_isa().decode()
        losses["cpu"] += f", {isa}"
        if "D2V_ISA" in os.environ:
            warnings.append(f"D2V_ISA limits the CPU kernels to {isa}: unset it")
    if os.environ.get("TRITON_INTERPRET") == "1":
        warnings.append("TRITON_INTERPRET=1 interprets the GPU kernels, which is slow: unset it")

    shadow = importlib.util.find_spec("kernels")
    if shadow and shadow.origin and not _version("kernels"):
        warnings.append(f"{shadow.origin} shadows Hugging Face's package kernels and breaks transformers: rename it")
    apex = apex_obstacle()
    if apex and importlib.util.find_spec("apex"):
        warnings.append(apex)

    for package in OPTIONAL:
        if importlib.util.find_spec(package):
            try:
                importlib.import_module(package)
            except Exception as error:  # transformers would only report that it cannot import a model
                warnings.append(
                    f"{package} {_version(package)} cannot be imported: {error}; install a build for torch "
                    f"{torch.__version__}, or pip uninstall {package}"
                )

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
                f"/dev/shm has {free['/dev/shm']:.2f} GiB, and workers pass batches through it: "
                "docker run --shm-size=8g, or train.workers=0"
            )
    elif sys.platform == "linux":
        warnings.append("there is no /dev/shm, through which workers pass batches: mount a tmpfs, or train.workers=0")

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
        "lamb on cuda": f"torch's operations: {apex}" if apex else "apex's FusedLAMB",
        "free": ", ".join(f"{size:.1f} GiB in {place}" for place, size in free.items()),
        "allocator": allocator or "the C library's; tcmalloc via LD_PRELOAD can be faster on a CPU",
        "variables": " ".join(f"{k}={v}" for k, v in sorted(os.environ.items()) if k.startswith(VARIABLES)) or "none",
        "warnings": warnings,
    }


def _existing(path: Path) -> Path:
    """`path`, or its nearest parent that exists."""
    return next(parent for parent in (path, *path.absolute().parents) if parent.exists())


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def doctor(args: list[str]) -> None:
    """d2v-doctor: print `environment()`, or with --memory the memory that a run needs."""
    if "--memory" in args:
        from d2v_fast.memory import main

        return main(args)
    parser = argparse.ArgumentParser(
        prog="d2v-doctor",
        description="Show facts for a bug report, and warn about problems that make a run slow or wrong on this machine. "
        "d2v-doctor --memory --config PRESET|FILE [--gpus N] [key=value ...] shows the memory that a run needs on each GPU.",
    )
    parser.add_argument("folder", nargs="?", default=".", type=Path, help="Where runs are written; default: here.")
    found = environment(parser.parse_args(args).folder)
    warnings = found.pop("warnings")
    for name, text in found.items():
        print(f"{name:12} {text}")
    print("", *([f"! {warning}" for warning in warnings] or ["nothing found that would make a run slow or wrong"]), sep="\n")
