"""Words, batches, and which prompts every training and every closing table draws.

Preference pairs are of train, pairs to judge by of validation, base models see both; hard, the
paper's TA-Hard, is in no training. What is drawn is watched at world.draw_clips."""

from dataclasses import replace

import pytest
import torch
import wired
from wired import BATCH, CONFIG, CPU, EVERY, splits_of

import judge
import tasks
import world
from data import INVALID, Vocabulary, epoch_index, vocabulary_of
from model import load_velocity
from real_data import toy_pairs
from real_data.toy_pairs import (
    MOST_CLIPS,
    annotate_pairs,
    annotated_pairs,
    join_pairs,
    other_prompts,
)
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


def test_an_epoch_visits_every_item_once():
    seen = torch.cat([epoch_index(10, 4, step, seed=1) for step in range(5)])  # two epochs
    assert sorted(seen[:10].tolist()) == sorted(seen[10:].tolist()) == list(range(10))
    assert seen[:10].tolist() != seen[10:].tolist()


@pytest.fixture
def unlabelled(tiny, monkeypatch):
    """`tiny`, whose annotators left most of two pairs in three without a label."""
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
    uneven = False
    for step in (0, 3):
        whole, again = task.batch(step, EVERY), task.batch(step, EVERY)
        assert all(len(value) == count for value in whole.values())
        assert all(torch.equal(value, again[name]) for name, value in whole.items())
        pieces = [task.batch(step, slice(i, i + 2)) for i in range(0, BATCH, 2)]
        for name, value in whole.items():
            assert torch.equal(torch.cat([piece[name] for piece in pieces]), value)
        losses = [task.loss(piece)[0].item() for piece in pieces]
        mean = sum(losses) / len(losses)
        assert mean == pytest.approx(task.loss(whole)[0].item(), rel=1e-5)
        weights = [piece["weight"] for piece in pieces if "weight" in piece]
        uneven |= len({(weight > 0).sum().item() for weight in weights}) > 1
    # parts with more and with fewer valid labels were among them
    assert uneven == (algo.startswith("reward") or algo == "nrg, labels")


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


# ---------------------------------------------------------------------------------------------
# Clips of the base model among the generators

TWO = {"one": {"steps": 1}, "two": {"steps": 2, "cfg": 3.0}}


def clip_of(y, number, steps, cfg):
    """A clip that tells its origin: prompt in red, settings in green, number in blue."""
    red = (y * torch.arange(1, y.shape[1] + 1)).sum(1) / 500
    green, blue = torch.full_like(red, steps / 10 + cfg / 100), torch.full_like(red, number)
    values = torch.stack((red, green, blue), 1)
    return values[:, :, None, None, None].expand(-1, -1, CONFIG.frames, CONFIG.size, CONFIG.size)


@pytest.fixture
def sampled(tiny, monkeypatch):
    """(base model's path, calls of the sampler: noise, y, settings); clips are those of clip_of."""
    settings, _ = tiny("--algo=reward")
    calls = []

    def sample_many(model, x1, y, progress, steps=20, cfg=1.0):
        calls.append((x1, y, {"steps": steps, "cfg": cfg}))
        return clip_of(y, len(calls) / 100, steps, cfg)

    monkeypatch.setattr(toy_pairs, "sample_many", sample_many)
    return settings.init, calls


def pairs_of(path, folder, count=30, splits=("validation",), seed=0, models=TWO):
    where = (path, CONFIG, folder, CPU, models)
    return annotate_pairs(*toy_pairs.generated_pairs(count, splits, seed, *where), seed)


def test_pairs_are_two_clips_of_one_prompt_sampled_at_every_setting(sampled, tmp_path):
    path, calls = sampled
    pairs = pairs_of(path, tmp_path)
    settings = [{"steps": 1, "cfg": 1.0}, {"steps": 2, "cfg": 3.0}]
    assert [each for _, _, each in calls] == settings
    prompts = Vocabulary().encode_attributes(world.split_prompts("validation"), CONFIG.max_text)
    for x1, y, _ in calls:
        assert len(x1) == len(y) and torch.equal(y, y[:12].repeat(len(y) // 12, 1))
        assert sorted(y[:12].tolist()) == sorted(prompts.tolist())
        assert len(x1.flatten(1).unique(dim=0)) == len(x1)
    # 30 pairs of 12 prompts: 5 clips of each, three by the first setting and two by the second
    assert [len(y) for _, y, _ in calls] == [36, 24]
    assert not torch.equal(calls[0][0][:24], calls[1][0])  # noise of its own
    for side, clips in enumerate(pairs.sides(torch.arange(30))):
        for i, clip in enumerate(clips):
            model = pairs.models[i, side].item() - 12
            true = clip_of(pairs.y[i : i + 1], (model + 1) / 100, **settings[model])[0]
            assert torch.allclose(clip, true, atol=1 / 255 + 1e-6)  # cached in 256 steps
    assert (pairs.clip_id[:, 0] != pairs.clip_id[:, 1]).all() and (pairs.clip_id < 0).all()
    assert splits_of(pairs.y) == {"validation"}


def test_clips_are_cached_and_sampled_again_when_they_differ_or_are_damaged(sampled, tmp_path):
    path, calls = sampled
    first, index = pairs_of(path, tmp_path), torch.arange(30)
    assert torch.equal(pairs_of(path, tmp_path).sides(index)[0], first.sides(index)[0])
    assert len(calls) == 2
    (file,) = tmp_path.glob("generated-*.pt")
    file.write_bytes(file.read_bytes()[:1000])
    pairs_of(path, tmp_path)
    assert len(calls) == 4 and len(list(tmp_path.glob("*.tmp"))) == 0
    others = {"seed": 1, "models": {"one": {"steps": 1}}, "splits": ("hard",), "count": 60}
    for name, value in others.items():
        before = len(calls)
        pairs_of(path, tmp_path, **{name: value})
        assert len(calls) > before, name
    noise = [x1 for x1, _, _ in calls]
    assert torch.equal(noise[0], noise[2]) and not torch.equal(noise[0], noise[4])  # a seed's
    network, _ = load_velocity(path)
    wired.save(wired.noticeable(network), "velocity", path)
    before = len(calls)
    pairs_of(path, tmp_path, 5000)
    assert sum(len(y) for _, y, _ in calls[before:]) == 12 * MOST_CLIPS  # the most of a prompt


PLACES = {  # algorithm: where its batch has clips of the pairs
    "reward": "video_a",
    "nrg": "x0",
    "nrg --target=labels": "x0_a",
    "dpo": "x0_w",
    "sft": "x0",
}


@pytest.mark.parametrize("algo", PLACES)
def test_a_share_of_the_pairs_is_generated(tiny, tmp_path, monkeypatch, algo):
    calls = []

    def sample_many(model, x1, y, progress, **settings):  # clips of one colour each
        calls.append(settings)
        return x1.mean((2, 3, 4), keepdim=True).expand_as(x1)

    monkeypatch.setattr(toy_pairs, "sample_many", sample_many)
    for share in (0, 1):
        flags = [f"--generated={share}"] + ([f"--cache={tmp_path / 'c'}"] if share else [])
        _, task = tiny(f"--algo={algo}", "--pairs=16", *flags)
        batches = [task.batch(step, EVERY) for step in (0, 1)]
        clips = torch.cat([batch[PLACES[algo]] for batch in batches])
        of_one_colour = clips.std((2, 3, 4)).amax(1) == 0
        assert of_one_colour.sum() == share * len(clips)
        assert set().union(*(splits_of(batch["y"]) for batch in batches)) == {"train"}
    settings = {str(each) for each in calls}
    aligned = algo in ("dpo", "sft")  # aligned models learn on clips as they sample themselves
    assert settings == ({"{}"} if aligned else {str(each) for each in toy_pairs.MODELS.values()})


def test_videoreward_is_judged_by_rendered_and_by_generated_pairs(tiny, tmp_path):
    flags = ["--pairs=40", "--eval-pairs=40", "--generated=0.25", f"--cache={tmp_path}"]
    _, task = tiny("--algo=reward", *flags)
    held = {name.split()[0]: part for name, part in task.held.items()}
    assert {kind: len(part) for kind, part in held.items()} == {"rendered": 30, "generated": 10}
    for part in held.values():
        assert splits_of(part.y) == {"validation"}
        a, b = part.sides(torch.arange(len(part)))
        prompt = wired.attributes_of(part.y)
        truth = torch.stack((world.oracle(a, prompt), world.oracle(b, prompt)), 1)
        assert torch.allclose(part.truth, truth, atol=1e-5)
        gap = (truth[:, 0] - truth[:, 1]) / world.TRUE_STD
        clear = gap.abs() > 1.5  # five times an annotator's error
        assert torch.equal(part.label[clear], gap[clear].sign().long())
    _, other = tiny("--algo=reward", *flags, "--seed=1")
    assert all(
        not torch.equal(part.y, held[name.split()[0]].y) for name, part in other.held.items()
    )


def test_joined_pairs_keep_their_clips_and_labels(tmp_path, sampled):
    rendered = annotated_pairs(10, ["train"], 0, CONFIG, Vocabulary())
    generated = pairs_of(sampled[0], tmp_path, 6)
    both = join_pairs(rendered, generated)
    index, side = torch.tensor([15, 3, 10, 9, 0]), torch.tensor([1, 0, 0, 1, 1])
    videos = both.clips(index, side)
    for video, i, s in zip(videos, index.tolist(), side.tolist()):
        part, own = (rendered, i) if i < 10 else (generated, i - 10)
        assert torch.equal(video, part.clips(torch.tensor([own]), torch.tensor([s]))[0])
        assert torch.equal(both.label[i], part.label[own]) and torch.equal(both.y[i], part.y[own])
    assert torch.equal(both.clips(index[:1], side[:1]), videos[:1])
    assert torch.equal(both.clips(index[3:], side[3:]), videos[3:]) and len(both) == 16
