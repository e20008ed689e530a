"What `changes` measures, against numpy, against other ways to the same number, and against the records."
from contextlib import nullcontext
from pathlib import Path
import colorsys, json
import numpy as np
import pytest
import torch
from alignkit import ddpo, rewards
from alignkit.changes import descriptors, measure_after
from alignkit.mdp import Drawing, draw
from alignkit.pipelines import adapter_off, add_lora, data_dir, load_lora, lora_state, open_model
from alignkit.runs import read_run

LUMA = np.array([0.299, 0.587, 0.114])

def by_numpy(picture):
    "The nine numbers of one picture (3, H, W), in float64 and by loops over pixels."
    x = picture.double().numpy()
    grey = np.einsum("c,chw->hw", LUMA, x)
    H, W = grey.shape
    power = np.abs(np.fft.fft2(grey - grey.mean()))**2
    radius = np.hypot(*np.meshgrid(np.fft.fftfreq(H), np.fft.fftfreq(W), indexing="ij"))
    laplace, slope = [], []
    for i in range(1, H - 1):
        for j in range(1, W - 1):
            g = grey[i - 1:i + 2, j - 1:j + 2]
            laplace.append(abs(g[0, 1] + g[2, 1] + g[1, 0] + g[1, 2] - 4 * g[1, 1]))
            across = (g[:, 2] - g[:, 0]) @ [1, 2, 1] / 8
            down = (g[2] - g[0]) @ [1, 2, 1] / 8
            slope.append(np.hypot(across, down))
    frame = np.array([grey[i, j] for i in range(H) for j in range(W) if min(i, j, H - 1 - i, W - 1 - j) < 6])
    rg, yb = x[0] - x[1], (x[0] + x[1]) / 2 - x[2]
    return dict(
        high_frequency=power[radius > 0.25].sum() / power.sum(), sharpness=np.mean(laplace), edges=np.mean(np.array(slope) > 0.05),
        background=np.mean((frame - frame.mean())**2), frame_brightness=frame.mean(), brightness=grey.mean(),
        saturation=np.mean([colorsys.rgb_to_hsv(*x[:, i, j])[1] for i in range(H) for j in range(W)]),
        flat=np.mean([(np.abs(x[:, i, j + 1] - x[:, i, j]) <= 2 / 255 + 1e-6).all() for i in range(H) for j in range(W - 1)]),
        colourfulness=np.hypot(rg.std(), yb.std()) + 0.3 * np.hypot(rg.mean(), yb.mean()))

def pictures():
    "Noise, soft noise, two flat colours, and what the model draws."
    noise = torch.rand(2, 3, 32, 40, generator=torch.Generator().manual_seed(0))
    halves = torch.zeros(1, 3, 32, 40)
    halves[..., :20] = torch.tensor([0.9, 0.2, 0.1]).view(3, 1, 1)
    soft = 0.5 + (noise - 0.5) / 60  # neighbours within and without 2/255
    yield from (*noise, *soft, *halves)
    yield from draw(open_model("tiny"), ["a cat", "a dog"], Drawing(num_inference_steps=6, guidance_scale=3.))

def test_descriptors_are_those_of_numpy():
    for picture in pictures():
        found, right = descriptors(picture[None]), by_numpy(picture)
        assert found.keys() == right.keys()
        for name, value in right.items():
            pixels = 2 / picture[0].numel() if name in ("edges", "flat") else 0  # a pixel on a threshold may fall on either side
            assert found[name].item() == pytest.approx(value, rel=1e-4, abs=max(pixels, 1e-6)), name

def test_descriptors_are_of_each_picture_alone():
    some = torch.stack(list(pictures())[:3])
    together = descriptors(some)
    for k, v in together.items(): torch.testing.assert_close(v, torch.cat([descriptors(x[None])[k] for x in some]))

@pytest.fixture(scope="module")
def small(tmp_path_factory):
    "A run whose kept epoch is not its last."
    few = dict(num_epochs=3, samples_per_epoch=16, updates_per_epoch=4, num_inference_steps=6, learning_rate=0.01, eval_samples=12, seed=1)
    watched = dict(eval_every=1, save_every=1, keep_checkpoints=9, eval_rewards=("clip_named",), eval_guidance_scale=3., progress=False)
    torch.set_num_threads(1)
    cfg = ddpo.DDPOConfig(**few, **watched)
    return ddpo.train("tiny", "jpeg_compressibility", "simple_animals", cfg, out=tmp_path_factory.mktemp("changes") / "run")

@pytest.fixture
def run(small, monkeypatch):
    "It, with nothing measured yet; any reward serves as the witness."
    monkeypatch.setitem(rewards.REWARDS, "witness_named", rewards.REWARDS["clip_named"])
    yield small
    (small.folder.path / "eval_after.json").unlink(missing_ok=True)

def means(sides): return [float(np.mean(sides[s])) for s in ("base", "kept")]

def kept_of(run, monkeypatch, epoch):
    "Let another epoch be the kept one."
    monkeypatch.setattr("alignkit.changes.watch", lambda *a, **k: (None, epoch))

@pytest.mark.parametrize("wanted", [("pictures",), ("witness", "pictures")])
def test_the_kept_epoch_is_measured_in_any_order(run, monkeypatch, wanted):
    kept_of(run, monkeypatch, 0)
    c, found = run.config, measure_after(run, wanted)["final_rewards"]
    model = open_model("tiny")
    add_lora(model.net, c["lora_rank"], c["lora_alpha"], tuple(c["lora_targets"]), c["seed"])
    how = Drawing(seed=1, purpose="final", num_inference_steps=6, guidance_scale=3., eta=c["eta"])
    def fresh(): return rewards.get_reward("jpeg_compressibility")(draw(model, found["prompts"], how), found["prompts"]).tolist()
    for side, epoch in (("base", None), ("kept", 0)):
        if epoch is not None: load_lora(model.net, run.folder.path / "checkpoints" / f"epoch_{epoch:04d}")
        with adapter_off(model.net) if epoch is None else nullcontext(): assert found[side] == pytest.approx(fresh(), rel=0.02)
    load_lora(model.net, run.folder.path / "checkpoints" / "epoch_0002")
    assert found["kept"] != pytest.approx(fresh(), rel=0.02)  # the last epoch draws other pictures

def test_exams_that_were_sat_stay(run, monkeypatch):
    first = measure_after(run, ("exams",), ["heldout_animals"])["exams"]
    drawn = []
    def noted(model, reward, texts, how):
        drawn.append(texts)
        return None, None, torch.zeros(len(texts))
    monkeypatch.setattr("alignkit.changes.evaluate_each", noted)
    second = measure_after(read_run(run.folder.path), ("exams",), ["new_scenes"])["exams"]
    assert list(second) == ["simple_animals", "heldout_animals", "new_scenes"]
    assert {k: second[k] for k in first} == json.loads(json.dumps(first))
    assert {tuple(t) for t in drawn} == {tuple(second["new_scenes"]["prompts"])}  # nothing else was drawn again

def test_the_path_ends_at_the_two_models_and_the_pipeline_is_left_as_it_was(run, monkeypatch):
    kept_of(run, monkeypatch, 1)
    net = open_model(run.pipe).net
    before = lora_state(net)
    found = measure_after(run, ("pictures", "mixing"))
    path = found["mixing"]["jpeg_compressibility"]
    assert [path[0], path[-1]] == pytest.approx(means(found["final_rewards"]), rel=0.02)
    assert path[0] != pytest.approx(path[-1], rel=1e-3)
    after = lora_state(net)
    assert before.keys() == after.keys() and all(v.equal(after[k]) for k, v in before.items())

def test_without_a_better_epoch_nothing_has_changed(run, monkeypatch):
    kept_of(run, monkeypatch, -1)
    found = measure_after(run, ("witness", "exams", "pictures", "mixing", "halves"))  # the witness puts weights in
    for sides in (*found["exams"].values(), found["final_rewards"], found["pictures"]): assert sides["base"] == sides["kept"]
    assert found["mixing"] is None and found["halves"] is None

RECORDS = sorted(Path(data_dir() / "runs").rglob("eval_after.json"))

def test_there_are_records(): assert RECORDS

@pytest.mark.parametrize("file", RECORDS, ids=lambda f: f.parent.name)
def test_recorded_pictures_are_those_of_the_final_evaluation(file):
    after, final = (json.loads(file.with_name(name).read_text(encoding="utf-8")) for name in ("eval_after.json", "eval_final.json"))
    assert after["epoch"] == final["kept"]["epoch"]
    if "final_rewards" not in after: return
    for mean, side in zip(means(after["final_rewards"]), ("base", "kept")):
        assert mean == pytest.approx(final[side]["eval_reward_mean"], abs=1e-5 * max(1., final[side]["eval_reward_std"]))
