"""A page in headless Chromium, driven by ChromeDriver over HTTP (W3C WebDriver).

Chromium's own --window-size stops at 500 pixels; a phone's width needs the driver's emulation.
"""

import base64
import contextlib
import json
import re
import shutil
import subprocess
import time
import urllib.request

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run",
    "--disable-background-networking", "--disable-component-update", "--disable-sync",
    "--hide-scrollbars",
)  # fmt: skip


class Page:
    """An open page."""

    def __init__(self, session):
        self.session = session

    def run(self, script):
        """What a script returns."""
        return call(f"{self.session}/execute/sync", {"script": script, "args": []})

    def until(self, condition, seconds=60):
        """Waits for a JavaScript expression to be true."""
        end = time.monotonic() + seconds
        while not self.run(f"return Boolean({condition})"):
            assert time.monotonic() < end, condition
            time.sleep(0.1)

    def choose_files(self, selector, paths):
        """Gives files to an <input type=file>."""
        asked = {"using": "css selector", "value": selector}
        (element,) = call(f"{self.session}/element", asked).values()
        text = "\n".join(map(str, paths))
        call(f"{self.session}/element/{element}/value", {"text": text})

    def download_to(self, folder):
        """Where downloads go, without asking."""
        params = {"behavior": "allow", "downloadPath": str(folder)}
        asked = {"cmd": "Browser.setDownloadBehavior", "params": params}
        call(f"{self.session}/goog/cdp/execute", asked)

    def screenshot(self):
        """PNG bytes of the whole page."""
        asked = {"cmd": "Page.captureScreenshot", "params": {"captureBeyondViewport": True}}
        return base64.b64decode(call(f"{self.session}/goog/cdp/execute", asked)["data"])


def call(url, content, method="POST"):
    request = urllib.request.Request(url, json.dumps(content).encode(), method=method)
    request.add_header("Content-Type", "application/json")
    with urllib.request.urlopen(request, timeout=120) as answer:
        return json.loads(answer.read())["value"]


@contextlib.contextmanager
def opened(uri, width, profile, dark=False):
    """The page at `uri`, `width` CSS pixels wide; `profile` is a new folder."""
    driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
    try:
        port = next(filter(None, (re.search(r"on port (\d+)\.", line) for line in driver.stdout)))
        root = f"http://127.0.0.1:{port[1]}"
        metrics = {"width": width, "height": 900, "pixelRatio": 1, "mobile": width < 800}
        options = {
            "binary": CHROMIUM,
            "args": [*FLAGS, f"--user-data-dir={profile}"],
            "mobileEmulation": {"deviceMetrics": metrics},
        }
        wanted = {"capabilities": {"alwaysMatch": {"goog:chromeOptions": options}}}
        session = f"{root}/session/{call(f'{root}/session', wanted)['sessionId']}"
        scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        call(
            f"{session}/goog/cdp/execute",
            {"cmd": "Emulation.setEmulatedMedia", "params": {"features": [scheme]}},
        )
        call(f"{session}/url", {"url": uri})
        yield Page(session)
        call(session, {}, "DELETE")
    finally:
        driver.terminate()
        driver.wait()
        driver.stdout.close()
