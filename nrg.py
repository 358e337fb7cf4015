"""Flow-NRG: steering a sample by the gradient of a reward (paper, section 4.4, Eq. 10-11, appendix B).

    v~(x_t) = v(x_t) - w t / (1 - t) grad_x r(x_t, t, y)                                                         Eq. 11

samples from p_ref exp(r)^w without any training of the generator. The minus is right: a step goes against v, so it
climbs r. Guidance comes after classifier-free guidance, and its gradient passes through the reward alone.

For exactly the tilted density, r(x_t, t) must be the value of what is still to come, log E[exp(w r(x0)) | x_t] / w; its
gradient falls to 0 like 1 - t at the noise, so that t / (1 - t) times it stays finite. A learned reward need not, hence
`eps` and `interval`. Nothing here knows a model class: a reward is any r = reward(x_t, t, y).
"""

import torch


def guide(reward, weights, scale=1.0, eps=0.0, interval=(0.0, 1.0)):
    """Guidance for the sampler: a function (v, x_t, t, y) -> v - scale t / (1 - t + eps) grad_x sum_k weights_k r_k.

    reward: (x_t, t, y) -> (B, K) scores; weights: K numbers of any sign, VQ, MQ, TA. eps 0 is the paper's form, which
    leaves out t = 1 alone. Outside `interval` = (lowest, highest) t nothing is done, and with weights or a scale of 0
    the very same v is returned. ValueError for an eps below 0."""
    if eps < 0:
        raise ValueError(f"eps must not be negative, not {eps}")

    def guided(v, x_t, t, y):
        now = t.reshape(-1, *[1] * (x_t.dim() - 1))
        active = (now >= interval[0]) & (now <= interval[1]) & (1 - now + eps > 0)
        if scale == 0 or not any(weights) or not active.any():
            return v
        with torch.enable_grad():
            x = x_t.detach().requires_grad_(True)
            total = (reward(x, t, y) * torch.tensor(weights, device=x.device)).sum()
            (gradient,) = torch.autograd.grad(total, x)
        factor = torch.where(active, scale * now / (1 - now + eps).clamp(min=1e-12), 0.0)
        return v - factor * gradient  # Eq. 11

    return guided
