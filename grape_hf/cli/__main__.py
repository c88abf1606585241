"""``python -m grape_hf.cli``: the command where it is not on the path."""

import sys

from grape_hf.cli import main

sys.exit(main())
