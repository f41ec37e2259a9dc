"""The plain form of a learned prompt (YPT, arXiv 2604.04924, abstract): an embedding where the text encoder's output goes, for any model.

    prompt = PromptConditioning.of(new_conditioning(model, ...))
    conditioning_of(prompt)         CONDITIONING; gradients reach prompt.tokens if it is to be trained

UNets take texts in windows of 77 tokens, so there its length is a multiple of that.
"""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from .anatomy import anatomy_of
from .errors import telling
from .fit import check_family, check_finite
from .learned_prompt import CLIP_TOKENS, FLUX_GUIDANCE, SPREAD, default_length
from .weights_file import Weights

if TYPE_CHECKING:
    from comfy.model_base import BaseModel

KIND = "learned_prompt_conditioning"
SIZES_WIDTH = 256


class PromptConditioning(nn.Module):
    """An embedding that learns.

    Attributes:
        tokens: (1, L, D) float32, what a text encoder gives for a text.
        pooled: (1, P) float32, what it gives for the text as a whole; not trained. None for models that take none.
        family: of the model.
    """

    pooled: Tensor | None

    def __init__(self, tokens: Tensor, pooled: Tensor | None, family: str) -> None:
        super().__init__()
        self.tokens = nn.Parameter(tokens.detach().float().clone())
        self.register_buffer("pooled", None if pooled is None else pooled.detach().float().clone())
        self.family = family

    @classmethod
    def of(cls, weights: Weights, trained: bool = False) -> "PromptConditioning":
        """Return the embedding of weights that check_fit has passed; it requires gradients if it is to be trained.

        Works within the host's inference mode.
        """
        with torch.inference_mode(False):
            tensors = {name: tensor.clone() for name, tensor in weights.tensors.items()}
            return cls(tensors["tokens"], tensors.get("pooled"), weights.family).requires_grad_(trained)


def conditioning_of(prompt: PromptConditioning) -> list[list[Any]]:
    """Return the embedding as the host's CONDITIONING, with the live parameter in it. FLUX gets the guidance that it is trained at, 1."""
    options: dict[str, Any] = {} if prompt.pooled is None else {"pooled_output": prompt.pooled}
    if prompt.family.startswith("FLUX"):
        options["guidance"] = FLUX_GUIDANCE
    return [[prompt.tokens if prompt.tokens.requires_grad else prompt.tokens.detach(), options]]


def context_width(model: "BaseModel") -> int:
    """Return D, the width of the text that a model takes.

    Raises:
        ValueError: for a model that takes no text.
    """
    anatomy, network = anatomy_of(model), model.diffusion_model
    if anatomy.kind == "flux":
        return network.txt_in.in_features
    if anatomy.kind == "wan":
        return network.text_embedding[0].in_features
    if anatomy.kind == "sd3":
        return network.context_embedder.in_features
    reading = next((layer for name, layer in network.named_modules() if name.endswith("attn2.to_k")), None)
    if reading is None:
        raise ValueError(f"{anatomy.family} takes no text.")
    return reading.in_features


def pooled_width(model: "BaseModel") -> int:
    """Return P, the width of the pooled text that a model takes; 0 for none."""
    anatomy, network = anatomy_of(model), model.diffusion_model
    if anatomy.kind == "flux":
        return network.params.vec_in_dim
    if anatomy.kind == "sd3":
        return 0 if network.y_embedder is None else network.y_embedder.mlp[0].in_features
    if anatomy.kind == "wan" or getattr(network, "num_classes", None) is None:
        return 0
    # SDXL's vector goes on with six sizes, its refiner's with five.
    sizes = 5 if anatomy.family == "SDXL refiner" else 6
    return network.label_emb[0][0].in_features - sizes * SIZES_WIDTH


def new_conditioning(model: "BaseModel", length: int = 0, seed: int = 0, start: list[list[Any]] | None = None) -> Weights:
    """Make an untrained embedding.

    Args:
        model: the host's.
        length: L; 0 for that of `start`, or for what an empty text of the family has.
        seed: of the numbers it starts from without `start`, 0.02 N(0, 1).
        start: CONDITIONING to start from, such as the empty text's; repeated or cut to the length.

    Raises:
        ValueError: for models of unknown kinds, a length that is not a multiple of 77 on UNets with texts of such windows, and a start of
            another width.
    """
    anatomy, width, pooled_size = anatomy_of(model), context_width(model), pooled_width(model)
    given = None if start is None else start[0][0]
    length = length or (default_length(anatomy) if given is None else given.shape[1])
    if anatomy.kind == "unet" and default_length(anatomy) == CLIP_TOKENS and length % CLIP_TOKENS:
        raise ValueError(f"{anatomy.family} takes texts in windows of {CLIP_TOKENS} tokens, and the length is {length}. Use {CLIP_TOKENS}, "
                         f"{2 * CLIP_TOKENS} or another multiple.")
    if given is not None and given.shape[2] != width:
        raise ValueError(f"the text it starts from has width {given.shape[2]}, and {anatomy.family} takes {width}. "
                         "Use the text encoder of this model.")
    with torch.inference_mode(False):
        if given is None:
            tokens = SPREAD * torch.randn((1, length, width), generator=torch.Generator().manual_seed(seed))
        else:
            tokens = given[:1].float().cpu().clone().repeat(1, -(-length // given.shape[1]), 1)[:, :length]
        tensors = {"tokens": tokens}
        if pooled_size:
            pooled = None if start is None else start[0][1].get("pooled_output")
            tensors["pooled"] = torch.zeros(1, pooled_size) if pooled is None else pooled[:1].float().cpu().clone()
    return Weights(KIND, anatomy.family, {"length": length}, tensors, f"the new prompt conditioning for {anatomy.family}")


def check_fit(weights: Weights, model: "BaseModel | None", node: str) -> None:
    """Check that weights are an embedding, and if a model is given that they were made for it.

    Raises:
        ValueError: naming the node, the weights, and both kinds, families or widths, or that the numbers are not finite.
    """
    weights.expect(KIND, node)
    tokens, pooled = weights.tensors.get("tokens"), weights.tensors.get("pooled")
    whole = tokens is not None and weights.tensors.keys() <= {"tokens", "pooled"} and (pooled is None or pooled.ndim == 2)
    if not whole or tokens.ndim != 3 or len(tokens) != 1 or not tokens.shape[1]:
        found = {name: tuple(tensor.shape) for name, tensor in weights.tensors.items()}
        raise ValueError(f"{node}: {weights.name} holds {found}, and tokens of shape (1, L, width) were expected. Save it again.")
    check_finite(weights, node)
    if model is None:
        return
    anatomy = check_family(weights, KIND, model, node)
    with telling(f"{node}: 'model':"):
        sizes = (context_width(model), pooled_width(model))
    found = (tokens.shape[2], 0 if pooled is None else pooled.shape[1])
    if found != sizes:
        raise ValueError(f"{node}: {weights.name} has tokens and pooled text of widths {found[0]} and {found[1]}, and 'model' "
                         f"({anatomy.family}) takes {sizes[0]} and {sizes[1]}. Load the model it was trained on.")
