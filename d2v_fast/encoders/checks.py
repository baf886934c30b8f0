"""Checks of a model that runs with replaced features: which modules fit, and what such a model can leave out.

All run on a small copy of the model whose `splice` names the module.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode

from d2v_fast.encoders.base import gather
from d2v_fast.encoders.small import SmallEncoder, close
from d2v_fast.encoders.spliced import first_path, map_tensors, override_forward

NORMS_OVER_TIME = (nn.GroupNorm, nn.InstanceNorm1d, nn.BatchNorm1d)  # they mix statistics, not content
FINAL = 10  # rank of a failure that no other choice of module can fix


class Unfit(ValueError):
    """A module cannot be spliced; `rank` is the number of tests it passed, `path` that module or None if the model is unfit."""

    def __init__(self, reason: str, rank: int, path: str | None = None):
        super().__init__(reason)
        self.rank, self.path = rank, path


def check_local(encoder: SmallEncoder, inputs: Tensor) -> None:
    """Change the end, the start and the middle of the input (1, …): only features there may change.

    Text is changed at one token, other inputs in an eighth of each axis. There, features of neighbouring positions may
    change too, and those within the reach of the convolutions that compute them.
    """
    reads, inside = encoder.reads, set(encoder.blocks.modules())
    reaches, changes = [0.0], {"end": 1.0, "start": 0.0, "middle": 0.5}

    def note(conv: Any, args: tuple) -> None:
        each = zip(args[0].shape[2:], conv.kernel_size, conv.stride, conv.dilation, strict=False)
        reaches.append(max(0.0, *((dilation * (kernel - 1) + 1 - step) / size for size, kernel, step, dilation in each)))

    others = inputs.repeat(len(changes), *[1] * (inputs.ndim - 1))
    for other, at in zip(others, changes.values(), strict=True):
        part = other
        for axis in range(-min(2, other.ndim), 0):
            width = max(1, other.shape[axis] // 8)
            part = part.narrow(axis, round(at * (other.shape[axis] - width)), width)
        if reads == "text":
            part.fill_(encoder.ids[encoder.ids.index(int(part)) - 1])
        else:
            part.add_(torch.randn_like(part))
    with ExitStack() as stack:
        # Norms over positions are replaced by norms over channels, because without any a deep stem would overflow.
        for module in encoder.model.modules():
            if isinstance(module, NORMS_OVER_TIME) and module not in inside:
                stack.enter_context(override_forward(module, lambda x: nn.functional.normalize(x, dim=1)))
            elif isinstance(module, nn.Conv1d | nn.Conv2d) and module not in inside:
                stack.callback(module.register_forward_pre_hook(note).remove)
        plain, *changed = encoder.embed(torch.cat([inputs, others]))
    length, reach = len(plain), sum(reaches)
    grid = encoder.splice.grid or (length,)
    cells = torch.tensor(grid)
    for (where, at), features in zip(changes.items(), changed, strict=True):
        found = _differing(features, plain)
        count, index = int(found.sum()), found.cpu().view(grid).nonzero()
        if reads == "text":
            far = index != round(at * (length - 1))
        else:
            first, last = (at * 7 / 8 - reach) * cells - 1, (at * 7 / 8 + 1 / 8 + reach) * cells + 1
            far = (index + 1 <= first) | (index >= last)
        if far.any() or (count > max(1, length // 2) and where != "middle"):
            raise Unfit(
                f"is not local: the {where} of the input changes {count} of its {length} positions, so masked content "
                "would leak into visible positions",
                4,
            )
        if count == 0:
            raise Unfit(f"does not depend on the {where} of the input", 4)


def check_order(encoder: SmallEncoder, features: Tensor) -> None:
    """Change the first, a middle and the last feature with the blocks skipped: only their own states must change."""
    extra, timed, last = encoder.extra, encoder.splice.timed, features.shape[1] - 1
    each = (0, last // 2) if timed else (0, last // 2, last)  # SEW drops an odd last frame
    with encoder.skip_blocks():
        *changes, plain = encoder.run(torch.cat([*(_perturb(features, at) for at in each), features]))
    for at, states in zip(each, changes, strict=True):
        changed = _differing(states, plain)
        if not changed[extra + at] or changed[:extra].any() or (not timed and changed.sum() != 1):
            where = changed.nonzero().flatten().tolist()[:5]
            raise Unfit(
                f"without its blocks, feature {at} ends up in states {where}, expected only {extra + at}: extra "
                "tokens come after or among the positions, or the positions are reordered",
                5,
            )


def check_positions(encoder: SmallEncoder, features: Tensor) -> None:
    """Set some positions to the same mask vector: their states must still differ."""
    masked = features.clone()
    hidden = torch.rand(features.shape[1]) < 0.5
    hidden[:3] = torch.tensor([True, False, True])
    masked[:, hidden] = features[0, 0]

    def differ() -> bool:
        found = encoder.run(masked)[:, encoder.extra :][:, hidden]
        return not close(found, found[:, :1].expand_as(found))

    with encoder.skip_blocks():
        added = differ()
    if not added and not differ():
        raise Unfit("masked positions get equal states: masking removes the positions, or the model has none", 6)


def check_bidirectional(encoder: SmallEncoder, features: Tensor) -> None:
    """Change the first and the last feature: in a causal block only the first one affects other positions."""
    three = torch.cat([features, _perturb(features, 0), _perturb(features, -1)])
    causal = []
    for number in encoder.kept:
        with encoder.skip_blocks(keep=encoder.blocks[number]):
            plain, first, last = encoder.run(three)
        if _differing(first, plain)[1:].any() and not _differing(last, plain)[:-1].any():
            causal.append(number)
    if causal:
        who = "is causal" if len(causal) == len(encoder.kept) else f"has causal blocks, such as {causal[0]}"
        remedy = "set encoder.bidirectional=true to make its attention bidirectional"
        if getattr(encoder.model.config, "is_causal", True) is False:
            remedy = "config.is_causal = false, which encoder.bidirectional sets, does not change that"
        raise Unfit(f"{who}: positions do not see later ones; {remedy}", FINAL)


def why_no_padding(encoder: SmallEncoder, features: Tensor) -> str | None:
    """Why padding cannot be excluded from the context; None if it can."""
    if "attention_mask" not in encoder.takes:
        return "takes no attention_mask"
    padding = torch.zeros(features.shape[:2], dtype=torch.bool, device=features.device)
    padding[:, -max(1, features.shape[1] // 4) :] = True
    other = features + torch.randn_like(features) * padding.unsqueeze(-1)
    try:
        states = encoder.run(torch.cat([features, other]), padding.expand(2, -1))[:, encoder.extra :]
    except Exception as error:
        return f"does not run with its attention_mask ({type(error).__name__})"
    return None if close(*states[:, ~padding[0]]) else "attends to padding despite its attention_mask"


def why_no_gather(encoder: SmallEncoder) -> str | None:
    """Why a subset of the positions cannot be encoded alone; None if it can.

    Random positions, encoded alone and out of order, must get the states that they get among all with the others hidden
    from attention. Fills in `splice.axes`.
    """
    splice, extra = encoder.splice, encoder.extra
    features = encoder.embed(encoder.long_example())
    length, at = features.shape[1], features.shape[1] // 2
    placed = encoder.placed(torch.cat([_perturb(features, at), features]))
    changed = _differing(*placed)
    if placed.shape[1] != length or changed.sum() != 1 or not changed[at]:
        return "its positions come from a convolution or similar, which would see masked content"

    subset = torch.stack([torch.randperm(length, device=features.device)[: length // 2] for _ in range(2)])
    rows = torch.cat([torch.arange(extra, device=features.device).expand(2, -1), subset + extra], dim=1)
    hidden = torch.ones(2, extra + length, dtype=torch.bool, device=features.device).scatter(1, rows, False)
    found: dict[tuple, list[int]] = {}

    def note(number: int, args: tuple, kwargs: dict[str, Any]) -> None:
        def keep(path: tuple, value: Tensor) -> None:
            if path != first_path(args, kwargs):
                found[number, path] = [axis for axis, size in enumerate(value.shape) if size in (extra + length, length)]

        map_tensors(keep, args, kwargs)

    with ExitStack() as stack:
        for number, block in enumerate(encoder.blocks):
            hook = block.register_forward_pre_hook(lambda m, a, k, number=number: note(number, a, k), with_kwargs=True)
            stack.callback(hook.remove)
        with sdpa_kernel(SDPBackend.MATH), _HideKeys(hidden):
            states = encoder.run(features.expand(2, -1, -1))
    expected = states.gather(1, rows[..., None].expand(-1, -1, states.shape[-1]))
    x = gather(placed[1:], subset)
    for axes in (found, {key: value[:1] for key, value in found.items()}):  # another axis may happen to have the same size
        splice.axes = axes
        try:
            if close(encoder._whole(x, None, subset), expected):
                return None
        except Exception:  # blocks that do not run on other rows
            continue
    return "its blocks depend on positions or on their number, or its attention is not a softmax"


class _HideKeys(TorchDispatchMode):
    """Leave keys out of each softmax over all keys; `hidden` (B, K) bool."""

    def __init__(self, hidden: Tensor):
        super().__init__()
        self.hidden = hidden

    def __torch_dispatch__(self, op: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        batch, keys = self.hidden.shape
        if op in (torch.ops.aten._softmax.default, torch.ops.aten._safe_softmax.default) and args[0].shape[-1] == keys:
            # Not -inf: where nothing else is left, as in a window without visible positions, NaN would spread.
            scores = args[0].reshape(batch, -1, keys).masked_fill(self.hidden[:, None], -1e30)
            args = (scores.view_as(args[0]), *args[1:])
        return op(*args, **(kwargs or {}))


def _perturb(features: Tensor, at: int) -> Tensor:
    """Features (1, T, C) with noise added at position `at`."""
    other = features.clone()
    other[:, at] += torch.randn_like(other[:, at])
    return other


def _differing(one: Tensor, other: Tensor) -> Tensor:
    """Whether two results (T, C) differ at each position, (T,) bool."""
    return (one - other).abs().amax(-1) > 1e-6 * other.abs().max()
