"""The equations as loops over Python floats: slow, short, and independent of the package.

Every function works on one image, unless it says so. Tensors are nested lists, as
``Tensor.tolist()`` makes them, with the shape beside each. Sizes are ``(height, width)``; boxes are
``[x1, y1, x2, y2]`` in pixels, half open.
Positions are fractions, so that a cell centre on the border of a box is decided exactly.
"""

import math
from fractions import Fraction

# ----------------------------------------------------------------------------------------- vectors


def dot(a, b):
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += x * y
    return total


def ratio(a, b):
    return a / b if b != 0 else 0.0


def cosine(a, b):
    norms = math.sqrt(dot(a, a)) * math.sqrt(dot(b, b))
    return dot(a, b) / norms if norms > 0 else 0.0


def vector_at(f, i, j):  # f: [D][h][w] -> [D]
    return [channel[i][j] for channel in f]


def size_of(plane):  # [h][w]
    return len(plane), len(plane[0])


def positions(size):
    return [(i, j) for i in range(size[0]) for j in range(size[1])]


def plane_of(size, value):  # -> [h][w], value(i, j) at each position
    return [[value(i, j) for j in range(size[1])] for i in range(size[0])]


def bilinear(plane, size, align_corners=False):  # plane: [h][w] -> [H][W]
    def source(i, cells, pixels):
        if align_corners:
            position = i * (cells - 1) / (pixels - 1) if pixels > 1 else 0.0
        else:
            position = max((i + 0.5) * cells / pixels - 0.5, 0.0)
        low = min(int(position), cells - 1)
        return low, min(low + 1, cells - 1), position - low

    def value(i, j):
        top, bottom, y = source(i, len(plane), size[0])
        left, right, x = source(j, len(plane[0]), size[1])
        upper = (1 - x) * plane[top][left] + x * plane[top][right]
        lower = (1 - x) * plane[bottom][left] + x * plane[bottom][right]
        return (1 - y) * upper + y * lower

    return plane_of(size, value)


# ------------------------------------------------------------------------------------------- boxes


def box_cells(box, image_size, map_size):  # -> [h][w] bool
    x1, y1, x2, y2 = (Fraction(x) for x in box)
    (height, width), (h, w) = image_size, map_size
    row = min(max(math.floor((y1 + y2) / 2 * h / height), 0), h - 1)
    column = min(max(math.floor((x1 + x2) / 2 * w / width), 0), w - 1)

    def belongs(i, j):
        cy = (i + Fraction(1, 2)) * height / h
        cx = (j + Fraction(1, 2)) * width / w
        return (x1 <= cx < x2 and y1 <= cy < y2) or (i == row and j == column)

    return plane_of(map_size, belongs)


def box_coverage(box, image_size, map_size):  # -> [h][w]: the share of each cell in the box
    x1, y1, x2, y2 = (Fraction(x) for x in box)
    dy, dx = Fraction(image_size[0], map_size[0]), Fraction(image_size[1], map_size[1])

    def common(low, high, i, step):  # length of [low, high) within cell i
        return max(min(high, (i + 1) * step) - max(low, i * step), Fraction(0))

    return plane_of(
        map_size,
        lambda i, j: float(common(y1, y2, i, dy) * common(x1, x2, j, dx) / (dy * dx)),
    )


def box_bins(box, bins):  # -> [bins * bins][4], row by row, as fractions
    x1, y1, x2, y2 = (Fraction(x) for x in box)
    dx, dy = (x2 - x1) / bins, (y2 - y1) / bins
    return [
        [x1 + j * dx, y1 + i * dy, x1 + (j + 1) * dx, y1 + (i + 1) * dy]
        for i in range(bins)
        for j in range(bins)
    ]


def valid_cells(valid, map_size):  # valid: [H][W] bool -> [h][w] bool
    (height, width), (h, w) = size_of(valid), map_size

    def under_the_centre(i, j):
        y = math.floor((i + Fraction(1, 2)) * height / h)
        x = math.floor((j + Fraction(1, 2)) * width / w)
        return valid[y][x]

    return plane_of(map_size, under_the_centre)


def everywhere(size):  # -> [h][w] bool
    return plane_of(size, lambda i, j: True)


def definite_background(boxes, image_size, map_size, valid=None):  # [K][4] -> M: [h][w] in {0, 1}
    cells = [box_cells(box, image_size, map_size) for box in boxes]
    shown = valid_cells(valid, map_size) if valid is not None else everywhere(map_size)

    def outside(i, j):
        return 1.0 if shown[i][j] and not any(mask[i][j] for mask in cells) else 0.0

    return plane_of(map_size, outside)


# ------------------------------------------------------------------------------ Eq. 1-3: attention


def grid_prototypes(f, m, n):  # f: [D][h][w], m: [h][w] -> [n * n][D], [n * n] bool
    h, w = size_of(m)
    prototypes, valid = [], []
    for row in range(n):
        for column in range(n):
            members = [
                (i, j)
                for i, j in positions((h, w))
                if i * n // h == row and j * n // w == column and m[i][j] != 0
            ]
            valid.append(len(members) > 0)
            prototypes.append(
                [sum(channel[i][j] for i, j in members) / max(len(members), 1) for channel in f]
            )
    return prototypes, valid


def background_similarity(vector, prototypes, valid, reduction="mean"):
    # [D], [n * n][D], [n * n] -> number
    scores = [max(cosine(vector, q), 0.0) for q, ok in zip(prototypes, valid, strict=True) if ok]
    if reduction == "max":
        return max(scores, default=0.0)
    return sum(scores) / len(scores) if scores else 0.0


def background_attention(f, m, n, reduction="mean"):
    # f: [D][h][w], m: [h][w] -> A: [h][w], q: [n * n][D], [n * n]
    prototypes, valid = grid_prototypes(f, m, n)

    def attention(i, j):
        if m[i][j] != 0:
            return 1.0
        return background_similarity(vector_at(f, i, j), prototypes, valid, reduction)

    return plane_of(size_of(m), attention), prototypes, valid


# ---------------------------------------------------------------------------------- Eq. 4: pooling


def too_little_background(m, shown, min_background):  # m, shown: [h][w]
    inside = [m[i][j] for i, j in positions(size_of(m)) if shown[i][j]]
    return not inside or sum(inside) / len(inside) <= min_background


def weighted_mean(vectors, weights, dimension):  # [n][D], [n] -> [D]
    total = sum(weights)
    if total == 0:
        return [0.0] * dimension
    return [
        sum(w * v[d] for v, w in zip(vectors, weights, strict=True)) / total
        for d in range(dimension)
    ]


def background_aware_pooling(
    f, boxes, image_size, n=4, output_size=1, min_background=0.0, attention=True, valid=None
):  # f: [D][h][w], boxes: [K][4] -> r: [K][s * s][D], q: [n * n][D], [n * n], A: [h][w]
    map_size = size_of(f[0])
    m = definite_background(boxes, image_size, map_size, valid)
    shown = valid_cells(valid, map_size) if valid is not None else everywhere(map_size)
    a, q, q_valid = background_attention(f, m, n)
    if not attention or too_little_background(m, shown, min_background):
        a = m
    pooled = []
    for box in boxes:
        vectors = []
        for part in box_bins(box, output_size):
            cells = box_cells(part, image_size, map_size)
            members = [(i, j) for i, j in positions(map_size) if cells[i][j] and shown[i][j]]
            vectors.append(
                weighted_mean(
                    [vector_at(f, i, j) for i, j in members],
                    [1 - a[i][j] for i, j in members],
                    len(f),
                )
            )
        pooled.append(vectors)
    return pooled, q, q_valid, a


def interpolate(plane, y, x):  # plane: [h][w], a point in cells: RoIAlign's bilinear sample
    h, w = size_of(plane)
    if y < -1 or y > h or x < -1 or x > w:
        return 0.0
    y, x = min(max(y, 0.0), h - 1.0), min(max(x, 0.0), w - 1.0)
    top, left = int(y), int(x)
    bottom, right = min(top + 1, h - 1), min(left + 1, w - 1)
    dy, dx = y - top, x - left
    upper = (1 - dx) * plane[top][left] + dx * plane[top][right]
    lower = (1 - dx) * plane[bottom][left] + dx * plane[bottom][right]
    return (1 - dy) * upper + dy * lower


def roi_align(f, box, image_size, roi_size, ratio=2):  # f: [D][h][w] -> [roi_size][roi_size][D]
    (height, width), (h, w) = image_size, size_of(f[0])
    # aligned: the centre of cell (0, 0) is at (0, 0), so half a cell is taken off.
    left, top = box[0] * w / width - 0.5, box[1] * h / height - 0.5
    bin_w = (box[2] - box[0]) * w / width / roi_size
    bin_h = (box[3] - box[1]) * h / height / roi_size

    def sample(i, j):
        points = [
            (top + (i + (a + 0.5) / ratio) * bin_h, left + (j + (b + 0.5) / ratio) * bin_w)
            for a in range(ratio)
            for b in range(ratio)
        ]
        return [sum(interpolate(plane, y, x) for y, x in points) / len(points) for plane in f]

    return plane_of((roi_size, roi_size), sample)


def roi_pooling(
    f, boxes, image_size, n=4, output_size=1, min_background=0.0, roi_size=7, attention=True
):  # f: [D][h][w], boxes: [K][4] -> r: [K][s * s][D]
    map_size = size_of(f[0])
    m = definite_background(boxes, image_size, map_size)
    q, q_valid = grid_prototypes(f, m, n)
    plain = not attention or too_little_background(m, everywhere(map_size), min_background)
    pooled = []
    for box in boxes:
        samples = roi_align(f, box, image_size, roi_size)
        vectors = []
        for row in range(output_size):
            for column in range(output_size):
                members = [
                    samples[i][j]
                    for i, j in positions((roi_size, roi_size))
                    if i * output_size // roi_size == row and j * output_size // roi_size == column
                ]
                weights = [
                    1.0 if plain else 1 - background_similarity(v, q, q_valid) for v in members
                ]
                vectors.append(weighted_mean(members, weights, len(f)))
        pooled.append(vectors)
    return pooled


def log_softmax(scores):  # [C] -> [C]
    top = max(scores)
    total = math.log(sum(math.exp(s - top) for s in scores)) + top
    return [s - total for s in scores]


def box_classification_loss(r, labels, q, q_valid, weight):
    # all images together; r: [K][s * s][D], labels: [K], q: [B][n * n][D], weight: [L + 1][D]
    terms = []
    for vectors, label in zip(r, labels, strict=True):
        for vector in vectors:
            terms.append(-log_softmax([dot(vector, w) for w in weight])[label])
    for cells, valid in zip(q, q_valid, strict=True):
        for vector, ok in zip(cells, valid, strict=True):
            if ok:
                terms.append(-log_softmax([dot(vector, w) for w in weight])[0])
    return sum(terms) / len(terms) if terms else 0.0


# ------------------------------------------------------------------------ suppl. Eq. 3: classifier


def cosine_similarity(f, weight):  # f: [D][h][w], weight: [C][D] -> [C][h][w]
    return [
        plane_of(size_of(f[0]), lambda i, j, w=w: cosine(vector_at(f, i, j), w)) for w in weight
    ]
