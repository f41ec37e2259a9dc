"""Learned prompts (YPT, arXiv 2604.04924): a bank P of tokens for all attention modules of a frozen model, and one alpha for each of these.

Where the family's attention reads its text, alpha P is added; model_patches/prompt_injection.py says where that is. P starts as
0.02 N(0, 1) and every alpha at 0, so that a fresh prompt changes nothing and first learns its alphas.

    prompt = LearnedPrompt.of(new_prompt(model, length, seed))      # or of a file's weights
    attach_prompt(patched, prompt)                                  # model_patches/learned_prompt_patch.py

The same attachment serves sampling and training: parameters that require gradients get them.
"""

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from .anatomy import UNETS, Anatomy, anatomy_of
from .errors import telling
from .fit import check_family, check_finite
from .weights_file import Weights

if TYPE_CHECKING:
    from comfy.model_base import BaseModel

KIND = "learned_prompt"
SPREAD = 0.02
# What FLUX.1-dev is told as guidance while a learned prompt is trained and used.
FLUX_GUIDANCE = 1.0
# Tokens of an empty text as the host encodes it: one window of CLIP; CLIP and the least of T5 for SD3. FLUX and WAN: as published.
CLIP_TOKENS, SD3_TOKENS, FLUX_TOKENS, WAN_TOKENS = 77, 154, 512, 226
# Models that nobody has named, such as the lab's, which has texts of 16 words.
OTHER_TOKENS = 16


class LearnedPrompt(nn.Module):
    """The numbers of one prompt, as they learn and as they are applied.

    Attributes:
        prompts: (1, L, D) float32, P: L tokens of the width that attention reads text in.
        alphas: (n,) float32, one for each attention module in the order of the model's modules().
        t0: where the bridge begins that it was trained on, as far as that is known.
    """

    def __init__(self, prompts: Tensor, alphas: Tensor, t0: float | None = None) -> None:
        super().__init__()
        self.t0 = t0
        self.prompts = nn.Parameter(prompts.detach().float().clone())
        self.alphas = nn.Parameter(alphas.detach().float().clone())

    @classmethod
    def of(cls, weights: Weights, trained: bool = False) -> "LearnedPrompt":
        """Return the prompt of weights that check_fit has passed; its parameters require gradients if it is to be trained.

        Works within the host's inference mode.
        """
        with torch.inference_mode(False):
            prompt = cls(weights.tensors["prompts"].clone(), weights.tensors["alphas"].clone(), weights.config.get("t0"))
            return prompt.requires_grad_(trained)

    @property
    def length(self) -> int:
        """L."""
        return self.prompts.shape[1]


def attention_modules(model: "BaseModel") -> list[str]:
    """Return the paths, below diffusion_model, of the modules that have an alpha each, in the order of modules().

    UNets: every attn2. SD3: the text's qkv of every joint block. FLUX: the text's qkv of every double block, then linear1 of every single
    block. WAN: every cross_attn.
    """
    kind, names = anatomy_of(model).kind, [name for name, _ in model.diffusion_model.named_modules()]
    ends = {"unet": (".attn2",), "sd3": (".context_block.attn.qkv",), "flux": (".txt_attn.qkv", ".linear1"), "wan": (".cross_attn",)}[kind]
    roots = {"unet": "", "sd3": "joint_blocks.", "flux": ("double_blocks.", "single_blocks."), "wan": "blocks."}[kind]
    return [name for name in names if name.endswith(ends) and name.startswith(roots)]


def prompt_width(model: "BaseModel") -> int:
    """Return D: the width of the context on UNets, of the network's own tokens on transformers."""
    anatomy = anatomy_of(model)
    if anatomy.kind == "unet":
        paths = attention_modules(model)
        if not paths:
            raise ValueError(f"{anatomy.family} has no cross-attention that reads a text.")
        return model.diffusion_model.get_submodule(paths[0]).to_k.in_features
    return anatomy.sites[0].channels


def default_length(anatomy: Anatomy) -> int:
    """Return L for a new prompt: as many tokens as an empty text has, as far as the family is known."""
    if anatomy.kind == "flux":
        return FLUX_TOKENS
    if anatomy.kind == "wan":
        return WAN_TOKENS
    if anatomy.family in UNETS.values():
        return CLIP_TOKENS
    return SD3_TOKENS if anatomy.family.startswith(("SD3 m", "SD3.5")) else OTHER_TOKENS


def new_prompt(model: "BaseModel", length: int = 0, seed: int = 0) -> Weights:
    """Make an untrained prompt for a model, which leaves it as it is.

    Args:
        model: the host's.
        length: L; 0 for default_length.
        seed: of P.

    Raises:
        ValueError: for a model of an unknown kind, or one without attention to a text.
    """
    anatomy = anatomy_of(model)
    shape = (1, length or default_length(anatomy), prompt_width(model))
    prompts = SPREAD * torch.randn(shape, generator=torch.Generator().manual_seed(seed))
    tensors = {"prompts": prompts, "alphas": torch.zeros(len(attention_modules(model)))}
    return Weights(KIND, anatomy.family, {"length": shape[1]}, tensors, f"the new prompt for {anatomy.family}")


def check_fit(weights: Weights, model: "BaseModel", node: str) -> Anatomy:
    """Check that a prompt was made for this model, and return the model's anatomy.

    Raises:
        ValueError: naming the node, the weights, and both kinds, families, widths or numbers of attention modules.
    """
    anatomy = check_family(weights, KIND, model, node)
    with telling(f"{node}: 'model':"):
        width = prompt_width(model)
    prompts, alphas = (weights.tensors.get(name) for name in ("prompts", "alphas"))
    whole = weights.tensors.keys() == {"prompts", "alphas"}
    if not whole or prompts.ndim != 3 or len(prompts) != 1 or not prompts.shape[1] or alphas.ndim != 1:
        found = {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}
        raise ValueError(f"{node}: {weights.name} holds {found}, and a prompt of shape (1, L, width) with alphas (n,) was expected. "
                         "Save it again.")
    if prompts.shape[2] != width:
        raise ValueError(f"{node}: {weights.name} holds tokens of width {prompts.shape[2]}, and 'model' ({anatomy.family}) has {width}. "
                         "Load the model it was trained on.")
    modules = len(attention_modules(model))
    if len(alphas) != modules:
        raise ValueError(f"{node}: {weights.name} holds {len(alphas)} alphas, and 'model' ({anatomy.family}) has {modules} attention "
                         "modules. Load the model it was trained on.")
    t0 = weights.config.get("t0", 1.0)
    if isinstance(t0, bool) or not isinstance(t0, (int, float)) or not 0 < t0 <= 1:
        raise ValueError(f"{node}: {weights.name} says that it was trained from t0 {t0!r}, and a number above 0 and up to 1 was expected. "
                         "Save it again.")
    check_finite(weights, node)
    return anatomy
