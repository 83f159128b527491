"""launch/prove.py on the other loops: each holds in every row, and what is planted in one is found and named."""

import pytest
from conftest import ROOT, short
from test_prove import UNCLIPPED, edited, mutant, prove  # noqa: F401 - a fixture

ADVERSARIAL, CONTRASTIVE = "trainers/adversarial_loop.py", "trainers/contrastive_loop.py"
REPLICAS, TRAINING = "trainers/run/replicas.py", "trainers/run/training.py"
ROWS = "--rows=replicas,workers,metrics,resume,resize,graph,retrace"
LOOPS = {
    "adversarial_loop": ("--batch_size=40", "--critic_steps=2", ROWS),
    "contrastive_loop": ("--model=mlp", "--batch_size=64", f"{ROWS},input"),
    "distillation_loop": ("--model=mlp", "--batch_size=64", ROWS),
}
MUTANTS = {
    "negatives of this replica alone": (
        {
            CONTRASTIVE: [
                (
                    "among_all(outputs, gathered(outputs), first, ",
                    "among_all(outputs, outputs, tf.zeros_like(first), ",
                )
            ]
        },
        ("contrastive_loop", *UNCLIPPED, "--batch_size=64", "--augment=crop,erase=0.5"),
        {"replicas, SGD": "an example's loss depends on the others of its replica, not of the global batch"},
    ),
    "the gradient of the gather divided twice": (
        {
            REPLICAS: [
                (
                    "return _with_gradient(_sum_over_replicas(every)[first : first + count], every, gathered)",
                    "count_of_all = tf.distribute.get_replica_context().num_replicas_in_sync\n"
                    "    own = _sum_over_replicas(every)[first : first + count] / count_of_all\n"
                    "    return _with_gradient(own, every, gathered)",
                )
            ]
        },
        ("contrastive_loop", *UNCLIPPED, "--batch_size=64", "--augment=crop,erase=0.5"),
        {"replicas, SGD": "what replicas give each other has a wrong gradient"},
    ),
    "a critic step too few after a resume": (
        {
            TRAINING: [
                (
                    "                self.restored = workers.resumed(",
                    "                self.loop.late = True\n                self.restored = workers.resumed(",
                )
            ],
            ADVERSARIAL: [
                (
                    "for number in range(self.config.critic_steps):",
                    'for number in range(self.config.critic_steps - getattr(self, "late", 0)):',
                )
            ],
        },
        ("adversarial_loop", "--dataset=noise:images", "--batch_size=40", "--critic_steps=2", "--rows=resume"),
        {"resume": "not found: every variable comes back, so the state lies in Python"},
    ),
    "an optimizer that no checkpoint holds": (
        {
            ADVERSARIAL: [
                (
                    "for name, group in self.groups.items()}",
                    'for name, group in self.groups.items() if name != "critic"}',
                )
            ]
        },
        ("adversarial_loop", "--dataset=noise:images", "--batch_size=40", "--critic_steps=2", "--rows=resume"),
        {"resume": "a variable is missing from the checkpoint"},
    ),
}


@pytest.fixture
def teacher(made, tmp_path):
    """The run_dir of a teacher for the loop that needs one."""
    made("teacher", train_steps=3)
    return tmp_path / "teacher"


@pytest.mark.parametrize("loop", short(LOOPS, ()))
def test_what_is_right_holds_in_every_row(mutant, data_dir, teacher, loop):
    flags = (*LOOPS[loop], *([f"--teacher={teacher}"] if loop == "distillation_loop" else []))
    code, output, rows = prove(mutant({}), data_dir, f"--trainer={loop}", "--steps=20", *flags)
    assert code == 0, output
    assert all(row["holds"] for row in rows.values()), output
    assert {"replicas, SGD", "workers, SGD", "metrics", "resume", "resize", "graph", "retrace"} <= rows.keys()


@pytest.mark.parametrize("name", MUTANTS)
def test_a_mistake_can_be_planted(name):
    for path, changes in MUTANTS[name][0].items():
        compile(edited((ROOT / path).read_text(), changes), path, "exec")


@pytest.mark.parametrize("name", short(MUTANTS, ("the gradient of the gather divided twice",)))
def test_a_planted_mistake_is_found_and_named(mutant, data_dir, name):
    edits, (loop, *flags), expected = MUTANTS[name]
    few = ("--steps=20", "--optimizer=sgd", "--learning_rate=0.01")
    code, output, rows = prove(mutant(edits), data_dir, f"--trainer={loop}", *few, *flags)
    assert code == 1, output
    for row, cause in expected.items():
        assert rows[row]["holds"] is False, output
        assert rows[row]["cause"].startswith(cause), output
