"What the end-to-end tests share: the CPU and one thread of it, no hub, a pipeline with random weights, and a run that nothing interrupted."
import os
THREADS = os.environ.get("ALIGNKIT_TEST_THREADS", "1")  # more of them round otherwise: to see what that turns red
os.environ.update(OMP_NUM_THREADS=THREADS, MKL_NUM_THREADS=THREADS, HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error",
                  TOKENIZERS_PARALLELISM="false", MPLBACKEND="agg", ALIGNKIT_PROGRESS="0",
                  CUDA_VISIBLE_DEVICES="")  # a GPU rounds otherwise, and cannot be used after a fork
import ctypes, json, math, multiprocessing, socket, subprocess, sys, warnings
from pathlib import Path
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file
from torch.optim.optimizer import register_optimizer_step_post_hook

torch.set_num_threads(int(THREADS))
ROOT = Path(__file__).resolve().parent.parent
# the only columns in which two equal runs may differ
TIMINGS = ("wall_s", "sample_s", "reward_s", "reward_work_s", "train_s", "peak_mem_bytes", "eval_s")
PROMPTS = ["a cat", "a dog"]  # few, so that the statistics of a prompt come into use


@pytest.fixture(scope="session")
def pipe_folder(tmp_path_factory):
    "A StableDiffusionPipeline with random weights, 32 x 32 pictures, latents 4 x 8 x 8: the tests need no trained weights."
    from diffusers import UNet2DConditionModel
    from alignkit import tiny
    folder = tmp_path_factory.mktemp("pipe")
    with torch.random.fork_rng():
        torch.manual_seed(0)
        tokenizer = tiny.make_tokenizer(folder / "tokenizer")
        unet = UNet2DConditionModel(sample_size=8, in_channels=4, out_channels=4, block_out_channels=(16, 32), layers_per_block=1,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
            cross_attention_dim=128, attention_head_dim=4, norm_num_groups=8)
        tiny.assemble(tiny.make_clip(tokenizer), tokenizer, tiny.make_vae(), unet).save_pretrained(folder)
    return str(folder)


def brightness(images, prompts):
    "A reward that costs nothing: how red and how little blue a picture is."
    return (images[:, 0] - 0.5 * images[:, 2]).mean((1, 2))


def small(**changes):
    "Four epochs of eight pictures, all the machinery in use: several updates, ragged micro-batches, prompt statistics, evaluations."
    from alignkit.ddpo import DDPOConfig
    few = dict(num_epochs=4, samples_per_epoch=8, sample_batch_size=5, num_inference_steps=4, updates_per_epoch=2, micro_batch_size=6,
               eta=1., stats_buffer_size=8, stats_min_count=5, eval_every=2, eval_samples=3, eval_prompts=("a cow",), learning_rate=1e-2,
               fast="onednn")  # chosen, not measured: two processes of a test round alike
    return DDPOConfig(**{**few, **changes})


def go(pipe_folder, out=None, reward=brightness, resume=False, callbacks=(), **changes):
    from alignkit.ddpo import train
    return train(pipe=pipe_folder, reward=reward, prompts=PROMPTS, cfg=small(**changes), out=out, resume=resume, callbacks=callbacks)


def updates_of(fn):
    "The trained weights after every optimiser step that `fn()` makes."
    seen = []
    hook = register_optimizer_step_post_hook(lambda optimizer, args, kwargs: seen.append(
        torch.cat([p.detach().flatten() for group in optimizer.param_groups for p in group["params"]]).clone()))
    try: fn()
    finally: hook.remove()
    return torch.stack(seen)


@pytest.fixture(scope="session")
def unbroken(pipe_folder, tmp_path_factory):
    "The folder of a run that nothing interrupted."
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    go(pipe_folder, out)
    return out


def forked(fn, *args):
    "`fn(*args)` begun in a forked process."
    libraries = list((Path(torch.__file__).parent / "lib").glob("libgomp*"))  # none on a Mac
    if libraries and THREADS != "1": ctypes.CDLL(libraries[0]).omp_pause_resource_all(2)  # threads are not forked: the child waits for them
    child = multiprocessing.get_context("fork").Process(target=fn, args=args)
    child.start()
    return child


def in_child(fn, *args):
    "Run `fn(*args)` in a forked process, which may be killed; returns its exit code (-9: SIGKILL)."
    child = forked(fn, *args)
    child.join(120)
    if child.exitcode is None:
        child.kill()
        raise AssertionError("the child process hangs")
    return child.exitcode


def _as_rank(fn, out):
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    torch.set_num_threads(1)  # a forked process cannot use the parent's threads
    AcceleratorState._reset_state(True)  # nor its state
    result = fn()
    assert PartialState().num_processes == 2
    torch.save(result, Path(out) / f"rank_{PartialState().process_index}.pt")


def of_two(out):
    "What `fn` of `on_two` returned in the two processes."
    return [torch.load(Path(out) / f"rank_{r}.pt", weights_only=True) for r in (0, 1)]


def on_two(fn, out):
    "Run `fn()` in two forked processes that know of each other, with the folder `out` for what each returns; returns both."
    from accelerate import debug_launcher
    debug_launcher(_as_rank, (fn, out), num_processes=2)
    return of_two(out)


def torchrun(script, *args):
    "A real launch of two processes, on the CPU."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    where = ["--nproc_per_node", "2", "--master_addr", "127.0.0.1", "--master_port", str(port)]
    command = [sys.executable, "-m", "torch.distributed.run", *where, script, *map(str, args)]
    done = subprocess.run(command, env={**os.environ, "ACCELERATE_USE_CPU": "true"}, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0, done.stderr[-3000:]


def plain_picture(pipe):
    "One picture by plain diffusers' own call."
    g = torch.Generator().manual_seed(0)
    return pipe("a cat", num_inference_steps=4, guidance_scale=3., eta=1., generator=g, output_type="np", height=32, width=32).images[0]


def told(fn, word):
    "The warnings with a word in them that `fn()` gives."
    with warnings.catch_warnings(record=True) as found:
        warnings.simplefilter("always")
        fn()
    return [str(w.message) for w in found if word in str(w.message)]


def weights(folder):
    "The tensors of a checkpoint or of a finished run."
    return {f"{f.name}: {k}": v for f in sorted(Path(folder).glob("*.safetensors")) for k, v in load_file(f).items()}


def bits(x):
    "Something that is equal for two values exactly if they are equal bit for bit; a NaN equals itself."
    if isinstance(x, torch.Tensor): return str(x.dtype), tuple(x.shape), x.detach().cpu().contiguous().flatten().view(torch.uint8).tolist()
    if isinstance(x, dict): return {k: bits(v) for k, v in x.items()}
    if isinstance(x, (list, tuple)): return [bits(v) for v in x]
    if isinstance(x, float): return "nan" if math.isnan(x) else x.hex()
    return x


def history(folder):
    "The rows of a run without its timings."
    rows = pd.read_csv(Path(folder) / "history.csv").to_dict("records")
    return [{k: v for k, v in r.items() if k not in TIMINGS} for r in rows]


def assert_same_run(folder, other):
    "Two run folders tell the same story bit for bit: weights, optimiser, prompt statistics, counters, history, evaluations."
    folder, other = Path(folder), Path(other)
    last = lambda f: sorted(p for p in (f / "checkpoints").iterdir() if p.suffix != ".part")[-1]
    assert last(folder).name == last(other).name
    a, b = last(folder), last(other)
    assert len(weights(a)) > 0
    assert bits(weights(a)) == bits(weights(b)), "weights differ"
    optimizer = [torch.load(c / "optimizer.pt", weights_only=True) for c in (a, b)]
    assert len(optimizer[0]["state"]) > 0
    assert bits(optimizer[0]) == bits(optimizer[1]), "optimiser states differ"
    state = [{k: v for k, v in json.loads((c / "state.json").read_text()).items() if k != "wall"} for c in (a, b)]
    if "stats" in state[0]: assert state[0]["stats"]["buffers"], "no prompt statistics were kept"
    assert state[0] == state[1], "prompt statistics or counters differ"
    assert bits(history(folder)) == bits(history(other)), "histories differ"
    base = [{k: v for k, v in json.loads((f / "eval_base.json").read_text()).items() if k not in TIMINGS} for f in (folder, other)]
    assert base[0] == base[1], "evaluations of the base model differ"
    if (folder / "lora").is_dir() or (other / "lora").is_dir():
        assert bits(weights(folder / "lora")) == bits(weights(other / "lora")), "final adapters differ"
    for picture in (folder / "samples").iterdir():
        assert picture.read_bytes() == (other / "samples" / picture.name).read_bytes(), picture.name
