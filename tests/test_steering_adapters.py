"A run that goes on from an adapter, and adapters that differ from layer to layer: against plain diffusers and peft."
import json, shutil
import numpy as np
import pytest
import test_families, test_steering
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from alignkit import ddpo
from alignkit.judges import drift
from alignkit.mdp import Drawing, draw, sample_noise
from alignkit.pipelines import ATTENTION, WEIGHTS, add_lora, load, lora_state, open_model, read_lora, save_lora
from alignkit.rewards import Reward
from conftest import PROMPTS, assert_same_run, bits, brightness, go, plain_picture, weights
from test_steering import METHODS, SEEN, filled, opened, run_of, stop_at, watched

adapter, sdxl_folder = test_steering.adapter, test_families.sdxl_folder  # fixtures


# from an adapter on ---------------------------------------------------------------------------------------------------------------

def kohya(folder, pipe):
    "A file as kohya's scripts write it: rank 3, alpha 5, and plain diffusers with it."
    g, state = torch.Generator().manual_seed(0), {}
    for n, m in pipe.unet.named_modules():
        if not n.endswith(ATTENTION): continue
        k = "lora_unet_" + n.replace(".", "_")
        down, up = 0.1 * torch.randn(3, m.in_features, generator=g), 0.1 * torch.randn(m.out_features, 3, generator=g)
        state |= {f"{k}.lora_down.weight": down, f"{k}.lora_up.weight": up, f"{k}.alpha": torch.tensor(5.)}
    save_file(state, folder / "kohya.safetensors")
    pipe.load_lora_weights(folder / "kohya.safetensors")
    return folder / "kohya.safetensors"


def of_diffusers(folder, pipe):
    "A folder of diffusers', with patterns and a convolution: saved by one plain pipeline, loaded by another."
    form = dict(r=4, lora_alpha=8, target_modules=[*ATTENTION, "conv1"], rank_pattern={"to_q": 2}, alpha_pattern={r"attn1\.to_k": 1})
    other = opened(pipe.config._name_or_path)
    other.unet.add_adapter(LoraConfig(**form, init_lora_weights=False))
    save_lora(filled(other.unet), folder)
    pipe.load_lora_weights(folder)
    return folder


def of_peft(folder, pipe):
    "A folder of peft's, rank-stabilised, and peft's own model around the plain pipeline's network."
    config = LoraConfig(r=4, lora_alpha=3, target_modules=["to_q", "proj_in"], init_lora_weights=False, use_rslora=True)
    filled(get_peft_model(opened(pipe.config._name_or_path).unet, config)).save_pretrained(folder)
    PeftModel.from_pretrained(pipe.unet, folder)  # in place
    return folder


FILES = [(kohya, 3, 5.), (of_diffusers, 4, 8.), (of_peft, 4, 6.)]


@pytest.mark.parametrize("made, rank, alpha", FILES, ids=["kohya", "diffusers", "peft"])
def test_the_first_pictures_are_those_of_plain_diffusers_with_the_adapter(pipe_folder, tmp_path, made, rank, alpha):
    "Of a run that has not learned yet, drawn at eta 0 with guidance; rank, alpha and layers are the file's, and so is the drift."
    plain, epoch = opened(pipe_folder), 0
    source = made(tmp_path, plain)
    SEEN.clear()
    looks = dict(eval_every=1, eval_samples=2, eval_kl=True, eval_prompts=("a cow",))
    run = run_of("rwr", pipe_folder, tmp_path / "run", Reward(watched, "watched"), eta=0., guidance_scale=2., init_lora=source, **looks)
    base, first = SEEN["pictures"][0], next(seen for seen in SEEN["pictures"] if len(seen[0]) == 4)
    for (images, prompts), purpose in ((base, "eval"), (first, "rollout")):
        start = sample_noise(0, purpose, epoch, range(len(images)), (4, 4, 8, 8))[:, 0]
        theirs = plain(prompts, latents=start, num_inference_steps=3, guidance_scale=2., eta=0., output_type="pt").images
        assert_close(images, theirs, rtol=0, atol=1e-5)
    plainer = open_model(pipe_folder)
    without = draw(plainer, base[1], Drawing(purpose="eval", num_inference_steps=3, guidance_scale=2., eta=0.))
    assert (base[0] - without).abs().max() > 1e-3
    how = Drawing(purpose="eval", num_inference_steps=3, guidance_scale=2., eta=1.)
    assert_close(run.eval_base["eval_kl"], drift(open_model(plain), base[1], how, base=plainer).mean().item(), rtol=1e-4, atol=0)
    saved = json.loads((tmp_path / "run" / "config.json").read_text())["config"]
    assert (saved["lora_rank"], saved["lora_alpha"], len(saved["init_lora_sha256"])) == (rank, pytest.approx(alpha), 16)
    layers = {n.removesuffix(".lora_A.weight").removeprefix("unet.") for n in load_file(tmp_path / "run/lora" / WEIGHTS) if "lora_A" in n}
    assert layers == read_lora(source).keys()


@pytest.mark.parametrize("method", METHODS)
def test_every_method_goes_on_from_a_finished_run(pipe_folder, tmp_path, method):
    "The folder of a run is an adapter too; what is evaluated first is what was evaluated last."
    how = dict(eval_every=1, eval_samples=2, eval_prompts=("a cow",))
    first = run_of(method, pipe_folder, tmp_path / "first", lora_rank=2, lora_alpha=8., **how)
    second = run_of(method, pipe_folder, tmp_path / "second", init_lora=tmp_path / "first", **how)
    assert abs(second.eval_base["eval_reward_mean"] - first.history.eval_reward_mean.iloc[-1]) < 1e-6
    assert second.config["lora_targets"] == ATTENTION and (second.config["lora_rank"], second.config["lora_alpha"]) == (2, 8.)
    assert second.history.grad_norm.iloc[0] > 0 and bits(weights(tmp_path / "second/lora")) != bits(weights(tmp_path / "first/lora"))


def test_a_run_from_an_adapter_resumes_without_its_file(pipe_folder, adapter, tmp_path):
    "Stopped after two epochs, or before the first checkpoint, and the file is gone: the folder has all that is needed, bit for bit."
    shutil.copytree(adapter, tmp_path / "mine")
    how = dict(init_lora=str(tmp_path / "mine"))
    go(pipe_folder, tmp_path / "whole", **how)
    go(pipe_folder, tmp_path / "cut", callbacks=stop_at(1), **how)
    shutil.copytree(tmp_path / "cut", tmp_path / "early")
    shutil.rmtree(tmp_path / "early" / "checkpoints")
    shutil.copytree(tmp_path / "early", tmp_path / "lost")
    shutil.rmtree(tmp_path / "mine")
    for name in ("cut", "early"):
        go(pipe_folder, tmp_path / name, resume=True, **how)
        assert_same_run(tmp_path / name, tmp_path / "whole")
    shutil.rmtree(tmp_path / "lost" / "init_lora")
    with pytest.raises(FileNotFoundError, match="init_lora: "): go(pipe_folder, tmp_path / "lost", resume=True, **how)
    other = opened(pipe_folder)
    add_lora(other.unet, 3, lora_alpha=6.)
    save_lora(filled(other.unet, seed=1), tmp_path / "mine")
    with pytest.raises(ValueError, match="init_lora_sha256 was"): go(pipe_folder, tmp_path / "lost", resume=True, **how)
    with pytest.raises(ValueError, match="init_lora was '.*', now None"): go(pipe_folder, tmp_path / "cut", resume=True)
    with pytest.raises(ValueError, match="init_lora=None and fits no other"):
        go(pipe_folder, tmp_path / "plain", num_epochs=1)
        ddpo.train(pipe_folder, brightness, PROMPTS, resume=tmp_path / "plain", override=dict(init_lora=how["init_lora"]))


def test_adapters_that_cannot_be_gone_on_from(pipe_folder, sdxl_folder, adapter, tmp_path):
    "Another form than the settings say, another network's, a text encoder's, no LoRA at all: refused by name before a folder is made."
    save_file({"unet.w": torch.zeros(2)}, tmp_path / "no.safetensors")
    two = opened(pipe_folder)
    for part in (two.unet, two.text_encoder): part.add_adapter(LoraConfig(r=2, target_modules=["to_q", "q_proj"]))
    save_lora(two.unet, tmp_path / "two", two)
    for changes, words in [
        (dict(init_lora=adapter, lora_rank=8), "lora_rank: left out, or as in the adapter of init_lora, .* \\(3\\), got 8"),
        (dict(init_lora=adapter, lora_targets=("to_q",)), "lora_targets: left out"),
        (dict(init_lora=adapter, lora_alpha=3.), "lora_alpha: left"),
        (dict(init_lora=adapter, lora_rank_pattern={"to_q": 2}), "lora_rank_pattern: left out"),
        (dict(init_lora=adapter, trainable="full"), "init_lora: is about an adapter"), (dict(init_lora=tmp_path), "init_lora: "),
        (dict(init_lora=tmp_path / "no.safetensors"), "init_lora: .*cannot be read as a LoRA"),
        (dict(init_lora="nowhere"), "init_lora: nowhere is"),
        (dict(init_lora=tmp_path / "two"), "init_lora: .*also changes text_encoder")]:
        with pytest.raises((ValueError, FileNotFoundError), match=words): go(pipe_folder, tmp_path / "run", **changes)
    with pytest.raises(ValueError, match="init_lora: the adapter there does not fit this pipeline"):
        go(sdxl_folder, tmp_path / "run", init_lora=adapter, height=32, width=32)
    assert not (tmp_path / "run").exists()
    agrees = go(pipe_folder, num_epochs=1, eval_every=0, init_lora=adapter, lora_rank=3, lora_alpha=6, lora_targets=ATTENTION)
    assert agrees.config["lora_rank"] == 3
    with pytest.warns(UserWarning, match="is replaced by that of init_lora"): go(agrees.pipe, num_epochs=1, eval_every=0, init_lora=adapter)


def test_an_adapter_of_the_hub(pipe_folder, adapter, tmp_path, monkeypatch):
    "A hub id is read from the hub's own cache; a file with another name is named behind it."
    import huggingface_hub
    for name, file in (("plain", WEIGHTS), ("other", "style.safetensors")):
        there = tmp_path / f"models--somebody--{name}"
        (there / "snapshots" / "abc").mkdir(parents=True)
        (there / "refs").mkdir()
        (there / "refs" / "main").write_text("abc")
        shutil.copy(adapter / WEIGHTS, there / "snapshots" / "abc" / file)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    how = dict(num_epochs=1, eval_every=0)
    sources = str(adapter), "somebody/plain", "somebody/other/style.safetensors"
    states = [lora_state(go(pipe_folder, init_lora=source, **how).net) for source in sources]
    assert bits(states[0]) == bits(states[1]) == bits(states[2])
    with pytest.raises(FileNotFoundError, match="name its file, as somebody/other/file"): go(pipe_folder, init_lora="somebody/other", **how)
    with pytest.raises(FileNotFoundError, match="init_lora: somebody/nothing is no file or folder, and the hub"):
        go(pipe_folder, init_lora="somebody/nothing", **how)


# the form of an adapter -----------------------------------------------------------------------------------------------------------

REGEX = r".*\.(attn[12]\.to_[qkv]|conv1)"
FORMS = {
    "patterns": dict(lora_rank_pattern={"to_q": 2, r"attn2\.to_v": 6}, lora_alpha_pattern={"to_k": 3., r"up_blocks.*to_q": 5.}),
    "patterns and an alpha": dict(lora_alpha=6., lora_rank_pattern={"to_q": 2}),
    "an expression": dict(lora_targets=REGEX, lora_rank_pattern={"conv1": 3}, lora_alpha_pattern={r"attn1\.to_q": 9.}),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("method", METHODS)
def test_a_form_layer_by_layer(pipe_folder, tmp_path, method, form):
    "Ranks and scales are those that peft gives for the same words, and plain diffusers draws the same from the file."
    cfg = FORMS[form]
    run = run_of(method, pipe_folder, tmp_path / "run", **cfg)
    ranks, alphas = cfg["lora_rank_pattern"], cfg.get("lora_alpha_pattern", {})
    if "lora_alpha" not in cfg: alphas = {**alphas, **{k: r for k, r in ranks.items() if k not in alphas}}  # a scale of 1, whatever the rank
    targets = cfg.get("lora_targets", list(ATTENTION))
    config = LoraConfig(r=4, lora_alpha=cfg.get("lora_alpha", 4), target_modules=targets, rank_pattern=ranks, alpha_pattern=alphas)
    theirs = get_peft_model(opened(pipe_folder).unet, config).base_model.model
    read = read_lora(tmp_path / "run" / "lora")
    wanted = {n: (m.r["default"], m.scaling["default"]) for n, m in theirs.named_modules() if hasattr(m, "lora_A") and m.lora_A}
    assert {n: (len(A), scale) for n, (A, _, scale) in read.items()} == wanted and len({r for r, _ in wanted.values()}) > 1
    plain = opened(pipe_folder)
    before = plain_picture(plain)
    plain.load_lora_weights(tmp_path / "run" / "lora")
    assert np.abs(plain_picture(plain) - plain_picture(run.pipe)).max() < 1e-5 < 1e-4 < np.abs(plain_picture(plain) - before).max()


def test_an_expression_on_a_pipeline_that_had_an_adapter(pipe_folder, tmp_path):
    "peft leaves its layers behind; the second run is the first all the same, and resumes."
    pipe, how = load(pipe_folder), dict(lora_targets=REGEX, lora_rank_pattern={"conv1": 3})
    run_of("ddpo", pipe, tmp_path / "first", **how)
    with pytest.warns(UserWarning, match="replaced by a fresh one"): run_of("ddpo", pipe, tmp_path / "second", **how)
    assert bits(weights(tmp_path / "first/lora")) == bits(weights(tmp_path / "second/lora"))
    go(pipe_folder, tmp_path / "whole", **how)
    go(pipe_folder, tmp_path / "cut", callbacks=stop_at(1), **how)
    go(pipe_folder, tmp_path / "cut", resume=True, **how)
    assert_same_run(tmp_path / "cut", tmp_path / "whole")


@pytest.mark.parametrize("changes, words", [
    (dict(lora_targets=r".*norm\d"), "lora_targets: linear layers and convolutions have a low-rank update, and .*norm"),
    (dict(lora_targets=r"to_q|to_k"), "no layer of this network"), (dict(lora_targets="*"), "or a regular expression"),
    (dict(lora_rank_pattern={"conv1": 2}), "lora_rank_pattern: of layers that lora_targets means, and none of them fits \\['conv1'\\]"),
    (dict(lora_alpha_pattern={"to_q": 0}), "each with a number above 0"), (dict(lora_rank_pattern=3), "lora_rank_pattern: None, or"),
    (dict(trainable="text_encoder"), "trainable: 'lora' or 'full'; text encoders are not trained here"),
    (dict(lora_alpha_pattern={"to_q": 1.}, trainable="full"), "lora_alpha_pattern: is about an adapter")])
def test_forms_that_are_impossible(pipe_folder, tmp_path, changes, words):
    with pytest.raises(ValueError, match=words): go(pipe_folder, tmp_path / "run", **changes)
    assert not (tmp_path / "run").exists()
