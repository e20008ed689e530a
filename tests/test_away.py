"""What is taken away from a run: files that plain diffusers and other programs read, a card that says what it is, the run itself read back,
and the way to the hub, of which a server on this machine takes the place."""
import base64, hashlib, json, os, re, socket, subprocess, sys, threading
from collections import Counter
from contextlib import contextmanager
from html.parser import HTMLParser
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
import numpy as np
import pytest
import torch
import test_families
from diffusers import StableDiffusionXLPipeline, UNet2DConditionModel
from diffusers.utils import convert_unet_state_dict_to_peft
from huggingface_hub import ModelCard, constants
from peft import LoraConfig
from safetensors.torch import load_file
from torch.testing import assert_close
from alignkit import runs
from alignkit.evaluate import read_adapter
from alignkit.kohya import original_name, read_header, save_kohya
from alignkit.pipelines import ATTENTION, WEIGHTS, add_lora, read_lora
from alignkit.rewards import Reward
from alignkit.runs import Run, read_run
from conftest import bits, go, history, told, weights
from test_users_files import PATTERNS, assert_same_deltas, deltas, filled, opened, picture, products, targets_of

sdxl_folder = test_families.sdxl_folder  # a fixture
FEW = dict(num_epochs=3, eval_every=1, eval_samples=3, samples_per_epoch=4, updates_per_epoch=1)


# ---- names and scales of other programs

def counted(unet):
    "diffusers' layers -> the names of SDXL's authors, by walking through the network and counting its blocks."
    names, at = {"conv_in": "input_blocks.0.0"}, 0
    for i, block in enumerate(unet.down_blocks):
        for j in range(len(block.resnets)):
            at += 1
            names[f"down_blocks.{i}.resnets.{j}"] = f"input_blocks.{at}.0"
            names[f"down_blocks.{i}.attentions.{j}"] = f"input_blocks.{at}.1"
        if block.downsamplers:
            at += 1
            names[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{at}.0.op"
    names |= {"mid_block.resnets.0": "middle_block.0", "mid_block.attentions.0": "middle_block.1", "mid_block.resnets.1": "middle_block.2"}
    at = -1
    for i, block in enumerate(unet.up_blocks):
        for j in range(len(block.resnets)):
            at += 1
            names[f"up_blocks.{i}.resnets.{j}"] = f"output_blocks.{at}.0"
            names[f"up_blocks.{i}.attentions.{j}"] = f"output_blocks.{at}.1"
        last = 2 if hasattr(block, "attentions") else 1
        if block.upsamplers: names[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{at}.{last}.conv"
    return names | {"conv_out": "out.2", "time_embedding.linear_1": "time_embed.0", "time_embedding.linear_2": "time_embed.2",
                    "add_embedding.linear_1": "label_emb.0.0", "add_embedding.linear_2": "label_emb.0.2"}


RESIDUAL = {"conv1": "in_layers.2", "time_emb_proj": "emb_layers.1", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}


def expected_name(layer, unet, model):
    "What kohya's scripts call a layer of a UNet."
    if model == "sdxl":
        names = counted(unet)
        block = max((n for n in names if layer == n or layer.startswith(f"{n}.")), key=len)
        inside = layer[len(block):].lstrip(".")
        layer = ".".join(filter(None, [names[block], RESIDUAL.get(inside, inside) if ".resnets." in layer else inside]))
    return f"lora_unet_{layer.replace('.', '_')}"


def by_formula(state):
    "Name -> alpha / rank * up * down of a file."
    found = {}
    for name in {k.split(".")[0] for k in state}:
        alpha, down, up = (state[f"{name}.{what}"] for what in ("alpha", "lora_down.weight", "lora_up.weight"))
        found[name] = alpha / len(down) * (up.flatten(1) @ down.flatten(1)).view(len(up), *down.shape[1:])
    return found


@pytest.mark.parametrize("kind", ["attention", "feed-forward", "convolutions", "all linear"])
@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_kohyas_file(request, tmp_path, model, kind):
    "Each layer has kohya's name and its own change of weight by the formula; plain diffusers loads all of it, and draws the same picture."
    folder = request.getfixturevalue("pipe_folder" if model == "sd" else "sdxl_folder")
    pipe = opened(folder)
    base = picture(pipe)
    add_lora(pipe.unet, 4, lora_alpha=6., target_modules=targets_of(pipe.unet, kind))
    state = load_file(save_kohya(filled(pipe.unet), tmp_path / "mine", pipe))
    ours, plain_unet = deltas(pipe.unet, "default"), opened(folder).unet
    named = {expected_name(n, plain_unet, model): delta for n, delta in ours.items()}
    assert {state[f"{n}.alpha"].item() for n in named} == {6.}
    assert_same_deltas(by_formula(state), named)
    plain = opened(folder)
    plain.load_lora_weights(tmp_path / "mine")
    assert_same_deltas(deltas(plain.unet, "default_0"), ours)
    assert np.abs(picture(pipe) - base).max() > 1e-3
    assert np.abs(picture(plain) - picture(pipe)).max() < 1e-5
    if model == "sd": assert_same_deltas(products(read_lora(tmp_path / "mine")), ours)  # of SDXL two layers a block are read, as it has


REAL = {  # the networks of Stable Diffusion 1.5 and SDXL
    "sd": dict(cross_attention_dim=768, attention_head_dim=8),
    "sdxl": dict(
        block_out_channels=(320, 640, 1280), cross_attention_dim=2048, attention_head_dim=(5, 10, 20),
        transformer_layers_per_block=(1, 2, 10),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"), use_linear_projection=True,
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), addition_embed_type="text_time",
        addition_time_embed_dim=256, projection_class_embeddings_input_dim=2816)}


@pytest.mark.parametrize("model, layers", [("sd", 282), ("sdxl", 794)])
def test_every_layer_of_the_real_networks(model, layers):
    "diffusers' reader takes each by its name in kohya's file for the layer that it was; a number stands for the weights."
    with torch.device("meta"): net = UNet2DConditionModel(**REAL[model])
    names = [n for n, m in net.named_modules() if type(m) in (torch.nn.Linear, torch.nn.Conv2d)]
    spelled = {n: original_name(n, net.config) if model == "sdxl" else n for n in names}
    state = {f"lora_unet_{spelled[n].replace('.', '_')}.{w}": torch.tensor([[float(i)]])
             for i, n in enumerate(names) for w in ("lora_down.weight", "lora_up.weight")}
    assert len(state) == 2 * layers
    read, _ = StableDiffusionXLPipeline.lora_state_dict(state, unet_config=net.config)
    read = convert_unet_state_dict_to_peft({k.removeprefix("unet."): v for k, v in read.items()})
    assert {k.removesuffix(".lora_A.weight"): v.item() for k, v in read.items() if "lora_A" in k} == {n: i for i, n in enumerate(names)}


@pytest.mark.parametrize("kind", PATTERNS)
def test_scales_of_their_own(pipe_folder, tmp_path, kind):
    "Where ranks and scales differ from layer to layer, all readers get each layer's own, though some of them read one alpha for all."
    pipe = opened(pipe_folder)
    pipe.unet.add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=[*ATTENTION, "proj_in"], **PATTERNS[kind]), "patterned")
    filled(pipe.unet)
    pipe.set_adapters("patterned", 0.5)
    state = load_file(save_kohya(pipe.unet, tmp_path))
    ours = deltas(pipe.unet, "patterned")
    assert len({v.item() for k, v in state.items() if k.endswith(".alpha")}) == 1
    assert_same_deltas(by_formula(state), {expected_name(n, pipe.unet, "sd"): d for n, d in ours.items()})
    plain = opened(pipe_folder)
    plain.load_lora_weights(tmp_path)
    assert_same_deltas(deltas(plain.unet, "default_0"), ours)
    assert_same_deltas(products(read_lora(tmp_path)), ours)
    assert np.abs(picture(plain) - picture(pipe)).max() < 1e-5


@pytest.mark.parametrize("model", ["sd", "sdxl"])
def test_kohyas_names_of_text_encoders(request, tmp_path, model):
    "One is lora_te, two are lora_te1 and lora_te2; their layers have the outermost name that transformers 5 leaves out."
    folder = request.getfixturevalue("pipe_folder" if model == "sd" else "sdxl_folder")
    pipe = opened(folder)
    add_lora(pipe.unet, 2)
    encoders = [n for n in pipe.components if n.startswith("text_encoder")]
    for name in encoders:
        pipe.components[name].add_adapter(LoraConfig(r=2, lora_alpha=6, target_modules=["q_proj", "out_proj", "fc1"]))
        filled(pipe.components[name], seed=2)
    state = load_file(save_kohya(filled(pipe.unet), tmp_path, pipe))
    heads = Counter(re.match(r"lora_(?:unet|te\d?)", k)[0] for k in state if k.endswith(".alpha"))
    assert heads.keys() == {"lora_unet", *(["lora_te"] if model == "sd" else ["lora_te1", "lora_te2"])}
    first = "lora_te" if model == "sd" else "lora_te2"
    assert f"{first}_text_model_encoder_layers_0_self_attn_q_proj.lora_down.weight" in state
    assert {v.item() for k, v in state.items() if k.startswith("lora_te") and k.endswith(".alpha")} == {6.}
    plain = opened(folder)
    plain.load_lora_weights(tmp_path)
    assert np.abs(picture(plain) - picture(pipe)).max() < 1e-5


def test_what_kohyas_format_cannot_hold(pipe_folder, tmp_path):
    "It is refused by name before a file is there; and a folder may be called as it likes."
    pipe = opened(pipe_folder)
    pipe.unet.add_adapter(LoraConfig(r=2, target_modules=list(ATTENTION), use_dora=True))
    with pytest.raises(ValueError, match="no plain LoRA.*lora_magnitude_vector.*format='diffusers'"): save_kohya(pipe.unet, tmp_path / "no")
    other = torch.nn.Linear(2, 2)
    with pytest.raises(ValueError, match="known for a UNet, not for a Linear"): save_kohya(other, tmp_path / "no")
    assert not (tmp_path / "no").exists()
    (tmp_path / "file").write_text("")
    add_lora(pipe.unet, 2)
    with pytest.raises(NotADirectoryError, match="folder: .* is a file"): save_kohya(filled(pipe.unet), tmp_path / "file")
    for name in ("checkpoint 9", WEIGHTS.removesuffix(".safetensors")):  # diffusers passes over the first; the second is another format's
        assert save_kohya(pipe.unet, tmp_path / name).name == "lora.safetensors"
        opened(pipe_folder).load_lora_weights(tmp_path / name)


# ---- runs of every kind

def rising(images, prompts):
    "The evaluations, known by their prompt, are best after epoch 1."
    rising.looks += "a cow" in prompts
    return images.mean((1, 2, 3)) + (2. * (rising.looks == 3) if "a cow" in prompts else 0.)


@pytest.fixture(scope="module")
def lora_run(pipe_folder, tmp_path_factory):
    "A run with evaluations and a judge, and the folder that it left."
    rising.looks, out = 0, tmp_path_factory.mktemp("away") / "run"
    calm = Reward(lambda images, prompts: 5. - 0.1 * rising.looks + 0 * images.mean((1, 2, 3)), "calm")
    run = go(pipe_folder, out, rising, eval_rewards=(calm,), early_stop="calm", early_stop_drop=100., lora_alpha=6., **FEW)
    assert run.best_epoch == 1 and len(run.rows) == 3
    return run


@pytest.fixture(scope="module")
def full_run(pipe_folder, tmp_path_factory):
    return go(pipe_folder, tmp_path_factory.mktemp("away") / "full", trainable="full", **FEW)


def code_of(folder):
    return (folder / "README.md").read_text(encoding="utf-8").split("```python\n")[1].split("```")[0]


def drawn_by_card(folder):
    "The picture that a card's own code draws, run in its folder, and the call that drew it."
    names, was = {}, os.getcwd()
    os.chdir(folder)
    try: exec(code_of(folder), names)
    finally: os.chdir(was)
    call = re.search(r"picture = pipe\((.*), generator=g\)", code_of(folder))[1]
    return np.asarray(names["picture"]).astype(int), call


def drawn_by(pipe, call):
    "The same picture by another pipeline."
    return np.asarray(eval(f"pipe({call}, generator=torch.Generator().manual_seed(0))", dict(pipe=pipe, torch=torch)).images[0]).astype(int)


@pytest.mark.parametrize("what", ["lora/", "lora_best/", "diffusers", "kohya", "both", "pipeline", "unet/"])
def test_the_code_of_a_card_runs(lora_run, full_run, tmp_path, what):
    "It draws what the run's pipeline draws, and not what the base model does; a file's header has our texts beside diffusers' own."
    run = full_run if what == "unet/" else lora_run
    folder = run.folder.path / what if what.endswith("/") else tmp_path / "taken"
    if what == "pipeline": run.save_pipeline(folder)
    elif not what.endswith("/"): run.save_lora(folder, what)
    ours, call = drawn_by_card(folder)
    same = Run.load(run.folder.path, "best") if what == "lora_best/" else run
    assert np.abs(ours - drawn_by(same.pipe, call)).max() <= 1
    assert np.abs(ours - drawn_by(opened(run.config["pipe"]), call)).max() > 1
    assert {"README.md", "before.png", "after.png", "curve.png", "history.csv"} <= {f.name for f in folder.iterdir()}
    loras = [f for f in folder.glob("*.safetensors") if what not in ("unet/", "pipeline")]
    assert len(loras) == {"both": 2, "pipeline": 0, "unet/": 0}.get(what, 1)
    for file in loras:
        header = read_header(file)
        assert ("lora_adapter_metadata" in header) == (file.name == WEIGHTS)
        if file.name == WEIGHTS: assert json.loads(header["lora_adapter_metadata"])["unet.lora_alpha"] == 6.
        assert (header["ss_network_dim"], header["ss_network_alpha"], header["ss_network_module"]) == ("4", "6", "networks.lora")
        assert (header["alignkit.reward"], header["alignkit.epoch"]) == ("rising", "1" if what == "lora_best/" else "2")
        assert header["modelspec.title"] == "rising, by ddpo_is" and header["ss_sd_model_name"] == Path(run.config["pipe"]).name


def test_what_a_card_says(lora_run, tmp_path):
    "YAML that the hub reads; base, method, rewards, judge that fell, prompts and seed of the pictures, settings, versions."
    lora_run.save_lora(tmp_path / "mine", "both")
    card = ModelCard.load(tmp_path / "mine" / "README.md")
    assert card.data.library_name == "diffusers" and card.data.license == "unknown" and card.data.base_model is None
    assert {"diffusers", "lora", "text-to-image", "alignkit", "ddpo_is"} <= set(card.data.tags)
    text, base, last = card.text, lora_run.eval_base, lora_run.rows[-1]
    assert f"`{Path(lora_run.config['pipe']).name}`" in text and "the reward `rising`" in text
    fell = f"from {base['eval_calm_mean']:.4g} before training to {last['eval_calm_mean']:.4g} (epoch 2)"
    assert f"**The judge `calm` fell**, {fell}" in text
    assert "**The reward on held-out prompts rose and fell**" in text
    row = [f"{x['eval_reward_mean']:.4g} ± {x['eval_reward_sem']:.4g}" for x in (base, last)]
    assert f"| reward: rising | {row[0]} | {row[1]} |" in text
    assert "row by row: “a cow”, “a cow”, “a cow”." in text.lower() and "(seed 0)" in text
    for name in ("learning_rate", "lora_rank", "samples_per_epoch"): assert f"| `{name}` | `{lora_run.config[name]}` |" in text
    assert f"torch {torch.__version__}" in text and "That of the base model is not known" in text and "<lora:mine:1>" in text
    assert text.count(lora_run.config["pipe"]) == 1  # in the code, which is for this machine


def test_cards_of_an_interrupted_and_of_a_longer_run(pipe_folder, lora_run, tmp_path):
    "The best weights have a card of their epoch. A run that goes on takes away the card of weights that it replaces, until it ends."
    text = (lora_run.folder.path / "lora_best" / "README.md").read_text(encoding="utf-8")
    assert "weights after epoch 1 (the run went on to epoch 2)" in text and "`calm` fell" in text and "rose and fell" not in text
    stopped = lambda run, row: row["epoch"] == 0
    run = go(pipe_folder, tmp_path / "run", callbacks=[stopped], **FEW)
    text = (run.folder.path / "lora" / "README.md").read_text(encoding="utf-8")
    assert "The run was stopped after epoch 0 by the callback &lt;lambda&gt;." in text  # an element of HTML otherwise


def test_a_card_that_fails_takes_nothing_away(pipe_folder, tmp_path, monkeypatch):
    "The run is over and its weights are on the disk; what the card fails of is said."
    def broken(*args): raise OSError("no space left")
    monkeypatch.setattr(runs, "describe", broken)
    found = told(lambda: go(pipe_folder, tmp_path / "run", num_epochs=1, eval_every=0), "no card was written (OSError: no space left)")
    assert len(found) == 1 and (tmp_path / "run" / "lora" / WEIGHTS).is_file()


def test_a_run_without_a_folder(pipe_folder, tmp_path):
    "It has a curve and settings, and no pictures."
    run = go(pipe_folder, num_epochs=1, eval_every=0)
    run.save_lora(tmp_path / "mine")
    assert {f.name for f in (tmp_path / "mine").iterdir()} == {"README.md", "curve.png", "history.csv", WEIGHTS}
    ours, call = drawn_by_card(tmp_path / "mine")
    assert "'a cat'" in call and np.abs(ours - drawn_by(run.pipe, call)).max() <= 1


# ---- a run read back

@pytest.mark.parametrize("which", ["last", "best", 1])
def test_load(lora_run, which):
    "The weights of the folder that is meant, on the base model, and the history; it evaluates and saves like the run itself."
    path = lora_run.folder.path
    where = dict(last="lora", best="lora_best").get(which, f"checkpoints/epoch_000{which}")
    run = Run.load(path, which)
    assert run.epoch == {"last": 2}.get(which, 1)
    assert_same_deltas(deltas(run.net, "default"), products(read_lora(path / where)))
    plain = opened(run.config["pipe"])
    plain.load_lora_weights(path / where)
    assert np.array_equal(picture(run.pipe), picture(plain))
    assert bits(history(path)) == bits([{k: v for k, v in r.items() if k in history(path)[0]} for r in run.rows])
    assert not any(p.requires_grad for p in run.net.parameters())
    for n, (A, B) in read_adapter(run).items(): assert_close(B @ A, deltas(run.net, "default")[n].flatten(1).view_as(B @ A))


def test_load_of_a_run_that_trained_all_weights(full_run):
    run = Run.load(full_run.folder.path)
    assert bits(run.net.state_dict()) == bits(full_run.net.state_dict())
    assert np.array_equal(picture(run.pipe), picture(full_run.pipe))
    with pytest.raises(ValueError, match="which: the weights that .* has are .*'last'; got 'best'"): Run.load(full_run.folder.path, "best")
    with pytest.raises(ValueError, match="trained all weights; use run.save_pipeline"): run.save_lora("no")


def test_load_needs_the_model_that_it_was(lora_run, pipe_folder, sdxl_folder, tmp_path):
    "Another model is refused by the checksum of its weights; so is a folder without weights, and one without a run."
    path = lora_run.folder.path
    other = opened(pipe_folder)
    with torch.no_grad(): other.vae.decoder.conv_out.bias[0] += 1e-3
    with pytest.raises(ValueError, match=r"not the model that .* was made with: other weights in vae \(of"): Run.load(path, pipe=other)
    with pytest.raises(ValueError, match="other weights in unet, vae, text_encoder, text_encoder_2"): Run.load(path, pipe=sdxl_folder)
    mine = opened(pipe_folder)
    add_lora(mine.unet, 2)
    found = told(lambda: picture(Run.load(path, pipe=mine).pipe), "the adapter that this pipeline has is replaced")
    assert len(found) == 1 and list(mine.unet.peft_config) == ["default"] and mine.unet.peft_config["default"].r == 4
    with pytest.raises(FileNotFoundError, match="no run there"): Run.load(tmp_path)
    empty = read_run(path).folder
    (tmp_path / "config.json").write_bytes(empty.config_file.read_bytes())
    with pytest.raises(ValueError, match="none: it has neither finished nor written a checkpoint; got 'last'"): Run.load(tmp_path)


def test_load_of_a_loaded_pipeline(pipe_folder, tmp_path):
    "Its record has a class for a name, so it has to be given again; its card says where it was read from."
    run = go(opened(pipe_folder), tmp_path / "run", num_epochs=1, eval_every=0)
    with pytest.raises(ValueError, match="was made with a loaded StableDiffusionPipeline, which is not in the folder; give it again"):
        Run.load(tmp_path / "run")
    again = Run.load(tmp_path / "run", pipe=opened(pipe_folder), which=0)
    assert np.array_equal(picture(again.pipe), picture(run.pipe))
    assert np.abs(drawn_by_card(tmp_path / "run" / "lora")[0] - drawn_by(run.pipe, drawn_by_card(tmp_path / "run" / "lora")[1])).max() <= 1


# ---- what a person sees

class Tags(HTMLParser):
    "Which elements a page has, and its text."
    def __init__(self, page):
        super().__init__()
        self.tags, self.sources, self.text = Counter(), [], ""
        self.feed(page)
    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.sources += [v for k, v in attrs if k == "src"]
    def handle_data(self, data): self.text += data


def test_a_run_in_a_cell(lora_run):
    "Text with the numbers of the history; the same as HTML, with the curve and the newest sheet inside, and nothing that could run."
    e, text = runs.evaluations(lora_run), repr(lora_run)
    assert f"{e.eval_reward_mean.iloc[0]:.4g} ± " in text and f"-> {e.eval_reward_mean.iloc[-1]:.4g} ± " in text and "3 of 3" in text
    assert str(lora_run.folder.path) in text and "rising" in text
    seen = Tags(lora_run._repr_html_())
    assert seen.tags["img"] == 2 and seen.tags["tr"] == len(text.splitlines()) and seen.tags["script"] == 0
    for source, kind in zip(seen.sources, (b"\x89PNG", b"\xff\xd8\xff")):
        assert base64.b64decode(source.partition("base64,")[2]).startswith(kind)
    assert sum(map(len, seen.sources)) < 60_000
    odd = Run(None, dict(method="<b>m</b>", reward="<script>"))
    assert Tags(odd._repr_html_()).tags.keys() == {"div", "table", "tr", "th", "td"} and "<script>" in repr(odd)
    read = read_run(lora_run.folder.path)
    assert f"Run.load({str(read.folder.path)!r})" in repr(read)


# ---- the hub

class Hub(BaseHTTPRequestHandler):
    "In the place of huggingface.co: what it is sent lies in `server.got`."
    protocol_version = "HTTP/1.1"
    def log_message(self, *args): pass

    def body(self):
        if self.headers.get("Transfer-Encoding") != "chunked": return self.rfile.read(int(self.headers.get("Content-Length", 0)))
        parts = []
        while size := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def answer(self, found, code=200):
        data = json.dumps(found).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_PUT(self):
        self.server.got["stored"][self.path.rpartition("/")[2]] = self.body()
        self.answer({})

    def do_GET(self): self.answer(dict(error=f"no {self.path} here"), 404)

    def do_POST(self):
        got, path, body = self.server.got, self.path.partition("?")[0], self.body()
        got["asked"].append(path)
        got["tokens"].add(self.headers.get("Authorization"))
        where = f"http://127.0.0.1:{self.server.server_port}"
        if path == "/api/repos/create":
            got["repo"] = json.loads(body)
            return self.answer(dict(url=f"{where}/me/{got['repo']['name']}"))
        if path == "/api/validate-yaml":
            got["yaml"] = json.loads(body)["content"]
            return self.answer(dict(errors=[], warnings=[]))
        if path.endswith("/preupload/main"):
            def mode(name): return "lfs" if name.endswith(self.server.lfs) else "regular"
            files = [f["path"] for f in json.loads(body)["files"]]
            return self.answer(dict(files=[dict(path=name, uploadMode=mode(name), shouldIgnore=False) for name in files]))
        if path.endswith("/info/lfs/objects/batch"):
            actions = lambda oid: dict(upload=dict(href=f"{where}/store/{oid}", header={}))
            return self.answer(dict(transfer="basic", objects=[o | dict(actions=actions(o["oid"])) for o in json.loads(body)["objects"]]))
        if path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file": got["files"][value["path"]] = base64.b64decode(value["content"])
                if line["key"] == "lfsFile": got["files"][value["path"]] = got["stored"][value["oid"]]
                if line["key"] == "header": got["commits"].append(value["summary"])
            return self.answer(dict(success=True, commitUrl=f"{where}/me/{got['repo']['name']}/commit/{'0' * 40}", commitOid="0" * 40))
        self.answer(dict(error=f"no {path} here"), 404)


@contextmanager
def hub(lfs=()):
    "A hub on this machine."
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.got, server.lfs = dict(asked=[], tokens=set(), stored={}, files={}, commits=[]), tuple(lfs)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}", server.got
    finally:
        server.shutdown()
        server.server_close()


@pytest.fixture
def nowhere_else(monkeypatch):
    "No connection of this process leads to another machine."
    connect, tried = socket.socket.connect, []
    def only_here(self, address):
        if not isinstance(address, tuple) or address[0] in ("127.0.0.1", "::1", "localhost"): return connect(self, address)
        tried.append(address)
        raise OSError(f"a connection to {address}")
    monkeypatch.setattr(socket.socket, "connect", only_here)
    yield
    assert tried == []


def assert_received(run, got, name):
    "All that a reader needs has come, whole."
    files = got["files"]
    assert {"README.md", WEIGHTS, f"{name}.safetensors", "before.png", "after.png", "curve.png", "history.csv"} <= files.keys()
    card = ModelCard(files["README.md"].decode())
    assert f"pipe.load_lora_weights('me/{name}', weight_name='{WEIGHTS}')" in card.text
    assert [w["text"] for w in card.data.widget] == ["a cow"] * 3
    assert all(files[w["output"]["url"]].startswith(b"\x89PNG") for w in card.data.widget)
    assert str(Path(run.config["pipe"]).parent) not in card.text  # where it lay on this machine
    assert got["tokens"] == {"Bearer hf_none"} and len(got["commits"]) == 1


def test_push_to_hub(lora_run, tmp_path, monkeypatch, nowhere_else):
    "Through huggingface_hub's own client, with large files on their own way: every byte comes, and nothing goes anywhere else."
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)  # its storage has a protocol of its own
    with hub(lfs=[".safetensors", ".png"]) as (address, got):
        where = lora_run.push_to_hub("animals", "both", private=True, token="hf_none", endpoint=address)
    assert where == f"{address}/me/animals"
    assert got["repo"]["name"] == "animals" and (got["repo"].get("visibility") == "private" or got["repo"].get("private"))
    assert_received(lora_run, got, "animals")
    assert got["yaml"] == got["files"]["README.md"].decode()
    assert all(hashlib.sha256(data).hexdigest() == oid for oid, data in got["stored"].items()) and len(got["stored"]) >= 5
    for name in (WEIGHTS, "animals.safetensors"): (tmp_path / name).write_bytes(got["files"][name])
    assert bits(weights(tmp_path)[f"{WEIGHTS}: {next(iter(load_file(tmp_path / WEIGHTS)))}"]) == bits(
        next(iter(load_file(lora_run.folder.path / "lora" / WEIGHTS).values())))


@pytest.mark.parametrize("typed", [False, True], ids=["in Python", "typed"])
def test_push_to_hub_as_a_user_does(typed, lora_run, pipe_folder):
    "A fresh process, the address of the hub in the environment, a run that was read back."
    folder = str(lora_run.folder.path)
    words = ["-c", f"from alignkit.runs import Run\nprint(Run.load({folder!r}).push_to_hub('animals', format='both'))"]
    if typed: words = ["-m", "alignkit", "push", folder, "animals", "--format", "both"]
    with hub() as (address, got):
        env = os.environ | dict(HF_ENDPOINT=address, HF_HUB_OFFLINE="0", HF_TOKEN="hf_none", HF_HUB_DISABLE_TELEMETRY="1")
        done = subprocess.run([sys.executable, *words], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().endswith(f"{address}/me/animals")
    assert_received(lora_run, got, "animals")


def test_nothing_is_sent_before_all_is_written(full_run, monkeypatch, nowhere_else):
    "A run that trained all weights goes as a pipeline; where describing fails, no commit is made."
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    def broken(*args, **kw): raise OSError("no space left")
    with hub() as (address, got):
        with monkeypatch.context() as m, pytest.raises(OSError, match="no space left"):
            m.setattr(runs, "describe", broken)
            full_run.push_to_hub("animals", token="hf_none", endpoint=address)
        assert got["commits"] == [] and got["files"] == {}
        full_run.push_to_hub("animals", token="hf_none", endpoint=address)
    assert "DiffusionPipeline.from_pretrained('me/animals')" in got["files"]["README.md"].decode()
    assert {"model_index.json", "unet/diffusion_pytorch_model.safetensors", "unet/config.json"} <= got["files"].keys()
