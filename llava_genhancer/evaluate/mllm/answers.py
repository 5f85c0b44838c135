"""What a reply in free words answers: an option's letter, or yes or no; None where it does not say.

Any model may be asked, so any wording may come back. What a reply states beats what it mentions; a refusal, or two
answers at once, is no answer. Tasks count those as wrong and report how many there were.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

LETTERS = "ABCDEFGH"

_QUOTES = str.maketrans("’‘“”*_`", "''\"\"   ")
_STATING = (
    r"\b(?i:(?:final |correct |right |best )?(?:answer|option|choice)|therefore|thus|hence|so|choose|pick|select)\b"
    r"(?i:\s+(?:(?:is|would|should|must|be|it|i|the|correct|right|final|best|answer|option|choice|choose|pick)\b|it's))*"
    r"\s*[:,]?\s*"
)
_NEGATED = r"(?i:\b(?:not|neither|nor|than)|n't)\s+(?i:(?:the|an?|option|answer|choice)\s+)*\(?$"
_REFUSAL = re.compile(
    r"\b(?:cannot|can't|can not|couldn't|could not|unable|unsure|unclear|unknown|impossible|sorry|apologi[sz]e"
    r"|don't know|do not know|neither|none of|hard to (?:tell|say)|depends"
    r"|not (?:sure|clear|possible|certain|able|enough|visible|specified|provided)|no (?:way|information|image))\b"
)


def choice(reply: str, options: Sequence[str]) -> str | None:
    """The letter of the option that a reply chooses.

    Args:
        reply: any text.
        options: the options' texts, in the order of their letters; eight at most.

    Returns:
        ``"A"``, ``"B"``, ... or None.
    """
    text = " ".join(reply.translate(_QUOTES).split())
    letters = LETTERS[: len(options)]
    if (bare := text.strip(" .,:;!?()[]\"'").upper()) and bare in letters and len(bare) == 1:
        return bare
    plain = [_plain(option) for option in options]
    if plain.count(_plain(text)) == 1:
        return letters[plain.index(_plain(text))]
    upper, both = _upper(letters), letters + letters.lower()
    stated = re.findall(
        rf"{_STATING}(?:\(([{both}])\)|({upper})|([{letters.lower()}])(?=[.,;:!]|$))(?!\s*(?:or|and|/)\s*\(?[{both}]\b)",
        _without(text, options),
    )
    if stated:
        return "".join(stated[-1]).upper()
    listed = {a.upper() for a in re.findall(rf"(?:^|\s)\(?([{both}])[).:](?=\s|$)", text)}
    if first := re.match(rf"\(?([{both}])(?:[).:,](?=\s|$))|\(([{both}])\)|([{letters[1:].lower()}])(?=\s)", text):
        return "".join(filter(None, first.groups())).upper() if len(listed) < 2 else None
    mentioned = {
        "".join(filter(None, m.groups())).upper()
        for m in re.finditer(rf"\(([{both}])\)|({upper})", _without(text, options))
        if not re.search(_NEGATED, m.string[: m.start()])
    }
    if mentioned:
        return mentioned.pop() if len(mentioned) == 1 else None
    return _by_text(_plain(text), plain, letters)


def yes_or_no(reply: str) -> str | None:
    """``"yes"``, ``"no"`` or None. A sentence without either word counts as no where it denies: "There isn't"."""
    text = " ".join(reply.translate(_QUOTES).lower().split())
    words = re.findall(r"[a-z']+", text)
    if re.search(r"\byes (?:and|or) no\b", text):
        return None
    if words and words[0] in ("yes", "no") and not _REFUSAL.match(text.lstrip("\"'(.")):
        return words[0]
    stated = re.findall(r"\banswer(?: is|:)? \W*(yes|no)\b", text)
    if stated:
        return str(stated[-1])
    if _REFUSAL.search(text):
        return None
    if "yes" in words:
        return None if "no" in words else "yes"
    return "no" if any(w in ("no", "not") or w.endswith("n't") for w in words) else None


def _plain(text: str) -> str:
    return " ".join(text.translate(_QUOTES).lower().split()).strip(" .,:;!?()[]\"'")


def _upper(letters: str) -> str:
    """A capital that stands alone; an A before a lower-case word is an article, unless a verb or the like follows."""
    article = r"A(?!\s+(?!(?:is|because|since|as|but|and|or|with|for)\b)[a-z])"
    return rf"(?<![\w'-])(?:[{letters[1:]}]|{article})(?![\w']|-\w)"


def _without(text: str, options: Sequence[str]) -> str:
    """The reply without options' texts that hold such a capital themselves ("vitamin B")."""
    for option in options:
        if len(option) > 1 and re.search(rf"\b[{LETTERS}]\b", option):
            text = re.sub(rf"(?<!\w){re.escape(option)}(?!\w)", "", text, flags=re.IGNORECASE)
    return text


def _by_text(text: str, options: Sequence[str], letters: str) -> str | None:
    """The letter of the one option whose words the reply uses."""
    if _REFUSAL.search(text):
        return None
    used = []
    for letter, option in zip(letters, options, strict=True):
        places = re.finditer(rf"(?<!\w){re.escape(option)}(?!\w)", text) if option else ()
        if any(not re.search(_NEGATED, text[: m.start()]) for m in places):
            used.append((letter, option))
    used = [(x, option) for x, option in used if not any(option != o and option in o for _, o in used)]
    return used[0][0] if len(used) == 1 else None
