"""Packed tokens, and text at size: windows held and windows mapped are the same, and what is damaged is named."""

import dataclasses
import json
import mmap
import os
import signal
import subprocess
import sys

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT, largest_relative_difference, metrics, weights

from models import transformers
from models.cards import MODELS
from trainers.input import batches, records
from trainers.input import load as data
from trainers.input.kinds.tokens import description_of
from trainers.run import examples
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.rules import resolve

LENGTH, VOCABULARY = 16, 50_257
FACTS = {"dtype": "uint16", "vocabulary": VOCABULARY, "length": LENGTH}


def pack(folder, tokens=None, text=None, **facts):
    """A token file of 400 windows and its description. `text`: what the description holds instead."""
    facts = FACTS | facts
    path = folder / "packed"
    if tokens is None:
        tokens = np.random.default_rng(0).integers(0, VOCABULARY, 400 * LENGTH + 5)
    np.asarray(tokens).astype(facts["dtype"] if facts["dtype"] in ("uint16", "uint32") else "uint16").tofile(path)
    (folder / "packed.json").write_text(json.dumps(facts) if text is None else text)
    return path


def load(path, placement="auto", kind="tokens"):
    return data.load(f"{kind}:{path}", "", placement)


def windows(split):
    return np.stack([example["tokens"] for example in split.examples().as_numpy_iterator()])


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_windows_held_and_windows_mapped_are_the_same(tmp_path, dtype):
    vocabulary = VOCABULARY if dtype == "uint16" else 2**31 - 1
    tokens = np.random.default_rng(0).integers(0, vocabulary, 400 * LENGTH + 5)
    path = pack(tmp_path, tokens, dtype=dtype, vocabulary=vocabulary)
    held, mapped = load(path), load(path, "stream")
    assert (held.train.size, held.eval.size) == (mapped.train.size, mapped.eval.size) == (360, 40)
    assert held.spec == mapped.spec
    assert (held.spec.num_classes, held.spec.input_shape, held.spec.input_dtype) == (vocabulary, (LENGTH,), "int32")
    for one, other in ((held.train, mapped.train), (held.eval, mapped.eval)):
        assert other.arrays is None and other.records is not None
        np.testing.assert_array_equal(one.arrays["tokens"], windows(other))
    inputs, targets = held.prepare({"tokens": np.concatenate([windows(mapped.train), windows(mapped.eval)])})
    np.testing.assert_array_equal(np.ravel(inputs), tokens[: 400 * LENGTH])
    np.testing.assert_array_equal(np.ravel(targets), tokens[1 : 400 * LENGTH + 1])


def test_text_held_and_text_mapped_are_the_same(tmp_path):
    path = tmp_path / "text"
    path.write_bytes(np.random.default_rng(0).bytes(50_000))
    held, mapped = load(path, kind="text"), load(path, "stream", kind="text")
    for one, other in ((held.train, mapped.train), (held.eval, mapped.eval)):
        np.testing.assert_array_equal(one.arrays["tokens"], windows(other))
    assert held.spec == mapped.spec


def sees(split, steps, first=0, seed=3):
    """The inputs of the global batches `first … first + steps` of two replicas."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"], cross_device_ops=tf.distribute.ReductionToOneDevice())
    source = batches.batches(strategy, split, 12, seed)
    source.start(first)

    @tf.function
    def batch(step):
        order = strategy.run(source.order, args=(step, step + 1))
        return strategy.run(lambda *fed: source.part(*fed, step, 0)[0]["tokens"], args=(source.feed()[0], order))

    parts = [strategy.experimental_local_results(batch(tf.constant(first + i, tf.int64))) for i in range(steps)]
    return np.array([np.concatenate(part) for part in parts]), source


def test_a_run_sees_the_same_examples_wherever_they_lie(tmp_path):
    path = pack(tmp_path)
    expected, _ = sees(load(path).train, 40)
    seen, source = sees(load(path, "stream").train, 40)
    np.testing.assert_array_equal(seen, expected)
    later, _ = sees(load(path, "stream").train, 5, first=33)
    np.testing.assert_array_equal(later, expected[33:38])
    assert source.bytes_read() == source.examples_read() * (LENGTH + 1) * 2 > 40 * 12 * (LENGTH + 1)


def test_what_an_example_has_read_are_its_strings_and_vectors():
    stored = {"image": tf.constant(b"12345"), "label": tf.constant(3, tf.int64), "tokens": tf.zeros([7], tf.uint16)}
    assert int(records.num_bytes(stored)) == 5 + 14


@pytest.mark.parametrize("kind", ["tokens", "text"])
def test_what_streams_is_known_by_its_content_and_not_by_its_name(tmp_path, kind):
    path = pack(tmp_path, np.arange(5_000_000) % VOCABULARY)
    before = load(path, "stream", kind).fingerprint
    other = tmp_path / "other"
    path.rename(other)
    (tmp_path / "packed.json").rename(tmp_path / "other.json")
    assert load(other, "stream", kind).fingerprint == before
    content = bytearray(other.read_bytes())
    for at in (0, len(content) // 63 * 20, len(content) - 1):
        content[at] ^= 1
        other.write_bytes(bytes(content))
        after = load(other, "stream", kind).fingerprint
        assert after != before
        before = after


@pytest.mark.parametrize("placement", ["resident", "stream"])
def test_the_fingerprint_of_tokens_holds_their_description(tmp_path, placement):
    before = load(pack(tmp_path), placement).fingerprint
    for changed in ({"vocabulary": VOCABULARY + 1}, {"separator": 5}, {"length": LENGTH // 2}):
        assert load(pack(tmp_path, **changed), placement).fingerprint != before


@pytest.mark.parametrize("kind", ["tokens", "text"])
def test_what_streams_is_never_held_in_memory(tmp_path, kind):
    """A sparse file of 300 GiB."""
    path = pack(tmp_path)
    os.truncate(path, 300 << 30)
    code = f"""
import resource, sys
from trainers.input import load
def most():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10
before = most()
dataset = load.load("{kind}:{path}", "")
assert dataset.train.arrays is None and dataset.train.size > 10_000_000
*_, last = dataset.train.examples().take(5000).as_numpy_iterator()
far = dataset.eval.records.decode(dataset.eval.records.read(dataset.eval.size - 1))
assert not last["tokens"].any() and not far["tokens"].numpy().any()
print(most() - before)
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) < 300


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("{", r"packed\.json is not JSON \("),
        ("[]", r"is not a JSON object"),
        ('{"dtype": "uint16", "vocabulary": 9}', r"packed\.json has no 'length'; add it"),
        (json.dumps(FACTS | {"seperator": 3}), r"the key 'seperator' is not known; did you mean separator\?"),
        (json.dumps(FACTS | {"dtype": "int64"}), r"dtype is 'int64'; it must be one of: uint16, uint32"),
        (json.dumps(FACTS | {"dtype": ["uint16"]}), r"dtype is \['uint16'\]; it must be one of"),
        (json.dumps(FACTS | {"vocabulary": "many"}), r"vocabulary is 'many'; it must be a whole number"),
        (json.dumps(FACTS | {"vocabulary": 65_537}), r"vocabulary is 65537; it must be from 2 to 65536"),
        (json.dumps(FACTS | {"vocabulary": True}), r"vocabulary is True; it must be a whole number"),
        (json.dumps(FACTS | {"length": 0}), r"length is 0; it must be from 1"),
        (json.dumps(FACTS | {"length": 8.5}), r"length is 8\.5; it must be a whole number"),
        (json.dumps(FACTS | {"separator": VOCABULARY}), r"separator is 50257; it must be from 0 to 50256"),
    ],
)
def test_a_description_that_cannot_be_is_named(tmp_path, text, words):
    with pytest.raises(BadConfiguration, match=words) as raised:
        load(pack(tmp_path, text=text))
    assert len(str(raised.value).splitlines()) == 1


def test_a_file_without_its_description_is_named(tmp_path):
    path = pack(tmp_path)
    (tmp_path / "packed.json").unlink()
    with pytest.raises(
        BadConfiguration, match=r"packed\.json cannot be read \(No such file.*write what the tokens are"
    ):
        load(path)


@pytest.mark.parametrize("placement", ["resident", "stream"])
def test_a_file_that_is_cut_off_or_too_short_is_named(tmp_path, placement):
    path = pack(tmp_path)
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(BadConfiguration, match=r"has 12809 bytes, which is not a multiple of the 2 of a uint16; it is"):
        load(path, placement)
    os.truncate(path, 600)
    with pytest.raises(BadConfiguration, match=r"holds 300 tokens; at least 321 are needed for windows of 16; pack"):
        load(path, placement)
    os.truncate(path, 0)
    with pytest.raises(BadConfiguration, match=r"holds 0 tokens; at least 321"):
        load(path, placement)


@pytest.mark.parametrize("name", ["tokens", "tokens:/nonexistent", "tokens:/tmp"])
def test_a_name_without_a_file_is_answered(name):
    with pytest.raises(BadConfiguration, match="is not a file; write tokens:PATH"):
        data.load(name, "")


def test_text_that_is_no_file_is_read_whole_or_refused(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(BadConfiguration, match="is not a file, and --input=stream reads by index"):
        load(pipe, "stream", "text")
    writer = subprocess.Popen([sys.executable, "-c", f"open({str(pipe)!r}, 'wb').write(bytes(5000))"])
    assert load(pipe, kind="text").train.size == 36
    assert writer.wait() == 0
    (tmp_path / "short").write_bytes(b"too short")
    with pytest.raises(BadConfiguration, match="holds 9 bytes; at least 2561"):
        load(tmp_path / "short", "stream", "text")
    with pytest.raises(BadConfiguration, match="cannot be read: No such file"):
        load(tmp_path / "none", "stream", "text")


def wrong(folder, **facts):
    """A file in which token number 99, in windows 6 alone, is not in the vocabulary."""
    tokens = np.arange(400 * LENGTH + 5) % 100
    tokens[99] = 60_000
    return pack(folder, tokens, **facts)


def test_a_token_outside_of_the_vocabulary_is_named_at_the_start(tmp_path):
    words = r"packed: token number 99 is 60000, not below the vocabulary of 50257; pack the file again, or correct"
    with pytest.raises(BadConfiguration, match=words):
        load(wrong(tmp_path))


def test_a_token_outside_of_the_vocabulary_ends_what_streams_and_is_named(tmp_path):
    dataset = load(wrong(tmp_path), "stream")
    with pytest.raises(tf.errors.InvalidArgumentError, match="vocabulary"):
        windows(dataset.train)
    with pytest.raises(tf.errors.InvalidArgumentError, match="vocabulary"):
        sees(dataset.train, 40)
    assert dataset.train.records.fault(5) is None
    assert "token number 99 is 60000, not below the vocabulary of 50257" in str(dataset.train.records.fault(6))


def test_a_token_that_is_no_int32_is_outside_of_the_vocabulary(tmp_path):
    tokens = np.zeros(400 * LENGTH + 5, np.uint32)
    tokens[3] = 2**32 - 1
    records_ = load(pack(tmp_path, tokens, dtype="uint32"), "stream").train.records
    with pytest.raises(tf.errors.InvalidArgumentError, match="vocabulary"):
        records_.decode(records_.read(tf.constant(0, tf.int64)))
    assert "token number 3 is 4294967295" in str(records_.fault(0))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: path.unlink(), r"packed, tokens 96 to 112, has changed \(No such file or directory\)"),
        (lambda path: os.truncate(path, 20_000), r"has changed \(12810 bytes when the run began, now 20000\)"),
        (lambda path: os.truncate(path, 20), r"has changed \(12810 bytes when the run began, now 20\)"),
    ],
    ids=["vanished", "grown", "cut short"],
)
def test_a_file_that_has_changed_is_named(tmp_path, change, words):
    path = pack(tmp_path)
    mapped = load(path, "stream").train.records
    change(path)
    with pytest.raises(BadConfiguration, match=words):
        raise mapped.fault(6)


def test_what_was_mapped_is_read_on_when_the_file_is_removed_or_grows(tmp_path):
    path = pack(tmp_path)
    expected = load(path).train.arrays["tokens"]
    dataset = load(path, "stream")
    os.truncate(path, 20_000)
    path.unlink()
    np.testing.assert_array_equal(windows(dataset.train), expected)


def test_a_trainer_ends_with_code_2_and_names_the_token(tmp_path, trainer):
    path = wrong(tmp_path, vocabulary=300)
    code, output = trainer(
        "--model=transformer",
        f"--dataset=tokens:{path}",
        "--input=stream",
        "--train_steps=20",
        "--batch_size=32",
        "--replicas=1",
        f"--run_dir={tmp_path / 'run'}",
    ).wait()
    assert code == 2, output
    assert "token number 99 is 60000, not below the vocabulary of 300" in output.splitlines()[-1]


def test_a_description_is_read_as_it_is_written(tmp_path):
    pack(tmp_path, separator=7)
    facts = description_of(tmp_path / "packed")
    assert (facts.dtype, facts.vocabulary, facts.length, facts.separator) == ("uint16", VOCABULARY, LENGTH, 7)


def test_a_language_model_continues_what_streams(tmp_path):
    for kind in ("tokens", "text"):
        dataset = load(pack(tmp_path, np.arange(400 * 128 + 5) % 100), "stream", kind)
        model, task = transformers.build_language_model(dataset.spec)
        text = examples.continued_text(model, task, dataset)
        assert text.startswith("Given:\n\n```\n80 81" if kind == "tokens" else "Given:")


@pytest.mark.parametrize("dtype", [np.uint8, np.uint16, np.uint32])
def test_tensorflow_takes_what_is_mapped_without_a_copy(dtype):
    """What streamed tokens lean on: a change of NumPy's array is seen in the tensor."""
    values = np.frombuffer(mmap.mmap(-1, 10_000 * np.dtype(dtype).itemsize), dtype)
    values[:] = np.random.default_rng(0).integers(0, 255, 10_000)
    mapped = tf.experimental.dlpack.from_dlpack(values.__dlpack__())
    assert mapped.dtype == tf.as_dtype(dtype) and "CPU" in mapped.device
    sliced = tf.data.Dataset.range(100).map(lambda index: tf.slice(mapped, [index * 7], [20]))
    for change in (0, 1):
        values += dtype(change)
        for index, part in enumerate(sliced.as_numpy_iterator()):
            np.testing.assert_array_equal(part, values[index * 7 : index * 7 + 20])


def test_a_file_that_is_cut_short_while_it_is_mapped_ends_the_process(tmp_path):
    """And does not go on with something else: the next start names the file."""
    path = pack(tmp_path, np.zeros(400_000))
    code = f"""
import os
from trainers.input import load
split = load.load("tokens:{path}", "", "stream").train
os.truncate("{path}", 4096)
list(split.examples().as_numpy_iterator())
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, check=False, env=environment)
    assert done.returncode == -signal.SIGBUS


def test_documents_are_kept_apart_only_where_a_separator_is_known(tmp_path):
    with pytest.raises(BadConfiguration, match=r"--document_mask needs the token.*add separator to .*packed\.json"):
        data.load(f"tokens:{pack(tmp_path)}", "", document_mask=True)
    path = pack(tmp_path, np.arange(400 * LENGTH + 5) % 10, separator=3)
    for placement in ("resident", "stream"):
        dataset = data.load(f"tokens:{path}", "", placement, document_mask=True)
        assert dataset.spec.separator == 3 and dataset.spec.document_mask
        inputs, targets = dataset.prepare({"tokens": windows(dataset.train)})
        np.testing.assert_array_equal(np.asarray(targets) == -1, np.asarray(inputs) == 3)
    assert load(path).spec.separator == 3 and not load(path).spec.document_mask


def test_flags_about_documents_that_do_not_fit_are_refused(monkeypatch):
    with pytest.raises(BadConfiguration, match=r"--document_mask is for tokens:PATH.* --dataset text has none"):
        resolve(Config(model="transformer", document_mask=True))
    assert resolve(Config(model="transformer", dataset="tokens:x", document_mask=True)).document_mask
    monkeypatch.setitem(MODELS, "plain", dataclasses.replace(MODELS["transformer"], documents=False))
    with pytest.raises(BadConfiguration, match="--model plain has no --document_mask.*choose one of: transformer"):
        resolve(Config(model="plain", dataset="tokens:x", document_mask=True))


def test_training_with_documents_apart_is_the_same_at_every_number_of_replicas(tmp_path, run):
    tokens = np.random.default_rng(0).integers(0, 40, 400 * LENGTH + 5)
    path = pack(tmp_path, tokens, vocabulary=40, separator=3)
    flags = {"model": "transformer", "dataset": f"tokens:{path}", "document_mask": True, "accumulate": 2}
    run("one", replicas=1, input="resident", **flags)
    run("two", replicas=2, input="stream", **flags)
    one, two = weights(tmp_path / "one"), weights(tmp_path / "two")
    assert largest_relative_difference(one, two) < 1e-4
    assert metrics(tmp_path / "two")[-1]["bits_per_token"] > 1
