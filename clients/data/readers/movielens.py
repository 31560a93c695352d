"""MovieLens: 100K (`u.data`, `u.item`), 1M (`ratings.dat`, `movies.dat`), 20M/25M/latest (`ratings.csv`).

Every rating is an interaction, whatever its value. Titles keep their year; genres become the category.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

from clients.data.readers._csv import csv_rows
from clients.data.readers._folder import files_in
from clients.data.readers._lines import bare_name, text_lines
from clients.data.readers._options import ReadOptions
from clients.data.readers._reviews import add_row
from clients.data.records import InteractionsBuilder, Issues, Items, Place, Records, clean_text, parse_id
from common.errors import DataError

NAME = "movielens"
_PAIRS = {"u.data": "u.item", "ratings.dat": "movies.dat", "ratings.csv": "movies.csv"}
# The order of the 19 genre flags of `u.item`, as `u.genre` of the 100K release lists them.
GENRES = (
    "unknown", "Action", "Adventure", "Animation", "Children's", "Comedy", "Crime", "Documentary", "Drama",
    "Fantasy", "Film-Noir", "Horror", "Musical", "Mystery", "Romance", "Sci-Fi", "Thriller", "War", "Western",
)  # fmt: skip
Row = tuple[int, list[str]]


def _ratings_file(path: Path) -> Path | None:
    names = {bare_name(p): p for p in files_in(path)}
    if not path.is_dir():
        names[bare_name(path)] = path
    wanted = set(_PAIRS) if path.is_dir() else {bare_name(path)}
    found = [
        names[name] for name, movies in _PAIRS.items() if name in wanted and {name, movies} <= set(names)
    ]
    return found[0] if found else None


def matches(path: Path) -> bool:
    """Whether a ratings file of one of the releases has its movies file beside it."""
    return _ratings_file(path) is not None


def read(path: Path, issues: Issues, options: ReadOptions) -> Records:
    """Read both files of whichever release it is."""
    ratings = _ratings_file(path)
    if ratings is None:
        pairs = ", ".join(f"{a} with {b}" for a, b in _PAIRS.items())
        raise DataError(f"{path}: no MovieLens files here", next_step=f"expected {pairs}")
    kind = bare_name(ratings)
    names = {bare_name(p): p for p in files_in(ratings)}
    movies = options.items or names[_PAIRS[kind]]
    builder = InteractionsBuilder(ratings.name)
    rows, texts = _READERS[kind]
    for number, fields in rows(ratings, issues, options):
        raw = (fields[0], fields[1], fields[3])
        add_row(builder, issues, Place(ratings.name, number), raw, "user, item, rating, timestamp")
    items = Items(movies.name)
    for number, (movie, title, genres) in texts(movies, issues, options):
        item = parse_id(movie)
        if item is None:
            issues.add("corrupt-lines", Place(movies.name, number), "the movie id is empty or no id")
            continue
        genre = "" if genres == "(no genres listed)" else genres.replace("|", ", ")
        attributes = {"title": clean_text(title), "category": clean_text(genre)}
        items.add(item, attributes, number, builder.items)
    return Records(NAME, builder.build(), items, (ratings, movies))


def _split(
    path: Path, issues: Issues, options: ReadOptions, separator: str, width: int, encoding: str
) -> Iterator[Row]:
    for number, line in text_lines(path, issues, options.report, encoding):
        fields = line.split(separator)
        if len(fields) == width:
            yield number, fields
        else:
            what = f"{len(fields)} fields, expected {width}"
            issues.add("corrupt-lines", Place(path.name, number), what)


def _data_100k(path: Path, issues: Issues, options: ReadOptions) -> Iterator[Row]:
    return _split(path, issues, options, "\t", 4, "utf-8")


def _item_100k(path: Path, issues: Issues, options: ReadOptions) -> Iterator[Row]:
    for number, fields in _split(path, issues, options, "|", 5 + len(GENRES), "latin-1"):
        flagged = [name for name, flag in zip(GENRES[1:], fields[6:], strict=True) if flag == "1"]
        yield number, [fields[0], fields[1], "|".join(flagged)]


def _ratings_dat(path: Path, issues: Issues, options: ReadOptions) -> Iterator[Row]:
    return _split(path, issues, options, "::", 4, "latin-1")


def _movies_dat(path: Path, issues: Issues, options: ReadOptions) -> Iterator[Row]:
    return _split(path, issues, options, "::", 3, "latin-1")


def _ratings_csv(path: Path, issues: Issues, options: ReadOptions) -> Iterator[Row]:
    columns = ("userId", "movieId", "rating", "timestamp")
    for number, row in csv_rows(path, issues, options.report, required=columns):
        yield number, [row[name] for name in columns]


def _movies_csv(path: Path, issues: Issues, options: ReadOptions) -> Iterator[Row]:
    columns = ("movieId", "title", "genres")
    for number, row in csv_rows(path, issues, options.report, required=columns):
        yield number, [row[name] for name in columns]


_Rows = Callable[[Path, Issues, ReadOptions], Iterator[Row]]
_READERS: dict[str, tuple[_Rows, _Rows]] = {
    "u.data": (_data_100k, _item_100k),
    "ratings.dat": (_ratings_dat, _movies_dat),
    "ratings.csv": (_ratings_csv, _movies_csv),
}
