"""Flow-DPO: preference optimisation of a flow-matching model (section 4.2, Eq. 4-6, appendix C).

    L = -E log sigma( -beta_t / 2 [ (|v^w - v(x_t^w)|^2 - |v^w - v_ref(x_t^w)|^2)
                                  - (|v^l - v(x_t^l)|^2 - |v^l - v_ref(x_t^l)|^2) ] )        Eq. 6

Winner w and loser l share noise and t and go through the policy in one forward; the reference is
frozen. The derivation from Diffusion-DPO (Eq. 4) gives beta_t = beta (1 - t)^2, since a noise error
is (1 - t)^2 times a velocity error (Eq. 5). The paper recommends beta_t = beta. With (1 - t)^2 both
the gradient and the pull to the reference are weak at high noise, where a clip's layout is decided:
the policy first learns textures at small t, and later drifts away at large t (docs/alignment.md).

beta multiplies errors that are means over a clip's elements. (The paper's pseudo-code writes sums,
but its beta = 500 only makes sense for means.) A larger beta keeps the policy closer to the
reference, because a smaller difference of errors then satisfies the loss. Policy and reference are
any v = model(x_t, t, y).
"""

import torch
import torch.nn.functional as F

from flow import TIME_BINS, interpolate, mean_square, time_bin

SCHEDULES = ("constant", "(1-t)^2")


def flow_dpo_terms(err_w, err_l, ref_err_w, ref_err_l, t, beta, schedule="constant"):
    """Eq. 6 pair by pair, from errors (B,) of policy and reference on winner and loser and times
    t (B,) -> a dict of (B,) tensors. ValueError for an unknown schedule.

    margin is the bracket of Eq. 6 with its sign turned; accuracy is 1 where a pair moved the right
    way, and one half for a draw."""
    if schedule not in SCHEDULES:
        raise ValueError(f"unknown schedule {schedule!r}; known: {', '.join(SCHEDULES)}")
    beta_t = beta * (1 - t) ** 2 if schedule == "(1-t)^2" else beta  # by Eq. 5, or constant
    margin = (err_l - ref_err_l) - (err_w - ref_err_w)  # (B,)
    logit = beta_t / 2 * margin  # (B,)
    losses = -F.logsigmoid(logit)  # Eq. 6, (B,)
    return {
        "loss": losses,
        "accuracy": (logit > 0).float() + 0.5 * (logit == 0),
        "margin": margin,
        "error_w": err_w,
        "error_l": err_l,
        "ref_error_w": ref_err_w,
        "ref_error_l": ref_err_l,
    }


def flow_dpo_loss(err_w, err_l, ref_err_w, ref_err_l, t, beta, schedule="constant"):
    """Eq. 6, the mean over the batch -> (loss, logs); arguments and logs as in flow_dpo_terms."""
    terms = flow_dpo_terms(err_w, err_l, ref_err_w, ref_err_l, t, beta, schedule)
    logs = {name: values.mean().item() for name, values in terms.items()}
    return terms["loss"].mean(), logs


def flow_dpo_step(
    policy, reference, x0_w, x0_l, y, t, x1, beta, schedule="constant", shared_forward=None
):
    """One step on winners and losers x0_w, x0_l (B, ...) of prompts y (B, S) -> (loss, logs).

    t (B,) and the noise x1 (B, ...) are common to winner and loser (appendix C). Policy and
    reference may share their first blocks: then shared_forward(x_t, t, y), called in their place,
    returns their two velocities. The logs also hold the drift |v - v_ref|^2, which says how far the
    policy has moved, and again all means over each quarter of t in the batch, as "name/t0" (the
    cleanest) to "name/t3"."""
    x0 = torch.cat((x0_w, x0_l))  # (2B, ...)
    x1 = torch.cat((x1, x1))
    t_both = torch.cat((t, t))
    y = torch.cat((y, y))
    x_t = interpolate(x0, x1, t_both)
    if shared_forward is None:
        v_policy = policy(x_t, t_both, y)
        with torch.no_grad():
            v_reference = reference(x_t, t_both, y)
    else:
        v_policy, v_reference = shared_forward(x_t, t_both, y)
    err_w, err_l = mean_square(v_policy, x1 - x0).chunk(2)  # (B,) each
    ref_err_w, ref_err_l = mean_square(v_reference, x1 - x0).chunk(2)
    terms = flow_dpo_terms(err_w, err_l, ref_err_w, ref_err_l, t, beta, schedule)
    loss = terms["loss"].mean()

    terms["drift"] = mean_square(v_policy, v_reference).reshape(2, -1).mean(0)
    values = torch.stack(list(terms.values())).detach().cpu()  # (terms, B), in one transfer
    logs = dict(zip(terms, values.mean(1).tolist()))
    bins = time_bin(t).cpu()
    for i in range(TIME_BINS):
        if (bins == i).any():
            means = values[:, bins == i].mean(1).tolist()
            logs |= {f"{name}/t{i}": mean for name, mean in zip(terms, means)}
    return loss, logs
