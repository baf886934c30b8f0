"""The base encoder: features, positions, blocks, and the outputs of the last blocks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from d2v_fast.choices import EMAScope, LayerSource
from d2v_fast.encoders import blocks


def gather(x: Tensor, visible: Tensor) -> Tensor:
    """x (B, T, C) at the positions `visible` (B·M, V) of its M views, (B·M, V, C)."""
    first = torch.arange(len(visible), device=x.device) // (len(visible) // len(x)) * x.shape[1]
    # Unlike indexing, the backward of an embedding accumulates the views in parallel.
    return F.embedding(visible + first[:, None], x.flatten(0, 1))


def find_layers(model: nn.Module) -> str:
    """Dotted path of the list of config.num_hidden_layers blocks with attention; ValueError if there is none."""
    wanted = getattr(getattr(model, "config", None), "num_hidden_layers", None)
    lists = {name: m for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential) and len(m)}
    for name, modules in lists.items():
        inner = " ".join(n for n, _ in modules[0].named_modules())
        if len(modules) == wanted and "att" in inner:
            return name
    raise ValueError(
        f"cannot find the transformer layers of {type(model).__name__}: no nn.ModuleList has "
        f"config.num_hidden_layers = {wanted} blocks with attention inside. Name it with encoder.layers=… "
        f"(found: {', '.join(f'{name} of {len(m)}' for name, m in lists.items()) or 'no nn.ModuleList'})"
    )


class Encoded(NamedTuple):
    """Output of the blocks.

    Attributes:
        states: (B, T, C), or (N, C) if `rows` were given.
        layers: Results of the last K blocks, first to last: K × (B, T, C).
        extra: (B, E, C), states of extra tokens such as CLS; None if they were not computed.
    """

    states: Tensor
    layers: list[Tensor]
    extra: Tensor | None = None


class Encoder(nn.Module):
    """A transformer encoder in the pieces that data2vec needs.

    Attributes:
        halves: Function of `blocks.py` that runs a block in two halves; None for blocks that it does not know.
        narrow: Run everything after the attention of the last block at the requested rows only. Needs `halves`.

    Args:
        model: A module with `embed(inputs) → (B, T, C)` and `contextualize(features, padding_mask) → (B, T, C)`.
        layers: Dotted path of the `nn.ModuleList` of transformer blocks; detected automatically in Hugging Face models.
        ffn: Dotted path, relative to a block, of the module whose output is the FFN result before dropout and residual;
            default is the last `nn.Linear` of the block.
        hidden_size: Channels C; default is `model.hidden_size` or `model.config.hidden_size`.

    Raises:
        ValueError: The blocks, the FFN or the hidden size cannot be found; the message gives the setting for it.
    """

    model: Any  # an nn.Module whose parts are known only by name
    halves: blocks.Halves | None
    reads: str | None = None  # modality of the inputs; None for a custom module
    local: tuple[str, ...] = ()  # name prefixes of the parameters of the features before masking
    positional: tuple[str, ...] = ()  # name prefixes of the parameters of positions inside `contextualize`
    mask_token_name: str | None = None
    masks_features: bool = True  # if False, the input itself is masked and there is no mask vector
    extra_tokens: bool = False  # whether the blocks see extra tokens such as CLS

    def __init__(self, model: nn.Module, layers: str | None = None, ffn: str | None = None, hidden_size: int | None = None):
        super().__init__()
        self.model = model
        self.layers_name = layers or find_layers(model)
        self.ffn_name = ffn
        config = getattr(model, "config", None)
        channels = hidden_size or getattr(model, "hidden_size", None) or getattr(config, "hidden_size", None)
        if channels is None:
            raise ValueError(f"{type(model).__name__} has neither hidden_size nor config.hidden_size: give it one")
        self.hidden_size: int = channels
        try:
            listed = self.blocks
        except ValueError as error:
            names = [name for name, m in model.named_modules() if isinstance(m, nn.ModuleList | nn.Sequential)]
            raise ValueError(f"encoder.layers={self.layers_name}: {error}; its lists of modules: {names}") from error
        if not isinstance(listed, nn.ModuleList | nn.Sequential):
            found = type(listed).__name__
            raise ValueError(f"encoder.layers={self.layers_name}: found a {found}, expected an nn.ModuleList of blocks")
        self.halves = None
        self._compiled_halves: blocks.Halves | None = None
        self.narrow = False
        if self.masks_features and not self._has(self.mask_token_name):
            self.mask_token_name = None
            self.mask_embedding = nn.Parameter(torch.empty(self.hidden_size).normal_(std=0.02))

    # From inputs to states

    def embed(self, inputs: Tensor) -> Tensor:
        """Local features (B, T, C), before masking and without context.

        Raises:
            ValueError: The model's `embed` returns a different layout.
        """
        features = self.model.embed(inputs)
        found = tuple(features.shape) if isinstance(features, Tensor) else type(features).__name__
        if not isinstance(found, tuple) or len(found) != 3 or found[-1] != self.hidden_size:
            raise ValueError(
                f"{type(self.model).__name__}.embed: found {found}, expected (batch, positions, hidden_size = "
                f"{self.hidden_size}); x.flatten(2).transpose(1, 2) turns (B, C, H, W) and (B, C, T) into that"
            )
        return features

    def mask_features(self, features: Tensor, mask: Tensor) -> Tensor:
        """Replace features (B, T, C) at masked positions, mask (B, T) bool, by the learned mask vector."""
        return torch.where(mask.unsqueeze(-1), self.mask_token.to(features.dtype), features)

    def place(self, features: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Add positions to the features, (B, T, C), if the model adds them after masking."""
        return self.model.place(features) if self._places else features

    def place_visible(self, features: Tensor, mask: Tensor, visible: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """Features of the visible positions of every view, with their positions (method 4.3).

        Args:
            features: (B, T, C), from `embed`.
            mask: (B, M, T) bool, True = masked.
            visible: (B·M, V) int64, positions in [0, T) that are visible, view by view.
            padding_mask: (B, T) bool, True = padding.

        Returns:
            (B·M, V, C).
        """
        return gather(self.place(features, padding_mask), visible)

    @property
    def gathers(self) -> bool:
        """Whether the blocks can run on a subset of the positions."""
        return self.halves is not None or self._places

    @property
    def _places(self) -> bool:
        return callable(getattr(self.model, "place", None))  # an attribute of that name may hold something else

    def transform(
        self,
        x: Tensor,
        padding_mask: Tensor | None = None,
        *,
        visible: Tensor | None = None,
        layers: int = 0,
        source: LayerSource = "ffn",
        rows: Tensor | None = None,
    ) -> Encoded:
        """Run the blocks on features with positions.

        Does not use `output_hidden_states`, which would force eager attention and keep every layer.

        Args:
            x: (B, T, C), from `place`, or from `place_visible` if `visible` is given.
            padding_mask: (B, T) bool, True = padding.
            visible: (B, T) int64, positions of x in the full sequence, for biases that depend on distance; default is 0 to
                T - 1.
            layers: Number K of last blocks whose results are returned.
            source: Which result of a block to return (method 1.3): its FFN's output, its own output, or its input.
            rows: (N,) int64, positions of the flattened (B, T) whose states are returned; all by default. With `narrow`, the
                result of the last block is zero elsewhere.

        Raises:
            ValueError: There are fewer blocks than `layers`, or one of them was not called.
        """
        if layers:
            self.check_layers(layers, source)
        length = x.shape[1]
        if self.halves is None:
            with self._captured(layers, source) as captured:
                states = self._whole(x, padding_mask, visible)
            if len(captured) < layers:
                raise ValueError(
                    f"{type(self.model).__name__}: {layers - len(captured)} of the last {layers} blocks gave no result; "
                    "call them as modules, and set encoder.ffn=… if the FFN's output is not that of the last Linear"
                )
            results = [self._scaled(blocks.flat(result)[:, -length:], block, source) for block, result in captured.items()]
            extra_states, states = states[:, :-length], states[:, -length:]
            states = states if rows is None else blocks.select(states, rows)
            return Encoded(states, results, extra_states if extra_states.shape[1] else None)
        halves = self._compiled_halves or self.halves
        batch, results, narrowed = len(x), [], None
        x, extra, each = self._enter(x, padding_mask, visible)
        for left, block, arguments in zip(reversed(range(len(self.blocks))), self.blocks, each, strict=True):
            if left < layers and source == "block_input":
                results.append(x[:, extra:])
            if self._dropped():
                continue
            if left == 0 and rows is not None and self._narrows(block):
                narrowed = rows if extra == 0 else rows + extra * (rows // length + 1)
            if narrowed is not None or (left < layers and source == "ffn"):
                x, ffn = halves(block, x, narrowed, **arguments)
            else:
                x, ffn = blocks.first(block(x, **arguments)), None
            if left < layers and source != "block_input":
                result = self._scaled(x if ffn is None or source != "ffn" else ffn, block, source)
                if narrowed is not None:
                    # Leave room for extra tokens, so that all results have the same strides; otherwise the Triton loss copies.
                    whole = result.new_zeros(batch * (extra + length), result.shape[-1])
                    result = whole.index_copy_(0, narrowed, result[0]).view(batch, extra + length, -1)
                results.append(result[:, -length:])
        states = self._leave(x)
        if narrowed is not None:
            return Encoded(states[0], results)
        extra_states, states = states[:, :extra], states[:, extra:]
        return Encoded(states if rows is None else blocks.select(states, rows), results, extra_states)

    def contextualize(self, features: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """States (B, T, C) of all positions; padding_mask (B, T) bool, True = padding."""
        return self.transform(self.place(features, padding_mask), padding_mask).states

    def encode(self, inputs: Tensor, padding_mask: Tensor | None = None) -> Encoded:
        """Encode an unmasked input, for example for a probe."""
        return self.transform(self.place(self.embed(inputs), padding_mask), padding_mask)

    def forward(self, inputs: Tensor, padding_mask: Tensor | None = None) -> Tensor:
        """States (B, T, C) of an unmasked input."""
        return self.encode(inputs, padding_mask).states

    if TYPE_CHECKING:
        __call__ = forward  # that of nn.Module takes and returns anything

    def positions(self, size: int) -> int | tuple[int, ...]:
        """Number of positions for an input of this size (tokens, samples), or the grid of patches for an image side."""
        return self.model.positions(size) if hasattr(self.model, "positions") else size

    @property
    def mask_token(self) -> Tensor:
        return self.mask_embedding if self.mask_token_name is None else self._lookup(self.mask_token_name)

    # Blocks

    @property
    def blocks(self) -> nn.ModuleList:
        return self._lookup(self.layers_name)

    def compile_halves(self) -> None:
        """Compile the block halves with `torch.compile`, if they are known."""
        self._compiled_halves = self.halves and torch.compile(self.halves)

    def checkpoint_blocks(self) -> None:
        """Activation checkpointing: keep only the input of each block and recompute the block in the backward pass.

        Wraps `block.forward`, so module hooks do not run twice. Call it after `fuse` and before `sharding.shard`.
        """

        def checkpointed(run: Callable[..., Any]) -> Callable[..., Any]:
            return partial(checkpoint, run, use_reentrant=False)

        for block in dict.fromkeys(self.blocks):
            block.forward = checkpointed(block.forward)
        self.halves = self.halves and checkpointed(self.halves)
        self._compiled_halves = self._compiled_halves and checkpointed(self._compiled_halves)

    def __getstate__(self) -> dict[str, Any]:
        return super().__getstate__() | {"_compiled_halves": None}  # compiled functions cannot be pickled or deep-copied

    def check_layers(self, layers: int, source: LayerSource) -> None:
        """Raise ValueError if there are fewer blocks than `layers`, or if one of them lacks the FFN module."""
        if not 1 <= layers <= len(self.blocks):
            raise ValueError(f"top_k: found {layers}, but {type(self.model).__name__} has {len(self.blocks)} layers")
        if source == "ffn":
            for block in self.blocks[-layers:]:
                self._ffn(block)

    # Overridden by each model family

    def _enter(
        self, x: Tensor, padding_mask: Tensor | None, visible: Tensor | None = None
    ) -> tuple[Tensor, int, list[dict[str, Any]]]:
        """Input of the first block (B, E + T, C), the number E of extra tokens in front, and the arguments of each block."""
        raise NotImplementedError

    def _leave(self, x: Tensor) -> Tensor:
        """Turn the output of the last block into states."""
        return x

    def _whole(self, x: Tensor, padding_mask: Tensor | None, visible: Tensor | None = None) -> Tensor:
        """States (B, E + T, C) from the model's own forward, for blocks whose halves are not known."""
        return self.model.contextualize(x, padding_mask)

    def _dropped(self) -> bool:
        """Whether LayerDrop skips the next block."""
        return False

    def _narrows(self, block: nn.Module) -> bool:
        # Stochastic depth drops whole samples, but `take` merges all samples into one batch entry.
        return self.narrow and not (block.training and any(getattr(m, "drop_prob", None) for m in block.modules()))

    @staticmethod
    def _scaled(result: Tensor, block: nn.Module, source: LayerSource) -> Tensor:
        """BEiT scales the FFN output before the residual; the scaled output is the layer's result (method 1.3)."""
        scale = getattr(block, "lambda_2", getattr(block, "gamma_2", None)) if source == "ffn" else None  # gamma_2 in timm
        return result * scale if isinstance(scale, Tensor) else result

    @contextmanager
    def _captured(self, layers: int, source: LayerSource) -> Iterator[dict[nn.Module, Tensor]]:
        """Capture the results of the last blocks with temporary hooks, while the model runs the blocks itself."""
        results: dict[nn.Module, Tensor] = {}
        hooks = []
        for block in self.blocks[len(self.blocks) - layers :]:
            if source == "block_input":

                def keep_input(module: nn.Module, args: Any, kwargs: Any, block: nn.Module = block) -> None:
                    results[block] = args[0] if args else kwargs["hidden_states"]

                hooks.append(block.register_forward_pre_hook(keep_input, with_kwargs=True))
            else:

                def keep(module: nn.Module, args: Any, output: Any, block: nn.Module = block) -> None:
                    results[block] = blocks.first(output)

                hooks.append((self._ffn(block) if source == "ffn" else block).register_forward_hook(keep))
        try:
            yield results
        finally:
            for hook in hooks:
                hook.remove()

    def not_averaged(self, scope: EMAScope) -> list[str]:
        """Name patterns of the parameters that a teacher of this scope copies instead of averaging (method 1.6)."""
        prefixes = {"all": (), "encoder": self.local, "layers": self.local + self.positional}[scope]
        names = [name for name, _ in self.named_parameters()]
        patterns = [f"model.{prefix}*" for prefix in prefixes]
        return [p for p in patterns if any(name.startswith(p[:-1]) for name in names)]

    def save(self, folder: str | Path) -> None:
        """Save the model only, in Hugging Face format if it has one, otherwise its weights as safetensors."""
        if hasattr(self.model, "save_pretrained"):
            from d2v_fast import nets

            nets.save(self.model, folder)
            return
        from safetensors.torch import save_model

        Path(folder).mkdir(parents=True, exist_ok=True)
        save_model(self.model, str(Path(folder) / "model.safetensors"))

    def _lookup(self, path: str) -> Any:
        found: Any = self.model
        for name in path.split("."):
            if not hasattr(found, name):
                raise ValueError(f"{path!r}: {type(found).__name__} has no attribute {name!r}")
            found = getattr(found, name)
        return found

    def _has(self, path: str | None) -> bool:
        """Whether the model has a parameter of this name; the mask vector of wav2vec 2.0 and ViT is optional."""
        return path is not None and path in dict(self.model.named_parameters())

    def _ffn(self, block: nn.Module) -> nn.Module:
        if self.ffn_name is not None:
            try:
                return block.get_submodule(self.ffn_name)
            except AttributeError:
                names = [n for n, m in block.named_modules() if isinstance(m, nn.Linear)]
                raise ValueError(f"encoder.ffn={self.ffn_name}: not in {type(block).__name__}; its Linears: {names}") from None
        linears = [m for m in block.modules() if isinstance(m, nn.Linear)]
        if not linears:
            raise ValueError(f"{type(block).__name__} has no nn.Linear: name the FFN's output with encoder.ffn=…")
        return linears[-1]
