"The planner that chooses what is done at a time, against counting everything: few calls are run, and the others follow to the byte."
import json
from dataclasses import asdict, replace
import pytest
import torch
from alignkit import ddpo, memory
from alignkit.alignprop import AlignPropConfig
from alignkit.ddpo import DDPOConfig
from alignkit.memory import fit, plan
from alignkit.pipelines import open_model
from alignkit.rwr import RWRConfig

OPEN = ("sample_batch_size", "micro_batch_size")


@pytest.fixture
def ran(monkeypatch):
    "The calls that the planner runs, from nothing known; each costs a second or more for Stable Diffusion."
    seen = []
    def counted(name):
        original = getattr(memory, name)
        monkeypatch.setattr(memory, name, lambda *args, **kwargs: (seen.append(name), original(*args, **kwargs))[1])
    for name in ("_call", "_decoding"): counted(name)
    for known in (memory._RUNS, memory._BYTES): known.clear()
    return seen


CHAIN = dict(samples_per_epoch=64, updates_per_epoch=1, num_inference_steps=4, strategy="full", vae_slicing=0)


@pytest.mark.parametrize("cfg, how", [
    (ddpo.preset("ddpo-pytorch"), dict(device="cuda")),
    (RWRConfig(mixed_precision="bf16", trainable="full"), {}),
    (AlignPropConfig(**CHAIN, checkpointing="step", stored_steps=2, mixed_precision="fp16", guidance_scale=5.), dict(device="cuda")),
    (AlignPropConfig(**CHAIN, checkpointing="none", stored_steps=0, trainable="full", mixed_precision="bf16"), {}),
    (DDPOConfig(guidance_scale=3., fast="off"), dict(attention="math")),
], ids=["ddpo", "rwr", "alignprop", "alignprop_full", "math"])
def test_two_calls_of_a_kind_tell_the_others(ran, cfg, how):
    "To the byte, wherever the peak moves; the third size runs nothing."
    def planned(n): return plan("tiny", replace(cfg, sample_batch_size=n, micro_batch_size=n), **how)
    for n in (3, 12): planned(n)
    both = len(ran)
    foretold = planned(7)
    assert len(ran) == both
    for known in (memory._RUNS, memory._BYTES): known.clear()
    counted = planned(7)
    assert len(ran) == both + both // 2
    assert foretold.phases.equals(counted.phases) and foretold.per_call == counted.per_call


@pytest.mark.parametrize("guidance, sizes", [(1., [80, 40, 5]), (3., [40, 20, 5])], ids=["plain", "guided"])
def test_the_edge_at_64_rows(ran, guidance, sizes):
    "Diffusers' upsampling does something else from 64 rows on: what `fit` foretold on both sides of it is what is counted."
    cfg = DDPOConfig(samples_per_epoch=80, updates_per_epoch=1, num_inference_steps=1, guidance_scale=guidance)
    for size in sizes: fit("tiny", replace(cfg, sample_batch_size=size), 100, keep=("sample_batch_size",))
    with pytest.raises(memory.NothingFits): fit("tiny", cfg, 0.001)
    foretold, ran_ = dict(memory._BYTES), {(kind, n) for kind, runs in memory._RUNS.items() for n in runs}
    compared = 0
    for size in sizes:
        for known in (memory._RUNS, memory._BYTES): known.clear()
        plan("tiny", replace(cfg, sample_batch_size=size, micro_batch_size=size))
        for key, numbers in memory._BYTES.items():
            assert foretold.get(key, numbers) == numbers, key[1:]
            compared += key in foretold and key not in ran_
    assert compared >= 4


def test_calls_that_differ_in_more_than_sizes_are_counted(ran, monkeypatch):
    "A network that does something else for a larger batch is not guessed."
    at = dict(samples_per_epoch=64, updates_per_epoch=1, num_inference_steps=2)
    original = memory._one_step
    def other(scale, grad):
        def make(p):
            run, more = original(scale, grad)(p)
            return (lambda: (run(), torch.empty(1000) if len(p.latents) > 4 else None)[0]), more
        return make
    monkeypatch.setattr(memory, "_one_step", other)
    def planned(n): return plan("tiny", DDPOConfig(**at, sample_batch_size=n, micro_batch_size=2)).phases
    for n in (3, 12): planned(n)
    before = len(ran)
    foretold = planned(8)
    assert len(ran) == before + 1  # the step; the decoding of 8 follows
    for known in (memory._RUNS, memory._BYTES): known.clear()
    assert foretold.equals(planned(8))


def test_presets_fit_on_cards(ran):
    "The README's example on a 24 GB card, and on smaller ones; few calls are run, whatever the cards."
    table = json.loads((memory.data_dir() / "cards.json").read_text(encoding="utf-8"))["rows"]
    ways = {gb: fit("sd15", ddpo.preset("ddpo-pytorch"), memory.MARGIN * gb, progress=False) for gb in (24, 16, 12, 8)}
    assert len(ran) <= 12, ran
    peaks = [plan("sd15", cfg).peak_gb for cfg in ways.values()]
    assert len(ran) <= 12
    for gb, peak in zip(ways, peaks): assert 0.5 * memory.MARGIN * gb < peak <= memory.MARGIN * gb
    paired = [cfg.micro_batch_size for cfg in ways.values()]
    assert paired == sorted(paired, reverse=True) and paired[0] > 4 and paired[-1] >= 1
    alike = [{k: v for k, v in asdict(cfg).items() if k not in OPEN} for cfg in ways.values()]
    assert all(a == alike[0] for a in alike)  # the update stays
    shipped = [row["chosen"] for row in table if row["preset"] == "ddpo-pytorch"]
    assert shipped == [{k: getattr(cfg, k) for k in OPEN} for cfg in ways.values()]
    assert all("chosen" in row for row in table if row["card_gb"] == 24)
    before, trl = len(ran), fit("sd15", ddpo.preset("trl"), memory.MARGIN * 24, progress=False)
    assert len(ran) <= before + 3 and trl.micro_batch_size > 1
    foretold = plan("sd15", ways[24])
    for known in (memory._RUNS, memory._BYTES): known.clear()
    assert plan("sd15", ways[24]).phases.equals(foretold.phases)  # each of its calls counted


def test_a_plan_is_under_way_and_says_so(monkeypatch, capfd):
    "On a terminal a line that is drawn anew, elsewhere one every five seconds; nothing on stdout, and nothing where nobody wants it."
    cfg, clock = DDPOConfig(samples_per_epoch=8), iter(range(0, 10_000, 3))
    def asked(**how):
        for known in (memory._RUNS, memory._BYTES): known.clear()
        fit("tiny", cfg, 1, **how)
        return capfd.readouterr()
    monkeypatch.setattr(memory.time, "perf_counter", lambda: next(clock))
    lines = asked(progress=True)
    assert lines.out == "" and 2 <= len(lines.err.splitlines()) <= 6
    assert all(line.startswith("what fits: counting a ") for line in lines.err.splitlines()), lines.err
    assert asked(progress=False) == ("", "")
    monkeypatch.setenv("ALIGNKIT_PROGRESS", "0")
    assert asked() == ("", "")
    monkeypatch.setenv("ALIGNKIT_PROGRESS", "1")
    assert "what fits" in asked().err
    monkeypatch.undo()
    monkeypatch.setattr(memory, "_bars", lambda: True)
    drawn = asked(progress=True).err
    assert "\r" in drawn and "counting a loss of 2 rows" in drawn and drawn.endswith(" \r")  # it is taken away at the end


def test_a_model_is_planned_for_the_size_of_the_run():
    "As `train` draws it: the config's size, where it has one, over that for which the Model was opened."
    cfg = DDPOConfig(sample_batch_size=8, micro_batch_size=8)
    own, wide = open_model("tiny"), open_model("tiny", 96, 64)
    def peak(pipe, **size): return plan(pipe, replace(cfg, **size)).peak_gb
    asked = peak("tiny", height=96, width=64)
    assert asked > peak("tiny")
    assert peak(own, height=96, width=64) == peak(own.pipe, height=96, width=64) == peak(wide) == peak(wide, height=96) == asked
    assert peak(wide, height=64, width=64) == peak(own) == peak("tiny")
