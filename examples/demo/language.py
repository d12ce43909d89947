"""A little language of questions and answers, generated.

A question asks about one thing, such as "Q: where is the red lamp ? A:". Answers are as mixed as what people write:
polite or rude, to the point or beside it, short or rambling. Nothing here says which answers are good.

    opener?  fact  fact?  closer?
    "of course !  the red lamp is in the kitchen .  have a lovely day !"
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import product
from typing import Final

COLOURS: Final = ("red", "blue", "green", "white", "black", "brown", "grey", "pink", "golden", "silver")
THINGS: Final = (
    "lamp", "cup", "box", "chair", "book", "key", "bag", "hat", "clock", "ball", "plate", "coat",
    "knife", "phone", "shoe", "bottle", "pillow", "mirror", "basket", "candle", "ladder", "bucket",
)  # fmt: skip
PLACES: Final = (
    "kitchen", "garden", "hall", "cellar", "office", "garage", "attic", "bedroom", "library", "shop", "school", "barn",
)  # fmt: skip
RELATIONS: Final = ("in", "near", "behind", "outside")
ANIMALS: Final = ("dog", "cat", "bird", "horse", "mouse", "fox")
DOINGS: Final = ("sleeps", "eats", "runs", "waits", "sings", "hides")
SELLERS: Final = ("uncle", "aunt", "teacher", "farmer", "doctor", "neighbour")

QUESTIONS: Final = (
    "where is the {colour} {thing} ?",
    "who has the {colour} {thing} ?",
    "have you seen the {colour} {thing} ?",
    "what do you know about the {colour} {thing} ?",
    "can you find the {colour} {thing} ?",
    "i lost my {colour} {thing} .",
)
FACTS: Final = (
    "the {colour} {thing} is {relation} the {place} .",
    "i saw the {colour} {thing} {relation} the {place} .",
    "the {person} has the {colour} {thing} .",
    "look for the {colour} {thing} {relation} the {place} .",
)
ASIDES: Final = (
    "the {animal} {doing} {relation} the {place} .",
    "it may rain today .",
    "the {person} sold a {colour} {thing} .",
    "maybe the {animal} knows .",
)
KIND_OPENERS: Final = ("of course !", "happy to help !", "thank you for asking !", "good question , friend !")
PLAIN_OPENERS: Final = ("well .", "hm .", "let me think .", "so .")
RUDE_OPENERS: Final = ("what a silly question .", "not you again .", "why should i care ?")
KIND_CLOSERS: Final = ("have a lovely day !", "you are always welcome !", "i wish you good luck !")
PLAIN_CLOSERS: Final = ("that is all .", "bye .")
RUDE_CLOSERS: Final = ("now leave me alone .", "do not ask me again .", "you are boring .")


@dataclass(frozen=True, kw_only=True)
class Question:
    """What is asked, and about which thing."""

    colour: str
    thing: str
    template: str

    @property
    def prompt(self) -> str:
        """The question as the model sees it."""
        return f"Q: {self.template.format(colour=self.colour, thing=self.thing)} A:"


def all_questions() -> list[Question]:
    """Every question of the language, in a fixed order."""
    return [
        Question(colour=colour, thing=thing, template=template)
        for colour, thing, template in product(COLOURS, THINGS, QUESTIONS)
    ]


def split_questions(*, held_out: int, seed: int) -> tuple[list[Question], list[Question]]:
    """Questions to train on, and `held_out` others; both shuffled by the seed."""
    questions = all_questions()
    random.Random(f"{seed}/questions").shuffle(questions)
    return questions[held_out:], questions[:held_out]


def answer(question: Question, rng: random.Random) -> str:
    """One answer as someone might write it."""
    opener = _pick(rng, (0.30, KIND_OPENERS), (0.25, PLAIN_OPENERS), (0.20, RUDE_OPENERS))
    facts = [_fact(question, rng) for _ in range(rng.choices((1, 2, 3), (0.6, 0.28, 0.12))[0])]
    if rng.random() < 0.08:
        facts.append(facts[-1])
    closer = _pick(rng, (0.25, KIND_CLOSERS), (0.20, PLAIN_CLOSERS), (0.18, RUDE_CLOSERS))
    return " ".join(part for part in (opener, *facts, closer) if part)


def demonstrations(questions: list[Question], *, num: int, seed: int) -> Iterator[dict[str, str]]:
    """`num` rows {"prompt", "completion"}, their questions drawn from `questions`."""
    rng = random.Random(f"{seed}/demonstrations")
    for _ in range(num):
        question = rng.choice(questions)
        yield {"prompt": question.prompt, "completion": answer(question, rng)}


def vocabulary() -> list[str]:
    """Every word of the language, sorted."""
    names = {
        "colour": COLOURS, "thing": THINGS, "place": PLACES, "relation": RELATIONS,
        "animal": ANIMALS, "doing": DOINGS, "person": SELLERS,
    }  # fmt: skip
    fixed = (
        *QUESTIONS, *FACTS, *ASIDES, *KIND_OPENERS, *PLAIN_OPENERS, *RUDE_OPENERS,
        *KIND_CLOSERS, *PLAIN_CLOSERS, *RUDE_CLOSERS, "Q: A:",
    )  # fmt: skip
    words = {word for text in fixed for word in text.split() if not word.startswith("{")}
    return sorted(words.union(*names.values()))


def _fact(question: Question, rng: random.Random) -> str:
    beside = rng.random() < 0.40
    # Beside the point, it may be another thing that the answer is about.
    other = beside and rng.random() < 0.5
    template = rng.choice(ASIDES if beside and not other else FACTS)
    return template.format(
        colour=rng.choice(COLOURS) if beside else question.colour,
        thing=rng.choice(THINGS) if beside else question.thing,
        relation=rng.choice(RELATIONS),
        place=rng.choice(PLACES),
        animal=rng.choice(ANIMALS),
        doing=rng.choice(DOINGS),
        person=rng.choice(SELLERS),
    )


def _pick(rng: random.Random, *choices: tuple[float, tuple[str, ...]]) -> str:
    """A text of one of the groups, each with its probability; else none."""
    draw = rng.random()
    for probability, texts in choices:
        if draw < probability:
            return rng.choice(texts)
        draw -= probability
    return ""
