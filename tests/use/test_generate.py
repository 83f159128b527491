"""`trainers/generate.py`: a language model goes on from a prompt, by a run or its export, as its seed says."""

import json
import re

import numpy as np
import pytest
import tensorflow as tf
from conftest import ROOT

from models import generation
from models.transformers import LanguageModel
from trainers import generate
from trainers.settings.exit_codes import OK, BadConfiguration
from trainers.use import exports, generating, predictor

SMALL = {"train_steps": 2, "eval_every": 0, "log_every": 0, "checkpoint_every": 0, "replicas": 1, "batch_size": 4}
LENGTH, VOCABULARY, SEPARATOR = 16, 60, 59


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.txt"
    path.write_bytes((ROOT / "README.md").read_bytes()[:4000])
    return path


@pytest.fixture
def packed(tmp_path):
    """Packed tokens of 60, of which the last ends a document, and their description."""
    path = tmp_path / "packed"
    np.random.default_rng(0).integers(0, VOCABULARY, 60 * LENGTH).astype("uint16").tofile(path)
    facts = {"dtype": "uint16", "vocabulary": VOCABULARY, "length": LENGTH, "separator": SEPARATOR}
    (tmp_path / "packed.json").write_text(json.dumps(facts))
    return path


def go_on(model, prompt, *more):
    return generate.main(generate.settings_from(["generate", str(model), f"--prompt={prompt}", *more]))


def test_a_run_and_its_export_go_on_alike_from_text_and_the_seed_decides(run, text, capsys):
    summary = run(model="transformer,depth=1,width=16", dataset=f"text:{text}", export=True, **SMALL)
    told = {}
    for name, source in (("run", summary.run_dir), ("export", summary.run_dir / "export")):
        for seed in (1, 2):
            assert go_on(source, "# Lock", "--tokens=150", f"--seed={seed}") == OK  # more than the context of 128
            captured = capsys.readouterr()
            told[name, seed] = captured.out
            assert re.search(r"^150 tokens in .*, [0-9.e+]+ a second$", captured.err, re.MULTILINE), captured.err
            assert "with a cache" in captured.err
    assert told["run", 1] == told["export", 1] and told["run", 2] == told["export", 2]
    assert told["run", 1] != told["run", 2] and len(told["run", 1]) > 100


def test_tokens_go_on_as_numbers_and_end_with_their_document(run, packed, capsys):
    summary = run(
        model="transformer,depth=1,heads=2,positions=rotary,width=16",
        dataset=f"tokens:{packed}",
        document_mask=True,
        export=True,
        **SMALL,
    )
    told = []
    for source in (summary.run_dir, summary.run_dir / "export"):
        assert go_on(source, "4 8 15", "--tokens=500", "--top_k=58", "--temperature=1.5", "--checkpoint=last") == OK
        captured = capsys.readouterr()
        told.append([int(word) for word in captured.out.split()])
        assert ", where a document ends" in captured.err
    assert told[0] == told[1] and 0 < len(told[0]) < 499 and SEPARATOR not in told[0]
    with pytest.raises(BadConfiguration, match="--prompt is empty; pass at least one token"):
        go_on(summary.run_dir, "")
    source = predictor.of(summary.run_dir / "export", None)
    for prompt, message in {
        " ": "--prompt: the prompt is empty; pass at least one token",
        "1 two": "--prompt: 'two' is not a token; the model takes numbers of tokens with blanks between them",
        f"3 {VOCABULARY}": "--prompt: token 2 of the prompt is 60, outside of the vocabulary of 60; pass tokens from 0",
        "-1": "--prompt: token 1 of the prompt is -1, outside of the vocabulary",
        "9" * 5000: "outside of the vocabulary of 60",
        " ".join(["1"] * 17): "--prompt: the prompt has 17 tokens, and the model sees 16 at once; shorten it",
    }.items():
        with pytest.raises(BadConfiguration, match=message) as error:
            generating.prompt_of(source, prompt)
        assert "\n" not in str(error.value)


def test_an_export_gives_the_logits_of_a_whole_pass_step_by_step(run, packed):
    summary = run(model="transformer,depth=1,tied=false,width=16", dataset=f"tokens:{packed}", export=True, **SMALL)
    exported = tf.saved_model.load(str(summary.run_dir / "export"))
    tokens = np.random.default_rng(1).integers(0, VOCABULARY, [3, LENGTH]).astype(np.int32)
    whole = exported.serve_prepared(tf.constant(tokens)).numpy()
    specs = dict(exported.signatures[exports.STEP].structured_input_signature[1])
    cache = {
        name: tf.zeros([3, *(size or 0 for size in spec.shape[1:])], spec.dtype)
        for name, spec in specs.items()
        if name != "tokens"
    }
    at = 0
    for count in (5, 1, 1, 9):
        cache = dict(exported.generate_step(tf.constant(tokens[:, at : at + count]), cache))
        at += count
        np.testing.assert_allclose(cache.pop("logits"), whole[:, at - 1], rtol=1e-5, atol=1e-5)


OWN = '''
import keras
import tensorflow as tf
from models import tasks, transformers


class Averages(keras.Model):
    """Logits of the mean of the tokens so far."""

    def __init__(self, vocabulary):
        super().__init__(name="averages")
        self.vocabulary = vocabulary
        self.head = keras.layers.Dense(vocabulary, name="logits")

    def call(self, tokens, training=False):
        shares = tf.cumsum(tf.one_hot(tokens, self.vocabulary), axis=1)
        counts = tf.cast(tf.range(1, tf.shape(tokens)[1] + 1), tf.float32)
        return self.head(shares / counts[:, None])


def build(spec):
    return Averages(spec.num_classes), tasks.language(spec)
'''


def test_a_model_of_ones_own_without_a_cache_goes_on_too(run, packed, tmp_path, monkeypatch, capsys):
    (tmp_path / "own_language.py").write_text(OWN)
    monkeypatch.syspath_prepend(tmp_path)
    name = "own_language:build"
    summary = run(model=name, dataset=f"tokens:{packed}", export=True, **SMALL)
    told = []
    for source, words in ((summary.run_dir, [f"--model={name}"]), (summary.run_dir / "export", [])):
        assert go_on(source, "1 2 3", "--tokens=30", *words) == OK
        captured = capsys.readouterr()
        told.append(captured.out)
        assert "without a cache, so that each token takes a whole pass" in captured.err
    assert told[0] == told[1] and not hasattr(tf.saved_model.load(str(summary.run_dir / "export")), exports.STEP)


def test_what_is_no_language_model_or_no_way_to_draw_is_one_line(run, tmp_path):
    summary = run(**SMALL | {"batch_size": 32})
    with pytest.raises(BadConfiguration, match="only language models go on, and this answers with classes"):
        go_on(summary.run_dir, "x")
    for word, message in {
        "--top_p=0": r"--top_p 0 is outside \(0, 1\]",
        "--temperature=-1": "--temperature -1 is not a number from 0 on",
        "--top_k=-2": "--top_k -2 is outside",
        "--seed=-3": "--seed -3 is outside",
        "--tokens=0": "--tokens 0 is below 1",
        "--tokens=many": "argument --tokens: invalid int value: 'many'; see --help",
    }.items():
        with pytest.raises(BadConfiguration, match=message):
            go_on(tmp_path, "x", word)


def test_a_language_model_of_the_registry_keeps_a_cache():
    assert generation.with_cache(LanguageModel(5, 4, 8, 1, 2)) is not None
