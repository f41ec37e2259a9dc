"""Entry of `python dev COMMAND`: makes this folder the package `dev` and hands over to the command line."""

import sys
from pathlib import Path

if sys.version_info < (3, 10):
    sys.exit("python dev needs Python 3.10 or newer; this is Python %d.%d." % sys.version_info[:2])

# Python put this folder first on sys.path; its parent instead makes it a package, so no module here can hide a standard one.
sys.path[0] = str(Path(__file__).resolve().parent.parent)

from dev.commands import main  # noqa: E402

sys.exit(main(sys.argv[1:]))
