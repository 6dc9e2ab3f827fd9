"""
Look at a model while it trains: its loss on val.bin, and a sample of text. Neither changes anything.

    val_loss, val_stderr = evaluate_loss(model, val_data, config, device)
    text = Sampler(config, device).write(model, iter_num)
"""

import torch

from lib.batches import count_targets, get_batch, mix, ratio
from lib.errors import check
from lib.machine import autocast
from lib.processes import get_rank, sum_over_ranks
from lib.tokenizer import END_OF_TEXT, encode, list_known_ids, load_tokenizer


@torch.no_grad()
def evaluate_loss(model, val_data, config, device):
    """
    Return the mean loss of a token in the first eval_iters batches of val.bin, in nats, and its standard error. The
    batches are always the same. All ranks take part and get the same numbers.
    """
    rank, world_size = get_rank()
    sums = torch.zeros(2, config.eval_iters + world_size, device=device)  # of each batch: its nats, its tokens
    # Every rank runs the same number of forwards, even if that is one too many: with --shard each is a collective.
    for i in range(rank, config.eval_iters + rank, world_size):
        x, y = get_batch(val_data, i * config.batch_size, config.batch_size, config, device)
        with autocast(device, config.dtype):
            n = count_targets(y)
            sums[:, i] = torch.stack((model(x, y) * n, n))
    return ratio(*sum_over_ranks(sums)[:, : config.eval_iters].cpu().double().numpy())


class Sampler:
    """Writes samples of text that begin with sample_prompt. Exits if the prompt is longer than the context."""

    def __init__(self, config, device):
        self.config, self.device = config, device
        self.encoding = load_tokenizer()
        self.prompt = encode(self.encoding, config.sample_prompt) or [END_OF_TEXT]
        self.allowed = torch.tensor(list_known_ids(self.encoding, config.vocab_size), device=device)
        context = config.max_position_embeddings
        check(len(self.prompt) <= context, f"sample_prompt is longer than the context ({context}): shorten it")

    def write(self, model, iter_num):
        """Return the prompt and 64 new tokens, as text. The random numbers of a sample are its own."""
        generator = torch.Generator(self.device).manual_seed(mix(self.config.seed, iter_num) >> 1)
        idx = torch.tensor([self.prompt], device=self.device)
        with autocast(self.device, self.config.dtype), torch.compiler.set_stance("force_eager"):
            new = model.generate(idx, 64, 0.8, top_k=50, allowed=self.allowed, generator=generator)
            return self.encoding.decode(self.prompt + [i.item() for i in new])
