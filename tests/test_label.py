"""The labelling page: what it keeps, whom it refuses, and how far labels agree."""

import base64
import itertools
import json
import random
import re
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from forked import ended, fork, tiny_checkpoints
from frames import fit, sample_frames
from test_online import small_rounds

import world
from data import DIMENSIONS
from pages import agreement, label
from pages.agreement import NO_LABEL
from pages.server import Server
from real_data.pairs_csv import LABELS, Pair, read_pairs, write_pairs
from real_data.video import to_video, write_video
from reward import load_reward
from runtime.cli import BadInput

ROOT = Path(__file__).resolve().parents[1]
BROWSER, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
FLAGS = ("headless", "no-sandbox", "disable-gpu", "no-first-run", "disable-background-networking")
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
TAB, BACKSPACE, ESCAPE = "\ue004", "\ue003", "\ue00c"  # keys, as WebDriver writes them
OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """A folder with 72 pairs of the clips of two toy prompts, without labels."""
    folder, rows = tmp_path_factory.mktemp("toy"), []
    for k, prompt in enumerate(world.split_prompts("train")[[0, 40]]):
        rng = torch.Generator().manual_seed(k)
        clips = world.render(world.draw_clips(prompt.expand(9, 3), torch.arange(9), rng))
        for i in range(9):
            write_video(folder / f"{k}_{i}.mp4", clips[i])
        for i, j in itertools.combinations(range(9), 2):
            names = f"{k}_{i}.mp4", f"{k}_{j}.mp4"
            rows.append(Pair(*names, world.prompt_text(prompt), NO_LABEL, 2.0, 8.0, 2.0, 8.0))
    write_pairs(rows, folder / "pairs.csv")
    return folder


@pytest.fixture
def some(toy, tmp_path):
    """The first pairs of `toy` in a folder of their own: function of how many -> path of the CSV."""

    def make(count):
        for video in toy.glob("*.mp4"):
            shutil.copy(video, tmp_path)
        write_pairs(read_pairs(toy / "pairs.csv", unlabelled=True)[:count], tmp_path / "pairs.csv")
        return tmp_path / "pairs.csv"

    return make


class Page:
    """The page's own HTTP interface, as a script sees it; served by this process."""

    def __init__(self, csv):
        self.labelling = label.Labelling(csv, 0)
        self.server = Server("label.html", self.labelling.calls())
        self.address = self.server.address.removesuffix("label.html")
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()
        self.labelling.journal.close()

    def read(self, call, **body):
        request = urllib.request.Request(self.address + call, json.dumps(body).encode())
        with OPENER.open(request, timeout=30) as response:
            return response.read()

    def ask(self, call="state", **body):
        return json.loads(self.read(call, **body))

    def answer(self, state, sides, dimensions=DIMENSIONS):
        """Answers dimensions of a question -> the next state."""
        labels = {"left": state["left"], "right": "AB".replace(state["left"], "")}
        for dimension, side in zip(dimensions, sides):
            facts = {"question": state["id"], "dimension": dimension, "seen": side, "seconds": 1}
            state_after = self.ask("answer", label=labels.get(side, side), **facts)
        return state_after

    def clip(self, state, side):
        clip = "A" if (side == "left") == (state["left"] == "A") else "B"
        return self.read("clip", question=state["id"], clip=clip)


def fault(call, *args, **kwargs):
    with pytest.raises(urllib.error.HTTPError) as error:
        call(*args, **kwargs)
    return error.value.code, json.loads(error.value.read())["error"]


def table(lines):
    """{name: (VQ, MQ, TA)} of a report's lines."""
    cells = (re.fullmatch(r"(.*?)((?: +-?[\d.]+| +nan){3})", line) for line in lines[2:])
    return {match[1]: [float(x) for x in match[2].split()] for match in cells}


# ---------------------------------------------------------------------------------------------
# Agreement


@cache
def true_scores(content, prompt, folder):
    (folder / "seen.mp4").write_bytes(content)
    video = to_video(fit(sample_frames(folder / "seen.mp4"), 8, 32))
    return world.oracle(video[None], [prompt])[0]


def oracle_sides(page, state, folder):
    """What the oracle sees of the two clips that the page shows: its answers for VQ, MQ and TA."""
    clips = [page.clip(state, side) for side in ("left", "right")]
    a, b = (true_scores(clip, state["prompt"], folder) for clip in clips)
    difference = (a - b) / world.TRUE_STD
    tied = difference.abs() <= world.TIE_BELOW
    return ["same" if tie else "left" if d > 0 else "right" for d, tie in zip(difference, tied)]


def test_the_oracle_agrees_with_itself_and_guesses_do_not(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the report decodes the clips
    for name in ("seer.csv", "guesser.csv"):
        shutil.copy(toy / "pairs.csv", toy / name)
    with Page(toy / "seer.csv") as page:
        state = page.ask()
        assert (state["count"], state["open"]) == (80, 80)  # 72, and a tenth again
        while state.get("id"):
            state = page.answer(state, oracle_sides(page, state, tmp_path))
        seer = table(page.ask("report")["lines"])
    assert seer["oracle, equal"] == seer["oracle, kappa"] == [1, 1, 1]
    assert seer["asked again, equal"] == [1, 1, 1]  # the sides were other ones
    assert all(0.25 < left < 0.75 for left in seer["left, of left and right"])
    assert min(seer["toy annotators, equal"] + seer["VideoReward, equal"]) > 0.6

    rng = torch.Generator().manual_seed(1)
    with Page(toy / "guesser.csv") as page:
        state = page.ask()
        while state.get("id"):
            guesses = torch.randint(3, (3,), generator=rng)
            state = page.answer(state, [("left", "same", "right")[guess] for guess in guesses])
    records = label.read_journal(toy / "guesser.csv")
    guesser = table(agreement.report(toy / "guesser.csv", records, [toy / "seer.csv"]))
    assert all(abs(kappa) < 0.3 for kappa in guesser["oracle, kappa"])  # 0.09 is one sigma
    assert guesser["seer.csv, kappa"] == guesser["oracle, kappa"]
    assert all(0.2 < same < 0.47 for same in guesser["same"])


def test_kappa_by_hand():
    mine = torch.tensor([1, 1, 1, 1, 1, 0, 0, 0, -1, -1, -100])
    other = torch.tensor([1, 1, 1, 1, 0, 0, 0, 1, -1, 0, 1])
    equal, kappa = agreement.agreement(mine, other)
    assert equal == pytest.approx(0.7)
    by_chance = 0.5 * 0.5 + 0.3 * 0.4 + 0.2 * 0.1
    assert kappa == pytest.approx((0.7 - by_chance) / (1 - by_chance))


def test_several_people_become_one_and_a_reviewer_decides(some, tmp_path, monkeypatch):
    rows = read_pairs(some(2), unlabelled=True)
    said = {
        "ann": [(1, 0, -1), (1, None, 0)],
        "bob": [(1, 1, -1), (1, None, 0)],
        "cy": [(1, 0, -1), (1, None, 0)],
        "reviewer": [(-1, -1, 1), (None, None, 1)],
    }
    for name, labels in said.items():
        pairs = [replace(row, label=three) for row, three in zip(rows, labels)]
        write_pairs(pairs[::-1] if name == "bob" else pairs, tmp_path / f"{name}.csv")
    monkeypatch.chdir(tmp_path)
    command = "label pairs.csv --merge ann.csv bob.csv cy.csv --out all.csv"
    for flags, expected in (
        ("", [(1, None, -1), (1, None, 0)]),
        (" --reviewer reviewer.csv", [(1, -1, -1), (1, None, 0)]),
    ):
        monkeypatch.setattr(sys, "argv", (command + flags).split())
        label.main()
        assert [row.label for row in read_pairs("all.csv", unlabelled=True)] == expected


# ---------------------------------------------------------------------------------------------
# Files


def test_a_csv_that_changes_under_the_page(some):
    csv = some(4)
    rows = read_pairs(csv, unlabelled=True)
    with Page(csv) as page:
        second = page.answer(page.ask(), ["same", "same", "same"])
        write_pairs([rows[3], rows[2], rows[0]], csv)
        gone = fault(page.answer, second, ["same"])
        assert gone == (400, "this pair is not in the CSV any more")
        page.answer(page.ask(), ["invalid"])
        written = [row.label for row in read_pairs(csv, unlabelled=True)]
        assert written == [(LABELS["invalid"], None, None), NO_LABEL, (0, 0, 0)]
        csv.write_text("nothing\n")
        status, line = fault(page.ask)
        assert status == 400 and "line 1 must name the columns path_A" in line
        write_pairs(rows, csv)
        assert page.ask()["id"] == second["id"]


def test_empty_labels_are_filled_and_others_stay(some, tmp_path):
    csv = some(3)
    rows = [replace(row, mos=(1.0, 2, 3, 4, 5, 0)) for row in read_pairs(csv, unlabelled=True)]
    rows[1] = replace(rows[1], label=(1, -1, 0))
    write_pairs(rows, csv)
    with Page(csv) as page:
        state = page.ask()
        assert state["count"] == 3  # two pairs, and one of them again
        with pytest.raises(BadInput, match="another pages.label writes there"):
            Page(csv)
        while state.get("id"):
            state = page.answer(state, ["same", "invalid", "same"])
    with open(csv.with_suffix(".jsonl"), "ab") as journal:
        journal.write(b'\n{"question": "')  # a crash in the middle of a line
    with Page(csv) as page:
        state = page.ask("undo")
        assert state["open"] == 1 and set(state["answers"]) == {"VQ", "MQ"}
        assert set(page.ask("undo")["answers"]) == {"VQ"}
        page.answer(state, ["invalid", "same"], ["MQ", "TA"])
    same = (0, LABELS["invalid"], 0)
    assert read_pairs(csv) == [replace(rows[0], label=same), rows[1], replace(rows[2], label=same)]
    with Page(csv) as page:
        assert (page.ask()["open"], page.ask()["count"]) == (0, 3)
        for _ in range(9):
            page.ask("undo")
        assert [row.label for row in read_pairs(csv, unlabelled=True)][::2] == [NO_LABEL] * 2
    csv.with_suffix(".jsonl").unlink()
    write_pairs([rows[1]], csv)
    with pytest.raises(BadInput, match="no empty label; --out"):
        Page(csv)


def test_odd_names_and_a_path_outside(tmp_path):
    names = ["a b#1%41.mp4", "ü'&?=;.mp4", 'q"u,\no.MOV', "..mp4"]
    for name in names:
        (tmp_path / name).write_text(name)
    rows = [Pair(*names[i : i + 2], "x", NO_LABEL, 2.0, 8.0, 2.0, 8.0) for i in (0, 2)]
    write_pairs(rows, tmp_path / "pairs.csv")
    with Page(tmp_path / "pairs.csv") as page:
        state, seen = page.ask(), set()
        while state.get("id"):
            seen |= {page.clip(state, side).decode() for side in ("left", "right")}
            assert not any(name in json.dumps(state) for name in names)
            state = page.answer(state, ["left", "left", "left"])
        assert seen == set(names)
    (tmp_path / "in").mkdir()
    write_pairs([replace(rows[0], path_a="../a b#1%41.mp4")], tmp_path / "in" / "pairs.csv")
    with pytest.raises(BadInput, match="does not lie in the data folder"):
        Page(tmp_path / "in" / "pairs.csv")


# ---------------------------------------------------------------------------------------------
# train.py --ask


def test_a_run_asks_the_person_at_the_keyboard_and_learns_the_answers(tmp_path):
    log, asked, margins = tmp_path / "log", tmp_path / "asked", {}
    flags = ["--algo=dpo", "--refresh=2", "--refresh-pairs=3", "--ask", *tiny_checkpoints(tmp_path)]
    assert ended(fork(small_rounds, *flags, f"--out={asked}", output=log)) == 130, log.read_text()
    csv = re.search(r"`python -m pages.label (\S+)`", log.read_text())[1]
    for better in "AB":
        out = shutil.copytree(asked, tmp_path / better)
        with Page(out / Path(csv).relative_to(asked)) as page:
            state = page.ask()
            while state.get("id"):
                side = "left" if state["left"] == better else "right"
                state = page.answer(state, [side] * 3)
        resumed = fork(small_rounds, *flags, f"--out={out}", "--resume", output=log)
        assert ended(resumed) == 0, log.read_text()
        labelled = torch.load(out / "round.pt", weights_only=True)["labelled"]
        assert labelled["label"].tolist() == [[LABELS[better]] * 3] * 3
        reward, _ = load_reward(out / "reward.pt")
        a, b = to_video(labelled["clips"]).unbind(1)
        margins[better] = (reward(a, labelled["y"]) - reward(b, labelled["y"])).mean(0)
    assert (margins["A"] > margins["B"] + 0.1).all()  # VideoReward follows the person


# ---------------------------------------------------------------------------------------------
# Hostile requests


def test_hostile_requests_are_refused_and_the_server_lives(some, capfd):
    with Page(some(1)) as page:
        host, token, question = page.server.hosts[0], page.server.token, page.ask()["id"]

        def send(path, method="GET", host=host, body=b"", **headers):
            """The status of a raw request, 0 where the server only hangs up."""
            lines = [f"{method} {path} HTTP/1.1", f"Host: {host}"]
            lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
            return talk("\r\n".join(lines).encode() + b"\r\n\r\n" + body)

        def talk(content):
            with socket.create_connection(page.server.server_address, timeout=10) as connection:
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.makefile("rb").readline().split()
            return int(answer[1]) if len(answer) > 1 and answer[1].isdigit() else 0

        def post(content, name="answer"):
            return send(f"/{token}/{name}", "POST", body=content, Content_Length=len(content))

        here = f"/{token}/label.html"
        assert send(here) == send(here, Origin=f"http://{host}") == 200
        assert send(here, host="evil.example") == send(here, host="127.0.0.1") == 403
        assert send(here, Origin="http://evil.example") == send(here, Origin="null") == 403
        for path in ("/", "/wrong/state", f"/{token}x/state"):
            assert send(path) == 403
        outside = ["pairs.csv", "../pairs.csv", "%2e%2e/etc/passwd", "/etc/passwd", "label.py", ""]
        for path in outside:
            assert send(f"/{token}/{path}") == 404
        assert send(here, "POST") == 404 and send(here, "DELETE") == 501
        for length in (10**9, 10**20, "-1", "1e3", "\u00b2", "9" * 5000):
            assert send(f"/{token}/answer", "POST", Content_Length=length) == 413
        assert send(f"/{token}/answer", "POST", Transfer_Encoding="chunked") == 400
        for content in (b"", b"{", b"[1]", b"[" * 4000, b"\xff", b"3", b"{}"):
            assert post(content) == 400
        odd = (None, [], {}, 1e999, "up", "../x")
        for name in ("question", "dimension", "label", "seen", "seconds"):
            for value in odd[:3] + odd[4:]:
                content = dict(question=question, dimension="VQ", label="A", seen="left", seconds=1)
                assert post(json.dumps(content | {name: value}).encode()) == 400
        for value in odd:
            assert post(json.dumps({"question": value, "clip": value}).encode(), "clip") == 400
            assert post(json.dumps({"question": value}).encode(), "undo") == 200
        rng = random.Random(0)
        for _ in range(150):
            talk(bytes(rng.choices(b"GET /:\r\n %\x00\xff[]HTP1.", k=rng.randrange(1, 300))))
        assert page.ask()["open"] == 2 and page.ask()["answers"] == {}
    assert "Traceback" not in capfd.readouterr().err


# ---------------------------------------------------------------------------------------------
# In a browser


@pytest.fixture(scope="module")
def browser():
    webdriver = pytest.importorskip("selenium.webdriver")
    if not BROWSER or not DRIVER:
        pytest.skip("no Chromium with its driver on this machine")
    options = webdriver.ChromeOptions()
    options.binary_location = BROWSER
    for flag in FLAGS:
        options.add_argument(f"--{flag}")
    with webdriver.Chrome(options, webdriver.ChromeService(DRIVER)) as browser:
        yield browser


def press(browser, keys):
    from selenium.webdriver import ActionChains

    ActionChains(browser).send_keys(keys).perform()


def wait(browser, script, expected=True):
    """Waits until a JavaScript expression has a value."""
    end = time.monotonic() + 20
    while (value := browser.execute_script(f"return {script}")) != expected:
        assert time.monotonic() < end, f"{script} is {value}, not {expected}"


def pressed(*sides):
    """A JavaScript expression: whether just these buttons are pressed, "VQ left" for example."""
    found = "[...document.querySelectorAll('[aria-pressed=true]')]"
    found += ".map((button) => button.dataset.dimension + ' ' + SIDES[button.dataset.side]).join()"
    return f"{found} === {json.dumps(','.join(sides))}"


CLIPS = """// the files of both clips, from left to right
const left = (clip) => clip.getBoundingClientRect().left;
const code = (bytes) => btoa(String.fromCharCode(...new Uint8Array(bytes)));
const read = async (clip) => {
  while (!clip.src) await new Promise(requestAnimationFrame);
  return code(await (await fetch(clip.src)).arrayBuffer());
};
Promise.all(clips.toSorted((a, b) => left(a) - left(b)).map(read)).then(arguments[0]);"""


def test_thirty_pairs_and_a_kill_in_the_middle(browser, some, tmp_path, request):
    csv = some(30)
    browser.execute_cdp_cmd("Page.setBypassCSP", {"enabled": True})  # so that the test reads clips
    names = {path.read_bytes(): path.name for path in tmp_path.glob("*.mp4")}
    rng, expected, on_left = random.Random(0), {}, {}

    def start():
        command = [sys.executable, "-m", "pages.label", csv]
        process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True)
        request.addfinalizer(process.kill)
        address = next(m[0] for line in process.stdout if (m := re.search(r"http\S+", line)))
        browser.get(address)
        wait(browser, "Boolean(state.id)")
        return process

    process = start()
    for number in range(33):
        left, right = (
            names[base64.b64decode(clip)] for clip in browser.execute_async_script(CLIPS)
        )
        sides = rng.choices(range(3), k=3)
        keys = [keys[side] for keys, side in zip(("qwe", "asd", "zxc"), sides)]
        if number == 14:
            press(browser, keys.pop(0))
            wait(browser, pressed(f"VQ {('left', 'same', 'right')[sides[0]]}"))
            process.kill()  # -9
            process.wait()
            process = start()
            assert browser.execute_script("return state.count - state.open") == 14
            wait(browser, pressed(f"VQ {('left', 'same', 'right')[sides[0]]}"))
        done = browser.execute_script("return state.open")
        press(browser, "".join(keys))
        wait(browser, "state.open", done - 1)
        pair = tuple(sorted((left, right)))
        label_of = (left, "same", right)
        if pair in on_left:
            assert on_left[pair] != left  # asked again, with its sides swapped
        else:
            on_left[pair], expected[pair] = left, [label_of[side] for side in sides]
    assert "All pairs are labelled" in browser.find_element("css selector", "#end").text
    for row in read_pairs(csv):
        name = {1: row.path_a, 0: "same", -1: row.path_b}
        assert [name[value] for value in row.label] == expected[tuple(sorted(row.paths))]


def test_two_tabs_do_not_overwrite_each_other(browser, some):
    with Page(some(3)) as page:
        browser.get(page.server.address)
        first = browser.current_window_handle
        wait(browser, "Boolean(state.id)")
        browser.switch_to.new_window("tab")
        browser.get(page.server.address)
        wait(browser, "Boolean(state.id)")
        press(browser, "q")
        wait(browser, pressed("VQ left"))
        browser.close()
        browser.switch_to.window(first)
        press(browser, "ea")
        wait(browser, pressed("VQ left", "MQ left"))
        state = page.ask()
        assert state["answers"] == {"VQ": state["left"], "MQ": state["left"]}


def test_clips_in_step_keys_and_contrast(browser, some, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with Page(some(1)) as page:
        browser.get(page.server.address)
        wait(browser, "clips.every((clip) => clip.currentTime > 0.3)")
        for _ in range(20):
            a, b = browser.execute_script("return clips.map((clip) => clip.currentTime)")
            assert abs(a - b) <= 0.25  # half a frame
        press(browser, " ")
        wait(browser, "clips.every((clip) => clip.paused)")
        browser.execute_script("clips.forEach((clip) => { clip.currentTime = 3.75; })")
        for key, time_of_both in ((",", 3.25), (".", 3.75), (".", 0.25)):
            press(browser, key)
            wait(browser, "clips.map((clip) => clip.currentTime)", [time_of_both] * 2)
        press(browser, TAB)
        press(browser, "q")
        wait(browser, pressed("VQ left"))
        state = page.ask()
        assert state["answers"]["VQ"] != state["left"]  # the clip that was on the right
        press(browser, TAB)
        wait(browser, pressed("VQ right"))
        press(browser, BACKSPACE)
        wait(browser, pressed())
        press(browser, "wi")
        wait(browser, pressed("VQ same", "MQ invalid"))
        for scheme in ("light", "dark"):
            media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)
            assert browser.execute_script(LOW_CONTRAST) == []
        press(browser, "?")
        assert browser.execute_script(LOW_CONTRAST) == []
        press(browser, "c" + ESCAPE)  # the dialog is open: c is no answer
        wait(browser, "document.querySelector('dialog').open", False)
        press(browser, "x")
        wait(browser, "state.open", 1)
        press(browser, "wsx")
        wait(browser, "$('report').textContent.includes('VideoReward')")
        size = {"width": 400, "height": 800, "deviceScaleFactor": 1, "mobile": True}
        browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
        assert browser.execute_script("return document.documentElement.scrollWidth") <= 400
        assert browser.execute_script(LOW_CONTRAST) == []
