"""BST + DSSM: two Behaviour Sequence Transformer towers that meet in a scaled cosine.

The user tower reads the videos that a user clicked, the column tower the videos that stand for a column. Both end in
vectors of length one, whose cosine ranks, as in DSSM (Huang et al. 2013, "Learning deep structured semantic models for
web search using clickthrough data"); in between they are transformers, as in BST (Chen et al. 2019, "Behavior sequence
transformer for e-commerce recommendation in Alibaba").

    python model_tf2.py          prints a summary on random input; nothing is read or written
"""

from typing import NamedTuple

import keras
import numpy as np
import tensorflow as tf
from keras import layers, ops

from get_dataset import ITEM_MAX_LEN, NUM_NEGATIVES, CountTable, PairCounter, first_seen
from get_indexing import FIRST_VIDEO, PAD, UNKNOWN, run_script
from get_tfrecord import USER_MAX_LEN

EMB_DIM = 64  # of the embeddings and of both towers' vectors
NUM_HEADS = 2
USER_BLOCKS = 1  # transformer blocks of the user tower
ITEM_BLOCKS = 1  # transformer blocks of the column tower
FFN_RATIO = 2  # width of a block's feed-forward layer, in EMB_DIM
DROPOUT = 0.3
INIT_STDDEV = 0.02  # of embeddings and kernels; Glorot trained slower and ended lower
INIT_SCALE = 20.0  # of the cosine, learned from there: a bare cosine is too flat for a softmax
AUX_WEIGHT = 0.5  # of the auxiliary loss: the next video among random ones
VIDEO_DECAY = 0.7  # memory: weight of a click against the next later one
OWN_DECAY = 0.8  # the same for the user's own columns
VIDEO_BACKOFF = 40.0  # counts that a video's column stands for
COLUMN_BACKOFF = 50.0  # counts that popularity stands for
POPULARITY_WEIGHT = 0.1
MEMORY_CLICKS = 30  # last clicks that the memory reads
MEMORY_WIDTH = 64  # columns remembered for a video
COLUMN_WIDTH = 1024  # columns remembered for a column
NEGLIGIBLE = 0.02  # decayed counts below it are left out
LOSS = "softmax"  # over the candidates; or "bce": binary cross-entropy of each candidate


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
        self.attention_norm, self.ffn_norm = layers.RMSNormalization(), layers.RMSNormalization()

    def build(self, input_shape):
        if self.max_age is not None:
            self.age_bias = self.add_weight(
                shape=(self.num_heads, self.max_age + 1), initializer="zeros", name="age_bias"
            )

    def call(self, states, mask, seed=None):
        """States [batch, len, dim], mask [batch, len] (True = real) -> states [batch, len, dim]."""
        states = self.attention_norm(states + self.attend(states, mask))
        return self.ffn_norm(states + drop_out(self.contract(self.expand(states)), self.dropout, seed))

    def attend(self, states, mask):
        """Multi-head self-attention in which no query sees padding nor, in a sequence, what comes later."""
        length, head_dim = ops.shape(states)[1], self.dim // self.num_heads
        heads = ops.reshape(self.query_key_value(states), (-1, length, 3, self.num_heads, head_dim))
        query, key, value = ops.unstack(ops.transpose(heads, (2, 0, 3, 1, 4)), axis=0)
        logits = ops.matmul(query, ops.swapaxes(key, 2, 3)) / head_dim**0.5  # [batch, head, query, key]
        visible = mask[:, None, None, :]
        if self.max_age is not None:
            age = ops.arange(length)[:, None] - ops.arange(length)
            logits += ops.take(self.age_bias, ops.clip(age, 0, self.max_age), axis=1)
            visible = ops.logical_and(visible, age >= 0)
        weights = tf.nn.softmax(tf.where(visible, logits, -1e9))
        mixed = ops.transpose(ops.matmul(weights, value), (0, 2, 1, 3))
        return self.output_projection(ops.reshape(mixed, (-1, length, self.dim)))


class Tower(layers.Layer):
    """Embeddings -> norm -> transformer blocks. Both towers are one of these; they differ in pooling."""

    def __init__(self, num_blocks, dropout, **block):
        super().__init__()
        self.norm, self.dropout = layers.RMSNormalization(), dropout
        self.blocks = [Block(dropout=dropout, **block) for _ in range(num_blocks)]

    def call(self, states, mask, seed=None):
        """Embeddings [batch, len, dim], mask [batch, len] -> states [batch, len, dim], zero where there is padding."""
        first, *seeds = split_seed(seed, 1 + len(self.blocks))
        states = drop_out(self.norm(states), self.dropout, first)
        for block, of_block in zip(self.blocks, seeds, strict=True):
            states = block(states, mask, of_block)
        return states * ops.cast(mask, states.dtype)[..., None]


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

    The arguments are kept in `arguments`, from which BST_DSSM(**arguments) builds the same model. Numbers beyond the
    index are safe: such a video is an unknown one, such a column has no embedding of its own.
    """

    def __init__(self, num_videos, num_columns, emb_dim=EMB_DIM, num_heads=NUM_HEADS, user_blocks=USER_BLOCKS,
                 item_blocks=ITEM_BLOCKS, ffn_ratio=FFN_RATIO, dropout=DROPOUT, max_age=USER_MAX_LEN - 2):  # fmt: skip
        super().__init__()
        self.arguments = dict(
            num_videos=num_videos, num_columns=num_columns, emb_dim=emb_dim, num_heads=num_heads,
            user_blocks=user_blocks, item_blocks=item_blocks, ffn_ratio=ffn_ratio, dropout=dropout, max_age=max_age,
        )  # fmt: skip
        self.num_videos, self.num_columns = num_videos, num_columns
        self.video_embedding = self.add_weight((FIRST_VIDEO + num_videos, emb_dim), small_normal(), name="videos")
        self.column_embedding = self.add_weight((1 + num_columns, emb_dim), small_normal(), name="columns")
        block = dict(dim=emb_dim, num_heads=num_heads, ffn_ratio=ffn_ratio, dropout=dropout)
        self.user_tower = Tower(user_blocks, max_age=max_age, **block)
        self.column_tower = Tower(item_blocks, **block)
        self.scale = self.add_weight(shape=(), initializer=keras.initializers.Constant(INIT_SCALE), name="scale")

    def call(self, inputs):
        """A batch of get_dataset.py -> logits [batch, len, candidates], at each click for the next one."""
        users = self.user_vectors(inputs["user_feature"], inputs["user_column"])
        columns = self.column_vectors(inputs["item_feature"], inputs["item_column"])
        return self.logits(users, columns)

    def user_vectors(self, videos, columns, seed=None):
        """Clicked videos and their columns [batch, len] -> vectors [batch, len, dim]: the user after each click.

        A seed [2] means training: it draws the dropout.
        """
        states = self.embed_videos(videos) + self.embed_columns(columns)
        return tf.math.l2_normalize(self.user_tower(states, videos != PAD, seed), axis=-1)

    def column_vectors(self, videos, columns, seed=None):
        """Each column's videos [columns, len] and own numbers [columns] -> vectors [columns, dim].

        The mean over the videos' states plus the column's own embedding, which a column newer than the model lacks.
        """
        mask = videos != PAD
        states = self.column_tower(self.embed_videos(videos), mask, seed)
        mean = ops.sum(states, axis=1) / ops.maximum(ops.sum(ops.cast(mask, states.dtype), axis=1, keepdims=True), 1)
        return tf.math.l2_normalize(mean + self.embed_columns(columns), axis=-1)

    def logits(self, users, columns):
        """User vectors [..., dim] and column vectors [columns, dim] -> scaled cosines [..., columns]."""
        return self.scale * ops.matmul(users, ops.transpose(columns))

    def embed_videos(self, videos):
        """Video numbers -> embeddings; one beyond the vocabulary counts as unknown."""
        return look_up(self.video_embedding, ops.where(videos < FIRST_VIDEO + self.num_videos, videos, UNKNOWN))

    def embed_columns(self, columns):
        """Column numbers -> embeddings; zeros for no column and for one newer than the model."""
        known = ops.logical_and(columns > 0, columns <= self.num_columns)
        embedded = look_up(self.column_embedding, ops.where(known, columns, 0))
        return embedded * ops.cast(known, embedded.dtype)[..., None]


def look_up(table, numbers):
    """Return rows of an embedding table; unlike Keras' Embedding, this never copies the whole table."""
    return tf.gather(table.value, numbers)


def build_model(**arguments):
    """Return a BST_DSSM with all its weights, which Keras makes only when a model first sees a batch."""
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


def training_loss(model, batch, kind=LOSS, aux_weight=AUX_WEIGHT, training=True, replica=0, num_replicas=1):
    """Return (the loss to minimise, its part for the columns) of a training batch of get_dataset.py: two scalars.

    Both are means over the targets of the batch. Of several replicas each gives the part of every num_replicas-th
    window, counted from `replica`, against the candidates of the whole batch: the parts add up to the loss of one.
    """
    videos, clicked, next_video, next_column = (
        batch[name][replica::num_replicas] for name in ("user_feature", "user_column", "target_video", "target_column")
    )
    seed = batch["seed"] + tf.cast([0, replica], tf.int64) if training else None
    of_users, of_columns, of_videos = split_seed(seed, 3)
    users = model.user_vectors(videos, clicked, of_users)

    def loss_of(users, own, others, is_own, log_prob):
        own = model.scale * tf.reduce_sum(users * own, axis=1)
        return candidate_loss(own, tf.where(is_own, -1e9, model.logits(users, others)), log_prob, kind)

    is_target, candidates = next_column > 0, batch["item_column"]
    next_column = tf.boolean_mask(next_column, is_target)
    columns = model.column_vectors(batch["item_feature"], candidates, of_columns)
    own = tf.gather(columns, tf.searchsorted(candidates, next_column))
    is_own = next_column[:, None] == candidates
    column_loss = loss_of(tf.boolean_mask(users, is_target), own, columns, is_own, batch["item_log_prob"])

    # Auxiliary: the video clicked next, taken as a column of that one video, among random videos.
    has_next, random_video = next_video >= FIRST_VIDEO, batch["negative_video"]
    next_video = tf.boolean_mask(next_video, has_next)
    distinct, place = tf.unique(next_video)
    alone = tf.concat([distinct, random_video], 0)[:, None]
    alone = model.column_vectors(alone, tf.zeros_like(alone[:, 0]), of_videos)
    own, others = tf.gather(alone, place), alone[tf.size(distinct) :]
    log_prob = tf.fill([NUM_NEGATIVES], np.float32(np.log(NUM_NEGATIVES / model.num_videos)))
    is_own = next_video[:, None] == random_video
    video_loss = loss_of(tf.boolean_mask(users, has_next), own, others, is_own, log_prob)

    column_loss = tf.math.divide_no_nan(column_loss, count(batch["target_column"] > 0))
    video_loss = tf.math.divide_no_nan(video_loss, count(batch["target_video"] >= FIRST_VIDEO))
    return column_loss + aux_weight * video_loss, column_loss


def count(mask):
    """Return how many of mask are True, as a float."""
    return tf.reduce_sum(tf.cast(mask, tf.float32))


def candidate_loss(own, others, log_prob, kind=LOSS):
    """Return the sum of the losses of targets, a scalar: own [n] are their logits, others [n, m] those of the others.

    log_prob [m] is the log probability of being drawn as a candidate. Each is weighted by the inverse of that
    probability, so that a sample stands for all (Bengio and Senecal 2008). "softmax" is the cross-entropy over own and
    others, "bce" the sum of their binary cross-entropies. A logit of -1e9 leaves a candidate out.
    """
    if kind == "softmax":
        logits = tf.concat([own[:, None], others - log_prob], axis=1)
        losses = tf.nn.sparse_softmax_cross_entropy_with_logits(tf.zeros_like(own, tf.int32), logits)
    else:
        losses = tf.nn.softplus(-own) + tf.reduce_sum(tf.nn.softplus(others) * tf.exp(-log_prob), axis=1)
    return tf.reduce_sum(losses)


# ---------------------------------------------------------------- the memory: what was clicked near what


class Mix(NamedTuple):
    """How memory and towers are put together; chosen on validation."""

    decay: float  # of the memory's counts, per click between two that are near
    own_weight: float  # of the user's own columns in the memory
    memory_weight: float  # 0 leaves the plain towers
    temperature: float  # of the towers' softmax


PLAIN_TOWERS = Mix(decay=0.6, own_weight=0.0, memory_weight=0.0, temperature=1.0)


def mix(logits, remembered, memory_weight, temperature):
    """Return log((1 - w) softmax(logits / temperature) + w remembered / sum), [n, columns]; w = 0: the towers alone."""
    exponent = (logits - logits.max(axis=1, keepdims=True)) / temperature
    towers = np.exp(exponent)
    if memory_weight == 0:
        return exponent - np.log(towers.sum(axis=1, keepdims=True))
    remembered = np.maximum(remembered, 1e-9)
    towers *= (1 - memory_weight) / towers.sum(axis=1, keepdims=True)
    return np.log(towers + remembered * (memory_weight / remembered.sum(axis=1, keepdims=True)))


class Memory:
    """A counted ranking beside the towers, in the spirit of kNN language models (Khandelwal et al. 2020).

    A column scores by how often it was clicked near the user's last videos, by the user's own clicks in it and by its
    popularity. A video seen rarely backs off to the column it was clicked in most, and that column to popularity.
    """

    def __init__(self, video_clicks, column_clicks, video_column, by_video, by_column):
        self.video_clicks, self.column_clicks = video_clicks, column_clicks  # int [videos], [columns + 1]
        self.video_column = video_column  # int [videos]: the column that each was clicked in most, 0 = in none
        self.by_video, self.by_column = by_video, by_column  # CountTables: what was clicked near it
        self.popularity = column_clicks[1:] / column_clicks.sum()

    def scores(self, videos, columns, own_weight):
        """Return float64 [n, columns] for histories [n, h]: numbers of videos and columns, latest first, 0 padded."""
        return self.near(videos, columns) + own_weight * self.own(columns)

    def near(self, videos, columns):
        """Return the part of the scores that comes from other users and from popularity."""
        videos = np.where(videos < len(self.video_column), videos, UNKNOWN)
        weights = np.where(videos != PAD, VIDEO_DECAY ** np.arange(videos.shape[1]), 0)
        share = weights / (self.by_video.totals[videos] + VIDEO_BACKOFF)
        scores = self.by_video.weighted_rows(videos, share)
        column = np.where(self.video_column[videos] > 0, self.video_column[videos], self.known(columns))
        share *= VIDEO_BACKOFF / (self.by_column.totals[column] + COLUMN_BACKOFF)
        scores += self.by_column.weighted_rows(column, share)
        return scores + (COLUMN_BACKOFF * share.sum(axis=1, keepdims=True) + POPULARITY_WEIGHT) * self.popularity

    def own(self, columns):
        """Return how recently and often the user clicked in each column."""
        size = 1 + len(self.popularity)
        places = self.known(columns) + size * np.arange(len(columns))[:, None]
        weights = np.broadcast_to(OWN_DECAY ** np.arange(columns.shape[1]), columns.shape)
        return np.bincount(places.ravel(), weights.ravel(), size * len(columns)).reshape(-1, size)[:, 1:]

    def known(self, columns):
        """Column numbers, 0 for those newer than the memory."""
        return np.where(columns <= len(self.popularity), columns, 0)

    def save(self, path):
        """Write the memory as one .npz file."""
        arrays = {name: getattr(self, name) for name in ("video_clicks", "column_clicks", "video_column")}
        for name in ("by_video", "by_column"):
            arrays |= {f"{name}.{key}": value for key, value in getattr(self, name).arrays().items()}
        np.savez(path, **arrays)

    @classmethod
    def load(cls, path):
        """Return the Memory that save() wrote."""
        with np.load(path) as saved:
            arrays, tables = {}, {"by_video": {}, "by_column": {}}
            for name in saved:
                table, _, key = name.rpartition(".")
                (tables[table] if table else arrays)[key] = saved[name]
        num_columns = len(arrays["column_clicks"]) - 1
        return cls(**arrays, **{name: CountTable(num_columns=num_columns, **of) for name, of in tables.items()})


def count_clicks(manifest, index, work_dir):
    """Return a Memory that knows just how often each video and column was clicked in the training split."""
    num_videos, num_columns = FIRST_VIDEO + len(index.videos), len(index.columns)
    video_clicks, column_clicks = np.zeros(num_videos, int), np.zeros(1 + num_columns, int)
    for videos, columns, new in first_seen(manifest, "train", work_dir):
        video_clicks += np.bincount(videos[new], minlength=num_videos)
        column_clicks += np.bincount(columns[new], minlength=1 + num_columns)
    video_clicks[:FIRST_VIDEO] = column_clicks[0] = 0
    none = [PairCounter(rows, num_columns, width=1).table() for rows in (num_videos, 1 + num_columns)]
    return Memory(video_clicks, column_clicks, np.zeros(num_videos, int), *none)


def count_memories(manifest, index, clicks, decays, work_dir):
    """Return {decay: Memory} for each decay of the counts: on the training split, what was clicked near what."""
    num_videos, num_columns = FIRST_VIDEO + len(index.videos), len(index.columns)
    homes = PairCounter(num_videos, num_columns, width=1)
    for videos, columns, new in first_seen(manifest, "train", work_dir):
        in_column = new & (columns > 0)
        homes.add(videos[in_column], columns[in_column], 1.0)

    video_column = np.zeros(num_videos, int)
    for number, videos in reversed(list(enumerate(index.columns.values(), start=1))):
        video_column[videos] = number  # of a video never clicked in a column, the first that shows it
    rows, columns = homes.table().pairs()
    video_column[rows] = columns
    video_column[:FIRST_VIDEO] = 0

    by_video = {decay: PairCounter(num_videos, num_columns, MEMORY_WIDTH) for decay in decays}
    by_column = {decay: PairCounter(1 + num_columns, num_columns, COLUMN_WIDTH) for decay in decays}
    for videos, columns, new in first_seen(manifest, "train", work_dir):
        for lag in range(1, min(videos.shape[1], 1 + manifest["constants"]["WINDOW_OVERLAP"])):
            for near, clicked in ((videos[:, :-lag], columns[:, lag:]), (videos[:, lag:], columns[:, :-lag])):
                counted = new[:, lag:] & (clicked > 0) & (near >= FIRST_VIDEO)
                rows, clicked = near[counted], clicked[counted]
                homed = video_column[rows] > 0
                for decay in decays:
                    if (weight := decay ** (lag - 1)) >= NEGLIGIBLE:
                        by_video[decay].add(rows, clicked, weight)
                        by_column[decay].add(video_column[rows[homed]], clicked[homed], weight)
    return {
        decay: Memory(
            clicks.video_clicks, clicks.column_clicks, video_column, by_video[decay].table(), by_column[decay].table()
        )
        for decay in decays
    }


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
    print(f"logits [users, clicks, columns]: {list(logits.shape)}, "
          f"from {float(tf.reduce_min(logits)):.1f} to {float(tf.reduce_max(logits)):.1f}")  # fmt: skip


if __name__ == "__main__":
    run_script(main)
