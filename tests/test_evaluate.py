"""How the studies judge policies and rewards; and the generated tables."""

import math
import re
import shutil
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import wired
from wired import CPU, splits_of

import evaluate
import world
from data import DIMENSIONS, Pairs
from runtime.checkpoint import load_checkpoint, save_checkpoint
from runtime.cli import BadInput
from studies import align, catalogue, nrg, policies, reward_model, tables
from studies.jobs import Settings
from studies.policies import WEIGHTS
from studies.report.tables import Column, over_seeds, tabulate

drawn = wired.drawn
settings_for = partial(Settings, device=CPU)


def scores(oracle, learned, quality=0.25):
    oracle, learned = torch.tensor(oracle), torch.tensor(learned)
    return {
        "oracle": oracle,
        "videoreward": learned,
        "quality": torch.full((len(oracle),), quality),
        "prompt": torch.zeros(len(oracle), 3),  # one prompt for all
        **dict.fromkeys(policies.PLACES, torch.arange(1.0 * len(oracle))[:, None] * quality),
    }


def values(row, suffix=""):
    return [row[name + suffix] for name in DIMENSIONS]


# ---------------------------------------------------------------------------------------------
# Policies


def test_rows_count_wins_of_the_policy_over_the_base():
    policy = {"hard 1": scores([[1.0, 0.2, 0.0]] * 2, [[0.0, 3.0, 1.0], [0.0, 3.0, 0.0]])}
    learned = [[1.0, 1.0, 0.0], [-1.0, 1.0, 0.0]]
    base = {"hard 1": scores([[0.0, 0.2, 1.0], [0.0, 0.2, 0.9]], learned, 0.75)}
    by_oracle, by_reward = policies.rows_of(policy, base, method="x", seed=4)
    assert values(by_oracle) == [1.0, 0.5, 0.0] and by_oracle["judge"] == "oracle"
    assert values(by_reward) == [0.5, 1.0, 0.75] and by_reward["judge"] == "videoreward"
    assert values(by_oracle, "_score") == pytest.approx([1.0, 0.2, 0.0])
    facts = {"set": "hard", "cfg": 1.0, "seed": 4, "method": "x", "quality": 0.25}
    assert facts.items() <= by_oracle.items()
    assert by_oracle["spread_start"] == by_reward["spread_pixels"] == pytest.approx(0.25 / 0.75)
    assert by_oracle["TA_ceiling"] == by_reward["TA_ceiling"] == 0.75  # one of two can only be tied


def test_best_of_n_is_what_videoreward_likes_best_of_the_first_n(monkeypatch):
    # clip k of the first prompt has VideoReward's TA -3 k, of the second one 3 k; the oracle's
    # scores are k
    def clip(k):
        learned = [[0.0, 1.0 * k, -3.0 * k], [0.0, -1.0 * k, 3.0 * k]]
        return {"standard 1": scores([[float(k)] * 3] * 2, learned)}

    seeds = []

    def judge(settings, path, sets, cfgs, seed):
        seeds.append(seed)
        return clip(len(seeds))

    monkeypatch.setattr(policies, "judge", judge)
    monkeypatch.setattr(policies, "base_scores", lambda *args: clip(0))
    rows = align.picked(None, "TA only", 2)
    assert rows[-1]["drift"] == math.log(16) - 15 / 16 and rows[-1]["seed"] == 2
    found = {row["method"]: row["VQ_score"] for row in rows if row["judge"] == "oracle"}
    # the last clip of the second prompt is picked, and the first one of the first
    assert found == {f"best-of-{n}": (n - 1) / 2 for n in (1, 2, 4, 8, 16)}
    assert len(set(seeds)) == 15 and min(seeds) > 10_000  # noise that no other clip has


def test_drift_is_the_mean_square_between_two_models(monkeypatch, tmp_path):
    noise, draw_noise = [], policies.draw_noise
    monkeypatch.setattr(
        policies, "draw_noise", lambda *args: noise.append(draw_noise(*args)) or noise[-1]
    )
    monkeypatch.setattr(policies, "DRIFT_CLIPS", 60)
    state = load_checkpoint(WEIGHTS / "base.pt")
    state["model"]["patch_out.bias"] += 0.1  # moves x0_hat by .1, and v by .1 / t
    save_checkpoint(tmp_path / "other.pt", state)
    assert policies.drift(WEIGHTS / "base.pt", CPU) == 0
    drift, t = policies.drift(tmp_path / "other.pt", CPU), noise[-1]["t"]
    assert drift == pytest.approx((0.1 / t.clamp(min=0.05)).square().mean().item(), rel=1e-2)
    assert 0.7 < t.median() < 0.9  # as in training


def test_a_checkpoint_is_judged_by_both_on_samples_of_each_set(monkeypatch):
    calls, learned = [], torch.rand(4, 3)
    clips = torch.rand(4, 3, 8, 32, 32) * 2 - 1

    def sample_prompts(model, words, prompts, seed, device):
        calls.append((*model, prompts, seed))
        return clips

    monkeypatch.setattr(policies, "sample_prompts", sample_prompts)
    monkeypatch.setattr(policies, "learned_scores", lambda reward, words, v, p, device: learned)
    settings = settings_for("align", eval_prompts=4)
    sets = {"standard": 96, "hard": 9, "large": 8}

    def steered(model, cfg):
        return "steered", cfg

    found = policies.judge(settings, WEIGHTS / "base.pt", sets, (1.0, 2.0), steered)
    assert list(found) == [f"{name} {cfg}" for name in sets for cfg in (1, 2)]
    seeds = [seed for *_, seed in calls]  # one noise for a set
    assert seeds[::2] == seeds[1::2] and len(set(seeds)) == 3
    for (name, cfg, prompts, _), key in zip(calls, found):
        assert name == "steered" and f"{cfg:g}" == key.split()[1] and len(prompts) == 4
        assert torch.equal(prompts, policies.prompts_of(key.split()[0], 4))
        assert torch.equal(found[key]["videoreward"], learned)
        assert torch.equal(found[key]["oracle"], world.oracle(clips, prompts))


def test_prompt_sets_hold_the_splits_of_their_names():
    sets = {name: policies.prompts_of(name, count) for name, count in policies.SETS.items()}
    assert splits_of(sets["standard"]) == {"train", "validation"}
    assert splits_of(sets["hard"]) == {"hard"} and len(sets["hard"].unique(dim=0)) == 12
    assert len(sets["large"].unique(dim=0)) == 96
    assert torch.equal(sets["standard"][84:168], sets["standard"][:84])  # in turn
    assert torch.equal(sets["large"], policies.prompts_of("large", 512))


# ---------------------------------------------------------------------------------------------
# Rewards


def pairs(label, overall):
    label, overall = torch.tensor(label), torch.tensor(overall)
    return Pairs(torch.zeros(len(label), 1), clips=None, label=label, overall=overall)


def test_table_columns_by_hand():
    # four pairs, differences of VQ, MQ, TA; labels of VQ: A, A, B, tie
    delta = torch.tensor([[3.0, 1.0, 0.0], [-1.0, 1.0, 0.0], [-3.0, 1.0, 0.0], [0.5, 1.0, 0.0]])
    score = torch.stack((delta, torch.zeros(4, 3)), 1)
    labels = [[1, 0, 0], [1, 0, 0], [-1, 0, 0], [0, 0, 0]]
    row = reward_model.accuracies(score, pairs(labels, [1, 1, -1, 0]))
    # VQ: right on pairs 1 and 3; with ties below .5 also on pair 4
    assert row["VQ_without"] == pytest.approx(2 / 3)
    assert row["VQ_with"] == 0.75
    assert row["MQ_with"] == 1.0  # all ties, below a threshold of 1
    # Overall: means 4/3, 0, -2/3, 1/2 against A, A, B, tie; below 1/2 a tie: 1, 3 and 4 are right
    assert row["Overall_without"] == pytest.approx(2 / 3) and row["Overall_with"] == 0.75


def test_oracle_and_random_judges_of_pairs():
    settings = settings_for(eval_pairs=60)
    for judge, low, high in (("oracle", 0.9, 1.0), ("random", 0.3, 0.7)):
        for row in reward_model.untrained(settings, judge, 0):  # of both splits
            assert low <= row["VQ_without"] <= high and low <= row["Overall_without"] <= high


def test_accuracy_of_a_noise_aware_reward_by_hand(monkeypatch):
    label = torch.tensor([[1, -1, 1], [1, -1, -1]])
    score = torch.tensor([[[2.0, 0, 0], [1.0, 1, 1]], [[2.0, 0, 0], [1.0, 1, 1]]])
    monkeypatch.setattr(nrg, "annotated_pairs", lambda *args: SimpleNamespace(label=label))
    monkeypatch.setattr(nrg, "noisy_scores", lambda *args, **settings: {0.4: score})
    (row,) = nrg.accuracy_rows(settings_for("nrg", eval_pairs=2), None, "noised", 0)
    assert (row["t"], *values(row)) == (0.4, 1.0, 1.0, 0.5)


# ---------------------------------------------------------------------------------------------
# Generated files


def run_tables(monkeypatch, *flags):
    monkeypatch.setattr("sys.argv", ["evaluate.py", "tables", *flags])
    evaluate.main()


def test_means_and_spreads_are_those_of_a_sample():
    rows = [{"x": value, "seed": seed} for seed, value in enumerate((1.0, 2.0, 3.0))]
    assert over_seeds(rows, "x") == (2.0, 1.0) and over_seeds(rows, "x", seed=1) == (2.0, 0.0)
    lines = {"a": {"seed": 0}, "b": {"seed": 9}}  # no row of seed 9, and so no line
    columns = [Column("X", "x", digits=1), Column("other", "x", {"seed": 1}, spread=False)]
    assert tabulate("", [""], rows, lines, columns).rows == [["a", "1.0 ± 0.0", "nan"]]


def test_generated_files_are_those_of_the_results(monkeypatch):
    run_tables(monkeypatch, "--check")


def test_an_outdated_table_is_found_and_written_anew(tmp_path, monkeypatch):
    root = tmp_path / "copy"
    leave_out = shutil.ignore_patterns(".*", "out", "tests", "weights", "report.html")
    shutil.copytree(catalogue.ROOT, root, ignore=leave_out)
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
