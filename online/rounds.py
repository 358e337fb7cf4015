"""Online alignment: rounds of the policy's own clips, scored and trained on. The paper aligns once.

    python train.py --algo dpo --rounds 10       Flow-DPO on the best and worst of each prompt's clips
    python train.py --algo nft                   DiffusionNFT on all of them (flow_nft.py)
    python train.py --algo dpo --rounds 10 --refresh 2      VideoReward learns from new labels, too

In a round the policy, for nft its old model, samples --clips clips of each prompt at CFG 1;
VideoReward's z-scores under the --align weights are their reward; and --steps / --rounds steps are
taken on them. The reference of Flow-DPO is the start, with --reference round the policy as it was
when the round began, or a checkpoint's model.

round.pt holds all that a round needs and is complete before the round's first step; a checkpoint
ends each round. A stopped run resumes bit for bit: within a round from that file, between two
rounds from the checkpoint.
"""

import copy
import math
from functools import partial

import torch

import world
from data import Vocabulary, draw_noise, drop_prompts, epoch_index, step_rng, take
from flow_dpo import flow_dpo_step
from judge import alignment_table, load_judge, reference_for, z_scores
from model import merged_state_dict, share_trunk
from online.flow_nft import flow_nft_step, move_old, optimality
from online.refresh import Refresh
from real_data.disk_pairs import disk_prompts
from real_data.toy_pairs import check_toy
from real_data.video import to_bytes, to_video
from runtime.checkpoint import save_checkpoint
from runtime.cli import BadInput, progress_bar
from runtime.distributed import process_0_first
from runtime.resume import last_state, read_own, resumes, settled, until_stopped
from sample import sample_many
from tasks import base_and_policy
from trainer import Task

MOST_PROMPTS = 72  # in a round: as many as the toy has to train on
ROUND_SEED = -500_000  # of a round's prompts and noise; no step has it


def online_task(args, device):
    """Flow-DPO or DiffusionNFT in rounds. BadInput for flags that do not go together."""
    if args.fsdp:
        raise BadInput(
            f"--algo {args.algo} in rounds samples from the whole policy; leave --fsdp out"
        )
    base, policy, words = base_and_policy(args, device)
    rounds = Rounds(args, base, policy, words, device)
    round_length = args.steps // args.rounds

    def draw(step, count):
        """The round of a step, `count` of its items, and their prompts, times and noise."""
        state, rng = rounds.at(step // round_length), step_rng(args.seed, step)
        items = state["items"]
        items = items[epoch_index(len(items), count, step % round_length, args.seed)]
        y = drop_prompts(state["y"][items[:, 0]], args.label_dropout, rng)
        noise = draw_noise(count, base.config.video_shape, args.time_shift, rng)
        return state, items, {"y": y, **noise}

    def dpo_batch(step, rows):
        state, items, whole = draw(step, args.batch)
        prompt, winner, loser = items[rows].T
        x0_w = to_video(state["clips"][prompt, winner])
        x0_l = to_video(state["clips"][prompt, loser])
        return {"x0_w": x0_w, "x0_l": x0_l, **take(whole, rows)}

    def dpo_loss(batch):
        settings = {"beta": args.beta, "schedule": args.schedule, "shared_forward": shared_forward}
        value, logs = flow_dpo_step(policy, reference, **batch, **settings)
        return value, logs | rounds.state["logs"]

    def nft_batch(step, rows):
        rows = slice(2 * rows.start, 2 * rows.stop)  # as many clips as --batch pairs have
        state, items, whole = draw(step, 2 * args.batch)
        prompt, clip = items[rows].T
        x0 = to_video(state["clips"][prompt, clip])
        return {"x0": x0, "r": state["r"][prompt, clip], **take(whole, rows)}

    def nft_loss(batch):
        settings = {"beta": args.nft_beta, "kl": args.kl}
        value, logs = flow_nft_step(policy, rounds.old, base, **batch, **settings)
        return value, logs | rounds.state["logs"]

    if args.algo == "nft":
        batch, loss = nft_batch, nft_loss
    else:
        batch, loss = dpo_batch, dpo_loss
        same_trunk = args.freeze and args.reference in ("first", "round")
        if args.reference == "round":
            reference = rounds.old
        else:
            reference = reference_for(args, base, words, device)
        shared_forward = share_trunk(policy, reference, args.freeze) if same_trunk else None
    about = {"base": base, "reward": rounds.judge, "words": words, "pairs": rounds}
    table = partial(alignment_table, **about, args=args, device=device)
    keys = ("round", "learned", "true")
    task = Task("velocity", policy, words, batch, loss, keys, table, merged_state_dict)
    task.extra_bytes = rounds.bytes_on_disk()
    return task


class Rounds:
    """All rounds of a run. `state` is the current one, a dict: `new_round` lists what round.pt holds
    of it; `items`, r and `logs` are added from that. `old` is the model of an earlier policy or None,
    `judge` is VideoReward, and `prompts` (N texts) with their ids `y` (N, S) are those of all rounds.
    """

    def __init__(self, args, base, policy, words, device):
        self.args, self.policy, self.device = args, policy, device
        self.file, self.state = args.out / "round.pt", None
        has_old = args.algo == "nft" or args.reference == "round"
        self.old = copy.deepcopy(policy).requires_grad_(False) if has_old else None
        self.judge = load_judge(args.reward, base.config, tuple(words)).to(device)
        vocabulary = Vocabulary(words)
        if args.data:
            self.prompts, self.y = disk_prompts(args, vocabulary, base.config.max_text)
        else:
            check_toy(base.config, vocabulary)
            self.prompts = [world.prompt_text(row) for row in world.split_prompts("train")]
            self.y = vocabulary.encode(self.prompts, base.config.max_text)
        self.refresh = Refresh(args, self.judge, vocabulary, device) if args.refresh else None
        if args.refresh and resumes(
            args
        ):  # the closing table needs the judge as the last round left it
            state = read_own(self.file, self.args)
            if state is None:
                raise BadInput(
                    f"{self.file}: holds no round of this run to go on from; start it anew"
                )
            self.restore(state)

    def at(self, number):
        """The round of this number, from round.pt or a new one by the policy as it is. BadInput if
        the round before it is not there."""
        if self.state is not None and self.state["number"] == number:
            return self.state
        with process_0_first():  # which makes the round for all
            state = read_own(self.file, self.args)
            if state and state["number"] > number:
                state = None  # of a run that was begun anew
            last = -1
            if state:
                last = state["number"]
                self.restore(state)
            if last < number - 1:
                fault = f"holds no round {number - 1} of this run to go on from; start it anew"
                raise BadInput(f"{self.file}: {fault}")
            if last < number:
                state = self.new_round(number)
                save_checkpoint(self.file, state)
        items = training_items(state["scores"], self.args)
        self.state = state | items | {"logs": self.logs(state)}
        return self.state

    def restore(self, state):
        if self.old is not None:
            self.old.load_state_dict(state["old"])
        if self.refresh:
            self.judge.load_state_dict(state["judge"])
            self.refresh.labelled = state["labelled"]

    def new_round(self, number):
        """What round.pt holds: the number, the run's settings, prompts (P texts), y (P, S), clips
        (P, n, C, T, H, W) as uint8, their z-scores (P, n, 3), the old model, judge and labelled pairs."""
        args = self.args
        if self.old is not None and number:
            move_old(self.old, self.policy, args.old_decay if args.algo == "nft" else 0.0)
        sampled = self.refresh.sampled_clips(number) if self.refresh else None
        sampled = sampled or self.sample(number)
        if self.refresh:
            self.refresh(number, **sampled)
        clips = to_video(sampled["clips"].flatten(0, 1))
        y = sampled["y"].repeat_interleave(args.clips, 0)
        scores = z_scores(self.judge, clips, y, self.device).unflatten(0, (-1, args.clips))
        self.check_finite(scores, "VideoReward's scores", sampled["prompts"])
        state = {"number": number, "settings": settled(args), **sampled, "scores": scores}
        state["old"] = self.old.state_dict() if self.old is not None else {}
        if self.refresh:
            state |= {"judge": self.judge.state_dict(), "labelled": self.refresh.labelled}
        return state

    def sample(self, number):
        """Prompts (P texts), y (P, S) and clips (P, n, C, T, H, W) as uint8 of a round."""
        rng = step_rng(self.args.seed, ROUND_SEED - number)
        chosen = torch.randperm(len(self.y), generator=rng)[:MOST_PROMPTS].tolist()
        prompts, y = [self.prompts[i] for i in chosen], self.y[chosen]
        shape = self.policy.config.video_shape
        x1 = torch.randn(len(y) * self.args.clips, *shape, generator=rng)
        y_clips = y.repeat_interleave(self.args.clips, 0)
        model = self.old if self.args.algo == "nft" else self.policy
        bar = progress_bar(f"round {number}", "batch")

        def progress(starts):
            return until_stopped(bar(starts), self.args.out)

        videos = sample_many(model, x1.to(self.device), y_clips.to(self.device), progress).cpu()
        videos = videos.unflatten(0, (len(y), -1))
        self.check_finite(videos, "the pixels", prompts)
        return {"prompts": prompts, "y": y, "clips": to_bytes(videos)}

    def check_finite(self, values, what, prompts):
        """BadInput that names the first clip for which `values` (P, n, ...) are not finite."""
        bad = torch.nonzero(~values.flatten(2).isfinite().all(2))  # (.., 2: prompt, clip)
        if len(bad):
            prompt, clip = bad[0].tolist()
            where = f"clip {clip + 1} of {self.args.clips} of prompt {prompts[prompt]!r}"
            raise BadInput(f"{what} of {where} are not finite; {last_state(self.args.out)}")

    def logs(self, state):
        """The round's number, the mean z-score of its clips and, of the toy's, the mean true score."""
        logs = {"round": float(state["number"]), "learned": state["scores"].mean().item()}
        if not self.args.data:
            prompts = world.prompt_attributes(state["prompts"]).repeat_interleave(
                self.args.clips, 0
            )
            true = world.oracle(to_video(state["clips"].flatten(0, 1)), prompts)
            logs["true"] = true.mean().item()
        return logs

    def bytes_on_disk(self):
        """About as much as round.pt, reward.pt and the clips of labels-ROUND/ will take."""
        args, clip = self.args, math.prod(self.policy.config.video_shape)
        clips = min(MOST_PROMPTS, len(self.y)) * args.clips * clip
        need = 2 * clips  # a new round.pt is written beside the last one
        if self.old is not None:
            need += 2 * 4 * sum(map(torch.numel, self.old.state_dict().values()))
        if self.refresh:
            need += 4 * 4 * sum(map(torch.numel, self.judge.state_dict().values()))
            need += 2 * 2 * self.refresh.most_labelled * clip
            need += args.rounds // args.refresh * clips if args.data else 0
        return need


def training_items(scores, args):
    """What is trained on, from z-scores (P, n, 3). Flow-DPO: {"items" (M, 3: prompt, winner, loser)};
    nft: {"items" (M, 2: prompt, clip), "r" (P, n)}."""
    weights = torch.tensor(args.align) / sum(map(abs, args.align))
    reward = scores @ weights  # (P, n)
    if args.algo == "dpo":
        return {"items": best_and_worst(reward)}
    items = torch.cartesian_prod(*map(torch.arange, reward.shape))
    return {"items": items, "r": optimality(reward, args.spread)}


def best_and_worst(reward):
    """Rewards (P, n) -> (M, 3: prompt, winner, loser): the best quarter of a prompt's clips and the
    worst quarter, the best with the worst. Equal rewards make no pair; BadInput if there is none."""
    order = reward.argsort(dim=1, descending=True, stable=True)
    quarter = max(1, reward.shape[1] // 4)
    winner = order[:, :quarter]
    loser = order.flip(1)[:, :quarter]
    prompt = torch.arange(len(reward))[:, None].expand_as(winner)
    items = torch.stack((prompt, winner, loser), 2).flatten(0, 1)  # (P * quarter, 3)
    prompt, winner, loser = items.T
    differs = reward[prompt, winner] > reward[prompt, loser]
    if not differs.any():
        raise BadInput(
            "all clips of each prompt have one reward: nothing to align with; look at --reward, --align"
        )
    return items[differs]
