"""The studies: jobs that are each done once, and which trainings they hold."""

import json
import math
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import wired
from wired import CPU

import evaluate
import tasks
import world
from data import DIMENSIONS, step_rng
from online import tasks as online_tasks
from studies import beta, catalogue, jobs, nrg, online, policies, reward_model, unified
from studies.jobs import Settings

tiny = wired.tiny
settings_for = partial(Settings, device=CPU)


# ---------------------------------------------------------------------------------------------
# Jobs and caches


def test_a_stopped_study_resumes_with_its_rows(tmp_path):
    done = []

    def job(name, fails=False):
        def run():
            if fails:
                raise KeyboardInterrupt
            done.append(name)
            return [{"name": name}]

        return run

    with pytest.raises(KeyboardInterrupt):
        jobs.work_through({"a": job("a"), "b": job("b", fails=True)}, tmp_path)
    rows = jobs.work_through({"a": job("a"), "b": job("b")}, tmp_path)
    assert done == ["a", "b"] and rows == [{"name": "a"}, {"name": "b"}]


@pytest.mark.skipif(jobs.fcntl is None, reason="no file locks on this system")
def test_a_job_of_another_process_is_left_to_it(tmp_path):
    code = "import fcntl, sys; f = open(sys.argv[1], 'w'); fcntl.flock(f, fcntl.LOCK_EX)"
    code += "; print('locked', flush=True); sys.stdin.read()"
    argv = [sys.executable, "-c", code, str(tmp_path / "a.lock")]
    other = subprocess.Popen(argv, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    queue = {"a": lambda: [1], "b": lambda: [2]}
    try:
        assert other.stdout.readline() == "locked\n"
        assert jobs.work_through(queue, tmp_path) is None
        assert json.loads((tmp_path / "b.json").read_text()) == [2]
    finally:
        other.kill()
        other.wait()
    assert jobs.work_through(queue, tmp_path) == [1, 2]  # a killed process leaves no lock


def test_caches_are_told_apart_by_all_that_they_depend_on(monkeypatch, tmp_path):
    sizes = ({}, {"steps": 2}, {"eval_prompts": 2}, {"eval_pairs": 2})
    folders = [settings_for(work=tmp_path, **size).folder("align") for size in sizes]
    assert len({*folders, settings_for(work=tmp_path).folder("beta")}) == 5
    calls = []
    monkeypatch.setattr(policies, "judge", lambda *a: calls.append(a) or {"call": len(calls)})
    ways = [("hard", 1.0, 3), ("hard", 1.0, 4), ("hard", 2.0, 3), ("large", 1.0, 3)]
    for call, (name, cfg, count) in [*enumerate(ways, 1)] * 2:
        settings = settings_for(work=tmp_path, eval_prompts=count)
        assert policies.base_scores(settings, {name: 9}, (cfg,)) == {"call": call}


def test_means_over_the_dimensions_by_hand():
    z = [1.0, 2.0, -0.6]
    true = (world.TRUE_MEAN + torch.tensor(z) * world.TRUE_STD).tolist()
    rows = []
    for judge, scores in (("oracle", true), ("videoreward", z)):
        row = {"judge": judge, **dict(zip(DIMENSIONS, (0.5, 0.6, 1.0)))}
        rows.append(row | {f"{name}_score": v for name, v in zip(DIMENSIONS, scores)})
    by_oracle, learned = jobs.with_means(rows)
    assert by_oracle["z"] == pytest.approx(0.8, abs=1e-5) and learned["z"] == pytest.approx(0.8)
    assert learned["score"] == pytest.approx(0.8) and learned["wins"] == pytest.approx(0.7)
    assert jobs.with_means([{"t": 0.2}]) == [{"t": 0.2}]


# ---------------------------------------------------------------------------------------------
# Which trainings a job holds


@pytest.fixture
def trainings(monkeypatch, tmp_path):
    """Jobs without learning and sampling: (settings, flags of the trainings so far)."""
    seen = []

    def fit(task, args, device):
        args.out.mkdir(parents=True, exist_ok=True)
        (args.out / "last.pt").touch()
        lines = [{"round": i // 50, "learned": i, "true": -i} for i in range(args.steps)]
        (args.out / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        for step in range(0, args.steps, 10):
            task.batch(step, slice(0, 1))
        seen.append(args)

    def judge(settings, checkpoint, sets, cfgs, steered=None, seed=0):
        name = f"{Path(checkpoint).parent.name}/{Path(checkpoint).name}"
        return {"of": name, "sets": sets, "cfgs": cfgs}

    def new_task(args, device):
        return SimpleNamespace(batch=lambda step, rows: {}, model=None, state_dict=lambda m: {})

    monkeypatch.setattr(policies.trainer, "fit", fit)
    monkeypatch.setattr(online_tasks, "online_task", new_task)
    for algo in tasks.TASKS:
        monkeypatch.setitem(tasks.TASKS, algo, new_task)
    monkeypatch.setattr(policies.resume, "facts", lambda task, step: {})
    monkeypatch.setattr(policies, "save_checkpoint", lambda path, state: path.touch())
    monkeypatch.setattr(policies, "judge", judge)
    monkeypatch.setattr(policies, "base_scores", lambda *args: {})
    monkeypatch.setattr(policies, "drift", lambda checkpoint, device: 0.5)
    monkeypatch.setattr(policies, "rows_of", lambda scores, base, **facts: [facts | scores])
    monkeypatch.setattr(nrg, "load_noisy_reward", lambda path: (torch.nn.Identity(), []))
    monkeypatch.setattr(nrg, "accuracy_rows", lambda *args: [])
    reward = SimpleNamespace(normalised="z-scores", to=lambda d: reward, eval=lambda: reward)
    monkeypatch.setattr(reward_model, "load_reward", lambda path: (reward, []))
    monkeypatch.setattr(reward_model, "SPLITS", {})
    return settings_for(seeds=3, work=tmp_path), seen


EQUAL, TA = (1.0, 1.0, 1.0), (0.0, 0.0, 1.0)
OFFLINE = {"algo": "dpo", "schedule": "constant", "beta": 100, "generated": 0, "align": EQUAL}
TRAININGS = [  # study, job, flags of its trainings
    ("align", "rwr-TA only-2", [{"algo": "rwr", "align": TA, "pairs": 3200}]),
    ("align", "dpo-schedule-TA only-2", [OFFLINE | {"schedule": "(1-t)^2", "align": TA}]),
    ("align", "dpo-own-clips-1:1:1-2", [OFFLINE | {"generated": 1}]),
    ("beta", "dpo-schedule-3000-2", [
        OFFLINE | {"beta": 3000, "schedule": "(1-t)^2", "steps": 200}
    ]),
    ("beta", "rwr-long-2", [{"algo": "rwr", "steps": 1000, "pairs": 3200}]),
    ("rank", "labels-300-2", [{"algo": "dpo", "rank": "labels", "pairs": 300}]),
    ("rank", "reward-300-2", [
        {"algo": "reward", "pairs": 300, "steps": 170, "generated": 0},
        {"algo": "dpo", "rank": "reward", "pairs": 300},
        {"algo": "dpo", "rank": "reward", "pairs": 3200},
    ]),
    ("online", "dpo-rounds-2", [{"algo": "dpo", "rounds": 20, "refresh": None}]),
    ("online", "nft-refreshed-2", [{"algo": "nft", "rounds": 20, "refresh": 2, "steps": 1000}]),
    ("nrg", "labels-2", [{"algo": "nrg", "target": "labels", "time_shift": 1}]),
    ("nrg", "clean-2", [{"algo": "nrg", "target": "reward", "time_shift": 0}]),
    ("nrg", "noised-2", [{"algo": "nrg", "target": "reward", "time_shift": 1}, OFFLINE]),
    ("reward", "btt-separate-1-2", [
        {"loss": "btt", "tokens": "separate", "generated": 0.5, "steps": 1500, "pairs": 24000}
    ]),
    ("reward", "regression-0.01-2", [  # a tenth of the steps on a hundredth of the pairs
        {"loss": "regression", "tokens": "shared", "steps": 150, "pairs": 240}
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("study", "job", "flags"), TRAININGS)
def test_a_job_trains_what_its_name_says(trainings, study, job, flags):
    settings, seen = trainings
    settings.study = study
    rows = catalogue.STUDIES[study].jobs(settings)[job]()
    assert len(seen) == len(flags) and {args.seed for args in seen} == {2}
    for args, expected in zip(seen, flags):
        assert expected == {name: getattr(args, name) for name in expected}
    assert all(row["seed"] == 2 for row in rows)
    if study == "rank" and "reward" in job:
        assert [args.reward for args in seen[1:]] == [seen[0].out / "last.pt"] * 2
    if study in ("align", "rank") or (study == "beta" and "long" not in job):
        assert [row["of"] for row in rows] == [
            f"{args.out.name}/last.pt" for args in seen if args.algo != "reward"
        ]
        assert all(row["drift"] == 0.5 for row in rows)


def test_long_runs_and_rounds_are_judged_on_the_way(trainings):
    settings, _ = trainings
    settings.study = "beta"
    rows = catalogue.STUDIES["beta"].jobs(settings)["sft-long-1"]()
    assert [row["steps"] for row in rows] == [50, 100, 200, 400, 600, 800, 1000]
    assert [row["of"].split("/")[1] for row in rows] == ["judged.pt"] * 6 + ["last.pt"]
    settings.study = "online"
    rows = online.jobs(settings)["nft-1"]()
    judged = [row["round"] for row in rows if row["study"] == "judged"]
    assert judged == [1, 2, 3, 4, 5, 7, 10, 15, 20]
    own = [(row["round"], row["learned"]) for row in rows if row["study"] == "own"]
    assert own == [(n, 50 * n) for n in range(20)]
    assert (settings.folder("online") / "nft-1" / "round-10.pt").exists()  # for the report


def test_guided_rows_are_of_what_their_columns_say(monkeypatch, trainings):
    settings, _ = trainings
    settings.study = "nrg"

    def steered_policy(model, reward, weights, scale, eps, interval, cfg):
        time = reward(None, torch.tensor([0.7]), None)
        return {"weights": weights, "by": (scale, *interval), "time": time, "at": cfg}

    def judge(settings, checkpoint, sets, cfgs, steered):
        return {"of": checkpoint, "sampled_at": cfgs, **steered("policy", cfgs[0])}

    monkeypatch.setattr(policies, "judge", judge)
    monkeypatch.setattr(nrg, "SteeredPolicy", steered_policy)
    reward = SimpleNamespace(to=lambda device: lambda x_t, t, y: round(t.item(), 1))
    monkeypatch.setattr(nrg, "load_noisy_reward", lambda path: (reward, []))
    rows = nrg.reward_rows(settings, "noised", 3)
    dpo = settings.folder("nrg") / "dpo-3" / "last.pt"
    for row in rows:
        assert row["by"] == (row["scale"], 0.0, row["highest"])
        assert row["time"] == 0.7 and row["variant"] == "noised"
        assert (row["at"],) == row["sampled_at"]
        name = "dpo" if row["weights"] == (0, 0, 0) else nrg.name_of(row["weights"])
        assert row["method"].endswith(name)
        is_dpo = row["method"].startswith("dpo")
        assert row["of"] == (dpo if is_dpo else policies.WEIGHTS / "base.pt")
    # a reward that was trained on clean clips is evaluated at t = 0, whatever the sampler's t is
    assert {row["time"] for row in nrg.reward_rows(settings, "clean", 3)} == {0.0}


def test_three_ways_to_p_star_take_their_own_beta_and_noise(monkeypatch):
    losses = []

    def record(*args, **settings):
        losses.append(settings | {"args": args})
        return torch.zeros(()), {}

    monkeypatch.setattr(unified, "fit", lambda network, loss, seed: loss(step_rng(seed, 0)))
    monkeypatch.setattr(unified, "flow_dpo_step", record)
    monkeypatch.setattr(unified, "flow_rwr_step", record)
    monkeypatch.setattr(unified, "noisy_pair_step", record)
    for method in ("dpo-0.3", "dpo-3", "nrg-shared", "nrg-own", "rwr"):
        unified.model_of(method, 0)
    assert [settings.get("beta") for settings in losses] == [0.3, 3.0, None, None, None]
    assert "x1_b" not in losses[2] and not torch.equal(losses[3]["x1_b"], losses[3]["x1"])
    _, _, winner, loser, *_ = losses[0]["args"]  # the reward is x0 itself
    assert winner.mean() > loser.mean() + 0.5
    _, x0, _, weight = losses[-1]["args"]
    assert torch.allclose(weight[1:] / weight[0], (x0[1:, 0] - x0[0]).exp(), rtol=1e-3)


def test_the_unified_view_knows_its_truth(monkeypatch):
    # p* by brute force on a fine grid: p_ref exp(x / beta), normalised
    x = torch.linspace(-6, 8, 140_001, dtype=torch.float64)
    log_p = torch.logsumexp(-0.5 * ((x[:, None] - unified.MEANS.double()) / unified.STD) ** 2, 1)
    p = torch.softmax(log_p + x / unified.BETA, 0)
    share, mean = unified.truth()
    assert mean == pytest.approx((p * x).sum().item(), abs=1e-4)
    low, high = unified.EDGES[40].item(), unified.EDGES[41].item()
    assert share[40].item() == pytest.approx(p[(x >= low) & (x < high)].sum().item(), abs=1e-4)
    monkeypatch.setattr(unified, "SAMPLES", 4000)
    reference, exact = (unified.judged(name, 0)[0] for name in ("reference", "nrg-exact"))
    assert exact["mean"] == pytest.approx(mean, abs=0.05) and exact["distance"] < 0.05
    # p_ref has mean 0, and all of the mass moves to the right
    assert reference["distance"] == pytest.approx(mean, abs=0.08)


# ---------------------------------------------------------------------------------------------
# A whole study


def test_a_tiny_study_from_end_to_end(tmp_path, monkeypatch, capsys):
    for name, value in {"BETAS": (30,), "SCHEDULES": ("dpo-constant",), "LONG": ("sft",)}.items():
        monkeypatch.setattr(beta, name, value)
    monkeypatch.setattr(beta, "LENGTHS", (0.5, 1.0))
    monkeypatch.setattr(policies, "DRIFT_CLIPS", 2)
    flags = ["beta", "--seeds=1", "--steps=2", "--eval-prompts=2", "--device=cpu"]
    flags += ["--eval-pairs=20", f"--out={tmp_path / 'results'}", f"--work={tmp_path / 'work'}"]
    monkeypatch.setattr(sys, "argv", ["evaluate.py", *flags])
    evaluate.main()
    saved = json.loads((tmp_path / "results" / "beta.json").read_text())
    assert {"command", "commit", "torch", "device", "rows"} == saved.keys()
    rows = saved["rows"]
    # two prompt sets and two judges for the base, SFT after 1 and 2 steps, and Flow-DPO
    assert len(rows) == 2 * 2 * 4 and not any(math.isnan(row["VQ"]) for row in rows)
    assert all(row[name] == 0.5 for row in rows if row["method"] == "base" for name in DIMENSIONS)
    assert all((row["drift"] > 0) == (row["method"] != "base") for row in rows)
    text = (tmp_path / "results" / "beta.md").read_text()
    assert "| SFT | 1 |" in text and "| Flow-DPO, constant beta | 30 |" in text
    assert (tmp_path / "results" / "beta_long.svg").exists()
    log = tmp_path / "work" / "beta-2-2-20" / "sft-long-0" / "metrics.jsonl"
    assert len(log.read_text().splitlines()) == 2
    log.unlink()
    evaluate.main()  # all jobs are done
    assert not log.exists() and "wrote" in capsys.readouterr().out.splitlines()[-1]
