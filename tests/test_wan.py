"""The example on diffusers' Wan, on a tiny random model: its wires and its conventions."""

import csv
import importlib
import json
import math
import multiprocessing
import os
import runpy
import socket
import sys
from pathlib import Path
from unittest import mock

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import torch.nn.functional as F

from data import DIMENSIONS
from flow import interpolate
from lora import LoRALinear
from runtime import checkpoint
from runtime.cli import BadInput
from sample import NRG_EPS, NRG_INTERVAL, sample

diffusers = pytest.importorskip("diffusers")
latents, wan, wan_model = (
    importlib.import_module(f"examples.{name}") for name in ("latents", "wan", "wan_model")
)


@pytest.fixture
def tiny(tmp_path):
    """A folder with the tiny model and its pairs, whose three scores differ and stand in columns of
    another order."""
    wan_model.write_tiny(tmp_path / "model")
    latents.write_tiny(tmp_path / "pairs")
    rng = np.random.default_rng(3)
    np.save(tmp_path / "pairs" / "null.npy", rng.standard_normal((6, 8)))
    brightness = on_disk(tmp_path)[0][:, :, 0].mean((2, 3, 4)).numpy()[..., None]  # first channel
    scores = brightness + 0.2 * rng.normal(size=(16, 2, 3))
    np.save(tmp_path / "scores.npy", scores)
    write_scores(tmp_path / "pairs" / "pairs.csv", scores)
    return tmp_path


def write_scores(path, scores):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        files = ["latent_A", "latent_B", "text"]
        writer.writerow([*files, *(f"{name}_{side}" for name in DIMENSIONS for side in "BA")])
        for i, pair in enumerate(scores):
            numbers = [pair[side][k] for k in range(3) for side in (1, 0)]
            writer.writerow([*(f"{i}-{name}.npy" for name in files), *numbers])


def on_disk(folder):
    """Clips (16, 2, C, T, H, W) and texts (16, S, D)."""

    def load(name):
        arrays = [np.load(folder / "pairs" / f"{i}-{name}.npy") for i in range(16)]
        return torch.from_numpy(np.stack(arrays)).float()

    return torch.stack((load("latent_A"), load("latent_B")), 1), load("text")


@pytest.fixture
def command(tiny, monkeypatch, capsys):
    """Runs the command on that folder -> what it printed."""

    def run(*flags):
        places = ["--model", tiny / "model", "--data", tiny / "pairs", "--out", tiny / "out"]
        settings = ["--device=cpu", "--precision=float32"]
        monkeypatch.setattr(sys, "argv", ["wan.py", *map(str, [*places, *settings, *flags])])
        wan.main()
        return capsys.readouterr().out

    return run


@pytest.fixture
def calls(monkeypatch):
    """{name: mock} of the losses and the sampler, which record what the commands hand to them."""
    names = ("flow_dpo_step", "flow_rwr_step", "noisy_pair_step", "sample", "guide")
    mocks = {name: mock.Mock(wraps=getattr(wan, name)) for name in names}
    for name in names:
        monkeypatch.setattr(wan, name, mocks[name])
    return mocks


def losses(folder, algo):
    lines = (folder / "out" / algo / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def bare(folder):
    return wan_model.load_transformer(folder / "model")


def inputs(count=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, 2, 8, 8, generator=rng), torch.randn(count, 6, 8, generator=rng)


def adapted(folder, rank=3):
    """The tiny model with adapters that do something."""
    model = bare(folder)
    torch.manual_seed(1)
    wan_model.add_adapters(model, rank)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            assert layer.scale == 2  # alpha is twice the rank (Table 10)
            layer.up.data.normal_(std=0.3)
    return model


def merged(folder, path):
    """The tiny model with the adapters in a file."""
    model = bare(folder)
    wan_model.merge_adapters(model, path)
    return model


@torch.no_grad()
def prediction(model, x, y, t=500.0):
    """The library's own forward."""
    return model(x, torch.full((len(x),), t), y, return_dict=False)[0]


def test_sampling_and_noise_are_the_librarys(tiny):
    model = bare(tiny)
    (x1, y), (x0, null) = inputs(), inputs(seed=1)
    for shift in (1.0, 3.0):
        scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
        scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])  # before the shift; then 0
        x = x1
        for t in scheduler.timesteps:
            v, v_null = prediction(model, x, y, t), prediction(model, x, null, t)
            x = scheduler.step(v_null + 5.0 * (v - v_null), t, x, return_dict=False)[0]
        ours = sample(wan.Velocity(model), x1, y, 4, cfg=5.0, null=null, shift=shift)
        assert (ours - x).abs().max() <= 1e-5 and (ours - x1).abs().max() > 0.1
    noised = scheduler.scale_noise(x0, scheduler.timesteps[1:3], x1)
    times = scheduler.timesteps[1:3] / 1000
    assert torch.allclose(noised, interpolate(x0, x1, times), atol=1e-6)


def test_the_reward_reads_the_first_of_four_blocks(tiny):
    model = bare(tiny)
    seen = {}
    model.blocks[0].register_forward_hook(lambda *args: seen.update(hidden=args[2]))
    model.patch_embedding.register_forward_hook(lambda *args: seen.update(video=args[2]))
    model.condition_embedder.register_forward_hook(lambda *args: seen.update(embedded=args[2]))
    x, y = inputs()
    prediction(model, x, y, 300.0)
    reward = wan.WanReward(model)
    condition, _, text, _ = seen["embedded"]
    expected = reward.head(seen["hidden"], seen["video"].shape[2:], text, F.silu(condition))
    assert torch.allclose(reward(x, torch.full((2,), 0.3), y), expected, atol=1e-6)
    assert expected.shape == (2, 3) and not torch.allclose(expected[0], expected[1], atol=1e-4)


def find(clip, clips):
    (place,) = torch.nonzero((clips == clip).flatten(2).all(2)).tolist()
    return place


SIDES = {"dpo": ("x0_w", "x0_l"), "sft": ("x0",), "rwr": ("x0",), "nrg": ("x0_a", "x0_b")}


@pytest.mark.parametrize("algo", SIDES)
def test_losses_get_each_clip_with_its_text_and_what_its_scores_say(command, calls, tiny, algo):
    clips, texts = on_disk(tiny)
    scores = torch.from_numpy(np.load(tiny / "scores.npy"))
    total = scores.mean(2)  # r = (VQ + MQ + TA) / 3
    flags = "--steps=20 --batch=16 --lr=3e-3 --rank=4 --beta=7".split()
    command(algo, *flags)
    before, *_, after = losses(tiny, algo)
    assert after < 0.9 * before
    batches = [call.kwargs for each in calls.values() for call in each.call_args_list]
    places = set()
    for batch in batches[-2:]:  # a whole epoch with 16 pairs or 32 clips
        for i, text in enumerate(batch["y"]):
            (pair, side), *other = (find(batch[name][i], clips) for name in SIDES[algo])
            places.add((pair, side))
            assert torch.equal(texts[pair], text) and other in ([], [[pair, 1 - side]])
            if algo in ("dpo", "sft"):
                assert total[pair, side] > total[pair, 1 - side]
            if algo in ("sft", "rwr"):
                by_hand = total[pair, side].exp() / total.exp().mean() if algo == "rwr" else 1.0
                assert batch["weight"][i].item() == pytest.approx(float(by_hand), rel=1e-4)
            if algo == "dpo":
                assert batch["beta"] == 7
            if algo == "nrg":
                signs = (scores[pair, 0] - scores[pair, 1]).sign().tolist()
                assert side == 0 and batch["label"][i].tolist() == signs
    assert len(places) == (32 if algo == "rwr" else 16)


def start_of(path, name):
    """Trained tensors of a checkpoint, which one step has hardly moved."""
    tensors = checkpoint.load_checkpoint(path)["model"]
    return torch.cat([value.flatten() for key, value in sorted(tensors.items()) if name in key])


def test_shift_and_seed_reach_noise_order_and_start(command, calls, tiny):
    clips, _ = on_disk(tiny)
    found = []
    for flags in (["--shift=1"], ["--shift=3"], ["--shift=1", "--seed=1"]):
        command("dpo", "--steps=1", "--batch=4", "--rank=2", *flags)
        batch = calls["flow_dpo_step"].call_args.kwargs
        order = [find(clip, clips)[0] for clip in batch["x0_w"]]
        down = start_of(tiny / "out" / "dpo" / "last.pt", "trained.0")
        command("nrg", "--steps=1", "--batch=4", *flags)
        nrg_t = calls["noisy_pair_step"].call_args.kwargs["t"]
        head = start_of(tiny / "out" / "nrg" / "last.pt", "cells.weight")
        found.append((batch["t"], batch["x1"], order, down, nrg_t, head))
    (t, x1, order, down, nrg_t, head), (shifted, *same), other = found
    assert torch.allclose(shifted, 3 * t / (1 + 2 * t)) and torch.equal(x1, same[0])
    assert torch.equal(nrg_t, t) and torch.equal(nrg_t, same[3])  # a reward's times: no shift
    assert order == same[1] and torch.allclose(down, same[2], atol=1e-4)
    assert torch.allclose(head, same[4], atol=1e-2)
    assert not torch.equal(t, other[0]) and not torch.equal(x1, other[1]) and order != other[2]
    assert not torch.allclose(down, other[3], atol=1e-2)
    assert not torch.equal(nrg_t, other[4]) and not torch.allclose(head, other[5], atol=1e-2)


def test_the_reward_learns_brightness_and_guides_to_it(command, calls, tiny):
    command("nrg", *"--steps=30 --batch=16 --lr=3e-3".split())
    path = tiny / "out" / "nrg" / "last.pt"
    reward = wan.WanReward(bare(tiny))
    reward.load_state_dict(checkpoint.load_checkpoint(path)["model"])
    x, y = inputs(64, seed=5)
    t = torch.full((64,), 0.3)
    brighter = 0.5 * x
    brighter[:, 0] += 1.0
    with torch.no_grad():
        high, low = (reward(interpolate(x0, x.flip(0), t), t, y) for x0 in (brighter, 0.5 * x))
    assert ((high > low).float().mean(0) > 0.9).all()  # in VQ, MQ and TA, on clips never seen
    clips, texts = on_disk(tiny)
    x0, t = clips.flatten(0, 1), torch.rand(32)
    with torch.no_grad():
        x_t = interpolate(x0, torch.randn_like(x0), t)
        spread = reward(x_t, t, texts.repeat_interleave(2, 0)).std(0)
    assert ((spread > 0.6) & (spread < 1.6)).all()  # scores in units of the pairs' spread

    lora = tiny / "lora.safetensors"
    wan_model.write_adapters(adapted(tiny), {}, lora)
    flags = "--n=5 --steps=4 --cfg=3 --shift=2 --nrg=1,1,1 --nrg-scale=30".split()
    flags += [f"--reward={path}", f"--lora={lora}"]
    text = command("sample", *flags)
    _, weights, scale, eps, interval = calls["guide"].call_args.args
    assert (weights, scale, eps, interval) == ((1, 1, 1), 30, NRG_EPS, NRG_INTERVAL)
    null = torch.from_numpy(np.load(tiny / "pairs" / "null.npy")).float().expand(5, -1, -1)
    first = calls["sample"].call_args_list[0].args[1]
    for call in calls["sample"].call_args_list:
        _, x1, prompts, steps, cfg, no_prompt, _, shift = call.args
        assert (steps, cfg, shift) == (4, 3.0, 2.0) and torch.equal(no_prompt, null)
        assert torch.equal(prompts, texts[:5]) and torch.equal(x1, first)
    model, read = calls["sample"].call_args.args[0].wan[0], calls["guide"].call_args.args[0].wan[0]
    assert torch.equal(
        prediction(model, first, prompts), prediction(merged(tiny, lora), first, prompts)
    )
    assert torch.equal(prediction(read, first, prompts), prediction(bare(tiny), first, prompts))
    plain, guided = (np.load(tiny / "out" / f"{name}.npy") for name in ("plain", "guided"))
    assert plain.shape == (5, 4, 2, 8, 8) and guided[:, 0].mean() > plain[:, 0].mean() + 0.1
    low, high = (line.split()[3::2] for line in text.splitlines() if line.startswith("learned"))
    assert len(low) == 3 and all(float(b) > float(a) for a, b in zip(low, high))
    command("sample", "--n=5", "--steps=1", "--seed=1")
    assert not torch.equal(calls["sample"].call_args.args[1], first)
    checkpoint.save_checkpoint(path, checkpoint.load_checkpoint(path) | {"evaluated": False})
    with pytest.raises(BadInput, match="its training has not ended"):
        command("sample", *flags)


def test_dpo_after_sft_starts_at_its_reference(command, tiny):
    """A policy at its reference has margin 0: loss ln 2 = 0.6931, half of the pairs right."""
    sft, dpo = tiny / "out" / "sft.safetensors", tiny / "out" / "dpo.safetensors"
    command("sft", *"--steps=20 --batch=16 --lr=1e-2 --rank=4".split())
    x, y = inputs()
    start = prediction(merged(tiny, sft), x, y)
    assert (start - prediction(bare(tiny), x, y)).abs().max() > 0.1
    for beta in (10, 500):  # a rate too small to move
        text = command(
            "dpo", *f"--steps=1 --batch=16 --lr=1e-12 --beta={beta}".split(), "--lora", sft
        )
        assert "first loss 0.6931, accuracy 0.50" in text and "ln 2" not in text
        assert losses(tiny, "dpo")[0] == pytest.approx(math.log(2), abs=1e-6)
    # what is written holds both adapters: it belongs on the bare model, with rank 4 + 64
    assert torch.allclose(prediction(merged(tiny, dpo), x, y), start, atol=1e-5)
    adapters = wan_model.merge_adapters(bare(tiny), dpo)
    assert len(adapters) == 32 and {len(a) for a, _ in adapters.values()} == {
        68
    }  # 4 x 2 x q, k, v, out


def test_a_first_loss_that_is_not_ln_2_is_said(command, monkeypatch):
    def moved(model, rank):
        honest(model, rank)
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                layer.up.data.fill_(0.3)

    honest = wan_model.add_adapters
    monkeypatch.setattr(wan_model, "add_adapters", moved)
    text = command("dpo", *"--steps=1 --batch=16 --rank=4 --beta=10".split())
    assert "first loss 0.6931" not in text and "that is not ln 2 = 0.6931" in text


@pytest.mark.parametrize("algo", ["dpo", "nrg"])
def test_a_resumed_run_ends_at_the_same_bits(command, tiny, algo):
    flags = [algo, "--batch=6", "--lr=1e-3", "--rank=4"]
    last = tiny / "out" / algo / "last.pt"
    if algo == "dpo":
        wan_model.write_adapters(adapted(tiny), {}, tiny / "lora.safetensors")
        flags += ["--lora", tiny / "lora.safetensors"]
    command(*flags, "--steps=5")
    undisturbed = checkpoint.load_checkpoint(last)
    command(*flags, "--steps=2")
    assert "first loss" not in command(*flags, "--steps=5", "--resume", "--accum=1")
    again = checkpoint.load_checkpoint(last)
    for name, value in undisturbed["model"].items():
        assert torch.equal(again["model"][name], value)
    if algo == "dpo":
        (tiny / "lora.safetensors").write_bytes((tiny / "out" / "dpo.safetensors").read_bytes())
        with pytest.raises(BadInput, match="lora.safetensors .--lora. has changed since"):
            command(*flags, "--steps=6", "--resume")
        return
    with pytest.raises(BadInput, match="--seed was 0 in .*, now 1"):
        command(*flags, "--steps=6", "--resume", "--seed=1")
    table = tiny / "pairs" / "pairs.csv"
    header, first, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *rows, first]))
    with pytest.raises(BadInput, match="pairs.csv .--data. has changed since"):
        command(*flags, "--steps=6", "--resume")


def run_as(rank, port, flags, log):
    """The command in one of two processes, as torchrun starts it."""
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= address | {"WORLD_SIZE": "2", "RANK": rank, "LOCAL_RANK": rank}
    torch.set_num_threads(1)
    sys.argv = ["wan.py", *map(str, flags)]
    with open(log, "a") as sys.stdout:
        wan.main()


@pytest.mark.parametrize("algo", ["dpo", "nrg"])
def test_micro_batches_and_processes_take_the_same_steps(command, tiny, algo):
    scores = np.random.default_rng(4).standard_normal((16, 2, 3))
    scores[[0, 3, 4], 1, 0] = scores[[0, 3, 4], 0, 0]  # ties count alike in each part of a batch
    write_scores(tiny / "pairs" / "pairs.csv", scores)
    flags = [algo, *"--steps=3 --batch=8 --lr=1e-3 --rank=4 --beta=10".split()]
    command(*flags)
    whole, trained = losses(tiny, algo), checkpoint.load_checkpoint(tiny / "out" / algo / "last.pt")
    command(*flags, "--accum=2")
    assert losses(tiny, algo) == pytest.approx(whole, rel=1e-4)
    places = ["--model", tiny / "model", "--data", tiny / "pairs", "--out", tiny / "two" / "out"]
    flags += ["--device=cpu", "--precision=float32", "--accum=2", *places]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    fork, log = multiprocessing.get_context("fork"), tiny / "log"
    processes = [fork.Process(target=run_as, args=(rank, port, flags, log)) for rank in "01"]
    for process in processes:
        process.start()
    for process in processes:
        process.join()
        assert process.exitcode == 0
    assert losses(tiny / "two", algo) == pytest.approx(whole, rel=1e-4)
    assert log.read_text().count("loss ") == (2 if algo == "dpo" else 1)
    other = checkpoint.load_checkpoint(tiny / "two" / "out" / algo / "last.pt")["model"]
    for name, value in trained["model"].items():
        if not name.endswith("bias"):  # Adam steps by the rounding of a gradient that is 0
            assert torch.allclose(other[name], value, atol=1e-4)
    with pytest.raises(BadInput, match="--batch 8: must be a multiple of 3"):
        command(*flags[:6], "--accum=3")


def test_frames_are_those_on_screen_at_16_a_second(tmp_path):
    with imageio.get_writer(tmp_path / "30.mp4", fps=30, quality=10, macro_block_size=1) as writer:
        for i in range(180):
            writer.append_data(np.full((32, 48, 3), 20 + 30 * (i % 8), np.uint8))
    frames = latents.frames_at(tmp_path / "30.mp4", height=16, width=32)
    assert frames.shape == (3, 81, 16, 32)
    on_screen = [k * 30 // 16 % 8 for k in range(81)]  # at k / 16 s the frame floor(30 k / 16)
    assert ((frames.double().mean((0, 2, 3)) - 20) / 30).round().tolist() == on_screen
    with pytest.raises(BadInput, match="30.mp4 lasts 6.00 s; 97 frames .* need more than 6 s"):
        latents.frames_at(tmp_path / "30.mp4", 97)


def test_adapters_are_the_librarys(tiny):
    """Ours, read by the library; and the library's, of another rank, alpha and choice of layers."""
    peft = pytest.importorskip("peft")
    model, (x, y) = adapted(tiny), inputs()
    wan_model.write_adapters(model, {}, tiny / "lora.safetensors")
    library, plain = bare(tiny), prediction(bare(tiny), x, y)
    library.load_lora_adapter(tiny / "lora.safetensors", prefix="transformer")
    for other in (library, merged(tiny, tiny / "lora.safetensors")):
        assert torch.allclose(prediction(other, x, y), prediction(model, x, y), atol=1e-5)
    assert (prediction(model, x, y) - plain).abs().max() > 0.01
    library = bare(tiny)
    layers = {"target_modules": ["to_q", "ffn.net.2"], "init_lora_weights": False}
    library.add_adapter(peft.LoraConfig(r=2, lora_alpha=6, **layers))
    library.save_lora_adapter(tiny / "theirs")
    ours = merged(tiny, tiny / "theirs" / "pytorch_lora_weights.safetensors")
    assert torch.allclose(prediction(library, x, y), prediction(ours, x, y), atol=1e-5)
    assert (prediction(ours, x, y) - plain).abs().max() > 0.01


def put(*shape):
    """A fault: the array in a file, replaced by one of this shape."""
    return lambda path: np.save(path, np.zeros(shape, np.float16))


def clips(shape):
    """A fault: all clips replaced by clips of this shape."""

    def damage(path):
        for clip in path.parent.glob("*latent*"):
            np.save(clip, np.zeros(shape, np.float16))

    return damage


def not_finite(path):
    array = np.load(path)
    array[1, 0, 2, 3] = np.nan
    np.save(path, array)


def edit(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new))


LATENT, PROMPT, TABLE = "pairs/3-latent_A.npy", "pairs/2-text.npy", "pairs/pairs.csv"
OTHER_SHAPES = [(3, 2, 8, 8), (4, 2, 7, 8), (4, 33, 8, 8), (4, 0, 8, 8)]
CONFIG, WEIGHTS = "model/config.json", "model/diffusion_pytorch_model.safetensors"
FAULTS = [
    *((LATENT, clips(shape), "this model takes .4, T, H, W") for shape in OTHER_SHAPES),
    (LATENT, put(4, 2, 8, 6), r"line 5, column latent_A: shape \(4, 2, 8, 6\), but the first clip"),
    (LATENT, lambda path: np.save(path, [1]), "line 5, column latent_A: .* holds int64"),
    (LATENT, not_finite, r"line 5, column latent_A: .* holds nan at index \(1, 0, 2, 3\)"),
    (PROMPT, Path.unlink, "line 4, column text: .*2-text.npy is missing"),
    (PROMPT, put(5, 8), r"line 4, column text: shape \(5, 8\), but the first text has \(6, 8\)"),
    ("pairs/null.npy", put(5, 8), r"null.npy: shape \(5, 8\), but the texts have \(6, 8\)"),
    (TABLE, Path.unlink, "pairs.csv: cannot be read"),
    (TABLE, edit("VQ_A", "VQ"), "line 2: needs files in latent_A, latent_B, text and numbers in"),
    (TABLE, lambda path: write_scores(path, np.ones((16, 2, 3))), "no pair has a better clip"),
    (TABLE, lambda path: write_scores(path, np.full((16, 2, 3), np.nan)), "line 2: its scores"),
    (CONFIG, edit('"in_channels": 4', '"in_channels": 8'), "cannot be loaded.*shape"),
    (CONFIG, Path.unlink, "cannot be loaded as Wan .*config.json"),
    (WEIGHTS, Path.unlink, "holds no weights in .safetensors files"),
    (WEIGHTS, lambda path: path.rename(path.with_suffix(".bin")), "its .bin files are pickles"),
    (WEIGHTS, lambda path: os.truncate(path, 9999), "cannot be loaded as Wan"),
    ("transformer_2", Path.mkdir, "has two experts"),
    ("model_index.json", lambda path: path.write_text('{"boundary_ratio": 0.9}'), "two experts"),
]


@pytest.mark.parametrize(("place", "damage", "message"), FAULTS)
def test_a_fault_is_one_line(command, tiny, place, damage, message):
    damage(tiny / place)
    with pytest.raises(BadInput, match=message) as fault:
        command("dpo", "--steps=1", "--batch=16", "--rank=2")
    assert "\n" not in str(fault.value)


def test_adapters_of_another_model_are_refused(command, tiny):
    path = tiny / "lora.safetensors"
    wan_model.write_adapters(adapted(tiny), {}, path)
    good = wan_model.merge_adapters(bare(tiny), path)
    layer = "blocks.1.attn2.to_k"
    a, b = good[layer]
    for name, change, message in (
        (layer, (a[:, 1:] + 0, b), f"adapter of {layer} has the shape of another"),
        (layer, (a[1:] + 0, b), f"adapter of {layer} has the shape of another"),
        (layer, (a * math.nan, b), f"adapter of {layer} holds numbers that are not finite"),
        ("blocks.9.to_k", (a + 1, b + 1), "tensor 'blocks.9.to_k.lora_A.weight' is no adapter"),
    ):
        wan_model.write_adapters(bare(tiny), good | {name: change}, path)
        with pytest.raises(BadInput, match=message):
            command("sample", "--lora", path)
    with pytest.raises(BadInput, match="not a safetensors file that can be read"):
        command("sample", "--lora", tiny / "pairs" / "pairs.csv")
    with pytest.raises(BadInput, match="nrg/last.pt: no such checkpoint"):
        command("sample", "--nrg=1,1,1")


def test_flags_that_are_not_read_are_refused(command):
    for flags in ([], ["dpo", "--fsdp"], ["nrg", "--lora=x"], ["dpo", "--nrg-scale=2"]):
        with pytest.raises(BadInput, match="give one of|not read by|no effect without --nrg"):
            command(*flags)


def test_missing_diffusers_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "examples.wan_model", None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(wan.__file__)), run_name="__main__")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith("wan.py: error: diffusers is needed: pip install diffusers")
