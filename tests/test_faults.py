"""Kills, signals and full disks: nothing is lost, nothing half is published, and one line says what is wrong.

The folders and the checks are those of bench/kill_battery.py, of which this is the short version.
"""

import contextlib
import errno
import functools
import gzip
import hashlib
import io
import json
import os
import random
import re
import resource
import shutil
import signal
import sys
import time
from pathlib import Path

import get_dataset
import get_tfrecord as get_tfrecord_module
import infer as infer_module
import train as train_module
from get_indexing import get_indexing
from get_tfrecord import get_tfrecord
from infer import infer
from train import load_model, publish, train

import numpy as np
import pytest
from bench.kill_battery import SMALL, STAGES, Battery, at_work, check_file, check_former_or_new, check_whole
from bench.kill_battery import comparable, end, standing, start, wait_for, workers
from conftest import _raw, edit_json, flip_a_bit, one_line, one_line_of_main, run_python


WORKERS_START = 5  # seconds, about, until workers have imported TensorFlow
CALLS = {  # what the scripts do, here without workers
    "get_indexing": get_indexing,
    "get_tfrecord": functools.partial(get_tfrecord, num_workers=1),
    "train": functools.partial(train, **SMALL["train"]),
    "infer": functools.partial(infer, num_workers=1),
}


class BatteryHere(Battery):
    """Does in this process, where TensorFlow is imported already, all that is not to be killed."""

    def run(self, folder, script):
        """Do what a script does and return how many seconds it takes as a process, about.

        Of the last training, self.published is what it gave to publish().
        """

        def keep_and_publish(*given):
            self.published = given[1:]
            publish(*given)

        with pytest.MonkeyPatch.context() as patch:
            patch.chdir(folder)
            patch.setattr(train_module, "publish", keep_and_publish)
            began = time.monotonic()
            CALLS[script]()
        return time.monotonic() - began + WORKERS_START * (script in ("get_tfrecord", "infer"))


@pytest.fixture(scope="module", autouse=True)
def small():
    """The constants of the battery's scripts, in this process too."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_tfrecord_module, "RANGE_BYTES", SMALL["get_tfrecord"]["RANGE_BYTES"])
        patch.setattr(infer_module, "RANK_BYTES", SMALL["infer"]["RANK_BYTES"])
        patch.setattr(get_dataset, "MIN_STEPS", SMALL["get_dataset"]["MIN_STEPS"])
        yield


@pytest.fixture(scope="module")
def battery(tmp_path_factory):
    return BatteryHere(tmp_path_factory.mktemp("battery") / "folders")


@pytest.fixture
def done(battery, tmp_path):
    """A copy of a folder in which every script has run."""
    return shutil.copytree(battery.done, tmp_path / "done")


# ---------------------------------------------------------------- kills and signals


@pytest.mark.parametrize("script", STAGES)
def test_a_script_killed_twice_goes_on_to_the_outputs_of_an_undisturbed_run(battery, script):
    """After each kill of train.py, infer.py gives the bytes of the model that stood, or those of the finished new one."""
    battery.survive(script, sorted(random.Random(script).random() for _ in range(2)))


def two_at_work(process):
    """The workers of a script where both are past their start: they import TensorFlow, with which they work."""
    pids = workers(process)
    with contextlib.suppress(OSError):  # of a worker that has just ended
        pids = [pid for pid in pids if "tensorflow" in Path(f"/proc/{pid}/maps").read_text()]
        return len(pids) == 2 and pids
    return False


@pytest.mark.parametrize(
    ("script", "sent"), [("get_indexing", "SIGTERM"), ("get_tfrecord", "SIGINT"), ("train", "SIGTERM")]
)
def test_a_signal_ends_a_script_and_its_workers_with_one_line(battery, script, sent):
    """Ctrl-C reaches the whole group of processes, workers too."""
    folder, before = battery.ready_folder(script), battery.former[script]
    if script == "get_indexing":
        _raw(folder / "data/sample", titles=dict.fromkeys(map(str, range(300_000)), "a title that takes its time"))
    process = start(folder, script)
    at_work(folder, script, process)
    if script == "get_tfrecord":
        wait_for(lambda: two_at_work(process), "no workers")
    os.killpg(process.pid, signal.SIGINT) if sent == "SIGINT" else process.send_signal(signal.SIGTERM)
    status, _, err = end(process)  # which also waits until no worker is left
    said = [line for line in err.splitlines() if line.startswith(f"{script}.py: ")]
    assert status == 1 and "Traceback" not in err and "Exception ignored" not in err, err
    assert said == [f"{script}.py: {'terminated' if sent == 'SIGTERM' else 'interrupted'}"]
    assert before.items() <= standing(folder).items()


# ---------------------------------------------------------------- full disks and folders that cannot be written


@contextlib.contextmanager
def files_up_to(number):
    """Let no file of this process grow beyond so many bytes."""
    former = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (number, former[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, former)


@pytest.mark.parametrize(
    ("script", "room"),
    [("get_indexing", 500), ("get_tfrecord", 3_000), ("train", 150_000), ("infer", 1_000)],
)
def test_no_room_for_a_file_is_one_line_and_leaves_the_former_outputs(battery, monkeypatch, script, room):
    """The limit of a file's size is a real one, of the operating system: a write beyond it fails."""
    folder, before = battery.ready_folder(script), battery.former[script]
    monkeypatch.chdir(folder)
    with files_up_to(room), contextlib.redirect_stdout(io.StringIO()):
        line = one_line(CALLS[script])
    assert "File too large" in line or "errno = 27" in line
    assert "data/work/" in line and ("make room there" in line or script == "get_tfrecord")
    outputs = standing(folder)
    for name, data in before.items():
        assert outputs[name] == data or name == "model/history.csv", f"{name} was touched"
    for name in outputs.keys() - before.keys():
        check_file(name, outputs[name])
        check_former_or_new(name, outputs[name], before, battery.new[script])


@pytest.mark.parametrize("script", STAGES)
def test_a_folder_that_cannot_be_written_is_one_line(battery, monkeypatch, script):
    """A file stands where the folder should be: root, too, cannot write there."""
    folder = battery.ready_folder(script)
    place = folder / "data/work" / STAGES[script]
    shutil.rmtree(place)
    place.write_text("not a folder")
    assert STAGES[script] in one_line_of_main(monkeypatch, folder, script) and place.read_text() == "not a folder"


@pytest.mark.parametrize("script", ["get_tfrecord", "get_dataset", "train", "infer"])
def test_a_missing_package_is_one_line_with_the_python_that_answered(battery, script):
    """-S: without the packages that pip installed."""
    ended = run_python(battery.done, "-S", f"{script}.py")
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
    work = CALLS[script]
    folder, former = battery.ready_folder(script), battery.former[script]
    monkeypatch.chdir(folder)
    disk = Disk(monkeypatch, full_at=None)
    work()
    new, writes = standing(folder), disk.calls
    assert writes >= 4
    for full_at in range(1, writes + 1):
        shutil.rmtree(folder)
        monkeypatch.chdir(shutil.copytree(battery.ready[script], folder))  # the same place, whose model is in memory
        Disk(monkeypatch, full_at)
        assert "No space left" in one_line(work)
        check_whole(folder, script, former, new)
        work()
        assert comparable(standing(folder)) == comparable(new)
        left = {path for path in (folder / "data/work").rglob(".*") if not path.name.endswith(".lock")}
        assert not left, f"{left} are left after a disk full at write {full_at}"


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


def test_a_disk_full_at_any_write_of_publishing_leaves_the_former_model_or_the_new_one_whole(
    battery, tmp_path, monkeypatch
):
    folder = battery.ready["train"]
    former, seen = json.loads((folder / "data/work/model/model.json").read_text()), []
    for full_at in range(1, 100):
        work_dir = shutil.copytree(folder / "data/work", tmp_path / str(full_at))
        disk = Disk(monkeypatch, full_at)
        with contextlib.suppress(OSError):
            publish(work_dir / "model", *battery.published)
        saved = load_model(work_dir).saved
        seen.append(saved["id"])
        if saved["id"] == former["id"]:
            assert saved == former
            for name in ("metrics.json", "test.csv"):
                assert (work_dir / "model" / name).read_bytes() == (folder / "data/work/model" / name).read_bytes()
        if disk.calls < full_at:
            break
    assert former["id"] in seen and seen[-1] != former["id"] and len(seen) > 8
    tables, names = {"model.json", "metrics.json", "test.csv", "history.csv"}, os.listdir(work_dir / "model")
    assert set(names) - {"logs"} == {saved["weights"]["file"], saved["memory"]["file"], *tables}
    assert json.loads((work_dir / "model/metrics.json").read_text())["test"] == saved["test"]


def test_a_damaged_shard_ends_a_look_at_the_data_with_one_line(done, monkeypatch):
    shard = max((done / "data/work/tfrecord").glob("train-*.tfrecord"), key=lambda path: path.stat().st_size)
    flip_a_bit(shard)
    line = one_line_of_main(monkeypatch, done, "get_dataset")
    assert f"{shard}: gone, damaged or changed while it was read" in line and "run get_tfrecord.py" in line


def test_shards_that_go_under_a_running_training_end_it_with_one_line(done, monkeypatch):
    """They go when epoch 0, the standing weights, is measured; the model that stood stands."""
    before, save = standing(done), train_module.save_checkpoint

    def save_and_remove(*args):
        save(*args)
        shutil.rmtree(done / "data/work/tfrecord")

    monkeypatch.setattr(train_module, "save_checkpoint", save_and_remove)
    line = one_line(train, done / "data/work", WARM_EPOCHS=1, SEED=3)
    assert "manifest.json: no such file" in line and "run get_tfrecord.py" in line
    after = standing(done)
    for name in before.keys() - {"model/history.csv"}:
        assert name.startswith("tfrecord/") or after[name] == before[name]


# ---------------------------------------------------------------- numbers that are not finite


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_score_that_is_not_finite_is_never_written(done, monkeypatch):
    """The memory's counts are made no numbers, and the model's file vouches for them."""
    monkeypatch.chdir(done)
    before, (path,) = standing(done, "infer"), Path("data/work/model").glob("*.memory.npz")
    with np.load(path) as saved:
        arrays = dict(saved)
    np.savez(path, **arrays | {"near.values": np.full_like(arrays["near.values"], np.nan)})
    model = Path("data/work/model/model.json")
    memory = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    mix = {"memory_weight": 0.5, "habit_weight": 0.1}
    edit_json(model, lambda of: of | {"memory": memory, "id": "another", "mix": of["mix"] | mix})
    assert "not finite" in one_line(infer, num_workers=1)
    assert standing(done, "infer") == before
