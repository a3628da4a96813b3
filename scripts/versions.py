"""Lists the versions of the documentation that lie in a folder, and sends its visitors to the newest.

python scripts/versions.py FOLDER URL    # URL: where the folder is served from
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

from packaging.version import Version


def main() -> None:
    """Writes `switcher.json`, which the pages of all versions read, and an `index.html` that leads to the newest."""
    folder, url = Path(sys.argv[1]), sys.argv[2].rstrip("/")
    versions = sorted((path.parent.name for path in folder.glob("*/index.html")), key=Version, reverse=True)
    entries = [{"version": name, "url": f"{url}/{name}/", "preferred": name == versions[0]} for name in versions]
    (folder / "switcher.json").write_text(json.dumps(entries, indent=1) + "\n", encoding="utf-8")
    page = f'<!doctype html><title>embedtrain</title><meta http-equiv="refresh" content="0; url={versions[0]}/">\n'
    (folder / "index.html").write_text(page, encoding="utf-8")


if __name__ == "__main__":
    main()
