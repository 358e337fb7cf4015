"""Drawn times, the sampler's defaults, and what each defect costs in the oracle's scores."""

import math

import pytest
import torch

import sample as sampler
import world
from flow import draw_time
from studies.policies import diversity, places, static_quality


@pytest.mark.parametrize(
    ("settings", "middle", "share", "mean"),
    [
        # half of the times lie below the shifted middle, s / 2 / (1 + (s - 1) / 2), and the mean of
        # s u / (1 + (s - 1) u) over u in [0, 1] is s / (s - 1) (1 - log s / (s - 1))
        ((1.0,), 0.5, 0.5, 0.5),
        ((4.0,), 0.8, 0.5, 4 / 3 * (1 - math.log(4) / 3)),
        ((), 0.8, 0.5, 4 / 3 * (1 - math.log(4) / 3)),
        ((1.0, True), 0.5, 0.45, 0.545),  # one in ten is drawn near the noise
    ],
)
def test_drawn_times_are_shifted(settings, middle, share, mean):
    t = draw_time(40_000, torch.Generator().manual_seed(0), *settings)
    assert 0 <= t.min() and t.max() <= 1 and t.mean().item() == pytest.approx(mean, abs=0.01)
    assert (t < middle).float().mean().item() == pytest.approx(share, abs=0.01)


def test_the_samplers_steps_are_shifted_by_four_unless_told():
    def times(**settings):
        seen = []

        def velocity(x, t, y):
            seen.append(t[0].item())
            return torch.zeros_like(x)

        y = torch.zeros(1, 1, dtype=torch.int64)
        sampler.sample(velocity, torch.zeros(1, 1), y, **settings)
        return seen

    # u = 1, 3/4, 1/2, 1/4 -> 4 u / (1 + 3 u) = 1, 12/13, 4/5, 4/7
    assert times(steps=4) == pytest.approx([1, 12 / 13, 0.8, 4 / 7])
    assert times(steps=4, shift=1.0) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert len(times()) == sampler.STEPS


# ---------------------------------------------------------------------------------------------
# The oracle


@pytest.fixture(scope="module")
def spoilt():
    """A function: defect and severity -> sixteen videos of all shapes, and their prompts."""
    prompts = world.split_prompts("train")[::4][:16]
    rng = torch.Generator().manual_seed(0)
    clips = world.draw_clips(prompts, torch.zeros(16, dtype=torch.int64), rng, clean=True)

    def render(defect=0, severity=0.0):
        clips.severity[:] = 0
        clips.severity[:, defect] = severity
        return world.render(clips), prompts

    return render


DEFECTS = {"blur": (0, 0), "fade": (1, 0), "haze": (2, 0), "jitter": (3, 1), "flicker": (4, 1)}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_costs_its_own_dimension(spoilt, defect):
    # a third of VQ for each of three defects, half of MQ for each of two; the other dimensions
    # hardly notice
    where, own = DEFECTS[defect]
    scores = [world.oracle(*spoilt(where, severity)).mean(0) for severity in (0.0, 0.5, 1.0)]
    lost = scores[0] - scores[2]
    assert 0.2 < lost[own] < 0.8 and lost[own] > 3 * lost[1 - own].abs()
    assert scores[0][own] > scores[1][own] > scores[2][own]


def test_static_quality_falls_with_blur_fading_and_spots_and_not_with_jitter(spoilt):
    clean, _ = spoilt()

    def lost(video):
        return (static_quality(clean) - static_quality(video)).mean().item()

    spotted = clean.clone()
    spotted[..., :5, :5] = spotted[..., -5:, -5:] = clean.flatten(3).amax(3)[..., None, None]
    blurred, faded, jittered = (spoilt(defect, 1.0)[0] for defect in (0, 1, 3))
    assert lost(blurred) > 0.2  # a third of it at most
    assert lost(faded) == pytest.approx(world.MAX_FADE / 3, abs=0.03)
    assert lost(spotted) > 0.05 and abs(lost(jittered)) < 0.03
    assert static_quality(torch.full_like(clean, -0.8)).max() == 0  # nothing is seen


def test_the_spread_of_clean_clips_is_that_of_the_world():
    """Clean clips start and grow uniformly, over .12 of a height and .2 of their size."""
    prompts = world.split_prompts("train")[:6].repeat_interleave(40, 0)
    rng = torch.Generator().manual_seed(0)
    clips = world.draw_clips(prompts, torch.zeros(len(prompts), dtype=torch.int64), rng, clean=True)
    spread = diversity({"prompt": prompts, **places(world.render(clips))})
    assert spread["spread_start"] == pytest.approx(0.12 / 12**0.5, rel=0.1)
    assert spread["spread_size"] == pytest.approx(0.2 / 12**0.5, rel=0.1)
    assert spread["spread_path"] < 0.005  # each path is as long as the world's
    rng = torch.Generator().manual_seed(0)
    first = dict.fromkeys(("start", "path", "size", "pixels"), torch.randn(240, 1, generator=rng))
    one = diversity({"prompt": prompts[:1].repeat(240, 1), **first})
    assert one["spread_pixels"] == pytest.approx(first["size"].std().item())


def test_generators_of_high_quality_are_better_in_their_own_dimension():
    prompts = world.split_prompts("train").repeat(6, 1)

    def drawn(generator):
        rng = torch.Generator().manual_seed(3)
        return world.draw_clips(prompts, torch.full((len(prompts),), generator), rng)

    best, worst = world.PROFILES.argmax(0).tolist(), world.PROFILES.argmin(0).tolist()
    for dimension, defects in ((0, slice(0, 3)), (1, slice(3, 5))):
        good, bad = drawn(best[dimension]), drawn(worst[dimension])
        gain = good.hidden[:, dimension].mean() - bad.hidden[:, dimension].mean()
        assert gain > 0.3
        assert bad.severity[:, defects].mean() > good.severity[:, defects].mean() + 0.3
    wrong = [
        (clips.shown != clips.prompt).float().mean() for clips in map(drawn, (best[2], worst[2]))
    ]
    assert wrong[1] > wrong[0] + 0.1
