"The program `alignkit`: what it prints, how it ends, and that it calls what the pages call."
import json, os, re, signal, subprocess, sys, time
import pytest
import torch
from diffusers import StableDiffusionPipeline
from torch.testing import assert_close
from typer.testing import CliRunner
from alignkit import cli, ddpo
from alignkit.cli import app, bars, changes_of, reward_of, settings_in, settle
from alignkit.folder import RunFolder
from alignkit.runs import read_run
from conftest import ROOT, bits, history, weights

FEW = "--set samples_per_epoch=4 --set num_inference_steps=2 --set updates_per_epoch=1 --set fast=onednn".split()
REWARD = """
import os, pathlib
def redness(images, prompts):
    with open(pathlib.Path(__file__).with_name(f"scored by {os.environ.get('RANK', 0)}"), "a") as f: f.write(f"{len(prompts)}\\n")
    return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
"""


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(REWARD)
    (tmp_path / "mine.csv").write_text("prompt,weight\na cat,1\na dog,2\n")
    return tmp_path


def ask(*words, code=0):
    "What a command prints, in this process."
    done = CliRunner().invoke(app, [str(w) for word in words for w in ([word] if not isinstance(word, list) else word)])
    assert done.exit_code == code, (done.output, done.exception)
    return done.output


def outside(*words, **variables):
    "The same in a process of its own, as a terminal starts it."
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    return subprocess.Popen([sys.executable, *words], env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


def test_a_run_is_that_of_train(pipe_folder, here):
    "The same history, bit for bit, as the call in Python; a table's column, a file's function, a YAML file under what was typed."
    (here / "run.yaml").write_text(f"pipe: {pipe_folder}\nreward: mine.py:redness\nprompts: mine.csv\nseed: 7\nlearning_rate: 1e-2\n")
    told = ask("train", "ddpo", "--config", "run.yaml", FEW, "--set", "num_epochs=2", "--set", "seed=3", "--out", "typed")
    few = dict(samples_per_epoch=4, num_inference_steps=2, updates_per_epoch=1, fast="onednn")
    cfg = ddpo.DDPOConfig(**few, num_epochs=2, seed=3, learning_rate=1e-2)
    ddpo.train(pipe_folder, reward_of("mine.py:redness"), "mine.csv", cfg, out="called")
    assert bits(history("typed")) == bits(history("called")) and "done: 2 epochs" in told and "alignkit show typed" in told
    ask("resume", "typed", "--set", "num_epochs=3")
    assert read_run("typed").history.epoch.tolist() == [0, 1, 2] and read_run("typed").config["reward"] == "mine.py:redness"


def test_precedence(here):
    "A preset, over it the file, over it what was typed."
    (here / "run.json").write_text(json.dumps(dict(preset="trl", num_epochs=5, seed=1, reward="jpeg_soft")))
    said, cfg = settle("ddpo", "run.json", ["seed=2"], reward="jpeg_compressibility", preset=None)
    assert said == dict(reward="jpeg_compressibility") and (cfg.samples_per_epoch, cfg.num_epochs, cfg.seed) == (24, 5, 2)
    assert settle("ddpo", "run.json", preset="ddpo-pytorch")[1].samples_per_epoch == 256
    with pytest.raises(ValueError, match="--config: .* is for ddpo, the command for rwr"):
        (here / "run.json").write_text(json.dumps(dict(method="ddpo")))
        settle("rwr", "run.json")


@pytest.mark.parametrize("words, code, told", [
    (["train", "ddpo", "--set", "lerning_rate=1"], 1, "settings: DDPOConfig has no 'lerning_rate'; did you mean learning_rate"),
    (["train", "ddpo", "--set", "num_epochs=many"], 1, "num_epochs: a whole number"),
    (["train", "ddpo", "--set", "num_epochs"], 1, "--set: name=value, got 'num_epochs'"),
    (["train", "ddpo", "--reward", "mine.py:blueness"], 1, "reward: mine.py has no 'blueness'; choose from mine.py:redness"),
    (["train", "ddpo", "--reward", "none.py:f"], 1, "reward: no file none.py"),
    (["train", "alignprop", "--reward", "jpeg_compressibility"], 1, "has no gradient"),
    (["train", "ddpo", "--preset", "paper"], 1, "preset"),
    (["train", "ppo"], 2, "No such command"),
    (["resume", "nothing"], 1, "nothing: no run there"),
    (["show", "nothing"], 1, "nothing: no run there"),
    (["mix", "base", "nothing", "0.5", "--out", "x"], 1, "adapter: nothing holds no LoRA"),
    (["settings", "ppo"], 1, "method: one of ddpo, rwr, alignprop"),
], ids=lambda x: " ".join(x) if isinstance(x, list) else "")
def test_errors_are_one_line(here, words, code, told):
    "On the error stream, with the input, the reason and the choices; nothing is written."
    before = sorted(here.iterdir())
    text = ask(words, code=code)
    assert told in text and "Traceback" not in text
    if code == 1: assert len([line for line in text.splitlines() if line.startswith("alignkit: error: ")]) == 1
    assert [p for p in sorted(here.iterdir()) if p.name != "__pycache__"] == before


def test_debug_shows_where(here):
    done = CliRunner().invoke(app, ["--debug", "resume", "nothing"])
    assert isinstance(done.exception, FileNotFoundError)
    cli.DEBUG.clear()


def test_help_comes_at_once():
    "Without torch, pandas and the others; a method's help has every setting with its comment."
    probe = """
import sys, runpy
sys.argv = ['alignkit', 'train', 'ddpo', '--help']
try: runpy.run_module('alignkit', run_name='__main__')
except SystemExit: pass
print(sorted({'torch', 'numpy', 'pandas', 'matplotlib', 'diffusers'} & set(sys.modules)))"""
    began = time.perf_counter()
    text, error = outside("-c", probe).communicate()
    assert time.perf_counter() - began < 10, "a second where nothing else runs"
    assert text.splitlines()[-1] == "[]", error
    flat = " ".join(text.split())
    for s in settings_in("ddpo").values(): assert f"{s.name}: {s.kind} = {s.default}" in flat and s.comment.split()[0] in flat
    assert list(settings_in("ddpo")) == [f.name for f in ddpo.DDPOConfig.__dataclass_fields__.values()]


def test_ctrl_c_says_how_to_go_on(pipe_folder, here):
    "Code 130 and the command; with it the run ends as the one that nobody stopped, bit for bit."
    words = ["train", "ddpo", "--pipe", pipe_folder, "--reward", "mine.py:redness", "--prompts", "mine.csv", *FEW]
    run = outside("-c", "import signal\nsignal.signal(signal.SIGINT, signal.default_int_handler)\nfrom alignkit.cli import main\nmain()",
                  *words, "--set", "num_epochs=400", "--out", "cut")
    until = time.monotonic() + 120
    while len(RunFolder("cut").history.read()) < 2 and time.monotonic() < until: time.sleep(0.01)
    run.send_signal(signal.SIGINT)
    error = run.communicate(timeout=60)[1]
    assert run.returncode == 130, error
    told = next(line for line in error.splitlines() if line.startswith("alignkit: "))
    assert re.fullmatch(r"alignkit: interrupted in epoch \d+; go on with: alignkit resume cut", told)
    epochs = len(RunFolder("cut").history.read()) + 1
    ask("resume", "cut", "--set", f"num_epochs={epochs}")
    ask(words, "--set", f"num_epochs={epochs}", "--out", "whole")
    assert bits(history("cut")) == bits(history("whole"))
    for name, w in weights("cut").items(): assert w.equal(weights("whole")[name])


def test_two_processes_share_a_run(pipe_folder, here):
    "Each draws and scores its half; what comes out is the run of one process within float error."
    words = ["train", "ddpo", "--pipe", pipe_folder, "--reward", "mine.py:redness", "--prompts", "mine.csv", *FEW, "--set", "num_epochs=2"]
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", "-m", "alignkit", *words, "--out", "two"]
    run = outside(*launch, ACCELERATE_USE_CPU="true")
    out, error = run.communicate(timeout=240)
    assert run.returncode == 0, error
    assert out.count("done: 2 epochs") == 1
    scored = [sum(map(int, (here / f"scored by {rank}").read_text().split())) for rank in (0, 1)]
    assert scored[0] >= 4 and scored[1] >= 4  # two epochs of two pictures each, and what is asked again
    ask(words, "--out", "one")
    assert_close(torch.tensor(read_run("two").history.reward_mean), torch.tensor(read_run("one").history.reward_mean), rtol=0, atol=1e-5)


def test_what_is_mixed_is_read_by_diffusers(pipe_folder, here):
    "Half of an adapter, as diffusers draws it with a scale of one half."
    ask("train", "ddpo", "--pipe", pipe_folder, FEW, "--set", "num_epochs=1", "--set", "learning_rate=0.05", "--out", "run")
    ask("mix", "base", "run", "0.5", "--pipe", pipe_folder, "--out", "half")
    assert "| `run` | 0.5 | a run of 1 epochs: `ddpo_is`" in (here / "half" / "README.md").read_text(encoding="utf-8")
    def picture(adapter, scale):
        pipe = StableDiffusionPipeline.from_pretrained(pipe_folder, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        pipe.load_lora_weights(adapter)
        how = dict(num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt")
        return pipe("a cat", cross_attention_kwargs=dict(scale=scale), **how).images
    assert_close(picture("half", 1.), picture("run/lora", 0.5), rtol=0, atol=1e-5)
    assert (picture("half", 1.) - picture("half", 0.)).abs().max() > 1e-4


def test_what_is_exported_is_read_by_diffusers(pipe_folder, here):
    "An adapter in both ways of writing, and a pipeline with it in its weights, draw the run's own picture; a card lies beside each."
    ask("train", "ddpo", "--pipe", pipe_folder, FEW, "--set", "num_epochs=1", "--set", "learning_rate=0.05", "--out", "run")
    ask("export", "run", "both", "--format", "both")
    assert "model_index.json" in ask("export", "run", "whole", "--pipeline") and (here / "both" / "README.md").is_file()
    def picture(folder, *lora, **kw):
        pipe = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
        pipe.set_progress_bar_config(disable=True)
        if lora: pipe.load_lora_weights(*lora, **kw)
        return pipe("a cat", num_inference_steps=2, generator=torch.Generator().manual_seed(0), output_type="pt").images
    wanted = picture(pipe_folder, "run/lora")
    assert (wanted - picture(pipe_folder)).abs().max() > 1e-4
    for got in (picture("whole"), *(picture(pipe_folder, "both", weight_name=f.name) for f in (here / "both").glob("*.safetensors"))):
        assert_close(got, wanted, rtol=0, atol=1e-5)
    assert len(list((here / "both").glob("*.safetensors"))) == 2
    assert "format: one of 'diffusers', 'kohya', 'both'" in ask("export", "run", "x", "--format", "gguf", code=1)
    assert "which: the weights that run has are" in ask("export", "run", "x", "--which", "7", code=1)


def test_show_and_lists(pipe_folder, here):
    "One file with every picture inside; lists with a line each."
    ask("train", "rwr", "--pipe", pipe_folder, FEW, "--set", "num_epochs=2", "--out", "run")
    text = ask("show", "run", "--html", "run.html")
    assert "reward_mean" in text and len([line for line in text.splitlines() if re.match(r" +[01] ", line)]) == 2
    page = (here / "run.html").read_text(encoding="utf-8")
    assert page.count("data:image/png;base64,") == 3 and "src=\"http" not in page and "torch" in page
    assert "clip_range: float = 2e-3  # PPO half-width" in ask("settings", "ddpo")
    assert "jpeg_soft              kB           gradient" in ask("rewards")
    assert "simple_animals                45  cat, dog, horse" in ask("prompts")
    assert "ddpo-pytorch" in ask("presets") and "hps-k1" in ask("presets")
    dry = ask("train", "alignprop", "--pipe", pipe_folder, "--dry-run", "--set", "truncation_k=2", "--set", "strategy=last")
    assert "truncation_k: 2" in dry and "peak" in dry and not (here / "runs").exists()


def test_a_reader_that_has_had_enough_is_no_error():
    "As with `alignkit presets | head -1`."
    run = outside("-u", "-m", "alignkit", "presets")
    run.stdout.readline()
    run.stdout.close()
    assert run.wait(60) == 0 and "error" not in run.stderr.read()


def test_a_run_without_a_place_gets_one(pipe_folder, here):
    for n in (1, 2):
        ask("train", "ddpo", "--pipe", pipe_folder, FEW, "--set", "num_epochs=1")
        assert len(read_run(f"runs/ddpo-{n}").history) == 1


def test_doctor(monkeypatch):
    "Good on this machine; a check that fails is named, with code 1."
    text = ask("doctor")
    assert text.count("ok   ") == 3 and "torch" in text
    monkeypatch.setattr(cli, "CHECKS", {"ratio before any update, from 1": (lambda device: 0.1, 0.)})
    assert "1 of 1 checks failed on cpu: ratio before any update" in ask("doctor", code=1)
    monkeypatch.setattr(cli, "CHECKS", {"nothing": (lambda device: float("nan"), 0.)})
    ask("doctor", code=1)


def test_values_by_type():
    given = dict(lora_targets="to_q", height="None", eval_kl="False", eta="1", seed="4", fast="off", eval_rewards="gold,clip_named")
    assert changes_of("ddpo", given) == dict(
        lora_targets="to_q", height=None, eval_kl=False, eta=1., seed=4, fast="off", eval_rewards=("gold", "clip_named"))
    assert bars([1, float("nan"), 2]).split(" ")[0] == "1"


def test_a_run_on_own_prompts_is_evaluated_on_them(pipe_folder, here):
    "By its own reward and judges, unless others are asked for; without a run, on held-out animals."
    few = [*FEW, "--set", "num_epochs=1", "--set", "eval_every=1", "--set", "eval_samples=2"]
    ask("train", "ddpo", "--pipe", pipe_folder, "--reward", "mine.py:redness", "--prompts", "mine.csv", few, "--out", "run")
    told = ask("evaluate", "run", "--pictures", "2", "--no-diversity")
    assert "mine.py:redness" in told and "heldout_animals" not in told and "gold" not in told
    other = ask("evaluate", "run", "--pictures", "2", "--no-diversity", "--reward", "jpeg_soft", "--prompts", "heldout_animals")
    assert "heldout_animals" in other and "jpeg_soft" in other and "redness" not in other
