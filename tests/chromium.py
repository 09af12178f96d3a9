"""Debian's headless Chromium, in which the report page is tested as its readers see it.

One browser serves a session of tests. It is optional: `missing()` says what a machine lacks.
"""

from __future__ import annotations

import base64
import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

DEBIAN = "needs Debian's chromium and chromium-driver (apt install chromium chromium-driver)"
FLAGS = [
    "--headless=new", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync",
    "--disable-background-networking", "--disable-component-update", "--hide-scrollbars",
]  # fmt: skip
RECORDER = "window.alerts = []; for (const name of ['alert', 'confirm', 'prompt'])" + (
    " window[name] = (text) => { window.alerts.push(String(text)); };"
)
"""What runs before every page: dialogs that a page opens are noted, and block nothing."""


def missing() -> str:
    """What this machine lacks for a browser; "" if nothing."""
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        return DEBIAN
    return "" if find_spec("selenium") else "needs the package selenium (the extra `test`)"


@contextmanager
def chromium(profile: Path) -> Iterator[Browser]:
    """A browser whose profile is a fresh directory; it ends with the context."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium") or ""
    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium's sandbox refuses root
    for flag in [*FLAGS, *sandbox, f"--user-data-dir={profile}"]:
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    driver = webdriver.Chrome(options, service)
    try:
        yield Browser(driver)
    finally:
        driver.quit()


class Browser:
    """One tab. `open` starts with no errors and no requests recorded."""

    def __init__(self, driver: Any) -> None:
        self.driver = driver
        self.url = ""
        self._cdp("Page.addScriptToEvaluateOnNewDocument", source=RECORDER)

    def open(
        self, page: Path | str, state: str = "", width: int = 1280, theme: str = "light"
    ) -> None:
        """Load a file or an address, on a screen of `width` CSS pixels. A phone's (under 600)
        is emulated as one: the page's own viewport tag decides how wide its layout is."""
        screen = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": width < 600}
        self._cdp("Emulation.setDeviceMetricsOverride", **screen)
        preference = {"name": "prefers-color-scheme", "value": theme}
        self._cdp("Emulation.setEmulatedMedia", media="", features=[preference])
        self.driver.get("about:blank")  # else a page that differs in the hash alone is not loaded
        self._clear()
        self.url = page.as_uri() if isinstance(page, Path) else page
        self.driver.get(self.url + state)

    def script(self, body: str, *arguments: Any) -> Any:
        """Value of a function body in the page; `arguments[0]` is the first argument."""
        return self.driver.execute_script(body, *arguments)

    def value(self, expression: str, *arguments: Any) -> Any:
        return self.script(f"return {expression}", *arguments)

    def wait_for(self, expression: str, seconds: float = 10) -> Any:
        """Value of an expression as soon as it is true."""
        from selenium.webdriver.support.ui import WebDriverWait

        return WebDriverWait(self.driver, seconds, 0.05).until(
            lambda _: self.value(expression), f"never true: {expression}"
        )

    def press(self, *keys: str) -> None:
        """Press keys one after another, wherever the focus is."""
        from selenium.webdriver import ActionChains

        ActionChains(self.driver).send_keys(*keys).perform()

    def errors(self) -> list[str]:
        """What the console and the page itself have recorded since `open`."""
        console = [entry["message"] for entry in self.driver.get_log("browser")]
        return console + self.value("(window.Report && window.Report.errors || []).map(String)")

    def requests(self) -> list[str]:
        """Addresses of all requests since `open`, without the page's own and data that it holds."""
        messages = [json.loads(e["message"])["message"] for e in self.driver.get_log("performance")]
        asked = [
            message["params"]["request"]["url"]
            for message in messages
            if message["method"] == "Network.requestWillBeSent"
        ]
        return [url for url in asked if url != self.url and not url.startswith("data:")]

    def screenshot(self, path: Path, whole: bool = True) -> None:
        """Write a PNG of the whole page, or of what the screen shows."""
        taken = self._cdp("Page.captureScreenshot", captureBeyondViewport=whole)
        path.write_bytes(base64.b64decode(taken["data"]))

    def print_pdf(self, path: Path) -> None:
        printed = self._cdp("Page.printToPDF", preferCSSPageSize=True)
        path.write_bytes(base64.b64decode(printed["data"]))

    def _clear(self) -> None:
        for kind in ("browser", "performance"):
            self.driver.get_log(kind)

    def _cdp(self, command: str, **arguments: Any) -> Any:
        return self.driver.execute_cdp_cmd(command, arguments)
