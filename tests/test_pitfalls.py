"""Traps of Keras and TensorFlow that the README lists in a line each, as seen with Keras 3.12.4 and 3.15.1.

The name of a test stands at the end of its line there; a test that fails with a newer version tells that a trap is gone.
"""

import math
import sys
import warnings

from model_tf2 import build_model
from train import MuonAdam

import keras
import numpy as np
import pytest
import tensorflow as tf


class Small(keras.Model):
    """A subclassed model of one dense layer, without get_config()."""

    def __init__(self, units=3, **options):
        super().__init__(**options)
        self.units, self.layer = units, keras.layers.Dense(units)

    def call(self, inputs):
        return self.layer(inputs)


def compiled():
    """Return a compiled model of one dense layer that was not subclassed."""
    model = keras.Sequential([keras.Input([1]), keras.layers.Dense(1)])
    model.compile(loss="mse")
    return model


def test_decorated_call():
    """@tf.function on Model.call: the tape sees no variable."""

    class Decorated(Small):
        call = tf.function(Small.call)

    plain, decorated = Small(1), Decorated(1)
    for model, lost in ((plain, False), (decorated, True)):
        with tf.GradientTape() as tape:
            loss = tf.reduce_sum(model(tf.ones([1, 2])))
        gradients = tape.gradient(loss, model.trainable_variables)
        assert [gradient is None for gradient in gradients] == [lost, lost]


def test_build_builds_nothing():
    """build(shape) of a subclassed model marks it as built, with a warning and without a variable."""
    model = Small()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        model.build([None, 4])
    assert model.built and model.weights == [] and caught
    called = Small()
    called(tf.ones([1, 4]))
    assert [tuple(weight.shape) for weight in called.weights] == [(4, 3), (3,)]


def test_wrong_shape(tmp_path):
    """A wrong shape is called a wrong number of variables; with skip_mismatch the old weights stay, with a warning."""
    three, five, path = Small(3), Small(5), tmp_path / "three.weights.h5"
    three(tf.ones([1, 4])), five(tf.ones([1, 4]))
    three.save_weights(path)
    with pytest.raises(ValueError, match="expected 2 variables, but received 0"):
        five.load_weights(path)
    before = five.layer.kernel.numpy()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        five.load_weights(path, skip_mismatch=True)
    assert (five.layer.kernel.numpy() == before).all()


def test_saved_with_defaults(tmp_path):
    """Without get_config() the file holds the constructor's defaults; with it, and the class, the model comes back."""

    class Described(Small):
        def get_config(self):
            return {**super().get_config(), "units": self.units}

    bare, described = Small(5), Described(5)
    for model, name in ((bare, "bare"), (described, "described")):
        model(tf.ones([1, 4]))
        model.save(tmp_path / f"{name}.keras")
    assert bare.get_config()["units"] == 3
    with pytest.raises(ValueError, match="could not be loaded"):
        keras.models.load_model(tmp_path / "bare.keras", custom_objects={"Small": Small})
    loaded = keras.models.load_model(tmp_path / "described.keras", custom_objects={"Described": Described})
    assert (loaded(tf.ones([1, 4])).numpy() == described(tf.ones([1, 4])).numpy()).all()


def test_fit_miscounts():
    """Over a dataset of unknown size an epoch has a step without data: 5 counted for 4, the loss is 4/5 of the true 1."""

    class Zero(keras.Model):
        def __init__(self):
            super().__init__()
            self.slope = self.add_weight(shape=(), initializer="zeros", name="slope")

        def call(self, inputs):
            return inputs * self.slope

    def fit(dataset):
        model = Zero()
        model.compile(keras.optimizers.SGD(0.0), loss="mse")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            history = model.fit(dataset, epochs=2, verbose=0).history
        return int(model.optimizer.iterations.numpy()), round(history["loss"][0], 3)

    known = tf.data.Dataset.from_tensors((tf.ones([1]), tf.ones([1]))).repeat(8).batch(2, drop_remainder=True)
    unknown = known.filter(lambda inputs, labels: True)
    assert fit(known) == (8, 1.0)
    assert fit(unknown) == (10, 0.8)
    assert fit(unknown.apply(tf.data.experimental.assert_cardinality(4))) == (8, 1.0)


def test_adam_moves_every_row():
    """Row 1 of a table, used in the first step alone, moves in the second with Keras' Adam, and not with MuonAdam."""

    def moved(is_lazy):
        model = build_model(num_videos=2, num_columns=1, emb_dim=8)
        muon_adam, adam = MuonAdam(model, lambda step: 0.1, 1.0), keras.optimizers.Adam(0.1)
        table = model.video_embedding
        for row in (1, 2):
            before = table.numpy()
            with tf.GradientTape() as tape:
                loss = tf.reduce_sum(tf.gather(table.value, [row]))
            gradients = tape.gradient(loss, muon_adam.tables, unconnected_gradients="zero")
            if is_lazy:
                of_columns = tf.IndexedSlices(tf.zeros([1, 8]), tf.constant([0]))
                others = [tf.zeros_like(weight.value) for weight in muon_adam.rest]
                tf.distribute.get_strategy().run(muon_adam.apply, args=([gradients[0], of_columns], others))
            else:
                adam.apply_gradients([(gradients[0], table)])
        return (table.numpy() != before).any(axis=1).tolist()

    assert moved(is_lazy=False) == [False, True, True, False]
    assert moved(is_lazy=True) == [False, False, True, False]


def test_number_beyond_the_table():
    with (
        tf.device("CPU:0"),
        pytest.raises(tf.errors.InvalidArgumentError, match=r"indices\[0\] = 3 is not in \[0, 3\)"),
    ):
        keras.layers.Embedding(3, 2)(tf.constant([3]))


def test_names_that_changed(tmp_path):
    model = compiled()
    with pytest.raises(TypeError):
        model.fit(tf.ones([1, 1]), tf.ones([1, 1]), workers=2)
    with pytest.raises(TypeError):
        model.save_weights(tmp_path / "new.weights.h5", save_format="h5")
    for save, name in ((model.save_weights, "weights.h5"), (model.save, "folder")):
        with pytest.raises(ValueError):
            save(tmp_path / name)


def test_integer_labels():
    """The functions raise on integer labels; the losses of keras.losses cast them."""
    integers, floats, logits = tf.constant([1, 0]), tf.constant([1.0, 0.0]), tf.constant([2.0, -1.0])
    for loss in (
        lambda labels: tf.nn.sigmoid_cross_entropy_with_logits(labels, logits),
        lambda labels: keras.ops.binary_crossentropy(labels, logits, from_logits=True),
    ):
        with pytest.raises(tf.errors.InvalidArgumentError):
            loss(integers)
        assert (loss(floats).numpy() > 0).all()
    cast = keras.losses.BinaryCrossentropy(from_logits=True)
    assert float(cast(integers, logits)) == float(cast(floats, logits))


def test_cosine_as_logit():
    """A cosine is 1 at most, so the loss of a perfect answer is log(1 + 1/e), not 0; a scale of 20 mends it."""
    loss, label = keras.losses.BinaryCrossentropy(from_logits=True), tf.constant([[1.0]])
    assert float(loss(label, tf.constant([[1.0]]))) == pytest.approx(math.log(1 + 1 / math.e), rel=1e-5)
    assert math.log(1 + 1 / math.e) > 0.313
    assert float(loss(label, tf.constant([[20.0]]))) < 1e-6


def test_cosine_as_probability():
    """A negative cosine is clipped: a large loss, and no gradient to make it smaller."""
    cosine = tf.Variable([[-0.3]])
    with tf.GradientTape() as tape:
        loss = keras.losses.BinaryCrossentropy()(tf.constant([[1.0]]), cosine)
    assert float(loss) == pytest.approx(16.1, abs=0.1)
    assert tape.gradient(loss, cosine).numpy().tolist() == [[0.0]]


def test_masks():
    """Minus infinity gives NaN in a row of padding; a product loses the mask that mask_zero attached."""
    videos = tf.constant([[4, 5, 0], [0, 0, 0]])
    masked = tf.nn.softmax(tf.where(videos != 0, 0.0, -float("inf"))).numpy()
    assert np.isnan(masked).any(axis=1).tolist() == [False, True]
    assert np.isfinite(tf.nn.softmax(tf.where(videos != 0, 0.0, -1e9)).numpy()).all()
    embedded = keras.layers.Embedding(6, 2, mask_zero=True)(videos)
    average = keras.layers.GlobalAveragePooling1D()
    assert (average(embedded).numpy() != average(embedded * 1.0).numpy()).any()


def test_missing_input():
    """A functional model raises where one of its named inputs is missing."""
    user, item = keras.Input([2], name="user"), keras.Input([2], name="item")
    model = keras.Model({"user": user, "item": item}, user - item)
    with pytest.raises(ValueError, match='Missing data for input "item"'):
        model({"user": tf.ones([1, 2])})


def test_longer_than_the_shape():
    """padded_batch with a fixed length raises on a longer element, when it is read."""
    spec = tf.TensorSpec([None], tf.int32)
    dataset = tf.data.Dataset.from_generator(lambda: iter([[1, 2], [1, 2, 3]]), output_signature=spec)
    assert len(list(dataset.padded_batch(1, padded_shapes=[3]))) == 2
    with pytest.raises(tf.errors.DataLossError, match="pad to a smaller size"):
        list(dataset.padded_batch(1, padded_shapes=[2]))


def test_wrong_cardinality():
    """assert_cardinality raises in the pass that finds another number."""
    even = tf.data.Dataset.range(10).filter(lambda number: number % 2 == 0)
    assert len(list(even.apply(tf.data.experimental.assert_cardinality(5)))) == 5
    with pytest.raises(tf.errors.FailedPreconditionError):
        list(even.apply(tf.data.experimental.assert_cardinality(6)))


def test_tensorboard_is_missing(tmp_path, monkeypatch):
    for name in ("tensorboard", "tensorboard.summary.v2"):
        monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(Exception, match="TensorBoard is not installed"):
        compiled().fit(np.ones([1, 1]), np.ones([1, 1]), verbose=0, callbacks=[keras.callbacks.TensorBoard(tmp_path)])


@pytest.mark.skipif(bool(tf.config.list_physical_devices("GPU")), reason="on a GPU it may be on")
def test_no_xla():
    assert compiled().jit_compile is False
