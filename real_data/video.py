"""Videos and latents as clips of the model's size, and a cache of them (paper, section 5.1).

VideoReward reads 2 frames a second of any video, not a constant number of frames, so that speed
means the same in every clip. Frames are chosen by the times at which the container shows them; a
clip too short for the model's frames has its frames spread. The paper keeps a frame's proportions,
at up to 448 x 448 pixels; we crop the middle to the model's proportions.

    probe                when each frame of a video is shown
    sample_frames, fit   a video's frames, and the model's clip of them, all in memory
    cached_clip          the clip of a file, decoded once, with one frame in memory at a time
    read_latent          a clip that an autoencoder has encoded

A latent is a .npy or .npz file with one float array (C, T, H, W), or "shard.npy:12": row 12 of an
.npy file with (N, C, T, H, W). An .npy is mapped into memory, so only the rows of a batch are read.
"""

import hashlib
import json
import os
import subprocess
import tempfile
import threading
import zipfile
import zlib
from contextlib import suppress
from fractions import Fraction
from pathlib import Path

import imageio.v2 as imageio
import imageio_ffmpeg
import numpy as np
import torch
import torch.nn.functional as F

FPS = 2.0  # section 5.1 and appendix I
# numpy parses the header of an array by ast, which is not safe in threads of Python 3.11
HEADERS = threading.Lock()


# ---------------------------------------------------------------------------------------------
# Frames of a video


def _ffmpeg(path, *flags):
    """A process that decodes the first video stream of a file to stdout and stops at an error.

    It reads the contents alone: neither the file's name nor other files play a part."""
    command = [imageio_ffmpeg.get_ffmpeg_exe(), "-nostdin", "-v", "error"]
    command += ["-xerror", "-err_detect", "crccheck+bitstream+buffer+explode"]
    command += ["-protocol_whitelist", "fd", "-threads", "1", "-i", "fd:"]
    command += ["-map", "0:V:0", "-fps_mode", "passthrough", *flags, "-"]
    with open(path, "rb") as file:
        return subprocess.Popen(command, stdin=file, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def probe(path):
    """(times (N,) in seconds at which a video's frames are shown, facts), by decoding all of it.

    Facts: "frames" N, "step" the shortest time between two, "seconds" to the end of the last,
    "height" and "width" as played. ValueError: no video, damaged, or fewer than two frames."""
    line_per_frame = ["-enc_time_base", "demux", "-c:v", "wrapped_avframe", "-f", "framecrc"]
    with _ffmpeg(path, *line_per_frame) as process:
        output, errors = (text.decode(errors="replace") for text in process.communicate())
    if process.returncode < 0:
        text = f"ffmpeg was killed by signal {-process.returncode} while decoding it"
        raise ChildProcessError(process.returncode, text, str(path))
    lines = output.splitlines()
    frames = [line.split(",") for line in lines if not line.startswith("#")]
    if process.returncode or errors:
        reason = errors.partition("\n")[0].rpartition("] ")[2]  # without [decoder @ address]
        if frames:
            raise ValueError(f"is damaged after frame {len(frames)} ({reason})")
        raise ValueError(f"cannot be decoded as a video ({reason})")
    ticks = np.maximum.accumulate([int(frame[2]) for frame in frames])
    duration = np.array([int(frame[3]) for frame in frames])
    gaps = np.diff(ticks)
    if not gaps.any():
        raise ValueError(f"has {len(frames)} frame; at least 2 are needed to see motion")
    step = gaps[gaps > 0].min()
    # Reordered frames may carry each other's durations: the last is used if the others are right
    trusted = (abs(duration[:-1] - gaps) <= step / 2).all()
    end = ticks[-1] + (max(step, duration[-1]) if trusted else step)
    header = dict(line[1:].split(" 0: ") for line in lines if " 0: " in line)
    width, height = map(int, header["dimensions"].split("x"))
    pixel_width, pixel_height = map(int, header["sar"].split("/"))  # proportions; 0 if unknown
    if pixel_width and pixel_height:
        width = max(1, round(width * pixel_width / pixel_height))
    tick = float(Fraction(header["tb"]))
    facts = {"frames": len(ticks), "step": step * tick, "seconds": (end - ticks[0]) * tick}
    return (ticks - ticks[0]) * tick, facts | {"height": height, "width": width}


def frame_count(seconds, fps=FPS):
    """How many frames of a video are read: `fps` a second, to the next even number."""
    return 2 * round(seconds * fps / 2)


def frame_positions(times, facts, count):
    """Indices (count,) of the frames shown at equal intervals from the first to the last; a frame
    that is shown for long is repeated."""
    moments = np.linspace(0, facts["seconds"] - facts["step"], count)
    # half a step later: at a constant rate, the nearest frame
    return np.searchsorted(times, moments + facts["step"] / 2, side="right") - 1


def read_frames(path, facts, positions):
    """Yields frames at ascending `positions`: uint8 (H, W, 3), upright, with square pixels."""
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


def sample_frames(path, num_frames=0, least=8, fps=FPS):
    """Frames of a video at `fps`, at least `least`: uint8 (n, H, W, 3). ValueError as in probe, or
    if it has fewer frames than `num_frames`."""
    times, facts = probe(path)
    check_length(facts, num_frames)
    count = max(least, frame_count(facts["seconds"], fps))
    return np.stack(list(read_frames(path, facts, frame_positions(times, facts, count))))


def check_length(facts, num_frames):
    """ValueError for less than 95 % of `num_frames`: a file cut off may decode without an error.

    Frames are counted at the shortest step, as a variable rate leaves some out."""
    count = facts["seconds"] / facts["step"]
    if count < 0.95 * num_frames:
        raise ValueError(f"breaks off: {round(count)} frames where there should be {num_frames:g}")


def middle(frames, length):
    """The middle `length` of at least as many frames."""
    start = (len(frames) - length) // 2
    return frames[start : start + length]


def fit_frame(frame, height, width):
    """uint8 (H, W, 3) -> uint8 (3, height, width): the middle crop, averaged down."""
    rows, columns = frame.shape[:2]
    crop_rows = max(1, min(rows, round(columns * height / width)))
    crop_columns = max(1, min(columns, round(rows * width / height)))
    top, left = (rows - crop_rows) // 2, (columns - crop_columns) // 2
    cropped = frame[top : top + crop_rows, left : left + crop_columns]
    channels = []
    for channel in range(3):  # one by one: in float32 a frame is four times as large
        values = torch.from_numpy(cropped[..., channel].astype(np.float32))[None, None]
        values = F.interpolate(values, (height, width), mode="area")
        channels.append(values[0, 0].round().byte())
    return torch.stack(channels)


def fit(frames, length, height, width=None):
    """The middle of frames: uint8 (n, H, W, 3) -> uint8 (3, length, height, width)."""
    chosen = [fit_frame(frame, height, width or height) for frame in middle(frames, length)]
    return torch.stack(chosen, 1)


# ---------------------------------------------------------------------------------------------
# Latents


def latent_file(path):
    """ "shard.npy:12" -> ("shard.npy", 12); any other path -> (path, None)."""
    name, _, row = path.rpartition(":")
    if name.lower().endswith(".npy") and row.isdecimal():
        return name, int(row)
    return path, None


def is_latent(path):
    """Whether a path of a CSV names a latent, not a video."""
    return latent_file(path)[0].lower().endswith((".npy", ".npz"))


def read_latent(path):
    """The array (C, T, H, W) of a latent; a .npy is mapped, not read. ValueError: no such array."""
    name, row = latent_file(str(path))
    try:
        with HEADERS:
            array = np.load(name, mmap_mode="r", allow_pickle=False)
            if isinstance(array, np.lib.npyio.NpzFile):
                with array:
                    array = array[array.files[0]]
    except (ValueError, EOFError, IndexError, KeyError, zipfile.BadZipFile, zlib.error):
        raise ValueError("cannot be read as one array") from None
    if array.dtype.kind != "f":
        raise ValueError(f"holds {array.dtype}, not floating-point numbers")
    axes = "(C, T, H, W)" if row is None else "(N, C, T, H, W)"
    if array.ndim != len(axes.split(",")):
        raise ValueError(f"has shape {array.shape}; {axes} is needed")
    if row is None:
        return array
    if row >= len(array):
        raise ValueError(f"is row {row} of a shard of {len(array)}")
    return array[row]


# ---------------------------------------------------------------------------------------------
# The cache


def check_latent(path):
    """Facts of a latent. ValueError as in read_latent, or for numbers not finite in float32."""
    with np.errstate(over="ignore"):
        array = read_latent(path).astype(np.float32)
    bad = np.argwhere(~np.isfinite(array))
    if len(bad):
        first = bad[0].tolist()
        raise ValueError(f"holds numbers that are not finite: {len(bad)}, the first at {first}")
    return {"shape": array.shape, "short": False}


def cached_file(path, folder, length, height, width, fps=FPS):
    """The .npz in `folder` with "facts", a JSON text, and the "clip" of a video or latent.

    Its name is a digest of the file's path, size and time of change, and of the clip's settings.
    ValueError: what is wrong with the video or latent; OSError: either file."""
    name, row = latent_file(str(path))
    name = os.path.abspath(name)
    status = os.stat(name)
    key = repr((name, row, status.st_size, status.st_mtime_ns, length, height, width, fps))
    file = Path(folder) / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npz"
    if zipfile.is_zipfile(file):
        return file
    if is_latent(str(path)):
        arrays = {"facts": json.dumps(check_latent(path))}
    else:
        times, facts = probe(path)
        count = frame_count(facts["seconds"], fps)
        positions = middle(frame_positions(times, facts, max(count, length)), length)
        frames = [fit_frame(frame, height, width) for frame in read_frames(path, facts, positions)]
        clip = torch.stack(frames, 1)
        facts |= {"shape": clip.shape, "short": count < length}
        arrays = {"facts": json.dumps(facts), "clip": clip}
    file.parent.mkdir(parents=True, exist_ok=True)
    prefix = f"{file.name}."
    with tempfile.NamedTemporaryFile(dir=folder, prefix=prefix, suffix=".tmp", delete=False) as new:
        np.savez(new, **arrays)
    with suppress(FileNotFoundError):  # another process made the file and removed this one
        os.replace(new.name, file)
    return file


def clip_facts(path, folder, length, height, width, fps=FPS):
    """Facts of a video or latent: the "shape" (C, T, H, W) of its clip; "short", whether it has
    fewer frames at `fps`; and a video's facts as in probe. Errors as in cached_file."""
    file = cached_file(path, folder, length, height, width, fps)
    with HEADERS, np.load(file) as arrays:
        return json.loads(str(arrays["facts"]))


def cached_clip(path, folder, length, height, width=None, fps=FPS):
    """The clip of a video: uint8 (3, length, height, width). Errors as in cached_file."""
    file = cached_file(path, folder, length, height, width or height, fps)
    with HEADERS, np.load(file) as arrays:
        return torch.from_numpy(arrays["clip"])


# ---------------------------------------------------------------------------------------------
# Pixels


def to_bytes(video):
    """Values in [-1, 1], clamped -> uint8."""
    return ((video.float().clamp(-1, 1) + 1) * 127.5).round().byte()


def to_video(frames):
    """uint8 -> float in [-1, 1]."""
    return frames.float() / 127.5 - 1


def write_video(path, video, zoom=4):
    """Writes a clip (3, T, H, W) in [-1, 1] as mp4, enlarged: H.264 halves colour's resolution."""
    frames = list(to_pixels(video, zoom))
    imageio.mimwrite(path, frames, format="FFMPEG", fps=FPS, quality=9, macro_block_size=1)


def to_pixels(video, zoom=1):
    """(..., C, T, H, W) in [-1, 1] -> uint8 (..., T, H * zoom, W * zoom, C)."""
    pixels = to_bytes(video).movedim(-4, -1).cpu()
    return pixels.repeat_interleave(zoom, -3).repeat_interleave(zoom, -2).numpy()
