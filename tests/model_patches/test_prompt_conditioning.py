"""The plain form of learned prompts: an embedding in place of the text, on every family."""

import pytest
import torch

from mend.dev.bench.full_size import FULL_SIZE
from mend.model_patches.host import batched_conds, evaluate, for_training, loaded_for_training, model_conds
from mend.model_patches.host_gradients import gradients, unshared_norm_inputs
from mend.model_patches.prompt_conditioning import (
    PromptConditioning,
    check_fit,
    conditioning_of,
    context_width,
    new_conditioning,
    pooled_width,
)
from mend.model_patches.weights_file import Weights
from mend.tests.model_patches.adapters import sampled
from mend.tests.model_patches.learned_prompts import EVERY, base
from mend.tests.tiny_models import conditioning, latent_shape, model

NODE = "Learned Prompt Conditioning"
every_family = pytest.mark.parametrize("family", EVERY)


@every_family
def test_an_embedding_that_starts_from_a_text_says_what_the_text_says(family):
    text = conditioning(family)
    text[0][1].update({"guidance": 1.0} if family == "flux" else {})
    weights = new_conditioning(base(family).model, start=text)
    check_fit(weights, base(family).model, NODE)
    told = conditioning_of(PromptConditioning.of(weights))
    assert torch.equal(sampled(base(family), family, cfg=1.0, positive=told), sampled(base(family), family, cfg=1.0, positive=text))
    other = conditioning_of(PromptConditioning.of(new_conditioning(base(family).model, seed=3)))
    assert sampled(base(family), family, cfg=1.0, positive=other).isfinite().all()


@every_family
def test_gradients_reach_the_tokens(family):
    own = model(family, 3)
    prompt = PromptConditioning.of(new_conditioning(own.model, length=8), trained=True)
    patched, x = for_training(own), torch.randn(latent_shape(family, 2), generator=torch.Generator().manual_seed(1))
    with gradients(), unshared_norm_inputs(own.model.diffusion_model):
        loaded_for_training(patched)
        rows = [model_conds(own.model, conditioning_of(prompt), x[:1])] * 2
        loss = evaluate(patched, x, torch.tensor([0.4, 0.5]), batched_conds(rows)).square().sum()
        found, = torch.autograd.grad(loss, list(prompt.parameters()))
    assert found.shape == prompt.tokens.shape and bool((found != 0).any(-1).all()), "every token learns"


@pytest.mark.parametrize(("name", "width", "pooled", "length"), [
    ("SD1.5", 768, 0, 77), ("SDXL", 2048, 1280, 77), ("SD3 medium", 4096, 2048, 154), ("FLUX.1", 4096, 768, 512),
])  # fmt: skip
def test_widths_of_full_size_models(name, width, pooled, length):
    full = FULL_SIZE[name].build()
    assert (context_width(full), pooled_width(full)) == (width, pooled)
    assert new_conditioning(full).tensors["tokens"].shape == (1, length, width)


def test_windows_of_unets():
    full = FULL_SIZE["SD1.5"].build()
    assert new_conditioning(full, 154).tensors["tokens"].shape == (1, 154, 768)
    with pytest.raises(ValueError, match="takes texts in windows of 77 tokens, and the length is 80"):
        new_conditioning(full, 80)
    start = [[torch.randn(1, 77, 768), {}]]
    assert torch.equal(new_conditioning(full, 154, start=start).tensors["tokens"], start[0][0].repeat(1, 2, 1))
    with pytest.raises(ValueError, match="has width 1024, and SD1.5 takes 768"):
        new_conditioning(full, start=[[torch.randn(1, 77, 1024), {}]])


def changed(**changes):
    weights = new_conditioning(base("flux").model)
    return Weights(**{"kind": weights.kind, "family": weights.family, "config": weights.config, "tensors": weights.tensors, "name": "words", **changes})


@pytest.mark.parametrize(("changes", "words"), [
    (dict(kind="learned_prompt"), "is of the kind learned prompt, and this node applies the kind learned prompt conditioning"),
    (dict(family="SDXL"), "was made for SDXL, and 'model' is FLUX of width 32"),
    (dict(tensors={"tokens": torch.zeros(1, 7, 64), "pooled": torch.zeros(1, 24)}), "of widths 64 and 24, and 'model' .* takes 48 and 24"),
    (dict(tensors={"tokens": torch.zeros(1, 7, 48)}), "of widths 48 and 0"),
    (dict(tensors={"prompts": torch.zeros(1, 7, 48)}), "and tokens of shape"),
    (dict(tensors={"tokens": torch.zeros(1, 0, 48), "pooled": torch.zeros(1, 24)}), "and tokens of shape"),
    (dict(tensors={"tokens": torch.zeros(1, 7, 48), "pooled": torch.zeros(24)}), "and tokens of shape"),
    (dict(tensors={"tokens": torch.full((1, 7, 48), float("nan"))}), "holds numbers that are not finite"),
])  # fmt: skip
def test_embeddings_that_do_not_fit(changes, words):
    with pytest.raises(ValueError, match=f"{NODE}: words .*{words}"):
        check_fit(changed(**changes), base("flux").model, NODE)
