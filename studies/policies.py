"""What the studies of policies share: trainings, prompt sets, judges, and the rows that come of
them."""

import math
import os

import torch
import torch.nn.functional as F

import trainer
import world
from data import DIMENSIONS, Vocabulary, draw_noise, step_rng
from flow import TIME_SHIFT, interpolate
from judge import NOISE_SEED, learned_scores, prompt_set, sample_prompts, win_rate
from model import load_velocity
from online.tasks import online_task, task_of
from real_data.toy_pairs import draw_clips
from reward import load_reward
from runtime import resume
from runtime.checkpoint import WEIGHTS, save_checkpoint
from sample import CFG
from settings import ALGORITHMS, settings_of
from studies.report.tables import Column

# ---------------------------------------------------------------------------------------------
# Trainings


METHODS = {
    "sft": {"algo": "sft"},
    "rwr": {"algo": "rwr"},
    "dpo-schedule": {"algo": "dpo", "schedule": "(1-t)^2"},
    "dpo-constant": {"algo": "dpo"},
    "dpo-own-clips": {"algo": "dpo", "generated": 1},
}
NAMES = {  # in tables and charts
    "base": "base model",
    "sft": "SFT",
    "rwr": "Flow-RWR",
    "dpo-schedule": "Flow-DPO, (1-t)^2",
    "dpo-constant": "Flow-DPO, constant beta",
    "dpo-own-clips": "Flow-DPO, own clips",
    "nrg-1:1:1": "Flow-NRG, 1:1:1",
}


def steps_of(settings, algo):
    return settings.steps or ALGORITHMS[algo].steps


def train(settings, name, flags, steps=(), judged=None, judge=None, change_batch=None):
    """A training by `flags` of train.py, {name: value}, in the folder of its study -> path of its
    checkpoint. judged(step, checkpoint) is called after each of `steps` and at the end. judge
    replaces --reward of a run in rounds. change_batch(batch) -> the batch to train on."""
    short = {"eval-pairs": min(1000, settings.eval_pairs)}
    if flags["algo"] not in ("reward", "nrg"):
        short = {"eval-prompts": 2}
    out = settings.folder(settings.study) / name
    flags = {"steps": steps_of(settings, flags["algo"])} | flags | short
    flags |= {"save-every": 10**9, "out": out}
    args = settings_of([f"--{flag}={value}" for flag, value in flags.items()])
    if judge:
        task = online_task(args, settings.device, judge)
    else:
        task = task_of(args, settings.device)
    draw_batch = task.batch

    def batch(step, rows):
        if step in steps:
            state = {**resume.facts(task, step), "model": task.state_dict(task.model)}
            save_checkpoint(out / "judged.pt", state)
            judged(step, out / "judged.pt")
        drawn = draw_batch(step, rows)
        return change_batch(drawn) if change_batch else drawn

    task.batch = batch
    trainer.fit(task, args, settings.device)
    if judged:
        judged(args.steps, out / "last.pt")
    return out / "last.pt"


def policy_rows(settings, name, flags, sets, cfgs, **facts):
    """Trains a policy and judges it: its rows."""
    checkpoint = train(settings, name, flags)
    return checkpoint_rows(settings, checkpoint, sets, cfgs, **facts)


def checkpoint_rows(settings, checkpoint, sets, cfgs, **facts):
    """Rows of a policy on each set and CFG, with its drift from the base model."""
    facts["drift"] = drift(checkpoint, settings.device)
    scores = judge(settings, checkpoint, sets, cfgs)
    return rows_of(scores, base_scores(settings, sets, cfgs), **facts)


# ---------------------------------------------------------------------------------------------
# Judges


SETS = {"standard": 256, "hard": 96, "large": 512}  # prompt sets, and their number of prompts
CFGS = (1.0, CFG)
JUDGES = ("oracle", "videoreward")
DRIFT_CLIPS = 256
PLACES = ("start", "path", "size", "pixels")  # of which a policy's diversity is measured
ALL_RIGHT = 0.999  # of a true TA


def prompts_of(name, count):
    """Attributes (count, 3) of a prompt set."""
    if name == "large":
        every = world.split_prompts("train", "validation", "hard")
        return every[torch.randint(len(every), (count,), generator=step_rng(NOISE_SEED, 0))]
    splits = {"standard": ("train", "validation"), "hard": ("hard",)}
    return prompt_set(count, *splits[name])


def judge(settings, checkpoint, sets, cfgs, steered=None, seed=NOISE_SEED):
    """Scores of a checkpoint's samples: {"set cfg": {"prompt" (N, 3), "oracle" (N, 3),
    "videoreward" (N, 3), "quality" (N,) and their `places`}}.

    steered: (model, cfg) -> a velocity model with CFG to sample with instead; seed: of the
    noise."""
    device = settings.device
    model, words = load_velocity(checkpoint)
    reward, reward_words = load_reward(WEIGHTS / "reward.pt")
    model, reward = model.to(device), reward.to(device)
    scores = {}
    for i, (name, count) in enumerate(sets.items()):
        prompts = prompts_of(name, min(count, settings.eval_prompts or count))
        for cfg in cfgs:
            if steered:
                videos = sample_prompts(steered(model, cfg), words, prompts, seed + i, device)
            else:
                videos = sample_prompts(model, words, prompts, seed + i, device, cfg=cfg)
            scores[f"{name} {cfg:g}"] = {
                "prompt": prompts,
                "oracle": world.oracle(videos, prompts),
                "videoreward": learned_scores(reward, reward_words, videos, prompts, device),
                "quality": static_quality(videos),
                **places(videos),
            }
    return scores


def static_quality(videos):
    """How good frames look without regard to prompt and motion, as in VBench's quality score: (N,)
    in [0, 1], the mean of contrast, sharpness and the share of the mass in one place; 0 without an
    object."""
    seen = world.measure(videos)
    contrast = (seen["contrast"] / (1 - world.GROUND)).clamp(0, 1)
    sharp = 1 - ((seen["softness"] - world.SHARP) / (world.SOFT - world.SHARP)).clamp(0, 1)
    return (contrast + sharp + (1 - seen["stray"]).clamp(0, 1)) / 3 * seen["present"]


def base_scores(settings, sets, cfgs):
    """`judge` of the base model, cached in --work."""
    counts = [f"{name}{min(n, settings.eval_prompts or n)}" for name, n in sets.items()]
    path = settings.work / f"base-{'-'.join([*counts, *map(str, cfgs)])}.pt"
    if not path.exists():
        scores = judge(settings, WEIGHTS / "base.pt", sets, cfgs)
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_suffix(f".{os.getpid()}")
        torch.save(scores, temporary)
        os.replace(temporary, path)
    return torch.load(path, weights_only=True)


def base_rows(settings, sets, cfgs, **facts):
    """Rows of the base model beside itself."""
    scores = base_scores(settings, sets, cfgs)
    return rows_of(scores, scores, **facts, method="base", seed=0)


def nats(n):
    """KL divergence of best of n from its model, an upper bound."""
    return math.log(n) - (n - 1) / n


@torch.no_grad()
def drift(path, device):
    """Mean |v - v_ref|^2 between a checkpoint and the base model, on rendered clips at the times of
    training."""
    policy, words = load_velocity(path)
    base, _ = load_velocity(WEIGHTS / "base.pt")
    config = base.config
    rng = step_rng(NOISE_SEED, 1)
    clips, y = draw_clips(DRIFT_CLIPS, config, Vocabulary(words), rng)
    noise = draw_noise(DRIFT_CLIPS, config.video_shape, TIME_SHIFT, rng)
    x_t = interpolate(world.render(clips, config.size), noise["x1"], noise["t"])
    inputs = [value.to(device) for value in (x_t, noise["t"], y)]
    return (policy.to(device)(*inputs) - base.to(device)(*inputs)).square().mean().item()


def places(videos):
    """Where the object of each clip is, how far it moves (both in frame heights) and how large it
    is (as a log), and coarse pixels: (N, ...) each."""
    seen = world.measure(videos)
    return {
        "start": seen["start"],
        "path": seen["travel"],
        "size": seen["radius"].log()[:, None],
        "pixels": F.adaptive_avg_pool3d(videos, (None, 8, 8)).flatten(1),
    }


def diversity(scores):
    """How much the clips of a prompt differ in each of their `places`: standard deviations within
    a prompt, (N, ...) -> number; nan where no prompt has two clips."""
    _, group = scores["prompt"].unique(dim=0, return_inverse=True)
    groups = [group == i for i in group.unique() if (group == i).sum() > 1]
    spread = {}
    for name in PLACES:
        variances = torch.tensor([scores[name][own].var(0).mean() for own in groups])
        spread[f"spread_{name}"] = variances.mean().sqrt().item()
    return spread


def rows_of(scores, base, **facts):
    """Rows, one for each set, CFG and judge, of the scores of a model and of the base model.

    TA_ceiling is the highest true win rate in TA, since base clips with a full score can only be
    tied. spread_start and the like are `diversity` as a share of the base model's."""
    rows = []
    for key, model in scores.items():
        set_name, cfg = key.split()
        perfect = base[key]["oracle"][:, DIMENSIONS.index("TA")] >= ALL_RIGHT
        spread, base_spread = diversity(model), diversity(base[key])
        for judge in JUDGES:
            row = {**facts, "set": set_name, "cfg": float(cfg), "judge": judge}
            row |= zip(DIMENSIONS, win_rate(model[judge], base[key][judge]).tolist())
            for dimension, mean in zip(DIMENSIONS, model[judge].mean(0).tolist()):
                row[f"{dimension}_score"] = mean
            row["TA_ceiling"] = 1 - perfect.float().mean().item() / 2
            row["quality"] = model["quality"].mean().item()
            row |= {name: value / base_spread[name] for name, value in spread.items()}
            rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------
# Columns of tables

TRUE = {"judge": "oracle"}
TRUE_WINS = [Column(name, name, TRUE) for name in DIMENSIONS]
TRUE_SCORES = [Column(f"true {name}", f"{name}_score", TRUE, spread=False) for name in DIMENSIONS]
WINS_BY_JUDGE = [Column(f"{name}, truth", name, TRUE) for name in DIMENSIONS]
WINS_BY_JUDGE += [
    Column(f"{name}, VideoReward", name, {"judge": "videoreward"}) for name in DIMENSIONS
]
