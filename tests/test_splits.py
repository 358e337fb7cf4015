"""Which prompts every training and every closing table really draws: preference pairs of train, pairs to
judge by of validation, base models of both; hard, the paper's TA-Hard, in no training and in no clip of one.

What is drawn is watched at the toy world's own door, world.draw_clips, and read from the batches; which split a prompt
belongs to is worked out anew (wired.split_of).
"""


import pytest
import torch
import wired
from wired import BATCH, split_of, splits_of

import judge
import world
from data import Vocabulary
from real_data.toy_pairs import annotated_pairs

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


def test_named_splits_are_drawn_and_no_others(drawn):
    for names in (["train"], ["validation"], ["hard"], ["validation", "hard"]):
        pairs = annotated_pairs(60, names, 3, wired.CONFIG, Vocabulary())
        assert splits_of(pairs.y) == watched_splits(drawn)[0] == set(names)
