"""Training of the degradation estimator, and the bank of visual instructions that it mixes from."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..degradations.scales import SCALES, WEAKEST, Scale, from_json, recipe_of, to_json
from ..degradations.seeding import chance, uniform
from ..degradations.visual_ground import visual_ground
from ..model_patches import degradation_tokenizer as tokenizer
from ..model_patches.config_values import whole_number
from ..model_patches.degradation_estimator import BANK, NETWORK, EstimatorNetwork, check_fit, level_counts, new_weights
from ..model_patches.host import torch_device, trained_operations
from ..model_patches.weights_file import Weights, load_weights, part_of
from .seeding import mixed
from .trainee import NODE, Batch, Models

# How often a sample has no damage, and how often a further kind when it has one.
CLEAN, MORE = 0.1, 0.3
PLACE = 0.5


def new_estimator(weights: Weights, seed: int, node: str, scales: Sequence[Scale] = SCALES) -> Weights:
    """Make a fresh estimator with the bank of a tokenizer.

    Args:
        weights: the tokenizer.
        seed: decides the chart, its damage and the network's start.
        node: for messages.
        scales: what it shall tell apart.
    """
    side = tokenizer.check_fit(weights, node).chart
    chart = visual_ground(seed, side)
    damaged = [
        recipe_of({scale.kind: place}, scales).apply(chart, mixed(seed, scale.kind, place))[0]
        for scale in scales for place in range(1, len(scale.levels) + 1)
    ]  # fmt: skip
    bank = tokenizer.difference(weights, torch.cat(damaged), chart)
    config = {"scales": to_json(scales), "codebook": tokenizer.fingerprint(weights), "chart": {"seed": seed, "size": side}}
    return new_weights(bank, config, seed)


def estimator_from_config(config: Mapping[str, Any]) -> Weights:
    """Make fresh weights from {"tokenizer": a file, "seed"}; the seed may be left out.

    Raises:
        ValueError: for other entries, or a file that is no tokenizer.
    """
    whole = isinstance(config.get("tokenizer"), str) and whole_number(config.get("seed", 0))
    if config.keys() - {"tokenizer", "seed"} or not whole:
        raise ValueError(f"a new degradation estimator takes tokenizer (the file of a trained degradation tokenizer) and seed (a whole "
                         f"number); found {dict(config)}.")
    return new_estimator(load_weights(Path(config["tokenizer"]).expanduser()), config.get("seed", 0), "a new degradation estimator")


class DegradationEstimatorTrainee:
    """The network learns to tell what was done to good pictures; it damages them itself, since it has to know how. The bank stays as it is.

    Args:
        weights: of the kind degradation_estimator.
        models: none is needed.

    Raises:
        ValueError: when the weights are not whole.
    """

    def __init__(self, weights: Weights, models: Models) -> None:
        check_fit(weights, NODE)
        self.kind, self.family, self.config = weights.kind, weights.family, weights.config
        self.scales = from_json(self.config["scales"])
        self.network = EstimatorNetwork(level_counts(self.config), trained_operations)
        self.load_state_dict(weights.tensors)
        self.network.requires_grad_(True)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the network's parameters."""
        yield from self.network.parameters()

    @contextmanager
    def attach(self, models: Models) -> Iterator[None]:
        """Nothing is hung on the models."""
        self.network.to(torch_device())
        yield

    def loss(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, dict[str, float]]:
        """Damage the good pictures and ask which kinds of damage they have, and how strong those are that they have."""
        samples = [self._sample(picture, generator) for picture, generator in zip(batch.clean, generators)]
        pictures, places = (torch.stack(parts).to(next(self.parameters())) for parts in zip(*samples))
        odds, guessed = self.network(pictures.movedim(-1, 1))
        there = (places > 0).float()
        kinds = F.binary_cross_entropy_with_logits(odds, there)
        strength = (there * F.smooth_l1_loss(guessed, places, reduction="none")).sum() / there.sum().clamp(min=1)
        right = ((odds > 0) == (there > 0)).float().mean()
        return kinds + PLACE * strength, {"kinds": float(kinds.detach()), "strength": float(strength.detach()), "right": float(right)}

    @torch.no_grad()
    def validate(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the clean pictures after the damage that is found in the degraded ones, so that both can be compared."""
        odds, places = self.network(batch.degraded.movedim(-1, 1).to(next(self.parameters()))).cpu()
        rows = []
        for clean, own, where, generator in zip(batch.clean.split(1), odds, places, generators):
            found = {scale.kind: float(place) for scale, chances, place in zip(self.scales, own, where) if chances > 0}
            rows.append(recipe_of(found, self.scales).apply(clean, _seed(generator))[0])
        return torch.cat(rows)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights as they stand in a file."""
        return {NETWORK + name: tensor for name, tensor in self.network.state_dict().items()} | {BANK: self.bank}

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""
        self.network.load_state_dict(part_of(tensors, NETWORK))
        self.bank = tensors[BANK]

    def _sample(self, picture: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Damage one picture (H, W, 3); returns it with the place of each kind, 0 for those it has not."""
        order = torch.randperm(len(self.scales), generator=generator).tolist()
        count = 0 if chance(generator, CLEAN) else 1 + chance(generator, MORE) + chance(generator, MORE / 2)
        drawn = {index: uniform(generator, WEAKEST, len(self.scales[index].levels)) for index in order[:count]}
        recipe = recipe_of({self.scales[index].kind: place for index, place in drawn.items()}, self.scales)
        damaged = recipe.apply(picture[None], _seed(generator))[0][0]
        return damaged, torch.tensor([drawn.get(index, 0.0) for index in range(len(self.scales))])


def _seed(generator: torch.Generator) -> int:
    return int(torch.randint(2**63 - 1, (), generator=generator))
