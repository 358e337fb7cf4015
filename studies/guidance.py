"""Flow-NRG on the toy world (paper, section 4.4): Table 5, and Table 7 of the paper's first version.

Every row samples the same prompts from the same noise as the base model, whose clips it is compared with. The judges
are VideoReward, which the noise-aware reward that guides has learned from, and the oracle, which it does not know.

    weights     VQ : MQ : TA as in Table 5, and 1:1:1
    one         each weight alone, rising: does it move its own dimension?
    scale       w of Eq. 11; and the interval of t that is guided
    reward      trained on labels by Bradley-Terry, on clean clips; pair accuracy by noise
    told        which attributes the reward's TA can tell, by noise, beside what can be told (observer.py)
    on top      of CFG, and of a policy aligned by Flow-DPO
"""

from functools import partial
from itertools import product

import torch

import tasks
import trainer
from data import DIMENSIONS, Vocabulary
from judge import noisy_scores, over_seeds
from model import load_velocity
from nrg import SteeredPolicy, load_noisy_reward
from real_data.toy_pairs import annotated_pairs
from reward import accuracies_without_ties
from runtime.checkpoint import WEIGHTS
from sample import CFG, NRG_EPS, NRG_INTERVAL, NRG_SCALE
from settings import Nrg
from studies import observer
from studies.jobs import ATTRIBUTES, JUDGES, base_scores, judge, rows_of, settings_for
from studies.report.charts import Chart
from studies.report.tables import Table, plus_minus

SETS = {"large": 256}
TABLE_5 = ((0, 0, 1), (0.1, 0.1, 0.8), (0.1, 0.1, 0.6), (0.5, 0.5, 0), (1, 1, 1))
RISING = (0.5, 1, 2)
SCALES = (0.25, 0.5, 2, 4)  # times the default
HIGHEST = (0.8, 0.9, 1.0)  # t that is guided, beside the default
VARIANTS = {"noised": [], "labels": ["--target=labels"], "clean": ["--time-shift=0"]}


def name_of(weights):
    return "nrg-" + ":".join(f"{w:g}" for w in weights)


def reward_name(variant, seed):
    """Of a variant's reward: its job, and its folder in --work."""
    return f"{variant.replace(' ', '-')}-{seed}"


def reward_of(variant, seed, args, device):
    """The noise-aware reward of a variant, trained here."""
    out = args.work / "nrg" / reward_name(variant, seed)
    settings = settings_for(["--algo=nrg", *VARIANTS[variant], f"--seed={seed}"], out, args)
    trainer.fit(tasks.TASKS["nrg"](settings, device), settings, device)
    return load_noisy_reward(out / "last.pt")[0].to(device)


def guided(
    reward,
    weights,
    args,
    device,
    scale=NRG_SCALE,
    interval=NRG_INTERVAL,
    cfg=1.0,
    checkpoint=WEIGHTS / "base.pt",
    clean=False,
):
    """`judge` of a checkpoint under guidance. A reward trained on clean clips knows no other time than 0."""

    def at_0(x_t, t, y):
        return reward(x_t, torch.zeros_like(t), y)

    def steered(model, cfg):
        by = at_0 if clean else reward
        return SteeredPolicy(model, by, weights, scale, NRG_EPS, interval, cfg)

    return judge(checkpoint, args, device, SETS, (cfg,), steered)


def steered_rows(variant, seed, args, device):
    """All rows of one reward: the default's many, three of any other."""
    reward = reward_of(variant, seed, args, device)
    base = base_scores(args, device, SETS, (1.0, CFG))
    rows = accuracy_rows(reward, variant, seed, args, device)

    def add(study, weights, method=None, **settings):
        scores = guided(reward, weights, args, device, clean=variant == "clean", **settings)
        facts = {
            "study": study,
            "method": method or name_of(weights),
            "variant": variant,
            "seed": seed,
        }
        facts["highest"] = settings.get("interval", NRG_INTERVAL)[1]
        rows.extend(rows_of(scores, base, **facts, scale=settings.get("scale", NRG_SCALE)))

    if variant != "noised":
        for weights in ((1, 1, 1), (0, 1, 0), (0, 0, 1)):
            add("reward", weights)
        return rows
    for weights in TABLE_5:
        add("weights", weights)
    for i in range(3):
        for weight in RISING:
            add("one", tuple(weight * (i == k) for k in range(3)))
    for factor in SCALES:
        add("scale", (1, 1, 1), scale=factor * NRG_SCALE)
    for highest, weights in product(HIGHEST, ((1, 1, 1), (0, 0, 1))):
        add("interval", weights, interval=(0.0, highest))
    add("on top", (1, 1, 1), "cfg+nrg-1:1:1", cfg=CFG)
    dpo = args.work / "nrg" / f"dpo-{seed}"
    settings = settings_for([f"--seed={seed}"], dpo, args)
    trainer.fit(tasks.TASKS["dpo"](settings, device), settings, device)
    for cfg in (1.0, CFG):
        add("on top", (0, 0, 0), "dpo", checkpoint=dpo / "last.pt", cfg=cfg)
        add("on top", (1, 1, 1), "dpo+nrg-1:1:1", checkpoint=dpo / "last.pt", cfg=cfg)
    return rows


def classifier_free(args, device):
    """Table 5's rows for comparison: the base model, and the base model with CFG, over itself without."""
    base, facts = (
        base_scores(args, device, SETS, (1.0, CFG)),
        {"study": "weights", "variant": "none", "seed": 0},
    )
    with_cfg, without = ({f"large {CFG:g}": base[f"large {cfg:g}"]} for cfg in (CFG, 1.0))
    plain = {"large 1": base["large 1"]}
    rows = rows_of(plain, plain, **facts, method="base")
    return rows + rows_of(with_cfg, without, **facts, method=f"CFG {CFG:g}, no NRG")


def accuracy_rows(reward, variant, seed, args, device):
    """Accuracy without ties on pairs of prompts never seen in training, at several times."""
    base, words = load_velocity(WEIGHTS / "base.pt")
    pairs = annotated_pairs(
        min(1000, args.eval_pairs), ["validation"], 98765, base.config, Vocabulary(words)
    )
    rows = []
    for t, scores in noisy_scores(reward, pairs, device, seed=0).items():
        right = accuracies_without_ties(scores[:, 0] - scores[:, 1], pairs.label)
        rows.append(
            {
                "study": "accuracy",
                "method": "nrg",
                "variant": variant,
                "seed": seed,
                "t": t,
                **right,
            }
        )
    return rows


def told_rows(variant, seed, args, device):
    """Rows of observer.told_apart for a reward that `steered_rows` trained."""
    reward, words = load_noisy_reward(args.work / "nrg" / reward_name(variant, seed) / "last.pt")
    reader = partial(observer.alignment, reward.to(device), words, device)
    return [
        row | {"variant": variant}
        for row in observer.told_apart(reader, seed, min(256, args.eval_pairs))
    ]


def folder(args):
    return f"nrg-{args.steps or Nrg.steps}-{args.eval_prompts or 'all'}"


def jobs(args, device):
    made = {"cfg": partial(classifier_free, args, device)}
    for variant, seed in product(VARIANTS, range(args.seeds)):
        made[reward_name(variant, seed)] = partial(steered_rows, variant, seed, args, device)
    for seed in range(args.seeds):
        made[f"told-{seed}"] = partial(told_rows, "noised", seed, args, device)
        made[f"observer-{seed}"] = partial(observer.audited, seed, min(256, args.eval_pairs))
    return made


# ---------------------------------------------------------------------------------------------
# The report


def report(args, rows):
    figure = partial(over_seeds, rows)

    def cells(columns, **wanted):
        return [plus_minus(figure(column, **wanted)) for column in columns]

    possible = ("TA_ceiling", "TA_share")
    scores = [*(f"{n}_score" for n in DIMENSIONS), *possible, *ATTRIBUTES]
    columns = [
        *(f"{by} {n}" for by in (*JUDGES, "true") for n in DIMENSIONS),
        *possible,
        *ATTRIBUTES,
    ]

    def table(title, wanted_of):
        rows = []
        for name, wanted in wanted_of.items():
            wins = [cell for by in JUDGES for cell in cells(DIMENSIONS, judge=by, **wanted)]
            rows.append([name, *wins, *cells(scores, judge="oracle", **wanted)])
        return Table(title, ["", *columns], rows)

    methods = ["base", *map(name_of, TABLE_5), f"CFG {CFG:g}, no NRG"]
    tables = [
        table(
            "Table 5: weights VQ:MQ:TA",
            {name: {"study": "weights", "method": name} for name in methods},
        )
    ]
    alone = [name_of(tuple(w * (i == k) for k in range(3))) for i in range(3) for w in RISING]
    tables.append(
        table("Each weight alone", {name: {"study": "one", "method": name} for name in alone})
    )
    sweep = {f"scale {f * NRG_SCALE:g}": {"study": "scale", "scale": f * NRG_SCALE} for f in SCALES}
    sweep[f"scale {NRG_SCALE:g}"] = {"study": "weights", "method": "nrg-1:1:1"}
    tables.append(
        table(
            "Scale, 1:1:1", dict(sorted(sweep.items(), key=lambda item: float(item[0].split()[1])))
        )
    )
    ways = {}
    for weights, highest in product(((1, 1, 1), (0, 0, 1)), sorted((*HIGHEST, NRG_INTERVAL[1]))):
        study = "weights" if highest == NRG_INTERVAL[1] else "interval"
        ways[f"{name_of(weights)}, t up to {highest:g}"] = {
            "study": study,
            "method": name_of(weights),
            "highest": highest,
        }
    tables.append(table("Interval", ways))
    kinds = {}
    for variant in VARIANTS:
        for weights in ((1, 1, 1), (0, 1, 0), (0, 0, 1)):
            study = (
                "reward" if variant != "noised" else "one" if weights == (0, 1, 0) else "weights"
            )
            wanted = {"study": study, "variant": variant, "method": name_of(weights)}
            kinds[f"{variant}, {name_of(weights)}"] = wanted
    title = "The reward: what it learned from"
    tables.append(table(title, kinds))
    top = {
        f"{m}, CFG {c:g}": {"study": "on top", "method": m, "cfg": c}
        for c in (1.0, CFG)
        for m in ("dpo", "dpo+nrg-1:1:1")
    }
    top[f"nrg-1:1:1, CFG {CFG:g}"] = {"study": "on top", "method": "cfg+nrg-1:1:1"}
    tables.append(table("On top of Flow-DPO and of CFG (over the base model at the same CFG)", top))

    times = sorted({row["t"] for row in rows if row["study"] == "accuracy"})
    curves = {
        (variant, n): [figure(n, study="accuracy", variant=variant, t=t) for t in times]
        for variant, n in product(VARIANTS, DIMENSIONS)
    }
    lines = [[f"{variant}, {n}", *map(plus_minus, curve)] for (variant, n), curve in curves.items()]
    title = "Pair accuracy of the reward by noise (unseen prompts, without ties)"
    tables.append(Table(title, ["", *(f"t {t:g}" for t in times)], lines))

    readers, seen = ("ideal", *(f"probe {n}" for n in observer.BLOCKS), "noised"), observer.TIMES
    told = {
        (name, reader): [figure(name, study="told", variant=reader, t=t) for t in seen]
        for name, reader in product(ATTRIBUTES, readers)
    }
    title = "What is told under noise: own prompt above one with another colour, shape or direction"
    lines = [
        [f"{name}, {reader}", *map(plus_minus, curve)] for (name, reader), curve in told.items()
    ]
    tables.append(Table(title, ["", *(f"t {t:g}" for t in seen)], lines))
    audits = [
        Chart(
            name,
            [(reader, seen, *zip(*told[name, reader])) for reader in readers],
            "t",
            "told apart",
            level=0.5,
        )
        for name in ATTRIBUTES
    ]

    series = [(n, times, *zip(*curves["noised", n])) for n in DIMENSIONS if times]
    charts = [Chart("pair accuracy", series, "t", "accuracy", level=0.5)]
    for by in JUDGES:
        factors = sorted((*SCALES, 1))
        wanted = [sweep[f"scale {f * NRG_SCALE:g}"] for f in factors]
        points = {n: [figure(n, judge=by, **w) for w in wanted] for n in DIMENSIONS}
        series = [(n, [f * NRG_SCALE for f in factors], *zip(*points[n])) for n in DIMENSIONS]
        charts.append(Chart(f"1:1:1, {by}", series, "scale", "win rate", log=True, level=0.5))
    scale, eps, (low, high) = NRG_SCALE, NRG_EPS, NRG_INTERVAL
    return {
        "rows": rows,
        "title": "Flow-NRG on the toy world",
        "introduction": [
            f"Win rates over the unguided base model on the same {SETS['large']} prompts and noise, CFG 1 unless said,",
            f"and mean true scores; mean ± sd over {args.seeds} rewards. Scale {scale:g}, eps {eps:g}, guided for",
            f"t from {low:g} to {high:g}. TA ceiling: the most that can be won, as base clips that have all of their",
            "prompt right are at best equalled; TA share: how much of the way there from .5 is gone. colour, shape,",
            "direction: the share of clips that have the right one.",
        ],
        "tables": tables,
        "pictures": {"nrg": charts, "observer": audits},
    }
