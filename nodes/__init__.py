"""The pack's nodes. One file per family, each ending in NODES."""

from typing_extensions import override

from comfy_api.latest import ComfyExtension, io

from ..model_patches import folders
from . import (
    adapter,
    bridge,
    caption,
    degradation,
    degradation_space,
    detail_experts,
    frame,
    fusion,
    lab,
    learned_prompt,
    lora,
    restoration_guidance,
    returned_detail,
    training,
    training_data,
    visual_instruction,
    weights,
    zero_shot,
)


class MendExtension(ComfyExtension):
    """What the host asks for nodes."""

    @override
    async def on_load(self) -> None:
        """Make the pack's model folder known before any node lists its files."""
        folders.register()

    @override
    async def get_node_list(self) -> list[type[io.ComfyNode]]:
        """Return all nodes."""
        return [
            *lab.NODES, *zero_shot.NODES, *frame.NODES, *caption.NODES, *degradation.NODES,
            *restoration_guidance.NODES, *training_data.NODES, *training.NODES, *adapter.NODES, *lora.NODES, *weights.NODES, *bridge.NODES,
            *visual_instruction.NODES, *learned_prompt.NODES,
            *detail_experts.NODES, *returned_detail.NODES, *fusion.NODES, *degradation_space.NODES,
        ]  # fmt: skip
