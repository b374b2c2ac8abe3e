"""What a browser finds at `/`: for now a plain page that says what is here and how to begin."""

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

router = APIRouter(include_in_schema=False)

_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Parley</title>
<style>
  :root { color-scheme: light dark; }
  body { font: 16px/1.6 system-ui, sans-serif; max-width: 44rem; margin: 12vh auto 6vh; padding: 0 1.5rem; }
  h1 { font-size: 2rem; margin: 0 0 .25rem; letter-spacing: -.02em; }
  p.lead { margin-top: 0; opacity: .75; }
  pre { background: rgba(127, 127, 127, .12); padding: 1rem; border-radius: .5rem; overflow-x: auto; }
  pre { font-size: .875rem; }
  a { color: inherit; text-underline-offset: .2em; }
  li { margin: .4rem 0; }
</style>
</head>
<body>
<h1>Parley</h1>
<p class="lead">The server is running. There is no web app in this version; everything else is here.</p>
<ul>
  <li><a href="/docs">API documents</a>: try every call in the browser.</li>
  <li><a href="/health/ready">Health</a>: what the server itself says.</li>
</ul>
<p>Talk to a model from a terminal, in the folder that you started the server in:</p>
<pre>.venv/bin/parley chat --sign-up</pre>
<p>Or with curl:</p>
<pre>curl -s {base}/api/v1/auth/signup -H 'Content-Type: application/json' \\
  -d '{"email": "you@example.com", "password": "a good one 1", "confirmPassword": "a good one 1"}'</pre>
</body>
</html>
"""


@router.get("/")
async def home(request: Request) -> HTMLResponse:
    """Serve the page."""
    page = _PAGE.replace("{base}", request.app.state.settings.base_url)
    policy = "default-src 'none'; style-src 'unsafe-inline'; frame-ancestors 'none'"
    return HTMLResponse(page, headers={"Content-Security-Policy": policy})
