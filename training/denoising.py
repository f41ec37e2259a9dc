"""Denoising objectives: the user's frozen model is shown noised latents, and what it says of them is compared with what is true."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn
from torch.amp import autocast

from ..model_patches.diffusion_adapter import DiffusionAdapter
from ..model_patches.fine_tune import FineTune
from ..model_patches.host import (
    batched_conds,
    evaluate,
    is_flow,
    keep_loaded_for_training,
    loaded_for_training,
    make_room,
    model_conds,
    output_slope,
)
from ..model_patches.host_gradients import unshared_norm_inputs
from ..model_patches.host_vae import BACKWARD_FACTOR, encode_pictures
from .trainee import Models

SMALLEST_FLOW_TIME = 1e-3
# Share of a flow's times that are uniform; share of the samples with more noise than signal that show noise alone, as sampling starts.
EVEN, ALONE = 0.5, 0.5


class Denoising:
    """A frozen model and the texts it is told, for as long as something is trained on it.

    Args:
        models: MODEL; CLIP, unless all texts are empty conditioning; VAE for `encode` and `decode`.
        patched: the model with the trainee's patches, loaded for training.
    """

    def __init__(self, models: Models, patched: Any) -> None:
        self.models, self.patched = models, patched
        self.sampling = patched.get_model_object("model_sampling")
        self.encoded: dict[str, list] = {}
        self.room = 0.0
        loaded_for_training(patched)
        self.loaded = patched.loaded_size()

    def conditioning(self, text: str) -> list:
        """Return the CONDITIONING of a text; each distinct text is encoded once."""
        if text not in self.encoded:
            clip = self.models.clip
            with torch.no_grad(), self._full_precision():
                self.encoded[text] = clip.encode_from_tokens_scheduled(clip.tokenize(text))
        return self.encoded[text]

    @contextmanager
    def learning(self, network: nn.Module | None, change: DiffusionAdapter | FineTune | None = None) -> Iterator[None]:
        """Have a network learn on the model for as long as the context is open, on its device, and a LoRA or a fine-tune in its layers."""
        for part in (network, change):
            if part is not None:
                part.to(self.patched.load_device)
        with nullcontext() if change is None else change.hooked(self.patched.model), unshared_norm_inputs(self.patched.model.diffusion_model):
            yield

    def encode(self, pictures: Tensor) -> Tensor:
        """Return the latents of pictures (B, H, W, 3) in 0..1 as the model sees them."""
        with torch.no_grad(), self._full_precision():
            return encode_pictures(self.models.vae, self.models.model.model, pictures).to(self.patched.load_device)

    def decode(self, latents: Tensor, like: Tensor) -> Tensor:
        """Return the pictures in 0..1 of latents as a sampler returns them, shaped like pictures (B, H, W, 3)."""
        return self.models.vae.decode(latents).reshape(-1, *like.shape[1:]).clamp(0, 1).cpu()

    def x0(self, x: Tensor, sigma: Tensor, texts: Sequence[str], extra: dict[str, Tensor]) -> Tensor:
        """Return the clean latents the model predicts.

        Args:
            x: (B, ...) noised latents, as samplers hold them.
            sigma: (B,).
            texts: B of them.
            extra: further arguments of the model, B rows each.
        """
        rows = [model_conds(self.patched.model, self.conditioning(text), x[:1]) for text in texts]
        self._make_room(x.shape)
        keep_loaded_for_training(self.patched, self.loaded)
        together = batched_conds(rows)
        if together is not None:
            return evaluate(self.patched, x, sigma, together | extra)
        parts = []
        for i, row in enumerate(rows):
            own = batched_conds([row]) | {name: value[i:i + 1] for name, value in extra.items()}
            parts.append(evaluate(self.patched, x[i:i + 1], sigma[i:i + 1], own))
        return torch.cat(parts)

    def _full_precision(self) -> autocast:
        """What is computed once and kept must not depend on whether validation or a step of training asked for it first."""
        return autocast(self.patched.load_device.type, enabled=False)

    def _make_room(self, shape: torch.Size) -> None:
        """Have the host give way to a step on latents of this shape: it knows nothing of gradients, and keeps text encoders where they are."""
        size = BACKWARD_FACTOR * self.patched.model.memory_required(list(shape))
        if size > self.room:
            make_room(self.patched.load_device, size, self.patched)
            self.room = size

    def loss(self, z0: Tensor, texts: Sequence[str], generators: Sequence[torch.Generator], extra: dict[str, Tensor],
             absolute: bool = False, weights: Tensor | None = None) -> Tensor:
        """Return the mean square error of the model's own output (eps, v or velocity), at noise levels drawn as its family is trained.

        Args:
            z0: (B, ...) clean latents as the model sees them.
            generators: one a sample.
            absolute: mean absolute error instead.
            weights: (B,) how much each sample counts; None for all alike.
        """
        sigma = torch.stack([self.draw_sigma(generator) for generator in generators]).to(z0)
        error = self.error(self.noised(z0, sigma, generators), sigma, z0, texts, extra)
        each = error.abs() if absolute else error.square()
        return each.mean() if weights is None else (each.flatten(1).mean(1) * weights.to(each)).mean()

    def noised(self, z0: Tensor, sigma: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return what the model sees at noise levels (B,): z0 (B, ...) under noise from the generators."""
        noise = torch.stack([torch.randn(row.shape, generator=generator).to(row) for row, generator in zip(z0, generators)])
        return self.sampling.noise_scaling(sigma.reshape(-1, *[1] * (z0.ndim - 1)), noise, z0)

    def error(self, x: Tensor, sigma: Tensor, z0: Tensor, texts: Sequence[str], extra: dict[str, Tensor]) -> Tensor:
        """Return how far the model's own output for x (B, ...) at sigma (B,) is from the one that leads to the clean latents z0."""
        return (self.x0(x, sigma, texts, extra) - z0) / output_slope(self.sampling, sigma, z0)

    def draw_flow_time(self, generator: torch.Generator) -> Tensor:
        """Logit-normal (arXiv 2403.03206)."""
        return torch.sigmoid(torch.randn((), generator=generator))

    def draw_sigma(self, generator: torch.Generator) -> Tensor:
        """Uniform timesteps of the discrete schedule, or times of a flow under the model's own shift."""
        if is_flow(self.sampling):
            time = self.draw_flow_time(generator).clamp(SMALLEST_FLOW_TIME, 1)
        else:
            time = torch.randint(0, 1000, (), generator=generator) / 999
        # At both ends the host answers with what no schedule reaches: 0, where noise and loss have no size, and 999999999.9.
        sigma = torch.tensor(float(self.sampling.percent_to_sigma(1 - float(time))))
        return sigma.clamp(float(self.sampling.sigma_min), float(self.sampling.sigma_max))


class DenoisingFromNoise(Denoising):
    """For what is sampled from noise alone and comes nearly all from the condition.

    Smooth things, such as haze or how bright a picture is, are decided near full noise, where a flow's logit-normal times hardly ever come.
    And they show through all the noise that an eps model knows, and through most of a flow's: a model that has always found them there
    believes what it finds, and where sampling starts there is nothing (arXiv 2305.08891 has that of pictures that cannot become dark).
    """

    def draw_flow_time(self, generator: torch.Generator) -> Tensor:
        """Return a uniform time for some of the samples."""
        even = float(torch.rand((), generator=generator)) < EVEN
        return torch.rand((), generator=generator) if even else super().draw_flow_time(generator)

    def noised(self, z0: Tensor, sigma: Tensor, generators: Sequence[torch.Generator]) -> Tensor:
        """Return z0 (B, ...) under noise, or where that is the larger, noise alone for some."""
        outweighed = sigma > (0.5 if is_flow(self.sampling) else 1.0)
        drawn = torch.stack([torch.rand((), generator=generator) for generator in generators]).to(sigma)
        shown = 1 - (outweighed & (drawn < ALONE)).to(z0)
        return super().noised(z0 * shown.reshape(-1, *[1] * (z0.ndim - 1)), sigma, generators)
