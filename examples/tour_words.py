"""Words and templates that the examples of the tour are made of."""

from __future__ import annotations

import re

PAIRS = {  # positive, negative; a word is on one side only
    "train": [
        "careful careless",
        "useful useless",
        "helpful unhelpful",
        "thoughtful thoughtless",
        "pleasant unpleasant",
        "graceful graceless",
        "tasteful tasteless",
        "kind unkind",
        "reliable unreliable",
        "meaningful meaningless",
        "fruitful fruitless",
        "comfortable uncomfortable",
        "friendly unfriendly",
        "lawful lawless",
        "happy unhappy",
    ],
    "test": [
        "hopeful hopeless",
        "cheerful cheerless",
        "merciful merciless",
        "faithful faithless",
        "fair unfair",
        "lucky unlucky",
        "worthy unworthy",
        "joyful joyless",
    ],
}
PLACES = {
    "train": [
        "hotel",
        "book",
        "film",
        "museum",
        "teacher",
        "dinner",
        "garden",
        "concert",
        "journey",
        "captain",
    ],
    "test": ["train", "play", "doctor", "library", "kitchen", "guide"],
}
FORMS = {
    "train": [
        "The {place} was {word}.",
        "What a {word} {place}!",
        "I found the {place} rather {word}.",
        "They called the {place} {word}, and so do I.",
        "A {word} {place}, all in all.",
        "My friends say the {place} is {word}.",
    ],
    "test": [
        "Nobody told me that the {place} would be so {word}.",
        "We left early, but the {place} seemed {word}.",
        "In the end it is a {word} {place}, we thought.",
        "So {word} a {place} I have never seen.",
    ],
}

ASKED = {  # kind of answer -> how training asks for it; last, how the test does
    "return": (
        "What does {name} return?",
        "What is returned by {name}?",
        "Which value is returned?",
        "What value is the return of {name}?",
    ),
    "condition": (
        "When does this hold for {name}?",
        "In which case is it so?",
        "When does {name} do so?",
        "In which case does {name} do this, and when?",
    ),
    "raise": (
        "Which error does {name} raise?",
        "What exception is raised?",
        "What may {name} raise?",
        "Which exception or error may {name} raise?",
    ),
    "default": (
        "What is the default of {name}?",
        "Which value is the default?",
        "What is taken as default?",
        "What does {name} take as the default?",
    ),
    "use": (
        "What is {name} used for?",
        "What is the use of {name}?",
        "For what is it used?",
        "For what use is {name}?",
    ),
}
END = r"(?=[.;:,](?:\s|$)|\s(?:if|when|unless|and|or|where|which|that)\s|$)"
ANSWERS = {
    kind: re.compile(pattern)
    for kind, pattern in {
        "return": r"\b[Rr]eturns?\s+(\S.{3,70}?)" + END,
        "condition": r"\b(?:[Ii]f|[Ww]hen|[Uu]nless)\s+(\S.{3,70}?)(?=[.;:,](?:\s|$)|\sthen\s|$)",
        "raise": r"\b[Rr]ais(?:es?|ed|ing)\s+(?:an?\s+|the\s+)?"
        r"(\w*(?:Error|Exception|Warning|Exit|Interrupt)\w*)",
        "default": r"\b[Dd]efaults? (?:value )?(?:is|to)\s+(\S.{0,40}?)" + END,
        "use": r"\bused (?:to|for|as|by)\s+(\S.{3,70}?)" + END,
    }.items()
}

# Made-up sentences, where there are no catalogues: the test puts the phrases together in another
# way.
WHEN = [
    "today сегодня",
    "now теперь",
    "often часто",
    "soon скоро",
    "sometimes иногда",
    "tomorrow завтра",
    "again снова",
]
WHAT = [
    "old старый",
    "new новый",
    "small маленький",
    "big большой",
    "red красный",
    "clean чистый",
    "heavy тяжёлый",
    "cheap дешёвый",
]
WHO = [
    "driver водитель",
    "student студент",
    "doctor врач",
    "neighbour сосед",
    "teacher учитель",
    "engineer инженер",
    "guest гость",
]
DOES = [
    "sees видит",
    "opens открывает",
    "carries несёт",
    "washes моет",
    "buys покупает",
    "forgets забывает",
    "repairs чинит",
]
THING = [
    "box ящик",
    "house дом",
    "lock замок",
    "suitcase чемодан",
    "table стол",
    "telephone телефон",
    "umbrella зонт",
    "boat корабль",
]
MADE_UP = {
    "train": [
        "{when} the {who} {does} the {thing}",
        "the {what} {who} {does} the {thing} {when}",
        "the {what} {who} {does} the {what2} {thing}",
        "{when} the {who} {does} the {what} {thing}",
    ],
    "test": ["{when} the {what} {who} {does} the {what2} {thing}"],
}
