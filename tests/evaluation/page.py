"""The page of a report, read."""

import html.parser
import json
import re

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr", "image", "path", "circle"}


class Page(html.parser.HTMLParser):
    """Elements of a page; a tag that does not fit the one it closes is an error."""

    def __init__(self, text):
        super().__init__()
        self.open, self.tags, self.ids, self.words = [], [], [], []
        self.feed(text)
        self.close()
        assert not self.open, f"never closed: {self.open}"

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        self.ids += [value for name, value in attrs if name == "id"]
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("script", "style"):
            self.words.append(data)

    def said(self):
        return " ".join(" ".join(self.words).split())


def numbers(text):
    """What the scripts of a page draw."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text)
    assert found
    return json.loads(found[1])
