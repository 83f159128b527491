"""Files are whole or not there, whatever happens while they are written."""

import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT

from trainers.world import files


def test_a_reader_sees_the_old_text_or_the_new(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")
    with pytest.raises(RuntimeError), files.aside(path) as place:
        place.write_text("new")
        raise RuntimeError
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    with files.aside(path) as place:
        place.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


def test_a_folder_replaces_a_folder_whole(tmp_path):
    path = tmp_path / "folder"
    for name in ("first", "second"):
        with files.aside(path) as place:
            place.mkdir()
            (place / name).write_text("")
    assert [file.name for file in path.iterdir()] == ["second"] and list(tmp_path.iterdir()) == [path]
    with pytest.raises(RuntimeError), files.aside(path) as place:
        place.mkdir()
        raise RuntimeError
    assert [file.name for file in path.iterdir()] == ["second"] and list(tmp_path.iterdir()) == [path]


def test_a_process_that_is_killed_while_it_writes_leaves_the_old_file(tmp_path):
    path = tmp_path / "file"
    files.write_text(path, "old")
    code = (
        "import os, signal, sys\nfrom pathlib import Path\nfrom trainers.world import files\n"
        "with files.aside(Path(sys.argv[1])) as place:\n"
        "    place.write_text('new')\n    os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, str(path)], cwd=ROOT, check=False)
    assert done.returncode == -signal.SIGKILL and path.read_text() == "old"
    assert os.listdir(tmp_path) != []
