"""Hang learned prompts on a host model: one, or several that are blended.

    attach_prompt(patched, prompt)                                          for sampling and for training alike
    attach_blend(patched, [(prompt, weight), ...], "average" or "sum")      mixed degradations
"""

import logging
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from .anatomy import Anatomy, anatomy_of
from .evaluation_hooks import EvaluationHooks
from .host import WrappersMP, free_key
from .learned_prompt import LearnedPrompt, attention_modules
from .percents import acts
from .prompt_injection import Injection, Made, Term

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

NODE = "Apply Learned Prompt"
AVERAGE, SUM = "average", "sum"
FLUX_GUIDANCE = 1.0
# Runs of the model in each step: prompts that add up, and the weight of the run.
Passes = list[tuple[list[Term], float]]
log = logging.getLogger(__name__)


def attach_prompt(patched: "ModelPatcher", prompt: LearnedPrompt, strength: float = 1.0, start_percent: float = 0.0,
                  end_percent: float = 1.0, node: str = NODE) -> EvaluationHooks:
    """Hang a prompt on a clone of a model that is the caller's own.

    In sampling and in training the model is evaluated as the prompt's own conditions want it: WAN's text cut to the prompt's length before
    the text embedding, FLUX's guidance 1. Gradients reach `prompts` and `alphas` where these require them, through checkpointed blocks too;
    FLUX needs host.unshared_norm_inputs and host.gradients as ever. The parameters are read anew in every evaluation that gradients flow
    through; in sampling once a run. Nothing is kept in the model itself.

    Args:
        patched: changed; its model must be one that check_fit has accepted. While training: host.for_training(model).
        prompt: on any device; where it learns, on the model's.
        strength: factor of all alphas; 0 attaches nothing.
        start_percent, end_percent: the part of sampling in which it acts.
        node: whom messages name.

    Returns:
        What hangs in the model during an evaluation and its backward pass. A sampler's run clears it at its end; whoever trains has to
        clear it too, for the case that a backward pass breaks off.

    Raises:
        ValueError: during an evaluation of FLUX, when its text has fewer tokens than the prompt.
    """
    return attach_passes(patched, [([Term(prompt, strength)], 1.0)] if strength else [], start_percent, end_percent, node)


def attach_blend(patched: "ModelPatcher", prompts: list[tuple[LearnedPrompt, float]], mode: str, strength: float = 1.0,
                 start_percent: float = 0.0, end_percent: float = 1.0, node: str = NODE) -> None:
    """Hang several prompts on a clone of a model that is the caller's own.

    Args:
        patched, strength, start_percent, end_percent, node: as for attach_prompt.
        prompts: each with its weight; those of weight 0 cost nothing.
        mode: AVERAGE runs the model once a prompt and averages the velocities by weight, as published: N times the cost. SUM adds the
            prompts up, each with its weight as a factor of its alphas, in one run.

    Raises:
        ValueError: when the weights to average by add up to nothing.
    """
    used = [(prompt, weight) for prompt, weight in prompts if weight] if strength else []
    if mode == SUM:
        terms = [Term(prompt, strength * weight) for prompt, weight in used]
        attach_passes(patched, [(terms, 1.0)] if terms else [], start_percent, end_percent, node)
        return
    total = sum(weight for _, weight in used)
    if used and not total:
        raise ValueError(f"{node}: the weights to average by add up to 0. Give weights that do not.")
    attach_passes(patched, [([Term(prompt, strength)], weight / total) for prompt, weight in used], start_percent, end_percent, node)


def attach_passes(patched: "ModelPatcher", passes: Passes, start_percent: float, end_percent: float, node: str) -> EvaluationHooks:
    """Hang weighted runs of the model, each under prompts that add up; the weights add up to 1. No runs attach nothing."""
    if not passes:
        return EvaluationHooks()
    patch = _LearnedPromptPatch(free_key(patched, "mend_prompt"), patched.model, passes, (start_percent, end_percent), node)
    patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, patch.key, patch.sampler_sample)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, patch.key, patch.apply_model)
    return patch.hooks


class _Run:
    """What one run of a sampler has computed, for each pass."""

    def __init__(self, passes: int) -> None:
        self.made = [Made() for _ in range(passes)]


class _LearnedPromptPatch:
    """One use of prompts on a model; see attach_passes."""

    def __init__(self, key: str, model: "BaseModel", passes: Passes, percents: tuple[float, float], node: str) -> None:
        self.key, self.passes, self.percents, self.node = key, passes, percents, node
        self.anatomy: Anatomy = anatomy_of(model)
        self.paths = attention_modules(model)
        self.hooks = EvaluationHooks()

    def sampler_sample(self, executor: Any, guider: Any, sigmas: Tensor, extra_args: dict, *args: Any, **kwargs: Any) -> Tensor:
        """SAMPLER_SAMPLE wrapper: open a run, and leave nothing in the model behind it."""
        cfg = getattr(guider, "cfg", 1.0)
        if cfg != 1.0:
            log.warning("%s: learned prompts work at CFG 1, and this run has CFG %s. Set cfg to 1; it is faster, too.", self.node, cfg)
        options = extra_args["model_options"]
        inner = {**options.get("transformer_options", {}), self.key: _Run(len(self.passes))}
        try:
            return executor(guider, sigmas, {**extra_args, "model_options": {**options, "transformer_options": inner}}, *args, **kwargs)
        finally:
            self.hooks.clear()

    def apply_model(self, executor: Any, x: Tensor, t: Tensor, c_concat: Any, c_crossattn: Any, control: Any, transformer_options: dict,
                    **kwargs: Any) -> Tensor:
        """APPLY_MODEL wrapper: evaluate the model once a pass. At equal x the average of its x0 is that of its velocities."""
        model = executor.class_obj
        if not acts(*self.percents, model.model_sampling, t):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        run = transformer_options.get(self.key) or _Run(len(self.passes))
        total: Any = 0
        for (terms, weight), made in zip(self.passes, run.made):
            length = max(term.prompt.length for term in terms)
            context, own = self._conditions(model, length, c_crossattn, dict(kwargs))
            injection = Injection(terms, made)
            x0 = self._evaluate(model, injection, context, transformer_options,
                                lambda options: executor(x, t, c_concat, context, control, options, **own))
            total = x0 if len(self.passes) == 1 else total + weight * x0
        return total

    def _evaluate(self, model: "BaseModel", injection: Injection, context: Tensor, options: dict, evaluate: Any) -> Tensor:
        if self.anatomy.kind == "unet":
            return evaluate(injection.told(options, self.paths))
        text = context.shape[1]
        return self.hooks.evaluate(lambda: injection.hooks(model, self.anatomy.kind, self.paths, text), lambda: evaluate(dict(options)))

    def _conditions(self, model: "BaseModel", length: int, context: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return text and further arguments as prompts of a family were trained with."""
        if self.anatomy.kind == "wan":
            return context[:, :length], kwargs
        if self.anatomy.kind == "flux":
            if context.shape[1] < length:
                raise ValueError(f"{self.node}: the prompt holds {length} tokens and the text {context.shape[1]}. Put T5 Tokenizer Options "
                                 f"with min_length {length} between the text encoder's loader and the node that encodes the empty text.")
            if model.diffusion_model.params.guidance_embed:
                kwargs["guidance"] = torch.full((len(context),), FLUX_GUIDANCE, device=context.device)
        return context, kwargs
