"""The least that Flask can do: what `/api/test` of the program is measured against."""

from flask import Flask

app = Flask(__name__)
app.get("/api/test")(lambda: {"message": "Server is running"})
