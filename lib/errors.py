"""
Exit with a one-line error instead of a traceback: the object, the cause and what to do next. "Exit if" means this.

    check(path.exists(), "out/ckpt.pt does not exist: train first")    # exit code 1: the run failed
    reject("--rows=speed: there is no such row")                       # exit code 2: the command was wrong
    with usable("config.json", "download it again"): ...               # for reading and parsing a file
    with one_line_errors("lower batch_size", "out"): ...               # for memory and failed writes
"""

import contextlib
import errno
import os
import re
import shlex
import sys


def check(ok, message):
    """Exit with code 1 and the message unless `ok`."""
    if not ok:
        sys.exit(f"error: {message}")


def reject(message):
    """Exit with code 2 and the message: the command was wrong, nothing was done."""
    print("error:", *message.splitlines(), file=sys.stderr)
    sys.exit(2)


def end_on_interrupt(kind, error, traceback):
    """Print one line for a Ctrl-C that nothing handles, such as one during the import of torch."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, traceback)
    print("interrupted", file=sys.stderr)
    sys.exit(130)


sys.excepthook = end_on_interrupt


def first_line(error):
    """Return the first line of an exception's message, or its type if it has none."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].split(" (Request ID")[0].rstrip(".:")


def silence_stdout():
    """Redirect standard output to os.devnull after its reader has gone: else Python's own exit would fail on it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def usable(path, hint):
    """Exit with "PATH cannot be used (REASON): HINT" if the block fails to read or parse a file."""
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:  # a damaged file can raise anything
        reason = first_line(error)[:240]
        if isinstance(error, OSError) and error.strerror:
            reason = error.strerror
        elif isinstance(error, KeyError) and error.args:
            reason = f"it has no {error.args[0]}"
        sys.exit(f"error: {path} cannot be used ({reason}): {hint}")


@contextlib.contextmanager
def one_line_errors(for_memory, folder="output"):
    """
    Exit if the block runs out of memory (for_memory: what to do about that), cannot write to `folder`, or loses another
    process of the run; exit silently if the reader of its output has gone. Other errors are bugs, and pass through.
    """
    try:
        yield
    except BrokenPipeError:
        silence_stdout()
        sys.exit(141)  # as a shell reports SIGPIPE
    except OSError as error:
        check(error.errno != errno.ENOMEM, f"out of memory: {for_memory}")
        path = re.sub(r"\.\d+\.tmp$", "", str(error.filename or folder))  # not the temporary file of an atomic write
        sys.exit(f"error: {path}: {error.strerror or error}: {suggest_fix(error)}")
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        # just "memory" is in many other errors, such as an illegal memory access or a lack of shared memory
        memory = r"OutOfMemoryError|out of memory|can't allocate memory|not enough memory: you tried to allocate"
        if isinstance(error, MemoryError) or re.search(memory, f"{type(error).__name__} {text}"):
            sys.exit(f"error: out of memory ({first_line(error)[:200]}): {for_memory}")
        lost = r"Connection closed by peer|Connection reset by peer|gloo.*(closed|timed out|Broken pipe)|NCCL"
        if match := re.search(lost, text):
            resume = f"run the same command with --init_from=resume --out_dir={shlex.quote(str(folder))}"
            sys.exit(f"error: another process of this run ended ({match[0]}): {resume}")
        raise


def suggest_fix(error):
    """Return what to do about an OSError from a write."""
    hints = dict.fromkeys((errno.ENOSPC, errno.EDQUOT, errno.EFBIG), "the disk is full: free some space, or ")
    hints |= dict.fromkeys((errno.EEXIST, errno.ENOTDIR, errno.EISDIR), "move it away, or ")
    return hints.get(error.errno, "") + "use a different folder"
