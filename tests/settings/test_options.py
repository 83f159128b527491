"""Choices with options, `NAME,key=value,…`, and objects of the user's own: read from source, before any import."""

import subprocess
import sys

import pytest
from conftest import ROOT

from models import cards, options, signatures, sources
from trainers.settings import flags
from trainers.settings.config import Config
from trainers.settings.exit_codes import BadConfiguration
from trainers.settings.optimizer_for import parse
from trainers.settings.options import asks_for_help, check, choice, help_table, import_objects, sources_of
from trainers.settings.rules import resolve

SOURCE = '''
"""What a user has written."""
import abc
from typing import Any, Optional

import keras

SIZE = 64
RAISED = open("imported", "w")  # whoever imports the module is found out


def build(spec, *, width: int = SIZE, units: "tuple[int, ...]" = (4, 8), rate: Optional[float] = None, deep=True,
          how: str = "fast", made: Any = None, path=None):
    """A model. And more."""


def needs(spec, width: int):
    pass


class Base(keras.optimizers.Optimizer):
    def __init__(self, learning_rate, gamma: float = 1.0, beta: float = 0.5, **kwargs):
        super().__init__(learning_rate=learning_rate, **kwargs)


class Mine(Base):
    def __init__(self, learning_rate, alpha: float = 0.1, **kwargs):
        super().__init__(learning_rate, beta=0.25, **kwargs)


class Same(Base):
    """Has no constructor of its own."""


made = abc.abstractmethod(build)
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A package of the user's own in the current directory."""
    folder = tmp_path / "own_pkg" / "deep"
    folder.mkdir(parents=True)
    (folder.parent / "__init__.py").write_text("raise RuntimeError('a package is not imported')\n")
    (folder / "__init__.py").write_text("from .net import build as again, Mine\nfrom own_pkg.deep.net import *\n")
    (folder / "net.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    yield folder
    assert not (tmp_path / "imported").exists()
    assert "own_pkg" not in sys.modules


@pytest.mark.parametrize(
    ("kind", "text", "canonical"),
    [
        ("optimizer", "sgd", "sgd"),
        ("optimizer", "adamw,beta_2=.950,beta_1=5e-1", "adamw,beta_1=0.5,beta_2=0.95"),
        ("optimizer", "sgd,nesterov=TRUE,momentum=1", "sgd,momentum=1.0,nesterov=true"),
        ("optimizer", "sam,rho=1,momentum=0.5", "sam,momentum=0.5,rho=1.0"),
        ("optimizer", "keras.optimizers:Lion,beta_1=0.5", "keras.optimizers:Lion,beta_1=0.5"),
        ("loss", "huber,threshold=2", "huber,threshold=2.0"),
        ("loss", "focal,class_weights=1x2.50", "focal,class_weights=1.0x2.5"),
        ("loss", "focal,class_weights=none", "focal,class_weights=none"),
        ("loss", "keras.losses:Huber,delta=2", "keras.losses:Huber,delta=2.0"),
        ("schedule", "cosine", "cosine"),
        ("model", "vit,width=+0384,depth=12", "vit,depth=12,width=384"),
        ("model", "resnet18,blocks=3x4x06x3", "resnet18,blocks=3x4x6x3"),
    ],
)
def test_equal_choices_have_one_spelling(kind, text, canonical):
    assert check(kind, text) == canonical
    assert check(kind, canonical) == canonical


@pytest.mark.parametrize(
    ("kind", "text", "parts"),
    [
        ("model", "vit,depth=1,depth=2", ["depth twice"]),
        ("model", "vit,depth", ["'depth'", "key=value"]),
        ("model", "vit,", ["''", "key=value"]),
        ("model", "vit,=3", ["''", "key=value"]),
        ("model", "vit,a b=3", ["'a b'", "key=value"]),
        ("model", "vit,dept=3", ["'dept'", "did you mean depth?", "width, depth, heads, dropout"]),
        ("model", "vit,depth=4.0", ["depth=4.0 is not a whole number", "e.g. depth=4"]),
        ("model", "vit,depth=", ["depth= is not a whole number"]),
        ("model", "vit,depth=1_0", ["is not a whole number"]),
        ("model", "vit,depth=99999999999", ["is not from -2147483647 to 2147483647"]),
        ("model", "vit,depth=none", ["is not a whole number"]),
        ("model", "vit,dropout=nan", ["is not a finite number"]),
        ("model", "vit,dropout=inf", ["is not a finite number"]),
        ("model", "resnet,blocks=1xx2", ["whole numbers, joined by x", "64x128"]),
        ("model", "resnet,blocks=1.0x2", ["whole numbers, joined by x"]),
        ("model", "vit,name=x", ["name is set by the trainer"]),
        ("model", "vit,spec=x", ["spec is given by the data set"]),
        ("model", "vti,depth=4", ["'vti'", "did you mean vit?", "module:object"]),
        ("model", "", ["''", "choose one of"]),
        ("model", "my pkg:x", ["'my pkg:x' is not module:object"]),
        ("model", "a.b:c.d", ["is not module:object"]),
        ("model", "no_such_pkg.net:build", ["there is no module no_such_pkg", "PYTHONPATH"]),
        ("model", "models.vit:build", ["there is no module vit in models"]),
        ("model", "models.mlp.x:build", ["there is no module x in models.mlp"]),
        ("model", "models.mlp:built", ["models.mlp", "does not define built", "did you mean build?", "MLP, build"]),
        ("optimizer", "sgd,nesterov=1", ["nesterov=1 is not true or false"]),
        ("optimizer", "sgd,learning_rate=1", ["set by --learning_rate"]),
        ("optimizer", "sgd,weight_decay=1", ["set by --weight_decay"]),
        ("optimizer", "sgd,clipnorm=1", ["set by --clip_norm"]),
        ("optimizer", "sgd,use_ema=true", ["set by --ema"]),
        ("optimizer", "keras.optimizers:Lio", ["did you mean Lion?", "it defines: Lion"]),
        ("schedule", "cosine,peak=1", ["set by --learning_rate"]),
        ("schedule", "cosine,total_steps=1", ["set by --train_steps"]),
        ("loss", "huber,reduction=sum", ["over the global batch"]),
        ("loss", "squared,threshold=1", ["has no option 'threshold'", "it takes none"]),
    ],
)
def test_a_choice_that_breaks_a_rule_is_answered_in_one_line(kind, text, parts):
    with pytest.raises(BadConfiguration) as failure:
        check(kind, text)
    message = str(failure.value)
    assert message.startswith(f"--{kind} ") and "\n" not in message
    assert all(part in message for part in parts), message


def test_a_loss_is_one_of_the_task():
    assert check("loss", "huber", "regression") == "huber"
    with pytest.raises(BadConfiguration, match="--loss 'huber' is not known"):
        check("loss", "huber", "classification")


@pytest.mark.parametrize("kind", ["model", "loss", "optimizer", "schedule"])
def test_every_entry_of_the_registry_tells_its_options_without_an_import(kind):
    for name, entry in options.registry(kind).items():
        static, real = signatures.read(entry), signatures.of_object(cards.load(entry))
        found, wanted = (options.accepted(kind, signature) for signature in (static, real))
        assert {key: one.type for key, one in found.items()} == {key: one.type for key, one in wanted.items()}, name
        assert {key: one.shown for key, one in found.items()} == {key: one.shown for key, one in wanted.items()}, name
        assert choice(kind, name).values == {}


@pytest.mark.parametrize("module", ["own_pkg.deep.net:build", "own_pkg.deep:again", "own_pkg.deep:build"])
def test_the_types_of_a_users_function_are_read_without_importing_it(package, module):
    one = choice("model", f"{module},width=3,units=7,rate=1,deep=false,how=")
    assert one.values == {"width": 3, "units": (7,), "rate": 1.0, "deep": False, "how": ""}
    assert choice("model", f"{module},rate=none").values == {"rate": None}
    with pytest.raises(BadConfiguration, match="made cannot be written as text"):
        check("model", f"{module},made=3")
    with pytest.raises(BadConfiguration, match="path cannot be written as text"):
        check("model", f"{module},path=3")
    assert signatures.source_of(module) == package / "net.py"


def test_keywords_of_base_classes_count_unless_the_class_sets_them(package):
    given = choice("optimizer", "own_pkg.deep:Mine,alpha=1,gamma=2").values
    assert given == {"alpha": 1.0, "gamma": 2.0}
    with pytest.raises(BadConfiguration, match="no option 'beta'.*it takes: alpha, gamma"):
        check("optimizer", "own_pkg.deep:Mine,beta=1")
    with pytest.raises(BadConfiguration, match="set by --clip_norm"):
        check("optimizer", "own_pkg.deep:Mine,clipnorm=1")
    assert choice("optimizer", "own_pkg.deep.net:Same,beta=1").values == {"beta": 1.0}


def test_what_is_required_must_be_given(package):
    with pytest.raises(BadConfiguration, match="needs width; write own_pkg.deep.net:needs,width=4"):
        check("model", "own_pkg.deep.net:needs")
    assert check("model", "own_pkg.deep.net:needs,width=1") == "own_pkg.deep.net:needs,width=1"


def test_an_object_that_is_made_at_run_time_is_left_to_its_import(package):
    one = choice("model", "own_pkg.deep.net:made,width=03,depth=x")
    assert one.values is None
    assert one.text == "own_pkg.deep.net:made,depth=x,width=03"


def test_help_shows_types_and_defaults(package):
    assert asks_for_help("vit,help") and not asks_for_help("vit,depth=4") and not asks_for_help(None)
    table = help_table("model", "own_pkg.deep.net:build,help")
    assert table.splitlines()[0] == "--model=own_pkg.deep.net:build: A model. And more."
    rows = [line.split() for line in table.splitlines()[1:]]
    assert ["width", "int", "default", "64"] in rows
    assert ["units", "tuple", "of", "int", "default", "4x8"] in rows
    assert ["rate", "float", "or", "none", "default", "none"] in rows
    assert ["deep", "bool", "default", "true"] in rows
    assert "required" in help_table("model", "own_pkg.deep.net:needs,help")
    assert "no options" in help_table("loss", "squared,help")


def test_options_are_checked_without_tensorflow():
    code = (
        "import sys; from trainers.settings import options as o\n"
        "o.check('optimizer', 'keras.optimizers:Lamb,beta_1=0.5'); o.check('model', 'vit,depth=3')\n"
        "o.help_table('loss', 'huber,help')\n"
        "print(sorted({'tensorflow', 'keras', 'numpy'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, check=True)
    assert done.stdout == "[]\n"


@pytest.fixture
def module(tmp_path, monkeypatch):
    """`module(source)` writes a module of the user's own, of a new name, and returns the name."""
    count = iter(range(100))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))

    def write(source: str) -> str:
        name = f"own_{tmp_path.name.replace('-', '_')}_{next(count)}"
        (tmp_path / f"{name}.py").write_text(source)
        return name

    return write


def of_model(text):
    return "model", "model", text


def test_a_module_that_raises_shows_the_users_lines_alone(module):
    inner = module("import json\n\n\ndef read():\n    return json.loads('nothing')\n")
    outer = module(f"import {inner}\n\nTABLE = {inner}.read()\n\n\ndef build(spec):\n    pass\n")
    with pytest.raises(BadConfiguration) as failure:
        import_objects([of_model(f"{outer}:build"), ("optimizer", "optimizer", "sgd")])
    first, *lines = str(failure.value).splitlines()
    assert first == f"--model {outer}:build raised while it was imported:"
    assert [line.strip() for line in lines[1:4:2]] == [f"TABLE = {inner}.read()", "return json.loads('nothing')"]
    assert lines[0].endswith(f'{outer}.py", line 3, in <module>') and lines[2].endswith("line 5, in read")
    assert lines[4].startswith("json.decoder.JSONDecodeError") and len(lines) == 5


def test_a_module_that_cannot_be_parsed_shows_where(module):
    name = module("def build(spec:\n    pass\n")
    with pytest.raises(BadConfiguration) as failure:
        import_objects([of_model(f"{name}:build")])
    assert f"{name}.py" in str(failure.value) and "SyntaxError" in str(failure.value)


def test_a_module_that_exits_or_takes_names_in_a_circle_is_answered(module):
    name = module("import sys\n\nsys.exit('enough')\n\n\ndef build(spec):\n    pass\n")
    with pytest.raises(BadConfiguration, match="SystemExit: enough"):
        import_objects([of_model(f"{name}:build")])
    name = module("a = b\nb = a\n")
    with pytest.raises(BadConfiguration, match="NameError"):
        import_objects([of_model(f"{name}:a")])


def test_an_object_made_at_run_time_is_checked_after_its_import(module):
    source = "import functools\n\n\ndef f(spec, *, width: int = 3, how='x', **more):\n    pass\n\n\n"
    name = module(source + "build = functools.partial(f)\nnumber = 7 + 0\n")
    import_objects([of_model(f"{name}:build,width=4,how=y")])
    assert choice("model", f"{name}:build,width=4").function()[1] == {"width": 4}
    for text, part in (("width=x", "is not a whole number"), ("widt=3", "did you mean width"), ("spec=1", "given by")):
        with pytest.raises(BadConfiguration, match=part):
            import_objects([of_model(f"{name}:build,{text}")])
    with pytest.raises(BadConfiguration, match="cannot be called"):
        import_objects([of_model(f"{name}:number")])


def test_a_name_that_the_import_binds_to_something_else_is_answered_in_one_line(module):
    name = module("def build(spec, width: int = 3):\n    pass\n\n\nglobals()['build'] = (1, 2)\n")
    with pytest.raises(BadConfiguration, match=f"--model {name}:build is a tuple and cannot be called; name a func"):
        import_objects([of_model(f"{name}:build,width=4")])


def test_a_name_that_only_the_import_misses_is_answered_in_one_line(module):
    name = module("def __getattr__(name):\n    raise AttributeError(f'nothing is called {name}', name=name)\n")
    with pytest.raises(BadConfiguration, match="nothing is called build"):
        import_objects([of_model(f"{name}:build")])


def test_the_current_directory_hides_nothing(module, tmp_path):
    (tmp_path / "models").mkdir()
    (tmp_path / "models/mlp.py").write_text("def mine(spec):\n    pass\n")
    (tmp_path / "json.py").write_text("def mine(spec):\n    pass\n")
    for name in ("models.mlp:mine", "json:mine"):
        with pytest.raises(BadConfiguration, match="does not define mine"):
            check("model", name)


def test_the_source_of_an_object_is_known_by_its_bytes(module):
    name = module("def build(spec):\n    pass\n")
    before = sources_of([of_model(f"{name}:build"), ("loss", "loss", "huber")])
    assert list(before) == ["model"]
    assert before["model"]["file"].endswith(f"{name}.py") and len(before["model"]["sha256"]) == 64
    with open(before["model"]["file"], "a") as file:
        file.write("# changed\n")
    assert sources_of([of_model(f"{name}:build")])["model"]["sha256"] != before["model"]["sha256"]


def test_names_are_found_through_conditions_or_left_to_the_import(module):
    name = module(
        "if True:\n    def a(spec, x: int = 1): pass\nelse:\n    a = None\n"
        "try:\n    def b(spec): pass\nfinally:\n    pass\n"
    )
    with pytest.raises(sources.AtRunTime):
        signatures.read(f"{name}:a")
    assert signatures.read(f"{name}:b").positional == ("spec",)


def test_an_optimizer_for_some_weights_takes_options_and_objects_too():
    sgd, lion = parse("wide/.*=sgd,learning_rate=0.1,momentum=.5; deep=keras.optimizers:Lion,beta_1=0.50")
    assert (sgd.optimizer, sgd.learning_rate) == ("sgd,momentum=0.5", 0.1)
    assert lion.optimizer == "keras.optimizers:Lion,beta_1=0.5"
    for text, part in (
        ("wide=sgd,momentm=1", "no option 'momentm'; did you mean momentum"),
        ("wide=sdg", "'sdg' is not known; did you mean sgd"),
        ("wide=sgd,clipnorm=1", "set by --clip_norm"),
        ("wide=no_such.pkg:x", "there is no module no_such"),
    ):
        with pytest.raises(BadConfiguration, match=f"--optimizer_for '{text}': .*{part}"):
            parse(text)
    chosen = Config(optimizer_for="a=keras.optimizers:SGD;b=keras.optimizers:Lion").chosen
    assert list(sources_of(chosen)) == ["optimizer_for", "optimizer_for 2"]


@pytest.mark.parametrize(
    ("text", "canonical"),
    [
        ("", ""),
        (" w=sgd,momentum=0.90 ;", "w=sgd,momentum=0.9"),
        ("w=sgd,learning_rate=1e-1,nesterov=True,momentum=.5", "w=sgd,momentum=0.5,nesterov=true,learning_rate=0.1"),
        ("b=adam,weight_decay=0; a=b=sgd", "b=adam,weight_decay=0.0;a=b=sgd"),
        ("[,]=sgd", "[,]=sgd"),
    ],
)
def test_equal_requests_of_optimizer_for_have_one_spelling(text, canonical):
    config = resolve(Config(model="wide_deep", optimizer_for=text))
    assert config.optimizer_for == canonical
    assert resolve(config).optimizer_for == canonical and parse(canonical) == parse(text)


def test_a_command_line_builds_its_configuration_once():
    built = []

    class Counted(Config):
        def __init__(self, **values):
            super().__init__(**values)
            built.append(self)

    config, given = flags.read(["x", "--model=mlp"], "", Counted)
    assert built == [config] and given == ["model"]
