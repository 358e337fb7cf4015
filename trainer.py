"""The training loop: one for every algorithm.

An algorithm is a Task: a model, a batch for each step, a loss, and a table at the end. All that is
random in step n comes from the seed and n, so a run that was stopped resumes bit for bit, and the
steps do not depend on the number of processes.
"""

import copy
import math
import sys
from collections.abc import Callable
from dataclasses import dataclass

import torch
from tqdm import tqdm

from runtime import distributed, resume
from runtime.cli import BadInput
from runtime.distributed import average_gradients, full_tensor, rank, reduce_logs


@dataclass
class Task:
    """What the loop needs to know of an algorithm."""

    kind: str  # of its checkpoint (runtime/checkpoint.py)
    model: torch.nn.Module  # the one that is trained
    words: list  # its vocabulary
    batch: Callable  # (step, rows) -> dict of CPU tensors: these rows, a slice, of the step's batch
    loss: Callable  # batch -> (loss, logs); the mean over equal parts is the whole batch's loss
    progress_keys: tuple  # names of the logs in the progress bar
    evaluate: Callable  # (model, out) -> lines to print; may write pictures and set buffers
    state_dict: Callable = torch.nn.Module.state_dict  # model -> tensors to save
    round_length: int = 0  # steps; a checkpoint ends each round
    extra_bytes: int = 0  # that it writes to --out beside the checkpoints


def lr_factor(step, steps, decay):
    """The learning rate's factor: a linear rise, 1, and a linear fall over the last share `decay`
    of the run."""
    rise = min(1.0, (step + 1) / resume.warmup_steps(steps))
    fall = min(1.0, (steps - step) / (decay * steps)) if decay else 1.0
    return rise * fall


def fit(task, settings, device, state=None):
    """Trains task.model to settings.steps, from `state` on if there is one -> lines that say how
    the training ended.

    SIGINT and SIGTERM save and exit with status 130. A loss or gradient that is not finite stops
    the run before it is used. Under torchrun every process calls this with the same arguments, and
    process 0 returns the lines."""
    is_main = rank() == 0
    last = settings.out / "last.pt"

    # the model, its optimiser and averaged weights
    model = task.model
    unsharded = None  # the shards are gathered in it
    if settings.fsdp and is_main:
        unsharded = copy.deepcopy(model).cpu()
    loss_of = distributed.wrap_model(task, device, settings)
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    optimizer = torch.optim.AdamW(
        trained.values(),
        settings.lr,
        betas=(0.9, 0.99),
        weight_decay=0.0,
        fused=device.type != "mps",
    )
    ema = {}
    if settings.ema:
        ema = {name: value.detach().clone() for name, value in trained.items()}

    # their numbers, from a checkpoint where there is one
    tensors = resume.run_tensors(trained, ema, optimizer)
    start = resume.restore(state, tensors) if state else 0
    rows = distributed.local_rows(settings.batch)

    # on the disk, as float32: the next checkpoint is written beside the last
    numbers = sum(value.numel() for value in [*model.parameters(), *tensors.values()])
    need = 2 * 4 * numbers + task.extra_bytes

    with (
        resume.open_log(settings.out, start, need) as write_log,
        resume.stop_requests() as stop,
        tqdm(
            total=settings.steps,
            initial=start,
            desc=settings.algo,
            dynamic_ncols=True,
            disable=not is_main,
        ) as bar,
    ):
        for step in range(start, settings.steps):
            # this process's rows of the batch
            batch = {name: value.to(device) for name, value in task.batch(step, rows).items()}

            # forward and backward, one micro-batch after the other
            micro_losses = []
            for i in range(settings.accum):
                micro_batch = {name: x.chunk(settings.accum)[i] for name, x in batch.items()}
                average_gradients(loss_of, i == settings.accum - 1)
                loss, logs = loss_of(micro_batch)
                (loss / settings.accum).backward()
                micro_losses.append((loss.item(), logs))
            grad_norm = torch.nn.utils.clip_grad_norm_(trained.values(), 1.0)
            grad_norm = full_tensor(grad_norm).item()

            # what all processes saw, before any of it is used
            loss, logs, stopping = reduce_logs(micro_losses, bool(stop))
            if not math.isfinite(loss) or not math.isfinite(grad_norm):
                fault = f"loss is {loss}, grad_norm {grad_norm} at step {step}"
                saved = resume.last_state(settings.out)
                raise BadInput(f"{fault} (--seed {settings.seed}); {saved}")

            # update
            factor = lr_factor(step, settings.steps, settings.decay)
            optimizer.param_groups[0]["lr"] = settings.lr * factor
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            decay = min(settings.ema, (step + 1) / (step + 10))  # a short memory at the start
            with torch.no_grad():
                for name, average in ema.items():
                    average.lerp_(trained[name], 1 - decay)

            # log
            write_log({"step": step, **logs, "grad_norm": grad_norm})
            figures = {name: f"{logs[name]:.3f}" for name in task.progress_keys if name in logs}
            bar.set_postfix(figures, refresh=False)
            bar.update()

            # save
            done = step + 1
            ends_round = task.round_length and done % task.round_length == 0
            is_due = done % settings.save_every == 0 or done == settings.steps
            if stopping or ends_round or is_due:
                final, saved = resume.snapshot(model, tensors, unsharded)
                resume.save_run(settings, task, done, final, saved)
            if stopping:
                bar.close()
                if is_main:
                    print(f"stopped after step {done}; --resume continues from {last}")
                sys.exit(130)

    if start == settings.steps:  # nothing was left to train
        final, saved = resume.snapshot(model, tensors, unsharded)
    if not is_main:
        return []
    lines = task.evaluate(final.to(device).eval(), settings.out)
    try:
        resume.save_run(settings, task, settings.steps, final, saved, True)
    except BadInput:
        print("\n".join(["", *lines]))  # the table is not lost with the file
        raise
    wrote = [settings.export] if settings.export else []
    wrote += [settings.out / "metrics.jsonl", last]
    return [*lines, *(f"wrote {path}" for path in wrote)]
