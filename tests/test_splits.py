"""Which prompts every training, every closing table and every study really draws: preference pairs of train, pairs to
judge by of validation, base models of both; hard, the paper's TA-Hard, in no training and in no clip of one.

What is drawn is watched at the toy world's own door, world.draw_clips, and read from the batches; which split a prompt
belongs to is worked out anew (wired.split_of).
"""

from argparse import Namespace

import pytest
import torch
import wired
from wired import BATCH, CPU, split_of, splits_of

import judge
import tasks
import trainer
import world
from data import Vocabulary
from model import load_velocity
from real_data import generated
from real_data.toy_pairs import annotated_pairs
from studies import align, beta, guidance, jobs, observer, reward_model
from studies.jobs import prompts_of

drawn, tiny = wired.drawn, wired.tiny
EVERY = slice(0, BATCH)


def watched_splits(drawn):
    """Splits of all prompts asked for so far, and of all combinations shown, which the watch then forgets."""
    asked, shown = (
        set().union(*(splits_of(getattr(c, name)) for c in drawn)) for name in ("prompt", "shown")
    )
    drawn.clear()
    return asked, shown


def test_the_splits_are_those_of_the_documents():
    every = torch.cartesian_prod(*(torch.arange(n) for n in world.CHOICES)).tolist()
    for name, count in (("train", 72), ("validation", 12), ("hard", 12)):
        rows = world.split_prompts(name).tolist()
        assert len(rows) == count and sorted(rows) == sorted(
            row for row in every if split_of(row) == name
        )


@pytest.mark.parametrize("algo", ["dpo", "sft", "rwr", "reward", "nrg"])
def test_preferences_are_learned_on_training_prompts_alone(tiny, drawn, algo):
    few = ["--eval-pairs=60"] if algo in ("reward", "nrg") else []
    _, task = tiny(f"--algo={algo}", "--pairs=300", *few)
    first, rest = (
        drawn[:2],
        drawn[2:],
    )  # A and B of the pairs to train on, then of those to judge by
    assert all(len(clips) == 300 and splits_of(clips.prompt) == {"train"} for clips in first)
    assert (
        torch.equal(first[0].prompt, first[1].prompt)
        and (first[0].generator != first[1].generator).all()
    )
    for step in range(30):
        assert splits_of(task.batch(step, EVERY)["y"]) == {"train"}
    held = getattr(task, "held", None)
    assert (held is None) == (algo not in ("reward", "nrg"))
    if held:
        (held,) = held.values()
        assert all(len(clips) == 60 and splits_of(clips.prompt) == {"validation"} for clips in rest)
        assert splits_of(held.y) == {"validation"} and len(held) == 60
    assert "hard" not in set().union(*(splits_of(clips.shown) for clips in drawn))


def test_pairs_to_judge_by_are_other_clips_than_those_of_another_seed(tiny):
    held = [tiny("--algo=reward", f"--seed={seed}")[1].held for seed in (0, 1)]
    first, second = (next(iter(pairs.values())) for pairs in held)
    assert not torch.equal(first.y, second.y)


def test_pretraining_sees_train_and_validation_and_nothing_hard(tiny, drawn):
    _, task = tiny("--algo=pretrain", "--batch=200", "--label-dropout=0")
    seen = set().union(*(splits_of(task.batch(step, slice(0, 200))["y"]) for step in range(3)))
    asked, shown = watched_splits(drawn)
    assert seen == asked == shown == {"train", "validation"}


def test_nothing_shows_a_hard_combination_under_another_prompt(drawn):
    rng = torch.Generator().manual_seed(0)
    for split in ("train", "validation"):
        prompts = world.split_prompts(split).repeat(30, 1)
        world.draw_clips(prompts, torch.zeros(len(prompts), dtype=torch.int64), rng)
    asked, shown = watched_splits(drawn)
    assert asked == {"train", "validation"} and "hard" not in shown


# ---------------------------------------------------------------------------------------------
# Closing tables and prompt sets


@pytest.mark.parametrize("algo", ["dpo", "rwr", "pretrain"])
def test_closing_tables_ask_for_every_prompt_once(tiny, monkeypatch, tmp_path, algo):
    asked = []

    def painted(model, x1, y, progress, cfg):
        asked.append(world.prompt_attributes([Vocabulary().decode(row) for row in y]))
        return torch.zeros_like(x1)

    monkeypatch.setattr(judge, "sample_many", painted)
    _, task = tiny(f"--algo={algo}", "--eval-prompts=96")
    tmp_path.joinpath("out").mkdir()
    task.evaluate(task.model, tmp_path / "out")
    every = [
        row
        for name in ("train", "validation", "hard")
        for row in world.split_prompts(name).tolist()
    ]
    assert asked and all(sorted(prompts.tolist()) == sorted(every) for prompts in asked)


def test_prompt_sets_are_what_they_are_called():
    standard, hard, large = (
        prompts_of("standard", 168),
        prompts_of("hard", 24),
        prompts_of("large", 512),
    )
    assert splits_of(standard[:72]) == {"train"} and splits_of(standard[72:84]) == {"validation"}
    assert (
        torch.equal(standard[84:], standard[:84])
        and len({tuple(row) for row in standard.tolist()}) == 84
    )
    assert splits_of(hard) == {"hard"} and len({tuple(row) for row in hard.tolist()}) == 12
    assert len({tuple(row) for row in large.tolist()}) == 96 and torch.equal(
        large, prompts_of("large", 512)
    )
    assert set(jobs.SETS) == {"standard", "hard", "large"} and set(beta.SETS) <= set(jobs.SETS)


@pytest.mark.parametrize("module", [align, beta, guidance])
def test_studies_judge_the_sets_that_their_rows_name(module, monkeypatch):
    asked = {}

    def painted(model, words, prompts, seed, device, **settings):
        asked.setdefault(seed, []).append((prompts, settings["cfg"]))
        return torch.zeros(len(prompts), 3, 8, 32, 32)

    monkeypatch.setattr(jobs, "sample_prompts", painted)
    cfgs = getattr(module, "CFGS", (1.0, 2.0))
    scores = jobs.judge(
        jobs.WEIGHTS / "base.pt", Namespace(eval_prompts=24), CPU, module.SETS, cfgs
    )
    assert list(scores) == [f"{name} {cfg:g}" for name in module.SETS for cfg in cfgs]
    splits = {"standard": {"train"}, "hard": {"hard"}, "large": {"train", "validation", "hard"}}
    for name, calls in zip(
        module.SETS, asked.values()
    ):  # one noise for a set, the same for every model
        assert [cfg for _, cfg in calls] == list(cfgs)
        assert all(
            splits_of(prompts) <= splits[name] and len(prompts) == 24 for prompts, _ in calls
        )


# ---------------------------------------------------------------------------------------------
# Trainings of the studies


@pytest.fixture
def studied(monkeypatch, tmp_path, drawn):
    """Runs jobs of a study by name, their trainings drawing two batches in place of learning: {name: (args, splits of
    the batches, splits asked for and shown)}, and the study's flags."""
    args = jobs.arguments(
        ["align", "--steps=1", "--eval-pairs=20", f"--work={tmp_path}", "--seeds=3"]
    )
    seen, found, honest = [], {}, tasks.held_pairs

    def held_pairs(*args):
        found["held"] = honest(*args)
        return found["held"]

    monkeypatch.setattr(tasks, "held_pairs", held_pairs)

    def draws(task, settings, device, state=None):
        batches = [task.batch(step, slice(0, settings.batch)) for step in range(2)]
        held = found.pop("held", None)
        held = held and set().union(*(splits_of(pairs.y) for pairs in held.values()))
        splits = set().union(*(splits_of(batch["y"]) for batch in batches))
        seen.append((settings, splits, held, *watched_splits(drawn)))
        return []

    monkeypatch.setattr(trainer, "fit", draws)
    for module in (align, beta, guidance):
        for name in ("judge", "base_scores"):
            monkeypatch.setattr(module, name, lambda *args: {})
    monkeypatch.setattr(beta, "drift", lambda path, device: 0.0)
    return args, seen


def test_alignment_studies_train_on_training_prompts_with_what_their_rows_say(studied, monkeypatch):
    args, seen = studied
    picked = []
    for module in (align, beta):
        monkeypatch.setattr(
            module, "best_of", lambda seed, *rest: picked.append((seed, *rest[3])) or {}
        )
    made = {**align.jobs(args, CPU), **beta.jobs(args, CPU)}
    for name, job in made.items():
        if not name.endswith("-2") or name.split("-")[2] in map(str, beta.BETAS[1:]):
            continue
        seen.clear()
        job()
        if name.startswith("best-of"):
            assert not seen and picked.pop() == (
                (2, 0, 0, 1) if "TA only" in name else (2, 1, 1, 1)
            )
        for settings, splits, held, asked, shown in seen:
            assert (
                splits == {"train"} and held is None and asked <= {"train"} and "hard" not in shown
            )
            method = name.removesuffix("-2")
            assert settings.algo == name.split("-")[0] and settings.seed == 2
            assert settings.generated == ("own-clips" in name)
            assert getattr(settings, "schedule", "constant") == (
                "(1-t)^2" if method.startswith("dpo-schedule") else "constant"
            )
            assert settings.align == ((0, 0, 1) if "TA only" in name else (1, 1, 1))
            number = method.rsplit("-", 1)[1]
            assert getattr(settings, "beta", 100) == (float(number) if number.isdigit() else 100)


def test_guidance_learns_train_and_is_judged_on_validation(studied, drawn, monkeypatch):
    args, seen = studied
    monkeypatch.setattr(guidance, "load_noisy_reward", lambda path: (torch.nn.Identity(), []))
    for variant in guidance.VARIANTS:
        guidance.reward_of(variant, 2, args, CPU)
    assert [s.seed for s, *_ in seen] == [2] * 3
    assert [s.trunk for s, *_ in seen] == ["frozen"] * 3
    assert [s.target for s, *_ in seen] == ["reward", "labels", "reward"]
    assert [s.time_shift for s, *_ in seen] == [1, 1, 0]
    for _, splits, held, asked, shown in seen:
        assert splits == {"train"} and held == {"validation"}
        assert asked == {"train", "validation"} and "hard" not in shown
    watched_splits(drawn)
    monkeypatch.setattr(
        guidance, "noisy_scores", lambda reward, pairs, device, seed: {0.0: torch.rand(20, 2, 3)}
    )
    guidance.accuracy_rows(None, "noised", 0, args, CPU)
    assert watched_splits(drawn)[0] == {"validation"}


def test_prompts_told_apart_were_never_in_a_pair(drawn, monkeypatch, tmp_path):
    monkeypatch.setattr(guidance, "load_noisy_reward", lambda path: (Silent(), Vocabulary().words))
    guidance.told_rows("noised", 0, Namespace(work=tmp_path, eval_pairs=24), CPU)
    asked, shown = watched_splits(drawn)
    assert asked == shown == {"validation"}
    base, _ = load_velocity(jobs.WEIGHTS / "base.pt")
    monkeypatch.setattr(observer, "LEARNED", 96)
    observer.probe(
        base,
        1,
        torch.zeros(2, 3, 8, 32, 32),
        torch.full((2,), 0.5),
        torch.Generator().manual_seed(0),
    )
    asked, shown = watched_splits(drawn)
    assert asked == shown == {"train"}


class Silent(torch.nn.Module):
    """A noise-aware reward without an opinion."""

    config = wired.CONFIG

    def forward(self, x_t, t, y):
        return torch.zeros(len(y), 3)


def test_the_reward_study_learns_train_and_is_judged_on_validation_and_hard(
    studied, drawn, monkeypatch
):
    args, seen = studied
    scores = []
    monkeypatch.setattr(
        reward_model,
        "pair_scores",
        lambda f, pairs, _: scores.append(f) or torch.rand(len(pairs), 2, 3),
    )
    reward_model.judged_pairs.cache_clear()
    monkeypatch.setattr(reward_model, "policy", lambda *args: "policy.pt")
    made, honest = {}, generated.generated_pairs

    def generated_pairs(count, splits, seed, path, config, cache, device, models=generated.MODELS):
        if seed == reward_model.EVALUATION_SEED + 3:
            made[str(path), *models] = models
        path = jobs.WEIGHTS / "base.pt"
        return honest(count, splits, seed, path, config, cache, device, models)

    monkeypatch.setattr(generated, "generated_pairs", generated_pairs)
    monkeypatch.setattr(generated, "sample_many", lambda model, x1, y, progress, **settings: x1)
    for model in (*reward_model.MODELS, *reward_model.RENDERED_ONLY):
        seen.clear()
        reward_model.trained(model, 1.0, 2, args, CPU)
        ((settings, splits, held, asked, shown),) = seen
        assert settings.seed == 2 and settings.steps == 1 and settings.pairs == 16  # of two epochs
        assert (
            splits == {"train"}
            and held == {"validation"}
            and "hard" not in shown
            and "hard" not in asked
        )
        assert settings.tokens == (
            "separate" if model in ("btt-separate", "btt-rendered") else "shared"
        )
        assert settings.loss == model.split("-")[0] and settings.generated == (
            0 if model == "btt-rendered" else 0.5
        )
        watched_splits(drawn)
    assert {score.__name__ for score in scores} == {"normalised"}  # Overall adds the three
    seen.clear()
    args.steps = 20
    reward_model.trained(
        "bt-shared", 0.25, 0, args, CPU
    )  # a quarter of 320 pairs in half as many steps
    assert (seen[0][0].pairs, seen[0][0].steps) == (80, 10)
    watched_splits(drawn)
    pairs = reward_model.every_split(args, CPU)
    splits = {name: splits_of(here.y) for name, here in pairs.items()}
    assert splits == dict.fromkeys(("validation", "base", "policy", "cfg3"), {"validation"}) | {
        "benchmark": {"hard"}
    }
    base = str(jobs.WEIGHTS / "base.pt")
    assert made == {
        (
            base,
            *generated.MODELS,
        ): generated.MODELS,  # the settings that it learned from, on other noise
        ("policy.pt", "policy"): {"policy": {}},
        (base, "base-cfg3"): {"base-cfg3": {"cfg": 3.0}},
    }


def test_named_splits_are_drawn_and_no_others(drawn):
    for names in (["train"], ["validation"], ["hard"], ["validation", "hard"]):
        pairs = annotated_pairs(60, names, 3, wired.CONFIG, Vocabulary())
        assert splits_of(pairs.y) == watched_splits(drawn)[0] == set(names)


def test_rows_of_the_studies_are_wins_of_what_was_trained(studied, monkeypatch):
    args, _ = studied
    won, lost = (
        {
            "large 1": dict.fromkeys(("oracle", "videoreward", "right"), torch.full((3, 3), x))
            | {"quality": torch.ones(3)}
        }
        for x in (1.0, 0.0)
    )
    for module in (align, beta, guidance):
        monkeypatch.setattr(module, "judge", lambda *args: won)
        monkeypatch.setattr(module, "base_scores", lambda *args: lost)
    monkeypatch.setattr(guidance, "guided", lambda *args, **settings: won)
    monkeypatch.setattr(guidance, "reward_of", lambda *args: None)
    monkeypatch.setattr(guidance, "accuracy_rows", lambda *args: [])
    rows = align.trained("sft", "1:1:1", 0, args, CPU) + beta.swept(
        "dpo-constant", 10, 0, args, CPU
    )
    rows += beta.long_run("dpo-constant", 0, args, CPU) + guidance.steered_rows(
        "labels", 0, args, CPU
    )
    assert (
        len(rows) == 2 + 2 + 2 * 2 + 6
    )  # the long run is judged after its first step, the last drawn here, and its end
    assert all(row["VQ"] == row["MQ"] == row["TA"] == row["VQ_score"] == 1 for row in rows)


def test_a_reward_that_says_what_the_labels_say_is_right(monkeypatch):
    label = torch.tensor([[1, -1, 1], [1, -1, -1]])
    scores = torch.tensor([[[2.0, 0, 0], [1.0, 1, 1]], [[2.0, 0, 0], [1.0, 1, 1]]])
    monkeypatch.setattr(guidance, "annotated_pairs", lambda *args: Namespace(label=label))
    monkeypatch.setattr(guidance, "noisy_scores", lambda *args, **settings: {0.4: scores})
    (row,) = guidance.accuracy_rows(None, "noised", 0, Namespace(eval_pairs=2), CPU)
    assert (row["t"], row["VQ"], row["MQ"], row["TA"]) == (0.4, 1.0, 1.0, 0.5)
