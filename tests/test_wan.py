"""The example on diffusers' Wan, on a tiny random model: its wires and its conventions."""

import importlib
import json
import math
import os
import runpy
import sys
from pathlib import Path
from unittest import mock

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
from forked import together
from wired import find

from flow import interpolate
from real_data.pairs_csv import Pair, write_pairs
from runtime import checkpoint
from runtime.cli import BadInput
from sample import sample

diffusers = pytest.importorskip("diffusers")
pytest.importorskip("peft")
latents, wan, wan_model = (
    importlib.import_module(f"examples.{name}") for name in ("latents", "wan", "wan_model")
)
FLAGS = "--device=cpu --precision=float32 --batch=8 --lr=1e-3 --beta=10".split()


@pytest.fixture
def tiny(tmp_path):
    """A folder with the tiny model and its pairs, with labels and ratings that differ."""
    wan_model.write_tiny(tmp_path / "model")
    latents.write_tiny(tmp_path)
    rng = np.random.default_rng(3)
    rows = []
    for i in range(16):
        label = tuple(rng.choice([-1, 0, 1], 3).tolist())
        mos = tuple(rng.integers(1, 6, 6).astype(float).tolist())
        paths, text = (f"{i}-A.npy", f"{i}-B.npy"), {"text": f"{i}-text.npy"}
        rows.append(Pair(*paths, "a cat", label, 16, 2, 16, 2, mos, text))
    write_pairs(rows, tmp_path / "pairs.csv")
    return tmp_path


@pytest.fixture
def command(tiny, monkeypatch, capsys):
    """Runs the command on that folder -> what it printed."""

    def run(*flags):
        places = ["--model", tiny / "model", "--data", tiny / "pairs.csv", "--out", tiny / "out"]
        monkeypatch.setattr(sys, "argv", ["wan.py", *map(str, [*places, *FLAGS, *flags])])
        wan.main()
        return capsys.readouterr().out

    return run


def losses(folder, algo):
    lines = (folder / "out" / algo / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


def trained(folder, algo="dpo"):
    return checkpoint.load_checkpoint(folder / "out" / algo / "last.pt")["model"]


def bare(folder):
    return wan_model.load_transformer(folder / "model")


def inputs(seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(2, 4, 2, 8, 8, generator=rng), torch.randn(2, 6, 8, generator=rng)


@torch.no_grad()
def prediction(model, x, y, t=500.0):
    """The library's own forward."""
    return model(x, torch.full((len(x),), t), y, return_dict=False)[0]


def test_sampling_and_noise_are_the_librarys(tiny):
    model = bare(tiny)
    (x1, y), (x0, null) = inputs(), inputs(seed=1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])  # before the shift; then 0
    x = x1
    for t in scheduler.timesteps:
        v, v_null = prediction(model, x, y, t), prediction(model, x, null, t)
        x = scheduler.step(v_null + 5.0 * (v - v_null), t, x, return_dict=False)[0]
    ours = sample(wan_model.Velocity(model), x1, y, 4, cfg=5.0, null=null, shift=3.0)
    assert (ours - x).abs().max() <= 1e-5 and (ours - x1).abs().max() > 0.1
    noised = scheduler.scale_noise(x0, scheduler.timesteps[1:3], x1)
    times = scheduler.timesteps[1:3] / 1000
    assert torch.allclose(noised, interpolate(x0, x1, times), atol=1e-6)


def load(folder, name):
    arrays = [np.load(folder / f"{i}-{name}.npy") for i in range(16)]
    return torch.tensor(np.stack(arrays)).float()


@pytest.mark.parametrize("algo", ["dpo", "sft", "rwr"])
def test_losses_get_each_clip_with_its_text_and_what_its_labels_say(command, tiny, algo):
    clips, texts = torch.stack((load(tiny, "A"), load(tiny, "B")), 1), load(tiny, "text")
    rows = latents.read_pairs(tiny / "pairs.csv")
    overall = [sum(row.label) for row in rows]
    ratings = np.array([row.mos for row in rows]).reshape(16, 2, 3)
    z = ((ratings - ratings.mean((0, 1))) / ratings.std((0, 1))).mean(2)  # (16, 2)
    step = "flow_dpo_step" if algo == "dpo" else "flow_rwr_step"
    with mock.patch.object(wan, step, wraps=getattr(wan, step)) as calls:
        for flags in ("--steps=4 --shift=1", "--steps=1 --shift=3", "--steps=1 --seed=1"):
            command(algo, *flags.split())
    batches = [call.kwargs for call in calls.call_args_list if len(call.kwargs["t"]) == 8]
    places = set()
    for batch in batches[:4]:
        for i, text in enumerate(batch["y"]):
            pair, side = find(batch["x0_w" if algo == "dpo" else "x0"][i], clips)
            places.add((pair, side))
            assert torch.equal(texts[pair], text)
            if algo == "rwr":
                by_hand = math.exp(z[pair, side]) / np.exp(z).mean()
                assert batch["weight"][i].item() == pytest.approx(by_hand, rel=1e-4)
                continue
            assert overall[pair] and side == (overall[pair] < 0)
            if algo == "dpo":
                assert find(batch["x0_l"][i], clips) == [pair, 1 - side] and batch["beta"] == 10
            else:
                assert batch["weight"][i] == 1
    assert len(places) == (32 if algo == "rwr" else sum(map(bool, overall)))
    t, shifted, other = (batches[i]["t"] for i in (0, 4, 5))
    assert torch.allclose(shifted, 3 * t / (1 + 2 * t)) and not torch.allclose(other, shifted)


def test_dpo_after_sft_starts_at_its_reference_and_the_library_reads_both(command, tiny):
    """A policy at its reference has margin 0: loss ln 2 = 0.6931, half of the pairs right."""
    sft, dpo = tiny / "out" / "sft.safetensors", tiny / "out" / "dpo.safetensors"
    before = command("sft", "--steps=20", "--lr=1e-2", "--rank=4")
    assert losses(tiny, "sft")[-1] < 0.95 * losses(tiny, "sft")[0] and str(sft) in before
    x, y = inputs()

    def by_the_library(path):
        model = bare(tiny)
        pipeline = diffusers.WanPipeline
        layers, metadata = pipeline.lora_state_dict(path, return_lora_metadata=True)
        pipeline.load_lora_into_transformer(layers, model, metadata=metadata)
        layers = [name for name, _ in model.named_modules() if name.endswith("lora_A.default_0")]
        assert len(layers) == 32  # 4 blocks x 2 x q, k, v, out
        return prediction(model, x, y)

    start = by_the_library(sft)
    assert (start - prediction(bare(tiny), x, y)).abs().max() > 0.1
    for flags in (["--beta=10"], ["--beta=500", "--lr=1e-12"]):  # the last cannot move
        text = command("dpo", "--steps=1", "--lora", sft, *flags)
        assert "first loss 0.6931, accuracy 0.50" in text and "ln 2" not in text
        assert losses(tiny, "dpo")[0] == pytest.approx(math.log(2), abs=1e-6)
    assert torch.allclose(by_the_library(dpo), start, atol=1e-5)
    command("dpo", "--steps=5", "--lr=1e-2", "--lora", sft)
    assert (by_the_library(dpo) - start).abs().max() > 1e-3
    model = bare(tiny)
    wan_model.load_adapters(model, dpo)
    policy = prediction(model, x, y)
    assert torch.allclose(policy, by_the_library(dpo), atol=1e-5)
    assert model.blocks[0].attn1.to_q.scaling["policy"] == 2  # alpha is twice the rank (Table 10)
    moved = {name for name, value in model.named_parameters() if value.requires_grad}
    assert len(moved) == 64 and all(".policy." in name for name in moved)
    for name, value in model.named_parameters():
        value.data += 0.1 * (name in moved)
    with wan_model.as_reference(model):
        assert torch.equal(prediction(model, x, y), policy)  # where it started
    assert not torch.allclose(prediction(model, x, y), policy, atol=1e-3)


def test_a_resumed_run_ends_at_the_same_bits(command, tiny):
    command("sft", "--steps=1", "--rank=2")
    lora = tiny / "out" / "sft.safetensors"
    flags = ["dpo", "--lora", lora]
    command(*flags, "--steps=5")
    undisturbed = trained(tiny, "dpo")
    command(*flags, "--steps=2")
    assert "first loss" not in command(*flags, "--steps=5", "--resume", "--accum=1")
    again = trained(tiny, "dpo")
    assert all(torch.equal(again[name], value) for name, value in undisturbed.items())
    with pytest.raises(BadInput, match="--seed was 0 in .*, now 1"):
        command(*flags, "--steps=6", "--resume", "--seed=1")
    for file, flag in ((tiny / "pairs.csv", "data"), (lora, "lora")):
        content = file.read_bytes()
        file.write_bytes(content + b"\n")
        with pytest.raises(BadInput, match=f"{file.name} .--{flag}. has changed since"):
            command(*flags, "--steps=6", "--resume")
        file.write_bytes(content)


def run_as_process(*flags):
    sys.argv = ["wan.py", *map(str, flags)]
    wan.main()


def test_micro_batches_and_processes_take_the_same_steps(command, tiny):
    flags = ["dpo", "--steps=3", "--rank=4"]
    command(*flags)
    whole, weights = losses(tiny, "dpo"), trained(tiny, "dpo")
    command(*flags, "--accum=2")
    assert losses(tiny, "dpo") == pytest.approx(whole, rel=1e-4)
    places = ["--model", tiny / "model", "--data", tiny / "pairs.csv", "--out", tiny / "two/out"]
    flags += [*FLAGS, "--accum=2", *places]
    log = tiny / "log"
    assert together(run_as_process, [flags], output=log) == [0, 0], log.read_text()
    assert losses(tiny / "two", "dpo") == pytest.approx(whole, rel=1e-4)
    assert log.read_text().count("first loss") == log.read_text().count("last.pt") == 1
    other = trained(tiny / "two", "dpo")
    assert all(torch.allclose(other[name], value, atol=1e-4) for name, value in weights.items())
    with pytest.raises(BadInput, match="--batch 8: must be a multiple of 3"):
        command(*flags, "--accum=3")


def test_frames_are_those_on_screen_at_16_a_second(tmp_path):
    with imageio.get_writer(tmp_path / "30.mp4", fps=30, quality=10, macro_block_size=1) as writer:
        for i in range(180):
            writer.append_data(np.full((32, 48, 3), 20 + 30 * (i % 8), np.uint8))
    frames = latents.frames_at(tmp_path / "30.mp4", height=16, width=32)
    assert frames.shape == (3, 81, 16, 32)
    on_screen = [k * 30 // 16 % 8 for k in range(81)]  # at k / 16 s the frame floor(30 k / 16)
    assert ((frames.double().mean((0, 2, 3)) - 20) / 30).round().tolist() == on_screen
    with pytest.raises(ValueError, match="30.mp4 lasts 6.00 s; 97 frames .* need more than 6 s"):
        latents.frames_at(tmp_path / "30.mp4", 97)


def narrower(path):
    np.save(path, np.load(path)[..., :6])


def all_clips(*shape):
    """A fault: all clips replaced by clips of this shape."""

    def damage(path):
        for file in path.parent.glob("*-[AB].npy"):
            np.save(file, np.zeros(shape, np.float16))

    return damage


def not_finite(path):
    array = np.load(path)
    array[1, 0, 2, 3] = np.nan
    np.save(path, array)


def edit(old, new):
    return lambda path: path.write_text(path.read_text().replace(old, new))


WEIGHTS = "model/diffusion_pytorch_model.safetensors"
FAULTS = [
    ("3-A.npy", all_clips(3, 2, 8, 8), "this model takes .4, T, H, W"),
    ("3-A.npy", all_clips(4, 2, 7, 8), "this model takes .4, T, H, W"),
    ("model/config.json", edit('"text_dim": 8', '"text_dim": 9'), "cannot be loaded.*shape"),
    ("3-A.npy", narrower, r"line 5, column path_A: shape \(4, 2, 8, 6\), but that of line"),
    ("3-A.npy", not_finite, r"line 5, column path_A: .* holds nan at index \(1, 0, 2, 3\)"),
    ("2-text.npy", Path.unlink, "line 4, column text: .*2-text.npy is missing"),
    ("pairs.csv", edit("text", "file"), "line 2, column text: .* is missing"),
    (WEIGHTS, lambda path: path.rename(path.with_suffix(".bin")), ".bin files are pickles"),
    (WEIGHTS, lambda path: os.truncate(path, 9999), "cannot be loaded as Wan"),
    ("transformer_2", Path.mkdir, "has two experts"),
]


@pytest.mark.parametrize(("place", "damage", "message"), FAULTS)
def test_a_fault_is_one_line(command, tiny, place, damage, message):
    damage(tiny / place)
    with pytest.raises(BadInput, match=message) as fault:
        command("rwr", "--steps=2", "--batch=16", "--rank=2")
    assert "\n" not in str(fault.value)


def test_flags_that_are_not_read_and_adapters_of_another_model_are_refused(command, tiny):
    for flags, fault in (
        ([], "give one of dpo, rwr, sft"),
        (["dpo", "--fsdp"], "--fsdp: not read by wan.py"),
        (["dpo", "--lora=x", "--rank=2"], "--rank: has no effect with --lora"),
        (["dpo", "--lora", tiny / WEIGHTS], "cannot be loaded as adapters of this model"),
        (["dpo", "--lora", tiny / "pairs.csv"], "cannot be loaded as adapters of this model"),
    ):
        with pytest.raises(BadInput, match=fault):
            command(*flags)


def test_missing_diffusers_is_one_line(monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "accelerate", None)
    with pytest.raises(SystemExit) as end:
        runpy.run_path(str(Path(wan.__file__)), run_name="__main__")
    error = capsys.readouterr().err
    assert end.value.code == 2 and error.count("\n") == 1
    assert error.startswith("wan.py: error: diffusers is needed: pip install diffusers")
