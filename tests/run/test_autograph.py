"""What AutoGraph rewrites when a run starts: a process pays for each function, and restarts are frequent."""

import pytest
from tensorflow.python.autograph.impl import api

# The compiled loops, whose Python loops become loops in the graph, and what the page calls from them.
CONVERTED = {"tf__train_call", "tf__evaluate", "tf__update", "tf__lam"}


@pytest.mark.parametrize(
    "flags", [{}, {"model": "resnet", "input": "stream", "augment": "crop,flip"}, {"model": "unet", "batch_size": 8}]
)
def test_a_start_converts_the_loops_and_nothing_that_is_called_in_a_replica(run, monkeypatch, flags):
    found = []

    class Watched(api.PyToTF):
        def transform_ast(self, node, ctx):
            found.append(ctx.info.name)
            return super().transform_ast(node, ctx)

    monkeypatch.setattr(api, "_TRANSPILER", Watched())  # one that remembers nothing of earlier tests
    run(train_steps=2, **flags)
    assert {"tf__train_call", "tf__evaluate"} <= set(found) <= CONVERTED
    assert len(found) <= 5
