"""Prompts in, text out: what a text generator reads, and tokens printed as they come."""

import codecs
import os
import sys
from collections.abc import Iterable, Iterator
from contextlib import suppress

from llmc.errors import UserError, explain_os_error
from llmc.files import open_file
from llmc.tokenizer import Tokenizer


def read_prompt(word: str) -> str:
    """What -p means by `word`: the text of @FILE, or of standard input for -, without a last newline; else itself."""
    if word == "-":
        stdin = sys.stdin or open(os.devnull)  # None: the caller closed it
        try:
            data = stdin.buffer.read()
        except OSError as error:
            raise explain_os_error(error, "standard input", "-p -: reading") from None
    elif word.startswith("@"):
        with open_file(word[1:]) as file:
            data = file.read()
    else:
        return word
    try:
        return data.decode().removesuffix("\n")
    except UnicodeDecodeError as error:
        found = f"byte {error.start} is {data[error.start]:#04x}, which is not UTF-8"
        raise UserError(f"-p {word}: {found}", "iconv -f LATIN1 -t UTF-8 turns an old file into UTF-8") from None


def typed_prompts() -> Iterator[str]:
    """The lines of standard input; on a terminal behind a mark, and edited as in a shell."""
    stdin, mark = sys.stdin or open(os.devnull), ""  # None: as above
    if stdin.isatty() and sys.stdout.isatty():
        mark = "> "
        with suppress(ImportError):
            import readline  # noqa: F401, what input() edits by
    sys.stdin = stdin
    while True:
        try:
            yield input(mark)
        except EOFError:
            if mark:
                print()  # the shell's own mark begins a line
            return
        except UnicodeDecodeError as error:
            raise UserError(f"-i: a prompt is no text: {error.reason}", "give it as UTF-8") from None
        except OSError as error:
            raise explain_os_error(error, "standard input", "-i: reading") from None


def print_text(tokens: Iterable[int], tokenizer: Tokenizer | None, stop: str = ""):
    """Print tokens as they come: whole UTF-8 characters, what is no UTF-8 as U+FFFD; ids without a tokenizer.

    Ends before the word `stop`; what may be its beginning waits for the next token.
    """
    decoder = codecs.getincrementaldecoder("utf-8")("replace")
    out, waiting = sys.stdout.buffer, ""
    for token in tokens:
        waiting += decoder.decode(tokenizer.decode(token)) if tokenizer else f"{token} "
        if stop and stop in waiting:
            out.write(waiting.partition(stop)[0].encode())
            return
        begun = next(n for n in range(max(0, len(stop) - 1), -1, -1) if waiting.endswith(stop[:n]))
        out.write(waiting[: len(waiting) - begun].encode())
        out.flush()
        waiting = waiting[len(waiting) - begun :]
    out.write((waiting + decoder.decode(b"", final=True)).encode())
