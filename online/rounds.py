"""Online alignment: rounds of the policy's own clips, scored and trained on. The paper aligns once.

    python train.py --algo dpo --rounds 10     Flow-DPO on the best and worst of a prompt's clips
    python train.py --algo nft                 DiffusionNFT on all of them
    python train.py --algo grpo                Flow-GRPO on the steps that sampled them
    python train.py --rounds 10 --refresh 2    VideoReward learns from new labels, too

In a round the policy, for nft its old model, samples --clips clips of each prompt at CFG 1;
VideoReward's z-scores under the --align weights are their reward; and --steps / --rounds steps are
taken on them.

round.pt holds all that a round needs and is complete before the round's first step; a checkpoint
ends each round. A stopped run resumes bit for bit: within a round from that file, between two
rounds from the checkpoint.
"""

import copy
import math

import torch

import world
from data import Vocabulary, draw_noise, drop_prompts, epoch_index, step_rng
from judge import z_scores
from online.flow_grpo import group_advantage, sample_sde
from online.flow_nft import move_old, optimality
from online.refresh import Refresh
from ranking import total_reward
from real_data.dataset import disk_prompts
from real_data.toy_pairs import check_toy
from real_data.video import to_bytes, to_video
from runtime.checkpoint import save_checkpoint
from runtime.cli import BadInput, progress_bar
from runtime.distributed import process_0_first
from runtime.resume import last_state, read_own, resumes, settled, until_stopped
from sample import sample_many

MOST_PROMPTS = 72  # in a round: as many as the toy has to train on
ROUND_SEED = -500_000  # of a round's prompts and noise; no step has it


class Rounds:
    """All rounds of a run.

    `state` is the current round: the content of round.pt (`new_round`), items to train on and logs.
    `old` is the model of an earlier policy or None; `judge` is VideoReward; `prompts` (N texts) and
    their ids `y` (N, S) are those of all rounds; `length` is the steps of a round."""

    def __init__(self, settings, policy, judge, words, device):
        self.settings, self.device = settings, device
        self.policy, self.judge = policy, judge
        self.length = settings.steps // settings.rounds
        self.file, self.state, self.old = settings.out / "round.pt", None, None
        if settings.algo != "dpo" or settings.reference == "round":
            self.old = copy.deepcopy(policy).requires_grad_(False)
        vocabulary = Vocabulary(words)
        if settings.data:
            self.prompts, self.y = disk_prompts(settings, vocabulary, policy.config.max_text)
        else:
            check_toy(policy.config, vocabulary)
            self.prompts = [world.prompt_text(row) for row in world.split_prompts("train")]
            self.y = vocabulary.encode(self.prompts, policy.config.max_text)
        self.refresh = None
        if settings.refresh:
            self.refresh = Refresh(settings, self.judge, vocabulary, device)
            if resumes(settings):  # the closing table needs the judge as the last round left it
                self.restore(self.last_round())

    def last_round(self):
        state = read_own(self.file, self.settings)
        if state is None:
            raise BadInput(f"{self.file}: holds no round of this run to go on from; start it anew")
        return state

    def at(self, number):
        """The round of this number, from round.pt or a new one by the policy as it is. BadInput if
        the round before it is not there."""
        if self.state is not None and self.state["number"] == number:
            return self.state
        with process_0_first():  # which makes the round for all
            state = read_own(self.file, self.settings)
            if state and state["number"] > number:
                state = None  # of a run that was begun anew
            last = state["number"] if state else -1
            if state:
                self.restore(state)
            if last < number - 1:
                fault = f"holds no round {number - 1} of this run to go on from; start it anew"
                raise BadInput(f"{self.file}: {fault}")
            if last < number:
                state = self.new_round(number)
                save_checkpoint(self.file, state)
        items = training_items(state, self.settings)
        self.state = state | items | {"logs": self.logs(state)}
        return self.state

    def draw(self, step, count):
        """The round of a step, `count` of its items, and their prompts, times and noise."""
        state, rng = self.at(step // self.length), step_rng(self.settings.seed, step)
        items = state["items"]
        items = items[epoch_index(len(items), count, step % self.length, self.settings.seed)]
        if self.settings.algo == "grpo":
            return state, items, {}
        y = drop_prompts(state["y"][items[:, 0]], self.settings.label_dropout, rng)
        shape, shift = self.policy.config.video_shape, self.settings.time_shift
        return state, items, {"y": y, **draw_noise(count, shape, shift, rng)}

    def restore(self, state):
        if self.old is not None:
            self.old.load_state_dict(state["old"])
        if self.refresh:
            self.judge.load_state_dict(state["judge"])
            self.refresh.labelled = state["labelled"]

    def new_round(self, number):
        """What round.pt holds: the number, the run's settings, prompts (P texts), y (P, S), clips
        (P, n, C, T, H, W) as uint8, their z-scores (P, n, 3), the old model, judge and labelled
        pairs; for grpo also states (P, n, K + 1, C, T, H, W) as float16 and times (K + 1,)."""
        settings = self.settings
        if self.old is not None and number:
            decay = settings.old_decay if settings.algo == "nft" else 0.0
            move_old(self.old, self.policy, decay)
        sampled = self.refresh.labelled_round(number) if self.refresh else None
        sampled = sampled or self.sample(number)
        if self.refresh:
            self.refresh(number, sampled)
        clips = to_video(sampled["clips"].flatten(0, 1))
        y = sampled["y"].repeat_interleave(settings.clips, 0)
        scores = z_scores(self.judge, clips, y, self.device).unflatten(0, (-1, settings.clips))
        self.check_finite(scores, "VideoReward's scores", sampled["prompts"])
        state = {"number": number, "settings": settled(settings), **sampled, "scores": scores}
        state["old"] = self.old.state_dict() if self.old is not None else {}
        if self.refresh:
            state |= {"judge": self.judge.state_dict(), "labelled": self.refresh.labelled}
        return state

    def sample(self, number):
        """Prompts (P texts), y (P, S) and clips (P, n, C, T, H, W) as uint8 of a round; for grpo
        also the states and times of their sampling."""
        settings = self.settings
        rng = step_rng(settings.seed, ROUND_SEED - number)
        chosen = torch.randperm(len(self.y), generator=rng)[:MOST_PROMPTS].tolist()
        prompts, y = [self.prompts[i] for i in chosen], self.y[chosen]
        shape = self.policy.config.video_shape
        x1 = torch.randn(len(y) * settings.clips, *shape, generator=rng).to(self.device)
        y_clips = y.repeat_interleave(settings.clips, 0).to(self.device)
        bar = progress_bar(f"round {number}", "batch")

        def progress(starts):
            return until_stopped(bar(starts), settings.out)

        sampled = {"prompts": prompts, "y": y}
        if settings.algo == "grpo":
            states, times = self.sample_states(x1, y_clips, rng, progress)
            videos = states[:, -1]
            sampled |= {"states": states.half().unflatten(0, (len(y), -1)), "times": times}
        else:
            model = self.old if settings.algo == "nft" else self.policy
            videos = sample_many(model, x1, y_clips, progress).cpu()
        videos = videos.unflatten(0, (len(y), -1))
        self.check_finite(videos, "the pixels", prompts)
        return sampled | {"clips": to_bytes(videos)}

    def sample_states(self, x1, y, rng, progress):
        """States (B, K + 1, C, T, H, W) of the SDE on the CPU, and times (K + 1,)."""
        settings, parts = self.settings, []
        for start in progress(range(0, len(x1), 64)):
            rows = slice(start, start + 64)
            states, times = sample_sde(
                self.policy,
                x1[rows],
                y[rows],
                settings.sde_steps,
                rng,
                settings.noise_level,
                settings.time_shift,
            )
            parts.append(states.transpose(0, 1).cpu())
        return torch.cat(parts), times

    def check_finite(self, values, what, prompts):
        """BadInput that names the first clip for which `values` (P, n, ...) are not finite."""
        bad = torch.nonzero(~values.flatten(2).isfinite().all(2))  # (.., 2: prompt, clip)
        if len(bad):
            prompt, clip = bad[0].tolist()
            where = f"clip {clip + 1} of {self.settings.clips} of prompt {prompts[prompt]!r}"
            raise BadInput(f"{what} of {where} are not finite; {last_state(self.settings.out)}")

    def logs(self, state):
        """The round's number, the mean z-score of its clips and, on the toy, their true score."""
        logs = {"round": float(state["number"]), "learned": state["scores"].mean().item()}
        if not self.settings.data:
            prompts = world.prompt_attributes(state["prompts"])
            prompts = prompts.repeat_interleave(self.settings.clips, 0)
            true = world.oracle(to_video(state["clips"].flatten(0, 1)), prompts)
            logs["true"] = true.mean().item()
        return logs

    def bytes_on_disk(self):
        """About as much as round.pt will take, twice: a new one is written beside the last."""
        settings, clip = self.settings, math.prod(self.policy.config.video_shape)
        need = min(MOST_PROMPTS, len(self.y)) * settings.clips * clip
        if settings.algo == "grpo":
            need += 2 * need * (settings.sde_steps + 1)
        if self.old is not None:
            need += 4 * sum(map(torch.numel, self.old.state_dict().values()))
        if self.refresh:
            need += 2 * self.refresh.most_labelled * clip
        return 2 * need


# ---------------------------------------------------------------------------------------------
# What a round trains on


def training_items(state, settings):
    """What to train on, from a round's z-scores (P, n, 3).

    dpo    {"items" (M, 3: prompt, winner, loser)}
    nft    {"items" (M, 2: prompt, clip), "r" (P, n)}
    grpo   {"items" (M, 3: prompt, clip, step), "advantage" (P, n)}"""
    reward = total_reward(state["scores"], settings.align)  # (P, n)
    if settings.algo == "dpo":
        return {"items": best_and_worst(reward)}
    places = list(map(torch.arange, reward.shape))
    if settings.algo == "nft":
        return {"items": torch.cartesian_prod(*places), "r": optimality(reward, settings.spread)}
    random_steps = torch.arange(len(state["times"]) - 2)  # the last step follows the ODE
    items = torch.cartesian_prod(*places, random_steps)
    return {"items": items, "advantage": group_advantage(reward)}


def best_and_worst(reward):
    """Rewards (P, n) -> (M, 3: prompt, winner, loser): the best quarter of a prompt's clips with
    the worst quarter. Equal rewards make no pair; BadInput if no pair is left."""
    order = reward.argsort(dim=1, descending=True, stable=True)
    quarter = max(1, reward.shape[1] // 4)
    winner = order[:, :quarter]
    loser = order.flip(1)[:, :quarter]
    prompt = torch.arange(len(reward))[:, None].expand_as(winner)
    items = torch.stack((prompt, winner, loser), 2).flatten(0, 1)  # (P * quarter, 3)
    prompt, winner, loser = items.T
    differs = reward[prompt, winner] > reward[prompt, loser]
    if not differs.any():
        raise BadInput("all clips of each prompt have one reward; look at --reward and --align")
    return items[differs]
