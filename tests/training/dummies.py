"""The smallest thing that can be trained, and pictures for it: no model, no files, everything the loop asks for."""

from contextlib import contextmanager

import torch
from torch.nn import Conv2d

from mend.model_patches.weights_file import Weights
from mend.training import pairs as paired_data
from mend.training.kinds import Kind
from mend.training.trainee import Pair

KIND = "dummy"
SIDE = 12


class DummyPairs:
    """Smooth pictures with noise on them, which each sample draws anew."""

    validation_count = 3
    collate = staticmethod(paired_data.collate)

    def __init__(self, count=7, name="dummy"):
        self.count, self.name = count, name

    def __len__(self):
        return self.count

    def pair(self, index, generator):
        clean = self._clean(index)
        return Pair(clean, (clean + 0.2 * torch.randn(clean.shape, generator=generator)).clamp(0, 1))

    def validation(self, index):
        return self.pair(1000 + index, torch.Generator().manual_seed(index))

    def fingerprint(self):
        return f"{self.name} {self.count}"

    def _clean(self, index):
        rows = torch.linspace(0, 3, SIDE)
        waves = torch.sin(rows[:, None] * (1 + index % 3) + rows[None] * (1 + index % 2) + index)
        return (0.5 + 0.4 * waves)[..., None].expand(SIDE, SIDE, 3).clone()


class DummyTrainee:
    """A 3 x 3 filter on the degraded picture; what it is shown has noise of its own on it, as in diffusion."""

    kind, config = KIND, {"width": 3}

    def __init__(self, weights, models=None):
        self.filter = Conv2d(3, 3, 3, padding=1, padding_mode="replicate")
        self.attached = False
        self.load_state_dict(weights.tensors)

    def parameters(self):
        yield from self.filter.parameters()

    @contextmanager
    def attach(self, models):
        self.attached = True
        try:
            yield
        finally:
            self.attached = False

    def loss(self, batch, generators):
        assert self.attached
        noise = torch.stack([torch.randn(picture.shape, generator=own) for picture, own in zip(batch.clean, generators)])
        error = (self._restore(batch.degraded + 0.05 * noise) - batch.clean).square().mean()
        return error, {"error": float(error.detach()), "twice": 2 * float(error.detach())}

    def validate(self, batch, generators):
        assert self.attached and not torch.is_grad_enabled()
        return self._restore(batch.degraded)

    def state_dict(self):
        return {name: tensor.detach() for name, tensor in self.filter.state_dict().items()}

    def load_state_dict(self, tensors):
        self.filter.load_state_dict(tensors)

    def _restore(self, pictures):
        return pictures + self.filter(pictures.movedim(-1, 1)).movedim(1, -1)


def weights(seed=0):
    """What DummyTrainee starts from."""
    generator = torch.Generator().manual_seed(seed)
    return Weights(KIND, "none", DummyTrainee.config, {
        "weight": 0.05 * torch.randn(3, 3, 3, 3, generator=generator), "bias": torch.zeros(3),
    })  # fmt: skip


def trainee(seed=0):
    """A DummyTrainee outside inference mode."""
    return DummyTrainee(weights(seed))


def new(models, config):
    """Fresh weights, as kinds.new_weights asks for them."""
    return weights(config.get("seed", 0))


DUMMY = Kind(DummyTrainee, new)


class Watcher:
    """Keeps what a run tells, and does something after a step if asked to."""

    def __init__(self, after_step=None, stop_after=None):
        self.progress, self.validations, self.pages = [], [], []
        self.after_step, self.stop_after = after_step or (lambda step: None), stop_after

    def stepped(self, progress):
        self.progress.append(progress)
        self.after_step(progress.step)

    def validated(self, validation, page):
        self.validations.append(validation)
        self.pages.append(page)

    def stop(self):
        return self.stop_after is not None and len(self.progress) + 1 >= self.stop_after


def same(one, other):
    """Whether two sets of tensors are equal bit for bit."""
    return one.keys() == other.keys() and all(torch.equal(tensor, other[name]) for name, tensor in one.items())
