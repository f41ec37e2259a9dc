"""The pack's own small model, so that everything can be tried without downloading anything."""

from comfy_api.latest import io

from ..lab.prior import KINDS, load_lab_prior


class LoadLabPrior(io.ComfyNode):
    """Declares Load Lab Prior."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendLoadLabPrior",
            display_name="Load Lab Prior",
            category="restoration/lab",
            description="Load the small image model that comes with Mend. It is for trying workflows without any download; for real work "
            "connect your own checkpoint instead.",
            search_aliases=["lab", "demo model", "small model", "test model", "tiny checkpoint", "mend"],
            inputs=[
                io.Combo.Input(
                    "kind", options=list(KINDS), default="unet",
                    tooltip="unet predicts noise like SD and SDXL; dit is a flow model like SD3 and FLUX; pixel is a flow model that works on "
                    "pixels, without a VAE.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="The denoiser: unet and dit for pictures up to about 512 pixels, pixel to be trained for restoration."),
                io.Clip.Output(
                    display_name="clip", tooltip="Its text encoder: knows 65 words such as bright, warm, red, round, detailed."
                ),
                io.Vae.Output(
                    display_name="vae",
                    tooltip="The VAE of unet and dit: 16 channels, 8 pixels a cell. That of pixel leaves pictures as they are: 3 channels, 1 pixel a cell.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, kind: str) -> io.NodeOutput:
        """Return MODEL, CLIP and VAE."""
        return io.NodeOutput(*load_lab_prior(kind))


NODES = [LoadLabPrior]
