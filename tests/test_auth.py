"""Signup, login, logout, who is online."""


def test_a_stolen_cookie_dies_at_logout(app, ada):
    thief = app.test_client()
    thief.set_cookie("session", ada.session_cookie)
    assert thief.is_logged_in()
    ada.logout()
    assert not thief.is_logged_in()


def test_the_program_serves(serve):
    with serve().client() as client:
        assert client.get("/api/test").json == {"message": "Server is running"}
