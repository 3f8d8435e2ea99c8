"""Commands that work on images: embed, search, explore, pack."""

import json
from functools import partial
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from moco.cli.console import print_table, say, stderr, working
from moco.cli.flags import Json

if TYPE_CHECKING:
    from moco.embeddings.table import Embeddings


Rows = tuple[tuple[str, ...], list[tuple[Any, ...]]]
"""Names of the columns, and the rows below them."""


def embed(
    source: str,
    images: str,
    /,
    *,
    out: Annotated[Path, Parameter(name=("--out", "-o"))],
    format: str = "npy",
    part: str = "train",
    batch_size: int | None = None,
    precision: str = "auto",
    as_json: Json = False,
) -> None:
    """Write the features of all images into a folder.

    If interrupted, run the same command again to resume. Files that cannot be read are listed in unreadable.csv.
    Under torchrun, each process embeds a share of the images.

    Args:
        source: Folder of a run, or a checkpoint from any supported program.
        images: Folder of images, or the name of a data set.
        out: Folder for vectors.npy, images.csv, unreadable.csv and meta.json: a new one, or an unfinished one.
        format: `npy`; `parquet` and `tensorboard` also write files of that format into the folder.
        part: `train` or `test`, if the images are divided so.
        batch_size: Images per forward pass; not given: chosen from the size of the images.
        precision: `fp32`, `bf16`, or `auto`: bf16 where it is fast.
        as_json: Print what was written as JSON.
    """
    from moco.embeddings.convert import check_format, convert
    from moco.embeddings.embed import embed_to
    from moco.embeddings.shared_writing import rank_and_world_size
    from moco.embeddings.table import UNREADABLE, read_meta

    check_format(format)
    with working(stderr()) as show:
        count = partial(show, "features")
        embed_to(out, source, images, part=part, batch_size=batch_size, precision=precision, on_progress=count)
    if rank_and_world_size()[0]:  # only the first of several processes reports
        return
    written, meta = convert(out, format), read_meta(out)
    if as_json:
        told = {"folder": str(out), "written": str(written), "rows": meta.rows, "columns": meta.columns}
        print(json.dumps(told | {"unreadable": meta.unreadable}, indent=2))
        return
    say(f"{written} holds {meta.columns} features for each of {meta.rows:,} images.")
    if meta.unreadable:
        say(f"{meta.unreadable:,} files could not be read: {out / UNREADABLE} lists them.")
    say(f"Try next: moco search {quote(str(out))} --query IMAGE --picture search.png")


def search(
    embeddings: Path,
    /,
    *,
    query: list[str] | None = None,
    row: list[int] | None = None,
    k: int = 10,
    farthest: Annotated[bool, Parameter(negative="")] = False,
    approximate: Annotated[bool, Parameter(negative="")] = False,
    duplicates: float | None = None,
    outliers: int | None = None,
    picture: Path | None = None,
    encoder: str | None = None,
    as_json: Json = False,
) -> None:
    """Find similar images, near-duplicates or outliers.

    Args:
        embeddings: Folder written by `moco embed`.
        query: One or more image files.
        row: One or more images of the table, by row number; instead of `--query`.
        k: Number of answers per query; for outliers, number of neighbours to compare with.
        farthest: Find the least similar images instead.
        approximate: Search a graph, for millions of images. The first such search builds it and keeps it in the folder.
            It may miss an answer. Needs the extra `ann`.
        duplicates: Instead of a query: find groups of images that are at least this similar, such as 0.95.
        outliers: Instead of a query: find this many images that are least similar to their nearest neighbours.
        picture: Also draw each query with its most and least similar images, as PNG or SVG.
        encoder: Where the encoder of the embeddings is now, if it has moved.
        as_json: Print the answers as JSON.
    """
    if sum(value is not None for value in (query or row, duplicates, outliers)) != 1 or (query and row):
        raise ValueError("expected one of --query IMAGE, --row NUMBER, --duplicates SIMILARITY and --outliers COUNT")
    for name, value in (("--picture", picture), ("--farthest", farthest), ("--approximate", approximate)):
        if value and not (query or row):
            raise ValueError(f"{name} was given without --query or --row; add one of them, or leave {name} out")
    from moco.embeddings.table import load

    table = load(embeddings)
    if duplicates is not None:
        columns, rows = _groups(table, duplicates)
    elif outliers is not None:
        columns, rows = _outliers(table, outliers, k)
    else:
        columns, rows = _answers(table, query or row, encoder, k, farthest, approximate, picture)
    if duplicates is not None and not rows:
        say(f"No two images are as similar as {duplicates:g}; try a lower threshold.")
    if as_json:
        print(json.dumps([dict(zip(columns, cells, strict=True)) for cells in rows], indent=2))
        return
    by_query = columns[0] == "query"
    for title in dict.fromkeys(cells[0] if by_query else "" for cells in rows):
        shown = [[str(cell) for cell in cells[by_query:]] for cells in rows if not by_query or cells[0] == title]
        print_table(title, columns[by_query:], shown)
    if picture:
        say(f"Picture: {picture}")


def _answers(
    table: "Embeddings", query: Any, encoder: str | None, k: int, farthest: bool, approximate: bool, path: Path | None
) -> Rows:
    from moco.embeddings.search import answer, picture, read_queries
    from moco.embeddings.table import images_of
    from moco.figures import save

    queries = read_queries(table, query, encoder=encoder)
    found = answer(table, queries, k=k, farthest=farthest, approximate=approximate)
    if path:
        images = images_of(table)
        if images is None:
            where = f"the first is {table.paths[0]!r}"
            say(f"The images of the table were not found ({where}); the picture shows grey squares instead.")
        save(picture(table, queries, images=images), path)
    answers = zip(found.queries, found.rows.tolist(), found.similarities.tolist(), strict=True)
    return ("query", "similarity", "class", "row", "path"), [
        (name, round(similarity, 4), table.class_of(row) or "", row, table.paths[row])
        for name, rows, similarities in answers
        for row, similarity in zip(rows, similarities, strict=True)
        if row >= 0
    ]


def _groups(table: "Embeddings", threshold: float) -> Rows:
    from moco.embeddings.duplicates import duplicates

    with working(stderr()) as show:
        groups = duplicates(table, threshold, on_progress=partial(show, "pairs"))
    rows = [(number, place, table.paths[place]) for number, each in enumerate(groups) for place in each]
    return ("group", "row", "path"), rows


def _outliers(table: "Embeddings", count: int, k: int) -> Rows:
    from moco.embeddings.duplicates import outliers

    with working(stderr()) as show:
        found = outliers(table, count, k=k, on_progress=partial(show, "neighbours"))
    pairs = zip(found.distances.tolist(), found.rows.tolist(), strict=True)
    return ("distance", "row", "path"), [(round(distance, 4), place, table.paths[place]) for distance, place in pairs]


def explore(
    source: str,
    /,
    *,
    save: Path | None = None,
    most: Annotated[int | None, Parameter(name="--max")] = None,
    layout: Literal["tsne", "pca", "umap", "pacmap"] = "tsne",
    host: str = "127.0.0.1",
    port: int = 0,
    browser: Annotated[bool, Parameter(name="--open", negative="--no-open")] = True,
    as_json: Json = False,
) -> None:
    """Show all images as a map in a browser.

    Args:
        source: Folder of a run, whose training images are embedded; or a folder written by `moco embed`.
        save: Write the map to this single file, which opens without a server, and start no server.
        most: Most images on the map, evenly spaced if there are more; not given: 5,000 for a run, else 100,000.
        layout: Method that places the images; `umap` and `pacmap` need the extra `maps`.
        host: Address to listen on; for any but 127.0.0.1, the printed URL contains an access token.
        port: Port to listen on; 0: any free port.
        browser: Open a browser.
        as_json: Print the location of the page as JSON.
    """
    from moco.explore.atlas import MOST_OF_RUN, open_atlas
    from moco.explore.server import serve, show
    from moco.explore.single_file import save_page

    with working(stderr()) as tell:
        most = MOST_OF_RUN if save and most is None else most
        atlas = open_atlas(source, most=most, layout=layout, on_progress=tell)
    if save:
        save_page(atlas, save)
        print(json.dumps({"page": str(save), "images": len(atlas.embeddings)}) if as_json else save)
        return
    with serve(atlas, host=host, port=port) as server:
        print(json.dumps({"url": server.url, "images": len(atlas.embeddings)}) if as_json else server.url, flush=True)
        if browser:
            show(server.url)
        say("Press Ctrl-C to stop.")
        server.serve_forever()


def pack(
    images: str,
    out: Path,
    /,
    *,
    shard_size: float = 512.0,
    workers: int | None = None,
    max_bad: float = 0.01,
    as_json: Json = False,
) -> None:
    """Pack images into tar shards. If interrupted, run the same command again to resume.

    Args:
        images: Folder of images, other shards, or `hf:NAME`.
        out: A new folder, or an unfinished one.
        shard_size: Size of a shard in MiB.
        workers: Shards written at the same time; not given: one per core.
        max_bad: Largest fraction of unreadable images to leave out; above it, packing stops with an error.
        as_json: Print what was written as JSON.
    """
    from moco.data.packing.pack import pack as write

    with working(stderr()) as show:
        count = partial(show, "images")
        packed = write(images, out, shard_size=shard_size, workers=workers, max_bad=max_bad, on_progress=count)
    if as_json:
        print(json.dumps(packed._asdict() | {"folder": str(packed.folder)}, indent=2))
        return
    size = f"{packed.images:,} images in {packed.shards} shards, {packed.size / 2**30:.3g} GiB"
    say(f"{packed.folder} holds {size}; all were read back and compared.")
    if packed.unreadable:
        say(f"{len(packed.unreadable):,} files could not be read: pack.json lists them.")
    say(f"Try next: moco pretrain --data {quote(str(packed.folder))}")
