# A small SmolLM2 for a first run on a laptop: the same code and vocabulary, but 7.1M parameters, 6.3M of them in the
# embedding.
#
# 4 sequences x 64 tokens = 256 tokens per iteration; 1,000 iterations = 256,000 tokens, a twelfth of the default
# dataset. 2,000 iterations would lower the loss by 0.4 nats more, in twice the time (LOG.md).
#
# With Muon for the blocks' matrices an iteration takes a fifth longer, and 2,000 of them reach 0.5 nats less (LOG.md):
#
#   python train.py config/nano.py --out_dir=out/muon --optimizer=muon --muon_learning_rate=3e-3 --learning_rate=1e-2 \
#       --beta2=0.99 --warmup_iters=0 --min_lr=1e-4 --batch_size=2 --block_size=128 --max_position_embeddings=128
#
# For SmolLM2-135M, Muon's matmuls are 1.46 TFLOP per update: 3.5 times the cost of training on 512 tokens
# (config/toy.py), a tenth of it on 16,384. So it pays off for small matrices, or for batches of many tokens.

out_dir = "out/nano"

hidden_size = 128
intermediate_size = 384
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 32
max_position_embeddings = 64  # longer samples use a sliding window

batch_size = 4
block_size = 64
max_iters = 1000
learning_rate = 2e-3
beta2 = 0.999  # 0.12 bits per byte better than 0.95 after 2,000 iterations (LOG.md)
schedule = "wsd"
warmup_iters = 100
lr_decay_iters = 1000
wsd_decay_iters = 800  # linear over the last four fifths
min_lr = 2e-5  # above zero, so iterations after 1,000 still learn something
eval_interval = 250
eval_iters = 40
log_interval = 20
sample_interval = 500
sample_prompt = "This module"

compile = True  # 70 ms per iteration instead of 95; runs eagerly if there is no C++ compiler
