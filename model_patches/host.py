"""What the pack knows of the host's private shapes: gradients under inference mode, VAEs, latent spaces, wrappers. Nothing else may."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import comfy.conds
import comfy.model_management
import comfy.ops
import comfy.patcher_extension

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

# Layers of networks that learn during a run: plain weights in the run's own precision, created where they are used.
run_operations = comfy.ops.disable_weight_init
WrappersMP = comfy.patcher_extension.WrappersMP
CallbacksMP = comfy.patcher_extension.CallbacksMP

OUT_OF_MEMORY = (comfy.model_management.OOM_EXCEPTION, comfy.model_management.ACCELERATOR_ERROR)

# Backward through a VAE decoder keeps its activations: about this many times the host's estimate for a plain decode.
BACKWARD_FACTOR = 3.5


@contextmanager
def gradients() -> Iterator[None]:
    """Let autograd work inside the host's inference mode; tensors made outside must be cloned before they are used within."""
    management = comfy.model_management
    before = management.in_training
    management.in_training = True
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        management.in_training = before


def plain_weights(module: nn.Module) -> None:
    """Turn inference tensors among a frozen module's weights into normal ones of the same values, in place.

    Weights loaded under inference mode cannot take part in a backward pass. This is the one lasting change the pack makes to a shared model.
    """
    with torch.inference_mode(False):
        for part in module.modules():
            for name, p in list(part._parameters.items()):
                if p is not None and p.is_inference():
                    part._parameters[name] = nn.Parameter(p.clone(), requires_grad=False)
            for name, b in list(part._buffers.items()):
                if b is not None and b.is_inference():
                    part._buffers[name] = b.clone()


def plain(value: Any) -> Any:
    """Clone inference tensors anywhere inside conds (lists, dicts, the host's COND objects)."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v) for v in value)
    if isinstance(value, comfy.conds.CONDRegular):
        return value._copy_with(plain(value.cond))
    return value


@contextmanager
def unshared_norm_inputs(diffusion_model: nn.Module) -> Iterator[None]:
    """FLUX adds to its streams in place after a norm has kept them for the backward pass: give its norms copies while gradients flow."""
    names = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2", "pre_norm")
    blocks = [*getattr(diffusion_model, "double_blocks", ()), *getattr(diffusion_model, "single_blocks", ())]
    norms = [getattr(block, name) for block in blocks for name in names if hasattr(block, name)]
    handles = [norm.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:])) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class PixelDecoder:
    """A VAE decoder that gradients flow through: latents in the model's space to pictures in 0..1, unclamped.

    Args:
        vae: the host's VAE.
        model: supplies process_latent_out.
    """

    def __init__(self, vae: "VAE", model: "BaseModel") -> None:
        self.vae, self.model = vae, model
        low, high = vae.process_output(torch.tensor([0.25, 0.75])).tolist()
        self.gain, self.offset = (high - low) * 2, low - (high - low) / 2
        self.cell = vae.spacial_compression_decode()
        self.to_raw = _per_channel(model.process_latent_out, model.latent_format)

    def prepare(self) -> None:
        """Make the loaded weights fit for a backward pass; cheap when they already are."""
        plain_weights(self.vae.first_stage_model)

    def __call__(self, z: Tensor) -> Tensor:
        """Decode (B, C, h, w) or (B, C, 1, h, w) to (B, 3, H, W) float32."""
        raw = self.to_raw(z).to(self.vae.device, self.vae.vae_dtype)
        if raw.ndim == 5 and self.vae.latent_dim == 2:
            raw = raw[:, :, 0]
        x = self.vae.first_stage_model.decode(raw)
        x = x[:, :, 0] if x.ndim == 5 else x
        return x.float() * self.gain + self.offset

    def memory(self, shape: tuple[int, ...]) -> float:
        """Bytes that one forward and backward pass over latents of `shape` needs."""
        return BACKWARD_FACTOR * self.vae.memory_used_decode(shape, self.vae.vae_dtype)


class LatentEncoder:
    """A VAE encoder that gradients flow through: pictures in 0..1 to latents in the model's space."""

    def __init__(self, vae: "VAE", model: "BaseModel") -> None:
        self.vae, self.model = vae, model
        self.cell = vae.spacial_compression_encode()
        self.from_raw = _per_channel(model.process_latent_in, model.latent_format)

    def __call__(self, x: Tensor) -> Tensor:
        """Encode (B, 3, H, W) in 0..1 to float32 latents as the model sees them."""
        pixels = self.vae.process_input(x).to(self.vae.device, self.vae.vae_dtype)
        if self.vae.latent_dim == 3:
            pixels = pixels.unsqueeze(2)
        z = self.vae.first_stage_model.encode(pixels).float()
        return self.from_raw(z)


def _per_channel(process: Callable[[Tensor], Tensor], latent_format: Any) -> Callable[[Tensor], Tensor]:
    """Express a latent format's scaling by its gain and offset, since some formats keep tensors that cannot take part in a backward pass."""
    probe = torch.zeros([1, latent_format.latent_channels] + [1] * latent_format.latent_dimensions)
    with torch.inference_mode(False):
        offset = process(probe).float().clone()
        gain = process(probe + 1).float().clone() - offset

    def apply(z: Tensor) -> Tensor:
        return z * gain.to(z).reshape(gain.shape[:z.ndim]) + offset.to(z).reshape(offset.shape[:z.ndim])

    return apply


def model_time(model_sampling: Any, sigma: float) -> float:
    """Return a sigma's place in the schedule, 1 at pure noise: the papers' t / T, linear in the model's own timesteps."""
    last = float(model_sampling.timestep(torch.as_tensor(model_sampling.sigma_max)))
    return float(model_sampling.timestep(torch.as_tensor(sigma))) / last


def is_flow(model_sampling: Any) -> bool:
    """Tell x = (1 - sigma) x0 + sigma n from x = x0 + sigma n."""
    probe = model_sampling.noise_scaling(torch.tensor([0.5]), torch.zeros(1), torch.ones(1), False)
    return bool(abs(float(probe) - 1) > 1e-3)


def noise_to_signal(model_sampling: Any, sigma: float) -> float:
    """Deviation of the noise relative to the latent in x at this sigma: sigma itself, or sigma / (1 - sigma) for flow models."""
    return sigma / max(1 - sigma, 1e-4) if is_flow(model_sampling) else sigma


def signal_level(model_sampling: Any, sigma: float) -> float:
    """What x holds of the clean latent at this sigma: 1, or 1 - sigma for flow models."""
    return 1 - sigma if is_flow(model_sampling) else 1.0


def add_run_wrappers(patcher: "ModelPatcher", key: str, wrappers: dict[str, Callable]) -> None:
    """Register wrappers under a key that is free on this patcher, so that the same node can be applied twice."""
    taken = {name for group in patcher.wrappers.values() for name in group}
    index = 0
    while f"{key}_{index}" in taken:
        index += 1
    for kind, wrapper in wrappers.items():
        patcher.add_wrapper_with_key(kind, f"{key}_{index}", wrapper)


def load_with(patcher: "ModelPatcher", key: str, models: list["ModelPatcher"]) -> None:
    """Have the host load `models` together with the patcher whenever it is sampled."""
    patcher.set_additional_models(key, [*patcher.get_additional_models_with_key(key), *models])


def reserve(model: Any, noise_shape: list[int], extra_bytes: float) -> list[int]:
    """Return a noise shape whose memory estimate covers `extra_bytes` more than the given one's."""
    one = max(1.0, float(model.memory_required([1, *noise_shape[1:]])))
    return [noise_shape[0] + int(extra_bytes / one + 1), *noise_shape[1:]]


def reraise_unless_out_of_memory(error: BaseException) -> None:
    """Accelerators report other faults under the same type: raise those again."""
    comfy.model_management.raise_non_oom(error)


def interrupt_point() -> None:
    """Raise the host's interruption if the user has pressed cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()
