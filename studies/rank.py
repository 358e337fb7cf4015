"""When is a reward model worth its training? Flow-DPO from N labelled pairs, with and without VideoReward.

    labels     the annotators' labels of the N pairs rank their clips (--rank labels)
    reward     VideoReward, trained on these N pairs, ranks the clips that the policy trains on:
               those of the N pairs, or of 3,200 others, whose labels are not used

The steps of a VideoReward follow the square root of its pairs, as in `evaluate.py reward`; on 300
pairs, half and twice as many gave a lower accuracy on held-out labelled pairs. The truth is used
for the table alone. All policies take the default steps and beta, and are judged by the oracle on
the standard set at CFG 1.
"""

from functools import partial

import tasks
import trainer
from data import DIMENSIONS
from judge import over_seeds
from settings import Dpo
from studies.jobs import base_scores, clock, judge, rows_of, settings_for
from studies.report.tables import Table, plus_minus

REWARD_STEPS = {3200: 550, 300: 170}  # by the number of labelled pairs
SETS, CFGS = {"standard": 256}, (1.0,)


def aligned(labelled, clips, ranked_by, seed, args, device, reward=None, seconds=0.0):
    """Rows of a Flow-DPO on `clips` toy pairs, ranked by their labels or by a VideoReward."""
    out = args.work / "rank" / f"{ranked_by}-{labelled}-{clips}-{seed}"
    source = [f"--reward={reward}"] if reward else ["--rank=labels"]
    flags = ["--algo=dpo", *source, f"--pairs={clips}", f"--seed={seed}"]
    settings = settings_for(flags, out, args)
    trainer.fit(tasks.TASKS["dpo"](settings, device), settings, device)
    scores = judge(out / "last.pt", args, device, SETS, CFGS)
    facts = {"labelled": labelled, "clips": clips, "method": ranked_by, "seed": seed}
    base = base_scores(args, device, SETS, CFGS)
    return rows_of(scores, base, **facts, reward_minutes=seconds / 60)


def with_reward(labelled, seed, args, device):
    """Rows of all policies that a VideoReward of `labelled` pairs ranks clips for."""
    out = args.work / "rank" / f"videoreward-{labelled}-{seed}"
    steps = REWARD_STEPS[labelled]
    flags = ["--algo=reward", "--generated=0", f"--pairs={labelled}", f"--steps={steps}"]
    settings = settings_for([*flags, f"--seed={seed}"], out, args)
    begun = clock(device)
    trainer.fit(tasks.TASKS["reward"](settings, device), settings, device)
    ranks = {"reward": out / "last.pt", "seconds": clock(device) - begun}
    rows = []
    for clips in sorted({labelled, max(REWARD_STEPS)}):
        rows += aligned(labelled, clips, "reward", seed, args, device, **ranks)
    return rows


def folder(args):
    return f"rank-{args.steps or Dpo.steps}-{args.eval_prompts or 'all'}"


def jobs(args, device):
    queue = {}
    for seed in range(args.seeds):
        for n in REWARD_STEPS:
            queue[f"labels-{n}-{seed}"] = partial(aligned, n, n, "labels", seed, args, device)
            queue[f"reward-{n}-{seed}"] = partial(with_reward, n, seed, args, device)
    return queue


def table(rows):
    """True win rates over the base model and true scores by the source of the ranking."""
    columns = [*DIMENSIONS, *(f"{name}_score" for name in DIMENSIONS)]
    most, *fewer = REWARD_STEPS
    runs = [(most, "labels", most), (most, "reward", most)]
    for n in fewer:
        runs += [(n, "labels", n), (n, "reward", n), (n, "reward", most)]
    cells = []
    for labelled, method, clips in runs:
        run = {"labelled": labelled, "method": method, "clips": clips, "judge": "oracle"}
        figures = [plus_minus(over_seeds(rows, column, **run)) for column in columns]
        minutes, _ = over_seeds(rows, "reward_minutes", **run)
        cells.append([f"{labelled:,}", method, f"{clips:,}", *figures, f"{minutes:.1f}"])
    wins = [f"{name} wins" for name in DIMENSIONS]
    scores = [f"true {name}" for name in DIMENSIONS]
    head = ["labelled pairs", "ranked by", "pairs of clips", *wins, *scores, "reward training, min"]
    return Table("", head, cells)


def report(args, rows):
    return {
        "rows": rows,
        "title": "Flow-DPO with and without a reward model",
        "introduction": [
            "True win rates over the base model and true scores, standard set, CFG 1, "
            f"mean ± standard deviation over {args.seeds} seeds."
        ],
        "tables": [table(rows)],
        "pictures": {},
    }
