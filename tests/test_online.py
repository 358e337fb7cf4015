"""Alignment in rounds: who samples, what is learned from which clips, how a run resumes. The losses
are in test_flow_nft.py and test_flow_grpo.py, new labels in test_refresh.py."""

import math
import os
import signal
from argparse import Namespace
from functools import partial

import pytest
import torch
import wired
from forked import command, ended, fork, same, tiny_checkpoints, together, weights
from wired import CONFIG, EVERY, Brightness, dpo_by_hand

import tasks
import world
from model import VideoTransformer, load_velocity
from online import refresh, rounds
from online import tasks as online_tasks
from real_data.video import to_video
from reward import load_reward
from runtime.cli import BadInput

tiny = wired.tiny
TRAIN = world.split_prompts("train")


def items_of(reward, algo="dpo", **state):
    """What is trained on for total rewards (P, n), all of them VQ's."""
    scores = torch.stack((reward, torch.zeros_like(reward), torch.zeros_like(reward)), 2)
    settings = Namespace(align=(1, 0, 0), algo=algo, spread=2.0)
    return rounds.training_items({"scores": scores, **state}, settings)


def test_what_a_round_trains_on_by_hand():
    reward = torch.tensor([[0.0, 5, 1, 2, 9, -3, 4, 3], [0.0, 0, 0, 0, 0, 0, 0, 1]])
    # 9 and 5 against -3 and 0; of the second prompt only one pair differs
    assert items_of(reward)["items"].tolist() == [[0, 4, 5], [0, 1, 0], [1, 7, 6]]
    assert items_of(torch.tensor([[2.0, 1.0]]))["items"].tolist() == [[0, 0, 1]]
    with pytest.raises(BadInput, match="all clips of each prompt have one reward"):
        items_of(torch.ones(2, 4))
    reward = torch.tensor([[1.0, 3.0], [5.0, 5.0]])
    items = items_of(reward, "nft")
    assert items["items"].tolist() == [[0, 0], [0, 1], [1, 0], [1, 1]]
    # over two standard deviations of the differences 1, 1, 0, 0: 1 / (2 sqrt .5) = .7071
    r = [0.5 - 0.35355, 0.5 + 0.35355, 0.5, 0.5]
    assert items["r"].flatten().tolist() == pytest.approx(r, abs=1e-4)
    items = items_of(
        reward, "grpo", times=torch.linspace(1, 0, 4)
    )  # three steps, two of them random
    assert items["items"].tolist() == [
        [p, clip, k] for p in (0, 1) for clip in (0, 1) for k in (0, 1)
    ]
    assert items["advantage"].tolist() == [[-1.0, 1.0], [0.0, 0.0]]


# ---------------------------------------------------------------------------------------------
# Rounds of a stub sampler


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


@pytest.fixture
def online(tiny, monkeypatch, tmp_path):
    """A function: flags -> settings and Task in rounds; and the sampler's calls as (model's state,
    x1, y). Each clip has one colour of its own."""
    calls = []

    def sample_many(model, x1, y, progress):
        calls.append((state_of(model), x1, y))
        return colours(x1)[..., None, None, None].expand_as(x1)

    monkeypatch.setattr(rounds, "sample_many", sample_many)
    (tmp_path / "out").mkdir()
    return partial(tiny, "--clips=4", "--steps=4", "--rounds=2"), calls


def colours(x1):
    return (x1.mean((2, 3, 4)) * 30).tanh()


@pytest.mark.parametrize("algo", ["dpo", "nft"])
def test_a_batch_has_clips_of_its_prompts_by_their_reward(online, algo, monkeypatch):
    make, calls = online
    scored, z_scores = [], rounds.z_scores
    monkeypatch.setattr(rounds, "z_scores", lambda *args: scored.append(args) or z_scores(*args))
    settings, task = make(f"--algo={algo}", "--label-dropout=0", "--align=1,0,0")
    batch = task.batch(1, EVERY)
    halves = [task.batch(1, slice(*rows)) for rows in ((0, 4), (4, 8))]
    for name, value in batch.items():  # a process takes its rows
        assert torch.equal(torch.cat([half[name] for half in halves]), value)
    ((_, x1, y),) = calls  # a round is sampled once
    assert torch.equal(scored[0][2], y)  # each clip is scored with its own prompt
    assert len(y) == 72 * 4 and len(y.unique(dim=0)) == 72 and wired.splits_of(y) == {"train"}
    names = ("x0_w", "x0_l") if algo == "dpo" else ("x0",)
    assert len(batch[names[0]]) == (8 if algo == "dpo" else 16)
    for i, prompt in enumerate(batch["y"]):
        own = colours(x1)[(y == prompt).all(1)]  # of the four clips of this prompt
        distance = [(own - batch[name][i, :, 0, 0, 0]).abs().amax(1) for name in names]
        assert all(d.min() < 0.005 for d in distance)
        red = [own[d.argmin(), 0] for d in distance]
        if algo == "dpo":
            assert red[0] == own[:, 0].max() and red[1] == own[:, 0].min()
        else:
            above = red[0] - own[:, 0].mean()
            assert above.abs() < 0.01 or (batch["r"][i] - 0.5) * above > 0
    logs = task.loss(batch)[1]
    clips = colours(x1)[..., None, None, None].expand_as(x1)
    assert logs["learned"] == pytest.approx(
        Brightness().normalised(clips, y).mean().item(), abs=0.01
    )
    true = world.oracle(clips, wired.attributes_of(y)).mean().item()
    assert logs["true"] == pytest.approx(true, abs=0.01)
    assert task.loss(task.batch(3, EVERY))[1]["round"] == 1


def test_times_and_dropped_prompts_follow_their_flags_and_noise_and_order_the_seed(online):
    make, calls = online
    first, shifted, of_seed_1 = (
        make("--algo=nft", *flags.split())[1].batch(0, EVERY)
        for flags in (
            "--time-shift=1 --label-dropout=0",
            "--time-shift=7 --label-dropout=1",
            "--time-shift=1 --label-dropout=0 --seed=1",
        )
    )
    assert first["y"].any() and not shifted["y"].any()
    assert torch.allclose(shifted["t"], 7 * first["t"] / (1 + 6 * first["t"]))
    assert not torch.equal(first["t"], of_seed_1["t"]) and not torch.equal(
        first["y"], of_seed_1["y"]
    )
    noise = [x1 for _, x1, _ in calls]
    assert torch.equal(noise[0], noise[1]) and not torch.equal(noise[0], noise[2])


@pytest.mark.parametrize(
    ("flags", "beta", "other"),
    [
        ("dpo --beta=7", 7.0, "constant"),
        ("dpo --reference=round --schedule=(1-t)^2", 100.0, "(1-t)^2"),
        ("nft --old-decay=0.25 --nft-beta=0.3 --kl=2", 0.3, 2.0),
    ],
)
def test_a_round_is_sampled_by_the_policy_or_its_old_model(online, monkeypatch, flags, beta, other):
    make, calls = online
    settings, task = make(*f"--algo={flags}".split(), "--freeze=0")
    nft = settings.algo == "nft"
    start = state_of(task.model)
    policies, olds, references = [], [], []
    module, name = (online_tasks, "flow_nft_step") if nft else (tasks, "flow_dpo_step")
    step = getattr(module, name)

    def watched(policy, *models, **batch):
        *old, reference = models
        policies.append(state_of(policy))
        olds.extend(map(state_of, old))
        references.append(state_of(reference))
        assert (batch["beta"], batch["kl" if nft else "schedule"]) == (beta, other)
        return step(policy, *models, **batch)

    monkeypatch.setattr(module, name, watched)
    wired.trained(settings, task)
    (first, noise, _), (second, other_noise, _) = calls
    assert same(first, start) and not same(second, start) and not torch.equal(noise, other_noise)
    share = 0.25 if nft else 0.0  # of the old model in the new one
    for key, value in second.items():
        moved = share * start[key] + (1 - share) * policies[2][key]
        assert torch.allclose(value, moved, atol=1e-6)
    assert same(references, [start, start, *[second if "round" in flags else start] * 2])
    assert same(olds, [start, start, second, second] if nft else [])


def test_rounds_can_have_a_checkpoint_for_their_reference(online, tmp_path):
    other = wired.noticeable(VideoTransformer(CONFIG), 0.1)
    path = wired.save(other, "velocity", tmp_path / "other.pt")
    settings, task = online[0]("--algo=dpo", f"--reference={path}", "--freeze=2")
    batch = task.batch(0, EVERY)
    by_hand = dpo_by_hand(load_velocity(settings.init)[0], other, batch, 100)
    assert task.loss(batch)[0].item() == pytest.approx(by_hand, rel=1e-4)
    assert abs(by_hand - math.log(2)) > 1e-3


class Broken(Brightness):
    def normalised(self, video, y):
        sixth = torch.arange(len(video))[:, None] == 6
        return super().normalised(video, y).masked_fill(sixth, torch.nan)


def test_a_reward_or_clip_that_is_not_finite_ends_the_run_with_its_name(online, monkeypatch):
    monkeypatch.setattr(online_tasks, "load_judge", lambda *_: Broken())
    with pytest.raises(BadInput, match="scores of clip 3 of 4 of prompt 'a [a-z]+ .* are not"):
        online[0]("--algo=nft")[1].batch(0, EVERY)
    monkeypatch.setattr(rounds, "sample_many", lambda _, x1, *__: x1.log())  # nan where negative
    with pytest.raises(BadInput, match="pixels of clip 1 of 4 of prompt"):
        online[0]("--algo=nft", "--seed=1")[1].batch(0, EVERY)


def test_a_round_of_another_run_is_not_resumed(online):
    make, calls = online
    for beta in (100, 7):
        make("--algo=dpo", f"--beta={beta}")[1].batch(0, EVERY)
    assert len(calls) == 2  # sampled anew
    with pytest.raises(BadInput, match=r"round\.pt: holds no round of this run"):
        make("--algo=dpo", "--beta=9")[1].batch(2, EVERY)


def test_the_room_that_a_round_takes(online):
    # two files with 72 prompts' 4 clips of 3 x 4 x 16 x 16 bytes; nft's also hold the old model
    clips = 2 * 72 * 4 * 3 * 4 * 16 * 16
    task = online[0]("--algo=nft", "--freeze=0")[1]
    assert task.extra_bytes == clips + 2 * 4 * sum(p.numel() for p in task.model.parameters())
    assert online[0]("--algo=dpo")[1].extra_bytes == clips


def test_flags_that_do_not_go_together_are_refused(tiny):
    for flags, words in {
        "dpo --rounds=3 --steps=200": "--rounds 3: --steps 200 must be a multiple of it",
        "nft --clips=1 --refresh=1": "--clips 1: clips of one prompt are compared",
        "dpo --rounds=2 --fsdp": "leave --fsdp out",
    }.items():
        with pytest.raises(BadInput, match=words):
            tiny(flags)


# ---------------------------------------------------------------------------------------------
# The command


def small_rounds(*flags, dies=None, by=signal.SIGKILL):
    """train.py in three rounds of two steps on three prompts. Instead of a closing table it saves
    its judge. dies: (name in online.rounds, call of it in which the process gets the signal)."""
    rounds.MOST_PROMPTS, refresh.OLD, refresh.STEPS, refresh.BATCH = 3, 4, 2, 4

    def alignment_table(policy, out, base, reward, *_):
        torch.save(reward.state_dict(), out / "judge.pt")
        return []

    online_tasks.alignment_table = alignment_table
    if dies:
        name, last = dies
        module = rounds if hasattr(rounds, name) else online_tasks
        function, calls = getattr(module, name), []

        def dying(*args, **settings):
            calls.append(1)
            if len(calls) == last:
                os.kill(os.getpid(), by)
            return function(*args, **settings)

        setattr(module, name, dying)
    command("--rounds=3", "--steps=6", "--batch=4", "--clips=2", "--lr=1e-3", *flags)


def finished(out):
    """The weights, the judge and the last round of a run."""
    judge = torch.load(out / "judge.pt", weights_only=True)
    last = torch.load(out / "round.pt", weights_only=True)
    return weights(out), judge, {**last, "settings": 0}


DEATHS = [
    ("draw_noise", 4, signal.SIGKILL),  # second step of the second round
    ("sample_many", 3, signal.SIGTERM),
    ("z_scores", 3, signal.SIGKILL),  # after the third round's refresh
    ("alignment_table", 1, signal.SIGKILL),
]


def test_a_killed_run_in_rounds_resumes_bit_for_bit(tmp_path):
    log, whole = tmp_path / "log", tmp_path / "whole"
    flags = ["--algo=nft", "--refresh=1", *tiny_checkpoints(tmp_path)]
    assert ended(fork(small_rounds, *flags, f"--out={whole}", output=log)) == 0, log.read_text()
    _, judge, last = finished(whole)
    reward = load_reward(whole / "reward.pt")[0]  # as the last round's refresh left it
    assert last["number"] == 2 and same(judge, reward.state_dict())
    assert not same(judge, load_reward(tmp_path / "reward.pt")[0].state_dict())
    y = last["y"].repeat_interleave(2, 0)
    scores = reward.normalised(to_video(last["clips"].flatten(0, 1)), y).unflatten(0, (3, 2))
    assert torch.allclose(last["scores"], scores, atol=1e-3)
    for i, (name, call, by) in enumerate(DEATHS):
        out = tmp_path / str(i)
        run = partial(small_rounds, *flags, f"--out={out}")
        status = ended(fork(partial(run, dies=(name, call), by=by), output=log))
        assert status == (130 if by == signal.SIGTERM else -by), log.read_text()
        assert ended(fork(run, "--resume", output=log)) == 0, log.read_text()
        assert same(finished(out), finished(whole))
    stopped = f"stopped; {tmp_path / '1' / 'last.pt'} is the last good state"
    assert stopped in log.read_text()
    (out / "last.pt").unlink()  # begun anew beside the last round
    assert ended(fork(run, output=log)) == 0, log.read_text()
    assert same(finished(out), finished(whole))


def test_two_processes_take_the_same_rounds(tmp_path):
    log, one, two = tmp_path / "log", tmp_path / "one", tmp_path / "two"
    flags = ["--algo=dpo", "--refresh=2", *tiny_checkpoints(tmp_path), "--precision=float32"]
    assert ended(fork(small_rounds, *flags, f"--out={one}", output=log)) == 0, log.read_text()
    assert together(small_rounds, [(*flags, f"--out={two}")], output=log) == [0, 0], log.read_text()
    first, second = weights(one), weights(two)
    assert max((first[name] - second[name]).abs().max().item() for name in first) < 1e-5
