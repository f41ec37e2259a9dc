"""Whatever a LoRA file calls its layers, native_lora finds the host's keys for them, and the host then adds alpha / rank * B @ A."""

from functools import cache

import pytest
import torch
import torch.nn.functional as F
from torch.nn import Conv2d, Conv3d, Linear

import comfy.lora
import comfy.lora_convert
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.supported_models
from mend.model_patches.host_lora import LoraTarget, layer_shape, lora_targets
from mend.model_patches.lora_keys import is_text_encoder_key, lora_names, native_lora
from mend.tests import tiny_models
from mend.tests.samplers import tiny_guidance

# Changes are near 0.02 and weights near 0.2: float32 rounds sums of up to twelve products of these by less than 1e-7.
EXACT = dict(atol=1e-6, rtol=0)
RANK = 4
WIDTH = 32


@cache
def patcher(family):
    """A tiny model; FLUX with the only width of its MLP that the host's table of diffusers names knows."""
    return tiny_models.model(family, **({"mlp_ratio": 4.0} if family == "flux" else {}))


def model(family):
    return patcher(family).model


def state(family):
    return {key: weight.clone() for key, weight in model(family).state_dict().items()}


def seeded(seed):
    return torch.Generator().manual_seed(seed)


def factors(out, inside, rank=RANK, seed=0, kernel=(), dtype=torch.float32):
    """A down and an up factor whose product is near 0.02."""
    down = torch.randn(rank, inside, *kernel, generator=seeded(seed)) * 0.1
    up = torch.randn(out, rank, *(1 for _ in kernel), generator=seeded(seed + 1)) * 0.1
    return down.to(dtype), up.to(dtype)


def product(down, up, scale=1.0):
    """scale * B @ A, computed in double precision."""
    return (scale * up.double().flatten(1) @ down.double().flatten(1)).reshape(up.shape[0], *down.shape[1:]).float()


def patched(family, tensors, strength=1.0, base=None):
    """The weights after the host has loaded a file on its own."""
    base = base or patcher(family)
    made, _ = comfy.sd.load_lora_for_models(base, None, dict(tensors), strength, 0)
    try:
        made.patch_model()
        return {key: weight.clone() for key, weight in made.model.state_dict().items()}
    finally:
        made.unpatch_model()


def normalised(family, tensors, alpha=None, strength=1.0):
    """The weights after the host has loaded what native_lora makes of a file that it places entirely."""
    native, left = native_lora(tensors, model(family), alpha)
    assert left == [] and native and all(key.startswith("diffusion_model.") for key in native)
    return patched(family, native, strength)


def sampled(family, made):
    """A short run; the host leaves a loaded LoRA in the shared weights until told otherwise."""
    try:
        return tiny_guidance.sample(made, family)
    finally:
        comfy.model_management.unload_all_models()


def expect(family, found, changes):
    """Compare weights with the model's own plus changes: by weight key, or by (weight key, first row). No other weight has changed."""
    wanted, changed = state(family), set()
    for where, change in changes.items():
        path, first = where if isinstance(where, tuple) else (where, 0)
        wanted[f"{path}.weight"][first:first + change.shape[0]] += change
        changed.add(f"{path}.weight")
    for key, weight in wanted.items():
        if key in changed:
            torch.testing.assert_close(found[key], weight, **EXACT, msg=lambda text, key=key: f"{key}: {text}")
        else:
            assert torch.equal(found[key], weight), key


def read_by_host(family, tensors):
    """How many layers or parts of layers the host itself finds in a file."""
    names = comfy.lora.model_lora_keys_unet(model(family), {})
    return len(comfy.lora.load_lora(comfy.lora_convert.convert_lora(dict(tensors)), names, log_missing=False))


# Every way of naming, on every family. A layer: its native path, what diffusers calls it, rows of a fused layer as (first, count).

UNET_LAYERS = {
    "sd15": [
        ("input_blocks.3.1.transformer_blocks.0.attn1.to_q", "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q", None),
        ("middle_block.1.transformer_blocks.0.attn2.to_out.0", "mid_block.attentions.0.transformer_blocks.0.attn2.to_out.0", None),
    ],
    "sdxl": [
        ("input_blocks.3.1.transformer_blocks.1.attn2.to_v", "down_blocks.1.attentions.0.transformer_blocks.1.attn2.to_v", None),
        ("output_blocks.0.1.transformer_blocks.0.attn1.to_out.0", "up_blocks.0.attentions.0.transformer_blocks.0.attn1.to_out.0", None),
    ],
}
LAYERS = {
    **UNET_LAYERS,
    "sd3": [
        ("joint_blocks.0.x_block.attn.qkv", "transformer_blocks.0.attn.to_q", (0, 128)),
        ("joint_blocks.0.x_block.attn.qkv", "transformer_blocks.0.attn.to_v", (256, 128)),
        ("joint_blocks.1.context_block.attn.qkv", "transformer_blocks.1.attn.add_k_proj", (128, 128)),
        ("joint_blocks.1.x_block.attn.proj", "transformer_blocks.1.attn.to_out.0", None),
        ("joint_blocks.0.x_block.mlp.fc1", "transformer_blocks.0.ff.net.0.proj", None),
    ],
    "flux": [
        ("double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_q", (0, WIDTH)),
        ("double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_k", (WIDTH, WIDTH)),
        ("double_blocks.0.img_attn.qkv", "transformer_blocks.0.attn.to_v", (2 * WIDTH, WIDTH)),
        ("double_blocks.1.txt_attn.qkv", "transformer_blocks.1.attn.add_v_proj", (2 * WIDTH, WIDTH)),
        ("single_blocks.1.linear1", "single_transformer_blocks.1.attn.to_k", (WIDTH, WIDTH)),
        ("single_blocks.1.linear1", "single_transformer_blocks.1.proj_mlp", (3 * WIDTH, 4 * WIDTH)),
        ("single_blocks.0.linear2", "single_transformer_blocks.0.proj_out", None),
    ],
    "wan": [
        ("blocks.0.self_attn.q", "blocks.0.attn1.to_q", None),
        ("blocks.1.cross_attn.o", "blocks.1.attn2.to_out.0", None),
        ("blocks.1.ffn.2", "blocks.1.ffn.net.2", None),
        ("time_projection.1", "condition_embedder.time_proj", None),
    ],
}  # fmt: skip


def flat(path):
    return path.replace(".", "_")


def processor(path):
    """What diffusers once called the layers of its attention processors."""
    return path.replace(".to_", ".processor.to_").removesuffix(".0")


PEFT, KOHYA = ("lora_A.weight", "lora_B.weight"), ("lora_down.weight", "lora_up.weight")
# A form: the name before the ends of the two factors, those ends, and the families on which the host (0.24.0 to 0.30.0) reads it by itself.
NATIVE_FORMS = {
    "native": (lambda path: f"diffusion_model.{path}.", PEFT, tiny_models.FAMILIES),
    "native down and up": (lambda path: f"diffusion_model.{path}.", KOHYA, tiny_models.FAMILIES),
    "kohya": (lambda path: f"lora_unet_{flat(path)}.", KOHYA, tiny_models.FAMILIES),
    "WAN-Fun": (lambda path: f"lora_unet__{flat(path)}.", KOHYA, ()),
    "plain paths": (lambda path: f"{path}.", ("lora_A.default.weight", "lora_B.default.weight"), ()),
    "PEFT": (lambda path: f"base_model.model.{path}.", PEFT, ()),
    "nested PEFT": (lambda path: f"base_model.model.diffusion_model.{path}.", PEFT, ()),
}
DIFFUSERS_FORMS = {
    "transformer": (lambda path: f"transformer.{path}.", PEFT, ("sd3", "flux")),
    "transformer down and up": (lambda path: f"transformer.{path}.", ("lora.down.weight", "lora.up.weight"), ("sd3", "flux")),
    "unet": (lambda path: f"unet.{path}.", PEFT, ()),
    "adapter name": (lambda path: f"unet.{path}.", ("lora_A.default.weight", "lora_B.default.weight"), ()),
    "numbered adapter": (lambda path: f"transformer.{path}.", ("lora_A.default_0.weight", "lora_B.default_0.weight"), ()),
    "bare factors": (lambda path: f"transformer.{path}.", ("lora_A", "lora_B"), ("sd3", "flux")),
    "plain paths": (lambda path: f"{path}.", PEFT, ("flux",)),
    "PEFT": (lambda path: f"base_model.model.{path}.", PEFT, ("sd3",)),
    "nested PEFT": (lambda path: f"base_model.model.transformer.{path}.", PEFT, ()),
    "PEFT in a UNet": (lambda path: f"unet.base_model.model.{path}.", PEFT, ()),
    "kohya": (lambda path: f"lora_unet_{flat(path)}.", KOHYA, ("sd15", "sdxl")),
    "OneTrainer": (lambda path: f"lora_transformer_{flat(path)}.", KOHYA, ("sd3", "flux")),
    "LyCORIS": (lambda path: f"lycoris_{flat(path)}.", KOHYA, ("sd15", "sdxl", "sd3", "flux")),
    "linear layer": (lambda path: f"unet.{path}.", ("lora_linear_layer.down.weight", "lora_linear_layer.up.weight"), ()),
    "underscore": (lambda path: f"unet.{path}", ("_lora.down.weight", "_lora.up.weight"), ()),
}
PROCESSOR_FORMS = {
    "processors": (lambda path: f"unet.{processor(path)}", ("_lora.down.weight", "_lora.up.weight"), ("sd15", "sdxl")),
    "plain processors": (lambda path: f"{processor(path)}", ("_lora.down.weight", "_lora.up.weight"), ("sd15", "sdxl")),
}
CASES = [
    *((family, "native", NATIVE_FORMS, name) for family in LAYERS for name in NATIVE_FORMS),
    *((family, "diffusers", DIFFUSERS_FORMS, name) for family in LAYERS for name in DIFFUSERS_FORMS),
    *((family, "diffusers", PROCESSOR_FORMS, name) for family in UNET_LAYERS for name in PROCESSOR_FORMS),
]


def made(family, which, form, alpha=None, rank=RANK, dtype=torch.float32):
    """A file that holds this family's layers in one form, and what it means; every layer's alpha is one higher than the last's."""
    name, (down_end, up_end), _ = form
    tensors, changes, used = {}, {}, set()
    for seed, (native, diffusers, rows) in enumerate(LAYERS[family]):
        if which == "native":
            if native in used:
                continue
            rows = None
            used.add(native)
        shape = layer_shape(model(family), f"diffusion_model.{native}.weight")
        down, up = factors(rows[1] if rows else shape[0], shape[1], rank, 10 * seed, tuple(1 for _ in shape[2:]), dtype)
        start = name(native if which == "native" else diffusers)
        tensors[start + down_end], tensors[start + up_end] = down, up
        if alpha is not None:
            tensors[start.removesuffix(".") + ".alpha"] = torch.tensor(alpha + seed)
        scale = 1.0 if alpha is None else (alpha + seed) / rank
        changes[f"diffusion_model.{native}", rows[0] if rows else 0] = product(down, up, scale)
    return tensors, changes


@pytest.mark.parametrize(("family", "which", "forms", "name", "alpha"), [
    *((*case, 2.0) for case in CASES), *((*case, None) for case in CASES if case[3] in ("native", "PEFT", "kohya", "processors"))
], ids=lambda value: "" if isinstance(value, dict) else None)  # fmt: skip
def test_every_form_is_its_product(family, which, forms, name, alpha):
    tensors, changes = made(family, which, forms[name], alpha)
    found = normalised(family, tensors)
    expect(family, found, changes)
    if family in forms[name][2]:
        assert read_by_host(family, tensors) == len(changes)
        host = patched(family, tensors)
        for path, _ in changes:
            torch.testing.assert_close(found[f"{path}.weight"], host[f"{path}.weight"], **EXACT)


@pytest.mark.parametrize("family", LAYERS)
@pytest.mark.parametrize("rank", [1, 4])
@pytest.mark.parametrize("strength", [0.5, -1.0])
def test_rank_one_and_strengths(family, rank, strength):
    tensors, changes = made(family, "diffusers", DIFFUSERS_FORMS["nested PEFT"], 3.0, rank)
    expect(family, normalised(family, tensors, strength=strength), {key: change * strength for key, change in changes.items()})


@pytest.mark.parametrize("family", LAYERS)
def test_alpha_of_an_adapter_config(family):
    tensors, _ = made(family, "diffusers", DIFFUSERS_FORMS["PEFT"])
    _, plain = made(family, "diffusers", DIFFUSERS_FORMS["PEFT"])
    expect(family, normalised(family, tensors, alpha=6.0), {key: change * 6.0 / RANK for key, change in plain.items()})
    with_own, changes = made(family, "diffusers", DIFFUSERS_FORMS["PEFT"], 2.0)
    expect(family, normalised(family, with_own, alpha=6.0), changes)


def test_native_files_stay_as_they_are():
    tensors, _ = made("wan", "native", NATIVE_FORMS["native"], 2.0)
    native, left = native_lora(tensors, model("wan"))
    assert left == [] and set(native) == set(tensors)
    assert all(torch.equal(native[key], tensors[key]) for key in tensors)
    again, left = native_lora(native, model("wan"))
    assert left == [] and all(torch.equal(again[key], native[key]) for key in native)


@pytest.mark.parametrize("family", LAYERS)
def test_normalised_files_are_normal(family):
    tensors, _ = made(family, "diffusers", DIFFUSERS_FORMS["transformer"], 2.0)
    native, _ = native_lora(tensors, model(family))
    again, left = native_lora(native, model(family))
    assert left == [] and list(again) == list(native)
    assert all(torch.equal(again[key], native[key]) for key in native)
    assert read_by_host(family, native) == len({native_path for native_path, _, _ in LAYERS[family]})


@pytest.mark.parametrize("family", LAYERS)
def test_inputs_are_left_alone(family):
    tensors, _ = made(family, "diffusers", DIFFUSERS_FORMS["transformer"], 2.0)
    before, weights = {key: tensor.clone() for key, tensor in tensors.items()}, state(family)
    native_lora(tensors, model(family))
    assert list(tensors) == list(before) and all(torch.equal(tensors[key], before[key]) for key in before)
    assert all(torch.equal(weight, weights[key]) for key, weight in state(family).items())


# Fused layers

QKV = {
    "sd3": ("diffusion_model.joint_blocks.0.x_block.attn.qkv", "transformer.transformer_blocks.0.attn.{}", ("to_q", "to_k", "to_v"), 128),
    "flux": ("diffusion_model.double_blocks.1.txt_attn.qkv", "transformer.transformer_blocks.1.attn.{}",
             ("add_q_proj", "add_k_proj", "add_v_proj"), WIDTH),
    "flux linear1": ("diffusion_model.single_blocks.0.linear1", "transformer.single_transformer_blocks.0.attn.{}",
                     ("to_q", "to_k", "to_v"), WIDTH),
}  # fmt: skip


def parts(kind, names=None, ranks=(RANK, RANK, RANK), alphas=(None, None, None), dtype=torch.float32):
    """A file with parts of one fused layer, and what they mean."""
    path, pattern, every, width = QKV[kind]
    tensors, changes = {}, {}
    for index, name in enumerate(every):
        if names and name not in names:
            continue
        down, up = factors(width, width, ranks[index], 7 * index, dtype=dtype)
        start = pattern.format(name)
        tensors[f"{start}.lora_A.weight"], tensors[f"{start}.lora_B.weight"] = down, up
        if alphas[index] is not None:
            tensors[f"{start}.alpha"] = torch.tensor(alphas[index])
        scale = 1.0 if alphas[index] is None else alphas[index] / ranks[index]
        changes[path, index * width] = product(down, up, scale)
    return tensors, changes


def family_of(kind):
    return kind.partition(" ")[0]


def test_three_of_rank_32_are_one_of_rank_96():
    tensors, changes = parts("sd3", ranks=(32, 32, 32), alphas=(32.0, 32.0, 32.0))
    native, left = native_lora(tensors, model("sd3"))
    path = QKV["sd3"][0]
    assert left == [] and set(native) == {f"{path}.{end}" for end in ("lora_A.weight", "lora_B.weight", "alpha")}
    down, up = native[f"{path}.lora_A.weight"], native[f"{path}.lora_B.weight"]
    assert down.shape == (96, 128) and up.shape == (384, 96) and native[f"{path}.alpha"].item() == 96.0
    for i in range(3):
        for j in range(3):
            block = up[128 * i:128 * (i + 1), 32 * j:32 * (j + 1)]
            assert bool(block.any()) == (i == j)
    expect("sd3", patched("sd3", native), changes)


@pytest.mark.parametrize("kind", QKV)
@pytest.mark.parametrize("part", [0, 1, 2])
def test_one_slice_changes_its_rows_only(kind, part):
    name = QKV[kind][2][part]
    tensors, changes = parts(kind, [name], alphas=(2.0, 3.0, 4.0))
    found, before = normalised(family_of(kind), tensors), state(family_of(kind))
    expect(family_of(kind), found, changes)
    path, _, _, width = QKV[kind]
    rows = torch.ones(found[f"{path}.weight"].shape[0], dtype=torch.bool)
    rows[part * width:(part + 1) * width] = False
    # Zeros of the packed factor add nothing at all.
    assert torch.equal(found[f"{path}.weight"][rows], before[f"{path}.weight"][rows])


@pytest.mark.parametrize("kind", QKV)
@pytest.mark.parametrize("ranks", [(4, 4, 4), (1, 3, 2)])
@pytest.mark.parametrize("alphas", [(None, None, None), (2.0, 2.0, 2.0), (1.0, None, -3.0), (0.0, 2.0, 1.0), (0.0, 0.0, 0.0)])
def test_ranks_and_alphas_may_differ(kind, ranks, alphas):
    tensors, changes = parts(kind, ranks=ranks, alphas=alphas)
    expect(family_of(kind), normalised(family_of(kind), tensors), changes)
    native, _ = native_lora(tensors, model(family_of(kind)))
    assert native[f"{QKV[kind][0]}.lora_A.weight"].shape[0] == sum(ranks)


def test_a_whole_layer_and_a_part_of_it_add_up():
    tensors, changes = parts("flux linear1", ["to_k"], alphas=(1.0, 2.0, 1.0))
    path = QKV["flux linear1"][0]
    down, up = factors(7 * WIDTH, WIDTH, 3, 50)
    tensors |= {f"{path}.lora_down.weight": down, f"{path}.lora_up.weight": up, f"{path}.alpha": torch.tensor(1.5)}
    found, before = normalised("flux", tensors), state("flux")[f"{path}.weight"]
    before += product(down, up, 0.5)
    before[WIDTH:2 * WIDTH] += changes[path, WIDTH]
    torch.testing.assert_close(found[f"{path}.weight"], before, **EXACT)
    torch.testing.assert_close(patched("flux", tensors)[f"{path}.weight"], before, **EXACT)


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_swapped_rows(family):
    """Diffusers stores scale before shift in the last modulation, the host shift before scale."""
    path = "diffusion_model.final_layer.adaLN_modulation.1"
    shape = layer_shape(model(family), f"{path}.weight")
    down, up = factors(*shape)
    tensors = {"base_model.model.norm_out.linear.lora_A.weight": down, "base_model.model.norm_out.linear.lora_B.weight": up}
    change = product(down, up)
    scale, shift = change.chunk(2)
    found = normalised(family, tensors)
    expect(family, found, {path: torch.cat([shift, scale])})
    host_form = {key.replace("base_model.model.", "transformer."): tensor for key, tensor in tensors.items()}
    torch.testing.assert_close(found[f"{path}.weight"], patched(family, host_form)[f"{path}.weight"], **EXACT)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float8_e4m3fn])
@pytest.mark.parametrize("kind", QKV)
def test_half_precision_files(kind, dtype):
    family, path = family_of(kind), QKV[kind][0]
    tensors, changes = parts(kind, alphas=(2.0, 2.0, 2.0), dtype=dtype)
    native, _ = native_lora(tensors, model(family))
    assert {native[f"{path}.lora_{side}.weight"].dtype for side in "AB"} == {dtype}
    expect(family, patched(family, native), changes)
    # Scales that differ are not rounded to the file's precision.
    tensors, changes = parts(kind, alphas=(1.0, 0.3, 2.0), dtype=dtype)
    expect(family, normalised(family, tensors), changes)


def test_mixed_precision_files():
    tensors, changes = parts("sd3", alphas=(2.0, 2.0, 2.0), dtype=torch.float16)
    path, pattern, _, width = QKV["sd3"]
    down, up = (f"{pattern.format('to_k')}.lora_{side}.weight" for side in "AB")
    tensors |= {key: tensors[key].bfloat16() for key in (down, up)}
    changes[path, width] = product(tensors[down], tensors[up], 0.5)
    expect("sd3", normalised("sd3", tensors), changes)


# Bypass, for quantised models: the host takes whole layers only there


def bypassed(family, tensors):
    made, _ = comfy.sd.load_bypass_lora_for_models(patcher(family), None, dict(tensors), 0.7, 0)
    return made


@pytest.mark.parametrize("kind", QKV)
def test_packed_layers_work_in_bypass(kind):
    family, path = family_of(kind), QKV[kind][0]
    tensors, _ = parts(kind, ranks=(2, 3, 4), alphas=(2.0, 2.0, None))
    native, left = native_lora(tensors, model(family))
    assert left == []
    weights, bypass = patched(family, native, 0.7), bypassed(family, native)
    layer = model(family).get_submodule(path)
    x = torch.randn(5, layer.in_features, generator=seeded(3))
    plain = layer(x)
    bypass.inject_model()
    try:
        changed = layer(x)
    finally:
        bypass.eject_model()
    # 128 products near 1 * 0.3 sum to about 1 in either order.
    torch.testing.assert_close(changed, F.linear(x, weights[f"{path}.weight"], layer.bias), atol=1e-5, rtol=1e-5)
    assert not torch.allclose(changed, plain, atol=1e-3) and torch.equal(layer(x), plain)


@pytest.mark.parametrize("family", LAYERS)
def test_bypass_samples_as_patched_weights_do(family):
    tensors, _ = made(family, "diffusers", DIFFUSERS_FORMS["nested PEFT"], 20.0)
    native, _ = native_lora(tensors, model(family))
    weights, _ = comfy.sd.load_lora_for_models(patcher(family), None, native, 0.7, 0)
    plain, one, other = (sampled(family, each) for each in (patcher(family), weights, bypassed(family, native)))
    # The same sums in another order, through a whole model three times over.
    torch.testing.assert_close(other, one, atol=1e-3, rtol=1e-3)
    assert (one - plain).abs().max() > 20 * (one - other).abs().max()
    assert torch.equal(sampled(family, patcher(family)), plain)


# Convolutions

CONVS = {
    "sd15": [("input_blocks.3.0.in_layers.2", "down_blocks.1.resnets.0.conv1"),
             ("input_blocks.2.0.op", "down_blocks.0.downsamplers.0.conv"),
             ("input_blocks.3.1.proj_in", "down_blocks.1.attentions.0.proj_in")],
    "sdxl": [("output_blocks.1.2.conv", "up_blocks.0.upsamplers.0.conv"), ("input_blocks.0.0", "conv_in")],
    "sd3": [("x_embedder.proj", "pos_embed.proj")],
    "wan": [("patch_embedding", "patch_embedding")],
}  # fmt: skip
CONV_FORMS = {
    "unet": ("unet.{}.", PEFT, lambda path: path),
    "transformer": ("base_model.model.transformer.{}.", PEFT, lambda path: path),
    "kohya": ("lora_unet_{}.", KOHYA, flat),
    "dots": ("unet.{}.", ("lora.down.weight", "lora.up.weight"), lambda path: path),
}


@pytest.mark.parametrize("family", CONVS)
@pytest.mark.parametrize("form", CONV_FORMS)
def test_convolutions(family, form):
    pattern, (down_end, up_end), spell = CONV_FORMS[form]
    tensors, changes = {}, {}
    for seed, (native, diffusers) in enumerate(CONVS[family]):
        shape = model(family).get_submodule(f"diffusion_model.{native}").weight.shape
        down, up = factors(shape[0], shape[1], 2, seed, tuple(shape[2:]))
        start = pattern.format(spell(diffusers))
        tensors |= {start + down_end: down, start + up_end: up, start + "alpha": torch.tensor(3.0)}
        changes[f"diffusion_model.{native}"] = product(down, up, 1.5)
    expect(family, normalised(family, tensors), changes)
    native, _ = native_lora(tensors, model(family))
    weights, _ = comfy.sd.load_lora_for_models(patcher(family), None, native, 0.7, 0)
    plain, one, other = (sampled(family, each) for each in (patcher(family), weights, bypassed(family, native)))
    # As above: another order of the same sums.
    torch.testing.assert_close(other, one, atol=1e-3, rtol=1e-3)
    assert (one - plain).abs().max() > 20 * (one - other).abs().max()


def test_factors_of_a_convolution_on_a_linear_layer():
    path = UNET_LAYERS["sdxl"][0][0]
    down, up = factors(*layer_shape(model("sdxl"), f"diffusion_model.{path}.weight"), kernel=(1, 1))
    tensors = {f"lora_unet_{flat(path)}.lora_down.weight": down, f"lora_unet_{flat(path)}.lora_up.weight": up}
    native, left = native_lora(tensors, model("sdxl"))
    assert left == [] and all(tensor.ndim == 2 for key, tensor in native.items() if "lora_" in key)
    expect("sdxl", patched("sdxl", native), {f"diffusion_model.{path}": product(down.flatten(1), up.flatten(1))})


# Forms other than two factors pass through as the host reads them, or are left over


def tucker(family="sd15"):
    native, diffusers = CONVS[family][0]
    shape = model(family).get_submodule(f"diffusion_model.{native}").weight.shape
    down, up = factors(shape[0], shape[1], 2, kernel=(1, 1))
    return {"lora_down.weight": down, "lora_up.weight": up, "lora_mid.weight": torch.randn(2, 2, 3, 3, generator=seeded(4)) * 0.3}


def linear(**ends):
    """Tensors by end for the layer of the tests below, out of their shapes."""
    return {end.replace("__", "."): torch.randn(shape, generator=seeded(sum(map(ord, end)))) * 0.1 for end, shape in ends.items()}


OTHER_FORMS = {
    "tucker": (CONVS["sd15"][0], tucker),
    "DoRA": (UNET_LAYERS["sd15"][0], lambda: linear(lora_down__weight=(2, 64), lora_up__weight=(64, 2), dora_scale=(64, 1))),
    "DoRA of inputs": (UNET_LAYERS["sd15"][0], lambda: linear(lora_down__weight=(2, 64), lora_up__weight=(64, 2), dora_scale=(1, 64))),
    "LoHa": (UNET_LAYERS["sd15"][0], lambda: linear(hada_w1_a=(64, 2), hada_w1_b=(2, 64), hada_w2_a=(64, 2), hada_w2_b=(2, 64))),
    "LoKr": (UNET_LAYERS["sd15"][0], lambda: linear(lokr_w1=(8, 8), lokr_w2_a=(8, 2), lokr_w2_b=(2, 8))),
    "OFT": (UNET_LAYERS["sd15"][0], lambda: linear(oft_blocks=(4, 16, 16))),
    "difference": (UNET_LAYERS["sd15"][1], lambda: linear(diff=(64, 64), diff_b=(64,))),
    "factors and bias": (UNET_LAYERS["sd15"][1], lambda: linear(lora_down__weight=(2, 64), lora_up__weight=(64, 2), diff_b=(64,))),
    "norm": (("out.0", "conv_norm_out"), lambda: linear(w_norm=(32,), b_norm=(32,))),
}


@pytest.mark.parametrize(("form", "alpha"), [
    *((form, None) for form in OTHER_FORMS), *((form, 0.5) for form in OTHER_FORMS if form not in ("difference", "norm"))
])  # fmt: skip
def test_other_forms_are_as_the_host_reads_them(form, alpha):
    (_, diffusers, *_), ends = OTHER_FORMS[form]
    ends = ends() | ({} if alpha is None else {"alpha": torch.tensor(alpha)})
    file = {f"lora_unet_{flat(diffusers)}.{end}": tensor for end, tensor in ends.items()}
    foreign = {f"base_model.model.{diffusers}.{end}": tensor for end, tensor in ends.items()}
    host, found = patched("sd15", file), normalised("sd15", foreign)
    assert any(not torch.equal(weight, host[key]) for key, weight in state("sd15").items())
    assert all(torch.equal(found[key], weight) for key, weight in host.items())


def test_dora_takes_the_alpha_of_a_config():
    path = UNET_LAYERS["sd15"][0][1]
    ends = linear(lora_A__weight=(2, 64), lora_B__weight=(64, 2), dora_scale=(64, 1))
    tensors = {f"unet.{path}.{end}": tensor for end, tensor in ends.items()}
    with_own = tensors | {f"unet.{path}.alpha": torch.tensor(5.0)}
    found, own = normalised("sd15", tensors, alpha=5.0), normalised("sd15", with_own)
    assert all(torch.equal(found[key], own[key]) for key in own)


SLICE = "transformer.transformer_blocks.0.attn.to_q"
WHOLE = "base_model.model.transformer_blocks.0.attn.to_out.0"
LEFT_OVER = {
    "DoRA of a slice": (SLICE, dict(lora_A__weight=(2, 128), lora_B__weight=(128, 2), dora_scale=(128, 1), alpha=())),
    "LoHa of a slice": (SLICE, dict(hada_w1_a=(128, 2), hada_w1_b=(2, 128), hada_w2_a=(128, 2), hada_w2_b=(2, 128))),
    "LoKr of a slice": (SLICE, dict(lokr_w1=(8, 8), lokr_w2=(16, 16))),
    "difference of a slice": (SLICE, dict(diff=(128, 128))),
    "DoRA of PEFT": (WHOLE, dict(lora_A__weight=(2, 128), lora_B__weight=(128, 2), lora_magnitude_vector=(128,))),
    "named DoRA of PEFT": (WHOLE, dict(lora_A__default__weight=(2, 128), lora_B__default__weight=(128, 2),
                                       lora_magnitude_vector__default__weight=(128,))),
    "bias of PEFT": (WHOLE, dict(lora_A__weight=(2, 128), lora_B__weight=(128, 2), lora_B__bias=(128,))),
    "no up": (WHOLE, dict(lora_A__weight=(2, 128), alpha=())),
    "no down": (SLICE, dict(lora_B__weight=(128, 2))),
    "alpha alone": (WHOLE, dict(alpha=())),
    "scale alone": (WHOLE, dict(dora_scale=(128, 1))),
    "too wide": (WHOLE, dict(lora_A__weight=(2, 160), lora_B__weight=(128, 2))),
    "too high": (WHOLE, dict(lora_A__weight=(2, 128), lora_B__weight=(160, 2))),
    "ranks differ": (WHOLE, dict(lora_A__weight=(3, 128), lora_B__weight=(128, 2))),
    "rank 0": (WHOLE, dict(lora_A__weight=(0, 128), lora_B__weight=(128, 0))),
    "numbers": (WHOLE, dict(lora_A__weight=(), lora_B__weight=())),
    "whole width for a slice": (SLICE, dict(lora_A__weight=(2, 128), lora_B__weight=(384, 2))),
    "another adapter": (WHOLE, dict(lora_A__style__weight=(2, 128), lora_B__style__weight=(128, 2))),
    "no such block": ("transformer.transformer_blocks.7.attn.to_q", dict(lora_A__weight=(2, 128), lora_B__weight=(128, 2))),
    "a second model": ("transformer_2.transformer_blocks.0.attn.to_q", dict(lora_A__weight=(2, 128), lora_B__weight=(128, 2))),
    "not a LoRA": ("transformer.transformer_blocks.0.attn.to_out.0", dict(weight=(128, 128))),
    "a core alone": (WHOLE, dict(lora_mid__weight=(2, 2, 3, 3), diff_b=(128,))),
    "nonsense": ("hello", dict(world=(3,))),
}  # fmt: skip


@pytest.mark.parametrize("form", LEFT_OVER)
def test_what_finds_no_place_is_listed_whole(form):
    start, shapes = LEFT_OVER[form]
    ends = linear(**shapes)
    good, changes = made("sd3", "native", NATIVE_FORMS["PEFT"], 2.0)
    good = {key: tensor for key, tensor in good.items() if "1.context_block" in key}
    bad = {f"{start}.{end}": tensor for end, tensor in ends.items()}
    native, left = native_lora({**bad, **good}, model("sd3"))
    assert left == list(bad)
    expect("sd3", patched("sd3", native), {where: change for where, change in changes.items() if "1.context_block" in where[0]})
    assert native_lora(bad, model("sd3")) == ({}, list(bad))


def test_mixed_files_list_what_is_left_in_their_own_order():
    layers = [made("flux", which, forms[name], 2.0)[0] for which, forms, name in (
        ("diffusers", DIFFUSERS_FORMS, "OneTrainer"), ("native", NATIVE_FORMS, "kohya"))]  # fmt: skip
    first = {key: tensor for key, tensor in layers[0].items() if "single" not in key}
    second = {key: tensor for key, tensor in layers[1].items() if "single" in key}
    unknown = {"lora_unet_single_blocks_9_linear1.lora_up.weight": torch.zeros(3, 3), "bundle_emb.word.string_to_param": torch.zeros(2)}
    tensors = {**unknown, **first, "lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha": torch.tensor(1.0), **second, "z": torch.zeros(1)}
    native, left = native_lora(tensors, model("flux"))
    assert left == [key for key in tensors if key not in first and key not in second]
    assert [is_text_encoder_key(key) for key in left] == [False, False, True, False]
    alone = native_lora({**first, **second}, model("flux"))[0]
    assert list(alone) == list(native) and all(torch.equal(alone[key], native[key]) for key in native)


def test_nothing_matches():
    tensors, _ = made("wan", "diffusers", DIFFUSERS_FORMS["transformer"], 2.0)
    assert native_lora(tensors, model("sd15")) == ({}, list(tensors))
    assert native_lora({}, model("sd15")) == ({}, [])


def test_a_file_for_a_wider_model_of_the_same_names():
    """SD1.5 and SDXL share names, and here also some shapes; nothing that would not fit reaches the host."""
    tensors, _ = made("sdxl", "native", NATIVE_FORMS["kohya"], 2.0)
    native, left = native_lora(tensors, model("sd15"))
    assert native == {} and left == list(tensors)


@pytest.mark.parametrize("alpha", [None, 2.0])
def test_a_second_name_of_a_layer_is_left_over(alpha):
    first, changes = made("wan", "diffusers", DIFFUSERS_FORMS["transformer"], alpha)
    second, _ = made("wan", "native", NATIVE_FORMS["kohya"], 9.0)
    native, left = native_lora({**first, **second}, model("wan"))
    assert left == list(second)
    expect("wan", patched("wan", native), changes)


def test_a_whole_layer_in_another_form_keeps_parts_out():
    tensors, _ = parts("sd3", ["to_q"])
    loha = linear(hada_w1_a=(384, 2), hada_w1_b=(2, 128), hada_w2_a=(384, 2), hada_w2_b=(2, 128))
    whole = {f"{QKV['sd3'][0]}.{end}": tensor for end, tensor in loha.items()}
    native, left = native_lora({**tensors, **whole}, model("sd3"))
    assert left == list(tensors) and native.keys() == whole.keys()


@pytest.mark.parametrize(("key", "expected"), [
    ("lora_te_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight", True),
    ("lora_te1_text_model_encoder_layers_0_mlp_fc1.alpha", True),
    ("lora_te3_encoder_block_0_layer_0_SelfAttention_k.lora_up.weight", True),
    ("text_encoder.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", True),
    ("text_encoder_2.text_model.encoder.layers.0.mlp.fc1.lora_B.weight", True),
    ("text_encoders.clip_l.transformer.text_model.encoder.layers.0.mlp.fc1.lora_B.weight", True),
    ("base_model.model.text_model.encoder.layers.0.self_attn.q_proj.lora_A.weight", True),
    ("transformer.transformer_blocks.0.attn.to_q.lora_A.weight", False),
    ("diffusion_model.text_embedding.0.lora_A.weight", False),
    ("lora_unet_text_embedding_0.lora_down.weight", False),
    ("lora_test.alpha", False),
])  # fmt: skip
@pytest.mark.parametrize("family", LAYERS)
def test_text_encoders_are_told_apart(family, key, expected):
    assert is_text_encoder_key(key) == expected
    assert not expected or native_lora({key: torch.ones(2, 2)}, model(family)) == ({}, [key])


# Forms that the host knows by whole files


def test_flux_processors():
    """The host reads these in files with the 57 blocks of FLUX.1 only."""
    layers = {
        "double_blocks.0.processor.qkv_lora1": ("double_blocks.0.img_attn.qkv", 3 * WIDTH, WIDTH),
        "double_blocks.0.processor.qkv_lora2": ("double_blocks.0.txt_attn.qkv", 3 * WIDTH, WIDTH),
        "double_blocks.1.processor.proj_lora1": ("double_blocks.1.img_attn.proj", WIDTH, WIDTH),
        "double_blocks.1.processor.proj_lora2": ("double_blocks.1.txt_attn.proj", WIDTH, WIDTH),
        "single_blocks.1.processor.qkv_lora": ("single_blocks.1.linear1", 3 * WIDTH, WIDTH),
        "single_blocks.1.processor.proj_lora": ("single_blocks.1.linear2", WIDTH, 5 * WIDTH),
    }
    tensors, changes = {}, {}
    for seed, (name, (path, out, inside)) in enumerate(layers.items()):
        down, up = factors(out, inside, seed=seed)
        tensors |= {f"{name}.down.weight": down, f"{name}.up.weight": up}
        changes[f"diffusion_model.{path}"] = product(down, up)
    expect("flux", normalised("flux", tensors), changes)
    assert native_lora(tensors, model("sd3")) == ({}, list(tensors))


def test_flux_control_file():
    """It widens the input layer, which the host does by a shape that it adds to the file."""
    down, up = factors(WIDTH, 128)
    tensors = {"img_in.lora_A.weight": down, "img_in.lora_B.weight": up, "img_in.lora_B.bias": torch.full((WIDTH,), 0.5),
               "single_blocks.0.norm.key_norm.scale": torch.full((16,), 2.0),
               "single_blocks.9.norm.key_norm.scale": torch.ones(16)}  # fmt: skip
    native, left = native_lora(tensors, model("flux"))
    assert left == ["single_blocks.9.norm.key_norm.scale"]
    found, host = patched("flux", native), patched("flux", tensors)
    assert found["diffusion_model.img_in.weight"].shape == (WIDTH, 128)
    assert all(torch.equal(found[key], weight) for key, weight in host.items())
    assert any(found[key].shape != weight.shape or not torch.equal(found[key], weight) for key, weight in state("flux").items())


def test_wan_fun_file():
    tensors, changes = made("wan", "native", NATIVE_FORMS["WAN-Fun"], 2.0)
    down, up = factors(48, 48, seed=60)
    tensors |= {"lora_unet__blocks_0_cross_attn_k.lora_down.weight": down, "lora_unet__blocks_0_cross_attn_k.lora_up.weight": up}
    changes["diffusion_model.blocks.0.cross_attn.k"] = product(down, up)
    found = normalised("wan", tensors)
    expect("wan", found, changes)
    host = patched("wan", tensors)
    assert all(torch.allclose(found[key], weight, **EXACT) for key, weight in host.items())
    stray = {"lora_unet__blocks_9_ffn_0.alpha": torch.tensor(1.0)}
    assert native_lora({**tensors, **stray}, model("wan"))[1] == list(stray)


# Quantised layers


def test_quantised_layers_keep_their_shape():
    """Four bits a weight are stored at half the width."""
    own = tiny_models.model("wan")
    layer = own.model.get_submodule("diffusion_model.blocks.0.self_attn.q")
    layer.weight = torch.nn.Parameter(layer.weight[:, ::2].clone(), requires_grad=False)
    tensors, _ = made("wan", "diffusers", DIFFUSERS_FORMS["PEFT"], 2.0)
    assert native_lora(tensors, own.model)[1] == []


# Names


@pytest.mark.parametrize("family", LAYERS)
def test_no_two_layers_share_a_name(family):
    names = lora_names(model(family))
    for name, target in lora_targets(model(family)).items():
        flattened = name
        for prefix in ("diffusion_model.", "transformer.", "base_model.model.", "unet.", "lora_unet_", "lora_transformer_", "lycoris_"):
            flattened = flattened.removeprefix(prefix)
        assert names[flat(flattened.replace(".processor.", "."))] == names[name] == target


def diffusers_model(family, **changes):
    """An unfilled model of the same sizes as the host's tiny one."""
    import diffusers

    unet = dict(layers_per_block=1, cross_attention_dim=64, down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
                up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"))  # fmt: skip
    match family:
        case "sd15":
            return diffusers.UNet2DConditionModel(block_out_channels=(32, 64), **unet)
        case "sdxl":
            return diffusers.UNet2DConditionModel(
                block_out_channels=(64, 128), use_linear_projection=True, transformer_layers_per_block=(1, 2),
                addition_embed_type="text_time", addition_time_embed_dim=256,
                projection_class_embeddings_input_dim=tiny_models.SDXL_POOLED + 6 * 256, **unet,
            )  # fmt: skip
        case "sd3":
            return diffusers.SD3Transformer2DModel(
                num_layers=2, num_attention_heads=2, joint_attention_dim=64, caption_projection_dim=128, pooled_projection_dim=64,
                pos_embed_max_size=16, qk_norm="rms_norm", **changes,
            )  # fmt: skip
        case "flux":
            return diffusers.FluxTransformer2DModel(
                num_layers=2, num_single_layers=2, attention_head_dim=16, num_attention_heads=2, joint_attention_dim=48,
                pooled_projection_dim=24, guidance_embeds=True, axes_dims_rope=(8, 4, 4),
            )  # fmt: skip
        case "wan":
            kind = diffusers.WanVACETransformer3DModel if "vace_layers" in changes else diffusers.WanTransformer3DModel
            sizes = dict(num_attention_heads=2, attention_head_dim=24, text_dim=40, freq_dim=32, ffn_dim=64, num_layers=2)
            return kind(cross_attn_norm=True, **sizes, **changes)


def vace_model():
    changes = {"model_type": "vace", "vace_layers": 2, "vace_in_dim": 96}
    config = comfy.supported_models.WAN21_Vace({**model("wan").model_config.unet_config, **changes})
    return comfy.model_base.WAN21_Vace(tiny_models.ready(config))


VARIANTS = {
    **{family: (family, {}, lambda family=family: model(family)) for family in LAYERS},
    "sd3.5": ("sd3", {"dual_attention_layers": (0,)}, lambda: tiny_models.model("sd3", x_block_self_attn_layers=[0]).model),
    "wan i2v": ("wan", {"image_dim": 1280, "added_kv_proj_dim": 48}, lambda: tiny_models.model("wan", model_type="i2v").model),
    "wan vace": ("wan", {"vace_layers": [0, 1], "vace_in_channels": 96}, vace_model),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_every_layer_of_the_diffusers_model_has_its_place(variant):
    family, changes, build = VARIANTS[variant]
    host = build()
    with torch.device("meta"):
        modules = diffusers_model(family, **changes).named_modules()
    layers = {name: layer.weight for name, layer in modules if isinstance(layer, (Linear, Conv2d, Conv3d))}
    tensors = {}
    for name, weight in layers.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = torch.empty(2, *weight.shape[1:])
        tensors[f"base_model.model.{name}.lora_B.weight"] = torch.empty(weight.shape[0], 2, *(1 for _ in weight.shape[2:]))
    native, left = native_lora(tensors, host)
    assert left == []
    weights = {key: weight for key, weight in host.state_dict().items() if key.startswith("diffusion_model.") and key.endswith(".weight")}
    assert {key.replace(".lora_A", "") for key in native if ".lora_A" in key} == {key for key, weight in weights.items() if weight.ndim > 1}


def test_the_names_of_wan_are_those_of_diffusers():
    """The same weights under the two sets of names make the same model."""
    host = model("wan").diffusion_model
    names, own = lora_names(model("wan")), diffusers_model("wan").eval()
    norms = {"attn1.norm_q": "self_attn.norm_q", "attn1.norm_k": "self_attn.norm_k", "attn2.norm_q": "cross_attn.norm_q",
             "attn2.norm_k": "cross_attn.norm_k", "norm2": "norm3", "scale_shift_table": "modulation"}  # fmt: skip
    weights = model("wan").state_dict()
    with torch.no_grad():
        for name, parameter in own.named_parameters():
            path, _, end = name.rpartition(".")
            target = names.get(flat(path))
            if isinstance(target, LoraTarget):
                parameter.copy_(weights[f"{target.key.removesuffix('.weight')}.{end}"])
                continue
            block = ".".join(name.split(".")[:2]) if name.startswith("blocks.") else "head"
            rest = name.removeprefix("blocks.").partition(".")[2] if name.startswith("blocks.") else name
            stem = rest.removesuffix(".weight").removesuffix(".bias")
            parameter.copy_(weights[f"diffusion_model.{block}.{rest.replace(stem, norms[stem])}"])
        x, context, t = torch.randn(1, 16, 2, 8, 6, generator=seeded(1)), torch.randn(1, 7, 40, generator=seeded(2)), torch.tensor([500.0])
        found = own(x, t, context, return_dict=False)[0]
        # Both run in float32; their attentions and norms round in different orders.
        torch.testing.assert_close(found, host(x, t, context), atol=1e-3, rtol=1e-3)
