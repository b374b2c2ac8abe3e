import asyncio, json, uuid
from tests.conftest import Account

async def test_turn(alice: Account) -> None:
    c = (await alice.http.post("/api/v1/conversations", json={})).json()["data"]
    r = await alice.http.post(f"/api/v1/conversations/{c['id']}/messages", json={"text": "hello there"}, headers={"Accept": "text/event-stream"})
    print(r.status_code, r.text[:6000])
    m = await alice.http.get(f"/api/v1/conversations/{c['id']}/messages")
    print(json.dumps(m.json(), indent=1))
    assert m.json()["data"][1]["status"] == "completed"
