"""
Run train.py with a fixed choice of fp32 matmuls, because the measured one may differ between runs on a busy machine.
Also list where two checkpoints differ.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import torch  # noqa: E402

import lib.processes  # noqa: E402
import train  # noqa: E402


def pick_matmul(dtype, *_):
    return dtype.replace("auto", "float32"), "highest"


def flatten(value, path=""):
    """Return {path: value} of everything in a checkpoint that is not a dict or list."""
    if isinstance(value, (list, tuple)):
        value = dict(enumerate(value))
    if not isinstance(value, dict):
        return {path: value}
    return {name: leaf for key, item in value.items() for name, leaf in flatten(item, f"{path}/{key}").items()}


def list_differing(a, b):
    """Return the paths of the values that two checkpoints do not share, to the bit."""
    a, b = flatten(a), flatten(b)
    equal = [k for k in a.keys() & b.keys() if (torch.equal(a[k], b[k]) if torch.is_tensor(a[k]) else a[k] == b[k])]
    return sorted((a.keys() | b.keys()) - {*equal})


if __name__ == "__main__":
    lib.processes.pick_matmul = pick_matmul
    train.main(train.configure(train.TrainConfig, saved=train.saved_settings))
