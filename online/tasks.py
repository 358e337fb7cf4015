"""What each online algorithm trains on: Flow-DPO, DiffusionNFT and Flow-GRPO in rounds."""

from data import draw_noise, drop_prompts, epoch_index, step_rng, take
from judge import alignment_table, load_judge
from lora import merged_state_dict
from online.flow_grpo import flow_grpo_step
from online.flow_nft import flow_nft_step
from online.rounds import Rounds
from real_data.video import to_video
from runtime.cli import BadInput
from tasks import TASKS, base_and_policy, dpo_loss, reference_for
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
    old = rounds.old
    if algo == "dpo":
        reference = old or reference_for(settings, base, words, device)
        step_loss = dpo_loss(settings, policy, reference)

    def batch(step, rows):
        """Flow-DPO's are pairs, the others' as many clips as --batch pairs have."""
        state, rng = rounds.at(step // rounds.length), step_rng(settings.seed, step)
        count, items = settings.batch, state["items"]
        if algo != "dpo":
            count, rows = 2 * count, slice(2 * rows.start, 2 * rows.stop)
        items = items[epoch_index(len(items), count, step % rounds.length, settings.seed)]
        if algo == "grpo":
            return sampled_steps(state, *items[rows].T)
        y = drop_prompts(state["y"][items[:, 0]], settings.label_dropout, rng)
        noise = draw_noise(count, base.config.video_shape, settings.time_shift, rng)
        clips, shared = state["clips"], take({"y": y, **noise}, rows)
        if algo == "dpo":
            prompt, winner, loser = items[rows].T
            x0_w, x0_l = to_video(clips[prompt, winner]), to_video(clips[prompt, loser])
            return {"x0_w": x0_w, "x0_l": x0_l, **shared}
        prompt, clip = items[rows].T
        return {"x0": to_video(clips[prompt, clip]), "r": state["r"][prompt, clip], **shared}

    def loss(batch):
        if algo == "dpo":
            value, logs = step_loss(batch)
        elif algo == "nft":
            beta, kl = settings.nft_beta, settings.kl
            value, logs = flow_nft_step(policy, old, base, **batch, beta=beta, kl=kl)
        else:
            options = {"clip_range": settings.clip_range, "kl_weight": settings.kl}
            options["noise_level"] = settings.noise_level
            value, logs = flow_grpo_step(policy, old, base, **batch, **options)
        return value, logs | rounds.state["logs"]

    def evaluate(model, out):
        return alignment_table(model, out, base, rounds.judge, words, rounds, settings, device)

    logs = ("round", "learned", "true")
    own = merged_state_dict, rounds.length, rounds.bytes_on_disk()
    return Task("velocity", policy, words, batch, loss, logs, evaluate, *own)


def sampled_steps(state, prompt, clip, k):
    """The steps k -> k + 1 of the SDE; noise and times are those of the sampling."""
    return {
        "x_t": state["states"][prompt, clip, k].float(),
        "x_next": state["states"][prompt, clip, k + 1].float(),
        "y": state["y"][prompt],
        "t": state["times"][k],
        "t_next": state["times"][k + 1],
        "advantage": state["advantage"][prompt, clip],
    }
