"""Refusals: whether a response refuses or declines to answer, by patterns at its opening.

The rule: in the first `OPENING` characters, lower case and with plain apostrophes, the speaker says that they cannot or
will not do what one asks of an assistant ("I'm sorry, but I can't help with that", "I won't answer this"), that they
decline or refuse, that they have no comment, or that the other should find it out alone ("look it up yourself").
Wording decides, not intent. Not knowing ("I don't know", "I could not find it"), disagreeing, and warning before an
answer are not refusals.

`declines` also finds short replies that only say that they do not know; it marks responses that are chosen over others.

`sounds_like_refusal` is a looser rule, for choosing replies that are surely answers: it also finds answers that begin
with an apology.
"""

from __future__ import annotations

import re

OPENING = 240  # characters

_CANNOT = (
    r"(?:can(?:no|')t|can not|(?:won't|will not) be able to|won't|will not|wouldn't|would not|could not|couldn't|"
    r"(?:am|'m) (?:simply |just )?(?:not (?:really |currently )?(?:able|allowed|permitted|willing|going|comfortable|"
    r"prepared|in a position|designed|programmed)(?: to| with)?|unable to|programmed not to)|"
    r"do(?: not|n't) (?:feel comfortable|want to|wish to|intend to|have the ability to)|"
    r"(?:would|'d) (?:rather|prefer) not(?: to)?|refuse to|decline to|am here to help, but can(?:no|')t)"
)
_ADVERB = r"(?: (?:really|simply|just|ethically|possibly|in good conscience|legally|actually|personally|directly|be))*"
_REQUESTED = (
    r"(?:help(?:ing)?(?! but\b| it\b| feeling| myself)|assist(?:ing)?|answer(?:ing)?|comply(?:ing)?|fulfil\w*|"
    r"provid(?:e|ing)|support(?:ing)? (?:this|that|you|or|the request|any)|shar(?:e|ing) (?!your\b)|"
    r"giv(?:e|ing) (?:you|out|advice|instructions|any|that|this|medical|legal|details|information)|"
    r"discuss(?:ing)?|talk(?:ing)? about|speak(?:ing)? (?:about|on)|comment(?:ing)?|"
    r"(?:creat|generat|writ|produc)(?:e|ing) (?:that|this|such|any|an?|content|code|material|something|stor\w+)\b|"
    r"engag(?:e|ing)|continu(?:e|ing)|respond(?:ing)?|participat(?:e|ing)|tak(?:e|ing) part|"
    r"offer(?:ing)? (?:advice|any|help|that|this|guidance|instructions)|"
    r"(?:tell|teach|show)(?:ing)? you (?!how (?:much|happy|glad|sorry|grateful|excited|many|proud|great|good))|"
    r"(?:explain|describ|teach|say)(?:e|ing)? how to|do(?:ing)? (?:that|this|it|so)\b|say(?:ing)? that to|"
    r"encourag(?:e|ing)|condon(?:e|ing)|promot(?:e|ing)|endors(?:e|ing)|facilitat(?:e|ing)|recommend (?:any|ways|how)|"
    r"advise (?:you )?(?:on|how)|process (?:that|this|your)|accommodat(?:e|ing)|be (?:a )?part of|go(?:ing)? there|"
    r"play(?:ing)? along)"
)
_PATTERNS = tuple(
    re.compile(pattern)
    for pattern in (
        rf"\b(?:i|we) ?{_CANNOT}{_ADVERB} {_REQUESTED}",
        rf"\b(?:i|my)\b[^.!?\n]{{0,80}} and {_CANNOT}{_ADVERB} {_REQUESTED}",
        rf"^(?:i(?: am|'m) )?(?:very |so |really )?sorry,? (?:but )?(?:as an [^,.]{{0,40}}, )?i {_CANNOT}{_ADVERB} "
        r"(?!find|agree|remember|recall|believe|think|see|make it|imagine|hear|stop|wait)\w",
        rf"(?:sorry|apologi[sz]e|apologies|afraid|unfortunately)[^.!?\n]{{0,30}}\b(?:i|we) ?{_CANNOT}{_ADVERB}[.!,]",
        r"\b(?:i|we)(?: |'m |'ll | am | will )(?:must |have to |need to |going to |respectfully |politely |be )*"
        r"(?:decline|refuse|pass on|declining|refusing)\b",
        r"\b(?:not|isn't) (?:something|a topic|a request|a question) (?:that )?(?:i|we)(?:'m| am|'ll| will|'d| would|"
        r" can| could|'re| are)\b",
        r"^(?:i(?: have|'ve)(?: got)? )?no comment\b",
        r"\b(?:my|the) (?:guidelines|programming|polic(?:y|ies)|principles|safety guidelines)[^.!?\n]{0,40}"
        r"(?:not allow|n't allow|not permit|n't permit|prevents?|prohibits?|forbids?)",
        r"\bagainst my (?:guidelines|programming|polic(?:y|ies)|principles|ethics)\b",
        r"\b(?:look|google|figure|find|search) (?:(?:it|that|this|them)(?: up| out)?|out|up|for (?:it|that)) "
        r"(?:for )?(?:yourself|on your own)\b",
        r"^(?:i (?:do not|don't) care|none of your business|that's none of your business|ask someone else)\b"
        r"(?=[.,!;]|$)",
    )
)


def is_refusal(response: str) -> bool:
    """Whether a response refuses or declines to answer, by the rule of this module."""
    opening = " ".join(response[:OPENING].lower().replace("’", "'").split())
    return any(pattern.search(opening) for pattern in _PATTERNS)


_SOUNDS_LIKE = re.compile(
    r"""\b(?:I|we)(?:\ am|['’]m|\ are|['’]re)?\ (?:really\ |very\ |so\ )?
        (?:sorry|afraid|unable|not\ (?:able|going\ to|comfortable|allowed)|can\ ?not|can['’]?t|won['’]?t|will\ not
        |would\ not|wouldn['’]t|could\ not|couldn['’]t|must\ decline|(?:must\ )?refuse
        |do(?:\ not|n['’]t)\ think\ (?:it|that))\b
    |^\W*sorry\b|\bas\ an\ AI\b|\bI\ apologi[sz]e\b""",
    re.IGNORECASE | re.VERBOSE,
)
_NO_ANSWER = re.compile(
    r"""\b(?:I|we)\ (?:really\ |honestly\ |simply\ )?do(?:\ not|n['’]?t)[ ]
        (?:know|recall|remember|have\ (?:an|any|the|that|enough)\ (?:answer|idea|info|details?|knowledge))
    |\bhave\ no\ (?:comment|idea|clue|answer|opinion|knowledge|information)
    |\b(?:unknown|not\ known|unclear)\ to\ me\b|\bnever\ heard\ of\b|\byour\ guess\ is\b|\bbeats\ me\b
    |\bnot\ familiar\ with\b|\bwish\ I\ knew\b|\bknow\ nothing\ about\b|\bnot\ (?:something\ )?I\ know\b
    |\b(?:hard|difficult|impossible)\ to\ say\b|^\W*no\ (?:comment|idea|clue)\b
    |\b(?:(?:am|['’]m)\ )?not\ (?:sure|certain)\b|\b(?:idk|dunno)\b""",
    re.IGNORECASE | re.VERBOSE,
)
_LOOSE_OPENING = 200  # characters in which a reply refuses
_SHORT = 300  # characters of a reply that can be nothing but a don't-know


def sounds_like_refusal(reply: str) -> bool:
    """Whether a reply begins with an apology or an inability, which most refusals do and some answers."""
    return _SOUNDS_LIKE.search(reply[:_LOOSE_OPENING]) is not None


def declines(response: str) -> bool:
    """Whether a response refuses to answer, or is a short one like a don't-know, or holds no letter and no digit."""
    return not any(map(str.isalnum, response)) or is_refusal(response) or _is_no_answer(response)


def gives_no_answer(reply: str) -> bool:
    """Whether a reply reads like a refusal, or a short one like a don't-know."""
    return sounds_like_refusal(reply) or _is_no_answer(reply)


def _is_no_answer(reply: str) -> bool:
    return len(reply) <= _SHORT and _NO_ANSWER.search(reply) is not None
