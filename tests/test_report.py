"""The report page and the charts: what they show, and how the page behaves in a browser."""

import io
import math
import re
import shutil
from base64 import b64decode
from itertools import product
from xml.etree import ElementTree

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from browsers import browser  # noqa: F401
from wired import CPU

from real_data.video import to_pixels
from studies.catalogue import ROOT
from studies.jobs import Settings
from studies.report import clips, page
from studies.report.charts import Chart, Series, curve, picture

SHIPPED = ROOT / "results" / "report.html"
METHODS = ["sft", "rwr", "dpo-schedule", "dpo-constant", "dpo-refreshed", "nft-refreshed"]
ROWS = ["base", *METHODS, "nrg-1-1-1"]
SVG = "{http://www.w3.org/2000/svg}"


def rows_of(text):
    return re.findall(r'<tr id="([\w-]+)">', text)


def test_the_shipped_page_is_complete_and_needs_nothing_else():
    text = SHIPPED.read_text()
    assert len(text.encode()) < 3e6 and rows_of(text) == ROWS
    ids = re.findall(r'\bid="([^"]+)"', text)
    links = re.findall(r'href="#(\w+)"', text) + re.findall(r'getElementById\("(\w+)"\)', text)
    assert len(set(ids)) == len(ids) and not set(links) - set(ids)
    assert not re.search(r"{{|}}|@import|\bnan\b", text)
    urls = re.findall(r'(?:src|href)="(.*?)"', text) + re.findall(r"url\((.*?)\)", text)
    assert len(urls) > 80 and all(url.startswith(("#", "data:")) for url in urls)
    labels = re.findall(r'(?:alt|role="img" aria-label)="(.*?)"', text)
    assert len(labels) > 80 and all(len(label) > 10 for label in labels)


def test_rows_of_missing_policies_are_taken_from_the_page_before(monkeypatch, tmp_path, capsys):
    settings = Settings("report", device=CPU, work=tmp_path / "work", out=tmp_path)
    sft = clips.policies(settings)["sft"][2]
    sft.parent.mkdir(parents=True)
    shutil.copy(clips.WEIGHTS / "base.pt", sft)
    calls = []

    def sample_prompts(model, words, prompts, seed, device):
        calls.append(model)
        return torch.full((len(prompts), 3, 8, 32, 32), 0.01 * len(calls))

    monkeypatch.setattr(clips, "sample_prompts", sample_prompts)
    shipped = SHIPPED.read_text()
    earlier = {name: re.search(rf'<tr id="{name}".*?</tr>', shipped, re.DOTALL)[0] for name in ROWS}
    before = shipped.replace(earlier["rwr"], "")
    (tmp_path / "report.html").write_text(before)
    shutil.copy(ROOT / "results" / "align.json", tmp_path)
    page.run(settings)
    text, printed = (tmp_path / "report.html").read_text(), capsys.readouterr().out
    assert rows_of(text) == [name for name in ROWS if name != "rwr"]
    assert len(calls) == 3  # base, SFT and Flow-NRG
    assert earlier["dpo-constant"] in text and earlier["sft"] not in text
    assert "clips of SFT" not in printed and "clips of Flow-RWR: none, since" in printed
    assert printed.count("as on the page before") == 4
    assert "0.87 ± 0.12" in text and "Choosing beta" not in text  # align alone is in this folder


def test_a_row_shows_means_of_all_clips_and_scores_of_each(monkeypatch):
    videos = torch.rand(3, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    scores = torch.tensor([[0.25, 0.5, 1.0], [0.75, 0.5, 0.0], [0.5, -0.5, 0.5]])
    monkeypatch.setattr(clips, "sample_prompts", lambda *args: videos)
    monkeypatch.setattr(clips.world, "oracle", lambda *args: scores)
    row = clips.sampled_row("x", "<b>", "note", None, [], CPU)
    shown = re.findall(r"--v: ([\d.]+)\".*?</span>(−?[\d.]+)<", row)
    assert shown[:3] == [("0.50", "0.50"), ("0.17", "0.17"), ("0.50", "0.50")]
    assert shown[10] == ("0.00", "−0.50") and "&lt;b&gt;" in row and "mean of 3" in row
    last = re.findall(r"base64,(.*?)\)", row)[2]
    sheet = imageio.imread(io.BytesIO(b64decode(last)))
    assert sheet.shape == (8, 4 * 8, 3)
    frame = sheet[:, 8:16].astype(int)
    assert np.abs(frame - to_pixels(videos[2])[1]).max() <= 3  # 6 bits of 8


# ---------------------------------------------------------------------------------------------
# Charts


def drawn(*charts):
    return ElementTree.fromstring(picture(list(charts)))


def points(root):
    return [line.get("points") for line in root.iter(f"{SVG}polyline")]


def line(name, xs, ys, spread=0.0):
    return Series(name, xs, [(y, spread) for y in ys])


def test_a_chart_shows_its_points_where_they_belong():
    series = [line("a", [0, 1, 2], [0.0, 0.0, 1.0]), line("b<c", [0], [0.5], 0.5)]
    root = drawn(Chart("<t>", series, "x & y", "z", level=0.5))
    # x from 62 + 10 to 348 - 10; y from 274 up to 30 + 2 x 17 for -.05 to 1.05:
    # 274 - (y + .05) 210 / 1.1
    assert points(root) == ["72.0,264.5 205.0,264.5 338.0,73.5", "72.0,169.0"]
    (bar,) = (path for path in root.iter(f"{SVG}path") if path.get("class") == "spread")
    assert bar.get("d") == "M72.0 264.5V73.5"
    texts = {text.text: text for text in root.iter(f"{SVG}text")}
    assert {"<t>", "x & y", "z", "a", "b<c", "0.5", "1"} <= texts.keys()
    (level,) = (path for path in root.iter(f"{SVG}path") if path.get("class") == "level")
    assert level.get("d") == "M62 169.0H348"


@pytest.mark.parametrize(("axis", "xs"), [("log", [1, 10, 100]), ("root", [0, 1, 4])])
def test_scales_of_an_axis(axis, xs):
    root = drawn(Chart("t", [line("a", xs, [0.0, 0.0, 1.0])], "x", "y", axis=axis))
    assert [place.split(",")[0] for place in points(root)[0].split()] == ["72.0", "205.0", "338.0"]


def test_a_curve_is_the_mean_over_the_seeds_at_each_value():
    rows = []
    for seed, (step, drift, score) in product((0, 2), ((5, 0.3, 4.0), (1, 0.1, 2.0))):
        rows.append({"arm": "a", "step": step, "drift": drift + seed, "score": score + seed})
    rows.append({"arm": "b", "step": 9, "drift": 0.0, "score": 0.0})
    series = curve("A", rows, "step", "score", "drift", arm="a")
    assert series.xs == pytest.approx([1.1, 1.3])
    assert series.points == [(3.0, pytest.approx(math.sqrt(2))), (5.0, pytest.approx(math.sqrt(2)))]
    assert curve("A", rows, "step", "score", arm="a").xs == [1, 5]


# ---------------------------------------------------------------------------------------------
# In a browser


def test_clips_stand_still_for_those_who_ask_and_the_page_fits_its_window(browser):  # noqa: F811
    browser.get(SHIPPED.as_uri())
    state = "return getComputedStyle(document.querySelector('.clip')).animationPlayState"
    assert browser.execute_script(state) == "running"
    browser.find_element("css selector", "#play").click()
    assert browser.execute_script(state) == "paused"
    feature = {"name": "prefers-reduced-motion", "value": "reduce"}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [feature]})
    browser.refresh()
    assert browser.execute_script(state) == "paused"
    for width in (400, 1280):
        size = {"width": width, "height": 900, "deviceScaleFactor": 1, "mobile": False}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= width
