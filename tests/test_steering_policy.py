"Negative prompts, groups, a KL from the base model: against plain diffusers, pandas and torch.distributions."
import json, shutil, warnings
import numpy as np
import pandas as pd
import pytest
import test_families, test_steering
import torch
from torch.distributions import Normal, kl_divergence
from torch.testing import assert_close
from safetensors.torch import load_file
from alignkit import ddpo
from alignkit.evaluate import evaluate
from alignkit.logprob import kl_step
from alignkit.mdp import Drawing, draw, get_sampler, policy, rollout, sample_noise
from alignkit.pipelines import WEIGHTS, adapter_off, load, open_model
from alignkit.prompts import get_prompts
from alignkit.rewards import Reward
from conftest import PROMPTS, assert_same_run, brightness, go, history, on_two, small, told, updates_of
from test_steering import METHODS, SEEN, opened, red, run_of, watched

adapter, sdxl_folder = test_steering.adapter, test_families.sdxl_folder  # fixtures


# negative prompts -----------------------------------------------------------------------------------------------------------------

def test_a_negative_prompt_is_that_of_plain_diffusers(pipe_folder, tmp_path):
    "The pictures of training and of evaluations, at eta 0; and DDPO's training path gives what sampling gave: the ratio starts at 1."
    looks = dict(eval_every=1, eval_samples=2, eval_prompts=("a cow",))
    plain, how = opened(pipe_folder), dict(guidance_scale=2., negative_prompt="a red dog", updates_per_epoch=1, **looks)
    for method in ("rwr", "alignprop"):
        SEEN.clear()
        run_of(method, pipe_folder, reward=Reward(watched, "watched", differentiable=True), eta=0., eval_guidance_scale=4., **how)
        base, first = SEEN["pictures"][0], next(s for s in SEEN["pictures"] if len(s[0]) == 4)
        for (images, prompts), purpose, scale in ((base, "eval", 4.), (first, "rollout", 2.)):
            start = sample_noise(0, purpose, 0, range(len(images)), (4, 4, 8, 8))[:, 0]
            asked = dict(latents=start, num_inference_steps=3, guidance_scale=scale, eta=0., output_type="pt")
            theirs = plain(prompts, negative_prompt=["a red dog"] * len(images), **asked).images
            assert_close(images.detach(), theirs, rtol=0, atol=1e-5)
            assert (plain(prompts, **asked).images - theirs).abs().max() > 1e-4
    run = run_of("ddpo", pipe_folder, tmp_path / "run", **how)
    assert run.history.approx_kl.item() < 1e-12
    again = evaluate(tmp_path / "run", ["a cow"], [red], num_samples=2, pipe=pipe_folder, diversity=False)
    how = Drawing(purpose="final", num_inference_steps=3, guidance_scale=2., negative_prompt="a red dog")
    found = brightness(draw(pipe_folder, ["a cow"] * 2, how), None).mean().item()
    assert abs(again[(again.subject == "base") & (again.measure == "brightness")]["mean"].item() - found) < 1e-6


def test_a_negative_prompt_of_sdxl(sdxl_folder):
    "Its pooled embedding too; and '' is a prompt of its own there, where none is a row of zeros."
    plain, start = opened(sdxl_folder), sample_noise(0, "draw", 0, range(2), (4, 4, 8, 8))[:, 0]
    for negative in ("a red dog", "", None):
        how = dict(num_inference_steps=3, guidance_scale=3., eta=0., height=32, width=32)
        away = None if negative is None else [negative] * 2
        theirs = plain(PROMPTS, negative_prompt=away, latents=start, output_type="pt", **how).images
        ours = draw(load(sdxl_folder), PROMPTS, negative_prompt=negative, **how)
        assert_close(ours, theirs, rtol=0, atol=1e-5)


@pytest.mark.parametrize("changes, words", [
    (dict(), "negative_prompt: guidance leads away from it, and guidance_scale=1 has none"),
    (dict(guidance_scale=2., eval_guidance_scale=1.), "eval_guidance_scale: 1 draws without guidance")])
def test_a_negative_prompt_needs_guidance(pipe_folder, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words): go(pipe_folder, tmp_path / "run", negative_prompt="blurry", **changes)
    assert not (tmp_path / "run").exists()


def test_a_network_that_guides_itself_is_told_no_negative_prompt(pipe_folder, tmp_path):
    from diffusers import UNet2DConditionModel
    pipe = opened(pipe_folder)
    pipe.register_modules(unet=UNet2DConditionModel.from_config({**pipe.unet.config, "time_cond_proj_dim": 16}))
    with pytest.raises(ValueError, match="negative_prompt: this network guides itself"):
        go(pipe, tmp_path / "run", negative_prompt="blurry", guidance_scale=2.)
    assert not (tmp_path / "run").exists()


# groups ---------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", METHODS)
def test_pictures_in_a_row_share_a_prompt(pipe_folder, method):
    "The prompt of picture i is that of (seed, epoch, i // k), whatever is drawn at a time."
    asked, many = [], [f"a {word}" for word in "cat dog fox bee ant owl hen cow".split()]
    def heard(images, prompts):
        asked.append(list(prompts))
        return brightness(images, prompts)
    how = dict(samples_per_epoch=12, sample_batch_size=5, micro_batch_size=6, pictures_per_prompt=3, num_epochs=2, seed=3)
    run_of(method, pipe_folder, reward=Reward(heard, "heard", differentiable=True), prompts=many, **how)
    cfg = ddpo.DDPOConfig(samples_per_epoch=12, updates_per_epoch=2, seed=3)
    order = [sum(ddpo.update_groups(cfg, epoch), []) if method == "ddpo" else range(12) for epoch in (0, 1)]  # in which DDPO draws
    wanted = [get_prompts(many).sample(3, epoch, i // 3) for epoch in (0, 1) for i in order[epoch]]
    calls = iter(p for batch in asked for p in batch)
    assert all(any(p == q for q in calls) for p in wanted) and len({*wanted}) > 3  # in order; some are asked again by themselves


def test_advantages_of_groups(pipe_folder):
    "Against pandas, prompt by prompt; alone, or among equals, a picture teaches nothing."
    g = torch.Generator().manual_seed(0)
    prompts = ["a", "b", "c", "a", "b", "a", "d", "d"]
    rewards = torch.randn(8, generator=g, dtype=torch.float64)
    rewards[6:] = 0.1
    A = ddpo.per_group(None).advantages(prompts, rewards)
    t = pd.DataFrame(dict(prompt=prompts, r=rewards.numpy())).groupby("prompt").r
    wanted = (rewards.numpy() - t.transform("mean")) / (t.transform(lambda r: r.std(ddof=0)) + 1e-6)
    np.testing.assert_allclose(A.numpy(), wanted.to_numpy(), rtol=1e-6, atol=1e-7)
    assert A[2] == 0 and not A[6:].any() and A.dtype == torch.float32
    run = go(pipe_folder, num_epochs=2, advantages="group", pictures_per_prompt=4, eval_every=0)
    assert (run.history.grad_norm > 0).all()
    seed = next(s for s in range(9) if len({get_prompts(PROMPTS).sample(s, 0, i) for i in range(2)}) == 2)
    def alone(): go(pipe_folder, num_epochs=1, advantages="group", eval_every=0, samples_per_epoch=2, updates_per_epoch=1, seed=seed)
    assert "there is one only" in told(alone, "nothing can be learned")[0]
    with pytest.raises(ValueError, match="must divide samples_per_epoch=8, got 3"): small(pictures_per_prompt=3).check()


# the penalty ----------------------------------------------------------------------------------------------------------------------

def test_kl_step_is_that_of_torch():
    g = torch.Generator().manual_seed(0)
    ours, base, std = torch.randn(3, 2, 5, 5, generator=g), torch.randn(3, 2, 5, 5, generator=g), torch.rand(3, 1, 1, 1, generator=g) + 0.1
    exact = kl_divergence(Normal(ours, std), Normal(base, std))
    for reduction in ("mean", "sum"): assert_close(kl_step(ours, base, std, reduction), getattr(exact.flatten(1), reduction)(1))
    assert kl_step(ours.bfloat16(), base.bfloat16(), std).dtype == torch.float32
    leaves = [m.clone().requires_grad_() for m in (ours, base)]
    kl_step(*leaves, std, "sum").sum().backward()
    assert_close(leaves[0].grad, (ours - base) / std**2)
    assert leaves[1].grad is None  # of the base's side nothing comes back


def walked(pipe_folder, adapter, cfg):
    "The network with the adapter, by plain diffusers, and every pair that a run's first epoch draws."
    pipe = opened(pipe_folder)
    pipe.load_lora_weights(adapter)
    model, n = open_model(pipe), cfg.samples_per_epoch
    cond = model.encode([get_prompts(PROMPTS).sample(cfg.seed, 0, i) for i in range(n)])
    step = policy(model, model.net, get_sampler(model, cfg.num_inference_steps), cond, model.encode([None]), cfg.guidance_scale)
    noise = sample_noise(cfg.seed, "rollout", 0, range(n), (cfg.num_inference_steps + 1, *model.latent_shape))
    return model, step, rollout(step, noise).latents.clone()


def mean_kl(model, step, latents):
    "The mean over pairs and elements of torch's own divergence, with its graph."
    found = []
    for i in range(latents.shape[1] - 1):
        with torch.no_grad(), adapter_off(model.net): base = Normal(*step(i, latents[:, i]))
        found.append(kl_divergence(Normal(*step(i, latents[:, i])), base).mean())
    return torch.stack(found).mean()


@pytest.mark.parametrize("method", ["ddpo_is", "ddpo_sf"])
@pytest.mark.parametrize("reduction", ["mean", "sum"])
def test_the_penalty_and_its_gradient(pipe_folder, adapter, method, reduction):
    "A reward that is always the same leaves the penalty alone: its size and its gradient, against autograd of torch.distributions."
    cfg = small(num_epochs=1, updates_per_epoch=1, eval_every=0, method=method, guidance_scale=2., kl_weight=3., init_lora=str(adapter),
                log_prob_reduction=reduction)
    def flatly(images, prompts): return torch.full((len(images),), 0.5)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # nothing can be learned from it
        h = ddpo.train(pipe_folder, flatly, PROMPTS, cfg).history
    model, step, latents = walked(pipe_folder, adapter, cfg)
    params = [p.requires_grad_() for n, p in model.net.named_parameters() if "lora_" in n]
    kl = mean_kl(model, step, latents) * (latents[0, 0].numel() if reduction == "sum" else 1)
    norm = torch.cat([g.flatten() for g in torch.autograd.grad(3. * kl, params)]).norm().item()
    assert h.kl_base.item() == pytest.approx(kl.item(), rel=1e-3) and h.loss.item() == pytest.approx(3 * kl.item(), rel=1e-3)
    assert h.grad_norm.item() == pytest.approx(norm, rel=1e-3) and norm > 0


def test_a_heavy_penalty_keeps_the_policy_near(pipe_folder, tmp_path):
    "The drift of evaluations, without and with it."
    how = dict(eval_kl=True, num_epochs=5, eval_every=5)
    free, held = (go(pipe_folder, tmp_path / str(w), kl_weight=w, **how).history.eval_kl.iloc[-1] for w in (0., 1e3))
    assert held < 0.1 * free
    assert "kl_base" in history(tmp_path / "1000.0")[0] and "kl_base" not in history(tmp_path / "0.0")[0]


def test_no_penalty_costs_nothing(pipe_folder, monkeypatch):
    "Calls of the network, counted: one more a micro-batch with a penalty, none without; and a base model is needed."
    def calls(**changes):
        pipe, count = load(pipe_folder), []
        pipe.unet.register_forward_pre_hook(lambda *args: count.append(torch.is_grad_enabled()))
        go(pipe, num_epochs=1, eval_every=0, fast="off", **changes)
        return len(count), sum(count)
    without, withal = calls(), calls(kl_weight=1.)
    assert withal[1] == without[1] and withal[0] == without[0] + without[1]  # as many as there are with a graph
    with pytest.raises(ValueError, match="kl_weight: the base model is the one"): small(kl_weight=1., trainable="full").check()


def test_two_processes_steer_as_one(pipe_folder, adapter, tmp_path):
    how = dict(adam_epsilon=1e-3, num_epochs=2, eval_every=2, kl_weight=0.1, ema_decay=0.5, lr_schedule="linear", init_lora=str(adapter),
               pictures_per_prompt=2, advantages="group", guidance_scale=2., negative_prompt="a red dog")
    ranks = on_two(lambda: updates_of(lambda: go(pipe_folder, tmp_path / "run", **how)), tmp_path)
    assert torch.equal(ranks[0], ranks[1])
    one = updates_of(lambda: go(pipe_folder, tmp_path / "one", **how))
    moved = (one[-1] - one[0]).abs().max()
    assert_close(ranks[0], one, rtol=0, atol=1e-3 * moved.item())
    for a, b in zip(history(tmp_path / "run"), history(tmp_path / "one")):
        for k in ("lr", "kl_base", "reward_mean"): assert a[k] == pytest.approx(b[k], rel=1e-3), k
    a, b = (load_file(tmp_path / name / "lora" / WEIGHTS) for name in ("run", "one"))
    for k in a: assert_close(a[k], b[k], rtol=0, atol=1e-3 * moved.item())


# what a prompt says besides -------------------------------------------------------------------------------------------------------

def test_metadata_reaches_every_judge(pipe_folder, tmp_path):
    "Training, a sum, a second reward in evaluations, and the final evaluation: each gets the row of its prompt."
    rows = [dict(prompt="a cat", wanted=0.25), dict(prompt="a dog", wanted=0.75)]
    pd.DataFrame(rows).to_csv(tmp_path / "table.csv", index=False)
    heard = []
    def near(images, prompts, metadata):
        assert [m["wanted"] for m in metadata] == [{"a cat": 0.25, "a dog": 0.75}[p] for p in prompts]
        heard.append(len(images))
        return -(brightness(images, prompts) - torch.tensor([m["wanted"] for m in metadata])).abs()
    judge, table = Reward(near, "near", differentiable=True), tmp_path / "table.csv"
    for method in METHODS:
        heard.clear()
        looks = dict(eval_every=1, eval_samples=3, eval_rewards=(judge,))
        run = run_of(method, pipe_folder, reward=0.5 * judge + red, prompts=table, pictures_per_prompt=2, **looks)
        assert "eval_near_mean" in run.history and heard.count(3) >= 4 and sum(heard) >= 4 + 2 * 2 * 3
    found = evaluate(run, table, [judge], num_samples=4, diversity=False, pipe=pipe_folder)
    pictures = draw(pipe_folder, ["a cat", "a dog"] * 2, Drawing(purpose="final", num_inference_steps=3, eta=0.))
    by_hand = -(brightness(pictures, None) - torch.tensor([0.25, 0.75] * 2)).abs().mean().item()
    assert found[(found.subject == "base") & (found.measure == "near")]["mean"].item() == pytest.approx(by_hand, abs=1e-6)


# older records --------------------------------------------------------------------------------------------------------------------

def test_a_record_without_these_settings_goes_on(pipe_folder, tmp_path):
    "They stand for their defaults; another value is refused, or recorded as a change where it may be overridden."
    from alignkit.training import SizeConfig, SteerConfig
    new = [k for k in (*SteerConfig.__dataclass_fields__, "kl_weight") if k not in SizeConfig.__dataclass_fields__]
    assert len(new) == 9
    go(pipe_folder, tmp_path / "run", num_epochs=2)
    file = tmp_path / "run" / "config.json"
    record = json.loads(file.read_text())
    for k in new: del record["config"][k]
    file.write_text(json.dumps(record))
    shutil.copytree(tmp_path / "run", tmp_path / "other")
    go(pipe_folder, tmp_path / "run", resume=True)
    go(pipe_folder, tmp_path / "whole")
    assert_same_run(tmp_path / "run", tmp_path / "whole")
    with pytest.raises(ValueError, match="pictures_per_prompt was 1, now 2"):
        go(pipe_folder, tmp_path / "other", resume=True, pictures_per_prompt=2)
    with pytest.raises(ValueError, match="with ema_decay=None and fits no other, got 0.9"):
        ddpo.train(pipe_folder, brightness, PROMPTS, resume=tmp_path / "other", override=dict(ema_decay=0.9))
    changed = ddpo.train(pipe_folder, brightness, PROMPTS, resume=tmp_path / "other", override=dict(kl_weight=1., num_epochs=3))
    assert changed.folder.record()["changes"][-1]["settings"]["num_epochs"] == [2, 3]
    assert changed.history.kl_base.notna().tolist() == [False, False, True]
