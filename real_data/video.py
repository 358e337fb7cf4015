"""Video files: frames at a constant interval, the model's size, and a cache of what was decoded (paper, section 5.1).

VideoReward looks at 2 frames a second of any video: a constant interval, so that speed means the same in every clip,
not a constant number of frames. The paper keeps a frame's proportions, at up to 448 x 448 pixels; here its middle
square is taken, at the model's size. Decoded clips are kept as small uint8 files, one a video, named by what they were
made from; training then reads only the clips of its batch, and a decoding that was stopped goes on where it was.

    sample_frames   mp4 -> uint8 (n, H, W, 3), n by the length of the video
    fit             -> uint8 (3, frames, size, size), the middle of it
    cached_clip     both, once
    read_latent     a clip that an autoencoder encoded before: an array, taken as it is
    write_gif, write_sheet      samples to look at

A latent is a .npy or .npz file with one float array (C, T, H, W); or, as "shard.npy:12", row 12 of an .npy file with
(N, C, T, H, W). An .npy is mapped into memory, so that of a shard of any size only the rows of a batch are read.
"""

import hashlib
import os
import tempfile
import threading
import zipfile
import zlib
from pathlib import Path

import imageio.v2 as imageio
import imageio.v3 as iio
import numpy as np
import torch
import torch.nn.functional as F

FPS = 2.0  # section 5.1 and appendix I; the video's own duration decides how many frames that is
HEADERS = threading.Lock()  # numpy reads an array's header by ast, where threads of Python 3.11 disturb each other
LEAST = 4  # frames of a shorter video, as in the published reward model


def frame_positions(count, duration):
    """Which of `count` frames to look at: FPS a second of duration, to the next even number, at least 4, at most all,
    evenly from the first to the last. int64 array."""
    wanted = max(LEAST, 2 * round(duration * FPS / 2))
    return np.linspace(0, count - 1, min(wanted, count)).round().astype(np.int64)


def sample_frames(path, said=0):
    """Frames of a video at FPS: uint8 (n, H, W, 3), read one by one. ValueError: not a video, fewer than two frames,
    or fewer than 19 of 20 of the number it was `said` to have: a file that was cut off often decodes without error."""
    try:
        with imageio.get_reader(path, format="FFMPEG") as reader:
            rate, count = reader.get_meta_data()["fps"], reader.count_frames()
            positions = frame_positions(count, count / rate) if count > 1 and rate > 0 else []
            wanted = set(positions)
            taken = {i: frame for i, frame in enumerate(reader) if i in wanted}
    except (OSError, RuntimeError, ValueError, KeyError, IndexError, StopIteration):
        raise ValueError("cannot be decoded as a video") from None
    if len(positions) < 2:
        raise ValueError(f"has {count} frame; at least 2 are needed to see motion")
    if len(taken) < len(positions) or count < 0.95 * said:
        raise ValueError(f"breaks off: {count} frames where there should be {max(count, said):g}")
    return np.stack([taken[i] for i in positions])


def fit(frames, length, size):
    """uint8 (n, H, W, 3) -> uint8 (3, length, size, size): the middle square, averaged down; the middle `length` frames
    at their interval, a shorter video holding its last frame."""
    video = torch.from_numpy(frames).permute(0, 3, 1, 2).float()  # (n, 3, H, W)
    start = max(0, len(video) - length) // 2
    video = video[start : start + length]
    height, width = video.shape[-2:]
    scale = size / min(height, width)
    video = F.interpolate(video, (max(size, round(height * scale)), max(size, round(width * scale))), mode="area")
    top, left = (video.shape[-2] - size) // 2, (video.shape[-1] - size) // 2
    video = video[:, :, top : top + size, left : left + size]
    video = torch.cat((video, video[-1:].expand(length - len(video), -1, -1, -1)))
    return video.transpose(0, 1).round().byte().contiguous()


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
    return (name, int(row)) if colon and name.lower().endswith(".npy") and row.isdecimal() else (path, None)


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


def cached_clip(path, folder, length, size, said=0):
    """The clip of a video as uint8 (3, length, size, size), from `folder` if it was decoded before.

    The file there is named by the video's path, size and time of change: a changed video is decoded again, and so is
    one that is `said` to have another number of frames than it was when it was decoded. ValueError as in sample_frames;
    OSError if `folder` cannot be written."""
    path, folder = Path(os.path.abspath(path)), Path(folder)
    facts = path.stat()
    key = repr((str(path), facts.st_size, facts.st_mtime_ns, length, size, FPS))
    kept = folder / f"{hashlib.sha256(key.encode()).hexdigest()[:24]}.npy"
    checked = kept.with_suffix(f".{said:g}")  # an empty file: the number of frames was looked at
    if kept.exists() and (not said or checked.exists()):
        return torch.from_numpy(np.array(_load(kept)))
    clip = fit(sample_frames(path, said), length, size)
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(dir=folder, suffix=".tmp", delete=False) as file:
        np.save(file, clip.numpy())
    os.replace(file.name, kept)  # whole or not there
    if said:
        checked.touch()
    return clip


# ---------------------------------------------------------------------------------------------------------------------
# Pictures


def to_pixels(video, zoom=1):
    """(..., C, T, H, W) in [-1, 1] -> uint8 (..., T, H * zoom, W * zoom, C)."""
    pixels = to_bytes(video).movedim(-4, -1).cpu()
    return pixels.repeat_interleave(zoom, -3).repeat_interleave(zoom, -2).numpy()


def _tile(frames, gap=2):
    """A list of rows of pictures (H, W, C) -> one picture, a grey line between."""
    pad = ((gap, gap), (gap, gap), (0, 0))
    rows = [np.concatenate([np.pad(frame, pad, constant_values=96) for frame in row], 1) for row in frames]
    return np.concatenate(rows, 0)


def write_gif(path, rows, zoom=4, fps=8):
    """An animation of `rows`, a list of video batches (n, C, T, H, W): one row of clips each."""
    rows = [to_pixels(row, zoom) for row in rows]
    frames = [_tile([[clip[i] for clip in row] for row in rows]) for i in range(rows[0].shape[1])]
    iio.imwrite(path, np.stack(frames), duration=1000 / fps, loop=0)


def write_sheet(path, videos, zoom=3):
    """A contact sheet of videos (n, C, T, H, W): a row a clip, its frames from left to right."""
    iio.imwrite(path, _tile(list(to_pixels(videos, zoom))))
