"""
A file's bytes -> its text: compression undone, encoding found, binaries named.

    encoding, how = encoding_of(Path("notes.txt.gz"))             # ("cp1252", "guessed"); (None, why not) for a binary
    with open_text(Path("notes.txt.gz"), encoding) as file: ...   # a text file like any other

The first 1 MB decides how a file is read. Then it is decoded a block at a time, so memory stays flat.
"""

import bz2
import codecs
import gzip
import io
import lzma
import os
import re
import sys
import unicodedata
from pathlib import Path

from lib.errors import first_line

SAMPLE = 2**20  # bytes: what decides the encoding
LOOK = 2**26  # bytes: search this far for the first byte that is not ASCII, because ASCII is in every encoding

# ---------------------------------------------------------------------------------------------
# Bytes


class Zst:
    """A .zst file, decompressed. The library's own reader takes a truncated file for a whole one."""

    def __init__(self, path):
        try:
            import zstandard
        except ImportError:
            sys.exit(f"error: {path}: reading .zst files needs zstandard: pip install zstandard")
        self.new_frame = zstandard.ZstdDecompressor(max_window_size=2**31).decompressobj
        self.file, self.frame, self.ready = open(path, "rb"), None, b""
        self.close = self.file.close

    def readinto(self, block):
        while not self.ready:
            if self.frame is None or self.frame.eof:
                compressed = self.frame and self.frame.unused_data or self.file.read(2**14)
                self.frame = self.new_frame() if compressed else None
                if not compressed:
                    return 0
            elif not (compressed := self.file.read(2**14)):
                raise EOFError("it ends within a frame")
            self.ready = self.frame.decompress(compressed)
        count = min(len(block), len(self.ready))
        block[:count], self.ready = self.ready[:count], self.ready[count:]
        return count


COMPRESSED = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open, ".zst": Zst}


def decompressed_name(path):
    """notes.txt.gz -> notes.txt, and notes.txt as it is."""
    return path.with_suffix("") if path.suffix.lower() in COMPRESSED else path


class Bytes(io.RawIOBase):
    """
    The bytes of a file, decompressed if its name ends in .gz, .bz2, .xz or .zst. `size` counts those read so far.
    Whatever the disk or the decompressor complains about ends the program with one line.
    """

    def __init__(self, path):
        self.path, self.size, self.file = path, 0, io.BytesIO()
        try:
            if self.compressed:
                self.file, self.promised = COMPRESSED[path.suffix.lower()](path), 0
            else:
                self.file = open(path, "rb", buffering=0)
                self.promised = os.fstat(self.file.fileno()).st_size
        except OSError as error:
            sys.exit(f"error: {path}: {error.strerror}: make the file readable, or leave it out")

    @property
    def compressed(self):
        return self.path.suffix.lower() in COMPRESSED

    def readable(self):
        return True

    def readinto(self, block):
        try:
            count = self.file.readinto(block)
        except Exception as error:  # the disk's errors, and those of four decompressors
            kind = f"not a whole {self.path.suffix} file" if self.compressed else "cannot be read"
            sys.exit(f"error: {self.path}: {kind} ({first_line(error)}): fetch it again, or leave it out")
        self.size += count
        if not count and self.size < self.promised:
            sys.exit(
                f"error: {self.path}: truncated while it was read, {self.size:,} bytes of {self.promised:,}: "
                "run the same command again when nobody writes to it"
            )
        return count

    def close(self):
        self.file.close()
        super().close()


def open_text(path, encoding, errors="replace"):
    """Open a file as text. Line ends stay as they are; a byte-order mark is no part of the text."""
    return io.TextIOWrapper(io.BufferedReader(Bytes(path)), encoding=encoding, errors=errors, newline="")


# ---------------------------------------------------------------------------------------------
# Encoding

MARKS = {  # the longer ones first: UTF-32's begins with UTF-16's
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF8: "utf-8-sig",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}

TO_TEXT = "pandoc --to=plain --output={name}.txt {file}"  # what converts a document to text
CONVERT = {
    ".docx": TO_TEXT, ".odt": TO_TEXT, ".epub": TO_TEXT, ".rtf": TO_TEXT, ".pdf": "pdftotext {file} {name}.txt",
    ".doc": "libreoffice --headless --convert-to txt {file}",
}  # fmt: skip

BINARIES = [  # (how it begins, what it is, the way out)
    (rb"%PDF-", "a PDF document", CONVERT[".pdf"]),
    (rb"PK\x03\x04", "a zip archive, as .docx and .epub files are", f"{TO_TEXT}, or unzip it"),
    (rb"\xd0\xcf\x11\xe0\xa1\xb1\x1a\xe1", "an old Office document", CONVERT[".doc"]),
    (rb"\x1f\x8b", "compressed with gzip", "rename it to end in .gz"),
    (rb"BZh[1-9]1AY&SY", "compressed with bzip2", "rename it to end in .bz2"),
    (rb"\xfd7zXZ\0", "compressed with xz", "rename it to end in .xz"),
    (rb"\x28\xb5\x2f\xfd", "compressed with zstd", "rename it to end in .zst"),
    (rb"version https://git-lfs\.github\.com/spec/", "a Git LFS pointer, not the file itself", "git lfs pull"),
    (rb"SQLite format 3\0", "an SQLite database", "export its text as .csv"),
    (rb"PAR1[\0-\x1f\x80-\xff]", "a parquet file", "rename it to end in .parquet"),
    (rb"ARROW1\0\0|\xff\xff\xff\xff[\0-\xff]{3}\0", "an Arrow file", "rename it to end in .arrow"),
    (rb"\x89PNG|\xff\xd8\xff|GIF8[79]a", "an image", "leave it out"),
    (rb"\x7fELF", "a program", "leave it out"),
    (rb"[\0-\xff]{257}ustar", "a tar archive", "unpack it, and name the folder"),
]

# What a text that is not Unicode may be in. ASCII is itself in all of them.
CODE_PAGES = [
    "cp1252", "cp1250", "cp1251", "cp1253", "cp1254", "cp1255", "cp1256", "cp1257", "cp1258", "iso8859_2", "iso8859_5",
    "iso8859_7", "koi8_r", "koi8_u", "mac_roman", "mac_cyrillic", "cp437", "cp850", "cp852", "cp866", "cp874",
    "cp932", "euc_jp", "iso2022_jp", "gb18030", "big5", "cp949", "johab",
]  # fmt: skip


def encoding_of(path):
    """
    (encoding, how it was found) of a text file; how is "" for UTF-8, "by its byte-order mark" or "guessed".
    (None, "what it is: the way out") if the file is not text.
    """
    with io.BufferedReader(Bytes(path)) as file:
        head = file.read(SAMPLE)
        for mark, encoding in MARKS.items():
            if head.startswith(mark):
                return encoding, "" if encoding == "utf-8-sig" else "by its byte-order mark"
        for begins, what, way_out in BINARIES:
            if re.match(begins, head):
                return None, f"{what}: {way_out.format(file=path, name=Path(path).stem)}"
        binary = None, "a binary file, not text: convert it to text, or leave it out"
        if b"\0" in head:
            for encoding in wide_encodings(head):
                if is_text(head, encoding):
                    return encoding, "guessed"
            if head.count(b"\0") * 100 > len(head):
                return binary
        looked = 0
        while head.isascii() and (looked := looked + SAMPLE) < LOOK and (more := file.read(SAMPLE)):
            head = more
    bad, good = utf8_bytes(head)
    if bad <= good:  # UTF-8, perhaps with a few broken characters
        return "utf-8-sig", ""
    if b"\0" in head:
        return binary
    encoding = guess(head)
    return (encoding, "guessed") if encoding else binary


def wide_encodings(head):
    """UTF-32, or UTF-16 where the NULs, each half of an ASCII character, are in every second byte."""
    yield "utf-32-le"
    yield "utf-32-be"
    even, odd = head[::2].count(0), head[1::2].count(0)
    if even * 20 <= odd or odd * 20 <= even:
        yield "utf-16-le" if odd > even else "utf-16-be"


def is_text(head, encoding):
    """Whether the bytes decode without an error, and at most 1 % of the characters are of no use in a text."""
    try:
        text = codecs.getincrementaldecoder(encoding)().decode(head, final=len(head) < SAMPLE)
    except UnicodeDecodeError:
        return False
    useless = sum(unicodedata.category(c) in ("Cc", "Cn", "Co", "Cs") and c not in "\t\n\v\f\r\b\x1a\x1b" for c in text)
    return useless * 100 <= len(text)


def utf8_bytes(head):
    """(bytes that are not UTF-8, bytes of characters beyond ASCII that are)."""
    text = codecs.getincrementaldecoder("utf-8")("surrogateescape").decode(head, final=len(head) < SAMPLE)
    bad = len(re.findall("[\udc80-\udcff]", text))
    return bad, sum(len(part.encode()) for part in re.findall("[^\0-\x7f\udc80-\udcff]+", text))


# What Western European languages write beyond ASCII, without what is frequent where Hungarian, Turkish, Russian or
# Greek is read as cp1252. charset-normalizer alone takes "naïve café" for cp1257.
WESTERN = "ÀÁÂÄÅÆÇÈÉÊËÌÍÏÑÒÓÔÖØÙÚÜßàáâãäåæçèéêëìíïñòóôöøùúüœ¡¿"
SIGNS = "€…‘’“”•–—™\xa0©®«»°"


def guess(head):
    """The code page of a text that is not UTF-8, or None. Only its lines beyond ASCII are looked at: they tell most."""
    from charset_normalizer import from_bytes

    telling = b"\n".join(re.findall(rb"[^\n]*[\x80-\xff][^\n]*", head))[: 2**16]
    letters = [c for c in telling.decode("cp1252", "replace") if c > "\x7f" and c not in SIGNS]
    western = WESTERN + "õÕ" * ("ã" in letters)  # Portuguese has both, Hungarian's ő alone looks like õ
    best = from_bytes(telling, cp_isolation=CODE_PAGES).best()
    likely = [best.encoding] if best else ["cp1252"]
    if best and "cp1252" in best.could_be_from_charset or sum(c in western for c in letters) >= 0.93 * len(letters):
        likely.insert(0, "cp1252")
    return next((encoding for encoding in likely if is_text(telling, encoding)), None)
