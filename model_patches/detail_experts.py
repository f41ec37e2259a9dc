"""Files of detail experts: making new ones for a VAE, checking that they belong to it, and loading them beside it."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config_values import number, one_of, whole_number
from .daem import SIZES, DetailExperts, initialise
from .fit import VAE_INPUT, check_finite, check_shapes, check_vae_family
from .host import inference_module, trained_operations
from .vae_sites import VaeAnatomy, signature, vae_anatomy
from .weights_file import Weights, part_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

KIND = "detail_experts"
DAEM, SIGNATURE = "daem.", "vae.signature"
# Windows must be whole at every site and even, and tiles must begin where windows do.
WINDOW_STEP, LARGEST_WINDOW = 64, 256
# Fine-tunes of a VAE keep the direction of its first layer; VAEs that were trained apart have nothing in common.
LEAST_LIKENESS = 0.5
LATENTS = ("mix", "clean", "degraded")


def new_weights(vae: "VAE", size: str = "lite", window: int = 128, seed: int = 0, latents: str = "mix", perceptual: float = 0.5) -> Weights:
    """Make untrained experts for a VAE, which leave its pictures as they are.

    Args:
        vae: the host's.
        size: one of daem.SIZES.
        window: side in pixels of the windows that are judged one by one; 0 for the whole picture.
        seed: of the weights that do not start at zero.
        latents: what they learn to decode: "clean", "degraded", or a "mix".
        perceptual: weight of the perceptual distance in training.

    Raises:
        ValueError: for a VAE that is not known; without the node's name.
    """
    anatomy = vae_anatomy(vae)
    network = DetailExperts(anatomy.sites, size, window, trained_operations)
    initialise(network, torch.Generator().manual_seed(seed))
    tensors = {DAEM + name: tensor.detach() for name, tensor in network.state_dict().items()}
    tensors[SIGNATURE] = signature(vae.first_stage_model)
    config = {"size": size, "window": window, "latents": latents, "perceptual": perceptual}
    return Weights(KIND, anatomy.family, config, tensors, f"the new detail experts for {anatomy.family}")


def known_settings(config: Mapping[str, Any]) -> bool:
    """Tell whether size, window, latents and perceptual of a config are what experts can have."""
    window = config.get("window")
    window_fits = whole_number(window) and window <= LARGEST_WINDOW and window % WINDOW_STEP == 0
    return window_fits and one_of(config.get("size"), SIZES) and one_of(config.get("latents"), LATENTS) and number(config.get("perceptual"))


def check_fit(weights: Weights, vae: "VAE", node: str) -> VaeAnatomy:
    """Check that experts were made for this VAE, and return its anatomy.

    Raises:
        ValueError: naming the node, the weights and what does not fit.
    """
    anatomy = check_vae_family(weights, KIND, vae, node)
    if not known_settings(weights.config):
        raise ValueError(f"{node}: {weights.name} describes itself as {weights.config}, and a size ({', '.join(SIZES)}), a "
                         f"window of 0 to {LARGEST_WINDOW} in steps of {WINDOW_STEP}, latents ({', '.join(LATENTS)}) and the weight of a "
                         "perceptual distance were expected. Update the pack, or save the file again.")
    own = signature(vae.first_stage_model)
    check_shapes(weights, _expected(anatomy, weights.config["size"], weights.config["window"]) | {SIGNATURE: own}, node, VAE_INPUT)
    check_finite(weights, node)
    if not float(F.cosine_similarity(weights.tensors[SIGNATURE].float().cpu(), own, 0)) >= LEAST_LIKENESS:
        raise ValueError(f"{node}: {weights.name} was made for another VAE of the same layout ({anatomy.family}), such as "
                         "that of SD1.5 instead of SDXL. Load the VAE it was trained on, or train experts for this one.")
    return anatomy


def inference_patcher(weights: Weights, anatomy: VaeAnatomy) -> "ModelPatcher":
    """Return the experts of a file as a model that the host loads beside others; made once for each object of weights."""

    def build(**factory: Any) -> DetailExperts:
        return DetailExperts(anatomy.sites, weights.config["size"], weights.config["window"], **factory)

    return weights.once(KIND, lambda: inference_module(build, part_of(weights.tensors, DAEM)))


def _expected(anatomy: VaeAnatomy, size: str, window: int) -> dict[str, Tensor]:
    with torch.device("meta"):
        return {DAEM + name: tensor for name, tensor in DetailExperts(anatomy.sites, size, window, nn).state_dict().items()}
