"""The bridge objective (arXiv 2604.04924): from states between a degraded and a clean latent, the frozen model is to lead to the clean one.

For flow models the target is v* = (X_T - X0) + (1 - t) / T0 (Y - X0), for others eps* = X_T + (Y - X0) / ((1 + sigma) T0): in both
(x - X0) / sigma, at states x from samplers/bridge.py, which sampling walks too.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

import torch
from torch import Tensor

from ..model_patches.host import output_slope, unit_noise
from ..samplers.bridge import T0, Path, least_time
from .denoising import Denoising


@dataclass(frozen=True)
class BridgeObjective:
    """Settings, as they stand in the config of weights.

    Attributes:
        t0: where the bridge begins.
        skew: power of the uniform number that times are drawn with; above 1 there are more small ones.
        naive: for comparison: states are the degraded latent under noise, as if there were no bridge. The velocity that leads from there
            to the clean latent has no bound as t falls, so the error of the clean latent itself is learned from, weighted as at T0.
    """

    t0: float = T0
    skew: float = 1.0
    naive: bool = False

    @classmethod
    def of(cls, config: Mapping[str, Any]) -> "BridgeObjective":
        """Return the settings of a config, which may hold other things.

        Raises:
            ValueError: for values that make no sense.
        """
        found = cls(**{field.name: config[field.name] for field in fields(cls) if field.name in config})
        for name in ("t0", "skew"):
            value = getattr(found, name)
            if isinstance(value, bool) or not isinstance(value, (int, float)) or not 0 < value < 100:
                raise ValueError(f"{name} of the bridge is {value!r}; give a number above 0.")
        if not isinstance(found.naive, bool):
            raise ValueError(f"naive of the bridge is {found.naive!r}; give true or false.")
        return found

    def config(self) -> dict[str, Any]:
        """Return them as plain JSON."""
        return asdict(self)

    def path(self, model_sampling: Any) -> Path:
        """Return the bridge of a model.

        Raises:
            ValueError: for a T0 that the model's schedule does not reach.
        """
        return Path.of(model_sampling, self.t0)

    def draw(self, model_sampling: Any, generator: torch.Generator) -> Tensor:
        """Return a time between t_min and T0."""
        least = least_time(model_sampling, self.path(model_sampling))
        return least + (self.t0 - least) * torch.rand((), generator=generator) ** self.skew

    def loss(self, denoising: Denoising, clean: Tensor, degraded: Tensor, texts: Sequence[str],
             generators: Sequence[torch.Generator]) -> Tensor:
        """Return the mean square error of the model's own output.

        Args:
            denoising: the frozen model, with what learns on it.
            clean, degraded: (B, ...) X0 and Y as the model sees latents.
            texts: what it is told.
            generators: one a sample.
        """
        sampling = denoising.sampling
        path = self.path(sampling)
        times = torch.stack([self.draw(sampling, generator) for generator in generators]).to(clean)
        noise = torch.stack([torch.randn(row.shape, generator=generator).to(row) for row, generator in zip(clean, generators)])
        sigma = path.sigma(times)
        x = path.state(sigma.reshape(-1, *[1] * (clean.ndim - 1)), degraded if self.naive else clean, degraded, unit_noise(sampling, noise))
        error = denoising.error(x, sigma, clean, texts, {})
        if self.naive:
            start = torch.full_like(sigma, path.sigma(self.t0))
            error = error * output_slope(sampling, sigma, clean) / output_slope(sampling, start, clean)
        return error.square().mean()
