"""Updates on few long vectors: the same values as weight by weight, the same checkpoints, few operations."""

import keras
import numpy as np
import pytest
import tensorflow as tf
from conftest import as_after, largest_relative_difference, metrics, weights

from models import optimizers
from models.optimizers import SAM, Momentum
from trainers.record import state
from trainers.run import vectors, weight_groups
from trainers.run.replicas import on_replicas
from trainers.run.vector_optimizer import ELEMENTWISE, VectorOptimizer, takes_vectors
from trainers.run.weight_groups import WeightGroup
from trainers.world.devices import first_component

SHAPES = [(8, 4), (4,), (3, 3, 2, 4), (1,), (40, 5), (), (7, 3), (5,)]
OPTIONS = {
    "sgd": lambda: keras.optimizers.SGD(0.1, momentum=0.9, nesterov=True, weight_decay=0.1),
    "plain sgd": lambda: keras.optimizers.SGD(optimizers.Linear(0.1, 0, 20)),
    "momentum": lambda: Momentum(0.1, weight_decay=0.1),
    "coupled": lambda: Momentum(0.1, nesterov=False, coupled=True, weight_decay=0.1),
    "adam": lambda: keras.optimizers.Adam(0.01, amsgrad=True),
    "adamw": lambda: keras.optimizers.AdamW(optimizers.Cosine(0.01, 2, 20), weight_decay=0.1),
    "adamax": lambda: keras.optimizers.Adamax(0.01, weight_decay=0.1),
    "rmsprop": lambda: keras.optimizers.RMSprop(0.01, momentum=0.5, centered=True, weight_decay=0.1),
    "adagrad": lambda: keras.optimizers.Adagrad(0.1, weight_decay=0.1),
    "adadelta": lambda: keras.optimizers.Adadelta(0.5, weight_decay=0.1),
    "lion": lambda: keras.optimizers.Lion(0.01, weight_decay=0.1),
}
RECIPES = {
    "average and clipping": {"ema": 0.9, "clip_norm": 0.1},
    "frozen": {"freeze": "hidden_1", "ema": 0.5},
    "groups": {"optimizer_for": "bias=sgd,learning_rate=0.5", "layer_decay": 0.5},
    "float16": {"precision": "float16", "clip_norm": 1.0},
    "bfloat16": {"precision": "bfloat16", "ema": 0.9},
    "parts and histograms": {"accumulate": 2, "histogram_every": 2},
}


@pytest.fixture(autouse=True)
def short_vectors(monkeypatch):
    """Vectors of so few elements that some weights stand alone, and some kinds have several."""
    monkeypatch.setattr(vectors, "MOST_ON_CPU", 100)


def weights_of(dtype="float32"):
    chance = np.random.default_rng(0)
    values = [chance.normal(size=shape).astype("float32") for shape in SHAPES]
    return [
        keras.Variable(value, dtype=dtype, name=f"w{place}", trainable=True, aggregation="mean")
        for place, value in enumerate(values)
    ]


def updates(strategy, optimizer, own, first, last, as_vectors):
    """Updates number `first … last` with gradients that depend on the weights; returns every variable by its name."""
    group = WeightGroup(list(range(len(own))), optimizer, None)
    if not as_vectors:
        group.optimizer.exclude_from_weight_decay(var_list=[weight for weight in own if len(weight.shape) < 2])
    with strategy.scope():
        if as_vectors:
            assert takes_vectors(optimizer, own)
            group = group.built(own)
        elif not optimizer.built:
            optimizer.build(own)
            weight_groups.private_api.apply_without_reduction(optimizer)

    def update(number):
        gradients = [tf.sin(3 * weight.value + tf.cast(number, weight.dtype)) for weight in own]
        group.apply(gradients, own)

    @tf.function
    def call():
        for number in tf.range(first, last):
            on_replicas(strategy, update)(number)

    call()
    return state.values_of(state.name_variables("optimizer", group.optimizer.variables)), group.optimizer


@pytest.mark.parametrize("replicas", [1, 2])
@pytest.mark.parametrize("name", OPTIONS)
def test_ten_updates_are_those_of_the_weights_one_by_one(name, replicas):
    ends = {}
    for as_vectors in (False, True):
        strategy = tf.distribute.MirroredStrategy(
            [f"CPU:{i}" for i in range(replicas)], cross_device_ops=tf.distribute.ReductionToOneDevice()
        )
        keras.backend.clear_session()  # the names of optimizers are counted
        with strategy.scope():
            own, optimizer = weights_of(), OPTIONS[name]()
        values, _ = updates(strategy, optimizer, own, 0, 10, as_vectors)
        ends[as_vectors] = values | {weight.path: weight.numpy() for weight in own}
    assert list(ends[True]) == list(ends[False])  # names and their order: what checkpoints hold
    for key, value in ends[False].items():
        assert ends[True][key].shape == value.shape
        np.testing.assert_allclose(ends[True][key], value, rtol=2e-5, atol=2e-6, err_msg=key)


def test_every_optimizer_that_takes_vectors_is_among_those_compared():
    assert {type(make()) for make in OPTIONS.values()} == set(ELEMENTWISE)


class MyAdam(keras.optimizers.Adam):
    """Of the user's own."""


@pytest.mark.parametrize(
    "optimizer",
    [
        SAM(0.1),
        MyAdam(0.1),
        keras.optimizers.Lamb(0.1),
        keras.optimizers.Adafactor(0.1),
        keras.optimizers.Adam(0.1, clipnorm=1.0),
        keras.optimizers.SGD(0.1, use_ema=True),
    ],
)
def test_what_is_not_known_to_be_elementwise_is_updated_weight_by_weight(optimizer):
    own = weights_of()
    assert not takes_vectors(optimizer, own)
    group = WeightGroup(list(range(len(own))), optimizer, None).built(own)
    assert group.optimizer is optimizer and group.bundles == [[place] for place in range(len(own))]


def test_a_weight_with_a_constraint_is_not_put_into_a_vector():
    own = weights_of()
    own[2].constraint = keras.constraints.MaxNorm(1.0)
    assert not takes_vectors(keras.optimizers.Adam(0.1), own)


def test_vectors_hold_one_type_and_give_back_what_they_took():
    own = weights_of() + weights_of("bfloat16")
    cut = vectors.vectors_of(own)
    assert sorted(place for bundle in cut.bundles for place in bundle) == list(range(len(own)))
    for bundle in cut.bundles:
        assert len({own[place].dtype for place in bundle}) == 1
        assert len(bundle) == 1 or sum(cut.sizes[place] for place in bundle) <= 100
    values = [tf.convert_to_tensor(weight) for weight in own]
    for value, back in zip(values, cut.unpack(cut.pack(values)), strict=True):
        assert value.shape == back.shape and bool(tf.reduce_all(value == back))


def test_a_checkpoint_of_weights_one_by_one_is_taken_up():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])
    keras.backend.clear_session()  # the names of optimizers are counted
    with strategy.scope():
        own, before = weights_of(), keras.optimizers.AdamW(0.01, weight_decay=0.1)
    saved, plain = updates(strategy, before, own, 0, 4, as_vectors=False)
    at_four = [weight.numpy() for weight in own]
    expected, _ = updates(strategy, plain, own, 4, 8, as_vectors=False)
    ends = [weight.numpy() for weight in own]
    for weight, value in zip(own, at_four, strict=True):
        weight.assign(value)
    keras.backend.clear_session()
    with strategy.scope():
        after = keras.optimizers.AdamW(0.01, weight_decay=0.1)
        taken = VectorOptimizer(after, own, [len(weight.shape) > 1 for weight in own])
    named = state.name_variables("optimizer", taken.variables)
    state.assign(named, saved)
    for name, value in state.values_of(named).items():
        np.testing.assert_array_equal(value, saved[name], err_msg=name)

    @tf.function
    def call():
        for number in tf.range(4, 8):
            on_replicas(strategy, lambda n: taken.apply([tf.sin(3 * w.value + tf.cast(n, w.dtype)) for w in own]))(
                number
            )

    call()
    found = state.values_of(named)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=2e-5, atol=2e-6, err_msg=name)
    for weight, value in zip(own, ends, strict=True):
        np.testing.assert_allclose(weight.numpy(), value, rtol=2e-5, atol=2e-6)


def test_a_part_of_a_vector_is_read_and_set_alone():
    vector = tf.Variable(np.arange(6, dtype="float32"))
    part = state.Part(vector, 2, (2, 2), "part")
    np.testing.assert_array_equal(part.numpy(), [[2, 3], [4, 5]])
    read = state.reader({"part": part})
    held = read()["part"]
    part.assign(np.zeros([2, 2]))
    np.testing.assert_array_equal(vector.numpy(), [0, 1, 0, 0, 0, 0])
    np.testing.assert_array_equal(held, [[2, 3], [4, 5]])
    held = read()["part"]
    vector.assign_add(tf.ones([6]))  # in place, if nobody held the value
    np.testing.assert_array_equal(held, np.zeros([2, 2]))


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_is_that_of_weights_one_by_one_and_resumes_bit_for_bit(run, tmp_path, monkeypatch, name):
    flags = RECIPES[name] | {"replicas": 2, "deterministic": True, "schedule": "constant", "warmup_steps": 0}
    run("whole", **flags)
    as_after(3, tmp_path / "whole", "halves")
    run("halves", **flags)
    whole, halves = weights(tmp_path / "whole"), weights(tmp_path / "halves")
    for key, value in whole.items():
        np.testing.assert_array_equal(halves[key], value, err_msg=key)
    with monkeypatch.context() as patch:
        patch.setattr(vectors, "MOST_ON_CPU", 0)
        patch.setattr(weight_groups, "takes_vectors", lambda *_: False)
        run("alone", **flags)
    alone = weights(tmp_path / "alone")
    assert list(alone) == list(whole)
    for group in ("model/", "ema/", "loss_scale/"):
        assert largest_relative_difference(alone, whole, group) < (0.02 if "float16" in name else 1e-3)
    for a, b in zip(metrics(tmp_path / "alone"), metrics(tmp_path / "whole"), strict=True):
        if "gradient_norm" in a:
            assert (a["gradient_norm"], a["parameter_norm"]) == pytest.approx(
                (b["gradient_norm"], b["parameter_norm"]), rel=0.02
            )


def test_the_operations_of_an_update_hardly_grow_with_the_number_of_weights():
    """Read, reshape and join; split, reshape (with its shape) and assign: for each weight, and no more."""
    counts = []
    for copies in (4, 8):
        strategy = tf.distribute.MirroredStrategy(["CPU:0"])
        with strategy.scope():
            own = [keras.Variable(np.ones(3), name=f"w{i}", aggregation="mean") for i in range(2 * copies)]
            group = WeightGroup(list(range(len(own))), keras.optimizers.AdamW(0.1), None).built(own)

        @tf.function
        def call(strategy=strategy, group=group, own=own):
            on_replicas(strategy, lambda: group.apply([tf.ones_like(weight) for weight in own], own))()

        counts.append(len(call.get_concrete_function().graph.get_operations()))
    assert len(group.bundles) == 1
    assert counts[1] - counts[0] <= 8 * 10


def test_what_needs_the_weights_alone_waits_for_the_rate():
    """Ready with the step, it could stand before the forward pass, which all else waits for."""
    strategy = tf.distribute.MirroredStrategy(["CPU:0"])
    with strategy.scope():
        own = [keras.Variable(np.ones([3, 3]), name=f"w{i}", aggregation="mean") for i in range(3)]
        optimizer = keras.optimizers.AdamW(optimizers.Cosine(0.01, 2, 20), weight_decay=0.1)
        group = WeightGroup(list(range(len(own))), optimizer, None).built(own)

    @tf.function
    def call():
        on_replicas(strategy, lambda: group.apply([tf.ones([3, 3]) for _ in own], own))()

    graph = call.get_concrete_function().graph
    handles = {id(first_component(weight).handle) for weight in own}
    placeholders = [inside.name for outside, inside in graph.captures if id(outside) in handles]
    reads = [op for op in graph.get_operations() if op.type == "ReadVariableOp" and op.inputs[0].name in placeholders]
    assert len(placeholders) == 3 and len(reads) >= 3
    assert all(any(before.type == "Mul" for before in op.control_inputs) for op in reads)
