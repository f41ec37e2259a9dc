"""Bridge and instruction adapter: nothing at first, then all of them act; whatever does not fit is said."""

import dataclasses

import pytest
import torch

import comfy.model_base
import comfy.model_patcher
from mend.model_patches import degradation_model, irb, via
from mend.model_patches.anatomy import every_block
from mend.model_patches.degradation_condition import folded
from mend.model_patches.degradation_model import NETWORK, Plan, check_fit, checked_instruction, parted, tokenizer_of
from mend.model_patches.degradation_tokenizer import fingerprint
from mend.tests import tiny_models
from mend.tests.model_patches.degradation_models import (
    applied,
    base,
    codes,
    fresh,
    instruction,
    pictures,
    sampled,
    trained,
    vae,
    without_lora,
)  # fmt: skip

FAMILIES = ("sd15", "sd3", "flux")


def space_of(patcher, family, **shape):
    noise = torch.zeros(tiny_models.latent_shape(family, **shape))
    return patcher.get_attachment("mend_degradation").space(patcher.model, noise)


def damage(patcher, family, **settings):
    """What was sampled, undone to y0 in the model's space."""
    out = sampled(patcher, family, **settings)
    shape = {"batch": len(out), "height": out.shape[-2], "width": out.shape[-1]}
    return space_of(patcher, family, **shape).residual(patcher.model.process_latent_in(out))


@pytest.mark.parametrize(("family", "size"), [("sd15", "full"), ("sdxl", "small"), ("sd3", "full"), ("flux", "small"), ("wan", "small")])
def test_untrained_it_predicts_what_the_frozen_model_does_bit_for_bit(family, size):
    patcher = applied(family, fresh(family, size=size))
    seen, plain = [], []
    x = torch.randn(tiny_models.latent_shape(family), generator=torch.Generator().manual_seed(3))
    for model, found in ((patcher, seen), (base(family), plain)):
        wrapped = model.clone()
        wrapped.set_model_sampler_post_cfg_function(lambda args, found=found: found.append(args["denoised"].clone()) or x * 0)
        sampled(wrapped, family) if model is patcher else sampled(wrapped, family, sampler=tiny_euler())
    assert seen and all(map(torch.equal, seen, plain))


@pytest.mark.parametrize("form", ["latent", "pixel"])
@pytest.mark.parametrize("model_type", ["EPS", "V_PREDICTION", "FLOW"])
def test_the_base_may_predict_noise_or_v_or_a_flow(model_type, form):
    own = base("sd3" if model_type == "FLOW" else "sd15").clone()
    family = "sd3" if model_type == "FLOW" else "sd15"
    if model_type == "V_PREDICTION":
        sampling = comfy.model_base.model_sampling(own.model.model_config, comfy.model_base.ModelType.V_PREDICTION)
        own.add_object_patch("model_sampling", sampling)
    y0 = own.model.process_latent_in(sampled(own, family, tiny_euler()))
    torch.testing.assert_close(damage(applied(family, fresh(family, form), to=own), family), y0, atol=1e-3, rtol=1e-3)


def tiny_euler():
    import comfy.samplers

    return comfy.samplers.sampler_object("euler")


@pytest.mark.parametrize("family", FAMILIES)
def test_every_part_is_at_work(family):
    weights = trained(family)
    whole = sampled(applied(family, weights), family, steps=1)
    # Of transformers' equal blocks the first and the last.
    for name in weights.tensors if family == "sd15" else [name for name in weights.tensors if "double0." in name or "1." in name]:
        if name.endswith((".gate", "modulate.weight")):
            less = dict(weights.tensors)
            less[name] = torch.zeros_like(less[name])
            changed = dataclasses.replace(weights, tensors=less)
            assert not torch.equal(whole, sampled(applied(family, changed), family, steps=1)), name


@pytest.mark.parametrize("family", ["sd3", "flux"])
def test_latents_that_are_no_whole_patches(family):
    """Transformers see 2 x 2 cells at a time, and the host fills the last ones up."""
    shown, weights = pictures(1, 61, 75), without_lora(trained(family))
    shape = {"height": 7, "width": 9}
    out, at = damage(applied(family, weights, shown), family, **shape), torch.zeros(1, 61, 75, 1)
    at[:, -16:, -16:] = 1
    elsewhere = damage(applied(family, weights, shown * (1 - at)), family, **shape)
    assert out.shape[-2:] == (7, 9) and out.isfinite().all()
    assert (out - elsewhere).abs()[..., -2:, -2:].mean() > 2 * (out - elsewhere).abs()[..., :3, :3].mean(), "what changes is where it changed"


@pytest.mark.parametrize("family", FAMILIES)
def test_picture_and_instruction_both_count(family):
    weights = without_lora(trained(family))
    one = sampled(applied(family, weights), family)
    assert torch.equal(one, sampled(applied(family, weights), family))
    assert not torch.equal(one, sampled(applied(family, weights, told=instruction(seed=9)), family))
    assert (damage(applied(family, weights), family) - damage(applied(family, weights, pictures(seed=8)), family)).abs().max() > 1e-3


@pytest.mark.parametrize("family", FAMILIES)
def test_rows_of_a_batch_are_what_they_are_alone(family):
    weights, told = without_lora(trained(family)), instruction(batch=2)
    shown = pictures(2)
    together = sampled(applied(family, weights, shown, told), family, batch=2)
    noise = torch.randn(tiny_models.latent_shape(family, 2), generator=torch.Generator().manual_seed(1))
    for row in range(2):
        own = dataclasses.replace(told, tokens=told.tokens[row:row + 1])
        patcher = applied(family, weights, shown[row:row + 1], own)
        alone = sample_noise(patcher, family, noise[row:row + 1])
        torch.testing.assert_close(together[row:row + 1], alone, rtol=1e-3, atol=1e-3)


def sample_noise(patcher, family, noise, positive=None):
    import comfy.sample
    import comfy.samplers
    from mend.samplers.degradation_space import DegradationSpaceSampler

    sigmas = comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "simple", 2)
    conds = positive or tiny_models.conditioning(family), tiny_models.conditioning(family, 2)
    return comfy.sample.sample_custom(patcher, noise, 1.0, DegradationSpaceSampler(tiny_euler()), sigmas, *conds, torch.zeros_like(noise),
                                      disable_pbar=True, seed=1)


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_prompt_guidance_shows_both_prompts_the_same_picture(family):
    weights = without_lora(trained(family))
    batched = sampled(applied(family, weights), family, cfg=4.0)
    apart = applied(family, weights)
    # The host runs conds one by one where memory is short.
    apart.model_options["transformer_options"].setdefault("wrappers", {})
    apart.add_wrapper_with_key("calc_cond_batch", "test_apart", one_by_one)
    torch.testing.assert_close(batched, sampled(apart, family, cfg=4.0), rtol=1e-3, atol=1e-3)


def one_by_one(executor, model, conds, *args, **kwargs):
    return [executor(model, [None] * index + [entries], *args, **kwargs)[index] for index, entries in enumerate(conds)]


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_instruction_cfg_goes_beyond_no_instruction(family):
    weights = without_lora(trained(family))
    none, asked = (sampled(applied(family, weights, told=instruction(spread=spread)), family, steps=1) for spread in (0.0, 1.0))
    # One Euler step is linear in the prediction.
    beyond = sampled(applied(family, weights, cfg=2.5), family, steps=1)
    torch.testing.assert_close(beyond, none + 2.5 * (asked - none), rtol=1e-3, atol=1e-3)
    assert torch.equal(sampled(applied(family, weights, cfg=1.0), family, steps=1), asked)


def test_patches_find_prompt_and_negative_prompt_by_the_numbers_of_conds():
    """IP-Adapter has (k_cond, k_uncond) and takes one for each number; a twin without instruction is another of its cond."""
    weights, found = without_lora(trained("sd15")), []

    def listen(n, context, value, extra):
        found.append([("prompt", "negative")[number] for number in extra["cond_or_uncond"]])
        return n, context, value

    patcher = applied("sd15", weights, cfg=2.0)
    patcher.set_model_attn2_patch(listen)
    told = sampled(patcher, "sd15", cfg=4.0)
    assert found and all(sorted(each) == ["negative", "negative", "prompt", "prompt"] for each in found)
    assert torch.equal(told, sampled(applied("sd15", weights, cfg=2.0), "sd15", cfg=4.0))


@pytest.mark.parametrize("count", [1, 7, 16, 64])
def test_instructions_of_any_length(count):
    assert sampled(applied("sd15", trained("sd15"), told=instruction(count)), "sd15").isfinite().all()


def test_positions_tell_tokens_apart_and_span_the_chart():
    for count in (1, 7, 12, 64):
        places = via.positions(count, 50)
        assert places.shape == (count, 50) and len(places.unique(dim=0)) == count
    coarse, fine = via.positions(16, 32).reshape(4, 4, 32), via.positions(64, 32).reshape(8, 8, 32)
    slow = fine[::2, ::2] - coarse
    assert slow[..., [0, 16]].abs().max() < 0.5, "the same corner of a chart has nearly the same slow waves, whatever the number of tokens"


def test_attentions_start_as_those_over_the_text():
    weights, layers = fresh("sd15", size="full"), dict(base("sd15").model.diffusion_model.named_modules())
    plan = Plan.of(base("sd15").model, "full")
    assert {place.path for place in plan.places} == {path for path in layers if path.endswith(".attn2")}
    for place in plan.places:
        for own, text in (("to_q", "to_q"), ("to_k", "to_k"), ("to_v", "to_v"), ("to_out", "to_out.0")):
            found = weights.tensors[f"{NETWORK}via.attentions.{place.name}.{own}.weight"]
            assert torch.equal(found, layers[f"{place.path}.{text}"].weight)


def test_a_small_one_has_the_first_half_of_the_heads():
    plan = Plan.of(base("sd15").model, "small")
    text = dict(base("sd15").model.diffusion_model.named_modules())[plan.places[0].path]
    assert plan.places[0].heads == text.heads // 2
    own = fresh("sd15").tensors[f"{NETWORK}via.attentions.{plan.places[0].name}.to_q.weight"]
    assert torch.equal(own, text.to_q.weight[:len(own)])


def test_every_block_of_a_unet_has_a_bridge_but_the_last():
    unet = base("sd15").model.diffusion_model
    sites = every_block(base("sd15").model)
    assert len(sites) == len(unet.input_blocks) + 1 + len(unet.output_blocks) - 1
    assert [site.scale for site in sites] == [1, 1, 2, 2, 2, 2, 1, 1]


def test_skip_connections_carry_what_a_bridge_adds():
    weights = without_lora(fresh("sd15"))
    one = f"{NETWORK}irb.bridges.input1.modulate.weight"
    weights.tensors[one] = torch.randn(weights.tensors[one].shape, generator=torch.Generator().manual_seed(0))
    got, unet = [], base("sd15").model.diffusion_model
    patcher = applied("sd15", weights)
    patcher.set_model_output_block_patch(lambda h, hsp, options: got.append(hsp.clone()) or (h, hsp))
    plain = []
    bare = base("sd15").clone()
    bare.set_model_output_block_patch(lambda h, hsp, options: plain.append(hsp.clone()) or (h, hsp))
    sampled(patcher, "sd15", steps=1)
    sampled(bare, "sd15", sampler=tiny_euler(), steps=1)
    last = len(unet.output_blocks)
    assert not torch.equal(got[last - 2], plain[last - 2])


def test_start_and_end_of_its_part_in_sampling():
    weights = without_lora(trained("sd15"))
    whole = sampled(applied("sd15", weights), "sd15", steps=4)
    early = sampled(applied("sd15", weights, start_percent=0.0, end_percent=0.5), "sd15", steps=4)
    never = sampled(applied("sd15", weights, start_percent=1.0, end_percent=1.0), "sd15", steps=4)
    assert not torch.equal(whole, early)
    torch.testing.assert_close(never, sampled(applied("sd15", without_lora(fresh("sd15"))), "sd15", steps=4))


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_areas_of_prompts_see_their_part_of_the_picture(family):
    shown, seen = pictures(), []
    patcher = applied(family, without_lora(trained(family)), shown)
    halves = [{"area": (8, 4, 0, left), "strength": 1.0} for left in (0, 4)]
    positive = [[cond, {**more, **half}] for half in halves for cond, more in tiny_models.conditioning(family)]
    pyramid = patcher.get_additional_models()[0].model.irb.pyramid
    handle = pyramid.register_forward_pre_hook(lambda _, args: seen.extend(args[0].split(1)))
    try:
        noise = torch.randn(tiny_models.latent_shape(family), generator=torch.Generator().manual_seed(1))
        assert sample_noise(patcher, family, noise, positive).isfinite().all()
    finally:
        handle.remove()
    parts = (2 * shown.movedim(-1, 1) - 1).chunk(2, -1)
    assert seen and all(any(torch.allclose(each, part) for part in parts) for each in seen)
    assert all(any(torch.allclose(each, part) for each in seen) for part in parts)


def test_pictures_travel_folded_into_cells():
    shown, c_lq = pictures(2), torch.randn(2, 4, 8, 8)
    packed = folded(shown, c_lq, 8)
    pixels, latent = parted(packed[:, :-1], 8)
    torch.testing.assert_close(pixels, 2 * shown.movedim(-1, 1) - 1)
    assert torch.equal(latent, c_lq) and packed.shape[1] == 3 * 64 + 4 + 1


def looks(patcher, sample):
    """How many pictures its pyramid looks at in each evaluation."""
    seen = []
    pyramid = patcher.get_additional_models()[0].model.irb.pyramid
    handle = pyramid.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    try:
        sample()
    finally:
        handle.remove()
    return set(seen)


def test_what_conds_have_in_common_is_looked_at_once():
    patcher = applied("sd15", without_lora(trained("sd15")))
    assert looks(patcher, lambda: sampled(patcher, "sd15", cfg=4.0)) == {1}
    halves = [[cond, {**more, "area": (8, 4, 0, left), "strength": 1.0}] for left in (0, 4) for cond, more in tiny_models.conditioning("sd15")]
    noise = torch.randn(tiny_models.latent_shape("sd15"), generator=torch.Generator().manual_seed(1))
    assert 2 in looks(patcher, lambda: sample_noise(patcher, "sd15", noise, halves)), "each half of the picture is looked at"


def test_the_twin_without_instruction_has_a_name_of_its_own():
    patcher, names = applied("sd15", without_lora(trained("sd15")), cfg=2.0), []

    def listen(executor, *args, **kwargs):
        names.append([str(name) for name in args[5]["uuids"]])
        return executor(*args, **kwargs)

    patcher.add_wrapper_with_key("apply_model", "test_names", listen)
    sampled(patcher, "sd15")
    assert all(len(set(step)) == len(step) == 2 for step in names) and len({tuple(sorted(step)) for step in names}) == 1


def test_other_codes_and_widths_are_refused():
    weights = fresh("sd15")
    foreign = dataclasses.replace(instruction(), codebook="0123456789abcdef")
    with pytest.raises(ValueError, match="another tokenizer"):
        checked_instruction(weights, foreign, "Apply")
    with pytest.raises(ValueError, match="width 64"):
        checked_instruction(weights, dataclasses.replace(instruction(), tokens=torch.zeros(1, 4, 32)), "Apply")


def test_other_models_and_broken_files_are_refused():
    weights = fresh("sd15")
    with pytest.raises(ValueError, match="was made for UNet 32"):
        check_fit(weights, base("sd3").model, "Apply")
    weights.tensors.pop(next(name for name in weights.tensors if name.startswith("tokenizer.")))
    with pytest.raises(ValueError, match="missing"):
        check_fit(weights, base("sd15").model, "Apply")
    with pytest.raises(ValueError, match="does not understand"):
        check_fit(dataclasses.replace(fresh("sd15"), config={"form": "sideways"}), base("sd15").model, "Apply")
    for changes in ({"size": ["small"]}, {"rank": True}, {"cell": 7}, {"tokenizer": {"size": {}}}, {"codebook": None}, {"code_width": 3}):
        with pytest.raises(ValueError, match="Apply: .* does not understand"):
            check_fit(dataclasses.replace(fresh("sd15"), config={**fresh("sd15").config, **changes}), base("sd15").model, "Apply")
    with pytest.raises(ValueError, match="pictures for a batch of 1|for 3 pictures"):
        sampled(applied("sd15", fresh("sd15"), told=instruction(batch=3)), "sd15")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_a_file_in_half_precision_does_the_same(family, dtype):
    full = trained(family)
    half = dataclasses.replace(full, tensors={name: tensor.to(dtype) for name, tensor in full.tensors.items()})
    one, other = (sampled(applied(family, weights), family) for weights in (full, half))
    nothing = sampled(applied(family, fresh(family)), family)
    assert (one - other).norm() < 16 * torch.finfo(dtype).eps * (one - nothing).norm()


def test_it_brings_its_tokenizer_along():
    assert fingerprint(tokenizer_of(fresh("sd15"))) == fingerprint(codes()) == fresh("sd15").config["codebook"]


def test_concatenation_is_a_wider_first_convolution():
    weights = without_lora(trained("sd15", bridge="concatenation", spread=0.05))
    assert sampled(applied("sd15", weights), "sd15").isfinite().all()
    assert not torch.equal(sampled(applied("sd15", weights), "sd15"), sampled(applied("sd15", without_lora(fresh("sd15"))), "sd15"))
    with pytest.raises(ValueError, match="UNets only"):
        fresh("sd3", bridge="concatenation")


def test_a_clone_of_the_model_keeps_it_and_the_model_itself_does_not():
    patcher = applied("sd15", trained("sd15"))
    assert isinstance(patcher, comfy.model_patcher.ModelPatcher)
    assert torch.equal(sampled(patcher.clone(), "sd15"), sampled(patcher, "sd15"))
    assert base("sd15").get_attachment("mend_degradation") is None and not base("sd15").wrappers.get("apply_model")


def untrained_bridge(family, size):
    network = degradation_model.DegradationNetwork(Plan.of(base(family).model, size), fresh(family).config, torch.nn)
    irb.initialise_bridge(network.irb, torch.Generator().manual_seed(0))
    return network.irb


def test_only_what_would_change_the_model_starts_at_nothing():
    bridge = untrained_bridge("sd15", "small")
    none = {name.split(".")[0] for name, p in bridge.named_parameters() if name.endswith("weight") and not p.any()}
    assert none == {"times", "bridges"}
    assert vae("sd15").spacial_compression_encode() == fresh("sd15").config["cell"]


@pytest.mark.parametrize("size", ["small", "full"])
@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_pixels_arrive_as_large_as_the_latent(family, size):
    bridge = untrained_bridge(family, size)
    # Smooth as photographs are: white noise is the easy case.
    shown = torch.nn.functional.interpolate(torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(3)), scale_factor=8, mode="bilinear")
    pixels, c_lq = 2 * shown - 1, torch.randn(2, tiny_models.CHANNELS[family], 8, 8, generator=torch.Generator().manual_seed(4))
    with torch.no_grad():
        assert 0.5 < bridge.pyramid.cells(pixels).square().mean().sqrt() < 2
        assert all(0.5 < feature.square().mean().sqrt() < 2 for feature in bridge.pyramid(pixels, c_lq).values())
        dim, bright = (bridge.pyramid(shown * share - 1, c_lq)[int(next(iter(bridge.times)))] for share in (0.2, 0.4))
    assert (dim - bright).square().mean().sqrt() > 0.02, "how dark it is, is not normalised away"


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_scale_and_shift_learn_from_the_first_step_and_time_from_the_second(family):
    bridge, site = untrained_bridge(family, "small"), Plan.of(base(family).model, "small").sites[0]
    own, generator = bridge.bridges[site.name], torch.Generator().manual_seed(0)
    h = torch.randn((2, 16, site.channels) if own.tokens else (2, site.channels, 4, 4), generator=generator)
    emb = torch.randn(2, Plan.of(base(family).model, "small").anatomy.emb, generator=generator)
    feature = torch.randn(1, own.modulate.weight.shape[1], 4, 4, generator=generator)
    optimizer = torch.optim.SGD(bridge.parameters(), 0.1)
    for step in range(2):
        change = bridge(site, h, {site.scale: feature}, emb)
        assert bool(change.any()) == (step > 0)
        (change - h).square().mean().backward()
        scale, shift = own.modulate.weight.grad.chunk(2)
        assert scale.any() and shift.any() and bool(bridge.times[str(site.scale)].weight.grad.any()) == (step > 0)
        optimizer.step()
        optimizer.zero_grad()


@pytest.mark.parametrize("family", ["sd15", "sd3"])
def test_the_time_bends_what_is_told(family):
    weights = without_lora(trained(family))
    timeless = {name: tensor if ".times." not in name else torch.zeros_like(tensor) for name, tensor in weights.tensors.items()}
    one, other = (sampled(applied(family, dataclasses.replace(weights, tensors=tensors)), family) for tensors in (weights.tensors, timeless))
    assert not torch.equal(one, other)
