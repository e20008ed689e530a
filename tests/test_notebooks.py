"Every notebook runs top to bottom on one thread, offline, in a process of its own; those that compare floats on plainer kernels too."
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
# torch's, oneDNN's and MKL's plainest kernels: other widths of vectors, hence other orders of summation, than the processor's own
PLAIN = dict(ATEN_CPU_CAPABILITY="default", ONEDNN_MAX_CPU_ISA="SSE41", MKL_CBWR="COMPATIBLE")
FLOATS = ["02_mdp", "03_logprob"]


def run(notebook, **env):
    "No cell fails; cells flagged slow or cuda are left out."
    env = {**os.environ, "MPLBACKEND": "agg", **env}
    done = subprocess.run([sys.executable, "-c", RUN, str(notebook)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-4000:]


def test_there_are_notebooks():
    "The list below is not empty."
    assert len(NOTEBOOKS) >= 8


@pytest.mark.parametrize("notebook", NOTEBOOKS, ids=[p.stem for p in NOTEBOOKS])
def test_notebook_runs(notebook):
    run(notebook)


@pytest.mark.parametrize("name", FLOATS)
def test_notebook_runs_as_another_processor_rounds(name):
    "A check that passes on one processor's rounding only is no check of the code: these pages hold with the plainest kernels too."
    run(ROOT / "nbs" / f"{name}.ipynb", **PLAIN)
