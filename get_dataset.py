"""Turn the shards into batches of padded tensors: a tf.data pipeline of dict features.

Reads   WORK_DIR/tfrecord/, WORK_DIR/indexing/; run by itself also the titles in DATA_DIR
Writes  nothing; run by itself it prints what is in the data

    python get_dataset.py

A batch is a dict of
    user_feature    int32   [batch, len]   video numbers of a window's clicks, 0 = padding
    user_column     int32   [batch, len]   column numbers of those clicks, 0 = in no column
    target_video    int32   [batch, len]   the video clicked next, 0 = the window ends here, or an earlier one had it
    target_column   int32   [batch, len, AHEAD]  the column clicked next, 0 = no target here; and those clicked after it
    label           float32 [batch, len]   1.0 where there is a target
    start           int64   [batch]        place of the window in the user's history
    repeated        int64   [batch]        how many of the first clicks are in an earlier window too
    uid             string  [batch]
and for training the column side, drawn fresh for each batch:
    item_column     int32   [items]            column numbers
    item_feature    int32   [items, item_len]  videos that stand for each, 0 = padding
    item_log_prob   float32 [candidates]       the last so many items are candidates: log of how often each is drawn
    target_item     int32   [batch, len, AHEAD]  which items the targets are
    negative_video  int32   [AUX_NEGATIVES]    random videos, for the auxiliary loss
    seed            int64   [2]                of the dropout
"""

import contextlib
from pathlib import Path

from get_indexing import (
    DATA_DIR, FIRST_VIDEO, LIMITS, WORK_DIR,
    InputError, check_same, cluster_worker, load_index, read_json, read_names, run_script,
)  # fmt: skip
from get_tfrecord import FORMAT, ClickEncoder, record_constants, split_windows

import numpy as np
import tensorflow as tf

BATCH_POSITIONS = 2048  # clicks in a batch, padding included; windows of like length share a batch
MIN_STEPS = 150  # batches in an epoch: small data gets smaller batches
SHUFFLE_BUFFER = 20_000  # windows
PARSE_BLOCK = 256  # records parsed in one go
ITEM_MAX_LEN = 16  # videos that stand for a column: its most clicked
ITEM_SAMPLE = 8  # of them, that a step reads where all are more than a batch's clicks: the first and random others
VIDEO_COLUMNS = 4  # columns that a video is known by, of those that show it: the ones of fewest videos
AHEAD = 4  # next clicks whose columns are targets, in one
MAX_CANDIDATES = 4096  # columns that are all trained against
NUM_NEGATIVES = 512  # random columns of a batch, where they are more than MAX_CANDIDATES
AUX_NEGATIVES = 256  # random videos of a batch, for the auxiliary loss; 128 lose 1 % where histories are long

rules = {
    "a whole number in [0, inf)": ("MAX_CANDIDATES",),
    "a whole number in [1, inf)": (
        "BATCH_POSITIONS", "MIN_STEPS", "SHUFFLE_BUFFER", "PARSE_BLOCK", "ITEM_MAX_LEN", "VIDEO_COLUMNS", "AHEAD",
        "NUM_NEGATIVES", "AUX_NEGATIVES",
    ),
    "a whole number in [2, inf)": ("ITEM_SAMPLE",),
}  # fmt: skip
DATASET_CONSTANTS = dict(
    BATCH_POSITIONS=BATCH_POSITIONS, MIN_STEPS=MIN_STEPS, SHUFFLE_BUFFER=SHUFFLE_BUFFER, ITEM_MAX_LEN=ITEM_MAX_LEN,
    ITEM_SAMPLE=ITEM_SAMPLE, VIDEO_COLUMNS=VIDEO_COLUMNS, AHEAD=AHEAD, MAX_CANDIDATES=MAX_CANDIDATES,
    NUM_NEGATIVES=NUM_NEGATIVES, AUX_NEGATIVES=AUX_NEGATIVES,
)  # fmt: skip
LISTS = {"user_feature": tf.int32, "user_column": tf.int32, "label": tf.float32}
WINDOW_SPEC = {name: tf.TensorSpec([None], dtype) for name, dtype in LISTS.items()}
WINDOW_SPEC |= {"uid": tf.TensorSpec([], tf.string)}
WINDOW_SPEC |= {name: tf.TensorSpec([], tf.int64) for name in ("start", "repeated")}
PADDED_SHAPES = {name: spec.shape for name, spec in WINDOW_SPEC.items()}


def load_manifest(work_dir=WORK_DIR, constants=None):
    """Return (manifest, index); records of another format, index, constants or limits are refused, and shards not whole."""
    path, index = Path(work_dir, "tfrecord/manifest.json").absolute(), load_index(work_dir)
    manifest = read_json(path, "get_tfrecord.py")
    check_same(path, manifest, {"format": FORMAT}, "get_tfrecord.py")
    check_same(path, manifest["constants"], constants or record_constants(), "get_tfrecord.py")
    check_same(path, manifest["limits"], LIMITS, "get_tfrecord.py")
    index.check(manifest["index"], path, "get_tfrecord.py")
    for name, shard in manifest["shards"].items():
        if not (path.parent / name).exists() or (path.parent / name).stat().st_size != shard["bytes"]:
            raise InputError(f"{path.parent / name}: not as {path.name} says; run get_tfrecord.py again")
    return manifest, index


def shards_of(manifest, split, work_dir=WORK_DIR):
    """Return the paths of a split's shards."""
    return [str(Path(work_dir, "tfrecord", name)) for name in manifest["shards"] if name.startswith(split)]


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
    return batch_windows(windows, manifest["splits"]["train"]["windows"])


def dataset_from_clicks(users, index, constants):
    """Return the training batches of users, an iterable of (uid, [click, ...]), without files: none is held out."""
    encoder, windows = ClickEncoder(index), []
    for uid, clicks in users:
        of_user = split_windows(uid, *encoder.encode(clicks), encoder.current, 0.0, constants)["train"]
        windows += [window for window in of_user if len(window["label"]) > 1]
    lengths = np.bincount([len(window["label"]) for window in windows], minlength=constants["USER_MAX_LEN"] + 1)
    dataset = tf.data.Dataset.from_generator(lambda: iter(windows), output_signature=WINDOW_SPEC)
    return batch_windows(dataset, lengths)


def read_windows(paths, block=PARSE_BLOCK):
    """Yield the windows of shards in blocks, {name: array [block, ...]} padded to the longest of the block."""
    yield from tf.data.TFRecordDataset(paths).batch(block).map(parse_block).prefetch(2).as_numpy_iterator()


def held_out(manifest, split, work_dir=WORK_DIR):
    """Return {"uid" [n], "user_feature" [n, len], "user_column" [n, len], "target_column" [n], "history" [n]}.

    One row for each user of "val" or "test", short histories first: so blocks of users hold little padding. The clicks are
    those before the target, as many as infer.py would read, padded at the end; "history" says how many there were.
    """
    longest, users = manifest["constants"]["USER_MAX_LEN"], []
    for block in read_windows(shards_of(manifest, split, work_dir)):
        rows, places = np.nonzero(block["label"])
        before = np.arange(block["label"].shape[1]) <= places[:, None]
        clicks = {name: np.where(before, block[name][rows], 0) for name in ("user_feature", "user_column")}
        users.append(
            {
                "uid": block["uid"][rows],
                "target_column": block["user_column"][rows, places + 1],
                "history": block["start"][rows] + places + 1,
            }
            | {name: np.pad(of, [(0, 0), (0, longest)])[:, :longest] for name, of in clicks.items()}
        )
    users = {name: np.concatenate([block[name] for block in users]) for name in users[0]}
    order = np.argsort(users["history"], kind="stable")
    return {name: values[order] for name, values in users.items()}


@tf.function(autograph=False)  # traced once, not in every epoch
def parse_block(serialized):
    """Serialized records [block] -> window features [block, len], all parsed by one call and padded to the longest."""
    context, lists, _ = tf.io.parse_sequence_example(
        serialized,
        context_features={
            name: tf.io.FixedLenFeature([], spec.dtype) for name, spec in WINDOW_SPEC.items() if name not in LISTS
        },
        sequence_features={
            name: tf.io.RaggedFeature(tf.float32 if dtype == tf.float32 else tf.int64) for name, dtype in LISTS.items()
        },
    )
    return context | {name: tf.cast(lists[name].merge_dims(1, 2).to_tensor(), dtype) for name, dtype in LISTS.items()}


@tf.function(autograph=False)
def drop_single_clicks(block):
    """Leave out the windows in which no click follows another: they are there to be counted."""
    follows = tf.reduce_any(block["user_feature"][:, 1:] > 0, axis=1)
    return {name: tf.boolean_mask(value, follows) for name, value in block.items()}


def bucket_windows(lengths):
    """Return (longest window of each bucket, batch size of each bucket, batches in an epoch).

    lengths[n] is the number of windows of n clicks; those of one click are no one's. A batch holds about BATCH_POSITIONS
    clicks of windows whose lengths differ by less than a factor of two, but for the shortest, so little is padding.
    """
    longest = len(lengths) - 1
    bounds = sorted({-(-longest // 2**k) for k in range(5)})
    windows = np.diff(np.cumsum([0, 0, *lengths[2:]])[[0, *bounds]])
    positions = min(BATCH_POSITIONS, int(windows @ bounds) // MIN_STEPS)
    sizes = [max(1, positions // bound) for bound in bounds]
    return bounds, sizes, int(np.ceil(windows / sizes).sum())


def batch_windows(windows, lengths):
    """Return a dataset of batches of like length, whose size is known, with the targets; see bucket_windows()."""
    bounds, sizes, steps = bucket_windows(lengths)
    bounds, sizes = tf.constant(bounds, tf.int64), tf.constant(sizes, tf.int64)

    def bucket(window):
        return tf.searchsorted(bounds, [tf.math.count_nonzero(window["user_feature"])], out_type=tf.int64)[0]

    batches = windows.group_by_window(
        key_func=bucket,
        reduce_func=lambda key, group: group.padded_batch(sizes[key], padded_shapes=PADDED_SHAPES),
        window_size_func=lambda key: sizes[key],
    )
    return batches.map(add_targets, tf.data.AUTOTUNE).apply(tf.data.experimental.assert_cardinality(steps))


def add_targets(batch):
    """Cut the padding that no window needs, and add what is clicked next at each position, as the page's top says."""
    longest = tf.reduce_max(tf.math.count_nonzero(batch["user_feature"], axis=1))
    batch = batch | {name: batch[name][:, :longest] for name in LISTS}
    following = tf.signal.frame(tf.pad(batch["user_column"][:, 1:], [[0, 0], [0, AHEAD]]), AHEAD, 1, axis=1)
    is_new = tf.range(1, longest + 1) >= batch["repeated"][:, None]
    return batch | {
        "target_video": tf.where(is_new, tf.pad(batch["user_feature"][:, 1:], [[0, 0], [0, 1]]), 0),
        "target_column": tf.where(batch["label"][..., None] > 0, following, 0),
    }


def add_candidates(dataset, column_videos, num_videos, seed):
    """Add the column side to training batches; column_videos [columns + 1, item_len] is of column_table().

    Up to MAX_CANDIDATES columns all are candidates. Of more, NUM_NEGATIVES draws without replacement are, each column
    as likely as any other: that is known exactly, whatever a user clicks, which is not so of the batch's own targets.
    """
    num_columns, width = len(column_videos) - 1, column_videos.shape[1]
    column_videos = tf.constant(column_videos, tf.int32)
    number = min(NUM_NEGATIVES, num_columns)
    log_prob = np.log(number / num_columns, dtype=np.float32)

    def add(batch, draw):
        dropout_seed, column_seed, video_seed, place_seed = tf.unstack(tf.random.split(draw, 4))
        if num_columns <= MAX_CANDIDATES:
            items, place, log_probs = tf.range(1, num_columns + 1), batch["target_column"] - 1, tf.zeros([num_columns])
        else:
            own, place = tf.unique(tf.reshape(batch["target_column"], [-1]))
            drawn = tf.random.experimental.index_shuffle(tf.range(number), column_seed, num_columns - 1)
            items, log_probs = tf.concat([own, 1 + tf.sort(drawn)], 0), tf.fill([number], log_prob)
        places = tf.range(width)
        if width > ITEM_SAMPLE and num_columns * width > BATCH_POSITIONS:
            others = tf.random.experimental.index_shuffle(tf.range(ITEM_SAMPLE - 1), place_seed, width - 2)
            places = tf.concat([[0], 1 + others], 0)
        return batch | {
            "item_column": items,
            "item_feature": tf.gather(tf.gather(column_videos, items), places, axis=1),
            "item_log_prob": log_probs,
            "target_item": tf.reshape(tf.maximum(place, 0), tf.shape(batch["target_column"])),
            "negative_video": FIRST_VIDEO
            + tf.random.stateless_uniform([AUX_NEGATIVES], video_seed, maxval=num_videos, dtype=tf.int32),
            "seed": dropout_seed,
        }

    draws = tf.data.Dataset.random(seed).batch(2, drop_remainder=True)
    return tf.data.Dataset.zip(dataset, draws).map(add, tf.data.AUTOTUNE).prefetch(4)


def column_table(index, video_clicks, max_len=ITEM_MAX_LEN):
    """Return int32 [columns + 1, max_len]: the most clicked videos of each column, padded; row 0 is no column.

    video_clicks [any] counts clicks by video number; a video newer than the counts has none. Ties go by shelf order.
    """
    longest = max(map(len, index.columns.values()))
    table = np.zeros([len(index.columns) + 1, min(max_len, longest)], np.int32)
    clicks = np.append(video_clicks, 0)  # the last one: of every newer video
    for row, numbers in zip(table[1:], index.columns.values(), strict=True):
        numbers = np.array(numbers, int)
        best = numbers[np.argsort(-clicks[np.minimum(numbers, len(video_clicks))], kind="stable")[:max_len]]
        row[: len(best)] = best
    return table


def video_table(index, max_len=VIDEO_COLUMNS, num_columns=None):
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


@contextlib.contextmanager
def tensorflow_errors_named():
    """Turn what TensorFlow raises where a shard is gone or damaged, or another worker lost, into an InputError."""
    try:
        yield
    except (tf.errors.NotFoundError, tf.errors.DataLossError) as error:
        raise InputError(
            f"the shards changed or were damaged while they were read ({error.message}); run get_tfrecord.py, then this again"
        ) from error
    except tf.errors.OpError as error:
        worker, workers = cluster_worker()
        if workers == 1:
            raise
        raise InputError(
            f"worker {worker} of {workers} lost another one ({type(error).__name__}); start all workers again, and they go on "
            "after the last finished epoch"
        ) from error


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
    for number, column, label in zip(*(batch[name][0] for name in LISTS), strict=True):
        if number:
            shelf = f"  in {names.get(cids[column], cids[column])}" if column else ""
            print(f"  {titles.get(vids[number], vids[number])}{shelf}{'  -> then:' if label else ''}")


if __name__ == "__main__":
    run_script(main)
