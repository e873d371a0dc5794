"""BST + DSSM: two towers that meet in a scaled cosine, and beside them what is counted: a memory and each user's habit.

The user tower reads the videos that a user clicked, and their columns, by a Behaviour Sequence Transformer (Chen et al.
2019, "Behavior sequence transformer for e-commerce recommendation in Alibaba"); the column tower reads the videos that
stand for a column. Both end in vectors of length one, whose cosine ranks, as in DSSM (Huang et al. 2013, "Learning deep
structured semantic models for web search using clickthrough data").

    python model_tf2.py          prints a summary on random input; nothing is read or written
"""

from typing import Final, Literal, NamedTuple

from get_dataset import DAY, ITEM_MAX_LEN, CountTable, column_table, gap_buckets, sum_pairs
from get_indexing import FIRST_VIDEO, PAD, UNKNOWN, InputError, OrZero, constants_of, run_script
from get_tfrecord import USER_MAX_LEN

import keras
import numpy as np
import tensorflow as tf
from keras import layers

EMB_DIM: int = 64  # of the embeddings and of both towers' vectors
NUM_HEADS: int = 2
USER_BLOCKS: OrZero = 2  # transformer blocks of the user tower
ITEM_BLOCKS: OrZero = 0  # of the column tower; one makes a step 1.3 to 1.7 times as long and gains little
FFN_RATIO: int = 2  # width of a block's feed-forward layer, in EMB_DIM
DROPOUT: float | None = None  # None: by the clicks per video, see dropout_for()
INIT_STDDEV: float = 0.02  # of embeddings and kernels; Glorot trained slower and ended lower
INIT_SCALE: float = 20.0  # of the cosine, learned from there: a bare cosine is too flat for a softmax
LOSS: Literal["softmax", "bce"] = "softmax"  # over the candidates; or binary cross-entropy of each candidate
AUX_WEIGHT: float = 0.5  # of the auxiliary loss: the video clicked next; it helps most where users are few
AUX_VIDEOS: int = 256  # of a batch, among which that video is
TREND_REACHES: tuple[float, ...] = (0.3, 0.9, 0.98)  # weight of a day's clicks against the next later day's
TREND_BACKOFF: float = 1.0  # clicks a column by which the share in all clicks before counts in that of the last days
TREND_SIZE: int = 1 << 24  # numbers in the table of trends: with many columns it holds fewer days
VIDEO_DECAY: float = 0.7  # memory: weight of a user's click against the next later one
VIDEO_BACKOFF: float = 40.0  # memory: counts that a video's column stands for
COLUMN_BACKOFF: float = 50.0  # memory: counts that popularity stands for
POPULARITY_DISCOUNT: float = 0.3  # memory: of popularity, taken off what is near each click
HABIT_DECAY: float = 0.95  # habit: weight of a user's column click against the next later one
TEMPERATURE: float = 1.5  # of the towers' softmax in the mix
COLUMNS_AT_ONCE: int = 8192  # columns whose vectors are computed at once
SCORES_AT_ONCE: int = 1 << 17  # scores of users for columns in a block: bounds the memory, and fits a cache

OF_WINDOWS: Final = ("user_feature", "user_column", "user_gap", "trend_row", "target_column", "target_item")
NUM_TRENDS: Final = len(TREND_REACHES)
NUM_GAPS: Final = 32  # kinds of gaps between a click and the moment asked for: 0 is not known, then factors of two


class Block(layers.Layer):
    """A post-norm transformer block (Vaswani et al. 2017), over a sequence or over a set.

    max_age makes it causal, with a learned bias for how many clicks back each head looks (ages above max_age share the
    last): a position means the same however long the window. Without max_age the inputs are a set.
    """

    def __init__(self, dim, num_heads, ffn_ratio, dropout, max_age=None):
        super().__init__()
        self.dim, self.num_heads, self.max_age = dim, num_heads, max_age
        self.query_key_value, self.output_projection = dense(3 * dim), dense(dim)
        self.expand, self.contract = dense(ffn_ratio * dim, activation="relu"), dense(dim)
        self.dropout = layers.Dropout(dropout)
        if max_age is not None:
            self.age_bias = self.add_weight((num_heads, max_age + 1), "zeros", name="age_bias")

    def call(self, states, mask, training=False):
        """States [batch, len, dim], mask [batch, len] (True = real) -> states [batch, len, dim]."""
        states = rms_norm(states + self.attend(states, mask))
        return rms_norm(states + self.dropout(self.contract(self.expand(states)), training=training))

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
        self.dropout = layers.Dropout(dropout)
        self.blocks = [Block(dropout=dropout, **block) for _ in range(num_blocks)]

    def call(self, states, mask, training=False):
        """Embeddings [batch, len, dim], mask [batch, len] -> states [batch, len, dim], zero where there is padding."""
        states = self.dropout(rms_norm(states), training=training)
        for block in self.blocks:
            states = block(states, mask, training=training)
        return states * tf.cast(mask, states.dtype)[..., None]


def rms_norm(inputs):
    """Return inputs scaled so that the mean square of the last axis is 1 (Zhang and Sennrich 2019), without a gain."""
    return keras.ops.rms_normalization(inputs, epsilon=1e-6)


class BST_DSSM(keras.Model):
    """Both towers over shared embeddings; num_videos and num_columns are the sizes of the index.

    The columns that show a video, shelves as of shelves_table(), are side information on it, as in EGES (Wang et al. 2018,
    "Billion-scale commodity embedding for e-commerce recommendation in Alibaba"): a rare video leans on them. The other
    arguments are kept in `arguments`: BST_DSSM(**arguments, shelves=...) builds the same model. Numbers beyond the index
    are safe: such a video is an unknown one, such a column has no embedding of its own.
    """

    def __init__(self, num_videos, num_columns, emb_dim=EMB_DIM, num_heads=NUM_HEADS, user_blocks=USER_BLOCKS,
                 item_blocks=ITEM_BLOCKS, ffn_ratio=FFN_RATIO, dropout=0.0, max_age=USER_MAX_LEN - 2, column_map=True,
                 num_trends=NUM_TRENDS, shelves=((0,),)):  # fmt: skip
        super().__init__()
        if emb_dim % num_heads:
            raise InputError(f"EMB_DIM = {emb_dim} is no multiple of NUM_HEADS = {num_heads}")
        self.arguments = dict(
            num_videos=num_videos, num_columns=num_columns, emb_dim=emb_dim, num_heads=num_heads,
            user_blocks=user_blocks, item_blocks=item_blocks, ffn_ratio=ffn_ratio, dropout=dropout, max_age=max_age,
            column_map=column_map, num_trends=num_trends,
        )  # fmt: skip
        self.num_videos, self.num_columns = num_videos, num_columns
        self.shelves = tf.constant(shelves)
        self.video_embedding = self.add_weight((FIRST_VIDEO + num_videos, emb_dim), small_normal(), name="videos")
        self.column_embedding = self.add_weight((1 + num_columns, emb_dim), small_normal(), name="columns")
        block = dict(dim=emb_dim, num_heads=num_heads, ffn_ratio=ffn_ratio, dropout=dropout)
        self.user_tower = Tower(user_blocks, max_age=max_age, **block)
        self.column_tower = Tower(item_blocks, **block)
        self.column_map = dense(emb_dim) if column_map else None
        self.scale = self.add_weight(shape=(), initializer=keras.initializers.Constant(INIT_SCALE), name="scale")
        self.gap_embedding = self.add_weight((NUM_GAPS, emb_dim), "zeros", name="gaps")
        first_weights = keras.initializers.Constant(1 / num_trends)  # the share of these days instead of all before
        self.trend_weights = self.add_weight((num_trends,), first_weights, name="trends")

    def call(self, inputs):
        """Histories (user_feature, user_column, user_gap) and columns (item_feature, item_column) -> logits [batch, items].

        They are for the click that follows the last one, without trend.
        """
        users = self.user_vectors(inputs["user_feature"], inputs["user_column"], inputs["user_gap"])
        vectors = self.column_vectors(inputs["item_feature"], inputs["item_column"])
        return self.scaled_cosines(self.last_vectors(users, inputs["user_feature"]), vectors)

    def user_vectors(self, videos, columns, gaps, training=False):
        """Clicked videos, their columns and gaps [batch, len] -> vectors [batch, len, dim]: the user after each click.

        A gap is of gap_buckets(): between the click and the moment asked for.
        """
        when = tf.gather(self.gap_embedding.value, gaps) * tf.cast(gaps > 0, tf.float32)[..., None]
        states = self.embed_videos(videos) + self.embed_columns(columns) + when
        return tf.math.l2_normalize(self.user_tower(states, videos != PAD, training=training), axis=-1)

    def last_vectors(self, users, videos):
        """User vectors [batch, len, dim] and videos [batch, len] -> [batch, dim]: the user after the last click."""
        last = tf.maximum(tf.math.count_nonzero(videos, axis=1, dtype=tf.int32) - 1, 0)
        return tf.gather(users, last, batch_dims=1)

    def column_vectors(self, videos, columns, training=False):
        """Each column's videos [columns, len] and own numbers [columns] -> vectors [columns, dim].

        The mean over the videos' states, with column_map a linear map of it, since to be clicked is not to be next, and the
        column's own embedding, which a column newer than the model lacks.
        """
        mask = videos != PAD
        states = self.column_tower(self.embed_videos(videos), mask, training=training)
        mean = tf.reduce_sum(states, axis=1) / tf.maximum(tf.math.count_nonzero(mask, 1, True, states.dtype), 1)
        if self.column_map:
            mean += self.column_map(mean)
        return tf.math.l2_normalize(mean + self.embed_columns(columns), axis=-1)

    def scaled_cosines(self, users, vectors):
        """User vectors [n, dim] and column vectors [columns, dim] -> [n, columns]."""
        return tf.matmul(self.scale * users, vectors, transpose_b=True)

    def embed_videos(self, videos):
        """Video numbers -> embeddings, plus the mean of those of the columns that show each.

        One beyond the vocabulary has the embedding of an unknown one, and its columns.
        """
        distinct, place = tf.unique(tf.reshape(videos, [-1]))  # of each video its columns are looked up once
        numbers = tf.where(distinct < FIRST_VIDEO + self.num_videos, distinct, UNKNOWN)
        own = tf.gather(self.video_embedding.value, numbers)  # unlike Keras' Embedding, never copies the whole table
        columns = tf.gather(self.shelves, tf.where(distinct < len(self.shelves), distinct, PAD))
        shown = tf.where(columns > 0)
        shelves, shelf = tf.unique(tf.gather_nd(columns, shown))
        embedded = own + tf.sparse.segment_mean(self.embed_columns(shelves), shelf, shown[:, 0], tf.size(distinct))
        return tf.gather(embedded, tf.reshape(place, tf.shape(videos)))

    def embed_columns(self, columns):
        """Column numbers -> embeddings; zeros for no column and for one newer than the model."""
        known = (columns > 0) & (columns <= self.num_columns)
        embedded = tf.gather(self.column_embedding.value, tf.where(known, columns, 0))
        return embedded * tf.cast(known, embedded.dtype)[..., None]


def dropout_for(video_clicks):
    """Return DROPOUT; where it is None 1 / sqrt(clicks per clicked video), from .1 to .3, for clicks [videos].

    What is known of a video from n clicks is known to about 1 / sqrt(n): the rarer videos are, the more is left out.
    """
    rarity = (np.count_nonzero(video_clicks) / max(video_clicks.sum(), 1)) ** 0.5
    return round(min(max(rarity, 0.1), 0.3), 2) if DROPOUT is None else DROPOUT


def build_model(**arguments):
    """Return a BST_DSSM with all its weights, which Keras makes only when a model first sees a batch."""
    keras.config.set_floatx("float32")  # whatever the user's keras.json says
    model = BST_DSSM(**arguments)
    number = tf.ones([1, 1], tf.int32)
    user = {"user_feature": number, "user_column": number, "user_gap": number}
    model(user | {"item_feature": number, "item_column": number[0]})
    return model


def small_normal():
    """Return the initializer of embeddings and kernels."""
    return keras.initializers.RandomNormal(stddev=INIT_STDDEV)


def dense(units, **options):
    """Return a dense layer of this model: without bias, which the norms make good."""
    return layers.Dense(units, kernel_initializer=small_normal(), use_bias=False, **options)


def training_loss(model, batch, kind=LOSS, trends=None, aux_weight=AUX_WEIGHT, replica=0, num_replicas=1):
    """Return the loss, a scalar, of a training batch of get_dataset.py: the mean over its targets, and the auxiliary loss.

    trends are the table of a Trend. Of several replicas each gives the part of every num_replicas-th window, counted from
    `replica`: the parts add up to the loss of one. Where each column is a single video, the auxiliary loss would say the
    same again and is left out.
    """
    windows = batch | {name: value[replica::num_replicas] for name, value in batch.items() if name in OF_WINDOWS}
    users = model.user_vectors(windows["user_feature"], windows["user_column"], windows["user_gap"], training=True)
    loss = column_loss(model, users, windows, kind, trends)
    loss = tf.math.divide_no_nan(loss, tf.math.count_nonzero(batch["target_column"], dtype=tf.float32))
    if not aux_weight or batch["item_feature"].shape[1] == 1:
        return loss
    following = batch["user_feature"][:, 1:]
    videos = tf.unique(tf.boolean_mask(following, following >= FIRST_VIDEO))[0][:AUX_VIDEOS]
    number = tf.math.count_nonzero(following[..., None] == videos, dtype=tf.float32)
    auxiliary = video_loss(model, users, windows["user_feature"], videos)
    return loss + aux_weight * tf.math.divide_no_nan(auxiliary, number)


def column_loss(model, users, windows, kind, trends):
    """Return the summed loss, a scalar, of the columns clicked next among the candidates, of user vectors [batch, len, dim]."""
    targets = tf.where(windows["target_column"] > 0)  # [n, 2]: window, place
    wanted, items = (tf.gather_nd(windows[name], targets) for name in ("target_column", "target_item"))  # [n]
    vectors = model.column_vectors(windows["item_feature"], windows["item_column"], training=True)
    logits = model.scaled_cosines(tf.gather_nd(users, targets), vectors)  # [n, items]
    if trends is not None:
        days, day = tf.unique(tf.gather_nd(windows["trend_row"], targets))
        of_days = tf.gather(tf.gather(trends, days), windows["item_column"], axis=1)  # [days, items, num_trends]
        logits += tf.gather(tf.linalg.matvec(of_days, model.trend_weights.value), day)
    number = tf.size(windows["item_log_prob"])
    own, candidates = tf.gather(logits, items, batch_dims=1), windows["item_column"][-number:]
    others = tf.where(wanted[:, None] == candidates, -1e9, logits[:, -number:])
    return candidate_loss(own, others, windows["item_log_prob"][0], kind)


def video_loss(model, users, clicked, videos):
    """Return the summed auxiliary loss, a scalar: which of the videos [n] is clicked next, each as a column of its own.

    users [batch, len, dim] are user vectors, clicked [batch, len] the videos that they clicked; a click on another than the
    n is no target. So both towers learn from every click, in a column or not, as in DIEN (Zhou et al. 2019, "Deep interest
    evolution network for click-through rate prediction").
    """
    targets = tf.where(clicked[:, 1:, None] == videos)  # [n, 3]: window, place, video
    vectors = model.column_vectors(videos[:, None], tf.zeros_like(videos), training=True)
    logits = model.scaled_cosines(tf.gather_nd(users, targets[:, :2]), vectors)
    return tf.reduce_sum(tf.nn.sparse_softmax_cross_entropy_with_logits(targets[:, 2], logits))


def candidate_loss(own, others, log_prob, kind=LOSS):
    """Return the sum of the losses of targets, a scalar: own [n] are their logits, others [n, m] the candidates'.

    log_prob is the log of how often each candidate is drawn: it is weighted by the inverse of that, so that a sample stands
    for all (Bengio and Senecal 2008). "softmax" is the cross-entropy of a target among the others, "bce" the sum of the
    binary cross-entropies. A logit of -1e9 leaves a candidate out.
    """
    if kind == "softmax":
        losses = tf.nn.softplus(tf.reduce_logsumexp(others, axis=1) - log_prob - own)
    elif kind == "bce":
        losses = tf.nn.softplus(-own) + tf.reduce_sum(tf.nn.softplus(others), axis=1) * tf.exp(-log_prob)
    else:
        raise InputError(f'LOSS = {kind!r}: it must be "softmax" or "bce"')
    return tf.reduce_sum(losses)


# ---------------------------------------------------------------- what is counted: trend, memory and habit


class Trend:
    """How much more often columns were clicked lately than before, on each day, of Pairs by day.

    `table`, float32 [rows, columns + 1, num_trends]: for each of TREND_REACHES the logarithm of a column's share in the clicks
    of the days before, earlier ones weighing less, against its share in all clicks before; `backoff` clicks a column pull
    towards that. Only clicks since a column's first count: the days before there was a shelf say nothing about it. No day
    sees itself or a later one. Row 0, of no known day, and columns not clicked before are neutral: 0. The last row is for
    the day after the last one, and for all later ones. `shares` [rows, columns + 1] are those of the first reach.
    """

    def __init__(self, daily, num_columns, reaches=TREND_REACHES, backoff=TREND_BACKOFF, size=TREND_SIZE):
        days, columns, clicks = daily
        first, last = 0, -2
        if len(days):  # a few clicks of wrong clocks, years after all others, are no days
            most = days[np.searchsorted(np.cumsum(clicks), 0.999 * clicks.sum())]
            first, last = int(days[0]), int(days[np.searchsorted(days, most + 366) - 1])
        self.first = max(first, last + 1 - size // ((num_columns + 1) * len(reaches)))  # days before it have no row
        self.table = np.zeros([last - self.first + 3, num_columns + 1, len(reaches)], np.float32)
        self.shares = np.zeros(self.table.shape[:2], np.float32)
        # Clicks of each column: all, recent ones, and the recent ones of all columns since the first of this one.
        ever, recent, since = (np.zeros([num_columns + 1, width]) for width in (1, len(reaches), len(reaches)))
        for day in range(first, last + 2):
            of_day, row = slice(*np.searchsorted(days, [day, day + 1])), day - self.first + 1
            if ever.any() and row > 0:
                share, prior = ever / ever.sum(), backoff * np.count_nonzero(ever)
                lately = (recent + prior * share) / (since + prior)
                self.table[row] = np.log(np.divide(lately, share, where=ever > 0, out=np.ones_like(lately)))
                self.shares[row] = lately[:, 0]
            recent, since = recent * reaches, since * reaches
            for sums in (ever, recent):
                sums[columns[of_day]] += clicks[of_day, None]
            since[ever[:, 0] > 0] += clicks[of_day].sum()

    def rows(self, times):
        """Return the row of each moment's day, a tensor as times, int64; 0 where it is not known, or before all days."""
        rows = tf.clip_by_value(times // DAY - self.first + 1, 0, len(self.table) - 1)
        return tf.where(times > 0, rows, 0)


class Memory:
    """A counted ranking beside the towers, in the spirit of kNN language models (Khandelwal et al. 2020).

    A column scores by how often it was clicked near the user's last videos. A video seen rarely backs off to the column
    it was clicked in most, and that column to popularity. Of popularity a part is taken off again: what is near every
    video says little.
    """

    def __init__(self, counts, index, constants=None):
        """Of Counts, for the Index of today, by a model's constants {name: value}; None: those of today."""
        self.constants = constants or constants_of("get_dataset", __name__)
        num_videos, num_numbers = FIRST_VIDEO + len(index.videos), 1 + len(index.columns)
        videos, columns, clicks = counts.clicks
        self.video_clicks = np.bincount(videos, clicks, num_videos)
        self.column_clicks = np.bincount(columns, clicks, num_numbers)
        self.video_clicks[:FIRST_VIDEO] = self.column_clicks[0] = 0
        self.popularity = self.column_clicks[1:] / max(self.column_clicks.sum(), 1)

        self.video_column = np.zeros(num_videos, int)  # the column that each was clicked in most, 0 = in none
        for number, shelf in reversed(list(enumerate(index.columns.values(), start=1))):
            self.video_column[shelf] = number  # of a video never clicked in a column, the first that shows it
        (main,) = np.nonzero((columns > 0) & (videos >= FIRST_VIDEO))
        main = main[np.lexsort((-columns[main], clicks[main]))]  # the last one written stays
        self.video_column[videos[main]] = columns[main]

        column_of = self.video_column[counts.near.rows]
        by_column = sum_pairs(*(part[column_of > 0] for part in counts.near._replace(rows=column_of)))
        self.by_video = CountTable(counts.near, num_videos, num_numbers)
        self.by_column = CountTable(by_column, num_numbers, num_numbers)
        of_trend = (self.constants[f"TREND_{name}"] for name in ("REACHES", "BACKOFF", "SIZE"))
        self.trend = Trend(counts.daily, len(index.columns), *of_trend)

    def scores(self, videos, columns):
        """Return float64 [n, columns] for histories [n, len] of videos and columns, padded at the end."""
        by = self.constants
        ages = np.count_nonzero(videos, axis=1)[:, None] - 1 - np.arange(videos.shape[1])  # below 0: padding
        weights = np.where(ages >= 0, by["VIDEO_DECAY"] ** np.abs(ages), 0)
        per_count = weights / (self.by_video.totals[videos] + by["VIDEO_BACKOFF"])
        scores = self.by_video.weighted_rows(videos, per_count)
        column = np.where(self.video_column[videos] > 0, self.video_column[videos], columns)
        per_count *= by["VIDEO_BACKOFF"] / (self.by_column.totals[column] + by["COLUMN_BACKOFF"])
        scores += self.by_column.weighted_rows(column, per_count)
        popular = by["COLUMN_BACKOFF"] * per_count - by["POPULARITY_DISCOUNT"] * weights
        return scores + popular.sum(axis=1, keepdims=True) * self.popularity

    def recent_popularity(self, now):
        """Return the share of each column in the clicks of the days before the moments [n], [n, columns]; of all where unknown."""
        rows, of_user = np.unique(self.trend.rows(now), return_inverse=True)
        shares = self.trend.shares[rows, 1:].astype(float)
        return np.where(shares.any(axis=1, keepdims=True), shares, self.popularity)[of_user]

    def habit(self, users, mix):
        """Return float64 [n, columns]: the Users' own columns, and recent popularity.

        Late clicks weigh more and, with habit_hours, those at an hour of the day near that of the clock.
        """
        weights = recency(users.columns > 0, self.constants["HABIT_DECAY"])
        if mix.habit_hours:
            later = (users.clock[:, None] - users.times) / 3600 % 24
            near = np.exp(-np.minimum(later, 24 - later) / mix.habit_hours)
            weights *= np.where((users.times > 0) & (users.clock[:, None] > 0), near, 1.0)
        own = sum_by_number(users.columns, weights, len(self.column_clicks))
        own /= np.maximum(own.sum(axis=1, keepdims=True), 1e-12)
        return (1 - mix.habit_popularity) * own + mix.habit_popularity * self.recent_popularity(users.now)


def recency(in_column, decay):
    """Return float [n, len]: 1 for the last of the clicks that are in_column [n, len], decay for the one before, ...; else 0."""
    later = np.cumsum(in_column[:, ::-1], axis=1)[:, ::-1] - in_column  # column clicks that follow
    return np.where(in_column, decay**later, 0.0)


def sum_by_number(columns, values, num_numbers):
    """Return float64 [n, columns]: in each row the sums of values [n, any] by their column numbers [n, any], without 0."""
    keys = columns + num_numbers * np.arange(len(columns))[:, None]
    sums = np.bincount(keys.ravel(), values.ravel(), num_numbers * len(columns))
    return sums.reshape(-1, num_numbers)[:, 1:]


# ---------------------------------------------------------------- the mix, and the one way to score


class Mix(NamedTuple):
    """How towers, memory and habit are put together, as chosen on validation."""

    memory_weight: float
    habit_weight: float  # the towers have the rest
    clicked_factor: float  # for columns that the user clicked before
    habit_popularity: float  # share of recent popularity in habit
    habit_hours: float = 0.0  # so many hours of the day from the clock a click counts 1/e in habit; 0: at any hour 1

    def weights(self):
        """Return the weights of towers, memory and habit."""
        return [1 - self.memory_weight - self.habit_weight, self.memory_weight, self.habit_weight]

    def apply(self, parts, clicked):
        """Parts [3, n, columns], as of Scorer, and which columns were clicked before [n, columns] -> probabilities."""
        mixed = np.tensordot(self.weights(), parts, 1)
        factor = max(self.clicked_factor, 1e-9)  # above 0, so every score is finite
        np.multiply(mixed, factor, out=mixed, where=clicked)
        mixed /= mixed.sum(axis=1, keepdims=True)
        return mixed


class Users(NamedTuple):
    """Histories, padded at the end: what is known of users when they are ranked for."""

    videos: np.ndarray  # numbers [n, len], oldest first
    columns: np.ndarray  # numbers [n, len]
    times: np.ndarray  # unix seconds [n, len], 0 = not known
    now: np.ndarray  # the moments to rank for [n], 0 = not known
    clock: np.ndarray  # the same [n], but 0 where the day is known and the hour is only supposed

    def is_known(self):
        """Return which histories hold a known click, bool [n]."""
        return ((self.videos > UNKNOWN) | (self.columns > 0)).any(axis=1)


class Scorer:
    """Scores the current columns for Users: the one way, for validation, for the test and for the rankings."""

    def __init__(self, model, memory, index):
        self.model, self.memory = model, memory
        self.numbers = np.array([n for n, videos in enumerate(index.columns.values(), start=1) if videos], np.int32)
        self.cids = [cid for cid, videos in index.columns.items() if videos]  # of the current columns, as are all below
        self.clicks = memory.column_clicks[self.numbers]
        self.column_videos = column_table(index, memory.video_clicks, memory.constants["ITEM_MAX_LEN"])[self.numbers]
        self.unclicked = np.flatnonzero(self.clicks == 0)
        columns = memory.video_column[self.column_videos[self.unclicked]]  # those that its videos were clicked in most
        self.relatives = np.where(memory.column_clicks[columns] > 0, columns, 0)
        self.is_counted = np.ones(len(self.numbers))  # 1 of a column that has clicks, or relatives
        self.is_counted[self.unclicked] = self.relatives.any(axis=1)
        self.refresh()

        numbers, times = tf.TensorSpec([None, None], tf.int32), tf.TensorSpec([None, None], tf.int64)
        vectors = tf.TensorSpec([len(self.numbers), model.column_embedding.shape[1]])

        @tf.function(input_signature=[numbers, numbers, times, times, vectors], autograph=False)
        def cosines(videos, columns, times, asked, vectors):
            users = model.user_vectors(videos, columns, gap_buckets(times, asked))
            return model.scaled_cosines(model.last_vectors(users, videos), vectors)

        self.cosines = cosines

    def refresh(self):
        """Take the columns' vectors, and the weights of the trends, from the model as it is now."""
        blocks = np.array_split(np.arange(len(self.numbers)), 1 + len(self.numbers) // COLUMNS_AT_ONCE)
        vectors = [self.model.column_vectors(self.column_videos[b], self.numbers[b]) for b in blocks]
        self.vectors = tf.concat(vectors, axis=0)
        self.trend_logits = self.memory.trend.table[:, self.numbers] @ self.model.trend_weights.numpy()

    def towers(self, users):
        """Return what the towers give, with the trend: logits [n, current columns]."""
        asked = np.pad(users.times[:, 1:], [(0, 0), (0, 1)])
        last = np.maximum(np.count_nonzero(users.videos, axis=1) - 1, 0)
        asked[np.arange(len(last)), last] = users.now
        clicks = np.int32(users.videos), np.int32(users.columns), np.int64(users.times), np.int64(asked)
        logits, days = self.cosines(*clicks, self.vectors), self.memory.trend.rows(users.now)
        return logits.numpy() + self.trend_logits[days.numpy()]

    def parts(self, users, *mixes):
        """Return what is mixed, the probabilities of towers, memory and the habit of each Mix: [2 + mixes, n, current columns].

        The Mixes differ in habit alone. For a user without any known click all parts are popularity.
        """
        logits = self.towers(users).astype(float)
        logits = (logits - logits.max(axis=1, keepdims=True)) / self.memory.constants["TEMPERATURE"]
        towers = np.exp(np.maximum(logits, -700))  # above 0, so every score is finite
        towers /= towers.sum(axis=1, keepdims=True)
        counted = [self.memory.scores(users.videos, users.columns)]
        counted += [self.memory.habit(users, mix) for mix in mixes]
        parts, unknown = np.array([towers, *(self.share_out(scores, towers) for scores in counted)]), ~users.is_known()
        if unknown.any():
            popular = self.estimated(self.memory.recent_popularity(users.now[unknown])) * self.clicks.sum() + 0.5
            parts[:, unknown] = popular / popular.sum(axis=1, keepdims=True)
        return parts

    def share_out(self, scores, towers):
        """Return counted scores as probabilities: they share out what the towers give the columns that are counted.

        Any other column keeps what the towers give it, so no weight of the mix pushes it down.
        """
        scores = np.maximum(self.estimated(scores), 1e-9) * self.is_counted
        scores *= (towers @ self.is_counted / np.maximum(scores.sum(axis=1), 1e-12))[:, None]  # 0: none is counted
        return scores + towers * (1 - self.is_counted)

    def probabilities(self, users, mix):
        """Return probabilities [n, current columns] by a Mix: those of the rankings."""
        return mix.apply(self.parts(users, mix), self.clicked(users.columns))

    def clicked(self, columns):
        """Return whether each current column is among those clicked, bool [n, current columns]."""
        clicked = np.zeros([len(columns), len(self.memory.column_clicks)], bool)
        clicked[np.arange(len(columns))[:, None], columns] = True
        return clicked[:, self.numbers]

    def estimated(self, scores):
        """As of_current(), but a column that nobody clicked has the mean of its relatives: it may be as good as they are."""
        current, numbers = self.of_current(scores), self.relatives
        of_relatives = np.pad(scores, [(0, 0), (1, 0)])[:, numbers].sum(axis=2)
        current[:, self.unclicked] = of_relatives / np.maximum(np.count_nonzero(numbers, axis=1), 1)
        return current

    def of_current(self, scores):
        """Scores [n, columns] -> [n, current columns]."""
        return scores[:, self.numbers - 1]


def main():
    rng = np.random.default_rng(0)
    model = build_model(num_videos=1000, num_columns=50)
    batch = {
        "user_feature": tf.constant(rng.integers(FIRST_VIDEO, 1000, [4, USER_MAX_LEN]), tf.int32),
        "user_column": tf.constant(rng.integers(0, 51, [4, USER_MAX_LEN]), tf.int32),
        "user_gap": tf.constant(rng.integers(0, NUM_GAPS, [4, USER_MAX_LEN]), tf.int32),
        "item_feature": tf.constant(rng.integers(FIRST_VIDEO, 1000, [50, ITEM_MAX_LEN]), tf.int32),
        "item_column": tf.range(1, 51),
    }
    logits = model(batch)
    model.summary()
    low, high = float(tf.reduce_min(logits)), float(tf.reduce_max(logits))
    print(f"logits [users, columns]: {list(logits.shape)}, from {low:.1f} to {high:.1f}")


if __name__ == "__main__":
    run_script(__file__)
