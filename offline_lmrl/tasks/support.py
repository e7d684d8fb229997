"""A shop's support chats: customers thumb up replies that ask them back, and thumb down vague ones.

The logs are written like those of a real support desk with a thumb beside each reply. A quarter of the logged replies
ask the customer for what is needed next; the others are polite and vague. All texts here are our own. A pretrained
chat model learns from 400 such chats in minutes (configs/support/).
"""

import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from offline_lmrl.environments.scripted import check_episodes
from offline_lmrl.logs.protocols import StepResult
from offline_lmrl.logs.replies import repeats
from offline_lmrl.logs.trajectory import Turn

TURNS = 2  # replies of the agent in a chat
ASKED_SHARE = 0.25  # share of the logged replies that ask back
RATED_SHARE = 0.8  # share of the logged replies with a thumb
WRONG_SHARE = 0.05  # share of the thumbs that contradict the rule
FEWEST_WORDS = 4  # of a question


class Problem(NamedTuple):
    """A kind of request.

    openings: the customer's first message, with {item}.
    questions: what a reply that asks back asks, with {item}.
    answers: the customer's answer to each of these questions.
    """

    openings: tuple[str, ...]
    questions: tuple[str, ...]
    answers: tuple[str, ...]


# fmt: off
ITEMS = (
    "kettle", "desk lamp", "backpack", "coffee grinder", "bicycle helmet", "rain jacket", "garden hose", "toaster",
    "office chair", "bookshelf", "phone case", "yoga mat", "blender", "wall clock", "suitcase", "electric fan",
    "water bottle", "sleeping bag", "frying pan", "keyboard", "umbrella", "mirror", "rug", "winter coat",
)
HELD_OUT_ITEMS = ("teapot", "tent", "headphones", "running shoes", "picture frame", "vacuum cleaner", "scarf", "drill")
PROBLEMS = (
    Problem(
        ("My {item} has not arrived yet.", "Where is the {item} that I ordered two weeks ago?",
         "The tracking page for my {item} has not changed for days."),
        ("Could you send me the order number?", "Which delivery date did the confirmation give you?",
         "Can you tell me the postcode it was sent to?"),
        ("It is order 48213.", "The mail promised last Friday.", "It was sent to my office address."),
    ),
    Problem(
        ("My {item} arrived broken.", "There is a crack in the {item} that came today.",
         "The {item} was damaged when I opened the box."),
        ("Could you send us a photo of the damage?", "Would you like a new {item} or your money back?",
         "Was the box itself damaged when it came?"),
        ("I can take a photo this evening.", "I would like a new one.", "The box had a big dent."),
    ),
    Problem(
        ("I received the wrong {item}.", "This is not the colour of {item} that I ordered.",
         "You sent me two of the {item} and I ordered one."),
        ("Which colour and size did you order?", "Can you read me the number on the label?",
         "Shall we send the right {item} today?"),
        ("I ordered the dark blue one.", "The label says 7731.", "Yes, please send it today."),
    ),
    Problem(
        ("I want to return the {item}.", "How can I send back my {item}?", "The {item} does not fit."),
        ("Is the {item} still in its box?", "Would you prefer a refund or another size?",
         "May I email you a return label?"),
        ("Yes, it is still in the box.", "A refund, please.", "Yes, use the address of my account."),
    ),
    Problem(
        ("I was charged twice for the {item}.", "My refund for the {item} has not come.",
         "The price of the {item} on my bill is wrong."),
        ("Which card did you pay with?", "Can you give me the date of the second charge?",
         "What amount does your bill show?"),
        ("I paid with my credit card.", "It was on the third of May.", "The bill shows 59 euros."),
    ),
    Problem(
        ("The {item} stopped working after a week.", "I cannot get the {item} to work properly.",
         "A part of my {item} came off."),
        ("What happens when you try to use it?", "When did you first notice the problem?",
         "Shall we repair it or send you a new one?"),
        ("Nothing happens at all.", "I noticed it on Monday.", "A new one would be great."),
    ),
    Problem(
        ("Can I change the address for my {item}?", "I need to cancel my order for the {item}.",
         "I forgot to use my discount code for the {item}."),
        ("What is your order number?", "Which name is the order under?", "Has the {item} been shipped yet?"),
        ("The number is 90155.", "It is under the name Larsen.", "The page says it is being packed."),
    ),
    Problem(
        ("Is the {item} in stock again soon?", "Does the {item} come with a guarantee?",
         "Do you also sell a smaller {item}?"),
        ("Which model are you interested in?", "What size are you looking for?",
         "Would you like us to write to you when it is here?"),
        ("The cheaper one.", "Something a bit smaller.", "Yes, please write to me."),
    ),
)
STARTS = (
    "I'm sorry about that.", "Thank you for writing to us.", "I understand.", "Sorry for the trouble.",
    "Thanks for telling us.", "That is not what we want for you.", "I see.", "I'm sorry to hear about your {item}.",
    "Thank you for your message about the {item}.", "I can imagine that this is annoying.", "", "",
)
STEPS = (
    "I will look into it right away.", "Let me help you with that.", "I can sort this out today.",
    "I will check it now.", "We will fix this for you.", "", "", "",
)
VAGUE = (
    "These things can happen from time to time.", "Our team does its best with every order.",
    "Please see our website for more information.", "Such matters usually take a while.",
    "We value all of our customers.", "Everything is handled in the usual way.",
    "We always try to improve our service.", "There is not much more to say at the moment.",
    "Most customers are happy with their {item}.", "Please be patient.", "Our rules are on the help page.",
    "It should be fine in the end.", "We are very busy these days.", "Your message is important to us.",
    "We have taken note of it.", "It depends on many things.",
)
PUSHES = (
    "That does not help me.", "And what happens now?", "So what should I do?", "I still need help with this.",
    "Is that all?", "I expected a bit more than that.",
)
# fmt: on


def asks_back(text: str) -> bool:
    """True if a reply asks the customer something: a question of at least four words, in a text without loops.

    A text in which the same four words in a row occur four times or more does not count.
    """
    if repeats(text.lower().split()):
        return False
    questions = (part for part in re.findall(r"[^.!?\n]*[.!?\n]", text) if part.endswith("?"))
    return any(len(re.findall(r"[a-z']+", question.lower())) >= FEWEST_WORDS for question in questions)


class Support:
    """A support chat of two replies, each of which earns 1 if it asks the customer something, else −1.

    A customer who was asked answers; one who was not insists. Implements Environment.

    Args:
      held_out: True: the customers ask about items that are in no logs.
    """

    def __init__(self, held_out: bool = True):
        self.items = HELD_OUT_ITEMS if held_out else ITEMS

    def reset(self, seed: int) -> Sequence[Turn]:
        """Start an episode: an item, a problem and its words are drawn with this seed."""
        return self._open(np.random.default_rng(seed))

    def _open(self, rng: np.random.Generator) -> Sequence[Turn]:
        self.rng, self.asked = rng, []
        self.item, self.problem = _one_of(rng, self.items), PROBLEMS[rng.integers(len(PROBLEMS))]
        return (Turn("user", _one_of(rng, self.problem.openings).format(item=self.item)),)

    def step(self, text: str) -> StepResult:
        """Take a reply of the agent; the chat ends after the second."""
        self.asked.append(asks_back(text))
        ended = len(self.asked) == TURNS
        turns = () if ended else (Turn("user", self._follow_up(text)),)
        return StepResult(turns, 1.0 if self.asked[-1] else -1.0, ended, False)

    def _follow_up(self, text: str) -> str:
        """Return the customer's next message: the answer to a known question, any answer to another, or a push."""
        if not self.asked[-1]:
            return _one_of(self.rng, PUSHES)
        known = [i for i, question in enumerate(self.problem.questions) if question.format(item=self.item) in text]
        return self.problem.answers[known[0] if known else self.rng.integers(len(self.problem.answers))]

    def labels(self) -> dict[str, object]:
        """Return `asks_back`, the share of replies so far that ask the customer something."""
        return {"asks_back": sum(self.asked) / len(self.asked)}

    def chats(self, number: int, seed: int) -> list[dict[str, Any]]:
        """Write logged chats with thumbs, as rows of `messages` and `reactions` (data_prep/chat_thumbs.py).

        Args:
          number: number of chats, each with at least one thumb.
          seed: random seed of the chats and of the thumbs.
        """
        check_episodes(number)
        rng = np.random.default_rng(seed)
        return [self._chat(rng) for _ in range(number)]

    def _chat(self, rng: np.random.Generator) -> dict[str, Any]:
        turns, reactions, ended = list(self._open(rng)), [], False
        questions = list(rng.permutation(self.problem.questions))  # no question is asked twice
        while not ended:
            text = self._reply(rng, questions)
            result = self.step(text)
            ended = result.terminated
            if rng.random() < RATED_SHARE or (ended and not reactions):
                value = int(result.reward) * (-1 if rng.random() < WRONG_SHARE else 1)
                reactions.append({"turn": len(turns), "value": value})
            turns += [Turn("assistant", text), *result.turns]
        return {"messages": [_message(turn) for turn in turns], "reactions": reactions}

    def _reply(self, rng: np.random.Generator, questions: list[str]) -> str:
        start = _one_of(rng, STARTS)
        if rng.random() < ASKED_SHARE:
            parts = (start, _one_of(rng, STEPS), questions.pop())
        else:
            first, second = rng.choice(len(VAGUE), size=2, replace=False)
            parts = (start, VAGUE[first], VAGUE[second] if rng.random() < 0.5 else "")
        return " ".join(part for part in parts if part).format(item=self.item)


def _one_of(rng: np.random.Generator, texts: Sequence[str]) -> str:
    return texts[rng.integers(len(texts))]


def _message(turn: Turn) -> Mapping[str, str]:
    return {"role": turn.role, "content": turn.content}
