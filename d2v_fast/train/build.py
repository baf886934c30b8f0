"""From a config to a run: data, encoder, model, optimizer and schedule, new or restored from a checkpoint."""

from __future__ import annotations

import itertools
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from d2v_fast.checkpoint import Checkpoint, CheckpointError, Checkpoints
from d2v_fast.config import MODALITIES, Config, ConfigError, HeadConfig, data_class
from d2v_fast.data import Batch, DataError, EpochBatches, PretrainingData
from d2v_fast.data.own import check_batch, check_class, error_context
from d2v_fast.data.streaming import StreamBatches
from d2v_fast.decoders import ConvDecoder
from d2v_fast.diagnostics import Monitor
from d2v_fast.encoders import Encoder, build_encoder
from d2v_fast.files import CHECKPOINTS, HEAD, TEACHER, TOKENIZER
from d2v_fast.fused import COMPILED, PARTS, fuse
from d2v_fast.model import Data2Vec
from d2v_fast.sharding import shard
from d2v_fast.train.callbacks import Callback, Callbacks, make_callback
from d2v_fast.train.feed import EMPTY, Feed
from d2v_fast.train.folder import RunFolder
from d2v_fast.train.guards import BrokenSamples, SkippedSteps
from d2v_fast.train.log import Trackers, Window
from d2v_fast.train.online_probe import OnlineProbe
from d2v_fast.train.optim import lr_factor, make_optimizer, one_pass_obstacle, warmup_steps
from d2v_fast.train.parallel import start
from d2v_fast.train.save import Samples, compare_settings, newest, restore, share
from d2v_fast.train.step import State, can_be_late, make_graphs

if TYPE_CHECKING:
    from accelerate import Accelerator
    from accelerate.optimizer import AcceleratedOptimizer

    from d2v_fast.several import SeveralConfig

log = logging.getLogger(__name__)


@dataclass
class Run:
    """A run, ready to train from its first step or from a checkpoint.

    Attributes:
        config: The config.
        settings: All settings as JSON values, as checkpoints store and compare them.
        accelerator: The ranks.
        folder: The folder of the run.
        checkpoints: Its checkpoints.
        data: The data set.
        samples: Identity of the samples, compared on resume.
        feed: The batches.
        broken: Samples that could not be read.
        state: The state that a step reads and changes.
        window: Statistics since the last line of the log.
        steps: Total number of steps.
        fused: Descriptions of what --fused changed.
        callbacks: The callbacks.
        saved: Step of the newest checkpoint.
        changed: Whether settings differ from those of the newest checkpoint.
        stop: Set by a callback to end the run after the current step.
        name: Name of the part, if this run is a part of another.
        record: The last line of the log.
    """

    config: Config
    settings: dict[str, Any]
    folder: RunFolder
    checkpoints: Checkpoints
    samples: Samples
    feed: Feed
    state: State
    window: Window
    steps: int
    fused: list[str]
    callbacks: Callbacks
    saved: int = 0
    changed: bool = False
    stop: bool = False
    name: str = ""
    record: dict[str, float] | None = None

    @property
    def accelerator(self) -> Accelerator:
        return self.state.accelerator

    @property
    def data(self) -> PretrainingData:
        return self.feed.data

    @property
    def broken(self) -> BrokenSamples:
        return self.feed.broken

    @property
    def each(self) -> list[Run]:
        """The runs that are trained: the parts, or the run itself if it has none."""
        return [self]

    @property
    def asked_to_stop(self) -> bool:
        """Whether a callback asked to stop this run or one of its parts."""
        return any(each.stop for each in (self, *self.each))

    def turn(self) -> tuple[Run, int, int]:
        """The run that trains next, and the numbers of this step and of the last one among its own steps."""
        return self, self.state.done + 1, self.steps

    def state_dict(self) -> dict[str, Any]:
        """State without tensors that is the same on all ranks."""
        return {**self.state.skipped.state_dict(), "monitor": self.state.monitor.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.state.skipped.load_state_dict(state)
        self.state.monitor.load_state_dict(state["monitor"])

    def rank_state_dict(self) -> dict[str, Any]:
        """State of this rank. `build` reads the position of the feed from it."""
        return {**self.feed.state_dict(), **self.broken.state_dict(), "window": self.window.state_dict()}

    def load_rank_state_dict(self, state: dict[str, Any]) -> None:
        self.broken.load_state_dict(state)
        self.window.load_state_dict(state["window"])


def build(config: Config, fused: bool = False, callbacks: Sequence[Callback] = ()) -> Run:
    """Lock the folder and build everything the config describes. `loop` trains the result.

    Args:
        config: The config.
        fused: Whether to use the fast parts of `d2v_fast.fused`.
        callbacks: Callbacks in addition to those of `train.callbacks`.

    Raises:
        CallbackError: A callback cannot be created.
        ConfigError: Inconsistent settings.
        DataError: Unusable data.
        CheckpointError: `config.resume` is set, but there is no usable checkpoint.
    """
    callbacks = [*map(make_callback, config.train.callbacks), *callbacks]
    if config.train.probe_every and config.parts:
        raise ConfigError("train.probe_every: is for a run of one modality; use d2v-probe RUN/PART on each part instead")
    if config.train.probe_every:
        callbacks.insert(0, OnlineProbe(config))
    if config.train.trackers:
        callbacks.append(Trackers(config.train.trackers))  # last, to get what the others add to the log
    accelerator = start(config.train)
    folder = RunFolder(config, accelerator.is_main_process)
    try:
        config = set_length_multiple(replace(config, resume=folder.resume), accelerator.device)
        if config.parts:
            for name in ("checkpointing", "shard"):
                if getattr(config.train, name):
                    raise ConfigError(f"train.{name}: is for a run of one modality; leave it out when several share blocks")
            from d2v_fast.train.several import build_parts

            return build_parts(config, fused, accelerator, folder, callbacks)
        return _build(config, fused, accelerator, folder, callbacks)
    except BaseException:
        folder.leave(0)
        raise


def _build(config: Config, fused: bool, accelerator: Accelerator, folder: RunFolder, callbacks: Sequence[Callback]) -> Run:
    if config.train.shard:
        folder.check_shared(accelerator)
    settings, checkpoints, saved = begin(config, fused, accelerator, folder)
    data, encoder, samples = read(config, folder.path)
    if accelerator.num_processes > 1:
        check_ranks(samples, str(config.data.get("path")))
    if saved:
        samples.compare(saved, config.resume_allow)
    train = config.train
    core = make_core(config, data, encoder, accelerator)
    left_out = set(COMPILED) if train.shard else set()
    if config.data["class"] or config.data.get("teacher_input") == "masked_only":
        left_out.add("padding")  # it need not be on the right
    words = fuse(core, accelerator.device, [part for part in PARTS if part not in left_out]) if fused else []
    if fused and train.shard:
        words.append("nothing compiled, because of train.shard")
    if train.checkpointing:
        core.student.checkpoint_blocks()
    if train.shard:
        _shard(core, config, data, accelerator)

    if data.stream:
        order: EpochBatches | StreamBatches = stream_batches(config, data, accelerator, saved)
        steps = train.steps
    else:
        order = make_order(config, data, accelerator, trained_batches(saved, accelerator))
        steps_per_epoch = len(order.epoch(0)) / accelerator.num_processes / train.accumulate
        steps = train.steps if train.epochs is None else max(1, round(train.epochs * steps_per_epoch))
    feed = make_feed(config, data, order, accelerator)

    # A layer that layer-drop skips on one rank has no gradient there.
    accelerator.ddp_handler.find_unused_parameters = getattr(getattr(encoder.model, "config", None), "layerdrop", 0) > 0
    optimizer, scheduler = make_updates(core, config, steps, saved.step if saved else 0, fused)
    if core.teacher.moved_by_optimizer:
        words.append("optimizer and teacher in one pass")
    # FSDP averages gradients itself; evaluation_mode leaves out DistributedDataParallel.
    model, optimizer = accelerator.prepare_model(core, evaluation_mode=bool(train.shard)), accelerator.prepare(optimizer)
    run = make_run(
        config,
        folder,
        samples,
        feed,
        core,
        settings=settings,
        checkpoints=checkpoints,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        accelerator=accelerator,
        steps=steps,
        fused=words,
        callbacks=Callbacks(callbacks, accelerator.is_main_process),
    )
    if fused and (graphs := make_graphs(run.state, train)):
        run.state.graphs = graphs
        run.fused.append("CUDA graphs of passes with repeated shapes")
    seed_or_restore(run, saved)
    return run


def set_length_multiple(config: Any, device: torch.device) -> Any:
    """The config, or that of several parts, with a number for data.length_multiple if that is null."""
    if config.parts:
        return replace(config, parts={name: set_length_multiple(part, device) for name, part in config.parts.items()})
    if config.own_data or config.data.get("length_multiple", 1) is not None:
        return config
    varying = device.type == "cuda" and not config.data.get("cross_documents")  # packed blocks have one length
    multiple = MODALITIES[config.modality].length_multiple if varying else 1
    return replace(config, data=config.data | {"length_multiple": multiple})


def begin(
    config: Config | SeveralConfig, fused: bool, accelerator: Accelerator, folder: RunFolder
) -> tuple[dict[str, Any], Checkpoints, Checkpoint | None]:
    """The settings in the form that checkpoints store, the checkpoints, and the one to resume from."""
    settings = {"modality": config.modality, "fused": fused, "processes": accelerator.num_processes, **config.settings()}
    settings["train.output"] = folder.name
    settings = json.loads(json.dumps(settings, default=str))
    checkpoints = Checkpoints(folder.path / CHECKPOINTS, config.train.keep_last)
    saved = newest(checkpoints, accelerator.is_main_process, bool(config.train.shard)) if config.resume else None
    if saved:
        compare_settings(saved, settings, config)
    return settings, checkpoints, saved


def read(config: Config, folder: Path) -> tuple[PretrainingData, Encoder, Samples]:
    """The data set and the encoder, fitted to each other, and the identity of the samples."""
    data = make_data(config, folder)  # one process per machine fills the cache; the others wait for it without a barrier
    encoder = make_encoder(config, None if config.own_data else getattr(data, "tokens", None))
    return data, encoder, _fit(data, encoder, config)


def check_ranks(samples: Samples, path: str) -> None:
    """Raise DataError, on all ranks, unless all of them see the same samples."""
    from accelerate.utils import gather_object

    found = [identity["samples"] for identity in gather_object([samples.identity])]
    differ = [rank for rank, each in enumerate(found) if each != found[0]]
    if differ:
        counts = f"{found[0]['number']} samples on rank 0, {found[differ[0]]['number']} on rank {differ[0]}"
        raise DataError(
            f"data.path={path}: ranks {', '.join(map(str, differ))} see different data from rank 0 ({counts}, or samples with "
            "different content); every machine needs the same files"
        )


def trained_batches(saved: Checkpoint | None, accelerator: Accelerator, part: str = "") -> int:
    """Number of batches that this rank has trained on."""
    if not saved:
        return 0
    with saved.reading():
        rank = share(saved.state["ranks"], accelerator.process_index, accelerator.num_processes)
        return int((rank["parts"][part] if part else rank)["batches"])


def make_feed(config: Config, data: PretrainingData, order: EpochBatches | StreamBatches, accelerator: Accelerator) -> Feed:
    broken = BrokenSamples(len(data), config.train.max_broken)
    return Feed(data, order, config.train.workers, accelerator.device, broken)


def make_updates(
    core: torch.nn.Module, config: Config | SeveralConfig, steps: int, done: int, fused: bool
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LambdaLR]:
    """Optimizer and learning rate schedule after `done` of `steps` steps."""
    one_pass = config.optimizer.one_pass
    if one_pass and (why := one_pass_obstacle(core, config.optimizer, config.train, fused)):
        log.warning("optimizer.one_pass: the teacher is moved separately: %s", why)
        one_pass = False
    optimizer = make_optimizer(core, config.optimizer, fused, one_pass)
    return optimizer, torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: lr_factor(step, steps, config.schedule), last_epoch=done - 1
    )


def make_run(
    config: Config,
    folder: RunFolder,
    samples: Samples,
    feed: Feed,
    core: Data2Vec,
    name: str = "",
    *,
    settings: dict[str, Any],
    checkpoints: Checkpoints,
    model: torch.nn.Module,
    optimizer: AcceleratedOptimizer,
    scheduler: torch.optim.lr_scheduler.LambdaLR,
    accelerator: Accelerator,
    steps: int,
    fused: list[str],
    callbacks: Callbacks,
) -> Run:
    """A run, or its part `name`, with the state of a step. The keywords are what parts share."""
    train, main = config.train, accelerator.is_main_process
    rank = None if accelerator.num_processes == 1 else accelerator.process_index
    watched = folder.path if main else None
    warmup = warmup_steps(steps, config.schedule)
    state = State(
        core=core,
        model=model,
        optimizer=optimizer,
        scheduler=scheduler,
        accelerator=accelerator,
        monitor=Monitor(core, optimizer.optimizer, config.collapse, steps, warmup, accelerator, watched),
        skipped=SkippedSteps(train.max_skipped, feed.data.sample_name, folder.path, rank, settings),
        arguments={"part": name} if name else {},
        reduction=config.loss.reduction,
        clip_norm=train.clip_norm,
    )
    state.late = can_be_late(state)
    return Run(
        config=config,
        settings=settings,
        folder=folder,
        checkpoints=checkpoints,
        samples=samples,
        feed=feed,
        state=state,
        window=Window(accelerator.device),
        steps=steps,
        fused=fused,
        callbacks=callbacks,
        name=name,
    )


def seed_or_restore(run: Run, saved: Checkpoint | None) -> None:
    """Seed this process, then restore the checkpoint if there is one."""
    from accelerate.utils import set_seed

    # Dropout differs between ranks. A numpy seed has 32 bits.
    set_seed((run.config.train.seed + run.accelerator.process_index) % 2**32)
    if saved:
        run.saved = run.state.done = saved.step
        run.changed = saved.state["settings"] != run.settings
        with saved.reading():
            restore(run, saved)


def _fit(data: PretrainingData, encoder: Encoder, config: Config) -> Samples:
    """Fit the data to the encoder; returns the identity of the samples."""
    with error_context(config.data["class"], type(data), "fit_to or contents fails"):
        data.fit_to(encoder)
        return Samples(len(data), *data.contents())


def make_core(config: Config, data: PretrainingData, encoder: Encoder, accelerator: Accelerator) -> Data2Vec:
    """Student, teacher and head. With several ranks or a custom data class, tries a batch, which gives better errors."""
    own = config.data["class"]
    shapes = _try_collate(config, data, encoder) if own else ""
    core = make_model(config, encoder, data.axes).to(accelerator.device)  # before the optimizer, which apex requires
    if accelerator.num_processes > 1 or own:
        with accelerator.autocast(), error_context(own, type(data), f"the model does not accept its batch, {shapes}"):
            unused = freeze_unused(core, data)
        if unused and accelerator.is_main_process:
            log.info("frozen because no gradient reaches them: %s", ", ".join(unused))
    return core


def _shard(core: Data2Vec, config: Config, data: PretrainingData, accelerator: Accelerator) -> None:
    """Shard the model over the ranks and try a forward pass.

    Raises:
        ConfigError: There is only one process, layer-drop is on, or the model cannot be sharded by its blocks.
    """
    mode, world, device = config.train.shard, accelerator.num_processes, accelerator.device
    what = f"train.shard={str(mode).lower()}"
    if world == 1:
        raise ConfigError(
            f"{what}: there is only one process; start several with torchrun --nproc_per_node=GPUS -m d2v_fast.cli …, or set "
            "train.shard=false, with train.checkpointing=true to save memory"
        )
    name, dropped = type(core.student.model).__name__, getattr(getattr(core.student.model, "config", None), "layerdrop", 0)
    if dropped:
        raise ConfigError(
            f"{what} with encoder.config.layerdrop={dropped}: a block is gathered from all ranks, so no rank may skip it; set "
            "encoder.config.layerdrop=0 or train.shard=false"
        )
    if mode == "hybrid":
        check_machines(world)
    core.to(device)
    batch = first_batch(data)
    try:
        shard(core, device, world, hybrid=mode == "hybrid")
        if batch is not None:
            core.eval()
            with torch.no_grad(), accelerator.autocast():
                sharded: Any = core  # an FSDPModule
                sharded(**{key: value.to(device) for key, value in batch.items() if isinstance(value, Tensor)})
            sharded.reshard()
            core.train()
    except (AssertionError, NotImplementedError, RuntimeError, ValueError) as error:
        raise ConfigError(
            f"{what}: {name} cannot be sharded by its blocks: {_in_one_line(error)}; blocks must be called as modules, and "
            "nothing outside them may read their weights; set train.shard=false, with train.checkpointing=true to save memory"
        ) from error


def check_machines(world: int) -> None:
    """Raise ConfigError, on all ranks, unless all machines have the same number of ranks."""
    from accelerate.utils import gather_object

    local = int(os.environ.get("LOCAL_WORLD_SIZE", world))
    found = dict(gather_object([(os.environ.get("GROUP_RANK", "0"), local)]))
    if len(set(found.values())) > 1:
        raise ConfigError(
            f"train.shard=hybrid: the machines have {', '.join(map(str, found.values()))} ranks; start the same number on "
            "each, or use train.shard=true"
        )


def _try_collate(config: Config, data: PretrainingData, encoder: Encoder) -> str:
    """Check the first batch of a custom data class; returns a description of its dtypes and shapes."""
    own = config.data["class"]
    data.check_mask()
    with error_context(own, type(data), "collate fails on its first samples"):
        batch = first_batch(data)
    if batch is None:  # the first step raises the reason
        return ""
    check_batch(own, data, batch, encoder, config.head.kind == "conv")
    return ", ".join(f"{key} {each.dtype} {tuple(each.shape)}" for key, each in batch.items() if isinstance(each, Tensor))


def make_order(config: Config, data: PretrainingData, accelerator: Accelerator, start: int) -> EpochBatches:
    """The order of this rank's batches, starting after `start` of them."""
    return EpochBatches(
        len(data),
        config.train.batch_size,
        config.train.seed,
        accelerator.process_index,
        accelerator.num_processes,
        data.lengths,
        getattr(data, "max_batch_length", None),
        start=start,
    )


def stream_batches(config: Config, data: PretrainingData, accelerator: Accelerator, saved: Checkpoint | None) -> StreamBatches:
    """This rank's batches of a stream, starting after those it has trained on.

    Raises:
        CheckpointError: The run had another number of processes.
    """
    rank, world, train = accelerator.process_index, accelerator.num_processes, config.train
    state = None
    if saved:
        with saved.reading():
            ranks = saved.state["ranks"]
            state = ranks[rank]["stream"] if world == len(ranks) else None
        if world != len(ranks):
            raise CheckpointError(
                f"{saved.folder}: its run had {len(ranks)} processes, this one has {world}; each reads its part of the "
                f"stream; start {len(ranks)} processes"
            )
    if accelerator.is_main_process:
        log.info("%s is streamed: the order of its samples depends on the number of ranks, here %d", config.data["path"], world)
    start = trained_batches(saved, accelerator)
    return StreamBatches(data, train.batch_size, train.seed, rank, world, train.workers, start, state)


def make_data(config: Config, folder: Path | None = None) -> PretrainingData:
    """The data set that the config describes.

    Args:
        config: The config.
        folder: Folder of a resumed run, whose trained tokenizer is used again.

    Raises:
        ConfigError: Inconsistent settings.
        DataError: Unusable data, or an incomplete custom data class.
    """
    data = dict(config.data)
    own = data.pop("class")
    if config.resume and folder is not None and config.trains_tokenizer and (folder / TOKENIZER).exists():
        data["tokenizer"] = str(folder / TOKENIZER)
    elif config.trains_tokenizer and config.encoder.pretrained:
        raise ConfigError(
            f"data.tokenizer=train: makes a new vocabulary, but encoder.pretrained={config.encoder.pretrained} was trained "
            "with another one; leave data.tokenizer out, or name the tokenizer that the encoder was trained with"
        )
    if config.is_text:
        data["max_broken"] = config.train.max_broken
    cls = data_class(config.modality, own)
    with error_context(own, cls, "cannot be created"):
        made = cls(mask=config.mask, seed=config.train.seed, **data)
    if own:
        check_class(own, made)
    return made


def make_encoder(config: Config, tokens: dict[str, int] | None = None) -> Encoder:
    """The student's encoder. The same train.seed gives the same weights.

    Args:
        config: The config.
        tokens: For text, the vocabulary size and the ids of special tokens by configuration field. Fields set in
            encoder.config win.

    Raises:
        ConfigError: The encoder has no vocabulary for text, or is for another modality.
    """
    from transformers import CONFIG_MAPPING

    fields, name = dict(config.encoder.config), config.encoder.model
    if tokens and config.encoder.pretrained is None and name in CONFIG_MAPPING:
        known = CONFIG_MAPPING[str(name)]()
        if not hasattr(known, "vocab_size"):
            raise ConfigError(f"encoder.model={name}: has no vocabulary, so it cannot read text; roberta and bert do")
        fields = {field: value for field, value in tokens.items() if hasattr(known, field)} | fields
    torch.manual_seed(config.train.seed)
    settings = {k: v for k, v in vars(config.encoder).items() if k != "config"}
    encoder = build_encoder(config=fields, **settings)
    if config.modality != "custom" and encoder.reads not in (None, *MODALITIES[config.modality].reads):
        setting = "model" if config.encoder.pretrained is None else "pretrained"
        raise ConfigError(
            f"encoder.{setting}={getattr(config.encoder, setting)}: {type(encoder.model).__name__} does not read inputs of "
            f"modality={config.modality}; choose an encoder for this modality, or set the modality of the encoder"
        )
    return encoder


def make_model(config: Config, encoder: Encoder, axes: int | None = None) -> Data2Vec:
    """Student, teacher and head.

    Args:
        config: The config.
        encoder: The student's encoder.
        axes: Number of axes of the position grid; by default that of the modality.

    Raises:
        ConfigError: head.pretrained holds no head, or one that does not fit.
    """
    predictor: HeadConfig | ConvDecoder = config.head
    if config.head.kind == "conv":
        fields = {name: value for name, value in vars(config.head).items() if name not in ("kind", "pretrained")}
        try:
            predictor = ConvDecoder(encoder.hidden_size, axes or MODALITIES[config.modality].axes, **fields)
        except ValueError as error:
            raise ConfigError(f"head.{error}") from error
    model = Data2Vec(encoder, predictor, targets=config.targets, loss=config.loss, ema=config.ema)
    if not config.resume:  # else a checkpoint has them
        _start_from_pretrained(model, config)
    return model


def _start_from_pretrained(model: Data2Vec, config: Config) -> None:
    """Load the head and the teacher that d2v-export saves with pretrained weights.

    Raises:
        ConfigError: head.pretrained holds no head that fits, or the teacher is of another encoder.
    """
    from safetensors import safe_open
    from safetensors.torch import load_file

    encoder = config.encoder.pretrained and Path(config.encoder.pretrained).expanduser()
    required, made = config.head.pretrained is not None, {}
    file = (Path(config.head.pretrained).expanduser() if config.head.pretrained is not None else encoder or Path()) / HEAD
    if required or (encoder and file.is_file()):
        try:
            with safe_open(file, "pt") as opened:
                made = {name: value for name, value in (opened.metadata() or {}).items() if hasattr(config.head, name)}
            # The weights do not show whether there are residuals.
            if made.get("residual", str(config.head.residual)) != str(config.head.residual):
                raise RuntimeError(f"head.residual: found {config.head.residual}, expected {made['residual']}")
            model.head.load_state_dict(load_file(file))
        except (OSError, RuntimeError, SafetensorError) as error:
            hint = "; made with:" + "".join(f" head.{name}={value}" for name, value in sorted(made.items())) if made else ""
            if required:
                raise ConfigError(f"head.pretrained={config.head.pretrained}: {_in_one_line(error)}{hint}") from error
            log.warning("%s: does not fit this head, which starts untrained%s (%s)", file, hint, _in_one_line(error))
        else:
            log.info("head from %s", file)
    elif encoder and model.sparse:
        log.warning("encoder.pretrained=%s: has no %s, so the decoder starts untrained", config.encoder.pretrained, HEAD)
    if encoder and (encoder / TEACHER).is_file():
        try:
            model.teacher.module.model.load_state_dict(load_file(encoder / TEACHER))
        except (RuntimeError, SafetensorError) as error:
            raise ConfigError(
                f"{encoder / TEACHER}: {_in_one_line(error)}; remove it to start the teacher as a copy of the student"
            ) from error
        log.info("teacher from %s; its decay starts at ema.start", encoder / TEACHER)
    elif required or (encoder and model.sparse):
        log.warning("student and head start from saved weights; the teacher was not saved and starts as a copy of the student")


def _in_one_line(error: Exception) -> str:
    """The first two lines of an error as one. If several weights do not fit, this names the first."""
    return " ".join(line.strip().rstrip(".") for line in str(error).splitlines()[:2])


def first_batch(data: PretrainingData) -> Batch | None:
    """A batch of up to two readable samples with masked positions, or None; the first step then reports the reason."""
    if data.stream:  # fails before the first step if the remote does not answer
        batch = next(iter(StreamBatches(data, 2, buffer=2)))
        if "failed" in batch:
            raise DataError(batch["failed"])
        return batch if len(batch.get("index", ())) else None
    batches = (data.__getitems__([(0, i) for i in range(at, min(at + 2, len(data)))]) for at in range(0, len(data), 2))
    return next((batch for batch in itertools.islice(batches, EMPTY) if len(batch.get("index", ()))), None)


def freeze_unused(core: Data2Vec, data: PretrainingData) -> list[str]:
    """Freeze the parameters that no gradient reaches, which DistributedDataParallel would reject; returns their names.

    An example is the positional convolution of Wav2Vec2-Conformer, which is unused with its other kinds of positions.
    """
    batch = first_batch(data)
    if batch is None:
        return []
    device = next(core.parameters()).device
    batch = {name: value.to(device) for name, value in batch.items() if isinstance(value, Tensor)}
    parameters = {name: p for name, p in core.named_parameters() if p.requires_grad}
    core.eval()  # layer-drop would skip used parameters
    gradients = torch.autograd.grad(core(**batch).loss, list(parameters.values()), allow_unused=True)
    core.train()
    unused = [name for name, gradient in zip(parameters, gradients, strict=True) if gradient is None]
    for name in unused:
        parameters[name].requires_grad_(False)
    return unused
