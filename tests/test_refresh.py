"""New labels for VideoReward: which pairs are labelled, what it learns, answers of people."""

import csv
from argparse import Namespace
from functools import partial
from itertools import combinations

import imageio.v3 as iio
import numpy as np
import pytest
import torch
import wired
from forked import ended, fork, same, tiny_checkpoints
from test_online import small_rounds, state_of
from wired import CONFIG, CPU

import world
from data import Vocabulary
from online import refresh
from real_data import export_toy
from real_data.pairs_csv import read_pairs
from real_data.video import to_bytes, to_video
from reward import RewardConfig, VideoReward
from runtime.cli import BadInput

TRAIN = world.split_prompts("train")


def test_labelled_pairs_are_different_and_at_most_all():
    every = {(prompt, *pair) for prompt in range(18) for pair in combinations(range(4), 2)}
    for count, found in ((256, 108), (20, 20)):  # six pairs of four clips, of each of 18 prompts
        drawn = refresh.draw_pairs(18, 4, count, torch.Generator().manual_seed(0)).tolist()
        unordered = {(prompt, *sorted(pair)) for prompt, *pair in drawn}
        assert len(drawn) == len(unordered) == found and unordered <= every
        assert 0.2 < sum(a < b for _, a, b in drawn) / found < 0.8  # either clip comes first


def test_new_labels_are_the_annotators_of_pairs_of_the_rounds_own_clips(monkeypatch, tmp_path):
    for name, value in {"OLD": 40, "MOST": 40, "STEPS": 3, "BATCH": 8}.items():
        monkeypatch.setattr(refresh, name, value)
    torch.manual_seed(0)
    config = RewardConfig(frames=4, size=16, dim=24, depth=2, heads=2, vocab=CONFIG.vocab)
    judge = wired.noticeable(VideoReward(config)).eval()
    batches, seeds, step, annotate = [], [], refresh.reward_step, refresh.annotate_pairs
    monkeypatch.setattr(refresh, "reward_step", lambda *a, **b: batches.append(b) or step(*a, **b))
    monkeypatch.setattr(refresh, "annotate_pairs", lambda *a: seeds.append(a[2]) or annotate(*a))

    settings = Namespace(refresh=2, refresh_pairs=24, data=None, seed=0, caption=0.7)
    settings.ask, settings.resume, settings.out = False, False, tmp_path
    prompts = TRAIN[:4]
    y = Vocabulary().encode_attributes(prompts, 8)
    rng = torch.Generator().manual_seed(0)
    drawn = world.draw_clips(prompts.repeat_interleave(6, 0), torch.arange(24) % 12, rng, 4)
    clips = to_bytes(world.render(drawn, 16)).unflatten(0, (4, 6))
    state = {"prompts": list(map(world.prompt_text, prompts)), "y": y, "clips": clips}
    run, before = refresh.Refresh(settings, judge, Vocabulary(), CPU), state_of(judge)
    for number in (0, 1):  # not due
        run(state | {"number": number})
    assert run.labelled is None and same(judge.state_dict(), before)
    run(state | {"number": 2})
    new = run.labelled
    assert len(new["y"]) == 24
    for pair_y, pair, label in zip(new["y"], new["clips"], new["label"]):
        (prompt,) = torch.nonzero((y == pair_y).all(1))[0]
        a, b = ((clips[prompt] == clip).flatten(1).all(1).nonzero().item() for clip in pair)
        truth = world.oracle(to_video(pair), prompts[prompt].expand(2, 3))
        gap = (truth[0] - truth[1]) / world.TRUE_STD
        clear = gap.abs() > 1.5  # five times the annotators' error
        assert a != b and torch.equal(label[clear], gap[clear].sign().long())
    old_clips = torch.stack(run.old.sides(torch.arange(40)), 1)
    old = run.old.y, run.old.label, old_clips
    assert wired.splits_of(run.old.y) == {"train"} and len(batches) == 3
    for batch in batches:  # half new, half old, each pair with its own prompt and label
        assert batch["caption"] == 0.7 and batch["weight"].mean() == pytest.approx(1.0)
        for i in range(8):
            pool = (new["y"], new["label"], to_video(new["clips"])) if i < 4 else old
            pair = torch.stack((batch["video_a"][i], batch["video_b"][i]))
            (place,) = torch.nonzero((pool[2] == pair).flatten(1).all(1))[0]
            assert torch.equal(pool[0][place], batch["y"][i])
            assert torch.equal(pool[1][place], batch["label"][i])
    assert not torch.equal(batches[0]["video_a"], batches[1]["video_a"])
    assert not same(judge.state_dict(), before)
    assert not any(p.requires_grad for p in judge.parameters())
    z = torch.cat([judge.normalised(side, run.old.y) for side in old_clips.unbind(1)])
    assert torch.allclose(z.mean(0), torch.zeros(3), atol=1e-3)
    assert torch.allclose(z.std(0), torch.ones(3), atol=1e-2)
    run(state | {"number": 4})  # of 24 and 24 labelled pairs the newest 40 stay
    assert same([value[:16] for value in run.labelled.values()], [v[8:] for v in new.values()])
    assert not same(run.labelled["clips"][16:], new["clips"])  # another round has other pairs
    assert len(set(seeds)) == len(seeds) == 2  # each round has annotators of its own
    latents = Namespace(config=Namespace(channels=16))
    with pytest.raises(BadInput, match="people cannot look at latents"):
        refresh.Refresh(settings, latents, Vocabulary(), CPU)


def test_labels_of_people_on_exported_clips_are_read(tmp_path):
    toy, out, log = tmp_path / "toy", tmp_path / "out", tmp_path / "log"
    export_toy.export(export_toy.arguments([str(toy), "--pairs=6", "--generated=0"]))
    data = toy / "train.csv"
    data.write_text(data.read_text().replace(",a ", ",A ").replace(" moving", "! MOVING"))
    flags = ["--algo=dpo", "--refresh=2", "--refresh-pairs=3", f"--data={data}", f"--out={out}"]
    flags += [f"--cache={tmp_path / 'cache'}", *tiny_checkpoints(tmp_path)]
    assert ended(fork(small_rounds, *flags, output=log)) == 130, log.read_text()
    file = out / "labels-2" / "pairs.csv"
    assert f"wrote {file} and its videos" in log.read_text()
    with open(file, newline="") as text:
        rows = list(csv.DictReader(text))
    prompts = {row.prompt for row in read_pairs(data)}  # as they were written
    assert len(rows) == 3 and {row["prompt"] for row in rows} <= prompts
    assert all(row["prompt"].startswith("A ") and "! MOVING " in row["prompt"] for row in rows)
    assert {row[name] for row in rows for name in ("VQ", "MQ", "TA")} == {""}

    def resumed(changed):
        with open(file, "w", newline="") as text:
            writer = csv.DictWriter(text, rows[0])
            writer.writeheader()
            writer.writerows(changed)
        log.unlink()
        never = ("sample_many", 1)  # the round is not sampled again
        return ended(fork(partial(small_rounds, *flags, "--resume", dies=never), output=log))

    labels = [dict(row, VQ="a", MQ="B", TA="Tie") for row in rows]
    turned = dict(labels[2], path_A=rows[2]["path_B"], path_B=rows[2]["path_A"])
    assert resumed([dict(labels[0], path_B="gone.mp4"), dict(labels[1], MQ="C"), turned]) == 2
    lines = [line for line in log.read_text().splitlines() if str(file) in line]
    assert [line.rpartition(f"{file}, ")[2] for line in lines] == [
        f"line 2, column path_B: no video 'gone.mp4' in {file.parent}",
        "line 3, column MQ: unknown label 'C'; known: A, B, same, tie, invalid",
        "line 4, column path_A: 0002_B.mp4 and 0002_A.mp4 are no pair of this round",
    ]
    assert resumed(labels[1:]) == 0, log.read_text()
    labelled = torch.load(out / "round.pt", weights_only=True)["labelled"]
    assert labelled["label"].tolist() == [[1, -1, 0]] * 2
    for row, pair in zip(rows[1:], labelled["clips"]):
        for name, clip in zip(("path_A", "path_B"), pair):  # written 4 times as large
            video = iio.imread(file.parent / row[name])[:, ::4, ::4].astype(float)
            assert np.abs(clip.permute(1, 2, 3, 0).numpy() - video).mean() < 6
    (out / "last.pt").unlink()  # begun anew, the labels are about other clips
    assert ended(fork(small_rounds, *flags, output=log)) == 2
    assert f"{file.parent}: belongs to another run" in log.read_text()
