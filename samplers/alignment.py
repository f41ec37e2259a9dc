"""Training F-PAM during sampling, and the distance between a prediction and the degraded picture (LD-RPS, section 3.2 and supplement)."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model_patches.fpam import FPAM, PatchDiscriminator
from ..model_patches.host import run_operations
from ..model_patches.perceptual import Perceptual
from .first_guess import KnownDegradation

Window = tuple[int, int, int, int]


@dataclass(frozen=True)
class Alignment:
    """How F-PAM learns and what the posterior compares.

    Attributes:
        content: weight of MSE(psi(x), content of x) in F-PAM's loss.
        content_features: weight of the same in perceptual features.
        style: weight of BCE(D1(psi(x)), real), the look of the degraded picture.
        distance_features: weight of the perceptual distance to y, against 1 for the pixel distance.
        residual: weight of the type discriminator D2.
        rate: Adam's learning rate for F-PAM.
        style_rate, residual_rate: Adam's learning rates for D1 and D2.
        updates: F-PAM updates a guided step.
        warmup: updates before guidance begins in a run that starts below t1.
        crop: side of the crops F-PAM is trained on, in pixels.
        grid: rows and columns of F-PAM's factor p; 1 is the paper's.
        grey: psi begins as Rec.709 luma.
        coarse: h2 of F-PAM works on means over cells of this many pixels; 1 is the paper's.
        start: "aligned" begins at the degradation the quality prior implies, "random" as published.
    """

    content: float = 0.2
    content_features: float = 0.3
    style: float = 0.5
    distance_features: float = 2e-3
    residual: float = 5e-5
    rate: float = 1e-5
    style_rate: float = 4e-5
    residual_rate: float = 4e-5
    updates: int = 1
    warmup: int = 4
    crop: int = 96
    grid: int = 1
    grey: bool = False
    coarse: int = 4
    start: str = "aligned"


class AlignmentRun:
    """psi, D1, D2 and their optimisers for one picture of one run.

    Args:
        alignment: weights and rates.
        y: (1, 3, H, W) degraded picture in 0..1, a plain tensor.
        known: degradation to begin from.
        perceptual: feature distance.
        generator: source of initial weights and crops, on the CPU.
    """

    def __init__(self, alignment: Alignment, y: Tensor, known: KnownDegradation, perceptual: Perceptual, generator: torch.Generator) -> None:
        self.alignment, self.y, self.perceptual, self.generator = alignment, y, perceptual, generator
        self.updates = 0
        self.remembered: tuple[tuple[int, ...], Tensor] | None = None
        self.psi = FPAM(run_operations, alignment.grid, y.device, alignment.coarse)
        if alignment.start == "random":
            self.psi.start_random(generator)
        else:
            self.psi.start_aligned(known.curve, known.mix, known.airlight, known.transmission, generator)
        self.aligned = alignment.start != "random"
        self.known = FPAM(run_operations, alignment.grid, y.device, alignment.coarse).requires_grad_(False)
        self.known.load_state_dict(self.psi.state_dict())
        self.d1, self.d2 = PatchDiscriminator(run_operations, y.device), PatchDiscriminator(run_operations, y.device)
        for network in (self.d1, self.d2):
            network.start_random(generator)
        self.psi_optimizer = torch.optim.Adam(self.psi.parameters(), lr=alignment.rate, weight_decay=1e-5 if not self.aligned else 0.0)
        self.d1_optimizer = torch.optim.Adam(self.d1.parameters(), lr=alignment.style_rate)
        self.d2_optimizer = torch.optim.Adam(self.d2.parameters(), lr=alignment.residual_rate)

    def update(self, crop: Tensor, window: Window, late: bool) -> None:
        """One step of D1 and of F-PAM on decoded predictions.

        Args:
            crop: (N, 3, h, w) detached predictions of the clean picture; the companion's, if there is one, last.
            window: (top, left, full height, full width) of the crop within the picture.
            late: past t1, where an outsized feature term is damped to a fifth as published.
        """
        a = self.alignment
        fake = self.psi(crop, window)
        content = self._content(crop, window)
        loss = a.content * F.mse_loss(fake, content)
        if a.content_features > 0:
            features = a.content_features * self.perceptual(fake, content)
            loss = loss + (features * 0.2 if late and features > 10 else features)
        if a.style > 0:
            _discriminate(self.d1, self.d1_optimizer, fake.detach(), self._elsewhere(crop))
            loss = loss + a.style * _adversarial(self.d1, fake)
        self.psi_optimizer.zero_grad()
        loss.backward()
        self.psi_optimizer.step()
        self.updates += 1

    def distance(self, x: Tensor, window: Window, companion: Tensor | None, mask: Tensor | None) -> tuple[Tensor, Tensor]:
        """The paper's distance L between a prediction and the degraded picture, over a window of it.

        Args:
            x: (1, 3, h, w) prediction, with gradient.
            window: (top, left, full height, full width) of x within the picture.
            companion: (1, 3, h, w) second clean picture for D2, detached.
            mask: (1, 1, H, W), 1 where the picture is to be guided.

        Returns:
            (L as a mean over pixels, psi(x) where it counts).
        """
        a = self.alignment
        aligned = self.psi(x, window)
        target, seen = cut(self.y, window, x), aligned
        if mask is not None:
            here = cut(mask, window, x)
            target, seen = target * here, aligned * here
        loss = F.mse_loss(seen, target)
        if a.distance_features > 0:
            loss = loss + a.distance_features * self.perceptual.to_features(seen, self._target_features(target, window))
        if a.residual > 0:
            loss = loss + a.residual * self._residual(x, aligned, cut(self.y, window, x), companion, window)
        return loss, seen

    def _target_features(self, target: Tensor, window: Window) -> Tensor:
        """Perceptual features of a window of the degraded picture; kept for the last window, which for most pictures is the whole."""
        place = (*window, *target.shape)
        if self.remembered is None or self.remembered[0] != place:
            with torch.no_grad():
                self.remembered = place, self.perceptual.features(target)
        return self.remembered[1]

    def look(self, x: Tensor, window: Window, mask: Tensor | None) -> Tensor:
        """psi(x) where it counts, as `distance` returns it."""
        aligned = self.psi(x, window)
        return aligned if mask is None else aligned * cut(mask, window, x)

    def misfit(self, look: Tensor, window: Window, mask: Tensor | None) -> Tensor:
        """Sum of the squared differences between what `look` returned and the degraded picture."""
        target = cut(self.y, window, look)
        return (look - (target if mask is None else target * cut(mask, window, look))).square().sum()

    def _residual(self, x: Tensor, aligned: Tensor, y: Tensor, companion: Tensor | None, window: Window) -> Tensor:
        """D2 tells restored minus degraded from restored minus psi(restored)."""
        real = (x - aligned).detach()
        if companion is not None:
            with torch.no_grad():
                real = torch.cat([real, companion - self.psi(companion, window)])
        fake = x - y
        _discriminate(self.d2, self.d2_optimizer, fake.detach(), real)
        return _adversarial(self.d2, fake)

    def _content(self, crop: Tensor, window: Window) -> Tensor:
        """What psi(x) should keep: x itself as published, seen through the known degradation where there is one."""
        if not self.aligned:
            return crop
        with torch.no_grad():
            return self.known(crop, window)

    def _elsewhere(self, crop: Tensor) -> Tensor:
        """A random window of the degraded picture, as large as the crop: what D1 calls real."""
        top, left = (int(torch.randint(0, whole - part + 1, (), generator=self.generator)) for whole, part in zip(self.y.shape[-2:], crop.shape[-2:]))
        return cut(self.y, (top, left, *self.y.shape[-2:]), crop)


def cut(picture: Tensor, window: Window, like: Tensor) -> Tensor:
    """The part of a whole picture that a window names, as tall and wide as `like`."""
    top, left = window[:2]
    return picture[..., top:top + like.shape[-2], left:left + like.shape[-1]]


def _discriminate(network: PatchDiscriminator, optimizer: torch.optim.Optimizer, fake: Tensor, real: Tensor) -> None:
    """One Adam step of a discriminator on BCE."""
    optimizer.zero_grad()
    logits_fake, logits_real = network(fake), network(real)
    loss = F.binary_cross_entropy_with_logits(logits_fake, torch.zeros_like(logits_fake))
    loss = loss + F.binary_cross_entropy_with_logits(logits_real, torch.ones_like(logits_real))
    loss.backward()
    optimizer.step()


def _adversarial(network: PatchDiscriminator, fake: Tensor) -> Tensor:
    """BCE(D(fake), real), with the discriminator held still."""
    for p in network.parameters():
        p.requires_grad_(False)
    logits = network(fake)
    for p in network.parameters():
        p.requires_grad_(True)
    return F.binary_cross_entropy_with_logits(logits, torch.ones_like(logits))
