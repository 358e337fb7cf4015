"""Checkpoints: torch files that are written atomically and read safely (weights_only=True).

A checkpoint is a dict: format (1), kind ("velocity", "reward" or "noisy reward"), config, the
vocabulary in the order of its ids, model (the state dict, averaged where it is), step, evaluated
(False while a reward is not calibrated), and, of a run, settings and training (resume.py).
"""

import os
import warnings
from contextlib import suppress
from pathlib import Path

import torch

from runtime.cli import BadInput

FORMAT = 1
WEIGHTS = Path(__file__).parent.parent / "weights"


def save_checkpoint(path, state):
    """Replaces the file `path` by a checkpoint, atomically. BadInput if it cannot be written; an
    older file then stays."""
    path = Path(path)
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            torch.save({"format": FORMAT, **state}, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # torch raises RuntimeError if a write fails
        with suppress(OSError):
            temporary.unlink()
        fault = getattr(error, "strerror", None) or "the disk is full, or the file is too large"
        raise BadInput(f"cannot write {path}: {fault}") from None


def load_checkpoint(path, kind=None):
    """The dict in a checkpoint. BadInput for a missing, damaged or unsafe file, or another kind."""
    if not Path(path).is_file():
        raise BadInput(f"{path}: no such checkpoint; train one with `python train.py`")
    try:
        with warnings.catch_warnings(action="ignore"):
            state = torch.load(path, map_location="cpu", weights_only=True)
        words, found, version = state["vocabulary"], str(state["kind"]), int(state["format"])
        valid = isinstance(words, list) and all(isinstance(word, str) for word in words)
        valid = valid and {"config", "model"} <= state.keys()
    except Exception:  # a damaged file can make torch raise anything
        valid = False
    if not valid:
        fault = "damaged, or not written by train.py"
        raise BadInput(f"{path}: not a checkpoint that can be read safely ({fault})")
    if version != FORMAT:
        raise BadInput(f"{path}: has format {version}; this version reads format {FORMAT}")
    if kind and found != kind:
        raise BadInput(f"{path}: holds a {found} model, but a {kind} model is needed here")
    return state


def check_fit(model, weights, path):
    """BadInput that names the first tensor of a state dict that does not fit `model`."""
    own = model.state_dict()
    for name in [*own, *weights]:
        if name not in weights or name not in own:
            fault = "lacks" if name in own else "has an unknown"
            raise BadInput(f"{path}: {fault} tensor {name!r}; it belongs to another kind of model")
        value, shape = weights[name], own[name].shape
        valid = torch.is_tensor(value) and value.shape == shape and value.is_floating_point()
        if not valid or not value.isfinite().all():
            fault = f"must hold finite floating-point numbers of shape {tuple(shape)}"
            raise BadInput(f"{path}: tensor {name!r} {fault}")
        if name == "std" and not (value > 0).all():
            raise BadInput(f"{path}: its std is not positive; train it with more clips to validate")


def check_same_data(name, config, words, other_name, other_config, other_words):
    """BadInput if two networks take other clips (C, T, H, W), numbers of words or vocabularies."""
    own, other = ((*c.video_shape, c.max_text) for c in (config, other_config))
    if own != other:
        fault = f"take other clips (C, T, H, W) or numbers of words: {own} and {other}"
        raise BadInput(f"{name} and {other_name} {fault}")
    if list(words) != list(other_words):
        raise BadInput(f"{name} and {other_name} know other words; train both on the same data")


def load_network(path, kind, network, config_of, old_names={}):
    """(network, vocabulary) of a checkpoint: network(config_of(**config)), in eval mode and
    float32. BadInput says what does not fit. old_names: {tensor in older files: name now}."""
    state = load_checkpoint(path, kind)
    if kind != "velocity" and state.get("evaluated") is False:
        fault = "its scores get their unit at the end of the training; --resume it to the end first"
        raise BadInput(f"{path}: {fault}")
    try:
        weights = {old_names.get(name, name): value for name, value in state["model"].items()}
        config = config_of(**state["config"])
        with torch.device("meta"):  # allocates nothing before the file has proved its size
            blank = network(config)
    except ValueError as error:
        raise BadInput(f"{path}: {error}") from None
    except (TypeError, RuntimeError, ArithmeticError, AttributeError):
        fault = f"its config or its weights do not describe a {network.__name__}"
        raise BadInput(f"{path}: {fault}") from None
    check_fit(blank, weights, path)
    words = state["vocabulary"]
    if len(words) > blank.config.vocab:
        raise BadInput(f"{path}: {len(words)} words, but its model knows {blank.config.vocab}")
    model = network(blank.config)
    model.load_state_dict(weights)
    return model.eval(), words
