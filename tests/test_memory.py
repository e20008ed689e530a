"A plan against the real `train` functions: what the allocator saw is within a tenth of it. And `fit` against trying everything."
import gc, math, time
from dataclasses import fields, replace
from importlib import import_module
import pytest
import torch
from alignkit import alignprop, ddpo, memory, rwr
from alignkit.alignprop import AlignPropConfig, kept_steps, most_kept
from alignkit.ddpo import DDPOConfig
from alignkit.memory import fit, measured_peak, plan
from alignkit.mdp import generator_for
from alignkit.pipelines import cast, load, open_model
from alignkit.rewards import Reward
from alignkit.rwr import RWRConfig
from conftest import brightness

red = Reward(brightness, "brightness", differentiable=True)
LOADED = ["network weights", "VAE weights", "text encoder weights"]  # before the measurement begins; they would flatter the plan
HALF = {"fp16": torch.float16, "bf16": torch.bfloat16}


def prepared(cfg):
    "The embedded pipeline as `train` lays it out, so that the copies are not measured."
    pipe = load("tiny")
    for part in (pipe.vae, pipe.text_encoder, *([pipe.unet] if cfg.trainable == "lora" else [])):
        if cfg.mixed_precision != "no": cast(part, HALF[cfg.mixed_precision])
    for part in (pipe.unet, pipe.vae): part.to(memory_format=torch.channels_last)
    return pipe


def compare(train, cfg, reward=red):
    pipe = prepared(cfg)
    predicted = plan(pipe, cfg).phases.drop(LOADED).sum()
    measured = measured_peak(lambda: train(pipe, reward, "simple_animals", cfg))
    error = predicted.max() / measured - 1
    print(f"\n{predicted.max() / 1e6:.1f} MB planned ({predicted.idxmax()}), {measured / 1e6:.1f} MB measured, {100 * error:+.1f} %")
    # what no plan counts: a processor without bf16 arithmetic keeps float32 copies of what it multiplies in bf16 (7 and 10 %), and one
    # without AVX unfolds a picture into 3 x 3 neighbours before it convolves it (the decoder's 32 channels of 64 x 64)
    unfolded = 0 if "AVX" in torch.backends.cpu.get_cpu_capability() else 4 * 9 * 32 * 64 * 64
    assert abs(predicted.max() - measured) < (0.1 if cfg.mixed_precision == "no" else 0.15) * measured + unfolded


def slow(images, prompts):
    time.sleep(0.3)
    return brightness(images, prompts)


# against the allocator ---------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("how", [
    dict(strategy="last", truncation_k=2),
    dict(strategy="full", checkpointing="step", micro_batch_size=2),
    dict(strategy="full", checkpointing="step", stored_steps=2, mixed_precision="bf16"),
    dict(strategy="last", truncation_k=2, guidance_grad="text"),
    dict(strategy="last", checkpointing="step", vae_slicing=1),
    dict(strategy="draft_lv", renoise=3),
    dict(strategy="full", trainable="full", mixed_precision="bf16", guidance_scale=1.),
    dict(strategy="last", fast="off"),
    # an evaluation draws more at a time than is trained on
    dict(strategy="last", samples_per_epoch=2, updates_per_epoch=1, num_inference_steps=1, eval_every=1, eval_samples=24),
], ids=str)
def test_alignprop(how):
    small = dict(num_epochs=1, samples_per_epoch=8, updates_per_epoch=2, num_inference_steps=4, micro_batch_size=4, guidance_scale=3.)
    compare(alignprop.train, AlignPropConfig(**{**small, **how}))


@pytest.mark.parametrize("how", [
    dict(micro_batch_size=8),
    dict(micro_batch_size=8, mixed_precision="bf16", samples_per_epoch=8, num_inference_steps=2),
    dict(micro_batch_size=16, mixed_precision="bf16", samples_per_epoch=8, trainable="full", guidance_scale=1.),
    dict(micro_batch_size=4, guidance_scale=1., samples_per_epoch=2, num_inference_steps=2, eval_every=1, eval_samples=24,
         sample_batch_size=24, eval_guidance_scale=3.),
], ids=str)
def test_ddpo(how):
    small = dict(num_epochs=1, samples_per_epoch=16, updates_per_epoch=2, num_inference_steps=4, guidance_scale=3., sample_batch_size=16)
    compare(ddpo.train, DDPOConfig(**{**small, **how}))


@pytest.mark.parametrize("how", [
    dict(micro_batch_size=8),
    dict(micro_batch_size=4, guidance_scale=3.),
    dict(micro_batch_size=1, sample_batch_size=8),  # the drawing is the peak
    dict(micro_batch_size=4, trainable="full", mixed_precision="bf16"),
], ids=str)
def test_rwr(how):
    "RWR is planned as itself."
    small = dict(num_epochs=1, samples_per_epoch=16, updates_per_epoch=2, num_inner_epochs=1, num_inference_steps=2, sample_batch_size=4)
    compare(rwr.train, RWRConfig(**{**small, **how}), slow)


def test_pictures_wait_for_a_slow_reward():
    "While a reward is slower than the drawing, all pictures of an epoch are there; afterwards the first 16."
    cfg = DDPOConfig(num_epochs=1, samples_per_epoch=64, updates_per_epoch=1, num_inference_steps=2, timestep_fraction=0.5,
                     sample_batch_size=8, micro_batch_size=4)
    compare(ddpo.train, cfg, slow)
    phases = plan("tiny", cfg).phases.drop(LOADED)
    picture, data = 3 * 64 * 64 * 4, phases.loc["latents, noise, pictures"]
    assert phases.sum().idxmax() in ("sample", "decode")
    assert data["sample"] - data["backward"] > 30 * picture and data["backward"] == 64 * 3 * 4096 + 16 * picture


def live_bytes():
    "Of all tensors that Python knows of."
    storages = [x.untyped_storage() for x in gc.get_objects() if type(x) in (torch.Tensor, torch.nn.Parameter)]
    return sum({s.data_ptr(): s.nbytes() for s in storages}.values())


@pytest.mark.parametrize("train, cfg", [
    (ddpo.train, DDPOConfig(updates_per_epoch=1, num_inference_steps=30, timestep_fraction=0.04)),
    (rwr.train, RWRConfig(updates_per_epoch=1, num_inner_epochs=1, num_inference_steps=1)),
], ids=["ddpo", "rwr"])
def test_an_epoch_does_not_keep_the_one_before(train, cfg):
    "A plan of one epoch is one of several: the walks and pictures of the last one are gone when the next are drawn."
    seen = []
    def reward(images, prompts):
        seen.append(live_bytes())
        return brightness(images, prompts)
    cfg = replace(cfg, num_epochs=2, samples_per_epoch=32, sample_batch_size=32, micro_batch_size=8)
    run = train("tiny", reward, "simple_animals", cfg)
    state = 3 * sum(p.nbytes for p in run.net.parameters() if p.requires_grad)  # Adam's, and a gradient that is not yet taken away
    assert seen[1] - seen[0] < 1.1 * state < 32 * 4096 * (31 if train is ddpo.train else 4)


# plan --------------------------------------------------------------------------------------------------------------------------------

def test_a_plan_takes_a_name_a_folder_a_pipeline_or_a_model(pipe_folder):
    "The same bytes whichever way the architecture is given, and nothing is changed on what was given."
    cfg, pipe = DDPOConfig(micro_batch_size=2, sample_batch_size=2), load(pipe_folder)
    before = {k: v.clone() for k, v in pipe.unet.state_dict().items()}
    plans = [plan(given, cfg, device="cpu") for given in (pipe_folder, pipe, open_model(pipe))]
    for p in plans[1:]: assert p.phases.equals(plans[0].phases) and p.settings == plans[0].settings
    assert plans[0].settings["resolution"] == 32 and pipe.unet.state_dict().keys() == before.keys()
    assert not any(x.requires_grad or "forward" in m.__dict__ for m in pipe.unet.modules() for x in m.parameters())
    ids = ("stable-diffusion-v1-5/stable-diffusion-v1-5", "CompVis/stable-diffusion-v1-4", "sd15")
    assert memory.architecture(ids[0]) == memory.architecture(ids[1]) == memory.architecture(ids[2])


def test_height_and_width():
    "A plan is for the size of the run: as asked, as the config says, or as the model was opened."
    cfg = DDPOConfig(micro_batch_size=2, sample_batch_size=2, samples_per_epoch=8)
    square, tall = plan("tiny", cfg), plan("tiny", cfg, resolution=(128, 64))
    assert (square.settings["resolution"], tall.settings["resolution"]) == (64, (128, 64))
    for other in (plan("tiny", cfg, height=128, width=64), plan(open_model("tiny", 128, 64), cfg)): assert other.phases.equals(tall.phases)
    A = [p.per_call["network activations of one micro-batch"] for p in (square, tall, plan("tiny", cfg, resolution=128))]
    assert A[0] < A[1] < A[2] and 1.8 < A[1] / A[0] < 2.2
    with pytest.raises(ValueError, match="width: a multiple of 16"): plan("tiny", cfg, resolution=(64, 72))


def test_both_halves_of_an_update_hold_its_activations():
    p = plan("tiny", DDPOConfig(micro_batch_size=4, samples_per_epoch=8))
    held = p.per_call["network activations of one micro-batch"]
    assert held > 0 and (p.phases.loc["network activations", ["forward", "backward"]] == held).all()
    assert (p.phases.loc["workspace", ["forward", "backward"]] > 0).all()


def test_an_unknown_part_is_refused():
    "A part that the table does not have would be lost in silence."
    class Odd(DDPOConfig):
        def phases(self, bytes_of): return {"sample": {"UNet activations": 1}}
    with pytest.raises(ValueError, match="Odd has a part 'UNet activations'"): plan("tiny", Odd())


def test_sdxl():
    "Opened by its own family: planned at 1024 pixels in bf16, two bytes a number; its decoder turns to float32 in fp16, and a plan knows."
    cfg = DDPOConfig(mixed_precision="bf16", guidance_scale=5., num_inference_steps=50, sample_batch_size=1, micro_batch_size=1)
    p = plan("sdxl", cfg)
    weights = p.phases.iloc[:, 0]
    numbers = {"network weights": 2_567_463_684, "VAE weights": 83_653_863, "text encoder weights": 123_060_480 + 694_659_840}
    for part, n in numbers.items(): assert 2 * n <= weights[part] < 2 * n * 1.001, part
    assert p.settings["resolution"] == 1024 and 20 < p.peak_gb < 40
    world = memory._world("sdxl", replace(cfg, mixed_precision="fp16"), None, None, "sdpa")
    assert 4 * 83_653_863 <= memory._weights(world)[0]["VAE weights"] < 4 * 83_653_863 * 1.001


@pytest.mark.parametrize("shapes, nbytes", [
    ([(64, 64), (63, 65), (320, 4), (5000,)], 63528), ([(16, 16)], 2048), ([(320, 1280), (4, 320)], 844288)])
def test_8bit_adam_is_that_of_bitsandbytes(shapes, nbytes):
    "Bytes of the state that bitsandbytes 0.50.2's AdamW8bit makes in init_state for parameters of these shapes."
    assert memory._adam8bit_bytes([torch.nn.Parameter(torch.zeros(shape)) for shape in shapes]) == nbytes


def test_8bit_adam_in_a_plan():
    cfg = DDPOConfig(samples_per_epoch=8, micro_batch_size=4)
    plain, small = (plan("tiny", cfg, use_8bit_adam=on).phases.loc["optimiser state"].max() for on in (False, True))
    assert 0 < small < plain


# presets -----------------------------------------------------------------------------------------------------------------------------

def test_the_most_steps_that_a_strategy_keeps():
    "A plan is for the worst update."
    for strategy in alignprop.STRATEGIES:
        most = most_kept(AlignPropConfig(strategy=strategy, num_inference_steps=8, truncation_k=3))
        drawn = max(int(kept_steps(strategy, 8, generator_for(0, strategy, i), 3).sum()) for i in range(200))
        assert drawn <= most and (strategy in ("per_step", "gaussian") or drawn == most), strategy


@pytest.mark.parametrize("name", alignprop.PRESETS)
def test_presets_are_planned_as_they_are(name):
    cfg = alignprop.preset(name, micro_batch_size=4)
    an_update = cfg.samples_per_epoch // cfg.updates_per_epoch
    p = plan("tiny", cfg)
    assert p.settings["micro_batch_size"] == min(4, an_update) and p.settings["accumulates"] == (an_update > 4)
    assert p.settings["kept_steps"] == (1 if name.endswith("k1") else 50)


@pytest.mark.parametrize("module", ["ddpo", "rwr", "alignprop"])
def test_every_preset_on_the_real_architecture(module):
    "A dry run of one update of each preset on SD 1.5's architecture, small pictures, on tensors without memory."
    module = import_module(f"alignkit.{module}")
    for name in module.PRESETS:
        cfg = module.preset(name, micro_batch_size=1, sample_batch_size=1)
        p = plan("sd15", cfg, resolution=64)
        bytes_a_number = 4 if cfg.trainable == "lora" or cfg.mixed_precision == "no" else 2
        made = p.phases.loc["gradients"].max() / bytes_a_number
        adapter = 797_184  # twice where both steps and micro-batches are gathered
        least, most = (859.5e6, 900e6) if cfg.trainable == "full" else (adapter, 2.1 * adapter)
        assert p.peak_bytes > 0 and least <= made < most, name


# fit ---------------------------------------------------------------------------------------------------------------------------------

def ways_of(cfg): return [replace(cfg, **way).sized() for way in cfg.knobs()]


def least_of(cfg):
    with pytest.raises(ValueError, match="budget_gb: nothing fits in 1e-05 GB; the least that does") as error: fit("tiny", cfg, 1e-5)
    return float(str(error.value).split()[-2])


@pytest.mark.parametrize("cfg", [
    AlignPropConfig(samples_per_epoch=4, updates_per_epoch=1, num_inference_steps=3, strategy="full"),
    AlignPropConfig(samples_per_epoch=2, updates_per_epoch=1, num_inference_steps=2, eval_every=1, eval_samples=4),
    DDPOConfig(samples_per_epoch=4, updates_per_epoch=2, num_inference_steps=2),
    RWRConfig(samples_per_epoch=4, updates_per_epoch=2, num_inference_steps=2, mixed_precision="bf16"),
], ids=lambda cfg: cfg.method + ("_evaluated" if cfg.eval_every else ""))
def test_fit_takes_the_fastest_that_fits(cfg):
    "Against trying everything: the first of the ways whose plan fits; and the least that it names is the smallest of all plans."
    ways = ways_of(cfg)
    peaks = [plan("tiny", c).peak_bytes for c in ways]
    assert least_of(cfg) == math.ceil(min(peaks) / 1e7) / 100
    for budget in sorted(set(peaks))[::3]:
        assert fit("tiny", cfg, budget / 1e9) == next(c for c, peak in zip(ways, peaks) if peak <= budget)


def test_fit_runs_few_calls(monkeypatch):
    "A way is given up at the first of its calls that cannot fit, and of each kind few are run: those that tell others, and a single row."
    cfg = DDPOConfig(samples_per_epoch=64, updates_per_epoch=1, num_inference_steps=4, timestep_fraction=0.3, lora_rank=3)
    peak, ran = plan("tiny", replace(cfg, sample_batch_size=1, micro_batch_size=64)).peak_gb, []
    def counted(name):
        original = getattr(memory, name)
        monkeypatch.setattr(memory, name, lambda *args, **kwargs: (ran.append((name, args)), original(*args, **kwargs))[1])
    for name in ("_call", "_decoding"): counted(name)
    for known in (memory._RUNS, memory._BYTES): known.clear()
    best = fit("tiny", cfg, peak)
    assert best.micro_batch_size == 64 and best.sample_batch_size > 1
    assert len(ran) <= 9, ran  # of the loss, of drawing and of decoding 63, 64 and perhaps another
    with pytest.raises(memory.NothingFits): fit("tiny", cfg, 0.001)
    assert len(ran) <= 18, ran  # 2 rows and 1 of each, and a loss that adds to gradients is a kind of its own


def test_fit_with_a_real_config():
    cfg = AlignPropConfig(samples_per_epoch=32, updates_per_epoch=2, eval_every=1, num_inference_steps=5)
    whole = fit("tiny", cfg, 100)
    assert isinstance(whole, AlignPropConfig) and whole.check()
    assert (whole.micro_batch_size, whole.checkpointing, whole.sample_batch_size) == (16, "none", 48)
    free, least = {"micro_batch_size", "checkpointing", "stored_steps", "vae_slicing", "sample_batch_size"}, least_of(cfg)
    fixed = [f.name for f in fields(cfg) if f.name not in free]
    for budget in (least, 2 * least):
        best = fit("tiny", cfg, budget)
        assert plan("tiny", best).peak_gb <= budget
        assert [getattr(best, name) for name in fixed] == [getattr(cfg, name) for name in fixed]  # the update stays the same
    with pytest.raises(ValueError, match="nothing fits"): fit("tiny", cfg, least - 0.01)


def test_fit_for_several_processes(monkeypatch):
    "Each has its share of an update's pictures, and RWR's all latents of the epoch."
    cfg = RWRConfig(samples_per_epoch=4096, updates_per_epoch=1024, num_inference_steps=1, sample_batch_size=1)
    alone, shared = (fit("tiny", cfg, 100, processes=n) for n in (1, 4))
    assert (alone.micro_batch_size, shared.micro_batch_size) == (4, 1) and shared.samples_per_epoch == cfg.samples_per_epoch
    world = memory._world("tiny", cfg, None, None, "sdpa")
    share = replace(cfg, samples_per_epoch=1024, micro_batch_size=1)
    data = [share.phases(memory.BytesOf(share, world, n))["backward"]["latents, noise, pictures"] for n in (1, 4)]
    assert data[1] - data[0] == 3 * 1024 * 4 * 16 * 16 * 4
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(ValueError, match="budget_gb: a number where 2 processes train together"): fit("tiny", cfg, "auto")


@pytest.mark.parametrize("budget", [0, -1, float("nan"), "all", "0.5", None, True, [1]], ids=str)
def test_a_budget_that_is_none(budget):
    with pytest.raises(ValueError, match="budget_gb: a number of GB greater than 0, or 'auto'"): fit("tiny", DDPOConfig(), budget)


def test_the_call_of_0_1():
    for args in (("ddpo", DDPOConfig(), 1), (DDPOConfig(), 1, 2), ("ddpo", 1)):
        with pytest.raises(TypeError, match=r"the call is fit\(pipe, cfg, budget_gb\)"): fit("tiny", *args)
    with pytest.raises(TypeError, match=r"the call is plan\(pipe, cfg\)"): plan("tiny", "ddpo")
    with pytest.raises(TypeError, match="no setting 'stored_step' in AlignPropConfig; there are method, seed"):
        plan("tiny", AlignPropConfig(), stored_step=3)
