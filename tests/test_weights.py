"""The shipped weights do what weights/README.md says of them (bounds leave room for the smaller samples here)."""

import pytest
import torch

import common
import world
from compare import prompt_set, sample_prompts
from data import Vocabulary, annotated_pairs
from model import load_velocity
from reward import accuracy_without_ties, load_reward
from sample import CFG


def test_together_they_are_small():
    assert sum(path.stat().st_size for path in common.WEIGHTS.glob("*.pt")) < 8e6
    for name in ("base.pt", "reward.pt"):
        state = common.load_checkpoint(common.WEIGHTS / name)
        assert all(value.dtype == torch.float16 for value in state["model"].values())


def test_base_follows_its_prompts_and_leaves_something_to_align():
    model, words = load_velocity(common.WEIGHTS / "base.pt")
    prompts = prompt_set(96, "train", "validation", "hard")[::2]
    videos = sample_prompts(model, words, prompts, seed=7, cfg=CFG)
    colour, shape, direction = (world.attributes_right(videos, prompts) > 0.5).float().mean(0).tolist()
    assert colour > 0.9 and direction > 0.85 and shape > 0.35  # chance: 1/6, 1/4, 1/4
    clean = torch.tensor([0.97, 0.99, 1.0])  # tests/test_world.py: clean clips score about 1
    assert (world.oracle(videos, prompts).mean(0) < clean - 0.1).all()


@pytest.mark.parametrize("split", ["validation", "hard"])
def test_reward_ranks_pairs_of_prompts_it_never_saw(split):
    model, words = load_reward(common.WEIGHTS / "reward.pt")
    pairs = annotated_pairs(200, [split], 99, model.config, Vocabulary(words))
    batch = pairs.batch(torch.arange(200))
    with torch.no_grad():
        a, b = (model.normalised(batch[name], batch["y"]) for name in ("video_a", "video_b"))
    for i, least in enumerate((0.95, 0.93, 0.95)):
        assert accuracy_without_ties((a - b)[:, i], pairs.label[:, i]) >= least
    # z-scores over the generators' clips
    both = torch.cat((a, b))
    assert both.mean(0).abs().max() < 0.3 and (both.std(0) - 1).abs().max() < 0.3
