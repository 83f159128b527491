"""README and docs: short, linked, and true where a machine can tell: files, flags, defaults."""

import dataclasses
import itertools
import re
import shlex

import pytest
from conftest import ROOT

from models import cards, options, recipes
from trainers.settings.config import Config
from trainers.settings.data_cards import DATASETS
from trainers.settings.exit_codes import RETRY
from trainers.settings.pages import SUPERVISED, page_of, shipped

README = ROOT / "README.md"
PAGES = sorted((ROOT / "docs").glob("*.md"))
TEXTS = {page.relative_to(ROOT).as_posix(): page.read_text() for page in [README, *PAGES, ROOT / "k8s/README.md"]}
FIELDS = {field.name: field for field in dataclasses.fields(Config)}
BUILT_IN = {"help", "flagfile"}
# Files that a reader of the worked examples writes.
WRITTEN_BY_THE_READER = {"models/small_cnn.py", "trainers/input/kinds/moons.py"}

# Scripts whose flags are the trainer's, from their name on or after `--`; and those that have more flags of their own.
TRAINERS = ("trainers/custom_loop.py", "launch/local.sh", "launch/docker.sh", "launch/slurm.sbatch")
AFTER_DASHES = ("launch/workers.py", "launch/scaling.py", "launch/k8s.py")
WITH_THEIR_OWN = {
    "launch/prove.py": {"trainer", "rows", "steps", "json", "keep"},
    "trainers/sweep.py": {"sweep_dir", "spec", "random", "random_seed", "jobs"},
}


def without_blocks(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def commands(text):
    """Lines of bash blocks, of consoles (`$ …`), and code between backticks that calls a script."""
    for block in re.findall(r"^```bash\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
        yield from block.splitlines()
    yield from re.findall(r"^\$ (.+)", text, re.MULTILINE)
    for code in re.findall(r"`([^`\n]+)`", without_blocks(text)):
        if re.match(r"(LOCKSTEP_LONG=1 |python )?(trainers|launch)/\S+ ", code):
            yield code
        if re.match(r"docker run lockstep:\S+ ", code):
            yield code


def flags_of_the_trainer(command):
    """Names of the trainer's flags in a command, and those that only its own script has."""
    words = shlex.split(command, comments=True)
    script = next((word for word in words if re.match(r"(trainers|launch)/|lockstep:", word)), None)
    if script is None:
        return
    if script in AFTER_DASHES:
        words = words[words.index("--") + 1 :] if "--" in words else []
    elif script in TRAINERS or script in WITH_THEIR_OWN or script.startswith("lockstep:"):
        words = words[words.index(script) + 1 :]
    else:
        return
    for word in words:
        if (match := re.match(r"--(\w+)", word)) and match[1] not in WITH_THEIR_OWN.get(script, set()):
            yield match[1]


def anchors(text):
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.+)$", without_blocks(text), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def sections_of_flags():
    """`docs/flags.md` in pieces: that of supervised training under "", those of other loops under their names."""
    pieces = re.split(r"^## `trainers/(\w+)\.py`$", TEXTS["docs/flags.md"], flags=re.MULTILINE)
    return {"": pieces[0]} | dict(zip(pieces[1::2], pieces[2::2], strict=True))


def rows_of_flags(text):
    """A piece of `docs/flags.md` as `{flag: [meaning, default, fixed]}`."""
    rows = re.findall(r"^\| `--(\w+)` \|(.+)\|$", text, re.MULTILINE)
    return {name: [cell.strip() for cell in rest.split("|")] for name, rest in rows}


def check_rows(rows, fields):
    assert list(rows) == list(fields), "docs/flags.md has the flags in their order"
    for name, field in fields.items():
        meaning, default, fixed = rows[name]
        assert default == default_of(field), name
        assert fixed == ("yes" if field.metadata["fixed"] else ""), name
        choices = field.metadata.get("choices", ())
        if field.metadata.get("chosen") in ("optimizer", "schedule"):
            choices = options.registry(field.metadata["chosen"])
        assert [choice for choice in choices if f"`{choice}`" not in meaning] == [], name


def default_of(field):
    """The cell that a field's default must have."""
    no_value = {"loss": "the model's own", "run_dir": "`runs/<model>-<dataset>-<time>-<random digits>`"}
    no_value |= {"cache_dir": "`~/.cache/lockstep`"}
    if field.default is None:
        return "the model's recipe"
    if field.default == "":
        return no_value.get(field.name, "none")
    return f"`{str(field.default).lower() if isinstance(field.default, bool) else field.default}`"


def test_the_readme_is_read_once():
    assert len(TEXTS["README.md"].splitlines()) <= 110


def test_the_readme_activates_the_environment_before_its_first_python_command():
    text = TEXTS["README.md"]
    assert 0 < text.index("source .venv/bin/activate") < text.index("\npython ")


def test_the_readme_links_every_page():
    linked = set(re.findall(r"\]\((docs/[\w-]+\.md)[)#]", TEXTS["README.md"]))
    assert {page.relative_to(ROOT).as_posix() for page in PAGES} == linked


@pytest.mark.parametrize("page", TEXTS)
def test_links_and_pictures_lead_somewhere(page):
    broken = []
    for target in re.findall(r"\]\(([^)\s]+)\)", without_blocks(TEXTS[page])):
        if re.match(r"https?:", target):
            continue
        path, _, anchor = target.partition("#")
        file = (ROOT / page).parent / path if path else ROOT / page
        if not file.exists() or (anchor and anchor not in anchors(file.read_text())):
            broken.append(target)
    assert broken == []


def test_every_picture_is_shown():
    shown = {name for text in TEXTS.values() for name in re.findall(r"images/(\w+\.png)\)", text)}
    assert shown == {path.name for path in (ROOT / "docs/images").iterdir()}


def test_files_that_the_pages_name_are_there():
    pattern = r"\b(?:launch|trainers|models|docs|tests|k8s)/[\w./-]+\.(?:py|sh|sbatch|png|md|yaml)\b"
    named = {name for text in TEXTS.values() for name in re.findall(pattern, text)}
    assert named >= {"launch/local.sh", "launch/workers.py", "launch/slurm.sbatch", "docs/images/step.png"}
    assert [name for name in sorted(named - WRITTEN_BY_THE_READER) if not (ROOT / name).exists()] == []


@pytest.mark.parametrize("page", TEXTS)
def test_flags_in_commands_are_flags_of_the_trainer(page):
    named = {flag for command in commands(TEXTS[page]) for flag in flags_of_the_trainer(command)}
    of_loops = {field.name for name in shipped() for field in page_of(name).settings.fields()}
    assert named - set(FIELDS) - of_loops - BUILT_IN == set()


def test_the_check_of_flags_sees_commands():
    seen = {flag for text in TEXTS.values() for command in commands(text) for flag in flags_of_the_trainer(command)}
    assert seen >= {"model", "train_steps", "run_dir", "profile", "label", "batch_size", "strategy", "mode"}
    assert set(flags_of_the_trainer("python trainers/custom_loop.py --modle=mlp")) == {"modle"}
    assert set(flags_of_the_trainer("python launch/prove.py --rows=resume --model=mlp")) == {"model"}


def test_every_flag_has_a_row_with_its_default_and_choices():
    check_rows(rows_of_flags(sections_of_flags()[""]), FIELDS)


@pytest.mark.parametrize("loop", [name for name in shipped() if name != SUPERVISED])
def test_every_flag_of_another_loop_that_differs_has_a_row(loop):
    text, kind = sections_of_flags()[loop], page_of(loop).settings
    own = {field.name: field for field in kind.fields()}
    differing = {name: field for name, field in own.items() if str(field) != str(FIELDS.get(name))}
    check_rows(rows_of_flags(text), differing)
    assert [name for name in kind.left_out if f"`--{name}`" not in text] == []


def test_flags_stand_in_their_groups():
    groups, here = {}, ""
    for line in sections_of_flags()[""].splitlines():
        if line.startswith("## "):
            here = line[3:].lower()
        elif match := re.match(r"\| `--(\w+)` \|", line):
            groups[match[1]] = here
    assert groups == {name: field.metadata["group"] for name, field in FIELDS.items()}


def test_what_the_pages_offer_can_be_chosen():
    """`--help` lists everything; a model of one's own needs no line in a page."""
    known = {*cards.MODELS, *cards.OPTIMIZERS, *cards.SCHEDULES, *recipes.RECIPES}
    known |= {*itertools.chain(*cards.LOSSES.values())}
    offered = set(re.findall(r"^\| `(\w+)` \|", TEXTS["docs/models.md"], re.MULTILINE))
    assert len(offered) >= 9 and offered <= known
    kinds = {name.split(":")[0] for name in re.findall(r"`([a-z_]+(?::[A-Z]+)?)`", TEXTS["docs/data.md"])}
    assert set(DATASETS) <= kinds


def test_the_page_of_runs_has_every_exit_code():
    codes = re.findall(r"^\| (\d+) \|", TEXTS["docs/runs.md"], re.MULTILINE)
    assert [int(code) for code in codes] == list(RETRY)
