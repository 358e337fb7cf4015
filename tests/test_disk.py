"""Preference pairs on disk: the public CSV format, videos, the cache, and every fault named by line and column."""

import csv
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch

import train
import world
from data import INVALID, Vocabulary, vocabulary_of
from model import ModelConfig
from real_data import export_toy, video
from real_data.disk_pairs import disk_pairs, hold_out
from real_data.pairs_csv import Pair, read_pairs, write_pairs
from real_data.toy_pairs import annotated_pairs
from reward import load_reward
from runtime.cli import BadInput

EXAMPLE = Path(__file__).parent.parent.parent / "shared/data/videoalign_example/example.csv"
CONFIG = ModelConfig()


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "toy"
    export(folder, "--pairs=10", "--seed=3")
    return folder


def export(folder, *flags):
    return export_toy.export(export_toy.arguments(["export", str(folder), "--generated=0", *flags]))


@pytest.fixture
def rows(exported, tmp_path):
    """The rows of a good CSV as dicts, its folder writable: tests spoil them."""
    for name in ("a.mp4", "b.mp4"):
        source = next((exported / "videos" / "train").glob("*.mp4"))
        (tmp_path / name).write_bytes(source.read_bytes())
    row = {
        "path_A": "a.mp4",
        "path_B": "./b.mp4",
        "prompt": "A cat, running!",
        "VQ": "A",
        "MQ": "B",
        "TA": "same",
    }
    row |= {"fps_A": "2.0", "num_frames_A": "8.0", "fps_B": "2.0", "num_frames_B": "8.0"}
    return [dict(row), dict(row), dict(row)]


def write(rows, path, header=None, encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.writer(file)
        writer.writerow(header or rows[0])
        writer.writerows(row.values() for row in rows)
    return path


def load(path, rows, skipped=None):
    vocabulary = vocabulary_of([row.prompt for row in rows])
    config = replace(CONFIG, vocab=len(vocabulary.words))
    return disk_pairs(
        rows, path, config, vocabulary, path.parent / "cache", skipped, lambda items, total: items
    )


# ---------------------------------------------------------------------------------------------


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the three public example pairs are not here")
def test_the_public_example_pairs(tmp_path):
    pairs = read_pairs(EXAMPLE)
    assert len(pairs) == 12
    # read off the file by eye: B,B,A / same,same,A / and the third pair; A = 1, B = -1, same = 0
    with open(EXAMPLE, newline="") as file:
        cells = [[row[name] for name in ("VQ", "MQ", "TA")] for row in csv.DictReader(file)]
    wanted = [tuple({"A": 1, "B": -1, "same": 0}[cell] for cell in row) for row in cells]
    assert [pair.label for pair in pairs] == wanted and wanted[:2] == [(-1, -1, 1), (0, 0, 1)]
    # 126 frames at 24 fps are 5.25 s, 10.5 frames at 2 fps, so 10; 152/30 -> 10.1; 144/24 -> 12; 128/24 -> 10.7;
    # 60/16 -> 7.5, so 8
    counts = {
        path: len(video.sample_frames(EXAMPLE.parent / path))
        for pair in pairs[:3]
        for path in pair.paths
    }
    assert list(counts.values()) == [10, 10, 12, 10, 10, 8]
    flags = [
        "--algo",
        "reward",
        "--data",
        EXAMPLE,
        "--cache",
        tmp_path / "cache",
        "--out",
        tmp_path / "run",
    ]
    shell = [
        sys.executable,
        Path(train.__file__),
        *flags,
        "--steps",
        "2",
        "--batch",
        "2",
        "--device",
        "cpu",
    ]
    done = subprocess.run(list(map(str, shell)), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "pairs of prompts held out" in done.stdout
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 6  # each video once, 12 rows or not


def positions(times, step, seconds, least):
    return video.frame_positions(times, {"step": step, "seconds": seconds}, least)


def even_positions(count, rate, least):
    return positions(np.arange(count) / rate, 1 / rate, count / rate, least)


def test_frame_positions_keep_the_interval_not_the_number():
    assert len(even_positions(126, 24, 8)) == 10 and len(even_positions(144, 24, 8)) == 12
    assert even_positions(9, 30, 4).tolist() == [0, 3, 5, 8]  # 0, 2.67, 5.33, 8
    assert even_positions(3, 30, 6).tolist() == [0, 0, 1, 1, 2, 2]
    # frames at 0, 1 and 3 s, the last for a second: 8 times from 0 to 3 s, each .43 s later
    assert positions(np.array([0.0, 1.0, 3.0]), 1.0, 4.0, 4).tolist() == [0, 0, 1, 1, 1, 1, 2, 2]


def test_fit_crops_the_middle_in_space_and_time():
    frames = np.zeros((12, 4, 8, 3), np.uint8)
    frames[:, :, 2:6] = (
        np.arange(12)[:, None, None, None] * 10
    )  # the middle square, brighter frame by frame
    clip = video.fit(frames, 8, 2)
    assert clip.shape == (3, 8, 2, 2)
    assert clip[0, :, 0, 0].tolist() == [20, 30, 40, 50, 60, 70, 80, 90]  # frames 2 to 9
    short = video.fit(frames[:3], 5, 2)
    assert short[0, :, 1, 1].tolist() == [
        0,
        0,
        10,
        20,
        20,
    ]  # 0, 0.5, 1, 1.5 and 2, of two the even one
    wide = video.fit(frames[:1] + np.arange(8, dtype=np.uint8)[:, None], 1, 2, 4)
    assert wide[0, 0].tolist() == [
        [0, 2, 4, 6],
        [0, 2, 4, 6],
    ]  # means of 0 1, 2 3, 4 5 and 6 7, to even


def test_export_and_load_give_the_pairs_back(exported):
    for offset, (name, split) in enumerate(export_toy.SPLITS.items()):
        made = annotated_pairs(
            10 if name == "train" else 2, [split], 3 + 10 * offset, CONFIG, Vocabulary()
        )
        path = exported / f"{name}.csv"
        rows = read_pairs(path)
        read = load(path, rows)
        assert torch.equal(read.label, made.label)
        words, generators = (
            Vocabulary().words,
            [[world.GENERATORS[g] for g in pair] for pair in made.models.tolist()],
        )
        assert [[path[:-4].rpartition("_")[2] for path in row.paths] for row in rows] == generators
        assert {
            imageio.get_reader(exported / row.path_a).get_meta_data()["fps"] for row in rows
        } == {rows[0].fps_a}
        assert [row.prompt for row in rows] == [
            " ".join(words[i] for i in y if i) for y in made.y.tolist()
        ]
        with open(path, newline="") as file:
            header = next(csv.reader(file))
        if name == "benchmark":
            names = [tuple(world.GENERATORS[g] for g in pair) for pair in made.models.tolist()]
            assert [row.models for row in rows] == names and torch.equal(read.overall, made.overall)
            assert header == [*data_columns(), "A_model", "B_model", "Overall"]
        else:
            assert torch.allclose(read.mos, made.mos, atol=1e-4)
            ratings = [
                f"MOS_{side}_{dimension}" for side in "AB" for dimension in ("VQ", "MQ", "TA")
            ]
            assert header == [*data_columns(), *ratings]
        # what mp4 costs: pixels by .007 on average, true scores by .04 at most (a sharp object of a strong colour: mp4
        # keeps a quarter of the colours, and since the objects grew there is twice as much colour)
        index = torch.arange(len(rows))
        for seen, real in zip(read.sides(index), made.sides(index)):
            assert (seen - real).abs().mean() < 0.012
            prompts = [row.prompt for row in rows]
            assert (world.oracle(seen, prompts) - world.oracle(real, prompts)).abs().max() < 0.05


def data_columns():
    first = ["path_A", "path_B", "prompt", "VQ", "MQ", "TA"]
    return [*first, "fps_A", "num_frames_A", "fps_B", "num_frames_B"]


def test_prompts_of_the_splits_do_not_meet(exported):
    splits = (
        {row.prompt for row in read_pairs(exported / f"{name}.csv")} for name in export_toy.SPLITS
    )
    train_prompts, *others = splits
    assert not any(train_prompts & other for other in others)


def test_an_export_never_touches_what_is_there(exported, tmp_path):
    with pytest.raises(BadInput, match="is there already"):
        export(exported, "--pairs=2")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(BadInput, match="cannot write"):
        export(tmp_path / "file" / "toy", "--pairs=1")
    assert (tmp_path / "file").read_text() == "kept"


def test_writing_keeps_quotes_commas_and_lines(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).touch()
    numbers = 24.0, 126.0, 30.0, 1.5
    pair = Pair(
        "a", "b", 'say "hi", then\nleave', (1, INVALID, 0), *numbers, models=("m", "n"), overall=-1
    )
    write_pairs([pair, replace(pair, prompt="second")], tmp_path / "x.csv")
    read = read_pairs(tmp_path / "x.csv")
    assert read == [pair, replace(pair, prompt="second")] and [p.line for p in read] == [2, 4]


def test_a_vocabulary_of_real_prompts():
    vocabulary = vocabulary_of(["The cat's hat, the dog.", "the cat"])
    assert vocabulary.words[:3] == ["<pad>", "<unk>", "the"]
    y = vocabulary.encode(["The bird!", "the cat's hat the dog the hat"], 4)
    assert (
        y[0].tolist() == [2, 1, 0, 0] and y.shape == (2, 4) and y[1, 0] == 2
    )  # long prompts are cut
    assert len(vocabulary_of(["a b c d e"], most=4).words) == 4


def test_decoding_is_kept_and_a_changed_video_is_read_again(rows, tmp_path):
    path = tmp_path / "a.mp4"
    first = video.cached_clip(path, tmp_path / "cache", 8, 32)
    (cached,) = (tmp_path / "cache").iterdir()
    np.savez(cached, clip=np.zeros((3, 8, 32, 32), np.uint8))
    assert video.cached_clip(path, tmp_path / "cache", 8, 32).max() == 0  # from the cache
    imageio.mimwrite(
        path, [np.full((32, 32, 3), 200, np.uint8)] * 8, format="FFMPEG", fps=2, macro_block_size=1
    )
    assert (video.cached_clip(path, tmp_path / "cache", 8, 32).float() - 200).abs().max() < 5
    assert first.shape == (3, 8, 32, 32)


def spoil(column, value):
    def change(rows, folder):
        rows[1][column] = value

    return change


def drop_column(rows, folder):
    for row in rows:
        del row["MQ"]


def short_video(count):
    def change(rows, folder):
        frames = [np.zeros((32, 32, 3), np.uint8)] * count
        imageio.mimwrite(folder / "c.mp4", frames, format="FFMPEG", fps=2, macro_block_size=1)
        rows[1]["path_B"] = "c.mp4"

    return change


def truncated(rows, folder):
    (folder / "c.mp4").write_bytes((folder / "a.mp4").read_bytes()[:2000])
    rows[1]["path_B"] = "c.mp4"


def cut_off(rows, folder):
    """Its index stands at the start, so what is left of it decodes without an error."""
    frames = [
        np.full((32, 32, 3), 5 * i, np.uint8) + np.arange(32, dtype=np.uint8)[:, None]
        for i in range(40)
    ]
    flags = {
        "format": "FFMPEG",
        "macro_block_size": 1,
        "output_params": ["-movflags", "+faststart"],
    }
    imageio.mimwrite(folder / "c.mp4", frames, fps=8, **flags)
    whole = (folder / "c.mp4").read_bytes()
    (folder / "c.mp4").write_bytes(whole[: len(whole) * 3 // 4])
    rows[1] |= {"path_B": "c.mp4", "fps_B": "8.0", "num_frames_B": "40.0"}


def empty_video(rows, folder):
    (folder / "c.mp4").touch()
    rows[1]["path_B"] = "c.mp4"


def extra_field(rows, folder):
    rows[1]["more"] = "x"


FAULTS = [
    (drop_column, "line 1, column MQ: is missing"),
    (spoil("TA", "C"), "line 3, column TA: unknown label 'C'; known: A, B, same, tie, invalid"),
    (
        spoil("path_A", "../a.mp4"),
        "line 3, column path_A: path '../a.mp4' does not lie in the data folder",
    ),
    (spoil("path_A", "/etc/hosts"), "line 3, column path_A: path '/etc/hosts' does not lie in"),
    (
        spoil("path_A", "a\0.mp4"),
        "line 3, column path_A: 'a\\x00.mp4' is no path (embedded null byte)",
    ),
    (
        spoil("path_A", "a" * 5000),
        "line 3, column path_A: 'aaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaaa' is no path",
    ),
    (spoil("path_B", "none.mp4"), "line 3, column path_B: no video 'none.mp4'"),
    (spoil("prompt", " ... "), "line 3, column prompt: '...' has no words"),
    (spoil("fps_A", "fast"), "line 3, column fps_A: 'fast' is no number"),
    (spoil("num_frames_B", "nan"), "line 3, column num_frames_B: 'nan' is no number"),
    (
        spoil("path_A", "videos/../../a.mp4"),
        "line 3, column path_A: path 'videos/../../a.mp4' does not lie in",
    ),
    (spoil("path_B", "a.mp4"), "line 3, column path_B: 'a.mp4' is the clip of path_A"),
    (spoil("prompt", "NaN"), "line 3, column prompt: 'NaN' stands for an empty cell"),
    (extra_field, "line 3, column num_frames_B: the row has 11 fields, the header 10"),
    (truncated, "line 3, column path_B: video c.mp4 cannot be decoded"),
    (cut_off, "line 3, column path_B: video c.mp4 is damaged after frame "),
    (empty_video, "line 3, column path_B: video c.mp4 cannot be decoded"),
    (short_video(1), "line 3, column path_B: video c.mp4 has 1 frame"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[message[:30] for _, message in FAULTS])
def test_faults_name_line_and_column_and_can_be_skipped(change, message, rows, tmp_path):
    change(rows, tmp_path)
    path = write(rows, tmp_path / "x.csv")
    with pytest.raises(BadInput) as fault:
        load(path, read_pairs(path))
    assert (
        message in str(fault.value)
        and str(path) in str(fault.value)
        and "\n" not in str(fault.value)
    )
    if "line 3" in message:
        skipped = []
        pairs = load(path, read_pairs(path, skipped), skipped)
        assert len(pairs) == 2 and len(skipped) == 1 and message in skipped[0]


def test_faults_of_a_whole_file(rows, tmp_path):
    header = [name.replace("MQ", "VQ") for name in rows[0]]
    with pytest.raises(BadInput, match="line 1, column VQ: stands there twice"):
        read_pairs(write(rows, tmp_path / "x.csv", header))
    with pytest.raises(BadInput, match="has no header; line 1 must name the columns path_A"):
        read_pairs(write(rows[1:], tmp_path / "x.csv", header=list(rows[0].values())))
    rows[1]["prompt"] = "naïve café"
    with pytest.raises(BadInput, match="line 3, column prompt: byte 0xef is not UTF-8"):
        read_pairs(write(rows, tmp_path / "x.csv", encoding="latin-1"))
    with pytest.raises(BadInput, match="line 1, column 1: byte 0xff is not UTF-8"):
        read_pairs(write(rows, tmp_path / "x.csv", encoding="utf-16"))
    assert (
        read_pairs(write(rows, tmp_path / "x.csv", encoding="utf-8-sig"))[1].prompt == "naïve café"
    )
    with pytest.raises(BadInput, match="holds no pair"):
        read_pairs(write([], tmp_path / "x.csv", header=list(rows[0])))
    with pytest.raises(BadInput, match="cannot be read"):
        read_pairs(tmp_path / "none.csv")
    rows[0]["TA"] = rows[1]["TA"] = rows[2]["TA"] = "?"
    with pytest.raises(BadInput, match="holds no pair; the first fault: .*line 2, column TA"):
        read_pairs(write(rows, tmp_path / "x.csv"), [])


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_and_blank_lines(separator, rows, tmp_path):
    path = tmp_path / "x.csv"
    lines = [separator.join(rows[0])]
    for prompt in ("one", '"two, 2; three"'):
        lines += [separator.join((rows[0] | {"prompt": prompt}).values()), "", separator * 9, "  "]
    path.write_text("\n".join(lines) + "\n\n")
    assert [(pair.prompt, pair.line) for pair in read_pairs(path)] == [
        ("one", 2),
        ("two, 2; three", 6),
    ]


def test_links_of_a_hub_client_are_followed_as_they_are_written(rows, tmp_path):
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "abc"
    blobs.mkdir()
    (snapshot / "videos").mkdir(parents=True)
    for name in "ab":
        (tmp_path / f"{name}.mp4").rename(blobs / name)
        (snapshot / "videos" / f"{name}.mp4").symlink_to(f"../../../blobs/{name}")
    for row in rows:
        row |= {"path_A": "videos/a.mp4", "path_B": "videos/../videos/b.mp4"}
    write(rows, blobs / "c")
    path = snapshot / "pairs.csv"
    path.symlink_to("../../blobs/c")
    assert len(load(path, read_pairs(path))) == 3
    read = read_pairs(write(rows, tmp_path / "elsewhere.csv"), folder=snapshot)
    assert [pair.paths for pair in read] == [("videos/a.mp4", "videos/b.mp4")] * 3
    (snapshot / "again.mp4").symlink_to("videos/a.mp4")
    rows[0] |= {"path_A": "videos/a.mp4", "path_B": "again.mp4"}
    with pytest.raises(BadInput, match="line 2, column path_B: 'again.mp4' is the clip of path_A"):
        read_pairs(write(rows, path))


def test_prompts_are_held_out_whatever_their_case_punctuation_and_spaces(rows):
    prompts = ["A cat, running", "a cat  running!", "The sea.", "the sea", "THE SEA", "a dog"]
    pairs = [Pair("a", "b", prompt, (1, 1, 1), 2, 8, 2, 8) for prompt in prompts]
    sides = set()
    for seed in range(20):
        train_side, held = ({row.prompt for row in side} for side in hold_out(pairs, seed))
        assert not train_side & held and train_side | held == set(prompts)
        sides.add(frozenset(held))
    assert sides == {frozenset(prompts[:2]), frozenset(prompts[2:5]), frozenset(prompts[5:])}


def test_a_bad_video_leaves_nothing_half_written(rows, tmp_path):
    truncated(rows, tmp_path)
    path = write(rows, tmp_path / "x.csv")
    with pytest.raises(BadInput):
        load(path, read_pairs(path))
    assert {file.suffix for file in (tmp_path / "cache").glob("*")} <= {".npz"}
    with pytest.raises(BadInput, match="all were skipped"):
        load(path, read_pairs(path)[1:2], [])


def test_training_on_disk_data_ends_with_what_was_skipped(
    rows, tmp_path, exported, capsys, monkeypatch
):
    spoil("VQ", "?")(rows, tmp_path)
    rows.append(rows[0] | {"TA": "??"})
    path = write(rows, tmp_path / "x.csv")
    flags = [
        "--algo",
        "reward",
        "--data",
        path,
        "--val",
        path,
        "--skip-bad",
        "--steps",
        "1",
        "--batch",
        "2",
    ]
    flags += ["--device", "cpu", "--cache", tmp_path / "cache"]
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags), "--out", str(tmp_path / "run")])
    train.main()
    out = capsys.readouterr().out
    assert "line 3, column VQ" in out and "line 5, column TA" in out
    assert (
        "validation prompts: 0.0% of the words unknown, 0 cut to 3 words; 1 of 1 are also in training"
        in out
    )
    # two clips have no spread to speak of: the checkpoint is there, and nothing takes its z-scores
    assert "z-scores stand on 2 distinct clips; at least 8 are needed" in out
    with pytest.raises(BadInput, match="std.*more clips to validate on"):
        load_reward(tmp_path / "run" / "last.pt")
    ratings = ["--algo", "reward", "--data", exported / "benchmark.csv", "--loss", "regression"]
    monkeypatch.setattr(
        sys, "argv", ["train.py", *map(str, ratings), "--out", str(tmp_path / "run2")]
    )
    with pytest.raises(BadInput, match="needs ratings"):
        train.main()
