"""Training of degradation-aware feature fusion (UniLDiff, arXiv 2507.23685): first the fusion alone, then denoiser and LQ encoder with it.

What is trained is what the weights hold: with neither LoRA (rank 0) nor fine-tune nor encoder it is the first stage. In the second the paper
trains the whole denoiser, as a fine-tune does; a LoRA stands for it where that is too much. Several degradations in the data are drawn with
equal chance, as the paper draws its tasks.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.amp import autocast

from ..model_patches.config_values import one_of, whole_number
from ..model_patches.daff import PRESETS
from ..model_patches.encoder_features import feature_channels
from ..model_patches.errors import telling
from ..model_patches.fine_tune import FINE_TUNE_RATE, FineTune, model_change
from ..model_patches.fusion_patch import FUSION, FusionPatch, check_fit, grown, network_of, new_fusion
from ..model_patches.host import for_training, trained_operations
from ..model_patches.lq_condition import FeatureCondition, LatentCondition
from ..model_patches.lq_encoder import LQEncoder, check_feature_width, frozen_features
from ..model_patches.robust_encoder import ENCODER
from ..model_patches.weights_file import Weights, load_weights
from .restoration_adapter import RestorationAdapterTrainee
from .trainee import NODE, Batch, Models

TEXT_DROP = 0.2
# Learning rates of the LQ encoder and of a LoRA beside that of the rest.
ENCODER_RATE, LORA_RATE = 0.1, 0.3
NEW = {"preset": "lite", "rank": 0, "seed": 0, "train_encoder": False, "fine_tune": False, "single": True, "start": ""}


def fresh_fusion(models: Models, config: Mapping[str, Any]) -> Weights:
    """Make fresh weights from {"preset", "rank", "seed", "train_encoder", "fine_tune", "single", "start"}, of which all may be left out.

    "start" is the path of a file from stage 1a; what it has learned is kept, and preset and single are its own.

    Raises:
        ValueError: for other entries or presets, for missing models, and for a file that does not fit.
    """
    given = NEW | dict(config)
    fit = one_of(given["preset"], PRESETS) and all(whole_number(given[name]) for name in ("rank", "seed"))
    of_kind = all(isinstance(given[name], type(NEW[name])) for name in ("train_encoder", "fine_tune", "single", "start"))
    if given.keys() - NEW.keys() or not fit or not of_kind:
        raise ValueError(f"a new fusion takes preset ({', '.join(PRESETS)}), rank, seed, train_encoder, fine_tune, single and start; "
                         f"found {dict(config)}.")
    if models.model is None or models.vae is None:
        raise ValueError("a new fusion needs a model and its VAE.")
    model = models.model.model
    if given["start"]:
        weights = load_weights(Path(given["start"]).expanduser())
        check_fit(weights, model, "start")
    else:
        weights = new_fusion(model, feature_channels(models.vae), given["preset"], given["seed"], given["single"])
    with telling(weights.name):
        return grown(weights, model, models.vae, given["rank"], given["train_encoder"], given["seed"], given["fine_tune"])


class FusionTrainee(RestorationAdapterTrainee):
    """The fusion learns on the denoiser, with a LoRA or all of its weights and the LQ encoder where there are any.

    Args:
        weights: of the kind fusion.
        models: MODEL, CLIP and VAE.

    Raises:
        ValueError: when a model is missing or the weights do not fit it.
    """

    PREFIX = FUSION

    def __init__(self, weights: Weights, models: Models) -> None:
        models.require_all(NODE, "A fusion")
        self.models, self.anatomy = models, check_fit(weights, models.model.model, NODE)
        self.kind, self.family, self.config = weights.kind, weights.family, weights.config
        self.network = network_of(self.anatomy, self.config, operations=trained_operations)
        self.lora = model_change(models.model.model, self.config)
        learns = any(name.startswith(ENCODER) for name in weights.tensors)
        with telling(f"{NODE}: 'vae': {weights.name}"):
            check_feature_width(models.vae, self.config["features"])
            self.encoder = LQEncoder(models.vae, models.model.model, weights.tensors) if learns else None
        self.load_state_dict(weights.tensors)

    def rate_factors(self) -> list[float]:
        """The LQ encoder and a fine-tune learn at a tenth of the rate, a LoRA at three tenths: what the model knows should outlive the training."""
        change = FINE_TUNE_RATE if isinstance(self.lora, FineTune) else LORA_RATE
        parts = ((self.network, 1.0), (self.lora, change), (self.encoder, ENCODER_RATE))
        return [rate for part, rate in parts if part is not None for _ in part.parameters()]

    def loss(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, dict[str, float]]:
        """Denoise the clean latent beside the degraded picture: mean absolute error of the model's own output."""
        texts = []
        for caption, generator in zip(batch.captions, generators):
            dropped = float(torch.rand((), generator=generator)) < TEXT_DROP
            texts.append("" if dropped else caption)
        e = self.network.embed(self._features(batch.degraded))
        loss = self.denoising.loss(self.denoising.encode(batch.clean), texts, generators, self._extra(batch.degraded, e), absolute=True)
        return loss, {"denoising": float(loss.detach())}

    def restoring(self, pictures: Tensor) -> Any:
        """The model as it restores these pictures (B, H, W, 3), for any sampler, while this trainee is attached."""
        return self._conditioned(FeatureCondition("mend_validation", self._features(pictures), None, NODE, self.network.embed))

    def _conditioned(self, condition: LatentCondition) -> Any:
        patched = for_training(self.models.model)
        FusionPatch(self.network, self.anatomy, condition).attach(patched)
        return patched

    def _features(self, pictures: Tensor) -> Tensor:
        if self.encoder is None:
            with autocast(self.models.model.load_device.type, enabled=False):  # as the VAE's features are in use
                found = frozen_features(self.models.vae, pictures)
        else:
            found = self.encoder.features(pictures)
        return found.to(self.models.model.load_device)
