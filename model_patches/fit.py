"""Whether weights fit the model or VAE that they are to be hung on: their kind, their family, and their tensors."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch import Tensor

from .anatomy import Anatomy, anatomy_of
from .errors import telling
from .robust_encoder import ENCODER
from .vae_sites import VaeAnatomy, vae_anatomy
from .weights_file import Weights

if TYPE_CHECKING:
    from comfy.model_base import BaseModel
    from comfy.sd import VAE


class Input(NamedTuple):
    """What weights are hung on, as messages speak of it.

    Attributes:
        name: of the nodes' input.
        look: returns its anatomy; ValueError for what is not known.
        advice: what to do about one of another family.
        other: one of that family whose shapes differ.
        aside: prefixes of tensors that need not fit it.
    """

    name: str
    look: Callable[[Any], Any]
    advice: str
    other: str
    aside: tuple[str, ...]


# An encoder in the file of a model's patch has to fit a VAE and not the model.
MODEL = Input("model", anatomy_of, "Load the model it was trained on, or train one for this.", "another model of that family", (ENCODER,))
VAE_INPUT = Input("vae", vae_anatomy, "Load the VAE it was trained on, or train experts for this one.", "another VAE of that layout", ())


def check_family(weights: Weights, kind: str, model: "BaseModel", node: str) -> Anatomy:
    """Check kind and family of weights, and return the model's anatomy.

    Raises:
        ValueError: naming the node, the weights and both kinds or both families.
    """
    return _family_checked(weights, kind, MODEL, model, node)


def check_vae_family(weights: Weights, kind: str, vae: "VAE", node: str) -> VaeAnatomy:
    """Check kind and family of weights that sit in a VAE, and return the VAE's anatomy.

    Raises:
        ValueError: naming the node, the weights and both kinds or both families.
    """
    return _family_checked(weights, kind, VAE_INPUT, vae, node)


def check_shapes(weights: Weights, expected: Mapping[str, Tensor], node: str, on: Input = MODEL) -> None:
    """Check names and shapes of all tensors, once the family is known to fit.

    Raises:
        ValueError: naming the node, the weights and the first tensor that does not fit.
    """
    wrong = misfit({name: tensor for name, tensor in weights.tensors.items() if not name.startswith(on.aside)}, expected)
    if wrong:
        raise ValueError(f"{node}: {weights.name} does not fit '{on.name}' ({weights.family}): {' '.join(wrong)}. "
                         f"The file is incomplete or was made for {on.other}.")


def misfit(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> tuple[str, str] | None:
    """Return the first name whose tensor is missing, unknown or of another shape, and what is wrong with it; None if all is well."""
    shapes, wanted = ({name: tensor.shape for name, tensor in tensors.items()} for tensors in (found, expected))
    wrong = sorted(name for name in wanted.keys() | shapes.keys() if wanted.get(name) != shapes.get(name))
    return (wrong[0], f"is {_text(shapes.get(wrong[0]))}, expected {_text(wanted.get(wrong[0]))}") if wrong else None


def check_finite(weights: Weights, node: str) -> None:
    """Check that all weights are finite.

    Raises:
        ValueError: naming the node and the weights.
    """
    if not all(tensor.isfinite().all() for tensor in weights.tensors.values()):
        raise ValueError(f"{node}: {weights.name} holds numbers that are not finite. Its training went wrong; take an earlier state of it.")


def _family_checked(weights: Weights, kind: str, on: Input, given: Any, node: str) -> Any:
    weights.expect(kind, node)
    with telling(f"{node}: '{on.name}':"):
        anatomy = on.look(given)
    if weights.family != anatomy.family:
        raise ValueError(f"{node}: {weights.name} was made for {weights.family}, and '{on.name}' is {anatomy.family}. {on.advice}")
    return anatomy


def _text(shape: torch.Size | None) -> str:
    return "missing" if shape is None else "x".join(str(side) for side in shape) or "a number"
