"""Text becomes a file of tokens that a trainer reads, the same each time, and is text again."""

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from conftest import ROOT

from trainers.input import load as data

SEPARATOR = "<|endoftext|>"
TEXT = ("The quick brown fox\n\n  jumps over the lazy dog's back.\tÄ é 漢字 🙂 123\r\n" * 40 + "the end") * 3


def interpreter():
    """One that has the library: this one, or that of `launch/environment.py tokenize`."""
    if importlib.util.find_spec("tokenizers"):
        return sys.executable
    place = Path(os.environ.get("LOCKSTEP_TOKENIZE", ROOT / ".venv.tokenize/bin/python"))
    if not place.exists():
        pytest.skip("tokenizers is not installed: python3 launch/environment.py tokenize")
    return place


def call(*words):
    command = [interpreter(), ROOT / "launch/pack_tokens.py", *words]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def decoded(path):
    """What the library itself makes of the tokens, a text for each document."""
    code = """
import json, sys, tokenizers, array
path = sys.argv[1]
tokenizer = tokenizers.Tokenizer.from_file(path + ".tokenizer.json")
facts = json.load(open(path + ".json"))
ids = array.array("H", open(path, "rb").read()).tolist()
documents, kept = [], []
for token in ids:
    if token == facts["separator"]:
        documents.append(tokenizer.decode(kept, skip_special_tokens=False)); kept = []
    else:
        kept.append(token)
assert not kept
print(json.dumps(documents))
"""
    done = subprocess.run([interpreter(), "-c", code, path], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.fixture
def texts(tmp_path):
    paths = [tmp_path / name for name in ("a.txt", "b.txt", "empty.txt")]
    for path, text in zip(paths, (TEXT, f"not the end: {SEPARATOR} of it\n" + TEXT[::-1], ""), strict=True):
        path.write_bytes(text.encode())
    return paths


def test_text_is_packed_the_same_each_time_and_is_text_again(tmp_path, texts):
    for name in ("one", "other"):
        done = call(f"--output={tmp_path / name}", "--vocabulary=400", "--length=32", *texts)
        assert done.returncode == 0, done.stderr
        assert "2 documents" in done.stderr and "uint16" in done.stderr
    for suffix in ("", ".json", ".tokenizer.json"):
        assert (tmp_path / f"one{suffix}").read_bytes() == (tmp_path / f"other{suffix}").read_bytes()
    assert not list(tmp_path.glob(".*"))
    assert decoded(tmp_path / "one") == [path.read_bytes().decode() for path in texts[:2]]
    facts = json.loads((tmp_path / "one.json").read_text())
    # The text has no more pairs to merge than these.
    assert facts == {"dtype": "uint16", "vocabulary": 371, "length": 32, "separator": 0}


def test_a_trainer_reads_what_was_packed_and_shows_it_as_text(tmp_path, texts):
    assert call(f"--output={tmp_path / 'packed'}", "--vocabulary=300", "--length=32", *texts).returncode == 0
    dataset = data.load(f"tokens:{tmp_path / 'packed'}", "")
    assert dataset.spec.input_shape == (32,) and dataset.spec.num_classes == 300
    tokens = np.fromfile(tmp_path / "packed", np.uint16)
    assert dataset.as_text(tokens[:2000].tolist()).startswith(TEXT[:1000])
    assert dataset.as_text([0, 0]) == 2 * SEPARATOR


def test_a_tokenizer_that_is_there_is_used(tmp_path, texts):
    assert call(f"--output={tmp_path / 'one'}", "--vocabulary=300", *texts).returncode == 0
    words = f"--tokenizer={tmp_path / 'one.tokenizer.json'}"
    assert call(f"--output={tmp_path / 'other'}", words, *texts).returncode == 0
    assert (tmp_path / "one").read_bytes() == (tmp_path / "other").read_bytes()


@pytest.mark.parametrize(
    ("document", "expected"),
    [("line", ["one", "two", "three  ", "four"]), ("blank", ["one\ntwo\n", "three  \r\nfour"])],
)
def test_documents_within_a_file(tmp_path, document, expected):
    (tmp_path / "text").write_bytes(b"\none\ntwo\n\n \nthree  \r\nfour")
    done = call(f"--output={tmp_path / 'out'}", "--vocabulary=257", f"--document={document}", tmp_path / "text")
    assert done.returncode == 0, done.stderr
    assert decoded(tmp_path / "out") == expected


def test_a_file_in_pieces_has_the_tokens_of_the_whole(tmp_path):
    """A file of 3 MB: its pieces are cut where a word ends."""
    text = TEXT * 400
    (tmp_path / "text").write_bytes(text.encode())
    assert call(f"--output={tmp_path / 'out'}", "--vocabulary=500", tmp_path / "text").returncode == 0
    code = """
import sys, tokenizers, array
path = sys.argv[1]
tokenizer = tokenizers.Tokenizer.from_file(path + ".tokenizer.json")
whole = tokenizer.encode(open(sys.argv[2], newline="").read(), add_special_tokens=False).ids
assert array.array("H", open(path, "rb").read()).tolist() == [*whole, 0]
"""
    command = [interpreter(), "-c", code, tmp_path / "out", tmp_path / "text"]
    assert subprocess.run(command, capture_output=True, text=True, check=False).returncode == 0
    assert decoded(tmp_path / "out") == [text]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--vocabulary=256", "{good}"], r"--vocabulary 256 is below 257"),
        (["--vocabulary=300", "--length=0", "{good}"], r"--length 0 is below 1"),
        (["--vocabulary=300", "/nonexistent"], r"/nonexistent cannot be read: No such file"),
        (["--vocabulary=300", "{bad}"], r"bad is not UTF-8 \(invalid start byte at byte 2\); convert it"),
        (["--vocabulary=300", "{empty}"], r"hold no text"),
        (["--tokenizer={good}", "{good}"], r"--tokenizer .*good cannot be read"),
        (["--vocabulary=300", "--output={good}", "{good}"], r"is one of the files that are packed"),
        (["--vocabulary=300", "--output=/nonexistent/out", "{good}"], r"/nonexistent/out cannot be written"),
    ],
)
def test_an_error_is_one_line_and_leaves_nothing(tmp_path, words, message):
    contents = {"good": b"a good text", "bad": b"no\xff", "empty": b""}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
    names = {name: tmp_path / name for name in contents}
    done = call(f"--output={tmp_path / 'out'}", *(word.format(**names) for word in words))
    assert done.returncode == 2 and len(done.stderr.splitlines()) == 1, done.stderr
    assert re.search(message, done.stderr), done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == sorted(contents)
