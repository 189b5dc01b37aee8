"""How many queries requests send, and how many connections they use; slow/test_query_plans.py tests how they run."""

import pytest

from tests.helpers.data import add_conversations
from tests.helpers.queries import BODY, REQUESTS, count_connections, record_queries


@pytest.mark.parametrize("name", REQUESTS)
def test_request_uses_one_connection_at_a_time(app, ada, name):
    method, path = REQUESTS[name]
    [id] = add_conversations(app, ada, 1, messages=4)
    path = path.format(id=id, message_id=ada.list_messages(id)[0]["id"], user_id=ada.user_id)
    with count_connections(app) as most:
        response = ada.open(path, method=method, json=BODY, buffered=True)
    assert (response.status_code < 300, most) == (True, [1]), response.get_data()


PATHS = [
    "/api/conversations",
    "/api/conversations?limit=100",
    "/api/conversations?limit=100&messages=2&q=t",
    "/api/conversations?limit=100&order=recent",
    "/api/conversations/1",
    "/api/conversations/1/messages?limit=100",
    "/api/messages?q=t",
    "/api/users/status",
]


@pytest.mark.parametrize("path", PATHS)
def test_request_sends_no_more_queries_for_more_rows(app, ada, path):
    def count_queries():
        with record_queries(app) as queries:
            assert ada.get(path).status_code == 200
        return len(queries)

    add_conversations(app, ada, 1, messages=2)
    count_queries()  # the first request looks for abandoned replies, too
    few = count_queries()
    add_conversations(app, ada, 40, messages=4)
    for number in range(3):
        ada.signup(f"user {number}")
    assert count_queries() == few
