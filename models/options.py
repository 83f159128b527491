"""One grammar for what a flag chooses: `NAME,key=value,…`, where NAME is in the registry or is `module:object`.

The keys are keyword parameters of what the name stands for, their types those of its signature. Free of TensorFlow: the
signature is read from source, so that flags are checked before anything is imported.

    sgd,momentum=0.9        vit,depth=12,width=384        my_pkg.net:build,units=256x128
"""

import dataclasses
import math
import re
from collections.abc import Iterable
from typing import Any

from models import cards, signatures, sources
from models.names import nearest, unknown
from models.signatures import Parameter, Signature, Type, written
from models.sources import AtRunTime, NotFound

HELP = "help"
# A whole number above it fits into no tensor of shapes.
MOST = 2**31 - 1
# How many arguments without a name each kind is called with: a spec; a learning rate; peak, warm-up and steps.
FILLED = {"model": 1, "loss": 0, "optimizer": 1, "schedule": 3, "dataset": 0}
# What the project sets, by kind, and where it comes from.
_CLIPPING, _AVERAGE = "set by --clip_norm", "set by --ema"
RESERVED: dict[str, dict[str, str]] = {
    "model": {"spec": "given by the data set", "name": "set by the trainer", "dtype": "set by --precision"},
    "loss": {
        "name": "set by the trainer",
        "dtype": "set by --precision",
        "reduction": "done by the loop, over the global batch",
    },
    "optimizer": {
        "learning_rate": "set by --learning_rate",
        "weight_decay": "set by --weight_decay",
        "clipnorm": _CLIPPING,
        "clipvalue": _CLIPPING,
        "global_clipnorm": _CLIPPING,
        "use_ema": _AVERAGE,
        "ema_momentum": _AVERAGE,
        "ema_overwrite_frequency": _AVERAGE,
        "loss_scale_factor": "set by --precision",
        "gradient_accumulation_steps": "set by --accumulate",
        "name": "set by the trainer",
    },
    "schedule": {
        "peak": "set by --learning_rate",
        "warmup_steps": "set by --warmup_steps",
        "total_steps": "set by --train_steps",
        "name": "set by the trainer",
    },
    "dataset": {},
}
# How many names of a module a message shows.
_MOST_NAMES = 20
_OBJECT = re.compile(r"[^\W\d]\w*(\.[^\W\d]\w*)*:[^\W\d]\w*")
_WHOLE = re.compile(r"[+-]?[0-9]+")
_EXAMPLES = {int: "4", float: "0.5", bool: "true", str: "some_word"}
_RULES = {int: "a whole number", float: "a finite number", bool: "true or false", str: "a word"}


class OptionError(ValueError):
    """A choice breaks a rule. The message is one line: value, rule, remedy."""


@dataclasses.dataclass(frozen=True)
class Choice:
    """What a flag chooses. `kind`: a key of `FILLED`; `entry`: `module:object`; `texts`: options as they were written.

    `values`: the options as keyword arguments; None while the source does not tell their types.
    """

    kind: str
    name: str
    entry: str
    texts: dict[str, str]
    values: dict[str, Any] | None

    @property
    def text(self) -> str:
        """The one spelling of equal choices: keys sorted, numbers as Python writes them."""
        values = self.texts if self.values is None else {key: written(value) for key, value in self.values.items()}
        return ",".join([self.name, *(f"{key}={values[key]}" for key in sorted(values))])

    @property
    def is_own(self) -> bool:
        """Whether it is an object of the user's own, not of the registry."""
        return is_object(self.name)

    def make(self, *args: Any, **keywords: Any) -> Any:
        """What the object returns for the arguments of its kind and its options.

        Raises:
          OptionError: as `function`; or the object refuses the value of an option.
        """
        function, values = self.function()
        try:
            return function(*args, **keywords, **values)
        except ValueError as error:
            if not self.texts:
                raise
            raise OptionError(f"--{self.kind} {self.text}: {' '.join(str(error).split())}") from error

    def function(self) -> tuple[Any, dict[str, Any]]:
        """The object that the name stands for, imported, and its keyword arguments.

        Raises:
          OptionError: the object is not there, or the options do not fit it. Others: what the import raises.
        """
        if self.is_own:
            sources.extend_path()
        try:
            value = cards.load(self.entry)
        except AttributeError as error:
            if getattr(error, "name", None) != self.entry.partition(":")[2]:
                raise
            raise OptionError(f"--{self.kind} {self.name}: {error}; name what it defines") from error
        if not callable(value):
            raise OptionError(
                f"--{self.kind} {self.name} is a {type(value).__name__} and cannot be called; name a function"
            )
        if self.values is not None:
            return value, self.values
        try:
            signature = signatures.of_object(value)
        except (TypeError, ValueError) as error:
            raise OptionError(f"--{self.kind} {self.name} cannot be called: {error}; name a function") from error
        return value, typed(self.kind, self.name, self.texts, signature)


def is_object(name: str) -> bool:
    """Whether a name has the form `module:object`."""
    return _OBJECT.fullmatch(name) is not None


def parse(kind: str, text: str) -> tuple[str, dict[str, str]]:
    """`sgd,momentum=0.9` → `("sgd", {"momentum": "0.9"})`. The word `help` among the options is kept, without a value.

    Raises:
      OptionError: a word is not `key=value`, a key is empty or stands twice.
    """
    name, *words = text.split(",")
    options: dict[str, str] = {}
    for word in words:
        key, equals, value = word.partition("=")
        if not (equals or word == HELP):
            raise OptionError(f"--{kind} {text!r}: {word!r} is not an option; write key=value, or {name},{HELP}")
        if not key.isidentifier():
            raise OptionError(f"--{kind} {text!r}: {key!r} is not the name of an option; write key=value")
        if key in options:
            raise OptionError(f"--{kind} {text!r} gives {key} twice; give it once")
        options[key] = value
    return name, options


def registry(kind: str, task: str = "") -> dict[str, str]:
    """Names and entries of a kind; of losses those of a task, or of all."""
    if kind == "model":
        return {name: card.build for name, card in cards.MODELS.items()}
    if kind == "loss":
        choices = [cards.LOSSES[task]] if task else cards.LOSSES.values()
        return {name: entry for part in choices for name, entry in reversed(part.items())}
    return {"optimizer": cards.OPTIMIZERS, "schedule": cards.SCHEDULES, "dataset": {}}[kind]


def entry_of(kind: str, name: str, task: str = "") -> str:
    """The entry that a name stands for: of the registry, or the name itself if it is `module:object`.

    Raises:
      OptionError: it is neither.
    """
    known = registry(kind, task)
    if name in known:
        return known[name]
    if is_object(name):
        return name
    if ":" in name:
        raise OptionError(f"--{kind} {name!r} is not module:object; write e.g. my_pkg.my_module:my_name")
    raise OptionError(f"{unknown(f'--{kind}', name, known)}, or module:object of your own")


def choose(kind: str, text: str, task: str = "") -> Choice:
    """What a flag's text chooses, checked as far as the source tells. Imports nothing.

    `kind`: a key of `FILLED`. `task`: the kind of data, which a loss of the registry depends on.

    Raises:
      OptionError: an unknown name or option, or a value of the wrong type; the message is one line.
    """
    name, texts = parse(kind, text)
    entry = entry_of(kind, name, task)
    signature = _signature(kind, name, entry)
    values = None if signature is None else typed(kind, name, texts, signature)
    return Choice(kind, name, entry, texts, values)


def _signature(kind: str, name: str, entry: str) -> Signature | None:
    try:
        return signatures.read(entry)
    except AtRunTime:
        return None
    except NotFound as error:
        module, _, wanted = entry.partition(":")
        if (defined := signatures.defined_in(module)) is None:
            raise OptionError(f"--{kind} {name}: {error}; write module:object, as Python imports it") from error
        near = defined if len(defined) <= _MOST_NAMES else [*nearest(wanted, defined, _MOST_NAMES), "…"]
        what = f"it defines: {', '.join(near)}" if defined else "it defines no function and no class"
        raise OptionError(f"--{kind} {name}: {error}{_hint(wanted, defined)}; {what}") from error


def _hint(name: str, choices: Iterable[str]) -> str:
    return "".join(f"; did you mean {near}?" for near in nearest(name, list(choices)))


def accepted(kind: str, signature: Signature) -> dict[str, Parameter]:
    """The parameters that can be given as options."""
    filled = signature.positional[: FILLED[kind]]
    return {
        one.name: one
        for one in signature.parameters
        if one.type is not None and one.name not in filled and one.name not in RESERVED[kind]
    }


def typed(kind: str, name: str, texts: dict[str, str], signature: Signature) -> dict[str, Any]:
    """Options as keyword arguments of a signature.

    Raises:
      OptionError: one is unknown, reserved, missing or of the wrong type.
    """
    what, choices = f"--{kind} {name}", accepted(kind, signature)
    filled, every = signature.positional[: FILLED[kind]], {one.name: one for one in signature.parameters}
    for key in texts:
        if key in RESERVED[kind] or key in filled:
            raise OptionError(f"{what}: {key} is {RESERVED[kind].get(key, 'filled by the trainer')}; leave it out here")
        if key in every and key not in choices:
            raise OptionError(
                f"{what}: {key} cannot be written as text; give it in the source an annotation of int, float, bool, "
                "str, or a tuple of numbers"
            )
        if key not in choices:
            takes = f"it takes: {', '.join(choices)}" if choices else "it takes none"
            raise OptionError(f"{what} has no option {key!r}{_hint(key, choices)}; {takes}")
    given = {*texts, *filled, *RESERVED[kind]}
    for one in signature.parameters:
        if one.required and one.name not in given:
            remedy = f"write {name},{one.name}={_example(one.type)}" if one.type else "give it a default in the source"
            raise OptionError(f"{what} needs {one.name}; {remedy}")
    return {key: _value(what, key, choices[key].type, text) for key, text in texts.items()}


def _example(kind: Type) -> str:
    return "64x128" if kind.several else _EXAMPLES[kind.base]


def _value(what: str, key: str, kind: Type, text: str) -> Any:
    if kind.optional and text == "none":
        return None
    try:
        if kind.several:
            return tuple(_one(kind.base, part) for part in text.split("x"))
        return _one(kind.base, text)
    except ValueError:
        rule = _RULES[kind.base]
        if kind.several:
            rule = f"{rule.removeprefix('a ')}s, joined by x"
        elif kind.base is int and _WHOLE.fullmatch(text):
            rule = f"from -{MOST} to {MOST}"
        rule += ", or none" if kind.optional else ""
        raise OptionError(f"{what}: {key}={text} is not {rule}; write e.g. {key}={_example(kind)}") from None


def _one(base: type, text: str) -> Any:
    """A value of a type; raises ValueError."""
    if base is str:
        return text
    if base is bool:
        if text.lower() not in ("true", "false"):
            raise ValueError
        return text.lower() == "true"
    if "_" in text or (base is int and not _WHOLE.fullmatch(text)):
        raise ValueError
    value = base(text)
    if not math.isfinite(value) or (base is int and abs(value) > MOST):
        raise ValueError
    return value


def split(text: str) -> list[str]:
    """Several choices, joined by commas, each with its options: `mlp,vit,depth=2` → `["mlp", "vit,depth=2"]`."""
    choices: list[str] = []
    for word in text.split(","):
        if choices and word.partition("=")[0].isidentifier() and "=" in word:
            choices[-1] += f",{word}"
        else:
            choices.append(word)
    return choices


def table(kind: str, text: str, task: str = "") -> str:
    """What `NAME,help` prints: the options with their types and defaults, and the first line of the documentation.

    Of an object whose source does not tell, the module is imported.

    Raises:
      OptionError: there is no such name. Others: what the import raises.
    """
    name = text.partition(",")[0]
    entry = entry_of(kind, name, task)
    signature = _signature(kind, name, entry)
    if signature is None:
        sources.extend_path()
        signature = signatures.of_object(cards.load(entry))
    lines = [f"--{kind}={name}" + (f": {signature.summary}" if signature.summary else "")]
    rows = [
        (one.name, str(one.type), "required" if one.required else f"default {one.shown or 'empty'}")
        for one in accepted(kind, signature).values()
    ]
    wide = [max((len(row[i]) for row in rows), default=0) for i in range(2)]
    lines += [f"  {row[0]:<{wide[0]}}  {row[1]:<{wide[1]}}  {row[2]}" for row in rows] or ["  no options"]
    return "\n".join(lines)
