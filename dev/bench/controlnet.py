"""The host's ControlNet on the lab's UNet, trained like an adapter, to measure adapters against."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import comfy.cldm.cldm
import comfy.ops

from ...lab.denoisers import UNET
from ...model_patches.host import WrappersMP, for_training
from ...model_patches.lq_condition import LatentCondition
from ...training.denoising import Denoising
from ...training.restoration_adapter import RestorationAdapterTrainee
from ...training.trainee import Models

PIXELS_TO_A_CELL = 8


class ControlNetTrainee(RestorationAdapterTrainee):
    """A copy of the UNet's encoder that reads the degraded pixels, as published: zero convolutions into every skip and the middle."""

    def __init__(self, models: Models, seed: int) -> None:
        torch.manual_seed(seed)
        config = {k: v for k, v in UNET.items() if k not in ("out_channels", "transformer_depth_output")}
        self.kind, self.family, self.config = "controlnet", "lab", {}
        self.models, self.lora, self.encoder = models, None, None
        self.network = comfy.cldm.cldm.ControlNet(**config, hint_channels=3, dtype=torch.float32, operations=comfy.ops.manual_cast)
        _start(self.network, models.model.model.diffusion_model)

    @contextmanager
    def attach(self, models: Models) -> Iterator[None]:
        """Hang it on the model; the degraded pixels come with each evaluation."""
        self.condition = PixelCondition("mend_training", torch.empty(0))
        self.denoising = Denoising(models, self._conditioned(self.condition))
        self.network.to(models.model.load_device)
        yield

    def state_dict(self) -> dict[str, Tensor]:
        """Return its weights."""
        return dict(self.network.state_dict())

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""
        self.network.load_state_dict(tensors)

    def restoring(self, pictures: Tensor) -> Any:
        """The model as it restores these pictures."""
        return self._conditioned(PixelCondition("mend_validation", _folded(pictures)))

    def _conditioned(self, condition: LatentCondition) -> Any:
        patched = for_training(self.models.model)
        patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, condition.key, condition.sampler_sample)

        def apply_model(executor: Any, x: Tensor, t: Tensor, c_concat: Any, c_crossattn: Tensor, control: Any, options: dict, **kwargs: Any) -> Tensor:
            hint = F.pixel_shuffle(condition.take(kwargs, x)[0], PIXELS_TO_A_CELL)
            sampling = executor.class_obj.model_sampling
            control = self.network(sampling.calculate_input(t, x), hint, sampling.timestep(t).float(), c_crossattn.to(x))
            return executor(x, t, c_concat, c_crossattn, control, options, **kwargs)

        patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, condition.key, apply_model)
        return patched

    def _extra(self, pictures: Tensor, latents: Tensor) -> dict[str, Any]:
        folded = _folded(pictures).to(latents.device)
        return {self.condition.key: torch.cat([folded, torch.ones_like(folded[:, :1])], 1)}


class PixelCondition(LatentCondition):
    """Pixels folded into cells ride along the conditioning as a latent does."""

    def __init__(self, key: str, folded: Tensor) -> None:
        super().__init__(key, folded, None, "ControlNet")

    def fitted(self, noise: Tensor) -> Tensor:
        """Return the folded pixels and the mask that nobody reads."""
        return torch.cat([self.c_lq, torch.ones_like(self.c_lq[:, :1])], 1).to(noise.device)


def _folded(pictures: Tensor) -> Tensor:
    return F.pixel_unshuffle(pictures[..., :3].movedim(-1, 1), PIXELS_TO_A_CELL)


def _start(network: nn.Module, unet: nn.Module) -> None:
    """Copies of the UNet's own weights, zero convolutions at zero, the hint's layers as torch would make them but the last, which is zero."""
    given = unet.state_dict()
    with torch.no_grad():
        for name, p in network.named_parameters():
            if name in given:
                p.copy_(given[name])
            elif name.startswith(("zero_convs", "middle_block_out", "input_hint_block.14")) or p.ndim == 1:
                p.zero_()
            else:
                nn.init.kaiming_uniform_(p, a=5**0.5)
