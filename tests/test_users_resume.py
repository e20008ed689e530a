"What users of such kits do to a run that should go on: other weights, two processes, torn files, callbacks, Ctrl-C."
import hashlib, json, multiprocessing, os, shutil, signal, subprocess, sys, time
from pathlib import Path
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from alignkit import alignprop, ddpo, rwr
from alignkit.pipelines import load
from alignkit.rewards import Reward, get_reward
from alignkit.runs import RunFolder, holder
from conftest import PROMPTS, assert_same_run, bits, brightness, go, history, in_child, small, weights

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
    from alignkit.training import _sources
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
    def drawn(generator): return PROMPTS[int(torch.randint(2, (), generator=generator))]
    one = ddpo.DDPOConfig(num_epochs=1, **FEW)
    ddpo.train(pipe_folder, prompts=drawn, cfg=one, out=tmp_path / "called")
    with pytest.raises(ValueError, match="^prompts: .*'drawn'.* give them again"): ddpo.train(resume=tmp_path / "called")
    with pytest.raises(ValueError, match="other settings than a RWRConfig: method: 'rwr', got 'ddpo_is'"): rwr.train(resume=tmp_path / "called")


def test_defaults_are_defaults_where_nothing_goes_on(tmp_path, monkeypatch):
    "resume=True with an empty folder, and no folder: what the signature says."
    seen = []
    class Enough(Exception): pass
    def look(model, *args, **how):
        seen.append(model)
        raise Enough
    import alignkit.training as training
    monkeypatch.setattr(training, "get_sampler", look)
    monkeypatch.setattr(training, "_config", lambda cfg, pipe, reward, prompts, *rest: seen.append((cfg, pipe, reward.name, prompts.name)) or {})
    for how in ({}, dict(out=tmp_path / "new", resume=True)):
        with pytest.raises(Enough): ddpo.train(**how)
        assert seen[-2] == (ddpo.DDPOConfig(), "tiny", "jpeg_compressibility", "simple_animals")


def test_other_settings_from_an_epoch_on(pipe_folder, begun, tmp_path):
    "override: the optimiser takes them too, its moments stay; config.json says from which epoch. By hand: the checkpoint's state in a plain AdamW."
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
