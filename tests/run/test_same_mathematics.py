"""Promise 1: the same mathematics at every replica count."""

import pytest
from conftest import largest_relative_difference, relative_difference_as_one_vector, weights

TOLERANCE = 1e-5
PLAIN = {"optimizer": "sgd", "schedule": "constant", "warmup_steps": 0, "weight_decay": 0.0, "clip_norm": 0.0}
VARIANTS = {
    "plain": {},
    "clipped": {"clip_norm": 0.05},
    "accumulated": {"accumulate": 2},
    "weight decay": {"weight_decay": 0.1},
    "moving average": {"ema": 0.9},
    "everything": {"clip_norm": 0.05, "accumulate": 2, "weight_decay": 0.1, "ema": 0.9},
}


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("model", ["mlp", "resnet"])
def test_weights_do_not_depend_on_the_number_of_replicas(run, model, variant):
    if model == "resnet" and variant not in ("plain", "everything"):
        pytest.skip("the variants are crossed with the small model; the large one takes the ends")
    rate = {"mlp": 0.05, "resnet": 0.01}[model]
    flags = PLAIN | {"model": model, "learning_rate": rate, "train_steps": 50} | VARIANTS[variant]
    flags |= {"log_every": 0, "eval_every": 0, "checkpoint_every": 0}
    # A variant by itself on 2; none, and all of them, on 4 as well.
    counts = (2, 4) if variant in ("plain", "everything") else (2,)
    runs = {count: run(f"replicas-{count}", replicas=count, **flags) for count in (1, *counts)}
    one = weights(runs[1].run_dir)
    for count in counts:
        other = weights(runs[count].run_dir)
        measure = relative_difference_as_one_vector if model == "resnet" else largest_relative_difference
        difference = measure(one, other, "")
        print(f"{model}, {variant}, {count} replicas: {difference:.1e}")
        assert difference <= TOLERANCE
        assert runs[count].eval["accuracy"] == pytest.approx(runs[1].eval["accuracy"], abs=1e-6)
    assert all(summary.traces == 1 for summary in runs.values())
