"""VideoReward: one network, three scores (section 3.2).

    tokens   [video ...] [VQ] [MQ] | [words of the prompt ...] [TA]

Tokens left of the bar see only each other; those right of it see everything. So VQ and MQ are
context-agnostic: they cannot depend on the prompt. TA sees video and prompt. In the paper the
causal mask of a vision-language model does this (Qwen2-VL-2B). Here a small transformer reads
pixels and is trained from scratch; a second loss, on the prompt's words, stands in for what a
pretrained model knows. As in the paper, one linear layer turns the last hidden states of the three
tokens into scores. Ours has a bias, which cancels in every difference.

The loss is Bradley-Terry with ties (BTT, Eq. 1-2), which needs no threshold and learns from ties.
Pairs fix differences only, so a reward has no zero and no unit. `normalised` gives z-scores over
the validation split, whose mean and standard deviation are stored in the checkpoint.
"""

import math
from dataclasses import asdict, dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F

from data import DIMENSIONS, INVALID, mean_one
from model import Attention, ModelConfig, low_pass, maybe_checkpoint, mlp, no_rope, patchify, rope
from runtime.checkpoint import load_network

THETA = 5.0  # section 3.2: how often ties occur; 1 would mean never
LOSSES = ("btt", "bt", "regression")

# ---------------------------------------------------------------------------------------------
# Losses: r_a, r_b (...) scores, label (...) int: 1 A better, -1 B better, 0 tie, INVALID ignored


def weighted_mean(loss, weight):
    """Weighted mean; an entry of weight 0 adds nothing, even where its loss is not finite."""
    return torch.where(weight > 0, weight * loss, 0.0).mean()


def decided(label):
    """Which labels name a better clip."""
    return label.abs() == 1


def bt_loss(r_a, r_b, label, weight=None):
    """Bradley-Terry: -log sigma(r_w - r_l), the mean over decided pairs; scalar.

    weight, here and below: of each entry, where this is a part of a batch whose weights have mean
    one."""
    weight = mean_one(decided(label)) if weight is None else weight
    return weighted_mean(F.softplus(-label * (r_a - r_b)), weight)


def btt_probabilities(delta, theta=THETA):
    """P(A better), P(B better), P(tie) for delta = r_A - r_B, by Rao and Kupper.

    Eq. 1 as printed has theta at the winner's own term in its first case. The three then do not
    sum to one (0.83 at delta 1, 0.40 at delta 3); in this form they do."""
    a = torch.sigmoid(delta - math.log(theta))  # Eq. 1: e^{r_A} / (e^{r_A} + theta e^{r_B})
    b = torch.sigmoid(-delta - math.log(theta))  # Eq. 1, second case
    return a, b, (theta**2 - 1) * a * b  # Eq. 1, third case


def btt_loss(r_a, r_b, label, theta=THETA, weight=None):
    """Eq. 2: -log of the labels' probability, the mean over valid pairs; scalar."""
    delta = r_a - r_b
    log_a = F.logsigmoid(delta - math.log(theta))
    log_b = F.logsigmoid(-delta - math.log(theta))
    log_tie = log_a + log_b + math.log(theta**2 - 1)
    log_likelihood = torch.where(label == 0, log_tie, torch.where(label == 1, log_a, log_b))
    weight = mean_one(label != INVALID) if weight is None else weight
    return weighted_mean(-log_likelihood, weight)


def regression_loss(r, mos, weight=None):
    """Squared error of scores against mean opinion scores of the same shape, section 3.2's
    baseline: the mean over the ratings that exist (not 0). The target is mos - 3, as published."""
    weight = mean_one(mos != 0) if weight is None else weight
    return weighted_mean((r - (mos - 3)).square(), weight)


def counted(loss, label, mos):
    """Which labels (B, 3), or for regression which ratings (B, 2, 3), a loss learns from."""
    if loss == "regression":
        return mos != 0
    return decided(label) if loss == "bt" else label != INVALID


def caption_loss(logits, y):
    """-log probability of each prompt's bag of words: logits (B, vocab), y (B, S); mean over B.

    Not in the paper: a pretrained backbone knows what words look like, ours learns it here."""
    bag = torch.zeros_like(logits).scatter(1, y, 1.0)
    bag[:, 0] = 0  # padding
    return F.binary_cross_entropy_with_logits(logits, bag, reduction="sum") / len(y)


def reward_step(model, video_a, video_b, y, label, mos, weight, loss="btt", caption=1.0):
    """One step on pairs video_a, video_b (B, ...) of prompts y (B, S), labels (B, 3) and ratings
    mos (B, 2, 3) -> (loss, logs). loss: one of LOSSES; weight: of the labels or ratings that it
    counts; caption: of caption_loss."""
    y = y.repeat(2, 1)
    scores, word_logits = model.scores_and_words(torch.cat((video_a, video_b)), y)  # (2B, ...)
    a, b = scores.chunk(2)  # (B, 3) each
    if loss == "regression":
        preference = regression_loss(torch.stack((a, b), 1), mos, weight)
    elif loss == "bt":
        preference = bt_loss(a, b, label, weight)
    else:
        preference = btt_loss(a, b, label, weight=weight)
    caption_nll = caption_loss(word_logits, y)
    logs = {"loss": preference.item(), "caption": caption_nll.item()}
    return preference + caption * caption_nll, logs | accuracy_logs(a - b, label)


# ---------------------------------------------------------------------------------------------
# Metrics (appendix H.3): delta (N,) = r_A - r_B, label (N,)


def accuracy_without_ties(delta, label):
    """Share of decided pairs whose difference has the right sign (0 is wrong); nan if none is."""
    return (torch.sign(delta) == label)[decided(label)].float().mean().item()


def accuracies_without_ties(delta, label):
    """{"VQ": accuracy_without_ties, "MQ": ..., "TA": ...} for delta and label (N, 3)."""
    accuracies = map(accuracy_without_ties, delta.unbind(1), label.unbind(1))
    return dict(zip(DIMENSIONS, accuracies))


def accuracy_logs(delta, label):
    """The same for the logs, without dimensions that have no decided pair."""
    accuracies = accuracies_without_ties(delta, label)
    return {name: value for name, value in accuracies.items() if not math.isnan(value)}


def accuracy_with_ties(delta, label):
    """Three-class accuracy after tie calibration (Deutsch et al. 2023) -> (accuracy, threshold).

    A tie is predicted where |delta| <= threshold. The threshold is the observed |delta| with the
    best accuracy on these very pairs, or -1 where predicting no tie is better. Pairs with the same
    |delta| change sides together; the published sweep counts them one by one and can overstate."""
    valid = label != INVALID
    delta, label = delta[valid], label[valid]
    if not len(delta):
        return math.nan, math.nan
    size, order = delta.abs().sort()
    tie = (label[order] == 0).long()
    right = (torch.sign(delta[order]) == label[order]).long() * (1 - tie)
    # the first entry stands for no tie at all, the others for the threshold at each size in turn
    size = F.pad(size, (1, 0), value=-1.0)
    correct = right.sum() + F.pad(tie - right, (1, 0)).cumsum(0)
    last = F.pad(size[1:] > size[:-1], (0, 1), value=True)  # of each group of equal sizes
    best = torch.where(last, correct, -1).argmax()
    return correct[best].item() / len(delta), size[best].item()


# ---------------------------------------------------------------------------------------------
# The network


class Stem(nn.Module):
    """Videos (B, C, T, H, W) -> tokens (B, T + N, d): one for each frame, and one for each of N
    places over all frames.

    A place is read twice: a linear layer, at the start a low pass, keeps positions, and overlapping
    convolutions see a shape alike wherever it lies. A frame's token reads the convolutions by
    place, because motion is what differs between whole frames. The clip's mean colour, which is
    mostly ground, is added separately."""

    def __init__(self, config):
        super().__init__()
        self.patch = config.patch
        dim = config.dim
        half = config.patch[1] // 2
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
    """Sizes of a VideoReward, whose patches are as long as the clip.

    separate: a token for each score, or one last token for all (Table 6, I-III)."""

    separate: bool = True

    def __post_init__(self):
        object.__setattr__(self, "patch", (self.frames, *self.patch[1:]))
        super().__post_init__()


def reward_config(config, separate=True):
    """A VideoReward's sizes for a model's: three quarters of the width, two thirds of the depth."""
    sizes = asdict(config) | {"dim": config.dim * 3 // 4, "depth": config.depth * 2 // 3}
    return RewardConfig(**sizes, separate=separate)


class VideoReward(nn.Module):
    """forward(video (B, C, T, H, W), y (B, S)) -> raw scores (B, 3): VQ, MQ, TA."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        dim = config.dim
        self.stem = Stem(config)
        self.words = nn.Embedding(config.vocab, dim)
        self.places = nn.Parameter(torch.randn(config.max_text, dim) * 0.02)
        count = 3 if config.separate else 1
        self.tokens = nn.Parameter(torch.randn(count, dim) * 0.02)  # VQ, MQ, TA; or the last
        self.blocks = nn.ModuleList(RewardBlock(dim, config.heads) for _ in range(config.depth))
        self.norm = nn.LayerNorm(dim)
        self.head = nn.Linear(dim, 3 // count)
        self.caption = nn.Linear(dim, config.vocab)
        head_dim = dim // config.heads
        frames = no_rope(config.frames, head_dim)
        places = rope(config.grid, head_dim)
        rest = no_rope(config.max_text + count, head_dim)
        self.register_buffer("rope", torch.cat((frames, places, rest), 1), persistent=False)
        self.grad_checkpoint = False  # as VideoTransformer's
        self.register_buffer("mean", torch.zeros(3))
        self.register_buffer("std", torch.ones(3))
        nn.init.normal_(self.words.weight, std=0.5)
        nn.init.zeros_(self.head.bias)

    def forward(self, video, y):
        return self.scores_and_words(video, y)[0]

    def scores_and_words(self, video, y):
        """Raw scores (B, 3), and logits (B, vocab) of the words in a prompt for this video."""
        video = self.stem(video)  # (B, N, d)
        tokens = self.tokens.expand(len(video), -1, -1)  # (B, 3, d), or (B, 1, d)
        left, right = tokens.split((len(self.tokens) - 1, 1), 1)  # of the prompt: VQ, MQ | TA
        words = self.words(y) + self.places  # (B, S, d)
        x = torch.cat((video, left, words, right), 1)  # (B, N + 2 + S + 1, d), or N + S + 1
        n = video.shape[1]
        context = n + left.shape[1]  # tokens that cannot see the prompt
        for block in self.blocks:
            x = maybe_checkpoint(self.grad_checkpoint, block, x, self.rope, context)
        with torch.autocast(x.device.type, enabled=False):  # bfloat16 would round scores alike
            x = self.norm(x.float())
            word_logits = self.caption(x[:, :n].mean(1))  # (B, vocab)
            scores = self.head(torch.cat((x[:, n:context], x[:, -1:]), 1))  # (B, 3, 1), (B, 1, 3)
        return scores.flatten(1), word_logits

    def normalised(self, video, y):
        """z-scores (B, 3): (r - mean) / std over the validation split."""
        return (self(video, y) - self.mean) / self.std


def load_reward(path):
    """(VideoReward, words) of a checkpoint."""
    return load_network(path, "reward", VideoReward, RewardConfig)
