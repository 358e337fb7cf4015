"""The video transformer and its parts, LoRA, and the config."""

import json
import math
from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F

from lora import add_lora, freeze_trunk, lora_disabled, merge_lora
from model import (
    Attention,
    ModelConfig,
    VideoTransformer,
    apply_rope,
    low_pass,
    no_rope,
    patchify,
    rope,
    share_trunk,
    time_features,
    unpatchify,
)

SMALL = ModelConfig(
    frames=4, size=16, patch=(2, 8, 8), dim=32, depth=3, heads=2, vocab=8, max_text=3
)


def inputs(config, count=2):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(count, *config.video_shape, generator=rng)
    return x, torch.linspace(0.2, 0.9, count), torch.randint(0, 8, (count, 3), generator=rng)


def scrambled(config):
    """A model whose every parameter counts, as none of its blocks is the identity."""
    torch.manual_seed(0)
    model = VideoTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


# ---------------------------------------------------------------------------------------------
# Parts


def test_patches_round_trip():
    x = torch.randn(2, 3, 4, 16, 24)
    tokens = patchify(x, (2, 8, 8))
    assert torch.equal(tokens[0, 0].reshape(3, 2, 8, 8), x[0, :, :2, :8, :8])
    assert torch.equal(unpatchify(tokens, (3, 4, 16, 24), (2, 8, 8)), x)


def test_the_low_pass_is_orthonormal_and_starts_with_the_longest_waves():
    basis = low_pass(ModelConfig())[:126]  # 42 frequencies for each of 3 channels
    assert torch.allclose(basis @ basis.T, torch.eye(126), atol=1e-5)
    # of 2 rows and 8 columns: half a wave over the rows is as short as two over the columns
    basis = low_pass(ModelConfig(frames=1, size=8, channels=1, patch=(1, 2, 8), dim=4, heads=2))
    for k in range(4):  # k half waves over the columns, the two rows alike
        wave = torch.tensor([math.cos(math.pi * k * (j + 0.5) / 8) for j in range(8)]).repeat(2)
        assert torch.allclose(basis[k], wave / wave.norm(), atol=1e-6)


def test_attention_by_hand_has_a_norm_for_q_and_another_for_k():
    torch.manual_seed(0)
    layer = Attention(8, 2).requires_grad_(False)
    layer.q_norm.copy_(torch.tensor([3.0, 0.1, 1.0, 2.0]))
    layer.k_norm.copy_(torch.tensor([0.2, 5.0, 1.0, -1.0]))
    x, still = torch.randn(1, 5, 8), no_rope(5, 4)
    q, k, v = (x[0] @ layer.qkv.weight.T + layer.qkv.bias).split(8, 1)
    mixed = torch.zeros(5, 8)
    for part in (slice(0, 4), slice(4, 8)):
        qs = [row / row.square().mean().sqrt() * layer.q_norm for row in q[:, part]]
        ks = [row / row.square().mean().sqrt() * layer.k_norm for row in k[:, part]]
        for i in range(5):
            logits = torch.stack([qs[i] @ other for other in ks]) / 2  # over sqrt(4)
            mixed[i, part] = torch.softmax(logits, 0) @ v[:, part]
    out = mixed @ layer.out.weight.T + layer.out.bias
    assert torch.allclose(layer(x, still)[0], out, atol=1e-4)
    # with context 2 the first two see only each other, the rest see all
    alone = layer(x[:, :2], still[:, :2])[0]
    assert torch.allclose(layer(x, still, context=2)[0], torch.cat((alone, out[2:])), atol=1e-4)


def test_a_block_and_its_condition_by_hand():
    model = scrambled(SMALL)
    x, t, y = inputs(SMALL)
    hidden, condition = model.embed(x, t, y)
    word = model.words(y).mean(1)
    assert torch.allclose(condition, F.silu(model.time(time_features(t, 32)) + model.pooled(word)))
    block = model.blocks[0]
    parts = block.modulation(condition)[:, None].split(32, -1)
    shift, scale, gate, mlp_shift, mlp_scale, mlp_gate = parts

    def norm(x):
        centred = x - x.mean(-1, keepdim=True)
        return centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()

    middle = hidden + gate * block.attn(norm(hidden) * (1 + scale) + shift, model.rope)
    out = middle + mlp_gate * block.mlp(norm(middle) * (1 + mlp_scale) + mlp_shift)
    assert torch.allclose(block(hidden, condition, model.rope), out, atol=1e-5)


def test_a_quarter_of_the_pairs_turns_with_time_the_rest_with_row_and_column():
    # head size 16: eight pairs, two for the frame, three for the row, three for the column
    table, theta = rope((3, 4, 5), 16), 100.0
    assert table.shape == (2, 60, 16)
    for frame, row, column in ((0, 0, 0), (2, 0, 0), (0, 3, 0), (0, 0, 4), (1, 2, 3)):
        angles = [frame * theta ** -(i / 2) for i in range(2)]
        angles += [place * theta ** -(i / 3) for place in (row, column) for i in range(3)]
        cos, sin = table[:, frame * 20 + row * 5 + column]
        assert cos.tolist() == pytest.approx([math.cos(a) for a in angles] * 2, abs=1e-5)
        signed = [-math.sin(a) for a in angles] + [math.sin(a) for a in angles]
        assert sin.tolist() == pytest.approx(signed, abs=1e-5)
    # of two pairs the first turns by a quarter: (1, 2) -> (1 cos - 2 sin, 2 cos + 1 sin) = (-2, 1)
    quarter = torch.tensor([[[0.0, 1.0, 0.0, 1.0]], [[-1.0, 0.0, 1.0, 0.0]]])
    x = torch.tensor([[[[1.0, 3.0, 2.0, 4.0]]]])
    assert apply_rope(x, quarter).flatten().tolist() == [-2.0, 3.0, 1.0, 4.0]


def test_time_features_by_hand():
    # of four features two are cosines: of 1000 t and, as 10,000^(1/2) = 100, of 10 t
    expected = [math.cos(500), math.cos(5), math.sin(500), math.sin(5)]
    assert time_features(torch.tensor([0.5]), 4)[0].tolist() == pytest.approx(expected, abs=1e-4)


# ---------------------------------------------------------------------------------------------
# The model


def test_a_new_model_predicts_a_low_pass_of_its_input():
    x, t, y = inputs(SMALL)
    basis = low_pass(SMALL)
    smooth = unpatchify(patchify(x, SMALL.patch) @ basis.T @ basis, SMALL.video_shape, SMALL.patch)
    expected = (x - smooth) / t[:, None, None, None, None]  # v = (x_t - x0_hat) / t
    assert torch.allclose(VideoTransformer(SMALL)(x, t, y), expected, atol=1e-5)


def test_the_floor_of_t_divides_where_t_is_smaller():
    model = scrambled(SMALL)
    x, _, y = inputs(SMALL, 1)
    hidden, condition = model.embed(x, torch.zeros(1), y)
    x0_hat = x - model.head(hidden, condition, x, torch.ones(1))
    for t, divisor in ((0.0, 0.05), (0.05, 0.05), (0.2, 0.2)):
        v = model.head(hidden, condition, x, torch.tensor([t]))
        assert torch.allclose(v * divisor, x - x0_hat, atol=1e-5)


def test_output_depends_on_every_input_and_not_on_the_rest_of_the_batch():
    model = scrambled(SMALL)
    x, t, y = inputs(SMALL)
    v = model(x, t, y)
    assert v.shape == x.shape
    assert torch.allclose(model(x[1:], t[1:], y[1:]), v[1:], atol=1e-5)
    moved = y[:, [2, 0, 1]]
    for other in ((x + 0.1, t, y), (x, t + 0.05, y), (x, t, (y + 1) % 8), (x, t, moved)):
        assert (model(*other) - v).abs().max() > 1e-3
    model.places.data.zero_()  # without which a word has no place: RoPE turns video tokens alone
    assert torch.allclose(model(x, t, moved), model(x, t, y), atol=1e-5)
    with pytest.raises(ValueError, match="takes"):
        model(torch.randn(1, 3, 8, 16, 16), t[:1], y[:1])


def test_shared_blocks_continue_to_the_same_velocities():
    policy, reference = scrambled(SMALL), scrambled(SMALL)
    x, t, y = inputs(SMALL)
    for value in policy.blocks[2].parameters():
        value.data += 0.1
    v, v_reference = share_trunk(freeze_trunk(policy, 2), reference, 2)(x, t, y)
    assert torch.equal(v, policy(x, t, y)) and torch.equal(v_reference, reference(x, t, y))
    assert v.requires_grad and not v_reference.requires_grad


# ---------------------------------------------------------------------------------------------
# What is trained


def test_lora_starts_as_the_reference_trains_alone_and_merges():
    reference = scrambled(SMALL)
    x, t, y = inputs(SMALL)
    v = reference(x, t, y)
    model = add_lora(scrambled(SMALL), rank=4)
    assert torch.equal(model(x, t, y), v)
    down = torch.cat([block.attn.qkv.down.flatten() for block in model.blocks])
    assert down.std().item() == pytest.approx(32**-0.5, rel=0.15)  # down(x) is as large as x
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(2):  # `down` gets its first gradient once `up` is no longer zero
        model(x, t, y).square().mean().backward()
        optimizer.step()
    tuned = model(x, t, y)
    assert (tuned - v).abs().max() > 1e-2
    with lora_disabled(model):
        assert torch.equal(model(x, t, y), v)
    merged = merge_lora(model)
    assert merged.state_dict().keys() == reference.state_dict().keys()
    assert torch.allclose(merged(x, t, y), tuned, atol=1e-5) and torch.equal(model(x, t, y), tuned)


def test_at_least_one_block_is_trained():
    for freeze in (freeze_trunk, lambda model, skip: add_lora(model, 4, skip=skip)):
        with pytest.raises(ValueError, match="3: this model has 3 blocks, so 0 to 2"):
            freeze(scrambled(SMALL), 3)


# ---------------------------------------------------------------------------------------------
# Config and tiles


def test_config_survives_json_and_bad_sizes_are_refused():
    wide = replace(SMALL, size=(16, 24))
    assert ModelConfig(**json.loads(json.dumps(asdict(wide)))) == wide and wide.grid == (2, 2, 3)
    assert replace(SMALL, size=[16, 16]) == SMALL
    for sizes, fault in (
        ({"patch": (2, 8, 5)}, "width 16 is not a multiple of the patch's 5"),
        ({"heads": 5}, "dim 32 over 5 heads"),
        ({"dim": 6}, "dim 6 over 2 heads"),  # 3 channels cannot be paired
        ({"depth": 513}, "depth 513 must be a whole number from 1 to 512"),
        ({"patch": (2, 8)}, "must be three whole numbers"),
        ({"frames": 128, "size": 128, "patch": (2, 64, 64)}, "at most 4096 pixels"),
        ({"frames": 2**20, "patch": (1, 1, 1)}, "patches in a clip"),
    ):
        with pytest.raises(ValueError, match=fault):
            replace(SMALL, **sizes)


def test_tiles_that_see_everything_are_full_attention():
    # 4 x 6 tokens a frame: an order that is not its own inverse
    full = scrambled(replace(SMALL, size=24, patch=(2, 6, 4)))
    tiled = VideoTransformer(replace(full.config, attention="tile:1,2,2/9,9,9"))
    tiled.load_state_dict(full.state_dict())
    x, t, y = inputs(full.config)
    assert torch.allclose(tiled(x, t, y), full(x, t, y), atol=1e-5)


def test_a_token_outside_the_window_has_no_influence():
    config = replace(SMALL, frames=1, size=32, patch=(1, 4, 4), depth=1)
    network = scrambled(replace(config, attention="tile:1,2,2/1,1,1"))
    x, t, y = inputs(network.config, 1)
    moved = x.clone()
    moved[..., :8, :8] += 1.0  # the first box: 2 x 2 tokens of 4 x 4 pixels
    change = (network(moved, t, y) - network(x, t, y)).abs().amax((0, 1, 2)) > 1e-6
    assert change[:8, :8].all() and change.sum() == 64
