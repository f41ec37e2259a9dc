"""MendDescribeDegradedImage, on a captioner of 0.1 M random parameters that is built and saved here."""

import gc
import json
import shutil

import pytest
import torch

import comfy.model_management
import folder_paths
from mend.model_patches import captioner, folders
from mend.nodes import caption
from mend.nodes.caption import INSTRUCTION, DescribeDegradedImage

WORDS = "a the red green blue cat dog house left right upright of in low quality picture . , USER ASSISTANT ( ) \" say what it shows".split()
TEMPLATE = (
    "{% for m in messages %}USER {% for c in m['content'] %}{% if c['type'] == 'image' %}<image>{% else %} {{ c['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT{% endif %}"
)


def tiny_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: index for index, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", "<image>", *WORDS])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>", additional_special_tokens=["<image>"]
    )


def tiny_model(tokenizer):
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    vision = CLIPVisionConfig(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, image_size=28, patch_size=14)
    text = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2, num_key_value_heads=2,
        pad_token_id=0, bos_token_id=1, eos_token_id=2, max_position_embeddings=512, tie_word_embeddings=True,
    )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=tokenizer.convert_tokens_to_ids("<image>"))
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.copy_(torch.randn_like(parameter) * 0.4)
    return model


@pytest.fixture(scope="session")
def saved_captioner(tmp_path_factory):
    """A folder as an artist would download it."""
    from transformers import CLIPImageProcessor, LlavaProcessor

    folder = tmp_path_factory.mktemp("captioner") / "tiny-llava"
    tokenizer = tiny_tokenizer()
    images = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    LlavaProcessor(images, tokenizer, patch_size=14, vision_feature_select_strategy="default", num_additional_image_tokens=1, chat_template=TEMPLATE).save_pretrained(folder)
    tiny_model(tokenizer).save_pretrained(folder)
    assert (folder / "model.safetensors").is_file()
    return folder


@pytest.fixture
def models(base_folder, monkeypatch):
    """The folder for captioners, empty before and after; no other pack's folders."""
    monkeypatch.setattr(folder_paths, "folder_names_and_paths", dict(folder_paths.folder_names_and_paths))
    for key in (folders.MEND, *folders.SHARED_CAPTIONER_KEYS):
        folder_paths.folder_names_and_paths.pop(key, None)
    folders.register()
    folder = base_folder / "models" / "mend" / "captioner"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    yield folder
    shutil.rmtree(folder)


@pytest.fixture
def installed(models, saved_captioner):
    """The tiny captioner where the node looks for it."""
    shutil.copytree(saved_captioner, models / "tiny-llava")
    return models / "tiny-llava"


def picture(seed=0, channels=3, batch=1):
    return torch.rand(batch, 40, 56, channels, generator=torch.Generator().manual_seed(seed))


def describe(image, name="tiny-llava", instruction=INSTRUCTION, tokens=12):
    return DescribeDegradedImage.execute(image, name, instruction, tokens).result[0]


def options():
    return next(entry for entry in DescribeDegradedImage.define_schema().inputs if entry.id == "captioner").options


def test_describes_through_the_host(run_prompt, installed):
    image = picture(batch=2)
    prompt = {
        "1": {"class_type": "TestGiven", "inputs": {"name": "image"}},
        "2": {
            "class_type": "MendDescribeDegradedImage",
            "inputs": {"image": ["1", 0], "captioner": "tiny-llava", "instruction": INSTRUCTION, "max_new_tokens": 12},
        },
        "3": {"class_type": "TestCapture", "inputs": {"value": ["2", 0]}},
    }
    result = run_prompt(prompt, given={"image": image})
    text = result.values["3"]
    assert set(text.replace(",", " ").replace(".", " ").split()) <= set(WORDS) and text == captioner.one_line(text)
    assert [data["value"] for data in result.of("progress")][-1] == 12
    assert text == describe(image[:1])


def test_picture_and_instruction_matter(installed):
    texts = {describe(picture(seed)) for seed in range(4)} | {describe(picture(), instruction="say what it shows")}
    assert len(texts) >= 3


def test_model_sees_picture_and_instruction(installed, monkeypatch):
    seen = []
    monkeypatch.setattr(captioner, "_generate", lambda model, inputs, *_: seen.append(inputs) or inputs["input_ids"][:, -1:])
    assert describe(picture(channels=4), instruction="red cat") == "ASSISTANT"
    tokens = captioner.load(installed, torch.float32)[0].tokenizer.convert_ids_to_tokens(seen[0]["input_ids"][0])
    assert tokens == ["USER", *["<image>"] * 4, "red", "cat", "ASSISTANT"]
    assert seen[0]["pixel_values"].shape == (1, 3, 28, 28)


@pytest.mark.parametrize("channels", [1, 3, 4])
@pytest.mark.parametrize("size", [(1, 1), (7, 513)])
def test_any_picture(installed, channels, size):
    assert isinstance(describe(torch.rand(1, *size, channels), tokens=2), str)


def test_nothing_is_left_in_memory(installed, monkeypatch):
    made = []
    monkeypatch.setattr(captioner, "_Holder", lambda model, make=captioner._Holder: made.append(make(model)) or made[-1])
    gc.disable()  # the host warns of a leak where only a collection frees a model
    try:
        describe(picture())
        assert made.pop() in [loaded.real_model() for loaded in comfy.model_management.current_loaded_models]
        assert "_Holder" not in [type(loaded.real_model()).__name__ for loaded in comfy.model_management.current_loaded_models]
    finally:
        gc.enable()


def test_cancel_stops_between_tokens(installed, monkeypatch):
    calls = []

    def interrupt():
        calls.append(1)
        if len(calls) == 3:
            raise comfy.model_management.InterruptProcessingException

    monkeypatch.setattr(captioner.host, "interrupt_point", interrupt)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        describe(picture(), tokens=50)


def test_lists_own_and_shared_folders(models, saved_captioner, tmp_path):
    assert options() == [caption.NONE_FOUND]
    (models / "no-weights").mkdir()
    (models / "no-weights" / "config.json").write_text("{}")
    shutil.copytree(saved_captioner, tmp_path / "shared" / "b-model")
    shutil.copytree(saved_captioner, models / "C-model")
    folder_paths.folder_names_and_paths["LLM"] = ([str(tmp_path / "shared"), str(tmp_path / "missing")], set())
    assert options() == ["b-model", "C-model"]


def test_missing_captioner_is_explained(models):
    with pytest.raises(ValueError, match="Describe Degraded Image: captioner 'none found.*models/mend/captioner .* Generate Text"):
        describe(picture(), name=caption.NONE_FOUND)


def test_pickled_weights_are_refused(installed):
    (installed / "model.safetensors").unlink()
    (installed / "pytorch_model.bin").write_bytes(b"not opened")
    assert options() == ["tiny-llava"]
    with pytest.raises(ValueError, match="Describe Degraded Image: captioner 'tiny-llava' has no .safetensors weights, only pytorch_model.bin"):
        describe(picture())


def test_code_in_the_folder_is_not_run(installed):
    config = json.loads((installed / "config.json").read_text())
    config.update(model_type="invented", auto_map={"AutoConfig": "code.Config", "AutoModelForImageTextToText": "code.Model"})
    (installed / "config.json").write_text(json.dumps(config))
    (installed / "code.py").write_text("raise SystemExit('ran')")
    with pytest.raises(ValueError, match="Describe Degraded Image: captioner 'tiny-llava' cannot be loaded"):
        describe(picture())


@pytest.mark.parametrize("damage", ["weights", "config", "tokenizer"])
def test_broken_folders_are_refused(installed, damage):
    if damage == "weights":
        (installed / "model.safetensors").write_bytes(b"broken")
    elif damage == "config":
        (installed / "config.json").write_text('{"model_type": "llama"}')
    else:
        (installed / "tokenizer.json").unlink()
    with pytest.raises(ValueError, match="Describe Degraded Image: captioner 'tiny-llava' cannot"):
        describe(picture())


def test_out_of_memory_is_explained(installed, monkeypatch):
    def full(*_):
        raise torch.OutOfMemoryError("full")

    monkeypatch.setattr(captioner, "_generate", full)
    with pytest.raises(ValueError, match="Describe Degraded Image: not enough memory for the captioner 'tiny-llava'"):
        describe(picture())


@pytest.mark.parametrize(
    ("image", "message"),
    [(torch.zeros(0, 8, 8, 3), "'image' holds no pixels"), (torch.full((1, 8, 8, 3), float("nan")), "'image' has NaN")],
)
def test_unusable_pictures_are_refused(installed, image, message):
    with pytest.raises(ValueError, match=f"Describe Degraded Image: {message}"):
        describe(image)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        (' "A red cat,\n facing left." ', "A red cat, facing left."),
        ("<think>hm\n(so)</think>\n**A house** (white)", "A house white"),
        ("<think>cut off", ""),
    ],
)
def test_one_line(raw, clean):
    assert captioner.one_line(raw) == clean


def test_folder_of_extra_model_paths_comes_first(models, tmp_path):
    folder_paths.folder_names_and_paths.pop(folders.MEND)
    folder_paths.add_model_folder_path(folders.MEND, str(tmp_path))
    folders.register()
    folders.register()
    paths, extensions = folder_paths.folder_names_and_paths[folders.MEND]
    assert paths == [str(tmp_path), str(models.parent), str(folders.TRAINED)] and extensions == {".safetensors", ".pt"}
