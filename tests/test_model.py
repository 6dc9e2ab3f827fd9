"""Test model.py against transformers and torch: the same weights and text must give the same numbers."""

from dataclasses import asdict, replace

import pytest
import torch
import torch.nn.functional as F
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

import model as model_py
from model import KVCache, ModelConfig, SmolLM2, cross_entropy, sample_ids, sampling_probs

SMALL = ModelConfig(
    vocab_size=256, hidden_size=72, intermediate_size=96, num_hidden_layers=3, num_attention_heads=9,
    num_key_value_heads=3, head_dim=8, max_position_embeddings=600,
)  # fmt: skip
SHAPES = {
    "H/K 3": SMALL,
    "H/K 1": replace(SMALL, num_attention_heads=3, num_key_value_heads=3, head_dim=24, rope_theta=130_000.0),
    "H/K 4": replace(SMALL, hidden_size=64, num_attention_heads=8, num_key_value_heads=2, rms_norm_eps=1e-4),
    "D not C/H": replace(SMALL, hidden_size=40, num_attention_heads=4, num_key_value_heads=1, head_dim=18),
}


def llama(config, **changes):
    """Return transformers' model of a ModelConfig, in fp32 with plain attention."""
    settings = asdict(config)
    theta = settings.pop("rope_theta")
    settings |= dict(rope_parameters={"rope_type": "default", "rope_theta": theta}, tie_word_embeddings=True)
    settings |= dict(bos_token_id=None, eos_token_id=None)
    return LlamaForCausalLM(LlamaConfig(**settings | changes, attn_implementation="eager")).eval()


def randomize(reference):
    """Give the weights std 0.2: with the usual 0.02, a wrong model hardly differs from the right one."""
    generator = torch.Generator().manual_seed(0)
    for p in reference.parameters():
        p.data.normal_(mean=float(p.dim() == 1), std=0.2, generator=generator)
    return reference


def build_ours(config, reference):
    model = SmolLM2(config).eval()
    model.load_state_dict({name: w for name, w in reference.state_dict().items() if name != "lm_head.weight"})
    return model


def build_random(config=SMALL):
    return build_ours(config, randomize(llama(config)))


def ids(B, T, seed=1, vocab_size=256):
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(seed))


# ---- The model
@pytest.mark.parametrize("T", [1, 2, 512, 600])  # attention takes a different path from 513 on
@pytest.mark.parametrize("shape", SHAPES)
def test_logits_and_gradients_are_those_of_transformers(shape, T):
    config = SHAPES[shape]
    reference = randomize(llama(config))
    model = build_ours(config, reference)
    idx, targets = ids(2, T), ids(2, T, seed=2)
    expected = reference(idx).logits
    assert expected.abs().max() > 3  # loud enough to be worth comparing
    torch.testing.assert_close(model(idx), expected, atol=1e-4, rtol=0)

    expected_loss = F.cross_entropy(expected.flatten(0, 1), targets.flatten())
    loss = model(idx, targets)
    torch.testing.assert_close(loss, expected_loss, atol=1e-5, rtol=0)
    expected_loss.backward()
    loss.backward()
    for name, p in reference.named_parameters():
        grad = model.get_parameter(name).grad
        assert (grad - p.grad).norm() <= 1e-4 * p.grad.norm(), name


@pytest.fixture(scope="module")
def real_reference(real_model):
    reference = llama(real_model.config)
    reference.load_state_dict(real_model.state_dict(), strict=False)
    return reference


def test_real_weights_on_real_text(real_model, real_reference, real_ids):
    idx = real_ids[:512].view(2, 256)
    with torch.no_grad():
        logits, expected = real_model(idx), real_reference(idx).logits
    assert F.cross_entropy(logits[:, :-1].flatten(0, 1), idx[:, 1:].flatten()) < 3.5  # it can read English
    torch.testing.assert_close(logits, expected, atol=2e-4, rtol=0)
    assert torch.equal(logits.argmax(-1), expected.argmax(-1))


def test_bfloat16_autocast_is_close_to_fp32(real_model, real_ids):
    idx, targets = real_ids[None, :128], real_ids[None, 1:129]
    with torch.no_grad():
        loss, logits = real_model(idx, targets), real_model(idx)
        with torch.autocast("cpu", torch.bfloat16):
            loss_bf16, logits_bf16 = real_model(idx, targets), real_model(idx)
    assert loss_bf16.dtype == torch.float32 and logits_bf16.dtype == torch.bfloat16
    assert abs(loss_bf16 - loss) < 0.02
    assert (logits_bf16.argmax(-1) == logits.argmax(-1)).float().mean() > 0.9


def test_state_dict_has_the_names_and_shapes_of_the_release():
    with torch.device("meta"):
        model, reference = SmolLM2(ModelConfig()), llama(ModelConfig())
    shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
    expected = {name: p.shape for name, p in reference.state_dict().items() if name != "lm_head.weight"}
    assert shapes == expected and len(shapes) == 272


def test_initial_weights():
    torch.manual_seed(0)
    for name, p in SmolLM2(replace(SMALL, vocab_size=2_048)).named_parameters():
        if p.dim() == 1:
            assert (p == 1).all(), name
        else:
            assert abs(p.std().item() * 24 - 1) < 0.05 and abs(p.mean().item()) < 2e-3, name


def test_impossible_shapes_raise_value_error():
    with pytest.raises(ValueError, match="multiple of num_key_value_heads"):
        replace(SMALL, num_key_value_heads=2)
    with pytest.raises(ValueError, match="head_dim .* even"):
        replace(SMALL, head_dim=7)
    model = SmolLM2(replace(SMALL, max_position_embeddings=8))
    model(ids(1, 8))
    for read in (model, lambda idx: next(model.generate(idx, 1))):
        with pytest.raises(ValueError, match="9 tokens do not fit a context of 8"):
            read(ids(1, 9))
    caches = [KVCache(8) for _ in range(SMALL.num_hidden_layers)]
    model.hidden(ids(1, 3), caches)
    with pytest.raises(ValueError, match="one token at a time"):
        model.hidden(ids(1, 2), caches)


# ---- The loss
@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(model_py.ChunkedCrossEntropy, "CHUNK", {"cpu": 16})
    monkeypatch.setattr(model_py.ChunkedCrossEntropy, "ROWS", 5)


def loss_inputs(N=37, C=24, V=101):
    generator = torch.Generator().manual_seed(3)
    x, head = torch.randn(N, C, generator=generator), torch.randn(V, C, generator=generator)
    return x.requires_grad_(), head.requires_grad_(), torch.randint(V, (N,), generator=generator)


@pytest.mark.parametrize("compiled", [False, True])
def test_cross_entropy_in_chunks_is_that_of_torch(small_chunks, compiled):
    x, head, targets = loss_inputs()
    expected = F.cross_entropy(F.linear(x, head), targets)
    expected_grads = torch.autograd.grad(3 * expected, (x, head))  # times 3: a loss is scaled before backward
    loss = cross_entropy(x, head, targets, compiled)
    grads = torch.autograd.grad(3 * loss, (x, head))
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(grads, expected_grads, atol=1e-5, rtol=0)

    loss = cross_entropy(x, head, targets, compiled)
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):  # instead of wrong gradients
        loss.backward()
    with torch.no_grad():
        silent = cross_entropy(x, head, targets, compiled)
    assert silent == loss and not silent.requires_grad

    x.grad = None  # without the filter, as on a GPU: rows of -1 are masked
    targets[::3] = -1
    expected = F.cross_entropy(F.linear(x, head), targets, ignore_index=-1)
    expected_grads = torch.autograd.grad(expected, (x, head))
    loss = model_py.ChunkedCrossEntropy.apply(x, head, targets, True, compiled)
    torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(torch.autograd.grad(loss, (x, head)), expected_grads, atol=1e-5, rtol=0)


def test_cross_entropy_of_conversations_takes_few_shapes(monkeypatch):
    """For any number of masked tokens: the loss of torch, from a multiple of 64 rows of logits."""
    apply, sizes = model_py.ChunkedCrossEntropy.apply, []
    record = lambda x, *args: sizes.append(len(x)) or apply(x, *args)  # noqa: E731
    monkeypatch.setattr(model_py.ChunkedCrossEntropy, "apply", record)
    for count in (0, 1, 64, 65, 199, 299, 300):
        x, head, targets = loss_inputs(N=300)
        targets[torch.randperm(300, generator=torch.Generator().manual_seed(count))[count:]] = -1
        loss = cross_entropy(x, head, targets)
        if not count:
            assert loss == 0 and all(not g.any() for g in torch.autograd.grad(loss, (x, head)))
            continue
        expected = F.cross_entropy(F.linear(x, head), targets, ignore_index=-1)
        torch.testing.assert_close(loss, expected, atol=1e-5, rtol=0)
        grads, exact = (torch.autograd.grad(value, (x, head)) for value in (loss, expected))
        torch.testing.assert_close(grads, exact, atol=1e-5, rtol=0)
    assert sizes == [0, 64, 64, 128, 256, 300, 300]


def test_cross_entropy_under_autocast(small_chunks):
    x, head, targets = loss_inputs()
    expected = F.cross_entropy(F.linear(x, head), targets)
    expected_grads = torch.autograd.grad(expected, (x, head))
    with torch.autocast("cpu", torch.bfloat16):
        loss = cross_entropy(x, head, targets)
        with torch.no_grad():
            assert cross_entropy(x, head, targets) == loss
    grads = torch.autograd.grad(loss, (x, head))
    assert loss.dtype == torch.float32 and abs(loss - expected) < 1e-2 * expected
    for grad, exact in zip(grads, expected_grads, strict=True):
        assert grad.dtype == torch.float32
        assert (grad - exact).norm() < 2e-2 * exact.norm()


# ---- Generation
def generate(model, idx, n, **settings):
    return torch.stack(list(model.generate(idx, n, **settings)), dim=1)


def generate_greedily(reference, idx, n, **settings):
    mask = torch.ones_like(idx)
    settings |= dict(max_new_tokens=n, do_sample=False, pad_token_id=0)
    return reference.generate(idx, attention_mask=mask, **settings)[:, idx.shape[1] :]


@pytest.mark.parametrize("shape", SHAPES)
def test_greedy_decoding_is_that_of_transformers(shape):
    reference = randomize(llama(SHAPES[shape]))
    model = build_ours(SHAPES[shape], reference)
    assert torch.equal(generate(model, ids(3, 11), 40, temperature=0), generate_greedily(reference, ids(3, 11), 40))


def test_greedy_decoding_with_real_weights_is_that_of_transformers(real_model, real_reference, real_ids):
    idx = real_ids[:64].view(2, 32)
    assert torch.equal(generate(real_model, idx, 16, temperature=0), generate_greedily(real_reference, idx, 16))


@torch.no_grad()
def test_cached_is_uncached():
    model = build_random()
    idx = ids(2, 60)
    expected = model.hidden(idx)  # (B, T, C)
    caches = [KVCache(60) for _ in range(SMALL.num_hidden_layers)]
    parts = [model.hidden(idx[:, :20], caches)] + [model.hidden(idx[:, t : t + 1], caches) for t in range(20, 60)]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=2e-5, rtol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("context", [15, 16])
def test_a_full_context_forgets_its_older_half(context):
    model = build_random(replace(SMALL, max_position_embeddings=context))
    window, expected = ids(2, 9), []
    for _ in range(40):  # without a cache, following only the docstring
        if window.shape[1] > context:
            window = window[:, -(context - context // 2) :]
        expected.append(model(window)[:, -1].argmax(-1))
        window = torch.cat((window, expected[-1][:, None]), dim=1)
    assert torch.equal(generate(model, ids(2, 9), 40, temperature=0), torch.stack(expected, dim=1))
    assert generate(model, ids(2, context), 3).shape == (2, 3)  # a prompt that fills the context


@pytest.mark.parametrize("penalty", [1.3, 0.7])
def test_the_repetition_penalty_is_that_of_transformers(penalty):
    reference = randomize(llama(SMALL))
    model, idx = build_ours(SMALL, reference), ids(3, 11)
    new = generate(model, idx, 40, temperature=0, repetition_penalty=penalty)
    assert torch.equal(new, generate_greedily(reference, idx, 40, repetition_penalty=penalty))
    assert not torch.equal(new, generate(model, idx, 40, temperature=0))


def test_unknown_ids_are_never_drawn():
    model = build_random()
    known = torch.arange(256) % 8 == 3
    for temperature in (0, 5.0):
        assert known[generate(model, ids(3, 9), 40, temperature=temperature, allowed=known)].all()


def test_stop_ids():
    model = build_random()
    free = generate(model, ids(2, 9), 40, temperature=0)
    ends = free[0, 5].item(), free[1, 12].item()  # two ids that the greedy rows do produce
    first = [min(row.tolist().index(end) for end in ends if end in row) for row in free]
    assert first[0] != first[1]
    stopped = generate(model, ids(2, 9), 40, temperature=0, stop_ids=ends)
    assert stopped.shape[1] == max(first) + 1
    for row, free_row, n in zip(stopped, free, first, strict=True):
        assert torch.equal(row[: n + 1], free_row[: n + 1])
        assert (row[n:] == free_row[n]).all()


@pytest.mark.parametrize("temperature, top_k, top_p", [
    (1.0, 0, 1.0), (0.7, 5, 1.0), (1.3, -1, 0.8), (0.7, 20, 0.6), (1.0, 1, 1.0), (1.0, 0, 0.0),
    (1.0, 1_000, 0.999), (0.2, 3, 0.05),
])  # fmt: skip
def test_top_k_and_top_p_are_those_of_transformers(temperature, top_k, top_p):
    logits = 4 * torch.randn(50, 256, generator=torch.Generator().manual_seed(4))
    expected = TemperatureLogitsWarper(temperature)(None, logits)
    if top_k > 0:
        expected = TopKLogitsWarper(top_k)(None, expected)
    if top_p < 1:
        expected = TopPLogitsWarper(top_p)(None, expected)
    expected = expected.softmax(-1)
    probs = sampling_probs(logits / temperature, top_k, top_p)
    probs = probs / probs.sum(-1, keepdim=True)
    assert torch.equal(probs > 0, expected > 0)
    torch.testing.assert_close(probs, expected)

    drawn = sample_ids(logits, temperature, top_k, top_p, torch.Generator().manual_seed(5))
    assert (expected.gather(1, drawn[:, None]) > 0).all()


def test_ids_are_drawn_in_proportion():
    logits = torch.tensor([0.1, 0.2, 0.3, 0.4]).log()
    drawn = sample_ids(logits.expand(20_000, 4), 0.5, 0, 1.0, torch.Generator().manual_seed(6))
    expected = torch.tensor([1.0, 4.0, 9.0, 16.0]) / 30  # squared, because the temperature is 1/2
    torch.testing.assert_close(drawn.bincount() / 20_000, expected, atol=0.01, rtol=0)


def test_a_generator_repeats_itself_and_leaves_the_global_one_alone():
    model = build_random()
    before = torch.get_rng_state()

    def sample(seed):
        return generate(model, ids(2, 9), 20, temperature=2.0, generator=torch.Generator().manual_seed(seed))

    assert torch.equal(sample(7), sample(7)) and not torch.equal(sample(7), sample(8))
    assert torch.equal(torch.get_rng_state(), before)


def test_compiled_training_is_eager_training():
    torch.manual_seed(0)
    model = SmolLM2(SMALL)
    results = []
    for _ in ("eager", "compiled"):
        model.zero_grad()
        loss = model(ids(2, 33), ids(2, 33, seed=2))
        loss.backward()
        results.append([loss.detach()] + [p.grad.clone() for p in model.parameters()])
        model.compile()
    for eager, compiled in zip(*results, strict=True):
        assert torch.allclose(eager, compiled, rtol=1e-5, atol=1e-5)


# In one piece; in two full chunks and a rest, recomputed in backward; torch's fused attention, which is fast with AMX
@pytest.mark.parametrize("T, amx", [(64, False), (1_100, False), (1_100, True)])
def test_compiled_attention_in_bf16_is_that_of_torch(monkeypatch, T, amx):
    """Values and gradients, in one graph, up to the rounding of bf16."""
    monkeypatch.setattr(model_py, "AMX", amx)
    generator = torch.Generator().manual_seed(8)
    q, k, v, grad = (torch.randn(2, heads, T, 16, generator=generator) for heads in (6, 2, 2, 6))
    inputs = [x.bfloat16().requires_grad_() for x in (q, k, v)]
    exact = [x.detach().double().requires_grad_() for x in inputs]
    expected = F.scaled_dot_product_attention(*exact, is_causal=True, enable_gqa=True)
    y = torch.compile(model_py.attend, backend="aot_eager", fullgraph=True)(*inputs)
    ours = (y, *torch.autograd.grad(y, inputs, grad.bfloat16()))
    for a, b in zip(ours, (expected, *torch.autograd.grad(expected, exact, grad.double())), strict=True):
        assert (a - b).norm() < 1e-2 * b.norm()


@torch.no_grad()
def test_compiled_decoding_is_eager_decoding():
    """The compiled model has its own matmuls for one token in one row; two rows use a library's."""
    torch.manual_seed(0)
    model = SmolLM2(SMALL)
    eager = [model(ids(B, 9)) for B in (1, 2)]
    model.compile()
    for B, expected in zip((1, 2), eager, strict=True):
        caches = [KVCache(9) for _ in model.model.layers]
        parts = [model.hidden(part, caches) for part in ids(B, 9).split([5, 1, 1, 1, 1], dim=1)]
        logits = torch.stack([model.head(x[:, -1]) for x in parts], dim=1)
        assert torch.allclose(logits, expected[:, 4:], atol=1e-5)
