"""Load LoRA of Any Origin through the host's executor."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import folder_paths
from mend.tests import tiny_models
from mend.tests.host_prompts import PromptFailed

LAYER = "input_blocks.3.1.transformer_blocks.0.attn1.to_q"
PEFT = "base_model.model.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
NATIVE = f"diffusion_model.{LAYER}.weight"


@pytest.fixture
def lora_file(base_folder):
    files = []

    def write(tensors, name="some.safetensors"):
        file = Path(folder_paths.get_folder_paths("loras")[0]) / name
        file.parent.mkdir(parents=True, exist_ok=True)
        save_file(tensors, file)
        files.append(file)
        folder_paths.filename_list_cache.pop("loras", None)
        return name

    yield write
    for file in files:
        file.unlink()
    folder_paths.filename_list_cache.pop("loras", None)


def factors(width):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(2, width, generator=generator), torch.randn(width, 2, generator=generator)


def loaded(run_prompt, model, file, strength=1.0, alpha=0.0):
    prompt = {
        "1": {"class_type": "TestGiven", "inputs": {"name": "model"}},
        "2": {"class_type": "MendLoadAnyLora", "inputs": {"model": ["1", 0], "file": file, "strength": strength, "alpha": alpha}},
        "3": {"class_type": "TestCapture", "inputs": {"value": ["2", 0]}},
    }
    return run_prompt(prompt, given={"model": model}).values["3"]


@pytest.mark.parametrize("alpha,scale", [(0.0, 1.0), (1.0, 0.5)])
def test_a_peft_file_is_applied(run_prompt, lora_file, alpha, scale):
    model = tiny_models.model("sd15")
    weight = model.model.state_dict()[NATIVE].clone()
    a, b = factors(weight.shape[1])
    patched = loaded(run_prompt, model, lora_file({f"{PEFT}.lora_A.weight": a, f"{PEFT}.lora_B.weight": b}), alpha=alpha)
    patched.patch_model()
    # One product of rank 2 in float32: rounding of a few units in the last place of values around 1.
    torch.testing.assert_close(patched.model.state_dict()[NATIVE], weight + scale * b @ a, rtol=0, atol=1e-5)
    patched.unpatch_model()
    assert torch.equal(model.model.state_dict()[NATIVE], weight)


def test_strength_0_patches_nothing(run_prompt, lora_file):
    model = tiny_models.model("sd15")
    a, b = factors(model.model.state_dict()[NATIVE].shape[1])
    assert loaded(run_prompt, model, lora_file({f"{PEFT}.lora_A.weight": a, f"{PEFT}.lora_B.weight": b}), strength=0.0).patches == {}


def test_a_file_for_another_model_is_named(run_prompt, lora_file):
    a, b = factors(8)
    with pytest.raises(PromptFailed, match="Load LoRA of Any Origin: no layer of 'model' is named in some.safetensors .transformer.nowhere"):
        loaded(run_prompt, tiny_models.model("sd15"), lora_file({"transformer.nowhere.lora_A.weight": a, "transformer.nowhere.lora_B.weight": b}))


def test_a_file_that_is_none_is_named(run_prompt, lora_file):
    name = lora_file({"a": torch.zeros(1)})
    (Path(folder_paths.get_folder_paths("loras")[0]) / name).write_text("no tensors")
    with pytest.raises(PromptFailed, match="Load LoRA of Any Origin: some.safetensors is not a safetensors file, or only a part of one"):
        loaded(run_prompt, tiny_models.model("sd15"), name)
