"""Flow matching: the path from data to noise, its error, training times (section 4.1, app. B to D).

Conventions: x0 data at t = 0, x1 standard normal noise at t = 1, v = x1 - x0. A velocity model is
any callable v = model(x_t, t, y). Errors are means over everything but the batch, in float32, so
that a beta, a reward temperature or a learning rate means the same at every video size.
"""

import torch

TIME_SHIFT = 4.0  # of training times and sampling steps, to noise, where a clip's layout is decided
TIME_BINS = 4  # for the logs


def expand_like(t, x):
    """t (B,) as (B, 1, ..., 1), to multiply x (B, ...) with."""
    return t.reshape(-1, *[1] * (x.dim() - 1))


def interpolate(x0, x1, t):
    """x_t = (1 - t) x0 + t x1 for t (B,) and x0, x1 (B, ...)."""
    t = expand_like(t, x0)
    return (1 - t) * x0 + t * x1


def flow_error(model, x0, x1, t, y):
    """||v - v_model(x_t, t, y)||^2 of each sample (section 4.1), a mean over its elements: (B,)."""
    return mean_square(model(interpolate(x0, x1, t), t, y), x1 - x0)


def mean_square(a, b):
    """Squared difference of each sample (B, ...), as a mean over its elements: (B,) float32."""
    return (a.float() - b.float()).square().flatten(1).mean(1)


def shift_time(t, shift):
    """Moves times in [0, 1] to noise: t -> s t / (1 + (s - 1) t). 0 and 1 stay; shift 1 is none."""
    return shift * t / (1 + (shift - 1) * t)


def sampling_times(steps, shift=TIME_SHIFT):
    """The times (steps + 1,) of a sampler, from 1 to 0."""
    return shift_time(torch.linspace(1, 0, steps + 1), shift)


def draw_time(count, rng, shift=TIME_SHIFT, normal=False):
    """Training times (count,) from the CPU torch.Generator `rng`, so that devices agree.

    Uniform (appendix C), then shifted. With `normal` logit-normal(0, 1), then shifted, but one in
    ten is uniform on (0.9, 1): there a clip's brightness is decided, and a logit-normal is rare."""
    if not normal:
        return shift_time(torch.rand(count, generator=rng), shift)
    t = shift_time(torch.sigmoid(torch.randn(count, generator=rng)), shift)
    noisiest = 1 - 0.1 * torch.rand(count, generator=rng)
    return torch.where(torch.rand(count, generator=rng) < 0.1, noisiest, t)


def time_bin(t):
    """Which of TIME_BINS equal parts of [0, 1] each t (B,) lies in; 0 is the cleanest."""
    return (t * TIME_BINS).long().clamp(max=TIME_BINS - 1)
