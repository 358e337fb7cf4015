"""The base model among the generators: which clips are sampled, how they are cached and paired, and
who learns on them."""

import pytest
import torch
import wired
from wired import CONFIG, CPU, EVERY, splits_of

import world
from data import Vocabulary
from model import load_velocity
from real_data import toy_pairs
from real_data.toy_pairs import MOST_CLIPS, annotate_pairs, annotated_pairs, join_pairs

tiny = wired.tiny
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
    for share, count in ((0, 0), (1, 16)):
        flags = [f"--generated={share}"] + ([f"--cache={tmp_path / 'c'}"] if share else [])
        _, task = tiny(f"--algo={algo}", "--pairs=16", *flags)
        batches = [task.batch(step, EVERY) for step in (0, 1)]
        clips = torch.cat([batch[PLACES[algo]] for batch in batches])
        of_one_colour = clips.std((2, 3, 4)).amax(1) == 0
        assert of_one_colour.sum() == (len(clips) if count else 0)
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
