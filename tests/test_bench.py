"""The bench: its medians and its command, and gradient checkpointing, whose cost it measures."""

import json
import sys

import pytest
import torch

import evaluate
from model import ModelConfig
from studies import bench

CPU = torch.device("cpu")
SMALL = ModelConfig(frames=4, size=24, patch=(1, 4, 4), dim=64, depth=3, heads=2, max_text=4)


def test_a_slow_round_leaves_ratios_alone(monkeypatch):
    # a takes 1, 10 and 2 s, b 2, 20 and 4.2, after a round that does not count
    now, calls = [0.0], {"a": iter([9.0, 1.0, 10.0, 2.0]), "b": iter([9.0, 2.0, 20.0, 4.2])}

    def way(name):
        def run():
            now[0] += next(calls[name])

        return run

    monkeypatch.setattr(bench, "clock", lambda device: now[0])
    found = bench.times({name: way(name) for name in calls}, CPU, rounds=3)
    assert found == pytest.approx({"a": 1, "b": 2})


def test_the_command_writes_a_ratio_for_every_step(tmp_path, monkeypatch):
    def times(ways, device):
        for way in ways.values():
            way()
        return {name: 1.0 + i for i, name in enumerate(ways)}

    monkeypatch.setattr(bench, "times", times)
    monkeypatch.setattr(bench, "MEDIUM", SMALL)
    monkeypatch.setattr(bench.torch, "set_num_threads", lambda count: None)
    argv = ["evaluate.py", "bench", f"--out={tmp_path}", "--device=cpu"]
    monkeypatch.setattr(sys, "argv", argv)
    evaluate.main()
    saved = json.loads((tmp_path / "bench.json").read_text())
    assert [row["value"] for row in saved["rows"]] == [2, 3, 4]
    assert [row["best"] for row in saved["rows"]] == pytest.approx([4 / 3, 4 / 3, 1])
    table = bench.table({"bench": saved["rows"], "bench_h200": saved["rows"][1:]})
    name = "SFT step, gradient checkpointing / SFT step on both clips"
    assert table.rows[0] == [name, "2.00", "–", "1.33"]
