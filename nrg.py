"""Flow-NRG: steering a sample by the gradient of a noise-aware reward (section 4.4, Eq. 10-11).

    v~(x_t) = v(x_t) - w t / (1 - t) grad_x r(x_t, t, y)                                    Eq. 11

This aims at p_ref exp(r)^w (Eq. 10) without training the generator. The minus is right: a step goes
against v, so it climbs r. Guidance comes after classifier-free guidance (CFG), and its gradient
passes through the reward alone. We leave out the form of appendix B that replaces p_ref in part
(Eq. 21); the paper's experiments do not use it either.

The reward reads what the sampler sees, a clip with noise on it, so it is trained on such clips. It
is a small head on the base model's embedding and first blocks, which stay frozen; a policy with the
same blocks runs them once for both (`SteeredPolicy`). The paper trains "a few early layers" (Table
11) on people's pairs. The head, the number of blocks and, by default, the target are our choice.
Guidance and losses take any r = reward(x_t, t, y).

The density is exactly the tilted one if r(x_t, t) is the value log E[exp(w r(x0)) | x_t] / w. The
gradient of this value falls to 0 like 1 - t at the noise, so t / (1 - t) times it stays finite. A
learned reward's gradient need not, hence `eps` and `interval`.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import DIMENSIONS
from flow import expand_like, interpolate
from model import ModelConfig, VideoTransformer, modulate
from reward import accuracy_logs, bt_loss
from runtime.checkpoint import load_network

# ---------------------------------------------------------------------------------------------
# Guidance


def guidance_factor(t, scale, eps, interval):
    """Eq. 11's w t / (1 - t + eps) for t (B,); 0 outside `interval` and where it is infinite."""
    active = (t >= interval[0]) & (t <= interval[1]) & (1 - t + eps > 0)
    return torch.where(active, scale * t / (1 - t + eps), 0.0)


def reward_gradient(scores, weights, x):
    """grad_x sum_k weights_k scores_k for scores (B, K) computed from x; of x's shape."""
    total = (scores * torch.tensor(weights, device=x.device)).sum()
    return torch.autograd.grad(total, x)[0]


def guide(reward, weights, scale=1.0, eps=0.0, interval=(0.0, 1.0)):
    """Guidance for the sampler: a function (v, x_t, t, y) -> guided v.

        v - scale t / (1 - t + eps) grad_x sum_k weights_k r_k(x_t, t, y)                    Eq. 11

    reward: (x_t, t, y) -> scores (B, K). weights: K numbers of any sign, for VQ, MQ and TA.
    eps = 0 is the paper's form, which leaves out t = 1 alone. Where nothing is guided (t outside
    `interval` = (lowest, highest), or a scale of 0), v itself is returned."""

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

TA = DIMENSIONS.index("TA")
PLACES = (2, 4, 4)  # cells of a clip in time, height and width that a head tells apart
# Names of a head's layers in older checkpoints, the shipped one among them
OLD_NAMES = {
    "shown.weight": "video_proj.weight",
    "shown.bias": "video_proj.bias",
    "asked.weight": "text_proj.weight",
    "asked.bias": "text_proj.bias",
}


@dataclass(frozen=True)
class NoisyRewardConfig(ModelConfig):
    """The base model's sizes, and `read`, how many of its blocks the reward reads."""

    read: int = 2

    def __post_init__(self):
        super().__post_init__()
        if not 1 <= self.read <= self.depth:
            blocks = f"this base model has {self.depth} blocks, so 1 to {self.depth}"
            raise ValueError(f"read {self.read}: {blocks}")


class NoisyReward(nn.Module):
    """forward(x_t (B, C, T, H, W), t (B,), y (B, S)) -> scores (B, 3): VQ, MQ, TA.

    A head reads the hidden states of a trunk, the first blocks of a velocity model. Video tokens
    do not say where they are, because RoPE acts inside attention alone. So the head reads them by
    place: each token gives a few numbers, which are averaged over each cell of PLACES, and all
    cells together describe the clip. VQ and MQ are linear in this description; TA also matches it
    with the prompt. Scores are divided by `std`, their spread over validation pairs (1 until
    training ends); otherwise the easiest dimension dominates the gradient."""

    def __init__(self, config, numbers=24, width=256, match=64):
        super().__init__()
        trunk, dim = VideoTransformer(config), config.dim
        self.norm = nn.LayerNorm(dim, elementwise_affine=False)
        self.modulation = nn.Linear(dim, 2 * dim)
        self.numbers = nn.Linear(dim, numbers)
        self.cells = nn.Linear(numbers * math.prod(PLACES), width)
        self.condition = nn.Linear(dim, width)
        self.describe = nn.Sequential(nn.GELU(), nn.Linear(width, width), nn.GELU())
        self.scores = nn.Linear(width, len(DIMENSIONS))
        self.video_proj = nn.Linear(width, match)
        self.text_proj = nn.Linear(dim, match)
        self.register_buffer("std", torch.ones(len(DIMENSIONS)))
        nn.init.zeros_(self.modulation.weight)
        nn.init.zeros_(self.modulation.bias)
        self.config = config
        self.trunk = trunk
        self.trunk.blocks = self.trunk.blocks[: config.read]
        del self.trunk.patch_out, self.trunk.modulation  # what follows the last block

    def forward(self, x_t, t, y):
        hidden, condition = self.trunk.embed(x_t, t, y)
        return self.read(self.trunk.run(hidden, condition, 0, self.config.read), condition)

    def read(self, hidden, condition):
        """The trunk's hidden states (B, S + N, d) and condition (B, d) -> scores (B, 3)."""
        words, video = self.trunk.split(hidden)  # (B, S, d), (B, N, d) in (t, h, w) order
        with torch.autocast(video.device.type, enabled=False):  # bfloat16 would round scores alike
            video, words, condition = video.float(), words.float(), condition.float()
            shift, scale = self.modulation(condition)[:, None].chunk(2, -1)  # (B, 1, d) each
            video = self.numbers(modulate(self.norm(video), shift, scale))  # (B, N, numbers)
            video = video.transpose(1, 2).unflatten(2, self.config.grid)  # (B, numbers, T, H, W)
            cells = F.adaptive_avg_pool3d(video, PLACES).flatten(1)  # (B, numbers * cells)
            clip = self.describe(self.cells(cells) + self.condition(condition))  # (B, width)
            scores = self.scores(clip)  # (B, 3)
            video_proj = self.video_proj(clip)  # (B, match)
            text_proj = self.text_proj(self.norm(words)).mean(1)  # (B, match)
            match = (video_proj * text_proj).sum(1) / text_proj.shape[1] ** 0.5  # (B,)
            scores[:, TA] += match  # VQ and MQ do not depend on the words
            return scores / self.std


def trunk_tensors(model, blocks):
    """{name: tensor} of all that computes a VideoTransformer's first `blocks` hidden states."""
    parts = ["patch_in.", "words.", "places", "time.", "pooled."]
    parts += [f"blocks.{i}." for i in range(blocks)]
    tensors = model.state_dict().items()
    return {name: value for name, value in tensors if name.startswith(tuple(parts))}


def noisy_reward_on(base, read, frozen=True):
    """A new NoisyReward on a copy of the first `read` blocks of `base`. With `frozen` the head
    alone is trained. ValueError unless there are so many blocks."""
    reward = NoisyReward(NoisyRewardConfig(**asdict(base.config), read=read))
    reward.trunk.load_state_dict(trunk_tensors(base, read))
    reward.trunk.requires_grad_(not frozen)
    return reward


def load_noisy_reward(path):
    """(NoisyReward, words) of a checkpoint."""
    return load_network(path, "noisy reward", NoisyReward, NoisyRewardConfig, OLD_NAMES)


def noisy_value_step(reward, x0, y, target, t, x1, other_y, other_target):
    """One step on clips x0 (B, ...) of prompts y (B, S), times t (B,), noise x1 -> (loss, logs).

    The loss is the squared error against a clean-clip reward's scores of x0: target (B, 3), and in
    TA other_target (B, 3) for the prompts other_y. Not in the paper. The least error is at
    E[r(x0) | x_t], which is Eq. 10's value log E[exp(w r(x0)) | x_t] / w up to terms in w. Its
    gradient vanishes where noise hides all information."""
    x_t = interpolate(x0, x1, t)
    scores = reward(torch.cat((x_t, x_t)), torch.cat((t, t)), torch.cat((y, other_y)))
    own, other = scores.chunk(2)  # (B, 3) each
    error = (own - target).square().mean(0)  # (3,)
    other_error = (other - other_target)[:, TA].square().mean()
    loss = error.sum() + other_error
    logs = {"loss": loss.item(), **dict(zip(DIMENSIONS, error.tolist()))}
    return loss, logs | {"other": other_error.item()}


def noisy_pair_step(reward, x0_a, x0_b, y, label, t, x1, x1_b=None, weight=None):
    """One step on pairs x0_a, x0_b (B, ...) of prompts y (B, S), labels (B, 3) -> (loss, logs).

    Both clips of a pair get the same t (B,) and noise x1, assuming that noise keeps their order
    (section 4.4); with x1_b clip B has noise of its own. The loss is Bradley-Terry, which leaves
    out ties; weight (B, 3) as in bt_loss. The logs hold the accuracy in each dimension."""
    x1_b = x1 if x1_b is None else x1_b
    x_t = torch.cat((interpolate(x0_a, x1, t), interpolate(x0_b, x1_b, t)))
    a, b = reward(x_t, torch.cat((t, t)), torch.cat((y, y))).chunk(2)  # (B, 3) each
    loss = bt_loss(a, b, label, weight)
    return loss, {"loss": loss.item(), **accuracy_logs(a - b, label)}


# ---------------------------------------------------------------------------------------------
# A policy and its reward in one velocity model


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
    equal = own.keys() == others.keys()
    equal = equal and all(torch.equal(own[name], others[name]) for name in own)
    return reward.config.read if equal else 0
