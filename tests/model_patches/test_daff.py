"""What a fresh degradation-aware feature fusion lets its last layer see of the degraded picture."""

import pytest
import torch
import torch.nn.functional as F

from mend.model_patches.anatomy import anatomy_of
from mend.model_patches.daff import DAFF, initialise, layout_of
from mend.model_patches.host import trained_operations
from mend.tests.model_patches.adapters import base
from mend.tests.model_patches.fusions import FEATURES

layouts = pytest.mark.parametrize("settings", [("lite", True), ("published", True), ("lite", False)], ids=str)


def made(settings):
    daff = DAFF(layout_of(anatomy_of(base("sdxl").model), settings[0], FEATURES, settings[1]), trained_operations)
    initialise(daff, torch.Generator().manual_seed(0))
    return daff


def drawn(*shape, seed=1):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def before_the_last(daff, e):
    caught = []
    handle = daff.zero.register_forward_pre_hook(lambda _, args: caught.append(args[0]))
    daff(drawn(1, daff.layout.channels, 8, 8), e, torch.tensor([700.0]), {})
    handle.remove()
    return caught[0]


@layouts
@torch.no_grad()
def test_the_picture_passes_all_layers_nearly_as_it_came(settings):
    daff = made(settings)
    e = drawn(1, daff.layout.embedding, 8, 8)
    pedestal = daff.lq_in.bias
    came, seen = daff.lq_in(e).flatten(2).transpose(1, 2) - pedestal, before_the_last(daff, e)
    correlation = torch.corrcoef(torch.stack([came.flatten(), seen.flatten()]))[0, 1]
    assert correlation > 0.95


@layouts
@torch.no_grad()
def test_each_token_sees_its_own_cells_alone(settings):
    daff = made(settings)
    e = drawn(1, daff.layout.embedding, 8, 8)
    other = e.clone()
    other[..., 2, 4] += 1
    patch = daff.layout.patch
    changed = (before_the_last(daff, e) != before_the_last(daff, other)).any(-1).reshape(8 // patch, 8 // patch)
    assert changed.nonzero().tolist() == [[2 // patch, 4 // patch]]


@layouts
@torch.no_grad()
def test_the_condition_embedding_is_linear_past_its_norm(settings):
    embedding = made(settings).embedding

    def past_the_norm(x):
        return embedding.out(F.silu(embedding.conv(x)))

    a, b = drawn(1, FEATURES, 6, 6), drawn(1, FEATURES, 6, 6, seed=2)
    torch.testing.assert_close(past_the_norm(a) + past_the_norm(b), past_the_norm(a + b), rtol=0, atol=1e-5)
    assert 0.5 < past_the_norm(a).std() < 1.5
