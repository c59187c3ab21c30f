"""A generator of instruction data: short tasks with one right answer, from a seed alone.

Arithmetic, comparison, string work, lists, unit conversion, dates, small facts, formatting, sequences
and classification, each phrased in several ways. Answers are computed, not looked up in prose, so
that a small model has something to learn and a bigger one something to be better at.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable

from kdcache.embedded.facts import ANIMALS, CAPITALS, DAYS, MONTHS, NAMES, UNITS, WORDS

Triple = tuple[str, str, str]


def generate(count: int, *, seed: int) -> list[dict[str, str]]:
    """``count`` distinct examples with instruction, input and output; equal seeds give equal lists."""
    rng = random.Random(seed)
    seen: set[tuple[str, str]] = set()
    examples: list[dict[str, str]] = []
    while len(examples) < count:
        instruction, extra, output = rng.choice(_TASKS)(rng)
        if (instruction, extra) not in seen:
            seen.add((instruction, extra))
            examples.append({"instruction": instruction, "input": extra, "output": output})
    # Small tasks run out of new examples early; without this the head of the list would be full of them.
    rng.shuffle(examples)
    return examples


def _add(rng: random.Random) -> Triple:
    a, b = rng.randint(2, 99), rng.randint(2, 99)
    ask = rng.choice(("What is {a} plus {b}?", "Add {a} and {b}.", "Compute {a} + {b}.")).format(a=a, b=b)
    return ask, "", rng.choice((f"{a} + {b} = {a + b}.", f"The sum of {a} and {b} is {a + b}."))


def _subtract(rng: random.Random) -> Triple:
    a, b = sorted((rng.randint(2, 99), rng.randint(2, 99)), reverse=True)
    ask = rng.choice(("What is {a} minus {b}?", "Subtract {b} from {a}.", "Compute {a} - {b}.")).format(a=a, b=b)
    return ask, "", f"{a} - {b} = {a - b}."


def _multiply(rng: random.Random) -> Triple:
    a, b = rng.randint(2, 12), rng.randint(2, 12)
    ask = rng.choice(("What is {a} times {b}?", "Multiply {a} by {b}.", "Compute {a} * {b}.")).format(a=a, b=b)
    return ask, "", f"{a} * {b} = {a * b}."


def _compare(rng: random.Random) -> Triple:
    a, b = rng.sample(range(1, 1000), 2)
    ask = rng.choice(("Which number is larger, {a} or {b}?", "Compare {a} and {b}.")).format(a=a, b=b)
    return ask, "", f"{max(a, b)} is larger than {min(a, b)}."


def _parity(rng: random.Random) -> Triple:
    n = rng.randint(1, 999)
    ask = rng.choice(("Is {n} even or odd?", "Say whether {n} is even or odd.")).format(n=n)
    return ask, "", f"{n} is {'odd' if n % 2 else 'even'}."


def _reverse(rng: random.Random) -> Triple:
    word = rng.choice(WORDS)
    extra = " ".join(rng.sample(WORDS, rng.randint(2, 4)))
    if rng.random() < 0.3:
        return (
            rng.choice(("Spell the word with dashes.", "Write the letters with dashes between them.")),
            word,
            "-".join(word),
        )
    return (
        rng.choice(("Reverse the order of the words.", "Write the words in reverse order.")),
        extra,
        " ".join(extra.split()[::-1]),
    )


def _upper(rng: random.Random) -> Triple:
    words = " ".join(rng.sample(WORDS, rng.randint(1, 3)))
    if rng.random() < 0.5:
        return rng.choice(("Write this in capital letters.", "Convert to upper case.")), words, words.upper()
    return rng.choice(("Capitalize every word.", "Write this in title case.")), words, words.title()


def _sort_words(rng: random.Random) -> Triple:
    words = rng.sample(WORDS, rng.randint(3, 5))
    ask = rng.choice(("Sort the words alphabetically.", "Put these words in alphabetical order."))
    return ask, ", ".join(words), ", ".join(sorted(words))


def _sort_numbers(rng: random.Random) -> Triple:
    numbers = rng.sample(range(1, 100), rng.randint(3, 5))
    falling = rng.random() < 0.4
    ask = f"Sort the numbers from {'largest to smallest' if falling else 'smallest to largest'}."
    return ask, ", ".join(map(str, numbers)), ", ".join(map(str, sorted(numbers, reverse=falling)))


def _count(rng: random.Random) -> Triple:
    words = rng.sample(WORDS, rng.randint(2, 7))
    return (
        rng.choice(("Count the words.", "How many words are there?")),
        " ".join(words),
        f"There are {len(words)} words.",
    )


def _pick(rng: random.Random) -> Triple:
    words = rng.sample(WORDS, rng.randint(3, 6))
    which = rng.choice(("first", "last", "longest"))
    answer = {"first": words[0], "last": words[-1], "longest": max(words, key=len)}[which]
    return f"Name the {which} word of the list.", ", ".join(words), f"The {which} word is {answer}."


def _convert(rng: random.Random) -> Triple:
    big, small, factor = rng.choice(UNITS)
    n = rng.randint(2, 40)
    ask = rng.choice((f"Convert {n} {big} to {small}.", f"How many {small} are {n} {big}?"))
    return ask, "", f"{n} {big} are {n * factor} {small}."


def _temperature(rng: random.Random) -> Triple:
    c = rng.randrange(-20, 105, 5)
    return (
        f"Convert {c} degrees Celsius to Fahrenheit.",
        "",
        f"{c} degrees Celsius are {c * 9 // 5 + 32} degrees Fahrenheit.",
    )


def _day(rng: random.Random) -> Triple:
    i, n = rng.randrange(7), rng.randint(1, 6)
    ask = rng.choice((f"What day is {n} days after {DAYS[i]}?", f"Today is {DAYS[i]}. Which day comes in {n} days?"))
    return ask, "", f"It is {DAYS[(i + n) % 7]}."


def _month(rng: random.Random) -> Triple:
    i, after = rng.randrange(12), rng.random() < 0.5
    other = MONTHS[(i + (1 if after else -1)) % 12]
    side = "after" if after else "before"
    return (
        rng.choice(("Which month comes {s} {m}?", "Name the month {s} {m}.")).format(s=side, m=MONTHS[i]),
        "",
        f"{other} comes {side} {MONTHS[i]}.",
    )


def _capital(rng: random.Random) -> Triple:
    country = rng.choice(list(CAPITALS))
    name = rng.choice(NAMES)
    ask = rng.choice((
        "What is the capital of {c}?", "Name the capital city of {c}.", "{n} travels to the capital of {c}. Where is {n}?",
    )).format(c=country, n=name)  # fmt: skip
    if name in ask:
        return ask, "", f"{name} is in {CAPITALS[country]}, the capital of {country}."
    return ask, "", f"The capital of {country} is {CAPITALS[country]}."


def _classify(rng: random.Random) -> Triple:
    animals = rng.sample(list(ANIMALS), rng.randint(1, 3))
    if len(animals) == 1:
        return "What kind of animal is this?", animals[0], f"A {animals[0]} is a kind of {ANIMALS[animals[0]]}."
    return "Classify the animals.", ", ".join(animals), "\n".join(f"{a}: {ANIMALS[a]}" for a in animals)


def _listing(rng: random.Random) -> Triple:
    words = rng.sample(WORDS, rng.randint(2, 4))
    style = rng.choice(("bulleted", "numbered"))
    marks = ["- " if style == "bulleted" else f"{i}. " for i in range(1, len(words) + 1)]
    items = "\n".join(mark + word for mark, word in zip(marks, words, strict=True))
    return f"Write the items as a {style} list.", ", ".join(words), items


def _to_json(rng: random.Random) -> Triple:
    name, age, city = rng.choice(NAMES), rng.randint(18, 80), rng.choice(list(CAPITALS.values()))
    text = f"{name} is {age} years old and lives in {city}."
    return "Extract name, age and city as JSON.", text, json.dumps({"name": name, "age": age, "city": city})


def _sequence(rng: random.Random) -> Triple:
    start, step = rng.randint(1, 40), rng.randint(2, 9)
    terms = [start + i * step for i in range(6)]
    ask = rng.choice(("Continue the sequence with two numbers.", "What are the next two numbers?"))
    return ask, ", ".join(map(str, terms[:4])), f"{terms[4]}, {terms[5]}"


def _shopping(rng: random.Random) -> Triple:
    name, item = rng.choice(NAMES), rng.choice(WORDS)
    n, price = rng.randint(2, 9), rng.randint(2, 12)
    ask = f"{name} buys {n} pieces of {item} at {price} dollars each. How much does {name} pay?"
    return ask, "", f"{n} * {price} = {n * price}. {name} pays {n * price} dollars."


def _polite(rng: random.Random) -> Triple:
    name, item = rng.choice(NAMES), rng.choice(WORDS)
    kind = rng.choice(("thank-you note", "request", "apology"))
    body = {
        "thank-you note": f"Dear {name}, thank you very much for the {item}.",
        "request": f"Dear {name}, could you please lend me the {item}?",
        "apology": f"Dear {name}, I am sorry that I lost the {item}.",
    }[kind]
    article = "an" if kind == "apology" else "a"
    return f"Write {article} {kind} to {name} about the {item}.", "", body


_TASKS: tuple[Callable[[random.Random], Triple], ...] = (
    _add, _subtract, _multiply, _compare, _parity, _reverse, _upper, _sort_words, _sort_numbers, _count, _pick, _convert,
    _temperature, _day, _month, _capital, _classify, _listing, _to_json, _sequence, _shopping, _polite,
)  # fmt: skip
