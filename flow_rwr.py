"""Flow-RWR: reward-weighted regression on a flow-matching model (section 4.3, Eq. 8-9), and SFT.

    L = E[ exp(r(x0, y)) |v - v(x_t, t, y)|^2 ]                                              Eq. 9

The flow-matching loss on given clips, each weighted by its reward: this projects the distribution
p* = p_ref exp(r) / Z (Eq. 7) on the model. The (1 - t)^2 of the noise form (Eq. 8) is dropped, as
in Flow-DPO. The paper leaves the weights open. Ours are exp(r / temperature) of the normalised
reward over its mean, on both clips of every pair; taking the mean over the whole data set, not a
batch, keeps the optimum. SFT, the paper's other baseline, is weight one on the winners alone.
"""

import torch

from flow import flow_error


def rwr_weights(reward, temperature=1.0):
    """exp(reward / temperature) over its mean: (N,) -> (N,) with mean one, always finite.

    A low temperature trusts the reward more: at 0 only the best clip counts, at infinity all count
    alike. ValueError unless temperature > 0."""
    if not temperature > 0:
        raise ValueError(f"temperature must be above 0, not {temperature}")
    weight = torch.exp((reward - reward.max()) / temperature)  # at most 1: cannot overflow
    return weight / weight.mean()


def effective_samples(weight):
    """(sum w)^2 / (N sum w^2): the share of equally weighted clips with as much information."""
    return (weight.sum().square() / weight.square().sum() / len(weight)).item()


def flow_rwr_step(policy, x0, y, weight, t, x1):
    """One step on clips x0 (B, ...) of prompts y (B, S), with weights (B,), times t (B,) and noise
    x1 (B, ...) -> (loss, logs)."""
    error = flow_error(policy, x0, x1, t, y)  # (B,)
    loss = (weight * error).mean()  # Eq. 9
    logs = {"loss": loss.item(), "error": error.mean().item()}
    return loss, logs | {"effective_samples": effective_samples(weight)}
