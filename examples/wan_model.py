"""diffusers' Wan text-to-video transformer as a velocity model of this project: weights, velocity, reward, adapters.

Adapters are one safetensors file in the library's own format: a layer NAME has transformer.NAME.lora_A.weight (rank,
in) and .lora_B.weight (out, rank), and adds B A x, times alpha / rank where the file's notes give an alpha.
"""

import json

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora import LoRALinear, lora_disabled
from nrg import RewardHead
from runtime.checkpoint import check_fit
from runtime.cli import BadInput

# ---------------------------------------------------------------------------------------------------------------------
# Weights


def read_safetensors(path):
    """({name: tensor}, notes) of a file."""
    try:
        with safe_open(path, "pt") as file:
            return {name: file.get_tensor(name) for name in file.keys()}, file.metadata() or {}
    except (OSError, SafetensorError) as error:
        raise BadInput(f"{path}: not a safetensors file that can be read ({error})") from None


def write_safetensors(tensors, path):
    """Writes a file so that `path` is at every moment either the old one or the whole new one."""
    temporary = path.with_suffix(".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        save_file({name: tensor.detach().cpu() for name, tensor in tensors.items()}, temporary, {"format": "pt"})
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot write {path}: {error}") from None


def load_transformer(path):
    """The float32 transformer of a diffusers folder. BadInput unless it is Wan's for text to video, and complete.

    The library's own from_pretrained needs a further package, and fills what a file lacks with random numbers."""
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    try:
        config = json.loads((folder / "config.json").read_text())
        kind = config["_class_name"]
    except (OSError, ValueError, KeyError, TypeError):
        raise BadInput(f"--model {path}: no config.json of a diffusers model in it or in its transformer/") from None
    if kind != "WanTransformer3DModel" or config.get("in_channels", 16) != config.get("out_channels", 16):
        raise BadInput(f"--model {path}: holds a {kind} that is not Wan's for text to video")
    tensors = {}
    for part in sorted(folder.glob("diffusion_pytorch_model*.safetensors")):
        tensors |= read_safetensors(part)[0]
    wan = WanTransformer3DModel.from_config(config)
    check_fit(wan, tensors, folder)
    wan.load_state_dict(tensors)
    return wan


def write_tiny(path):
    """A random transformer of 37,000 parameters, in the form of a real one."""
    torch.manual_seed(0)
    sizes = dict(num_attention_heads=2, attention_head_dim=12, num_layers=4, ffn_dim=48, freq_dim=32)
    wan = WanTransformer3DModel(in_channels=4, out_channels=4, text_dim=8, rope_max_seq_len=32, **sizes)
    try:
        wan.save_pretrained(path)
    except OSError as error:
        raise BadInput(f"cannot write to {path}: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------------------------------
# Velocity and reward


def mixed(x):
    """On a GPU matrices are multiplied in bfloat16; all weights are float32."""
    return torch.autocast(x.device.type, torch.bfloat16, enabled=x.device.type == "cuda")


def velocity(wan):
    """v = model(x_t (B, C, T, H, W), t (B,), y (B, S, D)). Wan predicts x1 - x0, as here, at times from 0 to 1000."""

    def model(x_t, t, y):
        with mixed(x_t):
            return wan(x_t, 1000 * t, y, return_dict=False)[0].float()

    return model


class WanReward(RewardHead):
    """forward(x_t, t, y) -> scores (B, 3), from the video tokens after the first quarter of Wan's blocks, adapters off.
    These tokens hold the prompt too, by cross-attention."""

    def __init__(self, wan):
        super().__init__(wan.config.num_attention_heads * wan.config.attention_head_dim)
        self.trunk = (wan,)  # in a tuple: no part of what is trained and saved

    def forward(self, x_t, t, y):
        (wan,) = self.trunk
        with lora_disabled(wan), mixed(x_t):
            table = wan.rope(x_t)
            condition, modulation, text, _ = wan.condition_embedder(1000 * t, y)  # (B, d), (B, 6 d), (B, S, d)
            video = wan.patch_embedding(x_t)  # (B, d, T, H, W)
            grid, hidden = video.shape[2:], video.flatten(2).transpose(1, 2)  # (B, N, d)
            for block in wan.blocks[: len(wan.blocks) // 4]:
                hidden = block(hidden, text, modulation.unflatten(1, (6, -1)), table)
        return self.head(hidden.float(), grid, text.float(), F.silu(condition.float()))


# ---------------------------------------------------------------------------------------------------------------------
# Adapters


def add_adapter(wan, name, rank):
    adapter = LoRALinear(wan.get_submodule(name), rank, alpha=2 * rank)  # Table 10
    wan.set_submodule(name, adapter)
    return adapter


def add_adapters(wan, rank):
    """Trainable adapters, float32, on q, k, v and output of all self- and cross-attention."""
    for name in [name for name, _ in wan.named_modules() if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))]:
        add_adapter(wan, name, rank)


def adapter_tensors(wan):
    """{name: tensor} to save: without alpha, so that B holds the scale."""
    layers = {name: layer for name, layer in wan.named_modules() if isinstance(layer, LoRALinear)}
    down = {f"transformer.{name}.lora_A.weight": layer.down for name, layer in layers.items()}
    return down | {f"transformer.{name}.lora_B.weight": layer.scale * layer.up for name, layer in layers.items()}


def load_adapters(wan, path):
    """Adds the adapters of a file, written here or by the library. BadInput names the first that does not fit."""
    tensors, notes = read_safetensors(path)
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    notes = json.loads(notes.get("lora_adapter_metadata", "{}"))
    notes = {name.removeprefix("transformer."): value for name, value in notes.items()}
    if notes.get("alpha_pattern") or notes.get("use_rslora"):
        raise BadInput(f"{path}: its scale is not alpha / rank with one alpha, which is all that can be read here")
    linear = {name: layer.weight.shape for name, layer in wan.named_modules() if isinstance(layer, nn.Linear)}
    for name in tensors:
        layer, _, side = name.rpartition(".lora_")
        a, b = (tensors.get(f"{layer}.lora_{side}.weight", torch.empty(0, 0)) for side in "AB")
        shape = (*b.shape[:-1], *a.shape[1:]) if len(a) and b.shape[-1:] == a.shape[:1] else None
        if shape is None or linear.get(layer) != shape or side not in ("A.weight", "B.weight"):
            raise BadInput(f"{path}: tensor {name!r} does not fit; it is no adapter, or one of another model")
        if side == "A.weight":
            adapter = add_adapter(wan, layer, len(a))
            adapter.down.data.copy_(a)
            adapter.up.data.copy_(b * (notes.get("lora_alpha", len(a)) / len(a) / adapter.scale))
