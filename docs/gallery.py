"""Photograph the gallery in Chromium for docs/gallery.md: python docs/gallery.py [KEY]"""

from __future__ import annotations

import shutil
import sys
import tempfile
from pathlib import Path

from playwright.sync_api import sync_playwright

from foveate.catalogue.gallery import build

HERE = Path(__file__).parent
FLAGS = ["--no-sandbox", "--disable-gpu", "--no-first-run", "--disable-background-networking"]


def main(key: str = "fused_neighborhood_attention") -> None:
    with tempfile.TemporaryDirectory() as scratch, sync_playwright() as playwright:
        index = build(Path(scratch) / "site")
        browser = playwright.chromium.launch(
            executable_path=shutil.which("chromium") or shutil.which("google-chrome"), args=FLAGS
        )
        tab = browser.new_page(viewport={"width": 1200, "height": 900}, color_scheme="light")
        tab.goto(index.as_uri())
        tab.wait_for_selector(".ready")
        tab.screenshot(path=HERE / "gallery-index.png")
        tab = browser.new_page(viewport={"width": 1000, "height": 1150}, color_scheme="dark")
        tab.goto((index.parent / "papers" / f"{key}.html").as_uri())
        if tab.locator("canvas").count():
            box = tab.locator("canvas").first.bounding_box()
            assert box is not None
            tab.mouse.move(box["x"] + box["width"] / 3, box["y"] + box["height"] * 0.45)
        tab.screenshot(path=HERE / "gallery-page.png")
        browser.close()


if __name__ == "__main__":
    main(*sys.argv[1:])
