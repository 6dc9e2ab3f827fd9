# config/nano.py with Muon for the blocks' matrices and AdamW for the embedding and the norms, and twice the iterations.
#
# Muon makes each update of a matrix nearly orthogonal, by five rounds of matmuls of the matrix with itself. Here that
# makes an iteration a fifth longer. For SmolLM2-135M it is 1.46 TFLOP per update: 3.5 times the cost of training on 512
# tokens (config/toy.py), a tenth of it on 16,384. So it pays off for small matrices, or for batches of many tokens.

out_dir = "out/nano_muon"

hidden_size = 128
intermediate_size = 384
num_hidden_layers = 4
num_attention_heads = 4
num_key_value_heads = 2
head_dim = 32
max_position_embeddings = 128  # longer samples use a sliding window

batch_size = 2
block_size = 128  # better here than 4 x 64, unlike in config/nano.py (LOG.md)
max_iters = 2000
optimizer = "muon"
muon_learning_rate = 3e-3  # for the blocks' matrices
learning_rate = 1e-2  # for the embedding and the norms
beta2 = 0.99
schedule = "wsd"
warmup_iters = 0
lr_decay_iters = 2000
wsd_decay_iters = 1600  # linear over the last four fifths
min_lr = 1e-4  # above zero, so iterations after 2,000 still learn something
eval_interval = 250
eval_iters = 40
log_interval = 20
sample_interval = 500
sample_prompt = "This module"

compile = True
