"""Masks as polygons: outlines with holes and parts, simplified, and joined to one where needed."""

from __future__ import annotations

from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

Points = NDArray[np.float64]
TOLERANCE = 0.5  # pixels

# Steps along pixel edges with the mask on the right: east, south, west, north (y points down).
_STEPS = ((1, 0), (0, 1), (-1, 0), (0, -1))


def outlines(mask: NDArray[np.bool_]) -> list[Points]:
    """Trace the outlines of a mask through the middles of the edges between pixels.

    Args:
        mask: ``(H, W)`` bool.

    Returns:
        Closed polygons ``(n, 2)``, x and y in pixels. Parts run clockwise as seen on a screen,
        holes the other way round, so that their signed areas add up to that of the mask.

    Example:
        >>> outlines(np.array([[True]]))[0].tolist()
        [[0.5, 0.0], [1.0, 0.5], [0.5, 1.0], [0.0, 0.5]]
    """
    edges = _edges(mask)
    found = []
    while edges:
        start = next(iter(edges))
        x, y, direction = start
        loop = []
        while (x, y, direction) in edges:
            del edges[x, y, direction]
            dx, dy = _STEPS[direction]
            loop.append((x + dx / 2, y + dy / 2))
            x, y = x + dx, y + dy
            # Right first: pixels that touch at a corner stay apart.
            for turn in (1, 0, 3):
                if (x, y, (direction + turn) % 4) in edges:
                    direction = (direction + turn) % 4
                    break
        found.append(np.array(loop))
    return found


def _edges(mask: NDArray[np.bool_]) -> dict[tuple[int, int, int], None]:
    """Directed edges between pixels of the mask and others: x, y where they start, direction."""
    m = np.pad(mask, 1)
    here = m[1:-1, 1:-1]
    # An edge above a pixel runs east, right of it south, below it west, left of it north.
    sides = (
        (here & ~m[:-2, 1:-1], 0, 0),
        (here & ~m[1:-1, 2:], 1, 0),
        (here & ~m[2:, 1:-1], 1, 1),
        (here & ~m[1:-1, :-2], 0, 1),
    )
    edges: dict[tuple[int, int, int], None] = {}  # in order, unlike a set
    for direction, (on, dx, dy) in enumerate(sides):
        rows, columns = on.nonzero()
        for row, column in zip(rows.tolist(), columns.tolist(), strict=True):
            edges[column + dx, row + dy, direction] = None
    return edges


def simplify(polygon: Points, tolerance: float = TOLERANCE) -> Points:
    """Leave out points of a closed polygon (Douglas and Peucker).

    Args:
        polygon: ``(n, 2)``.
        tolerance: No point left out is further from the result, in pixels.

    Returns:
        Some of the points, in order; at least three where they are not all on a line.
    """
    if len(polygon) <= 4:
        return polygon
    # Two points far from each other are kept; what lies between them is simplified.
    first = int(((polygon - polygon.mean(0)) ** 2).sum(1).argmax())
    points = np.roll(polygon, -first, axis=0)
    second = int(((points - points[0]) ** 2).sum(1).argmax())
    points = np.concatenate([points, points[:1]])
    kept = {0, second, len(points) - 1}
    spans = [(0, second), (second, len(points) - 1)]
    while spans:
        low, high = spans.pop()
        if high - low < 2:
            continue
        far = _distances(points[low + 1 : high], points[low], points[high])
        worst = int(far.argmax())
        if far[worst] > tolerance:
            middle = low + 1 + worst
            kept.add(middle)
            spans += [(low, middle), (middle, high)]
    if len(kept) < 4:  # the last is the first again
        far = _distances(points, points[0], points[second])
        kept.add(int(far.argmax()))
    return points[sorted(kept)[:-1]]


def _distances(points: Points, start: Points, end: Points) -> Points:
    """Distances of points from the segment between two."""
    along = end - start
    length = float((along**2).sum())
    offset = points - start
    place = (offset @ along / length).clip(0, 1) if length > 0 else np.zeros(len(points))
    apart: Points = np.sqrt(((offset - place[:, None] * along) ** 2).sum(1))
    return apart


def joined(polygons: list[Points]) -> Points:
    """Join polygons into one, by lines without width to and fro between nearest points.

    Filled by either rule (even-odd or winding), it covers what the polygons of :func:`outlines` do:
    all parts, without the holes.

    Args:
        polygons: At least one.

    Returns:
        ``(n, 2)``.
    """
    whole, *others = sorted(polygons, key=len, reverse=True)
    while others:
        best = None
        for number, other in enumerate(others):
            apart = ((whole[:, None] - other[None]) ** 2).sum(2)
            near = int(apart.argmin())
            if best is None or apart.flat[near] < best[0]:
                best = (float(apart.flat[near]), number, *divmod(near, len(other)))
        assert best is not None
        _, number, i, j = best
        other = np.roll(others.pop(number), -j, axis=0)
        whole = np.concatenate([whole[: i + 1], other, other[:1], whole[i:]])
    return whole


def mask_polygons(mask: NDArray[np.bool_], tolerance: float = TOLERANCE) -> list[Points]:
    """Return the simplified outlines of a mask: parts clockwise, holes the other way round."""
    return [simplify(polygon, tolerance) for polygon in outlines(mask)]


def area(polygon: Points) -> float:
    """Return the signed area of a polygon in pixels, positive where it runs clockwise."""
    closed = np.concatenate([polygon, polygon[:1]])
    return sum(float(x1 * y2 - x2 * y1) for (x1, y1), (x2, y2) in pairwise(closed)) / 2
