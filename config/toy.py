# All 134,515,008 parameters of SmolLM2-135M, trained from scratch on a toy corpus, on a laptop.
#
# 4 sequences x 128 tokens = 512 tokens per iteration; 5,000 iterations = 2.56M tokens, five sixths of the default
# dataset. The released weights saw 2,000,000,000,000 tokens: this run shows the machinery.

batch_size = 4
block_size = 128
max_position_embeddings = 128  # as long as the training sequences; longer samples use a sliding window

max_iters = 5000
learning_rate = 6e-4
beta2 = 0.995  # small batches: rare tokens need a longer memory in the second moment
schedule = "cosine"
warmup_iters = 200
lr_decay_iters = 5000
min_lr = 1e-5  # above zero, so iterations after 5,000 still learn something

eval_interval = 500
eval_iters = 40  # 40 x 512 tokens of val.bin
log_interval = 10

sample_interval = 500
sample_prompt = "The"

compile = True
