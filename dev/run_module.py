"""Does what `python -m MODULE` does, but leaves neither the working folder nor this one on the import path.

The checkout has a folder `nodes`, the host a module of that name; Python 3.10 has no option that would keep them apart.
"""

import os
import runpy
import sys

if __name__ == "__main__":
    here = os.path.dirname(os.path.realpath(__file__))
    sys.path[:] = [path for path in sys.path if path and os.path.realpath(path) != here]
    del sys.argv[0]
    runpy.run_module(sys.argv[0], run_name="__main__", alter_sys=True)
