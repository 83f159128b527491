"""The private interfaces that the project leans on do what it needs. A new version that moves one fails here first."""

import keras
import numpy as np
import tensorflow as tf
from tensorflow.core.framework import function_pb2
from tensorflow.core.protobuf import config_pb2
from tensorflow.python.eager import context

from models import mlp
from trainers.world import private_api


def test_layers_of_a_model_are_found_at_every_depth():
    model = mlp.MLP(10, name="net")
    model(tf.zeros([1, 64]))
    names = {layer.name for layer in private_api.layers_of(model)}
    assert {"net", "hidden_1", "hidden_2", "logits"} <= names


def test_a_layer_knows_its_own_layers_state_and_metrics():
    class Holder(keras.Model):
        def __init__(self):
            super().__init__(name="holder")
            self.rows = [[keras.layers.LSTM(2, dropout=0.1, name="lstm")], keras.layers.BatchNormalization(name="norm")]
            self.mean = keras.metrics.Mean(name="mean")

        def call(self, x, training=False):
            return self.rows[1](self.rows[0][0](x, training=training), training=training)

    model = Holder()
    model(tf.zeros([1, 3, 4]))
    assert [layer.name for layer in private_api.sublayers_of(model)] == ["lstm", "norm"]
    lstm, norm = private_api.sublayers_of(model)
    assert [variable.name for variable in private_api.own_state_of(norm)[1]] == ["moving_mean", "moving_variance"]
    assert private_api.own_state_of(lstm) == ([], [])
    (cell,) = private_api.sublayers_of(lstm)
    assert [variable.name for variable in private_api.own_state_of(cell)[0]] == ["seed_generator_state"]
    assert list(private_api.metric_variables_of(model)) == ["mean/total", "mean/count"]


def test_an_optimizer_applies_gradients_as_they_are():
    devices = [device.name for device in tf.config.list_logical_devices("CPU")[:2]]
    strategy = tf.distribute.MirroredStrategy(devices, cross_device_ops=tf.distribute.ReductionToOneDevice())
    with strategy.scope():
        weight = keras.Variable([1.0], name="w")
        optimizer = keras.optimizers.SGD(1.0)
        optimizer.build([weight])
    private_api.apply_without_reduction(optimizer)

    @tf.function
    def update():
        strategy.run(lambda: optimizer.apply([tf.constant([0.25])], [weight]))

    update()
    np.testing.assert_array_equal(weight.numpy(), [0.75])  # 0.5 if it were summed over the two replicas


def test_a_captured_variable_has_a_handle_a_name_a_type_and_a_shape():
    hidden, table = (
        tf.Variable(tf.zeros([2, 3]), name="hidden"),
        tf.lookup.experimental.MutableHashTable(tf.int64, tf.int64, -1),
    )
    concrete = tf.function(lambda: tf.reduce_sum(hidden) + tf.cast(table.size(), tf.float32)).get_concrete_function()
    ((handle, name, dtype, shape),) = private_api.captured_variables(concrete)
    assert handle is hidden.handle and name == "hidden"
    assert dtype == tf.float32 and shape == [2, 3]


def test_a_function_of_a_library_becomes_a_graph():
    inner = tf.function(lambda x: x * 2.0 + 1.0, input_signature=[tf.TensorSpec([], tf.float32)])
    concrete = tf.function(lambda: inner(tf.constant(3.0))).get_concrete_function()
    (definition,) = concrete.graph.as_graph_def().library.function
    assert isinstance(definition, function_pb2.FunctionDef)
    assert {"Mul", "AddV2"} <= {node.op for node in private_api.graph_of_function(definition).node}


def test_determinism_can_be_asked_for():
    from tensorflow.python.framework import config

    before = private_api.is_deterministic()  # a run of another test may have asked for it
    try:
        tf.config.experimental.enable_op_determinism()
        assert private_api.is_deterministic() is True
        config.disable_op_determinism()
        assert private_api.is_deterministic() is False
    finally:
        if before:
            tf.config.experimental.enable_op_determinism()


def test_a_profile_is_read(tmp_path):
    tf.profiler.experimental.start(str(tmp_path))
    tf.reduce_sum(tf.ones([10])).numpy()
    tf.profiler.experimental.stop()
    (path,) = tmp_path.rglob("*.xplane.pb")
    planes = {plane.name for plane in private_api.profile_from(path.read_bytes()).planes}
    assert "/host:CPU" in planes


def test_generated_sources_are_found_by_their_name():
    import sys

    @tf.function
    def loop(n):
        total = tf.constant(0)
        for i in tf.range(n):
            total += i
        return total

    assert int(loop(tf.constant(4))) == 6
    files = [m.__file__ for n, m in sys.modules.items() if n.startswith("__autograph_generated_file")]
    assert files


def test_tensorboards_messages_are_there():
    tb = private_api.tensorboard()
    assert tb.scalar.scalar_pb("loss", 0.5).value[0].tag == "loss"
    names = {
        plugin.create_summary_metadata(display_name=None, description=None).plugin_data.plugin_name
        for plugin in (tb.histogram, tb.image, tb.text)
    }
    assert names == {"histograms", "images", "text"}
    content = tb.plugin_data_pb2.HParamsPluginData(experiment=tb.api_pb2.Experiment())
    assert tb.hparams.create_summary_metadata(content).plugin_data.plugin_name == "hparams"
    curve = tb.pr_curve.create_summary_metadata(display_name=None, description=None, num_thresholds=5)
    assert curve.plugin_data.plugin_name == "pr_curves"
    assert tb.event_pb2.SessionLog.START == 1 and tb.types_pb2.DT_STRING == 7
    assert tb.tensor_pb2.TensorProto() is not None and tb.summary_pb2.Summary() is not None


def test_collectives_are_kept_in_order_by_variables_that_are_no_state(monkeypatch):
    """Two workers would have launchers with a token each; a strategy of one process has none."""
    from types import SimpleNamespace

    from tensorflow.python.distribute import cross_device_utils

    assert "_ordering_token" in cross_device_utils.CollectiveReplicaLauncher.__init__.__code__.co_names
    token = object()
    launcher = SimpleNamespace(_ordering_token=token)
    operations = SimpleNamespace(_launchers=[launcher])
    strategy = SimpleNamespace(extended=SimpleNamespace(_cross_device_ops=operations, _host_cross_device_ops=None))
    assert private_api.ordering_tokens(strategy) == [token]
    assert private_api.ordering_tokens(tf.distribute.get_strategy()) == []


def test_slots_of_an_optimizer_are_told_and_its_counter_is_one_tensor():
    weights = [keras.Variable(np.zeros(size), name=f"w{size}") for size in (2, 3)]
    optimizer = keras.optimizers.Adam(0.1)
    ((momentum, velocity),) = private_api.build_recorded(optimizer, weights)
    assert (momentum[0], velocity[0]) == ("momentum", "velocity")
    assert [slot.shape for slot in momentum[1]] == [(2,), (3,)]
    assert {id(slot) for _, slots in (momentum, velocity) for slot in slots} < set(map(id, optimizer.variables))
    counter = optimizer.iterations
    with private_api.counter_read_once(optimizer):
        assert tf.is_tensor(optimizer.iterations) and not isinstance(optimizer.iterations, tf.Variable)
    assert optimizer.iterations is counter


def test_without_collectives_each_replica_keeps_its_own():
    strategy = tf.distribute.MirroredStrategy(["CPU:0", "CPU:1"])

    def replica():
        context = tf.distribute.get_replica_context()
        own = tf.cast(context.replica_id_in_sync_group, tf.float32) + 1
        return context.all_reduce(tf.distribute.ReduceOp.SUM, {"own": own, "list": [own]})

    def totals():
        values = strategy.run(replica)
        return values, strategy.reduce("SUM", values["own"], axis=None)

    with private_api.without_collectives():
        values, total = tf.function(totals)()
    assert [float(value) for value in strategy.experimental_local_results(values["list"][0])] == [1, 2]
    assert float(total) == 1
    values, total = tf.function(totals)()
    assert [float(value) for value in strategy.experimental_local_results(values["own"])] == [3, 3]
    assert float(total) == 6


def test_graphs_are_rewritten_once_and_by_few_passes_by_options_that_every_function_is_called_with():
    private_api.rewrite_graphs_little()
    told = context.context().function_call_options.config_proto_serialized
    options = config_pb2.ConfigProto.FromString(told).graph_options.rewrite_options
    assert options.meta_optimizer_iterations == options.ONE
    assert options.disable_tfg_optimizer
    assert options.memory_optimization == options.NO_MEM_OPT
    assert options.layout_optimizer == options.remapping == options.constant_folding == options.OFF
    assert float(tf.function(lambda x: x * 2 + 1)(tf.constant(3.0))) == 7
