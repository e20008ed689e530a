"What a new reward, advantage, sampler, family or method costs: one file, and one line in a table."
import sys
import pytest
import torch
from alignkit import curves
from alignkit.alignprop import AlignPropConfig, train as backprop
from alignkit.ddpo import ADVANTAGES, train
from alignkit.mdp import SAMPLERS, draw
from alignkit.pipelines import FAMILIES, load, open_model
from alignkit.rewards import REWARDS
from conftest import PROMPTS, small

SAMPLER = '''
from alignkit.mdp import ddim
def half(scheduler, eta):
    "DDIM with half the noise."
    return ddim(scheduler, eta / 2)
'''
ADVANTAGE = '''
import torch
class Ranks:
    "The rank of a reward in its batch, from -1 to 1; remembers nothing."
    def __init__(self, cfg): pass
    def advantages(self, prompts, rewards): return 2 * torch.as_tensor(rewards).argsort().argsort() / (len(rewards) - 1) - 1.
    def state_dict(self): return {}
    def load_state_dict(self, state): pass
'''
REWARD = '''
def red(images, prompts): return images[:, 0].mean((1, 2)) - images[:, 1:].mean((1, 2, 3))
red.differentiable = True
'''
FAMILY = '''
from dataclasses import replace
from diffusers import StableDiffusionPipeline
from alignkit.pipelines import Cond, open_sd
class LoudPipeline(StableDiffusionPipeline):
    "A Stable Diffusion that shouts: prompts are read in capitals, and its answers are a tenth larger."
def open_loud(pipe, height=None, width=None):
    model = open_sd(pipe, height, width)
    def encode(prompts): return model.encode([p and p.upper() for p in prompts])
    return replace(model, encode=encode, predict=lambda *args: 1.1 * model.predict(*args))
'''
METHOD = '''
from dataclasses import dataclass
from alignkit.mdp import walk
from alignkit.runs import Latest
from alignkit.training import TrainConfig, embed, epochs, finish, noise_of, policy_of, record, report, update
from alignkit.start import setup
@dataclass
class LastStepConfig(TrainConfig):
    method:str = "last_step"
    def phases(self, bytes_of): return {}
    def knobs(self, call=7.): return [dict(micro_batch_size=1)]
def train(pipe, reward, prompts, cfg, out=None, resume=False, callbacks=()):
    "Follow the gradient of the reward through the last step alone."
    with setup(cfg, pipe, reward, prompts, out, resume, callbacks, needs_gradient=True) as job:
        for epoch in epochs(job):
            mine, seen = list(range(cfg.samples_per_epoch)), []
            texts = [job.prompts.sample(cfg.seed, epoch, i) for i in mine]
            def loss_of(pictures):
                step = policy_of(job, embed(job, [texts[i] for i in pictures]))
                last = cfg.num_inference_steps - 1
                *_, (*_, end) = walk(lambda i, x: step(i, x, constant=i < last), noise_of(job, "rollout", epoch, pictures))
                images = job.model.decode(end)
                r = job.reward(images, [texts[i] for i in pictures])
                seen.append((r.detach(), images.detach()))
                return -r.mean(), {}
            made = update(job, [(mine,)], loss_of)
            r, images = seen[0]
            if record(job, epoch, r, Latest(images, texts, r, r), **report(job, [made])): break
        return finish(job)
'''


@pytest.fixture
def module(tmp_path, monkeypatch):
    "Write a module where Python finds it; one file a thing."
    def write(name, text):
        (tmp_path / f"{name}.py").write_text(text)
        monkeypatch.syspath_prepend(tmp_path)
        monkeypatch.delitem(sys.modules, name, raising=False)
        assert len(list(tmp_path.glob("*.py"))) == 1
    return write


def one_epoch(pipe, reward, **changes): return train(pipe, reward, PROMPTS, small(num_epochs=1, eval_every=0, **changes)).history.iloc[0]


def test_a_sampler(pipe_folder, module, monkeypatch):
    module("half_sampler", SAMPLER)
    monkeypatch.setitem(SAMPLERS, "half", "half_sampler:half")
    how = dict(num_inference_steps=4, seed=1)
    assert torch.equal(draw(pipe_folder, PROMPTS, sampler="half", **how), draw(pipe_folder, PROMPTS, eta=0.5, **how))
    assert one_epoch(pipe_folder, "jpeg_compressibility", sampler="half").grad_norm > 0
    with pytest.raises(ValueError, match="sampler: one of ddim, .*half, got 'euler'"): draw(pipe_folder, PROMPTS, sampler="euler")


def test_an_advantage(pipe_folder, module, monkeypatch):
    module("ranks", ADVANTAGE)
    monkeypatch.setitem(ADVANTAGES, "ranks", "ranks:Ranks")
    a, b = (one_epoch(pipe_folder, "jpeg_compressibility", advantages=name) for name in ("ranks", "batch"))
    assert a.reward_mean == b.reward_mean and a.grad_norm > 0 and a.grad_norm != b.grad_norm
    known = "advantages: 'per_prompt', 'batch', 'group' or 'ranks', got 'groups'"
    with pytest.raises(ValueError, match=known): small(advantages="groups").check()


def test_a_reward(pipe_folder, module, monkeypatch):
    module("red_reward", REWARD)
    monkeypatch.setitem(REWARDS, "red", "red_reward:red")
    assert one_epoch(pipe_folder, "red").grad_norm > 0
    cfg = AlignPropConfig(num_epochs=1, samples_per_epoch=4, updates_per_epoch=1, num_inference_steps=2)
    assert backprop(pipe_folder, "red", PROMPTS, cfg).history.grad_norm[0] > 0  # it said that it has a gradient


def test_a_family(pipe_folder, module, monkeypatch):
    module("loud", FAMILY)
    monkeypatch.setitem(FAMILIES, "LoudPipeline", "loud:open_loud")
    import loud
    pipe = loud.LoudPipeline(**load(pipe_folder).components, requires_safety_checker=False)
    how = dict(num_inference_steps=3, seed=2)
    pictures = draw(pipe, PROMPTS, **how)
    assert (pictures - draw(pipe_folder, PROMPTS, **how)).abs().max() > 1e-3
    model = open_model(pipe)
    assert torch.equal(model.encode(["a cat"])["text"], open_model(pipe_folder).encode(["A CAT"])["text"])
    assert one_epoch(pipe, "jpeg_compressibility").grad_norm > 0


def test_a_method(pipe_folder, module, monkeypatch, tmp_path):
    "One file, and a line in `curves`: the same run folder, resume, history and adapter as every other."
    module("last_step", METHOD)
    import last_step
    line = last_step, last_step.LastStepConfig, dict(samples_per_epoch=4, updates_per_epoch=1)
    monkeypatch.setitem(curves.METHODS, "last_step", line)
    few = dict(num_epochs=2, num_inference_steps=3, eval_every=1, eval_samples=4, eval_rewards=())
    prompts, cfg = curves.task_config("tiny_aesthetic", "last_step", **few)
    run = last_step.train("tiny", "tiny_aesthetic", prompts, cfg, out=tmp_path / "run")
    assert curves.label(run.config) == "last_step" and len(run.history) == 2 and (run.history.grad_norm > 0).all()
    assert (tmp_path / "run" / "lora" / "pytorch_lora_weights.safetensors").is_file()
    cfg.num_epochs = 3
    assert len(last_step.train("tiny", "tiny_aesthetic", prompts, cfg, resume=tmp_path / "run").history) == 3
