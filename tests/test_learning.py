"""Pretraining, VideoReward and the noise-aware reward through train.py's own tasks: batches, labels, each flag's loss,
and that a model learns what the annotators said, or the opposite where their labels are turned.

Models are tiny (wired.py), pairs are the toy world's; losses are held against formulas written out here.
"""

import pytest
import torch
import torch.nn.functional as F
import wired
from wired import BATCH, CONFIG, CPU, Brightness, find, noticeable, same_pairs, splits_of, trained

import trainer
import world
from data import Vocabulary
from model import load_velocity
from real_data.toy_pairs import annotated_pairs, other_prompts
from reward import load_reward

drawn, tiny = wired.drawn, wired.tiny
EVERY = slice(0, BATCH)
TA = 2


def spoken(args):
    """What the annotators' pairs of a training are, by the oracle: y, clips (N, 2, ...) and true scores (N, 2, 3)."""
    y, clips, _ = same_pairs(args)
    prompts = world.prompt_attributes([Vocabulary().decode(row) for row in y])
    return y, clips, torch.stack([world.oracle(clips[:, side], prompts) for side in (0, 1)], 1)


@pytest.mark.parametrize(("algo", "more"), [("reward", []), ("nrg", ["--target=labels"])])
def test_labels_are_those_of_the_very_clips_and_say_which_is_better(tiny, algo, more):
    args, task = tiny(f"--algo={algo}", "--pairs=30", *more)
    y, clips, truth = spoken(args)
    a, b = ("video_a", "video_b") if algo == "reward" else ("x0_a", "x0_b")
    clear = 0
    for step in range(3):
        batch = task.batch(step, EVERY)
        for i in range(BATCH):
            (pair, side), other = find(batch[a][i], clips), find(batch[b][i], clips)
            assert side == 0 and other == [pair, 1] and torch.equal(y[pair], batch["y"][i])
            gap = (truth[pair, 0] - truth[pair, 1]) / world.TRUE_STD
            for k in (
                torch.nonzero(gap.abs() > 1.5).flatten().tolist()
            ):  # five times what an annotator errs by
                clear += 1
                assert batch["label"][i, k] == gap[k].sign()
                if algo == "reward":
                    assert (batch["mos"][i, 0, k] - batch["mos"][i, 1, k]) * gap[k] > 0
    assert clear > 20


def test_truth_and_overall_of_annotated_pairs_are_those_of_their_sides():
    pairs = annotated_pairs(120, ["train"], 3, CONFIG, Vocabulary())
    prompts = world.prompt_attributes([Vocabulary().decode(row) for row in pairs.y])
    truth = torch.stack(
        [world.oracle(video, prompts) for video in pairs.sides(torch.arange(120))], 1
    )
    assert torch.allclose(pairs.truth, truth, atol=1e-5)
    index, side = torch.arange(4), torch.zeros(4, dtype=torch.int64)  # side 0 is A
    assert all(
        torch.equal(pairs.clips(index, side + i), clip) for i, clip in enumerate(pairs.sides(index))
    )
    gap = ((truth[:, 0] - truth[:, 1]) / world.TRUE_STD).mean(1)
    clear = gap.abs() > 1
    assert clear.sum() > 5 and torch.equal(pairs.overall[clear], gap[clear].sign().long())


def test_pairs_to_judge_by_come_from_other_generators_than_those_to_train_on(drawn, tiny):
    tiny("--algo=reward", "--pairs=40", "--eval-pairs=40")
    assert len(drawn) == 4 and not torch.equal(drawn[0].generator, drawn[2].generator)


def test_ratings_follow_the_clip_that_is_rated():
    good, bad = torch.full((200, 3), 0.95), torch.full((200, 3), 0.05)
    for a, b, sign in ((good, bad, 1), (bad, good, -1)):
        mos = world.rate(a, b, torch.Generator().manual_seed(2))
        assert mos.shape == (200, 2, 3) and 1 <= mos.min() and mos.max() <= 5
        assert (sign * (mos[:, 0] - mos[:, 1])).mean() > 1
        label, _ = world.annotate(a, b, torch.Generator().manual_seed(2))
        overall = world.annotate_overall(a, b, torch.Generator().manual_seed(2))
        assert (label == sign).float().mean() > 0.95 and (overall == sign).float().mean() > 0.95
    # one standard deviation is one step from 3, which a clip of mean quality gets
    level = world.TRUE_MEAN.expand(20_000, 3)
    mos = world.rate(level, level - world.TRUE_STD, torch.Generator().manual_seed(2)).mean(0)
    assert torch.allclose(mos[0], torch.full((3,), 3.0), atol=0.03) and torch.allclose(
        mos[1], mos[0] - 1, atol=0.03
    )


# ---------------------------------------------------------------------------------------------
# VideoReward


def preference_by_hand(kind, r, label, mos):
    """The three losses of section 3.2 for scores r (B, 2, 3), entry by entry."""
    losses = []
    for i in range(len(r)):
        for k in range(3):
            delta, said = (r[i, 0, k] - r[i, 1, k]).double(), label[i, k].item()
            tie = torch.log(torch.tensor(5.0, dtype=torch.float64))
            if kind == "regression":
                losses += [(r[i, side, k] - (mos[i, side, k] - 3)) ** 2 for side in (0, 1)]
            elif said:
                losses.append(F.softplus(-said * delta + (tie if kind == "btt" else 0)))
            elif kind == "btt":  # (theta^2 - 1) sigma(delta - log theta) sigma(-delta - log theta)
                losses.append(
                    F.softplus(tie - delta) + F.softplus(tie + delta) - torch.tensor(24.0).log()
                )
    return sum(losses).item() / len(losses)


@pytest.mark.parametrize("tokens", ["separate", "shared"])
@pytest.mark.parametrize("kind", ["btt", "bt", "regression"])
def test_the_loss_is_the_one_that_is_asked_for(tiny, kind, tokens):
    _, task = tiny(
        "--algo=reward", "--pairs=30", f"--loss={kind}", f"--tokens={tokens}", "--caption=0.5"
    )
    noticeable(task.model)
    assert len(task.model.tokens) == (3 if tokens == "separate" else 1)
    batch = task.batch(0, EVERY)
    assert (batch["label"] == 0).any() and (batch["label"] != 0).any()
    with torch.no_grad():
        scored = [
            task.model.scores_and_words(batch[name], batch["y"]) for name in ("video_a", "video_b")
        ]
        loss, logs = task.loss(batch)
    wanted = preference_by_hand(
        kind, torch.stack([r for r, _ in scored], 1), batch["label"], batch["mos"]
    )
    assert logs["loss"] == pytest.approx(wanted, rel=1e-4)
    bag = torch.zeros(BATCH, CONFIG.vocab)
    for i, words in enumerate(batch["y"].tolist()):
        bag[i, [word for word in words if word]] = 1
    wrong = [(1 - bag + (2 * bag - 1) * torch.sigmoid(logits)).log() for _, logits in scored]
    caption = -torch.cat(wrong).sum(1).mean().item()
    assert loss.item() - wanted == pytest.approx(0.5 * caption, rel=1e-4)


def test_what_is_left_out_is_btt_separate_tokens_and_caption_one(tiny):
    said = (
        tiny("--algo=reward", "--loss=btt", "--caption=1", "--tokens=separate"),
        tiny("--algo=reward"),
    )
    losses = [task.loss(task.batch(0, EVERY))[0].item() for _, task in said]
    assert losses[0] == losses[1]


def test_a_saved_videoreward_gives_z_scores_of_the_pairs_held_out(tiny, tmp_path):
    args, task = tiny("--algo=reward", "--eval-pairs=40", "--generated=0.5", f"--cache={tmp_path}")
    held, other = task.held.values()
    lines = trainer.fit(task, args, CPU)
    model, _ = load_reward(args.out / "last.pt")
    with torch.no_grad():
        raw, of_other = (
            torch.cat([model(video, pairs.y) for video in pairs.sides(torch.arange(20))])
            for pairs in (held, other)
        )
        z = torch.cat([model.normalised(video, held.y) for video in held.sides(torch.arange(20))])
    every = torch.cat((raw, of_other))  # rendered and generated
    assert torch.allclose(model.mean, every.mean(0), atol=1e-5) and torch.allclose(
        model.std, every.std(0), rtol=1e-3
    )
    assert torch.allclose(z, (raw - every.mean(0)) / every.std(0), atol=1e-3)
    assert splits_of(held.y) == {"validation"} and "20 rendered validation pairs" in "\n".join(
        lines
    )
    right = [
        ((raw[:20] - raw[20:])[:, k].sign() == held.label[:, k])[held.label[:, k] != 0]
        for k in range(3)
    ]
    for k, name in enumerate(("VQ", "MQ", "TA")):
        _, without, _, ties = next(line for line in lines if line.strip().startswith(name)).split()
        assert float(without) == pytest.approx(right[k].float().mean().item(), abs=6e-4)
        assert float(ties) == pytest.approx((held.label[:, k] == 0).float().mean().item(), abs=6e-4)


# ---------------------------------------------------------------------------------------------
# The noise-aware reward


def noised(x0, x1, t):
    t = t.reshape(-1, 1, 1, 1, 1)
    return (1 - t) * x0 + t * x1


def test_nrg_loss_on_labels_is_bradley_terry(tiny):
    _, task = tiny("--algo=nrg", "--pairs=30", "--target=labels")
    noticeable(task.model)
    batch = task.batch(0, EVERY)
    with torch.no_grad():
        loss, _ = task.loss(batch)
        a, b = (
            task.model(noised(batch[x], batch["x1"], batch["t"]), batch["t"], batch["y"])
            for x in ("x0_a", "x0_b")
        )
    said = batch["label"] != 0  # ties are left out
    assert loss.item() == pytest.approx(
        F.softplus(-batch["label"] * (a - b))[said].mean().item(), rel=1e-4
    )


def test_nrg_learns_what_videoreward_says_of_the_clean_clip(tiny):
    args, task = tiny("--algo=nrg", "--pairs=30")
    noticeable(task.model)
    y, clips, z = same_pairs(args)
    places = []
    for step in range(8):  # 60 clips, 8 a step
        batch = task.batch(step, EVERY)
        judge = Brightness()
        for i in range(BATCH):
            pair, side = find(batch["x0"][i], clips)
            places.append((pair, side))
            assert torch.equal(batch["y"][i], y[pair])
        with torch.no_grad():
            loss, _ = task.loss(batch)
            x_t = noised(batch["x0"], batch["x1"], batch["t"])
            own, other = (task.model(x_t, batch["t"], batch[name]) for name in ("y", "other_y"))
        wanted = torch.stack([z[place] for place in places[-BATCH:]]).clamp(-3, 3)
        of_other = judge.normalised(batch["x0"], batch["other_y"]).clamp(-3, 3)[:, TA]
        error = (own - wanted).square().sum(1) + (other[:, TA] - of_other).square()
        assert loss.item() == pytest.approx(error.mean().item(), rel=1e-4)
    assert len(set(places[:60])) == 60  # both clips of each pair


def test_the_other_prompt_differs_in_one_word_of_the_same_kind(tiny):
    _, task = tiny("--algo=nrg", "--pairs=30", "--batch=64")
    batch = task.batch(0, slice(0, 64))
    own, other = (
        world.prompt_attributes([Vocabulary().decode(row) for row in batch[name]])
        for name in ("y", "other_y")
    )
    changed = own != other
    assert (changed.sum(1) == 1).all() and (changed.sum(0) > 8).all()
    assert len((other - own)[:, 0].unique()) > 4  # every other colour


def test_other_prompts_of_real_data_are_those_of_other_pairs():
    vocabulary, y = Vocabulary(["<pad>", "<unk>", "red"]), torch.arange(8).reshape(4, 2)
    assert torch.equal(other_prompts(y, vocabulary, None), y[[3, 0, 1, 2]])


@pytest.mark.parametrize(("read", "trunk"), [(1, "frozen"), (3, "frozen"), (2, "trained")])
def test_nrg_reads_so_many_blocks_of_the_base_and_leaves_them_if_frozen(tiny, read, trunk):
    args, task = tiny("--algo=nrg", f"--read={read}", f"--trunk={trunk}")
    base = load_velocity(args.init)[0].state_dict()
    assert len(task.model.trunk.blocks) == read
    assert all(torch.equal(v, base[n]) for n, v in task.model.trunk.state_dict().items())
    head = task.model.cells.weight.clone()
    model = trained(args, task)
    moved = {n for n, v in model.trunk.state_dict().items() if not torch.equal(v, base[n])}
    assert bool(moved) == (trunk == "trained") and not torch.equal(model.cells.weight, head)


def test_a_noise_aware_rewards_unit_is_the_spread_over_clips_and_times(tiny, tmp_path):
    args, task = tiny("--algo=nrg", "--eval-pairs=20", "--generated=0.5", f"--cache={tmp_path}")
    held, other = task.held.values()
    lines = trainer.fit(task, args, CPU)
    assert not torch.equal(task.model.std, torch.ones(3)) and splits_of(held.y) == {"validation"}
    times = (0.0, 0.2, 0.4, 0.6, 0.8, 0.9)
    x1 = torch.randn(
        10, *CONFIG.video_shape, generator=torch.Generator().manual_seed(args.eval_seed)
    )

    @torch.no_grad()
    def score(pairs, now):
        t = torch.full((10,), now)
        return torch.stack(
            [task.model(noised(x0, x1, t), t, pairs.y) for x0 in pairs.sides(torch.arange(10))], 1
        )

    raw = [score(held, now) for now in times]
    every = torch.cat([*raw, *(score(other, now) for now in times)])
    assert torch.allclose(every.std((0, 1)), torch.ones(3), atol=1e-3)  # divided by it already
    for now, score in zip(times, raw):
        line = next(line for line in lines if line.startswith(f"  t {now:.2f}"))
        right = (score[:, 0] - score[:, 1]).sign() == held.label
        for k, name in enumerate(("VQ", "MQ", "TA")):
            share = right[:, k][held.label[:, k] != 0].float().mean().item()
            assert f"{name} {share:.3f}" in line


# ---------------------------------------------------------------------------------------------
# Pretraining


def test_pretraining_takes_clips_of_its_prompts_and_the_flow_error(tiny, drawn):
    _, task = tiny("--algo=pretrain", "--label-dropout=0")
    drawn.clear()
    batch = task.batch(0, EVERY)
    (clips,) = drawn
    assert torch.equal(batch["x0"], world.render(clips, CONFIG.size))
    assert [Vocabulary().decode(row) for row in batch["y"]] == [
        world.prompt_text(row) for row in clips.prompt
    ]
    with torch.no_grad():
        x_t = noised(batch["x0"], batch["x1"], batch["t"])
        v = task.model(x_t, batch["t"], batch["y"])
        wanted = (v - (batch["x1"] - batch["x0"])).square().mean()
    assert task.loss(batch)[0].item() == pytest.approx(wanted.item(), rel=1e-4)


def test_pretraining_times_are_logit_normal_with_a_tenth_near_noise_and_alignments_uniform(tiny):
    # the share of times in the middle half: 2 Phi(log 3) - 1 = .728 of a logit-normal(0, 1), of which nine in ten are;
    # above .9: a tenth, and Phi(-log 9) = .014 of the others
    for algo, middle, top in (
        ("pretrain", 0.9 * 0.728, 0.1 + 0.9 * 0.014),
        ("dpo", 0.5, 0.1),
        ("nrg", 0.5, 0.1),
    ):
        _, task = tiny(f"--algo={algo}", "--time-shift=1", "--batch=600")
        t = torch.cat([task.batch(step, slice(0, 600))["t"] for step in range(2)])
        assert ((t > 0.25) & (t < 0.75)).float().mean().item() == pytest.approx(middle, abs=0.06)
        assert (t > 0.9).float().mean().item() == pytest.approx(top, abs=0.03)
        assert (t > 0.98).float().mean().item() == pytest.approx(0.02, abs=0.015)
