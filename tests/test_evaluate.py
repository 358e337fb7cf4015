"""The studies: what is kept, what is shared between processes, and the tables' arithmetic."""

import json
import math
import re
import shutil
import subprocess
import sys
from xml.etree import ElementTree

import pytest
import torch

import evaluate
import judge
from data import Pairs
from online import refresh, rounds
from runtime.cli import BadInput
from studies import align, bench, beta, guidance, jobs, observer, online, rank, reward_model, tables
from studies.report.charts import COLOURS, Chart, picture, ticks


def test_a_stopped_study_goes_on_and_keeps_what_it_has(tmp_path):
    made = []

    def job(name, fails=False):
        def run():
            if fails:
                raise KeyboardInterrupt
            made.append(name)
            return [{"name": name}]

        return run

    with pytest.raises(KeyboardInterrupt):
        jobs.work_through({"a": job("a"), "b": job("b", fails=True)}, tmp_path)
    assert made == ["a"]
    rows = jobs.work_through({"a": job("a"), "b": job("b")}, tmp_path)
    assert made == ["a", "b"] and rows == {"a": [{"name": "a"}], "b": [{"name": "b"}]}


@pytest.mark.skipif(jobs.fcntl is None, reason="no file locks on this system")
def test_a_job_that_another_process_holds_is_left_to_it(tmp_path):
    code = f"import fcntl, time; f = open({str(tmp_path / 'a.lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
    code += "; print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        wanted = {"a": lambda: [1], "b": lambda: [2]}
        assert jobs.work_through(wanted, tmp_path) is None  # b was done, a was not
        assert not (tmp_path / "a.json").exists() and json.loads(
            (tmp_path / "b.json").read_text()
        ) == [2]
    finally:
        other.kill()
        other.wait()
    assert jobs.work_through(wanted, tmp_path) == {
        "a": [1],
        "b": [2],
    }  # a killed process leaves nothing held


def pairs(label, overall):
    """Pairs whose clips A differ from B by .3, .3, -.3 and .1 in true VQ, and in nothing else."""
    label, overall = torch.tensor(label), torch.tensor(overall)
    truth = torch.full((len(label), 2, 3), 0.5)
    truth[:, 0, 0] += torch.tensor([0.3, 0.3, -0.3, 0.1])
    return Pairs(torch.zeros(len(label), 1), clips=None, label=label, overall=overall, truth=truth)


def test_table_columns_by_hand():
    # four pairs, differences of VQ, MQ, TA; labels of VQ: A, A, B, tie
    delta = torch.tensor([[3.0, 1.0, 0.0], [-1.0, 1.0, 0.0], [-3.0, 1.0, 0.0], [0.5, 1.0, 0.0]])
    score = torch.stack((delta, torch.zeros(4, 3)), 1)
    row = reward_model.accuracies(
        score, pairs([[1, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 0, 0]], [1, 1, -1, 0])
    )
    # VQ: right on pairs 1 and 3; with ties below .5 also on pair 4
    assert (
        row["VQ_without"] == pytest.approx(2 / 3)
        and row["VQ_with"] == 0.75
        and row["VQ_ties"] == 0.25
    )
    assert row["MQ_with"] == 1.0 and row["MQ_ties"] == 1.0  # all ties, all below a threshold of 1
    # by the truth .1 is a third of a deviation, .307, and a tie; of the other three the first and the third are right
    assert row["VQ_true"] == pytest.approx(2 / 3) and row["VQ_pairs"] == 3 and row["MQ_pairs"] == 0
    # Overall: means 4/3, 0, -2/3, 1/2 against A, A, B, tie; below 1/2 a tie: pairs 1, 3 and 4 are right
    assert row["Overall_without"] == pytest.approx(2 / 3) and row["Overall_with"] == 0.75


def test_tied_differences_by_hand():
    delta = torch.tensor([[2.0, 1.0, 1.0], [-4.0, 1.0, 1.0], [0.3, 1.0, 1.0], [-0.9, 1.0, 1.0]])
    labels = [[1, 1, 1], [-1, 0, 1], [0, 0, 0], [0, 0, 0]]
    row = reward_model.tied_differences(
        torch.stack((delta, torch.zeros(4, 3)), 1), pairs(labels, [0] * 4)
    )
    assert row["VQ_tied"] == pytest.approx(0.6 / 3)  # tied .3 and .9, decided 2 and 4
    assert (
        row["VQ_tied_histogram"][:2] == [0.5, 0.5] and sum(row["VQ_tied_histogram"]) == 1
    )  # .1 and .3 of 3
    assert row["MQ_tied"] == 1.0


def test_mean_and_spread():
    assert judge.mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)  # the sample's standard deviation
    assert judge.mean_and_spread([5.0]) == (5.0, 0.0)


def test_reward_study_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reward_model, "FRACTIONS", (0.5,))
    monkeypatch.setattr(
        reward_model, "GENERATED", {name: {name: {"steps": 1}} for name in reward_model.GENERATED}
    )
    flags = ["reward", "--seeds", "1", "--steps", "2", "--eval-pairs", "40", "--device", "cpu"]
    flags += ["--out", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    evaluate.main()
    saved = json.loads((tmp_path / "results" / "reward.json").read_text())
    assert {
        "command",
        "commit",
        "torch",
        "device",
        "rows",
    } == saved.keys() and "--eval-pairs 40" in saved["command"]
    rows = {(row["model"], row["split"], row["fraction"]): row for row in saved["rows"]}
    # splits x (random, oracle, four models, one without generated pairs, two on half the pairs)
    assert len(rows) == 5 * (2 + 4 + 1 + 2)
    oracle = rows["oracle", "validation", 1.0]
    assert (
        oracle["VQ_without"] > 0.97 and oracle["TA_with"] > 0.9 and oracle["Overall_without"] > 0.9
    )
    assert rows["random", "benchmark", 1.0]["VQ_without"] < 0.8
    for split in (
        "validation",
        "benchmark",
        "base",
        "policy",
        "cfg3",
    ):  # nan where no pair is decided
        assert not any(
            rows["oracle", split, 1.0][f"{name}_true"] < 1 for name in ("VQ", "MQ", "TA")
        )
    text = (tmp_path / "results" / "reward.md").read_text()
    assert (
        "| btt-separate |" in text
        and "| btt-rendered |" in text
        and "Fig. 2" in text
        and "Fig. 3" in text
    )
    shown = lines_of(tmp_path / "results" / "reward_fraction.svg")
    assert shown == {
        f"validation, {kind} ties": ["bt-shared", "regression"] for kind in ("without", "with")
    }
    shown = lines_of(tmp_path / "results" / "reward_ties.svg")
    assert shown == {name: ["bt-shared", "btt-shared"] for name in ("VQ", "MQ", "TA")}
    out = capsys.readouterr().out
    assert "wrote" in out.splitlines()[-1]
    with pytest.raises(
        BadInput, match="argument --seeds: 0: must be a whole number from 1 to 1000000000"
    ):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "reward", "--seeds", "0"])
        evaluate.main()


def run_study(study, tmp_path, monkeypatch):
    """A study of tiny runs; its rows and its Markdown."""
    monkeypatch.setattr(align, "SETS", {"standard": 3, "hard": 2, "large": 2})
    monkeypatch.setattr(beta, "SETS", {"standard": 3, "hard": 2})
    monkeypatch.setattr(beta, "BETAS", (1000,))
    monkeypatch.setattr(beta, "LENGTHS", (0.5, 1.0))
    monkeypatch.setattr(jobs, "DRIFT_CLIPS", 2)
    for module in (align, beta, jobs):
        monkeypatch.setattr(module, "BEST_OF", (1, 2))
    flags = [study, "--seeds", "1", "--steps", "2", "--eval-pairs", "10", "--device", "cpu"]
    flags += ["--out", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    evaluate.main()
    saved = json.loads((tmp_path / "results" / f"{study}.json").read_text())
    return saved["rows"], (tmp_path / "results" / f"{study}.md").read_text()


def test_rank_study_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(rank, "REWARD_STEPS", {12: 2, 8: 2})
    monkeypatch.setattr(rank, "SETS", {"standard": 3})
    rows, text = run_study("rank", tmp_path, monkeypatch)
    runs = [
        (row["labelled"], row["method"], row["clips"]) for row in rows if row["judge"] == "oracle"
    ]
    by_few = [(8, "labels", 8), (8, "reward", 8), (8, "reward", 12)]
    assert runs == [(12, "labels", 12), (12, "reward", 12), *by_few]
    assert all((row["reward_minutes"] > 0) == (row["method"] == "reward") for row in rows)
    assert text.count("\n| 8 | reward |") == 2


def test_align_study_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(align, "CFGS", (1.0,))
    monkeypatch.setattr(align, "ALIGNED", {"1:1:1": "1,1,1"})
    rows, text = run_study("align", tmp_path, monkeypatch)
    trained = [row for row in rows if not row["method"].startswith("best")]
    assert (
        len(trained) == (1 + 5) * 3 * 2 and len(rows) == len(trained) + 2 * 2
    )  # base and five methods; sets; judges
    assert {row["method"] for row in trained} == {
        "base",
        "sft",
        "rwr",
        "dpo-constant",
        "dpo-schedule",
        "dpo-own-clips",
    }
    best = {row["method"]: row["drift"] for row in rows if row["method"].startswith("best")}
    assert best == {"best-of-1": 0, "best-of-2": pytest.approx(math.log(2) - 0.5)}
    base = [row for row in rows if row["method"] == "base"]
    assert all(
        row[name] == 0.5 for row in base for name in ("VQ", "MQ", "TA")
    )  # a draw with itself
    assert "Table 3" in text and "| constant beta above (1-t)^2 in TA, 1:1:1 |" in text


def test_beta_study_from_end_to_end(tmp_path, monkeypatch):
    rows, text = run_study("beta", tmp_path, monkeypatch)
    sweep = [row for row in rows if row["study"] == "sweep"]
    assert {(row["method"], row["beta"]) for row in sweep} == {
        ("dpo-constant", 1000),
        ("dpo-schedule", 1000),
    }
    long = [row for row in rows if row["study"] == "long" and row["method"] == "dpo-constant"]
    assert sorted({row["steps"] for row in long}) == [1, 2] and all(
        row["drift"] >= 0 for row in rows
    )
    log = tmp_path / "work" / "beta" / "dpo-constant-long-0" / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [
        0,
        1,
    ]  # one run, not two
    assert "dpo-schedule: long run" in text
    methods = ["dpo-constant", "dpo-schedule"]
    shown = lines_of(tmp_path / "results" / "beta_sweep.svg")
    assert shown == {
        f"TA, {n} set, {by}": methods
        for n in ("standard", "hard")
        for by in ("oracle", "videoreward")
    }
    shown = lines_of(tmp_path / "results" / "beta_long.svg")
    every = [*methods, "sft", "rwr", "best-of-n"]
    compared = [
        "dpo-constant",
        "sft",
        "rwr",
        "best-of-n",
    ]  # the schedule's collapse would hide the others
    assert shown.pop("the truth by what VideoReward says") == compared
    assert shown == dict.fromkeys(every, ["oracle", "videoreward"])


def test_online_study_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(online, "SETS", {"standard": 3})
    monkeypatch.setattr(online, "ROUNDS", 2)
    monkeypatch.setattr(online, "JUDGED", (1, 2))
    short = ["--rounds=2", "--clips=2", "--batch=2"]
    arms = {"dpo": [], "dpo-rounds": short, "nft-refreshed": ["--algo=nft", *short, "--refresh=1"]}
    monkeypatch.setattr(online, "ARMS", arms)
    monkeypatch.setattr(rounds, "MOST_PROMPTS", 2)
    for name, value in {"OLD": 4, "STEPS": 1, "BATCH": 4}.items():
        monkeypatch.setattr(refresh, name, value)
    rows, text = run_study("online", tmp_path, monkeypatch)
    judged = [row for row in rows if row["study"] == "judged" and row["judge"] == "oracle"]
    places = [("base", 0), *((arm, number) for arm in arms for number in (1, 2))]
    assert [(row["method"], row["round"]) for row in judged] == places
    assert judged[0]["drift"] == 0 and all(row["drift"] >= 0 for row in judged)
    own = [(row["method"], row["round"]) for row in rows if row["study"] == "own"]
    assert own == [(arm, number) for arm in list(arms)[1:] for number in (0, 1)]
    logged = (
        (tmp_path / "work" / "online" / "dpo-rounds-0" / "metrics.jsonl").read_text().splitlines()
    )
    kept = tmp_path / "work" / "online" / "nft-refreshed-0"
    assert (kept / "round-2.pt").read_bytes() == (
        kept / "last.pt"
    ).read_bytes()  # for the report's clips
    said = next(row for row in rows if row["study"] == "own" and row["method"] == "dpo-rounds")
    assert (
        said["true"] == json.loads(logged[0])["true"]
        and said["learned"] == json.loads(logged[0])["learned"]
    )
    assert "| nft-refreshed, 2 |" in text and "| dpo-rounds, learned |" in text
    shown = lines_of(tmp_path / "results" / "online.svg")
    assert shown.pop("the truth by round") == shown.pop("the truth by drift") == list(arms)
    assert shown == dict.fromkeys(arms, ["oracle", "videoreward"])


def test_nrg_study_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(guidance, "SETS", {"large": 2})
    monkeypatch.setattr(guidance, "TABLE_5", ((0, 0, 1), (1, 1, 1)))
    monkeypatch.setattr(guidance, "RISING", (1,))
    monkeypatch.setattr(guidance, "SCALES", (2,))
    monkeypatch.setattr(guidance, "HIGHEST", (1.0,))
    monkeypatch.setattr(observer, "KNOWN", 96)
    monkeypatch.setattr(observer, "LEARNED", 96)
    rows, text = run_study("nrg", tmp_path, monkeypatch)
    noised = [
        row for row in rows if row.get("variant") == "noised" and row.get("judge") == "oracle"
    ]
    assert {row["method"] for row in noised if row["study"] == "weights"} == {
        "nrg-0:0:1",
        "nrg-1:1:1",
    }
    assert {row["method"] for row in noised if row["study"] == "one"} == {
        "nrg-1:0:0",
        "nrg-0:1:0",
        "nrg-0:0:1",
    }
    assert {row["variant"] for row in rows if row["study"] == "reward"} == {"labels", "clean"}
    assert all(
        0 <= row[name] <= 1 for row in rows if row["study"] != "told" for name in ("VQ", "MQ", "TA")
    )
    told = [row for row in rows if row["study"] == "told"]
    assert len(told) == 4 * 6 and {row["variant"] for row in told} == {
        "ideal",
        "probe 2",
        "probe 4",
        "noised",
    }
    assert all(0 <= row[name] <= 1 for row in told for name in ("colour", "shape", "direction"))
    assert "## Table 5" in text and "| dpo+nrg-1:1:1, CFG 2 |" in text
    shown = lines_of(tmp_path / "results" / "nrg.svg")
    assert shown == dict.fromkeys(
        ("pair accuracy", "1:1:1, oracle", "1:1:1, videoreward"), ["VQ", "MQ", "TA"]
    )
    readers = ["ideal", "probe 2", "probe 4", "noised"]
    assert lines_of(tmp_path / "results" / "observer.svg") == dict.fromkeys(
        ("colour", "shape", "direction"), readers
    )


def test_a_step_is_cheaper_where_the_reward_shares_the_trunk():
    costs = bench.sampling_seconds(torch.device("cpu"), rounds=1)
    assert (
        costs["plain"] < costs["NRG, own trunk"]
        and costs["NRG, shared trunk"] < costs["NRG, own trunk"]
    )


# ---------------------------------------------------------------------------------------------
# Charts


SVG = "{http://www.w3.org/2000/svg}"


def charts_of(root):
    """{title: [(name, line)]} of a picture: the text of each name in it and the polyline of the same colour."""
    found = {}
    for chart in root.findall(f"{SVG}g"):
        title, *names = (text for text in chart.findall(f"{SVG}text"))
        lines = chart.findall(f".//{SVG}polyline")
        assert title.get("class") == "title"
        assert [name.get("class") for name in names] == [
            line.get("class").replace("line", "name") for line in lines
        ]
        found[title.text] = [(name.text, line) for name, line in zip(names, lines)]
    return found


def lines_of(path):
    """{title: names of the lines} of a picture, which stand whole in it and hold no nan."""
    root, shown = ElementTree.parse(path).getroot(), {}
    width, height = map(float, root.get("viewBox").split()[2:])
    assert root.get("width") == f"{width:g}" and not re.search(r"\bnan\b", path.read_text())
    for title, lines in charts_of(root).items():
        places = [point for _, line in lines for point in line.get("points").split()]
        assert places and all(
            0 < x < width and 0 < y < height for x, y in (map(float, p.split(",")) for p in places)
        )
        shown[title] = [name for name, _ in lines]
    return shown


def test_a_chart_shows_its_points_where_they_belong():
    two = [
        ("a", [0, 1, 2], [0.0, 0.0, 1.0], None),
        ("b<c", [0, 2], [0.5, 0.25], None),
        ("none", [1], [math.nan], None),
    ]
    root = ElementTree.fromstring(picture([Chart("<t>", two, "x & y", "z", level=0.5)]))
    assert (
        root.tag == f"{SVG}svg" and root.get("viewBox") == "0 0 340 252"
    )  # 216 and 36 for title and names
    (a, first), (b, second) = charts_of(root)["<t>"]
    # 8 in from 44 and 330: x = 52, 187, 322. From 180 up to 20 for -.06 to 1.06: 180 - (y + .06) 160 / 1.12
    assert a == "a" and first.get("points") == "52.0,171.4 187.0,171.4 322.0,28.6"
    assert b == "b<c" and second.get("points") == "52.0,100.0 322.0,135.7"
    circles = [(c.get("class"), c.get("cx"), c.get("cy")) for c in root.iter(f"{SVG}circle")]
    assert circles[:3] == [
        ("dot c0", "52.0", "171.4"),
        ("dot c0", "187.0", "171.4"),
        ("dot c0", "322.0", "28.6"),
    ]
    assert len(circles) == 5  # a point of few is marked; none of what is not a number
    assert [path.get("d") for path in root.iter(f"{SVG}path") if path.get("class") == "level"] == [
        "M44 100.0H330"
    ]
    texts = [text.text for text in root.iter(f"{SVG}text")]
    assert {"x & y", "z"} <= set(texts) and "none" not in texts
    # x: 0, .5, ... 2, y: 0, .2, ... 1, each where its points are
    ticked = {
        (text.text, text.get("x") if text.get("text-anchor") == "middle" else text.get("y"))
        for text in root.iter(f"{SVG}text")
    }
    assert {("0", "52.0"), ("1", "187.0"), ("2", "322.0"), ("0", "174.9"), ("1", "32.1")} <= ticked
    style = root.find(f"{SVG}style").text
    assert all(
        f".line.c{i},.whisker.c{i}{{stroke:{colour}}}" in style for i, colour in enumerate(COLOURS)
    )


def test_spreads_are_whiskers_of_few_points_and_a_band_of_many():
    # .5 +- .5 at x = 1 fills the range: 180 - (y + .06) 160 / 1.12 from y = 0 to 1
    few = ElementTree.fromstring(
        picture([Chart("t", [("a", [0, 1, 2], [0.5] * 3, [0.0, 0.5, 0.0])], "x", "y")])
    )
    whiskers = [
        path.get("d") for path in few.iter(f"{SVG}path") if path.get("class") == "whisker c0"
    ]
    assert whiskers == ["M187.0 171.4V28.6"] and not list(few.iter(f"{SVG}polygon"))
    many = [("a", list(range(13)), [0.5] * 13, [0.5] * 13)]
    many = ElementTree.fromstring(picture([Chart("t", many, "x", "y")]))
    (band,) = many.iter(f"{SVG}polygon")
    around = band.get("points").split()
    assert len(around) == 26 and around[0] == "52.0,171.4" and around[12] == "322.0,171.4"
    assert (
        around[13] == "322.0,28.6"
        and around[-1] == "52.0,28.6"
        and not list(many.iter(f"{SVG}circle"))
    )


def test_charts_stand_three_across_and_a_logarithmic_axis_is_one():
    chart = Chart("log", [("a", [1, 10, 100], [0.0, 0.0, 1.0], None)], "beta", "y", log=True)
    root = ElementTree.fromstring(picture([chart] * 3 + [Chart("last", [], "x", "y")]))
    assert (
        root.get("viewBox") == "0 0 1020 504" and root.get("width") == "1020"
    )  # 3 x 340, 2 x (216 + 36)
    places = [chart.get("transform") for chart in root.findall(f"{SVG}g")]
    assert places == ["translate(0 0)", "translate(340 0)", "translate(680 0)", "translate(0 252)"]
    lines = [line.get("points") for line in root.iter(f"{SVG}polyline")]
    assert (
        lines == ["52.0,171.4 187.0,171.4 322.0,28.6"] * 3
    )  # equal factors, equal steps; nothing of an empty chart
    ticked = {(text.text, text.get("x")) for text in root.iter(f"{SVG}text")}
    assert {("1", "52.0"), ("10", "187.0"), ("100", "322.0")} <= ticked  # at the points


def test_ticks_are_round_numbers():
    assert ticks(0.0, 1.0).tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert ticks(-0.04, 0.11).tolist() == pytest.approx([-0.025, 0, 0.025, 0.05, 0.075, 0.1])


# ---------------------------------------------------------------------------------------------
# Tables in the documents


def run_tables(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "tables", *flags])
    evaluate.main()


def test_tables_in_the_documents_are_those_of_the_results(monkeypatch):
    run_tables(monkeypatch, "--check")


def test_an_outdated_table_is_found_and_written_anew(tmp_path, monkeypatch):
    root = tmp_path / "copy"
    leave_out = shutil.ignore_patterns(".*", "out", "tests", "weights")
    shutil.copytree(tables.ROOT, root, ignore=leave_out)
    monkeypatch.setattr(tables, "ROOT", root)
    readme = root / "README.md"
    before = readme.read_text()
    readme.write_text(before.replace("| SFT | 0.87", "| SFT | 0.88"))
    with pytest.raises(BadInput, match="README.md"):
        run_tables(monkeypatch, "--check")
    run_tables(monkeypatch)
    assert readme.read_text() == before
    result = root / "results" / "align.json"
    result.write_text(re.sub(r'"VQ": 0\.\d+', '"VQ": 0.25', result.read_text()))
    with pytest.raises(BadInput, match="align.md.*README.md.*alignment.md"):
        run_tables(monkeypatch, "--check")
