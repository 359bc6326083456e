"""The calls that go past the router are those that it describes."""

import httpx

from service import app, door


def test_every_call_has_its_short_way_and_its_door(client: httpx.Client) -> None:
    """A call that is added to the router alone would be answered, and cost more than the others."""
    document = client.get("/openapi.json").json()
    posted = {path for path, operations in document["paths"].items() if "post" in operations}
    assert posted == {*app.CALLS} == set(door.CALLS.values())


def test_a_slash_more_or_another_method_is_the_routers(client: httpx.Client) -> None:
    assert client.post("/embed/").status_code == 404
    assert client.put("/embed").status_code == 405
    assert client.get("/embed").headers["allow"] == "POST"
