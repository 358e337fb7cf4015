"""Words, pairs and batches."""

from dataclasses import replace

import pytest
import torch
import wired

import tasks
import world
from data import INVALID, TOY_WORDS, Vocabulary, epoch_index
from model import ModelConfig
from real_data.toy_pairs import annotated_pairs, draw_pairs
from words import split_words

tiny = wired.tiny
CONFIG = ModelConfig(vocab=len(TOY_WORDS))
ALGORITHMS = {
    "pretrain": ["--algo=pretrain"],
    "reward, btt": ["--algo=reward"],
    "reward, bt": ["--algo=reward", "--loss=bt"],
    "reward, regression": ["--algo=reward", "--loss=regression"],
    "nrg": ["--algo=nrg"],
    "nrg, labels": ["--algo=nrg", "--target=labels"],
    "sft": ["--algo=sft"],
    "rwr": ["--algo=rwr", "--temperature=0.3"],
    "dpo": ["--algo=dpo", "--freeze=0"],
    "dpo, shared trunk": ["--algo=dpo", "--freeze=2"],
}


def test_words_become_ids_and_back():
    vocabulary = Vocabulary(["<pad>", "a", "red", "dot"])
    assert vocabulary.encode(["a red dot", "Red"], 4).tolist() == [[1, 2, 3, 0], [2, 0, 0, 0]]


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
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
    ],
)
def test_words_of_any_script(prompt, words):
    assert split_words(prompt) == words


def test_words_that_are_unknown_and_prompts_that_are_cut():
    vocabulary = Vocabulary(["<pad>", "<unk>", "a", "cat"])
    said = vocabulary.coverage(["A cat!", "a dog runs", "a a a cat cat"], 3)
    assert said == "20.0% of the words unknown, 1 cut to 3 words"  # dog and runs, of ten


def test_encoding_attributes_is_encoding_their_text():
    vocabulary = Vocabulary()
    prompts = world.split_prompts("train", "hard")
    texts = [world.prompt_text(p) for p in prompts]
    assert torch.equal(vocabulary.encode_attributes(prompts, 8), vocabulary.encode(texts, 8))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("a red dog", "'dog'.*words known: a, red"),
        ("", "0 words"),
        ("a a a", "3 words"),
        ("<pad>", "unknown"),
    ],
)
def test_bad_prompts_are_named(prompt, message):
    with pytest.raises(ValueError, match=message):
        Vocabulary(["<pad>", "a", "red"]).encode([prompt], 2)


def test_pairs_share_the_prompt_and_differ_in_the_generator():
    a, b = draw_pairs(500, ["train"], seed=0, frames=8)
    assert torch.equal(a.prompt, b.prompt) and not (a.generator == b.generator).any()
    assert set(a.generator.tolist()) == set(b.generator.tolist()) == set(range(12))
    train = {tuple(p) for p in world.split_prompts("train").tolist()}
    assert {tuple(p) for p in a.prompt.tolist()} <= train


def test_labels_follow_the_truth_and_depend_on_the_seed_alone():
    pairs = annotated_pairs(200, ["train"], 3, CONFIG, Vocabulary())
    video_a, video_b = pairs.sides(torch.arange(200))
    prompts = [" ".join(TOY_WORDS[i] for i in row if i) for row in pairs.y.tolist()]
    delta = world.oracle(video_a, prompts) - world.oracle(video_b, prompts)
    assert torch.allclose(delta, pairs.truth[:, 0] - pairs.truth[:, 1], atol=1e-6)
    decided = pairs.label != 0
    assert ((torch.sign(delta) == pairs.label)[decided]).float().mean() > 0.97
    assert delta[~decided].abs().mean() < delta[decided].abs().mean() / 2
    again = annotated_pairs(200, ["train"], 3, CONFIG, Vocabulary())
    assert torch.equal(again.label, pairs.label) and torch.equal(again.mos, pairs.mos)
    assert torch.equal(again.sides(torch.arange(9))[1], video_b[:9])
    assert not torch.equal(
        annotated_pairs(200, ["train"], 4, CONFIG, Vocabulary()).label, pairs.label
    )


def test_an_epoch_visits_every_item_once():
    seen = torch.cat(
        [epoch_index(10, 4, step, seed=1) for step in range(5)]
    )  # 20 items are two epochs
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


# ---------------------------------------------------------------------------------------------
# Parts of a batch: for processes, and for the micro-batches of each


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


def cut(batch, count, parts):
    """The slices of a task's rows 0 to count - 1, in so many parts."""
    return [batch(slice(i * count // parts, (i + 1) * count // parts)) for i in range(parts)]


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_parts_of_a_batch_are_its_rows_to_the_last_bit(unlabelled, algo):
    dropped = [] if algo.startswith(("reward", "nrg")) else ["--label-dropout=0.5"]
    _, task = unlabelled(*ALGORITHMS[algo], *dropped)
    count = wired.BATCH * (2 if algo in ("sft", "rwr") else 1)
    for step in (0, 3):
        whole, again = (task.batch(step, slice(0, wired.BATCH)) for _ in range(2))
        assert all(len(value) == count for value in whole.values())
        assert all(torch.equal(value, again[name]) for name, value in whole.items())
        for parts in (2, 4):
            pieces = cut(lambda rows, step=step: task.batch(step, rows), wired.BATCH, parts)
            for name, value in whole.items():
                assert all(len(piece[name]) == count // parts for piece in pieces)
                assert torch.equal(torch.cat([piece[name] for piece in pieces]), value)


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_losses_of_equal_parts_have_the_whole_batchs_for_their_mean(unlabelled, algo):
    _, task = unlabelled(*ALGORITHMS[algo])
    wired.noticeable(task.model)
    uneven = 0
    for step in range(3):
        whole = task.loss(task.batch(step, slice(0, wired.BATCH)))[0].item()
        for parts in (2, 4, 8):
            pieces = cut(lambda rows, step=step: task.batch(step, rows), wired.BATCH, parts)
            losses = [task.loss(piece)[0].item() for piece in pieces]
            assert sum(losses) / parts == pytest.approx(whole, rel=1e-5)
            uneven += (
                len({(piece["weight"] > 0).sum().item() for piece in pieces if "weight" in piece})
                > 1
            )
    # parts with more and with fewer valid labels were among them: each one's own mean would have
    # been another
    assert (uneven > 3) == (algo.startswith("reward") or algo == "nrg, labels")


@pytest.mark.parametrize("algo", ["reward, btt", "reward, bt", "reward, regression", "nrg, labels"])
def test_labels_that_are_not_there_weigh_nothing(unlabelled, algo):
    _, task = unlabelled(*ALGORITHMS[algo])
    batch = task.batch(0, slice(0, wired.BATCH))
    valid = {
        "reward, btt": batch["label"] != INVALID,
        "reward, regression": batch.get("mos", batch["label"]) != 0,
    }
    valid = valid.get(algo, (batch["label"] == 1) | (batch["label"] == -1))
    assert (batch["label"] == INVALID).any() and 0 < valid.sum() < valid.numel()
    # so many entries over so many valid ones, for each of the valid
    assert torch.allclose(batch["weight"], valid * (valid.numel() / valid.sum()))
