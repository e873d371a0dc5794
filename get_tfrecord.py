"""Cut each user's clicks into windows and write them as TFRecord shards, split by user.

Reads   DATA_DIR/click_seq/*.json[.gz]   {"uid": "u1", "click_seq": ["v1", "v2_c7"]}, oldest click first
        WORK_DIR/indexing/
Writes  WORK_DIR/tfrecord/{train,val,test}-*.tfrecord   one tf.train.SequenceExample per window
        WORK_DIR/tfrecord/part-*.json                   what is in the shards of one byte range of the input
        WORK_DIR/tfrecord/manifest.json                 last: what all shards hold and what they were made from

    python get_tfrecord.py

A window is one record with its clicks stored once; every column click in it that has a history is a training target.
"""

import collections
import contextlib
import functools
import hashlib
import shutil
from pathlib import Path

import numpy as np

from get_indexing import (
    DATA_DIR,
    UNKNOWN,
    WORK_DIR,
    InputError,
    Tally,
    constants,
    file_fingerprint,
    file_ranges,
    find_files,
    fingerprint,
    load_index,
    map_files,
    parse_clicks,
    read_json,
    read_records,
    remove_leftovers,
    replacing,
    run_script,
    split_click,
    write_json,
)

USER_MAX_LEN = 50  # clicks in a window, and the most that the user tower reads
WINDOW_OVERLAP = 16  # clicks that a window repeats from the one before it: the history of its first target
MIN_HISTORY = 1  # clicks that a target must have before it
VAL_RATIO = 0.05  # of the users
TEST_RATIO = 0.05  # of the users
SPLITS = ("train", "val", "test")
FORMAT = 1  # of records and manifest
NEW = ".new"  # folder of the shards of a run under way, so that the former ones stay as they are


def get_tfrecord(data_dir=DATA_DIR, work_dir=WORK_DIR, user_max_len=USER_MAX_LEN, window_overlap=WINDOW_OVERLAP,
                 min_history=MIN_HISTORY, val_ratio=VAL_RATIO, test_ratio=TEST_RATIO, **how):  # fmt: skip
    """Write the shards and their manifest, which is returned; shards that still stand for their input are kept."""
    settings = dict(USER_MAX_LEN=user_max_len, WINDOW_OVERLAP=window_overlap, MIN_HISTORY=min_history,
                     VAL_RATIO=val_ratio, TEST_RATIO=test_ratio)  # fmt: skip
    if not 1 <= min_history <= window_overlap < user_max_len:
        raise InputError(f"1 <= MIN_HISTORY <= WINDOW_OVERLAP < USER_MAX_LEN must hold, not {settings}")
    work_dir = Path(work_dir).absolute()
    index, folder = load_index(work_dir), work_dir / "tfrecord"
    made_with = fingerprint(constants("get_indexing", "get_tfrecord"), settings, index.fingerprint())
    paths = find_files(Path(data_dir, "click_seq"))
    ranges, inputs = file_ranges(paths), {path: file_fingerprint(path) for path in paths}
    names = [
        f"{number:05}-{fingerprint(made_with, inputs[where.path], where[1:])[:16]}"
        for number, where in enumerate(ranges)
    ]
    tasks = [(where, name, folder, work_dir, settings, made_with) for where, name in zip(ranges, names, strict=True)]
    (folder / NEW).mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder / NEW)
    tallies, parts = {}, []
    for where, part in zip(ranges, map_files(write_shards, tasks, desc="write records", **how), strict=True):
        parts.append(part)
        tallies.setdefault(where.path, Tally(where.path)).append(Tally(where.path, **part["tally"]))
    for tally in tallies.values():
        tally.check()
    manifest = {"format": FORMAT, "index": index.fingerprint(), "constants": settings, **summarize(parts)}
    check_enough(manifest, settings)
    remove_leftovers(folder / NEW)  # of a task that was tried twice
    for path in (folder / NEW).iterdir():
        path.rename(folder / path.name)
    write_json(folder / "manifest.json", manifest)
    shutil.rmtree(folder / NEW)
    current = {"manifest.json", *manifest["shards"], *(part["file"] for part in parts)}
    for path in folder.iterdir():  # shards of former input, and what a killed run left
        if path.name not in current:
            path.unlink()
    print_report(manifest)
    return manifest


def write_shards(task):
    """Write the shards of one FileRange, then their part file, and return what it says; what stands is kept."""
    where, name, folder, work_dir, settings, made_with = task
    files = [f"part-{name}.json", *(f"{split}-{name}.tfrecord" for split in SPLITS)]
    for place in (folder, folder / NEW):
        part_file, *shards = (place / file for file in files)
        if part_file.exists():
            part = read_json(part_file, "get_tfrecord.py")
            if all(
                shard.exists() and file_fingerprint(shard) == part["shards"][shard.name]["sha256"] for shard in shards
            ):
                return part
    from tensorflow.errors import OpError

    try:
        part = write_windows(where, dict(zip(SPLITS, shards, strict=True)), load_encoder(work_dir, made_with), settings)
    except OpError as error:  # TensorFlow's own, of a full disk say
        raise OSError(f"{folder}: {error.message}") from None
    part["file"] = part_file.name
    part["shards"] = {path.name: {"bytes": path.stat().st_size, "sha256": file_fingerprint(path)} for path in shards}
    write_json(part_file, part)
    return part


def write_windows(where, shards, encoder, settings):
    """Write the windows of one FileRange into shards {split: path}; return the counts for its part file."""
    from tensorflow.io import TFRecordWriter

    tally, lengths, serialize = Tally(where.path), collections.Counter(), window_serializer()
    report = dict(clicks=0, unknown_videos=0, column_clicks=0)
    splits = {s: {"users": 0, "targets": 0, "windows": [0] * (settings["USER_MAX_LEN"] + 1)} for s in SPLITS}
    with contextlib.ExitStack() as stack:
        writers = {}
        for split, path in shards.items():
            temporary = stack.enter_context(replacing(path))
            writers[split] = stack.enter_context(TFRecordWriter(str(temporary)))
        for uid, clicks in read_records(tally, parse_clicks, *where[1:]):
            videos, columns = encoder.encode(clicks)
            split = split_of(uid, settings["VAL_RATIO"], settings["TEST_RATIO"])
            counts = splits[split]
            for window in cut_windows(uid, videos, columns, settings):
                writers[split].write(serialize(window))
                counts["windows"][len(window["label"])] += 1
                counts["targets"] += window["label"].count(1.0)
            counts["users"] += 1
            lengths[len(clicks)] += 1
            report["clicks"] += len(clicks)
            report["unknown_videos"] += videos.count(UNKNOWN)
            report["column_clicks"] += len(columns) - columns.count(0)
    counted = {"lines": tally.lines, "skipped": tally.skipped, "first": tally.first}
    return {"tally": counted, "report": report, "lengths": sorted(lengths.items()), "splits": splits}


@functools.lru_cache(maxsize=1)
def load_encoder(work_dir, made_with):
    """Return the ClickEncoder of work_dir's index, once for a process and an index, which made_with tells apart."""
    return ClickEncoder(load_index(work_dir))


class ClickEncoder:
    """Raw clicks -> model input: the one way in, for training and for serving."""

    def __init__(self, index):
        self.videos = index.videos
        self.columns = {cid: number for number, cid in enumerate(index.columns, start=1)}

    def encode(self, clicks):
        """[click, ...] -> (video numbers, column numbers), lists of the same length; a column is 0 for none."""
        videos, columns = list(map(self.videos.get, clicks)), [0] * len(clicks)
        for place, video in enumerate(videos):
            if video is None:
                vid, cid = split_click(clicks[place], self.videos, self.columns)
                videos[place], columns[place] = self.videos.get(vid, UNKNOWN), self.columns.get(cid, 0)
        return videos, columns


def split_of(uid, val_ratio=VAL_RATIO, test_ratio=TEST_RATIO):
    """Return "train", "val" or "test": always the same for the same uid, whatever other users there are."""
    draw = int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "big") / 2**64
    return "val" if draw < val_ratio else "test" if draw < val_ratio + test_ratio else "train"


def cut_windows(uid, videos, columns, settings):
    """Yield a user's windows as {"uid", "start", "user_feature" [n], "user_column" [n], "label" [n]}, lists of numbers.

    label is 1.0 where the next click of the window is a target: made in a column, with at least MIN_HISTORY clicks
    before it, and not a target of the window before. `start` is the window's place in the history.
    """
    max_len, overlap = settings["USER_MAX_LEN"], settings["WINDOW_OVERLAP"]
    clicked = [1.0 if column else 0.0 for column in columns]
    for start in range(0, max(len(videos) - overlap, 1), max_len - overlap):
        end, first = min(start + max_len, len(videos)), overlap if start else settings["MIN_HISTORY"]
        label = [0.0] * (first - 1) + clicked[start + first : end] + [0.0]
        if end - start > 1:
            yield {"uid": uid, "start": start, "user_feature": videos[start:end], "user_column": columns[start:end],
                   "label": label[: end - start]}  # fmt: skip


def window_serializer():
    """Return serialize(window) -> bytes of a tf.train.SequenceExample, each list packed into one Feature.

    It fills the same message each time, which takes half the time of making one.
    """
    from tensorflow.train import SequenceExample

    example = SequenceExample()
    context, lists = example.context.feature, example.feature_lists.feature_list
    uid, start = context["uid"].bytes_list.value, context["start"].int64_list.value
    values = {
        "user_feature": lists["user_feature"].feature.add().int64_list.value,
        "user_column": lists["user_column"].feature.add().int64_list.value,
        "label": lists["label"].feature.add().float_list.value,
    }

    def serialize(window):
        uid[:], start[:] = [window["uid"].encode()], [window["start"]]
        for name, value in values.items():
            value[:] = window[name]
        return example.SerializeToString(deterministic=True)

    return serialize


def summarize(parts):
    """Add up the parts: {"shards", "splits", "report"} of the manifest."""
    splits, shards, report, lengths, skipped = (
        {},
        {},
        collections.Counter(),
        collections.Counter(),
        collections.Counter(),
    )
    for part in parts:
        shards |= part["shards"]
        report.update(lines=part["tally"]["lines"], **part["report"])
        skipped.update(part["tally"]["skipped"])
        lengths.update(dict(part["lengths"]))
        for split, counts in part["splits"].items():
            splits.setdefault(split, []).append(counts)
    for split, counts in splits.items():
        splits[split] = {key: np.sum([c[key] for c in counts], axis=0).tolist() for key in counts[0]}
    history = np.repeat(*np.array(sorted(lengths.items()), int).reshape(-1, 2).T) if lengths else np.zeros(1, int)
    at = {"p50": 50, "p90": 90, "max": 100}
    report["targets"] = sum(split["targets"] for split in splits.values())
    return {
        "shards": shards,
        "splits": splits,
        "report": {
            **report,
            "skipped": skipped,
            "history": {name: int(np.percentile(history, q, method="lower")) for name, q in at.items()},
        },
    }


def check_enough(manifest, settings):
    """Refuse records that cannot train: no click in any column, or no target for validation or test."""
    if not manifest["report"]["column_clicks"]:
        raise InputError(
            "no click was made in a known column; clicks look like <vid>_<cid>, with the cids of cid2vids*.json"
        )
    users = sum(counts["users"] for counts in manifest["splits"].values())
    smallest = min(settings["VAL_RATIO"], settings["TEST_RATIO"], 1 - settings["VAL_RATIO"] - settings["TEST_RATIO"])
    if smallest <= 0:
        raise InputError(f"VAL_RATIO and TEST_RATIO must be positive and leave users for training, not {settings}")
    for split, counts in manifest["splits"].items():
        if not counts["targets"]:
            enough = int(np.ceil(np.log(0.01) / np.log1p(-smallest)))
            raise InputError(f"none of {users:,} users leaves a target for {split}; about {enough:,} users are needed")


def print_report(manifest):
    """Print the data report: what was read, skipped and kept."""
    report, history = manifest["report"], manifest["report"]["history"]
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in report["skipped"].items()) or "none"
    print(f"{report['lines']:,} lines (skipped: {skipped}), {report['clicks']:,} clicks, "
          f"{report['unknown_videos']:,} of unknown videos, {report['column_clicks']:,} in columns; "
          f"history p50 {history['p50']}, p90 {history['p90']}, max {history['max']}")  # fmt: skip
    for split, counts in manifest["splits"].items():
        print(
            f"{split}: {counts['users']:,} users -> {counts['targets']:,} targets in {sum(counts['windows']):,} windows"
        )


def main():
    get_tfrecord()


if __name__ == "__main__":
    run_script(main)
