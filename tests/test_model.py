"""Attention and the video transformer."""

import math
from dataclasses import asdict, replace

import pytest
import torch

from kernels.tiles import tile_mask
from model import (
    ModelConfig,
    VideoTransformer,
    add_lora,
    lora_disabled,
    low_pass,
    merge_lora,
    patchify,
    unpatchify,
)
from runtime.cli import BadInput
from sample import sample

SMALL = ModelConfig(
    frames=4, size=16, patch=(2, 8, 8), dim=32, depth=3, heads=2, vocab=8, max_text=3
)


def test_patches_round_trip():
    x = torch.randn(2, 3, 4, 16, 24)
    tokens = patchify(x, (2, 8, 8))
    assert tokens.shape == (2, 2 * 2 * 3, 3 * 2 * 64)
    assert torch.equal(tokens[0, 0].reshape(3, 2, 8, 8), x[0, :, :2, :8, :8])
    assert torch.equal(unpatchify(tokens, (3, 4, 16, 24), (2, 8, 8)), x)


def inputs(config, count=2):
    rng = torch.Generator().manual_seed(0)
    x = torch.randn(count, *config.video_shape, generator=rng)
    return x, torch.linspace(0.2, 0.9, count), torch.randint(0, 8, (count, 3), generator=rng)


def test_the_low_pass_is_orthonormal_and_keeps_smooth_clips():
    config = ModelConfig()
    basis = low_pass(config)[:126]  # 42 frequencies for each of 3 channels
    assert torch.allclose(basis @ basis.T, torch.eye(126), atol=1e-5)
    flat = patchify(torch.full((1, *config.video_shape), 0.7), config.patch)
    assert torch.allclose(flat @ basis.T @ basis, flat, atol=1e-5)
    ramp = (
        torch.linspace(0, 1, 8).expand(3, 8, 32, 8).repeat(1, 1, 1, 4)[None]
    )  # one slope across each patch
    ramp = patchify(ramp, config.patch)
    assert (ramp @ basis.T @ basis - ramp).square().mean() < 0.01 * ramp.var()


def test_a_patch_of_unequal_sides_enters_by_its_longest_waves():
    # of 2 rows and 8 columns: half a wave over the rows is as short as two waves over the columns
    basis = low_pass(ModelConfig(frames=1, size=8, channels=1, patch=(1, 2, 8), dim=4, heads=2))
    for k in range(4):  # k half waves over the columns, the two rows alike
        wave = torch.tensor([math.cos(math.pi * k * (j + 0.5) / 8) for j in range(8)]).repeat(2)
        assert torch.allclose(basis[k], wave / wave.norm(), atol=1e-6)


def test_a_new_model_predicts_a_low_pass_of_its_input():
    x, t, y = inputs(SMALL)
    basis = low_pass(SMALL)
    smooth = unpatchify(patchify(x, SMALL.patch) @ basis.T @ basis, SMALL.video_shape, SMALL.patch)
    expected = (x - smooth) / t[:, None, None, None, None]  # v = (x_t - x0_hat) / t
    assert torch.allclose(VideoTransformer(SMALL)(x, t, y), expected, atol=1e-5)


def scrambled(config):
    torch.manual_seed(0)
    model = VideoTransformer(config)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    return model


def test_output_depends_on_every_input_and_not_on_the_rest_of_the_batch():
    model = scrambled(SMALL)
    x, t, y = inputs(SMALL)
    v = model(x, t, y)
    assert v.shape == x.shape
    assert torch.allclose(model(x[1:], t[1:], y[1:]), v[1:], atol=1e-5)
    moved = y[:, [2, 0, 1]]
    for other in ((x + 0.1, t, y), (x, t + 0.05, y), (x, t, (y + 1) % 8), (x, t, moved)):
        assert (model(*other) - v).abs().max() > 1e-3
    model.places.data.zero_()  # without which a word stands nowhere: RoPE turns the video's tokens alone
    assert torch.allclose(model(x, t, moved), model(x, t, y), atol=1e-5)


def test_features_are_the_first_blocks_and_continue_to_the_same_velocity():
    model = scrambled(SMALL)
    x, t, y = inputs(SMALL)
    hidden = model.features(x, t, y, depth=1)
    _, condition = model.embed(x, t, y)
    assert torch.equal(
        model.head(model.run(hidden, condition, 1, 3), condition, x, t), model(x, t, y)
    )


def test_lora_starts_as_the_reference_trains_alone_and_merges():
    reference = scrambled(SMALL)
    x, t, y = inputs(SMALL)
    v = reference(x, t, y)
    model = add_lora(scrambled(SMALL), rank=4)
    assert torch.equal(model(x, t, y), v)
    down = torch.cat(
        [value.flatten() for name, value in model.named_parameters() if "down" in name]
    )
    assert down.std().item() == pytest.approx(
        32**-0.5, rel=0.15
    )  # down(x) is about as large as x, at any rank
    assert {name.split(".")[-1] for name, p in model.named_parameters() if p.requires_grad} == {
        "down",
        "up",
    }
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], 0.05)
    for _ in range(2):  # `down` gets its first gradient once `up` is no longer zero
        model(x, t, y).square().mean().backward()
        optimizer.step()
    tuned = model(x, t, y)
    assert (tuned - v).abs().max() > 1e-2
    with lora_disabled(model):
        assert torch.equal(model(x, t, y), v)
    trunk = add_lora(scrambled(SMALL), rank=4, skip=2)
    assert {name.split(".")[1] for name, p in trunk.named_parameters() if p.requires_grad} == {"2"}
    merged = merge_lora(model)
    assert merged.state_dict().keys() == reference.state_dict().keys()
    assert torch.allclose(merged(x, t, y), tuned, atol=1e-5) and torch.equal(model(x, t, y), tuned)


def test_a_video_of_another_shape_is_refused():
    with pytest.raises(ValueError, match="takes"):
        scrambled(SMALL)(
            torch.randn(1, 3, 8, 16, 16), torch.ones(1), torch.zeros(1, 3, dtype=torch.int64)
        )


def test_config_survives_json_and_bad_sizes_are_refused():
    import json

    assert ModelConfig(**json.loads(json.dumps(asdict(SMALL)))) == SMALL
    with pytest.raises(BadInput, match="height 30"):
        replace(SMALL, size=30)
    with pytest.raises(BadInput, match="width 16 is not a multiple of the patch's 5"):
        replace(SMALL, patch=(2, 8, 5))
    with pytest.raises(BadInput, match="heads"):
        replace(SMALL, heads=5)


def test_tiles_that_see_everything_are_full_attention():
    torch.manual_seed(0)
    full = scrambled(
        replace(SMALL, size=24, patch=(2, 6, 4))
    )  # 4 x 6 tokens a frame: an order is not its inverse
    tiled = VideoTransformer(replace(full.config, attention="tile:1,2,2/9,9,9"))
    tiled.load_state_dict(full.state_dict())
    x, t, y = (
        torch.randn(2, *full.config.video_shape),
        torch.tensor([0.2, 0.9]),
        torch.tensor([[1, 2, 0], [3, 0, 0]]),
    )
    assert torch.allclose(tiled(x, t, y), full(x, t, y), atol=1e-5)


def test_a_token_outside_the_window_has_no_influence():
    torch.manual_seed(0)
    network = scrambled(ModelConfig(frames=1, size=32, patch=(1, 4, 4), dim=32, depth=1, heads=2, vocab=8, max_text=3,
                                    attention="tile:1,2,2/1,1,1"))  # fmt: skip
    x, y = torch.randn(1, 3, 1, 32, 32), torch.tensor([[1, 2, 0]])
    moved = x.clone()
    moved[..., :8, :8] += 1.0  # the first box: 2 x 2 tokens of 4 x 4 pixels
    change = (
        network(moved, torch.tensor([0.5]), y) - network(x, torch.tensor([0.5]), y)
    ).abs().amax((0, 1, 2)) > 1e-6
    assert change[:8, :8].all() and change.sum() == 64


def test_sampling_leaves_nothing_behind_that_training_cannot_use():
    network = scrambled(replace(SMALL, size=32, attention="tile:1,2,2/1,1,1"))
    y = torch.tensor([[1, 2, 0]])
    tile_mask.cache_clear()  # so that the plan is made while sampling, in inference mode
    clip = sample(network, torch.randn(1, *network.config.video_shape), y, steps=2)
    assert not clip.is_inference() and not clip.requires_grad
    network(clip, torch.tensor([0.5]), y).sum().backward()
    assert network.patch_in.weight.grad.abs().sum() > 0
