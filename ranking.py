"""Which clips alignment learns from: pairs ranked by VideoReward or by people (section 5.2)."""

from functools import lru_cache

import torch

from data import Vocabulary
from judge import load_judge, pair_scores
from real_data.dataset import disk_data, label_rewards
from real_data.generated import ON_POLICY, mixed_pairs, training_pairs
from runtime.cli import BadInput, progress_bar
from runtime.distributed import rank


def ranked_clips(settings, config, words, device):
    """Pairs, the reward r (N, 2) of both clips of each, and the VideoReward to judge by or None.

    VideoReward scores the pairs once, offline (section 5.2); with --rank labels people's labels
    take the place of its scores. Clips are the twelve generators', those of --data or, with
    --generated, the base model's."""
    if settings.rank == "labels":
        return labelled_clips(settings, config, words, device)
    if settings.data:
        if rank() == 0:
            print("VideoReward ranks the pairs; the labels of --data are not used (--rank labels)")
        judge = load_judge(settings.reward, config, tuple(words)).to(device)
        _, _, pairs, _ = disk_data(settings, config, words, held_out=False)
        scores = pair_scores(judge.normalised, pairs, device, score_bar())
    else:
        pairs, scores, judge = scored_toy_pairs(
            settings.pairs,
            settings.seed,
            config,
            tuple(words),
            settings.reward,
            device,
            settings.generated,
            settings.init,
            settings.cache,
        )
    return pairs, total_reward(scores, settings.align), judge


def labelled_clips(settings, config, words, device):
    """As ranked_clips, with people's labels for the reward."""
    judge = None
    if settings.reward:
        judge = load_judge(settings.reward, config, tuple(words)).to(device)
    if settings.data:
        _, _, pairs, _ = disk_data(settings, config, words, held_out=False)
    else:
        pairs = training_pairs(settings, config, Vocabulary(words), device, **ON_POLICY)
    ratings = settings.algo == "rwr"
    reward = label_rewards(pairs.label, pairs.mos, settings.align, ratings)
    if not reward.isfinite().any():
        raise BadInput("--rank labels: no label or rating counts under --align")
    return pairs, reward, judge


@lru_cache(maxsize=2)  # a study aligns many policies on the same pairs
def scored_toy_pairs(
    count, seed, config, words, path, device, generated=0.0, init=None, cache=None
):
    """Toy pairs, VideoReward's z-scores (N, 2, 3) of both clips of each, and that VideoReward."""
    pairs = mixed_pairs(
        count,
        "train",
        seed,
        config,
        Vocabulary(words),
        device,
        generated,
        init,
        cache,
        labelled=False,
        **ON_POLICY,
    )
    judge = load_judge(path, config, words).to(device)
    return pairs, pair_scores(judge.normalised, pairs, device, score_bar()), judge


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


def regressed_clips(settings, reward):
    """Pairs (M,) and sides (M,) of the clips that Flow-RWR learns: both of each ranked pair, or,
    by labels, every clip that has one."""
    if settings.rank == "labels":
        return reward.isfinite().nonzero().T
    pair, side = winners(reward)
    return torch.cat((pair, pair)), torch.cat((side, 1 - side))
