"""A node pack without nodes: POST /validate checks a prompt as POST /prompt does, but does not run it.

`python dev test` puts it beside the pack in the host that it checks workflows on.
"""

from __future__ import annotations

from aiohttp import web

import execution
from server import PromptServer

NODE_CLASS_MAPPINGS: dict[str, type] = {}


@PromptServer.instance.routes.post("/validate")
async def validate(request: web.Request) -> web.Response:
    """Answers {"error": ..., "node_errors": ...}; status 400 where the host would refuse the prompt or part of it."""
    body = await request.json()
    valid, error, _, node_errors = await execution.validate_prompt("validate", body["prompt"], None)
    return web.json_response({"error": error, "node_errors": node_errors}, status=200 if valid and not node_errors else 400)
