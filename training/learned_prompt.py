"""Training of learned prompts on the diffusion bridge (arXiv 2604.04924): P and the alphas under an empty text, or an embedding instead."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from ..model_patches import prompt_conditioning
from ..model_patches.anatomy import anatomy_of
from ..model_patches.config_values import whole_number
from ..model_patches.errors import telling
from ..model_patches.evaluation_hooks import EvaluationHooks
from ..model_patches.host import for_training, sample_schedule, with_text_length
from ..model_patches.learned_prompt import SPREAD, LearnedPrompt, check_fit, new_prompt
from ..model_patches.learned_prompt_patch import attach_prompt
from ..model_patches.prompt_conditioning import PromptConditioning, conditioning_of, new_conditioning
from ..model_patches.weights_file import Weights, in_words
from ..samplers.bridge import Bridge, bridge_sigmas
from .bridge import BridgeObjective
from .denoising import Denoising
from .trainee import NODE, Batch, Models
from .validation import VALIDATION_STEPS

# The alphas multiply whole tokens: they need steps of their own size.
ALPHA_RATE = 10.0
# FLUX's texts have as many tokens at least, unless somebody asks for fewer; what is more than a prompt has is cut where it is attached.
FLUX_TOKENS = 256


def new_learned_prompt(models: Models, config: Mapping[str, Any]) -> Weights:
    """Make fresh weights from {"length", "seed", "t0", "skew", "naive"}, of which all may be left out.

    Raises:
        ValueError: for other entries or values, a T0 that the model does not reach, and a missing model.
    """
    return _fresh(models, config, "learned prompt", ("length", "seed"), new_prompt)


def new_learned_conditioning(models: Models, config: Mapping[str, Any]) -> Weights:
    """Make a fresh embedding from {"length", "seed", "t0", "skew", "naive"}.

    It starts near the empty text where a text encoder is there to say it.

    Raises:
        ValueError: for other entries or values, a T0 that the model does not reach, and a missing model.
    """
    def make(model: Any, **own: Any) -> Weights:
        if models.clip is None:
            return new_conditioning(model, **own)
        with torch.no_grad():
            weights = new_conditioning(model, **own, start=models.clip.encode_from_tokens_scheduled(models.clip.tokenize("")))
        # Tokens that are all the same would learn the same for ever.
        tokens, generator = weights.tensors["tokens"], torch.Generator().manual_seed(own.get("seed", 0))
        return replace(weights, tensors={**weights.tensors, "tokens": tokens + SPREAD * torch.randn(tokens.shape, generator=generator)})

    return _fresh(models, config, "learned prompt conditioning", ("length", "seed"), make)


def _fresh(models: Models, config: Mapping[str, Any], what: str, own: tuple[str, ...], make: Callable[..., Weights]) -> Weights:
    bridge = BridgeObjective.of(config)
    known = [*own, *bridge.config()]
    unknown = sorted(config.keys() - set(known))
    if unknown:
        raise ValueError(f"a new {what} takes {', '.join(known)}; found {', '.join(unknown)}.")
    for name in own:
        if not whole_number(config.get(name, 0)):
            raise ValueError(f"{name} of a new {what} is {config[name]!r}; give a whole number from 0 on.")
    if models.model is None:
        raise ValueError(f"a new {what} needs a model.")
    bridge.path(models.model.get_model_object("model_sampling"))
    weights = make(models.model.model, **{name: config[name] for name in own if name in config})
    return replace(weights, config={**weights.config, **bridge.config()})


class BridgeTrainee(ABC):
    """Something that learns on the bridge while its model is frozen.

    Args:
        weights: what it starts from.
        models: those that it needs.

    Raises:
        ValueError: when a model is missing or does not fit.
    """

    NEEDS: tuple[str, ...] = ("model", "vae")

    def __init__(self, weights: Weights, models: Models) -> None:
        for name in self.NEEDS:
            if getattr(models, name) is None:
                needed = " and ".join(self.NEEDS)
                raise ValueError(f"{NODE}: '{name}' is not connected. A {in_words(weights.kind)} needs {needed} to learn on.")
        self.kind, self.family, self.config = weights.kind, weights.family, weights.config
        with telling(f"{NODE}: {weights.name}:"):
            self.objective = BridgeObjective.of(weights.config)
            self.objective.path(models.model.get_model_object("model_sampling"))

    @abstractmethod
    def _module(self) -> nn.Module:
        """What learns."""

    @abstractmethod
    def _hang(self, models: Models, patched: Any) -> Denoising:
        """Hang it on a clone of the model, and return the objective with it."""

    def _let_go(self) -> None:
        """Take out of the model what may still hang there."""

    def parameters(self) -> Iterator[nn.Parameter]:
        """Yield what learns."""
        yield from self._module().parameters()

    @contextmanager
    def attach(self, models: Models) -> Iterator[None]:
        """Hang it on the model."""
        self.models, self.patched = models, for_training(models.model)
        self.denoising = self._hang(models, self.patched)
        try:
            with self.denoising.learning(self._module()):
                yield
        finally:
            self._let_go()

    def loss(self, batch: Batch, generators: Sequence[torch.Generator]) -> tuple[Tensor, dict[str, float]]:
        """Ask for the clean latents from states on the bridge."""
        clean, degraded = self.denoising.encode(batch.clean), self.denoising.encode(batch.degraded)
        loss = self.objective.loss(self.denoising, clean, degraded, [""] * len(clean), generators)
        return loss, {"bridge": float(loss.detach())}

    @torch.no_grad()
    def validate(self, batch: Batch, generators: Sequence[torch.Generator]) -> Tensor:
        """Walk the bridge with a few steps."""
        sigmas = bridge_sigmas(self.denoising.sampling, self.objective.t0, VALIDATION_STEPS)
        rows = []
        for latent, generator in zip(self._raw(batch.degraded).split(1), generators):
            noise = torch.randn(latent.shape, generator=generator)
            rows.append(sample_schedule(self.patched, self.denoising.conditioning(""), noise, Bridge().sampler(), sigmas, latent.cpu()))
        return self.denoising.decode(torch.cat(rows), batch.clean)

    def state_dict(self) -> dict[str, Tensor]:
        """Return the weights as they stand in a file."""
        return dict(self._module().state_dict())

    def load_state_dict(self, tensors: dict[str, Tensor]) -> None:
        """Take back what `state_dict` returned."""
        self._module().load_state_dict(tensors)

    def _raw(self, pictures: Tensor) -> Tensor:
        return self.models.model.model.process_latent_out(self.denoising.encode(pictures))


class LearnedPromptTrainee(BridgeTrainee):
    """P and the alphas, hung into the attention of the frozen model, which is told the empty text; see BridgeTrainee."""

    NEEDS = ("model", "clip", "vae")

    def __init__(self, weights: Weights, models: Models) -> None:
        super().__init__(weights, models)
        check_fit(weights, models.model.model, NODE)
        self.prompt, self.hooks = LearnedPrompt.of(weights, trained=True), EvaluationHooks()

    def rate_factors(self) -> list[float]:
        """The learning rate of the alphas is a multiple of that of P."""
        return [ALPHA_RATE if p is self.prompt.alphas else 1.0 for p in self.parameters()]

    def _module(self) -> nn.Module:
        return self.prompt

    def _hang(self, models: Models, patched: Any) -> Denoising:
        self.hooks = attach_prompt(patched, self.prompt, node=NODE)
        if anatomy_of(patched.model).kind == "flux":
            models = replace(models, clip=with_text_length(models.clip, max(FLUX_TOKENS, self.prompt.length)))
        return Denoising(models, patched)

    def _let_go(self) -> None:
        self.hooks.clear()


class LearnedConditioningTrainee(BridgeTrainee):
    """An embedding where the text encoder's output goes; see BridgeTrainee."""

    def __init__(self, weights: Weights, models: Models) -> None:
        super().__init__(weights, models)
        prompt_conditioning.check_fit(weights, models.model.model, NODE)
        self.prompt = PromptConditioning.of(weights, trained=True)

    def _module(self) -> nn.Module:
        return self.prompt

    def _hang(self, models: Models, patched: Any) -> Denoising:
        return _Told(models, patched, self.prompt)


class _Told(Denoising):
    """A frozen model that is told what learns, whatever the text."""

    def __init__(self, models: Models, patched: Any, prompt: PromptConditioning) -> None:
        super().__init__(models, patched)
        self.prompt = prompt

    def conditioning(self, text: str) -> list:
        return conditioning_of(self.prompt)
