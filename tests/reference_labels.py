"""Pseudo labels (Eq. 5-9) and the classifier in closed form as loops, like ``reference.py``."""

import math

from reference import (
    background_similarity,
    bilinear,
    box_cells,
    box_coverage,
    cosine_similarity,
    definite_background,
    dot,
    everywhere,
    grid_prototypes,
    log_softmax,
    plane_of,
    positions,
    ratio,
    size_of,
    valid_cells,
    vector_at,
)

# Of the label generator.
DEFAULTS = {
    "grid_size": 2,
    "attention_reduction": "max",
    "background": "both",
    "background_threshold": None,
    "background_minmax": True,
    "background_otsu": True,
    "background_prior": 128.0,
    "foreground": "complement",
    "cam_normalization": "class",
    "overlaps": "smaller",
    "unary_softmax": 3.0,
    "align_corners": False,
}


# -------------------------------------------------------------------------- Eq. 5-9: pseudo labels


def union(masks, size):  # list of [H][W] bool -> [H][W] bool
    return plane_of(size, lambda i, j: any(mask[i][j] for mask in masks))


def largest(plane, mask):  # over the positions of the mask; 0 without any
    values = [plane[i][j] for i, j in positions(size_of(plane)) if mask[i][j]]
    return max(values, default=0.0)


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


def background_unary(f, weight, boxes, boxed, image_size, o, valid=None):
    # -> u_0: [H][W], and how many times as sharp the softmax is: [H][W]
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
        shifted = plane_of(image_size, lambda i, j: min(max(u_0[i][j] + 0.5 - theta, 0.0), 1.0))
        u_0 = shifted
    if o["background_prior"] == 0:
        u_0 = plane_of(image_size, lambda i, j: u_0[i][j] if boxed[i][j] else 1.0)
        return u_0, plane_of(image_size, lambda i, j: 1.0)
    masks = [box_cells(box, image_size, image_size) for box in boxes]
    cell = image_size[0] * image_size[1] / (len(f[0]) * len(f[0][0]))

    def mixed(box, i, j):
        x1, y1, x2, y2 = box
        wide, high = max(x2 - x1, 1.0), max(y2 - y1, 1.0)
        w = o["background_prior"] / (o["background_prior"] + wide * high / cell)
        u, v = (2 * j + 1 - x1 - x2) / wide, (2 * i + 1 - y1 - y2) / high
        return (1 - w) * u_0[i][j] + w * min((u**2 + v**2) / 2, 1.0), w

    def least(i, j):  # of those the one that counts most
        here = [mixed(box, i, j) for box, m in zip(boxes, masks, strict=True) if m[i][j]]
        if not here or not boxed[i][j]:
            return 1.0, 0.0
        return min(here, key=lambda pair: (pair[0], -pair[1]))

    u_0 = plane_of(image_size, lambda i, j: least(i, j)[0])
    return u_0, plane_of(image_size, lambda i, j: 1 + least(i, j)[1])


def class_shares(cams, unseen, of_class, corners, overlaps, size):
    # {class: CAM_c in its boxes [H][W]}, classes without weights, {class: masks of its boxes},
    # {class: its boxes}
    # -> [H][W] of {class: share}
    least = {"equal": 1e-3, "smaller": 0.1}[overlaps]
    covered = {c: union(masks, size) for c, masks in of_class.items()}
    peak = max((largest(cam, covered[c]) for c, cam in cams.items()), default=0.0)
    pixels = {c: [sum(map(sum, mask)) for mask in masks] for c, masks in of_class.items()}

    def weight(c, i, j):  # of its likeliest box here
        if overlaps == "equal":
            return 1.0
        likely = []
        for count, mask, (x1, y1, x2, y2) in zip(pixels[c], of_class[c], corners[c], strict=True):
            if mask[i][j]:
                u = (2 * j + 1 - x1 - x2) / max(x2 - x1, 1.0)
                v = (2 * i + 1 - y1 - y2) / max(y2 - y1, 1.0)
                radius = min(abs(u), 2.0) ** 2 + min(abs(v), 2.0) ** 2  # may lie outside
                likely.append(1 / (1 + math.exp(-3 * (1 - radius))) / count)
        return max(likely)

    def shares(i, j):
        here = [c for c in of_class if covered[c][i][j]]
        everything = sum(weight(c, i, j) for c in here)
        prior = {c: weight(c, i, j) / everything for c in here}
        rest = sum(prior[c] for c in here if c not in unseen)
        scores = {
            c: (ratio(cams[c][i][j], peak) + least) * weight(c, i, j)
            for c in here
            if c not in unseen
        }
        total = sum(scores.values())
        return {c: prior[c] if c in unseen else rest * scores[c] / total for c in here}

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
    u_0, sharp = background_unary(f, weight, boxes, boxed, image_size, options, valid)
    unseen = [c for c in of_class if weight is None or not any(weight[c])]
    cams = {
        c: activation(f, weight[c], image_size, options["align_corners"])
        for c in of_class
        if c not in unseen
    }
    scale = plane_of(image_size, lambda i, j: options["unary_softmax"] * sharp[i][j])
    u = {}
    if weight is not None and options["foreground"] == "cam":
        for c in of_class:
            if c in unseen:
                u[c] = plane_of(image_size, lambda i, j, c=c: (1 - u_0[i][j]) * covered[c][i][j])
            else:
                u[c] = foreground_unary(cams[c], of_class[c], options["cam_normalization"])

        def probability(i, j):
            here = [c for c in covered if covered[c][i][j]]
            scores = {0: u_0[i][j], **{c: u[c][i][j] for c in here}}
            return softmax({c: scale[i][j] * score for c, score in scores.items()})

    else:
        corners = {
            c: [box for box, label in zip(boxes, labels, strict=True) if label == c]
            for c in of_class
        }
        shares = class_shares(cams, unseen, of_class, corners, options["overlaps"], image_size)
        for c in of_class:
            u[c] = plane_of(
                image_size, lambda i, j, c=c: (1 - u_0[i][j]) * shares[i][j].get(c, 0.0)
            )

        def probability(i, j):
            if not boxed[i][j]:
                return {0: 1.0}
            s = scale[i][j]
            two = softmax({0: s * u_0[i][j], 1: s * (1 - u_0[i][j])})
            p_0 = two[0] ** (len(shares[i][j]) if options["overlaps"] == "smaller" else 1)
            return {0: p_0, **{c: (1 - p_0) * share for c, share in shares[i][j].items()}}

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
