"""Pairs on disk: the CSV format, every fault by file, line and column, and what is trained on."""

import csv
import re
from pathlib import Path

import imageio.v2 as imageio
import pytest
import torch

import train
import world
from data import INVALID, Vocabulary, vocabulary_of
from examples import toy_latents
from model import ModelConfig
from real_data import export_toy, toy_pairs, video
from real_data.dataset import disk_prompts, hold_out, pairs_of, usable_rows
from real_data.pairs_csv import COLUMNS, Pair, read_pairs, write_pairs
from reward import load_reward
from runtime.cli import BadInput
from settings import Data

EXAMPLE = Path(__file__).parent.parent.parent / "shared/data/videoalign_example/example.csv"
CONFIG = ModelConfig()
CELLS = ("a.mp4", "./b.mp4", "A cat, running!", "A", "B", "same", "2.0", "8.0", "2.0", "8.0")
ROW = dict(zip(COLUMNS, CELLS))


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


FAULTS = [
    ({"TA": "C"}, "TA: unknown label 'C'; known: A, B, same, tie, invalid"),
    ({"path_A": "v/../../a.mp4"}, "path_A: path 'v/../../a.mp4' does not lie in the data folder"),
    ({"path_A": "a\0.mp4"}, "path_A: no video 'a\\x00.mp4' in"),
    ({"path_A": ""}, "path_A: no video '' in"),
    ({"path_B": "./a.mp4"}, "path_B: 'a.mp4' is the clip of path_A"),
    ({"prompt": " ... "}, "prompt: '...' has no words"),
    ({"prompt": "NaN"}, "prompt: 'NaN' stands for an empty cell"),
    ({"fps_A": "fast"}, "fps_A: 'fast' is no number from 0.001 to 1e+06"),
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
    path, odd = folder / "x.csv", ROW | {"prompt": "naïve café"}
    no_mq, twice = [name.replace("MQ", "X") for name in ROW], [*ROW, "x", "x"]
    cases = [  # rows, header, encoding, message
        ([ROW], no_mq, "utf-8", "line 1 must name the columns path_A, .*; missing: MQ$"),
        ([ROW | {"x": 1, "X": 2}], twice, "utf-8", "line 1, column x: occurs twice"),
        ([ROW, odd], None, "latin-1", "line 3: byte 0xef is not UTF-8; save the file as UTF-8"),
        ([], list(ROW), "utf-8", "holds no pair"),
    ]
    for rows, header, encoding, message in cases:
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
    rest = (0, INVALID, -1), 2.0, 8.0, 2.0, 8.0, (2.5, 0, 0, 0, 0, 5), {"source": "ours"}
    pair = Pair("a.mp4", "b.mp4", row["prompt"], *rest)
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


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """(folder, what the command prints)."""
    folder = tmp_path_factory.mktemp("export") / "toy"
    args = [str(folder), "--pairs=10", "--seed=3", "--generated=0"]
    return folder, export_toy.export(export_toy.arguments(args))


def test_an_export_gives_the_pairs_back(exported, tmp_path):
    folder, lines = exported
    vocabulary = Vocabulary()
    for offset, (name, split) in enumerate(export_toy.SPLITS.items()):
        count = 10 if name == "train" else 2
        pairs = toy_pairs.annotated_pairs(count, [split], 3 + 10 * offset, CONFIG, vocabulary)
        path = folder / f"{name}.csv"
        rows, _ = usable_rows(read_pairs(path), path, CONFIG, Data(cache=tmp_path))
        read = pairs_of(rows, path, CONFIG, vocabulary, Data(cache=tmp_path))
        assert torch.equal(read.label, pairs.label)
        generators = [[world.GENERATORS[g] for g in pair] for pair in pairs.models.tolist()]
        assert [[path[:-4].rpartition("_")[2] for path in row.paths] for row in rows] == generators
        rate = imageio.get_reader(folder / rows[0].path_a).get_meta_data()["fps"]
        assert rate == rows[0].fps_a == 2
        prompts = [row.prompt for row in rows]
        assert prompts == [vocabulary.decode(y) for y in pairs.y.tolist()]
        if name == "benchmark":
            values = {"A": 1, "B": -1, "same": 0}
            assert [[row.other["A_model"], row.other["B_model"]] for row in rows] == generators
            assert [values[row.other["Overall"]] for row in rows] == pairs.overall.tolist()
        else:
            assert torch.allclose(read.mos, pairs.mos, atol=1e-4)
        # mp4 keeps a quarter of the colours
        index = torch.arange(len(rows))
        for seen, real in zip(read.sides(index), pairs.sides(index)):
            assert (seen - real).abs().mean() < 0.012
            scores = world.oracle(seen, prompts) - world.oracle(real, prompts)
            assert scores.abs().max() < 0.05
        table = "\n".join(lines[lines.index(f"## {name}: {count} pairs") :])
        ties = (pairs.label[:, 0] == 0).float().mean()
        assert re.search(rf"^\| VQ \| [^|]* \| {ties:.3f} ", table, re.M)
        rated = pairs.models.flatten() == pairs.models[0, 0]
        mean = pairs.mos.flatten(0, 1)[rated].mean(0)
        cells = [generators[0][0], str(rated.sum().item()), *(f"{value:.2f}" for value in mean)]
        assert f"| {' | '.join(cells)} |" in table


def test_an_export_has_clips_of_the_base_model_and_touches_nothing_that_is_there(
    tmp_path, monkeypatch
):
    monkeypatch.setattr(toy_pairs, "sample_many", lambda model, x1, y, progress, **settings: x1)
    toy, cache = tmp_path / "toy", f"--cache={tmp_path / 'c'}"
    args = export_toy.arguments([str(toy), "--pairs=2", "--generated=0.5", cache])
    export_toy.export(args)
    rows = read_pairs(toy / "train.csv")
    models = [{path.rpartition("_")[2][: -len(".mp4")] for path in row.paths} for row in rows]
    assert [pair <= set(world.GENERATORS) for pair in models] == [True, False]
    assert models[1] <= set(toy_pairs.MODELS)
    before = {path: path.read_bytes() for path in toy.glob("*.csv")}
    with pytest.raises(BadInput, match="exists already"):
        export_toy.export(args)
    assert {path: path.read_bytes() for path in toy.glob("*.csv")} == before
    args.folder = toy / "train.csv" / "toy"
    with pytest.raises(BadInput, match="cannot write"):
        export_toy.export(args)


def test_toy_latents_are_the_pairs_that_their_csv_names(tmp_path, monkeypatch):
    for seed in (0, 1):
        out = tmp_path / str(seed)
        flags = [str(out), "--pairs=6", f"--seed={seed}"]
        monkeypatch.setattr("sys.argv", ["toy_latents.py", *flags])
        toy_latents.main()
        pairs = toy_pairs.annotated_pairs(6, ["train"], seed, ModelConfig(), Vocabulary())
        clips = torch.stack(pairs.sides(torch.arange(6)), 1)
        mean, std = clips.mean(), clips.std()
        for i, row in enumerate(read_pairs(out / "pairs.csv")):
            assert row.prompt == Vocabulary().decode(pairs.y[i])
            assert list(row.label) == pairs.label[i].tolist() and INVALID not in row.label
            for clip, path in zip(clips[i], row.paths):
                latent = torch.tensor(video.read_latent(out / path))
                squares = ((0, 0, 0), (1, 0, 1), (2, 1, 0), (2, 1, 1))
                for c, dy, dx in squares:  # of 2 x 2 pixels, channel by channel
                    wanted = (clip[c, :, dy::2, dx::2] - mean) / std
                    assert torch.allclose(latent[4 * c + 2 * dy + dx].float(), wanted, atol=1e-4)


@pytest.mark.skipif(not EXAMPLE.exists(), reason="the three public example pairs are not here")
def test_the_public_example_pairs(tmp_path):
    pairs = read_pairs(EXAMPLE)
    assert len(pairs) == 12 and [pair.label for pair in pairs[:2]] == [(-1, -1, 1), (0, 0, 1)]
    paths = dict.fromkeys(path for pair in pairs[:3] for path in pair.paths)
    # 126 frames at 24 fps are 5.25 s, 10.5 frames at 2 fps, so 10; 152/30 -> 10.1; 144/24 -> 12;
    # 128/24 -> 10.7; 60/16 -> 7.5, so 8
    counts = [video.frame_count(video.probe(EXAMPLE.parent / path)[1]["seconds"]) for path in paths]
    assert counts == [10, 10, 12, 10, 10, 8]
    assert len(usable_rows(pairs, EXAMPLE, CONFIG, Data(cache=tmp_path))[0]) == 12
    assert len(list(tmp_path.iterdir())) == 6  # each video once, 12 rows or not


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


def test_training_lists_what_it_skips(exported, tmp_path, capsys, monkeypatch):
    toy, _ = exported
    (tmp_path / "videos").symlink_to(toy / "videos")
    (tmp_path / "empty.mp4").touch()
    row = ROW | dict(zip(COLUMNS, read_pairs(toy / "train.csv")[0].paths))
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
    assert "training prompts: 0.0% of the words unknown, 0 cut to 3 words\n" in out
    assert "validation prompts: 0.0% of the words unknown, 0 cut to 3 words; 1 of 1 are also" in out
    # two clips are too few: the checkpoint is there, and nothing accepts its z-scores
    assert "z-scores stand on 2 distinct clips; at least 8 are needed" in out
    with pytest.raises(BadInput, match="std.*more clips to validate"):
        load_reward(tmp_path / "run" / "last.pt")
    with pytest.raises(BadInput, match="line 3, column VQ"):
        run(f"--data={path}", f"--out={tmp_path / 'run2'}")
    empty = [row for row in read_pairs(path, []) if row.line == 4]
    with pytest.raises(BadInput, match="no pair is left, all were skipped; the first: .*line 4"):
        usable_rows(empty, path, CONFIG, Data(cache=tmp_path / "cache"), [])
    with pytest.raises(BadInput, match="--loss regression needs ratings"):
        run(f"--data={toy / 'benchmark.csv'}", "--loss=regression", f"--out={tmp_path / 'run2'}")
