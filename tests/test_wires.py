"""DPO, SFT and RWR through train.py's own tasks: which clip stands where in a batch, what each flag of the alignment
group does to batch and loss, and that training moves the policy to where the reward is, or away from it.

The reward is brightness (wired.py), the policy is tiny. Batches are held against the toy world's clips, losses against
the formulas of the paper written out here.
"""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import wired
from wired import (
    BATCH,
    CONFIG,
    CPU,
    PAIRS,
    Brightness,
    brightness,
    find,
    noticeable,
    same_pairs,
    trained,
)

import train
from flow import shift_time
from lora import LoRALinear
from model import VideoTransformer, load_velocity
from runtime.cli import BadInput

tiny = wired.tiny
EVERY = slice(0, BATCH)
ALIGNED = {"1,1,1": (1, 1, 1), "0,0,1": (0, 0, 1), "-1,0,0": (-1, 0, 0), "1,-3,0.5": (1, -3, 0.5)}


def error(velocity, x0, batch):
    """|v - v(x_t)|^2 of each clip, as section 4.1 has it."""
    t = batch["t"].reshape(-1, 1, 1, 1, 1)
    x_t = (1 - t) * x0 + t * batch["x1"]
    return (velocity(x_t, batch["t"], batch["y"]) - (batch["x1"] - x0)).square().flatten(1).mean(1)


def dpo_by_hand(policy, base, batch, beta_t):
    """Eq. 6, with beta_t (B,) or a number."""
    winners, losers = (
        [error(model, batch[name], batch) for model in (policy, base)] for name in ("x0_w", "x0_l")
    )
    bracket = (winners[0] - winners[1]) - (losers[0] - losers[1])
    return F.softplus(beta_t / 2 * bracket).mean().item()


# ---------------------------------------------------------------------------------------------
# Batches


@pytest.mark.parametrize("align", ALIGNED)
def test_dpo_sets_the_clip_of_higher_reward_against_the_other_of_its_pair(tiny, align):
    args, task = tiny("--algo=dpo", f"--align={align}", "--label-dropout=0")
    y, clips, scores = same_pairs(args)
    for step in range(3):
        batch = task.batch(step, EVERY)
        for winner, loser, prompt in zip(batch["x0_w"], batch["x0_l"], batch["y"]):
            pair, side = find(winner, clips)
            assert find(loser, clips) == [pair, 1 - side] and torch.equal(y[pair], prompt)
            won, lost = (
                sum(w * z for w, z in zip(ALIGNED[align], scores[pair, s].tolist()))
                for s in (side, 1 - side)
            )
            assert won > lost


def test_sft_learns_the_winners_alone_each_with_its_prompt(tiny):
    args, task = tiny("--algo=sft", "--align=0,1,0", "--label-dropout=0")
    y, clips, scores = same_pairs(args)
    batch = task.batch(0, EVERY)
    assert len(batch["x0"]) == 2 * BATCH  # as many clips as DPO takes
    for clip, prompt in zip(batch["x0"], batch["y"]):
        pair, side = find(clip, clips)
        assert scores[pair, side, 1] > scores[pair, 1 - side, 1] and torch.equal(y[pair], prompt)
    assert torch.equal(batch["weight"], torch.ones(2 * BATCH))


@pytest.mark.parametrize(
    ("align", "temperature"), [("1,1,1", 1.0), ("1,1,1", 0.25), ("-2,0,1", 3.0)]
)
def test_rwr_weighs_each_clip_by_its_own_reward(tiny, align, temperature):
    args, task = tiny(
        "--algo=rwr", f"--align={align}", f"--temperature={temperature}", "--label-dropout=0"
    )
    y, clips, scores = same_pairs(args)
    weights = [float(w) for w in align.split(",")]
    r = (scores * torch.tensor(weights)).sum(-1) / sum(abs(w) for w in weights)
    tilted = (r / temperature).exp()
    seen = []
    for step in range(3):  # two clips of each of 12 pairs: 24 a round, 16 a step
        batch = task.batch(step, EVERY)
        for clip, prompt, weight in zip(batch["x0"], batch["y"], batch["weight"]):
            pair, side = find(clip, clips)
            assert torch.equal(y[pair], prompt)
            assert weight.item() == pytest.approx(
                (tilted[pair, side] / tilted.mean()).item(), rel=1e-4
            )
            seen.append((pair, side))
    assert (
        sorted(seen[:24]) == sorted(seen[24:]) == [(p, s) for p in range(PAIRS) for s in (0, 1)]
    )  # both clips of all


@pytest.mark.parametrize("algo", ["dpo", "sft", "rwr"])
def test_pairs_seed_and_rows_are_what_the_flags_say(tiny, algo):
    name = "x0_w" if algo == "dpo" else "x0"
    count = BATCH if algo == "dpo" else 2 * BATCH
    _, task = tiny(f"--algo={algo}", "--pairs=3")
    batch = task.batch(0, EVERY)
    # of three pairs DPO and SFT see three winners, RWR six clips
    assert len({tuple(clip.flatten().tolist()) for clip in batch[name]}) == (
        6 if algo == "rwr" else 3
    )
    again, half = (
        tiny(f"--algo={algo}", "--pairs=3")[1].batch(0, EVERY),
        task.batch(0, slice(BATCH // 2, BATCH)),
    )
    assert len(batch[name]) == count
    assert all(torch.equal(batch[key], again[key]) for key in batch)
    assert all(torch.equal(batch[key][count // 2 :], half[key]) for key in batch)


@pytest.mark.parametrize(
    "flags", ["pretrain", "reward", "nrg", "nrg --target=labels", "dpo --lora-rank=2", "sft", "rwr"]
)
def test_a_seed_varies_start_pairs_order_and_noise(tiny, flags):
    seen = []
    for seed in (1, 2):
        args, task = tiny(*f"--algo={flags}".split(), f"--seed={seed}")
        batch, start = (
            task.batch(0, EVERY),
            {n: v.clone() for n, v in task.model.named_parameters()},
        )
        clips = next(batch[name] for name in ("x0", "x0_w", "x0_a", "video_a") if name in batch)
        pairs = None if args.algo == "pretrain" else same_pairs(args)[1]  # those of this seed
        order = pairs is not None and [find(clip, pairs)[0] for clip in clips]
        seen.append((start, clips, order, batch.get("x1"), batch.get("t")))
    (start, clips, order, *noise), (other_start, other_clips, other_order, *other_noise) = seen
    moved = {name for name, value in start.items() if not torch.equal(value, other_start[name])}
    assert moved or flags in ("sft", "rwr")  # which start as the base model
    assert not torch.equal(clips, other_clips) and (not order or order != other_order)
    assert flags == "reward" or not any(torch.equal(a, b) for a, b in zip(noise, other_noise))


@pytest.mark.parametrize("algo", ["dpo", "sft", "rwr", "nrg", "pretrain"])
def test_times_are_shifted_as_the_flag_says(tiny, algo):
    times = {
        shift: tiny(f"--algo={algo}", f"--time-shift={shift}")[1].batch(0, EVERY)["t"]
        for shift in (1, 4, 7)
    }
    moved = torch.ones(len(times[1]), dtype=torch.bool)
    if algo == "pretrain":  # some are drawn near the noise whatever the shift is
        moved = times[4] != times[1]
        assert (
            (times[1][~moved] > 0.9).all()
            and torch.equal(times[7][~moved], times[1][~moved])
            and moved.sum() > 4
        )
    for shift in (4, 7):
        wanted = shift * times[1] / (1 + (shift - 1) * times[1])
        assert torch.allclose(times[shift][moved], wanted[moved], atol=1e-6)
        assert (times[shift] > times[1])[moved].all()
    # left out: 4 for a generator, none for a reward that guides
    assert torch.equal(
        tiny(f"--algo={algo}")[1].batch(0, EVERY)["t"], times[1 if algo == "nrg" else 4]
    )


@pytest.mark.parametrize("algo", ["dpo", "sft", "rwr", "pretrain"])
def test_prompts_are_dropped_as_often_as_the_flag_says(tiny, algo):
    shares = {}
    for dropout in (0, 0.5, 1):
        _, task = tiny(f"--algo={algo}", "--batch=64", f"--label-dropout={dropout}")
        y = task.batch(0, slice(0, 64))["y"]
        shares[dropout] = (y == 0).all(1).float().mean().item()
        assert (y[y.any(1)][:, :5] > 0).all()  # a prompt of five words is there, or none of it
    assert shares[0] == 0 and shares[1] == 1 and 0.2 < shares[0.5] < 0.8


# ---------------------------------------------------------------------------------------------
# Losses


@pytest.mark.parametrize("freeze", [0, 2])
@pytest.mark.parametrize("beta", [5.0, 80.0])
@pytest.mark.parametrize("schedule", ["constant", "(1-t)^2"])
def test_dpo_loss_is_equation_6_of_policy_and_base(tiny, freeze, beta, schedule):
    args, task = tiny(
        "--algo=dpo", f"--freeze={freeze}", f"--beta={beta}", f"--schedule={schedule}"
    )
    base, _ = load_velocity(args.init)
    batch = task.batch(0, EVERY)
    assert task.loss(batch)[0].item() == pytest.approx(
        0.693147, abs=1e-5
    )  # the policy starts as its reference
    noticeable(task.model)
    loss, logs = task.loss(batch)
    with torch.no_grad():
        beta_t = beta if schedule == "constant" else beta * (1 - batch["t"]) ** 2
        assert loss.item() == pytest.approx(dpo_by_hand(task.model, base, batch, beta_t), rel=1e-4)
        assert abs(loss.item() - 0.693147) > 1e-3
        assert logs["ref_error_w"] == pytest.approx(
            error(base, batch["x0_w"], batch).mean().item(), rel=1e-4
        )
        assert logs["error_l"] == pytest.approx(
            error(task.model, batch["x0_l"], batch).mean().item(), rel=1e-4
        )


@pytest.mark.parametrize("freeze", [0, 2])
def test_the_reference_can_be_a_checkpoint_beside_the_start(tiny, tmp_path, freeze):
    """Its first blocks differ from the policy's, which are frozen with --freeze 2."""
    other = noticeable(load_velocity(tiny("--algo=dpo")[0].init)[0], 0.1)
    wired.save(other, "velocity", tmp_path / "other.pt")
    args, task = tiny("--algo=dpo", f"--freeze={freeze}", f"--reference={tmp_path / 'other.pt'}")
    start, _ = load_velocity(args.init)
    batch = task.batch(0, EVERY)
    loss, logs = task.loss(batch)
    with torch.no_grad():
        assert loss.item() == pytest.approx(dpo_by_hand(start, other, batch, 100), rel=1e-4)
        assert logs["ref_error_w"] == pytest.approx(
            error(other, batch["x0_w"], batch).mean().item(), rel=1e-4
        )
    assert abs(loss.item() - 0.693147) > 1e-3
    long = VideoTransformer(replace(CONFIG, max_text=9))
    wired.save(long, "velocity", tmp_path / "other.pt")
    with pytest.raises(
        BadInput, match="--reference and --init take prompts of different lengths: 9 and 8"
    ):
        tiny("--algo=dpo", f"--reference={tmp_path / 'other.pt'}")


def test_beta_and_schedule_left_out_are_100_and_constant(tiny):
    said = tiny("--algo=dpo", "--beta=100", "--schedule=constant"), tiny("--algo=dpo")
    losses = [
        noticeable(task.model) and task.loss(task.batch(0, EVERY))[0].item() for _, task in said
    ]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("flags", [["--algo=sft"], ["--algo=rwr", "--temperature=0.3"]])
def test_the_regressions_loss_is_the_weighted_flow_error(tiny, flags):
    _, task = tiny(*flags)
    noticeable(task.model)
    batch = task.batch(1, EVERY)
    with torch.no_grad():
        each = error(task.model, batch["x0"], batch)
    loss = task.loss(batch)[0].item()
    assert loss == pytest.approx((batch["weight"] * each).mean().item(), rel=1e-4)
    assert (abs(loss - each.mean().item()) > 1e-3) == ("--algo=rwr" in flags)


# ---------------------------------------------------------------------------------------------
# What is trained


@pytest.mark.parametrize("algo", ["dpo", "sft", "rwr"])
@pytest.mark.parametrize("freeze", [0, 1, 2])
def test_freeze_leaves_the_first_blocks_as_they_were(tiny, algo, freeze):
    args, task = tiny(f"--algo={algo}", f"--freeze={freeze}")
    before, _ = load_velocity(args.init)
    policy = dict(trained(args, task).named_parameters())
    moved = {
        name for name, value in before.named_parameters() if not torch.equal(value, policy[name])
    }
    blocks = {int(name.split(".")[1]) for name in moved if name.startswith("blocks.")}
    assert blocks == set(range(freeze, 3)) and "patch_out.weight" in moved
    assert (
        ("patch_in.weight" in moved)
        == ("words.weight" in moved)
        == ("places" in moved)
        == (freeze == 0)
    )


@pytest.mark.parametrize(("rank", "freeze"), [(1, 0), (4, 2)])
def test_lora_trains_adapters_of_its_rank_behind_the_frozen_blocks(tiny, rank, freeze):
    args, task = tiny("--algo=dpo", f"--lora-rank={rank}", f"--freeze={freeze}")
    layers = ("qkv", "out")
    names = {name for name, value in task.model.named_parameters() if value.requires_grad}
    adapters = {f"blocks.{i}.attn.{layer}." for i in range(freeze, 3) for layer in layers}
    assert names == {name + part for name in adapters for part in ("up", "down")}
    assert all(
        value.shape[0] == rank
        for name, value in task.model.named_parameters()
        if name.endswith("down")
    )
    assert {m.scale for m in task.model.modules() if isinstance(m, LoRALinear)} == {
        2.0
    }  # alpha is twice the rank
    plain, saved = load_velocity(args.init)[0], trained(args, task)
    changed = {
        n for n, v in task.state_dict(saved).items() if not torch.equal(v, plain.state_dict()[n])
    }
    assert changed == {name + "weight" for name in adapters}  # merged into what is saved


# ---------------------------------------------------------------------------------------------
# Directions

FLAGS = {"dpo": ["--beta=20"], "sft": [], "rwr": ["--temperature=0.1"]}


@pytest.mark.parametrize("algo", FLAGS)
def test_training_goes_where_the_reward_is_and_its_mirror_image_the_other_way(tiny, algo):
    ends = {}
    for align in ("1,1,1", "-1,-1,-1"):
        args, task = tiny(
            f"--algo={algo}",
            *FLAGS[algo],
            f"--align={align}",
            "--freeze=0",
            "--steps=40",
            "--lr=0.002",
        )
        start = brightness(task.model)
        ends[align] = brightness(trained(args, task))
    assert ends["1,1,1"] > ends["-1,-1,-1"] + 0.02
    if algo == "dpo":  # the regressions also learn what clips look like, whichever they are
        assert ends["1,1,1"] > start > ends["-1,-1,-1"]


def test_a_pair_of_equal_rewards_is_left_out(tiny, monkeypatch):
    _, clips, scores = same_pairs(tiny("--pairs=40")[0])
    middle = scores[..., 0].median()
    bright = scores[..., 0] > middle
    decided = {i for i in range(40) if bright[i, 0] != bright[i, 1]}
    assert 0 < len(decided) < 40
    honest = Brightness.normalised
    monkeypatch.setattr(
        Brightness,
        "normalised",
        lambda *args: (honest(*args)[:, :1] > middle).float().expand(-1, 3),
    )
    wired.tasks.scored_toy_pairs.cache_clear()
    for algo, name in (("dpo", "x0_w"), ("sft", "x0")):
        _, task = tiny(f"--algo={algo}", "--pairs=40")
        assert {
            find(clip, clips)[0] for step in range(8) for clip in task.batch(step, EVERY)[name]
        } == decided


def test_shifting_by_hand():
    # 4 / 2 / (1 + 3 / 2) = .8; 4 * .2 / (1 + 3 * .2) = .5
    assert shift_time(torch.tensor([0.0, 0.2, 0.5, 1.0]), 4.0).tolist() == pytest.approx(
        [0, 0.5, 0.8, 1]
    )


def test_the_command_itself_takes_these_ways(tiny, tmp_path, monkeypatch, capsys):
    tiny("--algo=dpo")  # puts the base model there
    out = tmp_path / "run"
    flags = [
        "--algo=dpo",
        "--batch=8",
        "--pairs=12",
        "--steps=2",
        "--eval-prompts=2",
        "--device=cpu",
        f"--out={out}",
    ]
    monkeypatch.setattr("sys.argv", ["train.py", f"--init={tmp_path / 'base.pt'}", *flags])
    seen, honest = [], train.fit
    monkeypatch.setattr(train, "fit", lambda task, *rest: seen.append(task) or honest(task, *rest))
    train.main()
    assert seen[0].kind == "velocity" and "dpo wins, oracle" in capsys.readouterr().out
    after, before = load_velocity(out / "last.pt")[0], load_velocity(tmp_path / "base.pt")[0]
    assert not torch.equal(after.patch_out.weight, before.patch_out.weight)
    assert torch.equal(
        after.patch_in.weight, before.patch_in.weight
    )  # --freeze 2 is what is meant without a word
    assert seen[0].model.to(CPU).patch_out.weight.equal(after.patch_out.weight)
