"""Hang Restoration Adapters and their LoRA on a host model, and make new ones for it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, Site, anatomy_of
from .blocks import visit_blocks
from .conditioned_patch import ConditionedPatch
from .diffusion_adapter import DiffusionAdapter, lora_tensors
from .host import inference_module, trained_operations
from .lq_condition import LatentCondition
from .restoration_adapter import KERNELS, RestorationAdapter, adapter_sites, initialise
from .robust_encoder import ENCODER
from .weights_file import Weights

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

KIND = "restoration_adapter"
ADAPTER = "adapter."


def new_weights(model: "BaseModel", size: str, rank: int, seed: int) -> Weights:
    """Make an untrained adapter for a model, which leaves it as it is.

    Args:
        model: the host's.
        size: one of restoration_adapter.KERNELS; "none" for LoRA alone.
        rank: of the LoRA; 0 for none.
        seed: of the weights that do not start at zero.
    """
    anatomy = anatomy_of(model)
    generator = torch.Generator().manual_seed(seed)
    tensors: dict[str, Tensor] = {}
    if size != "none":
        network = RestorationAdapter(anatomy, size, trained_operations)
        initialise(network, generator)
        tensors |= {ADAPTER + name: tensor.detach() for name, tensor in network.state_dict().items()}
    if rank:
        lora = DiffusionAdapter(model, rank)
        lora.initialise(generator)
        tensors |= {name: tensor.detach() for name, tensor in lora.native().items()}
    return Weights(KIND, anatomy.family, {"size": size, "rank": rank}, tensors, f"the new adapter for {anatomy.family}")


def check_fit(weights: Weights, model: "BaseModel", node: str) -> Anatomy:
    """Check that weights were made for this model, and return the model's anatomy.

    Raises:
        ValueError: naming the node, the weights and both kinds, both families, or the first tensor that does not fit. Equal shapes are not
            enough: SD1.5 and SD2 have them.
    """
    anatomy = check_family(weights, KIND, model, node)
    if weights.config.get("size") not in (*KERNELS, "none") or not isinstance(weights.config.get("rank"), int):
        raise ValueError(f"{node}: {weights.name} describes itself as {weights.config}, and a size ({', '.join(KERNELS)} or none) and a "
                         "rank were expected. Update the pack, or save the file again.")
    check_shapes(weights, expected_tensors(anatomy, weights.config, model), anatomy, node)
    return anatomy


def check_family(weights: Weights, kind: str, model: "BaseModel", node: str) -> Anatomy:
    """Check kind and family of weights, and return the model's anatomy.

    Raises:
        ValueError: naming the node, the weights and both kinds or both families.
    """
    weights.expect(kind, node)
    try:
        anatomy = anatomy_of(model)
    except ValueError as error:
        raise ValueError(f"{node}: 'model': {error}") from error
    if weights.family != anatomy.family:
        raise ValueError(f"{node}: {weights.name} was made for {weights.family}, and 'model' is {anatomy.family}. "
                         "Load the model it was trained on, or train one for this.")
    return anatomy


def check_shapes(weights: Weights, expected: dict[str, Tensor], anatomy: Anatomy, node: str) -> None:
    """Check names and shapes of all tensors but those of an encoder, which have to fit a VAE and not the model.

    Raises:
        ValueError: naming the node, the weights and the first tensor that does not fit.
    """
    wanted = {name: tensor.shape for name, tensor in expected.items()}
    found = {name: tensor.shape for name, tensor in weights.tensors.items() if not name.startswith(ENCODER)}
    wrong = sorted(name for name in wanted.keys() | found.keys() if wanted.get(name) != found.get(name))
    if wrong:
        shapes = f"{wrong[0]} is {_shape(found.get(wrong[0]))}, expected {_shape(wanted.get(wrong[0]))}"
        raise ValueError(f"{node}: {weights.name} does not fit 'model' ({anatomy.family}): {shapes}. "
                         "The file is incomplete or was made for another model of that family.")


def expected_tensors(anatomy: Anatomy, config: dict[str, Any], model: "BaseModel") -> dict[str, Tensor]:
    """Return empty tensors under the names and with the shapes that a file of this config has for a model."""
    tensors: dict[str, Tensor] = {}
    with torch.device("meta"):
        if config["size"] != "none":
            network = RestorationAdapter(anatomy, config["size"], nn)
            tensors |= {ADAPTER + name: tensor for name, tensor in network.state_dict().items()}
        if config["rank"]:
            tensors |= DiffusionAdapter(model, config["rank"]).native()
    return tensors


class AdapterPatch(ConditionedPatch):
    """One use of an adapter on a model.

    Args:
        network: its weights, shared by all uses.
        anatomy: of the model.
        condition: the degraded latent.
        strength: of what the adapters add.
        start_percent, end_percent: the part of sampling in which they act.
    """

    def __init__(self, network: RestorationAdapter, anatomy: Anatomy, condition: LatentCondition, strength: float = 1.0,
                 start_percent: float = 0.0, end_percent: float = 1.0) -> None:
        super().__init__(condition, strength, start_percent, end_percent)
        self.network, self.anatomy = network, anatomy

    def attach(self, patcher: "ModelPatcher") -> None:
        """Hang it on a clone that is the caller's own."""
        self.listen(patcher)
        visit_blocks(patcher, self.anatomy, adapter_sites(self.anatomy), self.condition.key, self._visit)

    def opened(self, c_lq: Tensor, mask: Tensor, model_sampling: Any, sigma: Tensor) -> "_Evaluation":
        """What the adapters hand from one to the next starts empty."""
        return _Evaluation(c_lq, mask)

    def _visit(self, site: Site, x_t: Tensor, emb: Tensor, options: dict) -> Tensor:
        evaluation = options[self.condition.key]
        if evaluation.feature is None:
            evaluation.feature = self.network.embed(evaluation.c_lq.to(x_t))
        picture, rest = self._picture(x_t, evaluation.feature)
        change, evaluation.feature = self.network.adapters[site.name](evaluation.feature, picture, emb.to(x_t))
        picture = picture + self.strength * self.network.weigh(evaluation.mask.to(x_t), picture) * change
        return picture if rest is None else torch.cat([picture, rest], 1)

    def _picture(self, x_t: Tensor, feature: Tensor) -> tuple[Tensor, Tensor | None]:
        """Part the tokens of the picture itself from those of reference pictures behind them."""
        if not self.network.tokens or x_t.shape[1] == feature.shape[1]:
            return x_t, None
        return x_t[:, :feature.shape[1]], x_t[:, feature.shape[1]:]


class _Evaluation:
    """What one evaluation of the model knows: the degraded latent, the mask, and the LQ feature as the last adapter left it."""

    def __init__(self, c_lq: Tensor, mask: Tensor) -> None:
        self.c_lq, self.mask = c_lq, mask
        self.feature: Tensor | None = None


def inference_patcher(weights: Weights, anatomy: Anatomy) -> "ModelPatcher":
    """Return the adapters of a file as a model that the host loads beside others; made once for each object of weights."""
    tensors = {name.removeprefix(ADAPTER): tensor for name, tensor in weights.tensors.items() if name.startswith(ADAPTER)}

    def build(**factory: Any) -> RestorationAdapter:
        return RestorationAdapter(anatomy, weights.config["size"], **factory)

    return weights.once(f"{KIND} {anatomy.family}", lambda: inference_module(build, tensors))


def lora_of(weights: Weights) -> dict[str, Tensor]:
    """Return the LoRA of a file in the host's keys; empty if it has none or none that would change anything."""
    tensors = lora_tensors(weights.tensors)
    return tensors if any(tensor.any() for name, tensor in tensors.items() if name.endswith("lora_B.weight")) else {}


def _shape(shape: torch.Size | None) -> str:
    return "missing" if shape is None else "x".join(str(side) for side in shape) or "a number"
