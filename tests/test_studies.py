"""The studies' wires: seeds that vary what they should, caches that tell their contents apart, rows that say what was
sampled, and tables whose cells are the rows that their titles name.
"""

import json
from argparse import Namespace
from functools import partial
from zlib import crc32

import pytest
import torch
import wired
from wired import CPU

import train
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
        assert steered("policy") == ("policy", "guidance")
        return {"checkpoint": checkpoint, "sampled_at": cfgs, **asked.pop()}

    def guide(reward, weights, scale, eps, interval):
        times = reward(None, torch.tensor([0.7]), None)
        asked.append({"weights": weights, "eps": eps, "by": (scale, *interval), "times": times})
        return "guidance"

    monkeypatch.setattr(guidance, "judge", judge)
    monkeypatch.setattr(guidance, "guide", guide)
    monkeypatch.setattr(guidance, "steer", lambda model, *asked: (model, guide(*asked)))
    monkeypatch.setattr(guidance, "reward_of", lambda *args: lambda x_t, t, y: t.item())
    monkeypatch.setattr(guidance, "base_scores", lambda *args: {})
    monkeypatch.setattr(guidance, "accuracy_rows", lambda *args: [])
    monkeypatch.setattr(guidance, "rows_of", lambda scores, base, **facts: [scores | facts])
    seeds = []
    monkeypatch.setattr(train, "train", lambda task, settings, device: seeds.append(settings.seed))
    monkeypatch.setitem(train.TASKS, "dpo", lambda *args: None)
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


def test_a_judged_checkpoint_is_steered(monkeypatch):
    asked = []

    def sample_prompts(model, words, prompts, seed, device, cfg, guidance):
        asked.append((model, guidance))
        return torch.zeros(len(prompts), 3, 8, 32, 32)

    monkeypatch.setattr(jobs, "sample_prompts", sample_prompts)
    checkpoint, args = jobs.WEIGHTS / "base.pt", Namespace(eval_prompts=2)
    jobs.judge(checkpoint, args, CPU, {"hard": 9}, (1.0,), lambda model: ("steered", "guidance"))
    assert asked == [("steered", "guidance")]


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
        monkeypatch.setitem(train.TASKS, algo, lambda *args: None)
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


# ---------------------------------------------------------------------------------------------------------------------
# Tables


class Coded(dict):
    """A row whose every number is a code of its facts and the column's name."""

    def __missing__(self, column):
        if column.endswith("histogram"):
            return [0.0] * reward_model.BINS
        return code(column, **self)


def code(column, **facts):
    return (
        crc32(repr((column, sorted((key, str(value)) for key, value in facts.items()))).encode())
        % 1000
        / 1000
    )


def cells(table, name):
    """{head: number} of a row."""
    (row,) = (row for row in table.rows if row[0] == name)
    return {head: float(cell.split()[0]) for head, cell in zip(table.head[1:], row[1:])}


def titled(study, args, rows, start):
    (table,) = (
        table for table in study.report(args, rows)["tables"] if table.title.startswith(start)
    )
    return table


def test_cells_of_the_alignment_tables_are_the_rows_that_they_name():
    rows = [Coded(method="base", align="", set=s, cfg=c, judge=by, seed=0)
            for s in jobs.SETS for c in jobs.CFGS for by in jobs.JUDGES]  # fmt: skip
    methods = [*jobs.METHODS, *(f"best-of-{n}" for n in jobs.BEST_OF)]
    rows += [Coded(row, method=m, align=a) for row in rows for m in methods for a in align.ALIGNED]
    args = Namespace(seeds=1)
    table_3 = "Table 3: 1:1:1, CFG 2, judged by oracle"
    table_4 = "Table 4: TA only, CFG 1, judged by videoreward"
    asked = (table_3, "1:1:1", 2.0, "oracle"), (table_4, "TA only", 1.0, "videoreward")
    for start, aligned, cfg, by in asked:
        row = cells(titled(align, args, rows, start), "rwr")
        for name in jobs.SETS:
            for n in DIMENSIONS:
                value = code(n, method="rwr", align=aligned, set=name, cfg=cfg, judge=by, seed=0)
                assert row[f"{name} {n}"] == pytest.approx(value, abs=0.006)
    row = cells(titled(align, args, rows, "Best of n, TA only"), "4")
    facts = dict(method="best-of-4", align="TA only", set="standard", cfg=1.0, seed=0)
    assert row["videoreward TA"] == pytest.approx(
        code("TA", judge="videoreward", **facts), abs=0.006
    )
    assert row["oracle MQ score"] == pytest.approx(
        code("MQ_score", judge="oracle", **facts), abs=0.006
    )


def test_cells_of_the_guidance_and_beta_tables_are_the_rows_that_they_name():
    facts = dict(
        study="weights", method="nrg-1:1:1", variant="noised", seed=0, highest=0.95, scale=16.0
    )
    rows = [Coded(facts, judge=by) for by in jobs.JUDGES]
    row = cells(titled(guidance, Namespace(seeds=1), rows, "Table 5"), "nrg-1:1:1")
    for by in jobs.JUDGES:
        assert row[f"{by} VQ"] == pytest.approx(code("VQ", judge=by, **facts), abs=0.006)
    for head, column in (("true MQ", "MQ_score"), ("TA_share", "TA_share"), ("shape", "shape")):
        assert row[head] == pytest.approx(code(column, judge="oracle", **facts), abs=0.006)
    facts = [
        dict(study="sweep", method=m, beta=b, seed=0) for m in beta.SCHEDULES for b in beta.BETAS
    ]
    rows = [Coded(f, judge=by, set=s) for f in facts for by in jobs.JUDGES for s in beta.SETS]
    row = cells(titled(beta, Namespace(seeds=1), rows, "dpo-schedule: sweep"), "30")
    for by in jobs.JUDGES:
        value = code(
            "TA", study="sweep", method="dpo-schedule", beta=30, seed=0, judge=by, set="standard"
        )
        assert row[f"{by} TA"] == pytest.approx(value, abs=0.006)


def test_cells_of_the_reward_tables_are_the_rows_that_they_name():
    splits, models = (
        (*reward_model.SPLITS, *reward_model.GENERATED),
        (*reward_model.MODELS, "random", "oracle", "btt-rendered"),
    )
    rows = [
        Coded(model=m, split=s, seed=0, fraction=f)
        for m in models
        for s in splits
        for f in (0.01, 0.1, 1.0)
    ]
    table = partial(titled, reward_model, Namespace(seeds=1, eval_pairs=9), rows)
    for split in reward_model.SPLITS:
        row = cells(table(f"Tables 2 and 6: {split}"), "bt-shared")
        for name in (*DIMENSIONS, "Overall"):
            for kind in ("with", "without"):
                value = code(f"{name}_{kind}", model="bt-shared", split=split, seed=0, fraction=1.0)
                assert row[f"{name} {kind} ties"] == pytest.approx(value, abs=6e-4)
    row = cells(table("By the truth"), "btt-rendered")
    for split in splits:
        value = code("MQ_true", model="btt-rendered", split=split, seed=0, fraction=1.0)
        assert row[f"{split} MQ"] == pytest.approx(value, abs=6e-4)
    row = cells(table("Fig. 2"), "regression, without ties")
    for share in (0.01, 0.1, 1.0):
        facts = dict(model="regression", split="validation", seed=0, fraction=share)
        assert row[f"{share:g}"] == pytest.approx(
            sum(code(f"{n}_without", **facts) for n in DIMENSIONS) / 3, abs=6e-4
        )
