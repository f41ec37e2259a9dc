"""Restoration Guidance, the sampling strategy of the Diffusion Restoration Adapter (arXiv 2502.20679), for any model and sampler."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from comfy_api.latest import io

from ..model_patches.framing import rgb_pictures
from ..samplers.degraded_latent import NODE, DegradedLatent
from ..samplers.restoration_guidance import Restoration
from ..samplers.restoration_guidance import RestorationGuidance as Guidance
from .inputs import samples_of, usable_mask

if TYPE_CHECKING:
    from comfy.model_patcher import ModelPatcher
    from comfy.sd import VAE

NOISE_MATCHED, LITERAL = "noise-matched", "literal"


class RestorationGuidance(io.ComfyNode):
    """Declares Restoration Guidance."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendRestorationGuidance",
            display_name=NODE,
            category="restoration/guidance",
            description="Keep a model near the picture you have while the large shapes form: after each early sampling step the latent is moved "
            "a little towards the degraded picture. Needs no training and next to no time; works with any model and sampler.",
            search_aliases=["restoration guidance", "rss", "restoration sampling", "fidelity", "stay close", "supir", "guidance"],
            inputs=[
                io.Model.Input("model", tooltip="The model to sample with."),
                io.Vae.Input("vae", optional=True, tooltip="The VAE of that model. Needed with degraded."),
                io.Image.Input(
                    "degraded", optional=True,
                    tooltip="The damaged picture: one for all latents, or one each; for video its frames. Of the size that is sampled.",
                ),
                io.Latent.Input(
                    "latent", optional=True, tooltip="The damaged picture as a latent, in place of degraded and vae: one for all, or one each."
                ),
                io.Mask.Input(
                    "mask", optional=True, tooltip="White where the result is to stay near; black parts are left to the model. Any size."
                ),
                io.Float.Input(
                    "weight", default=0.05, min=0.0, max=1.0, step=0.005, round=False,
                    tooltip="How hard to pull: the paper's w, per step of 100. It means the same with any number of steps. 0 switches it off.",
                ),
                io.Float.Input(
                    "onset", default=0.8, min=0.0, max=0.99, step=0.01,
                    tooltip="The paper's a: the pull is full at pure noise, fades, and ends when this much noise time is left. Lower it to "
                    "hold on for longer.",
                ),
                io.Combo.Input(
                    "form", options=[NOISE_MATCHED, LITERAL], default=NOISE_MATCHED, advanced=True,
                    tooltip="noise-matched: only the picture is pulled. literal: the paper's formula as written; it also removes noise, pulls "
                    "much harder and smooths.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="The model under guidance. Sample it like any other.")],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: "ModelPatcher", weight: float, onset: float, form: str, vae: "VAE | None" = None, degraded: Tensor | None = None,
        latent: dict[str, Any] | None = None, mask: Tensor | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        """Return the model under guidance."""
        if latent is not None and degraded is not None:
            raise ValueError(f"{NODE}: both 'latent' and 'degraded' are connected. Disconnect one of them.")
        source = DegradedLatent(latent=samples_of(latent, NODE, "latent")) if latent is not None else _pictures(degraded, vae)
        return io.NodeOutput(Guidance(Restoration(weight, onset, form == LITERAL), source, usable_mask(mask, NODE)).attach(model))


def _pictures(degraded: Tensor | None, vae: "VAE | None") -> DegradedLatent:
    if degraded is None:
        raise ValueError(f"{NODE}: nothing says where to stay near; connect 'degraded' and 'vae', or 'latent'.")
    if vae is None:
        raise ValueError(f"{NODE}: 'degraded' needs 'vae' to encode it; connect the VAE of the model, or connect 'latent' instead.")
    return DegradedLatent(rgb_pictures(degraded, NODE, "degraded"), vae)


NODES = [RestorationGuidance]
