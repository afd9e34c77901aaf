"""HTML elements, of which all text is escaped, and the page around them."""

import html
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

from vit_jax.data import listing

VOID = {"br", "img", "link", "meta"}  # elements without an end tag


class Html(str):
    """Text that is HTML already, and is not escaped again."""


def escape(content: object) -> Html:
    """Returns text as HTML; control characters and bytes that are no UTF-8 are shown as escape sequences."""
    if isinstance(content, Html):
        return content
    lines = map(listing.printable, str(content).split("\n"))
    return Html(html.escape("\n".join(lines)))


def element(tag: str, *children: object, **attributes: object) -> Html:
    """Returns an element; children and attributes are escaped unless they are `Html`.

    Args:
        tag: its name.
        *children: text or elements; None is left out.
        **attributes: `class_` is the attribute class, `aria_label` is aria-label; without a value if True, left out if
            None or False.
    """
    parts = [tag]
    for name, value in attributes.items():
        name = name.removesuffix("_").replace("_", "-")
        if value is not None and value is not False:
            parts.append(name if value is True else f'{name}="{escape(value)}"')
    opening = f"<{' '.join(parts)}>"
    return Html(opening) if tag in VOID else Html(f"{opening}{join(children)}</{tag}>")


def join(children: Iterable[object]) -> Html:
    """Returns the children in a row, each escaped unless it is `Html`; None is left out."""
    return Html("".join(escape(child) for child in children if child is not None))


def table(
    label: str, header: Sequence[object], rows: Iterable[Sequence[object]], text: Collection[int] = (), title: str = ""
) -> Html:
    """Returns a table in a box that scrolls sideways; the first cell of a row is its heading.

    Args:
        label: names the box for screen readers.
        header: titles of the columns.
        rows: cells, as many as titles; None is an empty cell.
        text: indices of columns of text besides the first; the others are numbers, which are aligned to the right.
        title: above the table, if it is shown.
    """

    def cell(tag: str, index: int, content: object, **more: object) -> Html:
        return element(tag, content, class_=None if index == 0 or index in text else "number", **more)

    head = (cell("th", index, title, scope="col") for index, title in enumerate(header))
    body = (
        element("tr", *(cell("td" if i else "th", i, one, scope=None if i else "row") for i, one in enumerate(row)))
        for row in rows
    )
    above = element("caption", title) if title else None
    return scrolling(label, element("table", above, element("thead", element("tr", *head)), element("tbody", *body)))


def scrolling(label: str, content: Html) -> Html:
    """Returns a box that scrolls sideways, also by keyboard, if its content is wider than the page."""
    return element("div", content, class_="scroll", role="group", aria_label=label, tabindex="0")


def details(summary: object, *content: object) -> Html:
    """Returns content that is shown when its summary is clicked."""
    return element("details", element("summary", summary), *content)


def values(of: str, content: Html) -> Html:
    """Returns the values of a chart, which are shown when 'Values' is clicked; screen readers also read `of`."""
    return details(join(["Values", element("span", f" of {of}", class_="hidden")]), content)


def section(name: str, title: str, *content: object) -> Html:
    """Returns a section of the page, whose address is #name."""
    heading = element("h2", title, id=f"{name}-title")
    return element("section", heading, *content, id=name, aria_labelledby=f"{name}-title")


def page(title: str, header: Html, sections: Sequence[tuple[str, str, Html]], footer: str) -> str:
    """Returns the whole document, which needs neither scripts nor other files.

    Args:
        title: of the window.
        header: above the table of contents.
        sections: name, title and content (`section`) of each.
        footer: the last line.
    """
    links = (element("li", element("a", heading, href=f"#{name}")) for name, heading, _ in sections)
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="color-scheme", content="light dark"),
        element("title", title),
        element("link", rel="icon", href="data:,"),  # else browsers ask a server for one
        element("style", Html(Path(__file__).with_name("page.css").read_text())),
    )
    body = element(
        "body",
        element("a", "Skip to the content", href="#content", class_="skip"),
        element("header", header),
        element("nav", element("ul", *links), aria_label="Sections"),
        element("main", *(content for *_, content in sections), id="content", tabindex="-1"),
        element("footer", footer),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"
