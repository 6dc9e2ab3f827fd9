# The whole of SmolLM2-135M, trained from scratch on a toy corpus: all 134,515,008 parameters, on a laptop.
#
# 3 sequences x 128 tokens = 384 tokens an iteration; 5,000 iterations = 1.92 M tokens, less than two thirds
# of the default corpus. The released weights saw 2,000,000,000,000: this run shows the machinery.

batch_size = 3
block_size = 128
max_position_embeddings = 128  # as long as the training sequences; longer samples use a sliding window

max_iters = 5000
learning_rate = 6e-4
warmup_iters = 200
lr_decay_iters = 5000

eval_interval = 500
eval_iters = 40  # 40 x 384 tokens of val.bin
log_interval = 10

sample_interval = 500
sample_prompt = "The"

compile = True
