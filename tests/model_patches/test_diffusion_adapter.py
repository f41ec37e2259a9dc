"""The LoRA that is trained by hooks is the LoRA that the host applies from the file, in the weights and beside them."""

import pytest
import torch
from torch.nn import Parameter

import comfy.quant_ops
import comfy.sd
from mend.model_patches.anatomy import self_attention
from mend.model_patches.diffusion_adapter import DiffusionAdapter, LoraLayer, lora_of, lora_tensors
from mend.model_patches.host_lora import with_lora
from mend.tests.model_patches.adapters import applied, base, fresh, lq, sampled, trained
from mend.tests.tiny_models import FAMILIES, model

every_family = pytest.mark.parametrize("family", FAMILIES)


def assert_same(found, expected, plain):
    """W x + B (A x) and (W + B A) x differ by the rounding of float32: less than a hundredth of what the LoRA does at all."""
    effect = (expected - plain).abs().max()
    assert effect > 1e-2 and (found - expected).abs().max() < 1e-2 * effect


def learned(family, seed=5):
    """A DiffusionAdapter whose factors all have values."""
    lora, generator = DiffusionAdapter(base(family).model, 4), torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for p in lora.parameters():
            p.copy_(torch.randn(p.shape, generator=generator) * 0.3)
    return lora


@every_family
def test_hooks_equal_the_hosts_own_lora(family):
    lora = learned(family)
    plain = sampled(base(family), family)
    with lora.hooked(base(family).model):
        hooked = sampled(base(family), family)
    hosted = with_lora(base(family), {name: t.detach() for name, t in lora.native().items()}, 1.0)
    assert_same(sampled(hosted, family), hooked, plain)
    assert torch.equal(sampled(base(family), family), plain)


@every_family
def test_strength_scales_it(family):
    tensors = {name: t.detach() for name, t in learned(family).native().items()}
    half = {name: t * 0.5 if name.endswith("lora_B.weight") else t for name, t in tensors.items()}
    found, expected = sampled(with_lora(base(family), tensors, 0.5), family), sampled(with_lora(base(family), half, 1.0), family)
    assert_same(found, expected, sampled(base(family), family))


@every_family
def test_a_new_one_adds_nothing(family):
    lora = DiffusionAdapter(base(family).model, 4)
    lora.initialise(torch.Generator().manual_seed(0))
    plain = sampled(base(family), family)
    with lora.hooked(base(family).model):
        assert torch.equal(sampled(base(family), family), plain)
    assert torch.equal(sampled(with_lora(base(family), {name: t.detach() for name, t in lora.native().items()}, 1.0), family), plain)
    assert all(down.any() for layer in lora.layers.values() for down in layer.down)


@every_family
def test_the_file_holds_it_bit_for_bit(family):
    lora = learned(family)
    tensors = {name: t.detach().clone() for name, t in lora.native().items()}
    other = DiffusionAdapter(base(family).model, 4)
    other.load_native(tensors)
    assert all(torch.equal(a, b) for a, b in zip(lora.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(t, tensors[name]) for name, t in other.native().items())


@every_family
def test_keys_are_the_hosts_own(family):
    tensors = {name: t.detach() for name, t in learned(family).native().items()}
    assert lora_tensors(tensors | {"adapter.stem.bias": torch.zeros(1)}).keys() == tensors.keys()
    hosted = with_lora(base(family), tensors, 1.0)
    assert hosted.patches.keys() == {f"diffusion_model.{path}.weight" for path in self_attention(base(family).model)}
    for path, parts in self_attention(base(family).model).items():
        assert tensors[f"diffusion_model.{path}.lora_A.weight"].shape[0] == 4 * len(parts) == tensors[f"diffusion_model.{path}.alpha"]


def test_packed_factors_stack_the_products_of_the_parts():
    layer = LoraLayer(5, (4, 4, 4), 2)
    with torch.no_grad():
        for p in layer.parameters():
            p.normal_()
    a, b = layer.packed(20)
    assert a.shape == (6, 5) and b.shape == (20, 6)
    expected = torch.cat([up @ down for up, down in zip(layer.up, layer.down)])
    torch.testing.assert_close((b @ a)[:12], expected)
    assert not (b @ a)[12:].any(), "rows behind the parts stay as they are"
    x = torch.randn(3, 7, 5)
    torch.testing.assert_close(layer(x, 20), x @ (b @ a).T)
    assert layer(x.half(), 20).dtype == torch.float16


@every_family
def test_hooks_are_gone_after_an_error(family):
    with pytest.raises(KeyError), learned(family).hooked(base(family).model):
        raise KeyError
    assert not any(part._forward_hooks for part in base(family).model.modules())


# Beside quantised weights


def quantised(family):
    """A tiny model of which one layer that no LoRA touches is quantised."""
    own = model(family)
    layers = [layer for name, layer in own.model.diffusion_model.named_modules() if name not in self_attention(own.model)]
    layer = next(layer for layer in layers if type(layer).__name__ == "Linear")
    layer.weight = Parameter(comfy.quant_ops.QuantizedTensor.from_float(layer.weight.detach(), "TensorCoreFP8Layout"), requires_grad=False)
    return own


@every_family
def test_beside_the_weights_it_does_the_same(family):
    lora, own = learned(family), quantised(family)
    plain = sampled(own, family)
    with lora.hooked(own.model):
        hooked = sampled(own, family)
    beside = with_lora(own, {name: t.detach() for name, t in lora.native().items()}, 1.0)
    assert beside.injections and not beside.patches
    assert_same(sampled(beside, family), hooked, plain)
    assert torch.equal(sampled(own, family), plain)


ATTENTION, CONVOLUTION = "diffusion_model.output_blocks.0.1.transformer_blocks.0.attn1.to_q", "diffusion_model.input_blocks.1.0.in_layers.2"
FORMS = {
    "linear": (ATTENTION, {"lora_A.weight": (4, 64), "lora_B.weight": (64, 4)}),
    "convolution": (CONVOLUTION, {"lora_A.weight": (4, 32, 3, 3), "lora_B.weight": (32, 4, 1, 1)}),
    "LoHa": (ATTENTION, {"hada_w1_a": (64, 4), "hada_w1_b": (4, 64), "hada_w2_a": (64, 4), "hada_w2_b": (4, 64)}),
    "GLoRA": (ATTENTION, {"a1.weight": (4, 64), "a2.weight": (64, 4), "b1.weight": (64, 4), "b2.weight": (4, 64)}),
    "difference": (ATTENTION, {"diff": (64, 64)}),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_every_form_does_beside_the_weights_what_it_does_in_them(form):
    path, shapes = FORMS[form]
    generator = torch.Generator().manual_seed(0)
    tensors = {f"{path}.{role}": torch.randn(shape, generator=generator) * 0.3 for role, shape in shapes.items()}
    if form not in ("GLoRA", "difference"):
        tensors[f"{path}.alpha"] = torch.tensor(3.0)
    own = quantised("sd15")
    plain = sampled(own, "sd15")
    # The host itself can apply this form of GLoRA beside the weights only.
    host = comfy.sd.load_bypass_lora_for_models if form == "GLoRA" else comfy.sd.load_lora_for_models
    inside = sampled(host(own, None, dict(tensors), 0.7, 0)[0], "sd15")
    assert_same(sampled(with_lora(own, tensors, 0.7), "sd15"), inside, plain)
    stacked = with_lora(with_lora(own, tensors, 0.3), tensors, 0.4)
    if form != "GLoRA":  # whose two changes meet in a product
        assert_same(sampled(stacked, "sd15"), inside, plain)
    assert torch.equal(sampled(own, "sd15"), plain) and not forwards(own)


def forwards(own):
    return [name for name, part in own.model.named_modules() if getattr(part.forward, "__self__", part) is not part]


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_several_beside_the_weights_leave_nothing(family):
    own = quantised(family)
    a, b = ({name: t.detach() for name, t in learned(family, seed).native().items()} for seed in (5, 6))
    plain = sampled(own, family)
    hosts = comfy.sd.load_bypass_lora_for_models(own, None, a, 1.0, 0)[0]
    stacks = {
        "two": with_lora(with_lora(own, a, 1.0), b, 1.0), "the host's and ours": with_lora(hosts, b, 1.0),
        "three": with_lora(with_lora(with_lora(own, a, 0.5), b, 1.0), a, 0.5),
    }  # fmt: skip
    expected = sampled(stacks["two"], family)
    alone = sampled(with_lora(own, a, 1.0), family)
    assert not torch.equal(expected, alone)
    for _ in range(2):
        for name, stack in stacks.items():
            assert_same(sampled(stack, family), expected, plain)
            assert torch.equal(sampled(own, family), plain), f"{name} is still there"
            assert not forwards(own), name
    assert torch.equal(sampled(with_lora(own, a, 1.0), family), alone)


def test_weights_of_the_adapter_are_no_lora():
    assert lora_of(fresh("sd15")) == {} and lora_of(trained("sd15", rank=0)) == {}
    assert lora_of(trained("sd15")).keys() == lora_tensors(fresh("sd15").tensors).keys()


@every_family
def test_it_goes_with_the_adapters(family):
    weights, tensors = trained(family), lora_of(trained(family))
    adapters, lora = applied(base(family), weights, lq(family)), with_lora(base(family), tensors, 1.0)
    results = [sampled(patched, family) for patched in (adapters, lora, with_lora(adapters, tensors, 1.0))]
    assert not any(torch.equal(results[i], results[j]) for i, j in ((0, 1), (0, 2), (1, 2)))
    assert torch.equal(sampled(applied(lora, weights, lq(family)), family), results[2]), "in either order"
