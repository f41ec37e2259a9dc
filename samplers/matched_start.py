"""Where sampling may begin from a picture that is noisy already: at the sigma whose noise the picture brings along.

Noise on top of noise hides what is left of a picture a second time. A latent that carries noise of deviation s beside a signal of unit
deviation is what a model sees at noise-to-signal ratio s, so the schedule can start there; a picture with less gets what is missing.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ..model_patches.framing import pad_to
from ..model_patches.host import initial_noise, is_flow
from ..model_patches.host_vae import encode_pictures
from .bridge import Path
from .grain import grain_like, grain_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

LEAST_PROBE = 2 / 255
# Not a seed that anybody would make grain with: the same grain twice over would count double.
PROBE_SEED = 0x6D656E64


def latent_noise(patcher: "ModelPatcher", vae: "VAE", picture: Tensor) -> float:
    """Deviation of the noise in a picture's latent, in the model's space: measured by adding as much grain again and encoding both.

    Args:
        patcher: of the model, for the space of its latents.
        vae: encodes.
        picture: (1, H, W, 3) in 0..1.
    """
    cell = vae.spacial_compression_encode()
    picture = pad_to(picture.cpu().float(), tuple(-(-side // cell) * cell for side in picture.shape[1:3]))
    grain = grain_of(picture.movedim(-1, 1))
    probe = max(grain.deviation, LEAST_PROBE)
    noisy = picture + probe * grain_like(grain, picture.shape, torch.Generator().manual_seed(PROBE_SEED))
    change = encode_pictures(vae, patcher.model, noisy) - encode_pictures(vae, patcher.model, picture)
    return float(change.detach().std(unbiased=False)) * grain.deviation / probe


@dataclass(frozen=True)
class MatchedStart:
    """A noise level to start from, and what pictures lack to be that noisy. It is the NOISE of the host's samplers.

    Attributes:
        seed: of the noise that is added.
        found: deviation of the noise in the latent of each picture; a larger batch of latents goes through them in turn, a video takes
            them for its frames.
        start: noise-to-signal ratio at which the schedule begins.
    """

    seed: int
    found: tuple[float, ...]
    start: float

    @classmethod
    def of(cls, found: list[float], at_least: float, seed: int) -> "MatchedStart":
        """Start at the noise of the noisiest picture, and at no less than a share of noise, 0..1, in the mixture of noise and picture."""
        return cls(seed, tuple(found), max(*found, at_least / (1 - at_least)))

    @property
    def share(self) -> float:
        """The share of noise in the mixture at the start, 0..1: the time t of a flow."""
        return self.start / (1 + self.start)

    def generate_noise(self, latent: dict[str, Any]) -> Tensor:
        """Return noise for the latents of a LATENT that brings all of them to the start: variances add up to that of the schedule."""
        noise = initial_noise(latent, self.seed)
        if not noise.is_nested:
            return self._missing(noise, latent.get("batch_index"))
        # Only the picture was measured: sound brings no noise.
        picture, *others = noise.unbind()
        return type(noise)([self._missing(picture, latent.get("batch_index")), *others])

    def _missing(self, noise: Tensor, places: list[int] | None) -> Tensor:
        missing = [max(0.0, 1 - (found / self.start) ** 2) ** 0.5 for found in self._found_in(noise, places)]
        return noise * torch.tensor(missing).to(noise).view(-1, *[1] * (noise.ndim - 1))

    def _found_in(self, noise: Tensor, places: list[int] | None) -> list[float]:
        """Noise of each latent; `places` are theirs in the batch that they were taken from, which may be that of the pictures."""
        if noise.ndim == 5 and noise.shape[2] > 1:
            return [sum(self.found) / len(self.found)] * len(noise)
        if places is None or len(self.found) == len(noise):
            places = range(len(noise))
        return [self.found[place % len(self.found)] for place in places]

    def sigmas(self, model_sampling: Any, steps: int) -> Tensor:
        """Return (steps + 1,) sigmas from the start down to 0, even in the share that noise has in the mixture."""
        times = torch.linspace(self.share, 0.0, steps + 1, dtype=torch.float64)
        return Path(1.0, is_flow(model_sampling)).sigma(times).float()
