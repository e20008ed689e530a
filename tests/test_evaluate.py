"Evaluation, mixing of adapters and early stopping, on a pipeline with random weights."
import json, math
import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close
from alignkit.evaluate import (FINAL, check_fit, evaluate, how_of, interval, leave_one_out, leave_one_out_pairs, mix, mix_adapters,
                               mixing_path, mount, plot_path, read_adapter, readable, share_interval, side_by_side)
from alignkit.judges import drift, evaluate_fixed
from alignkit.mdp import Drawing, draw
from alignkit.pipelines import add_lora, load, open_model, save_lora
from alignkit.rewards import Reward
from alignkit.runs import Run, watch
from conftest import assert_same_run, bits, brightness, go, history, in_child, of_two, on_two, plain_picture, weights

FEW = dict(prompts=["a cow", "a pig"], num_samples=6, num_inference_steps=3, guidance_scale=1.)
red = Reward(brightness, "red")


def adapter(pipe_folder, seed, r=2, lora_alpha=None, targets=("to_q", "to_k", "to_v", "to_out.0"), std=0.3):
    "A pipeline with a random adapter that does something."
    pipe = load(pipe_folder)
    for i, p in enumerate(add_lora(pipe.unet, r, lora_alpha, targets)):
        torch.nn.init.normal_(p, std=std, generator=torch.Generator().manual_seed(100 * seed + i))
    return pipe


@pytest.fixture(scope="module")
def adapters(pipe_folder, tmp_path_factory):
    "Two LoRA folders of different rank, scale and targets."
    folder = tmp_path_factory.mktemp("adapters")
    save_lora(adapter(pipe_folder, 1, r=2, lora_alpha=6.).unet, folder / "a")
    save_lora(adapter(pipe_folder, 2, r=3, targets=("to_q", "to_v", "ff.net.0.proj")).unet, folder / "b")
    return folder


def merged(pipe):
    "The weights that the UNet computes with, adapter included."
    out = {}
    for name, m in pipe.unet.named_modules():
        if hasattr(m, "lora_A"):
            out[name] = m.base_layer.weight + sum(m.scaling[k] * m.lora_B[k].weight @ m.lora_A[k].weight for k in m.active_adapters)
        elif isinstance(m, torch.nn.Linear) and not {"base_layer", "lora_A", "lora_B"} & set(name.split(".")): out[name] = m.weight
    return {k: v.detach().clone() for k, v in out.items()}


# mixing ------------------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("c", [0., 0.3, 1., 1.7, -0.5])
def test_what_is_interpolated(pipe_folder, adapters, c):
    "Weights are W0 + (1 - c) dW_a + c dW_b, and dW is what plain diffusers adds."
    from diffusers import StableDiffusionPipeline
    def plain(folder=None):
        pipe = StableDiffusionPipeline.from_pretrained(pipe_folder, safety_checker=None)
        if folder: pipe.load_lora_weights(folder)
        return merged(pipe)
    w0, wa, wb = plain(), plain(adapters / "a"), plain(adapters / "b")
    mixed = merged(mix(adapters / "a", adapters / "b", c, pipe_folder))
    assert mixed.keys() == w0.keys()
    for k in w0: assert_close(mixed[k], w0[k] + (1 - c) * (wa[k] - w0[k]) + c * (wb[k] - w0[k]), rtol=1e-5, atol=1e-5)
    to_base = merged(mix("base", adapters / "a", c, pipe_folder))
    for k in w0: assert_close(to_base[k], w0[k] + c * (wa[k] - w0[k]), rtol=1e-5, atol=1e-5)


def test_ranks_add_up(pipe_folder, adapters):
    "Two adapters meet as one whose rank is the sum of theirs; an adapter and the base keep its rank."
    a, b = read_adapter(adapters / "a"), read_adapter(adapters / "b")
    both = mix_adapters(a, b, 0.5)
    assert set(both) == set(a) | set(b) and set(a) != set(b)
    assert {len(A) for n, (A, _) in both.items() if n in a and n in b} == {5}
    assert {len(A) for n, (A, _) in both.items() if n not in b} == {2}
    assert {len(A) for A, _ in mix_adapters({}, a, 0.5).values()} == {2}


def test_a_mixture_loads_in_plain_diffusers(pipe_folder, adapters, tmp_path):
    from diffusers import DDIMScheduler, StableDiffusionPipeline
    mixed = mix(adapters / "a", adapters / "b", 0.4, pipe_folder)
    save_lora(mixed.unet, tmp_path)
    plain = StableDiffusionPipeline.from_pretrained(pipe_folder, safety_checker=None)
    plain.scheduler = DDIMScheduler.from_config(plain.scheduler.config)
    plain.set_progress_bar_config(disable=True)
    base = plain_picture(plain)
    plain.load_lora_weights(tmp_path)
    ours = plain_picture(mixed)
    assert np.array_equal(plain_picture(plain), ours)
    assert np.abs(base - ours).max() > 1e-2
    again = read_adapter(tmp_path)
    for n, (A, B) in read_adapter(mixed).items(): assert_close(again[n][1] @ again[n][0], B @ A)


def test_sources_agree(pipe_folder, adapters, tmp_path):
    "A pipeline, a Run, a run folder, its lora folder and the file say the same."
    run = go(pipe_folder, tmp_path / "run", num_epochs=1, eval_every=0, lora_alpha=8.)
    wanted = {n: B @ A for n, (A, B) in read_adapter(run.pipe).items()}
    assert max(v.abs().max() for v in wanted.values()) > 1e-4
    out = tmp_path / "run"
    for source in (run, out, str(out / "lora"), Run(None, run.config, run.folder), next((out / "checkpoints").iterdir())):
        assert_close({n: B @ A for n, (A, B) in read_adapter(source).items()}, wanted)
    assert read_adapter("base") == {}


def test_two_active_adapters_are_read_as_one(pipe_folder, adapters):
    pipe = load(pipe_folder)
    for name in "ab": pipe.load_lora_weights(adapters / name, adapter_name=name)
    pipe.set_adapters(["a", "b"], [0.5, 2.])
    a, b, both = read_adapter(adapters / "a"), read_adapter(adapters / "b"), read_adapter(pipe)
    for n, (A, B) in both.items():
        assert_close(B @ A, sum(w * x[n][1] @ x[n][0] for w, x in ((0.5, a), (2., b)) if n in x), rtol=1e-5, atol=1e-6)


def test_what_has_no_adapter_is_not_taken_for_the_base_model(pipe_folder, adapters, tmp_path):
    "All weights trained, removed, switched off, fused, or a Run that was put together by hand."
    run = go(pipe_folder, num_epochs=1, eval_every=0, trainable="full")
    for nothing in (run, run.pipe, mount(open_model(pipe_folder), {})):
        with pytest.raises(ValueError, match="the network has none"): mix(nothing, adapters / "a", 0.5, pipe_folder)
    pipe = adapter(pipe_folder, 1)
    assert_close(read_adapter(Run(pipe, run.config)), read_adapter(pipe))  # without its network
    with pytest.raises(TypeError, match="got a Run without pipeline and folder"): read_adapter(Run(None, run.config))
    pipe.unet.disable_adapters()
    with pytest.raises(ValueError, match="it is switched off"): read_adapter(pipe)
    pipe.unet.enable_adapters()
    pipe.fuse_lora()
    with pytest.raises(ValueError, match="it is fused"): read_adapter(pipe)


@pytest.mark.parametrize("c", [math.nan, math.inf, "0.5", None, True, [0.5]])
def test_a_coefficient_is_a_number(pipe_folder, adapters, c):
    with pytest.raises(ValueError, match="coefficient: a finite number .*got"): mix("base", adapters / "a", c, pipe_folder)
    with pytest.raises(ValueError, match="coefficient: a finite number"): mixing_path("base", adapters / "a", (0., c), pipe=pipe_folder)


def test_an_adapter_that_does_not_fit(pipe_folder, adapters, tmp_path):
    a = read_adapter(adapters / "a")
    name = next(iter(a))
    A, B = a[name]
    model = open_model(pipe_folder)
    wide = {**a, name: (torch.zeros(2, A.shape[1] + 1), B)}
    fault = rf"first {name}: .*shape \({len(B)}, {A.shape[1] + 1}\), the pipeline has \({len(B)}, {A.shape[1]}\)"
    with pytest.raises(ValueError, match=rf"adapter mine does not fit this pipeline: 1 of its {len(a)} layers differ, {fault}"):
        check_fit(model, wide, "mine")
    with pytest.raises(ValueError, match="first down_blocks.9.to_q: .*no such layer"): mount(model, {"down_blocks.9.to_q": (A, B)})
    with pytest.raises(ValueError, match="does not fit"): evaluate({"theirs": adapters / "a"}, pipe="tiny", **FEW)
    with pytest.raises(FileNotFoundError, match="holds no LoRA weights"): read_adapter(tmp_path)
    with pytest.raises(TypeError, match="got int"): read_adapter(3)
    from safetensors.torch import save_file
    save_file({"text_encoder.x.lora_A.weight": A, "unet.y.lora_A.weight": A.clone()}, tmp_path / "pytorch_lora_weights.safetensors")
    with pytest.raises(ValueError, match="also changes text_encoder"): read_adapter(tmp_path)


# evaluation --------------------------------------------------------------------------------------------------------------------

NUMBERS = ["mean", "low", "high", "change", "change_low", "change_high"]

def test_the_means_are_those_of_evaluate_fixed(pipe_folder, adapters):
    "Same prompts, noise and pictures as the evaluations of a training, asked with the same purpose."
    table = evaluate({"a": adapters / "a"}, rewards=red, pipe=pipe_folder, diversity=False, purpose="eval", eta=0.5, **FEW)
    model, how = open_model(mix("base", adapters / "a", 1., pipe_folder)), Drawing(purpose="eval", num_inference_steps=3, eta=0.5)
    texts = [FEW["prompts"][i % 2] for i in range(6)]
    fixed, images = evaluate_fixed(model, red, texts, how)
    row = table[(table.subject == "a") & (table.measure == "red")].iloc[0]
    assert_close(row["mean"], fixed["eval_reward_mean"], rtol=1e-4, atol=1e-6)
    assert_close((row.high - row.low) / 2, 1.959964 * fixed["eval_reward_sem"], rtol=1e-3, atol=1e-7)
    kl = drift(model, texts, how)
    assert_close(table[(table.subject == "a") & (table.measure == "drift")]["mean"].item(), kl.mean().item(), rtol=1e-3, atol=1e-5)
    base = draw(pipe_folder, texts, how)
    d = (red(images, texts) - red(base, texts)).double()
    assert_close(row.change, d.mean().item(), rtol=1e-3, atol=1e-6)
    assert_close((row.change_high - row.change_low) / 2, 1.959964 * (d.std() / 6**0.5).item(), rtol=1e-3, atol=1e-6)


def test_every_kind_of_subject(pipe_folder, adapters, tmp_path):
    "Pipelines, runs, folders, several at once: equal weights give equal rows, and what was given is left as it was."
    run = go(pipe_folder, tmp_path / "run", num_epochs=1, eval_every=0)
    before = read_adapter(run)
    subjects = {"run": run, "folder": tmp_path / "run", "lora": tmp_path / "run" / "lora", "pipeline": run.pipe}
    table = evaluate(subjects, rewards=(red, "jpeg_compressibility"), **FEW)
    assert list(dict.fromkeys(table.subject)) == ["base", "run", "folder", "lora", "pipeline"]
    assert set(table.measure) == {"red", "jpeg_compressibility", "diversity", "diversity_per_prompt", "drift"}
    numbers = {s: t.set_index("measure")[NUMBERS] for s, t in table.groupby("subject")}
    for s in ("folder", "lora", "pipeline"): pd.testing.assert_frame_equal(numbers[s], numbers["run"], rtol=1e-3, atol=1e-5)
    assert numbers["base"].change.isna().all() and numbers["base"].loc["drift", "mean"] == 0 and numbers["run"].loc["drift", "mean"] > 0
    assert ((numbers["run"].low <= numbers["run"]["mean"]) & (numbers["run"]["mean"] <= numbers["run"].high)).all()
    for n, (A, B) in read_adapter(run).items(): assert torch.equal(A, before[n][0]) and torch.equal(B, before[n][1])
    assert list(evaluate(tmp_path / "run", rewards=red, **FEW).subject.unique()) == ["base", "run"]  # the run names its pipeline
    page = side_by_side({"run": run, "lora": tmp_path / "run" / "lora"}, FEW["prompts"], 2, num_inference_steps=2, width=40)
    assert page.width > 2 * 40 and page.height > 3 * 40
    assert readable(table).shape == (5, 5) and readable(table, change=True).shape == (4, 5)


def test_a_pipeline_that_is_only_looked_at(pipe_folder):
    "It keeps its scheduler, what is trained and an adapter that is off; the base model is read in its precision: a copy stands still."
    from diffusers import PNDMScheduler
    pipe = adapter(pipe_folder, 1)
    pipe.scheduler = PNDMScheduler.from_config(pipe.scheduler.config)
    pipe.unet.disable_adapters()
    def state(): return pipe.scheduler, pipe.dtype, [p.requires_grad for p in pipe.unet.parameters()]
    before, off = state(), draw(pipe, ["a cow"], num_inference_steps=2)
    table = evaluate({"off": pipe}, rewards=red, pipe=pipe_folder, diversity=False, **FEW)
    side_by_side({"off": pipe}, FEW["prompts"], 2, pipe=pipe_folder, num_inference_steps=2)
    assert state() == before and draw(pipe, ["a cow"], num_inference_steps=2).equal(off)
    assert (table.change.dropna() == 0).all() and (table["mean"][table.measure == "drift"] == 0).all()
    half = evaluate({"half": load(pipe_folder, torch.bfloat16)}, rewards=red, pipe=pipe_folder, diversity=False, **FEW)
    assert (half.change.dropna() == 0).all() and (half["mean"][half.measure == "drift"] == 0).all()


def test_drawn_as_the_run_draws(pipe_folder, tmp_path):
    "Without `how` an examination has the steps, guidance, eta and seed of the first run among its subjects, on noise of its own."
    run = go(pipe_folder, tmp_path / "run", num_epochs=1, eval_every=0, seed=7, eta=0.5, num_inference_steps=3)
    how = Drawing(seed=7, purpose="final", num_inference_steps=3, eta=0.5, batch_size=5)
    assert how_of({"lora": tmp_path / "run" / "lora", "run": run}, None, {}) == how_of({"folder": tmp_path / "run"}, None, {}) == how
    assert how_of({"run": run}, None, dict(eta=1.)).eta == 1 and how_of({"run": run}, FINAL, {}) == how_of({}, None, {}) == FINAL
    with pytest.raises(TypeError, match="guidance"): evaluate(run, FEW["prompts"], red, 6, guidance=3.)


def test_all_weights_trained(pipe_folder, tmp_path):
    "A run without an adapter: its drift is measured from the base model."
    run = go(pipe_folder, tmp_path / "run", num_epochs=1, eval_every=0, trainable="full", learning_rate=1e-3)
    table = evaluate({"full": run}, rewards=red, diversity=False, **FEW).set_index(["subject", "measure"])["mean"]
    assert table["full", "drift"] > 1e-3 and table["base", "drift"] == 0
    with pytest.raises(ValueError, match="trained all weights"): read_adapter(tmp_path / "run")


def test_a_mixing_path(pipe_folder, adapters):
    "Its ends are the two adapters, as `evaluate` has them."
    path = mixing_path(adapters / "a", adapters / "b", (0., 0.5, 1.), rewards=red, pipe=pipe_folder, **FEW)
    ends = evaluate({"a": adapters / "a", "b": adapters / "b"}, rewards=red, pipe=pipe_folder, **FEW)
    for c, s in ((0., "a"), (1., "b")):
        x, y = (t.set_index("measure")[NUMBERS] for t in (path[path.coefficient == c], ends[ends.subject == s]))
        pd.testing.assert_frame_equal(x, y, rtol=1e-3, atol=1e-5)
    line = mixing_path("base", adapters / "a", (0., 0.5, 1.), rewards=red, pipe=pipe_folder, **FEW)
    kl = line[line.measure == "drift"]["mean"].tolist()
    assert kl[0] < 1e-8 < kl[1] < kl[2]
    import matplotlib
    matplotlib.use("Agg")
    assert len(plot_path(line, ["red", "drift"]).axes) == 2
    with pytest.raises(ValueError, match="measures: choose from red"): plot_path(line, ["gold"])


def test_shares_have_intervals_inside_0_and_1(pipe_folder):
    "A reward of 0s and 1s gets Wilson's interval, against published numbers; drift and diversity keep the jackknife's."
    published = {(0, 10): (0., 0.2775), (8, 10): (0.4902, 0.9433), (10, 10): (0.7225, 1.)}
    for (k, n), ends in published.items(): assert_close(share_interval(k, n), ends, rtol=0, atol=1e-4)
    def nobody(images, prompts): return torch.zeros(len(images))
    def half(images, prompts): return torch.arange(len(images)).remainder(2).float()
    def tenth(images, prompts): return torch.arange(len(images)).remainder(2) / 10
    t = evaluate([], rewards=(nobody, half, tenth), pipe=pipe_folder, **FEW).set_index("measure")[["low", "high"]]
    for name, k in (("nobody", 0), ("half", 3)): assert_close(tuple(t.loc[name]), share_interval(k, 6))
    narrow = evaluate([], rewards=half, pipe=pipe_folder, confidence=0.5, **FEW).set_index("measure").loc["half", ["low", "high"]]
    assert_close(tuple(narrow), share_interval(3, 6, 0.5))
    assert_close(tuple(t.loc["drift"]), (0., 0.))
    assert_close(sum(t.loc["tenth"]) / 2, 0.05)
    assert (t.loc["tenth"].high - 0.05) < 0.06


def test_the_jackknife_is_what_it_should_be():
    "For a mean it is s / sqrt(n); for a mean over pairs it covers the truth as often as it says."
    v = torch.randn(9, generator=torch.Generator().manual_seed(0)).double() + 2
    mean, without = leave_one_out(v)
    low, high = interval(mean, without)
    assert_close((high - low) / 2, 1.959964 * v.std().item() / 3, rtol=1e-6, atol=0.)
    x = torch.randn(7, 2, generator=torch.Generator().manual_seed(1)).double()
    texts = list("aabbaab")
    for prompts in (None, texts):
        pairs = [(i, j) for i in range(7) for j in range(i) if prompts is None or texts[i] == texts[j]]
        brute = lambda left: np.mean([(x[i] - x[j]).square().sum().item() for i, j in pairs if left not in (i, j)])
        mean, without = leave_one_out_pairs(torch.cdist(x, x)**2, prompts)
        assert_close([mean, *without.tolist()], [brute(None), *map(brute, range(7))], rtol=1e-6, atol=1e-8)
    g, hit = torch.Generator().manual_seed(2), 0
    for _ in range(400):  # squared distance of two standard normal numbers: 2 on average
        y = torch.randn(60, 1, generator=g).double()
        low, high = interval(*leave_one_out_pairs((y - y.T)**2))
        hit += low < 2 < high
    assert 0.9 < hit / 400 < 0.98


@pytest.mark.parametrize("change, error, words", [
    (dict(num_samples=1), ValueError, "num_samples: a whole number of at least 2"),
    (dict(num_samples=3), ValueError, "too few pairs of one prompt"),
    (dict(prompts=lambda g: "a cat"), ValueError, "no fixed prompts"),
    (dict(rewards="golden"), ValueError, "'golden' is not known"),
    (dict(subjects=["x/lora", "y/lora"]), ValueError, "two are called 'lora'"),
    (dict(subjects={"base": "somewhere"}), ValueError, "call it otherwise"),
    (dict(subjects="nowhere"), FileNotFoundError, "holds no LoRA weights"),
    (dict(eta=2.), ValueError, "eta"),
])
def test_bad_input(pipe_folder, change, error, words):
    with pytest.raises(error, match=words): evaluate(**{**dict(subjects="base", rewards=red, pipe=pipe_folder), **FEW, **change})


def test_another_base_is_refused(pipe_folder, tmp_path):
    go(pipe_folder, tmp_path / "run", num_epochs=1, eval_every=0)
    for call in (evaluate, lambda run, pipe: mixing_path("base", run, pipe=pipe)):
        with pytest.raises(ValueError, match="was trained on .*, but the base model here is 'tiny'"): call(tmp_path / "run", pipe="tiny")


# early stopping ----------------------------------------------------------------------------------------------------------------

blue = Reward(lambda images, prompts: images[:, 2].mean((1, 2)), "jpeg_soft")  # under a name that can be recorded
STOP = dict(eval_every=1, num_epochs=6, early_stop="kl", early_stop_drop=0.0, early_stop_patience=2)


def same_pair(folder, other):
    assert_same_run(folder, other)
    assert ((folder / "lora_best").is_dir(), (other / "lora_best").is_dir()) != (False, True)
    if (folder / "lora_best").is_dir(): assert bits(weights(folder / "lora_best")) == bits(weights(other / "lora_best"))


@pytest.fixture(scope="module")
def drop(pipe_folder):
    "A tolerance that is passed on the way."
    run = go(pipe_folder, eval_every=1, num_epochs=6, eval_kl=True)
    kl = run.history.eval_kl.tolist()
    assert kl[0] < kl[2] < kl[5]
    return (kl[1] + kl[2]) / 2 if kl[1] < kl[2] else kl[2] * 0.99


@pytest.fixture(scope="module")
def stopped_run(pipe_folder, drop, tmp_path_factory):
    out = tmp_path_factory.mktemp("stop") / "run"
    run = go(pipe_folder, out, **{**STOP, "early_stop_drop": drop, "early_stop_patience": 1})
    return out, run


def test_a_run_stops_and_keeps_the_best(pipe_folder, stopped_run, drop):
    out, run = stopped_run
    assert len(run.history) == 3 and run.history.eval_kl.iloc[-1] > drop >= run.history.eval_kl.iloc[:-1].max()
    assert (out / "lora" / "pytorch_lora_weights.safetensors").is_file() and (out / "checkpoints" / "epoch_0002").is_dir()
    e = [run.eval_base["eval_reward_mean"], *run.history.eval_reward_mean.iloc[:2]]
    assert run.best_epoch == int(np.argmax(e)) - 1
    assert (out / "lora_best").is_dir() == (run.best_epoch >= 0)
    if run.best_epoch >= 0:
        best = read_adapter(go(pipe_folder, num_epochs=run.best_epoch + 1, eval_every=0))
        for n, (A, B) in read_adapter(out / "lora_best").items(): assert_close(B @ A, best[n][1] @ best[n][0], rtol=0, atol=0)


@pytest.mark.parametrize("moment", [1, 2])
def test_a_resumed_run_stops_at_the_same_epoch(pipe_folder, stopped_run, drop, tmp_path, moment):
    whole, run = stopped_run
    changes = {**STOP, "early_stop_drop": drop, "early_stop_patience": 1}
    go(pipe_folder, tmp_path / "run", callbacks=[lambda run, row: row["epoch"] == moment - 1], **changes)
    go(pipe_folder, tmp_path / "run", resume=True, **changes)
    same_pair(tmp_path / "run", whole)
    before = history(tmp_path / "run")
    again = go(pipe_folder, tmp_path / "run", resume=True, **{**changes, "num_epochs": 9})  # it is over
    assert history(tmp_path / "run") == before and len(again.rows) == len(before)
    same_pair(tmp_path / "run", whole)


def test_killed_at_any_rename(pipe_folder, stopped_run, drop, tmp_path):
    "SIGKILL at each rename or fsync of an epoch: the folder resumes to the same run and the same two adapters."
    import os, signal
    whole, _ = stopped_run
    changes = {**STOP, "early_stop_drop": drop, "early_stop_patience": 1}
    def victim(out, name):
        original = os.replace
        def deadly(source, target):
            if name in str(target): os.kill(os.getpid(), signal.SIGKILL)
            original(source, target)
        os.replace = deadly
        go(pipe_folder, out, **changes)
    for name in ("lora_best", "epoch_0001"):
        if name == "lora_best" and not (whole / "lora_best").is_dir(): continue
        assert in_child(victim, tmp_path / name, name) == -signal.SIGKILL
        go(pipe_folder, tmp_path / name, resume=True, **changes)
        same_pair(tmp_path / name, whole)


def stop_and_resume(pipe_folder, out, changes):
    "What one of two processes sees: the run, its resumption, the best epoch, and how long a run is that one process alone asks to stop."
    from accelerate import PartialState
    run = go(pipe_folder, out / "run", adam_epsilon=1e-3, **changes)
    again = go(pipe_folder, out / "run", adam_epsilon=1e-3, resume=True, **changes)
    one_asks = lambda run, row: PartialState().process_index == 1 and row["epoch"] == 1
    alone = go(pipe_folder, None, adam_epsilon=1e-3, num_epochs=4, callbacks=[one_asks])
    keep = lambda r: [[row["epoch"], row.get("eval_kl"), row.get("eval_reward_mean")] for row in r.rows]
    return [keep(run), keep(again), run.best_epoch, len(alone.rows)]

def test_two_processes_stop_together(pipe_folder, drop, tmp_path):
    "The main process evaluates, both stop, and neither waits for the other; `in_child` fails if they hang."
    one = go(pipe_folder, eval_every=1, num_epochs=6, eval_kl=True, adam_epsilon=1e-3)
    kl = one.history.eval_kl.tolist()
    changes = dict(STOP, early_stop_drop=(kl[0] + kl[1]) / 2, early_stop_patience=1)
    assert in_child(on_two, lambda: stop_and_resume(pipe_folder, tmp_path, changes), tmp_path) == 0
    ranks = of_two(tmp_path)
    assert ranks[0] == ranks[1]
    assert [e for e, *_ in ranks[0][0]] == [0, 1] and ranks[0][1] == ranks[0][0] and ranks[0][3] == 2
    assert_close([k for _, k, _ in ranks[0][0]], kl[:2], rtol=1e-3, atol=1e-5)


def test_another_reward_as_judge_and_all_weights(pipe_folder, tmp_path):
    "Any of eval_rewards may judge; a run of all weights keeps its best UNet."
    from diffusers import UNet2DConditionModel
    out = tmp_path / "run"
    few = dict(eval_every=1, num_epochs=3)
    judge = dict(eval_rewards=("jpeg_compressibility",), early_stop="jpeg_compressibility", early_stop_drop=1e3)
    run = go(pipe_folder, out, trainable="full", learning_rate=1e-3, **few, **judge)
    assert len(run.rows) == 3 and run.best_epoch == watch(run.eval_base, run.rows)[1]
    if run.best_epoch >= 0: UNet2DConditionModel.from_pretrained(out / "unet_best")
    judge = dict(eval_rewards=("jpeg_incompressibility",), early_stop="jpeg_incompressibility", early_stop_drop=0.)
    run = go(pipe_folder, reward="jpeg_compressibility", **few, **judge)
    values = [run.eval_base["eval_jpeg_incompressibility_mean"], *run.history.eval_jpeg_incompressibility_mean]
    falls = [v < max(values[:i]) for i, v in enumerate(values) if i]
    assert (True in falls and len(falls) == falls.index(True) + 1) or len(falls) == 3


@pytest.mark.parametrize("change, words", [
    (dict(early_stop="gold"), "early_stop: 'gold' is no judge of this run; choose from kl"),
    (dict(eval_every=0), "eval_every: early_stop='kl' judges by evaluations"),
    (dict(early_stop_drop=None), "early_stop_drop: how far 'kl' may fall"),
    (dict(early_stop_drop=math.nan), "early_stop_drop"), (dict(early_stop_drop=-1.), "early_stop_drop"),
    (dict(early_stop_patience=0), "early_stop_patience: a whole number of at least 1"),
    (dict(trainable="full"), "trainable: the drift is measured"),
])
def test_impossible_early_stopping(pipe_folder, tmp_path, change, words):
    with pytest.raises(ValueError, match=words): go(pipe_folder, tmp_path / "run", **{**STOP, **change})
    assert not (tmp_path / "run").exists()


def test_runs_from_before_there_was_early_stopping(pipe_folder, tmp_path):
    "A record without the new fields resumes when they are at their defaults, and reads as a run without a judge."
    out = tmp_path / "run"
    go(pipe_folder, out, num_epochs=2)
    saved = json.loads((out / "config.json").read_text())
    for field in ("eval_kl", "early_stop", "early_stop_drop", "early_stop_patience"): del saved["config"][field]
    (out / "config.json").write_text(json.dumps(saved))
    with pytest.raises(ValueError, match="early_stop was '', now 'kl'"):
        go(pipe_folder, out, resume=True, num_epochs=3, early_stop="kl", early_stop_drop=1.)
    run = go(pipe_folder, out, resume=True, num_epochs=3)
    assert len(run.rows) == 3 and Run(None, saved["config"], None, run.rows, run.eval_base).best_epoch == watch(run.eval_base, run.rows)[1]


def test_recorded_runs_still_read():
    from alignkit.runs import recorded
    for name in ("tiny_aesthetic", "jpeg_compressibility"):
        for run in recorded(name):
            assert "early_stop" not in run.config or run.config["early_stop"] == ""
            # the control never looks at the reward, so that nothing may be better than the base model
            control = run.config["method"] == "rwr" and run.config.get("share") == 1
            assert run.best_epoch >= (-1 if control else 0) and watch(run.eval_base, run.rows, "clip_named", 0.1)[1] >= -1
