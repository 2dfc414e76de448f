import pickle

import numpy as np
import pytest

from raystudy.images.array import ImageArray


def films(n: int = 3, size: int = 4) -> ImageArray:
    pixels = np.arange(n * size * size, dtype=np.uint8).reshape(n, size, size)
    pixels.flags.writeable = False
    return ImageArray(tuple(f"H1/{i}" for i in range(n)), pixels)


def test_films_come_in_the_order_of_the_ids_asked_for() -> None:
    images = films()
    assert images.rows(["H1/2", "H1/0"]).tolist() == [2, 0]
    taken = images.take(["H1/2", "H1/0", "H1/2"])
    assert taken.flags.writeable
    np.testing.assert_array_equal(taken, images.pixels[[2, 0, 2]])
    assert images.size == 4


def test_unknown_ids_are_named() -> None:
    with pytest.raises(ValueError, match="1 of 2 images are not in the image array: H2/9"):
        films().take(["H1/0", "H2/9"])


@pytest.mark.parametrize(
    ("ids", "shape", "dtype", "rule"),
    [
        (("a",), (1, 4, 4), np.float32, "uint8"),
        (("a",), (1, 4, 5), np.uint8, "uint8"),
        (("a",), (2, 4, 4), np.uint8, "1 image ids for 2 films"),
        (("a", "a"), (2, 4, 4), np.uint8, "unique"),
    ],
)
def test_an_array_that_cannot_be_films_is_refused(
    ids: tuple[str, ...], shape: tuple[int, ...], dtype: type, rule: str
) -> None:
    with pytest.raises(ValueError, match=rule):
        ImageArray(ids, np.zeros(shape, dtype))


def test_an_array_survives_pickling() -> None:
    images = films()
    images.rows(["H1/1"])
    again = pickle.loads(pickle.dumps(images))
    np.testing.assert_array_equal(again.take(["H1/1"]), images.take(["H1/1"]))
