"""What turns a student's states into predictions: the convolutional decoder of data2vec 2.0 (spec 4.5)."""

from __future__ import annotations

import itertools
import math

import torch.nn.functional as F
from torch import Tensor, nn

CONVOLUTIONS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}


class ConvDecoder(nn.Module):
    """Convolutions over all positions, visible and masked, then a projection to the width of the targets.

    Each layer is a convolution, a norm over channels without weights, and GELU, with a residual where the width stays.

    Args:
        hidden_size: Channels C of the encoder and of the targets.
        axes: Axes of the grid of positions: 1 for text and speech, 2 for images.
        width: Channels of the convolutions.
        kernel: Their side; an even one reaches one position further to the left.
        layers: Number of convolutions.
        groups: Groups of channels that each convolution keeps apart.
        residual: Add a layer's input to its output.
        projection_layers: Linears of the projection, with GELU between, twice as wide inside.

    Raises:
        ValueError: A number of axes without a convolution, or groups that do not divide the channels.
    """

    def __init__(
        self,
        hidden_size: int,
        axes: int = 1,
        width: int = 384,
        kernel: int = 7,
        layers: int = 4,
        groups: int = 16,
        residual: bool = True,
        projection_layers: int = 1,
    ):
        super().__init__()
        if axes not in CONVOLUTIONS:
            raise ValueError(f"axes: found {axes}, expected one of {', '.join(map(str, CONVOLUTIONS))}")
        if width % groups or hidden_size % groups:
            raise ValueError(f"groups: found {groups}, expected a divisor of width={width} and hidden_size={hidden_size}")
        self.axes, self.kernel, self.residual = axes, kernel, residual
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

    def forward(self, x: Tensor, grid: tuple[int, ...]) -> Tensor:
        """Predictions (N, T, C) of all positions from x (N, T, C), row-major on a grid.

        Raises:
            ValueError: A grid with another number of axes or of positions.
        """
        if len(grid) != self.axes or math.prod(grid) != x.shape[1]:
            raise ValueError(f"grid: found {grid} for {x.shape[1]} positions and a decoder of {self.axes} axes")
        x = x.transpose(1, 2).unflatten(2, grid)
        for convolution in self.convolutions:
            y = convolution(x)
            if self.kernel % 2 == 0:
                y = y[(..., *[slice(side) for side in grid])]
            y = y.movedim(1, -1)
            y = F.gelu(F.layer_norm(y, y.shape[-1:])).movedim(-1, 1)
            x = x + y if self.residual and x.shape == y.shape else y
        return self.projection(x.flatten(2).transpose(1, 2))
