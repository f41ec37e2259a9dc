"""Training of degradation diffusion (Defusion, arXiv 2506.16960): bridge, adapter and LoRA learn the damage that an instruction shows."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.amp import autocast

from ..model_patches import degradation_tokenizer as tokenizer
from ..model_patches.config_values import one_of, whole_number
from ..model_patches.degradation_condition import DegradationCondition, folded
from ..model_patches.degradation_model import (
    BRIDGES,
    CHOICES,
    DEVIATION,
    INSTRUCTIONS,
    KIND,
    NETWORK,
    DegradationNetwork,
    DegradationPatch,
    check_cell,
    check_fit,
    new_weights,
    tokenizer_of,
)  # fmt: skip
from ..model_patches.degraded_picture import ATTACHMENT, FORMS, Degradation, DegradedPicture, Residuals
from ..model_patches.diffusion_adapter import lora_tensors
from ..model_patches.fine_tune import FINE_TUNE_RATE, FineTune, model_change
from ..model_patches.host import for_training, interrupt_point, is_flow, output_slope, trained_operations
from ..model_patches.host import sample_with as host_sample
from ..model_patches.irb import SIZES
from ..model_patches.weights_file import Weights, load_weights, part_of
from ..samplers.degradation_space import DegradationSpaceSampler
from .denoising import Denoising, DenoisingFromNoise
from .seeding import generator
from .trainee import NODE, Batch, Models
from .validation import VALIDATION_STEPS

if TYPE_CHECKING:
    from .feed import Pairs

CLEAN, OTHER = 0.1, 0.1
GATE_RATE = 10.0
# Least share of noise in what the model sees for errors of y0 to count in full.
LITTLE = 0.25
# How many times an error of the model's own output counts at most: x0 of an eps model is up to sigma times as far off.
MOST = 4.0
# Down to this fraction of the mean damage (-5 dB) a sample counts by the share of its damage that is left; weaker damage counts less, since a
# VAE's own error is close to it.
FLOOR = 0.3
MEASURED = 64
MEASURED_AT_ONCE = 4


def new_model(models: Models, config: Mapping[str, Any]) -> Weights:
    """Make fresh weights from {"tokenizer": file, "form", "size", "rank", "seed", "fine_tune"}, of which all but the file may be left out.

    `bridge` and `instruction` are there to compare with (BRIDGES, INSTRUCTIONS).

    Raises:
        ValueError: for other entries, and for missing models or files.
    """
    given = {"form": "latent", "size": "full", "rank": 16, "seed": 0, "fine_tune": False, "bridge": BRIDGES[0], "instruction": INSTRUCTIONS[0]} | dict(config)
    known = not given.keys() - {*CHOICES, "rank", "seed", "fine_tune", "tokenizer"} and all(one_of(given[name], options) for name, options in CHOICES.items())
    whole = all(whole_number(given[name]) for name in ("rank", "seed")) and isinstance(given["fine_tune"], bool)
    if not known or not whole or not isinstance(given.get("tokenizer"), str):
        raise ValueError(f"a new degradation model takes tokenizer (a file), form ({', '.join(FORMS)}), size ({', '.join(SIZES)}), rank "
                         f"and seed (whole numbers) and fine_tune (true or false); found {dict(config)}.")
    if models.model is None:
        raise ValueError("a new degradation model needs a model.")
    codes = load_weights(Path(given.pop("tokenizer")).expanduser())
    tokenizer.check_fit(codes, NODE)
    return new_weights(models.model.model, codes, **given)


class ResidualDenoising(DenoisingFromNoise):
    """Measures errors as those of y0.

    The picture tells most of a residual at any noise level, and an error of eps counts one of y0 at full noise by 1 / sigma^2, next to
    nothing. Where less noise than LITTLE is left, errors count as those of v times LITTLE: y0 can be told from what is sampled there, and
    what is to be learned is to take the noise off.
    """

    def error(self, x: Tensor, sigma: Tensor, z0: Tensor, texts: Sequence[str], extra: dict[str, Tensor]) -> Tensor:
        """Return how far the prediction for x (B, ...) at sigma (B,) is from z0."""
        noise = sigma if is_flow(self.sampling) else sigma / (1 + sigma.square()).sqrt()
        scale = (LITTLE / noise).clamp(min=1).reshape(-1, *[1] * (z0.ndim - 1))
        most = (MOST / output_slope(self.sampling, sigma, z0).abs()).clamp(max=1)
        return (self.x0(x, sigma, texts, extra) - z0) * scale * most


class DegradationTrainee:
    """Bridge, instruction adapter and LoRA learn together on the frozen denoiser.

    One sample in ten comes with the instruction that nothing is wrong, and one with an instruction for something else: then there is
    nothing to remove.

    Args:
        weights: of the kind degradation_model.
        models: MODEL, CLIP and VAE.

    Raises:
        ValueError: when a model is missing or the weights do not fit it.
    """

    OBJECTIVE: type[Denoising] = ResidualDenoising

    def __init__(self, weights: Weights, models: Models) -> None:
        models.require_all(NODE, "A degradation model")
        self.plan = check_fit(weights, models.model.model, NODE)
        self.kind, self.family, self.config = KIND, weights.family, weights.config
        check_cell(self.config["cell"], models.vae, NODE)
        self.network = DegradationNetwork(self.plan, self.config, trained_operations)
        self.change = model_change(models.model.model, self.config)
        self.codes = tokenizer_of(weights)
        size = tokenizer.SIZES[self.codes.config["size"]]
        self.encoder = tokenizer.TokenEncoder(size, trained_operations)
        trained = (NETWORK, "diffusion_model.", DEVIATION)
        self.frozen = {name: tensor for name, tensor in weights.tensors.items() if not name.startswith(trained)}
        # In half precision and back, as everybody else reads it.
        own = {name.removeprefix(tokenizer.ENCODER): tensor.half().float() for name, tensor in self.codes.tensors.items()}
        self.encoder.load_state_dict(own)
        self.encoder.requires_grad_(False)
        self.wants_charts = 0 if self.config["instruction"] == "words" else size.chart
        self.load_state_dict(weights.tensors)

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield the network's parameters, then those of the LoRA or the fine-tune."""
        for part in (self.network, self.change):
            if part is not None:
                yield from part.parameters()

    def rate_factors(self) -> list[float]:
        """Gates of attentions are one number for a whole channel, and have further to go than a layer's many weights; a fine-tune is slow."""
        whole = FINE_TUNE_RATE if isinstance(self.change, FineTune) else 1.0
        own = [GATE_RATE if name.endswith(".gate") else 1.0 for name, _ in self.network.named_parameters()]
        return [*own, *(whole for _ in (self.change.parameters() if self.change is not None else ()))]

    @contextmanager
    def attach(self, models: Models) -> Iterator[None]:
        """Hang them on the model; pictures and instructions come with each evaluation."""
        self.models = models
        self.condition = DegradationCondition("mend_training", None, torch.empty(0), 1.0, NODE)
        self.residuals = Residuals(self.config["form"], models.vae, models.model.model)
        patched = for_training(models.model)
        DegradationPatch(self.network, self.plan, self.condition).attach(patched)
        self.denoising = self.OBJECTIVE(models, patched)
        self.encoder.to(patched.load_device)
        with self.denoising.learning(self.network, self.change):
            yield

    def prepare(self, pairs: "Pairs", seed: int) -> None:
        """Measure the deviation of the residuals, unless the weights were trained under one already."""
        if self.deviation:
            return
        squares = []
        for index in range(0, MEASURED, MEASURED_AT_ONCE):
            interrupt_point()
            places = range(index, index + MEASURED_AT_ONCE)
            batch = pairs.collate([pairs.pair(place, generator(seed, "measure", place)) for place in places])
            squares.append(self.residuals(batch.degraded, batch.clean).square().mean())
        self.deviation = 1.0 if self.config["form"] == "picture" else float(torch.stack(squares).mean().sqrt().clamp(min=1e-4))

    def loss(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, dict[str, float]]:
        """Denoise the residual, told the picture and an instruction for its damage, for another one, or for none."""
        with autocast(self.models.model.load_device.type, enabled=False):
            target, weights, texts, extra = self._sample(batch, generators)
        loss = self.denoising.loss(target, texts, generators, extra, weights=weights)
        return loss, {"denoising": float(loss.detach())}

    def _sample(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, Tensor | None, list[str], dict[str, Tensor]]:
        """Return what is to be found, how much it counts, and what is told; in full precision, as latents and codes are in use."""
        c_lq = self._encode(batch.degraded)
        y0 = self.residuals(batch.degraded, batch.clean, c_lq).to(c_lq) / self.deviation
        nothing = c_lq if self.config["form"] == "picture" else torch.zeros_like(y0)
        draws = torch.stack([torch.rand((), generator=own) for own in generators]).tolist()
        words = self.config["instruction"] == "words"
        kinds = ["clean" if draw < CLEAN else "other" if draw < CLEAN + OTHER and not words else "own" for draw in draws]
        target = torch.stack([y0[row] if kind == "own" else nothing[row] for row, kind in enumerate(kinds)])
        texts = [batch.words[row] if words and kind == "own" else "" for row, kind in enumerate(kinds)]
        tokens = None if words else self._tokens(batch, kinds)
        weights = None if self.config["form"] == "picture" else damage_weights(y0)
        return target, weights, texts, self._extra(batch.degraded, c_lq, tokens)

    @torch.no_grad()
    def validate(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """Restore from pure noise with a few steps of a plain sampler."""
        rows, words = [], self.config["instruction"] == "words"
        for row, own in enumerate(generators):
            tokens = torch.zeros(1, 1, self.config["code_width"]) if words else self._tokens(_row(batch, row), ["own"])
            picture = batch.degraded[row:row + 1]
            noise = torch.randn((1, *self._encode(picture).shape[1:]), generator=own)
            rows.append(self.restored(picture, tokens, batch.words[row] if words else "", noise))
        return torch.cat(rows).cpu()

    def restored(self, picture: Tensor, tokens: Tensor, text: str, noise: Tensor, steps: int = VALIDATION_STEPS, samples: int = 1,
                 cfg: float = 1.0) -> Tensor:
        """Restore a picture (1, H, W, 3) while this trainee is attached; returns the same shape, in 0..1."""
        restoring = self.restoring(picture, tokens, cfg)
        sampler = DegradationSpaceSampler(_euler(), samples)
        raw = host_sample(restoring, self.denoising.conditioning(text), noise, sampler, steps)
        return restoring.get_attachment(ATTACHMENT).removed(restoring, raw)

    def restoring(self, pictures: Tensor, tokens: Tensor, cfg: float = 1.0) -> Any:
        """The model as it restores (B, H, W, 3) by an instruction, for a Degradation Space Sampler, while this trainee is attached."""
        patched = for_training(self.models.model)
        seen = DegradedPicture(pictures, self.models.vae, NODE)
        condition = DegradationCondition("mend_validation", seen, tokens, cfg, NODE)
        DegradationPatch(self.network, self.plan, condition).attach(patched)
        patched.set_attachments(ATTACHMENT, Degradation(seen, self.config["form"], self.deviation or 1.0))
        return patched

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights as they stand in a file."""
        tensors = {NETWORK + name: tensor for name, tensor in self.network.state_dict().items()}
        tensors |= self.frozen | {DEVIATION: torch.tensor(self.deviation)}
        return tensors | (self.change.native() if self.change is not None else {})

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""
        self.network.load_state_dict(part_of(tensors, NETWORK))
        self.deviation = float(tensors[DEVIATION])
        if self.change is not None:
            self.change.load_native(lora_tensors(tensors))

    def instruction(self, degraded_chart: Tensor, chart: Tensor) -> Tensor:
        """Return tokens (B, N, width) of charts (B, side, side, 3)."""
        with torch.no_grad():
            both = self.encoder(torch.cat([degraded_chart, chart]).movedim(-1, 1).float().to(self.denoising.patched.load_device))
        damaged, clean = both.chunk(2)
        return damaged if self.config["instruction"] == "degraded" else damaged - clean

    def _tokens(self, batch: Batch, kinds: list[str]) -> Tensor:
        if batch.chart is None:
            raise ValueError(f"{NODE}: the samples come without test charts, from which visual instructions are made.")
        charts = {"own": batch.degraded_chart, "other": batch.other_chart, "clean": batch.chart}
        return self.instruction(torch.stack([charts[kind][row] for row, kind in enumerate(kinds)]), batch.chart)

    def _encode(self, pictures: Tensor) -> Tensor:
        return self.residuals.encoded(pictures).to(self.models.model.load_device)

    def _extra(self, pictures: Tensor, c_lq: Tensor, tokens: Tensor | None) -> dict[str, Tensor]:
        """What an evaluation in training is given of the degraded pictures and of the instruction."""
        seen = folded(pictures.to(c_lq.device), c_lq, self.config["cell"])
        return {self.condition.key: seen} | ({} if tokens is None else {self.condition.tokens_key: tokens})


def damage_weights(y0: Tensor) -> Tensor:
    """Return how much samples count, by the damage (B, ...) that their pictures have: 1 for the mean one.

    Residuals of low light have nearly a hundred times the square of those of JPEG. Divided by its own square, an error is the part of the
    damage that is left, which is what dB count, and tasks are worth the same. Samples that are told of nothing count as their picture does.
    """
    return (1 + FLOOR) / (y0.flatten(1).square().mean(1) + FLOOR)


def _row(batch: Batch, row: int) -> Batch:
    own = slice(row, row + 1)
    charts = [None if chart is None else chart[own] for chart in (batch.chart, batch.degraded_chart, batch.other_chart)]
    return Batch(batch.clean[own], batch.degraded[own], batch.captions[own], batch.words[own], *charts)


def _euler() -> Any:
    import comfy.samplers

    return comfy.samplers.sampler_object("euler")
