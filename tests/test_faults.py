"""Kills, signals, full disks and mismatches: nothing is lost, nothing half is published, and one line says what is wrong.

The folders and the checks are those of bench/kill_battery.py, of which this is the short version.
"""

import contextlib
import errno
import fcntl
import functools
import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import get_dataset
import get_tfrecord as get_tfrecord_module
import train as train_module
from get_dataset import load_manifest
from get_indexing import InputError, get_indexing
from get_tfrecord import get_tfrecord, record_constants
from infer import infer
from train import load_model, publish, train

import numpy as np
import pytest
from bench.kill_battery import SMALL, STAGES, Battery, at_work, check_file, check_former_or_new, check_whole
from bench.kill_battery import comparable, end, lock_of, standing, start, wait_for, workers
from conftest import _raw


class BatteryHere(Battery):
    """Ranks in this process, where TensorFlow is imported already."""

    def rank(self, folder):
        ranking = self.folder / "ranked"
        paths = infer(folder / "data/sample/click_seq", folder / "data/work", ranking, num_workers=1)
        ranked = {path.name: path.read_bytes() for path in paths}
        shutil.rmtree(ranking)
        return ranked


@pytest.fixture(scope="module", autouse=True)
def small():
    """The constants of the battery's scripts, in this process too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_tfrecord_module, "RANGE_BYTES", SMALL["get_tfrecord"]["RANGE_BYTES"])
        patch.setattr(get_dataset, "MIN_STEPS", SMALL["get_dataset"]["MIN_STEPS"])
        yield


@pytest.fixture(scope="module")
def battery(tmp_path_factory):
    return BatteryHere(tmp_path_factory.mktemp("battery") / "folders")


@pytest.fixture
def done(battery, tmp_path):
    """A copy of a folder in which every script has run."""
    return shutil.copytree(battery.done, tmp_path / "done")


def own_lines(script, err):
    """The lines that a script itself wrote about its end; nothing but what tensorflow logs may stand after them."""
    assert "Traceback" not in err and "Exception ignored" not in err, err
    lines = [
        line for line in err.splitlines() if not re.match(r"WARNING: All log messages before absl|[IWE]0000 ", line)
    ]
    assert lines[-1].startswith(f"{script}.py: "), err
    return [line for line in lines if line.startswith(f"{script}.py: ")]


def one_line_of(folder, script, **how):
    """Run a script to its bad end and return the one line that it says."""
    return one_line_of_each([script], [folder], **how)[script]


def one_line_of_each(scripts, folders, **how):
    """Run scripts, each in its folder and all at once, to their bad ends; return {script: the one line it says}."""
    processes = {script: start(folder, script, **how) for script, folder in zip(scripts, folders, strict=True)}
    ends, lines = {script: end(process) for script, process in processes.items()}, {}
    for script, (status, _, err) in ends.items():
        assert status == 1, f"{script}.py ended with {status}"
        (lines[script],) = own_lines(script, err)
    return lines


def one_line(call, *args, **how):
    """Call what a script's main() calls and return the one line that it ends with."""
    with pytest.raises((InputError, OSError)) as caught:
        call(*args, **how)
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ---------------------------------------------------------------- kills and signals


@pytest.mark.parametrize("script", STAGES)
def test_a_script_killed_three_times_goes_on_to_the_outputs_of_an_undisturbed_run(battery, script):
    """After each kill of train.py, infer.py gives the bytes of the model that stood, or those of the finished new one."""
    battery.survive(script, sorted(random.Random(script).random() for _ in range(3)))


def two_at_work(process):
    """The workers of a script where both are past their start: they import TensorFlow, with which they work."""
    pids = workers(process)
    with contextlib.suppress(OSError):  # of a worker that has just ended
        pids = [pid for pid in pids if "tensorflow" in Path(f"/proc/{pid}/maps").read_text()]
        return len(pids) == 2 and pids
    return False


@pytest.mark.parametrize(("script", "sent"), [*zip(STAGES, ("SIGTERM", "SIGINT") * 2, strict=True)])
def test_a_signal_ends_a_script_and_its_workers_with_one_line(battery, script, sent):
    """Ctrl-C reaches the whole group of processes, workers too."""
    folder, before = battery.ready_folder(script), battery.former[script]
    lock_of(folder, script).unlink()
    if script == "get_indexing":
        _raw(folder / "data/sample", titles=dict.fromkeys(map(str, range(300_000)), "a title that takes its time"))
    process = start(folder, script)
    at_work(folder, script, process)
    if script in ("get_tfrecord", "infer"):
        wait_for(lambda: two_at_work(process), "no workers")
    os.killpg(process.pid, signal.SIGINT) if sent == "SIGINT" else process.send_signal(signal.SIGTERM)
    status, _, err = end(process)  # which also waits until no worker is left
    assert status == 1
    assert own_lines(script, err) == [f"{script}.py: {'terminated' if sent == 'SIGTERM' else 'interrupted'}"]
    assert before.items() <= standing(folder).items()


@pytest.mark.parametrize("script", ["get_tfrecord", "infer"])
def test_a_worker_that_dies_ends_the_run_with_one_line(battery, script):
    folder = battery.ready_folder(script)
    process = start(folder, script)
    (victim, _) = wait_for(lambda: two_at_work(process), "no workers")
    os.kill(victim, signal.SIGKILL)
    status, _, err = end(process)
    (line,) = own_lines(script, err)
    assert status == 1 and "a worker process died, for lack of memory perhaps; run again" in line
    assert battery.former[script].items() <= standing(folder).items()


@pytest.mark.parametrize("script", ["get_indexing", "get_tfrecord", "infer"])
def test_a_second_run_in_one_folder_says_so_and_stops(battery, script):
    folder = battery.ready_folder(script)
    with open(lock_of(folder, script), "w") as lock:  # as a run that is under way holds it
        fcntl.flock(lock, fcntl.LOCK_EX)
        line = one_line_of(folder, script)
    assert f"another {script}.py is at work in {lock_of(folder, script).parent}; let it end" in line
    assert standing(folder) == battery.former[script]


# ---------------------------------------------------------------- full disks and folders that cannot be written


@pytest.mark.parametrize(
    ("script", "room"),
    [("get_indexing", 500), ("get_tfrecord", 3_000), ("train", 150_000), ("infer", 1_000)],
)
def test_no_room_for_a_file_is_one_line_and_leaves_the_former_outputs(battery, script, room):
    """The limit of a file's size is a real one, of the operating system: a write beyond it fails, in workers as well."""
    folder, before = battery.ready_folder(script), battery.former[script]
    line = one_line_of(folder, script, preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (room, room)))
    assert "File too large" in line or "errno = 27" in line
    assert "data/work/" in line and ("make room there" in line or script == "get_tfrecord")
    outputs = standing(folder)
    for name, data in before.items():
        assert outputs[name] == data or name == "model/history.csv", f"{name} was touched"
    for name in outputs.keys() - before.keys():
        check_file(name, outputs[name])
        check_former_or_new(name, outputs[name], before, battery.new[script])


def test_a_folder_that_cannot_be_written_is_one_line(battery):
    """A file stands where the folder should be: root, too, cannot write there."""
    folders = [battery.ready_folder(script) for script in STAGES]
    places = {script: folder / "data/work" / STAGES[script] for script, folder in zip(STAGES, folders, strict=True)}
    for place in places.values():
        shutil.rmtree(place)
        place.write_text("not a folder")
    lines = one_line_of_each(STAGES, folders)
    for script, place in places.items():
        assert STAGES[script] in lines[script] and place.read_text() == "not a folder"


@pytest.mark.parametrize("script", ["get_tfrecord", "get_dataset", "train", "infer"])
def test_a_missing_package_is_one_line_with_the_python_that_answered(battery, script):
    """-S: without the packages that pip installed."""
    command = [sys.executable, "-S", f"{script}.py"]
    ended = subprocess.run(command, check=False, cwd=battery.done, capture_output=True, text=True)
    message = r"No module named '\w+'; run the Python of your environment, or pip install -r requirements.txt\n"
    assert ended.returncode == 1 and re.fullmatch(f"{re.escape(sys.executable)}: {message}", ended.stderr)


class Disk:
    """Stands in for os.fsync and os.replace, with which every write ends: the disk is full at their n-th call."""

    former = (("fsync", os.fsync), ("replace", os.replace))

    def __init__(self, monkeypatch, full_at):
        self.calls, self.full_at = 0, full_at
        for name, function in self.former:
            monkeypatch.setattr(os, name, functools.partial(self.write, function))

    def write(self, function, *arguments):
        self.calls += 1
        if self.calls == self.full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        function(*arguments)


@pytest.mark.parametrize("script", ["get_indexing", "get_tfrecord", "infer"])
def test_a_disk_full_at_any_write_leaves_every_file_former_or_new(battery, monkeypatch, script):
    call = {"get_indexing": get_indexing, "get_tfrecord": get_tfrecord, "infer": infer}[script]
    work = functools.partial(call, **({} if script == "get_indexing" else {"num_workers": 1}))
    folder, former = battery.ready_folder(script), battery.former[script]
    monkeypatch.chdir(folder)
    disk = Disk(monkeypatch, full_at=None)
    work()
    new, writes = standing(folder), disk.calls
    assert writes >= 4
    for full_at in range(1, writes + 1):
        folder = battery.ready_folder(script)
        monkeypatch.chdir(folder)
        Disk(monkeypatch, full_at)
        assert "No space left" in one_line(work)
        check_whole(folder, script, former, new)
        work()
        assert comparable(standing(folder)) == comparable(new)
        left = {path for path in (folder / "data/work").rglob(".*") if not path.name.endswith(".lock")}
        assert not left, f"{left} are left after a disk full at write {full_at}"
        shutil.rmtree(folder)


def test_a_ranking_is_never_taken_for_that_of_other_clicks(done, monkeypatch):
    """Clicks change, the run stops at any of its writes; then the former clicks come back."""
    monkeypatch.chdir(done)
    clicks = Path("data/sample/click_seq/a.json")
    former, expected = clicks.read_bytes(), infer(num_workers=1)[0].read_bytes()
    changed = b"".join(reversed(former.splitlines(keepends=True)))
    for full_at in range(1, 100):
        clicks.write_bytes(changed)
        disk = Disk(monkeypatch, full_at)
        with contextlib.suppress(OSError):
            infer(num_workers=1)
        Disk(monkeypatch, full_at=None)
        clicks.write_bytes(former)
        again = infer(num_workers=1)[0].read_bytes()
        assert gzip.decompress(again) == gzip.decompress(expected), f"stopped at write {full_at}"
        if disk.calls < full_at:  # it was not stopped
            break
    assert full_at > 5  # the part, default.json, what it was made of, the ranking


@pytest.fixture(scope="module")
def published(battery, tmp_path_factory):
    """(a folder with a standing model, publish() of another one): all but the end of a warm training of one epoch."""
    folder, calls = shutil.copytree(battery.done, tmp_path_factory.mktemp("published") / "done"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "publish", lambda *args: calls.append(args))
        train(folder / "data/work", WARM_EPOCHS=1, SEED=2)
    ((of_folder, *args),) = calls
    assert of_folder == folder / "data/work/model"
    return folder, lambda model: publish(model, *args)


def test_a_disk_full_at_any_write_of_publishing_leaves_the_former_model_or_the_new_one_whole(
    published, tmp_path, monkeypatch
):
    folder, publish_into = published
    former, seen = json.loads((folder / "data/work/model/model.json").read_text()), []
    for full_at in range(1, 100):
        work_dir = shutil.copytree(folder / "data/work", tmp_path / str(full_at))
        disk = Disk(monkeypatch, full_at)
        with contextlib.suppress(OSError):
            publish_into(work_dir / "model")
        saved = load_model(work_dir).saved
        seen.append(saved["id"])
        if saved["id"] == former["id"]:
            assert saved == former
            for name in ("metrics.json", "test.csv"):
                assert (work_dir / "model" / name).read_bytes() == (folder / "data/work/model" / name).read_bytes()
        if disk.calls < full_at:
            break
    assert former["id"] in seen and seen[-1] != former["id"] and len(seen) > 8
    assert_published(work_dir / "model", saved)


def assert_published(model, saved):
    """The folder holds the files and tables of that model and the history, and nothing that a run under way needs."""
    names = {path.name for path in model.iterdir()} - {"logs"}
    assert names == {saved["weights"]["file"], saved["memory"]["file"],
                     "model.json", "metrics.json", "test.csv", "history.csv"}  # fmt: skip
    assert json.loads((model / "metrics.json").read_text())["test"] == saved["test"]


def test_what_a_run_killed_right_after_its_model_counted_left_to_do_is_done_by_the_next(
    published, tmp_path, monkeypatch
):
    folder, publish_into = published
    model = shutil.copytree(folder / "data/work", tmp_path / "work") / "model"
    former = (model / "metrics.json").read_bytes()
    with monkeypatch.context() as patch, pytest.raises(ZeroDivisionError):
        patch.setattr(train_module, "end_publishing", lambda *_: 1 / 0)
        publish_into(model)
    assert (model / "metrics.json").read_bytes() == former
    train(tmp_path / "work", WARM_EPOCHS=1, SEED=2)  # there is nothing to train, and this is left to do
    assert_published(model, json.loads((model / "model.json").read_text()))


def test_a_first_training_that_never_ended_leaves_nothing_that_ranks(done, monkeypatch):
    shutil.rmtree(done / "data/work/model")
    monkeypatch.setattr(train_module, "choose_and_publish", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        train(done / "data/work", arguments={"emb_dim": 8}, EPOCHS=1)
    assert {path.name for path in (done / "data/work/model").iterdir()} - {"logs"} == {"checkpoint.npz", "history.csv"}
    line = one_line(infer, done / "data/sample/click_seq", done / "data/work", done / "ranking", num_workers=1)
    assert "model.json: no such file; run train.py first" in line


@pytest.mark.parametrize("part", ["weights", "memory"])
def test_a_damaged_model_ranks_nothing_and_train_begins_anew_from_nothing(done, capsys, part):
    work_dir, ranking = done / "data/work", done / "ranking"
    saved = json.loads((work_dir / "model/model.json").read_text())
    flip_a_bit(work_dir / "model" / saved[part]["file"])
    line = one_line(infer, done / "data/sample/click_seq", work_dir, ranking, num_workers=1)
    assert saved[part]["file"] in line and "run train.py again" in line
    train(work_dir, arguments={"emb_dim": 8}, EPOCHS=1)
    said = capsys.readouterr()
    assert "training starts from nothing" in said.out and "damaged" in said.err
    assert len(infer(done / "data/sample/click_seq", work_dir, ranking, num_workers=1)) == 2


def test_a_damaged_shard_ends_a_look_at_the_data_with_one_line(done):
    flip_a_bit(shard := a_shard(done))
    line = one_line_of(done, "get_dataset")
    assert f"{shard}: gone, damaged or changed while it was read" in line and "run get_tfrecord.py" in line


UNDER_TRAINING = {
    "all shards gone": lambda folder: shutil.rmtree(folder / "data/work/tfrecord"),
    "a shard damaged": lambda folder: flip_a_bit(a_shard(folder)),
}


@pytest.mark.parametrize("change", UNDER_TRAINING.values(), ids=UNDER_TRAINING)
def test_shards_that_change_under_a_running_training_end_it_with_one_line(done, monkeypatch, change):
    """They change when epoch 0, the standing weights, is measured; the model that stood stands."""
    before, save = standing(done), train_module.save_checkpoint

    def save_and_change(*args):
        save(*args)
        change(done)

    monkeypatch.setattr(train_module, "save_checkpoint", save_and_change)
    line = one_line(train, done / "data/work", WARM_EPOCHS=1, SEED=3)
    named = (".tfrecord: gone, damaged or changed while it was read", "manifest.json: no such file")
    assert any(what in line for what in named) and "run get_tfrecord.py" in line
    after = standing(done)
    for name in before.keys() - {"model/history.csv"}:
        assert name.startswith("tfrecord/") or after[name] == before[name]


# ---------------------------------------------------------------- mismatches


def edit_json(path, **changes):
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def renumber(folder):
    """Give the index other numbers: the first two videos change places."""
    path = folder / "data/work/indexing/vid2idx.json"
    first, second, *others = json.loads(path.read_text())
    path.write_text(json.dumps({vid: number for number, vid in enumerate([second, first, *others], start=2)}))


def a_shard(folder):
    """The largest shard of the training split."""
    return max((folder / "data/work/tfrecord").glob("train-*.tfrecord"), key=lambda path: path.stat().st_size)


def flip_a_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path):
    path.write_bytes(path.read_bytes()[:-1])


@pytest.mark.parametrize(
    ("break_it", "load", "named", "script"),
    [
        (renumber, load_manifest, "tfrecord/manifest.json", "get_tfrecord.py"),
        (renumber, load_model, "model/model.json", "train.py"),
        (lambda f: edit_json(f / "data/work/tfrecord/manifest.json", format=99), load_manifest,
         "tfrecord/manifest.json: made with format = 99", "get_tfrecord.py"),
        (lambda f: edit_json(f / "data/work/model/model.json", format=99), load_model,
         "model/model.json: made with format = 99", "train.py"),
        (lambda f: flip_a_bit(*(f / "data/work/model").glob("*.weights.h5")), load_model, ".weights.h5", "train.py"),
        (lambda f: flip_a_bit(*(f / "data/work/model").glob("*.memory.npz")), load_model, ".memory.npz", "train.py"),
        (lambda f: cut(f / "data/work/model/model.json"), load_model, "model/model.json: damaged", "train.py"),
        (lambda f: cut(f / "data/work/tfrecord/manifest.json"), load_manifest, "manifest.json: damaged",
         "get_tfrecord.py"),
        (lambda f: cut(a_shard(f)), load_manifest, "tfrecord/train-", "get_tfrecord.py"),
        (lambda f: a_shard(f).unlink(), load_manifest, "tfrecord/train-", "get_tfrecord.py"),
    ],
    ids=["records of another index", "weights of another index", "future manifest", "future model", "other weights",
         "other memory", "cut model.json", "cut manifest", "cut shard", "missing shard"],
)  # fmt: skip
def test_a_mismatch_is_refused_naming_the_file_and_the_script_to_run(done, break_it, load, named, script):
    break_it(done)
    line = one_line(load, done / "data/work")
    assert named in line and f"{script} again" in line
    if load is load_model:
        other = done / "ranking"
        assert line == one_line(infer, done / "data/sample/click_seq", done / "data/work", other, num_workers=1)


def test_a_constant_of_the_records_edited_after_they_were_made_is_refused_naming_it_and_both_values(done):
    for load in (load_manifest, train):
        line = one_line(load, done / "data/work", record_constants(USER_MAX_LEN=40))
        assert "tfrecord/manifest.json: made with USER_MAX_LEN = 50, now it is 40; run get_tfrecord.py again" in line


def test_mismatched_processes_end_with_one_line_and_publish_nothing(done):
    renumber(done)
    before = standing(done)
    lines = one_line_of_each(["train", "infer"], [done, done])
    assert "get_tfrecord.py again" in lines["train"] and "train.py again" in lines["infer"]
    assert standing(done) == before


# ---------------------------------------------------------------- numbers that are not finite


def test_a_loss_that_is_not_finite_keeps_the_model_and_says_where(done):
    before = standing(done, "train")
    line = one_line(train, done / "data/work", LEARNING_RATE=1e38, WARM_START=False)
    assert re.search(r"the loss is (nan|inf) at step \d+ of epoch 1 \(learning rate [\d.]+e\+3[78]\)", line)
    assert standing(done, "train") == before


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_score_that_is_not_finite_is_never_written(done, monkeypatch):
    """The memory's counts are made no numbers, and the model's file vouches for them."""
    monkeypatch.chdir(done)
    before, (path,) = standing(done, "infer"), Path("data/work/model").glob("*.memory.npz")
    with np.load(path) as saved:
        arrays = dict(saved)
    np.savez(path, **arrays | {"by_video.values": np.full_like(arrays["by_video.values"], np.nan)})
    model = Path("data/work/model/model.json")
    memory = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    mix = json.loads(model.read_text())["mix"] | {"memory_weight": 0.5, "habit_weight": 0.1}
    edit_json(model, memory=memory, id="another", mix=mix)
    assert "not finite" in one_line(infer, num_workers=1)
    assert standing(done, "infer") == before
