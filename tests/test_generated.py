"""Models among the generators: which clips are sampled, how they are cached and paired, and what
VideoReward learns on."""

import re

import pytest
import torch
import wired
from wired import CONFIG, CPU, splits_of

import world
from data import Vocabulary
from real_data import export_toy, generated
from real_data.pairs_csv import read_pairs
from real_data.toy_pairs import annotate_pairs, annotated_pairs

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
    args, _ = tiny("--algo=reward")
    calls = []

    def sample_many(model, x1, y, progress, steps=20, cfg=1.0):
        calls.append((x1, y, {"steps": steps, "cfg": cfg}))
        return clip_of(y, len(calls) / 100, steps, cfg)

    monkeypatch.setattr(generated, "sample_many", sample_many)
    return args.init, calls


def pairs_of(path, folder, count=30, splits=("validation",), seed=0, models=TWO):
    where = (path, CONFIG, folder, CPU, models)
    return annotate_pairs(*generated.generated_pairs(count, splits, seed, *where), seed)


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
            wanted = clip_of(pairs.y[i : i + 1], (model + 1) / 100, **settings[model])[0]
            assert torch.allclose(clip, wanted, atol=1 / 255 + 1e-6)  # cached in 256 steps
    assert splits_of(pairs.y) == {"validation"}


def test_a_clip_is_not_compared_with_itself_and_labels_are_the_annotators(
    tiny, tmp_path, monkeypatch
):
    args, _ = tiny("--algo=reward")
    calls = []

    def rendered(model, x1, y, progress, **settings):
        prompt = world.prompt_attributes([Vocabulary().decode(row) for row in y])
        rng = torch.Generator().manual_seed(len(calls))
        calls.append(1)
        clips = world.draw_clips(prompt, torch.arange(len(y)) % 12, rng, CONFIG.frames)
        return world.render(clips, CONFIG.size)

    monkeypatch.setattr(generated, "sample_many", rendered)
    pairs = pairs_of(args.init, tmp_path, 100, ("train",))
    a, b = pairs.sides(torch.arange(100))
    assert ((a - b).abs().flatten(1).amax(1) > 0).all()
    prompt = world.prompt_attributes([Vocabulary().decode(row) for row in pairs.y])
    gap = (world.oracle(a, prompt) - world.oracle(b, prompt)) / world.TRUE_STD
    clear = gap.abs() > 1.5  # five times an annotator's error
    assert clear.sum() > 30 and torch.equal(pairs.label[clear], gap[clear].sign().long())
    assert torch.allclose(pairs.truth[:, 0], world.oracle(a, prompt), atol=1e-5)


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
    network, _ = generated.load_velocity(path)
    wired.save(wired.noticeable(network), "velocity", path)
    before = len(calls)
    pairs_of(path, tmp_path)
    assert len(calls) > before


def test_the_number_of_clips_is_bounded(sampled, tmp_path):
    path, calls = sampled
    pairs_of(path, tmp_path, 5000)
    assert sum(len(y) for _, y, _ in calls) == 12 * generated.MOST_CLIPS


def share_of(share, cache):
    """Flags for a share of generated pairs, cached in a folder."""
    return [f"--generated={share}"] + ([f"--cache={cache}"] if share else [])


def test_a_share_of_videorewards_pairs_is_generated(tiny, tmp_path):
    for share, count in ((0, 0), (0.25, 10), (1, 40)):
        flags = share_of(share, tmp_path / "clips")
        _, task = tiny("--algo=reward", "--pairs=40", "--eval-pairs=40", *flags)
        held = {name.split()[0]: len(part) for name, part in task.held.items()}
        counts = {"rendered": 40 - count, "generated": count}
        assert held == {name: n for name, n in counts.items() if n}
        seen = [task.batch(step, slice(0, 8)) for step in range(5)]
        assert set().union(*(splits_of(batch["y"]) for batch in seen)) == {"train"}
        for part in task.held.values():
            assert splits_of(part.y) == {"validation"}


def test_an_export_has_generated_clips_in_its_files_and_its_table(
    tiny, tmp_path, capsys, monkeypatch
):
    args, _ = tiny("--algo=reward")
    flags = ["--pairs=10", "--generated=0.6", f"--init={args.init}", f"--cache={tmp_path / 'c'}"]
    monkeypatch.setattr(export_toy, "ModelConfig", lambda: CONFIG)
    monkeypatch.setattr("sys.argv", ["data.py", "export", str(tmp_path / "toy"), *flags])
    export_toy.main()
    counts = {"train": (4, 6), "validation": (1, 1), "benchmark": (1, 1)}
    for name, (rendered, made) in counts.items():
        rows = read_pairs(tmp_path / "toy" / f"{name}.csv")
        models = [{path.rpartition("_")[2][: -len(".mp4")] for path in row.paths} for row in rows]
        by_world = [pair <= set(world.GENERATORS) for pair in models]
        assert by_world == [True] * rendered + [False] * made
        assert set().union(*models[rendered:]) <= set(generated.MODELS)
        assert all((tmp_path / "toy" / path).exists() for row in rows for path in row.paths)
    table = capsys.readouterr().out.partition("## train: 10 pairs")[2].partition("##")[0]
    shares = [float(cell) for cell in re.search(r"^\| VQ \|(.*)\|$", table, re.M)[1].split("|")]
    assert sum(shares[:3]) == pytest.approx(1, abs=0.002)  # A, tie, B; unanimous
    assert 0 <= shares[3] <= 1
    shown = dict(re.findall(r"^\| ([a-z][\w.-]*) \| (\d+) \|", table, re.M))
    assert set(shown) == {*world.GENERATORS, *generated.MODELS}
    assert sum(map(int, shown.values())) == 20  # two clips of each pair
    assert sum(int(shown[name]) for name in generated.MODELS) == 12


@pytest.mark.parametrize("target", ["reward", "labels"])
def test_the_noise_aware_reward_trains_on_generated_clips_where_the_flag_says_so(
    sampled, tiny, tmp_path, target
):
    for share, count in ((0, 0), (1, 8)):
        flags = share_of(share, tmp_path / "clips")
        _, task = tiny("--algo=nrg", f"--target={target}", "--pairs=8", *flags)
        clips = task.batch(0, slice(0, 8))["x0" if target == "reward" else "x0_a"]
        of_one_colour = clips.std((2, 3, 4)).amax(1) == 0  # those of clip_of
        assert of_one_colour.sum() == count


@pytest.mark.parametrize("algo", ["dpo", "sft"])
def test_an_alignment_takes_clips_of_its_own_start_where_the_flag_says_so(
    tiny, tmp_path, monkeypatch, algo
):
    calls = []

    def sample_many(model, x1, y, progress, **settings):  # clips of one colour each
        calls.append(settings)
        return x1.mean((2, 3, 4), keepdim=True).expand_as(x1)

    monkeypatch.setattr(generated, "sample_many", sample_many)
    for share, count in ((0, 0), (1, 8)):
        _, task = tiny(f"--algo={algo}", "--pairs=8", *share_of(share, tmp_path / "clips"))
        batch = task.batch(0, slice(0, 8))
        clips = batch["x0_w" if algo == "dpo" else "x0"]
        assert (clips.std((2, 3, 4)).amax(1) == 0).sum() == count * (1 if algo == "dpo" else 2)
        assert splits_of(batch["y"]) == {"train"}
    assert calls == [{}]  # as it samples by itself


def test_joined_pairs_keep_their_clips_and_labels(tmp_path, sampled):
    path, _ = sampled
    rendered, made = (
        annotated_pairs(10, ["train"], 0, CONFIG, Vocabulary()),
        pairs_of(path, tmp_path, 6),
    )
    both = generated.join_pairs(rendered, made)
    index, side = torch.tensor([15, 3, 10, 9, 0]), torch.tensor([1, 0, 0, 1, 1])
    videos = both.clips(index, side)
    for video, i, s in zip(videos, index.tolist(), side.tolist()):
        part, own = (rendered, i) if i < 10 else (made, i - 10)
        assert torch.equal(video, part.clips(torch.tensor([own]), torch.tensor([s]))[0])
        assert torch.equal(both.label[i], part.label[own]) and torch.equal(both.y[i], part.y[own])
    assert len(both) == 16
