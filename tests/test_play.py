"""The page that steers: the clips of sample.py, requests that end, and a link that restores."""

import json
import shlex
import sys
from argparse import Namespace

import numpy as np
import pytest
import torch
from browsers import browser, check_looks, fault, press, request, served, wait  # noqa: F401

import sample
from pages import play
from runtime.checkpoint import WEIGHTS

SETTINGS = {"tab": "steer", "prompt": "a red circle moving left", "seed": 3, "cfg": 2}
SETTINGS |= {"VQ": 1, "MQ": 0.5, "TA": -1, "scale": 16, "from": 0, "to": 0.95}
DONE = "[...document.querySelectorAll('#clips progress')].map((bar) => bar.value).join()"
LEFT, RIGHT = "\ue012", "\ue014"  # keys, as WebDriver writes them


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """A server with the base model, moved a little, as the aligned one."""
    state = torch.load(WEIGHTS / "base.pt", weights_only=True)
    state["model"] = {name: 1.01 * value for name, value in state["model"].items()}
    aligned = tmp_path_factory.mktemp("aligned") / "last.pt"
    torch.save(state, aligned)
    files = {"base": WEIGHTS / "base.pt", "nrg_ckpt": WEIGHTS / "nrg.pt"}
    calls = play.Play(Namespace(**files, reward=WEIGHTS / "reward.pt", ckpt=[aligned]))
    with served("play.html", [calls.about, calls.sample, calls.save]) as server:
        yield Namespace(play=calls, server=server, aligned=str(aligned))


def steps_of(page, **settings):
    lines = request(page.server, "sample", **SETTINGS | settings).splitlines()
    return [json.loads(line) for line in lines]


def test_steps_of_a_request(page):
    steps = steps_of(page)
    assert list(dict.fromkeys(step["name"] for step in steps)) == ["steered", "base", page.aligned]
    base = [step for step in steps if step["name"] == "base"]
    times = [step["t"] for step in base]
    assert len(times) == 21 and times[0] == 1 and times[-1] == 0
    assert times == sorted(times, reverse=True)
    drifted = steps_of(page, tab="drift", strength=0)[20]
    assert (drifted["name"], drifted["film"]) == ("drifted", base[-1]["film"])
    aligned = steps_of(page, tab="drift", strength=1)[20]
    assert np.allclose(aligned["learned"], steps[-1]["learned"], atol=1e-3)


def test_bad_settings_are_refused(page):
    for changed, words in (
        ({"prompt": "a red dog"}, "unknown word 'dog'"),
        ({"TA": "x"}, "three numbers"),
        ({"tab": "drift", "strength": "x"}, "'x'"),
    ):
        status, line = fault(page.server, "sample", **SETTINGS | changed)
        assert status == 400 and words in line
    assert "not finite" in steps_of(page, scale=1e38)[20]["error"]


def test_the_page_steers_cancels_and_restores(page, browser):  # noqa: F811
    from selenium.webdriver import ActionChains

    browser.get("about:blank")
    browser.get(page.server.address + "#MQ=-2&seed=5")
    wait(browser, DONE, "1,1,1")
    form = browser.execute_script("return Object.fromEntries(new FormData($('form')))")
    assert (form["MQ"], form["seed"]) == ("-2", "5")
    slider = browser.find_element("name", "VQ")
    ActionChains(browser).drag_and_drop_by_offset(slider, 200, 0).perform()
    browser.find_element("name", "TA").send_keys(LEFT)  # ends the request before
    wait(browser, "form.elements.VQ.value", "2")
    wait(browser, DONE, "1,1,1")
    wait(browser, "$('alert').textContent", "")
    assert "VQ=2&MQ=-2&TA=0.9" in browser.current_url
    check_looks(browser)
    browser.find_element("css selector", "[value=steer]").send_keys(RIGHT)
    wait(browser, DONE, "1,1")
    check_looks(browser, 400)


def test_saved_clips_are_those_on_the_page_bit_for_bit(page, browser, tmp_path, monkeypatch):  # noqa: F811
    clips, saved, commands, look = [], [], [], page.play.look

    def watched_look(video, y):
        clips.append(video)
        return look(video, y)

    def run(command, **_):  # in this process
        commands.append(command[1:])
        monkeypatch.setattr(sys, "argv", command[1:])
        sample.main()
        return Namespace(stdout="wrote", stderr="")

    monkeypatch.setattr(page.play, "look", watched_look)
    monkeypatch.setattr(sample, "write_gif", lambda path, rows, **settings: saved.extend(rows))
    monkeypatch.setattr(play, "OUT", str(tmp_path))
    monkeypatch.setattr(play.subprocess, "run", run)
    flags = "prompt=a+red+circle+moving+left&seed=3&VQ=1&MQ=0.5&TA=-1&scale=12&from=0&to=0.9"
    browser.get("about:blank")
    browser.get(f"{page.server.address}#{flags}")
    wait(browser, DONE, "1,1,1")
    browser.find_element("css selector", "#steer button").click()
    wait(browser, "$('saved').textContent.split('wrote').length", 3)
    files = [f"--nrg-ckpt={WEIGHTS / 'nrg.pt'}", "--n=1"]
    command = ["sample.py", "--prompt=a red circle moving left", "--seed=3", "--cfg=2"]
    command += ["--nrg=1,0.5,-1", "--nrg-scale=12", "--nrg-interval=0,0.9", *files]
    assert commands == [
        [*command, f"--ckpt={WEIGHTS / 'base.pt'}", f"--out={tmp_path}/0"],
        [*command, f"--ckpt={page.aligned}", f"--out={tmp_path}/1"],
    ]
    lines = browser.execute_script("return $('saved').textContent").splitlines()
    assert [shlex.split(line)[1:] for line in lines[::2]] == commands
    base, steered, aligned, _ = saved
    assert torch.equal(base, clips[41]) and torch.equal(steered, clips[20])
    assert torch.equal(aligned, clips[62]) and not torch.equal(base, steered)
    assert len(list(tmp_path.rglob("*-nrg.png"))) == 2
