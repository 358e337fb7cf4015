"""Words, batches, and which prompts every training and every closing table draws.

Preference pairs are of train, pairs to judge by of validation, base models see both; hard, the
paper's TA-Hard, is in no training. What is drawn is watched at world.draw_clips."""

from dataclasses import replace

import pytest
import torch
import wired
from wired import BATCH, CONFIG, EVERY, splits_of

import judge
import tasks
import world
from data import INVALID, Vocabulary, epoch_index, vocabulary_of
from real_data.toy_pairs import annotated_pairs, other_prompts
from words import split_words

drawn, tiny = wired.drawn, wired.tiny
ALGORITHMS = {
    "pretrain": ["--algo=pretrain"],
    "reward, btt": ["--algo=reward"],
    "reward, bt": ["--algo=reward", "--loss=bt"],
    "reward, regression": ["--algo=reward", "--loss=regression"],
    "nrg": ["--algo=nrg"],
    "nrg, labels": ["--algo=nrg", "--target=labels"],
    "rwr": ["--algo=rwr", "--temperature=0.3"],
    "dpo": ["--algo=dpo", "--freeze=0"],
    "dpo, shared trunk": ["--algo=dpo", "--freeze=2"],
}

# ---------------------------------------------------------------------------------------------
# Words

SCRIPTS = [
    ("一个红色圆形，HD画质", [*"一个红色圆形", "hd", *"画质"]),
    ("東京タワーの夜。", [*"東京タワーの夜"]),
    ("สวัสดี", ["ส", "วั", "ส", "ดี"]),  # vowel signs stay with their letter
    ("हिन्दी में लाल", ["हिन्दी", "में", "लाल"]),
    ("ភាសា", ["ភា", "សា"]),
    ("한국어 문장", ["한국어", "문장"]),
    (
        "The café's well-known cafe\u0301, 3.5 m",
        ["the", "café's", "well-known", "café", "3", "5", "m"],
    ),
]


def test_words_of_any_script():
    for prompt, words in SCRIPTS:
        assert split_words(prompt) == words


def test_words_become_ids_and_bad_prompts_are_named():
    vocabulary = Vocabulary(["<pad>", "a", "red", "dot"])
    assert vocabulary.encode(["a red dot", "Red"], 4).tolist() == [[1, 2, 3, 0], [2, 0, 0, 0]]
    assert vocabulary.decode(torch.tensor([1, 2, 3, 0])) == "a red dot"
    prompts = world.split_prompts("train", "hard")
    texts = [world.prompt_text(prompt) for prompt in prompts]
    assert torch.equal(Vocabulary().encode_attributes(prompts, 8), Vocabulary().encode(texts, 8))
    faults = {"a red dog": "'dog'.*words known: a, red", "": "0 words", "<pad>": "unknown"}
    for prompt, message in (faults | {"a a a a": "4 words"}).items():
        with pytest.raises(ValueError, match=message):
            vocabulary.encode([prompt], 3)


def test_a_vocabulary_of_real_prompts():
    vocabulary = vocabulary_of(["The cat's hat, the dog.", "the cat"])
    assert vocabulary.words[:3] == ["<pad>", "<unk>", "the"]
    y = vocabulary.encode(["The bird!", "the cat's hat the dog the hat"], 4)
    assert y.shape == (2, 4) and y[0].tolist() == [2, 1, 0, 0] and y[1, 0] == 2  # cut to 4 words
    assert vocabulary_of(["a b a c b a"], most=4).words == ["<pad>", "<unk>", "a", "b"]
    text = Vocabulary(["<pad>", "<unk>", "a", "cat"]).coverage(
        ["A cat!", "a dog runs", "a a a cat cat"], 3
    )
    assert text == "20.0% of the words unknown, 1 cut to 3 words"  # dog and runs, of ten


def test_other_prompts_differ_in_one_attribute():
    vocabulary, rng = Vocabulary(), torch.Generator().manual_seed(0)
    prompts = world.split_prompts("train")
    other = other_prompts(vocabulary.encode_attributes(prompts, 8), vocabulary, rng)
    changed = (wired.attributes_of(other) != prompts).long()
    assert (changed.sum(1) == 1).all() and (changed.sum(0) > 10).all()
    y = torch.tensor([[2, 3], [4, 5], [6, 7]])
    assert other_prompts(y, vocabulary_of(["a b c d e f"]), rng).tolist() == [
        [6, 7],
        [2, 3],
        [4, 5],
    ]


# ---------------------------------------------------------------------------------------------
# Batches


def test_an_epoch_visits_every_item_once():
    seen = torch.cat([epoch_index(10, 4, step, seed=1) for step in range(5)])  # two epochs
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


@pytest.fixture
def unlabelled(tiny, monkeypatch):
    """`tiny`, whose annotators left out most of what they were asked of two pairs in three."""
    honest = tasks.training_pairs

    def training_pairs(*args, **settings):
        pairs = honest(*args, **settings)
        if pairs.label is None:
            return pairs
        label, mos = pairs.label.clone(), pairs.mos.clone()
        for row in range(len(pairs)):
            if row % 3:
                label[row, row % 2 :], mos[row, :, row % 2 :] = INVALID, 0
        return replace(pairs, label=label, mos=mos)

    monkeypatch.setattr(tasks, "training_pairs", training_pairs)
    return tiny


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_parts_of_a_batch_are_its_rows_and_their_losses_have_its_loss_for_a_mean(unlabelled, algo):
    dropped = [] if algo.startswith(("reward", "nrg")) else ["--label-dropout=0.5"]
    _, task = unlabelled(*ALGORITHMS[algo], *dropped)
    wired.noticeable(task.model)
    count = BATCH * (2 if algo == "rwr" else 1)
    uneven = 0
    for step in (0, 3):
        whole, again = task.batch(step, EVERY), task.batch(step, EVERY)
        assert all(len(value) == count for value in whole.values())
        assert all(torch.equal(value, again[name]) for name, value in whole.items())
        loss = task.loss(whole)[0].item()
        for parts in (2, 8):
            share = BATCH // parts
            slices = [slice(i * share, (i + 1) * share) for i in range(parts)]
            pieces = [task.batch(step, rows) for rows in slices]
            for name, value in whole.items():
                assert torch.equal(torch.cat([piece[name] for piece in pieces]), value)
            losses = [task.loss(piece)[0].item() for piece in pieces]
            assert sum(losses) / parts == pytest.approx(loss, rel=1e-5)
            weights = [piece["weight"] for piece in pieces if "weight" in piece]
            uneven += len({(weight > 0).sum().item() for weight in weights}) > 1
    # parts with more and with fewer valid labels were among them
    assert (uneven > 1) == (algo.startswith("reward") or algo == "nrg, labels")


@pytest.mark.parametrize("algo", ["reward, btt", "reward, bt", "reward, regression", "nrg, labels"])
def test_labels_that_are_not_there_weigh_nothing(unlabelled, algo):
    _, task = unlabelled(*ALGORITHMS[algo])
    batch = task.batch(0, EVERY)
    valid = batch["label"].abs() == 1
    if algo == "reward, btt":
        valid = batch["label"] != INVALID
    if algo == "reward, regression":
        valid = batch["mos"] != 0
    assert (batch["label"] == INVALID).any() and 0 < valid.sum() < valid.numel()
    # so many entries over so many valid ones, for each of the valid
    assert torch.allclose(batch["weight"], valid * (valid.numel() / valid.sum()))


# ---------------------------------------------------------------------------------------------
# Prompts


def test_labels_follow_the_truth_and_depend_on_the_seed_alone(drawn):
    pairs = annotated_pairs(200, ["train"], 3, CONFIG, Vocabulary())
    a, b = drawn
    assert torch.equal(a.prompt, b.prompt) and not (a.generator == b.generator).any()
    assert set(a.generator.tolist()) == set(b.generator.tolist()) == set(range(12))
    assert torch.equal(pairs.models, torch.stack((a.generator, b.generator), 1))
    video_a, video_b = pairs.sides(torch.arange(200))
    assert torch.equal(video_b[:9], world.render(b[:9], CONFIG.size))
    prompts = [Vocabulary().decode(y) for y in pairs.y]
    delta = world.oracle(video_a, prompts) - world.oracle(video_b, prompts)
    assert torch.allclose(delta, pairs.truth[:, 0] - pairs.truth[:, 1], atol=1e-6)
    decided = pairs.label != 0
    assert ((torch.sign(delta) == pairs.label)[decided]).float().mean() > 0.97
    assert delta[~decided].abs().mean() < delta[decided].abs().mean() / 2
    better = (pairs.mos[:, 0] - pairs.mos[:, 1]).sign() * delta.sign()
    assert better[delta.abs() > world.TRUE_STD].mean() > 0.9
    again, other = (annotated_pairs(200, ["train"], s, CONFIG, Vocabulary()) for s in (3, 4))
    assert torch.equal(again.label, pairs.label) and torch.equal(again.mos, pairs.mos)
    assert not torch.equal(other.label, pairs.label)


@pytest.mark.parametrize("algo", ["dpo", "rwr", "reward", "nrg"])
def test_preferences_are_learned_on_training_prompts_alone(tiny, drawn, algo):
    few = ["--eval-pairs=60"] if algo in ("reward", "nrg") else []
    _, task = tiny(f"--algo={algo}", "--pairs=300", *few)
    first, rest = drawn[:2], drawn[2:]  # A and B to train on, then to judge by
    assert all(len(clips) == 300 and splits_of(clips.prompt) == {"train"} for clips in first)
    for step in range(30):
        assert splits_of(task.batch(step, EVERY)["y"]) == {"train"}
    assert hasattr(task, "held") == bool(few)
    if few:
        (held,) = task.held.values()
        assert all(len(clips) == 60 and splits_of(clips.prompt) == {"validation"} for clips in rest)
        assert splits_of(held.y) == {"validation"} and len(held) == 60
        _, other = tiny(f"--algo={algo}", "--eval-pairs=60", "--seed=1")
        assert not torch.equal(next(iter(other.held.values())).y, held.y)


def test_pretraining_sees_train_and_validation_and_nothing_hard(tiny, drawn):
    _, task = tiny("--algo=pretrain", "--batch=200", "--label-dropout=0")
    seen = set().union(*(splits_of(task.batch(step, slice(0, 200))["y"]) for step in range(3)))
    asked = set().union(*(splits_of(clips.prompt) for clips in drawn))
    assert seen == asked == {"train", "validation"}
    assert "hard" not in set().union(*(splits_of(clips.shown) for clips in drawn))


@pytest.mark.parametrize("algo", ["dpo", "pretrain"])
def test_closing_tables_ask_for_every_prompt_once(tiny, monkeypatch, tmp_path, algo):
    asked = []

    def painted(model, x1, y, progress, cfg):
        asked.append(wired.attributes_of(y))
        return torch.zeros_like(x1)

    monkeypatch.setattr(judge, "sample_many", painted)
    _, task = tiny(f"--algo={algo}", "--eval-prompts=96")
    tmp_path.joinpath("out").mkdir()
    task.evaluate(task.model, tmp_path / "out")
    every = torch.cartesian_prod(*(torch.arange(n) for n in world.CHOICES)).tolist()
    assert asked and all(sorted(prompts.tolist()) == every for prompts in asked)
