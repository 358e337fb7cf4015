"""Which clips alignment learns from: pairs ranked by VideoReward or by people (section 5.2)."""

from functools import lru_cache

import torch

from data import INVALID, Vocabulary
from judge import load_judge, pair_scores
from real_data.dataset import disk_data
from real_data.toy_pairs import ON_POLICY, mixed_pairs, training_pairs
from runtime.cli import BadInput, progress_bar
from runtime.distributed import rank


def ranked_clips(settings, config, words, device):
    """Pairs, the reward r (N, 2) of both clips of each, and the VideoReward to judge by or None.

    VideoReward scores the pairs once, offline (section 5.2); with --rank labels people's labels
    take the place of its scores. Clips are the twelve generators', those of --data or, with
    --generated, the base model's."""
    by_labels = settings.rank == "labels"
    if not by_labels and not settings.data:
        source = (device, settings.generated, settings.init, settings.cache)
        pairs, scores, judge = scored_toy_pairs(
            settings.pairs, settings.seed, config, tuple(words), settings.reward, source
        )
        return pairs, total_reward(scores, settings.align), judge
    judge = None
    if settings.reward:
        judge = load_judge(settings.reward, config, words).to(device)
    if settings.data:
        _, _, pairs, _ = disk_data(settings, config, words, held_out=False)
    else:
        pairs = training_pairs(settings, config, Vocabulary(words), device, **ON_POLICY)
    if not by_labels:
        if rank() == 0:
            print("VideoReward ranks the pairs; the labels of --data are not used (--rank labels)")
        scores = pair_scores(judge.normalised, pairs, device, score_bar())
        return pairs, total_reward(scores, settings.align), judge
    ratings = settings.algo == "rwr"
    reward = label_rewards(pairs.label, pairs.mos, settings.align, ratings)
    if not reward.isfinite().any():
        raise BadInput("--rank labels: no label or rating counts under --align")
    return pairs, reward, judge


@lru_cache(maxsize=2)  # a study aligns many policies on the same pairs
def scored_toy_pairs(count, seed, config, words, path, source):
    """Toy pairs, VideoReward's z-scores (N, 2, 3) of both clips of each, and that VideoReward.

    source: the device, and the share, checkpoint and cache of generated pairs."""
    vocabulary, device = Vocabulary(words), source[0]
    sampled = {"labelled": False, **ON_POLICY}
    pairs = mixed_pairs(count, "train", seed, config, vocabulary, *source, **sampled)
    judge = load_judge(path, config, words).to(device)
    return pairs, pair_scores(judge.normalised, pairs, device, score_bar()), judge


def label_rewards(label, mos, align, ratings=False):
    """People's labels (N, 3) as rewards r (N, 2) of both clips, the mean over VQ, MQ and TA under
    the weights `align`: 1 for the better clip, -1 for the other, 0 for both clips of a tie.

    An invalid dimension adds nothing; r is nan where no dimension that has a weight is valid. With
    `ratings`, a clip that has a rating in mos (N, 2, 3) counts by its z-score over all ratings of
    that dimension: of unit spread, as VideoReward's scores are."""
    valid = (label != INVALID)[:, None].expand(-1, 2, -1)  # (N, 2, 3)
    scores = torch.stack((label, -label), 1).double() * valid
    if ratings:
        rated = mos != 0
        count = rated.sum((0, 1)).clamp(min=1)
        centred = (mos - mos.sum((0, 1)) / count) * rated
        std = (centred.square().sum((0, 1)) / count).sqrt().clamp(min=1e-3)
        scores = torch.where(rated, centred / std, scores)
        valid = valid | rated
    weights = torch.tensor(align, dtype=torch.float64)
    r = (scores @ (weights / weights.abs().sum())).round(decimals=6)  # .1 + .2 - .3 is a tie
    return torch.where((valid & (weights != 0)).any(-1), r, torch.nan).float()


def score_bar():
    return progress_bar("VideoReward scores", "x64 pairs")


def total_reward(scores, align):
    """Scores (..., 3) -> (...): 1:1:1 is r = (r_VQ + r_MQ + r_TA) / 3."""
    weights = torch.tensor(align)
    return scores @ (weights / weights.abs().sum())


def winners(reward):
    """Pairs (N',) and the side (N',) of their better clip, by the reward (N, 2). Pairs of equal
    rewards and of nan are left out; BadInput if no pair is left."""
    pair = torch.nonzero((reward[:, 0] - reward[:, 1]).abs() > 0)[:, 0]
    if not len(pair):
        raise BadInput("no pair has a better clip; look at --rank, --reward and --align")
    return pair, (reward[pair, 1] > reward[pair, 0]).long()
