"""Flow-NRG on the toy world (paper, section 4.4): Table 5, and Table 7 of the paper's first
version.

Every row samples the same prompts from the same noise as the base model, over which its win rates
are. The judges are VideoReward, which the guiding noise-aware reward learned from, and the oracle,
which it does not know.

    weights     VQ : MQ : TA as in Table 5, and 1 : 1 : 1
    one         each weight alone, rising: does it move its own dimension?
    scale       w of Eq. 11
    interval    the highest t that is guided
    reward      rewards trained on labels by Bradley-Terry, and on clean clips
    on top      of CFG, and of a policy aligned by Flow-DPO
    accuracy    of the rewards on pairs, by t
    told        attributes that the reward's TA can tell apart at each t (observer.py)
"""

from functools import partial
from itertools import product

import torch

from data import DIMENSIONS, Vocabulary
from judge import noisy_scores, over_seeds
from model import load_velocity
from nrg import SteeredPolicy, load_noisy_reward
from real_data.toy_pairs import annotated_pairs
from reward import accuracies_without_ties
from runtime.checkpoint import WEIGHTS
from sample import CFG, NRG_EPS, NRG_INTERVAL, NRG_SCALE
from studies import observer, policies
from studies.policies import ATTRIBUTES, JUDGES, TRUE_SCORES, TRUE_WINS, WINS_BY_JUDGE
from studies.report.charts import Chart, Series
from studies.report.tables import Column, matching, means, melted, tabulate

SETS = {"large": 256}
EQUAL = (1, 1, 1)
TABLE_5 = ((0, 0, 1), (0.1, 0.1, 0.8), (0.1, 0.1, 0.6), (0.5, 0.5, 0), EQUAL)
RISING = (0.5, 1, 2)
SCALES = (0.25, 0.5, 2, 4)  # times the default
HIGHEST = (0.8, 0.9, 1.0)  # t that is guided, beside the default
VARIANTS = {"noised": {}, "labels": {"target": "labels"}, "clean": {"time-shift": 0}}
CHOICES = (EQUAL, (0, 1, 0), (0, 0, 1))  # weights that every variant is judged at


def jobs(settings):
    queue = {"cfg": partial(classifier_free, settings)}
    for variant, seed in product(VARIANTS, range(settings.seeds)):
        queue[f"{variant}-{seed}"] = partial(reward_rows, settings, variant, seed)
    for seed in range(settings.seeds):
        queue[f"told-{seed}"] = partial(told_rows, settings, seed)
        count = min(256, settings.eval_pairs)
        queue[f"observer-{seed}"] = partial(observer.audited, seed, count)
    return queue


def name_of(weights):
    return "nrg-" + ":".join(f"{w:g}" for w in weights)


def alone(i, weight):
    """Weights of dimension i alone."""
    weights = [0, 0, 0]
    weights[i] = weight
    return tuple(weights)


def reward_of(settings, variant, seed):
    """The noise-aware reward of a variant, trained."""
    flags = {"algo": "nrg", "seed": seed} | VARIANTS[variant]
    reward, _ = load_noisy_reward(policies.train(settings, f"{variant}-{seed}", flags))
    return reward.to(settings.device)


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
    reward = reward_of(settings, variant, seed)
    rows = accuracy_rows(settings, reward, variant, seed)

    def add(study, weights, **facts):
        facts |= {"study": study, "variant": variant, "seed": seed, "clean": variant == "clean"}
        rows.extend(guided_rows(settings, reward, weights, **facts))

    if variant != "noised":
        for weights in CHOICES:
            add("reward", weights)
        return rows
    for weights in TABLE_5:
        add("weights", weights)
    for i, weight in product(range(3), RISING):
        add("one", alone(i, weight))
    for factor in SCALES:
        add("scale", EQUAL, scale=factor * NRG_SCALE)
    for highest, weights in product(HIGHEST, (EQUAL, (0, 0, 1))):
        add("interval", weights, highest=highest)
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


def told_rows(settings, seed):
    """What the default reward, trained by its own job, can tell apart."""
    path = settings.folder("nrg") / f"noised-{seed}" / "last.pt"
    reward, words = load_noisy_reward(path)
    reader = partial(observer.alignment, reward.to(settings.device), words, settings.device)
    rows = observer.told_apart(reader, seed, min(256, settings.eval_pairs))
    return [row | {"variant": "noised"} for row in rows]


# ---------------------------------------------------------------------------------------------
# The report


def label_of(weights):
    return " : ".join(f"{w:g}" for w in weights)


def report(settings, rows):
    seeds = len({row["seed"] for row in rows})
    low, high = NRG_INTERVAL
    introduction = [
        "Win rates over the unguided base model on the same prompts and noise, and mean true",
        f"scores; mean ± standard deviation over {seeds} rewards. CFG 1 where none is named,",
        f"scale {NRG_SCALE:g}, eps {NRG_EPS:g}, guided for t from {low:g} to {high:g}.",
    ]
    return {
        "title": "Flow-NRG on the toy world",
        "introduction": introduction,
        "tables": tables(rows),
        "pictures": {"nrg": charts(rows), "observer": noise_charts(rows)},
    }


def scale_lines():
    """{label: query} of weights 1 : 1 : 1 at each scale."""
    lines = {}
    for factor in sorted((*SCALES, 1)):
        query = {"study": "scale", "scale": factor * NRG_SCALE}
        if factor == 1:
            query = {"study": "weights", "method": "nrg-1:1:1"}
        lines[f"scale {factor * NRG_SCALE:g}"] = query
    return lines


def tables(rows):
    columns = [*TRUE_WINS, *TRUE_SCORES]
    weights = {label_of(w): {"study": "weights", "method": name_of(w)} for w in TABLE_5}
    weights["no guidance, CFG 2"] = {"study": "weights", "method": f"CFG {CFG:g}, no NRG"}
    choices = [alone(i, weight) for i, weight in product(range(3), RISING)]
    single = {label_of(w): {"study": "one", "method": name_of(w)} for w in choices}

    settings = scale_lines()
    for highest in HIGHEST:
        query = {"study": "interval", "method": "nrg-1:1:1", "highest": highest}
        settings[f"scale {NRG_SCALE:g}, guided up to t = {highest:g}"] = query

    sources = "VideoReward's scores", "people's labels", "clean clips only"
    variants = {}
    for (variant, source), w in product(zip(VARIANTS, sources), CHOICES):
        study = "reward"
        if variant == "noised":
            study = "one" if w == (0, 1, 0) else "weights"
        query = {"study": study, "variant": variant, "method": name_of(w)}
        variants[f"{source}, {label_of(w)}"] = query

    names = {"dpo": "Flow-DPO", "dpo+nrg-1:1:1": "Flow-DPO and Flow-NRG 1 : 1 : 1"}
    top = {}
    for cfg, method in product((1.0, CFG), names):
        top[f"{names[method]}, CFG {cfg:g}"] = {"study": "on top", "method": method, "cfg": cfg}
    query = {"study": "on top", "method": "cfg+nrg-1:1:1"}
    top[f"Flow-NRG 1 : 1 : 1, CFG {CFG:g}"] = query

    ratio = ["VQ : MQ : TA"]
    by_judge = [*WINS_BY_JUDGE, *TRUE_SCORES]
    made = {
        "nrg-weights": tabulate("Table 5: weights", ratio, rows, weights, by_judge),
        "nrg-alone": tabulate("Each weight alone", ratio, rows, single, columns),
        "nrg-settings": tabulate("Scale and interval, 1 : 1 : 1", [""], rows, settings, columns),
        "nrg-rewards": tabulate(
            "What the reward learned from", ["learned from, weights"], rows, variants, columns
        ),
        "nrg-on-top": tabulate("On top of Flow-DPO and of CFG", [""], rows, top, columns),
        "nrg-noise": noise_table(rows),
    }
    accuracies = melted(matching(rows, study="accuracy"), DIMENSIONS)
    lines = {}
    for variant, name in product(VARIANTS, DIMENSIONS):
        lines[f"{variant}, {name}"] = {"variant": variant, "name": name}
    times = sorted({row["t"] for row in accuracies})
    columns = [Column(f"t {t:g}", "value", {"t": t}) for t in times]
    title = "Pair accuracy of the reward by noise (unseen prompts, without ties)"
    made["nrg-accuracy"] = tabulate(title, [""], accuracies, lines, columns)
    return made


def charts(rows):
    accuracies = matching(rows, study="accuracy", variant="noised")
    times = sorted({row["t"] for row in accuracies})
    curves = [Series(name, times, means(accuracies, name, "t", times)) for name in DIMENSIONS]
    panels = [Chart("Pair accuracy of the reward", curves, "t", "accuracy", level=0.5)]
    scales = [factor * NRG_SCALE for factor in sorted((*SCALES, 1))]
    for by in JUDGES:
        curves = []
        for name in DIMENSIONS:
            points = [over_seeds(rows, name, judge=by, **query) for query in scale_lines().values()]
            curves.append(Series(name, scales, points))
        title = f"Guided 1 : 1 : 1, judged by {by}"
        panels.append(Chart(title, curves, "scale w", "win rate", axis="log", level=0.5))
    return panels


READERS = {
    "ideal": "ideal observer",
    **{f"probe {n}": f"linear probe on {n} blocks" for n in observer.BLOCKS},
    "noised": "noise-aware reward",
}


def noise_table(rows):
    """Two-way accuracy of each reader for each attribute at each t."""
    told = melted(matching(rows, study="told"), ATTRIBUTES)
    lines = {}
    for name, reader in product(ATTRIBUTES, READERS):
        lines[name, READERS[reader]] = {"variant": reader, "name": name}
    columns = [Column(f"t {t:g}", "value", {"t": t}) for t in observer.TIMES]
    title = "Attributes told apart under noise"
    return tabulate(title, ["attribute", "reader"], told, lines, columns)


def noise_charts(rows):
    told = matching(rows, study="told")
    charts = []
    for name in ATTRIBUTES:
        series = []
        for reader, label in READERS.items():
            points = means(told, name, "t", observer.TIMES, variant=reader)
            series.append(Series(label, observer.TIMES, points))
        charts.append(Chart(name.capitalize(), series, "t", "two-way accuracy", level=0.5))
    return charts
