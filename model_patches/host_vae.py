"""The host's VAEs: latents of pictures and videos, gradients, and decoders of our own in its memory. Part of what host.py stands for."""

import copy
import logging
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import comfy.lora
import comfy.model_management
import comfy.utils

from .host import OUT_OF_MEMORY, reraise_unless_out_of_memory
from .host_gradients import casting_layers, copied_weights, plain_weights

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

# A forward and backward pass keeps its activations: about this many times the host's estimate for a plain forward pass, of VAE decoders and
# denoisers alike.
BACKWARD_FACTOR = 3.5


class PixelDecoder:
    """A VAE decoder that gradients flow through: latents in the model's space to pictures in 0..1, unclamped.

    Args:
        vae: the host's VAE.
        model: supplies process_latent_out.
    """

    def __init__(self, vae: "VAE", model: "BaseModel") -> None:
        self.vae = vae
        low, high = vae.process_output(torch.tensor([0.25, 0.75])).tolist()
        self.gain, self.offset = (high - low) * 2, low - (high - low) / 2
        self.cell = vae.spacial_compression_decode()
        self.to_raw = _per_channel(model.process_latent_out, model.latent_format)
        self.layers = casting_layers(vae.first_stage_model)

    def prepare(self) -> None:
        """Make the loaded weights fit for a backward pass; cheap when they already are."""
        plain_weights(self.vae.first_stage_model, self.layers)

    def __call__(self, z: Tensor) -> Tensor:
        """Decode (B, C, h, w) or (B, C, 1, h, w) to (B, 3, H, W) float32."""
        raw = self.to_raw(z).to(self.vae.device, self.vae.vae_dtype)
        if raw.ndim == 5 and self.vae.latent_dim == 2:
            raw = raw[:, :, 0]
        with copied_weights(self.layers if raw.requires_grad else ()):
            x = self.vae.first_stage_model.decode(raw)
        x = x[:, :, 0] if x.ndim == 5 else x
        return x.float() * self.gain + self.offset

    def fits(self, z: Tensor) -> bool:
        """Tell whether memory is free for decoding all of `z` at once without a backward pass, by the host's own estimate."""
        need = self.vae.memory_used_decode(z.shape, self.vae.vae_dtype)
        return need <= self.vae.patcher.get_free_memory(self.vae.device)

    def memory(self, shape: tuple[int, ...]) -> float:
        """Bytes that one forward and backward pass over latents of `shape` needs, with the copies of weights that it keeps."""
        return BACKWARD_FACTOR * self.vae.memory_used_decode(shape, self.vae.vae_dtype) + self.vae.patcher.model_size()


class LatentEncoder:
    """A VAE encoder that gradients flow through: pictures in 0..1 to latents in the model's space."""

    def __init__(self, vae: "VAE", model: "BaseModel") -> None:
        self.vae = vae
        self.cell = vae.spacial_compression_encode()
        self.from_raw = _per_channel(model.process_latent_in, model.latent_format)
        self.layers = casting_layers(vae.first_stage_model)

    def __call__(self, x: Tensor) -> Tensor:
        """Encode (B, 3, H, W) in 0..1 to float32 latents as the model sees them."""
        pixels = self.vae.process_input(x).to(self.vae.device, self.vae.vae_dtype)
        if self.vae.latent_dim == 3:
            pixels = pixels.unsqueeze(2)
        with copied_weights(self.layers if pixels.requires_grad else ()):
            z = self.vae.first_stage_model.encode(pixels).float()
        return self.from_raw(z)


def _per_channel(process: Callable[[Tensor], Tensor], latent_format: Any) -> Callable[[Tensor], Tensor]:
    """Express a latent format's scaling by its gain and offset: some formats keep tensors that cannot take part in a backward pass."""
    probe = torch.zeros([1, latent_format.latent_channels] + [1] * latent_format.latent_dimensions)
    with torch.inference_mode(False):
        offset = process(probe).float().clone()
        gain = process(probe + 1).float().clone() - offset

    def apply(z: Tensor) -> Tensor:
        return z * gain.to(z).reshape(gain.shape[:z.ndim]) + offset.to(z).reshape(offset.shape[:z.ndim])

    return apply


def check_latent_channels(vae: "VAE", model: "BaseModel", node: str) -> None:
    """Raise a ValueError that names the node unless a VAE's latents have as many channels as a model works on."""
    channels = model.latent_format.latent_channels
    if vae.latent_channels != channels:
        raise ValueError(f"{node}: 'vae' gives latents of {vae.latent_channels} channels and the model works on {channels}. "
                         "Connect the VAE that belongs to the model.")


def encode_pictures(vae: "VAE", model: "BaseModel", pictures: Tensor) -> Tensor:
    """Encode (B, H, W, 3) in 0..1 to latents as the model sees them, float32; a video VAE takes each picture for a video of one frame."""
    if vae.latent_dim == 3:
        raw = torch.cat([vae.encode(picture) for picture in pictures[..., :3].split(1)])
    else:
        raw = vae.encode(pictures[..., :3])
    return model.process_latent_in(raw.float())


def latent_frames(vae: "VAE", pictures: int) -> int:
    """Return how many latent frames a VAE makes of so many pictures of one video: as many, if it knows pictures only."""
    return vae.downscale_ratio[0](pictures) if _is_video_vae(vae) else pictures


def video_pictures(vae: "VAE", frames: int) -> int:
    """Return how many pictures a VAE makes of so many latent frames."""
    return vae.upscale_ratio[0](frames) if _is_video_vae(vae) else frames


def encode_video(vae: "VAE", pictures: Tensor) -> Tensor:
    """Encode (F, H, W, 3) in 0..1 as one video to raw (1, C, T, h, w), picture by picture where the VAE knows pictures only."""
    if _is_video_vae(vae):
        return vae.encode(pictures).float()
    raw = torch.cat([vae.encode(picture) for picture in pictures.split(1)]).float()
    return (raw[:, :, 0] if raw.ndim == 5 else raw).movedim(0, 1)[None]


def _is_video_vae(vae: "VAE") -> bool:
    return vae.latent_dim == 3 and not getattr(vae, "not_video", False) and isinstance(vae.downscale_ratio, tuple)


def float_copy(vae: "VAE") -> nn.Module:
    """Return a frozen float32 copy of a VAE's network with normal weights, on the CPU, that gradients flow through.

    The weights are this VAE's own, its patches among them, whatever is loaded at the moment: another clone's patches may be in their place.
    """
    patcher = vae.patcher
    with torch.inference_mode(False), torch.no_grad():
        copied = _unloaded_copy(vae.first_stage_model).cpu().float()
        plain_weights(copied)
        for name, p in copied.named_parameters():
            if name in patcher.backup:
                p.copy_(patcher.backup[name].weight)
            if name in patcher.patches:
                p.copy_(comfy.lora.calculate_weight(patcher.patches[name], p.clone(), name))
    return copied.requires_grad_(False)


def _unloaded_copy(module: nn.Module) -> nn.Module:
    """Copy a module without what the host keeps on it while it is loaded: patches, and handles of memory that each copy would free."""

    def traces(part: nn.Module) -> dict[str, Any]:
        return {name: value for name, value in vars(part).items()
                if name.startswith(("_v_", "_pin", "_prefetch", "dynamic_")) or name in ("_v", "weight_function", "bias_function")
                or name.endswith("_lowvram_function")}

    copied = copy.deepcopy(module, {id(value): value for part in module.modules() for value in traces(part).values()})
    for part in copied.modules():
        for name in traces(part):
            delattr(part, name)
    return copied


def decode_with(vae: "VAE", network: "ModelPatcher", samples: Tensor, decode: Callable[[Tensor], Tensor], channels: int, factor: float,
                tiling: tuple[int, int], tiled: bool) -> tuple[Tensor, Tensor]:
    """Run a decoder of our own as the host runs the VAE's: in its memory, as many at once as fit, in tiles if asked for or memory runs out.

    Args:
        vae: what `decode` uses; loaded.
        network: what it uses besides; loaded.
        samples: (B, C, h, w); latents, with what else belongs to each cell behind them.
        decode: samples on the VAE's device and in its precision -> (B, channels, H, W), the picture first, as the VAE's own decoder gives
            it.
        channels: that it returns.
        factor: how many times the memory of a plain decode it needs.
        tiling: (tile, overlap) in cells.
        tiled: use tiles in any case.

    Returns:
        pictures (B, 3, H, W) in 0..1 and the other channels.
    """
    management, dtype = comfy.model_management, vae.vae_output_dtype()
    # Pictures outlive what came with them, and must not hold on to its memory.
    sizes = (3, channels - 3)
    memory = factor * vae.memory_used_decode(samples.shape, vae.vae_dtype)
    with management.cuda_device_context(vae.device):
        out = None
        if not tiled:
            try:
                management.load_models_gpu([vae.patcher, network], memory_required=memory, force_full_load=vae.disable_offload)
                together = max(1, int(vae.patcher.get_free_memory(vae.device) / memory))
                parts = [
                    [half.to(vae.output_device, dtype, copy=True) for half in decode(part.to(vae.device, vae.vae_dtype)).split(sizes, 1)]
                    for part in samples.split(together)
                ]
                out = [torch.cat(half) for half in zip(*parts)]
            except OUT_OF_MEMORY as error:
                reraise_unless_out_of_memory(error)
                logging.warning("Mend: out of memory when decoding the whole picture, going on in tiles.")
        if out is None:  # outside of the handler, which holds on to what was allocated
            management.soft_empty_cache()
            management.load_models_gpu([vae.patcher, network], memory_required=memory, force_full_load=vae.disable_offload)
            tiles = _decode_tiles(vae, samples, lambda part: decode(part.to(vae.device, vae.vae_dtype)).to(dtype=dtype), channels, tiling)
            out = [half.clone() for half in tiles.split(sizes, 1)]
        return vae.process_output(out[0]), out[1]


def _decode_tiles(vae: "VAE", samples: Tensor, decode: Callable[[Tensor], Tensor], channels: int, tiling: tuple[int, int]) -> Tensor:
    """The mean of three tilings, as the host's own tiled decode takes it, sum for sum."""
    tile, overlap = tiling
    shapes = ((tile // 2, tile * 2), (tile * 2, tile // 2), (tile, tile))
    steps = [comfy.utils.get_tiled_scale_steps(samples.shape[3], samples.shape[2], x, y, overlap) for x, y in shapes]
    bar = comfy.utils.ProgressBar(len(samples) * sum(steps))
    first, second, third = (comfy.utils.tiled_scale(samples, decode, x, y, overlap, upscale_amount=vae.upscale_ratio, out_channels=channels,
                                                    output_device=vae.output_device, pbar=bar) for x, y in shapes)
    return (first + second + third) / 3.0
