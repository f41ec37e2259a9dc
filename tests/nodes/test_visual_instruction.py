"""The nodes of visual instructions, through the host: chart, damage, instruction, estimate, and the way from New over Train to use."""

from dataclasses import replace

import pytest
import torch

from mend.degradations.visual_ground import visual_ground
from mend.model_patches.degradation_model import TOKENIZER
from mend.model_patches.degradation_tokenizer import SIZES, fingerprint, instruction_of
from mend.tests.model_patches.degradation_models import fresh
from mend.tests.nodes.restorations import node
from mend.training.degradation_estimator import new_estimator
from mend.training.degradation_tokenizer import new_tokenizer
from mend.training.seeding import mixed

LAB = SIZES["lab"]


def charts():
    """A chart, and the same with noise and JPEG, as an artist chains them."""
    noise = {"kind": "gaussian noise", "kind.sigma": 50.0, "kind.grey_noise": False, "seed": 1}
    return {
        "chart": node("MendVisualGround", seed=5, size=LAB.chart),
        "noise": node("MendDegradeImage", image=["chart", 0], **noise),
        "jpeg": node("MendDegradeImage", image=["noise", 0], words=["noise", 1], **{"kind": "jpeg", "kind.quality": 10, "seed": 2}),
        "weights": node("TestGiven", name="weights"),
    }


def captured(**links):
    return {name: node("TestCapture", value=link) for name, link in links.items()}


@pytest.fixture(scope="module")
def given():
    return new_tokenizer({"size": "lab"})


def test_a_chart_is_drawn(run_prompt):
    values = run_prompt({"chart": node("MendVisualGround", seed=2**64 - 1), **captured(out=["chart", 0])}).values
    assert torch.equal(values["out"], visual_ground(2**64 - 1, 256))


def test_a_chain_of_damage_makes_an_instruction(run_prompt, given):
    prompt = charts() | {
        "encode": node("MendEncodeVisualInstruction", weights=["weights", 0], degraded=["jpeg", 0], clean=["chart", 0], words=["jpeg", 1]),
        "nothing": node("MendEncodeVisualInstruction", weights=["weights", 0], degraded=["chart", 0], clean=["chart", 0]),
        **captured(out=["encode", 0], zero=["nothing", 0], damaged=["jpeg", 0]),
    }
    values = run_prompt(prompt, given={"weights": given}).values
    told = values["out"]
    assert told.words == "noisy, compressed" and told.codebook == fingerprint(given)
    assert torch.equal(told.tokens, instruction_of(given, values["damaged"], visual_ground(5, LAB.chart), "", "Test").tokens) and told.tokens.any()
    assert not values["zero"].tokens.any() and values["zero"].words == ""


def test_instructions_are_blended(run_prompt, given):
    prompt = charts() | {
        "one": node("MendEncodeVisualInstruction", weights=["weights", 0], degraded=["noise", 0], clean=["chart", 0], words=["noise", 1]),
        "two": node("MendEncodeVisualInstruction", weights=["weights", 0], degraded=["jpeg", 0], clean=["chart", 0], words=["jpeg", 1]),
        "blend": node("MendBlendVisualInstructions", instruction_1=["one", 0], instruction_2=["two", 0], weight_1=0.5, weight_2=-1.0),
        **captured(a=["one", 0], b=["two", 0], out=["blend", 0]),
    }
    values = run_prompt(prompt, given={"weights": given}).values
    assert torch.equal(values["out"].tokens, 0.5 * values["a"].tokens - values["b"].tokens) and values["out"].words == "noisy, compressed"


def estimated(**changes):
    return {
        "weights": node("TestGiven", name="weights"),
        "picture": node("TestGiven", name="picture"),
        "estimate": node("MendEstimateVisualInstruction", weights=["weights", 0], image=["picture", 0], **changes),
        **captured(instruction=["estimate", 0], chart=["estimate", 1], words=["estimate", 2]),
    }


def test_an_instruction_is_estimated(run_prompt, given):
    made = new_estimator(given, 4, "Test")
    picture = torch.rand(2, 40, 150, 3, generator=torch.Generator().manual_seed(1))
    values = run_prompt(estimated(confidence=0.0), given={"weights": made, "picture": picture}).values
    told = values["instruction"]
    assert told.tokens.shape == (2, 256, LAB.width) and told.codebook == fingerprint(given)
    assert values["words"] == told.words == "hazy, rainy, dark, blurry, noisy, compressed", "everything is found at confidence 0"
    assert values["chart"].shape == (2, LAB.chart, LAB.chart, 3)
    nothing = run_prompt(estimated(confidence=1.0), given={"weights": made, "picture": picture}).values
    assert not nothing["instruction"].tokens.any() and nothing["words"] == ""
    assert torch.equal(nothing["chart"], visual_ground(4, LAB.chart).expand(2, -1, -1, -1))


def test_other_weights_are_refused(run_prompt, given):
    result = run_prompt(estimated(), given={"weights": given, "picture": torch.rand(1, 8, 8, 3)}, check=False)
    assert "Estimate Visual Instruction: a new degradation tokenizer is of the kind degradation tokenizer, and this node applies the kind " in result.error_text()


@pytest.mark.parametrize(("scale", "message"), [
    (["sea spray", "amount", [1.0, 2.0, 3.0]], "unknown degradation 'sea spray'"),
    (["blur", "depth", [1.0, 2.0, 3.0]], "has no setting 'depth'"),
    (["blur", "width", [1.0, 2.0, 99.0]], "width of the degradation 'blur' is 99.0"),
])  # fmt: skip
def test_an_estimator_of_another_version_is_refused(run_prompt, given, scale, message):
    made = new_estimator(given, 4, "Test")
    other = replace(made, config={**made.config, "scales": [scale, *made.config["scales"][1:]]})
    result = run_prompt(estimated(confidence=1.0), given={"weights": other, "picture": torch.rand(1, 8, 8, 3)}, check=False)
    assert f"Estimate Visual Instruction: {made.name} is of another version" in result.error_text() and message in result.error_text()


@pytest.mark.parametrize("changes", [{"tokenizer": None}, {"tokenizer": {"size": "huge"}}, {"codebook": None}, {"form": "sideways"}])
def test_a_degradation_model_of_another_version_is_refused(run_prompt, changes):
    model = fresh("sd15")
    model = replace(model, config={name: value for name, value in {**model.config, **changes}.items() if value is not None})
    prompt = charts() | {"encode": node("MendEncodeVisualInstruction", weights=["weights", 0], degraded=["jpeg", 0], clean=["chart", 0]),
                         **captured(out=["encode", 0])}
    text = run_prompt(prompt, given={"weights": model}, check=False).error_text()
    assert f"Encode Visual Instruction: {model.name} describes itself as" in text and "which this pack does not understand" in text


def test_a_degradation_model_without_its_tokenizer_is_refused(run_prompt):
    model = fresh("sd15")
    model = replace(model, tensors={name: tensor for name, tensor in model.tensors.items() if not name.startswith(TOKENIZER)})
    prompt = charts() | {"encode": node("MendEncodeVisualInstruction", weights=["weights", 0], degraded=["jpeg", 0], clean=["chart", 0]),
                         **captured(out=["encode", 0])}
    assert f"Encode Visual Instruction: {model.name} is incomplete" in run_prompt(prompt, given={"weights": model}, check=False).error_text()


def training(new, **settings):
    """From New over Train, on pictures in memory."""
    noise = {"kind": "gaussian noise", "kind.sigma": 50.0, "kind.grey_noise": False, "seed": 1}
    return {
        "picture": node("TestGiven", name="picture"),
        "weights": node("TestGiven", name="weights"),
        "noise": node("MendDegradeImage", image=["picture", 0], **noise),
        "pairs": node("MendPairedData", **{"source": "connected pictures", "source.images": ["picture", 0],
                                                 "degradations.degradation_0": ["noise", 2], "crop": 64, "flip": True, "held_out": 0}),
        "new": new,
        "train": node("MendTrain", weights=["new", 0], pairs=["pairs", 0], **{
            "steps": 2, "batch_size": 2, "learning_rate": 1e-3, "run_name": "instructions", "seed": 0, "accumulate": 1, "schedule": "constant",
            "warmup": 0, "weight_decay": 0.01, "clip_gradient": 1.0, "ema": 0.0, "precision": "fp32", "gradient_checkpointing": False,
            "validate_every": 2, "keep": 2, **settings}),
        **captured(out=["train", 0], page=["train", 2], fresh=["new", 0]),
    }  # fmt: skip


@pytest.mark.parametrize("kind", ["tokenizer", "estimator"])
def test_new_ones_are_trained(run_prompt, given, kind):
    new = {
        "tokenizer": node("MendNewDegradationTokenizer", size="lab", adversarial=False, seed=0),
        "estimator": node("MendNewDegradationEstimator", weights=["weights", 0], seed=0),
    }[kind]
    pictures = torch.rand(2, 64, 64, 3, generator=torch.Generator().manual_seed(mixed(0, "pictures")))
    values = run_prompt(training(new), given={"weights": given, "picture": pictures}).values
    fresh, trained = values["fresh"], values["out"]
    assert fresh.kind == trained.kind == f"degradation_{kind}" and values["page"].shape == (2, 64, 192, 3)
    assert fresh.tensors.keys() == trained.tensors.keys() and not all(torch.equal(fresh.tensors[name], trained.tensors[name]) for name in fresh.tensors)
