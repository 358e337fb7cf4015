"""The settings of each algorithm: a dataclass whose fields are its flags (flags.py).

Defaults are the paper's or measured; docs/paper.md gives the paper's (Tables 10 and 11) and why.
"""

from dataclasses import dataclass, field
from pathlib import Path

from flags import (
    Parser,
    clip_count,
    flag,
    flags_of,
    fraction,
    frame_size,
    non_negative,
    option,
    parse,
    positive,
    positive_int,
    seed,
    triple,
    whole,
)
from flow import TIME_SHIFT
from flow_dpo import SCHEDULES
from model import PRESETS
from reward import LOSSES
from runtime.checkpoint import WEIGHTS
from runtime.cli import BadInput

DATA, ROUNDS, REFRESH = ("data",), ("rounds",), ("refresh",)
STARTED = ("init_reward",)  # from a trained VideoReward, which has sizes of its own
TOY = ("data", "rounds")  # neither of them
PRECISIONS = ("auto", "float32", "bfloat16")


# ---------------------------------------------------------------------------------------------
# What several algorithms share


@dataclass
class Training:
    """every training"""

    algo: str = flag("dpo", "pretrain, reward, nrg, sft, rwr, dpo, nft or grpo; each has own flags")
    steps: int = flag(200, "optimiser steps", positive_int)
    batch: int = flag(16, "clips (pretrain) or pairs a step; a pair is 2 clips", positive_int)
    lr: float = flag(1e-4, "peak learning rate of AdamW", positive)
    decay: float = flag(0.0, "last share of the run, over which the rate falls to 0", fraction)
    ema: float = flag(0.0, "decay of the averaged weights; 0 = none", fraction)
    seed: int = flag(0, "of weights, data, noise and times", seed)
    device: str = flag("auto", "auto (cuda, mps, cpu) or a torch device", resumable=True)
    precision: str = flag("auto", "auto = bfloat16 where it is fast", choices=PRECISIONS)
    compile: bool = flag(False, "compile each block by torch.compile (for GPUs)", resumable=True)
    grad_checkpoint: bool = flag(False, "gradient checkpointing", resumable=True)
    accum: int = flag(1, "micro-batches of a process's batch", positive_int, resumable=True)
    fsdp: bool = flag(False, "under torchrun: shard the model, not only the batch", resumable=True)
    out: Path = flag(None, "folder of the run (default: out/ALGO)", Path, resumable=True)
    resume: bool = flag(False, "continue the run in --out", resumable=True)
    export: Path = flag(None, "also write the final weights here, as float16", Path, resumable=True)
    save_every: int = flag(500, "steps between checkpoints", positive_int, resumable=True)
    pairs_of_steps: bool = False  # whether the number of pairs follows from --steps
    digests: dict = field(default_factory=dict)  # of the files that the flags name


@dataclass
class Data:
    """real data (default: the toy world)"""

    data: Path = flag(None, "CSV of videos or latents in VideoAlign's format", Path, file=True)
    data_dir: Path = flag(None, "folder of the CSV's paths (default: its own)", Path, needs=DATA)
    cache: Path = flag(Path("out/clips"), "folder of decoded clips", Path, resumable=True)
    fps: float = flag(2.0, "frames a second of a video that are read (5.1)", positive, needs=DATA)
    short: str = flag(
        "spread",
        "videos too short for the model's frames at --fps: spread the frames over them, or refuse",
        choices=("spread", "refuse"),
        needs=DATA,
    )
    skip_bad: bool = flag(False, "list faulty rows and go on without them", needs=DATA)


@dataclass
class FromNothing:
    """a model trained from nothing"""

    preset: str = flag("nano", "size of the model", choices=PRESETS, without=STARTED)
    size: tuple = flag(None, "height x width of a clip, as 32x56", frame_size, without=STARTED)


@dataclass
class ToyPairs:
    """pairs of toy clips"""

    pairs: int = flag(None, "pairs (default: 1 epoch; reward, nrg: 2)", positive_int, without=TOY)
    generated: float = flag(0.0, "share of pairs of clips of --init", fraction, without=TOY)


@dataclass
class Labelled(ToyPairs):
    """pairs to validate on"""

    val: Path = flag(None, "CSV (default: a tenth of prompts)", Path, needs=DATA, file=True)
    eval_pairs: int = flag(1000, "pairs of toy clips", positive_int, without=DATA, resumable=True)


@dataclass
class VideoModel:
    """the video model"""

    attention: str = flag(None, "full, or tile:T,H,W for sliding tiles (default: --init's)")
    time_shift: float = flag(TIME_SHIFT, "shift of t towards noise; 1 = none", positive)
    eval_prompts: int = flag(192, "prompts of the closing table", positive_int, resumable=True)
    eval_seed: int = flag(1234, "noise of the closing table", seed, resumable=True)


@dataclass
class FlowMatching:
    """flow matching"""

    label_dropout: float = flag(0.1, "share of prompts dropped, for CFG", fraction)


@dataclass
class Aligned(Data, VideoModel):
    """alignment"""

    init: Path = flag(WEIGHTS / "base.pt", "base model, where alignment starts", Path, file=True)
    reward: Path = flag(None, "VideoReward (default: weights/reward.pt)", Path, file=True)
    align: tuple = flag((1.0, 1.0, 1.0), "weights of VQ, MQ and TA in the reward (5.2)", triple)
    freeze: int = flag(2, "first blocks that stay the base model's", whole)
    lora_rank: int = flag(0, "rank of LoRA adapters; 0 = train the weights", whole)


@dataclass
class Offline(ToyPairs, FlowMatching):
    """alignment on pairs"""

    rank: str = flag("reward", "what ranks clips", choices=("reward", "labels"), without=ROUNDS)


@dataclass
class Rounds:
    """rounds of the policy's own clips (online/rounds.py)"""

    rounds: int = flag(None, "rounds, each of STEPS / ROUNDS steps", positive_int)
    clips: int = flag(8, "clips of each prompt in a round", clip_count, needs=ROUNDS)
    refresh: int = flag(None, "rounds between new labels", positive_int, needs=ROUNDS)
    refresh_pairs: int = flag(256, "pairs to label each time", positive_int, needs=REFRESH)
    ask: bool = flag(False, "label them yourself, as with --data", needs=REFRESH, without=DATA)
    caption: float = flag(None, "weight of the captioning loss", non_negative, needs=REFRESH)


# ---------------------------------------------------------------------------------------------
# The algorithms


@dataclass
class Pretrain(FromNothing, FlowMatching, Data, VideoModel, Training):
    """Flow matching on clips of all twelve generators, or of --data (section 4.1)."""

    algo: str = "pretrain"
    steps: int = 11000
    batch: int = 32
    lr: float = 2.5e-3
    decay: float = 0.4
    ema: float = 0.999


@dataclass
class Reward(FromNothing, Labelled, Data, Training):
    """VideoReward on pairs that annotators compared (section 3.2)."""

    algo: str = "reward"
    steps: int = 1500
    batch: int = 32
    lr: float = 1e-3
    decay: float = 0.4
    generated: float = 0.5
    init: Path = flag(WEIGHTS / "base.pt", "model of the --generated clips", Path, file=True)
    init_reward: Path = flag(None, "VideoReward to start from (default: none)", Path, file=True)
    loss: str = flag("btt", "Bradley-Terry with ties, without, or on ratings", choices=LOSSES)
    tokens: str = flag("separate", "how scores are read", choices=("separate", "shared"))
    caption: float = flag(None, "captioning loss (default: 1; with --data 0)", non_negative)


@dataclass
class Nrg(Labelled, Data, Training):
    """The noise-aware reward for guidance, on the base model's first blocks (section 4.4)."""

    algo: str = "nrg"
    steps: int = 2000
    batch: int = 48
    lr: float = 2e-3
    decay: float = 0.4
    init: Path = flag(WEIGHTS / "base.pt", "video model that it reads", Path, file=True)
    attention: str = flag(None, "full, or tile:T,H,W for sliding tiles (default: --init's)")
    reward: Path = flag(WEIGHTS / "reward.pt", "VideoReward that it learns from", Path, file=True)
    target: str = flag(
        "reward",
        "learn VideoReward's scores of the clean clip, or people's labels by Bradley-Terry (4.4)",
        choices=("reward", "labels"),
    )
    read: int = flag(2, "first blocks of the video model that it reads", positive_int)
    trunk: str = flag("frozen", "whether these blocks are trained", choices=("frozen", "trained"))
    time_shift: float = flag(1.0, "shift of t towards noise; 0 = clean clips", non_negative)
    eval_seed: int = flag(1234, "noise of the closing table", seed, resumable=True)


@dataclass
class Sft(Offline, Aligned, Training):
    """Supervised fine-tuning on the winners (section 5.2)."""

    algo: str = "sft"


@dataclass
class Rwr(Offline, Aligned, Training):
    """Flow-RWR: regression weighted by the reward (section 4.3)."""

    algo: str = "rwr"
    temperature: float = flag(1.0, "of exp(reward / temperature); lower = sharper", positive)


@dataclass
class Dpo(Offline, Rounds, Aligned, Training):
    """Flow-DPO on ranked pairs against a frozen reference (section 4.2)."""

    algo: str = "dpo"
    beta: float = flag(100.0, "larger stays closer to the reference", positive)
    schedule: str = flag("constant", "beta over t (section 4.2)", choices=SCHEDULES)
    reference: str = flag(
        "first", "the start, the policy as a round begins (round), or a checkpoint", file=True
    )


@dataclass
class Nft(Rounds, FlowMatching, Aligned, Training):
    """DiffusionNFT in rounds of the policy's own clips (online/flow_nft.py; not in the paper)."""

    algo: str = "nft"
    steps: int = 500
    lr: float = 3e-4
    rounds: int = 10
    nft_beta: float = flag(0.5, "distance of v+ and v- from v_old, in v - v_old", positive)
    spread: float = flag(1.0, "Z, in standard deviations within a prompt; published: 5", positive)
    old_decay: float = flag(0.2, "share of v_old that a round keeps", fraction)
    kl: float = flag(0.0, "weight of |v - v_ref|^2; the published one x NFT_BETA / 5", non_negative)


@dataclass
class Grpo(Rounds, Aligned, Training):
    """Flow-GRPO in rounds of the policy's own clips (online/flow_grpo.py; not in the paper)."""

    algo: str = "grpo"
    steps: int = 500
    batch: int = 32
    rounds: int = 10
    sde_steps: int = flag(3, "steps of the sampler that draws at random", positive_int)
    noise_level: float = flag(0.7, "a of the sampler's noise", positive)
    clip_range: float = flag(1e-3, "largest change of the ratio from 1 that is learned", positive)
    kl: float = flag(0.0, "weight of the KL divergence from the start", non_negative)


ALGORITHMS = {cls.algo: cls for cls in (Pretrain, Reward, Nrg, Sft, Rwr, Dpo, Nft, Grpo)}


# ---------------------------------------------------------------------------------------------
# From a command line


def settings_of(argv=None):
    """The settings of a command line of train.py, by default sys.argv's. BadInput for a flag that
    the algorithm does not read, and for flags that do not go together."""
    chooser = Parser(None, add_help=False, allow_abbrev=False)
    chooser.add_argument("--algo", choices=ALGORITHMS, default="dpo")
    algo = chooser.parse_known_args(argv)[0].algo
    settings, unknown = parse(ALGORITHMS[algo], argv)
    if unknown:
        name = unknown[0]
        readers = [other for other, cls in ALGORITHMS.items() if name in map(option, flags_of(cls))]
        if readers:
            raise BadInput(f"{name}: read by --algo {', '.join(readers)}, not by {algo}")
        raise BadInput(f"{name}: no such flag; --algo {algo} --help lists them")
    check(settings)
    complete(settings)
    return settings


def check(settings):
    """BadInput for flags that do not go together."""
    algo, rounds = settings.algo, getattr(settings, "rounds", None)
    if rounds and settings.steps % rounds:
        raise BadInput(f"--rounds {rounds}: --steps {settings.steps} must be a multiple of it")
    if rounds and settings.clips == 1 and (algo == "dpo" or settings.refresh):
        raise BadInput("--clips 1: clips of one prompt are compared; give at least 2")
    if algo == "dpo" and settings.reference == "round" and not rounds:
        raise BadInput("--reference round: has no effect without --rounds")
    if algo == "nrg" and settings.target == "labels" and settings.reward != Nrg.reward:
        raise BadInput("--reward: has no effect with --target labels")
    if isinstance(settings, Aligned) and not any(settings.align):
        raise BadInput("--align 0,0,0: at least one weight must not be 0")


def complete(settings):
    """Sets the flags whose defaults depend on others."""
    if settings.out is None:
        settings.out = Path("out") / settings.algo
    if getattr(settings, "caption", 0.0) is None:
        settings.caption = 0.0 if settings.data else 1.0  # measured on the toy's 17 words alone
    if getattr(settings, "pairs", 0) is None:
        epochs = 2 if isinstance(settings, Labelled) else 1
        settings.pairs = max(1, settings.steps * settings.batch // epochs)
        settings.pairs_of_steps = True
    by_reward = getattr(settings, "rank", "reward") == "reward"
    if isinstance(settings, Aligned) and settings.reward is None and by_reward:
        settings.reward = WEIGHTS / "reward.pt"
