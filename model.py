"""The video generator: a flow-matching transformer v = model(x_t, t, y) (paper, section 4.1 and appendix D).

Conventions, here and everywhere in this code base:

    x0   data, at t = 0            x_t = (1 - t) x0 + t x1         v = x1 - x0   what the model predicts
    x1   noise, at t = 1           x0_hat = x_t - t v_hat          sampling runs t from 1 to 0

    videos (B, C, T, H, W) float in [-1, 1]    t (B,) float in [0, 1]    y (B, S) int64 word ids, 0 is padding

Text tokens and video tokens form one sequence with full self-attention; every block is modulated by the time and the
pooled prompt (adaLN-zero). The paper's is a closed 1 B latent model with separate spatial and 3D attention and T5.

The last layer predicts x0 and the model returns v = (x_t - x0_hat) / t: a token has fewer channels than a patch has
numbers and cannot carry its noise, as a network that outputs v has to; clean patches are far simpler. For the same
reason a patch enters and leaves by its lowest frequencies at the start, and the last layer has no normalisation.
"""

import math
from dataclasses import dataclass, replace

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from attention import attention
from kernels.tiles import tile_mask
from lora import add_lora, lora_disabled, merge_lora, merged_state_dict  # noqa: F401  names of a model
from runtime.checkpoint import load_network
from runtime.cli import BadInput

# ---------------------------------------------------------------------------------------------
# Config


@dataclass(frozen=True)
class ModelConfig:
    """Sizes of a VideoTransformer; `patch` divides (frames, height, width). BadInput for sizes that do not fit."""

    frames: int = 8
    size: int | tuple = 32  # height and width, or (height, width) where they differ
    channels: int = 3
    patch: tuple = (2, 8, 8)
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
        for name in (
            "frames",
            "height",
            "width",
            "channels",
            "dim",
            "depth",
            "heads",
            "vocab",
            "max_text",
        ):
            value, most = (
                getattr(self, name),
                512 if name == "depth" else 2**20,
            )  # so that no file asks for terabytes
            if type(value) is not int or not 1 <= value <= most:
                raise BadInput(
                    f"model config: {name} {value!r} must be a whole number from 1 to {most}"
                )
        if (
            [type(side) for side in self.patch] != [int] * 3
            or min(self.patch) < 1
            or math.prod(self.patch) > 4096
        ):
            raise BadInput(
                f"model config: patch {self.patch} must be three whole numbers, of 4096 pixels at most"
            )
        for name, side in zip(("frames", "height", "width"), self.patch):
            if getattr(self, name) % side:
                raise BadInput(
                    f"model config: {name} {getattr(self, name)} is not a multiple of the patch's {side}"
                )
        if self.dim % self.heads or (self.dim // self.heads) % 2:
            raise BadInput(
                f"model config: dim {self.dim} over {self.heads} heads must be a whole, even head size"
            )
        if math.prod(self.grid) > 2**20:
            raise BadInput(
                f"model config: {math.prod(self.grid)} patches in a clip; at most {2**20} can be used"
            )
        try:
            tile_mask(self.attention, self.grid, self.max_text, torch.device("cpu"))
        except ValueError as error:
            raise BadInput(f"--attention {self.attention}: {error}") from None

    @property
    def height(self):
        return self.size[0] if isinstance(self.size, tuple) else self.size

    @property
    def width(self):
        return self.size[1] if isinstance(self.size, tuple) else self.size

    @property
    def grid(self):
        """Tokens along (t, h, w)."""
        return (
            self.frames // self.patch[0],
            self.height // self.patch[1],
            self.width // self.patch[2],
        )

    @property
    def video_shape(self):
        return self.channels, self.frames, self.height, self.width


# `base` has 131 M parameters and 2,048 video tokens, `large` 1,032 M, the paper's scale, and 4,096; both for latents.
PRESETS = {
    "nano": ModelConfig(
        patch=(4, 8, 8), dim=160, heads=5
    ),  # 3 M parameters, 32 video tokens: a CPU
    "small": ModelConfig(
        frames=16, size=64, dim=384, depth=12, heads=6
    ),  # 33 M, 512 tokens: one GPU
    "base": ModelConfig(
        frames=8, size=32, channels=16, patch=(1, 2, 2), dim=768, depth=12, heads=12, max_text=64
    ),
    "large": ModelConfig(
        frames=16, size=32, channels=16, patch=(1, 2, 2), dim=1536, depth=24, heads=24, max_text=128
    ),
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
    """Sines and cosines of t (B,) in [0, 1] -> (B, dim) float32, wavelengths from 2 pi / 1000 to 20 pi."""
    frequency = 1000.0 * torch.exp(
        -math.log(10000.0) * torch.arange(dim // 2, device=t.device) / (dim // 2)
    )
    angle = t.float()[:, None] * frequency
    return torch.cat((angle.cos(), angle.sin()), 1)


def rope(grid, head_dim, theta=100.0):
    """Cosines and signed sines (2, T*H*W, head_dim) of tokens in (t, h, w) order on `grid` = (T, H, W).

    Channel i pairs with i + head_dim / 2. A pair turns by an angle proportional to the token's frame, row or column, so
    that a logit depends on how far apart two tokens are: a quarter of the pairs with the frame, three eighths each with
    row and column. No wavelength is longer than 2 pi theta tokens: theta is 100, not the 10,000 of text, as a clip has
    a few dozen tokens a side."""
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


def identity_rope(count, head_dim):
    """The same (2, count, head_dim) for tokens without a place: they are not turned."""
    return torch.stack((torch.ones(count, head_dim), torch.zeros(count, head_dim)))


def apply_rope(x, rope):
    """Turns x (B, N, heads, head_dim), each token by its row of rope (2, N, head_dim)."""
    cos, sin = rope[:, :, None]  # (N, 1, head_dim) each
    return x * cos + x.roll(x.shape[-1] // 2, -1) * sin


def rms_norm(x, weight, eps=1e-6):
    """x (..., d) over its root mean square, times weight (d,), in float32 or x's own dtype where that holds more."""
    x = x.to(torch.promote_types(x.dtype, torch.float32))
    return x * torch.rsqrt(x.square().mean(-1, keepdim=True) + eps) * weight


class Attention(nn.Module):
    """Multi-head self-attention with qk-norm, which bounds the logits, and RoPE. With `context` = n the first n tokens
    see only each other and the rest see all: two unmasked calls, which every kernel does fast, in place of a mask."""

    def __init__(self, dim, heads):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.out = nn.Linear(dim, dim)
        self.q_norm = nn.Parameter(torch.ones(dim // heads))
        self.k_norm = nn.Parameter(torch.ones(dim // heads))

    def forward(self, x, rope, context=None, tiles=None):
        b, n, _ = x.shape
        q, k, v = (
            self.qkv(x).reshape(b, n, 3, self.heads, -1).unbind(2)
        )  # (B, N, heads, head_dim) each
        q = apply_rope(rms_norm(q, self.q_norm), rope).to(v.dtype)
        k = apply_rope(rms_norm(k, self.k_norm), rope).to(v.dtype)
        q, k, v = (
            q.transpose(1, 2),
            k.transpose(1, 2),
            v.transpose(1, 2),
        )  # (B, heads, N, head_dim) each
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
    """Attention and MLP, each shifted, scaled and gated by the condition c (adaLN-zero: at the start the identity)."""

    def __init__(self, dim, heads):
        super().__init__()
        self.norm1 = nn.LayerNorm(dim, elementwise_affine=False)
        self.attn = Attention(dim, heads)
        self.norm2 = nn.LayerNorm(dim, elementwise_affine=False)
        self.mlp = mlp(dim)
        self.modulation = nn.Linear(dim, 6 * dim)

    def forward(self, x, c, rope, tiles=None):
        shift1, scale1, gate1, shift2, scale2, gate2 = self.modulation(c)[:, None].chunk(
            6, -1
        )  # (B, 1, d) each
        x = x + gate1 * self.attn(
            modulate(self.norm1(x), shift1, scale1), rope, tiles=tiles
        )  # (B, N, d)
        return x + gate2 * self.mlp(modulate(self.norm2(x), shift2, scale2))  # (B, N, d)


def checkpointed(block, *inputs, when):
    """block(*inputs); `when` true, only the inputs are kept for backward and all else is computed again."""
    if not (when and torch.is_grad_enabled()):
        return block(*inputs)
    return checkpoint(block, *inputs, use_reentrant=False, preserve_rng_state=False)


# ---------------------------------------------------------------------------------------------
# The model


def low_pass(config):
    """(dim, C * patch volume): orthonormal rows, the lowest 3D cosine frequencies of a patch, per channel."""
    axes = []
    for n in config.patch:
        k, i = torch.arange(n)[:, None], torch.arange(n)[None]
        basis = (
            torch.cos(math.pi * k * (i + 0.5) / n) * (2 / n) ** 0.5
        )  # DCT-II: row k is a cosine of k half periods
        axes.append(torch.where(k == 0, basis / 2**0.5, basis))
    basis = torch.einsum("ai,bj,ck->abcijk", *axes).flatten(3).flatten(0, 2)  # (volume, volume)
    frequency = torch.cartesian_prod(*(torch.arange(n) / n for n in config.patch)).square().sum(1)
    lowest = basis[frequency.argsort(stable=True)[: config.dim // config.channels]]
    rows = torch.block_diag(*[lowest] * config.channels)
    return F.pad(rows, (0, 0, 0, config.dim - len(rows)))


class VideoTransformer(nn.Module):
    """Velocity model. forward(x_t, t, y) -> v; ValueError when the video's shape is not the config's."""

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
        head_dim = dim // config.heads
        table = torch.cat(
            (identity_rope(config.max_text, head_dim), rope(config.grid, head_dim)), 1
        )  # words first
        self.register_buffer("rope", table, persistent=False)
        self.checkpointed = False  # whether each block is computed again in backward, which then keeps its input alone
        self.initialize_weights()

    def initialize_weights(self):
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        nn.init.normal_(
            self.words.weight, std=0.5
        )  # words must be told apart from the first step on
        nn.init.normal_(self.places, std=0.02)
        for block in self.blocks:  # every block starts as the identity
            nn.init.zeros_(block.modulation.weight)
        nn.init.zeros_(self.modulation.weight)
        # A random projection learns slowly which numbers of a patch matter; this one starts as x0_hat = low_pass(x_t)
        self.patch_in.weight.data.copy_(low_pass(self.config))
        self.patch_out.weight.data.copy_(low_pass(self.config).T)

    def embed(self, x_t, t, y):
        """The blocks' input: tokens (B, S + N, d), words first, and the condition (B, d)."""
        if x_t.shape[1:] != self.config.video_shape:
            raise ValueError(
                f"video of shape {tuple(x_t.shape)}; this model takes B x {self.config.video_shape}"
            )
        words = self.words(y)  # (B, S, d)
        video = self.patch_in(patchify(x_t, self.config.patch))  # (B, N, d)
        if (tiles := self.tiles(x_t.device)) is not None:
            video = video[:, tiles.order]
        condition = self.time(time_features(t, self.config.dim).to(words.dtype)) + self.pooled(
            words.mean(1)
        )  # (B, d)
        return torch.cat((words + self.places, video), 1), F.silu(condition)

    def run(self, hidden, condition, start, stop):
        """Blocks start to stop - 1 on hidden (B, S + N, d)."""
        table, tiles = self.rope, self.tiles(hidden.device)
        if tiles is not None:
            words, video = table.split((tiles.words, len(tiles.order)), 1)
            table = torch.cat((words, video[:, tiles.order]), 1)
        for block in self.blocks[start:stop]:
            hidden = checkpointed(block, hidden, condition, table, tiles, when=self.checkpointed)
        return hidden

    def tiles(self, device):
        """Who sees whom, None for full attention. Between `embed` and `head` the tokens lie in its order."""
        return tile_mask(self.config.attention, self.config.grid, self.config.max_text, device)

    def head(self, hidden, condition, x_t, t):
        """Hidden states after the last block -> velocity (B, C, T, H, W)."""
        shift, scale = self.modulation(condition)[:, None].chunk(2, -1)  # (B, 1, d)
        hidden = hidden[:, self.config.max_text :] * (1 + scale) + shift  # (B, N, d)
        if (tiles := self.tiles(hidden.device)) is not None:
            hidden = hidden[:, tiles.inverse]
        x0_hat = unpatchify(
            self.patch_out(hidden), self.config.video_shape, self.config.patch
        )  # (B, C, T, H, W)
        return (x_t - x0_hat) / t.clamp(min=self.config.t_floor)[:, None, None, None, None]

    def forward(self, x_t, t, y):
        hidden, condition = self.embed(x_t, t, y)  # (B, S + N, d), (B, d)
        hidden = self.run(hidden, condition, 0, len(self.blocks))  # (B, S + N, d)
        return self.head(hidden, condition, x_t, t)  # (B, C, T, H, W)

    def features(self, x_t, t, y, depth):
        """Hidden states (B, S + N, d) after the first `depth` blocks: what a noise-aware reward reads (section 4.4)."""
        hidden, condition = self.embed(x_t, t, y)
        return self.run(hidden, condition, 0, depth)


def freeze_trunk(model, blocks):
    """Freezes all up to the first `blocks` blocks, a trunk to share; 0 freezes none. BadInput outside 0..depth - 1."""
    if not 0 <= blocks < len(model.blocks):
        raise BadInput(
            f"--freeze {blocks}: this model has {len(model.blocks)} blocks, so 0 to {len(model.blocks) - 1}"
        )
    if blocks:
        for part in (model.patch_in, model.words, model.time, model.pooled, *model.blocks[:blocks]):
            part.requires_grad_(False)
        model.places.requires_grad_(False)
    return model


def share_trunk(policy, reference, blocks):
    """A function (x_t, t, y) -> (velocity of policy, of reference) that runs their common first `blocks` once.

    Right only while these are equal, as freeze_trunk and add_lora(skip=blocks) keep them; blocks must not be 0."""

    def shared_forward(x_t, t, y):
        depth = len(reference.blocks)
        with torch.no_grad():
            hidden, condition = reference.embed(x_t, t, y)
            hidden = reference.run(hidden, condition, 0, blocks)
            v_reference = reference.head(
                reference.run(hidden, condition, blocks, depth), condition, x_t, t
            )
        return policy.head(
            policy.run(hidden, condition, blocks, depth), condition, x_t, t
        ), v_reference

    return shared_forward


def load_velocity(path, attention=None):
    """(VideoTransformer, words) of a checkpoint, with another `attention` than it was trained with if one is named."""
    model, words = load_network(path, "velocity", VideoTransformer, ModelConfig)
    model.config = replace(model.config, attention=attention or model.config.attention)
    return model, words
