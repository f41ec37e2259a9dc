"""Degradation diffusion (Defusion, arXiv 2506.16960): bridge, adapter and LoRA in one file, new, checked, and hung on a model."""

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from . import degradation_tokenizer as tokenizer
from . import irb, via
from .anatomy import Anatomy, Site, anatomy_of, every_block
from .blocks import changed_picture, visit_blocks
from .conditioned_patch import ConditionedPatch
from .config_values import one_of, whole_number
from .degradation_condition import DegradationCondition
from .degraded_picture import FORMS
from .diffusion_adapter import new_lora
from .fine_tune import FineTune, model_change
from .fit import check_family, check_shapes
from .frames import frames_of
from .host import inference_module, trained_operations
from .weights_file import ANY_FAMILY, Weights, part_of

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.model_patcher import ModelPatcher

KIND = "degradation_model"
NETWORK, TOKENIZER = "network.", "tokenizer."
# d of degraded_picture.py; 0 until it has been measured.
DEVIATION = "residual.deviation"
BRIDGES = ("pyramid", "concatenation")
INSTRUCTIONS = ("difference", "degraded", "words")
CHOICES = {"form": FORMS, "size": irb.SIZES, "bridge": BRIDGES, "instruction": INSTRUCTIONS}


@dataclass(frozen=True)
class Plan:
    """What the networks need to know of a model.

    Attributes:
        anatomy: of the model.
        sites: after all its blocks.
        places: of attentions over the instruction.
    """

    anatomy: Anatomy
    sites: tuple[Site, ...]
    places: tuple[via.Attended, ...]

    @classmethod
    def of(cls, model: "BaseModel", size: str) -> "Plan":
        """Look at a model.

        Raises:
            ValueError: for a model whose architecture is not known.
        """
        anatomy, sites = anatomy_of(model), every_block(model)
        return cls(anatomy, sites, via.attended_places(model, sites, size, anatomy.kind == "unet"))


class DegradationNetwork(nn.Module):
    """Bridge and instruction adapter of a model, as the config of their file says."""

    def __init__(self, plan: Plan, config: dict[str, Any], operations: Any, **factory: Any) -> None:
        super().__init__()
        tokens, anatomy = plan.anatomy.kind != "unet", plan.anatomy
        channels = anatomy.latent_channels
        self.tokens, self.cell = tokens, config["cell"]
        if config["bridge"] == "pyramid":
            measures = config["size"], tokens, config["cell"], channels, anatomy.emb
            self.irb = irb.ImageRestorationBridge(plan.sites, *measures, operations, **factory)
        else:
            self.irb = irb.Concatenation(plan.sites, channels, operations, **factory)
        told = config["instruction"] != "words"
        self.via = via.VisualInstructionAdapter(plan.places, config["code_width"], operations, **factory) if told else None

    def features(self, pixels: Tensor, c_lq: Tensor) -> Any:
        """Return what the bridge works with, of pixels (B, 3, H, W) in -1..1 and their latent."""
        return self.irb.pyramid(pixels, c_lq) if hasattr(self.irb, "pyramid") else c_lq


def new_weights(model: "BaseModel", codes: Weights, form: str, size: str, rank: int, seed: int, fine_tune: bool = False,
                **variant: str) -> Weights:
    """Make an untrained degradation model, which leaves the user's model as it is.

    Args:
        model: the host's.
        codes: the tokenizer whose instructions it will understand; checked.
        form: one of degraded_picture.FORMS.
        size: one of irb.SIZES.
        rank: of the LoRA; 0 for none.
        seed: of the weights that do not start at zero.
        fine_tune: whether all weights of the model learn, in place of a LoRA.
        variant: `bridge` and `instruction`, one of BRIDGES and INSTRUCTIONS, to compare with.

    Raises:
        ValueError: for a model whose architecture is not known, or that a variant is not made for.
    """
    config = {
        "form": form, "size": size, "rank": 0 if fine_tune else rank, "cell": model.latent_format.spacial_downscale_ratio,
        "bridge": BRIDGES[0], "instruction": INSTRUCTIONS[0], **variant,
        "codebook": tokenizer.fingerprint(codes), "code_width": tokenizer.SIZES[codes.config["size"]].width, "tokenizer": codes.config,
    }  # fmt: skip
    config |= {"fine_tune": True} if fine_tune else {}
    plan = Plan.of(model, size)
    if config["bridge"] == "concatenation" and plan.anatomy.kind != "unet":
        raise ValueError("concatenation is there for UNets only.")
    generator = torch.Generator().manual_seed(seed)
    network = DegradationNetwork(plan, config, trained_operations)
    irb.initialise_bridge(network.irb, generator)
    if network.via is not None:
        via.initialise_adapter(network.via, plan.places, model, generator)
    tensors = {NETWORK + name: tensor for name, tensor in network.state_dict().items()}
    tensors |= {TOKENIZER + name: tensor for name, tensor in tokenizer.for_use(codes).tensors.items()}
    tensors[DEVIATION] = torch.zeros(())
    tensors |= FineTune(model).native() if fine_tune else new_lora(model, rank, generator)
    tensors = {name: tensor.detach() for name, tensor in tensors.items()}
    return Weights(KIND, plan.anatomy.family, config, tensors, f"the new degradation model for {plan.anatomy.family}")


def check_fit(weights: Weights, model: "BaseModel", node: str) -> Plan:
    """Check that weights were made for this model, and return what there is to know of it.

    Raises:
        ValueError: naming the node, the weights and both kinds, both families, or the first tensor that does not fit.
    """
    check_family(weights, KIND, model, node)
    check_config(weights, node)
    plan = Plan.of(model, weights.config["size"])
    check_shapes(weights, expected_tensors(plan, weights, model), node)
    return plan


def check_config(weights: Weights, node: str) -> None:
    """Check that a degradation model says all that it has to of itself.

    Raises:
        ValueError: naming the node and the weights.
    """
    if not _understood(weights.config):
        raise ValueError(f"{node}: {weights.name} describes itself as {weights.config}, which this pack does not understand. Update the "
                         "pack, or save the file again.")


def _understood(config: dict[str, Any]) -> bool:
    codes, cell = config.get("tokenizer"), config.get("cell")
    numbers = [config.get(name) for name in ("rank", "cell", "code_width")]
    return (
        all(one_of(config.get(name), options) for name, options in CHOICES.items())
        and all(whole_number(number) for number in numbers) and cell > 0 and not cell & (cell - 1)
        and isinstance(config.get("fine_tune", False), bool) and isinstance(config.get("codebook"), str)
        and isinstance(codes, dict) and one_of(codes.get("size"), tokenizer.SIZES)
        and config["code_width"] == tokenizer.SIZES[codes["size"]].width
    )


def expected_tensors(plan: Plan, weights: Weights, model: "BaseModel") -> dict[str, Tensor]:
    """Return empty tensors under the names and with the shapes that such a file has for a model."""
    config = weights.config
    with torch.device("meta"):
        network = DegradationNetwork(plan, config, nn)
        codes = tokenizer.TokenEncoder(tokenizer.SIZES[config["tokenizer"]["size"]], nn)
        tensors = {NETWORK + name: tensor for name, tensor in network.state_dict().items()}
        tensors |= {TOKENIZER + tokenizer.ENCODER + name: tensor for name, tensor in codes.state_dict().items()}
        tensors[DEVIATION] = torch.zeros(())
        change = model_change(model, config)
        return tensors if change is None else tensors | change.native()


def tokenizer_of(weights: Weights) -> Weights:
    """Return the tokenizer that a degradation model was made with, as far as making tokens needs it."""
    tensors = part_of(weights.tensors, TOKENIZER)
    return Weights(tokenizer.KIND, ANY_FAMILY, weights.config["tokenizer"], tensors, weights.name)


def inference_patcher(weights: Weights, plan: Plan) -> "ModelPatcher":
    """Return the networks of a file as a model that the host loads beside others; made once for each object of weights."""

    def build(**factory: Any) -> DegradationNetwork:
        return DegradationNetwork(plan, weights.config, **factory)

    return weights.once(f"{KIND} {plan.anatomy.family}", lambda: inference_module(build, part_of(weights.tensors, NETWORK)))


def checked_instruction(weights: Weights, instruction: tokenizer.Instruction, node: str) -> Tensor:
    """Return the tokens of an instruction that these weights understand.

    Raises:
        ValueError: for tokens of another tokenizer, or of another shape.
    """
    tokenizer.check_codebook(instruction, weights.config["codebook"], node)
    tokens, width = instruction.tokens, weights.config["code_width"]
    if tokens.ndim != 3 or tokens.shape[-1] != width or not tokens.numel():
        raise ValueError(f"{node}: the visual instruction has the shape {'x'.join(map(str, tokens.shape))}, and {weights.name} understands "
                         f"tokens of width {width}. Encode the charts with the tokenizer that it was trained with.")
    return tokens


def check_cell(cell: int, vae: Any, node: str) -> None:
    """Check that a VAE has latent cells of the size that weights were made for.

    Raises:
        ValueError: naming both.
    """
    found = vae.spacial_compression_encode()
    if found != cell:
        raise ValueError(f"{node}: 'vae' makes one cell of {found} pixels, and these weights know cells of {cell}. Connect the VAE of the "
                         "model.")


class DegradationPatch(ConditionedPatch):
    """One use of a degradation model on a host model.

    Args:
        network: its weights, shared by all uses.
        plan: of the model.
        condition: the degraded picture and the instruction.
        start_percent, end_percent: the part of sampling in which it acts.
    """

    condition: DegradationCondition

    def __init__(self, network: DegradationNetwork, plan: Plan, condition: DegradationCondition, start_percent: float = 0.0,
                 end_percent: float = 1.0) -> None:
        super().__init__(condition, 1.0, start_percent, end_percent)
        self.network, self.plan = network, plan

    def attach(self, patcher: "ModelPatcher") -> None:
        """Hang it on a clone that is the caller's own."""
        self.listen(patcher)
        self.condition.listen(patcher)
        visit_blocks(patcher, self.plan.anatomy, list(self.plan.sites), self.condition.key, self._visit, skips=True)
        if self.plan.anatomy.kind == "unet" and self.network.via is not None:
            patcher.set_model_attn2_patch(self._enter_attention)
            patcher.set_model_attn2_output_patch(self._leave_attention)

    def _apply_model(self, executor: Any, x: Tensor, t: Tensor, c_concat: Any, c_crossattn: Any, control: Any, transformer_options: dict,
                     **kwargs: Any) -> Tensor:
        told = self.condition.told(kwargs, transformer_options)
        return super()._apply_model(executor, x, t, c_concat, c_crossattn, control, told, **kwargs)

    def opened(self, c_lq: Tensor, mask: Tensor, model_sampling: Any, sigma: Tensor) -> "_Evaluation":
        """The pyramid runs at the first block, in its precision; once for what conds have in common."""
        return _Evaluation(frames_of(c_lq))

    def _visit(self, site: Site, h: Tensor, emb: Tensor, options: dict) -> Tensor:
        evaluation = options[self.condition.key]
        if evaluation.features is None:
            seen = evaluation.seen.to(h)
            if options.get(self.condition.whole_key):
                seen = seen[:len(seen) // len(options.get("cond_or_uncond", (0,)))]
            pixels, c_lq = parted(seen, self.network.cell)
            evaluation.features = self.network.features(pixels, c_lq)
            if self.network.via is not None:
                # Here and not in an attention, which gradient checkpointing may run twice.
                evaluation.context = self.network.via.embed(options[self.condition.tokens_key].to(h))
        if not self.network.tokens:
            return h + self.network.irb(site, h, evaluation.features, emb.to(h))

        def told(own: Tensor) -> Tensor:
            own = own + self.network.irb(site, own, evaluation.features, emb.to(own))
            return own if self.network.via is None else own + self.network.via(site.name, own, evaluation.context, options)

        patch = self.plan.sites[0].scale
        rows, columns = (-(-side // patch) for side in evaluation.seen.shape[-2:])
        return changed_picture(h, rows * columns, told)

    def _enter_attention(self, n: Tensor, context: Tensor, value: Tensor, extra: dict) -> tuple[Tensor, Tensor, Tensor]:
        if self.condition.key in extra:
            extra[self.condition.key].query = n
        return n, context, value

    def _leave_attention(self, n: Tensor, extra: dict) -> Tensor:
        evaluation = extra.get(self.condition.key)
        if evaluation is None:
            return n
        return n + self.network.via(via.place_of(extra), evaluation.query, evaluation.context, extra)


class _Evaluation:
    """What one evaluation of the model knows: the degraded picture, and what was made of it and of the instruction."""

    def __init__(self, seen: Tensor) -> None:
        self.seen = seen
        self.features: Any = None
        self.context: Tensor | None = None
        self.query: Tensor | None = None


def parted(seen: Tensor, cell: int) -> tuple[Tensor, Tensor]:
    """Take pixels (B, 3, H, W) and latent (B, C, h, w) apart again; see DegradationCondition."""
    count = 3 * cell * cell
    return nn.functional.pixel_shuffle(seen[:, :count], cell), seen[:, count:]
