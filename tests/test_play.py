"""The page that steers: the clips of sample.py, requests that end, and a link that restores."""

import json
import re
import sys
import threading
import urllib.request
from argparse import Namespace

import numpy as np
import pytest
import torch
from test_label import LOW_CONTRAST, OPENER, browser, fault, wait  # noqa: F401

import sample
from pages.play import Play
from pages.server import Server
from runtime.checkpoint import WEIGHTS

SETTINGS = {"tab": "steer", "prompt": "a red circle moving left", "seed": "3", "cfg": "2"}
SETTINGS |= {"VQ": "1", "MQ": "0.5", "TA": "-1", "scale": "16", "from": "0", "to": "0.95"}


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A server with the base model, moved a little, as the aligned one."""
    state = torch.load(WEIGHTS / "base.pt", weights_only=True)
    state["model"] = {name: 1.01 * value for name, value in state["model"].items()}
    aligned = tmp_path_factory.mktemp("aligned") / "last.pt"
    torch.save(state, aligned)
    files = {"base": WEIGHTS / "base.pt", "nrg_ckpt": WEIGHTS / "nrg.pt"}
    files |= {"reward": WEIGHTS / "reward.pt", "ckpt": [aligned], "device": "cpu"}
    play = Play(Namespace(**files))
    with Server("play.html", play.calls()) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield Namespace(play=play, server=server, aligned=str(aligned))
        server.shutdown()


def ask(page, **settings):
    address = page.server.address.replace("play.html", "sample")
    request = urllib.request.Request(address, json.dumps(SETTINGS | settings).encode())
    with OPENER.open(request, timeout=60) as response:
        return [json.loads(line) for line in response]


def test_clips_are_those_of_sample_py_bit_for_bit(page, tmp_path, monkeypatch):
    command = ["sample.py", *sum(page.play.flags(SETTINGS), []), "--n=1", f"--out={tmp_path}"]
    videos = []
    monkeypatch.setattr(sample, "write_gif", lambda path, rows, **_: videos.extend(rows))
    monkeypatch.setattr(sys, "argv", command)
    sample.main()
    seen = {}
    look = page.play.look

    def kept(video, y):
        seen["last"] = video.clone()
        return look(video, y)

    monkeypatch.setattr(page.play, "look", kept)
    clips = {}
    page.play.sample(SETTINGS)(lambda line: clips.update({line["name"]: seen["last"]}))
    assert torch.equal(clips["base"], videos[0]) and torch.equal(clips["steered"], videos[1])
    assert not torch.equal(clips["base"], clips["steered"])


def test_lines_of_a_request(page):
    steps = ask(page)
    assert list(dict.fromkeys(step["name"] for step in steps)) == ["steered", "base", page.aligned]
    base = [step for step in steps if step["name"] == "base"]
    assert [step["done"] for step in base] == pytest.approx(np.linspace(0, 1, 21))
    assert base[0]["t"] == 1 and base[-1]["t"] == 0
    drifted = ask(page, tab="drift", strength="0")[20]
    assert (drifted["name"], drifted["film"]) == ("drifted", base[-1]["film"])
    aligned = ask(page, tab="drift", strength="1")[20]
    assert np.allclose(aligned["learned"], steps[-1]["learned"], atol=1e-3)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prompt": "a red dog"}, "unknown word 'dog'"),
        ({"cfg": "inf"}, "finite"),
        ({"seed": "-1"}, "whole number"),
        ({"VQ": []}, "three numbers"),
        ({"from": "1", "to": "0"}, "from 0 to 1"),
    ],
)
def test_bad_settings_are_refused(page, changed, words):
    status, line = fault(ask, page, **changed)
    assert status == 400 and words in line


def test_the_page_steers_cancels_and_restores(page, browser):  # noqa: F811
    from selenium.webdriver import ActionChains

    done = "[...document.querySelectorAll('#clips progress')].map((bar) => bar.value).join()"
    browser.get("about:blank")
    browser.get(page.server.address + "#MQ=-2&seed=5")
    wait(browser, done, "1,1,1")
    assert (
        browser.execute_script("return form.elements.MQ.value + form.elements.seed.value") == "-25"
    )
    slider = browser.find_element("name", "VQ")
    ActionChains(browser).drag_and_drop_by_offset(slider, 110, 0).perform()
    browser.find_element("name", "TA").send_keys("\ue012")  # left: ends the request before
    wait(browser, "form.elements.VQ.value", "2")
    wait(browser, done, "1,1,1")
    wait(browser, "$('alert').hidden", True)
    assert re.search("VQ=2&MQ=-2&TA=0.9", browser.current_url)
    assert browser.execute_script(LOW_CONTRAST) == []
    browser.find_element("css selector", "[value=drift]").click()
    wait(browser, done, "1,1")
    size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
