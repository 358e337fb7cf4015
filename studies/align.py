"""Flow-DPO, Flow-RWR and SFT compared (paper, section 5.2): Tables 3 and 4 on the toy world.

Every method starts from the base model and takes the same number of clips of the same pairs, which
VideoReward relabels once: by the mean of its three z-scores (1:1:1, Table 3), or by TA alone (Table
4). Flow-DPO on own clips takes pairs of the base model's clips at CFG 1 in place of rendered ones.
Best of n trains nothing: of n clips of the base model it shows the one that VideoReward likes best.
Flow-NRG trains no generator: a noise-aware reward steers the base model, equal weights, CFG 1.
All are judged by VideoReward, the paper's judge, which they are trained to please, and by the
oracle, which stands for the paper's human evaluation (Fig. 5).

    set        prompts                                                      in the paper
    standard   256: those that the base model was trained on, in turn       VBench
    hard       96: the 12 combinations held out of all training, in turn    TA-Hard
    large      512 drawn at random from all 96 prompts                      VideoGen-Eval

All models see the same prompts and noise. Win rates are over the base model; a tie counts one half.
"""

from functools import partial
from itertools import product

import torch

from nrg import SteeredPolicy, load_noisy_reward
from runtime.checkpoint import WEIGHTS
from sample import NRG_EPS, NRG_INTERVAL, NRG_SCALE
from studies import policies
from studies.policies import CFGS, METHODS, NAMES, SETS, TRUE, TRUE_SCORES, WINS_BY_JUDGE
from studies.report.tables import Column, Report, matching, tabulate

ALIGNED = {"1:1:1": (1.0, 1.0, 1.0), "TA only": (0.0, 0.0, 1.0)}  # weights of VQ, MQ and TA
BEST_OF = (1, 2, 4, 8, 16)


def jobs(settings):
    queue = {"base": partial(policies.base_rows, settings, SETS, CFGS, align="")}
    for seed, align in product(range(settings.seeds), ALIGNED):
        for method in METHODS:
            queue[f"{method}-{align}-{seed}"] = partial(trained, settings, method, align, seed)
        queue[f"best-of-{align}-{seed}"] = partial(picked, settings, align, seed)
    for seed in range(settings.seeds):
        queue[f"nrg-{seed}"] = partial(guided, settings, seed)
    return queue


def trained(settings, method, align, seed):
    weights = ",".join(map(str, ALIGNED[align]))
    flags = METHODS[method] | {"align": weights, "seed": seed}
    name = checkpoint_name(method, align, seed)
    facts = {"method": method, "align": align, "seed": seed}
    return policies.policy_rows(settings, name, flags, SETS, CFGS, **facts)


def checkpoint_name(method, align, seed):
    return f"{method}-{align.replace(':', '').replace(' ', '-')}-{seed}"


def picked(settings, align, seed):
    """Rows of best of n, whose drift is in nats. The first clip of a prompt is the one that all
    methods are compared with."""
    sets, key = {"standard": SETS["standard"]}, "standard 1"
    base = policies.base_scores(settings, sets, (1.0,))
    draws = [base[key]]
    for i in range(1, max(BEST_OF)):
        noise = 100_000 * (seed + 1) + 100 * i  # far from all other noise
        draws.append(policies.judge(settings, WEIGHTS / "base.pt", sets, (1.0,), seed=noise)[key])
    every = {}  # (n, N, ...) each
    for name in base[key]:
        every[name] = torch.stack([draw[name] for draw in draws])
    reward = every["videoreward"] @ torch.tensor(ALIGNED[align])  # (n, N)
    rows = []
    for n in BEST_OF:
        best, prompt = reward[:n].argmax(0), torch.arange(reward.shape[1])
        scores = {key: {name: value[best, prompt] for name, value in every.items()}}
        facts = {"method": f"best-of-{n}", "align": align, "seed": seed, "drift": policies.nats(n)}
        rows += policies.rows_of(scores, base, **facts)
    return rows


def guided(settings, seed):
    """Rows of Flow-NRG by a noise-aware reward of this seed."""
    path = policies.train(settings, f"nrg-{seed}", {"algo": "nrg", "seed": seed})
    reward = load_noisy_reward(path)[0].to(settings.device)

    def steered(model, cfg):
        return SteeredPolicy(model, reward, (1, 1, 1), NRG_SCALE, NRG_EPS, NRG_INTERVAL, cfg)

    sets = {"standard": SETS["standard"]}
    scores = policies.judge(settings, WEIGHTS / "base.pt", sets, (1.0,), steered)
    base = policies.base_scores(settings, sets, (1.0,))
    return policies.rows_of(scores, base, method="nrg-1:1:1", align="1:1:1", seed=seed)


# ---------------------------------------------------------------------------------------------
# The report


def report(rows):
    introduction = "Win rates over the base model, mean ± standard deviation over the seeds."
    return Report("Alignment on the toy world", introduction, tables(rows))


def tables(rows):
    """Win rates by both judges for each alignment, CFG and prompt set; true scores."""
    found = {}
    lines = {NAMES[method]: {"method": method} for method in (*METHODS, "nrg-1:1:1")}
    for align, cfg, name in product(ALIGNED, CFGS, SETS):
        title = f"Aligned {align}: {name} prompts, CFG {cfg:g}"
        key = "align" if (align, cfg, name) == ("1:1:1", 1.0, "standard") else title
        own = matching(rows, align=align, cfg=cfg, set=name)
        found[key] = tabulate(title, [f"aligned {align}"], own, lines, WINS_BY_JUDGE)

    lines = {}
    for method, cfg in [
        *product(("base", *METHODS), CFGS),
        *((f"best-of-{n}", 1.0) for n in BEST_OF[1:]),
    ]:
        name = NAMES.get(method, method.replace("-", " "))
        lines[name, f"{cfg:g}"] = {"method": method, "cfg": cfg}
    columns = [Column("mean of three true wins", "wins", TRUE), *TRUE_SCORES]
    columns.append(Column("static quality", "quality", TRUE, spread=False))
    own = [row for row in matching(rows, set="standard") if row["align"] != "TA only"]
    title = "True scores, aligned 1:1:1, standard prompts"
    found["true"] = tabulate(title, ["", "CFG"], own, lines, columns)
    return found
