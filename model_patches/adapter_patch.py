"""Hang Restoration Adapters and their LoRA on a host model, and make new ones for it."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, Site, anatomy_of
from .blocks import changed_picture, visit_blocks
from .conditioned_patch import ConditionedPatch
from .diffusion_adapter import DiffusionAdapter, new_lora
from .fit import check_family, check_shapes
from .host import inference_module, trained_operations
from .lq_condition import LatentCondition
from .restoration_adapter import KERNELS, RestorationAdapter, adapter_sites, initialise
from .weights_file import Weights, part_of

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
    tensors |= new_lora(model, rank, generator)
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
    check_shapes(weights, expected_tensors(anatomy, weights.config, model), node)
    return anatomy


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
        if not evaluation.features:
            evaluation.features["stem"] = self.network.embed(evaluation.c_lq.to(x_t))

        def adapted(picture: Tensor) -> Tensor:
            change = self.network.change(site.name, evaluation.features, picture, emb.to(picture))
            return picture + self.strength * self.network.weigh(evaluation.mask.to(picture), picture) * change

        tokens = next(reversed(evaluation.features.values())).shape[1]
        return changed_picture(x_t, tokens, adapted) if self.network.tokens else adapted(x_t)


class _Evaluation:
    """What one evaluation of the model knows: the degraded latent, the mask, and the LQ features that stem and adapters have made of it."""

    def __init__(self, c_lq: Tensor, mask: Tensor) -> None:
        self.c_lq, self.mask = c_lq, mask
        self.features: dict[str, Tensor] = {}


def inference_patcher(weights: Weights, anatomy: Anatomy) -> "ModelPatcher":
    """Return the adapters of a file as a model that the host loads beside others; made once for each object of weights."""
    def build(**factory: Any) -> RestorationAdapter:
        return RestorationAdapter(anatomy, weights.config["size"], **factory)

    return weights.once(f"{KIND} {anatomy.family}", lambda: inference_module(build, part_of(weights.tensors, ADAPTER)))
