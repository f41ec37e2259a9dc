"""Statistics of a feature map by windows of the picture, and maps that cross-fade from window to window.

Pooled means, channel attention and routing (UniLDiff, arXiv 2507.23685, section 3) look at a whole picture as published. They learn on
small crops, and tiles of a large picture would each find other ones. By windows of about the crop's size, laid over the picture from its
top left corner, they see in use what they saw in training, and tiles that begin where windows begin agree.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor


class Windows:
    """Square windows over maps (B, C, h, w) of one size.

    The last row or column of windows may stick out; if less than half of it is filled, it shares the statistics of the one before.

    Args:
        side: of a window in cells of the map, even; 0 for one window over everything.
        size: (h, w) of the maps.
    """

    def __init__(self, side: int, size: tuple[int, int]) -> None:
        self.side, self.size = side, size
        self.rows, self.columns = (1, 1) if not side else (math.ceil(size[0] / side), math.ceil(size[1] / side))

    @property
    def whole(self) -> bool:
        """Whether there is one window only."""
        return self.rows == self.columns == 1

    def mean(self, x: Tensor) -> Tensor:
        """(B, C, h, w) -> (B, C, rows, columns)."""
        if self.whole:
            return x.mean((2, 3), keepdim=True)
        means = F.avg_pool2d(x, self.side, ceil_mode=True, count_include_pad=False)
        shares = self._filled(self.size[0], self.rows, x)[:, None] * self._filled(self.size[1], self.columns, x)
        return self._shared(means * shares, 2) / self._shared(shares[None, None], 2)

    def spread(self, means: Tensor) -> Tensor:
        """(B, C, rows, columns) -> (B, C, h, w), bilinear between the middles of windows; (B, C, 1, 1) of one window stays."""
        if self.whole:
            return means
        full = F.interpolate(means, (self.rows * self.side, self.columns * self.side), mode="bilinear", align_corners=False)
        return full[..., :self.size[0], :self.size[1]]

    def attention(self, q: Tensor, k: Tensor, heads: int, temperature: Tensor) -> Tensor:
        """Transposed attention: channels attend to channels, by their likeness over all places of a window.

        Args:
            q, k: (B, C, h, w).
            heads: groups of channels.
            temperature: (heads, 1, 1).

        Returns:
            (B, rows, columns, heads, C / heads, C / heads), rows sum to 1.
        """
        # Row by row: copies of a whole map would not stay in a processor's cache, and would be the most memory that a decode needs.
        found = [self._products(self._cut(q, heads, row), self._cut(k, heads, row)) for row in range(self.rows)]
        likeness, *squares = (self._shared(torch.stack(sums, 1), 1) for sums in zip(*found))
        lengths = [square.clamp_min(1e-6).sqrt() for square in squares]
        return (likeness / lengths[0].unsqueeze(-1) / lengths[1].unsqueeze(-2) * temperature).softmax(-1)

    def mix(self, matrices: Tensor, v: Tensor) -> Tensor:
        """Multiply the channels of v (B, C, h, w) with each window's matrices, cross-fading between the four nearest windows."""
        batch, rows, columns, heads, depth, _ = matrices.shape
        if self.whole:
            return (matrices[:, 0, 0] @ v.reshape(batch, heads, depth, -1)).reshape(v.shape)
        fade = (torch.arange(self.side, device=v.device, dtype=v.dtype) + 0.5) / self.side
        beside = [(1 - fade, matrices[:, :, _neighbours(columns, 0, v)]), (fade, matrices[:, :, _neighbours(columns, 1, v)])]
        strips = []
        for row in range(rows + 1):
            top = row * self.side - self.side // 2
            first, last = max(top, 0), min(top + self.side, self.size[0])
            if first < last:
                down = fade[first - top:last - top, None]
                corners = [(vertical * across, near[:, min(max(index, 0), rows - 1)])
                           for vertical, index in ((1 - down, row - 1), (down, row)) for across, near in beside]
                strips.append(self._mixed(corners, v[:, :, first:last]))
        return torch.cat(strips, 2)

    def _mixed(self, corners: list[tuple[Tensor, Tensor]], strip: Tensor) -> Tensor:
        """Mix a strip (B, C, h', w) between the middles of two rows of windows.

        Args:
            corners: four pairs of weights (h', side) and matrices (B, columns + 1, heads, C / heads, C / heads) of blocks of the strip.
            strip: part of a map.
        """
        half, (batch, columns, heads, depth, _) = self.side // 2, corners[0][1].shape
        height, width = strip.shape[2:]
        padded = F.pad(strip, (half, (columns - 1) * self.side - width + half))
        # Blocks whose corners are the middles of windows.
        blocks = padded.reshape(batch, heads, depth, height, columns, self.side).permute(0, 4, 1, 2, 3, 5).flatten(-2)
        mixed = torch.zeros_like(blocks)
        for weight, matrix in corners:
            mixed = torch.addcmul(mixed, matrix @ blocks, weight.flatten())
        restored = mixed.unflatten(-1, (height, self.side)).permute(0, 2, 3, 4, 1, 5).reshape(padded.shape)
        return restored[..., half:half + width]

    def _cut(self, x: Tensor, heads: int, row: int) -> Tensor:
        """(B, C, h, w) -> a row of windows (B, columns, heads, C / heads, places), zeros where a window sticks out at its right."""
        batch, channels = x.shape[:2]
        if self.whole:
            return x.reshape(batch, 1, heads, channels // heads, -1)
        strip = x[:, :, row * self.side:(row + 1) * self.side]
        strip = F.pad(strip, (0, self.columns * self.side - self.size[1]))
        return strip.reshape(batch, heads, channels // heads, -1, self.columns, self.side).permute(0, 4, 1, 2, 3, 5).flatten(-2)

    def _products(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return q k^T of (..., C, places) and the squared lengths of q and k, (..., C), divided by the places of a window."""
        scale = 1 / (math.sqrt(math.prod(self.size)) if self.whole else self.side)  # before sums, which would overflow in half precision
        q, k = q * scale, k * scale
        return q @ k.mT, *(torch.linalg.vector_norm(each, dim=-1).square() for each in (q, k))

    def _filled(self, length: int, count: int, like: Tensor) -> Tensor:
        """What part of each window in a row lies on the map; numbers of cells would be too large for half precision."""
        filled = torch.ones(count, device=like.device, dtype=like.dtype)
        filled[-1] = (length - (count - 1) * self.side) / self.side
        return filled

    def _shared(self, sums: Tensor, axis: int) -> Tensor:
        """Let slivers at the end have the sums of themselves and the window before; rows and columns are at `axis` and `axis` + 1."""
        for along, (length, count) in enumerate(zip(self.size, (self.rows, self.columns)), axis):
            if count > 1 and 2 * (length - (count - 1) * self.side) < self.side:
                both = sums.narrow(along, count - 2, 2).sum(along, keepdim=True)
                sums = torch.cat([sums.narrow(along, 0, count - 2), both, both], along)
        return sums


def _neighbours(count: int, after: int, like: Tensor) -> Tensor:
    """The window before (or after) each of count + 1 block edges, by number."""
    return (torch.arange(count + 1, device=like.device) - 1 + after).clamp(0, count - 1)
