"""Pack text files into tokens for `--dataset=tokens:PATH`: PATH, PATH.json and PATH.tokenizer.json.

    python=$(python3 launch/environment.py tokenize)    # an interpreter with what is needed, made on the first call
    $python launch/pack_tokens.py --output=data/books --vocabulary=16000 books/*.txt
    $python launch/pack_tokens.py --output=data/books --tokenizer=tokenizer.json --document=line books.txt

A byte-level BPE of `--vocabulary` tokens is trained on the files, or one is read from a file of Hugging Face's
tokenizers. After each document comes the token <|endoftext|>. The same files give the same bytes. Exit code 2: a flag
is wrong or a file cannot be read, in one line. Not named `tokenize.py`: Python would find it in place of its own.
"""

import sys
from pathlib import Path

if __name__ == "__main__":
    # Run as a script, this folder stands first on the path; the packages lie one above.
    sys.path[0] = str(Path(__file__).resolve().parent.parent)
    from trainers.world import process

    process.check_requirements(
        "tokenizers", remedy="start this with the interpreter that `python3 launch/environment.py tokenize` prints"
    )

import argparse
import array
import contextlib
import json
from collections.abc import Iterator, Sequence

import tokenizers

from trainers.settings.exit_codes import OK, BadConfiguration
from trainers.world import files, process

SEPARATOR = "<|endoftext|>"
DOCUMENTS = ("file", "line", "blank")
# All bytes and the separator.
_LEAST_VOCABULARY = 257
_LARGEST_OF_UINT16 = 65_535
# Characters of a document that are looked at together, and of pieces that are encoded together.
_PIECE, _BATCH = 1 << 18, 1 << 22


def pieces_of(path: Path, document: str) -> Iterator[tuple[str, bool]]:
    """The text of a file, and with each piece whether a document ends with it. Empty documents are left out.

    `document`: the file is one, cut where a word ends so that the tokens are those of the whole; or each line; or what
    stands between blank lines.

    Raises:
      BadConfiguration: the file cannot be read, or is not UTF-8.
    """
    try:
        with open(path, encoding="utf-8", newline="") as file:
            if document == "file":
                yield from _whole(file)
                return
            kept: list[str] = []
            for line in file:
                blank = not line.strip()
                if document == "line" and not blank:
                    yield line.rstrip("\r\n"), True
                elif document == "blank" and blank and kept:
                    yield "".join(kept), True
                    kept = []
                elif document == "blank" and not blank:
                    kept.append(line)
            if kept:
                yield "".join(kept), True
    except UnicodeDecodeError as error:
        raise BadConfiguration(f"{path} is not UTF-8 ({error.reason} at byte {error.start}); convert it") from None
    except OSError as error:
        raise BadConfiguration(f"{path} cannot be read: {error.strerror}; name text files") from None


def _whole(file: Iterator[str]) -> Iterator[tuple[str, bool]]:
    text = ""
    while block := file.read(_PIECE):
        text += block
        # A word and the white space after it are never one token.
        cut = next((i for i in range(len(text) - 1, 0, -1) if text[i].isspace() > text[i - 1].isspace()), 0)
        if len(text) >= 2 * _PIECE:
            cut = cut or len(text)
        if cut:
            yield text[:cut], False
            text = text[cut:]
    if text:
        yield text, True


def trained(paths: Sequence[Path], document: str, vocabulary: int) -> tokenizers.Tokenizer:
    """A byte-level BPE of at most `vocabulary` tokens."""
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=[SEPARATOR],
        initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator((text for path in paths for text, _ in pieces_of(path, document)), trainer)
    return tokenizer


def loaded(path: str) -> tokenizers.Tokenizer:
    """The tokenizer of a file."""
    try:
        return tokenizers.Tokenizer.from_file(path)
    except Exception as error:  # the library raises nothing more exact
        raise BadConfiguration(f"--tokenizer {path} cannot be read: {error}; name a tokenizer.json") from None


def encoded(tokenizer: tokenizers.Tokenizer, pieces: Iterator[tuple[str, bool]], separator: int) -> Iterator[list[int]]:
    """The tokens of pieces, one after another, with the separator after each document."""

    def flush(batch: list[tuple[str, bool]]) -> Iterator[list[int]]:
        results = tokenizer.encode_batch([text for text, _ in batch], add_special_tokens=False)
        for result, (_, ends) in zip(results, batch, strict=True):
            yield [*result.ids, separator] if ends else result.ids

    batch: list[tuple[str, bool]] = []
    size = 0
    for piece in pieces:
        batch.append(piece)
        size += len(piece[0])
        if size >= _BATCH:
            yield from flush(batch)
            batch, size = [], 0
    yield from flush(batch)


def write(path: Path, parts: Iterator[list[int]], code: str, separator: int) -> tuple[int, int]:
    """Writes tokens, lowest byte first; `code`: their type in `array`. Returns how many documents and tokens."""
    num_documents = num_tokens = 0
    with open(path, "wb") as file:
        for ids in parts:
            values = array.array(code, ids)
            if sys.byteorder == "big":
                values.byteswap()
            values.tofile(file)
            num_tokens += len(ids)
            num_documents += bool(ids) and ids[-1] == separator
    return num_documents, num_tokens


def pack(options: argparse.Namespace) -> int:
    """Writes the three files. Returns the exit code."""
    paths, output = [Path(name) for name in options.files], Path(options.output)
    if any(path.exists() and output.exists() and path.samefile(output) for path in paths):
        raise BadConfiguration(f"--output {output} is one of the files that are packed; name another")
    known = options.tokenizer
    tokenizer = loaded(known) if known else trained(paths, options.document, options.vocabulary)
    separator = tokenizer.token_to_id(SEPARATOR)
    if separator is None:
        raise BadConfiguration(f"--tokenizer {options.tokenizer} has no token {SEPARATOR}; name one that has")
    # Where the text has the separator's letters, they are text.
    tokenizer.encode_special_tokens = True
    tokenizer.no_truncation()
    tokenizer.no_padding()
    vocabulary = max(tokenizer.get_vocab().values()) + 1
    dtype, code = ("uint16", "H") if vocabulary <= _LARGEST_OF_UINT16 else ("uint32", "I")
    facts = {"dtype": dtype, "vocabulary": vocabulary, "length": options.length, "separator": separator}
    description, kept = (output.with_name(output.name + suffix) for suffix in (".json", ".tokenizer.json"))
    try:
        with contextlib.ExitStack() as stack:
            place_of_tokenizer, place_of_facts, place = (
                stack.enter_context(files.aside(path)) for path in (kept, description, output)
            )
            place_of_tokenizer.write_text(tokenizer.to_str(pretty=True), encoding="utf-8")
            place_of_facts.write_text(json.dumps(facts) + "\n", encoding="utf-8")
            pieces = (piece for path in paths for piece in pieces_of(path, options.document))
            num_documents, num_tokens = write(place, encoded(tokenizer, pieces, separator), code, separator)
            if not num_tokens:
                raise BadConfiguration(f"{options.files[0]} and the others hold no text; name text files")
            # Nobody may read the new tokens by the old description.
            description.unlink(missing_ok=True)
    except OSError as error:
        raise BadConfiguration(f"--output {output} cannot be written: {error.strerror}; name another") from None
    process.say(f"{output}: {num_documents} documents, {num_tokens} tokens of {vocabulary}, {dtype}")
    return OK


def options_from(arguments: Sequence[str]) -> argparse.Namespace:
    """The flags, checked."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    add = parser.add_argument
    add("files", nargs="+", help="text files, UTF-8, in the order in which they are packed")
    add("--output", required=True, metavar="PATH", help="the file of tokens")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--vocabulary", type=int, metavar="N", help="train a tokenizer of N tokens on the files")
    source.add_argument("--tokenizer", metavar="FILE", help="a tokenizer.json of Hugging Face")
    add("--document", choices=DOCUMENTS, default="file", help="what a document is (default: a file)")
    add("--length", type=int, default=1024, help="tokens that a model sees at once (default: 1024)")
    options = parser.parse_args(list(arguments))
    if options.vocabulary is not None and options.vocabulary < _LEAST_VOCABULARY:
        raise BadConfiguration(
            f"--vocabulary {options.vocabulary} is below {_LEAST_VOCABULARY}, all bytes and the separator; pass more"
        )
    if options.length < 1:
        raise BadConfiguration(f"--length {options.length} is below 1; pass 1 or more")
    return options


if __name__ == "__main__":
    sys.exit(process.run(lambda: pack(options_from(sys.argv[1:]))))
