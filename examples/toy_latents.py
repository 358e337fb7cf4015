"""Toy pairs as latents, to try `--data` with latents before your own autoencoder is at hand.

    python examples/toy_latents.py latents         writes latents/pairs.csv and latents/shard-0.npy, a row a clip

In place of an autoencoder, each square of 2 x 2 pixels becomes four times as many channels, which loses nothing; then
all are brought to mean 0 and variance 1, as latents of a real one should be. With one of your own, change `encode`.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(
    0, str(Path(__file__).parent.parent)
)  # the project's modules, from wherever this is started

from data import Vocabulary
from model import ModelConfig
from real_data.pairs_csv import Pair, write_pairs
from real_data.toy_pairs import annotated_pairs
from real_data.video import FPS
from runtime.cli import BadInput, Parser, check_writable, positive_int, run, seed


def encode(video):
    """Clips (N, 3, T, H, W) -> latents (N, 12, T, H / 2, W / 2) of mean 0 and variance 1."""
    n, c, t, h, w = video.shape
    squares = video.reshape(n, c, t, h // 2, 2, w // 2, 2)
    latents = squares.permute(0, 1, 4, 6, 2, 3, 5).reshape(n, 4 * c, t, h // 2, w // 2)
    return (latents - latents.mean()) / latents.std()


def main():
    parser = Parser("Writes toy pairs as latents and a CSV of them.")
    parser.add_argument("folder", type=Path, help="a new folder")
    parser.add_argument("--pairs", type=positive_int, default=240, help="how many")
    parser.add_argument("--seed", type=seed, default=0, help="of prompts, clips and annotators")
    parser.add_argument(
        "--frames", type=positive_int, default=8, help="of a clip, and of its latent"
    )
    parser.add_argument(
        "--size", type=positive_int, default=32, help="pixels along a side, twice the latent's"
    )
    args = parser.parse_args()
    if args.folder.exists():
        raise BadInput(f"{args.folder}: is there already; name a new folder")
    config = ModelConfig(frames=args.frames, size=args.size, patch=(1, 2, 2))
    vocabulary = Vocabulary()
    pairs = annotated_pairs(args.pairs, ["train"], args.seed, config, vocabulary)
    clips = torch.stack(pairs.sides(torch.arange(args.pairs)), 1).flatten(
        0, 1
    )  # A and B of each pair in turn
    rows = [
        Pair(
            f"shard-0.npy:{2 * i}",
            f"shard-0.npy:{2 * i + 1}",
            vocabulary.decode(pairs.y[i]),
            tuple(pairs.label[i].tolist()),
            *(FPS, float(config.frames)) * 2,
        )
        for i in range(args.pairs)
    ]
    check_writable(args.folder, "folder")
    latents = encode(clips)
    np.save(args.folder / "shard-0.npy", latents.numpy())
    write_pairs(rows, args.folder / "pairs.csv")
    print(
        f"wrote {args.folder / 'pairs.csv'} and shard-0.npy, {len(latents)} latents of {tuple(latents.shape[1:])}"
    )


if __name__ == "__main__":
    run(main)
