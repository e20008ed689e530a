"What users of such kits do to a run that should go on: other weights, two processes, torn files, callbacks, Ctrl-C."
import hashlib, json, multiprocessing, os, platform, shutil, signal, subprocess, sys, threading, time
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from alignkit import alignprop, ddpo, folder, rwr
from alignkit.pipelines import load
from alignkit.rewards import Reward, get_reward
from alignkit.folder import RunFolder, holder
from conftest import PROMPTS, assert_same_run, bits, brightness, forked, go, history, in_child, weights

FEW = dict(samples_per_epoch=4, updates_per_epoch=1, num_inference_steps=3, eval_every=0, fast="onednn")
METHODS = {"rwr": (rwr.train, rwr.RWRConfig, "jpeg_compressibility"), "ddpo": (ddpo.train, ddpo.DDPOConfig, "jpeg_compressibility"),
           "alignprop": (alignprop.train, alignprop.AlignPropConfig, "jpeg_soft")}
bright = Reward(brightness, "brightness")


def config(folder): return json.loads((Path(folder) / "config.json").read_text())["config"]


def short(pipe, out=None, epochs=2, reward=bright, **how):
    "A DDPO run of seconds."
    changes = {k: how.pop(k) for k in list(how) if k in ddpo.DDPOConfig.__dataclass_fields__}
    cfg = ddpo.DDPOConfig(num_epochs=epochs, **{**FEW, **changes})
    return ddpo.train(pipe, reward, PROMPTS, cfg, out, **how)


# which model ------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def begun(pipe_folder, tmp_path_factory):
    "A folder with two epochs of a loaded pipeline, and that pipeline, an adapter on."
    out, pipe = tmp_path_factory.mktemp("begun") / "run", load(pipe_folder)
    short(pipe, out)
    return out, pipe


def copied(begun, tmp_path):
    shutil.copytree(begun[0], tmp_path / "run")
    return tmp_path / "run"


def by_hand(file, used=lambda name: True):
    "The checksum of a file of diffusers', from the file alone."
    lines = []
    for name, w in sorted(load_file(file).items()):
        if used(name): lines.append(f"{name} {tuple(w.shape)} {hashlib.sha256(w.numpy().tobytes()).hexdigest()}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def test_the_checksum_is_of_the_weights_that_draw(pipe_folder, begun):
    "Recorded at the start, equal to one made of diffusers' own files; the VAE's encoder, which never draws, does not count."
    folder, said = Path(pipe_folder), config(begun[0])["weights_sha256"]
    encoder = ("encoder.", "quant_conv.")
    assert said == dict(unet=by_hand(folder / "unet/diffusion_pytorch_model.safetensors"),
                        vae=by_hand(folder / "vae/diffusion_pytorch_model.safetensors", lambda name: not name.startswith(encoder)),
                        text_encoder=by_hand(folder / "text_encoder/model.safetensors", lambda name: "position_ids" not in name))


def test_the_same_model_goes_on_under_another_path_or_as_another_object(pipe_folder, begun, tmp_path):
    out = copied(begun, tmp_path)
    shutil.copytree(pipe_folder, tmp_path / "elsewhere")
    with pytest.warns(UserWarning, match="replaced by a fresh one"): assert len(short(begun[1], out, 3, resume=True).history) == 3
    for pipe in (str(tmp_path / "elsewhere"), load(pipe_folder), pipe_folder):
        assert len(short(pipe, out, 3, resume=True).history) == 3


@pytest.mark.parametrize("part", ["unet", "text_encoder", "vae"])
def test_other_weights_are_refused_by_name(pipe_folder, begun, tmp_path, part):
    "One number of a network is enough; nothing in the folder is touched, and no lock is left."
    out, other = copied(begun, tmp_path), load(pipe_folder)
    network = getattr(other, part)
    w = next(reversed(list(network.decoder.parameters() if part == "vae" else network.parameters())))
    with torch.no_grad(): w.view(-1)[0] += 1e-3
    before = {p: p.read_bytes() for p in out.rglob("*") if p.is_file()}
    with pytest.raises(ValueError, match=f"pipe: not the model .*: other weights in {part};"): short(other, out, 3, resume=True)
    assert {p: p.read_bytes() for p in out.rglob("*") if p.is_file()} == before
    with torch.no_grad(): w.view(-1)[0] -= 1e-3


def test_another_schedule_is_refused_by_name(pipe_folder, begun, tmp_path):
    from diffusers import DDIMScheduler
    out, other = copied(begun, tmp_path), load(pipe_folder)
    was = other.scheduler.config.beta_end
    other.scheduler = DDIMScheduler.from_config(other.scheduler.config, beta_end=2 * was)
    with pytest.raises(ValueError, match=f"beta_end was {was}, now {2 * was}"): short(other, out, 3, resume=True)


@pytest.mark.parametrize("precision, trainable", [("bf16", "lora"), ("no", "full"), ("bf16", "full")])
def test_the_object_that_was_trained_goes_on(pipe_folder, tmp_path, precision, trainable):
    "A notebook's pipeline is in half precision, and trained, after the first part; the second is that of a fresh pipeline."
    how, pipe = dict(mixed_precision=precision, trainable=trainable, learning_rate=1e-4), load(pipe_folder)
    short(pipe, tmp_path / "run", **how)
    shutil.copytree(tmp_path / "run", tmp_path / "fresh")
    for model, out in ((pipe, "run"), (pipe_folder, "fresh")): short(model, tmp_path / out, 3, resume=True, **how)
    assert bits(history(tmp_path / "run")) == bits(history(tmp_path / "fresh"))
    assert bits(weights(tmp_path / "run/checkpoints/epoch_0002")) == bits(weights(tmp_path / "fresh/checkpoints/epoch_0002"))


def test_a_run_of_before_there_were_checksums_goes_on(begun, tmp_path):
    "With a word; from then on it has one."
    out = copied(begun, tmp_path)
    record = json.loads((out / "config.json").read_text())
    checksum = record["config"].pop("weights_sha256")
    for name in ("scheduler", "reward_sha256"): record["config"].pop(name)
    (out / "config.json").write_text(json.dumps(record))
    (out / "prompts.json").unlink()
    with pytest.warns(UserWarning, match="begun before weights had a checksum"): short(begun[1], out, 3, resume=True)
    assert config(out)["weights_sha256"] == checksum


def test_a_reward_whose_code_changed_is_told(begun, tmp_path):
    "Its source is in the record, also as a part of a sum; the kit's own has none."
    out = copied(begun, tmp_path)
    def other(images, prompts): return 2 * images.mean((1, 2, 3))
    with pytest.warns(UserWarning, match="the code of the reward 'brightness' is not what it was"):
        short(begun[1], out, 3, reward=Reward(other, "brightness"), resume=True)
    from alignkit.start import _sources
    assert "".join(_sources(get_reward({brightness: 2., "jpeg_compressibility": 1.}))) == "".join(_sources(bright))
    assert "images[:, 0]" in _sources(bright)[0] and _sources(get_reward("jpeg_compressibility")) == []


# the folder alone -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_the_folder_alone_is_enough(pipe_folder, tmp_path, method):
    "train(resume=folder) after k epochs is the unbroken run bit for bit, its settings far from the defaults; num_epochs more by override."
    train, kind, reward = METHODS[method]
    cfg = kind(num_epochs=1, seed=3, learning_rate=2e-3, lora_targets=("to_q", "to_v"), **FEW)
    (tmp_path / "mine.txt").write_text("a cat\na dog\n")
    train(pipe_folder, reward, tmp_path / "mine.txt", cfg, tmp_path / "run")
    (tmp_path / "mine.txt").unlink()  # the prompts are in the folder
    train(resume=tmp_path / "run", override=dict(num_epochs=2))
    assert config(tmp_path / "run")["num_epochs"] == 2
    train(resume=str(tmp_path / "run"))  # over, nothing to do
    cfg.num_epochs = 2
    train(pipe_folder, reward, PROMPTS, cfg, tmp_path / "whole")
    assert bits(history(tmp_path / "run")) == bits(history(tmp_path / "whole"))
    assert bits(weights(tmp_path / "run/lora")) == bits(weights(tmp_path / "whole/lora"))


def test_what_has_no_name_must_be_given_again(pipe_folder, begun, tmp_path):
    "Each by its name; with them the run goes on."
    out = copied(begun, tmp_path)
    with pytest.raises(ValueError, match="^pipe: .*loaded StableDiffusionPipeline.* give it again"): ddpo.train(resume=out)
    with pytest.raises(ValueError, match="^reward: .*'brightness'.* give it again"): ddpo.train(pipe_folder, resume=out)
    assert len(ddpo.train(pipe_folder, bright, resume=out).history) == 2
    record = json.loads((out / "config.json").read_text())
    record["config"] |= dict(eval_every=1, eval_rewards=["mine"])
    (out / "config.json").write_text(json.dumps(record))
    with pytest.raises(ValueError, match="^eval_rewards: .*'mine'.* give it again"): ddpo.train(pipe_folder, bright, resume=out)
    def drawn(generator): return PROMPTS[int(torch.randint(2, (), generator=generator))]
    one = ddpo.DDPOConfig(num_epochs=1, **FEW)
    ddpo.train(pipe_folder, prompts=drawn, cfg=one, out=tmp_path / "called")
    with pytest.raises(ValueError, match="^prompts: .*'drawn'.* give them again"): ddpo.train(resume=tmp_path / "called")
    words = "other settings than a RWRConfig: method: 'rwr', got 'ddpo_is'"
    with pytest.raises(ValueError, match=words): rwr.train(resume=tmp_path / "called")


def test_defaults_are_defaults_where_nothing_goes_on(tmp_path, monkeypatch):
    "resume=True with an empty folder, and no folder: what the signature says."
    seen = []
    class Enough(Exception): pass
    def look(model, *args, **how):
        seen.append(model)
        raise Enough
    import alignkit.start as start
    monkeypatch.setattr(start, "get_sampler", look)
    def given(cfg, pipe, reward, prompts, eval_prompts):
        seen.append((cfg, pipe, reward.name, prompts.name))
        return {}
    monkeypatch.setattr(start, "_config", given)
    for how in ({}, dict(out=tmp_path / "new", resume=True)):
        with pytest.raises(Enough): ddpo.train(**how)
        assert seen[-2] == (ddpo.DDPOConfig(eval_prompts="heldout_animals"), "tiny", "jpeg_compressibility", "simple_animals")


def test_other_settings_from_an_epoch_on(pipe_folder, begun, tmp_path):
    "override: the optimiser takes them too, and its moments stay; config.json says from which epoch."
    out = copied(begun, tmp_path)
    rates = []
    def watching(run, row): rates.append(row["lr"])
    def lr_of(epoch):
        group, = torch.load(out / f"checkpoints/epoch_{epoch:04d}/optimizer.pt", weights_only=True)["param_groups"]
        return group["lr"], group["weight_decay"]
    before = torch.load(out / "checkpoints/epoch_0001/optimizer.pt", weights_only=True)["state"]
    ddpo.train(pipe_folder, bright, resume=out, callbacks=watching, override=dict(learning_rate=1e-9, adam_weight_decay=0., num_epochs=4))
    assert rates == [1e-9] * 2 and lr_of(3) == (1e-9, 0.)
    after = torch.load(out / "checkpoints/epoch_0003/optimizer.pt", weights_only=True)["state"]
    assert after[0]["step"] == before[0]["step"] + 2  # the moments were taken over, not begun again
    a, b = weights(begun[0] / "lora"), weights(out / "lora")
    assert 0 < max((a[k] - b[k]).abs().max() for k in a) < 1e-7
    record, was = json.loads((out / "config.json").read_text()), ddpo.DDPOConfig()
    change = record["changes"][-1]
    assert change["epoch"] == 2 and change["settings"]["learning_rate"] == [was.learning_rate, 1e-9]
    assert change["settings"]["num_epochs"] == [2, 4] and record["config"]["learning_rate"] == 1e-9
    with pytest.raises(ValueError, match="learning_rate was 1e-09, now"): short(pipe_folder, out, 4, resume=True)
    assert len(ddpo.train(pipe_folder, bright, resume=out).history) == 4  # and alone it goes on with what holds now


@pytest.mark.parametrize("override, words", [
    (dict(lerning_rate=1.), "override: no setting of DDPOConfig is called 'lerning_rate'; choose from .*learning_rate"),
    (dict(lora_rank=7), "override: .* lora_rank=4 and fits no other, got 7"), (dict(learning_rate=-1.), "learning_rate: greater than 0")])
def test_an_override_that_cannot_be_is_refused(pipe_folder, begun, override, words):
    with pytest.raises(ValueError, match=words): ddpo.train(pipe_folder, bright, resume=begun[0], override=override)
    with pytest.raises(ValueError, match="^override: is for a run that goes on"): ddpo.train(override=dict(seed=1))


def test_evaluations_begun_by_override_have_their_base(pipe_folder, begun, tmp_path):
    "eval_every was 0: the untrained model is looked at, not the trained one; other eval_samples make another base."
    out, plain = copied(begun, tmp_path), dict(eval_every=1, eval_samples=2, eval_prompts=("a cow",))
    ddpo.train(pipe_folder, bright, resume=out, override=dict(plain, num_epochs=3))
    truth = short(pipe_folder, None, 1, **plain).eval_base
    base = json.loads((out / "eval_base.json").read_text())
    assert abs(base["eval_reward_mean"] - truth["eval_reward_mean"]) < 1e-6
    ddpo.train(pipe_folder, bright, resume=out, override=dict(eval_samples=1, num_epochs=4))
    other = json.loads((out / "eval_base.json").read_text())["eval_reward_mean"]
    assert other != base["eval_reward_mean"]
    assert abs(other - short(pipe_folder, None, 1, **dict(plain, eval_samples=1)).eval_base["eval_reward_mean"]) < 1e-6


# one run at a time ------------------------------------------------------------------------------------------------------------

def run_elsewhere(pipe, out, ready, go_on):
    "In another process: stand in the first epoch's callback until told."
    def wait(run, row):
        ready.set()
        go_on.wait(60)
    short(pipe, out, callbacks=wait)


def test_a_second_run_is_refused_while_the_first_is_alive(pipe_folder, tmp_path):
    "By its process and host; the first one ends as if nothing had been, and leaves no lock."
    ready, go_on, out = multiprocessing.Event(), multiprocessing.Event(), tmp_path / "run"
    first = forked(run_elsewhere, pipe_folder, out, ready, go_on)
    try:
        assert ready.wait(60)
        with pytest.raises(RuntimeError, match=f"in use by another run, process {first.pid} on"): short(pipe_folder, out, resume=True)
        assert holder(out / "lock")["pid"] == first.pid
    finally: go_on.set()
    first.join(60)
    assert first.exitcode == 0 and not (out / "lock").exists()
    short(pipe_folder, tmp_path / "alone")
    assert bits(history(out)) == bits(history(tmp_path / "alone"))


def killed_in_a_callback(pipe, out): short(pipe, out, callbacks=lambda run, row: os.kill(os.getpid(), signal.SIGKILL))


def test_a_dead_run_s_lock_is_taken_over(pipe_folder, tmp_path):
    "SIGKILL leaves the lock behind, and the row and checkpoint of the epoch whose callback it came in; errors leave no lock."
    out = tmp_path / "run"
    assert in_child(killed_in_a_callback, pipe_folder, out) == -signal.SIGKILL
    assert (out / "lock").exists() and holder(out / "lock") is None
    assert [r["epoch"] for r in history(out)] == [0] and (out / "checkpoints/epoch_0000/state.json").exists()
    def bad(images, prompts): raise ConnectionError("away")
    with pytest.raises(RuntimeError, match="away"): short(pipe_folder, out, reward=Reward(bad, "brightness"), resume=True)
    assert not (out / "lock").exists()
    short(pipe_folder, out, resume=True)
    short(pipe_folder, tmp_path / "alone")
    assert bits(history(out)) == bits(history(tmp_path / "alone")) and not (out / "lock").exists()


def test_two_that_find_the_same_dead_lock_do_not_both_take_it(tmp_path, monkeypatch):
    "The slower one removes the lock that the faster one has just written; then one of them has the folder, and the other is refused."
    file, ends = tmp_path / "lock", []
    file.write_text(json.dumps(dict(host=platform.node(), pid=2**22 + 1, began=0.)))

    def take(name):
        try:
            folder._take(file, name)
            ends.append(name)
        except RuntimeError as e: ends.append(str(e))
    faster, unlink = threading.Thread(target=take, args=("faster",)), Path.unlink

    def slower_unlink(path, missing_ok=False):
        monkeypatch.setattr(Path, "unlink", unlink)
        faster.start()
        while file.read_text() != "faster": time.sleep(0.001)
        unlink(path, missing_ok=missing_ok)
    monkeypatch.setattr(Path, "unlink", slower_unlink)
    take("slower")
    faster.join()
    assert "slower" in ends and "in use by another run" in ends[1 - ends.index("slower")] and file.read_text() == "slower"


def test_a_lock_of_another_machine_counts_while_it_is_touched(pipe_folder, begun, tmp_path):
    out = copied(begun, tmp_path)
    (out / "lock").write_text(json.dumps(dict(host="elsewhere", pid=1, began=0.)))
    with pytest.raises(RuntimeError, match="process 1 on elsewhere.*if it is dead, remove .*lock"): short(pipe_folder, out, 3, resume=True)
    os.utime(out / "lock", (time.time() - 3600,) * 2)
    assert len(short(pipe_folder, out, 3, resume=True).history) == 3


LAUNCH = """
import os, sys
from alignkit.ddpo import DDPOConfig, train
from accelerate.state import PartialState
out, epochs = sys.argv[1:]
cfg = DDPOConfig(num_epochs=int(epochs), samples_per_epoch=4, updates_per_epoch=1, num_inference_steps=2)
train("tiny", cfg=cfg, out=out, resume=True, callbacks=lambda run, row: print("LOCK", os.path.exists(out + "/lock")))
print("SHARED BY", PartialState().num_processes)
"""


@pytest.mark.parametrize("use_cpu", [True, False])
def test_a_launch_on_a_cpu_shares_the_run_or_is_refused(tmp_path, use_cpu):
    "Two processes of one launch hold one lock; where accelerate does not join them, WORLD_SIZE is named and no folder is made."
    (tmp_path / "two.py").write_text(LAUNCH)
    env = {k: v for k, v in os.environ.items() if k != "ACCELERATE_USE_CPU"} | ({"ACCELERATE_USE_CPU": "true"} if use_cpu else {})
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(tmp_path / "two.py")]
    done = subprocess.run([*command, str(tmp_path / "run"), "1"], env=env, capture_output=True, text=True, timeout=240)
    if not use_cpu:
        assert "WORLD_SIZE: the launcher started 2 processes" in done.stderr and not (tmp_path / "run").exists(), done.stderr[-2000:]
        return
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("SHARED BY 2") == 2 and done.stdout.count("LOCK True") == 2 and len(history(tmp_path / "run")) == 1
    assert not (tmp_path / "run/lock").exists()


# damaged files ----------------------------------------------------------------------------------------------------------------

def cut(file): file.write_bytes(file.read_bytes()[:file.stat().st_size // 2])
def emptied(file): file.write_bytes(b"")
def zeroed(file): file.write_bytes(bytes(file.stat().st_size))


@pytest.mark.parametrize("spoil", [cut, emptied, zeroed, Path.unlink], ids=["cut", "empty", "zeros", "missing"])
def test_a_damaged_checkpoint_falls_back_to_the_one_before(pipe_folder, unbroken, tmp_path, spoil):
    "Whichever file it is, it is named, and the run still ends as the unbroken one, bit for bit."
    files = sorted(p.name for p in (unbroken / "checkpoints/epoch_0003").iterdir())
    assert len(files) == 3
    for name in files:
        out = tmp_path / name
        shutil.copytree(unbroken, out)
        spoil(out / "checkpoints/epoch_0003" / name)
        with pytest.warns(UserWarning, match=f"epoch_0003/{name} is (damaged|missing).*going on from epoch_0002"):
            go(pipe_folder, out, reward=bright, resume=True)
        shutil.rmtree(out / "checkpoints/epoch_0003.damaged")  # put aside
        assert_same_run(out, unbroken)


def test_all_weights_fall_back_too(pipe_folder, tmp_path):
    how = dict(trainable="full", learning_rate=1e-4)
    short(pipe_folder, tmp_path / "run", **how)
    cut(tmp_path / "run/checkpoints/epoch_0001/diffusion_pytorch_model.safetensors")
    with pytest.warns(UserWarning, match="going on from epoch_0000"): short(pipe_folder, tmp_path / "run", resume=True, **how)
    short(pipe_folder, tmp_path / "alone", **how)
    assert bits(weights(tmp_path / "run/unet")) == bits(weights(tmp_path / "alone/unet"))


def test_without_a_whole_checkpoint_the_run_is_refused(pipe_folder, begun, tmp_path):
    out = copied(begun, tmp_path)
    for epoch in (0, 1): emptied(out / f"checkpoints/epoch_000{epoch}/optimizer.pt")
    before = (out / "history.csv").read_bytes()
    with pytest.raises(ValueError, match=r"no checkpoint of .* is whole: .*epoch_0001/optimizer.pt is damaged.*epoch_0000/optimizer.pt"):
        short(pipe_folder, out, 3, resume=True)
    assert (out / "history.csv").read_bytes() == before
    cut(out / "config.json")
    with pytest.raises(ValueError, match="config.json is damaged"): short(pipe_folder, out, 3, resume=True)


def test_a_lost_evaluation_of_the_base_is_made_again(pipe_folder, unbroken, tmp_path):
    "Of the untrained model, not of the one that was trained since."
    shutil.copytree(unbroken, tmp_path / "run")
    cut(tmp_path / "run/eval_base.json")
    go(pipe_folder, tmp_path / "run", reward=bright, resume=True)
    assert_same_run(tmp_path / "run", unbroken)


# callbacks and Ctrl-C ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("callbacks", [3, "note", [None], (lambda run, row: None, "note")])
def test_what_is_no_callback_is_refused_before_any_work(pipe_folder, tmp_path, callbacks):
    def never(images, prompts): raise AssertionError("work was done")
    with pytest.raises(TypeError, match="^callbacks: functions of"): short(pipe_folder, tmp_path / "run", reward=never, callbacks=callbacks)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("answer, epochs", [
    (None, 3), (17, 3), (1, 3), ("text", 3), (np.float32(1), 3), (torch.ones(2, dtype=torch.bool), 3), (False, 3), (np.False_, 3),
    (True, 1), (np.True_, 1), (torch.tensor(True), 1)])
def test_only_true_ends_a_run(pipe_folder, capsys, answer, epochs):
    "A bare function is accepted; a count, as file.write returns it, ends nothing; what ends the run is said, by name."
    def note(run, row): return answer
    run = short(pipe_folder, None, 3, callbacks=note)
    said = "stopped after epoch 0 by the callback note" if epochs == 1 else ""
    assert (len(run.history), run.stopped, capsys.readouterr().out.strip()) == (epochs, said, said)


@pytest.mark.parametrize("save_every", [1, 3])
def test_a_callback_that_raises_loses_no_epoch(pipe_folder, tmp_path, save_every):
    "Row, checkpoint and weights of its epoch are there; the error names it and how to go on; no picture is drawn twice."
    seen, out = [], tmp_path / "run"
    def upload(run, row):
        seen.append((len(history(out)), [p.name for p in sorted((out / "checkpoints").iterdir())]))
        if row["epoch"] == 1: raise ConnectionError("the tracker is away")
    with pytest.raises(RuntimeError, match=r"callbacks: upload raised ConnectionError after epoch 1: the tracker is away.*resume="):
        short(pipe_folder, out, 4, save_every=save_every, callbacks=upload)
    assert seen[1] == (2, ["epoch_0000", "epoch_0001"] if save_every == 1 else [])
    assert "pytorch_lora_weights.safetensors" in {p.name for p in (out / "checkpoints/epoch_0001").iterdir()}
    calls = []
    def counted(images, prompts):
        calls.append(1)
        return brightness(images, prompts)
    with pytest.warns(UserWarning, match="the code of the reward"):
        short(pipe_folder, out, 4, reward=Reward(counted, "brightness"), save_every=save_every, resume=True)
    assert len(calls) == 2
    short(pipe_folder, tmp_path / "alone", 4, save_every=save_every)
    assert bits(history(out)) == bits(history(tmp_path / "alone"))


def ctrl_c(run, row):
    if row["epoch"] == 1: raise KeyboardInterrupt


@pytest.fixture
def listening():
    "A process that was started in the background may ignore Ctrl-C."
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("method", METHODS)
def test_ctrl_c_without_a_folder_returns_the_run_so_far(pipe_folder, capsys, listening, method):
    "Also in the middle of an epoch, by the signal itself: the finished epochs, and a pipeline that is plain. (The first is asked twice.)"
    train, kind, name = METHODS[method]
    inner, calls = get_reward(name), []
    def reward(images, prompts):
        calls.append(1)
        if len(calls) == 4: os.kill(os.getpid(), signal.SIGINT)
        return inner(images, prompts)
    pipe, cfg = load(pipe_folder), kind(num_epochs=5, **FEW)
    run = train(pipe, Reward(reward, "mine", differentiable=inner.differentiable), PROMPTS, cfg)
    assert list(run.history.epoch) == [0, 1] and run.pipe is pipe and run.stopped == "interrupted in epoch 2"
    assert "interrupted in epoch 2: the run so far is returned, 2 finished epochs" in capsys.readouterr().out
    assert not any("forward" in m.__dict__ for m in pipe.unet.modules())


def test_ctrl_c_with_a_folder_says_how_to_go_on(pipe_folder, tmp_path):
    "It still stops a script; nothing finished is lost, even where no checkpoint was due, and the word goes on bit for bit."
    with pytest.raises(KeyboardInterrupt, match=r"interrupted in epoch 2; go on with resume='.*run'"):
        short(pipe_folder, tmp_path / "run", 4, save_every=4, callbacks=ctrl_c)
    assert not (tmp_path / "run/lock").exists() and (tmp_path / "run/checkpoints/epoch_0001").is_dir()
    assert RunFolder(tmp_path / "run").config()["num_epochs"] == 4
    ddpo.train(pipe_folder, bright, resume=tmp_path / "run")
    short(pipe_folder, tmp_path / "alone", 4, save_every=4)
    assert bits(history(tmp_path / "run")) == bits(history(tmp_path / "alone"))
