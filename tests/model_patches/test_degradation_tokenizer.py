"""Visual instructions: zero for equal charts, bound to their tokenizer, of charts of any size."""

import pytest
import torch

from mend.model_patches import degradation_tokenizer as own
from mend.model_patches.degradation_tokenizer import Instruction, blended, check_codebook, check_fit, fingerprint, for_use, instruction_of
from mend.model_patches.weights_file import Weights, load_weights, save_weights
from mend.tests.training.tiny_tokenizer import TINY, charts, tokenizer


@pytest.fixture
def weights(monkeypatch):
    return tokenizer(monkeypatch)


def with_tensors(weights, **changes):
    return Weights(weights.kind, weights.family, weights.config, {**weights.tensors, **changes}, weights.name)


def test_equal_charts_say_nothing(weights):
    clean, degraded = charts(2)
    assert not instruction_of(weights, clean, clean, "", "Test").tokens.any()
    told = instruction_of(weights, degraded, clean, "noisy", "Test")
    assert told.tokens.shape == (2, 16, TINY.width) and told.tokens.any() and told.words == "noisy" and told.codebook == fingerprint(weights)


def test_tokens_are_differences_of_codes(weights):
    clean, degraded = charts(1)
    encoder = own.encoder_patcher(weights).model
    tokens = [encoder(chart.movedim(-1, 1)) for chart in (degraded, clean)]
    assert torch.equal(instruction_of(weights, degraded, clean, "", "Test").tokens, tokens[0] - tokens[1])
    codes = encoder.codebook(tokens[0]) * TINY.width**0.5
    assert (tokens[0][0][:, None] == codes).all(-1).any(-1).all()
    assert float(tokens[0].detach().square().mean()) == pytest.approx(1, rel=1e-4)


@pytest.mark.parametrize("side", [32, 33, 80, 5])
def test_square_charts_of_any_size(weights, side):
    pictures = torch.rand(2, side, side, 3, generator=torch.Generator().manual_seed(1))
    tokens = instruction_of(weights, pictures[:1], pictures[1:], "", "Test").tokens
    assert tokens.shape == (1, (-(-side // 8)) ** 2, TINY.width)


@pytest.mark.parametrize("size", [(32, 64), (64, 32)], ids=str)
def test_charts_that_are_not_square_are_refused(weights, size):
    with pytest.raises(ValueError, match=f"Test: the charts on 'degraded' and 'clean' are {size[1]} x {size[0]} pixels, and a chart has to be square"):
        instruction_of(weights, torch.rand(1, *size, 3), torch.rand(1, *size, 3), "", "Test")


def test_a_row_of_a_batch_is_what_it_is_alone(weights):
    clean, degraded = charts(3)
    together = instruction_of(weights, degraded, clean, "", "Test").tokens
    assert torch.equal(together[1:2], instruction_of(weights, degraded[1:2], clean[1:2], "", "Test").tokens)
    one_clean = instruction_of(weights, degraded, clean[:1], "", "Test").tokens
    assert torch.equal(one_clean[:1], together[:1]) and one_clean.shape == together.shape


def test_charts_that_do_not_go_together_are_refused(weights):
    with pytest.raises(ValueError, match="Test: 'degraded' holds 1 of 64 x 32 pixels, and 'clean' 1 of 32 x 32 pixels. Connect the same chart"):
        instruction_of(weights, torch.rand(1, 32, 64, 3), torch.rand(1, 32, 32, 3), "", "Test")
    with pytest.raises(ValueError, match="Test: 'degraded' holds 1 of 32 x 32 pixels, and 'clean' 2 of"):
        instruction_of(weights, torch.rand(1, 32, 32, 3), torch.rand(2, 32, 32, 3), "", "Test")
    with pytest.raises(ValueError, match="Test: 'degraded' has NaN"):
        instruction_of(weights, torch.full((1, 32, 32, 3), torch.nan), torch.rand(1, 32, 32, 3), "", "Test")


def test_what_tokens_are_made_of_decides_the_fingerprint(weights, tmp_path):
    half = Weights(weights.kind, weights.family, weights.config, {name: tensor.half() for name, tensor in weights.tensors.items()})
    save_weights(half, tmp_path / "half.safetensors")
    loaded = load_weights(tmp_path / "half.safetensors")
    clean, degraded = charts(1)
    assert fingerprint(loaded) == fingerprint(weights) == fingerprint(for_use(weights))
    assert torch.equal(*(instruction_of(each, degraded, clean, "", "Test").tokens for each in (loaded, weights)))
    assert not any(name.startswith((own.DECODER, own.DISCRIMINATOR)) for name in for_use(weights).tensors)
    codes = weights.tensors["encoder.codes"]
    assert fingerprint(with_tensors(weights, **{"encoder.codes": codes + 0.01})) != fingerprint(weights)
    assert fingerprint(with_tensors(weights, **{"decoder.stem.bias": torch.ones(16)})) == fingerprint(weights)


def test_instructions_of_another_codebook_are_refused(weights, monkeypatch):
    clean, degraded = charts(1)
    told, other = (instruction_of(each, degraded, clean, "", "Test") for each in (weights, tokenizer(monkeypatch, seed=1)))
    check_codebook(told, fingerprint(weights), "Test")
    with pytest.raises(ValueError, match=r"Test: the visual instruction was made with another tokenizer \(codebook \w{8}, expected \w{8}\)"):
        check_codebook(other, fingerprint(weights), "Test")
    with pytest.raises(ValueError, match="Test: the visual instruction was made with another tokenizer"):
        blended([(told, 1.0), (other, 1.0)], "Test")


def test_a_blend_is_a_weighted_sum():
    one, two = (Instruction(torch.full((batch, 4, 2), value), "a", words) for batch, value, words in ((1, 1.0, "dark, noisy"), (2, 3.0, "noisy, hazy")))
    both = blended([(one, 0.5), (two, 2.0)], "Test")
    assert torch.equal(both.tokens, torch.full((2, 4, 2), 6.5)) and both.words == "dark, noisy, hazy" and both.codebook == "a"
    assert blended([(one, 1.0), (two, 0.0)], "Test").words == "dark, noisy"
    with pytest.raises(ValueError, match="Test: the instructions have 4 and 9 tokens"):
        blended([(one, 1.0), (Instruction(torch.zeros(1, 9, 2), "a"), 1.0)], "Test")
    with pytest.raises(ValueError, match="Test: the instructions are for 2 and 3 pictures"):
        blended([(two, 1.0), (Instruction(torch.zeros(3, 4, 2), "a"), 1.0)], "Test")


def test_incomplete_files_are_refused(weights):
    check_fit(for_use(weights), "Test")
    with pytest.raises(ValueError, match="Train: .* is incomplete: decoder.stem.weight is missing, expected 16x16x1x1"):
        check_fit(for_use(weights), "Train", training=True)
    with pytest.raises(ValueError, match="Test: .* is incomplete: encoder.codes is 3x16, expected 32x16"):
        check_fit(with_tensors(weights, **{"encoder.codes": torch.zeros(3, 16)}), "Test")
    with pytest.raises(ValueError, match="Test: .* describes itself as {'size': 'huge'}"):
        check_fit(Weights(own.KIND, "any", {"size": "huge"}, {}), "Test")
    for changes in ({"size": ["lab"]}, {"size": {}}, {"adversarial": 1}, {"adversarial": True, "critic_start": None}):
        with pytest.raises(ValueError, match="Test: .* describes itself as"):
            check_fit(Weights(own.KIND, "any", {**weights.config, **changes}, weights.tensors), "Test")
    with pytest.raises(ValueError, match="Test: .* is of the kind restoration adapter, and this node applies the kind degradation tokenizer"):
        check_fit(Weights("restoration_adapter", "any", {}, {}), "Test")


def test_published_sizes():
    """16 x 16 tokens of a chart; the lab's fits beside its other weights in a repository."""
    for name, size in own.SIZES.items():
        assert size.chart // size.cell == 16, name
    with torch.device("meta"):
        network = own.TokenizerNetwork(own.SIZES["lab"], True, torch.nn)
    assert sum(p.numel() for p in network.parameters()) * 2 < 3e6
