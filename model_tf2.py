"""BST + DSSM: two towers that meet in a scaled cosine, and a memory of what was clicked near what beside them.

The user tower reads the videos that a user clicked, and their columns, by a Behaviour Sequence Transformer (Chen et al.
2019, "Behavior sequence transformer for e-commerce recommendation in Alibaba"); the column tower reads the videos that
stand for a column. Both end in vectors of length one, whose cosine ranks, as in DSSM (Huang et al. 2013, "Learning deep
structured semantic models for web search using clickthrough data").

    python model_tf2.py          prints a summary on random input; nothing is read or written
"""

import functools
import os
from typing import NamedTuple

from get_dataset import ITEM_MAX_LEN, column_table, read_windows, shards_of
from get_indexing import (
    FIRST_VIDEO, NUM_WORKERS, PAD, UNKNOWN, WORK_DIR,
    InputError, map_files, put_together, run_script,
)  # fmt: skip
from get_tfrecord import USER_MAX_LEN

import keras
import numpy as np
import tensorflow as tf
from keras import layers

EMB_DIM = 64  # of the embeddings and of both towers' vectors
NUM_HEADS = 2
USER_BLOCKS = 2  # transformer blocks of the user tower
ITEM_BLOCKS = 0  # transformer blocks of the column tower; one makes a step 1.3 to 1.7 times as long and gains little
FFN_RATIO = 2  # width of a block's feed-forward layer, in EMB_DIM
DROPOUT = None  # None: by the rarity of the videos, see by_rarity()
INIT_STDDEV = 0.02  # of embeddings and kernels; Glorot trained slower and ended lower
INIT_SCALE = 20.0  # of the cosine, learned from there: a bare cosine is too flat for a softmax
AHEAD_DECAY = None  # share of each click after the next as a target, against the one before; None: by_rarity()
AUX_WEIGHT = 0.5  # of the auxiliary loss: the next video among random ones
MAX_LAG = 16  # memory: clicks from one to another that counts as near; no more than a window repeats
BACKWARD = 0.3  # memory: what a column clicked before a video counts there, one clicked after it counting 1
MEMORY_WIDTH = 64  # memory: columns remembered for a video
COLUMN_WIDTH = 1024  # memory: columns remembered for a column
VIDEO_DECAY = 0.7  # memory: weight of a user's click against the next later one
VIDEO_BACKOFF = 40.0  # memory: counts that a video's column stands for
COLUMN_BACKOFF = 50.0  # memory: counts that popularity stands for
POPULARITY_DISCOUNT = 0.3  # memory: of popularity, taken off what is near each click
MEMORY_CLICKS = 30  # memory: last clicks of a user that it reads
TEMPERATURE = 1.5  # of the towers' softmax in the mix
COUNT_BYTES = 16 << 20  # of shards: the work of one task of counting
COUNT_BLOCK = 1024  # windows counted at once
MAX_PAIRS = 4_000_000  # pairs that are counted exactly; of more, each video keeps COUNT_SLACK * MEMORY_WIDTH columns
COUNT_SLACK = 4
MATRIX_ROWS, MATRIX_SIZE = 4096, 1 << 22  # rows and numbers of a table of counts that is also kept as a matrix
COLUMNS_AT_ONCE = 8192  # columns whose vectors are computed at once
SCORES_AT_ONCE = 1 << 18  # scores of users for columns in a block: bounds the memory, and fits a cache
LOSS = "softmax"  # over the candidates; or "bce": binary cross-entropy of each candidate
LOSSES = ("softmax", "bce")

rules = {
    "a whole number in [0, inf)": ("USER_BLOCKS", "ITEM_BLOCKS"),
    "a whole number in [1, inf)": (
        "EMB_DIM", "NUM_HEADS", "FFN_RATIO", "MAX_LAG", "MEMORY_WIDTH", "COLUMN_WIDTH", "MEMORY_CLICKS", "COUNT_BYTES",
        "COUNT_BLOCK", "MAX_PAIRS", "COUNT_SLACK", "MATRIX_ROWS", "MATRIX_SIZE", "COLUMNS_AT_ONCE", "SCORES_AT_ONCE",
    ),
    "a number in (0, inf)": ("INIT_STDDEV", "INIT_SCALE", "VIDEO_BACKOFF", "COLUMN_BACKOFF", "TEMPERATURE"),
    "a number in [0, inf)": ("AUX_WEIGHT", "BACKWARD", "POPULARITY_DISCOUNT"),
    "a number in (0, 1]": ("VIDEO_DECAY",),
    "None or a number in [0, 0.9]": ("DROPOUT",),
    "None or a number in [0, 1]": ("AHEAD_DECAY",),
    f"one of {', '.join(map(repr, LOSSES))}": ("LOSS",),
}  # fmt: skip
MODEL_CONSTANTS = dict(
    INIT_STDDEV=INIT_STDDEV, INIT_SCALE=INIT_SCALE, AUX_WEIGHT=AUX_WEIGHT, MAX_LAG=MAX_LAG, BACKWARD=BACKWARD,
    MEMORY_WIDTH=MEMORY_WIDTH, COLUMN_WIDTH=COLUMN_WIDTH, VIDEO_DECAY=VIDEO_DECAY, VIDEO_BACKOFF=VIDEO_BACKOFF,
    COLUMN_BACKOFF=COLUMN_BACKOFF, POPULARITY_DISCOUNT=POPULARITY_DISCOUNT, MEMORY_CLICKS=MEMORY_CLICKS,
    TEMPERATURE=TEMPERATURE, MAX_PAIRS=MAX_PAIRS, COUNT_SLACK=COUNT_SLACK,
)  # fmt: skip


class Block(layers.Layer):
    """A post-norm transformer block (Vaswani et al. 2017), over a sequence or over a set.

    max_age makes it causal, with a learned bias for how many clicks back each head looks (ages above max_age share the
    last): a position means the same however long the window. Without max_age the inputs are a set.
    """

    def __init__(self, dim, num_heads, ffn_ratio, dropout, max_age=None):
        super().__init__()
        self.dim, self.num_heads, self.dropout, self.max_age = dim, num_heads, dropout, max_age
        self.query_key_value, self.output_projection = dense(3 * dim), dense(dim)
        self.expand, self.contract = dense(ffn_ratio * dim, activation="relu"), dense(dim)
        if max_age is not None:
            self.age_bias = self.add_weight((num_heads, max_age + 1), "zeros", name="age_bias")

    def call(self, states, mask, seed=None):
        """States [batch, len, dim], mask [batch, len] (True = real) -> states [batch, len, dim]."""
        states = rms_norm(states + self.attend(states, mask))
        return rms_norm(states + drop_out(self.contract(self.expand(states)), self.dropout, seed))

    def attend(self, states, mask):
        """Multi-head self-attention in which no query sees padding nor, in a sequence, what comes later."""
        length, head_dim = tf.shape(states)[1], self.dim // self.num_heads
        heads = tf.reshape(self.query_key_value(states), [-1, length, 3, self.num_heads, head_dim])
        query, key, value = tf.unstack(tf.transpose(heads, [2, 0, 3, 1, 4]))
        logits = tf.matmul(query, key, transpose_b=True) / head_dim**0.5  # [batch, head, query, key]
        visible = mask[:, None, None, :]
        if self.max_age is not None:
            age = tf.range(length)[:, None] - tf.range(length)
            logits += tf.gather(self.age_bias.value, tf.clip_by_value(age, 0, self.max_age), axis=1)
            visible &= age >= 0
        weights = tf.nn.softmax(tf.where(visible, logits, -1e9))
        mixed = tf.transpose(tf.matmul(weights, value), [0, 2, 1, 3])
        return self.output_projection(tf.reshape(mixed, [-1, length, self.dim]))


class Tower(layers.Layer):
    """Embeddings -> norm -> transformer blocks. Both towers are one of these; they differ in pooling."""

    def __init__(self, num_blocks, dropout, **block):
        super().__init__()
        self.dropout = dropout
        self.blocks = [Block(dropout=dropout, **block) for _ in range(num_blocks)]

    def call(self, states, mask, seed=None):
        """Embeddings [batch, len, dim], mask [batch, len] -> states [batch, len, dim], zero where there is padding."""
        first, *seeds = split_seed(seed, 1 + len(self.blocks))
        states = drop_out(rms_norm(states), self.dropout, first)
        for block, of_block in zip(self.blocks, seeds, strict=True):
            states = block(states, mask, of_block)
        return states * tf.cast(mask, states.dtype)[..., None]


def rms_norm(inputs):
    """Return inputs scaled so that the mean square of the last axis is 1 (Zhang and Sennrich 2019), without a gain."""
    return inputs * tf.math.rsqrt(tf.reduce_mean(inputs**2, axis=-1, keepdims=True) + 1e-6)


def drop_out(inputs, rate, seed):
    """Return inputs with a share `rate`, drawn by the seed [2], set to 0 and the others scaled up; without seed as is.

    A byte is drawn where Keras' Dropout draws a float, which takes a third of the time; so the rate counts in 1 / 256.
    """
    dropped = round(256 * rate)
    if seed is None or not dropped:
        return inputs
    draws = tf.random.stateless_uniform([(tf.size(inputs) + 3) // 4], seed, minval=None, maxval=None, dtype=tf.int32)
    draws = tf.reshape(tf.bitcast(draws, tf.uint8), [-1])[: tf.size(inputs)]
    kept = tf.cast(tf.reshape(draws, tf.shape(inputs)) >= dropped, inputs.dtype)
    return inputs * (kept * (256 / (256 - dropped)))


def split_seed(seed, number):
    """Return so many independent seeds [2] made of one, or as many None of None."""
    return [None] * number if seed is None else tf.unstack(tf.random.split(seed, number))


class BST_DSSM(keras.Model):
    """Both towers over shared embeddings; num_videos and num_columns are the sizes of the index.

    The columns that show a video, video_columns as of video_table(), are side information on it, as in EGES (Wang et al.
    2018, "Billion-scale commodity embedding for e-commerce recommendation in Alibaba"): a rare video leans on them. The
    other arguments are kept in `arguments`: BST_DSSM(**arguments, video_columns=...) builds the same model. Numbers beyond
    the index are safe: such a video is an unknown one, such a column has no embedding of its own.
    """

    def __init__(self, num_videos, num_columns, emb_dim=EMB_DIM, num_heads=NUM_HEADS, user_blocks=USER_BLOCKS,
                 item_blocks=ITEM_BLOCKS, ffn_ratio=FFN_RATIO, dropout=0.0, max_age=None, column_map=True,
                 video_columns=((0,),)):  # fmt: skip
        super().__init__()
        if emb_dim % num_heads:
            raise InputError(f"EMB_DIM = {emb_dim} is no multiple of NUM_HEADS = {num_heads}")
        max_age = USER_MAX_LEN - 2 if max_age is None else max_age
        self.arguments = dict(
            num_videos=num_videos, num_columns=num_columns, emb_dim=emb_dim, num_heads=num_heads,
            user_blocks=user_blocks, item_blocks=item_blocks, ffn_ratio=ffn_ratio, dropout=dropout, max_age=max_age,
            column_map=column_map,
        )  # fmt: skip
        self.num_videos, self.num_columns = num_videos, num_columns
        self.video_columns = tf.constant(video_columns)
        self.video_embedding = self.add_weight((FIRST_VIDEO + num_videos, emb_dim), small_normal(), name="videos")
        self.column_embedding = self.add_weight((1 + num_columns, emb_dim), small_normal(), name="columns")
        block = dict(dim=emb_dim, num_heads=num_heads, ffn_ratio=ffn_ratio, dropout=dropout)
        self.user_tower = Tower(user_blocks, max_age=max_age, **block)
        self.column_tower = Tower(item_blocks, **block)
        self.column_map = dense(emb_dim) if column_map else None
        self.scale = self.add_weight(shape=(), initializer=keras.initializers.Constant(INIT_SCALE), name="scale")
        self.repeats = self.add_weight(shape=(max_age + 2,), initializer="zeros", name="repeats")

    def call(self, inputs):
        """Histories (user_feature, user_column) and columns (item_feature, item_column, rising) -> logits [batch, items].

        They are for the click that follows the last one.
        """
        users = self.user_vectors(inputs["user_feature"], inputs["user_column"])
        vectors = self.column_vectors(inputs["item_feature"], inputs["item_column"])
        return self.next_logits(users, inputs["user_feature"], inputs["user_column"], vectors, inputs["item_column"])

    def user_vectors(self, videos, columns, seed=None):
        """Clicked videos and their columns [batch, len] -> vectors [batch, len, dim]: the user after each click.

        A seed [2] means training: it draws the dropout.
        """
        states = self.embed_videos(videos) + self.embed_columns(columns)
        return tf.math.l2_normalize(self.user_tower(states, videos != PAD, seed), axis=-1)

    def column_vectors(self, videos, columns, seed=None):
        """Each column's videos [columns, len] and own numbers [columns] -> vectors [columns, dim].

        The mean over the videos' states, with column_map a linear map of it, since to be clicked is not to be next, and the
        column's own embedding, which a column newer than the model lacks.
        """
        mask = videos != PAD
        states = self.column_tower(self.embed_videos(videos), mask, seed)
        mean = tf.reduce_sum(states, axis=1) / tf.maximum(tf.math.count_nonzero(mask, 1, True, states.dtype), 1)
        if self.column_map:
            mean += self.column_map(mean)
        return tf.math.l2_normalize(mean + self.embed_columns(columns), axis=-1)

    def scaled_cosines(self, users, vectors):
        """User vectors [n, dim] and column vectors [columns, dim] -> [n, columns]."""
        return tf.matmul(self.scale * users, vectors, transpose_b=True)

    def next_logits(self, users, videos, clicked, vectors, numbers):
        """Return the logits [batch, columns] of columns, vectors [columns, dim], for the click after each history's last.

        users [batch, len, dim] are its vectors, videos and clicked [batch, len] its clicks; see add_repeats().
        """
        last = tf.maximum(tf.math.count_nonzero(videos, axis=1, dtype=tf.int32) - 1, 0)
        logits = self.scaled_cosines(tf.gather(users, last, batch_dims=1), vectors)
        return self.add_repeats(logits, numbers, clicked, last[:, None] - tf.range(tf.shape(clicked)[1]))

    def add_repeats(self, logits, numbers, clicked, ages):
        """Add to logits [n, columns] what is learned for a column that was clicked so many clicks ago.

        numbers [columns] are rising; clicked and ages [n, len] are the columns of the clicks and how many clicks ago they
        were, below 0 where they come later.
        """
        place = tf.minimum(tf.searchsorted(numbers, tf.reshape(clicked, [-1])), tf.size(numbers) - 1)
        place = tf.reshape(place, tf.shape(clicked))
        at = tf.where((tf.gather(numbers, place) == clicked) & (clicked > 0) & (ages >= 0))
        places = tf.stack([tf.cast(at[:, 0], tf.int32), tf.gather_nd(place, at)], axis=1)
        return tf.tensor_scatter_nd_add(logits, places, self.repeat_of(tf.gather_nd(ages, at)))

    def repeat_of(self, ages):
        """Return what is learned for a column clicked so many clicks ago."""
        return tf.gather(self.repeats.value, tf.clip_by_value(ages, 0, self.repeats.shape[0] - 1))

    def embed_videos(self, videos):
        """Video numbers -> embeddings, plus the mean of those of the columns that show each.

        One beyond the vocabulary has the embedding of an unknown one, and its columns.
        """
        distinct, place = tf.unique(tf.reshape(videos, [-1]))  # of each video its columns are looked up once
        numbers = tf.where(distinct < FIRST_VIDEO + self.num_videos, distinct, UNKNOWN)
        own = tf.gather(self.video_embedding.value, numbers)  # unlike Keras' Embedding, never copies the whole table
        columns = tf.gather(self.video_columns, tf.where(distinct < len(self.video_columns), distinct, PAD))
        shown = tf.where(columns > 0)
        shelves, shelf = tf.unique(tf.gather_nd(columns, shown))
        embedded = own + tf.sparse.segment_mean(self.embed_columns(shelves), shelf, shown[:, 0], tf.size(distinct))
        return tf.gather(embedded, tf.reshape(place, tf.shape(videos)))

    def embed_columns(self, columns):
        """Column numbers -> embeddings; zeros for no column and for one newer than the model."""
        known = (columns > 0) & (columns <= self.num_columns)
        embedded = tf.gather(self.column_embedding.value, tf.where(known, columns, 0))
        return embedded * tf.cast(known, embedded.dtype)[..., None]


def by_rarity(clicks, num_videos):
    """Return (DROPOUT, AHEAD_DECAY), where they are None by the rarity of the videos: 1 / sqrt(clicks per video).

    What is known of a video from n clicks is known to about 1 / sqrt(n). The rarer videos are, the more is left out in
    training, and the more the clicks after the next one count as targets beside it.
    """
    rarity = (num_videos / max(clicks, 1)) ** 0.5
    dropout = round(min(max(rarity, 0.1), 0.3), 2) if DROPOUT is None else DROPOUT
    return dropout, round(min(2 * rarity, 0.6), 2) if AHEAD_DECAY is None else AHEAD_DECAY


def build_model(**arguments):
    """Return a BST_DSSM with all its weights, which Keras makes only when a model first sees a batch."""
    keras.config.set_floatx("float32")  # whatever the user's keras.json says
    model = BST_DSSM(**arguments)
    number = tf.ones([1, 1], tf.int32)
    model({"user_feature": number, "user_column": number, "item_feature": number, "item_column": number[0]})
    return model


def small_normal():
    """Return the initializer of embeddings and kernels."""
    return keras.initializers.RandomNormal(stddev=INIT_STDDEV)


def dense(units, **options):
    """Return a dense layer of this model: without bias, which the norms make good."""
    return layers.Dense(units, kernel_initializer=small_normal(), use_bias=False, **options)


def training_loss(model, batch, kind=LOSS, ahead_decay=0.0, aux_weight=AUX_WEIGHT, training=True, replica=0,
                  num_replicas=1):  # fmt: skip
    """Return (the loss to minimise, its part for the columns) of a training batch of get_dataset.py: two scalars.

    Both parts are means over the targets of the batch. Of several replicas each gives the part of every
    num_replicas-th window, counted from `replica`: the parts add up to the loss of one. Where every column is a single
    video, the auxiliary loss would say the same again and is left out.
    """
    names = ("user_feature", "user_column", "target_video", "target_column", "target_item")
    windows = batch | {name: batch[name][replica::num_replicas] for name in names}
    seed = batch["seed"] + tf.cast([0, replica], tf.int64) if training else None
    user_seed, column_seed, video_seed = split_seed(seed, 3)
    users = model.user_vectors(windows["user_feature"], windows["user_column"], user_seed)

    targets = tf.math.count_nonzero(batch["target_column"][..., 0], dtype=tf.float32)
    columns = tf.math.divide_no_nan(column_loss(model, users, windows, kind, ahead_decay, column_seed), targets)
    if batch["item_feature"].shape[1] == 1 or not aux_weight:
        return columns, columns
    next_videos = tf.math.count_nonzero(batch["target_video"] >= FIRST_VIDEO, dtype=tf.float32)
    videos = tf.math.divide_no_nan(video_loss(model, users, windows, kind, video_seed), next_videos)
    return columns + aux_weight * videos, columns


def column_loss(model, users, windows, kind, ahead_decay, seed):
    """Return the summed loss, a scalar, of the columns clicked next among the candidates, given users [batch, len, dim].

    A click after the next one is a target too, with a weight of ahead_decay against the one before.
    """
    targets = tf.where(windows["target_column"][..., 0] > 0)  # [n, 2]: window, place
    wanted, items = (tf.gather_nd(windows[name], targets) for name in ("target_column", "target_item"))  # [n, ahead]
    clicked, users = tf.gather(windows["user_column"], targets[:, 0]), tf.gather_nd(users, targets)
    ages = tf.cast(targets[:, 1:], tf.int32) - tf.range(tf.shape(clicked)[1])  # [n, len]
    vectors = model.column_vectors(windows["item_feature"], windows["item_column"], seed)
    number = tf.size(windows["item_log_prob"])
    candidates, log_prob = windows["item_column"][-number:], windows["item_log_prob"][0]

    others = model.add_repeats(model.scaled_cosines(users, vectors[-number:]), candidates, clicked, ages)
    if windows["item_column"].shape == windows["item_log_prob"].shape:  # every column is a candidate
        own = tf.gather(others, items, batch_dims=1)
    else:
        again = (clicked[:, None] == wanted[..., None]) & (ages >= 0)[:, None]  # [n, ahead, len]
        own = model.scale * tf.einsum("nd,nad->na", users, tf.gather(vectors, items))
        own += tf.reduce_sum(tf.where(again, model.repeat_of(ages)[:, None], 0.0), axis=2)
    others = tf.where(wanted[:, :1] == candidates, -1e9, others)
    weights = tf.where(wanted > 0, ahead_decay ** tf.range(wanted.shape[1], dtype=tf.float32), 0.0)
    return candidate_loss(own, weights, others, log_prob, kind)


def video_loss(model, users, windows, kind, seed):
    """Return the summed auxiliary loss: the video clicked next, as a column of that one video, among random videos."""
    has_next, negatives = windows["target_video"] >= FIRST_VIDEO, windows["negative_video"]
    next_video, users = tf.boolean_mask(windows["target_video"], has_next), tf.boolean_mask(users, has_next)
    distinct, place = tf.unique(next_video)
    single = tf.concat([distinct, negatives], 0)[:, None]
    vectors = model.column_vectors(single, tf.zeros_like(single[:, 0]), seed)
    own = model.scale * tf.reduce_sum(users * tf.gather(vectors, place), axis=1, keepdims=True)
    others = model.scaled_cosines(users, vectors[tf.size(distinct) :])
    others = tf.where(next_video[:, None] == negatives, -1e9, others)
    log_prob = np.float32(np.log(negatives.shape[0] / model.num_videos))
    return candidate_loss(own, tf.ones_like(own), others, log_prob, kind)


def candidate_loss(own, weights, others, log_prob, kind=LOSS):
    """Return the sum of the losses of targets, a scalar: own [n, ahead] are their logits, others [n, m] the candidates'.

    A target is what is clicked next and, by their weights [n, ahead], what is clicked after that. log_prob is the log of how
    often each candidate is drawn: it is weighted by the inverse of that, so that a sample stands for all (Bengio and Senecal
    2008). "softmax" is the cross-entropy over the next and the others, "bce" the sum of their binary
    cross-entropies. A logit of -1e9 leaves a candidate out.
    """
    weights /= tf.reduce_sum(weights, axis=1, keepdims=True)
    if kind == "softmax":
        following = own[:, 0]
        against = tf.reduce_logsumexp(others, axis=1) - log_prob
        losses = following + tf.nn.softplus(against - following) - tf.reduce_sum(weights * own, axis=1)
    else:
        losses = tf.reduce_sum(weights * tf.nn.softplus(-own), axis=1)
        losses += tf.reduce_sum(tf.nn.softplus(others), axis=1) * tf.exp(-log_prob)
    return tf.reduce_sum(losses)


# ---------------------------------------------------------------- counting: what was clicked, and near what


class Pairs(NamedTuple):
    """A sparse table of sums: rising keys row * (columns + 1) + column number [n], and their values [n, any].

    Column 0 is no column, or the sum of what a row lost where it was cut.
    """

    keys: np.ndarray
    values: np.ndarray

    def cut(self, size, width):
        """Return the table with the `width` largest columns of each row; what the others held goes to column 0.

        size is the number of columns + 1.
        """
        rows, columns = np.divmod(self.keys, size)
        order = np.lexsort((-np.where(columns > 0, self.values.sum(axis=1), 0), rows))
        lost = np.zeros(len(rows), bool)
        lost[order] = np.arange(len(rows)) - np.searchsorted(rows, rows) >= width  # the place within the row
        return add_pairs(Pairs(np.where(lost, self.keys - columns, self.keys), self.values))


def add_pairs(*tables):
    """Return the sum of Pairs, whose keys may come in any order and more than once."""
    keys, values = (np.concatenate(of_tables) for of_tables in zip(*tables, strict=True))
    order = np.argsort(keys, kind="stable")
    keys = keys[order]
    starts = np.flatnonzero(np.diff(keys, prepend=-1))
    return Pairs(keys[starts], np.add.reduceat(values[order], starts)) if len(starts) else Pairs(keys, values)


class Counts(NamedTuple):
    """Three tables of all that is counted; their columns are column numbers."""

    clicks: Pairs  # of each video in each column, 0 where in none
    near: Pairs  # of each video and each column clicked near it, weighted by each of the decays: values [n, decays]
    next: Pairs  # of each column and the column clicked next

    @classmethod
    def add(cls, *counts, size):
        """Return the sum; of more than MAX_PAIRS near pairs, each video's strongest, many more than a memory keeps."""
        clicks, near, follows = (add_pairs(*tables) for tables in zip(*counts, strict=True))
        return cls(clicks, near if len(near.keys) <= MAX_PAIRS else near.cut(size, COUNT_SLACK * MEMORY_WIDTH), follows)


def count_windows(manifest, splits, decays, index, work_dir=WORK_DIR, num_workers=NUM_WORKERS):
    """Return the Counts of the windows of splits, computed by map_files()."""
    paths = [path for split in splits for path in shards_of(manifest, split, work_dir)]
    tasks = put_together(((path, os.path.getsize(path)) for path in paths), COUNT_BYTES)
    size = 1 + len(index.columns)
    max_lag = min(MAX_LAG, manifest["constants"]["WINDOW_OVERLAP"])
    count_task = functools.partial(count_shards, decays=decays, max_lag=max_lag, size=size)
    with map_files(count_task, tasks, "count", num_workers) as results:
        return sum_counts(results, len(decays), size)


def sum_counts(counts, num_decays, size):
    """Return the sum of many Counts, taken as they come; those of like size are added first, so each a few times only."""
    widths = (1, float), (num_decays, np.float32), (1, float)
    sums = [Counts(*(Pairs(np.zeros(0, np.int64), np.zeros([0, width], dtype)) for width, dtype in widths))]
    for more in counts:
        sums.append(more)
        while len(sums) > 1 and len(sums[-2].near.keys) < 2 * len(sums[-1].near.keys):
            sums[-2:] = [Counts.add(*sums[-2:], size=size)]
    return Counts.add(*sums, size=size)


def count_shards(paths, decays, max_lag, size):
    """Return the Counts of the windows of shards, of pairs up to max_lag clicks apart; size is the number of columns + 1."""
    blocks = (count_block(block, decays, max_lag, size) for block in read_windows(paths, COUNT_BLOCK))
    return sum_counts(blocks, len(decays), size)


def count_block(block, decays, max_lag, size):
    """Return the Counts of windows; a pair counts in the window in which its later click is new, so once."""
    videos, columns = block["user_feature"].astype(np.int64), block["user_column"].astype(np.int64)
    is_new = (np.arange(videos.shape[1]) >= block["repeated"][:, None]) & (videos != PAD)
    keys, weights = [np.zeros(0, np.int64)], [np.zeros([0, len(decays)], np.float32)]
    for lag in range(1, min(videos.shape[1], 1 + max_lag)):
        earlier, later = np.s_[:, :-lag], np.s_[:, lag:]
        for near, clicked, weight in ((earlier, later, 1.0), (later, earlier, BACKWARD)):
            counted = is_new[later] & (columns[clicked] > 0) & (videos[near] >= FIRST_VIDEO)
            keys.append(videos[near][counted] * size + columns[clicked][counted])
            of_lag = np.float32(weight) * np.array(decays, np.float32) ** (lag - 1)
            weights.append(np.broadcast_to(of_lag, [len(keys[-1]), len(decays)]))
    return Counts(
        clicks=add_pairs(ones((videos * size + columns)[is_new])),
        near=add_pairs(Pairs(np.concatenate(keys), np.concatenate(weights))),
        next=add_pairs(ones(next_columns(columns, is_new, size))),
    )


def ones(keys):
    """Return Pairs that count each key once."""
    return Pairs(keys, np.ones([len(keys), 1]))


def next_columns(columns, is_new, size):
    """Return the key of each two column clicks that follow each other, of windows [n, len], the later one new."""
    rows, places = np.nonzero(columns)
    clicked = columns[rows, places]
    follows = (rows[1:] == rows[:-1]) & is_new[rows, places][1:]
    return (clicked[:-1] * size + clicked[1:])[follows]


class CountTable:
    """A sparse matrix of counts [rows, columns], of Pairs of one value each: those of a row begin at offsets[row].

    `totals` [rows] count column 0 too. A table of few rows is a plain matrix as well, by which many are read at once.
    """

    def __init__(self, pairs, num_rows, size):
        self.pairs, self.size, self.matrix = pairs, size, None
        self.offsets = np.searchsorted(pairs.keys, size * np.arange(num_rows + 1))
        self.totals = np.bincount(pairs.keys // size, pairs.values[:, 0], num_rows)
        if num_rows <= MATRIX_ROWS and num_rows * size <= MATRIX_SIZE:
            self.matrix = np.bincount(pairs.keys, pairs.values[:, 0], num_rows * size).reshape(num_rows, size)[:, 1:]

    def weighted_rows(self, rows, weights):
        """Return sum_j weights[i, j] * row(rows[i, j]) without column 0, float64 [n, columns], of rows and weights [n, h]."""
        if self.matrix is not None and rows.size > len(self.totals):
            return sum_by_place(rows, weights, len(self.totals)) @ self.matrix
        starts = self.offsets[rows].ravel()
        lengths = ((self.offsets[rows + 1] - self.offsets[rows]) * (weights != 0)).ravel()
        click = np.repeat(np.arange(rows.size), lengths)  # whose row each entry that is added is of
        entry = np.arange(len(click)) + (starts - np.cumsum(lengths) + lengths)[click]
        values = self.pairs.values[entry, 0] * weights.ravel()[click]
        places = click // rows.shape[1] * self.size + self.pairs.keys[entry] % self.size
        return np.bincount(places, values, len(rows) * self.size).reshape(-1, self.size)[:, 1:].astype(float)


def sum_by_place(places, values, size):
    """Return float64 [n, size]: in each row the sums of values [n, any] by their places [n, any]."""
    places = places + size * np.arange(len(places))[:, None]
    return np.bincount(places.ravel(), values.ravel(), size * len(places)).reshape(-1, size)


# ---------------------------------------------------------------- the memory, and how it is mixed with the towers


class Mix(NamedTuple):
    """How the memory is read and put together with the towers: what is chosen on validation, then constants."""

    decay: float  # of the memory's counts, per click between two that are near
    memory_weight: float  # 0 leaves the plain towers
    repeat: float  # factor for columns that the user clicked before
    temperature: float = TEMPERATURE
    video_decay: float = VIDEO_DECAY
    video_backoff: float = VIDEO_BACKOFF
    column_backoff: float = COLUMN_BACKOFF
    popularity_discount: float = POPULARITY_DISCOUNT
    memory_clicks: int = MEMORY_CLICKS


def to_probabilities(logits, remembered, is_remembered, temperature):
    """Return the probabilities of the towers and those of the memory, two of [n, columns].

    The memory shares out what the towers give the columns that it knows, is_remembered [columns]. A column newer than
    the memory, or clicked by nobody yet, keeps what they give it, so no weight of the mix pushes it down.
    """
    logits = np.subtract(logits, logits.max(axis=1, keepdims=True), dtype=float) / temperature
    towers = np.exp(np.maximum(logits, -700))  # above 0, so every score is finite
    towers /= towers.sum(axis=1, keepdims=True)
    memory = np.maximum(remembered, 1e-9) * is_remembered
    memory *= (towers @ is_remembered / np.maximum(memory.sum(axis=1), 1e-12))[:, None]  # 0: it knows none of them
    return towers, memory + towers * (1 - is_remembered)


def mix(towers, memory, clicked, by):
    """Return probabilities [n, columns]: (1 - w) towers + w memory, then, by a Mix, the factor for columns clicked before."""
    mixed = towers + by.memory_weight * (memory - towers)
    mixed *= np.where(clicked, by.repeat, 1.0)
    return mixed / mixed.sum(axis=1, keepdims=True)


class Memory:
    """A counted ranking beside the towers, in the spirit of kNN language models (Khandelwal et al. 2020).

    A column scores by how often it was clicked near the user's last videos. A video seen rarely backs off to the column
    it was clicked in most, and that column to popularity. Of popularity a part is taken off again: what is near every
    video says little.
    """

    def __init__(self, video_clicks, column_clicks, video_column, by_video, by_column):
        self.video_clicks, self.column_clicks = video_clicks, column_clicks  # [videos], [columns + 1]
        self.video_column = video_column  # int [videos]: the column that each was clicked in most, 0 = in none
        size = len(column_clicks)
        self.by_video = CountTable(by_video, len(video_clicks), size)  # what was clicked near it
        self.by_column = CountTable(by_column, size, size)
        self.popularity = column_clicks[1:] / max(column_clicks.sum(), 1)

    @classmethod
    def of_counts(cls, counts, place, index):
        """Return the Memory of Counts, with those near weighted by the decay at that place of the decays."""
        num_videos, size = FIRST_VIDEO + len(index.videos), 1 + len(index.columns)
        videos, columns = np.divmod(counts.clicks.keys, size)
        video_clicks = np.bincount(videos, counts.clicks.values[:, 0], num_videos)
        column_clicks = np.bincount(columns, counts.clicks.values[:, 0], size)
        video_clicks[:FIRST_VIDEO] = column_clicks[0] = 0

        video_column = np.zeros(num_videos, int)
        for number, shelf in reversed(list(enumerate(index.columns.values(), start=1))):
            video_column[shelf] = number  # of a video never clicked in a column, the first that shows it
        (main,) = np.nonzero((columns > 0) & (videos >= FIRST_VIDEO))
        main = main[np.lexsort((-columns[main], counts.clicks.values[main, 0]))]  # the last one written stays
        video_column[videos[main]] = columns[main]

        near = Pairs(counts.near.keys, counts.near.values[:, place : place + 1].astype(float))
        rows, columns = np.divmod(near.keys, size)
        has_column = video_column[rows] > 0
        of_columns = add_pairs(Pairs((video_column[rows] * size + columns)[has_column], near.values[has_column]))
        tables = near.cut(size, MEMORY_WIDTH), of_columns.cut(size, COLUMN_WIDTH)
        return cls(video_clicks, column_clicks, video_column, *tables)

    def scores(self, videos, columns, by):
        """Return float64 [n, columns] for histories [n, len] of videos and columns, padded at the end, by a Mix."""
        videos = np.where(videos < len(self.video_column), videos, UNKNOWN)
        columns = np.where(columns <= len(self.popularity), columns, 0)  # 0: newer than the memory
        ages = np.count_nonzero(videos, axis=1)[:, None] - 1 - np.arange(videos.shape[1])  # below 0: padding
        weights = np.where((ages >= 0) & (ages < by.memory_clicks), by.video_decay ** np.abs(ages), 0)
        per_count = weights / (self.by_video.totals[videos] + by.video_backoff)
        scores = self.by_video.weighted_rows(videos, per_count)
        column = np.where(self.video_column[videos] > 0, self.video_column[videos], columns)
        per_count *= by.video_backoff / (self.by_column.totals[column] + by.column_backoff)
        scores += self.by_column.weighted_rows(column, per_count)
        popular = (by.column_backoff * per_count - by.popularity_discount * weights).sum(axis=1, keepdims=True)
        return scores + popular * self.popularity

    def save(self, path):
        """Write the memory as one .npz file."""
        tables = {"by_video": self.by_video.pairs, "by_column": self.by_column.pairs}
        arrays = {
            f"{table}.{name}": array for table, pairs in tables.items() for name, array in pairs._asdict().items()
        }
        clicks = dict(video_clicks=self.video_clicks, column_clicks=self.column_clicks, video_column=self.video_column)
        with open(path, "wb") as file:
            np.savez(file, **clicks, **arrays)

    @classmethod
    def load(cls, path):
        """Return the Memory that save() wrote."""
        with np.load(path) as saved:
            arrays = [saved[name] for name in ("video_clicks", "column_clicks", "video_column")]
            tables = [Pairs(saved[f"{table}.keys"], saved[f"{table}.values"]) for table in ("by_video", "by_column")]
        return cls(*arrays, *tables)


class Scorer:
    """Scores the current columns for histories: the one way, for validation, for the test and for the rankings.

    A history is padded at its end: numbers of videos and of columns [n, len], oldest first.
    """

    def __init__(self, model, memory, index, item_max_len=ITEM_MAX_LEN):
        self.model, self.memory = model, memory
        self.numbers = np.array([n for n, videos in enumerate(index.columns.values(), start=1) if videos], np.int32)
        self.cids = [cid for cid, videos in index.columns.items() if videos]  # of the current columns, as are all below
        self.clicks = self.of_current(memory.column_clicks[None, 1:])[0]
        self.is_remembered = (self.clicks > 0).astype(float)
        self.column_videos = column_table(index, memory.video_clicks, item_max_len)[self.numbers]
        self.refresh()

        numbers, dim = tf.TensorSpec([None, None], tf.int32), model.column_embedding.shape[1]

        @tf.function(input_signature=[numbers, numbers, tf.TensorSpec([len(self.numbers), dim])], autograph=False)
        def logits(videos, columns, vectors):
            users = model.user_vectors(videos, columns)
            return model.next_logits(users, videos, columns, vectors, self.numbers)

        self.logits = logits

    def refresh(self):
        """Take the columns' vectors from the model as it is now."""
        blocks = np.array_split(np.arange(len(self.numbers)), 1 + len(self.numbers) // COLUMNS_AT_ONCE)
        vectors = [self.model.column_vectors(self.column_videos[b], self.numbers[b]) for b in blocks]
        self.vectors = tf.concat(vectors, axis=0)

    def towers(self, videos, columns):
        """Return what the towers give: logits [n, current columns]."""
        return self.logits(np.int32(videos), np.int32(columns), self.vectors).numpy()

    def remembered(self, videos, columns, by, memory=None):
        """Return what the memory, or another one, gives: [n, current columns]."""
        return self.of_current((memory or self.memory).scores(videos, columns, by))

    def clicked(self, columns):
        """Return whether each current column is among those clicked, bool [n, current columns]."""
        clicked = np.zeros([len(columns), max(self.numbers[-1], columns.max(initial=0)) + 1], bool)
        clicked[np.arange(len(columns))[:, None], columns] = True
        return clicked[:, self.numbers]

    def probabilities(self, videos, columns, by):
        """Return probabilities [n, current columns] by a Mix: those of the rankings."""
        return mix(*self.parts(videos, columns, by), self.clicked(columns), by)

    @staticmethod
    def is_known(videos, columns):
        """Return which histories hold a known click, bool [n]."""
        return ((videos > UNKNOWN) | (columns > 0)).any(axis=1)

    def parts(self, videos, columns, by, memory=None):
        """Return what is mixed: the probabilities of the towers and of the memory, [n, current columns] each.

        For a user without any known click both are popularity.
        """
        logits, remembered = self.towers(videos, columns), self.remembered(videos, columns, by, memory)
        popular, known = (self.clicks + 0.5) / (self.clicks + 0.5).sum(), self.is_known(videos, columns)
        parts = to_probabilities(logits, remembered, self.is_remembered, by.temperature)
        return [np.where(known[:, None], part, popular) for part in parts]

    def rankable(self, users):
        """Return the held-out users whose target is a current column, with its "place" among the current columns and
        whether it was "clicked_before"."""
        kept = np.isin(users["target_column"], self.numbers)
        if not kept.any():
            raise InputError("no column that a held-out user clicked is still there; run get_tfrecord.py again")
        users = {name: values[kept] for name, values in users.items()}
        before = (users["user_column"] == users["target_column"][:, None]).any(axis=1)
        return users | {"place": np.searchsorted(self.numbers, users["target_column"]), "clicked_before": before}

    def of_current(self, scores):
        """Scores [n, columns the memory knows] -> [n, current columns]; a newer column scores 0."""
        newer = self.numbers[-1] - scores.shape[1]
        return np.pad(scores, [(0, 0), (0, max(newer, 0))])[:, self.numbers - 1]


def main():
    rng = np.random.default_rng(0)
    model = build_model(num_videos=1000, num_columns=50)
    batch = {
        "user_feature": tf.constant(rng.integers(FIRST_VIDEO, 1000, [4, USER_MAX_LEN]), tf.int32),
        "user_column": tf.constant(rng.integers(0, 51, [4, USER_MAX_LEN]), tf.int32),
        "item_feature": tf.constant(rng.integers(FIRST_VIDEO, 1000, [50, ITEM_MAX_LEN]), tf.int32),
        "item_column": tf.range(1, 51),
    }
    logits = model(batch)
    model.summary()
    print(f"logits [users, columns]: {list(logits.shape)}, "
          f"from {float(tf.reduce_min(logits)):.1f} to {float(tf.reduce_max(logits)):.1f}")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
