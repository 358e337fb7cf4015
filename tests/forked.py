"""Runs of train.py on tiny models, in forked processes, which need no start of Python and torch."""

import os
import re
import signal
import socket
import sys
import traceback
from dataclasses import asdict, replace
from pathlib import Path

import torch

import model
import reward
import train
from data import Vocabulary
from runtime import checkpoint, cli
from settings import settings_of

torch.optim.AdamW([torch.zeros(1, requires_grad=True)])  # imports a second's worth of torch
TINY = model.ModelConfig(dim=32, depth=3, heads=2, vocab=len(Vocabulary().words))


def tiny_checkpoints(folder, words=Vocabulary().words, **sizes):
    """Flags that name a tiny random base model and reward in `folder`."""
    torch.manual_seed(0)
    velocity = model.VideoTransformer(replace(TINY, vocab=len(words), **sizes))
    config = reward.RewardConfig(dim=24, depth=2, heads=2, vocab=len(words), **sizes)
    for kind, network in {"velocity": velocity, "reward": reward.VideoReward(config)}.items():
        for value in network.parameters():  # new blocks do nothing, as their gates are 0
            value.data += 0.05 * torch.randn(value.shape)
        state = {"kind": kind, "config": asdict(network.config), "model": network.state_dict()}
        checkpoint.save_checkpoint(folder / f"{kind}.pt", state | {"vocabulary": words, "step": 0})
    return [f"--init={folder / 'velocity.pt'}", f"--reward={folder / 'reward.pt'}"]


def fork(function, *args, output=os.devnull, **environment):
    """Starts function(*args) in a new process; its id. It ends with the function's SystemExit, or
    with 1 after an exception."""
    sys.stdout.flush()
    child = os.fork()
    if child:
        return child
    status = 1
    signal.alarm(150)  # a test that hangs fails
    signal.signal(signal.SIGINT, signal.default_int_handler)
    torch.set_num_threads(1)  # a pool of threads does not survive a fork
    try:
        handle = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(handle, 1)
        os.dup2(handle, 2)
        sys.stdout, sys.stderr = os.fdopen(1, "w"), os.fdopen(2, "w")
        os.environ.update(environment)
        model.PRESETS["nano"] = TINY
        function(*args)
        status = 0
    except SystemExit as stop:
        status = stop.code or 0
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def ended(child):
    """The exit status of a process, minus the signal's number where one ended it."""
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def with_read(flags, *more):
    """The flags of a training, behind those of `more` that its algorithm reads."""
    flags = list(map(str, flags))
    for flag in more:
        try:
            settings_of([flag, *flags])
        except cli.BadInput as error:
            if not re.search("read by|has no effect", str(error)):
                raise
        else:
            flags = [flag, *flags]
    return flags


def command(*flags):
    """train.py with these flags, as from a shell."""

    def main():
        short = with_read(flags, "--device=cpu", "--eval-prompts=2", "--eval-pairs=8")
        sys.argv = ["train.py", *short]
        train.main()

    cli.FIRST = os.environ.get("RANK", "0") == "0"
    cli.run(main)


def together(function, cases, output=os.devnull, ranks=2):
    """function(*case) for each of `cases` in processes as torchrun starts them; their statuses."""
    free = [socket.socket() for _ in cases]
    for each in free:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in free]
    for each in free:
        each.close()

    def all_cases():
        for port, case in zip(ports, cases):  # process 0 leaves a port later than the others
            os.environ["MASTER_PORT"] = str(port)
            function(*case)

    shared = {"MASTER_ADDR": "127.0.0.1", "WORLD_SIZE": str(ranks)}
    children = []
    for i in range(ranks):
        own = {"RANK": str(i), "LOCAL_RANK": str(i)}
        children.append(fork(all_cases, output=output, **shared, **own))
    return [ended(child) for child in children]


def weights(out):
    """The weights in a run's last.pt."""
    return checkpoint.load_checkpoint(Path(out) / "last.pt")["model"]


def same(a, b):
    """Equal to the last bit, through dicts and lists."""
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, list | tuple):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b))
    return a == b
