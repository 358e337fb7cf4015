"""People's labels and ratings in the place of VideoReward's scores (--rank labels)."""

import torch

from data import INVALID


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
