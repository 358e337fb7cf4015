"""A tiny policy, a VideoReward whose scores are known, and the clips that the toy world draws.

Test modules import the fixtures: `tiny` makes a training from flags, as the command does; `drawn`
records the clips that the toy world draws.
"""

from dataclasses import asdict

import pytest
import torch
import torch.nn.functional as F
from forked import with_read

import model
import ranking
import tasks
import train
import trainer
import world
from data import TOY_WORDS, Vocabulary
from online import tasks as online_tasks
from real_data.toy_pairs import toy_pairs
from runtime.checkpoint import save_checkpoint
from settings import settings_of

CPU = torch.device("cpu")
CONFIG = model.ModelConfig(frames=4, size=16, dim=32, depth=3, heads=2, vocab=len(TOY_WORDS))
BATCH, PAIRS = 8, 12
EVERY = slice(0, BATCH)
SHORT = f"--batch={BATCH} --pairs={PAIRS} --steps=4 --eval-prompts=2 --eval-pairs=8 --lr=0.003"
SHORT += " --generated=0 --device=cpu --precision=float32"


class Brightness(torch.nn.Module):
    """VQ, MQ and TA are a clip's mean red, green and blue; TA also depends on the prompt."""

    config = CONFIG

    def forward(self, video, y):  # raw scores: another zero and another unit
        return self.normalised(video, y) * torch.tensor([-3.0, 50.0, 0.1]) + 7

    def normalised(self, video, y):
        words = torch.tensor([0.0, 0.0, 0.02]) * y.sum(1, keepdim=True)
        return 10 * video.mean((2, 3, 4)) + words


def noticeable(network, size=0.05):
    """Moves all trained weights: no gate stays closed, and a policy differs from its start."""
    rng = torch.Generator().manual_seed(11)
    with torch.no_grad():
        for value in network.parameters():
            if value.requires_grad:
                value += size * torch.randn(value.shape, generator=rng)
    return network


def save(network, kind, path):
    facts = {"kind": kind, "config": asdict(network.config), "vocabulary": list(TOY_WORDS)}
    save_checkpoint(path, {**facts, "step": 0, "model": network.state_dict()})
    return path


@pytest.fixture
def tiny(tmp_path, monkeypatch):
    """A function: an algorithm and flags -> settings and Task, on a tiny base model and Brightness.

    The Task also has the base model, its pairs and the pairs held out, where it has any."""
    torch.manual_seed(1)
    base = save(noticeable(model.VideoTransformer(CONFIG)), "velocity", tmp_path / "base.pt")
    monkeypatch.setitem(model.PRESETS, "nano", CONFIG)
    for module in (tasks, ranking, online_tasks):
        monkeypatch.setattr(module, "load_judge", lambda path, config, words: Brightness())
    ranking.scored_toy_pairs.cache_clear()
    found = {}

    def watch(name, facts):
        function = getattr(tasks, name)

        def watched(*args, **kwargs):
            result = function(*args, **kwargs)
            found.update(facts(result))
            return result

        monkeypatch.setattr(tasks, name, watched)

    watch("held_pairs", lambda held: {"held": held})
    watch("disk_data", lambda data: {"pairs": data[2], "held": data[3]})
    watch("ranked_clips", lambda clips: {"pairs": clips[0]})
    watch("base_and_policy", lambda models: {"base": models[0]})

    def task(*flags):
        flags = [f if f.startswith("-") else f"--algo={f}" for f in " ".join(flags).split()]
        short = [*SHORT.split(), f"--init={base}", f"--out={tmp_path / 'out'}"]
        settings = settings_of(with_read(flags, *short))
        settings.init = base
        found.clear()
        task = train.task_of(settings, CPU)
        vars(task).update(found)
        return settings, task

    yield task
    ranking.scored_toy_pairs.cache_clear()


@pytest.fixture
def drawn(monkeypatch):
    """A list of all clips that the world draws: what was asked for and what they show."""
    clips, draw_clips = [], world.draw_clips

    def watched(*args, **settings):
        clips.append(draw_clips(*args, **settings))
        return clips[-1]

    monkeypatch.setattr(world, "draw_clips", watched)
    ranking.scored_toy_pairs.cache_clear()
    yield clips
    ranking.scored_toy_pairs.cache_clear()


def split_of(attributes):
    """The split by README's rule: of each colour and shape, one direction is not trained on."""
    colour, shape, direction = map(int, attributes)
    if (colour + shape + direction) % 4:
        return "train"
    return "validation" if (colour + shape // 2) % 2 else "hard"


def splits_of(prompts):
    """The set of splits of attributes (N, 3) or of ids (N, S); dropped prompts are left out."""
    if prompts.shape[1] != 3:
        prompts = attributes_of(prompts[prompts.any(1)])
    return {split_of(row) for row in prompts.tolist()}


def attributes_of(y):
    """Attributes (N, 3) of ids (N, S)."""
    return world.prompt_attributes([Vocabulary().decode(row) for row in y])


def same_pairs(settings):
    """A training's pairs, made again: y (N, S), clips (N, 2, C, T, H, W), Brightness (N, 2, 3)."""
    pairs, _ = toy_pairs(settings.pairs, ["train"], settings.seed, CONFIG, Vocabulary())
    clips = torch.stack(pairs.sides(torch.arange(settings.pairs)), 1)
    scores = [Brightness().normalised(clips[:, side], pairs.y) for side in (0, 1)]
    return pairs.y, clips, torch.stack(scores, 1)


def find(clip, clips):
    """(pair, side) of a clip among clips (N, 2, C, T, H, W)."""
    (place,) = torch.nonzero((clips == clip).flatten(2).all(2)).tolist()
    return place


def trained(settings, task):
    """The model after trainer.fit, in eval mode; without a closing table."""
    task.evaluate = lambda final, out: []
    trainer.fit(task, settings, CPU)
    return task.model.eval()


@torch.no_grad()
def brightness(policy):
    """The mean of x0_hat at t = 1 over sixteen training prompts."""
    x1 = torch.randn(16, *CONFIG.video_shape, generator=torch.Generator().manual_seed(5))
    y = Vocabulary().encode_attributes(world.split_prompts("train")[:16], CONFIG.max_text)
    return (x1 - policy(x1, torch.ones(16), y)).mean().item()


def noised(x0, x1, t):
    t = t.reshape(-1, 1, 1, 1, 1)
    return (1 - t) * x0 + t * x1


def error(velocity, x0, batch):
    """|v - v(x_t)|^2 of each clip (section 4.1)."""
    v = velocity(noised(x0, batch["x1"], batch["t"]), batch["t"], batch["y"])
    return (v - (batch["x1"] - x0)).square().flatten(1).mean(1)


@torch.no_grad()
def dpo_by_hand(policy, reference, batch, beta_t):
    """Eq. 6, with beta_t (B,) or a number."""
    won, lost = (
        error(policy, batch[name], batch) - error(reference, batch[name], batch)
        for name in ("x0_w", "x0_l")
    )
    return F.softplus(beta_t / 2 * (won - lost)).mean().item()
