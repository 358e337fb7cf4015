"""What a device can do."""

import torch


def has_bf16(device):
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    features = torch.cpu.get_capabilities() if device.type == "cpu" else {}
    return any(features.get(name) for name in ("avx512_bf16", "amx_bf16", "bf16"))
