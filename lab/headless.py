"""Use the host's model classes from a script, without its server."""

import torch


def boot() -> None:
    """Prepare the host's options before anything else of it is imported; on the CPU unless torch sees a GPU."""
    import comfy.options

    comfy.options.enable_args_parsing(False)
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()
