"""
train.py with fp32 matmuls by one library, without timing which is faster: so two runs of a test give the same bits on a
busy machine as well.
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
import lib.processes  # noqa: E402
import train  # noqa: E402


def pick_matmul(dtype, *_):
    return dtype.replace("auto", "float32"), "highest"


if __name__ == "__main__":
    lib.processes.pick_matmul = pick_matmul
    train.main(train.configure(train.TrainConfig, saved=train.saved_settings))
