"""diffusers' Wan text-to-video transformer as a velocity model, with the library's own adapters.

The adapters "policy" are trained. Flow-DPO's reference is the model with the adapters "reference",
which a policy that starts from a file has as well, or without any.
"""

import warnings
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn as nn
from diffusers import WanPipeline, WanTransformer3DModel
from peft import LoraConfig, get_peft_model_state_dict

from runtime.cli import BadInput


def first_line(error):
    return str(error).partition("\n")[0]


def load_transformer(path):
    """The float32 transformer in a folder of diffusers' format, or in its transformer/. BadInput
    unless it can be loaded safely and is the only one of its pipeline."""
    folder = path / "transformer" if (path / "transformer").is_dir() else path
    if not any(folder.glob("*.safetensors")):
        advice = ".bin files are pickles, which may run code: convert them by save_pretrained"
        raise BadInput(f"--model {folder}: holds no weights in .safetensors files; {advice}")
    if (folder.absolute().parent / "transformer_2").exists():
        fault = "has two experts, each for a part of t"
        raise BadInput(f"--model {path}: {fault}; give Wan2.1-T2V or Wan2.2-TI2V-5B, which are one")
    try:
        wan = WanTransformer3DModel.from_pretrained(
            folder, torch_dtype=torch.float32, local_files_only=True
        )
    except Exception as error:  # the library raises errors of many kinds
        raise BadInput(f"--model {folder}: cannot be loaded as Wan ({first_line(error)})") from None
    return wan.requires_grad_(False)


def write_tiny(path):
    """A random transformer of 37,000 parameters, in the form of a real one."""
    torch.manual_seed(0)
    heads = dict(num_attention_heads=2, attention_head_dim=12, num_layers=4)
    sizes = dict(ffn_dim=48, freq_dim=32, text_dim=8, rope_max_seq_len=32)
    WanTransformer3DModel(in_channels=4, out_channels=4, **heads, **sizes).save_pretrained(path)


@dataclass
class Width:
    """The config of adapters: the width of the transformer that they belong to."""

    dim: int


class Velocity(nn.Module):
    """forward(x_t (B, C, T, H, W), t (B,), y (B, S, D)) -> x1 - x0. Its parameters are those of a
    Wan transformer that are trained."""

    def __init__(self, wan):
        super().__init__()
        self.config = Width(wan.patch_embedding.out_channels)
        self.wan = (wan,)  # in a tuple: the frozen weights are neither trained nor saved
        self.trained = nn.ParameterList(p for p in wan.parameters() if p.requires_grad)

    def forward(self, x_t, t, y):
        (wan,) = self.wan
        return wan(x_t, 1000 * t, y, return_dict=False)[0].float()  # its clock runs to 1000


def add_adapters(wan, rank):
    """New trainable adapters on q, k, v and output of all self- and cross-attention (Table 10)."""
    layers = ["to_q", "to_k", "to_v", "to_out.0"]
    wan.add_adapter(LoraConfig(r=rank, lora_alpha=2 * rank, target_modules=layers), "policy")


def load_adapters(wan, path):
    """The adapters in a file, trainable, and again as the reference's."""
    # without use_safetensors the library leaves out alpha, which stands in the file's metadata
    settings = {"prefix": "transformer", "use_safetensors": True}
    try:
        with warnings.catch_warnings(action="ignore"):  # of a second adapter
            for name in ("reference", "policy"):
                wan.load_lora_adapter(str(path), adapter_name=name, **settings)
        wan.set_adapter("policy")
    except Exception as error:  # the library raises errors of many kinds
        fault = f"cannot be loaded as adapters of this model ({first_line(error)})"
        raise BadInput(f"--lora {path}: {fault}") from None


@contextmanager
def as_reference(wan):
    """Inside, `wan` is the reference that its policy started at."""
    if "reference" in wan.peft_config:
        wan.set_adapter("reference")
    else:
        wan.disable_adapters()
    yield
    wan.enable_adapters()
    wan.set_adapter("policy")


def write_adapters(wan, path):
    """Writes the policy's adapters to a safetensors file that the library's pipeline loads."""
    layers = get_peft_model_state_dict(wan, adapter_name="policy")
    settings = {"transformer_lora_adapter_metadata": wan.peft_config["policy"].to_dict()}
    WanPipeline.save_lora_weights(path.parent, layers, weight_name=path.name, **settings)
