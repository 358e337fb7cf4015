"""How far to trust a judge: over-optimisation of learned rewards (not in the paper).

VideoRewards learn from different numbers of labelled pairs, and policies are aligned with them.
Along the way every policy is scored by its own judge and by the oracle, which shows where the
learned score goes on rising and the true one falls.

    judges      0.3, 1, 3, 10 and 100 % of the pairs of the default VideoReward; one that learned
                without prompts; the mean and the minimum of three, on 1 % each
    best of n   no training: of n clips of the base model the one that a judge likes best
    rounds      Flow-DPO on the policy's own clips; for every judge, the rest for 1 % alone
    dpo         Flow-DPO once, on rendered pairs
    nft, grpo   DiffusionNFT and Flow-GRPO on the policy's own clips
    remedies    a larger beta, a KL weight, new labels in every second round

People compare 64 clips of every round with the base model's; their labels choose the round to stop
at. The laws are those of Gao et al. (2023): R(d) = d (alpha - beta d) for best of n, and
R(d) = d (alpha - beta log d) for training, where d is the square root of the KL divergence or of
the drift |v - v_ref|^2."""

from functools import partial
from itertools import product

import numpy as np
import torch

import world
from data import DIMENSIONS, Vocabulary, step_rng
from judge import learned_scores, over_seeds, pair_scores, sample_prompts
from model import load_velocity
from real_data.toy_pairs import annotated_pairs
from reward import accuracies_without_ties, load_reward
from runtime.checkpoint import WEIGHTS
from studies import policies
from studies.report.charts import Chart, Series
from studies.report.tables import Column, matching, means, tabulate

PAIRS = {"0.3%": 72, "1%": 240, "3%": 720, "10%": 2400}  # of the 24,000 of weights/reward.pt
STEPS = {72: 82, 240: 150, 720: 260, 2400: 474}  # in proportion to the square root of the pairs
WEAK = "1%"
JUDGES = (WEAK, "100%", "0.3%", "3%", "10%", "blind", "mean of 3", "minimum of 3")
ROUNDS, ROUND = 12, 25  # rounds, and steps of each
ONLINE = {"rounds": ROUNDS, "steps": ROUNDS * ROUND}
ARMS = {  # of the weak judge
    "dpo": {"algo": "dpo", "steps": ROUNDS * ROUND},
    "nft": {"algo": "nft", **ONLINE},
    "grpo": {"algo": "grpo", **ONLINE},
    "beta 300": {"algo": "dpo", "beta": 300, **ONLINE},
    "beta 1000": {"algo": "dpo", "beta": 1000, **ONLINE},
    "nft, kl 0.1": {"algo": "nft", "kl": 0.1, **ONLINE},
    "new labels": {"algo": "dpo", "refresh": 2, **ONLINE},
}
PROMPTS, CLIPS = 32, 4  # held-out prompts of every policy, and clips of each
BEST_OF = (1, 2, 4, 8, 16, 32, 64)
LABELS = 64  # pairs that people compare after every round
NOISE_SEED = 987_000


def jobs(settings):
    queue = {}
    for seed in range(settings.seeds):
        for judge in JUDGES:
            flags = {"algo": "dpo", **ONLINE}
            queue[f"rounds-{judge}-{seed}"] = partial(run, settings, "rounds", flags, judge, seed)
        for arm, flags in ARMS.items():
            queue[f"{arm}-{seed}"] = partial(run, settings, arm, flags, WEAK, seed)
        queue[f"best-of-n-{seed}"] = partial(best_of_n, settings, seed)
    return queue


# ---------------------------------------------------------------------------------------------
# Judges


class Blind(torch.nn.Module):
    """A VideoReward that never sees the prompt."""

    def __init__(self, reward):
        super().__init__()
        self.reward, self.config = reward, reward.config

    def normalised(self, video, y):
        return self.reward.normalised(video, torch.zeros_like(y))


class Ensemble(torch.nn.Module):
    """The mean or the minimum of the z-scores of several VideoRewards."""

    def __init__(self, rewards, pessimistic):
        super().__init__()
        self.rewards, self.pessimistic = torch.nn.ModuleList(rewards), pessimistic
        self.config = rewards[0].config

    def normalised(self, video, y):
        scores = torch.stack([reward.normalised(video, y) for reward in self.rewards])
        return scores.amin(0) if self.pessimistic else scores.mean(0)


def without_prompts(batch):
    return batch | {"y": torch.zeros_like(batch["y"])}


def judge_path(settings, name, seed):
    """The checkpoint of a single VideoReward, trained if it is not there."""
    if name == "100%":
        return WEIGHTS / "reward.pt"
    pairs = PAIRS["10%" if name == "blind" else name]
    folder = f"judge-{name}-{seed}"
    path = settings.folder("hacking") / folder / "last.pt"
    if not path.exists():
        steps = settings.steps or STEPS[pairs]
        flags = {"algo": "reward", "pairs": pairs, "seed": seed, "steps": steps}
        change_batch = without_prompts if name == "blind" else None
        policies.train(settings, folder, flags, change_batch=change_batch)
    return path


def judge_of(settings, name, seed):
    """A frozen judge: any module with normalised(videos, y) -> z-scores (B, 3)."""
    if name.endswith("of 3"):
        members = [judge_of(settings, WEAK, seed + 10 * i) for i in range(3)]
        return Ensemble(members, name.startswith("minimum"))
    reward, _ = load_reward(judge_path(settings, name, seed))
    reward = reward.to(settings.device).requires_grad_(False)
    return Blind(reward) if name == "blind" else reward


def accuracy_row(settings, judge, name, seed):
    """Accuracies without ties on labelled pairs of prompts that no judge has seen."""
    count = min(1000, settings.eval_pairs)
    pairs = annotated_pairs(count, ["validation"], 98765, judge.config, Vocabulary())
    scores = pair_scores(judge.normalised, pairs, settings.device)
    accuracies = accuracies_without_ties(scores[:, 0] - scores[:, 1], pairs.label)
    return {"study": "accuracy", "judge": name, "seed": seed} | accuracies


# ---------------------------------------------------------------------------------------------
# Runs


def prompts_of(settings):
    """Attributes (N, 3) of the prompts of this study, CLIPS times each."""
    prompts = world.split_prompts("train", "validation")
    count = min(PROMPTS, settings.eval_prompts or PROMPTS)
    chosen = torch.linspace(0, len(prompts) - 1, count).long()
    return prompts[chosen].repeat_interleave(CLIPS, 0)


def samples(settings, checkpoint, seed=NOISE_SEED):
    """Clips of a checkpoint for the prompts of this study at CFG 1."""
    model, words = load_velocity(checkpoint)
    model, prompts = model.to(settings.device), prompts_of(settings)
    return sample_prompts(model, words, prompts, seed, settings.device)


def scores_of(settings, videos, judge):
    """True scores and those of a judge, (N, 3) each."""
    prompts, words = prompts_of(settings), Vocabulary().words
    learned = learned_scores(judge, words, videos, prompts, settings.device)
    return world.oracle(videos, prompts), learned


def true_z(scores):
    """True z-scores (N,), the mean of the three dimensions."""
    return ((scores - world.TRUE_MEAN) / world.TRUE_STD).mean(1)


def run(settings, arm, flags, name, seed):
    """Rows of one policy: its scores after each round by its judge and by the oracle."""
    judge = judge_of(settings, name, seed)
    base = samples(settings, WEIGHTS / "base.pt")
    base_true, base_learned = scores_of(settings, base, judge)
    base_spread = policies.diversity(base, prompts_of(settings))
    facts = {"study": "run", "arm": arm, "judge": name, "seed": seed}
    rows = [accuracy_row(settings, judge, name, seed)] if arm == "rounds" else []
    length = (settings.steps or ROUNDS * ROUND) // ROUNDS

    def judged(step, checkpoint):
        videos = samples(settings, checkpoint)
        true, learned = scores_of(settings, videos, judge)
        row = facts | {"round": step // length, "score": true.mean().item()}
        row["drift"] = policies.drift(checkpoint, settings.device)
        row |= zip(("VQ", "MQ", "TA"), true.mean(0).tolist())
        row["true"] = (true_z(true) - true_z(base_true)).mean().item()
        row["learned"] = (learned - base_learned).mean().item()
        row["true_wins"] = (true_z(true) > true_z(base_true)).float().mean().item()
        row["learned_wins"] = (learned.mean(1) > base_learned.mean(1)).float().mean().item()
        row["labels"] = preference(true, base_true, seed, step)
        for name, value in policies.diversity(videos, prompts_of(settings)).items():
            row[name] = value / base_spread[name]
        rows.append(row)

    flags = flags | {"seed": seed, "steps": length * ROUNDS}
    if "rounds" not in flags or "refresh" in flags:
        # these take a checkpoint: of rendered pairs once, or to go on training it
        flags["reward"], judge_in_rounds = judge_path(settings, name, seed), None
    else:
        judge_in_rounds = judge
    ends = [length * number for number in range(1, ROUNDS)]
    folder = f"{arm}-{name}-{seed}"
    policies.train(settings, folder, flags, ends, judged, judge=judge_in_rounds)
    return rows


def preference(true, base_true, seed, step):
    """What people say of LABELS clips of a policy beside the base model's, the same ones after each
    round: mean label in [-1, 1]."""
    index = torch.randperm(len(true), generator=step_rng(NOISE_SEED + seed, 0))[:LABELS]
    labels, _ = world.annotate(true[index], base_true[index], step_rng(NOISE_SEED + seed, step))
    return labels.float().mean().item()


def best_of_n(settings, seed):
    """Rows of best of n by every judge, from the same clips."""
    draws = []
    for i in range(max(BEST_OF)):
        noise = NOISE_SEED if i == 0 else NOISE_SEED + 1000 * (seed + 1) + i
        draws.append(samples(settings, WEIGHTS / "base.pt", noise))
    true = torch.stack([world.oracle(videos, prompts_of(settings)) for videos in draws])
    rows = []
    for name in JUDGES:
        judge = judge_of(settings, name, seed)
        learned = torch.stack([scores_of(settings, videos, judge)[1] for videos in draws])
        for n in BEST_OF:
            best = learned[:n].mean(2).argmax(0)  # (N,)
            clip = torch.arange(len(best))
            row = {"study": "best of n", "judge": name, "seed": seed, "n": n}
            row |= {"drift": policies.nats(n), "score": true[best, clip].mean().item()}
            row["true"] = (true_z(true[best, clip]) - true_z(true[0])).mean().item()
            row["learned"] = (learned[best, clip] - learned[0]).mean().item()
            rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------
# The laws


def fitted(rows, column, logarithmic):
    """(alpha, beta) of R(d) = d (alpha - beta d), or with log d, by least squares; d is the square
    root of a row's drift."""
    rows = [row for row in rows if row["drift"] > 0]
    distance = np.sqrt([row["drift"] for row in rows])
    gain = np.array([row[column] for row in rows])
    slope = np.log(distance) if logarithmic else distance
    design = np.stack((distance, -distance * slope), 1)
    return np.linalg.lstsq(design, gain, rcond=None)[0]


def law_rows(rows):
    """The fits of each run and of each best of n, by seed."""
    runs = {}
    for row in rows:
        if row["study"] == "best of n" or row.get("arm") == "rounds":
            runs.setdefault((row["study"], row["judge"], row["seed"]), []).append(row)
    laws = []
    for (study, judge, seed), own in runs.items():
        law = {"study": "law", "of": study, "judge": judge, "seed": seed}
        for column in ("true", "learned"):
            alpha, beta = fitted(own, column, logarithmic=study == "run")
            law |= {f"{column}_alpha": alpha, f"{column}_beta": beta}
        laws.append(law)
    return laws


def summary_rows(rows):
    """A row for each run: its last round, its best one and the one that the labels choose."""
    runs = {}
    for row in matching(rows, study="run"):
        runs.setdefault((row["arm"], row["judge"], row["seed"]), []).append(row)
    summaries = []
    for run_rows in runs.values():
        best = max(run_rows, key=lambda row: row["score"])
        stopped = max(run_rows, key=lambda row: row["labels"])
        summary = run_rows[-1] | {"study": "summary", "peak": best["round"], "best": best["score"]}
        summary |= {"stop": stopped["round"], "stopped": stopped["score"]}
        summary["lost"] = best["score"] - stopped["score"]
        summary["fall"] = best["score"] - summary["score"]
        summaries.append(summary)
    return summaries


# ---------------------------------------------------------------------------------------------
# The report


def report(settings, rows):
    seeds = len({row["seed"] for row in rows})
    rows = rows + law_rows(rows) + summary_rows(rows)
    introduction = [
        f"{PROMPTS} prompts, {CLIPS} clips each, CFG 1; mean ± standard deviation over {seeds} seeds.",
        "Gains are z-scores above the base model's, the mean of the three dimensions.",
    ]
    return {
        "title": "How far to trust a judge",
        "introduction": introduction,
        "tables": tables(rows),
        "pictures": {"hacking": charts(rows)},
    }


def tables(rows):
    judges = {name: {"judge": name} for name in JUDGES}
    arms = {("rounds", name): {"arm": "rounds", "judge": name} for name in JUDGES}
    arms |= {(arm, WEAK): {"arm": arm, "judge": WEAK} for arm in ARMS}
    accuracy = [Column(name, name) for name in DIMENSIONS]
    summary = [
        Column("learned gain", "learned"),
        Column("true gain", "true"),
        Column("learned wins", "learned_wins"),
        Column("true wins", "true_wins"),
        Column("true mean", "score", digits=3),
        Column("best round's", "best", digits=3),
        Column("best round", "peak", digits=0),
        Column("64 labels stop at", "stop", digits=0),
        Column("and lose", "lost", digits=3),
        Column("drift", "drift", digits=3, spread=False),
    ]
    spread = [Column(name, f"spread_{name}") for name in ("start", "path", "size", "pixels")]
    names = {"true_alpha": "alpha", "true_beta": "beta"}
    names |= {"learned_alpha": "learned alpha", "learned_beta": "learned beta"}
    law = [Column(head, name) for name, head in names.items()]
    columns = []
    for kind, n in product(("learned", "true"), (4, 16, 64)):
        columns.append(Column(f"{kind}, n {n}", kind, {"n": n}))
    laws = matching(rows, study="law")
    summaries = matching(rows, study="summary")
    return {
        "hacking-judges": tabulate(
            "Accuracy of the judges without ties, new prompts",
            ["judge"],
            matching(rows, study="accuracy"),
            judges,
            accuracy,
        ),
        "hacking": tabulate("After the last round", ["arm", "judge"], summaries, arms, summary),
        "hacking-best": tabulate(
            "Gain by best of n", ["judge"], matching(rows, study="best of n"), judges, columns
        ),
        "hacking-laws": tabulate(
            "R(d) = d (alpha - beta log d), Flow-DPO in rounds",
            ["judge"],
            matching(laws, of="run"),
            judges,
            law,
        ),
        "hacking-laws-best": tabulate(
            "R(d) = d (alpha - beta d), best of n",
            ["judge"],
            matching(laws, of="best of n"),
            judges,
            law,
        ),
        "hacking-spread": tabulate(
            "Spread of a prompt's clips as a share of the base model's",
            ["arm", "judge"],
            summaries,
            arms,
            spread,
        ),
    }


def charts(rows):
    """Learned and true gain by distance with their laws, and the true gain by round."""
    panels = []
    for study, judge in product(("run", "best of n"), (WEAK, "10%", "100%")):
        query = {"judge": judge} | ({"arm": "rounds"} if study == "run" else {})
        own = matching(rows, study=study, **query)
        key = "round" if study == "run" else "n"
        places = sorted({row[key] for row in own})
        drifts = [over_seeds(own, "drift", **{key: place})[0] for place in places]
        series = []
        for column in ("learned", "true"):
            series.append(Series(column, drifts, means(own, column, key, places)))
        for column in ("learned", "true"):
            query = {"of": study, "judge": judge}
            alpha = over_seeds(rows, f"{column}_alpha", **query)[0]
            beta = over_seeds(rows, f"{column}_beta", **query)[0]
            xs = np.linspace(0.01, max(drifts) ** 0.5, 30) ** 2
            curve = [(law(x, alpha, beta, study == "run"), 0.0) for x in xs]
            series.append(Series(f"law, {column}", xs.tolist(), curve))
        method = "Flow-DPO in rounds" if study == "run" else "Best of n"
        x = "drift from the base model" if study == "run" else "KL divergence"
        panels.append(Chart(f"{method}, judge of {judge}", series, x, "gain", axis="root"))
    return panels


def law(drift, alpha, beta, logarithmic):
    distance = drift**0.5
    return distance * (alpha - beta * (np.log(distance) if logarithmic else distance))
