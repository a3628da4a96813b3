"""Wheels that `first_gpu.sh` takes along to a machine without network, unpacked if the machine lacks their packages.

python benchmarks/carried.py --names        # which wheels to fetch
python benchmarks/carried.py FOLDER         # unpacks what is missing
"""

from __future__ import annotations

import importlib.metadata
import re
import sys
import zipfile
from pathlib import Path

WHEELS = Path(__file__).with_name("wheels")
NAMES = (
    # The package.
    "annotated-types", "fsspec", "omegaconf", "antlr4-python3-runtime", "pyarrow", "pydantic", "pydantic-core",
    "pyyaml", "safetensors", "tqdm", "typing-extensions", "typing-inspection", "xxhash",
    # Its tests.
    "execnet", "hypothesis", "iniconfig", "packaging", "pluggy", "psutil", "pygments", "pytest", "pytest-timeout",
    "pytest-xdist", "sortedcontainers",
)  # fmt: skip


def unpack(folder: Path) -> list[str]:
    """Unpacks the wheels of packages that this Python lacks; returns their names."""
    installed = {_plain(found.name) for found in importlib.metadata.distributions()}
    missing = [path for path in sorted(WHEELS.glob("*.whl")) if _plain(path.name.partition("-")[0]) not in installed]
    for path in missing:
        with zipfile.ZipFile(path) as wheel:
            wheel.extractall(folder)
    return [path.name.partition("-")[0] for path in missing]


def _plain(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    if sys.argv[1] == "--names":
        print("\n".join(NAMES))
    else:
        print("unpacked from benchmarks/wheels:", ", ".join(unpack(Path(sys.argv[1]))) or "nothing")
