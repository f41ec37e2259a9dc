"""What the pack knows of the host's private shapes: gradients under inference mode, VAEs, latent spaces, wrappers. Nothing else may."""

import copy
import hashlib
import logging
from collections.abc import Callable, Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from types import CellType, FunctionType
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import comfy.conds
import comfy.ldm.common_dit
import comfy.lora
import comfy.lora_convert
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
from comfy.weight_adapter import WeightAdapterBase
from comfy.weight_adapter.bypass import BypassForwardHook

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

# Layers of networks that learn during a run: plain weights in the run's own precision, created where they are used.
run_operations = comfy.ops.disable_weight_init
# Layers of networks that are loaded beside a model: weights of any precision, used in that of what they are given.
managed_operations = comfy.ops.manual_cast

WrappersMP = comfy.patcher_extension.WrappersMP
CallbacksMP = comfy.patcher_extension.CallbacksMP

OUT_OF_MEMORY = (comfy.model_management.OOM_EXCEPTION, comfy.model_management.ACCELERATOR_ERROR)

# Backward through a VAE decoder keeps its activations: about this many times the host's estimate for a plain decode.
BACKWARD_FACTOR = 3.5
# Of comfy_api.torch_helpers.torch_compile, which training has to do without.
COMPILE_KEY = "torch.compile"


@contextmanager
def gradients() -> Iterator[None]:
    """Let autograd work inside the host's inference mode; tensors made outside must be cloned before they are used within."""
    management = comfy.model_management
    before = management.in_training
    management.in_training = True
    try:
        with torch.inference_mode(False), torch.enable_grad():
            yield
    finally:
        management.in_training = before


def plain_weights(module: nn.Module, but: Collection[nn.Module] = ()) -> None:
    """Turn inference tensors among a frozen module's weights into normal ones of the same values, in place.

    Weights loaded under inference mode cannot take part in a backward pass. This is the one lasting change the pack makes to a shared
    model. Layers that the host feeds on demand keep theirs, whether named or not: a copy of a file that is mapped would take its memory.

    Args:
        module: changed.
        but: parts of it that stay as they are.
    """
    left = {id(part) for part in but}
    with torch.inference_mode(False):
        for part in module.modules():
            if id(part) in left or _on_demand(part):
                continue
            for name, p in list(part._parameters.items()):
                if p is not None and p.is_inference():
                    normal = nn.Parameter(p.clone(), requires_grad=False)
                    # The host notes on weights in which precision they run.
                    vars(normal).update(vars(p))
                    part._parameters[name] = normal
            for name, b in list(part._buffers.items()):
                if b is not None and b.is_inference():
                    part._buffers[name] = b.clone()


def casting_layers(module: nn.Module, device: torch.device | None = None) -> list[nn.Module]:
    """Return the layers that fetch their weights for each use; with a device, those whose weights do not lie there."""
    layers = [part for part in module.modules() if isinstance(part, comfy.ops.CastWeightBiasOp)]
    if device is None:
        return layers
    return [layer for layer in layers if _on_demand(layer) or any(p.device != device for p in layer.parameters(recurse=False))]


def _on_demand(part: nn.Module) -> bool:
    return hasattr(part, "_v")


@contextmanager
def copied_weights(layers: Iterable[nn.Module]) -> Iterator[None]:
    """Have layers compute with copies of their weights, which a backward pass may keep.

    What the host fetches for a layer can be an inference tensor from an earlier use, or memory that others use before the backward pass
    comes to it.
    """
    names = ("weight_function", "bias_function")
    kept = [(layer, name, vars(layer).get(name)) for layer in layers for name in names]
    try:
        for layer, name, _ in kept:
            setattr(layer, name, [*getattr(layer, name), torch.clone])
        yield
    finally:
        for layer, name, own in kept:
            if own is not None:
                setattr(layer, name, own)
            else:
                vars(layer).pop(name, None)


def plain(value: Any) -> Any:
    """Clone inference tensors anywhere inside conds (lists, dicts, the host's COND objects)."""
    if isinstance(value, Tensor):
        return value.clone() if value.is_inference() else value
    if isinstance(value, dict):
        return {k: plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(v) for v in value)
    if isinstance(value, comfy.conds.CONDRegular):
        return value._copy_with(plain(value.cond))
    return value


@contextmanager
def unshared_norm_inputs(diffusion_model: nn.Module) -> Iterator[None]:
    """FLUX adds to its streams in place after a norm has kept them for the backward pass: give its norms copies while gradients flow."""
    names = ("img_norm1", "img_norm2", "txt_norm1", "txt_norm2", "pre_norm")
    blocks = [*getattr(diffusion_model, "double_blocks", ()), *getattr(diffusion_model, "single_blocks", ())]
    norms = [getattr(block, name) for block in blocks for name in names if hasattr(block, name)]
    handles = [norm.register_forward_pre_hook(lambda _, args: (args[0].clone(), *args[1:])) for norm in norms]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


class PixelDecoder:
    """A VAE decoder that gradients flow through: latents in the model's space to pictures in 0..1, unclamped.

    Args:
        vae: the host's VAE.
        model: supplies process_latent_out.
    """

    def __init__(self, vae: "VAE", model: "BaseModel") -> None:
        self.vae, self.model = vae, model
        low, high = vae.process_output(torch.tensor([0.25, 0.75])).tolist()
        self.gain, self.offset = (high - low) * 2, low - (high - low) / 2
        self.cell = vae.spacial_compression_decode()
        self.to_raw = _per_channel(model.process_latent_out, model.latent_format)
        self.layers = casting_layers(vae.first_stage_model)

    def prepare(self) -> None:
        """Make the loaded weights fit for a backward pass; cheap when they already are."""
        plain_weights(self.vae.first_stage_model, self.layers)

    def __call__(self, z: Tensor) -> Tensor:
        """Decode (B, C, h, w) or (B, C, 1, h, w) to (B, 3, H, W) float32."""
        raw = self.to_raw(z).to(self.vae.device, self.vae.vae_dtype)
        if raw.ndim == 5 and self.vae.latent_dim == 2:
            raw = raw[:, :, 0]
        with copied_weights(self.layers if raw.requires_grad else ()):
            x = self.vae.first_stage_model.decode(raw)
        x = x[:, :, 0] if x.ndim == 5 else x
        return x.float() * self.gain + self.offset

    def memory(self, shape: tuple[int, ...]) -> float:
        """Bytes that one forward and backward pass over latents of `shape` needs, with the copies of weights that it keeps."""
        return BACKWARD_FACTOR * self.vae.memory_used_decode(shape, self.vae.vae_dtype) + self.vae.patcher.model_size()


class LatentEncoder:
    """A VAE encoder that gradients flow through: pictures in 0..1 to latents in the model's space."""

    def __init__(self, vae: "VAE", model: "BaseModel") -> None:
        self.vae, self.model = vae, model
        self.cell = vae.spacial_compression_encode()
        self.from_raw = _per_channel(model.process_latent_in, model.latent_format)
        self.layers = casting_layers(vae.first_stage_model)

    def __call__(self, x: Tensor) -> Tensor:
        """Encode (B, 3, H, W) in 0..1 to float32 latents as the model sees them."""
        pixels = self.vae.process_input(x).to(self.vae.device, self.vae.vae_dtype)
        if self.vae.latent_dim == 3:
            pixels = pixels.unsqueeze(2)
        with copied_weights(self.layers if pixels.requires_grad else ()):
            z = self.vae.first_stage_model.encode(pixels).float()
        return self.from_raw(z)


def _per_channel(process: Callable[[Tensor], Tensor], latent_format: Any) -> Callable[[Tensor], Tensor]:
    """Express a latent format's scaling by its gain and offset: some formats keep tensors that cannot take part in a backward pass."""
    probe = torch.zeros([1, latent_format.latent_channels] + [1] * latent_format.latent_dimensions)
    with torch.inference_mode(False):
        offset = process(probe).float().clone()
        gain = process(probe + 1).float().clone() - offset

    def apply(z: Tensor) -> Tensor:
        return z * gain.to(z).reshape(gain.shape[:z.ndim]) + offset.to(z).reshape(offset.shape[:z.ndim])

    return apply


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


def reserve(model: Any, noise_shape: list[int], extra_bytes: float) -> list[int]:
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


def is_quantised(patcher: "ModelPatcher") -> bool:
    """Tell whether any weight of a model is quantised, so that it can neither be changed in place nor have gradients go through it."""
    return any(isinstance(p, comfy.quant_ops.QuantizedTensor) for p in patcher.model.diffusion_model.parameters())


def with_lora(patcher: "ModelPatcher", tensors: dict[str, Tensor], strength: float) -> "ModelPatcher":
    """Return a clone with a LoRA in native keys; beside the weights where they are quantised, in them otherwise."""
    if not is_quantised(patcher):
        return comfy.sd.load_lora_for_models(patcher, None, tensors, strength, 0)[0]
    patched, names = patcher.clone(), comfy.lora.model_lora_keys_unet(patcher.model, {})
    loaded = comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), names)
    beside = {key: change for key, change in loaded.items() if isinstance(key, str) and isinstance(change, WeightAdapterBase)}
    patched.add_patches({key: change for key, change in loaded.items() if key not in beside}, strength)
    branches = _LoraBranches(beside, strength)
    injection = comfy.patcher_extension.PatcherInjection(branches.inject, branches.eject)
    patched.set_injections(f"mend_lora_{len(patched.injections)}", [injection])
    return patched


class _LoraBranches:
    """LoRA beside the weights, as hooks: the host's own branches wrap `forward`, and of two that are not unwrapped in reverse one stays."""

    def __init__(self, adapters: dict[str, WeightAdapterBase], strength: float) -> None:
        self.adapters, self.strength = adapters, strength
        self.handles: dict[int, list[Any]] = {}

    def inject(self, patcher: "ModelPatcher") -> None:
        self.eject(patcher)
        self.handles[id(patcher.model)] = [self._hooked(patcher.model, key, adapter) for key, adapter in self.adapters.items()]

    def eject(self, patcher: "ModelPatcher") -> None:
        for handle in self.handles.pop(id(patcher.model), ()):
            handle.remove()

    def _hooked(self, model: "BaseModel", key: str, adapter: WeightAdapterBase) -> Any:
        layer = model.get_submodule(key.removesuffix(".weight"))
        # It tells the adapter its strength and what kind of layer it is on.
        branch = BypassForwardHook(layer, adapter, self.strength)
        branch._move_adapter_weights_to_device(comfy.model_management.get_torch_device(), model.get_dtype_inference())
        return layer.register_forward_hook(_lora_branch(adapter))


def _lora_branch(adapter: WeightAdapterBase) -> Callable:
    # GLoRA changes what goes into the layer too.
    whole = type(adapter).bypass_forward is not WeightAdapterBase.bypass_forward

    def add(layer: nn.Module, args: tuple[Tensor, ...], out: Tensor) -> Tensor:
        if whole:
            return out + adapter.bypass_forward(layer.forward, *args) - layer.forward(*args)
        return adapter.g(out + adapter.h(args[0], out))

    return add


@dataclass(frozen=True)
class LoraTarget:
    """What the host's LoRA loader patches under some name.

    Attributes:
        key: of the weight, in the model's state dict.
        rows: the first row and the number of rows that the name stands for in a fused layer; None for all.
        reorder: what must be done to the rows of a change first, such as swapping shift and scale; None for nothing.
    """

    key: str
    rows: tuple[int, int] | None = None
    reorder: Callable[[Tensor], Tensor] | None = None

    @property
    def whole(self) -> bool:
        """Whether a change can be added to the weight as it is."""
        return self.rows is None and self.reorder is None


def lora_targets(model: "BaseModel") -> dict[str, LoraTarget]:
    """Return all names under which the host's LoRA loader knows weights of this model, without the ends such as `.lora_up.weight`."""
    weights, targets = set(model.state_dict()), {}
    for name, value in comfy.lora.model_lora_keys_unet(model, {}).items():
        key, narrow, reorder = (value, None, None) if isinstance(value, str) else (*value, None)[:3]
        if key in weights:
            targets[name] = LoraTarget(key, None if narrow is None else narrow[1:], reorder)  # the host narrows rows only
    return targets


def convert_lora(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Rename the LoRA forms that the host knows by whole files, such as FLUX attention processors; other keys stay."""
    named: dict[str, Tensor] = {}
    for key, tensor in comfy.lora_convert.convert_lora(dict(tensors)).items():
        processor = ".processor.qkv_lora" in key or ".processor.proj_lora" in key
        named.update(comfy.lora_convert.convert_uso_lora({key: tensor}) if processor else {key: tensor})
    return named


def layer_shape(model: "BaseModel", key: str) -> tuple[int, ...]:
    """Return the shape of a weight as the layer means it: quantised weights may be stored in another one."""
    path, _, name = key.rpartition(".")
    layer = model.get_submodule(path)
    if name == "weight" and hasattr(layer, "in_features"):
        return layer.out_features, layer.in_features
    return tuple(getattr(layer, name).shape)


def loaded_for_training(patcher: "ModelPatcher") -> None:
    """Load a frozen model so that gradients can flow through it: outside inference mode, with normal weights."""
    comfy.model_management.load_models_gpu([patcher])
    plain_weights(patcher.model)
    patcher.model.requires_grad_(False)


def keep_loaded_for_training(patcher: "ModelPatcher") -> None:
    """Bring a model back that the host has moved away, as it does where a VAE needs the room."""
    if patcher.current_loaded_device() != patcher.load_device:
        loaded_for_training(patcher)


def keep_loaded(guider: Any) -> None:
    """Bring back what a guider samples with where something else, such as a VAE, has needed the room."""
    comfy.model_management.load_models_gpu([guider.model_patcher, *getattr(guider, "loaded_models", ())])


def for_training(patcher: "ModelPatcher") -> "ModelPatcher":
    """Return a clone whose weights stay where they are while something is trained through them."""
    return patcher.clone(disable_dynamic=True) if patcher.is_dynamic() else patcher.clone()


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
    """Return the x0 that a patched model predicts, outside any sampler.

    Args:
        patcher: loaded.
        x: (B, ...) as samplers hold it.
        sigma: (B,).
        conds: arguments of the evaluation, batched.
    """
    options = comfy.model_patcher.create_model_options_clone(patcher.model_options)["transformer_options"]
    options |= {"wrappers": comfy.patcher_extension.copy_nested_dicts(patcher.wrappers), "cond_or_uncond": [0], "sigmas": sigma[:1],
                "sample_sigmas": torch.stack([sigma[0], torch.zeros_like(sigma[0])])}
    return patcher.model.apply_model(x, sigma, transformer_options=options, **conds)


def encode_pictures(vae: "VAE", model: "BaseModel", pictures: Tensor) -> Tensor:
    """Encode (B, H, W, 3) in 0..1 to latents as the model sees them, float32; a video VAE takes each picture for a video of one frame."""
    if vae.latent_dim == 3:
        raw = torch.cat([vae.encode(picture) for picture in pictures[..., :3].split(1)])
    else:
        raw = vae.encode(pictures[..., :3])
    return model.process_latent_in(raw.float())


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


def checkpointed_blocks(patcher: "ModelPatcher") -> "ModelPatcher":
    """Return a clone whose blocks keep no activations for the backward pass but compute them again.

    For UNets, and transformers whose blocks can be replaced (SD3, FLUX, WAN). Patches that others have put around a block stay outside of
    it. FLUX needs unshared_norm_inputs as ever, until the backward pass is over.

    Raises:
        ValueError: for other models.
    """
    patched, diffusion_model = patcher.clone(), patcher.model.diffusion_model
    if hasattr(diffusion_model, "input_blocks"):
        _checkpoint_unet(patched)
        return patched
    lists = {"joint_blocks": "double_block", "double_blocks": "double_block", "single_blocks": "single_block", "blocks": "double_block"}
    sizes = [(kind, len(getattr(diffusion_model, name))) for name, kind in lists.items() if hasattr(diffusion_model, name)]
    if not sizes:
        raise ValueError(f"gradient checkpointing does not know models of the kind {type(patcher.model).__name__}. Switch it off.")
    # The host checkpoints every replaced block of SD3 by itself.
    run = _run_block if hasattr(diffusion_model, "joint_blocks") else _run_checkpointed
    for kind, size in sizes:
        for index in range(size):
            _put_inside(patched, kind, index, run)
    return patched


def _put_inside(patcher: "ModelPatcher", kind: str, index: int, run: Callable[[Callable, dict], dict]) -> None:
    """Have `run` call one of a transformer's blocks, inside of whatever replaces that block already."""
    earlier = patcher.model_options["transformer_options"].get("patches_replace", {}).get("dit", {}).get((kind, index))

    def replacement(args: dict[str, Any], extra: dict[str, Any]) -> dict[str, Any]:
        def inner(args: dict[str, Any]) -> dict[str, Any]:
            return run(extra["original_block"], args)

        return inner(args) if earlier is None else earlier(args, {**extra, "original_block": inner})

    patcher.set_model_patch_replace(replacement, "dit", kind, index)


def _run_block(block: Callable, args: dict[str, Any]) -> dict[str, Any]:
    return block(args)


def _run_checkpointed(block: Callable, args: dict[str, Any]) -> dict[str, Any]:
    if not torch.is_grad_enabled():
        return block(args)
    block, options = _bound_now(block), dict(args["transformer_options"])
    # FLUX writes into the streams it is given, which the second run must find as they were.
    return checkpoint(lambda: block({**args, **_copied_streams(args), "transformer_options": dict(options)}), use_reentrant=False)


def _copied_streams(args: dict[str, Any]) -> dict[str, Tensor]:
    return {name: args[name].clone() for name in ("img", "txt") if isinstance(args.get(name), Tensor)}


def _bound_now(function: Callable) -> Callable:
    """Copy a closure with what its variables hold now: the host's name the block of a loop that has moved on by the backward pass."""
    cells = getattr(function, "__closure__", None)
    if cells is None:
        return function
    own = tuple(CellType(cell.cell_contents) for cell in cells)
    return FunctionType(function.__code__, function.__globals__, function.__name__, function.__defaults__, own)


def _checkpoint_unet(patcher: "ModelPatcher") -> None:
    from comfy.ldm.modules.attention import SpatialTransformer
    from comfy.ldm.modules.diffusionmodules.openaimodel import ResBlock, forward_timestep_embed

    def handler(layer: nn.Module, x: Tensor, emb: Tensor, context: Tensor, options: dict, *rest: Any) -> Tensor:
        handlers = [entry for entry in options["patches"]["forward_timestep_embed_patch"] if entry[1] is not handler]
        before, after = {**options, "patches": {**options["patches"], "forward_timestep_embed_patch": handlers}}, {}

        def run(x: Tensor, emb: Tensor, context: Tensor) -> Tensor:
            own = dict(before)
            x = forward_timestep_embed([layer], x, emb, context, own, *rest)
            after.update(own)
            return x

        x = checkpoint(run, x, emb, context, use_reentrant=False) if torch.is_grad_enabled() else run(x, emb, context)
        options.update({name: value for name, value in after.items() if name != "patches"})
        return x

    patcher.set_model_patch(((ResBlock, SpatialTransformer), handler), "forward_timestep_embed_patch")


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


def latent_frames(vae: "VAE", pictures: int) -> int:
    """Return how many latent frames a VAE makes of so many pictures of one video: as many, if it knows pictures only."""
    return vae.downscale_ratio[0](pictures) if _is_video_vae(vae) else pictures


def video_pictures(vae: "VAE", frames: int) -> int:
    """Return how many pictures a VAE makes of so many latent frames."""
    return vae.upscale_ratio[0](frames) if _is_video_vae(vae) else frames


def encode_video(vae: "VAE", pictures: Tensor) -> Tensor:
    """Encode (F, H, W, 3) in 0..1 as one video to raw (1, C, T, h, w), picture by picture where the VAE knows pictures only."""
    if _is_video_vae(vae):
        return vae.encode(pictures).float()
    raw = torch.cat([vae.encode(picture) for picture in pictures.split(1)]).float()
    return (raw[:, :, 0] if raw.ndim == 5 else raw).movedim(0, 1)[None]


def _is_video_vae(vae: "VAE") -> bool:
    return vae.latent_dim == 3 and not getattr(vae, "not_video", False) and isinstance(vae.downscale_ratio, tuple)


class trained_operations(comfy.ops.manual_cast):  # noqa: N801 - named as the host names its own
    """The same for networks that are yet to be trained: where the host loads on demand, its layers have none before a file is loaded."""

    class Linear(comfy.ops.manual_cast.Linear):
        """The host gives weights at once to layers that load in a way of their own."""

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


def differentiable_attention(transformer_options: dict[str, Any]) -> dict[str, Any]:
    """Return options under which attention is torch's own: of the implementations that users may have chosen some have no backward pass."""
    from comfy.ldm.modules.attention import attention_pytorch

    return {**transformer_options, "optimized_attention_override": lambda chosen, *args, **kwargs: attention_pytorch(*args, **kwargs)}


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


def float_copy(vae: "VAE") -> nn.Module:
    """Return a frozen float32 copy of a VAE's network with normal weights, on the CPU, that gradients flow through.

    The weights are this VAE's own, its patches among them, whatever is loaded at the moment: another clone's patches may be in their place.
    """
    patcher = vae.patcher
    with torch.inference_mode(False), torch.no_grad():
        copied = _unloaded_copy(vae.first_stage_model).cpu().float()
        plain_weights(copied)
        for name, p in copied.named_parameters():
            if name in patcher.backup:
                p.copy_(patcher.backup[name].weight)
            if name in patcher.patches:
                p.copy_(comfy.lora.calculate_weight(patcher.patches[name], p.clone(), name))
    return copied.requires_grad_(False)


def _unloaded_copy(module: nn.Module) -> nn.Module:
    """Copy a module without what the host keeps on it while it is loaded: patches, and handles of memory that each copy would free."""

    def traces(part: nn.Module) -> dict[str, Any]:
        return {name: value for name, value in vars(part).items()
                if name.startswith(("_v_", "_pin", "_prefetch", "dynamic_")) or name in ("_v", "weight_function", "bias_function")
                or name.endswith("_lowvram_function")}

    copied = copy.deepcopy(module, {id(value): value for part in module.modules() for value in traces(part).values()})
    for part in copied.modules():
        for name in traces(part):
            delattr(part, name)
    return copied


def decode_with(vae: "VAE", network: "ModelPatcher", samples: Tensor, decode: Callable[[Tensor], Tensor], channels: int, factor: float,
                tiling: tuple[int, int], tiled: bool) -> tuple[Tensor, Tensor]:
    """Run a decoder of our own as the host runs the VAE's: in its memory, as many at once as fit, in tiles if asked for or memory runs out.

    Args:
        vae: what `decode` uses; loaded.
        network: what it uses besides; loaded.
        samples: (B, C, h, w); latents, with what else belongs to each cell behind them.
        decode: samples on the VAE's device and in its precision -> (B, channels, H, W), the picture first, as the VAE's own decoder gives
            it.
        channels: that it returns.
        factor: how many times the memory of a plain decode it needs.
        tiling: (tile, overlap) in cells.
        tiled: use tiles in any case.

    Returns:
        pictures (B, 3, H, W) in 0..1 and the other channels.
    """
    management, dtype = comfy.model_management, vae.vae_output_dtype()
    # Pictures outlive what came with them, and must not hold on to its memory.
    sizes = (3, channels - 3)
    memory = factor * vae.memory_used_decode(samples.shape, vae.vae_dtype)
    with management.cuda_device_context(vae.device):
        out = None
        if not tiled:
            try:
                management.load_models_gpu([vae.patcher, network], memory_required=memory, force_full_load=vae.disable_offload)
                together = max(1, int(vae.patcher.get_free_memory(vae.device) / memory))
                parts = [
                    [half.to(vae.output_device, dtype, copy=True) for half in decode(part.to(vae.device, vae.vae_dtype)).split(sizes, 1)]
                    for part in samples.split(together)
                ]
                out = [torch.cat(half) for half in zip(*parts)]
            except OUT_OF_MEMORY as error:
                reraise_unless_out_of_memory(error)
                logging.warning("Mend: out of memory when decoding the whole picture, going on in tiles.")
        if out is None:  # outside of the handler, which holds on to what was allocated
            management.soft_empty_cache()
            management.load_models_gpu([vae.patcher, network], memory_required=memory, force_full_load=vae.disable_offload)
            tiles = _decode_tiles(vae, samples, lambda part: decode(part.to(vae.device, vae.vae_dtype)).to(dtype=dtype), channels, tiling)
            out = [half.clone() for half in tiles.split(sizes, 1)]
        return vae.process_output(out[0]), out[1]


def _decode_tiles(vae: "VAE", samples: Tensor, decode: Callable[[Tensor], Tensor], channels: int, tiling: tuple[int, int]) -> Tensor:
    """The mean of three tilings, as the host's own tiled decode takes it, sum for sum."""
    tile, overlap = tiling
    shapes = ((tile // 2, tile * 2), (tile * 2, tile // 2), (tile, tile))
    steps = [comfy.utils.get_tiled_scale_steps(samples.shape[3], samples.shape[2], x, y, overlap) for x, y in shapes]
    bar = comfy.utils.ProgressBar(len(samples) * sum(steps))
    first, second, third = (comfy.utils.tiled_scale(samples, decode, x, y, overlap, upscale_amount=vae.upscale_ratio, out_channels=channels,
                                                    output_device=vae.output_device, pbar=bar) for x, y in shapes)
    return (first + second + third) / 3.0


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


def make_room(device: torch.device, size: float) -> None:
    """Have the host move its models away until so many bytes are free on a device, beside what it keeps in reserve."""
    comfy.model_management.free_memory(size + comfy.model_management.extra_reserved_memory(), device)
