"""The node that trains."""

import logging
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image
from torch import Tensor

import comfy.utils
import folder_paths
from comfy_api.latest import io

from ..model_patches.host import progress_text
from ..model_patches.weights_file import Weights
from ..training import kinds
from ..training.checkpoint import TrainingError, open_run
from ..training.loop import Progress, describe_run, train
from ..training.pairs import Pairs
from ..training.report import progress_line, report
from ..training.settings import PRECISIONS, SCHEDULES, Settings
from ..training.state import Validation
from ..training.trainee import Models
from .inputs import seed_input
from .training_data import MendPairs
from .weights import WeightsSocket

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import CLIP, VAE

TRAIN = "Train"
# Below the host's output folder.
RUNS = "mend_training"
PREVIEW_SIZE = 768
SECONDS_BETWEEN_TEXTS = 1.0


def _basic_inputs() -> list[io.Input]:
    return [
        WeightsSocket.Input("weights", tooltip="What to train, fresh or trained before: from a New node, or from Load Mend Weights."),
        MendPairs.Input("pairs", tooltip="What to learn from: the output of Paired Data."),
        io.Int.Input(
            "steps", default=1000, min=1, max=10_000_000,
            tooltip="How many times the weights are improved. With a constant schedule you can raise it later and the run goes on.",
        ),
        io.Int.Input(
            "batch_size", default=4, min=1, max=1024,
            tooltip="Samples that go through the model at once. Larger learns more steadily, and costs memory.",
        ),
        io.Float.Input(
            "learning_rate", default=1e-4, min=0.0, max=1.0, step=1e-6, round=False,
            tooltip="How far each step goes. Too high and the loss jumps about or grows; too low and nothing happens.",
        ),
        io.String.Input(
            "run_name", default="restoration",
            tooltip="Folder in output/mend_training for checkpoints and validation pictures. Other settings under the same name get a new "
            "folder.",
        ),
        seed_input("Fixes everything random. Leave it as it is to go on with a run; another seed begins a new one."),
    ]  # fmt: skip


def _advanced_inputs() -> list[io.Input]:
    return [
        io.Int.Input(
            "accumulate", default=1, min=1, max=1024, advanced=True,
            tooltip="Batches that make one step: the effect of a larger batch_size without its memory, at the price of time.",
        ),
        io.Combo.Input(
            "schedule", options=list(SCHEDULES), default="constant", advanced=True,
            tooltip="How the learning rate falls. All but constant fit it to the number of steps, so that steps cannot be added later.",
        ),
        io.Int.Input("warmup", default=0, min=0, max=1_000_000, advanced=True, tooltip="Steps in which the learning rate rises from 0."),
        io.Float.Input(
            "weight_decay", default=0.01, min=0.0, max=1.0, step=0.001, round=False, advanced=True,
            tooltip="How strongly weights are pulled towards 0.",
        ),
        io.Float.Input(
            "clip_gradient", default=1.0, min=0.0, max=1000.0, step=0.1, round=False, advanced=True,
            tooltip="Shortens gradients that a single bad sample makes too long. 0 switches it off.",
        ),
        io.Float.Input(
            "ema", default=0.0, min=0.0, max=0.99999, step=0.001, round=False, advanced=True,
            tooltip="Average the weights over about 1 / (1 - ema) steps, and hand out the average: 0.999 smooths long runs. 0 switches it "
            "off.",
        ),
        io.Combo.Input(
            "precision", options=list(PRECISIONS), default="fp32", advanced=True,
            tooltip="bf16 computes in half precision: faster and smaller on recent GPUs. The trained weights stay in full precision.",
        ),
        io.Boolean.Input(
            "gradient_checkpointing", default=False, advanced=True,
            tooltip="Needs much less memory and about a third more time. The result is the same.",
        ),
        io.Int.Input(
            "validate_every", default=100, min=1, max=1_000_000, advanced=True,
            tooltip="Steps between validations, which restore the pictures that were held out. There is always one before and one after "
            "training.",
        ),
        io.Int.Input(
            "keep", default=2, min=2, max=1000, advanced=True, tooltip="How many checkpoints stay in the run folder; older ones are "
            "deleted."
        ),
    ]  # fmt: skip


def _models() -> list[io.Input]:
    return [
        io.Model.Input("model", optional=True, tooltip="The model to train on. It stays as it is."),
        io.Clip.Input("clip", optional=True, tooltip="Its text encoder. Each distinct caption is encoded once."),
        io.Vae.Input("vae", optional=True, tooltip="Its VAE."),
    ]


class Train(io.ComfyNode):
    """Declares Train."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendTrain",
            display_name=TRAIN,
            category="restoration/training",
            description="Trains weights of Mend on your own pictures and your own model. It can be cancelled at any time, and the computer "
            "can crash: queue the same workflow again and it goes on where it stood.",
            search_aliases=["training", "train adapter", "train lora", "fine-tune", "finetune", "learn", "resume training"],
            inputs=[*_basic_inputs(), *_advanced_inputs(), *_models()],
            outputs=[
                WeightsSocket.Output(
                    display_name="weights", tooltip="The trained weights, for Save Mend Weights or the Apply node of their kind."
                ),
                io.LossMap.Output(display_name="loss_map", tooltip="The loss of every step, for Plot Loss Graph."),
                io.Image.Output(
                    display_name="validation", tooltip="Pictures of the last validation: degraded, restored and good side by side."
                ),
                io.String.Output(display_name="report", tooltip="Steps, time, and PSNR of the validation pictures before and after."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, weights: Weights, pairs: Pairs, steps: int, batch_size: int, learning_rate: float, run_name: str, seed: int, accumulate: int,
        schedule: str, warmup: int, weight_decay: float, clip_gradient: float, ema: float, precision: str, gradient_checkpointing: bool,
        validate_every: int, keep: int, model: "ModelPatcher | None" = None, clip: "CLIP | None" = None, vae: "VAE | None" = None,
    ) -> io.NodeOutput:  # fmt: skip
        """Train, or go on, and return what came out."""
        models = Models(model, clip, vae)
        with _naming_the_node():
            settings = Settings(
                steps=steps, batch=batch_size, accumulate=accumulate, rate=learning_rate, schedule=schedule, warmup=warmup,
                weight_decay=weight_decay, clip=clip_gradient, ema=ema, precision=precision, checkpointing=gradient_checkpointing,
                seed=seed, validate_every=validate_every, keep=keep,
            )  # fmt: skip
            trainee = kinds.trainee_of(weights, models)
            base = Path(folder_paths.get_output_directory()) / RUNS
            run = open_run(base, run_name, describe_run(trainee, pairs, models, settings), steps, keep)
            result = train(trainee, pairs, models, settings, run, _OnNode(steps, cls.hidden.unique_id))
        text = report(result, run.path)
        logging.info("Mend: trained %s", text.replace("\n", "; "))
        trained = replace(weights, config=trainee.config, tensors=result.tensors, name=run.path.name)
        return io.NodeOutput(trained, {"loss": result.losses}, result.page.float() / 255, text)


class _OnNode:
    """Shows a run on its node: bar, preview, and a line with the time left."""

    def __init__(self, steps: int, node_id: str) -> None:
        self.bar, self.node_id, self.told = comfy.utils.ProgressBar(steps, node_id=node_id), node_id, time.monotonic()

    def stepped(self, progress: Progress) -> None:
        """Move the bar."""
        if time.monotonic() - self.told > SECONDS_BETWEEN_TEXTS:
            progress_text(progress_line(progress), self.node_id)
            self.told = time.monotonic()
        self.bar.update_absolute(progress.step, progress.steps)

    def validated(self, validation: Validation, page: Tensor) -> None:
        """Show the first picture."""
        line = f"PSNR after {validation.step} steps: {validation.restored:.2f} dB, degraded {validation.degraded:.2f} dB"
        logging.info("Mend: %s", line)
        progress_text(line, self.node_id)
        self.bar.update_absolute(validation.step, preview=("JPEG", Image.fromarray(page[0].numpy()), PREVIEW_SIZE))

    def stop(self) -> bool:
        """The host has its own way to stop a node."""
        return False


@contextmanager
def _naming_the_node() -> Iterator[None]:
    try:
        yield
    except (ValueError, TrainingError) as error:
        if str(error).startswith((f"{TRAIN}:", "Paired Data:")):
            raise
        kind = TrainingError if isinstance(error, TrainingError) else ValueError
        raise kind(f"{TRAIN}: {error}") from error


NODES: list[type[Any]] = [Train]
