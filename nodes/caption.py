"""The node that describes a degraded picture in words."""

from torch import Tensor

from comfy_api.latest import io

from ..model_patches import captioner as captioning
from ..model_patches import folders

NONE_FOUND = "none found: put one into models/mend/captioner"

# LD-RPS, arXiv 2507.00790: the caption stands for what the picture should become.
INSTRUCTION = (
    "This picture is of low quality. Say briefly what its content would look like under normal conditions and in high quality. "
    "Answer with words or short phrases only, 20 words at most. Stress the main subject, and include colour and orientation."
)


class DescribeDegradedImage(io.ComfyNode):
    """Declares Describe Degraded Image."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendDescribeDegradedImage",
            display_name="Describe Degraded Image",
            category="restoration/zero-shot",
            description="Asks a vision-language model on this machine what a damaged picture shows and would look like undamaged. Use the "
            "words as the positive prompt of a restoration.",
            search_aliases=["caption", "image to text", "describe image", "vlm", "llava", "semantic prior", "LD-RPS"],
            inputs=[
                io.Image.Input("image", tooltip="The damaged picture. Of a batch, the first picture is described."),
                io.Combo.Input(
                    "captioner", options=list(folders.captioners()) or [NONE_FOUND],
                    tooltip="A folder in models/mend/captioner (or in models/LLM, where another node pack has set that up) with a transformers "
                    "image-text-to-text model: config.json, tokenizer and .safetensors files. Nothing is downloaded.",
                ),
                io.String.Input(
                    "instruction", default=INSTRUCTION, multiline=True,
                    tooltip="What the captioner is asked. The default asks for the content as it would look undamaged, so that the words "
                    "do not describe the damage.",
                ),
                io.Int.Input(
                    "max_new_tokens", default=64, min=1, max=1024, advanced=True,
                    tooltip="The longest answer, in tokens; 20 words take about 30. Raise it for models that think before they answer.",
                ),
            ],
            outputs=[io.String.Output(display_name="description", tooltip="The answer as one line of text, for a text encoder.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, image: Tensor, captioner: str, instruction: str, max_new_tokens: int) -> io.NodeOutput:
        """Return the description."""
        folder = folders.captioners().get(captioner)
        if folder is None:
            raise ValueError(
                f"{captioning.NODE}: captioner '{captioner}' is not there. Put the folder of an image-text-to-text model, with config.json "
                f"and .safetensors files, into models/{folders.MEND}/{folders.CAPTIONERS} and press R to refresh. {captioning.ALTERNATIVE}"
            )
        return io.NodeOutput(captioning.describe(folder, image, instruction, max_new_tokens))


NODES = [DescribeDegradedImage]
