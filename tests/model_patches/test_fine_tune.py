"""The fine-tune that is trained by hooks is what the host makes of the file."""

import pytest
import torch

from mend.model_patches.diffusion_adapter import lora_of
from mend.model_patches.fine_tune import FineTune
from mend.model_patches.host_lora import with_lora
from mend.model_patches.weights_file import Weights
from mend.tests.model_patches.adapters import base, sampled
from mend.tests.tiny_models import FAMILIES

every_family = pytest.mark.parametrize("family", FAMILIES)


def learned(family, seed=5):
    """Differences that all have values, as large beside the weights whatever these are."""
    change, generator = FineTune(base(family).model), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in change.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.1 * max(p[0].numel(), 16) ** -0.5)
    return change


def stored(change):
    return {name: tensor.detach().clone() for name, tensor in change.native().items()}


@every_family
def test_hooks_equal_what_the_host_applies(family):
    change, plain = learned(family), sampled(base(family), family)
    with change.hooked(base(family).model):
        hooked = sampled(base(family), family)
    found = sampled(with_lora(base(family), stored(change), 1.0), family)
    effect = (hooked - plain).abs().max()
    # W x + D x and (W + D) x differ by the rounding of float32: less than a hundredth of what the fine-tune does at all.
    assert effect > 1e-2 and (found - hooked).abs().max() < 1e-2 * effect
    assert torch.equal(sampled(base(family), family), plain)


@every_family
def test_a_new_one_adds_nothing_and_reaches_every_layer(family):
    change, model = FineTune(base(family).model), base(family).model.diffusion_model
    plain = sampled(base(family), family)
    with change.hooked(base(family).model):
        assert torch.equal(sampled(base(family), family), plain)
    assert lora_of(Weights("degradation_model", family, {}, stored(change))) == {}
    # Parameters that are no weight or bias of a linear layer or convolution: norms, embeddings of positions, modulations of WAN's blocks.
    named = {name for name, p in model.named_parameters() if p.ndim > 1 and not name.endswith(("modulation", "pos_embed"))}
    assert {f"{path}.weight" for path in change.paths} >= {name for name in named if "norm" not in name and "embedding" not in name}


def test_the_file_holds_it_bit_for_bit():
    change, other = learned("sd15"), FineTune(base("sd15").model)
    other.load_native(stored(change))
    assert all(torch.equal(a, b) for a, b in zip(change.parameters(), other.parameters(), strict=True))
    assert lora_of(Weights("degradation_model", "sd15", {}, stored(change))).keys() == stored(change).keys()
