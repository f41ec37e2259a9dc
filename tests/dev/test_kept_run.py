"""A measurement that takes hours: stopped anywhere and started again, it ends with the same bits."""

from dataclasses import replace

import pytest
import torch

from mend.dev.bench.kept_run import KeptRun
from mend.dev.bench.ld_rps import RECIPES, reference
from mend.dev.bench.zero_shot import Prior, restore


@pytest.fixture(scope="module")
def prior():
    """The lab's UNet and its VAE."""
    return Prior("unet")


class Stopped(Exception):
    """Someone pulled the plug."""


def published(prior, kept):
    # Three steps, and two of a round; above t1 once, so that both stages are crossed.
    recipe = replace(reference(RECIPES["noise"]), steps=5)
    picture = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return restore(prior, picture, "a red cup", recipe, 0, kept)


@pytest.mark.parametrize("stop", [2, 6])
def test_a_stopped_run_goes_on_bit_for_bit(prior, tmp_path, stop):
    whole, work = published(prior, KeptRun(tmp_path / "whole.run", every=100))
    assert work.updates > 5 and not list(tmp_path.iterdir())

    kept = KeptRun(tmp_path / "stopped.run", every=1)
    keep = kept._keep

    def pull(*args):
        keep(*args)
        if (kept.passes - 1) * 5 + args[1] == stop:
            raise Stopped

    kept._keep = pull
    with pytest.raises(Stopped):
        published(prior, kept)
    again = KeptRun(tmp_path / "stopped.run", every=1)
    assert again.saved["calls"] > 0
    result, counted = published(prior, again)
    assert torch.equal(result, whole)
    assert (counted.model_calls, counted.updates, counted.decodes) == (work.model_calls, work.updates, work.decodes)
    again.finished()
    assert not list(tmp_path.iterdir())


def test_it_samples_as_the_host_does(prior, tmp_path):
    recipe = replace(reference(RECIPES["noise"]), steps=4)
    picture = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        host, _ = restore(prior, picture, "", recipe, 0)
        ours, _ = restore(prior, picture, "", recipe, 0, KeptRun(tmp_path / "a.run"))
    assert torch.equal(host, ours)
