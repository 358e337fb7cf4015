"""What the studies share: jobs that are each done once, trainings, judges, and results on disk.

A study is many trainings, each a job of its own whose result is kept in --work: a stopped study goes on where it was,
and a second terminal with the same command takes its share of the jobs.
"""

import json
import math
import os
import random
import statistics
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

import trainer
import world
from data import DIMENSIONS, Vocabulary, draw_noise, step_rng
from flow import TIME_SHIFT, interpolate
from judge import (
    NOISE_SEED,
    learned_scores,
    over_seeds,
    prompt_set,
    sample_prompts,
    static_quality,
    win_rate,
)
from model import load_velocity
from real_data.toy_pairs import draw_clips
from reward import load_reward
from runtime import resume
from runtime.checkpoint import WEIGHTS, save_checkpoint
from runtime.cli import BadInput, Parser, check_writable, has_bf16, positive_int
from sample import CFG
from settings import settings_of
from studies.report.charts import picture
from studies.report.tables import markdown

try:
    import fcntl
except ImportError:  # Windows: a study then runs in one terminal
    fcntl = None


NAMES = (
    "reward",
    "align",
    "beta",
    "nrg",
    "rank",
    "online",
    "unified",
    "bench",
    "report",
    "tables",
    "read",
)


def arguments(argv=None):
    parser = Parser(
        "Reproduces the paper's tables on the toy world, or measures what costs how much."
    )
    parser.add_argument("study", choices=NAMES, help="what to do")
    parser.add_argument(
        "--seeds", type=positive_int, default=3, help="runs of each row, seeds 0, 1, ..."
    )
    parser.add_argument(
        "--out", type=Path, default=Path("results"), help="folder for the tables and pictures"
    )
    parser.add_argument(
        "--work",
        type=Path,
        default=Path("out/evaluate"),
        help="folder for what is kept between runs",
    )
    parser.add_argument("--device", default="auto", help="auto (cuda, mps, cpu) or a torch device")
    parser.add_argument(
        "--steps", type=positive_int, help="of each training (default: the algorithm's own)"
    )
    parser.add_argument(
        "--eval-prompts", type=positive_int, help="align, beta, nrg: at most so many of each set"
    )
    parser.add_argument(
        "--eval-pairs",
        type=positive_int,
        default=2000,
        help="reward: pairs of each split; nrg: at most 1000",
    )
    parser.add_argument(
        "--check", action="store_true", help="tables: write nothing, fail if one is outdated"
    )
    parser.add_argument("--only", action="append", help="bench: this part alone; may be repeated")
    return parser.parse_args(argv)


# ---------------------------------------------------------------------------------------------
# Jobs: what takes time, each done once


def work_through(jobs, folder):
    """Runs `jobs`, {name: function that returns rows}; keeps the rows of each in `folder`/name.json. -> {name: rows}.

    A job that another process holds is left to it; None is returned if such jobs are not done at the end."""
    check_writable(folder, "--work")
    bar = tqdm(jobs.items(), desc=folder.name, unit="job", dynamic_ncols=True)
    for name, job in bar:
        done = folder / f"{name}.json"
        with open(folder / f"{name}.lock", "w") as lock:
            if (
                not _took(lock) or done.exists()
            ):  # in this order: whoever held the lock may just have finished
                continue
            bar.set_postfix_str(name)
            rows = job()
            temporary = done.with_suffix(".tmp")
            temporary.write_text(json.dumps(rows))
            os.replace(temporary, done)
    if not all((folder / f"{name}.json").exists() for name in jobs):
        return None
    return {name: json.loads((folder / f"{name}.json").read_text()) for name in jobs}


def _took(lock):
    """Whether this process could take the lock; the system gives it back when the process ends, however it ends."""
    try:
        if fcntl:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except OSError:
        return False


# ---------------------------------------------------------------------------------------------
# Results


def facts(device):
    """What a result's file says of where it came from."""
    command = " ".join(["python", Path(sys.argv[0]).name, *sys.argv[1:]])
    name = f" ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else ""
    kind = f"{device}{name} with{'' if has_bf16(device) else 'out'} bfloat16"  # what train.py trains in if there is
    return {
        "command": command,
        "commit": resume.commit(),
        "torch": torch.__version__,
        "device": kind,
    }


def rendered(study, result, saved):
    """{file name: text} of what study.report() gives: the Markdown page, and an SVG for each picture.

    saved: the content of the study's JSON file, whose command and machine the page names."""
    source = "`{command}`, commit {commit}, torch {torch}, {device}".format(**saved)
    files = {f"{study}.md": "\n".join([*markdown(result), "", source, ""])}
    for name, charts in result["pictures"].items():
        files[f"{name}.svg"] = picture(charts)
    return files


def save_json(path, content):
    try:
        path.write_text(json.dumps(content, indent=1) + "\n")
    except OSError as error:
        raise BadInput(f"cannot write {path}: {error.strerror}") from None


def save(study, result, out, device):
    """Writes what a study's report() gives (rows, title, introduction, tables, pictures: {name: list of Chart}) as
    out/study.json, .md and SVGs."""
    saved = {**facts(device), "rows": result["rows"]}
    try:
        out.mkdir(parents=True, exist_ok=True)
        save_json(out / f"{study}.json", saved)
        for name, text in rendered(study, result, saved).items():
            (out / name).write_text(text)
    except OSError as error:
        raise BadInput(f"cannot write to {out}: {error.strerror}") from None


def clock(device):
    """Seconds: of this process on a CPU, of the wall once the device is idle."""
    if device.type == "cpu":
        return time.process_time()
    torch.accelerator.synchronize(device)
    return time.perf_counter()


def medians(ways, device, rounds=21, ordered=False):
    """{name: median seconds} of {name: function}, which take turns; one round before does not count. Medians are taken
    of shares of a round's time, so that a round in which the machine was slow leaves their ratios alone. Every round
    has another order unless `ordered`: what ran before decides where tensors lie in memory, which is worth 4 %."""
    seconds = []
    for i in range(rounds + 1):
        took = {}
        for name in ways if ordered else random.Random(i).sample(list(ways), len(ways)):
            begun = clock(device)
            ways[name]()
            took[name] = clock(device) - begun
        if i:
            seconds.append(took)
    totals = [sum(took.values()) for took in seconds]
    shares = {name: [took[name] / total for took, total in zip(seconds, totals)] for name in ways}
    return {
        name: statistics.median(share) * statistics.median(totals) for name, share in shares.items()
    }


METHODS = {
    "sft": ["--algo", "sft"],
    "rwr": ["--algo", "rwr"],
    "dpo-schedule": ["--algo", "dpo", "--schedule", "(1-t)^2"],
    "dpo-constant": ["--algo", "dpo"],
    "dpo-own-clips": ["--algo", "dpo", "--generated", "1"],
}
BEST_OF = (1, 2, 4, 8, 16)
DRIFT_CLIPS = 256
ALL_RIGHT = 0.999  # of a true TA
ALIGNED = {"1:1:1": "1,1,1", "TA only": "0,0,1"}
SETS = {"standard": 256, "hard": 96, "large": 512}
CFGS = (1.0, CFG)
JUDGES = ("oracle", "videoreward")
ATTRIBUTES = tuple(world.MARGIN)


def prompts_of(name, count):
    """Attributes (count, 3) of a prompt set."""
    if name == "large":
        every = world.split_prompts("train", "validation", "hard")
        return every[torch.randint(len(every), (count,), generator=step_rng(NOISE_SEED, 0))]
    return prompt_set(count, *{"standard": ("train", "validation"), "hard": ("hard",)}[name])


def judge(
    checkpoint, args, device, sets, cfgs, steered=None, seed=NOISE_SEED
):
    """Samples of a checkpoint on each set and CFG, judged: {"set cfg": {"oracle" (N, 3), "videoreward" (N, 3),
    "right" (N, 3), "quality" (N,)}}. steered: (model, cfg) -> a velocity model with CFG to sample with instead; seed:
    of the noise."""
    model, words = load_velocity(checkpoint)
    reward, reward_words = load_reward(WEIGHTS / "reward.pt")
    model, reward, scores = model.to(device), reward.to(device), {}
    for i, (name, count) in enumerate(sets.items()):
        prompts = prompts_of(name, min(count, args.eval_prompts or count))
        for cfg in cfgs:
            if steered is None:
                videos = sample_prompts(model, words, prompts, seed + i, device, cfg=cfg)
            else:
                videos = sample_prompts(steered(model, cfg), words, prompts, seed + i, device)
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


def nats(n):
    """KL divergence of best of n from its model, an upper bound."""
    return math.log(n) - (n - 1) / n


def best_of(seed, args, device, sets, weights):
    """{n: `judge` of the base model at CFG 1, of n clips of each prompt the one that VideoReward likes best}. The first
    is the one that every other method is compared with. weights: of VQ, MQ and TA."""
    base = base_scores(args, device, sets, (1.0,))
    others = [
        100_000 * (seed + 1) + 100 * i for i in range(1, max(BEST_OF))
    ]  # far from all other noise
    each = [
        base,
        *(judge(WEIGHTS / "base.pt", args, device, sets, (1.0,), seed=noise) for noise in others),
    ]
    picked = {}
    for n in BEST_OF:
        picked[n] = {}
        for key in base:
            scores = {
                name: torch.stack([clips[key][name] for clips in each[:n]]) for name in base[key]
            }  # (n, N, ...)
            best = (scores["videoreward"] @ torch.tensor(weights)).argmax(0)  # (N,)
            picked[n][key] = {
                name: value[best, torch.arange(len(best))] for name, value in scores.items()
            }
    return picked


@torch.no_grad()
def drift(path, device):
    """Mean |v - v_ref|^2 of a checkpoint against the base model, on rendered clips at times as in training."""
    (policy, words), (base, _) = load_velocity(path), load_velocity(WEIGHTS / "base.pt")
    config, rng = base.config, step_rng(NOISE_SEED, 1)
    clips, y = draw_clips(DRIFT_CLIPS, config, Vocabulary(words), rng)
    noise = draw_noise(DRIFT_CLIPS, config.video_shape, TIME_SHIFT, rng)
    x_t = interpolate(world.render(clips, config.size), noise["x1"], noise["t"])
    inputs = [value.to(device) for value in (x_t, noise["t"], y)]
    return (policy.to(device)(*inputs) - base.to(device)(*inputs)).square().mean().item()


def rows_of(scores, base, **facts):
    """Table rows, one for each set, CFG and judge. TA_ceiling is the most that can be won in true TA, as a clip that
    has all of its prompt right is at best equalled; TA_share is how much of the way there from one half is gone."""
    rows = []
    for key, here in scores.items():
        name, cfg = key.split()
        ceiling = (
            1
            - (base[key]["oracle"][:, DIMENSIONS.index("TA")] >= ALL_RIGHT).float().mean().item()
            / 2
        )
        for by in JUDGES:
            wins, mean = win_rate(here[by], base[key][by]).tolist(), here[by].mean(0).tolist()
            row = {
                **facts,
                "set": name,
                "cfg": float(cfg),
                "judge": by,
                **dict(zip(DIMENSIONS, wins)),
            }
            row |= {f"{n}_score": value for n, value in zip(DIMENSIONS, mean)}
            row |= {"TA_ceiling": ceiling, "TA_share": (row["TA"] - 0.5) / max(ceiling - 0.5, 1e-6)}
            row |= dict(zip(ATTRIBUTES, here["right"].mean(0).tolist())) | {
                "quality": here["quality"].mean().item()
            }
            rows.append(row)
    return rows


def mean_z(rows, by, **wanted):
    """The mean of the three dimensions over the seeds, as z-scores: VideoReward's own, the oracle's by TRUE_MEAN and
    TRUE_STD."""
    means = torch.tensor(
        [over_seeds(rows, f"{n}_score", judge=by, **wanted)[0] for n in DIMENSIONS]
    )
    return ((means - world.TRUE_MEAN) / world.TRUE_STD if by == "oracle" else means).mean().item()


def settings_for(flags, out, args):
    """The flags of a training whose own closing table is kept short."""
    steps = [f"--steps={args.steps}"] if args.steps else []
    short = ["--eval-prompts=2"]
    if settings_of(flags).algo in ("reward", "nrg"):
        short = [f"--eval-pairs={min(1000, args.eval_pairs)}"]
    return settings_of([*flags, *steps, *short, "--save-every=1000000", f"--out={out}"])


def train_and_judge(task, settings, device, steps, judged):
    """trainer.fit; on the way, after each of `steps` and at the end, judged(step, path of a checkpoint)."""
    draw, path = task.batch, settings.out / "judged.pt"

    def batch(step, rows):
        if step in steps:
            save_checkpoint(
                path, {**resume.facts(task, step), "model": task.state_dict(task.model)}
            )
            judged(step, path)
        return draw(step, rows)

    task.batch = batch
    trainer.fit(task, settings, device)
    judged(settings.steps, settings.out / "last.pt")


def run(study, args, device):
    """Does a study's jobs, and writes its tables and pictures once all are done."""
    rows = work_through(study.jobs(args, device), args.work / study.folder(args))
    if rows is None:
        print(
            "the other jobs are being done by another process; run the same command once more when it has ended"
        )
        return
    result = study.report(args, [row for group in rows.values() for row in group])
    save(args.study, result, args.out, device)
    print("\n".join([*markdown(result), "", f"wrote {args.out / args.study}.json and .md"]))
