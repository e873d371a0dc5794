"""Turn the shards into batches of padded tensors: a tf.data pipeline of dict features.

Reads   WORK_DIR/tfrecord/, WORK_DIR/indexing/; run by itself also the titles in DATA_DIR
Writes  nothing; run by itself it prints what is in the data

    python get_dataset.py

A batch is a dict of
    user_feature    int32   [batch, len]   video numbers of a window's clicks, 0 = padding
    user_column     int32   [batch, len]   column numbers of those clicks, 0 = in no column
    target_video    int32   [batch, len]   the video clicked next, 0 = the window ends here
    target_column   int32   [batch, len]   the column clicked next, 0 = no target here
    label           float32 [batch, len]   1.0 where there is a target
    start           int64   [batch]        place of the window in the user's history
    uid             string  [batch]
and for training the column side, drawn fresh for each batch:
    item_column     int32   [candidates]            column numbers, rising
    item_feature    int32   [candidates, item_len]  the videos that stand for each, 0 = padding
    item_log_prob   float32 [candidates]            log probability of being among the candidates
    negative_video  int32   [NUM_NEGATIVES]         random videos, for the auxiliary loss
    seed            int64   [2]                     of the dropout
"""

from pathlib import Path

import numpy as np
import tensorflow as tf

from get_indexing import (
    DATA_DIR,
    FIRST_VIDEO,
    WORK_DIR,
    InputError,
    file_fingerprint,
    load_index,
    read_json,
    read_names,
    run_script,
)
from get_tfrecord import FORMAT, USER_MAX_LEN, ClickEncoder, cut_windows

BATCH_POSITIONS = 4096  # clicks in a batch, padding included; windows of like length share a batch
MIN_STEPS = 100  # batches in an epoch: small data gets smaller batches
SHUFFLE_BUFFER = 20_000  # windows
PARSE_BLOCK = 256  # records parsed in one go
ITEM_MAX_LEN = 16  # videos that stand for a column: its most clicked
MAX_CANDIDATES = 2048  # columns to train against; of more, the batch's own and random ones
NUM_NEGATIVES = 512  # random columns, and random videos, of a batch
COUNT_POSITIONS = 1 << 18  # clicks in a batch that is only counted
MATRIX_SIZE = 1 << 22  # numbers in a table of counts up to which a matrix product is used
MERGE_PAIRS = 4_000_000  # pairs that wait to be added up: bounds the memory needed

LISTS = {"user_feature": tf.int32, "user_column": tf.int32, "label": tf.float32}
WINDOW_SPEC = {name: tf.TensorSpec([None], dtype) for name, dtype in LISTS.items()}
WINDOW_SPEC |= {"uid": tf.TensorSpec([], tf.string), "start": tf.TensorSpec([], tf.int64)}
PADDED_SHAPES = {name: spec.shape for name, spec in WINDOW_SPEC.items()}


def load_manifest(work_dir=WORK_DIR, user_max_len=USER_MAX_LEN):
    """Return (manifest, index), refusing records of another format, index or USER_MAX_LEN, and shards that changed."""
    path, index = Path(work_dir, "tfrecord/manifest.json").absolute(), load_index(work_dir)
    manifest = read_json(path, "get_tfrecord.py")
    if manifest.get("format") != FORMAT:
        raise InputError(f"{path}: format {manifest.get('format')}, not {FORMAT}; run get_tfrecord.py again")
    index.check(manifest["index"], path, "get_tfrecord.py")
    if manifest["constants"]["USER_MAX_LEN"] != user_max_len:
        raise InputError(
            f"{path}: made with USER_MAX_LEN = {manifest['constants']['USER_MAX_LEN']}, which is {user_max_len} now; "
            "run get_tfrecord.py again"
        )
    for name in sorted({*manifest["shards"], *(shard.name for shard in path.parent.glob("*.tfrecord"))}):
        shard, made = path.parent / name, manifest["shards"].get(name)
        if not (made and shard.exists() and file_fingerprint(shard) == made["sha256"]):
            raise InputError(f"{shard}: not as {path.name} says; run get_tfrecord.py again")
    return manifest, index


def make_dataset(manifest, split, work_dir=WORK_DIR, seed=None, batch_positions=None):
    """Return the batches of a split's windows; a seed shuffles them, the same seed in the same way."""
    paths = [str(Path(work_dir, "tfrecord", name)) for name in manifest["shards"] if name.startswith(split)]
    shards = tf.data.Dataset.from_tensor_slices(paths)
    if seed is not None:
        shards = shards.shuffle(len(paths), seed)
    records = shards.interleave(tf.data.TFRecordDataset, cycle_length=4, num_parallel_calls=tf.data.AUTOTUNE)
    if seed is not None:
        records = records.shuffle(SHUFFLE_BUFFER, seed)
    windows = records.batch(PARSE_BLOCK).map(parse_block, tf.data.AUTOTUNE).unbatch()
    bounds, sizes, steps = bucket_windows(manifest["splits"][split]["windows"], batch_positions)
    return batch_windows(windows, bounds, sizes).apply(tf.data.experimental.assert_cardinality(steps))


def dataset_from_clicks(users, index, constants):
    """Return the windows of users, an iterable of (uid, [click, ...]), without files: what the records would hold."""
    encoder = ClickEncoder(index)

    def windows():
        for uid, clicks in users:
            yield from cut_windows(uid, *encoder.encode(clicks), constants)

    return tf.data.Dataset.from_generator(windows, output_signature=WINDOW_SPEC)


def parse_block(serialized):
    """Serialized records [block] -> window features [block, len], all parsed by one call and padded to the longest."""
    context, lists, _ = tf.io.parse_sequence_example(
        serialized,
        context_features={"uid": tf.io.FixedLenFeature([], tf.string), "start": tf.io.FixedLenFeature([], tf.int64)},
        sequence_features={
            name: tf.io.RaggedFeature(tf.float32 if dtype == tf.float32 else tf.int64) for name, dtype in LISTS.items()
        },
    )
    return context | {name: tf.cast(lists[name].merge_dims(1, 2).to_tensor(), dtype) for name, dtype in LISTS.items()}


def bucket_windows(lengths, batch_positions=None):
    """Return (longest window of each bucket, batch size of each bucket, batches in an epoch).

    lengths[n] is the number of windows of n clicks. A batch holds about batch_positions clicks of windows whose lengths
    differ by less than a factor of two, so little is padding.
    """
    longest = len(lengths) - 1
    bounds = sorted({-(-longest // 2**k) for k in range(5)})
    windows = np.diff(np.cumsum(lengths)[[0, *bounds]])
    batch_positions = batch_positions or min(BATCH_POSITIONS, int(windows @ bounds) // MIN_STEPS)
    sizes = [max(1, batch_positions // bound) for bound in bounds]
    return bounds, sizes, int(np.ceil(windows / sizes).sum())


def batch_windows(windows, bounds, sizes):
    """Batch windows of like length, sizes[k] of up to bounds[k] clicks, and add the targets."""
    bounds, sizes = tf.constant(bounds, tf.int64), tf.constant(sizes, tf.int64)

    def bucket(window):
        return tf.searchsorted(bounds, [tf.math.count_nonzero(window["user_feature"])], out_type=tf.int64)[0]

    return windows.group_by_window(
        key_func=bucket,
        reduce_func=lambda key, group: group.padded_batch(sizes[key], padded_shapes=PADDED_SHAPES),
        window_size_func=lambda key: sizes[key],
    ).map(add_targets, tf.data.AUTOTUNE)


def add_targets(batch):
    """Cut the padding that no window needs, and add what is clicked next at each position, as the page's top says."""
    longest = tf.reduce_max(tf.math.count_nonzero(batch["user_feature"], axis=1))
    batch = batch | {name: batch[name][:, :longest] for name in LISTS}
    following = {name: tf.pad(batch[name][:, 1:], [[0, 0], [0, 1]]) for name in ("user_feature", "user_column")}
    return batch | {
        "target_video": following["user_feature"],
        "target_column": tf.where(batch["label"] > 0, following["user_column"], 0),
    }


def add_candidates(dataset, column_videos, column_clicks, num_videos, seed):
    """Add the column side to training batches.

    column_videos [columns + 1, item_len] is of column_table(), column_clicks [columns + 1] counts the targets. Up to
    MAX_CANDIDATES columns all are candidates; of more, the batch's own and NUM_NEGATIVES uniform draws.
    """
    num_columns = len(column_videos) - 1
    popularity = tf.constant(np.minimum(column_clicks / column_clicks.sum(), 0.999), tf.float32)
    column_videos = tf.constant(column_videos, tf.int32)

    def add(batch, draws):
        draws, draw_seed = tf.cast(draws[1:], tf.int64), tf.cast(draws[0], tf.int64)
        targets = tf.boolean_mask(batch["target_column"], batch["label"] > 0)
        if num_columns <= MAX_CANDIDATES:
            candidates = tf.range(1, num_columns + 1)
            log_prob = tf.zeros([num_columns])
        else:
            drawn = tf.cast(1 + draws[:, 0] % num_columns, tf.int32)
            candidates = tf.sort(tf.unique(tf.concat([targets, drawn], 0))[0])
            absent = tf.math.log1p(-tf.gather(popularity, candidates)) * tf.cast(tf.size(targets), tf.float32)
            absent += NUM_NEGATIVES * np.log1p(-1 / num_columns)
            log_prob = tf.math.log(-tf.math.expm1(absent))
        return batch | {
            "item_column": candidates,
            "item_feature": tf.gather(column_videos, candidates),
            "item_log_prob": log_prob,
            "negative_video": tf.cast(FIRST_VIDEO + draws[:, 1] % num_videos, tf.int32),
            "seed": draw_seed,
        }

    draws = tf.data.Dataset.random(seed).batch(2).batch(1 + NUM_NEGATIVES)
    return tf.data.Dataset.zip(dataset, draws).map(add, tf.data.AUTOTUNE).prefetch(4)


def column_table(index, video_clicks, max_len=ITEM_MAX_LEN):
    """Return int32 [columns + 1, max_len]: the most clicked videos of each column, padded; row 0 is no column.

    video_clicks [any] counts clicks by video number; a video newer than the counts has none. Ties go by shelf order.
    """
    longest = max(map(len, index.columns.values()))
    table = np.zeros([len(index.columns) + 1, min(max_len, longest)], np.int32)
    for row, numbers in zip(table[1:], index.columns.values(), strict=True):
        numbers = np.array(numbers, int)
        clicks = np.where(numbers < len(video_clicks), video_clicks[np.minimum(numbers, len(video_clicks) - 1)], 0)
        best = numbers[np.argsort(-clicks, kind="stable")[:max_len]]
        row[: len(best)] = best
    return table


def first_seen(manifest, split, work_dir=WORK_DIR):
    """Yield (videos, columns, new), numpy [batch, len]: a split's clicks, each `new` in just one of its windows."""
    overlap = manifest["constants"]["WINDOW_OVERLAP"]
    for batch in make_dataset(manifest, split, work_dir, batch_positions=COUNT_POSITIONS).as_numpy_iterator():
        repeated = np.where(batch["start"] > 0, overlap, 0)[:, None]
        new = (np.arange(batch["label"].shape[1]) >= repeated) & (batch["user_feature"] > 0)
        yield batch["user_feature"], batch["user_column"], new


class PairCounter:
    """Adds up the weights of pairs (row number, column number), keeping the `width` strongest columns of each row."""

    def __init__(self, num_rows, num_columns, width):
        self.num_columns, self.width = num_columns, width
        self.totals, self.keys, self.values = np.zeros(num_rows), np.zeros(0, np.int64), np.zeros(0)
        self.waiting = []

    def add(self, rows, columns, weight):
        """Count pairs, two arrays [n], with one weight each."""
        self.totals += weight * np.bincount(rows, minlength=len(self.totals))
        self.waiting.append((rows.astype(np.int64) * self.num_columns + columns - 1, np.full(len(rows), weight)))
        if sum(len(keys) for keys, _ in self.waiting) > MERGE_PAIRS:
            self.merge()

    def merge(self):
        """Add up the pairs that wait, and drop what is beyond the width."""
        keys, values = map(np.concatenate, zip((self.keys, self.values), *self.waiting, strict=True))
        keys, place = np.unique(keys, return_inverse=True)
        values, rows = np.bincount(place, values, len(keys)), keys // self.num_columns
        by_strength = np.lexsort((-values, rows))
        kept = np.sort(by_strength[np.arange(len(rows)) - np.searchsorted(rows, rows) < self.width])
        self.keys, self.values, self.waiting = keys[kept], values[kept], []

    def table(self):
        """Return the CountTable of the pairs so far."""
        self.merge()
        return CountTable(self.totals, self.keys, self.values, self.num_columns)


class CountTable:
    """A sparse matrix [rows, columns] of counts: rising keys row * num_columns + column - 1, their values, and each
    row's total, which counts also what the table dropped. A small one is kept as a plain matrix as well."""

    def __init__(self, totals, keys, values, num_columns):
        self.totals, self.keys, self.values, self.num_columns = totals, keys, values, num_columns
        self.offsets = np.searchsorted(keys, num_columns * np.arange(len(totals) + 1))
        self.matrix = None
        if len(totals) * num_columns <= MATRIX_SIZE:
            self.matrix = np.zeros([len(totals), num_columns])
            self.matrix.ravel()[keys] = values

    def arrays(self):
        """Return what the table is made of, by name."""
        return {"totals": self.totals, "keys": self.keys, "values": self.values}

    def pairs(self):
        """Return the row and the column number of each entry."""
        return self.keys // self.num_columns, 1 + self.keys % self.num_columns

    def weighted_rows(self, rows, weights):
        """Return sum_j weights[i, j] * row(rows[i, j]), float64 [n, columns], of rows and weights [n, h]."""
        if self.matrix is not None:
            size = len(self.totals)
            places = rows + size * np.arange(len(rows))[:, None]
            return np.bincount(places.ravel(), weights.ravel(), size * len(rows)).reshape(-1, size) @ self.matrix
        ends = self.offsets[rows.ravel() + 1]
        counts = ends - self.offsets[rows.ravel()]
        entries = np.repeat(ends - np.cumsum(counts), counts) + np.arange(counts.sum())
        outputs = np.repeat(np.arange(rows.size) // rows.shape[1], counts) * self.num_columns
        added = self.values[entries] * np.repeat(weights.ravel(), counts)
        sums = np.bincount(outputs + self.keys[entries] % self.num_columns, added, len(rows) * self.num_columns)
        return sums.reshape(len(rows), self.num_columns).astype(float)  # of no entries at all, bincount gives integers


def main():
    manifest, index = load_manifest()
    dataset = make_dataset(manifest, "train", seed=0)
    batch = next(dataset.as_numpy_iterator())
    for name, value in batch.items():
        print(f"{name:14} {value.dtype!s:8} {list(value.shape)}")
    clicks, targets = (batch["user_feature"] > 0).sum(), int(batch["label"].sum())
    print(f"{len(dataset):,} batches; in this one {clicks:,} clicks, {targets:,} of them followed by a target")
    titles, names = read_names(DATA_DIR)
    vids, cids = ["", "an unknown video", *index.videos], ["", *index.columns]
    print(f"user {batch['uid'][0].decode()}:")
    for number, column, label in zip(*(batch[name][0] for name in LISTS), strict=True):
        if number:
            where = f"  in {names.get(cids[column], cids[column])}" if column else ""
            print(f"  {titles.get(vids[number], vids[number])}{where}{'  -> then:' if label else ''}")


if __name__ == "__main__":
    run_script(main)
