"""How the host's VAEs for pictures are built, as far as experts sit in their decoders. Part of what host.py stands for."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import Tensor, nn

if TYPE_CHECKING:
    from comfy.sd import VAE

SUPPORTED = "Use that of SD1.5, SD2, SDXL, SD3 or FLUX.1, or a tiny one (TAESD) for them."
# Pixels to a cell where experts sit, coarse to fine.
SCALES = (4, 2, 1)


@dataclass(frozen=True)
class VaeSite:
    """A place in a decoder, and the place in the encoder at the same resolution.

    Attributes:
        name: "at_4", "at_2", "at_1": pixels to a cell.
        channels: of the decoder there.
        skip: channels of the encoder there.
        scale: pixels to a cell.
    """

    name: str
    channels: int
    skip: int
    scale: int


@dataclass(frozen=True)
class VaeAnatomy:
    """What experts must know of a VAE.

    Attributes:
        family: layout and channels; two VAEs of one family have equal shapes.
        sites: coarse to fine.
    """

    family: str
    sites: tuple[VaeSite, ...]


def vae_anatomy(vae: "VAE") -> VaeAnatomy:
    """Return the sites of a VAE.

    Raises:
        ValueError: for a VAE that is not known here, those of video among them.
    """
    vae.throw_exception_if_invalid()
    module = vae.first_stage_model
    kind = _kind(module)
    if kind is None or vae.latent_dim != 2:
        what = "video VAEs" if vae.latent_dim == 3 else f"VAEs of the kind {type(module).__name__}"
        raise ValueError(f"{what} are not supported. {SUPPORTED}")
    decoder = dict(_decoder_sites(module))
    encoder = {scale: layer for layer, scale in _encoder_layers(module) if scale}
    shared = [scale for scale in SCALES if scale in decoder and scale in encoder]
    sites = tuple(VaeSite(f"at_{scale}", _channels(decoder[scale]), _channels(encoder[scale]), scale) for scale in shared)
    widths = "-".join(str(site.channels) for site in sites)
    return VaeAnatomy(f"{kind} of {vae.latent_channels} channels, {widths}", sites)


def decoder_layer(module: nn.Module, site: VaeSite) -> nn.Module:
    """Return the layer after which experts sit."""
    return dict(_decoder_sites(module))[site.scale]


def skips(module: nn.Module, pixels: Tensor) -> dict[str, Tensor]:
    """Return the encoder's features of pixels (B, 3, H, W) in -1..1 by the names of sites. What only the latent needs is not computed."""
    h, found = (pixels * 0.5 + 0.5 if _kind(module) == "TAESD" else pixels), {}
    for layer, scale in _encoder_layers(module):
        h = layer(h)
        if scale:
            found[f"at_{scale}"] = h
    return found


def signature(module: nn.Module) -> Tensor:
    """Return the weights of the encoder's first layer, flat: VAEs of equal shapes differ in them, fine-tunes of one hardly do."""
    first = module.taesd_encoder[0] if _kind(module) == "TAESD" else module.encoder.conv_in
    return first.weight.detach().float().cpu().flatten()


def _kind(module: nn.Module) -> str | None:
    from comfy.ldm.models.autoencoder import AutoencodingEngine
    from comfy.ldm.modules.diffusionmodules.model import Decoder, Encoder
    from comfy.taesd import taesd

    if isinstance(module, taesd.TAESD) and type(module.taesd_decoder) is taesd.Decoder:
        return "TAESD"
    if not isinstance(module, AutoencodingEngine) or type(module.decoder) is not Decoder or type(module.encoder) is not Encoder:
        return None
    return "AutoencoderKL" if isinstance(module.decoder.conv_in, nn.Conv2d) else None


def _decoder_sites(module: nn.Module) -> Iterator[tuple[int, nn.Module]]:
    """The last layer at each resolution of the decoder that has experts."""
    if _kind(module) == "TAESD":
        layers = list(module.taesd_decoder)
        ends = [index for index, layer in enumerate(layers) if isinstance(layer, nn.Upsample)] + [len(layers) - 1]
        yield from ((2 ** (len(ends) - 1 - level), layers[end - 1]) for level, end in enumerate(ends))
        return
    for level, up in enumerate(module.decoder.up):
        yield 2**level, up.attn[-1] if len(up.attn) else up.block[-1]


def _encoder_layers(module: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    """The encoder's layers in order as far as they are needed, with the scale of the site that they are the skip of, or 0."""
    if _kind(module) == "TAESD":
        yield from _taesd_encoder(module)
        return
    yield module.encoder.conv_in, 0
    for level, down in enumerate(module.encoder.down):
        scale = 2**level if 2**level in SCALES else 0
        if not scale:
            return
        for index, block in enumerate(down.block):
            layers = [block, *([down.attn[index]] if len(down.attn) else [])]
            last = index == len(down.block) - 1
            yield from ((layer, scale if last and layer is layers[-1] else 0) for layer in layers)
        if 2 * scale in SCALES and hasattr(down, "downsample"):
            yield down.downsample, 0


def _taesd_encoder(module: nn.Module) -> Iterator[tuple[nn.Module, int]]:
    layers, scale = list(module.taesd_encoder), 1
    for layer, following in zip(layers, layers[1:]):
        ends = isinstance(following, nn.Conv2d) and following.stride[0] == 2
        yield layer, scale if ends else 0
        if ends:
            scale *= 2
        if scale not in SCALES:
            return


def _channels(layer: nn.Module) -> int:
    """Channels that leave a block."""
    if hasattr(layer, "out_channels"):
        return layer.out_channels
    if hasattr(layer, "conv"):  # TAESD
        return layer.conv[-1].out_channels
    return layer.in_channels  # attention
