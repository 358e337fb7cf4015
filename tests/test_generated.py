"""Models among the generators: which clips are sampled, how they are kept and paired, what VideoReward learns on."""

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
    """A clip that says where it comes from: its prompt in red, its settings in green, its number in blue."""
    red = (y * torch.arange(1, y.shape[1] + 1)).sum(1) / 500
    values = torch.stack(
        (red, torch.full_like(red, steps / 10 + cfg / 100), torch.full_like(red, number)), 1
    )
    return values[:, :, None, None, None].expand(-1, -1, CONFIG.frames, CONFIG.size, CONFIG.size)


@pytest.fixture
def sampled(tiny, monkeypatch):
    """(base model's path, calls of the sampler, each (noise, y, settings)); clips are those of clip_of."""
    args, _ = tiny("--algo=reward")
    calls = []

    def sample_many(model, x1, y, progress, steps=20, cfg=1.0):
        calls.append((x1, y, {"steps": steps, "cfg": cfg}))
        return clip_of(y, len(calls) / 100, steps, cfg)

    monkeypatch.setattr(generated, "sample_many", sample_many)
    return args.init, calls


def pairs_of(path, folder, count=30, splits=("validation",), seed=0, models=TWO):
    return annotate_pairs(
        *generated.generated_pairs(count, splits, seed, path, CONFIG, folder, CPU, models), seed
    )


def test_each_prompt_is_sampled_at_every_setting_and_pairs_are_two_clips_of_one_prompt(
    sampled, tmp_path
):
    path, calls = sampled
    pairs = pairs_of(path, tmp_path)
    assert [settings for _, _, settings in calls] == [
        {"steps": 1, "cfg": 1.0},
        {"steps": 2, "cfg": 3.0},
    ]
    prompts = Vocabulary().encode_attributes(world.split_prompts("validation"), CONFIG.max_text)
    for x1, y, _ in calls:
        # 30 pairs of 12 prompts: 5 clips of each, of which the first setting makes three, the second two
        assert len(x1) == len(y) and torch.equal(y, y[:12].repeat(len(y) // 12, 1))
        assert sorted(y[:12].tolist()) == sorted(prompts.tolist())
        assert len(x1.flatten(1).unique(dim=0)) == len(x1)
    assert [len(y) for _, y, _ in calls] == [36, 24]
    assert not torch.equal(calls[0][0][:24], calls[1][0])  # noise of its own
    a, b = pairs.sides(torch.arange(30))
    for i in range(30):
        for side, clip in enumerate((a[i], b[i])):
            model = pairs.models[i, side].item() - 12
            settings = ({"steps": 1, "cfg": 1.0}, {"steps": 2, "cfg": 3.0})[model]
            wanted = clip_of(pairs.y[i : i + 1], (model + 1) / 100, **settings)[0]
            assert torch.allclose(clip, wanted, atol=1 / 255 + 1e-6)  # kept in 256 steps
    assert splits_of(pairs.y) == {"validation"}


def test_a_clip_is_not_compared_with_itself_and_labels_are_the_annotators(
    tiny, tmp_path, monkeypatch
):
    args, _ = tiny("--algo=reward")

    def rendered(model, x1, y, progress, **settings):
        prompt = world.prompt_attributes([Vocabulary().decode(row) for row in y])
        rng = torch.Generator().manual_seed(len(calls))
        calls.append(1)
        return world.render(
            world.draw_clips(prompt, torch.arange(len(y)) % 12, rng, CONFIG.frames), CONFIG.size
        )

    calls = []
    monkeypatch.setattr(generated, "sample_many", rendered)
    pairs = pairs_of(args.init, tmp_path, 100, ("train",))
    a, b = pairs.sides(torch.arange(100))
    assert ((a - b).abs().flatten(1).amax(1) > 0).all()
    prompt = world.prompt_attributes([Vocabulary().decode(row) for row in pairs.y])
    gap = (world.oracle(a, prompt) - world.oracle(b, prompt)) / world.TRUE_STD
    clear = gap.abs() > 1.5  # five times what an annotator errs by
    assert clear.sum() > 30 and torch.equal(pairs.label[clear], gap[clear].sign().long())
    assert torch.allclose(pairs.truth[:, 0], world.oracle(a, prompt), atol=1e-5)


def test_clips_are_kept_and_sampled_again_when_they_differ_or_are_damaged(sampled, tmp_path):
    path, calls = sampled
    first = pairs_of(path, tmp_path)
    assert torch.equal(
        pairs_of(path, tmp_path).sides(torch.arange(30))[0], first.sides(torch.arange(30))[0]
    )
    assert len(calls) == 2
    (file,) = tmp_path.glob("generated-*.pt")
    file.write_bytes(file.read_bytes()[:1000])
    pairs_of(path, tmp_path)
    assert len(calls) == 4 and len(list(tmp_path.glob("*.tmp"))) == 0
    for other in (
        {"seed": 1},
        {"models": {"one": {"steps": 1}}},
        {"splits": ("hard",)},
        {"count": 60},
    ):
        before = len(calls)
        pairs_of(path, tmp_path, **other)
        assert len(calls) > before, other
    assert torch.equal(calls[0][0], calls[2][0]) and not torch.equal(
        calls[0][0], calls[4][0]
    )  # a seed's noise
    network, _ = generated.load_velocity(path)
    wired.save(wired.noticeable(network), "velocity", path)
    before = len(calls)
    pairs_of(path, tmp_path)
    assert len(calls) > before


def test_their_number_is_bounded(sampled, tmp_path):
    path, calls = sampled
    pairs_of(path, tmp_path, 5000)
    assert sum(len(y) for _, y, _ in calls) == 12 * generated.MOST_CLIPS


def share_of(share, cache):
    """Flags for a share of generated pairs, kept in a folder."""
    return [f"--generated={share}"] + ([f"--cache={cache}"] if share else [])


def test_a_share_of_videorewards_pairs_is_generated(tiny, tmp_path):
    for share, count in ((0, 0), (0.25, 10), (1, 40)):
        flags = share_of(share, tmp_path / "clips")
        _, task = tiny("--algo=reward", "--pairs=40", "--eval-pairs=40", *flags)
        held = {name.split()[0]: len(part) for name, part in task.held.items()}
        assert held == {
            name: n for name, n in (("rendered", 40 - count), ("generated", count)) if n
        }
        seen = [task.batch(step, slice(0, 8)) for step in range(5)]
        assert set().union(*(splits_of(batch["y"]) for batch in seen)) == {"train"}
        for part in task.held.values():
            assert splits_of(part.y) == {"validation"}


def test_the_toy_data_on_disk_and_its_table_show_generated_clips(
    tiny, tmp_path, capsys, monkeypatch
):
    args, _ = tiny("--algo=reward")
    flags = [
        "--pairs=10",
        "--generated=0.6",
        f"--init={args.init}",
        f"--cache={tmp_path / 'clips'}",
    ]
    monkeypatch.setattr(export_toy, "ModelConfig", lambda: CONFIG)
    monkeypatch.setattr("sys.argv", ["data.py", "export", str(tmp_path / "toy"), *flags])
    export_toy.main()
    for name, (rendered, made) in {
        "train": (4, 6),
        "validation": (1, 1),
        "benchmark": (1, 1),
    }.items():
        rows = read_pairs(tmp_path / "toy" / f"{name}.csv")
        names = [
            {path.rpartition("_")[2].removesuffix(".mp4") for path in row.paths} for row in rows
        ]
        assert [pair <= set(world.GENERATORS) for pair in names] == [True] * rendered + [
            False
        ] * made
        assert set().union(*names[rendered:]) <= set(generated.MODELS)
        assert name != "benchmark" or [set(row.models) for row in rows] == names
        assert all((tmp_path / "toy" / path).exists() for row in rows for path in row.paths)
    monkeypatch.setattr("sys.argv", ["data.py", "table", *flags])
    export_toy.main()
    printed = capsys.readouterr().out
    shown = dict(
        re.findall(
            r"^\| (base[\w.-]*) \| (\d+) \|",
            printed.partition("## train")[2].partition("##")[0],
            re.M,
        )
    )
    assert (
        set(shown) == set(generated.MODELS) and sum(map(int, shown.values())) == 12
    )  # two clips of six pairs


@pytest.mark.parametrize("target", ["reward", "labels"])
def test_what_the_noise_aware_reward_trains_on_is_generated_where_the_flag_says_so(
    sampled, tiny, tmp_path, target
):
    for share, count in ((0, 0), (1, 8)):
        flags = share_of(share, tmp_path / "clips")
        _, task = tiny("--algo=nrg", f"--target={target}", "--pairs=8", *flags)
        clips = task.batch(0, slice(0, 8))["x0" if target == "reward" else "x0_a"]
        assert (
            clips.std((2, 3, 4)).amax(1) == 0
        ).sum() == count  # clips of clip_of have one colour


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
