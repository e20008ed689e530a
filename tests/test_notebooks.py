"Every notebook runs top to bottom on one thread, offline, in a process of its own."
import os, subprocess, sys
import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
RUN = """
import sys
from pathlib import Path
from nbdev.config import get_config
from nbdev.test import test_nb
sys.exit(not test_nb(Path(sys.argv[1]), skip_flags=get_config().tst_flags.split(), basepath=get_config().config_path)[0])
"""


def test_there_are_notebooks():
    "The list below is not empty."
    assert len(NOTEBOOKS) >= 8


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_notebook_runs(notebook):
    "No cell fails; cells flagged slow or cuda are left out."
    done = subprocess.run([sys.executable, "-c", RUN, str(notebook)], cwd=ROOT, env={**os.environ, "MPLBACKEND": "agg"}, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]
