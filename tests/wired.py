"""A world small enough for seconds: a tiny policy, a VideoReward whose scores are known, and what a training draws.

Fixtures for the tests that take them from here: `tiny` makes a training as the command does, from flags, and `drawn`
keeps the clips that the toy world hands out meanwhile.
"""

from dataclasses import asdict

import pytest
import torch
from forked import with_read

import model
import tasks
import train
import trainer
import world
from data import TOY_WORDS, Vocabulary
from real_data.toy_pairs import toy_pairs
from runtime.checkpoint import save_checkpoint
from settings import settings_of

CPU = torch.device("cpu")
CONFIG = model.ModelConfig(frames=4, size=16, dim=32, depth=3, heads=2, vocab=len(TOY_WORDS))
BATCH, PAIRS = 8, 12
SHORT = [
    f"--batch={BATCH}",
    f"--pairs={PAIRS}",
    "--steps=4",
    "--eval-prompts=2",
    "--eval-pairs=8",
    "--lr=0.003",
]
SHORT += ["--generated=0"]  # pairs of the world's clips alone


class Brightness(torch.nn.Module):
    """A VideoReward that is known: VQ, MQ and TA are a clip's mean red, green and blue; TA also counts its words."""

    config = CONFIG

    def forward(self, video, y):  # raw scores, whose units and zeros say nothing
        return self.normalised(video, y) * torch.tensor([-3.0, 50.0, 0.1]) + 7

    def normalised(self, video, y):
        words = torch.tensor([0.0, 0.0, 0.02]) * y.sum(1, keepdim=True)
        return 10 * video.mean((2, 3, 4)) + words


def noticeable(network, size=0.05):
    """Moves all that is trained, so that no gate stays closed and a policy differs from its start."""
    rng = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for value in network.parameters():
            if value.requires_grad:
                value += size * torch.randn(value.shape, generator=rng)
    return network


def save(network, kind, path):
    facts = {
        "kind": kind,
        "config": asdict(network.config),
        "vocabulary": list(TOY_WORDS),
        "step": 0,
    }
    save_checkpoint(path, {**facts, "model": network.state_dict()})
    return path


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A function: flags of train.py -> its args and its Task, on a tiny base model and with Brightness for a judge."""
    torch.manual_seed(1)
    save(noticeable(model.VideoTransformer(CONFIG)), "velocity", tmp_path / "base.pt")
    monkeypatch.setitem(model.PRESETS, "nano", CONFIG)
    monkeypatch.setattr(tasks, "load_judge", lambda path, config, words: Brightness())
    tasks.scored_toy_pairs.cache_clear()

    found = {}

    def watch(name, what):
        """Keeps the last result of a function of tasks.py for the tests to look at."""
        honest = getattr(tasks, name)

        def watched(*args, **kwargs):
            result = honest(*args, **kwargs)
            found.update(what(result))
            return result

        monkeypatch.setattr(tasks, name, watched)

    watch("held_pairs", lambda held: {"held": held})
    watch("disk_data", lambda data: {"pairs": data[2], "held": data[3]})
    watch("ranked_clips", lambda clips: {"pairs": clips[0]})
    watch("base_and_policy", lambda models: {"base": models[0]})

    def task(*flags):
        where = [
            f"--init={tmp_path / 'base.pt'}",
            f"--out={tmp_path / 'out'}",
            "--device=cpu",
            "--precision=float32",
        ]
        args = settings_of(with_read(flags, *SHORT, *where))
        args.init = tmp_path / "base.pt"
        found.clear()
        task = train.task_of(args, CPU)
        vars(task).update(found)
        return args, task

    yield task
    tasks.scored_toy_pairs.cache_clear()


@pytest.fixture
def drawn(monkeypatch):
    """Lists of all clips that the world draws from here on: what they were asked for and what they show."""
    kept, honest = [], world.draw_clips

    def watched(*args, **settings):
        kept.append(honest(*args, **settings))
        return kept[-1]

    monkeypatch.setattr(world, "draw_clips", watched)
    tasks.scored_toy_pairs.cache_clear()
    yield kept
    tasks.scored_toy_pairs.cache_clear()


def split_of(attributes):
    """ "train", "validation" or "hard" by README's rule: of each colour and shape one direction is unseen."""
    colour, shape, direction = map(int, attributes)
    if (colour + shape + direction) % 4:
        return "train"
    return "validation" if (colour + shape // 2) % 2 else "hard"


def splits_of(prompts):
    """The splits of attributes (N, 3) or of ids (N, S), dropped prompts aside, as a set."""
    if prompts.shape[1] != 3:
        texts = [Vocabulary().decode(row) for row in prompts if row.any()]
        prompts = world.prompt_attributes(texts)
    return {split_of(row) for row in prompts.tolist()}


def same_pairs(args):
    """The pairs of a training made once more: y (N, S), clips (N, 2, C, T, H, W) and their Brightness (N, 2, 3)."""
    pairs, _ = toy_pairs(args.pairs, ["train"], args.seed, CONFIG, Vocabulary())
    clips = torch.stack(pairs.sides(torch.arange(args.pairs)), 1)
    judge = Brightness()
    return (
        pairs.y,
        clips,
        torch.stack([judge.normalised(clips[:, side], pairs.y) for side in (0, 1)], 1),
    )


def find(clip, clips):
    """(pair, side) of a clip among clips (N, 2, C, T, H, W)."""
    (place,) = torch.nonzero((clips == clip).flatten(2).all(2)).tolist()
    return place


def trained(args, task):
    """The model after trainer.fit, in eval mode; without a closing table."""
    task.evaluate = lambda final, out: []
    trainer.fit(task, args, CPU)
    return task.model.eval()


@torch.no_grad()
def brightness(policy):
    """Mean of what a policy paints from pure noise, x0_hat at t = 1, over sixteen training prompts."""
    x1 = torch.randn(16, *CONFIG.video_shape, generator=torch.Generator().manual_seed(5))
    y = Vocabulary().encode_attributes(world.split_prompts("train")[:16], CONFIG.max_text)
    return (x1 - policy(x1, torch.ones(16), y)).mean().item()
