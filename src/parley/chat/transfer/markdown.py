"""A conversation as Markdown: for people to read and keep. What was said is Markdown already and stays as it is."""

import base64
import re
from collections.abc import Mapping
from typing import Any

import orjson

_SPECIAL = re.compile(r"([\\`*_{}\[\]<>()#+!|~-])")
_FENCE = re.compile(r"`{3,}")


def heading(conversation: Mapping[str, Any]) -> str:
    """Return the beginning of the file."""
    title = escaped(conversation["title"] or "Conversation")
    return f"# {title}\n\n_Begun {_moment(conversation['created_at'])}_\n"


def message_text(message: Mapping[str, Any], images: Mapping[str, bytes | None]) -> str:
    """Return a message. `images` has the bytes of those that stand in the text itself."""
    who = {"user": "You", "system": "System"}.get(message["role"]) or escaped(message["model"] or "Assistant")
    blocks = [f"\n## {who} · {_moment(message['created_at'])}\n"]
    for part in message["parts"]:
        match part["type"]:
            case "text":
                blocks.append(part["text"])
            case "reasoning":
                blocks.append(f"<details><summary>Reasoning</summary>\n\n{part['text']}\n\n</details>")
            case "tool":
                blocks.append(_tool(part))
            case "image":
                blocks.append(f"![{escaped(part['name'])}]({_address(part, images.get(part['attachment']))})")
            case "file":
                blocks.append(f"[{escaped(part['name'])}]({_address(part, None)})")
    if message["status"] in {"failed", "cancelled"}:
        blocks.append(f"_({message['status']})_")
    return "\n".join(blocks[:1]) + "\n" + "\n\n".join(blocks[1:]) + "\n"


def escaped(text: str) -> str:
    """Return text on one line in which nothing is markup."""
    return _SPECIAL.sub(r"\\\1", " ".join(text.split()))


def _tool(part: Mapping[str, Any]) -> str:
    said = orjson.dumps({"input": part["input"], "output": part["output"]}, option=orjson.OPT_INDENT_2).decode()
    # A fence is longer than any inside.
    fence = "`" * max([3, *(len(found) + 1 for found in _FENCE.findall(said))])
    return f"Tool {escaped(part['name'])} ({part['state']}):\n\n{fence}json\n{said}\n{fence}"


def _address(part: Mapping[str, Any], data: bytes | None) -> str:
    if data is not None:
        return f"data:{part['media_type']};base64,{base64.b64encode(data).decode()}"
    return f"/api/v1/attachments/{part['attachment']}"


def _moment(value: str) -> str:
    return value[:16].replace("T", " ")
