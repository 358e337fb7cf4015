"""Pairs on disk: the CSV format, every fault by file, line and column, and what is trained on."""

import csv
from dataclasses import replace
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from frames import sample_frames

import train
import world
from data import INVALID, Vocabulary, vocabulary_of
from model import ModelConfig
from real_data import export_toy, video
from real_data.dataset import disk_prompts, hold_out, pairs_of
from real_data.pairs_csv import COLUMNS, Pair, read_pairs, usable_rows, write_pairs
from real_data.toy_pairs import annotated_pairs
from reward import load_reward
from runtime.cli import BadInput
from settings import Data

EXAMPLE = Path(__file__).parent.parent.parent / "shared/data/videoalign_example/example.csv"
CONFIG = ModelConfig()
CELLS = ("a.mp4", "./b.mp4", "A cat, running!", "A", "B", "same", "2.0", "8.0", "2.0", "8.0")
ROW = dict(zip(COLUMNS, CELLS))


def export(folder, *flags):
    return export_toy.export(export_toy.arguments([str(folder), "--generated=0", *flags]))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("export") / "toy"
    export(folder, "--pairs=10", "--seed=3")
    return folder


@pytest.fixture
def folder(tmp_path):
    """A folder with files a.mp4 and b.mp4, which are empty."""
    for name in ("a.mp4", "b.mp4"):
        (tmp_path / name).touch()
    return tmp_path


def write(rows, path, header=None, encoding="utf-8"):
    with open(path, "w", newline="", encoding=encoding) as file:
        writer = csv.writer(file)
        writer.writerow(header or rows[0])
        writer.writerows(row.values() for row in rows)
    return path


def load(path, rows, skipped=None):
    vocabulary = vocabulary_of([row.prompt for row in rows])
    config, settings = replace(CONFIG, vocab=len(vocabulary.words)), Data(cache=path.parent / "c")
    rows, _ = usable_rows(rows, path, config, settings, skipped)
    return pairs_of(rows, path, config, vocabulary, settings)


# ---------------------------------------------------------------------------------------------
# The format

FAULTS = [
    ({"TA": "C"}, "TA: unknown label 'C'; known: A, B, same, tie, invalid"),
    ({"path_A": "../a.mp4"}, "path_A: path '../a.mp4' does not lie in the data folder"),
    ({"path_A": "/etc/hosts"}, "path_A: path '/etc/hosts' does not lie in the data folder"),
    ({"path_A": "v/../../a.mp4"}, "path_A: path 'v/../../a.mp4' does not lie in the data folder"),
    ({"path_A": "a\0.mp4"}, "path_A: no video 'a\\x00.mp4' in"),
    ({"path_A": "a" * 5000}, "path_A: no video 'aaaa"),
    ({"path_A": ""}, "path_A: no video '' in"),
    ({"path_B": "none.mp4"}, "path_B: no video 'none.mp4' in"),
    ({"path_B": "a.mp4"}, "path_B: 'a.mp4' is the clip of path_A"),
    ({"prompt": " ... "}, "prompt: '...' has no words"),
    ({"prompt": "NaN"}, "prompt: 'NaN' stands for an empty cell"),
    ({"VQ": ""}, "VQ: unknown label ''"),
    ({"fps_A": "fast"}, "fps_A: 'fast' is no number from 0.001 to 1e+06"),
    ({"fps_A": "0"}, "fps_A: '0' is no number"),
    ({"num_frames_B": "nan"}, "num_frames_B: 'nan' is no number"),
    ({"more": "x"}, "num_frames_B: the row has 11 fields, the header 10"),
]


@pytest.mark.parametrize(("change", "message"), FAULTS, ids=[text[:30] for _, text in FAULTS])
def test_a_fault_of_a_row_names_line_and_column_and_can_be_skipped(change, message, folder):
    path = write([ROW, ROW | change, ROW], folder / "x.csv")
    with pytest.raises(BadInput) as fault:
        read_pairs(path)
    assert str(fault.value).startswith(f"{path}, line 3, column {message}")
    assert "\n" not in str(fault.value)
    skipped = []
    assert [pair.line for pair in read_pairs(path, skipped)] == [2, 4]
    assert [str(text) for text in skipped] == [str(fault.value)]


def test_faults_of_a_whole_file(folder):
    path = folder / "x.csv"
    odd = ROW | {"prompt": "naïve café"}
    twice = [name.replace("fps_B", "x").replace("num_frames_B", "x") for name in ROW]
    for rows, header, encoding, message in (
        (
            [ROW],
            [name.replace("MQ", "X") for name in ROW],
            "utf-8",
            "line 1, column MQ: is missing",
        ),
        (
            [ROW | {"x": 1, "X": 2}],
            [*ROW, "x", "x"],
            "utf-8",
            "line 1, column x: stands there twice",
        ),
        ([ROW], twice, "utf-8", "line 1, column fps_B: is missing"),
        ([ROW], CELLS, "utf-8", "has no header; line 1 must name the columns path_A"),
        ([ROW, odd], None, "latin-1", "line 3, column prompt: byte 0xef is not UTF-8"),
        ([ROW], None, "utf-16", "line 1, column 1: byte 0xff is not UTF-8"),
        ([], list(ROW), "utf-8", "holds no pair"),
    ):
        with pytest.raises(BadInput, match=message):
            read_pairs(write(rows, path, header, encoding))
    with pytest.raises(BadInput, match="cannot be read"):
        read_pairs(folder / "none.csv")
    path.write_text(f'{",".join(ROW)}\na.mp4,"b.mp4\n')
    with pytest.raises(BadInput, match="x.csv, line [23]: not a CSV row"):
        read_pairs(path)
    with pytest.raises(BadInput, match="holds no pair; the first fault: .*line 2, column TA"):
        read_pairs(write([ROW | {"TA": "?"}], path), [])
    assert read_pairs(write([odd], path, encoding="utf-8-sig"))[0].prompt == "naïve café"


@pytest.mark.parametrize("separator", [",", ";", "\t"])
def test_separators_and_blank_lines(separator, folder):
    lines = [separator.join(ROW)]
    for prompt in ("one", '"two, 2; three"'):
        lines += [separator.join((ROW | {"prompt": prompt}).values()), "", separator * 9, "  "]
    (folder / "x.csv").write_text("\n".join(lines) + "\n\n")
    pairs = read_pairs(folder / "x.csv")
    assert [(pair.prompt, pair.line) for pair in pairs] == [("one", 2), ("two, 2; three", 6)]


def test_a_row_is_read_as_it_stands_and_written_back_the_same(folder):
    ratings = {f"MOS_{side}_{name}": "0" for side in "AB" for name in ("VQ", "MQ", "TA")}
    ratings |= {"MOS_A_VQ": "2.5", "MOS_B_TA": "5", "MOS_B_VQ": ""}
    labels = {"VQ": "TIE", "MQ": "Invalid", "TA": "b"}
    row = ROW | labels | {"prompt": 'say "hi", then\nleave'} | ratings | {"source": "ours"}
    read = read_pairs(write([row, row], folder / "x.csv"))
    numbers = 2.0, 8.0, 2.0, 8.0
    mos = (2.5, 0, 0, 0, 0, 5)
    pair = Pair(
        "a.mp4", "./b.mp4", row["prompt"], (0, INVALID, -1), *numbers, mos, {"source": "ours"}
    )
    assert read == [pair, pair] and [p.line for p in read] == [2, 4]
    write_pairs(read, folder / "y.csv")
    assert read_pairs(folder / "y.csv") == read
    with open(folder / "y.csv", newline="") as file:
        assert next(csv.reader(file)) == list(row)
    with pytest.raises(BadInput, match="MOS_A_MQ: '0.5' is no number from 1 to 5"):
        read_pairs(write([row | {"MOS_A_MQ": "0.5"}], folder / "x.csv"))
    path = write([ROW | {"MQ": ""}], folder / "x.csv")
    assert read_pairs(path, unlabelled=True)[0].label == (1, None, 0)


def test_links_of_a_hub_client_are_followed_as_they_are_written(folder):
    blobs, snapshot = folder / "blobs", folder / "snapshots" / "abc"
    blobs.mkdir()
    (snapshot / "videos").mkdir(parents=True)
    for name in "ab":
        (folder / f"{name}.mp4").rename(blobs / name)
        (snapshot / "videos" / f"{name}.mp4").symlink_to(f"../../../blobs/{name}")
    row = ROW | {"path_A": "videos/a.mp4", "path_B": "videos/../videos/b.mp4"}
    write([row], blobs / "c")
    path = snapshot / "pairs.csv"
    path.symlink_to("../../blobs/c")
    for read in (read_pairs(path), read_pairs(write([row], folder / "x.csv"), folder=snapshot)):
        assert [pair.paths for pair in read] == [("videos/a.mp4", "videos/b.mp4")]
    (snapshot / "again.mp4").symlink_to("videos/a.mp4")
    with pytest.raises(BadInput, match="line 2, column path_B: 'again.mp4' is the clip of path_A"):
        read_pairs(write([row | {"path_B": "again.mp4"}], path))


# ---------------------------------------------------------------------------------------------
# Training data


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the three public example pairs are not here")
def test_the_public_example_pairs(tmp_path, monkeypatch, capsys):
    pairs = read_pairs(EXAMPLE)
    assert len(pairs) == 12 and [pair.label for pair in pairs[:2]] == [(-1, -1, 1), (0, 0, 1)]
    paths = dict.fromkeys(path for pair in pairs[:3] for path in pair.paths)
    # 126 frames at 24 fps are 5.25 s, 10.5 frames at 2 fps, so 10; 152/30 -> 10.1; 144/24 -> 12;
    # 128/24 -> 10.7; 60/16 -> 7.5, so 8
    counts = [len(sample_frames(EXAMPLE.parent / path)) for path in paths]
    assert counts == [10, 10, 12, 10, 10, 8]
    flags = ["--algo=reward", "--steps=2", "--batch=2", "--device=cpu", f"--data={EXAMPLE}"]
    flags += [f"--cache={tmp_path / 'cache'}", f"--out={tmp_path / 'run'}"]
    monkeypatch.setattr("sys.argv", ["train.py", *flags])
    train.main()
    assert "pairs of prompts held out" in capsys.readouterr().out
    assert len(list((tmp_path / "cache").glob("*.npz"))) == 6  # each video once, 12 rows or not


def test_an_export_gives_the_pairs_back(exported):
    prompts = {}
    for offset, (name, split) in enumerate(export_toy.SPLITS.items()):
        count = 10 if name == "train" else 2
        made = annotated_pairs(count, [split], 3 + 10 * offset, CONFIG, Vocabulary())
        path = exported / f"{name}.csv"
        rows = read_pairs(path)
        read = load(path, rows)
        assert torch.equal(read.label, made.label)
        generators = [[world.GENERATORS[g] for g in pair] for pair in made.models.tolist()]
        assert [[path[:-4].rpartition("_")[2] for path in row.paths] for row in rows] == generators
        rate = imageio.get_reader(exported / rows[0].path_a).get_meta_data()["fps"]
        assert rate == rows[0].fps_a == 2
        prompts[name] = [row.prompt for row in rows]
        assert prompts[name] == [Vocabulary().decode(y) for y in made.y.tolist()]
        if name == "benchmark":
            values = {"A": 1, "B": -1, "same": 0}
            others = [(row.other["A_model"], row.other["B_model"]) for row in rows]
            assert others == [tuple(pair) for pair in generators]
            assert [values[row.other["Overall"]] for row in rows] == made.overall.tolist()
        else:
            assert torch.allclose(read.mos, made.mos, atol=1e-4)
        # mp4 keeps a quarter of the colours
        index = torch.arange(len(rows))
        for seen, real in zip(read.sides(index), made.sides(index)):
            assert (seen - real).abs().mean() < 0.012
            scores = world.oracle(seen, prompts[name]) - world.oracle(real, prompts[name])
            assert scores.abs().max() < 0.05
    train_prompts, *others = map(set, prompts.values())
    assert not any(train_prompts & other for other in others)


def test_an_export_never_touches_what_is_there(exported, tmp_path):
    with pytest.raises(BadInput, match="is there already"):
        export(exported, "--pairs=2")
    (tmp_path / "file").write_text("kept")
    with pytest.raises(BadInput, match="cannot write"):
        export(tmp_path / "file" / "toy", "--pairs=1")
    assert (tmp_path / "file").read_text() == "kept"


def test_a_vocabulary_of_real_prompts():
    vocabulary = vocabulary_of(["The cat's hat, the dog.", "the cat"])
    assert vocabulary.words[:3] == ["<pad>", "<unk>", "the"]
    y = vocabulary.encode(["The bird!", "the cat's hat the dog the hat"], 4)
    assert y.shape == (2, 4) and y[0].tolist() == [2, 1, 0, 0] and y[1, 0] == 2  # cut to 4 words
    assert len(vocabulary_of(["a b c d e"], most=4).words) == 4


def test_prompts_are_held_out_whatever_their_case_punctuation_and_spaces():
    prompts = ["A cat, running", "a cat  running!", "The sea.", "the sea", "THE SEA", "a dog"]
    pairs = [Pair("a", "b", prompt, (1, 1, 1), 2, 8, 2, 8) for prompt in prompts]
    sides = set()
    for seed in range(20):
        train_side, held = ({row.prompt for row in side} for side in hold_out(pairs, seed))
        assert not train_side & held and train_side | held == set(prompts)
        sides.add(frozenset(held))
    assert sides == {frozenset(prompts[:2]), frozenset(prompts[2:5]), frozenset(prompts[5:])}
    assert hold_out(pairs[2:5], 0) == (pairs[2:5], pairs[2:5])


def test_prompts_that_a_model_reads_alike_are_one(folder):
    rows = [ROW | {"prompt": text} for text in ("a cat", "a dog", "A CAT!", "a bird")]
    vocabulary = vocabulary_of(["a cat", "a dog"])
    texts, y = disk_prompts(Data(data=write(rows, folder / "x.csv")), vocabulary, 4)
    ids = [[vocabulary.ids[word] for word in text] for text in (["a", "cat"], ["a", "dog"])]
    ids.append([vocabulary.ids["a"], 1])  # a bird is unknown
    assert sorted(y.tolist()) == sorted([*each, 0, 0] for each in ids)
    for text, row in zip(texts, y):
        assert vocabulary.encode([text], 4)[0].tolist() == row.tolist()


def test_decoding_is_cached_and_a_changed_video_is_read_again(exported, tmp_path):
    path = tmp_path / "a.mp4"
    path.write_bytes(next((exported / "videos" / "train").glob("*.mp4")).read_bytes())
    first = video.cached_clip(path, tmp_path / "cache", 8, 32)
    (cached,) = (tmp_path / "cache").iterdir()
    np.savez(cached, clip=np.zeros((3, 8, 32, 32), np.uint8))
    assert video.cached_clip(path, tmp_path / "cache", 8, 32).max() == 0
    frames = [np.full((32, 32, 3), 200, np.uint8)] * 8
    imageio.mimwrite(path, frames, format="FFMPEG", fps=2, macro_block_size=1)
    assert (video.cached_clip(path, tmp_path / "cache", 8, 32).float() - 200).abs().max() < 5
    assert first.shape == (3, 8, 32, 32)


def test_training_lists_what_it_skips(exported, tmp_path, capsys, monkeypatch):
    (tmp_path / "videos").symlink_to(exported / "videos")
    (tmp_path / "empty.mp4").touch()
    paths = read_pairs(exported / "train.csv")[0].paths
    row = ROW | dict(zip(COLUMNS, paths))
    bad = [row | {"VQ": "?"}, row | {"path_B": "empty.mp4"}, row | {"TA": "??"}]
    path = write([row, *bad, row], tmp_path / "x.csv")

    def run(*flags):
        shared = ["--algo=reward", "--steps=1", "--batch=2", "--device=cpu"]
        shared += [f"--cache={tmp_path / 'cache'}", f"--out={tmp_path / 'run'}"]
        monkeypatch.setattr("sys.argv", ["train.py", *shared, *flags])
        train.main()
        return capsys.readouterr().out

    out = run(f"--data={path}", f"--val={path}", "--skip-bad")
    faults = ("line 3, column VQ", "line 4, column path_B: video empty.mp4", "line 5, column TA")
    assert "skipped 6 rows" in out and all(out.count(fault) == 2 for fault in faults)
    assert "validation prompts: 0.0% of the words unknown, 0 cut to 3 words; 1 of 1 are also" in out
    # two clips are too few: the checkpoint is there, and nothing accepts its z-scores
    assert "z-scores stand on 2 distinct clips; at least 8 are needed" in out
    with pytest.raises(BadInput, match="std.*more clips to validate"):
        load_reward(tmp_path / "run" / "last.pt")
    with pytest.raises(BadInput, match="no pair is left, all were skipped; the first: .*line 4"):
        load(path, read_pairs(path, [])[1:2], [])
    assert {file.suffix for file in (tmp_path / "c").glob("*")} <= {".npz"}  # nothing half written
    benchmark = exported / "benchmark.csv"
    with pytest.raises(BadInput, match="--loss regression needs ratings"):
        run(f"--data={benchmark}", "--loss=regression", f"--out={tmp_path / 'run2'}")
