"""Alignment in rounds: who samples, what is learned from which clips, how a run goes on, new labels for VideoReward."""

import csv
import json
import math
import os
import signal
from argparse import Namespace
from functools import partial
from itertools import combinations
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import wired
from forked import command, ended, fork, same, tiny_checkpoints, together, weights
from wired import CONFIG, CPU, Brightness, dpo_by_hand, splits_of

import world
from data import Vocabulary
from model import VideoTransformer, load_velocity
from online import refresh, rounds
from real_data import export_toy
from real_data.pairs_csv import read_pairs
from reward import RewardConfig, VideoReward, load_reward
from runtime import checkpoint, resume
from runtime.cli import BadInput
from settings import settings_of

tiny = wired.tiny
SHORT = ("--clips=4", "--steps=4", "--rounds=2")


@pytest.fixture
def online(tiny, monkeypatch, tmp_path):
    """(a function: flags -> args and Task in rounds, calls of the sampler as (model's state, x1, y)). Clips have one
    colour each, of their own; the judge is Brightness."""
    calls = []

    def sample_many(model, x1, y, progress):
        calls.append(({name: value.clone() for name, value in model.state_dict().items()}, x1, y))
        return (x1.mean((2, 3, 4), keepdim=True) * 30).tanh().expand_as(x1)

    monkeypatch.setattr(rounds, "sample_many", sample_many)
    monkeypatch.setattr(rounds, "load_judge", lambda path, config, words: Brightness())
    (tmp_path / "out").mkdir()
    return lambda *flags: tiny(*SHORT, *flags), calls


def items_of(reward, algo="dpo", spread=1.0):
    """What is trained on for total rewards (P, n), all of them VQ's."""
    scores = torch.stack((reward, *[torch.zeros_like(reward)] * 2), 2)
    return rounds.training_items({"scores": scores}, Namespace(align=(1, 0, 0), algo=algo, spread=spread))


def test_the_best_quarter_meets_the_worst():
    reward = torch.tensor(
        [[0.0, 5.0, 1.0, 2.0, 9.0, -3.0, 4.0, 3.0], [0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 1.0]]
    )
    # the best two, 9 and 5, against the worst, -3 and 0; of the second prompt only one pair differs
    assert items_of(reward)["items"].tolist() == [[0, 4, 5], [0, 1, 0], [1, 7, 6]]
    assert items_of(torch.tensor([[2.0, 1.0]]))["items"].tolist() == [[0, 0, 1]]
    with pytest.raises(BadInput, match="all clips of each prompt have one reward"):
        items_of(torch.ones(2, 4))


def test_nft_learns_from_every_clip_by_how_good_it_is():
    found = items_of(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), "nft")
    assert found["items"].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    assert found["r"].tolist() == [[0.0, 1.0], [0.5, 0.5]]
    # over two standard deviations of the differences 1, 1, 0, 0: 1 / (2 sqrt .5) = .7071
    found = items_of(torch.tensor([[1.0, 3.0], [5.0, 5.0]]), "nft", spread=2.0)
    assert found["r"].flatten().tolist() == pytest.approx(
        [0.5 - 0.35355, 0.5 + 0.35355, 0.5, 0.5], abs=1e-4
    )


def test_logged_are_all_three_scores_and_each_clips_true_scores_for_its_own_prompt():
    prompts = world.split_prompts("train")[:2]
    drawn = world.draw_clips(
        prompts.repeat_interleave(2, 0),
        torch.zeros(4, dtype=int),
        torch.Generator().manual_seed(0),
        clean=True,
    )
    clips = rounds.to_bytes(world.render(drawn)).unflatten(0, (2, 2))
    state = {
        "number": 3,
        "prompts": [world.prompt_text(prompt) for prompt in prompts],
        "clips": clips,
    }
    state["scores"] = torch.arange(12.0).reshape(2, 2, 3)
    found = rounds.Rounds.logs(Namespace(settings=Namespace(data=None, clips=2)), state)
    assert found["round"] == 3 and found["learned"] == pytest.approx(5.5)
    assert found["true"] > 0.9  # about 1 of a clean clip


@pytest.mark.parametrize("freeze", [0, 2])
@pytest.mark.parametrize("reference", ["first", "round"])
def test_a_round_begins_at_ln_2_if_its_policy_is_the_reference(online, freeze, reference):
    args, task = online[0](
        "--algo=dpo", f"--reference={reference}", f"--freeze={freeze}", "--beta=500"
    )
    wired.trained(args, task)
    losses = [
        json.loads(line)["loss"] for line in (args.out / "metrics.jsonl").read_text().splitlines()
    ]
    assert abs(losses[0] - math.log(2)) < 1e-5 < abs(losses[1] - math.log(2))
    assert (abs(losses[2] - math.log(2)) < 1e-5) == (reference == "round")


def test_rounds_can_have_a_checkpoint_for_their_reference(online, tmp_path):
    other = wired.noticeable(VideoTransformer(CONFIG), 0.1)
    wired.save(other, "velocity", tmp_path / "other.pt")
    args, task = online[0]("--algo=dpo", f"--reference={tmp_path / 'other.pt'}", "--freeze=2")
    batch = task.batch(0, slice(0, 8))
    with torch.no_grad():
        by_hand = dpo_by_hand(load_velocity(args.init)[0], other, batch, 100)
    assert task.loss(batch)[0].item() == pytest.approx(by_hand, rel=1e-4)
    assert abs(by_hand - math.log(2)) > 1e-3


@pytest.mark.parametrize("algo", ["dpo", "nft"])
def test_times_and_dropped_prompts_follow_their_flags_and_noise_and_order_the_seed(online, algo):
    make, calls = online
    orders, times = [], []
    for seed, shift, dropout in ((0, 1, 0), (0, 7, 1), (1, 1, 0)):
        _, task = make(
            f"--algo={algo}",
            f"--seed={seed}",
            f"--time-shift={shift}",
            f"--label-dropout={dropout}",
        )
        batch = task.batch(0, slice(0, 8))
        assert batch["y"].any() != dropout
        times.append(batch["t"])
        if not dropout:  # at which place in the round each prompt stands
            orders.append([torch.nonzero((calls[-1][2] == y).all(1))[0].item() for y in batch["y"]])
    assert torch.allclose(times[1], 7 * times[0] / (1 + 6 * times[0])) and not torch.equal(
        times[0], times[2]
    )
    assert torch.equal(calls[0][1], calls[1][1]) and not torch.equal(calls[0][1], calls[2][1])
    assert orders[0] != orders[1]


class Turning:
    """In the place of Refresh: its second round turns the judge round."""

    labelled, most_labelled = None, 0

    def __init__(self, args, judge, *rest):
        self.judge, judge.sign = judge, 1

    def labelled_round(self, number):
        return None

    def __call__(self, number, *rest):
        self.judge.sign = -1 if number else 1


class Turned(Brightness):
    def normalised(self, video, y):
        return self.sign * super().normalised(video, y)


def test_a_rounds_clips_are_scored_after_its_refresh(online, monkeypatch):
    make, _ = online
    monkeypatch.setattr(rounds, "Refresh", Turning)
    monkeypatch.setattr(rounds, "load_judge", lambda path, config, words: Turned())
    _, task = make("--algo=dpo", "--refresh=1", "--align=1,0,0")
    for step, sign in ((0, 1), (2, -1)):
        batch = task.batch(step, slice(0, 8))
        red_w, red_l = (batch[name][:, 0].mean((1, 2, 3)) for name in ("x0_w", "x0_l"))
        assert (sign * (red_w - red_l) > 0).all()
    judges = []
    monkeypatch.setattr(rounds, "alignment_table", lambda *args: judges.append(args[3]))
    task.evaluate(task.model, None)
    assert judges[0].sign == -1


@pytest.mark.parametrize("algo", ["dpo", "nft"])
def test_a_reward_or_clip_that_is_not_finite_ends_the_run_with_its_name(online, monkeypatch, algo):
    make, _ = online

    class Broken(Brightness):
        def normalised(self, video, y):
            return torch.where(
                torch.arange(len(video))[:, None] == 6, torch.nan, super().normalised(video, y)
            )

    monkeypatch.setattr(rounds, "load_judge", lambda path, config, words: Broken())
    args, task = make(f"--algo={algo}")
    with pytest.raises(
        BadInput, match="scores of clip 3 of 4 of prompt 'a [a-z]+ [a-z]+ moving [a-z]+' are not"
    ):
        task.batch(0, slice(0, args.batch))
    sample_many = rounds.sample_many
    monkeypatch.setattr(
        rounds,
        "sample_many",
        lambda *a: sample_many(*a).index_fill(0, torch.tensor([4]), torch.inf),
    )
    with pytest.raises(BadInput, match="pixels of clip 1 of 4 of prompt"):
        task.batch(0, slice(0, args.batch))


@pytest.mark.parametrize("algo", ["dpo", "nft"])
def test_a_batch_has_clips_of_its_prompts_ranked_by_their_reward(online, algo):
    make, calls = online
    args, task = make(f"--algo={algo}", "--label-dropout=0", "--align=1,0,0")
    for step in range(2):
        batch = task.batch(step, slice(0, args.batch))
        (_, x1, y) = calls[0]
        assert splits_of(y) == {"train"} and len(y) == 72 * 4 and len(y.unique(dim=0)) == 72
        made = (x1.mean((2, 3, 4)) * 30).tanh()  # (N, 3: colours)
        sides = [
            batch[name][:, :, 0, 0, 0] for name in (("x0_w", "x0_l") if algo == "dpo" else ("x0",))
        ]
        for i, prompt in enumerate(batch["y"]):
            own = made[(y == prompt).all(1)]  # the four clips of this prompt
            distance = [(own - side[i]).abs().amax(1) for side in sides]
            assert all(d.min() < 0.005 for d in distance)
            red, places = own[:, 0], [d.argmin() for d in distance]
            if algo == "dpo":
                assert red[places[0]] == red.max() and red[places[1]] == red.min()
            else:
                above = red[places[0]] - red.mean()
                assert above.abs() < 0.01 or (batch["r"][i] - 0.5) * above > 0
        assert len(sides[0]) == (args.batch if algo == "dpo" else 2 * args.batch)
    assert len(calls) == 1  # a round is sampled once


def test_a_process_takes_its_rows_of_a_round(online):
    make, _ = online
    for algo in ("dpo", "nft"):
        _, task = make(f"--algo={algo}")
        whole, *halves = (task.batch(1, slice(*rows)) for rows in ((0, 8), (0, 4), (4, 8)))
        for name, value in whole.items():
            assert torch.equal(torch.cat([half[name] for half in halves]), value), name


@pytest.mark.parametrize(
    ("flags", "settings"),
    [
        (["--algo=dpo", "--beta=7"], (7.0, "constant")),
        (["--algo=dpo", "--reference=round", "--schedule=(1-t)^2"], (100.0, "(1-t)^2")),
        (["--algo=nft", "--old-decay=0.25", "--nft-beta=0.3", "--kl=2"], (0.3, 2.0)),
    ],
)
def test_every_round_is_sampled_by_the_policy_as_it_is_or_by_its_old_model(
    online, flags, settings, monkeypatch
):
    make, calls = online
    args, task = make(*flags, "--freeze=0")
    start = {name: value.clone() for name, value in task.model.state_dict().items()}
    references, olds, by_dpo, by_nft = [], [], rounds.flow_dpo_step, rounds.flow_nft_step

    def state(model):
        return {name: value.clone() for name, value in model.state_dict().items()}

    def flow_dpo_step(policy, reference, **batch):
        references.append(state(reference))
        assert (batch["beta"], batch["schedule"]) == settings
        return by_dpo(policy, reference, **batch)

    def flow_nft_step(policy, old, reference, **batch):
        olds.append(state(old))
        references.append(state(reference))
        assert (batch["beta"], batch["kl"]) == settings
        return by_nft(policy, old, reference, **batch)

    monkeypatch.setattr(rounds, "flow_dpo_step", flow_dpo_step)
    monkeypatch.setattr(rounds, "flow_nft_step", flow_nft_step)
    wired.trained(args, task)
    after_one_round = checkpoint.load_checkpoint(
        args.out / "last.pt"
    )  # of the second; the first's is not kept
    assert len(calls) == 2 and same(calls[0][0], start)
    assert not torch.equal(calls[0][1], calls[1][1])  # other noise
    moved = {name: not torch.equal(value, start[name]) for name, value in calls[1][0].items()}
    assert any(moved.values()) and after_one_round["step"] == 4
    if "--reference=round" in flags:  # of each step: the start twice, then the policy that sampled
        assert same(references, [start, start, calls[1][0], calls[1][0]])
    else:
        assert same(references, [start] * 4)
    assert same(olds, [] if "--algo=dpo" in flags else [start, start, calls[1][0], calls[1][0]])


def test_the_old_model_keeps_its_share_of_what_it_was(online):
    make, calls = online
    args, task = make("--algo=nft", "--old-decay=0.25", "--freeze=0")
    start = {name: value.clone() for name, value in task.model.state_dict().items()}
    seen = {}
    honest = task.batch

    def batch(step, rows):
        if step == 2:
            seen.update({name: value.clone() for name, value in task.model.state_dict().items()})
        return honest(step, rows)

    task.batch = batch
    wired.trained(args, task)
    for name, value in calls[1][0].items():
        assert torch.allclose(value, 0.25 * start[name] + 0.75 * seen[name], atol=1e-6), name


def test_the_log_and_the_bar_show_round_and_scores(online):
    make, _ = online
    for algo in ("dpo", "nft"):
        args, task = make(f"--algo={algo}")
        (args.out / "round.pt").unlink(missing_ok=True)
        task.batch(0, slice(0, args.batch))
        _, logs = task.loss(task.batch(3, slice(0, args.batch)))
        assert logs["round"] == 1 and -40 < logs["learned"] < 40 and -3 < logs["true"] <= 1
        assert task.progress_keys == ("round", "learned", "true")


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (
            ["--algo=dpo", "--rounds=3", "--steps=200"],
            "--rounds 3: --steps 200 must be a multiple of it",
        ),
        (
            ["--algo=sft", "--rounds=2", "--steps=4"],
            "--rounds: read by --algo dpo, nft, grpo, not by sft",
        ),
        (["--algo=dpo", "--refresh=2"], "has no effect without --rounds"),
        (["--algo=nft", "--old-decay=1"], "--old-decay 1"),
        (
            ["--algo=nft", "--clips=1", "--refresh=1"],
            "--clips 1: clips of one prompt are compared; give at least 2",
        ),
    ],
)
def test_flags_that_do_not_go_together_are_refused(flags, words):
    with pytest.raises(BadInput, match=words):
        settings_of(flags)


def test_the_room_that_a_round_takes_is_asked_for(online):
    # two files with 72 prompts' 4 clips of 3 x 4 x 16 x 16 bytes; nft's also hold the old model
    clips = 2 * 72 * 4 * 3 * 4 * 16 * 16
    _, task = online[0]("--algo=nft", "--freeze=0")
    numbers = sum(value.numel() for value in task.model.state_dict().values())
    assert task.extra_bytes == clips + 2 * 4 * numbers
    assert online[0]("--algo=dpo")[1].extra_bytes == clips


def test_rounds_of_a_sharded_policy_are_refused(online):
    with pytest.raises(BadInput, match="leave --fsdp out"):
        online[0]("--algo=dpo", "--fsdp")


# ---------------------------------------------------------------------------------------------
# The command: stopped, over two processes, with new labels


def small_rounds(*flags, dies=None, by=signal.SIGKILL):
    """train.py in three rounds of two steps on three prompts; in place of the closing table, the weights of the reward
    that it is judged by. dies: (a name of online.rounds, the call of it in which the process gets the signal `by`)."""
    rounds.MOST_PROMPTS, refresh.OLD, refresh.STEPS, refresh.BATCH = 3, 4, 2, 4

    def alignment_table(policy, out, base, reward, *_):
        torch.save(reward.state_dict(), out / "judge.pt")
        return []

    rounds.alignment_table = alignment_table
    if dies:
        name, last = dies
        honest, calls = getattr(rounds, name), []

        def dying(*args, **settings):
            calls.append(1)
            if len(calls) == last:
                os.kill(os.getpid(), by)
            return honest(*args, **settings)

        setattr(rounds, name, dying)
    command("--rounds=3", "--steps=6", "--batch=4", "--clips=2", "--lr=1e-3", *flags)


def kept(out):
    """What a run leaves: its weights, its judge, and all of its last round."""
    judge = torch.load(out / "judge.pt", weights_only=True)
    return weights(out), judge, torch.load(out / "round.pt", weights_only=True)


@pytest.mark.parametrize(
    "flags", [["--algo=dpo", "--refresh=1"], ["--algo=nft"], ["--algo=dpo", "--reference=round"]]
)
def test_killed_in_a_round_and_between_two_a_run_ends_at_the_same_bits(tmp_path, flags):
    flags = [*flags, *tiny_checkpoints(tmp_path)]
    log = tmp_path / "log"
    assert ended(fork(small_rounds, *flags, f"--out={tmp_path / 'whole'}", output=log)) == 0, (
        log.read_text()
    )
    whole, judge, last = kept(tmp_path / "whole")
    assert last["number"] == 2
    if "--refresh=1" in flags:  # the table is by the refreshed reward, which can be used on its own
        assert same(judge, last["judge"]) and same(
            judge, load_reward(tmp_path / "whole" / "reward.pt")[0].state_dict()
        )
        assert not same(judge, load_reward(tmp_path / "reward.pt")[0].state_dict())
    # in the second step of the second round; as the third is sampled; in the closing table; asked to stop as the third
    # is sampled; in the first round, of which nothing is kept
    deaths = [
        ("draw_noise", 4),
        ("sample_many", 3),
        ("alignment_table", 1),
        ("sample_many", 3),
        ("draw_noise", 2),
    ]
    if "--refresh=1" not in flags:
        deaths = deaths[:2]
    for i, dies in enumerate(deaths):
        out = tmp_path / str(i)
        by = signal.SIGTERM if i == 3 else signal.SIGKILL
        run = partial(small_rounds, *flags, f"--out={out}")
        assert ended(fork(partial(run, dies=dies, by=by), output=log)) == (
            130 if i == 3 else -signal.SIGKILL
        )
        more = ["--resume"] if (out / "last.pt").exists() else []
        assert bool(more) == (i < 4)
        assert ended(fork(run, *more, output=log)) == 0, log.read_text()
        again, again_judge, again_last = kept(out)
        assert same(again, whole) and same(again_judge, judge)
        assert same({**again_last, "settings": 0}, {**last, "settings": 0})
    if len(deaths) == 5:
        assert (
            f"stopped; {tmp_path / '3' / 'last.pt'} is the last good state"
            in log.read_text()
        )


def test_two_processes_take_the_same_rounds(tmp_path):
    log = tmp_path / "log"
    flags = ["--algo=dpo", "--refresh=2", *tiny_checkpoints(tmp_path), "--precision=float32"]
    one, two = tmp_path / "one", tmp_path / "two"
    assert ended(fork(small_rounds, *flags, f"--out={one}", output=log)) == 0, log.read_text()
    assert together(small_rounds, [(*flags, f"--out={two}")], output=log) == [0, 0], log.read_text()
    first, second = weights(one), weights(two)
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-5


def test_a_checkpoint_is_saved_as_often_as_asked_and_after_each_round(tmp_path):
    """Three rounds of two steps, and a checkpoint every third step."""
    saved, log = tmp_path / "saved", tmp_path / "log"

    def counted(*flags):
        honest = resume.save_run

        def save_run(args, task, step, *state):
            with open(saved, "a") as file:
                file.write(f"{step} ")
            honest(args, task, step, *state)

        resume.save_run = save_run
        small_rounds(*flags)

    flags = [
        "--algo=dpo",
        "--save-every=3",
        *tiny_checkpoints(tmp_path),
        f"--out={tmp_path / 'run'}",
    ]
    assert ended(fork(counted, *flags, output=log)) == 0, log.read_text()
    assert saved.read_text() == "2 3 4 6 "


def test_a_round_of_another_run_is_not_gone_on_from(online, tmp_path):
    make, calls = online
    _, task = make("--algo=dpo")
    task.batch(0, slice(0, 8))
    _, other = make("--algo=dpo", "--beta=7")
    other.batch(0, slice(0, 8))
    assert len(calls) == 2  # sampled anew
    _, third = make("--algo=dpo", "--beta=9")
    with pytest.raises(BadInput, match=r"round\.pt: holds no round 0 of this run"):
        third.batch(2, slice(0, 8))


@pytest.mark.parametrize("flags", [["--algo=dpo", "--refresh=1"]])
def test_begun_anew_in_the_folder_of_a_killed_run_the_rounds_are_those_of_an_empty_folder(
    tmp_path, flags
):
    flags, log, out = [*flags, *tiny_checkpoints(tmp_path)], tmp_path / "log", tmp_path / "again"
    assert ended(fork(small_rounds, *flags, f"--out={tmp_path / 'whole'}", output=log)) == 0, (
        log.read_text()
    )
    dying = partial(small_rounds, *flags, f"--out={out}", dies=("sample_many", 3))
    assert ended(fork(dying, output=log)) == -signal.SIGKILL
    (out / "last.pt").unlink()
    assert ended(fork(small_rounds, *flags, f"--out={out}", output=log)) == 0, log.read_text()
    assert same(kept(out)[0], kept(tmp_path / "whole")[0])


def test_different_pairs_are_drawn_at_most_all():
    every = {(prompt, *pair) for prompt in range(18) for pair in combinations(range(4), 2)}
    for count, found in ((256, 108), (20, 20)):  # six pairs of four clips, of each of 18 prompts
        drawn = refresh.draw_pairs(18, 4, count, torch.Generator().manual_seed(0)).tolist()
        unordered = {(prompt, *sorted(pair)) for prompt, *pair in drawn}
        assert len(drawn) == len(unordered) == found and unordered <= every
        assert 0.2 < sum(a < b for _, a, b in drawn) / found < 0.8  # either clip comes first


@pytest.fixture
def refreshed(monkeypatch, tmp_path):
    """A function: seed -> (Refresh, judge): a tiny VideoReward, and its labels of a few pairs."""
    for name, value in {"OLD": 40, "MOST": 40, "STEPS": 3, "BATCH": 8}.items():
        monkeypatch.setattr(refresh, name, value)
    torch.manual_seed(0)
    judge = wired.noticeable(
        VideoReward(RewardConfig(frames=4, size=16, dim=24, depth=2, heads=2, vocab=CONFIG.vocab))
    )

    def make(seed=0):
        args = Namespace(refresh=2, refresh_pairs=24, data=None, seed=seed, caption=1.0)
        args.reward, args.out = tmp_path / "reward.pt", tmp_path / "out"
        return refresh.Refresh(args, judge.eval(), Vocabulary(), CPU), judge

    return make


def test_new_labels_are_the_annotators_of_pairs_of_the_rounds_own_clips(refreshed, monkeypatch):
    ask, judge = refreshed()
    batches, honest = [], refresh.reward_step

    def reward_step(model, caption, **batch):
        batches.append(batch | {"caption": caption})
        return honest(model, caption=caption, **batch)

    monkeypatch.setattr(refresh, "reward_step", reward_step)
    annotators, annotate = [], refresh.annotate_pairs
    asked = lambda *args: annotators.append(args[2]) or annotate(*args)  # noqa: E731
    monkeypatch.setattr(refresh, "annotate_pairs", asked)
    prompts = world.split_prompts("train")[:4]
    y = Vocabulary().encode_attributes(prompts, 8)
    drawn = world.draw_clips(
        prompts.repeat_interleave(6, 0), torch.arange(24) % 12, torch.Generator().manual_seed(0), 4
    )
    clips = rounds.to_bytes(world.render(drawn, 16)).unflatten(0, (4, 6))
    texts = [world.prompt_text(prompt) for prompt in prompts]
    before = {name: value.clone() for name, value in judge.state_dict().items()}
    for number in (0, 1):  # nothing is due
        ask(number, {"prompts": texts, "y": y, "clips": clips})
    assert ask.labelled is None and same(judge.state_dict(), before)
    ask(2, {"prompts": texts, "y": y, "clips": clips})
    found = ask.labelled
    assert len(found["y"]) == 24 and found["clips"].shape == (24, 2, 3, 4, 16, 16)
    for asked, pair, label in zip(found["y"], found["clips"], found["label"]):
        (prompt,) = torch.nonzero((y == asked).all(1))[0]
        places = [
            torch.nonzero((clips[prompt] == clip).flatten(1).all(1))[0].item() for clip in pair
        ]
        assert places[0] != places[1]
        a, b = world.oracle(refresh.to_video(pair), prompts[prompt].expand(2, 3))
        gap = (a - b) / world.TRUE_STD
        clear = gap.abs() > 1.5  # five times what an annotator errs by
        assert torch.equal(label[clear], gap[clear].sign().long())
    old = {
        "y": ask.old.y,
        "label": ask.old.label,
        "clips": torch.stack(ask.old.sides(torch.arange(40)), 1),
    }
    assert splits_of(ask.old.y) == {"train"}
    for batch in batches:  # half new, half old, each pair with its own label
        assert batch["caption"] == 1.0 and batch["weight"].mean() == pytest.approx(1.0)
        both = torch.stack((batch["video_a"], batch["video_b"]), 1)
        for i, (y_i, pair, label) in enumerate(zip(batch["y"], both, batch["label"])):
            pool = found | {"clips": refresh.to_video(found["clips"])} if i < 4 else old
            (place,) = torch.nonzero((pool["clips"] == pair).flatten(1).all(1))[0]
            assert torch.equal(pool["y"][place], y_i) and torch.equal(pool["label"][place], label)
    assert len(batches) == 3
    assert not same(judge.state_dict(), before) and not any(
        p.requires_grad for p in judge.parameters()
    )
    scores = torch.cat(
        [judge.normalised(side, ask.old.y) for side in ask.old.sides(torch.arange(40))]
    )
    assert torch.allclose(scores.mean(0), torch.zeros(3), atol=1e-3)
    assert torch.allclose(scores.std(0), torch.ones(3), atol=1e-2)
    ask(4, {"prompts": texts, "y": y, "clips": clips})  # of 24 and 24 labelled pairs the newest 40 stay
    newest = {name: value[16:] for name, value in ask.labelled.items()}
    assert len(ask.labelled["y"]) == 40 and all(
        same(ask.labelled[name][:16], found[name][8:]) for name in found
    )
    assert not same(newest["clips"], found["clips"])  # another round asks about other pairs
    other, _ = refreshed(seed=1)
    other(2, {"prompts": texts, "y": y, "clips": clips})
    assert not same(other.labelled["clips"], found["clips"]) and not same(other.old.y, ask.old.y)
    assert len(set(annotators)) == 3  # with noise of their own


def test_what_people_say_of_exported_clips_is_taken_back(tmp_path):
    toy, out, log = tmp_path / "toy", tmp_path / "out", tmp_path / "log"
    export_toy.export(export_toy.arguments(["export", str(toy), "--pairs=6", "--generated=0"]))
    data = toy / "train.csv"
    data.write_text(data.read_text().replace(",a ", ",A ").replace(" moving", "! MOVING"))
    flags = [
        "--algo=dpo",
        "--refresh=2",
        "--refresh-pairs=3",
        f"--data={data}",
        f"--cache={tmp_path / 'cache'}",
    ]
    flags += [*tiny_checkpoints(tmp_path), f"--out={out}"]
    assert ended(fork(small_rounds, *flags, output=log)) == 130, log.read_text()
    file = out / "labels-2" / "pairs.csv"
    assert (
        f"wrote {file} and its videos" in log.read_text()
        and len(list(file.parent.glob("*.mp4"))) == 6
    )
    with open(file, newline="") as text:
        rows = list(csv.DictReader(text))
    prompts = {row.prompt for row in read_pairs(data)}  # as they were written
    assert len(rows) == 3 and {row["prompt"] for row in rows} <= prompts
    assert all(row["prompt"].startswith("A ") and "! MOVING " in row["prompt"] for row in rows)
    assert {row[name] for row in rows for name in ("VQ", "MQ", "TA")} == {""}

    def write(changed):
        with open(file, "w", newline="") as text:
            writer = csv.DictWriter(text, rows[0])
            writer.writeheader()
            writer.writerows(changed)

    resume = partial(
        small_rounds, *flags, "--resume", dies=("sample_many", 1)
    )  # nothing is sampled again
    labels = [dict(row, VQ="a", MQ="B", TA="Tie") for row in rows]
    write([dict(labels[0], path_B="gone.mp4"), dict(labels[1], MQ="C"), rows[2]])
    log.unlink()
    assert ended(fork(resume, output=log)) == 2
    faults = [line for line in log.read_text().splitlines() if str(file) in line]
    assert [line.rpartition(f"{file}, ")[2] for line in faults] == [
        f"line 2, column path_B: no video 'gone.mp4' in {file.parent}",
        "line 3, column MQ: unknown label 'C'; known: A, B, same, tie, invalid",
        "line 4, column VQ: unknown label ''; known: A, B, same, tie, invalid",
    ]
    assert "Traceback" not in log.read_text()
    write(labels[1:])
    assert ended(fork(resume, output=log)) == 0, log.read_text()
    found = torch.load(out / "round.pt", weights_only=True)
    assert found["labelled"]["label"].tolist() == [[1, -1, 0]] * 2
    shown = [
        iio.imread(file.parent / row[path])[:, ::4, ::4]
        for row in rows[1:]
        for path in ("path_A", "path_B")
    ]
    shown = (
        torch.tensor(np.stack(shown)).permute(0, 4, 1, 2, 3).unflatten(0, (2, 2))
    )  # as the clips are
    error = found["labelled"]["clips"].float() - shown  # of the rows that are there, in their order
    assert error.abs().mean() < 6
    # begun anew with another beta, the labels would be about other clips
    (out / "last.pt").unlink()
    assert ended(fork(small_rounds, *flags, "--beta=7", output=log)) == 2
    assert f"{file.parent}: belongs to another run or other settings" in log.read_text()


def test_latents_cannot_be_labelled():
    judge = Namespace(config=Namespace(channels=16))
    args = Namespace(data="pairs.csv", refresh_pairs=1, reward=Path("reward.pt"), out=Path("out"))
    with pytest.raises(BadInput, match="people cannot look at latents"):
        refresh.Refresh(args, judge, Vocabulary(), CPU)
