"""The API description and the page that shows it."""

from base64 import b64encode
from functools import cache
from hashlib import sha256
from importlib.resources import files
from pathlib import Path

import yaml
from flask import Blueprint, current_app, redirect, send_from_directory

from app.responses import conditional_response, hash_version

SWAGGER_UI = files("flask_swagger_ui").joinpath("dist")
# Swagger UI shows the type of two messages as "array<[object, object], any>": to it, they are an array of messages.
SCRIPT = """
const showExchangeAsArray = (updateJsonSpec) => (description) => {
  const exchange = description.components?.schemas.Exchange;
  if (exchange) {
    exchange.items = exchange.prefixItems[0];
    delete exchange.prefixItems;
  }
  return updateJsonSpec(description);
};
SwaggerUIBundle({
  url: "openapi.json",
  dom_id: "#swagger-ui",
  deepLinking: true,
  validatorUrl: null,
  defaultModelsExpandDepth: -1,
  plugins: [{ statePlugins: { spec: { wrapActions: { updateJsonSpec: showExchangeAsArray } } } }],
});
"""
STYLE = """
.response-col_links, .swagger-ui .scheme-container { display: none }
@media (max-width: 640px) {
  .swagger-ui .parameters thead { display: none }
  .swagger-ui .parameters tbody { display: flex; flex-direction: column }
  .swagger-ui .parameters tr:has(.required) { order: -1 }
  .swagger-ui .parameters tr, .swagger-ui .parameters td { display: block; width: auto }
  .swagger-ui .parameters td { padding: 5px 0 }
  .swagger-ui .wrapper { padding: 0 10px }
  .swagger-ui .opblock-tag { flex-wrap: wrap }
  .swagger-ui .opblock-tag a { flex: 1 }
  .swagger-ui .opblock-tag small { flex: none; order: 1; width: 100%; padding: 0 }
}
"""
PAGE_HTML = f"""<!doctype html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <meta name="viewport" content="width=device-width, initial-scale=1">
  <title>AI Chatbot Backend</title>
  <link rel="icon" href="docs/favicon-32x32.png">
  <link rel="stylesheet" href="docs/index.css">
  <link rel="stylesheet" href="docs/swagger-ui.css">
  <style>{STYLE}</style>
</head>
<body>
  <div id="swagger-ui"></div>
  <script src="docs/swagger-ui-bundle.js"></script>
  <script>{SCRIPT}</script>
</body>
</html>
"""


def csp_hash(text):
    """Return the source expression that allows an inline script or style in a Content-Security-Policy."""
    return f"'sha256-{b64encode(sha256(text.encode()).digest()).decode()}'"


CONTENT_SECURITY_POLICY = "; ".join(
    (
        "default-src 'none'",
        f"script-src 'self' {csp_hash(SCRIPT)}",
        f"style-src 'self' {csp_hash(STYLE)}",
        "img-src 'self' data:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    )
)

bp = Blueprint("docs", __name__)


@bp.get("/")
def index():
    """Redirect to the documentation page."""
    return redirect("api/docs")


@bp.get("/api/docs")
def show_page():
    """Return the documentation page."""
    return PAGE_HTML, {"Content-Security-Policy": CONTENT_SECURITY_POLICY}


@bp.get("/api/docs/")
def redirect_to_page():
    """Redirect to the documentation page."""
    return redirect("../docs")


@bp.get("/api/docs/<any('favicon-32x32.png', 'index.css', 'swagger-ui.css', 'swagger-ui-bundle.js'):filename>")
def send_asset(filename):
    """Return a file of Swagger UI."""
    return send_from_directory(SWAGGER_UI, filename, max_age=3600)


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
