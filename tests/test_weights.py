"""The shipped weights do what weights/README.md says; bounds leave room for small samples."""

import subprocess

import pytest
import torch

import train
import world
from data import Vocabulary
from judge import prompt_set, sample_prompts, win_rate
from model import load_velocity
from nrg import SteeredPolicy, load_noisy_reward
from real_data.toy_pairs import annotated_pairs
from reward import accuracies_without_ties, load_reward
from runtime import checkpoint
from sample import CFG, NRG_EPS, NRG_INTERVAL, NRG_SCALE

WEIGHTS = checkpoint.WEIGHTS


@pytest.fixture(scope="module")
def base():
    """The base model, its words, 32 prompts, and their clips at CFG 1."""
    model, words = load_velocity(WEIGHTS / "base.pt")
    prompts = prompt_set(96, "train", "validation", "hard")[::3]
    return model, words, prompts, sample_prompts(model, words, prompts, seed=7)


def test_together_they_are_small():
    assert sum(path.stat().st_size for path in WEIGHTS.glob("*.pt")) < 12.5e6
    for name in ("base.pt", "reward.pt", "nrg.pt"):
        state = checkpoint.load_checkpoint(WEIGHTS / name)
        assert all(value.dtype == torch.float16 for value in state["model"].values())


def test_base_follows_its_prompts_and_leaves_something_to_align(base):
    model, words, prompts, plain = base
    with_cfg = sample_prompts(model, words, prompts, seed=7, cfg=CFG)
    # by chance: 1/6, 1/4, 1/4
    for videos, least in ((with_cfg, (0.95, 0.9, 0.95)), (plain, (0.75, 0.6, 0.75))):
        right = (world.attributes_right(videos, prompts) > 0.5).float().mean(0)
        assert (right > torch.tensor(least)).all(), right
    clean = torch.tensor([0.99, 0.94, 1.0])  # tests/test_world.py: clean clips score about 1
    assert (world.oracle(plain, prompts).mean(0) < clean - 0.1).all()


def test_reward_ranks_pairs_of_prompts_it_never_saw():
    model, words = load_reward(WEIGHTS / "reward.pt")
    pairs = annotated_pairs(200, ["validation", "hard"], 99, model.config, Vocabulary(words))
    with torch.no_grad():
        a, b = (model.normalised(video, pairs.y) for video in pairs.sides(torch.arange(200)))
    accuracies = accuracies_without_ties(a - b, pairs.label)
    assert all(value >= 0.93 for value in accuracies.values())
    # z-scores over the generators' clips
    both = torch.cat((a, b))
    assert both.mean(0).abs().max() < 0.3 and (both.std(0) - 1).abs().max() < 0.3


def test_noise_aware_reward_steers_the_base_model(base):
    model, words, prompts, videos = base
    plain = world.oracle(videos, prompts)
    reward, reward_words = load_noisy_reward(WEIGHTS / "nrg.pt")
    steered = SteeredPolicy(model, reward, (1.0, 1.0, 1.0), NRG_SCALE, NRG_EPS, NRG_INTERVAL)
    assert words == reward_words and steered.shared == 2
    guided = world.oracle(sample_prompts(steered, words, prompts, seed=7), prompts)
    wins = win_rate(guided, plain)
    assert wins[0] > 0.75 and wins[1] > 0.6  # .9 and .75 on more prompts
    assert (guided.mean(0) > plain.mean(0)).all()


def test_an_exported_file_says_where_it_comes_from(tmp_path, monkeypatch):
    flags = "--algo=pretrain --steps=1 --batch=1 --seed=5 --eval-prompts=1 --device=cpu".split()
    flags += [f"--out={tmp_path / 'run'}", f"--export={tmp_path / 'base.pt'}"]
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    train.main()
    state = checkpoint.load_checkpoint(tmp_path / "base.pt")
    expected = {"algo": "pretrain", "steps": "1", "seed": "5", "lr": "0.0025", "decay": "0.4"}
    assert expected.items() <= state["settings"].items() and "optimizer" not in state
    git = ["git", "-C", str(WEIGHTS.parent), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True).stdout.strip()
    assert state["commit"].rstrip("+") == commit  # "" outside a repository
