"What is installed is what was written: generated files, light imports, modules that stand alone, a wheel that brings its data."
import ast, json, os, shutil, subprocess, sys, zipfile
from pathlib import Path
from textwrap import dedent
import pytest
from conftest import ROOT

MODULES = sorted(p.stem for p in (ROOT / "alignkit").glob("*.py") if p.stem not in ("__init__", "__main__", "_modidx"))
NEVER = {"nbdev", "fastcore", "matplotlib", "IPython", "pytest"}  # no exported module needs one of these to be imported


def python(code, cwd, path=ROOT, timeout=300):
    "Run code in a fresh process, elsewhere, with `path` as the only place to find alignkit; returns what it printed."
    env = {**os.environ, "PYTHONPATH": str(path), "HOME": str(cwd)}
    done = subprocess.run([sys.executable, "-c", code], cwd=cwd, env=env, capture_output=True, text=True, timeout=timeout)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    "A copy of the project without version control, environments and runs."
    copy = tmp_path_factory.mktemp("tree") / "alignkit"
    skip = shutil.ignore_patterns(".git", ".venv", "build", "dist", "*.egg-info", "__pycache__", ".ipynb_checkpoints", ".pytest_cache",
                                  "_proc")
    shutil.copytree(ROOT, copy, ignore=lambda folder, names: skip(folder, names) | ({"runs"} if Path(folder) == ROOT else set()))  # data/runs stays
    return copy


def test_clean_and_export_change_nothing(tree):
    "Notebooks are committed clean, and the package is what they export: neither command changes a byte."
    def files(root):
        found = [p for d in ("nbs", "alignkit") for p in (root / d).rglob("*") if p.is_file() and p.suffix in (".py", ".ipynb")]
        return {p.relative_to(root): p.read_bytes() for p in found}
    before = files(tree)
    assert before
    for command in ("from nbdev.clean import nbdev_clean; nbdev_clean()", "from nbdev.doclinks import nbdev_export; nbdev_export()"):
        python(command, tree, tree)
        after = files(tree)
        assert after.keys() == before.keys()
        assert [str(p) for p in after if after[p] != before[p]] == [], command


def test_every_notebook_has_its_module():
    "One notebook, one module: none without its notebook, and a notebook without a module exports nothing."
    exported = {}
    for notebook in sorted((ROOT / "nbs").glob("*.ipynb")):
        cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
        lines = [line.strip() for c in cells if c["cell_type"] == "code" for line in c["source"]]
        names = [line.split()[-1] for line in lines if line.startswith("#| default_exp")]
        assert len(names) == any(line.startswith("#| export") for line in lines), notebook.name
        exported.update(dict.fromkeys(names, notebook.stem))
    assert sorted(exported) == MODULES


def test_modules_stand_alone():
    "Every name that a module uses is its own: a notebook may have it from a cell that is not exported."
    modules = [str(ROOT / "alignkit" / f"{m}.py") for m in MODULES]
    done = subprocess.run([sys.executable, "-m", "pyflakes", *modules], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize("module", MODULES)
def test_imports_are_light(module):
    "No module imports nbdev, fastcore, matplotlib, IPython or pytest when it is imported."
    tree = ast.parse((ROOT / "alignkit" / f"{module}.py").read_text(encoding="utf-8"))
    names = {a.name.split(".")[0] for n in tree.body if isinstance(n, ast.Import) for a in n.names}
    names |= {(n.module or "").split(".")[0] for n in tree.body if isinstance(n, ast.ImportFrom) and not n.level}
    assert not names & NEVER


def test_nothing_heavy_comes_along(tmp_path):
    "Importing all modules brings in none of nbdev, fastcore, matplotlib, IPython, pytest, by whatever way."
    imports = "\n".join(f"import alignkit.{m}" for m in MODULES)
    out = python(f"import sys\n{imports}\nprint(sorted({NEVER!r} & set(sys.modules)))", tmp_path)
    assert out.strip() == "[]"


CALLS = dict(  # one function of every module, called as a user would; later ones use what earlier ones made
    show="""
        from alignkit.show import show_row
        assert show_row(torch.rand(2, 3, 8, 8), 'ab').data[:4] == b'\\x89PNG'""",
    settings="""
        from alignkit.settings import settings_of
        assert settings_of('A', 'class A:\\n    x:int = 1  # one')[0].comment == 'one'""",
    compat="""
        from alignkit.compat import storage_key
        assert storage_key((x := torch.rand(3)).untyped_storage()) == storage_key(x[1:].untyped_storage())""",
    progress="""
        from alignkit.progress import Meter
        meter = Meter('toy', 2)
        meter.epoch('fine')
        assert meter.done == 1""",
    pipelines="""
        from alignkit.pipelines import encode, load
        pipe = load(PIPE)
        assert encode(pipe, ['a cat', 'a cat', 'a dog']).shape[0] == 3""",
    families="""
        from alignkit.pipelines import FAMILIES, lookup
        assert lookup(FAMILIES, 'StableDiffusionXLPipeline').__name__ == 'open_sdxl'""",
    mdp="""
        from alignkit.mdp import draw
        assert tuple(draw(pipe, ['a cat', 'a dog'], num_inference_steps=2, guidance_scale=2.).shape) == (2, 3, 32, 32)""",
    mmdit="""
        from alignkit.mmdit import pack, unpack
        assert unpack(pack(torch.ones(2, 4, 6, 8)), 6, 8).shape == (2, 4, 6, 8)""",
    pixart="""
        from alignkit.pipelines import FAMILIES, lookup
        from alignkit.pixart import open_sigma
        assert lookup(FAMILIES, 'PixArtSigmaPipeline') is open_sigma""",
    flow="""
        from alignkit.flow import flow_levels, step_sensitivity
        assert round(float(step_sensitivity(flow_levels(10, 3.), 0.7, 'flow_sde')[0]), 3) == 0.051""",
    logprob="""
        from alignkit.logprob import step_log_prob
        assert abs(step_log_prob(torch.zeros(1, 4), torch.zeros(1, 4), torch.ones(1, 1)).item() + 0.9189385) < 1e-6""",
    prompts="""
        from alignkit.prompts import get_prompts
        assert len(get_prompts('simple_animals').texts) == 45 and get_prompts(['a', 'b']).sample(0, 0, 0) in 'ab'""",
    clip_files="""
        from alignkit.clip_files import read_clip, read_tokenizer
        assert not read_clip().training and read_tokenizer().model_max_length == 16""",
    rewards="""
        from alignkit.rewards import get_reward, score
        r = get_reward({'jpeg_compressibility': 1., 'jpeg_incompressibility': 1.})
        assert score(r, torch.rand(2, 3, 16, 16), ['a', 'b']).tolist() == [0, 0]""",
    scorer="""
        from alignkit.scorer import Scorer
        with Scorer(get_reward(lambda images, prompts: [1.] * len(prompts))) as scorer:
            scorer.submit(torch.rand(2, 3, 8, 8), ['a', 'b'])
            assert scorer.result().tolist() == [1, 1]""",
    remote="""
        from alignkit.remote import pack, unpack
        assert unpack(pack(torch.rand(2, 3, 8, 8), ['a', 'b']), 4, 64)[1] == ['a', 'b']""",
    jpeg_soft="""
        r = get_reward('jpeg_soft')
        assert r.differentiable and score(r, torch.rand(2, 3, 16, 16), ['a', 'b']).shape == (2,)""",
    clip_rewards="""
        r = get_reward('clip_similarity')
        assert score(r, torch.rand(2, 3, 64, 64), ['a cat', 'a dog']).abs().max() <= 1""",
    vlm_rewards="""
        from alignkit.vlm_rewards import prompt_alignment, vqa
        r = vqa({'two cats': [('How many?', '2')]}, vlm=lambda files, questions: ['There are two.'] * len(questions))
        assert r(torch.rand(1, 3, 16, 16), ['two cats']).item() == 1""",
    object_count="""
        from alignkit.object_count import box_iou, object_count
        assert box_iou(torch.tensor([[[0., 0., 1., 1.]]])).item() == 1""",
    reward_model="""
        r = get_reward({'gold': 1., 'tiny_aesthetic': 1.})
        assert score(r, torch.rand(2, 3, 64, 64), ['cat', 'dog']).shape == (2,)""",
    folder="""
        from alignkit.folder import RunFolder, environment, image_grid
        RunFolder('one').create({})
        assert environment()['versions']['torch'] and image_grid(torch.rand(3, 3, 8, 8), 2).size == (16, 16)""",
    runs="""
        from alignkit.runs import Run
        assert list(Run(None, {}, rows=[dict(epoch=0)]).history.columns) == ['epoch']""",
    judges="""
        from alignkit.judges import drift
        from alignkit.pipelines import add_lora
        add_lora(pipe.unet)
        assert drift(pipe, ['a cat'], num_inference_steps=2).abs().max() < 1e-6""",
    fast="""
        from alignkit.fast import fast
        with fast(pipe.unet, chosen={}): assert 'forward' in pipe.unet.conv_in.__dict__
        assert 'forward' not in pipe.unet.conv_in.__dict__""",
    trackers="""
        from alignkit.runs import Run
        from alignkit.trackers import Trackers, scalars, settings
        Trackers().close(Run(None, {}))
        assert scalars(dict(epoch=0, loss=float('nan'))) == dict(epoch=0) and settings(Run(None, dict(a=(1,)))) == dict(a='[1]')""",
    training="""
        from alignkit.training import TrainConfig, drawing
        assert drawing(vars(TrainConfig())).num_inference_steps == 15""",
    start="""
        from alignkit.start import settled
        from alignkit.training import TrainConfig
        assert settled(None, TrainConfig).num_epochs == 20""",
    ddpo="""
        from alignkit.ddpo import preset, train
        few = dict(samples_per_epoch=4, updates_per_epoch=2, num_inference_steps=2, num_epochs=1)
        run = train(PIPE, prompts=['a cat'], cfg=preset('trl', mixed_precision='no', **few), out='two')
        assert len(run.history) == 1
        run.save_lora('lora')
        run.plot('queries')""",
    card="""
        from alignkit.card import cautions
        from alignkit.runs import Run
        assert cautions(run, 0) and open('lora/README.md').read().startswith('---')
        assert 'ddpo_is on' in repr(Run.load('two'))""",
    kohya="""
        from alignkit.kohya import save_kohya
        assert save_kohya(run.net, 'kohya').name == 'kohya.safetensors'""",
    memory="""
        from alignkit.memory import plan
        from alignkit.ddpo import DDPOConfig
        assert 1e7 < plan('tiny', DDPOConfig()).peak_bytes < 1e10""",
    alignprop="""
        from alignkit.alignprop import AlignPropConfig, train as backprop
        from alignkit.rewards import Reward
        light = Reward(lambda images, prompts: images.mean((1, 2, 3)), 'light', differentiable=True)
        cfg = AlignPropConfig(num_epochs=1, samples_per_epoch=2, updates_per_epoch=1, num_inference_steps=2)
        assert len(backprop(PIPE, light, ['a cat'], cfg).history) == 1""",
    rwr="""
        from alignkit.rwr import RWRConfig, train as regress
        assert len(regress(PIPE, prompts=['a cat'], cfg=RWRConfig(**few, num_inner_epochs=1)).history) == 1""",
    evaluate="""
        from alignkit.evaluate import evaluate
        assert len(evaluate({'mine': run}, ['a cat'], ('jpeg_compressibility',), num_samples=3, num_inference_steps=2)) > 0""",
    cost="""
        from alignkit.cost import Pace, seconds, work_of
        from alignkit.rwr import RWRConfig
        assert seconds(work_of(RWRConfig(num_epochs=2, samples_per_epoch=8, num_inner_epochs=5)), Pace(1., 0.1)) == 2 * (8 + 4)""",
    trouble="""
        from alignkit.trouble import about, diagnose
        assert about('wall_s')[0] == 's' and all(finding.todo for finding in diagnose(run))""",
    changes="""
        from alignkit.changes import descriptors
        assert descriptors(torch.full((1, 3, 16, 16), 0.5))['flat'].item() == 1.""",
    claims="""
        from alignkit.claims import decide, verdicts
        assert decide([0.2, 0.3, 0.4], 0., 0.1, 0.) == 'seen' and verdicts().claim.nunique() == 20""",
    curves="""
        from alignkit.curves import task_config
        from alignkit.runs import read_run
        assert len(read_run('two').history) == 1 and task_config('jpeg_soft', 'alignprop_k1')[1].eval_every == 4""",
    live="""
        from alignkit.live import watch
        assert watch('two').over and 'two: finished' in str(watch('two'))""",
    tiny="""
        import numpy
        from alignkit.tiny import load_glyphs, render
        assert render('cat', 'riding a bike', numpy.random.default_rng(0), load_glyphs(GLYPHS)).shape == (64, 64, 3)""",
    witness="""
        from alignkit.witness import Witness, witness_named
        some = torch.rand(2, 3, 64, 64)
        assert Witness()(some).shape == (2, 65) and witness_named(some, ['a cat', 'a dog']).shape == (2,)""",
    tiny_sd3="""
        from alignkit.tiny_sd3 import counted, flow_example
        picture, text = flow_example(1, load_glyphs(GLYPHS))
        assert picture.shape == (64, 64, 3) and isinstance(text, str) and counted('mouse', 3) == 'three mice'""",
    counter="""
        from alignkit.counter import load_counter, tiny_count_right
        assert load_counter()(some).shape == (2,) and tiny_count_right(some, ['two cats', 'a dog']).shape == (2,)""",
    flow_curves="""
        from alignkit.flow_curves import flow_run
        assert flow_run('counting/alignprop_uniform')[2].eval_eta == 0""",
    cli="""
        from alignkit.cli import settings_in
        assert settings_in('ddpo')['clip_range'].default == '2e-3'""",
)


def test_modules_work_from_a_fresh_process_elsewhere(pipe_folder, tmp_path):
    "Exported code leans on nothing of its notebook: one function of every module runs in a fresh process in another folder."
    assert sorted(CALLS) == MODULES  # a new module gets a line above
    first = f"""
        import torch, matplotlib
        matplotlib.use('agg')
        torch.set_num_threads(1)
        PIPE, GLYPHS = {pipe_folder!r}, {str(ROOT / 'data' / 'glyphs')!r}"""
    python("\n".join(dedent(code) for code in (first, *CALLS.values())), tmp_path)


def test_the_wheel_brings_its_data(tree, tmp_path):
    "A wheel built offline and unpacked elsewhere trains an epoch of the embedded pipeline; it carries the font's licence and no notebook."
    build = [sys.executable, "-m", "pip", "wheel", "--quiet", "--no-deps", "--no-build-isolation", "--no-index"]
    subprocess.run([*build, "-w", tmp_path / "wheels", tree], check=True, capture_output=True, timeout=300)
    wheel, = (tmp_path / "wheels").glob("alignkit-*.whl")
    with zipfile.ZipFile(wheel) as z:
        names = z.namelist()
        z.extractall(tmp_path / "site")
    assert {f"alignkit/{m}.py" for m in MODULES} <= set(names)
    assert not [n for n in names if n.endswith(".ipynb") or n.startswith(("tests/", "nbs/"))]
    wanted = {f"alignkit/{p.relative_to(ROOT)}" for p in (ROOT / "data").rglob("*") if p.is_file()}
    assert wanted <= set(names), sorted(wanted - set(names))[:5]
    out = python(dedent("""
        import alignkit.pipelines as p, torch
        from alignkit.ddpo import train, DDPOConfig
        torch.set_num_threads(1)
        print(p.__file__)
        print(p.data_dir())
        cfg = DDPOConfig(num_epochs=1, samples_per_epoch=4, updates_per_epoch=2, num_inference_steps=2)
        run = train('tiny', 'jpeg_compressibility', 'simple_animals', cfg, out='run')
        assert run.history.reward_mean[0] < 0"""), tmp_path, tmp_path / "site")
    assert out.split() == [str(tmp_path / "site" / "alignkit" / "pipelines.py"), str(tmp_path / "site" / "alignkit" / "data")]


def test_torchvision_is_absent_or_works():
    "A torchvision that does not fit torch breaks `from diffusers import StableDiffusionPipeline`; without one all is well."
    from importlib.util import find_spec
    if find_spec("torchvision"):
        import torchvision
        torchvision.ops.nms


@pytest.mark.skipif(not (ROOT / "nbs" / "make_readme.py").is_file(), reason="nbs/make_readme.py is not here")
def test_readme_is_what_the_index_says(tree):
    "README.md and its pictures are generated from nbs/index.ipynb."
    def files():
        found = (tree / "README.md", *sorted((tree / "nbs").rglob("*")))
        return {p: p.read_bytes() for p in found if p.is_file() and "__pycache__" not in p.parts}
    before = files()
    env = {**os.environ, "PYTHONPATH": str(tree)}
    done = subprocess.run([sys.executable, "nbs/make_readme.py"], cwd=tree, env=env, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    assert files() == before
