"""New labels for a reward that judges what it made: the human-feedback loop, closed (not in the paper).

A policy that follows a reward leaves the clips that it learned from, and then it is wrong where it matters. Every
--refresh rounds, people look at pairs of the policy's own clips, and VideoReward learns on: half a batch of new pairs,
half of old ones, so that it forgets nothing.

The toy's annotators are asked at once. With --data the clips are written to labels-ROUND/ in --out, as mp4 and as
pairs.csv in the public format with empty labels, and the run stops; once each cell of VQ, MQ and TA says A, B, same or
invalid, --resume reads them and goes on.
"""

import shutil
import sys

import torch

import world
from data import INVALID, Pairs, mean_one, step_rng
from evaluate import pair_scores
from real_data.disk_pairs import disk_data, disk_pairs
from real_data.pairs_csv import Pair, read_pairs, write_pairs
from real_data.toy_pairs import annotate_pairs, annotated_pairs
from real_data.video import FPS, to_bytes, to_video, write_video
from reward import reward_step
from runtime.cli import BadInput, progress_bar

NEW, OLD = 256, 1024  # pairs that are labelled in a round; old ones, of the training prompts
MOST = 1024  # labelled pairs that are kept, the newest
STEPS, BATCH, RATE = 60, 32, 3e-4
LABEL_SEED = -700_000  # of a round's pairs and steps, under no other


class Refresh:
    """Called with every round's clips; trains `judge`, a VideoReward, in place. `labelled` has the policies' pairs so
    far, {"y" (N, S), "clips" (N, 2, C, T, H, W) as uint8, "label" (N, 3)}, or is None."""

    def __init__(self, args, judge, vocabulary, device):
        self.args, self.judge, self.vocabulary, self.device = args, judge, vocabulary, device
        self.labelled, config = None, judge.config
        if args.data and config.channels != 3:
            raise BadInput("--refresh: people cannot look at latents; use --data with videos, or leave --refresh out")
        if args.data:
            self.old = disk_data(args, config, vocabulary.words, held_out=False)[2]
        else:
            self.old = annotated_pairs(OLD, ["train"], args.seed + 2, config, vocabulary)

    def __call__(self, number, y, clips):
        """Prompts y (P, S) and clips (P, n, C, T, H, W) as uint8 of a round."""
        if not number or number % self.args.refresh:
            return
        rng = step_rng(self.args.seed, LABEL_SEED - 1000 * number)
        prompt = torch.randint(len(y), (NEW,), generator=rng)
        first = torch.randint(clips.shape[1], (NEW,), generator=rng)
        second = (first + torch.randint(1, clips.shape[1], (NEW,), generator=rng)) % clips.shape[1]
        shown = {"y": y[prompt], "clips": torch.stack((clips[prompt, first], clips[prompt, second]), 1)}
        new = self.answers(number, **shown) if self.args.data else self.annotated(number, **shown)
        so_far = self.labelled or {name: value[:0] for name, value in new.items()}
        self.labelled = {name: torch.cat((so_far[name], value))[-MOST:] for name, value in new.items()}
        self.learn(number)

    def annotated(self, number, y, clips):
        """What the toy's annotators say."""
        pairs = Pairs(y, lambda index, side: to_video(clips[index, side]))
        prompts = world.prompt_attributes([self.vocabulary.decode(row) for row in y])
        return {"y": y, "clips": clips, "label": annotate_pairs(pairs, prompts, self.args.seed + 10 * number).label}

    def answers(self, number, y, clips):
        """What people wrote into the round's CSV; without one, it is written for them and the run stops. BadInput names
        the first fault in it, a cell without a label among them."""
        file = self.args.out / f"labels-{number}" / "pairs.csv"
        if not file.exists():
            ask(file, [self.vocabulary.decode(row) for row in y], clips)
            print(f"wrote {file} and its videos: label VQ, MQ and TA as A, B, same or invalid, then --resume")
            sys.exit(130)
        config = self.judge.config
        pairs = disk_pairs(read_pairs(file), file, config, self.vocabulary, self.args.cache)
        sides = torch.stack(pairs.sides(torch.arange(len(pairs))), 1)
        return {"y": pairs.y, "clips": to_bytes(sides), "label": pairs.label}

    def learn(self, number):
        """VideoReward's own loss on new and old pairs; then its z-scores are once more those of the old ones."""
        judge, new, args = self.judge.requires_grad_(True).train(), self.labelled, self.args
        optimizer = torch.optim.AdamW(judge.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.0)
        for step in progress_bar(f"VideoReward learns on, round {number}", "step")(range(STEPS)):
            rng = step_rng(args.seed, LABEL_SEED - 1000 * number - 1 - step)
            index, other = (torch.randint(len(pool), (BATCH // 2,), generator=rng) for pool in (new["y"], self.old.y))
            label = torch.cat((new["label"][index], self.old.label[other]))
            batch = {"y": torch.cat((new["y"][index], self.old.y[other])), "label": label}
            batch |= {"mos": torch.zeros(len(label), 2, 3), "weight": mean_one(label != INVALID)}
            sides = zip(to_video(new["clips"][index]).unbind(1), self.old.sides(other))
            batch["video_a"], batch["video_b"] = map(torch.cat, sides)
            batch = {name: value.to(self.device) for name, value in batch.items()}
            loss, _ = reward_step(judge, **batch, caption=args.caption)
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        judge.eval().requires_grad_(False)
        scores = pair_scores(judge, self.old, self.device)
        judge.mean.copy_(scores.mean((0, 1)))
        judge.std.copy_(scores.std((0, 1)).clamp(min=1e-6))


def ask(file, prompts, clips):
    """Writes pairs (N, 2, C, T, H, W) of prompts, a list of str, beside a CSV without labels; whole, or not at all."""
    unfinished = file.parent.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        unfinished.mkdir(parents=True)
        rows = []
        for i, (prompt, pair) in enumerate(zip(prompts, clips)):
            names = [f"{i:04d}_{side}.mp4" for side in "AB"]
            for name, clip in zip(names, to_video(pair)):
                write_video(unfinished / name, clip)
            rows.append(Pair(*names, prompt, (None,) * 3, *(FPS, float(clips.shape[3])) * 2))
        write_pairs(rows, unfinished / file.name)
        unfinished.rename(file.parent)
    except OSError as error:
        raise BadInput(f"cannot write {file.parent}: {error.strerror}") from None
