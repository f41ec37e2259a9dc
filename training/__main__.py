"""Train without the node editor: python custom_nodes/NAME/training CONFIG, under whatever name the pack is installed.

Where it can be imported as mend, python -m mend.training CONFIG does the same. For `accelerate launch` and torchrun see docs/training.md.
"""

import importlib.util
import os
import sys
from pathlib import Path
from types import ModuleType

# As it is written: a pack that is linked into custom_nodes finds the host there.
PACK = Path(os.path.abspath(__file__)).parents[1]


def load_pack() -> ModuleType:
    """Import the pack as `mend` from where this file lies, whatever that folder is called."""
    if "mend" not in sys.modules:
        spec = importlib.util.spec_from_file_location("mend", PACK / "__init__.py", submodule_search_locations=[str(PACK)])
        sys.modules["mend"] = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(sys.modules["mend"])
    return sys.modules["mend"]


def leave_pack_folders() -> None:
    """Take the pack's own folders off the import path, where Python puts them: the host has modules of the same names."""
    own = (PACK.resolve(), (PACK / "training").resolve())
    sys.path[:] = [entry for entry in sys.path if Path(entry or ".").resolve() not in own]


if __name__ == "__main__":
    leave_pack_folders()
    load_pack()
    from mend.training.headless import main

    sys.exit(main(sys.argv[1:]))
