"""Training of the degradation tokenizer (Defusion, arXiv 2506.16960): L_inst = L_rec + L_VQ on clean and degraded charts.

L_rec is MSE, a perceptual distance and a hinge critic with VQGAN's adaptive weight (arXiv 2012.09841), and one term of ours: how much
texture there is at each place. Noise has no shape that MSE could learn, and the critic comes too late to teach it alone.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from ..degradations.visual_ground import visual_ground
from ..model_patches import folders
from ..model_patches.config_values import one_of, whole_number
from ..model_patches.degradation_tokenizer import SIZES, TokenizerNetwork, check_fit, nearest, new_weights
from ..model_patches.errors import telling
from ..model_patches.host import torch_device, trained_operations
from ..model_patches.perceptual import Perceptual, vgg16_weights
from ..model_patches.robust_encoder import RobustEncoder
from ..model_patches.weights_file import Weights
from .seeding import mixed
from .trainee import NODE, Batch, Models

BETA = 0.25
EVENNESS, SOFTNESS = 0.1, 0.05
TEXTURE, ADVERSARIAL = 0.5, 0.8
# Features of the two kinds have different sizes.
PERCEPTUAL = {"VGG16": 0.02, "VAE encoder": 0.1}
TEXTURE_CELL, TEXTURE_OCTAVES = 8, 2
LARGEST_ADVERSARIAL = 100.0


def new_tokenizer(config: Mapping[str, Any]) -> Weights:
    """Make fresh weights from {"size", "adversarial", "seed"}, of which all may be left out.

    Raises:
        ValueError: for other entries or sizes.
    """
    given = {"size": "full", "adversarial": True, "seed": 0} | dict(config)
    whole = one_of(given["size"], SIZES) and isinstance(given["adversarial"], bool) and whole_number(given["seed"])
    if given.keys() - {"size", "adversarial", "seed"} or not whole:
        raise ValueError(f"a new degradation tokenizer takes size ({', '.join(SIZES)}), adversarial (true or false) and seed (a whole "
                         f"number); found {dict(config)}.")
    size = SIZES[given["size"]]
    count = -(-4 * size.codes * size.cell**2 // size.chart**2)
    charts = torch.cat([visual_ground(mixed(given["seed"], "codes", index), size.chart) for index in range(count)])
    return new_weights(given["size"], charts, given["adversarial"], given["seed"])


class DegradationTokenizerTrainee:
    """Encoder, codes, decoder and critic learn together on the charts of each sample.

    Args:
        weights: of the kind degradation_tokenizer.
        models: MODEL and VAE for the perceptual distance where there is no VGG16; both may be missing.

    Raises:
        ValueError: when the weights are not whole.
    """

    def __init__(self, weights: Weights, models: Models) -> None:
        self.size = check_fit(weights, NODE, training=True)
        self.kind, self.family, self.config = weights.kind, weights.family, weights.config
        self.wants_charts = self.size.chart
        self.network = TokenizerNetwork(self.size, self.config["adversarial"], trained_operations)
        self.load_state_dict(weights.tensors)
        self.network.requires_grad_(True)
        self.perceptual: Perceptual | None = None
        self.step = 0

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield all parameters, the critic's last."""
        yield from self.network.parameters()

    @contextmanager
    def attach(self, models: Models) -> Iterator[None]:
        """Nothing is hung on the models; the VAE is looked through by a copy."""
        self.network.to(torch_device())
        self.perceptual = _perceptual(models)
        try:
            yield
        finally:
            self.perceptual = None

    def at_step(self, step: int) -> None:
        """Say which step the next losses belong to: the critic sets in late."""
        self.step = step

    def loss(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, dict[str, float]]:
        """Encode and decode clean and degraded charts."""
        charts = self._planes(torch.cat([batch.chart, batch.degraded_chart]))
        features = self.network.encoder.features(charts)
        codes = self.network.encoder.codebook(features)
        index = nearest(features.detach(), codes.detach())
        chosen = F.embedding(index, codes)
        decoded = self._decode(features + (chosen - features).detach(), charts)
        error, texture = F.mse_loss(decoded, charts), texture_distance(decoded, charts)
        rebuilt = error + TEXTURE * texture
        figures = {"error": error, "texture": texture, "use": index.unique().numel() / torch.tensor(float(len(codes)))}
        if self.perceptual is not None:
            figures["perceptual"] = self.perceptual(decoded, charts).to(error.device)
            rebuilt = rebuilt + PERCEPTUAL[self.perceptual.name] * figures["perceptual"]
        figures["vq"] = F.mse_loss(chosen, features.detach()) + BETA * F.mse_loss(features, chosen.detach())
        loss = rebuilt + figures["vq"] + revival(features, codes, index) + EVENNESS * unevenness(features, codes)
        if self.config["adversarial"] and self.step >= self.config["critic_start"]:
            fooled, told = self._adversarial(charts, decoded, rebuilt)
            figures |= {"fooled": fooled, "told": told}
            loss = loss + fooled + told
        return loss, {name: float(value.detach()) for name, value in figures.items()}

    @torch.no_grad()
    def validate(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """Return the clean pictures after encoding and decoding, so that the PSNR says how much the codes hold."""
        pictures = self._planes(batch.clean)
        features = self.network.encoder.features(pictures)
        codes = self.network.encoder.codebook(features)
        return self._decode(F.embedding(nearest(features, codes), codes), pictures).movedim(1, -1).clamp(0, 1).cpu()

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights as they stand in a file."""
        return self.network.state_dict()

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""
        self.network.load_state_dict(tensors)

    def _planes(self, pictures: Tensor) -> Tensor:
        return pictures.movedim(-1, 1).to(self.network.encoder.codes)

    def _decode(self, codes: Tensor, like: Tensor) -> Tensor:
        return self.network.decoder(codes)[..., : like.shape[-2], : like.shape[-1]]

    def _adversarial(self, charts: Tensor, decoded: Tensor, rebuilt: Tensor) -> tuple[Tensor, Tensor]:
        """Return what the decoder learns from the critic, and what the critic learns; each leaves the other as it is."""
        critic, last = self.network.discriminator, self.network.decoder.out.weight
        frozen = {name: p.detach() for name, p in critic.named_parameters()}
        fooling = -functional_call(critic, frozen, (decoded,)).mean()
        of_rebuilt, of_fooling = (torch.autograd.grad(term, last, retain_graph=True)[0].norm() for term in (rebuilt, fooling))
        weight = ADVERSARIAL * (of_rebuilt / (of_fooling + 1e-4)).clamp(max=LARGEST_ADVERSARIAL).detach()
        telling = 0.5 * (F.relu(1 - critic(charts)).mean() + F.relu(1 + critic(decoded.detach())).mean())
        return weight * fooling, telling


def texture_distance(a: Tensor, b: Tensor) -> Tensor:
    """Return the mean difference of how strong the fine detail of two batches (B, 3, H, W) is around each place, whatever it looks like."""
    total = torch.zeros((), device=a.device)
    for _ in range(TEXTURE_OCTAVES):
        total = total + (_texture(a) - _texture(b)).abs().mean()
        a, b = F.avg_pool2d(a, 2), F.avg_pool2d(b, 2)
    return total / TEXTURE_OCTAVES


def revival(features: Tensor, codes: Tensor, index: Tensor) -> Tensor:
    """Return what draws codes that no feature of a batch has chosen to the feature nearest to each.

    A plain loss instead of the usual replacement: it needs no counts that would have to be kept, and processes that train together average
    it.

    Args:
        features: (..., width) of length 1.
        codes: (K, width) of length 1.
        index: (...) of the codes chosen.
    """
    unused = torch.ones(len(codes), dtype=torch.bool, device=codes.device)
    unused[index.flatten()] = False
    known = features.detach().flatten(0, -2)
    anchors = known[nearest(codes[unused].detach(), known)]
    return (codes[unused] - anchors).square().sum() / codes.numel()


def unevenness(features: Tensor, codes: Tensor) -> Tensor:
    """Return 0..1: how far from equally often the codes would be chosen, if features chose among those near them at random.

    It keeps features from moving together to a few codes, which the commitment alone invites them to. After the entropy term of MAGVIT-v2's
    tokenizer (arXiv 2310.05737).
    """
    shares = ((features.flatten(0, -2) @ codes.T) / SOFTNESS).softmax(-1).mean(0)
    return 1 + (shares * (shares + 1e-8).log()).sum() / math.log(len(codes))


def _texture(pictures: Tensor) -> Tensor:
    fine = pictures - F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    return (F.avg_pool2d(fine.square(), TEXTURE_CELL) + 1e-5).sqrt()


def _perceptual(models: Models) -> Perceptual | None:
    """Return the perceptual distance: by VGG16 where the user has it, else by the model's VAE where it is connected."""
    folders.register()  # where no nodes are loaded nobody has
    with telling(f"{NODE}:"):
        vgg = vgg16_weights()
    if vgg is not None:
        return Perceptual(None, vgg)
    if models.vae is None or models.model is None:
        return None
    copied = RobustEncoder(models.vae, models.model.model, {})
    copied.module.to(models.vae.device)
    return Perceptual(copied.encode, None)
