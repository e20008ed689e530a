"Reward-weighted regression end to end, on a pipeline with random weights: the numerics contract holds as it does for DDPO."
import os, signal
from dataclasses import replace
from unittest.mock import patch
import numpy as np
import pytest
import torch
from torch.testing import assert_close
from alignkit import rwr, start, training
from alignkit.memory import fit, plan
from alignkit.pipelines import Cond, load, open_model
from alignkit.rewards import Reward, RewardError
from alignkit.rwr import PRESETS, RWRConfig, denoising_loss, preset, regression_draws, rwr_weights, sparse_weights, train, update_groups
from conftest import PROMPTS, assert_same_run, bits, brightness, history, in_child, on_two, updates_of, weights

named = Reward(brightness, "brightness")


def small(**changes):
    "Four epochs of eight pictures, two passes of two updates, with ragged batches and evaluations."
    few = dict(num_epochs=4, samples_per_epoch=8, sample_batch_size=5, updates_per_epoch=2, num_inner_epochs=2, micro_batch_size=3,
               beta=50., num_inference_steps=4, eval_every=2, eval_samples=3, eval_prompts=("a cow",), learning_rate=1e-2, fast="onednn")
    return RWRConfig(**{**few, **changes})


def go(pipe_folder, out=None, reward=named, resume=False, callbacks=(), **changes):
    return train(pipe=pipe_folder, reward=reward, prompts=PROMPTS, cfg=small(**changes), out=out, resume=resume, callbacks=callbacks)


# Adam divides a gradient by its own size; with an epsilon far above rounding the update is as smooth as the gradient
SMOOTH = dict(adam_epsilon=1e-2, num_epochs=2, eval_every=0)
KINDS = {"softmax": dict(), "per prompt": dict(per_prompt=True), "guided": dict(guidance_scale=3.),
         "sparse": dict(weights="sparse", share=0.5),
         "one kept": dict(weights="sparse", share=0.05, updates_per_epoch=4)}  # one picture a round: a second process has none


# weights -----------------------------------------------------------------------------------------------------------------------

def reference_weights(labels, temperature, prompts=None):
    "The JAX code's formula, written out: a shifted softmax of labels * temperature, times the number of labels."
    def softmax(x):
        z = np.exp(x * temperature - (x * temperature).max())
        return z / z.sum()
    if prompts is None: return softmax(labels) * len(labels)
    w = np.empty_like(labels)
    for p in np.unique(prompts): w[prompts == p] = softmax(labels[prompts == p]) * (prompts == p).sum()
    return w


@pytest.mark.parametrize("beta", [0., 0.2, 3., 500.])
def test_softmax_weights(beta):
    "Over the dataset and within prompts, as the reference; mean 1; a shift of the rewards is nothing; the best pictures weigh most."
    rng = np.random.default_rng(0)
    r, prompts = rng.normal(-50, 7, 40), rng.choice(["a", "b", "c"], 40)
    for p in (None, prompts):
        w = rwr_weights(torch.tensor(r), beta, p if p is None else p.tolist())
        assert w.dtype == torch.float32 and w.shape == (40,)
        assert_close(w.double().numpy(), reference_weights(r, beta, p), rtol=1e-5, atol=1e-30)
        assert_close(w.mean().item(), 1., rtol=1e-5, atol=0)
        assert_close(rwr_weights(torch.tensor(r) + 1e3, beta, p if p is None else p.tolist()), w, rtol=1e-4, atol=1e-30)
    assert beta == 0 or rwr_weights(torch.tensor(r), beta).argmax() == r.argmax()
    assert (rwr_weights(torch.full((64,), 0.1), 3.) == 1).all()


@pytest.mark.parametrize("share", [0.01, 0.1, 0.25, 1 / 3, 0.5, 0.9, 1.])
def test_sparse_weights(share):
    "What reaches numpy's percentile, within a prompt too; never none; ties with the last one kept are kept."
    rng = np.random.default_rng(0)
    for n in (1, 2, 5, 11, 64, 1000):
        for r in (rng.normal(size=n), rng.integers(0, 4, n).astype(float)):
            kept = sparse_weights(torch.tensor(r), share)
            at_least = lambda x: x >= np.percentile(x, 100 * (1 - share)) - 1e-9
            assert_close(kept.numpy() == 1, at_least(r))
            prompts = rng.choice(["a", "b"], n)
            within = sparse_weights(torch.tensor(r), share, prompts.tolist()).numpy()
            for p in np.unique(prompts): assert_close(within[prompts == p] == 1, at_least(r[prompts == p]))
    assert sparse_weights(torch.randn(10240), 0.1).sum() == 1024  # the paper's numbers
    assert sparse_weights(torch.full((7,), 0.1), 0.3).all()


@pytest.mark.parametrize("call, words", [
    (lambda: sparse_weights(torch.randn(4), 0.), "share to keep, in .0, 1., got 0.0"),
    (lambda: sparse_weights(torch.randn(4), 1.5), "in .0, 1., got 1.5"),
    (lambda: sparse_weights(torch.randn(4), float("nan")), "got nan"),
    (lambda: rwr_weights(torch.randn(4), -1.), "beta.*got -1"),
    (lambda: rwr_weights(torch.randn(4), float("inf")), "beta.*got inf"),
    (lambda: rwr_weights(torch.randn(4, 1), 1.), r"rewards.*\(4, 1\)"),
    (lambda: rwr_weights(torch.tensor([0., float("nan")]), 1.), "finite, got nan"),
    (lambda: rwr_weights(torch.randn(4), 1., ["cat"]), "one per reward, got 1"),
    (lambda: sparse_weights([], 0.1), "rewards"),
])
def test_bad_weights(call, words):
    with pytest.raises(ValueError, match=words): call()


# loss --------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("guidance_scale", [1., 5.])
@pytest.mark.parametrize("kind", ["epsilon", "v_prediction", "sample"])
def test_the_loss_is_the_definition(pipe_folder, kind, guidance_scale):
    "Picture by picture, from two plain UNet calls; the gradient reaches both branches of guidance."
    pipe = load(pipe_folder)
    pipe.scheduler.register_to_config(prediction_type=kind)
    model = open_model(pipe)
    cond, empty = model.encode(PROMPTS), model.encode([None])
    x0, noise = torch.randn(2, 2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    t, w = torch.tensor([0, 700]), torch.tensor([0.3, 2.])
    p = pipe.unet.conv_out.weight.requires_grad_(True)
    loss = denoising_loss(model, model.net, x0, t, noise, cond, w, empty, guidance_scale)
    expected = []
    for b in range(2):
        ab = pipe.scheduler.alphas_cumprod[t[b]]
        noisy = ab**0.5 * x0[b:b+1] + (1 - ab)**0.5 * noise[b:b+1]
        text, uncond = (pipe.unet(noisy, t[b], e["text"]).sample for e in (cond[b:b+1], empty))
        target = dict(epsilon=noise[b], sample=x0[b], v_prediction=ab**0.5 * noise[b] - (1 - ab)**0.5 * x0[b])[kind]
        expected.append(w[b] * ((uncond + guidance_scale * (text - uncond) - target)**2).mean())
    assert loss.shape == (2,)
    assert_close(loss, torch.stack(expected), rtol=1e-4, atol=1e-5)
    grads = [torch.autograd.grad(l, p)[0] for l in (loss.sum(), sum(expected))]
    assert_close(grads[0], grads[1], rtol=0, atol=1e-4 * grads[1].abs().max().item())


def test_half_precision_keeps_targets_and_loss_in_float32(pipe_folder):
    "The network sees half precision; what it is held against does not."
    seen = {}
    def predict(net, x, t, cond):
        seen["x"] = x
        return torch.zeros_like(x)
    model = replace(open_model(pipe_folder), predict=predict)
    x0, noise = torch.randn(2, 2, 4, 8, 8)
    t, cond = torch.tensor([3, 900]), Cond(text=torch.zeros(2, 3, 5))
    loss = denoising_loss(model, None, x0, t, noise, cond, dtype=torch.bfloat16)
    assert seen["x"].dtype == torch.bfloat16 and loss.dtype == torch.float32
    assert_close(loss, noise.square().flatten(1).mean(1))


def test_draws_belong_to_pictures():
    "Timesteps are uniform; a picture's draw does not depend on its batch, and is another in each pass, epoch and seed."
    t, noise = regression_draws(list(range(4000)), (1, 2, 2), 1000, 0, 1, 2)
    assert t.min() < 10 and t.max() > 989 and abs(t.float().mean() - 499.5) < 5 * 1000 / 12**0.5 / 4000**0.5
    assert abs(noise.mean()) < 5 / 16000**0.5 and abs(noise.var() - 1) < 5 * (2 / 16000)**0.5
    one = regression_draws([7], (1, 2, 2), 1000, 0, 1, 2)
    assert torch.equal(one[0], t[7:8]) and torch.equal(one[1], noise[7:8])
    others = [regression_draws([7], (1, 2, 2), 1000, *k)[1] for k in ((1, 1, 2), (0, 2, 2), (0, 1, 3), (0, 1, 0))]
    assert not any(torch.equal(o, one[1]) for o in others)


def test_groups():
    "Every kept picture once a pass, updates of nearly equal size, none empty, another order in another pass."
    for kept in (list(range(8)), [3, 4, 11], [5]):
        groups = update_groups(kept, RWRConfig(updates_per_epoch=4), 0, 0)
        assert sorted(sum(groups, [])) == kept and len(groups) == min(4, len(kept))
        assert max(map(len, groups)) - min(map(len, groups)) <= 1 and min(map(len, groups)) >= 1
    cfg, kept = RWRConfig(updates_per_epoch=4), list(range(32))
    which = ((cfg, 0, 0), (cfg, 0, 1), (cfg, 1, 0), (RWRConfig(updates_per_epoch=4, seed=1), 0, 0))
    seen = [update_groups(kept, c, e, i) for c, e, i in which]
    assert seen[0] == update_groups(kept, cfg, 0, 0) and all(a != seen[0] for a in seen[1:])


# training ----------------------------------------------------------------------------------------------------------------------

WHOLE = {**SMOOTH, "micro_batch_size": 8, "sample_batch_size": 8}

@pytest.fixture(scope="module")
def whole(pipe_folder):
    "Each kind's weights after every update, on one process and without cutting."
    seen = {name: updates_of(lambda: go(pipe_folder, **{**WHOLE, **kind})) for name, kind in KINDS.items()}
    assert {name: len(s) for name, s in seen.items()} == {**dict.fromkeys(KINDS, 2 * 2 * 2), "one kept": 2 * 2 * 1}
    assert all((s[-1] - s[0]).abs().max() > 1e-3 for s in seen.values())  # the comparisons mean something
    return seen


@pytest.mark.parametrize("how", [dict(micro_batch_size=1), dict(micro_batch_size=3, sample_batch_size=3)], ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_speed_and_memory_settings_leave_the_update_alone(pipe_folder, whole, kind, how):
    "Invariant 5.6: how an update is cut changes nothing but float error."
    seen = updates_of(lambda: go(pipe_folder, **{**SMOOTH, **KINDS[kind], **how}))
    assert_close(seen, whole[kind], rtol=0, atol=2e-4 * (whole[kind][-1] - whole[kind][0]).abs().max().item())


def test_a_memory_budget_chooses_the_settings(pipe_folder, whole):
    "`fit` lowers what is done at a time and leaves the update alone; out of memory names the setting to lower."
    cfg = small(**WHOLE)
    with pytest.raises(ValueError, match="nothing fits in 1e-05 GB; the least that does"): fit(pipe_folder, cfg, 1e-5)
    tight = plan(pipe_folder, replace(cfg, micro_batch_size=2, sample_batch_size=1)).peak_gb + 1e-6
    chosen, used = fit(pipe_folder, cfg, tight), []
    def recording(model, net, x0, *args):
        used.append(len(x0))
        return denoising_loss(model, net, x0, *args)
    with patch("alignkit.rwr.denoising_loss", side_effect=recording):
        seen = updates_of(lambda: train(pipe_folder, brightness, PROMPTS, chosen))
    assert_close(seen, whole["softmax"], rtol=0, atol=2e-4 * (whole["softmax"][-1] - whole["softmax"][0]).abs().max().item())
    assert max(used) == chosen.micro_batch_size == 2
    gone = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    words = r"lower micro_batch_size \(now 3\); fit\(pipe, cfg, budget_gb\) .* chooses"
    with patch("alignkit.rwr.denoising_loss", side_effect=gone), pytest.raises(torch.OutOfMemoryError, match=words): go(pipe_folder)


def test_the_gradient_is_the_weighted_mean(pipe_folder):
    "The first update's gradient, from the run's own rewards and latents: the mean over its pictures of weight times error."
    from alignkit.mdp import get_sampler, policy, rollout, sample_noise
    from alignkit.pipelines import add_lora
    first = dict(num_epochs=1, updates_per_epoch=2, num_inner_epochs=1, eval_every=0, max_grad_norm=1e9)
    cfg, norms = small(**first), []
    go(pipe_folder, **first, learning_rate=1e-12, callbacks=[lambda run, row: norms.append(row["grad_norm"])])
    from alignkit.prompts import get_prompts
    model, prompts = open_model(pipe_folder), get_prompts(PROMPTS)
    params = add_lora(model.net, cfg.lora_rank, cfg.lora_alpha, cfg.lora_targets, cfg.seed)
    texts = [prompts.sample(0, 0, i) for i in range(8)]
    cond = model.encode(texts)
    step = policy(model, model.net, get_sampler(model, 4), cond)
    x0 = rollout(step, sample_noise(0, "rollout", 0, range(8), (5, 4, 8, 8))).latents[:, -1].clone()
    w = torch.tensor(reference_weights(brightness(model.decode(x0).detach(), texts).double().numpy(), 50.))
    expected = []
    for group in update_groups(list(range(8)), cfg, 0, 0):
        t, noise = regression_draws(group, (4, 8, 8), 1000, 0, 0, 0)
        out = model.net(model.scheduler.add_noise(x0[group], noise, t), t, cond["text"][group]).sample
        grads = torch.autograd.grad((w[group] * ((out - noise)**2).mean((1, 2, 3))).mean(), params)
        expected.append(torch.cat([g.flatten() for g in grads]).norm())
    assert_close(norms[0], torch.stack(expected).mean().item(), rtol=1e-3, atol=0)


def test_two_processes_agree(pipe_folder, whole, tmp_path):
    "Invariants 5.7 and 5.8: two processes hold equal weights, those of one process; also where an update has no picture for one of them."
    def kinds(): return {name: updates_of(lambda: go(pipe_folder, **{**SMOOTH, **kind})) for name, kind in KINDS.items()}
    ranks = on_two(kinds, tmp_path)
    for name in KINDS:
        assert torch.equal(ranks[0][name], ranks[1][name]), name
        moved = (whole[name][-1] - whole[name][0]).abs().max().item()
        assert_close(ranks[0][name], whole[name], rtol=0, atol=2e-4 * moved, msg=lambda m: f"{name}: {m}")


@pytest.fixture(scope="module")
def unbroken_run(pipe_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("rwr") / "unbroken"
    go(pipe_folder, out)
    return out


def kill(): os.kill(os.getpid(), signal.SIGKILL)


def killed(pipe_folder, out, moment):
    "Die in the middle of epoch 2's regression, after an epoch, or while a checkpoint is renamed."
    if isinstance(moment, int): go(pipe_folder, out, callbacks=[lambda run, row: row["epoch"] == moment and kill()])
    elif moment == "regression":
        calls, original = [], rwr.denoising_loss
        def loss(*args, **kw):
            calls.append(1)
            if len(calls) == 2 * 8 + 5: kill()
            return original(*args, **kw)
        rwr.denoising_loss = loss
        go(pipe_folder, out)
    else:
        rename = os.replace
        os.replace = lambda a, b: kill() if str(b).endswith("epoch_0001") else rename(a, b)
        go(pipe_folder, out)


@pytest.mark.parametrize("moment", [0, 2, "regression", "rename"])
def test_kill_and_resume(pipe_folder, unbroken_run, tmp_path, moment):
    "Invariant 5.7: a killed run resumes and ends bit for bit as the unbroken one."
    assert in_child(killed, pipe_folder, tmp_path / "run", moment) == -signal.SIGKILL
    go(pipe_folder, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", unbroken_run)


def test_a_reward_that_fails_stops_and_resumes(pipe_folder, unbroken_run, tmp_path):
    "A reward that raises is named, and the folder goes on to the unbroken run."
    calls = []
    def bad(images, prompts):
        calls.append(1)
        if len(calls) == 5: raise ConnectionError("the server is away")
        return brightness(images, prompts)
    with pytest.raises(RewardError, match="'brightness', epoch 1: raised ConnectionError"):
        go(pipe_folder, tmp_path / "run", reward=Reward(bad, "brightness"))
    go(pipe_folder, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", unbroken_run)


def test_full_fine_tuning_runs_and_resumes(pipe_folder, tmp_path):
    "trainable='full': every weight of the UNet moves, and a resumed run equals the unbroken one bit for bit."
    full = dict(trainable="full", learning_rate=1e-4, num_epochs=2, eval_every=1)
    run = go(pipe_folder, tmp_path / "a", **full)
    base = dict(load(pipe_folder).unet.named_parameters())
    assert all(not torch.equal(p, base[n]) for n, p in run.pipe.unet.named_parameters())
    go(pipe_folder, tmp_path / "b", **{**full, "num_epochs": 1})
    go(pipe_folder, tmp_path / "b", resume=True, **full)
    a, b = (history(tmp_path / f) for f in "ab")
    assert bits(a[1]["loss"]) == bits(b[1]["loss"])
    last = [sorted(p for p in (tmp_path / f / "checkpoints").iterdir())[-1] for f in "ab"]
    assert bits(weights(last[0])) == bits(weights(last[1]))


def test_bfloat16_trains(pipe_folder):
    "Half precision: finite, and the first loss is that of float32 but for rounding."
    half, full = (go(pipe_folder, num_epochs=1, eval_every=0, mixed_precision=p).history for p in ("bf16", "no"))
    assert_close(half.loss[0], full.loss[0], rtol=0.05, atol=0)
    assert (half.grad_norm > 0).all()


@pytest.mark.parametrize("kind", ["softmax", "sparse", "guided"])
def test_the_reward_decides_where_it_goes(pipe_folder, kind):
    "The regression moves a policy even without a reward, so the opposite reward is the control: same seeds, same noise, darker pictures."
    # two rounds: the two stand 5 to 6 standard errors apart then, and nearer again later, when all pictures of a run have become alike
    changes = {**KINDS[kind], "beta": 200., "samples_per_epoch": 16, "num_epochs": 2, "eval_samples": 16, "eval_every": 2,
               "num_inner_epochs": 10, "learning_rate": 3e-3}
    if kind == "sparse": changes |= dict(share=0.125, samples_per_epoch=32)
    up = go(pipe_folder, **changes)
    down = go(pipe_folder, reward=Reward(lambda images, prompts: -brightness(images, prompts), "darkness"), **changes)
    assert up.history.eval_reward_mean.iloc[-1] > -down.history.eval_reward_mean.iloc[-1] + up.eval_base["eval_reward_sem"]


def test_history_and_adapter(pipe_folder, unbroken_run):
    "The columns of the design; a round's queries; what is saved is what was trained, and plain diffusers loads it."
    rows = history(unbroken_run)
    assert {"epoch", "step", "queries", "reward_mean", "reward_std", "loss", "grad_norm", "lr"} <= set(rows[0])
    assert [r["queries"] for r in rows] == [8, 16, 24, 32] and [r["step"] for r in rows] == [4, 8, 12, 16]
    assert all(1 <= r["effective_samples"] <= 8 for r in rows)
    from diffusers import StableDiffusionPipeline
    StableDiffusionPipeline.from_pretrained(pipe_folder, safety_checker=None).load_lora_weights(unbroken_run / "lora")
    assert bits(weights(sorted((unbroken_run / "checkpoints").iterdir())[-1])) == bits(weights(unbroken_run / "lora"))


@pytest.mark.parametrize("cfg, words", [
    (dict(method="ddpo_is"), ["method", "'rwr'"]),
    (dict(weights="hard"), ["weights", "'softmax' or 'sparse'", "'hard'"]),
    (dict(share=0.), ["share", "(0, 1]", "got 0.0"]),
    (dict(share=1.1), ["share", "got 1.1"]),
    (dict(beta=0.), ["beta", "got 0.0"]),
    (dict(num_inner_epochs=0), ["num_inner_epochs", "got 0"]),
    (dict(updates_per_epoch=3), ["updates_per_epoch", "samples_per_epoch=8"]),
], ids=lambda x: next(iter(x)) if isinstance(x, dict) else "")
def test_bad_input_is_refused_before_any_work(pipe_folder, tmp_path, monkeypatch, cfg, words):
    def no_work(*args, **kwargs): raise AssertionError("work was done before the arguments were checked")
    for name in ("rollout", "evaluate_each"): monkeypatch.setattr(training, name, no_work)
    monkeypatch.setattr(start, "add_lora", no_work)
    with pytest.raises(ValueError) as error: go(pipe_folder, tmp_path / "run", **cfg)
    for word in words: assert word in str(error.value)
    assert not (tmp_path / "run").exists()


def test_presets():
    "The paper's numbers: 51,200 pictures a round in 400 updates, however they are weighted."
    for name in PRESETS:
        cfg = preset(name).check()
        assert cfg.num_epochs == 10 and cfg.samples_per_epoch == 10240 and cfg.num_inner_epochs * cfg.updates_per_epoch == 400
        assert (cfg.guidance_scale, cfg.learning_rate, cfg.trainable) == (5., 1e-5, "full")
    assert preset("rwr-paper").beta == 0.2 and preset("rwr-sparse-paper").share == 0.1 and preset("rwr-paper", num_epochs=1).num_epochs == 1
    with pytest.raises(ValueError, match="rwr-paper, rwr-paper-aesthetic, rwr-sparse-paper"): preset("rwr")
