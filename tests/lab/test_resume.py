"""A training run that was killed goes on as if it had not been."""

import pytest
import torch
from torch.nn import Conv2d, Embedding, Flatten, GroupNorm, Linear, ModuleDict, Sequential

from mend.lab.optimizer import MuonAdam
from mend.lab.resume import Average, load_run, save_run

MADE_WITH = {"steps": "8"}


class Run:
    """A small network of filters, matrices, vectors and a word table, and all that training keeps of it."""

    def __init__(self, frozen=False):
        torch.manual_seed(0)
        self.module = ModuleDict({"net": Sequential(Conv2d(3, 4, 3), GroupNorm(2, 4), Flatten(), Linear(16, 5)), "words": Embedding(5, 5)})
        self.module["net"][0].weight.requires_grad_(not frozen)
        self.module.to(memory_format=torch.channels_last)
        self.average = Average(self.module)
        self.optimizer = MuonAdam(self.module, 1e-2)

    def train(self, start, stop, steps=8):
        for step in range(start, stop):
            torch.manual_seed(step)
            x, ids = torch.randn(6, 3, 4, 4), torch.randint(0, 5, (6,))
            loss = (self.module["net"](x) - self.module["words"](ids)).square().mean()
            self.optimizer.step(loss, step, steps)
            self.average.update(self.module, step)
        return self

    def state(self):
        return {**self.module.state_dict(), **{f"average.{name}": value for name, value in self.average.shadow.items()}}


@pytest.mark.parametrize("frozen", [False, True])
def test_a_killed_run_goes_on_bit_for_bit(tmp_path, frozen):
    file = tmp_path / "a.run.safetensors"
    through = Run(frozen).train(0, 8)
    killed = Run(frozen).train(0, 3)
    save_run(file, 3, killed.module, killed.average, killed.optimizer, MADE_WITH)
    resumed = Run(frozen)
    assert load_run(file, resumed.module, resumed.average, resumed.optimizer, MADE_WITH) == 3
    resumed.train(3, 8)
    assert all(torch.equal(value, through.state()[name]) for name, value in resumed.state().items())
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_training_acts_and_frozen_weights_stay():
    before = {name: value.clone() for name, value in Run(True).state().items()}
    after = Run(True).train(0, 3).state()
    assert torch.equal(before["net.0.weight"], after["net.0.weight"]) and "average.net.0.weight" not in after
    assert all(not torch.equal(before[name], after[name]) for name in before if name != "net.0.weight")


def test_without_a_file_training_begins(tmp_path):
    run = Run()
    before = {name: value.clone() for name, value in run.state().items()}
    assert load_run(tmp_path / "none.safetensors", run.module, run.average, run.optimizer, MADE_WITH) == 0
    assert all(torch.equal(value, before[name]) for name, value in run.state().items())


def test_a_save_that_dies_leaves_the_last_one(tmp_path, monkeypatch):
    file, run = tmp_path / "a.run.safetensors", Run().train(0, 2)
    save_run(file, 2, run.module, run.average, run.optimizer, MADE_WITH)
    monkeypatch.setattr("os.replace", lambda *names: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        save_run(file, 7, run.module, run.average, run.optimizer, MADE_WITH)
    other = Run()
    assert load_run(file, other.module, other.average, other.optimizer, MADE_WITH) == 2


def test_the_average_follows():
    module = Linear(2, 2)
    average = Average(module, decay=0.5)
    start = module.weight.detach().clone()
    with torch.no_grad():
        module.weight.add_(1)
    average.update(module, 1_000_000)
    torch.testing.assert_close(average.shadow["weight"], start + 0.5)
    # Early steps forget the start faster: (1 + 0) / (10 + 0) of it is left at first.
    average.update(module, 0)
    torch.testing.assert_close(average.shadow["weight"], start + 0.95)
