"""Hangs posterior guidance on a model: wrappers that live as long as one sampling run."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..model_patches.framing import check_covers, pad_to
from ..model_patches.host import OUT_OF_MEMORY, WrappersMP, add_run_wrappers, is_flow, load_with, reraise_unless_out_of_memory, reserve
from ..model_patches.host_gradients import (
    casting_layers,
    copied_weights,
    differentiable_attention,
    gradients,
    plain,
    plain_weights,
    unshared_norm_inputs,
)
from ..model_patches.host_lora import is_quantised
from ..model_patches.host_vae import LatentEncoder, PixelDecoder
from .alignment import Alignment
from .posterior_guidance import HALO, NODE, Posterior, PosteriorRun, row_seed
from .quality import Quality

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

# Prefix of the key that a run's predictor has among the PREDICT_NOISE wrappers.
RUN_KEY = "mend_posterior_run"


class GuidedModel:
    """The inputs of one Apply Posterior Guidance; everything a run changes lives in a PosteriorRun made for that run.

    Args:
        settings, alignment, quality: of the guidance.
        vae: decodes the model's latents.
        degraded: (B, H, W, 3) in 0..1.
        mask: (1 or B, H, W) in 0..1, or None.
        vgg: VGG16 tensors or None.
        on_finish: called with the run's counters when it ends, for benchmarks.
    """

    def __init__(self, settings: Posterior, alignment: Alignment, quality: Quality | None, vae: "VAE", degraded: Tensor, mask: Tensor | None = None,
                 vgg: dict[str, Tensor] | None = None, on_finish: Callable | None = None) -> None:
        self.settings, self.alignment, self.quality = settings, alignment, quality
        self.vae, self.degraded, self.mask, self.vgg, self.on_finish = vae, degraded, mask, vgg, on_finish

    def attach(self, model: "ModelPatcher") -> "ModelPatcher":
        """Return a clone of `model` under guidance; at strength 0 a clone that samples as the model itself.

        Raises:
            ValueError: when the gradient is to go through a quantised model.
        """
        patched = model.clone()
        if self.settings.strength == 0:
            return patched
        if self.settings.through_model and is_quantised(model):
            raise ValueError(f"{NODE}: 'gradient' is 'through model', and the weights of 'model' are quantised, which no gradient goes through. "
                             "Set 'gradient' to 'prediction', or load the model in another precision.")
        add_run_wrappers(patched, "mend_posterior", {WrappersMP.OUTER_SAMPLE: self._outer_sample, WrappersMP.PREPARE_SAMPLING: self._prepare_sampling})
        load_with(patched, "mend_posterior", [self.vae.patcher])
        return patched

    def _outer_sample(self, executor: Any, noise: Tensor, latent_image: Tensor, sampler: Any, sigmas: Tensor, denoise_mask: Tensor | None = None,
                      callback: Callable | None = None, disable_pbar: bool = False, seed: int | None = None, **kwargs: Any) -> Tensor:
        """Open a run: companions join the batch, PREDICT_NOISE is guided, and all of it is gone when sampling ends."""
        _check_latent(noise)
        batch = noise.shape[0]
        guider = executor.class_obj
        predict = _Predictor(self, noise, sigmas, seed or 0)
        key = f"{RUN_KEY}_{id(predict)}"
        wrappers = guider.model_options["transformer_options"].setdefault("wrappers", {}).setdefault(WrappersMP.PREDICT_NOISE, {})
        wrappers[key] = [predict]
        if self.settings.companion and not self.settings.through_model:  # going back through the model leaves no room for companions
            noise, latent_image, denoise_mask = _with_companions(noise, latent_image, denoise_mask, seed or 0)
            callback = _without_companions(callback, batch)
            if kwargs.get("latent_shapes"):
                kwargs["latent_shapes"] = [(2 * batch, *shape[1:]) for shape in kwargs["latent_shapes"]]
        try:
            return executor(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, **kwargs)[:batch]
        finally:
            wrappers.pop(key, None)
            if self.on_finish is not None and predict.run is not None:
                self.on_finish(predict.run.counters)

    def _prepare_sampling(self, executor: Any, model: "ModelPatcher", noise_shape: list[int], conds: dict, *args: Any, **kwargs: Any) -> Any:
        """Ask the host to leave room for the decoder's backward pass."""
        tile = [min(side, self.settings.tile + 2 * HALO) if side > self.settings.tile else side for side in noise_shape[-2:]]
        decoder = PixelDecoder(self.vae, model.model)
        need = decoder.memory((1, *noise_shape[1:-2], *tile))
        return executor(model, reserve(model.model, list(noise_shape), need), conds, *args, **kwargs)

    def start(self, guider: Any, x: Tensor, sigmas: Tensor, seed: int, noise: Tensor) -> PosteriorRun:
        """Make the state of a run, once the models are loaded.

        Raises:
            ValueError: when picture, mask and latent do not fit together; the message names the input.
        """
        base = guider.inner_model
        decoder, encoder = PixelDecoder(self.vae, base), LatentEncoder(self.vae, base)
        y = fitted_pictures(self.degraded, noise.shape[0], (x.shape[-2], x.shape[-1]), decoder.cell)
        mask = None if self.mask is None else fitted_mask(self.mask, self.degraded.shape[1:3], y.shape[-2:], noise.shape[0])
        with torch.inference_mode(False):
            y = y.to(self.vae.device, torch.float32, copy=True)
            mask = None if mask is None else mask.to(self.vae.device, torch.float32, copy=True)
            return PosteriorRun(self.settings, self.alignment, self.quality, y, mask, decoder, encoder, self.vgg, base.model_sampling, sigmas, seed, noise)


class _Predictor:
    """The PREDICT_NOISE wrapper of one run."""

    def __init__(self, guided: GuidedModel, noise: Tensor, sigmas: Tensor, seed: int) -> None:
        self.guided, self.noise, self.sigmas, self.seed = guided, noise, sigmas, seed
        self.run: PosteriorRun | None = None

    def __call__(self, executor: Any, x: Tensor, timestep: Tensor, model_options: dict, seed: int | None = None) -> Tensor:
        guider = executor.class_obj
        schedule = model_options["transformer_options"].get("sample_sigmas", self.sigmas)
        if self.run is None:
            self.run = self.guided.start(guider, x, schedule, self.seed, self.noise)
        self.run.follow(schedule.tolist())
        sigma = float(timestep.flatten()[0])
        if self.guided.settings.through_model:
            return self._through_model(executor, guider, x, timestep, sigma, model_options, seed)
        x0 = executor(x, timestep, model_options, seed)
        return self.run.guide(x0, sigma)

    def _through_model(self, executor: Any, guider: Any, x: Tensor, timestep: Tensor, sigma: float, model_options: dict, seed: int | None) -> Tensor:
        """Tweedie with the measurement: x0 - Cov[x0 | x] grad, the covariance applied by going back through the denoiser."""
        try:
            x0, g, direction = self._back_through(executor, guider, x, timestep, sigma, model_options, seed)
        except OUT_OF_MEMORY as error:
            reraise_unless_out_of_memory(error)
            raise MemoryError(f"{NODE}: the way back through the model does not fit in memory. Set 'gradient' to 'prediction', or use a smaller "
                              "picture for 'degraded' (and the latent).") from error
        return self.run.descend(x0, g, direction, sigma)

    def _back_through(self, executor: Any, guider: Any, x: Tensor, timestep: Tensor, sigma: float, model_options: dict,
                      seed: int | None) -> tuple[Tensor, Tensor, Tensor]:
        """Return x0, the likelihood's gradient there, and the way to go."""
        base = guider.inner_model
        fetched = casting_layers(base.diffusion_model, guider.model_patcher.load_device)
        with gradients(), unshared_norm_inputs(base.diffusion_model), copied_weights(fetched):
            plain_weights(base.diffusion_model, fetched)
            plain_weights(base.model_sampling)
            guider.conds = plain(guider.conds)
            leaf = x.clone().requires_grad_(True)
            options = plain(model_options)
            options["transformer_options"] = differentiable_attention(options["transformer_options"])
            x0 = executor(leaf, timestep.clone(), options, seed)
            g = self.run.gradient(x0.detach(), sigma)
            scale = sigma**2 / (1 - min(sigma, 0.999)) if is_flow(base.model_sampling) else sigma**2
            # Scaled so that the backward pass fits into the model's precision.
            size = g.abs().max().clamp(min=torch.finfo(g.dtype).tiny)
            direction = -scale * size * torch.autograd.grad(x0, leaf, g / size)[0]
        return x0.detach(), g, direction


def _check_latent(noise: Tensor) -> None:
    """Raise ValueError for what are not latents of pictures; the host lays pictures and sound that are sampled together into one row."""
    if noise.ndim not in (4, 5):
        raise ValueError(f"{NODE}: the latent holds pictures and sound together; only pictures can be restored.")
    if noise.ndim == 5 and noise.shape[2] != 1:
        raise ValueError(f"{NODE}: the latent is a video of {noise.shape[2]} latent frames; restore frames as a batch of pictures instead.")


def fitted_pictures(degraded: Tensor, batch: int, latent_size: tuple[int, int], cell: int) -> Tensor:
    """Return (batch, 3, H, W) for latents of a size: one picture serves all, and less than a cell is padded.

    Args:
        degraded: (B, H, W, C) in 0..1, C at least 3.
        batch: latents in the batch.
        latent_size: (rows, columns) of the latent.
        cell: pixels per latent pixel.

    Raises:
        ValueError: naming the input, what was found and what fits.
    """
    count, height, width = degraded.shape[:3]
    if count not in (1, batch):
        raise ValueError(f"{NODE}: 'degraded' holds {count} pictures but the latent batch has {batch}; give one picture, or as many as latents.")
    size = check_covers((height, width), latent_size, cell, NODE)
    return _centred(degraded[..., :3].movedim(-1, 1).float(), size).expand(batch, -1, -1, -1).clone(memory_format=torch.contiguous_format)


def fitted_mask(mask: Tensor, picture_size: tuple[int, int], size: tuple[int, int], batch: int) -> Tensor:
    """Return (batch, 1, H, W): a mask of another size is scaled to the picture, and padded as the picture was.

    Raises:
        ValueError: when the number of masks fits neither one nor the batch.
    """
    mask = mask.reshape(-1, 1, *mask.shape[-2:]).float()
    if len(mask) not in (1, batch):
        raise ValueError(f"{NODE}: 'mask' holds {len(mask)} masks but the latent batch has {batch}; give one mask, or as many as latents.")
    if mask.shape[-2:] != tuple(picture_size):
        mask = F.interpolate(mask, picture_size, mode="bilinear", antialias=True)
    return _centred(mask, size).expand(batch, -1, -1, -1).clone(memory_format=torch.contiguous_format)


def _centred(x: Tensor, size: tuple[int, int]) -> Tensor:
    """Crop or pad (B, C, H, W) about its middle, as the host's VAE encode crops and Frame Image pads."""
    for axis, side in ((-2, size[0]), (-1, size[1])):
        if x.shape[axis] > side:
            x = x.narrow(axis, (x.shape[axis] - side) // 2, side)
    return pad_to(x.movedim(1, -1), size).movedim(-1, 1)


def _with_companions(noise: Tensor, latent: Tensor, mask: Tensor | None, seed: int) -> tuple[Tensor, Tensor, Tensor | None]:
    """Append one companion a picture: as much noise of its own, the same starting latent, and no mask held over it."""
    rows = [torch.randn(row.shape, generator=torch.Generator().manual_seed(row_seed(seed, row) ^ 1)).to(row) * row.std() for row in noise]
    if mask is not None:
        mask = torch.cat([mask, torch.ones_like(mask)])
    return torch.cat([noise, torch.stack(rows)]), torch.cat([latent, latent]), mask


def _without_companions(callback: Callable | None, batch: int) -> Callable | None:
    """Show the host's callback only the pictures that were asked for."""
    if callback is None:
        return None
    return lambda step, x0, x, total: callback(step, x0[:batch], x[:batch], total)
