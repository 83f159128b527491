"""The rows on the input: the same examples at every size, however they are read, and augmented alike."""

from collections.abc import Sequence
from typing import Any

from launch.proof.prover import Prover
from launch.proof.verdicts import OTHER_INPUT, Verdict, failure, in_order
from trainers.settings.augmentation import MIXING, WORDS, mixes, parse
from trainers.settings.config import Config
from trainers.settings.data_cards import data_card

OTHER_AUGMENTATION = "what --augment does to an example depends on more than the seed and its position"
PLACEMENTS = ("resident", "stream")


def has_images(config: Config) -> bool:
    """Whether the rows on streamed and augmented examples can be judged."""
    return data_card(config.dataset).images


def words_of(config: Config, row: str) -> str:
    """The words of `--augment` under which a row looks at examples: the run's, or all that its batch allows."""
    if row == "input":
        # A loop that takes several views of an example refuses to leave them alike. This word changes nothing.
        return "erase=0" if config.views > 1 else ""
    if config.augment:
        return config.augment
    masks = data_card(config.dataset).masks
    words = [name for name, word in WORDS.items() if name != "inception" and (word.masks or not masks)]
    if not fits(config, MIXING[0], 1):
        words = [word for word in words if word not in MIXING]
    return ",".join(words)


def fits(config: Config, words: str, replicas: int) -> bool:
    """Whether the batch divides over so many replicas, and its views and mixed pairs too."""
    pairs = 2 if mixes(parse(words)) else 1
    return config.batch_size % (pairs * config.views * replicas * config.parts) == 0


def specs_of(
    prover: Prover, row: str, words: str, sizes: Sequence[int], placements: Sequence[str] = PLACEMENTS
) -> list[dict[str, Any]]:
    """Looks at the examples of some steps, in one process: each way of reading, on 1 replica and on `sizes`."""
    if "inception" in parse(words):
        placements = ("stream",)  # resident images may be resized already
    return [
        prover.spec(
            name_of(row, words, placement, f"{count} replica{'s' if count > 1 else ''}"),
            f"--augment={words}",
            f"--input={placement}",
            f"--replicas={count}",
            look=["examples"],
        )
        for placement in placements
        for count in (1, *sizes)
    ]


def worker_specs_of(prover: Prover, row: str, words: str) -> list[dict[str, Any]]:
    """The same, streamed, for processes that are workers. Resident data has no worker of its own."""
    flags = (f"--augment={words}", "--input=stream", "--strategy=multi_worker", "--replicas=0")
    return [prover.spec(name_of(row, words, "stream", "2 workers"), *flags, look=["examples"])]


def name_of(row: str, words: str, placement: str, size: str) -> str:
    """The name of a look at examples."""
    plain = row == "input" or not words
    return f"{row} of {'plain examples' if plain else words}, {placement}, {size}"


def compare(prover: Prover, row: str, words: str) -> Verdict:
    """A verdict on all looks of a row."""
    begin = name_of(row, words, "", "").removesuffix(", , ")
    looks = {name: run for name, run in prover.runs.items() if name.startswith(f"{begin}, ")}
    if failed := failure(looks.items()):
        return Verdict(row, False, *failed)
    base, parts = looks[name_of(row, words, "stream", "1 replica")], []
    for name, other in looks.items():
        for step, examples in sorted(base.facts["examples"].items(), key=lambda item: int(item[0])):
            expected, actual = in_order(examples), in_order(other.facts["examples"].get(step, {}))
            if expected != actual:
                how = "in another order" if sorted(expected) == sorted(actual) else "other examples"
                parts.append(f"step {step} of {name.removeprefix(f'{begin}, ')}: {how}")
                break
    steps = len(base.facts["examples"])
    text = "; ".join(parts) or f"the same examples in {steps} steps however they are read, {len(looks)} looks"
    if row == "augment" and not parts:
        text += f" ({words})"
    return Verdict(row, not parts, text, OTHER_INPUT if parts and row == "input" else "")


def diagnose_augmentation(prover: Prover, config: Config, sizes: Sequence[int]) -> str:
    """Which words are to blame: each is tried by itself."""
    guilty, words = [], parse(words_of(config, "augment"))
    if len(words) == 1:
        return f"{OTHER_AUGMENTATION}: {next(iter(words))}"
    for name, value in words.items():
        word = f"{name}={value:g}" if WORDS[name].default is not None else name
        fitting = [size for size in sizes if fits(config, word, size)][:1]
        specs = specs_of(prover, "augment", word, fitting, ("stream",))
        tasks = [lambda specs=specs: prover.observe(specs)]
        if fits(config, word, 2):
            workers = worker_specs_of(prover, "augment", word)
            tasks.append(lambda workers=workers: prover.observe(workers, workers=2))
        prover.in_parallel(tasks)
        if compare(prover, "augment", word).holds is False:
            guilty.append(name)
    return f"{OTHER_AUGMENTATION}: {', '.join(guilty) if guilty else 'only together'}"
