"""Flags of sample.py and real_data.prepare."""

from pathlib import Path

from runtime.cli import positive


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
