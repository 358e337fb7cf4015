"""Flow-GRPO: policy gradients on a flow-matching model (arXiv 2505.05470; not in the paper).

Policy gradients need a sampler that draws at random. The ODE dx = v dt has an SDE with the same
distribution of x_t at every t, since s = -(x_t + (1 - t) v) / t is the score of x_t:

    dx = [v + sigma_t^2 / (2 t) (x_t + (1 - t) v)] dt + sigma_t dw,  sigma_t = a sqrt(t / (1 - t))

Each of its Euler steps is a Gaussian, whose density is known. The clips of a prompt begin at one
noise (as in DanceGRPO, arXiv 2505.07818), so their rewards differ by the steps' draws alone. A
clip's reward, compared with the other clips of its prompt, is the advantage of all its steps:

    A = (r - mean of the group) / standard deviation of the group
    L = -E min(ratio A, clip(ratio, 1 - c, 1 + c) A) + kl KL(policy step, reference step)
    ratio = p(x_next | x_t) / p_old(x_next | x_t)

Log-densities are means over a clip's elements, as errors are everywhere in this code base: so the
published code has them, and so a clip range means the same at every video size.
"""

import torch

from flow import TIME_SHIFT, expand_like, mean_square, sampling_times


def step_distribution(v, x_t, t, t_next, noise_level):
    """The Gaussian that an SDE step from t to t_next draws x_next from, for times (B,) with
    0 <= t_next < t: mean like x_t (B, ...), standard deviation (B, 1, ...). noise_level: a."""
    t, t_next = expand_like(t, x_t), expand_like(t_next, x_t)
    dt = t_next - t  # below 0
    t_sigma = torch.where(t == 1, t_next, t)  # sigma is infinite at t = 1
    sigma = noise_level * torch.sqrt(t_sigma / (1 - t_sigma))
    drift = v + sigma**2 / (2 * t) * (x_t + (1 - t) * v)
    return x_t + drift * dt, sigma * torch.sqrt(-dt)


def log_density(x_next, mean, std):
    """log N(x_next; mean, std^2) up to a constant, as a mean over a clip's elements: (B,)."""
    return -mean_square(x_next, mean) / (2 * std.flatten() ** 2)


@torch.no_grad()
def sample_sde(model, x1, y, steps, rng, noise_level, shift=TIME_SHIFT):
    """Noise x1 (B, ...) and prompts y (B, S) -> states (B, steps + 1, ...) of the SDE from t = 1
    to 0. The last step follows the ODE: its noise would stay in the clip. rng: a torch.Generator
    on the CPU."""
    times = sampling_times(steps, shift).tolist()
    states = [x1]
    for t_now, t_next in zip(times[:-1], times[1:]):
        x_t = states[-1]
        t = torch.full((len(x_t),), t_now, device=x_t.device)
        v = model(x_t, t, y)
        if t_next == 0:
            states.append(x_t - t_now * v)
        else:
            mean, std = step_distribution(v, x_t, t, torch.full_like(t, t_next), noise_level)
            noise = torch.randn(x_t.shape, generator=rng).to(x_t.device)
            states.append(mean + std * noise)
    return torch.stack(states, 1)


def group_advantage(reward):
    """Rewards (P, n) of n clips of each prompt -> advantages (P, n), of mean 0 and standard
    deviation 1 in each row; 0 where all rewards of a row are equal."""
    centred = reward - reward.mean(1, keepdim=True)
    return centred / centred.square().mean(1, keepdim=True).sqrt().clamp(min=1e-6)


def flow_grpo_step(
    policy, old, reference, x_t, x_next, y, t, t_next, advantage, clip_range, kl_weight, noise_level
):
    """One training step on SDE steps x_t -> x_next (B, ...) that `old` took for prompts y (B, S),
    with t, t_next and advantage (B,) -> (loss, logs); these also hold the drift |v - v_ref|^2."""
    v = policy(x_t, t, y)
    with torch.no_grad():
        v_old, v_reference = old(x_t, t, y), reference(x_t, t, y)
    mean, std = step_distribution(v, x_t, t, t_next, noise_level)
    old_mean, _ = step_distribution(v_old, x_t, t, t_next, noise_level)
    reference_mean, _ = step_distribution(v_reference, x_t, t, t_next, noise_level)
    ratio = torch.exp(log_density(x_next, mean, std) - log_density(x_next, old_mean, std))
    clipped = ratio.clamp(1 - clip_range, 1 + clip_range)
    objective = torch.minimum(ratio * advantage, clipped * advantage)
    kl = mean_square(mean, reference_mean) / (2 * std.flatten() ** 2)  # of Gaussians of one width
    loss = (kl_weight * kl - objective).mean()
    logs = {
        "loss": loss.item(),
        "kl": kl.mean().item(),
        "clipped": (ratio != clipped).float().mean().item(),
        "drift": mean_square(v, v_reference).mean().item(),
    }
    return loss, logs
