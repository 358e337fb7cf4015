"""The report: what it shows of made-up results, and how it behaves in a browser."""

import io
import json
import re
import shutil
import subprocess
import urllib.request
from base64 import b64decode
from contextlib import redirect_stdout
from html.parser import HTMLParser
from types import SimpleNamespace

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import evaluate
import world
from data import DIMENSIONS
from real_data.video import to_pixels
from runtime.cli import BadInput
from studies import align, beta, guidance, online, reward_model, unified
from studies.jobs import ALIGNED, ATTRIBUTES, CFGS, JUDGES, METHODS, SETS
from studies.report import clips as report_clips
from studies.report import page as report
from studies.report.charts import Chart, figure

CPU = torch.device("cpu")
STUDIES = {
    "reward": reward_model,
    "align": align,
    "beta": beta,
    "nrg": guidance,
    "online": online,
    "unified": unified,
}
# Win rates of seeds 0 and 1 by the oracle, all others being 0.5: 0.85 ± 0.07 (.1 / sqrt 2), and the extremes
TRUE_VQ = {"dpo-constant": (0.9, 0.8), "dpo-schedule": (0.0, 0.0), "sft": (1.0, 1.0)}


MEASURED = (*DIMENSIONS, *ATTRIBUTES, "quality", "TA_ceiling", "TA_share")  # of a row of align
LACKING = {
    "method": "sft",
    "align": "1:1:1",
    "set": "hard",
    "cfg": 1.0,
    "judge": "oracle",
    "seed": 0,
}  # win rates


def arguments(folder):
    return SimpleNamespace(
        out=folder / "out",
        work=folder / "work",
        seeds=2,
        steps=2,
        eval_prompts=4,
        eval_pairs=10,
        device="cpu",
    )


def align_rows():
    rows = []
    for method in ("base", *METHODS):
        for aligned in ALIGNED if method != "base" else ("",):
            for seed in (0, 1) if method != "base" else (0,):
                for name in SETS:
                    for cfg in CFGS:
                        for by in JUDGES:
                            row = {
                                "method": method,
                                "align": aligned,
                                "seed": seed,
                                "set": name,
                                "cfg": cfg,
                            }
                            row |= {"judge": by, **dict.fromkeys(MEASURED, 0.5)}
                            row |= {f"{n}_score": 0.25 for n in DIMENSIONS}
                            if method in TRUE_VQ and by == "oracle":
                                row["VQ"] = TRUE_VQ[method][seed]
                            rows.append(row)
    return rows


def beta_rows():
    facts = {
        "study": "sweep",
        "method": "dpo-constant",
        "beta": 100,
        "seed": 0,
        "drift": 0.01,
        "cfg": 1.0,
    }
    scores = dict.fromkeys((*DIMENSIONS, *(f"{n}_score" for n in DIMENSIONS)), 0.625)
    return [
        {**facts, "set": name, "judge": by, **scores}
        for name in ("standard", "hard")
        for by in JUDGES
    ]


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    """Path of a report of a finished align study, one job of beta, nothing of the rest, and two logs; its clips are
    rendered, and a little brighter with every call of the sampler."""
    folder = tmp_path_factory.mktemp("report")
    args = arguments(folder)
    (args.work / "beta-2-4").mkdir(parents=True)
    (args.work / "beta-2-4" / "dpo-constant-100-0.json").write_text(json.dumps(beta_rows()))
    args.out.mkdir()
    facts = {
        "command": "python evaluate.py align",
        "commit": "abc<b>",
        "torch": "2",
        "device": "cpu",
    }
    (args.out / "align.json").write_text(json.dumps({**facts, "rows": align_rows()}))
    for seed in (0, 1):
        run = args.work / "align" / f"dpo-constant-111-{seed}"
        run.mkdir(parents=True)
        shutil.copy(report_clips.WEIGHTS / "base.pt", run / "last.pt")
        lines = [
            {"step": i, "loss/t0": i + 2 * seed, "accuracy": 0.5, "margin": 0, "drift": i}
            for i in range(40)
        ]
        (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    kept = args.work / "online" / "nft-refreshed-0" / "round-5.pt"
    kept.parent.mkdir(parents=True)
    shutil.copy(report_clips.WEIGHTS / "base.pt", kept)
    calls = []

    def sampler(model, words, prompts, seed, device):
        calls.append(model)
        clips = world.draw_clips(
            prompts, torch.zeros(len(prompts), dtype=torch.int64), torch.Generator(), clean=True
        )
        return world.render(clips) * (0.5 + 0.01 * len(calls))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(report_clips, "sample_prompts", sampler)
        patch.setattr(report_clips, "progress_bar", lambda *_: lambda items: items)
        with redirect_stdout(io.StringIO()) as said:
            report.run(args, CPU)
    assert (
        len(calls) == 27 + 3 + 2
    )  # three values of three weights; base, dpo, nrg, not sft and rwr; base, a round
    return SimpleNamespace(
        path=args.out / "report.html", args=args, lines=said.getvalue().splitlines()
    )


class Outline(HTMLParser):
    """The page as a list of (tag, attributes) and, of each id, the text inside."""

    VOID = {"meta", "link", "input", "br", "img"}

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.text, self.ids = [], [], {}, []
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.tags.append((tag, attributes))
        self.ids += [attributes["id"]] if "id" in attributes else []
        if tag not in self.VOID:
            self.open.append((tag, attributes.get("id")))

    def handle_startendtag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1][0] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        for _, name in self.open:
            if name:
                self.text[name] = self.text.get(name, "") + data


def test_the_page_is_whole_and_needs_nothing_else(page):
    text = page.path.read_text()
    outline = Outline(text)
    assert not outline.open and len(set(outline.ids)) == len(outline.ids) > 9
    wanted = [a["href"][1:] for tag, a in outline.tags if tag == "a"]
    wanted += [name for tag, a in outline.tags for name in a.get("for", "").split()]
    wanted += re.findall(r'getElementById\("(\w+)"\)', text)
    assert len(wanted) > 10 and not set(wanted) - set(outline.ids)
    pictures = [
        (tag, a) for tag, a in outline.tags if tag in ("img", "svg") or a.get("role") == "img"
    ]
    assert len(pictures) > 30
    for tag, a in pictures:
        assert a.get("aria-hidden") == "true" or (
            a.get("role") == "img" and len(a.get("aria-label", "")) > 10
        ), (tag, a)
    assert not re.search(r"{{|}}|@import|\bnan\b", text)
    addresses = [
        a[key] for _, a in outline.tags for key in ("src", "href") if key in a
    ] + re.findall(r"url\((.*?)\)", text)
    assert addresses and all(re.match("#|data:", address) for address in addresses)


def test_studies_that_are_missing_or_unfinished_are_named(page):
    text = Outline(page.path.read_text()).text
    for name in ("nrg", "online", "reward", "unified"):
        assert "not run yet" in text[name] and f"python evaluate.py {name}" in text[name]
    assert (
        "unfinished: 1 of 34 jobs" in text["beta"]
    )  # two seeds: six betas of two methods, four long runs, best of n
    assert "2 seeds" in text["align"] and "unfinished" not in text["align"]
    assert text["clips"].count("Not trained yet") == 2  # SFT and RWR
    assert text["online"].count("Not trained yet") == 5  # of six, the fifth round of nft is there
    assert [line.split(maxsplit=1)[1] for line in page.lines[:3]] == [
        "not run yet",
        "2 seeds",
        "unfinished: 1 of 34 jobs",
    ]
    assert "abc&lt;b&gt;" in page.path.read_text()


def test_figures_are_the_means_of_the_rows(page):
    text = page.path.read_text()
    card = re.search(r"<h3>Flow-DPO, in truth</h3>.*?</dl>", text)[0]
    assert (
        re.findall(r"<dd>(.*?)</dd>", card) == ["0.85", "0.50", "0.50"] and "VQ<br>± 0.07" in card
    )
    table = re.search(
        r"<h3>Table 3: 1:1:1, CFG 1, judged by oracle</h3>.*?</table>", text, re.DOTALL
    )[0]
    row = re.search(r"dpo-constant</th>(.*?)</tr>", table)[1]
    cells = [re.sub("<.*?>", "", cell) for cell in re.findall("<td.*?</td>", row)]
    assert cells == ["0.85 ± 0.07", "0.50 ± 0.00", "0.50 ± 0.00"] * 3
    # VideoReward finds no difference: the line of VQ goes from .85 to .50
    assert "dpo-constant: oracle 0.85, VideoReward 0.50" in text
    # means of three dimensions, (.85 + .5 + .5) / 3 and (1 + .5 + .5) / 3
    assert (
        "above rwr" in text
        and "yes</span>: 0.62 against 0.50" in text
        and "no</span>: 0.62 against 0.67" in text
    )
    part = text[text.index('id="beta"') : text.index('id="nrg"')]
    assert (
        part.count("0.62 <small>± 0.00</small>") == 12
    )  # one beta, two judges, win rate and score of three each


def test_curves_are_medians_of_windows_then_means_of_seeds(page):
    curve = r"<figure[^>]*><figcaption><span>dpo-constant: loss by time.*?</figure>"
    drawn = re.search(curve, page.path.read_text())[0]
    (points,) = json.loads(re.search('data-points="(.*?)"', drawn)[1].replace("&quot;", '"'))
    # 20 windows of two steps; the first: 0, 1 and 2, 3 have medians 0.5 and 2.5, their mean is 1.5, their sd sqrt 2
    assert (
        len(points) == 20
        and points[0][2:] == ["1", "1.5 ± 1.4"]
        and points[-1][2:] == ["39", "39.5 ± 1.4"]
    )


def test_a_chart_puts_points_where_their_values_are():
    chart = Chart(
        "a<b",
        [("one", [0, 1, 2], [0.0, 0.5, 1.0], [0.1, 0.0, 0.1]), ("two", [1], [float("nan")], None)],
        "x",
        "y",
    )
    text = figure(chart)
    (points,) = json.loads(
        re.search('data-points="(.*?)"', text)[1].replace("&quot;", '"')
    )  # none of "two"
    (left, low, *_), (middle, half, *said), (right, high, *_) = points
    assert middle == pytest.approx((left + right) / 2, abs=0.1) and half == pytest.approx(
        (low + high) / 2, abs=0.1
    )
    assert left < right and low > high and said == ["1", "0.5"] and points[0][3] == "0 ± 0.1"
    assert "a&lt;b: y by x. one goes from 0 ± 0.1 to 1 ± 0.1." in text
    assert figure(Chart("none", [("two", [1], [float("nan")], None)], "x", "y")) == ""
    assert figure(Chart("none", [], "x", "y")) == ""


def test_a_sheet_holds_a_clip_a_row_and_a_frame_a_column():
    videos = torch.rand(3, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0)) * 2 - 1
    text = report_clips.sheet("name", videos)
    assert text.startswith(".name { --rows: 3;")
    picture = imageio.imread(io.BytesIO(b64decode(re.search("base64,(.*?)\\)", text)[1])))
    assert picture.shape == (3 * 8, 4 * 8, 3)
    there = picture[16:24, 8:16].astype(int)  # the third clip's second frame
    assert np.abs(there - to_pixels(videos[2])[1]).max() <= 3  # 6 bits of 8


def test_any_part_of_a_study_can_be_shown(tmp_path):
    histogram = [0.0] * (len(unified.EDGES) - 1)
    columns = [
        f"{n}_{kind}" for n in (*DIMENSIONS, "Overall") for kind in ("with", "without", "ties")
    ]
    first = {
        "reward": {
            "model": "random",
            "split": "validation",
            "fraction": 1.0,
            **dict.fromkeys(columns, 0.375),
        },
        "nrg": {
            "study": "accuracy",
            "variant": "clean",
            "t": 0.2,
            **dict.fromkeys(DIMENSIONS, 0.375),
        },
        "unified": {
            "method": "rwr",
            "distance": 0.375,
            "mean": 0.0,
            "right": 0.0,
            "histogram": histogram,
        },
    }
    shown = {
        "reward": "validation, 77 pairs (ties: VQ –",
        "nrg": "0.38 <small>",
        "unified": "0.375 <small>",
    }
    facts = {"place": tmp_path, "facts": {"command": "evaluate.py reward --eval-pairs 77"}}
    for name, row in first.items():
        found = {"rows": [{**row, "seed": 0}], "done": 1, "jobs": 9, **facts}
        status, body = report.section(name, STUDIES[name], found, arguments(tmp_path))
        assert "unfinished: 1 of 9 jobs" in status and shown[name] in body and "nan" not in body
        assert ">yes<" not in body and ">no<" not in body  # no finding before there are figures


def test_the_command_names_a_damaged_file(tmp_path, monkeypatch):
    (tmp_path / "unified.json").write_text("[]")
    monkeypatch.setattr("sys.argv", ["evaluate.py", "report", "--device=cpu", f"--out={tmp_path}"])
    with pytest.raises(BadInput, match=r"unified\.json: not written by evaluate\.py"):
        evaluate.main()


@pytest.mark.parametrize("content", ["{", "[]", '{"rows": [1]}', json.dumps({"rows": [LACKING]})])
def test_damaged_results_are_named_in_one_line(tmp_path, content):
    args = arguments(tmp_path)
    args.out.mkdir()
    (args.out / "align.json").write_text(content)
    with pytest.raises(BadInput, match=r"align\.json: .*again"):
        found = report.gather("align", STUDIES["align"], args, CPU)
        report.section("align", STUDIES["align"], found, args)


# ---------------------------------------------------------------------------------------------
# In a browser

BROWSER = next(
    filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None
)
DRIVER = shutil.which("chromedriver")
FLAGS = (
    "headless",
    "no-sandbox",
    "disable-gpu",
    "disable-quic",
    "no-first-run",
    "disable-background-networking",
)
RIGHT, LEFT, HOME = "\ue014", "\ue012", "\ue011"  # keys, as WebDriver writes them
LOW_CONTRAST = """
const value = (text) => (text.match(/[\\d.]+/g) || []).map(Number);
const light = (c) => [.2126, .7152, .0722].reduce((sum, w, i) =>
  sum + w * ((c[i] /= 255) <= .03928 ? c[i] / 12.92 : ((c[i] + .055) / 1.055) ** 2.4), 0);
const low = [];
for (const element of document.querySelectorAll("body *")) {
  if (![...element.childNodes].some((n) => n.nodeType === 3 && n.data.trim()) || !element.checkVisibility()) continue;
  const style = getComputedStyle(element), layers = [];
  for (let e = element; e; e = e.parentElement) layers.push(value(getComputedStyle(e).backgroundColor));
  let ground = [255, 255, 255];
  for (const layer of layers.reverse()) {
    const alpha = layer.length > 3 ? layer[3] : 1;
    ground = ground.map((g, i) => g * (1 - alpha) + layer[i] * alpha);
  }
  const ink = value(element.closest("svg") ? style.fill : style.color).slice(0, 3);
  const [a, b] = [light(ink), light(ground)].sort((x, y) => y - x);
  if ((a + .05) / (b + .05) < 4.5) low.push(element.outerHTML.slice(0, 120) + " " + (a + .05) / (b + .05));
}
return low;"""


class Browser:
    """A headless Chromium, driven by WebDriver's own protocol: JSON over HTTP."""

    def __init__(self, profile):
        self.driver = subprocess.Popen([DRIVER, "--port=0"], stdout=subprocess.PIPE, text=True)
        port = next(
            match[1]
            for line in self.driver.stdout
            if (match := re.search(r"success.* port (\d+)", line))
        )
        self.address = f"http://127.0.0.1:{port}/session"
        options = {
            "binary": BROWSER,
            "args": [*(f"--{flag}" for flag in FLAGS), f"--user-data-dir={profile}"],
        }
        wanted = {
            "goog:chromeOptions": options,
            "goog:loggingPrefs": {"browser": "ALL", "performance": "ALL"},
        }
        self.address += "/" + self("", capabilities={"alwaysMatch": wanted})["sessionId"]

    def __call__(self, command, **body):
        headers = {"Content-Type": "application/json"}
        request = urllib.request.Request(self.address + command, json.dumps(body).encode(), headers)
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=60
        ) as answer:
            return json.load(answer)["value"]

    def run(self, script):
        return self("/execute/sync", script=script, args=[])

    def tools(self, method, **params):
        return self("/goog/cdp/execute", cmd=method, params=params)

    def press(self, selector, keys):
        (element,) = self("/element", using="css selector", value=selector).values()
        self(f"/element/{element}/value", text=keys)

    def quit(self):
        request = urllib.request.Request(self.address, method="DELETE")
        urllib.request.build_opener(urllib.request.ProxyHandler({})).open(
            request, timeout=60
        ).close()
        self.driver.terminate()
        self.driver.wait()


@pytest.fixture(scope="module")
def browser(page, tmp_path_factory):
    if not BROWSER or not DRIVER:
        pytest.skip("no Chromium with its driver on this machine")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    try:
        browser("/url", url="about:blank")
        browser("/se/log", type="performance")  # what the browser itself did to start
        browser("/url", url=page.path.as_uri())
        yield browser
        said = [entry["message"] for entry in browser("/se/log", type="browser")]
        log = [
            json.loads(entry["message"])["message"]
            for entry in browser("/se/log", type="performance")
        ]
    finally:
        browser.quit()
    urls = [
        m["params"]["request"]["url"] for m in log if m["method"] == "Network.requestWillBeSent"
    ]
    assert (
        not said
        and urls
        and {url for url in urls if not url.startswith("data:")} == {page.path.as_uri()}
    )


GUIDED = """const row = document.querySelector("#guided");
return [...row.querySelectorAll(".clip")].map((c) => c.style.getPropertyValue("--row")).concat(
  row.querySelector(".score").textContent, document.getElementById("readout").textContent);"""


def test_the_sliders_change_clips_and_figures_by_keyboard(browser):
    *rows, strong, said = browser.run(GUIDED)
    assert rows == ["26"] * 6 and "VQ" in said  # 4, 4, 4 is the last of 27 weights
    browser.press("#wTA", LEFT)
    *rows, _, _ = browser.run(GUIDED)
    assert rows == ["25"] * 6
    assert browser.run("return document.getElementById('wTA').ariaValueText") == "0"
    for name in ("wVQ", "wMQ", "wTA"):
        browser.press(f"#{name}", HOME)
    *rows, weak, now = browser.run(GUIDED)
    assert (
        rows == ["0"] * 6 and weak != strong and now != said and weak[3:7] in now
    )  # "VQ 0.61MQ ..."


def test_a_chart_is_read_by_arrow_keys_and_pointer(browser):
    legend = "return document.querySelector('#align figure[data-points] .legend b').textContent"
    assert browser.run(legend) == "39.5 ± 1.4"
    browser.press("#align figure[data-points] > svg", RIGHT)
    assert browser.run(legend) == "1.5 ± 1.4"
    browser.run("document.activeElement.blur()")
    assert browser.run(legend) == "39.5 ± 1.4"
    left, top = browser.run("""
        const svg = document.querySelector("#align figure[data-points] > svg");
        svg.scrollIntoView({block: "center", behavior: "instant"});
        const box = svg.getBoundingClientRect();
        return [box.left + 0.15 * box.width, box.top + box.height / 2];""")
    browser.tools("Input.dispatchMouseEvent", type="mouseMoved", x=left, y=top)
    assert browser.run(legend) == "1.5 ± 1.4"  # 44 + 8 of 340 wide is the first point


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1400])
def test_the_layout_holds(browser, width, scheme):
    browser.tools(
        "Emulation.setDeviceMetricsOverride",
        width=width,
        height=900,
        deviceScaleFactor=1,
        mobile=False,
    )
    browser.tools(
        "Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}]
    )
    browser.run("document.querySelectorAll('details').forEach((d) => { d.open = true; })")
    assert (
        browser.run("return innerWidth")
        == width
        >= browser.run("return document.documentElement.scrollWidth")
    )
    ground = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, re.findall(r"\d+", ground))) > 384) == (scheme == "light")
    assert browser.run(LOW_CONTRAST) == []


def test_clips_stand_still_for_those_who_ask_for_it(browser):
    state = "return getComputedStyle(document.querySelector('.clip')).animationPlayState"
    assert browser.run(state) == "running"
    browser.press("#play", "\ue007")
    assert browser.run(state) == "paused"
    browser.tools(
        "Emulation.setEmulatedMedia",
        features=[{"name": "prefers-reduced-motion", "value": "reduce"}],
    )
    browser("/refresh")
    assert browser.run(state) == "paused"
    browser.press("#play", "\ue007")
    assert browser.run(state) == "running"
