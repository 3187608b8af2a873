"""The closed vocabulary of the tiny scenes: colours, kinds, places, and the words of questions."""

COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (225, 45, 45),
    "green": (50, 180, 60),
    "blue": (50, 85, 235),
    "yellow": (240, 220, 50),
    "purple": (150, 60, 200),
    "orange": (245, 140, 30),
    "cyan": (60, 215, 225),
    "white": (245, 245, 245),
}
"""Colour names and the RGB value each is drawn in (before jitter)."""

SHAPES = ("circle", "square", "triangle", "cross", "star", "ring", "diamond", "heart")
DIGITS = tuple(str(n) for n in range(10))
NUMBERS = tuple(str(n) for n in range(10, 100))
WORDS = (
    *("cat", "dog", "sun", "key", "cup", "hat", "bus", "box", "fox", "owl", "bee", "egg"),
    *("ice", "jam", "map", "pen", "pig", "tea", "toy", "van", "web", "zip", "ant", "mud"),
)
KINDS = SHAPES + DIGITS + NUMBERS + WORDS
"""Every kind of object: eight shapes, ten digits, ninety two-digit numbers, 24 written words."""

PLACES = (
    *("top-left", "top", "top-right"),
    *("left", "center", "right"),
    *("bottom-left", "bottom", "bottom-right"),
)
"""Names of the cells of a 3x3 grid, row by row."""

RELATIONS = {
    "left of": (-1, 0),
    "right of": (1, 0),
    "above": (0, -1),
    "below": (0, 1),
}
"""Relation phrases and the direction in which they look, as (dx, dy) with y pointing down."""

ORDINALS = ("first", "second", "third", "fourth")
"""Names of the images of a conversation, in order."""

EVENTS = ("stays", "appears", "disappears", "moves", "changes")
"""What can happen to an object in a video; what changes is its colour."""

SPECIALS = ("<pad>", "<bos>", "<eos>", "<unk>", "<image>")
FUNCTION_WORDS = (
    *("?", "what", "color", "shape", "number", "object", "objects", "is", "are", "there", "the"),
    *("a", "an", "at", "of", "where", "how", "many", "above", "below"),
)

LATER_WORDS = (
    *("word", "it", "in", "image", "images", "which", "shows", "happens", "to", "comes"),
    *("last", "before", "after"),
)

VOCABULARY = (
    *(*SPECIALS, *FUNCTION_WORDS, "yes", "no", *COLOURS, *PLACES, *SHAPES, *DIGITS, *NUMBERS),
    *(*WORDS, *ORDINALS, *EVENTS, *LATER_WORDS),
)
"""Every token of the tiny model; a word's position is its token id, and new words come last."""
