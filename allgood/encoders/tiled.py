"""A large image read tile by tile: within the memory, and at the size a ViT was trained for.

Letters: B images, C channels, H W pixels, h w patches.
"""

from torch import Tensor, nn

from allgood.encoders.frozen import FrozenEncoder
from allgood.types import InputError


class TiledEncoder(nn.Module):
    """The feature levels of a whole image, computed on overlapping tiles.

    Detectors see one large grid of patches and know nothing of tiles. Each tile gives only what
    lies at least `margin` pixels from its cut edges, so that its zero padding is not felt at the
    seams.
    """

    def __init__(self, encoder: FrozenEncoder, tile: int, margin: int | None = None) -> None:
        """Read through `encoder`.

        Args:
            tile: side of a square tile in pixels, a multiple of the encoder's `multiple`.
            margin: pixels dropped at cut edges; None: an eighth of the tile, rounded to `multiple`.

        Raises:
            InputError: a tile or margin that the encoder's grid does not allow.
        """
        super().__init__()
        unit = encoder.multiple
        if tile % unit or tile < 3 * unit:  # a margin, what is kept, a margin
            raise InputError(
                f"tile must be a multiple of {unit} and at least {3 * unit}, got {tile}"
            )
        self.encoder = encoder
        self.tile = tile
        self.margin = max(1, round(tile / 8 / unit)) * unit if margin is None else margin
        if self.margin % unit or not 0 <= 2 * self.margin < tile:
            raise InputError(
                f"margin must be a multiple of {unit} below half a tile, got {self.margin}"
            )
        self.config, self.digest = encoder.config, encoder.digest
        self.levels, self.channels = encoder.levels, encoder.channels
        self.strides, self.multiple = encoder.strides, encoder.multiple

    def forward(self, image: Tensor) -> list[Tensor]:
        """As `FrozenEncoder.forward`; H and W must be multiples of `multiple`."""
        height, width = image.shape[-2:]
        if height <= self.tile and width <= self.tile:
            return self.encoder(image)
        if height % self.multiple or width % self.multiple:
            raise InputError(
                f"tiles need sides that are multiples of {self.multiple}, got {height} x {width}"
            )
        whole = [
            image.new_empty(len(image), channels, height // stride, width // stride)
            for channels, stride in zip(self.channels, self.strides, strict=True)
        ]
        for top, first_row, last_row in self._cuts(height):
            for left, first_column, last_column in self._cuts(width):
                tile = image[..., top : top + self.tile, left : left + self.tile]
                for target, level, stride in zip(
                    whole, self.encoder(tile), self.strides, strict=True
                ):
                    rows = slice(first_row // stride, last_row // stride)
                    columns = slice(first_column // stride, last_column // stride)
                    target[..., rows, columns] = level[
                        ...,
                        (first_row - top) // stride : (last_row - top) // stride,
                        (first_column - left) // stride : (last_column - left) // stride,
                    ]
        return whole

    def _cuts(self, length: int) -> list[tuple[int, int, int]]:
        """Per tile along one axis: where it begins, and the pixels [first, last) taken from it."""
        if length <= self.tile:
            return [(0, 0, length)]
        step = self.tile - 2 * self.margin
        begins = [*range(0, length - self.tile, step), length - self.tile]
        lasts = [begin + self.tile - self.margin for begin in begins[:-1]] + [length]
        return list(zip(begins, [0, *lasts[:-1]], lasts, strict=True))


Encoder = FrozenEncoder | TiledEncoder


def tiled(encoder: FrozenEncoder, tile: int | None) -> Encoder:
    """The encoder itself, or in tiles where a tile size is given."""
    return encoder if tile is None else TiledEncoder(encoder, tile)
