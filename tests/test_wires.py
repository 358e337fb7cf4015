"""DPO, SFT and RWR as train.py makes them: which clip stands where in a batch, what each flag does
to batch and loss, and that training moves the policy towards the reward, which is brightness."""

from dataclasses import replace

import numpy as np
import pytest
import torch
import wired
from wired import BATCH, CONFIG, EVERY, Brightness, dpo_by_hand, error, find, noticeable, same_pairs

import ranking
import world
from data import INVALID, Vocabulary
from lora import LoRALinear
from model import VideoTransformer, load_velocity
from online import tasks as online_tasks
from real_data.pairs_csv import Pair, write_pairs
from runtime.cli import BadInput

tiny = wired.tiny


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
    def batch(*flags):
        return tiny(algo, "--batch=32", *flags)[1].batch(0, slice(0, 32))

    plain = batch("--time-shift=1")["t"]
    default = 1 if algo == "nrg" else 4  # of a reward that guides, and of a generator
    for shift, flags in ((7, ["--time-shift=7"]), (default, [])):
        times, expected = batch(*flags)["t"], shift * plain / (1 + (shift - 1) * plain)
        if algo == "pretrain":  # a tenth of its times lie near the noise whatever the shift is
            near = (times == plain) & (plain > 0.9)
            assert near.sum() < 12
            times, expected = times[~near], expected[~near]
        assert torch.allclose(times, expected, atol=1e-6)
    for dropout, margin in ((0, 0), (0.5, 0.25), (1, 0)) if algo != "nrg" else ():
        y = batch(f"--label-dropout={dropout}")["y"]
        assert (y[y.any(1)][:, :5] > 0).all()  # a whole prompt of five words is dropped, or none
        assert (~y.any(1)).float().mean().item() == pytest.approx(dropout, abs=margin)


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


# ---------------------------------------------------------------------------------------------
# --data and --rank labels

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
def test_alignment_ranks_all_pairs_by_their_z_scores(tiny, data, algo, capsys):
    path, clips, prompts, _ = data("pairs", 0)
    more = ["--temperature=2"] if algo == "rwr" else []
    _, task = tiny(f"--algo={algo}", f"--data={path}", "--align=1,0,-2", "--label-dropout=0", *more)
    y = Vocabulary().encode(prompts, CONFIG.max_text)
    z = torch.stack([Brightness().normalised(clips[:, side], y) for side in (0, 1)], 1)
    r = (z[..., 0] - 2 * z[..., 2]) / 3  # (24, 2)
    weights = (r / 2).exp() / (r / 2).exp().mean()
    seen = set()
    for batch in batches(task):
        assert len(batch["y"]) == BATCH * (1 if algo == "dpo" else 2)  # as many clips as DPO
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
            if algo == "sft":
                assert batch["weight"][i] == 1
    assert "the labels of --data are not used" in capsys.readouterr().out
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


A, B, SAME = 1, -1, 0


@pytest.mark.parametrize(
    ("label", "align", "reward_of_a"),
    [
        ((A, A, B), (0, 0, 1), -1),
        ((A, A, B), (0.1, 0.2, 0.3), 0),
        ((A, SAME, B), (1, 1, -1), 2 / 3),
        ((INVALID, A, SAME), (1, 1, 1), 1 / 3),  # an invalid dimension adds nothing
        ((A, INVALID, SAME), (0, 1, 0), None),
    ],
)
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


def test_regression_weights_every_clip_that_people_labelled(tiny, data, tmp_path, capsys):
    path, clips, _, labels = data("pairs", 0)
    _, task = tiny("--algo=rwr", "--rank=labels", f"--data={path}", "--align=1,0,0")
    assert "not used" not in capsys.readouterr().out
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
