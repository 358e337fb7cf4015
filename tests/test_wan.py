"""The example on diffusers' Wan transformer, on a tiny random one: against the library's own scheduler and adapters."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from functools import partial
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from forked import together

import flow_dpo
import flow_rwr
import nrg
import sample
from flow import interpolate
from lora import LoRALinear
from runtime import cli
from runtime.cli import BadInput

diffusers = pytest.importorskip("diffusers")
latents, wan, wan_model = (
    importlib.import_module(f"examples.{name}") for name in ("latents", "wan", "wan_model")
)


@pytest.fixture
def tiny(tmp_path):
    """A folder with the tiny model and its pairs."""
    wan_model.write_tiny(tmp_path / "model")
    latents.write_tiny(tmp_path / "pairs")
    return tmp_path


@pytest.fixture
def command(tiny, monkeypatch, capsys):
    """Runs the command on that folder -> what it printed."""

    def run(*flags):
        places = [
            "--model",
            tiny / "model",
            "--data",
            tiny / "pairs",
            "--out",
            tiny / "out",
            "--device",
            "cpu",
        ]
        monkeypatch.setattr(sys, "argv", ["wan.py", *map(str, [*places, *flags])])
        wan.main()
        return capsys.readouterr().out

    return run


def inputs(count=2, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return torch.randn(count, 4, 2, 8, 8, generator=rng), torch.randn(count, 6, 8, generator=rng)


def adapted(folder, rank=3):
    """The tiny model with adapters that do something."""
    model = wan_model.load_transformer(folder).requires_grad_(False)
    torch.manual_seed(1)
    wan_model.add_adapters(model, rank)
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.up.data.normal_(std=0.3)
    return model


def with_adapters(folder, path):
    """The tiny model with the adapters of a file."""
    model = wan_model.load_transformer(folder)
    wan_model.attach_adapters(model, wan_model.read_adapters(model, path))
    return model


def prediction(model, x, y, t=500.0):
    """The library's own forward."""
    with torch.no_grad():
        return model(x, torch.full((len(x),), t), y, return_dict=False)[0]


def test_the_example_runs_what_the_toy_runs():
    assert wan.flow_dpo_step is flow_dpo.flow_dpo_step
    assert wan.flow_rwr_step is flow_rwr.flow_rwr_step and wan.rwr_weights is flow_rwr.rwr_weights
    assert wan.noisy_pair_step is nrg.noisy_pair_step and wan.guide is nrg.guide
    assert wan.sample is sample.sample
    assert wan.WanReward.head is nrg.NoisyReward.head


# ---------------------------------------------------------------------------------------------
# The library's conventions


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_four_steps_are_the_librarys(tiny, shift):
    model = wan_model.load_transformer(tiny / "model")
    (x1, y), (_, null) = inputs(), inputs(seed=1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=shift)
    scheduler.set_timesteps(sigmas=[1.0, 0.75, 0.5, 0.25])  # evenly spaced before the shift, then 0
    x = x1
    for t in scheduler.timesteps:
        v, v_null = prediction(model, x, y, t), prediction(model, x, null, t)
        x = scheduler.step(v_null + 5.0 * (v - v_null), t, x, return_dict=False)[0]
    x0 = wan.sample(wan.velocity(model), x1, y, 4, cfg=5.0, null=null, shift=shift)
    assert (x0 - x).abs().max() <= 1e-5 and (x0 - x1).abs().max() > 0.1


def test_the_librarys_pipeline_ends_where_our_sampler_does(tiny):
    pytest.importorskip("transformers")
    (x1, y), (_, null) = inputs(), inputs(seed=1)
    model = wan_model.load_transformer(tiny / "model")
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    clock = partial(scheduler.set_timesteps, sigmas=[1.0, 0.75, 0.5, 0.25])
    scheduler.set_timesteps = lambda steps, device: clock(device=device)
    pipe = diffusers.WanPipeline(None, None, None, scheduler, model)
    pipe.set_progress_bar_config(disable=True)
    embeddings = dict(prompt_embeds=y, negative_prompt_embeds=null, guidance_scale=5.0)
    x = pipe(
        **embeddings,
        latents=x1,
        num_inference_steps=4,
        height=64,
        width=64,
        num_frames=5,
        output_type="latent",
    )
    x0 = wan.sample(wan.velocity(model), x1, y, 4, cfg=5.0, null=null, shift=3.0)
    assert (x0 - x.frames).abs().max() <= 1e-5


def test_the_librarys_own_clock_by_our_velocity(tiny):
    # its default ends at the smallest sigma it was trained with and jumps to 0 from there
    model = wan_model.load_transformer(tiny / "model")
    x1, y = inputs()
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    scheduler.set_timesteps(4)
    x, ours, sigmas = x1, x1, scheduler.sigmas.tolist()
    for t, now, then in zip(scheduler.timesteps, sigmas, sigmas[1:]):
        x = scheduler.step(prediction(model, x, y, t), t, x, return_dict=False)[0]
        with torch.no_grad():
            ours = ours - (now - then) * wan.velocity(model)(ours, torch.full((2,), now), y)
    assert (ours - x).abs().max() <= 1e-5 and sigmas[-1] == 0


def test_noise_is_added_as_the_library_adds_it():
    (x0, _), (x1, _) = inputs(), inputs(seed=1)
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
    times = scheduler.timesteps[[100, 900]]
    assert torch.allclose(
        scheduler.scale_noise(x0, times, x1), interpolate(x0, x1, times / 1000), atol=1e-6
    )


def test_the_reward_reads_the_first_blocks_without_adapters(tiny):
    plain, model = wan_model.load_transformer(tiny / "model"), adapted(tiny / "model")
    seen = {}
    plain.blocks[0].register_forward_hook(lambda module, args, out: seen.update(hidden=out))
    plain.patch_embedding.register_forward_hook(
        lambda module, args, out: seen.update(grid=out.shape[2:])
    )
    told = lambda module, args, out: seen.update(condition=out[0], text=out[2])  # noqa: E731
    plain.condition_embedder.register_forward_hook(told)
    reward = wan.WanReward(model)
    x, y = inputs()
    prediction(plain, x, y, 300.0)
    expected = reward.head(seen["hidden"], seen["grid"], seen["text"], F.silu(seen["condition"]))
    assert torch.allclose(reward(x, torch.full((2,), 0.3), y), expected, atol=1e-6)
    assert expected.shape == (2, 3) and not torch.allclose(expected[0], expected[1], atol=1e-4)
    assert not any(name.startswith("trunk") for name in reward.state_dict())


def test_checkpointing_changes_no_gradient(tiny):
    # blocks are computed again in the backward pass, after the reference has run with adapters off
    gradients = []
    for checkpointing in (False, True):
        model = adapted(tiny / "model")
        if checkpointing:
            model.enable_gradient_checkpointing()
        pairs = latents.read_pairs(tiny / "pairs", model.config)
        args = type("Args", (), {"beta": 10.0, "shift": 3.0, "batch": 4, "seed": 0})
        task = wan.dpo(model, pairs, args)
        task.loss(task.batch(0, slice(0, 4)))[0].backward()
        gradients.append([value.grad for value in model.parameters() if value.requires_grad])
    assert len(gradients[0]) == 2 * 4 * 8  # down and up, four blocks, two attentions of four layers
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(*gradients))
    assert sum(value.abs().sum() for value in gradients[0]) > 0


# ---------------------------------------------------------------------------------------------
# Training


def before_and_after(text):
    return [float(v) for v in re.findall(r"(?:first batch|after 20 steps) ([\d.]+)", text)]


@pytest.mark.parametrize("algo", ["dpo", "rwr", "sft"])
def test_twenty_steps_lower_the_loss(command, tiny, algo):
    flags = "--steps 20 --batch 16 --lr 1e-3 --rank 4 --beta 10"  # 16 pairs are all there are
    before, after = before_and_after(command(algo, *flags.split()))
    assert after < 0.9 * before
    tensors, _ = wan_model.read_safetensors(tiny / "out" / f"{algo}.safetensors")
    assert len(tensors) == 64 and all(value.any() for value in tensors.values())


def test_the_reward_learns_brightness_and_guidance_raises_it(command, tiny):
    before, after = before_and_after(command("nrg", *"--steps 20 --batch 16 --lr 3e-3".split()))
    assert before == pytest.approx(math.log(2), abs=0.1) and after < 0.45
    model = wan_model.load_transformer(tiny / "model")
    reward = wan.WanReward(model)
    reward.load_state_dict(wan_model.read_safetensors(tiny / "out" / "nrg.safetensors")[0])
    x, y = inputs(64, seed=5)
    brighter = 0.5 * x
    brighter[:, 0] += 1.0
    with torch.no_grad():
        clips = (interpolate(x0, x.flip(0), torch.full((64,), 0.3)) for x0 in (brighter, 0.5 * x))
        scores = [reward(x_t, torch.full((64,), 0.3), y) for x_t in clips]
    assert (
        (scores[0] > scores[1]).float().mean(0) > 0.9
    ).all()  # in VQ, MQ and TA, on clips never seen
    text = command("sample", *"--steps 8 --n 8 --nrg 1,1,1 --nrg-scale 30".split())
    plain, guided = (
        [float(v) for v in re.findall(r"[VMT][QA] (\S+)", line)] for line in text.splitlines()
    )
    assert len(plain) == 3 and all(b > a + 0.5 for a, b in zip(plain, guided))
    made = [torch.from_numpy(np.load(tiny / "out" / f"{name}.npy")) for name in ("plain", "guided")]
    assert (
        made[0].shape == (8, 4, 2, 8, 8) and made[1][:, 0].mean() > made[0][:, 0].mean()
    )  # and it is brighter


def said(text):
    """Loss and accuracy of the first batch."""
    return re.search(r"loss of the first batch (\S+), accuracy (\S+)", text).groups()


def test_dpo_after_sft_starts_at_its_reference(command, tiny):
    """A policy at its reference has margin 0: loss ln 2 = 0.6931, half of the pairs right."""
    sft, dpo = tiny / "out" / "sft.safetensors", tiny / "out" / "dpo.safetensors"
    command("sft", *"--steps 20 --batch 16 --lr 1e-2 --rank 4".split())
    x, y = inputs()
    bare = prediction(wan_model.load_transformer(tiny / "model"), x, y)
    start = prediction(with_adapters(tiny / "model", sft), x, y)
    assert (start - bare).abs().max() > 0.1
    for beta in (10, 500):  # a step too small to move
        text = command(
            "dpo", "--steps", 1, "--batch", 16, "--lr", 1e-12, "--beta", beta, "--lora", sft
        )
        assert said(text) == ("0.6931", "0.50") and "ln 2" not in text
    # what is written holds both adapters: it belongs on the bare model, rank 4 + 64
    assert torch.allclose(prediction(with_adapters(tiny / "model", dpo), x, y), start, atol=1e-5)
    tensors, _ = wan_model.read_safetensors(dpo)
    assert {min(value.shape) for value in tensors.values()} == {24} and len(tensors) == 64
    assert {len(value) for name, value in tensors.items() if "lora_A" in name} == {68}


def test_a_first_loss_that_is_not_ln_2_is_said(command, tiny, monkeypatch):
    def moved(model, rank):
        wan_model_add(model, rank)
        for layer in model.modules():
            if isinstance(layer, LoRALinear):
                layer.up.data.fill_(0.3)

    wan_model_add = wan_model.add_adapters
    monkeypatch.setattr(wan_model, "add_adapters", moved)
    text = command("dpo", *"--steps 1 --batch 16 --rank 4 --beta 10".split())
    assert said(text)[0] != "0.6931" and "that is not ln 2 = 0.6931" in text


@pytest.mark.parametrize("algo", ["dpo", "nrg"])
def test_a_resumed_run_ends_at_the_same_bits(command, tiny, algo):
    flags = [algo, "--batch", 6, "--lr", 1e-3, "--rank", 4]
    if algo == "dpo":
        wan_model.write_adapters(adapted(tiny / "model"), {}, tiny / "lora.safetensors")
        flags += ["--lora", tiny / "lora.safetensors"]
    command(*flags, "--steps", 5)
    result = tiny / "out" / f"{algo}.safetensors"
    undisturbed = result.read_bytes()
    command(*flags, "--steps", 2)
    assert result.read_bytes() != undisturbed
    if algo == "dpo":
        (tiny / "lora.safetensors").write_bytes(undisturbed)  # the run knows what it started from
    assert "first batch" not in command(*flags, "--steps", 5, "--resume", "--accum", 1)
    assert result.read_bytes() == undisturbed
    for change, message in (
        (["--seed", 1], "--seed was 0 in .*, now 1"),
        (["--lr", 1], "--lr was 0.001"),
    ):
        with pytest.raises(BadInput, match=message):
            command(*flags, "--steps", 6, "--resume", *change)
    table = tiny / "pairs" / "pairs.csv"
    header, first, *rows = table.read_text().splitlines()
    table.write_text("\n".join([header, *rows, first]))
    with pytest.raises(BadInput, match="pairs.csv, by its SHA-256, was .*, now"):
        command(*flags, "--steps", 6, "--resume")
    (tiny / "out" / f"{algo}.pt").write_bytes((tiny / "out" / f"{algo}.pt").read_bytes()[:5000])
    with pytest.raises(BadInput, match=f"{algo}.pt: not a checkpoint that can be read"):
        command(*flags, "--steps", 6, "--resume")


def in_process(*flags):
    sys.argv = ["wan.py", *map(str, flags)]
    cli.FIRST = os.environ["RANK"] == "0"
    cli.run(wan.main)


@pytest.mark.parametrize("algo", ["dpo", "nrg"])
def test_micro_batches_and_processes_take_the_same_steps(command, tiny, algo):
    table = tiny / "pairs" / "pairs.csv"
    header, *rows = table.read_text().splitlines()
    for i in (0, 3, 4):  # ties, which must not weigh more in one part of a batch than in another
        rows[i] = ",".join([*rows[i].split(",")[:3], "1,0.5,0.2,1,0.4,0.1"])
    table.write_text("\n".join([header, *rows]))
    flags = [algo, *"--steps 3 --batch 8 --lr 1e-3 --rank 4 --device cpu".split()]
    results, losses = [], []
    for accum in (1, 2):
        losses.append(command(*flags, "--accum", accum).splitlines()[1])
        results.append(wan_model.read_safetensors(tiny / "out" / f"{algo}.safetensors")[0])
    places = ["--model", tiny / "model", "--data", tiny / "pairs", "--out", tiny / "two"]
    assert together(in_process, [[*places, *flags, "--accum", 2]], output=tiny / "log") == [0, 0]
    log = (tiny / "log").read_text()
    assert losses[0] == losses[1] and log.count(losses[0]) == 1 and "after 3 steps" in losses[0]
    results.append(wan_model.read_safetensors(tiny / "two" / f"{algo}.safetensors")[0])
    for name, value in results[0].items():
        if not name.endswith(
            "bias"
        ):  # Adam makes whole steps of the rounding of a gradient that is 0
            assert all(torch.allclose(other[name], value, atol=1e-4) for other in results[1:])
    with pytest.raises(BadInput, match="--batch 8: must be a multiple of 3"):
        command(*flags, "--accum", 3)


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
    (tmp_path / "30.mp4").write_text("no video")
    with pytest.raises(BadInput, match="30.mp4 cannot be decoded as a video"):
        latents.frames_at(tmp_path / "30.mp4")


# ---------------------------------------------------------------------------------------------
# Adapters in the library's format


def test_saved_adapters_are_what_their_names_say(tiny):
    model, (x, y) = adapted(tiny / "model"), inputs()
    wan_model.write_adapters(model, {}, tiny / "lora.safetensors")
    tensors, _ = wan_model.read_safetensors(tiny / "lora.safetensors")
    by_hand = wan_model.load_transformer(tiny / "model")
    base = prediction(by_hand, x, y)
    for name, b in tensors.items():
        if name.endswith(".lora_B.weight"):
            a = tensors[name.replace("lora_B", "lora_A")]
            by_hand.get_submodule(
                name.removeprefix("transformer.").removesuffix(".lora_B.weight")
            ).weight.data += b @ a
    again = with_adapters(tiny / "model", tiny / "lora.safetensors")
    assert torch.allclose(prediction(by_hand, x, y), prediction(model, x, y), atol=1e-5)
    assert torch.equal(prediction(again, x, y), prediction(model, x, y))
    assert (prediction(model, x, y) - base).abs().max() > 0.01


def test_the_library_loads_and_saves_the_same_adapters(tiny):
    peft = pytest.importorskip("peft")
    model, (x, y) = adapted(tiny / "model"), inputs()
    wan_model.write_adapters(model, {}, tiny / "lora.safetensors")
    library = wan_model.load_transformer(tiny / "model")
    library.load_lora_adapter(tiny / "lora.safetensors", prefix="transformer")
    assert torch.allclose(prediction(library, x, y), prediction(model, x, y), atol=1e-5)
    # and back, from adapters of the library's own, of another rank, alpha and choice of layers
    library = wan_model.load_transformer(tiny / "model")
    library.add_adapter(
        peft.LoraConfig(
            r=2, lora_alpha=6, target_modules=["to_q", "ffn.net.2"], init_lora_weights=False
        )
    )
    library.save_lora_adapter(tiny / "theirs")
    plain = prediction(wan_model.load_transformer(tiny / "model"), x, y)
    ours = with_adapters(tiny / "model", tiny / "theirs" / "pytorch_lora_weights.safetensors")
    assert torch.allclose(prediction(library, x, y), prediction(ours, x, y), atol=1e-5)
    assert (prediction(ours, x, y) - plain).abs().max() > 0.01


# ---------------------------------------------------------------------------------------------
# Bad input


def put(*shape):
    """A fault: the array in a file, replaced by one of this shape."""
    return lambda path: np.save(path, np.zeros(shape, np.float16))


def text(content):
    return lambda path: path.write_text(content)


def other_width(path):
    path.write_text(json.dumps(json.loads(path.read_text()) | {"ffn_dim": 40}))


def not_finite(path):
    array = np.load(path)
    array[1, 0, 2, 3] = np.nan
    np.save(path, array)


def pickled(path):
    path.rename(path.with_suffix(".bin"))


def in_shards(path):
    path.with_suffix(".safetensors.index.json").write_text(
        '{"weight_map": {"a": "part-2.safetensors"}}'
    )


LATENT, PROMPT, TABLE, CONFIG = (
    "pairs/3-latent_A.npy",
    "pairs/2-text.npy",
    "pairs/pairs.csv",
    "model/config.json",
)
WEIGHTS = "model/diffusion_pytorch_model.safetensors"
FAULTS = {
    "channels": (
        LATENT,
        put(3, 2, 8, 8),
        r"line 5, column latent_A: shape \(3, 2, 8, 8\).*takes \(4, T, H, W\)",
    ),
    "odd side": (LATENT, put(4, 2, 7, 8), r"line 5, column latent_A: .*multiples of \(1, 2, 2\)"),
    "too long": (LATENT, put(4, 33, 8, 8), r"line 5, column latent_A: .* at most 32 times them"),
    "empty": (LATENT, put(4, 0, 8, 8), r"line 5, column latent_A: shape \(4, 0, 8, 8\)"),
    "integers": (
        LATENT,
        lambda path: np.save(path, np.zeros((4, 2, 8, 8), int)),
        "line 5, .* holds int64",
    ),
    "no time": (LATENT, put(4, 8, 8), r"line 5, column latent_A: shape \(4, 8, 8\)"),
    "unlike": (
        "pairs/0-latent_B.npy",
        put(4, 2, 8, 6),
        r"line 2, column latent_B: .*8, 6\), but latent_A has .*8, 8\)",
    ),
    "no text": (PROMPT, Path.unlink, "line 4, column text: .*2-text.npy is missing"),
    "no array": (PROMPT, text("hello"), "line 4, column text: .*no .npy file"),
    "width": (
        PROMPT,
        put(6, 9),
        r"line 4, column text: shape \(6, 9\); this model takes \(words, 8\)",
    ),
    "words": (PROMPT, put(5, 8), r"line 4: shapes .*\(5, 8\), but .*\(6, 8\) in line 2"),
    "null": ("pairs/null.npy", Path.unlink, "text of no prompt: .*null.npy is missing"),
    "table": (TABLE, Path.unlink, "pairs.csv: cannot be read"),
    "column": (
        TABLE,
        text("latent_A,latent_B\na,b\n"),
        "line 2: needs files in latent_A, latent_B, text",
    ),
    "weights": (CONFIG, other_width, "ffn.* has another shape: .*in the file.*in the model"),
    "no weights": (WEIGHTS, Path.unlink, "has no weights, diffusion_pytorch_model"),
    "pickle": (
        WEIGHTS,
        pickled,
        "its weights are .bin files, pickles that may run code; save it as safetensors",
    ),
    "shard": (WEIGHTS, in_shards, "lacks part-2.safetensors, which its index names"),
    "cut off": (
        WEIGHTS,
        lambda path: os.truncate(path, 9999),
        "not a safetensors file that can be read",
    ),
    "sizes": (
        CONFIG,
        text('{"_class_name": "WanTransformer3DModel", "num_layers": "x"}'),
        "config.json: not the sizes",
    ),
    "expert": ("model", lambda path: (path.parent / "transformer_2").mkdir(), "has two experts"),
    "boundary": (
        "model",
        lambda path: (path.parent / "model_index.json").write_text('{"boundary_ratio": 0.875}'),
        "has two experts",
    ),
    "class": (
        CONFIG,
        text('{"_class_name": "FluxTransformer2DModel"}'),
        "holds a FluxTransformer2DModel",
    ),
    "images": (
        CONFIG,
        text('{"_class_name": "WanTransformer3DModel", "in_channels": 36}'),
        "text to video",
    ),
    "no model": (CONFIG, Path.unlink, "no config.json of a diffusers model"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_a_fault_is_one_line(command, tiny, name):
    place, damage, message = FAULTS[name]
    damage(tiny / place)
    with pytest.raises(BadInput, match=message) as fault:
        command("dpo", "--steps", "1")
    assert "\n" not in str(fault.value) and not (tiny / "out").exists()


def test_a_number_that_is_not_finite_is_named(command, tiny):
    not_finite(tiny / LATENT)
    with pytest.raises(
        BadInput,
        match=r"line 5, column latent_A: .*3-latent_A.npy holds nan at index \(1, 0, 2, 3\)",
    ):
        command("dpo", "--batch", 16, "--rank", 4)


def test_pairs_without_a_winner(command, tiny):
    table = tiny / "pairs" / "pairs.csv"
    header, *rows = table.read_text().splitlines()
    files = [",".join(row.split(",")[:3]) for row in rows]
    for scores, message in (
        ("1,2,3,3,2,1", "no pair has a winner"),
        ("1,2,nan,3,2,1", "line 2: needs .* numbers"),
    ):
        table.write_text("\n".join([header, *(f"{names},{scores}" for names in files)]))
        with pytest.raises(BadInput, match=message):
            command("rwr")


def test_files_of_another_model_are_refused(command, tiny):
    path = tiny / "lora.safetensors"
    wan_model.write_adapters(adapted(tiny / "model"), {}, path)
    tensors, _ = wan_model.read_safetensors(path)
    layer = "transformer.blocks.1.attn2.to_k"
    for name, shape in ((layer, (3, 23)), (layer, (2, 24)), (layer.replace(".1.", ".9."), (3, 24))):
        wan_model.write_safetensors(tensors | {f"{name}.lora_A.weight": torch.zeros(shape)}, path)
        with pytest.raises(
            BadInput, match=r"tensor 'blocks.[19].attn2.to_k.lora_[AB].weight' does not fit"
        ):
            command("sample", "--lora", path)
    for flags in (
        ("--lora", tiny / "pairs" / "pairs.csv"),
        ("--nrg", "1,1,1"),
    ):  # no such format, no such file
        with pytest.raises(BadInput, match="not a safetensors file that can be read"):
            command("sample", *flags)
    with pytest.raises(BadInput, match="lora.safetensors: .*belongs to another kind"):
        command("sample", "--nrg", "1,1,1", "--reward", path)


def shell(folder, *flags, **environment):
    """(exit status, standard error) of the command, started in another folder."""
    script = Path(__file__).parent.parent / "examples" / "wan.py"
    done = subprocess.run(
        [sys.executable, script, *flags],
        cwd=folder,
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )
    return done.returncode, done.stderr


def test_from_a_shell_in_another_folder(tmp_path):
    expected = "wan.py: error: argument --nrg: 1,1: must be three numbers with commas between, for example 1,1,0.5\n"
    assert shell(tmp_path, "--tiny", "sample", "--nrg", "1,1") == (2, expected)
    (tmp_path / "diffusers.py").write_text("raise ImportError('not here')")
    status, error = shell(tmp_path, "--tiny", "dpo", PYTHONPATH=str(tmp_path))
    assert (status, error) == (
        2,
        "wan.py: error: diffusers is needed: pip install diffusers (not here)\n",
    )
