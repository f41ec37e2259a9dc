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


KINDS: dict[str, Kind] = {"restoration_adapter": Kind(_adapter_trainee, _new_adapter)}


def trainee_of(weights: Weights, models: Models) -> Trainee:
    """Return something that can be trained and starts from these weights, which stay what they are. Works within the host's inference mode.

    Raises:
        ValueError: for a kind that cannot be trained, and for models that are missing or do not fit.
    """
    kind = _known(weights.kind)
    with torch.inference_mode(False):
        return kind.trainee(replace(weights, tensors={name: tensor.detach().cpu().clone() for name, tensor in weights.tensors.items()}), models)


def new_weights(kind: str, models: Models, config: Mapping[str, Any]) -> Weights:
    """Return fresh weights of a kind for the user's models.

    Raises:
        ValueError: for a kind that cannot be trained, and for a config that makes no sense.
    """
    return _known(kind).new(models, config)


def _known(kind: str) -> Kind:
    if kind not in KINDS:
        raise ValueError(f"weights of the kind {kind.replace('_', ' ')} cannot be trained; there are {', '.join(sorted(KINDS)) or 'none yet'}.")
    return KINDS[kind]
