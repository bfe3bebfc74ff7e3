"""The page in a real browser: it asks for nothing, fits a phone, and follows the reader's colour scheme."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
from html import unescape

import pytest
from report_data import example_report

from lightning_prune.report.html import render_html

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(BROWSER is None, reason="no Chromium is installed")

# Shows the page in a frame as wide as a screen, and writes down what the frame then knows about itself.
PROBE = """<!doctype html><body style="margin:0"><pre id="found"></pre>
<iframe id="page" src="report.html" style="border:0;width:{width}px;height:3000px"></iframe>
<script>
document.getElementById("page").onload = () => {{
  const view = document.getElementById("page").contentWindow, page = view.document;
  const shown = [...page.querySelectorAll("svg, section, h1, table")].filter(e => e.getClientRects().length);
  document.getElementById("found").textContent = JSON.stringify({{
    wide: page.documentElement.scrollWidth,
    requests: view.performance.getEntriesByType("resource").map(e => e.name),
    ground: view.getComputedStyle(page.body).backgroundColor,
    shown: shown.length,
    flat: shown.filter(e => e.getBoundingClientRect().width < 1).length,
  }});
}};
</script>"""


def look(folder, width: int, *flags: str) -> dict:
    (folder / "report.html").write_text(render_html(example_report()), encoding="utf-8")
    (folder / "probe.html").write_text(PROBE.format(width=width), encoding="utf-8")
    command = [
        BROWSER, "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
        "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--hide-scrollbars", "--allow-file-access-from-files", f"--user-data-dir={folder / 'user'}",
        "--virtual-time-budget=2000",
        f"--window-size={max(width, 600)},3000", *flags, "--dump-dom", (folder / "probe.html").as_uri(),
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    found = re.search(r'<pre id="found">(.+?)</pre>', done.stdout, re.DOTALL)
    assert found, done.stderr[-2000:]
    return json.loads(unescape(found[1]))


@pytest.mark.parametrize("width", [360, 768, 1280])
def test_page_fits_the_screen_and_asks_for_nothing(tmp_path, width):
    found = look(tmp_path, width)
    assert found["wide"] == width
    assert found["requests"] == []
    assert found["shown"] > 20
    assert found["flat"] == 0


def test_page_is_dark_where_the_reader_wants_it_dark(tmp_path):
    light = look(tmp_path, 800, "--blink-settings=preferredColorScheme=1")
    dark = look(tmp_path, 800, "--blink-settings=preferredColorScheme=0")
    assert light["ground"] == "rgb(246, 247, 249)"
    assert dark["ground"] == "rgb(15, 18, 23)"
