"The numerics contract end to end, with random weights: same inputs, same bits, whatever the batch, the process count or the accident."
import os, re, shutil, signal, threading, time
from pathlib import Path
from unittest.mock import patch
import numpy as np
import pytest
import torch
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.testing import assert_close
import alignkit.ddpo as ddpo
import alignkit.folder as folder
import alignkit.scorer as scorer
import alignkit.start as start
import alignkit.training as training
import test_rwr
from alignkit.logprob import step_log_prob
from alignkit.mdp import draw, get_sampler, policy, rollout, sample_noise
from alignkit.pipelines import add_lora, cast, load, modules_of, open_model
from alignkit.rewards import Reward, RewardError
from conftest import (PROMPTS, assert_same_run, brightness, go, history, in_child, on_two, plain_picture, small, torchrun, updates_of,
                      weights)

# Adam divides a gradient by its own size, so that rounding in a gradient of about zero moves a weight by a whole learning rate.
# With an epsilon far above rounding the update is as smooth as the gradient, and runs that differ by rounding alone compare closely.
SMOOTH = dict(adam_epsilon=1e-3, num_epochs=2, eval_every=0)


# ratio == 1 --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("guidance_scale", [1., 5.])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=["fp32", "bf16", "fp16"])
def test_ratio_is_exactly_one_for_the_same_batch(pipe_folder, dtype, guidance_scale):
    "Invariants 5.3 and 5.4: with unchanged weights and the same batch the ratio is 1, not nearly 1, in every precision."
    model = open_model(pipe_folder)
    for part in modules_of(model.pipe): cast(part, dtype)
    for p in add_lora(model.net): torch.nn.init.normal_(p, std=0.1, generator=torch.Generator().manual_seed(1))  # an adapter that does something
    B, S = 8, 6
    texts = [PROMPTS[i % 2] for i in range(B)]
    with torch.autocast("cpu", dtype, enabled=dtype != torch.float32):
        empty = model.encode([None]) if guidance_scale != 1 else None
        step = policy(model, model.net, get_sampler(model, S), model.encode(texts), empty, guidance_scale)
        t = rollout(step, sample_noise(0, "rollout", 0, range(B), (S + 1, *model.latent_shape)).to(dtype), step_log_prob)
        assert t.latents.dtype == dtype and t.log_probs.dtype == torch.float32
        t.latents, t.log_probs = t.latents.clone(), t.log_probs.clone()
        row = torch.arange(B)
        again = torch.stack([ddpo.pair_log_prob(step, t, row, torch.full((B,), s)) for s in range(S)], 1)
    _, info = ddpo.ddpo_is_loss(again.flatten(), t.log_probs.flatten(), torch.ones(B * S))
    assert again.requires_grad and again.dtype == torch.float32
    assert info["ratio"].eq(1).all(), f"largest |ratio - 1|: {(info['ratio'] - 1).abs().max():.1e}"


@pytest.mark.parametrize("precision, tolerance", [("no", 1e-6), ("bf16", 0.)])
def test_ratio_starts_at_one_in_train(pipe_folder, monkeypatch, precision, tolerance):
    "Invariant 5.4: until the first optimiser step every ratio is 1: within 1e-6 in fp32, exactly in bf16 (old log-probs are of its path)."
    before, first_step = [], []
    loss = ddpo.ddpo_is_loss
    def recording(*args):
        result = loss(*args)
        if not first_step: before.append(result[1]["ratio"])
        return result
    monkeypatch.setattr(ddpo, "ddpo_is_loss", recording)
    hook = register_optimizer_step_post_hook(lambda *_: first_step.append(True))
    try: go(pipe_folder, mixed_precision=precision, num_epochs=1, eval_every=0, micro_batch_size=5)
    finally: hook.remove()
    ratio = torch.cat(before)
    assert len(ratio) == 4 * 4  # the pairs of the first of two updates
    assert (ratio - 1).abs().max() <= tolerance


def test_half_precision_recomputes_old_log_probs(pipe_folder, monkeypatch):
    "Invariants 5.3 and 5.4: bf16 runs; log-probs stay float32; the old ones are of the training path in bf16, of the rollout in fp32."
    calls = []
    original = ddpo.pair_log_prob
    def recording(*args):
        result = original(*args)
        calls.append((result.requires_grad, result.dtype))
        return result
    monkeypatch.setattr(ddpo, "pair_log_prob", recording)
    counts = {}
    for precision in ("no", "bf16"):
        calls.clear()
        run = go(pipe_folder, mixed_precision=precision, num_epochs=1, eval_every=0)
        assert {dtype for _, dtype in calls} == {torch.float32}
        counts[precision] = [sum(g for g, _ in calls), sum(not g for g, _ in calls)]
        assert np.isfinite(run.history[["loss", "grad_norm", "approx_kl", "clipfrac", "reward_mean"]].to_numpy()).all()
        assert all(p.dtype == torch.float32 for p in run.pipe.unet.parameters() if p.requires_grad)
    assert counts["no"] == [counts["no"][0], 0]
    assert counts["bf16"] == [counts["no"][0]] * 2


def test_recomputed_log_probs_cover_every_pass(pipe_folder, monkeypatch):
    "With a share of the steps each pass trains on others: in half precision the old log-probs of all of them come from the training path."
    pairs = {True: set(), False: set()}
    original = ddpo.pair_log_prob
    def recording(step, walks, row, at, *args):
        pairs[torch.is_grad_enabled()] |= set(zip(row.tolist(), at.tolist()))
        return original(step, walks, row, at, *args)
    monkeypatch.setattr(ddpo, "pair_log_prob", recording)
    go(pipe_folder, mixed_precision="bf16", num_inner_epochs=3, timestep_fraction=0.5, num_epochs=1, eval_every=0)
    assert len(pairs[True]) > 8 * 2 and pairs[False] == pairs[True]  # more than one pass has


# the update --------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("method", [dict(method="ddpo_is"), dict(method="ddpo_sf", updates_per_epoch=1)], ids=["is", "sf"])
def test_micro_batches_do_not_change_the_update(pipe_folder, method):
    "Invariant 5.6: the gradient is the mean over an update's pairs: micro-batches of 64, and ragged ones of 5, give the same weights."
    whole, cut = (updates_of(lambda: go(pipe_folder, micro_batch_size=m, **SMOOTH, **method)) for m in (64, 5))
    moved = (whole[-1] - whole[0]).abs().max()
    assert moved > 1e-3  # the comparison means something
    # float32 sums of some tens of terms in another order: a relative error near 1e-6 of the movement;
    # a wrong weighting of the last, ragged micro-batch is 1e-1
    assert_close(cut, whole, rtol=0, atol=1e-4 * moved.item())


def test_samples_do_not_depend_on_the_batch(pipe_folder):
    "Invariant 5.7: picture i has its own stream: any `sample_batch_size` gives the same pictures and rewards but for rounding."
    def first_epoch(size):
        seen = []
        def reward(images, prompts):
            seen.append((images, prompts))
            return brightness(images, prompts)
        run = go(pipe_folder, reward=reward, sample_batch_size=size, num_epochs=1, eval_every=0)
        if len(seen[0][0]) > 1: del seen[1]  # some of the first batch, asked again by themselves
        return torch.cat([i for i, _ in seen]), [p for _, ps in seen for p in ps], run.history.reward_mean[0]
    images, prompts, mean = first_epoch(8)
    assert (images[0] - images[1]).abs().max() > 0.05
    for size in (1, 3, 64):
        other_images, other_prompts, other_mean = first_epoch(size)
        assert other_prompts == prompts
        assert_close(other_images, images, rtol=0, atol=1e-5)
        assert abs(other_mean - mean) < 1e-6


def test_rewards_run_while_the_next_batch_is_drawn(pipe_folder, monkeypatch):
    "A reward that waits until the next batch is being drawn would wait for ever in a loop; it gets the rewards that it would get in turn."
    begun, calls = [threading.Event() for _ in range(3)], []
    def rollout(*args, original=training.rollout, **kwargs):
        time.sleep(0.1)  # drawing goes on while a reward waits
        next(e for e in begun if not e.is_set()).set()
        return original(*args, **kwargs)
    def patient(images, prompts):
        calls.append(len(images))
        if not begun[min(len(calls) - (len(calls) > 1), 2)].wait(60): raise TimeoutError("the next batch was never drawn")
        return brightness(images, prompts)
    turn = go(pipe_folder, sample_batch_size=3, num_epochs=1, eval_every=0).history
    monkeypatch.setattr(training, "rollout", rollout)
    row = go(pipe_folder, reward=patient, sample_batch_size=3, num_epochs=1, eval_every=0).history.iloc[0]
    assert calls == [3, 2, 3, 2]  # two pictures of the first batch again, by themselves
    assert row.reward_mean == turn.reward_mean[0]
    assert row.reward_work_s > row.reward_s + 0.1  # the first two rewards waited 0.1 s each, the run for the third alone


def test_drawing_does_not_depend_on_what_ran_before(pipe_folder):
    "Invariant 5.7: no draw touches or reads torch's global generator."
    pipe = load(pipe_folder)
    torch.manual_seed(1)
    torch.rand(7)
    a = draw(pipe, PROMPTS, seed=3, num_inference_steps=3)
    state = torch.get_rng_state()
    b = draw(pipe, PROMPTS, seed=3, num_inference_steps=3)
    assert torch.equal(a, b) and torch.equal(state, torch.get_rng_state())


def test_zero_variance_gives_zero_advantages(pipe_folder):
    "Invariant 5.9: a reward that is always the same teaches nothing: no NaN, no advantage made of rounding errors, unchanged weights."
    alone = dict(samples_per_epoch=24, num_inference_steps=2, adam_weight_decay=0., num_epochs=2, eval_every=0)
    start = torch.cat([p.detach().flatten() for p in add_lora(load(pipe_folder).unet)])
    for advantages in ddpo.ADVANTAGES:
        for value in (0.1, -1771.3):
            constant = Reward(lambda images, prompts: torch.full((len(prompts),), value), "constant")
            seen = updates_of(lambda: go(pipe_folder, reward=constant, advantages=advantages, **alone))
            assert seen.isfinite().all()
            moved = (seen - start).abs().max()
            assert moved == 0, f"advantages={advantages}, reward {value}: weights moved by {moved:.1e}"
        stats = ddpo.PromptStats(8, 3).advantages(["a"] * 3 + ["b"], [0.1] * 4)
        assert stats.abs().max() < 1e-6


# resume ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("k", [1, 2, 3])
def test_resume_equals_the_unbroken_run(pipe_folder, unbroken, tmp_path, k):
    "Invariant 5.7: stopped after k epochs and resumed, a run equals the unbroken one: adapter, optimiser, history, statistics, pictures."
    go(pipe_folder, tmp_path / "run", num_epochs=4, callbacks=[lambda run, row: row["epoch"] == k - 1])
    assert len(history(tmp_path / "run")) == k
    torch.rand(3)  # whatever ran in between
    run = go(pipe_folder, tmp_path / "run", resume=True)
    assert list(run.history.epoch) == list(range(4))
    assert_same_run(tmp_path / "run", unbroken)


def test_resume_with_more_epochs(pipe_folder, unbroken, tmp_path):
    "Invariant 5.7: a finished run of fewer epochs goes on to more; `resume` takes the folder itself too."
    go(pipe_folder, tmp_path / "run", num_epochs=2)
    go(pipe_folder, resume=tmp_path / "run", num_epochs=4)
    assert_same_run(tmp_path / "run", unbroken)


def test_resume_of_a_finished_run_changes_nothing(pipe_folder, unbroken, tmp_path):
    "Invariant 5.7: resuming a run that is complete draws nothing and leaves it as it was."
    shutil.copytree(unbroken, tmp_path / "run")
    def never(images, prompts): raise AssertionError("a finished run asked for rewards")
    never.__name__ = "brightness"
    run = go(pipe_folder, tmp_path / "run", reward=never, resume=True)
    assert len(run.history) == 4
    assert_same_run(tmp_path / "run", unbroken)


def kill(): os.kill(os.getpid(), signal.SIGKILL)


AT_THE_START = ("before the first sample", "evaluating the base")


def killed_while(moment, pipe_folder, out):
    "Train in this process until `moment` of epoch 2, and be killed there; where `out` holds two epochs, go on from them."
    epochs = [r["epoch"] for r in history(out)] if out.exists() else []
    def count(run, row): epochs.append(row["epoch"])
    def at_call(module, name, when, what=None):
        original, calls = getattr(module, name), []
        def wrapped(*args, **kwargs):
            calls.append(args)
            if when(calls[-1], len(epochs)):
                if what: what(original, *args)
                kill()
            return original(*args, **kwargs)
        setattr(module, name, wrapped)
    def half_row(original, history, row):
        line = ",".join(map(str, row.values()))
        with open(history.file, "a") as f: f.write(line[:len(line) // 2])
    def half_file(original, state, path):
        original(state, path)
        with open(path, "r+b") as f: f.truncate(path.stat().st_size // 2)
    def after(original, *args): original(*args)
    in_epoch_2 = lambda args, done: done == 2
    if moment == "before the first sample": at_call(training, "sample_noise", lambda args, done: True)
    elif moment == "evaluating the base": at_call(training, "evaluate_each", lambda args, done: True)
    elif moment == "sampling": at_call(training, "rollout", in_epoch_2)  # the first of two sampling batches is done by the second call
    elif moment == "sampling, second batch":
        seen = []
        at_call(training, "rollout", lambda args, done: done == 2 and (seen.append(1) or len(seen) == 2))
    elif moment == "scoring": at_call(scorer, "score", in_epoch_2)
    elif moment == "training":
        register_optimizer_step_post_hook(lambda *_: len(epochs) == 2 and kill())  # after the first of two updates
    elif moment == "before the history": at_call(folder.History, "append", lambda args, done: done == 2)
    elif moment == "writing the history": at_call(folder.History, "append", lambda args, done: done == 2, half_row)
    elif moment == "after the history": at_call(folder.History, "append", lambda args, done: done == 2, after)
    elif moment == "writing the checkpoint": at_call(torch, "save", lambda args, done: done == 2, half_file)
    elif moment == "before the rename": at_call(os, "replace", lambda args, done: done == 2 and "epoch_" in str(args[1]))
    elif moment == "after the rename": at_call(os, "replace", lambda args, done: done == 2 and "epoch_" in str(args[1]), after)
    elif moment == "removing the oldest": at_call(shutil, "rmtree", lambda args, done: done == 2 and not str(args[0]).endswith(".part"),
                                                  lambda original, path: next(Path(path).glob("*.pt")).unlink())
    elif moment == "writing the adapter":
        at_call(training, "save_lora", lambda args, done: Path(args[1]).name == "lora",
                lambda original, unet, path: (original(unet, path), next(Path(path).iterdir()).write_bytes(b"torn")))
    else: raise ValueError(moment)
    go(pipe_folder, out, resume=True, callbacks=[count])


@pytest.fixture(scope="module")
def two_epochs(pipe_folder, tmp_path_factory):
    "What a run that was killed in its third epoch leaves behind."
    out = tmp_path_factory.mktemp("killed") / "run"
    assert in_child(killed_while, "sampling", pipe_folder, out) == -signal.SIGKILL
    return out


@pytest.mark.parametrize("moment", [
    "before the first sample", "evaluating the base", "sampling", "sampling, second batch", "scoring", "training",
    "before the history", "writing the history", "after the history", "writing the checkpoint",
    "before the rename", "after the rename", "removing the oldest", "writing the adapter"])
def test_kill_and_resume(pipe_folder, unbroken, two_epochs, tmp_path, moment):
    "Invariant 5.7: a run killed (SIGKILL) at any instant leaves a folder that resumes, and ends bit for bit as the unbroken run."
    if moment not in AT_THE_START: shutil.copytree(two_epochs, tmp_path / "run")  # the first two epochs, once for all moments
    assert in_child(killed_while, moment, pipe_folder, tmp_path / "run") == -signal.SIGKILL
    go(pipe_folder, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", unbroken)
    assert not list((tmp_path / "run" / "checkpoints").glob("*.part"))


def test_what_resume_reads_is_renamed_into_place(pipe_folder, tmp_path):
    "eval_base.json is written beside and renamed, like all that a resumed run reads."
    names = []
    def recording(source, target, original=os.replace):
        names.append(Path(target).name)
        return original(source, target)
    before = os.replace
    os.replace = recording
    try: go(pipe_folder, tmp_path / "run", num_epochs=1, eval_every=1)
    finally: os.replace = before
    assert {"config.json", "eval_base.json", "epoch_0000"} <= set(names)


@pytest.mark.parametrize("fault", ["raises", "nan", "shape"])
def test_a_reward_that_fails(pipe_folder, unbroken, tmp_path, fault):
    "A reward that fails at epoch 1 is named with prompt and epoch; the folder then resumes with a good reward to the unbroken run."
    calls = []
    def bad(images, prompts):
        calls.append(1)
        if len(calls) < 5: return brightness(images, prompts)  # the base evaluation, the two batches of epoch 0, and some of the first again
        if fault == "raises": raise ConnectionError("the server is away")
        r = brightness(images, prompts)
        return r * float("nan") if fault == "nan" else r[:, None]
    word = {"raises": "ConnectionError: the server is away", "nan": "nan", "shape": re.escape("(5, 1)")}[fault]
    with pytest.raises(RewardError, match=word) as error: go(pipe_folder, tmp_path / "run", reward=Reward(bad, "brightness"))
    assert "'brightness'" in str(error.value) and "epoch 1" in str(error.value) and any(p in str(error.value) for p in PROMPTS)
    assert [p.name for p in sorted((tmp_path / "run" / "checkpoints").iterdir())] == ["epoch_0000"]
    go(pipe_folder, tmp_path / "run", reward=Reward(brightness, "brightness"), resume=True)
    assert_same_run(tmp_path / "run", unbroken)


def test_a_gradient_that_is_not_finite_stops_the_run(pipe_folder, unbroken, tmp_path):
    "It is named before it reaches the weights, and the folder resumes to the unbroken run."
    def spoil(run, row):
        if row["epoch"] == 0: next(p for p in run.pipe.unet.parameters() if p.requires_grad).register_hook(lambda g: g * float("nan"))
    words = r"update \d+: the gradient is not finite; lower learning_rate=.* resumes from its last checkpoint"
    with pytest.raises(RuntimeError, match=words): go(pipe_folder, tmp_path / "run", callbacks=(spoil,))
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch_0000"]
    go(pipe_folder, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", unbroken)


def test_a_reward_that_fails_between_checkpoints(pipe_folder, tmp_path):
    "After a failure the work of finished epochs is kept even where `save_every` would not have saved it yet."
    calls = []
    def bad(images, prompts):
        calls.append(1)
        if len(calls) > 5: raise ConnectionError("away")
        return brightness(images, prompts)
    with pytest.raises(RewardError): go(pipe_folder, tmp_path / "run", reward=Reward(bad, "brightness"), eval_every=0, save_every=4)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["epoch_0001"]


def test_a_failed_run_leaves_its_pipeline_plain(pipe_folder):
    "The same pipeline, loaded once: after a run that failed in bf16 the next one in float32 is that of a fresh pipeline."
    def away(images, prompts): raise ConnectionError("away")
    pipe = load(pipe_folder, dtype=torch.bfloat16)
    with pytest.raises(RewardError): go(pipe, reward=away, mixed_precision="bf16", eval_every=0)
    assert not any("forward" in m.__dict__ or hasattr(m, "_original_forward") for part in (pipe.unet, pipe.vae) for m in part.modules())
    seen = []
    pipe.unet.conv_in.register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    with pytest.warns(UserWarning, match="is replaced by a fresh one"): go(pipe, num_epochs=1, eval_every=0)
    assert set(seen) == {torch.float32}


def test_half_precision_weights_are_trained_in_float32(pipe_folder):
    "trainable='full' of a pipeline that was loaded in bf16: small updates are not rounded away."
    before = {n: p.float() for n, p in load(pipe_folder, dtype=torch.bfloat16).unet.named_parameters()}
    half = load(pipe_folder, dtype=torch.bfloat16)
    run = go(half, trainable="full", mixed_precision="bf16", learning_rate=1e-5, num_epochs=1, eval_every=0)
    assert all(p.dtype == torch.float32 for p in run.pipe.unet.parameters())
    moved = sum((p.detach() != before[n]).sum().item() for n, p in run.pipe.unet.named_parameters())
    assert moved > 0.9 * sum(p.numel() for p in before.values())


def test_a_reward_may_be_any_module_and_is_asked_in_its_own_precision(pipe_folder):
    "One whose weights want gradients, in bf16: it sees float32 pictures outside autocast, always, and its answers carry no graph."
    torch.manual_seed(0)
    net, seen = torch.nn.Conv2d(3, 1, 3), []
    def reward(images, prompts):
        r = net(images).mean((1, 2, 3))
        seen.append((torch.is_autocast_enabled("cpu"), images.dtype, r.dtype, r.requires_grad))
        return r
    run = go(pipe_folder, reward=reward, mixed_precision="bf16", num_epochs=2)
    assert set(seen) == {(False, torch.float32, torch.float32, False)} and len(seen) == 2 * 2 + 2 + 1  # two batches an epoch, two evaluations, one again
    assert np.isfinite(run.history.reward_mean).all() and np.isfinite(run.history.eval_reward_mean.iloc[-1])


def test_full_fine_tuning_runs_and_resumes(pipe_folder, tmp_path):
    "trainable='full': every weight of the UNet moves, and a resumed run equals the unbroken one bit for bit."
    full = dict(trainable="full", learning_rate=1e-4)
    run = go(pipe_folder, tmp_path / "a", **full)
    base = dict(load(pipe_folder).unet.named_parameters())
    assert all(not torch.equal(p, base[n]) for n, p in run.pipe.unet.named_parameters())
    assert in_child(killed_while_full, pipe_folder, tmp_path / "b", full) == -signal.SIGKILL
    go(pipe_folder, tmp_path / "b", resume=True, **full)
    assert_same_run(tmp_path / "b", tmp_path / "a")
    from diffusers import UNet2DConditionModel
    saved = UNet2DConditionModel.from_pretrained(tmp_path / "a" / "unet")
    assert all(torch.equal(p, q) for p, q in zip(saved.parameters(), run.pipe.unet.parameters()))
    with pytest.raises(ValueError, match="save_pipeline"): run.save_lora(tmp_path / "no")


def killed_while_full(pipe_folder, out, full):
    go(pipe_folder, out, callbacks=[lambda run, row: row["epoch"] == 2 and kill()], **full)


# several processes -------------------------------------------------------------------------------------------------------------

def test_two_processes_hold_equal_weights(pipe_folder, tmp_path):
    "Invariants 5.7 and 5.8: two processes hold the same weights after every update, those of one process within float error."
    ranks = on_two(lambda: updates_of(lambda: go(pipe_folder, tmp_path / "run", **SMOOTH)), tmp_path)
    assert len(ranks[0]) == 2 * 2  # two epochs of two updates
    assert torch.equal(ranks[0], ranks[1])
    one = updates_of(lambda: go(pipe_folder, tmp_path / "one", **SMOOTH))
    moved = (one[-1] - one[0]).abs().max()
    assert moved > 1e-3
    assert_close(ranks[0], one, rtol=0, atol=1e-4 * moved.item())
    for a, b in zip(history(tmp_path / "run"), history(tmp_path / "one")):
        for k in ("epoch", "step", "queries", "lr"): assert a[k] == b[k]
        for k in ("reward_mean", "reward_std", "loss", "approx_kl", "clipfrac"): assert abs(a[k] - b[k]) < 1e-4 * max(1, abs(b[k])), k


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
from test_invariants import train_both
from accelerate import PartialState
train_both({pipe!r}, {out!r}, int(sys.argv[1]))
assert PartialState().num_processes == 2
"""


def train_both(pipe_folder, out, epochs):
    "DDPO and reward-weighted regression, one after the other."
    both = dict(resume=True, num_epochs=epochs, eval_every=1)
    go(pipe_folder, Path(out) / "ddpo", adam_epsilon=1e-3, **both)
    test_rwr.go(pipe_folder, Path(out) / "rwr", adam_epsilon=1e-2, weights="sparse", share=0.3, **both)


def test_torchrun_end_to_end(pipe_folder, tmp_path):
    "Invariants 5.7 and 5.8, with real launches: two processes start two runs, two others resume them; all is as in one process."
    script = tmp_path / "two.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent), pipe=pipe_folder, out=str(tmp_path / "two")))
    for epochs in (1, 2): torchrun(script, epochs)
    train_both(pipe_folder, tmp_path / "one", 2)
    means = ("reward_mean", "reward_std", "eval_reward_mean", "loss", "grad_norm")
    for method, exact in (("ddpo", ("epoch", "step", "queries", "lr")), ("rwr", ("epoch", "step", "queries", "lr", "effective_samples"))):
        two, one = tmp_path / "two" / method, tmp_path / "one" / method
        a, b = weights(two / "lora"), weights(one / "lora")
        assert a.keys() == b.keys() and len(a) > 0
        for k in a: assert_close(a[k], b[k], rtol=0, atol=1e-5)
        for x, y in zip(history(two), history(one), strict=True):
            for k in exact: assert x[k] == y[k], k
            for k in means: assert abs(x[k] - y[k]) < 1e-4 * max(1, abs(y[k])), k
            if method == "ddpo": assert max(abs(x[k] - y[k]) for k in ("reward_mean", "eval_reward_mean")) < 1e-5


# what comes in and what goes out -----------------------------------------------------------------------------------------------

def test_rewards_see_pictures_in_0_1(pipe_folder):
    "Invariant 5.10: a reward sees [0, 1], once: not [-1, 1], not the washed-out [0.5, 1]; in training and in evaluation, float32."
    seen = []
    def reward(images, prompts):
        seen.append(images)
        return brightness(images, prompts)
    # a decoder whose last layer spans far more than [-1, 1]: black and white both occur, and all in between
    pipe = load(pipe_folder)
    with torch.no_grad(): pipe.vae.decoder.conv_out.weight.mul_(30)
    for precision in ("no", "bf16"): go(pipe, reward=reward, num_epochs=1, mixed_precision=precision)
    assert len(seen) == 2 * (1 + 3 + 1)  # the base evaluation, the epoch's two batches and some of the first again, the last evaluation
    for images in seen:
        assert images.dtype == torch.float32 and tuple(images.shape[1:]) == (3, 32, 32)
        assert images.min() == 0 and images.max() == 1
        assert ((images > 0.1) & (images < 0.4)).any()


def test_a_saved_adapter_loads_in_plain_diffusers(pipe_folder, tmp_path):
    "`load_lora_weights` on the saved folder gives the same picture as `run.pipe`, alpha included."
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    run = go(pipe_folder, tmp_path / "run", num_epochs=1, lora_rank=2, lora_alpha=16., eval_every=0)
    run.save_lora(tmp_path / "mine")
    ours = plain_picture(run.pipe)
    for folder in (tmp_path / "mine", tmp_path / "run" / "lora"):
        plain = StableDiffusionPipeline.from_pretrained(pipe_folder, safety_checker=None)
        plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config)
        plain.set_progress_bar_config(disable=True)
        base = plain_picture(plain)
        plain.load_lora_weights(folder)
        theirs = plain_picture(plain)
        assert np.abs(base - ours).max() > 1e-2
        assert np.array_equal(theirs, ours), f"largest difference {np.abs(theirs - ours).max():.1e}"


def blank(path):
    path.write_text("\n  \n")
    return str(path)


def occupied(path):
    path.write_text("a file where the folder should be")
    return path / "run"


@pytest.mark.parametrize("case, error, words", [
    (lambda p: dict(pipe="tiny-ds"), ValueError, ["'tiny-ds'", "'tiny'"]),
    (lambda p: dict(pipe=str(p)), ValueError, ["model_index.json"]),
    (lambda p: dict(pipe=3), TypeError, ["pipe", "int"]),
    (lambda p: dict(reward="jpg"), ValueError, ["'jpg'", "jpeg_compressibility", "jpeg_incompressibility"]),
    (lambda p: dict(reward={}), ValueError, ["reward", "empty"]),
    (lambda p: dict(prompts="animals"), ValueError, ["'animals'", "simple_animals", "heldout_animals", "animal_activities"]),
    (lambda p: dict(prompts=str(p / "missing.txt")), ValueError, ["missing.txt"]),
    (lambda p: dict(prompts=blank(p / "blank.txt")), ValueError, ["blank.txt", "no prompt"]),
    (lambda p: dict(prompts=["a cat", " "]), ValueError, ["' '"]),
    (lambda p: dict(prompts=[]), ValueError, ["empty"]),
    (lambda p: dict(cfg=small(eval_prompts="held_out")), ValueError, ["'held_out'", "heldout_animals"]),
    (lambda p: dict(cfg=small(method="ppo")), ValueError, ["'ppo'", "ddpo_is", "ddpo_sf"]),
    (lambda p: dict(cfg=small(eta=0.)), ValueError, ["eta", "density"]),
    (lambda p: dict(cfg=small(eval_every=0, eval_rewards=("clip_named",))), ValueError, ["eval_rewards", "eval_every=0"]),
    (lambda p: dict(cfg=small(updates_per_epoch=3)), ValueError, ["updates_per_epoch", "samples_per_epoch=8"]),
    (lambda p: dict(cfg=small(micro_batch_size=0)), ValueError, ["micro_batch_size", "0"]),
    (lambda p: dict(cfg=small(sample_batch_size=-1)), ValueError, ["sample_batch_size", "-1"]),
    (lambda p: dict(cfg=small(num_inference_steps=0)), ValueError, ["num_inference_steps", "0"]),
    (lambda p: dict(cfg=small(timestep_fraction=0.)), ValueError, ["timestep_fraction"]),
    (lambda p: dict(cfg=small(method="ddpo_sf")), ValueError, ["REINFORCE", "one update"]),
    (lambda p: dict(cfg=small(mixed_precision="fp16")), ValueError, ["fp16", "GPU"]),
    (lambda p: dict(resume=True, out=None), ValueError, ["resume", "run folder"]),
    (lambda p: dict(out=occupied(p / "file")), OSError, ["out", "file"]),
], ids=["pipe name", "pipe folder", "pipe type", "reward name", "reward dict", "prompt set", "prompt file missing", "prompt file blank",
        "prompt list blank", "prompt list empty", "eval prompts", "method", "eta 0", "judge of no evaluation", "updates do not divide",
        "micro batch 0", "sample batch -1", "zero timesteps", "timestep fraction 0", "reinforce twice", "fp16 on cpu", "resume nothing",
        "unwritable out"])
def test_bad_input_is_refused_before_any_work(pipe_folder, tmp_path, monkeypatch, case, error, words):
    "A wrong argument is named, with the values there are, before a picture is drawn, and the run folder is not touched."
    def no_work(*args, **kwargs): raise AssertionError("work was done before the arguments were checked")
    for name in ("rollout", "evaluate_each"): monkeypatch.setattr(training, name, no_work)
    monkeypatch.setattr(start, "add_lora", no_work)
    arguments = {**dict(pipe=pipe_folder, reward=brightness, prompts=PROMPTS, cfg=small(), out=tmp_path / "run"), **case(tmp_path)}
    with pytest.raises(error) as caught: ddpo.train(**arguments)
    for word in words: assert word in str(caught.value)
    assert not (tmp_path / "run").exists()


def test_a_step_without_a_density_is_refused(pipe_folder):
    "set_alpha_to_one=True makes the last step deterministic; on a GPU nothing else would notice."
    from diffusers import DDIMScheduler
    pipe = load(pipe_folder)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, set_alpha_to_one=True)
    with patch("alignkit.training.rollout", side_effect=AssertionError("work was done")):
        with pytest.raises(ValueError, match="set_alpha_to_one=True"): go(pipe, eval_every=0)


def test_unknown_preset_lists_the_presets():
    "A wrong preset name is answered with the names there are; a wrong field with its name."
    with pytest.raises(ValueError, match="ddpo-paper, ddpo-pytorch, trl.*'dppo'"): ddpo.preset("dppo")
    with pytest.raises(TypeError, match="lerning_rate"): ddpo.preset("trl", lerning_rate=1)


def test_resume_refuses_another_config(pipe_folder, unbroken, tmp_path):
    "A run goes on with its own config only; every difference is named; a folder that holds a run is not started over; nothing is changed."
    shutil.copytree(unbroken, tmp_path / "run")
    files = lambda: {p: p.read_bytes() for p in sorted((tmp_path / "run").rglob("*")) if p.is_file()}
    before = files()
    resumed = dict(out=tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match=r"clip_range was 0.002, now 0.5; seed was 0, now 1"):
        go(pipe_folder, **resumed, seed=1, clip_range=0.5)
    with pytest.raises(ValueError, match="reward was 'brightness', now 'other'"):
        go(pipe_folder, reward=Reward(brightness, "other"), **resumed)
    with pytest.raises(ValueError, match="prompts_sha256 was"):  # another list of two
        ddpo.train(pipe_folder, Reward(brightness, "brightness"), ["a cat", "a cow"], small(), **resumed)
    with pytest.raises(FileExistsError, match="resume=True"): go(pipe_folder, tmp_path / "run")
    assert files() == before
