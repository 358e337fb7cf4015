"""The video generator: a flow-matching transformer v = model(x_t, t, y) (section 4.1, appendix D).

Conventions, here and everywhere in this code base:

    x0   data, at t = 0            x_t = (1 - t) x0 + t x1         v = x1 - x0, which it predicts
    x1   noise, at t = 1           x0_hat = x_t - t v_hat          sampling runs t from 1 to 0

    videos (B, C, T, H, W) float in [-1, 1]    t (B,) in [0, 1]    y (B, S) word ids, 0 is padding

Text and video tokens form one sequence with full self-attention. Time and pooled prompt modulate
every block (adaLN-zero). The paper's closed model has spatial and 3D attention, T5 and 1 B weights.

The last layer predicts x0, and the model returns v = (x_t - x0_hat) / t. A token has fewer channels
than a patch has numbers, so it cannot carry the patch's noise, as a network that outputs v must.
For the same reason a patch enters and leaves by its lowest frequencies at the start, and the last
layer has no normalisation.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import attention
from kernels.tiles import SlidingTiles, parse_attention
from lora import add_lora, lora_disabled, merge_lora  # noqa: F401 re-exported
from runtime.checkpoint import load_network


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a VideoTransformer. ValueError for sizes that do not fit together."""

    frames: int = 8
    size: int | tuple = 32  # height and width, or (height, width) where they differ
    channels: int = 3
    patch: tuple = (2, 8, 8)  # divides (frames, height, width)
    dim: int = 128
    depth: int = 6
    heads: int = 4
    vocab: int = 32  # word ids
    max_text: int = 8  # words of a prompt
    t_floor: float = 0.05  # v = (x_t - x0_hat) / max(t, t_floor)
    attention: str = "full"  # or "tile:T,H,W", see kernels/tiles.py

    def __post_init__(self):
        object.__setattr__(self, "patch", tuple(self.patch))
        if isinstance(self.size, tuple | list):
            height, width = self.size
            object.__setattr__(self, "size", height if height == width else (height, width))
        sizes = dict(zip(("channels", "frames", "height", "width"), self.video_shape))
        for name in ("dim", "depth", "heads", "vocab", "max_text"):
            sizes[name] = getattr(self, name)
        for name, value in sizes.items():
            most = 512 if name == "depth" else 2**20  # so that no file asks for terabytes
            if type(value) is not int or not 1 <= value <= most:
                raise ValueError(f"{name} {value!r} must be a whole number from 1 to {most}")
        if len(self.patch) != 3 or any(type(side) is not int or side < 1 for side in self.patch):
            raise ValueError(f"patch {self.patch} must be three whole numbers above 0")
        if math.prod(self.patch) > 4096:
            raise ValueError(f"patch {self.patch} must have at most 4096 pixels")
        for name, side in zip(("frames", "height", "width"), self.patch):
            if sizes[name] % side:
                raise ValueError(f"{name} {sizes[name]} is not a multiple of the patch's {side}")
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise ValueError(f"dim {self.dim} over {self.heads} heads must be a whole, even number")
        if math.prod(self.grid) > 2**20:
            raise ValueError(f"{math.prod(self.grid)} patches in a clip; at most {2**20} fit")
        parse_attention(self.attention, self.grid)

    @property
    def video_shape(self):
        """(C, T, H, W)"""
        height, width = self.size if isinstance(self.size, tuple) else (self.size, self.size)
        return self.channels, self.frames, height, width

    @property
    def grid(self):
        """Tokens along (t, h, w)."""
        return tuple(n // side for n, side in zip(self.video_shape[1:], self.patch))


LATENTS = {"size": 32, "channels": 16, "patch": (1, 2, 2)}
PRESETS = {
    # for a CPU: 3 M parameters, 32 video tokens
    "nano": ModelConfig(patch=(4, 8, 8), dim=160, heads=5),
    # for one GPU: 33 M, 512 tokens
    "small": ModelConfig(frames=16, size=64, dim=384, depth=12, heads=6),
    # for latents: 131 M and 2,048 tokens; 1,032 M, the paper's scale, and 4,096 tokens
    "base": ModelConfig(**LATENTS, dim=768, depth=12, heads=12, max_text=64),
    "large": ModelConfig(**LATENTS, frames=16, dim=1536, depth=24, heads=24, max_text=128),
}


# ---------------------------------------------------------------------------------------------
# Parts


def patchify(x, patch):
    """(B, C, T, H, W) -> (B, tokens, C * patch volume), tokens in (t, h, w) order."""
    b, c, t, h, w = x.shape
    pt, ph, pw = patch
    x = x.reshape(b, c, t // pt, pt, h // ph, ph, w // pw, pw)
    return x.permute(0, 2, 4, 6, 1, 3, 5, 7).reshape(b, -1, c * pt * ph * pw)


def unpatchify(tokens, shape, patch):
    """The inverse of patchify; shape = (C, T, H, W)."""
    c, t, h, w = shape
    pt, ph, pw = patch
    x = tokens.reshape(-1, t // pt, h // ph, w // pw, c, pt, ph, pw)
    return x.permute(0, 4, 1, 5, 2, 6, 3, 7).reshape(-1, c, t, h, w)


def time_features(t, dim):
    """Cosines and sines of t (B,), wavelengths from 2 pi / 1000 to 20 pi: (B, dim) float32."""
    exponent = -math.log(10000.0) * torch.arange(dim // 2, device=t.device) / (dim // 2)
    frequency = 1000.0 * torch.exp(exponent)
    angle = t.float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), 1)


def rope(grid, head_dim, theta=100.0):
    """Cosines and signed sines (2, T*H*W, head_dim) of tokens in (t, h, w) order on `grid`.

    Channel i pairs with i + head_dim / 2. A pair turns by an angle proportional to the token's
    frame, row or column, so that a logit depends on how far apart two tokens are. A quarter of the
    pairs turn with the frame, three eighths each with row and column. No wavelength is longer than
    2 pi theta tokens: a clip has a few dozen tokens a side, so theta is 100, not text's 10,000."""
    pairs = head_dim // 2
    split = (pairs - 2 * (pairs * 3 // 8), pairs * 3 // 8, pairs * 3 // 8)
    positions = torch.meshgrid(*(torch.arange(n, dtype=torch.float32) for n in grid), indexing="ij")
    angles = []
    for count, position in zip(split, positions):
        frequency = theta ** -(torch.arange(count, dtype=torch.float32) / max(count, 1))
        angles.append(position.flatten()[:, None] * frequency)
    angles = torch.cat(angles, 1)  # (N, pairs)
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((torch.cat((cos, cos), 1), torch.cat((-sin, sin), 1)))


def no_rope(count, head_dim):
    """The same (2, count, head_dim) for tokens without a place: they do not turn."""
    return torch.stack((torch.ones(count, head_dim), torch.zeros(count, head_dim)))


def apply_rope(x, rope):
    """Turns x (B, N, heads, head_dim), each token by its row of rope (2, N, head_dim)."""
    cos, sin = rope[:, :, None]  # (N, 1, head_dim) each
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def rms_norm(x, weight, eps=1e-6):
    """x (..., d) over its root mean square, times weight (d,), in float32 or wider."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class Attention(nn.Module):
    """Multi-head self-attention with RoPE and qk-norm, which bounds the logits.

    With `context` = n the first n tokens see only each other and the rest see all. That takes two
    unmasked calls, which every kernel does fast, in place of a mask."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.q_norm = nn.Parameter(torch.ones(dim // heads))
        self.k_norm = nn.Parameter(torch.ones(dim // heads))

    def forward(self, x, rope, context=None, tiles=None):
        b, n, _ = x.shape
        q, k, v = self.qkv(x).reshape(b, n, 3, self.heads, -1).unbind(2)  # (B, N, heads, head_dim)
        q = apply_rope(rms_norm(q, self.q_norm), rope).to(v.dtype)
        k = apply_rope(rms_norm(k, self.k_norm), rope).to(v.dtype)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, heads, N, head_dim)
        if context is None:
            mixed = attention(q, k, v, tiles)  # (B, heads, N, head_dim)
        else:
            inner = attention(q[:, :, :context], k[:, :, :context], v[:, :, :context])
            mixed = torch.cat((inner, attention(q[:, :, context:], k, v)), 2)
        return self.out(mixed.transpose(1, 2).reshape(b, n, -1))  # (B, N, d)


def mlp(dim):
    return nn.Sequential(nn.Linear(dim, 4 * dim), nn.GELU(), nn.Linear(4 * dim, dim))


def modulate(x, shift, scale):
    return x * (1 + scale) + shift


class Block(nn.Module):
    """Attention and MLP, each shifted, scaled and gated by the condition c (adaLN-zero)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp = mlp(dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x, c, rope, tiles=None):
        modulation = self.modulation(c)[:, None]  # (B, 1, 6 d)
        shift1, scale1, gate1, shift2, scale2, gate2 = modulation.chunk(6, -1)  # (B, 1, d) each
        h = modulate(self.norm1(x), shift1, scale1)  # (B, N, d)
        x = x + gate1 * self.attn(h, rope, tiles=tiles)  # (B, N, d)
        h = modulate(self.norm2(x), shift2, scale2)  # (B, N, d)
        return x + gate2 * self.mlp(h)  # (B, N, d)


def maybe_checkpoint(enabled, block, *inputs):
    """block(*inputs), by gradient checkpointing if it is enabled."""
    if enabled and torch.is_grad_enabled():
        return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)
    return block(*inputs)


def low_pass(config):
    """(dim, C * patch volume), orthonormal rows: per channel a patch's lowest 3D cosines."""
    axes = []
    for n in config.patch:
        k = torch.arange(n)[:, None]
        i = torch.arange(n)
        basis = torch.cos(math.pi * k * (i + 0.5) / n) * (2 / n) ** 0.5  # DCT-II: k half periods
        axes.append(torch.where(k == 0, basis / 2**0.5, basis))
    basis = torch.kron(torch.kron(axes[0], axes[1]), axes[2])  # (volume, volume)
    frequency = torch.cartesian_prod(*(torch.arange(n) / n for n in config.patch)).square().sum(1)
    lowest = basis[frequency.argsort(stable=True)[: config.dim // config.channels]]
    rows = torch.block_diag(*[lowest] * config.channels)
    return F.pad(rows, (0, 0, 0, config.dim - len(rows)))


class VideoTransformer(nn.Module):
    """Velocity model. forward(x_t, t, y) -> v; ValueError for a video of another shape.

    A reward or a second policy can share the first blocks: embed, run and head make up forward.
    Between them video tokens lie in the order of `tiles`."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        dim, volume = config.dim, config.channels * math.prod(config.patch)
        self.patch_in = nn.Linear(volume, dim)
        self.words = nn.Embedding(config.vocab, dim)
        self.places = nn.Parameter(torch.zeros(config.max_text, dim))
        self.time = nn.Sequential(nn.Linear(dim, dim), nn.SiLU(), nn.Linear(dim, dim))
        self.pooled = nn.Linear(dim, dim)
        self.blocks = nn.ModuleList(Block(dim, config.heads) for _ in range(config.depth))
        self.modulation = nn.Linear(dim, 2 * dim)
        self.patch_out = nn.Linear(dim, volume)
        self.tiles = SlidingTiles(config.attention, config.grid, config.max_text)
        head_dim = dim // config.heads
        words = no_rope(config.max_text, head_dim)
        video = self.tiles.sort(rope(config.grid, head_dim))
        self.register_buffer("rope", torch.cat((words, video), 1), persistent=False)
        self.grad_checkpoint = False  # recompute each block in backward, to save memory
        self.initialize_weights()

    def initialize_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(self.words.weight, std=0.5)  # tells words apart from the first step on
        nn.init.normal_(self.places, std=0.02)
        for block in self.blocks:  # every block starts as the identity
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.modulation.weight)
        # A random projection is slow to learn which numbers of a patch matter: start as a low pass
        self.patch_in.weight.data.copy_(low_pass(self.config))
        self.patch_out.weight.data.copy_(low_pass(self.config).T)

    def embed(self, x_t, t, y):
        """The blocks' input: tokens (B, S + N, d), words first, and the condition (B, d)."""
        shape = self.config.video_shape
        if x_t.shape[1:] != shape:
            raise ValueError(f"video of shape {tuple(x_t.shape)}; this model takes B x {shape}")
        words = self.words(y)  # (B, S, d)
        video = self.patch_in(patchify(x_t, self.config.patch))  # (B, N, d)
        hidden = torch.cat((words + self.places, self.tiles.sort(video)), 1)  # (B, S + N, d)
        time = self.time(time_features(t, self.config.dim).to(words.dtype))  # (B, d)
        return hidden, F.silu(time + self.pooled(words.mean(1)))

    def run(self, hidden, condition, start, stop):
        """Blocks start to stop - 1 on hidden (B, S + N, d)."""
        for block in self.blocks[start:stop]:
            inputs = hidden, condition, self.rope, self.tiles
            hidden = maybe_checkpoint(self.grad_checkpoint, block, *inputs)
        return hidden

    def split(self, hidden):
        """Hidden states (B, S + N, d) -> words (B, S, d) and video (B, N, d) in (t, h, w) order."""
        words, video = hidden.tensor_split([self.config.max_text], 1)
        return words, self.tiles.unsort(video)

    def head(self, hidden, condition, x_t, t):
        """Hidden states after the last block -> velocity (B, C, T, H, W)."""
        _, video = self.split(hidden)  # (B, N, d)
        shift, scale = self.modulation(condition)[:, None].chunk(2, -1)  # (B, 1, d) each
        patches = self.patch_out(modulate(video, shift, scale))  # (B, N, C * patch volume)
        x0_hat = unpatchify(patches, self.config.video_shape, self.config.patch)  # (B, C, T, H, W)
        return (x_t - x0_hat) / t.clamp(min=self.config.t_floor)[:, None, None, None, None]

    def forward(self, x_t, t, y):
        hidden, condition = self.embed(x_t, t, y)  # (B, S + N, d), (B, d)
        hidden = self.run(hidden, condition, 0, len(self.blocks))  # (B, S + N, d)
        return self.head(hidden, condition, x_t, t)  # (B, C, T, H, W)

    def features(self, x_t, t, y, depth):
        """Hidden states (B, S + N, d) after `depth` blocks: what a reward reads (section 4.4)."""
        hidden, condition = self.embed(x_t, t, y)
        return self.run(hidden, condition, 0, depth)


def share_trunk(policy, reference, blocks):
    """A function (x_t, t, y) -> (velocity of policy, of reference) that runs their first `blocks`
    blocks once. These must be equal, as freeze_trunk and add_lora(skip=blocks) leave them."""
    depth = len(reference.blocks)

    def shared_forward(x_t, t, y):
        with torch.no_grad():
            hidden, condition = reference.embed(x_t, t, y)
            hidden = reference.run(hidden, condition, 0, blocks)
            last = reference.run(hidden, condition, blocks, depth)
            v_reference = reference.head(last, condition, x_t, t)
        last = policy.run(hidden, condition, blocks, depth)
        return policy.head(last, condition, x_t, t), v_reference

    return shared_forward


def load_velocity(path, attention=None):
    """(VideoTransformer, words) of a checkpoint; `attention`, if given, replaces its own."""

    def config_of(**config):
        if attention:
            config["attention"] = attention
        return ModelConfig(**config)

    return load_network(path, "velocity", VideoTransformer, config_of)
