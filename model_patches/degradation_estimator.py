"""The degradation estimator: mixes a visual instruction for a damaged picture out of a bank (blind use of Defusion, arXiv 2506.16960).

The paper needs to be told the degradation. Here a bank holds the tokens of each kind of damage at each of its levels, and a small network
says which kinds a picture has and at which place between their levels.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .config_values import number, whole_number
from .fit import misfit
from .framing import rgb_pictures
from .host import inference_module, run_module, trained_operations
from .weights_file import ANY_FAMILY, Weights, part_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

KIND = "degradation_estimator"
NETWORK, BANK = "network.", "bank"
WIDTHS, HIDDEN = (32, 48, 64, 96), 128
# Pictures are looked at in windows at their own resolution, on whole JPEG blocks: noise and blur would look weaker in a picture made
# smaller.
WINDOW, WINDOWS, BLOCK = 128, 3, 8


class EstimatorNetwork(nn.Module):
    """Convolutions, of which every level reports how much there is of each feature on average and how much it varies.

    Args:
        levels: how many each kind of damage has.
    """

    def __init__(self, levels: tuple[int, ...], operations: Any, **factory: Any) -> None:
        super().__init__()
        channels = (3, *WIDTHS)
        self.down = nn.ModuleList(operations.Conv2d(a, b, 3, stride=2, padding=1, **factory) for a, b in zip(channels, WIDTHS))
        self.same = nn.ModuleList(operations.Conv2d(b, b, 3, padding=1, **factory) for b in WIDTHS)
        self.hidden = operations.Linear(2 * sum(WIDTHS), HIDDEN, **factory)
        self.out = operations.Linear(HIDDEN, 2 * len(levels), **factory)
        self.levels = levels

    def forward(self, pictures: Tensor) -> Tensor:
        """Return (2, B, kinds) of pictures (B, 3, H, W) in 0..1: the log odds that a kind is there, and its place, 0 to its last level."""
        reports = sum(self._report(window) for window in windows(pictures)) / len(windows(pictures))
        odds, places = self.out(F.silu(self.hidden(reports))).chunk(2, -1)
        return torch.stack([odds, places.sigmoid() * torch.tensor(self.levels).to(places)])

    def _report(self, x: Tensor) -> Tensor:
        x, found = 2 * x - 1, []
        for down, same in zip(self.down, self.same):
            x = F.silu(down(x))
            x = x + F.silu(same(x))
            found += [x.mean((2, 3)), (x.var((2, 3), unbiased=False) + 1e-6).sqrt()]
        return torch.cat(found, 1)


@dataclass(frozen=True)
class Finding:
    """What is thought to be wrong with one picture.

    Attributes:
        chances: of each kind of damage, (kinds,) in 0..1.
        places: how strong each would be, (kinds,): 1 is its first level.
    """

    chances: Tensor
    places: Tensor

    def present(self, least: float) -> dict[int, float]:
        """Return the places of the kinds whose chance is at least `least`, by their number."""
        return {index: float(self.places[index]) for index, chance in enumerate(self.chances) if chance >= least}


def windows(pictures: Tensor) -> list[Tensor]:
    """Cut (B, C, H, W) into up to 3 x 3 windows, spread evenly."""
    def starts(side: int) -> list[int]:
        room = max(0, side - WINDOW)
        return sorted({room * index // max(1, WINDOWS - 1) // BLOCK * BLOCK for index in range(WINDOWS)})

    rows, columns = (starts(side) for side in pictures.shape[-2:])
    return [pictures[..., top:top + WINDOW, left:left + WINDOW] for top in rows for left in columns]


def new_weights(bank: Tensor, config: dict[str, Any], seed: int = 0) -> Weights:
    """Return a fresh estimator.

    Args:
        bank: (kinds * levels, N, width) tokens, level after level of kind after kind.
        config: {"scales": [[kind, setting, [levels]], ...], "codebook": of the tokenizer, "chart": {"seed", "size"}}, plain JSON.
        seed: fixes the weights.
    """
    with torch.inference_mode(False), torch.no_grad():
        network = EstimatorNetwork(level_counts(config), trained_operations)
        generator = torch.Generator().manual_seed(seed)
        for name, p in network.named_parameters():
            p.copy_(torch.zeros(p.shape) if name.endswith("bias") else torch.randn(p.shape, generator=generator) * p[0].numel() ** -0.5)
        tensors = {NETWORK + name: tensor.clone() for name, tensor in network.state_dict().items()}
    return Weights(KIND, ANY_FAMILY, config, tensors | {BANK: bank.half()}, "a new degradation estimator")


def _scale(row: Any) -> bool:
    whole = isinstance(row, list) and len(row) == 3 and isinstance(row[2], list) and len(row[2]) > 1
    # Places between levels are on a geometric scale, which has no zero.
    return whole and all(isinstance(name, str) for name in row[:2]) and all(number(level) and level > 0 for level in row[2])


# How to tell whether an entry of the config says what it has to.
CONFIG: dict[str, Callable[[Any], bool]] = {
    "scales": lambda value: isinstance(value, list) and bool(value) and all(map(_scale, value)),
    "codebook": lambda value: isinstance(value, str),
    "chart": lambda value: isinstance(value, dict) and whole_number(value.get("seed")) and whole_number(value.get("size"), 1),
}


def check_fit(weights: Weights, node: str) -> None:
    """Check that weights are a whole estimator.

    Raises:
        ValueError: naming the node, the weights and what is wrong.
    """
    weights.expect(KIND, node)
    wrong = sorted(name for name, fits in CONFIG.items() if not fits(weights.config.get(name)))
    if wrong:
        raise ValueError(f"{node}: {weights.name} does not say its {', '.join(wrong)}, or not in a way that this pack understands. Update "
                         "the pack, or save the file again.")
    with torch.device("meta"):
        wanted = EstimatorNetwork(level_counts(weights.config), nn).state_dict()
    wrong = misfit(part_of(weights.tensors, NETWORK), wanted)
    if wrong or len(weights.tensors.get(BANK, ())) != sum(level_counts(weights.config)):
        raise ValueError(f"{node}: {weights.name} is incomplete: {NETWORK + wrong[0] if wrong else BANK} does not have the expected shape. "
                         "Load another file, or train it anew.")


def level_counts(config: dict[str, Any]) -> tuple[int, ...]:
    """Return how many levels each kind of damage has."""
    return tuple(len(levels) for _, _, levels in config["scales"])


def network_patcher(weights: Weights) -> "ModelPatcher":
    """Return the network as a model that the host loads beside others; made once for each object of weights."""
    tensors = {name: tensor.float() for name, tensor in part_of(weights.tensors, NETWORK).items()}

    def build(**factory: Any) -> EstimatorNetwork:
        return EstimatorNetwork(level_counts(weights.config), **factory)

    return weights.once(KIND, lambda: inference_module(build, tensors))


def findings(weights: Weights, pictures: Tensor, node: str) -> list[Finding]:
    """Look at pictures, each by itself.

    Args:
        weights: an estimator.
        pictures: IMAGE of any size.
        node: for messages.

    Raises:
        ValueError: naming the node and the input.
    """
    check_fit(weights, node)
    pictures = rgb_pictures(pictures, node).float().movedim(-1, 1)
    found = [run_module(network_patcher(weights), picture).detach().cpu() for picture in pictures.split(1)]
    return [Finding(odds[0].sigmoid(), places[0]) for odds, places in found]


def mixed_tokens(weights: Weights, places: dict[int, float]) -> Tensor:
    """Return the tokens (1, N, width) of damage at these places by number of kind: what the bank has beside each place, added up."""
    bank, counts = weights.tensors[BANK].float(), level_counts(weights.config)
    shares = [bank_shares(torch.tensor(places[kind]), count) if kind in places else torch.zeros(count) for kind, count in enumerate(counts)]
    return torch.einsum("k,knw->nw", torch.cat(shares), bank)[None]


def bank_shares(place: Tensor, levels: int) -> Tensor:
    """Return how much each level has of a place, (..., levels): its two neighbours share it, and below the first level less is left."""
    return (1 - (place.clamp(0, levels)[..., None] - torch.arange(1, levels + 1).to(place)).abs()).clamp(min=0)
