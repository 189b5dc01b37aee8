"""The API description and the page that shows it."""

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path

import yaml
from flask import Blueprint, current_app, redirect
from flask_swagger_ui import get_swaggerui_blueprint

from app.responses import conditional_response, hash_version

# All references are relative, so that the page works behind any proxy and path prefix.
OPTIONS = {"app_name": "AI Chatbot Backend", "layout": "BaseLayout", "validatorUrl": None, "oauth2RedirectUrl": ""}
CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self' 'sha256-{}'; style-src 'self'; img-src 'self' data:; connect-src 'self'; "
    "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)

bp = Blueprint("docs", __name__)
swagger_ui = get_swaggerui_blueprint(".", "../openapi.json", OPTIONS)
bp.register_blueprint(swagger_ui, url_prefix="/api/docs")


@swagger_ui.after_request
def set_content_security_policy(response):
    """Allow the page its own inline script, and no other."""
    if response.mimetype == "text/html" and response.status_code == 200:
        script = re.search(rb"<script>(.*?)</script>", response.get_data(), re.DOTALL)[1]
        digest = b64encode(sha256(script).digest()).decode()
        response.headers["Content-Security-Policy"] = CONTENT_SECURITY_POLICY.format(digest)
    return response


@bp.get("/", defaults={"location": "api/docs/"})
@bp.get("/api/docs", defaults={"location": "docs/"})
def redirect_to_page(location):
    """Redirect to the documentation page."""
    return redirect(location)


@bp.get("/api/openapi.json")
def get_description():
    """Return the API description."""
    return conditional_response(*load_description())


@cache
def load_description():
    """Return the API description and its ETag."""
    text = Path(current_app.root_path, "openapi.yaml").read_text(encoding="utf-8")
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)  # ten times faster, where there is a C library
    return yaml.load(text, loader), hash_version(text)
