"""diffusers' Wan text-to-video transformer as a velocity model: its weights, reward and adapters.

Adapters are a safetensors file in the library's own format. For a layer NAME it holds
transformer.NAME.lora_A.weight (rank, in) and .lora_B.weight (out, rank), and adds B A x to the
layer's output, times alpha / rank where the file's metadata give an alpha.
"""

import json
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from diffusers import WanTransformer3DModel
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from lora import LoRALinear
from nrg import RewardHead
from runtime.cli import BadInput


def load_transformer(path):
    """The float32 transformer in a folder of diffusers' format, or in its transformer/. BadInput
    unless it is Wan's for text to video, complete, and the only one of its pipeline."""
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    pipeline = folder.absolute().parent
    if not any(folder.glob("*.safetensors")):
        fault = "holds no weights in .safetensors files"
        if any(folder.glob("*.bin")):
            fault += "; its .bin files are pickles, which may run code: save it as safetensors, "
            fault += "by diffusers' from_pretrained and save_pretrained"
        raise BadInput(f"--model {folder}: {fault}")
    try:
        index = pipeline / "model_index.json"
        boundary = index.is_file() and json.loads(index.read_text()).get("boundary_ratio")
        wan, info = WanTransformer3DModel.from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True, output_loading_info=True
        )
    except Exception as error:  # the library raises errors of many kinds
        fault = str(error).partition("\n")[0]
        raise BadInput(f"--model {folder}: cannot be loaded as Wan ({fault})") from None
    if boundary or (pipeline / "transformer_2").exists():
        raise BadInput(
            f"--model {path}: has two experts, transformer and transformer_2, each for a part of "
            "t; give a model of one, Wan2.1-T2V or Wan2.2-TI2V-5B"
        )
    if info["missing_keys"]:
        raise BadInput(f"--model {folder}: lacks the tensor {min(info['missing_keys'])}")
    if wan.config.in_channels != wan.config.out_channels:
        raise BadInput(f"--model {folder}: takes images; a model for text to video is needed")
    return wan.requires_grad_(False)


def write_tiny(path):
    """A random transformer of 37,000 parameters, in the form of a real one."""
    torch.manual_seed(0)
    heads = dict(num_attention_heads=2, attention_head_dim=12, num_layers=4)
    sizes = dict(ffn_dim=48, freq_dim=32, text_dim=8, rope_max_seq_len=32)
    WanTransformer3DModel(in_channels=4, out_channels=4, **heads, **sizes).save_pretrained(path)


@dataclass
class Width:
    """The config of adapters or a reward: the width of the transformer that they belong to."""

    dim: int


def width_of(wan):
    return Width(wan.config.num_attention_heads * wan.config.attention_head_dim)


class Velocity(nn.Module):
    """forward(x_t (B, C, T, H, W), t (B,), y (B, S, D)) -> x1 - x0. Its parameters are those of a
    Wan transformer that are trained."""

    def __init__(self, wan):
        super().__init__()
        self.config = width_of(wan)
        self.wan = (wan,)  # in a tuple: the frozen weights are neither trained nor saved
        self.trained = nn.ParameterList(p for p in wan.parameters() if p.requires_grad)

    def forward(self, x_t, t, y):
        (wan,) = self.wan
        return wan(x_t, 1000 * t, y, return_dict=False)[0].float()  # its clock runs to 1000


class WanReward(RewardHead):
    """forward(x_t, t, y) -> scores (B, 3), from the video tokens after the first quarter of the
    blocks of a Wan without adapters. Cross-attention has brought the prompt into these tokens."""

    def __init__(self, wan):
        super().__init__(width_of(wan).dim)
        self.config = width_of(wan)
        self.wan = (wan,)

    def forward(self, x_t, t, y):
        (wan,) = self.wan
        rotary = wan.rope(x_t)
        condition, modulation, text, _ = wan.condition_embedder(1000 * t, y)
        modulation = modulation.unflatten(1, (6, -1))  # (B, 6, d)
        video = wan.patch_embedding(x_t)  # (B, d, T, H, W)
        hidden = video.flatten(2).transpose(1, 2)  # (B, N, d)
        for block in wan.blocks[: len(wan.blocks) // 4]:
            hidden = block(hidden, text, modulation, rotary)
        return self.head(hidden, video.shape[2:], text, F.silu(condition))


def add_adapters(wan, rank):
    """Trainable adapters on q, k, v and output of all self- and cross-attention."""
    layers = (".to_q", ".to_k", ".to_v", ".to_out.0")
    for name in [name for name, _ in wan.named_modules() if name.endswith(layers)]:
        linear = wan.get_submodule(name)
        wan.set_submodule(name, LoRALinear(linear, rank, alpha=2 * rank))  # Table 10


def merge_adapters(wan, path):
    """Adds the adapters in a file of ours or of the library to wan's weights; returns them as
    {layer: (A (rank, in), B (out, rank))}, with the scale in B."""
    try:
        with safe_open(path, "pt") as file:
            names = {name.removeprefix("transformer."): name for name in file.keys()}
            tensors = {name: file.get_tensor(own).float() for name, own in names.items()}
            metadata = json.loads((file.metadata() or {}).get("lora_adapter_metadata", "{}"))
    except (OSError, SafetensorError, ValueError) as error:
        raise BadInput(f"{path}: not a safetensors file that can be read ({error})") from None
    metadata = {name.removeprefix("transformer."): value for name, value in metadata.items()}
    if metadata.get("alpha_pattern") or metadata.get("use_rslora"):
        raise BadInput(f"{path}: only adapters of one alpha, scaled by alpha / rank, can be read")
    adapters = {}
    for name, layer in wan.named_modules():
        name_a, name_b = (f"{name}.lora_{side}.weight" for side in "AB")
        if isinstance(layer, nn.Linear) and name_a in tensors and name_b in tensors:
            a, b = tensors.pop(name_a), tensors.pop(name_b)
            if a.shape[1:] != (layer.in_features,) or b.shape != (layer.out_features, len(a)):
                raise BadInput(f"{path}: the adapter of {name} has the shape of another model's")
            if not a.isfinite().all() or not b.isfinite().all():
                raise BadInput(f"{path}: the adapter of {name} holds numbers that are not finite")
            b = b * (metadata.get("lora_alpha", len(a)) / len(a))
            layer.weight.data += b @ a
            adapters[name] = a, b
    if tensors or not adapters:
        fault = f"tensor {min(tensors)!r} is no adapter" if tensors else "holds no adapter"
        raise BadInput(f"{path}: {fault} of a layer of this model")
    return adapters


def write_adapters(wan, initial, path):
    """Writes the sum of wan's adapters and of the `initial` ones {layer: (A, B)}, which its weights
    contain: B1 A1 x + B2 A2 x = [B1 B2] [A1; A2] x."""
    adapters = dict(initial)
    for name, layer in wan.named_modules():
        if isinstance(layer, LoRALinear):
            a, b = layer.down.detach().cpu(), (layer.scale * layer.up).detach().cpu()
            if name in initial:
                a, b = torch.cat((initial[name][0], a)), torch.cat((initial[name][1], b), 1)
            adapters[name] = a, b
    tensors = {f"transformer.{name}.lora_A.weight": a for name, (a, _) in adapters.items()}
    tensors |= {f"transformer.{name}.lora_B.weight": b for name, (_, b) in adapters.items()}
    try:
        save_file(tensors, path.with_suffix(".tmp"), {"format": "pt"})
        path.with_suffix(".tmp").replace(path)  # `path` is always the old file or the new one
    except (OSError, SafetensorError) as error:
        raise BadInput(f"cannot write {path}: {error}") from None
