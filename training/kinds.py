"""What can be trained: one entry for every kind of weights.

An entry is a pair of functions, each of which imports what it needs when it is called:

    KINDS["restoration_adapter"] = Kind(trainee=_adapter_trainee, new=_new_adapter)

`trainee` gets weights that it may keep and change, and the models they will be trained on; `new` makes fresh weights for them.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch

from ..model_patches.weights_file import Weights
from .trainee import Models, Trainee


@dataclass(frozen=True)
class Kind:
    """How to train one kind of weights.

    Attributes:
        trainee: (weights, models) -> Trainee; raises ValueError for models that are missing or do not fit.
        new: (models, config) -> fresh weights; raises ValueError for a config that makes no sense or models that do not fit.
    """

    trainee: Callable[[Weights, Models], Trainee]
    new: Callable[[Models, Mapping[str, Any]], Weights]


def _adapter_trainee(weights: Weights, models: Models) -> Trainee:
    from .restoration_adapter import RestorationAdapterTrainee

    return RestorationAdapterTrainee(weights, models)


def _new_adapter(models: Models, config: Mapping[str, Any]) -> Weights:
    from .restoration_adapter import new_adapter

    return new_adapter(models, config)


def _experts_trainee(weights: Weights, models: Models) -> Trainee:
    from .detail_experts import DetailExpertsTrainee

    return DetailExpertsTrainee(weights, models)


def _new_experts(models: Models, config: Mapping[str, Any]) -> Weights:
    from .detail_experts import new_experts

    return new_experts(models, config)


def _prompt_trainee(weights: Weights, models: Models) -> Trainee:
    from .learned_prompt import LearnedPromptTrainee

    return LearnedPromptTrainee(weights, models)


def _new_prompt(models: Models, config: Mapping[str, Any]) -> Weights:
    from .learned_prompt import new_learned_prompt

    return new_learned_prompt(models, config)


def _conditioning_trainee(weights: Weights, models: Models) -> Trainee:
    from .learned_prompt import LearnedConditioningTrainee

    return LearnedConditioningTrainee(weights, models)


def _new_conditioning(models: Models, config: Mapping[str, Any]) -> Weights:
    from .learned_prompt import new_learned_conditioning

    return new_learned_conditioning(models, config)


def _degradation_trainee(weights: Weights, models: Models) -> Trainee:
    from .degradation_model import DegradationTrainee

    return DegradationTrainee(weights, models)


def _new_degradation_model(models: Models, config: Mapping[str, Any]) -> Weights:
    from .degradation_model import new_model

    return new_model(models, config)


def _fusion_trainee(weights: Weights, models: Models) -> Trainee:
    from .fusion import FusionTrainee

    return FusionTrainee(weights, models)


def _new_fusion(models: Models, config: Mapping[str, Any]) -> Weights:
    from .fusion import fresh_fusion

    return fresh_fusion(models, config)


def _tokenizer_trainee(weights: Weights, models: Models) -> Trainee:
    from .degradation_tokenizer import DegradationTokenizerTrainee

    return DegradationTokenizerTrainee(weights, models)


def _new_tokenizer(models: Models, config: Mapping[str, Any]) -> Weights:
    from .degradation_tokenizer import new_tokenizer

    return new_tokenizer(config)


def _estimator_trainee(weights: Weights, models: Models) -> Trainee:
    from .degradation_estimator import DegradationEstimatorTrainee

    return DegradationEstimatorTrainee(weights, models)


def _new_estimator(models: Models, config: Mapping[str, Any]) -> Weights:
    from .degradation_estimator import estimator_from_config

    return estimator_from_config(config)


KINDS: dict[str, Kind] = {
    "degradation_tokenizer": Kind(_tokenizer_trainee, _new_tokenizer),
    "degradation_estimator": Kind(_estimator_trainee, _new_estimator),
    "degradation_model": Kind(_degradation_trainee, _new_degradation_model),
    "restoration_adapter": Kind(_adapter_trainee, _new_adapter),
    "detail_experts": Kind(_experts_trainee, _new_experts),
    "learned_prompt": Kind(_prompt_trainee, _new_prompt),
    "learned_prompt_conditioning": Kind(_conditioning_trainee, _new_conditioning),
    "fusion": Kind(_fusion_trainee, _new_fusion),
}


def trainee_of(weights: Weights, models: Models) -> Trainee:
    """Return something that can be trained and starts from these weights, which stay what they are. Works within the host's inference mode.

    Raises:
        ValueError: for a kind that cannot be trained, and for models that are missing or do not fit.
    """
    kind = _known(weights.kind)
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
        raise ValueError(f"weights of the kind {kind.replace('_', ' ')} cannot be trained; there are "
                         f"{', '.join(sorted(KINDS)) or 'none yet'}.")
    return KINDS[kind]
