"""Kills, signals, full disks and mismatches: nothing is lost, nothing half is published, and one line says what is wrong.

The folders and the checks are those of bench/kill_battery.py, of which this is the short version.
"""

import contextlib
import errno
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
from pathlib import Path

import get_dataset
import get_tfrecord as get_tfrecord_module
import train as train_module
from get_dataset import load_manifest
from get_indexing import InputError, get_indexing
from get_tfrecord import get_tfrecord, record_constants
from infer import infer
from train import load_model, publish, say_if_clicks_changed, train

import numpy as np
import pytest
from bench.kill_battery import (
    STAGES,
    Battery,
    at_work,
    check_file,
    check_former_or_new,
    comparable,
    end,
    rankings_of,
    run,
    standing,
    start,
    wait_for,
    workers,
)
from conftest import _clicks_like_real, _raw


class BatteryHere(Battery):
    """Ranks in this process, where TensorFlow is imported already."""

    def rank(self, folder):
        ranking = self.folder / "ranked"
        paths = infer(folder / "data/sample/click_seq", folder / "data/work", ranking, num_workers=1)
        ranked = {path.name: path.read_bytes() for path in paths}
        shutil.rmtree(ranking)
        return ranked


@pytest.fixture(scope="module")
def battery(tmp_path_factory):
    return BatteryHere(tmp_path_factory.mktemp("battery") / "folders")


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
    """After each kill of train.py, infer.py gives the bytes of the model that stood, or those of the finished new one."""
    battery.survive(script, sorted(random.Random(script).random() for _ in range(3)))


@pytest.mark.parametrize(
    ("script", "sent"),
    [
        ("get_indexing", signal.SIGTERM),
        ("get_tfrecord", signal.SIGINT),
        ("train", signal.SIGINT),
        ("infer", signal.SIGTERM),
    ],
)
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
def test_a_worker_that_dies_ends_the_run_with_one_line(battery, script):
    folder = battery.ready_folder(script)
    process = start(folder, script)
    (victim, *_) = wait_for(lambda: workers(process), "no workers")
    os.kill(victim, signal.SIGKILL)
    status, _, err = end(process)
    (line,) = own_lines(script, err)
    assert status == 1 and "a worker process died, for lack of memory perhaps; run again" in line
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
        assert outputs[name] == data or name == "model/history.csv", f"{name} was touched"
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
    def work(folder):
        monkeypatch.chdir(folder)
        if script == "get_indexing":
            get_indexing()
        elif script == "get_tfrecord":
            get_tfrecord(num_workers=1)
        else:
            infer(num_workers=1)

    undisturbed = battery.ready_folder(script)
    former = standing(undisturbed, script)
    disk = Disk(monkeypatch, full_at=None)
    work(undisturbed)
    new, syncs = standing(undisturbed, script), disk.calls
    assert syncs >= 4
    for full_at in range(1, syncs + 1):
        folder = battery.ready_folder(script)
        Disk(monkeypatch, full_at)
        assert "No space left" in one_line(work, folder)
        for name, data in standing(folder, script).items():
            check_file(name, data)
            check_former_or_new(name, data, former, new)
        work(folder)
        assert comparable(standing(folder, script)) == comparable(new)
        left = [path.name for path in (folder / "data/work" / STAGES[script]).glob(".*")]
        assert not left, f"{left} are left after a disk full at write {full_at}"
        shutil.rmtree(folder)


def test_a_ranking_is_never_taken_for_that_of_other_clicks(done, monkeypatch):
    """Clicks change, the run stops at any of its writes; then the former clicks come back."""
    monkeypatch.chdir(done)
    clicks, work_dir, ranking = map(Path, ("data/sample/click_seq", "data/work", "data/work/ranking"))
    former = (clicks / "a.json").read_bytes()
    expected = infer(clicks, work_dir, ranking, num_workers=1)[0].read_bytes()
    changed = b"".join(reversed(former.splitlines(keepends=True)))
    for full_at in range(1, 100):
        (clicks / "a.json").write_bytes(changed)
        disk = Disk(monkeypatch, full_at)
        with contextlib.suppress(OSError):
            infer(clicks, work_dir, ranking, num_workers=1)
        Disk(monkeypatch, full_at=None)
        (clicks / "a.json").write_bytes(former)
        again = infer(clicks, work_dir, ranking, num_workers=1)[0].read_bytes()
        assert gzip.decompress(again) == gzip.decompress(expected), f"stopped at write {full_at}"
        if disk.calls < full_at:  # it was not stopped
            break
    assert full_at > 4  # the manifest with its syncs, the part, the ranking


@pytest.mark.parametrize("fault", ["bad lines", "full disk"])
def test_former_records_can_be_trained_on_after_a_run_that_stopped(done, monkeypatch, fault):
    monkeypatch.chdir(done)
    if fault == "bad lines":
        with open("data/sample/click_seq/a.json", "ab") as file:
            file.write(b"no JSON\n" * 50)
    else:
        _raw(done / "data/sample", users=_clicks_like_real(60, seed=52)["users"], click_file="c")
        Disk(monkeypatch, full_at=7)
    line = one_line(get_tfrecord, num_workers=1)
    assert ("lines are bad" if fault == "bad lines" else "No space left") in line
    load_manifest()


@pytest.fixture(scope="module")
def published(battery, tmp_path_factory):
    """(a folder with a standing model, publish() of another one): all but the end of a warm training of one epoch."""
    folder, calls = shutil.copytree(battery.done, tmp_path_factory.mktemp("published") / "done"), []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(train_module, "publish", lambda *args: calls.append(args))
        train(folder / "data/work", warm_epochs=1, seed=2)
    ((of_folder, *args),) = calls
    assert of_folder == folder / "data/work/model"
    return folder, lambda model: publish(model, *args)


def test_a_training_that_stops_before_it_publishes_leaves_the_former_model_ranking_to_the_byte(battery, published):
    folder, _ = published
    ranked = infer(folder / "data/sample/click_seq", folder / "data/work", folder / "ranking", num_workers=1)
    before = infer(battery.done / "data/sample/click_seq", battery.done / "data/work", folder / "before", num_workers=1)
    assert [path.read_bytes() for path in ranked] == [path.read_bytes() for path in before] and len(ranked) == 2


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
    names = {path.name for path in model.iterdir()} - {"logs", "projector", "projector_config.pbtxt"}
    assert names == {saved["weights"]["file"], saved["memory"]["file"],
                     "model.json", "metrics.json", "test.csv", "history.csv"}  # fmt: skip
    assert json.loads((model / "metrics.json").read_text())["test"] == saved["test"]


def test_what_a_run_killed_right_after_its_model_counted_left_to_do_is_done_by_the_next(
    published, tmp_path, monkeypatch
):
    folder, publish_into = published
    model = shutil.copytree(folder / "data/work", tmp_path / "work") / "model"

    def killed(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(train_module, "end_publishing", killed)
        with pytest.raises(KeyboardInterrupt):
            publish_into(model)
    former = json.loads((folder / "data/work/model/metrics.json").read_text())
    assert json.loads((model / "metrics.json").read_text()) == former
    train(tmp_path / "work", warm_epochs=1, seed=2)  # there is nothing to train, and this is left to do
    assert_published(model, json.loads((model / "model.json").read_text()))


def test_a_first_training_that_never_ended_leaves_nothing_that_ranks(done, monkeypatch):
    shutil.rmtree(done / "data/work/model")

    def stop(*_):
        raise InputError("stopped")

    monkeypatch.setattr(train_module, "finish", stop)
    monkeypatch.setattr(get_dataset, "MIN_STEPS", 2)
    assert one_line(train, done / "data/work", epochs=1, emb_dim=8) == "stopped"
    assert {path.name for path in (done / "data/work/model").iterdir()} - {"logs"} == {"checkpoint.npz", "history.csv"}
    line = one_line(infer, done / "data/sample/click_seq", done / "data/work", done / "ranking", num_workers=1)
    assert "model.json: no such file; run train.py first" in line


@pytest.mark.parametrize("part", ["weights", "memory"])
def test_a_damaged_model_ranks_nothing_and_train_begins_anew_from_nothing(done, monkeypatch, capsys, part):
    work_dir, ranking = done / "data/work", done / "ranking"
    saved = json.loads((work_dir / "model/model.json").read_text())
    flip_a_bit(work_dir / "model" / saved[part]["file"])
    line = one_line(infer, done / "data/sample/click_seq", work_dir, ranking, num_workers=1)
    assert saved[part]["file"] in line and "run train.py again" in line
    monkeypatch.setattr(get_dataset, "MIN_STEPS", 2)
    train(work_dir, epochs=1, emb_dim=8)
    said = capsys.readouterr()
    assert "training starts from nothing" in said.out and "damaged" in said.err
    assert len(infer(done / "data/sample/click_seq", work_dir, ranking, num_workers=1)) == 2


def remove_shards(folder, splits):
    for split in splits:
        for path in (folder / "data/work/tfrecord").glob(f"{split}-*"):
            path.unlink()


def test_a_damaged_shard_ends_a_look_at_the_data_with_one_line(done):
    flip_a_bit(a_shard(done))
    assert "the shards changed or were damaged while they were read" in one_line_of(done, "get_dataset")


UNDER_TRAINING = {
    "training shards gone": lambda folder: remove_shards(folder, ["train"]),
    "held-out shards gone": lambda folder: remove_shards(folder, ["val", "test"]),
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
    line = one_line(train, done / "data/work", warm_epochs=1, seed=3)
    assert "the shards changed or were damaged while they were read" in line and "run get_tfrecord.py" in line
    after = standing(done)
    for name in before.keys() - {"model/history.csv"}:
        assert name.startswith("tfrecord/") or after[name] == before[name]


def test_train_says_in_one_line_that_the_clicks_are_newer_or_others_than_the_records(done, capsys):
    def said():
        say_if_clicks_changed(done / "data/work", done / "data/sample")
        return capsys.readouterr().err.splitlines()

    clicks, manifest = done / "data/sample/click_seq", done / "data/work/tfrecord/manifest.json"
    for path in clicks.iterdir():
        os.utime(path, (1e9, 1e9))
    assert said() == []
    os.utime(clicks / "a.json", (manifest.stat().st_mtime + 9,) * 2)
    (line,) = said()
    assert "the clicks changed since the records were made (a.json); run get_tfrecord.py first" in line
    (clicks / "a.json").unlink()
    (line,) = said()
    assert "other files" in line and "run get_tfrecord.py first" in line
    shutil.rmtree(clicks)
    assert said() == []


# ---------------------------------------------------------------- what is kept and what is made again


def stamps(folder, script, pattern):
    return {path.name: path.stat().st_mtime_ns for path in (folder / "data/work" / STAGES[script]).glob(pattern)}


def test_finished_shards_are_kept_until_a_constant_their_input_or_the_index_changes(done, monkeypatch):
    """a.json is cut in two tasks; b.json.gz is a task by itself."""

    def records(**constants):
        get_tfrecord(num_workers=1, **constants)
        return stamps(done, "get_tfrecord", "*.tfrecord")

    monkeypatch.chdir(done)
    monkeypatch.setattr(get_tfrecord_module, "RANGE_BYTES", 16_000)
    made = stamps(done, "get_tfrecord", "*.tfrecord")
    assert records() == made
    edited = records(window_overlap=17)
    assert len(edited) == len(made) == 9 and not edited.keys() & made.keys()

    before = records()
    _raw(done / "data/sample", users=_clicks_like_real(60, seed=52)["users"], click_file="b", gzip=True)
    changed = records()
    kept = {name for name, stamp in changed.items() if before.get(name) == stamp}
    assert kept == {name for name in before if "-00002-" not in name}
    index = done / "data/work/indexing/vid2idx.json"
    videos = json.loads(index.read_text())
    index.write_text(json.dumps(videos | {"grown": 2 + len(videos)}))
    assert not records().keys() & changed.keys()


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


@pytest.mark.parametrize("damage", [cut, Path.unlink])
def test_a_shard_cut_or_missing_is_named(done, damage):
    damage(shard := a_shard(done))
    line = one_line(load_manifest, done / "data/work")
    assert shard.name in line and "run get_tfrecord.py again" in line


@pytest.mark.parametrize("damage", [flip_a_bit, cut, Path.unlink])
def test_a_damaged_shard_is_made_again(done, monkeypatch, damage):
    monkeypatch.chdir(done)
    monkeypatch.setattr(get_tfrecord_module, "RANGE_BYTES", 16_000)
    before = standing(done, "get_tfrecord")
    damage(a_shard(done))
    assert standing(done, "get_tfrecord") != before
    get_tfrecord(num_workers=1)
    assert standing(done, "get_tfrecord") == before


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
    ],
    ids=["records of another index", "weights of another index", "future manifest", "future model", "other weights",
         "other memory", "cut model.json", "cut manifest"],
)  # fmt: skip
def test_a_mismatch_is_refused_naming_the_file_and_the_script_to_run(done, break_it, load, named, script):
    break_it(done)
    line = one_line(load, done / "data/work")
    assert named in line and f"{script} again" in line
    if load is load_model:
        other = done / "ranking"
        assert line == one_line(infer, done / "data/sample/click_seq", done / "data/work", other, num_workers=1)


def test_weights_of_another_run_are_refused(done):
    weights = next((done / "data/work/model").glob("*.weights.h5"))
    saved = json.loads((done / "data/work/model/model.json").read_text())
    other = weights.with_name("0123456789abcdef.weights.h5")
    flip_a_bit(weights.rename(other))
    edit_json(done / "data/work/model/model.json", weights=saved["weights"] | {"file": other.name})
    line = one_line(load_model, done / "data/work")
    assert other.name in line and "model.json" in line and "run train.py again" in line


def test_a_constant_of_the_records_edited_after_they_were_made_is_refused_naming_it_and_both_values(done):
    for load in (load_manifest, train):
        line = one_line(load, done / "data/work", record_constants(user_max_len=40))
        assert "tfrecord/manifest.json: made with USER_MAX_LEN = 50, now it is 40; run get_tfrecord.py again" in line


def test_mismatched_processes_end_with_one_line_and_publish_nothing(done):
    renumber(done)
    before = standing(done)
    lines = one_line_of_each(["train", "infer"], [done, done])
    assert "get_tfrecord.py again" in lines["train"] and "train.py again" in lines["infer"]
    after, notes = standing(done), "ranking/manifest.jsonl"
    assert set(after.pop(notes).splitlines()) <= set(before.pop(notes).splitlines())
    assert after == before


# ---------------------------------------------------------------- numbers that are not finite


def test_a_loss_that_is_not_finite_keeps_the_model_and_says_where(done):
    before = standing(done, "train")
    line = one_line(train, done / "data/work", learning_rate=1e38, warm_start=False)
    assert re.search(r"the loss is (nan|inf) at step \d+ of epoch 1 \(learning rate 1e\+38\)", line)
    assert standing(done, "train") == before


@pytest.mark.filterwarnings("ignore:invalid value encountered")
def test_a_score_that_is_not_finite_is_never_written(done, monkeypatch):
    """The memory's counts are made infinite, and the model's file vouches for them."""
    monkeypatch.chdir(done)
    clicks, work_dir, ranking = map(Path, ("data/sample/click_seq", "data/work", "data/work/ranking"))
    infer(clicks, work_dir, ranking, num_workers=1)
    before = rankings_of(standing(done, "infer"))
    path = next((work_dir / "model").glob("*.memory.npz"))
    with np.load(path) as saved:
        arrays = dict(saved)
    np.savez(path, **arrays | {"by_video.values": np.full_like(arrays["by_video.values"], np.inf)})
    memory = {"file": path.name, "sha256": hashlib.sha256(path.read_bytes()).hexdigest()}
    edit_json(work_dir / "model/model.json", memory=memory, id="another")
    edit_mix(work_dir / "model/model.json", memory_weight=0.5)
    assert "not finite" in one_line(infer, clicks, work_dir, ranking, num_workers=1)
    assert rankings_of(standing(done, "infer")) == before


def edit_mix(path, **changes):
    edit_json(path, mix=json.loads(path.read_text())["mix"] | changes)
