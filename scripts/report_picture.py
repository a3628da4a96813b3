"""Makes the README's picture of a report: the page of a run in Chromium, its numbers compared with the run's.

    python scripts/report_picture.py runs/quickstart docs/pictures/report.png

Needs Chromium and the test extra. `scripts/quickstart.sh` makes the run of the README.
"""

from __future__ import annotations

import base64
import json
import sys
import tempfile
from pathlib import Path

from PIL import Image

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from embedtrain.report.facts import read_facts  # noqa: E402
from embedtrain.report.headline import cards_of  # noqa: E402
from tests.browser.chromium import Page, find_chromium, open_page  # noqa: E402

WIDTH, HEIGHT = 1280, 1480
COLORS = 128

CARDS = """
[...document.querySelectorAll('#headline > div')].map(card => card.querySelector('dt').innerText + ' ' +
  card.querySelector('.value').innerText)
"""


def main(run: str, output: str) -> None:
    """Writes the picture, and prints the numbers in it.

    Args:
        run: the run folder, which has a report.html.
        output: the PNG file.
    """
    program = find_chromium()
    if program is None:
        raise SystemExit("there is no Chromium: apt-get install chromium")
    with tempfile.TemporaryDirectory() as folder, open_page(program, Path(folder)) as page:
        shown = photograph(page, Path(run) / "report.html", Path(output))
    facts = read_facts(run)
    expected = [f"{card.name} {card.value}" for card in cards_of(facts.logged, facts.settings, {})]
    if shown[: len(expected)] != expected:
        raise SystemExit(f"the page shows {shown}, and the run says {expected}: write its report anew")
    print("\n".join(shown))


def photograph(page: Page, report: Path, output: Path) -> list[str]:
    """Writes a picture of the top of a page and of its map; returns the numbers that stand out."""
    page.call("Emulation.setDeviceMetricsOverride", width=WIDTH, height=HEIGHT, deviceScaleFactor=1, mobile=False)
    page.call("Emulation.setScrollbarsHidden", hidden=True)
    page.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "light"}])
    page.open(report.resolve().as_uri())
    page.wait_for("document.readyState === 'complete'")
    # The picture has the sections that say most.
    page.evaluate("document.querySelectorAll('#speed-and-learning-rate, #what-to-try-next').forEach(e => e.remove())")
    plots = page.evaluate("document.querySelectorAll('section .plot').length")
    for place in range(plots):
        page.evaluate(f"document.querySelectorAll('section .plot')[{place}].scrollIntoView()")
        page.wait_for(f"document.querySelectorAll('section .plot')[{place}].querySelector('canvas') !== null")
    page.evaluate("scrollTo(0, 0)")
    data = page.call("Page.captureScreenshot")["data"]
    output.write_bytes(base64.b64decode(data))
    # Few colours: a third of the bytes.
    Image.open(output).convert("RGB").quantize(COLORS).save(output, optimize=True)
    cards: list[str] = json.loads(page.evaluate(f"JSON.stringify({CARDS.strip()})"))
    return cards


if __name__ == "__main__":
    main(*sys.argv[1:])
