"AlignProp end to end, on a pipeline with random weights: the numerics contract holds as it does for DDPO."
from dataclasses import replace
import os, signal
from unittest.mock import patch
import pytest
import torch
from torch.testing import assert_close
from alignkit import start
from alignkit.alignprop import STRATEGIES, AlignPropConfig, backprop_rollout, kept_steps, one_step_rollout, preset
from alignkit.alignprop import renoised_last_step, train
from alignkit.mdp import generator_for, get_sampler, policy
from alignkit.memory import fit, plan
from alignkit.pipelines import Cond, open_model
from alignkit.rewards import Reward, RewardError
from conftest import PROMPTS, assert_same_run, bits, brightness, history, in_child, on_two, updates_of, weights

red = Reward(brightness, "brightness", differentiable=True)


def small(**changes):
    "Four epochs of eight pictures in two updates, with ragged micro-batches and evaluations."
    few = dict(num_epochs=4, samples_per_epoch=8, updates_per_epoch=2, micro_batch_size=3, num_inference_steps=4, eta=1.,
               eval_every=2, eval_samples=3, eval_prompts=("a cow",), learning_rate=1e-2, fast="onednn")
    return AlignPropConfig(**{**few, **changes})


def go(pipe_folder, out=None, reward=red, resume=False, callbacks=(), **changes):
    return train(pipe=pipe_folder, reward=reward, prompts=PROMPTS, cfg=small(**changes), out=out, resume=resume, callbacks=callbacks)


# Adam divides a gradient by its own size; with an epsilon far above rounding the update is as smooth as the gradient
SMOOTH = dict(adam_epsilon=1e-3, num_epochs=2, eval_every=0, strategy="full")


@pytest.fixture(scope="module")
def whole(pipe_folder):
    seen = updates_of(lambda: go(pipe_folder, micro_batch_size=8, **SMOOTH))
    assert len(seen) == 4 and (seen[-1] - seen[0]).abs().max() > 1e-3  # the comparisons mean something
    return seen


@pytest.mark.parametrize("how", [
    dict(micro_batch_size=1),
    dict(micro_batch_size=3),
    dict(checkpointing="step"),
    dict(checkpointing="step", stored_steps=2),
    dict(vae_slicing=1),
], ids=str)
def test_speed_and_memory_settings_leave_the_update_alone(pipe_folder, whole, how):
    "Invariant 5.6: how an update is cut, and what is stored or computed again, changes nothing but float error."
    seen = updates_of(lambda: go(pipe_folder, **{**SMOOTH, **how}))
    assert_close(seen, whole, rtol=0, atol=1e-4 * (whole[-1] - whole[0]).abs().max().item())


@pytest.mark.parametrize("strategy", ["per_step", "draft_lv", "refl"])
def test_micro_batches_leave_the_update_alone_with_other_strategies(pipe_folder, strategy):
    "Every draw belongs to its picture or its update, that of the kept steps and of DRaFT-LV's new noise too."
    def run(micro_batch_size): go(pipe_folder, **{**SMOOTH, "num_epochs": 1, "strategy": strategy, "micro_batch_size": micro_batch_size})
    whole, cut = (updates_of(lambda: run(n)) for n in (4, 3))
    assert_close(cut, whole, rtol=0, atol=1e-4 * (whole[-1] - whole[0]).abs().max().item())


def test_copies_of_draft_lv_keep_their_prompts(pipe_folder):
    "The copies of picture b stand at b and B + b, beside the prompt of picture b; a picture's reward is the mean of its copies."
    seen, means = [], []
    def spy(images, prompts):
        seen.append((images.detach(), prompts))
        return brightness(images, prompts)
    run = go(pipe_folder, reward=Reward(spy, "spy", differentiable=True), strategy="draft_lv", renoise=2, num_epochs=1, eval_every=0)
    del seen[1]  # some of the first, asked again by themselves
    for images, prompts in seen:
        first, second = images.flatten(1).chunk(2)
        assert torch.cdist(first, second).argmin(1).tolist() == list(range(len(first)))
        assert prompts[:len(first)] == prompts[len(first):]
        means.append(brightness(images, prompts).view(2, -1).mean(0))
    assert any(len(set(prompts)) > 1 for _, prompts in seen)
    assert_close(run.history.reward_std.iloc[0], torch.cat(means).std(correction=0).item(), rtol=1e-5, atol=1e-7)


def test_a_memory_budget_chooses_the_settings(pipe_folder, whole):
    "`fit` lowers what is done at a time, and the update stays: under the least budget and under what is free."
    cfg = small(micro_batch_size=1, **SMOOTH)
    with pytest.raises(ValueError, match="nothing fits in 1e-05 GB; the least that does") as error:
        fit(pipe_folder, cfg, 1e-5, device="cpu")
    chosen = {budget: fit(pipe_folder, cfg, budget, device="cpu") for budget in (float(str(error.value).split()[-2]), "auto")}
    for best in chosen.values():
        seen = updates_of(lambda: train(pipe_folder, red, PROMPTS, best))
        assert_close(seen, whole, rtol=0, atol=1e-4 * (whole[-1] - whole[0]).abs().max().item())
    tight, free = chosen.values()
    assert tight.checkpointing == "step" and tight.vae_slicing
    assert (free.micro_batch_size, free.checkpointing) == (4, "none")


def test_what_is_done_at_a_time_may_change_on_resume(pipe_folder, tmp_path):
    "A run that ran out of memory goes on with leaner settings."
    cfg = small(**{**SMOOTH, "num_epochs": 3})
    go(pipe_folder, tmp_path, **SMOOTH)
    lean = fit(pipe_folder, cfg, plan(pipe_folder, replace(cfg, micro_batch_size=1, checkpointing="step")).peak_gb + 1e-6)
    assert lean != cfg
    assert len(train(pipe_folder, red, PROMPTS, lean, resume=tmp_path).history) == 3


@pytest.mark.parametrize("where, words", [
    ("alignkit.alignprop.decode_sliced", ["lower micro_batch_size (now 3)", "checkpointing='step'", "vae_slicing=1"]),
    ("alignkit.judges.draw", ["lower sample_batch_size (now 64)"]),
    ("reward", ["lower micro_batch_size (now 3)"]),
])
def test_out_of_memory_says_what_to_lower(pipe_folder, where, words):
    "The message names the setting, its value, and the function that chooses; in a reward too, whose errors are wrapped."
    gone = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
    def hungry(images, prompts): raise gone
    with pytest.raises(torch.OutOfMemoryError) as error:
        if where == "reward": go(pipe_folder, reward=Reward(hungry, "hungry", differentiable=True), eval_every=0)
        else:
            with patch(where, side_effect=gone): go(pipe_folder)
    for word in [*words, "out of memory", "fit(pipe, cfg, budget_gb)", "Tried to allocate 2.00 GiB"]:
        assert word in str(error.value)


def test_two_processes_agree(pipe_folder, whole, tmp_path):
    "Invariants 5.7 and 5.8: two processes hold the same weights after every update, those of one process within float error."
    ranks = on_two(lambda: updates_of(lambda: go(pipe_folder, tmp_path / "run", **SMOOTH)), tmp_path)
    assert torch.equal(*ranks)
    assert_close(ranks[0], whole, rtol=0, atol=1e-4 * (whole[-1] - whole[0]).abs().max().item())


@pytest.fixture(scope="module")
def unbroken_run(pipe_folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("alignprop") / "unbroken"
    go(pipe_folder, out)
    return out


def killed(pipe_folder, out, epoch):
    go(pipe_folder, out, callbacks=[lambda run, row: row["epoch"] == epoch and os.kill(os.getpid(), signal.SIGKILL)])


@pytest.mark.parametrize("epoch", [0, 2])
def test_kill_and_resume(pipe_folder, unbroken_run, tmp_path, epoch):
    "Invariant 5.7: a killed run resumes and ends bit for bit as the unbroken one."
    assert in_child(killed, pipe_folder, tmp_path / "run", epoch) == -signal.SIGKILL
    go(pipe_folder, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", unbroken_run)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_strategy_trains(pipe_folder, strategy):
    "Each moves the weights, keeps the steps it says, and the reward of the last evaluation is a number."
    drawing = patch("alignkit.alignprop.backprop_rollout", side_effect=backprop_rollout)
    ending = patch("alignkit.alignprop.one_step_rollout", side_effect=one_step_rollout)  # ReFL's, which ends at its step
    with drawing as drawn, ending as ended:
        run = go(pipe_folder, strategy=strategy, truncation_k=2, guidance_scale=3., guidance_grad="text", num_epochs=2)
    kept = lambda epoch, update: kept_steps(strategy, 4, generator_for(0, "kept", epoch, update), 2) & (strategy != "draft_lv")  # its own step comes after
    steps = [kept(epoch, update) for epoch in range(2) for update in range(2) for _ in range(2)]  # two micro-batches an update
    if strategy == "refl": assert not drawn.called and [call.args[3] for call in ended.call_args_list] == [int(k.nonzero()) for k in steps]
    else: assert not ended.called and torch.equal(torch.stack([call.args[2] for call in drawn.call_args_list]), torch.stack(steps))
    expected = dict(full={4}, last={2}, draft_lv={1}, refl={1}).get(strategy)
    if expected: assert set(run.history.kept_steps) == expected
    assert (run.history.grad_norm > 0).all() and run.history.skipped.max() == 0 and run.history.eval_reward_mean.notna().iloc[-1]


def test_the_reward_rises(pipe_folder):
    "Following the gradient of a reward raises it: on held-out prompts, within a few updates."
    run = go(pipe_folder, strategy="full", num_epochs=4)
    assert run.history.eval_reward_mean.iloc[-1] > run.eval_base["eval_reward_mean"] + 5 * run.eval_base["eval_reward_sem"]


def failing_at(when, what):
    "The gradient is that of brightness; at call number `when` the reward is `what`."
    calls = []
    def reward(images, prompts):
        calls.append(len(images))
        r = brightness(images, prompts)
        return r * what if len(calls) == when else r
    return Reward(reward, "brightness", differentiable=True)


def test_a_reward_that_is_not_finite_leaves_the_update_out(pipe_folder):
    "The other update of the epoch is made; the one with the NaN changes nothing and is counted."
    same = dict(num_epochs=1, eval_every=0, micro_batch_size=4, adam_weight_decay=0.)
    good = updates_of(lambda: go(pipe_folder, **same))
    run = {}
    seen = updates_of(lambda: run.update(run=go(pipe_folder, reward=failing_at(3, float("nan")), **same)))  # the second call asks for some of the first again
    assert len(good) == 2 and len(seen) == 1 and torch.equal(seen[0], good[0])
    history = run["run"].history
    assert history.skipped.tolist() == [1] and torch.isfinite(seen).all()
    assert abs(history.loss[0] + history.reward_mean[0]) < 1e-5 and history.reward_std[0] > 0  # of the pictures that have a reward


def test_loss_scaling_does_not_step_where_a_reward_failed(pipe_folder):
    "fp16's branch, with the scaler that a CPU has: an update with a NaN in a micro-batch is left out, the others are those of float32."
    original = start._accelerator
    def scaling(precision):
        accelerator = original(precision)
        accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=8.)
        return accelerator
    same = dict(num_epochs=1, eval_every=0, micro_batch_size=2, adam_weight_decay=0., updates_per_epoch=2, num_inference_steps=2)
    good = updates_of(lambda: go(pipe_folder, **same))
    with patch("alignkit.start._accelerator", scaling):
        scaled = updates_of(lambda: go(pipe_folder, **same))
        run = {}
        bad = failing_at(4, float("nan"))  # of four micro-batches, after the first of which some are asked again by themselves
        seen = updates_of(lambda: run.update(run=go(pipe_folder, reward=bad, **same)))
    assert len(seen) == 1 and run["run"].history.skipped.tolist() == [1]
    assert (good[1] - good[0]).abs().max() > 1e-3 and len(scaled) == 2
    assert torch.equal(seen[0], scaled[0])


def test_noise_of_draft_lv_survives_half_precision(pipe_folder):
    "The last step's noise is 4 % of the signal: in bf16 its factor must not be rounded to 0, or all copies are one."
    seen, latents, noise = [], torch.randn(2, 4, 8, 8), torch.randn(2, 4, 4, 8, 8)
    def predict(net, x, t, cond):
        seen.append(x)
        return x
    model = replace(open_model(pipe_folder), predict=predict)
    step = policy(model, None, get_sampler(model, 4), Cond(text=torch.zeros(6, 3, 4)))
    renoised_last_step(model, step, latents.bfloat16(), noise.bfloat16())
    renoised_last_step(model, step, latents, noise)
    assert seen[0].dtype == torch.bfloat16 and seen[1].dtype == torch.float32
    assert_close(seen[0].float() - latents.repeat(3, 1, 1, 1), seen[1] - latents.repeat(3, 1, 1, 1), rtol=0, atol=0.03)
    assert (seen[0][:2] - seen[0][2:4]).float().abs().mean() > 0.01


def test_a_gradient_that_is_not_finite_leaves_the_update_out(pipe_folder):
    "A finite reward may have an infinite gradient: the square root at 0."
    def root(images, prompts): return (images.mean((1, 2, 3)) * 0).sqrt()
    with pytest.raises(RuntimeError, match="3 updates.*not finite.*max_skipped=2.*learning_rate"):
        go(pipe_folder, reward=Reward(root, "root", differentiable=True), max_skipped=2, eval_every=0)


def test_other_failures_stop_and_resume(pipe_folder, unbroken_run, tmp_path):
    "A reward that raises is named, and the folder goes on to the unbroken run."
    calls = []
    def bad(images, prompts):
        calls.append(1)
        if len(calls) == 7: raise ConnectionError("the server is away")
        return brightness(images, prompts)
    with pytest.raises(RewardError, match="'brightness', epoch 1: raised ConnectionError"):
        go(pipe_folder, tmp_path / "run", reward=Reward(bad, "brightness", differentiable=True))
    go(pipe_folder, tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", unbroken_run)


detached = Reward(lambda images, prompts: brightness(images, prompts).detach(), "cut", differentiable=True)


@pytest.mark.parametrize("arguments, words", [
    (dict(reward="jpeg_compressibility", eval_every=0), ["'jpeg_compressibility' has no gradient", "tiny_aesthetic", "jpeg_soft"]),
    (dict(reward=detached, eval_every=0), ["'cut'", "without one"]),
    (dict(strategy="last", truncation_k=5), ["truncation_k", "4", "got 5"]),
    (dict(strategy="last", truncation_k=0), ["truncation_k", "got 0"]),
    (dict(strategy="random"), ["strategy", "per_step", "'random'"]),
    (dict(checkpointing="all"), ["checkpointing", "'all'"]),
    (dict(loss_coeff=0.), ["loss_coeff", "greater than 0"]),
], ids=["no gradient", "gradient cut", "K too large", "K too small", "strategy", "checkpointing", "coeff"])
def test_bad_input(pipe_folder, arguments, words):
    with pytest.raises(ValueError) as error: go(pipe_folder, **arguments)
    for word in words: assert word in str(error.value)


def test_loss_forms_and_presets(pipe_folder):
    "The coefficient scales the gradient; |r - target| below its target pulls as -r does."
    def rows(**changes): return go(pipe_folder, num_epochs=1, eval_every=0, strategy="last", max_grad_norm=1e9, **changes).history
    one, hundredth, target = rows(), rows(loss_coeff=0.01), rows(reward_target=10.)
    assert_close(hundredth.grad_norm[0] * 100, one.grad_norm[0], rtol=0.05, atol=0)  # Adam's first step is the same, its second nearly
    assert_close(target.loss[0] - one.loss[0], 10., rtol=1e-4, atol=0)
    assert_close(target.grad_norm[0], one.grad_norm[0], rtol=1e-4, atol=0)
    assert preset("alignprop-paper").samples_per_epoch == 256 and preset("trl").strategy == "per_step"


def test_the_adapter_loads_in_plain_diffusers(pipe_folder, unbroken_run):
    "What is saved is what was trained."
    from diffusers import StableDiffusionPipeline
    pipe = StableDiffusionPipeline.from_pretrained(pipe_folder, safety_checker=None)
    pipe.load_lora_weights(unbroken_run / "lora")
    last = sorted((unbroken_run / "checkpoints").iterdir())[-1]
    assert bits(weights(last)) == bits(weights(unbroken_run / "lora"))
    assert history(unbroken_run)[-1]["epoch"] == 3
