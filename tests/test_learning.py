"""Pretraining, VideoReward and the noise-aware reward as train.py makes them: batches, labels, each
flag's loss, the unit of a reward, and what is trained. Models are tiny (wired.py)."""

import pytest
import torch
import torch.nn.functional as F
import wired
from wired import CONFIG, CPU, EVERY, Brightness, error, find, noised, noticeable, same_pairs

import trainer
import world
from data import DIMENSIONS, Vocabulary
from model import load_velocity
from real_data.toy_pairs import annotated_pairs
from reward import (
    RewardConfig,
    VideoReward,
    bt_loss,
    btt_loss,
    caption_loss,
    load_reward,
    regression_loss,
)
from runtime.cli import BadInput

drawn, tiny = wired.drawn, wired.tiny
TA = 2


def test_the_overall_choice_is_the_better_clip():
    pairs = annotated_pairs(120, ["train"], 3, CONFIG, Vocabulary())
    gap = ((pairs.truth[:, 0] - pairs.truth[:, 1]) / world.TRUE_STD).mean(1)
    clear = gap.abs() > 1
    assert clear.sum() > 5 and torch.equal(pairs.overall[clear], gap[clear].sign().long())


# ---------------------------------------------------------------------------------------------
# VideoReward


def test_a_reward_starts_from_a_trained_one(tiny, tmp_path):
    sizes = {"frames": 4, "size": 16, "dim": 24, "depth": 2, "heads": 2, "vocab": CONFIG.vocab}
    model = noticeable(VideoReward(RewardConfig(**sizes)))
    path = wired.save(model, "reward", tmp_path / "reward.pt")
    _, task = tiny(f"reward --init-reward={path}")
    saved = model.state_dict()
    assert all(torch.equal(value, saved[name]) for name, value in task.model.state_dict().items())
    assert task.loss(task.batch(0, EVERY))[0].requires_grad
    with pytest.raises(BadInput, match="--preset: has no effect with --init-reward"):
        tiny(f"reward --init-reward={path} --preset=nano")


@pytest.mark.parametrize(
    ("flags", "loss_of", "tokens", "caption"),
    [
        ("", btt_loss, 3, 1.0),
        ("--loss=bt --tokens=shared --caption=0.5", bt_loss, 1, 0.5),
        ("--loss=regression --tokens=separate --caption=0", regression_loss, 3, 0.0),
    ],
)
def test_videorewards_loss_is_what_the_flags_say(tiny, flags, loss_of, tokens, caption):
    _, task = tiny("reward", "--pairs=30", flags)
    noticeable(task.model)
    assert len(task.model.tokens) == tokens
    batch = task.batch(0, EVERY)
    y, label = batch["y"], batch["label"]
    assert (label == 0).any() and (label != 0).any()
    with torch.no_grad():
        (a, words_a), (b, words_b) = (
            task.model.scores_and_words(batch[name], y) for name in ("video_a", "video_b")
        )
        loss, logs = task.loss(batch)
    if loss_of is regression_loss:
        preference = regression_loss(torch.stack((a, b), 1), batch["mos"])
    else:
        preference = loss_of(a, b, label)
    assert logs["loss"] == pytest.approx(preference.item(), rel=1e-4)
    nll = (caption_loss(words_a, y) + caption_loss(words_b, y)).item() / 2
    assert (loss - preference).item() == pytest.approx(caption * nll, rel=1e-4, abs=1e-6)


def test_a_saved_videoreward_gives_z_scores_of_all_pairs_held_out(tiny, tmp_path):
    settings, task = tiny("reward", "--eval-pairs=40", "--generated=0.5", f"--cache={tmp_path}")
    held, generated = task.held.values()
    lines = trainer.fit(task, settings, CPU)
    model, _ = load_reward(settings.out / "last.pt")
    index = torch.arange(20)
    with torch.no_grad():
        a, b = (model(video, held.y) for video in held.sides(index))
        other = [model(video, generated.y) for video in generated.sides(index)]
        z = model.normalised(held.sides(index)[0], held.y)
    every = torch.cat((a, b, *other))
    assert torch.allclose(model.mean, every.mean(0), atol=1e-5)
    assert torch.allclose(model.std, every.std(0), rtol=1e-3)
    assert torch.allclose(z, (a - every.mean(0)) / every.std(0), atol=1e-3)
    assert wired.splits_of(held.y) == {"validation"}
    assert "20 rendered validation pairs" in "\n".join(lines)
    for k, name in enumerate(DIMENSIONS):
        label = held.label[:, k]
        right = ((a - b)[:, k].sign() == label)[label != 0].float().mean().item()
        line = next(line for line in lines if line.strip().startswith(name))
        _, without_ties, _, ties = line.split()
        assert float(without_ties) == pytest.approx(right, abs=6e-4)
        assert float(ties) == pytest.approx((label == 0).float().mean().item(), abs=6e-4)


# ---------------------------------------------------------------------------------------------
# The noise-aware reward


def test_the_noise_aware_loss_on_labels_is_bradley_terry(tiny):
    _, task = tiny("nrg", "--pairs=30", "--target=labels")
    noticeable(task.model)
    batch = task.batch(0, EVERY)
    x1, t, label = batch["x1"], batch["t"], batch["label"]
    with torch.no_grad():
        loss, logs = task.loss(batch)
        a, b = (task.model(noised(batch[x], x1, t), t, batch["y"]) for x in ("x0_a", "x0_b"))
    each = F.softplus(-label * (a - b))[label != 0]  # ties are left out
    assert loss.item() == pytest.approx(each.mean().item(), rel=1e-4)
    right = ((a - b).sign() == label)[:, TA][label[:, TA] != 0].float().mean().item()
    assert logs["TA"] == pytest.approx(right)


def test_the_noise_aware_reward_learns_videorewards_scores_of_the_clean_clip(tiny):
    settings, task = tiny("nrg", "--pairs=30")
    noticeable(task.model)
    y, clips, z = same_pairs(settings)
    places = []
    for step in range(8):  # 60 clips, 8 a step
        batch = task.batch(step, EVERY)
        x0, t, other_y = batch["x0"], batch["t"], batch["other_y"]
        found = [tuple(find(clip, clips)) for clip in x0]
        places += found
        assert torch.equal(batch["y"], y[[pair for pair, _ in found]])
        with torch.no_grad():
            loss, _ = task.loss(batch)
            x_t = noised(x0, batch["x1"], t)
            own, other = task.model(x_t, t, batch["y"]), task.model(x_t, t, other_y)
        target = torch.stack([z[place] for place in found]).clamp(-3, 3)
        of_other = Brightness().normalised(x0, other_y).clamp(-3, 3)
        each = (own - target).square().sum(1) + (other - of_other)[:, TA].square()
        assert loss.item() == pytest.approx(each.mean().item(), rel=1e-4)
    assert len(set(places[:60])) == 60  # both clips of each pair


@pytest.mark.parametrize(("read", "trunk"), [(1, "frozen"), (2, "trained")])
def test_a_noise_aware_reward_reads_the_first_blocks_of_the_base(tiny, read, trunk):
    settings, task = tiny("nrg", f"--read={read}", f"--trunk={trunk}")
    base = load_velocity(settings.init)[0].state_dict()
    assert len(task.model.trunk.blocks) == read
    assert all(v.equal(base[name]) for name, v in task.model.trunk.state_dict().items())
    head = task.model.cells.weight.clone()
    model = wired.trained(settings, task)
    moved = {name for name, v in model.trunk.state_dict().items() if not v.equal(base[name])}
    assert bool(moved) == (trunk == "trained") and not model.cells.weight.equal(head)


def test_a_noise_aware_rewards_unit_is_the_spread_over_all_clips_and_times(tiny, tmp_path):
    settings, task = tiny("nrg", "--eval-pairs=20", "--generated=0.5", f"--cache={tmp_path}")
    held, generated = task.held.values()
    lines = trainer.fit(task, settings, CPU)
    assert not task.model.std.equal(torch.ones(3)) and wired.splits_of(held.y) == {"validation"}
    rng = torch.Generator().manual_seed(settings.eval_seed)
    x1, index = torch.randn(10, *CONFIG.video_shape, generator=rng), torch.arange(10)

    @torch.no_grad()
    def scores(pairs, now):
        t = torch.full((10,), now)
        sides = [task.model(noised(x0, x1, t), t, pairs.y) for x0 in pairs.sides(index)]
        return torch.stack(sides, 1)

    raw = {now: scores(held, now) for now in (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)}
    every = torch.cat([*raw.values(), *(scores(generated, now) for now in raw)])
    assert torch.allclose(every.std((0, 1)), torch.ones(3), atol=1e-3)  # they are divided by it
    for now, score in raw.items():
        line = next(line for line in lines if line.startswith(f"  t {now:.2f}"))
        right = (score[:, 0] - score[:, 1]).sign() == held.label
        for k, name in enumerate(DIMENSIONS):
            share = right[:, k][held.label[:, k] != 0].float().mean().item()
            assert f"{name} {share:.3f}" in line


# ---------------------------------------------------------------------------------------------
# Pretraining


def test_pretraining_takes_clips_of_its_prompts_and_the_flow_error(tiny, drawn):
    _, task = tiny("pretrain", "--label-dropout=0")
    drawn.clear()
    batch = task.batch(0, EVERY)
    (clips,) = drawn
    assert torch.equal(batch["x0"], world.render(clips, CONFIG.size))
    assert torch.equal(wired.attributes_of(batch["y"]), clips.prompt)
    with torch.no_grad():
        expected = error(task.model, batch["x0"], batch).mean()
    assert task.loss(batch)[0].item() == pytest.approx(expected.item(), rel=1e-4)


@pytest.mark.parametrize(("algo", "middle"), [("pretrain", 0.655), ("dpo", 0.5), ("nrg", 0.5)])
def test_times_are_uniform_and_in_pretraining_logit_normal(tiny, algo, middle):
    """Nine times in ten are logit-normal(0, 1): 2 Phi(log 3) - 1 = .728 of them lie in the middle
    half. The other tenth lies above .9."""
    t = tiny(algo, "--time-shift=1", "--batch=1000")[1].batch(0, slice(0, 1000))["t"]
    assert ((t > 0.25) & (t < 0.75)).float().mean().item() == pytest.approx(middle, abs=0.06)
