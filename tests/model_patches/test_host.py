"""What host.py and its parts say about the host is what the host does."""

import pytest
import torch

import comfy.model_management
from mend.model_patches import host, host_gradients, host_vae

FAMILIES = ("sd15", "sdxl", "sd3", "flux", "wan")
FLOW = {"sd3", "flux", "wan"}


def latent(tiny, family, seed=1):
    return tiny.latent(family, 1, 4, 4, seed=seed)["samples"]


def sampling(tiny, family):
    return tiny.model(family).model.model_sampling


def test_gradients_flow_inside_inference_mode_and_the_host_is_put_back(tiny):
    before = comfy.model_management.in_training
    with torch.inference_mode():
        vae = tiny.vae(4)
        with pytest.raises(KeyError), host_gradients.gradients():
            host_gradients.plain_weights(vae.first_stage_model)
            leaf = torch.zeros(1, 4, 2, 2).requires_grad_(True)
            vae.first_stage_model.decode(leaf).sum().backward()
            assert leaf.grad.any() and comfy.model_management.in_training
            raise KeyError
        assert torch.is_inference_mode_enabled()
    assert comfy.model_management.in_training == before


def test_plain_weights_keep_their_values_and_leave_normal_ones_alone(tiny):
    with torch.inference_mode():
        module = tiny.vae(4).first_stage_model
    before = {name: tensor.clone() for name, tensor in module.state_dict().items()}
    assert any(p.is_inference() for p in module.parameters())
    host_gradients.plain_weights(module)
    after = module.state_dict()
    assert not any(p.is_inference() or p.requires_grad for p in module.parameters())
    assert all(torch.equal(before[name], after[name]) for name in before)
    kept = list(module.parameters())
    host_gradients.plain_weights(module)
    assert all(a is b for a, b in zip(kept, module.parameters()))


def test_plain_weights_keep_what_the_host_notes_on_them_and_leave_layers_fed_on_demand(tiny):
    with torch.inference_mode():
        module = tiny.vae(4).first_stage_model
    first, second = host_gradients.casting_layers(module)[:2]
    first.weight._model_dtype, second._v = torch.bfloat16, object()
    host_gradients.plain_weights(module)
    assert first.weight._model_dtype == torch.bfloat16 and not first.weight.is_inference()
    assert second.weight.is_inference()


@pytest.mark.parametrize("coder", ["decoder", "encoder"])
def test_gradients_need_no_normal_weights_in_layers(tiny, coder):
    """Hosts that feed layers on demand hand out inference tensors, whatever a layer's own weights are."""
    with torch.inference_mode():
        vae, base = tiny.vae(4), tiny.model("sd15").model
        layers = host_gradients.casting_layers(vae.first_stage_model)
        given = host_vae.PixelDecoder(vae, base) if coder == "decoder" else host_vae.LatentEncoder(vae, base)
        with host_gradients.gradients():
            host_vae.PixelDecoder(vae, base).prepare()
            leaf = torch.rand(1, *((4, 2, 2) if coder == "decoder" else (3, 16, 16))).requires_grad_(True)
            given(leaf).square().sum().backward()
    assert leaf.grad.any() and all(p.is_inference() for layer in layers for p in layer.parameters(recurse=False))
    assert not any("weight_function" in vars(layer) or "bias_function" in vars(layer) for layer in layers)


def test_layers_get_their_functions_back_after_an_error(tiny):
    layers = host_gradients.casting_layers(tiny.vae(4).first_stage_model)
    own = [len]
    layers[0].weight_function = own
    with pytest.raises(KeyError), host_gradients.copied_weights(layers):
        assert layers[0].weight_function == [len, torch.clone] and layers[1].bias_function == [torch.clone]
        raise KeyError
    assert layers[0].weight_function is own and not any("weight_function" in vars(layer) for layer in layers[1:])


def test_weights_elsewhere_are_told_from_those_on_the_device(tiny):
    module = tiny.vae(4).first_stage_model
    layers = host_gradients.casting_layers(module)
    layers[1]._v = object()
    assert host_gradients.casting_layers(module, torch.device("cpu")) == [layers[1]]
    assert len(host_gradients.casting_layers(module, torch.device("meta"))) == len(layers)


def test_attention_with_gradients_is_torchs_own():
    from comfy.ldm.modules.attention import attention_basic

    def chosen(*args, **kwargs):
        raise AssertionError("this implementation has no backward pass")

    given = {"other": 1}
    options = host_gradients.differentiable_attention(given)
    q = torch.randn(1, 5, 8, requires_grad=True)
    found = options["optimized_attention_override"](chosen, q, q, q, 2)
    torch.testing.assert_close(found, attention_basic(q, q, q, 2), atol=1e-5, rtol=1e-5)
    assert options["other"] == 1 and given == {"other": 1}


def test_plain_clones_inference_tensors_wherever_they_are(tiny):
    import comfy.conds

    with torch.inference_mode():
        inside, cond = torch.ones(2), comfy.conds.CONDRegular(torch.zeros(3))
    outside = torch.ones(2)
    found = host_gradients.plain({"a": [inside, outside], "b": (cond, 5)})
    assert not found["a"][0].is_inference() and torch.equal(found["a"][0], inside)
    assert found["a"][1] is outside and found["b"][1] == 5
    assert not found["b"][0].cond.is_inference() and cond.cond.is_inference()


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_is_the_hosts_without_its_clamp(tiny, family):
    vae, base = tiny.vae(tiny.CHANNELS[family]), tiny.model(family).model
    z = latent(tiny, family)
    raw = base.process_latent_out(z)
    with torch.no_grad():
        ours = host_vae.PixelDecoder(vae, base)(z)
    theirs = vae.decode(raw[:, :, 0] if raw.ndim == 5 else raw)
    assert ours.shape == (1, 3, 32, 32) and ours.dtype == torch.float32
    # The same network; only the order of scaling and shifting differs.
    torch.testing.assert_close(ours.clamp(0, 1).movedim(1, -1), theirs, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", ["sd15", "sdxl", "sd3", "flux"])
def test_encoder_is_the_hosts(tiny, family):
    vae, base = tiny.vae(tiny.CHANNELS[family]), tiny.model(family).model
    x = torch.rand(1, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        ours = host_vae.LatentEncoder(vae, base)(x)
    torch.testing.assert_close(ours, base.process_latent_in(vae.encode(x.movedim(1, -1))), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_decoder_gradient_is_right(tiny, family):
    vae, base = tiny.vae(tiny.CHANNELS[family]), tiny.model(family).model
    vae.first_stage_model.double()
    vae.vae_dtype = torch.float64
    decoder = host_vae.PixelDecoder(vae, base)
    z, way = latent(tiny, family).double(), latent(tiny, family, seed=2).double()
    leaf = z.clone().requires_grad_(True)
    weights = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(5))
    slope = (torch.autograd.grad((decoder(leaf) * weights).sum(), leaf)[0] * way).sum()
    with torch.no_grad():
        change = ((decoder(z + 1e-3 * way) - decoder(z - 1e-3 * way)).double() * weights).sum() / 2e-3
    # The decoder hands out float32, which the difference of two pictures feels at about 1e-3.
    assert slope.item() == pytest.approx(change.item(), rel=3e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_model_time_runs_from_one_to_zero(tiny, family):
    model_sampling = sampling(tiny, family)
    times = [host.model_time(model_sampling, float(model_sampling.percent_to_sigma(part))) for part in (1e-9, 0.25, 0.5, 0.75, 1 - 1e-9)]
    assert times[0] == pytest.approx(1, abs=0.01) and times[-1] == pytest.approx(0, abs=0.01)
    assert times == sorted(times, reverse=True)


def test_model_time_is_linear_in_timesteps(tiny):
    model_sampling = sampling(tiny, "sd15")
    sigma = float(model_sampling.sigma(torch.tensor(700.0)))
    assert host.model_time(model_sampling, sigma) == pytest.approx(0.7, abs=2e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_flow_models_are_told_from_eps_models(tiny, family):
    model_sampling = sampling(tiny, family)
    assert host.is_flow(model_sampling) == (family in FLOW)
    assert host.noise_to_signal(model_sampling, 0.25) == pytest.approx(1 / 3 if family in FLOW else 0.25)


def test_run_wrappers_do_not_replace_each_other(tiny):
    patcher = tiny.model("sd15")
    for _ in range(2):
        host.add_run_wrappers(patcher, "mend", {host.WrappersMP.OUTER_SAMPLE: lambda executor, *a: executor(*a)})
    assert len(patcher.wrappers[host.WrappersMP.OUTER_SAMPLE]) == 2


def test_models_to_load_add_up(tiny):
    patcher, one, two = tiny.model("sd15"), tiny.vae(4).patcher, tiny.vae(4).patcher
    host.load_with(patcher, "mend", [one])
    host.load_with(patcher, "mend", [two])
    assert patcher.get_additional_models_with_key("mend") == [one, two]


def test_reserve_covers_what_is_asked(tiny):
    base = tiny.model("sd15").model
    shape, extra = [2, 4, 8, 8], 3e8
    asked = host.reserve(base, shape, extra)
    assert asked[1:] == shape[1:]
    assert base.memory_required(asked) >= base.memory_required(shape) + extra


def test_flux_norms_get_copies_only_while_gradients_flow(tiny):
    network = tiny.model("flux").model.diffusion_model
    hooks = [module._forward_pre_hooks for module in network.modules()]
    with host_gradients.unshared_norm_inputs(network):
        assert sum(map(len, hooks)) == 2 * 4 + 2
    assert not any(hooks)


def test_interrupt_point_raises_when_cancelled():
    host.interrupt_point()
    comfy.model_management.interrupt_current_processing(True)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        host.interrupt_point()
    host.interrupt_point()
