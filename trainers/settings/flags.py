"""absl flags made from `trainers.settings.config.Config`: a flag for each field, in the field's group."""

import dataclasses
import os
import sys
import textwrap
import types
import typing
from collections.abc import Callable, Collection, Sequence

from absl import flags

from models.cards import MODELS
from models.options import registry
from trainers.settings import options, recipes
from trainers.settings.config import EPOCHS, Config
from trainers.settings.data_cards import DATASETS
from trainers.settings.exit_codes import OK, BadConfiguration
from trainers.settings.rules import check_given, resolve

T = typing.TypeVar("T")
_DEFINERS = {str: flags.DEFINE_string, int: flags.DEFINE_integer, float: flags.DEFINE_float, bool: flags.DEFINE_bool}


def _kind(annotation: object) -> type:
    """`int | None` → `int`."""
    if isinstance(annotation, types.UnionType):
        return next(a for a in typing.get_args(annotation) if a is not type(None))
    return annotation


class _NumberOrWord(flags.ArgumentParser):
    """A whole number, or one of some words."""

    def __init__(self, words: Sequence[str]):
        super().__init__()
        self.words, self.syntactic_help = words, f"a whole number, or {' or '.join(words)}"

    def parse(self, argument: str) -> int | str:
        try:
            return argument if argument in self.words else int(argument)
        except ValueError:
            raise ValueError(f"{argument!r} is not {self.syntactic_help}") from None


def define(values: flags.FlagValues, kind: type[Config] = Config) -> None:
    """Defines the flags of a kind of configuration."""
    types_of = typing.get_type_hints(kind)
    for field in kind.fields():
        name, default, text = field.name, field.default, field.metadata["help"]
        if field.metadata.get("switch"):  # its value is `true` where none is given
            switch = flags.Flag(flags.ArgumentParser(), None, name, default, text, boolean=True)
            flags.DEFINE_flag(switch, flag_values=values)
        elif words := field.metadata.get("words"):
            flags.DEFINE(_NumberOrWord(words), name, default, text, flag_values=values)
        else:
            _DEFINERS[_kind(types_of[name])](name, default, text, flag_values=values)
    flags.DEFINE_bool("help", False, "print this page", short_name="h", flag_values=values)


def _default_text(field: dataclasses.Field) -> str:
    if field.default is None:
        return "the model's recipe"
    return str(field.default).lower() if isinstance(field.default, bool) else str(field.default) or "none"


def help_page(summary: str, kind: type[Config] = Config) -> str:
    """The page behind `--help`: flags by group, then the models and data sets."""
    lines = [summary.strip(), ""]
    groups: dict[str, list[dataclasses.Field]] = {}
    for field in kind.fields():
        groups.setdefault(field.metadata["group"], []).append(field)
    for group, fields in groups.items():
        lines.append(f"{group.capitalize()}:")
        for field in fields:
            text = field.metadata["help"]
            if "choices" in field.metadata:
                text += f": {', '.join(field.metadata['choices'])}"
            if field.metadata.get("chosen", "model") != "model":
                text += f": {', '.join(registry(field.metadata['chosen']))}, or module:object of your own"
            text = textwrap.fill(f"{text} (default: {_default_text(field)})", 88)
            lines += [f"  --{field.name}", textwrap.indent(text, "        ")]
        lines.append("")
    if "model" not in kind.left_out:
        lines.append("Models:")
        lines += [f"  {name:<26}{card.summary} ({card.dataset})" for name, card in MODELS.items()]
        lines.append("")
    lines.append("Data sets:")
    lines += [f"  {name + card.argument:<26}{card.summary}" for name, card in DATASETS.items()]
    lines += [f"  {'mnist, cifar10, …':<26}any image classification set of TensorFlow Datasets, by its name", ""]
    lines.append(
        "--model=NAME,key=value,… sets options of NAME, --model=NAME,help lists them; so for --loss, --optimizer,"
    )
    lines.append("--schedule and a data set of your own. module:object is found from here and from PYTHONPATH.")
    lines.append("--flagfile=FILE reads flags from a file; every run writes one: RUN_DIR/flags.txt")
    return "\n".join(lines)


def short_help_page(summary: str, values: flags.FlagValues) -> str:
    """The page behind `--help` of a script that has flags of its own: those, then the models."""
    lines = [summary.strip(), "", "Flags:"]
    for flag in sorted({id(values[name]): values[name] for name in values}.values(), key=lambda flag: flag.name):
        default = str(flag.default).lower() if isinstance(flag.default, bool) else flag.default
        lines += [f"  --{flag.name}", textwrap.indent(textwrap.fill(f"{flag.help} (default: {default})", 88), " " * 8)]
    lines += ["", "Models:"]
    lines += [f"  {name:<26}{card.summary} ({card.dataset})" for name, card in MODELS.items()]
    return "\n".join(lines)


def fill(values: flags.FlagValues, argv: Sequence[str], page: Callable[[], str]) -> None:
    """Reads a command line (`argv[0]` is the program) into flags that are defined, `help` among them.

    Raises:
      BadConfiguration: a flag is unknown or malformed, or a word is not a flag.
      SystemExit: `--help` was asked for and `page()` has been printed; code 0.
    """
    try:
        rest = values(list(argv))
    except flags.Error as error:
        raise BadConfiguration(f"{' '.join(str(error).split())}; see --help") from error
    except OSError as error:  # absl lets a flagfile that cannot be read through
        raise BadConfiguration(f"--flagfile cannot be read: {error}; name a file with one flag a line") from error
    if values["help"].value:
        try:
            print(page(), flush=True)
        except BrokenPipeError:  # a pager that was left early
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(OK)
    if len(rest) > 1:
        raise BadConfiguration(f"{rest[1]!r} is not a flag; flags are written --name=value, see --help")


def read(argv: Sequence[str], summary: str, kind: type[Config] = Config) -> tuple[Config, list[str]]:
    """The configuration of a command line, as it was given, and the names of the flags that were given.

    `kind`: the class of the loop's configuration.

    Raises:
      BadConfiguration: a flag is unknown or malformed.
      SystemExit: `--help` was given and its page has been printed; code 0.
    """
    values = flags.FlagValues()
    define(values, kind)
    fill(values, argv, lambda: help_page(summary, kind))
    names = [field.name for field in kind.fields()]
    config, given = kind(**{name: values[name].value for name in names}), [n for n in names if values[n].present]
    _answer_help(config)
    # Of two flags that stand for each other, one that was typed replaces one of a file.
    typed = {name_of(word) for word in argv[1:]}
    for pair in map(set, EPOCHS.items()):
        if pair <= set(given) and len(pair & typed) == 1:
            (other,) = pair - typed
            config, given = dataclasses.replace(config, **{other: None}), [name for name in given if name != other]
    check_given(given)
    return recipes.applied(config, given), given


def name_of(word: str) -> str:
    """The name of the flag that a word of a command line sets."""
    return word.lstrip("-").partition("=")[0]


def without(words: Sequence[str], names: Collection[str]) -> list[str]:
    """Flags of a command line, `--name=value` or `--name value`, but those of these names."""
    left, dropped = [], False
    for word in words:
        if dropped and not word.startswith("-"):
            dropped = False
            continue
        dropped = name_of(word) in names and "=" not in word
        if name_of(word) not in names:
            left.append(word)
    return left


def _answer_help(config: Config) -> None:
    """Prints the options of what is chosen with the word `help`. Raises SystemExit with code 0 if there is any."""
    asked = [each for each in config.chosen if options.asks_for_help(each.text)]
    for _, kind, text in asked:
        print(options.help_table(kind, text), flush=True)
    if asked:
        raise SystemExit(OK)


def config_from(argv: Sequence[str], summary: str, kind: type[Config] = Config) -> Config:
    """The resolved configuration of a command line that trains.

    Raises:
      BadConfiguration, SystemExit: as `read`; or a value breaks a rule.
    """
    return resolve(read(argv, summary, kind)[0])
