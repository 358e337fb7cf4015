"""The flags of train.py and sample.py, in groups, with their types, and the algorithms that read each.

A flag that is left out takes the value that its algorithm has in train.py. A flag that is given but not read, and flags
that do not go together, are refused in one line."""

from argparse import Namespace
from pathlib import Path

from runtime.checkpoint import WEIGHTS
from runtime.cli import (
    BadInput,
    Parser,
    clip_count,
    finite,
    fraction,
    frame_size,
    interval,
    non_negative,
    positive,
    positive_int,
    seed,
    triple,
    whole,
)

REWARDS = ("reward", "nrg")
OFFLINE = ("sft", "rwr", "dpo")  # alignment on pairs that are there before the training
ALIGNMENT = (*OFFLINE, "nft")
INPUTS = ("init", "reward", "reference", "data", "val")  # files whose content a run depends on
VIDEO = ("pretrain", *ALIGNMENT)  # trainings of the video model


class TrainingParser(Parser):
    """A parser whose flags name the algorithms that read them; their help begins with these names."""

    def __init__(self, description):
        super().__init__(description)
        self.readers = {}  # of the flags that not all algorithms read

    def group(self, title):
        """The function that adds a flag to a new group: add_argument, and `algos`, None for all."""
        group = self.add_argument_group(title)

        def add(flag, help, algos=None, **settings):
            if algos:
                help = f"{', '.join(algos)}: {help}"
            action = group.add_argument(flag, help=help, **settings)
            if algos:
                self.readers[action.dest] = algos

        return add

    def given(self, argv):
        """The names of the flags that a command line gives."""
        unset = Namespace(**{action.dest: None for action in self._actions})
        return [
            name for name, value in vars(self.parse_args(argv, unset)).items() if value is not None
        ]


def training_flags(argv, defaults, presets, losses, schedules):
    """The flags of train.py's command line, None for sys.argv. defaults: {algorithm: {flag: value}}, filled in where a
    flag is left out; presets, losses and schedules: the names to choose from. BadInput for flags that do not go
    together, or that the algorithm does not read."""
    parser = TrainingParser(
        "Trains one algorithm; writes last.pt, metrics.jsonl and pictures to --out. "
        "Where no checkpoint is named, the shipped weights/ are used."
    )
    add = parser.group("what to train")
    add("--algo", choices=defaults, default="dpo", help="algorithm")
    add(
        "--preset",
        choices=presets,
        default="nano",
        help="size of a model trained from nothing; with --plan of any video model",
        algos=("pretrain", "reward"),
    )
    text = "height x width of a clip, for example 32x56 (default: the preset's, or that of latents)"
    add("--size", type=frame_size, help=text, algos=("pretrain", "reward"))
    add(
        "--attention",
        help="full, or tile:T,H,W for sliding tiles (default: full, or as --init has it)",
        algos=(*VIDEO, "nrg"),
    )
    add(
        "--init",
        type=Path,
        help="base model: alignment's start, nrg's trunk, reward's generator (weights/base.pt)",
        algos=(*REWARDS, *ALIGNMENT),
    )
    add(
        "--reward",
        type=Path,
        help="VideoReward that scores the pairs, or nrg's clips (weights/reward.pt)",
        algos=("nrg", *ALIGNMENT),
    )

    add = parser.group("how long and how fast")
    helps = {
        "steps": (positive_int, "optimiser steps"),
        "batch": (
            positive_int,
            "clips (pretrain) or pairs a step; sft and rwr take two clips for a pair",
        ),
        "lr": (positive, "peak learning rate of AdamW"),
        "decay": (fraction, "last share of the run in which the rate falls to 0; 0 = constant"),
        "ema": (fraction, "memory of the averaged weights; 0 = none"),
        "time_shift": (non_negative, "of t towards noise; 1 = none, 0 = clean clips (nrg alone)"),
    }
    for name, (kind, text) in helps.items():
        values = {algo: own[name] for algo, own in defaults.items() if name in own}
        text += f" (default: {', '.join(f'{algo} {value}' for algo, value in values.items())})"
        algos = None if len(values) == len(defaults) else tuple(values)
        add("--" + name.replace("_", "-"), type=kind, help=text, algos=algos)
    add("--seed", type=seed, default=0, help="of weights, data, noise and times")
    add("--device", default="auto", help="auto (cuda, mps, cpu) or a torch device")
    add(
        "--precision",
        choices=("auto", "float32", "bfloat16"),
        default="auto",
        help="of matrix products; auto = bfloat16 where the device has instructions for it. Weights are float32",
    )
    add(
        "--compile",
        action="store_true",
        help="each block by torch.compile: for a GPU, not for a CPU",
    )
    add("--grad-checkpoint", action="store_true", help="keep a block's input alone for backward")
    add(
        "--accum",
        type=positive_int,
        default=1,
        help="micro-batches that a process cuts its batch into",
    )
    add("--fsdp", action="store_true", help="under torchrun: shard the model, not only the batch")
    add(
        "--plan",
        type=positive_int,
        help="print what this training takes on so many GPUs, and do nothing",
    )
    add("--flops", type=positive, default=4e14, help="of --plan: FLOP/s that a GPU sustains")

    add = parser.group("flow matching")
    add(
        "--label-dropout",
        type=fraction,
        default=0.1,
        help="share of prompts dropped, for CFG",
        algos=VIDEO,
    )

    add = parser.group("preferences")
    add(
        "--pairs",
        type=positive_int,
        help="toy pairs in the data set (default: one epoch; reward, nrg two, as in Table 11)",
        algos=(*REWARDS, *OFFLINE),
    )
    add(
        "--generated",
        type=fraction,
        help="share of the toy pairs that compare clips of the model --init (default: reward 0.5, others 0)",
        algos=(*REWARDS, *OFFLINE),
    )
    text = "with ties, without, or on ratings (3.2)"
    add("--loss", choices=losses, default="btt", help=text, algos=("reward",))
    text = "one a score, or one"
    add(
        "--tokens", choices=("separate", "shared"), default="separate", help=text, algos=("reward",)
    )
    text = "weight of the loss on the prompt's words (default: 1; --data 0)"
    add("--caption", type=non_negative, help=text, algos=("reward", "dpo", "nft"))
    text = "on mean errors; larger stays closer to the reference"
    add("--beta", type=positive, default=100.0, help=text, algos=("dpo",))
    text = "beta over t (section 4.2)"
    add("--schedule", choices=schedules, default="constant", help=text, algos=("dpo",))
    text = "of exp(reward / temperature); lower = sharper"
    add("--temperature", type=positive, default=1.0, help=text, algos=("rwr",))
    text = "what says which clip is better, VideoReward or people's labels"
    add("--rank", choices=("reward", "labels"), default="reward", help=text, algos=OFFLINE)
    text = "weights of VQ, MQ and TA in the reward (5.2)"
    add("--align", type=triple, default="1,1,1", help=text, algos=ALIGNMENT)
    text = "first blocks left as in the base; 0 = none"
    add("--freeze", type=whole, default=2, help=text, algos=ALIGNMENT)
    text = "adapters of this rank; 0 = the weights"
    add("--lora-rank", type=whole, default=0, help=text, algos=ALIGNMENT)
    text = "first blocks of the base model that the reward reads"
    add("--read", type=positive_int, default=2, help=text, algos=("nrg",))
    add(
        "--target",
        choices=("reward", "labels"),
        default="reward",
        help="what VideoReward says of the clean clip, or the annotators' labels by Bradley-Terry (4.4)",
        algos=("nrg",),
    )
    text = "whether these blocks stay the base's"
    add("--trunk", choices=("frozen", "trained"), default="frozen", help=text, algos=("nrg",))

    add = parser.group("rounds (online/rounds.py)")
    text = "rounds of the policy's own clips (default: nft 10, dpo none)"
    add("--rounds", type=positive_int, help=text, algos=("dpo", "nft"))
    text = "of each prompt in a round"
    add("--clips", type=clip_count, default=8, help=text, algos=("dpo", "nft"))
    text = "every so many rounds VideoReward learns from new labels (default: never)"
    add("--refresh", type=positive_int, help=text, algos=("dpo", "nft"))
    text = "pairs that are labelled each time, or all there are if fewer"
    add("--refresh-pairs", type=positive_int, default=256, help=text, algos=("dpo", "nft"))
    text = "the start, first; the policy when the round began, round; or a checkpoint's model"
    add("--reference", default="first", help=text, algos=("dpo",))
    text = "distance of v+ and v- from v_old, in v - v_old"
    add("--nft-beta", type=positive, default=0.5, help=text, algos=("nft",))
    text = "Z, in standard deviations of the rewards within a prompt; the publication's is about 5"
    add("--spread", type=positive, default=1.0, help=text, algos=("nft",))
    text = "how much of v_old a round keeps"
    add("--old-decay", type=fraction, default=0.2, help=text, algos=("nft",))
    text = "weight of |v - v_ref|^2; the published weight times NFT_BETA / 5, as is the loss"
    add("--kl", type=non_negative, default=0.0, help=text, algos=("nft",))

    add = parser.group("real data")
    add(
        "--data",
        type=Path,
        help="CSV of pairs of videos or latents, in VideoAlign's format (default: the toy world)",
    )
    text = "CSV to validate on (default: a tenth of the prompts, held out)"
    add("--val", type=Path, help=text, algos=REWARDS)
    video_flags(add)
    add(
        "--skip-bad",
        action="store_true",
        help="go on without rows that have a fault, and list them",
    )

    add = parser.group("output")
    add("--out", type=Path, help="folder (default: out/<algo>)")
    add("--resume", action="store_true", help="continue the run in --out")
    add("--export", type=Path, help="also write the final weights here, alone and as float16")
    add("--save-every", type=positive_int, default=500, help="steps between checkpoints")
    text = "prompts of the closing table"
    add("--eval-prompts", type=positive_int, default=192, help=text, algos=VIDEO)
    add(
        "--eval-pairs",
        type=positive_int,
        default=1000,
        help="toy pairs to validate on",
        algos=REWARDS,
    )
    text = "noise of the closing table"
    add("--eval-seed", type=seed, default=1234, help=text, algos=(*VIDEO, "nrg"))

    args = parser.parse_args(argv)
    filled = dict(defaults[args.algo])
    filled["generated"] = 0.5 if args.algo == "reward" else 0.0
    filled["caption"] = (
        0.0 if args.data else 1.0
    )  # measured on the toy alone, whose vocabulary is 17 words
    filled["init"] = WEIGHTS / "base.pt"
    filled["reward"] = None if args.rank == "labels" else WEIGHTS / "reward.pt"
    filled["out"] = Path("out") / args.algo
    for name, value in filled.items():
        if getattr(args, name) is None:
            setattr(args, name, value)
    args.pairs_of_steps = args.pairs is None
    if args.pairs_of_steps:
        args.pairs = max(1, args.steps * args.batch // (2 if args.algo in ("reward", "nrg") else 1))
    if args.algo == "nft" and args.rounds is None:
        args.rounds = 10
    for name in parser.given(argv):
        fault = unread(name, args, parser.readers)
        if fault:
            raise BadInput(f"--{name.replace('_', '-')}: {fault}")
    args.inputs = [
        name for name in INPUTS if getattr(args, name) and not unread(name, args, parser.readers)
    ]
    if args.rounds and args.steps % args.rounds:
        raise BadInput(f"--rounds {args.rounds}: --steps {args.steps} must be a multiple of it")
    if args.rounds and args.clips == 1 and (args.algo == "dpo" or args.refresh):
        raise BadInput("--clips 1: clips of one prompt are compared; give at least 2")
    if args.old_decay == 1:
        raise BadInput("--old-decay 1: the old model would never move; give less than 1")
    if args.time_shift == 0 and args.algo != "nrg":
        raise BadInput(
            "--time-shift 0: clean clips are for --algo nrg alone; give a positive number"
        )
    if not any(args.align):
        raise BadInput("--align 0,0,0: at least one weight must not be 0")
    return args


def unread(name, args, readers):
    """Why this training does not read a flag, or "". readers: {flag: algorithms}, where not all of them read it."""
    toy, offline = not args.data, not args.data and not args.rounds
    closing = toy or (args.algo != "pretrain" and args.reward)
    depends = {  # flag: (whether it is read by an algorithm that may read it, what it takes)
        "init": (args.algo != "reward" or (toy and args.generated > 0), "with --generated above 0"),
        "reward": (args.target == "reward", "with --target reward"),
        "pairs": (offline, "without --data and --rounds"),
        "generated": (offline, "without --data and --rounds"),
        "rank": (not args.rounds, "without --rounds, whose clips no one labelled"),
        "caption": (args.algo == "reward" or args.refresh, "with --refresh"),
        "clips": (args.rounds, "with --rounds"),
        "refresh": (args.rounds, "with --rounds"),
        "refresh_pairs": (args.refresh, "with --refresh"),
        "reference": (
            args.rounds or args.reference not in ("first", "round"),
            "with --rounds, or as a checkpoint",
        ),
        "data_dir": (args.data, "with --data"),
        "val": (args.data, "with --data"),
        "skip_bad": (args.data, "with --data"),
        "fps": (args.data, "with --data"),
        "short": (args.data, "with --data"),
        "cache": (
            args.data or (args.algo != "pretrain" and args.generated > 0),
            "with --data or --generated",
        ),
        "eval_prompts": (closing, "where there is a closing table"),
        "eval_pairs": (toy, "without --data"),
        "eval_seed": (closing, "where there is a closing table"),
        "flops": (args.plan, "with --plan"),
    }
    algos = readers.get(name, (args.algo,))
    is_read, condition = depends.get(name, (True, ""))
    if name == "preset" and args.plan:
        return ""
    if args.algo not in algos:
        return f"read by --algo {', '.join(algos)}, not by {args.algo}"
    return "" if is_read else f"has no effect here; --algo {args.algo} reads it only {condition}"


def video_flags(add):
    """The flags that decide how videos are decoded, for train.py and real_data.prepare."""
    text = "folder that the paths in the CSV start from (default: the CSV's own)"
    add("--data-dir", type=Path, help=text)
    text = "folder that keeps decoded and sampled clips"
    add("--cache", type=Path, default=Path("out/clips"), help=text)
    add("--fps", type=positive, default=2.0, help="frames a second of a video to look at (5.1)")
    text = (
        "videos too short for the model's frames at --fps: spread the frames over them, or refuse"
    )
    add("--short", choices=("spread", "refuse"), default="spread", help=text)


def sampling_flags(steps, cfg, scale, eps, guided):
    """The flags of sample.py's command line; the arguments are the defaults of its numbers."""
    parser = Parser(
        "Samples clips of one prompt and prints their true scores (1 is a clean clip, 0 a bad one)."
    )
    add = parser.add_argument
    add("--prompt", default="a red circle moving left", help="words that the model knows")
    add("--ckpt", type=Path, default=WEIGHTS / "base.pt", help="weights of a video model")
    add("--n", type=clip_count, default=4, help="clips")
    add("--steps", type=positive_int, default=steps, help="Euler steps")
    add("--cfg", type=finite, default=cfg, help="scale of classifier-free guidance; 1 = off")
    add(
        "--attention",
        help="full, or tile:T,H,W for sliding tiles (default: as the model was trained)",
    )
    add("--seed", type=seed, default=0, help="one seed, one set of clips, on every device")
    add("--out", type=Path, default=Path("out/sample"), help="folder to write to")
    add("--device", default="auto", help="auto, cpu, cuda or mps")
    text = "reward guidance (Flow-NRG, section 4.4); the clips without it are made as well"
    add = parser.add_argument_group(text).add_argument
    add("--nrg", type=triple, help="weights of VQ, MQ and TA of any sign, for example 1,1,0.5")
    add("--nrg-ckpt", type=Path, default=WEIGHTS / "nrg.pt", help="weights of a noise-aware reward")
    add("--nrg-scale", type=finite, default=scale, help="w of Eq. 11, on rewards of unit spread")
    add(
        "--nrg-eps",
        type=non_negative,
        default=eps,
        help="of t / (1 - t + eps); 0 = the paper's form",
    )
    text = "lowest and highest t that is guided"
    add("--nrg-interval", type=interval, default="{:g},{:g}".format(*guided), help=text)
    add(
        "--compare",
        action="store_true",
        help="CFG 1, --cfg and guidance after --cfg, one under the other",
    )
    return parser.parse_args()
