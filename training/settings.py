"""How a run of training goes: everything the user turns, checked."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

# The schedules of diffusers that need no rules of their own.
SCHEDULES = ("constant", "linear", "cosine", "cosine_with_restarts", "polynomial")
PRECISIONS = ("fp32", "bf16")
LARGEST_SEED = 0xFFFFFFFFFFFFFFFF

# Settings that change how the work is spread or watched, but not what is learned.
INCIDENTAL = ("steps", "batch", "accumulate", "checkpointing", "validate_every", "validation_pictures", "save_every", "keep")

_RANGES: dict[str, tuple[float, float]] = {
    "steps": (1, 10**9), "batch": (1, 10**6), "accumulate": (1, 10**6), "rate": (0, 10), "warmup": (0, 10**9), "weight_decay": (0, 10),
    "clip": (0, 1e9), "ema": (0, 0.999999), "seed": (0, LARGEST_SEED), "validate_every": (0, 10**9), "validation_pictures": (1, 64),
    "save_every": (0, 1e9), "keep": (2, 1000),
}  # fmt: skip
_WHOLE = {"steps", "batch", "accumulate", "warmup", "seed", "validate_every", "validation_pictures", "keep"}


@dataclass(frozen=True)
class Settings:
    """Settings of one run.

    Attributes:
        steps: updates of the weights, over all resumptions.
        batch: samples that go through the model at once, in each process.
        accumulate: batches that make one step.
        rate: learning rate at its highest.
        schedule: how the learning rate falls, one of SCHEDULES.
        warmup: steps in which the learning rate rises from 0.
        weight_decay: AdamW's.
        betas: AdamW's.
        clip: longest gradient; longer ones are shortened. 0 does not.
        ema: decay of the moving average of the weights, which then is what comes out. 0 keeps none.
        precision: "bf16" computes the loss under autocast; the trained weights stay as they are.
        checkpointing: compute activations twice instead of keeping them.
        seed: decides all that is random.
        validate_every: steps between validations; there is one before the first step and one after the last. 0 has none.
        validation_pictures: how many pictures are restored at each.
        save_every: seconds between checkpoints.
        keep: checkpoints that stay on disk.

    Raises:
        ValueError: naming the setting.
    """

    steps: int = 1000
    batch: int = 4
    accumulate: int = 1
    rate: float = 1e-4
    schedule: str = "constant"
    warmup: int = 0
    weight_decay: float = 0.01
    betas: tuple[float, float] = (0.9, 0.999)
    clip: float = 1.0
    ema: float = 0.0
    precision: str = "fp32"
    checkpointing: bool = False
    seed: int = 0
    validate_every: int = 100
    validation_pictures: int = 4
    save_every: float = 60.0
    keep: int = 2

    def __post_init__(self) -> None:
        object.__setattr__(self, "betas", tuple(self.betas))
        for name, (least, most) in _RANGES.items():
            _check_range(name, getattr(self, name), least, most)
        if len(self.betas) != 2:
            raise ValueError(f"betas are {list(self.betas)}; give two numbers, such as [0.9, 0.999].")
        for value in self.betas:
            _check_range("betas", value, 0, 0.999999)
        for name, known in (("schedule", SCHEDULES), ("precision", PRECISIONS)):
            if getattr(self, name) not in known:
                raise ValueError(f"{name} is {getattr(self, name)!r}; choose one of {', '.join(known)}.")

    def samples(self, processes: int = 1) -> int:
        """Return how many samples make one step."""
        return self.batch * self.accumulate * processes

    def identity(self, processes: int = 1) -> dict[str, Any]:
        """Return what two runs must share for one to go on where the other stopped; plain JSON.

        The number of steps belongs to it unless the schedule is constant: elsewhere it decides the learning rate of every step.
        """
        own = {name: value for name, value in asdict(self).items() if name not in INCIDENTAL}
        own |= {"betas": list(self.betas), "samples_per_step": self.samples(processes)}
        return own if self.schedule == "constant" else {**own, "steps": self.steps}


def settings_of(table: Mapping[str, Any]) -> Settings:
    """Build settings from a table of a configuration file.

    Raises:
        ValueError: for names that are no settings, and for values out of range.
    """
    known = [field.name for field in fields(Settings)]
    unknown = sorted(set(table) - set(known))
    if unknown:
        raise ValueError(f"there is no setting {', '.join(unknown)}; there are {', '.join(known)}.")
    return Settings(**table)


def _check_range(name: str, value: object, least: float, most: float) -> None:
    kinds = (int,) if name in _WHOLE else (int, float)
    if isinstance(value, bool) or not isinstance(value, kinds):
        raise ValueError(f"{name} is {value!r}; give a {'whole ' if name in _WHOLE else ''}number.")
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}; give a number from {least} to {most}.")
