"""What hangs on a compiled model is noticed when it comes, changes and goes, though the host compiles without guards on transformer_options."""

import pytest
import torch

from comfy_api.torch_helpers import set_torch_compile_wrapper
from comfy_extras.nodes_torch_compile import skip_torch_compile_dict
from mend.tests.model_patches import adapters, degradation_models, fusions

FAMILY = "sd3"


def compiled(patcher):
    """As TorchCompileModel does it, but for inductor, which takes minutes: what is traced and guarded is the same."""
    torch._dynamo.reset()
    patched = patcher.clone(disable_dynamic=True)
    set_torch_compile_wrapper(model=patched, backend="eager", options={"guard_filter_fn": skip_torch_compile_dict})
    return patched


def adapter(to, strength):
    return adapters.applied(to, adapters.trained(FAMILY), adapters.lq(FAMILY), strength=strength)


def fusion(to, strength):
    return fusions.applied(to, fusions.trained(FAMILY), fusions.seen(FAMILY), strength=strength)


def degradation(to, strength):
    return degradation_models.applied(FAMILY, degradation_models.trained(FAMILY), strength=strength, to=to)


def sampled(patcher, apply):
    return (degradation_models if apply is degradation else adapters).sampled(patcher, FAMILY, steps=1, cfg=1.0)


@pytest.mark.parametrize("apply", [adapter, fusion, degradation])
def test_changes_reach_a_compiled_model(apply):
    base = adapters.base(FAMILY)
    whole, half = (sampled(apply(base, strength), apply) for strength in (1.0, 0.5))
    on = compiled(base)
    assert torch.equal(sampled(apply(on, 1.0), apply), whole) and torch.equal(sampled(apply(on, 0.5), apply), half)
    assert torch._dynamo.utils.counters["frames"]["ok"] > 0
    assert not torch.equal(whole, half)
