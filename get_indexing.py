"""Number the videos and the columns: the first step of the chain.

Reads   DATA_DIR/cid2vids*    {"cid": "c7", "vids": ["v1", "v2"], "name": "..."}     a JSON line each; files end in
        DATA_DIR/vid2title*   {"vid": "v1", "title": "..."}           (optional)    .json or .jsonl, plain or .gz
        DATA_DIR/click_seq/*  only where there is no vid2title file
Writes  WORK_DIR/indexing/vid2idx.json  {"v1": 2, ...}        0 is padding, 1 any unknown video
        WORK_DIR/indexing/cid2vidx.json {"c7": [2, 3], ...}   a column's number is its place, from 1

    python get_indexing.py

Numbers are for life: a later run keeps every number given, appends what is new and empties the columns that went.
The second half of this file is the toolbox of all six scripts, in sections: the index, counts of lines, reading, writing,
custody, rules of constants, workers, running.
"""

import collections
import contextlib
import errno
import fcntl
import functools
import gzip
import hashlib
import importlib
import itertools
import json
import math
import os
import signal
import sys
import threading
import uuid
import zlib
from pathlib import Path
from typing import NamedTuple

DATA_DIR = "data/sample"  # raw input
WORK_DIR = "data/work"  # everything that the scripts write; a path that every machine sees
MIN_CLICKS = 5  # clicks that put a video into the vocabulary where there is no catalogue
MAX_BAD_FRACTION = 0.01  # of a file's lines; more bad lines stop the run
MAX_LINE_BYTES = 32 << 20  # a longer line is skipped: about 2.5 million clicks of one user
MAX_ID_CHARS = 1000  # of a user, video or column, whose line is skipped beyond; clicks may be longer
RANGE_BYTES = 4 << 20  # of input files: the work of one task
NUM_WORKERS = None  # processes that work on files; None: one for each core

PAD, UNKNOWN, FIRST_VIDEO = 0, 1, 2  # video numbers; as a column number 0 means no column
PREFIXES = ("cid2vids", "vid2title")  # of the files in DATA_DIR that are read
ENDINGS = (".json", ".jsonl", ".json.gz", ".jsonl.gz")  # of all files that are read
CHAIN = ("get_indexing", "get_tfrecord", "get_dataset", "model_tf2", "train", "infer")
TASKS_AHEAD = 4  # tasks for each worker, whose results may wait
UNPACKS_TO = 8  # bytes that one of a gzip file holds, or so

rules = {  # what constants can be, as keeps() reads it
    "a path, without ~": ("DATA_DIR", "WORK_DIR"),
    "a whole number in [1, inf)": ("MIN_CLICKS", "MAX_LINE_BYTES", "MAX_ID_CHARS", "RANGE_BYTES"),
    "None or a whole number in [1, inf)": ("NUM_WORKERS",),
    "a number in [0, 1]": ("MAX_BAD_FRACTION",),
}
LIMITS = {"MAX_LINE_BYTES": MAX_LINE_BYTES, "MAX_ID_CHARS": MAX_ID_CHARS}  # what of the input is read

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when TensorFlow is imported: fewer lines of its own
os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever the user's other projects need


def get_indexing(data_dir=DATA_DIR, work_dir=WORK_DIR, min_clicks=MIN_CLICKS, num_workers=NUM_WORKERS):
    """Write the index of data_dir's videos and columns, continuing the one that stands, and return it."""
    data_dir, folder = Path(data_dir), Path(work_dir, "indexing")
    old, columns = load_index(work_dir, new=True), read_columns(data_dir)
    shelved = dict.fromkeys(itertools.chain.from_iterable(columns.values()))
    if titles := find_files(data_dir, "vid2title*"):
        catalogue = dict.fromkeys(vid for vid, _ in read_all(titles, parse_title))
    else:
        videos, cids = {**old.videos, **shelved}, {**old.columns, **columns}
        catalogue = dict.fromkeys(clicked_videos(data_dir, videos, cids, min_clicks, num_workers))
    index = grow_index(old, columns, itertools.chain(shelved, catalogue))
    if not index.videos:
        raise InputError(f"{data_dir.absolute()}: no video in any column or catalogue, and none clicked often enough")

    remove_leftovers(folder)
    # Videos first: killed in between, the old columns, none at first, still stand for the same videos.
    if not old.videos:
        write_json(folder / "cid2vidx.json", {})
    write_json(folder / "vid2idx.json", index.videos)
    write_json(folder / "cid2vidx.json", index.columns)
    empty = sum(not vids for vids in index.columns.values())
    outside = sum(vid not in catalogue for vid in shelved)
    outside_of = "unknown to the catalogue" if titles else f"clicked fewer than {min_clicks} times"
    print(
        f"{len(index.videos):,} videos ({len(index.videos) - len(old.videos):,} new), "
        f"{len(index.columns):,} columns ({len(index.columns) - len(old.columns):,} new, {empty:,} empty); "
        f"{outside:,} videos of the columns are {outside_of}"
    )
    return index


def grow_index(old, columns, vids):
    """Return the old Index with the vids and the columns {cid: [vid, ...]} that it lacks; a column that went is empty."""
    videos = dict(old.videos)
    for vid in vids:
        videos.setdefault(vid, FIRST_VIDEO + len(videos))
    return Index(videos, {cid: [videos[vid] for vid in columns.get(cid, ())] for cid in {**old.columns, **columns}})


def read_columns(data_dir):
    """Return {cid: [vid, ...]} in the order of the files; a cid that comes again adds its new videos."""
    paths, columns = find_files(data_dir, "cid2vids*"), {}
    others = [path.name for path in Path(data_dir).glob("[!.]*") if path.is_file()]
    others = [name for name in others if not name.startswith(PREFIXES)]
    name_unread(data_dir, others, f"files begin with {' or '.join(PREFIXES)}")
    for cid, vids, _ in read_all(paths, parse_column):
        columns.setdefault(cid, {}).update(dict.fromkeys(vids))
    if not columns:
        raise InputError(f"{Path(data_dir).absolute()}: no columns; put cid2vids*.json files there, as README.md says")
    return {cid: list(vids) for cid, vids in columns.items()}


def read_names(data_dir, vids):
    """Return ({vid: title} of the vids, {cid: name}) as far as the raw data names them; it may be missing or damaged."""
    titles, names = {}, {}
    with contextlib.suppress(InputError, OSError):
        for cid, _, name in read_all(find_files(data_dir, "cid2vids*"), parse_column):
            if name:
                names[cid] = name
        for vid, title in read_all(find_files(data_dir, "vid2title*"), parse_title):
            if title and vid in vids:
                titles[vid] = title
    return titles, names


# ---------------------------------------------------------------- the vocabulary where there is no catalogue


def clicked_videos(data_dir, videos, columns, min_clicks, num_workers=None):
    """Return the videos with at least min_clicks clicks, most clicked first; videos and columns are those known."""
    tallies, clicks, tails = Tallies(), collections.Counter(), set()
    count = functools.partial(count_videos, videos=videos, columns=columns)
    with map_files(count, cut_files(find_files(Path(data_dir, "click_seq"))), "count clicks", num_workers) as results:
        for of_ranges, some_clicks, some_tails in results:
            tallies.extend(of_ranges)
            clicks.update(some_clicks)
            tails |= some_tails
    tallies.check()
    clicks = {text: number for text, number in clicks.items() if 0 < len(text) <= MAX_ID_CHARS}
    own, left_out = own_clicks(clicks, tails, videos)
    if often := sorted(vid for vid, number in left_out.items() if number >= min_clicks):
        print(
            f"{len(often):,} ids, {often[0][:80]!r} for one, are taken for clicks in columns that nobody knows; if they are "
            "videos, write them into a vid2title file",
            file=sys.stderr,
        )
    kept = (vid for vid, number in own.items() if number >= min_clicks)
    return sorted(kept, key=lambda vid: (-own[vid], vid))


def count_videos(ranges, videos, columns):
    """Return ([Tally, ...], clicks of each video, what stood for a column after a known video) of FileRanges."""
    tallies, counts, tails = [], collections.Counter(), set()
    for _, clicks in read_clicks(ranges, tallies):
        for click in clicks:
            vid, cid = split_click(click, videos, columns)
            counts[vid] += 1
            if cid is None and vid != click:
                tails.add(click[len(vid) + 1 :])
    return tallies, counts, tails


def own_clicks(clicks, tails, videos):
    """Return two Counters {video: clicks}, of the videos and of those left out, of the clicks of texts no known column ends.

    "<vid>_<tail>" of a video that was also clicked by itself is a click on that video. A tail that comes after several
    videos is taken for a column that is away, and the text is left out: once in the index, it would be a video for life.
    """
    unknown = [text for text in clicks if text not in videos]
    texts_with = collections.Counter(tail for text in unknown for _, tail in splits(text))
    away = (tails | {tail for tail, texts in texts_with.items() if texts > 1}) - {""}  # no column is called ""
    own, left_out = collections.Counter(), collections.Counter()
    for text, number in clicks.items():
        heads = (head for head, _ in splits(text) if head in clicks or head in videos)
        video = text if text in videos else next(heads, text)
        is_away = video not in videos and any(tail in away for _, tail in splits(video))
        (left_out if is_away else own)[video] += number
    return own, left_out


# ---------------------------------------------------------------- clicks


def split_click(click, videos, columns):
    """Return (vid, cid) of a click "<vid>_<cid>" or (vid, None) of "<vid>", where both ids may contain underscores.

    A known video as a whole is a plain click; else the split with both sides known; else the longest known column
    after an underscore, whose video is unknown; else the longest known video before one, in no known column (then vid
    is not the whole click); else the whole is an unknown video.
    """
    if click in videos:
        return click, None
    vid, _, cid = click.partition("_")
    if vid in videos and cid in columns:  # the usual case, and the first that the loop would find
        return vid, cid
    unknown_video = unknown_column = None
    for vid, cid in splits(click):
        if cid in columns:
            if vid in videos:
                return vid, cid
            unknown_video = unknown_video or (vid, cid)
        elif vid in videos:
            unknown_column = vid, None
    return unknown_video or unknown_column or (click, None)


def splits(text):
    """Yield (head, tail) around each underscore of a text that an id can end before or begin after."""
    at = text.find("_")
    while at >= 0:
        yield text[:at], text[at + 1 :]
        # A head is no id beyond MAX_ID_CHARS, and a tail none before the last so many.
        at = text.find("_", at + 1 if at < MAX_ID_CHARS else max(at + 1, len(text) - MAX_ID_CHARS - 1))


# ---------------------------------------------------------------- one line of each raw format


def parse_column(record):
    """{"cid", "vids", "name"} -> (cid, [vid, ...], name); vids may be one string, separated by commas."""
    vids = record["vids"]
    if type(vids) is str:
        vids = [vid.strip() for vid in vids.split(",")]
    if type(vids) is not list:
        raise BadLine("wrong type of vids")
    name = record.get("name")
    vids = [text_id(vid, "vids") for vid in vids if vid != ""]
    return text_id(record["cid"], "cid"), vids, name if type(name) is str else None


def parse_title(record):
    """{"vid", "title"} -> (vid, title); a title of null costs the title alone."""
    title = record["title"]
    if type(title) is not str and title is not None:
        raise BadLine("wrong type of title")
    return text_id(record["vid"], "vid"), title


def parse_clicks(record):
    """{"uid", "click_seq"} -> (uid, [click, ...])."""
    clicks = record["click_seq"]
    if type(clicks) is not list or not (types := set(map(type, clicks))) <= {str, int}:
        raise BadLine("wrong type of click_seq")
    return text_id(record["uid"], "uid"), list(map(str, clicks)) if int in types else clicks


def text_id(value, key):
    """Return an id as text: a string as it is, an integer in decimal."""
    text = str(value) if type(value) is int else value
    if type(text) is not str:
        raise BadLine(f"wrong type of {key}")
    if not 0 < len(text) <= MAX_ID_CHARS:
        raise BadLine("id too long" if text else "empty id")
    return text


# ---------------------------------------------------------------- toolbox: the index


class Index(NamedTuple):
    """Numbers of the videos {vid: number} and, in order, of each column's videos {cid: [number, ...]}."""

    videos: dict
    columns: dict

    def fingerprint(self, num_videos=None, num_columns=None):
        """Return what identifies the first so many numbers given; of a grown index it is the same."""
        videos, columns = list(self.videos)[:num_videos], list(self.columns)[:num_columns]
        return {"videos": len(videos), "columns": len(columns), "sha256": fingerprint(videos, columns)}

    def check(self, made_with, path, script):
        """Refuse the file at path, made with the index of that fingerprint, unless this index is that one, grown perhaps."""
        now = self.fingerprint(made_with["videos"], made_with["columns"])
        check_same(path, {"indexing/vid2idx.json": made_with}, {"indexing/vid2idx.json": now}, script)


def load_index(work_dir=WORK_DIR, new=False):
    """Return the Index under work_dir; a file that is missing is an error, or empty where the index may be new."""
    paths = [Path(work_dir, "indexing", name).absolute() for name in ("vid2idx.json", "cid2vidx.json")]
    gone = [path for path in paths if new and not path.exists()]
    index = Index(*({} if path in gone else read_json(path, "get_indexing.py", "restore it") for path in paths))
    if len(gone) == 1 and any(index):
        raise InputError(
            f"{gone[0]}: gone, though its other half is there; restore it, or remove both to number all anew"
        )
    numbers = range(FIRST_VIDEO, FIRST_VIDEO + len(index.videos))
    if list(index.videos.values()) != list(numbers):
        raise InputError(f"{paths[0]}: its numbers do not count up from {FIRST_VIDEO}; restore the file")
    for cid, videos in index.columns.items():
        if type(videos) is not list or not all(type(video) is int and video in numbers for video in videos):
            raise InputError(f"{paths[1]}: column {cid!r} is no list of numbers of {paths[0].name}; restore the file")
    return index


# ---------------------------------------------------------------- toolbox: counts of lines


class InputError(ValueError):
    """The user's input or files are at fault; the message is the one line to show."""


class BadLine(ValueError):
    """A line to skip; the message is the reason under which it is counted."""


class Tally:
    """Counts of one file's lines: all, skipped by reason, the first few skipped (line number, reason); and a digest.

    The digest is a sum over the lines, so the ranges of a file add up to that of the file, however it was cut.
    """

    def __init__(self, path, digest=0):
        self.path, self.lines, self.skipped, self.first, self.digest = path, 0, collections.Counter(), [], digest

    def count(self, line, offset):
        """Count a line, bytes that begin at that offset of the file."""
        self.lines += 1
        digest = hashlib.blake2b(line, digest_size=32, salt=offset.to_bytes(16, "big")).digest()
        self.digest = (self.digest + int.from_bytes(digest, "big")) % (1 << 256)

    def skip(self, reason):
        """Count the line just read as skipped."""
        self.skipped[reason] += 1
        if reason != "blank" and len(self.first) < 3:
            self.first.append((self.lines, reason))

    def append(self, tally):
        """Add the counts of the byte range that follows in the file."""
        self.first = (self.first + [(self.lines + line, reason) for line, reason in tally.first])[:3]
        self.lines += tally.lines
        self.skipped.update(tally.skipped)
        self.digest = (self.digest + tally.digest) % (1 << 256)

    def hexdigest(self):
        """Return what identifies the lines counted."""
        return f"{self.digest:064x}"

    def check(self):
        """Report the skipped lines of the whole file, blank ones apart; raise InputError if they are too many."""
        bad = self.skipped.total() - self.skipped["blank"]
        if not bad:
            return
        places = ", ".join(f"line {line}: {reason}" for line, reason in self.first)
        message = f"{self.path}: {bad:,} of {self.lines:,} lines are bad ({places}{', ...' if bad > 3 else ''})"
        if bad > MAX_BAD_FRACTION * self.lines:
            raise InputError(f"{message}, more than MAX_BAD_FRACTION = {MAX_BAD_FRACTION}; mend the file")
        print(f"{message}: skipped", file=sys.stderr)


class Tallies(dict):
    """{path: Tally of the whole file}, put together from those of its ranges, which must come in order."""

    def extend(self, tallies):
        """Add the Tallies of the ranges that follow."""
        for tally in tallies:
            self.setdefault(tally.path, Tally(tally.path)).append(tally)

    def check(self):
        """Report on the skipped lines of each file, as Tally.check() does."""
        for tally in self.values():
            tally.check()

    def digests(self):
        """Return {file name: digest}: the content of the files, however they were cut and whatever folder holds them."""
        return {Path(path).name: tally.hexdigest() for path, tally in self.items()}


# ---------------------------------------------------------------- toolbox: reading


def read_all(paths, parse):
    """Yield parse(record) of each good line of the files; the bad ones are reported."""
    for path in paths:
        tally = Tally(path)
        yield from read_records(tally, parse)
        tally.check()


def find_files(folder, pattern="*"):
    """Return the paths of folder's files of that name that end in ENDINGS, by name; the others are named.

    Without a pattern there must be one.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise InputError(
            f"{folder.absolute()}: no such folder; put the raw data there or edit the constant that names it"
        )
    paths, others = {}, []
    for path in sorted(folder.glob(pattern)):
        if path.name.startswith("."):
            continue
        if not path.name.endswith(ENDINGS) or path.is_dir():
            others.append(path.name)
        elif (name := input_name(path)) in paths:
            raise InputError(f"{path} and {paths[name]} have the same name; remove one")
        else:
            paths[name] = str(path.absolute())
    name_unread(folder, others, f"files end in {', '.join(ENDINGS)}")
    if pattern == "*" and not paths:
        raise InputError(f"{folder.absolute()}: no .json, .jsonl, .json.gz or .jsonl.gz file")
    return list(paths.values())


def name_unread(folder, names, rule):
    """Print the first of the names of files in the folder that are not read, and the rule that they break."""
    if names:
        few = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        print(f"{folder}: {len(names):,} not read ({few}); {rule}", file=sys.stderr)


def input_name(path):
    """Return a file's name without its ending."""
    return Path(path).name.removesuffix(".gz").removesuffix(".json").removesuffix(".jsonl")


class FileRange(NamedTuple):
    """The lines that begin in bytes [start, end) of a file; end is None to the end, of a compressed file."""

    path: str
    start: int = 0
    end: int | None = None


def cut_files(paths, range_bytes=RANGE_BYTES):
    """Return the tasks that cover the files, lists of FileRanges of range_bytes or so between them.

    A large file is cut, small ones are put together, and a compressed one stays whole.
    """
    return put_together((part for path in paths for part in cut_file(path, range_bytes)), range_bytes)


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


def cut_file(path, range_bytes):
    """Yield (FileRange, how many bytes it unpacks to) of a file, in order."""
    size = os.path.getsize(path)
    if path.endswith(".gz"):
        yield FileRange(path), size * UNPACKS_TO
        return
    for start in range(0, max(size, 1), range_bytes):
        yield FileRange(path, start, start + range_bytes), min(size - start, range_bytes)


def read_clicks(ranges, tallies):
    """Yield (uid, [click, ...]) of the good lines of FileRanges, in order; tallies, a list, gets the Tally of each."""
    for file_range in ranges:
        tallies.append(Tally(file_range.path))
        yield from read_records(tallies[-1], parse_clicks, file_range)


def read_records(tally, parse, file_range=None):
    """Yield parse(record) of the good lines of a FileRange, of the whole tally.path without; all count in the tally."""
    for line, offset in read_lines(file_range or FileRange(tally.path)):
        tally.count(line, offset)
        try:
            if len(line) > MAX_LINE_BYTES:
                raise BadLine("too long")
            text = line.decode("utf-8-sig" if offset == 0 else "utf-8")
            record = json.loads(text)
            if type(record) is not dict:
                raise BadLine("wrong type of line")
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
            tally.skip("not JSON" if text.strip() else "blank")
        else:
            yield parsed


def read_lines(file_range):
    """Yield (line, offset in the file) of a FileRange, as bytes; of a line over MAX_LINE_BYTES only its beginning."""
    path, start, end = file_range
    end = math.inf if end is None else end
    if path.endswith(".gz") and not os.path.getsize(path):
        raise InputError(f"{path}: an empty gzip file; copy it again")
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            at, begins = start, True  # whether a line begins here
            if start:  # the line under way at `start` belongs to the range before
                at, begins = file.seek(start - 1), False
            while at < end and (part := file.readline(MAX_LINE_BYTES + 1 if begins else 1 << 20)):
                if begins:
                    yield part, at
                at += len(part)
                begins = part.endswith(b"\n")
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({error}); copy it again") from error


# ---------------------------------------------------------------- toolbox: writing


@contextlib.contextmanager
def replacing(path, durable=True):
    """Yield a temporary path; what is written there replaces `path` whole if the block ends well.

    It is synced to disk, unless it is not `durable`: a file that is known by its hash, and made again where it is cut.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.{uuid.uuid4().hex}.tmp")
    try:
        yield temporary
        if durable:
            sync(temporary)
        os.replace(temporary, path)
        if durable:
            sync(path.parent)
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder, pattern=f".*.{'[0-9a-f]' * 32}.tmp", kept=()):
    """Remove folder's files of a pattern, by default those of replacing() that a killed run left, but for names kept."""
    for path in Path(folder).glob(pattern):
        if path.name not in kept and path.is_file():
            path.unlink(missing_ok=True)  # another worker of a cluster may be as far


def sync(path):
    """Wait until a file or folder is on disk, where its file system can do that."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOSYS, errno.ENOTSUP):
            raise
    finally:
        os.close(descriptor)


def write_json(path, value):
    """Replace path by value as JSON."""
    with replacing(path) as temporary:
        text = json.dumps(value, ensure_ascii=False)
        temporary.write_text(text, encoding="utf-8", errors="surrogatepass")  # file names need not be UTF-8


def read_json(path, script, cure="remove it"):
    """Return the JSON object of a file that `script` writes; of a damaged one it is said what to do."""
    path = Path(path).absolute()
    try:
        value = json.loads(path.read_text(encoding="utf-8", errors="surrogatepass"))
        if type(value) is not dict:
            raise ValueError("not an object")
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{path}: no such file; run {script} first") from error
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: damaged ({error}); {cure} and run {script} again") from error
    return value


# ---------------------------------------------------------------- toolbox: custody


def fingerprint(*parts):
    """Return the SHA-256 of values as JSON."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def file_fingerprint(path):
    """Return the SHA-256 of a file's bytes."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(1 << 20):
            digest.update(part)
    return digest.hexdigest()


def check_same(path, made_with, now, script):
    """Refuse the file at path where an entry of what it was made with, a dict, is another now."""
    for name, value in now.items():
        if made_with.get(name) != value:
            raise InputError(f"{path}: made with {name} = {made_with.get(name)}, now it is {value}; run {script} again")


# ---------------------------------------------------------------- toolbox: rules of constants


def check_constants():
    """Refuse a constant, of the script that was started or of those that it imports, which breaks one of its rules."""
    modules = [sys.modules[name] for name in ("__main__", *CHAIN) if hasattr(sys.modules.get(name), "rules")]
    for module in modules:
        for rule, names in module.rules.items():
            for name in names:
                if not keeps(value := getattr(module, name), rule):
                    raise InputError(f"{name} = {value!r} in {Path(module.__file__).name}: it must be {rule}")


def keeps(value, rule):
    """Return whether a constant's value is what the rule says, in one of the forms below."""
    if rule.startswith("None or "):
        return value is None or keeps(value, rule.removeprefix("None or "))
    if rule.startswith("a tuple, not empty, of "):
        return type(value) is tuple and value != () and all(keeps(one, rule.partition(" of ")[2]) for one in value)
    if rule.startswith("one of "):
        return repr(value) in rule.removeprefix("one of ").split(", ")
    if rule == "a path, without ~":
        return type(value) is str and value != "" and not value.startswith("~")
    kind, _, interval = rule.partition(" in ")
    if type(value) not in {"a whole number": (int,), "a number": (int, float)}[kind]:
        return False
    low, high = map(float, interval[1:-1].split(","))
    return low < value < high or (value == low and interval[0] == "[") or (value == high and interval[-1] == "]")


# ---------------------------------------------------------------- toolbox: workers


@contextlib.contextmanager
def map_files(function, tasks, desc, num_workers=NUM_WORKERS):
    """Give function(task) of each task, in order, to iterate over, computed by spawned worker processes.

    Started by spark-submit, the Spark cluster computes them. The function, a functools.partial say, is sent to each worker
    once; a task may be tried twice, even at the same time. Where the block ends, however, no worker is left.
    """
    num_workers = min(num_workers or count_cores(), len(tasks))
    if "PYSPARK_GATEWAY_PORT" in os.environ:
        yield map_on_spark(function, tasks)
    elif num_workers <= 1:
        yield progress(map(function, tasks), len(tasks), desc, "part")
    else:
        with map_on_workers(function, tasks, num_workers) as results:
            yield progress(results, len(tasks), desc, "part")


@contextlib.contextmanager
def map_on_workers(function, tasks, num_workers):
    """Give function(task) of each task, as map_files() does, computed by so many processes."""
    import multiprocessing
    from concurrent.futures import ProcessPoolExecutor
    from concurrent.futures.process import BrokenProcessPool

    os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")  # numpy in the workers, which are as many as the cores
    try:
        pool = ProcessPoolExecutor(num_workers, multiprocessing.get_context("spawn"), start_worker, (function,))
    except (OSError, RuntimeError) as error:  # where no semaphore can be made
        cure = "set NUM_WORKERS = 1 in get_indexing.py"
        raise InputError(f"no worker process can be had, for lack of /dev/shm perhaps ({error}); {cure}") from error
    try:
        first, rest = tasks[: TASKS_AHEAD * num_workers], tasks[TASKS_AHEAD * num_workers :]
        with signals_waiting():
            pool._launch_processes()  # all before any task: CPython 3.11 trips where one dies while it starts another
            waiting = collections.deque(pool.submit(run_task, task) for task in first)
        yield in_turn(pool, waiting, rest)
    except BrokenProcessPool as error:
        died = "a worker process died, for lack of memory perhaps"
        raise InputError(f"{died}; run again, or lower NUM_WORKERS") from error
    finally:
        workers = list(pool._processes.values())
        for worker in workers:
            worker.kill()
        pool._result_queue._writer.close()  # else half a result, of a killed worker, would be waited for
        pool.shutdown(cancel_futures=True)
        for worker in workers:
            worker.join()


@contextlib.contextmanager
def signals_waiting():
    """Let SIGINT and SIGTERM, whichever thread they reach, wait for the end of the block, in which workers are started.

    The workers inherit that they are blocked, and leave Ctrl-C to this process.
    """
    came, in_main = [], threading.current_thread() is threading.main_thread()
    numbers = (signal.SIGINT, signal.SIGTERM) if in_main else ()  # Python handles them in the main thread alone
    before = signal.pthread_sigmask(signal.SIG_BLOCK, numbers)
    handlers = [signal.signal(number, lambda number, _: came.append(number)) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, handlers, strict=True):
            signal.signal(number, handler)
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
        for number in came:
            signal.raise_signal(number)


def in_turn(pool, waiting, tasks):
    """Yield the results of the tasks that wait, a deque of futures, and of those that follow, each handed out in its turn."""
    for task in tasks:
        yield waiting.popleft().result()
        waiting.append(pool.submit(run_task, task))
    while waiting:
        yield waiting.popleft().result()


def progress(items, total, desc, unit):
    """Return items with a progress bar, which is seen on a terminal only and goes when it is done."""
    from tqdm import tqdm

    return tqdm(items, total=total, desc=desc, unit=unit, leave=False, disable=None)


def start_worker(function):
    """Make this process a worker, which ends when the one that started it does, however that ended."""
    import multiprocessing

    def end_with_parent():
        multiprocessing.parent_process().join()
        os._exit(1)

    threading.Thread(target=end_with_parent, daemon=True).start()
    os.environ["CUDA_VISIBLE_DEVICES"] = "-1"  # the workers would fight over it
    run_task.function = function


def run_task(task):
    """Return what a worker's function makes of a task."""
    return run_task.function(task)


def map_on_spark(function, tasks):
    """Yield function(task) of each task, in order, computed by the executors, which import function's own script."""
    from pyspark import SparkContext

    shared = importlib.import_module("get_indexing")  # this module as the executors know it, not as __main__
    work = functools.partial(function)  # flat, where the function is one already
    script = Path(sys.argv[0]).stem if work.func.__module__ == "__main__" else work.func.__module__
    attempt = functools.partial(shared.attempt, script, work.func.__name__, work.args, work.keywords)
    context = SparkContext.getOrCreate()
    at_once = 8 * context.defaultParallelism  # results that wait here
    for start in range(0, len(tasks), at_once):
        part = tasks[start : start + at_once]
        for outcome in context.parallelize(part, len(part)).map(attempt).collect():
            if isinstance(outcome, shared.InputError | OSError):
                raise InputError(outcome)
            yield outcome


def attempt(script, name, args, keywords, task):
    """Return what the script's function of that name makes of a task, or the error that is worth one line."""
    try:
        return getattr(importlib.import_module(script), name)(*args, task, **keywords)
    except (InputError, OSError) as error:
        return error


def count_cores():
    """Return how many cores this process may use: those of its affinity, within its control group's share of time."""
    cores = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):  # macOS has none
        cores = len(os.sched_getaffinity(0))
    try:
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        return max(1, min(cores, int(quota) // int(period)))
    except (OSError, ValueError):  # no control group, or one without a limit
        return cores


# ---------------------------------------------------------------- toolbox: running


def cluster_worker():
    """Return (this process's number, how many there are) in the training cluster of TF_CONFIG; (0, 1) without one."""
    try:
        config = json.loads(os.environ.get("TF_CONFIG") or "{}")
        cluster, task = config.get("cluster"), config.get("task", {})
        if not cluster:
            return 0, 1
        workers = [(kind, n) for kind in ("chief", "worker") for n in range(len(cluster.get(kind, [])))]
        return workers.index((task.get("type", "worker"), int(task.get("index", 0)))), len(workers)
    except (ValueError, AttributeError, TypeError) as error:
        raise InputError(f"TF_CONFIG names no chief or worker of its cluster ({error}); see README.md") from error


def run_script(main):
    """Run a script's main(): what is the input's fault, and a signal, end with one line and exit status 1."""
    name = Path(sys.argv[0]).name
    open_closed_streams()
    if sys.argv[1:] == ["--help"]:
        print(sys.modules["__main__"].__doc__)
        return
    if sys.argv[1:]:
        sys.exit(f"{name}: takes no arguments, not {' '.join(sys.argv[1:])!r}; edit the constants at its top")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True, errors="backslashreplace")

    def stop(number, _):
        raise KeyboardInterrupt("terminated" if number == signal.SIGTERM else "interrupted")

    for number in (signal.SIGTERM, signal.SIGINT):
        signal.signal(number, stop)
    try:
        check_constants()
        main()
    except (InputError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"{name}: {error}")


def open_closed_streams():
    """Open what a shell closed (<&- >&- 2>&-), for workers too: else a file gets its number, and what is printed."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # it gets the lowest number that is free
            setattr(sys, name, os.fdopen(descriptor, "r+", closefd=False))


@contextlib.contextmanager
def only_one(work_dir=WORK_DIR, each_worker=False):
    """Let no second script of this name work in work_dir meanwhile, or only one as each worker of a cluster."""
    name, work_dir = Path(sys.argv[0]).name, Path(work_dir)
    number = cluster_worker()[0] if each_worker else 0
    work_dir.mkdir(parents=True, exist_ok=True)
    with open(work_dir / f".{name}{number or ''}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another {name} is at work in {work_dir.absolute()}; let it end") from error
        except OSError as error:  # a file system without locks
            print(f"{name}: {work_dir.absolute()} cannot be locked ({error}); run one at a time", file=sys.stderr)
        yield


@only_one()
def main():
    get_indexing()


if __name__ == "__main__":
    run_script(main)
