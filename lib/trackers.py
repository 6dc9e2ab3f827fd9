"""
The rows of log.csv, sent to an experiment tracker as well: trackio, wandb or tensorboard, if that package is installed.

    track = open_tracker("trackio", Path("out"), iter_num=0, settings={"seed": 1337}, say=print)
    track(iter=10, loss=9.8, lr=3e-4)

log.csv stays the truth. A resume cuts those rows that its checkpoint has not seen; trackio and wandb cannot, and keep
them. A tracker that fails is told once, and the training goes on without it.
"""

import atexit
import importlib
import secrets
import sys

from lib.errors import first_line
from lib.files import written_whole


def open_tracker(tracker, out_dir, iter_num, settings, say):
    """
    A function that takes a row of log.csv, by name, and does nothing if `tracker` is "none". A resumed run continues
    under its name, which is in out_dir/tracker_id. Ends the program with one line if the package is not installed.
    """
    if tracker == "none":
        return lambda **row: None
    try:
        module = importlib.import_module("torch.utils.tensorboard" if tracker == "tensorboard" else tracker)
    except ImportError as error:
        sys.exit(f"error: --tracker={tracker} cannot be used here ({first_line(error)}): pip install {tracker}")

    name_path = out_dir / "tracker_id"
    if not (iter_num and name_path.is_file()):  # a new run; two may have the same out_dir, one after the other
        with written_whole(name_path, "w") as file:
            file.write(f"{out_dir.resolve().name}-{secrets.token_hex(4)}")
    name = name_path.read_text().strip()

    if tracker == "tensorboard":  # purge_step: do not show what an earlier process wrote after the checkpoint
        writer = module.SummaryWriter(out_dir / "tensorboard" / name, purge_step=iter_num + 1 if iter_num else None)
        finish = writer.close

        def send(row, step):
            for metric, value in row.items():
                writer.add_scalar(metric, value, step)
    else:
        more = {"id": name} if tracker == "wandb" else {}
        module.init(project="nanosmollm", name=name, resume="allow", config=settings, **more)
        finish, send = module.finish, module.log

    failed = False

    def track(iter, **row):
        nonlocal failed
        try:
            if not failed:
                send(row, step=iter)
        except Exception as error:  # a network, a full disk, a bug of theirs: none may end a run
            failed = True
            say(f"note: {tracker} failed ({first_line(error)}): the run continues, without it")

    atexit.register(finish)
    return track
