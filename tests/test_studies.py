"""The studies' wires: seeds that vary what they should, caches that tell their contents apart, rows that say what was
sampled, and tables whose cells are the rows that their titles name.
"""

import json
from argparse import Namespace
from itertools import product
from zlib import crc32

import pytest
import torch
import wired
from wired import CPU

import tasks
import trainer
import world
from data import DIMENSIONS, step_rng
from studies import align, beta, guidance, jobs, observer, online, reward_model, unified

tiny = wired.tiny


def test_scores_of_the_base_are_cached_by_prompt_sets_cfgs_and_number_of_prompts(
    monkeypatch, tmp_path
):
    calls = []
    monkeypatch.setattr(jobs, "judge", lambda *asked: calls.append(asked) or {"call": len(calls)})
    ways = [
        ({"hard": 9}, (1.0,), 3),
        ({"hard": 9}, (1.0,), 4),
        ({"hard": 9}, (2.0,), 3),
        ({"large": 9}, (1.0,), 3),
    ]
    for _ in range(2):
        found = [
            jobs.base_scores(Namespace(work=tmp_path, eval_prompts=n), CPU, s, cfgs)
            for s, cfgs, n in ways
        ]
        assert found == [{"call": i + 1} for i in range(4)] and len(calls) == 4


def test_guided_rows_are_of_what_their_columns_say(monkeypatch, tmp_path):
    args, asked = Namespace(work=tmp_path, steps=1, eval_pairs=4, eval_prompts=4), []

    def judge(checkpoint, args, device, sets, cfgs, steered):
        assert steered("policy", *cfgs) == ("policy", *cfgs)
        return {"checkpoint": checkpoint, "sampled_at": cfgs, **asked.pop()}

    def steered_policy(policy, reward, weights, scale, eps, interval, cfg):
        times = reward(None, torch.tensor([0.7]), None)
        asked.append({"weights": weights, "eps": eps, "by": (scale, *interval), "times": times})
        return policy, cfg

    monkeypatch.setattr(guidance, "judge", judge)
    monkeypatch.setattr(guidance, "SteeredPolicy", steered_policy)
    monkeypatch.setattr(guidance, "reward_of", lambda *args: lambda x_t, t, y: t.item())
    monkeypatch.setattr(guidance, "base_scores", lambda *args: {})
    monkeypatch.setattr(guidance, "accuracy_rows", lambda *args: [])
    monkeypatch.setattr(guidance, "rows_of", lambda scores, base, **facts: [scores | facts])
    seeds = []
    monkeypatch.setattr(trainer, "fit", lambda task, settings, device: seeds.append(settings.seed))
    monkeypatch.setitem(tasks.TASKS, "dpo", lambda *args: None)
    rows = guidance.steered_rows("noised", 3, args, CPU)
    assert seeds == [3]
    for row in rows:
        top = row["study"] == "on top"
        assert row["by"] == (row["scale"], 0.0, row["highest"]) and row["eps"] == guidance.NRG_EPS
        assert row["times"] == pytest.approx(0.7)
        assert row["weights"] == ((0, 0, 0) if row["method"] == "dpo" else row["weights"])
        assert row["method"] == "dpo" or row["method"].endswith(guidance.name_of(row["weights"]))
        dpo, base = tmp_path / "nrg" / "dpo-3" / "last.pt", jobs.WEIGHTS / "base.pt"
        assert row["checkpoint"] == (dpo if row["method"].startswith("dpo") else base)
        assert top or row["sampled_at"] == (1.0,)
    sampled = {(row["method"], *row["sampled_at"]) for row in rows if row["study"] == "on top"}
    assert sampled == {
        ("cfg+nrg-1:1:1", 2.0),
        *((m, c) for m in ("dpo", "dpo+nrg-1:1:1") for c in (1.0, 2.0)),
    }
    assert {row["scale"] for row in rows if row["study"] == "scale"} == {4.0, 8.0, 32.0, 64.0}
    assert {row["highest"] for row in rows if row["study"] == "interval"} == {0.8, 0.9, 1.0}
    # a reward that was trained on clean clips is asked at t = 0 whatever the sampler's t is
    for variant, time in (("labels", 0.7), ("clean", 0.0)):
        rows = guidance.steered_rows(variant, 3, args, CPU)
        assert len(rows) == 3 and all(row["times"] == pytest.approx(time) for row in rows)


def test_audits_of_other_seeds_read_other_clips_by_other_draws(monkeypatch):
    read = []

    def reader(x_t, t, rng):
        read.append((x_t, torch.rand(4, generator=rng)))
        return lambda prompts: torch.zeros(len(prompts))

    monkeypatch.setattr(observer, "ideal", reader)
    monkeypatch.setattr(observer, "probe", lambda base, blocks, *noised: reader(*noised))
    made = guidance.jobs(Namespace(seeds=3, eval_pairs=4), CPU)
    for seed in (1, 2):
        assert {row["seed"] for row in made[f"observer-{seed}"]()} == {seed}
    assert len(read) == 2 * 3 * 6  # seeds, readers, times
    for (clips, draws), (others, other_draws) in zip(read[:18], read[18:]):
        assert not torch.equal(clips, others) and not torch.equal(draws, other_draws)
    monkeypatch.setattr(observer, "told_apart", lambda reader, seed, count: [{"seed": seed}])
    monkeypatch.setattr(
        guidance, "load_noisy_reward", lambda path: (torch.nn.Identity(), str(path.parent.name))
    )
    (row,) = guidance.jobs(Namespace(seeds=3, eval_pairs=4, work=jobs.WEIGHTS), CPU)["told-2"]()
    assert row["seed"] == 2


def test_arms_of_rounds_are_trained_with_their_flags_and_seed(monkeypatch, tmp_path):
    seen = []

    def train_and_judge(task, settings, device, steps, judged):
        seen.append(settings)
        settings.out.mkdir(parents=True)
        lines = [
            {"round": step // 50, "learned": step, "true": -step} for step in range(settings.steps)
        ]
        (settings.out / "metrics.jsonl").write_text("\n".join(map(json.dumps, lines)))
        assert steps == [50, 100, 150, 200, 250, 350, 500, 750]

    monkeypatch.setattr(online, "train_and_judge", train_and_judge)
    monkeypatch.setattr(online, "base_scores", lambda *args: {})
    args = Namespace(work=tmp_path, steps=None, eval_pairs=4, seeds=2, eval_prompts=None)
    for algo in ("dpo", "nft"):
        monkeypatch.setitem(tasks.TASKS, algo, lambda *args: None)
    made = online.jobs(args, CPU)
    for arm in online.ARMS:
        rows = made[f"{arm}-1"]()
        assert [(row["round"], row["learned"], row["true"]) for row in rows] == [
            (n, 50 * n, -50 * n) for n in range(20)
        ]
    rounds = [(s.algo, s.rounds, s.refresh, s.seed, s.steps) for s in seen]
    wanted = [
        ("dpo", None, None),
        ("dpo", 20, None),
        ("dpo", 20, 2),
        ("nft", 20, None),
        ("nft", 20, 2),
    ]
    assert rounds == [(*arm, 1, 1000) for arm in wanted]


def test_a_training_is_judged_by_its_weights_after_so_many_steps(tiny):
    args, task = tiny("--algo=sft", "--steps=4")
    before, seen, draw = [], [], task.batch

    def batch(step, rows):
        before.append((step, task.model.patch_out.weight.clone()))
        return draw(step, rows)

    task.batch, task.evaluate = batch, lambda final, out: []
    jobs.train_and_judge(
        task,
        args,
        CPU,
        [1, 3],
        lambda *judged: seen.append((judged[0], jobs.load_velocity(judged[1]))),
    )
    assert [step for step, _ in before] == [0, 1, 2, 3] and [step for step, _ in seen] == [1, 3, 4]
    weights = [*(weight for _, weight in before), task.model.patch_out.weight]
    assert all(torch.equal(model.patch_out.weight, weights[step]) for step, (model, _) in seen)


def test_mean_z_scores_by_hand():
    level = (world.TRUE_MEAN + torch.tensor([1.0, 2.0, -0.6]) * world.TRUE_STD).tolist()
    rows = [{"judge": "oracle", **{f"{n}_score": v for n, v in zip(DIMENSIONS, level)}}]
    rows += [
        {"judge": "videoreward", **{f"{n}_score": v for n, v in zip(DIMENSIONS, (1.0, 2.0, -0.6))}}
    ]
    assert [jobs.mean_z(rows, by) for by in jobs.JUDGES] == pytest.approx([0.8, 0.8], abs=1e-5)


def test_three_ways_to_p_star_take_their_own_beta_noise_and_seed(monkeypatch):
    losses = []

    def fit(network, loss, seed):
        loss(step_rng(seed, 0))
        losses[-1]["start"] = network.net[0].weight.clone()
        return network

    zero = torch.zeros(())
    monkeypatch.setattr(unified, "fit", fit)
    monkeypatch.setattr(
        unified, "flow_dpo_step", lambda *args, **settings: losses.append(settings) or (zero, {})
    )
    monkeypatch.setattr(
        unified, "noisy_pair_step", lambda *args, **settings: losses.append(settings) or (zero, {})
    )
    for seed in (0, 1):
        for method in ("dpo-0.3", "dpo-3", "nrg-shared", "nrg-own"):
            unified.model_of(method, seed)
    assert [settings.get("beta") for settings in losses] == [0.3, 3.0, None, None] * 2
    assert ["x1_b" in settings for settings in losses] == [False, False, False, True] * 2
    assert not any(torch.equal(a["start"], b["start"]) for a, b in zip(losses[:4], losses[4:]))
    assert not torch.equal(losses[3]["x1_b"], losses[3]["x1"])


# ---------------------------------------------------------------------------------------------
# Tables


class Coded(dict):
    """A row whose every number is a code of its facts and the column's name."""

    def __missing__(self, column):
        if column.endswith("histogram"):
            return [0.0] * reward_model.BINS
        return crc32(repr((column, sorted(self.items()))).encode()) % 1000 / 1000


def rows_of(**facts):
    """One row for each choice of the facts' values."""
    return [Coded(zip(facts, values)) for values in product(*facts.values())]


BOTH = {"judge": jobs.JUDGES, "seed": (0,)}
METHODS = ("rwr", "best-of-4", "best-of-8")
SPLITS = (*reward_model.SPLITS, *reward_model.GENERATED)
ROWS = {
    align: rows_of(method=METHODS, align=jobs.ALIGNED, set=jobs.SETS, cfg=jobs.CFGS, **BOTH),
    beta: rows_of(
        study=("sweep", "best"), method=beta.SCHEDULES, beta=beta.BETAS, set=beta.SETS, **BOTH
    ),
    guidance: rows_of(study=("weights", "one"), method=("nrg-1:1:1", "nrg-0:0:1"), **BOTH),
    reward_model: rows_of(
        model=("bt-shared", "btt-rendered"), split=SPLITS, fraction=(0.01, 0.1, 1.0), seed=(0,)
    ),
}
CELLS = [  # study, table, row, column; the rows that this cell is of, and their column
    (align, "Table 3: 1:1:1, CFG 2, judged by oracle", "rwr", "hard MQ", "MQ",
     dict(method="rwr", align="1:1:1", set="hard", cfg=2.0, judge="oracle")),
    (align, "Table 4: TA only, CFG 1, judged by videoreward", "rwr", "large TA", "TA",
     dict(method="rwr", align="TA only", set="large", cfg=1.0, judge="videoreward")),
    (align, "Best of n, TA only", "4", "oracle VQ score", "VQ_score",
     dict(method="best-of-4", align="TA only", set="standard", cfg=1.0, judge="oracle")),
    (beta, "dpo-schedule: sweep", "30", "videoreward TA", "TA",
     dict(study="sweep", method="dpo-schedule", beta=30, set="standard", judge="videoreward")),
    (guidance, "Table 5", "nrg-0:0:1", "videoreward TA", "TA",
     dict(study="weights", method="nrg-0:0:1", judge="videoreward")),
    (guidance, "Each weight alone", "nrg-0:0:1", "true MQ", "MQ_score",
     dict(study="one", method="nrg-0:0:1", judge="oracle")),
    (reward_model, "Tables 2 and 6: benchmark", "bt-shared", "TA with ties", "TA_with",
     dict(model="bt-shared", split="benchmark", fraction=1.0)),
    (reward_model, "By the truth", "btt-rendered", "cfg3 MQ", "MQ_true",
     dict(model="btt-rendered", split="cfg3", fraction=1.0)),
]  # fmt: skip


@pytest.mark.parametrize(("study", "title", "name", "head", "column", "facts"), CELLS)
def test_a_cell_is_of_the_rows_that_its_place_names(study, title, name, head, column, facts):
    tables = study.report(Namespace(seeds=1, eval_pairs=9), ROWS[study])["tables"]
    (table,) = (table for table in tables if table.title.startswith(title))
    (cells,) = (cells for cells in table.rows if cells[0] == name)
    (wanted,) = (row[column] for row in ROWS[study] if facts.items() <= row.items())
    shown = cells[table.head.index(head)].split()[0]
    assert float(shown) == pytest.approx(wanted, abs=0.006)
