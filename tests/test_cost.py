"""The plan's formulas against counted tensors and counted operations, on the CPU."""

from dataclasses import replace

import pytest
import torch
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import attention
import lora
import model
import train
from flow import flow_error
from model import PRESETS, VideoTransformer
from runtime import cli
from settings import settings_of
from studies import cost


def arguments(*flags):
    return settings_of(["--algo=pretrain", "--plan=1", *flags])


class Saved:
    """Bytes that autograd keeps for backward, every storage once, parameters and buffers not."""

    def __init__(self, network):
        self.own = {
            value.untyped_storage().data_ptr()
            for value in (*network.parameters(), *network.buffers())
        }
        self.kept = {}
        self.hooks = torch.autograd.graph.saved_tensors_hooks(self.keep, lambda value: value)

    def keep(self, value):
        storage = value.untyped_storage()
        if storage.data_ptr() not in self.own:
            self.kept[storage.data_ptr()] = storage  # kept alive, so that no address comes twice
        return value

    def bytes(self):
        return sum(storage.nbytes() for storage in self.kept.values())


def forward(network, clips):
    config = network.config
    x0, y = (
        torch.zeros(clips, *config.video_shape),
        torch.ones(clips, config.max_text, dtype=torch.int64),
    )
    return flow_error(network, x0, torch.randn_like(x0), torch.full((clips,), 0.5), y).mean()


def test_memory_of_a_small_model_is_what_it_allocates():
    """Every part of a real step of the small preset, and the total, within 15 %."""
    torch.manual_seed(0)
    network = VideoTransformer(PRESETS["small"])
    saved = Saved(network)
    with saved.hooks:
        loss = forward(network, 1)
    measured = {"activations": saved.bytes()}
    loss.backward()
    optimizer = torch.optim.AdamW(network.parameters())
    optimizer.step()
    moments = [
        value for state in optimizer.state.values() for value in state.values() if value.dim()
    ]
    found = {
        "weights": list(network.parameters()),
        "gradients": [p.grad for p in network.parameters()],
    }
    for name, tensors in (found | {"optimiser": moments}).items():
        measured[name] = sum(value.untyped_storage().nbytes() for value in tensors)
    args = arguments("--preset=small", "--batch=1", "--ema=0")
    planned = cost.memory(cost.planned_model(args), args)
    assert (
        planned["weights"] == measured["weights"] and planned["gradients"] == measured["gradients"]
    )
    assert planned["optimiser"] == measured["optimiser"] and planned["gathered"] == 0
    assert planned["activations"] == pytest.approx(measured["activations"], rel=0.15)
    assert planned["total, activations"] == pytest.approx(sum(measured.values()), rel=0.15)


def test_activations_with_checkpointing(monkeypatch):
    """Blocks keep their inputs; the last one, computed again, all that it saves."""
    torch.manual_seed(0)
    network = VideoTransformer(replace(PRESETS["small"], frames=8))
    saved, inner = Saved(network), Saved(network)

    def run(hidden, condition, start, stop):
        for block in network.blocks[start:stop]:
            hidden = checkpoint(block, hidden, condition, network.rope, use_reentrant=False)
        return hidden

    monkeypatch.setattr(network, "run", run)
    with saved.hooks:
        forward(network, 1)
    d, n = network.config.dim, cost.tokens(network.config)
    assert saved.bytes() > len(network.blocks) * 4 * n * d  # the blocks' inputs are among it
    with inner.hooks:
        network.blocks[0](torch.zeros(1, n, d, requires_grad=True), torch.zeros(1, d), network.rope)
    args = arguments("--preset=small", "--batch=1")
    monkeypatch.setitem(model.PRESETS, "small", network.config)
    planned = cost.memory(cost.planned_model(args), args)["activations, checkpointed"]
    assert planned == pytest.approx(inner.bytes() + saved.bytes(), rel=0.15)


@pytest.mark.parametrize("flags", [[], ["--algo=dpo", "--freeze=2"], ["--algo=sft", "--freeze=0"]])
def test_flops_are_those_that_torch_counts(monkeypatch, flags):
    """torch's counter leaves out the fused kernel on CPUs; with plain products it counts all."""
    monkeypatch.setattr(attention, "choose", lambda q, plan: "naive")
    torch.manual_seed(0)
    args = arguments("--batch=3", *flags)
    network = VideoTransformer(PRESETS["nano"])
    if flags:
        lora.freeze_trunk(network, args.freeze)
    clips = 3 if not flags else 6
    with FlopCounterMode(display=False) as counter:
        if args.algo == "dpo":
            both = model.share_trunk(network, VideoTransformer(PRESETS["nano"]), args.freeze)
            config = network.config
            x, y = (
                torch.zeros(clips, *config.video_shape),
                torch.ones(clips, config.max_text, dtype=torch.int64),
            )
            both(x, torch.full((clips,), 0.5), y)[0].sum().backward()
        else:
            forward(network, clips).backward()
    # the time and prompt layers, on one vector a clip, are left out of the formula
    assert cost.step_flops(network.config, args) == pytest.approx(
        counter.get_total_flops(), rel=0.03
    )


def test_parameters_of_the_presets_and_shares_by_hand():
    args = arguments("--plan=8", "--preset=large", "--fsdp", "--batch=256", "--ema=0")
    network = cost.planned_model(args)
    assert all(value.is_meta for value in network.parameters())
    every = sum(p.numel() for p in network.parameters())
    # a block of d = 1536: 18 d^2 weights, biases 3 d + d + 4 d + d + 6 d, two norms of 64 channels
    block = 18 * 1536**2 + 15 * 1536 + 2 * 64
    assert (
        sum(p.numel() for p in network.blocks[0].parameters()) == block
        and 24 * block < every < 25 * block
    )
    assert 0.9e9 < every < 1.1e9
    parts = cost.memory(network, args)
    assert (
        parts["weights"] == every / 2
        and parts["optimiser"] == every
        and parts["gradients"] == every / 2
    )
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
    said = float(out.split("FLOP/s each: ")[1].split(" hours")[0])
    assert said == pytest.approx(hours, rel=0.01)
    assert not list(tmp_path.iterdir())
    monkeypatch.setattr("sys.argv", ["train.py", *flags, "reward"])
    with pytest.raises(cli.BadInput, match="--plan: knows"):
        train.main()
