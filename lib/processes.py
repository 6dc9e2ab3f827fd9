"""
The processes of a run: one, or as many as torchrun started, and the signals that stop them.

    rank, world_size, device = start_processes("auto")
    stop_signals = note_signals()                       # a list that fills when Ctrl-C or SIGTERM arrives
"""

import os
import signal
from datetime import timedelta

import torch.distributed as dist

from lib.machine import pick_device


def start_processes(device):
    """(rank, world_size, device of this process). With torchrun, joins the group: NCCL on GPUs, gloo on CPUs."""
    rank, world_size = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = pick_device(device, int(os.environ.get("LOCAL_RANK", 0)))
    if world_size > 1:
        dist.init_process_group("nccl" if "cuda" in device else "gloo", timeout=timedelta(minutes=30))
    return rank, world_size, device


def end_processes(world_size):
    """Leave the group, once every process has arrived here: none may leave while another still writes."""
    if world_size > 1:
        dist.barrier()
        dist.destroy_process_group()


def note_signals():
    """A list to which Ctrl-C and SIGTERM add their number; the run looks at it. A second one ends the process."""
    noted = []

    def note(number, _):
        noted.append(number)
        signal.signal(number, signal.SIG_DFL)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, note)
    return noted
