# All of SmolLM2-135M, trained from scratch on a toy corpus: 134,515,008 parameters, on a laptop.
#
# 4 sequences x 128 tokens = 512 tokens an iteration; 5,000 iterations = 2.56 M tokens, five sixths of the default
# corpus. The released weights saw 2,000,000,000,000: this run shows the machinery.

batch_size = 4
block_size = 128
max_position_embeddings = 128  # as long as the training sequences; longer samples use a sliding window

max_iters = 5000
learning_rate = 6e-4
beta2 = 0.995  # batches of few tokens: a rare token's second moment must be remembered for longer
schedule = "cosine"
warmup_iters = 200
lr_decay_iters = 5000
min_lr = 1e-5  # above zero, so that iterations after 5,000 learn something as well

eval_interval = 500
eval_iters = 40  # 40 x 512 tokens of val.bin
log_interval = 10

sample_interval = 500
sample_prompt = "The"

compile = True
