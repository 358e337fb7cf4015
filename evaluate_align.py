"""Flow-DPO, Flow-RWR and SFT compared (paper, section 5.2): Tables 3 and 4 on the toy world, judged twice.

Every method starts from the same base model and takes the same number of clips of the same pairs, relabelled once by
VideoReward: 1:1:1 by the mean of its three z-scores (Table 3), or by TA alone (Table 4). The judges are VideoReward,
the paper's own, which these policies were trained to please, and the oracle, which says what is true and stands for the
paper's human evaluation (Fig. 5).

    set        prompts                                                      in the paper
    standard   256: those that the base model was trained on, in turn       VBench
    hard       96: the 12 combinations held out of all training, in turn    TA-Hard
    large      512 drawn at random from all 96 prompts                      VideoGen-Eval

All models see the same prompts and noise. Win rates are over the base model, a draw counting one half.
"""

import os
from functools import partial

import torch

import train
import world
from common import WEIGHTS
from compare import learned_scores, over_seeds, prompt_set, sample_prompts, static_quality, win_rate
from data import step_rng
from model import load_velocity
from reward import DIMENSIONS, load_reward
from sample import CFG
from tasks import TASKS

METHODS = {
    "sft": ["--algo", "sft"],
    "rwr": ["--algo", "rwr"],
    "dpo-schedule": ["--algo", "dpo", "--schedule", "(1-t)^2"],
    "dpo-constant": ["--algo", "dpo"],
}
ALIGNED = {"1:1:1": "1,1,1", "TA only": "0,0,1"}
SETS = {"standard": 256, "hard": 96, "large": 512}
CFGS = (1.0, CFG)
JUDGES = ("oracle", "videoreward")
ATTRIBUTES = tuple(world.MARGIN)
NOISE_SEED = 4321


def prompts_of(name, count):
    """Attributes (count, 3) of a prompt set."""
    if name == "large":
        every = world.split_prompts("train", "validation", "hard")
        return every[torch.randint(len(every), (count,), generator=step_rng(NOISE_SEED, 0))]
    return prompt_set(count, *{"standard": ("train", "validation"), "hard": ("hard",)}[name])


def judge(checkpoint, args, device, sets, cfgs, steered=lambda model: (model, None)):
    """Samples of a checkpoint on each set and CFG, judged: {"set cfg": {"oracle" (N, 3), "videoreward" (N, 3),
    "right" (N, 3), "quality" (N,)}}. steered: model -> what to sample with, a velocity model and a guidance."""
    model, words = load_velocity(checkpoint)
    reward, reward_words = load_reward(WEIGHTS / "reward.pt")
    (model, guidance), reward, scores = steered(model.to(device)), reward.to(device), {}
    for i, (name, count) in enumerate(sets.items()):
        prompts = prompts_of(name, min(count, args.eval_prompts or count))
        for cfg in cfgs:
            noise = NOISE_SEED + i
            videos = sample_prompts(model, words, prompts, noise, device, cfg=cfg, guidance=guidance)
            scores[f"{name} {cfg:g}"] = {
                "oracle": world.oracle(videos, prompts),
                "videoreward": learned_scores(reward, reward_words, videos, prompts, device),
                "right": (world.attributes_right(videos, prompts) > 0.5).float(),
                "quality": static_quality(videos),
            }
    return scores


def base_scores(args, device, sets, cfgs):
    """`judge` of the base model, made once and kept in --work."""
    names = "-".join([*sets, *map(str, cfgs), str(args.eval_prompts)])
    kept = args.work / f"base-{names}.pt"
    if not kept.exists():
        scores = judge(WEIGHTS / "base.pt", args, device, sets, cfgs)
        kept.parent.mkdir(parents=True, exist_ok=True)
        temporary = kept.with_suffix(f".{os.getpid()}")
        torch.save(scores, temporary)
        os.replace(temporary, kept)
    return torch.load(kept, weights_only=True)


def rows_of(scores, base, **facts):
    """Table rows, one for each set, CFG and judge."""
    rows = []
    for key, here in scores.items():
        name, cfg = key.split()
        for by in JUDGES:
            wins, mean = win_rate(here[by], base[key][by]).tolist(), here[by].mean(0).tolist()
            row = {**facts, "set": name, "cfg": float(cfg), "judge": by, **dict(zip(DIMENSIONS, wins))}
            row |= {f"{n}_score": value for n, value in zip(DIMENSIONS, mean)}
            row |= dict(zip(ATTRIBUTES, here["right"].mean(0).tolist())) | {"quality": here["quality"].mean().item()}
            rows.append(row)
    return rows


def untrained(args, device):
    base = base_scores(args, device, SETS, CFGS)
    return rows_of(base, base, method="base", align="", seed=0)


def trained(method, align, seed, args, device):
    out = args.work / "align" / f"{method}-{align.replace(':', '').replace(' ', '-')}-{seed}"
    settings = settings_for([*METHODS[method], f"--align={ALIGNED[align]}", f"--seed={seed}"], out, args)
    task = TASKS[settings.algo](settings, device)
    train.train(task, settings, device)
    scores = judge(out / "last.pt", args, device, SETS, CFGS)
    return rows_of(scores, base_scores(args, device, SETS, CFGS), method=method, align=align, seed=seed)


def settings_for(flags, out, args):
    """The flags of a training whose own closing table is kept short."""
    steps = [f"--steps={args.steps}"] if args.steps else []
    short = ["--save-every=1000000", "--eval-prompts=2", f"--eval-pairs={min(1000, args.eval_pairs)}"]
    return train.arguments([*flags, *steps, *short, f"--out={out}"])


def folder(args):
    return f"align-{args.steps or train.DEFAULTS['dpo']['steps']}-{args.eval_prompts or 'all'}"


def jobs(args, device):
    made = {"base": partial(untrained, args, device)}
    for seed in range(args.seeds):
        for align in ALIGNED:
            for method in METHODS:
                made[f"{method}-{align}-{seed}"] = partial(trained, method, align, seed, args, device)
    return made


# ---------------------------------------------------------------------------------------------------------------------
# The report


def report(args, rows):
    figure = partial(over_seeds, rows)

    def cell(value):
        return f"{value[0]:.2f} ± {value[1]:.2f}"

    lines = ["# Alignment on the toy world", ""]
    lines += [f"Win rates over the base model, mean ± standard deviation over {args.seeds} seeds."]
    for align, table in zip(ALIGNED, ("Table 3", "Table 4")):
        for cfg in CFGS:
            for by in JUDGES:
                lines += ["", f"## {table}: {align}, CFG {cfg:g}, judged by {by}", ""]
                lines += ["| method | " + " | ".join(f"{name} {n}" for name in SETS for n in DIMENSIONS) + " |"]
                lines += ["|---|" + "---|" * (len(SETS) * 3)]
                for method in METHODS:
                    wanted = {"method": method, "align": align, "cfg": cfg, "judge": by}
                    cells = [cell(figure(n, set=name, **wanted)) for name in SETS for n in DIMENSIONS]
                    lines.append(f"| {method} | " + " | ".join(cells) + " |")

    lines += ["", "## True scores, attributes right and static quality (standard set)", ""]
    columns = [*(f"{n}_score" for n in DIMENSIONS), *ATTRIBUTES, "quality"]
    lines += ["| CFG | aligned | method | " + " | ".join(c.replace("_", " ") for c in columns) + " |"]
    lines += ["|---|---|---|" + "---|" * len(columns)]
    for cfg in CFGS:
        for align, method in [("", "base"), *((a, m) for a in ALIGNED for m in METHODS)]:
            wanted = {"method": method, "align": align, "cfg": cfg, "judge": "oracle", "set": "standard"}
            cells = " | ".join(cell(figure(column, **wanted)) for column in columns)
            lines.append(f"| {cfg:g} | {align} | {method} | {cells} |")
    return {"rows": rows, "markdown": [*lines, "", *findings(figure)], "pictures": {}}


def findings(figure):
    """The paper's orderings (sections 4.2 and 5.2, Tables 3 and 4) held against both judges: standard set, CFG 1."""
    standard = {"set": "standard", "cfg": 1.0}

    def win(method, name, by, align="1:1:1"):
        return figure(name, method=method, align=align, judge=by, **standard)[0]

    def mean(method, by):
        return sum(win(method, name, by) for name in DIMENSIONS) / 3

    def quality(method, align="1:1:1"):
        return figure("quality", method=method, align=align, judge="oracle", **standard)[0]

    lines = ["## What the paper finds, and what is found here (standard set, CFG 1)", ""]
    lines += ["| finding | " + " | ".join(f"by {by}" for by in JUDGES) + " |", "|---|---|---|"]

    def line(text, test):
        cells = [f"{'yes' if holds else 'no'}: {figures}" for holds, figures in map(test, JUDGES)]
        lines.append(f"| {text} | " + " | ".join(cells) + " |")

    def compare(text, first, second, by_least=0.0):
        line(text, lambda by: (first(by) > second(by) + by_least, f"{first(by):.2f} against {second(by):.2f}"))

    for align in ALIGNED:
        sides = (partial(win, method, "TA", align=align) for method in ("dpo-constant", "dpo-schedule"))
        compare(f"constant beta above (1-t)^2 in TA, {align}", *sides)
    compare("(1-t)^2 wins in VQ", partial(win, "dpo-schedule", "VQ"), lambda by: 0.5)
    compare("(1-t)^2 wins in MQ", partial(win, "dpo-schedule", "MQ"), lambda by: 0.5)
    compare("(1-t)^2 loses in TA", lambda by: 0.5, partial(win, "dpo-schedule", "TA"))
    for other in ("sft", "rwr"):
        sides = partial(mean, "dpo-constant"), partial(mean, other)
        compare(f"constant-beta DPO at least .05 above {other}, mean of the three", *sides, by_least=0.05)

    def close(by):
        return abs(mean("sft", by) - mean("rwr", by)) < 0.05, f"{mean('sft', by):.2f} and {mean('rwr', by):.2f}"

    line("SFT and RWR within .05 of each other, mean of the three", close)
    best = max(METHODS, key=quality)
    compare("no method raises static quality", lambda by: quality("base", ""), lambda by: quality(best))
    return lines
