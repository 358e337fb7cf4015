"""Flow-NRG on the toy world (paper, section 4.4): Table 5, and Table 7 of the paper's first
version.

Every row samples the same prompts from the same noise as the base model, over which its win rates
are. The judges are VideoReward, which the guiding noise-aware reward learned from, and the oracle,
which it does not know.

    weights     VQ : MQ : TA as in Table 5, equal weights, and each weight alone
    scale       w of Eq. 11
    interval    the highest t that is guided
    reward      rewards trained on labels by Bradley-Terry, and on clean clips
    on top      of CFG, and of a policy aligned by Flow-DPO
    accuracy    of the rewards on pairs, by t
"""

from functools import partial
from itertools import product

import torch

from data import DIMENSIONS, Vocabulary
from judge import noisy_scores
from model import load_velocity
from nrg import SteeredPolicy, load_noisy_reward
from real_data.toy_pairs import annotated_pairs
from reward import accuracies_without_ties
from runtime.checkpoint import WEIGHTS
from sample import CFG, NRG_EPS, NRG_INTERVAL, NRG_SCALE
from studies import policies
from studies.policies import JUDGES, TRUE_SCORES, TRUE_WINS, WINS_BY_JUDGE
from studies.report.charts import Chart, curve
from studies.report.tables import Report, matching, tabulate

SETS = {"large": 256}
EQUAL = (1, 1, 1)
TABLE_5 = ((0, 0, 1), (0.1, 0.1, 0.8), (0.1, 0.1, 0.6), (0.5, 0.5, 0))
RATIOS = (*TABLE_5, (0, 1, 0), (1, 0, 0), EQUAL)
SCALES = (0.25, 0.5, 2, 4)  # times the default
HIGHEST = (0.8, 0.9, 1.0)  # t that is guided, beside the default
VARIANTS = {"noised": {}, "labels": {"target": "labels"}, "clean": {"time-shift": 0}}
SOURCES = {
    "noised": "VideoReward's scores",
    "labels": "people's labels",
    "clean": "VideoReward's scores of clean clips",
}
ON_TOP = {
    "dpo": "Flow-DPO",
    "dpo+nrg-1:1:1": "Flow-DPO and Flow-NRG 1 : 1 : 1",
    "cfg+nrg-1:1:1": "Flow-NRG 1 : 1 : 1",
}
CHOICES = (EQUAL, (0, 1, 0), (0, 0, 1))  # weights that every variant is judged at


def jobs(settings):
    queue = {"cfg": partial(classifier_free, settings)}
    for variant, seed in product(VARIANTS, range(settings.seeds)):
        queue[f"{variant}-{seed}"] = partial(reward_rows, settings, variant, seed)
    return queue


def name_of(weights):
    return "nrg-" + ":".join(f"{w:g}" for w in weights)


def guided_rows(settings, reward, weights, clean=False, **facts):
    """Rows of a checkpoint under guidance. `facts` may hold its "checkpoint", "cfg", "scale" and
    "highest" t. A reward trained on clean clips knows t = 0 alone, so it is evaluated there."""
    checkpoint = facts.pop("checkpoint", WEIGHTS / "base.pt")
    cfg = facts.pop("cfg", 1.0)
    facts = {"method": name_of(weights), "scale": NRG_SCALE, "highest": NRG_INTERVAL[1]} | facts
    eq_11 = facts["scale"], NRG_EPS, (NRG_INTERVAL[0], facts["highest"])

    def at_0(x_t, t, y):
        return reward(x_t, torch.zeros_like(t), y)

    def steered(model, cfg):
        return SteeredPolicy(model, at_0 if clean else reward, weights, *eq_11, cfg)

    scores = policies.judge(settings, checkpoint, SETS, (cfg,), steered)
    return policies.rows_of(scores, policies.base_scores(settings, SETS, (1.0, CFG)), **facts)


def reward_rows(settings, variant, seed):
    """All rows of one reward: many of the default variant, three of any other."""
    flags = {"algo": "nrg", "seed": seed} | VARIANTS[variant]
    reward, _ = load_noisy_reward(policies.train(settings, f"{variant}-{seed}", flags))
    reward = reward.to(settings.device)
    rows = accuracy_rows(settings, reward, variant, seed)

    def add(study, weights, **facts):
        facts |= {"study": study, "variant": variant, "seed": seed, "clean": variant == "clean"}
        rows.extend(guided_rows(settings, reward, weights, **facts))

    if variant != "noised":
        for weights in CHOICES:
            add("reward", weights)
        return rows
    for weights in RATIOS:
        add("weights", weights)
    for factor in SCALES:
        add("scale", EQUAL, scale=factor * NRG_SCALE)
    for highest in HIGHEST:
        add("interval", EQUAL, highest=highest)
    add("on top", EQUAL, method="cfg+nrg-1:1:1", cfg=CFG)
    dpo = policies.train(settings, f"dpo-{seed}", {"algo": "dpo", "seed": seed})
    for cfg in (1.0, CFG):
        add("on top", (0, 0, 0), method="dpo", checkpoint=dpo, cfg=cfg)
        add("on top", EQUAL, method="dpo+nrg-1:1:1", checkpoint=dpo, cfg=cfg)
    return rows


def classifier_free(settings):
    """Rows of the base model, and of the base model with CFG over itself without."""
    base = policies.base_scores(settings, SETS, (1.0, CFG))
    facts = {"study": "weights", "variant": "none", "seed": 0}
    plain = {"large 1": base["large 1"]}
    rows = policies.rows_of(plain, plain, **facts, method="base")
    with_cfg = {f"large {CFG:g}": base[f"large {CFG:g}"]}
    without = {f"large {CFG:g}": base["large 1"]}
    return rows + policies.rows_of(with_cfg, without, **facts, method=f"CFG {CFG:g}, no NRG")


def accuracy_rows(settings, reward, variant, seed):
    """Accuracy without ties on pairs of prompts never seen in training, at several times."""
    base, words = load_velocity(WEIGHTS / "base.pt")
    count = min(1000, settings.eval_pairs)
    pairs = annotated_pairs(count, ["validation"], 98765, base.config, Vocabulary(words))
    facts = {"study": "accuracy", "method": "nrg", "variant": variant, "seed": seed}
    rows = []
    for t, scores in noisy_scores(reward, pairs, settings.device, seed=0).items():
        accuracies = accuracies_without_ties(scores[:, 0] - scores[:, 1], pairs.label)
        rows.append(facts | {"t": t} | accuracies)
    return rows


# ---------------------------------------------------------------------------------------------
# The report


def label_of(weights):
    return " : ".join(f"{w:g}" for w in weights)


def report(rows):
    low, high = NRG_INTERVAL
    introduction = (
        "Win rates over the unguided base model on the same prompts and noise, and mean true "
        "scores; mean ± standard deviation over the rewards. CFG 1 where none is named, scale "
        f"{NRG_SCALE:g}, eps {NRG_EPS:g}, guided for t from {low:g} to {high:g}."
    )
    return Report("Flow-NRG on the toy world", introduction, tables(rows), {"nrg": charts(rows)})


def tables(rows):
    columns = [*TRUE_WINS, *TRUE_SCORES]
    ratio = ["VQ : MQ : TA"]
    weights = matching(rows, study="weights")
    lines = {label_of(w): {"method": name_of(w)} for w in RATIOS}
    lines["no guidance, CFG 2"] = {"method": f"CFG {CFG:g}, no NRG"}
    by_judge = [*WINS_BY_JUDGE, *TRUE_SCORES]
    found = {"nrg-weights": tabulate("Table 5: weights", ratio, weights, lines, by_judge)}

    depends = by_scale(rows) + matching(rows, study="interval")
    lines = {}
    for scale, highest in sorted({(row["scale"], row["highest"]) for row in depends}):
        lines[f"{scale:g}", f"{highest:g}"] = {"scale": scale, "highest": highest}
    title = "Scale and interval, 1 : 1 : 1"
    found["settings"] = tabulate(title, ["scale", "guided up to t"], depends, lines, columns)

    learned = matching(rows, study="reward") + matching(weights, variant="noised")
    lines = {}
    for (variant, source), w in product(SOURCES.items(), CHOICES):
        lines[source, label_of(w)] = {"variant": variant, "method": name_of(w)}
    title = "What the reward learned from"
    found["rewards"] = tabulate(title, ["learned from", *ratio], learned, lines, columns)

    lines = {}
    for cfg, (method, label) in product((1.0, CFG), ON_TOP.items()):
        lines[label, f"{cfg:g}"] = {"study": "on top", "method": method, "cfg": cfg}
    title = "On top of Flow-DPO and of CFG"
    found["on-top"] = tabulate(title, ["", "CFG"], rows, lines, columns)
    return found


def by_scale(rows):
    """Rows of equal weights at every scale, the default one among them."""
    return matching(rows, study="scale") + matching(rows, study="weights", method=name_of(EQUAL))


def charts(rows):
    query = {"study": "accuracy", "variant": "noised"}
    curves = [curve(name, rows, "t", name, **query) for name in DIMENSIONS]
    panels = [Chart("Pair accuracy of the reward", curves, "t", "accuracy", level=0.5)]
    for by in JUDGES:
        curves = [curve(name, by_scale(rows), "scale", name, judge=by) for name in DIMENSIONS]
        title = f"Guided 1 : 1 : 1, judged by {by}"
        panels.append(Chart(title, curves, "scale w", "win rate", axis="log", level=0.5))
    return panels
