"""The picture of README.md: clips that miss their prompt, before and after alignment.

    python evaluate.py picture      writes base_above_aligned.gif to --out

It needs the policy of `python train.py --algo dpo`. The prompts are the first eight of the standard
set whose base clip has a wrong colour, shape or direction. The command also prints how often such a
clip stays wrong over the whole set, and the true win rates."""

from pathlib import Path

import world
from data import DIMENSIONS
from judge import NOISE_SEED, sample_prompts, win_rate
from model import load_velocity
from nrg import SteeredPolicy, load_noisy_reward
from pictures import write_gif
from runtime.checkpoint import WEIGHTS
from runtime.cli import BadInput, check_writable
from sample import NRG_EPS, NRG_INTERVAL, NRG_SCALE
from studies.policies import SETS, prompts_of

POLICY = Path("out/dpo/last.pt")
COLUMNS = 8


def is_wrong(videos, prompts):
    """Whether a clip has a wrong colour, shape or direction: (N,)."""
    return (world.attributes_right(videos, prompts) <= 0.5).any(1)


def run(settings):
    if not POLICY.exists():
        raise BadInput(f"{POLICY}: no such file; python train.py --algo dpo writes it")
    check_writable(settings.out, "--out")
    prompts = prompts_of("standard", SETS["standard"])
    base, words = load_velocity(WEIGHTS / "base.pt")
    policy, _ = load_velocity(POLICY)
    reward, _ = load_noisy_reward(WEIGHTS / "nrg.pt")
    base, policy, reward = (model.to(settings.device) for model in (base, policy, reward))
    steered = SteeredPolicy(base, reward, (1, 1, 1), NRG_SCALE, NRG_EPS, NRG_INTERVAL)

    videos = {}
    for name, model in {"base": base, "Flow-DPO": policy, "Flow-NRG": steered}.items():
        videos[name] = sample_prompts(model, words, prompts, NOISE_SEED, settings.device)
    wrong = is_wrong(videos["base"], prompts)
    base_scores = world.oracle(videos["base"], prompts)
    print(f"{wrong.sum()} of {len(prompts)} clips of the base model have a wrong attribute")
    for name in ("Flow-DPO", "Flow-NRG"):
        still = is_wrong(videos[name], prompts)[wrong].float().mean()
        wins = win_rate(world.oracle(videos[name], prompts), base_scores).tolist()
        rates = " ".join(f"{n} {rate:.2f}" for n, rate in zip(DIMENSIONS, wins))
        print(f"{name}: {still:.0%} of these are still wrong; true wins {rates}")

    shown = wrong.nonzero()[:COLUMNS, 0]
    write_gif(
        settings.out / "base_above_aligned.gif",
        [video[shown] for video in videos.values()],
        zoom=3,
        labels=list(videos),
        captions=[world.prompt_text(prompt) for prompt in prompts[shown]],
    )
    print(f"wrote {settings.out / 'base_above_aligned.gif'}")
