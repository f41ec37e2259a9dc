"""How the host's denoisers are built: their family, and the places after their blocks to hook into. Part of what host.py stands for."""

from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

if TYPE_CHECKING:
    from comfy.model_base import BaseModel

UNETS = {768: "SD1.5", 1024: "SD2", 1280: "SDXL refiner", 2048: "SDXL"}
FLUX_1_WIDTH = 3072
# Latent cells to a side of one token; the same in SD3, FLUX.1 and WAN.
PATCH = 2
WANS = {1536: "WAN 1.3B", 3072: "WAN 5B", 5120: "WAN 14B"}

# Linear layers of the self-attention, by the ends of their paths; the fused ones hold q, k and v one after another.
PLAIN_ATTENTION = {
    "unet": (".attn1.to_q", ".attn1.to_k", ".attn1.to_v", ".attn1.to_out.0"), "sd3": (".x_block.attn.proj",), "flux": (".img_attn.proj",),
    "wan": (".self_attn.q", ".self_attn.k", ".self_attn.v", ".self_attn.o"),
}  # fmt: skip
FUSED_ATTENTION = {"sd3": (".x_block.attn.qkv",), "flux": (".img_attn.qkv",)}


@dataclass(frozen=True)
class Site:
    """The place after one block.

    Attributes:
        name: for messages and files, such as "down0", "middle", "up1", "double3", "single0".
        kind: where the host offers it: after an "input" block, before an "output" block, or after a "double" or "single" block.
        index: the host's number of that block.
        channels: width of the feature there.
        scale: latent cells to a side of one position.
    """

    name: str
    kind: str
    index: int
    channels: int
    scale: int


@dataclass(frozen=True)
class Anatomy:
    """What adapters need to know of a denoiser.

    Attributes:
        family: name for people; equal names mean equal widths except for models nobody has named.
        kind: "unet", "sd3", "flux" or "wan".
        latent_channels: of its latents.
        emb: width of its timestep embedding.
        sites: the places after its blocks, in the order in which the model runs; a UNet's last block has none.
    """

    family: str
    kind: str
    latent_channels: int
    emb: int
    sites: tuple[Site, ...]


def anatomy_of(model: "BaseModel") -> Anatomy:
    """Describe the denoiser of a host model.

    Raises:
        ValueError: for an architecture that is not known here; the message names it and lists those that are.
    """
    diffusion_model = model.diffusion_model
    name = type(diffusion_model).__name__
    describe = {"UNetModel": _unet, "OpenAISignatureMMDITWrapper": _sd3, "Flux": _flux, "WanModel": _wan}.get(name)
    # FLUX.2 hands its blocks modulations instead of an embedding; WAN Fun puts reference pictures before the video's own tokens.
    global_modulation = getattr(getattr(diffusion_model, "params", None), "global_modulation", False)
    if describe is None or global_modulation or getattr(diffusion_model, "ref_conv", None) is not None:
        raise ValueError(f"models of the kind {name} ({type(model).__name__}) are not supported. Use SD1.5, SD2, SDXL, SD3, FLUX.1 or WAN.")
    return describe(diffusion_model, model.latent_format.latent_channels)


def _unet(unet: nn.Module, latent_channels: int) -> Anatomy:
    places, last = tuple(_unet_places(unet)), len(unet.input_blocks) - 1
    down = [place for place, changes in places if place.kind == "input" and (changes or place.index == last)]
    middle = [place for place, _ in places if place.name == "middle"]
    up = [place for place, changes in places if place.kind == "output" and changes]
    sites = (*_levels("down", down), *middle, *_levels("up", up))
    return Anatomy(_unet_family(unet, latent_channels), "unet", latent_channels, 4 * unet.model_channels, sites)


def _levels(name: str, places: list[Site]) -> list[Site]:
    return [replace(place, name=f"{name}{level}") for level, place in enumerate(places)]


def every_block(model: "BaseModel") -> tuple[Site, ...]:
    """Return the place after every block of a denoiser, not only those between a UNet's levels; a UNet's last block has none."""
    anatomy = anatomy_of(model)
    return tuple(place for place, _ in _unet_places(model.diffusion_model)) if anatomy.kind == "unet" else anatomy.sites


def _unet_places(unet: nn.Module) -> Iterator[tuple[Site, bool]]:
    """Walk the places after a UNet's blocks, but the last; with each, whether its block changes the resolution."""
    scale, channels = 1, unet.model_channels
    for index, block in enumerate(unet.input_blocks):
        channels, step = _through(block, channels)
        scale *= step
        yield Site(f"input{index}", "input", index, channels, scale), step > 1
    channels, _ = _through(unet.middle_block, channels)
    yield Site("middle", "output", 0, channels, scale), False
    for index, block in enumerate(unet.output_blocks[:-1]):
        channels, step = _through(block, channels, upward=True)
        scale //= step
        yield Site(f"output{index}", "output", index + 1, channels, scale), step > 1


def _through(block: nn.Sequential, channels: int, upward: bool = False) -> tuple[int, int]:
    """Return the channels and the change of scale after a UNet block."""
    factor = 1
    for layer in block:
        name = type(layer).__name__
        if name in ("ResBlock", "Downsample", "Upsample"):
            channels = layer.out_channels
        if name == ("Upsample" if upward else "Downsample"):
            factor = 2
    return channels, factor


def _unet_family(unet: nn.Module, latent_channels: int) -> str:
    if latent_channels != 4 or unet.model_channels not in (320, 384):
        return f"UNet {unet.model_channels}"
    cross = next((layer for name, layer in unet.named_modules() if name.endswith("attn2.to_k")), None)
    width = getattr(cross, "in_features", 0)
    return UNETS.get(width, f"UNet {unet.model_channels}/{width}")


def _sd3(mmdit: nn.Module, latent_channels: int) -> Anatomy:
    depth, width = len(mmdit.joint_blocks), mmdit.x_embedder.proj.out_channels
    dual = any(getattr(block.x_block, "x_block_self_attn", False) for block in mmdit.joint_blocks)
    family = {(24, False): "SD3 medium", (24, True): "SD3.5 medium", (38, False): "SD3.5 large"}.get((depth, dual), f"SD3 of depth {depth}")
    return Anatomy(family, "sd3", latent_channels, width, _transformer_sites(width, depth))


def _flux(flux: nn.Module, latent_channels: int) -> Anatomy:
    width, double, single = flux.hidden_size, len(flux.double_blocks), len(flux.single_blocks)
    family = "FLUX.1" if width == FLUX_1_WIDTH else f"FLUX of width {width}"
    return Anatomy(family, "flux", latent_channels, width, _transformer_sites(width, double, single))


def _wan(wan: nn.Module, latent_channels: int) -> Anatomy:
    family = WANS.get(wan.dim, f"WAN of width {wan.dim}")
    return Anatomy(family, "wan", latent_channels, wan.dim, _transformer_sites(wan.dim, len(wan.blocks)))


def _transformer_sites(width: int, double: int, single: int = 0) -> tuple[Site, ...]:
    blocks = [("double", index) for index in range(double)] + [("single", index) for index in range(single)]
    return tuple(Site(f"{kind}{index}", kind, index, width, PATCH) for kind, index in blocks)


def self_attention(model: "BaseModel") -> dict[str, tuple[int, ...]]:
    """Find what a LoRA on self-attention acts on.

    Returns:
        For every linear layer, by its path below diffusion_model: the lengths of the parts of its output that get factors of their own, in
        their order from the first row on; rows after them (FLUX's single blocks hold their MLP there) get none.
    """
    anatomy = anatomy_of(model)
    found: dict[str, tuple[int, ...]] = {}
    for path, layer in model.diffusion_model.named_modules():
        parts = _attention_parts(path, layer, anatomy)
        if parts:
            found[path] = parts
    return found


def _attention_parts(path: str, layer: nn.Module, anatomy: Anatomy) -> tuple[int, ...]:
    if path.endswith(PLAIN_ATTENTION[anatomy.kind]):
        return (layer.out_features,)
    if path.endswith(FUSED_ATTENTION.get(anatomy.kind, ())):
        return (layer.out_features // 3,) * 3
    if anatomy.kind == "flux" and path.startswith("single_blocks.") and path.endswith(".linear1"):
        return (anatomy.emb,) * 3
    return ()


def attention_place(path: str) -> tuple[str, int, int]:
    """Return where the host says it is when it calls an attention of a UNet, by the module's path: (part, block, transformer)."""
    parts = path.split(".")
    transformer = int(parts[parts.index("transformer_blocks") + 1])
    return ("middle", 0, transformer) if parts[0] == "middle_block" else (parts[0].removesuffix("_blocks"), int(parts[1]), transformer)
