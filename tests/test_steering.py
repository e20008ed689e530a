"A rate that changes, an average of the weights, and what the memory plan makes of them: against diffusers' own and by hand."
import shutil
from dataclasses import replace
import pytest
import torch
from diffusers import DiffusionPipeline
from diffusers.optimization import get_scheduler
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_pre_hook
from torch.testing import assert_close
from alignkit import alignprop, ddpo, rwr
from alignkit.judges import evaluate_fixed, repeated
from alignkit.mdp import Drawing
from alignkit.memory import measured_peak, plan
from alignkit.pipelines import WEIGHTS, add_lora, load, open_model, save_lora
from alignkit.rewards import Reward, get_reward
from conftest import PROMPTS, assert_same_run, bits, brightness, go, history, told, updates_of, weights

red = Reward(brightness, "brightness", differentiable=True)
FEW = dict(num_epochs=1, samples_per_epoch=4, num_inference_steps=3, learning_rate=1e-2, fast="onednn")
METHODS = {"ddpo": (ddpo.train, ddpo.DDPOConfig, dict(updates_per_epoch=2, eta=1.)),
           "rwr": (rwr.train, rwr.RWRConfig, dict(updates_per_epoch=2)),
           "alignprop": (alignprop.train, alignprop.AlignPropConfig, dict(updates_per_epoch=2))}


def run_of(method, pipe, out=None, reward=red, prompts=PROMPTS, how={}, **changes):
    train, kind, own = METHODS[method]
    return train(pipe, reward, prompts, kind(**{**FEW, **own, **changes}), out, **how)


def opened(folder):
    pipe = DiffusionPipeline.from_pretrained(folder, **({} if "sdxl" in str(folder) else dict(safety_checker=None)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def filled(net, seed=0, size=0.1):
    "The same network, its factors random as if they had been trained."
    g = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        if "lora_" in name: p.data = size * torch.randn(p.shape, generator=g)
    return net


@pytest.fixture(scope="module")
def adapter(pipe_folder, tmp_path_factory):
    "A LoRA on disk."
    folder, pipe = tmp_path_factory.mktemp("adapter"), opened(pipe_folder)
    add_lora(pipe.unet, 3, lora_alpha=6.)
    save_lora(filled(pipe.unet, size=0.05), folder)
    return folder


def stop_at(epoch): return lambda run, row: row["epoch"] == epoch


SEEN = {}  # what a reward saw, by what asked


def watched(images, prompts):
    SEEN.setdefault("pictures", []).append((images.clone(), list(prompts)))
    return brightness(images, prompts)


# the rate -------------------------------------------------------------------------------------------------------------------------

def rates_of(fn):
    "The learning rate of every optimiser step that `fn()` makes."
    seen = []
    hook = register_optimizer_step_pre_hook(lambda optimizer, args, kwargs: seen.append(optimizer.param_groups[0]["lr"]))
    try: fn()
    finally: hook.remove()
    return seen


@pytest.mark.parametrize("method, name, total", [
    ("ddpo", "linear", 8), ("rwr", "cosine", 8), ("alignprop", "polynomial", 4), ("ddpo", "constant_with_warmup", 8)])
def test_rates_are_those_of_diffusers(pipe_folder, method, name, total):
    "Every step of every method, against diffusers' scheduler stepped beside an optimiser; the history has the rate of an epoch's last."
    twice, runs = dict(num_inner_epochs=2) if method != "alignprop" else {}, []
    seen = rates_of(lambda: runs.append(run_of(method, pipe_folder, num_epochs=2, lr_schedule=name, lr_warmup_steps=2, **twice)))
    beside = torch.optim.AdamW([torch.zeros(1, requires_grad=True)], 1e-2)
    theirs, wanted = get_scheduler(name, beside, num_warmup_steps=2, num_training_steps=total), []
    for _ in range(total):
        wanted.append(beside.param_groups[0]["lr"])
        beside.step()
        theirs.step()
    assert seen == wanted and runs[0].history.lr.tolist() == [wanted[total // 2 - 1], wanted[-1]]


def test_a_rate_that_falls_is_taken_up_where_it_was(pipe_folder, tmp_path):
    "Stopped and resumed it is the unbroken run. A longer run has another rate from there on, and says so; a constant one does not."
    falls = dict(lr_schedule="linear", lr_warmup_steps=1)
    go(pipe_folder, tmp_path / "whole", **falls)
    go(pipe_folder, tmp_path / "cut", callbacks=stop_at(1), **falls)
    go(pipe_folder, tmp_path / "cut", resume=True, **falls)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    def longer(): go(pipe_folder, tmp_path / "cut", resume=True, num_epochs=5, **falls)
    assert "goes by the whole run: from here on the rate is that of a run of 5 epochs" in told(longer, "num_epochs was 4, now 5")[0]
    assert [row["lr"] for row in history(tmp_path / "cut")][3:] == [1e-2 * (8 - 7) / 7, pytest.approx(1e-2 * (10 - 9) / 9)]
    go(pipe_folder, tmp_path / "flat", num_epochs=1)
    assert not told(lambda: go(pipe_folder, tmp_path / "flat", resume=True, num_epochs=2), "num_epochs")


# the average ----------------------------------------------------------------------------------------------------------------------

def average_of(updates, start, decay):
    "diffusers' rule, by hand: the first update replaces, then decay (1 + n) / (10 + n), at most the setting's."
    average = start.clone()
    for n, w in enumerate(updates):
        d = min((1 + n) / (10 + n), decay) if n else 0.
        average = d * average + (1 - d) * w
    return average


def flat(net): return torch.cat([p.detach().flatten() for n, p in net.named_parameters() if "lora_" in n])


@pytest.mark.parametrize("method", METHODS)
def test_the_average_is_evaluated_and_saved(pipe_folder, tmp_path, method):
    "lora/, the pipeline after the run and the evaluations have the average, the policy and the checkpoint the trained weights."
    runs, how = [], dict(num_epochs=3, ema_decay=0.5, eval_every=1, eval_samples=2, eval_prompts=("a cow",))
    updates = updates_of(lambda: runs.append(run_of(method, pipe_folder, tmp_path / "run", **how)))
    plain = updates_of(lambda: run_of(method, pipe_folder, **{**how, "ema_decay": None}))
    assert torch.equal(updates, plain)  # it looks, and changes nothing
    start = flat(load_of(pipe_folder))
    average = average_of(updates, start, 0.5)
    assert (average - updates[-1]).abs().max() > 1e-4
    assert_close(flat(runs[0].net), average, rtol=0, atol=1e-6)
    newest = tmp_path / "run" / "checkpoints" / "epoch_0002"
    assert bits(in_order(newest / WEIGHTS, runs[0].net)) == bits(updates[-1])
    assert bits(in_order(tmp_path / "run" / "lora" / WEIGHTS, runs[0].net)) == bits(flat(runs[0].net)) == bits(
        in_order(newest / "average.safetensors", runs[0].net))
    stock = opened(pipe_folder)
    stock.load_lora_weights(tmp_path / "run" / "lora")
    cfg = runs[0].config
    how = Drawing(purpose="eval", num_inference_steps=3, eta=cfg["eta"])
    found, _ = evaluate_fixed(open_model(stock), get_reward(red), repeated(["a cow"], 2), how)
    assert abs(found["eval_reward_mean"] - runs[0].history.eval_reward_mean.iloc[-1]) < 1e-6


def load_of(pipe_folder):
    "A network with the adapter that a run of seed 0 begins with."
    net = load(pipe_folder).unet
    add_lora(net)
    return net


def in_order(file, net):
    "The factors of a file, one after the other as the network has them."
    saved = {k.removeprefix("unet.").replace(".default", ""): v for k, v in load_file(file).items()}
    return torch.cat([saved[n.replace(".default", "")].flatten() for n, _ in net.named_parameters() if "lora_" in n])


JUDGED = dict(early_stop="brightness", early_stop_drop=9., eval_rewards=(Reward(brightness, "brightness"),))


@pytest.mark.parametrize("changes", [JUDGED, dict(trainable="full", learning_rate=1e-4)], ids=["lora", "full"])
def test_a_run_with_an_average_resumes(pipe_folder, tmp_path, changes):
    "Bit for bit, with adapters and with all weights; the best adapter is the one that was evaluated; a checkpoint without it is damaged."
    how = dict(ema_decay=0.9, **changes)
    whole = go(pipe_folder, tmp_path / "whole", **how)
    go(pipe_folder, tmp_path / "cut", callbacks=stop_at(1), **how)
    shutil.copytree(tmp_path / "cut", tmp_path / "torn")
    go(pipe_folder, tmp_path / "cut", resume=True, **how)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")
    last = [tmp_path / name / "checkpoints" / "epoch_0003" / "average.safetensors" for name in ("whole", "cut")]
    assert bits(load_file(last[0])) == bits(load_file(last[1]))
    (tmp_path / "torn" / "checkpoints" / "epoch_0001" / "average.safetensors").unlink()
    with pytest.warns(UserWarning, match="average.safetensors is missing"): go(pipe_folder, tmp_path / "torn", resume=True, **how)
    assert bits(weights(tmp_path / "torn/checkpoints/epoch_0003")) == bits(weights(tmp_path / "whole/checkpoints/epoch_0003"))
    with pytest.raises(ValueError, match="ema_decay was 0.9, now None"): go(pipe_folder, tmp_path / "cut", resume=True, **changes)
    if "trainable" in changes: return
    stock = opened(pipe_folder)
    stock.load_lora_weights(tmp_path / "whole" / "lora_best")
    found, _ = evaluate_fixed(open_model(stock), red, repeated(["a cow"], 3), Drawing(purpose="eval", num_inference_steps=4))
    assert abs(found["eval_reward_mean"] - whole.history.eval_reward_mean[whole.best_epoch]) < 1e-6


def test_an_interrupted_run_has_the_average_too(pipe_folder):
    def interrupted(run, row):
        if row["epoch"] == 1: raise KeyboardInterrupt
    runs = []
    updates = updates_of(lambda: runs.append(go(pipe_folder, callbacks=interrupted, ema_decay=0.5, eval_every=0)))
    assert "interrupted" in runs[0].stopped
    assert_close(flat(runs[0].net), average_of(updates, flat(load_of(pipe_folder)), 0.5), rtol=0, atol=1e-6)


# memory ---------------------------------------------------------------------------------------------------------------------------

def test_what_steers_is_in_the_plan(adapter):
    "An average is a copy of what is trained, a pattern another adapter; a penalty is one more forward, against the allocator."
    few = dict(num_epochs=1, samples_per_epoch=8, updates_per_epoch=1, num_inference_steps=4)
    cfg = ddpo.DDPOConfig(micro_batch_size=32, guidance_scale=3., **few)
    def parts(**changes): return plan("tiny", replace(cfg, **changes)).phases
    before, average = parts(), parts(ema_decay=0.9)
    assert (average.loc["average of weights"] == before.loc["adapter"]).all() and (before.loc["average of weights"] == 0).all()
    assert (average.sum() - before.sum() == before.loc["adapter"]).all()
    net = load("tiny").unet
    wanted = 4 * sum(p.numel() for p in add_lora(net, rank_pattern={"to_q": 1, "to_k": 16}))
    save_lora(net, adapter / "tiny")
    assert parts(init_lora=str(adapter / "tiny")).loc["adapter"].iloc[0] == wanted
    pipe = load("tiny")
    for part in (pipe.unet, pipe.vae): part.to(memory_format=torch.channels_last)
    heavy = replace(cfg, kl_weight=1., ema_decay=0.9)
    planned = plan(pipe, heavy).phases.drop(["network weights", "VAE weights", "text encoder weights"]).sum().max()
    measured = measured_peak(lambda: ddpo.train(pipe, red, "simple_animals", heavy))
    print(f"\n{planned / 1e6:.1f} MB planned, {measured / 1e6:.1f} MB measured")
    assert abs(planned / measured - 1) < 0.1
