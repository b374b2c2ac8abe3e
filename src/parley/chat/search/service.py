"""Finding what was said."""

from parley.chat.search.repository import SearchRepository
from parley.chat.search.schemas import SearchHit
from parley.chat.search.words import Words
from parley.core.pagination import PageRequest


class SearchService:
    """Searches titles and messages of conversations that the caller may read."""

    def __init__(self, repository: SearchRepository) -> None:
        self._repository = repository

    async def search(self, text: str, page: PageRequest) -> tuple[list[SearchHit], int]:
        """Return a page of hits, best first, and how many there are. What a running reply says is found at its end."""
        words = Words.of(text)
        if not words.wanted:
            return [], 0
        rows, total = await self._repository.search(words.query, last_goes_on=words.last_goes_on, page=page)
        hits = []
        for row in rows:
            snippet, marks = words.snippet(row.pop("text") or "")
            hits.append(SearchHit(**{name: row[name] for name in _COPIED}, snippet=snippet, marks=marks))
        return hits, total


_COPIED = ("conversation_id", "title", "message_id", "role", "created_at")
