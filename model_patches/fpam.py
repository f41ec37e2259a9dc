"""F-PAM, the Feature and Pixel Alignment Module of LD-RPS, and its patch discriminators (section 3.2 of the paper)."""

from types import ModuleType

import torch
import torch.nn.functional as F
from torch import Tensor, nn

KNOTS = 21


class FPAM(nn.Module):
    """psi(x) = h2(h1(x)) + p * h1(x): learns what the degradation does to a decoded picture.

    Args:
        operations: the host's operations (comfy.ops); layers come uninitialised, call one of the `start_` methods.
        grid: rows and columns of p; 1 is the paper's one factor a channel, more let it vary smoothly over the picture.
        coarse: h2 works on means over cells of this many pixels; 1 is the paper's. Light and veils are smooth, and h2 is nearly all of
            the cost.
    """

    def __init__(self, operations: ModuleType, grid: int = 1, device: torch.device | None = None, coarse: int = 1) -> None:
        super().__init__()
        self.coarse = coarse
        self.h1_in = operations.Conv2d(3, 64, 3, padding=1, device=device)
        self.h1_out = operations.Conv2d(64, 3, 1, device=device)
        widths = (3, 64, 128, 256)
        self.h2 = nn.ModuleList(operations.Conv2d(a, b, 3, padding=1, device=device) for a, b in zip(widths, widths[1:]))
        self.h2_out = operations.Conv2d(256, 3, 1, device=device)
        self.p = nn.Parameter(torch.empty(1, 3, grid, grid, device=device))

    def forward(self, x: Tensor, window: tuple[int, int, int, int] | None = None) -> Tensor:
        """Map a restored picture to its degraded look.

        Args:
            x: (B, 3, H, W), 0..1, the whole picture or a crop of it.
            window: (top, left, full height, full width) of the crop within the picture; None for the whole picture.

        Returns:
            (B, 3, H, W), unclamped.
        """
        h1 = self.h1_out(F.leaky_relu(self.h1_in(x), 0.01))
        return self._offset(h1) + self._factor(x, window) * h1

    def _offset(self, h1: Tensor) -> Tensor:
        """h2(h1(x)), spread smoothly from its cells."""
        size = h1.shape[-2:]
        h2 = h1 if self.coarse == 1 else F.interpolate(h1, tuple(-(-side // self.coarse) for side in size), mode="area")
        for layer in self.h2:
            h2 = F.leaky_relu(layer(h2), 0.01)
        h2 = self.h2_out(h2)
        return h2 if self.coarse == 1 else F.interpolate(h2, size, mode="bilinear", align_corners=False)

    def _factor(self, x: Tensor, window: tuple[int, int, int, int] | None) -> Tensor:
        if self.p.shape[-1] == 1:
            return self.p
        top, left, height, width = window or (0, 0, *x.shape[-2:])
        return upsample_grid(self.p, height, width)[..., top:top + x.shape[-2], left:left + x.shape[-1]]

    @torch.no_grad()
    def start_random(self, generator: torch.Generator) -> None:
        """Kaiming normal weights, zero biases, p = 1, as published; psi is meaningless until it has been trained."""
        for layer in (self.h1_in, self.h1_out, *self.h2, self.h2_out):
            _kaiming(layer, generator)
        self.p.fill_(1)

    @torch.no_grad()
    def start_aligned(self, curve: Tensor, mix: Tensor, airlight: Tensor, transmission: Tensor, generator: torch.Generator) -> None:
        """Begin as a known degradation, in closed form: psi(x) = A + p * (mix @ curve(x) - A).

        The 64 units of h1 become knots of a piecewise linear tone curve, h2 starts as the constant A, p as the transmission.

        Args:
            curve: (n,) values of the tone curve at n even steps over 0..1.
            mix: (3, 3) colour matrix applied after the curve.
            airlight: (3,) A of atmospheric scattering.
            transmission: (g, g) on p's grid.
            generator: for the hidden layers of h2, whose output starts at zero.
        """
        for layer in self.h2:
            _kaiming(layer, generator)
        self.h2_out.weight.zero_()
        self.h2_out.bias.copy_(airlight)
        self.h1_in.weight.zero_()
        self.h1_in.bias.zero_()
        knots = torch.linspace(0, 1, KNOTS + 1)[:-1].to(curve)
        for channel in range(3):
            units = slice(channel * KNOTS, (channel + 1) * KNOTS)
            self.h1_in.weight[units, channel, 1, 1] = 1
            self.h1_in.bias[units] = -knots
        slopes, offset = _fit_knots(curve, knots)
        weight = torch.zeros_like(self.h1_out.weight)
        for channel in range(3):
            weight[:, channel * KNOTS:(channel + 1) * KNOTS, 0, 0] = mix[:, channel, None] * slopes
        self.h1_out.weight.copy_(weight)
        self.h1_out.bias.copy_(mix.sum(1) * offset - airlight)
        self.p.copy_(transmission.expand_as(self.p))


class PatchDiscriminator(nn.Module):
    """Probability, on a map of stride 8, that a patch is real. Used as D1 (degraded look) and D2 (residuals)."""

    def __init__(self, operations: ModuleType, device: torch.device | None = None) -> None:
        super().__init__()
        widths = (3, 64, 128, 256)
        self.layers = nn.ModuleList(operations.Conv2d(a, b, 3, stride=2, padding=1, device=device) for a, b in zip(widths, widths[1:]))
        self.out = operations.Conv2d(256, 1, 1, device=device)

    def forward(self, x: Tensor) -> Tensor:
        """Return (B, 1, ceil(H/8), ceil(W/8)) logits of (B, 3, H, W)."""
        for layer in self.layers:
            x = F.leaky_relu(layer(x), 0.01)
        return self.out(x)

    @torch.no_grad()
    def start_random(self, generator: torch.Generator) -> None:
        """Kaiming normal weights, zero biases."""
        for layer in (*self.layers, self.out):
            _kaiming(layer, generator)


def upsample_grid(grid: Tensor, height: int, width: int) -> Tensor:
    """Spread a coarse (B, C, g, g) map smoothly over (height, width)."""
    return F.interpolate(grid, (height, width), mode="bicubic", align_corners=False)


def _kaiming(layer: nn.Module, generator: torch.Generator) -> None:
    fan_in = layer.weight[0].numel()
    normal = torch.randn(layer.weight.shape, generator=generator)
    layer.weight.copy_(normal * (2 / (1 + 0.01**2) / fan_in) ** 0.5)
    layer.bias.zero_()


def _fit_knots(curve: Tensor, knots: Tensor) -> tuple[Tensor, Tensor]:
    """Least squares: curve(x) = sum_k slope_k * leaky(x - knot_k) + offset on 0..1; on the CPU, since some devices have no float64."""
    x = torch.linspace(0, 1, len(curve)).to(curve.dtype).double()
    units = F.leaky_relu(x[:, None] - knots.cpu().double(), 0.01)
    design = torch.cat([units, torch.ones_like(units[:, :1])], 1)
    ridge = 1e-8 * torch.eye(design.shape[1], dtype=design.dtype)
    solution = torch.linalg.solve(design.T @ design + ridge, design.T @ curve.cpu().double())
    return solution[:-1].to(curve), solution[-1].to(curve)
