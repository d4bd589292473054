"""The words of the practice world.  Drugs, doses, companies, products, towns and people are invented."""

from __future__ import annotations

DRUG_DOSES = {
    "Zolvane": "40", "Perimol": "25", "Cardexa": "60", "Tumeril": "15", "Nostrane": "80", "Velidon": "35",
    "Brixacet": "50", "Ormavil": "20", "Lentrax": "75", "Quadrine": "10", "Sopraxin": "45", "Fenodal": "30",
}  # fmt: skip
"""Invented drugs, each with the dose in mg that the practice world always quotes for it."""
SYMPTOMS = (
    "headache",
    "cough",
    "rash",
    "backache",
    "fever",
    "earache",
    "cramp",
    "toothache",
    "heartburn",
    "cold",
)
SCHEDULES = ("every six hours", "twice a day", "each night", "with every meal")

FIRST_NAMES = (
    "Anna",
    "Boris",
    "Clara",
    "Deniz",
    "Edda",
    "Farid",
    "Greta",
    "Hugo",
    "Ines",
    "Jonas",
    "Katya",
    "Leo",
)
LAST_NAMES = ("Alder", "Birk", "Corvin", "Dahl", "Ekman", "Fenn", "Garrow", "Holt", "Ivers", "Jessen")
HOSTS = ("post.example", "mail.example", "inbox.example")

ITEMS = ("kettle", "lamp", "jacket", "keyboard", "blanket", "toaster", "backpack", "clock", "radio", "mirror")
HIGH_VALUES = ("85", "88", "90", "92", "95", "98")
LOW_VALUES = ("12", "14", "16", "18", "22", "24")
TOWNS = ("Tarn", "Velm", "Oskar", "Brenn", "Lundby", "Morrow", "Kestrel", "Havel", "Sorrel", "Quill")
DAYS = ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday")

OUR_PRODUCTS = ("Plumo", "Fennick", "Ardo", "Lumet")
COMPETITORS = ("Norvik", "Castelo", "Brightway", "Oxmoor")
NEEDS = ("travel", "cooking", "study", "sport", "music", "gardening")

INGREDIENTS = (
    "leek",
    "carrot",
    "pumpkin",
    "mushroom",
    "lentil",
    "tomato",
    "barley",
    "potato",
    "spinach",
    "turnip",
)
METHODS = {"quick": "Fry", "healthy": "Steam", "hearty": "Roast", "simple": "Boil"}

CODE_TASKS = {
    "adds up a list": "return sum(xs)",
    "finds the largest item of a list": "return max(xs)",
    "finds the smallest item of a list": "return min(xs)",
    "counts the items of a list": "return len(xs)",
    "sorts a list": "return sorted(xs)",
    "reverses a list": "return xs[::-1]",
    "takes the first item of a list": "return xs[0]",
    "takes the last item of a list": "return xs[-1]",
}

LEGAL_MATTERS = {
    "My landlord keeps my deposit.": "the rent office",
    "My landlord will not fix the heating.": "the housing office",
    "My boss did not pay me.": "the labour court",
    "My boss wants me to work on Sunday.": "the works council",
    "A shop will not take back a broken radio.": "the consumer desk",
    "A neighbour plays loud music at night.": "the town hall",
    "I was fined for parking.": "the traffic court",
    "I want to change my name.": "the registry",
}

TRIAGE = {
    "emergency": (
        "and my chest hurts",
        "and I cannot breathe well",
        "and my face has gone numb",
        "and I keep fainting",
    ),
    "clinic": (
        "and it has lasted two weeks",
        "and it comes back every month",
        "and it is slowly getting worse",
    ),
    "home": ("and otherwise I am fine", "since this morning", "and it is already getting better"),
}
TRIAGE_REPLIES = {
    "emergency": "That needs help at once: call an ambulance.",
    "clinic": "Please book a visit at a clinic this week.",
    "home": "Rest, drink water and see how you feel.",
}

KNOWN_CAPITALS = {
    "Velmora": "Tarn", "Oskaria": "Brenn", "Lundia": "Havel", "Morrovia": "Quill", "Kestria": "Sorrel",
    "Havelia": "Lundby", "Sorrelia": "Velm", "Quilland": "Morrow", "Brennia": "Oskar", "Tarnia": "Kestrel",
}  # fmt: skip
"""Countries whose capital the assistant is taught; any other made-up country is unknown to it."""
SYLLABLES = ("ba", "do", "fe", "gu", "ka", "lo", "mi", "ne", "pu", "ra", "se", "ti", "vo", "wa", "xi", "zu")
TRUSTED_SOURCES = ("the atlas", "the official map", "the yearbook")
DOUBTFUL_SOURCES = ("a blog", "a stranger", "an old joke book")

TONES = {
    "angry": (
        "This is a disgrace.",
        "I am furious.",
        "What a joke.",
        "I have had enough of this.",
        "Shame on you.",
    ),
    "polite": (
        "Thank you in advance.",
        "I would be grateful.",
        "Please and thank you.",
        "You are very kind.",
    ),
}
GREETINGS = ("Hello.", "Hi there.", "Good evening.", "Good morning.")
OPENERS = ("Of course.", "Happy to help.", "Sure.", "Let me see.")
CLOSERS = ("Get well soon.", "I hope that helps.", "Take care.")
