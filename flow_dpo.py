"""Flow-DPO: preference optimisation of a flow-matching model (paper, section 4.2, Eq. 4-6, appendix C).

    L = -E log sigma( -beta_t / 2 [ (|v^w - v(x_t^w)|^2 - |v^w - v_ref(x_t^w)|^2)
                                  - (|v^l - v(x_t^l)|^2 - |v^l - v_ref(x_t^l)|^2) ] )                            Eq. 6

Winner w and loser l share the noise and t, and pass the policy in one forward; the reference is frozen. The derivation
from Diffusion-DPO (Eq. 4) gives beta_t = beta (1 - t)^2, since a noise error is (1 - t)^2 times a velocity error
(Eq. 5); the paper recommends beta_t = beta. With (1 - t)^2 both the gradient and the pull to the reference are weak at
high noise, where the layout of a clip is decided: the policy first learns textures at small t, later it drifts away at
large t (docs/alignment.md).

beta multiplies errors that are means over a clip's elements (the paper's pseudo-code writes sums, its beta = 500 only
makes sense for means). A larger beta keeps the policy closer to the reference: a smaller difference of errors then
satisfies the loss. Nothing here knows a model class: policy and reference are any v = model(x_t, t, y).
"""

import torch
import torch.nn.functional as F

from flow import TIME_BINS, interpolate, mean_square, time_bin

SCHEDULES = ("constant", "(1-t)^2")


def flow_dpo_terms(err_w, err_l, ref_err_w, ref_err_l, t, beta, schedule="constant"):
    """Eq. 6 sample by sample, from errors (B,) of policy and reference on winner and loser and
    t (B,): a dict of (B,) tensors. ValueError for an unknown schedule.

    loss; accuracy, the implicit one: 1 where a pair moved the right way, one half for a draw;
    margin, the bracket of Eq. 6 with its sign turned; and the four errors."""
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
    """Eq. 6, the mean over the batch -> (loss, logs). The arguments and the names of the logs are
    those of flow_dpo_terms."""
    terms = flow_dpo_terms(err_w, err_l, ref_err_w, ref_err_l, t, beta, schedule)
    logs = {name: values.mean().item() for name, values in terms.items()}
    return terms["loss"].mean(), logs


def flow_dpo_step(
    policy, reference, x0_w, x0_l, y, t, x1, beta, schedule="constant", shared_forward=None
):
    """One step on winners and losers x0_w, x0_l (B, ...) of prompts y (B, S) -> (loss, logs).

    t (B,) and the noise x1 (B, ...) are common to winner and loser (appendix C). `shared_forward`,
    if given, is called in place of policy and reference: (x_t, t, y) -> their two velocities, for
    models that share their first blocks.

    The logs also hold the drift |v - v_ref|^2, a mean over both clips: how far the policy has
    moved; and everything once more for each quarter of t that the batch met, as "name/t0" (the
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
