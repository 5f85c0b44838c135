"""Reads the answer in a generated reply: an option's letter, or yes or no; None where the reply gives no answer.

Step 1 finds the answers that the reply names. The text is cleaned (no reasoning in tags, no Markdown, no LaTeX), and
every answer in it becomes a mark: with the options "Open" and "Closed", "The answer is **B**. Open is wrong." becomes
"the answer is ⑵. ① is wrong." From the words around a mark follows whether the reply rejects that answer ("① is
wrong"), introduces it by a cue ("the answer is ②"), or names another one beside it ("① or ②").

Step 2 tries the rules of ``CHOICE_RULES`` or ``YES_NO_RULES`` in their order; the first rule that decides ends the
reading. Options themselves come first, then the first answer that the reply commits to (what follows is explanation,
unless the reply corrects itself), then refusals, and last a reply that names one answer only.

Tasks count a reply without an answer as wrong and report their number.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import lru_cache
from typing import NamedTuple

LETTERS = "ABCDEFGH"
_MARKS = "①②③④⑤⑥⑦⑧⑴⑵⑶⑷⑸⑹⑺⑻"  # answers named by words, then by letters; NFKC leaves none in the reply itself


def _any(words: str) -> str:
    """Returns a pattern for any of the phrases, which stand between commas or line ends."""
    return "(?:" + "|".join(phrase.strip() for phrase in re.split("[,\n]", words) if phrase.strip()) + ")"


# --- vocabulary: phrases between commas -------------------------------------------------------------------------------
_YES = "yes, yeah, yep, yup, ja, oui, sí, да, evet, tak, affirmative, はい, 是的, 是, 对, 有, 예, 네, हाँ, हां, نعم"
_NO = "no, nope, nah, nein, non, não, нет, hayır, hayir, いいえ, 不是, 没有, 否, 不, 아니요, 아니오, नहीं, لا"
_ALONE_YES = "true, correct, right, si, sim, y, indeed, of course, probably, absolutely, definitely, certainly"
_ALONE_NO = "false, incorrect, wrong, negative, nie, n"
_NONE = "none of these, none of them, none of the above, none of the options"
_PLACES = {"first": 0, "former": 0, "second": 1, "latter": 1, "third": 2, "fourth": 3, "fifth": 4, "last": -1}

# A cue: "The answer to the question is most likely B" has a noun, a link and fillers; "I choose B" has a verb.
_NOUNS = _any("""answer, option, choice, response, selection, antwort, respuesta, r[ée]ponse, risposta, resposta,
    ответ, 答案, 选项, 正解, 回答, 答え, 정답""")
_NOUN_ENDS = _any("(?:to|for) (?:the|this|that|your) \\w+, correct, correcta, corretta, correcte, here")
_LINKS = _any("""is, was, are, ist, es, est, é, è, lautet, (?:would|should|must|could|might|may|has to) be,
    (?:seems|appears) to be""")
_LINK_SIGNS = "[:=→—>]|'s|-+>|是|为|為|は|은"
_CHOOSING = _any("choose, chose, pick, picked, select, selected, go with, going with, opt for, elijo, wähle")
_CHOOSING_CJK = "应?该?选择?|应该?[是为]|(?<!^ )✓(?= )"
_FILLERS = _any("""the, my, that, it's, it, is, was, be, here, indeed, most, likely, probably, clearly, definitely,
    simply, therefore, actually, really, just, obviously, option, choice, answer, letter, number, opción, die, la, le,
    a, an, correct, right, best, final, only, accurate, appropriate, suitable, plausible""")
# After a weak cue an answer counts where its clause ends with it: "so B." but not "so B shows a cat".
_CONCLUDING = _any("so, therefore, thus, hence, but, rather, instead")
_BELIEVING = _any("""it's, it is, this is, (?:it|this|that) (?:must|would|should|could|might|may) be, think,
    believe, guess, say, probably, likely, maybe, perhaps, possibly, definitely, clearly, certainly, obviously, surely,
    not sure\\W, (?:looks?|seems?|appears?)(?: like| to be)?""")
_HEDGED = re.compile(_any("could, might, may, maybe, perhaps, possibly"))
_CORRECTING = _any("""wait, actually, correction, scratch that, strike that, oops, on second thoughts?, i meant?,
    on closer (?:look|inspection), let me (?:correct|reconsider|re-?check|rethink|look again), my mistake, i was wrong,
    (?:no|sorry)(?=\\s?[^\\w\\s])""")
# What stands around an answer that the reply praises or rejects: "A is correct", "not A", "A does not match".
_PRAISING = _any("correct, right, best, true, accurate, likely, answer, closest, better, richtig")
_REJECTING = _any("""not, incorrect, inaccurate, invalid, wrong, false, untrue, unlikely, less, impossible, out,
    eliminated, excluded, ruled""")
_BEING = _any("is, are, was, were, does, do, did, could, would, should, has, seems?, looks?, appears?, must, ist")
_ADVERBS = _any("""the, to, be, clearly, more, most, also, indeed, definitely, probably, obviously, simply,
    therefore""")
_NEGATING = _any("""not, never, if, whether, unless, i doubt, initially, at first, than, without, unlike, neither,
    nor, cannot, anything but, all but, \\w+n't, 不是, 并非, 不选, (?<!^ )✗(?= ),
    (?:^|(?<=\\n)|(?<=[.!?] ))(?:although|though|even though|while|despite)""")
_TURNING = _any("but, so, and, because, however, although, though")
# Words that follow an answer. An A before any other word is an article; a "no" before any other word denies a noun.
_REASONS = "because, since, as, due, for, given, not, rather, instead, over, here, if, the, this, there, it, i"
_FOLLOWING = _any(f"""{_REASONS}, is, was, but, and, or, with, that, they, we, would, could, cannot, can't, whereas,
    while, although, though, when, unlike, seems, looks, appears, shows, has, does, did, must, best, contains, depicts,
    describes, isn't, doesn't""")

# Refusals and doubts.
_CANNOT = _any("cannot, can't, can not, could not, couldn't")
_HARDLY = _any("""(?:unable|not able|impossible|not possible|no way|hard|difficult) to,
    (?:insufficient|not enough) information to""")
_DECIDE = _any(r"""tell, determine\w*, say, said, answer\w*, confirm\w*, identif\w+, verif\w+, decide\w*, judge\w*,
    know\w*, infer\w*, conclude, discern, make out, ascertain""")
_UNKNOWN = _any("""not (?:sure|certain|clear|enough|specified|determinable), unclear, unknown, undetermined,
    indeterminate, unsure, (?:don't|do not) know, no idea, insufficient, it depends, depends on""")
_UNSEEN = _any("not (?:visible|provided|mentioned|shown|given|stated)")
_NO_HELP = _any(r"""unable, impossible, text-based, (?:as|i'm|i am) an ai, ai (?:language|assistant|model),
    language model, (?:won't|refuse to|decline to|prefer not to|rather not) (?:answer|say), n/a, nobody knows, no way,
    not (?:able|possible|capable|applicable), no (?:information|context|access|comment|answer|vision|eyes|ability),
    no (?:image|photo|picture)s?(?! (?:of|frame|on|in)\b), too (?:blurry|blurred|dark|small|unclear|far),
    (?:please|kindly|could you) (?:provide|upload|share|attach|describe)""")
_HELP = _any(r"do, assist, help, provide, access, process, analy[sz]e, interpret, comply, fulfil, (?:see|view)(?=\W*$)")
_LACKING = _any("don't, do not, doesn't, does not, didn't, did not, without, lack")
_HAVING = _any("currently, actually, have, see, receive, provide, include, the, any, an, access to, enough, visual")
_LACKED = _any(r"""access, ability, capabilit\w+, vision, eyes, information, context, capacity,
    (?:image|picture|photo)s?(?! of)""")
_PICTURE = _any(
    "(?:(?:the|this|that|your|an?|any) )?(?:(?:actual|provided|attached) )?(?:image|picture|photo|photograph)s?"
)
_NOT_YET = _any("haven't, have not, hasn't, has not, didn't, did not, wasn't, was not, not been")
_SENT = _any("provided?, attach(?:ed)?, upload(?:ed)?, load(?:ed)?, included?, received?")
_AT_ALL = _any("it, that, this, what, whether, if, anything, clearly, well, enough, from here")

# Sentences: "There is a dog", "There isn't". The empty words aside, they must be about the same things as the question.
_DENYING = _any("""no(?! doubt), not, none, nothing, nobody, never, cannot, without(?! a doubt), neither, nor,
    absent, missing, incorrect, false, untrue, (?:is|are|was|were|do|does|did|has|have|ca)nt, \\w+n't""")
_CLAIMING = _any("""is, are, was, were, am, be, has, have, had, does, do, did, can, could, will, would, shows?,
    contains?, includes?, depicts?, features?, sees?, exists?, appears?, seems?, wears?, covers?, ranges?, made,
    (?:think|believe) so""")
_EMPTY = _any("""a, an, the, there, here, it, they, this, that, these, those, i, we, you, he, she, in, on, at, of,
    to, from, by, with, for, and, or, as, any, some, one, no, been, being, think, believe, so, probably, definitely,
    absolutely, certainly, really, clearly, likely, course, image, picture, photo, figure, scene, visible, seen, shown,
    present, according, yes, please, answer, indeed, actually, only, also, correct, true""")

# --- patterns on a reply as it came -----------------------------------------------------------------------------------
_SIMPLE = re.compile(r"[A-Za-z0-9 .,;!?()'/-]*")  # nothing to clean
_THOUGHT = "(?:think|thinking|thought|reasoning)"
_REASONING = re.compile(rf"(?is)^.*(?:</|◁/|\[/){_THOUGHT}[>▷\]]|[<◁]{_THOUGHT}[>▷].*$")
_NEXT_TURN = re.compile(r"(?is)(?<=\S)\s*(?:(?:###|\n)\s*(?:human|user):|(?:<\|im_start\|>|<start_of_turn>)user\b).*")
_PROMPT = re.compile(r"(?is)^.*\bassistant:")
_STRUCK = re.compile(r"~~.*?~~|<\|[^|>]*\|>|</?s>|<(?:end|start)_of_turn>")
_BOXED = re.compile(
    r"""(?isx) \\f?box(?:ed)?\s*\{ ((?:[^{}]|\{[^{}]*\})*) \}         # LaTeX
    | <(?:answer|conclusion)> (.*?) (?:</(?:answer|conclusion)>|$)  # XML
    | ["'](?:final_?\s?)?(?:answer|choice|option|prediction|response)["'] \s*:\s*  # JSON
      (?: "((?:[^"\\]|\\.)*)" | '([^']*)' | ([^\s,}\]]+) )"""
)
_TEX = re.compile(r"\\(?:text|textbf|mathrm|mathbf|mathit|rm)\b\s*|\\[()\[\]]|[${}]")
_BOLD_LETTER = re.compile(r"(\*\*?|__?|`)\(?([A-Ha-h])\)?\1(?!\w)")
_SIGNS = str.maketrans("’‘“”。、✔✅☑✘❌☐", "''\"\".,✓✓✓✗✗✗", "*_`#\ufe0f")
_CJK_EDGE = re.compile("(?<=[\u3000-\u9fff\uac00-\ud7af])(?=[!-~])|(?<=[!-~])(?=[\u3000-\u9fff\uac00-\ud7af])")
_LABEL = re.compile(f"(?<!\\w)A:(?= ?(?:[B-Hb-h](?!\\w)|[{_MARKS[1:8]}]))")  # "A: Closed": an A for "answer"
_BARE = " .,:;!?()[]<>\"'\n\t*_`#"  # around a reply that is an answer and nothing else

# --- patterns on a text with marks ------------------------------------------------------------------------------------
_LETTER = re.compile(  # "B", "(b)", "B. ②", "the second option", "the second", "option 2"
    r"""(?<!\w)(?:(?<!\w['-])(?<!n/)[(\["'{<]{0,3}([a-h])(?![\w-]|'\w)(?!["']?\s*[:=]\s*[01]?\.\d)([)\]"'}>]{0,3})"""
    rf"(\W{{1,5}}[{_MARKS}])?|(the )?({'|'.join(_PLACES)})"
    r"(?: (?:one|option|choice|answer)\b|(?(4)(?=\W*$|[.;!\n])|(?!)))|(?:option|choice|answer) ([1-8])(?!\w|\.\d))",
    re.IGNORECASE,
)
_ARTICLE = re.compile(rf" (?!{_FOLLOWING}\b)[a-zà-ÿ{_MARKS}]", re.IGNORECASE)
_SPLIT = re.compile(f"([{_MARKS}])")
_NOISE = re.compile(rf" ?\([^(){_MARKS}]*\)|[()\[\]{{}}<>\"]|(?<!\w)'|'(?!\w)")  # remarks in brackets, and quotes
_FILL = rf"(?:[\s:,=>-]|{_FILLERS}\b)*"
_STATING = rf"{_NOUNS}(?: {_NOUN_ENDS})?(?:(?:\s*(?:{_LINKS}\b|{_LINK_SIGNS}))+|\n)|{_CHOOSING}\b|{_CHOOSING_CJK}"
_BEFORE = re.compile(
    rf"(?<![a-z'-])(?:(?P<denied>{_NEGATING}(?: (?!{_TURNING}\b)[a-z']+){{0,3}}\s)|{_CONCLUDING}\b{_FILL})?"
    rf"(?P<weak>(?:{_BELIEVING}|{_CORRECTING}[.!…]*)(?!\w){_FILL}|^\s*[:?]\s*)?"
    rf"(?P<stated>(?P<final>final )?(?:{_STATING}){_FILL})?$"
)
_VERDICT = r" ?[–—:=-]+ ?(?:this is |it is )?"  # "A. Open - incorrect."
_PRAISE = rf"\s(?:is|was|seems?|looks?|appears?|would|must|ist) (?:{_ADVERBS} )*{_PRAISING}\b(?! side| hand)|\sbest\s\w"
_PRAISED = re.compile(rf"{_PRAISE}| ?✓|{_VERDICT}(?:✓|(?:correct|right|true)\b(?! side| hand))")
_REJECTED = re.compile(
    rf"[\s:,]*(?:cannot\b|can't\b|(?:选项)?[不错]|ではな|[가이] 아니|{_BEING}(?:n't|\s(?:{_ADVERBS}\s)*{_REJECTING})\b)"
    rf"| ?✗|{_VERDICT}(?:✗|(?:not |in)(?:correct|accurate|visible|present|shown)|wrong|false|no(?=\s*(?:[.,;\n]|$)))"
)
_ENDS = re.compile(rf"\s*(?:$|[.,:;!…\n—–=]|[^\x00-\x7f])|\s-|\s{_any(_REASONS)}\b|{_PRAISE}")
_JOIN = re.compile(r"[\s,;.|&>-]*(?:(?P<word>/|n?or\b|and\b)[\s,;.]*)?(?:(?:or|the|option|choice|answer)\b[\s,;.]*)*")
_SERIES = re.compile(r"\s*(?:$|[.,\n]|or\b|and\b)")
_LEAD = r"[\s>•,-]*(?:(?:the|a|an|correct|option|choice|answer|assistant|ai|gpt|选项)\b[\s:,]*)*$"
_LEADS = re.compile(_LEAD)
_LAST_LINE = re.compile(rf"(?s)\w.*\n{_LEAD}")
_MARKER = re.compile(r"[(\[]?[A-Ha-h][)\].:]")
_LINE = re.compile(r"(?:^|\n)[\s>•-]*(?:(?:option|choice)\s)?$")
_CORRECTS = re.compile(rf"[^\w\s]\s*(?:(?:oh|hmm+|but|or|well|no)\W+)?{_CORRECTING}(?!\w| (?:for|a|an|the)\b)")
_DOUBT = rf"{_UNKNOWN}|(?:{_CANNOT}|{_HARDLY})(?: \w+ly)?(?: be)? {_DECIDE}"
_DOUBTS = re.compile(rf"\b(?:{_DOUBT}|{_UNSEEN})\b")
_REFUSAL = (
    rf"{_DOUBT}|{_NO_HELP}|{_NOT_YET}(?: been)? {_SENT}|{_LACKING}(?: {_HAVING})* {_LACKED}"
    rf"|{_CANNOT}(?: \w+ly)? (?:{_HELP}|(?:see|view|open|display) (?:{_PICTURE}|{_AT_ALL}))"
    rf"|{_PICTURE} (?:is|was|are|were|has|have)(?:n't| not)(?: been)? (?:{_SENT}|visible|available|shown|clear)"
)
_REFUSES = re.compile(rf"\b(?:{_REFUSAL})\b")
# Where options are offered, a plain "cannot" or "not visible" denies all of them; to "is there a dog?" it is a "no".
_REFUSES_ALL = re.compile(rf"\b(?:{_REFUSAL}|{_CANNOT}|{_UNSEEN}|neither|none|sorry|apologi[sz]\w*)\b")
_CLAUSE_CUT = re.compile(r"(?s).*(?:[.;,\n]|\b(?:but|although|though|however)\b)")
_CLAUSES = re.compile(r"[.;!?\n]+|,?\s(?:but|while|whereas|although|though|however)\s|,\sand\s")
_DENIES = re.compile(rf"\b{_DENYING}\b")
_CLAIMS = re.compile(rf"\b{_CLAIMING}\b|'(?:s|re)\b")
_EMPTY_WORDS = re.compile(rf"\b(?:{_DENYING}|{_CLAIMING}|{_EMPTY})\b|'\w+")
_WORD = re.compile(r"[^\W_]+(?:\.\d+)?")
_ENDING = re.compile(r"(?<=\w\w\w)(?:es|(?<!s)s|e|ed|ing)$")


class Reading(NamedTuple):
    """Holds what was read in a reply."""

    answer: str | None  # a letter, "yes" or "no"
    rule: str  # the name of the rule that decided; "nothing found" where none did


def choice(reply: str, options: Sequence[str]) -> str | None:
    """Returns the letter of the option that a reply chooses, or None; ``options`` are eight texts at most."""
    return read_choice(reply, options).answer


def yes_or_no(reply: str, question: str = "") -> str | None:
    """Returns ``"yes"``, ``"no"`` or None.

    A sentence without the word yes or no ("There is a dog", "There isn't") answers only a question about the same
    things; without a question, the first sentence counts.
    """
    return read_yes_or_no(reply, question).answer


def read_choice(reply: str, options: Sequence[str]) -> Reading:
    """Returns the letter that :func:`choice` returns and the name of the rule that decided."""
    offered = _offered(tuple(options))
    if answer := offered.whole.get(reply.strip(_BARE).lower()):
        return Reading(answer, "option")
    if (own := reply.strip()) in offered.options:
        return Reading(offered.answers[offered.options.index(own)], "option")
    return _read(_prepare(reply, offered), CHOICE_RULES)


def read_yes_or_no(reply: str, question: str = "") -> Reading:
    """Returns the answer that :func:`yes_or_no` returns and the name of the rule that decided."""
    if same := _YES_OR_NO.whole.get(reply.strip(_BARE).lower()):
        return Reading(same, "option")
    return _read(_prepare(reply, _YES_OR_NO, question), YES_NO_RULES)


# --- step 1: the answers that a reply names ---------------------------------------------------------------------------
class _Offered(NamedTuple):
    """Holds the answers that a question offers."""

    answers: Sequence[str]  # letters, or "yes" and "no"
    options: tuple[str, ...]  # the options' texts; empty for yes and no
    whole: dict[str, str]  # a letter or text without case, emphasis and outer signs: its answer, "" if several share it
    named: re.Pattern[str]  # finds words that name an answer
    marks: dict[str, str]  # such words in lower case: the mark of their answer
    doubt: str  # the only answer that is itself a doubt: "Cannot be determined"


class _Mention(NamedTuple):
    """Holds one place where a reply names an answer."""

    answer: str
    before: str  # the words since the mention before
    after: str  # the words up to the next mention
    cue: str  # how a cue, praise or a last line commits the reply: "final", "stated", "hedged"; else ""
    rejected: bool  # "not ①", "① is wrong"
    joined: bool  # another answer stands beside it: "① or ②"
    ends: bool  # the clause ends after the answer, or a reason follows
    lettered: bool  # a letter names the answer


class _Reply(NamedTuple):
    """Holds a prepared reply."""

    text: str  # without reasoning, LaTeX and Markdown
    low: str  # in lower case, with marks for the answers
    mentions: list[_Mention]
    boxed: list[str]  # what stands in LaTeX boxes, answer tags and JSON fields
    offered: _Offered
    question: str


@lru_cache(maxsize=4096)
def _offered(options: tuple[str, ...]) -> _Offered:
    answers, plain, doubts = LETTERS[: len(options)], [_plain(_lines(option)) for option in options], []
    whole: dict[str, str] = {}
    words: dict[str, str] = {}
    for letter, option, own in zip(answers, options, plain, strict=True):
        whole |= dict.fromkeys((f"{letter}{sign} {own}".lower() for sign in ("", ".", ")", ":")), letter)
        words[own if plain.count(own) == 1 else _unmarked(option)] = letter
        clause = re.split("[,;:(]", own)[0].strip()  # "neither" of "neither; the samples are alike"
        if sum(clause in other for other in plain) == 1:
            words.setdefault(clause, letter)
        doubts += [letter] if _DOUBTS.search(own) else []
        words |= dict.fromkeys(_NONE.split(", "), letter) if re.match("none\\b", own) else {}
    whole |= {own: letter if plain.count(own) == 1 else "" for letter, own in zip(answers, plain, strict=True) if own}
    whole |= {letter.lower(): letter for letter in answers}
    words = {word: letter for word, letter in words.items() if word and not (len(word) == 1 and word.isalpha())}
    return _Offered(
        answers, tuple(map(str.strip, options)), whole, *_naming(words, answers), doubts[0] if len(doubts) == 1 else ""
    )


def _naming(words: dict[str, str], answers: Sequence[str]) -> tuple[re.Pattern[str], dict[str, str]]:
    """Returns a pattern that finds the words, the longest first, and the mark of each."""
    forms = "|".join(re.escape(word) for word in sorted(words, key=len, reverse=True))
    ends = r"(?!\w|['-]\w|(?<=\d)[.,:/]\d)"  # "open" is in "open." but not in "opened", "3" in "3." but not in "3.5"
    noun = rf"(?<!\bno(?=\s(?!{_FOLLOWING}\b)\w))"  # "no dog" is read with its sentence, by the statement rule
    marks = {word: _MARKS[answers.index(answer)] for word, answer in words.items()}
    return re.compile(rf"(?<!\w)(?:{forms or '(?!)'}){ends}{noun}", re.IGNORECASE), marks


def _prepare(reply: str, offered: _Offered, question: str = "") -> _Reply:
    """Cleans a reply and finds the answers that it names."""
    boxed: list[str] = []
    if _SIMPLE.fullmatch(reply):
        reply = " ".join(reply.split())
    else:
        reply = _STRUCK.sub("", _PROMPT.sub("", _NEXT_TURN.sub("", _REASONING.sub("", reply))))
        boxed = [next(filter(None, groups), "") for groups in _BOXED.findall(reply)]
        reply = _lines(_TEX.sub("", reply.replace("[x]", "✓").replace("[X]", "✓").replace("[ ]", "✗")))
    low = offered.named.sub(lambda found: offered.marks.get(found[0].lower(), found[0]), reply)
    if offered.options:
        low = _LETTER.sub(lambda found: _mark(found, offered), _LABEL.sub("answer:", low) if ":" in low else low)
    low = _NOISE.sub("", low.lower() if offered.options else low.lower().replace("✗", ""))  # "❌ No" is a no
    return _Reply(reply, low, _mentions(low, offered), boxed, offered, question)


def _mark(found: re.Match[str], offered: _Offered) -> str:
    """Returns the mark of a letter, a place or a number, or the text itself where it names no answer."""
    letter, closed, own, _, place, number = found.groups()
    if not letter:
        i = int(number) - 1 if number else _PLACES[place.lower()]
        return _MARKS[: len(offered.answers)][i] if i < len(offered.answers) else found[0]
    if letter.upper() not in offered.answers:
        return found[0]
    i = offered.answers.index(letter.upper())
    mark = _MARKS[8 + i]
    if own and own[-1] == _MARKS[i]:
        return mark
    if not closed and (letter == "A" or letter.islower()) and _ARTICLE.match(found.string, found.end(2)):
        return found[0]
    return mark + (own or "")


def _mentions(low: str, offered: _Offered) -> list[_Mention]:
    """Returns the answers that a text with marks names, in their order."""
    parts = _SPLIT.split(low)
    found: list[_Mention] = []
    for i in range(len(parts) - 2, 0, -2):  # from the last one, since an answer's standing depends on the next
        before, mark, after = parts[i - 1 : i + 2]
        answer = offered.answers[_MARKS.index(mark) % 8]
        if found and found[-1].answer == answer and not after.strip(" ,"):
            after = found.pop().after  # "Closed (B)" names one answer once
        ends, joined, cue = bool(_ENDS.match(after)), False, ""
        near = before[-120:]  # so long texts take no longer
        intro = _BEFORE.search(near) if near else None
        rejected = bool((intro and intro["denied"]) or _REJECTED.match(after))
        if found and found[-1].answer != answer and not found[-1].rejected and (join := _JOIN.fullmatch(after)):
            sentences = "." in after and not offered.options  # "Yes. No, ..." commits itself to yes
            joined = bool(join["word"] or (_SERIES.match(found[-1].after) and not sentences))
        if not rejected and not joined:
            if intro and (intro["stated"] or re.search("answer|option|choice", intro[0]) or (intro[0] and ends)):
                hedged = intro["weak"] and _HEDGED.search(intro["weak"])
                cue = "final" if intro["final"] else "hedged" if hedged else "stated"
            elif _PRAISED.match(after) or (not found and _LAST_LINE.search(near) and not after.strip(_BARE)):
                cue = "stated"
        found.append(_Mention(answer, before, after, cue, rejected, joined, ends, _MARKS.index(mark) > 7))
    return found[::-1]


# --- step 2: the rules ------------------------------------------------------------------------------------------------
Rule = Callable[[_Reply], str | None]  # an answer, "" for "no answer", None for "the next rule decides"


def _option(reply: _Reply) -> str | None:
    """Reads a reply that is an option and nothing else: as it is, else without case, emphasis and outer punctuation."""
    answer = reply.offered.whole.get(_plain(reply.text))
    if answer == "":  # "Happy Easter" and "Happy Easter!"
        same = [i for i, option in enumerate(reply.offered.options) if _unmarked(option) == _unmarked(reply.text)]
        return reply.offered.answers[same[0]] if len(same) == 1 else ""
    return answer


def _boxed(reply: _Reply) -> str | None:
    """Reads the last answer in a LaTeX box, an XML tag or a JSON field."""
    parts = [_prepare(content, reply.offered) for content in reversed(reply.boxed)]
    return next((answer for part in parts if (answer := _option(part) or _leading(part))), None)


def _leading(reply: _Reply) -> str | None:
    """Reads an answer that the reply begins with and that ends its clause; a list of the options is no answer."""
    first = reply.mentions[0] if reply.mentions else None
    if not first or first.rejected or first.joined or not _LEADS.match(first.before):
        return None
    listed = (m for m in reply.mentions if _LINE.search(m.before) and m.after.lstrip()[:1] in (".", ":", "-"))
    if len({mention.answer for mention in listed if not mention.rejected}) > 1:
        return None
    ends = first.after[:1] != "?" and (first.ends or not reply.offered.options or _MARKER.match(reply.text))
    return _corrected(reply.mentions) if ends else None


def _stated(reply: _Reply) -> str | None:
    """Reads the first answer to which a cue, praise, or a line of its own at the end commits the reply."""
    for i, mention in enumerate(reply.mentions):
        if mention.cue in ("stated", "final"):
            return _corrected(reply.mentions[i:])
    hedged = {mention.answer for mention in reply.mentions if mention.cue == "hedged"}
    return hedged.pop() if len(hedged) == 1 else None


def _refusal(reply: _Reply) -> str | None:
    """Reads a refusal as no answer, unless a clause before it answers: "The door is closed; I can't see inside".

    A doubt is the only option that is a doubt: "It is unclear" means "Cannot be determined".
    """
    if reply.offered.doubt and not reply.mentions and _DOUBTS.search(reply.low):
        return reply.offered.doubt
    refused = (_REFUSES_ALL if reply.offered.options else _REFUSES).search(reply.low)
    if not refused:
        return None
    cut = _CLAUSE_CUT.match(reply.low, 0, refused.start())
    if not cut or not (reply.offered.options or reply.question):
        return ""
    before = reply._replace(low=cut[0], mentions=_mentions(cut[0], reply.offered))
    return (_only(before) if reply.offered.options else _statement(before)) or ""


def _only(reply: _Reply) -> str | None:
    """Reads the only answer that is named, rejected ones aside; letters count before words."""
    mentions = [mention for mention in reply.mentions if not mention.rejected]
    named = {mention.answer for mention in ([m for m in mentions if m.lettered] or mentions)}
    return (named.pop() if len(named) == 1 else "") if named else None


def _statement(reply: _Reply) -> str | None:
    """Reads the clause that affirms or denies the most of what was asked: "There is a dog", "There isn't"."""
    asked, best, answer = _content(reply.question), -1, None
    side = _content(reply.question.partition(" than ")[0])
    for clause in _CLAUSES.split(reply.low):
        denies = _DENIES.search(clause)
        if denies or _CLAIMS.search(clause):
            told = _content(clause)
            if (told <= asked or asked <= told) and len(told & asked) > best:
                own = _content(clause.partition(" than ")[0])
                swapped = " than " in clause and not (own <= side or side <= own)  # "B is longer than A"
                best, answer = len(told & asked), "no" if denies or swapped else "yes"
    return answer


CHOICE_RULES: tuple[tuple[str, Rule], ...] = (
    ("option", _option),
    ("boxed answer", _boxed),
    ("leading answer", _leading),
    ("stated answer", _stated),
    ("refusal", _refusal),
    ("only answer named", _only),
)
YES_NO_RULES = (*CHOICE_RULES, ("statement", _statement))


def _read(reply: _Reply, rules: Sequence[tuple[str, Rule]]) -> Reading:
    if not reply.low.strip():
        return Reading(None, "empty")
    for name, rule in rules:
        answer = rule(reply)
        if answer is not None:
            return Reading(answer or None, name)
    return Reading(None, "nothing found")


def _corrected(mentions: Sequence[_Mention]) -> str:
    """Returns the first answer, or the one by which the reply corrects it: "A... wait, B", "A ... Final answer: B"."""
    answer, corrects = mentions[0].answer, False
    for mention in mentions[1:]:
        corrects = corrects or _CORRECTS.search(mention.before) is not None
        if (corrects and mention.cue) or mention.cue == "final":
            answer = mention.answer
    return answer


# --- texts ------------------------------------------------------------------------------------------------------------
def _lines(text: str) -> str:
    """Returns the text without emphasis and with single spaces; lines stay apart."""
    if not text.isascii():
        text = _CJK_EDGE.sub(" ", unicodedata.normalize("NFKC", text))
    text = _BOLD_LETTER.sub(r"(\2)", text).translate(_SIGNS)  # "**B**" becomes "(B)"
    return "\n".join(filter(None, (" ".join(line.split()) for line in text.split("\n"))))


def _unmarked(text: str) -> str:
    return _lines(text).lower().strip(" .\"'")


def _plain(text: str) -> str:
    low = text.lower().replace("\n", " ")
    return low.strip(" .,:;!?()[]\"'") or low


def _content(text: str) -> set[str]:
    """Returns the words that say what a sentence is about, without their endings."""
    return {_ENDING.sub("", word) for word in _WORD.findall(_EMPTY_WORDS.sub(" ", text.lower()))}


_WORDS = {**dict.fromkeys(_YES.split(", "), "yes"), **dict.fromkeys(_NO.split(", "), "no")}
_ALONE = {**dict.fromkeys(_ALONE_YES.split(", "), "yes"), **dict.fromkeys(_ALONE_NO.split(", "), "no")}
_YES_OR_NO = _Offered(("yes", "no"), (), _WORDS | _ALONE, *_naming(_WORDS, ("yes", "no")), "")
