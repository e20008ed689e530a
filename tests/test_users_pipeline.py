"What a user put on a pipeline takes part as in plain diffusers, or is refused by name before any work; what is looked at stays as it was."
import warnings
import diffusers
import pytest
import torch
from accelerate.hooks import ModelHook, add_hook_to_module
from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline, UNet2DConditionModel
from torch.testing import assert_close
import test_families
from alignkit import alignprop, ddpo, rwr
from alignkit.evaluate import evaluate, mixing_path
from alignkit.judges import drift, warn_of_emoji_judges
from alignkit.mdp import draw, get_sampler, sample_noise, with_density
from alignkit.memory import plan
from alignkit.pipelines import adapter_off, add_lora, load, modules_of, open_model, pixels, save_lora
from alignkit.rewards import Reward, RewardError
from alignkit.start import check_density
from conftest import PROMPTS, brightness, go, small, told

HOW = dict(num_inference_steps=3, eta=0.)
FEW = dict(prompts=["a cow", "a pig"], num_samples=4, num_inference_steps=2, guidance_scale=1., diversity=False)
red = Reward(brightness, "red")
sdxl_folder = test_families.sdxl_folder
ORDINARY = ("DDIMScheduler", "DDPMScheduler", "PNDMScheduler", "EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler",
            "DPMSolverMultistepScheduler", "UniPCMultistepScheduler", "LCMScheduler", "DEISMultistepScheduler", "HeunDiscreteScheduler",
            "LMSDiscreteScheduler")


def plain(folder, kind=StableDiffusionPipeline):
    "What a user of diffusers has."
    unchecked = dict(safety_checker=None, requires_safety_checker=False) if kind is StableDiffusionPipeline else {}
    pipe = kind.from_pretrained(folder, **unchecked)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def with_ddim(pipe, **settings):
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config, **settings)
    return pipe


def theirs(pipe, prompts, guidance_scale=3., **size):
    "Pictures by diffusers' own call, from the kit's noise."
    model = open_model(pipe, **size)
    start = sample_noise(0, "draw", 0, range(len(prompts)), (4, *model.latent_shape))[:, 0]
    height, width = pixels(model)
    how = dict(HOW, guidance_scale=guidance_scale, output_type="pt", height=height, width=width)
    with torch.no_grad(): return pipe(prompts, latents=start, **how).images


def same(pipe, prompts=("a cat", "a dog"), tol=2e-5, **how):
    "The kit draws what diffusers draws; returns the pictures."
    wanted = theirs(pipe, list(prompts), **how)
    ours = draw(pipe, list(prompts), **HOW, guidance_scale=how.pop("guidance_scale", 3.), **how)
    assert_close(ours, wanted, rtol=0, atol=tol)
    return ours


def random_adapter(folder, seed, targets=("to_q", "to_v")):
    "A LoRA file that does something."
    unet = load(folder).unet
    for i, p in enumerate(add_lora(unet, 2, target_modules=targets)):
        torch.nn.init.normal_(p, std=0.3, generator=torch.Generator().manual_seed(100 * seed + i))
    return unet


@pytest.fixture(scope="module")
def adapters(pipe_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("adapters")
    for i, name in enumerate("ab"): save_lora(random_adapter(pipe_folder, i + 1), folder / name)
    return folder


def carrying(pipe_folder, adapters, weights=(0.5, 2.)):
    "A pipeline with two adapters, weighted."
    pipe = plain(pipe_folder)
    for name in "ab": pipe.load_lora_weights(adapters / name, adapter_name=name)
    pipe.set_adapters(["a", "b"], list(weights))
    return pipe


def changed_unet(pipe_folder, **config):
    pipe = plain(pipe_folder)
    with torch.random.fork_rng():
        torch.manual_seed(3)
        unet = UNet2DConditionModel.from_config({**pipe.unet.config, **config})
    unet.load_state_dict({k: v for k, v in pipe.unet.state_dict().items() if unet.state_dict()[k].shape == v.shape}, strict=False)
    pipe.register_modules(unet=unet.eval())
    return pipe


def fingerprint(pipe):
    "All that may be seen of a pipeline: parts, weights, device, dtype, flags, hooks, adapters on and off and how strong, scheduler."
    found = {"scheduler": (id(pipe.scheduler), type(pipe.scheduler).__name__, dict(pipe.scheduler.config), str(pipe.scheduler.timesteps))}
    for name, part in pipe.components.items():
        if not isinstance(part, torch.nn.Module): continue
        found[name] = id(part), sorted(getattr(part, "peft_config", None) or {})
        for key, m in part.named_modules():
            hooks = len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), "forward" in m.__dict__
            tuned = [str(getattr(m, k, None)) for k in ("disable_adapters", "active_adapters", "scaling", "merged")]
            found[f"{name}.{key}"] = id(m), type(m).__name__, m.training, hooks, tuned
        def seen(x): return id(x), x.requires_grad, x.device, x.dtype, x.stride(), x.detach().double().sum().item()
        for key, x in (*part.named_parameters(), *part.named_buffers()): found[f"{name}.{key}"] = seen(x)
    return found


# what takes part -----------------------------------------------------------------------------------------------------------------

def test_adapters_take_part_as_they_are_set(pipe_folder, adapters):
    "Two with weights, one of two, all switched off: each as plain diffusers draws it."
    pipe = carrying(pipe_folder, adapters)
    both = same(pipe)
    pipe.set_adapters("a", 0.7)
    one = same(pipe)
    pipe.disable_lora()
    off = same(pipe)
    assert_close(off, draw(pipe_folder, ["a cat", "a dog"], **HOW, guidance_scale=3.), rtol=0, atol=2e-5)
    assert min((both - one).abs().max(), (one - off).abs().max(), (both - off).abs().max()) > 1e-2


def test_an_adapter_that_is_off_stays_off_and_one_that_is_frozen_stays_frozen(pipe_folder, adapters):
    pipe = carrying(pipe_folder, adapters)
    load(pipe)  # frozen
    layers = [m for m in pipe.unet.modules() if hasattr(m, "lora_A")]
    for off in layers[::2]: off.enable_adapters(False)
    was, base = fingerprint(pipe), plain(pipe_folder)
    x, t, text = torch.randn(2, 4, 8, 8), torch.tensor(500), open_model(pipe).encode(PROMPTS)["text"]
    with torch.no_grad(), adapter_off(pipe.unet): assert pipe.unet(x, t, text).sample.equal(base.unet(x, t, text).sample)
    assert fingerprint(pipe) == was


def test_a_fresh_adapter_on_a_pipeline_whose_old_one_was_off_is_on(pipe_folder, adapters):
    "peft leaves its layers behind, switched off: nothing would be learned."
    pipe = plain(pipe_folder)
    pipe.load_lora_weights(adapters / "a")
    pipe.disable_lora()
    with pytest.warns(UserWarning, match="is replaced by a fresh one"): run = go(pipe, num_epochs=1, eval_every=0)
    fresh = go(pipe_folder, num_epochs=1, eval_every=0)
    assert run.history.grad_norm.item() > 0
    assert_close(run.history.grad_norm.item(), fresh.history.grad_norm.item(), rtol=1e-5, atol=0)


def test_a_guidance_embedding_is_passed_once_and_without_guidance_on_top(pipe_folder):
    "As diffusers' pipeline asks an LCM: one call, told the scale."
    pipe = with_ddim(changed_unet(pipe_folder, time_cond_proj_dim=16))
    torch.nn.init.normal_(pipe.unet.time_embedding.cond_proj.weight, std=0.3, generator=torch.Generator().manual_seed(0))
    rows = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args, kwargs: rows.append(len(args[0])), with_kwargs=True)
    pictures = [draw(pipe, ["a cat"], **HOW, guidance_scale=s) for s in (1., 3.)]
    hook.remove()
    assert rows == [1] * 6 and (pictures[0] - pictures[1]).abs().max() > 1e-3
    for s in (1., 3.): same(pipe, guidance_scale=s)
    plan(pipe, small(guidance_scale=3.))
    assert go(pipe, num_epochs=1, eval_every=0, guidance_scale=3.).history.grad_norm.item() > 0


def test_a_token_of_several_vectors_is_all_of_them(pipe_folder):
    pipe = plain(pipe_folder)
    one = draw(pipe, ["a <thing>"], **HOW, guidance_scale=3.)
    vectors = torch.randn(3, pipe.text_encoder.config.hidden_size, generator=torch.Generator().manual_seed(0))
    pipe.load_textual_inversion(vectors, token="<thing>")
    assert (same(pipe, ["a <thing>", "a dog"])[:1] - one).abs().max() > 1e-3
    wanted = pipe.encode_prompt(["a <thing>", "a dog"], "cpu", 1, True)[0]
    assert_close(open_model(pipe).encode(["a <thing>", "a dog"])["text"], wanted, rtol=0, atol=1e-6)


def test_the_text_encoders_mask_is_used_where_its_config_asks(pipe_folder):
    pipe = plain(pipe_folder)
    without = same(pipe)
    pipe.text_encoder.config.use_attention_mask = True
    assert (same(pipe) - without).abs().max() > 1e-5


def circular(unet):
    for m in unet.modules():
        if isinstance(m, torch.nn.Conv2d): m.padding_mode = "circular"

def own_forward(unet):
    inner = unet.mid_block.forward
    unet.mid_block.forward = lambda *args, **kwargs: 1.5 * inner(*args, **kwargs)

def own_attention(unet):
    class Louder(diffusers.models.attention_processor.AttnProcessor2_0):
        def __call__(self, *args, **kwargs): return 1.5 * super().__call__(*args, **kwargs)
    unet.set_attn_processor(Louder())

def compiled(unet): unet.compile(backend="eager")

PATCHES = dict(
    freeu=lambda pipe: pipe.enable_freeu(0.9, 0.2, 1.2, 1.4), seamless=lambda pipe: circular(pipe.unet),
    forward=lambda pipe: own_forward(pipe.unet), attention=lambda pipe: own_attention(pipe.unet), compiled=lambda pipe: compiled(pipe.unet),
    wrapped=lambda pipe: pipe.register_modules(unet=torch.compile(pipe.unet, backend="eager")))


@pytest.mark.parametrize("patch", PATCHES)
def test_what_was_put_on_the_network_takes_part(pipe_folder, patch):
    "In drawing as in plain diffusers; in training with the same first epoch whatever `fast` does, and with a gradient."
    pipe = plain(pipe_folder)
    before = draw(pipe, ["a cat", "a dog"], **HOW, guidance_scale=3.)
    PATCHES[patch](pipe)
    after = same(pipe)
    if patch not in ("compiled", "wrapped"): assert (after - before).abs().max() > 1e-4
    one = dict(num_epochs=1, eval_every=0, updates_per_epoch=1)
    rows = [go(pipe, **one, fast="onednn").history.iloc[0]]
    with pytest.warns(UserWarning, match="replaced by a fresh one"): rows.append(go(pipe, **one, fast="off").history.iloc[0])
    assert rows[0].grad_norm > 0
    assert_close(rows[0].reward_mean, rows[1].reward_mean, rtol=0, atol=1e-4)
    assert_close(rows[0].grad_norm, rows[1].grad_norm, rtol=1e-2, atol=0)


ZERO_SNR = dict(rescale_betas_zero_snr=True, timestep_spacing="trailing")
WORDS = [dict(clip_sample=True), dict(set_alpha_to_one=True), dict(timestep_spacing="trailing"), dict(steps_offset=0),
         dict(timestep_spacing="linspace"), dict(ZERO_SNR, prediction_type="v_prediction")]


@pytest.mark.parametrize("settings", WORDS, ids=str)
def test_a_ddim_is_taken_at_its_word(pipe_folder, settings):
    "Whatever it was told: the kit draws what plain diffusers draws with it."
    same(with_ddim(plain(pipe_folder), **settings))


def test_a_ddim_as_it_is_built_by_default_draws_as_in_diffusers_and_trains(pipe_folder):
    pipe = plain(pipe_folder)
    pipe.scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    same(pipe)
    with pytest.warns(UserWarning, match="set_alpha_to_one=False, steps_offset=1 is taken"):
        run = go(pipe, num_epochs=1, eval_every=1, eval_kl=True)
    assert run.history.grad_norm.item() > 0 and run.history.eval_kl.notna().all()
    assert pipe.scheduler.config.set_alpha_to_one is True


@pytest.mark.parametrize("name", ORDINARY)
def test_ordinary_schedulers_train_on_the_path_that_is_theirs(pipe_folder, name):
    "Built by default and from SD's config: noise levels and prediction are theirs, every step has a density, x_0 is not clipped."
    kind, pipe = getattr(diffusers, name), plain(pipe_folder)
    for scheduler in (kind(), kind.from_config(pipe.scheduler.config), kind(beta_schedule="scaled_linear", prediction_type="v_prediction")):
        pipe.scheduler = scheduler
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = with_density(open_model(pipe))
        check_density(model, get_sampler(model, 7))
        assert_close(model.scheduler.alphas_cumprod, scheduler.alphas_cumprod, rtol=0, atol=1e-7)
        assert model.prediction == scheduler.config.prediction_type
        if name != "DDIMScheduler": assert not model.scheduler.config.clip_sample
    pipe.scheduler = kind.from_config(pipe.scheduler.config, prediction_type="epsilon")
    found = fingerprint(pipe)["scheduler"]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert go(pipe, num_epochs=1, eval_every=0, updates_per_epoch=1).history.grad_norm.item() > 0
    assert fingerprint(pipe)["scheduler"] == found


def test_spacing_and_offset_are_taken_over(pipe_folder):
    pipe = plain(pipe_folder)
    for spacing, offset in (("trailing", 0), ("leading", 1)):
        pipe.scheduler = diffusers.EulerDiscreteScheduler.from_config(pipe.scheduler.config, timestep_spacing=spacing, steps_offset=offset)
        model = open_model(pipe)
        get_sampler(model, 5)
        pipe.scheduler.set_timesteps(5)
        assert model.scheduler.timesteps.tolist() == [round(t) for t in pipe.scheduler.timesteps.tolist()]


# what is refused -----------------------------------------------------------------------------------------------------------------

def scheduled(make):
    def change(pipe): pipe.scheduler = make(pipe.scheduler.config)
    return change

def ip_adapter(pipe): pipe.unet.register_to_config(encoder_hid_dim_type="ip_image_proj")
def casting(pipe): pipe.unet.enable_layerwise_casting(storage_dtype=torch.float16, compute_dtype=torch.float32)
def offloading(pipe): add_hook_to_module(pipe.unet, ModelHook())
def no_encoder(pipe): pipe.register_modules(text_encoder=None)
def own_encoding(pipe): pipe.encode_prompt = lambda *args, **kwargs: None

REFUSED = {
    "ip adapter": (ip_adapter, "IP-adapter"), "casting": (casting, "layerwise_casting"), "no encoder": (no_encoder, "text_encoder"),
    "own encoding": (own_encoding, "encode_prompt"), "offloading": (offloading, "ModelHook"),
    "zero snr": (lambda p: with_ddim(p, **ZERO_SNR), "zero terminal"),
    "learned": (scheduled(lambda c: diffusers.DDPMScheduler.from_config(c, variance_type="learned")), "learned variance"),
    "thresholding": (lambda p: with_ddim(p, thresholding=True), "thresholding=False"),
    "karras": (scheduled(lambda c: diffusers.DPMSolverMultistepScheduler.from_config(c, use_karras_sigmas=True)), "use_karras_sigmas"),
    "continuous": (scheduled(lambda c: diffusers.EulerDiscreteScheduler.from_config(c, timestep_type="continuous")), "timestep_type"),
    "flow": (scheduled(lambda c: diffusers.FlowMatchEulerDiscreteScheduler()), "FlowMatchEulerDiscreteScheduler"),
    "flow sigmas": (scheduled(lambda c: diffusers.UniPCMultistepScheduler.from_config(c, use_flow_sigmas=True)), "use_flow_sigmas"),
    "edm": (scheduled(lambda c: diffusers.EDMEulerScheduler()), "EDMEulerScheduler"),
    "consistency": (scheduled(lambda c: diffusers.CMStochasticIterativeScheduler()), "CMStochasticIterativeScheduler"),
    "inverse": (scheduled(lambda c: diffusers.DDIMInverseScheduler.from_config(c)), "DDIMInverseScheduler"),
    "shifted": (scheduled(lambda c: diffusers.CogVideoXDDIMScheduler(beta_start=0.00085, beta_end=0.012)), "CogVideoXDDIMScheduler"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_refused_before_any_work_by_every_method_and_in_drawing(pipe_folder, tmp_path, what):
    "By a message that begins with 'pipe:', and no run folder is made."
    change, words = REFUSED[what]
    pipe, few = plain(pipe_folder), dict(num_epochs=1, samples_per_epoch=4, updates_per_epoch=1, num_inference_steps=3)
    change(pipe)
    differentiable = Reward(brightness, "red", differentiable=True)
    for method, cfg in ((ddpo, ddpo.DDPOConfig(**few)), (rwr, rwr.RWRConfig(**few)), (alignprop, alignprop.AlignPropConfig(**few))):
        with pytest.raises((ValueError, TypeError), match="pipe: ") as e:
            method.train(pipe, differentiable, PROMPTS, cfg, out=tmp_path / "run")
        assert words in str(e.value) and not (tmp_path / "run").exists()
    with pytest.raises((ValueError, TypeError), match="pipe: "): draw(pipe, ["a cat"], **HOW)


XL = dict(addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=80)


@pytest.mark.parametrize("config, words", [
    (dict(in_channels=9), "9 channels"), (dict(in_channels=5), "5 channels"), (dict(num_class_embeds=4), "class labels"),
    (dict(XL), "addition_embed_type"),
    (dict(out_channels=8), "answers with 8"), (dict(cross_attention_dim=64), "width 64")], ids=lambda x: str(x)[:20])
def test_a_network_that_wants_more_than_a_prompt(pipe_folder, tmp_path, config, words):
    pipe = changed_unet(pipe_folder, **config)
    for go_on in (load, open_model, lambda p: draw(p, ["a cat"]), lambda p: go(p, tmp_path / "run"), lambda p: plan(p, small())):
        with pytest.raises(ValueError, match=f"pipe: .*{words}"): go_on(pipe)
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("kind", ["StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline", "StableDiffusionAdapterPipeline",
                                  "StableDiffusionControlNetPipeline"])
def test_pipelines_that_need_a_picture(pipe_folder, kind):
    parts = dict(plain(pipe_folder).components)
    if kind == "StableDiffusionControlNetPipeline": parts["controlnet"] = diffusers.ControlNetModel.from_unet(parts["unet"])
    t2i = dict(channels=[16, 32], num_res_blocks=1, downscale_factor=4)
    if kind == "StableDiffusionAdapterPipeline": parts["adapter"] = diffusers.T2IAdapter(**t2i)
    if kind in ("StableDiffusionAdapterPipeline", "StableDiffusionInpaintPipeline"): parts.pop("image_encoder", None)
    with pytest.raises(TypeError, match=f"pipe: .*{kind}"): load(getattr(diffusers, kind)(**parts, requires_safety_checker=False))


def test_what_cannot_be_trained_is_refused_in_training_only(pipe_folder, adapters, tmp_path):
    pipe = plain(pipe_folder)
    pipe.fuse_qkv_projections()
    same(pipe)
    with pytest.raises(ValueError, match="unfuse_qkv_projections"): go(pipe, tmp_path / "run")
    pipe = plain(pipe_folder)
    pipe.load_lora_weights(adapters / "a")
    pipe.fuse_lora()
    same(pipe)
    with pytest.raises(ValueError, match="fused into the weights"): go(pipe, tmp_path / "run")
    with pytest.raises(ValueError, match="fused into the weights"): drift(pipe, ["a cat"], num_inference_steps=2)
    pipe = plain(pipe_folder)
    pipe.unet.is_quantized = True
    with pytest.raises(ValueError, match="quantized"): go(pipe, tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_a_last_step_without_noise_is_mended_by_the_setting_that_is_named(pipe_folder):
    "Said settings are kept, so the message has to name one that helps: it does, when it is followed."
    one, two, three = dict(set_alpha_to_one=True), dict(steps_offset=0), dict(timestep_spacing="linspace")
    for settings in (one, two, {**one, **two}, three):
        pipe = with_ddim(plain(pipe_folder), **settings)
        with pytest.raises(ValueError, match="pipe: .*no density") as e: go(pipe, num_epochs=1, eval_every=0)
        command = str(e.value).split("pipe.scheduler = ")[1].removesuffix(")")
        pipe.scheduler = eval(command, dict(DDIMScheduler=DDIMScheduler, pipe=pipe))
        assert go(pipe, num_epochs=1, eval_every=0).history.grad_norm.item() > 0


def test_a_safety_checker_is_named(pipe_folder):
    pipe = plain(pipe_folder)
    pipe.safety_checker = torch.nn.Identity()
    with pytest.warns(UserWarning, match="safety checker is not asked"): open_model(pipe)


# sizes ---------------------------------------------------------------------------------------------------------------------------

def test_sizes_that_are_not_square_nor_the_networks_own(pipe_folder, tmp_path):
    "Drawn as by diffusers, planned, trained and evaluated at the run's size; a Model opened for a size keeps it, and another is refused."
    size = dict(height=32, width=64)
    same(plain(pipe_folder), **size)
    wide = open_model(pipe_folder, **size)
    assert plan(pipe_folder, small(**size)).settings["resolution"] == plan(wide, small()).settings["resolution"] == (32, 64)
    seen = []
    spy = Reward(lambda images, prompts: seen.append(tuple(images.shape[2:])) or brightness(images, prompts), "spy")
    for given, how in ((pipe_folder, size), (wide, {}), (wide, size)):
        run = go(given, reward=spy, num_epochs=1, eval_every=1, eval_kl=True, **how)
        assert (run.config["height"], run.config["width"]) == (32, 64)
        evaluate(run, rewards=(spy,), **{k: v for k, v in FEW.items() if k != "num_inference_steps"})
    assert set(seen) == {(32, 64)}
    assert draw(wide, ["a cat"], **HOW, **size).shape[2:] == (32, 64)
    for call in (lambda: draw(wide, ["a cat"], height=64), lambda: go(wide, height=64), lambda: drift(wide, ["a cat"], height=64)):
        with pytest.raises(ValueError, match="height: .*opened for"): call()


# left as found -------------------------------------------------------------------------------------------------------------------

def test_what_is_looked_at_is_left_as_found(pipe_folder, adapters):
    "Adapters weighted, half of them off, weights that want a gradient, train mode, another scheduler, a hook: nothing moves."
    pipe = carrying(pipe_folder, adapters)
    pipe.scheduler = diffusers.DPMSolverMultistepScheduler.from_config(pipe.scheduler.config)
    pipe.vae.train()
    pipe.unet.register_forward_pre_hook(lambda module, args: None)
    for off in [m for m in pipe.unet.modules() if hasattr(m, "lora_A")][::2]: off.enable_adapters(False)
    def fails(images, prompts): raise RuntimeError("no")
    rng, was = torch.get_rng_state(), fingerprint(pipe)
    other, failed = plain(pipe_folder), []
    for look in (
        lambda: draw(pipe, ["a cat"], **HOW), lambda: drift(pipe, ["a cat"], num_inference_steps=2), lambda: plan(pipe, small()),
        lambda: evaluate(pipe, rewards=(red,), **FEW),
        lambda: evaluate({"x": other, "y": adapters / "b"}, rewards=(red,), pipe=pipe, **FEW),
        lambda: evaluate([pipe, adapters / "a"], rewards=(fails,), **FEW),
        lambda: mixing_path(adapters / "a", adapters / "b", rewards=(red,), pipe=pipe, **FEW),
        lambda: mixing_path(adapters / "a", "base", rewards=(fails,), pipe=pipe, **FEW), lambda: open_model(pipe).encode(["a cat"])):
        try: look()
        except RewardError as e: failed.append(e)
        assert fingerprint(pipe) == was
    assert len(failed) == 2  # of `fails`
    assert torch.get_rng_state().equal(rng)


def test_a_decoder_that_works_in_float32_goes_back(sdxl_folder):
    "SDXL's, in half precision: diffusers casts it back after each picture."
    pipe = plain(sdxl_folder, StableDiffusionXLPipeline).to(torch.float16)
    pipe.vae.register_to_config(force_upcast=True)
    assert draw(pipe, ["a cat"], **HOW).isfinite().all()
    assert {x.dtype for part in modules_of(pipe) for x in part.parameters()} == {torch.float16}


def test_a_decoder_with_means_and_spreads(sdxl_folder):
    "Playground's: each channel of the latents has its own, and plain diffusers uses them."
    pipe = plain(sdxl_folder, StableDiffusionXLPipeline)
    without = same(pipe)
    pipe.vae.register_to_config(latents_mean=[0.5, -1., 0.2, 0.], latents_std=[2., 3., 1., 0.5])
    assert (same(pipe) - without).abs().max() > 1e-3


# evaluation ----------------------------------------------------------------------------------------------------------------------

def mine(pipe_folder):
    "A model that is no longer what its folder holds."
    pipe, g = plain(pipe_folder), torch.Generator().manual_seed(0)
    for p in pipe.unet.parameters(): p.data += 0.3 * p.data.abs().mean() * torch.randn(p.shape, generator=g)
    return pipe


def test_the_base_of_a_run_is_the_pipeline_that_was_trained(pipe_folder, adapters):
    "Its row is what plain diffusers draws without the adapter; a run that did not move changes nothing; a LoRA is mounted on it."
    pipe = mine(pipe_folder)
    base = draw(pipe, ["a cow", "a pig"] * 2, num_inference_steps=2, guidance_scale=1., purpose="final", eta=1.)
    run = go(pipe, num_epochs=1, eval_every=0, learning_rate=1e-12)
    found = evaluate({"run": run, "a": adapters / "a"}, rewards=(red,), **FEW).set_index(["subject", "measure"])
    assert_close(found["mean"]["base", "red"], brightness(base, None).double().mean().item(), rtol=1e-5, atol=0)
    assert abs(found.change["run", "red"]) < 1e-6 < 1e-3 < abs(found.change["a", "red"])
    with pytest.raises(ValueError, match="pipe: .*give it"): evaluate(type(run)(None, run.config), rewards=(red,), **FEW)
    full = go(mine(pipe_folder), num_epochs=1, eval_every=0, trainable="full")
    with pytest.raises(ValueError, match="pipe: .*its base model is gone"): evaluate(full, rewards=(red,), **FEW)
    other = go(plain(pipe_folder), num_epochs=1, eval_every=0)
    with pytest.raises(ValueError, match="another base model"): evaluate({"run": run, "other": other}, rewards=(red,), **FEW)
    with pytest.warns(UserWarning, match="is its own base model"): evaluate(mine(pipe_folder), rewards=(red,), **FEW)


def test_guidance_steps_and_size_come_from_the_run(pipe_folder):
    run = go(plain(pipe_folder), num_epochs=1, eval_every=0, guidance_scale=2., num_inference_steps=3, height=32, width=64)
    wanted = draw(run.pipe, ["a cow"] * 4, num_inference_steps=3, guidance_scale=2., eta=1., purpose="final", height=32, width=64)
    found = evaluate(run, prompts=["a cow"], rewards=(red,), num_samples=4, diversity=False)
    row = found[(found.subject != "base") & (found.measure == "red")]
    assert_close(row["mean"].item(), brightness(wanted, None).double().mean().item(), rtol=1e-5, atol=0)


def test_judges_of_emoji_say_so(tmp_path):
    load("tiny").save_pretrained(tmp_path / "photos")  # draws as large as the judge wants, and is not the kit's
    few = dict(FEW, rewards=("tiny_aesthetic",))
    message, = told(lambda: evaluate(load("tiny"), **dict(few, prompts=["a castle"])), "emoji")
    assert "tiny_aesthetic" in message and "a castle" in message
    message, = told(lambda: evaluate(load(tmp_path / "photos"), **dict(few, diversity=True, prompts=["a cow"])), "emoji")
    assert "tiny_aesthetic" in message and "clip='tiny'" in message
    assert not told(lambda: evaluate(load("tiny"), **dict(few, prompts=["a cow", "two foxes"])), "emoji")
    assert not told(lambda: warn_of_emoji_judges(["jpeg_compressibility", "golden"], None, ["a castle"]), "emoji")
    assert told(lambda: go(str(tmp_path / "photos"), reward="tiny_aesthetic", num_epochs=1, eval_every=0), "emoji")


def test_the_evaluation_of_own_prompts_is_their_own(pipe_folder, tmp_path):
    "Kit's sets keep heldout_animals; a list, a file and a callable are asked for their own; a record keeps its word."
    one = dict(num_epochs=1, samples_per_epoch=2, updates_per_epoch=1, num_inference_steps=2, eval_every=1, eval_samples=2, fast="onednn")
    (tmp_path / "mine.txt").write_text("a red house\na blue house\n")
    seen = []
    def spy(images, prompts):
        seen.append(tuple(prompts))
        return brightness(images, prompts)
    def asked(prompts, **how):
        seen.clear()
        run = ddpo.train(pipe_folder, spy, prompts, ddpo.DDPOConfig(**{**one, **how}), out=None)
        return seen[0], run.config["eval_prompts"]
    houses = ("a red house", "a blue house")
    assert asked("simple_animals") == (("snail", "hippopotamus"), "heldout_animals")
    assert asked(list(houses)) == (houses, None) == asked(tmp_path / "mine.txt")
    callable_, recorded = asked(lambda g: f"a house with {int(torch.randint(100, (), generator=g))} doors")
    assert recorded is None and all(p.startswith("a house with") for p in callable_)
    assert asked(list(houses), eval_prompts=("a cow",))[0] == ("a cow", "a cow")
    ddpo.train(pipe_folder, spy, list(houses), ddpo.DDPOConfig(**one, eval_prompts="heldout_animals"), out=tmp_path / "old")
    run = ddpo.train(pipe_folder, spy, list(houses), ddpo.DDPOConfig(**{**one, "num_epochs": 2}), out=tmp_path / "old", resume=True)
    assert len(run.history) == 2 and run.config["eval_prompts"] == "heldout_animals"
