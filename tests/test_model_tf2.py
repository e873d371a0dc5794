"""The towers, their losses, what is counted, the memory, the mix of both, and the one that scores."""

import hashlib
import itertools
import random
from collections import Counter, defaultdict

import get_dataset
import get_tfrecord as get_tfrecord_module
import model_tf2
from get_dataset import AUX_NEGATIVES, add_candidates
from get_indexing import FIRST_VIDEO, PAD, UNKNOWN, Index, InputError, get_indexing
from get_tfrecord import get_tfrecord
from model_tf2 import (
    BACKWARD,
    BST_DSSM,
    MAX_LAG,
    Counts,
    CountTable,
    Memory,
    Mix,
    Pairs,
    Scorer,
    add_pairs,
    build_model,
    candidate_loss,
    count_windows,
    mix,
    to_probabilities,
    training_loss,
)

import numpy as np
import pytest
import tensorflow as tf
from conftest import _raw

NUM_VIDEOS, NUM_COLUMNS, DIM = 30, 6, 8
LAST_VIDEO = FIRST_VIDEO + NUM_VIDEOS - 1
KINDS = pytest.mark.parametrize("kind", ["softmax", "bce"])


def shaken(**arguments):
    """A model with large random weights, biases of ages and repeats too, so that whatever is read shows."""
    sizes = dict(num_videos=NUM_VIDEOS, num_columns=NUM_COLUMNS, emb_dim=DIM)
    model, rng = build_model(**{**sizes, **arguments}), np.random.default_rng(5)
    for variable in model.variables:
        if variable is not model.scale:
            variable.assign(rng.normal(0, 0.7, variable.shape))
    return model


@pytest.fixture(scope="module")
def model():
    """A small model with a block in both towers."""
    return shaken(item_blocks=1)


@pytest.fixture
def clicks():
    """Video and column numbers [3, 7] of three users' clicks."""
    rng = np.random.default_rng(6)
    videos, columns = rng.integers(FIRST_VIDEO, LAST_VIDEO + 1, [3, 7]), rng.integers(0, NUM_COLUMNS + 1, [3, 7])
    return videos.astype(np.int32), columns.astype(np.int32)


@pytest.fixture
def shelves():
    """Video numbers [4, 5] and column numbers [4] of four columns."""
    videos = np.random.default_rng(7).permutation(np.arange(FIRST_VIDEO, FIRST_VIDEO + 20)).reshape(4, 5)
    return videos.astype(np.int32), np.arange(1, 5, dtype=np.int32)


def inputs_of(clicks, shelves):
    names = "user_feature", "user_column", "item_feature", "item_column"
    return dict(zip(names, (*clicks, *shelves), strict=True))


def after(array, padding):
    return np.pad(array, [(0, 0), (0, padding)])


def before(array, padding):
    return np.pad(array, [(0, 0), (padding, 0)])


def softmax(logits):
    powers = np.exp(logits - np.max(logits, axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def close(a, b, tolerance=1e-5):
    return np.allclose(a, b, rtol=0, atol=tolerance)


# ---------------------------------------------------------------- towers


@pytest.mark.parametrize("padding", [1, 60])
def test_padding_does_not_change_the_user_vectors_before_or_after_the_clicks(model, clicks, padding):
    vectors = model.user_vectors(*clicks).numpy()
    in_graph = tf.function(lambda *of: model.user_vectors(*of))
    assert close(in_graph(*(after(array, padding) for array in clicks))[:, :7], vectors)
    assert close(model.user_vectors(*(after(array, padding) for array in clicks))[:, :7], vectors)
    assert close(model.user_vectors(*(before(array, padding) for array in clicks))[:, padding:], vectors)


@pytest.mark.parametrize("padding", [1, 12])
def test_padding_does_not_change_the_column_vectors_nor_the_logits(model, clicks, shelves, padding):
    videos, numbers = shelves
    padded = after(videos, padding), numbers
    assert close(model.column_vectors(*padded), model.column_vectors(videos, numbers))
    longer = [after(array, padding) for array in clicks]
    assert close(model(inputs_of(longer, padded)), model(inputs_of(clicks, shelves)), 1e-4)


@pytest.mark.parametrize("place", range(6))
def test_a_user_vector_does_not_depend_on_later_clicks(model, clicks, place):
    vectors, changed = model.user_vectors(*clicks).numpy(), [array.copy() for array in clicks]
    changed[0][:, place + 1 :] = FIRST_VIDEO + (changed[0][:, place + 1 :] - FIRST_VIDEO + 1) % NUM_VIDEOS
    changed[1][:, place + 1 :] = (changed[1][:, place + 1 :] + 1) % (NUM_COLUMNS + 1)
    others = model.user_vectors(*changed).numpy()
    assert close(others[:, : place + 1], vectors[:, : place + 1])
    assert not close(others[:, place + 1], vectors[:, place + 1], 1e-3)


@pytest.mark.parametrize("which", [0, 1])
def test_a_user_vector_depends_on_each_earlier_video_and_on_each_earlier_column(model, clicks, which):
    vectors = model.user_vectors(*clicks).numpy()
    for place in range(7):
        changed = [array.copy() for array in clicks]
        changed[which][:, place] = np.where(changed[which][:, place] == 3, 4, 3)
        others = model.user_vectors(*changed).numpy()
        assert np.abs(others[:, -1] - vectors[:, -1]).max(axis=1).min() > 1e-4


def test_a_user_vector_depends_on_the_order_of_the_clicks(model, clicks):
    swapped = [array[:, [1, 0, 2, 3, 4, 5, 6]] for array in clicks]
    assert not close(model.user_vectors(*swapped)[:, -1], model.user_vectors(*clicks)[:, -1], 1e-3)


def test_the_order_of_a_columns_videos_does_not_matter(model, shelves):
    videos, numbers = shelves
    padded = after(videos, 2)
    shuffled = np.stack([row[order] for row, order in zip(padded, np.argsort(padded * 7919 % 101), strict=True)])
    assert not np.array_equal(padded, shuffled)
    assert close(model.column_vectors(shuffled, numbers), model.column_vectors(videos, numbers))


def test_vectors_have_length_one(model, clicks, shelves):
    for vectors in (model.user_vectors(*clicks), model.column_vectors(*shelves)):
        assert close(np.linalg.norm(vectors, axis=-1), 1)


def bonus_of(model, columns, number):
    """What is learned for clicks in a column, given the columns clicked, oldest first: a sum over its clicks."""
    repeats = model.repeats.numpy()
    ages = [len(columns) - 1 - place for place, column in enumerate(columns) if column == number and number]
    return sum(repeats[min(age, len(repeats) - 1)] for age in ages)


@pytest.mark.parametrize("max_age", [None, 2])
def test_logits_are_the_scaled_cosines_and_what_is_learned_for_each_click_in_the_column(clicks, shelves, max_age):
    """For the click after the last one, of histories of different length; old ages share the last number."""
    model, (videos, columns) = shaken(max_age=max_age), (array.copy() for array in clicks)
    videos[1, 4:] = columns[1, 4:] = videos[2] = columns[2] = 0
    videos[2, 0], columns[2, 0] = 5, 3
    shelf, numbers = (
        shelves[0],
        np.array([1, 2, 3, 9], np.int32),
    )  # 4 to 6 are not candidates, 9 is newer than the model
    users, items = model.user_vectors(videos, columns).numpy(), model.column_vectors(shelf, numbers).numpy()
    logits = model(inputs_of((videos, columns), (shelf, numbers))).numpy()
    assert any((columns == number).any() for number in (4, 5, 6)) and (columns == 0).any()
    for user, length in enumerate([7, 4, 1]):
        cosines = items @ users[user, length - 1]
        bonus = [bonus_of(model, columns[user, :length].tolist(), number) for number in numbers.tolist()]
        assert close(logits[user], float(model.scale) * cosines + bonus, 1e-4)


def test_without_its_map_a_column_is_the_mean_of_its_videos_and_its_own_embedding(shelves):
    model = shaken(column_map=False)
    videos, numbers = shelves
    states = model.column_tower(model.embed_videos(videos), videos != PAD)
    mean = tf.reduce_sum(states, axis=1) / tf.maximum(tf.math.count_nonzero(videos, 1, True, tf.float32), 1)
    expected = tf.math.l2_normalize(mean + model.embed_columns(numbers), axis=-1)
    assert close(model.column_vectors(videos, numbers), expected, 1e-6)


def test_a_model_that_learned_nothing_gives_no_bonus_for_repeats(clicks, shelves):
    model = build_model(num_videos=NUM_VIDEOS, num_columns=NUM_COLUMNS, emb_dim=DIM)
    users, items = model.user_vectors(*clicks).numpy(), model.column_vectors(*shelves).numpy()
    assert close(model(inputs_of(clicks, shelves)), float(model.scale) * users[:, -1] @ items.T, 1e-4)


def test_empty_users_and_empty_columns_give_no_nan(model, clicks, shelves):
    (videos, columns), (shelf, numbers) = (array.copy() for array in clicks), (array.copy() for array in shelves)
    videos[0], columns[0], videos[1, 3:], columns[1, 3:] = 0, 0, 0, 0
    shelf[0], shelf[1], numbers[0] = 0, 0, 0
    with tf.GradientTape() as tape:
        users, items = model.user_vectors(videos, columns), model.column_vectors(shelf, numbers)
        logits = model.next_logits(users, videos, columns, items, numbers)
        total = tf.reduce_sum(logits**2)
    gradients = tape.gradient(total, model.trainable_variables)
    assert np.isfinite(users).all() and np.isfinite(items).all() and np.isfinite(logits).all()
    assert all(np.isfinite(tf.convert_to_tensor(gradient)).all() for gradient in gradients)
    assert close(model.user_vectors(videos, columns)[2], model.user_vectors(*clicks)[2])
    assert close(logits[0], 0)  # an empty user ranks nothing


@pytest.mark.parametrize("number", [LAST_VIDEO + 1, 10**9])
def test_a_video_beyond_the_vocabulary_is_an_unknown_one_and_the_last_of_it_is_not(model, clicks, shelves, number):
    (videos, columns), (shelf, numbers) = clicks, shelves
    newer, unknown, shelf_newer, shelf_unknown = videos.copy(), videos.copy(), shelf.copy(), shelf.copy()
    newer[:, 2], unknown[:, 2], shelf_newer[:, 1], shelf_unknown[:, 1] = number, UNKNOWN, number, UNKNOWN
    assert close(model.user_vectors(newer, columns), model.user_vectors(unknown, columns))
    assert close(model.column_vectors(shelf_newer, numbers), model.column_vectors(shelf_unknown, numbers))
    assert not close(model.user_vectors(newer, columns), model.user_vectors(videos, columns), 1e-3)
    newer[:, 2] = LAST_VIDEO
    assert not close(model.user_vectors(newer, columns), model.user_vectors(unknown, columns), 1e-3)


def test_a_video_has_the_mean_of_the_columns_that_show_it_beside_its_own_embedding(model):
    """Also one newer than the model, in columns of which one is newer too; padding, and what no column shows, has none."""
    shown_in = np.zeros([LAST_VIDEO + 2, 3], np.int32)
    shown_in[4], shown_in[LAST_VIDEO + 1] = [2, 5, 0], [3, NUM_COLUMNS + 1, 0]
    informed = build_model(**model.arguments, video_columns=shown_in)
    informed.set_weights(model.get_weights())
    own, columns = model.video_embedding.numpy(), model.column_embedding.numpy()
    embedded = informed.embed_videos(np.array([4, 5, PAD, LAST_VIDEO + 1, 10**9], np.int32))
    expected = own[4] + (columns[2] + columns[5]) / 2, own[5], own[PAD], own[UNKNOWN] + columns[3] / 2, own[UNKNOWN]
    assert close(embedded, np.array(expected))


@pytest.mark.parametrize("number", [NUM_COLUMNS + 1, 10**9])
def test_a_column_newer_than_the_model_has_no_embedding_of_its_own(model, clicks, shelves, number):
    (videos, columns), (shelf, numbers) = clicks, shelves
    newer, none = columns.copy(), columns.copy()
    newer[:, 2], none[:, 2] = number, 0
    assert close(model.user_vectors(videos, newer), model.user_vectors(videos, none))
    from_videos = model.column_vectors(shelf, np.zeros_like(numbers))
    assert close(model.column_vectors(shelf, np.full_like(numbers, number)), from_videos)
    assert not close(model.column_vectors(shelf, numbers), from_videos, 1e-3)
    last = np.full_like(numbers, NUM_COLUMNS)
    assert not close(model.column_vectors(shelf, last), from_videos, 1e-3)


def test_a_model_built_again_from_its_arguments_scores_the_same(model, clicks, shelves, tmp_path):
    model.save_weights(tmp_path / "towers.weights.h5")
    again = build_model(**model.arguments)
    again.load_weights(tmp_path / "towers.weights.h5")
    assert np.array_equal(again(inputs_of(clicks, shelves)), model(inputs_of(clicks, shelves)))
    assert again.arguments == model.arguments


def test_arguments_name_all_that_the_model_was_built_with():
    given = dict(num_videos=9, num_columns=3, emb_dim=12, num_heads=3, user_blocks=2, item_blocks=0, ffn_ratio=1,
                 dropout=0.0, max_age=4, column_map=False)  # fmt: skip
    assert BST_DSSM(**given).arguments == given
    assert build_model(**given).arguments == given


def test_a_width_that_the_heads_do_not_divide_is_refused():
    with pytest.raises(InputError, match=r"EMB_DIM = 10 is no multiple of NUM_HEADS = 4"):
        build_model(num_videos=9, num_columns=3, emb_dim=10, num_heads=4)


def test_clicks_older_than_max_age_are_still_read():
    model, rng = shaken(max_age=2), np.random.default_rng(8)
    videos = rng.integers(FIRST_VIDEO, LAST_VIDEO, [1, 9]).astype(np.int32)
    other, none = videos.copy(), np.zeros_like(videos)
    other[0, 0] = LAST_VIDEO
    assert not close(model.user_vectors(videos, none)[0, -1], model.user_vectors(other, none)[0, -1], 1e-4)


# ---------------------------------------------------------------- dropout


def test_dropout_drops_its_share_and_keeps_the_sum_in_expectation():
    dropped = model_tf2.drop_out(tf.ones([301, 77]), 0.3, tf.constant([1, 2], tf.int64)).numpy()
    kept = 1 - 77 / 256  # the rate in 1 / 256
    assert np.isin(dropped, [0, np.float32(1 / kept)]).all()
    assert abs((dropped == 0).mean() - 0.3) < 0.01 and abs(dropped.mean() - 1) < 0.02
    neighbours = np.corrcoef(dropped[:, :-1].ravel(), dropped[:, 1:].ravel())[0, 1]
    assert abs(neighbours) < 0.03  # they do not go together


def test_dropout_is_that_of_its_seed_and_without_one_there_is_none():
    states = tf.random.stateless_normal([9, 5], [3, 4])
    first, again, other = (model_tf2.drop_out(states, 0.5, tf.constant([seed, 7], tf.int64)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.array_equal(model_tf2.drop_out(states, 0.5, None), states)
    assert np.array_equal(model_tf2.drop_out(states, 0.0, tf.constant([1, 7], tf.int64)), states)


# ---------------------------------------------------------------- the loss of given logits


def loss_by_hand(own, shares, others, log_prob, kind):
    """The loss of one target: own and shares are lists, the candidates those that are not it."""
    shares = np.array(shares, float) / np.sum(shares)
    if kind == "softmax":
        denominator = np.exp(own[0]) + np.sum(np.exp(np.array(others, float) - log_prob))
        return np.log(denominator) - shares @ own
    positive, negative = np.log1p(np.exp(-np.array(own, float))), np.log1p(np.exp(np.array(others, float)))
    return shares @ positive + negative @ np.exp(-np.array(log_prob, float))


@pytest.fixture
def scored():
    """Logits of targets [5, 3], their shares [5, 3], others [5, 4]."""
    rng = np.random.default_rng(9)
    shares = np.array([[1, 0.5, 0.25], [1, 0.5, 0], [1, 0, 0.25], [1, 0, 0], [1, 0.5, 0.25]])
    values = rng.normal(0, 2, [5, 3]), shares, rng.normal(0, 2, [5, 4])
    return [value.astype(np.float32) for value in values]


@KINDS
@pytest.mark.parametrize("log_prob", [0.0, -1.3], ids=["all are drawn", "some are drawn"])
def test_the_loss_is_the_sum_over_targets_with_the_clicks_after_the_next_by_their_shares(scored, kind, log_prob):
    own, shares, others = scored
    by_hand = [loss_by_hand(*of, np.full(4, log_prob), kind) for of in zip(own, shares, others, strict=True)]
    assert float(candidate_loss(own, shares, others, log_prob, kind)) == pytest.approx(sum(by_hand), rel=1e-5)


@KINDS
def test_a_candidate_drawn_less_often_counts_more_and_one_left_out_counts_nothing(scored, kind):
    own, shares, others = scored
    losses = [float(candidate_loss(own, shares, others, log_prob, kind)) for log_prob in (0.0, -1.0, -3.0)]
    assert losses == sorted(losses) and len(set(losses)) == 3
    without, others[:, 2] = float(candidate_loss(own, shares, others[:, [0, 1, 3]], -1.0, kind)), -1e9
    assert float(candidate_loss(own, shares, others, -1.0, kind)) == pytest.approx(without)


@KINDS
def test_the_loss_of_no_target_is_zero(kind):
    nothing = tf.zeros([0, 2]), tf.zeros([0, 2]), tf.zeros([0, 4]), 0.0
    assert float(candidate_loss(*nothing, kind)) == 0


# ---------------------------------------------------------------- the loss of a batch

AHEAD = 3  # next clicks whose columns are targets, here


def losses_of(model, batch, kind="softmax", **options):
    """training_loss() in which each click after the next counts half of the one before."""
    return training_loss(model, batch, kind, ahead_decay=0.5, **options)


@pytest.fixture
def batch():
    """A training batch as get_dataset.py makes it: 3 windows of up to 6 clicks, all columns as candidates."""
    rng = np.random.default_rng(11)
    videos, columns = rng.integers(FIRST_VIDEO, LAST_VIDEO, [3, 6]), rng.integers(0, 4, [3, 6])  # columns repeat
    videos[2, 4:] = columns[2, 4:] = 0
    columns[0, [0, 4]] = 2
    following = np.stack([after(columns[:, ahead:], ahead) for ahead in range(1, 1 + AHEAD)], axis=2)
    shelf = rng.permutation(np.arange(FIRST_VIDEO, LAST_VIDEO))[: NUM_COLUMNS * 4].reshape(NUM_COLUMNS, 4)
    shelf[0, 2:] = 0
    next_columns = following * (following[..., :1] > 0)
    integers = {"user_feature": videos, "user_column": columns, "target_video": after(videos[:, 1:], 1),
                "target_column": next_columns, "target_item": np.maximum(next_columns - 1, 0),
                "item_column": np.arange(1, NUM_COLUMNS + 1), "item_feature": shelf,
                "negative_video": rng.integers(FIRST_VIDEO, LAST_VIDEO, AUX_NEGATIVES)}  # fmt: skip
    return {name: tf.constant(value, tf.int32) for name, value in integers.items()} | {
        "label": tf.constant(next_columns[..., 0] > 0, tf.float32),
        "item_log_prob": tf.zeros([NUM_COLUMNS]),
        "seed": tf.constant([5, 6], tf.int64),
    }


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
    """Logits [columns] of a target: the user after that click, every column, and the clicks up to it."""
    videos, columns = batch["user_feature"].numpy(), batch["user_column"].numpy()
    user = model.user_vectors(videos[row : row + 1, : place + 1], columns[row : row + 1, : place + 1])[0, -1]
    items = model.column_vectors(batch["item_feature"], batch["item_column"]).numpy()
    numbers = range(1, NUM_COLUMNS + 1)
    bonus = [bonus_of(model, columns[row, : place + 1].tolist(), number) for number in numbers]
    return float(model.scale) * items @ user.numpy() + bonus


def column_loss_by_hand(model, batch, candidates, log_prob, kind):
    losses = []
    for row, place in zip(*np.nonzero(batch["label"].numpy()), strict=True):
        logits = logits_by_hand(model, batch, row, place)
        wanted = [(number, 0.5**k) for k, number in enumerate(batch["target_column"][row, place].numpy()) if number]
        own, shares = [logits[number - 1] for number, _ in wanted], [share for _, share in wanted]
        others = [logits[number - 1] for number in candidates if number != wanted[0][0]]
        losses.append(loss_by_hand(own, shares, others, np.full(len(others), log_prob), kind))
    return np.mean(losses)


@KINDS
@pytest.mark.parametrize("candidates", [range(1, 7), [1, 3, 4, 6]])
def test_the_loss_of_the_columns_is_that_of_the_logits_that_are_served(model, batch, kind, candidates):
    """Against all columns and against some, in which a target need not be."""
    log_prob = np.log(len(candidates) / NUM_COLUMNS)
    given = batch if len(candidates) == NUM_COLUMNS else with_candidates(batch, candidates, log_prob)
    _, of_columns = losses_of(model, given, kind, training=False)
    assert float(of_columns) == pytest.approx(column_loss_by_hand(model, batch, candidates, log_prob, kind), rel=1e-4)
    row, place = np.argwhere(batch["label"].numpy())[3]
    cut = [batch[name].numpy()[row : row + 1, : place + 1] for name in ("user_feature", "user_column")]
    served = model(inputs_of(cut, (batch["item_feature"], batch["item_column"])))[0]
    assert close(served, logits_by_hand(model, batch, row, place), 1e-4)


def test_the_auxiliary_loss_is_the_next_video_among_the_random_ones_that_are_not_it(model, batch):
    total, of_columns = losses_of(model, batch, "softmax", aux_weight=1.0, training=False)
    users = model.user_vectors(batch["user_feature"], batch["user_column"]).numpy()
    negatives, none = batch["negative_video"].numpy(), np.zeros(1, np.int32)
    vectors = {v: model.column_vectors(np.array([[v]], np.int32), none).numpy()[0] for v in range(2, LAST_VIDEO + 1)}
    expected = []
    for row, place in zip(*np.nonzero(batch["target_video"].numpy()), strict=True):
        own, user = int(batch["target_video"][row, place]), users[row, place]
        score = {v: np.exp(float(model.scale) * user @ vector) for v, vector in vectors.items()}
        # so many draws of 30 videos: each draw stands for 30 / draws of a video
        others = sum(score[v] for v in negatives if v != own) * NUM_VIDEOS / AUX_NEGATIVES
        expected.append(-np.log(score[own] / (score[own] + others)))
    assert float(total - of_columns) == pytest.approx(np.mean(expected), rel=1e-3)


def test_no_target_sees_its_own_click_or_a_later_one(model, batch):
    """Of one target at a time: other clicks after it leave its loss as it is, another click before it does not."""
    for row, place in np.argwhere(batch["label"].numpy())[::3]:
        mask = np.zeros([3, 6, 1], np.int32)
        mask[row, place] = 1
        alone = batch | {"target_column": batch["target_column"] * mask, "target_video": tf.zeros([3, 6], tf.int32)}

        def loss(alone=alone, **changed):
            return float(losses_of(model, alone | changed, training=False)[0])

        later, seen = np.arange(6) > place, np.arange(6) == place
        other = {"user_feature": 2 + batch["user_feature"] % 20, "user_column": 1 + batch["user_column"] % 6}
        for name, values in other.items():
            assert loss(**{name: tf.where(later, values, batch[name])}) == pytest.approx(loss(), rel=1e-5)
            assert loss(**{name: tf.where(seen, values, batch[name])}) != pytest.approx(loss(), rel=1e-5)


@KINDS
def test_a_sample_stands_for_all_columns_in_expectation_also_where_a_user_repeats_columns(model, batch, kind):
    """Of one target, over all 20 sets of 3 of the 6 columns, which draws without replacement give alike."""
    only, row, place = np.zeros([3, 6, 1], np.int32), 0, 3
    only[row, place] = 1
    batch |= {"target_column": batch["target_column"] * only, "target_video": tf.zeros([3, 6], tf.int32)}
    logits, wanted = logits_by_hand(model, batch, row, place), batch["target_column"][row, place].numpy()
    assert wanted[0] in batch["user_column"][row, : place + 1]
    shares = 0.5 ** np.arange(AHEAD) * (wanted > 0)

    def amount(given):
        """What of a loss is linear in the candidates: the softmax's denominator, or all of the other."""
        loss = float(losses_of(model, given, kind, training=False)[1])
        return np.exp(loss + shares @ logits[wanted - 1] / shares.sum()) if kind == "softmax" else loss

    drawn = itertools.combinations(range(1, 7), 3)
    sampled = [amount(with_candidates(batch, candidates, np.log(3 / 6))) for candidates in drawn]
    assert np.mean(sampled) == pytest.approx(amount(batch), rel=1e-4)
    assert np.std(sampled) > 0.01 * np.mean(sampled)


def test_candidates_are_all_columns_or_draws_without_replacement_that_are_equally_likely(monkeypatch):
    """Of 7 columns, and 3 of them in each of 300 batches whose targets are always the same."""
    shelf, always = np.arange(8)[:, None], tf.constant([[[5, 2], [0, 0]]], tf.int32)
    dataset = tf.data.Dataset.from_tensors({"target_column": always}).repeat(300)
    (batch,) = add_candidates(dataset.take(1), shelf, NUM_VIDEOS, seed=4).as_numpy_iterator()
    assert batch["item_column"].tolist() == [1, 2, 3, 4, 5, 6, 7] and not batch["item_log_prob"].any()
    monkeypatch.setattr(get_dataset, "MAX_CANDIDATES", 6)
    monkeypatch.setattr(get_dataset, "NUM_NEGATIVES", 3)
    drawn = Counter()
    for batch in add_candidates(dataset, shelf, NUM_VIDEOS, seed=4).as_numpy_iterator():
        items, own = batch["item_column"], batch["target_item"]
        assert np.array_equal(items[own], always) and np.array_equal(batch["item_feature"][:, 0], items)
        assert np.allclose(batch["item_log_prob"], np.log(3 / 7)) and len(batch["item_log_prob"]) == 3
        candidates = items[-3:].tolist()
        assert candidates == sorted(set(candidates))
        drawn.update(candidates)
    assert sorted(drawn) == [1, 2, 3, 4, 5, 6, 7]
    deviation = (300 * 3 / 7 * 4 / 7) ** 0.5
    assert max(abs(number - 300 * 3 / 7) for number in drawn.values()) < 4 * deviation


def test_a_step_reads_the_first_video_of_each_column_and_random_others(monkeypatch):
    """Of shelves of 9 places, 4 in each of 300 batches: the same places for all columns, each but the first as often."""
    monkeypatch.setattr(get_dataset, "ITEM_SAMPLE", 4)
    monkeypatch.setattr(get_dataset, "BATCH_POSITIONS", 17)
    shelf, target = np.arange(27).reshape(3, 9), tf.constant([[[1, 2]]], tf.int32)
    dataset, drawn = tf.data.Dataset.from_tensors({"target_column": target}).repeat(300), Counter()
    for batch in add_candidates(dataset, shelf, NUM_VIDEOS, seed=5).as_numpy_iterator():
        first, second = batch["item_feature"]
        assert first[0] == 9 and len(set(first)) == 4 and np.array_equal(second, first + 9)
        drawn.update((first - 9).tolist())
    assert sorted(drawn) == list(range(9)) and drawn.pop(0) == 300
    deviation = (300 * 3 / 8 * 5 / 8) ** 0.5
    assert max(abs(number - 300 * 3 / 8) for number in drawn.values()) < 4 * deviation
    for sample, positions in ((9, 17), (4, 18)):  # no more places than that, no more videos than clicks
        monkeypatch.setattr(get_dataset, "ITEM_SAMPLE", sample)
        monkeypatch.setattr(get_dataset, "BATCH_POSITIONS", positions)
        (batch,) = add_candidates(dataset.take(1), shelf, NUM_VIDEOS, seed=5).as_numpy_iterator()
        assert np.array_equal(batch["item_feature"], shelf[1:])


def gradients_of(model, batch, kind, **part):
    with tf.GradientTape() as tape:
        losses = losses_of(model, batch, kind, **part)
    gradients = tape.gradient(losses[0], model.trainable_variables)
    return losses, {v.path: g if g is None else np.array(tf.convert_to_tensor(g))
                    for v, g in zip(model.trainable_variables, gradients, strict=True)}  # fmt: skip


@KINDS
def test_every_weight_learns(batch, kind):
    """Of a model as training starts it: nothing is disconnected, in both towers, in the scale and in the repeats."""
    model = build_model(num_videos=NUM_VIDEOS, num_columns=NUM_COLUMNS, emb_dim=DIM, user_blocks=1, item_blocks=1)
    _, gradients = gradients_of(model, batch, kind)
    # Embeddings, scale, repeats and the map of the column tower; four kernels a block, and the user tower's age bias.
    assert len(gradients) == 5 + (4 + 1) + 4
    assert [path for path, g in gradients.items() if g is None or not np.isfinite(g).all() or not g.any()] == []


@KINDS
@pytest.mark.parametrize("candidates", [range(1, 7), [1, 3, 4, 6]])
def test_the_parts_of_replicas_add_up_to_the_loss_and_the_gradients_of_one(model, batch, kind, candidates):
    """Also of more replicas than windows, some of which have none."""
    if len(candidates) < NUM_COLUMNS:
        batch = with_candidates(batch, candidates, np.log(4 / 6))
    losses, gradients = gradients_of(model, batch, kind, training=False)
    for replicas in (2, 5):
        parts = [gradients_of(model, batch, kind, training=False, replica=replica, num_replicas=replicas)
                 for replica in range(replicas)]  # fmt: skip
        assert close(np.sum([of_part for of_part, _ in parts], axis=0), losses, 1e-4)
        for path, gradient in gradients.items():
            assert close(np.sum([of_part[path] for _, of_part in parts], axis=0), gradient, 1e-4)


def test_where_every_column_is_one_video_there_is_no_auxiliary_loss(model, batch):
    total, of_columns = losses_of(model, batch | {"item_feature": batch["item_feature"][:, :1]}, training=False)
    assert float(total) == float(of_columns) > 0
    total, of_columns = losses_of(model, batch, training=False)
    assert float(total) > float(of_columns) > 0


def test_without_a_share_for_the_clicks_after_the_next_only_the_next_is_a_target(model, batch):
    next_alone = batch | {"target_column": batch["target_column"] * np.array([1, 0, 0], np.int32)}
    expected = [float(loss) for loss in losses_of(model, next_alone, training=False)]
    assert [float(loss) for loss in training_loss(model, batch, training=False)] == pytest.approx(expected)
    assert float(losses_of(model, batch, training=False)[0]) != pytest.approx(expected[0])


def test_dropout_and_the_share_of_later_clicks_go_by_clicks_per_video_unless_they_are_set(monkeypatch):
    """By 1 / sqrt(clicks per video): of 25 clicks a video .2 and .4, within .1 to .3 and up to .6; and no click is none."""
    assert model_tf2.by_rarity(2500, 100) == (0.2, 0.4)
    assert model_tf2.by_rarity(1600 * 10, 10) == (0.1, 0.05)
    assert model_tf2.by_rarity(40, 10) == model_tf2.by_rarity(0, 10) == (0.3, 0.6)
    monkeypatch.setattr(model_tf2, "DROPOUT", 0.0)
    assert model_tf2.by_rarity(2500, 100) == (0.0, 0.4)
    monkeypatch.setattr(model_tf2, "AHEAD_DECAY", 0.7)
    assert model_tf2.by_rarity(2500, 100) == (0.0, 0.7)


@KINDS
def test_a_batch_without_targets_gives_a_finite_loss_and_gradients(model, batch, kind):
    batch |= {"label": tf.zeros([3, 6]), "target_column": tf.zeros([3, 6, AHEAD], tf.int32)}
    (total, of_columns), gradients = gradients_of(model, batch, kind)
    assert float(of_columns) == 0 and float(total) > 0
    assert all(np.isfinite(g).all() for g in gradients.values() if g is not None)
    (total, _), gradients = gradients_of(model, batch | {"target_video": tf.zeros([3, 6], tf.int32)}, kind)
    assert float(total) == 0
    assert all(np.isfinite(g).all() for g in gradients.values() if g is not None)


# ---------------------------------------------------------------- pairs and tables


def test_pairs_add_up_by_key_in_any_order():
    one = Pairs(np.array([7, 3, 7]), np.array([[1.0], [2.0], [4.0]]))
    total = add_pairs(one, Pairs(np.array([9, 3]), np.array([[8.0], [16.0]])))
    assert total.keys.tolist() == [3, 7, 9] and total.values.ravel().tolist() == [18, 5, 8]
    nothing = add_pairs(Pairs(np.zeros(0, np.int64), np.zeros([0, 2])))
    assert nothing.keys.shape == (0,) and nothing.values.shape == (0, 2)


def test_the_strongest_columns_of_a_row_stay_and_what_the_others_held_goes_to_column_zero():
    """Rows 2 and 5 of columns 0 to 3: strength is the sum over the values; of equal ones the first column stays."""
    keys = np.array([2 * 4 + 0, 2 * 4 + 1, 2 * 4 + 2, 2 * 4 + 3, 5 * 4 + 1, 5 * 4 + 2, 5 * 4 + 3])
    values = np.array([[9, 9], [1, 0], [3, 3], [2, 4], [1, 1], [1, 1], [1, 1]], float)
    kept = Pairs(keys, values).cut(4, 2)
    assert dict(zip(kept.keys.tolist(), kept.values.tolist(), strict=True)) == {
        8: [10, 9], 10: [3, 3], 11: [2, 4], 20: [1, 1], 21: [1, 1], 22: [1, 1]}  # fmt: skip


@pytest.fixture(params=["matrix", "sparse"])
def path(request, monkeypatch):
    """Both ways in which a table of counts is read."""
    if request.param == "sparse":
        monkeypatch.setattr(model_tf2, "MATRIX_SIZE", 0)
    return request.param


def test_a_table_gives_its_rows_weighted_and_keeps_the_totals_of_what_it_dropped(path):
    rng = np.random.default_rng(15)
    full = rng.integers(1, 9, [6, 5]).astype(float) * (rng.random([6, 5]) < 0.6)  # column 0 is what was lost before
    full[3] = 0
    rows, columns = np.nonzero(full)
    table = CountTable(Pairs(rows * 5 + columns, full[rows, columns][:, None]).cut(5, width=2), 6, 5)
    assert (table.matrix is not None) == (path == "matrix")
    kept = full[:, 1:].copy()
    for row in kept:
        row[np.argsort(-row, kind="stable")[2:]] = 0
    assert np.array_equal(table.totals, full.sum(axis=1)) and (kept.sum(axis=1) < full[:, 1:].sum(axis=1)).any()
    wanted, weights = rng.integers(0, 6, [4, 7]), rng.normal(0, 1, [4, 7])
    expected = np.einsum("nh,nhc->nc", weights, kept[wanted])
    assert close(table.weighted_rows(wanted, weights), expected, 1e-12)
    for few in (1, 5):  # of a single user, fewer than the table has
        assert close(
            table.weighted_rows(wanted[:1, :few], weights[:1, :few]),
            (weights[0, :few] @ kept[wanted[0, :few]])[None],
            1e-12,
        )
    assert table.weighted_rows(wanted[:, :0], weights[:, :0]).tolist() == np.zeros([4, 4]).tolist()


# ---------------------------------------------------------------- counting

MAX_LEN, OVERLAP, DECAYS, HELD_OUT = 12, 5, (0.6, 0.9), 12
MOST_LAG = min(MAX_LAG, OVERLAP)


def split_of(uid, share):
    """By the hash of the uid: the lowest are for validation, the highest for the test."""
    draw = int.from_bytes(hashlib.blake2b(uid.encode(), digest_size=8).digest(), "big") / 2**64
    return "val" if draw < share else "test" if draw >= 1 - share else "train"


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """(manifest, index, work folder, {uid: history as numbers}): long histories, in windows of 12, in many shards.

    At most three clicks in a row are in no column. Column "gone" was clicked and is retired.
    """
    folder, rng = tmp_path_factory.mktemp("counted"), random.Random(12)
    columns = {f"c{i}": [f"v{i}{k}" for k in range(4)] + ["v00"] for i in range(4)} | {"gone": ["v01"], "never": ["w"]}
    users = []
    for user in range(60):
        history = []
        for _ in range(rng.choice([0, 1, 2, 7, 12, 13, 19, 40, 70])):
            column = rng.choice(["c0", "c1", "c2", "c3", "gone"])
            video = rng.choice([*columns[column], "v11", "unheard", "w"])
            plain = rng.random() < 0.4 and any("_" in click for click in history[-3:])
            history.append(video if plain else f"{video}_{column}")
        users.append((f"u{user}", history))
    raw = _raw(folder / "raw", columns=columns, users=users)
    (raw / "vid2title.json").write_text('{"vid": "plain", "title": "On no shelf"}\n')
    get_indexing(raw, folder / "work")
    _raw(raw, columns={cid: vids for cid, vids in columns.items() if cid != "gone"})
    index = get_indexing(raw, folder / "work")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(get_tfrecord_module, "RANGE_BYTES", 4000)
        constants = dict(user_max_len=MAX_LEN, window_overlap=OVERLAP, held_out_users=HELD_OUT)
        manifest = get_tfrecord(raw, folder / "work", num_workers=1, **constants)
    assert len(manifest["shards"]) >= 3 * 3 and index.columns["gone"] == []
    numbers, histories = {cid: number for number, cid in enumerate(index.columns, start=1)}, {}
    for uid, history in users:
        parts = [click.split("_") for click in history]
        histories[uid] = [(index.videos.get(p[0], UNKNOWN), numbers[p[1]] if p[1:] else 0) for p in parts]
    assert max(map(len, histories.values())) == 70 and 1 in map(len, histories.values())
    return manifest, index, folder / "work", histories


@pytest.fixture(scope="module")
def trained_on(records):
    """The histories of which training may know: those of the held-out users end before what is held out."""
    _, index, _, histories = records
    current, cut = [n for n, shelf in enumerate(index.columns.values(), start=1) if shelf], []
    for uid, history in histories.items():
        places = [at for at, (_, column) in enumerate(history) if at and column in current]
        cut.append(history[: places[-1]] if places and split_of(uid, HELD_OUT / 60) != "train" else history)
    assert sum(map(len, cut)) < sum(map(len, histories.values()))
    return cut


def brute_counts(histories):
    """{(video, column): clicks}, {(video, column): near, a weight for each decay}, {(column, column): next}."""
    clicks, near, follows = Counter(), defaultdict(lambda: np.zeros(len(DECAYS))), Counter()
    for history in histories:
        clicks.update(history)
        in_columns = [column for _, column in history if column]
        follows.update(itertools.pairwise(in_columns))
        for i, j in itertools.combinations(range(len(history)), 2):
            (video, column), (later_video, later_column) = history[i], history[j]
            weight = np.array(DECAYS) ** (j - i - 1) * (j - i <= MOST_LAG)
            if video != UNKNOWN and later_column:
                near[video, later_column] += weight
            if later_video != UNKNOWN and column:
                near[later_video, column] += BACKWARD * weight
    return clicks, near, follows


def dense(pairs, size, rows):
    """Pairs as an array [rows, size, values]."""
    array = np.zeros([rows, size, pairs.values.shape[1]])
    array[pairs.keys // size, pairs.keys % size] = pairs.values
    assert (np.diff(pairs.keys) > 0).all()
    return array


def agree(counts, histories, index):
    """Whether Counts are what a brute-force count over whole histories gives."""
    size, rows = 1 + len(index.columns), FIRST_VIDEO + len(index.videos)
    for pairs, expected in zip(counts, brute_counts(histories), strict=True):
        array = np.zeros([rows, size, pairs.values.shape[1]])
        for place, value in expected.items():
            array[place] = value
        assert array.any() and np.allclose(dense(pairs, size, rows), array, rtol=1e-5)
    return True


@pytest.fixture(scope="module")
def counts(records):
    """Counts of the training records."""
    manifest, index, work_dir, _ = records
    return count_windows(manifest, ["train"], DECAYS, index, work_dir, num_workers=1)


def test_what_is_counted_over_overlapping_windows_is_what_the_whole_histories_hold_once(records, counts, trained_on):
    assert agree(counts, trained_on, records[1])


def test_all_splits_together_count_every_click_of_everybody_those_held_out_included(records, counts):
    manifest, index, work_dir, histories = records
    held_out = count_windows(manifest, ["val", "test"], DECAYS, index, work_dir, num_workers=1)
    assert agree(Counts.add(counts, held_out, size=1 + len(index.columns)), histories.values(), index)


@pytest.mark.parametrize(("count_bytes", "count_block", "max_pairs"), [(1, 1024, 40), (1 << 20, 7, 1)])
def test_the_counts_do_not_depend_on_how_the_work_is_cut(
    records, trained_on, monkeypatch, count_bytes, count_block, max_pairs
):
    """There is room for all columns of a video, however often the tables are merged."""
    manifest, index, work_dir, _ = records
    for name, value in dict(COUNT_BYTES=count_bytes, COUNT_BLOCK=count_block, MAX_PAIRS=max_pairs).items():
        monkeypatch.setattr(model_tf2, name, value)
    assert agree(count_windows(manifest, ["train"], DECAYS, index, work_dir, num_workers=1), trained_on, index)


def test_two_workers_count_what_one_does(records, counts, monkeypatch):
    manifest, index, work_dir, _ = records
    paths = get_dataset.shards_of(manifest, "train", work_dir)
    monkeypatch.setattr(model_tf2, "COUNT_BYTES", sum(map(model_tf2.os.path.getsize, paths)) // 2)
    again = count_windows(manifest, ["train"], DECAYS, index, work_dir, num_workers=2)
    for one, two in zip(counts, again, strict=True):
        assert np.array_equal(one.keys, two.keys) and np.allclose(one.values, two.values, rtol=1e-5)


def test_a_bounded_table_keeps_totals_exact_and_the_strongest_columns(records, trained_on, monkeypatch):
    """Room for two columns a video: what the others held is in the totals."""
    manifest, index, work_dir, _ = records
    monkeypatch.setattr(model_tf2, "MEMORY_WIDTH", 1)
    monkeypatch.setattr(model_tf2, "COUNT_SLACK", 2)
    monkeypatch.setattr(model_tf2, "MAX_PAIRS", 50)
    clicks, near, follows = count_windows(manifest, ["train"], DECAYS, index, work_dir, num_workers=1)
    size, rows = 1 + len(index.columns), FIRST_VIDEO + len(index.videos)
    expected, kept = np.zeros([rows, size, 2]), dense(near, size, rows)
    for place, value in brute_counts(trained_on)[1].items():
        expected[place] = value
    assert np.allclose(kept.sum(axis=1), expected.sum(axis=1), rtol=1e-5)
    assert (np.count_nonzero(kept[:, 1:, 0], axis=1) <= 2).all() and kept[:, 0].any()
    strongest = np.sort(expected[:, 1:].sum(axis=2), axis=1)[:, -2:]
    assert np.allclose(np.sort(kept[:, 1:].sum(axis=2), axis=1)[:, -2:], strongest, rtol=1e-5)
    near = {(v, c): w for v in range(rows) for c in range(size) if (w := expected[v, c]).any()}
    assert agree(Counts(clicks, as_pairs(near, size), follows), trained_on, index)


def as_pairs(sums, size):
    """Return Pairs of {(row, column): values}."""
    return add_pairs(Pairs(np.array([row * size + column for row, column in sums]), np.array(list(sums.values()))))


def test_a_users_only_click_and_the_order_of_two_clicks_count(tmp_path):
    """By hand: u1 clicks v1 in c1 and no more; u2 clicks v2 in no column, then v1 in c2; u3 is held out."""
    uids = [f"w{i}" for i in range(99)]
    kept, held = ([uid for uid in uids if split_of(uid, 0.25) == split] for split in ("train", "val"))
    tested = [uid for uid in uids if split_of(uid, 0.25) == "test"]
    users = [
        (kept[0], ["v1_c1"]),
        (kept[1], ["v2", "v1_c2"]),
        (held[0], ["v2_c1", "v2_c1"]),
        (tested[0], ["v1", "v1_c2"]),
    ]
    raw = _raw(tmp_path / "raw", columns={"c1": ["v1", "v2"], "c2": ["v1"]}, users=users, titles={"v1": "One"})
    index = get_indexing(raw, tmp_path / "work")  # v1 2, v2 3
    manifest = get_tfrecord(raw, tmp_path / "work", held_out_users=1, num_workers=1)
    counts = count_windows(manifest, ["train"], [0.5], index, tmp_path / "work", num_workers=1)
    assert dict(zip(counts.clicks.keys.tolist(), counts.clicks.values[:, 0], strict=True)) == {
        2 * 3 + 0: 1, 2 * 3 + 1: 1, 2 * 3 + 2: 1, 3 * 3 + 0: 1, 3 * 3 + 1: 1}  # fmt: skip
    assert (counts.near.keys.tolist(), counts.near.values.tolist()) == ([3 * 3 + 2], [[1.0]])
    memory = Memory.of_counts(counts, 0, index)
    assert memory.popularity.tolist() == [2 / 3, 1 / 3]
    held_out = count_windows(manifest, ["val", "test"], [0.5], index, tmp_path / "work", 1)
    every = Counts.add(counts, held_out, size=1 + len(index.columns))
    assert dict(zip(every.clicks.keys.tolist(), every.clicks.values[:, 0], strict=True)) == {
        2 * 3 + 0: 1, 2 * 3 + 1: 1, 2 * 3 + 2: 2, 3 * 3 + 0: 1, 3 * 3 + 1: 2}  # fmt: skip
    near = {2 * 3 + 2: 1.0, 3 * 3 + 1: 1 + BACKWARD, 3 * 3 + 2: 1.0}
    assert dict(zip(every.near.keys.tolist(), every.near.values[:, 0], strict=True)) == pytest.approx(near)
    assert every.next.keys.tolist() == [1 * 3 + 1]


# ---------------------------------------------------------------- the memory

BY = Mix(0.6, memory_weight=0.5, repeat=1.0, memory_clicks=9)


@pytest.fixture(scope="module")
def memories(records, counts):
    """{decay: Memory} of the training records."""
    return {decay: Memory.of_counts(counts, place, records[1]) for place, decay in enumerate(DECAYS)}


@pytest.fixture(scope="module")
def brute_memory(records, trained_on):
    """M [videos, columns + 1, decays] and M2 [columns + 1, columns + 1, decays] of RECIPE.md, main columns, popularity."""
    index = records[1]
    clicks, near, _ = brute_counts(trained_on)
    homes, size = {}, 1 + len(index.columns)
    for video in index.videos.values():
        in_columns = {column: n for (v, column), n in clicks.items() if v == video and column}
        shown = [number for number, videos in enumerate(index.columns.values(), start=1) if video in videos]
        best = min(in_columns, key=lambda column: (-in_columns[column], column)) if in_columns else None
        homes[video] = best or (shown[0] if shown else 0)
    of_videos, of_columns = np.zeros([FIRST_VIDEO + len(homes), size, 2]), np.zeros([size, size, 2])
    for (video, column), weights in near.items():
        of_videos[video, column] += weights
        of_columns[homes[video], column] += weights
    of_columns[0] = 0
    clicked = Counter(column for history in trained_on for _, column in history if column)
    popularity = np.array([clicked[number] for number in range(1, size)]) / clicked.total()
    return of_videos, of_columns, homes, popularity


def test_the_memory_counts_clicks_and_the_main_column_of_each_video(records, memories, brute_memory, trained_on):
    _, index, _, _ = records
    videos = Counter(video for history in trained_on for video, _ in history if video >= FIRST_VIDEO)
    columns = Counter(column for history in trained_on for _, column in history if column)
    memory, homes = memories[DECAYS[0]], brute_memory[2]
    assert memory.video_clicks.tolist() == [videos[n] for n in range(FIRST_VIDEO + len(index.videos))]
    assert memory.column_clicks.tolist() == [columns[n] for n in range(1 + len(index.columns))]
    assert memory.video_column.tolist() == [homes.get(n, 0) for n in range(FIRST_VIDEO + len(index.videos))]
    assert index.videos["plain"] in homes and homes[index.videos["plain"]] == 0


@pytest.fixture
def histories_seen(records):
    """Numbers of videos and columns [n, 40], padded at the end: known, unknown, short, long and empty ones."""
    index, rng = records[1], np.random.default_rng(13)
    videos = rng.integers(UNKNOWN, FIRST_VIDEO + len(index.videos), [6, 40])
    columns = rng.integers(0, 1 + len(index.columns), videos.shape) * rng.integers(0, 2, videos.shape)
    for row, length in enumerate([40, 30, 7, 2, 1, 0]):
        videos[row, length:] = columns[row, length:] = 0
    return videos, columns


@pytest.mark.parametrize("place", [0, 1])
@pytest.mark.parametrize("constants", [{}, dict(video_decay=0.5, video_backoff=3.0, column_backoff=7.0,
                                                popularity_discount=0.0)])  # fmt: skip
def test_memory_scores_follow_the_formula(records, counts, brute_memory, histories_seen, path, place, constants):
    by, memory = Mix(DECAYS[place], 0.5, 1.0, **constants), Memory.of_counts(counts, place, records[1])
    of_videos, of_columns, homes, popularity = brute_memory
    of_videos, of_columns = of_videos[..., place], of_columns[..., place]
    backed = of_columns[:, 1:] + by.column_backoff * popularity
    backed /= of_columns.sum(axis=1)[:, None] + by.column_backoff
    expected = np.zeros([6, len(popularity)])
    for row, history in enumerate(zip(*histories_seen, strict=True)):
        clicks = [(video, column) for video, column in zip(*history, strict=True) if video]
        for age, (video, column) in enumerate(reversed(clicks)):
            if age < by.memory_clicks:
                home = homes.get(video) or column
                near = of_videos[video, 1:] + by.video_backoff * (backed[home] if home else popularity)
                near /= of_videos[video].sum() + by.video_backoff
                expected[row] += by.video_decay**age * (near - by.popularity_discount * popularity)
    assert close(memory.scores(*histories_seen, by), expected, 1e-6)
    assert not expected[5].any() and expected[:5].any(axis=1).all()


def test_what_one_video_brings_sums_to_one_but_for_the_popularity_taken_off(records, memories):
    videos = np.array([UNKNOWN, *records[1].videos.values()])[:, None]
    sums = memories[0.6].scores(videos, np.zeros_like(videos), BY._replace(popularity_discount=0.25)).sum(axis=1)
    assert close(sums, 0.75, 1e-9)


def test_videos_and_columns_newer_than_the_memory_count_as_unknown_and_none(records, memories, histories_seen):
    index = records[1]
    videos, columns = (array.copy() for array in histories_seen)
    unknown, none = videos.copy(), columns.copy()
    videos[:3, :2], unknown[:3, :2] = [FIRST_VIDEO + len(index.videos), 10**6], UNKNOWN
    columns[:3, :2], none[:3, :2] = [1 + len(index.columns), 10**6], 0
    assert np.array_equal(memories[0.6].scores(videos, columns, BY), memories[0.6].scores(unknown, none, BY))


def test_a_saved_memory_scores_the_same_and_needs_no_pickle(memories, histories_seen, path, tmp_path):
    memory = memories[0.9]
    memory.save(tmp_path / "kept.memory.npz")
    with np.load(tmp_path / "kept.memory.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays)
    loaded = Memory.load(tmp_path / "kept.memory.npz")
    assert close(loaded.scores(*histories_seen, BY), memory.scores(*histories_seen, BY), 1e-12)
    assert np.array_equal(loaded.video_clicks, memory.video_clicks)
    assert np.array_equal(loaded.popularity, memory.popularity)


# ---------------------------------------------------------------- the mix

WEIGHTS = pytest.mark.parametrize("weight", [0.0, 0.3, 0.8, 1.0])


def mixed_of(logits, remembered, is_remembered, clicked, by):
    return mix(*to_probabilities(logits, remembered, is_remembered, by.temperature), clicked, by)


@pytest.fixture
def parents():
    """Logits [50, 20] of the towers, scores of the memory, some below zero, and what was clicked before."""
    rng = np.random.default_rng(14)
    clicked = rng.random([50, 20]) < 0.2
    return rng.normal(0, 9, [50, 20]).astype(np.float32), rng.uniform(-0.5, 3, [50, 20]), clicked


@WEIGHTS
@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("repeat", [1.0, 0.1])
def test_a_mix_is_the_weighted_mean_of_both_probabilities_times_the_factor_for_repeats(
    parents, weight, temperature, repeat
):
    logits, remembered, clicked = parents
    floor = np.maximum(remembered, 1e-9)
    expected = (1 - weight) * softmax(logits.astype(float) / temperature)
    expected += weight * floor / floor.sum(axis=1, keepdims=True)
    expected *= np.where(clicked, repeat, 1)
    expected /= expected.sum(axis=1, keepdims=True)
    mixed = mixed_of(logits, remembered, np.ones(20), clicked, Mix(0.6, weight, repeat, temperature))
    assert close(mixed, expected, 1e-6)
    assert close(mixed.sum(axis=1), 1, 1e-9)


def test_a_mix_without_memory_ranks_as_the_towers_also_where_they_are_far_apart(parents):
    logits, remembered, clicked = parents
    towers = mixed_of(logits, remembered, np.ones(20), clicked, Mix(0.6, 0.0, 1.0))
    assert np.array_equal(np.argsort(-towers, kind="stable"), np.argsort(-logits, kind="stable"))
    apart, none = np.array([[0.0, -200.0, -400.0, -800.0]], np.float32), np.zeros([1, 4], bool)
    mixed = mixed_of(apart, np.ones([1, 4]), np.ones(4), none, Mix(0.6, 0.0, 1.0))
    assert np.argsort(-mixed).tolist() == [[0, 1, 2, 3]]
    apart[0, 3] = -9e30  # of a training that went astray
    assert (mixed_of(apart, np.ones([1, 4]), np.ones(4), none, Mix(0.6, 0.0, 0.001)) > 0).all()


@WEIGHTS
def test_of_three_equal_columns_one_newer_than_the_memory_all_are_equally_likely(weight):
    """The memory of a click near two old columns, and nothing of the third; beside them a column it prefers."""
    newer, none = np.array([1.0, 1.0, 0.0]), np.zeros([1, 3], bool)
    equal = mixed_of(np.zeros([1, 3]), np.array([[0.7, 0.7, 0.0]]), newer, none, Mix(0.6, weight, 1.0))
    assert close(equal, 1 / 3, 1e-12)


@WEIGHTS
def test_a_column_newer_than_the_memory_keeps_what_the_towers_give_it(parents, weight):
    logits, remembered, clicked = parents
    is_remembered = (np.arange(20) < 15).astype(float)
    remembered[:, 15:] = 0
    mixed = mixed_of(logits, remembered, is_remembered, clicked, Mix(0.6, weight, 1.0, temperature=1.5))
    towers = softmax(logits.astype(float) / 1.5)
    assert close(mixed[:, 15:], towers[:, 15:], 1e-6)
    assert close(mixed.sum(axis=1), 1, 1e-9)
    remembered = np.maximum(remembered[:, :15], 1e-9)
    of_old = (1 - weight) * towers[:, :15]
    of_old += weight * remembered / remembered.sum(axis=1, keepdims=True) * towers[:, :15].sum(axis=1, keepdims=True)
    assert close(mixed[:, :15], of_old, 1e-6)


def test_the_lowest_factor_puts_the_columns_clicked_before_last():
    """Where no two columns are more than a factor of 500 apart."""
    rng = np.random.default_rng(16)
    logits, remembered, clicked = rng.uniform(0, 6, [30, 8]), rng.uniform(1, 3, [30, 8]), rng.random([30, 8]) < 0.4
    best_first = np.argsort(-mixed_of(logits, remembered, np.ones(8), clicked, Mix(0.6, 0.5, 0.001, 1.0)), axis=1)
    in_order = np.take_along_axis(clicked, best_first, axis=1)
    assert (np.sort(in_order, axis=1) == in_order).all() and clicked.any()


@pytest.mark.parametrize("weight", [0.5, 1.0])
def test_a_mix_stays_finite_where_the_memory_is_zero_or_below_or_knows_no_column(parents, weight):
    logits, remembered, clicked = parents
    remembered[0], remembered[1] = 0, -3
    for is_remembered in (np.ones(20), np.zeros(20)):
        mixed = mixed_of(logits, remembered, is_remembered, clicked, Mix(0.6, weight, 1.0))
        assert np.isfinite(mixed).all() and close(mixed.sum(axis=1), 1, 1e-9)
    assert close(mixed, softmax(logits.astype(float) / Mix(0.6, weight, 1.0).temperature), 1e-6)


def test_a_mix_leaves_what_it_is_given_as_it_was(parents):
    given = [array.copy() for array in parents]
    mixed_of(*given[:2], np.ones(20), given[2], Mix(0.6, 0.5, 0.1))
    assert all(np.array_equal(a, b) for a, b in zip(given, parents, strict=True))


# ---------------------------------------------------------------- scoring


@pytest.fixture(scope="module")
def grown(records):
    """Today's index: column 2 is retired, columns 7 and 8 are newer than memory and model, and a video is."""
    _, index, _, _ = records
    new, shelves = FIRST_VIDEO + len(index.videos), dict(index.columns)
    shelves |= {"c1": [], "late": [new, *index.columns["c0"][:2]], "later": [index.videos["plain"]]}
    assert list(shelves)[1] == "c1" and len(index.columns) == 6
    return Index(index.videos | {"newest": new}, shelves)


@pytest.fixture
def scorer(records, memories, grown):
    return Scorer(shaken(num_videos=len(records[1].videos)), memories[0.6], grown)


CURRENT = [1, 3, 4, 6, 7, 8]  # 2 is retired today, 5 ("gone") was before; 6 was clicked by nobody


@pytest.fixture
def seen_today():
    """Padded histories [4, 9] of numbers, oldest first, with unknown and new videos, retired and new columns."""
    videos = np.array([[2, 3, 4, 5, 6, 1, 8, 9, 2], [7, 8, 99, 0, 0, 0, 0, 0, 0], [5, 0, 0, 0, 0, 0, 0, 0, 0],
                       [0, 0, 0, 0, 0, 0, 0, 0, 0]], np.int32)  # fmt: skip
    columns = np.array([[1, 2, 0, 3, 1, 0, 7, 5, 0], [8, 3, 0, 0, 0, 0, 0, 0, 0], [0] * 9, [0] * 9], np.int32)
    return videos, columns


def test_the_current_columns_are_scored_and_no_retired_one(scorer, grown, memories, seen_today):
    """Towers, memory, repeats and mix, each by the plain functions above on all columns; without a click, popularity."""
    assert scorer.numbers.tolist() == CURRENT and scorer.is_remembered.tolist() == [1, 1, 1, 0, 0, 0]
    longest = max(map(len, grown.columns.values()))
    clicks = memories[0.6].video_clicks
    shelf = [sorted(vids, key=lambda v: -(clicks[v] if v < len(clicks) else 0)) for vids in grown.columns.values()]
    shelf = np.array([vids + [0] * (longest - len(vids)) for vids in shelf], np.int32)[np.array(CURRENT) - 1]
    logits = scorer.model(inputs_of(seen_today, (shelf, np.array(CURRENT, np.int32)))).numpy()
    assert close(scorer.towers(*seen_today), logits, 1e-4)

    remembered = np.zeros([4, 6])
    for row, length in enumerate([9, 3, 1, 0]):
        clicks = [numbers[row : row + 1, :length] for numbers in seen_today]
        remembered[row, :4] = memories[0.6].scores(*clicks, BY)[0, np.array(CURRENT[:4]) - 1] if length else 0
    assert close(scorer.remembered(*seen_today, BY), remembered, 1e-9)
    clicked = np.isin(np.tile(CURRENT, [4, 1]), []) | np.array([[c in row for c in CURRENT] for row in seen_today[1]])
    assert np.array_equal(scorer.clicked(seen_today[1]), clicked)
    by = BY._replace(memory_weight=0.4, repeat=0.5)
    expected = mixed_of(logits, remembered, np.array([1.0, 1, 1, 0, 0, 0]), clicked, by)
    popular = np.append(memories[0.6].column_clicks[CURRENT[:4]], [0, 0]) + 0.5
    expected[3] = popular / popular.sum()  # the last user has no click
    probabilities = scorer.probabilities(*seen_today, by)
    assert close(probabilities, expected, 1e-5)
    assert close(probabilities.sum(axis=1), 1, 1e-9)
    longer = [after(array, 20) for array in seen_today]
    assert close(scorer.probabilities(*longer, by), probabilities, 1e-6)


def test_the_memory_reads_the_last_clicks_alone(scorer, seen_today):
    by = BY._replace(memory_clicks=2)
    last_two = [np.array([row[7:9] for row in numbers[:1]]) for numbers in seen_today]
    both = scorer.remembered(*seen_today, by)[0], scorer.remembered(*last_two, by)[0]
    assert close(*both, 1e-12) and not close(scorer.remembered(*seen_today, BY)[0], both[0], 1e-6)


def test_refresh_takes_the_columns_from_the_model_as_it_is_now(scorer, seen_today, monkeypatch):
    as_it_was = scorer.towers(*seen_today)
    table = scorer.model.column_embedding
    table.assign(-table.numpy())
    scorer.refresh()
    anew = scorer.towers(*seen_today)
    assert not close(anew[:3], as_it_was[:3], 1e-2)
    monkeypatch.setattr(model_tf2, "COLUMNS_AT_ONCE", 2)
    scorer.refresh()
    assert scorer.vectors.shape == (6, DIM) and close(scorer.towers(*seen_today), anew, 1e-5)


def test_only_users_whose_target_is_a_current_column_are_ranked_for(scorer):
    users = {
        "uid": np.array([b"a", b"b", b"c", b"d", b"e"]),
        "user_column": np.array([[1, 3, 0], [2, 0, 0], [3, 8, 0], [4, 0, 0], [5, 5, 5]]),
        "target_column": np.array([3, 2, 8, 1, 5]),
    }
    kept = scorer.rankable(users)
    assert kept["uid"].tolist() == [b"a", b"c", b"d"]
    assert kept["place"].tolist() == [CURRENT.index(number) for number in (3, 8, 1)]
    assert kept["clicked_before"].tolist() == [True, True, False]


def test_popularity_of_today_is_that_of_the_memory_and_nothing_for_newer_columns(scorer, memories):
    popularity = memories[0.6].popularity
    expected = [*(popularity[number - 1] for number in CURRENT[:4]), 0, 0]
    assert scorer.of_current(popularity[None]).tolist() == [pytest.approx(expected)]
