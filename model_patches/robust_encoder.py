"""A copy of the user's VAE encoder that looks through degradation: what the SDXL variant of the Restoration Adapter reads its latent with.

The paper borrows such an encoder from SUPIR. Here it is fine-tuned so that E_dr(lq) comes close to E(gt), and travels in the adapter's file.
"""

import copy
from collections.abc import Callable, Iterator
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .host_gradients import gradients
from .host_vae import LatentEncoder, float_copy
from .weights_file import part_of

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.sd import VAE

ENCODER = "lq_encoder."
PROBE = 32


def encoder_tensors(vae: "VAE", encode: Callable[[nn.Module, Tensor], Tensor] | None = None) -> dict[str, Tensor]:
    """Return copies of the weights that encoding uses, found by going back from a latent; names as in the VAE, behind ENCODER.

    Args:
        vae: the user's.
        encode: (first stage model, pixels) -> what is encoded; a latent without it.

    Raises:
        ValueError: for a VAE whose encoder has no weights.
    """
    module = float_copy(vae)
    with gradients():
        module.requires_grad_(True)
        pixels = torch.zeros(1, 3, PROBE, PROBE) if vae.latent_dim == 2 else torch.zeros(1, 3, 1, PROBE, PROBE)
        names, parameters = zip(*module.named_parameters())
        encoded = (module.encode(pixels) if encode is None else encode(module, pixels)).sum()
        if not encoded.requires_grad:
            raise ValueError("this VAE has no encoder that could learn. Connect one that makes latents, or none.")
        used = torch.autograd.grad(encoded, parameters, allow_unused=True)
    return {ENCODER + name: p.detach().clone() for name, p, gradient in zip(names, parameters, used) if gradient is not None and p.ndim > 0}


def with_encoder(vae: "VAE", tensors: dict[str, Tensor]) -> "VAE":
    """Return a VAE that encodes with the robust encoder, by weights the host puts in place and takes out again; `vae` stays as it is.

    Raises:
        ValueError: when the encoder is a copy of another kind of VAE's.
    """
    encoder = _checked(vae, tensors)
    if not encoder:
        return vae
    changed = copy.copy(vae)
    changed.patcher = vae.patcher.clone()
    changed.patcher.add_patches({name: ("set", (tensor,)) for name, tensor in encoder.items()})
    return changed


class RobustEncoder:
    """The encoder as it learns.

    Args:
        vae: the user's.
        model: whose latent space it encodes to.
        tensors: a file's, of which those behind ENCODER count.

    Raises:
        ValueError: when they are a copy of another kind of VAE's.
    """

    def __init__(self, vae: "VAE", model: "BaseModel", tensors: dict[str, Tensor]) -> None:
        _checked(vae, tensors)
        self.module = float_copy(vae)
        self.load(tensors)
        learning = copy.copy(vae)
        learning.first_stage_model, learning.vae_dtype = self.module, torch.float32
        self.encode = LatentEncoder(learning, model)
        self.learned = {name: p for name, p in self.module.named_parameters() if ENCODER + name in tensors}
        for p in self.learned.values():
            p.requires_grad_(True)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what is trained."""
        yield from self.learned.values()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights as they stand in a file."""
        return {ENCODER + name: p for name, p in self.learned.items()}

    def load(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""
        self.module.load_state_dict(part_of(tensors, ENCODER), strict=False)


def _checked(vae: "VAE", tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the encoder's tensors by the names they have in the VAE; the host would leave out silently what has none."""
    encoder = part_of(tensors, ENCODER)
    known = {name: p.shape for name, p in vae.first_stage_model.named_parameters()}
    wrong = sorted(name for name, tensor in encoder.items() if known.get(name) != tensor.shape)
    if wrong:
        raise ValueError(f"brings an encoder for another kind of VAE: {wrong[0]} does not fit this one. "
                         "Connect the VAE of the model it was trained on.")
    return encoder
