"""A strict reader of the HTML pages that vit_jax writes."""

import html.parser
import itertools
import re

VOID = {"br", "img", "link", "meta", "wbr"}
ALLOWED_IN = {"tr": {"thead", "tbody"}, "td": {"tr"}, "th": {"tr"}, "li": {"ul"}, "dt": {"div"}, "dd": {"div"}}


class Page(html.parser.HTMLParser):
    """The content of a page; anything that is not valid, or that needs more than the file itself, is an error.

    Attributes:
        tables: by their accessible name, rows of cells as text.
        headings: (level, text) in their order.
        ids: of all elements.
        images: (alternative text, source) of each.
        tooltips: the text of every <title> within a drawing.
        text: all text of the body.
    """

    def __init__(self, text: str):
        """Reads and checks a page."""
        super().__init__(convert_charrefs=True)
        self.tables, self.headings, self.ids, self.images, self.tooltips, self.text = {}, [], [], [], [], ""
        self._open, self._wanted, self._box = [], [], None
        assert text.startswith("<!DOCTYPE html>\n<html lang=")
        self.feed(text)
        self.close()
        assert not self._open, f"not closed: {self._open}"
        assert len(self.ids) == len(set(self.ids)), "ids are not unique"
        assert set(self._wanted) <= set(self.ids), set(self._wanted) - set(self.ids)
        levels = [level for level, _ in self.headings]
        assert levels[0] == 1 and levels.count(1) == 1
        assert all(after <= before + 1 for before, after in itertools.pairwise(levels)), levels
        for name, rows in self.tables.items():
            assert len({len(row) for row in rows}) == 1, f"rows of {name} have different lengths"

    def handle_starttag(self, tag, attrs):
        attributes = dict(attrs)
        assert len(attributes) == len(attrs), f"an attribute of {tag} is there twice"
        assert tag not in ("script", "iframe", "object", "embed", "base", "form"), tag
        parent = self._open[-1] if self._open else None
        assert parent in ALLOWED_IN.get(tag, {parent}), f"{tag} in {parent}"
        assert parent != "p" or tag not in ("p", "div", "ul", "table", "figure", "pre", "h2", "h3"), f"{tag} in p"
        for name, value in attributes.items():
            assert not name.startswith("on"), name
            if name in ("src", "href"):
                assert value.startswith(("data:image/", "data:,", "#")) or re.fullmatch(
                    r"[\w./%+-]+report\.html", value
                )
                self._wanted += [value[1:]] if value.startswith("#") else []
            self._wanted += [value] if name == "aria-labelledby" else []
            self.ids += [value] if name == "id" else []
            assert name != "style" or re.fullmatch(r"--share:[\d.]+%", value), value
        if tag == "img":
            assert attributes["alt"] and attributes["width"] and attributes["height"]
            self.images.append((attributes["alt"], attributes["src"]))
        if attributes.get("class") == "scroll":
            assert attributes["tabindex"] == "0"
            self._box = attributes["aria-label"]
            assert self._box not in self.tables, self._box
        elif tag == "tr":
            self.tables.setdefault(self._box, []).append([])
        elif tag in ("td", "th"):
            assert tag == "td" or attributes["scope"] in ("row", "col")
            self.tables[self._box][-1].append("")
        elif tag in ("h1", "h2", "h3", "h4"):
            self.headings.append((int(tag[1]), ""))
        elif tag == "title" and "svg" in self._open:
            self.tooltips.append("")
        if tag not in VOID:
            self._open.append(tag)

    def handle_endtag(self, tag):
        assert self._open and self._open.pop() == tag, f"</{tag}> closes nothing"

    def handle_data(self, data):
        if "style" in self._open:
            assert "url(" not in data and "@import" not in data
        elif "svg" in self._open:
            self._add(self.tooltips, data)
        elif "body" in self._open:
            self.text += data
            if {"td", "th"} & {*self._open}:
                self._add(self.tables[self._box][-1], data)
            elif {"h1", "h2", "h3", "h4"} & {*self._open}:
                self.headings[-1] = (self.headings[-1][0], self.headings[-1][1] + data)

    def _add(self, found, data):
        if "svg" not in self._open or self._open[-1] == "title":
            found[-1] += data

    def column(self, table, title):
        """The cells of a column of a table."""
        header, *rows = self.tables[table]
        return [row[header.index(title)] for row in rows]
