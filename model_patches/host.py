"""What the pack knows of the host's private shapes: loading, sampling, conds, wrappers. The files that call themselves part of it have the
rest; nothing else may.
"""

import hashlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

import comfy.conds
import comfy.ldm.common_dit
import comfy.model_management
import comfy.model_patcher
import comfy.ops
import comfy.patcher_extension
import comfy.quant_ops
import comfy.sample
import comfy.sampler_helpers
import comfy.samplers
import comfy.sd
import comfy.utils

from .host_gradients import casting_layers, copied_weights, differentiable_attention, plain_weights

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

# Layers of networks that learn during a run: plain weights in the run's own precision, created where they are used.
run_operations = comfy.ops.disable_weight_init
# Layers of networks that are loaded beside a model: weights of any precision, used in that of what they are given.
managed_operations = comfy.ops.manual_cast

WrappersMP = comfy.patcher_extension.WrappersMP
CallbacksMP = comfy.patcher_extension.CallbacksMP

OUT_OF_MEMORY = (comfy.model_management.OOM_EXCEPTION, comfy.model_management.ACCELERATOR_ERROR)

# Of comfy_api.torch_helpers.torch_compile, which training has to do without.
COMPILE_KEY = "torch.compile"


def model_time(model_sampling: Any, sigma: float) -> float:
    """Return a sigma's place in the schedule, 1 at pure noise: the papers' t / T, linear in the model's own timesteps."""
    last = float(model_sampling.timestep(torch.as_tensor(model_sampling.sigma_max)))
    return float(model_sampling.timestep(torch.as_tensor(sigma))) / last


def is_flow(model_sampling: Any) -> bool:
    """Tell x = (1 - sigma) x0 + sigma n from x = x0 + sigma n."""
    probe = model_sampling.noise_scaling(torch.tensor([0.5]), torch.zeros(1), torch.ones(1), False)
    return bool(abs(float(probe) - 1) > 1e-3)


def noise_to_signal(model_sampling: Any, sigma: float) -> float:
    """Deviation of the noise relative to the latent in x at this sigma: sigma itself, or sigma / (1 - sigma) for flow models."""
    return sigma / max(1 - sigma, 1e-4) if is_flow(model_sampling) else sigma


def signal_level(model_sampling: Any, sigma: float) -> float:
    """What x holds of the clean latent at this sigma: 1, or 1 - sigma for flow models."""
    return 1 - sigma if is_flow(model_sampling) else 1.0


def add_run_wrappers(patcher: "ModelPatcher", key: str, wrappers: dict[str, Callable]) -> None:
    """Register wrappers under a key that is free on this patcher, so that the same node can be applied twice."""
    key = free_key(patcher, key)
    for kind, wrapper in wrappers.items():
        patcher.add_wrapper_with_key(kind, key, wrapper)


def load_with(patcher: "ModelPatcher", key: str, models: list["ModelPatcher"]) -> None:
    """Have the host load `models` together with the patcher whenever it is sampled."""
    patcher.set_additional_models(key, [*patcher.get_additional_models_with_key(key), *models])


def reserve(model: "BaseModel", noise_shape: list[int], extra_bytes: float) -> list[int]:
    """Return a noise shape whose memory estimate covers `extra_bytes` more than the given one's."""
    one = max(1.0, float(model.memory_required([1, *noise_shape[1:]])))
    return [noise_shape[0] + int(extra_bytes / one + 1), *noise_shape[1:]]


def reraise_unless_out_of_memory(error: BaseException) -> None:
    """Accelerators report other faults under the same type: raise those again."""
    comfy.model_management.raise_non_oom(error)


def interrupt_point() -> None:
    """Raise the host's interruption if the user has pressed cancel."""
    comfy.model_management.throw_exception_if_processing_interrupted()


def pad_to_patches(x: Tensor, patch: tuple[int, ...]) -> Tensor:
    """Pad (B, C, h, w) as transformers pad their latents before cutting them into patches."""
    return comfy.ldm.common_dit.pad_to_patch_size(x, tuple(patch))


def free_key(patcher: "ModelPatcher", base: str) -> str:
    """Return `base` with the first number that no wrapper of this patcher has, so that the same node can be applied twice."""
    taken = {name for group in patcher.wrappers.values() for name in group}
    return next(key for index in range(len(taken) + 1) if (key := f"{base}_{index}") not in taken)


def inference_module(build: Callable[..., nn.Module], tensors: dict[str, Tensor]) -> "ModelPatcher":
    """Put a network under the host's memory management.

    Args:
        build: called with operations, dtype and device.
        tensors: its weights, already checked against its shapes, since some hosts take wrong ones silently.
    """

    def make(disable_dynamic: bool = False) -> "ModelPatcher":
        management = comfy.model_management
        kind = comfy.model_patcher.ModelPatcher if disable_dynamic else comfy.model_patcher.CoreModelPatcher
        with torch.inference_mode(False):
            network = build(operations=managed_operations, dtype=comfy.utils.weight_dtype(tensors), device=management.unet_offload_device())
            patcher = kind(network, load_device=management.get_torch_device(), offload_device=management.unet_offload_device())
            network.load_state_dict({name: tensor.clone() for name, tensor in tensors.items()}, assign=patcher.is_dynamic())
        patcher.cached_patcher_init = (make, ())
        return patcher

    return make()


def loaded_for_training(patcher: "ModelPatcher") -> None:
    """Load a frozen model so that gradients can flow through it: outside inference mode, with normal weights."""
    comfy.model_management.load_models_gpu([patcher])
    plain_weights(patcher.model)
    patcher.model.requires_grad_(False)


def keep_loaded_for_training(patcher: "ModelPatcher", size: int) -> None:
    """Bring a model back that the host has moved away, in whole or in part, as it does where a VAE needs the room.

    Args:
        patcher: loaded once.
        size: how many bytes of it were loaded then.
    """
    if patcher.current_loaded_device() != patcher.load_device or patcher.loaded_size() < size:
        loaded_for_training(patcher)


def keep_loaded(guider: Any, noise_shape: Sequence[int]) -> None:
    """Bring back what a guider samples with where something else, such as a VAE, has needed the room; what evaluations need is left free."""
    models = [guider.model_patcher, *getattr(guider, "loaded_models", ())]
    if getattr(guider, "uncond_inner", None) is not None:  # a second model for the negative prompt
        models += [guider.uncond_model_patcher, *guider.uncond_loaded]
    size = guider.model_patcher.model.memory_required([2 * noise_shape[0], *noise_shape[1:]])
    comfy.model_management.load_models_gpu(models, memory_required=size)


def for_training(patcher: "ModelPatcher") -> "ModelPatcher":
    """Return a clone whose weights stay where they are while something is trained through them.

    Of a model that the host feeds on demand this is a new copy each time; clones of the copy share its weights.

    Raises:
        ValueError: when the host does not know where such a model came from.
    """
    if not patcher.is_dynamic():
        return patcher.clone()
    if patcher.cached_patcher_init is None:
        raise ValueError("'model' was not loaded by one of ComfyUI's own loaders, and with dynamic VRAM such a model cannot be trained on. "
                         "Load it by one of them, or start ComfyUI with --disable-dynamic-vram.")
    return patcher.clone(disable_dynamic=True)


def model_conds(model: "BaseModel", conditioning: list, latent: Tensor) -> dict[str, comfy.conds.CONDRegular]:
    """Return what a model makes of a CONDITIONING's first entry for latents of this shape."""
    conds = {"positive": comfy.sampler_helpers.convert_cond(conditioning)[:1]}
    return comfy.samplers.process_conds(model, latent, conds, latent.device, latent, None, 0)["positive"][0]["model_conds"]


def batched_conds(rows: list[dict[str, comfy.conds.CONDRegular]]) -> dict[str, Any] | None:
    """Put the conds of single samples together for one evaluation; None if they do not go together."""
    single = [{name: cond.process_cond(batch_size=1, area=None) for name, cond in row.items()} for row in rows]
    first, others = single[0], single[1:]
    if any(row.keys() != first.keys() or not all(first[name].can_concat(row[name]) for name in first) for row in others):
        return None
    return {name: cond.concat([row[name] for row in others]) if others else cond.cond for name, cond in first.items()}


def evaluate(patcher: "ModelPatcher", x: Tensor, sigma: Tensor, conds: dict[str, Any]) -> Tensor:
    """Return the x0 that a patched model predicts, outside any sampler; gradients can flow through it.

    Args:
        patcher: loaded.
        x: (B, ...) as samplers hold it.
        sigma: (B,).
        conds: arguments of the evaluation, batched.
    """
    options = comfy.model_patcher.create_model_options_clone(patcher.model_options)["transformer_options"]
    options |= {"wrappers": comfy.patcher_extension.copy_nested_dicts(patcher.wrappers), "cond_or_uncond": [0], "sigmas": sigma[:1],
                "sample_sigmas": torch.stack([sigma[0], torch.zeros_like(sigma[0])])}
    if torch.is_grad_enabled():
        options = differentiable_attention(options)
        with copied_weights(casting_layers(patcher.model.diffusion_model, x.device)):
            return patcher.model.apply_model(x, sigma, transformer_options=options, **conds)
    return patcher.model.apply_model(x, sigma, transformer_options=options, **conds)


def output_slope(model_sampling: Any, sigma: Tensor, like: Tensor) -> Tensor:
    """How far x0 moves when a model's output moves by 1, (B, 1, ...): errors of x0 divided by it are errors of that output."""
    zero = torch.zeros_like(like[:, :1])
    moved = model_sampling.calculate_denoised(sigma, zero + 1, zero) - model_sampling.calculate_denoised(sigma, zero, zero)
    return moved.flatten(1)[:, :1].reshape(-1, *[1] * (like.ndim - 1))


def sample_restoration(patcher: "ModelPatcher", conditioning: list, noise: Tensor, steps: int) -> Tensor:
    """Sample (1, ...) latents from pure noise with Euler steps and no negative prompt; returns raw latents for the VAE."""
    latent = torch.zeros_like(noise)
    return comfy.sample.sample(patcher, noise, steps, 1.0, "euler", "simple", conditioning, conditioning, latent, disable_pbar=True)


# What samplers do with the states they hand to the model, by the name of their function. Most walk on from that very tensor.
#   ahead: they do, and before that they evaluate a guess of the next state at the next state's sigma;
#   copied: they walk on from another tensor, of which the model was given a scaled copy or a guess;
#   apart: they walk a schedule of their own.
_STATE_USE = {
    **dict.fromkeys(("heun", "heunpp2", "exp_heun_2_x0", "exp_heun_2_x0_sde", "dpm_2_ancestral", "dpmpp_2s_ancestral",
                     "dpmpp_2s_ancestral_cfg_pp", "sa_solver_pece"), "ahead"),
    **dict.fromkeys(("sa_solver", "unipc", "unipc_bh2"), "copied"),
    **dict.fromkeys(("dpm_fast", "dpm_adaptive"), "apart"),
}  # fmt: skip


def state_use(sampler_function: Callable) -> str:
    """Tell what a sampler does with the states it hands to the model: kept, ahead, copied or apart (see above)."""
    name = getattr(sampler_function, "__name__", "")
    return _STATE_USE.get(name.removeprefix("sample_").removesuffix("_function"), "kept")


def continue_with(executor: Any, sampler: comfy.samplers.Sampler, *args: Any, **kwargs: Any) -> Tensor:
    """Go on from a SAMPLER_SAMPLE wrapper to the ones after it, and then to another sampler than the one that was called."""
    following = comfy.patcher_extension.WrapperExecutor.new_class_executor(sampler.sample, sampler, executor.wrappers, executor.idx + 1)
    return following.execute(*args, **kwargs)


# What interrupt_point raises; not an Exception, so that it passes handlers of errors.
INTERRUPTED = comfy.model_management.InterruptProcessingException


def weights_fingerprint(patcher: "ModelPatcher") -> str:
    """Tell models apart by the first values of all weights as they were loaded, and by the strengths of the patches on them."""
    digest = hashlib.blake2b(digest_size=16)
    for name, p in sorted(patcher.model.named_parameters()):
        # Weights that are patched at the moment, by this clone or another one, are kept here as they were.
        p = patcher.backup[name].weight if name in patcher.backup else p
        digest.update(f"{name} {tuple(p.shape)} {[entry[0] for entry in patcher.patches.get(name, ())]}".encode())
        if not p.is_meta and p.numel() and not isinstance(p, comfy.quant_ops.QuantizedTensor):
            while p.ndim > 1:
                p = p[0]
            digest.update(p.detach().reshape(-1)[:8].float().cpu().numpy().tobytes())
    return digest.hexdigest()


def progress_text(text: str, node_id: str) -> None:
    """Write a line under a node while it runs."""
    import server

    server.PromptServer.instance.send_progress_text(text, node_id)


class trained_operations(comfy.ops.manual_cast):  # noqa: N801 - named as the host names its own
    """Operations for networks that are yet to be trained: where the host loads on demand, its own layers have no weights until a file is loaded."""

    class Linear(comfy.ops.manual_cast.Linear):
        """Overrides loading only because the host then makes the weights at once."""

        def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> None:
            super()._load_from_state_dict(*args, **kwargs)


def initial_noise(latent: dict[str, Any], seed: int) -> Tensor:
    """The host's noise for the samples of a LATENT, on the CPU."""
    return comfy.sample.prepare_noise(latent["samples"], seed, latent.get("batch_index"))


def unit_noise(model_sampling: Any, noise: Tensor) -> Tensor:
    """Return noise as states contain it at a factor of sigma: some flow models scale it."""
    return model_sampling.noise_scaling(torch.ones((), device=noise.device), noise, torch.zeros_like(noise), False)


def held_mask(model: Any, mask: Tensor, sigma: Tensor, model_options: dict[str, Any]) -> Tensor:
    """Return what of a noise mask counts at a sigma, 1 where the sampler decides; `model` is what sampler functions call."""
    function = model_options.get("denoise_mask_function")
    return mask if function is None else function(sigma, mask, extra_options={"model": model.inner_model, "sigmas": model.sigmas})


def context_windows(model_options: dict[str, Any], model: "BaseModel", x: Tensor, window: int, overlap: int) -> dict[str, Any]:
    """Return options under which videos are evaluated in overlapping windows that are blended; by the host's own where it has some.

    Args:
        model_options: of the evaluations; not changed.
        model: tells how many frames a latent frame stands for.
        x: (B, C, T, h, w) what is evaluated; anything else is left whole.
        window, overlap: in frames of the video; window 0 for all at once.

    Raises:
        ValueError: for several videos at once, which the host's windows do not know.
    """
    if not window or x.ndim != 5 or model_options.get("context_handler") is not None:
        return model_options
    from comfy import context_windows as windows

    ratio = model.latent_format.temporal_downscale_ratio
    length = max(1, (window - 1) // ratio + 1)
    if x.shape[2] <= length:
        return model_options
    if len(x) > 1:
        raise ValueError(f"windows are for one video, and the batch holds {len(x)}. Sample them one after another.")
    schedule = windows.get_matching_context_schedule(windows.ContextSchedules.STATIC_STANDARD)
    fuse = windows.get_matching_fuse_method(windows.ContextFuseMethods.PYRAMID)
    handler = windows.IndexListContextHandler(schedule, fuse, length, min(length - 1, overlap // ratio), dim=2)
    return {**model_options, "context_handler": handler}


def attention(q: Tensor, k: Tensor, v: Tensor, options: dict[str, Any]) -> Tensor:
    """Attend with whatever implementation the user has chosen; q, k, v are (B, heads, N, d), the result is (B, N, heads * d)."""
    from comfy.ldm.modules.attention import optimized_attention

    return optimized_attention(q, k, v, q.shape[1], skip_reshape=True, transformer_options=options)


def model_times(model_sampling: Any, sigma: Tensor) -> Tensor:
    """Return model_time of every sigma of a batch (B,), float32."""
    last = float(model_sampling.timestep(torch.as_tensor(model_sampling.sigma_max)))
    return model_sampling.timestep(sigma).float() / last


def run_module(patcher: "ModelPatcher", *inputs: Tensor) -> Tensor:
    """Load a network and run it where it was loaded, with inputs from anywhere."""
    comfy.model_management.load_models_gpu([patcher])
    return patcher.model(*(x.to(patcher.load_device) for x in inputs))


def torch_device() -> torch.device:
    """Return where the host computes."""
    return comfy.model_management.get_torch_device()


def cast_like(parameter: Tensor, x: Tensor) -> Tensor:
    """Return a parameter that is no layer's as x (device, precision)."""
    return comfy.ops.cast_to_input(parameter, x)


def sample_schedule(patcher: "ModelPatcher", conditioning: list, noise: Tensor, sampler: comfy.samplers.Sampler, sigmas: Tensor,
                    latent: Tensor) -> Tensor:
    """Sample (B, ...) raw latents from a raw latent and noise, with no negative prompt; returns raw latents for the VAE."""
    return comfy.sample.sample_custom(patcher, noise, 1.0, sampler, sigmas, conditioning, conditioning, latent, disable_pbar=True)


def with_text_length(clip: comfy.sd.CLIP, tokens: int) -> comfy.sd.CLIP:
    """Return a text encoder whose T5 gives at least so many tokens, as T5 Tokenizer Options sets it."""
    clip = clip.clone()
    clip.set_tokenizer_option("t5xxl_min_length", tokens)
    return clip


def unspent_control(control: dict[str, list] | None) -> dict[str, list] | None:
    """Return what ControlNets add, in lists of its own: an evaluation of a UNet takes the entries out of those that it is given."""
    return None if control is None else {place: list(added) for place, added in control.items()}


def is_compiled(transformer_options: dict[str, Any]) -> bool:
    """Tell whether an evaluation runs through torch.compile, as TorchCompileModel and nodes like it set it up."""
    return COMPILE_KEY in transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})


def sample_with(patcher: "ModelPatcher", conditioning: list, noise: Tensor, sampler: comfy.samplers.Sampler, steps: int) -> Tensor:
    """Sample from pure noise with a sampler of any kind and no negative prompt; returns raw latents for the VAE."""
    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", steps)
    latent = torch.zeros_like(noise)
    return comfy.sample.sample_custom(patcher, noise, 1.0, sampler, sigmas, conditioning, conditioning, latent, disable_pbar=True, seed=0)


def make_room(device: torch.device, size: float, but: "ModelPatcher | None" = None) -> None:
    """Have the host move its models away, one excepted, until so many bytes are free on a device, beside what it keeps in reserve."""
    management = comfy.model_management
    kept = [] if but is None else [management.LoadedModel(but)]
    management.free_memory(size + management.extra_reserved_memory(), device, keep_loaded=kept)
