"""Published prompt files: those of the published shapes fit the full-size models in the order of their modules, and anything else is refused by name."""

import pickle
import zipfile
from types import SimpleNamespace

import pytest
import torch

from comfy.ldm.wan.model import WanModel
from mend.dev.bench.full_size import FULL_SIZE, META, Model
from mend.model_patches.learned_prompt import attention_modules, check_fit, default_length, new_prompt
from mend.model_patches.published_prompt import load_file, load_published, published_weights
from mend.model_patches.weights_file import load_weights, save_weights
from mend.tests.model_patches.learned_prompts import NODE, base

WAN_1_3B = dict(model_type="t2v", dim=1536, ffn_dim=8960, num_heads=12, num_layers=30, freq_dim=256, text_dim=4096, in_dim=16, out_dim=16,
                patch_size=(1, 2, 2), qk_norm=True, cross_attn_norm=True, eps=1e-6)  # fmt: skip
SHAPES = {"flux": ((1, 512, 3072), 57, "FLUX.1"), "wan": ((1, 226, 1536), 30, "WAN 1.3B")}


def full_size(backend):
    if backend == "flux":
        return FULL_SIZE["FLUX.1"].build()
    return Model(WanModel(**WAN_1_3B, device="meta", dtype=torch.float16, operations=META["operations"]), SimpleNamespace(latent_channels=16))


def content(backend="wan", **changes):
    """What the authors save, with made-up numbers."""
    shape, modules, _ = SHAPES[backend]
    numbers = torch.arange(modules, dtype=torch.float32) / modules
    return {"backend": backend, "deep_prompt_bank": {"prompts": torch.randn(shape, generator=torch.Generator().manual_seed(1)) * 0.1},
            "alphas": list(numbers.unbind()), **changes}


@pytest.mark.parametrize("backend", SHAPES)
def test_published_files_fit_their_models(tmp_path, backend):
    shape, modules, family = SHAPES[backend]
    torch.save(content(backend), tmp_path / "blur.pt")
    weights, model = load_file(tmp_path / "blur.pt"), full_size(backend)
    assert (weights.kind, weights.family, weights.name) == ("learned_prompt", family, "blur.pt")
    assert weights.tensors["prompts"].shape == shape and weights.tensors["alphas"].shape == (modules,)
    anatomy = check_fit(weights, model, NODE)
    assert default_length(anatomy) == shape[1] and new_prompt(model).tensors["prompts"].shape == shape
    paths = attention_modules(model)
    if backend == "wan":
        assert paths == [f"blocks.{index}.cross_attn" for index in range(30)]
    else:
        assert paths == [*(f"double_blocks.{index}.txt_attn.qkv" for index in range(19)), *(f"single_blocks.{index}.linear1" for index in range(38))]
    assert torch.equal(weights.tensors["alphas"], torch.arange(modules, dtype=torch.float32) / modules)
    # Saved again, it is a file of the pack.
    save_weights(weights, tmp_path / "blur.safetensors")
    again = load_file(tmp_path / "blur.safetensors")
    assert all(torch.equal(again.tensors[name], weights.tensors[name]) for name in weights.tensors) and again.family == family


@pytest.mark.parametrize(("name", "length", "modules"), [("SD1.5", 77, 16), ("SDXL", 77, 70), ("SD3 medium", 154, 24)])
def test_new_prompts_of_full_size_models(name, length, modules):
    weights = new_prompt(FULL_SIZE[name].build())
    assert weights.tensors["prompts"].shape[1] == length and len(weights.tensors["alphas"]) == modules


def test_parameters_and_other_forms_of_single_numbers_are_read():
    alphas = [torch.nn.Parameter(torch.full((1,), 0.5)) if index else torch.tensor(0.5, dtype=torch.float16) for index in range(30)]
    weights = published_weights(content(alphas=alphas), "rain.pt")
    assert torch.equal(weights.tensors["alphas"], torch.full((30,), 0.5)) and not weights.tensors["alphas"].requires_grad


def test_a_prompt_of_another_model_is_refused():
    with pytest.raises(ValueError, match="rain.pt was made for WAN 1.3B, and 'model' is FLUX of width 32"):
        check_fit(published_weights(content(), "rain.pt"), base("flux").model, NODE)


@pytest.mark.parametrize(("changes", "words"), [
    (dict(backend="sd3"), "is a learned prompt for 'sd3', and this pack knows those for flux and wan"),
    (dict(backend="flux"), r"its prompts are \(1, 226, 1536\), and numbers of shape \(1, L, 3072\) were expected"),
    (dict(deep_prompt_bank={}), "its prompts are NoneType"),
    (dict(deep_prompt_bank={"prompts": torch.zeros(1, 226, 1536, dtype=torch.int64)}), "and numbers of shape"),
    (dict(alphas=[torch.tensor(0.1)] * 29), "its alphas are 29 entries, and 30 numbers were expected"),
    (dict(alphas=torch.zeros(30)), "its alphas are Tensor"),
    (dict(alphas=[torch.zeros(2)] * 30), "its alphas are 30 entries"),
])  # fmt: skip
def test_incomplete_files_are_refused(tmp_path, changes, words):
    torch.save(content() | changes, tmp_path / "rain.pt")
    with pytest.raises(ValueError, match=f"rain.pt .*{words}"):
        load_published(tmp_path / "rain.pt")


class Evil:
    """Runs something when it is unpickled by anyone who runs what files say."""

    def __reduce__(self):
        return (open, ("evil_was_here", "w"))


def other_archive(file):
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("readme.txt", "-")


UNUSABLE = {
    "code": lambda file: torch.save({**content(), "extra": Evil()}, file),
    "pickle": lambda file: file.write_bytes(pickle.dumps(Evil(), protocol=2)),
    "empty": lambda file: file.touch(),
    "text": lambda file: file.write_text("404: not found"),
    "truncated": lambda file: (torch.save(content(), file), file.write_bytes(file.read_bytes()[:-1000])),
    "archive": other_archive,
    "state dict": lambda file: torch.save({"conv.weight": torch.zeros(2)}, file),
    "list": lambda file: torch.save([torch.zeros(2)], file),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSABLE)
def test_anything_else_is_refused_and_nothing_in_it_is_run(tmp_path, monkeypatch, kind):
    monkeypatch.chdir(tmp_path)
    UNUSABLE[kind](tmp_path / "odd.pt")
    with pytest.raises(ValueError, match="odd.pt is not a published learned prompt.*Of .pt files this pack reads no others"):
        load_file(tmp_path / "odd.pt")
    assert not (tmp_path / "evil_was_here").exists()


def test_a_missing_file_and_the_wrong_reader(tmp_path):
    with pytest.raises(ValueError, match="there is no file gone.pt"):
        load_file(tmp_path / "gone.pt")
    torch.save(content(), tmp_path / "blur.safetensors")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        load_weights(tmp_path / "blur.safetensors")
