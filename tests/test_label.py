"""The labelling page: what it saves, whom it refuses, and how far labels agree."""

import itertools
import json
import os
import random
import re
import shutil
import signal
import socket
import sys
import time
from contextlib import contextmanager
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch
from browsers import browser, check_looks, fault, press, request, served, wait  # noqa: F401
from forked import ended, fork, tiny_checkpoints
from test_online import small_rounds

import world
from data import DIMENSIONS
from pages import agreement, label
from pages.agreement import NO_LABEL
from real_data.pairs_csv import LABELS, Pair, read_pairs, write_pairs
from real_data.video import cached_clip, to_video, write_video
from reward import load_reward
from runtime.cli import BadInput

TAB, BACKSPACE = "\ue004", "\ue003"  # keys, as WebDriver writes them


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
    """A function: a number of pairs -> the CSV of so many in a folder of their own."""
    shutil.copytree(toy, tmp_path, dirs_exist_ok=True)
    rows, csv = read_pairs(toy / "pairs.csv", unlabelled=True), tmp_path / "pairs.csv"
    return lambda count: write_pairs(rows[:count], csv) or csv


@contextmanager
def labelled(csv):
    """The page of a CSV, served by this process, as a script sees it."""
    page = label.Labelling(csv, 0)
    calls = [page.state, page.clip, page.answer, page.undo, page.report]
    with served("label.html", calls) as server:
        yield Page(server)


class Page:
    def __init__(self, server):
        self.server = server

    def ask(self, call="state", **settings):
        return json.loads(request(self.server, call, **settings))

    def answer(self, state, sides, dimensions=DIMENSIONS):
        """Answers dimensions of a question -> the next state."""
        labels = {"left": state["left"], "right": "AB".replace(state["left"], "")}
        for dimension, side in zip(dimensions, sides):
            facts = {"question": state["id"], "dimension": dimension, "seen": side, "seconds": 1}
            state_after = self.ask("answer", label=labels.get(side, side), **facts)
        return state_after

    def answer_all(self, sides):
        """sides: function of a state -> answers for VQ, MQ and TA."""
        state = self.ask()
        while "id" in state:
            state = self.answer(state, sides(state))

    def clips(self, state):
        """The files on the left and on the right."""
        sides = "AB" if state["left"] == "A" else "BA"
        return [request(self.server, "clip", question=state["id"], clip=side) for side in sides]


def sides_of(better, state):
    """Answers by which A or B is better."""
    return ["left" if name == state["left"] else "right" for name in better]


def labels_in(csv):
    return [row.label for row in read_pairs(csv, unlabelled=True)]


def table(lines):
    """{name: (VQ, MQ, TA)} of a report's lines."""
    cells = (re.fullmatch(r"(.*?)((?: +-?[\d.]+| +nan){3})", line) for line in lines[2:])
    return {match[1]: [float(x) for x in match[2].split()] for match in cells}


@cache
def true_scores(content, prompt, folder):
    (folder / "seen.mp4").write_bytes(content)
    video = to_video(cached_clip(folder / "seen.mp4", folder, 8, 32))
    return world.oracle(video[None], [prompt])[0]


def oracle_sides(page, state, folder):
    """What the oracle sees of the two clips that the page shows: its answers for VQ, MQ and TA."""
    a, b = (true_scores(clip, state["prompt"], folder) for clip in page.clips(state))
    difference = (a - b) / world.TRUE_STD
    tied = difference.abs() <= world.TIE_BELOW
    return ["same" if tie else "left" if d > 0 else "right" for d, tie in zip(difference, tied)]


def test_the_oracle_agrees_with_itself_and_guesses_do_not(toy, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where the report decodes the clips
    for name in ("seer.csv", "guesser.csv"):
        shutil.copy(toy / "pairs.csv", toy / name)
    with labelled(toy / "seer.csv") as page:
        assert page.ask()["count"] == page.ask()["open"] == 80  # 72, and a tenth again
        page.answer_all(lambda state: oracle_sides(page, state, tmp_path))
        seer = table(page.ask("report")["lines"])
    assert seer["oracle, equal"] == seer["oracle, kappa"] == [1, 1, 1]
    assert seer["asked again, equal"] == [1, 1, 1]  # the sides were other ones
    assert all(0.3 < a / (a + b) < 0.7 for a, b in zip(seer["left"], seer["right"]))
    assert min(seer["toy annotators, equal"] + seer["VideoReward, equal"]) > 0.6

    rng = random.Random(1)
    with labelled(toy / "guesser.csv") as page:
        page.answer_all(lambda state: rng.choices(("left", "same", "right"), k=3))
    guesser = table(agreement.report(toy / "guesser.csv", [toy / "seer.csv"]))
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
    people = {
        "ann": [(1, 0, -1), (1, None, 0)],
        "bob": [(1, 1, -1), (1, None, 0)],
        "cy": [(1, 0, -1), (1, None, 0)],
        "reviewer": [(-1, -1, 1), (None, 1, 1)],
    }
    for name, labels in people.items():
        pairs = [replace(row, label=three) for row, three in zip(rows, labels)]
        write_pairs(pairs[::-1] if name == "bob" else pairs, tmp_path / f"{name}.csv")
    monkeypatch.chdir(tmp_path)
    decided = {"pairs": [(1, None, -1), (1, None, 0)], "reviewer": [(1, -1, -1), (1, 1, 0)]}
    for name, expected in decided.items():
        command = f"label {name}.csv --merge ann.csv bob.csv cy.csv --out all.csv"
        monkeypatch.setattr(sys, "argv", command.split())
        label.main()
        assert labels_in("all.csv") == expected


def test_a_csv_that_changes_under_the_page(some):
    csv = some(4)
    rows = read_pairs(csv, unlabelled=True)
    with labelled(csv) as page:
        second = page.answer(page.ask(), ["same", "same", "same"])
        write_pairs([rows[3], rows[2], rows[0]], csv)
        gone = 400, "this pair is not in the CSV any more"
        assert fault(page.server, "answer", question=second["id"]) == gone
        page.answer(page.ask(), ["invalid"])
        assert labels_in(csv) == [(LABELS["invalid"], None, None), NO_LABEL, (0, 0, 0)]
        csv.write_text("nothing\n")
        status, line = fault(page.server, "state")
        assert status == 400 and "must name the columns path_A" in line
        write_pairs(rows, csv)
        assert page.ask()["id"] == second["id"]


def test_empty_labels_are_filled_and_others_stay(some):
    csv = some(3)
    rows = [replace(row, mos=(1.0, 2, 3, 4, 5, 0)) for row in read_pairs(csv, unlabelled=True)]
    rows[1] = replace(rows[1], label=(1, -1, 0))
    write_pairs(rows, csv)
    with labelled(csv) as page:
        assert page.ask()["count"] == 3  # two pairs, and one of them again
        page.answer_all(lambda state: ["same", "invalid", "same"])
        last = page.ask("undo")
        assert last["open"] == 1
        assert last["answers"] == {"VQ": "same", "MQ": "invalid", "TA": ""}
        with open(csv.with_suffix(".jsonl"), "ab") as journal:
            journal.write(b'\n{"question": "')  # a crash in the middle of a line
        assert label.Labelling(csv).state({}) == last
        page.answer(last, ["same"], ["TA"])
        labels = [(0, LABELS["invalid"], 0), (1, -1, 0), (0, LABELS["invalid"], 0)]
        assert read_pairs(csv) == [replace(row, label=x) for row, x in zip(rows, labels)]
        for _ in range(10):
            page.ask("undo")
        assert labels_in(csv) == [NO_LABEL, (1, -1, 0), NO_LABEL]
    csv.with_suffix(".jsonl").unlink()
    write_pairs([rows[1]], csv)
    with pytest.raises(BadInput, match="no empty label; --out"):
        label.Labelling(csv)


def test_odd_names_and_a_path_outside(tmp_path):
    names = ["a b#1%41.mp4", "ü'&?=;.mp4", 'q"u,\no.MOV', "..mp4"]
    for name in names:
        (tmp_path / name).write_text(name)
    rows = [Pair(*names[i : i + 2], "x", NO_LABEL, 2.0, 8.0, 2.0, 8.0) for i in (0, 2)]
    write_pairs(rows, tmp_path / "pairs.csv")
    seen = set()

    def look(state):
        assert not any(name in json.dumps(state) for name in names)
        seen.update(clip.decode() for clip in page.clips(state))
        return ["left", "left", "left"]

    with labelled(tmp_path / "pairs.csv") as page:
        page.answer_all(look)
    assert seen == set(names)
    (tmp_path / "in").mkdir()
    write_pairs([replace(rows[0], path_a="../a b#1%41.mp4")], tmp_path / "in" / "pairs.csv")
    with pytest.raises(BadInput, match="does not lie in the data folder"):
        label.Labelling(tmp_path / "in" / "pairs.csv")


def test_a_run_asks_the_person_at_the_keyboard_and_learns_the_answers(tmp_path):
    log, out = tmp_path / "log", tmp_path / "out"
    flags = ["--algo=dpo", "--refresh=2", "--refresh-pairs=3", "--ask", f"--out={out}"]
    flags += tiny_checkpoints(tmp_path)
    assert ended(fork(small_rounds, *flags, output=log)) == 130, log.read_text()
    csv = Path(re.search(r"`python -m pages.label (\S+)`", log.read_text())[1])
    with labelled(csv) as page:  # A is better in VQ and TA, B in MQ
        page.answer_all(lambda state: sides_of("ABA", state))
    assert ended(fork(small_rounds, *flags, "--resume", output=log)) == 0, log.read_text()
    new = torch.load(out / "round.pt", weights_only=True)["labelled"]
    assert new["label"].tolist() == [[1, -1, 1]] * 3
    a, b = to_video(new["clips"]).unbind(1)
    before, after = (load_reward(folder / "reward.pt")[0] for folder in (tmp_path, out))
    lead = [(reward(a, new["y"]) - reward(b, new["y"])).mean(0) for reward in (before, after)]
    assert (torch.tensor([1, -1, 1]) * (lead[1] - lead[0]) > 0.01).all()


def test_hostile_requests_are_refused_and_the_server_lives(some, capfd):
    with labelled(some(1)) as page:
        host, token, question = page.server.host, page.server.token, page.ask()["id"]

        def send(path, method="GET", host=host, header="X: y"):
            return talk(f"{method} {path} HTTP/1.1\r\nHost: {host}\r\n{header}\r\n\r\n".encode())

        def talk(content):
            """The status of what is answered, 0 where the server only hangs up."""
            with socket.create_connection(page.server.server_address, timeout=10) as connection:
                connection.sendall(content)
                connection.shutdown(socket.SHUT_WR)
                answer = connection.makefile("rb").readline().split()
            return int(answer[1]) if len(answer) > 1 and answer[1].isdigit() else 0

        here = f"/{token}/label.html"
        assert send(here) == send(here, header=f"Origin: http://{host}") == 200
        assert send(here, host="evil.example") == send(here, host="127.0.0.1") == 403
        assert send(here, header="Origin: http://evil.example") == 403
        assert send("/") == send("/wrong/state") == send(f"/{token}x/state") == 403
        for path in ("pairs.csv", "../pairs.csv", "%2e%2e/etc/passwd", "/etc/passwd", "label.py"):
            assert send(f"/{token}/{path}") == 404
        assert send(f"/{token}/undo") == 404 and send(here, "DELETE") == 501
        assert send(here + "?" + 70_000 * "x") == 414
        for header in ("Content-Length: 1000000000", "Content-Length: -1", "Transfer-Encoding: x"):
            assert send(f"/{token}/answer", "POST", header=header) == 413
        answer = dict(question=question, dimension="VQ", label="A", seen="left", seconds=1)
        for name in answer:
            for value in ("", "../x", "\0", "x" * 9999):
                assert fault(page.server, "answer", **answer | {name: value})[0] == 400
        assert fault(page.server, "clip", question="../x", clip="../x")[0] == 400
        rng = random.Random(0)
        for _ in range(150):
            talk(bytes(rng.choices(b"GET /:\r\n %\x00\xff[]HTP1.", k=rng.randrange(1, 300))))
        assert page.ask()["open"] == 2 and not any(page.ask()["answers"].values())
    assert "Traceback" not in capfd.readouterr().err


def pressed(*sides):
    """A JavaScript expression: whether just these buttons are pressed, "VQ left" for example."""
    found = "[...document.querySelectorAll('[aria-pressed=true]')]"
    found += ".map((button) => button.dataset.dimension + ' ' + SIDES[button.dataset.side]).join()"
    return f"{found} === {json.dumps(','.join(sides))}"


CLIPS = """// the bytes of both clips, from left to right
const left = (clip) => clip.getBoundingClientRect().left;
const read = async (clip) => {
  while (!clip.src) await new Promise(requestAnimationFrame);
  return [...new Uint8Array(await (await fetch(clip.src)).arrayBuffer())];
};
Promise.all(clips.toSorted((a, b) => left(a) - left(b)).map(read)).then(arguments[0]);"""


def run_label(csv):
    sys.argv = ["label.py", str(csv)]
    label.main()


def test_thirty_pairs_and_a_kill_in_the_middle(browser, some, tmp_path):  # noqa: F811
    csv = some(30)
    names = {path.read_bytes(): path.name for path in tmp_path.glob("*.mp4")}
    rng, expected, on_left = random.Random(0), {}, {}
    log = tmp_path / "log"

    def start():
        log.write_text("")
        process = fork(run_label, csv, output=log)
        while "http" not in log.read_text():
            time.sleep(0.05)
        browser.get(re.search(r"http\S+", log.read_text())[0])
        wait(browser, "Boolean(state.id)")
        return process

    process = start()
    for number in range(33):
        files = browser.execute_async_script(CLIPS)
        left, right = (names[bytes(file)] for file in files)
        sides = rng.choices(range(3), k=3)
        keys = [keys[side] for keys, side in zip(("qwe", "asd", "zxc"), sides)]
        if number == 14:
            press(browser, keys.pop(0))
            first_answer = pressed(f"VQ {('left', 'same', 'right')[sides[0]]}")
            wait(browser, first_answer)
            os.kill(process, signal.SIGKILL)
            assert ended(process) == -signal.SIGKILL
            process = start()
            assert browser.execute_script("return state.count - state.open") == 14
            wait(browser, first_answer)
        num_open = browser.execute_script("return state.open")
        press(browser, "".join(keys))
        wait(browser, "state.open", num_open - 1)
        pair, answers = tuple(sorted((left, right))), (left, "same", right)
        if pair in on_left:
            assert on_left[pair] != left  # asked again, with its sides swapped
        else:
            on_left[pair], expected[pair] = left, [answers[side] for side in sides]
    wait(browser, "$('report').textContent.startsWith('All pairs are labelled')")
    os.kill(process, signal.SIGKILL)
    for row in read_pairs(csv):
        name = {1: row.path_a, 0: "same", -1: row.path_b}
        assert [name[value] for value in row.label] == expected[tuple(sorted(row.paths))]


def test_two_tabs_do_not_overwrite_each_other(browser, some):  # noqa: F811
    with labelled(some(3)) as page:
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
        press(browser, "e")
        wait(browser, "$('alert').textContent.includes('in another tab')")
        press(browser, "a")
        wait(browser, pressed("VQ left", "MQ left"))
        state = page.ask()
        assert state["answers"] == {"VQ": state["left"], "MQ": state["left"], "TA": ""}


def test_clips_in_step_keys_and_looks(browser, some, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.chdir(tmp_path)
    with labelled(some(1)) as page:
        browser.get(page.server.address)
        wait(browser, "clips.every((clip) => clip.currentTime > 0.3)")
        for _ in range(20):
            a, b = browser.execute_script("return clips.map((clip) => clip.currentTime)")
            assert abs(a - b) <= 0.25  # half a frame
        press(browser, " ")
        wait(browser, "clips.every((clip) => clip.paused)")
        browser.execute_script("clips.forEach((clip) => { clip.currentTime = 3.7; })")
        for key, time_of_both in ((",", 3.25), (",", 2.75), (".", 3.25)):
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
        browser.find_element("css selector", "[data-dimension=VQ][data-side='1']").click()
        wait(browser, pressed("VQ same"))
        press(browser, "i?")
        wait(browser, pressed("VQ same", "MQ invalid"))
        assert browser.execute_script("return $('help').open")
        check_looks(browser)
        check_looks(browser, 400)
        press(browser, "x")
        wait(browser, "state.open", 1)
        press(browser, "wsx")
        wait(browser, "$('report').textContent.includes('VideoReward')")
        check_looks(browser, 400)
