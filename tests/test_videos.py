"""Videos as they come: many codecs and containers, variable rates, rotations, odd names, damage.

The brightness of a frame tells the time at which it is shown: 40 + 40 t, in seconds.
"""

import csv
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import pytest
import torch
from forked import ended, fork

import pictures
from model import ModelConfig
from real_data import export_toy, prepare, video
from real_data.dataset import usable_rows
from real_data.pairs_csv import COLUMNS, Pair
from runtime.cli import BadInput
from settings import Data

ROOT = Path(__file__).parent.parent
FFMPEG = [imageio_ffmpeg.get_ffmpeg_exe(), "-y", "-v", "error", "-threads", "1"]
X264 = ["-c:v", "libx264", "-preset", "ultrafast", "-crf", "8"]


def ffmpeg(*arguments, content=None):
    subprocess.run(
        [*FFMPEG, *map(str, arguments)], input=content, check=True, stderr=subprocess.DEVNULL
    )


def write(path, *flags, width=32, height=32, rate=10, seconds=4.0, start=0.0):
    """A black video with a square in its middle that has the shade 40 + 40 (t - start)."""
    times = np.arange(round(rate * seconds)) / rate
    side = min(width, height)
    top, left = (height - side) // 2, (width - side) // 2
    frames = np.zeros((len(times), height, width), np.uint8)
    shade = (40 + 40 * (times - start)).clip(0, 255).round().astype(np.uint8)
    frames[:, top : top + side, left : left + side] = shade[:, None, None]
    size = f"{width}x{height}"
    source = ["-f", "rawvideo", "-pix_fmt", "gray", "-s", size, "-r", rate, "-i", "-"]
    ffmpeg(*source, *(flags or X264), path, content=frames.tobytes())


def brightness(path, cache):
    clip = video.cached_clip(path, cache, 8, 16)
    return clip.float().mean((0, 2, 3)).tolist()


# 40 frames in 4 s are looked at 8 times from 0 to 3.9 s, each 3.9 / 7 s = 0.557 s after the last
EVEN = [40 + 40 * 3.9 / 7 * i for i in range(8)]

CODECS = {
    "h264.mp4": X264,
    "h265.mp4": ["-c:v", "libx265", "-preset", "ultrafast", "-crf", "8"],
    "vp8.webm": ["-c:v", "libvpx", "-crf", "4", "-b:v", "2M", "-deadline", "realtime"],
    "vp9.webm": ["-c:v", "libvpx-vp9", "-crf", "8", "-deadline", "realtime", "-cpu-used", "8"],
    "av1.mkv": ["-c:v", "libsvtav1", "-preset", "12", "-crf", "10"],
    "mpeg4.avi": ["-c:v", "mpeg4", "-q:v", "2"],
    "mpeg2.mpg": ["-c:v", "mpeg2video", "-q:v", "2", "-r", "25"],
    "wmv2.wmv": ["-c:v", "wmv2", "-q:v", "2"],
    "theora.ogv": ["-c:v", "libtheora", "-q:v", "9"],
    "flash.flv": ["-c:v", "flv1", "-q:v", "2"],
    "prores 10 bit.mov": ["-c:v", "prores_ks", "-pix_fmt", "yuv422p10le"],
    "alpha.mov": ["-c:v", "png", "-pix_fmt", "rgba"],
    "ffv1.mkv": ["-c:v", "ffv1"],
    "motion.mjpeg.avi": ["-c:v", "mjpeg", "-q:v", "2"],
    "animation.gif": ["-c:v", "gif"],
    "broadcast.ts": X264,
    "raw.h264": [*X264, "-bf", "0", "-r", "10"],
    "reordered.m4v": ["-c:v", "libx264", "-bf", "3", "-crf", "8"],
}


def write_good(folder):
    """{name of a video: its brightness at 8 times}."""
    expected = {name: EVEN for name in CODECS}
    for name, flags in CODECS.items():
        write(folder / name, *flags)
    good = folder / "h264.mp4"
    for name in ("no extension", "frame-%03d.mp4", "-dash.mp4", "a:b.mp4"):
        (folder / name).write_bytes(good.read_bytes())
        expected[name] = EVEN
    write(folder / "portrait.mp4", width=36, height=64)
    write(folder / "wide.mp4", width=100, height=32)
    write(folder / "pixels of 2:1.mp4", *X264, "-vf", "scale=32:32,setsar=2", width=64)
    sound = ["-f", "lavfi", "-i", "sine=d=7"]
    ffmpeg("-itsoffset", 3, "-i", good, *sound, "-c:v", "copy", folder / "late.mkv")
    for name in ("portrait.mp4", "wide.mp4", "pixels of 2:1.mp4", "late.mkv"):
        expected[name] = EVEN
    for angle in (90, 180, 270):
        turned = ["-display_rotation", angle, "-i", folder / "portrait.mp4"]
        ffmpeg(*turned, "-c", "copy", folder / f"rotated {angle}.mp4")
        expected[f"rotated {angle}.mp4"] = EVEN
    # frames of 0, 0.1, ... 2 s and of 2.5, 3 and 3.5 s
    keep = "select='lt(n,20)+not(mod(n,5))'"
    for name, codec in (("variable.mp4", X264), ("variable.ts", X264), ("variable.gif", [])):
        write(folder / name, *codec, "-vf", keep, "-fps_mode", "vfr")
        # 0 to 3.5 s, each 0.5 s later
        expected[name] = [40, 60, 80, 100, 120, 140, 160, 180]
    write(folder / "long end.gif", "-vf", keep, "-fps_mode", "vfr", "-final_delay", "50")
    # half a second longer: 0 to 3.9 s
    expected["long end.gif"] = [40, 64, 84, 108, 120, 140, 160, 180]
    write(folder / "ten minutes.mp4", width=16, height=16, seconds=600, start=298)
    # 1,200 times from 0 to 599.9 s; the middle 8 begin with 596 * 599.9 / 1199 = 298.2 s
    expected["ten minutes.mp4"] = [48 + 20 * i for i in range(8)]
    write(folder / "4k.mp4", width=3840, height=2160, rate=2)
    expected["4k.mp4"] = [40 + 20 * i for i in range(8)]
    write(folder / "short.mp4", seconds=2.0)  # 8 times from 0 to 1.9 s
    expected["short.mp4"] = [40 + 40 * 1.9 / 7 * i for i in range(8)]
    return expected


def write_bad(folder):
    """{name of a file that is no good video: what the report says of it}."""
    good = (folder / "h264.mp4").read_bytes()
    (folder / "page.mp4").write_text("<html>404: Not Found</html>")
    (folder / "cut.mp4").write_bytes(good[: len(good) // 2])
    ffmpeg("-f", "lavfi", "-i", "sine=d=1", folder / "sound.m4a")
    write(folder / "one frame.mp4", seconds=0.1)
    messages = dict.fromkeys(("page.mp4", "cut.mp4"), "cannot be decoded as a video")
    messages["one frame.mp4"] = "has 1 frame"
    messages["sound.m4a"] = "cannot be decoded as a video (Stream map"
    messages["cut at its end.mp4"] = "is damaged after frame"
    ffmpeg("-i", folder / "h264.mp4", "-c", "copy", "-movflags", "+faststart", folder / "fast.mp4")
    fast = (folder / "fast.mp4").read_bytes()  # its index stands first
    (folder / "cut at its end.mp4").write_bytes(fast[: len(fast) * 3 // 4])
    ffmpeg("-f", "lavfi", "-i", "testsrc2=s=64x64:r=10:d=4", *X264, folder / "zeros.mp4")
    content = bytearray((folder / "zeros.mp4").read_bytes())
    middle = len(content) // 2
    content[middle : middle + 400] = bytes(400)
    (folder / "zeros.mp4").write_bytes(content)
    messages["zeros.mp4"] = "is damaged after frame"
    return messages


def test_videos_as_they_come(tmp_path):
    expected, messages = write_good(tmp_path), write_bad(tmp_path)
    with open(tmp_path / "pairs.csv", "w", newline="") as file:
        others = [name for name in [*expected, *messages] if name != "h264.mp4"]
        rest = ("h264.mp4", "a cat", "A", "B", "same", 10, 1, 10, 40)
        rows = [(name, *rest) for name in others]
        csv.writer(file).writerows([COLUMNS, *rows])
    # ru_maxrss also counts what the parent had at the fork; VmHWM begins with the program
    script = """
import re, resource
from real_data import prepare
prepare.main()
own = re.search(r"VmHWM:\\s*(\\d+) kB", open("/proc/self/status").read())[1]
print(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""
    shell = [sys.executable, "-c", script, tmp_path / "pairs.csv", "--cache", tmp_path / "cache"]
    done = subprocess.run(list(map(str, shell)), capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    own, largest_child = map(int, done.stdout.splitlines()[-1].split())
    assert max(own, largest_child) < 600e3  # kB
    with open(tmp_path / "pairs.bad.csv", newline="") as file:
        faults = {rows[int(row["line"]) - 2][0]: row["fault"] for row in csv.DictReader(file)}
    assert faults.keys() == messages.keys()
    assert all(messages[name] in fault and "\n" not in fault for name, fault in faults.items())
    seen = {name: brightness(tmp_path / name, tmp_path / "cache") for name in expected}
    for name, values in seen.items():  # to half a frame (2) and what codecs cost
        assert values == pytest.approx(expected[name], abs=6), name


def test_a_cache_tells_lengths_and_sizes_of_one_video_apart(tmp_path):
    path, cache = tmp_path / "a.mp4", tmp_path / "cache"
    write(path, rate=2)  # frames of 40, 60, ... 180
    for _ in range(2):
        for length, size in ((8, 32), (4, 32), (8, 16)):
            clip = video.cached_clip(path, cache, length, size)
            assert clip.shape == (3, length, size, size)
            assert clip[0, 0].float().mean().item() == pytest.approx(120 - 10 * length, abs=3)
    slower = video.cached_clip(path, cache, 4, 32, fps=1.0)  # the whole clip
    assert slower[0, [0, 3]].float().mean((1, 2)).tolist() == pytest.approx([40, 180], abs=3)
    before = video.cached_file(path, cache, 8, 32, 32)
    os.utime(path, ns=(0, 0))  # as if it had been written anew, with as many bytes
    assert video.cached_file(path, cache, 8, 32, 32) != before


def test_a_wrong_number_of_frames_is_seen_in_every_row_and_in_the_cache(tmp_path):
    for name in ("a.mp4", "b.mp4"):
        write(tmp_path / name, rate=2)
    first = Pair("a.mp4", "b.mp4", "a red circle moving left", (1, 1, 1), 2, 8, 2, 8, line=2)
    settings = Data(cache=tmp_path / "cache")
    usable_rows([first], tmp_path / "x.csv", ModelConfig(), settings)  # the cache has the clips now
    second = replace(first, frames_a=999.0, line=3)
    with pytest.raises(BadInput, match="line 3, column path_A: video a.mp4 breaks off"):
        usable_rows([first, second], tmp_path / "x.csv", ModelConfig(), settings)


def test_short_clips_are_counted_or_refused(tmp_path, capsys):
    write(tmp_path / "long.mp4")
    write(tmp_path / "short.mp4", seconds=2.0)
    row = Pair("long.mp4", "short.mp4", "a cat", (1, 1, 1), 10, 40, 10, 20, line=2)

    def use(**options):
        settings = Data(cache=tmp_path / "cache", **options)
        return usable_rows([row], tmp_path / "x.csv", ModelConfig(), settings)[0]

    assert use() == [row]
    assert "1 of 2 videos are too short for 8 frames" in capsys.readouterr().out
    refused = "line 2, column path_B: video short.mp4 lasts 2.00 s, too short for 8 frames"
    with pytest.raises(BadInput, match=refused):
        use(short="refuse")
    assert use(short="refuse", fps=4.0) == [row]  # 8 frames in 2 s
    assert capsys.readouterr().out == ""


def test_an_ffmpeg_that_is_killed_is_no_fault_of_the_video(tmp_path, monkeypatch):
    (tmp_path / "kill").write_text("#!/bin/sh\nkill -9 $$\n")
    (tmp_path / "kill").chmod(0o755)
    for name in "ab":
        (tmp_path / name).touch()
    monkeypatch.setattr(imageio_ffmpeg, "get_ffmpeg_exe", lambda: str(tmp_path / "kill"))
    row = Pair("a", "b", "a cat", (1, 1, 1), 10, 40, 10, 20, line=2)
    settings = Data(cache=tmp_path / "cache")
    with pytest.raises(BadInput, match="ffmpeg was killed by signal 9"):
        usable_rows([row], tmp_path / "x.csv", ModelConfig(), settings, skipped=[])


def test_frames_are_looked_at_in_equal_intervals():
    times, facts = np.arange(9) / 30, {"step": 1 / 30, "seconds": 9 / 30}
    assert video.frame_positions(times, facts, 4).tolist() == [0, 3, 5, 8]  # 0, 2.67, 5.33, 8
    # frames at 0, 1 and 3 s, the last for a second: 8 times from 0 to 3 s, each .43 s later
    times, facts = np.array([0.0, 1.0, 3.0]), {"step": 1.0, "seconds": 4.0}
    assert video.frame_positions(times, facts, 8).tolist() == [0, 0, 1, 1, 1, 1, 2, 2]
    # 126 frames at 24 fps are 5.25 s; the next even number below 10.5 is 10
    assert [video.frame_count(count / 24) for count in (126, 144, 24)] == [10, 12, 2]


def test_the_middle_is_cropped():
    frame = np.zeros((4, 8, 3), np.uint8)
    frame[:, 2:6] = 50
    assert video.fit_frame(frame, 2, 2).tolist() == [[[50, 50], [50, 50]]] * 3
    columns = np.zeros((4, 8, 3), np.uint8) + np.arange(8, dtype=np.uint8)[:, None]
    wide = video.fit_frame(columns, 2, 4)
    assert wide[0].tolist() == [[0, 2, 4, 6]] * 2  # means of 0 1, 2 3, 4 5 and 6 7, to even


def test_preparing_continues_after_kill_9(tmp_path):
    flags = [str(tmp_path / "toy"), "--pairs=8", "--generated=0"]
    export_toy.export(export_toy.arguments(flags))
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"

    def start(cache):
        command = [str(tmp_path / "toy" / "train.csv"), f"--cache={cache}"]
        return fork(prepare.main, command, output=tmp_path / "log")

    assert ended(start(undisturbed)) == 0
    for num_clips in (1, 6):
        child = start(killed)
        while len(list(killed.glob("*.npz"))) < num_clips:
            time.sleep(0.005)
        os.kill(child, signal.SIGKILL)
        assert ended(child) == -signal.SIGKILL
    whole = next(killed.glob("*.npz"))
    (killed / f"{whole.name}.x.tmp").touch()  # left by a process that was killed while writing
    assert ended(start(killed)) == 0
    one, other = (
        {path.name: path.read_bytes() for path in folder.iterdir()}
        for folder in (killed, undisturbed)
    )
    assert len(one) == 16 and one == other
    report = (tmp_path / "log").read_text()
    assert "8 pairs can be used; 0 cannot" in report and "sizes    128x128 (16)" in report
    assert "rates    2 to 2 fps, median 2" in report
    assert "lengths  4 to 4 s, median 4; 0 too short for 8 frames" in report
    with open(tmp_path / "toy" / "train.csv", newline="") as file:
        ties = [row["VQ"] for row in csv.DictReader(file)].count("same")
    assert f"ties     VQ {ties}, " in report


def test_pixels_are_rounded_and_cut():
    values = torch.tensor([-3.0, -1.0, -0.5, 0.0, 0.5, 1.0, 2.0])
    assert video.to_bytes(values).tolist() == [0, 0, 64, 128, 191, 255, 255]
    assert video.to_video(torch.tensor([0, 255], dtype=torch.uint8)).tolist() == [-1.0, 1.0]


def test_pictures_have_named_rows_and_columns(tmp_path):
    rows = torch.tensor([-1.0, 0.0, 0.5, 1.0]).reshape(2, 2, 1, 1, 1, 1).expand(2, 2, 3, 2, 32, 32)
    texts = {"labels": ["base", "dpo"], "captions": ["a red circle", ""]}
    pictures.write_gif(tmp_path / "x.gif", list(rows), **texts)
    gif = iio.imread(tmp_path / "x.gif")[0]
    # clips of 4 x 32 pixels and lines of 2 around each, below three lines of 18 pixels
    left = gif.shape[1] - 2 * (4 * 32 + 4)
    assert gif.shape[0] == 54 + 4 + 2 * (4 * 32 + 4) and left > 0
    assert gif[:58, left : left + 132].max() > 200 and gif[58:190, :left].max() > 200
    assert (gif[:58, left + 132 :] == gif[0, 0]).all()  # no caption, no ink
    shades = [
        gif[100 + 132 * row, left + 50 + 132 * column, 0] for row in (0, 1) for column in (0, 1)
    ]
    assert np.allclose(np.array(shades, float), [0, 128, 191, 255], atol=8)
    sheet = rows[:, :, :, 0].transpose(1, 2)[..., :8, :8]
    pictures.write_sheet(tmp_path / "x.png", sheet, zoom=1)
    png = iio.imread(tmp_path / "x.png")  # two lines of grey around each picture of 8 x 8
    shades = [png[6 + 12 * row, 6 + 12 * column, 0] for row in (0, 1) for column in (0, 1)]
    assert np.allclose(np.array(shades, float), [0, 128, 191, 255], atol=8)
