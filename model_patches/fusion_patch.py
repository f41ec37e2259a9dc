"""Hang degradation-aware feature fusion and its LoRA on a host model, and make new ones for it."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .anatomy import Anatomy, anatomy_of
from .blocks import changed_picture, visit_entry
from .conditioned_patch import ConditionedPatch
from .config_values import whole_number
from .daff import DAFF, PRESETS, initialise, layout_of
from .diffusion_adapter import new_lora
from .fine_tune import FineTune, model_change
from .fit import check_family, check_finite, check_shapes
from .host import inference_module, model_times, trained_operations
from .lq_condition import FeatureCondition
from .lq_encoder import check_feature_width, lq_encoder_tensors
from .robust_encoder import ENCODER
from .weights_file import Weights, part_of

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

KIND = "fusion"
FUSION = "fusion."
TIMES = 1000


def new_fusion(model: "BaseModel", features: int, preset: str = "lite", seed: int = 0, single: bool = True) -> Weights:
    """Make an untrained fusion for a model, which leaves it as it is; without LoRA.

    Args:
        model: the host's.
        features: channels of the VAE encoder's features.
        preset: one of daff.PRESETS.
        seed: of the weights that do not start at zero.
        single: False leaves the single-stream block out.

    Raises:
        ValueError: for a model whose architecture is not known.
    """
    anatomy = anatomy_of(model)
    network = DAFF(layout_of(anatomy, preset, features, single), trained_operations)
    initialise(network, torch.Generator().manual_seed(seed))
    tensors = {FUSION + name: tensor.detach() for name, tensor in network.state_dict().items()}
    config = {"preset": preset, "features": features, "single": single, "rank": 0}
    return Weights(KIND, anatomy.family, config, tensors, f"the new fusion for {anatomy.family}")


def grown(weights: Weights, model: "BaseModel", vae: "VAE", rank: int, train_encoder: bool, seed: int, fine_tune: bool = False) -> Weights:
    """Return a fusion that will learn more than before: with the model's own weights and the LQ encoder, where they are asked for.

    None of it changes anything before it is trained.

    Args:
        weights: what they have learned is kept.
        model, vae: the host's.
        rank: of the LoRA; 0 leaves it out, or as it is.
        train_encoder: put a copy of the VAE's encoder into the file, to learn along.
        seed: of the LoRA's down factors.
        fine_tune: whether all weights of the model learn, in place of a LoRA.

    Raises:
        ValueError: for a LoRA of another rank or beside a fine-tune, and a VAE that does not fit.
    """
    check_feature_width(vae, weights.config["features"])
    tensors, config = dict(weights.tensors), dict(weights.config)
    if fine_tune and config["rank"]:
        raise ValueError(f"has a LoRA of rank {config['rank']}, and fine_tune would stand in its place. Turn fine_tune off, or begin with a "
                         "fusion without LoRA.")
    if fine_tune and not config.get("fine_tune"):
        tensors |= {name: tensor.detach() for name, tensor in FineTune(model).native().items()}
        config["fine_tune"] = True
    rank = 0 if config.get("fine_tune") else rank
    if rank and config["rank"] not in (0, rank):
        raise ValueError(f"has a LoRA of rank {config['rank']} already. Set the rank to that, or to 0 to leave it as it is.")
    if rank and not config["rank"]:
        tensors |= new_lora(model, rank, torch.Generator().manual_seed(seed))
        config["rank"] = rank
    if train_encoder and not any(name.startswith(ENCODER) for name in tensors):
        tensors |= lq_encoder_tensors(vae)
    return Weights(weights.kind, weights.family, config, tensors, weights.name)


def check_fit(weights: Weights, model: "BaseModel", node: str) -> Anatomy:
    """Check that weights were made for this model, and return the model's anatomy.

    Raises:
        ValueError: naming the node, the weights and both kinds, both families, or the first tensor that does not fit.
    """
    anatomy = check_family(weights, KIND, model, node)
    config = weights.config
    numbers = [config.get("features"), config.get("rank")]
    tuned = config.get("fine_tune", False)
    whole = all(map(whole_number, numbers)) and isinstance(tuned, bool) and not (tuned and numbers[1])
    if config.get("preset") not in PRESETS or not isinstance(config.get("single"), bool) or not whole or not numbers[0]:
        raise ValueError(f"{node}: {weights.name} describes itself as {config}, and a preset ({', '.join(PRESETS)}), features, single and "
                         "a rank or fine_tune were expected. Update the pack, or save the file again.")
    check_shapes(weights, expected_tensors(anatomy, config, model), node)
    check_finite(weights, node)
    return anatomy


def expected_tensors(anatomy: Anatomy, config: dict[str, Any], model: "BaseModel") -> dict[str, Tensor]:
    """Return empty tensors under the names and with the shapes that a file of this config has for a model, without an encoder's."""
    with torch.device("meta"):
        network = network_of(anatomy, config, operations=nn)
        tensors = {FUSION + name: tensor for name, tensor in network.state_dict().items()}
        change = model_change(model, config)
        return tensors if change is None else tensors | change.native()


def network_of(anatomy: Anatomy, config: dict[str, Any], **factory: Any) -> DAFF:
    """Build the network that a config describes; its weights are still empty."""
    return DAFF(layout_of(anatomy, config["preset"], config["features"], config["single"]), **factory)


@dataclass(frozen=True)
class _Evaluation:
    """What one evaluation of the model knows: the condition embedding, the mask, and the time (B,) in 0..1000."""

    e: Tensor
    mask: Tensor
    time: Tensor


class FusionPatch(ConditionedPatch):
    """One use of a fusion on a model.

    Args:
        network: its weights, shared by all uses.
        anatomy: of the model.
        condition: the degraded picture's features, embedded by this network.
        strength: of what the fusion adds.
        start_percent, end_percent: the part of sampling in which it acts.
    """

    def __init__(self, network: DAFF, anatomy: Anatomy, condition: FeatureCondition, strength: float = 1.0, start_percent: float = 0.0,
                 end_percent: float = 1.0) -> None:
        super().__init__(condition, strength, start_percent, end_percent)
        self.network, self.anatomy = network, anatomy

    def attach(self, patcher: "ModelPatcher") -> None:
        """Hang it on a clone that is the caller's own."""
        self.listen(patcher)
        visit_entry(patcher, self.anatomy, self.condition.key, self._visit)

    def opened(self, c_lq: Tensor, mask: Tensor, model_sampling: Any, sigma: Tensor) -> _Evaluation:
        """Modulations follow the time."""
        return _Evaluation(c_lq, mask, model_times(model_sampling, sigma) * TIMES)

    def _visit(self, x: Tensor, options: dict) -> Tensor:
        evaluation = options[self.condition.key]
        mask = self.network.weigh(evaluation.mask.to(x))

        def fused(own: Tensor) -> Tensor:
            return own + self.strength * mask * self.network(own, evaluation.e.to(own), evaluation.time, options)

        return changed_picture(x, mask.shape[1], fused) if self.network.layout.tokens else fused(x)


def inference_patcher(weights: Weights, anatomy: Anatomy) -> "ModelPatcher":
    """Return the fusion of a file as a model that the host loads beside others; made once for each object of weights."""
    def build(**factory: Any) -> DAFF:
        return network_of(anatomy, weights.config, **factory)

    return weights.once(f"{KIND} {anatomy.family}", lambda: inference_module(build, part_of(weights.tensors, FUSION)))
