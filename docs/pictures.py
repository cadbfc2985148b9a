"""Make the three pictures of the README anew: `python docs/pictures.py`. Needs selenium, Chromium and its driver.

pictures/inspect.png   the page that `fxsplit inspect ... --format html` writes
pictures/compare.png   the page that `fxsplit compare -c recipes/table1/quick.yaml` writes, which takes minutes
pictures/train.svg     the terminal in the middle of a run
"""

from __future__ import annotations

import io
import re
import shutil
from contextlib import chdir
from pathlib import Path
from tempfile import TemporaryDirectory

from PIL import Image
from rich.terminal_theme import MONOKAI
from selenium import webdriver

import fxsplit
from fxsplit.report import StepRecord
from fxsplit.spec import read_recipe, resolve
from fxsplit_cli.main import main
from fxsplit_cli.terminal import Terminal
from fxsplit_cli.views import LiveView

ROOT = Path(__file__).resolve().parent.parent
PICTURES = ROOT / "docs" / "pictures"
LARGEST_BYTES = 150_000


class Snapshot(LiveView):
    """Says all that a live view says, and draws its panel once, in the middle of an epoch after the cut has moved."""

    def __init__(self, model: str, console: Terminal) -> None:
        super().__init__(model, console)
        self.picture = ""

    def step_done(self, record: StepRecord) -> None:
        super().step_done(record)
        if record.phase == 1 and record.step < record.steps and not self.picture:
            self.console.print(self.panel())
            self.picture = self.console.export_svg(title="fxsplit train", theme=MONOKAI, unique_id="fxsplit")


def picture_training(path: Path) -> None:
    """Train by the recipe of the README's first run, and draw what its terminal shows."""
    console = Terminal(file=io.StringIO(), record=True, force_terminal=True, color_system="truecolor", width=96)
    spec = resolve(read_recipe(ROOT / "recipes" / "digits-l2l.yaml"), {"experiment": "digits"})
    view = Snapshot(spec.model, console)
    with TemporaryDirectory() as folder, chdir(folder):
        fxsplit.train(spec, view)
    # A picture loads nothing: its fonts are those at hand.
    path.write_text(re.sub(r"@font-face \{.*?\}\s*", "", view.picture, flags=re.DOTALL), encoding="utf-8")


def picture_inspection(path: Path) -> None:
    """Inspect a model, and take a picture of its page."""
    with TemporaryDirectory() as folder:
        page = Path(folder) / "page.html"
        model = ["timm:resnext50_32x4d", "--img-size", "64", "--epochs", "30"]
        if main(["inspect", *model, "--l2l", "--format", "html", "-o", str(page)]):
            raise SystemExit("the model cannot be inspected")
        picture_page(page, path)


def picture_comparison(path: Path) -> None:
    """Do the quick comparison, if it is not done, and take a picture of its page."""
    with chdir(ROOT):
        if main(["compare", "-c", "recipes/table1/quick.yaml"]):
            raise SystemExit("the comparison has failed")
    picture_page(ROOT / "output" / "compare" / "quick.html", path)


def picture_page(page: Path, path: Path) -> None:
    """Open a page in Chromium, and take a picture of its upper part."""
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or shutil.which("google-chrome") or ""
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    # Containers have neither a sandbox for root nor much shared memory.
    for argument in ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--hide-scrollbars"):
        options.add_argument(argument)
    with webdriver.Chrome(options, service) as browser:
        browser.set_window_size(1100, 1000)
        browser.get(page.as_uri())
        shot = browser.get_screenshot_as_png()
    # A page has few colours, and a palette makes the file a third of its size.
    Image.open(io.BytesIO(shot)).convert("RGB").quantize(64).save(path, optimize=True)


if __name__ == "__main__":
    picture_training(PICTURES / "train.svg")
    picture_inspection(PICTURES / "inspect.png")
    picture_comparison(PICTURES / "compare.png")
    for picture in PICTURES.iterdir():
        size = picture.stat().st_size
        print(f"{picture.relative_to(ROOT)}: {size:,} bytes")
        if size > LARGEST_BYTES:
            raise SystemExit(f"{picture.name} is larger than {LARGEST_BYTES:,} bytes")
