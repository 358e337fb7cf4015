"""Online alignment: rounds of the policy's own clips, scored and trained on. The paper aligns once.

A round has three parts. The policy, for nft its old model, samples --clips clips of each prompt at
CFG 1. VideoReward scores them: their reward is the mean of its z-scores under the --align weights.
Then --steps / --rounds training steps are taken on them.

round.pt holds a round, first as sampled and then with its scores; a checkpoint ends each round. A
stopped run resumes bit for bit: within a round from round.pt, between two rounds from the
checkpoint and the models in the last round.pt.
"""

import copy
import math

import torch

import world
from data import Vocabulary, step_rng
from flow import sampling_times
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

    `state` is the current round: what round.pt holds (`sample`, `score`), what to train on
    (`training_items`) and its logs. `old` is the model of an earlier policy or None; `judge` is
    VideoReward; `prompts` (N texts) and their ids `y` (N, S) are those of all rounds; `length` is
    the steps of a round."""

    def __init__(self, settings, policy, judge, words, device):
        self.settings, self.device = settings, device
        self.policy, self.judge = policy, judge
        self.length = settings.steps // settings.rounds
        self.file, self.state = settings.out / "round.pt", None
        self.old = self.refresh = None
        if settings.algo != "dpo" or settings.reference == "round":
            self.old = copy.deepcopy(policy).requires_grad_(False)
        vocabulary = Vocabulary(words)
        if settings.data:
            self.prompts, self.y = disk_prompts(settings, vocabulary, policy.config.max_text)
        else:
            check_toy(policy.config, vocabulary)
            self.prompts = [world.prompt_text(row) for row in world.split_prompts("train")]
            self.y = vocabulary.encode(self.prompts, policy.config.max_text)
        if settings.refresh:
            self.refresh = Refresh(settings, judge, vocabulary, device)
            if resumes(settings):  # the closing table needs the judge as the last round left it
                self.restore(read_own(self.file, settings))

    def at(self, number):
        """The round of this number, from round.pt or a new one by the policy as it is. BadInput if
        round.pt holds neither this round nor the one before."""
        if self.state is not None and self.state["number"] == number:
            return self.state
        with process_0_first():  # which makes the round for all
            state = read_own(self.file, self.settings)
            if state and state["number"] not in (number - 1, number):
                state = None  # of a run that was begun anew
            if state or number > 0:
                self.restore(state)
            if state is None or state["number"] < number:
                state = self.sample(number)
                save_checkpoint(self.file, state)
            if "scores" not in state:
                state |= self.score(state)
                save_checkpoint(self.file, state)
        items = training_items(state, self.settings)
        self.state = state | items | {"logs": self.logs(state)}
        return self.state

    def models(self):
        """What of a round is not made of its clips: the old model, and with --refresh VideoReward
        and the pairs that it has learned."""
        models = {"old": self.old.state_dict()} if self.old is not None else {}
        if self.refresh:
            models |= {"judge": self.judge.state_dict(), "labelled": self.refresh.labelled}
        return models

    def restore(self, state):
        """Loads the `models` of a round. BadInput for None, a round.pt that is not there."""
        if state is None:
            raise BadInput(f"{self.file}: holds no round of this run to go on from; start it anew")
        if self.old is not None:
            self.old.load_state_dict(state["old"])
        if self.refresh:
            self.judge.load_state_dict(state["judge"])
            self.refresh.labelled = state["labelled"]

    def sample(self, number):
        """A new round: its number, the run's settings, prompts (P texts), y (P, S), clips
        (P, n, C, T, H, W) as uint8 and `models`; for grpo also states (P, n, K + 1, C, T, H, W) as
        float16 and times (K + 1,)."""
        settings = self.settings
        if self.old is not None and number:
            move_old(self.old, self.policy, settings.old_decay if settings.algo == "nft" else 0.0)

        rng = step_rng(settings.seed, ROUND_SEED - number)
        chosen = torch.randperm(len(self.y), generator=rng)[:MOST_PROMPTS].tolist()
        prompts, y = [self.prompts[i] for i in chosen], self.y[chosen]
        shape = self.policy.config.video_shape
        x1 = torch.randn(len(y), settings.clips, *shape, generator=rng)
        if settings.algo == "grpo":
            # only the SDE's draws, which it learns from, set the clips of a prompt apart
            x1[:] = x1[:, :1]
        x1 = x1.flatten(0, 1).to(self.device)
        y_clips = y.repeat_interleave(settings.clips, 0).to(self.device)
        bar = progress_bar(f"round {number}", "batch")

        def progress(starts):
            return until_stopped(bar(starts), settings.out)

        state = {"number": number, "settings": settled(settings), "prompts": prompts, "y": y}
        if settings.algo == "grpo":
            sde = {"steps": settings.sde_steps, "shift": settings.time_shift}
            times = sampling_times(**sde)
            sde |= {"noise_level": settings.noise_level, "rng": rng}
            states = sample_many(self.policy, x1, y_clips, progress, sampler=sample_sde, **sde)
            state |= {"states": states.half().unflatten(0, (len(y), -1)), "times": times}
            videos = states[:, -1]
        else:
            model = self.old if settings.algo == "nft" else self.policy
            videos = sample_many(model, x1, y_clips, progress)
        videos = videos.unflatten(0, (len(y), -1))
        self.check_finite(videos, "the pixels", prompts)
        return state | {"clips": to_bytes(videos)} | self.models()

    def score(self, state):
        """VideoReward's z-scores (P, n, 3) of a round's clips, after its new labels, if any are
        due; and the `models` once more."""
        if self.refresh:
            self.refresh(state)
        clips = to_video(state["clips"].flatten(0, 1))
        y = state["y"].repeat_interleave(self.settings.clips, 0)
        scores = z_scores(self.judge, clips, y, self.device).unflatten(0, (len(state["y"]), -1))
        self.check_finite(scores, "VideoReward's scores", state["prompts"])
        return {"scores": scores} | self.models()

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
        clips = min(MOST_PROMPTS, len(self.y)) * settings.clips
        if settings.algo == "grpo":
            clips *= 1 + 2 * (settings.sde_steps + 1)  # states are float16
        if self.refresh:
            clips += 2 * self.refresh.most_labelled
        old = self.old.state_dict().values() if self.old is not None else ()
        return 2 * (clips * clip + 4 * sum(value.numel() for value in old))


def training_items(state, settings):
    """What to train on, from a round's z-scores (P, n, 3).

    dpo    {"items" (M, 3: prompt, winner, loser)}
    nft    {"items" (M, 2: prompt, clip), "r" (P, n)}
    grpo   {"items" (M, 3: prompt, clip, step), "advantage" (P, n)}"""
    reward = total_reward(state["scores"], settings.align)  # (P, n)
    if settings.algo == "dpo":
        return {"items": best_and_worst(reward)}
    prompt, clip = map(torch.arange, reward.shape)
    if settings.algo == "nft":
        r = optimality(reward, settings.spread)
        return {"items": torch.cartesian_prod(prompt, clip), "r": r}
    step = torch.arange(len(state["times"]) - 2)  # the last one follows the ODE
    advantage = group_advantage(reward)
    return {"items": torch.cartesian_prod(prompt, clip, step), "advantage": advantage}


def best_and_worst(reward):
    """Rewards (P, n) -> (M, 3: prompt, winner, loser): the best quarter of a prompt's clips with
    the worst quarter. Equal rewards make no pair; BadInput if no pair is left."""
    order = reward.argsort(dim=1, descending=True, stable=True)
    quarter = max(1, reward.shape[1] // 4)
    winner, loser = order[:, :quarter], order.flip(1)[:, :quarter]  # (P, quarter) each
    differs = reward.gather(1, winner) > reward.gather(1, loser)
    if not differs.any():
        raise BadInput("all clips of each prompt have one reward; look at --reward and --align")
    prompt = torch.arange(len(reward))[:, None].expand_as(winner)
    return torch.stack((prompt, winner, loser), 2)[differs]
