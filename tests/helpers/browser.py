"""A page as a person's browser shows it: Chromium without a window."""

from __future__ import annotations

import shutil
import subprocess
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service
from selenium.webdriver.chrome.webdriver import WebDriver

from tests.helpers.needs import lacking

# the tests run as root, without a GPU, and nothing may be asked of a network
OPTIONS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-sync",
    "--disable-background-networking",
    "--disable-component-update",
    "--no-first-run",
    "--hide-scrollbars",
)

# the text of a part of a page, with what lies in shadow roots
DEEP_TEXT = """function text(node) {
  if (node.nodeType === Node.TEXT_NODE) return node.textContent;
  if (["STYLE", "SCRIPT", "TEMPLATE"].includes(node.nodeName)) return "";
  const children = [...(node.shadowRoot ? node.shadowRoot.childNodes : []), ...node.childNodes];
  return children.map(text).join(" ");
}"""


def chromium() -> str:
    """Return the program; where there is none, the test is skipped, or fails in CI."""
    return shutil.which("chromium") or lacking("needs Debian's chromium (tests/apt-packages.txt)")


def show(url: str, *, home: Path, picture: Path | None = None, height: int = 3000) -> str:
    """Return the document that ``url`` has become in the browser, as HTML, and take a ``picture``
    (PNG) of it. ``home`` is an empty folder for what a browser keeps.
    """
    words = [chromium(), *OPTIONS, f"--user-data-dir={home}", f"--window-size=1100,{height}"]
    if picture:
        subprocess.run(
            [*words, f"--screenshot={picture}", url], check=True, capture_output=True, timeout=120
        )
    done = subprocess.run(
        [*words, "--dump-dom", url], check=True, capture_output=True, text=True, timeout=120
    )
    return done.stdout


@contextmanager
def browser(home: Path) -> Iterator[WebDriver]:
    """Yield a browser to be driven, for pages that fill themselves later and elsewhere than in the
    document (TensorBoard's shadow roots). ``home`` as for ``show``.
    """
    driver = shutil.which("chromedriver")
    if driver is None:
        lacking("needs Debian's chromium-driver (tests/apt-packages.txt)")
    options = webdriver.ChromeOptions()
    options.binary_location = chromium()
    for word in (*OPTIONS, f"--user-data-dir={home}", "--window-size=1400,1000"):
        options.add_argument(word)
    one = webdriver.Chrome(service=Service(driver), options=options)
    try:
        yield one
    finally:
        one.quit()


def wait_for(driver: WebDriver, *texts: str, timeout_s: float = 120.0) -> str:
    """Return all text that the page shows, once all ``texts`` are in it; white space, which is cut
    and put anywhere, counts nowhere and is left out.
    """
    until = time.monotonic() + timeout_s
    while True:
        shown = "".join(str(driver.execute_script(f"return ({DEEP_TEXT})(document.body)")).split())
        missing = [text for text in texts if "".join(text.split()) not in shown]
        if not missing:
            return shown
        assert time.monotonic() < until, f"{missing} is not on the page:\n{shown}"
        time.sleep(0.5)
