"""Number the videos and the columns: the first step of the chain.

Reads   DATA_DIR/cid2vids*    {"cid": "c7", "vids": ["v1", "v2"], "name": "..."}     a JSON line each; files end in
        DATA_DIR/vid2title*   {"vid": "v1", "title": "..."}           (optional)    .json or .jsonl, plain or .gz
Writes  WORK_DIR/indexing/vid2idx.json  {"v1": 2, ...}        0 is padding, 1 any unknown video
        WORK_DIR/indexing/cid2vidx.json {"c7": [2, 3], ...}   a column's number is its place, from 1

    python get_indexing.py

Numbers are for life: a later run keeps every number given, appends what is new and empties the columns that went.
The second half of this file is what all six scripts share: the index, reading lines, writing, custody, constants, running.
"""

import codecs
import collections
import contextlib
import dataclasses
import fcntl
import gzip
import hashlib
import importlib
import itertools
import json
import math
import os
import signal
import sys
import types
import typing
import uuid
import zlib
from pathlib import Path
from typing import Annotated, Final, NamedTuple

OrZero = Annotated[int, 0]  # the type of a constant that is a whole number and may be 0

DATA_DIR: str = "data/sample"  # raw input
WORK_DIR: str = "data/work"  # everything that the scripts write; a path that every machine sees
MAX_BAD_FRACTION: float = 0.01  # of a file's lines; more bad lines stop the run
MAX_LINE_BYTES: int = 32 << 20  # a longer line is skipped: about 2.5 million clicks of one user
MAX_ID_CHARS: int = 1000  # of a user, video or column, whose line is skipped beyond

PAD: Final = 0  # as a video number padding, as a column number no column
UNKNOWN: Final = 1  # any unknown video
FIRST_VIDEO: Final = 2
ENDINGS: Final = (".json", ".jsonl", ".json.gz", ".jsonl.gz")  # of all files that are read
CHAIN: Final = ("get_indexing", "get_tfrecord", "get_dataset", "model_tf2", "train", "infer")
RUNNING: Final = {  # the constants that only concern running: all others shape a result, and a change of them makes it anew
    "DATA_DIR", "WORK_DIR", "CLICKS_DIR", "RANKING_DIR", "MAX_BAD_FRACTION", "NUM_WORKERS", "TASKS_AHEAD", "PARSE_BLOCK",
    "COLUMNS_AT_ONCE", "SCORES_AT_ONCE", "CLUSTER_TIMEOUT", "RANK_BYTES", "BATCH_USERS", "GZIP_LEVEL", "EXAMPLE",
}  # fmt: skip

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")  # read when TensorFlow is imported: fewer lines of its own
os.environ.setdefault("TF_FORCE_GPU_ALLOW_GROWTH", "true")  # a GPU's memory is taken as needed, not whole
os.environ["KERAS_BACKEND"] = "tensorflow"  # whatever the user's other projects need


def get_indexing(data_dir=DATA_DIR, work_dir=WORK_DIR):
    """Write the index of data_dir's videos and columns, continuing the one that stands, and return it."""
    folder = Path(work_dir, "indexing")
    name_unread(data_dir, ("cid2vids", "vid2title"))
    old, columns = load_index(work_dir, new=True), read_columns(data_dir)
    catalogue = dict.fromkeys(vid for vid, _ in read_all(data_dir, "vid2title", parse_title))
    shelved = dict.fromkeys(itertools.chain.from_iterable(columns.values()))
    videos = dict(old.videos)
    for vid in itertools.chain(shelved, catalogue):
        videos.setdefault(vid, FIRST_VIDEO + len(videos))
    shelves = {cid: [videos[vid] for vid in columns.get(cid, ())] for cid in {**old.columns, **columns}}
    index = Index(videos, shelves)
    if not videos:
        raise InputError(f"{Path(data_dir).absolute()}: no video in any column or catalogue")
    remove_leftovers(folder)
    # Videos first: killed in between, the old columns, none at first, still stand for the same videos.
    if not old.videos:
        write_json(folder / "cid2vidx.json", {})
    write_json(folder / "vid2idx.json", index.videos)
    write_json(folder / "cid2vidx.json", index.columns)
    empty = sum(not vids for vids in index.columns.values())
    shown = [cid for cid, vids in old.columns.items() if vids]
    if went := sum(not index.columns[cid] for cid in shown):
        warn(f"{went:,} of {len(shown):,} columns went since the last index: they are ranked no more")
    unknown = f"{sum(vid not in catalogue for vid in shelved):,} videos of the columns are unknown to the catalogue"
    new_videos, new_columns = len(index.videos) - len(old.videos), len(index.columns) - len(old.columns)
    print(f"{len(index.videos):,} videos ({new_videos:,} new), {len(index.columns):,} columns ({new_columns:,} new, "
          f"{empty:,} empty); {unknown if catalogue else 'there is no catalogue'}")  # fmt: skip
    return index


def read_columns(data_dir):
    """Return {cid: [vid, ...]} in the order of the files; a cid that comes again adds its new videos."""
    columns = {}
    for cid, vids, _ in read_all(data_dir, "cid2vids", parse_column):
        columns.setdefault(cid, {}).update(dict.fromkeys(vids))
    if not columns:
        raise InputError(f"{Path(data_dir).absolute()}: no columns; put cid2vids*.json files there, as README.md says")
    return {cid: list(vids) for cid, vids in columns.items()}


def read_names(data_dir, vids):
    """Return ({vid: title} of the vids, {cid: name}) as far as the raw data names them; it may be missing or damaged."""
    titles, names = {}, {}
    with contextlib.suppress(InputError, OSError):
        for path in find_files(data_dir, "cid2vids"):
            names |= {cid: name for cid, _, name in Records(path, parse_column) if name}
        for path in find_files(data_dir, "vid2title"):
            titles |= {vid: title for vid, title in Records(path, parse_title) if title and vid in vids}
    return titles, names


def read_all(data_dir, prefix, parse):
    """Yield parse(record) of each good line of the files of that prefix; the bad ones are reported."""
    for path in find_files(data_dir, prefix):
        records = Records(path, parse)
        yield from records
        records.tally.check()


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


def text_id(value, key):
    """Return an id as text: a string as it is, an integer in decimal."""
    text = str(value) if type(value) is int else value
    if type(text) is not str:
        raise BadLine(f"wrong type of {key}")
    if not 0 < len(text) <= MAX_ID_CHARS:
        raise BadLine("id too long" if text else "empty id")
    return text


# ---------------------------------------------------------------- shared by all scripts: the index


class Index(NamedTuple):
    """Numbers of the videos {vid: number} and, in order, of each column's videos {cid: [number, ...]}."""

    videos: dict
    columns: dict

    def fingerprint(self, num_videos=None, num_columns=None):
        """Return what identifies the first so many numbers given; of a grown index it is the same."""
        videos, columns = list(self.videos)[:num_videos], list(self.columns)[:num_columns]
        return {"videos": len(videos), "columns": len(columns), "sha256": fingerprint(videos, columns)}


def load_index(work_dir=WORK_DIR, new=False):
    """Return the Index under work_dir; a file that is missing is an error, or empty where the index may be new."""
    paths = [Path(work_dir, "indexing", name).absolute() for name in ("vid2idx.json", "cid2vidx.json")]
    gone = [path for path in paths if new and not path.exists()]
    index = Index(*({} if path in gone else read_json(path, "get_indexing.py", "restore it") for path in paths))
    if len(gone) == 1 and any(index):
        raise InputError(f"{gone[0]}: gone, its other half is not; restore it, or remove both to number all anew")
    numbers = range(FIRST_VIDEO, FIRST_VIDEO + len(index.videos))
    if list(index.videos.values()) != list(numbers):
        raise InputError(f"{paths[0]}: its numbers do not count up from {FIRST_VIDEO}; restore the file")
    for cid, videos in index.columns.items():
        if type(videos) is not list or not all(type(video) is int and video in numbers for video in videos):
            raise InputError(f"{paths[1]}: column {cid!r} is no list of numbers of {paths[0].name}; restore the file")
    return index


# ---------------------------------------------------------------- shared by all scripts: reading


class InputError(ValueError):
    """The user's input or files are at fault; the message is the one line to show."""


class BadLine(ValueError):
    """A line to skip; the message is the reason under which it is counted."""


@dataclasses.dataclass
class Tally:
    """Counts of the lines of a file, or of a byte range of it; those of ranges that follow each other add up."""

    path: str
    lines: int = 0
    skipped: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # by reason
    first: list = dataclasses.field(default_factory=list)  # the first few that were skipped: (line number, reason)

    def __add__(self, following):
        first = [*self.first, *((self.lines + line, reason) for line, reason in following.first)][:3]
        return Tally(self.path, self.lines + following.lines, self.skipped + following.skipped, first)

    def check(self):
        """Report the skipped lines, blank ones apart; raise InputError if they are too many."""
        bad = self.skipped.total() - self.skipped["blank"]
        if not bad:
            return
        places = ", ".join(f"line {line}: {reason}" for line, reason in self.first)
        message = f"{self.path}: {bad:,} of {self.lines:,} lines are bad ({places}{', ...' if bad > 3 else ''})"
        if bad > MAX_BAD_FRACTION * self.lines:
            raise InputError(f"{message}, more than MAX_BAD_FRACTION = {MAX_BAD_FRACTION}; mend the file")
        warn(f"{message}: skipped")


class Records:
    """The good lines of a file, or those that begin in its bytes [start, end), each as parse(record) returns it.

    While they are iterated over, `tally` counts all lines; parse raises BadLine or KeyError where one is to be skipped.
    """

    def __init__(self, path, parse, start=0, end=math.inf):
        self.lines, self.parse, self.tally = read_lines(path, start, end), parse, Tally(path)

    def __iter__(self):
        for line in self.lines:
            self.tally.lines += 1
            try:
                yield self.parse(load_record(line))
            except (BadLine, KeyError) as error:
                reason = f"no {error.args[0]}" if type(error) is KeyError else str(error)
                self.tally.skipped[reason] += 1
                if reason != "blank" and len(self.tally.first) < 3:
                    self.tally.first.append((self.tally.lines, reason))


def load_record(line):
    """Return the JSON object of a line, bytes; a BadLine says what is wrong with it."""
    if len(line) > MAX_LINE_BYTES:
        raise BadLine("too long")
    try:
        text = line.decode()
        record = json.loads(text)
        if "\\u" in text:  # an escaped half of a character has no UTF-8
            json.dumps(record, ensure_ascii=False).encode()
    except UnicodeError as error:
        raise BadLine("not UTF-8") from error
    except (ValueError, RecursionError) as error:
        raise BadLine("not JSON" if text.strip() else "blank") from error
    if type(record) is not dict:
        raise BadLine("wrong type of line")
    return record


def read_lines(path, start=0, end=math.inf):
    """Yield the lines, as bytes, that begin in bytes [start, end) of a file, unpacked and without a byte order mark.

    Of a line over MAX_LINE_BYTES only its beginning is read into memory.
    """
    with open_unpacked(path) as file:
        if start:  # the line under way at `start` belongs to the range before
            file.seek(start - 1)
            skip_line(file, end)
        while (offset := file.tell()) < end and (line := file.readline(MAX_LINE_BYTES + 1)):
            yield line if offset else line.removeprefix(codecs.BOM_UTF8)
            if not line.endswith(b"\n"):
                skip_line(file, end)


def skip_line(file, end):
    """Read on to the end of the line under way, or past `end`."""
    while file.tell() < end and (part := file.readline(1 << 20)) and not part.endswith(b"\n"):
        pass


@contextlib.contextmanager
def open_unpacked(path):
    """Open a plain or gzip file of raw data for reading bytes; one that is empty or cut short raises InputError."""
    if not os.path.getsize(path):
        raise InputError(f"{path}: an empty file; copy it again, or remove it")
    try:
        with gzip.open(path) if path.endswith(".gz") else open(path, "rb") as file:
            yield file
    except (EOFError, gzip.BadGzipFile, zlib.error) as error:
        raise InputError(f"{path}: not a whole gzip file ({error}); copy it again") from error


def find_files(folder, prefix=""):
    """Return the paths of folder's files that are read, by name: of that prefix, and ending in ENDINGS."""
    folder, paths = Path(folder), {}
    if not folder.is_dir():
        raise InputError(f"{folder.absolute()}: no such folder; put raw data there or edit the constant that names it")
    for path in sorted(folder.glob("[!.]*")):
        if path.name.startswith(prefix) and path.name.endswith(ENDINGS) and not path.is_dir():
            if (name := input_name(path)) in paths:
                raise InputError(f"{path} and {paths[name]} have the same name; remove one")
            paths[name] = str(path.absolute())
    return list(paths.values())


def name_unread(folder, prefixes=("",)):
    """Print the first of the names in the folder that are not read, and the rule; with prefixes no folder is one."""
    others = [path for path in Path(folder).glob("[!.]*") if path.is_file() or prefixes == ("",)]
    names = [p.name for p in others if p.is_dir() or not (p.name.startswith(prefixes) and p.name.endswith(ENDINGS))]
    if names:
        few = ", ".join(sorted(names)[:5]) + (", ..." if len(names) > 5 else "")
        rule = f"their names begin with {' or '.join(prefixes)} and " if any(prefixes) else "the names of files "
        warn(f"{folder}: {len(names):,} not read ({few}); {rule}end in {', '.join(ENDINGS)}")


def input_name(path):
    """Return a file's name without its ending."""
    return Path(path).name.removesuffix(".gz").removesuffix(".json").removesuffix(".jsonl")


# ---------------------------------------------------------------- shared by all scripts: writing


@contextlib.contextmanager
def replacing(path, durable=True):
    """Yield a temporary path; what is written there replaces `path` whole if the block ends well. An OSError names it.

    It is synced to disk, unless it is not `durable`: a file that is known by its hash, and made again where it is cut.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".tmp.{uuid.uuid4().hex}.{path.name}")  # Keras and numpy look at a name's ending
    try:
        yield temporary
        if durable:
            with open(temporary, "rb") as file:
                os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError as error:
        if error.filename:
            raise
        message = f"{path}: cannot be written ({error.strerror or error}); make room there and run again"
        raise OSError(message) from error
    finally:
        temporary.unlink(missing_ok=True)


def remove_leftovers(folder, pattern=f".tmp.{'[0-9a-f]' * 32}.*", kept=()):
    """Remove folder's files of a pattern, by default those of replacing() that a killed run left, but for names kept."""
    for path in Path(folder).glob(pattern):
        if path.name not in kept and path.is_file():
            path.unlink(missing_ok=True)  # another worker of a cluster may be as far


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


# ---------------------------------------------------------------- shared by all scripts: custody and constants


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


def constants_of(*modules, **instead):
    """Return {name: value} of the modules' constants that shape a result, all but those RUNNING, or the values instead."""
    homes = {name: module for name, (module, _) in all_constants().items() if module.__name__ in modules}
    constants = {name: getattr(module, name) for name, module in homes.items() if name not in RUNNING}
    if unknown := instead.keys() - constants.keys():
        raise TypeError(f"no constants that shape a result: {', '.join(sorted(unknown))}")
    return constants | instead


def check_constants():
    """Refuse a constant, of the script that was started or of those that it imports, which its annotation does not fit."""
    for name, (module, kind) in all_constants().items():
        if not fits(value := getattr(module, name), kind):
            kind = "OrZero" if kind is OrZero else kind.__name__ if type(kind) is type else kind
            rule = "a whole number at least 1 (OrZero: 0), another number finite and not negative"
            raise InputError(f"{name} = {value!r} in {Path(module.__file__).name}: it must be {kind}: {rule}")


def all_constants():
    """Return {name: (the module that it is of, its annotation)} of the constants to edit, of all scripts that are imported.

    The module is the first of the chain that has it. Where an edit took the annotation away, any value of its type fits.
    """
    constants = {}
    for module in [sys.modules[name] for name in CHAIN if name in sys.modules]:
        for name, value in vars(module).items():
            if name.isupper() and not isinstance(value, type):
                constants.setdefault(name, (module, module.__annotations__.get(name, type(value))))
    return {name: home for name, home in constants.items() if home[1] is not Final}


def fits(value, kind):
    """Return whether a constant's value is of its annotated kind, and no number is too low, as check_constants() says."""
    one_of, arguments = typing.get_origin(kind), typing.get_args(kind)
    if one_of is types.UnionType:
        return any(fits(value, argument) for argument in arguments)
    if one_of is typing.Literal:
        return type(value) is str and value in arguments
    if one_of is tuple:  # of any length but 0
        return type(value) is tuple and value != () and all(fits(part, arguments[0]) for part in value)
    if kind is float:
        return type(value) in (int, float) and 0 <= value < math.inf
    if kind in (int, OrZero):
        return type(value) is int and value >= (kind is int)
    return type(value) is kind and value != ""


# ---------------------------------------------------------------- shared by all scripts: running


def run_script(path):
    """Run main() of the script at path: what is the input's fault, and a signal, end with one line and exit status 1."""
    script = importlib.import_module(Path(path).stem)  # by its name, not as __main__, so that workers know it too
    name = Path(path).name
    if sys.argv[1:] == ["--help"]:
        print(script.__doc__)
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
        with packages_named():
            check_constants()
            script.main()
    except (InputError, OSError, KeyboardInterrupt) as error:
        sys.exit(f"{name}: {error}")


def warn(line):
    """Print a line that is not lost where the output goes to a file."""
    print(line, file=sys.stderr)


@contextlib.contextmanager
def packages_named():
    """End with one line where an import in the block finds no such package: another Python answers, say."""
    try:
        yield
    except ModuleNotFoundError as error:
        sys.exit(f"{sys.executable}: {error}; run the Python of your environment, or pip install -r requirements.txt")


@contextlib.contextmanager
def only_one(folder, worker=0):
    """Let no second script of this name work in the folder meanwhile; of a cluster's workers each may, by its number."""
    name, folder = Path(sys.argv[0]).name, Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with open(folder / f".{name}{worker or ''}.lock", "w") as lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise InputError(f"another {name} is at work in {folder.absolute()}; let it end") from error
        except OSError as error:  # a file system without locks
            warn(f"{name}: {folder.absolute()} cannot be locked ({error}); run one at a time")
        yield


def main():
    with only_one(WORK_DIR):
        get_indexing()


if __name__ == "__main__":
    importlib.import_module("get_indexing").run_script(__file__)  # where its InputError is that of main()
