"""Training of a Restoration Adapter with its LoRA (arXiv 2502.20679, section 3.3), and of the robust encoder that may come with it."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from ..model_patches.adapter_patch import ADAPTER, AdapterPatch, check_fit, new_weights
from ..model_patches.diffusion_adapter import DiffusionAdapter, lora_tensors
from ..model_patches.errors import telling
from ..model_patches.host import for_training, sample_restoration, trained_operations
from ..model_patches.lq_condition import LatentCondition
from ..model_patches.restoration_adapter import KERNELS, RestorationAdapter
from ..model_patches.robust_encoder import ENCODER, RobustEncoder, encoder_tensors
from ..model_patches.weights_file import Weights, part_of
from .denoising import Denoising
from .trainee import NODE, Batch, Models
from .validation import VALIDATION_STEPS

TEXT_DROP, LQ_TARGET = 0.1, 0.1


def new_adapter(models: Models, config: Mapping[str, Any]) -> Weights:
    """Make fresh weights from {"size", "rank", "seed", "robust_encoder"}, of which all may be left out.

    Raises:
        ValueError: for other entries or sizes, and for missing models.
    """
    given = {"size": "full", "rank": 32, "seed": 0, "robust_encoder": False} | dict(config)
    unknown = sorted(given.keys() - {"size", "rank", "seed", "robust_encoder"})
    if unknown or given["size"] not in (*KERNELS, "none"):
        raise ValueError(f"a new restoration adapter takes size ({', '.join(KERNELS)} or none), rank, seed and robust_encoder; found {dict(config)}.")
    if models.model is None or (given["robust_encoder"] and models.vae is None):
        raise ValueError("a new restoration adapter needs a model, and a VAE for its robust encoder.")
    weights = new_weights(models.model.model, given["size"], given["rank"], given["seed"])
    if given["robust_encoder"]:
        weights.tensors.update(encoder_tensors(models.vae))
    return weights


class RestorationAdapterTrainee:
    """Adapters and LoRA learn together on the frozen denoiser.

    Args:
        weights: of the kind restoration_adapter.
        models: MODEL, CLIP and VAE.

    Raises:
        ValueError: when a model is missing or the weights do not fit it.
    """

    PREFIX = ADAPTER

    def __init__(self, weights: Weights, models: Models) -> None:
        models.require_all(NODE, "A restoration adapter")
        self.anatomy = check_fit(weights, models.model.model, NODE)
        self.kind, self.family, self.config = weights.kind, weights.family, weights.config
        self.network = RestorationAdapter(self.anatomy, self.config["size"], trained_operations) if self.config["size"] != "none" else None
        self.lora = DiffusionAdapter(models.model.model, self.config["rank"]) if self.config["rank"] else None
        robust = any(name.startswith(ENCODER) for name in weights.tensors)
        with telling(f"{NODE}: 'vae': {weights.name}"):
            self.encoder = RobustEncoder(models.vae, models.model.model, weights.tensors) if robust else None
        self.load_state_dict(weights.tensors)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the adapters' parameters, then the LoRA's, then the robust encoder's."""
        for part in (self.network, self.lora, self.encoder):
            if part is not None:
                yield from part.parameters()

    @contextmanager
    def attach(self, models: Models) -> Iterator[None]:
        """Hang them on the model; the degraded latents come with each evaluation."""
        self.models = models
        self.condition = LatentCondition("mend_training", torch.empty(0), None, NODE)
        self.denoising = Denoising(models, self._conditioned(self.condition))
        if self.encoder is not None:
            self.encoder.module.to(models.vae.device)
        with self.denoising.learning(self.network, self.lora):
            yield

    def loss(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, dict[str, float]]:
        """Denoise the clean latent, told the caption; now and then the degraded one, told what is wrong with it, so that those words can be negated."""
        clean, degraded = self.denoising.encode(batch.clean), self.denoising.encode(batch.degraded)
        condition, encoding = degraded, torch.zeros((), device=clean.device)
        if self.encoder is not None:
            condition = self._encode_robustly(batch.degraded)
            encoding = (condition - clean).square().mean()
            condition = condition.detach()
        texts, targets = [], []
        for index, generator in enumerate(generators):
            drop, lq = (torch.rand(2, generator=generator) < torch.tensor([TEXT_DROP, LQ_TARGET])).tolist()
            lq = lq and batch.words[index] != ""
            targets.append(degraded[index] if lq else clean[index])
            texts.append(batch.words[index] if lq else "" if drop else batch.captions[index])
        loss = self.denoising.loss(torch.stack(targets), texts, generators, self._extra(batch.degraded, condition))
        return loss + encoding, {"denoising": float(loss.detach()), "encoding": float(encoding.detach())}

    @torch.no_grad()
    def validate(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """Restore from pure noise with a few steps of a plain sampler."""
        rows = []
        for picture, caption, generator in zip(batch.degraded.split(1), batch.captions, generators):
            restoring = self.restoring(picture)
            noise = torch.randn((1, *self.denoising.encode(picture).shape[1:]), generator=generator)
            rows.append(sample_restoration(restoring, self.denoising.conditioning(caption), noise, VALIDATION_STEPS))
        return self.denoising.decode(torch.cat(rows), batch.clean)

    def restoring(self, pictures: Tensor) -> Any:
        """The model as it restores these pictures (B, H, W, 3), for any sampler, while this trainee is attached."""
        latents = self.denoising.encode(pictures) if self.encoder is None else self._encode_robustly(pictures)
        return self._conditioned(LatentCondition("mend_validation", latents, None, NODE))

    def _conditioned(self, condition: LatentCondition) -> Any:
        """A clone of the model whose adapters read what `condition` brings to each evaluation."""
        patched = for_training(self.models.model)
        if self.network is not None:
            AdapterPatch(self.network, self.anatomy, condition).attach(patched)
        return patched

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights as they stand in a file."""
        tensors: dict[str, Tensor] = {}
        if self.network is not None:
            tensors |= {self.PREFIX + name: tensor for name, tensor in self.network.state_dict().items()}
        if self.encoder is not None:
            tensors |= self.encoder.state_dict()
        return tensors | (self.lora.native() if self.lora is not None else {})

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""
        if self.network is not None:
            self.network.load_state_dict(part_of(tensors, self.PREFIX))
        if self.lora is not None:
            self.lora.load_native(lora_tensors(tensors))
        if self.encoder is not None:
            self.encoder.load(tensors)

    def _encode_robustly(self, pictures: Tensor) -> Tensor:
        return self.encoder.encode(pictures.movedim(-1, 1)).to(self.models.model.load_device)

    def _extra(self, pictures: Tensor, latents: Tensor) -> dict[str, Any]:
        """What an evaluation in training is given of the degraded pictures."""
        if self.network is None:
            return {}
        return {self.condition.key: torch.cat([latents, torch.ones_like(latents[:, :1])], 1)}
