"""A model is known again whatever has been done with it since, and another one is told from it."""

import torch

import comfy.model_management
from mend.model_patches.host import loaded_for_training, weights_fingerprint
from mend.model_patches.host_gradients import gradients
from mend.tests import tiny_models

LAYER = "diffusion_model.middle_block.1.proj_in"


def weight(patcher):
    return patcher.model.get_submodule(LAYER).weight


def patched(patcher, strength=1.0):
    clone = patcher.clone()
    clone.add_patches({f"{LAYER}.weight": ("diff", (torch.ones_like(weight(patcher)),))}, strength)
    return clone


def test_other_weights_are_another_model():
    one, other = (weights_fingerprint(tiny_models.model("sd15", seed)) for seed in (0, 1))
    assert one != other and one == weights_fingerprint(tiny_models.model("sd15", 0))
    changed = tiny_models.model("sd15", 0)
    with torch.no_grad():
        weight(changed)[0] += 1
    assert weights_fingerprint(changed) != one and weights_fingerprint(tiny_models.model("sdxl")) != one


def test_loading_patching_and_training_change_nothing():
    model = tiny_models.model("sd15")
    one, lora, stronger = weights_fingerprint(model), weights_fingerprint(patched(model)), weights_fingerprint(patched(model, 2.0))
    assert len({one, lora, stronger}) == 3, "a LoRA before it makes another model"
    with torch.inference_mode():
        comfy.model_management.load_models_gpu([patched(model)])
    assert not torch.equal(weight(model), weight(tiny_models.model("sd15")))
    assert weights_fingerprint(model) == one and weights_fingerprint(patched(model)) == lora, "although its weights are patched now"
    with gradients():
        loaded_for_training(model)
    assert weights_fingerprint(model) == one and weights_fingerprint(patched(model)) == lora
