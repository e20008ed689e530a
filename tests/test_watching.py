"Runs that can be watched: progress, trackers, callbacks, sheets with captions, and the file that asks a run to stop."
import json, math, os, select, struct, sys, warnings
import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from alignkit import ddpo
from alignkit.alignprop import AlignPropConfig, per_picture, train as backprop
from alignkit.curves import sample_strip
from alignkit.folder import RunFolder, image_grid, sheet_rows
from alignkit.progress import Meter
from alignkit.rewards import Reward
from alignkit.runs import Run, read_run
from alignkit.rwr import RWRConfig, train as regress
from conftest import PROMPTS, ROOT, assert_same_run, brightness, forked, go, history, in_child, on_two, small


def greenness(images, prompts):
    "It also knows what was asked for."
    return images[:, 1].mean((1, 2)) + torch.tensor([0.1 * (p == "a cat") for p in prompts])


def both(): return {Reward(brightness, "brightness", differentiable=True): 2., Reward(greenness, "greenness", differentiable=True): -0.5}


def pictures_of(file):
    "The pictures of a sheet, (n, H, W, 3) uint8."
    known = json.loads(file.with_suffix(".json").read_text())
    rows = [np.asarray(row) for row in sheet_rows(file)]
    each = [part for row in rows for part in np.split(row, 8, axis=1)]
    return np.stack(each[:len(known["prompts"])]), known


# callbacks, sheets -------------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def watched(pipe_folder, tmp_path_factory):
    "A run of a weighted sum whose every epoch was looked at by a callback and by TensorBoard, in two parts."
    out, seen = tmp_path_factory.mktemp("watched") / "run", []
    def looks(run, row): seen.append((run.latest, dict(row)))
    drawn = dict(samples_per_epoch=20, sample_batch_size=7, micro_batch_size=9)
    how = dict(reward=both(), callbacks=looks, eval_every=0, trackers="tensorboard", **drawn)
    go(pipe_folder, out, num_epochs=2, **how)
    run = go(pipe_folder, out, resume=True, num_epochs=4, **how)
    return run, seen


def test_a_callback_has_the_epoch_at_hand(watched):
    "Pictures, prompts and rewards belong together; the numbers of all are those of the row."
    run, seen = watched
    for latest, row in seen:
        assert latest.images.shape == (16, 3, 32, 32) and latest.images.dtype == torch.float32 and latest.images.device.type == "cpu"
        mine = 2 * brightness(latest.images, None) - 0.5 * greenness(latest.images, latest.prompts)
        torch.testing.assert_close(latest.rewards, mine, rtol=0, atol=1e-6)
        assert latest.all_rewards.shape == (20,) and latest.all_rewards.mean().item() == row["reward_mean"]
        assert sorted({*latest.rewards.tolist()} - {*latest.all_rewards.tolist()}) == []
        assert set(latest.prompts) == set(PROMPTS)
        assert latest.ratios.shape == (20 * 4,) and (latest.ratios - 1).abs().max().item() == row["ratio_off"] > 0
    assert run.latest is seen[-1][0]  # the last epoch's stays


def test_the_last_epoch_s_pictures_are_gone_when_the_next_are_drawn(pipe_folder):
    runs, there = [], []
    def remembers(run, row): runs.append(run)
    def reward(images, prompts):
        there.extend(run.latest for run in runs)
        return brightness(images, prompts)
    go(pipe_folder, reward=reward, callbacks=remembers, num_epochs=2, eval_every=0)
    assert there and all(latest is None for latest in there)


def test_a_sheet_shows_what_the_epoch_drew(watched):
    "The same pixels as the callback saw, each over a caption, and the numbers beside it."
    run, seen = watched
    for latest, row in seen:
        file = run.folder.path / "samples" / f"epoch_{row['epoch']:04d}.png"
        pictures, known = pictures_of(file)
        assert (pictures == (latest.images * 255).round().byte().permute(0, 2, 3, 1).numpy()).all()
        assert (known["prompts"], known["rewards"]) == (latest.prompts, latest.rewards.tolist())
        assert known["all_rewards"] == latest.all_rewards.tolist() and known["size"] == [32, 32]
        below = Image.open(file).height // 2 - 32
        words = np.asarray(Image.open(file))[32:32 + below]
        assert below > 20 and all((part < 128).any() for part in np.split(words, 8, axis=1))
    assert not list((run.folder.path / "samples").glob("*.part"))


def test_a_sheet_of_an_evaluation(pipe_folder, unbroken):
    "Held-out prompts and their rewards, which are the evaluation's; and the rewards of the epoch's own pictures."
    rows = read_run(unbroken).history
    for name, row in (("base", json.loads((unbroken / "eval_base.json").read_text())), ("epoch_0003", rows.iloc[3])):
        pictures, known = pictures_of(unbroken / "samples" / f"{name}.png")
        assert known["prompts"] == ["a cow"] * 3 and np.mean(known["rewards"]) == pytest.approx(row["eval_reward_mean"], abs=1e-6)
        asked = brightness(torch.from_numpy(pictures / 255.).permute(0, 3, 1, 2), None)
        np.testing.assert_allclose(known["rewards"], asked, rtol=0, atol=1.5 * 0.5 / 255)  # pixels of 8 bits
    assert np.float32(known["all_rewards"]).mean() == pytest.approx(rows.reward_mean[3], abs=1e-6) and len(known["all_rewards"]) == 8
    assert not (unbroken / "samples" / "epoch_0002.png").exists()  # nothing was evaluated


def test_a_picture_without_a_reward(pipe_folder, tmp_path):
    def gaps(images, prompts):
        r = brightness(images, prompts)
        return torch.where(torch.tensor([p == "a cat" for p in prompts]), torch.full_like(r, math.nan), r)
    with warnings.catch_warnings(action="ignore"): go(pipe_folder, tmp_path / "run", reward=gaps, num_epochs=1, eval_every=0)
    known = json.loads((tmp_path / "run" / "samples" / "epoch_0000.json").read_text())
    assert [r is None for r in known["rewards"]] == [p == "a cat" for p in known["prompts"]] and None in known["rewards"]
    assert sum(r is None for r in known["all_rewards"]) == read_run(tmp_path / "run").history.skipped[0]


def test_sheets_of_before_captions_are_read_too(tmp_path):
    "The strip of a run whose base model was drawn by an older version."
    folder = RunFolder(tmp_path / "run")
    folder.create(dict(eval_rewards=["clip_named"]))
    x = torch.rand(3, 16, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    image_grid(x[0]).save(folder.path / "samples" / "base.png")
    from alignkit.folder import Pictures
    from alignkit.rewards import to_uint8
    for e in (1, 2): Pictures(to_uint8(x[e]), ["a cat"] * 16, [0.5] * 16, []).save(folder.path / "samples" / f"epoch_{e:04d}.png")
    rows = [dict(epoch=e, wall_s=0., queries=0, eval_reward_mean=r, eval_clip_named_mean=1.) for e, r in ((1, 2.), (2, 1.))]
    run = Run(None, folder.config(), folder, rows, dict(eval_reward_mean=0., eval_clip_named_mean=1.))
    strip = np.asarray(sample_strip(run, rows=2))
    for k in range(3): assert (strip[k * 24:k * 24 + 16] == np.asarray(image_grid(x[k]))).all()


# parts of a sum, ratios --------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("train, cfg", [
    (ddpo.train, small(num_epochs=1, eval_every=0)),
    (regress, RWRConfig(num_epochs=1, samples_per_epoch=8, sample_batch_size=5, updates_per_epoch=1, num_inner_epochs=1,
                        num_inference_steps=2)),
    (backprop, AlignPropConfig(num_epochs=1, samples_per_epoch=8, micro_batch_size=3, updates_per_epoch=2, num_inference_steps=2)),
    (backprop, AlignPropConfig(num_epochs=1, samples_per_epoch=8, micro_batch_size=3, updates_per_epoch=2, num_inference_steps=2,
                               strategy="draft_lv", renoise=3)),
], ids=["ddpo", "rwr", "alignprop", "draft_lv"])
def test_each_part_of_a_sum_has_its_mean(pipe_folder, train, cfg):
    "Without a second question to anyone, and whatever is scored at a time."
    asked = []
    def counted(images, prompts):
        asked.append(len(prompts))
        return brightness(images, prompts)
    reward = {Reward(counted, "one", differentiable=True): 3., Reward(greenness, "other", differentiable=True): -2.}
    row = train(pipe_folder, reward, PROMPTS, cfg).history.iloc[0]
    assert 3 * row.reward_one_mean - 2 * row.reward_other_mean == pytest.approx(row.reward_mean, abs=1e-6)
    assert row.reward_one_mean != row.reward_other_mean
    pictures = 8 * getattr(cfg, "renoise", 1) if getattr(cfg, "strategy", "") == "draft_lv" else 8
    assert sum(asked) <= pictures + 4  # of the first batch up to four are asked alone
    alone = train(pipe_folder, greenness if train is not backprop else Reward(greenness, differentiable=True), PROMPTS, cfg).history
    assert not [c for c in alone if c.startswith("reward_") and c.endswith("_mean") and c != "reward_mean"]


def test_copies_of_a_picture_count_as_one():
    "DRaFT-LV scores noisings of a picture, a batch apart."
    assert per_picture(torch.tensor([1., 2., 3., 5.]), 2).tolist() == [2., 3.5] and per_picture(None, 2).isnan().all()


def test_the_farthest_ratio(pipe_folder, monkeypatch):
    "By what the loss itself was given; one update on fresh samples has ratio 1."
    offs, real = [], ddpo.ddpo_is_loss
    def spied(log_prob, old, *args):
        offs.append(((log_prob.detach() - old).exp() - 1).abs().max().item())
        return real(log_prob, old, *args)
    monkeypatch.setattr(ddpo, "ddpo_is_loss", spied)
    run = go(pipe_folder, num_epochs=2, eval_every=0)
    half = len(offs) // 2
    assert run.history.ratio_off.tolist() == pytest.approx([max(offs[:half]), max(offs[half:])], rel=1e-5) and max(offs) > 1e-4
    fresh = go(pipe_folder, num_epochs=1, eval_every=0, updates_per_epoch=1, stats_buffer_size=8)
    assert fresh.history.ratio_off[0] < 1e-6
    score_function = go(pipe_folder, num_epochs=1, eval_every=0, updates_per_epoch=1, method="ddpo_sf")
    assert "ratio_off" not in score_function.history and score_function.latest.ratios is None


def test_processes_share_parts_and_ratios(pipe_folder, tmp_path):
    "Two processes: the numbers of one, and only the first one watches."
    how = dict(reward=both(), num_epochs=1, eval_every=0, sample_batch_size=2)
    def train():
        run = go(pipe_folder, tmp_path / "two", trackers="tensorboard", **how)
        return dict(row=torch.tensor([run.rows[0][k] for k in columns], dtype=torch.float64), shown=len(run.latest.images),
                    all=run.latest.all_rewards)
    columns = ["reward_mean", "reward_brightness_mean", "reward_greenness_mean", "ratio_off"]
    ranks = on_two(train, tmp_path)
    alone = go(pipe_folder, **how)
    for rank in ranks:
        assert rank["row"].tolist() == pytest.approx([alone.rows[0][k] for k in columns], rel=2e-3, abs=1e-6)
        assert rank["shown"] == 4
    assert ranks[0]["row"].equal(ranks[1]["row"]) and ranks[0]["all"].equal(ranks[1]["all"])
    assert len(list((tmp_path / "two" / "trackers" / "tensorboard").iterdir())) == 1  # one writer


# the file stop -----------------------------------------------------------------------------------------------------------------------

def test_a_file_stops_a_run_which_then_goes_on(pipe_folder, tmp_path, unbroken):
    "One that lay there before the run began is not meant for it; where it was asked to stop, the run goes on as if nothing had been."
    out, asked = tmp_path / "run", []
    out.mkdir()
    (out / "stop").touch()
    def asks(run, row):
        asked.append(row["epoch"])
        if row["epoch"] == 1: (out / "stop").touch()
    run = go(pipe_folder, out, callbacks=asks, save_every=3)
    assert asked == [0, 1] and run.stopped == "stopped after epoch 1 by the file stop" and not (out / "stop").exists()
    assert (out / "checkpoints" / "epoch_0001").is_dir()
    go(pipe_folder, out, resume=True)
    assert_same_run(out, unbroken)


# trackers ----------------------------------------------------------------------------------------------------------------------------

def board(folder):
    "What TensorBoard's own reader finds."
    import logging
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    logging.getLogger("tensorboard").setLevel(logging.ERROR)
    return EventAccumulator(str(folder), size_guidance=dict(scalars=0, histograms=0, images=0)).Reload()


def test_tensorboard_has_what_the_history_has(watched):
    "Every number of every epoch, in float32; histograms of all rewards and ratios; the sheets; settings and tables."
    run, seen = watched
    found = board(run.folder.path / "trackers" / "tensorboard")
    rows = run.folder.history.read()
    assert set(found.Tags()["scalars"]) == set(rows[0])
    for column in rows[0]:
        assert {e.step: e.value for e in found.Scalars(column)} == {r["epoch"]: float(np.float32(r[column])) for r in rows}, column
    for name, n in (("rewards", 20), ("ratios", 80)):
        values = [e.histogram_value for e in found.Histograms(name)]
        assert [v.num for v in values] == [n] * 4
        whole = [getattr(latest, "all_rewards" if name == "rewards" else "ratios").double() for latest, _ in seen]
        assert [v.sum for v in values] == pytest.approx([w.sum().item() for w in whole], rel=1e-6)
    for e in found.Images("samples"):
        assert e.encoded_image_string and (e.width, e.height) == Image.open(run.folder.path / "samples" / f"epoch_{e.step:04d}.png").size
    assert [e.step for e in found.Images("samples")] == [0, 1, 2, 3]
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    told = HParamsPluginData.FromString(found.SummaryMetadata("_hparams_/session_start_info").plugin_data.content)
    assert told.session_start_info.hparams["learning_rate"].number_value == 1e-2
    table = found.Tensors("history/text_summary")[-1].tensor_proto.string_val[0].decode().splitlines()
    assert len(table) == 2 + 4 and table[0].startswith("| epoch | step |")


def test_a_run_that_lost_epochs_tells_tensorboard_so(pipe_folder, tmp_path):
    "Killed after epoch 2 with a checkpoint of epoch 0: what is drawn again replaces what was drawn."
    class Killed(BaseException): "Stands for a death."
    def dies(run, row):
        if row["epoch"] == 2: raise Killed
    how = dict(eval_every=0, trackers="tensorboard", num_epochs=4)
    with pytest.raises(Killed): go(pipe_folder, tmp_path / "run", callbacks=dies, save_every=9, **how)
    go(pipe_folder, tmp_path / "run", resume=True, **how)
    rewards = [e for e in board(tmp_path / "run" / "trackers" / "tensorboard").Scalars("reward_mean")]
    assert [e.step for e in rewards] == [0, 1, 2, 3]
    assert [e.value for e in rewards] == np.float32(read_run(tmp_path / "run").history.reward_mean).tolist()


def in_two_parts_for_wandb(pipe, out):
    "A run and its continuation, in a process without a network."
    os.environ.update(WANDB_MODE="offline", WANDB_SILENT="true")
    for epochs in (2, 3): go(pipe, out, reward=both(), resume=epochs > 2, num_epochs=epochs, eval_every=0, trackers=("wandb",))


def wandb_records(file):
    "The records of an offline run: LevelDB's log format, in blocks of 32 kB after a head of 7 bytes."
    from wandb.proto.wandb_internal_pb2 import Record
    data, at, part = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if at % 32768 > 32768 - 7: at += 32768 - at % 32768
        _, size, kind = struct.unpack("<IHB", data[at:at + 7])
        part, at = part + data[at + 7:at + 7 + size], at + 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield Record.FromString(part)
            part = b""


def test_wandb_offline(pipe_folder, tmp_path):
    "Really written and read back: numbers, histograms, pictures with captions, settings; a resumed run goes on under its identity."
    assert in_child(in_two_parts_for_wandb, pipe_folder, tmp_path / "run") == 0
    files = sorted((tmp_path / "run" / "trackers" / "wandb").glob("offline-run-*/*.wandb"))
    identity = json.loads((tmp_path / "run" / "trackers" / "ids.json").read_text())["wandb"]
    records = [r for f in files for r in wandb_records(f)]
    begun = [r.run for r in records if r.WhichOneof("record_type") == "run"]
    assert len(files) == 2 and {(r.run_id, r.project, r.display_name) for r in begun} == {(identity, "alignkit", "run")}
    points = {}
    for r in records:
        if r.WhichOneof("record_type") != "history": continue
        item = {".".join(i.nested_key) or i.key: json.loads(i.value_json) for i in r.history.item}
        points[item["_step"]] = item
    rows = RunFolder(tmp_path / "run").history.read()
    assert sorted(points) == [0, 1, 2]
    for row in rows:
        for column, value in row.items(): assert points[row["epoch"]][column] == value, column
        assert sum(points[row["epoch"]]["rewards.values"]) == 8 and sum(points[row["epoch"]]["ratios.values"]) == 32
        known = json.loads((tmp_path / "run" / "samples" / f"epoch_{row['epoch']:04d}.json").read_text())
        assert points[row["epoch"]]["samples.captions"] == [f"{p}: {r:.4g}" for p, r in zip(known["prompts"], known["rewards"])]
        assert points[row["epoch"]]["samples.count"] == 8
    told = {u.key: json.loads(u.value_json) for r in records if r.WhichOneof("record_type") == "config" for u in r.config.update}
    assert told["learning_rate"] == 1e-2 and told["reward"] == "2*brightness + -0.5*greenness"
    tables = list((tmp_path / "run" / "trackers" / "wandb").glob("*/files/media/table/history_*.table.json"))
    assert max(len(json.loads(t.read_text())["data"]) for t in tables) == 3


def test_a_tracker_that_is_not_there_is_told_before_any_work(pipe_folder, tmp_path, monkeypatch):
    monkeypatch.setattr("accelerate.tracking.get_available_trackers", list)
    with pytest.raises(ImportError, match=r"trackers: 'wandb' is not installed: pip install alignkit\[track\]"):
        go(pipe_folder, tmp_path / "run", trackers=("wandb",))
    with pytest.raises(ValueError, match="trackers: 'tensorbord' is not known; choose from aim, "):
        go("no/such/pipe", trackers="tensorbord")
    assert not (tmp_path / "run").exists()


def test_a_tracker_that_cannot_start_stops_the_run_before_its_first_picture(pipe_folder, tmp_path, monkeypatch):
    def refuses(self): raise PermissionError("no key")
    monkeypatch.setattr("accelerate.tracking.TensorBoardTracker.start", refuses)
    asked = []
    with pytest.raises(RuntimeError, match="trackers: 'tensorboard' could not be started: PermissionError: no key"):
        go(pipe_folder, tmp_path / "run", reward=lambda images, prompts: asked.append(1), trackers="tensorboard")
    assert not asked


def test_a_tracker_that_breaks_does_not_end_the_run(pipe_folder, monkeypatch, tmp_path, unbroken):
    from accelerate.tracking import TensorBoardTracker
    real = TensorBoardTracker.log
    def breaks(self, values, step=None):
        if step == 1: raise OSError("disk full")
        real(self, values, step)
    monkeypatch.setattr(TensorBoardTracker, "log", breaks)
    with pytest.warns(UserWarning, match="trackers: 'tensorboard' failed and is left out from here on: OSError: disk full"):
        go(pipe_folder, tmp_path / "run", trackers="tensorboard")
    assert_same_run(tmp_path / "run", unbroken)


def test_trackers_without_a_folder(pipe_folder, tmp_path, monkeypatch):
    "They have a place of their own where the process was started."
    monkeypatch.chdir(tmp_path)
    for _ in range(2): run = go(pipe_folder, num_epochs=1, trackers="tensorboard")
    places = sorted((tmp_path / "trackers").glob("ddpo_is-*/tensorboard"))
    assert len(places) == 2
    found = board(places[-1])
    assert np.float32(run.rows[0]["reward_mean"]) in [np.float32(board(p).Scalars("reward_mean")[0].value) for p in places]
    assert [e.step for e in found.Images("samples_base")] == [0] and [e.step for e in found.Images("samples")] == [0]


# records of before -------------------------------------------------------------------------------------------------------------------

def test_a_record_of_before_these_settings_goes_on(pipe_folder, tmp_path, unbroken):
    "Watching changes no number: a run begun by an older version goes on with a tracker, and the other way round."
    out = tmp_path / "run"
    go(pipe_folder, out, num_epochs=2)
    file = out / "config.json"
    record = json.loads(file.read_text())
    del record["config"]["trackers"]
    record["config"]["progress"] = False
    file.write_text(json.dumps(record))
    for f in (out / "samples").glob("*.json"): f.unlink()
    table = pd.read_csv(out / "history.csv").drop(columns="ratio_off")
    table.to_csv(out / "history.csv", index=False)
    run = go(pipe_folder, out, resume=True, trackers="tensorboard")
    assert run.config["trackers"] == ("tensorboard",) and math.isnan(run.history.ratio_off[0]) and run.history.ratio_off[2] > 0
    found = board(out / "trackers" / "tensorboard")
    assert [e.step for e in found.Scalars("reward_mean")] == [0, 1, 2, 3]  # a tracker that came late has the epochs before
    whole = [{k: v for k, v in r.items() if k != "ratio_off"} for r in history(unbroken)]
    mine = [{k: v for k, v in r.items() if k != "ratio_off"} for r in history(out)]
    for a, b in zip(whole, mine, strict=True): assert a == pytest.approx(b, nan_ok=True, rel=1e-12)


# progress ----------------------------------------------------------------------------------------------------------------------------

def test_lines_where_there_is_no_terminal(pipe_folder, capsys, monkeypatch):
    "One clean line an epoch, on stderr, and one for the untrained model."
    monkeypatch.setenv("ALIGNKIT_PROGRESS", "1")
    run = go(pipe_folder, num_epochs=3)
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and len(lines) == 4 and "\r" not in err and "\x1b" not in err
    assert lines[0] == f"ddpo_is 0/3, held-out {run.eval_base['eval_reward_mean']:.4g}"
    for n, (line, row) in enumerate(zip(lines[1:], run.rows), 1):
        held = f", held-out {row['eval_reward_mean']:.4g}" if n > 1 else ""
        begin = f"ddpo_is {n}/3, reward {row['reward_mean']:.4g} ± {row['reward_std']:.3g}{held}, "
        assert line.startswith(begin) and line.endswith(" left" if n < 3 else " s"), line
    assert lines[1].split(", ")[-2].endswith(" an epoch") and ", 3 epochs in " in lines[3]
    for setting, env in ((False, "1"), (None, "0")):
        monkeypatch.setenv("ALIGNKIT_PROGRESS", env)
        go(pipe_folder, num_epochs=1, eval_every=0, progress=setting)
        assert capsys.readouterr() == ("", "")
    go(pipe_folder, num_epochs=1, eval_every=0, progress=True)  # the setting counts more than the environment
    assert capsys.readouterr().err.count("\n") == 1


def test_only_the_first_process_speaks(pipe_folder, tmp_path, capfd):
    on_two(lambda: go(pipe_folder, num_epochs=2, eval_every=0, sample_batch_size=4, progress=True).rows[0]["epoch"], tmp_path)
    lines = [line.split(",")[0] for line in capfd.readouterr().err.splitlines() if line.startswith("ddpo_is")]
    assert lines == ["ddpo_is 1/2", "ddpo_is 2/2"]


def _speaks(end, pipe):
    sys.stderr = os.fdopen(end, "w", encoding="utf-8")
    go(pipe, num_epochs=3, progress=True)


def test_bars_on_a_terminal(pipe_folder):
    "A process on a terminal of 100 columns: epochs, and inside them what is done, with pace, reward so far and time left."
    import fcntl, pty, termios  # not on Windows
    main, end = pty.openpty()
    fcntl.ioctl(end, termios.TIOCSWINSZ, struct.pack("HHHH", 30, 100, 0, 0))
    child = forked(_speaks, end, pipe_folder)
    os.close(end)
    seen = b""
    while select.select([main], [], [], 60)[0]:
        try: seen += os.read(main, 65536)
        except OSError: break  # the other end is closed
    child.join(60)
    assert child.exitcode == 0
    text = seen.decode()
    for word in ("ddpo_is 0/3, held-out ", "ddpo_is 1/3, reward ", " an epoch, ", " left", "drawing 0/8 pictures", "scoring ", "training ",
                 "evaluating 3 pictures", "ddpo_is 3/3"):
        assert word in text, (word, text[-2000:])
    assert "█" in text and max(len(part) for part in text.replace("\x1b[A", "\r").replace("\n", "\r").split("\r")) <= 101


def test_widgets_in_a_notebook(tmp_path):
    "In a real kernel the bars are widgets."
    import nbformat
    from nbclient import NotebookClient
    code = """from alignkit.progress import Meter, look_of_progress
meter = Meter("toy", 2, look_of_progress())
meter.part("drawing", 4, "pictures")
for _ in range(4): meter.tick(1, "reward 0.5")
meter.epoch("reward 0.5")
meter.close()
meter.look"""
    page = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(code)])
    NotebookClient(page, kernel_name="python3", resources={"metadata": {"path": str(ROOT)}}).execute()
    outputs = page.cells[0].outputs
    assert sum("application/vnd.jupyter.widget-view+json" in o.get("data", {}) for o in outputs) == 2
    assert outputs[-1]["data"]["text/plain"] == "'bars'"


def test_it_costs_next_to_nothing(pipe_folder, monkeypatch):
    "What a run tells its meter takes less than a hundredth of the run, though its epochs are of milliseconds."
    import time
    spent, began = [0.], time.perf_counter()
    for name in ("part", "tick", "say"):
        def timed(self, *args, real=getattr(Meter, name)):
            t = time.perf_counter()
            real(self, *args)
            spent[0] += time.perf_counter() - t
        monkeypatch.setattr(Meter, name, timed)
    go(pipe_folder, num_epochs=3, eval_every=0, progress=True)
    assert spent[0] < 0.01 * (time.perf_counter() - began)
