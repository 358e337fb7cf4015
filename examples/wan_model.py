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

# ---------------------------------------------------------------------------------------------
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
        save_file(
            {name: tensor.detach().cpu() for name, tensor in tensors.items()},
            temporary,
            {"format": "pt"},
        )
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot write {path}: {error}") from None


def read_json(path):
    """The dict in a JSON file; an empty one if there is none."""
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def load_transformer(path):
    """The float32 transformer of a diffusers folder. BadInput unless it is complete, Wan's for text
    to video, and the only one of its model.

    The library's own from_pretrained needs a further package, and fills what a file lacks with
    random numbers."""
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    root, config = folder.absolute().parent, read_json(folder / "config.json")
    kind, channels = config.get("_class_name"), config.get("in_channels", 16)
    if kind is None:
        fault = "no config.json of a diffusers model in it or in its transformer/"
        raise BadInput(f"--model {path}: {fault}")
    if kind != "WanTransformer3DModel" or channels != config.get("out_channels", 16):
        fault = f"holds a {kind} that is not Wan's for text to video in diffusers' format"
        raise BadInput(f"--model {path}: {fault}")
    if (root / "transformer_2").exists() or read_json(root / "model_index.json").get(
        "boundary_ratio"
    ):
        fault = (
            "has two experts, transformer and transformer_2, each for a part of t; models of one"
        )
        raise BadInput(f"--model {path}: {fault} can be used here, Wan2.1-T2V or Wan2.2-TI2V-5B")
    tensors = {}
    for part in weight_files(folder):
        tensors |= read_safetensors(part)[0]
    try:
        wan = WanTransformer3DModel.from_config(config)
    except Exception as error:  # a wrong value can fail anywhere in the library
        fault = str(error).partition("\n")[0]
        raise BadInput(
            f"{folder / 'config.json'}: not the sizes of a Wan model ({fault})"
        ) from None
    check_fit(wan, tensors, folder)
    wan.load_state_dict(tensors)
    return wan


def weight_files(folder):
    """The .safetensors files of a model. BadInput if there are none, or fewer than its index names."""
    parts = sorted(folder.glob("diffusion_pytorch_model*.safetensors"))
    index = read_json(folder / "diffusion_pytorch_model.safetensors.index.json")
    missing = set(index.get("weight_map", {}).values()) - {part.name for part in parts}
    if missing:
        raise BadInput(f"{folder}: lacks {min(missing)}, which its index names; download it again")
    if not parts and any(folder.glob("*.bin")):
        fault = "its weights are .bin files, pickles that may run code; save it as safetensors, by"
        raise BadInput(f"{folder}: {fault} diffusers' from_pretrained and save_pretrained")
    if not parts:
        raise BadInput(f"{folder}: has no weights, diffusion_pytorch_model*.safetensors")
    return parts


def write_tiny(path):
    """A random transformer of 37,000 parameters, in the form of a real one."""
    torch.manual_seed(0)
    sizes = dict(
        num_attention_heads=2, attention_head_dim=12, num_layers=4, ffn_dim=48, freq_dim=32
    )
    wan = WanTransformer3DModel(
        in_channels=4, out_channels=4, text_dim=8, rope_max_seq_len=32, **sizes
    )
    try:
        wan.save_pretrained(path)
    except OSError as error:
        raise BadInput(f"cannot write to {path}: {error.strerror}") from None


# ---------------------------------------------------------------------------------------------
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
            condition, modulation, text, _ = wan.condition_embedder(
                1000 * t, y
            )  # (B, d), (B, 6 d), (B, S, d)
            video = wan.patch_embedding(x_t)  # (B, d, T, H, W)
            grid, hidden = video.shape[2:], video.flatten(2).transpose(1, 2)  # (B, N, d)
            for block in wan.blocks[: len(wan.blocks) // 4]:
                hidden = block(hidden, text, modulation.unflatten(1, (6, -1)), table)
        return self.head(hidden.float(), grid, text.float(), F.silu(condition.float()))


# ---------------------------------------------------------------------------------------------
# Adapters


def add_adapter(wan, name, rank):
    adapter = LoRALinear(wan.get_submodule(name), rank, alpha=2 * rank)  # Table 10
    wan.set_submodule(name, adapter)
    return adapter


def add_adapters(wan, rank):
    """Trainable adapters, float32, on q, k, v and output of all self- and cross-attention."""
    for name in [
        name
        for name, _ in wan.named_modules()
        if name.endswith((".to_q", ".to_k", ".to_v", ".to_out.0"))
    ]:
        add_adapter(wan, name, rank)


def write_adapters(wan, initial, path):
    """Writes the sum of wan's adapters and of the `initial` ones {layer: (A, B)}, which its weights
    hold already: B1 A1 x + B2 A2 x = [B1 B2] [A1; A2] x. Without alpha, so that B holds the scale."""
    adapters = dict(initial)
    for name, layer in wan.named_modules():
        if isinstance(layer, LoRALinear):
            a, b = layer.down.detach().cpu(), (layer.scale * layer.up).detach().cpu()
            if name in initial:
                a, b = torch.cat((initial[name][0], a)), torch.cat((initial[name][1], b), 1)
            adapters[name] = a, b
    tensors = {f"transformer.{name}.lora_A.weight": a for name, (a, _) in adapters.items()}
    tensors |= {f"transformer.{name}.lora_B.weight": b for name, (_, b) in adapters.items()}
    write_safetensors(tensors, path)


def read_adapters(wan, path):
    """The adapters {layer: (A (rank, in), B (out, rank))} of a file, written here or by the library;
    the scale is in B. BadInput names the first that does not fit."""
    tensors, notes = read_safetensors(path)
    tensors = {name.removeprefix("transformer."): value for name, value in tensors.items()}
    notes = json.loads(notes.get("lora_adapter_metadata", "{}"))
    notes = {name.removeprefix("transformer."): value for name, value in notes.items()}
    alpha = notes.get("lora_alpha")
    if (
        notes.get("alpha_pattern")
        or notes.get("use_rslora")
        or not isinstance(alpha, int | float | None)
    ):
        fault = "its scale is not alpha / rank with one alpha, which is all that can be read here"
        raise BadInput(f"{path}: {fault}")
    if not tensors:
        raise BadInput(f"{path}: holds no adapter")
    modules, adapters = wan.named_modules(), {}
    linear = {name: layer.weight.shape for name, layer in modules if isinstance(layer, nn.Linear)}
    for name, tensor in tensors.items():
        layer, _, side = name.rpartition(".lora_")
        a, b = (tensors.get(f"{layer}.lora_{side}.weight", torch.empty(0, 0)) for side in "AB")
        shape = (*b.shape[:-1], *a.shape[1:]) if len(a) and b.shape[-1:] == a.shape[:1] else None
        if shape is None or linear.get(layer) != shape or side not in ("A.weight", "B.weight"):
            fault = "does not fit; it is no adapter, or one of another model"
            raise BadInput(f"{path}: tensor {name!r} {fault}")
        if not tensor.isfinite().all():
            raise BadInput(f"{path}: tensor {name!r} holds numbers that are not finite")
        scale = 1.0 if alpha is None else alpha / len(a)
        adapters[layer] = a.float(), scale * b.float()
    return adapters


def attach_adapters(wan, adapters):
    """Adds them as layers of their own, which lora_disabled turns off."""
    for layer, (a, b) in adapters.items():
        adapter = add_adapter(wan, layer, len(a))
        adapter.down.data.copy_(a)
        adapter.up.data.copy_(b / adapter.scale)


def merge_adapters(wan, adapters):
    """Adds them to the weights for good."""
    for layer, (a, b) in adapters.items():
        wan.get_submodule(layer).weight.data += b @ a
