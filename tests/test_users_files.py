"What is written is read by others, and the reverse: against the formula alpha / rank * up * down, peft's own deltas and plain diffusers."
import json
from pathlib import Path
import numpy as np
import pytest
import torch
import test_families
from diffusers import DiffusionPipeline, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.utils import convert_state_dict_to_diffusers
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora import LoraLayer
from peft.utils import get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from alignkit.evaluate import evaluate, read_adapter
from alignkit.mdp import Drawing
from alignkit.pipelines import ATTENTION, WEIGHTS, add_lora, load_lora, lora_state, read_lora, save_lora, save_pipeline
from conftest import bits, brightness, go

sdxl_folder = test_families.sdxl_folder  # a fixture
TARGETS = {
    "attention": ATTENTION,
    "feed-forward": ("ff.net.0.proj", "ff.net.2"),
    "projections": (*ATTENTION, "proj_in", "proj_out"),
    "convolutions": (*ATTENTION, "conv_in", "conv1", "conv2", "conv_shortcut", "conv"),
    "time embedding": (*ATTENTION, "time_emb_proj", "linear_1", "linear_2"),
    "all linear": None,
}
UNET = Path("unet") / "diffusion_pytorch_model.safetensors"
SMALL = dict(num_epochs=1, eval_every=0)


def linear(net): return tuple(n for n, m in net.named_modules() if type(m) is nn.Linear)


def targets_of(net, kind): return TARGETS[kind] or linear(net)


def filled(net, seed=0, size=0.1):
    "The same network, its factors random as if they had been trained."
    g = torch.Generator().manual_seed(seed)
    for name, p in net.named_parameters():
        if "lora_" in name: p.data = size * torch.randn(p.shape, generator=g)
    return net


def opened(folder):
    pipe = DiffusionPipeline.from_pretrained(folder, **({} if "sdxl" in str(folder) else dict(safety_checker=None)))
    pipe.set_progress_bar_config(disable=True)
    return pipe


def picture(pipe):
    "By plain diffusers' own call."
    how = dict(num_inference_steps=2, guidance_scale=2., output_type="np", height=32, width=32)
    return pipe("a cat", generator=torch.Generator().manual_seed(0), **how).images[0]


def deltas(net, name):
    "What an adapter adds to each layer, by peft."
    return {n: m.get_delta_weight(name).detach() for n, m in net.named_modules() if isinstance(m, LoraLayer) and name in m.lora_A}


def products(layers):
    "What `read_lora` says that a file adds, by the formula; a convolution of r channels, then one of a single pixel."
    def one(A, B, scale): return scale * (B.flatten(1) @ A.flatten(1)).view(len(B), *A.shape[1:])
    return {n: one(*layer) for n, layer in layers.items()}


def assert_same_deltas(ours, theirs):
    assert ours.keys() == theirs.keys() and len(ours) > 0
    for n, delta in theirs.items(): assert_close(ours[n].view_as(delta), delta, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("kind", TARGETS)
@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_a_saved_adapter_is_read_whole(request, tmp_path, model, kind):
    "Whatever layers were named, plain diffusers loads all of them from the file, and draws the same picture."
    folder = request.getfixturevalue("pipe_folder" if model == "sd" else "sdxl_folder")
    pipe = opened(folder)
    base = picture(pipe)
    add_lora(pipe.unet, 4, lora_alpha=6., target_modules=targets_of(pipe.unet, kind))
    save_lora(filled(pipe.unet), tmp_path)
    assert all(".lora_A." in k or ".lora_B." in k for k in load_file(tmp_path / WEIGHTS))
    plain = opened(folder)
    plain.load_lora_weights(tmp_path)
    assert_same_deltas(deltas(plain.unet, "default_0"), deltas(pipe.unet, "default"))
    assert np.abs(picture(pipe) - base).max() > 1e-3
    assert np.abs(picture(plain) - picture(pipe)).max() < 1e-5
    assert_same_deltas(products(read_lora(tmp_path)), deltas(pipe.unet, "default"))


def test_files_of_earlier_versions_are_read(pipe_folder, tmp_path):
    "There attention had diffusers' old names in a file, and everything else peft's."
    pipe = opened(pipe_folder)
    add_lora(pipe.unet, 4, lora_alpha=6., target_modules=TARGETS["projections"])
    older = convert_state_dict_to_diffusers(get_peft_model_state_dict(filled(pipe.unet)))
    assert {"lora.down" in k or "lora.up" in k for k in older} == {True, False}
    settings = pipe.unet.peft_config["default"].to_dict()
    StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=older, unet_lora_adapter_metadata=settings)
    assert_same_deltas(products(read_lora(tmp_path)), deltas(pipe.unet, "default"))
    wanted = lora_state(pipe.unet)
    filled(pipe.unet, seed=1)
    load_lora(pipe.unet, tmp_path)
    assert bits(lora_state(pipe.unet)) == bits(wanted)


@pytest.fixture(autouse=True)
def as_before():
    yield
    torch.compiler.set_stance("default")


PATTERNS = {
    "names": dict(rank_pattern={"to_q": 2}, alpha_pattern={"to_q": 3., "attn2.to_k": 5.}),
    "regular expressions": dict(rank_pattern={r"attn[12]\.to_v": 3}, alpha_pattern={r"up_blocks.*to_[qk]": 3., r"to_[qv]": 7., "to_q": 9.}),
    "anchored": dict(alpha_pattern={"^mid_block.attentions.0.transformer_blocks.0.attn1.to_q": 1., r"to_out\.0": 2.}),
    "rank-stabilised": dict(use_rslora=True),
}


@pytest.mark.parametrize("kind", PATTERNS)
def test_patterns_are_matched_as_peft_matches_them(pipe_folder, tmp_path, kind):
    "A peft folder, or its file alone, and a file that we write and plain diffusers loads: each layer has the scale that peft gives it."
    config = LoraConfig(r=4, lora_alpha=8, target_modules=[*ATTENTION, "proj_in"], init_lora_weights=False, **PATTERNS[kind])
    get_peft_model(opened(pipe_folder).unet, config).save_pretrained(tmp_path / "peft")  # which sorts overlapping patterns by name
    theirs = deltas(PeftModel.from_pretrained(opened(pipe_folder).unet, tmp_path / "peft").base_model.model, "default")
    for path in (tmp_path / "peft", tmp_path / "peft" / "adapter_model.safetensors"): assert_same_deltas(products(read_lora(path)), theirs)

    pipe = opened(pipe_folder)
    pipe.unet.add_adapter(config, "patterned")
    save_lora(pipe.unet, tmp_path / "ours")
    plain = opened(pipe_folder)
    plain.load_lora_weights(tmp_path / "ours")
    assert_same_deltas(deltas(plain.unet, "default_0"), deltas(pipe.unet, "patterned"))
    assert_same_deltas(products(read_lora(tmp_path / "ours")), deltas(pipe.unet, "patterned"))


def kohya(net, name_of, alphas=(2.,)):
    "A file's contents as kohya's scripts write them: factors, and an alpha of its own for each layer."
    g, state = torch.Generator().manual_seed(0), {}
    layers = {n: m for n, m in net.named_modules() if type(m) in (nn.Linear, nn.Conv2d) and name_of(n)}
    for k, (n, m) in enumerate(layers.items()):
        out, inputs, *kernel = m.weight.shape
        state[f"lora_unet_{name_of(n)}.lora_down.weight"] = 0.1 * torch.randn(4, inputs, *kernel, generator=g)
        state[f"lora_unet_{name_of(n)}.lora_up.weight"] = 0.1 * torch.randn(out, 4, *[1] * len(kernel), generator=g)
        if alphas: state[f"lora_unet_{name_of(n)}.alpha"] = torch.tensor(alphas[k % len(alphas)])
    return state


def fused_by_diffusers(folder, file):
    "What `fuse_lora` adds to each weight."
    pipe = opened(folder)
    before = {n: w.clone() for n, w in pipe.unet.state_dict().items()}
    pipe.load_lora_weights(str(file))
    pipe.fuse_lora()
    pipe.unload_lora_weights()
    added = {n.removesuffix(".weight"): w - before[n] for n, w in pipe.unet.state_dict().items()}
    return {n: w for n, w in added.items() if w.any()}


@pytest.mark.parametrize("alphas", [(2.,), (1., 2., 3.), ()])
def test_kohya_files(pipe_folder, tmp_path, alphas):
    "Linear layers and convolutions, each with its own alpha or without: the formula, and diffusers' `fuse_lora`."
    attention = ATTENTION if len(alphas) > 1 else ()  # there diffusers 0.42 takes the commonest alpha for all layers
    def name_of(n): return "" if "down_blocks.0" in n or "norm" in n else n.replace(".", "_")
    state = kohya(opened(pipe_folder).unet, name_of, alphas)
    save_file(state, tmp_path / "kohya.safetensors")
    ours = products(read_lora(tmp_path / "kohya.safetensors"))
    theirs = fused_by_diffusers(pipe_folder, tmp_path / "kohya.safetensors")
    assert len(theirs) == len(state) / (3 if alphas else 2) and any(w.ndim == 4 for w in ours.values())
    assert_same_deltas(*({n: w for n, w in x.items() if not n.endswith(attention)} if attention else x for x in (ours, theirs)))
    for n, delta in ours.items():
        up, down = (state[f"lora_unet_{name_of(n)}.lora_{w}.weight"] for w in ("up", "down"))
        scale = state[f"lora_unet_{name_of(n)}.alpha"] / 4 if alphas else 1.
        assert_close(delta.flatten(1), scale * up.flatten(1) @ down.flatten(1))


def test_kohya_files_of_sdxl(sdxl_folder, tmp_path):
    "Their blocks are counted through: with two layers a group, input block 4 is the first of the second group."
    config = UNet2DConditionModel.load_config(Path(sdxl_folder) / "unet") | dict(layers_per_block=2)
    pipe = opened(sdxl_folder)
    pipe.register_modules(unet=UNet2DConditionModel.from_config(config))
    pipe.save_pretrained(tmp_path / "sdxl")
    groups = {"down_blocks_1_attentions_0": "input_blocks_4_1", "down_blocks_1_attentions_1": "input_blocks_5_1",
              "mid_block_attentions_0": "middle_block_1", "up_blocks_0_attentions_2": "output_blocks_2_1"}
    def name_of(n):
        n, group = n.replace(".", "_"), next((g for g in groups if n.replace(".", "_").startswith(g)), None)
        return n.replace(group, groups[group]) if group and "_attn" in n else ""
    save_file(kohya(pipe.unet, name_of), tmp_path / "kohya.safetensors")
    theirs = fused_by_diffusers(tmp_path / "sdxl", tmp_path / "kohya.safetensors")
    assert len(theirs) == 8 * len(groups)
    assert_same_deltas(products(read_lora(tmp_path / "kohya.safetensors")), theirs)


@pytest.fixture(scope="module")
def adapter_folder(pipe_folder, tmp_path_factory):
    "An adapter on disk, and what it adds."
    folder, pipe = tmp_path_factory.mktemp("adapter"), opened(pipe_folder)
    add_lora(pipe.unet, 4, lora_alpha=6.)
    save_lora(filled(pipe.unet), folder)
    return folder


@pytest.mark.parametrize("name", [None, "mine"])
def test_an_adapter_of_another_name(pipe_folder, adapter_folder, tmp_path, name):
    "diffusers' loader calls it default_0, a user what he likes: it is saved, read, loaded and evaluated like any other."
    pipe = opened(pipe_folder)
    pipe.load_lora_weights(adapter_folder, adapter_name=name)
    save_lora(pipe.unet, tmp_path)
    assert bits(load_file(tmp_path / WEIGHTS)) == bits(load_file(adapter_folder / WEIGHTS))
    assert_same_deltas(products(read_lora(tmp_path)), deltas(pipe.unet, name or "default_0"))
    assert_same_deltas({n: B @ A for n, (A, B) in read_adapter(pipe).items()}, deltas(pipe.unet, name or "default_0"))
    filled(pipe.unet, seed=1)
    load_lora(pipe.unet, adapter_folder)
    assert bits(lora_state(pipe.unet)) == bits({k.removeprefix("unet."): v for k, v in load_file(adapter_folder / WEIGHTS).items()})
    how = dict(pipe=pipe_folder, how=Drawing(num_inference_steps=2), rewards=brightness, diversity=False, prompts=["a cat"], num_samples=4)
    means = [evaluate({"it": subject}, **how).to_dict("records") for subject in (pipe, str(adapter_folder))]
    same = [[row[k] for row in rows for k in ("subject", "measure", "mean")] for rows in means]
    assert [x for x in same[0] if isinstance(x, str)] == [x for x in same[1] if isinstance(x, str)]
    numbers = [np.array([x for x in s if not isinstance(x, str)]) for s in same]
    assert len(numbers[0]) > 1 and np.allclose(*numbers, rtol=1e-5, atol=1e-6)


def test_several_adapters(pipe_folder, adapter_folder, tmp_path):
    "A file holds one: the active one, with the strength that it has. Two that act together are refused, and `save_pipeline` keeps both."
    pipe = opened(pipe_folder)
    for name in ("first", "second"): pipe.load_lora_weights(adapter_folder, adapter_name=name)
    for n, p in pipe.unet.named_parameters():
        if "second" in n: p.data *= 0.5
    pipe.set_adapters(["first", "second"], [0.5, 2.])
    several = r"net: a file holds one adapter.*first, second\) 2 are active"
    with pytest.raises(ValueError, match=several): save_lora(pipe.unet, tmp_path / "both")
    assert not (tmp_path / "both").exists()
    save_pipeline(pipe, tmp_path / "sum")
    assert np.abs(picture(opened(tmp_path / "sum")) - picture(pipe)).max() < 1e-5
    pipe.set_adapters("second", 0.5)
    save_lora(pipe.unet, tmp_path / "one")
    plain = opened(pipe_folder)
    plain.load_lora_weights(tmp_path / "one")
    assert_same_deltas(deltas(plain.unet, "default_0"), deltas(pipe.unet, "second"))
    assert np.abs(picture(plain) - picture(pipe)).max() < 1e-5


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_a_fused_pipeline(request, tmp_path, model):
    "`run.save_pipeline` writes what `from_pretrained` loads to the picture of `run.pipe`, which keeps every bit."
    folder = request.getfixturevalue("pipe_folder" if model == "sd" else "sdxl_folder")
    run = go(folder, lora_targets=TARGETS["convolutions"], lora_rank=2, lora_alpha=6., **SMALL)
    filled(run.net)
    before, config, ours = bits(run.net.state_dict()), dict(run.pipe.config), picture(run.pipe)
    run.save_pipeline(tmp_path / "sdxl" if model == "sdxl" else tmp_path / "sd")
    plain = opened(tmp_path / "sdxl" if model == "sdxl" else tmp_path / "sd")
    assert plain.unet.state_dict().keys() == opened(folder).unet.state_dict().keys()
    assert np.abs(ours - picture(opened(folder))).max() > 1e-3
    assert np.abs(picture(plain) - ours).max() < 1e-5
    assert bits(run.net.state_dict()) == before and dict(run.pipe.config) == config and run.pipe.unet is run.net
    assert np.array_equal(picture(run.pipe), ours)


def test_fusing_keeps_what_acts(pipe_folder, tmp_path):
    "An adapter that is off adds nothing, one that is merged already is not added twice, and in bfloat16 the sum is rounded once."
    pipe = opened(pipe_folder)
    layer = "mid_block.attentions.0.transformer_blocks.0.attn1.to_q"
    base = pipe.unet.state_dict()[f"{layer}.weight"].clone()
    add_lora(pipe.unet, 4, lora_alpha=6.)
    delta = deltas(filled(pipe.unet), "default")[layer]
    def saved(name):
        save_pipeline(pipe, tmp_path / name)
        return load_file(tmp_path / name / UNET)[f"{layer}.weight"]
    assert_close(saved("on"), base + delta)
    pipe.unet.disable_adapters()
    assert saved("off").equal(base)
    pipe.unet.enable_adapters()
    pipe.fuse_lora(components=["unet"])
    assert_close(saved("merged"), base + delta)
    pipe.unfuse_lora(components=["unet"])
    for p in pipe.unet.parameters(): p.data = p.data.bfloat16() if not p.requires_grad else p.data
    assert_close(saved("bfloat16"), (base.bfloat16() + delta).bfloat16(), rtol=2**-8, atol=0)


def emptied(pipe, adapter_folder):
    "An adapter was loaded and deleted again: peft's layers stay, around plain ones."
    pipe.load_lora_weights(adapter_folder)
    pipe.delete_adapters("default_0")
    return pipe


def compiled(pipe, adapter_folder):
    "One block compiled, and the whole network: its names, without the minute that compiling takes."
    torch.compiler.set_stance("force_eager")
    pipe.unet.mid_block = torch.compile(pipe.unet.mid_block, backend="eager")
    pipe.unet = torch.compile(pipe.unet, backend="eager")
    return pipe


@pytest.mark.parametrize("made", [emptied, compiled])
def test_all_weights_have_their_plain_names(pipe_folder, adapter_folder, tmp_path, made):
    "trainable='full' on a network with something around its layers: diffusers finds every weight, and a resumed run goes on."
    full = dict(trainable="full", eval_every=0, learning_rate=1e-4)
    run = go(made(opened(pipe_folder), adapter_folder), tmp_path / "run", num_epochs=1, **full)
    wanted = UNet2DConditionModel.from_config(run.net.config).state_dict().keys()
    found = load_file(tmp_path / "run" / UNET)
    assert found.keys() == wanted
    assert json.loads((tmp_path / "run" / "unet" / "config.json").read_text())["_class_name"] == "UNet2DConditionModel"
    run.save_pipeline(tmp_path / "plain")
    assert np.array_equal(picture(opened(tmp_path / "plain")), picture(run.pipe))
    go(made(opened(pipe_folder), adapter_folder), tmp_path / "run", num_epochs=2, resume=True, **full)
    go(pipe_folder, tmp_path / "other", num_epochs=2, **full)
    again, other = (load_file(tmp_path / name / UNET) for name in ("run", "other"))
    for k in wanted: assert_close(again[k], other[k], rtol=0, atol=1e-5)


def test_an_adapter_of_a_compiled_network(pipe_folder, adapter_folder, tmp_path):
    "No name of the wrapper reaches the file, and a run that goes on finds its layers again."
    go(compiled(opened(pipe_folder), adapter_folder), tmp_path / "run", **SMALL)
    run = go(compiled(opened(pipe_folder), adapter_folder), tmp_path / "run", resume=True, **SMALL | dict(num_epochs=2))
    run.save_lora(tmp_path / "mine")
    plain = opened(pipe_folder)
    plain.load_lora_weights(tmp_path / "mine")
    assert np.abs(picture(plain) - picture(run.pipe)).max() < 1e-5
    assert bits(load_file(tmp_path / "mine" / WEIGHTS)) == bits(load_file(tmp_path / "run" / "lora" / WEIGHTS))


class Around(nn.Module):
    "Somebody's layer around another."
    def __init__(self, inside):
        super().__init__()
        self.inside = inside
    def forward(self, *args, **kwargs): return self.inside(*args, **kwargs)


@pytest.mark.parametrize("trainable", ["full", "lora"])
def test_other_names_are_refused(pipe_folder, tmp_path, trainable):
    "Before any work where a layer has a name that the plain class does not have; at the time of saving where it got one in between."
    pipe = opened(pipe_folder)
    pipe.unet.mid_block = Around(pipe.unet.mid_block)
    with pytest.raises(ValueError, match="net: its names .*'mid_block.inside"): go(pipe, tmp_path / "run", trainable=trainable, **SMALL)
    assert not (tmp_path / "run").exists()
    run = go(pipe_folder, tmp_path / "run", trainable=trainable, **SMALL)
    run.net.mid_block = Around(run.net.mid_block)
    kept = bits(run.net.state_dict())
    with pytest.raises(ValueError, match="net: its names .*'mid_block.inside"): run.save_pipeline(tmp_path / "no")
    if trainable == "lora":
        with pytest.raises(ValueError, match="net: its names .*'mid_block.inside"): run.save_lora(tmp_path / "no")
    assert not (tmp_path / "no").exists() and bits(run.net.state_dict()) == kept


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_the_adapter_of_a_text_encoder(request, tmp_path, model):
    "It takes part in training, which says so; run.save_lora and run.save_pipeline write it, and plain diffusers draws the same picture."
    folder = request.getfixturevalue("pipe_folder" if model == "sd" else "sdxl_folder")
    pipe = opened(folder)
    encoders = [name for name in pipe.components if name.startswith("text_encoder")]
    for name in encoders:
        part = pipe.components[name]
        part.add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "out_proj"], init_lora_weights=False), f"of_{name}")
        filled(part, seed=2)
    told = f"pipe: the adapter of {', '.join(encoders)} takes part"
    with pytest.warns(UserWarning, match=told): run = go(pipe, tmp_path / "run", **SMALL)
    ours = picture(filled(run.pipe.unet) and run.pipe)
    run.save_lora(tmp_path / "both")
    save_lora(run.net, tmp_path / "net")
    pictures = {}
    for name in ("both", "net"):
        plain = opened(folder)
        plain.load_lora_weights(tmp_path / name)
        pictures[name] = picture(plain)
    assert np.abs(pictures["both"] - ours).max() < 1e-5 < 1e-3 < np.abs(pictures["net"] - ours).max()
    assert {k.split(".")[0] for k in load_file(tmp_path / "run" / "lora" / WEIGHTS)} == {"unet"}
    run.save_pipeline(tmp_path / f"{model} plain")
    assert np.abs(picture(opened(tmp_path / f"{model} plain")) - ours).max() < 1e-5
