"""What can be trained: one entry for every kind of weights.

An entry is a pair of functions, each of which is imported when it is called:

    KINDS["fusion"] = Kind(trainee=_later("fusion", "FusionTrainee"), new=_later("fusion", "fresh_fusion"))

`trainee` gets weights that it may keep and change, and the models they will be trained on; `new` makes fresh weights for them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from typing import Any

import torch

from ..model_patches.host_vae import check_latent_channels
from ..model_patches.weights_file import Weights, in_words
from .trainee import NODE, Models, Trainee


@dataclass(frozen=True)
class Kind:
    """How to train one kind of weights.

    Attributes:
        trainee: (weights, models) -> Trainee; raises ValueError for models that are missing or do not fit.
        new: (models, config) -> fresh weights; raises ValueError for a config that makes no sense or models that do not fit.
    """

    trainee: Callable[[Weights, Models], Trainee]
    new: Callable[[Models, Mapping[str, Any]], Weights]


def _later(module: str, name: str) -> Callable:
    """A function or class of a module of this package, imported when it is called."""
    return lambda *given: getattr(import_module(f".{module}", __package__), name)(*given)


def _without_models(make: Callable[[Mapping[str, Any]], Weights]) -> Callable[[Models, Mapping[str, Any]], Weights]:
    return lambda models, config: make(config)


KINDS: dict[str, Kind] = {
    "restoration_adapter": Kind(_later("restoration_adapter", "RestorationAdapterTrainee"), _later("restoration_adapter", "new_adapter")),
    "learned_prompt": Kind(_later("learned_prompt", "LearnedPromptTrainee"), _later("learned_prompt", "new_learned_prompt")),
    "learned_prompt_conditioning": Kind(_later("learned_prompt", "LearnedConditioningTrainee"), _later("learned_prompt", "new_learned_conditioning")),
    "degradation_tokenizer": Kind(
        _later("degradation_tokenizer", "DegradationTokenizerTrainee"), _without_models(_later("degradation_tokenizer", "new_tokenizer"))),
    "degradation_estimator": Kind(
        _later("degradation_estimator", "DegradationEstimatorTrainee"), _without_models(_later("degradation_estimator", "estimator_from_config"))),
    "degradation_model": Kind(_later("degradation_model", "DegradationTrainee"), _later("degradation_model", "new_model")),
    "fusion": Kind(_later("fusion", "FusionTrainee"), _later("fusion", "fresh_fusion")),
    "detail_experts": Kind(_later("detail_experts", "DetailExpertsTrainee"), _later("detail_experts", "new_experts")),
}  # fmt: skip


def trainee_of(weights: Weights, models: Models) -> Trainee:
    """Return something that can be trained and starts from these weights, which stay what they are. Works within the host's inference mode.

    Raises:
        ValueError: for a kind that cannot be trained, and for models that are missing or do not fit.
    """
    kind = _known(weights.kind)
    if models.model is not None and models.vae is not None:
        check_latent_channels(models.vae, models.model.model, NODE)
    with torch.inference_mode(False):
        tensors = {name: tensor.detach().cpu().clone() for name, tensor in weights.tensors.items()}
        return kind.trainee(replace(weights, tensors=tensors), models)


def new_weights(kind: str, models: Models, config: Mapping[str, Any]) -> Weights:
    """Return fresh weights of a kind for the user's models.

    Raises:
        ValueError: for a kind that cannot be trained, and for a config that makes no sense.
    """
    return _known(kind).new(models, config)


def _known(kind: str) -> Kind:
    if kind not in KINDS:
        raise ValueError(f"weights of the kind {in_words(kind)} cannot be trained; there are "
                         f"{', '.join(sorted(KINDS))}.")
    return KINDS[kind]
