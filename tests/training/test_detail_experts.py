"""Detail experts in training: gradients, what they are shown, a VAE that stays, and runs that go on where they stopped."""

import pytest
import torch
from torch.nn.functional import avg_pool2d

import comfy.model_management
from mend.model_patches.detail_decoder import decode_with_experts
from mend.model_patches.detail_experts import SIGNATURE
from mend.model_patches.host_gradients import gradients
from mend.model_patches.host_vae import BACKWARD_FACTOR
from mend.model_patches.weights_file import Weights
from mend.tests.model_patches.detail_experts import made, pictures, trained
from mend.tests.training.dummies import Watcher, same
from mend.tests.training.tiny_training import generators
from mend.training import detail_experts
from mend.training import pairs as paired_data
from mend.training.checkpoint import open_run
from mend.training.detail_experts import DetailExpertsTrainee, new_experts
from mend.training.kinds import KINDS, new_weights, trainee_of
from mend.training.loop import describe_run, train
from mend.training.processes import Processes
from mend.training.settings import Settings
from mend.training.trainee import Batch, Models, Pair

SIDE = 64


class SmallPairs:
    """Pictures with noise on them."""

    validation_count = 1
    collate = staticmethod(paired_data.collate)

    def __len__(self):
        return 4

    def pair(self, index, generator):
        clean = pictures(1, SIDE, SIDE, seed=index)[0]
        return Pair(clean, (clean + 0.1 * torch.randn(clean.shape, generator=generator)).clamp(0, 1))

    def validation(self, index):
        return self.pair(100, torch.Generator().manual_seed(index))

    def fingerprint(self):
        return "small pairs"


def batch(count=2):
    pairs = [SmallPairs().pair(index, torch.Generator().manual_seed(index)) for index in range(count)]
    return paired_data.collate(pairs)


def given(kind="kl"):
    return Models(vae=made(kind))


def state(models):
    return {name: tensor.clone() for name, tensor in models.vae.first_stage_model.state_dict().items()}


def fresh(models, **config):
    return new_weights("detail_experts", models, {"window": 64, **config})


def stepped(models, weights, steps, rate=3e-3):
    trainee, losses = trainee_of(weights, models), []
    with gradients(), trainee.attach(models):
        optimizer = torch.optim.Adam(list(trainee.parameters()), rate)
        for _ in range(steps):
            loss, figures = trainee.loss(batch(), generators(2, seed=5))
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return trainee, losses, figures


@pytest.mark.parametrize("kind", ["kl", "taesd"])
def test_what_learns(kind):
    models = given(kind)
    before = state(models)
    trainee = trainee_of(trained(models.vae), models)
    with gradients(), trainee.attach(models):
        loss, figures = trainee.loss(batch(), generators(2))
        loss.backward()
    assert loss.isfinite() and figures.keys() == {"l1", "ssim", "balance", "perceptual"}
    for name, p in trainee.network.named_parameters():
        assert p.grad is not None or ".experts." in name, name  # experts that were not chosen have none
        assert p.grad is None or p.grad.isfinite().all(), name
    learned = {name for name, p in trainee.network.named_parameters() if p.grad is not None and p.grad.any()}
    assert all(any(f".{part}." in name for name in learned) for part in ("enter", "skip", "shared", "router", "experts", "cross", "ffn", "leave"))
    assert same(state(models), before)


def test_a_fresh_one_starts_at_its_last_layer(monkeypatch):
    models = given()
    monkeypatch.setattr(detail_experts, "BALANCE_WEIGHT", 0.0)  # which the routers and what is before them feel at once
    trainee = trainee_of(fresh(models, perceptual=0.0), models)
    with gradients(), trainee.attach(models):
        loss, figures = trainee.loss(batch(), generators(2))
        loss.backward()
    assert "perceptual" not in figures
    opened = {name for name, p in trainee.network.named_parameters() if p.grad is not None and p.grad.any()}
    assert opened == {f"sites.at_{scale}.leave.{part}" for scale in (4, 2, 1) for part in ("weight", "bias")}


def test_steps_lower_the_loss_and_leave_the_vae():
    models = given()
    before = state(models)
    _, losses, _ = stepped(models, fresh(models, perceptual=0.0), steps=12, rate=1e-2)
    assert losses[-1] < 0.95 * losses[0]
    assert same(state(models), before)


def test_the_host_is_asked_for_memory(monkeypatch):
    models, asked = given(), []
    free = comfy.model_management.free_memory
    monkeypatch.setattr(comfy.model_management, "free_memory", lambda size, device, *rest, **named: asked.append(size) or free(size, device, *rest, **named))
    trainee = trainee_of(fresh(models, perceptual=0.0), models)
    with gradients(), trainee.attach(models):
        parameters = [*trainee.module.parameters(), *trainee.parameters()]
        assert asked[-1] >= sum(p.nbytes for p in parameters)
        for pairs, wanted in ((1, True), (2, True), (1, False), (2, False)):
            before = len(asked)
            trainee.loss(batch(pairs), generators(pairs))
            assert (len(asked) > before) == wanted, "room for the largest batch is room for the others"
    one = models.vae.memory_used_decode((1, 4, SIDE // 8, SIDE // 8), torch.float32)
    assert asked[-1] >= 2 * BACKWARD_FACTOR * one and asked[-1] > asked[-2]


def test_the_same_seeds_give_the_same_weights():
    models = given()
    runs = [stepped(models, fresh(models, perceptual=0.0), steps=3)[0].state_dict() for _ in range(2)]
    assert same(*runs)


def test_runs_go_on_where_they_stopped(tmp_path):
    models = given()
    settings = Settings(steps=4, batch=1, rate=1e-3, validate_every=2, validation_pictures=1)

    def run(folder, watcher):
        trainee = trainee_of(fresh(models, perceptual=0.0), models)
        description = describe_run(trainee, SmallPairs(), models, settings)
        return train(trainee, SmallPairs(), models, settings, open_run(tmp_path, folder, description, settings.steps), watcher)

    whole = run("whole", Watcher())
    stopped = run("parts", Watcher(stop_after=2))
    assert not stopped.finished
    resumed = run("parts", Watcher())
    assert resumed.finished and same(whole.tensors, resumed.tensors) and whole.losses == resumed.losses
    assert whole.page.shape == (1, SIDE, 3 * SIDE, 3)


def test_the_node_decodes_what_was_trained():
    models = given()
    trainee, _, _ = stepped(models, trained(models.vae, perceptual=0.0), steps=1)
    tensors = {name: tensor.detach().clone() for name, tensor in trainee.state_dict().items()}
    weights = Weights(trainee.kind, trainee.family, trainee.config, tensors)
    seen = batch().degraded
    with gradients(), torch.no_grad(), trainee.attach(models):
        latents = trainee.encode(batch().clean)
        expected = trainee.restored(latents, seen)
    with torch.inference_mode():
        found = decode_with_experts(models.vae, weights, latents, seen, 1.0, 0, 0, "Decode")[0]
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    assert SIGNATURE in tensors and trainee.family == "AutoencoderKL of 4 channels, 32-32-32"


@pytest.mark.parametrize("latents", ["mix", "clean", "degraded"])
def test_latents_are_what_restorers_leave(latents):
    models = given()
    trainee = trainee_of(fresh(models, latents=latents, perceptual=0.0), models)
    count, one = 24, batch(1)
    many = Batch(one.clean.expand(count, -1, -1, -1), one.degraded.expand(count, -1, -1, -1), ("",) * count, ("",) * count)
    with trainee.attach(models):
        near, far = (trainee.encode(pictures)[:1] for pictures in (one.clean, one.degraded))
        drawn = trainee.latents(many, generators(count))
    damage = far - near
    if latents == "mix":
        damage = damage - avg_pool2d(damage, 5, 1, 2, count_include_pad=False)
    # How much of the damage is in each; the noise on it is at most 0.1 of the deviation.
    line = damage.flatten()
    places = ((drawn - near).flatten(1) @ line) / line.square().sum()
    spread = 3 * 0.1 * float(near.std()) / float(line.norm())
    wanted = {"clean": (0, 0), "degraded": (1, 1), "mix": (0, 0.5)}[latents]
    assert places.min() > wanted[0] - spread and places.max() < wanted[1] + spread
    if latents == "mix":
        assert 0.3 <= float((places.abs() < spread).float().mean()) <= 0.85 and places.max() > 0.2


def test_a_mix_leaves_light_alone(monkeypatch):
    models = given()
    trainee = trainee_of(fresh(models, perceptual=0.0), models)
    with trainee.attach(models):
        # Latents that differ in light only, as those of an encoder that looks at each cell alone would.
        monkeypatch.setattr(trainee, "encode", lambda shown: shown[:, ::8, ::8].movedim(-1, 1))
        one = pictures(8, 64, 64)
        near = trainee.encode(one)
        moved = trainee.latents(Batch(one, one - 0.5, ("",) * 8, ("",) * 8), generators(8)) - near
    assert moved.flatten(1).mean(1).abs().max() < 0.05 and moved.std() < 0.11 * near.std()


def test_what_is_refused():
    with pytest.raises(ValueError, match="Train: 'vae' is not connected. Detail experts learn on the VAE"):
        DetailExpertsTrainee(trained(made("kl")), Models())
    with pytest.raises(ValueError, match="Train: .* was made for TAESD"):
        trainee_of(trained(made("taesd")), given())
    wrong = [{"size": "huge"}, {"size": ["lite"]}, {"window": 60}, {"window": 1024}, {"latents": "none"}, {"experts": 3}, {"seed": -1}, {"seed": "0"},
             {"perceptual": "none"}, {"perceptual": -1.0}, {"perceptual": float("nan")}, {"perceptual": True}]  # fmt: skip
    for config in wrong:
        with pytest.raises(ValueError, match="new detail experts take size"):
            new_experts(given(), config)
    with pytest.raises(ValueError, match="new detail experts need a VAE"):
        new_experts(Models(), {})
    assert "detail_experts" in KINDS


class Peers(Processes):
    """Two processes of which the other one knows all numbers to be 7."""

    def same(self, value):
        return value

    def average(self, tensors, numbers):
        known = {tensor.data_ptr() for tensor in self.told()}
        for tensor in tensors:
            if tensor.data_ptr() in known:
                tensor.fill_(7.0)
        return list(numbers)


def test_processes_share_what_routers_take_for_usual(monkeypatch):
    models = given()
    trainee = trainee_of(fresh(models), models)
    monkeypatch.setattr(Peers, "told", lambda self: trainee.statistics(), raising=False)
    settings = Settings(steps=2, batch=2, validate_every=0)
    found = train(trainee, SmallPairs(), models, settings, None, Watcher(), Peers(0, 2)).tensors
    usual = {name: tensor for name, tensor in found.items() if name.endswith((".router.mean", ".router.deviation"))}
    assert usual and all((tensor == 7).all() for tensor in usual.values()), sorted(found)
