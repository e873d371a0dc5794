"""Cut each user's clicks into windows, hold out the last visit of some users, and write all as TFRecord shards.

Reads   DATA_DIR/click_seq/*   {"uid": "u1", "click_seq": ["v1", "v2_c7"], "times": [1795641004, 1795641060]}
                               a line a user, oldest click first; times, in unix seconds, are optional
        WORK_DIR/indexing/
Writes  WORK_DIR/tfrecord/{train,val,test}-*.tfrecord   one tf.train.SequenceExample for each window
        WORK_DIR/tfrecord/part-*.json                   what is in the shards of one task
        WORK_DIR/tfrecord/manifest.json                 last: what all shards hold and what they were made from

    python get_tfrecord.py

A window is one record with its clicks stored once; every column click in it that has a history is a training target.
What is held out is what is served: of some users what they click first, in a current column, when they come back.
The second half of this file is how work on files is shared out among processes, or on a Spark cluster.
"""

import bisect
import collections
import contextlib
import functools
import hashlib
import importlib
import itertools
import math
import os
import signal
import threading
import time
from pathlib import Path
from typing import Final, NamedTuple

from get_indexing import (
    DATA_DIR, FIRST_VIDEO, MAX_ID_CHARS, UNKNOWN, WORK_DIR,
    BadLine, InputError, Records, Tally, constants_of, file_fingerprint, find_files, fingerprint, load_index, name_unread,
    only_one, open_unpacked, read_json, remove_leftovers, replacing, run_script, text_id, warn, write_json,
)  # fmt: skip

USER_MAX_LEN: int = 50  # clicks in a window, and the most that the user tower reads
WINDOW_OVERLAP: int = 16  # clicks that a window repeats from the one before it: the history of its first target
MIN_HISTORY: int = 1  # clicks that a target must have before it
VISIT_GAP: int = 1800  # seconds without a click that end a visit
HELD_OUT_USERS: int = 3000  # for validation, as many for the test: up to twice, of a share that stands four times
RANGE_BYTES: int = 4 << 20  # of input files: the work of one task
NUM_WORKERS: int | None = None  # processes that work on files; None: one for each core
TASKS_AHEAD: int = 8  # tasks for each worker that are handed out at a time, whose results may wait

SPLITS: Final = ("train", "val", "test")
LISTS: Final = ("user_feature", "user_column", "user_time", "label")  # of a record
FORMAT: Final = 7  # of records and manifest
MADE_WITH: Final = ("format", "index", "constants", "held_out_share", "input", "held_out")  # in a manifest
LAST_SECOND: Final = 10**11  # of times: beyond are milliseconds
UNPACKS_TO: Final = 8  # bytes that one of a gzip file holds, or so
SKETCH: Final = 100  # held-out users by whose draws and times records are known to hold out the same clicks


def get_tfrecord(data_dir=DATA_DIR, work_dir=WORK_DIR, num_workers=NUM_WORKERS, **constants):
    """Write the shards and their manifest, which is returned; shards that still stand for their input are kept.

    constants, by their names, take the place of those at the top.
    """
    settings, index, folder = record_constants(**constants), load_index(work_dir), Path(work_dir, "tfrecord").absolute()
    contents, former = survey(Path(data_dir, "click_seq"), num_workers), read_if_whole(folder / "manifest.json")
    former = former if former.get("format") == FORMAT else {}
    lines = sum(content.lines for content in contents.values())
    made_with = {
        "format": FORMAT,
        "index": describe_index(index),
        "constants": settings,
        "held_out_share": held_out_share(lines, settings["HELD_OUT_USERS"], former.get("held_out_share", 0)),
    }
    folder.mkdir(parents=True, exist_ok=True)
    remove_leftovers(folder)
    write = functools.partial(write_shards, folder=folder, index=index, made_with=made_with, contents=contents)
    parts = map_files(write, cut_files(contents, settings["RANGE_BYTES"]), "write records", num_workers)
    manifest = made_with | {"input": digests(contents)} | add_parts(parts, made_with["held_out_share"], contents, index)
    check_enough(manifest)
    write_json(folder / "manifest.json", manifest)
    remove_others(folder, manifest["shards"])
    print_report(manifest, former.get("report"))
    return manifest


def read_if_whole(path):
    """Return the JSON object of a file, {} where it is missing or damaged."""
    with contextlib.suppress(InputError, FileNotFoundError):
        return read_json(path, "")
    return {}


def describe_index(index):
    """Return what of the index records depend on: its numbers, and the current columns, in which clicks are held out."""
    return index.fingerprint() | {"current": fingerprint([cid for cid, videos in index.columns.items() if videos])}


def record_constants(**constants):
    """Return the constants that shape the records, by name; values that contradict each other raise InputError."""
    settings = constants_of("get_indexing", __name__, **constants)
    if not settings["MIN_HISTORY"] <= settings["WINDOW_OVERLAP"] < settings["USER_MAX_LEN"]:
        raise InputError(f"MIN_HISTORY <= WINDOW_OVERLAP < USER_MAX_LEN must hold, not {settings}")
    return settings


class Content(NamedTuple):
    """What a click file holds."""

    sha256: str  # of its bytes, unpacked
    lines: int
    stamp: tuple  # what changes where another writes to the file or replaces it


def survey(folder, num_workers=NUM_WORKERS):
    """Return {path: Content} of the click files."""
    if not (paths := find_files(folder)):
        raise InputError(f"{folder.absolute()}: no .json, .jsonl, .json.gz or .jsonl.gz file")
    stamps = list(map(stamp_of, paths))
    contents = map_files(content_of, paths, "read clicks", num_workers)
    return {path: Content(*content, stamp) for path, content, stamp in zip(paths, contents, stamps, strict=True)}


def content_of(path):
    """Return (SHA-256 of a file's bytes, how many lines they hold), unpacked."""
    digest, lines, blank = hashlib.sha256(), 0, True
    with open_unpacked(path) as file:
        while part := file.read(1 << 20):
            digest.update(part)
            lines += part.count(b"\n")
            blank = blank and part.isspace()
    if blank:
        raise InputError(f"{path}: nothing but blanks; copy it again, or remove it")
    return digest.hexdigest(), lines


def stamp_of(path):
    """Return the stamp of a file as it is now."""
    stat = os.stat(path)
    return stat.st_ino, stat.st_size, stat.st_mtime_ns


def digests(contents):
    """Return {file name: SHA-256} of what survey() returns: the same wherever the folder is."""
    return {Path(path).name: content.sha256 for path, content in contents.items()}


def held_out_share(users, wanted, former=0):
    """Return the share of the users for validation, and for the test: a power of two, which few users more do not change.

    It is the largest that gives no more than twice the users wanted, 1/2 at most. The former share is kept while it gives
    between half and four times as many.
    """
    if wanted / 2 <= former * users <= 4 * wanted:
        return former
    return 0.5 ** max(1, math.ceil(math.log2(max(users, 1) / (2 * wanted))))


def draw_of(uid):
    """Return a number in [0, 1), always the same for the same user, whatever other users there are."""
    return int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "big") / 2**64


# ---------------------------------------------------------------- clicks


class History(NamedTuple):
    """A line of the click files."""

    uid: str
    clicks: list
    times: list  # unix seconds of each click; 0 where they are not known
    now: int  # the moment to rank for; 0 where it is not known


def parse_history(record):
    """{"uid", "click_seq", "times", "now"} -> History; the last two are optional."""
    clicks, times, now = record["click_seq"], record.get("times"), record.get("now")
    if type(clicks) is not list or not (types := set(map(type, clicks))) <= {str, int}:
        raise BadLine("wrong type of click_seq")
    if times is not None and (type(times) is not list or len(times) != len(clicks)):
        raise BadLine("not as many times as clicks")
    now = 0 if now is None else now
    for second in [*(times or ()), now]:
        if type(second) not in (int, float) or not 0 <= second <= LAST_SECOND:
            raise BadLine("times that are no unix seconds")
    seconds = list(map(int, times or [0] * len(clicks)))
    if any(later < earlier for earlier, later in itertools.pairwise(seconds)):
        raise BadLine("times that fall")
    clicks = list(map(str, clicks)) if int in types else clicks
    return History(text_id(record["uid"], "uid"), clicks, seconds, int(now))


def split_click(click, videos, columns):
    """Return (vid, cid) of a click "<vid>_<cid>" or (vid, None) of "<vid>", where both ids may contain underscores.

    A known video as a whole is a plain click; else the split with both sides known; else the longest known column
    after an underscore, whose video is unknown; else the longest known video before one, in no known column (then vid
    is not the whole click); else the whole is an unknown video.
    """
    if click in videos or len(click) > 3 * MAX_ID_CHARS:  # no known ids are so long
        return click, None
    vid, _, cid = click.partition("_")
    if vid in videos and cid in columns:  # the usual case, and the first split below
        return vid, cid
    splits = [(click[:at], click[at + 1 :]) for at, character in enumerate(click) if character == "_"]
    in_column = [split for split in splits if split[1] in columns]
    of_video = [vid for vid, _ in splits if vid in videos]
    if in_column:
        return next((split for split in in_column if split[0] in videos), in_column[0])
    return (of_video or [click])[-1], None


class ClickEncoder:
    """Raw clicks -> model input: the one way in, for training and for serving."""

    def __init__(self, index):
        self.videos = index.videos
        self.columns = {cid: number for number, cid in enumerate(index.columns, start=1)}
        self.current = {number for number, videos in enumerate(index.columns.values(), start=1) if videos}
        self.unknown_columns = 0  # clicks on known videos in columns that no index knew, so far
        self.unknown_video = ""  # one that was clicked

    def encode(self, clicks):
        """[click, ...] -> (video numbers, column numbers), lists of the same length; a column is 0 for none."""
        videos, columns = list(map(self.videos.get, clicks)), [0] * len(clicks)
        for at, video in enumerate(videos):
            if video is None:
                vid, cid = split_click(clicks[at], self.videos, self.columns)
                videos[at], columns[at] = self.videos.get(vid, UNKNOWN), self.columns.get(cid, 0)
                self.unknown_columns += cid is None and vid != clicks[at]
                if videos[at] == UNKNOWN:
                    self.unknown_video = vid
        return videos, columns


# ---------------------------------------------------------------- windows


def write_shards(task, folder, index, made_with, contents):
    """Write the shards of one task, a list of byte ranges, then their part file; return what it says. What stands is kept.

    They are named by all that they are made of. So they may stand beside former ones, which a manifest still lists.
    """
    name = fingerprint(made_with, [(Path(path).name, contents[path].sha256, start) for path, start, _ in task])[:16]
    part_file, shards = folder / f"part-{name}.json", {split: folder / f"{split}-{name}.tfrecord" for split in SPLITS}
    part = read_if_whole(part_file)
    with contextlib.suppress(FileNotFoundError, KeyError):  # what is gone or damaged is made again
        if all(file_fingerprint(path) == part["shards"][path.name]["sha256"] for path in shards.values()):
            return part
    from tensorflow.errors import OpError

    try:
        part = write_windows(task, shards, ClickEncoder(index), made_with, contents)
    except OpError as error:  # TensorFlow's own, of a full disk say
        raise OSError(f"{folder}: {error.message}") from None
    part["shards"] = {
        path.name: {"bytes": path.stat().st_size, "sha256": file_fingerprint(path)} for path in shards.values()
    }
    write_json(part_file, part)
    return part


def write_windows(task, shards, encoder, made_with, contents):
    """Write the windows of a task into shards {split: path}; return what its part file says of them.

    A click file that is no longer what the survey saw raises InputError, and no shard appears.
    """
    from tensorflow.io import TFRecordWriter

    settings, share = made_with["constants"], made_with["held_out_share"]
    counts, tallies, clicked = collections.defaultdict(collections.Counter), [], set()
    with contextlib.ExitStack() as stack:  # the writers close first, then the shards take their names
        temporary = {split: stack.enter_context(replacing(path)) for split, path in shards.items()}
        writers = {split: stack.enter_context(TFRecordWriter(str(path))) for split, path in temporary.items()}
        for path, start, end in task:
            records = Records(path, parse_history, start, end)
            for uid, clicks, times, _ in records:
                videos, columns = encoder.encode(clicks)
                clicked.update(videos)
                counts["histories"][str(len(clicks))] += 1
                counts["clicks"].update(count_clicks(videos, columns, times, settings["VISIT_GAP"]))
                counts["days"].update(str(second // 86_400) for second in (*times[:1], *times[-1:]) if second)
                if split_of(uid, share) != "train":
                    counts["held_out"][uid] += 1
                    counts["timed"][uid] += any(times)
                of_splits = split_windows(uid, videos, columns, times, encoder.current, share, settings)
                for split, windows in of_splits.items():
                    counts["users"][split] += bool(windows)
                    for window in windows:
                        counts["targets"][split] += window["label"].count(1.0)
                        counts[f"{split} windows"][str(len(window["label"]))] += 1
                        writers[split].write(serialize_window(window))
            tallies.append(vars(records.tally) | {"path": Path(path).name})  # wherever the folder is
            if stamp_of(path)[1:] != contents[path].stamp[1:]:  # another machine may number its files otherwise
                raise InputError(f"{path}: changed while it was read; run get_tfrecord.py again")
    counts["clicks"]["unknown_columns"] = encoder.unknown_columns
    return dict(counts=counts, tallies=tallies, clicked=sorted(clicked), unknown_video=encoder.unknown_video)


def count_clicks(videos, columns, times, visit_gap):
    """Return what the data report counts of one user's clicks."""
    return {
        "clicks": len(videos),
        "unknown_videos": videos.count(UNKNOWN),
        "column_clicks": len(columns) - columns.count(0),
        "repeated_clicks": sum(one == other for one, other in itertools.pairwise(zip(videos, columns, strict=True))),
        "visits": len(visit_starts(times, visit_gap)) if any(times) else 0,
    }


def visit_starts(times, visit_gap):
    """Return where visits begin: at the first click, and where the user was away for visit_gap seconds."""
    return [at for at in range(len(times)) if at == 0 or times[at] - times[at - 1] >= visit_gap]


def split_of(uid, share):
    """Return the split of a user: validation takes the lowest draws and the test the highest, a share of each.

    As the share falls, users only leave either: nobody ever enters who was trained on before.
    """
    draw = draw_of(uid)
    return "val" if draw < share else "test" if draw >= 1 - share else "train"


def split_windows(uid, videos, columns, times, current, share, settings):
    """Return {split: [window, ...]} of one user; of a held-out user, also what "val" or "test" holds of them.

    A target was clicked in a column and has MIN_HISTORY clicks before it, at least. What is held out is in one window,
    after what a user tower reads; the clicks after the target are there to be counted.
    """
    split, end, place = split_of(uid, share), len(videos), None
    clicks = dict(user_feature=videos, user_column=columns, user_time=times)
    if split != "train":
        end, place = held_out_clicks(columns, times, current, settings)
    targets = {at for at in range(settings["MIN_HISTORY"], end) if columns[at]}
    bounds = window_bounds(0, 0, end, settings)
    windows = {"train": [cut_window(uid, clicks, targets, *bound) for bound in bounds]}
    if place is not None:
        bounds = window_bounds(max(end - settings["USER_MAX_LEN"], 0), end, len(videos), settings, place + 1)
        windows[split] = [cut_window(uid, clicks, {place}, *bound) for bound in bounds]
    return windows


def held_out_clicks(columns, times, current, settings):
    """Return (from which click on a user's clicks are held out, which of them is the target); (all, None) without one.

    With times it is the first click in a current column of the last visit that has one; without, the last one of all.
    """
    if any(times):
        starts = visit_starts(times, settings["VISIT_GAP"])
        visits = zip(reversed(starts), reversed([*starts[1:], len(times)]), strict=True)
    else:
        visits = ((at, at + 1) for at in reversed(range(len(columns))))
    for start, end in visits:
        place = next((at for at in range(start, end) if columns[at] in current), None)
        if place is not None and start >= settings["MIN_HISTORY"]:
            return start, place
    return len(columns), None


def window_bounds(start, new, number, settings, shortest_end=0):
    """Yield (start, new, end) of the windows over clicks [start, number): a window is clicks [start, end).

    Those from `new` on are in no window before it; those before `new` are the history that it repeats.
    """
    end = max(new + settings["USER_MAX_LEN"], shortest_end)
    while new < number:
        yield start, new, min(end, number)
        start, new = end - settings["WINDOW_OVERLAP"], end
        end = start + settings["USER_MAX_LEN"]


def cut_window(uid, clicks, targets, start, new, end):
    """Return a window: context "uid", "start" (its place in the history) and "repeated" (clicks in the window before it),
    and lists [clicks] of its LISTS; the label is 1.0 where the next click is new and one of the targets."""
    label = [float(at in targets and new <= at < end) for at in range(start + 1, end + 1)]
    window = {name: numbers[start:end] for name, numbers in clicks.items()}
    return dict(uid=uid, start=start, repeated=new - start, **window, label=label)


def serialize_window(window):
    """Return a window as the bytes of a tf.train.SequenceExample, each of its LISTS packed into one Feature.

    Of user_time each is the difference to the one before, which takes half the bytes; there is none where none is known.
    """
    from tensorflow.train import SequenceExample

    times = window["user_time"]
    gaps = [later - earlier for earlier, later in itertools.pairwise([0, *times])] if any(times) else []
    example = SequenceExample()  # filled in place: made of Features and Int64Lists it takes nearly three times as long
    context, lists = example.context.feature, example.feature_lists.feature_list
    context["uid"].bytes_list.value.append(window["uid"].encode())
    for name in ("start", "repeated"):
        context[name].int64_list.value.append(window[name])
    for name in LISTS:
        feature = lists[name].feature.add()
        values = feature.float_list if name == "label" else feature.int64_list
        values.value.extend(gaps if name == "user_time" else window[name])
    return example.SerializeToString(deterministic=True)


# ---------------------------------------------------------------- the manifest


def add_parts(parts, share, contents, index):
    """Add up what part files say, the manifest's part of it from "shards" on; too many bad lines are refused."""
    shards, unknown, clicked, sums = {}, "", set(), collections.defaultdict(collections.Counter)
    files = {Path(path).name: Tally(path) for path in contents}
    for part in parts:
        shards |= part["shards"]
        unknown = unknown or part["unknown_video"]
        clicked.update(part["clicked"])
        for name, counts in part["counts"].items():
            sums[name].update(counts)
        for of_range in part["tallies"]:
            files[of_range["path"]] += Tally(**of_range | {"skipped": collections.Counter(of_range["skipped"])})
    for tally in files.values():
        tally.check()
    uids, lengths = sums["held_out"], {int(text): users for text, users in sums["histories"].items()}
    days = [time.strftime("%Y-%m-%d", time.gmtime(86_400 * day)) for day in sorted(map(int, sums["days"]))]
    report = {
        "lines": sum(tally.lines for tally in files.values()),
        "skipped": sum((tally.skipped for tally in files.values()), collections.Counter()),
        **sums["clicks"],
        "targets": sums["targets"].total(),
        "history": {"p50": quantile(lengths, 0.5), "p90": quantile(lengths, 0.9), "max": max(lengths, default=0)},
        "days": [days[0], days[-1]] if days else [],
        "unknown_video": unknown,
        "users": round(len(uids) / min(2 * share, 1)),  # as far as those held out, by their uids, tell
        "on_several_lines": sum(lines > 1 for lines in uids.values()) / max(len(uids), 1),
        **count_shelved(index, clicked, unknown),
    }
    splits = {
        split: {name: sums[name][split] for name in ("users", "targets")} | {"windows": sums[f"{split} windows"]}
        for split in SPLITS
    }
    held_out = sorted([draw_of(uid), sums["timed"][uid] > 0] for uid in uids)[-SKETCH:]
    return {"shards": shards, "splits": splits, "held_out": held_out, "report": report}


def count_shelved(index, clicked, unknown_video):
    """Return what the data report says of the videos on shelves; clicked is the set of the numbers that were clicked."""
    shelved, vids = set().union(*index.columns.values()), list(index.videos)
    never, elsewhere = shelved - clicked, clicked - shelved - {UNKNOWN}
    return {
        "shelved_videos": len(shelved),
        "never_clicked": len(never),
        "shelved_example": vids[min(never, default=FIRST_VIDEO) - FIRST_VIDEO],
        "clicked_example": unknown_video or vids[min(elsewhere or clicked, default=FIRST_VIDEO) - FIRST_VIDEO],
    }


def quantile(counts, share):
    """Return the lowest value of {value: count} that at least that share of what is counted does not exceed; 0 of nothing."""
    values = sorted(counts)
    ends = list(itertools.accumulate(counts[value] for value in values))
    return values[bisect.bisect_right(ends, share * (ends[-1] - 1))] if values else 0


def check_enough(manifest):
    """Refuse records that cannot train: no click in any column, or no target for training, validation or the test."""
    report, splits = manifest["report"], manifest["splits"]
    if report["history"]["max"] == 1:
        raise InputError("every history is of one click; write one line for each user: all their clicks, oldest first")
    if not report["column_clicks"]:
        raise InputError(
            "no click was made in a known column; they look like <vid>_<cid>, the cid as in cid2vids*.json"
        )
    lacking, users = [split for split in SPLITS if not splits[split]["targets"]], report["users"]
    if lacking and 2 * users < report["lines"]:
        raise InputError(f"{report['lines']:,} lines hold about {users:,} uids; write one line for each user")
    if lacking == ["train"]:
        raise InputError("all column clicks are held out; more users or longer histories are needed")
    if lacking:
        enough = math.ceil(math.log(0.01) / math.log1p(-manifest["held_out_share"]))
        needed = "each on one line, with a uid of its own, who clicked in a current column after other clicks"
        few = f"{report['lines']:,} lines leave no target for {lacking[-1]}"
        raise InputError(f"{few}; about {enough} users are needed, {needed}")


def remove_others(folder, shards):
    """Remove the shards and part files of former input, and those that a killed run left: files of these names alone."""
    current = shards.keys() | {f"part-{shard.partition('-')[2].removesuffix('.tfrecord')}.json" for shard in shards}
    for kind in ("part-{}.json", *(f"{split}-{{}}.tfrecord" for split in SPLITS)):
        remove_leftovers(folder, kind.format("[0-9a-f]" * 16), current)


def print_report(manifest, former=None):
    """Print the data report: what was read, skipped and kept, and what is odd, also beside the former report."""
    report, history = manifest["report"], manifest["report"]["history"]
    skipped = ", ".join(f"{count:,} {reason}" for reason, count in report["skipped"].items()) or "none"
    visits = f"; {report['visits']:,} visits, {' to '.join(report['days'])}" if report["days"] else ""
    print(f"{report['lines']:,} lines (skipped: {skipped}), {report['clicks']:,} clicks, "
          f"{report['unknown_videos']:,} of unknown videos, {report['column_clicks']:,} in columns, "
          f"{report['unknown_columns']:,} in unknown columns; "
          f"history p50 {history['p50']}, p90 {history['p90']}, max {history['max']}{visits}")  # fmt: skip
    for split, counts in manifest["splits"].items():
        windows = sum(counts["windows"].values())
        print(f"{split}: {counts['users']:,} users -> {counts['targets']:,} targets in {windows:,} windows")
    for line in oddities(report, former or report):
        warn(line)


def oddities(report, former):
    """Yield a line for each thing in the data that costs quality."""
    lines, longest = report["lines"] - sum(report["skipped"].values()), report["history"]["max"]
    clicks = report["clicks"]
    unknown, repeated = report["unknown_videos"] / clicks, report["repeated_clicks"] / clicks
    if 2 * clicks < former["clicks"]:
        yield f"{clicks:,} clicks, where the former records had {former['clicks']:,}: is a click file cut or missing?"
    if report["on_several_lines"]:
        yield (f"about {report['users']:,} users are on {lines:,} lines, {report['on_several_lines']:.1%} of them on several: "
               "each line is trained on and ranked by itself; put all clicks of a user on one line")  # fmt: skip
    shelved, other = (f"{report[f'{kind}_example']!a:.80}" for kind in ("shelved", "clicked"))
    if unknown > 0.5:
        yield (f"{unknown:.0%} of the clicks are of videos on no shelf and in no catalogue, {report['unknown_video']!a:.80} for "
               f"one, where ids look like {shelved}; write the ids alike in all raw data, or vid2title lines of the videos, and "
               "run get_indexing.py and get_tfrecord.py again")  # fmt: skip
    elif unknown:
        yield f"{unknown:.1%} of the clicks are of unknown videos; vid2title lines make them known"
    if 2 * report["never_clicked"] > report["shelved_videos"]:
        yield (f"nobody clicked {report['never_clicked']:,} of the {report['shelved_videos']:,} videos on the shelves, {shelved} "
               f"for one, where clicks are like {other}: are ids written otherwise, with blanks or another separator?")  # fmt: skip
    if repeated > 0.2:
        yield (f"{repeated:.0%} of the clicks repeat the one before, same video and column: where the log holds events twice, "
               "write each once; else all figures are too good, since the next click is known")  # fmt: skip
    if longest > clicks * max(0.01, 10 / lines):
        yield f"one user has {longest:,} of the {clicks:,} clicks, perhaps a machine: leave such users out"


# ---------------------------------------------------------------- work on files, shared out


def cut_files(paths, range_bytes=RANGE_BYTES):
    """Return the tasks that cover the files: lists of byte ranges (path, start, end), of range_bytes or so between them.

    A large file is cut, small ones are put together, and a compressed one stays whole.
    """
    sized = []
    for path in paths:
        size = os.path.getsize(path)
        if path.endswith(".gz"):
            sized.append(((path, 0, math.inf), size * UNPACKS_TO))
        else:
            sized += [((path, at, at + range_bytes), min(size - at, range_bytes)) for at in range(0, size, range_bytes)]
    return put_together(sized, range_bytes)


def put_together(sized, task_bytes):
    """Return lists of the items of (item, bytes), in order, of task_bytes or so between them."""
    tasks, room = [], 0
    for item, size in sized:
        if not tasks or size > room:
            tasks.append([])
            room = task_bytes
        tasks[-1].append(item)
        room -= size
    return tasks


def map_files(function, tasks, desc, num_workers=NUM_WORKERS):
    """Return an iterator over function(task) of each task, in order, computed by spawned worker processes.

    Started by spark-submit, the Spark cluster computes them. The function, a functools.partial say, is sent to each worker
    once; a task may be tried twice, even at the same time. Only so many results wait at a time.
    """
    from tqdm import tqdm

    num_workers = min(num_workers or count_cores(), len(tasks))
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        results = map_on_spark(function, tasks)
    else:
        results = map_on_workers(function, tasks, num_workers) if num_workers > 1 else map(function, tasks)
    # disable=None: silent where stderr is no terminal
    return tqdm(results, total=len(tasks), desc=desc, unit="part", leave=False, disable=None)


def map_on_workers(function, tasks, num_workers):
    """Yield function(task) of each task, in order, computed by so many processes.

    They end after the task that they are at, also where this one ends by an error or a signal; at once where it is killed.
    """
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy in the workers, which are as many as the cores
    pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), start_worker, (function,))
    try:
        for some in slices(tasks, TASKS_AHEAD * num_workers):
            yield from pool.map(run_task, some)
    except BrokenProcessPool as error:
        died = "a worker process died, for lack of memory perhaps"
        raise InputError(f"{died}; run again, or lower NUM_WORKERS in get_tfrecord.py") from error
    finally:
        pool.shutdown(wait=False, cancel_futures=True)


def slices(items, length):
    """Yield the items, a list, in lists of that length, the last one perhaps shorter."""
    return (items[start : start + length] for start in range(0, len(items), length))


def start_worker(function):
    """Make this process a worker, which ends when the one that started it does, however that ended."""
    import multiprocessing

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is for the one that started it
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the workers would fight over it
    run_task.function = function


def run_task(task):
    """Return what a worker's function makes of a task."""
    return run_task.function(task)


def map_on_spark(function, tasks):
    """Yield function(task) of each task, in order, computed by the executors."""
    context = importlib.import_module("pyspark").SparkContext.getOrCreate()
    for some in slices(tasks, TASKS_AHEAD * context.defaultParallelism):
        for outcome in context.parallelize(some, len(some)).map(functools.partial(attempt, function)).collect():
            if isinstance(outcome, InputError | OSError):
                raise InputError(outcome)
            yield outcome


def attempt(function, task):
    """Return function(task), or the error that is worth one line."""
    try:
        return function(task)
    except (InputError, OSError) as error:
        return error


def count_cores():
    """Return how many cores this process may use: those of its affinity, within its control group's share of time."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # macOS has none
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group, or one without a limit
        return cores


def main():
    with only_one(WORK_DIR):
        name_unread(Path(DATA_DIR, "click_seq"))
        get_tfrecord()


if __name__ == "__main__":
    run_script(__file__)
