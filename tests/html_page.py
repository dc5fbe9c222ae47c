"""Reads an HTML page as a strict reader would: tags balance, ids are unique, nothing comes from elsewhere."""

from html.parser import HTMLParser

VOID = {"meta", "br", "link", "img", "input", "hr"}


class Page(HTMLParser):
    """Elements and text of a page; raises AssertionError where the page breaks a promise."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict]] = []
        self.texts: list[str] = []
        self.feed(text)
        self.close()
        assert self.open == [], f"never closed: {self.open}"
        ids = [a["id"] for _, a in self.tags if "id" in a]
        assert len(ids) == len(set(ids)), "an id occurs twice"
        links = [a[k] for _, a in self.tags for k in ("href", "src", "action", "srcset", "data") if k in a]
        assert all(link.startswith("#") and link[1:] in ids for link in links), links
        assert not {t for t, _ in self.tags} & {"script", "iframe", "object", "embed", "link", "base", "form"}
        assert not [a for _, attrs in self.tags for a in attrs if a.startswith("on")], "an event handler"
        assert "url(http" not in text and "@import" not in text

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        if not self.open or self.open[-1] != "style":
            self.texts.append(data)

    @property
    def text(self) -> str:
        """All that a reader can read."""
        return "\n".join(part.strip() for part in self.texts if part.strip())

    def having(self, style: str) -> list[str]:
        """Tags with a style class."""
        return [tag for tag, attrs in self.tags if style in attrs.get("class", "").split()]
