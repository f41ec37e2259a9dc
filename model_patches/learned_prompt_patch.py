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
from .host import WrappersMP, free_key, is_compiled, reserve, unspent_control
from .learned_prompt import FLUX_GUIDANCE, LearnedPrompt, attention_modules
from .percents import acts, percent_of
from .prompt_injection import Injection, Made, Term, kept_bytes

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

NODE = "Apply Learned Prompt"
AVERAGE, SUM = "average", "sum"
# The host keeps about this much free anyway. It reserves whole latents, so small requests would cost too much.
WORTH_RESERVING = 128 * 2**20
# Runs of the model in each step: prompts that add up, and the weight of the run.
Passes = list[tuple[list[Term], float]]
log = logging.getLogger(__name__)


def attach_prompt(patched: "ModelPatcher", prompt: LearnedPrompt, strength: float = 1.0, start_percent: float = 0.0,
                  end_percent: float = 1.0, node: str = NODE) -> EvaluationHooks:
    """Hang a prompt on a clone of a model that is the caller's own.

    In sampling and in training the model is evaluated as the prompt's own conditions want it: the text of WAN and FLUX cut to the prompt's
    length, FLUX's guidance 1. Gradients reach `prompts` and `alphas` where these require them, through checkpointed blocks too;
    FLUX needs unshared_norm_inputs and gradients (host_gradients.py) as ever. The parameters are read anew in every evaluation that gradients flow
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
        ValueError: during an evaluation; of FLUX, when its text has fewer tokens than the prompt; of any model that is compiled.
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
    patched.add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, patch.key, patch.prepare_sampling)
    patched.add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, patch.key, patch.sampler_sample)
    patched.add_wrapper_with_key(WrappersMP.APPLY_MODEL, patch.key, patch.apply_model)
    return patch.hooks


def trained_times(transformer_options: dict[str, Any]) -> list[tuple[str, float]]:
    """Return the node that attached it and the T0 that it was trained at, for every prompt in a sampler's run of which that is known."""
    runs = [value for value in transformer_options.values() if isinstance(value, _Run)]
    return [(run.node, t0) for run in runs for t0 in run.t0s]


class _Run:
    """One run of a sampler under a use of prompts: whose they are, and what has been computed, for each pass."""

    def __init__(self, passes: Passes, node: str) -> None:
        self.node = node
        self.t0s = sorted({term.prompt.t0 for terms, _ in passes for term in terms if term.prompt.t0 is not None})
        self.made = [Made() for _ in passes]


class _LearnedPromptPatch:
    """One use of prompts on a model; see attach_passes."""

    def __init__(self, key: str, model: "BaseModel", passes: Passes, percents: tuple[float, float], node: str) -> None:
        self.key, self.passes, self.percents, self.node = key, passes, percents, node
        self.anatomy: Anatomy = anatomy_of(model)
        self.paths = attention_modules(model)
        self.hooks = EvaluationHooks()

    def prepare_sampling(self, executor: Any, model: "ModelPatcher", noise_shape: Any, *args: Any, **kwargs: Any) -> Any:
        """PREPARE_SAMPLING wrapper: ask the host to leave room for what the run will keep of the prompts."""
        dtype = model.model.get_dtype_inference()
        need = sum(kept_bytes(self.anatomy.kind, len(self.paths), terms, dtype) for terms, _ in self.passes)
        if need >= WORTH_RESERVING:
            noise_shape = reserve(model.model, list(noise_shape), need)
        return executor(model, noise_shape, *args, **kwargs)

    def sampler_sample(self, executor: Any, guider: Any, sigmas: Tensor, extra_args: dict, *args: Any, **kwargs: Any) -> Tensor:
        """SAMPLER_SAMPLE wrapper: open a run, and leave nothing in the model behind it."""
        cfg = getattr(guider, "cfg", 1.0)
        if cfg != 1.0:
            log.warning("%s: learned prompts work at CFG 1, and this run has CFG %s. Set cfg to 1; it is faster, too.", self.node, cfg)
        self._warn_if_idle(guider.inner_model.model_sampling, sigmas)
        options = extra_args["model_options"]
        inner = {**options.get("transformer_options", {}), self.key: _Run(self.passes, self.node)}
        try:
            return executor(guider, sigmas, {**extra_args, "model_options": {**options, "transformer_options": inner}}, *args, **kwargs)
        finally:
            self.hooks.clear()

    def apply_model(self, executor: Any, x: Tensor, t: Tensor, c_concat: Any, c_crossattn: Any, control: Any, transformer_options: dict,
                    **kwargs: Any) -> Tensor:
        """APPLY_MODEL wrapper: evaluate the model once a pass. At equal x the average of its x0 is that of its velocities."""
        model = executor.class_obj
        if is_compiled(transformer_options):
            raise ValueError(f"{self.node}: 'model' goes through TorchCompileModel or a node like it. What is compiled does not notice that a "
                             "prompt comes, goes or changes, and the result would be wrong. Take that node out of the chain of this model.")
        if not acts(*self.percents, model.model_sampling, t):
            return executor(x, t, c_concat, c_crossattn, control, transformer_options, **kwargs)
        run = transformer_options.get(self.key) or _Run(self.passes, self.node)
        total: Any = 0
        for (terms, weight), made in zip(self.passes, run.made):
            length = max(term.prompt.length for term in terms)
            context, own = self._conditions(model, length, c_crossattn, dict(kwargs))
            injection = Injection(terms, made)
            x0 = self._evaluate(model, injection, context, transformer_options,
                                lambda options: executor(x, t, c_concat, context, unspent_control(control), options, **own))
            total = x0 if len(self.passes) == 1 else total + weight * x0
        return total

    def _warn_if_idle(self, sampling: Any, sigmas: Tensor) -> None:
        """Say so if the given part of the model's schedule, of which a run may walk the end only, holds none of the run's steps."""
        steps = sigmas[:-1]
        if len(steps) and not any(acts(*self.percents, sampling, step) for step in steps):
            begin, end = (percent_of(sampling, float(sigma)) for sigma in (steps.max(), steps.min()))
            log.warning("%s: the prompt does nothing in this run. start_percent %g and end_percent %g count along the model's whole "
                        "schedule, and this run walks it from %.2f to %.2f.", self.node, *self.percents, begin, end)

    def _evaluate(self, model: "BaseModel", injection: Injection, context: Tensor, options: dict, evaluate: Any) -> Tensor:
        if self.anatomy.kind == "unet":
            return evaluate(injection.told(options, self.paths))
        text = context.shape[1]
        return self.hooks.evaluate(lambda: injection.hooks(model, self.anatomy.kind, self.paths, text), lambda: evaluate(dict(options)))

    def _conditions(self, model: "BaseModel", length: int, context: Tensor, kwargs: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return text and further arguments as prompts of a family were trained with."""
        if self.anatomy.kind == "flux":
            if context.shape[1] < length:
                raise ValueError(f"{self.node}: the prompt holds {length} tokens and the text {context.shape[1]}. Put T5 Tokenizer Options "
                                 f"with min_length {length} between the text encoder's loader and the node that encodes the empty text.")
            if model.diffusion_model.params.guidance_embed:
                kwargs["guidance"] = torch.full((len(context),), FLUX_GUIDANCE, device=context.device)
        return (context[:, :length] if self.anatomy.kind in ("flux", "wan") else context), kwargs
