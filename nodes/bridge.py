"""The diffusion bridge that learned prompts are sampled on (arXiv 2604.04924): its sampler, and its schedule."""

from typing import TYPE_CHECKING, Any

from comfy_api.latest import io

from ..model_patches.errors import telling
from ..samplers.bridge import E_BRIDGE, NODE, PUBLISHED_SEED, STEPS, T0, YPT, Bridge, bridge_sigmas
from .inputs import LARGEST_SEED, samples_of

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher

SIGMAS = "Bridge Sigmas"
REESTIMATED, KEPT = "re-estimated", "kept"


class BridgeSampler(io.ComfyNode):
    """Declares Bridge Sampler."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendBridgeSampler",
            display_name=NODE,
            category="restoration/bridge",
            description="Walk from the damaged picture to the restored one: sampling starts at the damaged latent under a moderate amount "
            "of noise and lets go of it step by step. This is how learned prompts restore. Take the sigmas from Bridge Sigmas, and cfg 1.",
            search_aliases=["bridge", "diffusion bridge", "learned prompt", "e-bridge", "restore", "video restoration", "sampler"],
            inputs=[
                io.Latent.Input(
                    "degraded", optional=True,
                    tooltip="The damaged picture or video, encoded. Without it, the latent given to the sampling node is used.",
                ),
                io.Combo.Input(
                    "estimator", options=[YPT, E_BRIDGE], default=YPT, advanced=True,
                    tooltip="How predictions are read. YPT: for learned prompts, those of Mend and the published ones. E-Bridge: for "
                    "models that were trained to predict noise minus picture on the bridge.",
                ),
                io.Combo.Input(
                    "noise", options=[REESTIMATED, KEPT], default=REESTIMATED, advanced=True,
                    tooltip="re-estimated: each step takes the noise that the model sees in the picture. kept: the noise of the start "
                    "stays.",
                ),
                io.Boolean.Input(
                    "fixed_noise", default=False, advanced=True,
                    tooltip="Use the same noise for every picture, whatever the seed of the sampling node, as published.",
                ),
                io.Int.Input(
                    "fixed_seed", default=PUBLISHED_SEED, min=0, max=LARGEST_SEED, advanced=True,
                    control_after_generate=io.ControlAfterGenerate.fixed, tooltip="Seed of that noise, if fixed_noise is on.",
                ),
                io.Int.Input(
                    "window", default=0, min=0, max=16384, advanced=True,
                    tooltip="For long videos: how many frames the model sees at once. Windows overlap and are blended at every step. 0: "
                    "all frames. ComfyUI plans memory for the whole clip all the same; when it is short, use its Context Windows node.",
                ),
                io.Int.Input(
                    "overlap", default=16, min=0, max=16384, advanced=True, tooltip="How many frames neighbouring windows share."
                ),
            ],
            outputs=[io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, estimator: str, noise: str, fixed_noise: bool, fixed_seed: int, window: int, overlap: int,
        degraded: dict[str, Any] | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        """Return the sampler."""
        if window and overlap >= window:
            raise ValueError(f"{NODE}: 'overlap' is {overlap} frames and 'window' {window}; the overlap has to be shorter.")
        latent = None if degraded is None else samples_of(degraded, NODE, "degraded")
        return io.NodeOutput(Bridge(latent, estimator, noise == KEPT, fixed_seed if fixed_noise else None, window, overlap).sampler())


class BridgeSigmas(io.ComfyNode):
    """Declares Bridge Sigmas."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendBridgeSigmas",
            display_name=SIGMAS,
            category="restoration/bridge",
            description="The schedule of the diffusion bridge: even steps from a moderate noise level down, the same for every model "
            "whatever its shift. For Bridge Sampler.",
            search_aliases=["bridge", "sigmas", "scheduler", "schedule", "learned prompt", "t0"],
            inputs=[
                io.Model.Input("model", tooltip="The model that will be sampled; it decides how noise levels are counted."),
                io.Float.Input(
                    "t0", default=T0, min=0.01, max=1.0, step=0.01,
                    tooltip="How much noise it starts from, the paper's T0. Low keeps more of the picture, damage too; high changes more. "
                    "Prompts work best at the value they were trained with; Bridge Sampler warns of another one.",
                ),
                io.Int.Input(
                    "steps", default=STEPS, min=1, max=1000, tooltip="How many times the model is asked. Fewer are faster and rougher."
                ),
            ],
            outputs=[io.Sigmas.Output(display_name="sigmas", tooltip="For SamplerCustom or SamplerCustomAdvanced.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: "ModelPatcher", t0: float, steps: int) -> io.NodeOutput:
        """Return the schedule."""
        with telling(f"{SIGMAS}:"):
            return io.NodeOutput(bridge_sigmas(model.get_model_object("model_sampling"), t0, steps))


NODES = [BridgeSampler, BridgeSigmas]
