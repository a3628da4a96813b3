"""`python -m embedtrain`."""

from __future__ import annotations

from embedtrain.cli import main
from embedtrain.distributed.launcher import leave

if __name__ == "__main__":
    leave(main())
