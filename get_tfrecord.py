"""Cut each user's clicks into windows, hold out the last column click of some users, and write all as TFRecord shards.

Reads   DATA_DIR/click_seq/*   {"uid": "u1", "click_seq": ["v1", "v2_c7"]}, a line a user, oldest click first
        WORK_DIR/indexing/
Writes  WORK_DIR/tfrecord/{train,val,test}-*.tfrecord   one tf.train.SequenceExample for each window
        WORK_DIR/tfrecord/part-*.json                   what is in the shards of one task
        WORK_DIR/tfrecord/manifest.json                 last: what all shards hold and what they were made from

    python get_tfrecord.py

A window is one record with its clicks stored once; every column click in it that has a history is a training target.
What is held out is what is served: of some users the last click in a current column, after everything that they did before.
"""

import collections
import contextlib
import functools
import hashlib
import heapq
import itertools
import math
import sys
from pathlib import Path

from get_indexing import (
    DATA_DIR, LIMITS, NUM_WORKERS, RANGE_BYTES, UNKNOWN, WORK_DIR,
    InputError, Tallies, Tally, cut_files, file_fingerprint, find_files, fingerprint, load_index, map_files,
    only_one, read_clicks, read_json, remove_leftovers, replacing, run_script, split_click, write_json,
)  # fmt: skip

USER_MAX_LEN = 50  # clicks in a window, and the most that the user tower reads
WINDOW_OVERLAP = 16  # clicks that a window repeats from the one before it: the history of its first target
MIN_HISTORY = 1  # clicks that a target must have before it
HELD_OUT_USERS = 3000  # for validation, and as many for the test; of fewer users half each
SKETCH_SIZE = 4096  # users by whom it is estimated how many there are
SPLITS = ("train", "val", "test")
FORMAT = 3  # of records and manifest
MADE_WITH = ("format", "index", "current_columns", "constants", "limits", "held_out_share", "input")  # in the manifest

rules = {
    "a whole number in [2, inf)": ("USER_MAX_LEN", "SKETCH_SIZE"),
    "a whole number in [1, inf)": ("WINDOW_OVERLAP", "MIN_HISTORY", "HELD_OUT_USERS"),
}


def get_tfrecord(data_dir=DATA_DIR, work_dir=WORK_DIR, num_workers=NUM_WORKERS, **constants):
    """Write the shards and their manifest, which is returned; shards that still stand for their input are kept.

    constants are those of record_constants().
    """
    settings, index, folder = record_constants(**constants), load_index(work_dir), Path(work_dir, "tfrecord").absolute()
    files = find_files(Path(data_dir, "click_seq"))
    tallies, sketch = survey(cut_files(files, RANGE_BYTES), num_workers)
    made_with = {
        "format": FORMAT,
        "index": index.fingerprint(),
        "current_columns": fingerprint([cid for cid, videos in index.columns.items() if videos]),  # these are held out
        "constants": settings,
        "limits": LIMITS,
        "held_out_share": min(settings["HELD_OUT_USERS"] / max(count_users(sketch), 1), 0.5),
        "input": tallies.digests(),
    }
    range_bytes = standing_range_bytes(folder, made_with)
    tasks = cut_files(files, range_bytes)
    of_parts = write_records(tasks, folder, index, made_with, num_workers)
    of_parts["report"] = tally_report(tallies, sketch) | of_parts["report"]
    manifest = made_with | {"range_bytes": range_bytes} | of_parts
    check_enough(manifest)
    # Where it says the same it is written all the same: it is as new then as the clicks that it was compared with.
    write_json(folder / "manifest.json", manifest)
    remove_others(folder, manifest["shards"])
    print_report(manifest)
    hint_at_ids(manifest["report"], tasks, index)
    return manifest


def record_constants(user_max_len=USER_MAX_LEN, window_overlap=WINDOW_OVERLAP, min_history=MIN_HISTORY,
                     held_out_users=HELD_OUT_USERS):  # fmt: skip
    """Return the constants that shape the records, by name; values that contradict each other raise InputError."""
    settings = dict(USER_MAX_LEN=user_max_len, WINDOW_OVERLAP=window_overlap, MIN_HISTORY=min_history,
                    HELD_OUT_USERS=held_out_users)  # fmt: skip
    if not 1 <= min_history <= window_overlap < user_max_len or held_out_users < 1:
        raise InputError(
            f"1 <= MIN_HISTORY <= WINDOW_OVERLAP < USER_MAX_LEN and 1 <= HELD_OUT_USERS must hold, not {settings}"
        )
    return settings


def standing_range_bytes(folder, made_with):
    """Return how the records that stand were cut, if they were made with the same, so that they stay; else RANGE_BYTES."""
    with contextlib.suppress(InputError, FileNotFoundError):
        former = read_json(folder / "manifest.json", "get_tfrecord.py")
        if made_with.items() <= former.items():
            return former.get("range_bytes", RANGE_BYTES)
    return RANGE_BYTES


# ---------------------------------------------------------------- the first pass: how many users, which bytes


def survey(tasks, num_workers=None):
    """Return (Tallies, sketch of the users) of the click files; too many bad lines are refused."""
    tallies, sketch = Tallies(), collections.Counter()
    with map_files(survey_ranges, tasks, "read clicks", num_workers) as results:
        for of_ranges, some_users in results:
            tallies.extend(of_ranges)
            sketch = lowest_draws(sketch + some_users)
    tallies.check()
    return tallies, sketch


def survey_ranges(ranges):
    """Return ([Tally, ...], sketch of the users) of FileRanges."""
    tallies, sketch = [], collections.Counter()
    for uid, _ in read_clicks(ranges, tallies):
        sketch[draw_of(uid)] += 1
        if len(sketch) > 2 * SKETCH_SIZE:
            sketch = lowest_draws(sketch)
    return tallies, lowest_draws(sketch)


def lowest_draws(sketch):
    """Return a sketch of users, {draw: lines of that user}, cut to its lowest draws: one more than SKETCH_SIZE."""
    return collections.Counter({draw: sketch[draw] for draw in heapq.nsmallest(SKETCH_SIZE + 1, sketch)})


def count_users(sketch):
    """Return about how many users there are; exactly, up to SKETCH_SIZE. As users come it never falls.

    The k-th lowest of n even draws from [0, 1) is about k / n (Bar-Yossef et al. 2002), however often each is seen.
    """
    if len(sketch) <= SKETCH_SIZE:
        return len(sketch)
    return max(SKETCH_SIZE, (SKETCH_SIZE - 1) / sorted(sketch)[SKETCH_SIZE - 1])


def draw_of(uid):
    """Return a number in [0, 1), always the same for the same user, whatever other users there are."""
    return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "big") / 2**64


# ---------------------------------------------------------------- the second pass: windows


def write_records(tasks, folder, index, made_with, num_workers=None):
    """Write the shards of all tasks; return {"shards", "splits", "report"} of them. Other clicks than surveyed are refused."""
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    write = functools.partial(write_shards, folder=folder, index=index, made_with=made_with)
    with map_files(write, list(enumerate(tasks)), "write records", num_workers) as parts:
        of_parts, tallies = add_parts(parts)
    if tallies.digests() != made_with["input"]:
        for name in parts_of(of_parts["shards"]):  # so they are written anew
            (folder / name).unlink(missing_ok=True)
        raise InputError("the clicks were changed while they were read; run get_tfrecord.py again")
    return of_parts


def write_shards(numbered, folder, index, made_with):
    """Write the shards of one task, (number, FileRanges), then their part file, and return what it says.

    What stands is kept. Shards that no manifest lists yet are no one's, so they may stand beside the former ones.
    """
    number, ranges = numbered
    of_all = {name: value for name, value in made_with.items() if name != "input"}
    of_files = [(Path(path).name, made_with["input"][Path(path).name], *cut) for path, *cut in ranges]
    name = f"{number:05}-{fingerprint(of_all, of_files)[:16]}"
    part_file, shards = folder / f"part-{name}.json", {split: folder / f"{split}-{name}.tfrecord" for split in SPLITS}
    with contextlib.suppress(FileNotFoundError, InputError, KeyError):  # gone or damaged: it is made again
        part = read_json(part_file, "get_tfrecord.py")
        if all(file_fingerprint(path) == part["shards"][path.name]["sha256"] for path in shards.values()):
            return part
    from tensorflow.errors import OpError

    try:
        part = write_windows(ranges, shards, ClickEncoder(index), made_with)
    except OpError as error:  # TensorFlow's own, of a full disk say
        raise OSError(f"{folder}: {error.message}") from None
    part["shards"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_fingerprint(path)} for path in shards.values()
    }
    write_json(part_file, part)
    return part


def write_windows(ranges, shards, encoder, made_with):
    """Write the windows of FileRanges into shards {split: path}; return the counts for their part file."""
    from tensorflow.io import TFRecordWriter

    settings, share = made_with["constants"], made_with["held_out_share"]
    splits = {split: empty_counts(split, settings["USER_MAX_LEN"]) for split in SPLITS}
    report, lengths = collections.Counter(clicks=0, unknown_videos=0, column_clicks=0), collections.Counter()
    serialize, tallies = window_serializer(), []
    with contextlib.ExitStack() as stack:  # the writers close first, then the shards take their names
        temporary = {split: stack.enter_context(replacing(path)) for split, path in shards.items()}
        writers = {split: stack.enter_context(TFRecordWriter(str(path))) for split, path in temporary.items()}
        for uid, clicks in read_clicks(ranges, tallies):
            videos, columns = encoder.encode(clicks)
            lengths[len(clicks)] += 1
            report["clicks"] += len(clicks)
            report["unknown_videos"] += videos.count(UNKNOWN)
            report["column_clicks"] += len(columns) - columns.count(0)
            for split, windows in split_windows(uid, videos, columns, encoder.current, share, settings).items():
                splits[split]["users"] += bool(windows)
                for window in windows:
                    splits[split]["targets"] += window["label"].count(1.0)
                    splits[split]["windows"][len(window["label"])] += 1
                    writers[split].write(serialize(window))
    report["unknown_columns"] = encoder.unknown_columns
    read = [(Path(tally.path).name, tally.digest) for tally in tallies]
    return {"report": report, "lengths": sorted(lengths.items()), "splits": splits, "read": read}


def empty_counts(split, max_len):
    """Return a split's counts of users, of targets, and of windows by their length, a list; held-out ones are longer."""
    return {"users": 0, "targets": 0, "windows": [0] * ((max_len if split == "train" else 2 * max_len) + 1)}


class ClickEncoder:
    """Raw clicks -> model input: the one way in, for training and for serving."""

    def __init__(self, index):
        self.videos = index.videos
        self.columns = {cid: number for number, cid in enumerate(index.columns, start=1)}
        self.current = {number for number, videos in enumerate(index.columns.values(), start=1) if videos}
        self.unknown_columns = 0  # clicks on known videos in columns that no index knew, so far

    def encode(self, clicks):
        """[click, ...] -> (video numbers, column numbers), lists of the same length; a column is 0 for none."""
        videos, columns = list(map(self.videos.get, clicks)), [0] * len(clicks)
        for place, video in enumerate(videos):
            if video is None:
                vid, cid = split_click(clicks[place], self.videos, self.columns)
                videos[place], columns[place] = self.videos.get(vid, UNKNOWN), self.columns.get(cid, 0)
                self.unknown_columns += cid is None and vid != clicks[place]
        return videos, columns


def split_windows(uid, videos, columns, current, share, settings):
    """Return {split: [window, ...]} of one user; of a held-out user, also what "val" or "test" holds of them.

    Validation takes the lowest draws and the test the highest. As the share falls, users only leave either: nobody
    ever enters who was trained on before. A target was clicked in a column and has MIN_HISTORY clicks before it, at least.
    Of a held-out record there is one, after what a user tower reads; the clicks after it are there to be counted.
    """
    draw, first, place = draw_of(uid), settings["MIN_HISTORY"], None
    split = "val" if draw < share else "test" if draw >= 1 - share else "train"
    if split != "train":
        places = range(len(columns) - 1, first - 1, -1)
        place = next((place for place in places if columns[place] in current), None)
    targets = [float(at >= first and column > 0) for at, column in enumerate(columns[:place])]
    windows = {"train": list(cut_windows(uid, videos[:place], columns[:place], targets, settings))}
    if place is not None:
        targets, start = [float(at == place) for at in range(len(columns))], max(place - settings["USER_MAX_LEN"], 0)
        windows[split] = list(cut_windows(uid, videos, columns, targets, settings, start, place - start))
    return windows


def cut_windows(uid, videos, columns, targets, settings, start=0, repeated=0):
    """Yield a user's windows as {"uid", "start", "repeated", "user_feature" [n], "user_column" [n], "label" [n]}.

    `start` is the window's place in the history, `repeated` how many of its first clicks are not new: those given, for
    the first one; those of the window before, for others. label is 1.0 where the next click is new and, by targets
    [clicks], a target.
    """
    max_len, overlap = settings["USER_MAX_LEN"], settings["WINDOW_OVERLAP"]
    end = start + repeated + max_len
    while start + repeated < len(videos):
        targets_of_clicks = [0.0] * repeated + targets[start + repeated : end]
        yield dict(uid=uid, start=start, repeated=repeated, user_feature=videos[start:end],
                   user_column=columns[start:end], label=[*targets_of_clicks[1:], 0.0])  # fmt: skip
        start, repeated, end = end - overlap, overlap, end - overlap + max_len


def window_serializer():
    """Return serialize(window) -> bytes of a tf.train.SequenceExample, each list packed into one Feature.

    It fills the same message each time, which takes half the time of making one.
    """
    from tensorflow.train import SequenceExample

    example = SequenceExample()
    context, lists = example.context.feature, example.feature_lists.feature_list
    uid = context["uid"].bytes_list.value
    start, repeated = (context[name].int64_list.value for name in ("start", "repeated"))
    values = {
        "user_feature": lists["user_feature"].feature.add().int64_list.value,
        "user_column": lists["user_column"].feature.add().int64_list.value,
        "label": lists["label"].feature.add().float_list.value,
    }

    def serialize(window):
        uid[:], start[:], repeated[:] = [window["uid"].encode()], [window["start"]], [window["repeated"]]
        for name, value in values.items():
            value[:] = window[name]
        return example.SerializeToString(deterministic=True)

    return serialize


# ---------------------------------------------------------------- the manifest


def add_parts(parts):
    """Add up what the part files say: ({"shards", "splits", "report"} of the manifest, Tallies of what was read)."""
    shards, splits, report, lengths, tallies = {}, {}, collections.Counter(), collections.Counter(), Tallies()
    for part in parts:
        tallies.extend(Tally(path, digest) for path, digest in part["read"])
        shards |= part["shards"]
        report.update(part["report"])
        lengths.update(dict(part["lengths"]))
        for split, counts in part["splits"].items():
            total = splits.setdefault(split, {"users": 0, "targets": 0, "windows": [0] * len(counts["windows"])})
            total["users"] += counts["users"]
            total["targets"] += counts["targets"]
            total["windows"] = list(map(sum, zip(total["windows"], counts["windows"], strict=True)))
    report["targets"] = sum(split["targets"] for split in splits.values())
    history = {"p50": quantile(lengths, 0.5), "p90": quantile(lengths, 0.9), "max": max(lengths, default=0)}
    return {"shards": shards, "splits": splits, "report": {**report, "history": history}}, tallies


def quantile(counts, share):
    """Return the lowest value of a Counter that at least that share of what it counts does not exceed."""
    rank, seen = share * (counts.total() - 1), 0
    for value in sorted(counts):
        seen += counts[value]
        if seen > rank:
            return value
    return 0


def tally_report(tallies, sketch):
    """Return what the first pass says for the report."""
    skipped = sum((tally.skipped for tally in tallies.values()), collections.Counter())
    return {
        "lines": sum(tally.lines for tally in tallies.values()),
        "skipped": skipped,
        "users": round(count_users(sketch)),
        "on_several_lines": sum(lines > 1 for lines in sketch.values()) / max(len(sketch), 1),
    }


def check_enough(manifest):
    """Refuse records that cannot train: no click in any column, or no target for training, validation or the test."""
    report, share = manifest["report"], manifest["held_out_share"]
    if report["history"]["max"] == 1:
        raise InputError("every history is of one click; write one line for each user: all their clicks, oldest first")
    if not report["column_clicks"]:
        raise InputError(
            "no click was made in a known column; clicks look like <vid>_<cid>, the cid as in cid2vids*.json"
        )
    users = f"{report['users']:,} users"
    lacking = [split for split, counts in manifest["splits"].items() if not counts["targets"]]
    if "train" in lacking:
        raise InputError(f"the column clicks of {users} are all held out; more users or longer histories are needed")
    if lacking:
        enough = f"about {math.ceil(math.log(0.01) / math.log1p(-share)):,} users"
        needed = f"{enough} are needed who clicked in a current column after other clicks"
        raise InputError(f"none of {users} leaves a target for {lacking[0]}; {needed}")


def remove_others(folder, shards):
    """Remove the shards and part files of former input, and those that a killed run left: files of these names alone."""
    current = shards.keys() | parts_of(shards)
    for kind in ("part-{}.json", *(f"{split}-{{}}.tfrecord" for split in SPLITS)):
        remove_leftovers(folder, kind.format(f"[0-9]*-{'[0-9a-f]' * 16}"), current)


def parts_of(shards):
    """Return the names of the part files of shards."""
    return {f"part-{shard.partition('-')[2].removesuffix('.tfrecord')}.json" for shard in shards}


def print_report(manifest):
    """Print the data report: what was read, skipped and kept."""
    report, history = manifest["report"], manifest["report"]["history"]
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in report["skipped"].items()) or "none"
    print(f"{report['lines']:,} lines (skipped: {skipped}), {report['clicks']:,} clicks, "
          f"{report['unknown_videos']:,} of unknown videos, {report['column_clicks']:,} in columns, "
          f"{report['unknown_columns']:,} in unknown columns; "
          f"history p50 {history['p50']}, p90 {history['p90']}, max {history['max']}")  # fmt: skip
    for split, counts in manifest["splits"].items():
        windows = sum(counts["windows"])
        print(f"{split}: {counts['users']:,} users -> {counts['targets']:,} targets in {windows:,} windows")
    if report["on_several_lines"]:
        lines = report["lines"] - sum(report["skipped"].values())
        print(
            f"about {report['users']:,} users are on {lines:,} lines, {report['on_several_lines']:.1%} of them on several: "
            "each line is trained on and ranked by itself; put all clicks of a user on one line",
            file=sys.stderr,
        )


def hint_at_ids(report, tasks, index):
    """Print an unknown id and a known one where most clicks are of unknown videos: ids of another type, perhaps."""
    if report["unknown_videos"] <= report["clicks"] / 2:
        return
    users = read_clicks(itertools.chain.from_iterable(tasks), [])
    vids = (split_click(click, index.videos, index.columns)[0] for _, clicks in users for click in clicks)
    unknown, known = next((vid for vid in vids if vid not in index.videos), ""), next(iter(index.videos))
    share = report["unknown_videos"] / report["clicks"]
    print(
        f"{share:.0%} of the clicks are of videos on no shelf and in no catalogue, {unknown[:80]!r} for one, where ids look "
        f"like {known[:80]!r}; write the ids alike in all raw data and run get_indexing.py and get_tfrecord.py again",
        file=sys.stderr,
    )


@only_one()
def main():
    get_tfrecord()


if __name__ == "__main__":
    run_script(main)
