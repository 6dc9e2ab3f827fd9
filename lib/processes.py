"""
The processes of a run: one, or as many as torchrun started, and the signals that stop them.

    end_on_signals()                                    # while there is nothing to save, Ctrl-C ends the program
    rank, world_size, device = start_processes("auto")
    stop_signals = note_signals()                       # then it fills this list, and the loop stops by itself
"""

import gc
import os
import signal
import sys
from datetime import timedelta

import torch
import torch.distributed as dist

from lib.machine import pick_device


def start_processes(device):
    """
    (rank, world_size, device of this process). With torchrun, each process takes a GPU and joins the group, in which
    tensors on GPUs travel over NCCL, tensors on the CPU and objects over gloo.
    """
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if world_size > 1 and device.startswith("cuda:"):
        sys.exit(f"error: {device} is one GPU, and {world_size} processes need one each: use --device=cuda")
    device = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if device.startswith("cuda"):
        torch.cuda.set_device(device)  # before the group starts, or NCCL would put every process on cuda:0
    if world_size > 1:
        backend = "cpu:gloo,cuda:nccl" if device.startswith("cuda") else "gloo"
        dist.init_process_group(backend, timeout=timedelta(minutes=30))
    return rank, world_size, device


def end_processes(world_size):
    """
    Leave the group, once every process has arrived here: none may leave while another still writes. The caller has let
    go of DistributedDataParallel. If it outlived the group, its destructor would end the group's thread and wait for it
    with Python's lock held, while that thread may wait for the lock: a run in two would never end.
    """
    if world_size > 1:
        dist.barrier()
        gc.collect()  # DistributedDataParallel is part of a cycle
        dist.destroy_process_group()


def end_on_signals():
    """Until note_signals() is called, a signal ends the program at once with one line: there is nothing to save yet."""

    def end(number, _):
        name = signal.Signals(number).name
        print(f"stopped by {name} before the first iteration: nothing was trained or saved", file=sys.stderr)
        sys.exit(128 + number)

    handle(end)


def note_signals():
    """A list to which each signal adds its number. The loop looks at it, and so no signal can interrupt a save."""
    noted = []
    handle(lambda number, _: noted.append(number))
    return noted


def handle(handler):
    """Install a handler for Ctrl-C, SIGTERM, SIGHUP (a closed terminal) and SIGUSR1 (Slurm's warning)."""
    for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1"):
        number = getattr(signal, name, None)  # Windows lacks the last two
        if number and not (name == "SIGHUP" and signal.getsignal(number) == signal.SIG_IGN):  # nohup ignores it
            signal.signal(number, handler)
