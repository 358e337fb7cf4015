"""What each algorithm trains on: the model, the batch of a step and its loss (sections 3 to 5).

A task is made from an algorithm's settings (settings.py) and trained by trainer.fit.
"""

import copy
from dataclasses import replace

import torch

import world
from data import Vocabulary, draw_noise, drop_prompts, epoch_index, mean_one, step_rng, take
from flow import flow_error
from flow_dpo import flow_dpo_step
from flow_rwr import flow_rwr_step, rwr_weights
from judge import alignment_table, calibrate_noisy, calibrate_reward, load_judge, pretrain_table
from lora import add_lora, freeze_trunk, merged_state_dict
from model import VideoTransformer, load_velocity, share_trunk
from nrg import noisy_pair_step, noisy_reward_on, noisy_value_step
from ranking import ranked_clips, winners
from real_data.dataset import disk_data, preset, resized
from real_data.toy_pairs import check_toy, draw_clips, held_pairs, other_prompts, training_pairs
from reward import VideoReward, counted, decided, load_reward, reward_config, reward_step
from runtime.checkpoint import check_same_data
from runtime.cli import BadInput
from trainer import Task


def pretrain_task(settings, device):
    """Flow matching on clips of all twelve generators, or of --data (section 4.1)."""
    config = preset(settings.preset, settings.size)
    if settings.data:
        vocabulary, config, pairs, _ = disk_data(settings, config, held_out=False)
    else:
        vocabulary = Vocabulary()
        config = replace(config, vocab=len(vocabulary.words))
        check_toy(config, vocabulary)
    torch.manual_seed(settings.seed)
    config = resized(config, "--attention", attention=settings.attention or "full")
    model = VideoTransformer(config).to(device)

    def batch(step, rows):
        rng = step_rng(settings.seed, step)
        if settings.data:
            index = epoch_index(2 * len(pairs), settings.batch, step, settings.seed)
            pair, side = index // 2, index % 2  # both clips of each pair
            x0, y = pairs.clips(pair[rows], side[rows]), pairs.y[pair]
        else:
            clips, y = draw_clips(settings.batch, config, vocabulary, rng)
            x0 = world.render(clips[rows], config.size)
        y = drop_prompts(y, settings.label_dropout, rng)
        noise = draw_noise(
            settings.batch, config.video_shape, settings.time_shift, rng, normal=True
        )
        return {"x0": x0, **take({"y": y, **noise}, rows)}

    def loss(batch):
        error = flow_error(model, **batch).mean()
        return error, {"loss": error.item()}

    def evaluate(model, out):
        return pretrain_table(model, out, vocabulary.words, settings, device)

    return Task("velocity", model, vocabulary.words, batch, loss, ("loss",), evaluate)


def reward_task(settings, device):
    """VideoReward on pairs that annotators compared (section 3.2)."""
    config, words = preset(settings.preset, settings.size), None
    if settings.init_reward:
        model, words = load_reward(settings.init_reward)
        config = model.config
    if settings.data:
        vocabulary, config, pairs, held = disk_data(settings, config, words)
        if settings.loss == "regression" and not pairs.mos.any():
            columns = "the columns MOS_A_VQ to MOS_B_TA"
            raise BadInput(f"{settings.data}: --loss regression needs ratings, {columns}")
    else:
        vocabulary = Vocabulary(words) if words else Vocabulary()
        config = replace(config, vocab=len(vocabulary.words))
        pairs = training_pairs(settings, config, vocabulary, device)
        held = held_pairs(settings, config, vocabulary, device)
    torch.manual_seed(settings.seed)
    if not settings.init_reward:
        model = VideoReward(reward_config(config, settings.tokens == "separate"))
    model.to(device)

    def batch(step, rows):
        index = epoch_index(len(pairs), settings.batch, step, settings.seed)
        labels = {"y": pairs.y[index], "label": pairs.label[index], "mos": pairs.mos[index]}
        labels["weight"] = mean_one(counted(settings.loss, labels["label"], labels["mos"]))
        video_a, video_b = pairs.sides(index[rows])
        return {"video_a": video_a, "video_b": video_b, **take(labels, rows)}

    def loss(batch):
        return reward_step(model, **batch, loss=settings.loss, caption=settings.caption)

    def evaluate(model, out):
        return calibrate_reward(model, held, device, pairs if settings.data else None)

    logs = ("loss", "VQ", "MQ", "TA")
    return Task("reward", model, vocabulary.words, batch, loss, logs, evaluate)


def nrg_task(settings, device):
    """A noise-aware reward on the base model's first blocks (section 4.4).

    It learns VideoReward's scores of the clean clip, or, with --target labels, the annotators'
    pairs by Bradley-Terry, as in the paper."""
    base, words = load_velocity(settings.init, settings.attention)
    vocabulary, config = Vocabulary(words), base.config
    from_labels = settings.target == "labels"
    if not from_labels:
        judge = load_judge(settings.reward, config, tuple(words)).to(device)
    torch.manual_seed(settings.seed)
    try:
        model = noisy_reward_on(base, settings.read, settings.trunk == "frozen").to(device)
    except ValueError as error:
        raise BadInput(f"--{error}") from None
    if settings.data:
        _, _, pairs, held = disk_data(settings, config, words)
    else:
        pairs = training_pairs(settings, config, vocabulary, device, labelled=from_labels)
        held = held_pairs(settings, config, vocabulary, device)

    def batch(step, rows):
        rng = step_rng(settings.seed, step)
        if from_labels:
            index = epoch_index(len(pairs), settings.batch, step, settings.seed)
            label = pairs.label[index]
            whole = {"y": pairs.y[index], "label": label, "weight": mean_one(decided(label))}
            x0_a, x0_b = pairs.sides(index[rows])
            clips = {"x0_a": x0_a, "x0_b": x0_b}
        else:
            index = epoch_index(2 * len(pairs), settings.batch, step, settings.seed)
            pair, side = index // 2, index % 2  # both clips of each pair
            y = pairs.y[pair]
            whole = {"y": y, "other_y": other_prompts(y, vocabulary, rng)}
            clips = {"x0": pairs.clips(pair[rows], side[rows])}
        whole |= draw_noise(settings.batch, config.video_shape, settings.time_shift, rng)
        return clips | take(whole, rows)

    def loss(batch):
        if from_labels:
            return noisy_pair_step(model, **batch)
        with torch.no_grad():
            target = judge.normalised(batch["x0"], batch["y"]).clamp(-3, 3)
            other_target = judge.normalised(batch["x0"], batch["other_y"]).clamp(-3, 3)
        return noisy_value_step(model, **batch, target=target, other_target=other_target)

    def evaluate(model, out):
        train_pairs = pairs if settings.data else None
        return calibrate_noisy(model, held, settings.eval_seed, device, train_pairs)

    logs = ("loss", "VQ", "MQ", "TA")
    return Task("noisy reward", model, words, batch, loss, logs, evaluate)


def dpo_task(settings, device):
    """Flow-DPO on pairs that VideoReward or people ranked, against a frozen reference (4.2)."""
    base, policy, words = base_and_policy(settings, device)
    pairs, reward, judge = ranked_clips(settings, base.config, words, device)
    pair, win_side = winners(reward)
    reference = reference_for(settings, base, words, device)

    def batch(step, rows):
        rng = step_rng(settings.seed, step)
        chosen = epoch_index(len(pair), settings.batch, step, settings.seed)
        index, win = pair[chosen], win_side[chosen]
        y = drop_prompts(pairs.y[index], settings.label_dropout, rng)
        noise = draw_noise(settings.batch, base.config.video_shape, settings.time_shift, rng)
        x0_w = pairs.clips(index[rows], win[rows])
        x0_l = pairs.clips(index[rows], 1 - win[rows])
        return {"x0_w": x0_w, "x0_l": x0_l, **take({"y": y, **noise}, rows)}

    def evaluate(model, out):
        return alignment_table(model, out, base, judge, words, pairs, settings, device)

    loss, logs = dpo_loss(settings, policy, reference), ("loss", "accuracy")
    return Task("velocity", policy, words, batch, loss, logs, evaluate, merged_state_dict)


def dpo_loss(settings, policy, reference):
    """batch -> (loss, logs) of Flow-DPO. Where the reference is an earlier state of the policy,
    their frozen first blocks run once for both."""
    shared_forward = None
    if settings.freeze and settings.reference in ("first", "round"):
        shared_forward = share_trunk(policy, reference, settings.freeze)

    def loss(batch):
        return flow_dpo_step(
            policy,
            reference,
            **batch,
            beta=settings.beta,
            schedule=settings.schedule,
            shared_forward=shared_forward,
        )

    return loss


def regression_task(settings, device):
    """Flow-RWR on both clips of each pair, weighted by reward (4.3), or SFT on winners (5.2)."""
    base, policy, words = base_and_policy(settings, device)
    pairs, reward, judge = ranked_clips(settings, base.config, words, device)
    if settings.algo == "sft":
        pair, side = winners(reward)
        weight = torch.ones(len(pair))
    else:
        if settings.rank == "labels":
            pair, side = reward.isfinite().nonzero().T  # every clip that has a label
        else:
            pair, side = winners(reward)  # both clips of each pair
            pair, side = torch.cat((pair, pair)), torch.cat((side, 1 - side))
        weight = rwr_weights(reward[pair, side], settings.temperature)
    clips_per_batch = 2 * settings.batch  # as many as DPO takes: SFT sees a winner twice as often

    def batch(step, rows):
        rng = step_rng(settings.seed, step)
        item = epoch_index(len(pair), clips_per_batch, step, settings.seed)
        y = drop_prompts(pairs.y[pair[item]], settings.label_dropout, rng)
        noise = draw_noise(clips_per_batch, base.config.video_shape, settings.time_shift, rng)
        rows = slice(2 * rows.start, 2 * rows.stop)
        x0 = pairs.clips(pair[item[rows]], side[item[rows]])
        return {"x0": x0, **take({"y": y, "weight": weight[item], **noise}, rows)}

    def loss(batch):
        return flow_rwr_step(policy, **batch)

    def evaluate(model, out):
        return alignment_table(model, out, base, judge, words, pairs, settings, device)

    logs = ("loss", "effective_samples")
    return Task("velocity", policy, words, batch, loss, logs, evaluate, merged_state_dict)


TASKS = {
    "pretrain": pretrain_task,
    "reward": reward_task,
    "nrg": nrg_task,
    "sft": regression_task,
    "rwr": regression_task,
    "dpo": dpo_task,
}


def base_and_policy(settings, device):
    """The frozen base model, the policy that starts from it, and their words."""
    base, words = load_velocity(settings.init, settings.attention)
    policy = copy.deepcopy(base)
    torch.manual_seed(settings.seed)
    try:
        if settings.lora_rank:
            policy = add_lora(policy, settings.lora_rank, skip=settings.freeze)
        else:
            policy = freeze_trunk(policy, settings.freeze)
    except ValueError as error:
        raise BadInput(f"--freeze {error}") from None
    return base.to(device).requires_grad_(False), policy.to(device), words


def reference_for(settings, base, words, device):
    """The frozen model that --reference names for Flow-DPO: the base model or a checkpoint's."""
    if settings.reference in ("first", "round"):
        return base
    model, own_words = load_velocity(settings.reference, settings.attention)
    check_same_data("--reference", model.config, own_words, "--init", base.config, words)
    return model.to(device).requires_grad_(False)
