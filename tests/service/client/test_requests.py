"""Items and options as the JSON body of a call."""

import io
from typing import Any

import httpx
import numpy as np
import orjson
import pandas
import pytest
from PIL import Image

from concord.client import Client
from concord.client.requests import body
from tests.support.images import to_base64
from tests.support.server import ROOT


def test_body_holds_one_or_several_items_and_the_options() -> None:
    assert orjson.loads(body({"word": "one", "id": "a"}, {"seed": 3})) == {"inputs": [{"word": "one", "id": "a"}], "seed": 3}
    assert orjson.loads(body(({"word": "one"}, {"word": "two"}), {})) == {"inputs": [{"word": "one"}, {"word": "two"}]}


def test_dataframe_and_its_rows_are_items(client: httpx.Client) -> None:
    photo = (ROOT / "tests/fixtures/photo-7.png").read_bytes()
    frame = pandas.DataFrame(
        {
            "id": np.array([5, 6, 7], np.int64),
            "word": pandas.Series(["seven", None, pandas.NA], dtype=object),
            "photo": [np.nan, {"bytes": photo, "path": None}, np.asarray(Image.open(io.BytesIO(photo)))],
        }
    )
    items = [{"id": "5", "word": "seven"}, {"id": "6", "photo": to_base64(photo)}, {"id": "7", "photo": to_base64(photo)}]
    expected = client.post("/embed", json={"inputs": items}).json()["data"]
    with Client(str(client.base_url)) as concord:
        rows = [row for _, row in frame.iterrows()]
        for inputs in (frame, rows, iter(rows), frame.to_dict("records")):
            response = concord.embed(inputs)
            assert [result.id for result in response.results] == ["5", "6", "7"]
            np.testing.assert_allclose(response.matrix, [result["embedding"] for result in expected], atol=1e-5)
        assert concord.embed(rows[1]).results[0].modalities == ("photo",)


def test_row_of_integers_among_floats_keeps_its_types() -> None:
    frame = pandas.DataFrame({"year": [2012, 2013], "price": [1.5, np.nan]})
    assert orjson.loads(body(frame, {}))["inputs"] == [{"year": 2012, "price": 1.5}, {"year": 2013, "price": None}]


@pytest.mark.parametrize(
    ("inputs", "message"),
    [
        ("seven", "^/inputs: received 'seven' of type str; inputs are an item, several items or a DataFrame"),
        (7, "^/inputs: received 7 of type int"),
        (["seven"], "^/inputs/0: received 'seven' of type str; an item is a dict or a row of a DataFrame"),
        ([{"word": "one"}, None], "^/inputs/1: received None"),
        ([{7: "one"}], "^/inputs/0: received 7 of type int as the name of a modality; names are strings"),
        (pandas.DataFrame({0: ["one"]}), "^/inputs/0: received 0 of type int as the name"),
    ],
    ids=repr,
)
def test_inputs_that_are_no_items_raise_with_their_place(inputs: Any, message: str) -> None:
    with pytest.raises(TypeError, match=message):
        body(inputs, {})


def test_options_of_numpy_are_sent_and_checked() -> None:
    sent_body = orjson.loads(body([], {"seed": np.int64(3), "targets": np.array(["word"]), "refine": {"steps": np.int32(2)}}))
    assert sent_body == {"inputs": [], "seed": 3, "targets": ["word"], "refine": {"steps": 2}}
    with pytest.raises(ValueError, match=r"^/temperature: received nan"):
        body([], {"temperature": float("nan")})
