"""`python -m embedtrain`."""

from __future__ import annotations

import sys

from embedtrain.cli import main

if __name__ == "__main__":
    sys.exit(main())
