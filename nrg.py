"""Flow-NRG: steering a sample by the gradient of a noise-aware reward (paper, section 4.4, Eq. 10-11, appendix B).

    v~(x_t) = v(x_t) - w t / (1 - t) grad_x r(x_t, t, y)                                                         Eq. 11

aims at p_ref exp(r)^w (Eq. 10) without any training of the generator. The minus is right: a step goes against v, so it
climbs r. Guidance comes after classifier-free guidance, and its gradient passes through the reward alone. The form of
appendix B that replaces p_ref in part (Eq. 21) is left out; the paper's experiments do not use it either.

The reward reads what the sampler sees, a clip with noise on it, so it is trained on such clips. It is the base model's
embedding and first blocks, frozen, under a small head; a policy that kept these blocks runs them once for both
(`SteeredPolicy`). The paper trains "a few early layers" (Table 11) on people's pairs; head, number of blocks and, by
default, the target are our choice. Guidance and losses take any r = reward(x_t, t, y).

For exactly the tilted density, r(x_t, t) must be the value of what is still to come, log E[exp(w r(x0)) | x_t] / w; its
gradient falls to 0 like 1 - t at the noise, so that t / (1 - t) times it stays finite. A learned reward need not, hence
`eps` and `interval`.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import DIMENSIONS
from flow import TIME_BINS, expand_like, interpolate, time_bin
from model import ModelConfig, VideoTransformer
from reward import accuracies_without_ties, bt_loss
from runtime.checkpoint import load_network

# ---------------------------------------------------------------------------------------------
# Guidance


def guidance_factor(t, scale, eps, interval):
    """Eq. 11's w t / (1 - t + eps) for times t (B,); 0 outside `interval`, and where it is infinite."""
    active = (t >= interval[0]) & (t <= interval[1]) & (1 - t + eps > 0)
    return torch.where(active, scale * t / (1 - t + eps), 0.0)


def reward_gradient(scores, weights, x):
    """grad_x sum_k weights_k scores_k for scores (B, K) that were computed from x; has x's shape."""
    total = (scores * torch.tensor(weights, device=x.device)).sum()
    return torch.autograd.grad(total, x)[0]


def guide(reward, weights, scale=1.0, eps=0.0, interval=(0.0, 1.0)):
    """Guidance for the sampler: a function (v, x_t, t, y) -> guided v.

        v - scale t / (1 - t + eps) grad_x sum_k weights_k r_k(x_t, t, y)                    Eq. 11

    reward: (x_t, t, y) -> scores (B, K). weights: K numbers of any sign, for VQ, MQ and TA.
    eps = 0 is the paper's form, which leaves out t = 1 alone. Where nothing is guided (t outside
    `interval` = (lowest, highest), or all weights or the scale 0), v itself is returned.
    ValueError for an eps below 0."""
    if eps < 0:
        raise ValueError(f"eps must not be negative, not {eps}")
    if not any(weights):
        scale = 0.0

    def guidance(v, x_t, t, y):
        factor = guidance_factor(t, scale, eps, interval)  # (B,)
        if not factor.any():
            return v
        with torch.enable_grad():
            x = x_t.detach().requires_grad_(True)
            gradient = reward_gradient(reward(x, t, y), weights, x)
        return v - expand_like(factor, v) * gradient

    return guidance


# ---------------------------------------------------------------------------------------------
# The noise-aware reward


@dataclass(frozen=True)
class NoisyRewardConfig(ModelConfig):
    """The base model's sizes, and `read`, how many of its blocks the reward reads."""

    read: int = 2

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.read <= self.depth:
            raise ValueError(
                f"read {self.read}: this base model has {self.depth} blocks, so 1 to {self.depth}"
            )


def trunk_tensors(model, blocks):
    """{name: tensor} of all that a VideoTransformer computes its first `blocks` hidden states from."""
    parts = (
        "patch_in.",
        "words.",
        "places",
        "time.",
        "pooled.",
        *(f"blocks.{i}." for i in range(blocks)),
    )
    return {name: value for name, value in model.state_dict().items() if name.startswith(parts)}


PLACES = (2, 4, 4)  # cells of a clip in time, height and width that a head tells apart


class RewardHead(nn.Module):
    """What a noise-aware reward adds to a velocity model's first blocks; a subclass's forward(x_t, t, y) runs these.

    Video tokens do not say where they are, as RoPE acts inside attention alone. So they are read by place: each gives a
    few numbers, averaged over the cells of PLACES, and all cells make one description of the clip, in which VQ and MQ
    are linear; TA also matches it with the prompt. Scores are divided by `std`, their spread over validation pairs, 1
    until the training ends: otherwise the dimension that is easy to tell drowns the others' gradients."""

    def __init__(self, dim, numbers=24, width=256, match=64):
        super().__init__()
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.numbers = nn.Linear(dim, numbers)
        self.cells = nn.Linear(numbers * math.prod(PLACES), width)
        self.condition = nn.Linear(dim, width)
        self.describe = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.scores = nn.Linear(width, len(DIMENSIONS))
        self.shown, self.asked = nn.Linear(width, match), nn.Linear(dim, match)
        self.register_buffer("std", torch.ones(len(DIMENSIONS)))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)

    def head(self, video, grid, words, condition):
        """Hidden states of video tokens (B, N, d) in (t, h, w) order on `grid`, of the prompt's words (B, S, d), and
        the trunk's condition (B, d) -> scores (B, 3) in the order VQ, MQ, TA."""
        with torch.autocast(
            video.device.type, enabled=False
        ):  # near scores would be equal in bfloat16
            video, words, condition = video.float(), words.float(), condition.float()
            shift, scale = self.modulation(condition)[:, None].chunk(2, -1)  # (B, 1, d) each
            video = self.numbers(self.norm(video) * (1 + scale) + shift)  # (B, N, n)
            video = F.adaptive_avg_pool3d(
                video.transpose(1, 2).unflatten(2, grid), PLACES
            )  # (B, n, *PLACES)
            clip = self.describe(
                self.cells(video.flatten(1)) + self.condition(condition)
            )  # (B, width)
            asked = self.asked(self.norm(words)).mean(1)  # (B, match)
            match = (self.shown(clip) * asked).sum(1, keepdim=True) / asked.shape[
                1
            ] ** 0.5  # (B, 1)
            return (self.scores(clip) + F.pad(match, (2, 0))) / self.std  # VQ and MQ know no prompt


class NoisyReward(RewardHead):
    """forward(x_t (B, C, T, H, W), t (B,), y (B, S)) -> scores (B, 3) in the order VQ, MQ, TA."""

    def __init__(self, config):
        trunk = VideoTransformer(config)
        super().__init__(config.dim)
        self.config, self.trunk = config, trunk
        self.trunk.blocks = self.trunk.blocks[: config.read]
        del self.trunk.patch_out, self.trunk.modulation  # what follows the last block

    def forward(self, x_t, t, y):
        hidden, condition = self.trunk.embed(x_t, t, y)
        return self.read(self.trunk.run(hidden, condition, 0, self.config.read), condition)

    def read(self, hidden, condition):
        """The trunk's hidden states (B, S + N, d) and condition -> scores (B, 3)."""
        words, video = self.trunk.split(hidden)
        return self.head(video, self.config.grid, words, condition)


def noisy_reward_on(base, read, frozen=True):
    """A new NoisyReward on a copy of the first `read` blocks of `base`; frozen: the head alone will be trained."""
    reward = NoisyReward(NoisyRewardConfig(**asdict(base.config), read=read))
    reward.trunk.load_state_dict(trunk_tensors(base, read))
    reward.trunk.requires_grad_(not frozen)
    return reward


def load_noisy_reward(path):
    """(NoisyReward, words) of a checkpoint."""
    return load_network(path, "noisy reward", NoisyReward, NoisyRewardConfig)


def noisy_value_step(reward, x0, y, target, t, x1, other_y, other_target):
    """One step on clips x0 (B, ...) with prompts y (B, S) at times t (B,) with noise x1 -> (loss, logs): squared error
    against what a reward of clean clips says of x0: target (B, 3), and in TA for prompts other_y other_target (B, 3).

    Not in the paper. The least error is at E[r(x0) | x_t], which is Eq. 10's value log E[exp(w r(x0)) | x_t] / w up to
    terms in w. Its gradient vanishes where noise hides all information."""
    x_t, ta = interpolate(x0, x1, t), DIMENSIONS.index("TA")
    own, other = reward(torch.cat((x_t, x_t)), torch.cat((t, t)), torch.cat((y, other_y))).chunk(
        2
    )  # (B, 3) each
    error = (own - target).square().mean(0)  # (3,)
    other_error = (other - other_target)[:, ta].square().mean()
    loss = error.sum() + other_error
    return loss, {
        "loss": loss.item(),
        **dict(zip(DIMENSIONS, error.tolist())),
        "other": other_error.item(),
    }


def noisy_pair_step(reward, x0_a, x0_b, y, label, t, x1, x1_b=None, weight=None):
    """One step on pairs x0_a, x0_b (B, ...) with prompts y (B, S), labels (B, 3), times t (B,) -> (loss, logs).

    Both clips of a pair get the same noise x1 and t, assuming that noise keeps their order (section 4.4); with x1_b
    clip B has a noise of its own. The loss is Bradley-Terry, which leaves ties out; weight (B, 3) as bt_loss takes it.
    The logs hold the accuracy in each dimension, and once more for each quarter of t, as "VQ/t0" (the cleanest) to
    "VQ/t3"."""
    x_t = torch.cat((interpolate(x0_a, x1, t), interpolate(x0_b, x1 if x1_b is None else x1_b, t)))
    a, b = reward(x_t, torch.cat((t, t)), torch.cat((y, y))).chunk(2)  # (B, 3) each
    loss = bt_loss(a, b, label, weight)
    delta, label, t = (
        (a - b).detach().cpu(),
        label.cpu(),
        t.cpu(),
    )  # so that the logs wait for the device but once
    logs = {"loss": loss.item(), **accuracies_without_ties(delta, label)}
    for i in range(TIME_BINS):
        in_bin = time_bin(t) == i
        logs |= {
            f"{name}/t{i}": value
            for name, value in accuracies_without_ties(delta[in_bin], label[in_bin]).items()
        }
    return loss, {
        name: value for name, value in logs.items() if value == value
    }  # nan: no such pair


# ---------------------------------------------------------------------------------------------
# One trunk for policy and reward


class SteeredPolicy:
    """A VideoTransformer with CFG, then guidance, as one velocity model (x_t, t, y) -> v.

    The arguments are those of `guide` and `sample`. If policy and reward have the same first
    blocks, these run once for both. With k of L blocks shared, a step costs at best 1 + k/L
    forwards of the policy, because the blocks after them run without a graph."""

    def __init__(self, policy, reward, weights, scale, eps, interval=(0.0, 1.0), cfg=1.0):
        self.config = policy.config
        self.policy = policy
        self.reward = reward
        self.weights = weights
        self.scale = scale if any(weights) else 0.0
        self.eps = eps
        self.interval = interval
        self.cfg = cfg
        self.shared = shared_blocks(policy, reward)

    @torch.no_grad()
    def __call__(self, x_t, t, y):
        policy = self.policy
        factor = guidance_factor(t, self.scale, self.eps, self.interval)  # (B,)
        guided = bool(factor.any())

        with torch.set_grad_enabled(guided):
            x = x_t.detach().requires_grad_(guided)
            hidden, condition = policy.embed(x, t, y)
            hidden = policy.run(hidden, condition, 0, self.shared)
        last = policy.run(hidden, condition, self.shared, len(policy.blocks))
        v = policy.head(last, condition, x_t, t)

        if self.cfg != 1.0:
            v_null = policy(x_t, t, torch.zeros_like(y))
            v = v_null + self.cfg * (v - v_null)
        if not guided:
            return v
        with torch.enable_grad():
            if self.shared:
                scores = self.reward.read(hidden, condition)
            else:
                scores = self.reward(x, t, y)
            gradient = reward_gradient(scores, self.weights, x)
        return v - expand_like(factor, v) * gradient  # Eq. 11


def shared_blocks(policy, reward):
    """How many blocks a policy and a reward share: all that a NoisyReward reads, or 0 unless these
    and what comes before them are equal bit for bit."""
    if not isinstance(reward, NoisyReward) or reward.config.attention != policy.config.attention:
        return 0
    own = trunk_tensors(reward.trunk, reward.config.read)
    others = trunk_tensors(policy, reward.config.read)
    if own.keys() != others.keys():
        return 0
    equal = all(torch.equal(own[name], others[name]) for name in own)
    return reward.config.read if equal else 0
