"""DAEM, the detail-aware expert module of UniLDiff (arXiv 2507.23685): make experts for a VAE, and decode with them."""

from typing import TYPE_CHECKING, Any

from torch import Tensor

from comfy_api.latest import io

from ..model_patches.daem import SIZES
from ..model_patches.detail_decoder import decode_with_experts
from ..model_patches.detail_experts import LARGEST_WINDOW, LATENTS, WINDOW_STEP, new_weights
from ..model_patches.errors import telling
from ..model_patches.framing import rgb_pictures
from ..model_patches.weights_file import Weights
from .inputs import seed_input
from .weights import WeightsSocket

if TYPE_CHECKING:
    from comfy.sd import VAE

NEW, DECODE = "New Detail Experts", "Decode with Detail Experts"


class NewDetailExperts(io.ComfyNode):
    """Declares New Detail Experts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendNewDetailExperts",
            display_name=NEW,
            category="restoration/detail",
            description="Make untrained detail experts for your VAE: small networks in its decoder that will learn to bring back the fine "
            "detail that latents lose, from the damaged picture. Connect them to Train.",
            search_aliases=["detail experts", "daem", "unildiff", "vae detail", "sharpen decode", "train decoder"],
            inputs=[
                io.Vae.Input(
                    "vae", tooltip="The VAE they are for: that of SD1.5, SD2, SDXL, SD3 or FLUX.1, or a tiny one. They fit no other."
                ),
                io.Combo.Input(
                    "size", options=list(SIZES), default="lite",
                    tooltip="lite: half as wide as the decoder; a decode takes about 1.2 times as long. full: as wide, about 1.6 times.",
                ),
                seed_input("Fixes the numbers they start from. Fresh experts change nothing, whatever the seed."),
                io.Int.Input(
                    "window", default=128, min=0, max=LARGEST_WINDOW, step=WINDOW_STEP, advanced=True,
                    tooltip="Side in pixels of the parts of a picture that get an expert each. 0: one expert for the whole picture, as "
                    "published; tiles then differ.",
                ),
                io.Combo.Input(
                    "latents", options=list(LATENTS), default="mix", advanced=True,
                    tooltip="What they practise on. clean: perfect latents. degraded: those of the damaged picture. mix: what restorers "
                    "leave.",
                ),
                io.Float.Input(
                    "perceptual", default=0.5, min=0.0, max=10.0, step=0.05, advanced=True,
                    tooltip="Weight of the perceptual distance in training. 0 leaves it out: faster, and a little smoother.",
                ),
            ],
            outputs=[WeightsSocket.Output(display_name="weights", tooltip="The untrained experts, for Train.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, vae: "VAE", size: str, seed: int, window: int, latents: str, perceptual: float) -> io.NodeOutput:
        """Return fresh weights."""
        with telling(f"{NEW}: 'vae':"):
            return io.NodeOutput(new_weights(vae, size, window - window % WINDOW_STEP, seed, latents, perceptual))


class DecodeWithDetailExperts(io.ComfyNode):
    """Declares Decode with Detail Experts."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendDecodeWithDetailExperts",
            display_name=DECODE,
            category="restoration/detail",
            description="Use it in place of VAE Decode after any restoration: trained experts look at the damaged picture once more and "
            "bring back the fine detail that the latent has lost.",
            search_aliases=["detail experts", "daem", "unildiff", "vae decode", "sharpen", "fine detail", "texture"],
            inputs=[
                io.Latent.Input("samples", tooltip="The restored latent, from any sampler."),
                io.Vae.Input("vae", tooltip="The VAE that the experts were trained on. It stays as it is."),
                WeightsSocket.Input("weights", tooltip="The experts, from Load Mend Weights or Train."),
                io.Image.Input(
                    "degraded", tooltip="The damaged picture that was restored, at the same size: one for all latents, or one each."
                ),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=2.0, step=0.01,
                    tooltip="How much of the experts' detail is added. 0 is VAE Decode itself.",
                ),
                io.Int.Input(
                    "tile_size", default=0, min=0, max=4096, step=64, advanced=True,
                    tooltip="Decode in tiles of this many pixels, with the default window and overlap at least 512. 0: the whole picture at once, tiles only "
                    "if memory runs out.",
                ),
                io.Int.Input(
                    "overlap", default=128, min=0, max=1024, step=64, advanced=True,
                    tooltip="How far tiles overlap, in pixels; at least a window.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The decoded pictures."),
                io.Image.Output(
                    display_name="expert_map",
                    tooltip="Which expert worked where: blue sees 3 places wide, green 5, yellow 7, red 9; mixed where stages differ.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, samples: dict[str, Any], vae: "VAE", weights: Weights, degraded: Tensor, strength: float, tile_size: int, overlap: int
    ) -> io.NodeOutput:  # fmt: skip
        """Return the pictures and the map."""
        latent = samples["samples"]
        # Of picture and sound, the host decodes the picture.
        latent = latent.unbind()[0] if latent.is_nested else latent
        pictures = rgb_pictures(degraded, DECODE, "degraded")
        return io.NodeOutput(*decode_with_experts(vae, weights, latent, pictures, strength, tile_size, overlap, DECODE))


NODES = [NewDetailExperts, DecodeWithDetailExperts]
