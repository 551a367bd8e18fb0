"""The equations as loops over Python floats: slow, short, and independent of the package.

Every function works on one image, unless it says so. Tensors are nested lists, as
``Tensor.tolist()`` makes them, with the shape beside each. Sizes are ``(height, width)``; boxes are
``[x1, y1, x2, y2]`` in pixels, half open.
Positions are fractions, so that a cell centre on the border of a box is decided exactly.
"""

import math
from fractions import Fraction

# Of the label generator.
DEFAULTS = {
    "grid_size": 4,
    "attention_reduction": "max",
    "background": "both",
    "background_threshold": None,
    "background_minmax": True,
    "background_otsu": True,
    "foreground": "complement",
    "cam_normalization": "class",
    "unary_softmax": 3.0,
    "align_corners": False,
}

# ----------------------------------------------------------------------------------------- vectors


def dot(a, b):
    total = 0.0
    for x, y in zip(a, b, strict=True):
        total += x * y
    return total


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


# -------------------------------------------------------------------------- Eq. 5-9: pseudo labels


def union(masks, size):  # list of [H][W] bool -> [H][W] bool
    return plane_of(size, lambda i, j: any(mask[i][j] for mask in masks))


def largest(plane, mask):  # over the positions of the mask; 0 without any
    values = [plane[i][j] for i, j in positions(size_of(plane)) if mask[i][j]]
    return max(values, default=0.0)


def ratio(a, b):
    return a / b if b != 0 else 0.0


def scores_of(f, w, size, align_corners=False):  # f . w + b, w: [D] or [D + 1] -> [H][W]
    bias = w[len(f)] if len(w) > len(f) else 0.0
    plane = plane_of(size_of(f[0]), lambda i, j: dot(vector_at(f, i, j), w[: len(f)]) + bias)
    return bilinear(plane, size, align_corners)


def activation(f, w, size, align_corners=False):  # Eq. 6, f: [D][h][w], w: [D] -> [H][W]
    scores = scores_of(f, w, size, align_corners)
    return plane_of(size, lambda i, j: max(scores[i][j], 0.0))


def foreground_unary(cam, masks, normalization="class"):  # Eq. 5 of one class, masks: its boxes
    size = size_of(cam)
    peaks = [largest(cam, mask) for mask in masks]
    if normalization == "class":
        peaks = [max(peaks, default=0.0)] * len(masks)

    def value(i, j):
        covering = [p for p, mask in zip(peaks, masks, strict=True) if mask[i][j]]
        return max((ratio(cam[i][j], p) for p in covering), default=0.0)

    return plane_of(size, value)


def minmax(plane, mask):  # [h][w], [h][w] bool -> [h][w]: 0 to 1 in the mask
    size = size_of(plane)
    inside = [plane[i][j] for i, j in positions(size) if mask[i][j]]
    low, high = min(inside, default=0.0), max(inside, default=0.0)
    span = high - low
    if span <= 1e-14 * max(abs(low), abs(high)):  # rounding, and nothing else
        span = 0.0
    return plane_of(size, lambda i, j: ratio(plane[i][j] - low, span))


def otsu(values, bins=251):  # threshold between two classes of least variance within
    counts = [0] * bins
    for value in values:
        counts[min(int(value * bins), bins - 1)] += 1
    total = sum(counts)
    found = []
    for k in range(1, bins):
        low, high = sum(counts[:k]), total - sum(counts[:k])
        if low == 0 or high == 0:
            continue
        mean_low = sum(counts[i] * (i + 0.5) / bins for i in range(k)) / low
        mean_high = sum(counts[i] * (i + 0.5) / bins for i in range(k, bins)) / high
        found.append((low * high * (mean_low - mean_high) ** 2, k / bins))
    if not found:
        return 0.5
    best = max(variance for variance, _ in found)
    serve = [border for variance, border in found if variance >= best * (1 - 1e-9)]
    return (serve[0] + serve[-1]) / 2


def border(shown):  # [h][w] bool -> [h][w] in {0, 1}: cells with a side at the edge of the image
    h, w = size_of(shown)

    def at_the_edge(i, j):
        sides = [(i - 1, j), (i + 1, j), (i, j - 1), (i, j + 1)]
        within = [0 <= a < h and 0 <= b < w and shown[a][b] for a, b in sides]
        return 1.0 if shown[i][j] and not all(within) else 0.0

    return plane_of((h, w), at_the_edge)


def attention_part(f, boxes, image_size, n, reduction, threshold, valid, align_corners, agnostic):
    # Eq. 7 before the 1s outside the boxes: [H][W]
    map_size = size_of(f[0])
    m = definite_background(boxes, image_size, map_size, valid)
    if agnostic and not any(any(row) for row in m):
        m = border(valid_cells(valid, map_size) if valid is not None else everywhere(map_size))
    q, q_valid = grid_prototypes(f, m, n)
    a = plane_of(
        map_size,
        lambda i, j: background_similarity(vector_at(f, i, j), q, q_valid, reduction),
    )
    a = bilinear(a, image_size, align_corners)
    if threshold is not None:
        limit = threshold * largest(a, valid if valid is not None else everywhere(image_size))
        a = plane_of(image_size, lambda i, j: a[i][j] if a[i][j] >= limit else 0.0)
    return a


def background_unary(f, weight, boxes, boxed, image_size, o, valid=None):  # u_0: [H][W]
    parts = []
    if o["background"] != "cam":
        a = attention_part(
            f,
            boxes,
            image_size,
            o["grid_size"],
            o["attention_reduction"],
            o["background_threshold"],
            valid,
            o["align_corners"],
            weight is None,
        )
        parts.append(minmax(a, boxed) if o["background_minmax"] else a)
    if o["background"] != "attention" and weight is not None:
        if o["background_minmax"]:
            parts.append(minmax(scores_of(f, weight[0], image_size, o["align_corners"]), boxed))
        else:
            cam = activation(f, weight[0], image_size, o["align_corners"])
            peak = largest(cam, valid if valid is not None else everywhere(image_size))
            parts.append(plane_of(image_size, lambda i, j: ratio(cam[i][j], peak)))
    u_0 = plane_of(image_size, lambda i, j: sum(part[i][j] for part in parts) / len(parts))
    if o["background_minmax"]:
        u_0 = minmax(u_0, boxed)
    if o["background_otsu"]:
        theta = otsu([min(max(u_0[i][j], 0), 1) for i, j in positions(image_size) if boxed[i][j]])
        u_0 = plane_of(image_size, lambda i, j: min(max(u_0[i][j] + 0.5 - theta, 0.0), 1.0))
    return plane_of(image_size, lambda i, j: u_0[i][j] if boxed[i][j] else 1.0)


def class_shares(cams, unseen, covered, size, least=1e-3):
    # {class: CAM_c in its boxes [H][W]}, classes without weights -> [H][W] of {class: share}
    peak = max((largest(cam, covered[c]) for c, cam in cams.items()), default=0.0)

    def shares(i, j):
        here = [c for c in covered if covered[c][i][j]]
        rest = sum(1 / len(here) for c in here if c not in unseen)
        scores = {c: ratio(cams[c][i][j], peak) + least for c in here if c not in unseen}
        total = sum(scores.values())
        return {c: 1 / len(here) if c in unseen else rest * scores[c] / total for c in here}

    return plane_of(size, shares)


def softmax(scores):  # {class: score} -> {class: probability}
    parts = log_softmax(list(scores.values()))
    return {c: math.exp(p) for c, p in zip(scores, parts, strict=True)}


def unaries(f, weight, boxes, labels, image_size, classes, options, valid=None):
    # f: [D][h][w], weight: [L + 1][D or D + 1] or None, boxes: [K][4], labels: [K], classes = L,
    # options: those of pseudo_labels, by name
    # -> u_0: [H][W], u: {class: [H][W]}, probabilities: [H][W] of {candidate class: probability}
    shown = valid if valid is not None else everywhere(image_size)
    masks = [box_cells(box, image_size, image_size) for box in boxes]
    masks = [plane_of(image_size, lambda i, j, m=m: m[i][j] and shown[i][j]) for m in masks]
    of_class = {
        c: [mask for mask, label in zip(masks, labels, strict=True) if label == c]
        for c in range(1, classes + 1)
    }
    covered = {c: union(of_class[c], image_size) for c in of_class}
    boxed = union(masks, image_size)
    u_0 = background_unary(f, weight, boxes, boxed, image_size, options, valid)
    unseen = [c for c in of_class if weight is None or not any(weight[c])]
    cams = {
        c: activation(f, weight[c], image_size, options["align_corners"])
        for c in of_class
        if c not in unseen
    }
    scale = options["unary_softmax"]
    u = {}
    if weight is not None and options["foreground"] == "cam":
        for c in of_class:
            if c in unseen:
                u[c] = plane_of(image_size, lambda i, j, c=c: (1 - u_0[i][j]) * covered[c][i][j])
            else:
                u[c] = foreground_unary(cams[c], of_class[c], options["cam_normalization"])

        def probability(i, j):
            here = [c for c in covered if covered[c][i][j]]
            return softmax({0: scale * u_0[i][j], **{c: scale * u[c][i][j] for c in here}})

    else:
        shares = class_shares(cams, unseen, covered, image_size)
        for c in of_class:
            u[c] = plane_of(
                image_size, lambda i, j, c=c: (1 - u_0[i][j]) * shares[i][j].get(c, 0.0)
            )

        def probability(i, j):
            if not boxed[i][j]:
                return {0: 1.0}
            two = softmax({0: scale * u_0[i][j], 1: scale * (1 - u_0[i][j])})
            return {0: two[0], **{c: two[1] * share for c, share in shares[i][j].items()}}

    return u_0, u, plane_of(image_size, probability)


def retrieval(f, weight, y_crf, classes, align_corners=False):
    # f: [D][h][w], weight: [L + 1][D] or None, y_crf: [H][W] -> {class: C_c [H][W]}
    size = size_of(y_crf)
    large = [bilinear(channel, size, align_corners) for channel in f]  # [D][H][W]
    found = {}
    for c in range(classes + 1):
        members = [(i, j) for i, j in positions(size) if y_crf[i][j] == c]
        if members:
            query = [sum(x[i][j] for i, j in members) / len(members) for x in large]  # Eq. 8
        elif weight is not None and any(weight[c][: len(f)]):
            query = weight[c][: len(f)]
        else:
            continue
        correlation = cosine_similarity(f, [query])[0]  # Eq. 9
        found[c] = bilinear(correlation, size, align_corners)
    return found


# --------------------------------------------------------------- the classifier in closed form


def box_targets(f, boxes, labels, image_size, num_classes, n=4, valid=None):
    # f: [D][h][w], boxes: [K][4], labels: [K] -> y: [L + 1][h][w], known: [h][w] bool
    map_size = size_of(f[0])
    shown = valid_cells(valid, map_size) if valid is not None else everywhere(map_size)
    shares = [box_coverage(box, image_size, map_size) for box in boxes]

    def covered(c, i, j):  # v_c
        of_class = [v for v, label in zip(shares, labels, strict=True) if label == c]
        return max((v[i][j] for v in of_class), default=0.0)

    v = plane_of(map_size, lambda i, j: max((s[i][j] for s in shares), default=0.0))
    m = definite_background(boxes, image_size, map_size, valid)
    q, q_valid = grid_prototypes(f, m, n)
    a = plane_of(
        map_size, lambda i, j: background_similarity(vector_at(f, i, j), q, q_valid, "max")
    )
    mask = plane_of(map_size, lambda i, j: v[i][j] > 0 and shown[i][j])
    scaled = minmax(a, mask)
    theta = otsu([scaled[i][j] for i, j in positions(map_size) if mask[i][j]]) - 0.1

    def target(c, i, j):
        every = [covered(k, i, j) for k in range(1, num_classes)]
        likely = v[i][j] / (1 + math.exp(-8 * (theta - min(max(scaled[i][j], 0.0), 1.0))))
        return likely * ratio(covered(c, i, j), sum(every))

    y = [None] + [
        plane_of(map_size, lambda i, j, c=c: target(c, i, j)) for c in range(1, num_classes)
    ]
    y[0] = plane_of(map_size, lambda i, j: 1 - sum(plane[i][j] for plane in y[1:]))
    background = any(any(row) for row in m)
    known = plane_of(map_size, lambda i, j: shown[i][j] and (v[i][j] == 0 or background))
    return y, known


def ridge_sums(cells):  # of (x: [D], y: [C]) -> sum of x x^T: [D + 1][D + 1], of x y^T: [D + 1][C]
    d, c = len(cells[0][0]) + 1, len(cells[0][1])
    gram, moment = [[0.0] * d for _ in range(d)], [[0.0] * c for _ in range(d)]
    for x, y in cells:
        x = [*x, 1.0]
        for i in range(d):
            for j in range(d):
                gram[i][j] += x[i] * x[j]
            for j in range(c):
                moment[i][j] += x[i] * y[j]
    return gram, moment


def eliminate(matrix, right):  # [n][n], [n][m] -> [n][m], by Gauss
    rows = [[*a, *b] for a, b in zip(matrix, right, strict=True)]
    n = len(rows)
    for k in range(n):
        best = max(range(k, n), key=lambda i: abs(rows[i][k]))
        rows[k], rows[best] = rows[best], rows[k]
        rows[k] = [x / rows[k][k] for x in rows[k]]
        for i in range(n):
            if i != k:
                rows[i] = [x - rows[i][k] * p for x, p in zip(rows[i], rows[k], strict=True)]
    return [row[n:] for row in rows]


def ridge_weights(gram, moment, penalty):  # [D + 1][D + 1], [D + 1][C] -> [C][D + 1]
    count, d = gram[-1][-1], len(gram) - 1
    g = [[x / count for x in row] for row in gram]
    r = [[x / count for x in row] for row in moment]
    variance = sum(g[i][i] - g[i][d] ** 2 for i in range(d)) / d
    for i in range(d):
        g[i][i] += penalty * variance
    return [list(column) for column in zip(*eliminate(g, r), strict=True)]


# ------------------------------------------------------------------------------- Eq. 10-14: losses


def confidence(cosines, label, gamma):  # [C] of one position -> sigma (Eq. 11-12)
    d = [max(1 + s, 0.0) for s in cosines]
    return ratio(d[label], max(d)) ** gamma


def pixels(scores, similarity, y_crf, y_ret, ignore_index=255, align_corners=False):
    # of a batch: scores [B][C][h][w], similarity [B][C][h'][w'] or None, labels [B][H][W]
    # -> for every labelled pixel (log H [C], cosines [C], label, reliable)
    found = []
    for b in range(len(y_crf)):
        size = size_of(y_crf[b])
        z = [bilinear(plane, size, align_corners) for plane in scores[b]]
        s = [bilinear(plane, size, align_corners) for plane in (similarity or scores)[b]]
        for i, j in positions(size):
            label = y_crf[b][i][j]
            if label != ignore_index:
                log_h = log_softmax(vector_at(z, i, j))
                found.append((log_h, vector_at(s, i, j), label, label == y_ret[b][i][j]))
    return found


def mean(values):
    return sum(values) / len(values) if values else 0.0


def cross_entropy_part(found):  # Eq. 10
    return mean([-log_h[label] for log_h, _, label, reliable in found if reliable])


def noise_aware_loss(found, gamma=7.0, balance=0.1):  # Eq. 13-14
    terms = [(confidence(s, c, gamma), -log_h[c]) for log_h, s, c, ok in found if not ok]
    weighted = ratio(sum(a * b for a, b in terms), sum(a for a, _ in terms))
    return cross_entropy_part(found) + balance * weighted


def entropy_regularization_loss(found, balance=0.1):  # suppl. Eq. 4-5
    entropies = [-sum(math.exp(x) * x for x in log_h) for log_h, _, _, ok in found if not ok]
    return cross_entropy_part(found) + balance * mean(entropies)


def bootstrapping_loss(found, beta, balance=0.1, targets=None):  # suppl. Eq. 6-8
    # targets: the H of the E-step, one [C] for each found pixel; by default the model's own
    targets = targets or [[math.exp(x) for x in log_h] for log_h, *_ in found]
    terms = []
    for (log_h, _, label, ok), h in zip(found, targets, strict=True):
        if not ok:
            y = [beta * (c == label) + (1 - beta) * h[c] for c in range(len(h))]
            terms.append(-dot(y, log_h))
    return cross_entropy_part(found) + balance * mean(terms)


def poly_schedule(step, total, power=0.9):
    return (1 - step / total) ** power
