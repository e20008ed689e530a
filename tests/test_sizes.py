"What is done at a time: open in a config, chosen when a run begins, in the record, and taken up again."
import json, math
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace
import pytest
import torch
from alignkit import alignprop, ddpo, memory, rwr, start
from alignkit.alignprop import AlignPropConfig
from alignkit.ddpo import DDPOConfig
from alignkit.evaluate import evaluate
from alignkit.memory import NothingFits, fit, plan
from alignkit.pipelines import load
from alignkit.rwr import RWRConfig
from alignkit.training import TINY, as_many, drawing
from conftest import PROMPTS, assert_same_run, brightness, on_two, small, updates_of

OPEN = dict(sample_batch_size=None, micro_batch_size=None)


def config(folder):
    "The record of a run."
    return json.loads((Path(folder) / "config.json").read_text(encoding="utf-8"))["config"]


def trained(pipe, cfg, out=None, **how): return ddpo.train(pipe, brightness, PROMPTS, cfg, out, **how)


def test_open_sizes_on_a_cpu_are_fixed(pipe_folder, tmp_path):
    "64 at a time for the embedded pipeline, as in recorded runs: the same run bit for bit, and the record says that it was left open."
    few = dict(num_epochs=2, eval_every=1)
    for name, sizes in dict(open=OPEN, said=dict(sample_batch_size=64, micro_batch_size=64)).items():
        trained(pipe_folder, small(**few, **sizes), tmp_path / name)
    assert_same_run(tmp_path / "open", tmp_path / "said")
    one, other = config(tmp_path / "open"), config(tmp_path / "said")
    assert [one.pop("left_open"), other.pop("left_open")] == [list(OPEN), []] and one == other
    assert [as_many(64, area) for area in (TINY // 4, TINY, 64 * 64, 96 * 64, 128 * 128)] == [64, 64, 4, 2, 1]
    tiny, sd = AlignPropConfig().sized(), alignprop.preset("alignprop-paper").sized(64 * 64)
    assert (tiny.micro_batch_size, tiny.checkpointing, tiny.stored_steps, tiny.vae_slicing) == (16, "none", 0, 0)
    assert (sd.micro_batch_size, sd.checkpointing) == (1, "step")


def test_an_open_config_can_be_looked_at(pipe_folder, tmp_path):
    "Plans, drawings and evaluations see numbers."
    assert plan("tiny", DDPOConfig()).phases.equals(plan("tiny", DDPOConfig(sample_batch_size=64, micro_batch_size=64)).phases)
    assert plan("tiny", DDPOConfig(), resolution=128).settings["micro_batch_size"] == 16
    assert drawing(asdict(DDPOConfig())).batch_size == 64
    run = trained(pipe_folder, small(num_epochs=1, memory_budget_gb=1, **OPEN), tmp_path / "run")
    assert run.config["sample_batch_size"] == drawing(run.config).batch_size == 8
    table = evaluate(tmp_path / "run", ["a cow"], [brightness], num_samples=2, diversity=False, with_drift=False)
    assert len(table) >= 2


@pytest.mark.parametrize("module, cfg, given", [
    (ddpo, small(num_epochs=1, eval_every=0, **OPEN), {}),
    (ddpo, small(num_epochs=1, eval_every=0, **OPEN), dict(micro_batch_size=3)),
    (rwr, RWRConfig(num_epochs=1, samples_per_epoch=8, updates_per_epoch=2, num_inference_steps=2), dict(sample_batch_size=5)),
    (alignprop, AlignPropConfig(num_epochs=1, samples_per_epoch=4, updates_per_epoch=1, num_inference_steps=3), dict(checkpointing="step")),
], ids=["ddpo", "ddpo_kept", "rwr_kept", "alignprop_kept"])
def test_memory_chooses_what_is_open(pipe_folder, tmp_path, capsys, module, cfg, given):
    "The record has what `fit` chooses around what is set; it is told in one line, and the plan of it fits."
    given_cfg = replace(cfg, **given)
    names, keep = tuple(cfg.usual()), tuple(given)
    leanest_way = {k: v for k, v in cfg.knobs()[-1].items() if k not in given}
    leanest = plan(pipe_folder, replace(given_cfg, **leanest_way), device="cpu").peak_gb
    budget = round(1.3 * leanest, 6)
    red = start.Reward(brightness, "brightness", differentiable=True)
    run = module.train(pipe_folder, red, PROMPTS, replace(given_cfg, memory_budget_gb=budget), tmp_path / "run")
    best = fit(pipe_folder, given_cfg, budget, device="cpu", keep=keep)
    assert plan(pipe_folder, best, device="cpu").peak_gb <= budget
    saved = config(tmp_path / "run")
    assert {k: saved[k] for k in names} == {k: getattr(best, k) for k in names} and {k: saved[k] for k in keep} == given
    assert sorted(saved["left_open"]) == sorted(set(names) - set(keep)) and saved["memory_budget_gb"] == budget
    line = [x for x in capsys.readouterr().out.splitlines() if x.startswith("what fits in")]
    assert len(line) == 1 and all(f"{k}={getattr(best, k)!r}" in line[0] for k in saved["left_open"]), line
    assert run.config["micro_batch_size"] == best.micro_batch_size


def test_what_was_chosen_trains_the_same(pipe_folder):
    "Another budget, another way, the same update but for float error."
    cfg = small(num_epochs=2, adam_epsilon=1e-3, **OPEN)
    least = plan(pipe_folder, replace(cfg, sample_batch_size=1, micro_batch_size=1), device="cpu").peak_gb
    free, tight = (updates_of(lambda: trained(pipe_folder, replace(cfg, memory_budget_gb=gb))) for gb in (100, 1.05 * least))
    assert (free[-1] - free[0]).abs().max() > 1e-3
    torch.testing.assert_close(tight, free, rtol=0, atol=2e-4 * (free[-1] - free[0]).abs().max().item())


def test_a_run_that_goes_on(pipe_folder, tmp_path):
    "It does as it did, also where more would fit; where it no longer fits it does less at a time; what is set by then stays."
    cfg, folder = small(num_epochs=1, eval_every=0, **OPEN), tmp_path / "run"
    least = plan(pipe_folder, replace(cfg, sample_batch_size=1, micro_batch_size=1), device="cpu").peak_gb
    trained(pipe_folder, replace(cfg, memory_budget_gb=1.3 * least), folder)
    sizes = lambda: tuple(config(folder)[k] for k in (*OPEN, "left_open"))
    first = sizes()
    def on(epochs, cfg=None, **more):
        start_over = dict(override=dict(num_epochs=epochs, **more)) if cfg is None else {}
        trained(pipe_folder, cfg and replace(cfg, num_epochs=epochs, **more), resume=folder, **start_over)
        return sizes()
    assert first[1] > 1 and on(2, memory_budget_gb=100) == first
    assert on(3, cfg, memory_budget_gb=None) == first  # given anew, and still open
    leaner = on(4, memory_budget_gb=1.02 * least)
    assert leaner[:2] < first[:2] and leaner[2] == first[2]
    assert on(5, micro_batch_size=5, memory_budget_gb=100)[1:] == (5, ["sample_batch_size"])
    changes = [c["settings"] for c in json.loads((folder / "config.json").read_text())["changes"]]
    assert any("micro_batch_size" in c for c in changes)
    assert len((folder / "history.csv").read_text().splitlines()) == 6


def test_nothing_fits(pipe_folder, tmp_path):
    "Said before any work, with what would do and how to go on all the same."
    cfg = small(memory_budget_gb=1e-5, **OPEN)
    with pytest.raises(NothingFits, match=r"memory_budget_gb: nothing fits in 1e-05 GB; the least that does, .* memory_budget_gb=None"):
        trained(pipe_folder, cfg, tmp_path / "run")
    assert not (tmp_path / "run").exists()
    assert len(trained(pipe_folder, replace(cfg, memory_budget_gb=None, num_epochs=1)).history) == 1
    assert len(trained(pipe_folder, replace(cfg, micro_batch_size=6, sample_batch_size=5, num_epochs=1)).history) == 1  # nothing to choose


def test_auto_asks_the_gpu(pipe_folder, tmp_path, monkeypatch):
    "Nine tenths of what is free, with what the pipeline and the allocator have taken; a reward's network lies elsewhere and needs room."
    pipe = load(pipe_folder)
    own = sum(p.nbytes for part in (pipe.unet, pipe.vae, pipe.text_encoder) for p in part.parameters())
    for name, value in dict(is_available=True, mem_get_info=(10**9, 2 * 10**9), memory_reserved=3 * 10**8, memory_allocated=10**8).items():
        monkeypatch.setattr(torch.cuda, name, lambda value=value: value)
    assert math.isclose(memory.free_gb(pipe, "cuda"), (1.2e9 + own) / 1e9)
    gpu = SimpleNamespace(device=torch.device("cuda"))
    assert math.isclose(start._budget(small(), pipe, gpu), 0.9 * (1.2e9 + own) / 1e9)
    monkeypatch.undo()
    # a run whose device says that it has room for little
    cfg = small(num_epochs=1, eval_every=0, **OPEN)
    least = plan(pipe_folder, replace(cfg, sample_batch_size=1, micro_batch_size=1), device="cpu").peak_gb
    monkeypatch.setattr(start, "_budget", lambda cfg, model, accelerator: 1.1 * least)
    plain = trained(pipe_folder, cfg).config
    judge = torch.nn.Linear(3, 1)
    monkeypatch.setattr(start, "_networks_bytes", lambda *args: int(0.09e9 * least))
    heavy = ddpo.train(pipe_folder, lambda images, prompts: judge(images.mean((2, 3)))[:, 0], PROMPTS, cfg).config
    assert heavy["micro_batch_size"] * heavy["sample_batch_size"] < plain["micro_batch_size"] * plain["sample_batch_size"] < 8 * 16


def test_two_processes_agree(pipe_folder, tmp_path):
    "The first one chooses, for the least that any has free and for its share of the pictures."
    cfg = small(num_epochs=1, eval_every=0, **OPEN)
    share = replace(cfg, samples_per_epoch=4, sample_batch_size=1, micro_batch_size=1)
    least = plan(pipe_folder, share, device="cpu").peak_gb
    def go():
        from accelerate import PartialState
        start.free_gb = lambda pipe, device: least * (1.3 if PartialState().process_index else 30.) / memory.MARGIN
        start._budget, real = lambda cfg, model, accelerator: real(cfg, model, SimpleNamespace(device=torch.device("cuda"))), start._budget
        run = trained(pipe_folder, cfg, tmp_path / "run")
        return torch.tensor([run.config["sample_batch_size"], run.config["micro_batch_size"]])
    one, other = on_two(go, tmp_path)
    assert one.tolist() == other.tolist() == [config(tmp_path / "run")[k] for k in OPEN]
    alone = fit(pipe_folder, cfg, 1.3 * least, processes=2, device="cpu")
    assert one.tolist() == [alone.sample_batch_size, alone.micro_batch_size]


@pytest.mark.parametrize("how, word", [
    (dict(memory_budget_gb=0), "memory_budget_gb: 'auto', None, or a number of GB"), (dict(memory_budget_gb=-3.), "memory_budget_gb"),
    (dict(memory_budget_gb="all"), "memory_budget_gb"), (dict(memory_budget_gb=True), "memory_budget_gb"),
    (dict(memory_budget_gb=float("nan")), "memory_budget_gb"), (dict(reward_memory_gb=-1), "reward_memory_gb"),
    (dict(micro_batch_size=0), "micro_batch_size: a whole number of at least 1"), (dict(sample_batch_size=2.5), "sample_batch_size"),
], ids=str)
def test_impossible_sizes(how, word):
    for kind in (DDPOConfig, RWRConfig, AlignPropConfig):
        with pytest.raises(ValueError, match=word): kind(**how).check()


def test_a_pipeline_that_cannot_be_planned_trains(pipe_folder, monkeypatch):
    "A part of the user's own that cannot be made again without weights is no reason not to train."
    pipe = load(pipe_folder)
    class Own(type(pipe.unet)): pass
    pipe.unet.__class__ = Own  # of a function: nobody can import it
    with pytest.warns(UserWarning, match="memory_budget_gb: this run cannot be planned .* a fixed size is taken"):
        run = trained(pipe, small(num_epochs=1, eval_every=0, memory_budget_gb=1, **OPEN))
    assert run.config["micro_batch_size"] == 64
