"""Number the videos and the columns: the first step of the chain.

Reads   DATA_DIR/cid2vids*.json[.gz]    {"cid": "c7", "vids": ["v1", "v2"], "name": "..."}
        DATA_DIR/vid2title*.json[.gz]   {"vid": "v1", "title": "..."}                        (optional)
        DATA_DIR/click_seq/*.json[.gz]  only where there is no vid2title file
Writes  WORK_DIR/indexing/vid2idx.json  {"v1": 2, ...}        0 is padding, 1 any unknown video
        WORK_DIR/indexing/cid2vidx.json {"c7": [2, 3], ...}   a column's number is its place, from 1

    python get_indexing.py

Numbers are for life: a later run keeps every number given, appends what is new and empties the columns that went.
"""

import collections
import contextlib
import fcntl
import functools
import gzip
import hashlib
import importlib
import itertools
import json
import os
import signal
import sys
import threading
import time
import uuid
import zlib
from pathlib import Path
from typing import NamedTuple

DATA_DIR = "data/sample"  # raw input
WORK_DIR = "data/work"  # everything that the scripts write; a path that every machine sees
MIN_CLICKS = 5  # clicks that put a video into the vocabulary where there is no catalogue
MAX_BAD_FRACTION = 0.01  # of a file's lines; more bad lines stop the run
MAX_LINE_BYTES = 32 << 20  # a longer line is skipped: about 2.5 million clicks of one user
MAX_ID_CHARS = 1000  # of a user, video or column; a line with a longer id is skipped
RANGE_BYTES = 4 << 20  # of an input file: the work of one task
NUM_WORKERS = os.cpu_count()  # processes that work on files

PAD, UNKNOWN, FIRST_VIDEO = 0, 1, 2  # video numbers; as a column number 0 means no column


def get_indexing(data_dir=DATA_DIR, work_dir=WORK_DIR, min_clicks=MIN_CLICKS):
    """Write the index of data_dir's videos and columns, continuing the one that stands, and return it."""
    data_dir = Path(data_dir)
    columns, catalogue = read_columns(data_dir), dict(read_all(data_dir, "vid2title*", parse_title))
    shelved = dict.fromkeys(vid for vids in columns.values() for vid in vids)
    if not find_files(data_dir, "vid2title*", required=False):
        catalogue = dict.fromkeys(clicked_videos(data_dir, shelved, columns, min_clicks))

    old = load_index(work_dir, new=True)
    videos = dict(old.videos)
    for vid in itertools.chain(shelved, catalogue):
        videos.setdefault(vid, FIRST_VIDEO + len(videos))
    numbered = {cid: [videos[vid] for vid in columns.get(cid, ())] for cid in {**old.columns, **columns}}

    if not videos:
        raise InputError(
            f"{data_dir.absolute()}: no video in any column, and none in a catalogue or clicked often enough"
        )
    remove_leftovers(Path(work_dir, "indexing"))
    # Videos first: killed in between, the old columns still stand for the same videos.
    write_json(Path(work_dir, "indexing/vid2idx.json"), videos)
    write_json(Path(work_dir, "indexing/cid2vidx.json"), numbered)
    empty = sum(not vids for vids in numbered.values())
    outside = sum(vid not in catalogue for vid in shelved)
    print(
        f"{len(videos):,} videos ({len(videos) - len(old.videos):,} new), "
        f"{len(numbered):,} columns ({len(numbered) - len(old.columns):,} new, {empty:,} empty); "
        f"{outside:,} videos of the columns are unknown to the catalogue"
    )
    return Index(videos, numbered)


def read_columns(data_dir):
    """Return {cid: [vid, ...]} in the order of the files; a cid that comes again adds its new videos."""
    columns = {}
    for cid, vids, _ in read_all(data_dir, "cid2vids*", parse_column):
        columns.setdefault(cid, {}).update(dict.fromkeys(vids))
    if not columns:
        raise InputError(
            f"{Path(data_dir).absolute()}: no columns; it needs cid2vids*.json[.gz] files, as README.md says"
        )
    return {cid: list(vids) for cid, vids in columns.items()}


def read_names(data_dir):
    """Return ({vid: title}, {cid: name}) as far as the raw data names them."""
    columns = read_all(data_dir, "cid2vids*", parse_column)
    return dict(read_all(data_dir, "vid2title*", parse_title)), {cid: name for cid, _, name in columns if name}


def clicked_videos(data_dir, shelved, columns, min_clicks):
    """Return the videos with at least min_clicks clicks, most clicked first."""
    tasks = [(where, shelved, columns) for where in file_ranges(find_files(Path(data_dir, "click_seq")))]
    totals, tallies = collections.Counter(), {}
    for counts, tally in map_files(count_videos, tasks, desc="count clicks"):
        totals.update(counts)
        tallies.setdefault(tally.path, Tally(tally.path)).append(tally)
    for tally in tallies.values():
        tally.check()
    enough = [vid for vid, clicks in totals.items() if clicks >= min_clicks and 0 < len(vid) <= MAX_ID_CHARS]
    return sorted(enough, key=lambda vid: (-totals[vid], vid))


def count_videos(task):
    """Return (clicks of each video, tally) of one FileRange."""
    where, shelved, columns = task
    tally = Tally(where.path)
    clicks = itertools.chain.from_iterable(clicks for _, clicks in read_records(tally, parse_clicks, *where[1:]))
    return collections.Counter(split_click(click, shelved, columns)[0] for click in clicks), tally


def split_click(click, videos, columns):
    """Return (vid, cid) of a click "<vid>_<cid>" or (vid, None) of "<vid>", where both ids may contain underscores.

    A known video as a whole is a plain click; else the split with both sides known; else the longest known column
    after an underscore, whose video is unknown; else the whole is an unknown video.
    """
    if click in videos:
        return click, None
    vid, _, cid = click.partition("_")
    if vid in videos and cid in columns:  # the usual case, and the first that the loop would find
        return vid, cid
    unknown = None
    at = click.find("_", max(0, len(click) - MAX_ID_CHARS - 1))
    while at >= 0:
        vid, cid = click[:at], click[at + 1 :]
        if cid in columns:
            if vid in videos:
                return vid, cid
            unknown = unknown or (vid, cid)
        at = click.find("_", at + 1)
    return unknown or (click, None)


# ---------------------------------------------------------------- one line of each raw format


def parse_column(record):
    """{"cid", "vids", "name"} -> (cid, [vid, ...], name); vids may be one string, separated by commas."""
    vids = record["vids"]
    if type(vids) is str:
        vids = [vid.strip() for vid in vids.split(",")]
    if type(vids) is not list:
        raise BadLine("wrong type")
    name = record.get("name")
    return text_id(record["cid"]), [text_id(v) for v in vids if v != ""], name if type(name) is str else None


def parse_title(record):
    """{"vid", "title"} -> (vid, title)."""
    title = record["title"]
    if type(title) is not str:
        raise BadLine("wrong type")
    return text_id(record["vid"]), title


def parse_clicks(record):
    """{"uid", "click_seq"} -> (uid, [click, ...])."""
    clicks = record["click_seq"]
    if type(clicks) is not list:
        raise BadLine("wrong type")
    types = set(map(type, clicks))
    if not types <= {str, int}:
        raise BadLine("wrong type")
    return text_id(record["uid"]), list(map(str, clicks)) if int in types else clicks


def text_id(value):
    """Return an id as text: a string as it is, an integer in decimal."""
    text = str(value) if type(value) is int else value
    if type(text) is not str:
        raise BadLine("wrong type")
    if not 0 < len(text) <= MAX_ID_CHARS:
        raise BadLine("id too long" if text else "empty id")
    return text


# ---------------------------------------------------------------- helpers of the whole chain: the index


class Index(NamedTuple):
    """Numbers of the videos {vid: number} and, in order, of each column's videos {cid: [number, ...]}."""

    videos: dict
    columns: dict

    def fingerprint(self, num_videos=None, num_columns=None):
        """Return what identifies the first so many numbers given; of a grown index it is the same."""
        videos, columns = list(self.videos)[:num_videos], list(self.columns)[:num_columns]
        return {"videos": len(videos), "columns": len(columns), "sha256": fingerprint(videos, columns)}

    def check(self, made_with, what, script):
        """Refuse the file `what`, made with the index of that fingerprint, unless this index continues it."""
        if self.fingerprint(made_with["videos"], made_with["columns"]) != made_with:
            raise InputError(f"{what} was made with another index than indexing/vid2idx.json; run {script} again")


def load_index(work_dir=WORK_DIR, new=False):
    """Return the Index under work_dir; a file that is missing is an error, or empty where the index may be new."""
    paths = [Path(work_dir, "indexing", name).absolute() for name in ("vid2idx.json", "cid2vidx.json")]
    index = Index(*({} if new and not path.exists() else read_json(path, "get_indexing.py") for path in paths))
    if list(index.videos.values()) != list(range(FIRST_VIDEO, FIRST_VIDEO + len(index.videos))):
        raise InputError(f"{paths[0]}: its numbers do not count up from {FIRST_VIDEO}; restore the file")
    for cid, numbers in index.columns.items():
        if type(numbers) is not list or not all(
            type(n) is int and 0 <= n - FIRST_VIDEO < len(index.videos) for n in numbers
        ):
            raise InputError(
                f"{paths[1]}: column {cid!r} is not a list of numbers of {paths[0].name}; restore the file"
            )
    return index


# ---------------------------------------------------------------- helpers: reading


class InputError(ValueError):
    """The user's input or files are at fault; the message is the one line to show."""


class BadLine(ValueError):
    """A line to skip; the message is the reason under which it is counted."""


class Tally:
    """Counts of one file's lines: all, skipped by reason, and the first few that were skipped (line number, reason)."""

    def __init__(self, path, lines=0, skipped=None, first=None):
        self.path, self.lines, self.skipped, self.first = path, lines, skipped or {}, first or []

    def skip(self, reason):
        """Count the line just read as skipped."""
        self.skipped[reason] = self.skipped.get(reason, 0) + 1
        if reason != "blank" and len(self.first) < 3:
            self.first.append((self.lines, reason))

    def append(self, tally):
        """Add the counts of the byte range that follows in the file."""
        self.first = (self.first + [(self.lines + line, reason) for line, reason in tally.first])[:3]
        self.lines += tally.lines
        for reason, count in tally.skipped.items():
            self.skipped[reason] = self.skipped.get(reason, 0) + count

    def check(self):
        """Report the skipped lines of the whole file, blank ones apart; raise InputError if they are too many."""
        bad = sum(self.skipped.values()) - self.skipped.get("blank", 0)
        if not bad:
            return
        where = ", ".join(f"line {line}: {reason}" for line, reason in self.first)
        message = f"{self.path}: {bad:,} of {self.lines:,} lines are bad ({where}{', ...' if bad > 3 else ''})"
        if bad > MAX_BAD_FRACTION * self.lines:
            raise InputError(f"{message}, more than MAX_BAD_FRACTION = {MAX_BAD_FRACTION}; mend the file")
        print(f"{message}: skipped", file=sys.stderr)


def read_all(data_dir, pattern, parse):
    """Yield parse(record) of each good line of data_dir's files of that name; the bad ones are reported."""
    for path in find_files(data_dir, pattern, required=False):
        tally = Tally(path)
        yield from read_records(tally, parse)
        tally.check()


def find_files(folder, pattern="*", required=True):
    """Return the paths of folder's pattern.json and .json.gz files, sorted by name."""
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(f"{folder.absolute()}: no such folder; put the raw data there or edit DATA_DIR")
    paths = {}
    for path in sorted([*folder.glob(pattern + ".json"), *folder.glob(pattern + ".json.gz")]):
        if (name := input_name(path)) in paths:
            raise InputError(f"{path} and {paths[name]} have the same name; remove one")
        paths[name] = str(path.absolute())
    if required and not paths:
        raise InputError(f"{folder.absolute()}: no {pattern}.json or {pattern}.json.gz file")
    return list(paths.values())


def input_name(path):
    """Return a file's name without .json or .json.gz."""
    return Path(path).name.removesuffix(".gz").removesuffix(".json")


class FileRange(NamedTuple):
    """The lines that begin in bytes [start, end) of a file: the work of one task."""

    path: str
    start: int
    end: int | None  # None: to the end, of a compressed file


def file_ranges(paths, range_bytes=RANGE_BYTES):
    """Return the FileRanges that cover the files; a compressed file cannot be cut."""
    ranges = []
    for path in paths:
        if path.endswith(".gz"):
            ranges.append(FileRange(path, 0, None))
        else:
            starts = range(0, max(os.path.getsize(path), 1), range_bytes)
            ranges += [FileRange(path, start, start + range_bytes) for start in starts]
    return ranges


def read_records(tally, parse, start=0, end=None):
    """Yield parse(record) of the good lines that begin in bytes [start, end) of tally.path, counting all in tally."""
    for line in read_lines(tally.path, start, end):
        tally.lines += 1
        try:
            if len(line) > MAX_LINE_BYTES:
                raise BadLine("too long")
            text = line.decode("utf-8-sig" if tally.lines == 1 else "utf-8")
            record = json.loads(text)
            if type(record) is not dict:
                raise BadLine("wrong type")
            if "\\u" in text:  # an escaped half of a character has no UTF-8
                json.dumps(record, ensure_ascii=False).encode()
            parsed = parse(record)
        except BadLine as reason:
            tally.skip(str(reason))
        except UnicodeError:
            tally.skip("not UTF-8")
        except KeyError as key:
            tally.skip(f"no {key.args[0]}")
        except (ValueError, RecursionError):
            tally.skip("not JSON" if line.strip() else "blank")
        else:
            yield parsed


def read_lines(path, start=0, end=None):
    """Yield the lines, as bytes, that begin in [start, end); of one over MAX_LINE_BYTES only its beginning."""
    if path.endswith(".gz") and not os.path.getsize(path):
        raise InputError(f"{path}: an empty gzip file; copy it again")
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            if start:  # the line under way at `start` belongs to the range before
                file.seek(start - 1)
                start += skip_line(file) - 1
            while end is None or start < end:
                line = file.readline(MAX_LINE_BYTES + 1)
                if not line:
                    return
                start += len(line)
                if len(line) > MAX_LINE_BYTES and not line.endswith(b"\n"):
                    start += skip_line(file)
                yield line
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({error}); copy it again") from error


def skip_line(file):
    """Read to the end of the line and return how many bytes that was."""
    skipped = 0
    while part := file.readline(1 << 20):
        skipped += len(part)
        if part.endswith(b"\n"):
            break
    return skipped


# ---------------------------------------------------------------- helpers: writing


@contextlib.contextmanager
def replacing(path):
    """Yield a temporary path; what is written there replaces `path` whole, synced to disk, if the block ends well."""
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        sync(temporary)
        os.replace(temporary, path)
        sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder):
    """Remove the temporary files that a killed run left in folder."""
    for path in Path(folder).glob(".*.tmp"):
        path.unlink()


def sync(path):
    """Wait until a file or folder is on disk."""
    descriptor = os.open(path, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)


def write_json(path, value):
    """Replace path by value as JSON."""
    with replacing(path) as temporary:
        temporary.write_text(json.dumps(value, ensure_ascii=False), encoding="utf-8")


def read_json(path, script):
    """Return the JSON object of a file that `script` writes."""
    path = Path(path).absolute()
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
        if type(value) is not dict:
            raise ValueError("not an object")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; run {script} first") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}); remove it and run {script} again") from error
    return value


def fingerprint(*parts):
    """Return the SHA-256 of values as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=repr).encode()).hexdigest()


def file_fingerprint(path):
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def constants(*scripts):
    """Return the constants of scripts, {name: value}: all that shapes their output, so no folders and worker counts."""
    values = {name: value for script in scripts for name, value in vars(importlib.import_module(script)).items()}
    return {name: values[name] for name in values if name.isupper() and not name.endswith(("_DIR", "_WORKERS"))}


# ---------------------------------------------------------------- helpers: running


def map_files(function, tasks, desc, num_workers=NUM_WORKERS):
    """Yield function(task) of each task, in order, computed by spawned worker processes with a progress bar.

    Started by spark-submit, the Spark cluster computes it. A task is a tuple that begins with its FileRange, by which
    InputError names the file at which a worker died; it may be tried twice, even at the same time.
    """
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        yield from map_on_spark(function, tasks)
        return
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor, ThreadPoolExecutor
    from concurrent.futures.process import BrokenProcessPool
    from queue import SimpleQueue

    from tqdm import tqdm

    bar = functools.partial(tqdm, total=len(tasks), desc=desc, unit="part", disable=None)
    num_workers = min(num_workers, len(tasks))
    if num_workers <= 1:
        yield from bar(map(function, tasks))
        return
    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy in the workers, which are as many as the cores
    idle, spawn = SimpleQueue(), multiprocessing.get_context("spawn")
    for _ in range(num_workers):  # a pool each, so that it is known which task a dead process had
        idle.put(ProcessPoolExecutor(1, spawn, initializer=end_with_parent))

    def run(task):
        worker = idle.get()
        try:
            return worker.submit(function, task).result()
        except BrokenProcessPool as error:
            raise InputError(
                f"{task[0].path}: the worker process died, for lack of memory perhaps; run again"
            ) from error
        finally:
            idle.put(worker)

    # Ctrl-C reaches the whole group of processes: the workers inherit that it is blocked, and leave it to this one.
    threads = ThreadPoolExecutor(num_workers, "map", signal.pthread_sigmask, (signal.SIG_SETMASK, {signal.SIGINT}))
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})  # until `finally` will be run
    results = [threads.submit(run, task) for task in tasks]
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        yield from bar(result.result() for result in results)
    finally:
        threads.shutdown(wait=False, cancel_futures=True)
        while True:  # a worker that is only starting is not among the children yet
            for process in multiprocessing.active_children():
                process.terminate()
            if all(result.done() for result in results):
                break
            time.sleep(0.05)


def map_on_spark(function, tasks):
    """Return function(task) of each task, in order, computed by the executors, which import function's own script."""
    from pyspark import SparkContext

    shared = importlib.import_module("get_indexing")  # this module as the executors know it, not as __main__
    script = Path(sys.argv[0]).stem if function.__module__ == "__main__" else function.__module__
    attempt = functools.partial(shared.attempt, script, function.__name__)
    outcomes = SparkContext.getOrCreate().parallelize(tasks, max(len(tasks), 1)).map(attempt).collect()
    for outcome in outcomes:
        if isinstance(outcome, shared.InputError | OSError):
            raise InputError(outcome)
    return outcomes


def attempt(script, name, task):
    """Return what the script's function of that name makes of a task, or the error that is worth one line."""
    try:
        return getattr(importlib.import_module(script), name)(task)
    except (InputError, OSError) as error:
        return error


def end_with_parent():
    """Let this worker process end when the process that started it does, however that ended."""
    import multiprocessing

    def wait():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=wait, daemon=True).start()


def cluster_place():
    """Return (this process's place, number of processes) in the training cluster of TF_CONFIG; (0, 1) without one."""
    try:
        config = json.loads(os.environ.get("TF_CONFIG", '{"cluster": {"worker": [""]}, "task": {}}'))
        workers = [(kind, n) for kind in ("chief", "worker") for n in range(len(config["cluster"].get(kind, [])))]
        return workers.index((config["task"].get("type", "worker"), config["task"].get("index", 0))), len(workers)
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise InputError(f"TF_CONFIG names no chief or worker of its cluster ({error}); see README.md") from error


def run_script(main, work_dir=WORK_DIR):
    """Run a script's main(): what is the input's fault, and a signal, end with one line and exit status 1."""
    name = Path(sys.argv[0]).name

    def stop(number, _):
        raise KeyboardInterrupt("terminated" if number == signal.SIGTERM else "interrupted")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        Path(work_dir).mkdir(parents=True, exist_ok=True)
        place, _ = cluster_place()  # the workers of a cluster share the folder
        with open(Path(work_dir, f".{name}{place or ''}.lock"), "w") as lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise InputError(f"another {name} is at work in {Path(work_dir).absolute()}; let it end") from error
            main()
    except (InputError, OSError, KeyboardInterrupt) as error:
        message = f"{name}: {error}"
    else:
        return
    sys.exit(message)  # outside the except block: main()'s frames are gone, and map_files has ended its workers


def main():
    get_indexing()


if __name__ == "__main__":
    run_script(main)
