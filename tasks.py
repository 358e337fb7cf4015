"""What each algorithm trains on: its settings, batches and loss (sections 3.2 and 4)."""

import copy
from argparse import Namespace
from dataclasses import replace
from functools import lru_cache, partial

import torch

import world
from data import Vocabulary, draw_noise, drop_prompts, epoch_index, mean_one, step_rng, take
from flow import TIME_SHIFT, flow_error
from flow_dpo import SCHEDULES, flow_dpo_step
from flow_rwr import flow_rwr_step, rwr_weights
from judge import (
    alignment_table,
    load_judge,
    nrg_table,
    pair_scores,
    pretrain_table,
    reference_for,
    reward_table,
)
from model import (
    PRESETS,
    VideoTransformer,
    add_lora,
    freeze_trunk,
    load_velocity,
    merged_state_dict,
    share_trunk,
)
from nrg import noisy_pair_step, noisy_reward_on, noisy_value_step
from real_data.disk_pairs import disk_data, preset
from real_data.generated import ON_POLICY, held_pairs, mixed_pairs, training_pairs
from real_data.labels import label_rewards
from real_data.toy_pairs import check_toy, draw_clips, other_prompts
from reward import LOSSES, VideoReward, counted, decided, reward_config, reward_step
from runtime import flags
from runtime.cli import BadInput, progress_bar
from runtime.distributed import rank
from trainer import Task

# A flag left out takes its algorithm's value here; docs/paper.md has the paper's (Tables 10 and 11) and why.
ALIGNMENT = {
    "steps": 200,
    "batch": 16,
    "lr": 1e-4,
    "decay": 0.0,
    "ema": 0.0,
    "time_shift": TIME_SHIFT,
}
DEFAULTS = {
    "pretrain": {
        "steps": 11000,
        "batch": 32,
        "lr": 2.5e-3,
        "decay": 0.4,
        "ema": 0.999,
        "time_shift": TIME_SHIFT,
    },
    "reward": {"steps": 1500, "batch": 32, "lr": 1e-3, "decay": 0.4, "ema": 0.0},
    "nrg": {"steps": 2000, "batch": 48, "lr": 2e-3, "decay": 0.4, "ema": 0.0, "time_shift": 1.0},
    **dict.fromkeys(("sft", "rwr", "dpo"), ALIGNMENT),
    "nft": {**ALIGNMENT, "steps": 500, "lr": 3e-4},
}


# ---------------------------------------------------------------------------------------------
# The algorithms


def pretrain_task(args, device):
    """Flow matching on clips of all twelve generators, or of --data (section 4.1)."""
    if args.data:
        vocabulary, config, pairs, _ = disk_data(
            args, preset(args.preset, args.size), held_out=False
        )
    else:
        vocabulary = Vocabulary()
        config = replace(preset(args.preset, args.size), vocab=len(vocabulary.words))
        check_toy(config, vocabulary)
    torch.manual_seed(args.seed)
    model = VideoTransformer(replace(config, attention=args.attention or "full")).to(device)

    def batch(step, rows):
        rng = step_rng(args.seed, step)
        if args.data:
            index = epoch_index(2 * len(pairs), args.batch, step, args.seed)
            x0, y = pairs.clips(index[rows] // 2, index[rows] % 2), pairs.y[index // 2]
        else:
            clips, y = draw_clips(args.batch, config, vocabulary, rng)
            x0 = world.render(clips[rows], config.size)
        y = drop_prompts(y, args.label_dropout, rng)
        noise = draw_noise(args.batch, config.video_shape, args.time_shift, rng, normal=True)
        return {"x0": x0, **take({"y": y, **noise}, rows)}

    def loss(batch):
        error = flow_error(model, **batch).mean()
        return error, {"loss": error.item()}

    table = partial(pretrain_table, words=vocabulary.words, args=args, device=device)
    return Task("velocity", model, vocabulary.words, batch, loss, ("loss",), table)


def reward_task(args, device):
    """VideoReward on pairs that annotators compared (section 3.2)."""
    if args.data:
        vocabulary, config, pairs, held = disk_data(args, preset(args.preset, args.size))
    else:
        vocabulary = Vocabulary()
        config = replace(preset(args.preset, args.size), vocab=len(vocabulary.words))
        pairs, held = (
            made(args, config, vocabulary, device) for made in (training_pairs, held_pairs)
        )
    torch.manual_seed(args.seed)
    model = VideoReward(reward_config(config, separate=args.tokens == "separate")).to(device)

    def batch(step, rows):
        index = epoch_index(len(pairs), args.batch, step, args.seed)
        labels = {"y": pairs.y[index], "label": pairs.label[index], "mos": pairs.mos[index]}
        labels["weight"] = mean_one(counted(args.loss, labels["label"], labels["mos"]))
        video_a, video_b = pairs.sides(index[rows])
        return {"video_a": video_a, "video_b": video_b, **take(labels, rows)}

    def loss(batch):
        return reward_step(model, **batch, loss=args.loss, caption=args.caption)

    train_pairs = pairs if args.data else None
    table = partial(reward_table, held=held, device=device, train_pairs=train_pairs)
    return Task("reward", model, vocabulary.words, batch, loss, ("loss", "VQ", "MQ", "TA"), table)


def nrg_task(args, device):
    """A head on the base model's first blocks, on noised clips (section 4.4): drawn to what VideoReward says of the
    clean clip, or, with --target labels, on the annotators' pairs by Bradley-Terry, as in the paper."""
    base, words = load_velocity(args.init, args.attention)
    vocabulary, config = Vocabulary(words), base.config
    judge = (
        load_judge(args.reward, config, tuple(words)).to(device)
        if args.target == "reward"
        else None
    )
    torch.manual_seed(args.seed)
    model = noisy_reward_on(base, args.read, args.trunk == "frozen").to(device)
    if args.data:
        _, _, pairs, held = disk_data(args, config, words)
    else:
        pairs = training_pairs(args, config, vocabulary, device, labelled=args.target == "labels")
        held = held_pairs(args, config, vocabulary, device)

    def pair_batch(step, rows):
        index, rng = epoch_index(len(pairs), args.batch, step, args.seed), step_rng(args.seed, step)
        whole = {
            "y": pairs.y[index],
            "label": pairs.label[index],
            "weight": mean_one(decided(pairs.label[index])),
        }
        whole |= draw_noise(args.batch, config.video_shape, args.time_shift, rng)
        x0_a, x0_b = pairs.sides(index[rows])
        return {"x0_a": x0_a, "x0_b": x0_b, **take(whole, rows)}

    def pair_loss(batch):
        return noisy_pair_step(model, **batch)

    def value_batch(step, rows):
        rng = step_rng(args.seed, step)
        index = epoch_index(
            2 * len(pairs), args.batch, step, args.seed
        )  # both clips of each pair, in any order
        whole = {
            "y": pairs.y[index // 2],
            "other_y": other_prompts(pairs.y[index // 2], vocabulary, rng),
        }
        whole |= draw_noise(args.batch, config.video_shape, args.time_shift, rng)
        return {"x0": pairs.clips(index[rows] // 2, index[rows] % 2), **take(whole, rows)}

    def value_loss(batch):
        with torch.no_grad():
            target, other = (
                judge.normalised(batch["x0"], batch[name]).clamp(-3, 3) for name in ("y", "other_y")
            )
        return noisy_value_step(model, **batch, target=target, other_target=other)

    train_pairs = pairs if args.data else None
    table = partial(
        nrg_table, held=held, seed=args.eval_seed, device=device, train_pairs=train_pairs
    )
    batch, loss = (pair_batch, pair_loss) if args.target == "labels" else (value_batch, value_loss)
    return Task("noisy reward", model, words, batch, loss, ("loss", "VQ", "MQ", "TA"), table)


def dpo_task(args, device):
    """Flow-DPO on pairs that VideoReward or people ranked, against a frozen reference (section 4.2)."""
    base, policy, words = base_and_policy(args, device)
    pairs, r, reward = scored_pairs(args, base.config, words, device)
    winners, losers = ranked(r)
    reference = reference_for(args, base, words, device)
    shared_forward = (
        share_trunk(policy, base, args.freeze) if args.freeze and reference is base else None
    )

    def batch(step, rows):
        rng = step_rng(args.seed, step)
        chosen = epoch_index(len(winners), args.batch, step, args.seed)
        (index, win), lose = winners[chosen].T, losers[chosen, 1]
        y = drop_prompts(pairs.y[index], args.label_dropout, rng)
        noise = draw_noise(args.batch, base.config.video_shape, args.time_shift, rng)
        x0_w, x0_l = pairs.clips(index[rows], win[rows]), pairs.clips(index[rows], lose[rows])
        return {"x0_w": x0_w, "x0_l": x0_l, **take({"y": y, **noise}, rows)}

    def loss(batch):
        settings = {"beta": args.beta, "schedule": args.schedule, "shared_forward": shared_forward}
        return flow_dpo_step(policy, reference, **batch, **settings)

    table = partial(
        alignment_table,
        base=base,
        reward=reward,
        words=words,
        pairs=pairs,
        args=args,
        device=device,
    )
    return Task(
        "velocity", policy, words, batch, loss, ("loss", "accuracy"), table, merged_state_dict
    )


def regression_task(args, device):
    """Flow-RWR on both clips of these pairs, weighted by their reward (section 4.3), or SFT on the winners (5.2)."""
    base, policy, words = base_and_policy(args, device)
    pairs, r, reward = scored_pairs(args, base.config, words, device)
    if args.algo == "sft":
        chosen, _ = ranked(r)  # (N, 2: pair, side)
        weight = torch.ones(len(chosen))
    else:
        chosen = torch.nonzero(r.isfinite()) if args.rank == "labels" else torch.cat(ranked(r))
        weight = rwr_weights(r[chosen[:, 0], chosen[:, 1]], args.temperature)
    count = 2 * args.batch  # as many clips as DPO takes: SFT sees a winner twice as often

    def batch(step, rows):
        rng = step_rng(args.seed, step)
        item = epoch_index(len(chosen), count, step, args.seed)
        index, side = chosen[item].T
        y = drop_prompts(pairs.y[index], args.label_dropout, rng)
        noise = draw_noise(count, base.config.video_shape, args.time_shift, rng)
        rows = slice(2 * rows.start, 2 * rows.stop)
        return {
            "x0": pairs.clips(index[rows], side[rows]),
            **take({"y": y, "weight": weight[item], **noise}, rows),
        }

    def loss(batch):
        return flow_rwr_step(policy, **batch)

    table = partial(
        alignment_table,
        base=base,
        reward=reward,
        words=words,
        pairs=pairs,
        args=args,
        device=device,
    )
    return Task(
        "velocity",
        policy,
        words,
        batch,
        loss,
        ("loss", "effective_samples"),
        table,
        merged_state_dict,
    )


def base_and_policy(args, device):
    """The frozen base model, the policy that starts from it, and their words."""
    base, words = load_velocity(args.init, args.attention)
    policy = copy.deepcopy(base)
    torch.manual_seed(args.seed)
    policy = (
        add_lora(policy, args.lora_rank, skip=args.freeze)
        if args.lora_rank
        else freeze_trunk(policy, args.freeze)
    )
    return (
        base.to(device).requires_grad_(False),
        policy.to(device),
        words,
    )  # adapters are drawn on the CPU


def scored_pairs(args, config, words, device):
    """Pairs, the total reward r (N, 2) of both clips of each, and the VideoReward that gave it, offline and once (5.2).
    Clips are the twelve generators', --data's or, with --generated, the base model's."""
    if args.rank == "labels":
        return labelled_pairs(args, config, words, device)
    if args.data:
        if rank() == 0:
            print("VideoReward ranks the pairs; the labels of --data are not used (--rank labels)")
        reward = load_judge(args.reward, config, tuple(words)).to(device)
        _, _, pairs, _ = disk_data(args, config, words, held_out=False)
        scores = pair_scores(
            reward.normalised, pairs, device, progress_bar("VideoReward scores", "x64 pairs")
        )
    else:
        wanted = args.pairs, args.seed, config, tuple(words), args.reward, device
        pairs, scores, reward = scored_toy_pairs(*wanted, args.generated, args.init, args.cache)
    weights = torch.tensor(args.align) / sum(
        map(abs, args.align)
    )  # 1:1:1 is r = (r_VQ + r_MQ + r_TA) / 3
    return pairs, scores @ weights, reward


def labelled_pairs(args, config, words, device):
    """The same with people's labels for the reward, and --reward's VideoReward or None."""
    reward = load_judge(args.reward, config, tuple(words)).to(device) if args.reward else None
    if args.data:
        _, _, pairs, _ = disk_data(args, config, words, held_out=False)
    else:
        drawn = args.pairs, "train", args.seed, args, config, Vocabulary(words), device
        pairs = mixed_pairs(*drawn, **ON_POLICY)
    r = label_rewards(pairs.label, pairs.mos, args.align, ratings=args.algo == "rwr")
    if not r.isfinite().any():
        raise BadInput("--rank labels: no label or rating counts under --align")
    return pairs, r, reward


@lru_cache(maxsize=2)  # a study aligns many policies on the same pairs
def scored_toy_pairs(
    count, seed, config, words, path, device, generated=0.0, init=None, cache=None
):
    """Toy pairs, VideoReward's z-scores of both clips of each (N, 2, 3), and that VideoReward."""
    drawn = Namespace(generated=generated, init=init, cache=cache)
    pairs = mixed_pairs(
        count, "train", seed, drawn, config, Vocabulary(words), device, labelled=False, **ON_POLICY
    )
    reward = load_judge(path, config, words).to(device)
    return (
        pairs,
        pair_scores(
            reward.normalised, pairs, device, progress_bar("VideoReward scores", "x64 pairs")
        ),
        reward,
    )


def ranked(r):
    """Winners and losers (N', 2: pair, side) by total reward r (N, 2); equal rewards and nan make no pair."""
    index = torch.nonzero((r[:, 0] - r[:, 1]).abs() > 0)[:, 0]
    if not len(index):
        raise BadInput(
            "no pair has a better clip: nothing to align with; look at --rank, --reward and --align"
        )
    side = (r[index, 1] > r[index, 0]).long()
    return torch.stack((index, side), 1), torch.stack((index, 1 - side), 1)


TASKS = {
    "pretrain": pretrain_task,
    "reward": reward_task,
    "nrg": nrg_task,
    "sft": regression_task,
    "rwr": regression_task,
    "dpo": dpo_task,
}


def arguments(argv=None):
    """The flags of a command line (runtime/flags.py), the algorithm's defaults filled in."""
    return flags.training_flags(argv, DEFAULTS, PRESETS, LOSSES, SCHEDULES)
