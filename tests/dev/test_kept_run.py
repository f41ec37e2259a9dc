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
    # Five steps and four of a round, on both sides of t1.
    recipe = replace(reference(RECIPES["noise"]), steps=5)
    picture = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        return restore(prior, picture, "a red cup", recipe, 0, kept)


class Pulled(KeptRun):
    """A run that stops after so many steps of all passes."""

    def __init__(self, file, every, stop):
        super().__init__(file, every)
        self.left = stop

    def sampler(self):
        inner = super().sampler()
        step = inner.sampler_function

        def pulled(model, *args, **kwargs):
            def counted(*inputs, **settings):
                if self.left == 0:
                    raise Stopped
                self.left -= 1
                return model(*inputs, **settings)

            return step(counted, *args, **kwargs)

        inner.sampler_function = pulled
        return inner


# Right after a write; between two, so that a step is taken again; in the round.
@pytest.mark.parametrize(("every", "stop"), [(1, 2), (2, 3), (2, 8)])
def test_a_stopped_run_goes_on_bit_for_bit(prior, tmp_path, every, stop):
    whole, work = published(prior, KeptRun(tmp_path / "whole.run", every=100))
    assert work.updates > 5 and not list(tmp_path.iterdir())
    with pytest.raises(Stopped):
        published(prior, Pulled(tmp_path / "stopped.run", every, stop))
    with torch.inference_mode():  # where restoring happens
        again = KeptRun(tmp_path / "stopped.run", every)
    assert again.saved["calls"] > 0
    result, counted = published(prior, again)
    assert torch.equal(result, whole)
    assert (counted.model_calls, counted.updates, counted.decodes) == (work.model_calls, work.updates, work.decodes)


def test_it_samples_as_the_host_does(prior, tmp_path):
    recipe = replace(reference(RECIPES["noise"]), steps=4)
    picture = torch.rand(1, 32, 32, 3, generator=torch.Generator().manual_seed(3))
    with torch.inference_mode():
        host, _ = restore(prior, picture, "", recipe, 0)
        ours, _ = restore(prior, picture, "", recipe, 0, KeptRun(tmp_path / "a.run"))
    assert torch.equal(host, ours)
