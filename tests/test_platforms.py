"What must hold on every system, and CI asks of Windows and macOS too: all modules can be imported, a short run goes on from its folder."
import subprocess, sys
from pathlib import Path
import pytest

MODULES = sorted(p.stem for p in (Path(__file__).resolve().parent.parent / "alignkit").glob("[a-z]*.py"))


@pytest.mark.parametrize("missing", ["", "resource"])
def test_every_module_can_be_imported(missing):
    "In a process of its own; also where `resource` does not exist, as on Windows."
    assert len(MODULES) > 20
    hide = f"import sys; sys.modules[{missing!r}] = None\n" if missing else ""
    code = hide + f"import {', '.join('alignkit.' + m for m in MODULES)}"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]


def test_a_run_writes_its_folder_and_goes_on(tmp_path):
    from alignkit.ddpo import DDPOConfig, train
    few = dict(samples_per_epoch=2, updates_per_epoch=1, num_inference_steps=2, fast="onednn")
    train("tiny", cfg=DDPOConfig(num_epochs=1, **few), out=tmp_path / "run")
    run = train("tiny", cfg=DDPOConfig(num_epochs=2, **few), out=tmp_path / "run", resume=True)
    assert run.history.epoch.tolist() == [0, 1] and (tmp_path / "run" / "lora").is_dir()
