"""
One line for each error: the object, the cause and what to do next, instead of a traceback.

    reject("--rows=speed: there is no such row")                 # exit code 2: the command was wrong
    sys.exit("error: out/ckpt.pt does not exist: train first")   # exit code 1: the run failed
    with usable("config.json", "download it again"): ...         # the same where a file is read and parsed
    with one_line_errors("lower batch_size", "out"): ...         # the same for memory and for a full disk
"""

import contextlib
import errno
import os
import re
import shlex
import sys


def check(ok, message):
    """Exit with one line unless `ok`. The message names the object, the cause and what to do next."""
    if not ok:
        sys.exit(f"error: {message}")


def reject(message):
    """Print one line and exit with code 2: the command was wrong, nothing was done."""
    print("error:", *message.splitlines(), file=sys.stderr)
    sys.exit(2)


def end_on_interrupt(kind, error, traceback):
    """Print one line for a Ctrl-C that the program does not handle, such as one while torch is being imported."""
    if not issubclass(kind, KeyboardInterrupt):
        return sys.__excepthook__(kind, error, traceback)
    print("interrupted", file=sys.stderr)
    sys.exit(130)


sys.excepthook = end_on_interrupt


def first_line(error):
    """Return the first line of an exception's message, or the exception's type if it has none."""
    text = str(error).strip() or type(error).__name__
    return text.splitlines()[0].split(" (Request ID")[0].rstrip(".:")


def silence_stdout():
    """Send standard output to nowhere, after its reader has gone: not even Python's own exit may trip over it."""
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


@contextlib.contextmanager
def usable(path, hint):
    """
    End the program with one line, "PATH cannot be used (REASON): HINT", where the block fails to read or parse a file.

        with usable(path, "download it again"):
            vocab_size = json.loads(path.read_bytes())["vocab_size"]
    """
    try:
        yield
    except MemoryError:
        raise
    except OSError as error:
        sys.exit(f"error: {path} cannot be used ({error.strerror or first_line(error)}): {hint}")
    except Exception as error:  # a damaged file fails in many ways, and each says the same: this file is bad
        reason = f"it has no {error.args[0]}" if isinstance(error, KeyError) and error.args else first_line(error)
        sys.exit(f"error: {path} cannot be used ({reason[:240]}): {hint}")


@contextlib.contextmanager
def one_line_errors(for_memory, folder="output"):
    """
    End the program with one line where the block runs out of memory, cannot write to `folder`, or loses another process
    of the run, and quietly where the reader of its output has gone. for_memory: what to do about memory. Other errors
    pass through, because they are bugs.
    """
    try:
        yield
    except BrokenPipeError:
        silence_stdout()
        sys.exit(141)  # as a shell reports SIGPIPE
    except OSError as error:
        if error.errno == errno.ENOMEM:
            sys.exit(f"error: out of memory: {for_memory}")
        path = re.sub(r"\.\d+\.tmp$", "", str(error.filename or folder))  # not the temporary file of an atomic write
        sys.exit(f"error: {path}: {error.strerror or error}: {write_hint(error)}")
    except (MemoryError, RuntimeError) as error:
        text = str(error)
        # a mere "memory" is in many other errors, such as an illegal memory access or a lack of shared memory
        memory = r"OutOfMemoryError|out of memory|can't allocate memory|not enough memory: you tried to allocate"
        if isinstance(error, MemoryError) or re.search(memory, f"{type(error).__name__} {text}"):
            sys.exit(f"error: out of memory ({first_line(error)[:200]}): {for_memory}")
        lost = r"Connection closed by peer|Connection reset by peer|gloo.*(closed|timed out|Broken pipe)|NCCL"
        if match := re.search(lost, text):
            resume = f"run the same command with --init_from=resume --out_dir={shlex.quote(str(folder))}"
            sys.exit(f"error: another process of this run ended ({match[0]}): {resume}")
        raise


def write_hint(error):
    """Return what to do about an OSError of a write."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return "the disk is full: free some space, or use another folder"
    if error.errno in (errno.EEXIST, errno.ENOTDIR, errno.EISDIR):
        return "move it away, or use another folder"
    return "use another folder"
