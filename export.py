"""
Weights go in; a Hugging Face folder comes out, which transformers, vLLM, llama.cpp's converter and others load.

    python export.py                                             # out/ckpt.pt -> out/export/
    python export.py --out_dir=out/nano --to=my_model            # another run's checkpoint, another folder
    python export.py --init_from=out/best.pt --dtype=bfloat16    # half the size, the release's own dtype

The folder says "LlamaForCausalLM", so model.py must be one: a network whose tensors or logits are not those of a
Llama is refused.
"""

import json
import shutil
import sys
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file

from configurator import configure
from lib.errors import first_line, one_line_errors, way_out
from lib.files import put_in_place, temporary
from lib.tokenizer import END_OF_TEXT, tokenizer_json
from lib.weights import config_to_json, find_weights, load_network


@dataclass(frozen=True)
class ExportConfig:
    """Write weights as config.json, model.safetensors and tokenizer files."""

    init_from: str = "resume"  # out_dir's ckpt.pt; or a release's name (base, instruct, ...), a folder, .gguf, .pt
    out_dir: str = "out"  # where that ckpt.pt is
    to: str = ""  # the folder to write; by default `export` in out_dir
    dtype: Literal["float32", "bfloat16"] = "float32"  # of the weights in the file


def llama_shapes(config):
    """{name: shape} of LlamaForCausalLM with a tied head, written out here so that a changed model.py is noticed."""
    C, D = config.hidden_size, config.head_dim
    Q, K, I = config.num_attention_heads * D, config.num_key_value_heads * D, config.intermediate_size  # noqa: E741
    block = {
        "input_layernorm": (C,),
        "self_attn.q_proj": (Q, C),
        "self_attn.k_proj": (K, C),
        "self_attn.v_proj": (K, C),
        "self_attn.o_proj": (C, Q),
        "post_attention_layernorm": (C,),
        "mlp.gate_proj": (I, C),
        "mlp.up_proj": (I, C),
        "mlp.down_proj": (C, I),
    }
    shapes = {"model.embed_tokens.weight": (config.vocab_size, C), "model.norm.weight": (C,)}
    for i in range(config.num_hidden_layers):
        shapes |= {f"model.layers.{i}.{name}.weight": shape for name, shape in block.items()}
    return shapes


def check_tensors_are_llamas(model):
    """End the program with one line if the network has other tensors than a Llama."""
    expected = llama_shapes(model.config)
    here = {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}
    for name in sorted(expected.keys() | here.keys()):
        if here.get(name) != expected.get(name):
            found = f"is {list(here[name])}" if name in here else "is missing"
            wanted = list(expected[name]) if name in expected else "no such tensor"
            sys.exit(f"error: {name} {found}, but a Llama has {wanted}: model.py was changed, so export.py must be too")


@torch.no_grad()
def check_logits_are_llamas(model, folder):
    """End the program with one line if transformers computes other logits from the folder. Returns what to print."""
    try:
        import transformers
    except ImportError:
        return "not compared with transformers, which is not installed: pip install transformers"
    transformers.logging.disable_progress_bar()
    peer = transformers.LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32, attn_implementation="eager")
    T = min(64, model.config.max_position_embeddings)
    idx = torch.randint(model.config.vocab_size, (1, T), generator=torch.Generator().manual_seed(0))
    ours, theirs = model(idx), peer(idx).logits
    error = ((ours - theirs).norm() / theirs.norm()).item()
    if not error < 1e-4:  # written so that NaN counts as wrong; equal networks differ by about 1e-6
        sys.exit(
            f"error: transformers' Llama computes other logits from these weights (relative error {error:.1e}): "
            "model.py was changed, so export.py must be too"
        )
    return f"transformers computes the same logits: relative error {error:.1e} on {T} tokens"


@one_line_errors("close other programs, or use a larger machine")
def main(config):
    folder = Path(config.to or Path(config.out_dir) / "export")
    if folder.exists():
        sys.exit(f"error: {folder} is there already: move it away, or give another with --to=")
    source = find_weights(config.init_from, config.out_dir)
    print(source.about)
    content, _ = tokenizer_json(**source.tokenizer)
    model = load_network(source)
    check_tensors_are_llamas(model)
    model.to(getattr(torch, config.dtype))
    end = "<|endoftext|>"
    ends = dict(bos_token_id=END_OF_TEXT, eos_token_id=END_OF_TEXT)
    settings = config_to_json(model.config, mlp_bias=False, torch_dtype=config.dtype, **ends)
    tokenizer = dict(tokenizer_class="PreTrainedTokenizerFast", bos_token=end, eos_token=end, unk_token=end)
    tokenizer |= dict(model_max_length=model.config.max_position_embeddings)

    unfinished = temporary(folder)
    try:
        unfinished.mkdir(parents=True)
        # The names in model.py are the release's, and the tied head is left out, as in the release.
        save_file(model.state_dict(), unfinished / "model.safetensors", metadata={"format": "pt"})
        (unfinished / "config.json").write_text(json.dumps(settings, indent=2) + "\n")
        (unfinished / "tokenizer.json").write_bytes(content)
        (unfinished / "tokenizer_config.json").write_text(json.dumps(tokenizer, indent=2) + "\n")
        compared = check_logits_are_llamas(load_network(find_weights(str(unfinished))), unfinished)
        put_in_place(unfinished, folder)
    except OSError as error:
        sys.exit(f"error: {folder} could not be written ({first_line(error)}): {way_out(error)} with --to=")
    except SafetensorError as error:  # its own error of a full disk
        sys.exit(f"error: {folder} could not be written ({first_line(error)}): free some disk, or use another --to=")
    finally:
        with suppress(OSError):
            shutil.rmtree(unfinished)  # only there if something failed
    size = sum(file.stat().st_size for file in folder.iterdir())
    print(f"{folder}: {sum(p.numel() for p in model.parameters()):,} parameters, {config.dtype}, {size / 1e6:,.0f} MB")
    print(compared)
    print(f'to load: transformers.AutoModelForCausalLM.from_pretrained("{folder}"), or sample.py --init_from={folder}')


if __name__ == "__main__":
    main(configure(ExportConfig))
