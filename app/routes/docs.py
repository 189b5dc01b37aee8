"""The API description and the page that shows it."""

import re
from base64 import b64encode
from functools import cache
from hashlib import sha256
from pathlib import Path

import yaml
from flask import Blueprint, current_app, redirect, request
from flask_swagger_ui import get_swaggerui_blueprint

from app.responses import conditional_response, hash_version

CONTENT_SECURITY_POLICY = (
    "default-src 'none'; script-src 'self' {script}; style-src 'self' {style}; img-src 'self' data:;"
    " connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
)
OPTIONS = {
    "app_name": "AI Chatbot Backend",
    "layout": "BaseLayout",
    "validatorUrl": None,
    "defaultModelsExpandDepth": -1,
    "oauth2RedirectUrl": "",
}
STYLE = """
.response-col_links, .swagger-ui .scheme-container { display: none }
@media (max-width: 640px) {
  .swagger-ui .parameters thead { display: none }
  .swagger-ui .parameters tr, .swagger-ui .parameters td { display: block; width: auto; padding: 5px 0 }
  .swagger-ui .wrapper { padding: 0 10px }
  .swagger-ui .opblock-tag { flex-wrap: wrap }
  .swagger-ui .opblock-tag small { order: 1; width: 100%; padding: 0 }
}
"""
PHONE_HEAD = f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{STYLE}</style></head>'

bp = Blueprint("docs", __name__)
# With relative URLs, the page works under any prefix.
swagger_ui = get_swaggerui_blueprint(".", "../openapi.json", OPTIONS)


@bp.get("/")
def index():
    """Redirect to the documentation page."""
    return redirect("api/docs/")


@bp.get("/api/docs")
def redirect_to_page():
    """Redirect to the documentation page."""
    return redirect("docs/")


@swagger_ui.after_request
def adapt_page(response):
    """Make the page fit a phone, and allow no inline script or style but its own."""
    if request.path.endswith("/"):
        page = response.get_data(as_text=True).replace("</head>", PHONE_HEAD)
        script = re.search("<script>(.*?)</script>", page, re.DOTALL)[1]
        policy = CONTENT_SECURITY_POLICY.format(script=csp_hash(script), style=csp_hash(STYLE))
        response.set_data(page)
        response.headers["Content-Security-Policy"] = policy
    return response


def csp_hash(text):
    """Return the source expression that allows an inline script or style in a Content-Security-Policy."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


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
