"""Video files: frames at a constant interval, the model's size, and a cache of decoded clips (paper, section 5.1).

VideoReward looks at 2 frames a second of any video, not at a constant number of frames, so that
speed means the same in every clip. They are chosen by the times at which the container shows them;
over a clip too short for the model's frames these are spread. The paper keeps a frame's proportions,
at up to 448 x 448 pixels; here the middle of the model's proportions is used.

    probe           when each frame of a video is shown
    sample_frames   video -> uint8 (n, H, W, 3), n by the length of the video
    fit             -> uint8 (3, frames, height, width), the middle of it
    cached_clip     the same for one file, once, with a single frame in memory; clip_facts
    read_latent     a clip that an autoencoder encoded before: an array, taken as it is
    write_gif, write_sheet      samples to look at

A latent is a .npy or .npz file with one float array (C, T, H, W); or, as "shard.npy:12", row 12 of an .npy file with
(N, C, T, H, W). An .npy is mapped into memory, so that of a shard of any size only the rows of a batch are read.
"""

import hashlib
import json
import os
import subprocess
import tempfile
import textwrap
import threading
import zipfile
import zlib
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import imageio.v2 as imageio
import imageio.v3 as iio
import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont  # imageio itself needs Pillow

from runtime.cli import BadInput

FPS = 2.0  # section 5.1 and appendix I; the video's own duration decides how many frames that is
HEADERS = (
    threading.Lock()
)  # numpy reads an array's header by ast, where threads of Python 3.11 disturb each other


def _ffmpeg(path, *flags):
    """A process that decodes the first video stream of a file to its stdout, up to the first error in it. It sees the
    contents alone: neither names nor other files play a part."""
    strict = ["-xerror", "-err_detect", "crccheck+bitstream+buffer+explode"]
    source = ["-protocol_whitelist", "fd", "-threads", "1", "-i", "fd:"]
    output = ["-map", "0:V:0", "-fps_mode", "passthrough", *flags, "-"]
    command = [
        imageio_ffmpeg.get_ffmpeg_exe(),
        "-nostdin",
        "-v",
        "error",
        *strict,
        *source,
        *output,
    ]
    with open(path, "rb") as file:
        return subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def probe(path):
    """(times (N,) in seconds at which a video's frames are shown, facts), by decoding all of it.

    Facts: "frames" N, "step" the shortest time between two, "seconds" to the end of the last, "height" and "width" as
    played. ValueError: no video, damaged, or fewer than two frames."""
    flags = [
        "-enc_time_base",
        "demux",
        "-c:v",
        "wrapped_avframe",
        "-f",
        "framecrc",
    ]  # a line a frame
    with _ffmpeg(path, *flags) as process:
        output, errors = (text.decode(errors="replace") for text in process.communicate())
    if process.returncode < 0:
        raise BadInput(
            f"{path}: ffmpeg was killed by signal {-process.returncode} while decoding it"
        )
    lines = output.splitlines()
    frames = [line.split(",") for line in lines if not line.startswith("#")]
    if process.returncode or errors:
        reason = errors.partition("\n")[0].rpartition("] ")[2]  # without [decoder @ address]
        if "matches no streams" in reason:
            reason = "it has no video stream"
        where = (
            f"is damaged after frame {len(frames)}" if frames else "cannot be decoded as a video"
        )
        raise ValueError(f"{where} ({reason})")
    ticks = np.maximum.accumulate([int(frame[2]) for frame in frames])
    duration = np.array([int(frame[3]) for frame in frames])
    gaps = np.diff(ticks)
    if not gaps.any():
        raise ValueError(f"has {len(frames)} frame; at least 2 are needed to see motion")
    step = gaps[gaps > 0].min()
    # Reordered frames may carry each other's durations: the last one is used if the others are right.
    trusted = (abs(duration[:-1] - gaps) <= step / 2).all()
    end = ticks[-1] + (max(step, duration[-1]) if trusted else step)
    header = dict(line[1:].split(" 0: ") for line in lines if " 0: " in line)
    width, height = map(int, header["dimensions"].split("x"))
    sar_width, sar_height = map(
        int, header["sar"].split("/")
    )  # proportions of a pixel; 0 if unknown
    if sar_width and sar_height:
        width = max(1, round(width * sar_width / sar_height))
    tick = float(Fraction(header["tb"]))
    facts = {"frames": len(ticks), "step": step * tick, "seconds": (end - ticks[0]) * tick}
    return (ticks - ticks[0]) * tick, facts | {"height": height, "width": width}


def frame_count(seconds, fps=FPS):
    """How many frames of a video are looked at: `fps` a second, to the next even number."""
    return 2 * round(seconds * fps / 2)


def frame_positions(times, facts, least, fps=FPS):
    """Which frames of a video to look at, at equal intervals from the first to the last: frame_count, at least `least`.
    int64 array (n,); a frame that is shown for long is repeated."""
    count = max(least, frame_count(facts["seconds"], fps))
    looks = np.linspace(0, facts["seconds"] - facts["step"], count)
    # half a step later: at a constant rate, the nearest frame
    return np.searchsorted(times, looks + facts["step"] / 2, side="right") - 1


def read_frames(path, facts, positions):
    """Yields the frames at ascending `positions` of a video: uint8 (H, W, 3), upright, with square pixels."""
    height, width = facts["height"], facts["width"]
    numbers, repeats = np.unique(positions, return_counts=True)
    select = "+".join(f"eq(n,{number})" for number in numbers)
    flags = ["-vf", f"select='{select}',scale={width}:{height}", "-frames:v", str(len(numbers))]
    with _ffmpeg(path, *flags, "-pix_fmt", "rgb24", "-f", "rawvideo") as process:
        for repeat in repeats:
            content = process.stdout.read(height * width * 3)
            if len(content) < height * width * 3:
                raise ValueError("changed while it was read")
            for _ in range(repeat):
                yield np.frombuffer(content, np.uint8).reshape(height, width, 3)


def sample_frames(path, said=0, least=8, fps=FPS):
    """Frames of a video at `fps`, at least `least`: uint8 (n, H, W, 3). ValueError as in probe and check_length."""
    times, facts = probe(path)
    check_length(facts, said)
    return np.stack(list(read_frames(path, facts, frame_positions(times, facts, least, fps))))


def check_length(facts, said):
    """ValueError for a video of fewer than 19 of 20 of the frames that it is `said` to have: a file that was cut off
    may decode without an error. Frames are counted at the shortest step, as a variable frame rate leaves some out."""
    count = facts["seconds"] / facts["step"]
    if count < 0.95 * said:
        raise ValueError(f"breaks off: {round(count)} frames where there should be {said:g}")


def middle(count, length):
    """Indices (length,) of the middle of `count` frames; of fewer, all of them spread evenly."""
    if count < length:
        return np.linspace(0, count - 1, length).round().astype(np.int64)
    start = (count - length) // 2
    return np.arange(start, start + length)


def fit_frame(frame, height, width):
    """uint8 (H, W, 3) -> uint8 (3, height, width): the middle with these proportions, averaged down."""
    rows, columns = frame.shape[:2]
    crop_rows = max(1, min(rows, round(columns * height / width)))
    crop_columns = max(1, min(columns, round(rows * width / height)))
    top, left = (rows - crop_rows) // 2, (columns - crop_columns) // 2
    channels = []
    for channel in range(3):  # one by one: in float32 a frame is four times as large
        values = frame[top : top + crop_rows, left : left + crop_columns, channel].astype(
            np.float32
        )
        values = F.interpolate(torch.from_numpy(values)[None, None], (height, width), mode="area")
        channels.append(values[0, 0].round().byte())
    return torch.stack(channels)


def fit(frames, length, height, width=None):
    """uint8 (n, H, W, 3) -> uint8 (3, length, height, width): the middle frames; width = height by default."""
    chosen = frames[middle(len(frames), length)]
    return torch.stack([fit_frame(frame, height, width or height) for frame in chosen], 1)


def to_bytes(video):
    """Values in [-1, 1], what lies outside cut off -> uint8."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def to_video(frames):
    """uint8 -> float in [-1, 1]."""
    return frames.float() / 127.5 - 1


def write_video(path, video, zoom=4):
    """Writes a clip (3, T, H, W) in [-1, 1] as mp4, a pixel as zoom x zoom: H.264 halves the resolution of colour."""
    frames = to_bytes(video).permute(1, 2, 3, 0)
    frames = frames.repeat_interleave(zoom, 1).repeat_interleave(zoom, 2).numpy()
    imageio.mimwrite(path, list(frames), format="FFMPEG", fps=FPS, quality=9, macro_block_size=1)


def is_latent(path):
    """Whether a path of a CSV names a latent, not a video."""
    return latent_file(path)[0].lower().endswith((".npy", ".npz"))


def latent_file(path):
    """ "shard.npy:12" -> ("shard.npy", 12); any other path -> (path, None)."""
    name, colon, row = path.rpartition(":")
    return (
        (name, int(row))
        if colon and name.lower().endswith(".npy") and row.isdecimal()
        else (path, None)
    )


def _load(path):
    """The array of a .npy, mapped into memory, or the first one of a .npz."""
    with HEADERS:
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if isinstance(array, np.lib.npyio.NpzFile):
            with array:
                array = array[array.files[0]]
        return array


def read_latent(path):
    """The array (C, T, H, W) of a latent; of a .npy without reading it yet. ValueError: no such array; OSError."""
    name, row = latent_file(str(path))
    try:
        array = _load(name)
    except (ValueError, EOFError, IndexError, KeyError, zipfile.BadZipFile, zlib.error):
        raise ValueError("cannot be read as one array") from None
    if array.dtype.kind != "f":
        raise ValueError(f"holds {array.dtype}, not floating-point numbers")
    if array.ndim != (4 if row is None else 5):
        wanted = "(C, T, H, W)" if row is None else "(N, C, T, H, W)"
        raise ValueError(f"has shape {array.shape}; {wanted} is needed")
    if row is not None and row >= len(array):
        raise ValueError(f"is row {row} of a shard of {len(array)}")
    return array if row is None else array[row]


def checked_latent(path):
    """Facts of a latent: its shape. ValueError: as in read_latent, or numbers that are not finite in float32."""
    with np.errstate(over="ignore"):
        array = read_latent(path).astype(np.float32)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        raise ValueError(
            f"holds numbers that are not finite: {len(bad)}, the first at {bad[0].tolist()}"
        )
    return {"shape": array.shape, "short": False}


def decoded_clip(path, length, height, width, fps):
    """(facts, clip) of a video, as in clip_facts and cached_clip."""
    times, facts = probe(path)
    positions = frame_positions(times, facts, length, fps)
    chosen = read_frames(path, facts, positions[middle(len(positions), length)])
    clip = torch.stack([fit_frame(frame, height, width) for frame in chosen], 1)
    return {
        "shape": clip.shape,
        "short": frame_count(facts["seconds"], fps) < length,
        **facts,
    }, clip


def cached_file(path, folder, length, height, width, fps=FPS):
    """The .npz in `folder` with "facts", a JSON text, and the "clip" of a video or latent; made unless it is there.

    Its name is made of the file's path, size and time of change, and of all that decides what the clip looks like.
    ValueError: what is wrong with the video or latent; OSError: either file."""
    name, row = latent_file(str(path))
    name = os.path.abspath(name)
    status = os.stat(name)
    key = repr((name, row, status.st_size, status.st_mtime_ns, length, height, width, fps))
    file = Path(folder) / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    if zipfile.is_zipfile(file):
        return file
    if is_latent(str(path)):
        arrays = {"facts": json.dumps(checked_latent(path))}
    else:
        facts, clip = decoded_clip(path, length, height, width, fps)
        arrays = {"facts": json.dumps(facts), "clip": clip}
    file.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        dir=folder, prefix=f"{file.name}.", suffix=".tmp", delete=False
    ) as unfinished:
        np.savez(unfinished, **arrays)
    with suppress(FileNotFoundError):  # another process made the file and removed this one
        os.replace(unfinished.name, file)
    return file


def clip_facts(path, folder, length, height, width, fps=FPS):
    """What is known of a video or latent, a dict: the "shape" (C, T, H, W) of its clip; "short", whether it has less
    than so many frames at `fps`; and a video's facts as in probe. Errors as in cached_file."""
    file = cached_file(path, folder, length, height, width, fps)
    with HEADERS, np.load(file) as arrays:
        return json.loads(str(arrays["facts"]))


def cached_clip(path, folder, length, height, width=None, fps=FPS):
    """The clip of a video as uint8 (3, length, height, width), decoded once. Errors as in cached_file."""
    file = cached_file(path, folder, length, height, width or height, fps)
    with HEADERS, np.load(file) as arrays:
        return torch.from_numpy(arrays["clip"])


# ---------------------------------------------------------------------------------------------
# Pictures

GREY = 96  # between clips and behind text
FONT, LINE = ImageFont.load_default(14), 18  # LINE: height of a line in pixels


def to_pixels(video, zoom=1):
    """(..., C, T, H, W) in [-1, 1] -> uint8 (..., T, H * zoom, W * zoom, C)."""
    pixels = to_bytes(video).movedim(-4, -1).cpu()
    return pixels.repeat_interleave(zoom, -3).repeat_interleave(zoom, -2).numpy()


def _text(text, height, width):
    """A text on grey, wrapped and cut to fit: uint8 (height, width, 3)."""
    picture = Image.new("RGB", (width, height), (GREY,) * 3)
    lines = textwrap.wrap(text, max(1, width // 7))[: height // LINE]
    ImageDraw.Draw(picture).multiline_text((0, 0), "\n".join(lines), "white", FONT)
    return np.asarray(picture)


def _tile(rows, labels=(), gap=2):
    """Rows of pictures (H, W, 3), each behind its label, as one picture with grey lines between."""
    pad = ((gap, gap), (gap, gap), (0, 0))
    if labels:
        width = 4 + max(round(FONT.getlength(label)) for label in labels)
        rows = [[_text(label, row[0].shape[0], width), *row] for label, row in zip(labels, rows)]
    tiled = [[np.pad(picture, pad, constant_values=GREY) for picture in row] for row in rows]
    return np.concatenate([np.concatenate(row, 1) for row in tiled], 0)


def write_gif(path, rows, zoom=4, fps=8, labels=(), captions=()):
    """An animation of `rows`, a list of video batches (n, C, T, H, W): one row of clips each.

    labels: a text for each row, to its left; captions: a text for each column, above it."""
    rows = [to_pixels(row, zoom) for row in rows]
    heading = [[_text(text, 3 * LINE, rows[0].shape[-2]) for text in captions]] if captions else []
    labels = ["", *labels] if labels and captions else labels
    frames = []
    for i in range(rows[0].shape[1]):
        frames.append(_tile([*heading, *([clip[i] for clip in row] for row in rows)], labels))
    iio.imwrite(path, np.stack(frames), duration=1000 / fps, loop=0)


def write_sheet(path, videos, zoom=3, labels=(), captions=()):
    """A contact sheet of videos (n, C, T, H, W): a row a clip, its frames from left to right.

    labels: a text for each clip, to its left; captions: one for each, above it, "" for none."""
    rows, row_labels = [], []
    for i, clip in enumerate(to_pixels(videos, zoom)):
        if captions and captions[i]:
            rows.append([_text(captions[i], LINE, len(clip) * (clip.shape[2] + 4) - 4)])
            row_labels.append("")
        rows.append(list(clip))
        row_labels.append(labels[i] if labels else "")
    iio.imwrite(path, _tile(rows, row_labels if labels else ()))
