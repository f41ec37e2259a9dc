"""The lab's denoisers, built from the host's own network classes. Each carries its own table of word vectors.

unet: eps-prediction on the host's discrete schedule; dit: flow matching in the SD3 layout; both on the lab's latents. pixel: flow matching on
pixels, by a small UNet.
"""

import math

import numpy as np
import torch
from torch import Tensor, nn

from .vocabulary import LENGTH, PAD, WORDS

TEXT_WIDTH = 64
LATENT_CHANNELS = 16
TEXT_DROP, WORD_DROP = 0.1, 0.3

UNET = {
    "image_size": 32, "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "model_channels": 64, "num_res_blocks": [2, 1, 1],
    "channel_mult": [1, 2, 2], "transformer_depth": [0, 0, 1, 1], "transformer_depth_middle": 1,
    "transformer_depth_output": [0, 0, 0, 1, 1, 1, 1],
    "context_dim": TEXT_WIDTH, "use_spatial_transformer": True, "use_linear_in_transformer": True, "num_head_channels": 32, "num_heads": -1,
    "adm_in_channels": None, "legacy": False, "use_checkpoint": False, "use_temporal_attention": False, "use_temporal_resblock": False,
}
# At full resolution, where each channel costs most, the way down has no residual block; only cells of 8 pixels attend, in the middle and behind it.
PIXEL = {
    **UNET, "image_size": 256, "in_channels": 3, "out_channels": 3, "model_channels": 32, "num_res_blocks": [0, 1, 1, 1], "channel_mult": [1, 1, 2, 2],
    "transformer_depth": [0, 0, 0], "transformer_depth_output": [0, 0, 0, 0, 0, 1, 1],
}
DIT_DEPTH = 4
DIT = {
    "in_channels": LATENT_CHANNELS, "out_channels": LATENT_CHANNELS, "patch_size": 2, "depth": DIT_DEPTH, "input_size": None,
    "adm_in_channels": TEXT_WIDTH, "qk_norm": "rms", "pos_embed_max_size": 64, "num_patches": 64 * 64, "pos_embed_scaling_factor": None,
    "context_embedder_config": {"target": "torch.nn.Linear", "params": {"in_features": TEXT_WIDTH, "out_features": 64 * DIT_DEPTH}},
    "x_block_self_attn_layers": [],
}


class Words(nn.Module):
    """A table of word vectors; a text is LENGTH of them and their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Parameter(torch.zeros(len(WORDS) + 1, TEXT_WIDTH))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return (context (B, LENGTH, width), pooled (B, width)) of ids (B, LENGTH)."""
        context = self.table[ids]
        known = (ids != PAD).unsqueeze(-1)
        return context, (context * known).sum(1) / known.sum(1).clamp(min=1)


def build_unet(config: dict = UNET) -> nn.ModuleDict:
    """Return {"net": the host's UNetModel, "words": Words}, initialised; the config is UNET or PIXEL."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    torch.manual_seed(1)
    net = UNetModel(**config, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    _initialise(net)
    for name, p in net.named_parameters():
        if name.endswith(("out_layers.3.weight", "proj_out.weight", "out.2.weight", "to_out.0.weight", "ff.net.2.weight")):
            p.data.mul_(0.1)
    return nn.ModuleDict({"net": net, "words": _words()})


def build_dit() -> nn.ModuleDict:
    """Return {"net": the host's SD3 network, "words": Words}, initialised with closed modulation gates."""
    import comfy.ops
    from comfy.ldm.modules.diffusionmodules.mmdit import OpenAISignatureMMDITWrapper

    torch.manual_seed(2)
    net = OpenAISignatureMMDITWrapper(**DIT, dtype=torch.float32, operations=comfy.ops.disable_weight_init)
    _initialise(net)
    for name, p in net.named_parameters():
        if "adaLN_modulation" in name or name.startswith("final_layer"):
            p.data.zero_()
    net.pos_embed.copy_(position_codes())
    return nn.ModuleDict({"net": net, "words": _words()})


def unet_loss(model: nn.ModuleDict, z: Tensor, ids: Tensor, alphas_cumprod: Tensor, even: bool) -> tuple[Tensor, Tensor]:
    """Mean square error on eps at uniform timesteps; returns (loss, the same for the log).

    The error of eps hardly tells whether x0 is right where there is much noise. With `even`, it is weighted as v-prediction weights it, by 1 / bar.
    """
    t = torch.randint(0, 1000, (len(z),))
    bar = alphas_cumprod[t].to(z).view(-1, 1, 1, 1)
    eps = torch.randn_like(z)
    context, _ = model["words"](ids)
    out = model["net"](bar.sqrt() * z + (1 - bar).sqrt() * eps, t.to(z.device).float(), context=context, transformer_options={})
    error = ((out.float() - eps).square() / (bar if even else 1)).mean()
    return error, error.detach()


def flow_loss(model: nn.ModuleDict, z: Tensor, ids: Tensor, *, pooled_too: bool) -> tuple[Tensor, Tensor]:
    """Mean square error on the flow's velocity, with sigma logit-normal; returns (loss, the same for the log).

    Args:
        model: a net and its words.
        z: (B, C, h, w) latents as the net sees them, or pixels in -1..1.
        ids: (B, LENGTH) words.
        pooled_too: whether the net takes the mean of the words, too.
    """
    sigma = torch.sigmoid(torch.randn(len(z)) * 1.2 + 0.3).to(z).view(-1, 1, 1, 1)
    eps = torch.randn_like(z)
    context, pooled = model["words"](ids)
    told = {"context": context, "transformer_options": {}} | ({"y": pooled} if pooled_too else {})
    out = model["net"]((1 - sigma) * z + sigma * eps, sigma.flatten() * 1000, **told)
    error = (out.float() - (eps - z)).square().mean()
    return error, error.detach()


def position_codes() -> Tensor:
    """Return (1, tokens, width), the DiT's fixed sines and cosines, a half for each axis. Files leave them out."""
    size, width = DIT["pos_embed_max_size"], 64 * DIT_DEPTH
    omega = 10000 ** (-torch.arange(width // 4) / (width // 4))
    angle = torch.arange(size)[:, None] * omega
    code = torch.cat([angle.sin(), angle.cos()], 1)
    rows, columns = code[:, None].expand(-1, size, -1), code[None].expand(size, -1, -1)
    return torch.cat([columns, rows], -1).reshape(1, size * size, width)


def sd_alphas_cumprod() -> Tensor:
    """The schedule of the host's default ModelSamplingDiscrete, which the UNet is sampled with."""
    return torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0).float()


def dropped_ids(captions: np.ndarray, rng: np.random.Generator) -> Tensor:
    """Shuffle and thin the words of each caption, and drop one caption in ten whole.

    Args:
        captions: (B, n) word ids padded with PAD.
        rng: source of the choices.

    Returns:
        (B, LENGTH) ids.
    """
    rows = []
    for row in captions:
        words = row[row != PAD]
        words = rng.permutation(words[rng.random(len(words)) >= WORD_DROP])[:LENGTH]
        if rng.random() < TEXT_DROP:
            words = words[:0]
        rows.append(np.pad(words, (0, LENGTH - len(words)), constant_values=PAD))
    return torch.from_numpy(np.stack(rows)).long()


def _words() -> Words:
    words = Words()
    nn.init.normal_(words.table, std=0.5)
    return words


def _initialise(net: nn.Module) -> None:
    """The host's layers come uninitialised: unit norms, fan-in matrices, zero biases."""
    for name, p in net.named_parameters():
        if p.ndim > 1:
            nn.init.normal_(p, std=1 / math.sqrt(p[0].numel()))
        elif name.endswith("weight"):
            nn.init.ones_(p)
        else:
            nn.init.zeros_(p)
