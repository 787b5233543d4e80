"""UniAS's reconstruction head, which is linear throughout, computed on the coarse grid.

Letters: B images, D width, C channels, g side of the coarse grid, S = g x factor side of the level.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from allgood.layers.derived import Derived
from allgood.scoring import axis_matrix


class ReconstructionHead(nn.Module):
    """Bilinear resize (corners aligned) and three 3 x 3 convolutions, without activations.

    `forward` and `plain` give the same up to rounding. `plain` says what is meant; `forward` makes
    use of its linearity and takes a small part of the time where the level is much finer than the
    grid, in training as well:

    - the three kernels are one of 7 x 7;
    - a convolution after the resize is 49 products on the coarse grid before it, each of them then
      resized by a shifted matrix: with R (S, 7 g) the seven shifts side by side and T (7 g, 7 g)
      the products, the level is R T R^T;
    - the one kernel sees what the second and third convolution of the chain take for 0: values just
      outside the level. What these would add to its outer two pixels is taken off again;
    - biases add what the chain makes of zeros.
    """

    def __init__(self, width: int, channels: int, grid: int, factor: int) -> None:
        super().__init__()
        self.factor = factor
        self.side = grid * factor
        self.conv1 = nn.Conv2d(width, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1)
        self.conv3 = nn.Conv2d(width, channels, 3, padding=1)
        self.resize: Tensor
        self.shifted: Tensor
        resize = resize_matrix(grid, self.side)
        shifts = F.pad(resize, (0, 0, 3, 3)).unfold(0, self.side, 1)  # (7, g, S)
        self.register_buffer("resize", resize, persistent=False)
        self.register_buffer("shifted", shifts.flatten(0, 1).T.contiguous(), persistent=False)
        self._composed: Derived[tuple[Tensor, list[list[Tensor]], Tensor]] = Derived()

    def plain(self, x: Tensor) -> Tensor:
        """(B, D, g, g) -> (B, C, S, S), as the authors compute it."""
        if self.factor == 1:
            return self._chain(x)
        size = (self.side, self.side)
        return self._chain(F.interpolate(x, size, mode="bilinear", align_corners=True))

    def forward(self, x: Tensor) -> Tensor:
        """(B, D, g, g) -> (B, C, S, S)."""
        if self.factor < 4 or self.side < 7:  # the way around would be the longer one
            return self.plain(x)
        taps, edges, bias = self._composed(self, self._compose)
        products = F.conv2d(x, taps).unflatten(1, (7, 7, -1))  # (B, 7, 7, C, g, g)
        products = products.permute(0, 3, 1, 4, 2, 5).flatten(4, 5).flatten(2, 3)
        level = self.shifted @ products @ self.shifted.T + bias
        for turn, kernels in enumerate(edges):  # each edge in turn becomes the upper one
            surplus = self._surplus(x.rot90(turn, (2, 3)), kernels, corner=1 - turn % 2)
            below = self.side - surplus.shape[2]
            level = level - F.pad(surplus, (0, 0, 0, below)).rot90(-turn, (2, 3))
        return level

    def _chain(self, x: Tensor) -> Tensor:
        out: Tensor = self.conv3(self.conv2(self.conv1(x)))
        return out

    def _compose(self) -> tuple[Tensor, list[list[Tensor]], Tensor]:
        """Taps (49 C, D, 1, 1), the kernels of `_surplus` for each edge, and biases (C, S, S)."""
        first, second, third = self.conv1.weight, self.conv2.weight, self.conv3.weight
        last_two = F.conv_transpose2d(third, second)  # as one, (C, D, 5, 5)
        kernel = F.conv_transpose2d(last_two, first)  # (C, D, 7, 7)
        taps = kernel.permute(2, 3, 0, 1).flatten(0, 2)[..., None, None].contiguous()
        edges = []
        for turn in range(4):
            one, two, three, four = (
                k.rot90(turn, (2, 3)) for k in (first, second, third, last_two)
            )
            rows = (one[:, :, 1:], one[:, :, 2:], two[:, :, 2:], three[:, :, :1])
            edges.append([k.contiguous() for k in (*rows, four[:, :, 1:2], four[:, :, :1])])
        # What the chain makes of zeros is constant but for the outer three pixels.
        zeros = self._chain(kernel.new_zeros(1, kernel.shape[1], 7, 7))[0]
        place = torch.arange(self.side, device=zeros.device)
        place = torch.minimum(place, (place - self.side + 7).clamp(min=3))
        return taps, edges, zeros[:, place][:, :, place]

    def _surplus(self, x: Tensor, kernels: Sequence[Tensor], corner: int) -> Tensor:
        """(B, C, 2, S): what the level's upper two rows owe to the row above it.

        There the first and the second convolution have values that the chain takes for 0.

        Args:
            x: (B, D, g, g).
            kernels: one or two rows each: of the first convolution for the level's upper row and
                for the row above it; of the second for the row above; of the third from there to
                the upper row; of the last two together from there to the upper and the second row.
            corner: 1 where the row above includes both corners; each belongs to one edge only.
        """
        first_inside, first, second, third, upper, lower = kernels
        rows = self.resize[:2] @ x @ self.resize.T  # (B, D, 2, S)
        above = F.conv2d(rows[:, :, :1], first, padding=(0, 1 + corner))
        inside = F.conv2d(rows, first_inside, padding=(0, 1))
        above_second = F.conv2d(inside, second, padding=(0, 1 + corner))
        of_second = F.conv2d(above_second, third, padding=(0, 1 - corner))
        of_first = [F.conv2d(above, kernel, padding=(0, 2 - corner)) for kernel in (upper, lower)]
        return torch.cat([of_first[0] + of_second, of_first[1]], dim=2)


def resize_matrix(grid: int, side: int) -> Tensor:
    """(S, g) float32: bilinear resize of one axis, corners aligned."""
    return axis_matrix(grid, lambda x: F.interpolate(x, side, mode="linear", align_corners=True))
