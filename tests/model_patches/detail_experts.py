"""VAEs that detail experts know, and experts for them as if something had been learned."""

import torch

import comfy.sd
import comfy.utils
from mend.lab.prior import WEIGHTS as LAB
from mend.model_patches.detail_experts import new_weights
from mend.model_patches.weights_file import Weights
from mend.tests.tiny_models import vae

WINDOW = 64


def lab_vae():
    """The lab's own, in the host's TAESD layout."""
    return comfy.sd.VAE(sd=comfy.utils.load_torch_file(str(LAB / "vae.safetensors"), safe_load=True))


VAES = {"kl": lambda: vae(4), "kl 16": lambda: vae(16), "taesd": lab_vae}


def made(kind):
    """As the host makes one while it executes a prompt: with inference tensors for weights."""
    with torch.inference_mode():
        return VAES[kind]()


def trained(to, size="full", window=WINDOW, outer=0.3, seed=44, **settings):
    """Experts whose branches are all open, and routers that choose."""
    weights, generator = new_weights(to, size, window, **settings), torch.Generator().manual_seed(seed)
    # A seed with which windows differ and none is undecided: roundings would choose for it.
    tensors, choice = dict(weights.tensors), torch.Generator().manual_seed(seed + 1)
    for name, tensor in tensors.items():
        if name.endswith("outer"):
            tensors[name] = torch.full_like(tensor, outer)
        elif any(f".{layer}." in name for layer in ("leave", "zero", "zero2")):
            tensors[name] = torch.randn(tensor.shape, generator=generator) * 0.2
        elif name.endswith(("router.content.weight", "router.frequency.weight")):
            tensors[name] = (2 * torch.rand(tensor.shape, generator=choice) - 1) * tensor[0].numel() ** -0.5
    return Weights(weights.kind, weights.family, weights.config, tensors, weights.name)


def pictures(batch=1, height=64, width=64, seed=3):
    """Seeded pictures with large shapes in them."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.rand(batch, 3, height // 16 + 1, width // 16 + 1, generator=generator)
    smooth = torch.nn.functional.interpolate(coarse, (height, width), mode="bicubic").movedim(1, -1)
    return (0.8 * smooth + 0.2 * torch.rand(batch, height, width, 3, generator=generator)).clamp(0, 1)
