"""What the training loop asks of what can be trained. The loop knows no diffusion; a trainee knows no files, ranks or optimisers."""

from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

# Whom messages name.
NODE = "Train"


@dataclass(frozen=True)
class Models:
    """The user's own models, frozen, that something is trained on; None for what a trainee does not need."""

    model: "ModelPatcher | None" = None
    clip: "CLIP | None" = None
    vae: "VAE | None" = None

    def require_all(self, node: str, learner: str) -> None:
        """Check that MODEL, CLIP and VAE are there.

        Raises:
            ValueError: naming the node and the first that is missing.
        """
        for name in ("model", "clip", "vae"):
            if getattr(self, name) is None:
                raise ValueError(f"{node}: '{name}' is not connected. {learner} learns on a model with its text encoder and VAE.")


@dataclass(frozen=True)
class Pair:
    """One training sample.

    Attributes:
        clean, degraded: (H, W, 3) in 0..1, of the same size.
        caption: what the picture shows; empty where nothing is known.
        words: what is wrong with the degraded picture, such as "noisy, compressed"; empty where nothing is known.
        chart, degraded_chart: a test chart before and after the same degradation, (side, side, 3) in 0..1; None unless the trainee wants
            charts.
        other_chart: that chart after a degradation the picture has nothing of; the clean chart where there is none such.
    """

    clean: Tensor
    degraded: Tensor
    caption: str = ""
    words: str = ""
    chart: Tensor | None = None
    degraded_chart: Tensor | None = None
    other_chart: Tensor | None = None


@dataclass(frozen=True)
class Batch:
    """Pairs of one size: clean and degraded (B, H, W, 3) in 0..1, B captions and words; charts as in Pair, (B, side, side, 3)."""

    clean: Tensor
    degraded: Tensor
    captions: tuple[str, ...]
    words: tuple[str, ...]
    chart: Tensor | None = None
    degraded_chart: Tensor | None = None
    other_chart: Tensor | None = None


class Trainee(Protocol):
    """Something with weights of its own that learns on the user's frozen models.

    Attributes:
        kind: the kind of weights, as it stands in their file.
        family: of models that they fit, as it stands in their file.
        config: everything that is not in the shapes, as it stands in their file.

    What it may have besides:
        at_step(step: int): told the number of each step before its losses.
        wants_charts: int: side in pixels of the test charts that come with its samples; 0 for none.
        prepare(pairs: Pairs, seed: int): called once, attached, before the first step of a run, to measure the data. What it finds has to
            be part of `state_dict`.
        statistics() -> Iterator[Tensor]: tensors of float32 that it changes by itself as it learns, which processes average like gradients.
        rate_factors() -> list[float]: what the learning rate is multiplied by, for each of the parameters.
    """

    kind: str
    family: str
    config: dict[str, Any]

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what is trained, always in the same order."""

    def attach(self, models: Models) -> AbstractContextManager[None]:
        """Hang the weights on the models for as long as the context is open, and leave nothing behind.

        Raises:
            ValueError: when a model is missing or does not fit; the message names the input.
        """

    def loss(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, dict[str, float]]:
        """Return the mean loss of a batch and figures for the log.

        Args:
            batch: pairs.
            generators: one a sample, which all randomness of that sample is drawn from, so that results do not depend on how samples are
                spread over batches, steps of accumulation or processes.
        """

    def validate(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the restored pictures (B, H, W, 3) in 0..1."""

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights by the names they have in their file."""

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""
