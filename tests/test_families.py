"""Stable Diffusion XL, SD3, FLUX and PixArt, every method, on folders with random weights: a family is a page, nothing else knows of it.
The invariants of a run, on the embedded SD3."""
import os, signal
from dataclasses import replace
import numpy as np
import pytest
import torch
from torch.testing import assert_close
from alignkit import alignprop, ddpo, rwr
from alignkit.mdp import draw
from alignkit.pipelines import load
from alignkit.rewards import Reward
from alignkit.runs import Run
from conftest import PROMPTS, bits, brightness, history, in_child, on_two, updates_of, weights

red = Reward(brightness, "brightness", differentiable=True)
LOOKED_AT = dict(eval_every=1, eval_samples=2, eval_prompts=("a cow",))
SHARED = dict(samples_per_epoch=4, num_inference_steps=3, guidance_scale=3., learning_rate=1e-2, fast="onednn", **LOOKED_AT)
METHODS = {
    "ddpo": (ddpo.train, ddpo.DDPOConfig(updates_per_epoch=2, micro_batch_size=5, num_epochs=2, **SHARED)),
    "rwr": (rwr.train, rwr.RWRConfig(updates_per_epoch=2, num_inner_epochs=2, num_epochs=2, **SHARED)),
    "alignprop": (alignprop.train, alignprop.AlignPropConfig(updates_per_epoch=2, eta=1., checkpointing="step", num_epochs=2, **SHARED)),
    "draft_lv": (alignprop.train, alignprop.AlignPropConfig(updates_per_epoch=2, strategy="draft_lv", num_epochs=2, **SHARED)),
    "non-square": (ddpo.train, ddpo.DDPOConfig(updates_per_epoch=2, num_epochs=2, height=32, width=64, **SHARED)),
}
ODE = dict(eval_eta=0., eval_kl=True)
FLOW = {
    "flow_sde": (ddpo.train, ddpo.DDPOConfig(updates_per_epoch=2, micro_batch_size=5, num_epochs=2, sampler="flow_sde", eta=0.7, **SHARED)),
    "window": (ddpo.train, ddpo.DDPOConfig(updates_per_epoch=1, num_epochs=2, window=1, window_last=2, levels="even", **ODE, **SHARED)),
    "rwr": METHODS["rwr"],
    "alignprop": METHODS["alignprop"],
    "draft_lv": METHODS["draft_lv"],
    "refl": (alignprop.train, alignprop.AlignPropConfig(updates_per_epoch=2, strategy="refl", num_epochs=2, **SHARED)),
}
CASES = [("sdxl", name) for name in METHODS] + [("sd3", name) for name in FLOW] + [("flux", name) for name in ("flow_sde", "alignprop")]
CASES += [("pixart", name) for name in ("ddpo", "alignprop")]


@pytest.fixture(scope="module")
def sdxl_folder(tmp_path_factory):
    "A StableDiffusionXLPipeline with random weights: two text encoders, 32 x 32 pictures, latents 4 x 8 x 8."
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionXLPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection
    from alignkit import tiny
    folder = tmp_path_factory.mktemp("sdxl")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tok = tiny.make_tokenizer(folder / "tokenizer")
        ends = dict(bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
        texts = dict(vocab_size=len(tok), num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=tok.model_max_length, **ends)
        first = CLIPTextModel(CLIPTextConfig(hidden_size=16, intermediate_size=32, **texts))
        second = CLIPTextModelWithProjection(CLIPTextConfig(hidden_size=24, intermediate_size=32, projection_dim=20, **texts))
        unet = UNet2DConditionModel(
            sample_size=8, block_out_channels=(16, 32), layers_per_block=1, norm_num_groups=8,
            cross_attention_dim=40, attention_head_dim=(2, 4),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            addition_embed_type="text_time", addition_time_embed_dim=8, projection_class_embeddings_input_dim=20 + 6 * 8)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, sample_size=32, scaling_factor=0.13025,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
        schedule = dict(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
        schedule |= dict(set_alpha_to_one=False, steps_offset=1, clip_sample=False)
        StableDiffusionXLPipeline(vae, first, second, tok, tok, unet, DDIMScheduler(**schedule)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def flow_folders(tmp_path_factory):
    "A StableDiffusion3Pipeline without T5 and a FluxPipeline that is told its guidance; 32 x 32 pictures, latents 4 x 8 x 8."
    from diffusers import AutoencoderKL, FlowMatchEulerDiscreteScheduler, FluxPipeline, FluxTransformer2DModel
    from diffusers import SD3Transformer2DModel, StableDiffusion3Pipeline
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, T5Config, T5EncoderModel
    from alignkit import tiny
    folder = tmp_path_factory.mktemp("flow")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tok = tiny.make_tokenizer(folder / "tokenizer")
        ends = dict(bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id, pad_token_id=tok.pad_token_id)
        texts = dict(vocab_size=len(tok), num_hidden_layers=3, num_attention_heads=2, max_position_embeddings=tok.model_max_length, **ends)
        def clip(kind, **more): return kind(CLIPTextConfig(hidden_size=16, intermediate_size=32, **more, **texts))
        def vae():
            return AutoencoderKL(
                block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, sample_size=32, scaling_factor=1.5, shift_factor=0.1,
                down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
        net = SD3Transformer2DModel(
            sample_size=8, patch_size=2, in_channels=4, out_channels=4, num_layers=2, attention_head_dim=8, num_attention_heads=4,
            joint_attention_dim=40, caption_projection_dim=32, pooled_projection_dim=36, pos_embed_max_size=16, qk_norm="rms_norm")
        first, second = (clip(CLIPTextModelWithProjection, projection_dim=18) for _ in range(2))
        sd3 = StableDiffusion3Pipeline(net, FlowMatchEulerDiscreteScheduler(shift=3.), vae(), first, tok, second, tok, None, None)
        net = FluxTransformer2DModel(
            patch_size=1, in_channels=16, num_layers=1, num_single_layers=1, attention_head_dim=16, num_attention_heads=2,
            joint_attention_dim=16, pooled_projection_dim=16, guidance_embeds=True, axes_dims_rope=(4, 6, 6))
        t5 = T5EncoderModel(T5Config(vocab_size=len(tok), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
        dynamic = FlowMatchEulerDiscreteScheduler(shift=3., use_dynamic_shifting=True)
        flux = FluxPipeline(dynamic, vae(), clip(CLIPTextModel), tok, t5, tok, net)
        for name, pipe in dict(sd3=sd3, flux=flux).items():
            for p in pipe.transformer.parameters():
                if not p.any(): torch.nn.init.normal_(p, std=0.1)  # what begins at zero would keep the adapter from the picture
            pipe.save_pretrained(folder / name)
    return {name: str(folder / name) for name in ("sd3", "flux")}


@pytest.fixture(scope="module")
def pixart_folder(tmp_path_factory):
    "A PixArtAlphaPipeline with random weights, its own solver; 32 x 32 pictures, latents 4 x 8 x 8."
    from diffusers import AutoencoderKL, DPMSolverMultistepScheduler, PixArtAlphaPipeline, PixArtTransformer2DModel
    from transformers import T5Config, T5EncoderModel
    from alignkit import tiny
    folder = tmp_path_factory.mktemp("pixart")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tok = tiny.make_tokenizer(folder / "tokenizer")
        net = PixArtTransformer2DModel(
            num_attention_heads=2, attention_head_dim=8, in_channels=4, out_channels=8, num_layers=2, cross_attention_dim=16, sample_size=8,
            patch_size=2, caption_channels=16)
        for p in net.parameters():
            if p.ndim > 1: torch.nn.init.normal_(p, std=0.2)
        vae = AutoencoderKL(
            block_out_channels=(8, 8, 16), layers_per_block=1, norm_num_groups=4, sample_size=32, scaling_factor=0.13025,
            down_block_types=("DownEncoderBlock2D",) * 3, up_block_types=("UpDecoderBlock2D",) * 3)
        t5 = T5EncoderModel(T5Config(vocab_size=len(tok), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2))
        solver = DPMSolverMultistepScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
        PixArtAlphaPipeline(tok, t5, vae, net, solver).save_pretrained(folder)
    return str(folder)


def put_on(plain, lora):
    "An adapter on a pipeline of diffusers, by diffusers; by peft where its class reads none."
    if hasattr(plain, "load_lora_weights"): return plain.load_lora_weights(lora)
    from peft import PeftModel
    PeftModel.from_pretrained(plain.transformer, lora)


@pytest.mark.filterwarnings("ignore:pipe. it has no third text encoder")
@pytest.mark.parametrize("family, method", CASES)
def test_a_method_trains_it(sdxl_folder, flow_folders, pixart_folder, tmp_path, family, method):
    "The weights move; a run that was stopped goes on bit for bit; plain diffusers draws the same from the saved adapter."
    folder, (train, cfg) = dict(sdxl=sdxl_folder, pixart=pixart_folder, **flow_folders)[family], {**FLOW, **METHODS}[method]
    cfg = replace(cfg, height=cfg.height or 32, width=cfg.width or 32)
    run = train(folder, red, PROMPTS, cfg, out=tmp_path / "run")
    assert (run.history.grad_norm > 0).all() and np.isfinite(run.history[["reward_mean", "loss", "eval_reward_mean"]]).all(axis=None)
    if cfg.eval_kl: assert (run.history.eval_kl > 0).all()
    train(folder, red, PROMPTS, cfg, out=tmp_path / "again", callbacks=(lambda run, row: row["epoch"] == 0,))
    train(folder, red, PROMPTS, cfg, out=tmp_path / "again", resume=True)
    assert bits(history(tmp_path / "run")) == bits(history(tmp_path / "again"))
    assert bits(weights(tmp_path / "run" / "lora")) == bits(weights(tmp_path / "again" / "lora"))

    how = dict(num_inference_steps=3, guidance_scale=3., eta=0., height=cfg.height, width=cfg.width)
    plain = load(folder)
    base = draw(plain, PROMPTS, **how)
    put_on(plain, tmp_path / "run" / "lora")
    ours = draw(run.pipe, PROMPTS, **how)
    assert (ours - base).abs().max() > 1e-4 and ours.shape[2:] == (cfg.height, cfg.width)
    assert_close(draw(plain, PROMPTS, **how), ours, rtol=0, atol=1e-5)


def test_the_card_of_a_pixart_run(pixart_folder, tmp_path):
    "The code on it draws in a fresh place; a run is read again with its adapter, which kohya's format has no names for."
    train, cfg = METHODS["ddpo"]
    run = train(pixart_folder, red, PROMPTS, replace(cfg, num_epochs=1, height=32, width=32), out=tmp_path / "run")
    lora = tmp_path / "run" / "lora"
    code = (lora / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]
    assert "PeftModel.from_pretrained(pipe.transformer, '.')" in code and "load_lora_weights" not in code
    drawn = {}
    exec(code.replace("'.'", repr(str(lora))).replace("'picture.png'", repr(str(tmp_path / "picture.png"))), drawn)
    assert drawn["picture"].size == (32, 32) and (tmp_path / "picture.png").is_file()
    how = dict(num_inference_steps=3, guidance_scale=3., eta=0.)
    again = Run.load(tmp_path / "run", pipe=load(pixart_folder))
    assert_close(draw(again.pipe, PROMPTS, **how), draw(run.pipe, PROMPTS, **how), rtol=0, atol=1e-6)
    with pytest.raises(ValueError, match="known for a UNet, not for a PixArtTransformer2DModel"):
        run.save_lora(tmp_path / "k", format="kohya")


def test_a_window_without_noise_is_named(flow_folders):
    "On a flow path `ddim` has none in its last step, next to none before it: drawn and not learned from; a window of them is refused."
    cfg = ddpo.DDPOConfig(updates_per_epoch=1, num_epochs=1, **{**SHARED, "eval_every": 0})
    with pytest.raises(ValueError, match="window: no step of .2. has noise .* keep to .0. by window_last"):
        ddpo.train(flow_folders["sd3"], red, PROMPTS, replace(cfg, window=1, window_first=2))
    with pytest.raises(ValueError, match="eta: 0 .no noise. to 1 for sampler='cps'"): replace(cfg, sampler="cps", eta=1.5).check()
    with pytest.raises(ValueError, match="levels: 'even' is for a flow model"):
        ddpo.train("tiny", red, PROMPTS, replace(cfg, levels="even"))


def recorded_ratios(monkeypatch):
    "A list that grows by the ratios of every micro-batch."
    ratios, loss = [], ddpo.ddpo_is_loss
    def recording(*args):
        result = loss(*args)
        ratios.append(result[1]["ratio"])
        return result
    monkeypatch.setattr(ddpo, "ddpo_is_loss", recording)
    return ratios


@pytest.mark.parametrize("precision, tolerance", [("no", 5e-6), ("bf16", 0.)])
def test_the_ratio_starts_at_one(sdxl_folder, monkeypatch, precision, tolerance):
    "Until the first optimiser step every ratio is 1; in float32 but for the rounding of other batches, a few eps of the mean over sigma."
    ratios = recorded_ratios(monkeypatch)
    cfg = ddpo.DDPOConfig(updates_per_epoch=1, micro_batch_size=5, num_epochs=1, mixed_precision=precision, **{**SHARED, "eval_every": 0})
    ddpo.train(sdxl_folder, red, PROMPTS, cfg)
    assert len(torch.cat(ratios)) == 12 and (torch.cat(ratios) - 1).abs().max() <= tolerance


# the embedded flow model ---------------------------------------------------------------------------------------------------------

def go(out=None, callbacks=(), resume=False, **changes):
    "Two epochs of two updates on tiny-sd3."
    few = dict(num_epochs=2, samples_per_epoch=4, updates_per_epoch=2, num_inference_steps=3, learning_rate=1e-2, adam_epsilon=1e-3)
    cfg = ddpo.DDPOConfig(**{**few, "sampler": "flow_sde", "eta": 0.7, "eval_every": 0, "fast": "onednn", **changes})
    return ddpo.train("tiny-sd3", red, PROMPTS, cfg, out=out, callbacks=callbacks, resume=resume)


@pytest.mark.parametrize("sampler, eta", [("flow_sde", 0.7), ("precise", 1.5)])
@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_flow_ratio_starts_at_one(monkeypatch, sampler, eta, precision):
    "Exactly, where the same pictures are trained together that were drawn together."
    ratios = recorded_ratios(monkeypatch)
    go(num_epochs=1, updates_per_epoch=1, sampler=sampler, eta=eta, mixed_precision=precision)
    learned = dict(flow_sde=3, precise=1)[sampler]  # of three steps, see `mdp.noisy_steps`
    assert len(torch.cat(ratios)) == 4 * learned and (torch.cat(ratios) == 1).all()


def test_a_flow_run_is_killed_and_goes_on(tmp_path):
    "A run that was killed (SIGKILL) ends bit for bit as the unbroken one."
    def killed(): go(tmp_path / "run", callbacks=[lambda run, row: os.kill(os.getpid(), signal.SIGKILL)])
    assert in_child(killed) == -signal.SIGKILL
    go(tmp_path / "run", resume=True)
    go(tmp_path / "unbroken")
    assert bits(history(tmp_path / "run")) == bits(history(tmp_path / "unbroken"))
    assert bits(weights(tmp_path / "run" / "lora")) == bits(weights(tmp_path / "unbroken" / "lora"))


def test_two_processes_train_the_flow_model(tmp_path):
    "They hold the same weights after every update: those of one process, within float error."
    ranks = on_two(lambda: updates_of(lambda: go(tmp_path / "run")), tmp_path)
    assert len(ranks[0]) == 2 * 2 and torch.equal(ranks[0], ranks[1])
    one = updates_of(lambda: go(tmp_path / "one"))
    moved = (one[-1] - one[0]).abs().max().item()
    assert moved > 1e-3
    assert_close(ranks[0], one, rtol=0, atol=1e-3 * moved)
