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
from judge import learned_scores, pair_scores, sample_prompts
from model import load_velocity
from real_data.toy_pairs import annotated_pairs
from reward import accuracies_without_ties, load_reward
from runtime.checkpoint import WEIGHTS
from studies import policies
from studies.report.charts import Chart, Series, curve
from studies.report.tables import Column, Report, matching, over_seeds, tabulate

PAIRS = {"0.3%": 72, "1%": 240, "3%": 720, "10%": 2400}  # of the 24,000 of weights/reward.pt
STEPS = {72: 82, 240: 150, 720: 260, 2400: 474}  # in proportion to the square root of the pairs
WEAK = "1%"
JUDGES = (*PAIRS, "100%", "blind", "mean of 3", "minimum of 3")
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
LAWS = ("rounds", "best of n")  # arms whose law is fitted
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


def learned_of(settings, videos, judge):
    """A judge's z-scores (N, 3) of clips of the prompts of this study."""
    prompts, words = prompts_of(settings), Vocabulary().words
    return learned_scores(judge, words, videos, prompts, settings.device)


def spread_of(settings, videos):
    return policies.diversity({"prompt": prompts_of(settings), **policies.places(videos)})


def true_z(scores):
    """True z-scores (N,), the mean of the three dimensions."""
    return ((scores - world.TRUE_MEAN) / world.TRUE_STD).mean(1)


def run(settings, arm, flags, name, seed):
    """Rows of one policy: its scores after each round by its judge and by the oracle."""
    judge = judge_of(settings, name, seed)
    base = samples(settings, WEIGHTS / "base.pt")
    base_true = world.oracle(base, prompts_of(settings))
    base_learned = learned_of(settings, base, judge)
    base_spread = spread_of(settings, base)
    facts = {"study": "run", "arm": arm, "judge": name, "seed": seed}
    rows = [accuracy_row(settings, judge, name, seed)] if arm == "rounds" else []
    length = (settings.steps or ROUNDS * ROUND) // ROUNDS

    def judged(step, checkpoint):
        videos = samples(settings, checkpoint)
        true = world.oracle(videos, prompts_of(settings))
        learned = learned_of(settings, videos, judge)
        row = facts | {"round": step // length, "score": true.mean().item()}
        row["drift"] = policies.drift(checkpoint, settings.device)
        row |= zip(DIMENSIONS, true.mean(0).tolist())
        row["true"] = (true_z(true) - true_z(base_true)).mean().item()
        row["learned"] = (learned - base_learned).mean().item()
        row["true_wins"] = (true_z(true) > true_z(base_true)).float().mean().item()
        row["learned_wins"] = (learned.mean(1) > base_learned.mean(1)).float().mean().item()
        row["labels"] = preference(true, base_true, seed, step)
        for spread, value in spread_of(settings, videos).items():
            row[spread] = value / base_spread[spread]
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
        learned = torch.stack([learned_of(settings, videos, judge) for videos in draws])
        for n in BEST_OF:
            best = learned[:n].mean(2).argmax(0)  # (N,)
            clip = torch.arange(len(best))
            row = {"study": "run", "arm": "best of n", "judge": name, "seed": seed, "n": n}
            row |= {"drift": policies.nats(n), "score": true[best, clip].mean().item()}
            row["true"] = (true_z(true[best, clip]) - true_z(true[0])).mean().item()
            row["learned"] = (learned[best, clip] - learned[0]).mean().item()
            rows.append(row)
    return rows


# ---------------------------------------------------------------------------------------------
# The report


def report(rows):
    introduction = (
        f"{PROMPTS} prompts, {CLIPS} clips each, CFG 1; mean ± standard deviation over the seeds. "
        "A gain is a mean z-score above the base model's."
    )
    rows = rows + summaries(rows) + laws(rows)
    return Report("How far to trust a judge", introduction, tables(rows), {"hacking": charts(rows)})


def summaries(rows):
    """The last round of each run with the best one and the one that the labels choose."""
    summaries = []
    for own in by_run([row for row in rows if "round" in row]):
        best = max(own, key=lambda row: row["score"])
        stop = max(own, key=lambda row: row["labels"])
        summary = {"best": best["score"], "best_round": best["round"]}
        summary |= {"stop": stop["round"], "loss": best["score"] - stop["score"]}
        summaries.append(own[-1] | summary | {"study": "summary"})
    return summaries


def laws(rows):
    """The coefficients of each run's law."""
    fits = []
    for own in by_run(matching(rows, study="run")):
        if own[0]["arm"] not in LAWS:
            continue
        row = {key: own[0][key] for key in ("arm", "judge", "seed")}
        for name in ("true", "learned"):
            row[f"{name}_alpha"], row[f"{name}_beta"] = fitted(own, name)
        fits.append(row | {"study": "law"})
    return fits


def by_run(rows):
    """The rows of each run, a list of lists."""
    runs = {}
    for row in rows:
        runs.setdefault((row["arm"], row["judge"], row["seed"]), []).append(row)
    return runs.values()


def fitted(rows, name):
    """(alpha, beta) of the law of a run's rows, by least squares."""
    rows = [row for row in rows if row["drift"] > 0]
    distance = np.sqrt([row["drift"] for row in rows])
    gain = np.array([row[name] for row in rows])
    slope = distance if rows[0]["arm"] == "best of n" else np.log(distance)
    design = np.stack((distance, -distance * slope), 1)
    return np.linalg.lstsq(design, gain, rcond=None)[0]


def tables(rows):
    judges = {judge: {"judge": judge} for judge in JUDGES}
    runs = {("rounds", judge): {"arm": "rounds", "judge": judge} for judge in JUDGES}
    runs |= {(arm, WEAK): {"arm": arm, "judge": WEAK} for arm in ARMS}
    names = {"learned gain": "learned", "true gain": "true", "learned wins": "learned_wins"}
    names |= {"true wins": "true_wins", "true mean": "score", "of the best round": "best"}
    names |= {"best round": "best_round", "labels stop at": "stop", "and lose": "loss"}
    names |= {f"spread of {place}": f"spread_{place}" for place in policies.PLACES}
    last = [Column(head, name) for head, name in names.items()]
    told = [Column(name, name) for name in DIMENSIONS]
    gains, coefficients = [], []
    for kind, n in product(("learned", "true"), (4, 16, 64)):
        gains.append(Column(f"{kind} gain, n {n}", kind, {"n": n}))
    for arm, kind, letter in product(LAWS, ("true", "learned"), ("alpha", "beta")):
        head = f"{arm}, {kind} {letter}"
        coefficients.append(Column(head, f"{kind}_{letter}", {"arm": arm}))
    own = {study: matching(rows, study=study) for study in ("summary", "accuracy", "law")}
    best = matching(rows, arm="best of n", study="run")
    accuracy = "Accuracy of the judges on new prompts, without ties"
    return {
        "hacking": tabulate("After the last round", ["arm", "judge"], own["summary"], runs, last),
        "hacking-judges": tabulate(accuracy, ["judge"], own["accuracy"], judges, told),
        "hacking-best": tabulate("Best of n", ["judge"], best, judges, gains),
        "hacking-laws": tabulate("The laws", ["judge"], own["law"], judges, coefficients),
    }


def charts(rows):
    """Learned and true gains by distance, with the laws through them."""
    charts = []
    for arm, judge in product(LAWS, (WEAK, "10%", "100%")):
        own = matching(rows, arm=arm, judge=judge)
        runs = matching(own, study="run")
        distances = np.linspace(0.01, max(row["drift"] for row in runs) ** 0.5, 30)
        series = []
        for name in ("learned", "true"):
            series.append(curve(name, runs, "round" if arm == "rounds" else "n", name, "drift"))
            alpha, _ = over_seeds(own, f"{name}_alpha", study="law")
            beta, _ = over_seeds(own, f"{name}_beta", study="law")
            slope = np.log(distances) if arm == "rounds" else distances
            law = [(gain, 0.0) for gain in distances * (alpha - beta * slope)]
            series.append(Series(f"{name}, law", (distances**2).tolist(), law))
        title = "Flow-DPO in rounds" if arm == "rounds" else "Best of n"
        x = "drift from the base model" if arm == "rounds" else "KL divergence"
        charts.append(Chart(f"{title}, judge of {judge}", series, x, "gain", axis="root"))
    return charts
