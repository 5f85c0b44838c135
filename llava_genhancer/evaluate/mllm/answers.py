"""Reads the answer in a generated reply: an option's letter, or yes or no; None where the reply gives no answer.

Any model may be asked, so any wording may come back. Named rules are tried in a fixed order (``CHOICE_RULES`` and
``YES_NO_RULES``); the first rule that decides ends the reading. The order is: the options themselves, then the first
answer that the reply commits to (what follows is explanation, unless the reply corrects itself), then refusals, and
last a reply that names one answer only. Tasks count a reply without an answer as wrong and report their number.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cached_property, lru_cache
from typing import NamedTuple

LETTERS = "ABCDEFGH"


def _words(text: str) -> frozenset[str]:
    return frozenset(text.split())


# --- what a reply is made of -----------------------------------------------------------------------------------------
_THOUGHT = "(?:think|thinking|thought|reasoning)"
_REASONING = re.compile(rf"(?is)^.*(?:</|◁/|\[/){_THOUGHT}[>▷\]]|[<◁]{_THOUGHT}[>▷].*$")
_STRUCK = re.compile(r"~~.*?~~|<\|[^|>]*\|>|</?s>|<(?:end|start)_of_turn>")
_MARKED = re.compile(
    r"""(?isx) \\boxed\s*\{ ((?:[^{}]|\{[^{}]*\})*) \}             # LaTeX
    | <(?:answer|conclusion)> (.*?) (?:</(?:answer|conclusion)>|$)  # XML
    | ["'](?:final_?\s?)?(?:answer|choice|option|prediction|response)["'] \s*:\s*  # JSON
      (?: "((?:[^"\\]|\\.)*)" | '([^']*)' | ([^\s,}\]]+) )"""
)
_TEX = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathit|rm)\b\s*|\\[()\[\]]|[${}]")
_EMPHASISED = re.compile(r"(\*\*?|__?|`)\(?([A-Ha-h])\)?\1(?!\w)")  # "**B**" becomes "(B)"
_SIGNS = str.maketrans("’‘“”。、", "''\"\".,")
_BARE = " .,:;!?()[]<>\"'\n\t*_`#"  # around a reply that is an answer and nothing else

# --- how a reply commits itself --------------------------------------------------------------------------------------
_LINK = (
    r"(?:\s*(?:\b(?:is|was|are|ist|es|est|(?:would|should|must|could|might|may|has to|(?:seems|appears) to) be)\b"
    r"|'s\b|é\b|è\b|是|为|為|は|은|lautet\b|[:=→—]|[-=]>))+"
)
_FILLERS = (
    r"(?:[\s:,\"'=>\[-]+|(?:the|my|that|it's|it|is|was|be|here|indeed|most likely|likely|probably|clearly|definitely"
    r"|simply|therefore|actually|really|just|obviously|option|choice|answer|letter|number|opción|die|la|le"
    r"|(?:correct|right|best|final|only|most \w+)(?=\s+(?:answer|option|choice|one|letter)))\b)*"
)
# A strong cue is followed by an answer. After a weak one ("but B shows a cat") the letter must end its clause too.
_CUE = re.compile(
    rf"""(?x) (?<![a-z'-]) (?:
      (?P<strong> (?:answer|option|choice|response|selection|antwort|respuesta|r[ée]ponse|risposta|resposta|ответ
          |答案|选项|正解|回答|答え|정답)
        (?:\s+(?:to|for)\s+(?:the|this|that|your)\s+(?:question|image|problem|picture|puzzle))?
        (?:\s+(?:corre[ct]+[ae]|here))? {_LINK}
      | (?:choose|chose|pick|picked|select|selected|go(?:ing)?\s+with|opt\s+for|elijo|wähle)\b
      | 应?该?选择? | 应该?[是为] )
    | (?P<weak> (?:so|therefore|thus|hence|it's|it\s+is|this\s+is|(?:it|this|that)\s+(?:must|would|should|could
    |might)\s+be
        |think|believe|guess|say|probably|likely|maybe|perhaps|possibly|definitely|clearly|certainly|obviously|surely
        |(?:looks?|seems?|appears?)(?:\s+like|\s+to\s+be)?|(?<!anything\ )but|rather|instead)\b )
    ) {_FILLERS}"""
)
# Every cue in plain letters begins with one of these words.
_MAY_STATE = _words(
    """
    answer answer's option choice response selection antwort respuesta reponse risposta resposta choose chose
    pick picked select selected go going opt elijo so therefore thus hence it's it that this think believe guess
    say probably likely maybe perhaps possibly definitely clearly certainly obviously surely look looks seem
    seems appear appears but rather instead
    """
)
_HEDGE = re.compile("could|might|may|maybe|perhaps|possibly")
_NAMES_ANSWER = re.compile("answer|option|choice")
_FINAL = re.compile(rf"\bfinal\s+(?:answer|choice){_LINK}{_FILLERS}")
_AFFIRMED = (
    r"\s+(?:is|was|seems?|looks?|appears?|would be|must be)\s+(?:to be\s+)?"
    r"(?:(?:the|clearly|more|most|also|indeed|definitely)\s+)*"
    r"(?:correct|right|best|true|accurate|likely|answer|closest|better)\b(?!\s+(?:side|hand))|\s+best\s+\w"
    r"|\s+ist\s+richtig"
)
_PRAISE = re.compile(_AFFIRMED)
_PRAISED = re.compile(rf"\b([A-H])\)?(?i:{_AFFIRMED})", re.ASCII)
_LETTER = re.compile(r"([(\[{<\"' ]*)([A-Ha-h])(?![\w-]|'\w)([)\]}>\"']*)", re.ASCII)
_ORDINAL = re.compile(
    r"(?:the\s+)?(first|second|third|fourth|fifth|last|former|latter)"
    r"(?:(?=\W*$|[.,;:!\n])|\s+(?:one|option|choice|answer)\b)"
)
_PLACE = {"first": 0, "former": 0, "second": 1, "third": 2, "fourth": 3, "fifth": 4, "last": -1, "latter": -1}
_SERIES = re.compile(r"\s*(?:$|[.,\n]|or\b|and\b)")
_LEAD = re.compile(
    r"[\s>•\"'(\[-]*(?:(?:assistant|ai|gpt)\s*:\s*)?(?:(?:the\s+)?(?:correct\s+)?(?:option|choice|answer|选项)\s*)?"
)
_CLAUSE_END = re.compile(
    rf"""(?x) ["')\]]* (?: \s*(?:$|\n) | [)\].:,;!]+(?:\s|$|[^\x00-\x7f]) | \s*[—–(=] | \s+- | \.\. | …
    | \s+(?:because|since|as|due|for|given|not|rather|instead|over|here|if|选项)\b | {_AFFIRMED} | \s*[^\x00-\x7f]
    | (?<=[)\]])\s )"""
)
_NO_ARTICLE = re.compile(
    r"\s+(?:is|was|because|since|as|but|and|or|with|for|the|this|that|it|there|due|given|not|would|could|cannot|can't"
    r"|instead|although|though|whereas|while|when|if|unlike"
    r"|seems|looks|appears|shows|has|does|did|must|best|rather|over|contains|depicts|describes)\b"
)
_REJECTED = re.compile(
    r"""(?x) [)\]"':,?!]*[ ]*(?:\((?![a-h]\))[^)\n]*\)[ ]*)? (?: cannot\b|can't\b|不 |
    (?:is|are|was|does|do|did|could|would|should|has|seems?|looks?|appears?)
    (?: n't | \s+(?:(?:also|clearly|definitely|probably|obviously|simply|the|therefore)\s+)*
      (?:not|incorrect|inaccurate|invalid|wrong|false|untrue|unlikely|less|impossible|out|eliminated|excluded
      |ruled)\b ))"""
)
_BEFORE = re.compile(
    r"(?:\b(?:not|never|if|whether|unless|doubt)\s+|n't\s+|\b(?:initially|at first)\W+)"
    r"(?:(?!(?:but|so|and|because|however)\b)[a-z']+\s+){0,3}$"
)
_JOINED = re.compile(
    r"\s*(?:([,;.|]|\n|-+>|\)?(?=\())|or\b|and\b|nor\b|/|&)\s*(?:(?:or|and|the|option|choice|answer)\s+)*"
)
_CORRECTS = r"""[.,;:!?…\n—(-]\s*(?:(?:oh|hmm+|but|or|well)\W+)?
    (?:(?:wait|actually|correction|scratch\ that|strike\ that|oops|on\ second\ thoughts?|on\ closer\ (?:look|inspection)
      |i\ meant?|let\ me\ (?:correct|reconsider|re-?check|rethink|look\ again)|my\ mistake|i\ was\ wrong|sorry%s)
    (?=\W) (?!\s+(?:for|a|an|the)\b) [\s,.:;!—-]*)+"""
_ONLY_NO = re.compile(r"\W*(?:(?:no|sorry)\W*)+")
_RETRACTED = re.compile(_CORRECTS % "|no", re.VERBOSE)
_RETRACTED_POLAR = re.compile(_CORRECTS % "", re.VERBOSE)  # where "no" is an answer

# --- how a reply refuses ---------------------------------------------------------------------------------------------
_PICTURE = (
    r"(?:the |this |that |your |an?y? |actual |provided |attached |uploaded )*"
    r"(?:image|picture|photo|photograph|figure|screenshot|visual|content)s?"
)
_UNDECIDED = (
    r"(?:cannot|can't|can not|could not|couldn't|unable to|not able to|impossible to|no way to|(?:hard|difficult) to"
    r"|not possible to|(?:insufficient|not enough) information to) (?:\w+ly )?(?:be )?(?:tell|determined?|say|said"
    r"|answer(?:ed)?|confirm(?:ed)?|identif(?:y|ied)|verif(?:y|ied)|decided?|judged?|know|known|inferred|infer|conclude"
    r"|discern|make out|ascertain)|not (?:sure|certain|clear|enough|specified|determinable)|unclear|unknown"
    r"|undetermined"
    r"|indeterminate|unsure|don't know|do not know|no idea|insufficient|hard to tell|it depends|depends on"
)
_REFUSAL = (
    rf"{_UNDECIDED}|unable|impossible|text-based|as an ai|i'm an ai|i am an ai|ai (?:language|assistant|model)"
    rf"|language model"
    r"|(?:won't|refuse to|decline to|prefer not to|rather not) (?:answer|say)|n/a\b|nobody knows|no way\b"
    r"|not (?:able|possible|capable|applicable)|no (?:information|context|access|comment|answer|vision|eyes|ability"
    r"|capability)"
    r"|(?:haven't|have not|hasn't|has not|didn't|did not|wasn't|was not|not been) (?:been )?"
    r"(?:provide|attach|upload|load|include|receive)"
    r"|(?:don't|do not|doesn't|does not|didn't|without|lack)(?: currently| actually)? (?:have|see|receive|possess"
    r"|include)?"
    r" ?(?:the |any |an |access to |ability to |enough |visual |direct )*(?:access|ability|capabilit|vision|eyes"
    r"|information"
    r"|context|capacity|(?:image|picture|photo)s?\b(?! of))"
    r"|(?:cannot|can't|can not|couldn't|could not) (?:\w+ly )?(?:do|assist|help|provide|access|process|analy[sz]e"
    r"|interpret"
    rf"|comply|fulfil|(?:see|view|open|display) (?:{_PICTURE}|it|that|this|what|whether|if|anything|clearly|well|enough"
    r"|from here)\b|(?:see|view)\W*$|\W*$)|no (?:image|photo|picture)s?\b(?! (?:of|frame|on|in))"
    rf"|{_PICTURE} (?:is|was|are|were|has|have)(?:n't| not)(?: been)? (?:visible|provided|available|attached|shown"
    rf"|loaded"
    r"|included|uploaded|clear)|(?:please|kindly|could you) (?:provide|upload|share|attach|describe)"
    r"|too (?:blurry|blurred|dark|small|unclear|far)\b"
)
_ABSENT = "not (?:visible|provided|mentioned|shown|given|stated)"
_REFUSES = re.compile(rf"\b(?:{_REFUSAL})")
# Where options are offered, a plain "cannot" or "not visible" denies all of them; to "is there a dog?" it is a "no".
_REFUSES_ALL = re.compile(
    rf"\b(?:{_REFUSAL}|neither|none\b|sorry|apologi[sz]|cannot|can't|can not|couldn't|could not|{_ABSENT})"
)
# Every refusal has one of these words, which are looked up before the long pattern is tried.
_MAY_REFUSE = _words(
    """
    cannot can't not couldn't unable impossible no hard difficult insufficient unclear unknown undetermined
    indeterminate unsure don't do doesn't didn't depends sorry apologize apologise apologies apologizes ai
    language text neither none without lack isn't n won't refuse decline prefer rather nobody have has did was
    wasn't aren't weren't hasn't haven't please kindly could too
    """
)
_DOUBTS = re.compile(rf"\b(?:{_UNDECIDED}|{_ABSENT})")
_NEGATED = re.compile(
    r"(?:\b(?:anything|all) but|\b(?:not|neither|nor|than|cannot|never|without)|n't)\s+"
    r"(?:(?:the|an?|be|see|option|answer|choice|really|necessarily)\s+)*\(?$"
)
_MARKER = re.compile(r"[(\[\"']*[a-h](?:[)\].:,;]|$|\n)")
_NEXT = re.compile(r"[\s.,;:|/-]*(?:(?:or|and)\s+)?\(?([a-h])[).:]\s*")
_NEXT_WORD = re.compile(r" +\w")
_NAMED = re.compile(r"\(([A-Ha-h])\)|(?<![\w'-])([A-H])(?!\w|['-]\w)")
_LISTED = re.compile(r"(?m)^[\s>•-]*(?:(?:option|choice)\s+)?\(?([a-h])(?:[).:]|\s+-)(?=\s|$)")

# --- yes and no ------------------------------------------------------------------------------------------------------
_YES_NO = tuple(
    (word, answer)
    for answer, words in (
        ("yes", ("yes", "yeah", "yep", "yup", "ja", "oui", "sí", "да", "はい", "是的", "是", "对")),
        ("no", ("no", "nope", "nah", "nein", "non", "нет", "いいえ", "不是", "没有", "否")),
    )
    for word in words
)
_WHOLE = {
    **dict(_YES_NO),
    **dict.fromkeys(("true", "correct", "right", "si", "y", "indeed", "of course", "probably"), "yes"),
    **dict.fromkeys(("absolutely", "definitely", "certainly", "affirmative"), "yes"),
    **dict.fromkeys(("false", "incorrect", "wrong", "negative", "n"), "no"),
}
_CLAUSE_CUT = re.compile(r"(?s).*(?:[.;,\n]|\b(?:but|although|though|however)\b)")
_CLAUSES = re.compile(r"[.;!?\n]+|,?\s+(?:but|while|whereas|although|though|however)\s+|,\s+and\s+")
_DENIES = re.compile(
    r"\b(?:no(?! doubt)|not|none|nothing|nobody|never|cannot|without(?! a doubt)|neither|nor|absent|missing"
    r"|incorrect|false"
    r"|untrue|(?:is|are|was|were|do|does|did|has|have|ca)nt)\b|n't\b"
)
_CLAIMS = re.compile(
    r"\b(?:is|are|was|were|am|be|has|have|had|does|do|did|can|could|will|would|shows?|contains?|includes?|depicts?"
    r"|features?"
    r"|sees?|exists?|appears?|seems?|wears?|covers?|ranges?|made|(?:think|believe) so)\b|'(?:s|re)\b"
)
_PLAIN_WORD = re.compile("[a-z']+")
_WORD = re.compile(r"[^\W_]+(?:\.\d+)?")
_EMPTY_WORDS = _words(
    """
    a an the is are was were am be been being has have had do does did can could will would there here it they
    this that these those i we you he she in on at of to from by with for and or as any some one no not none
    nothing t s re m isnt arent wasnt dont doesnt didnt hasnt cant isn aren wasn weren don doesn didn hasn haven
    couldn wouldn won cannot think believe so probably definitely absolutely certainly really clearly likely
    course image picture photo figure scene visible seen see shown shows show contains contain includes include
    present appears appear exist exists according yes please answer so indeed actually only also
    """
)


_CONJUNCTIONS = frozenset(("so", "therefore", "thus", "hence", "but", "rather", "instead"))


class Reading(NamedTuple):
    """Holds what was read in a reply.

    Attributes:
        answer: a letter, ``"yes"``, ``"no"``, or None.
        rule: the name of the rule that decided; ``"nothing found"`` where none did.
    """

    answer: str | None
    rule: str


def choice(reply: str, options: Sequence[str]) -> str | None:
    """Returns the letter of the option that a reply chooses.

    Args:
        reply: any text.
        options: the options' texts, in the order of their letters; eight at most.

    Returns:
        ``"A"``, ``"B"``, ... or None.
    """
    return read_choice(reply, options).answer


def yes_or_no(reply: str, question: str = "") -> str | None:
    """Returns ``"yes"``, ``"no"`` or None.

    Args:
        reply: any text.
        question: what was asked. A sentence without the word yes or no ("There is a dog", "There isn't") answers only
            a question about the same things; without a question, the first sentence counts.
    """
    return read_yes_or_no(reply, question).answer


def read_choice(reply: str, options: Sequence[str]) -> Reading:
    """Returns the letter that :func:`choice` returns and the name of the rule that decided."""
    offered = _offered(tuple(options))
    bare = reply.strip(_BARE)
    if len(bare) == 1 and (letter := bare.upper()) in offered.letters:
        return Reading(letter, "letter alone")
    same = offered.exact.get(reply.strip()) or offered.whole.get(bare.lower())
    if same and len(same) == 1:
        return Reading(offered.letters[same[0]], "option")
    return _read(_Reply(reply, offered), CHOICE_RULES)


def read_yes_or_no(reply: str, question: str = "") -> Reading:
    """Returns the answer that :func:`yes_or_no` returns and the name of the rule that decided."""
    bare = reply.strip(_BARE).lower()
    if bare in ("yes", "no"):
        return Reading(bare, "option")
    return _read(_Reply(reply, _POLAR, question), YES_NO_RULES)


class _Offered(NamedTuple):
    """Holds the answers that a question offers; ``letters`` is empty for yes and no."""

    texts: Sequence[str]
    letters: str
    exact: dict[str, tuple[int, ...]]  # an option's text: the options that have it
    whole: dict[str, tuple[int, ...]]  # a text without case, emphasis and outer punctuation: the options that have it
    lettered: tuple[re.Pattern[str], ...]  # the texts that hold a letter of their own: "vitamin B"
    forms: tuple[tuple[str, str], ...]  # words by which a sentence names an answer, the longest first
    starts: dict[str, list[tuple[str, str]]]  # the same by their first character


def _by_start(forms: Sequence[tuple[str, str]]) -> dict[str, list[tuple[str, str]]]:
    return {start: [entry for entry in forms if entry[0][0] == start] for start in {form[0] for form, _ in forms}}


_POLAR_FORMS = tuple(sorted(_YES_NO, key=lambda entry: -len(entry[0])))
_POLAR = _Offered((), "", {}, {}, (), _POLAR_FORMS, _by_start(_POLAR_FORMS))


@lru_cache(maxsize=4096)
def _offered(options: tuple[str, ...]) -> _Offered:
    letters = LETTERS[: len(options)]
    plain = [_plain(option) for option in options]
    exact, whole = (
        {own: tuple(i for i, other in enumerate(texts) if other == own) for own in texts if own}
        for texts in ([option.strip() for option in options], plain)
    )
    for own, same in list(whole.items()) if len(whole) == len(plain) else ():
        letter = letters[same[0]].lower()
        whole.update(
            dict.fromkeys((f"{letter}. {own}", f"{letter}) {own}", f"{letter}: {own}", f"{letter} {own}"), same)
        )
    forms = []
    for option, own, letter in zip(options, plain, letters, strict=True):
        forms.append((own if plain.count(own) == 1 else _unmarked(option), letter))
        clause = re.split("[,;:(]", own)[0].strip()  # "neither" of "neither; the samples are alike"
        if sum(clause in other for other in plain) == 1 and clause != own:
            forms.append((clause, letter))
    lettered = tuple(
        re.compile(rf"(?<!\w){re.escape(option)}(?!\w)", re.IGNORECASE)
        for option in options if len(option) > 1 and re.search(rf"\b[{LETTERS}]\b", option)
    )  # fmt: skip
    usable = ((form, letter) for form, letter in forms if form and not (len(form) == 1 and form.isalpha()))
    ordered = tuple(sorted(usable, key=lambda entry: -len(entry[0])))
    return _Offered(options, letters, exact, whole, lettered, ordered, _by_start(ordered))


class _Reply:
    """Holds a prepared reply: its text without reasoning and emphasis, and the answers that were offered."""

    def __init__(self, reply: str, offered: _Offered, question: str = "") -> None:
        self.marked: list[str] = []
        if "<" in reply or "{" in reply or "[/" in reply or "~~" in reply or "◁" in reply:
            reply = _STRUCK.sub("", _REASONING.sub("", reply))
            self.marked = [next(filter(None, groups), "") for groups in _MARKED.findall(reply)]
        self.raw = _TEX.sub("", reply) if "\\" in reply or "$" in reply else reply
        self.text = _lines(self.raw)
        self.low = _lower(self.text)
        self.offered, self.letters, self.forms, self.question = offered, offered.letters, offered.forms, question

    @cached_property
    def words(self) -> set[str]:
        return set(_PLAIN_WORD.findall(self.low))

    @cached_property
    def refuses(self) -> bool:
        pattern = _REFUSES_ALL if self.letters else _REFUSES
        return not _MAY_REFUSE.isdisjoint(self.words) and pattern.search(self.low) is not None

    def token(self, at: int) -> tuple[str, int] | None:
        """Returns the answer (an option's words, an ordinal or a letter) at a place in the text, and where it ends."""
        low = self.low
        while low[at : at + 1] in (" ", '"', "'", "("):
            at += 1
        for start in (at, at + 2) if low.startswith("a ", at) else (at,):
            for form, answer in self.offered.starts.get(low[start : start + 1], ()):
                if low.startswith(form, start) and _ends(low, start + len(form), form):
                    return answer, start + len(form)
        if not self.letters:
            return None
        if (found := _ORDINAL.match(low, at)) and _PLACE[found[1]] < len(self.letters):
            return self.letters[_PLACE[found[1]]], found.end()
        return self._letter(at)

    def _letter(self, at: int) -> tuple[str, int] | None:
        while at and self.text[at - 1] in "([{<":
            at -= 1
        if not (found := _LETTER.match(self.text, at)) or (letter := found[2].upper()) not in self.letters:
            return None
        end = found.end()
        if own := self.own(letter, end):
            return letter, own
        if not found[3] and not set("([{<\"'") & set(found[1]):
            following = self.low[end : end + 2]
            if (
                found[2].islower()
                and not _PRAISE.match(self.low, end)
                and following.lstrip(" ")[:1] not in ("", ".", ",", ";", ":", "!", "\n")
            ):
                return None
            if (
                letter == "A"
                and following[:1] == " "
                and following[1:].isalnum()
                and not _NO_ARTICLE.match(self.low, end)
            ):
                return None
        return letter, end

    def own(self, letter: str, at: int) -> int | None:
        """Returns the end of an option's text that follows the option's letter: ``B. two``."""
        while self.low[at : at + 1] and self.low[at] in " ).:,-\"'(":
            at += 1
        for form, answer in self.forms:
            if answer == letter and self.low.startswith(form, at) and _ends(self.low, at + len(form), form):
                return at + len(form)
        return None

    def commits(self, at: int, *, weak: bool) -> tuple[str, int] | None:
        """Returns the answer at a place, unless the reply rejects that answer or names another one beside it."""
        found = self.token(at)
        if not found or _REJECTED.match(self.low, found[1]):
            return None
        answer, end = found
        if (joined := _JOINED.match(self.low, end)) and (other := self.token(joined.end())) and other[0] != answer:
            # A comma or a full stop joins two answers only where nothing follows the second one.
            apart = joined[1] is not None and not _SERIES.match(self.low, other[1])
            apart = apart or (joined[1] in (".", "\n") and other[1] > joined.end() + 1)
            if not apart and not _REJECTED.match(self.low, other[1]):
                return None
        return None if weak and not _CLAUSE_END.match(self.low, end) else found

    def stated(self, start: int = 0) -> tuple[str, int] | None:
        """Returns the first answer after a cue such as "the answer is", or before a praise such as "is correct"."""
        praised, hedged = None, []
        for found in _PRAISED.finditer(self.text, start) if self.letters else ():
            if found[1] in self.letters and not self.denied(found.start()):
                praised = found
                break
        cues = not self.low.isascii() or not _MAY_STATE.isdisjoint(self.words)
        for found in _CUE.finditer(self.low, start) if cues else ():
            if praised and found.start() > praised.start():
                break
            if (found["weak"] or "") not in _CONJUNCTIONS and self.denied(found.start()):
                continue
            weak = found["weak"] is not None and not _NAMES_ANSWER.search(found[0])
            core, end = found.end(found.lastgroup or 0), found.end()
            committed = self.commits(core, weak=weak)
            if not committed and end > core:
                committed = self.commits(end, weak=weak)
            if committed and _HEDGE.search(found[0]):
                hedged.append(committed)
            elif committed:
                return committed
        if praised:
            return praised[1], praised.end()
        return hedged[0] if len({answer for answer, _ in hedged}) == 1 else None

    def denied(self, at: int) -> bool:
        """Returns whether the words before a place deny what follows or make it a condition."""
        return _BEFORE.search(self.low[max(0, at - 40) : at]) is not None

    def corrected(self, committed: tuple[str, int] | None) -> str | None:
        """Returns the answer that stands after the reply's own corrections: "A... wait, B"."""
        retracted = _RETRACTED if self.letters else _RETRACTED_POLAR
        while committed and (found := retracted.search(self.low, committed[1])):
            cue = _CUE.match(self.low, found.end())
            again = self.commits(found.end(), weak=True) or (cue and self.commits(cue.end(), weak=True))
            if not again and not _ONLY_NO.fullmatch(found[0]):
                again = self.stated(found.end())
            committed = again or (committed[0], found.end())
        return committed and committed[0]

    def lists(self) -> bool:
        """Returns whether lines begin with the letters of several options."""
        if "\n" not in self.low:
            return False
        listed = set()
        for found in _LISTED.finditer(self.low):
            letter = found[1].upper()
            if letter in self.letters and not _REJECTED.match(self.low, self.own(letter, found.end()) or found.end()):
                listed.add(letter)
        return len(listed) > 1


Rule = Callable[[_Reply], str | None]  # an answer, "" for "no answer", None for "the next rule decides"


def _option(reply: _Reply) -> str | None:
    """Reads a reply that is an option and nothing else: as it is, else without case, emphasis and outer punctuation."""
    plain = _edged(reply.low)
    if not reply.letters:
        return _WHOLE.get(plain)
    same = reply.offered.whole.get(plain, ())
    if len(same) == 1:
        return reply.letters[same[0]]
    for form in (str.strip, _folded, _unmarked) if same else ():
        exact = [i for i in same if form(reply.offered.texts[i]) == form(reply.raw)]
        if exact:
            return reply.letters[exact[0]] if len(exact) == 1 else ""
    return "" if same else None


def _marked(reply: _Reply) -> str | None:
    """Reads the last answer in a LaTeX box, an XML tag or a JSON field."""
    answers = [_part(content, reply) for content in reply.marked]
    return next(filter(None, reversed(answers)), None) if answers else None


def _final(reply: _Reply) -> str | None:
    """Reads the last "final answer"."""
    if "final" not in reply.low:
        return None
    found = [reply.commits(m.end(), weak=False) for m in _FINAL.finditer(reply.low)]
    return next((commit[0] for commit in reversed(found) if commit), None)


def _leading(reply: _Reply) -> str | None:
    """Reads an answer that the reply begins with and that ends its clause; a list of the options is no answer."""
    at = _LEAD.match(reply.low).end()  # type: ignore[union-attr]  # matches the empty string too
    committed = reply.commits(at, weak=False)
    if not committed:
        return None
    answer, end = committed
    if not reply.letters:
        return None if _REFUSES.match(reply.low, at) else reply.corrected(committed)
    if (follows := _NEXT.match(reply.low, end)) and (other := follows[1].upper()) != answer:
        own = reply.own(other, follows.end())
        if own and not _REJECTED.match(reply.low, own):
            return None
    if reply.low[end : end + 1] == "?":  # "A? No, B."
        corrected = reply.corrected(committed)
        return None if corrected == answer else corrected
    bare = end == at + 1 and reply.text[end : end + 2].strip().isupper()  # "B The door ..."
    ends = bare or _CLAUSE_END.match(reply.low, end) or _MARKER.match(reply.low, at)
    return reply.corrected(committed) if ends and not reply.lists() else None


def _stated(reply: _Reply) -> str | None:
    """Reads the first answer that a sentence commits to: "the answer is B", "so B", "B is correct"."""
    return reply.corrected(reply.stated())


def _last_line(reply: _Reply) -> str | None:
    """Reads the last of several lines, if that line is an answer and nothing else."""
    if "\n" not in reply.text:
        return None
    first, *_, last = reply.text.split("\n")
    if reply.lists() and _LISTED.match(last.lower()):
        return None
    return None if len(first.strip(_BARE)) == 1 else _part(last, reply)


def _refusing_option(reply: _Reply) -> str | None:
    """Reads a refusal in the words of one option, or any doubt where one option only is a doubt."""
    if not reply.refuses:
        return None
    named = _named(reply, [entry for entry in reply.forms if _REFUSES_ALL.search(entry[0])])
    if not named and _DOUBTS.search(reply.low):
        named = {letter for form, letter in reply.forms if _DOUBTS.search(form)}
    return named.pop() if len(named) == 1 else None


def _before_refusal(reply: _Reply) -> str | None:
    """Reads the clauses before a refusal: "The door is closed; I can't see inside"."""
    refused = (_REFUSES_ALL if reply.letters else _REFUSES).search(reply.low) if reply.refuses else None
    cut = _CLAUSE_CUT.match(reply.low, 0, refused.start()) if refused else None
    if not cut or not (reply.letters or reply.question):
        return None
    before = _Reply(reply.text[: cut.end()], reply.offered, reply.question)
    return (_only_letter(before) or _only_option(before)) if reply.letters else _statement(before)


def _refusal(reply: _Reply) -> str | None:
    """Reads a refusal or a doubt as no answer."""
    return "" if reply.refuses else None


def _only_letter(reply: _Reply) -> str | None:
    """Reads the only letter that is named, negations aside; an A before a noun is an article."""
    text = reply.text
    for option in reply.offered.lettered:
        text = option.sub("", text)
    low, named = _lower(text), set()
    for found in _NAMED.finditer(text):
        letter, before = (found[1] or found[2]).upper(), low[max(0, found.start() - 40) : found.start()]
        noun = found[2] == "A" and _NEXT_WORD.match(low, found.end()) and not _NO_ARTICLE.match(low, found.end())
        if (
            letter in reply.letters
            and not noun
            and not _NEGATED.search(before)
            and not _BEFORE.search(before)
            and not _REJECTED.match(low, found.end())
        ):
            named.add(letter)
    return (named.pop() if len(named) == 1 else "") if named else None


def _only_option(reply: _Reply) -> str | None:
    """Reads the only option whose words are used, negations aside."""
    named = _named(reply, reply.forms)
    return (named.pop() if len(named) == 1 else "") if named else None


def _statement(reply: _Reply) -> str | None:
    """Reads a sentence about what was asked that affirms ("There is a dog") or denies ("There isn't")."""
    asked = _content(reply.question)
    for clause in _CLAUSES.split(reply.low):
        denies = _DENIES.search(clause)
        if denies or _CLAIMS.search(clause):
            told = _content(clause)
            if not asked or _within(told, asked) or _within(asked, told):
                return "no" if denies else "yes"
    return None


CHOICE_RULES: tuple[tuple[str, Rule], ...] = (
    ("option", _option),
    ("marked answer", _marked),
    ("final answer", _final),
    ("leading answer", _leading),
    ("stated answer", _stated),
    ("last line", _last_line),
    ("refusing option", _refusing_option),
    ("before a refusal", _before_refusal),
    ("refusal", _refusal),
    ("only letter named", _only_letter),
    ("only option named", _only_option),
)
YES_NO_RULES: tuple[tuple[str, Rule], ...] = (
    ("option", _option),
    ("marked answer", _marked),
    ("final answer", _final),
    ("leading answer", _leading),
    ("stated answer", _stated),
    ("last line", _last_line),
    ("before a refusal", _before_refusal),
    ("refusal", _refusal),
    ("only option named", _only_option),
    ("statement", _statement),
)


def _read(reply: _Reply, rules: Sequence[tuple[str, Rule]]) -> Reading:
    if not reply.low:
        return Reading(None, "empty")
    for name, rule in rules:
        answer = rule(reply)
        if answer is not None:
            return Reading(answer or None, name)
    return Reading(None, "nothing found")


def _part(content: str, reply: _Reply) -> str | None:
    """Returns the answer that a part of a reply is, without a sentence around it."""
    bare = content.strip(_BARE).upper()
    if len(bare) == 1 and bare in reply.letters:
        return bare
    part = _Reply(content, reply.offered)
    return _option(part) or (_leading(part) if reply.letters and part.low else None)


def _lines(text: str) -> str:
    """Returns the text without emphasis and with single spaces; lines stay apart."""
    if not text.isascii():
        text = unicodedata.normalize("NFKC", text).translate(_SIGNS)
    if "*" in text or "_" in text or "`" in text:
        text = _EMPHASISED.sub(r"(\2)", text)
    for sign in "*_`#":
        if sign in text:
            text = text.replace(sign, "")
    if "\n" not in text:
        return " ".join(text.split())
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.split("\n"))))


def _lower(text: str) -> str:
    """Returns the text in lower case, with every character in its place."""
    low = text.lower()
    return low if len(low) == len(text) else "".join(c.lower() if len(c.lower()) == 1 else c for c in text)


def _folded(text: str) -> str:
    return " ".join(text.split()).casefold()


def _unmarked(text: str) -> str:
    return _folded(_lines(text)).strip(" .\"'")


def _plain(text: str) -> str:
    return _edged(_lower(_lines(text)))


def _edged(low: str) -> str:
    low = low.replace("\n", " ")
    return low.strip(" .,:;!?()[]\"'") or low


def _ends(low: str, end: int, form: str) -> bool:
    """Returns whether a word ends at a place: "open" in "open." but not in "opened", "3" in "3." but not in "3.5"."""
    if end >= len(low) or not form[-1].isalnum():
        return True
    sign, following = low[end], low[end + 1 : end + 2]
    if sign.isalnum():
        return not sign.isascii() and form[-1].isascii()
    if sign in ".,:/":
        return not (following.isdigit() and form[-1].isdigit())
    return sign not in "-'" or not following.isalnum()


def _named(reply: _Reply, forms: Sequence[tuple[str, str]]) -> set[str]:
    """Returns the answers whose words a reply uses without negation; a longer form hides the shorter ones inside it."""
    named: set[str] = set()
    taken: list[tuple[int, int]] = []
    low = reply.low
    for form, answer in forms:
        at = low.find(form)
        while at >= 0:
            end = at + len(form)
            whole = (at == 0 or not low[at - 1].isalnum()) and _ends(low, end, form)
            if whole and not any(start <= at and end <= stop for start, stop in taken):
                taken.append((at, end))
                # "no" before a noun ("no dog") is read with its sentence, by the statement rule.
                noun = form == "no" and _NEXT_WORD.match(low, end)
                if not noun and not _NEGATED.search(low[max(0, at - 40) : at]) and not _REJECTED.match(low, end):
                    named.add(answer)
            at = low.find(form, end)
    return named


def _content(text: str) -> set[str]:
    return set(_WORD.findall(text.lower())) - _EMPTY_WORDS


def _within(words: set[str], others: set[str]) -> bool:
    """Returns whether all words are among the others, endings aside ("dogs" and "dog")."""
    stems = {stem for other in others for stem in _stems(other)}
    return all(not stems.isdisjoint(_stems(word)) for word in words)


def _stems(word: str) -> set[str]:
    return {word, *(word.removesuffix(ending) for ending in ("s", "es", "ed", "ing") if len(word) > len(ending) + 2)}
