"""What each online algorithm trains on: Flow-DPO, DiffusionNFT and Flow-GRPO in rounds."""

from data import take
from flow_dpo import flow_dpo_step
from judge import alignment_table, load_judge
from lora import merged_state_dict
from model import share_trunk
from online.flow_grpo import flow_grpo_step
from online.flow_nft import flow_nft_step
from online.rounds import Rounds
from real_data.video import to_video
from runtime.cli import BadInput
from tasks import TASKS, base_and_policy, reference_for
from trainer import Task


def task_of(settings, device):
    """The task of an algorithm: in rounds where it has any, else on the pairs of tasks.py."""
    if getattr(settings, "rounds", None):
        return online_task(settings, device)
    return TASKS[settings.algo](settings, device)


def online_task(settings, device, judge=None):
    """Flow-DPO, DiffusionNFT or Flow-GRPO in rounds. BadInput for flags that do not go together.

    judge: a module with normalised(videos, y) -> z-scores in place of --reward's VideoReward."""
    algo = settings.algo
    if settings.fsdp:
        raise BadInput(f"--algo {algo} in rounds samples from the whole policy; leave --fsdp out")
    base, policy, words = base_and_policy(settings, device)
    judge = judge or load_judge(settings.reward, base.config, tuple(words)).to(device)
    rounds = Rounds(settings, policy, judge, words, device)
    steps_on = {"dpo": dpo_steps, "nft": nft_steps, "grpo": grpo_steps}[algo]
    batch, step_loss = steps_on(settings, rounds, base, policy, words, device)

    def loss(batch):
        value, logs = step_loss(batch)
        return value, logs | rounds.state["logs"]

    def evaluate(model, out):
        return alignment_table(model, out, base, rounds.judge, words, rounds, settings, device)

    logs = ("round", "learned", "true")
    task = Task("velocity", policy, words, batch, loss, logs, evaluate, merged_state_dict)
    task.round_length = rounds.length
    task.extra_bytes = rounds.bytes_on_disk()
    return task


# ---------------------------------------------------------------------------------------------
# Batches and losses: (step, rows) -> batch, and batch -> (loss, logs)


def dpo_steps(settings, rounds, base, policy, words, device):
    """Flow-DPO on the best and the worst clips of each prompt.

    --reference: the start, the policy as it was when the round began, or a checkpoint's model."""
    if settings.reference == "round":
        reference = rounds.old
    else:
        reference = reference_for(settings, base, words, device)
    shared_forward = None
    if settings.freeze and settings.reference in ("first", "round"):
        shared_forward = share_trunk(policy, reference, settings.freeze)

    def batch(step, rows):
        state, items, whole = rounds.draw(step, settings.batch)
        prompt, winner, loser = items[rows].T
        x0_w = to_video(state["clips"][prompt, winner])
        x0_l = to_video(state["clips"][prompt, loser])
        return {"x0_w": x0_w, "x0_l": x0_l, **take(whole, rows)}

    def loss(batch):
        return flow_dpo_step(
            policy,
            reference,
            **batch,
            beta=settings.beta,
            schedule=settings.schedule,
            shared_forward=shared_forward,
        )

    return batch, loss


def nft_steps(settings, rounds, base, policy, words, device):
    """DiffusionNFT on every clip, by how good it is."""

    def batch(step, rows):
        rows = slice(2 * rows.start, 2 * rows.stop)  # as many clips as --batch pairs have
        state, items, whole = rounds.draw(step, 2 * settings.batch)
        prompt, clip = items[rows].T
        x0 = to_video(state["clips"][prompt, clip])
        return {"x0": x0, "r": state["r"][prompt, clip], **take(whole, rows)}

    def loss(batch):
        beta, kl = settings.nft_beta, settings.kl
        return flow_nft_step(policy, rounds.old, base, **batch, beta=beta, kl=kl)

    return batch, loss


def grpo_steps(settings, rounds, base, policy, words, device):
    """Flow-GRPO on the random steps of every clip's sampling."""

    def batch(step, rows):
        rows = slice(2 * rows.start, 2 * rows.stop)  # as many clips as --batch pairs have
        state, items, whole = rounds.draw(step, 2 * settings.batch)
        prompt, clip, k = items[rows].T
        return {
            "x_t": state["states"][prompt, clip, k].float(),
            "x_next": state["states"][prompt, clip, k + 1].float(),
            "y": state["y"][prompt],
            "t": state["times"][k],
            "t_next": state["times"][k + 1],
            "advantage": state["advantage"][prompt, clip],
        }

    def loss(batch):
        return flow_grpo_step(
            policy,
            rounds.old,
            base,
            **batch,
            clip_range=settings.clip_range,
            kl_weight=settings.kl,
            noise_level=settings.noise_level,
        )

    return batch, loss
