"""Return Detail: what the VAE drops, without any training."""

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from comfy_api.latest import io

from ..model_patches.framing import rgb_pictures
from ..samplers.returned_detail import NODE, coded, returned_detail

if TYPE_CHECKING:
    from comfy.sd import VAE


class ReturnDetail(io.ComfyNode):
    """Declares Return Detail."""

    @classmethod
    def define_schema(cls) -> io.Schema:
        """Return the node's face."""
        return io.Schema(
            node_id="MendReturnDetail",
            display_name=NODE,
            category="restoration/detail",
            description="Give back the fine detail that every VAE drops: put it after VAE Decode, with the picture that was encoded. What "
            "coding alone took away is added to the result, except where it is grain. No training, no model.",
            search_aliases=["detail", "vae detail", "sharpen", "texture", "fidelity", "blurry result", "detail transfer"],
            inputs=[
                io.Image.Input("restored", tooltip="The result, from VAE Decode."),
                io.Image.Input(
                    "start", tooltip="The picture that was encoded for sampling, at the same size: one for all results, or one each."
                ),
                io.Vae.Input("vae", tooltip="The VAE that encoded it."),
                io.Float.Input(
                    "strength", default=1.0, min=0.0, max=2.0, step=0.01, tooltip="How much is given back. 0: nothing. Above 1: sharper."
                ),
                io.Float.Input(
                    "grain", default=0.0, min=0.0, max=1.0, step=0.001, round=False, advanced=True,
                    tooltip="How strong the grain of start is, as a share of white; weaker differences stay behind. 0 measures it.",
                ),
            ],
            outputs=[io.Image.Output(display_name="image", tooltip="The result with its detail, as large as before.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, restored: Tensor, start: Tensor, vae: "VAE", strength: float, grain: float) -> io.NodeOutput:
        """Return the pictures, each with its own detail."""
        results, starts = rgb_pictures(restored, NODE, "restored"), rgb_pictures(start, NODE, "start")
        if starts.shape[1:3] != results.shape[1:3]:
            sizes = ["{1} x {0}".format(*pictures.shape[1:3]) for pictures in (starts, results)]
            raise ValueError(
                f"{NODE}: 'start' is {sizes[0]} and 'restored' is {sizes[1]}; connect the picture that was encoded, "
                "from the same Frame Image."
            )
        if len(starts) not in (1, len(results)):
            raise ValueError(f"{NODE}: 'start' holds {len(starts)} pictures and 'restored' {len(results)}; give one for all, or one each.")
        if strength == 0:
            return io.NodeOutput(restored)
        results = results.float()
        pairs = [(picture, coded(vae, picture).to(results)) for picture in starts.to(results).split(1)]
        rows = zip(results.split(1), pairs * (len(results) // len(pairs)))
        detailed = torch.cat([returned_detail(result, *pair, strength, grain) for result, pair in rows])
        # Some VAEs decode transparency too.
        return io.NodeOutput(torch.cat([detailed, restored[..., 3:].to(detailed)], -1))


NODES = [ReturnDetail]
