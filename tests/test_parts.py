"""Drawn times, the sampler's defaults, and what each defect costs in the oracle's scores."""

import math

import pytest
import torch

import sample as sampler
import world
from flow import draw_time
from studies.policies import static_quality

# ---------------------------------------------------------------------------------------------
# Flow


@pytest.mark.parametrize(
    ("shift", "normal", "mean"), [(1.0, False, 0.5), (1.0, True, 0.545), (4.0, False, None)]
)
def test_drawn_times_are_shifted(shift, normal, mean):
    rng = torch.Generator().manual_seed(0)
    t = draw_time(40_000, rng, shift, normal)
    # the mean of s u / (1 + (s - 1) u) over u in [0, 1] is s / (s - 1) (1 - log s / (s - 1)): .717
    # for s = 4
    mean = mean or 4 / 3 * (1 - math.log(4) / 3)
    assert t.mean().item() == pytest.approx(mean, abs=0.01) and 0 <= t.min() and t.max() <= 1
    # half of the times lie below the shifted middle: 1/2 stays, or becomes 4/2 / (1 + 3/2) = .8
    half = 0.45 if normal else 0.5  # of the nine in ten that are not drawn near the noise
    assert (t < (0.8 if shift == 4 else 0.5)).float().mean().item() == pytest.approx(half, abs=0.01)


def test_times_left_to_themselves_are_shifted_by_four():
    one, other = (draw_time(64, torch.Generator().manual_seed(0), *shift) for shift in ([], [4.0]))
    assert torch.equal(one, other)


# ---------------------------------------------------------------------------------------------
# Sampler


def test_the_samplers_steps_are_shifted_by_four_unless_told():
    def times(**settings):
        seen = []

        def velocity(x, t, y):
            seen.append(t[0].item())
            return torch.zeros_like(x)

        sampler.sample(
            velocity, torch.zeros(1, 1), torch.zeros(1, 1, dtype=torch.int64), **settings
        )
        return seen

    # u = 1, 3/4, 1/2, 1/4 -> 4 u / (1 + 3 u) = 1, 12/13, 4/5, 4/7
    assert times(steps=4) == pytest.approx([1, 12 / 13, 0.8, 4 / 7])
    assert times(steps=4, shift=1.0) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert len(times()) == sampler.STEPS


# ---------------------------------------------------------------------------------------------
# The oracle


@pytest.fixture(scope="module")
def scenes():
    """Sixteen clean clips of all shapes, and their prompts."""
    prompts = world.split_prompts("train")[::4][:16]
    rng = torch.Generator().manual_seed(0)
    return prompts, world.draw_clips(prompts, torch.zeros(16, dtype=torch.int64), rng, clean=True)


DEFECTS = {"blur": (0, 0), "fade": (1, 0), "haze": (2, 0), "jitter": (3, 1), "flicker": (4, 1)}


@pytest.mark.parametrize("defect", DEFECTS)
def test_each_defect_costs_its_own_dimension(scenes, defect):
    # a third of VQ for each of three defects, half of MQ for each of two; the other dimensions
    # hardly notice
    prompts, clips = scenes
    where, dimension = DEFECTS[defect]
    scores = []
    for severity in (0.0, 0.5, 1.0):
        clips.severity[:] = 0
        clips.severity[:, where] = severity
        scores.append(world.oracle(world.render(clips), prompts).mean(0))
    clips.severity[:] = 0
    lost = scores[0] - scores[2]
    assert 0.2 < lost[dimension] < 0.8 and lost[dimension] > 3 * lost[1 - dimension].abs()
    assert scores[0][dimension] > scores[1][dimension] > scores[2][dimension]


def test_static_quality_falls_with_blur_fading_and_spots_and_not_with_jitter(scenes):
    _, clips = scenes
    clean = world.render(clips)

    def lost(video):
        return (static_quality(clean) - static_quality(video)).mean().item()

    def spoilt(defect):
        clips.severity[:, defect] = 1.0
        video = world.render(clips)
        clips.severity[:] = 0
        return video

    spotted = clean.clone()
    spotted[..., :5, :5] = spotted[..., -5:, -5:] = clean.flatten(3).amax(3)[..., None, None]
    assert lost(spoilt(0)) > 0.2  # a third of it at most
    assert lost(spoilt(1)) == pytest.approx(world.MAX_FADE / 3, abs=0.03)
    assert lost(spotted) > 0.05 and abs(lost(spoilt(3))) < 0.03
    assert static_quality(torch.full_like(clean, -0.8)).max() == 0  # nothing is seen


def test_generators_of_high_quality_are_better_in_their_own_dimension():
    prompts = world.split_prompts("train").repeat(6, 1)
    for dimension, defects in ((0, slice(0, 3)), (1, slice(3, 5))):
        best, worst = (
            world.PROFILES[:, dimension].argmax().item(),
            world.PROFILES[:, dimension].argmin().item(),
        )
        made = []
        for generator in (best, worst):
            rng = torch.Generator().manual_seed(3)
            clips = world.draw_clips(prompts, torch.full((len(prompts),), generator), rng)
            made.append((clips.hidden[:, dimension].mean(), clips.severity[:, defects].mean()))
        assert made[0][0] > made[1][0] + 0.3 and made[0][1] < made[1][1] - 0.3
    wrong = []
    for generator in (world.PROFILES[:, 2].argmax().item(), world.PROFILES[:, 2].argmin().item()):
        clips = world.draw_clips(
            prompts, torch.full((len(prompts),), generator), torch.Generator().manual_seed(3)
        )
        wrong.append((clips.shown != clips.prompt).float().mean().item())
    assert wrong[1] > wrong[0] + 0.1
