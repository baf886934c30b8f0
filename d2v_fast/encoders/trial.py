"""Probe a model to find out how to run it with its local features replaced.

The trial finds the module that computes the local features, the extra tokens, the FFN output, and whether the visible
positions can be encoded alone. It runs on one small input and on a small copy of the model.
"""

from __future__ import annotations

import math
from contextlib import ExitStack
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from d2v_fast.encoders import blocks, checks
from d2v_fast.encoders.base import find_layers
from d2v_fast.encoders.checks import FINAL, Unfit
from d2v_fast.encoders.small import SmallEncoder, close
from d2v_fast.encoders.spliced import Splice, SplicedEncoder, StopForward, map_tensors

BATCH = 2  # identifies the batch axis: no other axis of a model has this size
NOT_RUN = FINAL + 1  # rank of a failure that a copy with all blocks may not have


def splice(model: nn.Module, features: str | None = None, layers: str | None = None, ffn: str | None = None) -> SplicedEncoder:
    """Wrap a transformers model as an encoder that runs whole.

    Args:
        model: Takes `input_ids`, `pixel_values`, `input_values` or `input_features`; its `last_hidden_state` is (B, E + T, C).
        features: Dotted path of the module whose output is (B, T, C), (B, C, T) or (B, C, H, W); by default found by trial.
        layers, ffn: As for `Encoder`. The default `ffn` is the last Linear that a block runs, or the layer scale after it.

    Raises:
        ValueError: No module fits. The message gives the test that the best candidate failed and the setting to use.
    """
    layers = layers or _find_layers(model)
    why: Unfit | None
    with torch.random.fork_rng(devices=[]), torch.no_grad():
        for whole in (False, True):  # some models do not run with no-op blocks
            torch.default_generator.manual_seed(0)
            encoder, why = SmallEncoder(model, layers, ffn, whole), None
            try:
                _search(encoder, features)
            except Exception as error:  # model classes raise all kinds of errors
                why = _as_unfit(error, FINAL)
            if why is None or why.rank < NOT_RUN:
                break
    if why is None:
        return SplicedEncoder(model, encoder.splice, layers, encoder.ffn_name)
    found = f"encoder.features={features}: " if features else ""
    at = f" at {why.path}" if why.path and not features else ""
    remedy = "" if why.rank >= FINAL else "name the module whose output is local and without positions: encoder.features=…, or "
    raise ValueError(
        f"{found}{type(model).__name__} cannot be spliced{at}: {why}; {remedy}give it the methods embed and "
        f"contextualize, see {Path(__file__).parents[1]}/docs/encoders.md"
    )


def _search(encoder: SmallEncoder, named: str | None) -> None:
    """Fill in `encoder.splice` and `ffn_name`, or raise the Unfit of the best module; `named` is the only module to try."""
    run = _run_once(encoder, named)
    if encoder.restore_blocks():
        run = _run_once(encoder, named)
    width = encoder.hidden_size
    if run.states.ndim != 3 or run.states.shape[-1] != width:
        raise Unfit(f"its last states have the shape {tuple(run.states.shape)}, not (B, T, {width})", FINAL)
    positions = run.states.shape[1]
    if named and not any(path == named for path, _ in run.outputs):
        raise Unfit("is not in the model or does not run before its blocks", 0)
    reads, shape = encoder.reads, encoder.splice.shape
    failures: list[Unfit] = []
    for number, (path, output) in reversed(list(enumerate(run.outputs))):
        module = encoder.model.get_submodule(path)
        has_dropout = any(isinstance(child, nn.Dropout) for child in module.modules())
        if has_dropout and encoder.masks_features and not named:
            continue  # the teacher may share the features, and dropout is for the student only
        encoder.splice = Splice(reads, path, shape)
        try:
            _check_features(encoder, output, run)
        except Exception as error:  # the model does not run with this module replaced
            failures.append(_as_unfit(error, 1, path))
        else:
            encoder.splice.stem = _find_stem(encoder.splice, [before for before, _ in run.outputs[:number]])
            _inspect(encoder, run)
            return
    found = run.shapes.get("", (width,))[-1]
    if found != width:
        raise Unfit(f"its blocks have {found} channels, its last states {width}", FINAL)
    grids = [blocks.first(output) for _, output in run.outputs]
    most = max((grid.shape[2:].numel() for grid in grids if isinstance(grid, Tensor) and grid.ndim == 4), default=0)
    if most > positions and all(error.rank < 3 for error in failures):
        raise Unfit(f"is hierarchical: {most} local features become {positions} states, so no mask fits both", FINAL)
    if not failures:
        raise Unfit("no module before its blocks returns one feature per position", 0)
    raise max(failures, key=lambda error: error.rank)


# One run


class Run(NamedTuple):
    """What a model computed from one input."""

    inputs: Tensor
    states: Tensor  # of the model, (B, E + T, C) if it can be spliced
    outputs: list[tuple[str, Any]]  # of the modules that ran before the blocks, in execution order
    shapes: dict[str, tuple[int, ...]]  # of the last block ("") and the modules in it that may end an FFN, in execution order


def _run_once(encoder: SmallEncoder, named: str | None) -> Run:
    """Run the model on the first input shape that it accepts, which `encoder.splice` then has."""
    model, last, reads = encoder.model, encoder.blocks[-1], encoder.reads
    why: Unfit | None = None
    inside = set(encoder.blocks.modules())
    before = {path: m for path, m in model.named_modules() if (path == named if named else path and m not in inside)}
    if encoder.ffn_name is None:
        names = ("Linear", "Conv1D", "LayerScale")
        ends = {path: m for path, m in last.named_modules() if not path or type(m).__name__.endswith(names)}
    else:
        ends = {"": last, encoder.ffn_name: encoder._ffn(last)}
    for shape in _shapes(reads, model):
        encoder.splice = Splice("spectrogram" if len(shape) == 2 else reads, shape=shape)
        try:
            return _record(encoder, before, ends, every=bool(named))
        except Unfit:
            raise
        except Exception as error:  # model classes raise all kinds of errors
            why = why or _as_unfit(error, NOT_RUN)
    raise Unfit(f"it does not run on {model.main_input_name} alone: {why}", NOT_RUN)


def _record(encoder: SmallEncoder, before: dict[str, nn.Module], ends: dict[str, nn.Module], every: bool) -> Run:
    """Run the model and record outputs of `before`, unless `every` only until the first block, and shapes of `ends`."""
    outputs: list[tuple[str, Any]] = []
    shapes: dict[str, tuple[int, ...]] = {}
    called: set[nn.Module] = set()

    def note_output(path: str, output: Any) -> None:
        if every or not called:
            outputs.append((path, _clone(output)))

    def note_shape(path: str, output: Any) -> None:
        shapes.pop(path, None)  # the last call counts
        shapes[path] = tuple(blocks.flat(blocks.first(output)).shape)

    with ExitStack() as stack:
        for note, modules in ((note_output, before), (note_shape, ends)):
            for path, m in modules.items():
                hook = m.register_forward_hook(lambda m, args, output, note=note, path=path: note(path, output))
                stack.callback(hook.remove)
        for block in encoder.blocks:
            stack.callback(block.register_forward_pre_hook(lambda block, args: called.add(block)).remove)
        stack.callback(encoder.blocks[0].register_forward_hook(encoder.note_rest).remove)
        if "noise" in encoder.takes:
            encoder.splice.grid = (encoder.model.config.image_size // encoder.model.config.patch_size,) * 2
        inputs = encoder.example(BATCH)
        states = encoder.call(inputs)
    if len(called) < len(set(encoder.blocks)):
        raise Unfit(f"its blocks {encoder.layers_name} are not called as modules", NOT_RUN)
    return Run(inputs, states, outputs, shapes)


def _shapes(reads: str, model: Any) -> list[tuple[int, ...]]:
    """Input shapes, without the batch, that the model may take."""
    config = model.config

    def value(*names: str, default: int) -> int:
        found = [getattr(config, name, None) for name in names]
        return next((number for number in found if isinstance(number, int)), default)

    if reads == "text":
        return [()]
    if reads == "vision":
        size = getattr(config, "image_size", 64)
        high, wide = (size, size) if isinstance(size, int) else tuple(size)
        return [(value("num_channels", "in_channels", default=3), high, wide)]
    bins = value("num_mel_bins", "feature_projection_input_dim", "input_feat_per_channel", default=80)
    longest = value("max_length", "max_source_positions", default=128)
    spectrograms: list[tuple[int, ...]] = [(longest, bins), (bins, 2 * longest), (bins, longest), (97, bins), (bins, 97)]
    if "feature_projection_input_dim" in config.to_dict():
        spectrograms.insert(0, (97, config.feature_projection_input_dim))
    return [(4000,), *spectrograms] if model.main_input_name == "input_values" else spectrograms


def _clone(output: Any) -> Any:
    """A copy of a module's output that later in-place operations do not change."""
    if isinstance(output, tuple):
        return tuple(_clone(item) for item in output)
    return output.clone() if isinstance(output, Tensor) else output


# The module of the features


def _check_features(encoder: SmallEncoder, output: Any, run: Run) -> None:
    """Describe this output of the module `splice.features`; Unfit unless it is local and the model's only way to its input."""
    splice = encoder.splice
    rest = output[1:] if isinstance(output, tuple) else ()
    if any(item is not None for item in rest):
        raise Unfit(f"its output has {len(output)} parts", 1)
    splice.rest = len(rest) or None
    splice.order = _order_of(encoder, blocks.first(output), run.inputs)
    x = blocks.first(output).permute(splice.order)[:1]
    features, inputs, states = x.flatten(1, -2), run.inputs[:1], run.states[:1]
    length, splice.width = features.shape[1:]
    if x.ndim == 4:
        splice.grid = tuple(x.shape[1:-1])
    elif splice.reads == "vision":
        side = math.isqrt(length)
        if side * side != length:
            raise Unfit(f"its {length} positions do not form a square grid", 2)
        splice.grid = (side, side)
    elif splice.timed:
        _measure(encoder)
    splice.extra = states.shape[1] - length
    if splice.extra < 0:
        raise Unfit(f"{length} local features become {states.shape[1]} states", 2)
    if not close(encoder.run(features), states):
        if not close(encoder.call(inputs), states):
            raise Unfit("its states differ from call to call", FINAL)
        raise Unfit("the rest of the model also depends on its input in other ways", 3)
    checks.check_local(encoder, inputs)
    checks.check_order(encoder, features)
    if encoder.masks_features:
        checks.check_positions(encoder, features)
    else:
        checks.check_bidirectional(encoder, features)


def _order_of(encoder: SmallEncoder, output: Any, inputs: Tensor) -> tuple[int, ...]:
    """Batch, position and channel axes of the output of `splice.features`."""
    if not isinstance(output, Tensor) or not output.is_floating_point() or output.ndim not in (3, 4):
        found = type(output).__name__ if not isinstance(output, Tensor) else f"{output.dtype} {tuple(output.shape)}"
        raise Unfit(f"found the output {found}, expected a tensor (B, T, C), (B, C, T) or (B, C, H, W)", 1)
    shape, channels, text = tuple(output.shape), encoder.hidden_size, encoder.reads == "text"
    orders = [(0, 1, 2), (0, 2, 1), (1, 0, 2)] if len(shape) == 3 else [(0, 2, 3, 1), (0, 1, 2, 3)]
    if isinstance(encoder.model.get_submodule(encoder.features_name), nn.Conv1d):
        orders.reverse()
    for order in orders:
        batch, *positions, width = (shape[axis] for axis in order)
        fits = positions == [inputs.shape[1]] if text else width == channels
        if batch == len(inputs) and fits and (order != (1, 0, 2) or text):
            return order
    expected = f"(B, {inputs.shape[1]}, C)" if text else f"B = {len(inputs)} and C = {channels}"
    raise Unfit(f"found the output shape {shape}, expected {expected}", 1)


def _measure(encoder: SmallEncoder) -> None:
    """Find how the number of positions depends on the number of samples or frames, unless the length is fixed."""
    splice = encoder.splice

    def count(size: int) -> int:
        shape = list(splice.shape)
        shape[splice.time] = size
        return encoder.embed(torch.zeros(1, *shape, **encoder.kind())).shape[1]

    def try_count(size: int) -> int:
        try:
            return count(size)
        except Exception:  # too short, or not the one length that the model takes
            return 0

    high = splice.shape[splice.time]
    fixed = count(high)
    if try_count(high - high // 4) in (0, fixed):
        splice.grid = (fixed,)
        return
    sizes = []
    for wanted in (1, 2, 3):
        low, top = 0, high
        while top - low > 1:
            middle = (low + top) // 2
            low, top = (low, middle) if try_count(middle) >= wanted else (middle, top)
        sizes.append(top)
    first, step = sizes[1] - (sizes[2] - sizes[1]), sizes[2] - sizes[1]
    if (high - first) // step + 1 != fixed:
        raise Unfit(f"{fixed} positions from {high} samples or frames do not match any convolution", 2)
    splice.per_step = (first, step)


# What else the encoder needs, once the module is found


def _find_stem(splice: Splice, before: list[str]) -> str | None:
    """The module, one of those that ran before, that takes the raw audio input, if it is not the features module."""
    if not splice.timed:
        return None
    around = [path for path in before if not f"{splice.features}.".startswith(f"{path}.")]
    outer = [path for path in around if not any(path.startswith(f"{other}.") for other in around)]
    inner = [path for path in outer if not path.startswith(f"{splice.features}.")]
    return inner[0] if inner else None


def _inspect(encoder: SmallEncoder, run: Run) -> None:
    """Find the FFN output, the parameters that teachers copy, and whether padding and masked positions can be left out."""
    splice, inputs, length, width = encoder.splice, run.inputs[:1], run.states.shape[1], encoder.hidden_size
    if encoder.ffn_name is None:
        names = [path for path in run.shapes if path]
        if not names:
            kind = type(encoder.blocks[-1]).__name__
            raise Unfit(f"{kind} runs no nn.Linear: name the FFN's output with encoder.ffn=…", FINAL)
        encoder.ffn_name = names[-1]
    for path in (encoder.ffn_name, ""):
        expected, found = (BATCH, length, width), run.shapes.get(path)
        if found and splice.timed and not splice.extra and (found[0], *found[2:]) == (BATCH, width):
            splice.squeeze = max(1, length // found[1])
            expected = (BATCH, length // splice.squeeze, width)
        if found != expected:
            name, remedy = path or encoder.layers_name, "name the right module with encoder.ffn=…"
            raise Unfit(f"{name}: found a layer result of shape {found}, expected {expected}; {remedy}", FINAL)
    _find_parameters(encoder, inputs)
    splice.no_padding = checks.why_no_padding(encoder, encoder.embed(inputs))
    splice.no_gather = "its blocks see fewer positions" if splice.squeeze > 1 else checks.why_no_gather(encoder)


def _find_parameters(encoder: SmallEncoder, inputs: Tensor) -> None:
    """Find the parameters of the features, and those of what is added to them before the blocks."""
    parameters = dict(encoder.model.named_parameters())
    block_inputs: list[Tensor] = []

    def stop(block: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        map_tensors(lambda path, value: block_inputs.append(value), args, kwargs)
        raise StopForward

    def parameters_of(results: list[Tensor]) -> set[str]:
        results = [result for result in results if result.requires_grad]
        if not results:
            return set()
        total: Any = sum(result.float().sum() for result in results)
        found = torch.autograd.grad(total, list(parameters.values()), allow_unused=True, retain_graph=True)
        return {name for name, gradient in zip(parameters, found, strict=True) if gradient is not None}

    hook = encoder.blocks[0].register_forward_pre_hook(stop, with_kwargs=True)
    with torch.enable_grad():
        encoder.model.requires_grad_(True)
        features = encoder.embed(inputs)
        try:
            encoder.run(features)
        except StopForward:
            pass
        local = parameters_of([features])
        positional = parameters_of(block_inputs) - local
        encoder.model.requires_grad_(False)
    hook.remove()
    if encoder.mask_token_name:
        local.add(encoder.mask_token_name)
    encoder.splice.local, encoder.splice.positional = tuple(sorted(local)), tuple(sorted(positional))


def _find_layers(model: nn.Module) -> str:
    """`find_layers`, or the only outermost list of modules with attention, or the only list of num_hidden_layers modules."""
    try:
        return find_layers(model)
    except ValueError:
        lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList) and len(m)}
        attend = [name for name, m in lists.items() if "att" in " ".join(n for n, _ in m[0].named_modules()).lower()]
        outer = [name for name in attend if not any(name.startswith(f"{other}.") for other in attend)]
        expected = getattr(model.config, "num_hidden_layers", None)
        matching = [name for name, m in lists.items() if len(m) == expected]
        for found in (outer, matching):
            if len(found) == 1:
                return found[0]
        raise


def _as_unfit(error: Exception, rank: int, path: str | None = None) -> Unfit:
    """`error` of the module at `path`; `rank` is that of errors which no check raised."""
    if not isinstance(error, Unfit):
        return Unfit(f"{type(error).__name__}: {' '.join(str(error).split())[:200]}", rank, path)
    error.path = error.path or path
    return error
