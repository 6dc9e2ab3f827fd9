"""Damage the contents of files at random."""

import re


def spoil(content, rng):
    """Return the bytes of a file with a few of them, or one token of its JSON, changed."""
    content = bytearray(content)
    for _ in range(rng.choice([1, 1, 2, 8])):
        start = min(rng.randrange(len(content)), int(rng.expovariate(1 / 400)))  # headers more often than tensors
        match rng.randrange(5):
            case 0:
                content[start] = rng.randrange(256)
            case 1:
                value = rng.choice([b"\xff" * 8, b"\0" * 8, b"\0\0\0\0\0\0\0\x10"])
                content[start : start + rng.choice([1, 4, 8])] = value
            case 2:
                del content[start : start + rng.randrange(1, 9)]
            case 3:
                del content[start:]
            case 4:
                tokens = list(re.finditer(rb"-?\d[\d.e-]*|true|false|null|\"[\w./ -]*\"", content))
                if tokens:
                    token = rng.choice(tokens)
                    content[token.start() : token.end()] = rng.choice(ODD)
        if not content:
            break
    return bytes(content)


ODD = [
    b"null", b"true", b"-1", b"0", b"1e999", b"NaN", b"64.5", b'"x"', b'"../x"', b"[]", b"{}", b"[[1]]", b"1e9", b'"a"',
    b"99999999999999999999", b'"\\ud800"', b'"a\\nb"', b"[" * 3_000,
]  # fmt: skip
