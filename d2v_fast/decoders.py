"""From the student's states to predictions: the regression head of data2vec 1.0 and the convolutional decoder of 2.0."""

from __future__ import annotations

import itertools
import math
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from d2v_fast.config import HeadConfig

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


def regression_head(hidden_size: int, layers: int, zero_init: bool = False) -> nn.Sequential:
    """MLP of `layers` Linears with GELU and hidden width 2 · hidden_size; the identity for 0 layers (method 3.2, 3.3)."""
    modules: list[nn.Module] = []
    width = hidden_size
    for _ in range(layers - 1):
        modules += [nn.Linear(width, 2 * hidden_size), nn.GELU()]
        width = 2 * hidden_size
    if layers:
        modules.append(nn.Linear(width, hidden_size))
        if zero_init:
            _zero_init(modules[-1])
    return nn.Sequential(*modules)


def _zero_init(linear: nn.Module) -> None:
    for parameter in linear.parameters():
        nn.init.zeros_(parameter)


class ConvDecoder(nn.Module):
    """Convolutions over all positions, visible and masked, then a projection to the width of the targets (method 4.5).

    Each layer is a convolution, a norm over channels without affine parameters and GELU, with a residual if the width is
    unchanged.

    Args:
        hidden_size: Channels C of the encoder and of the targets.
        axes: Axes of the grid of positions: 1 for text and speech, 2 for images and spectrograms.
        width: Channels of the convolutions.
        kernel: Kernel size along each axis; an even kernel reaches one position further to the left.
        layers: Number of convolutions.
        groups: Channel groups of each convolution.
        residual: Add a layer's input to its output.
        projection_layers: Linears of the projection, with GELU between them and hidden width 2 · width.
        dropout: Dropout of the encoder's states.
        noise: Standard deviation of the noise inserted at masked positions, drawn anew in every step.
        zero_init: Initialise the last Linear to zero.

    Raises:
        ValueError: The number of axes is not supported, or groups do not divide the channels.
    """

    def __init__(
        self,
        hidden_size: int,
        axes: int = 1,
        width: int = HeadConfig.width,
        kernel: int = HeadConfig.kernel,
        layers: int = 4,
        groups: int = HeadConfig.groups,
        residual: bool = HeadConfig.residual,
        projection_layers: int = HeadConfig.projection_layers,
        dropout: float = HeadConfig.dropout,
        noise: float = HeadConfig.noise,
        zero_init: bool = HeadConfig.zero_init,
    ):
        super().__init__()
        if axes not in CONVOLUTIONS:
            raise ValueError(f"axes: found {axes}, expected one of {', '.join(map(str, CONVOLUTIONS))}")
        if width % groups or hidden_size % groups:
            raise ValueError(f"groups: found {groups}, expected a divisor of width={width} and hidden_size={hidden_size}")
        self.axes, self.kernel, self.residual, self.noise = axes, kernel, residual, noise
        self.dropout = nn.Dropout(dropout)
        sizes = [hidden_size] + [width] * layers
        self.convolutions = nn.ModuleList(
            CONVOLUTIONS[axes](size_in, size_out, kernel, padding=kernel // 2, groups=groups)
            for size_in, size_out in itertools.pairwise(sizes)
        )
        projection: list[nn.Module] = []
        for _ in range(projection_layers - 1):
            projection += [nn.Linear(sizes[-1], 2 * width), nn.GELU()]
            sizes.append(2 * width)
        self.projection = nn.Sequential(*projection, nn.Linear(sizes[-1], hidden_size))
        if zero_init:
            _zero_init(self.projection[-1])

    def restore(self, states: Tensor, visible: Tensor, length: int) -> Tensor:
        """All positions (N, T, C): states (N, V, C) at the visible positions (N, V) int64, noise elsewhere."""
        count, _, width = states.shape
        x = torch.randn(count * length, width, dtype=states.dtype, device=states.device) * self.noise
        rows = visible + length * torch.arange(count, device=visible.device)[:, None]
        return x.index_copy_(0, rows.flatten(), self.dropout(states).flatten(0, 1)).view(count, length, width)

    def forward(
        self, x: Tensor, grid: tuple[int, ...], padding_mask: Tensor | None = None, rows: Tensor | None = None
    ) -> Tensor:
        """Predict from all positions.

        Args:
            x: (N, T, C) from `restore`, row-major on the grid.
            grid: Positions along each axis.
            padding_mask: (N, T) bool, True = padding, zeroed before each convolution.
            rows: (rows,) int64, positions of the flattened (N, T) to predict; all by default.

        Returns:
            (N, T, C), or (rows, C).

        Raises:
            ValueError: The grid does not match the decoder's axes or the number of positions.
        """
        if len(grid) != self.axes or math.prod(grid) != x.shape[1]:
            raise ValueError(f"grid: found {grid} for {x.shape[1]} positions and a decoder of {self.axes} axes")
        x = x.transpose(1, 2).unflatten(2, grid)
        padding = None if padding_mask is None else padding_mask.view(-1, 1, *grid)
        for convolution in self.convolutions:
            if padding is not None:
                x = x.masked_fill(padding, 0)
            y = convolution(x)
            if self.kernel % 2 == 0:
                y = y[(..., *[slice(side) for side in grid])]
            y = y.movedim(1, -1)
            y = F.gelu(F.layer_norm(y, y.shape[-1:])).movedim(-1, 1)
            x = x + y if self.residual and x.shape == y.shape else y
        x = x.flatten(2).transpose(1, 2)
        return self.projection(x if rows is None else x.flatten(0, 1).index_select(0, rows))

    if TYPE_CHECKING:
        __call__ = forward  # that of nn.Module takes and returns anything
