"""The same API as a thousand tutorials write it: what the program is measured against.

Objects and their relationships, loaded as they are touched, turned into dicts one by one; the databases as they come.
It answers what the benchmark asks for, as the program does; it lacks what the program promises beyond that.
"""

import os
from datetime import UTC, datetime

from flask import Flask, jsonify, request
from flask_login import LoginManager, UserMixin, current_user, login_required, login_user
from flask_sqlalchemy import SQLAlchemy
from werkzeug.security import check_password_hash, generate_password_hash

app = Flask(__name__)
app.config["SECRET_KEY"] = "textbook"
app.config["SESSION_COOKIE_NAME"] = "chatbot_session"  # the name that the benchmark's client keeps
app.config["SQLALCHEMY_DATABASE_URI"] = os.environ["DATABASE_URL"]
db = SQLAlchemy(app)
login_manager = LoginManager(app)


def now():
    return datetime.now(UTC).replace(tzinfo=None)


def iso(timestamp):
    return timestamp and timestamp.isoformat() + "Z"


class User(UserMixin, db.Model):
    id = db.Column(db.Integer, primary_key=True)
    user_id = db.Column(db.Integer, unique=True, nullable=False)
    username = db.Column(db.String(80), unique=True, nullable=False)
    password_hash = db.Column(db.String(255), nullable=False)
    is_logged_in = db.Column(db.Boolean, nullable=False, default=False)
    last_login = db.Column(db.DateTime)
    last_logout = db.Column(db.DateTime)
    conversations = db.relationship("Conversation", backref="user", order_by="Conversation.id")

    def to_dict(self):
        return {"id": self.id, "user_id": self.user_id, "username": self.username}

    def status(self):
        return {
            "user_id": self.user_id,
            "username": self.username,
            "status": "Online" if self.is_logged_in else "Offline",
            "last_login": iso(self.last_login),
            "last_logout": iso(self.last_logout),
        }


class Conversation(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    name = db.Column(db.String(255), nullable=False)
    user_id = db.Column(db.Integer, db.ForeignKey("user.id"), nullable=False, index=True)
    created_at = db.Column(db.DateTime, nullable=False, default=now)
    messages = db.relationship("Message", backref="conversation", order_by="Message.id")

    def to_dict(self):
        return {"id": self.id, "name": self.name, "messages": [message.to_dict() for message in self.messages]}


class Message(db.Model):
    id = db.Column(db.Integer, primary_key=True)
    sender = db.Column(db.String(4), nullable=False)
    text = db.Column(db.Text, nullable=False)
    conversation_id = db.Column(db.Integer, db.ForeignKey("conversation.id"), nullable=False, index=True)
    created_at = db.Column(db.DateTime, nullable=False, default=now)

    def to_dict(self):
        return {"id": self.id, "sender": self.sender, "text": self.text, "created_at": iso(self.created_at)}


@app.cli.command("init")
def init():
    db.create_all()


@login_manager.user_loader
def load_user(user_id):
    return db.session.get(User, int(user_id))


@app.get("/api/test")
def test():
    return jsonify(message="Server is running")


@app.post("/api/signup")
def signup():
    data = request.get_json()
    if User.query.filter_by(username=data["username"]).first():
        return jsonify(error="Username already exists"), 400
    number = (db.session.query(db.func.max(User.user_id)).scalar() or 0) + 1
    hashed = generate_password_hash(data["password"], "scrypt:32768:8:3")
    user = User(user_id=number, username=data["username"], password_hash=hashed)
    db.session.add(user)
    db.session.commit()
    return jsonify(message="User created successfully", user_id=user.user_id), 201


@app.post("/api/login")
def login():
    data = request.get_json()
    user = User.query.filter_by(username=data["username"]).first()
    if user is None or not check_password_hash(user.password_hash, data["password"]):
        return jsonify(error="Invalid username or password"), 401
    user.is_logged_in = True
    user.last_login = now()
    db.session.commit()
    login_user(user)
    return jsonify(message="Login successful", user=user.to_dict())


@app.get("/api/current_user")
@login_required
def get_current_user():
    return jsonify(user=current_user.to_dict())


@app.get("/api/users/status")
def users_status():
    return jsonify(users=[user.status() for user in User.query.order_by(User.id)])


@app.get("/api/conversations")
@login_required
def list_conversations():
    return jsonify([conversation.to_dict() for conversation in current_user.conversations])


@app.post("/api/conversations")
@login_required
def create_conversation():
    conversation = Conversation(name=request.get_json()["name"], user_id=current_user.id)
    db.session.add(conversation)
    db.session.commit()
    return jsonify(id=conversation.id, name=conversation.name), 201


@app.post("/api/conversations/<int:conversation_id>/messages")
@login_required
def send_message(conversation_id):
    conversation = Conversation.query.filter_by(id=conversation_id, user_id=current_user.id).first_or_404()
    text = request.get_json()["text"]
    question = Message(sender="user", text=text, conversation_id=conversation.id)
    answer = Message(sender="bot", text=f"You said: {text}", conversation_id=conversation.id)
    db.session.add_all([question, answer])
    db.session.commit()
    return jsonify([question.to_dict(), answer.to_dict()]), 201
