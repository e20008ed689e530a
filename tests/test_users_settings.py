"What users give: settings, rewards and prompts. Right values are those of numpy, plain torch, or a run without the fault."
import os, shutil, subprocess, sys, warnings
from pathlib import Path
import numpy as np
import pandas as pd
import pytest
import torch
from torch.testing import assert_close
from alignkit import alignprop, ddpo, rwr
from alignkit.evaluate import evaluate
from alignkit.pipelines import encode, load
from alignkit.prompts import Prompt, get_prompts
from alignkit.rewards import REWARDS, Reward, RewardError, check_alone, get_reward, get_rewards, score
from alignkit.runs import read_run
from conftest import PROMPTS, ROOT, bits, brightness, told, updates_of

FEW = dict(num_epochs=1, samples_per_epoch=8, sample_batch_size=5, num_inference_steps=2, updates_per_epoch=1, learning_rate=1e-2,
           fast="onednn")
METHODS = [(ddpo, ddpo.DDPOConfig), (rwr, rwr.RWRConfig), (alignprop, alignprop.AlignPropConfig)]
IDS = ["ddpo", "rwr", "alignprop"]
three, words = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(0)), ["a cat", "a dog", "a cat"]


def go(pipe_folder, module=ddpo, kind=ddpo.DDPOConfig, reward=brightness, prompts=PROMPTS, out=None, resume=False, **changes):
    reward = Reward(reward, "mine", differentiable=True) if module is alignprop and not isinstance(reward, Reward) else reward
    return module.train(pipe_folder, reward, prompts, kind(**{**FEW, **changes}), out, resume)


# rewards ---------------------------------------------------------------------------------------------------------------------------

def wide(offset): return lambda images, prompts: brightness(images, prompts).double() + offset


def test_float64_rewards_keep_their_differences(pipe_folder):
    "With an offset of 1e9 float32 has steps of 64: advantages, weights and updates must be those without the offset, by numpy."
    for given in (wide(1e9), lambda i, p: wide(1e9)(i, p).numpy(), lambda i, p: wide(1e9)(i, p).tolist()):
        r = score(get_reward(given), three, words)
        assert r.dtype == torch.float64
        assert_close(r - 1e9, wide(0.)(three, words), rtol=0, atol=1e-6)
    assert score(get_reward(lambda i, p: [0, 1, 2]), three, words).dtype == torch.float32  # nothing is lost
    for module, kind in METHODS[:2]:
        runs = [go(pipe_folder, module, kind, wide(offset)).history.iloc[0] for offset in (0., 1e9)]
        assert_close(runs[1].grad_norm, runs[0].grad_norm, rtol=1e-4, atol=0)
        assert_close(runs[1].reward_std, runs[0].reward_std, rtol=1e-5, atol=0)
    r = np.array([3., 1., 2.]) + 1e9
    A = ddpo.BatchStats().advantages(words, torch.from_numpy(r)).numpy()
    assert_close(A, ((r - r.mean()) / r.std()).astype(np.float32), rtol=1e-4, atol=0)


def test_rewards_without_differences_are_told(pipe_folder):
    "Once a run, and why: also where float32 has lost the differences."
    for module, kind in METHODS[:2]:
        with pytest.warns(UserWarning, match="nothing can be learned from these rewards, since all 8 are 0.5$") as said:
            go(pipe_folder, module, kind, lambda i, p: torch.full((len(p),), 0.5), num_epochs=2)
        assert sum("nothing can be learned" in str(w.message) for w in said) == 1
    with pytest.warns(UserWarning, match="in steps of 64, so return float64"):
        go(pipe_folder, reward=lambda i, p: brightness(i, p) + 1e9)


def standardised(images, prompts):
    r = brightness(images, prompts)
    return (r - r.mean()) / (r.std() + 1e-6)


def ranked(images, prompts): return brightness(images, prompts).argsort().argsort().float()


def over_the_best(images, prompts): return brightness(images, prompts) / brightness(images, prompts).max()


@pytest.mark.parametrize("reward, module, kind", [  # a rank has no gradient
    (reward, *m) for reward in (standardised, over_the_best, ranked) for m in METHODS if (reward, m[0]) != (ranked, alignprop)])
def test_a_reward_that_depends_on_its_batch_is_refused(pipe_folder, module, kind, reward):
    with pytest.raises(RewardError, match="judge each picture by itself"): go(pipe_folder, module, kind, reward, micro_batch_size=8)


def test_rewards_that_do_not_depend_on_their_batch_are_let_through():
    "Another number each time is no dependence on the batch; nor is rounding, nor one picture that falls on the other side."
    images, prompts = torch.rand(8, 3, 8, 8), ["a cat"] * 8
    def asked(fn): return check_alone(get_reward(fn), images, prompts, score(get_reward(fn), images, prompts))
    asked(lambda i, p: torch.rand(len(p)))
    asked(lambda i, p: brightness(i, p).half())
    asked(lambda i, p: torch.full((len(p),), 0.3) + 1e-4 * len(p))
    asked(lambda i, p: (brightness(i, p) + 1e-3 * len(p) > 0.26).float())
    with pytest.raises(RewardError, match="among 8 pictures and .* among 4"): asked(standardised)


@pytest.mark.parametrize("name", ["clip_diversity", "clip_diversity_all"])
def test_judges_of_a_set_are_refused_for_training_and_welcome_in_evaluations(pipe_folder, tmp_path, name):
    for given in (name, {name: 1., "jpeg_compressibility": 0.1}):
        with pytest.raises(ValueError, match="judges a set of pictures.*eval_rewards"): go(pipe_folder, reward=given, out=tmp_path / "run")
    assert not (tmp_path / "run").exists()
    run = go("tiny", eval_every=1, eval_samples=4, eval_prompts=tuple(PROMPTS), eval_rewards=name)
    assert run.history[f"eval_{name}_mean"].notna().all()


@pytest.mark.parametrize("module, kind", METHODS, ids=IDS)
def test_a_reward_may_change_its_arguments(pipe_folder, module, kind):
    "In place, pictures and prompts: the run is that of a reward which leaves them alone."
    def rude(images, prompts):
        r = brightness(images, prompts)
        with torch.no_grad(): images.detach().zero_()
        prompts[:] = ["?"] * len(prompts)
        return r
    def asked(reward):
        found = {}
        seen = updates_of(lambda: found.update(run=go(pipe_folder, module, kind, reward, num_epochs=2)))
        return seen, found["run"].history.reward_mean.tolist()
    (a, means_a), (b, means_b) = asked(brightness), asked(rude)
    assert torch.equal(a, b) and means_a == means_b
    both = get_reward({rude: 1., Reward(brightness, "other"): 1.})
    assert_close(score(both, three, words), 2 * brightness(three, words))


class Judge(torch.nn.Module):
    "Dropout and weights of its own, as a user's reward model comes from its training."
    differentiable = True
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Dropout(), torch.nn.Linear(3 * 32 * 32, 1))
        self.net[2].bias.requires_grad_(False)
    def forward(self, images, prompts): return self.net(images)[:, 0]


@pytest.mark.parametrize("kept_in", ["module", "closure", "attribute", "sum"])
def test_networks_of_a_reward_rest_and_are_given_back(pipe_folder, kept_in):
    "Frozen and without dropout while the run lasts: no gradient gathers on their weights, and afterwards all is as it was."
    judge, seen = Judge().train(), []
    judge.register_forward_hook(lambda m, args, out: seen.append((m.net[1].training, m.net[2].weight.requires_grad)))
    class Holds:
        model = None
        def __call__(self, images, prompts): return self.model(images, prompts)
    holds = Holds()
    holds.model = judge
    def closure(images, prompts): return judge(images, prompts)
    reward = dict(module=get_reward(judge), closure=Reward(closure, "judge", True), attribute=Reward(holds, "judge", True))
    reward["sum"] = 0.5 * reward["module"] + Reward(brightness, "b", True)
    go(pipe_folder, alignprop, alignprop.AlignPropConfig, reward[kept_in], micro_batch_size=4)
    assert seen and set(seen) == {(False, False)}
    assert judge.training and judge.net[1].training and judge.net[2].weight.requires_grad and not judge.net[2].bias.requires_grad
    assert all(p.grad is None for p in judge.parameters())


def test_how_to_declare_a_gradient_is_said(pipe_folder):
    with pytest.raises(ValueError, match=r"reward.differentiable = True"):
        alignprop.train(pipe_folder, lambda i, p: brightness(i, p), PROMPTS, alignprop.AlignPropConfig(**FEW))


def nan_for(call, n=1):
    "brightness, but for the first n pictures of one call."
    calls = []
    def reward(images, prompts):
        calls.append(1)
        r = brightness(images, prompts)
        return torch.where(torch.arange(len(r)) < n, float("nan"), r) if len(calls) == call else r
    return reward


@pytest.mark.parametrize("module, kind", METHODS, ids=IDS)
def test_one_nan_is_left_out_by_every_method(pipe_folder, tmp_path, module, kind):
    "Said with its prompt, counted, and the same number of them stops the run; a resumed run goes on counting."
    how = dict(num_epochs=2, micro_batch_size=8, updates_per_epoch=2)
    with pytest.warns(UserWarning, match=r"epoch 0: returned nan for prompt 'a (cat|dog)'.*left out"):
        run = go(pipe_folder, module, kind, nan_for(1), out=tmp_path / "run", **how)
    assert run.history.skipped.tolist() == [1, 1] and np.isfinite(run.history.reward_mean).all()
    with pytest.warns(UserWarning, match="left out"):
        again = Reward(nan_for(1), run.config["reward"], True)
        more = go(pipe_folder, module, kind, again, out=tmp_path / "run", resume=True, **{**how, "num_epochs": 3})
    assert more.history.skipped.tolist() == [1, 1, 2]
    with pytest.raises(RuntimeError, match="max_skipped=0"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        go(pipe_folder, module, kind, nan_for(1), max_skipped=0, **how)


def test_one_nan_in_an_evaluation_is_left_out(pipe_folder):
    "The mean is that of the others; a run that would stop there would stop there again after every resume."
    whole = []
    def first_is_nan(images, prompts):
        r = brightness(images, prompts)
        if prompts == ["a cow"] * 4:
            whole.append(r)
            r = torch.where(torch.arange(4) == 0, float("nan"), r)
        return r
    with pytest.warns(UserWarning, match="nan for prompt 'a cow' .*left out of this evaluation"):
        run = go(pipe_folder, reward=first_is_nan, eval_every=1, eval_samples=4, eval_prompts=("a cow",))
    assert_close(run.eval_base["eval_reward_mean"], whole[0][1:].mean().item(), rtol=1e-6, atol=0)
    assert_close(run.eval_base["eval_reward_sem"], whole[0][1:].std().item() / 3**0.5, rtol=1e-5, atol=0)


def test_a_picture_without_a_reward_teaches_nothing():
    "The others' weights and advantages are those of a batch without it, by the plain functions."
    r, prompts = torch.tensor([1., float("nan"), 3., 2.5]), ["a", "a", "b", "b"]
    there = r.isfinite()
    weights, kept = rwr.weigh(rwr.RWRConfig(beta=1.), r, prompts)
    assert kept == [0, 2, 3] and weights[1] == 0
    assert_close(weights[there], 3 * r[there].softmax(0))
    weights, kept = rwr.weigh(rwr.RWRConfig(weights="sparse", share=0.3), r, prompts)
    assert kept == [2] and weights.tolist() == [0, 0, 1, 0]


def test_every_built_in_reward_checks_its_pictures():
    for name in REWARDS:
        with pytest.raises(ValueError, match=r"pixels must be in \[0, 1\], got -"):
            get_reward(name)(2 * torch.rand(2, 3, 64, 64) - 1, ["a cat"] * 2)


# settings --------------------------------------------------------------------------------------------------------------------------

def dark(images, prompts): return -images.mean((1, 2, 3))


def test_numbers_of_numpy_paths_and_single_things(pipe_folder, tmp_path, monkeypatch):
    "Stored as plain ones; the run is that of the plain settings."
    (tmp_path / "eval.txt").write_text("a cow\n")
    monkeypatch.setenv("HOME", str(tmp_path))
    odd = dict(seed=np.int64(3), learning_rate=np.float64(1e-2), num_epochs=torch.tensor(1), eval_kl=np.bool_(True),
               eval_every=np.int8(1), eval_samples=2, lora_targets="to_q", eval_rewards=dark, eval_prompts=Path("~/eval.txt"),
               early_stop="dark", early_stop_drop=np.float32(10.))
    run = go(pipe_folder, out=tmp_path / "run", **odd)
    plain = dict(odd, seed=3, learning_rate=1e-2, num_epochs=1, eval_kl=True, eval_every=1, lora_targets=("to_q",), eval_rewards=(dark,),
                 eval_prompts=("a cow",), early_stop_drop=10.)
    same = go(pipe_folder, **plain)
    assert bits(run.eval_base["eval_dark_mean"]) == bits(same.eval_base["eval_dark_mean"])
    assert bits(run.history.loss.tolist()) == bits(same.history.loss.tolist())
    saved = read_run(tmp_path / "run").config
    assert (saved["seed"], saved["eval_rewards"], saved["lora_targets"], saved["eval_prompts"]) == (3, ["dark"], ["to_q"], "~/eval.txt")
    assert read_run(tmp_path / "run").best_epoch == run.best_epoch
    go(pipe_folder, out=tmp_path / "run", resume=True, **{**odd, "num_epochs": np.int64(2)})


@pytest.mark.parametrize("changes, words", [
    (dict(seed=-1), "seed: "), (dict(seed=1.5), "seed: a whole number, got 1.5"), (dict(seed=True), "seed: "),
    (dict(num_epochs="3"), "num_epochs: "), (dict(num_inference_steps=0), "num_inference_steps: "),
    (dict(num_inference_steps=1000), "num_inference_steps: "), (dict(learning_rate="1e-3"), "learning_rate: "),
    (dict(learning_rate=float("nan")), "learning_rate: "), (dict(learning_rate=float("inf")), "learning_rate: "),
    (dict(lora_alpha=0.), "lora_alpha: "), (dict(guidance_scale=None), "guidance_scale: "), (dict(adam_beta1=1.), "adam_beta1: "),
    (dict(adam_weight_decay=-1.), "adam_weight_decay: "), (dict(max_skipped=-1), "max_skipped: "),
    (dict(progress="no"), "progress: True or False"), (dict(height=64.5), "height: "),
    (dict(eval_every=1, eval_rewards="gould"), "reward: 'gould'"), (dict(lora_targets="to_nothing"), "lora_targets: "),
    (dict(eval_every=1, eval_prompts="a cat"), "eval_prompts: 'a cat' is neither"),
    (dict(eval_every=1, eval_rewards=(lambda i, p: dark(i, p), lambda i, p: brightness(i, p))), "eval_rewards: two are called '<lambda>'"),
    (dict(eval_every=1, eval_rewards=(Reward(dark, "reward"),)), "eval_rewards: the name 'reward'"),
], ids=lambda x: x if isinstance(x, str) else "")
def test_impossible_settings_are_refused_by_name(pipe_folder, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words): go(pipe_folder, out=tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()


def test_a_config_of_another_method_is_refused(pipe_folder):
    for module, kind in METHODS:
        for other, _ in METHODS:
            if other is not module:
                with pytest.raises(TypeError, match=f"cfg: .*{kind.__name__}.*{module.__name__}.train"):
                    other.train(pipe_folder, cfg=kind())
        with pytest.raises(TypeError, match="without its brackets"): module.train(pipe_folder, cfg=kind)
        with pytest.raises(TypeError, match="cfg: .*got dict"): module.train(pipe_folder, cfg={})


def test_two_rewards_of_one_name(pipe_folder):
    one, other = (lambda i, p: dark(i, p)), (lambda i, p: brightness(i, p))
    with pytest.raises(ValueError, match="two are called '<lambda>'"): get_reward({one: 1., other: 1.})
    with pytest.raises(ValueError, match="rewards: two are called 'dark'"):
        evaluate("base", rewards=(dark, Reward(brightness, "dark")), num_samples=2, diversity=False)
    assert [r.name for r in get_rewards(dark)] == ["dark"]
    for bad in (float("nan"), "2", None, True):
        with pytest.raises(ValueError, match="weights of a sum are finite numbers"): get_reward({dark: bad})


# prompts ---------------------------------------------------------------------------------------------------------------------------

ROWS = [{"prompt": "a cat, sitting", "tag": "one", "count": 1}, {"prompt": "NA", "tag": "two", "count": 2},
        {"prompt": "  ", "tag": "blank", "count": 3}]


def test_tables_of_prompts(tmp_path):
    "From every kind of file and table: the same prompts, and their other columns, as pandas wrote them."
    frame = pd.DataFrame(ROWS)
    frame.to_csv(tmp_path / "a.csv", index=False)
    frame.to_csv(tmp_path / "a.tsv", index=False, sep="\t")
    frame.to_json(tmp_path / "a.jsonl", orient="records", lines=True)
    frame.to_json(tmp_path / "a.json", orient="records")
    for source in (*tmp_path.iterdir(), str(tmp_path / "a.csv"), frame, ROWS):
        got = get_prompts(source)
        assert got.texts == ["a cat, sitting", "NA"], source
        assert [p.metadata for p in got.texts] == [{"tag": "one", "count": 1}, {"tag": "two", "count": 2}]
    assert get_prompts(tmp_path / "a.csv", column="tag").texts == ["one", "two", "blank"]
    (tmp_path / "years.csv").write_text("prompt,count\n1984,1\n007,\n")
    years = get_prompts(tmp_path / "years.csv").texts
    assert years == ["1984", "007"] and np.isnan(years[1].metadata["count"])  # a prompt is a text, a missing number is none
    assert get_prompts(frame.tag).texts == get_prompts(frame.tag.values).texts == ["one", "two", "blank"]


def test_parquet_and_datasets(tmp_path):
    import datasets
    import pyarrow
    pd.DataFrame(ROWS).to_parquet(tmp_path / "a.parquet")
    table = datasets.Dataset(pyarrow.Table.from_pylist(ROWS), fingerprint="rows")
    for source in (tmp_path / "a.parquet", table): assert [p.metadata["count"] for p in get_prompts(source).texts] == [1, 2]
    assert get_prompts(table["tag"]).texts == ["one", "two", "blank"]
    with pytest.raises(ValueError, match="several datasets in one"): get_prompts(datasets.DatasetDict(train=table))


@pytest.mark.parametrize("name, text, words", [
    ("a.txt", "prompt,tag\na cat,x\n", "looks like a table"),
    ("a.txt", '{"prompt": "a cat"}\n{"prompt": "a dog"}\n', "looks like a table"),
    ("a.csv", "prompt,tag\na cat, sitting,animal\n", "no table with commas"),
    ("a.csv", "words\na cat\n", "no column called prompt, text, caption; say which"),
    ("a.csv", "prompt;tag\na cat;x\n", "no column called"),
    ("a.jsonl", '{"prompt": "a cat"}\n{"prompt": \n', "line 2, is not JSON"),
    ("a.jsonl", '{"prompt": 3}\n', "must hold strings, got 3"), ("a.csv", "prompt,tag\n ,x\n", "has no prompt in its column"),
    ("a.csv", "", "no table"),
])
def test_tables_that_cannot_be_read_are_refused(tmp_path, name, text, words):
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=words): get_prompts(tmp_path / name)


def test_metadata_reaches_a_reward_that_asks(pipe_folder, tmp_path):
    "One dict a picture, that of its prompt, in training and through sums; a run on another table is another run."
    pd.DataFrame(ROWS[:2]).to_csv(tmp_path / "a.csv", index=False)
    truth, asked = {"a cat, sitting": "one", "NA": "two"}, []
    def tagged(images, prompts, metadata):
        assert [m["tag"] for m in metadata] == [truth[p] for p in prompts] and len(metadata) == len(images)
        asked.extend(metadata)
        return brightness(images, prompts)
    same = go(pipe_folder, prompts=list(truth)).history.reward_mean[0]
    for module, kind in METHODS: go(pipe_folder, module, kind, tagged, tmp_path / "a.csv")
    assert bits(go(pipe_folder, reward=tagged, prompts=tmp_path / "a.csv", out=tmp_path / "run").history.reward_mean[0]) == bits(same)
    assert len(asked) >= 4 * 8
    score(0.5 * get_reward(tagged) + 1, three[:1], [Prompt("NA", {"tag": "two"})])
    with pytest.raises(RewardError, match="'tagged'.*metadata.*have none"): score(get_reward(tagged), three, words)
    pd.DataFrame(ROWS[:2]).replace("one", "uno").to_csv(tmp_path / "a.csv", index=False)
    how = dict(reward=tagged, prompts=tmp_path / "a.csv", out=tmp_path / "run", resume=True)
    with pytest.raises(ValueError, match="prompts_sha256"): go(pipe_folder, num_epochs=2, **how)


def test_prompts_that_are_too_long_are_told_once(pipe_folder):
    "How many, and the first; in a run all at once; a callable's once."
    long = ["cat " * 100 + "dog", "cat " * 100 + "wolf"]
    pipe = load(pipe_folder)
    first = told(lambda: encode(pipe, ["a cat", *long]), "cut off")
    assert len(first) == 1 and "2 of 3 have more than the" in first[0] and "dog" in first[0] and "wolf" not in first[0]
    assert told(lambda: encode(pipe, long), "cut off") == [] and told(lambda: encode(pipe, PROMPTS), "cut off") == []
    once = told(lambda: go(pipe_folder, prompts=["a cat", *long], num_epochs=2), "cut off")
    assert len(once) == 1 and "2 of 3" in once[0]
    def drawn(g): return f"{'cat ' * 100} {int(torch.randint(9, (), generator=g))}"
    assert len(told(lambda: go(pipe_folder, prompts=drawn, num_epochs=2), "cut off")) == 1


# files of a pipeline ---------------------------------------------------------------------------------------------------------------

def test_a_folder_in_half_precision_only(pipe_folder, tmp_path):
    "Files called .fp16.safetensors: the same pipeline as the plain one, rounded."
    load(pipe_folder, dtype=torch.float16).save_pretrained(tmp_path / "half", variant="fp16")
    half, plain = load(tmp_path / "half"), load(pipe_folder)
    for p, q in zip(half.unet.parameters(), plain.unet.parameters(), strict=True): assert torch.equal(p, q.half().float())


HUB = """
from alignkit.pipelines import load
half, plain = load("owner/half"), load({folder!r})
assert all(p.equal(q.half().float()) for p, q in zip(half.unet.parameters(), plain.unet.parameters(), strict=True))
"""


def test_a_repository_in_half_precision_only(pipe_folder, tmp_path):
    "The same of a repository of the hub, here as it lies in the cache of a machine without a network."
    where = tmp_path / "hub" / "models--owner--half"
    load(pipe_folder, dtype=torch.float16).save_pretrained(where / "snapshots" / ("0" * 40), variant="fp16")
    (where / "refs").mkdir()
    (where / "refs" / "main").write_text("0" * 40)
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", HUB.format(folder=str(pipe_folder))], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_a_single_file_says_how(tmp_path):
    (tmp_path / "model.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match="pipe: .* single file; .*from_single_file"): load(tmp_path / "model.safetensors")


def test_tilde(pipe_folder, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    shutil.copytree(pipe_folder, tmp_path / "model")
    (tmp_path / "p.txt").write_text("a cat\n")
    assert load("~/model").unet.config.sample_size == load(pipe_folder).unet.config.sample_size
    assert get_prompts("~/p.txt").texts == ["a cat"]
