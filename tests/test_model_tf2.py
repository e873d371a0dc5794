"""The towers, their loss, the trend, the memory, habit, the mix of all, and the one that scores."""

import itertools
from types import SimpleNamespace

import model_tf2
from get_dataset import DAY, NO_PAIRS, Counts, Pairs
from get_indexing import FIRST_VIDEO, PAD, UNKNOWN, Index, InputError, constants_of
from model_tf2 import (
    NUM_GAPS, TREND_BACKOFF, TREND_REACHES,
    Memory, Mix, Scorer, Trend, Users, build_model, training_loss,
)  # fmt: skip
from train import make_scorer

import keras
import numpy as np
import pytest
import tensorflow as tf

NUM_VIDEOS, NUM_COLUMNS, DIM = 30, 6, 8
LAST_VIDEO = FIRST_VIDEO + NUM_VIDEOS - 1
KINDS = pytest.mark.parametrize("kind", ["softmax", "bce"])


def shaken(**arguments):
    """A model with large random weights, biases of ages, of gaps and of trends too, so that whatever is read shows."""
    sizes = dict(num_videos=NUM_VIDEOS, num_columns=NUM_COLUMNS, emb_dim=DIM)
    model, rng = build_model(**{**sizes, **arguments}), np.random.default_rng(5)
    for variable in model.weights:
        if variable is not model.scale:
            variable.assign(rng.normal(0, 0.7, variable.shape))
    return model


@pytest.fixture(scope="module")
def model():
    """A small model with a block in both towers."""
    return shaken(item_blocks=1)


@pytest.fixture
def clicks():
    """Numbers of videos and columns, and gaps, [3, 7] each, of three users' clicks."""
    rng = np.random.default_rng(6)
    videos, columns = rng.integers(FIRST_VIDEO, LAST_VIDEO + 1, [3, 7]), rng.integers(0, NUM_COLUMNS + 1, [3, 7])
    return [numbers.astype(np.int32) for numbers in (videos, columns, rng.integers(0, NUM_GAPS, [3, 7]))]


@pytest.fixture
def shelves():
    """Video numbers [4, 5] and column numbers [4] of four columns."""
    videos = np.random.default_rng(7).permutation(np.arange(FIRST_VIDEO, FIRST_VIDEO + 20)).reshape(4, 5)
    return videos.astype(np.int32), np.arange(1, 5, dtype=np.int32)


def inputs_of(clicks, shelves):
    return dict(zip((*HISTORY, "item_feature", "item_column"), (*clicks, *shelves), strict=True))


def after(array, padding):
    return np.pad(array, [(0, 0), (0, padding)])


def close(a, b, tolerance=1e-5):
    return np.allclose(a, b, rtol=0, atol=tolerance)


# ---------------------------------------------------------------- towers


@pytest.mark.parametrize("padding", [1, 60])
def test_neither_padding_nor_the_order_of_a_columns_videos_changes_anything(model, clicks, shelves, padding):
    vectors, (videos, numbers) = model.user_vectors(*clicks).numpy(), shelves
    longer, padded = [after(array, padding) for array in clicks], (after(videos, padding), numbers)
    assert close(tf.function(model.user_vectors)(*longer)[:, :7], vectors)
    assert close(model.user_vectors(*longer)[:, :7], vectors)
    assert close(model.user_vectors(*(np.pad(of, [(0, 0), (padding, 0)]) for of in clicks))[:, padding:], vectors)
    for of_column in (padded[0], padded[0][:, ::-1]):
        assert close(model.column_vectors(of_column, numbers), model.column_vectors(videos, numbers))
    assert close(model(inputs_of(longer, padded)), model(inputs_of(clicks, shelves)), 1e-4)


@pytest.mark.parametrize("place", range(6))
def test_a_user_vector_does_not_depend_on_later_clicks(model, clicks, place):
    vectors, changed = model.user_vectors(*clicks).numpy(), [array.copy() for array in clicks]
    changed[0][:, place + 1 :] = FIRST_VIDEO + (changed[0][:, place + 1 :] - FIRST_VIDEO + 1) % NUM_VIDEOS
    changed[1][:, place + 1 :] = (changed[1][:, place + 1 :] + 1) % (NUM_COLUMNS + 1)
    changed[2][:, place + 1 :] = (changed[2][:, place + 1 :] + 1) % NUM_GAPS
    others = model.user_vectors(*changed).numpy()
    assert close(others[:, : place + 1], vectors[:, : place + 1])
    assert not close(others[:, place + 1], vectors[:, place + 1], 1e-3)


@pytest.mark.parametrize("which", [0, 1, 2])
def test_a_user_vector_depends_on_each_earlier_video_column_and_gap_and_on_their_order(model, clicks, which):
    vectors = model.user_vectors(*clicks).numpy()
    for place in range(7):
        changed = [array.copy() for array in clicks]
        changed[which][:, place] = np.where(changed[which][:, place] == 3, 4, 3)
        others = model.user_vectors(*changed).numpy()
        assert np.abs(others[:, -1] - vectors[:, -1]).max(axis=1).min() > 1e-4
    swapped = [array[:, [1, 0, *range(2, 7)]] for array in clicks]
    assert not close(model.user_vectors(*swapped)[:, -1], vectors[:, -1], 1e-3)


def test_vectors_have_length_one(model, clicks, shelves):
    assert close(np.linalg.norm(model.user_vectors(*clicks), axis=-1), 1)
    assert close(np.linalg.norm(model.column_vectors(*shelves), axis=-1), 1)


def test_logits_are_the_scaled_cosines_with_the_user_after_the_last_click(clicks, shelves):
    """Of histories of different length; clicks older than max_age are read too. A column is newer than the model."""
    model, (shelf, numbers) = shaken(max_age=2), (shelves[0], np.array([1, 2, 3, 9], np.int32))
    for row, length in enumerate([7, 4, 1]):
        for numbers_of in clicks:
            numbers_of[row, length:] = 0
    last, items = model.user_vectors(*clicks).numpy()[[0, 1, 2], [6, 3, 0]], model.column_vectors(shelf, numbers)
    assert close(model(inputs_of(clicks, (shelf, numbers))), float(model.scale) * last @ items.numpy().T, 1e-4)
    clicks[0][0, 0] = 1 + clicks[0][0, 1]
    assert not close(model.user_vectors(*clicks)[0, 6], last[0], 1e-4)


def test_gaps_change_a_vector_where_times_are_known_and_something_was_learned_of_gaps(model, clicks):
    """Without times all is the same, whatever was learned; nor does a time change the vectors of the clicks before it."""
    others, (videos, columns, gaps) = shaken(item_blocks=1), clicks
    others.gap_embedding.assign(-3 * others.gap_embedding.numpy())
    none, some = np.zeros_like(gaps), np.where(np.arange(7) < 4, 0, 1 + gaps // 2)
    assert np.array_equal(others.user_vectors(videos, columns, none), model.user_vectors(videos, columns, none))
    both = [of.user_vectors(videos, columns, some).numpy() for of in (others, model)]
    assert close(both[0][:, :4], both[1][:, :4]) and not close(both[0][:, 4], both[1][:, 4], 1e-2)
    new = build_model(num_videos=NUM_VIDEOS, num_columns=NUM_COLUMNS, emb_dim=DIM)
    assert np.array_equal(new.user_vectors(videos, columns, gaps), new.user_vectors(videos, columns, none))


def test_empty_users_and_empty_columns_give_no_nan(model, clicks, shelves):
    (shelf, numbers), third = (array.copy() for array in shelves), model.user_vectors(*clicks)[2]
    for of in clicks:
        of[0], of[1, 3:] = 0, 0
    shelf[0], shelf[1], numbers[0] = 0, 0, 0
    with tf.GradientTape() as tape:
        users, items = model.user_vectors(*clicks), model.column_vectors(shelf, numbers)
        logits = model.scaled_cosines(model.last_vectors(users, clicks[0]), items)
    gradients = [g for g in tape.gradient(logits, model.trainable_variables) if g is not None]  # none: the trend's
    assert all(np.isfinite(tf.convert_to_tensor(of)).all() for of in (users, items, logits, *gradients))
    assert close(users[2], third) and close(logits[0], 0)  # an empty user ranks nothing


@pytest.mark.parametrize("number", [LAST_VIDEO + 1, 10**9])
def test_a_video_beyond_the_vocabulary_is_an_unknown_one_and_the_last_of_it_is_not(model, clicks, shelves, number):
    (videos, *rest), (shelf, numbers) = clicks, shelves
    newer, unknown, shelf_newer, shelf_unknown = videos.copy(), videos.copy(), shelf.copy(), shelf.copy()
    newer[:, 2], unknown[:, 2], shelf_newer[:, 1], shelf_unknown[:, 1] = number, UNKNOWN, number, UNKNOWN
    assert close(model.user_vectors(newer, *rest), model.user_vectors(unknown, *rest))
    assert close(model.column_vectors(shelf_newer, numbers), model.column_vectors(shelf_unknown, numbers))
    assert not close(model.user_vectors(newer, *rest), model.user_vectors(videos, *rest), 1e-3)
    newer[:, 2] = LAST_VIDEO
    assert not close(model.user_vectors(newer, *rest), model.user_vectors(unknown, *rest), 1e-3)


def test_a_video_has_the_mean_of_the_columns_that_show_it_beside_its_own_embedding(model):
    """Also one newer than the model, in columns of which one is newer too; padding, and what no column shows, has none."""
    shown_in = np.zeros([LAST_VIDEO + 2, 3], np.int32)
    shown_in[4], shown_in[LAST_VIDEO + 1] = [2, 5, 0], [3, NUM_COLUMNS + 1, 0]
    informed = build_model(**model.arguments, shelves=shown_in)
    informed.set_weights(model.get_weights())
    own, columns = model.video_embedding.numpy(), model.column_embedding.numpy()
    embedded = informed.embed_videos(np.array([4, 5, PAD, LAST_VIDEO + 1, 10**9], np.int32))
    expected = own[4] + (columns[2] + columns[5]) / 2, own[5], own[PAD], own[UNKNOWN] + columns[3] / 2, own[UNKNOWN]
    assert close(embedded, np.array(expected))


@pytest.mark.parametrize("number", [NUM_COLUMNS + 1, 10**9])
def test_a_column_newer_than_the_model_has_no_embedding_of_its_own(model, clicks, shelves, number):
    (videos, columns, gaps), (shelf, numbers) = clicks, shelves
    newer, none = (np.where(np.arange(7) == 2, of, columns) for of in (number, 0))
    assert close(model.user_vectors(videos, newer, gaps), model.user_vectors(videos, none, gaps))
    from_videos = model.column_vectors(shelf, np.zeros_like(numbers))
    assert close(model.column_vectors(shelf, np.full_like(numbers, number)), from_videos)
    assert not close(model.column_vectors(shelf, numbers), from_videos, 1e-3)
    last = np.full_like(numbers, NUM_COLUMNS)
    assert not close(model.column_vectors(shelf, last), from_videos, 1e-3)


def test_a_model_built_again_from_its_arguments_scores_the_same(clicks, shelves, tmp_path):
    given = dict(num_videos=9, num_columns=3, emb_dim=12, num_heads=3, user_blocks=2, item_blocks=0, ffn_ratio=1,
                 dropout=0.0, max_age=4, column_map=False, num_trends=2)  # fmt: skip
    model = shaken(**given)
    model.save_weights(tmp_path / "towers.weights.h5")
    again = build_model(**model.arguments)
    again.load_weights(tmp_path / "towers.weights.h5")
    assert np.array_equal(again(inputs_of(clicks, shelves)), model(inputs_of(clicks, shelves)))
    assert again.arguments == model.arguments == given


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(InputError, match=r"EMB_DIM = 10 is no multiple of NUM_HEADS = 4"):
        build_model(num_videos=9, num_columns=3, emb_dim=10, num_heads=4)


def test_dropout_is_of_training_alone_drawn_anew_and_by_the_seed_of_the_start(clicks):
    def vectors():
        keras.utils.set_random_seed(3)
        model = shaken(dropout=0.3)
        return [model.user_vectors(*clicks, training=training).numpy() for training in (False, True, True, False)]

    served, first, second, _ = vectors()
    assert not close(first, served) and not close(second, served) and not close(first, second)
    assert np.array_equal(vectors(), [served, first, second, served])


# ---------------------------------------------------------------- the loss


def loss_by_hand(own, others, log_prob, kind):
    """The loss of one target: own is its logit, others those of the candidates that are not it."""
    others = np.array(others, float)
    if kind == "softmax":
        return np.log(np.exp(own) + np.sum(np.exp(others - log_prob))) - own
    return np.log1p(np.exp(-own)) + np.sum(np.log1p(np.exp(others))) * np.exp(-log_prob)


HISTORY = "user_feature", "user_column", "user_gap"
TRENDS = np.random.default_rng(10).normal(0, 2, [5, 1 + NUM_COLUMNS, 3]).astype(np.float32)  # of 4 days
TRENDS[0] = 0  # no known day


def loss_of(model, batch, kind="softmax", **options):
    """training_loss() with trends, of the columns alone."""
    return training_loss(model, batch, kind, **dict(trends=TRENDS, aux_weight=0.0) | options)


@pytest.fixture
def batch():
    """A training batch as get_dataset.py makes it: 3 windows of up to 6 clicks, all columns as candidates."""
    rng = np.random.default_rng(11)
    videos, columns = rng.integers(FIRST_VIDEO, LAST_VIDEO, [3, 6]), rng.integers(0, 4, [3, 6])  # columns repeat
    videos[2, 4:] = columns[2, 4:] = 0
    columns[0, [0, 4]] = 2
    following = after(columns[:, 1:], 1)
    shelf = rng.permutation(np.arange(FIRST_VIDEO, LAST_VIDEO))[: NUM_COLUMNS * 4].reshape(NUM_COLUMNS, 4)
    shelf[0, 2:] = 0
    integers = {"user_feature": videos, "user_column": columns, "user_gap": rng.integers(0, NUM_GAPS, [3, 6]),
                "trend_row": rng.integers(0, len(TRENDS), [3, 6]),
                "target_column": following, "target_item": np.maximum(following - 1, 0),
                "item_column": np.arange(1, NUM_COLUMNS + 1), "item_feature": shelf}  # fmt: skip
    return {name: tf.constant(value, tf.int32) for name, value in integers.items()} | {
        "item_log_prob": tf.zeros([NUM_COLUMNS]),
    }


def only_target(batch, row, place):
    """The same batch, in which only what follows that click is a target."""
    mask = np.zeros([3, 6], np.int32)
    mask[row, place] = 1
    return batch | {"target_column": batch["target_column"] * mask}


def with_candidates(batch, candidates, log_prob):
    """The same batch, whose targets stand first among the items and then the candidates, as of many columns."""
    wanted = batch["target_column"].numpy()
    own = np.unique(wanted)
    items = np.concatenate([own, candidates]).astype(np.int32)
    feature = np.pad(batch["item_feature"], [(1, 0), (0, 0)])  # column 0 has no videos
    return batch | {
        "target_item": tf.constant(np.searchsorted(own, wanted), tf.int32),
        "item_column": tf.constant(items),
        "item_feature": tf.constant(feature[items]),
        "item_log_prob": tf.fill([len(candidates)], np.float32(log_prob)),
    }


def logits_by_hand(model, batch, row, place):
    """Logits [columns] of a target: the user after that click, every column, and its trend on the day of the target."""
    cut = [batch[name].numpy()[row : row + 1, : place + 1] for name in HISTORY]
    served = model(inputs_of(cut, (batch["item_feature"], batch["item_column"])))[0].numpy()
    return served + TRENDS[batch["trend_row"][row, place], 1:] @ model.trend_weights.numpy()


@KINDS
@pytest.mark.parametrize("candidates", [range(1, 7), [1, 3, 4, 6]])
def test_the_loss_is_that_of_the_logits_served_and_the_trend_of_each_targets_day(model, batch, kind, candidates):
    """Against all columns or some, in which a target need not be. Where no time is known it is as without trends."""
    log_prob, losses = np.log(len(candidates) / NUM_COLUMNS), []
    for row, place in np.argwhere(batch["target_column"]):
        logits, wanted = logits_by_hand(model, batch, row, place), int(batch["target_column"][row, place])
        others = [logits[number - 1] for number in candidates if number != wanted]
        losses.append(loss_by_hand(logits[wanted - 1], others, log_prob, kind))
    given = batch if len(candidates) == NUM_COLUMNS else with_candidates(batch, candidates, log_prob)
    loss = float(loss_of(model, given, kind))
    assert loss == pytest.approx(np.mean(losses), rel=1e-4)
    losses = [loss_of(model, given | {"trend_row": 0 * given["trend_row"]}, trends=of) for of in (TRENDS, None)]
    assert float(losses[0]) == pytest.approx(float(losses[1]), rel=1e-6)


def test_the_auxiliary_loss_is_of_the_video_clicked_next_among_a_few_of_the_batch(model, batch, monkeypatch):
    """As a column of its own; clicked in a column or not, but no unknown one. Where each column is one video there is none."""
    monkeypatch.setattr(model_tf2, "AUX_VIDEOS", 5)
    batch["user_feature"] = tf.tensor_scatter_nd_update(batch["user_feature"], [[0, 1]], [UNKNOWN])
    following = batch["user_feature"].numpy()[:, 1:]
    videos, losses = np.array(list(dict.fromkeys(following[following >= FIRST_VIDEO].tolist()))[:5]), []
    for row, place in np.argwhere(np.isin(following, videos)):
        cut = [batch[name].numpy()[row : row + 1, : place + 1] for name in HISTORY]
        logits = model(inputs_of(cut, (videos[:, None], np.zeros(5, int))))[0].numpy()
        losses.append(np.log(np.exp(logits).sum()) - logits[videos == following[row, place]].item())
    assert 5 <= len(losses) < np.count_nonzero(following)
    with_it, without = (float(loss_of(model, batch, aux_weight=weight)) for weight in (3.0, 0.0))
    assert with_it - without == pytest.approx(3 * np.mean(losses), rel=1e-4)
    single = batch | {"item_feature": batch["item_feature"][:, :1]}
    assert loss_of(model, single, aux_weight=3.0) == loss_of(model, single)


def test_no_target_sees_its_own_click_or_a_later_one_nor_the_trend_of_another_moment(model, batch):
    """Of one target at a time: what is changed after it leaves its loss as it is, what is changed at it does not."""
    other = {"user_feature": 2 + batch["user_feature"] % 20, "user_column": 1 + batch["user_column"] % 6,
             "user_gap": (1 + batch["user_gap"]) % NUM_GAPS, "trend_row": (1 + batch["trend_row"]) % len(TRENDS)}  # fmt: skip
    for row, place in np.argwhere(batch["target_column"])[::3]:
        alone, at = only_target(batch, row, place), np.arange(6)
        loss = float(loss_of(model, alone))
        for name, values in other.items():
            unseen = at > place if name in HISTORY else at != place
            for changed in (unseen, at == place):
                changed_batch = alone | {name: tf.where(changed, values, batch[name])}
                is_same = float(loss_of(model, changed_batch)) == pytest.approx(loss, rel=1e-5)
                assert is_same == (changed is unseen), name


@KINDS
def test_a_sample_stands_for_all_columns_in_expectation_also_where_a_user_repeats_columns(model, batch, kind):
    """Of one target, over all 20 sets of 3 of the 6 columns, which draws without replacement give alike."""
    batch = only_target(batch, 0, 3)
    logits, wanted = logits_by_hand(model, batch, 0, 3), int(batch["target_column"][0, 3])
    assert wanted in batch["user_column"][0, :4]

    def amount(given):
        """What of a loss is linear in the candidates: the softmax's denominator, or all of the other."""
        loss = float(loss_of(model, given, kind))
        return np.exp(loss + logits[wanted - 1]) if kind == "softmax" else loss

    drawn = itertools.combinations(range(1, 7), 3)
    sampled = [amount(with_candidates(batch, candidates, np.log(3 / 6))) for candidates in drawn]
    assert np.mean(sampled) == pytest.approx(amount(batch), rel=1e-4)
    assert np.std(sampled) > 0.01 * np.mean(sampled)


def gradients_of(model, batch, kind, **part):
    with tf.GradientTape() as tape:
        loss = loss_of(model, batch, kind, **part)
    gradients = tape.gradient(loss, model.trainable_variables)
    return float(loss), {v.path: g if g is None else np.array(tf.convert_to_tensor(g))
                         for v, g in zip(model.trainable_variables, gradients, strict=True)}  # fmt: skip


@KINDS
def test_every_weight_learns(batch, kind):
    """Of a model as training starts it: nothing is disconnected, in both towers, in scale, gaps and trends."""
    model = build_model(num_videos=NUM_VIDEOS, num_columns=NUM_COLUMNS, emb_dim=DIM, user_blocks=1, item_blocks=1)
    _, gradients = gradients_of(model, batch, kind)
    # Embeddings, the column tower's map and those three; four kernels a block, and the user tower's age bias.
    assert len(gradients) == 3 + 3 + (4 + 1) + 4
    assert [path for path, g in gradients.items() if g is None or not np.isfinite(g).all() or not g.any()] == []


@KINDS
@pytest.mark.parametrize("candidates", [range(1, 7), [1, 3, 4, 6]])
def test_the_parts_of_replicas_add_up_to_the_loss_and_the_gradients_of_one(model, batch, kind, candidates):
    """Also of more replicas than windows, some of which have none."""
    if len(candidates) < NUM_COLUMNS:
        batch = with_candidates(batch, candidates, np.log(4 / 6))
    options = dict(aux_weight=0.5)
    loss, gradients = gradients_of(model, batch, kind, **options)
    for replicas in (2, 5):
        parts = [gradients_of(model, batch, kind, **options, replica=replica, num_replicas=replicas)
                 for replica in range(replicas)]  # fmt: skip
        assert sum(of_part for of_part, _ in parts) == pytest.approx(loss, abs=1e-4)
        for path, gradient in gradients.items():
            assert close(np.sum([of_part[path] for _, of_part in parts], axis=0), gradient, 1e-4)


@KINDS
def test_a_batch_without_targets_gives_no_loss_and_finite_gradients(model, batch, kind):
    loss, gradients = gradients_of(model, batch | {"target_column": tf.zeros([3, 6], tf.int32)}, kind)
    assert loss == 0 and all(np.isfinite(g).all() for g in gradients.values() if g is not None)


def test_dropout_goes_by_the_clicks_per_clicked_video_unless_it_is_set(world, monkeypatch):
    """By 1 / sqrt of them, within .1 to .3: of 25 it is .2. A catalogue that nobody clicked changes nothing."""
    index, counts, clicks, *_ = world
    counts, known = counts._replace(clicks=pairs_of(9 * clicks)), 9 * clicks[2:].sum(axis=1)
    for new in (0, 5000):
        more = Index(index.videos | {f"new{number}": number for number in range(22, 22 + new)}, index.columns)
        scorer = make_scorer(tf.distribute.get_strategy(), Memory(counts, more), more, {"emb_dim": DIM})
        assert scorer.model.arguments["dropout"] == round(((known > 0).sum() / known.sum()) ** 0.5, 2) < 0.2
    assert model_tf2.dropout_for(np.array([0, 49, 1, 0])) == 0.2
    assert model_tf2.dropout_for(np.array([1600])) == 0.1
    assert model_tf2.dropout_for(np.array([3, 5])) == 0.3 and model_tf2.dropout_for(np.zeros(4)) == 0.1  # none is known
    monkeypatch.setattr(model_tf2, "DROPOUT", 0.0)
    assert model_tf2.dropout_for(np.array([0, 49, 1, 0])) == 0.0


# ---------------------------------------------------------------- trend

FIRST_DAY = 20_000


def pairs_of(array, first=0):
    """Pairs of an array [rows, columns + 1] of counts, whose first row has the number `first`."""
    rows, columns = np.nonzero(array)
    return Pairs(first + rows, columns, array[rows, columns].astype(float))


def noon(day):
    """The middle of a day, counted from the first one that has clicks."""
    return (FIRST_DAY + day) * DAY + DAY // 2


@pytest.fixture
def daily():
    """Clicks [days, columns + 1]: three days are without, column 3 is new on day 6, and nobody clicked column 4."""
    daily = np.random.default_rng(17).integers(0, 30, [9, 5])
    daily[[2, 3, 7]] = daily[:, [0, 4]] = daily[:6, 3] = 0
    return daily


def trend_by_hand(daily, day):
    """Trends [columns + 1, reaches] on a day, of the clicks of the days before it; each column's from its first click on."""
    before, trends = daily[:day], np.zeros([daily.shape[1], len(TREND_REACHES)])
    share = before.sum(axis=0) / max(before.sum(), 1)
    prior = TREND_BACKOFF * np.count_nonzero(share)
    for column, place in itertools.product(np.flatnonzero(share), range(len(TREND_REACHES))):
        weights = TREND_REACHES[place] ** np.arange(len(before))[::-1]
        weights[: np.flatnonzero(before[:, column])[0]] = 0
        lately = (weights @ before[:, column] + prior * share[column]) / (weights @ before.sum(axis=1) + prior)
        trends[column, place] = np.log(lately / share[column])
    return trends


def test_the_trend_of_a_moment_is_that_of_the_days_before_its_own(daily):
    """The last row serves all later days; a moment that is not known, or is before all clicks, has no trend."""
    trend = Trend(pairs_of(daily, FIRST_DAY), num_columns=4)
    moments = np.array([0, noon(-3), *map(noon, range(10)), noon(700), noon(4) - DAY // 2, noon(4) + DAY // 2 - 1])
    days = [None, None, *range(10), 9, 4, 4]
    rows = trend.rows(moments).numpy()
    for row, day in zip(rows, days, strict=True):
        assert close(trend.table[row], 0 if day is None else trend_by_hand(daily, day)) and (row == 0) == (day is None)
    assert not trend.table[rows[2]].any() and trend.table[rows[4], 1:3].all()
    assert (trend.table[:, 4] == 0).all() and (trend.table[: rows[9], 3] == 0).all() and trend.table[-1, 3].all()
    without = Trend(NO_PAIRS, num_columns=4)
    assert without.table.shape == (1, 5, 3) and not without.table.any() and not without.rows(moments).numpy().any()


def test_the_table_of_trends_is_bounded_however_many_days_there_are_and_all_days_count():
    """There is room for four of 1,000 days, beside the row of no known day and that of days to come."""
    daily = np.random.default_rng(18).integers(0, 9, [1000, 5]) * [0, 1, 1, 1, 0]
    daily[:900, 3] = 0
    trend = Trend(pairs_of(daily, FIRST_DAY), num_columns=4, size=4 * 5 * 3)
    assert len(trend.table) == 1 + 4 + 1
    assert trend.rows(np.array([noon(day) for day in (500, 995, 996, 1000, 5000)])).numpy().tolist() == [0, 0, 1, 5, 5]
    assert close(trend.table[-1], trend_by_hand(daily, 1000), 1e-4)


# ---------------------------------------------------------------- the memory, and habit

BY = Mix(0.5, 0.2, 1.0, 0.1)
CONSTANTS = constants_of("get_dataset", "model_tf2")
SHELVES = {f"c{i}": [*range(2 + 4 * i, 6 + 4 * i), 2, 20] for i in range(4)} | {"gone": [], "never": [19, 8]}
TODAY = SHELVES | {"c1": [], "late": [22, 2, 3], "later": [21]}


@pytest.fixture(scope="module")
def world():
    """(index, Counts, clicks and near as arrays [videos, columns + 1], the column that each video was clicked in most).

    Column 5 ("gone") was clicked and is retired, 6 was clicked by nobody; video 20 was never clicked in a column, 21 is
    on no shelf either, and 8 was never clicked at all. What near lost where it was cut is in its column 0.
    """
    rng = np.random.default_rng(12)
    index = Index({f"v{number}": number for number in range(2, 22)}, SHELVES)
    clicks, near = rng.integers(0, 4, [22, 7]), rng.random([22, 7]) * 9 * (rng.random([22, 7]) < 0.6)
    clicks[6, 5], clicks[0] = 9, 0
    clicks[8] = clicks[:, 6] = clicks[20:, 1:] = near[:2] = near[:, 6] = 0
    daily = rng.integers(0, 9, [5, 7]) * [0, 1, 1, 1, 1, 1, 0]
    counts = Counts(pairs_of(clicks), pairs_of(near), NO_PAIRS, pairs_of(daily, FIRST_DAY))
    most = 1 + np.argmax(clicks[:, 1:], axis=1)  # of equal ones the first
    most[[0, 1, 8, 20, 21]] = 0, 0, 2, 1, 0  # the first column that shows it, if any
    return index, counts, clicks, near, most


@pytest.fixture(scope="module")
def memory(world):
    return Memory(world[1], world[0])


@pytest.fixture
def histories_seen():
    """Numbers of videos and columns [n, 40], padded at the end: known, unknown, short, long and empty ones."""
    rng = np.random.default_rng(13)
    videos = rng.integers(UNKNOWN, 22, [6, 40])
    columns = rng.integers(0, 7, videos.shape) * rng.integers(0, 2, videos.shape)
    for row, length in enumerate([40, 30, 7, 2, 1, 0]):
        videos[row, length:] = columns[row, length:] = 0
    return videos, columns


@pytest.mark.parametrize("constants", [{}, dict(VIDEO_DECAY=0.5, VIDEO_BACKOFF=3.0, COLUMN_BACKOFF=7.0,
                                                POPULARITY_DISCOUNT=0.0)])  # fmt: skip
def test_memory_scores_follow_the_formula(world, histories_seen, constants):
    """The totals count what was cut, too."""
    index, counts, _, of_videos, homes = world
    memory, of_columns = Memory(counts, index, CONSTANTS | constants), np.zeros([7, 7])
    np.add.at(of_columns, homes, of_videos)
    of_columns[0], popularity, by = 0, memory.popularity, memory.constants
    backed = of_columns[:, 1:] + by["COLUMN_BACKOFF"] * popularity
    backed /= of_columns.sum(axis=1)[:, None] + by["COLUMN_BACKOFF"]
    expected = np.zeros([6, 6])
    for row, history in enumerate(zip(*histories_seen, strict=True)):
        clicks = [(video, column) for video, column in zip(*history, strict=True) if video]
        for age, (video, column) in enumerate(reversed(clicks)):
            home = homes[video] or column
            near = of_videos[video, 1:] + by["VIDEO_BACKOFF"] * (backed[home] if home else popularity)
            near /= of_videos[video].sum() + by["VIDEO_BACKOFF"]
            expected[row] += by["VIDEO_DECAY"] ** age * (near - by["POPULARITY_DISCOUNT"] * popularity)
    assert close(memory.scores(*histories_seen), expected, 1e-9)
    assert not expected[5].any() and expected[:5].any(axis=1).all()


def of_today(counts, folder):
    """(The Memory of Counts as saved and loaded, today's Index): column 2 is retired, 7 and 8 are newer, and so is video 22."""
    index = Index({f"v{number}": number for number in range(2, 23)}, TODAY)
    counts.save(folder / "kept.memory.npz")
    return Memory(Counts.load(folder / "kept.memory.npz"), index, CONSTANTS | {"ITEM_MAX_LEN": 3}), index


def test_a_memory_of_saved_counts_is_the_same_and_newer_numbers_are_unknown(world, memory, histories_seen, tmp_path):
    (loaded, _), users = of_today(world[1], tmp_path), seen(histories_seen[1], now=noon(3))
    same = Memory(Counts.load(tmp_path / "kept.memory.npz"), world[0])
    assert np.array_equal(same.scores(*histories_seen), memory.scores(*histories_seen))
    assert close(loaded.habit(users, BY)[:, :6], memory.habit(users, BY), 1e-9)
    assert np.array_equal(loaded.video_clicks[:-1], memory.video_clicks)
    videos, columns = (array.copy() for array in histories_seen)
    unknown, none = videos.copy(), columns.copy()
    videos[:3, :2], unknown[:3, :2], columns[:3, :2], none[:3, :2] = 22, UNKNOWN, [7, 8], 0
    scores = loaded.scores(videos, columns)
    assert np.array_equal(scores, loaded.scores(unknown, none)) and not scores[:, 6:].any()


def seen(columns, times=0, now=0):
    """Users of those columns, the same times or moment for all or one each."""
    nothing = np.zeros(columns.shape, int)
    now = np.zeros(len(columns), int) + now
    return Users(nothing, columns, nothing + times, now, now)


def timed_memory(daily, **constants):
    """A Memory of clicks [days, columns + 1] that all have a time."""
    counts = Counts(pairs_of(daily.sum(axis=0)[None]), NO_PAIRS, NO_PAIRS, pairs_of(daily, FIRST_DAY))
    return Memory(counts, Index({}, {number: [] for number in range(1, daily.shape[1])}), CONSTANTS | constants)


def test_habit_is_the_users_own_columns_late_ones_weighing_more_and_a_share_of_popularity():
    """Of four columns, whose popularity is 1/8, 1/4, 5/8 and 0; no click in any of them: the share of popularity alone."""
    memory = timed_memory(np.array([[0, 1, 2, 5, 0]]), HABIT_DECAY=0.5)
    columns = np.array([[1, 0, 2, 1, 0, 0], [0, 0, 0, 0, 0, 0], [4, 0, 0, 0, 0, 0]])
    habit = memory.habit(seen(columns), BY._replace(habit_popularity=0.2))
    own = np.array([[1.25 / 1.75, 0.5 / 1.75, 0, 0], [0, 0, 0, 0], [0, 0, 0, 1]])
    assert close(habit, 0.8 * own + 0.2 * np.array([1 / 8, 1 / 4, 5 / 8, 0]), 1e-12)


def test_habit_with_hours_counts_clicks_near_the_hour_of_the_clock_more_on_whatever_day_and_without_clock_all():
    """The clock is 1 at night. Clicks were made then, at 23, at 13, and at a time that is not known."""
    memory, columns = timed_memory(np.array([[0, 1, 2, 5, 0]]), HABIT_DECAY=1.0), np.array([[1, 2, 3, 4]] * 3)
    times = np.array([noon(1) + 13 * 3600, noon(2) + 11 * 3600, noon(3) + 3600, 0])
    users = seen(columns, times, noon(4) + 13 * 3600)
    users = users._replace(clock=np.array([users.now[0], 0, users.now[0]]), columns=columns * [[1], [1], [0]])
    by = BY._replace(habit_popularity=0.0, habit_hours=2.0)
    near = np.exp([0, -1, -6, 0])
    assert close(memory.habit(users, by), [near / near.sum(), [0.25] * 4, [0] * 4], 1e-9)
    assert close(memory.habit(users, by._replace(habit_hours=0.0)), [[0.25] * 4, [0.25] * 4, [0] * 4], 1e-9)


def test_recent_popularity_is_the_share_in_the_last_days_before_the_moments_and_without_times_in_all(daily):
    """By the shortest of the reaches. No later click changes it; of a new column it is the share since its first click."""
    expected = [daily[:, 1:].sum(axis=0) / daily.sum()]
    for day in (9, 9, 5):
        share = daily[:day].sum(axis=0) / daily[:day].sum()
        expected.append((share * np.exp(trend_by_hand(daily, day)[:, 0]))[1:])
    popularity = timed_memory(daily).recent_popularity(np.array([0, noon(9), noon(400), noon(5)]))
    assert close(popularity, expected) and not close(expected[0], expected[1], 0.01)


# ---------------------------------------------------------------- the mix


def test_a_mix_is_the_weighted_mean_of_the_parts_times_the_factor_for_columns_clicked_before():
    parts = np.array([[0.5, 0.3, 0.2]]), np.array([[0.2, 0.2, 0.6]]), np.array([[0.1, 0.8, 0.1]])
    clicked, as_given = np.array([[False, True, False]]), [part.copy() for part in parts]
    mixed = Mix(0.4, 0.2, 0.5, 0.1).apply(parts, clicked)
    assert close(mixed, [[0.30 / 0.82, 0.18 / 0.82, 0.34 / 0.82]], 1e-12)
    assert close(Mix(0.0, 0.0, 1.0, 0.1).apply(parts, clicked), parts[0], 1e-12)
    assert all(np.array_equal(part, given) for part, given in zip(parts, as_given, strict=True))


def parts_of(logits, remembered, habit, clicks, videos=2, relatives=()):
    """Scorer.parts() where the towers, the memory and habit give this, of columns clicked so often and all current.

    relatives {place: [number, ...]} are those of columns that were not clicked.
    """
    scorer = object.__new__(Scorer)
    scorer.numbers, scorer.clicks = np.arange(1, 1 + len(clicks)), np.array(clicks, float)
    scorer.unclicked = np.flatnonzero(scorer.clicks == 0)
    of_each = [[*dict(relatives).get(place, ()), 0, 0, 0][:3] for place in scorer.unclicked]
    scorer.relatives = np.array(of_each, int).reshape(-1, 3)
    scorer.is_counted = np.array([number > 0 or place in relatives for place, number in enumerate(clicks)], float)
    scorer.towers = lambda users: logits
    scorer.memory = SimpleNamespace(
        constants=CONSTANTS,
        scores=lambda *of: remembered,
        habit=lambda *of: habit,
        recent_popularity=lambda now: np.array([clicks]) / max(sum(clicks), 1),
    )
    videos = np.full([len(logits), 1], videos)
    return scorer.parts(seen(np.zeros_like(videos))._replace(videos=videos), BY)


@pytest.fixture
def given():
    """Logits [50, 20] of the towers, scores of the memory, some below zero, and habit: mostly 0."""
    rng = np.random.default_rng(14)
    habit = rng.random([50, 20]) * (rng.random([50, 20]) < 0.2)
    return rng.normal(0, 9, [50, 20]).astype(np.float32), rng.uniform(-0.5, 3, [50, 20]), habit


def test_a_column_without_clicks_counts_as_the_mean_of_the_columns_in_which_its_videos_were_clicked_most(given):
    """Here the last three of twenty: one has two relatives, one of them twice, one has one, and one has none."""
    towers = parts_of(*given, clicks=[7] * 17 + [0] * 3)[0]
    parts = parts_of(*given, clicks=[7] * 17 + [0] * 3, relatives={17: [3, 9, 3], 18: [4]})
    for part, scores in zip(parts[1:], given[1:], strict=True):
        counted = np.column_stack([scores[:, :17], (2 * scores[:, 2] + scores[:, 8]) / 3, scores[:, 3]])
        shares = np.maximum(counted, 1e-9)
        shares *= towers[:, :19].sum(axis=1, keepdims=True) / shares.sum(axis=1, keepdims=True)
        assert close(part, np.column_stack([shares, towers[:, 19]]), 1e-9)
        assert close(part[:, 18], part[:, 3], 1e-12)


def test_probabilities_are_above_zero_where_the_towers_are_far_apart_and_what_is_counted_is_zero_or_below(given):
    """Also where it knows no column; the towers alone rank by their logits all the same."""
    logits, remembered, habit = given
    logits[:2] = np.linspace(0, -900, 20), np.linspace(20, 1, 20)
    logits[0, -1] = -9e30  # of a training that went astray
    remembered[0], remembered[1], habit[:2] = 0, -3, 0
    for clicks in ([7] * 20, [0] * 20):
        parts = parts_of(logits, remembered, habit, clicks)
        assert (np.argsort(-parts[0][:2], axis=1, kind="stable") == np.arange(20)).all()
        for weights in ((0.0, 0.0), (0.5, 0.5), (1.0, 0.0), (0.0, 1.0)):
            mixed = Mix(*weights, 0.001, 0.1).apply(parts, logits > 0)
            assert np.isfinite(np.log(mixed)).all() and close(mixed.sum(axis=1), 1, 1e-9)
    assert all(close(part, parts[0], 1e-12) for part in parts)


# ---------------------------------------------------------------- scoring

CURRENT = [1, 3, 4, 6, 7, 8]  # 2 is retired today, 5 was before; 6 was clicked by nobody; 7 and 8 are new


@pytest.fixture
def scorer(world, monkeypatch, tmp_path):
    """Of a model and a memory older than today's index."""
    monkeypatch.setattr(model_tf2, "COLUMNS_AT_ONCE", 4)
    return Scorer(shaken(num_videos=20), *of_today(world[1], tmp_path))


@pytest.fixture
def seen_today():
    """Users [4, 9] with unknown and new videos, retired and new columns; the first has times, the second some."""
    videos = np.array([[2, 3, 4, 5, 6, 1, 8, 9, 2], [7, 8, 22, 0, 0, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0, 0, 0],
                       [0, 0, 0, 0, 0, 0, 0, 0, 0]])  # fmt: skip
    columns = np.array([[1, 2, 0, 3, 1, 0, 7, 5, 0], [8, 3, 0, 0, 0, 0, 0, 0, 0], [0] * 9, [0] * 9])
    times = np.array([noon(1) + 7 ** np.arange(9), [0, noon(2), noon(2), 0, 0, 0, 0, 0, 0], [0] * 9, [0] * 9])
    now = np.array([noon(1) + 5**11, noon(4), 0, noon(2)])
    return Users(videos, columns, times, now, now)


def test_a_factor_of_0_puts_clicked_columns_far_down_and_every_score_stays_finite(scorer, seen_today):
    plain, scores = (np.log(scorer.probabilities(seen_today, BY._replace(clicked_factor=of))) for of in (1.0, 0.0))
    clicked = scorer.clicked(seen_today.columns)
    assert np.isfinite(scores).all() and (scores < plain - 10)[clicked].all() and (scores >= plain)[~clicked].all()


def test_towers_score_current_columns_at_a_moment_with_the_trend_of_its_day(scorer, memory, world, seen_today):
    """A gap is how many binary digits its seconds have, from a click to the next one or to now."""
    assert scorer.numbers.tolist() == CURRENT and scorer.clicks.astype(bool).tolist() == [1, 1, 1, 0, 0, 0]
    assert scorer.cids == ["c0", "c2", "c3", "never", "late", "later"]
    clicks, numbers = scorer.memory.video_clicks, np.array(CURRENT, np.int32)
    shelves = *(world[0].columns[cid] for cid in scorer.cids[:4]), [22, 2, 3], [21]
    shelf = [sorted(videos, key=lambda video: -clicks[video])[:3] for videos in shelves]
    shelf = np.array([videos + [0] * (3 - len(videos)) for videos in shelf], np.int32)
    for user, length in enumerate([9, 3, 1, 0]):
        videos, columns, times = (of[user, :length].tolist() for of in seen_today[:3])
        now = seen_today.now[user]
        pairs = itertools.pairwise([*times, int(now)])
        gaps = [max(asked - time, 1).bit_length() if time and asked else 0 for time, asked in pairs]
        read = [np.array([of or [0]], np.int32) for of in (videos, columns, gaps)]
        trends = memory.trend.table[memory.trend.rows(now)] @ scorer.model.trend_weights.numpy()
        expected = scorer.model(inputs_of(read, (shelf, numbers)))[0] + np.pad(trends, (0, 2))[CURRENT]
        assert close(scorer.towers(seen_today)[user], expected, 1e-4) and trends.any() == (user != 2)


def test_probabilities_are_the_mix_of_towers_memory_and_habit_and_padding_changes_nothing(scorer, world, seen_today):
    mix, most, memory = BY._replace(clicked_factor=0.5), world[4], scorer.memory
    clicks = memory.column_clicks[CURRENT]
    clicked = np.array([[column in row for column in CURRENT] for row in seen_today.columns])
    assert np.array_equal(scorer.clicked(seen_today.columns), clicked)
    counted = memory.scores(*seen_today[:2]), memory.habit(seen_today, mix)
    relatives = {3: most[[19, 8]], 4: most[[2, 3]]}  # of columns without clicks, as places in CURRENT

    def of_current(scores):
        current = scores[:, np.array(CURRENT) - 1]
        for place, columns in relatives.items():
            current[:, place] = scores[:, columns - 1].mean(axis=1)
        return current

    given = (of_current(of) for of in counted)
    expected = mix.apply(parts_of(scorer.towers(seen_today), *given, clicks + [0, 0, 0, 1, 1, 0]), clicked)
    recent = of_current(memory.recent_popularity(seen_today.now[3:]))[0]
    expected[3] = (recent * clicks.sum() + 0.5) / (recent * clicks.sum() + 0.5).sum()  # the last user has no click
    probabilities = scorer.probabilities(seen_today, mix)
    assert close(probabilities, expected, 1e-6) and close(probabilities.sum(axis=1), 1, 1e-9)
    longer = Users(*(after(numbers, 20) for numbers in seen_today[:3]), *seen_today[3:])
    assert close(scorer.probabilities(longer, mix), probabilities, 1e-6)
