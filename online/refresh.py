"""New labels for the reward model: human feedback on the policy's own clips (not in the paper).

A policy that follows a reward model leaves the clips that the model learned from, and then the
model is wrong where it matters. Every --refresh rounds people compare pairs of the policy's own
clips and VideoReward is trained on them: half of a batch are new pairs and half old ones, so that
it forgets nothing. reward.pt in --out is VideoReward as the last refresh left it, for --reward.

The toy's annotators answer at once. With --data, and on the toy with --ask, the clips are written
to labels-ROUND/ in --out, as mp4 and as pairs.csv in the public format with empty labels, and the
run stops; once each cell of VQ, MQ and TA says A, B, same or invalid, --resume reads them and goes
on.
"""

import sys
from dataclasses import asdict

import torch

import world
from data import INVALID, Pairs, mean_one, step_rng
from judge import pair_scores, set_unit
from real_data.dataset import disk_data
from real_data.pairs_csv import Pair, read_pairs, write_pairs
from real_data.toy_pairs import annotate_pairs, annotated_pairs
from real_data.video import FPS, to_video, write_video
from reward import reward_step
from runtime.checkpoint import save_checkpoint
from runtime.cli import BadInput, progress_bar
from runtime.resume import resumes, until_stopped

OLD = 1024  # old pairs, of the training prompts
MOST = 1024  # labelled pairs of the policies' clips, the newest
STEPS, BATCH, RATE = 60, 32, 3e-4
LABEL_SEED = -700_000  # of a round's pairs and steps; nothing else has it


class Refresh:
    """Called with each round as it was sampled; trains `judge`, a VideoReward, in place. `labelled`
    has the newest pairs of the policies' clips, {"y" (N, S), "clips" (N, 2, C, T, H, W) as uint8,
    "label" (N, 3)}, or is None."""

    def __init__(self, settings, judge, vocabulary, device):
        self.settings, self.device = settings, device
        self.judge, self.vocabulary = judge, vocabulary
        self.labelled, self.most_labelled = None, max(MOST, settings.refresh_pairs)
        self.by_people = bool(settings.data or settings.ask)
        if judge.config.channels != 3:
            fault = "people cannot look at latents; use --data with videos, or leave --refresh out"
            raise BadInput(f"--refresh: {fault}")
        if not resumes(settings):
            for folder in settings.out.glob("labels-*"):
                raise BadInput(f"{folder}: belongs to another run; move it away")
        if settings.data:
            self.old = disk_data(settings, judge.config, vocabulary.words, held_out=False)[2]
        else:
            seed = settings.seed + 2
            self.old = annotated_pairs(OLD, ["train"], seed, judge.config, vocabulary)

    def __call__(self, state):
        """state: a round's number, prompts (P texts), y (P, S) and clips (P, n, C, T, H, W)."""
        number, settings = state["number"], self.settings
        if number == 0 or number % settings.refresh:
            return
        rng = step_rng(settings.seed, LABEL_SEED - 1000 * number)
        prompt, a, b = draw_pairs(*state["clips"].shape[:2], settings.refresh_pairs, rng).T
        prompts, y = [state["prompts"][i] for i in prompt.tolist()], state["y"][prompt]
        clips = torch.stack((state["clips"][prompt, a], state["clips"][prompt, b]), 1)
        if self.by_people:
            index, label = self.ask_people(settings.out / f"labels-{number}", prompts, clips)
            new = {"y": y[index], "clips": clips[index], "label": label}
        else:
            pairs = Pairs(y, lambda index, side: to_video(clips[index, side]))
            attributes = world.prompt_attributes(prompts)
            pairs = annotate_pairs(pairs, attributes, settings.seed + 10 * number)
            new = {"y": y, "clips": clips, "label": pairs.label}
        if self.labelled:
            new = {name: torch.cat((self.labelled[name], value)) for name, value in new.items()}
        self.labelled = {name: value[-self.most_labelled :] for name, value in new.items()}
        self.train(number)

    def ask_people(self, folder, prompts, clips):
        """Which of the pairs (N, 2, C, T, H, W) have labels (N',), and these (N', 3). Where there
        is no CSV yet, writes the pairs as videos and then the CSV, and stops the run."""
        csv, rows = folder / "pairs.csv", []
        if csv.exists():
            return read_labels(csv, len(clips))
        bar = progress_bar("writing videos", "pair")
        try:
            folder.mkdir(parents=True, exist_ok=True)
            for i, pair in enumerate(until_stopped(bar(clips), self.settings.out)):
                names = video_names(i)
                for name, clip in zip(names, to_video(pair)):
                    write_video(folder / name, clip)
                facts = FPS, float(clips.shape[3])  # frames a second, number of frames
                rows.append(Pair(*names, prompts[i], (None,) * 3, *facts, *facts))
            write_pairs(rows, csv)
        except OSError as error:
            raise BadInput(f"cannot write {folder}: {error.strerror}") from None
        print(f"wrote {csv} and its videos: label it by `python -m pages.label {csv}`,")
        print("or VQ, MQ and TA by hand as A, B, same or invalid; then --resume")
        sys.exit(130)

    def train(self, number):
        """Trains VideoReward on new and old pairs. The old ones give its scores their unit."""
        settings, judge, labelled = self.settings, self.judge, self.labelled
        clips = labelled["clips"]
        new = Pairs(
            labelled["y"], lambda i, side: to_video(clips[i, side]), label=labelled["label"]
        )
        judge.requires_grad_(True).train()
        optimizer = torch.optim.AdamW(judge.parameters(), RATE, betas=(0.9, 0.99), weight_decay=0.0)
        bar = progress_bar(f"training VideoReward, round {number}", "step")
        for step in until_stopped(bar(range(STEPS)), settings.out):
            rng = step_rng(settings.seed, LABEL_SEED - 1000 * number - 1 - step)
            halves = []
            for pairs in (new, self.old):
                index = torch.randint(len(pairs), (BATCH // 2,), generator=rng)
                halves.append((*pairs.sides(index), pairs.y[index], pairs.label[index]))
            video_a, video_b, y, label = map(torch.cat, zip(*halves))
            batch = {"video_a": video_a, "video_b": video_b, "y": y, "label": label}
            batch["weight"] = mean_one(label != INVALID)
            batch = {name: value.to(self.device) for name, value in batch.items()}
            loss, _ = reward_step(judge, **batch, mos=None, caption=settings.caption)
            optimizer.param_groups[0]["lr"] = RATE * (1 - step / STEPS)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        judge.eval().requires_grad_(False)
        set_unit(judge, pair_scores(judge, self.old, self.device))
        facts = {"kind": "reward", "config": asdict(judge.config), "step": number}
        facts |= {"vocabulary": self.vocabulary.words, "model": judge.state_dict()}
        save_checkpoint(settings.out / "reward.pt", facts)


def draw_pairs(num_prompts, num_clips, count, rng):
    """`count` different pairs of clips of one prompt, at most all: (M, 3: prompt, A, B)."""
    every = torch.triu_indices(num_clips, num_clips, offset=1).T  # (n (n - 1) / 2, 2)
    chosen = torch.randperm(num_prompts * len(every), generator=rng)[:count]
    pair = every[chosen % len(every)]
    swapped = torch.rand(len(chosen), 1, generator=rng) < 0.5
    pair = torch.where(swapped, pair.flip(1), pair)
    return torch.cat((chosen[:, None] // len(every), pair), 1)


def video_names(i):
    """The names of pair i's videos."""
    return f"{i:04d}_A.mp4", f"{i:04d}_B.mp4"


def read_labels(file, num_pairs):
    """What people wrote into a round's CSV: which pairs (N,), labels (N, 3). Prints a line for each
    faulty row; BadInput if there is any."""
    faults, rows = [], []
    try:
        rows = read_pairs(file, faults)
    except BadInput:
        if not faults:
            raise
    numbers = {video_names(i): i for i in range(num_pairs)}
    for row in rows:
        if row.paths not in numbers:
            fault = f"{row.path_a} and {row.path_b} are no pair of this round"
            faults.append(f"{file}, line {row.line}, column path_A: {fault}")
    if faults:
        print(*faults[:-1], sep="\n", file=sys.stderr)
        raise BadInput(faults[-1])
    index = torch.tensor([numbers[row.paths] for row in rows])
    return index, torch.tensor([row.label for row in rows])
