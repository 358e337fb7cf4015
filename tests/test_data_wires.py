"""--data and --rank labels through train.py's own tasks: which clips, prompts and labels each
algorithm takes."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import wired
from wired import CONFIG, EVERY, Brightness, find

import ranking
import world
from data import INVALID, Vocabulary
from online import tasks as online_tasks
from real_data.pairs_csv import Pair, read_pairs, write_pairs
from runtime.cli import BadInput

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
        rows = []
        for i, (prompt, label) in enumerate(zip(prompts, labels.tolist())):
            paths = f"{name}.npy:{2 * i}", f"{name}.npy:{2 * i + 1}"
            rows.append(Pair(*paths, prompt, tuple(label), 2, 4, 2, 4))
        write_pairs(rows, tmp_path / f"{name}.csv")
        return tmp_path / f"{name}.csv", torch.from_numpy(clips), prompts, torch.from_numpy(labels)

    return write


def batches(task, count=9):
    return [task.batch(step, EVERY) for step in range(count)]


def test_rounds_sample_every_prompt(tiny, data, monkeypatch):
    monkeypatch.setattr(online_tasks, "load_judge", lambda *args: Brightness())
    flags = ["--steps=4", "--rounds=2", "--clips=2", "--label-dropout=0"]
    _, task = tiny("--algo=nft", f"--data={data('pairs', 0)[0]}", *flags)
    vocabulary = Vocabulary(task.words)
    # a round has 24 clips, and its two steps take 16 each
    seen = torch.cat([batch["y"] for batch in batches(task, 2)])
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


# ---------------------------------------------------------------------------------------------
# --rank labels

A, B, SAME = 1, -1, 0
LABELS = [  # label, --align, reward of A
    ((A, A, B), (1, 1, 1), 1 / 3),
    ((A, A, B), (0, 0, 1), -1),
    ((A, A, B), (0.1, 0.2, 0.3), 0),
    ((A, SAME, B), (1, 1, -1), 2 / 3),
    ((INVALID, A, SAME), (1, 1, 1), 1 / 3),  # an invalid dimension adds nothing
    ((A, INVALID, SAME), (0, 1, 0), None),
    ((INVALID, INVALID, INVALID), (1, 1, 1), None),
]


@pytest.mark.parametrize(("label", "align", "reward_of_a"), LABELS)
def test_the_winner_of_a_pair_by_hand(label, align, reward_of_a):
    r = ranking.label_rewards(torch.tensor([label]), torch.zeros(1, 2, 3), align)
    if reward_of_a:
        assert torch.allclose(r, torch.tensor([[1.0, -1.0]]) * reward_of_a)
        pair, side = ranking.winners(r)
        assert pair.tolist() == [0] and side.tolist() == [0 if reward_of_a > 0 else 1]
    else:  # a tie or nothing: no pair
        assert r.isnan().all() if reward_of_a is None else (r == 0).all()
        with pytest.raises(BadInput, match="no pair has a better clip"):
            ranking.winners(r)


def test_ratings_stand_in_for_labels_where_there_are_any():
    """VQ ratings 1, 5, 1, 5, 1, 5 have mean 3 and spread 2; the last two pairs have none."""
    label = torch.tensor([[B, A, A], [A, A, A], [INVALID, A, A], [A, B, A], [INVALID, A, A]])
    mos = torch.zeros(5, 2, 3)
    mos[:3, :, 0] = torch.tensor([1.0, 5.0])
    r = ranking.label_rewards(label, mos, (2, 0, 0), ratings=True)
    assert torch.allclose(r[:4], torch.tensor([[-1.0, 1.0]] * 3 + [[1.0, -1.0]]))
    assert r[4].isnan().all()


def test_labels_rank_the_toys_clips_that_the_reward_would(tiny, monkeypatch):
    monkeypatch.setattr(ranking, "load_judge", None)  # no reward model is loaded
    settings, _ = tiny("--algo=sft", "--rank=labels", "--align=0,1,0")
    pairs, r, _ = ranking.ranked_clips(settings, CONFIG, Vocabulary().words, wired.CPU)
    y, clips, _ = wired.same_pairs(settings)
    assert torch.equal(pairs.y, y)
    assert torch.equal(torch.stack(pairs.sides(torch.arange(len(y))), 1), clips)
    assert torch.equal(r[:, 0] - r[:, 1], 2.0 * pairs.label[:, 1])


def test_labels_turned_round_turn_the_run_round(tiny, data, capsys):
    path = data("pairs", 0)[0]
    turned = path.with_name("turned.csv")
    rows = [replace(row, label=tuple(-value for value in row.label)) for row in read_pairs(path)]
    write_pairs(rows, turned)

    def first_batches(rank):
        flags = ["--algo=dpo", f"--rank={rank}", "--align=1,0.9,0.8"]
        return [tiny(*flags, f"--data={csv}")[1].batch(0, EVERY) for csv in (path, turned)]

    honest, other = first_batches("labels")
    assert torch.equal(honest["x0_w"], other["x0_l"]) and torch.equal(honest["x0_l"], other["x0_w"])
    assert not torch.equal(honest["x0_w"], other["x0_w"])
    assert "not used" not in capsys.readouterr().out
    honest, other = first_batches("reward")
    assert torch.equal(honest["x0_w"], other["x0_w"])
    assert "the labels of --data are not used" in capsys.readouterr().out


def test_regression_weights_every_clip_that_people_labelled(tiny, data, tmp_path):
    path, clips, _, labels = data("pairs", 0)
    _, task = tiny("--algo=rwr", "--rank=labels", f"--data={path}", "--align=1,0,0")
    r = torch.stack((labels[:, 0], -labels[:, 0]), 1)  # 0 for both clips of a tie
    weights = r.double().exp() / r.double().exp().mean()
    places = set()
    for batch in batches(task, 3):  # 48 clips are all there are
        for clip, weight in zip(batch["x0"], batch["weight"].tolist()):
            place = tuple(find(clip, clips))
            assert weight == pytest.approx(weights[place].item(), rel=1e-5)
            places.add(place)
    assert len(places) == 48
    lines = task.evaluate(task.model, tmp_path)
    assert len(lines) == 1 and "no closing table" in lines[0] and "--reward" in lines[0]
