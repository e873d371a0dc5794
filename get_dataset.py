"""Turn the shards into batches of padded tensors: a tf.data pipeline of dict features; and count what is in them.

Reads   WORK_DIR/tfrecord/, WORK_DIR/indexing/; run by itself also the titles in DATA_DIR
Writes  nothing; run by itself it prints what is in the data

    python get_dataset.py

A batch is a dict of
    user_feature    int32   [batch, len]   video numbers of a window's clicks, 0 = padding
    user_column     int32   [batch, len]   column numbers of those clicks, 0 = in no column
    user_time       int64   [batch, len]   unix seconds of those clicks, 0 = not known
    user_gap        int32   [batch, len]   how long after each click the next one came, as of gap_buckets()
    asked           int64   [batch, len]   the time of that next one, at which the next column is asked for; 0 = not known
    target_column   int32   [batch, len]   the column clicked next, 0 = no target here
    label           float32 [batch, len]   1.0 where there is a target
    start           int64   [batch]        place of the window in the user's history
    repeated        int64   [batch]        how many of the first clicks are in an earlier window too
    uid             string  [batch]
and for training the column side, drawn fresh for each batch:
    item_column     int32   [items]            column numbers
    item_feature    int32   [items, item_len]  videos that stand for each, 0 = padding
    item_log_prob   float32 [candidates]       the last so many items are candidates: log of how often each is drawn
    target_item     int32   [batch, len]       which item the target is
    trend_row       int64   [batch, len]       row of the moment asked for in the table of a Trend; train.py adds it
"""

import contextlib
import functools
import json
import os
from pathlib import Path
from typing import Final, NamedTuple

from get_indexing import (
    DATA_DIR, FIRST_VIDEO, PAD, WORK_DIR,
    InputError, file_fingerprint, load_index, packages_named, read_json, read_names, run_script,
)  # fmt: skip
from get_tfrecord import (
    FORMAT, NUM_WORKERS, ClickEncoder, describe_index, map_files, put_together, record_constants, split_windows,
)  # fmt: skip

with packages_named():
    import numpy as np
    import tensorflow as tf

BATCH_POSITIONS: int = 2048  # clicks in a batch, padding included; windows of like length share a batch
MIN_STEPS: int = 150  # batches in an epoch: small data gets smaller batches
SHUFFLE_BUFFER: int = 20_000  # windows
PARSE_BLOCK: int = 256  # records parsed in one go
ITEM_MAX_LEN: int = 16  # videos that stand for a column: its most clicked
ITEM_SAMPLE: int = 8  # of them, that a step reads where all are more than a batch's clicks: the first and random others
VIDEO_COLUMNS: int = 4  # columns that a video is known by, of those that show it: the ones of fewest videos
MAX_CANDIDATES: int = 4096  # columns that are all trained against
NUM_NEGATIVES: int = 512  # random columns of a batch, where they are more than MAX_CANDIDATES
MAX_LAG: int = 16  # counting: clicks from one to another that counts as near; no more than a window repeats
NEAR_DECAY: float = 0.7  # counting: weight of what is a click further away, against what is nearer
BACKWARD: float = 0.3  # counting: what a column clicked before a video counts there, one clicked after it counting 1
COUNT_BLOCK: int = 1024  # counting: windows counted at once
COUNT_BYTES: int = 16 << 20  # counting: of shards, the work of one task
MAX_PAIRS: int = 4_000_000  # counting: pairs that are counted exactly
MAX_WIDTH: int = 256  # counting: columns that each video keeps meanwhile, where there are more pairs
MEMORY_WIDTH: int = 64  # counting: columns that each video keeps in the end

DTYPES: Final = {"user_feature": tf.int32, "user_column": tf.int32, "user_time": tf.int64, "label": tf.float32}
WINDOW_SPEC: Final = {name: tf.TensorSpec([None], dtype) for name, dtype in DTYPES.items()}
WINDOW_SPEC |= {"uid": tf.TensorSpec([], tf.string)}
WINDOW_SPEC |= {name: tf.TensorSpec([], tf.int64) for name in ("start", "repeated")}
PADDED_SHAPES: Final = {name: spec.shape for name, spec in WINDOW_SPEC.items()}
DAY: Final = 86_400  # seconds


def load_manifest(work_dir=WORK_DIR, constants=None):
    """Return (manifest, index); records of another format, index or constants are refused, and shards not whole."""
    path, index = Path(work_dir, "tfrecord/manifest.json").absolute(), load_index(work_dir)
    manifest = read_json(path, "get_tfrecord.py")
    check_same(path, manifest, {"format": FORMAT}, "get_tfrecord.py")
    check_same(path, manifest["constants"], constants or record_constants(), "get_tfrecord.py")
    check_same(path, manifest, {"index": describe_index(index)}, "get_tfrecord.py")
    for name, shard in manifest["shards"].items():
        if not (path.parent / name).exists() or (path.parent / name).stat().st_size != shard["bytes"]:
            raise InputError(f"{path.parent / name}: not as {path.name} says; run get_tfrecord.py again")
    return manifest, index


def check_same(path, made_with, now, script):
    """Refuse the file at path where an entry of what it was made with, a dict, is another now."""
    for name, value in now.items():
        if made_with.get(name) != value:
            raise InputError(f"{path}: made with {name} = {made_with.get(name)}, now it is {value}; run {script} again")


def shards_of(manifest, split, work_dir=WORK_DIR):
    """Return the absolute paths of a split's shards: executors of Spark work elsewhere."""
    return [str(Path(work_dir, "tfrecord", name).absolute()) for name in manifest["shards"] if name.startswith(split)]


# ---------------------------------------------------------------- batches


def make_dataset(manifest, work_dir=WORK_DIR, seed=None):
    """Return the batches of the training windows; a seed shuffles them, the same seed in the same way."""
    paths = shards_of(manifest, "train", work_dir)
    shards = tf.data.Dataset.from_tensor_slices(paths)
    if seed is not None:
        shards = shards.shuffle(len(paths), seed)
    records = shards.interleave(tf.data.TFRecordDataset, cycle_length=4, num_parallel_calls=tf.data.AUTOTUNE)
    if seed is not None:
        records = records.shuffle(SHUFFLE_BUFFER, seed)
    windows = records.batch(PARSE_BLOCK).map(parse_block, tf.data.AUTOTUNE).map(drop_single_clicks).unbatch()
    return batch_windows(windows, {int(text): n for text, n in manifest["splits"]["train"]["windows"].items()})


def dataset_from_clicks(users, index, constants):
    """Return the training batches of users, an iterable of Historys, without files: nothing is held out."""
    encoder, windows = ClickEncoder(index), []
    for uid, clicks, times, _ in users:
        of_user = split_windows(uid, *encoder.encode(clicks), times, encoder.current, 0.0, constants)["train"]
        windows += [window for window in of_user if len(window["label"]) > 1]
    lengths = dict(enumerate(np.bincount([len(window["label"]) for window in windows]).tolist()))
    dataset = tf.data.Dataset.from_generator(lambda: iter(windows), output_signature=WINDOW_SPEC)
    return batch_windows(dataset, lengths)


@tf.function(autograph=False)  # traced once, not in every epoch
def parse_block(serialized):
    """Serialized records [block] -> window features [block, len], all parsed by one call and padded to the longest."""
    of_window = {name: tf.io.FixedLenFeature([], WINDOW_SPEC[name].dtype) for name in WINDOW_SPEC.keys() - DTYPES}
    of_clicks = {name: tf.io.RaggedFeature(tf.float32 if name == "label" else tf.int64) for name in DTYPES}
    context, lists, _ = tf.io.parse_sequence_example(serialized, of_window, of_clicks)
    window = {name: tf.cast(lists[name].merge_dims(1, 2).to_tensor(), dtype) for name, dtype in DTYPES.items()}
    shape = tf.shape(window["user_feature"])
    gaps = tf.pad(window["user_time"], [[0, 0], [0, shape[1] - tf.shape(window["user_time"])[1]]])
    times = tf.where(window["user_feature"] != PAD, tf.cumsum(gaps, axis=1), 0)  # they are stored as differences
    return context | window | {"user_time": times}


@tf.function(autograph=False)
def drop_single_clicks(block):
    """Leave out the windows in which no click follows another: they are there to be counted."""
    follows = tf.reduce_any(block["user_feature"][:, 1:] > 0, axis=1)
    return {name: tf.boolean_mask(value, follows) for name, value in block.items()}


def bucket_windows(lengths):
    """Return (bounds of the buckets, batch size in each, batches in an epoch) for {length: number of windows}.

    Windows of one click are left out. A batch holds about BATCH_POSITIONS clicks of windows whose lengths differ by less
    than a factor of two, but for the shortest; so little is padding.
    """
    bounds = sorted({-(-max(lengths) // 2**k) for k in range(5)})  # the longest window of each bucket
    windows = np.zeros(len(bounds), int)
    for length, number in lengths.items():
        windows[np.searchsorted(bounds, length)] += number if length > 1 else 0
    positions = min(BATCH_POSITIONS, int(windows @ bounds) // MIN_STEPS)
    sizes = [max(1, positions // bound) for bound in bounds]
    return bounds, sizes, int(np.ceil(windows / sizes).sum())


def batch_windows(windows, lengths):
    """Return a dataset of batches of like length, whose size is known, with the targets; see bucket_windows()."""
    bounds, sizes, steps = bucket_windows(lengths)
    batches = windows.bucket_by_sequence_length(
        lambda window: tf.math.count_nonzero(window["user_feature"], dtype=tf.int32),
        [bound + 1 for bound in bounds[:-1]], sizes, padded_shapes=PADDED_SHAPES,
    )  # fmt: skip
    return batches.map(add_targets, tf.data.AUTOTUNE).apply(tf.data.experimental.assert_cardinality(steps))


def add_targets(batch):
    """Cut the padding that no window needs, and add what is clicked next at each position, as the page's top says."""
    longest = tf.reduce_max(tf.math.count_nonzero(batch["user_feature"], axis=1))
    batch = batch | {name: batch[name][:, :longest] for name in DTYPES}
    following, asked = (tf.pad(batch[name][:, 1:], [[0, 0], [0, 1]]) for name in ("user_column", "user_time"))
    return batch | {
        "asked": asked,
        "user_gap": gap_buckets(batch["user_time"], asked),
        "target_column": tf.where(batch["label"] > 0, following, 0),
    }


def gap_buckets(times, asked):
    """Return int32: by how many factors of two a moment asked for is after a time, in seconds, from 1; 0: one is not known."""
    gaps = tf.cast(tf.clip_by_value(asked - times, 1, 2**30), tf.float64)
    buckets = 1 + tf.cast(tf.math.log(gaps + 0.5) / tf.math.log(tf.constant(2.0, tf.float64)), tf.int32)
    return tf.where((times > 0) & (asked > 0), buckets, 0)


def add_candidates(dataset, column_videos, column_clicks, seed):
    """Add the column side to training batches; column_videos [columns + 1, item_len] is of column_table().

    Candidates are the columns that were clicked: column_clicks [columns + 1] counts it. One that nobody has clicked would
    only learn to be pushed away. Up to MAX_CANDIDATES all are; of more, NUM_NEGATIVES draws without replacement are, each
    column as likely as any other: that is known exactly, whatever a user clicks, which is not so of the batch's own targets.
    """
    width, column_videos = column_videos.shape[1], tf.constant(column_videos, tf.int32)
    columns = np.flatnonzero(column_clicks).astype(np.int32)
    number = min(NUM_NEGATIVES, len(columns))

    def add(batch, draw):
        column_seed, place_seed = tf.unstack(tf.random.split(draw))
        if len(columns) <= MAX_CANDIDATES:
            items, place = tf.constant(columns), tf.searchsorted(columns, tf.reshape(batch["target_column"], [-1]))
            log_probs = tf.zeros([len(columns)])
        else:
            own, place = tf.unique(tf.reshape(batch["target_column"], [-1]))
            drawn = tf.random.experimental.index_shuffle(tf.range(number), column_seed, len(columns) - 1)
            items = tf.concat([own, tf.gather(columns, tf.sort(drawn))], 0)
            log_probs = tf.fill([number], np.log(number / len(columns), dtype=np.float32))
        places = tf.range(width)
        if width > ITEM_SAMPLE and len(columns) * width > BATCH_POSITIONS:
            others = tf.random.experimental.index_shuffle(tf.range(ITEM_SAMPLE - 1), place_seed, width - 2)
            places = tf.concat([[0], 1 + others], 0)
        return batch | {
            "item_column": items,
            "item_feature": tf.gather(tf.gather(column_videos, items), places, axis=1),
            "item_log_prob": log_probs,
            "target_item": tf.reshape(place, tf.shape(batch["target_column"])),
        }

    draws = tf.data.Dataset.random(seed).batch(2, drop_remainder=True)
    return tf.data.Dataset.zip(dataset, draws).map(add, tf.data.AUTOTUNE).prefetch(4)


# ---------------------------------------------------------------- what is held out, and which videos a column holds


def held_out(manifest, split, work_dir=WORK_DIR):
    """Return {"uid" [n], "user_feature", "user_column", "user_time" [n, len], "now" [n], "target_column" [n], "history" [n]}.

    One row for each user of "val" or "test", short histories first: so blocks of users hold little padding. The clicks are
    those that infer.py would read before the visit of the target, padded at the end; "history" says how many there were,
    "now" when the visit began, 0 where it is not known.
    """
    longest, users = manifest["constants"]["USER_MAX_LEN"], []
    for block in read_windows(shards_of(manifest, split, work_dir)):
        rows, places = np.nonzero(block["label"])
        before = block["repeated"][rows]
        read = np.arange(block["label"].shape[1]) < before[:, None]
        clicks = {name: np.where(read, block[name][rows], 0) for name in ("user_feature", "user_column", "user_time")}
        target = {
            "uid": block["uid"][rows],
            "target_column": block["user_column"][rows, places + 1],
            "now": block["user_time"][rows, before],
            "history": block["start"][rows] + before,
        }
        padded = {name: np.pad(of, [(0, 0), (0, longest)])[:, :longest] for name, of in clicks.items()}
        users.append(target | padded)
    users = {name: np.concatenate([block[name] for block in users]) for name in users[0]}
    order = np.argsort(users["history"], kind="stable")
    return {name: values[order] for name, values in users.items()}


def read_windows(paths, block=PARSE_BLOCK):
    """Yield the windows of shards in blocks, {name: array [block, ...]} padded to the longest of the block."""
    yield from tf.data.TFRecordDataset(paths).batch(block).map(parse_block).prefetch(2).as_numpy_iterator()


def column_table(index, video_clicks, max_len=ITEM_MAX_LEN):
    """Return int32 [columns + 1, max_len]: the most clicked videos of each column, padded; row 0 is no column.

    video_clicks [videos] counts clicks by video number. Ties go by shelf order.
    """
    longest = max(map(len, index.columns.values()))
    table = np.zeros([len(index.columns) + 1, min(max_len, longest)], np.int32)
    for row, numbers in zip(table[1:], index.columns.values(), strict=True):
        numbers = np.array(numbers, int)
        best = numbers[np.argsort(-video_clicks[numbers], kind="stable")[:max_len]]
        row[: len(best)] = best
    return table


def shelves_table(index, max_len=VIDEO_COLUMNS, num_columns=None):
    """Return int32 [videos, max_len]: the columns that show each video, those of fewest videos first, padded.

    A column of one video says nothing more about it. Of the index's columns only the first num_columns count, those that a
    model knows; None: all.
    """
    table = np.zeros([FIRST_VIDEO + len(index.videos), max_len], np.int32)
    taken, columns = np.zeros(len(table), int), list(enumerate(index.columns.values(), start=1))[:num_columns]
    for number, videos in sorted(columns, key=lambda column: len(column[1])):
        if len(videos) > 1:
            videos = np.array(videos, int)
            videos = videos[taken[videos] < max_len]
            table[videos, taken[videos]] = number
            taken[videos] += 1
    return table


# ---------------------------------------------------------------- counting: what was clicked, when, and near what


class Pairs(NamedTuple):
    """A sparse table of sums in the order of rows and columns, each pair once: int32 [n], int32 [n] and float [n].

    Column 0 is no column, or the sum of what a row lost where it was cut.
    """

    rows: np.ndarray
    columns: np.ndarray
    values: np.ndarray

    def strongest(self, width):
        """Return the table with the `width` largest columns of each row; what the others held goes to column 0."""
        order = np.lexsort((-np.where(self.columns > 0, self.values, 0), self.rows))
        place = np.arange(len(order)) - np.searchsorted(self.rows, self.rows)  # within the row
        columns = self.columns.copy()
        columns[order[place >= width]] = 0
        return sum_pairs(self.rows, columns, self.values)


NO_PAIRS: Final = Pairs(np.zeros(0, np.int32), np.zeros(0, np.int32), np.zeros(0))


def sum_pairs(rows, columns, values=None):
    """Return the Pairs of numbers and values [n], which may come in any order; without values each counts 1."""
    keys, place = np.unique(rows.astype(np.int64) << 32 | columns, return_inverse=True)
    sums = np.bincount(place, values, len(keys)).astype(float)
    return Pairs((keys >> 32).astype(np.int32), (keys & 0xFFFFFFFF).astype(np.int32), sums)


def add_pairs(*tables):
    """Return the sum of Pairs."""
    return sum_pairs(*map(np.concatenate, zip(*tables, strict=True)))


class CountTable:
    """A sparse matrix of counts [rows, columns], of Pairs: those of a row begin at offsets[row]; totals [rows] count all."""

    def __init__(self, pairs, num_rows, num_numbers):
        self.pairs, self.num_numbers = pairs, num_numbers
        self.offsets = np.searchsorted(pairs.rows, np.arange(num_rows + 1))
        self.totals = np.bincount(pairs.rows, pairs.values, num_rows)

    def weighted_rows(self, rows, weights):
        """Return sum_j weights[i, j] * row(rows[i, j]) without column 0, float64 [n, columns], of rows and weights [n, h]."""
        starts = self.offsets[rows].ravel()
        lengths = ((self.offsets[rows + 1] - self.offsets[rows]) * (weights != 0)).ravel()
        click = np.repeat(np.arange(rows.size), lengths)  # whose row each entry that is added is of
        entry = np.arange(len(click)) + (starts - np.cumsum(lengths) + lengths)[click]
        values = self.pairs.values[entry] * weights.ravel()[click]
        places = click // rows.shape[1] * self.num_numbers + self.pairs.columns[entry]
        sums = np.bincount(places, values, len(rows) * self.num_numbers).astype(float)  # without values it counts
        return sums.reshape(-1, self.num_numbers)[:, 1:]


class Counts(NamedTuple):
    """Tables of all that is counted; their columns are column numbers."""

    clicks: Pairs  # of each video in each column, 0 where in none
    near: Pairs  # of each video and each column clicked near it, nearer ones weighing more
    follows: Pairs  # of each column and the column clicked next
    daily: Pairs  # of each day since 1970 and each column clicked then

    def save(self, path):
        """Write all tables as one .npz file."""
        tables = {name: table._asdict() for name, table in self._asdict().items()}
        np.savez(path, **{f"{name}.{part}": of for name, parts in tables.items() for part, of in parts.items()})

    @classmethod
    def load(cls, path):
        """Return the Counts that save() wrote."""
        with np.load(path) as saved:
            return cls(*(Pairs(*(saved[f"{name}.{part}"] for part in Pairs._fields)) for name in cls._fields))


def count_windows(manifest, splits, work_dir=WORK_DIR, num_workers=NUM_WORKERS):
    """Return the Counts of the windows of splits, computed by map_files()."""
    paths = [path for split in splits for path in shards_of(manifest, split, work_dir)]
    tasks = put_together(((path, os.path.getsize(path)) for path in paths), COUNT_BYTES)
    count_task = functools.partial(count_shards, max_lag=min(MAX_LAG, manifest["constants"]["WINDOW_OVERLAP"]))
    counts = sum_counts(map_files(count_task, tasks, "count", num_workers))
    return counts._replace(near=counts.near.strongest(MEMORY_WIDTH))


def count_shards(paths, max_lag):
    """Return the Counts of the windows of shards, of pairs up to max_lag clicks apart."""
    return sum_counts(count_block(block, max_lag) for block in read_windows(paths, COUNT_BLOCK))


def sum_counts(counts):
    """Return the sum of many Counts, taken as they come; those of like size are added first, so each a few times only."""
    sums = [Counts(*[NO_PAIRS] * len(Counts._fields))]
    for more in counts:
        sums.append(more)
        while len(sums) > 1 and len(sums[-2].near.rows) < 2 * len(sums[-1].near.rows):
            sums[-2:] = [add_counts(*sums[-2:])]
    return add_counts(*sums)


def add_counts(*counts):
    """Return the sum; of more than MAX_PAIRS near pairs each video's strongest, many more than are kept in the end."""
    total = Counts(*(add_pairs(*tables) for tables in zip(*counts, strict=True)))
    return total if len(total.near.rows) <= MAX_PAIRS else total._replace(near=total.near.strongest(MAX_WIDTH))


def count_block(block, max_lag):
    """Return the Counts of windows; a pair counts in the window in which its later click is new, so once."""
    videos, columns = block["user_feature"], block["user_column"]
    is_new = (np.arange(videos.shape[1]) >= block["repeated"][:, None]) & (videos != PAD)
    near = [NO_PAIRS]
    for lag in range(1, min(videos.shape[1], 1 + max_lag)):
        earlier, later = np.s_[:, :-lag], np.s_[:, lag:]
        for video, column, weight in ((earlier, later, 1.0), (later, earlier, BACKWARD)):
            counted = is_new[later] & (columns[column] > 0) & (videos[video] >= FIRST_VIDEO)
            weights = np.full(np.count_nonzero(counted), weight * NEAR_DECAY ** (lag - 1))
            near.append(Pairs(videos[video][counted], columns[column][counted], weights))
    rows, places = np.nonzero(columns)  # of the column clicks
    clicked, new, days = columns[rows, places], is_new[rows, places], block["user_time"][rows, places] // DAY
    follows, dated = (rows[1:] == rows[:-1]) & new[1:], new & (days > 0)
    return Counts(
        clicks=sum_pairs(videos[is_new], columns[is_new]),
        near=add_pairs(*near),
        follows=sum_pairs(clicked[:-1][follows], clicked[1:][follows]),
        daily=sum_pairs(days[dated], clicked[dated]),
    )


# ---------------------------------------------------------------- running


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


@contextlib.contextmanager
def tensorflow_errors_named(work_dir=WORK_DIR):
    """Turn what TensorFlow raises where a shard is gone or damaged, or another worker lost, into an InputError."""
    try:
        yield
    except (tf.errors.NotFoundError, tf.errors.DataLossError) as error:
        folder = Path(work_dir, "tfrecord").absolute()
        shards = read_json(folder / "manifest.json", "get_tfrecord.py")["shards"]
        whole = {n for n in shards if (folder / n).exists() and file_fingerprint(folder / n) == shards[n]["sha256"]}
        path = folder / min(shards.keys() - whole, default="")
        what = f"gone, damaged or changed while it was read ({error.message})"
        raise InputError(f"{path}: {what}; run get_tfrecord.py, then this again") from error
    except tf.errors.OpError as error:
        worker, workers = cluster_worker()
        if workers == 1:
            raise
        what = f"worker {worker} of {workers} lost another one ({type(error).__name__}: {error.message:.200})"
        raise InputError(f"{what}; start all workers again, and they go on after the last finished epoch") from error


@tensorflow_errors_named()
def main():
    manifest, index = load_manifest()
    dataset = make_dataset(manifest, seed=0)
    batch = next(dataset.as_numpy_iterator())
    for name, value in batch.items():
        print(f"{name:14} {value.dtype!s:8} {list(value.shape)}")
    clicks, targets = (batch["user_feature"] > 0).sum(), int(batch["label"].sum())
    print(f"{len(dataset):,} batches; in this one {clicks:,} clicks, {targets:,} of them followed by a target")
    titles, names = read_names(DATA_DIR, index.videos)
    vids, cids = ["", "an unknown video", *index.videos], ["", *index.columns]
    print(f"user {batch['uid'][0].decode()}:")
    first = (batch[name][0] for name in ("user_feature", "user_column", "label"))
    for number, column, label in zip(*first, strict=True):
        if number:
            shelf = f"  in {names.get(cids[column], cids[column])}" if column else ""
            print(f"  {titles.get(vids[number], vids[number])}{shelf}{'  -> then:' if label else ''}")


if __name__ == "__main__":
    run_script(__file__)
