"""DPO, SFT and RWR as train.py makes them: which clip stands where in a batch, what each flag does
to batch and loss, and that training moves the policy towards the reward.

The reward is brightness and the policy is tiny (wired.py). Losses are compared with the paper's
formulas.
"""

from dataclasses import replace

import pytest
import torch
import wired
from wired import BATCH, CONFIG, EVERY, PAIRS, dpo_by_hand, error, find, noticeable, same_pairs

from lora import LoRALinear
from model import VideoTransformer, load_velocity
from runtime.cli import BadInput

tiny = wired.tiny

# ---------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("algo", ["dpo", "sft"])
@pytest.mark.parametrize("align", ["1,1,1", "1,-3,0.5"])
def test_the_clip_of_higher_reward_wins(tiny, algo, align):
    settings, task = tiny(algo, f"--align={align}", "--label-dropout=0")
    y, clips, scores = same_pairs(settings)
    reward = scores @ torch.tensor([float(w) for w in align.split(",")])
    for step in range(3):
        batch = task.batch(step, EVERY)
        winners = batch["x0_w" if algo == "dpo" else "x0"]
        assert len(winners) == (BATCH if algo == "dpo" else 2 * BATCH)  # as many clips as DPO has
        for i, (winner, prompt) in enumerate(zip(winners, batch["y"])):
            pair, side = find(winner, clips)
            assert reward[pair, side] > reward[pair, 1 - side] and torch.equal(y[pair], prompt)
            if algo == "dpo":
                assert find(batch["x0_l"][i], clips) == [pair, 1 - side]
            else:
                assert batch["weight"][i] == 1


@pytest.mark.parametrize(("align", "temperature"), [("1,1,1", 1.0), ("-2,0,1", 3.0)])
def test_rwr_weighs_both_clips_by_their_own_rewards(tiny, align, temperature):
    flags = f"--align={align}", f"--temperature={temperature}", "--label-dropout=0"
    settings, task = tiny("rwr", *flags)
    y, clips, scores = same_pairs(settings)
    weights = torch.tensor([float(w) for w in align.split(",")])
    tilted = (scores @ weights / weights.abs().sum() / temperature).exp()
    places = []
    for step in range(3):  # 12 pairs are 24 clips; a step takes 16
        batch = task.batch(step, EVERY)
        for clip, prompt, weight in zip(batch["x0"], batch["y"], batch["weight"]):
            pair, side = find(clip, clips)
            places.append((pair, side))
            assert torch.equal(y[pair], prompt)
            expected = tilted[pair, side] / tilted.mean()
            assert weight.item() == pytest.approx(expected.item(), rel=1e-4)
    every = [(pair, side) for pair in range(PAIRS) for side in (0, 1)]
    assert sorted(places[:24]) == sorted(places[24:]) == every


@pytest.mark.parametrize(
    "flags", ["pretrain", "reward", "nrg", "nrg --target=labels", "dpo --lora-rank=2", "sft", "rwr"]
)
def test_a_seed_varies_start_pairs_order_and_noise(tiny, flags):
    runs = []
    for seed in (1, 2, 2):
        settings, task = tiny(flags, f"--seed={seed}")
        batch, later = task.batch(0, EVERY), task.batch(1, EVERY)
        clips = next(batch[name] for name in ("x0", "x0_w", "x0_a", "video_a") if name in batch)
        run = {"clips": clips, "weights": torch.cat([v.flatten() for v in task.model.parameters()])}
        if settings.algo != "pretrain":
            pairs = same_pairs(settings)[1]
            run["order"] = torch.tensor([find(clip, pairs)[0] for clip in clips])
        if settings.algo != "reward":
            run |= {"noise": batch["x1"], "times": batch["t"]}
            assert not batch["x1"].equal(later["x1"]) and not batch["t"].equal(later["t"])
        runs.append(run)
    first, second, again = runs
    assert all(torch.equal(second[name], again[name]) for name in second)
    same = {name for name in first if torch.equal(first[name], second[name])}
    assert same == ({"weights"} if flags in ("sft", "rwr") else set())  # these start as the base


@pytest.mark.parametrize("algo", ["dpo", "sft", "nrg", "pretrain"])
def test_times_are_shifted_and_prompts_dropped_as_the_flags_say(tiny, algo):
    times = {}
    for shift, dropout in ((1, 0), (4, 0.5), (7, 1)):
        drop = "" if algo == "nrg" else f"--label-dropout={dropout}"
        _, task = tiny(algo, f"--time-shift={shift}", "--batch=32", drop)
        batch = task.batch(0, slice(0, 32))
        times[shift], y = batch["t"], batch["y"]
        assert (y[y.any(1)][:, :5] > 0).all()  # a whole prompt of five words is dropped, or none
        if drop:
            margin = 0.25 if dropout == 0.5 else 0
            assert (~y.any(1)).float().mean().item() == pytest.approx(dropout, abs=margin)
    moved = torch.ones(len(times[1]), dtype=torch.bool)
    if algo == "pretrain":  # a tenth of its times lie near the noise whatever the shift is
        moved = times[4] != times[1]
        assert (times[1][~moved] > 0.9).all() and moved.sum() > 20
    for shift in (4, 7):
        expected = shift * times[1] / (1 + (shift - 1) * times[1])
        assert torch.allclose(times[shift][moved], expected[moved], atol=1e-6)
        assert torch.equal(times[shift][~moved], times[1][~moved])
    # by default 4 for a generator and 1 for a reward that guides
    default = tiny(algo, "--batch=32")[1].batch(0, slice(0, 32))["t"]
    assert torch.equal(default, times[1 if algo == "nrg" else 4])


# ---------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize(
    ("flags", "beta", "schedule"),
    [
        ("", 100, "constant"),
        ("--freeze=0 --beta=5", 5, "constant"),
        ("--freeze=2 --beta=80 --schedule=(1-t)^2", 80, "(1-t)^2"),
        ("--freeze=2 --reference=other.pt", 100, "constant"),
    ],
)
def test_dpo_loss_is_equation_6_of_policy_and_reference(
    tiny, tmp_path, monkeypatch, flags, beta, schedule
):
    monkeypatch.chdir(tmp_path)
    other = noticeable(load_velocity(tmp_path / "base.pt")[0], 0.1)
    wired.save(other, "velocity", tmp_path / "other.pt")
    settings, task = tiny("dpo", flags)
    reference = other if "other" in flags else load_velocity(settings.init)[0]
    batch = task.batch(0, EVERY)
    at_start = task.loss(batch)[0].item()
    assert (abs(at_start - 0.693147) < 1e-5) == (reference is not other)
    noticeable(task.model)
    loss, logs = task.loss(batch)
    beta_t = beta if schedule == "constant" else beta * (1 - batch["t"]) ** 2
    expected = dpo_by_hand(task.model, reference, batch, beta_t)
    assert loss.item() == pytest.approx(expected, rel=1e-4) and abs(expected - 0.693147) > 1e-3
    with torch.no_grad():
        ref_error_w = error(reference, batch["x0_w"], batch).mean().item()
        error_l = error(task.model, batch["x0_l"], batch).mean().item()
    assert logs["ref_error_w"] == pytest.approx(ref_error_w, rel=1e-4)
    assert logs["error_l"] == pytest.approx(error_l, rel=1e-4)


def test_a_reference_of_other_prompts_is_refused(tiny, tmp_path):
    long = VideoTransformer(replace(CONFIG, max_text=9))
    path = wired.save(long, "velocity", tmp_path / "other.pt")
    with pytest.raises(BadInput, match=r"numbers of words: .*9\) and .*8\)"):
        tiny("dpo", f"--reference={path}")


@pytest.mark.parametrize("flags", ["sft", "rwr --temperature=0.3"])
def test_a_regressions_loss_is_the_weighted_flow_error(tiny, flags):
    _, task = tiny(flags)
    noticeable(task.model)
    batch = task.batch(1, EVERY)
    with torch.no_grad():
        each = error(task.model, batch["x0"], batch)
    loss = task.loss(batch)[0].item()
    assert loss == pytest.approx((batch["weight"] * each).mean().item(), rel=1e-4)
    assert (abs(loss - each.mean().item()) > 1e-3) == ("rwr" in flags)


# ---------------------------------------------------------------------------------------------
# What is trained


@pytest.mark.parametrize(
    ("flags", "freeze"), [("dpo --freeze=0", 0), ("sft --freeze=1", 1), ("rwr", 2)]
)
def test_freeze_leaves_the_first_blocks_as_they_were(tiny, flags, freeze):
    settings, task = tiny(flags, "--steps=1")
    before, _ = load_velocity(settings.init)
    policy = dict(wired.trained(settings, task).named_parameters())
    moved = {name for name, value in before.named_parameters() if not value.equal(policy[name])}
    blocks = {int(name.split(".")[1]) for name in moved if name.startswith("blocks.")}
    assert blocks == set(range(freeze, 3)) and "patch_out.weight" in moved
    trunk = {"patch_in.weight", "words.weight", "places"}
    assert moved & trunk == (set() if freeze else trunk)


@pytest.mark.parametrize(("rank", "freeze"), [(1, 0), (4, 2)])
def test_lora_trains_adapters_of_its_rank_behind_the_frozen_blocks(tiny, rank, freeze):
    settings, task = tiny("dpo", f"--lora-rank={rank}", f"--freeze={freeze}", "--steps=2")
    trained = {name: v for name, v in task.model.named_parameters() if v.requires_grad}
    adapters = {f"blocks.{i}.attn.{part}." for i in range(freeze, 3) for part in ("qkv", "out")}
    assert trained.keys() == {name + part for name in adapters for part in ("up", "down")}
    assert {len(value) for name, value in trained.items() if name.endswith("down")} == {rank}
    scales = {layer.scale for layer in task.model.modules() if isinstance(layer, LoRALinear)}
    assert scales == {2.0}  # alpha is twice the rank
    before = load_velocity(settings.init)[0].state_dict()
    after = task.state_dict(wired.trained(settings, task))  # merged into what is saved
    changed = {name for name, value in after.items() if not value.equal(before[name])}
    assert changed == {name + "weight" for name in adapters}


@pytest.mark.parametrize("flags", ["dpo --beta=20", "sft", "rwr --temperature=0.1"])
def test_training_follows_the_reward_up_and_its_mirror_image_down(tiny, flags):
    ends = {}
    for align in ("1,1,1", "-1,-1,-1"):
        more = [f"--align={align}", "--freeze=0", "--steps=20", "--lr=0.004"]
        settings, task = tiny(flags, *more)
        start = wired.brightness(task.model)
        ends[align] = wired.brightness(wired.trained(settings, task))
    assert ends["1,1,1"] > ends["-1,-1,-1"] + 0.02
    if "dpo" in flags:  # a regression also learns what all clips look like
        assert ends["1,1,1"] > start > ends["-1,-1,-1"]
