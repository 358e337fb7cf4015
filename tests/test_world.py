"""The toy world: what is drawn, what the oracle sees of it, and what the annotators say."""

import pytest
import torch

import world


def spearman(a, b):
    """Rank correlation with mean ranks for ties."""

    def ranks(x):
        _, inverse, counts = torch.unique(x, return_inverse=True, return_counts=True)
        centred = (counts.cumsum(0).double() - (counts - 1) / 2)[inverse]
        return centred - centred.mean()

    a, b = ranks(a), ranks(b)
    return (a @ b / (a.norm() * b.norm())).item()


@pytest.fixture(scope="module")
def scored():
    """1,200 clips of all generators and prompts, and what the oracle says of them."""
    rng = torch.Generator().manual_seed(20)
    prompts = world.split_prompts("train", "validation", "hard")
    prompt = prompts[torch.randint(len(prompts), (1200,), generator=rng)]
    clips = world.draw_clips(prompt, torch.arange(1200) % 12, rng)
    scores = [
        world.oracle(world.render(clips[part]), clips.prompt[part])
        for part in torch.arange(1200).split(100)
    ]
    return clips, torch.cat(scores)


def test_oracle_ranks_clips_by_their_hidden_quality_and_only_that(scored):
    clips, scores = scored
    for i, least in enumerate((0.93, 0.93, 0.8)):
        for j in range(3):
            correlation = spearman(scores[:, i], clips.hidden[:, j])
            if i == j:
                assert correlation >= least, (i, correlation)
            else:
                assert abs(correlation) <= 0.15, (i, j, correlation)


def test_oracle_counts_right_attributes(scored):
    clips, scores = scored
    assert torch.equal((3 * scores[:, 2]).round(), (3 * clips.hidden[:, 2]).round())


def test_true_mean_and_std_are_those_of_the_generators(scored):
    _, scores = scored
    # 1,200 clips: the mean is known to 3 % of a standard deviation, the deviation to 2 %
    assert ((scores.mean(0) - world.TRUE_MEAN) / world.TRUE_STD).abs().max().item() < 0.12
    assert (scores.std(0) / world.TRUE_STD - 1).abs().max().item() < 0.08


@pytest.mark.parametrize(("frames", "size"), [(8, 32), (17, 48), (4, 64)])
def test_clean_clips_score_one_at_any_size_and_length(frames, size):
    rng = torch.Generator().manual_seed(1)
    prompt = world.split_prompts("train")
    clips = world.draw_clips(
        prompt, torch.zeros(len(prompt), dtype=torch.int64), rng, frames, clean=True
    )
    video = world.render(clips, size)
    assert video.shape == (len(prompt), 3, frames, size, size)
    assert -1 <= video.min() and video.max() <= 1
    scores = world.oracle(video, [world.prompt_text(p) for p in prompt])
    assert scores.mean(0).tolist() == pytest.approx([1, 1, 1], abs=0.1)
    assert scores.amin().item() > 0.8


def test_oracle_is_not_fooled():
    rng = torch.Generator().manual_seed(2)
    prompt = world.prompt_attributes(["a red circle moving left"])
    clip = world.draw_clips(prompt, torch.tensor([0]), rng, clean=True)
    clean = world.render(clip)

    def score(video, text="a red circle moving left"):
        return world.oracle(video, [text])[0].tolist()

    vq, mq, ta = score(clean)
    assert score(clean.flip(2))[2] == pytest.approx(
        ta - 1 / 3, abs=0.01
    )  # backwards: the direction is wrong
    assert score(clean, "a blue circle moving left")[2] == pytest.approx(2 / 3, abs=0.01)
    assert score(clean, "a blue bar moving up")[2] == pytest.approx(0, abs=0.01)
    still = clean[:, :, 3:4].expand(-1, -1, 8, -1, -1)
    assert score(still)[1] < mq - 0.9  # standing still is no good motion
    assert score(still)[0] == pytest.approx(vq, abs=0.02)
    assert score(clean[:, :, [0, 5, 2, 7, 4, 1, 6, 3]])[1] < mq - 0.4  # shuffled frames
    ground = clean[..., :1, :1].expand(-1, -1, -1, 32, 32)
    rows = [torch.cat(row, 4) for row in ((clean, ground), (ground, ground), (ground, clean))]
    alone, twice = (
        torch.cat((rows[0], below), 3) for below in rows[1:]
    )  # a frame with room for two
    assert (
        score(twice)[0] < score(alone)[0] - 0.1 and score(twice)[2] < score(alone)[2] - 0.1
    )  # a second object
    for empty in (torch.full_like(clean, -1.0), torch.rand(clean.shape, generator=rng) * 2 - 1):
        vq, mq, ta = score(empty)
        assert vq < 0 and mq < 0 and ta == 0


def test_splits_share_words_but_no_prompt():
    splits = [world.split_prompts(name) for name in world.SPLIT_NAMES]
    assert [len(s) for s in splits] == [72, 12, 12]
    assert len(torch.unique(torch.cat(splits), dim=0)) == 96
    for split in splits:
        assert [len(split[:, i].unique()) for i in range(3)] == list(world.CHOICES)


def test_no_clip_shows_a_combination_that_is_held_out():
    rng = torch.Generator().manual_seed(3)
    prompts = world.split_prompts("train", "validation")
    prompt = prompts[torch.randint(len(prompts), (5000,), generator=rng)]
    shown = world.draw_clips(prompt, torch.zeros(5000, dtype=torch.int64), rng).shown
    held_out = {tuple(p) for p in world.split_prompts("hard").tolist()}
    assert not held_out & {tuple(s) for s in shown.tolist()}


def test_generators_are_two_eras_whose_dimensions_do_not_covary():
    assert len(world.GENERATORS) == len(world.PROFILES) == 12
    early, modern = world.PROFILES.split(6)
    assert (modern.mean(0) > early.mean(0)).all()
    centred = world.PROFILES - world.PROFILES.mean(0)
    covariance = centred.T @ centred / 12
    assert (covariance - covariance.diag().diag()).abs().max().item() < 1e-6


def test_drawing_is_reproducible_and_joined_clips_stay_what_they_were():
    prompt = world.split_prompts("train")[:6]
    draws = [
        world.draw_clips(prompt, torch.arange(6), torch.Generator().manual_seed(seed))
        for seed in (1, 1, 2)
    ]
    videos = [world.render(draw) for draw in draws]
    assert torch.equal(videos[0], videos[1]) and not torch.equal(videos[0], videos[2])
    mixed = world.render(world.join(draws[0], draws[2])[torch.tensor([2, 6, 11, 0])])
    assert torch.equal(mixed[[0, 3]], videos[0][[2, 0]]) and torch.equal(
        mixed[[1, 2]], videos[2][[0, 5]]
    )


def test_annotators_agree_on_clear_pairs_and_call_small_differences_ties():
    rng = torch.Generator().manual_seed(4)
    low, high = torch.zeros(2000, 3), 5 * world.TRUE_STD.expand(2000, 3)
    label, unanimous = world.annotate(high, low, rng)
    assert (label == 1).all() and unanimous.all()
    assert (world.annotate(low, high, rng)[0] == -1).all()
    label, unanimous = world.annotate(low, low, rng)
    # A reviewer's difference has standard deviation .15 sqrt 2 = .212 and ties below .5: 98 %;
    # three annotators with .3 sqrt 2 = .424 each tie with P(|z| < 1.179) = .76: unanimous ties
    # .76^3 = .44. TA ties below .7: more still.
    ties = (label == 0).float().mean(0)
    assert (ties[:2] > 0.95).all() and ties[2] > 0.98
    assert unanimous.float().mean(0)[0].item() == pytest.approx(0.44, abs=0.05)
    assert abs(label.float().mean().item()) < 0.02  # neither side is favoured


def test_prompts_round_trip_and_a_wrong_one_is_named():
    prompts = ["a red circle moving left", "a magenta bar moving down"]
    assert [world.prompt_text(a) for a in world.prompt_attributes(prompts)] == prompts
    with pytest.raises(ValueError, match="direction"):
        world.prompt_attributes(["a red circle"])
    with pytest.raises(ValueError, match="colour"):
        world.prompt_attributes(["a red blue circle moving left"])
