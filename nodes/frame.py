"""Nodes that bring a picture to a size that models accept, and back."""

from torch import Tensor

from comfy_api.latest import io

from ..model_patches import framing

MendFrame = io.Custom("MEND_FRAME")
FRAME_TOOLTIP = "Remembers the size, the padding and the transparency of the picture. Connect it to Unframe Image."


class FrameImage(io.ComfyNode):
    """Declares Frame Image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendFrameImage",
            display_name="Frame Image",
            category="restoration/frame",
            description="Pads a picture to a size the model accepts, so that nothing is cropped on the way. Takes any size, grey and "
            "transparent pictures too. Put Unframe Image at the end to get the original size and the transparency back.",
            search_aliases=["pad image", "pad to multiple", "keep size", "keep alpha", "image padding", "odd size"],
            inputs=[
                io.Image.Input("image", tooltip="The picture to restore, of any size; grey, RGB or with transparency."),
                io.Float.Input(
                    "scale", default=1.0, min=0.25, max=8.0, step=0.05,
                    tooltip="Enlarges the picture before it is restored; below 1 it becomes smaller, and what is saved has that size. For "
                    "SDXL, SD3 and FLUX set it so that the picture has about 1024 pixels a side: 4 for one of 256, 0.25 for one of 4000. At "
                    "1 no pixel is changed.",
                ),
                io.Int.Input(
                    "multiple", default=16, min=8, max=128, step=8, advanced=True,
                    tooltip="Both sides are padded up to a multiple of this many pixels. 16 suits every common model; 8 is enough for "
                    "SD 1.5 and SDXL.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="image", tooltip="The padded RGB picture. Its border mirrors the picture."),
                MendFrame.Output(display_name="frame", tooltip=FRAME_TOOLTIP),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, image: Tensor, scale: float, multiple: int) -> io.NodeOutput:
        """Return the padded picture and its frame."""
        return io.NodeOutput(*framing.frame_pictures(image, scale, multiple))


class UnframeImage(io.ComfyNode):
    """Declares Unframe Image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendUnframeImage",
            display_name="Unframe Image",
            category="restoration/frame",
            description="Cuts off what Frame Image has padded and puts the transparency back. Also takes a picture that was enlarged by a "
            "whole factor in between.",
            search_aliases=["crop padding", "remove padding", "restore alpha", "original size", "unpad image"],
            inputs=[
                io.Image.Input("image", tooltip="The restored picture, still of the size that Frame Image gave it, or 2, 3, ... times that."),
                MendFrame.Input("frame", tooltip="The frame output of the Frame Image node that this picture went through."),
            ],
            outputs=[
                io.Image.Output(
                    display_name="image",
                    tooltip="The picture without padding: the original size times the scale of Frame Image, with the transparency it had.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, image: Tensor, frame: framing.Frame) -> io.NodeOutput:
        """Return the cropped picture."""
        return io.NodeOutput(framing.unframe_pictures(image, frame))


NODES = [FrameImage, UnframeImage]
