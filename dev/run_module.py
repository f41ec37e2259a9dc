"""Does what `python -m MODULE` does, but leaves neither the working folder nor this one on the import path.

The checkout has a folder `nodes`, the host a module of that name; Python 3.10 has no option that would keep them apart.
"""

import os
import runpy
import sys

if __name__ == "__main__":
    here = os.path.dirname(os.path.realpath(__file__))
    there = [path for path in sys.path if path and os.path.realpath(path) != here]
    # An interpreter with a ._pth file, as ComfyUI's for Windows has, does not look at PYTHONPATH.
    named = [path for path in os.environ.get("PYTHONPATH", "").split(os.pathsep) if path and path not in there]
    sys.path[:] = [*named, *there]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
