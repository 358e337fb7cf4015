"""Words, pairs and batches."""

import pytest
import torch

import world
from data import TOY_WORDS, Vocabulary, annotated_pairs, draw_pairs, epoch_index
from model import ModelConfig

CONFIG = ModelConfig(vocab=len(TOY_WORDS))


def test_words_become_ids_and_back():
    vocabulary = Vocabulary(["<pad>", "a", "red", "dot"])
    assert vocabulary.encode(["a red dot", "Red"], 4).tolist() == [[1, 2, 3, 0], [2, 0, 0, 0]]


def test_encoding_attributes_is_encoding_their_text():
    vocabulary = Vocabulary()
    prompts = world.split_prompts("train", "hard")
    texts = [world.prompt_text(p) for p in prompts]
    assert torch.equal(vocabulary.encode_attributes(prompts, 8), vocabulary.encode(texts, 8))


@pytest.mark.parametrize(
    ("prompt", "message"),
    [("a red dog", "'dog'.*words known: a, red"), ("", "0 words"), ("a a a", "3 words"), ("<pad>", "unknown")],
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
    assert not torch.equal(annotated_pairs(200, ["train"], 4, CONFIG, Vocabulary()).label, pairs.label)


def test_an_epoch_visits_every_item_once():
    seen = torch.cat([epoch_index(10, 4, step, seed=1) for step in range(5)])  # 20 items are two epochs
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()
