"""The file format of checkpoints, read so that no file can do harm and written so that none is ever half there.

A checkpoint is one torch file, a dict of plain values and tensors that loads with `weights_only=True`:

    format   1
    kind     "velocity" (a VideoTransformer), "reward" (a VideoReward) or "noisy reward" (a NoisyReward)
    config   the model's config as a dict          vocabulary   list of words, in the order of their ids
    model    state dict, any float dtype           step         training steps done
    evaluated  whether its closing table is made, which gives a reward's scores their unit
    and while training: ema, optimizer, settings (the flags), trained and averaged (the adapters, under LoRA)
"""

import os
import warnings
import zipfile
from contextlib import suppress
from pathlib import Path

import torch

from runtime.cli import BadInput

FORMAT = 1
WEIGHTS = Path(__file__).parent.parent / "weights"


def fsync_folder(path):
    """Puts the names in a folder on the disk, where the system can."""
    if os.name == "posix":
        handle = os.open(path, os.O_RDONLY)
        os.fsync(handle)
        os.close(handle)


def save_checkpoint(path, state):
    """Writes `state` so that `path` is at every moment either the old file or the whole new one. BadInput if it cannot
    be written; the old file stays."""
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        fsync_folder(path.parent)
    except (OSError, RuntimeError) as error:  # torch makes a RuntimeError of a write that failed
        with suppress(OSError):
            temporary.unlink()
        fault = (
            getattr(error, "strerror", None)
            or "the disk is full, or a limit on the size of files was met"
        )
        raise BadInput(f"cannot write {path}: {fault}") from None


def load_checkpoint(path, kind=None):
    """Reads a checkpoint as a dict. BadInput for a missing, unreadable or foreign file, or one of another kind."""
    path = Path(path)
    if not path.is_file():
        raise BadInput(
            f"{path}: no such checkpoint; train one with `python train.py`, or leave the flag out to use weights/"
        )
    try:
        with (
            open(path, "rb") as file,
            warnings.catch_warnings(action="ignore"),
        ):  # of odd pickles, refused below
            if (
                file.read(4) != b"PK\3\4"
            ):  # what torch wrote before it wrote zip files; its lengths are not checked
                raise ValueError
            if any(
                entry.compress_type != zipfile.ZIP_STORED
                for entry in zipfile.ZipFile(file).infolist()
            ):
                raise ValueError  # torch never compresses: a few MB could fill the memory
            file.seek(0)
            state = torch.load(file, map_location="cpu", weights_only=True)
    except Exception:  # a damaged file can make torch raise anything, and nothing else happens here
        raise BadInput(
            f"{path}: not a checkpoint that can be read safely (damaged, or not written by train.py)"
        ) from None
    if (
        not isinstance(state, dict)
        or not {"format", "kind", "config", "model", "vocabulary"} <= state.keys()
    ):
        raise BadInput(
            f"{path}: not a checkpoint of this project (it lacks format, kind, config, model or vocabulary)"
        )
    if not isinstance(state["format"], int) or state["format"] != FORMAT:
        raise BadInput(
            f"{path}: checkpoint format {state['format']}, but this version reads format {FORMAT}"
        )
    if not isinstance(state["vocabulary"], list) or not all(
        isinstance(word, str) for word in state["vocabulary"]
    ):
        raise BadInput(f"{path}: its vocabulary is not a list of words")
    if kind and state["kind"] != kind:
        raise BadInput(f"{path}: holds a {state['kind']} model, but a {kind} model is needed here")
    return state


def check_fit(model, weights, path):
    """BadInput that names the first tensor of a state dict that does not fit `model`, which may be a meta one."""
    own = model.state_dict()
    for name in [*own, *weights]:
        value = weights.get(name)
        if name not in weights or name not in own:
            where = "lacks" if name not in weights else "has an unknown"
            raise BadInput(
                f"{path}: {where} tensor {name!r}; it belongs to another kind or version of model"
            )
        if (
            not torch.is_tensor(value)
            or not value.is_floating_point()
            or value.layout != torch.strided
        ):
            raise BadInput(f"{path}: {name!r} is no tensor of floating-point numbers")
        if not value.isfinite().all():
            raise BadInput(f"{path}: tensor {name!r} holds numbers that are not finite")
        if name == "std" and not (value > 0).all():
            raise BadInput(
                f"{path}: its std, which scores are divided by, must be positive; "
                "train it with more clips to validate on"
            )
        if own[name].shape != value.shape or value.untyped_storage().nbytes() < value.nbytes:
            shapes = f"{tuple(value.shape)} in the file, {tuple(own[name].shape)} in the model"
            raise BadInput(f"{path}: tensor {name!r} has another shape: {shapes}")


def check_same_data(name, config, words, other_name, other_config, other_words):
    """BadInput that says how the clips or the prompts of two networks differ."""
    both = f"{name} and {other_name}"
    own, other = config.video_shape, other_config.video_shape
    if own != other:
        raise BadInput(f"{both} take clips of different shapes (C, T, H, W): {own} and {other}")
    own, other = config.max_text, other_config.max_text
    if own != other:
        raise BadInput(f"{both} take prompts of different lengths: {own} and {other} words")
    if list(words) != list(other_words):
        raise BadInput(f"{both} know different words; both must be trained on the same data")


def load_network(path, kind, network, config_of):
    """A checkpoint's network in eval mode and float32, its averaged weights where it has them, and its vocabulary.

    network: a module's class, made from config_of(**config). BadInput names what does not fit."""
    state = load_checkpoint(path, kind)
    if kind != "velocity" and state.get("evaluated") is False:
        raise BadInput(
            f"{path}: its scores get their unit at the end of the training; --resume it to the end first"
        )
    try:
        config = config_of(**state["config"])
        with torch.device(
            "meta"
        ):  # nothing is allocated before the file has shown that it holds so much
            blank = network(config)
        weights = dict(state.get("ema") or state["model"])
    except BadInput as error:
        raise BadInput(f"{path}: {error}") from None
    except (TypeError, ValueError, RuntimeError, ArithmeticError, AttributeError):
        raise BadInput(
            f"{path}: its config or its weights do not describe a {network.__name__}"
        ) from None
    check_fit(blank, weights, path)
    if len(state["vocabulary"]) > blank.config.vocab:
        raise BadInput(
            f"{path}: {len(state['vocabulary'])} words, but its model knows {blank.config.vocab}"
        )
    model = network(blank.config)
    model.load_state_dict(weights)
    return model.eval(), state["vocabulary"]
