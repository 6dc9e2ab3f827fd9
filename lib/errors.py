"""
What a command that fails says: one line that names the thing, the cause and a way out, instead of a traceback.

    reject("--rows=speed: there is no such row")                 # exit code 2: the command was wrong
    sys.exit("error: out/ckpt.pt does not exist: train first")   # exit code 1: the run failed
    with one_line_errors("out", "lower batch_size"): ...         # the same for a full disk and for memory
"""

import contextlib
import errno
import sys


def reject(message):
    """Print one line and exit with code 2: the command was wrong, nothing was done."""
    print("error:", *message.splitlines(), file=sys.stderr)
    sys.exit(2)


def first_line(error):
    """The first line of an exception's message, or its kind if it has none."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].split(" (Request ID")[0].rstrip(".:")


@contextlib.contextmanager
def one_line_errors(folder, for_memory):
    """
    End the program with one line where the block runs out of memory or cannot write to `folder`. for_memory: what to do
    about memory. Other errors pass through, because they are bugs.
    """
    try:
        yield
    except OSError as error:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
        in_the_way = error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR)
        way_out = "free some disk, or " if full else "move it away, or " if in_the_way else ""
        sys.exit(f"error: {error.filename or folder}: {error.strerror or error}: {way_out}use another folder")
    except (MemoryError, RuntimeError) as error:  # torch's own is a RuntimeError
        if isinstance(error, RuntimeError) and "memory" not in str(error):
            raise
        sys.exit(f"error: out of memory: {for_memory}")
