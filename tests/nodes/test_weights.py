"""MendLoadWeights and MendSaveWeights through the host: what was saved comes back, and nothing is overwritten or taken for something else."""

import pickle
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import folder_paths
from mend.model_patches import folders
from mend.model_patches.robust_encoder import ENCODER, encoder_tensors
from mend.model_patches.weights_file import Weights, load_weights, save_weights
from mend.nodes.weights import LoadWeights
from mend.tests import tiny_models
from mend.tests.model_patches.adapters import trained
from mend.tests.nodes.patch_prompts import adapted, node
from mend.tests.nodes.restorations import latent, picture
from mend.tests.nodes.test_zero_shot import failure

FULL = "full (fp32)"


@pytest.fixture
def unregistered(monkeypatch, host_nodes):
    """The host as it is before the pack has made its folder known."""
    known = {key: paths for key, paths in folder_paths.folder_names_and_paths.items() if key != folders.MEND}
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", known)


@pytest.fixture
def models(base_folder, monkeypatch, unregistered):
    """models/mend, empty before and after, and an empty folder in place of the weights that come with the pack."""
    folder, lab = base_folder / "models" / "mend", base_folder / "lab" / "trained"
    monkeypatch.setattr(folders, "TRAINED", lab)
    folders.register()
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    lab.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)
    shutil.rmtree(lab)
    folder_paths.filename_list_cache.pop(folders.MEND, None)  # the host would look for the folders again


def save(run_prompt, weights, prefix="restoration", precision="half (fp16)"):
    """Save given weights and return what the node shows."""
    prompt = {"weights": node("TestGiven", name="weights"),
              "save": node("MendSaveWeights", weights=["weights", 0], filename_prefix=prefix, precision=precision)}
    run_prompt.executor.reset()
    return run_prompt(prompt, given={"weights": weights}).outputs["save"]["text"][0]


def load(run_prompt, name):
    """Load a file as the node does."""
    return run_prompt(loading(name)).values["out"]


def loading(name):
    return {"load": node("MendLoadWeights", file=name), "out": node("TestCapture", value=["load", 0])}


def files(models):
    return sorted(file.relative_to(models).as_posix() for file in models.rglob("*") if file.is_file())


def options():
    return next(entry for entry in LoadWeights.define_schema().inputs if entry.id == "file").options


def listed():
    folder_paths.filename_list_cache.pop(folders.MEND, None)
    return [Path(name).as_posix() for name in options()]


def same(a, b):
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


# Saving


@pytest.mark.parametrize("family", tiny_models.FAMILIES)
def test_full_precision_comes_back_bit_for_bit(run_prompt, models, family):
    weights = trained(family)
    shown = save(run_prompt, weights, precision=FULL)
    assert shown == "models/mend/restoration_adapter/restoration_00001_.safetensors"
    assert files(models) == ["restoration_adapter/restoration_00001_.safetensors"] and listed() == files(models)
    found = load(run_prompt, files(models)[0])
    assert (found.kind, found.family, found.config) == (weights.kind, weights.family, weights.config)
    assert found.name == "restoration_00001_.safetensors" and same(found.tensors, weights.tensors)


@pytest.mark.parametrize(("precision", "dtype"), [("half (fp16)", torch.float16), ("half (bf16)", torch.bfloat16)])
def test_half_precision_is_half_the_size(run_prompt, models, precision, dtype):
    weights = trained("sd15")
    save(run_prompt, weights, "full", FULL)
    save(run_prompt, weights, "half", precision)
    full, half = ((models / "restoration_adapter" / f"{name}_00001_.safetensors").stat().st_size for name in ("full", "half"))
    assert half < 0.52 * full
    found = load(run_prompt, "restoration_adapter/half_00001_.safetensors").tensors
    for name, tensor in weights.tensors.items():
        assert torch.equal(found[name], tensor.to(dtype) if tensor.ndim else tensor), "scales stay exact"
    assert weights.tensors["adapter.stem.weight"].dtype == torch.float32, "what is saved is not changed"


@pytest.mark.parametrize("family", ["sd15", "flux"])
def test_a_loaded_adapter_acts_as_the_one_that_was_saved(run_prompt, models, family):
    weights, given = trained(family), {"picture": picture(1, 64, 64, 3), "lq": None}
    save(run_prompt, weights, precision=FULL)
    save(run_prompt, weights, "half")
    expected = latent(run_prompt(adapted(family, ("weights", 0)), given={**given, "weights": weights}))
    found = {}
    for name in ("restoration", "half"):
        prompt = adapted(family, ("load", 0)) | {"load": node("MendLoadWeights", file=f"restoration_adapter/{name}_00001_.safetensors")}
        found[name] = latent(run_prompt(prompt, given={**given, "weights": None}))
    assert torch.equal(found["restoration"], expected)
    # Weights rounded to eleven bits, through two evaluations of the model.
    assert 0 < (found["half"] - expected).abs().max() < 1e-2 * expected.abs().max()


def test_a_robust_encoder_travels_along(run_prompt, models):
    weights = trained("sd15")
    encoder = {name: t * 1.1 for name, t in encoder_tensors(tiny_models.vae()).items()}
    both = Weights(weights.kind, weights.family, weights.config, weights.tensors | encoder)
    save(run_prompt, both, precision=FULL)
    found = load(run_prompt, "restoration_adapter/restoration_00001_.safetensors")
    assert same({name: t for name, t in found.tensors.items() if name.startswith(ENCODER)}, encoder)


def test_nothing_is_overwritten(run_prompt, models):
    first, second = trained("sd15", seed=5), trained("sd15", seed=6)
    for weights in (first, second, first):
        save(run_prompt, weights, precision=FULL)
    names = [f"restoration_adapter/restoration_0000{number}_.safetensors" for number in (1, 2, 3)]
    assert files(models) == names
    assert [same(load_weights(models / name).tensors, first.tensors) for name in names] == [True, False, True]
    (models / names[1]).unlink()
    save(run_prompt, second, precision=FULL)
    assert files(models) == [names[0], names[2], names[2].replace("3", "4")], "a number is not used again below one that exists"


@pytest.mark.parametrize(("prefix", "name"), [
    ("faces/old", "restoration_adapter/faces/old_00001_.safetensors"), ("a/b/c", "restoration_adapter/a/b/c_00001_.safetensors"),
    ("", "restoration_adapter/weights_00001_.safetensors"),
    ("my portraits v1.5", "restoration_adapter/my portraits v1.5_00001_.safetensors"),
    ("a/../b", "restoration_adapter/b_00001_.safetensors"),
])  # fmt: skip
def test_prefixes(run_prompt, models, prefix, name):
    assert save(run_prompt, trained("sd15"), prefix) == f"models/mend/{name}"
    assert files(models) == [name] and load(run_prompt, name).kind == "restoration_adapter"


def refused(run_prompt, prefix, weights=None):
    prompt = {"weights": node("TestGiven", name="weights"),
              "save": node("MendSaveWeights", weights=["weights", 0], filename_prefix=prefix, precision=FULL)}
    return failure(run_prompt, prompt, {"weights": weights or trained("sd15")})


@pytest.mark.parametrize("prefix", ["../out", "a/../../out", "/tmp/out", "../restoration_adapter_other/out"])
def test_a_prefix_that_leads_out_is_refused(run_prompt, models, prefix):
    before = set(models.parent.rglob("*"))
    message = refused(run_prompt, prefix)
    assert f"Save Mend Weights: filename_prefix {prefix!r} leads out of models/mend. Use a name, or folders below it." in message
    assert set(models.parent.rglob("*")) == before


@pytest.mark.parametrize("in_the_way", ["restoration_adapter", "restoration_adapter/faces"])
def test_a_folder_that_cannot_be_written_is_named(run_prompt, models, in_the_way):
    file = models / in_the_way
    file.parent.mkdir(exist_ok=True)
    file.write_text("a file where a folder should be")
    message = refused(run_prompt, "faces/old")
    assert f"Save Mend Weights: {models / 'restoration_adapter' / 'faces' / 'old'} cannot be written: " in message
    assert "Free some space or choose another filename_prefix." in message and file.read_text().startswith("a file")


def test_a_full_disk_is_named_and_leaves_nothing(run_prompt, models):
    resource = pytest.importorskip("resource", reason="only where a process can limit the size of its files")
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 15, hard))
    try:
        message = refused(run_prompt, "large")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert f"Save Mend Weights: {models / 'restoration_adapter' / 'large_00001_.safetensors'} cannot be written: " in message
    assert not files(models)


# Loading


def test_what_is_listed(models):
    weights = trained("sd15", rank=0)
    for name in ("a.safetensors", "restoration_adapter/b.safetensors", "captioner/tiny/model.safetensors", "captioner2.safetensors"):
        save_weights(weights, models / name)
    (models / "notes.txt").write_text("-")
    shutil.copy(models / "a.safetensors", models / "a.ckpt")
    save_weights(weights, folders.TRAINED / "lab" / "denoise_unet.safetensors")
    assert listed() == ["a.safetensors", "captioner2.safetensors", "lab/denoise_unet.safetensors", "restoration_adapter/b.safetensors"]


def test_weights_that_come_with_the_pack_load(run_prompt, models):
    weights = trained("sd15", rank=0)
    save_weights(weights, folders.TRAINED / "lab" / "denoise_unet.safetensors")
    assert listed() == ["lab/denoise_unet.safetensors"]
    assert same(load(run_prompt, "lab/denoise_unet.safetensors").tensors, weights.tensors)


def test_nothing_is_listed_before_the_folder_is_known(unregistered):
    assert folders.weights_files() == []


def test_the_same_file_is_loaded_once_and_again_when_it_changes(run_prompt, models):
    file = models / "restoration_adapter" / "a.safetensors"
    save_weights(trained("sd15", seed=5), file)
    first = run_prompt(loading("restoration_adapter/a.safetensors"))
    again = run_prompt({**loading("restoration_adapter/a.safetensors"), "more": node("TestCapture", value=["load", 0])})
    assert "load" in again.cached and again.values["more"] is first.values["out"]
    file.unlink()
    save_weights(trained("sd15", seed=6), file)
    changed = run_prompt(loading("restoration_adapter/a.safetensors"))
    assert "load" not in changed.cached and not same(changed.values["out"].tensors, first.values["out"].tensors)


def truncated(file):
    save_weights(trained("sd15", rank=0), file)
    file.write_bytes(file.read_bytes()[:-100])


NEWER = {"mend.kind": "k", "mend.version": "2", "mend.family": "f", "mend.config": "{}"}
UNUSABLE = {
    "truncated": (truncated, "is not a safetensors file, or only a part of one"),
    "pickle": (lambda file: file.write_bytes(pickle.dumps({"a": list(range(100))})), "is not a safetensors file, or only a part of one"),
    "empty": (lambda file: file.touch(), "is not a safetensors file, or only a part of one"),
    "foreign": (lambda file: save_file({"a": torch.zeros(2)}, file), "was not made by this pack: its metadata lacks mend.kind"),
    "newer": (lambda file: save_file({"a": torch.zeros(2)}, file, NEWER),
              "has version 2 of the file format, and this pack reads 1. Update the pack."),
}  # fmt: skip


@pytest.mark.parametrize("kind", UNUSABLE)
def test_unusable_files_are_refused_by_name(run_prompt, models, kind):
    make, message = UNUSABLE[kind]
    make(models / "odd.safetensors")
    found = failure(run_prompt, loading("odd.safetensors"), {})
    assert f"Load Mend Weights: odd.safetensors {message}" in found


def test_a_missing_file_is_refused(run_prompt, models):
    message = failure(run_prompt, loading("gone.safetensors"), {})
    assert "MendLoadWeights" in message and "Value not in list" in message
    with pytest.raises(ValueError, match="Load Mend Weights: there is no file gone.safetensors. Put it into models/mend"):
        LoadWeights.execute("gone.safetensors")
    assert LoadWeights.fingerprint_inputs("gone.safetensors") == ""
