"""The studies: what is kept, what is shared between processes, and the tables' arithmetic."""

import json
import subprocess
import sys

import imageio.v3 as imageio
import numpy as np
import pytest
import torch

import evaluate
from data import Pairs
from runtime.cli import BadInput
from studies import align, beta, guidance, reward_model
from studies.report import charts


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
        evaluate.work_through({"a": job("a"), "b": job("b", fails=True)}, tmp_path)
    assert made == ["a"]
    rows = evaluate.work_through({"a": job("a"), "b": job("b")}, tmp_path)
    assert made == ["a", "b"] and rows == {"a": [{"name": "a"}], "b": [{"name": "b"}]}


@pytest.mark.skipif(evaluate.fcntl is None, reason="no file locks on this system")
def test_a_job_that_another_process_holds_is_left_to_it(tmp_path):
    code = f"import fcntl, time; f = open({str(tmp_path / 'a.lock')!r}, 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
    code += "; print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout.readline() == "held\n"
        jobs = {"a": lambda: [1], "b": lambda: [2]}
        assert evaluate.work_through(jobs, tmp_path) is None  # b was done, a was not
        assert not (tmp_path / "a.json").exists() and json.loads((tmp_path / "b.json").read_text()) == [2]
    finally:
        other.kill()
        other.wait()
    assert evaluate.work_through(jobs, tmp_path) == {"a": [1], "b": [2]}  # a killed process leaves nothing held


def pairs(label, overall):
    label, overall = torch.tensor(label), torch.tensor(overall)
    return Pairs(torch.zeros(len(label), 1), clips=None, label=label, overall=overall)


def test_table_columns_by_hand():
    # four pairs, differences of VQ, MQ, TA; labels of VQ: A, A, B, tie
    delta = torch.tensor([[3.0, 1.0, 0.0], [-1.0, 1.0, 0.0], [-3.0, 1.0, 0.0], [0.5, 1.0, 0.0]])
    score = torch.stack((delta, torch.zeros(4, 3)), 1)
    row = reward_model.accuracies(score, pairs([[1, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 0, 0]], [1, 1, -1, 0]))
    # VQ: right on pairs 1 and 3; with ties below .5 also on pair 4
    assert row["VQ_without"] == pytest.approx(2 / 3) and row["VQ_with"] == 0.75 and row["VQ_ties"] == 0.25
    assert row["MQ_with"] == 1.0 and row["MQ_ties"] == 1.0  # all ties, all below a threshold of 1
    # Overall: means 4/3, 0, -2/3, 1/2 against A, A, B, tie; below 1/2 a tie: pairs 1, 3 and 4 are right
    assert row["Overall_without"] == pytest.approx(2 / 3) and row["Overall_with"] == 0.75


def test_tied_differences_by_hand():
    delta = torch.tensor([[2.0, 1.0, 1.0], [-4.0, 1.0, 1.0], [0.3, 1.0, 1.0], [-0.9, 1.0, 1.0]])
    labels = [[1, 1, 1], [-1, 0, 1], [0, 0, 0], [0, 0, 0]]
    row = reward_model.tied_differences(torch.stack((delta, torch.zeros(4, 3)), 1), pairs(labels, [0] * 4))
    assert row["VQ_tied"] == pytest.approx(0.6 / 3)  # tied .3 and .9, decided 2 and 4
    assert row["VQ_tied_histogram"][:2] == [0.5, 0.5] and sum(row["VQ_tied_histogram"]) == 1  # .1 and .3 of 3
    assert row["MQ_tied"] == 1.0


def test_mean_and_spread():
    assert reward_model.mean_and_spread([1.0, 2.0, 3.0]) == (2.0, 1.0)  # the sample's standard deviation
    assert reward_model.mean_and_spread([5.0]) == (5.0, 0.0)


def test_reward_study_from_end_to_end(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(reward_model, "FRACTIONS", (0.5,))
    flags = ["reward", "--seeds", "1", "--steps", "2", "--eval-pairs", "40", "--device", "cpu"]
    flags += ["--out", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    evaluate.main()
    saved = json.loads((tmp_path / "results" / "reward.json").read_text())
    assert {"command", "commit", "torch", "device", "rows"} == saved.keys() and "--eval-pairs 40" in saved["command"]
    rows = {(row["model"], row["split"], row["fraction"]): row for row in saved["rows"]}
    assert len(rows) == 2 * (2 + 4 + 2)  # splits x (random, oracle, four models, two on half the pairs)
    oracle = rows["oracle", "validation", 1.0]
    assert oracle["VQ_without"] > 0.97 and oracle["TA_with"] > 0.9 and oracle["Overall_without"] > 0.9
    assert rows["random", "benchmark", 1.0]["VQ_without"] < 0.8
    text = (tmp_path / "results" / "reward.md").read_text()
    assert "| btt-separate |" in text and "Fig. 2" in text and "Fig. 3" in text
    for name in ("reward_fraction", "reward_ties"):
        assert imageio.imread(tmp_path / "results" / f"{name}.png").shape[2] == 3
    out = capsys.readouterr().out
    assert "wrote" in out.splitlines()[-1]
    with pytest.raises(BadInput, match="--seeds 0"):
        monkeypatch.setattr(sys, "argv", ["evaluate.py", "reward", "--seeds", "0"])
        evaluate.main()


def run_study(study, tmp_path, monkeypatch):
    """A study of tiny runs; its rows and its Markdown."""
    monkeypatch.setattr(align, "SETS", {"standard": 3, "hard": 2, "large": 2})
    monkeypatch.setattr(beta, "SETS", {"standard": 3, "hard": 2})
    monkeypatch.setattr(beta, "BETAS", (1000,))
    monkeypatch.setattr(beta, "LENGTHS", (0.5, 1.0))
    flags = [study, "--seeds", "1", "--steps", "2", "--eval-pairs", "10", "--device", "cpu"]
    flags += ["--out", str(tmp_path / "results"), "--work", str(tmp_path / "work")]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    evaluate.main()
    saved = json.loads((tmp_path / "results" / f"{study}.json").read_text())
    return saved["rows"], (tmp_path / "results" / f"{study}.md").read_text()


def test_align_study_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(align, "CFGS", (1.0,))
    monkeypatch.setattr(align, "ALIGNED", {"1:1:1": "1,1,1"})
    rows, text = run_study("align", tmp_path, monkeypatch)
    assert len(rows) == (1 + 4) * 3 * 2  # base and four methods; sets; judges
    assert {row["method"] for row in rows} == {"base", "sft", "rwr", "dpo-constant", "dpo-schedule"}
    base = [row for row in rows if row["method"] == "base"]
    assert all(row[name] == 0.5 for row in base for name in ("VQ", "MQ", "TA"))  # a draw with itself
    assert "Table 3" in text and "| constant beta above (1-t)^2 in TA, 1:1:1 |" in text


def test_beta_study_from_end_to_end(tmp_path, monkeypatch):
    rows, text = run_study("beta", tmp_path, monkeypatch)
    sweep = [row for row in rows if row["study"] == "sweep"]
    assert {(row["method"], row["beta"]) for row in sweep} == {("dpo-constant", 1000), ("dpo-schedule", 1000)}
    long = [row for row in rows if row["study"] == "long" and row["method"] == "dpo-constant"]
    assert sorted({row["steps"] for row in long}) == [1, 2] and all(row["drift"] >= 0 for row in rows)
    log = tmp_path / "work" / "beta" / "dpo-constant-long-0" / "metrics.jsonl"
    assert [json.loads(line)["step"] for line in log.read_text().splitlines()] == [0, 1]  # one run, not two
    assert "dpo-schedule: long run" in text
    for name in ("beta_sweep", "beta_long"):
        assert imageio.imread(tmp_path / "results" / f"{name}.png").shape[2] == 3


def test_nrg_study_from_end_to_end(tmp_path, monkeypatch):
    monkeypatch.setattr(guidance, "SETS", {"large": 2})
    monkeypatch.setattr(guidance, "TABLE_5", ((0, 0, 1), (1, 1, 1)))
    monkeypatch.setattr(guidance, "RISING", (1,))
    monkeypatch.setattr(guidance, "SCALES", (2,))
    rows, text = run_study("nrg", tmp_path, monkeypatch)
    noised = [row for row in rows if row.get("variant") == "noised" and row.get("judge") == "oracle"]
    assert {row["method"] for row in noised if row["study"] == "weights"} == {"nrg-0:0:1", "nrg-1:1:1"}
    assert {row["method"] for row in noised if row["study"] == "one"} == {"nrg-1:0:0", "nrg-0:1:0", "nrg-0:0:1"}
    assert {row["variant"] for row in rows if row["study"] == "reward"} == {"clean", "trained trunk", "no contrast"}
    assert all(
        0 <= row[name] <= 1 for row in rows if row["study"] not in ("cost", "told") for name in ("VQ", "MQ", "TA")
    )
    told = [row for row in rows if row["study"] == "told"]
    assert len(told) == 12 and all(0 <= row[name] <= 1 for row in told for name in ("colour", "shape", "direction"))
    costs = {row["method"]: row["seconds"] for row in rows if row["study"] == "cost"}
    assert costs["plain"] < costs["NRG, own trunk"] and costs["NRG, shared trunk"] < costs["NRG, own trunk"]
    assert "## Table 5" in text and "| dpo+nrg-1:1:1, CFG 2 |" in text
    assert imageio.imread(tmp_path / "results" / "nrg.png").shape[2] == 3


def test_a_chart_shows_its_points_where_they_belong():
    picture = charts.draw(charts.Chart("t", [("a", [0, 1, 2], [0.0, 0.0, 1.0], None)], "x", "y"))
    blue = (picture == np.array(charts.COLOURS[0])).all(-1)
    blue[:40] = False  # the legend
    columns = np.nonzero(blue.any(0))[0]
    rows = [np.nonzero(blue[:, column])[0].mean() for column in columns]
    middle = len(columns) // 2
    assert np.ptp(rows[: middle - 4]) < 2  # flat, then straight up
    slope = np.diff(rows[middle + 4 : -4])
    assert (slope <= 0).all() and rows[-3] < rows[0] - 150


def test_ticks_are_round_numbers():
    assert charts.ticks(0.0, 1.0).tolist() == pytest.approx([0, 0.2, 0.4, 0.6, 0.8, 1.0])
    assert charts.ticks(-0.04, 0.11).tolist() == pytest.approx([-0.025, 0, 0.025, 0.05, 0.075, 0.1])
