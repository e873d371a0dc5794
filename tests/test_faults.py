"""Kills, signals, full disks and mismatches: nothing is lost, nothing half is published, and one line says what is wrong.

The folders and the checks are those of bench/kill_battery.py, of which this is the short version.
"""

import contextlib
import errno
import gzip
import hashlib
import json
import os
import random
import re
import resource
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest
from bench.kill_battery import (
    STAGES,
    Battery,
    at_work,
    check_file,
    check_former_or_new,
    edit,
    end,
    run,
    standing,
    start,
    wait_for,
    workers,
)
from conftest import _clicks_like_real, _raw

import infer as infer_module
from get_dataset import load_manifest
from get_indexing import InputError, get_indexing
from get_tfrecord import get_tfrecord
from infer import infer
from train import load_model, train


@pytest.fixture(scope="module")
def battery(tmp_path_factory):
    return Battery(tmp_path_factory.mktemp("battery") / "folders")


@pytest.fixture
def done(battery, tmp_path):
    """A copy of a folder in which every script has run."""
    return shutil.copytree(battery.done, tmp_path / "done")


@pytest.fixture
def fifo():
    """A function that makes a named pipe: a script that opens it waits there, at work, until it is stopped."""

    def make(path):
        path.unlink(missing_ok=True)
        os.mkfifo(path)

    return make


def own_lines(script, err):
    """The lines that a script itself wrote about its end, without what tensorflow logs."""
    assert "Traceback" not in err and "Exception ignored" not in err, err
    assert err.strip().splitlines()[-1].startswith(f"{script}.py: "), err
    return [line for line in err.splitlines() if line.startswith(f"{script}.py: ")]


def one_line_of(folder, script, **how):
    """Run a script to its bad end and return the one line that it says."""
    return one_line_of_each([script], [folder], **how)[script]


def one_line_of_each(scripts, folders, **how):
    """Run scripts, each in its folder and all at once, to their bad ends; return {script: the one line it says}."""
    processes = {script: start(folder, script, **how) for script, folder in zip(scripts, folders, strict=True)}
    ends, lines = {script: end(process) for script, process in processes.items()}, {}
    for script, (status, _, err) in ends.items():
        assert status not in (0, None), f"{script}.py ended well"
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
    battery.survive(script, sorted(random.Random(script).random() for _ in range(3)))


@pytest.mark.parametrize("sent", [signal.SIGTERM, signal.SIGINT], ids=["SIGTERM", "Ctrl-C"])
@pytest.mark.parametrize("script", STAGES)
def test_a_signal_ends_a_script_and_its_workers_with_one_line(battery, fifo, script, sent):
    """Ctrl-C reaches the whole group of processes, workers that are just starting among them."""
    folder, before = battery.ready_folder(script), battery.former[script]
    (folder / f"data/work/.{script}.py.lock").unlink()
    if script == "get_indexing":
        fifo(folder / "data/sample/vid2title2.json")
    process = start(folder, script)
    at_work(folder, script, process)
    if script in ("get_tfrecord", "infer"):
        wait_for(lambda: len(workers(process)) == 2, "no workers")
    os.killpg(process.pid, sent) if sent == signal.SIGINT else process.send_signal(sent)
    status, _, err = end(process)  # which also waits until no worker is left
    assert status == 1
    assert own_lines(script, err) == [f"{script}.py: {'terminated' if sent == signal.SIGTERM else 'interrupted'}"]
    assert before.items() <= standing(folder).items()


@pytest.mark.parametrize("script", ["get_tfrecord", "infer"])
def test_a_worker_that_dies_ends_the_run_naming_its_file(battery, script):
    folder = battery.ready_folder(script)
    process = start(folder, script)
    (victim, *_) = wait_for(lambda: workers(process), "no workers")
    os.kill(victim, signal.SIGKILL)
    status, _, err = end(process)
    (line,) = own_lines(script, err)
    assert status == 1 and re.search(r"data/sample/click_seq/[ab]\.json(\.gz)?: the worker process died", line)
    assert battery.former[script].items() <= standing(folder).items()


@pytest.mark.parametrize(
    ("script", "blocks"), [("get_indexing", "vid2title2.json"), ("get_tfrecord", "click_seq/c.json")]
)
def test_a_second_run_in_one_folder_says_so_and_stops(battery, fifo, script, blocks):
    folder = battery.ready_folder(script)
    (folder / f"data/work/.{script}.py.lock").unlink()
    fifo(folder / "data/sample" / blocks)
    first = start(folder, script)
    try:
        at_work(folder, script, first)
        line = wait_for(lambda: "another" in (said := one_line_of(folder, script)) and said, "no second run")
        assert f"another {script}.py is at work in {folder / 'data/work'}" in line
        assert first.poll() is None and battery.former[script].items() <= standing(folder).items()
    finally:
        first.kill()
        end(first)


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
    outputs = standing(folder)
    for name, data in before.items():
        assert outputs[name] == data, f"{name} was touched"
    for name in outputs.keys() - before.keys():
        check_file(name, outputs[name])
        check_former_or_new(name, outputs[name], before, battery.new[script])
    if script == "get_indexing":  # the second runs of the others are those of the kills
        run(folder, script)
        battery.check_same(folder, script)


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


class Disk:
    """Stands in for os.fsync: the disk is full at its n-th call."""

    def __init__(self, full_at):
        self.calls, self.full_at, self.sync = 0, full_at, os.fsync

    def fsync(self, descriptor):
        self.calls += 1
        if self.calls == self.full_at:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        self.sync(descriptor)


@pytest.mark.parametrize("script", ["get_indexing", "get_tfrecord", "infer"])
def test_a_disk_full_at_any_write_leaves_every_file_former_or_new(battery, monkeypatch, script):
    def work(folder):
        monkeypatch.chdir(folder)
        if script == "get_indexing":
            get_indexing()
        elif script == "get_tfrecord":
            get_tfrecord(val_ratio=0.2, test_ratio=0.2, num_workers=1)
        else:
            infer(num_workers=1)

    undisturbed = battery.ready_folder(script)
    former = standing(undisturbed, script)
    monkeypatch.setattr(os, "fsync", (disk := Disk(full_at=None)).fsync)
    work(undisturbed)
    new, syncs = standing(undisturbed, script), disk.calls
    assert syncs >= 4
    for full_at in range(1, syncs + 1):
        folder = battery.ready_folder(script)
        monkeypatch.setattr(os, "fsync", Disk(full_at).fsync)
        assert "No space left" in one_line(work, folder)
        for name, data in standing(folder, script).items():
            check_file(name, data)
            check_former_or_new(name, data, former, new)
        work(folder)
        assert standing(folder, script) == new
        left = [path.name for path in (folder / "data/work" / STAGES[script]).glob(".*")]
        assert not left, f"{left} are left after a disk full at write {full_at}"
        shutil.rmtree(folder)


def test_a_ranking_is_never_taken_for_that_of_other_clicks(done, monkeypatch):
    """Clicks change, the run stops after the ranking and before its note; then the former clicks come back."""
    clicks, work_dir = done / "data/sample/click_seq", done / "data/work"
    former = (clicks / "a.json").read_bytes()
    expected = infer(clicks, work_dir, num_workers=1)[0].read_bytes()
    (clicks / "a.json").write_bytes(b"".join(reversed(former.splitlines(keepends=True))))
    for full_at in range(1, 5):  # the ranking, its folder, the note, its folder
        monkeypatch.setattr(os, "fsync", Disk(full_at).fsync)
        with contextlib.suppress(OSError):
            infer(clicks, work_dir, num_workers=1)
        changed = (clicks / "a.json").read_bytes()
        (clicks / "a.json").write_bytes(former)
        ranking = infer(clicks, work_dir, num_workers=1)[0].read_bytes()
        assert gzip.decompress(ranking) == gzip.decompress(expected), f"stopped at write {full_at}"
        (clicks / "a.json").write_bytes(changed)


@pytest.mark.parametrize("fault", ["bad lines", "full disk"])
def test_former_records_can_be_trained_on_after_a_run_that_stopped(done, monkeypatch, fault):
    monkeypatch.chdir(done)
    if fault == "bad lines":
        with open("data/sample/click_seq/a.json", "ab") as file:
            file.write(b"no JSON\n" * 50)
    else:
        monkeypatch.setattr(os, "fsync", Disk(full_at=9).fsync)
    one_line(get_tfrecord, val_ratio=0.2, test_ratio=0.2, num_workers=1)
    load_manifest()


# ---------------------------------------------------------------- what is kept and what is made again


def stamps(folder, script, pattern):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "data/work" / STAGES[script]).glob(pattern)}


def test_finished_shards_are_kept_until_a_constant_their_input_or_the_index_changes(done, monkeypatch):
    def records():
        get_tfrecord(val_ratio=0.2, test_ratio=0.2, num_workers=1)
        return stamps(done, "get_tfrecord", "*.tfrecord")

    made = stamps(done, "get_tfrecord", "*.tfrecord")
    run(done, "get_tfrecord")
    assert stamps(done, "get_tfrecord", "*.tfrecord") == made
    edit(done, "get_tfrecord", WINDOW_OVERLAP=17)
    run(done, "get_tfrecord")
    edited = stamps(done, "get_tfrecord", "*.tfrecord")
    assert len(edited) == len(made) and not edited.keys() & made.keys()

    monkeypatch.chdir(done)
    before = records()
    _raw(done / "data/sample", users=_clicks_like_real(60, seed=52)["users"], click_file="b", gzip=True)
    changed = records()
    kept = {name for name, stamp in changed.items() if before.get(name) == stamp}
    assert kept == {name for name in before if "-00000-" in name}  # the shards of a.json
    index = done / "data/work/indexing/vid2idx.json"
    videos = json.loads(index.read_text())
    index.write_text(json.dumps(videos | {"grown": 2 + len(videos)}))
    assert not records().keys() & changed.keys()


def change_input(folder):
    _raw(folder / "data/sample", users=_clicks_like_real(5, seed=53)["users"], click_file="a")


def change_index(folder):
    columns = folder / "data/work/indexing/cid2vidx.json"
    columns.write_text(json.dumps(json.loads(columns.read_text()) | {"t0a": [2, 3]}))


def change_model(folder):
    model = folder / "data/work/model/model.json"
    saved = json.loads(model.read_text())
    model.write_text(json.dumps(saved | {"mix": saved["mix"] | {"temperature": 3.0}}))


def change_constant(folder):
    """As an editor would: infer.py takes its constants from the module."""
    infer_module.DECIMALS = 3


@pytest.mark.parametrize(
    ("change", "again"),
    [(change_input, ["a"]), (change_index, ["a", "b"]), (change_model, ["a", "b"]), (change_constant, ["a", "b"])],
)
def test_a_ranking_is_kept_until_its_input_the_index_the_model_or_a_constant_changes(done, monkeypatch, change, again):
    def rank():
        infer(done / "data/sample/click_seq", done / "data/work", num_workers=1)
        return stamps(done, "infer", "*.gz")

    monkeypatch.setattr(infer_module, "DECIMALS", 4)
    made = rank()
    assert rank() == made
    change(done)
    changed = rank()
    assert [name[0] for name in sorted(made) if changed[name] != made[name]] == again


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


def extra(path):
    shutil.copy(path, path.with_name("train-00009-0000000000000000.tfrecord"))
    return "train-00009-0000000000000000.tfrecord"


@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink, extra])
def test_a_shard_damaged_missing_or_extra_is_named(done, damage):
    shard = a_shard(done)
    name = damage(shard) or shard.name
    assert name in (line := one_line(load_manifest, done / "data/work")) and "run get_tfrecord.py again" in line
    run(done, "get_tfrecord")
    load_manifest(done / "data/work")


@pytest.mark.parametrize(
    ("break_it", "load", "named", "script"),
    [
        (renumber, load_manifest, "tfrecord/manifest.json", "get_tfrecord.py"),
        (renumber, load_model, "model/model.json", "train.py"),
        (lambda f: edit_json(f / "data/work/tfrecord/manifest.json", format=99), load_manifest,
         "tfrecord/manifest.json: format 99", "get_tfrecord.py"),
        (lambda f: edit_json(f / "data/work/model/model.json", format=99), load_model,
         "model/model.json: format 99", "train.py"),
        (lambda f: flip_a_bit(*(f / "data/work/model").glob("*.weights.h5")), load_model, ".weights.h5", "train.py"),
        (lambda f: flip_a_bit(*(f / "data/work/model").glob("*.memory.npz")), load_model, ".memory.npz", "train.py"),
        (lambda f: cut(f / "data/work/model/model.json"), load_model, "model/model.json: damaged", "train.py"),
        (lambda f: cut(f / "data/work/tfrecord/manifest.json"), load_manifest, "manifest.json: damaged",
         "get_tfrecord.py"),
    ],
    ids=["records of another index", "weights of another index", "future manifest", "future model", "other weights",
         "other memory", "cut model.json", "cut manifest"],
)  # fmt: skip
def test_a_mismatch_is_refused_naming_the_file_and_the_script_to_run(done, break_it, load, named, script):
    break_it(done)
    line = one_line(load, done / "data/work")
    assert named in line and f"{script} again" in line
    if load is load_model:
        assert line == one_line(infer, done / "data/sample/click_seq", done / "data/work", num_workers=1)


def test_weights_of_another_run_are_refused(done):
    weights = next((done / "data/work/model").glob("*.weights.h5"))
    saved = json.loads((done / "data/work/model/model.json").read_text())
    other = weights.with_name("0123456789abcdef.weights.h5")
    flip_a_bit(weights.rename(other))
    edit_json(done / "data/work/model/model.json", weights=saved["weights"] | {"file": other.name})
    line = one_line(load_model, done / "data/work")
    assert other.name in line and "model.json" in line and "run train.py again" in line


def test_a_user_max_len_edited_after_the_records_were_made_is_refused(done):
    edit(done, "get_tfrecord", USER_MAX_LEN=40)
    for line in one_line_of_each(["get_dataset", "train"], [done, done]).values():
        assert "tfrecord/manifest.json" in line and "USER_MAX_LEN = 50" in line and "run get_tfrecord.py again" in line


def test_mismatched_processes_end_with_one_line_and_publish_nothing(done):
    renumber(done)
    before = standing(done)
    lines = one_line_of_each(["train", "infer"], [done, done])
    assert "get_tfrecord.py again" in lines["train"] and "train.py again" in lines["infer"]
    assert standing(done) == before


# ---------------------------------------------------------------- numbers that are not finite


def test_a_loss_that_is_not_finite_keeps_the_weights_and_says_where(done):
    before = standing(done, "train")
    line = one_line(train, done / "data/work", learning_rate=1e38)
    assert re.search(r"the loss is (nan|inf) at step \d+ of epoch 1 \(learning rate 1e\+38, windows of train-0", line)
    assert standing(done, "train") == before


def test_a_score_that_is_not_finite_is_never_written(done):
    """The memory's counts are made infinite, and the model's file vouches for them."""
    work_dir, model = done / "data/work", done / "data/work/model"
    infer(done / "data/sample/click_seq", work_dir, num_workers=1)
    before = standing(done, "infer")
    replace_memory(model, lambda arrays: arrays | {"by_video.values": np.full_like(arrays["by_video.values"], np.inf)})
    assert "not finite" in one_line(infer, done / "data/sample/click_seq", work_dir, num_workers=1)
    assert standing(done, "infer") == before


def replace_memory(model, change):
    """Change a model's memory, and let model.json vouch for it."""
    path = next(model.glob("*.memory.npz"))
    with np.load(path) as saved:
        arrays = dict(saved)
    np.savez(path, **change(arrays))
    sha256 = hashlib.sha256(path.read_bytes()).hexdigest()
    edit_json(model / "model.json", memory={"file": path.name, "sha256": sha256})
