"""The page that steers: the clips of sample.py, requests that end, and a link that restores."""

import io
import json
import shlex
import sys
from argparse import Namespace
from contextlib import redirect_stdout

import numpy as np
import pytest
import torch
from browsers import browser, check_looks, fault, press, request, served, wait  # noqa: F401

import sample
from pages import play
from runtime.checkpoint import WEIGHTS

SETTINGS = {"tab": "steer", "prompt": "a red circle moving left", "seed": 3, "cfg": 2}
SETTINGS |= {"nrg": "1,0.5,-1", "nrg-scale": 16, "nrg-interval": "0,0.95"}
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


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"prompt": "a red dog"}, "unknown word 'dog'"),
        ({"cfg": "inf"}, "finite"),
        ({"seed": "-1"}, "whole number"),
        ({"nrg": "1,1"}, "three numbers"),
        ({"nrg-interval": "1,0"}, "from 0 to 1"),
        ({"tab": "drift", "strength": "x"}, "'x'"),
    ],
)
def test_bad_settings_are_refused(page, changed, words):
    status, line = fault(page.server, "sample", **SETTINGS | changed)
    assert status == 400 and words in line


def test_a_clip_that_is_not_finite_is_an_error(page):
    assert "not finite" in steps_of(page, **{"nrg-scale": 1e38})[-43]["error"]


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
    wait(browser, "$('alert').hidden")
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

    def watched_gif(path, rows, **settings):
        saved.extend(rows)
        write_gif(path, rows, **settings)

    def run(command, **_):  # in this process
        commands.append(command[1:])
        monkeypatch.setattr(sys, "argv", command[1:])
        output = io.StringIO()
        with redirect_stdout(output):
            sample.main()
        return Namespace(stdout=output.getvalue(), stderr="")

    write_gif = sample.write_gif
    monkeypatch.setattr(page.play, "look", watched_look)
    monkeypatch.setattr(sample, "write_gif", watched_gif)
    monkeypatch.setattr(play, "OUT", str(tmp_path))
    monkeypatch.setattr(play.subprocess, "run", run)
    flags = "prompt=a+red+circle+moving+left&seed=3&VQ=1&MQ=0.5&TA=-1&nrg-scale=12&from=0&to=0.9"
    browser.get("about:blank")
    browser.get(f"{page.server.address}#{flags}")
    wait(browser, DONE, "1,1,1")
    browser.find_element("id", "save").click()
    wait(browser, "$('saved').textContent.split('wrote ').length", 3)
    prompt = ["--prompt=a red circle moving left", "--seed=3", "--cfg=2"]
    base = [f"--ckpt={WEIGHTS / 'base.pt'}", f"--nrg-ckpt={WEIGHTS / 'nrg.pt'}"]
    guidance = ["--nrg=1,0.5,-1", "--nrg-scale=12", "--nrg-interval=0,0.9"]
    assert commands == [
        ["sample.py", "--n=1", *prompt, *base, *guidance, f"--out={tmp_path}"],
        ["sample.py", "--n=1", *prompt, f"--ckpt={page.aligned}", f"--out={tmp_path}/aligned-1"],
    ]
    lines = browser.execute_script("return $('saved').textContent").splitlines()
    shown = [shlex.split(line)[1:] for line in lines if line.startswith("python sample.py")]
    assert shown == commands
    assert torch.equal(saved[0], clips[41]) and torch.equal(saved[1], clips[20])
    assert torch.equal(saved[2], clips[62]) and not torch.equal(saved[0], saved[1])
    names = {path.name for path in tmp_path.rglob("*.*")}
    assert names == {
        "a-red-circle-moving-left" + end for end in ("-nrg.gif", "-nrg.png", ".gif", ".png")
    }
