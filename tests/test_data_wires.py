"""--data through train.py's own tasks: which clips, prompts and labels each algorithm takes."""

import csv

import numpy as np
import pytest
import torch
import wired
from wired import CONFIG, Brightness, find

import world
from data import Vocabulary
from online import tasks as online_tasks
from real_data.pairs_csv import COLUMNS

tiny = wired.tiny
PROMPTS = [world.prompt_text(row) for row in world.split_prompts("train")[::6]]  # twelve


@pytest.fixture
def data(tmp_path):
    """A function: (name, seed, prompts) -> a CSV of 24 pairs of latents, two of each prompt, their
    clips (24, 2, C, T, H, W), prompts and labels (24, 3)."""

    def write(name, seed, prompts=PROMPTS):
        rng = np.random.default_rng(seed)
        clips = 0.1 * rng.standard_normal((24, 2, *CONFIG.video_shape), np.float32)
        clips += rng.standard_normal((24, 2, 3, 1, 1, 1), np.float32)
        labels, prompts = rng.integers(-1, 2, (24, 3)), prompts * 2
        np.save(tmp_path / f"{name}.npy", clips.reshape(48, *CONFIG.video_shape))
        with open(tmp_path / f"{name}.csv", "w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            for i, (prompt, label) in enumerate(zip(prompts, labels)):
                paths = [f"{name}.npy:{2 * i + side}" for side in (0, 1)]
                cells = [("same", "A", "B")[value] for value in label]
                writer.writerow([*paths, prompt, *cells, 2, 4, 2, 4])
        return tmp_path / f"{name}.csv", torch.from_numpy(clips), prompts, torch.from_numpy(labels)

    return write


def batches(task, count=9):
    return [task.batch(step, slice(0, wired.BATCH)) for step in range(count)]


def test_rounds_sample_every_prompt(tiny, data, monkeypatch):
    monkeypatch.setattr(online_tasks, "load_judge", lambda *args: Brightness())
    flags = ["--steps=4", "--rounds=2", "--clips=2", "--label-dropout=0"]
    _, task = tiny("--algo=nft", f"--data={data('pairs', 0)[0]}", *flags)
    vocabulary = Vocabulary(task.words)
    # a round has 24 clips, and its two steps take 16 each
    seen = torch.cat([task.batch(step, slice(0, wired.BATCH))["y"] for step in (0, 1)])
    assert {vocabulary.decode(y) for y in seen} == set(PROMPTS)


def test_pretraining_takes_every_clip_with_its_own_prompt(tiny, data):
    mixed = [*PROMPTS[:6], *(f"{prompt} slowly" for prompt in PROMPTS[6:])]  # of 5 and 6 words
    path, clips, prompts, _ = data("pairs", 0, mixed)
    _, task = tiny("--algo=pretrain", f"--data={path}", "--label-dropout=0")
    vocabulary, places = Vocabulary(task.words), []
    for batch in batches(task, 6):  # 48 clips
        for clip, y in zip(batch["x0"], batch["y"]):
            places.append(tuple(find(clip, clips)))
            assert vocabulary.decode(y) == prompts[places[-1][0]]
    assert len(set(places)) == 48


@pytest.mark.parametrize("algo", ["dpo", "sft", "rwr"])
def test_alignment_ranks_all_pairs_by_their_z_scores(tiny, data, algo):
    path, clips, prompts, _ = data("pairs", 0)
    _, task = tiny(f"--algo={algo}", f"--data={path}", "--align=1,0,-2", "--label-dropout=0")
    y = Vocabulary().encode(prompts, CONFIG.max_text)
    z = torch.stack([Brightness().normalised(clips[:, side], y) for side in (0, 1)], 1)
    r = (z[..., 0] - 2 * z[..., 2]) / 3  # (24, 2)
    weights = r.exp() / r.exp().mean()
    seen = set()
    for batch in batches(task):
        for i, prompt in enumerate(batch["y"]):
            pair, side = find(batch["x0_w" if algo == "dpo" else "x0"][i], clips)
            seen.add(pair)
            assert torch.equal(prompt, y[pair])
            if algo == "rwr":
                weight = weights[pair, side].item()
                assert batch["weight"][i].item() == pytest.approx(weight, rel=1e-3)
            else:
                assert r[pair, side] > r[pair, 1 - side]
            if algo == "dpo":
                assert find(batch["x0_l"][i], clips) == [pair, 1 - side]
    assert seen == set(range(24))  # nothing is held out of what needs no labels


@pytest.mark.parametrize("flags", [["--algo=reward"], ["--algo=nrg", "--target=labels"]])
def test_prompts_held_out_are_judged_by_and_not_learned(tiny, data, flags):
    path, clips, prompts, labels = data("pairs", 0)
    other, other_clips, _, other_labels = data("other", 1)
    a, b = ("video_a", "video_b") if flags == ["--algo=reward"] else ("x0_a", "x0_b")
    held_out = set()
    for seed, more in ((0, []), (1, []), (2, []), (3, [f"--val={other}"])):
        _, task = tiny(*flags, f"--data={path}", f"--seed={seed}", *more)
        vocabulary, learned = Vocabulary(task.words), set()
        for batch in batches(task, 6):
            for i, y in enumerate(batch["y"]):
                pair, side = find(batch[a][i], clips)
                assert side == 0 and find(batch[b][i], clips) == [pair, 1]
                assert torch.equal(batch["label"][i], labels[pair])
                assert vocabulary.decode(y) == prompts[pair]
                learned.add(prompts[pair])
        (held,) = task.held.values()
        judged = {vocabulary.decode(y) for y in held.y}
        source, source_labels = (other_clips, other_labels) if more else (clips, labels)
        places = [find(clip, source)[0] for clip in held.sides(torch.arange(len(held)))[0]]
        assert torch.equal(held.label, source_labels[places])
        if more:
            assert learned == judged == set(PROMPTS) and len(held) == 24
        else:  # a tenth of twelve prompts, both of its pairs
            assert len(judged) == 1 and len(held) == 2 and learned == set(PROMPTS) - judged
            held_out |= judged
    assert len(held_out) > 1
