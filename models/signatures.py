"""What an object of a module takes as keywords, read from its source, without importing it.

Of an object that only exists at run time, `of_object` tells the same after the import.
"""

import ast
import dataclasses
import inspect
from pathlib import Path
from typing import Any

from models import sources
from models.sources import AtRunTime, Module, NotFound

_BASES = {"int": int, "float": float, "bool": bool, "str": str}
# Decorators that give back what they were given.
_TRANSPARENT = ("register", "register_keras_serializable", "keras_export")


@dataclasses.dataclass(frozen=True)
class Type:
    """What a value is written as: a number, a word, true or false; `several`: a tuple of them; `optional`: or none."""

    base: type
    several: bool = False
    optional: bool = False

    def __str__(self) -> str:
        one = f"tuple of {self.base.__name__}" if self.several else self.base.__name__
        return f"{one} or none" if self.optional else one


@dataclasses.dataclass(frozen=True)
class Parameter:
    """A parameter that can be given by keyword. `type`: None where a text cannot say it. `shown`: its default."""

    name: str
    type: Type | None
    required: bool = False
    shown: str = ""


@dataclasses.dataclass(frozen=True)
class Signature:
    """`positional`: names that arguments without a name fill, in order. `open`: there may be others by keyword."""

    parameters: tuple[Parameter, ...]
    positional: tuple[str, ...]
    open: bool = False
    summary: str = ""


def type_of_annotation(node: ast.expr | None) -> Type | None:
    """`int | None` → `Type(int, optional=True)`; None for what a text cannot say."""
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        try:
            return type_of_annotation(ast.parse(node.value, mode="eval").body)
        except SyntaxError:
            return None
    if isinstance(node, ast.Name) and node.id in _BASES:
        return Type(_BASES[node.id])
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.BitOr):
        sides = [node.left, node.right]
        rest = [side for side in sides if not (isinstance(side, ast.Constant) and side.value is None)]
        kind = type_of_annotation(rest[0]) if len(rest) == 1 else None
        return dataclasses.replace(kind, optional=True) if kind else None
    if isinstance(node, ast.Subscript):
        outer = node.value.attr if isinstance(node.value, ast.Attribute) else getattr(node.value, "id", "")
        if outer == "Optional":
            kind = type_of_annotation(node.slice)
            return dataclasses.replace(kind, optional=True) if kind else None
        if outer in ("tuple", "Tuple") and isinstance(node.slice, ast.Tuple) and len(node.slice.elts) == 2:
            kind, rest = type_of_annotation(node.slice.elts[0]), node.slice.elts[1]
            whole = isinstance(rest, ast.Constant) and rest.value is ... and kind in (Type(int), Type(float))
            return dataclasses.replace(kind, several=True) if whole else None
    return None


def type_of_value(value: Any) -> Type | None:
    """The type that a default value tells, where there is no annotation."""
    if type(value) in _BASES.values():
        return Type(type(value))
    if isinstance(value, tuple) and value and all(type(one) in (int, float) for one in value):
        return Type(float if any(isinstance(one, float) for one in value) else int, several=True)
    return None


def _value(module: Module, node: ast.expr) -> Any:
    """A default that is written out, or is a constant of the module; raises ValueError for any other."""
    if isinstance(node, ast.Name):
        try:
            node = sources.binding(module, node.id)
        except AtRunTime:
            node = None
    if not isinstance(node, ast.expr):
        raise ValueError("not a constant")
    return ast.literal_eval(node)


def written(value: Any) -> str:
    """A value as an option is written: `true`, `none`, `256x128`; the one form of equal values."""
    if isinstance(value, (list, tuple)):
        return "x".join(map(written, value))
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def _parameter(module: Module, argument: ast.arg, default: ast.expr | None) -> Parameter:
    kind, shown = type_of_annotation(argument.annotation), ""
    if default is not None:
        try:
            value = _value(module, default)
            shown = written(value)
            kind = type_of_value(value) if argument.annotation is None else kind
        except (ValueError, TypeError, SyntaxError, MemoryError):
            shown = ast.unparse(default)
    return Parameter(argument.arg, kind, default is None, shown)


def _of_function(module: Module, node: ast.FunctionDef, skip: int) -> tuple[list[Parameter], tuple[str, ...]]:
    """Parameters that can be given by keyword, and the names of the positional ones, without the first `skip`."""
    given = node.args
    ordered = [*given.posonlyargs, *given.args]
    defaults = [None] * (len(ordered) - len(given.defaults)) + list(given.defaults)
    both = list(zip(ordered, defaults, strict=True))[skip:]
    by_name = both[max(len(given.posonlyargs) - skip, 0) :] + list(
        zip(given.kwonlyargs, given.kw_defaults, strict=True)
    )
    return [_parameter(module, *pair) for pair in by_name], tuple(argument.arg for argument, _ in both)


def _passed_on(init: ast.FunctionDef) -> set[str]:
    """Keywords that a constructor itself gives to the one of its base class."""
    names = set()
    for node in ast.walk(init):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "__init__":
            names |= {keyword.arg for keyword in node.keywords if keyword.arg}
    return names


def _decorators(node: Any) -> set[str]:
    names = [one.func if isinstance(one, ast.Call) else one for one in node.decorator_list]
    return {name.attr if isinstance(name, ast.Attribute) else getattr(name, "id", "?") for name in names}


def _of_class(module: Module, node: ast.ClassDef) -> Signature:
    """Of the constructor; where it takes `**kwargs`, or is not there, its base class's as well."""
    if "dataclass" in _decorators(node) or any(keyword.arg == "metaclass" for keyword in node.keywords):
        raise AtRunTime(node.name)
    init = next((one for one in node.body if isinstance(one, ast.FunctionDef) and one.name == "__init__"), None)
    own, positional = _of_function(module, init, 1) if init else ([], ())
    if init and not init.args.kwarg:
        return Signature(tuple(own), positional)
    hidden, above = False, None
    for base in node.bases:
        if isinstance(base, ast.Name) and base.id == "object":
            continue
        try:
            where, what = sources.attribute(module, base)
            if not isinstance(what, ast.ClassDef):
                raise AtRunTime(node.name)
            found = _of_class(where, what)
        except (AtRunTime, NotFound, RecursionError):
            hidden = True
            continue
        if above is None or (found.parameters and not above.parameters):
            above = found
    above = above or Signature((), (), hidden)
    names = {parameter.name for parameter in own} | (_passed_on(init) if init else set())
    more = [parameter for parameter in above.parameters if parameter.name not in names]
    return Signature((*own, *more), positional if init else above.positional, above.open)


def read(entry: str) -> Signature:
    """The signature of `module:object`, from its source.

    Raises:
      NotFound: there is no such module or object. AtRunTime: the source does not tell.
    """
    name, _, wanted = entry.partition(":")
    try:
        module, node = sources.find(sources.parsed(name), wanted)
    except RecursionError as error:  # modules that take names from one another
        raise AtRunTime(entry) from error
    summary = (ast.get_docstring(node) or "").partition("\n")[0]
    if isinstance(node, ast.ClassDef):
        return dataclasses.replace(_of_class(module, node), summary=summary)
    if _decorators(node) - set(_TRANSPARENT):
        raise AtRunTime(entry)
    parameters, positional = _of_function(module, node, 0)
    return Signature(tuple(parameters), positional, False, summary)


def source_of(entry: str) -> Path | None:
    """The file that defines `module:object`, followed through what re-exports it; None where that is not source."""
    name, _, wanted = entry.partition(":")
    try:
        return sources.find(sources.parsed(name), wanted)[0].path
    except (AtRunTime, NotFound, RecursionError):
        pass
    try:
        return sources.locate(name)
    except NotFound:
        return None


def _of_callable(function: Any) -> tuple[list[Parameter], list[str], bool]:
    """Of a Python object: parameters by keyword, names by position, and whether it takes others."""
    parameters, positional, more = [], [], False
    for one in inspect.signature(function).parameters.values():
        if one.kind is one.VAR_KEYWORD:
            more = True
        elif one.kind is not one.VAR_POSITIONAL:
            positional += [one.name] if one.kind is not one.KEYWORD_ONLY else []
            if one.kind is one.POSITIONAL_ONLY:
                continue
            if one.annotation is one.empty:
                kind = type_of_value(one.default)
            else:
                text = one.annotation if isinstance(one.annotation, str) else inspect.formatannotation(one.annotation)
                kind = type_of_annotation(ast.Constant(text))
            required = one.default is one.empty
            parameters.append(Parameter(one.name, kind, required, "" if required else written(one.default)))
    return parameters, positional, more


def of_object(value: Any) -> Signature:
    """The signature of an object that has been imported. Raises TypeError if it cannot be called."""
    parameters, positional, more = _of_callable(value)
    for base in inspect.getmro(value)[1:] if inspect.isclass(value) and more else ():
        if "__init__" in vars(base) and base is not object:
            names = {parameter.name for parameter in parameters} | {"self"}
            found, _, more = _of_callable(base.__init__)
            parameters += [one for one in found if one.name not in names]
        if not more:
            break
    summary = (inspect.getdoc(value) or "").partition("\n")[0]
    return Signature(tuple(parameters), tuple(positional), more, summary)


def defined_in(module: str) -> list[str] | None:
    """The public functions and classes of a module; None if there is no such module, or its source does not tell."""
    try:
        return sources.defined(sources.parsed(module))
    except (AtRunTime, NotFound):
        return None
