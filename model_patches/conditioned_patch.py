"""What patches that read the degraded picture share: it comes with the host's conditioning, and counts in a part of sampling."""

from abc import ABC, abstractmethod
from typing import TYPE_CHECKING, Any

from torch import Tensor

from .host import WrappersMP
from .lq_condition import LatentCondition
from .percents import acts

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher


class ConditionedPatch(ABC):
    """One use of a network on a model.

    Args:
        condition: the degraded picture.
        strength: of what the network adds.
        start_percent, end_percent: the part of sampling in which it acts.
    """

    def __init__(self, condition: LatentCondition, strength: float, start_percent: float, end_percent: float) -> None:
        self.condition, self.strength, self.start_percent, self.end_percent = condition, strength, start_percent, end_percent

    def listen(self, patcher: "ModelPatcher") -> None:
        """Have the condition come to every evaluation of the model."""
        key = self.condition.key
        patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, key, self.condition.outer_sample)
        patcher.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, key, self.condition.sampler_sample)
        patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, self._apply_model)

    @abstractmethod
    def opened(self, c_lq: Tensor, mask: Tensor, model_sampling: Any, sigma: Tensor) -> object:
        """Return what one evaluation of the model knows; it lives in that evaluation's transformer_options, under the condition's key."""

    def _apply_model(self, executor: Any, x: Tensor, t: Tensor, c_concat: Any, c_crossattn: Any, control: Any, transformer_options: dict,
                     **kwargs: Any) -> Tensor:
        held, sampling = self.condition.take(kwargs, x), executor.class_obj.model_sampling
        if held is not None and acts(self.start_percent, self.end_percent, sampling, t):
            transformer_options = {**transformer_options, self.condition.key: self.opened(*held, sampling, t)}
        return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
