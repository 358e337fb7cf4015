"""VideoReward: one network, three scores (paper, section 3.2).

    tokens   [video ...] [VQ] [MQ] | [words of the prompt ...] [TA]

The tokens left of the bar see only each other, those right of it see everything: VQ and MQ are context-agnostic, they
cannot know the prompt, and TA sees video and prompt. In the paper the causal mask of a vision-language model does this
(Qwen2-VL-2B, the special tokens placed before and after the prompt); here a small transformer trained from nothing
reads pixels, and a second loss on the prompt's words stands in for what a pretrained model knows. One linear layer,
shared by the three tokens, turns their last hidden states into scores, as in the paper, where it has no bias; here it
has one, which cancels in every difference.

Trained on pairs with the Bradley-Terry model with ties (BTT, Eq. 1-2), which needs no threshold and learns from ties.
A reward has no zero and no unit of its own: pairs fix differences only. `normalised` gives z-scores over the validation
split, whose mean and standard deviation are stored in the checkpoint.
"""

import math
from dataclasses import dataclass, fields

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import DIMENSIONS, INVALID, mean_one
from model import (
    Attention,
    ModelConfig,
    identity_rope,
    low_pass,
    maybe_checkpoint,
    mlp,
    patchify,
    rope,
)
from runtime.checkpoint import load_network

THETA = 5.0  # section 3.2: how often ties occur; 1 would mean never

# ---------------------------------------------------------------------------------------------
# Losses: r_a, r_b (...) scores, label (...) int: 1 A better, -1 B better, 0 tie, INVALID ignored


def _mean(loss, weight):
    """Weighted mean; what weighs 0 changes neither the scale nor the gradient of the rest."""
    return torch.where(weight > 0, weight * loss, 0.0).mean()


def decided(label):
    """Which labels name a better clip."""
    return label.abs() == 1


def bt_loss(r_a, r_b, label, weight=None):
    """Bradley-Terry: -log sigma(r_w - r_l), over decided pairs only; scalar. weight, here and below: of each entry, of
    mean one over the whole batch where this is a part of one."""
    weight = mean_one(decided(label)) if weight is None else weight
    return _mean(F.softplus(-label * (r_a - r_b)), weight)


def btt_probabilities(delta, theta=THETA):
    """P(A better), P(B better), P(tie) for delta = r_A - r_B, by Rao and Kupper.

    Eq. 1 as printed has theta at the winner's own term in its first case; the three then do not sum to one (0.83 at
    delta 1, 0.40 at delta 3). This is the form that does."""
    a = torch.sigmoid(delta - math.log(theta))  # Eq. 1: e^{r_A} / (e^{r_A} + theta e^{r_B})
    b = torch.sigmoid(-delta - math.log(theta))  # Eq. 1, second case
    return a, b, (theta**2 - 1) * a * b  # Eq. 1, third case


def btt_loss(r_a, r_b, label, theta=THETA, weight=None):
    """Eq. 2: -log of the probability of what the annotators said, over valid pairs; scalar."""
    delta = r_a - r_b
    log_a, log_b = F.logsigmoid(delta - math.log(theta)), F.logsigmoid(-delta - math.log(theta))
    log_tie = log_a + log_b + math.log(theta**2 - 1)
    log_likelihood = torch.where(label == 0, log_tie, torch.where(label == 1, log_a, log_b))
    weight = mean_one(label != INVALID) if weight is None else weight
    return _mean(-log_likelihood, weight)


def regression_loss(r, mos, weight=None):
    """Mean squared error against mean opinion scores, section 3.2's baseline: scores and mos of any shape -> scalar,
    the mean over the ratings that are there (not 0). The target is mos - 3, as in the published code."""
    weight = mean_one(mos != 0) if weight is None else weight
    return _mean((r - (mos - 3)).square(), weight)


def caption_loss(logits, y):
    """-log probability of the bag of words of prompts y (B, S) under independent logits (B, vocab); mean over B.

    Not in the paper, whose pretrained backbone knows what words look like; here the pairs' own prompts teach it."""
    bag = torch.zeros_like(logits).scatter(1, y, 1.0)
    bag[:, 0] = 0  # padding
    return F.binary_cross_entropy_with_logits(logits, bag, reduction="sum") / len(y)


def reward_step(model, video_a, video_b, y, label, mos, weight, loss="btt", caption=1.0):
    """One step on pairs video_a, video_b (B, ...) with prompts y (B, S), labels (B, 3) and ratings mos (B, 2, 3)
    -> (loss, logs). loss: one of LOSSES; weight: of the labels or ratings it counts; caption: of caption_loss."""
    y = y.repeat(2, 1)
    scores, words = model.scores_and_words(torch.cat((video_a, video_b)), y)  # (2B, 3)
    a, b = scores.chunk(2)
    if loss == "regression":
        preference = regression_loss(torch.stack((a, b), 1), mos, weight)
    else:
        preference = LOSSES[loss](a, b, label, weight=weight)
    words = caption_loss(words, y)
    accuracy = {
        name: value
        for name, value in accuracies_without_ties(a - b, label).items()
        if value == value
    }
    return preference + caption * words, {
        "loss": preference.item(),
        "caption": words.item(),
        **accuracy,
    }


LOSSES = {"btt": btt_loss, "bt": bt_loss, "regression": regression_loss}


def counted(loss, label, mos):
    """Which labels (B, 3), or for regression which ratings (B, 2, 3), a loss learns from."""
    return {"btt": label != INVALID, "bt": decided(label), "regression": mos != 0}[loss]


# ---------------------------------------------------------------------------------------------
# Metrics (paper, appendix H.3): delta (N,) = r_A - r_B, label (N,)


def accuracy_without_ties(delta, label):
    """Share of decided pairs whose difference has the right sign; 0 is wrong. nan without such pairs."""
    return (torch.sign(delta) == label)[decided(label)].float().mean().item()


def accuracies_without_ties(delta, label):
    """accuracy_without_ties of each dimension, for delta and label (N, 3): {"VQ": ..., "MQ": ..., "TA": ...}."""
    return {
        name: accuracy_without_ties(delta[:, i], label[:, i]) for i, name in enumerate(DIMENSIONS)
    }


def accuracy_with_ties(delta, label):
    """Three-class accuracy after tie calibration (Deutsch et al. 2023): a tie is predicted where |delta| <= threshold,
    and the threshold is the observed |delta| with the best accuracy on these very pairs, or -1 where no tie at all is
    better. -> (accuracy, threshold).

    All pairs with the same |delta| change sides together; the published sweep counts them one by one and can
    overstate."""
    valid = label != INVALID
    delta, label = delta[valid], label[valid]
    if not len(delta):
        return float("nan"), float("nan")
    size, order = delta.abs().sort()
    tie = (label[order] == 0).long()
    right = (torch.sign(delta[order]) == label[order]).long() * (1 - tie)
    size, gain = F.pad(size, (1, 0), value=-1.0), F.pad(tie - right, (1, 0))  # first: no tie at all
    correct = right.sum() + gain.cumsum(0)  # with the threshold at each size in turn
    last = F.pad(size[1:] > size[:-1], (0, 1), value=True)  # of each group of equal sizes
    best = torch.where(last, correct, -1).argmax()
    return correct[best].item() / len(delta), size[best].item()


# ---------------------------------------------------------------------------------------------
# The network


class Stem(nn.Module):
    """Videos (B, C, T, H, W) to tokens (B, T + N, d): one of each frame, and one of each of N places over all frames.
    A place is seen twice: a linear view, a low-pass filter at the start, keeps positions, and overlapping convolutions
    see a shape the same wherever it lies. A frame's token reads the convolutions by place, for motion is what differs
    between whole frames. The clip's mean colour, most of it ground, enters apart."""

    def __init__(self, config):
        super().__init__()
        self.patch = config.patch
        half, dim = config.patch[1] // 2, config.dim
        self.linear = nn.Linear(config.channels * math.prod(config.patch), dim)
        self.linear.weight.data.copy_(low_pass(config))
        self.convolutions = nn.Sequential(
            nn.Conv2d(config.channels, dim // 3, half + 2, stride=half, padding=1),
            nn.GELU(),
            nn.Conv2d(dim // 3, dim, 3, stride=2, padding=1),
            nn.GELU(),
        )
        self.merge = nn.Linear(config.frames * dim, dim)
        self.frame = nn.Linear(16 * dim, dim)  # from 4 x 4 cells of it
        self.moments = nn.Parameter(torch.randn(config.frames, dim) * 0.02)
        self.level = nn.Linear(config.channels, dim)

    def forward(self, video):
        b, _, t = video.shape[:3]
        level = video.mean((2, 3, 4))  # (B, C)
        video = video - level[:, :, None, None, None]
        x = self.convolutions(video.transpose(1, 2).flatten(0, 1))  # (B * T, d, h, w)
        frames = self.frame(F.adaptive_avg_pool2d(x, 4).flatten(1)).reshape(b, t, -1)  # (B, T, d)
        x = x.reshape(b, t, x.shape[1], -1).permute(0, 3, 1, 2).flatten(2)  # (B, N, T * d)
        places = self.linear(patchify(video, self.patch)) + self.merge(x)  # (B, N, d)
        return torch.cat((frames + self.moments, places), 1) + self.level(level)[:, None]


class RewardBlock(nn.Module):
    """Attention and MLP; the first `context` tokens see only each other."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim)
        self.mlp = mlp(dim)

    def forward(self, x, rope, context):
        x = x + self.attn(self.norm1(x), rope, context)
        return x + self.mlp(self.norm2(x))


@dataclass(frozen=True)
class RewardConfig(ModelConfig):
    """Sizes of a VideoReward, whose patches are as long as the clip; `separate`: a token for each score, or (Table 6,
    I-III) one last token for all."""

    separate: bool = True

    def __post_init__(self):
        object.__setattr__(self, "patch", (self.frames, *self.patch[1:]))
        super().__post_init__()


def reward_config(config, separate=True):
    """A VideoReward's sizes beside a model's of `config`: three quarters of its width and two thirds of its depth."""
    sizes = {field.name: getattr(config, field.name) for field in fields(config)}
    sizes |= {"dim": config.dim * 3 // 4, "depth": config.depth * 2 // 3}
    return RewardConfig(**sizes, separate=separate)


class VideoReward(nn.Module):
    """forward(video (B, C, T, H, W), y (B, S)) -> raw scores (B, 3) in the order VQ, MQ, TA."""

    def __init__(self, config):
        super().__init__()
        self.config, dim = config, config.dim
        self.stem = Stem(config)
        self.words = nn.Embedding(config.vocab, dim)
        self.places = nn.Parameter(torch.randn(config.max_text, dim) * 0.02)
        self.tokens = nn.Parameter(
            torch.randn(3 if config.separate else 1, dim) * 0.02
        )  # VQ, MQ, TA; or the last
        self.blocks = nn.ModuleList(RewardBlock(dim, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 1 if config.separate else 3)
        self.caption = nn.Linear(dim, config.vocab)
        head_dim = dim // config.heads
        frames, rest = (
            identity_rope(n, head_dim) for n in (config.frames, config.max_text + len(self.tokens))
        )
        self.register_buffer(
            "rope", torch.cat((frames, rope(config.grid, head_dim), rest), 1), persistent=False
        )
        self.grad_checkpoint = False  # as VideoTransformer's
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))
        nn.init.normal_(self.words.weight, std=0.5)
        nn.init.zeros_(self.head.bias)

    def forward(self, video, y):
        return self.scores_and_words(video, y)[0]

    def scores_and_words(self, video, y):
        """Raw scores (B, 3), and logits (B, vocab) of which words a prompt for this video holds."""
        video = self.stem(video)  # (B, N, d)
        count = video.shape[1]
        tokens = self.tokens.expand(len(video), -1, -1)  # (B, 3, d), or (B, 1, d)
        blind = len(self.tokens) - 1  # how many stand left of the prompt: VQ and MQ, or none
        x = torch.cat((video, tokens[:, :blind], self.words(y) + self.places, tokens[:, blind:]), 1)
        for block in self.blocks:
            x = maybe_checkpoint(self.grad_checkpoint, block, x, self.rope, count + blind)
        with torch.autocast(x.device.type, enabled=False):  # near scores would be equal in bfloat16
            x = self.norm(x.float())  # (B, N + 2 + S + 1, d), or (B, N + S + 1, d)
            words = self.caption(
                x[:, :count].mean(1)
            )  # (B, vocab), from video tokens, which cannot see the prompt
            scores = self.head(
                torch.cat((x[:, count : count + blind], x[:, -1:]), 1)
            )  # (B, 3, 1), or (B, 1, 3)
        return scores.flatten(1), words

    def normalised(self, video, y):
        """z-scores (B, 3): (r - mean) / std over the validation split."""
        return (self(video, y) - self.mean) / self.std


def load_reward(path):
    """(VideoReward, words) of a checkpoint."""
    return load_network(path, "reward", VideoReward, RewardConfig)
