"""Flags of sample.py and real_data.prepare."""

from pathlib import Path

from runtime.checkpoint import WEIGHTS
from runtime.cli import (
    Parser,
    clip_count,
    finite,
    interval,
    non_negative,
    positive,
    positive_int,
    seed,
    triple,
)


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
