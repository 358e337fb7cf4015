"""Damaged files: a reader takes them, or says why not in one line; no other error."""

import io
import random

import torch

from model import ModelConfig, VideoTransformer, load_velocity
from real_data import pairs_csv
from runtime.cli import BadInput


def spoiled(whole, rng):
    """`whole` bytes with a few of them changed, cut out or put in, and sometimes without an end."""
    content = bytearray(whole)
    for _ in range(rng.randint(1, 4)):
        at = rng.randrange(len(content))
        content[at : at + rng.randint(0, 8)] = rng.randbytes(rng.randint(0, 8))
    return bytes(content[: rng.choice((len(content), rng.randrange(len(content))))])


def check(read, path, content):
    path.write_bytes(content)
    try:
        assert read(path)
    except BadInput as error:
        assert str(path) in str(error) and "\n" not in str(error)


def test_tables_of_any_bytes_and_cells(tmp_path):
    rng = random.Random(0)
    header, row = ",".join(pairs_csv.COLUMNS), "a.mp4,./a.mp4,a cat,A,same,B,2,8,2,8"
    (tmp_path / "a.mp4").touch()
    cells = ["a.mp4", "../a.mp4", "a.npy:3", "A", "same", "nan", "1e9", "-1", "", '"', "\x00", "∞"]
    for _ in range(300):
        check(pairs_csv.read_pairs, tmp_path / "x.csv", spoiled(f"{header}\n{row}\n".encode(), rng))
        lines = [",".join(rng.choices(cells, k=rng.randint(0, 12))) for _ in range(2)]
        text = "\n".join(rng.sample([header, row, *lines], 4))
        check(pairs_csv.read_pairs, tmp_path / "x.csv", text.encode())


def test_checkpoints_of_any_bytes_and_values(tmp_path):
    rng = random.Random(0)
    sizes = {"dim": 4, "depth": 1, "heads": 2, "frames": 2, "size": 8, "channels": 1}
    config = ModelConfig(**sizes, vocab=4, max_text=1)
    tensors = VideoTransformer(config).state_dict()
    values = (None, True, -1, 2.5, "a", [], {}, torch.zeros(3))

    def file_of(state):
        file = io.BytesIO()
        torch.save(state, file)
        return file.getvalue()

    for _ in range(80):
        state = {"format": 1, "kind": "velocity", "vocabulary": ["<pad>", "a"], "step": 1}
        state |= {"config": dict(vars(config)), "model": dict(tensors)}
        check(load_velocity, tmp_path / "x.pt", spoiled(file_of(state), rng))
        where = rng.choice((state, state["config"], state["model"]))
        where[rng.choice([*where, "other"])] = rng.choice(values)
        check(load_velocity, tmp_path / "x.pt", file_of(state))
