"""A headless Chromium, and requests to the servers of pages/."""

import json
import shutil
import threading
import time
import urllib.error
import urllib.parse
import urllib.request
from contextlib import contextmanager

import pytest

from pages.server import Server

FLAGS = ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking")
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))
LOW_CONTRAST = """// the elements whose text has a contrast below 4.5
document.documentElement.style.background = "Canvas";
const color = (element, name) => getComputedStyle(element)[name].match(/[\\d.]+/g).map(Number);
const light = (rgb) => [.2126, .7152, .0722].reduce((sum, w, i) =>
  sum + w * (rgb[i] <= 10 ? rgb[i] / 3295 : ((rgb[i] / 255 + .055) / 1.055) ** 2.4), 0);
return [...document.querySelectorAll("body *")].filter((element) => {
  const hasText = [...element.childNodes].some((node) => node.nodeType === 3 && node.data.trim());
  if (!hasText || !element.checkVisibility()) return false;
  let ground = element;
  while (color(ground, "backgroundColor")[3] === 0) ground = ground.parentElement;
  const lights = [light(color(element, "color")), light(color(ground, "backgroundColor"))];
  return (Math.max(...lights) + .05) / (Math.min(...lights) + .05) < 4.5;
}).map((element) => element.outerHTML.slice(0, 120));"""


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    options, driver = webdriver.ChromeOptions(), shutil.which("chromedriver")
    options.binary_location = shutil.which("chromium") or ""
    if not options.binary_location or not driver:
        pytest.skip("no Chromium with its driver on this machine")
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    with webdriver.Chrome(options, webdriver.ChromeService(driver)) as browser:
        yield browser


def press(browser, keys):
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(keys).perform()


def wait(browser, script, expected=True):
    """Waits until a JavaScript expression has a value."""
    end = time.monotonic() + 60
    while (value := browser.execute_script(f"return {script}")) != expected:
        assert time.monotonic() < end, f"{script} is {value}, not {expected}"
        time.sleep(0.1)


def check_looks(browser, width=1280):
    """The page fits its window, and its text can be read on a light and on a dark ground."""
    size = {"width": width, "height": 800, "deviceScaleFactor": 1, "mobile": width < 600}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= width
    for scheme in ("light", "dark"):
        media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
        assert browser.execute_script(LOW_CONTRAST) == []


@contextmanager
def served(page, calls):
    with Server(page, calls) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def request(server, call, **settings):
    """The bytes that a call answers."""
    address = f"http://{server.host}/{server.token}/{call}?{urllib.parse.urlencode(settings)}"
    with OPENER.open(urllib.request.Request(address, method="POST"), timeout=60) as response:
        return response.read()


def fault(server, call, **settings):
    """(status, message) of a call that is refused."""
    with pytest.raises(urllib.error.HTTPError) as error:
        request(server, call, **settings)
    return error.value.code, json.loads(error.value.read())["error"]
