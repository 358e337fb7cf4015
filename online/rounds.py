"""Alignment that goes on: rounds of the policy's own clips, scored and learned from. The paper aligns once.

    python train.py --algo dpo --rounds 10       Flow-DPO on the best and the worst of each prompt's clips
    python train.py --algo nft                   DiffusionNFT on all of them (flow_nft.py)
    python train.py --algo dpo --rounds 10 --refresh 2      and every second round VideoReward learns from new labels

In a round the policy as it is, for nft its old model, makes --clips clips of each prompt at CFG 1; VideoReward's
z-scores under the --align weights are their reward; and --steps / --rounds steps are taken on them. The reference of
Flow-DPO is the start, or with --reference round the policy as it was when the round began.

All that a round needs lies in round.pt, whole before its first step, and a checkpoint ends each round: a run that is
stopped goes on to the same bits, in a round from that file, and between two from the checkpoint.
"""

import copy
from functools import partial

import torch

import world
from data import Vocabulary, draw_noise, drop_prompts, epoch_index, step_rng, take
from evaluate import alignment_table, load_judge, z_scores
from flow_dpo import flow_dpo_step
from model import merged_state_dict, share_trunk
from online.flow_nft import flow_nft_step, move_old, optimality
from online.refresh import Refresh
from real_data.disk_pairs import disk_data
from real_data.toy_pairs import check_toy
from real_data.video import to_bytes, to_video
from runtime.checkpoint import save_checkpoint
from runtime.cli import BadInput, progress_bar
from runtime.distributed import process_0_first, rank
from runtime.resume import settled
from sample import sample_many
from train import Task, base_and_policy, reference_for

MOST_PROMPTS = 72  # in a round: as many as the toy has to train on
ROUND_SEED = -500_000  # of a round's prompts and noise, under no step's


def online_task(args, device):
    """Flow-DPO or DiffusionNFT in rounds. BadInput for flags that do not go with them."""
    if args.fsdp:
        raise BadInput(f"--algo {args.algo} in rounds samples from the whole policy; leave --fsdp out")
    base, policy, words = base_and_policy(args, device)
    rounds, length = Rounds(args, base, policy, words, device), args.steps // args.rounds
    nft = args.algo == "nft"
    reference = rounds.old if args.reference == "round" else reference_for(args, base, words, device)
    same_trunk = args.freeze and args.reference in ("first", "round")
    shared_forward = share_trunk(policy, reference, args.freeze) if same_trunk and not nft else None

    def batch(step, rows):
        now, rng = rounds.at(step // length), step_rng(args.seed, step)
        count = 2 * args.batch if nft else args.batch  # as many clips for both
        index = epoch_index(len(now["items"]), count, step % length, args.seed)
        prompt, *places = now["items"][index].T
        y = drop_prompts(now["y"][prompt], args.label_dropout, rng)
        noise = draw_noise(count, base.config.video_shape, args.time_shift, rng)
        if nft:
            rows = slice(2 * rows.start, 2 * rows.stop)
        clips = [to_video(now["clips"][prompt[rows], place[rows]]) for place in places]
        if nft:
            return {"x0": clips[0], **take({"y": y, "r": now["r"][prompt, places[0]], **noise}, rows)}
        return {"x0_w": clips[0], "x0_l": clips[1], **take({"y": y, **noise}, rows)}

    def loss(batch):
        if nft:
            value, logs = flow_nft_step(policy, rounds.old, base, **batch, beta=args.nft_beta, kl=args.kl)
        else:
            settings = {"beta": args.beta, "schedule": args.schedule, "shared_forward": shared_forward}
            value, logs = flow_dpo_step(policy, reference, **batch, **settings)
        return value, logs | rounds.now["logs"]

    about = {"base": base, "reward": rounds.judge, "words": words, "pairs": rounds, "args": args, "device": device}
    shown = "round", "learned", "true"
    return Task("velocity", policy, words, batch, loss, shown, partial(alignment_table, **about), merged_state_dict)


class Rounds:
    """`now` is the round that is on, a dict: its number, prompts y (P, S), clips (P, n, C, T, H, W) as uint8 and their
    z-scores (P, n, 3), `items` to train on and `logs`. `old` is the model of an earlier policy or None, `judge` is
    VideoReward, and `y` has the prompts of all rounds."""

    def __init__(self, args, base, policy, words, device):
        self.args, self.policy, self.device, self.now = args, policy, device, None
        self.vocabulary, self.file = Vocabulary(words), args.out / "round.pt"
        keeps = args.algo == "nft" or args.reference == "round"
        self.old = copy.deepcopy(policy).requires_grad_(False) if keeps else None
        self.judge = load_judge(args.reward, base.config, tuple(words)).to(device)
        if args.data:
            self.y = disk_data(args, base.config, words, held_out=False)[2].y.unique(dim=0)
        else:
            check_toy(base.config, self.vocabulary)
            self.y = self.vocabulary.encode_attributes(world.split_prompts("train"), base.config.max_text)
        self.refresh = Refresh(args, self.judge, self.vocabulary, device) if args.refresh else None

    def at(self, number):
        """The round of this number: kept, or made by the policy as it is. BadInput if the round before is unknown."""
        if self.now is None or self.now["number"] != number:
            with process_0_first():
                kept = self.read()
                if kept and number < kept["number"]:
                    kept = None  # of a run that is begun anew
                if kept and (rank() or self.now is None):
                    self.restore(kept)
                if kept is None or kept["number"] != number:
                    if number != (kept["number"] + 1 if kept else 0):
                        fault = f"holds no round {number - 1} of this run to go on from; start it anew"
                        raise BadInput(f"{self.file}: {fault}")
                    kept = self.made(number)
                    save_checkpoint(self.file, kept)
            self.now = kept | self.lesson(kept["y"], kept["clips"], kept["scores"])
            self.now["logs"] = {"round": float(number), **self.now["logs"]}
        return self.now

    def read(self):
        """round.pt, None if there is none of this run."""
        try:
            kept = torch.load(self.file, weights_only=True)
            return kept if kept["settings"] == settled(self.args) else None
        except Exception:  # not there, or damaged: torch can raise anything
            return None

    def restore(self, kept):
        if self.old is not None:
            self.old.load_state_dict(kept["old"])
        if self.refresh:
            self.judge.load_state_dict(kept["judge"])
            self.refresh.labelled = kept["labelled"]

    def made(self, number):
        args, rng = self.args, step_rng(self.args.seed, ROUND_SEED - number)
        if self.old is not None and number:
            move_old(self.old, self.policy, args.old_decay if args.algo == "nft" else 0.0)
        y = self.y[torch.randperm(len(self.y), generator=rng)[:MOST_PROMPTS]]  # (P, S)
        x1 = torch.randn(len(y) * args.clips, *self.policy.config.video_shape, generator=rng)
        sampler, bar = self.old if args.algo == "nft" else self.policy, progress_bar(f"round {number}", "batch")
        asked = y.repeat_interleave(args.clips, 0).to(self.device)
        clips = to_bytes(sample_many(sampler, x1.to(self.device), asked, bar)).cpu().unflatten(0, (len(y), -1))
        if self.refresh:
            self.refresh(number, y, clips)
        scores = z_scores(self.judge, to_video(clips.flatten(0, 1)), asked, self.device).unflatten(0, (len(y), -1))
        kept = {"number": number, "settings": settled(args), "y": y, "clips": clips, "scores": scores}
        kept["old"] = self.old.state_dict() if self.old is not None else {}
        if self.refresh:
            kept |= {"judge": self.judge.state_dict(), "labelled": self.refresh.labelled}
        return kept

    def lesson(self, y, clips, scores):
        """What is to be learned: items (M, 2: prompt, clip) with r (P, n) for nft, (M, 3: prompt, winner, loser) for
        Flow-DPO, whose best quarter of a prompt's clips meets the worst, the best the very worst. And logs."""
        reward = scores @ (torch.tensor(self.args.align) / sum(map(abs, self.args.align)))  # (P, n)
        logs = {"learned": scores.mean().item()}
        if not self.args.data:
            attributes = world.prompt_attributes([self.vocabulary.decode(row) for row in y])
            true = [
                world.oracle(to_video(some), prompt.expand(len(some), 3)) for some, prompt in zip(clips, attributes)
            ]
            logs["true"] = torch.cat(true).mean().item()
        if self.args.algo == "nft":
            items = torch.cartesian_prod(*map(torch.arange, reward.shape))
            return {"items": items, "r": optimality(reward, self.args.spread), "logs": logs}
        order = reward.argsort(dim=1, descending=True, stable=True)
        quarter = max(1, reward.shape[1] // 4)
        pairs = torch.stack((order[:, :quarter], order.flip(1)[:, :quarter]), 2)  # (P, quarter, 2)
        prompt = torch.arange(len(y))[:, None, None].expand(-1, quarter, 1)
        items = torch.cat((prompt, pairs), 2).flatten(0, 1)  # (M, 3)
        better = reward[items[:, 0], items[:, 1]] > reward[items[:, 0], items[:, 2]]
        if not better.any():
            raise BadInput("all clips of each prompt have one reward: nothing to align with; look at --reward, --align")
        return {"items": items[better], "logs": logs}
