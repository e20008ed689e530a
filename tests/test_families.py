"Stable Diffusion XL with every method, on a folder with random weights: a family is one page, and nothing else knows of it."
import numpy as np
import pytest
import torch
from torch.testing import assert_close
from alignkit import alignprop, ddpo, rwr
from alignkit.mdp import draw
from alignkit.pipelines import load
from alignkit.rewards import Reward
from conftest import PROMPTS, bits, brightness, history, weights

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


@pytest.mark.parametrize("method", METHODS)
def test_a_method_trains_it(sdxl_folder, tmp_path, method):
    "The weights move; a run that was stopped goes on bit for bit; plain diffusers draws the same from the saved adapter."
    train, cfg = METHODS[method]
    run = train(sdxl_folder, red, PROMPTS, cfg, out=tmp_path / "run")
    assert (run.history.grad_norm > 0).all() and np.isfinite(run.history[["reward_mean", "loss", "eval_reward_mean"]]).all(axis=None)
    train(sdxl_folder, red, PROMPTS, cfg, out=tmp_path / "again", callbacks=(lambda run, row: row["epoch"] == 0,))
    train(sdxl_folder, red, PROMPTS, cfg, out=tmp_path / "again", resume=True)
    assert bits(history(tmp_path / "run")) == bits(history(tmp_path / "again"))
    assert bits(weights(tmp_path / "run" / "lora")) == bits(weights(tmp_path / "again" / "lora"))

    how = dict(num_inference_steps=3, guidance_scale=3., eta=0., height=cfg.height, width=cfg.width)
    plain = load(sdxl_folder)
    base = draw(plain, PROMPTS, **how)
    plain.load_lora_weights(tmp_path / "run" / "lora")
    ours = draw(run.pipe, PROMPTS, **how)
    assert (ours - base).abs().max() > 1e-4 and ours.shape[2:] == (cfg.height or 32, cfg.width or 32)
    assert_close(draw(plain, PROMPTS, **how), ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize("precision, tolerance", [("no", 5e-6), ("bf16", 0.)])
def test_the_ratio_starts_at_one(sdxl_folder, monkeypatch, precision, tolerance):
    "Until the first optimiser step every ratio is 1; in float32 but for the rounding of other batches, a few eps of the mean over sigma."
    ratios, loss = [], ddpo.ddpo_is_loss
    def recording(*args):
        result = loss(*args)
        ratios.append(result[1]["ratio"])
        return result
    monkeypatch.setattr(ddpo, "ddpo_is_loss", recording)
    cfg = ddpo.DDPOConfig(updates_per_epoch=1, micro_batch_size=5, num_epochs=1, mixed_precision=precision, **{**SHARED, "eval_every": 0})
    ddpo.train(sdxl_folder, red, PROMPTS, cfg)
    assert len(torch.cat(ratios)) == 12 and (torch.cat(ratios) - 1).abs().max() <= tolerance
