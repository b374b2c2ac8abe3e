"""Conversations as ChatGPT and Claude export them, written by hand after the structure of their files."""

from typing import Any

_MARCH = 1_709_280_000.0


def node(id: str, parent: str | None, *children: str, message: dict[str, Any] | None = None) -> dict[str, Any]:
    """Return a node of ChatGPT's tree."""
    return {"id": id, "message": message, "parent": parent, "children": list(children)}


def said(
    id: str, role: str, *parts: Any, at: float | None = _MARCH, content: dict[str, Any] | None = None, **values: Any
) -> dict[str, Any]:
    """Return a message of ChatGPT's."""
    about = values.pop("metadata", {})
    if role == "assistant":
        about = {"model_slug": "gpt-4o", **about}
    return {
        "id": id,
        "author": {"role": role, "name": values.pop("name", None), "metadata": {}},
        "create_time": at,
        "update_time": None,
        "content": content or {"content_type": "text", "parts": list(parts)},
        "status": "finished_successfully",
        "end_turn": True,
        "weight": values.pop("weight", 1.0),
        "metadata": about,
        "recipient": values.pop("recipient", "all"),
        "channel": None,
        **values,
    }


def chatgpt(id: str = "67c0-1", **values: Any) -> dict[str, Any]:
    """Return one of ChatGPT's conversations: hidden nodes, two branches, an image, code that was run, reasoning."""
    mapping = {
        "client-created-root": node("client-created-root", None, "sys"),
        "sys": node("sys", "client-created-root", "ctx", message=said("sys", "system", "", at=None, weight=0.0)),
        "ctx": node(
            "ctx", "sys", "q1",
            message=said(
                "ctx", "user", at=None,
                content={"content_type": "user_editable_context", "user_profile": "I am", "user_instructions": "Be"},
                metadata={"is_visually_hidden_from_conversation": True, "is_user_system_message": True},
            ),
        ),
        "q1": node("q1", "ctx", "a1", "a2", message=said("q1", "user", "What is two and two?")),
        "a1": node("a1", "q1", message=said("a1", "assistant", "Four.", at=_MARCH + 1)),
        "a2": node("a2", "q1", "q2", message=said("a2", "assistant", "It is 4.", at=_MARCH + 2)),
        "q2": node(
            "q2", "a2", "t1",
            message=said(
                "q2", "user", at=_MARCH + 3,
                content={
                    "content_type": "multimodal_text",
                    "parts": [
                        {"content_type": "image_asset_pointer", "asset_pointer": "file-service://file-AbC", "size_bytes": 9,
                         "width": 640, "height": 480, "fovea": None, "metadata": None},
                        "What is on it?",
                    ],
                },
            ),
        ),
        "t1": node(
            "t1", "q2", "c1",
            message=said(
                "t1", "assistant", at=_MARCH + 4,
                content={"content_type": "thoughts", "thoughts": [{"summary": "Looking", "content": "At the image"}]},
            ),
        ),
        "c1": node(
            "c1", "t1", "o1",
            message=said(
                "c1", "assistant", at=_MARCH + 5, recipient="python",
                content={"content_type": "code", "language": "unknown", "response_format_name": None, "text": "print(4)"},
            ),
        ),
        "o1": node(
            "o1", "c1", "r1",
            message=said(
                "o1", "tool", at=_MARCH + 6, name="python",
                content={"content_type": "execution_output", "text": "4\n"},
            ),
        ),
        "r1": node(
            "r1", "o1", "a3",
            message=said("r1", "assistant", at=_MARCH + 6, content={"content_type": "reasoning_recap", "content": "5 s"}),
        ),
        "a3": node("a3", "r1", message=said("a3", "assistant", "A cat.", at=_MARCH + 7, metadata={"model_slug": "o3"})),
    }  # fmt: skip
    return {
        "title": "Sums and cats",
        "create_time": _MARCH - 1,
        "update_time": _MARCH + 7,
        "mapping": mapping,
        "moderation_results": [],
        "current_node": "a3",
        "plugin_ids": None,
        "conversation_id": id,
        "conversation_template_id": None,
        "gizmo_id": None,
        "is_archived": False,
        "safe_urls": [],
        "default_model_slug": "gpt-4o",
        "id": id,
        **values,
    }


def claude_message(id: str, sender: str, text: str, **values: Any) -> dict[str, Any]:
    """Return a message of Claude's."""
    return {
        "uuid": id,
        "text": text,
        "content": [{"start_timestamp": None, "stop_timestamp": None, "type": "text", "text": text, "citations": []}],
        "sender": sender,
        "created_at": "2025-03-01T08:00:01.123456Z",
        "updated_at": "2025-03-01T08:00:01.123456Z",
        "attachments": [],
        "files": [],
        **values,
    }


def claude(id: str = "c1a0-1", **values: Any) -> dict[str, Any]:
    """Return one of Claude's conversations: a pasted file, thinking, a tool, an image that is not there."""
    pasted = {"file_name": "notes.txt", "file_size": 17, "file_type": "txt", "extracted_content": "remember the milk"}
    blocks = [
        {"type": "thinking", "thinking": "They want a summary.", "summaries": []},
        {"type": "tool_use", "name": "artifacts", "input": {"command": "create", "title": "Milk"}},
        {"type": "tool_result", "name": "artifacts", "content": [{"type": "text", "text": "OK"}], "is_error": False},
        {"type": "text", "text": "Buy milk."},
        {"type": "token_budget"},
    ]
    return {
        "uuid": id,
        "name": "Milk",
        "created_at": "2025-03-01T08:00:00.000000Z",
        "updated_at": "2025-03-01T08:05:00.000000+00:00",
        "account": {"uuid": "acc-1"},
        "chat_messages": [
            claude_message("m1", "human", "Sum this up", attachments=[pasted], files=[{"file_name": "cow.png"}]),
            claude_message("m2", "assistant", "", content=blocks, created_at="2025-03-01T08:00:09Z"),
            claude_message("m3", "human", "Thanks", created_at="2025-03-01T08:01:00Z"),
            claude_message("m4", "assistant", "", content=[], created_at="2025-03-01T08:01:01Z"),
        ],
        **values,
    }
