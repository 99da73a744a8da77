"""Takes the screenshots of the pages in a real browser: report, playground and notebook, with the default model.

    pip install nbconvert ipykernel ipywidgets                     # beside armorm[full] and chromium
    python tools/screenshots.py [all | report playground notebook]

Writes docs/images/NAME.png; report and playground as they look on a desktop and on a phone. The report is on test rows of
the real data sets ($ARMORM_DATA, else ../shared/data).
"""

from __future__ import annotations

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from PIL import Image
from playwright.sync_api import Browser, Page, sync_playwright

from armorm import ArmoRM
from armorm.serving.engine import ScoringEngine
from armorm.serving.server import running
from armorm.serving.settings import ServingSettings

TARGET = Path("docs/images")
CHROMIUM = os.environ.get("ARMORM_CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
DATA = Path(os.environ.get("ARMORM_DATA", "../shared/data"))
REPORT_DATA = ("ratings/diasafety.jsonl.gz", "preferences/hh_harmless.jsonl.gz")
DESKTOP, PHONE, HEIGHT = 1280, 390, 844  # CSS pixels
GAP, GREY = 24, (218, 218, 223)  # between the two screens
COLOURS = 256
CELLS = (
    """from armorm import ArmoRM

rm = ArmoRM.from_pretrained()
found = rm.compare(
    "My dog died.",
    "I'm so sorry. Would you like to talk about him?",
    "It was only an animal.",
)
found""",
    "found.plot()",
    """rm.rank(
    "How do I get a wine stain out of a shirt?",
    [
        "Dab it with cold water and dish soap, then rinse.",
        "I don't know.",
        "Who cares? Throw it away.",
    ],
)""",
)


def report(browser: Browser, folder: Path) -> None:
    """The first screen of a report."""
    data = [argument for name in REPORT_DATA for argument in ("--data", DATA / name)]
    command = [sys.executable, "-m", "armorm", "report", "armorm-small-rm", *data, "--limit", "250"]
    subprocess.run([*command, "-o", folder / "report.html"], check=True)
    save(two_screens(browser, (folder / "report.html").as_uri(), lambda page: None), "report")


def playground(browser: Browser, folder: Path) -> None:
    """The playground after its example was scored."""
    with running(ScoringEngine(ArmoRM.from_pretrained(), ServingSettings(name="armorm-small-rm", ui=True))) as url:
        save(two_screens(browser, f"{url}/ui/", scored), "playground")


def scored(page: Page) -> None:
    """Wait for the answer to a click on Score, shown in full."""
    button = page.get_by_role("button", name="Score", exact=True)
    button.wait_for(timeout=60_000)
    button.click()
    page.get_by_role("heading", name="better than").wait_for(timeout=60_000)
    page.wait_for_timeout(1_000)
    page.evaluate("scrollTo(0, 0)")


def notebook(browser: Browser, folder: Path) -> None:
    """A notebook, run by a real kernel."""
    import nbformat
    from nbconvert import HTMLExporter
    from nbconvert.preprocessors import ExecutePreprocessor

    book = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(text) for text in CELLS])
    ExecutePreprocessor(timeout=300, kernel_name="python3").preprocess(book)
    (folder / "notebook.html").write_text(HTMLExporter().from_notebook_node(book)[0], encoding="utf-8")
    page = browser.new_page(viewport={"width": 920, "height": HEIGHT})
    page.goto((folder / "notebook.html").as_uri())
    page.screenshot(path=folder / "notebook.png", full_page=True)
    save(Image.open(folder / "notebook.png"), "notebook")


def two_screens(browser: Browser, address: str, prepare: Callable[[Page], None]) -> Image.Image:
    """The first screen of a page on a desktop and, to the right of it, on a phone."""
    shots = []
    with tempfile.TemporaryDirectory() as folder:
        for width in (DESKTOP, PHONE):
            page = browser.new_page(viewport={"width": width, "height": HEIGHT})
            page.goto(address)
            prepare(page)
            page.screenshot(path=Path(folder, f"{width}.png"))
            shots.append(Image.open(Path(folder, f"{width}.png")).convert("RGB"))
            page.close()
    both = Image.new("RGB", (DESKTOP + GAP + PHONE, HEIGHT), GREY)
    both.paste(shots[0], (0, 0))
    both.paste(shots[1], (DESKTOP + GAP, 0))
    return both


def save(picture: Image.Image, name: str) -> None:
    """Write a picture with few colours, which makes it small."""
    target = TARGET / f"{name}.png"
    picture.convert("RGB").quantize(COLOURS, dither=Image.Dither.NONE).save(target, optimize=True)
    print(f"wrote {target}: {picture.width} x {picture.height}, {target.stat().st_size:,} bytes")


PICTURES: dict[str, Callable[[Browser, Path], Any]] = {
    "report": report,
    "playground": playground,
    "notebook": notebook,
}


def main() -> None:
    parser = argparse.ArgumentParser(description="Takes the screenshots of the pages.")
    parser.add_argument("names", nargs="*", choices=[*PICTURES, "all"], default="all")
    names = parser.parse_args().names
    with sync_playwright() as playwright, tempfile.TemporaryDirectory() as folder:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=["--no-sandbox", "--disable-gpu"])
        for name in PICTURES if "all" in names else names:
            PICTURES[name](browser, Path(folder))
        browser.close()


if __name__ == "__main__":
    main()
