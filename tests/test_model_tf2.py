"""The towers, their losses, the memory and the mix of both."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import tensorflow as tf
from conftest import _raw

import model_tf2
from get_indexing import FIRST_VIDEO, UNKNOWN, get_indexing
from get_tfrecord import get_tfrecord, split_of
from model_tf2 import (
    BST_DSSM,
    COLUMN_BACKOFF,
    MEMORY_CLICKS,
    NEGLIGIBLE,
    OWN_DECAY,
    POPULARITY_WEIGHT,
    VIDEO_BACKOFF,
    VIDEO_DECAY,
    Memory,
    build_model,
    candidate_loss,
    count_clicks,
    count_memories,
    mix,
    training_loss,
)

NUM_VIDEOS, NUM_COLUMNS, DIM = 30, 6, 8
LAST_VIDEO = FIRST_VIDEO + NUM_VIDEOS - 1


@pytest.fixture(scope="module")
def model():
    """A small model with large random weights, biases and age biases too, so that whatever is read shows."""
    model, rng = build_model(num_videos=NUM_VIDEOS, num_columns=NUM_COLUMNS, emb_dim=DIM), np.random.default_rng(5)
    for variable in model.variables:
        if variable is not model.scale:
            variable.assign(rng.normal(0, 0.7, variable.shape))
    return model


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


def after(array, padding):
    return np.pad(array, [(0, 0), (0, padding)])


def before(array, padding):
    return np.pad(array, [(0, 0), (padding, 0)])


def log_softmax(logits):
    return logits - np.log(np.exp(logits).sum(axis=-1, keepdims=True))


def close(a, b, tolerance=1e-5):
    return np.allclose(a, b, rtol=0, atol=tolerance)


# ---------------------------------------------------------------- towers


@pytest.mark.parametrize("padding", [1, 9, 60])
def test_padding_after_the_clicks_does_not_change_the_user_vectors(model, clicks, padding):
    vectors = model.user_vectors(*clicks).numpy()
    padded = model.user_vectors(*(after(array, padding) for array in clicks)).numpy()
    assert close(padded[:, :7], vectors)


@pytest.mark.parametrize("padding", [1, 9, 60])
def test_the_same_clicks_at_another_place_give_the_same_user_vectors(model, clicks, padding):
    vectors = model.user_vectors(*clicks).numpy()
    padded = model.user_vectors(*(before(array, padding) for array in clicks)).numpy()
    assert close(padded[:, padding:], vectors)


def test_padding_in_the_training_graph_does_not_change_the_user_vectors_either(model, clicks):
    vectors = tf.function(lambda *a: model.user_vectors(*a))
    assert close(vectors(*(after(array, 4) for array in clicks))[:, :7], vectors(*clicks))


@pytest.mark.parametrize("padding", [1, 12])
def test_padding_does_not_change_the_column_vectors(model, shelves, padding):
    videos, numbers = shelves
    assert close(model.column_vectors(after(videos, padding), numbers), model.column_vectors(videos, numbers))


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


def test_logits_are_the_scaled_cosines(model, clicks, shelves):
    batch = dict(zip(("user_feature", "user_column", "item_feature", "item_column"), (*clicks, *shelves), strict=True))
    users, columns = model.user_vectors(*clicks).numpy(), model.column_vectors(*shelves).numpy()
    expected = float(model.scale) * np.einsum("ntd,cd->ntc", users, columns)
    assert close(model(batch), expected, 1e-4)


def test_empty_users_and_empty_columns_give_no_nan(model, clicks, shelves):
    (videos, columns), (shelf, numbers) = (array.copy() for array in clicks), (array.copy() for array in shelves)
    videos[0], columns[0], videos[1, 3:], columns[1, 3:] = 0, 0, 0, 0
    shelf[0], shelf[1], numbers[1] = 0, 0, 0
    with tf.GradientTape() as tape:
        users, items = model.user_vectors(videos, columns), model.column_vectors(shelf, numbers)
        total = tf.reduce_sum(model.logits(users, items) ** 2)
    gradients = tape.gradient(total, model.trainable_variables)
    assert np.isfinite(users).all() and np.isfinite(items).all()
    assert all(np.isfinite(tf.convert_to_tensor(gradient)).all() for gradient in gradients)
    assert close(model.user_vectors(videos, columns)[2], model.user_vectors(*clicks)[2])


def test_an_empty_user_among_others_is_zero_and_ranks_nothing(model, shelves):
    empty = np.zeros([1, 3], np.int32)
    assert close(model.logits(model.user_vectors(empty, empty), model.column_vectors(*shelves)), 0)


@pytest.mark.parametrize("number", [LAST_VIDEO + 1, 10**9])
def test_a_video_beyond_the_vocabulary_is_an_unknown_one(model, clicks, shelves, number):
    (videos, columns), (shelf, numbers) = clicks, shelves
    newer, unknown, shelf_newer, shelf_unknown = videos.copy(), videos.copy(), shelf.copy(), shelf.copy()
    newer[:, 2], unknown[:, 2], shelf_newer[:, 1], shelf_unknown[:, 1] = number, UNKNOWN, number, UNKNOWN
    assert close(model.user_vectors(newer, columns), model.user_vectors(unknown, columns))
    assert close(model.column_vectors(shelf_newer, numbers), model.column_vectors(shelf_unknown, numbers))
    assert not close(model.user_vectors(newer, columns), model.user_vectors(videos, columns), 1e-3)


def test_the_last_video_of_the_vocabulary_is_not_an_unknown_one(model):
    column = np.zeros([1, 1], np.int32)
    last, unknown = (np.full([1, 1], number, np.int32) for number in (LAST_VIDEO, UNKNOWN))
    assert not close(model.user_vectors(last, column), model.user_vectors(unknown, column), 1e-3)


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
    batch = dict(zip(("user_feature", "user_column", "item_feature", "item_column"), (*clicks, *shelves), strict=True))
    assert np.array_equal(again(batch), model(batch))
    assert again.arguments == model.arguments


def test_arguments_name_all_that_the_model_was_built_with():
    given = dict(num_videos=9, num_columns=3, emb_dim=12, num_heads=3, user_blocks=2, item_blocks=0, ffn_ratio=1,
                 dropout=0.0, max_age=4)  # fmt: skip
    assert BST_DSSM(**given).arguments == given
    assert build_model(**given).arguments == given


def test_clicks_older_than_max_age_are_still_read():
    model, rng = build_model(num_videos=NUM_VIDEOS, num_columns=1, emb_dim=DIM, max_age=2), np.random.default_rng(8)
    for variable in model.variables:
        variable.assign(rng.normal(0, 0.7, variable.shape))
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
    assert (
        abs(np.corrcoef(dropped[:, :-1].ravel(), dropped[:, 1:].ravel())[0, 1]) < 0.03
    )  # neighbours do not go together


def test_dropout_is_that_of_its_seed_and_without_one_there_is_none():
    states = tf.random.stateless_normal([9, 5], [3, 4])
    first, again, other = (model_tf2.drop_out(states, 0.5, tf.constant([seed, 7], tf.int64)) for seed in (1, 1, 2))
    assert np.array_equal(first, again) and not np.array_equal(first, other)
    assert np.array_equal(model_tf2.drop_out(states, 0.5, None), states)
    assert np.array_equal(model_tf2.drop_out(states, 0.0, tf.constant([1, 7], tf.int64)), states)


# ---------------------------------------------------------------- losses


@pytest.fixture
def scored():
    """Logits [5, 4], targets [5], log probabilities [4]."""
    rng = np.random.default_rng(9)
    logits, log_prob = rng.normal(0, 2, [5, 4]), np.log(rng.uniform(0.1, 1, 4))
    return logits.astype(np.float32), np.array([0, 3, 1, 1, 2]), log_prob.astype(np.float32)


def mean_loss(logits, targets, log_prob, kind):
    """The mean candidate_loss of logits [n, candidates], of which the own one is at targets [n]."""
    is_own = np.eye(logits.shape[1], dtype=bool)[targets]
    others = np.where(is_own, np.float32(-1e9), logits)
    return candidate_loss(logits[is_own], others, np.array(log_prob, np.float32), kind) / max(len(targets), 1)


def test_the_softmax_loss_is_the_cross_entropy_over_the_candidates(scored):
    logits, targets, _ = scored
    expected = -np.mean(log_softmax(logits)[np.arange(5), targets])
    assert close(mean_loss(logits, targets, np.zeros(4, np.float32), "softmax"), expected)


def test_the_bce_loss_is_the_sum_of_the_candidates_binary_cross_entropies(scored):
    logits, targets, _ = scored
    labels, chance = np.eye(4)[targets], 1 / (1 + np.exp(-logits.astype(float)))
    expected = -(labels * np.log(chance) + (1 - labels) * np.log(1 - chance)).sum(axis=1).mean()
    assert close(mean_loss(logits, targets, np.zeros(4, np.float32), "bce"), expected)


def test_the_bce_loss_weights_a_negative_by_its_inverse_probability(scored):
    logits, targets, log_prob = scored
    labels, chance = np.eye(4)[targets], 1 / (1 + np.exp(-logits.astype(float)))
    of_negatives = -(1 - labels) * np.log(1 - chance) / np.exp(log_prob)
    expected = (of_negatives - labels * np.log(chance)).sum(axis=1).mean()
    assert close(mean_loss(logits, targets, log_prob, "bce"), expected)


@pytest.mark.parametrize("kind", ["softmax", "bce"])
def test_a_negative_drawn_less_often_counts_more_and_the_targets_own_probability_does_not_count(kind):
    logits, targets = np.array([[1.0, 0.5, -0.5]], np.float32), np.array([0])
    losses = [
        float(mean_loss(logits, targets, log_prob, kind))
        for log_prob in ([0, 0, 0], [0, -1, 0], [0, -3, 0], [-3, 0, 0])
    ]
    assert losses[0] < losses[1] < losses[2]
    assert losses[3] == pytest.approx(losses[0])


@pytest.mark.parametrize("kind", ["softmax", "bce"])
def test_a_sample_stands_for_all_candidates_in_expectation(kind):
    """Over every set of candidates that may be drawn, weighted by its probability: the sum that the loss is made of."""
    rng = np.random.default_rng(10)
    logits, chance, target = rng.normal(0, 1.5, 6), rng.uniform(0.2, 0.9, 6), 2

    def amount(chosen):  # what is linear in the candidates: the softmax's denominator, or the sum of entropies
        at, log_prob = chosen.index(target), np.log(chance[chosen])
        loss = mean_loss(logits[None, chosen].astype(np.float32), np.array([at]), log_prob, kind)
        return float(tf.exp(loss + logits[target]) if kind == "softmax" else loss)

    expected = 0
    for drawn in itertools.product([False, True], repeat=5):
        drawn = np.insert(drawn, target, True)
        others = np.arange(6) != target
        probability = np.where(drawn, chance, 1 - chance)[others].prod()
        expected += probability * amount(np.flatnonzero(drawn).tolist())
    positive = logits[target]
    full = (
        np.exp(logits).sum()
        if kind == "softmax"
        else np.log1p(np.exp(logits)).sum() - np.log1p(np.exp(positive)) + np.log1p(np.exp(-positive))
    )
    assert expected == pytest.approx(full, rel=1e-4)


@pytest.mark.parametrize("kind", ["softmax", "bce"])
def test_the_loss_of_no_target_is_zero(kind):
    assert float(candidate_loss(tf.zeros([0]), tf.zeros([0, 4]), tf.zeros([4]), kind)) == 0


@pytest.fixture
def batch():
    """A training batch as get_dataset.py makes it: 3 windows of up to 6 clicks, all columns as candidates."""
    rng = np.random.default_rng(11)
    videos, columns = rng.integers(FIRST_VIDEO, LAST_VIDEO, [3, 6]), rng.integers(0, NUM_COLUMNS + 1, [3, 6])
    videos[2, 4:] = columns[2, 4:] = 0
    next_videos, next_columns = after(videos[:, 1:], 1), after(columns[:, 1:], 1)
    shelf = rng.permutation(np.arange(FIRST_VIDEO, LAST_VIDEO))[: NUM_COLUMNS * 4].reshape(NUM_COLUMNS, 4)
    shelf[0, 2:] = 0
    integers = {"user_feature": videos, "user_column": columns, "target_video": next_videos,
                "target_column": next_columns, "item_column": np.arange(1, NUM_COLUMNS + 1), "item_feature": shelf,
                "negative_video": rng.integers(FIRST_VIDEO, LAST_VIDEO, 512)}  # fmt: skip
    return {name: tf.constant(value, tf.int32) for name, value in integers.items()} | {
        "label": tf.constant(next_columns > 0, tf.float32),
        "item_log_prob": tf.zeros([NUM_COLUMNS]),
        "seed": tf.constant([5, 6], tf.int64),
    }


def gradients_of(model, batch, kind):
    with tf.GradientTape() as tape:
        losses = training_loss(model, batch, kind)
    gradients = tape.gradient(losses[0], model.trainable_variables)
    return losses, {v.path: g if g is None else np.array(tf.convert_to_tensor(g))
                    for v, g in zip(model.trainable_variables, gradients, strict=True)}  # fmt: skip


@pytest.mark.parametrize("kind", ["softmax", "bce"])
def test_every_weight_learns(batch, kind):
    """Of a model as training starts it: nothing is disconnected, in both towers and in the scale."""
    _, gradients = gradients_of(build_model(num_videos=NUM_VIDEOS, num_columns=NUM_COLUMNS, emb_dim=DIM), batch, kind)
    assert len(gradients) == 18
    assert [path for path, g in gradients.items() if g is None or not np.isfinite(g).all() or not g.any()] == []


@pytest.mark.parametrize("kind", ["softmax", "bce"])
@pytest.mark.parametrize("replicas", [2, 3, 5])
def test_the_parts_of_replicas_add_up_to_the_loss_and_the_gradients_of_one(model, batch, kind, replicas):
    """Also of more replicas than windows, some of which have none."""

    def of(**part):
        with tf.GradientTape() as tape:
            losses = training_loss(model, batch, kind, training=False, **part)
        return [*losses, *map(tf.convert_to_tensor, tape.gradient(losses[0], model.trainable_variables))]

    whole, parts = of(), [of(replica=replica, num_replicas=replicas) for replica in range(replicas)]
    for expected, *of_replicas in zip(whole, *parts, strict=True):
        assert close(np.sum(of_replicas, axis=0), expected, 1e-4)


@pytest.mark.parametrize("kind", ["softmax", "bce"])
def test_a_batch_without_targets_gives_a_finite_loss_and_gradients(model, batch, kind):
    batch |= {"label": tf.zeros([3, 6]), "target_column": tf.zeros([3, 6], tf.int32)}
    (total, of_columns), gradients = gradients_of(model, batch, kind)
    assert float(of_columns) == 0 and float(total) > 0
    assert all(np.isfinite(g).all() for g in gradients.values() if g is not None)
    (total, _), gradients = gradients_of(model, batch | {"target_video": tf.zeros([3, 6], tf.int32)}, kind)
    assert float(total) == 0
    assert all(np.isfinite(g).all() for g in gradients.values() if g is not None)


def test_the_loss_of_the_columns_is_the_cross_entropy_of_the_targets_alone(model, batch):
    logits, expected = model(batch).numpy(), []
    for row, place in zip(*np.nonzero(batch["label"].numpy()), strict=True):
        expected.append(-log_softmax(logits[row, place])[int(batch["target_column"][row, place]) - 1])
    _, of_columns = training_loss(model, batch, "softmax", training=False)
    assert float(of_columns) == pytest.approx(np.mean(expected), rel=1e-4)


def test_a_target_among_some_of_the_columns_is_found_by_its_number(model, batch):
    """Candidates are not all columns: the loss is that of the same columns picked from the full logits."""
    no_target = batch["target_column"] == 2
    batch |= {"label": tf.where(no_target, 0.0, batch["label"]),
              "target_column": tf.where(no_target, 0, batch["target_column"])}  # fmt: skip
    chosen = np.array([1, 3, 4, 5, 6], np.int32)
    log_prob = np.log(np.linspace(0.2, 0.9, len(chosen)))
    logits, expected = model(batch).numpy(), []
    for row, place in zip(*np.nonzero(batch["label"].numpy()), strict=True):
        own = int(batch["target_column"][row, place])
        correction = np.where(chosen == own, 0, log_prob)
        expected.append(-log_softmax(logits[row, place, chosen - 1] - correction)[chosen == own][0])
    some = {"item_column": tf.constant(chosen), "item_feature": tf.gather(batch["item_feature"], chosen - 1),
            "item_log_prob": tf.constant(log_prob, tf.float32)}  # fmt: skip
    _, of_columns = training_loss(model, batch | some, "softmax", training=False)
    assert float(of_columns) == pytest.approx(np.mean(expected), rel=1e-4)


def test_the_auxiliary_loss_is_the_next_video_among_the_random_ones_that_are_not_it(model, batch):
    total, of_columns = training_loss(model, batch, "softmax", aux_weight=1.0, training=False)
    users = model.user_vectors(batch["user_feature"], batch["user_column"]).numpy()
    negatives, none = batch["negative_video"].numpy(), np.zeros(1, np.int32)
    vectors = {v: model.column_vectors(np.array([[v]], np.int32), none).numpy()[0] for v in range(2, LAST_VIDEO + 1)}
    expected = []
    for row, place in zip(*np.nonzero(batch["target_video"].numpy()), strict=True):
        own, user = int(batch["target_video"][row, place]), users[row, place]
        score = {v: np.exp(float(model.scale) * user @ vector) for v, vector in vectors.items()}
        # 512 draws of 30 videos: each draw stands for 30 / 512 of a video
        others = sum(score[v] for v in negatives if v != own) * NUM_VIDEOS / 512
        expected.append(-np.log(score[own] / (score[own] + others)))
    assert float(total - of_columns) == pytest.approx(np.mean(expected), rel=1e-3)


# ---------------------------------------------------------------- the memory


MAX_LEN, OVERLAP, DECAYS = 12, 5, (0.6, 0.9)


@pytest.fixture(scope="module")
def records(tmp_path_factory):
    """(manifest, index, work folder, histories of the training users as numbers): long histories, in windows of 12."""
    folder, rng = tmp_path_factory.mktemp("counted"), random.Random(12)
    columns = {f"c{i}": [f"v{i}{k}" for k in range(4)] + ["v00"] for i in range(5)} | {"never": ["w"]}
    users = []
    for user in range(60):
        history = []
        for _ in range(rng.choice([0, 1, 2, 7, 12, 13, 19, 40, 70])):
            column = rng.choice(["c0", "c1", "c2", "c3", "c4"])
            video = rng.choice([*columns[column], "v11", "unheard", "w"])
            history.append(rng.choice([f"{video}_{column}", f"{video}_{column}", video]))
        users.append((f"u{user}", history))
    raw = _raw(folder / "raw", columns=columns, users=users)
    (raw / "vid2title.json").write_text('{"vid": "plain", "title": "On no shelf"}\n')
    index = get_indexing(raw, folder / "work")
    ratios = dict(val_ratio=0.2, test_ratio=0.2)
    manifest = get_tfrecord(raw, folder / "work", user_max_len=MAX_LEN, window_overlap=OVERLAP, **ratios)
    numbers = {cid: number for number, cid in enumerate(index.columns, start=1)}
    histories = []
    for uid, history in users:
        if split_of(uid, **ratios) == "train" and len(history) > 1:
            parts = [click.split("_") for click in history]
            histories.append([(index.videos.get(p[0], UNKNOWN), numbers[p[1]] if p[1:] else 0) for p in parts])
    assert max(map(len, histories)) == 70
    return manifest, index, folder / "work", histories


@pytest.fixture(scope="module")
def counted(records):
    """(memories, index, histories of the training users as numbers)."""
    manifest, index, work_dir, histories = records
    clicks = count_clicks(manifest, index, work_dir)
    return count_memories(manifest, index, clicks, DECAYS, work_dir), index, histories


def homes_of(index, histories):
    """{video: the column it was clicked in most, else the first that shows it}; of equal ones the first column."""
    clicked, homes = Counter(click for history in histories for click in history if click[1]), {}
    for video in index.videos.values():
        in_columns = {column: n for (v, column), n in clicked.items() if v == video}
        shown = [number for number, videos in enumerate(index.columns.values(), start=1) if video in videos]
        best = min(in_columns, key=lambda column: (-in_columns[column], column)) if in_columns else None
        homes[video] = best or (shown[0] if shown else 0)
    return homes


def pairs_of(histories, decay):
    """Yield (video, column, weight) of every two clicks of a user that are near, in both directions."""
    for history in histories:
        for (i, (video, _)), (j, (_, column)) in itertools.product(enumerate(history), repeat=2):
            lag = abs(i - j)
            if 1 <= lag <= OVERLAP and video >= FIRST_VIDEO and column and decay ** (lag - 1) >= NEGLIGIBLE:
                yield video, column, decay ** (lag - 1)


def brute_counts(index, histories, decay):
    """M [videos, columns + 1] and M2 [columns + 1, columns + 1] of RECIPE.md."""
    size, homes = 1 + len(index.columns), homes_of(index, histories)
    of_videos, of_columns = np.zeros([FIRST_VIDEO + len(index.videos), size]), np.zeros([size, size])
    for video, column, weight in pairs_of(histories, decay):
        of_videos[video, column] += weight
        if homes[video]:
            of_columns[homes[video], column] += weight
    return of_videos, of_columns, homes


def popularity_of(index, histories):
    clicks = Counter(column for history in histories for _, column in history if column)
    counts = np.array([clicks[number] for number in range(1, 1 + len(index.columns))])
    return counts / counts.sum()


def dense(table):
    """The entries of a CountTable as a matrix [rows, columns + 1]."""
    matrix = np.zeros([len(table.totals), 1 + table.num_columns])
    matrix[table.keys // table.num_columns, 1 + table.keys % table.num_columns] = table.values
    return matrix


@pytest.mark.parametrize("decay", DECAYS)
def test_the_memory_counts_each_near_pair_once_in_both_directions(counted, decay):
    memories, index, histories = counted
    of_videos, of_columns, _ = brute_counts(index, histories, decay)
    assert of_videos.sum() > 1000
    assert close(dense(memories[decay].by_video), of_videos, 1e-9)
    assert close(dense(memories[decay].by_column), of_columns, 1e-9)
    assert close(memories[decay].by_video.totals, of_videos.sum(axis=1), 1e-9)
    assert close(memories[decay].by_column.totals, of_columns.sum(axis=1), 1e-9)


def test_the_memory_counts_clicks_of_videos_and_columns_in_the_training_split_once(counted):
    memories, index, histories = counted
    videos = Counter(video for history in histories for video, _ in history if video >= FIRST_VIDEO)
    columns = Counter(column for history in histories for _, column in history if column)
    memory = memories[DECAYS[0]]
    assert memory.video_clicks.tolist() == [videos[n] for n in range(FIRST_VIDEO + len(index.videos))]
    assert memory.column_clicks.tolist() == [columns[n] for n in range(1 + len(index.columns))]
    homes = homes_of(index, histories)
    assert memory.video_column.tolist() == [homes.get(n, 0) for n in range(FIRST_VIDEO + len(index.videos))]


def test_the_memory_keeps_the_strongest_columns_of_a_video_and_the_total_of_all(records, monkeypatch):
    manifest, index, work_dir, histories = records
    of_videos, _, _ = brute_counts(index, histories, 0.6)
    monkeypatch.setattr(model_tf2, "MEMORY_WIDTH", 2)
    kept = count_memories(manifest, index, count_clicks(manifest, index, work_dir), [0.6], work_dir)[0.6].by_video
    assert (np.count_nonzero(dense(kept), axis=1) <= 2).all()
    assert close(dense(kept).sum(axis=1), np.sort(of_videos, axis=1)[:, -2:].sum(axis=1), 1e-9)
    assert close(kept.totals, of_videos.sum(axis=1), 1e-9)


@pytest.fixture
def histories_seen(counted):
    """Numbers of videos and columns [n, MEMORY_CLICKS], latest first: known, unknown, short, long and empty ones."""
    _, index, _ = counted
    rng, known = np.random.default_rng(13), FIRST_VIDEO + len(index.videos)
    videos = rng.integers(UNKNOWN, known, [6, MEMORY_CLICKS])
    columns = rng.integers(0, 1 + len(index.columns), videos.shape) * rng.integers(0, 2, videos.shape)
    for row, length in enumerate([30, 30, 7, 2, 1, 0]):
        videos[row, length:] = columns[row, length:] = 0
    return videos, columns


@pytest.mark.parametrize("decay", DECAYS)
@pytest.mark.parametrize("own_weight", [0.0, 0.1, -0.05])
def test_memory_scores_follow_the_formula(counted, histories_seen, decay, own_weight):
    memories, index, histories = counted
    of_videos, of_columns, homes = brute_counts(index, histories, decay)
    popularity = popularity_of(index, histories)
    backed = (of_columns[:, 1:] + COLUMN_BACKOFF * popularity) / (of_columns.sum(axis=1)[:, None] + COLUMN_BACKOFF)
    expected = np.zeros([len(histories_seen[0]), len(index.columns)])
    for row, history in enumerate(zip(*histories_seen, strict=True)):
        expected[row] = POPULARITY_WEIGHT * popularity
        for age, (video, column) in enumerate(zip(*history, strict=True)):
            if video:
                home = homes.get(video) or column
                counts = of_videos[video, 1:] + VIDEO_BACKOFF * (backed[home] if home else popularity)
                expected[row] += VIDEO_DECAY**age * counts / (of_videos[video].sum() + VIDEO_BACKOFF)
            if column:
                expected[row, column - 1] += own_weight * OWN_DECAY**age
    assert close(memories[decay].scores(*histories_seen, own_weight), expected, 1e-9)


def test_a_video_without_counts_and_columns_gives_popularity_alone(counted):
    memories, index, histories = counted
    never = index.videos["plain"]
    near = memories[0.6].near(np.array([[never, 0]]), np.zeros([1, 2], int))
    assert close(near[0], (1 + POPULARITY_WEIGHT) * popularity_of(index, histories), 1e-12)


@pytest.mark.parametrize("decay", DECAYS)
def test_an_unknown_video_backs_off_to_the_column_it_was_clicked_in(counted, decay):
    memories, index, histories = counted
    _, of_columns, _ = brute_counts(index, histories, decay)
    popularity = popularity_of(index, histories)
    backed = (of_columns[2, 1:] + COLUMN_BACKOFF * popularity) / (of_columns[2].sum() + COLUMN_BACKOFF)
    near = memories[decay].near(np.array([[UNKNOWN, 0]]), np.array([[2, 0]]))
    assert close(near[0], backed + POPULARITY_WEIGHT * popularity, 1e-12)


def test_the_memory_of_an_empty_history_is_popularity_alone(counted):
    memories, index, histories = counted
    scores = memories[0.6].scores(np.zeros([2, 3], int), np.zeros([2, 3], int), 0.1)
    assert close(scores, POPULARITY_WEIGHT * popularity_of(index, histories), 1e-12)


def test_what_one_video_brings_sums_to_one_beside_popularity(counted):
    memories, index, _ = counted
    videos = np.array([UNKNOWN, *index.videos.values()])[:, None]
    sums = memories[0.6].near(videos, np.zeros_like(videos)).sum(axis=1)
    assert close(sums, 1 + POPULARITY_WEIGHT, 1e-9)


def test_videos_and_columns_newer_than_the_memory_count_as_unknown_and_none(counted, histories_seen):
    memory, index = counted[0][0.6], counted[1]
    videos, columns = (array.copy() for array in histories_seen)
    unknown, none = videos.copy(), columns.copy()
    videos[:3, :2], unknown[:3, :2] = [FIRST_VIDEO + len(index.videos), 10**6], UNKNOWN
    columns[:3, :2], none[:3, :2] = [1 + len(index.columns), 10**6], 0
    assert np.array_equal(memory.scores(videos, columns, 0.1), memory.scores(unknown, none, 0.1))


def test_a_saved_memory_scores_the_same_and_needs_no_pickle(counted, histories_seen, tmp_path):
    memory = counted[0][0.9]
    memory.save(tmp_path / "kept.memory.npz")
    with np.load(tmp_path / "kept.memory.npz", allow_pickle=False) as arrays:
        assert all(arrays[name].dtype != object for name in arrays)
    loaded = Memory.load(tmp_path / "kept.memory.npz")
    assert np.array_equal(loaded.scores(*histories_seen, 0.1), memory.scores(*histories_seen, 0.1))
    assert np.array_equal(loaded.video_clicks, memory.video_clicks)


# ---------------------------------------------------------------- the mix


@pytest.fixture
def parents():
    rng = np.random.default_rng(14)
    return rng.normal(0, 9, [50, 20]).astype(np.float32), rng.uniform(0, 3, [50, 20])


@pytest.mark.parametrize("temperature", [1.0, 1.5])
def test_a_mix_without_memory_is_the_towers_alone(parents, temperature):
    logits, remembered = parents
    mixed = mix(logits, remembered, 0.0, temperature)
    assert close(mixed, log_softmax(logits.astype(float) / temperature), 1e-4)
    assert np.array_equal(np.argsort(-mixed, kind="stable"), np.argsort(-logits, kind="stable"))


def test_a_mix_without_memory_keeps_the_order_of_scores_that_are_far_apart():
    logits = np.array([[0.0, -200.0, -400.0, -800.0]], np.float32)
    assert np.argsort(-mix(logits, np.ones([1, 4]), 0.0, 1.0)).tolist() == [[0, 1, 2, 3]]


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("weight", [0.0, 0.3, 0.8, 1.0])
def test_a_mix_holds_log_probabilities(parents, weight, temperature):
    mixed = mix(*parents, weight, temperature)
    assert np.isfinite(mixed).all()
    assert close(np.exp(mixed).sum(axis=1), 1, 1e-5)


@pytest.mark.parametrize("temperature", [1.0, 1.5])
@pytest.mark.parametrize("weight", [0.1, 0.8])
def test_a_mix_is_the_weighted_mean_of_both_probabilities(parents, weight, temperature):
    logits, remembered = parents
    towers = np.exp(log_softmax(logits.astype(float) / temperature))
    expected = (1 - weight) * towers + weight * remembered / remembered.sum(axis=1, keepdims=True)
    assert np.allclose(mix(logits, remembered, weight, temperature), np.log(expected), atol=1e-4)


def test_a_mix_stays_finite_where_the_memory_is_zero_or_below(parents):
    logits, remembered = parents
    remembered = remembered - 1.5
    remembered[0] = 0
    assert np.isfinite(mix(logits, remembered, 0.5, 1.0)).all()
    assert np.isfinite(mix(logits, remembered, 1.0, 1.0)).all()


def test_a_mix_leaves_what_it_is_given_as_it_was(parents):
    logits, remembered = (array.copy() for array in parents)
    mix(logits, remembered, 0.5, 1.5)
    assert np.array_equal(logits, parents[0]) and np.array_equal(remembered, parents[1])
