"""Two-stage posterior sampling (LD-RPS, section 3.3): predictions of the clean latent are moved towards what explains the degraded picture.

At every guided evaluation the predicted x0 is replaced by the minimiser, after a few conjugate gradient steps, of

    strength * N / (2 s^2) * (L(psi(D(x0)), y) + Q(D(x0)))  +  ||x0 - x0_predicted||^2 / (2 r^2)

with N values in the picture, s the noise of y, and r^2 the variance that the sigma leaves to x0. The first term is the paper's posterior,
read as a likelihood so that its weight has units; the second is what the prior still knows at this sigma. Step lengths come from a line
search, so nothing depends on the size of the latent, the decoder's scale or the batch.
"""

import logging
import zlib
from dataclasses import dataclass

import torch
from torch import Tensor

from ..model_patches.host import OUT_OF_MEMORY, interrupt_point, model_time, noise_to_signal, reraise_unless_out_of_memory, signal_level
from ..model_patches.host_gradients import gradients
from ..model_patches.host_vae import LatentEncoder, PixelDecoder
from ..model_patches.perceptual import Perceptual
from .alignment import Alignment, AlignmentRun, Window, cut
from .first_guess import known_degradation
from .quality import Quality, quality_loss

log = logging.getLogger(__name__)
NODE = "Apply Posterior Guidance"
# How far psi of a perfect restoration may still lie from y besides noise: half of it sets how hard clean parts are pulled.
MISFIT = 0.02
# Q's part in the slope of a step from which its bend is looked after, and how often such a step is halved at most.
SHARE, HALVINGS = 0.1, 8
LEAST_TILE = 16
HALO = 8
# (top, bottom, left, right) in cells of a latent.
Region = tuple[int, int, int, int]


@dataclass(frozen=True)
class Posterior:
    """Settings of the guidance.

    Attributes:
        strength: weight of the likelihood; 0 leaves the model alone.
        guide_below: t1, the model time (0..1) under which x0 is moved; above it only F-PAM learns.
        steps: conjugate gradient steps at each guided evaluation.
        every: guide every k-th step of the schedule and repeat the last correction in between.
        noise: deviation of the noise in the degraded picture, 0..1; 0 measures it.
        companion: sample a second, unguided picture alongside that shows F-PAM clean statistics.
        through_model: take the gradient through the denoiser instead of treating its prediction as a constant.
        published: step x by a fixed multiple of the gradient of mean losses, as the reference does, instead of solving.
        published_scale: that multiple, for a 64x64 latent.
        tile: side in latent pixels above which the decoder works on tiles.
    """

    strength: float = 1.0
    guide_below: float = 0.7
    steps: int = 2
    every: int = 1
    noise: float = 0.0
    companion: bool = False
    through_model: bool = False
    published: bool = False
    published_scale: float = 40000.0
    tile: int = 96


@dataclass
class Row:
    """One picture of the batch: its degraded look, mask, F-PAM and last correction."""

    y: Tensor
    mask: Tensor | None
    noise: float
    alignment: AlignmentRun
    correction: Tensor | None = None
    correction_variance: float = 0.0


@dataclass(frozen=True)
class Seen:
    """A tile of what the likelihood was taken at.

    Attributes:
        look: psi of it.
        lacks: (1, 3, H, W), or 0: what is missing from the tile when it is decoded alone.
        x: (1, 3, H, W), the tile itself, 0..1.
        misfit: sum of the squared differences between psi and the degraded picture.
    """

    look: Tensor
    lacks: Tensor | float
    x: Tensor
    misfit: Tensor


@dataclass
class Counters:
    """Work done by a run, for benchmarks."""

    decodes: int = 0
    decoder_backwards: int = 0
    updates: int = 0


class PosteriorRun:
    """All state of one sampling run under posterior guidance.

    Args:
        settings: of the guidance.
        alignment: of F-PAM.
        quality: constraints, or None.
        y: (B, 3, H, W) degraded pictures in 0..1, plain tensors on the VAE's device.
        mask: (B, 1, H, W) or None.
        decoder, encoder: of the VAE.
        vgg: VGG16 tensors or None.
        model_sampling: the host's.
        sigmas: whole schedule.
        seed: of the run.
        noise: (B, ...) initial noise; its bytes tell the pictures of a batch apart, so that a picture restored alone behaves the same.
    """

    def __init__(self, settings: Posterior, alignment: Alignment, quality: Quality | None, y: Tensor, mask: Tensor | None, decoder: PixelDecoder,
                 encoder: LatentEncoder, vgg: dict[str, Tensor] | None, model_sampling: object, sigmas: Tensor, seed: int, noise: Tensor) -> None:
        self.settings, self.quality, self.decoder = settings, quality, decoder
        self.model_sampling = model_sampling
        self.tile, self.whole_fits = settings.tile, True
        self.counters = Counters()
        self.started = False
        self.sigmas = [float(sigma) for sigma in sigmas]
        _warn_if_idle(quality, [model_time(model_sampling, sigma) for sigma in self.sigmas[:-1]])
        decoder.prepare()
        perceptual = Perceptual(encoder, vgg)
        self.rows = []
        for index in range(len(y)):
            picture = y[index:index + 1]
            generator = torch.Generator().manual_seed(row_seed(seed, noise[index]))
            known = known_degradation(picture, quality, alignment.grid, alignment.grey)
            # Coarse grain says less than as many pixels of white noise would: its values are not independent.
            level = (settings.noise or known.grain.deviation * known.grain.size) + MISFIT
            run = AlignmentRun(alignment, picture, known, perceptual, generator)
            self.rows.append(Row(picture, None if mask is None else mask[index:index + 1], level, run))

    def follow(self, sigmas: list[float]) -> None:
        """Take the schedule of a pass; what was found in another pass is not repeated in this one."""
        if sigmas == self.sigmas:
            return
        self.sigmas = sigmas
        for row in self.rows:
            row.correction = None

    def guide(self, x0: Tensor, sigma: float) -> Tensor:
        """Move the predictions of one evaluation.

        Args:
            x0: (B, C, h, w) or with one frame, the model's predictions; companions follow after the first B.
            sigma: of the evaluation.

        Returns:
            The tensor that the sampler shall take for the prediction.
        """
        time = model_time(self.model_sampling, sigma)
        batch = len(self.rows)
        with gradients():
            parts = list(x0.clone().split(1))
            for index, row in enumerate(self.rows):
                companion = parts[batch + index] if len(parts) > batch else None
                self._learn(row, parts[index], companion, time)
                if time < self.settings.guide_below:
                    parts[index] = self._move(row, parts[index], companion, sigma, time)
            self.started = True
            return torch.cat(parts)

    def gradient(self, x0: Tensor, sigma: float) -> Tensor:
        """Gradient of the likelihood term at the predictions once F-PAM has learned, for `through_model`; zero above t1 and for companions."""
        time = model_time(self.model_sampling, sigma)
        g = torch.zeros_like(x0)
        for index, row in enumerate(self.rows):
            z0 = x0[index:index + 1].detach().clone()
            self._learn(row, z0, None, time)
            if time < self.settings.guide_below:
                g[index:index + 1] = self._with_smaller_tiles(self._likelihood, row, z0, None, time)[0]
        self.started = True
        return g

    def descend(self, x0: Tensor, g: Tensor, direction: Tensor, sigma: float) -> Tensor:
        """Take the line-searched step of every picture along `direction`, given the likelihood's gradient g at x0."""
        time = model_time(self.model_sampling, sigma)
        with gradients():
            parts, slopes, ways = (list(t.clone().split(1)) for t in (x0, g, direction))
            for index, row in enumerate(self.rows):
                if time < self.settings.guide_below:
                    if not self._usable(ways[index]):
                        continue
                    z0 = parts[index]
                    step = self._step_length(row, z0, z0, slopes[index], ways[index], self._variance(sigma), None, time)
                    parts[index] = parts[index] + step.clamp(max=1.0) * ways[index]
            return torch.cat(parts)

    def _learn(self, row: Row, z0: Tensor, companion: Tensor | None, time: float) -> None:
        """Train F-PAM on crops of the predictions; a run that starts below t1 first catches up."""
        late = time < self.settings.guide_below
        a = row.alignment.alignment
        updates = a.warmup if late and not self.started else a.updates
        z = z0 if companion is None else torch.cat([z0, companion])
        whole = self._whole(z) if updates else None
        for _ in range(updates):
            interrupt_point()
            try:
                crop, window = self._decoded_crop(row, z, whole)
                row.alignment.update(crop, window, late)
            except OUT_OF_MEMORY as error:
                reraise_unless_out_of_memory(error)
                raise MemoryError(f"{NODE}: F-PAM does not fit in memory as it learns. Lower 'crop' in F-PAM Alignment, or use a lighter 'vae'.") from error
            self.counters.updates += 1

    def _decoded_crop(self, row: Row, z: Tensor, whole: Tensor | None) -> tuple[Tensor, Window]:
        cell = self.decoder.cell
        rows, columns = z.shape[-2:]
        side = max(1, row.alignment.alignment.crop // cell)
        tall, wide = min(side, rows), min(side, columns)
        top, left = (int(torch.randint(0, limit + 1, (), generator=row.alignment.generator)) for limit in (rows - tall, columns - wide))
        region = (top, top + tall, left, left + wide)
        if whole is not None:
            return self._part(whole, region)
        with torch.no_grad():
            crop, window = self._decode_window(z, region)
        self.counters.decodes += 1
        return crop.detach(), window

    def _move(self, row: Row, z0: Tensor, companion: Tensor | None, sigma: float, time: float) -> Tensor:
        variance = self._variance(sigma)
        index = min(range(len(self.sigmas)), key=lambda i: abs(self.sigmas[i] - sigma))
        if row.correction is not None and index % self.settings.every:
            return z0 + row.correction * min(1.0, variance / row.correction_variance)
        if self.settings.published:
            moved = self._published_step(row, z0, companion, sigma, index, time)
        else:
            moved = self._solve(row, z0, companion, variance, time)
        row.correction, row.correction_variance = moved - z0, variance
        return moved

    def _solve(self, row: Row, z0: Tensor, companion: Tensor | None, variance: float, time: float) -> Tensor:
        """Nonlinear conjugate gradients (Polak-Ribiere) with a Gauss-Newton line search."""
        z, direction, before = z0, None, None
        for _ in range(self.settings.steps):
            interrupt_point()
            likelihood, seen = self._with_smaller_tiles(self._likelihood, row, z, companion, time)
            g = likelihood + (z - z0) / variance
            if not self._usable(g):
                break
            if direction is None:
                direction = -g
            else:
                beta = ((g * (g - before)).sum() / before.square().sum().clamp(min=1e-30)).clamp(min=0)
                direction = -g + beta * direction
            step = self._step_length(row, z0, z, g, direction, variance, seen, time)
            if not step > 0:
                break
            z, before = z + step * direction, g
        return z

    def _usable(self, g: Tensor) -> bool:
        """Tell whether a gradient is finite; half precision can end that, and one bad value would spoil the whole picture."""
        finite = bool(torch.isfinite(g).all())
        if not finite:
            log.warning("%s: a gradient is not finite, and this step goes without it. If this comes often, run the VAE in a higher precision "
                        "(start ComfyUI with --fp32-vae)%s.", NODE, " or set 'gradient' to 'prediction'" if self.settings.through_model else "")
        return finite

    def _step_length(self, row: Row, z0: Tensor, z: Tensor, g: Tensor, direction: Tensor, variance: float, seen: list[Seen] | None,
                     time: float) -> Tensor:
        """Minimum of the quadratic model along a direction: the likelihood's curvature from one more decode, the prior's known."""
        size = direction.square().mean().sqrt()
        if size == 0 or not torch.isfinite(size):
            return z.new_zeros(())
        probe = 0.1 * variance**0.5 / size
        with torch.no_grad():
            here, there = self._with_smaller_tiles(self._both_looks, row, z, z + probe * direction, seen)
            change = sum((a.look - b.look).square().sum() for a, b in zip(here, there))
            slope, curvature = (g * direction).sum(), self._weight(row) * change / probe**2 + direction.square().sum() / variance
            step = torch.nan_to_num(-slope / curvature, nan=0.0).clamp(min=0)
            fall = self._weight(row) / 2 * (self._quality_of(row, z, here, time) - self._quality_of(row, z, there, time)) / probe
            if abs(fall) > -SHARE * slope:
                step = self._with_smaller_tiles(self._falling, row, z0, z, direction, step, variance, time)
        return step

    def _falling(self, row: Row, z0: Tensor, z: Tensor, direction: Tensor, step: Tensor, variance: float, time: float) -> Tensor:
        """Halve a step until the objective is lower behind it than before: how Q bends along it is not in the quadratic model."""

        def objective(z: Tensor) -> Tensor:
            looks = self._looks(row, z, [0.0] * len(self._regions(z)))
            likelihood = sum(look.misfit for look in looks) + self._quality_of(row, z, looks, time)
            return self._weight(row) / 2 * likelihood + (z - z0).square().sum() / (2 * variance)

        before = objective(z)
        for _ in range(HALVINGS):
            if objective(z + step * direction) <= before:
                return step
            step = step / 2
        return torch.zeros_like(step)

    def _quality_of(self, row: Row, z: Tensor, looks: list[Seen], time: float) -> Tensor | float:
        """Q of what was seen, as a sum over pixels; outside the mask too."""
        if self.quality is None or not self.quality.active(time):
            return 0.0
        x = _assembled([look.x for look in looks], self._regions(z))
        return x.numel() * quality_loss(x, self.quality, time)

    def _published_step(self, row: Row, z0: Tensor, companion: Tensor | None, sigma: float, index: int, time: float) -> Tensor:
        """x_next -= s * dL/dx0 on the papers' variance preserving state, as the change of x0 that gives it under Euler or DDIM."""
        g, _ = self._with_smaller_tiles(self._likelihood, row, z0, companion, time)
        if not self._usable(g):
            return z0
        mean_gradient = g / (self._weight(row) * row.y.numel() / 2)
        following = self.sigmas[index + 1] if index + 1 < len(self.sigmas) else 0.0
        scale = self.settings.published_scale * (z0.shape[-1] * z0.shape[-2] / 4096)
        preserved = signal_level(self.model_sampling, following) * (1 + noise_to_signal(self.model_sampling, following) ** 2) ** 0.5
        return z0 - self.settings.strength * scale * preserved * mean_gradient / max(1 - following / max(sigma, 1e-6), 1e-3)

    def _likelihood(self, row: Row, z: Tensor, companion: Tensor | None, time: float) -> tuple[Tensor, list[Seen]]:
        """Gradient of strength * N / (2 s^2) * (L + Q), and what it is taken at."""
        g, seen, regions, whole = torch.zeros_like(z), [], self._regions(z), self._whole(z)
        slope = self._quality_slope(z, regions, whole, time) if len(regions) > 1 else None
        for region in regions:
            leaf = z.detach().clone().requires_grad_(True)
            x, window = self._decode_window(leaf, region)
            lacks = 0.0 if whole is None else self._part(whole, region)[0] - x.detach()
            x = x + lacks
            other = None
            if companion is not None and row.alignment.alignment.residual > 0:
                with torch.no_grad():
                    other = self._decode_window(companion, region)[0]
            if row.mask is not None:
                # Outside the mask the picture is looked at, by Q and D2 too, but not moved.
                x = torch.lerp(x.detach(), x, cut(row.mask, window, x))
            loss, look = row.alignment.distance(x, window, other, row.mask)
            if self.quality is not None and len(regions) == 1:
                loss = loss + quality_loss(x, self.quality, time)
            loss = loss * (x.numel() / 2)
            if slope is not None:
                loss = loss + (x * cut(slope, window, x)).sum() * (slope.numel() / 2)
            # Weighted after the backward pass, so that its gradients fit the decoder's precision.
            part, = torch.autograd.grad(loss, leaf)
            g += self._weight(row) * part
            look = look.detach()
            seen.append(Seen(look, lacks, x.detach(), row.alignment.misfit(look, window, row.mask)))
            self.counters.decodes += 1
            self.counters.decoder_backwards += 1
        return g, seen

    def _quality_slope(self, z: Tensor, regions: list[Region], whole: Tensor | None, time: float) -> Tensor | None:
        """Gradient of Q at the whole picture (1, 3, H, W), whose tiles may each be of one colour or light; None where nothing is active."""
        if self.quality is None or not self.quality.active(time):
            return None
        if whole is None:
            with torch.no_grad():
                tiles = [self._decode_window(z, region)[0] for region in regions]
            self.counters.decodes += len(tiles)
            whole = _assembled(tiles, regions)
        leaf = whole.clone().requires_grad_(True)
        return torch.autograd.grad(quality_loss(leaf, self.quality, time), leaf)[0]

    def _whole(self, z: Tensor) -> Tensor | None:
        """Decode (B, C, h, w) at once and without gradients, where there are tiles and it fits: what tiles are to look like.

        Decoders normalise and attend over all they are shown, so that a tile alone comes out in other colours than as a part of the picture.
        Values are therefore those of the whole, and only the backward pass goes tile by tile.
        """
        if len(self._regions(z)) == 1 or not self.whole_fits or not self.decoder.fits(z):
            return None
        try:
            with torch.no_grad():
                whole = self.decoder(z)
        except OUT_OF_MEMORY as error:
            reraise_unless_out_of_memory(error)
            self.whole_fits = False
            return None
        self.counters.decodes += 1
        return whole

    def _looks(self, row: Row, z: Tensor, lacks: list[Tensor | float]) -> list[Seen]:
        looks = []
        for region, lack in zip(self._regions(z), lacks):
            x, window = self._decode_window(z, region)
            x = x + lack
            look = row.alignment.look(x, window, row.mask)
            looks.append(Seen(look, lack, x, row.alignment.misfit(look, window, row.mask)))
            self.counters.decodes += 1
        return looks

    def _both_looks(self, row: Row, z: Tensor, moved: Tensor, seen: list[Seen] | None) -> tuple[list[Seen], list[Seen]]:
        """Look at two latents; what was seen at the first is of use while tiles are what they were."""
        count = len(self._regions(z))
        here = seen if seen is not None and len(seen) == count else self._looks(row, z, [0.0] * count)
        return here, self._looks(row, moved, [each.lacks for each in here])

    def _weight(self, row: Row) -> float:
        return self.settings.strength / row.noise**2

    def _variance(self, sigma: float) -> float:
        """Variance left to a latent of unit deviation once x is known."""
        ratio = max(noise_to_signal(self.model_sampling, sigma), 1e-3) ** 2
        return ratio / (1 + ratio)

    def _regions(self, z: Tensor) -> list[Region]:
        """Cover a latent with (top, bottom, left, right) regions of at most a tile, even in size."""
        spans = []
        for side in z.shape[-2:]:
            count = -(-side // self.tile)
            edges = [round(i * side / count) for i in range(count + 1)]
            spans.append(list(zip(edges, edges[1:])))
        return [(top, bottom, left, right) for top, bottom in spans[0] for left, right in spans[1]]

    def _decode_window(self, z: Tensor, region: Region) -> tuple[Tensor, Window]:
        """Decode a region of a latent with a halo around it, so that the decoder sees its neighbours and no seam can form."""
        top, bottom, left, right = region
        rows, columns = z.shape[-2:]
        outer_top, outer_left = max(0, top - HALO), max(0, left - HALO)
        x = self.decoder(z[..., outer_top:min(rows, bottom + HALO), outer_left:min(columns, right + HALO)])
        cell = self.decoder.cell
        inner = x[..., (top - outer_top) * cell:(bottom - outer_top) * cell, (left - outer_left) * cell:(right - outer_left) * cell]
        return inner, (top * cell, left * cell, rows * cell, columns * cell)

    def _part(self, whole: Tensor, region: Region) -> tuple[Tensor, Window]:
        """The same region of a picture that is decoded already."""
        top, bottom, left, right = (edge * self.decoder.cell for edge in region)
        return whole[..., top:bottom, left:right], (top, left, *whole.shape[-2:])

    def _with_smaller_tiles(self, work, *arguments):  # noqa: ANN001 - passes through whatever `work` takes and gives
        """Retry with halved tiles when the device runs out of memory."""
        while True:
            try:
                return work(*arguments)
            except OUT_OF_MEMORY as error:
                reraise_unless_out_of_memory(error)
                if self.tile <= LEAST_TILE:
                    raise MemoryError(f"{NODE}: the decoder's backward pass does not fit in memory even on the smallest tiles; "
                                      "use a smaller picture for 'degraded' (and the latent), or a lighter 'vae'.") from error
            self.tile = max(LEAST_TILE, self.tile // 2)


def _warn_if_idle(quality: Quality | None, times: list[float]) -> None:
    """Say so if a constraint acts below all steps of a schedule, as flow models' schedules end high."""
    for name in ("exposure", "chroma", "clarity") if quality is not None and times else ():
        below = getattr(quality, f"{name}_below")
        if getattr(quality, name) > 0 and min(times) >= below:
            log.warning("%s: '%s' of Quality Prior does nothing while sampling: it acts below timestep %.0f, and the last step is at %.0f. Raise "
                        "'%s_below', or take more steps.", NODE, name, 1000 * below, 1000 * min(times), name)


def _assembled(tiles: list[Tensor], regions: list[Region]) -> Tensor:
    """Put tiles (1, 3, h, w) of a grid of regions together, row after row."""
    columns = len({left for _, _, left, _ in regions})
    return torch.cat([torch.cat(tiles[first:first + columns], -1) for first in range(0, len(tiles), columns)], -2)


def row_seed(seed: int, noise: Tensor) -> int:
    """A seed for one picture of a batch that it would also have if it were sampled alone."""
    return (int(seed) * 1_000_003 + zlib.crc32(noise.detach().float().cpu().contiguous().numpy().tobytes())) % 2**63
