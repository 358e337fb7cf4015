"""DiffusionNFT: reinforcement learning on the forward process (Zheng et al., arXiv 2509.16117).

Not in the paper, which aligns once and offline. An old model v_old samples several clips of each
prompt and a reward R scores them. The policy v learns by flow matching on these clips, towards the
good ones and away from the bad ones:

    r = 1/2 + 1/2 clip((R - mean of R over the prompt's clips) / Z, -1, 1)      how good a clip is
    v+ = v_old + beta (v - v_old)
    v- = v_old - beta (v - v_old)
    L = E[r |x0_hat(v+) - x0|^2 + (1 - r) |x0_hat(v-) - x0|^2],  x0_hat(v) = x_t - t v

Each square is divided by the mean |x0_hat - x0| of its clip, held constant, so that all t weigh
about the same. A good clip draws v+ to itself, and so v away from v_old. A bad clip draws v-, and
v moves the other way. With r = 1/2 everywhere both are flow matching on the old model's own clips.

Clips are sampled at CFG 1, because v_old stands for that model's own velocity. After a round v_old
moves towards the policy (`move_old`). A model is any v = model(x_t, t, y).
"""

import torch

from flow import expand_like, interpolate, mean_square

# A z-score has unit spread over clips of all kinds. Rounding moves it by 1e-6 in float32 and by
# 1e-3 in TF32; differences below a hundredth are no reason to prefer a clip.
LEAST_STD = 0.01


def optimality(reward, spread=1.0):
    """Rewards (P, n), means of z-scores, of n clips of each of P prompts -> r (P, n) in [0, 1].

    Z is `spread` standard deviations, at least LEAST_STD each, of the differences from a prompt's
    mean. A clip as good as its prompt's mean has r = 1/2."""
    advantage = reward - reward.mean(1, keepdim=True)
    z = spread * advantage.square().mean().sqrt().clamp(min=LEAST_STD)
    return 0.5 + 0.5 * (advantage / z).clamp(-1, 1)


def nft_error(v, x_t, x0, t):
    """|x0_hat - x0|^2 over the mean |x0_hat - x0| of each clip, which has no gradient: (B,)."""
    x0_hat = x_t - expand_like(t, x0) * v
    size = (x0_hat - x0).detach().float().abs().flatten(1).mean(1)  # (B,)
    return mean_square(x0_hat, x0) / size.clamp(min=1e-5)


def flow_nft_step(policy, old, reference, x0, y, r, t, x1, beta=1.0, kl=0.0):
    """One step on the old model's clips x0 (B, ...) of prompts y (B, S), with r, times t (B,) and
    noise x1 (B, ...) -> (loss, logs). `old` and `reference` get no gradient.

    beta: distance of the implicit policies from v_old, in v - v_old; a small one gives large
    steps. kl: weight of the drift |v - v_ref|^2, the only term that keeps the policy near the
    reference."""
    x_t = interpolate(x0, x1, t)
    v = policy(x_t, t, y)
    with torch.no_grad():
        v_old, v_reference = old(x_t, t, y), reference(x_t, t, y)
    positive = nft_error(v_old + beta * (v - v_old), x_t, x0, t)  # of v+, (B,)
    negative = nft_error(v_old - beta * (v - v_old), x_t, x0, t)  # of v-
    drift = mean_square(v, v_reference)
    loss = (r * positive + (1 - r) * negative + kl * drift).mean()
    logs = {"loss": loss, "positive": positive.mean(), "negative": negative.mean()}
    logs["drift"] = drift.mean()
    return loss, {name: value.item() for name, value in logs.items()}


@torch.no_grad()
def move_old(old, policy, decay):
    """old <- decay old + (1 - decay) policy, in place."""
    for value, new in zip(old.state_dict().values(), policy.state_dict().values(), strict=True):
        value.lerp_(new, 1 - decay)
