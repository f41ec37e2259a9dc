"""Mend: restore images with the diffusion model you already have."""

WEB_DIRECTORY = "./web"


async def comfy_entrypoint():  # noqa: ANN201 - the host's type must not be imported before the host asks
    from .nodes import MendExtension

    return MendExtension()
