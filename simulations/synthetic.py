"""SYNTHETIC domains for the demo: invented catalogs and invented shoppers. Nothing here is real data.

Items read like a catalog row: `title: winter pearl bamboo watering can`, `brand: maple works`,
`category: garden, watering`. What shoppers do next follows four rules that similarity of texts does not
give away, but that a text model can learn, since every cause is a word in the text:

1. *Projects* (own to each domain). Product types form rings of four that cross the categories; a shopper
   walks along a ring: after the `milk jug` comes the `oven glove`. Rings are drawn at random.
2. *Seasons* (shared by all domains). The next thing is bought for the next season: winter, then spring.
3. *Tastes* (shared by all domains). Colours and materials fall into four groups drawn at random; a shopper
   keeps to one group, so `plum` predicts `cork` in every domain.
4. *Brands* (own to each domain) each serve one taste.

Shared rules are why merging is worth something: every domain's task vector learns them, from fewer shoppers
than all domains together have. A text-similarity ranking instead offers the same type again. Each event
breaks each rule with some probability (`Behaviour`), so no model can be perfect.

Every word of a title or category is one token for the embedded encoder, so its frozen embedding is known.

    >>> kitchen = make_domain("kitchen", seed=0)
    >>> kitchen.synthetic, len(kitchen.item_ids), len(kitchen.user_ids)
    (True, 384, 960)
"""

from __future__ import annotations

import zlib
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from clients.data.domain import Domain
from common.errors import ConfigError

GENERATOR_VERSION = 1
SEASONS = ("winter", "spring", "summer", "autumn")
COLOURS = (
    "white", "black", "red", "blue", "green", "yellow", "orange", "purple", "silver", "golden", "plum",
    "pearl",
)  # fmt: skip
MATERIALS = (
    "steel", "oak", "bamboo", "leather", "cotton", "glass", "copper", "clay", "wool", "cork", "marble",
    "silk",
)  # fmt: skip
BRAND_FIRST = (
    "harbor", "maple", "river", "stone", "north", "bright", "wild", "little", "old", "royal", "urban", "pine",
)  # fmt: skip
BRAND_LAST = ("lane", "house", "field", "works", "valley", "brothers", "supply", "point")
TASTES = 4
BRANDS_PER_TASTE = 2
RING = 4

# domain -> category -> four product types; the order of domains is the order of `write_domains`.
PRODUCTS: dict[str, dict[str, tuple[str, ...]]] = {
    "kitchen": {
        "coffee": ("coffee machine", "coffee mill", "milk jug", "tea kettle"),
        "baking": ("cake tin", "rolling pin", "mixing bowl", "cookie cutter"),
        "cooking": ("sauce pan", "soup pot", "cutting board", "pepper mill"),
        "dining": ("dinner plate", "wine cup", "table cloth", "serving spoon"),
        "storage": ("spice rack", "bread box", "jar", "lunch bag"),
        "cleaning": ("dish towel", "sponge holder", "apron", "oven glove"),
    },
    "garden": {
        "planting": ("seed tray", "flower pot", "plant label", "herb basket"),
        "tools": ("hand rake", "digging fork", "hedge knife", "shovel"),
        "watering": ("watering can", "hose", "rain barrel", "water pump"),
        "wildlife": ("bird feeder", "bee hotel", "bird bath", "butterfly box"),
        "seating": ("bench", "deck chair", "picnic table", "swing"),
        "lighting": ("lantern", "fire bowl", "light string", "torch"),
    },
    "outdoor": {
        "shelter": ("tent", "sleeping bag", "camp bed", "ground sheet"),
        "cooking": ("camp stove", "travel kettle", "water bottle", "folding cup"),
        "navigation": ("compass", "map case", "whistle", "head lamp"),
        "climbing": ("climbing rope", "chalk bag", "helmet", "harness"),
        "water": ("canoe paddle", "dry bag", "life vest", "fishing rod"),
        "clothing": ("rain jacket", "hiking boot", "hat", "trail glove"),
    },
    "office": {
        "writing": ("fountain pen", "pencil", "marker", "ink bottle"),
        "paper": ("notebook", "letter paper", "sketch pad", "envelope"),
        "desk": ("desk lamp", "pen tray", "paper clip", "book stand"),
        "planning": ("wall calendar", "diary", "address book", "memo board"),
        "craft": ("glue stick", "paper knife", "rubber stamp", "wax seal"),
        "carrying": ("pencil case", "document folder", "messenger bag", "card holder"),
    },
    "pet": {
        "feeding": ("dog bowl", "cat dish", "treat jar", "water fountain"),
        "walking": ("dog collar", "walking lead", "dog coat", "travel crate"),
        "sleeping": ("dog bed", "cat cushion", "pet blanket", "sleeping mat"),
        "play": ("rubber ball", "toy bone", "feather stick", "cat tunnel"),
        "care": ("pet brush", "nail file", "dog soap", "bath towel"),
        "small": ("mouse wheel", "rabbit house", "fish tank", "bird cage"),
    },
}  # fmt: skip
DEFAULT_DOMAINS = ("kitchen", "garden", "outdoor", "office")
# Domains differ in size, as companies do: share of `Behaviour.users`, in the order of PRODUCTS.
SIZES = (1.2, 1.0, 0.85, 0.75, 0.75)

IntArray = npt.NDArray[np.int32]


@dataclass(frozen=True)
class Behaviour:
    """How many shoppers, how long their histories (inclusive bounds), and how often they keep each rule."""

    users: int = 800
    min_history: int = 5
    max_history: int = 12
    follow_project: float = 0.85
    follow_season: float = 0.75
    follow_taste: float = 0.85
    any_item: float = 0.03


@dataclass(frozen=True)
class _World:
    """What is drawn once: item of each (type, season, taste), and the type that follows in each ring."""

    item_TSA: IntArray
    next_RT: IntArray


def write_domains(
    folder: Path,
    seed: int = 0,
    *,
    domains: Sequence[str] = DEFAULT_DOMAINS,
    behaviour: Behaviour | None = None,
) -> list[Path]:
    """Write each domain as a canonical folder under `folder`; returns the folders in order.

    The same seed gives the same bytes. Raises ConfigError for an unknown domain.
    """
    paths = []
    for name in domains:
        path = folder / name
        make_domain(name, seed, behaviour).save(path)
        paths.append(path)
    return paths


def make_domain(name: str, seed: int = 0, behaviour: Behaviour | None = None) -> Domain:
    """One synthetic domain: 6 categories x 4 types x 4 seasons x 4 tastes = 384 items."""
    if name not in PRODUCTS:
        raise ConfigError(f"no synthetic domain {name!r}", next_step=f"domains are {', '.join(PRODUCTS)}")
    behaviour = behaviour or Behaviour()
    shared = np.random.default_rng([seed, 0])
    own = np.random.default_rng([seed, zlib.crc32(name.encode())])
    titles, brands, categories, item_TSA = _catalog(name, shared, own)
    world = _World(item_TSA, _rings(own, item_TSA.shape[0]))
    users = max(2, round(behaviour.users * SIZES[list(PRODUCTS).index(name)]))
    histories = [_shop(world, behaviour, own) for _ in range(users)]
    return Domain(
        name=name,
        item_ids=[f"{name}-{number:03d}" for number in range(1, len(titles) + 1)],
        attributes={"title": titles, "brand": brands, "category": categories},
        user_ids=[f"shopper-{number:04d}" for number in range(1, users + 1)],
        train=[history[:-2] for history in histories],
        valid=np.array([history[-2] for history in histories], dtype=np.int32),
        test=np.array([history[-1] for history in histories], dtype=np.int32),
        public_attributes=("title", "brand", "category"),
        synthetic=True,
        provenance={
            "format": "synthetic",
            "note": "generated by simulations/synthetic.py; no real items, shops or people",
            "generator_version": GENERATOR_VERSION,
            "seed": seed,
            "behaviour": asdict(behaviour),
        },
    )


def _catalog(
    name: str, shared: np.random.Generator, own: np.random.Generator
) -> tuple[list[str], list[str], list[str], IntArray]:
    """Texts of all items in a random order, and the item index of each (type, season, taste)."""
    colours_AC = shared.permutation(COLOURS).reshape(TASTES, -1)
    materials_AC = shared.permutation(MATERIALS).reshape(TASTES, -1)
    first = own.permutation(BRAND_FIRST)[: TASTES * BRANDS_PER_TASTE]
    last = own.permutation(BRAND_LAST)[: TASTES * BRANDS_PER_TASTE]
    brand_names = [f"{a} {b}" for a, b in zip(first, last, strict=True)]
    types = [(noun, category) for category, nouns in PRODUCTS[name].items() for noun in nouns]
    shape = (len(types), len(SEASONS), TASTES)
    order = own.permutation(int(np.prod(shape))).astype(np.int32)
    titles, brands, categories = ([""] * len(order) for _ in range(3))
    item_TSA = order.reshape(shape)
    for (t, s, a), item in np.ndenumerate(item_TSA):
        noun, category = types[t]
        colour, material = own.choice(colours_AC[a]), own.choice(materials_AC[a])
        titles[item] = f"{SEASONS[s]} {colour} {material} {noun}"
        brands[item] = brand_names[a * BRANDS_PER_TASTE + int(own.integers(BRANDS_PER_TASTE))]
        categories[item] = f"{name}, {category}"
    return titles, brands, categories, item_TSA


def _rings(rng: np.random.Generator, types: int) -> IntArray:
    """The next type of every type, for two independent sets of rings: a type is in two projects."""
    next_RT = np.zeros((2, types), dtype=np.int32)
    for ring_set in next_RT:
        rings = rng.permutation(types).reshape(-1, RING)
        ring_set[rings] = np.roll(rings, -1, axis=1)
    return next_RT


def _shop(world: _World, behaviour: Behaviour, rng: np.random.Generator) -> IntArray:
    """One history of item indices, oldest first."""
    types, seasons, tastes = world.item_TSA.shape
    project, kind, season = rng.integers(2), rng.integers(types), rng.integers(seasons)
    favourite = rng.integers(tastes)
    history = []
    for _ in range(int(rng.integers(behaviour.min_history, behaviour.max_history + 1))):
        if rng.random() < behaviour.any_item:
            history.append(rng.integers(world.item_TSA.size))
            continue
        taste = favourite if rng.random() < behaviour.follow_taste else rng.integers(tastes)
        history.append(world.item_TSA[kind, season, taste])
        if rng.random() < behaviour.follow_project:
            kind = world.next_RT[project, kind]
        else:
            project, kind = rng.integers(2), rng.integers(types)
        follow = rng.random() < behaviour.follow_season
        season = (season + 1) % seasons if follow else rng.integers(seasons)
    return np.array(history, dtype=np.int32)
