"""What untrained networks start from."""

import torch
from torch.nn import LayerNorm, Linear, Module, Parameter

from mend.model_patches.first_weights import fill


class Network(Module):
    """One layer of each kind, and numbers of its own."""

    def __init__(self):
        super().__init__()
        self.first, self.zero, self.norm = Linear(16, 4), Linear(4, 4), LayerNorm(4)
        self.gate, self.temperature = Parameter(torch.full((4,), 9.0)), Parameter(torch.full((4,), 9.0))


def filled(seed=0, **names):
    network = Network()
    fill(network, torch.Generator().manual_seed(seed), **names)
    return network


def test_layers_start_as_torchs_do_but_those_that_are_named():
    network = filled(zero=("zero", "gate"), one=("norm", "temperature"))
    assert 0.2 < network.first.weight.abs().max() <= 0.25 and network.first.weight.unique().numel() == 64
    assert not any(p.any() for p in (network.first.bias, network.zero.weight, network.zero.bias, network.norm.bias, network.gate))
    assert all((p == 1).all() for p in (network.norm.weight, network.temperature))


def test_the_seed_decides():
    names = {"zero": ("zero", "gate"), "one": ("norm", "temperature")}
    first, same, other = (filled(seed, **names).first.weight for seed in (1, 1, 2))
    assert torch.equal(first, same) and not torch.equal(first, other)
