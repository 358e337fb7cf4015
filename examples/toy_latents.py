"""Toy pairs as latents, to try `--data` with latents before your own autoencoder is at hand.

    python examples/toy_latents.py latents      writes latents/pairs.csv and latents/shard-0.npy

Each square of 2 x 2 pixels becomes four times as many channels, which loses nothing; then all are
brought to mean 0 and variance 1, as latents should be. With an autoencoder, change `encode`.
"""

import sys
from pathlib import Path

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parent.parent))  # the project's modules, from any folder

from data import Vocabulary
from flags import Parser, positive_int, seed
from model import ModelConfig
from real_data.pairs_csv import Pair, write_pairs
from real_data.toy_pairs import annotated_pairs
from runtime.cli import BadInput, check_writable, run


def encode(video):
    """Clips (N, 3, T, H, W) -> latents (N, 12, T, H / 2, W / 2) of mean 0 and variance 1."""
    n, c, t, h, w = video.shape
    squares = video.reshape(n, c, t, h // 2, 2, w // 2, 2)
    latents = squares.permute(0, 1, 4, 6, 2, 3, 5).reshape(n, 4 * c, t, h // 2, w // 2)
    return (latents - latents.mean()) / latents.std()


def main():
    parser = Parser("Writes toy pairs as latents and a CSV of them.")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--pairs", type=positive_int, default=240, help="how many")
    parser.add_argument("--frames", type=positive_int, default=8, help="of a clip")
    parser.add_argument("--size", type=positive_int, default=32, help="of a clip, twice a latent's")
    parser.add_argument("--seed", type=seed, default=0, help="of the pairs")
    args = parser.parse_args()
    if args.folder.exists():
        raise BadInput(f"{args.folder}: exists already; name a new folder")
    check_writable(args.folder, "folder")
    config = ModelConfig(frames=args.frames, size=args.size, patch=(1, 2, 2))
    vocabulary = Vocabulary()
    pairs = annotated_pairs(args.pairs, ["train"], args.seed, config, vocabulary)
    clips = torch.stack(pairs.sides(torch.arange(args.pairs)), 1)  # (N, 2, 3, T, H, W)
    np.save(args.folder / "shard-0.npy", encode(clips.flatten(0, 1)).numpy())
    rows = []
    for i, label in enumerate(pairs.label.tolist()):
        paths = f"shard-0.npy:{2 * i}", f"shard-0.npy:{2 * i + 1}"
        length = 2.0, float(args.frames)  # frames a second, frames
        rows.append(Pair(*paths, vocabulary.decode(pairs.y[i]), tuple(label), *length, *length))
    write_pairs(rows, args.folder / "pairs.csv")
    print(f"wrote {args.folder / 'pairs.csv'} and shard-0.npy, {2 * args.pairs} latents")


if __name__ == "__main__":
    run(main)
