"""The plan's formulas against counted tensors and counted operations, on the CPU."""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import attention
import train
from flow import flow_error
from model import PRESETS, VideoTransformer
from runtime import cli
from settings import settings_of
from studies import cost


def arguments(*flags):
    return settings_of(["--algo=pretrain", "--plan=1", *flags])


def forward(network, clips):
    config = network.config
    x0 = torch.zeros(clips, *config.video_shape)
    y = torch.ones(clips, config.max_text, dtype=torch.int64)
    return flow_error(network, x0, torch.randn_like(x0), torch.full((clips,), 0.5), y).mean()


@pytest.mark.parametrize("checkpointed", [False, True])
def test_memory_of_a_small_model_is_what_it_allocates(checkpointed):
    """Every part of a real step of the small preset within 15 %."""
    torch.manual_seed(0)
    network = VideoTransformer(PRESETS["small"])
    network.grad_checkpoint = checkpointed
    own = {value.data_ptr() for value in (*network.parameters(), *network.buffers())}
    stored = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            stored[storage.data_ptr()] = storage  # each once, and held, so that none is reused
        return tensor

    planned = cost.memory(network, arguments("--preset=small", "--batch=1", "--ema=0"))
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        loss = forward(network, 1)
    activations = sum(storage.nbytes() for storage in stored.values())
    if checkpointed:
        d, n = network.config.dim, cost.tokens(network.config)
        one_block = 4 * cost.SAVED * n * d  # what the block that is computed again stores
        expected = planned["activations, checkpointed"]
        assert activations + one_block == pytest.approx(expected, rel=0.15)
        return
    assert planned["activations"] == pytest.approx(activations, rel=0.15)
    loss.backward()
    optimizer = torch.optim.AdamW(network.parameters())
    optimizer.step()
    moments = [m for state in optimizer.state.values() for m in state.values() if m.dim()]
    gradients = [p.grad for p in network.parameters()]
    for name, tensors in {"gradients": gradients, "optimiser": moments}.items():
        assert planned[name] == sum(value.untyped_storage().nbytes() for value in tensors)
    assert planned["weights"] == planned["gradients"] and planned["gathered"] == 0
    parts = [planned[name] for name in ("weights", "gradients", "optimiser", "activations")]
    assert planned["total, activations"] == sum(parts)


@pytest.mark.parametrize("algo", ["pretrain", "sft", "dpo"])
def test_flops_are_those_that_torch_counts(monkeypatch, algo):
    """torch's counter leaves out the fused kernel on CPUs; with plain products it counts all."""
    monkeypatch.setattr(attention, "choose", lambda q, plan: "naive")
    torch.manual_seed(0)
    network = VideoTransformer(PRESETS["nano"])
    clips = 3 if algo == "pretrain" else 6
    with FlopCounterMode(display=False) as counter:
        forward(network, clips).backward()
        if algo == "dpo":
            with torch.no_grad():
                forward(network, clips)  # the reference
    # the time and prompt layers, on one vector a clip, are left out of the formula
    flops = cost.step_flops(network.config, arguments("--batch=3", f"--algo={algo}"))
    assert flops == pytest.approx(counter.get_total_flops(), rel=0.03)


def test_parameters_of_the_presets_and_shares_by_hand():
    args = arguments("--plan=8", "--preset=large", "--fsdp", "--batch=256", "--ema=0")
    network = cost.planned_model(args)
    assert all(value.is_meta for value in network.parameters())
    every = sum(p.numel() for p in network.parameters())
    # a block of d = 1536: 18 d^2 weights, biases 3 d + d + 4 d + d + 6 d, two norms of 64 channels
    block = 18 * 1536**2 + 15 * 1536 + 2 * 64
    assert 24 * block < every < 25 * block and 0.9e9 < every < 1.1e9
    parts = cost.memory(network, args)
    assert parts["weights"] == parts["gradients"] == every / 2 and parts["optimiser"] == every
    assert parts["gathered"] == 8 * (every - 22 * block)
    alone = cost.memory(network, arguments("--preset=large", "--batch=32", "--ema=0"))
    assert alone["activations"] == parts["activations"]  # 32 clips a process
    args.accum = 4
    assert cost.memory(network, args)["activations"] == parts["activations"] / 4


def test_the_command_prints_it_and_writes_nothing(monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    flags = ["--plan=8", "--preset=large", "--fsdp", "--batch=256", "--accum=8", "--algo"]
    monkeypatch.setattr("sys.argv", ["train.py", *flags, "pretrain"])
    train.main()
    out = capsys.readouterr().out
    assert "1032.0 M parameters" in out and "4224 tokens a clip" in out and "256 clips" in out
    # 1,000 steps of 256 clips: 3 (24 (24 d^2 + 4 N d) N + small) each, over 8 x 4e14
    hours = 1000 * 256 * 3 * 24 * 4224 * (24 * 1536**2 + 4 * 4224 * 1536) / (8 * 4e14) / 3600
    printed = float(out.split("FLOP/s each: ")[1].split(" hours")[0])
    assert printed == pytest.approx(hours, rel=0.01)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("sys.argv", ["train.py", *flags, "reward"])
    with pytest.raises(cli.BadInput, match="--plan: knows"):
        train.main()
