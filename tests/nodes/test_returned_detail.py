"""MendReturnDetail through the host's executor, with the VAEs of all families."""

import pytest
import torch

from mend.tests import tiny_models
from mend.tests.nodes.restorations import picture


def prompt(family="sd15", **inputs):
    """The node on two given pictures, with a family's tiny VAE."""
    return {
        "tiny": {"class_type": "TestTinyModel", "inputs": {"family": family}},
        "restored": {"class_type": "TestGiven", "inputs": {"name": "restored"}},
        "start": {"class_type": "TestGiven", "inputs": {"name": "start"}},
        "node": {"class_type": "MendReturnDetail", "inputs": {
            "restored": ["restored", 0], "start": ["start", 0], "vae": ["tiny", 3], "strength": 1.0, "grain": 0.0, **inputs,
        }},
        "out": {"class_type": "TestCapture", "inputs": {"value": ["node", 0]}},
    }  # fmt: skip


def detailed(run_prompt, restored, start, family="sd15", **inputs):
    return run_prompt(prompt(family, **inputs), given={"restored": restored, "start": start}).values["out"]


@pytest.mark.parametrize("family", [family for family in tiny_models.FAMILIES if family != "wan"])
def test_detail_comes_back_whatever_the_vae(run_prompt, family):
    restored, start = picture(2, 33, 50, 3), picture(2, 33, 50, 3, seed=1)
    found = detailed(run_prompt, restored, start, family, grain=0.001)
    assert found.shape == restored.shape and found.isfinite().all() and not torch.equal(found, restored)
    one = detailed(run_prompt, restored[1:], start[1:], family, grain=0.001)
    # Pictures of a batch are coded one by one.
    torch.testing.assert_close(found[1:], one)


def test_strength_zero_is_the_result_itself(run_prompt):
    restored = picture(1, 16, 24, 3)
    assert torch.equal(detailed(run_prompt, restored, picture(1, 16, 24, 3, seed=1), strength=0.0), restored)


def test_one_start_serves_all_results(run_prompt):
    restored, start = picture(3, 16, 24, 3), picture(1, 16, 24, 3, seed=1)
    together = detailed(run_prompt, restored, start, grain=0.001)
    torch.testing.assert_close(together, detailed(run_prompt, restored, start.expand(3, -1, -1, -1), grain=0.001))


def test_transparency_stays(run_prompt):
    restored, start = picture(2, 16, 24, 4), picture(2, 16, 24, 3, seed=1)
    found = detailed(run_prompt, restored, start, grain=0.001)
    assert torch.equal(found[..., 3], restored[..., 3])
    torch.testing.assert_close(found[..., :3], detailed(run_prompt, restored[..., :3], start, grain=0.001))


def test_grain_is_measured(run_prompt):
    restored = picture(1, 64, 64, 3)
    noisy = 0.5 + 0.1 * torch.randn(1, 64, 64, 3, generator=torch.Generator().manual_seed(0))
    small = detailed(run_prompt, restored, noisy.clamp(0, 1), grain=0.001)
    assert (detailed(run_prompt, restored, noisy.clamp(0, 1)) - restored).abs().mean() < (small - restored).abs().mean()


@pytest.mark.parametrize(("restored", "start", "reason"), [
    ((1, 16, 24, 3), (1, 24, 16, 3), "'start' is 16 x 24 and 'restored' is 24 x 16"),
    ((3, 16, 24, 3), (2, 16, 24, 3), "'start' holds 2 pictures and 'restored' 3"),
    ((1, 16, 24, 3), (1, 16, 24, 2), "'start' has 2 channels"),
    ((1, 1, 16385, 3), (1, 1, 16385, 3), "Return Detail: 'start' would be 16392 x 8 pixels"),
])  # fmt: skip
def test_what_does_not_fit_is_named(run_prompt, restored, start, reason):
    result = run_prompt(prompt(), given={"restored": picture(*restored), "start": picture(*start)}, check=False)
    assert not result.success and "Return Detail" in result.error_text() and reason in result.error_text()
